import { checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import type { Mask } from '../mask.js'
import { run } from '../native.js'
import { checkTensor, Tensor } from '../tensor.js'
import { checkFloat32, lengths, maskArguments, offsets, vector } from './arguments.js'

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

/** What {@link attention} computes with weights of `'sigmoid'` and a bias. */
export const sigmoidDefinition = `
  S[p,m] = sum(e) Q[p,e] * K[m,e] * scale        where m <= p + off
  W[p,m] = sigmoid(S[p,m] + bias)
  O[p,f] = sum(m) W[p,m] * V[m,f]`

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
  slopes?: Tensor<'float32'> | readonly number[] | Float32Array | undefined
  /**
   * One logit per query head, f32, whose exponential is added to the sum that weights are divided by, and which has no
   * value (0 is the off-by-one softmax).
   */
  sink?: Tensor<'float32'> | readonly number[] | Float32Array | undefined
  /**
   * Where each of n packed sequences of q begins, then the total; q is [1, total, hq, d]. Goes with `cuSeqlensK`, or with a
   * `blockTable` of n rows: prompts and single tokens of one step of a server in one call.
   */
  cuSeqlensQ?: Tensor<'int32'> | readonly number[] | Int32Array | undefined
  /** Where each packed sequence of k and v begins, then the total. Not with `blockTable`. */
  cuSeqlensK?: Tensor<'int32'> | readonly number[] | Int32Array | undefined
  /**
   * [b, maxPages], i32, or [n, maxPages] with `cuSeqlensQ`: k and v are pages `[pages, pageSize, hk, d]`, and this says which
   * page holds which part of a sequence. Page sizes are powers of two up to 256. Goes with `cacheSeqlens`.
   */
  blockTable?: Tensor<'int32'> | undefined
  /** [b], or [n] with `cuSeqlensQ`, i32: how many keys each sequence has; what lies behind them is not read. */
  cacheSeqlens?: Tensor<'int32'> | readonly number[] | Int32Array | undefined
  /**
   * Which keys each query sees. Whether it is causal, its packed sequences and the lengths of its cache come with it; a window
   * is part of it (`mask.union`), not beside it. Offsets of packed sequences beside one that has its own are best left out:
   * arrays must be the same, and tensors, whose contents are not known at the call, are not read.
   */
  mask?: Mask | undefined
  /**
   * Added to the score after scale, soft cap and slopes: a number, or a tensor that broadcasts to [b, hq, sq, sk]. Below
   * -1.488e9, which is -2^31 ln 2, it counts as -inf: rounding would leave nothing of the score. Such a key has a weight of 0,
   * which its value is multiplied by, so that one that is no finite number still gives NaN; a row of nothing else gives
   * `out = 0` and `lse = -inf`. Neither with packed sequences nor with pages.
   */
  bias?: Tensor<FloatDType> | number | undefined
  /**
   * What a score s weighs: `exp(s)` (`'softmax'`, as if left out), `1 / (1 + exp(-s))` (`'sigmoid'`), `max(s, 0)^power`
   * (`'relu'`) or `log(1 + exp(s))` (`'softplus'`). {@link sigmoidDefinition} is the text of such a call. `'reweighted'` is
   * {@link softplusAttention}: `max(n log(1 + exp(s)) / exp(level) - offset, 0)^power` in a row that sees n keys.
   */
  weights?: 'softmax' | 'sigmoid' | 'relu' | 'softplus' | 'reweighted' | undefined
  /** Power of `'relu'`, a whole number up to 8, or of `'reweighted'`, up to 64; 1 if left out. */
  power?: number | undefined
  /** Whether weights are divided by their sum; if left out not for `'sigmoid'` and `'relu'`. */
  normalise?: boolean | undefined
  /** Whether rows of q and k are divided by their lengths first, so that scores are cosines; `scale` is then best given. */
  cosine?: boolean | undefined
  /** Scores are multiplied by this and by the natural log of how many keys the row sees. Off if left out or 0. */
  lengthScale?: number | undefined
  /**
   * [b, hq, sq], f32, of `'reweighted'`: the `lse` of the same call with weights of `'softplus'`, which is what is taken if it
   * is left out, but for gradients, which need it. One that is found may be of rows rounded to f16, as
   * {@link SoftplusOptions.precision} says.
   */
  level?: Tensor<'float32'> | undefined
  /** Of `'reweighted'`, 1 if left out; 0 whatever is given in rows that see three keys or fewer. */
  offset?: number | undefined
}

/** Options of {@link attention} of float8: numbers of q, k and v are multiplied by the scales of their heads. */
export interface Float8Options<D extends FloatDType = 'bfloat16'> extends AttentionOptions {
  /** [hq], f32; 1 if left out. Not with `cosine`. */
  qScale?: Tensor<'float32'> | readonly number[] | Float32Array | undefined
  /** [hk], f32; 1 if left out. Not with `cosine`. */
  kScale?: Tensor<'float32'> | readonly number[] | Float32Array | undefined
  /** [hk], f32; 1 if left out. */
  vScale?: Tensor<'float32'> | readonly number[] | Float32Array | undefined
  /** The dtype of out, bfloat16 if left out. */
  dtype?: D | undefined
}

/** What {@link attention} returns. */
export interface AttentionResult<D extends FloatDType = FloatDType> {
  /** [b, sq, hq, dv], the dtype of q or, where that is float8, of the option. */
  out: Tensor<D>
  /** [b, hq, sq], f32: natural log of the sum of exp(score) or of the other weights, the sink included. */
  lse: Tensor<'float32'>
}

const shared = [
  ...(['causal', 'window', 'scale', 'softCap', 'slopes', 'sink', 'mask', 'bias'] as const),
  ...(['cuSeqlensQ', 'cuSeqlensK', 'cacheSeqlens'] as const),
  ...(['weights', 'power', 'normalise', 'cosine', 'lengthScale', 'level', 'offset'] as const),
]

const known: ReadonlySet<string> = new Set<keyof Float8Options>([
  ...shared,
  ...(['blockTable', 'qScale', 'kScale', 'vScale', 'dtype'] as const),
])

/**
 * Exact softmax attention in one fused pass: `softmax(q kᵀ · scale + …) v`, with {@link attentionDefinition} as its
 * definition. A row that sees no key gives `out = 0` and `lse = -inf`, or the logit of its sink, which {@link merge} treats as
 * nothing but that.
 *
 * Of float8 the numbers are what q, k and v store times the scales of their heads, and `out` is bfloat16 or what `dtype`
 * says. `cast` gives NaN beyond 448, so a scale is best the largest magnitude of its head divided by that.
 *
 * @param q [b, sq, hq, d], float32, float16, bfloat16 or float8_e4m3fn; d a multiple of 8 up to 256.
 * @param k [b, sk, hk, d], same dtype; hq a multiple of hk (query head i reads head i div (hq / hk)).
 * @param v [b, sk, hk, dv], same dtype; dv a multiple of 8 up to 256. Of 0 columns (`v.slice(3, 0, 0)`) the result
 * is `lse` alone.
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
  k: Tensor<NoInfer<D>>,
  v: Tensor<NoInfer<D>>,
  options?: AttentionOptions,
): AttentionResult<D>
/**
 * The same of float8, or of tensors whose types leave open whether they are: {@link Float8Options} are taken then, and `out`
 * may have the dtype that they name.
 */
export function attention<
  Q extends FloatDType | 'float8_e4m3fn',
  D extends FloatDType = 'bfloat16',
>(
  q: Tensor<Q>,
  k: Tensor<NoInfer<Q>>,
  v: Tensor<NoInfer<Q>>,
  options?: 'float8_e4m3fn' extends Q ? Float8Options<D> : AttentionOptions,
): AttentionResult<Exclude<Q, 'float8_e4m3fn'> | D>
export function attention(
  q: Tensor,
  k: Tensor,
  v: Tensor,
  options: Float8Options<FloatDType> = {},
): AttentionResult {
  checkTensor('attention', 'q', q)
  checkTensor('attention', 'k', k)
  checkOptions('attention', options, known)
  const call: AttentionOptions & Record<string, unknown> = { q, k, v, ...options }
  const made: Tensor[] = []
  try {
    if (q.dtype === 'float8_e4m3fn' && call.dtype === undefined) call.dtype = 'bfloat16'
    checkPacked(call)
    prepare('attention', call, q, k, made)
    const [out, lse] = run('attention', call)
    return { out, lse } as AttentionResult
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

// Keys of packed queries are packed themselves, or stand in pages
function checkPacked(call: AttentionOptions): void {
  const paged = call.blockTable !== undefined
  const refused = (name: string, text: string) =>
    refuse('ERR_ARGUMENT', 'attention', name, `${name} ${text}`)
  if (call.cuSeqlensK !== undefined && paged)
    throw refused('cuSeqlensK', 'cannot be combined with blockTable')
  if (call.cuSeqlensQ !== undefined && !paged && (call.cuSeqlensK ?? call.mask) === undefined)
    throw refused('cuSeqlensQ', 'goes with cuSeqlensK or blockTable')
}

const perHead = ['slopes', 'sink', 'qScale', 'kScale', 'vScale'] as const

// In the words of the schema, before anything else is measured against these shapes
function refuseRanks(op: string, call: Record<string, unknown>): void {
  run(op, Object.fromEntries(Object.entries(call).filter(([, value]) => value instanceof Tensor)))
}

// Fills in what was left out and places arrays, in a copy of the options, so that each of them was read once. What is not
// there stays so: most calls have few options, and their time on the host is that of this function.
function prepare(
  op: string,
  call: AttentionOptions & Record<string, unknown>,
  q: Tensor,
  k: Tensor,
  made: Tensor[],
): void {
  const { device, shape } = q
  const { mask } = call
  if (q.rank !== 4 || k.rank !== 4) refuseRanks(op, call)
  if (call.weights !== undefined && call.normalise === undefined)
    call.normalise = divides(call.weights)
  if (call.offset !== undefined && call.weights !== 'reweighted')
    throw refuse('ERR_ARGUMENT', op, 'offset', 'offset goes with weights of reweighted')
  if (mask !== undefined) Object.assign(call, maskArguments(op, mask, q, k, call, made))
  const place = (name: string, placed: Tensor | undefined) => {
    if (placed) call[name] = placed
  }
  const { cuSeqlensQ, cuSeqlensK, blockTable } = call
  const apart = cuSeqlensQ ? 'cuSeqlensQ' : blockTable ? 'blockTable' : undefined
  if (call.bias !== undefined && apart)
    throw refuse('ERR_ARGUMENT', op, 'bias', `bias cannot be combined with ${apart}`)
  place('bias', biasOf(op, call.bias, q, k, made))
  for (const name of perHead) place(name, vector(op, name, call[name], device, made))
  place('cuSeqlensQ', offsets(op, 'cuSeqlensQ', cuSeqlensQ, shape[1], device, made))
  place('cuSeqlensK', offsets(op, 'cuSeqlensK', cuSeqlensK, k.shape[1], device, made))
  // a table that is none is refused as such
  const columns = blockTable instanceof Tensor ? blockTable.shape[1] : undefined
  const pages = blockTable === undefined ? 1 : columns
  const most = pages === undefined ? undefined : Math.min(k.shape[1]! * pages, 2 ** 31 - 1)
  place('cacheSeqlens', lengths(op, 'cacheSeqlens', call.cacheSeqlens, device, made, most))
}

const divides = (weights: unknown) => weights !== 'sigmoid' && weights !== 'relu'

// As a view of the whole map
function biasOf(
  op: string,
  bias: unknown,
  q: Tensor,
  k: Tensor,
  made: Tensor[],
): Tensor | undefined {
  if (bias === undefined) return undefined
  if (!(bias instanceof Tensor)) {
    if (typeof bias !== 'number' || !Number.isFinite(bias))
      throw mustBe(op, 'bias', 'a tensor or a finite number', bias)
    checkFloat32(op, 'bias', bias)
  }
  const given = bias instanceof Tensor ? bias : vector(op, 'bias', [bias], q.device, made)!
  const map = [q.shape[0]!, q.shape[2]!, q.shape[1]!, k.shape[1]!]
  const missing = map.length - given.rank
  if (missing < 0 || given.shape.some((n, i) => n !== 1 && n !== map[i + missing]))
    throw refuse(
      'ERR_SHAPE',
      op,
      'bias',
      `bias must broadcast to [${map.join(', ')}], got [${given.shape.join(', ')}]`,
    )
  const whole = given.expand(map)
  made.push(whole)
  return whole
}

function fourAxes(bias: Tensor, made: Tensor[]): Tensor {
  const whole = bias.reshape([...new Array(4 - bias.rank).fill(1), ...bias.shape])
  made.push(whole)
  return whole
}

/** Options of {@link attentionBackward}: those of the forward call. */
export interface AttentionBackwardOptions extends Omit<AttentionOptions, 'blockTable'> {
  /** [b, hq, sq], f32: gradient of `lse`, none if left out. Of weights that are divided by their sum. */
  dlse?: Tensor<'float32'> | undefined
  /**
   * Whether the gradient of `bias`, a tensor, is wanted. A bias for every query and key that heads or the batch share takes
   * a map of f32 for each head meanwhile.
   */
  dbias?: boolean | undefined
  /**
   * Whether the same call gives the same bits every time, `true` if left out. Without it the order of sums is free, which
   * is faster on some GPUs.
   */
  deterministic?: boolean | undefined
}

/** What {@link attentionBackward} returns. */
export interface AttentionGradients<D extends FloatDType = FloatDType> {
  /** [b, sq, hq, d], the dtype of q. */
  dq: Tensor<D>
  /** [b, sk, hk, d], summed over the query heads of a group; zero for a key that no row sees. */
  dk: Tensor<D>
  /** [b, sk, hk, dv]. */
  dv: Tensor<D>
  /** [hq], f32; only with `sink`. */
  dsink: Tensor<'float32'> | undefined
  /** [hq], f32; only with `slopes`. */
  dslopes: Tensor<'float32'> | undefined
  /** [b, hq, sq], f32; only with `level`. */
  dlevel: Tensor<'float32'> | undefined
  /** As `bias`, f32, summed over all that it was broadcast to; only if asked for. */
  dbias: Tensor<'float32'> | undefined
}

/** What {@link attentionBackward} computes for one head, in the terms of {@link attentionDefinition}. */
export const attentionBackwardDefinition = `
  P[p,m]  = exp(S[p,m] - LSE[p])             where m <= p + off
  DP[p,m] = sum(f) DO[p,f] * V[m,f]
  D[p]    = sum(f) DO[p,f] * O[p,f]
  DS[p,m] = P[p,m] * (DP[p,m] - D[p])
  DQ[p,e] = sum(m) DS[p,m] * K[m,e] * scale
  DK[m,e] = sum(p) DS[p,m] * Q[p,e] * scale
  DV[m,f] = sum(p) P[p,m] * DO[p,f]`

const knownToBackward: ReadonlySet<string> = new Set<keyof AttentionBackwardOptions>([
  ...shared,
  ...(['dlse', 'dbias', 'deterministic'] as const),
])

/**
 * Gradients of {@link attention}, also reachable as `attention.backward`: scores are computed again from q, k and `lse`, as
 * {@link attentionBackwardDefinition} says, so nothing of the size [sq, sk] is ever stored. A row that sees no key gives
 * and gets nothing. A mask is a constant: what selected its keys gets no gradient. Under `cosine` a row of q or k shorter than
 * 1e-12 gets none either.
 *
 * @param q [b, sq, hq, d]; q, k, v and options are those of the call of {@link attention}.
 * @param out [b, sq, hq, dv], as {@link attention} returned it.
 * @param lse [b, hq, sq], as {@link attention} returned it.
 * @param dout [b, sq, hq, dv]: gradient of `out`, same dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call; reading rejects if the contents
 * of `cuSeqlensQ`, `cuSeqlensK` or `cacheSeqlens` are out of range.
 * @example
 * import { attention, attentionBackward, randn } from 'heddle'
 * const draw = () => randn([1, 128, 8, 64])
 * const [q, k, v, dout] = [draw(), draw(), draw(), draw()]
 * const { out, lse } = attention(q, k, v, { causal: true })
 * const { dq, dk, dv } = attentionBackward(q, k, v, out, lse, dout, { causal: true })
 * console.log(dq.shape, dk.shape, dv.shape) // [1, 128, 8, 64] three times
 */
export function attentionBackward<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<NoInfer<D>>,
  v: Tensor<NoInfer<D>>,
  out: Tensor<NoInfer<D>>,
  lse: Tensor<'float32'>,
  dout: Tensor<NoInfer<D>>,
  options: AttentionBackwardOptions = {},
): AttentionGradients<D> {
  const op = 'attention.backward'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkOptions(op, options, knownToBackward)
  const { dbias = false, ...rest } = options
  const { bias } = rest
  if (dbias !== false && !(dbias === true && bias instanceof Tensor))
    throw refuse('ERR_ARGUMENT', op, 'dbias', 'dbias goes with a bias that is a tensor')
  const call: AttentionOptions & Record<string, unknown> = { q, k, v, out, lse, dout, ...rest }
  const made: Tensor[] = []
  try {
    prepare(op, call, q, k, made)
    if (dbias) call.biased = fourAxes(bias as Tensor, made)
    const [dq, dk, dv, dsink, dslopes, dlevel, sums] = run(op, call)
    if (sums) made.push(sums)
    const whole = sums?.reshape((bias as Tensor).shape)
    return { dq, dk, dv, dsink, dslopes, dlevel, dbias: whole } as AttentionGradients<D>
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

/** The same as {@link attentionBackward}. */
attention.backward = attentionBackward
