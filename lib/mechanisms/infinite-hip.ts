import { checkInteger, checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import type { Mask } from '../mask.js'
import { type HipOptions, type HipRope, hip, hipStages, knownHip } from '../ops/hip.js'
import type { Tensor } from '../tensor.js'
import { under } from './packed.js'

/** Settings of {@link infiniteHip}, by what they trade. */
export const infiniteHipPresets = {
  /** The released code's: 3000 keys in sight. */
  threeThousandKeys: { stages: hipStages, topK: 2048, window: 1024, sinkTokens: 256 },
  /** Ours, for a budget of 1200 keys: a first scan four times as fine, whose cost it is, finds what the released one misses. */
  fineScans: {
    stages: [
      { chunk: 64, stride: 4 },
      { chunk: 16, stride: 4, topK: 16384 },
      { chunk: 8, stride: 1, topK: 8192 },
    ],
    topK: 704,
    window: 448,
    sinkTokens: 64,
  },
  /** Finer first scans and 5000 keys in sight: twice the cost. */
  fiveThousandKeys: {
    stages: [
      { chunk: 64, stride: 4 },
      { chunk: 32, stride: 4, topK: 32768 },
      { chunk: 16, stride: 1, topK: 16384 },
    ],
    topK: 4096,
    window: 1024,
    sinkTokens: 256,
  },
} as const satisfies Record<string, HipOptions>

/**
 * {@link hip} with the stages of InfiniteHiP (arXiv 2502.08910), unless others are given: chunks of 256, 32 and 8 keys, one
 * list for all heads.
 *
 * @param q [b, sq, hq, d] and
 * @param k [b, sk, hk, d], as {@link hip} takes them.
 * @throws HeddleError as {@link hip} does.
 * @example
 * import { attention, infiniteHip, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * const { out } = attention(q, k, v, { mask: infiniteHip(q, k, { topK: 256, window: 128, sinkTokens: 64 }) })
 */
export function infiniteHip<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: HipOptions = {},
): Mask {
  checkOptions('infiniteHip', options, knownHip)
  return under('infiniteHip', () => hip(q, k, { stages: hipStages, ...options }))
}

/**
 * Positions as InfiniteHiP substitutes them, for the option `rope` of {@link hipAttention} and {@link hipDecoder}: the first
 * three layers compare chunks in their order, the others two halves as neighbours, and what is listed is attended as if it
 * stood right before the window. No distance is beyond what the model has learnt, however long the sequence.
 *
 * @throws HeddleError `ERR_ARGUMENT` if `layer` is no integer from 0 on.
 * @example
 * import { hipAttention, infiniteHipPresets, infiniteHipRope, randn, tensor } from 'heddle'
 * const [q, k, v] = [randn([1, 4096, 2, 64]), randn([1, 4096, 2, 64]), randn([1, 4096, 2, 64])]
 * const angles = Array.from({ length: 4096 * 32 }, (_, i) => Math.floor(i / 32) * 10000 ** ((i % 32) / -32))
 * const table = (f: (angle: number) => number) => tensor(angles.map(f), [4096, 32])
 * const rope = infiniteHipRope(5, { cos: table(Math.cos), sin: table(Math.sin) })
 * const { out } = hipAttention(q, k, v, { ...infiniteHipPresets.fineScans, rope, layer: 5 })
 */
export function infiniteHipRope(layer: number, tables: Pick<HipRope, 'cos' | 'sin'>): HipRope {
  checkInteger('infiniteHipRope', 'layer', layer, 0)
  return { ...tables, positions: layer < 3 ? 'streaming' : 'relative', attended: 'streaming' }
}
