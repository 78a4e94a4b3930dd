import { inspect } from 'node:util'
import { checkInteger, checkOptions, elements, mustBe, numbers, offsetNumbers } from './check.js'
import { type DeviceLike, parseDevice } from './device.js'
import { HeddleError, named, refuse } from './errors.js'
import { readMask, readRows } from './mask-rows.js'
import { run } from './native.js'
import type { HipLists } from './ops/hip.js'
import { holdsTensors, scope } from './scope.js'
import { checkTensor, Tensor, tensor, zeros } from './tensor.js'

/** What a mask is about, beside its lists. */
export interface MaskOptions {
  /** Queries, those of one call: blocks of queries count from the first of them. */
  sq: number
  /** Keys, `sq` of them if left out. Query i stands at `sk - sq + i`. */
  sk?: number | undefined
  /** Queries and keys per block, 128 if left out; one number stands for both. Keys: a power of two up to 128. */
  block?: number | readonly [number, number] | undefined
  /** Whether a row sees nothing beyond its own position, inside blocks too; true if left out. */
  causal?: boolean | undefined
  /** Where the mask lives, `'cpu'` if left out. Lists that are tensors stay where they are. */
  device?: DeviceLike | undefined
  /**
   * Where each packed sequence of queries begins, then the total; with `cuSeqlensK`. Lists have the rows of blocks of each
   * sequence one after the other, and its blocks of keys count from its own first key.
   */
  cuSeqlensQ?: readonly number[] | undefined
  /** Where each packed sequence of keys begins, then the total. */
  cuSeqlensK?: readonly number[] | undefined
}

/** Blocks in lists of one width per row. */
export interface PaddedLists {
  /** [b, heads, rows of blocks], i32: how many entries are read. */
  count: Tensor<'int32'>
  /** [b, heads, rows of blocks, width], i32, in any order; what stands behind the count may be anything. */
  index: Tensor<'int32'>
}

/** Blocks in lists one after the other (CSR). */
export interface RowLists {
  /** [b * heads * rows of blocks + 1], i32: where each row begins in `column`. */
  rowPtr: Tensor<'int32'>
  /** [listed], i32. */
  column: Tensor<'int32'>
}

/** Single keys and distances, the same for every query of a head. */
export interface TokenLists {
  /** Keys that every query sees. */
  columns?: PaddedTokens | readonly number[] | undefined
  /** Distances, from 0 on, at which every query sees a key: 0 is its own. */
  diagonals?: PaddedTokens | readonly number[] | undefined
}

/** Token lists that differ from head to head. */
export interface PaddedTokens {
  /** [b, heads], i32; with packed sequences one row per sequence. One row of either holds for all. */
  count: Tensor<'int32'>
  /** [b, heads, width], i32. */
  index: Tensor<'int32'>
}

/** The last keys of every row and the first ones of the sequence, none if left out. */
export interface MaskRange {
  /** Keys back from a row's own, which counts. */
  window?: number | undefined
  sinkTokens?: number | undefined
}

/** What a head of {@link Mask.fromHeads} sees: everything, the last keys and the first ones, or what a mask says. */
export type HeadMode = 'dense' | MaskRange | Mask

/** @internal */
export interface GatheredLists extends HipLists {
  /** Keys and values of the window, from the key `from` on, where they stand apart from the others. */
  recent?: { k: Tensor; v: Tensor; from: number } | undefined
}

/** How {@link Mask.svg} draws. */
export interface SvgOptions {
  /** Which head of the mask, 0 if left out. */
  head?: number | undefined
  /** Which sequence, 0 if left out. */
  sequence?: number | undefined
  /** Width of the picture in pixels, 192 if left out. */
  size?: number | undefined
}

/**
 * Which keys each query sees: a value that selectors return and `attention` takes. A key is seen if a listed block, a column,
 * a diagonal, the window or the sink tokens name it, once however many do, and if causality and the bounds of its row allow
 * it. Lists live on the device; making and joining masks waits for nothing.
 */
export interface Mask {
  /** Sequences of the batch: `b`, 1 that holds for all, or as many as are packed. */
  readonly sequences: number
  /** 1 (shared by all), hk (by the queries of a kv head) or hq. */
  readonly heads: number
  readonly sq: number
  readonly sk: number
  readonly block: readonly [number, number]
  readonly causal: boolean
  /** Keys that a row sees beside its lists, counted back from its own position; 0 is none. */
  readonly window: number
  /** First keys that every row sees beside its lists. */
  readonly sinkTokens: number
  /**
   * [b, heads, rows of blocks, words], i32: a bit per block, 32 to a word, the lowest first. The rows of packed sequence i
   * begin at `floor(cuSeqlensQ[i] / block[0]) + i`.
   */
  readonly blocks: Tensor<'int32'> | undefined
  /** [b, heads, words], i32: a bit per key. */
  readonly columns: Tensor<'int32'> | undefined
  /** [b, heads, words], i32: a bit per distance. */
  readonly diagonals: Tensor<'int32'> | undefined
  /** [b, sq, 2], i32: the first key that a query may see, and the one behind the last. */
  readonly bounds: Tensor<'int32'> | undefined
  readonly cuSeqlensQ: readonly number[] | undefined
  readonly cuSeqlensK: readonly number[] | undefined
  /** @internal What `blocks` lists, once more as first keys: none before the sink tokens, none twice. For kernels that gather. */
  readonly lists?: GatheredLists | undefined
  /** @internal [b], i32: how many keys each sequence has, where these are not all `sk`. */
  readonly cacheSeqlens?: Tensor<'int32'> | undefined
  /** How many (query, key) pairs are visible, over all heads and sequences. */
  count(): Promise<number>
  /** Visible pairs over those of the same shape without lists: causal pairs, or all where the mask is not causal. */
  density(): Promise<number>
  /** [sequences, heads, sq, sk] as bytes of 0 and 1, packed sequences at the start of their rows. For small masks. */
  toDense(): Promise<Uint8Array>
  /** What at least one of two masks sees. They agree in shape, block and causality, and in their cache if both have one. */
  union(other: Mask): Mask
  /**
   * What both of two masks see: lists of blocks with such lists, windows with windows; documents, and what sees everything,
   * with anything but other documents.
   */
  intersect(other: Mask): Mask
  /** One head as a picture, dark where much is seen. */
  svg(options?: SvgOptions): Promise<string>
  /** What it is, not what it lists. */
  toString(): string
  /** Frees its lists. */
  dispose(): void
  /** Lets `using mask = …` dispose of it. */
  [Symbol.dispose](): void
}

/** @internal What a mask is made of. */
export type MaskParts = Pick<
  Mask,
  | 'sequences'
  | 'heads'
  | 'sq'
  | 'sk'
  | 'block'
  | 'causal'
  | 'window'
  | 'sinkTokens'
  | 'blocks'
  | 'columns'
  | 'diagonals'
  | 'bounds'
  | 'cuSeqlensQ'
  | 'cuSeqlensK'
  | 'lists'
  | 'cacheSeqlens'
>

/** @internal Words of which the first so many bits are set. */
export const firstBits = (count: number, words: number): Int32Array =>
  Int32Array.from({ length: words }, (_, word) =>
    count >= 32 * (word + 1) ? -1 : (1 << Math.max(count - 32 * word, 0)) - 1,
  )

const words = (bits: number) => Math.ceil(bits / 32)
const largestDense = 2 ** 28
// Rows that may have bounds, 8 bytes each
const mostBounds = 2 ** 28

function checkParts(options: MaskOptions): MaskParts & { device: DeviceLike } {
  checkOptions('mask', options, knownOptions)
  if (options === undefined) throw mustBe('mask', 'options', 'an object', options)
  const sq = checkInteger('mask', 'sq', options.sq, 0)
  const sk = options.sk === undefined ? sq : checkInteger('mask', 'sk', options.sk, 0)
  const {
    block: given = 128,
    causal = true,
    device = 'cpu',
    cuSeqlensQ: ofQ,
    cuSeqlensK: ofK,
  } = options
  parseDevice('mask', device)
  const offsets = (name: string, value: unknown, total: number) =>
    value === undefined ? undefined : offsetNumbers('mask', name, value, total)
  const cuSeqlensQ = offsets('cuSeqlensQ', ofQ, sq)
  const cuSeqlensK = offsets('cuSeqlensK', ofK, sk)
  if (typeof causal !== 'boolean') throw mustBe('mask', 'causal', 'a boolean', causal)
  const pair = typeof given === 'number' ? [given, given] : given
  if (!Array.isArray(pair) || pair.length !== 2)
    throw mustBe('mask', 'block', 'a size or a pair of sizes', given)
  const block = [
    checkInteger('mask', 'block', pair[0], 1, 1024),
    checkInteger('mask', 'block', pair[1], 1, 128),
  ] as const
  if (block[0] % 16 !== 0 && !Number.isInteger(Math.log2(block[0])))
    throw mustBe('mask', 'block', 'a power of two or a multiple of 16 for queries', block[0])
  if (!Number.isInteger(Math.log2(block[1])))
    throw mustBe('mask', 'block', 'a power of two for keys', block[1])
  if ((cuSeqlensQ === undefined) !== (cuSeqlensK === undefined)) {
    throw refuse(
      'ERR_ARGUMENT',
      'mask',
      'cuSeqlensQ',
      'cuSeqlensQ and cuSeqlensK must be given together',
    )
  }
  if (cuSeqlensQ?.length !== cuSeqlensK?.length) {
    const text = `cuSeqlensK must be [${cuSeqlensQ?.length}] as cuSeqlensQ, got [${cuSeqlensK?.length}]`
    throw refuse('ERR_SHAPE', 'mask', 'cuSeqlensK', text)
  }
  return {
    sequences: cuSeqlensQ ? cuSeqlensQ.length - 1 : 1,
    heads: 1,
    sq,
    sk,
    block,
    causal,
    window: 0,
    sinkTokens: 0,
    blocks: undefined,
    columns: undefined,
    diagonals: undefined,
    bounds: undefined,
    cuSeqlensQ,
    cuSeqlensK,
    device,
  }
}

const knownOptions: ReadonlySet<string> = new Set<keyof MaskOptions>([
  'sq',
  'sk',
  'block',
  'causal',
  'device',
  'cuSeqlensQ',
  'cuSeqlensK',
])

/** @internal Rows of blocks and columns of blocks of a mask's table. */
export function blockTable(parts: MaskParts): { rows: number; columns: number } {
  const { sq, sk, block, cuSeqlensQ, sequences } = parts
  return {
    rows: blockRows(sq, block[0], cuSeqlensQ && sequences),
    columns: Math.ceil(sk / block[1]),
  }
}

/** @internal Rows of blocks of so many queries, of one sequence or of several that are packed. */
export const blockRows = (sq: number, block: number, packed?: number): number =>
  packed === undefined ? Math.ceil(sq / block) : Math.floor(sq / block) + packed

/** @internal The row of blocks that packed sequence i begins with. */
export const firstBlockRow = (cuSeqlensQ: readonly number[], block: number, i: number): number =>
  Math.floor(cuSeqlensQ[i]! / block) + i

type Lists = {
  dense?: Tensor
  count?: Tensor
  index?: Tensor
  rowPtr?: Tensor
  column?: Tensor
  flat?: Tensor
  bits?: Tensor
  run?: number
}

function pack(
  shape: readonly [b: number, heads: number, rows: number, columns: number],
  device: DeviceLike,
  ...lists: Lists[]
): Tensor<'int32'> {
  const [b, heads, rows, columns] = shape
  const blocks = zeros([b, heads, rows, words(columns)], { dtype: 'int32', device })
  try {
    for (const list of lists)
      named('mask', () => run('mask.pack', { blocks, columns, ...list }), 'mask.pack')
    return blocks
  } catch (error) {
    blocks.dispose()
    throw spelled(error)
  }
}

// As the caller knows the arguments
function spelled(error: unknown): unknown {
  if (!(error instanceof HeddleError)) return error
  const { code, op, argument, message } = error
  const name = argument === 'dense' ? 'table' : argument === 'flat' ? 'pairs' : undefined
  return name === undefined
    ? error
    : refuse(code, op, name, message.replace(`${op}: ${argument}`, name))
}

// Of lists with `given` rows of blocks per head, if they tell, which are those of the argument `name`
function fromTable(
  options: MaskOptions,
  [b, heads, given, name]: readonly [
    b: number,
    heads: number,
    given?: number | undefined,
    name?: string | undefined,
  ],
  device: DeviceLike,
  ...lists: Lists[]
): Mask {
  const parts = checkParts(options)
  if (name !== undefined) checkRows(name, given, parts)
  const { cuSeqlensQ } = parts
  if (cuSeqlensQ && b !== 1)
    throw refuse('ERR_SHAPE', 'mask', 'cuSeqlensQ', `b must be 1 with cuSeqlensQ, got ${b}`)
  const { rows, columns } = blockTable(parts)
  if (given === rows || !cuSeqlensQ)
    return makeMask({
      ...parts,
      sequences: cuSeqlensQ ? parts.sequences : b,
      heads,
      blocks: pack([b, heads, rows, columns], device, ...lists),
    })
  const blocks = scope(() => {
    const dense = pack([b, heads, listedRows(parts), columns], device, ...lists)
    const apart = zeros([b, heads, rows, words(columns)], { dtype: 'int32', device })
    for (let i = 0, from = 0; i < parts.sequences; i++) {
      const first = firstBlockRow(cuSeqlensQ, parts.block[0], i)
      const own = Math.ceil((cuSeqlensQ[i + 1]! - cuSeqlensQ[i]!) / parts.block[0])
      apart.slice(2, first, first + own).copyFrom(dense.slice(2, from, from + own))
      from += own
    }
    return apart
  })
  return makeMask({ ...parts, heads, blocks })
}

// Lists of columns of blocks, or of the first of `run` columns
function fromPadded(
  lists: PaddedLists | readonly PaddedLists[],
  options: MaskOptions,
  run = 1,
): Mask {
  const given: readonly unknown[] = Array.isArray(lists) ? lists : [lists]
  const all = elements('mask', 'lists', given, (one) => {
    const { count, index } = (one ?? {}) as PaddedLists
    checkTensor('mask', 'count', count)
    checkTensor('mask', 'index', index)
    return { count, index, run }
  })
  const first = all[0]?.index
  if (!first) throw mustBe('mask', 'lists', 'at least one list', lists)
  const [b = 0, heads = 0, rows] = first.shape
  const name = first.rank === 4 ? 'index' : undefined
  return fromTable(options, [b, heads, rows, name], first.device, ...all)
}

// Rows of blocks of all sequences, one after the other
function listedRows({ sq, block, cuSeqlensQ = [0, sq] }: MaskParts): number {
  return cuSeqlensQ.reduce(
    (sum, end, i) => sum + Math.ceil((end - (cuSeqlensQ[i - 1] ?? 0)) / block[0]),
    0,
  )
}

// A table of a packed mask itself has rows that no sequence has
function checkRows(name: string, rows: number | undefined, parts: MaskParts): void {
  const wanted = listedRows(parts)
  if (rows === wanted || (parts.cuSeqlensQ && rows === blockTable(parts).rows)) return
  throw refuse('ERR_SHAPE', 'mask', name, `${name} must have ${wanted} rows of blocks, got ${rows}`)
}

const knownLists: ReadonlySet<string> = new Set<keyof TokenLists>(['columns', 'diagonals'])

function tokenBits(
  name: string,
  lists: PaddedTokens | readonly number[] | undefined,
  parts: MaskParts,
  device: DeviceLike,
): Tensor<'int32'> | undefined {
  if (lists === undefined) return undefined
  const made: Tensor[] = []
  try {
    let { count, index } = (lists ?? {}) as PaddedTokens
    if (Array.isArray(lists)) {
      const values = elements('mask', name, lists, (value, i) =>
        checkInteger('mask', `${name}[${i}]`, value, 0, parts.sk - 1),
      )
      count = tensor([values.length], [1, 1], { dtype: 'int32', device })
      if (values.length === 0) values.push(0)
      index = tensor(values, [1, 1, values.length], { dtype: 'int32', device })
      made.push(count, index)
    }
    checkTensor('mask', `${name}.count`, count)
    checkTensor('mask', `${name}.index`, index)
    const [b = 0, heads = 0, width = 0] = index.shape
    if (index.rank !== 3 || `${count.shape}` !== `${[b, heads]}`) {
      const got = [count, index].map(({ shape }) => `[${shape.join(', ')}]`).join(' and ')
      const text = `${name} must be a count [b, heads] and an index [b, heads, width], got ${got}`
      throw refuse('ERR_SHAPE', 'mask', name, text)
    }
    const shaped = {
      count: count.reshape([b, heads, 1]),
      index: index.reshape([b, heads, 1, width]),
    }
    made.push(...Object.values(shaped))
    const bits = pack([b, heads, 1, Math.max(parts.sk, 1)], index.device, shaped)
    made.push(bits)
    return bits.reshape([b, heads, bits.shape[3]!])
  } finally {
    for (const one of made) one.dispose()
  }
}

const knownRange: ReadonlySet<string> = new Set<keyof MaskRange>(['window', 'sinkTokens'])

function rangeOf(range: unknown, prefix = ''): { window: number; sinkTokens: number } {
  checkOptions('mask', range, knownRange)
  const { window = 0, sinkTokens = 0 } = (range ?? {}) as MaskRange
  return {
    window: checkInteger('mask', `${prefix}window`, window, 0),
    sinkTokens: checkInteger('mask', `${prefix}sinkTokens`, sinkTokens, 0),
  }
}

/** Makes masks of lists in the formats that kernels and selectors of the field exchange. */
export const Mask = {
  /**
   * A mask of a table of blocks.
   *
   * @param table [b, heads, rows of blocks, columns of blocks], bool or uint8; anything but 0 lists a block.
   * @throws HeddleError `ERR_SHAPE` or `ERR_ARGUMENT` at the call.
   * @example
   * import { Mask, tensor } from 'heddle'
   * const table = tensor(new Uint8Array([1, 0, 1, 1]), [1, 1, 2, 2])
   * const mask = Mask.fromBlocks(table, { sq: 128, block: 64 })
   * console.log(await mask.density()) // 1
   */
  fromBlocks(table: Tensor<'bool' | 'uint8'>, options: MaskOptions): Mask {
    checkTensor('mask', 'table', table)
    const parts = checkParts(options)
    const { rows, columns } = blockTable(parts)
    const [wanted, [b = 0, heads = 0, high, wide]] = [listedRows(parts), table.shape]
    if (table.rank !== 4 || (high !== wanted && high !== rows) || wide !== columns) {
      const got = table.shape.join(', ')
      const text = `table must be [b, heads, ${wanted}, ${columns}], got [${got}]`
      throw refuse('ERR_SHAPE', 'mask', 'table', text)
    }
    return fromTable(options, [b, heads, high], table.device, { dense: table })
  },

  /**
   * A mask of padded lists; several stand for their union, as in peers that list full and partial blocks apart. Blocks that
   * causality cuts are cut wherever they are listed.
   *
   * @throws HeddleError at the call; reading what a mask gave rejects if an entry that counts is no block of the row.
   * @example
   * import { Mask, tensor } from 'heddle'
   * const int32 = (values: number[], shape: number[]) => tensor(values, shape, { dtype: 'int32' })
   * const lists = { count: int32([1, 2], [1, 1, 2]), index: int32([0, -1, 1, 0], [1, 1, 2, 2]) }
   * const mask = Mask.fromLists(lists, { sq: 256 })
   * console.log(await mask.count()) // 256 * 257 / 2
   */
  fromLists(lists: PaddedLists | readonly PaddedLists[], options: MaskOptions): Mask {
    return fromPadded(lists, options)
  },

  /**
   * A mask of runs of keys that begin anywhere, such as the slashes and columns of MInference's kernel: lists of first keys.
   * The second size of `block` is how many keys a run has; it ends with the sequence at the latest.
   *
   * @throws HeddleError as {@link Mask.fromLists} does.
   * @example
   * import { Mask, tensor } from 'heddle'
   * const int32 = (values: number[], shape: number[]) => tensor(values, shape, { dtype: 'int32' })
   * const slashes = { count: int32([1, 2], [1, 1, 2]), index: int32([0, -1, 7, 60], [1, 1, 2, 2]) }
   * const columns = { count: int32([0, 1], [1, 1, 2]), index: int32([0, 3], [1, 1, 2, 1]) }
   * const mask = Mask.fromRuns(slashes, { sq: 128, block: [64, 64] }).union(
   *   Mask.fromRuns(columns, { sq: 128, block: [64, 1] }),
   * )
   */
  fromRuns(lists: PaddedLists | readonly PaddedLists[], options: MaskOptions): Mask {
    const [rows, run] = checkParts(options).block
    return fromPadded(lists, { ...options, block: [rows, 1] }, run)
  },

  /**
   * A mask of bits, one per block and the lowest of a word first, as {@link Mask.blocks} has them. Bits beyond the last block
   * may be anything.
   *
   * @param bits [b, heads, rows of blocks, words], int32 or int64.
   * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
   */
  fromBits(bits: Tensor<'int32' | 'int64'>, options: MaskOptions): Mask {
    checkTensor('mask', 'bits', bits)
    const [b = 0, heads = 0, rows] = bits.shape
    const name = bits.rank === 4 ? 'bits' : undefined
    return fromTable(options, [b, heads, rows, name], bits.device, { bits })
  },

  /**
   * A mask of lists one after the other (CSR), for `b` sequences and `heads` heads.
   *
   * @throws HeddleError as {@link Mask.fromLists} does.
   */
  fromRows(
    lists: RowLists,
    options: MaskOptions & { b?: number | undefined; heads?: number | undefined },
  ): Mask {
    checkTensor('mask', 'rowPtr', lists?.rowPtr)
    checkTensor('mask', 'column', lists.column)
    const { b = 1, heads = 1, ...rest } = options ?? {}
    checkInteger('mask', 'b', b, 0)
    checkInteger('mask', 'heads', heads, 1)
    const given = ((lists.rowPtr.shape[0] ?? 0) - 1) / Math.max(b * heads, 1)
    return fromTable(rest, [b, heads, given], lists.rowPtr.device, {
      rowPtr: lists.rowPtr,
      column: lists.column,
    })
  },

  /**
   * A mask of flat pairs, `row of blocks * columns of blocks + column`.
   *
   * @param pairs [b, heads, most], i32; entries outside the table, such as the padding at the end, are skipped. Rows of packed
   *   sequences count on from one sequence to the next.
   */
  fromPairs(pairs: Tensor<'int32'>, options: MaskOptions): Mask {
    checkTensor('mask', 'pairs', pairs)
    const [b = 0, heads = 0] = pairs.shape
    return fromTable(options, [b, heads], pairs.device, { flat: pairs })
  },

  /**
   * A mask of single keys and distances: vertical lines and slashes. Arrays hold for all heads.
   *
   * @example
   * import { attention, Mask, randn } from 'heddle'
   * const [q, k, v] = [randn([1, 256, 2, 64]), randn([1, 256, 2, 64]), randn([1, 256, 2, 64])]
   * const mask = Mask.fromTokens({ columns: [0, 1, 77], diagonals: [0, 1, 2, 16] }, { sq: 256 })
   * const { out } = attention(q, k, v, { mask })
   */
  fromTokens(lists: TokenLists, options: MaskOptions): Mask {
    const parts = checkParts(options)
    checkOptions('mask', lists, knownLists)
    const given = [lists?.columns, lists?.diagonals] as const
    const index = given.map((one) => (one as PaddedTokens | undefined)?.index)
    const { device } = index.find((one) => one instanceof Tensor) ?? parts
    const columns = tokenBits('columns', given[0], parts, device)
    const diagonals = tokenBits('diagonals', given[1], parts, device)
    const widest = (at: number) =>
      [columns, diagonals].map((bits) => bits?.shape[at] ?? 1).find((size) => size !== 1) ?? 1
    const sequences = parts.cuSeqlensQ ? parts.sequences : widest(0)
    const heads = widest(1)
    // one row holds for all
    const wide = (name: string, bits: Tensor<'int32'> | undefined) => {
      const [b, own] = bits?.shape ?? []
      if (!bits || (b === sequences && own === heads)) return bits
      using narrow = bits
      if ((b === 1 || b === sequences) && (own === 1 || own === heads))
        return spread(narrow, [sequences, heads, narrow.shape[2]!])
      const text = `${name} must be of 1 or ${sequences} sequences and 1 or ${heads} heads, got ${b} and ${own}`
      throw refuse('ERR_SHAPE', 'mask', name, text)
    }
    return makeMask({
      ...parts,
      sequences,
      heads,
      columns: wide('columns', columns),
      diagonals: wide('diagonals', diagonals),
    })
  },

  /** The last `window` keys of every row, its own included, and the first `sinkTokens` keys of the sequence. */
  fromWindow(range: MaskRange, options: MaskOptions): Mask {
    return makeMask({ ...checkParts(options), ...rangeOf(range) })
  },

  /**
   * Heads that see differently in one call: some everything, some a window and sinks (streaming heads), some what their mask
   * lists.
   *
   * @param heads One per query head, or per kv head. Masks are of 1 head or of as many, and agree with `options`.
   * @throws HeddleError `ERR_ARGUMENT` at the call.
   * @example
   * import { attention, Mask, randn } from 'heddle'
   * const [q, k, v] = [randn([1, 256, 2, 64]), randn([1, 256, 2, 64]), randn([1, 256, 2, 64])]
   * const mask = Mask.fromHeads(['dense', { window: 64, sinkTokens: 4 }], { sq: 256 })
   * const { out } = attention(q, k, v, { mask })
   */
  fromHeads(heads: readonly HeadMode[], options: MaskOptions): Mask {
    const parts = checkParts(options)
    if (!Array.isArray(heads) || heads.length === 0)
      throw mustBe('mask', 'heads', 'a list of what each head sees', heads)
    const modes = elements('mask', 'heads', heads, (mode, i): MaskParts => {
      const name = `heads[${i}]`
      if (mode instanceof Made) return partsOfHead(name, mode, parts, heads.length)
      if (mode !== 'dense' && (mode === null || typeof mode !== 'object'))
        throw mustBe('mask', name, '"dense", a window and sinks, or a mask', mode)
      const range = mode === 'dense' ? { sinkTokens: parts.sk } : mode
      return { ...parts, ...rangeOf(range, `${name}.`) }
    })
    const listed = modes.flatMap(({ blocks, columns, diagonals }) => [blocks, columns, diagonals])
    const device = listed.find((one) => one !== undefined)?.device ?? parts.device
    const sequences = modes.find((mode) => mode.sequences !== 1)?.sequences ?? 1
    const other = modes.findIndex((mode) => mode.sequences !== 1 && mode.sequences !== sequences)
    if (other >= 0)
      throw mustBe(
        'mask',
        `heads[${other}]`,
        `a mask of 1 or ${sequences} sequences`,
        modes[other]!.sequences,
      )
    const { rows, columns } = blockTable(parts)
    const all = words(Math.max(parts.sk, 1))
    // of every head the lists of one kind, with the first `own` bits of its lines
    const lines = (
      kind: 'blocks' | 'columns' | 'diagonals',
      shape: readonly number[],
      own: (mode: MaskParts) => number,
    ) =>
      scope(() => {
        if (!modes.some((mode) => mode[kind] || own(mode) > 0)) return undefined
        const made = zeros(shape, { dtype: 'int32', device })
        modes.forEach((mode, head) => {
          const place = made.slice(1, head, head + 1)
          const given = mode[kind]
          if (given) {
            const at = given.shape[1] === 1 ? 0 : head
            place.copyFrom(given.slice(1, at, at + 1).expand(place.shape))
          }
          const count = own(mode)
          if (count === 0) return
          const first = firstBits(count, shape.at(-1)!)
          const other = tensor(first, undefined, { device }).expand(place.shape)
          named('mask', () => run('mask.combine', { bits: place, other, intersect: false }))
        })
        return made
      })
    const packed = parts.cuSeqlensQ ? 1 : sequences
    return makeMask({
      ...parts,
      sequences,
      heads: heads.length,
      cacheSeqlens: joinCaches(modes, sequences, (i) => `heads[${i}]`),
      blocks: lines('blocks', [packed, heads.length, rows, words(columns)], (mode) =>
        seesAll(mode) ? columns : 0,
      ),
      columns: lines('columns', [sequences, heads.length, all], (mode) =>
        seesAll(mode) ? 0 : mode.sinkTokens,
      ),
      diagonals: lines('diagonals', [sequences, heads.length, all], (mode) =>
        Math.min(mode.window, parts.sk),
      ),
    })
  },

  /**
   * Every row sees its own document only; sq is at most sk.
   *
   * @param starts Where each document begins, ascending from 0, then the total of tokens, over all packed sequences.
   * @param options `cacheSeqlens` says how many of the sk keys each sequence has, where rows stand at the end of a cache; the
   * sequences have the same documents then, as far as their keys go.
   */
  fromDocuments(
    starts: readonly number[],
    options: MaskOptions & { cacheSeqlens?: readonly number[] | undefined },
  ): Mask {
    const { cacheSeqlens: cached, ...rest } = options ?? ({} as typeof options)
    const parts = checkParts(options && rest)
    const { sq, sk, device } = parts
    if (!Array.isArray(starts) || starts[0] !== 0 || starts.at(-1) !== sk)
      throw mustBe('mask', 'starts', `a list from 0 to sk = ${sk}`, starts)
    const begins: number[] = []
    for (let i = 0; i < starts.length; i++)
      begins.push(checkInteger('mask', `starts[${i}]`, starts[i], begins.at(-1) ?? 0, sk))
    const { cuSeqlensQ: ofQ = [0, sq], cuSeqlensK: ofK = [0, sk] } = parts
    if (cached && parts.cuSeqlensQ)
      throw refuse(
        'ERR_ARGUMENT',
        'mask',
        'cacheSeqlens',
        'cacheSeqlens cannot be combined with cuSeqlensQ',
      )
    const lengths =
      cached &&
      numbers('mask', 'cacheSeqlens', cached, (value, i) =>
        checkInteger('mask', `cacheSeqlens[${i}]`, value, sq, sk),
      )
    const rows = sq * (lengths?.length ?? 1)
    if (rows > mostBounds)
      throw mustBe('mask', 'sq', `at most ${mostBounds} over all sequences`, rows)
    const bounds = new Int32Array(2 * rows)
    // Rows whose first bounds stand `at` and which end with the keys from..to
    const place = (at: number, rows: number, from: number, to: number) => {
      checkInteger('mask', 'sq', rows, 0, to - from)
      for (let i = 0, document = 0; i < rows; i++) {
        while (begins[document + 1]! <= to - rows + i) document++
        const own = begins.slice(document, document + 2)
        bounds.set(
          own.map((begin) => Math.min(Math.max(begin, from), to) - from),
          2 * (at + i),
        )
      }
    }
    if (lengths) lengths.forEach((length, i) => place(i * sq, sq, 0, length))
    else
      for (let i = 0; i < parts.sequences; i++)
        place(ofQ[i]!, ofQ[i + 1]! - ofQ[i]!, ofK[i]!, ofK[i + 1]!)
    const placed = { dtype: 'int32', device } as const
    return makeMask({
      ...parts,
      ...(lengths && {
        sequences: lengths.length,
        cacheSeqlens: tensor(lengths, [lengths.length], placed),
      }),
      sinkTokens: sk,
      bounds: tensor(bounds, [lengths?.length ?? 1, sq, 2], placed),
    })
  },
}

/** @internal Why bounds of rows that end with sk keys are of no use to shorter caches. */
export const withoutCache = (what: string): string =>
  `${what} must be made with cacheSeqlens, where its rows stand at the ends of caches, got one without`

/** @internal Refuses what is no mask. */
export function checkMask(op: string, value: unknown): asserts value is Mask {
  if (!(value instanceof Made)) throw mustBe(op, 'mask', 'a mask', value)
}

// A class, for a step of a decoder makes one and has no time for closures
class Made implements Mask {
  readonly sequences: number
  readonly heads: number
  readonly sq: number
  readonly sk: number
  readonly block: readonly [number, number]
  readonly causal: boolean
  readonly window: number
  readonly sinkTokens: number
  readonly blocks: Tensor<'int32'> | undefined
  readonly columns: Tensor<'int32'> | undefined
  readonly diagonals: Tensor<'int32'> | undefined
  readonly bounds: Tensor<'int32'> | undefined
  readonly cuSeqlensQ: readonly number[] | undefined
  readonly cuSeqlensK: readonly number[] | undefined
  readonly lists: GatheredLists | undefined
  readonly cacheSeqlens: Tensor<'int32'> | undefined

  constructor(parts: MaskParts) {
    this.sequences = parts.sequences
    this.heads = parts.heads
    this.sq = parts.sq
    this.sk = parts.sk
    this.block = parts.block
    this.causal = parts.causal
    this.window = parts.window
    this.sinkTokens = parts.sinkTokens
    this.blocks = parts.blocks
    this.columns = parts.columns
    this.diagonals = parts.diagonals
    this.bounds = parts.bounds
    this.cuSeqlensQ = parts.cuSeqlensQ
    this.cuSeqlensK = parts.cuSeqlensK
    this.lists = parts.lists
    this.cacheSeqlens = parts.cacheSeqlens
  }

  get [holdsTensors](): true {
    return true
  }

  async count(): Promise<number> {
    return (await readMask(this)).count()
  }

  async density(): Promise<number> {
    return (await readMask(this)).density()
  }

  async toDense(): Promise<Uint8Array> {
    const { sequences, heads, sq, sk } = this
    const pairs = sequences * heads * sq * sk
    if (pairs > largestDense)
      throw refuse(
        'ERR_UNSUPPORTED',
        'mask',
        'mask',
        `mask must have at most ${largestDense} pairs to be dense, got ${pairs}`,
      )
    const dense = new Uint8Array(pairs)
    const rows = await readRows(this)
    await rows.each((sequence, head, query) => {
      const at = ((sequence * heads + head) * sq + query) * sk
      const runs = rows.runs(sequence, head, query)
      for (let i = 0; i < runs.length; i += 2) dense.fill(1, at + runs[i]!, at + runs[i + 1]!)
    })
    return dense
  }

  union(other: Mask): Mask {
    return combine(this, other, false)
  }

  intersect(other: Mask): Mask {
    return combine(this, other, true)
  }

  async svg(options: SvgOptions = {}): Promise<string> {
    return (await readMask(this)).svg(options)
  }

  dispose(): void {
    const { blocks, columns, diagonals, bounds, lists, cacheSeqlens } = this
    const own = [blocks, columns, diagonals, bounds, cacheSeqlens, lists?.index, lists?.count]
    for (const one of own) one?.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  toString(): string {
    const { sequences, heads, sq, sk, block, causal, window, sinkTokens } = this
    const parts = {
      causal,
      [`blocks of ${block.join(' x ')}`]: this.blocks,
      columns: this.columns,
      diagonals: this.diagonals,
      [`window ${window}`]: window,
      [`sinkTokens ${sinkTokens}`]: sinkTokens,
      bounds: this.bounds,
    }
    const there = Object.entries(parts).filter(([, part]) => part)
    return `Mask [${sequences}, ${heads}, ${sq}, ${sk}] ${there.map(([name]) => name).join(', ')}`.trim()
  }

  [inspect.custom](): string {
    return this.toString()
  }
}

// What a mask says of a head of another, with which it agrees
function partsOfHead(name: string, mask: Mask, parts: MaskParts, heads: number): MaskParts {
  for (const key of ['sq', 'sk', 'causal', 'cuSeqlensQ', 'cuSeqlensK', 'block'] as const) {
    if (`${mask[key]}` === `${parts[key]}` || (key === 'block' && !mask.blocks)) continue
    const text = `${name} must be a mask with ${key} ${parts[key]}, got ${mask[key]}`
    throw refuse('ERR_ARGUMENT', 'mask', name, text)
  }
  if (mask.heads !== 1 && mask.heads !== heads)
    throw mustBe('mask', name, `a mask of 1 or ${heads} heads`, mask.heads)
  if (mask.bounds) throw mustBe('mask', name, 'a mask without bounds of rows', 'some')
  return mask
}

/** @internal A mask of its parts. */
export function makeMask(parts: MaskParts): Mask {
  return new Made(parts)
}

// One row for all sequences, one for all heads or for those of a group
function spread(tensor: Tensor<'int32'>, shape: readonly number[]): Tensor<'int32'> {
  return scope(() => {
    const [b = 1, heads = 1, ...rest] = tensor.shape
    const wide = shape[1] ?? heads
    if (tensor.rank !== shape.length || heads <= 1 || heads === wide)
      return tensor.expand(shape).clone()
    const groups = [b, heads, wide / heads, ...rest]
    const own = tensor
      .reshape([b, heads, 1, ...rest])
      .expand(groups)
      .contiguous()
    return own
      .reshape([b, wide, ...rest])
      .expand(shape)
      .clone()
  })
}

function join(
  a: Tensor<'int32'> | undefined,
  b: Tensor<'int32'> | undefined,
  shape: readonly number[] | undefined,
  intersect: boolean,
): Tensor<'int32'> | undefined {
  const first = a ?? b
  if (!first || !shape) return undefined
  if (intersect && !(a && b)) return undefined
  const joined = spread(first, shape)
  if (a && b) {
    using other = spread(b, shape)
    named('mask', () => run('mask.combine', { bits: joined, other, intersect }))
  }
  return joined
}

// One cache, that of a mask of 1 sequence for all; numbers are on the device, where nobody compares them
function joinCaches(
  masks: readonly MaskParts[],
  sequences: number,
  name: (mask: number) => string,
): Tensor<'int32'> | undefined {
  const cache = masks.find((mask) => mask.cacheSeqlens)?.cacheSeqlens
  if (!cache) return undefined
  masks.forEach(({ cacheSeqlens: other = cache }, i) => {
    if (other.shape[0] !== cache.shape[0])
      throw mustBe('mask', name(i), `a mask of a cache of ${cache.shape} sequences`, other.shape[0])
  })
  return spread(cache, [sequences])
}

// Nothing but causality and bounds of rows
const seesAll = ({ sinkTokens, window, causal, sk }: MaskParts) =>
  sinkTokens >= sk || (causal && window >= sk)

// Only sets of one kind meet in an intersection: (blocks or window) and (blocks or window) is not of that form
function kinds(parts: MaskParts): string[] {
  const { blocks, columns, diagonals, window, sinkTokens } = parts
  return Object.entries({
    blocks,
    columns,
    diagonals,
    window: window > 0,
    sinkTokens: sinkTokens > 0,
  })
    .filter(([, there]) => there)
    .map(([kind]) => kind)
}

// Whether so many heads are shared by others, all of them or those of a group
const standsFor = (heads: number, others: number) =>
  heads === others || heads === 1 || (heads > 0 && others > 0 && others % heads === 0)

function combine(a: MaskParts, other: Mask, intersect: boolean): Mask {
  if (!(other instanceof Made)) throw mustBe('mask', 'other', 'a mask', other)
  const b: MaskParts = other
  const disagree = (what: string, x: unknown, y: unknown) =>
    refuse('ERR_ARGUMENT', 'mask', 'other', `other must have ${what} ${x}, got ${y}`)
  for (const key of ['sq', 'sk', 'causal'] as const)
    if (a[key] !== b[key]) throw disagree(key, a[key], b[key])
  if (`${a.cuSeqlensQ}` !== `${b.cuSeqlensQ}` || `${a.cuSeqlensK}` !== `${b.cuSeqlensK}`)
    throw disagree('the packed sequences', a.cuSeqlensQ, b.cuSeqlensQ)
  if (a.blocks && b.blocks && `${a.block}` !== `${b.block}`)
    throw disagree('block', a.block, b.block)
  const heads = standsFor(a.heads, b.heads) ? b.heads : a.heads
  if (heads === a.heads && !standsFor(b.heads, a.heads)) throw disagree('heads', a.heads, b.heads)
  if (a.sequences !== b.sequences && a.sequences !== 1 && b.sequences !== 1)
    throw disagree('sequences', a.sequences, b.sequences)
  const bounds = a.bounds ?? b.bounds
  if (bounds && !(a.bounds ? a : b).cacheSeqlens && (a.cacheSeqlens ?? b.cacheSeqlens))
    throw refuse(
      'ERR_ARGUMENT',
      'mask',
      a.bounds ? undefined : 'other',
      withoutCache(a.bounds ? 'this' : 'other'),
    )
  if (!intersect && bounds) throw disagree('no bounds of rows', 'in a union', 'some')
  if (a.bounds && b.bounds) throw disagree('no bounds of rows', 'beside such bounds', 'some')
  // What sees all that its bounds allow takes its lists from the other
  const source = !intersect ? undefined : seesAll(a) ? b : seesAll(b) ? a : undefined
  const [mine, theirs] = [kinds(a), kinds(b)]
  const none = mine.length === 0 || theirs.length === 0
  if (intersect && !source && !none && (mine.length > 1 || `${mine}` !== `${theirs}`))
    throw refuse(
      'ERR_ARGUMENT',
      'mask',
      'other',
      `masks that intersect must each have one and the same kind of lists, got ${mine.join(' and ')} with ${theirs.join(' and ')}`,
    )
  const sequences = a.sequences === 1 ? b.sequences : a.sequences
  const shape = (tensor: Tensor | undefined) =>
    tensor && [tensor.rank === 4 && a.cuSeqlensQ ? 1 : sequences, heads, ...tensor.shape.slice(2)]
  const lists = (key: 'blocks' | 'columns' | 'diagonals') =>
    source
      ? join(source[key], undefined, shape(source[key]), false)
      : join(a[key], b[key], shape(a[key] ?? b[key]), intersect)
  const number = (key: 'window' | 'sinkTokens') =>
    source ? source[key] : intersect ? Math.min(a[key], b[key]) : Math.max(a[key], b[key])
  return makeMask({
    ...a,
    sequences,
    heads,
    block: a.blocks ? a.block : b.block,
    blocks: lists('blocks'),
    columns: lists('columns'),
    diagonals: lists('diagonals'),
    bounds: bounds && spread(bounds, [a.cuSeqlensQ ? 1 : sequences, ...bounds.shape.slice(1)]),
    lists: undefined,
    cacheSeqlens: joinCaches([a, b], sequences, () => 'other'),
    window: number('window'),
    sinkTokens: number('sinkTokens'),
  })
}
