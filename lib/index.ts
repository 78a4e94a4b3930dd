export * from './cascade/index.js'
export type { CudaDevice, CudaInfo, CudaReason, Device, DeviceLike, MemoryInfo } from './device.js'
export { cuda, memory, synchronize } from './device.js'
export type { AnyTypedArray, DType, DTypeOf, FloatDType, HostArray, HostArrays } from './dtype.js'
export { bytesPerElement, dtypes } from './dtype.js'
export type { ErrorCode, ErrorDetails } from './errors.js'
export { HeddleError } from './errors.js'
export { type Explanation, explain } from './explain.js'
export type { Graph } from './graph.js'
export { graph } from './graph.js'
export type {
  MaskOptions,
  PaddedLists,
  PaddedTokens,
  RowLists,
  SvgOptions,
  TokenLists,
} from './mask.js'
export { Mask } from './mask.js'
export * from './mechanisms/minimax.js'
export * from './mechanisms/transnormer.js'
export * from './ops/attention.js'
export * from './ops/elementwise.js'
export * from './ops/embed.js'
export * from './ops/glu.js'
export * from './ops/lightning.js'
export * from './ops/linear.js'
export * from './ops/merge.js'
export * from './ops/norm.js'
export * from './ops/rope.js'
export type { LoadOptions, SafetensorsEntry, SafetensorsFile } from './safetensors.js'
export { openSafetensors, writeSafetensors } from './safetensors.js'
export { scope } from './scope.js'
export type { CreateOptions, ReadOptions } from './tensor.js'
export { empty, full, randn, Tensor, tensor, zeros } from './tensor.js'
