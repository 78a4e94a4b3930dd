import { checkInteger, checkOptions, mustBe } from '../check.js'
import { named, refuse } from '../errors.js'
import { Mask, makeMask } from '../mask.js'
import { run } from '../native.js'
import { checkTensor, type Tensor, zeros } from '../tensor.js'
import { blockPair } from './probe.js'

/** Options of {@link keep}: one of `topBlocks`, `coverage` and `threshold`, and what the scores are about. */
export interface KeepOptions {
  /** Queries and keys of the call that the mask is for; `sk` is `sq` if left out. */
  sq: number
  sk?: number | undefined
  /** Queries and keys per block, 128 if left out. */
  block?: number | readonly [number, number] | undefined
  /** The best so many blocks of a row. */
  topBlocks?: number | undefined
  /** The fewest blocks whose scores, taken as masses, reach this share of the row's sum; from 1 on all. */
  coverage?: number | undefined
  /** Every block whose score is at least this. */
  threshold?: number | undefined
  /** Whether the rule holds for every `'row'`, as if left out, or for the whole `'map'` of a head. */
  over?: 'row' | 'map' | undefined
  /** At least so many blocks, per row on average. */
  minBlocks?: number | undefined
  /** At most so many blocks, per row on average, 1 at least; no limit if left out. */
  maxBlocks?: number | undefined
  /** The first blocks of keys, taken first and inside the budget; a coverage has all of them, which count. */
  forceFirst?: number | undefined
  /** The blocks of the row's own positions and those before them, so many, as `forceFirst`. */
  forceDiagonal?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof KeepOptions>([
  ...(['sq', 'sk', 'block', 'topBlocks', 'coverage', 'threshold', 'over'] as const),
  ...(['minBlocks', 'maxBlocks', 'forceFirst', 'forceDiagonal'] as const),
])

/**
 * Keeps the best of many scores: larger ones first, then the lower index. NaN comes last of the visible, and -inf is never
 * kept. Nothing is sorted and nothing is read by the host.
 *
 * @param score [b, heads, rows of blocks, blocks of keys] float32, as {@link probe} returns them.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, keep, probe, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * const mask = keep(probe(q, k, { block: 64 }), { sq: 1024, block: 64, topBlocks: 4, forceDiagonal: 1 })
 * const { out } = attention(q, k, v, { mask })
 * console.log(await mask.density())
 */
export function keep(score: Tensor<'float32'>, options: KeepOptions): Mask {
  checkTensor('keep', 'score', score)
  checkOptions('keep', options, known)
  if (options === undefined) throw mustBe('keep', 'options', 'an object', options)
  const { topBlocks, coverage, threshold, over = 'row', block = 128 } = options
  const rules = Object.entries({ top: topBlocks, coverage, threshold }).filter(
    ([, x]) => x !== undefined,
  )
  if (rules.length !== 1) {
    throw refuse(
      'ERR_ARGUMENT',
      'keep',
      'options',
      `options must have one of topBlocks, coverage and threshold, got ${rules.length}`,
    )
  }
  if (over !== 'row' && over !== 'map') throw mustBe('keep', 'over', '"row" or "map"', over)
  const sq = checkInteger('keep', 'sq', options.sq, 0)
  const sk = checkInteger('keep', 'sk', options.sk ?? sq, sq)
  const [blockQ, blockK] = blockPair('keep', block)
  const empty = named(
    'keep',
    () => Mask.fromWindow({}, { sq, sk, block: [blockQ, blockK] }),
    'mask',
  )
  const [b = 0, heads = 0, rows = 0, columns = 0] = score.shape
  const [wantedRows, wantedColumns] = [Math.ceil(sq / blockQ), Math.ceil(sk / blockK)]
  if (score.rank !== 4 || rows !== wantedRows || columns !== wantedColumns) {
    throw refuse(
      'ERR_SHAPE',
      'keep',
      'score',
      `score must be [b, heads, ${wantedRows}, ${wantedColumns}], got [${score.shape.join(', ')}]`,
    )
  }
  const { minBlocks, maxBlocks } = options
  // A row has no more of them; sums over rows stay exact
  const number = (name: 'topBlocks' | 'minBlocks' | 'maxBlocks', least: number) =>
    options[name] === undefined
      ? undefined
      : Math.min(checkInteger('keep', name, options[name], least), columns)
  const top = number('topBlocks', 0)
  const [least, most] = [number('minBlocks', 0), number('maxBlocks', 1)]
  if (minBlocks !== undefined && maxBlocks !== undefined && maxBlocks < minBlocks)
    throw mustBe('keep', 'maxBlocks', `at least minBlocks = ${minBlocks}`, maxBlocks)
  const blocks = keepBits(score, {
    rule: rules[0]![0],
    top: over === 'map' && top !== undefined ? top * rows : top,
    coverage: coverage === Infinity ? 1 : coverage,
    threshold,
    overMap: over === 'map',
    least,
    most,
    forceFirst: options.forceFirst,
    forceDiagonal: options.forceDiagonal,
    blockQ,
    blockK,
    sq,
    ahead: sk - sq,
  })
  return makeMask({ ...empty, sequences: b, heads, blocks })
}

/** @internal What the native operator keeps of a score, as bits [b, heads, rows, words]. */
export function keepBits(
  score: Tensor<'float32'>,
  options: Record<string, unknown>,
): Tensor<'int32'> {
  const [b = 0, heads = 0, rows = 0, columns = 0] = score.shape
  const blocks = zeros([b, heads, rows, Math.ceil(columns / 32)], {
    dtype: 'int32',
    device: score.device,
  })
  try {
    run('keep', { score, blocks, ...options })
    return blocks
  } catch (error) {
    blocks.dispose()
    throw error
  }
}
