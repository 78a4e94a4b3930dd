import { checkInteger, checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import type { Mask } from '../mask.js'
import { keep } from '../ops/keep.js'
import { blockPair, probe } from '../ops/probe.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { type PackedOptions, perSequence } from './packed.js'

/** Options of {@link sampled}. */
export interface SampledOptions extends PackedOptions {
  /** Every how manieth query is looked at, 2 if left out. */
  stride?: number | undefined
  /** Keys that a row of blocks gets, in whole blocks; 1152 if left out. */
  topK?: number | undefined
  /** Queries and keys per block, 64 if left out. */
  block?: number | readonly [number, number] | undefined
  /** Factor of q·k, `1/√d` if left out. */
  scale?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof SampledOptions>([
  ...(['stride', 'topK', 'block', 'scale', 'cuSeqlensQ', 'cuSeqlensK'] as const),
])

/**
 * Our own choice of blocks, and the one to start with: every second query is looked at exactly, and a row of blocks gets the
 * blocks of keys with the most of its sampled attention. The budget is fixed and small blocks are chosen, as both keep more
 * of what matters than a coverage does at the same cost. Looking costs a share of 1 / (2 stride) of dense attention.
 *
 * @param q [b, sq, hq, d]; sq at most sk.
 * @param k [b, sk, hk, d].
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, randn, sampled } from 'heddle'
 * const [q, k, v] = [randn([1, 512, 2, 64]), randn([1, 512, 2, 64]), randn([1, 512, 2, 64])]
 * const { out } = attention(q, k, v, { mask: sampled(q, k, { topK: 128 }) })
 */
export function sampled<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: SampledOptions = {},
): Mask {
  checkTensor('sampled', 'q', q)
  checkTensor('sampled', 'k', k)
  checkOptions('sampled', options, known)
  const { stride = 2, block = 64, scale } = options
  const topK = checkInteger('sampled', 'topK', options.topK ?? 1152, 1)
  const pair = blockPair('sampled', block)
  return perSequence('sampled', q, k, pair, options, (own, keys) => {
    using score = probe(own, keys, { kind: 'rows', stride, block: pair, scale })
    const topBlocks = Math.ceil(topK / pair[1])
    const {
      shape: [, sq = 0],
    } = own
    return keep(score, { sq, sk: keys.shape[1], block: pair, topBlocks, forceDiagonal: 1 })
  })
}
