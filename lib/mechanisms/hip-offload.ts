import { checkInteger, checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import {
  type CacheCounts,
  countsOf,
  disposeNearby,
  fetchPages,
  growNearby,
  makeNearby,
  type Nearby,
  pagesOf,
} from '../ops/fetch.js'
import { untrack } from '../scope.js'
import { empty, type Tensor, zeros } from '../tensor.js'

/** What of keys and values in pinned memory a decoder keeps on the device. */
export interface HipOffload {
  /** How many keys the search finds there, 32768 if left out: as many rows for each kv head, whichever those are. */
  scanned?: number | undefined
  /** How many keys with their values attention does, at least `topK + sinkTokens` and twice as many if left out. */
  attended?: number | undefined
}

/** What {@link HipDecoder.cacheCounts} resolves to. */
export interface HipCacheCounts {
  /** Rows of keys that the search looked at. */
  scanned: CacheCounts
  /** Blocks that were listed. */
  attended: CacheCounts
}

/** @internal The caches of one decoder. */
export interface HipCaches {
  /** For each call of the operator `hip`: what it takes to find rows of k nearby, and what comes after it. */
  search(k: Tensor<FloatDType>): { arguments: Record<string, Tensor>; after(): void }
  /** The blocks of k and v that are listed, which are fetched when they are asked for first. */
  listed<D extends FloatDType>(k: Tensor<D>, v: Tensor<D>, list: HipPages): HipListed<D> & HipPlaced
  /** The rows of k and v from `from` on. */
  recent<D extends FloatDType>(
    k: Tensor<D>,
    v: Tensor<D>,
    from: number,
  ): readonly [Tensor<D>, Tensor<D>]
  counts(): Promise<HipCacheCounts>
  dispose(): void
}

/** @internal Pages that are wanted, and how many keys these are. */
export interface HipPages {
  readonly table: Tensor<'int32'>
  readonly length: Tensor<'int32'>
}

/** @internal Pages of keys and values, and which are listed. */
export interface HipListed<D extends FloatDType> {
  k: Tensor<D>
  v: Tensor<D>
  table: Tensor<'int32'>
}

/** @internal Which pages those of the sequence are, [1, pages]; -1 for those that are not there. */
export interface HipPlaced {
  places: Tensor<'int32'>
}

const known: ReadonlySet<string> = new Set<keyof HipOffload>(['scanned', 'attended'])
// Rows that one search may bring in, and for how many of them one stays: a period of `hipRefresh.usual`
const [mostRows, patience] = [16384, 8]

/** @internal */
export function hipCaches(
  op: string,
  given: unknown,
  settings: { topK: number; sinkTokens: number; block: readonly [number, number] },
): HipCaches {
  const options = given === true ? {} : given
  if (options === null || typeof options !== 'object' || Array.isArray(options))
    throw mustBe(op, 'offload', 'a boolean or an object', options)
  checkOptions(op, options, known)
  const least = settings.topK + settings.sinkTokens
  const { scanned = 32768, attended = 2 * least } = options as HipOffload
  checkInteger(op, 'offload.scanned', scanned, 1)
  checkInteger(op, 'offload.attended', attended, least)
  const size = settings.block[1]

  let rows: Nearby | undefined
  let missed: Tensor<'int32'> | undefined
  let pages: Nearby | undefined
  let table: { of: HipPages; found: Tensor<'int32'> } | undefined
  let last: { k: Tensor; v: Tensor; start: number; end: number } | undefined

  return {
    search(k) {
      const [, sk = 0, hk = 0, d = 0] = k.shape
      const far = k.reshape([sk * hk, 1, 1, d])
      const slots = scanned * hk
      rows ??= makeNearby(slots, far)
      missed ??= untrack(zeros([slots + 1], { dtype: 'int32', device: k.device }))
      growNearby(rows, sk * hk)
      const { k: near, places, counts } = rows
      return {
        arguments: {
          ...{ near: near.reshape([slots, d]), nearPlaces: places, nearSlots: rows.slots },
          ...{ nearCounts: counts, missed },
        },
        after() {
          const length = missed!.slice(0, 0, 1)
          const wanted = missed!.slice(0, 1, 1 + mostRows)
          fetchPages(rows!, far, undefined, { wanted, length, patience })
          run('fill', { to: length, value: 0 })
        },
      }
    },
    listed<D extends FloatDType>(k: Tensor<D>, v: Tensor<D>, list: HipPages) {
      if (table?.of !== list || !pages) {
        const [keys, values] = [pagesOf(k, size), pagesOf(v, size)]
        pages ??= makeNearby(Math.floor(attended / size), keys, values)
        table?.found.dispose()
        const wanted = list.table.reshape([list.table.size])
        const found = fetchPages(pages, keys, values, { wanted, length: list.length.reshape([1]) })
        table = { of: list, found: untrack(found) }
      }
      const count = Math.ceil(k.shape[1]! / size)
      growNearby(pages, count)
      const places = pages.places.slice(0, 0, count).reshape([1, count])
      return { k: pages.k, v: pages.v, table: table.found, places } as HipListed<D> & HipPlaced
    },
    recent(k, v, from) {
      const [, sk = 0] = k.shape
      // There is room for three times as many, so that they seldom move, and not onto themselves
      const make = (x: Tensor) =>
        empty([1, 3 * (sk - from), ...x.shape.slice(2)], { dtype: x.dtype, device: x.device })
      const isNext = last && last.start <= from && from <= last.end && last.end <= sk
      const room = last?.k.shape[1] ?? 0
      const isFull = last && sk - last.start > room
      const isTight = last && (sk - from > room || last.end - from > from - last.start)
      if (!last || !isNext || (isFull && isTight)) {
        last?.k.dispose()
        last?.v.dispose()
        last = { k: make(k), v: make(v), start: from, end: from }
        for (const x of [last.k, last.v]) untrack(x)
      }
      const { start, end } = last
      if (isFull) last.start = from
      last.end = sk
      const update = <D extends FloatDType>(near: Tensor, far: Tensor<D>) => {
        const rows = (to: number, until: number) =>
          near.slice(1, to - last!.start, until - last!.start)
        if (last!.start > start) rows(from, end).copyFrom(near.slice(1, from - start, end - start))
        rows(end, sk).copyFrom(far.slice(1, end, sk))
        return rows(from, sk) as Tensor<D>
      }
      return [update(last.k, k), update(last.v, v)]
    },
    async counts() {
      const [scanned, attended] = await Promise.all([countsOf(rows), countsOf(pages)])
      return { scanned, attended }
    },
    dispose() {
      for (const near of [rows, pages]) if (near) disposeNearby(near)
      for (const tensor of [missed, table?.found, last?.k, last?.v]) tensor?.dispose()
      rows = missed = pages = table = last = undefined
    },
  }
}
