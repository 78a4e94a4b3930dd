import { checkInteger, checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse, renamed } from '../errors.js'
import { explainCall, run } from '../native.js'
import { type AttentionResult, attention } from '../ops/attention.js'
import { pagesOf } from '../ops/fetch.js'
import {
  type HipKeys,
  type HipLists,
  type HipOptions,
  type HipSettings,
  hip,
  hipMask,
  hipSettings,
  keysOf,
  knownHip,
  listHeads,
  listsOf,
  makeLists,
  searchHip,
} from '../ops/hip.js'
import { merge } from '../ops/merge.js'
import { scope, untrack } from '../scope.js'
import { checkTensor, empty, full, type Tensor, zeros } from '../tensor.js'
import { type HipCacheCounts, type HipListed, type HipOffload, hipCaches } from './hip-offload.js'
import { attendListed, substitutes, turn } from './hip-rope.js'
import { lengthsOf, ofMechanisms, under } from './packed.js'

/** Settings of {@link hip} that halve intervals, by what they trade. */
export const hipPresets = {
  /** The paper's: the smallest budget, and the fastest. */
  smallBudget: { topK: 512, block: [64, 2], stride: [2, 1], window: 256, sinkTokens: 16 },
  /** Four times the keys and every query looked at, for answers that hang on few keys. */
  largeBudget: { topK: 2048, block: [64, 2], stride: [1, 1], window: 256, sinkTokens: 16 },
  /**
   * Longer blocks and lists that the query heads of a kv head share: a quarter of the looking, at some loss. Answers that hang
   * on a few keys are lost by half; {@link infiniteHipPresets} have `fineScans` for these.
   */
  sharedLists: {
    topK: 1024,
    block: [64, 8],
    stride: [2, 1],
    window: 256,
    sinkTokens: 16,
    headMode: 'kv_group',
  },
} as const satisfies Record<string, HipOptions>

/** Options of {@link hipAttention}. */
export interface HipAttentionOptions extends HipOptions {
  /** Which layer of the model calls; with `layers`. */
  layer?: number | undefined
  /** What other layers do: `'dense'`, or options that replace those given here. */
  layers?: Readonly<Record<number, 'dense' | HipOptions>> | undefined
  /**
   * How many last rows of a sequence see everything, where it has at least twice as many: answers begin there. None if left
   * out, 64 with stages.
   */
  denseTailRows?: number | undefined
  /** Up to how many keys a call is dense, but for packed sequences; if left out, as many as every row would see anyway. */
  denseThreshold?: number | undefined
  /** Factor of q·k, `1/√d` if left out. */
  scale?: number | undefined
  /** Scores become `softCap * tanh(score / softCap)`. */
  softCap?: number | undefined
}

/** When {@link hipDecoder} makes the lists of three stages again, by what it trades. */
export const hipRefresh = {
  /** The paper's. */
  often: [16, 8, 4],
  /** The released code's, and taken where nothing else is said. */
  usual: [32, 16, 8],
  /** For speed, at some loss. */
  rarely: [96, 24, 8],
} as const

const ownOptions = [
  'layer',
  'layers',
  'denseTailRows',
  'denseThreshold',
  'scale',
  'softCap',
] as const

/** Splits options into those of `hip` and the others, of which only `names` may be there. */
function split<N extends string>(
  op: string,
  options: object,
  names: readonly N[],
): [hip: HipOptions, own: Record<N, unknown>] {
  checkOptions(op, options, new Set([...knownHip, ...names]))
  const own = {} as Record<N, unknown>
  const rest: Record<string, unknown> = {}
  for (const [key, value] of Object.entries(options))
    if ((names as readonly string[]).includes(key)) own[key as N] = value
    else rest[key] = value
  return [rest, own]
}

/**
 * Attention of one layer of a prompt, or of its next chunk, over what {@link hip} lists: the layers that are said to be dense
 * are, and so are the last rows and short prompts.
 *
 * @param q [b, sq, hq, d].
 * @param k [b, sk, hk, d]; sq at most sk.
 * @param v [b, sk, hk, dv].
 * @throws HeddleError as {@link hip} and {@link attention} do.
 * @example
 * import { hipAttention, hipPresets, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 2048, 2, 64]), randn([1, 2048, 2, 64]), randn([1, 2048, 2, 64])]
 * const layers = { 0: 'dense', 1: 'dense', 2: 'dense' } as const
 * const { out } = hipAttention(q, k, v, { ...hipPresets.smallBudget, layer: 5, layers })
 */
export function hipAttention<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: HipAttentionOptions = {},
): AttentionResult<D> {
  const op = 'hipAttention'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkTensor(op, 'v', v)
  const [shared] = split(op, options, ownOptions)
  const { layer = 0, layers = {}, scale, softCap } = options
  checkInteger(op, 'layer', layer, 0)
  if (layers === null || typeof layers !== 'object')
    throw mustBe(op, 'layers', 'an object with what some layers do', layers)
  const mode = layers[layer]
  if (mode !== undefined && mode !== 'dense' && (mode === null || typeof mode !== 'object'))
    throw mustBe(op, `layers[${layer}]`, '"dense" or options', mode)
  const searched = { ...shared, ...(mode === 'dense' ? {} : mode) }
  const settings = hipSettings(op, searched)
  const { topK, window, sinkTokens } = settings
  const tail = checkInteger(
    op,
    'denseTailRows',
    options.denseTailRows ?? (searched.stages ? 64 : 0),
    0,
  )
  const threshold = checkInteger(
    op,
    'denseThreshold',
    options.denseThreshold ?? topK + window + sinkTokens,
    0,
  )
  const { blockTable, cacheSeqlens, cuSeqlensQ, cuSeqlensK } = searched
  const place = { scale, softCap, blockTable, cacheSeqlens }
  const [b = 0, sq = 0] = q.shape
  if (blockTable !== undefined) checkTensor(op, 'blockTable', blockTable)
  if (blockTable && cuSeqlensQ)
    throw refuse('ERR_ARGUMENT', op, 'cuSeqlensQ', 'cuSeqlensQ cannot be combined with blockTable')
  const sk = keysOf({ q, k, blockTable })
  if (!blockTable && !cuSeqlensQ && !cuSeqlensK) lengthsOf(op, q, k)
  const { rope } = searched
  const lengths = { blockTable, cacheSeqlens, cuSeqlensQ, cuSeqlensK }
  const [other] = Object.entries(lengths).filter(([, x]) => x)
  if (rope && other)
    throw refuse('ERR_ARGUMENT', op, 'rope', `rope cannot be combined with ${other[0]}`)
  const isDense = mode === 'dense' || (sk <= threshold && !cuSeqlensQ)

  const attend = (): AttentionResult<D> => {
    const [turnedQ, turnedK] = rope ? [turn(q, rope, sk - sq), turn(k, rope, 0)] : [q, k]
    const dense = { ...place, causal: true }
    if (isDense) return attention(turnedQ, turnedK, v, { ...dense, cuSeqlensQ, cuSeqlensK })
    const elsewhere = substitutes(op, rope, settings)
    const sparse = (): AttentionResult<D> => {
      if (!elsewhere) return attention(turnedQ, turnedK, v, { ...place, mask: hip(q, k, searched) })
      const { index, count } = listsOf({ q, k }, settings)
      const near = attention(turnedQ, turnedK, v, { ...dense, window })
      const listed = Array.from({ length: b }, (_, i) => {
        const of = <T extends Tensor>(x: T) => x.slice(0, i, i + 1) as T
        const pages = (x: Tensor<D>) => pagesOf(of(x).contiguous(), settings.block[1])
        const lists = { index: of(index), count: of(count) }
        const given = { k: pages(k), v: pages(v), lists, sk, window }
        return attendListed(of(turnedQ), given, elsewhere, settings, { scale, softCap })
      })
      return merge([joined(listed), near])
    }
    const result = sparse()
    const [ofQ, ofK] = [cuSeqlensQ ?? [0, sq], cuSeqlensK ?? [0, k.shape[1]!]]
    for (let i = 1; tail > 0 && i < ofQ.length; i++) {
      const end = ofQ[i]!
      if (end - ofQ[i - 1]! < 2 * tail) continue
      const [keys, values] = [turnedK, v].map((x) => x.slice(1, ofK[i - 1]!, ofK[i]))
      const last = attention(turnedQ.slice(1, end - tail, end), keys!, values!, dense)
      result.out.slice(1, end - tail, end).copyFrom(last.out)
      result.lse.slice(2, end - tail, end).copyFrom(last.lse)
    }
    return result
  }
  return scope(() => under(op, attend))
}

/** Results of sequences, one after the other. */
function joined<D extends FloatDType>(parts: readonly AttentionResult<D>[]): AttentionResult<D> {
  const join = <E extends FloatDType>(tensors: readonly Tensor<E>[]) => {
    const [{ shape, dtype, device }] = tensors as [Tensor<E>]
    const all = empty(shape.with(0, tensors.length), { dtype, device })
    tensors.forEach((one, i) => {
      all.slice(0, i, i + 1).copyFrom(one)
    })
    return all
  }
  if (parts.length === 1) return parts[0]!
  return { out: join(parts.map(({ out }) => out)), lse: join(parts.map(({ lse }) => lse)) }
}

/** Options of {@link hipDecoder}. */
export interface HipDecoderOptions
  extends Omit<HipOptions, 'cuSeqlensQ' | 'cuSeqlensK' | 'blockTable' | 'cacheSeqlens'> {
  /**
   * After how many tokens lists are made again: 8 if left out. With stages one number for each, none larger than the one
   * before, and [32, 16, 8] for three stages: a stage takes up what the stage before listed last.
   */
  refresh?: number | readonly number[] | undefined
  /**
   * Whether the window keeps what leaves it until the next list is made, true if left out. The released code loses it until
   * then, unless sink tokens still stood in the window. A list of later stages names nothing that stood in the window when
   * the first of them looked last: what has left it since is seen again once that one looks, `refresh[0]` tokens later at
   * most. That is InfiniteHiP's rule; with the same number for all stages nothing is lost.
   */
  freezeWindowStart?: boolean | undefined
  /** Factor of q·k, `1/√d` if left out. */
  scale?: number | undefined
  /** Scores become `softCap * tanh(score / softCap)`. */
  softCap?: number | undefined
  /**
   * Keys and values stand in `pinned` memory, contiguous and of one sequence, and what is looked at again and again on the
   * device: rows of keys for the search, and, where all heads share a list, listed blocks and the window for attention. Its
   * results are those without, bit by bit.
   */
  offload?: boolean | HipOffload | undefined
}

/** Where keys and values of a {@link HipDecoder} stand that are pages `[pages, pageSize, hk, d]`. */
export interface HipDecoderPages {
  /** [b, maxPages], i32, as {@link attention} takes it; pages may move, what they hold may not change. */
  blockTable: Tensor<'int32'>
  /** How many keys every sequence has, up to and with those of the call. */
  length: number
}

const knownPages: ReadonlySet<string> = new Set<keyof HipDecoderPages>(['blockTable', 'length'])

/** What {@link hipDecoder} makes: the lists of one layer for one sequence. A call that throws leaves it as it was. */
export interface HipDecoder {
  /** Tokens decoded so far. */
  readonly tokens: number
  /**
   * Attention of the next tokens.
   *
   * @param q [b, n, hq, d], n tokens in a row, up to 128: one, or a guess at several.
   * @param k [b, sk, hk, d], all keys up to and with theirs: those of the call before, and further ones.
   * @param v [b, sk, hk, dv].
   * @param pages Where k and v are pages, with the same results; neither with `offload` nor with `rope`.
   * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_ARGUMENT` or `ERR_UNSUPPORTED` at the call, `ERR_SHAPE` also where there
   * are fewer keys than in the call before, or other heads: call `reset` then.
   */
  attend<D extends FloatDType>(
    q: Tensor<D>,
    k: Tensor<D>,
    v: Tensor<D>,
    pages?: HipDecoderPages,
  ): AttentionResult<D>
  /**
   * Has the next call make all lists and caches again, as after a guess whose keys were taken back, or a result that could
   * not be read: what is wrong with keys that a list was made of is wrong with the list.
   */
  reset(): void
  /** How often keys and blocks stood on the device, with `offload`; counted since the caches were made. */
  cacheCounts(): Promise<HipCacheCounts>
  /** Frees lists and caches. */
  dispose(): void
  /** Lets `using decoder = …` dispose of it. */
  [Symbol.dispose](): void
}

const nothing = { found: 0, missed: 0 }
const noCounts: HipCacheCounts = { scanned: nothing, attended: nothing }

// What a search of a decoder finds
interface Found {
  readonly lists: readonly HipLists[]
  /** The last list as bits, and with sink tokens as pages, which have so many keys, if keys stood one after the other. */
  readonly blocks: Tensor<'int32'>
  readonly table: Tensor<'int32'>
  readonly length: Tensor<'int32'>
  /** Among how many keys, and whether these were pages. */
  readonly sk: number
  readonly paged: boolean
}

const tensorsOf = (found: Found | undefined): Tensor[] =>
  found
    ? found.lists
        .flatMap(({ index, count }) => [index, count])
        .concat(found.blocks, found.table, found.length)
    : []

function makeFound(keys: HipKeys, settings: HipSettings, words: number): Found {
  const { device } = keys.q
  return scope(() => {
    const lists = makeLists(keys, settings)
    const { index, count } = lists.at(-1)!
    const room = (...shape: number[]) => empty(shape, { dtype: 'int32', device })
    const pages = settings.sinkTokens / settings.block[1] + index.shape[3]!
    const made = {
      lists,
      blocks: room(...count.shape, words),
      table: room(...count.shape, pages),
      length: room(...count.shape),
      sk: 0,
      paged: false,
    }
    tensorsOf(made).forEach(untrack)
    return made
  })
}

function checkRefresh(
  op: string,
  given: number | readonly number[] | undefined,
  stages: number | undefined,
): number[] {
  const fallback =
    stages === undefined ? 8 : stages === 3 ? hipRefresh.usual : new Array<number>(stages).fill(8)
  const list = given ?? fallback
  const all = (Array.isArray(list) ? list : [list]) as number[]
  if (all.length !== (stages ?? 1))
    throw mustBe(
      op,
      'refresh',
      stages === undefined ? 'one number' : `one number for each of ${stages} stages`,
      given,
    )
  all.forEach((interval, i) => {
    checkInteger(op, 'refresh', interval, 1)
    if (i > 0 && interval > all[i - 1]!)
      throw refuse(
        'ERR_ARGUMENT',
        op,
        'refresh',
        `refresh must never grow, got ${interval} after ${all[i - 1]}`,
      )
  })
  return all
}

/**
 * Decoding of one sequence in one layer over the lists of {@link hip}, which stand for some tokens before they are made
 * again. The first call makes all of them. Dispose of it with its sequence. Keys stand at positions from 0 on.
 *
 * @throws HeddleError `ERR_ARGUMENT` at the call.
 * @example
 * import { hipDecoder, randn } from 'heddle'
 * const [k, v] = [randn([1, 1024, 2, 64]), randn([1, 1024, 2, 64])]
 * using decoder = hipDecoder({ topK: 128, refresh: 4 })
 * for (let length = 1001; length <= 1024; length++) {
 *   const [keys, values] = [k.slice(1, 0, length), v.slice(1, 0, length)]
 *   const { out } = decoder.attend(randn([1, 1, 8, 64]), keys, values)
 * }
 */
export function hipDecoder(options: HipDecoderOptions = {}): HipDecoder {
  const op = 'hipDecoder'
  const [searched, own] = split(op, options, [
    'refresh',
    'freezeWindowStart',
    'scale',
    'softCap',
    'offload',
  ])
  for (const [name, remedy] of [
    ['cuSeqlensQ', 'make a decoder for each sequence'],
    ['cuSeqlensK', 'make a decoder for each sequence'],
    ['blockTable', 'give it to attend'],
    ['cacheSeqlens', 'give attend the keys that are there, k.slice(1, 0, length), or pages'],
  ] as const)
    if (searched[name] !== undefined)
      throw refuse(
        'ERR_ARGUMENT',
        op,
        name,
        `${name} is not taken here: a decoder is one sequence's; ${remedy}`,
      )
  const { stages, rope } = searched
  const settingsFor = (block: number) => {
    const strideOf = (stride: number) => Math.min(stride, block)
    if (stages) {
      const fitted = stages.map((stage) => ({ ...stage, block, stride: strideOf(stage.stride) }))
      return hipSettings(op, { ...searched, stages: fitted })
    }
    const [, keys] = searched.block ?? [64, 2]
    const [queries, stride] = searched.stride ?? [2, 1]
    return hipSettings(op, {
      ...searched,
      block: [block, keys],
      stride: [strideOf(queries), stride],
    })
  }
  // One block holds the rows of a call
  const fitted = new Map<number, HipSettings>()
  const settingsOf = (rows: number) => {
    const block = 2 ** Math.ceil(Math.log2(rows))
    const known = fitted.get(block) ?? settingsFor(block)
    if (!fitted.has(block)) fitted.set(block, known)
    return known
  }
  const whole = hipSettings(op, searched)
  const refresh = checkRefresh(op, options.refresh, stages?.length)
  const { freezeWindowStart = true, scale, softCap, offload = false } = own as HipDecoderOptions
  if (typeof freezeWindowStart !== 'boolean')
    throw mustBe(op, 'freezeWindowStart', 'a boolean', freezeWindowStart)
  const elsewhere = substitutes(op, searched.rope, whole)
  const caches = offload === false ? undefined : hipCaches(op, offload, whole)

  let tokens = 0
  // Sequences, heads of queries and of keys, their size and the keys of the call before
  let before: readonly number[] = []
  let found: Found | undefined
  // What was found before that, where the next search writes: a call that fails leaves `found` as it was
  let spare: Found | undefined
  // Whether a kernel walks lists where their blocks stand; others take them as pages
  let isGathered: boolean | undefined

  // The first stage that one of the next n tokens has to begin at; as many as there are if none
  const restart = (n: number) => {
    if (tokens === 0 || !found) return 0
    const at = refresh.findIndex(
      (interval) => Math.floor((tokens + n - 1) / interval) > Math.floor((tokens - 1) / interval),
    )
    return at < 0 ? refresh.length : at
  }
  const forget = () => {
    for (const tensor of [...tensorsOf(found), ...tensorsOf(spare)]) tensor.dispose()
    found = spare = isGathered = undefined
    caches?.dispose()
  }
  // What stages before `first` have found stays
  const search = (
    keys: HipKeys,
    settings: HipSettings,
    first: number,
    words: number,
    sk: number,
  ): Found => {
    const { q, k } = keys
    const isFit =
      spare?.length.device === q.device &&
      spare.length.shape[0] === q.shape[0] &&
      spare.length.shape[1] === listHeads(settings.headMode, keys) &&
      spare.blocks.shape[3] === words
    if (!isFit) {
      const made = makeFound(keys, settings, words)
      for (const tensor of tensorsOf(spare)) tensor.dispose()
      spare = made
    }
    const { blocks, table, length, lists: room } = spare!
    const lists = room.map((own, i) => (i < first ? found!.lists[i]! : own))
    const paged = keys.blockTable !== undefined
    const last = paged ? { blocks } : { blocks, table, length }
    if (!caches) searchHip(keys, settings, lists, { first, last })
    else scope(() => searchHip(keys, settings, lists, { first, last, near: caches.search(k) }))
    return { lists, blocks, table, length, sk, paged }
  }
  // Room for keys has come since, and with it words of bits, or some without keys have gone
  const lengthened = (old: Found, words: number): Found => {
    const { shape, device } = old.blocks
    const blocks = zeros(shape.with(3, words), { dtype: 'int32', device })
    const both = Math.min(words, shape[3]!)
    blocks.slice(3, 0, both).copyFrom(old.blocks.slice(3, 0, both))
    return { ...old, blocks }
  }

  // For keys that no kernel gathers, or that stand elsewhere: one list for all heads is a table of pages of its blocks, which
  // kernels for paged keys take, and the window is attended apart
  const attendPages = <D extends FloatDType>(
    q: Tensor<D>,
    k: Tensor<D>,
    v: Tensor<D>,
    settings: HipSettings,
    window: number,
    found: Found,
  ): AttentionResult<D> =>
    scope(() => {
      const [, size] = settings.block
      const [sk, n] = [k.shape[1]!, q.shape[1]!]
      const from = Math.max(sk - n + 1 - window, 0)
      const listed: HipListed<D> = caches?.listed(k, v, found) ?? {
        ...{ k: pagesOf(k, size), v: pagesOf(v, size), table: found.table },
      }
      const last = caches?.recent(k, v, from) ?? [k.slice(1, from), v.slice(1, from)]
      const factors = { scale, softCap }
      if (elsewhere) {
        const turned = turn(q, elsewhere, sk - n)
        const given = { ...listed, lists: found.lists.at(-1)!, sk, window }
        const near = { ...factors, causal: true, window }
        return merge([
          attendListed(turned, given, elsewhere, settings, factors),
          attention(turned, turn(last[0]!, elsewhere, from), last[1]!, near),
        ])
      }
      const place = {
        blockTable: listed.table.reshape([1, listed.table.size]),
        cacheSeqlens: found.length.reshape([1]),
      }
      return merge([
        attention(q, listed.k, listed.v, { ...place, ...factors }),
        attention(q, last[0]!, last[1]!, factors),
      ])
    })

  // The list is walked where its blocks stand on the device, as it would be among all keys
  const attendNear = <D extends FloatDType>(
    q: Tensor<D>,
    k: Tensor<D>,
    v: Tensor<D>,
    settings: HipSettings,
    window: number,
    found: Found,
  ): AttentionResult<D> =>
    scope(() => {
      const sk = k.shape[1]!
      const from = Math.max(sk - window, 0)
      const near = caches!.listed(k, v, found)
      const [recentK, recentV] = caches!.recent(k, v, from)
      const recent = { k: recentK!, v: recentV!, from }
      const given = { ...found.lists.at(-1)!, recent }
      const rows = q.isContiguous ? q : q.contiguous()
      const keys = { q: rows, k: near.k, blockTable: near.places }
      const mask = hipMask(keys, settings, found.blocks, window, given)
      const place = { blockTable: near.places, cacheSeqlens: [sk] }
      return attention(rows, near.k, near.v, { ...place, mask, scale, softCap })
    })

  // What `attention` does with a mask of lists, whose arguments are known: a step takes the time that the host takes for it
  const attendLists = <D extends FloatDType>(
    q: Tensor<D>,
    k: Tensor<D>,
    v: Tensor<D>,
    { block, sinkTokens }: HipSettings,
    window: number,
    { lists, blocks }: Found,
    place?: Pick<HipKeys, 'blockTable' | 'cacheSeqlens'>,
  ) => {
    const { index, count } = lists.at(-1)!
    const [out, lse] = run('attention', {
      q,
      k,
      v,
      blockTable: place?.blockTable,
      cacheSeqlens: place?.cacheSeqlens,
      scale,
      softCap,
      masked: true,
      causal: true,
      maskBlocks: blocks,
      maskIndex: index,
      maskCount: count,
      maskBlockQ: block[0],
      maskBlockK: block[1],
      maskWindow: window,
      maskSinkTokens: sinkTokens,
    })
    return { out, lse } as AttentionResult<D>
  }

  return {
    get tokens() {
      return tokens
    },
    attend(q, k, v, pages) {
      checkTensor(op, 'q', q)
      checkTensor(op, 'k', k)
      checkTensor(op, 'v', v)
      checkOptions(op, pages, knownPages)
      const [b = 0, n = 0] = q.shape
      checkInteger(op, 'q.shape[1]', n, 1, 128)
      if (elsewhere && b !== 1)
        throw refuse(
          'ERR_UNSUPPORTED',
          op,
          'q',
          'rope with keys attended elsewhere than they stand takes one sequence; make a decoder for each',
        )
      const settings = settingsOf(n)
      const { blockTable } = pages ?? {}
      if (pages) {
        checkTensor(op, 'blockTable', blockTable)
        const other = rope ? 'rope' : caches ? 'offload' : undefined
        if (other)
          throw refuse('ERR_ARGUMENT', op, other, `${other} cannot be combined with blockTable`)
      }
      const room = keysOf({ q, k, blockTable })
      const sk = pages ? checkInteger(op, 'length', pages.length, n, room) : room
      const [, , hk = 0, d = 0] = k.shape
      const sizes = [b, q.shape[2]!, hk, d, sk]
      if (found && sizes.some((size, i) => (i < 4 ? size !== before[i] : size < before[i]!))) {
        const [ofB, heads, ofHk, ofD, keys] = before
        const text = `k must be [${ofB}, from ${keys} on, ${ofHk}, ${ofD}] and q have ${heads} heads as in the call before`
        const got = `got [${k.shape.join(', ')}] and ${q.shape[2]}; call reset() for other keys`
        throw refuse('ERR_SHAPE', op, 'k', `${text}, ${got}`)
      }
      if (caches && (b !== 1 || !k.isContiguous || !v.isContiguous))
        throw refuse(
          'ERR_ARGUMENT',
          op,
          'offload',
          'offload takes contiguous keys and values of one sequence',
        )
      const size = settings.block[1]
      const words = Math.ceil(room / size / 32)
      const isAlike =
        b === 1 && settings.headMode === 'all' && settings.window >= size && sk >= size
      const place = pages && {
        blockTable,
        cacheSeqlens: full([b], sk, { dtype: 'int32', device: q.device }),
      }
      const attendFound = (found: Found) => {
        const isShared = isAlike && !pages && !found.paged
        // no list has sink tokens that stood in the window
        const isFrozen = freezeWindowStart || found.sk < settings.window + settings.sinkTokens
        const window = settings.window + (isFrozen ? sk - found.sk : 0)
        const attend = () => attendLists(q, k, v, settings, window, found, place)
        if (isShared && n === 1 && !rope)
          isGathered ??= explainCall(attend)?.variant?.endsWith('_gather') ?? false
        if (isShared && (elsewhere || (n === 1 && !rope && !isGathered)))
          return attendPages(q, k, v, settings, window, found)
        if (isShared && n === 1 && !rope && caches)
          return attendNear(q, k, v, settings, window, found)
        if (!rope) return attend()
        return scope(() =>
          attendLists(turn(q, rope, sk - n), turn(k, rope, 0), v, settings, window, found),
        )
      }
      const attendNext = () => {
        const first = restart(n)
        if (first < refresh.length) {
          const next = search({ q, k, ...place }, settings, first, words, sk)
          const result = attendFound(next)
          const unused = spare!.lists
          spare = found && {
            ...found,
            lists: found.lists.map((own, i) => (i < first ? unused[i]! : own)),
          }
          found = next
          return result
        }
        const old = found!
        if (old.blocks.shape[3] === words) return attendFound(old)
        return scope(() => {
          const next = lengthened(old, words)
          const result = attendFound(next)
          untrack(next.blocks)
          old.blocks.dispose()
          found = next
          return result
        })
      }
      try {
        const result = attendNext()
        tokens += n
        before = sizes
        return result
      } catch (error) {
        // they may hold keys of what was refused
        caches?.dispose()
        throw renamed(op, error, ofMechanisms)
      } finally {
        place?.cacheSeqlens.dispose()
      }
    },
    cacheCounts: async () => caches?.counts() ?? noCounts,
    reset() {
      forget()
      tokens = 0
    },
    dispose: forget,
    [Symbol.dispose]: forget,
  }
}
