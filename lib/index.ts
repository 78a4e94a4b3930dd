export * from './cascade/index.js'
export type { CudaDevice, CudaInfo, CudaReason, Device, DeviceLike, MemoryInfo } from './device.js'
export { cuda, elapsed, memory, synchronize } from './device.js'
export type { DType, DTypeOf, FloatDType, HostArray, HostArrays, HostValues } from './dtype.js'
export { bytesPerElement, dtypes } from './dtype.js'
export type { ErrorCode, ErrorDetails } from './errors.js'
export { HeddleError } from './errors.js'
export { type Explanation, explain } from './explain.js'
export type { Graph } from './graph.js'
export { graph } from './graph.js'
export type {
  HeadMode,
  MaskOptions,
  MaskRange,
  PaddedLists,
  PaddedTokens,
  RowLists,
  SvgOptions,
  TokenLists,
} from './mask.js'
export { Mask } from './mask.js'
export type {
  FlexPrefillAttentionOptions,
  FlexPrefillOptions,
} from './mechanisms/flex-prefill.js'
export { achievedMass, flexPrefill, flexPrefillAttention } from './mechanisms/flex-prefill.js'
export type {
  HipAttentionOptions,
  HipDecoder,
  HipDecoderOptions,
  HipDecoderPages,
} from './mechanisms/hip.js'
export { hipAttention, hipDecoder, hipPresets, hipRefresh } from './mechanisms/hip.js'
export type { HipCacheCounts, HipOffload } from './mechanisms/hip-offload.js'
export { infiniteHip, infiniteHipPresets, infiniteHipRope } from './mechanisms/infinite-hip.js'
export type { MInferencePattern } from './mechanisms/minference.js'
export { findPatterns, minference } from './mechanisms/minference.js'
export * from './mechanisms/minimax.js'
export type { PackedOptions } from './mechanisms/packed.js'
export type { SampledOptions } from './mechanisms/sampled.js'
export { sampled } from './mechanisms/sampled.js'
export * from './mechanisms/softplus.js'
export { streaming } from './mechanisms/streaming.js'
export * from './mechanisms/transnormer.js'
export type { XAttentionOptions } from './mechanisms/xattention.js'
export { xattention } from './mechanisms/xattention.js'
export * from './ops/attention.js'
export * from './ops/elementwise.js'
export * from './ops/embed.js'
export type { CacheCounts } from './ops/fetch.js'
export * from './ops/glu.js'
export type {
  HipHeadMode,
  HipLists,
  HipOptions,
  HipPositions,
  HipRope,
  HipStage,
} from './ops/hip.js'
export { hip, hipLists, hipStages } from './ops/hip.js'
export type { KeepOptions } from './ops/keep.js'
export { keep } from './ops/keep.js'
export * from './ops/lightning.js'
export * from './ops/linear.js'
export * from './ops/merge.js'
export * from './ops/norm.js'
export type { ProbeOptions } from './ops/probe.js'
export { probe, probeFormulas } from './ops/probe.js'
export * from './ops/rope.js'
export * from './ops/scatter.js'
export type { LoadOptions, SafetensorsEntry, SafetensorsFile } from './safetensors.js'
export { openSafetensors, writeSafetensors } from './safetensors.js'
export { scope } from './scope.js'
export type { CreateOptions, ReadOptions } from './tensor.js'
export { empty, full, randn, Tensor, tensor, zeros } from './tensor.js'
