import { checkNumber, checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { mostHeads } from '../ops/arguments.js'
import {
  type AttentionGradients,
  type AttentionOptions,
  type AttentionResult,
  attention,
  attentionBackward,
} from '../ops/attention.js'
import { add } from '../ops/elementwise.js'
import { merge } from '../ops/merge.js'
import { scope } from '../scope.js'
import { checkTensor, full, type Tensor, zeros } from '../tensor.js'
import { checkRanks, under } from './packed.js'

/**
 * What {@link softplusAttention} computes for one head, with `off = sk - sq` and an offset of 1: row p sees
 * `p + off + 1` keys.
 */
export const softplusDefinition = `
  QQ[p]   = sum(e) Q[p,e] * Q[p,e]
  KK[m]   = sum(e) K[m,e] * K[m,e]
  C[p,m]  = sum(e) Q[p,e] * K[m,e] * rsqrt(QQ[p]) * rsqrt(KK[m])
  X[p,m]  = C[p,m] * logD * log(p + off + 1)                    where m <= p + off
  A[p,m]  = softplus(X[p,m])
  Z[p]    = sum(m) A[p,m]
  T[p,m]  = (p + off + 1) * A[p,m] / Z[p] - if(p + off < 3, 0, 1)   where m <= p + off
  W[p,m]  = pow(relu(T[p,m]), power)
  SW[p]   = sum(m) W[p,m]
  O[p,f]  = sum(m) W[p,m] * V[m,f] / SW[p]`

/** Options of {@link softplusAttention}. */
export interface SoftplusOptions
  extends Pick<
    AttentionOptions,
    'window' | 'cuSeqlensQ' | 'cuSeqlensK' | 'blockTable' | 'cacheSeqlens'
  > {
  /** Row i sees the keys up to its own position; `true` if left out. */
  causal?: boolean | undefined
  /** Whether the weights are sharpened, `true` if left out; without it they are `softplus(score)` divided by their sum. */
  reweight?: boolean | undefined
  /** From 1 to 64; 15, the best beyond the length of training, if left out. At that length 3 is the best. */
  power?: number | undefined
  /** What is taken off weights of mean 1, but for rows that see three keys or fewer; 1 if left out. */
  offset?: number | undefined
  /** Whether scores are cosines; `true` if left out. */
  qkNorm?: boolean | undefined
  /** The natural log of d if left out. */
  logD?: number | undefined
  /** A further factor of scores, 1 if left out. */
  scale?: number | undefined
  /** Added to both sums of weights; 0 if left out. Other implementations have 1e-8. */
  eps?: number | undefined
  /**
   * What a row gives whose keys all weigh the same, so that none is above the mean: `'zero'`, as if left out, or `'mean'`,
   * what it gives without re-weighting, from a third pass. `lse` is -inf either way, and gradients are those of zeros. Only
   * where eps is 0.
   */
  degenerate?: 'zero' | 'mean' | undefined
  /**
   * With `'high'` the mean of a row is found with f32 lengths of q and k. By default rows of f16 and bf16 may be rounded to f16
   * at length 1 on a GPU, keys less what the first sixteen have in common, which takes two thirds of the time: results err by
   * 2e-3 of their size, also of keys that are nearly alike. Keys that are close to each other, but not to the first ones, lose
   * digits: those that differ by a tenth of what they have in common give 1e-2 where the first ones are opposite to them, and
   * so do keys and queries that all are nearly alike.
   * Gradients need `lse` to be as exact.
   */
  precision?: 'default' | 'high' | undefined
}

const known: ReadonlySet<string> = new Set<keyof SoftplusOptions>([
  'causal',
  'window',
  'cuSeqlensQ',
  'cuSeqlensK',
  'blockTable',
  'cacheSeqlens',
  'reweight',
  'power',
  'offset',
  'qkNorm',
  'logD',
  'scale',
  'eps',
  'degenerate',
  'precision',
])

/**
 * Length-scaled softplus attention with re-weighting (LSSAR), {@link softplusDefinition}: scores grow with the log of how many
 * keys a row sees, softplus takes the place of exp, and of its weights only what is above the mean of the row counts, to a
 * high power. Two passes over the keys: one for the mean, one for the result; no power is ever formed, so nothing overflows.
 *
 * A row whose keys all weigh the same has none above the mean, and gives `out = 0`, or with `degenerate` what it would give
 * without re-weighting, and `lse = -inf`.
 *
 * @param q [b, sq, hq, d]; q, k and v as {@link attention} takes them.
 * @returns `out`, and as `lse` the natural log of the sum of weights.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { randn, softplusAttention } from 'heddle'
 * const [q, k, v] = [randn([1, 128, 8, 64]), randn([1, 128, 8, 64]), randn([1, 128, 8, 64])]
 * const { out } = softplusAttention(q, k, v, { power: 3 })
 * console.log(out.shape) // [1, 128, 8, 64]
 */
export function softplusAttention<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: SoftplusOptions = {},
): AttentionResult<D> {
  const op = 'softplusAttention'
  const { call, reweighted, mean, high } = recipe(op, { q, k, v }, options)
  const run = () => {
    if (!reweighted) return attention(q, k, v, { ...call, weights: 'softplus' })
    const level = high ? levelOf(q, k, v, call) : undefined
    const sharp = attention(q, k, v, { ...call, ...reweighted, level })
    if (!mean) return sharp
    const plain = attention(q, k, v, { ...call, weights: 'softplus' })
    // weighs nothing beside any row that has a sum, and everything where there is none
    const lse = full(sharp.lse.shape, -1e30, { device: q.device })
    return { out: merge([sharp, { out: plain.out, lse }]).out, lse: sharp.lse }
  }
  return scope(() => under(op, run))
}

/** What {@link softplusBackward} returns. */
export type SoftplusGradients<D extends FloatDType = FloatDType> = Pick<
  AttentionGradients<D>,
  'dq' | 'dk' | 'dv'
>

/**
 * Gradients of {@link softplusAttention}, also reachable as `softplusAttention.backward`. A score moves the result through its
 * own weight and through the mean of the row, so that keys below the mean get gradients too: those of the second pass, and
 * then those of the first from what the second has for its level. Nothing of the size [sq, sk] is stored.
 *
 * @param q [b, sq, hq, d]; q, k, v and options are those of the call of {@link softplusAttention}, but for pages.
 * @param out [b, sq, hq, dv] and `lse` [b, hq, sq], as {@link softplusAttention} returned them.
 * @param dout [b, sq, hq, dv]: gradient of `out`, same dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { randn, softplusAttention } from 'heddle'
 * const draw = () => randn([1, 128, 8, 64])
 * const [q, k, v, dout] = [draw(), draw(), draw(), draw()]
 * const { out, lse } = softplusAttention(q, k, v)
 * const { dq } = softplusAttention.backward(q, k, v, out, lse, dout)
 * console.log(dq.shape) // [1, 128, 8, 64]
 */
export function softplusBackward<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  out: Tensor<D>,
  lse: Tensor<'float32'>,
  dout: Tensor<D>,
  options: Omit<SoftplusOptions, 'blockTable'> = {},
): SoftplusGradients<D> {
  const op = 'softplusAttention.backward'
  const { call, reweighted } = recipe(op, { q, k, v, out, lse, dout }, options)
  const run = () => {
    if (!reweighted) {
      const gradients = { ...call, weights: 'softplus' } as const
      const { dq, dk, dv } = attentionBackward(q, k, v, out, lse, dout, gradients)
      return { dq, dk, dv }
    }
    const level = levelOf(q, k, v, call)
    const { dlevel: dlse, ...second } = attentionBackward(q, k, v, out, lse, dout, {
      ...call,
      ...reweighted,
      level,
    })
    // of the first pass only the sums counted, so values are as narrow as they may be
    const nothing = zeros([1, 1, 1, 1], { dtype: q.dtype, device: q.device }).expand([
      ...q.shape.slice(0, 3),
      8,
    ])
    const first = attentionBackward(q, k, v.slice(3, 0, 8), nothing, level, nothing, {
      ...call,
      weights: 'softplus',
      dlse,
    })
    return { dq: add(second.dq, first.dq), dk: add(second.dk, first.dk), dv: second.dv }
  }
  return scope(() => under(op, run))
}

/** The same as {@link softplusBackward}. */
softplusAttention.backward = softplusBackward

const levelOf = <D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  call: AttentionOptions,
) => attention(q, k, v.slice(3, 0, 0), { ...call, weights: 'softplus' }).lse

// The options of attention that both passes have, and those of the second one
function recipe(op: string, tensors: Record<string, Tensor>, options: SoftplusOptions) {
  for (const [name, x] of Object.entries(tensors)) checkTensor(op, name, x)
  const { q, k, v } = tensors as { q: Tensor; k: Tensor; v: Tensor }
  checkRanks(op, { q, k, v })
  checkOptions(op, options, known)
  const { reweight = true, power = 15, offset = 1, qkNorm = true, eps = 0, ...rest } = options
  const { logD = Math.log(q.shape[3]!), scale = 1, causal = true, ...keys } = rest
  checkNumber(op, 'scale', scale, 'a positive number', (x) => x > 0 && x < Infinity)
  checkNumber(op, 'logD', logD, 'a finite number', Number.isFinite)
  for (const [name, flag] of Object.entries({ reweight, qkNorm }))
    if (typeof flag !== 'boolean') throw mustBe(op, name, 'a boolean', flag)
  checkNumber(op, 'eps', eps, 'a number from 0 on', (x) => x >= 0 && x < Infinity)
  const { degenerate = 'zero', precision = 'default', ...shared } = keys
  if (precision !== 'default' && precision !== 'high')
    throw mustBe(op, 'precision', '"default" or "high"', precision)
  if (degenerate !== 'zero' && degenerate !== 'mean')
    throw mustBe(op, 'degenerate', '"zero" or "mean"', degenerate)
  const mean = degenerate === 'mean'
  if (mean && eps > 0) throw mustBe(op, 'degenerate', '"zero" where eps is above 0', degenerate)
  // A logit that only the normaliser sees, of each head: a tensor without elements may have any number of them
  const heads = q.shape[2] ?? 0
  if (eps > 0 && heads > mostHeads)
    throw refuse('ERR_SHAPE', op, 'q', `q must have at most ${mostHeads} heads, got ${heads}`)
  const sink = eps > 0 ? new Array<number>(heads).fill(Math.log(eps)) : undefined
  const call = { ...shared, causal, scale, cosine: qkNorm, lengthScale: logD, sink }
  const reweighted = reweight && ({ weights: 'reweighted', power, offset } as const)
  return { call, mean, high: precision === 'high', reweighted }
}
