import type { FloatDType } from '../dtype.js'
import type { Mask } from '../mask.js'
import { type HipOptions, hip, hipStages } from '../ops/hip.js'
import type { Tensor } from '../tensor.js'

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
 * @example
 * import { attention, infiniteHip, randn } from 'heddle'
 * const [q, k, v] = [1, 2, 3].map((seed) => randn([1, 1024, 2, 64], { seed }))
 * const { out } = attention(q, k, v, { mask: infiniteHip(q, k, { topK: 256, window: 128, sinkTokens: 64 }) })
 */
export function infiniteHip<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: HipOptions = {},
): Mask {
  return hip(q, k, { stages: hipStages, ...options })
}
