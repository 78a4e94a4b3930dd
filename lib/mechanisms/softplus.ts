import { checkNumber, checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { type AttentionOptions, type AttentionResult, attention } from '../ops/attention.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor } from '../tensor.js'

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
])

/**
 * Length-scaled softplus attention with re-weighting (LSSAR), {@link softplusDefinition}: scores grow with the log of how many
 * keys a row sees, softplus takes the place of exp, and of its weights only what is above the mean of the row counts, to a
 * high power. Two passes over the keys: one for the mean, one for the result; no power is ever formed, so nothing overflows.
 *
 * A row whose keys all weigh the same has none above the mean, and gives `out = 0` and `lse = -inf`.
 *
 * @param q [b, sq, hq, d]; q, k and v as {@link attention} takes them.
 * @returns `out`, and as `lse` the natural log of the sum of weights.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { randn, softplusAttention } from 'heddle'
 * const [q, k, v] = [1, 2, 3].map((seed) => randn([1, 128, 8, 64], { seed }))
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
  for (const [name, x] of Object.entries({ q, k, v })) checkTensor(op, name, x)
  checkOptions(op, options, known)
  const { reweight = true, power = 15, offset = 1, qkNorm = true, eps = 0, ...rest } = options
  const { logD = Math.log(q.shape[3]!), scale = 1, causal = true, ...keys } = rest
  checkNumber(op, 'scale', scale, 'a positive number', (x) => x > 0 && x < Infinity)
  checkNumber(op, 'eps', eps, 'a number from 0 on', (x) => x >= 0 && x < Infinity)
  // A logit that only the normaliser sees
  const sink = eps > 0 ? new Array<number>(q.shape[2]!).fill(Math.log(eps)) : undefined
  const call = { ...keys, causal, scale, cosine: qkNorm, lengthScale: logD, sink }
  if (!reweight) return attention(q, k, v, { ...call, weights: 'softplus' })
  return scope(() => {
    // Only the sums count, so values are as narrow as they may be
    const { lse: level } = attention(q, k, v.slice(3, 0, 8), { ...call, weights: 'softplus' })
    return attention(q, k, v, { ...call, weights: 'reweighted', level, power, offset })
  })
}
