import { checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { lengths, offsets, vector } from './arguments.js'

/**
 * What {@link attention} computes for one head, with `off = sk - sq`: row p stands at position p + off. In float64 this
 * text is the oracle of the tests.
 */
export const attentionDefinition = `
  S[p,m]  = sum(e) Q[p,e] * K[m,e] * scale   where m <= p + off
  GM[p]   = max(m) S[p,m]
  SN[p,m] = exp(S[p,m] - GM[p])
  SD[p]   = sum(m) SN[p,m]
  O[p,f]  = sum(m) SN[p,m] * V[m,f] / SD[p]
  LSE[p]  = GM[p] + log(SD[p])`

/** Options of {@link attention}. */
export interface AttentionOptions {
  /** Row i sees the keys up to its own position, `sk - sq + i`: aligned to the bottom right. */
  causal?: boolean | undefined
  /** How many keys a row sees, counted back from and with its own position. All of them if left out. */
  window?: number | undefined
  /** Factor of q·k; `1/√d` if left out. */
  scale?: number | undefined
  /** Scores become `softCap * tanh(score / softCap)`. Off if left out or 0. */
  softCap?: number | undefined
  /** One per query head, f32: `slope * (key position - row position)` is added to the score (ALiBi). */
  slopes?: Tensor<'float32'> | readonly number[] | undefined
  /** One logit per query head, f32, that takes part in the normaliser and has no value (0 is the off-by-one softmax). */
  sink?: Tensor<'float32'> | readonly number[] | undefined
  /** Where each packed sequence of q begins, then the total; q is [1, total, hq, d]. Goes with `cuSeqlensK`. */
  cuSeqlensQ?: Tensor<'int32'> | readonly number[] | undefined
  /** Where each packed sequence of k and v begins, then the total. */
  cuSeqlensK?: Tensor<'int32'> | readonly number[] | undefined
  /**
   * [b, maxPages], i32: k and v are pages `[pages, pageSize, hk, d]`, and this says which page holds which part of a
   * sequence. Page sizes are powers of two up to 256. Goes with `cacheSeqlens`.
   */
  blockTable?: Tensor<'int32'> | undefined
  /** [b], i32: how many keys each sequence of the batch has; what lies behind them is not read. */
  cacheSeqlens?: Tensor<'int32'> | readonly number[] | undefined
}

/** What {@link attention} returns. */
export interface AttentionResult<D extends FloatDType = FloatDType> {
  /** [b, sq, hq, dv], the dtype of q. */
  out: Tensor<D>
  /** [b, hq, sq], f32: natural log of the sum of exp(score), the sink included. */
  lse: Tensor<'float32'>
}

const known: ReadonlySet<string> = new Set<keyof AttentionOptions>([
  'causal',
  'window',
  'scale',
  'softCap',
  'slopes',
  'sink',
  'cuSeqlensQ',
  'cuSeqlensK',
  'blockTable',
  'cacheSeqlens',
])

/**
 * Exact softmax attention in one fused pass: `softmax(q kᵀ · scale + …) v`, with {@link attentionDefinition} as its
 * definition. A row that sees no key gives `out = 0` and `lse = -inf`, which {@link merge} treats as nothing.
 *
 * @param q [b, sq, hq, d], float32, float16 or bfloat16; d a multiple of 8 up to 256.
 * @param k [b, sk, hk, d], same dtype; hq a multiple of hk (query head i reads head i div (hq / hk)).
 * @param v [b, sk, hk, dv], same dtype; dv a multiple of 8 up to 256.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call; reading rejects if the contents
 * of `cuSeqlensQ`, `cuSeqlensK`, `blockTable` or `cacheSeqlens` are out of range.
 * @example
 * import { attention, randn } from 'heddle'
 * const q = randn([1, 128, 8, 64])
 * const k = randn([1, 128, 2, 64])
 * const v = randn([1, 128, 2, 64])
 * const { out, lse } = attention(q, k, v, { causal: true })
 * console.log(out.shape, lse.shape) // [1, 128, 8, 64] [1, 8, 128]
 */
export function attention<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: AttentionOptions = {},
): AttentionResult<D> {
  checkTensor('attention', 'q', q)
  checkTensor('attention', 'k', k)
  checkOptions('attention', options, known)
  const { slopes, sink, cuSeqlensQ, cuSeqlensK, cacheSeqlens, ...rest } = options
  const made: Tensor[] = []
  try {
    const [out, lse] = run('attention', {
      q,
      k,
      v,
      ...rest,
      slopes: vector('attention', 'slopes', slopes, q.device, made),
      sink: vector('attention', 'sink', sink, q.device, made),
      cuSeqlensQ: offsets('attention', 'cuSeqlensQ', cuSeqlensQ, q.shape[1], q.device, made),
      cuSeqlensK: offsets('attention', 'cuSeqlensK', cuSeqlensK, k.shape[1], q.device, made),
      cacheSeqlens: lengths('attention', 'cacheSeqlens', cacheSeqlens, q.device, made),
    })
    return { out, lse } as AttentionResult<D>
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}
