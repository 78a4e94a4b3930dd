import { checkNumber, checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import type { Mask } from '../mask.js'
import { keep } from '../ops/keep.js'
import { blockPair, probe } from '../ops/probe.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { type PackedOptions, perSequence } from './packed.js'

/** Options of {@link xattention}. */
export interface XAttentionOptions extends PackedOptions {
  /** Queries and keys per antidiagonal sum, 8 if left out; it divides the blocks. */
  stride?: number | undefined
  /** Share of a row's estimated mass that its blocks reach, from 0 to 1; 0.9 if left out. */
  threshold?: number | undefined
  /** Queries and keys per block, 128 if left out. */
  block?: number | readonly [number, number] | undefined
  /** Factor of q·k, `1/√d` if left out. */
  scale?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof XAttentionOptions>([
  ...(['stride', 'threshold', 'block', 'scale', 'cuSeqlensQ', 'cuSeqlensK'] as const),
])

/**
 * Chooses blocks by sums along antidiagonals, as XAttention does (arXiv 2503.16428): per row of blocks the fewest whose
 * estimated mass reaches the threshold, the first block and the diagonal among them.
 *
 * @param q [b, sq, hq, d]; sq at most sk.
 * @param k [b, sk, hk, d].
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, randn, xattention } from 'heddle'
 * const [q, k, v] = [randn([1, 512, 2, 64]), randn([1, 512, 2, 64]), randn([1, 512, 2, 64])]
 * const { out } = attention(q, k, v, { mask: xattention(q, k, { block: 64 }) })
 */
export function xattention<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: XAttentionOptions = {},
): Mask {
  checkTensor('xattention', 'q', q)
  checkTensor('xattention', 'k', k)
  checkOptions('xattention', options, known)
  const { stride = 8, threshold = 0.9, block = 128, scale } = options
  checkNumber('xattention', 'threshold', threshold, 'from 0 to 1', (x) => x >= 0 && x <= 1)
  return perSequence('xattention', q, k, blockPair('xattention', block), options, (own, keys) => {
    using score = probe(own, keys, { kind: 'antidiagonal', stride, block, scale })
    const {
      shape: [, sq = 0],
    } = own
    const rule = { coverage: threshold, forceFirst: 1, forceDiagonal: 1 }
    return keep(score, { sq, sk: keys.shape[1], block, ...rule })
  })
}
