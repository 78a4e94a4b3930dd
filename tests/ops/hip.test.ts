import {
  attention,
  type Device,
  empty,
  explain,
  type HipOptions,
  type HipStage,
  hip,
  hipLists,
  randn,
  type Tensor,
  tensor,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { run } from '../../dist/native.js'
import { maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random, sample } from '../support/random.js'
import { reader } from '../support/reference.js'

type Read = ReturnType<typeof reader>

/** What a call is about, with all of its options. */
interface Problem {
  sq: number
  sk: number
  hq: number
  hk: number
  d: number
  q: Read
  k: Read
  window: number
  sinkTokens: number
  topK: number
  headMode: 'head' | 'kv_group' | 'all'
}

const order = <T>(list: readonly T[], score: (x: T) => number): T[] =>
  list
    .map((x, i) => ({ x, i, s: score(x) }))
    .sort((a, b) => b.s - a.s || a.i - b.i)
    .map(({ x }) => x)

const range = (n: number) => Array.from({ length: Math.max(n, 0) }, (_, i) => i)

/** The query heads that share list h. */
const classOf = (p: Problem, h: number) => {
  const lists = p.headMode === 'all' ? 1 : p.headMode === 'kv_group' ? p.hk : p.hq
  return range(p.hq / lists).map((i) => (h * p.hq) / lists + i)
}

const dot = (p: Problem, row: ArrayLike<number>, b: number, t: number, h: number) => {
  let sum = 0
  for (let e = 0; e < p.d; e++) sum += row[e]! * p.k(b, t, Math.floor(h / (p.hq / p.hk)), e)
  return sum
}

/** Section 2.2 with sorts. */
function halves(
  p: Problem,
  b: number,
  h: number,
  u: number,
  block: readonly [number, number],
  stride: readonly [number, number],
  first = false,
): number[] {
  const [bq, bk] = block
  const [sq, sk] = stride
  const last = Math.min((u + 1) * bq, p.sq)
  const end = p.sk - p.sq + last - p.window
  const blocks = Math.ceil((end - p.sinkTokens) / bk)
  const C = p.topK / bk
  const starts = (list: number[]) => list.map((j) => p.sinkTokens + j * bk)
  if (blocks <= C) return starts(range(blocks))
  let rows = range(bq / sq)
    .map((r) => u * bq + (r + 1) * sq - 1)
    .filter((i) => i < last)
  if (rows.length === 0) rows = [last - 1]
  let intervals = range(C).map(
    (i) => [Math.floor((i * blocks) / C), Math.floor(((i + 1) * blocks) / C)] as const,
  )
  while (intervals.some(([lo, hi]) => hi - lo > 1)) {
    const branches = intervals.flatMap(([lo, hi]) => {
      const m = lo + Math.floor((hi - lo) / 2)
      return (
        [
          [lo, m],
          [m, hi],
        ] as const
      ).filter(([x, y]) => y > x)
    })
    const score = ([lo, hi]: readonly [number, number]) => {
      const c = first ? lo : lo + Math.floor((hi - lo) / 2)
      let best = Number.NEGATIVE_INFINITY
      for (let o = sk - 1; o < bk; o += sk) {
        const t = p.sinkTokens + c * bk + o
        for (const head of classOf(p, h))
          for (const i of rows)
            if (t <= p.sk - p.sq + i - p.window)
              best = Math.max(
                best,
                dot(
                  p,
                  range(p.d).map((e) => p.q(b, i, head, e)),
                  b,
                  t,
                  head,
                ),
              )
      }
      return best
    }
    intervals = order(branches, score)
      .slice(0, C)
      .sort((x, y) => x[0] - y[0])
  }
  return starts(intervals.map(([lo]) => lo))
}

/** How rows turn, and where they are taken to stand. */
interface Turn {
  angle(position: number, channel: number): readonly [cos: number, sin: number]
  query(p: number, chunks: number): number
  key(t: number, chunk: number, right: boolean, first: number, last: number): number
}

const turned = (row: readonly number[], position: number, turn: Turn) =>
  row.map((x, e) => {
    const half = row.length / 2
    const [cos, sin] = turn.angle(position, e % half)
    return e < half ? x * cos - row[e + half]! * sin : x * cos + row[e - half]! * sin
  })

/** Section 2.3 with sorts; `round` is what the dtype makes of a mean. */
function staged(
  p: Problem,
  b: number,
  h: number,
  u: number,
  stages: readonly HipStage[],
  round: (x: number) => number,
  turn?: Turn,
): number[] {
  const last = stages.at(-1)!.block ?? 64
  let chunks: number[] = []
  stages.forEach((stage, s) => {
    const bq = stage.block ?? 64
    const row = Math.floor((u * last) / bq)
    const until = Math.min((row + 1) * bq, p.sq)
    const end = p.sk - p.sq + until - p.window
    const before = stages[s - 1]
    chunks = (
      before
        ? chunks.flatMap((a) => range(before.chunk / stage.chunk).map((i) => a + i * stage.chunk))
        : range(Math.ceil((end - p.sinkTokens) / stage.chunk)).map(
            (i) => p.sinkTokens + i * stage.chunk,
          )
    ).filter((a) => a < end)
    const keep = (stages[s + 1]?.topK ?? p.topK) / stage.chunk
    if (chunks.length <= keep) return
    const means = new Map(
      classOf(p, h).map((head) => [
        head,
        range(Math.ceil((until - row * bq) / stage.stride)).map((g) => {
          const rows = range(stage.stride)
            .map((i) => row * bq + g * stage.stride + i)
            .filter((i) => i < until)
          const own = rows.map((i) => {
            const line = range(p.d).map((e) => p.q(b, i, head, e))
            return turn ? turned(line, turn.query(p.sk - p.sq + i, chunks.length), turn) : line
          })
          return range(p.d).map((e) =>
            round(own.reduce((sum, line) => sum + line[e]!, 0) / rows.length),
          )
        }),
      ]),
    )
    const [first, final] = [p.sk - p.sq + row * bq, p.sk - p.sq + until - 1]
    const best = (head: number, t: number, a: number, right = false) => {
      if (!turn) return Math.max(...means.get(head)!.map((row) => dot(p, row, b, t, head)))
      const position = turn.key(t, chunks.indexOf(a), right, first, final)
      const line = range(p.d).map((e) => p.k(b, t, Math.floor(head / (p.hq / p.hk)), e))
      const key = turned(line, position, turn)
      return Math.max(
        ...means.get(head)!.map((row) => row.reduce((sum, x, e) => sum + x * key[e]!, 0)),
      )
    }
    const score = (a: number) =>
      Math.max(
        ...classOf(p, h).map((head) => {
          let [l, r] = [a, Math.min(a + stage.chunk, end)]
          if (r - l === 1) return best(head, l, a)
          let most = Number.NEGATIVE_INFINITY
          while (r - l > 1) {
            const m = (l + r) >> 1
            const [left, right] = [best(head, (l + m) >> 1, a), best(head, (m + r) >> 1, a, true)]
            most = Math.max(most, left, right)
            if (left >= right) r = m
            else l = m
          }
          return most
        }),
      )
    chunks = order(chunks, score)
      .slice(0, keep)
      .sort((x, y) => x - y)
  })
  return chunks
}

async function read(
  q: ReturnType<typeof tensor>,
  k: typeof q,
  options: HipOptions,
): Promise<number[][][][]> {
  const { index, count } = hipLists(q as never, k as never, options)
  const [b = 0, heads = 0, rows = 0, width = 0] = index.shape
  const [starts, counts] = [await index.read(), await count.read()]
  return range(b).map((i) =>
    range(heads).map((h) =>
      range(rows).map((u) => {
        const at = (i * heads + h) * rows + u
        const line = Array.from(starts.subarray(at * width, (at + 1) * width))
        expect(line.slice(counts[at]!).every((x) => x === 2 ** 31 - 1)).toBe(true)
        return line.slice(0, counts[at]!)
      }),
    ),
  )
}

/** Small whole numbers, whose products every device and dtype sums exactly. */
const whole = (rng: Random, n: number) => Float32Array.from({ length: n }, () => rng.below(9) - 4)

const line = (values: number[], device: Device) =>
  tensor(values, [1, values.length, 1, 1], { device })

describeDevices('hip', (device) => {
  it('finds the golden lists', async () => {
    const one = line([1], device)
    const mixed = line(
      range(256).map((t) => (37 * t) % 101),
      device,
    )
    const hills = line(
      range(256).map((t) => -Math.min(Math.abs(t - 70), Math.abs(t - 171) + 3)),
      device,
    )
    const shared = { topK: 16, sinkTokens: 4, window: 16 }
    const halved = { ...shared, block: [1, 2], stride: [1, 1] } as const
    const stages = [
      { chunk: 32, stride: 1, block: 1 },
      { chunk: 8, stride: 1, block: 1, topK: 128 },
      { chunk: 4, stride: 1, block: 1, topK: 64 },
    ]
    expect((await read(one, mixed, halved))[0]![0]).toEqual([[32, 38, 62, 68, 92, 226, 232, 234]])
    expect((await read(one, mixed, { ...shared, stages }))[0]![0]).toEqual([[16, 60, 180, 188]])
    expect((await read(one, hills, halved))[0]![0]).toEqual([[64, 66, 68, 70, 72, 74, 170, 172]])
    expect((await read(one, hills, { ...shared, stages }))[0]![0]).toEqual([[64, 68, 72, 168]])
  })

  describe.each(floats)('%s', (dtype) => {
    it('agrees with sorts, whatever the options', async () => {
      const rng = random(300)
      for (let n = 0; n < 24; n++) {
        const hk = rng.pick([1, 2])
        const hq = hk * rng.pick([1, 2, 3, 5])
        const [b, sq, d] = [
          rng.pick([1, 2]),
          rng.pick([1, 5, 64, 100]),
          rng.pick([1, 8, 24, 64, 96]),
        ]
        const sk = sq + rng.pick([0, 33, 400, 901])
        const headMode = rng.pick(['head', 'kv_group', 'all'] as const)
        const window = rng.pick([1, 17, 64])
        // few values, so that many scores are equal
        const q = tensor(whole(rng, b * sq * hq * d), [b, sq, hq, d], { dtype, device })
        const k = tensor(whole(rng, b * sk * hk * d), [b, sk, hk, d], { dtype, device })
        const [rq, rk] = [await q.read({ as: 'float32' }), await k.read({ as: 'float32' })]
        const problem = {
          sq,
          sk,
          hq,
          hk,
          d,
          window,
          headMode,
          q: reader(rq, sq, hq, d),
          k: reader(rk, sk, hk, d),
        }
        const lists = headMode === 'all' ? 1 : headMode === 'kv_group' ? hk : hq
        if (n % 2 === 0) {
          const block = [rng.pick([1, 16, 64]), rng.pick([1, 2, 8, 32])] as const
          const stride = [
            rng.pick([1, 2, 4].filter((s) => block[0] % s === 0)),
            rng.pick([1, 2].filter((s) => block[1] % s === 0)),
          ] as const
          const topK = block[1] * rng.pick([1, 3, 8])
          const sinkTokens = block[1] * rng.pick([0, 1, 2])
          const representative = rng.pick(['center', 'first'] as const)
          const options = { topK, block, stride, window, sinkTokens, headMode, representative }
          const actual = await read(q as never, k as never, options)
          const expected = range(b).map((i) =>
            range(lists).map((h) =>
              range(Math.ceil(sq / block[0])).map((u) =>
                halves(
                  { ...problem, topK, sinkTokens },
                  i,
                  h,
                  u,
                  block,
                  stride,
                  representative === 'first',
                ),
              ),
            ),
          )
          expect(actual, JSON.stringify({ ...options, sq, sk, hq, hk, d })).toEqual(expected)
        } else {
          const bq = rng.pick([1, 4, 16, 64])
          const least = Math.min(bq, 16)
          const chunk = rng.pick([1, 2, 8])
          // means of 1, 2 or 4 whole numbers are exact in every dtype
          const stages = [
            { chunk: chunk * 8, stride: Math.min(rng.pick([2, 4]), bq), block: bq },
            {
              chunk: chunk * 4,
              stride: Math.min(rng.pick([1, 2]), bq),
              block: rng.pick([bq, least]),
              topK: chunk * rng.pick([40, 80]),
            },
            { chunk, stride: 1, block: least, topK: chunk * 32 },
          ].slice(0, rng.pick([1, 2, 3]))
          const bk = stages.at(-1)!.chunk
          const topK = bk * rng.pick([1, 3, 4])
          const sinkTokens = bk * rng.pick([0, 1, 2])
          const options = { topK, window, sinkTokens, headMode, stages }
          const actual = await read(q as never, k as never, options)
          const rows = Math.ceil(sq / stages.at(-1)!.block)
          const means = (x: number) => x
          const expected = range(b).map((i) =>
            range(lists).map((h) =>
              range(rows).map((u) =>
                staged({ ...problem, topK, sinkTokens }, i, h, u, stages, means),
              ),
            ),
          )
          expect(actual, JSON.stringify({ ...options, sq, sk, hq, hk, d })).toEqual(expected)
        }
      }
    })
  })

  it.each(['halves', 'stages'])('is dense where its budget is everything: %s', async (kind) => {
    const rng = random(301)
    const stages = [
      { chunk: 16, stride: 4 },
      { chunk: 4, stride: 1, topK: 512 },
    ]
    for (const dtype of floats) {
      const q = await sample(rng, [1, 200, 4, 32], dtype, device)
      const k = await sample(rng, [1, 330, 2, 32], dtype, device)
      const [x, y] = [q.tensor, k.tensor]
      const dense = attention(x, y, y, { causal: true })
      const options = {
        sinkTokens: 16,
        window: 64,
        topK: 256,
        ...(kind === 'stages' && { stages }),
      }
      const mask = hip(x, y, options)
      expect(await mask.density()).toBe(1)
      const sparse = attention(x, y, y, { mask })
      const [a, b] = [
        await sparse.out.read({ as: 'float32' }),
        await dense.out.read({ as: 'float32' }),
      ]
      expect(maxError(a, b)).toBeLessThan(dtype === 'float32' ? 1e-5 : 4 * epsilon[dtype])
      expect(maxError(await sparse.lse.read(), await dense.lse.read())).toBeLessThan(1e-4)
    }
  })

  it('shows each row its list, its window and the sink tokens', async () => {
    const rng = random(302)
    for (const headMode of ['head', 'kv_group', 'all'] as const) {
      const [sq, sk, window, sinkTokens, bk] = [100, 400, 33, 8, rng.pick([1, 2, 4])]
      const q = await sample(rng, [1, sq, 4, 16], 'float32', device)
      const k = await sample(rng, [1, sk, 2, 16], 'float32', device)
      const options = { topK: 32, block: [16, bk], window, sinkTokens, headMode } as const
      const lists = (await read(q.tensor as never, k.tensor as never, options))[0]!
      const mask = hip(q.tensor, k.tensor, options)
      const actual = await mask.toDense()
      const expected = lists.flatMap((rows) =>
        range(sq).flatMap((i) => {
          const p = sk - sq + i
          const listed = new Set(
            rows[Math.floor(i / 16)]!.flatMap((a) => range(bk).map((j) => a + j)),
          )
          return range(sk).map((t) =>
            Number(t <= p && (t < sinkTokens || t > p - window || listed.has(t))),
          )
        }),
      )
      expect(Array.from(actual)).toEqual(expected)
      // no row sees more than its share
      for (let i = 0; i < expected.length / sk; i++)
        expect(
          expected.slice(i * sk, (i + 1) * sk).reduce((sum, x) => sum + x, 0),
        ).toBeLessThanOrEqual(sinkTokens + window + 32)
    }
  })

  // What is in order is gathered; a union has bits alone
  it.each(floats)('attends its lists as their mask: %s', async (dtype) => {
    const rng = random(304)
    for (let n = 0; n < 24; n++) {
      // Hopper has matrix instructions for long prompts
      const isLong = n % 8 === 7 && device !== 'cpu'
      const hk = isLong ? 2 : rng.pick([1, 2])
      const hq = hk * (isLong ? 4 : rng.pick([1, 3, 4]))
      const [b, d] = [rng.pick([1, 2]), isLong ? 128 : rng.pick([64, 128])]
      const sq = isLong ? rng.pick([2112, 2150]) : rng.pick([1, 5, 63, 64, 130, 257])
      const sk = sq + rng.pick([0, 33, 400, 901])
      const block = [
        isLong ? rng.pick([64, 128]) : rng.pick([1, 8, 64, 128]),
        isLong ? rng.pick([8, 16, 32]) : rng.pick([1, 2, 8, 32]),
      ] as const
      const options = {
        ...{ block, stride: [1, 1] as const, topK: block[1] * rng.pick([1, 3, 12]) },
        ...{ window: rng.pick([1, 17, 100]), sinkTokens: block[1] * rng.pick([0, 1, 2]) },
        headMode: isLong ? 'all' : rng.pick(['head', 'kv_group', 'all'] as const),
      } as const
      const about = JSON.stringify({ ...options, b, sq, sk, hq, hk, d })
      const q = await sample(rng, [b, sq, hq, d], dtype, device)
      const pageSize = rng.pick([2, 16])
      const most = Math.ceil(sk / pageSize)
      const paged = n % 3 === 0 && !isLong
      const shape = paged ? [b * most + 2, pageSize, hk, d] : [b, sk, hk, d]
      const k = await sample(rng, shape, dtype, device)
      const v = await sample(rng, shape, dtype, device)
      const pages = order(range(b * most + 2), () => rng.next()).slice(0, b * most)
      const place = {
        ...(n % 3 !== 2 &&
          !isLong && { cacheSeqlens: range(b).map(() => sk - rng.below(sk - sq + 1)) }),
        ...(paged && { blockTable: tensor(pages, [b, most], { dtype: 'int32', device }) }),
      }
      const mask = hip(q.tensor, k.tensor, { ...options, ...place })
      const call = [q.tensor, k.tensor, v.tensor] as const
      const rest = { ...place, softCap: rng.pick([undefined, 8]) }
      const actual = attention(...call, { ...rest, mask })
      const expected = attention(...call, { ...rest, mask: mask.union(mask) })
      const [x, y] = [
        await actual.out.read({ as: 'float32' }),
        await expected.out.read({ as: 'float32' }),
      ]
      const { variant = '' } = explain(attention, ...call, { ...rest, mask })
      if (device !== 'cpu' && dtype !== 'float32')
        expect(variant, about).toMatch(isLong ? /^sm(90|80)_gather$/ : /^sm80_gather$/)
      expect(maxError(x, y), about).toBeLessThan(4 * epsilon[dtype])
      expect(maxError(await actual.lse.read(), await expected.lse.read()), about).toBeLessThan(1e-4)
    }
  })

  it('keeps rows of blocks and later keys apart', async () => {
    const rng = random(303)
    const options = { topK: 32, block: [16, 2], window: 16, sinkTokens: 8 } as const
    const stages = [
      { chunk: 32, stride: 4, block: 16 },
      { chunk: 4, stride: 1, block: 16, topK: 128 },
    ]
    for (const own of [
      options,
      { topK: 32, window: 16, sinkTokens: 8, stages, headMode: 'head' } as const,
    ]) {
      const [q, k] = [rng.normals(96 * 8), rng.normals(400 * 8)]
      const make = (values: Float32Array) =>
        tensor(values, [1, values.length / 8, 1, 8], { device })
      const before = await read(make(q) as never, make(k) as never, own)
      const out = await attention(make(q), make(k), make(k), {
        mask: hip(make(q), make(k), own),
      }).out.read()
      const [other, later] = [q.slice(), k.slice()]
      for (let i = 32 * 8; i < 48 * 8; i++) other[i] = rng.normal()
      const after = await read(make(other) as never, make(k) as never, own)
      after[0]![0]!.forEach((list, u) => {
        if (u !== 2) expect(list).toEqual(before[0]![0]![u])
      })
      const row = 37
      for (let i = (304 + row + 1) * 8; i < later.length; i++) later[i] = rng.normal()
      const [y] = [make(later)]
      const changed = await attention(make(q), y, y, { mask: hip(make(q), y, own) }).out.read()
      expect(changed.slice(0, (row + 1) * 8)).toEqual(out.slice(0, (row + 1) * 8))
      expect(changed).not.toEqual(out)
    }
  })

  it.each(['own', 'streaming', 'relative', 'infllm', 'self_extend', 'dynamic_extend'] as const)(
    'looks at what turns where it is taken to stand: %s',
    async (positions) => {
      const rng = random(311)
      const compressed = positions === 'self_extend' || positions === 'dynamic_extend'
      // Some keys are more than 8192 away
      const [sq, sk, d, window, context] = [70, compressed ? 8800 : 700, 8, 20, 400]
      const rows = sk + 5
      // Angles of quarters, so that everything stays a whole number
      const quarters = range((rows * d) / 2).map(() => rng.below(4))
      const table = (of: readonly number[]) =>
        tensor(
          quarters.map((i) => of[i]!),
          [rows, d / 2],
          { device },
        )
      const [cosines, sines] = [
        [1, 0, -1, 0],
        [0, 1, 0, -1],
      ] as const
      const where = {
        own: { query: (p: number) => p, key: (t: number) => t },
        streaming: {
          query: (p: number, chunks: number) => Math.min(p, chunks + window),
          key: (_: number, chunk: number) => chunk,
        },
        relative: {
          query: () => window + 1,
          key: (_: number, __: number, right: boolean) => Number(right),
        },
        infllm: { query: () => window, key: () => 0 },
        self_extend: {
          query: (p: number) => p,
          key: (t: number, _: number, __: boolean, first: number, last: number) =>
            t >= last - 8192 ? t : Math.max(Math.floor((t - first) / 16) + first, 0),
        },
        dynamic_extend: {
          query: (p: number) => p,
          key: (t: number, _: number, __: boolean, ___: number, last: number) => {
            const far = last - t - context / 4
            const scaled = (far * (context - context / 4)) / (last - context / 4)
            return far <= 0 ? t : last - context / 4 - Math.floor(scaled)
          },
        },
      }[positions]
      const turn: Turn = {
        ...where,
        angle: (position, channel) => {
          const quarter = quarters[(position * d) / 2 + channel]!
          return [cosines[quarter]!, sines[quarter]!]
        },
      }
      const stages = [
        { chunk: 32, stride: 4 },
        { chunk: 4, stride: 1, topK: 128 },
      ]
      const shared = { topK: 32, window, sinkTokens: 4, headMode: 'kv_group' } as const
      const [values, keys] = [whole(rng, sq * 4 * d), whole(rng, sk * 2 * d)]
      const problem = {
        ...{ ...shared, sq, sk, hq: 4, hk: 2, d },
        ...{ q: reader(values, sq, 4, d), k: reader(keys, sk, 2, d) },
      }
      for (const dtype of floats) {
        const rope = { cos: table(cosines), sin: table(sines), positions, context }
        const q = tensor(values, [1, sq, 4, d], { dtype, device }) as never
        const k = tensor(keys, [1, sk, 2, d], { dtype, device }) as never
        const actual = await read(q, k, { ...shared, stages, rope })
        const of = (own?: Turn) =>
          range(2).map((h) => range(2).map((u) => staged(problem, 0, h, u, stages, (x) => x, own)))
        expect(actual[0]).toEqual(of(turn))
        expect(actual[0]).not.toEqual(of())
      }
    },
  )

  it('shares lists as its heads are asked to', async () => {
    const rng = random(304)
    const q = whole(rng, 40 * 4 * 8)
    const k = whole(rng, 300 * 2 * 8)
    const stages = [
      { chunk: 16, stride: 1, block: 16 },
      { chunk: 4, stride: 1, block: 16, topK: 64 },
    ]
    const base = { topK: 16, window: 16, sinkTokens: 4 }
    const repeated = Float32Array.from(
      { length: 300 * 4 * 8 },
      (_, i) => k[Math.floor(i / 32) * 16 + (i % 32 >= 16 ? 8 : 0) + (i % 8)]!,
    )
    const x = tensor(q, [1, 40, 4, 8], { device }) as never
    const y = tensor(k, [1, 300, 2, 8], { device }) as never
    const z = tensor(repeated, [1, 300, 4, 8], { device }) as never
    for (const own of [{ ...base, block: [16, 4] } as const, { ...base, stages }]) {
      const heads = await read(x, y, { ...own, headMode: 'head' })
      expect(await read(x, z, { ...own, headMode: 'head' })).toEqual(heads)
      expect(await read(x, z, { ...own, headMode: 'all' })).toEqual(
        await read(x, y, { ...own, headMode: 'all' }),
      )
      const [group, all] = [
        await read(x, y, { ...own, headMode: 'kv_group' }),
        await read(x, y, { ...own, headMode: 'all' }),
      ]
      expect([heads[0]!.length, group[0]!.length, all[0]!.length]).toEqual([4, 2, 1])
    }
  })

  it('reads pages as it reads keys', async () => {
    const rng = random(305)
    const [sq, hk, d] = [20, 2, 16]
    for (const page of [1, 2, 4, 8, 16, 32]) {
      const used = [130, 96]
      const pages = Math.ceil(Math.max(...used) / page)
      const pool = rng.normals((2 * pages + 3) * page * hk * d)
      const order = range(2 * pages + 3)
        .map((i) => [rng.next(), i] as const)
        .sort((a, b) => a[0] - b[0])
        .map(([, i]) => i)
      const table = range(2 * pages).map((i) => order[i]!)
      const q = tensor(rng.normals(2 * sq * 4 * d), [2, sq, 4, d], { device }) as never
      const k = tensor(pool, [2 * pages + 3, page, hk, d], { device }) as never
      const blockTable = tensor(table, [2, pages], { dtype: 'int32', device })
      for (const own of [
        { block: [16, 2] } as const,
        {
          stages: [
            { chunk: 8, stride: 2 },
            { chunk: 2, stride: 1, topK: 48 },
          ],
        },
      ]) {
        const options = { ...own, topK: 16, window: 9, sinkTokens: 2 }
        const paged = await read(q, k, { ...options, blockTable, cacheSeqlens: used })
        for (const b of [0, 1]) {
          const flat = range(used[b]!).flatMap((t) => {
            const at = (table[b * pages + Math.floor(t / page)]! * page + (t % page)) * hk * d
            return Array.from(pool.subarray(at, at + hk * d))
          })
          const keys = tensor(flat, [1, used[b]!, hk, d], { device }) as never
          expect(paged[b]).toEqual(
            (
              await read(
                (q as ReturnType<typeof tensor>).slice(0, b, b + 1) as never,
                keys,
                options,
              )
            )[0],
          )
        }
      }
    }
  })

  it('counts the keys that a cache has, not those that it could hold', async () => {
    const rng = random(313)
    const [b, sq, sk, page] = [2, 3, 300, 32]
    const q = (await sample(rng, [b, sq, 2, 16], 'float32', device)).tensor
    const pages = Math.ceil(sk / page)
    const k = (await sample(rng, [b * pages, page, 2, 16], 'float32', device)).tensor
    const table = range(b * pages).reverse()
    const blockTable = tensor(table, [b, pages], { dtype: 'int32', device })
    const lengths = [257, 40]
    const options = { topK: 16, block: [4, 2], window: 8, sinkTokens: 4 } as const
    const own = tensor(lengths, [b], { dtype: 'int32', device })
    const mask = hip(q, k, { ...options, blockTable, cacheSeqlens: own })
    // what the caller does with them afterwards is no matter of the mask
    own.write([3, 3])
    const seen = await mask.toDense()
    const causal = lengths.reduce((sum, n) => sum + sq * n - (sq * (sq - 1)) / 2, 0)
    const count = seen.reduce((sum, x) => sum + x, 0)
    expect(await mask.count()).toBe(count)
    expect(await mask.density()).toBeCloseTo(count / causal / mask.heads, 12)
    for (const [i, length] of lengths.entries())
      for (let row = 0; row < sq; row++) {
        const at = (i * mask.heads * sq + row) * mask.sk
        const line = [...seen.subarray(at, at + mask.sk)]
        const last = length - sq + row
        expect(line.lastIndexOf(1)).toBe(last)
        expect(line.slice(last - 7, last + 1)).toEqual(new Array(8).fill(1))
      }
    const doubled = mask.union(mask)
    expect(await doubled.count()).toBe(count)
  })

  it('attends pages as it attends keys, bit by bit', async () => {
    const rng = random(312)
    const [sq, sk, hk, d] = [20, 130, 2, 64]
    const make = async (...shape: number[]) =>
      (await sample(rng, shape, 'bfloat16', device, { strided: false })).tensor
    const [q, k, v] = [
      await make(1, sq, 4, d),
      await make(1, sk, hk, d),
      await make(1, sk, hk, d),
    ] as const
    const options = { block: [16, 8], topK: 32, window: 24, sinkTokens: 8 } as const
    const flat = attention(q, k, v, { mask: hip(q, k, options) })
    const read = async ({ out, lse }: typeof flat) => [await out.read(), await lse.read()]
    for (const page of [1, 2, 4, 8, 16, 32]) {
      const pages = Math.ceil(sk / page)
      const table = order(range(pages + 3), () => rng.next()).slice(0, pages)
      const inPages = async (x: typeof k) => {
        const pool = await make(pages + 3, page, hk, d)
        table.forEach((to, i) => {
          const keys = x.slice(1, i * page, Math.min((i + 1) * page, sk))
          pool
            .slice(0, to, to + 1)
            .slice(1, 0, keys.shape[1])
            .copyFrom(keys)
        })
        return pool
      }
      const blockTable = tensor(table, [1, pages], { dtype: 'int32', device })
      const place = { blockTable, cacheSeqlens: [sk] }
      const [y, z] = [await inPages(k), await inPages(v)]
      const mask = hip(q, y, { ...options, ...place })
      expect(await read(attention(q, y, z, { mask, ...place }))).toEqual(await read(flat))
    }
  })

  it('takes a prompt in chunks and packed sequences as it takes them alone', async () => {
    const rng = random(306)
    const q = await sample(rng, [1, 256, 2, 16], 'float32', device)
    const k = await sample(rng, [1, 256, 2, 16], 'float32', device)
    const stages = [
      { chunk: 32, stride: 4, block: 32 },
      { chunk: 4, stride: 1, block: 32, topK: 64 },
    ]
    for (const own of [{ block: [32, 2] } as const, { stages }]) {
      const options = { ...own, topK: 16, window: 32, sinkTokens: 4 }
      const all = (await read(q.tensor as never, k.tensor as never, options))[0]!
      const part = (
        await read(q.tensor.slice(1, 96, 192) as never, k.tensor.slice(1, 0, 192) as never, options)
      )[0]!
      expect(part).toEqual(all.map((rows) => rows.slice(3, 6)))
      const starts = [0, 40, 40, 171, 256]
      const packed = hip(q.tensor, k.tensor, { ...options, cuSeqlensQ: starts, cuSeqlensK: starts })
      const { out } = attention(q.tensor, k.tensor, k.tensor, { mask: packed })
      for (let i = 0; i < 4; i++) {
        const [from, to] = [starts[i]!, starts[i + 1]!]
        if (from === to) continue
        const [x, y] = [q.tensor.slice(1, from, to), k.tensor.slice(1, from, to)]
        const alone = await attention(x, y, y, { mask: hip(x, y, options) }).out.read()
        expect(maxError(await out.slice(1, from, to).read(), alone)).toBeLessThan(1e-5)
      }
    }
  })

  it('lists packed sequences in one search, in the rows that masks have for them', async () => {
    const rng = random(312)
    const [ofQ, ofK] = [
      [0, 45, 45, 130, 131],
      [0, 200, 203, 300, 340],
    ]
    const q = (await sample(rng, [1, 131, 4, 16], 'bfloat16', device)).tensor
    const k = (await sample(rng, [1, 340, 2, 16], 'bfloat16', device)).tensor
    const table = (seed: number) => randn([256, 8], { seed, device })
    const rope = { cos: table(1), sin: table(2), positions: 'streaming' as const }
    const stages = [
      { chunk: 32, stride: 4, block: 32 },
      { chunk: 4, stride: 1, block: 16, topK: 64 },
    ]
    for (const own of [{ block: [16, 2] } as const, { stages }, { stages, rope }]) {
      const options = { ...own, topK: 16, window: 9, sinkTokens: 4 }
      const { index, count } = hipLists(q, k, { ...options, cuSeqlensQ: ofQ, cuSeqlensK: ofK })
      const [, heads, rows, width] = index.shape as [number, number, number, number]
      expect(rows).toBe(Math.floor(131 / 16) + 4)
      const counts = await count.read()
      const used = new Set<number>()
      for (let i = 0; i < 4; i++) {
        const [from, to] = [ofQ[i]!, ofQ[i + 1]!]
        if (from === to) continue
        const alone = hipLists(q.slice(1, from, to), k.slice(1, ofK[i]!, ofK[i + 1]!), options)
        const [first, n] = [Math.floor(from / 16) + i, alone.count.shape[2]!]
        for (let row = first; row < first + n; row++) used.add(row)
        expect(await index.slice(2, first, first + n).read()).toEqual(await alone.index.read())
        expect(await count.slice(2, first, first + n).read()).toEqual(await alone.count.read())
      }
      for (let at = 0; at < heads * rows; at++) if (!used.has(at % rows)) expect(counts[at]).toBe(0)
      expect(width).toBe(16 / (own.block?.[1] ?? 4))
    }
    const short = { ...rope, cos: rope.cos.slice(0, 0, 150), sin: rope.sin.slice(0, 0, 150) }
    expect(() =>
      hipLists(q, k, {
        stages,
        rope: short,
        topK: 16,
        sinkTokens: 4,
        cuSeqlensQ: ofQ,
        cuSeqlensK: ofK,
      }),
    ).toThrow('hipLists: rope.cos must have a row for each of 200 keys, got 150')
  })

  it('finds planted keys in a landscape, and a lone spike only by chance', async () => {
    const rng = random(307)
    const [trials, T] = [400, 4096]
    const q = tensor(new Float32Array(trials).fill(1), [trials, 1, 1, 1], { device }) as never
    const base = { window: 16, sinkTokens: 16 }
    const misses = async (own: HipOptions, bk: number, m: number) => {
      const targets = range(trials).map(() => range(m).map(() => 16 + rng.below(T - 32)))
      const k = Float32Array.from(
        { length: trials * T },
        (_, i) => -Math.min(...targets[Math.floor(i / T)]!.map((t) => Math.abs((i % T) - t))),
      )
      const lists = await read(q, tensor(k, [trials, T, 1, 1], { device }) as never, {
        ...base,
        ...own,
      })
      return (
        targets.reduce(
          (sum, of, b) =>
            sum + of.filter((t) => !lists[b]![0]![0]!.some((a) => t >= a && t < a + bk)).length,
          0,
        ) /
        (trials * m)
      )
    }
    for (const [C, m] of [
      [2, 1],
      [4, 1],
      [8, 2],
      [12, 3],
      [16, 4],
      [32, 8],
      [64, 16],
    ] as const)
      expect(await misses({ topK: 2 * C, block: [1, 2] }, 2, m), `${C} for ${m}`).toBe(0)
    // One interval alone misses a quarter of all targets: bounds are six deviations of 400 trials
    const lost = await misses({ topK: 2, block: [1, 2] }, 2, 1)
    expect(Math.abs(lost - 0.25), `${lost}`).toBeLessThan(0.13)
    const scan = (m: number) => [
      { chunk: 128, stride: 1, block: 1 },
      { chunk: 32, stride: 1, block: 1, topK: 512 * m },
      { chunk: 8, stride: 1, block: 1, topK: 128 * m },
    ]
    for (const m of [1, 4]) expect(await misses({ topK: 32 * m, stages: scan(m) }, 8, m)).toBe(0)

    const spikes = range(trials).map(() => 16 + rng.below(T - 32))
    const spiky = Float32Array.from({ length: trials * T }, (_, i) =>
      i % T === spikes[Math.floor(i / T)] ? 1 : 0,
    )
    const lists = await read(q, tensor(spiky, [trials, T, 1, 1], { device }) as never, {
      ...base,
      topK: 256,
      block: [1, 2],
    })
    // Of all spikes 0.188 stand where the search happens to look at last, again with six deviations
    const found =
      spikes.filter((t, b) => lists[b]![0]![0]!.some((a) => t === a || t === a + 1)).length / trials
    expect(Math.abs(found - 0.188), `${found}`).toBeLessThan(0.118)
  })

  it('keeps as much of the attention mass as the search is known to', async () => {
    const rng = random(308)
    const [seeds, T, d] = [32, 8192, 64]
    const noise = rng.normals(T * seeds * d)
    const q = rng.normals(seeds * d, 3)
    const stages = [
      { chunk: 256, stride: 1, block: 1 },
      { chunk: 32, stride: 1, block: 1, topK: 4096 },
      { chunk: 8, stride: 1, block: 1, topK: 2048 },
    ]
    const searches = [
      {
        options: { sinkTokens: 16, window: 256, block: [1, 2] } as const,
        bk: 2,
        expected: [0.24, 0.43, 0.86, 0.86],
      },
      {
        options: { sinkTokens: 256, window: 512, stages, headMode: 'head' } as const,
        bk: 8,
        expected: [0.2, 0.34, 0.64, 0.83],
      },
    ]
    for (const [n, rho] of [0, 0.5, 0.9, 0.98].entries()) {
      const k = noise.slice()
      const rest = Math.sqrt(1 - rho * rho)
      for (let i = seeds * d; i < k.length; i++) k[i] = rho * k[i - seeds * d]! + rest * k[i]!
      const x = tensor(q, [1, 1, seeds, d], { device }) as never
      const y = tensor(k, [1, T, seeds, d], { device }) as never
      for (const { options, bk, expected } of searches) {
        const lists = (await read(x, y, { ...options, topK: 512 }))[0]!
        const shares = range(seeds).map((h) => {
          const weight = new Float64Array(T - options.window)
          for (let t = options.sinkTokens; t < weight.length; t++) {
            let sum = 0
            for (let e = 0; e < d; e++) sum += q[h * d + e]! * k[(t * seeds + h) * d + e]!
            weight[t] = Math.exp(sum / 8)
          }
          const kept = lists[h]![0]!.reduce(
            (sum, a) => sum + range(bk).reduce((s, j) => s + (weight[a + j] ?? 0), 0),
            0,
          )
          return kept / weight.reduce((sum, w) => sum + w, 0)
        })
        // What is expected is the mean of 24: six deviations of the difference, seldom below 0.06
        const mean = shares.reduce((sum, share) => sum + share, 0) / seeds
        const variance = shares.reduce((sum, share) => sum + (share - mean) ** 2, 0) / (seeds - 1)
        const bound = 6 * Math.sqrt(variance * (1 / seeds + 1 / 24))
        expect(Math.abs(mean - expected[n]!), `${bk} at ${rho}: ${mean}`).toBeLessThan(bound)
      }
    }
  })

  it('knows only the order of scores', async () => {
    const rng = random(309)
    const [q, k] = [whole(rng, 60 * 8), whole(rng, 500 * 8)]
    const make = (values: Float32Array) =>
      tensor(values, [1, values.length / 8, 1, 8], { device }) as never
    const stages = [
      { chunk: 32, stride: 1, block: 1 },
      { chunk: 4, stride: 1, block: 1, topK: 128 },
    ]
    const base = { topK: 32, window: 16, sinkTokens: 4 }
    for (const own of [{ ...base, block: [1, 2] } as const, { ...base, stages }]) {
      const lists = await read(make(q), make(k), own)
      expect(await read(make(q.map((x) => 4 * x)), make(k), own)).toEqual(lists)
      expect(await read(make(q), make(k.map((x, i) => x + (i % 8))), own)).toEqual(lists)
    }
    // one stage of single keys is the exact choice
    const exact = { ...base, stages: [{ chunk: 1, stride: 1, block: 1 }] }
    const lists = (await read(make(q), make(k), exact))[0]![0]!
    lists.forEach((list, i) => {
      const scores = range(440 + i + 1 - 16 - 4).map((t) =>
        range(8).reduce((sum, e) => sum + q[i * 8 + e]! * k[(t + 4) * 8 + e]!, 0),
      )
      const best = order(range(scores.length), (t) => scores[t]!)
        .slice(0, 32)
        .map((t) => t + 4)
      expect(list).toEqual(best.sort((a, b) => a - b))
    })
  })

  it('ranks what is no number last, and lists as many all the same', async () => {
    const values = Float32Array.from({ length: 300 }, (_, t) =>
      t % 3 ? Number.NaN : t === 150 ? 1 : -1,
    )
    const one = line([1], device) as never
    const k = tensor(values, [1, 300, 1, 1], { device }) as never
    const exact = {
      topK: 60,
      window: 16,
      sinkTokens: 4,
      stages: [{ chunk: 1, stride: 1, block: 1 }],
    }
    const [list] = (await read(one, k, exact))[0]![0]!
    expect(list!.length).toBe(60)
    expect(list).toContain(150)
    expect(list!.every((t) => t % 3 === 0)).toBe(true)
    const nothing = tensor(new Float32Array(300).fill(Number.NaN), [1, 300, 1, 1], {
      device,
    }) as never
    const halved = await read(one, nothing, { topK: 16, window: 16, sinkTokens: 4, block: [1, 2] })
    expect(halved[0]![0]![0]!.length).toBe(8)
  })

  it('refuses what it cannot search', async () => {
    const make = (...shape: number[]) =>
      tensor(new Float32Array(shape.reduce((n, x) => n * x, 1)), shape, { device })
    const [q, k] = [make(1, 8, 4, 8), make(1, 300, 2, 8)]
    const stages = [
      { chunk: 32, stride: 4 },
      { chunk: 8, stride: 1, topK: 64 },
    ]
    const cases: readonly (readonly [HipOptions, string])[] = [
      [{ topK: 3 }, 'hip: topK must be a positive multiple of the block of keys, 2, got 3'],
      [{ topK: 0 }, 'hip: topK must be a positive multiple of the block of keys, 2, got 0'],
      [{ block: [48, 2] }, 'hip: block[0] must be a power of two up to 128, got 48'],
      [{ block: [64, 128] }, 'hip: block[1] must be a power of two up to 64, got 128'],
      [{ stride: [3, 1] }, 'hip: stride[0] must be a divisor of the block of 64, got 3'],
      [{ window: 0 }, 'hip: window must be an integer at least 1, got 0'],
      [{ sinkTokens: 3 }, 'hip: sinkTokens must be 0 or a multiple of the block of keys, 2, got 3'],
      [{ headMode: 'kv' as never }, 'hip: headMode must be "head", "kv_group" or "all", got "kv"'],
      [
        { representative: 'last' as never },
        'hip: representative must be "center" or "first", got "last"',
      ],
      [{ stages, stride: [1, 1] }, 'hip: stride cannot be combined with stages'],
      [{ stages: [] }, 'hip: stages must be a list of stages, got an array of 0'],
      [
        { stages: [{ chunk: 32, stride: 4, topK: 64 }] },
        'hip: stages[0].topK must be left out in the first stage, which looks at all keys, got 64',
      ],
      [
        { stages: [stages[0]!, { ...stages[1]!, topK: 40 }] },
        'hip: stages[1].topK must be a positive multiple of the chunk before, 32, got 40',
      ],
      [
        { stages: [stages[0]!, { ...stages[1]!, chunk: 64 }] },
        'hip: stages[1].chunk must be at most that of the stage before, 32, got 64',
      ],
      [{ stages, topK: 128 }, 'hip: topK must be at most what enters the last stage, 64, got 128'],
      [
        { stages: [{ ...stages[0]!, strid: 1 } as never] },
        'hip: unknown option "strid"; did you mean "stride"?',
      ],
      [
        { cuSeqlensQ: [0, 2, 8], cuSeqlensK: [0, 300] },
        'hip: cuSeqlensK must be [3] as cuSeqlensQ, got [2]',
      ],
      [
        { cuSeqlensQ: [0, 8], cuSeqlensK: [0, 300], cacheSeqlens: [300] },
        'hip: cuSeqlensQ cannot be combined with cacheSeqlens',
      ],
      [
        { cuSeqlensQ: [0, 8], cuSeqlensK: [0, 300], blockTable: q as never },
        'hip: cuSeqlensQ cannot be combined with blockTable',
      ],
      [{ topk: 1 } as never, 'hip: unknown option "topk"; did you mean "topK"?'],
    ]
    for (const [options, message] of cases)
      expect((await failure(() => hip(q, k, options))).message).toBe(message)
    expect((await failure(() => hip(k as never, make(1, 8, 2, 8) as never))).message).toBe(
      'hip: sq must be at most sk, got 300 and 8',
    )
    const flat = await failure(() =>
      hip(q.reshape([1, 256]), k, { cuSeqlensQ: [0, 256], cuSeqlensK: [0, 300] }),
    )
    expect(flat.message).toBe('hip: q must be [b, s, h, d], got [1, 256]')
    const table = { blockTable: tensor([9], [1, 1], { dtype: 'int32', device }), cacheSeqlens: [8] }
    const paged = await failure(() =>
      hipLists(q, make(2, 16, 2, 8), {
        ...table,
        topK: 2,
        window: 1,
        sinkTokens: 0,
        block: [1, 2],
      }).index.read(),
    )
    expect(paged.message).toContain('blockTable must name')
    const short = { blockTable: tensor([0], [1, 1], { dtype: 'int32', device }), cacheSeqlens: [7] }
    expect(
      (await failure(() => hipLists(q, make(2, 16, 2, 8), short).index.read())).message,
    ).toContain('cacheSeqlens must be from sq')
    // nothing that a search writes can be read when it failed
    const [index, count, pages, length, blocks] = [[20], [], [24], [], [1]].map((shape) =>
      empty([1, 2, 1, ...shape], { dtype: 'int32', device }),
    ) as [Tensor, Tensor, Tensor, Tensor, Tensor]
    const cacheSeqlens = tensor([0], [1], { dtype: 'int32', device })
    run('hip', {
      ...{ q: make(1, 1, 2, 8), k: make(1, 16, 2, 8), cacheSeqlens },
      ...{ index, count, table: pages, length, blocks, sinkTokens: 8 },
    })
    for (const written of [index, count, pages, length, blocks])
      expect((await failure(() => written.read())).message).toContain(
        'cacheSeqlens must be from sq',
      )
  })
})
