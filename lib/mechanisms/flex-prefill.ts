import { checkInteger, checkNumber, checkOptions, mustBe, offsetNumbers } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { checkMask, type Mask, makeMask } from '../mask.js'
import { run } from '../native.js'
import { type AttentionOptions, type AttentionResult, attention } from '../ops/attention.js'
import { scope } from '../scope.js'
import { checkTensor, empty, type Tensor } from '../tensor.js'
import {
  checkLooks,
  checkRanks,
  everything,
  lengthsOf,
  type PackedOptions,
  packedMask,
  perSequence,
  under,
} from './packed.js'

/** Options of {@link flexPrefill}. */
export interface FlexPrefillOptions extends PackedOptions {
  /**
   * `'reference'`, as if left out, selects what the authors' code selects, whose gamma is no coverage of blocks, but that means
   * of blocks are not rounded to 16 bits; `'coverage'` takes as many columns of blocks as reach gamma, and as many diagonals, on
   * two of which a distance counts in parts.
   */
  mode?: 'reference' | 'coverage' | undefined
  /** Share of attention mass, 0.9 if left out; from 1 on everything is listed. */
  gamma?: number | undefined
  /** Below this distance of the pooled from the exact distribution a head is query-aware; 0.1 if left out. */
  tau?: number | undefined
  /** Tokens that a head gets at least for its columns and for its diagonals, in whole blocks; 1024 if left out. */
  minBudget?: number | undefined
  /** Tokens that it gets at most; no limit if left out. */
  maxBudget?: number | undefined
  /** Queries and keys per block: 16, 32, 64 or 128, as if left out. */
  block?: number | undefined
  /** Whether query head h belongs to kv head h mod hk, as in ChatGLM, instead of to the h / g th; q is copied then. */
  gqaInterleave?: boolean | undefined
  /** Factor of q·k, `1/√d` if left out; the mode `'reference'` estimates with `1/√d` all the same. */
  scale?: number | undefined
}

/** Options of {@link flexPrefillAttention}. */
export interface FlexPrefillAttentionOptions extends FlexPrefillOptions {
  /** Up to how many keys a sequence is dense, 8192 if left out: choosing costs more there than it can save. */
  denseBelow?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof FlexPrefillOptions>([
  ...(['mode', 'gamma', 'tau', 'minBudget', 'maxBudget', 'block', 'gqaInterleave'] as const),
  'scale',
  ...(['cuSeqlensQ', 'cuSeqlensK'] as const),
])
const knownToAttention: ReadonlySet<string> = new Set([...known, 'denseBelow'])

/**
 * Chooses blocks for a causal prefill from its last queries, as FlexPrefill does (arXiv 2502.20766): per head and per input
 * either columns and diagonals, or the pairs of blocks that pooled queries and keys find, where these can be trusted. All heads
 * are chosen at once and nothing waits. A head whose statistics are not finite, and a call of one query, of two blocks or less
 * than the budget, gets everything; where pooling is not trusted, queries before the last ones need not be among these statistics.
 *
 * @param q [b, sq, hq, d], the queries of a prompt or of its next chunk; sq at most sk.
 * @param k [b, sk, hk, d], the keys up to and with those queries.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, flexPrefill, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * const mask = flexPrefill(q, k, { gamma: 0.95, minBudget: 256, block: 64 })
 * const { out } = attention(q, k, v, { mask })
 * console.log(await mask.density())
 */
export function flexPrefill<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: FlexPrefillOptions = {},
): Mask {
  const op = 'flexPrefill'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkOptions(op, options, known)
  const settings = checked(op, options)
  return grouped(q, k, options.gqaInterleave, (queries, back) => {
    const mask = select(op, queries, k, settings, options)
    return mask.blocks ? makeMask({ ...mask, blocks: back(mask.blocks, 1) }) : mask
  })
}

// x with its heads, of which those of axis `axis` are `first` groups of `second`, in groups the other way round
function regrouped<T extends Tensor>(x: T, axis: number, first: number, second: number): T {
  const groups = x.reshape(x.shape.toSpliced(axis, 1, first, second))
  return groups
    .transpose(axis, axis + 1)
    .contiguous()
    .reshape(x.shape) as T
}

// Calls `body` with q whose heads of a kv head stand beside each other, and `back`, which puts heads where they were
function grouped<D extends FloatDType, R>(
  q: Tensor<D>,
  k: Tensor,
  interleaved: boolean | undefined,
  body: (q: Tensor<D>, back: <T extends Tensor>(x: T, axis: number) => T) => R,
): R {
  const [hq = 0, hk = 0] = [q.shape[2], k.shape[2]]
  if (!interleaved || hk < 2 || hq % hk !== 0) return body(q, (x) => x)
  return scope(() =>
    body(regrouped(q, 2, hq / hk, hk), (x, axis) => regrouped(x, axis, hk, hq / hk)),
  )
}

function checked(op: string, options: FlexPrefillOptions) {
  const { mode = 'reference', gamma = 0.9, tau = 0.1, block = 128, scale } = options
  const { minBudget = 1024, maxBudget } = options
  if (mode !== 'reference' && mode !== 'coverage')
    throw mustBe(op, 'mode', '"reference" or "coverage"', mode)
  checkNumber(op, 'gamma', gamma, 'above 0', (x) => x > 0)
  checkNumber(op, 'tau', tau, 'from 0 to 1', (x) => x >= 0 && x <= 1)
  if (![16, 32, 64, 128].includes(block)) throw mustBe(op, 'block', '16, 32, 64 or 128', block)
  checkNumber(op, 'minBudget', minBudget, 'at least 0', (x) => x >= 0)
  if (maxBudget !== undefined) {
    const rule = `at least minBudget = ${minBudget}`
    checkNumber(op, 'maxBudget', maxBudget, rule, (x) => x >= minBudget)
  }
  if (scale !== undefined)
    checkNumber(op, 'scale', scale, 'a finite number above 0', (x) => x > 0 && x < Infinity)
  const { gqaInterleave = false } = options
  if (typeof gqaInterleave !== 'boolean')
    throw mustBe(op, 'gqaInterleave', 'a boolean', gqaInterleave)
  const least = Math.max(Math.ceil(minBudget / block), 1)
  const blocks = Math.max(Math.ceil((maxBudget ?? Infinity) / block), 1)
  const most = Number.isSafeInteger(blocks) ? blocks : 0
  const coverage = mode === 'coverage'
  return { gamma, tau, least, most, block, coverage, scale: coverage ? scale : undefined }
}

// With `denseBelow`, sequences of up to so many keys, and of one query, get everything
function select<D extends FloatDType>(
  op: string,
  q: Tensor<D>,
  k: Tensor<D>,
  settings: ReturnType<typeof checked>,
  packed: PackedOptions,
  denseBelow?: number,
): Mask {
  const { gamma, least, block } = settings
  const short = Math.max(2 * block, least * block, denseBelow ?? 0)
  const blocksOf = (queries: Tensor<D>, keys: Tensor<D>): Mask => {
    const [b = 0, sq = 0, heads = 0] = queries.shape
    const sk = keys.shape[1]!
    const parts = everything(sq, sk, block)
    if (gamma >= 1 || sk <= short || sq <= 1) return parts
    const [rows, columns] = [sq, sk].map((size) => Math.ceil(size / block)) as [number, number]
    const shape = [b, heads, rows, Math.ceil(columns / 32)]
    return scope(() => {
      const blocks = empty(shape, { dtype: 'int32', device: q.device })
      run('flexprefill', { q: queries, k: keys, blocks, ...settings })
      return makeMask({ ...parts, sequences: b, heads, sinkTokens: 0, blocks })
    })
  }
  return perSequence(op, q, k, [block, block], packed, blocksOf)
}

/**
 * A causal prefill over what {@link flexPrefill} chooses, where that pays: of sequences of more than `denseBelow` keys, and of
 * more than one query. The others are dense, and a call without any that is long gives, bit for bit, what {@link attention}
 * does.
 *
 * @param q [b, sq, hq, d], float32, float16 or bfloat16, the queries of a prompt or of its next chunk.
 * @param k [b, sk, hk, d], the keys up to and with those queries.
 * @param v [b, sk, hk, dv].
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { flexPrefillAttention, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * const { out } = flexPrefillAttention(q, k, v, { gamma: 0.95, minBudget: 256, denseBelow: 512 })
 */
export function flexPrefillAttention<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: FlexPrefillAttentionOptions = {},
): AttentionResult<D> {
  const op = 'flexPrefillAttention'
  for (const [name, x] of Object.entries({ q, k, v })) checkTensor(op, name, x)
  checkOptions(op, options, knownToAttention)
  const { denseBelow = 8192, ...chosen } = options
  checkInteger(op, 'denseBelow', denseBelow, 0)
  const settings = checked(op, chosen)
  const { scale, cuSeqlensQ, cuSeqlensK } = chosen
  const { sq, sk } = lengthsOf(op, q, k)
  checkLooks(op, q)
  if (cuSeqlensQ !== undefined || cuSeqlensK !== undefined)
    packedMask(op, q, k, [settings.block, settings.block], chosen)
  const ends = cuSeqlensK === undefined ? [sk] : offsetNumbers(op, 'cuSeqlensK', cuSeqlensK, sk)
  const longest = Math.max(...ends.map((to, i) => to - (ends[i - 1] ?? 0)))
  return grouped(q, k, chosen.gqaInterleave, (queries, back) => {
    const attend = () => {
      if (longest <= denseBelow || sq <= 1 || settings.gamma >= 1)
        return attention(queries, k, v, { scale, causal: true, cuSeqlensQ, cuSeqlensK })
      using mask = select(op, queries, k, settings, chosen, denseBelow)
      return attention(queries, k, v, { scale, mask })
    }
    const { out, lse } = under(op, attend)
    return { out: back(out, 2), lse: back(lse, 1) }
  })
}

/**
 * How much of the attention mass a mask covers, per head: the mean over queries of the sum of dense probabilities over the keys
 * that it lists. As costly as dense attention: a diagnostic.
 *
 * @param q [b, sq, hq, d]; q and k are those that the mask is about.
 * @param k [b, sk, hk, d].
 * @returns One number from 0 to 1 per query head, over all sequences.
 * @throws HeddleError as {@link attention} does, by rejecting.
 * @example
 * import { achievedMass, Mask, randn } from 'heddle'
 * const [q, k] = [randn([1, 256, 2, 64]), randn([1, 256, 2, 64])]
 * console.log(await achievedMass(q, k, Mask.fromWindow({ window: 64 }, { sq: 256 })))
 */
export async function achievedMass<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  mask: Mask,
  options: { scale?: number | undefined } = {},
): Promise<number[]> {
  const op = 'achievedMass'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkRanks(op, { q, k })
  checkMask(op, mask)
  checkOptions(op, options, new Set(['scale']))
  const { cuSeqlensQ, cuSeqlensK, cacheSeqlens, causal } = mask
  const attend = (more: AttentionOptions) =>
    under(op, () => attention(q, k, k, { ...options, ...more }))
  const sparse = attend({ mask })
  const dense = attend({ causal, cuSeqlensQ, cuSeqlensK, cacheSeqlens })
  const [own, all] = await Promise.all([sparse.lse.read(), dense.lse.read()])
  for (const { out, lse } of [sparse, dense]) for (const tensor of [out, lse]) tensor.dispose()
  const [b = 0, sq = 0, heads = 0] = q.shape
  return Array.from({ length: heads }, (_, head) => {
    let [sum, rows] = [0, 0]
    for (let batch = 0; batch < b; batch++)
      for (let i = 0; i < sq; i++) {
        const at = (batch * heads + head) * sq + i
        if (all[at] === Number.NEGATIVE_INFINITY) continue
        sum += Math.exp(own[at]! - all[at]!)
        rows++
      }
    return rows === 0 ? 1 : sum / rows
  })
}
