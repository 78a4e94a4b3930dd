import { checkInteger, checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import { checkTensor, empty, type Tensor } from '../tensor.js'

/** What {@link probe} computes by its kind, for a row r of query blocks and a block c of keys; p is the position of a query. */
export const probeFormulas = `
  pooled        score[r,c] = scale * (mean of q over r) . (mean of k over c)
  strided       score[r,c] = max of scale * q[i] . k[t]    where i in sampled(r), t in sampled(c), t <= p(i)
  rows          score[r,c] = mean over i in sampled(r) of sum over t in c of softmax(scale * q[i] . k)[t]
  antidiagonal  the same over groups of stride queries in reverse order and groups of stride keys,
                whose score is scale / stride * (sum of their q . k along antidiagonals)`

/** Options of {@link probe}. */
export interface ProbeOptions {
  /** Which proxy: `'pooled'` if left out. {@link probeFormulas} defines them. */
  kind?: 'pooled' | 'strided' | 'rows' | 'antidiagonal' | undefined
  /** Queries and keys per block, 128 if left out; one number stands for both. */
  block?: number | readonly [number, number] | undefined
  /** Every how manieth query is looked at, and key where the kind samples keys; 1 if left out and if pooled, at most 64. */
  stride?: number | undefined
  /**
   * What `'rows'` sums over: `'block'` if left out, `'key'`, `'distance'` from query to key, or `'line'`, which is both in one
   * go: row 2r of the scores is per key and row 2r + 1 per distance.
   */
  per?: 'block' | 'key' | 'distance' | 'line' | undefined
  /** Whether the visible scores of a row are made to probabilities. */
  softmax?: boolean | undefined
  /** Factor of q·k, `1/√d` if left out. */
  scale?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof ProbeOptions>([
  'kind',
  'block',
  'stride',
  'per',
  'softmax',
  'scale',
])

/** @internal */
export function blockPair(op: string, block: unknown): readonly [number, number] {
  const pair = typeof block === 'number' ? [block, block] : block
  if (!Array.isArray(pair) || pair.length !== 2)
    throw mustBe(op, 'block', 'a size or a pair of sizes', block)
  return [checkInteger(op, 'block', pair[0], 1), checkInteger(op, 'block', pair[1], 1)]
}

/**
 * Proxy scores of a causal attention map, by which {@link keep} selects: {@link probeFormulas}. What a row of blocks cannot
 * see is -inf.
 *
 * @param q [b, sq, hq, d]; sq at most sk, query i stands at sk - sq + i.
 * @param k [b, sk, hk, d], same dtype; hq a multiple of hk.
 * @returns [b, hq, rows of blocks, blocks of keys] float32; the last size is sk `per` key or distance, and rows are twice as
 *   many `per` line.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { probe, randn } from 'heddle'
 * const [q, k] = [randn([1, 512, 4, 64]), randn([1, 512, 2, 64])]
 * console.log(probe(q, k, { kind: 'rows', stride: 8, block: 64 }).shape) // [1, 4, 8, 8]
 */
export function probe<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: ProbeOptions = {},
): Tensor<'float32'> {
  checkTensor('probe', 'q', q)
  checkTensor('probe', 'k', k)
  checkOptions('probe', options, known)
  const { block = 128, ...rest } = options
  const [blockQ, blockK] = blockPair('probe', block)
  const { kind = 'pooled', stride = 1 } = rest
  if (kind === 'pooled' && stride !== 1)
    throw mustBe('probe', 'stride', '1 with kind pooled, which looks at all', stride)
  const [b = 0, sq = 0, hq = 0] = q.shape
  const sk = k.shape[1] ?? 0
  const columns = (rest.per ?? 'block') === 'block' ? Math.ceil(sk / blockK) : sk
  const rows = Math.ceil(sq / blockQ) * (rest.per === 'line' ? 2 : 1)
  const score = empty([b, hq, rows, columns], { device: q.device })
  try {
    run('probe', { q, k, score, blockQ, blockK, ...rest })
    return score
  } catch (error) {
    score.dispose()
    throw error
  }
}
