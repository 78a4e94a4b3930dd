import { checkInteger, checkOptions } from './check.js'
import { blockTable, firstBlockRow, type MaskParts, type SvgOptions } from './mask.js'
import type { Tensor } from './tensor.js'

/** @internal A mask that was read. */
export interface HostMask {
  readonly heads: readonly number[]
  count(): Promise<number>
  density(): Promise<number>
  svg(options?: SvgOptions): string
}

type Visit = (sequence: number, head: number, query: number) => void

/** @internal A mask's rows on the host. */
export interface HostRows {
  lengths: readonly { sq: number; sk: number }[]
  /** Runs of keys that a query sees: from, to (excluded), from, to, ascending and apart. */
  runs(sequence: number, head: number, query: number): number[]
  /** How many keys a query sees, at little cost for rows in turn. */
  seen(sequence: number, head: number, query: number): number
  /** All rows in turn, with time for others in between. */
  each(visit: Visit): Promise<void>
}

/** @internal Reads a mask, and leaves looking at it for later; what it is made of may go meanwhile. */
export async function readMask(parts: MaskParts): Promise<HostMask> {
  const rows = await readRows(parts)
  const count = async () => {
    let total = 0
    await rows.each((sequence, head, query) => {
      total += rows.seen(sequence, head, query)
    })
    return total
  }
  return {
    heads: Array.from({ length: parts.heads }, (_, head) => head),
    count,
    async density() {
      const triangle = (side: number) => (side > 0 ? (side * (side + 1)) / 2 : 0)
      let all = 0
      for (const { sq, sk } of rows.lengths)
        all += parts.causal ? triangle(sk) - triangle(sk - sq) : sq * sk
      all *= parts.heads
      return all === 0 ? 0 : (await count()) / all
    },
    svg: (options = {}) => draw(rows, parts, options),
  }
}

const turn = () => new Promise<void>((resolve) => setImmediate(resolve))
// Milliseconds that nothing else may happen, and rows between two looks at the clock
const longest = 8
const glance = 64

const bit = (set: Int32Array, at: number) => (set[at >> 5]! >> (at & 31)) & 1

function ones(word: number): number {
  let sums = word - ((word >>> 1) & 0x55555555)
  sums = (sums & 0x33333333) + ((sums >>> 2) & 0x33333333)
  return Math.imul((sums + (sums >>> 4)) & 0x0f0f0f0f, 0x01010101) >>> 24
}

// Sets bits from..to, or clears them
function fill(set: Int32Array, from: number, to: number, on = true): void {
  for (let word = from >> 5; word * 32 < to; word++) {
    const low = Math.max(from - word * 32, 0)
    const high = Math.min(to - word * 32, 32)
    const bits = (high === 32 ? -1 : (1 << high) - 1) & (-1 << low)
    set[word] = on ? set[word]! | bits : set[word]! & ~bits
  }
}

/** @internal Brings a mask to the host. */
export async function readRows(parts: MaskParts): Promise<HostRows> {
  const { sequences, heads, sq, sk, block, causal, window, sinkTokens } = parts
  const read = (tensor: Tensor<'int32'> | undefined) => tensor?.read()
  const [blocks, columns, diagonals, bounds, cached] = await Promise.all([
    read(parts.blocks),
    read(parts.columns),
    read(parts.diagonals),
    read(parts.bounds),
    read(parts.cacheSeqlens),
  ])
  const { cuSeqlensQ: cuQ, cuSeqlensK: cuK } = parts
  const table = blockTable(parts)
  const rowWords = parts.blocks?.shape[3] ?? 0
  const tokenWords = parts.columns?.shape[2] ?? parts.diagonals?.shape[2] ?? 0
  const places = Array.from({ length: sequences }, (_, i) => ({
    batch: cuQ ? 0 : i,
    from: cuQ ? cuQ[i]! : 0,
    firstRow: cuQ ? firstBlockRow(cuQ, block[0], i) : 0,
    sq: cuQ ? cuQ[i + 1]! - cuQ[i]! : sq,
    sk: cuK ? cuK[i + 1]! - cuK[i]! : (cached?.[i] ?? sk),
  }))

  // Position of a query, and keys that causality and bounds allow
  const rangeOf = (sequence: number, query: number): [p: number, begin: number, end: number] => {
    const place = places[sequence]!
    const p = place.sk - place.sq + query
    const end = causal ? Math.min(p + 1, place.sk) : place.sk
    if (!bounds) return [p, 0, end]
    const at = (place.batch * sq + place.from + query) * 2
    return [p, Math.max(bounds[at]!, 0), Math.min(end, bounds[at + 1]!)]
  }
  // The first bit of a row of blocks
  const lineOf = (sequence: number, head: number, row: number) => {
    const { batch, firstRow } = places[sequence]!
    return ((batch * heads + head) * table.rows + firstRow + row) * rowWords * 32
  }
  const rowOf = (query: number) => (blocks ? Math.floor(query / block[0]) : 0)

  // Of one row of blocks of one head at a time
  const known = { sequence: -1, head: -1, row: -1 }
  const isKnown = (sequence: number, head: number, query: number) => {
    const row = rowOf(query)
    if (known.sequence === sequence && known.head === head && known.row === row) return true
    Object.assign(known, { sequence, head, row })
    return false
  }

  // Without single keys: how many blocks are listed before each
  const before = new Int32Array(blocks ? table.columns + 2 : 0)
  const listed = (from: number, to: number) => {
    if (!blocks || from >= to) return 0
    const below = (key: number) => {
      const [c, rest] = [Math.floor(key / block[1]), key % block[1]]
      return before[c]! * block[1] + (before[c + 1]! - before[c]!) * rest
    }
    return below(to) - below(from)
  }
  const seenInRanges = (sequence: number, head: number, query: number) => {
    if (!isKnown(sequence, head, query) && blocks) {
      const line = lineOf(sequence, head, known.row)
      for (let c = 0; c <= table.columns; c++)
        before[c + 1] = before[c]! + (c < table.columns ? bit(blocks, line + c) : 0)
    }
    const [p, begin, end] = rangeOf(sequence, query)
    if (begin >= end) return 0
    const clip = (key: number, least: number) => Math.max(Math.min(key, end), least)
    const sinks = clip(sinkTokens, begin)
    const first = window > 0 ? clip(p - window + 1, sinks) : end
    const last = window > 0 ? clip(p + 1, first) : end
    return sinks - begin + (last - first) + listed(sinks, first) + listed(last, end)
  }

  // With single keys: a row as bits, of which those that rows share are kept
  const shared = new Int32Array(tokenWords)
  const bits = new Int32Array(tokenWords)
  const mirrored = new Int32Array(diagonals ? 2 * tokenWords + 1 : 0)
  const bitsOf = (sequence: number, head: number, query: number): [Int32Array, number] => {
    if (!isKnown(sequence, head, query)) {
      const line = (sequence * heads + head) * tokenWords
      if (columns) shared.set(columns.subarray(line, line + tokenWords))
      else shared.fill(0)
      fill(shared, 0, Math.min(sinkTokens, tokenWords * 32))
      for (let c = 0; blocks && c < table.columns; c++)
        if (bit(blocks, lineOf(sequence, head, known.row) + c))
          fill(shared, c * block[1], Math.min((c + 1) * block[1], tokenWords * 32))
      for (let i = 0; diagonals && i < tokenWords; i++) {
        let word = diagonals[line + tokenWords - 1 - i]!
        let turned = 0
        for (let j = 0; j < 32; j++, word >>>= 1) turned = (turned << 1) | (word & 1)
        mirrored[i] = turned
      }
    }
    const [p, begin, end] = rangeOf(sequence, query)
    const count = Math.max(Math.ceil(end / 32), 0)
    bits.set(shared.subarray(0, count))
    if (diagonals && p >= 0) {
      // The bit of key t, of distance p - t, stands p - t before the end
      const shift = tokenWords * 32 - 1 - p
      const [whole, rest] = [shift >> 5, shift & 31]
      for (let i = 0; i < count; i++) {
        const high = rest === 0 ? 0 : mirrored[whole + i + 1]! << (32 - rest)
        bits[i] = bits[i]! | (mirrored[whole + i]! >>> rest) | high
      }
    }
    if (window > 0) fill(bits, Math.max(p - window + 1, 0), Math.max(Math.min(p + 1, end), 0))
    if (count > 0) fill(bits, end, count * 32, false)
    fill(bits, 0, Math.min(begin, count * 32), false)
    return [bits, count]
  }
  const seenInBits = (sequence: number, head: number, query: number) => {
    const [own, count] = bitsOf(sequence, head, query)
    let total = 0
    for (let i = 0; i < count; i++) total += ones(own[i]!)
    return total
  }

  const runsInRanges = (sequence: number, head: number, query: number) => {
    const [p, begin, end] = rangeOf(sequence, query)
    const found: [number, number][] = []
    if (sinkTokens > 0) found.push([0, sinkTokens])
    if (window > 0) found.push([p - window + 1, p + 1])
    const line = lineOf(sequence, head, rowOf(query))
    for (let c = 0; blocks && c * block[1] < end; c++)
      if (bit(blocks, line + c)) found.push([c * block[1], (c + 1) * block[1]])
    found.sort((x, y) => x[0] - y[0])
    const merged: number[] = []
    for (const [first, last] of found) {
      const [from, to] = [Math.max(first, begin), Math.min(last, end)]
      if (from >= to) continue
      const until = merged.at(-1) ?? -1
      if (merged.length > 0 && from <= until) merged[merged.length - 1] = Math.max(until, to)
      else merged.push(from, to)
    }
    return merged
  }
  const runsInBits = (sequence: number, head: number, query: number) => {
    const [own, count] = bitsOf(sequence, head, query)
    const runs: number[] = []
    for (let t = 0; t < count * 32; t++) {
      if (t % 32 === 0 && own[t >> 5] === 0) t += 31
      else if (bit(own, t) && runs.at(-1) === t) runs[runs.length - 1] = t + 1
      else if (bit(own, t)) runs.push(t, t + 1)
    }
    return runs
  }

  const inBits = columns !== undefined || diagonals !== undefined
  const each = async (visit: Visit) => {
    let until = performance.now() + longest
    for (let sequence = 0; sequence < sequences; sequence++)
      for (let head = 0; head < heads; head++)
        for (let query = 0; query < places[sequence]!.sq; query++) {
          visit(sequence, head, query)
          if (query % glance > 0 || performance.now() < until) continue
          await turn()
          until = performance.now() + longest
        }
  }
  return {
    lengths: places,
    runs: inBits ? runsInBits : runsInRanges,
    seen: inBits ? seenInBits : seenInRanges,
    each,
  }
}

const knownSvg: ReadonlySet<string> = new Set<keyof SvgOptions>(['head', 'sequence', 'size'])

// Cells of at most 96 to a side, each as dark as a few of its rows see of its keys
function draw(rows: HostRows, parts: MaskParts, options: SvgOptions): string {
  checkOptions('mask', options, knownSvg)
  const head = checkInteger('mask', 'head', options.head ?? 0, 0, Math.max(parts.heads - 1, 0))
  const sequence = checkInteger(
    'mask',
    'sequence',
    options.sequence ?? 0,
    0,
    Math.max(parts.sequences - 1, 0),
  )
  const size = checkInteger('mask', 'size', options.size ?? 192, 1, 4096)
  const { sq, sk } = rows.lengths[sequence] ?? { sq: 0, sk: 0 }
  const [high, wide] = [Math.min(96, Math.max(sq, 1)), Math.min(96, Math.max(sk, 1))]
  const rects: string[] = []
  for (let y = 0; y < high; y++) {
    const [from, to] = [Math.floor((y * sq) / high), Math.floor(((y + 1) * sq) / high)]
    const step = Math.max(Math.floor((to - from) / 4), 1)
    const seen = new Float64Array(wide)
    let sampled = 0
    for (let query = from; query < to; query += step, sampled++) {
      const runs = rows.runs(sequence, head, query)
      for (let i = 0; i < runs.length; i += 2) {
        const [first, last] = [(runs[i]! * wide) / sk, (runs[i + 1]! * wide) / sk]
        for (let x = Math.floor(first); x < last; x++)
          seen[x]! += Math.min(last, x + 1) - Math.max(first, x)
      }
    }
    for (let x = 0; x < wide; ) {
      const shade = Math.round((4 * seen[x]!) / Math.max(sampled, 1))
      let until = x + 1
      while (until < wide && Math.round((4 * seen[until]!) / Math.max(sampled, 1)) === shade)
        until++
      if (shade > 0)
        rects.push(
          `<rect x="${x}" y="${y}" width="${until - x}" height="1" fill-opacity="${shade / 4}"/>`,
        )
      x = until
    }
  }
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${size}" height="${Math.round((size * high) / wide)}" viewBox="0 0 ${wide} ${high}" shape-rendering="crispEdges"><rect width="${wide}" height="${high}" fill="#f3f1ea"/><g fill="#1f4e79">${rects.join('')}</g></svg>`
}
