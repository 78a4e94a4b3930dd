import { checkInteger, checkOptions, elements, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { named, refuse } from '../errors.js'
import { blockRows, type GatheredLists, type Mask, makeMask } from '../mask.js'
import { lengthsOf, type PackedOptions, packedMask } from '../mechanisms/packed.js'
import { run } from '../native.js'
import { checkTensor, empty, type Tensor } from '../tensor.js'
import { lengths, offsets } from './arguments.js'

/** One scan over chunks of keys, of several that {@link hip} takes; the first looks at all of them. */
export interface HipStage {
  /** Keys per chunk, a power of two; the last stage's are the blocks that are listed. */
  chunk: number
  /** How many tokens enter from the stage before; left out in the first stage and only there. */
  topK?: number | undefined
  /** Queries per list, 64 if left out. */
  block?: number | undefined
  /** Of how many queries in a row the mean is looked at. */
  stride: number
}

/** Who shares a list: nobody, the query heads of a kv head, or all heads. */
export type HipHeadMode = 'head' | 'kv_group' | 'all'

/**
 * Where queries and keys that turn are taken to stand while chunks are compared (InfiniteHiP), p and t being their own
 * positions:
 *
 * | name               | keys                                                | queries           |
 * | ------------------ | --------------------------------------------------- | ----------------- |
 * | `'own'`            | t                                                   | p                 |
 * | `'streaming'`      | number of the chunk among those of the stage        | p, at most chunks + window |
 * | `'relative'`       | 0 for the left of two halves, 1 for the right       | window + 1        |
 * | `'infllm'`         | 0                                                   | window            |
 * | `'self_extend'`    | t within 8192 keys, before that every 16 keys one   | p                 |
 * | `'dynamic_extend'` | distances beyond a quarter of the context shortened until the first key is one context away | p |
 */
export type HipPositions =
  | 'own'
  | 'streaming'
  | 'relative'
  | 'infllm'
  | 'self_extend'
  | 'dynamic_extend'

/** Rotary embedding of queries and keys that have not been turned, while a search looks at them. */
export interface HipRope {
  /** Of channels i and i + d / 2, `[positions, d / 2]`: a row for every key of a sequence, and window + 2 at least. */
  cos: Tensor<'float32'>
  /** As `cos`. */
  sin: Tensor<'float32'>
  /** `'own'` if left out. */
  positions?: HipPositions | undefined
  /**
   * Where attention takes the keys of a list and sink tokens to stand, those of the window and queries standing at their own
   * positions: as `positions`, but `'streaming'` (if left out) has them stand one after the other right before the window,
   * and `'infllm'` all where the window begins. `'own'` leaves them. For {@link hipAttention} and {@link hipDecoder}.
   */
  attended?: Exclude<HipPositions, 'relative'> | undefined
  /** Of the model, for `'self_extend'` and `'dynamic_extend'`: shorter prompts stand where they are. */
  context?: number | undefined
}

/** Options of {@link hip}. What is said of defaults holds without `stages`, and in brackets with them. */
export interface HipOptions extends PackedOptions {
  /** Keys that a list names beside sink tokens and window: 512 (2048). */
  topK?: number | undefined
  /** Queries and keys per block, [64, 2]: powers of two, up to 128 and 64. Stages have their own. */
  block?: readonly [number, number] | undefined
  /** Every how manieth query of a block and key of a block is looked at, the last of each: [2, 1]. Stages have their own. */
  stride?: readonly [number, number] | undefined
  /** Keys that a row sees beside its list, back from its own: 256 (1024). */
  window?: number | undefined
  /** First keys that every row sees: 16, or a block where that is more (256). */
  sinkTokens?: number | undefined
  /** `'head'` (`'all'`). */
  headMode?: HipHeadMode | undefined
  /** Which block stands for an interval, `'center'` if left out. Not with stages. */
  representative?: 'center' | 'first' | undefined
  /** Scans instead of halving: what InfiniteHiP does. {@link hipStages} are its own. */
  stages?: readonly HipStage[] | undefined
  /**
   * With stages: q and k are turned as they are looked at. What is attended afterwards has to be turned as well, which
   * {@link hipAttention} and {@link hipDecoder} do.
   */
  rope?: HipRope | undefined
  /** [b, maxPages], i32: k is pages `[pages, pageSize, hk, d]`, as {@link attention} takes them. Goes with `cacheSeqlens`. */
  blockTable?: Tensor<'int32'> | undefined
  /** [b], i32: how many keys each sequence has, at least sq. */
  cacheSeqlens?: Tensor<'int32'> | readonly number[] | undefined
}

/** What {@link hipLists} returns. */
export interface HipLists {
  /** [b, heads, rows of blocks, topK / block of keys], i32: first keys of blocks, ascending; 2^31 - 1 behind the last. */
  index: Tensor<'int32'>
  /** [b, heads, rows of blocks], i32: how many are listed. */
  count: Tensor<'int32'>
}

/** The stages of InfiniteHiP's released code. */
export const hipStages: readonly HipStage[] = [
  { chunk: 256, stride: 4 },
  { chunk: 32, stride: 4, topK: 32768 },
  { chunk: 8, stride: 1, topK: 8192 },
]

/** @internal */
export const knownHip: ReadonlySet<string> = new Set<keyof HipOptions>([
  ...(['topK', 'block', 'stride', 'window', 'sinkTokens', 'headMode', 'representative'] as const),
  ...(['stages', 'rope', 'blockTable', 'cacheSeqlens', 'cuSeqlensQ', 'cuSeqlensK'] as const),
])

/** @internal Options of `hip` with what was left out, checked. */
export interface HipSettings {
  topK: number
  block: readonly [number, number]
  window: number
  sinkTokens: number
  headMode: HipHeadMode
  /** What each call of the operator does: one for halves, one a stage. */
  calls: readonly { width: number; arguments: Record<string, unknown> }[]
}

const knownStage: ReadonlySet<string> = new Set<keyof HipStage>([
  'chunk',
  'topK',
  'block',
  'stride',
])

const knownRope: ReadonlySet<string> = new Set<keyof HipRope>([
  'cos',
  'sin',
  'positions',
  'context',
  'attended',
])

const isPower = (x: unknown, most: number): x is number =>
  Number.isInteger(x) &&
  (x as number) >= 1 &&
  (x as number) <= most &&
  Number.isInteger(Math.log2(x as number))

/** @internal */
export function hipSettings(op: string, options: HipOptions): HipSettings {
  checkOptions(op, options, knownHip)
  const { stages: given, representative = 'center' } = options
  const stages = Array.isArray(given)
    ? elements(op, 'stages', given, (stage, i) => {
        if (stage === null || typeof stage !== 'object')
          throw mustBe(op, `stages[${i}]`, 'a stage', stage)
        checkOptions(op, stage, knownStage)
        return stage as HipStage
      })
    : given
  const rule = (argument: string, text: string, value: unknown) => mustBe(op, argument, text, value)
  const power = (argument: string, value: unknown, most: number): number => {
    if (isPower(value, most)) return value
    throw rule(argument, `a power of two up to ${most}`, value)
  }
  const pair = (argument: string, value: unknown): readonly [number, number] => {
    if (Array.isArray(value) && value.length === 2) return [value[0], value[1]]
    throw rule(argument, 'a pair, of queries and of keys', value)
  }
  const multiple = (argument: string, value: unknown, of: number, what: string): number => {
    if (Number.isInteger(value) && (value as number) > 0 && (value as number) % of === 0)
      return value as number
    throw rule(argument, `a positive multiple of ${what}, ${of}`, value)
  }
  const strideOf = (argument: string, value: unknown, block: number): number => {
    if (Number.isInteger(value) && (value as number) >= 1 && block % (value as number) === 0)
      return value as number
    throw rule(argument, `a divisor of the block of ${block}`, value)
  }
  const { headMode = stages ? 'all' : 'head' } = options
  if (headMode !== 'head' && headMode !== 'kv_group' && headMode !== 'all')
    throw rule('headMode', '"head", "kv_group" or "all"', headMode)
  if (representative !== 'center' && representative !== 'first')
    throw rule('representative', '"center" or "first"', representative)
  const window = checkInteger(op, 'window', options.window ?? (stages ? 1024 : 256), 1)

  const finish = (
    block: readonly [number, number],
    topK: number,
    sinkTokens: number,
    calls: HipSettings['calls'],
  ): HipSettings => {
    if (!Number.isInteger(sinkTokens) || sinkTokens < 0 || sinkTokens % block[1] !== 0)
      throw rule('sinkTokens', `0 or a multiple of the block of keys, ${block[1]}`, sinkTokens)
    const shared = { window, sinkTokens }
    return {
      ...{ topK, block, window, sinkTokens, headMode },
      calls: calls.map((call) => ({ ...call, arguments: { ...call.arguments, ...shared } })),
    }
  }

  const { rope } = options
  if (rope !== undefined && (rope === null || typeof rope !== 'object' || Array.isArray(rope)))
    throw rule('rope', 'an object', rope)
  if (rope && !stages) throw refuse('ERR_ARGUMENT', op, 'rope', 'rope goes with stages')
  if (rope) {
    checkOptions(op, rope, knownRope)
    checkTensor(op, 'rope.cos', rope.cos)
    checkTensor(op, 'rope.sin', rope.sin)
  }

  if (!stages) {
    const [blockQ, blockK] = pair('block', options.block ?? [64, 2])
    power('block[0]', blockQ, 128)
    power('block[1]', blockK, 64)
    const [strideQ, strideK] = pair('stride', options.stride ?? [Math.min(2, blockQ), 1])
    strideOf('stride[0]', strideQ, blockQ)
    strideOf('stride[1]', strideK, blockK)
    const topK = multiple('topK', options.topK ?? 512, blockK, 'the block of keys')
    const call = { kind: 'halves', representative, blockQ, blockK, strideQ, strideK }
    return finish([blockQ, blockK], topK, options.sinkTokens ?? Math.max(16, blockK), [
      { width: topK / blockK, arguments: call },
    ])
  }

  for (const name of ['block', 'stride', 'representative'] as const)
    if (options[name] !== undefined)
      throw refuse('ERR_ARGUMENT', op, name, `${name} cannot be combined with stages`)
  if (!Array.isArray(stages) || stages.length === 0)
    throw rule('stages', 'a list of stages', stages)
  const last = stages.at(-1)!
  power(`stages[${stages.length - 1}].chunk`, last.chunk, 64)
  const topK = multiple('topK', options.topK ?? 2048, last.chunk, 'the last chunk')
  const kept = (stage: number) => (stages[stage + 1] ? stages[stage + 1]!.topK! : topK)
  stages.forEach((stage: HipStage, i) => {
    const at = `stages[${i}]`
    const before = stages[i - 1] as HipStage | undefined
    power(`${at}.chunk`, stage.chunk, i === stages.length - 1 ? 64 : 32768)
    power(`${at}.block`, stage.block ?? 64, 128)
    strideOf(`${at}.stride`, stage.stride, stage.block ?? 64)
    if (!before) {
      if (stage.topK !== undefined)
        throw rule(`${at}.topK`, 'left out in the first stage, which looks at all keys', stage.topK)
      return
    }
    if (stage.chunk > before.chunk)
      throw rule(`${at}.chunk`, `at most that of the stage before, ${before.chunk}`, stage.chunk)
    if ((stage.block ?? 64) > (before.block ?? 64))
      throw rule(
        `${at}.block`,
        `at most that of the stage before, ${before.block ?? 64}`,
        stage.block,
      )
    multiple(`${at}.topK`, stage.topK, before.chunk, 'the chunk before')
    if (before.topK !== undefined && stage.topK! > before.topK)
      throw rule(`${at}.topK`, `at most that of the stage before, ${before.topK}`, stage.topK)
  })
  if (last.topK !== undefined && last.topK < topK)
    throw rule('topK', `at most what enters the last stage, ${last.topK}`, topK)
  return finish(
    [last.block ?? 64, last.chunk],
    topK,
    options.sinkTokens ?? 256,
    stages.map((stage: HipStage, i) => ({
      width: kept(i) / stage.chunk,
      arguments: {
        kind: 'stage',
        ...rope,
        blockQ: stage.block ?? 64,
        blockK: stage.chunk,
        strideQ: stage.stride,
        ...(i > 0 && { fromBlockQ: stages[i - 1]!.block ?? 64, fromBlockK: stages[i - 1]!.chunk }),
      },
    })),
  )
}

/** @internal Where the keys of a search stand. */
export interface HipKeys<D extends FloatDType = FloatDType> {
  q: Tensor<D>
  k: Tensor<D>
  blockTable?: Tensor<'int32'> | undefined
  cacheSeqlens?: Tensor<'int32'> | undefined
  cuSeqlensQ?: Tensor | undefined
  cuSeqlensK?: Tensor | undefined
  /** The same, where the host knows them. */
  packed?: Mask | undefined
}

/** @internal */
export const listHeads = (headMode: HipHeadMode, { q, k }: HipKeys): number =>
  headMode === 'all' ? 1 : headMode === 'kv_group' ? k.shape[2]! : q.shape[2]!

/** @internal Keys that a sequence may have. */
export const keysOf = ({ k, blockTable }: HipKeys): number =>
  blockTable ? (blockTable.shape[1] ?? 0) * (k.shape[1] ?? 0) : (k.shape[1] ?? 0)

// Rows of blocks of so many queries
const rowsOf = ({ q, packed }: HipKeys, block: number): number =>
  blockRows(q.shape[1] ?? 0, block, packed?.sequences)

/** @internal Room for the lists of every call. */
export function makeLists(keys: HipKeys, { headMode, calls }: HipSettings): HipLists[] {
  const [b = 0] = keys.q.shape
  const made = { dtype: 'int32', device: keys.q.device } as const
  return calls.map(({ width, arguments: { blockQ } }) => {
    const shape = [b, listHeads(headMode, keys), rowsOf(keys, blockQ as number)]
    return { index: empty([...shape, width], made), count: empty(shape, made) }
  })
}

/** @internal */
export interface HipSearch {
  /** The first call that is made, those before having made their lists: 0 if left out. */
  first?: number
  /** What the last call writes as well. */
  last?: { blocks: Tensor; table?: Tensor; length?: Tensor } | undefined
  /** Where all calls find rows of keys nearby. */
  near?: { arguments: Record<string, Tensor>; after(): void } | undefined
}

/** @internal Makes the lists of every call, one from those before, where there is room for them. */
export function searchHip(
  { q, k, blockTable, cacheSeqlens, cuSeqlensQ, cuSeqlensK }: HipKeys,
  { calls }: HipSettings,
  lists: readonly HipLists[],
  { first = 0, last, near }: HipSearch = {},
): void {
  for (let i = first; i < calls.length; i++) {
    const before = lists[i - 1]
    const { index, count } = lists[i]!
    const also = i === calls.length - 1 ? last : undefined
    // what is spread comes last: V8 makes an object anew that grows after it, which takes longer than the call
    run('hip', {
      q,
      k,
      blockTable,
      cacheSeqlens,
      cuSeqlensQ,
      cuSeqlensK,
      fromIndex: before?.index,
      fromCount: before?.count,
      index,
      count,
      blocks: also?.blocks,
      table: also?.table,
      length: also?.length,
      ...calls[i]!.arguments,
      ...near?.arguments,
    })
    near?.after()
  }
}

/** @internal The lists that are attended, for good. */
export function listsOf(keys: HipKeys, settings: HipSettings, last?: HipSearch['last']): HipLists {
  const lists = makeLists(keys, settings)
  let found: HipLists | undefined
  try {
    searchHip(keys, settings, lists, { last })
    found = lists.at(-1)!
    return found
  } finally {
    for (const one of lists) if (one !== found) disposeLists(one)
  }
}

/** @internal */
export function disposeLists({ index, count }: HipLists): void {
  index.dispose()
  count.dispose()
}

function checkKeys<D extends FloatDType>(
  op: string,
  q: Tensor<D>,
  k: Tensor<D>,
  options: HipOptions,
  { block }: HipSettings,
  made: Tensor[],
): HipKeys<D> {
  const { blockTable, cacheSeqlens, cuSeqlensQ, cuSeqlensK, rope } = options
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  if (blockTable !== undefined) checkTensor(op, 'blockTable', blockTable)
  if (cuSeqlensQ === undefined && cuSeqlensK === undefined) {
    if (!blockTable) lengthsOf(op, q, k)
    else if (cacheSeqlens === undefined)
      throw refuse('ERR_ARGUMENT', op, 'cacheSeqlens', 'cacheSeqlens must be given with blockTable')
    const own = lengths(op, 'cacheSeqlens', cacheSeqlens, q.device, made)
    return { q, k, blockTable, cacheSeqlens: own }
  }
  if (blockTable || cacheSeqlens)
    throw refuse(
      'ERR_ARGUMENT',
      op,
      'cuSeqlensQ',
      `cuSeqlensQ cannot be combined with ${blockTable ? 'blockTable' : 'cacheSeqlens'}`,
    )
  const packed = packedMask(op, q, k, block, options)
  const [ofQ, ofK] = [packed.cuSeqlensQ!, packed.cuSeqlensK!]
  const longest = Math.max(0, ...ofK.slice(1).map((end, i) => end - ofK[i]!))
  const [positions = 0] = rope?.cos.shape ?? [longest]
  if (positions < longest)
    throw refuse(
      'ERR_SHAPE',
      op,
      'rope.cos',
      `rope.cos must have a row for each of ${longest} keys, got ${positions}`,
    )
  return {
    ...{ q, k, packed },
    cuSeqlensQ: offsets(op, 'cuSeqlensQ', ofQ, packed.sq, q.device, made),
    cuSeqlensK: offsets(op, 'cuSeqlensK', ofK, packed.sk, q.device, made),
  }
}

/**
 * The lists of {@link hip} themselves, for kernels that walk lists. With n packed sequences there are `floor(sq / block) + n`
 * rows, `block` being queries per list: those of sequence i begin at `floor(cuSeqlensQ[i] / block) + i`, and a row that belongs
 * to none lists nothing.
 *
 * @throws HeddleError as {@link hip} does.
 * @example
 * import { hipLists, randn } from 'heddle'
 * const [q, k] = [randn([1, 1024, 4, 64]), randn([1, 1024, 2, 64])]
 * const { index, count } = hipLists(q, k, { topK: 128, block: [64, 8] })
 * console.log(index.shape, count.shape) // [1, 4, 16, 16] [1, 4, 16]
 */
export function hipLists<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: HipOptions = {},
): HipLists {
  const op = 'hipLists'
  const settings = hipSettings(op, options)
  const made: Tensor[] = []
  try {
    const keys = checkKeys(op, q, k, options, settings, made)
    return named(op, () => listsOf(keys, settings), 'hip')
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

/**
 * Which keys a row of query blocks is likely to attend, found by looking at few of them: hierarchically pruned attention
 * (arXiv 2406.09827, and with `stages` arXiv 2502.08910). Without stages the best of `topK / block` intervals are kept and
 * cut in two until they are blocks; with stages, chunks are ranked by a descent inside each, and the best are cut up for the
 * next stage. A row also sees `sinkTokens` first keys and its `window`. Rows of a block share a list, so a row's list may
 * depend on later rows of its block, never on keys behind `window` of the block's last row. Packed sequences are searched in
 * one call.
 *
 * Ties go to the lower key. Neither a positive scale nor a soft cap of {@link attention} changes a list, so none is taken.
 *
 * @param q [b, sq, hq, d]; query i stands at sk - sq + i, so a chunk of a prompt has its list from all keys before.
 * @param k [b, sk, hk, d], or pages of it.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call; reading rejects if `cacheSeqlens` or
 * `blockTable` are out of range.
 * @example
 * import { attention, hip, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * const mask = hip(q, k, { topK: 128, window: 64 })
 * const { out } = attention(q, k, v, { mask })
 * console.log(await mask.density())
 */
export function hip<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: HipOptions = {},
): Mask {
  const op = 'hip'
  const settings = hipSettings(op, options)
  const made: Tensor[] = []
  try {
    return maskOf(checkKeys(op, q, k, options, settings, made), settings)
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

/** @internal The mask of a search. */
export function maskOf(keys: HipKeys, settings: HipSettings): Mask {
  const { q, packed } = keys
  const { headMode, block } = settings
  const [b = 0] = q.shape
  const heads = listHeads(headMode, keys)
  const words = Math.ceil(Math.ceil(keysOf(keys) / block[1]) / 32)
  const shape = [b, heads, rowsOf(keys, block[0]), words]
  const blocks = empty(shape, { dtype: 'int32', device: q.device })
  try {
    const lists = listsOf(keys, settings, { blocks })
    // what gathers takes no packed sequences
    if (packed) disposeLists(lists)
    return hipMask(keys, settings, blocks, settings.window, packed ? undefined : lists)
  } catch (error) {
    blocks.dispose()
    throw error
  }
}

/** @internal Lists and their bits, beside a window and sink tokens. */
export function hipMask(
  keys: HipKeys,
  settings: HipSettings,
  blocks: Tensor<'int32'>,
  window: number,
  lists: GatheredLists | undefined,
): Mask {
  return makeMask({
    sequences: keys.packed?.sequences ?? keys.q.shape[0]!,
    heads: blocks.shape[1]!,
    sq: keys.q.shape[1]!,
    sk: keysOf(keys),
    block: settings.block,
    causal: true,
    window,
    sinkTokens: settings.sinkTokens,
    blocks,
    columns: undefined,
    diagonals: undefined,
    bounds: undefined,
    cuSeqlensQ: keys.packed?.cuSeqlensQ,
    cuSeqlensK: keys.packed?.cuSeqlensK,
    lists,
    cacheSeqlens: keys.cacheSeqlens?.clone(),
  })
}
