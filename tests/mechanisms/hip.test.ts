import { join } from 'node:path'
import {
  attention,
  attentionBackward,
  empty,
  type HipDecoderOptions,
  type HipOptions,
  hip,
  hipAttention,
  hipDecoder,
  hipLists,
  hipStages,
  infiniteHip,
  Mask,
  memory,
  merge,
  openSafetensors,
  scope,
  synchronize,
  type Tensor,
  tensor,
} from 'heddle'
import { expect, it } from 'vitest'
import {
  type Attend,
  disposeCache,
  forward,
  load,
  newCache,
} from '../../examples/byte-lm/decoder.js'
import { expectGradients, maxError } from '../support/compare.js'
import { describeDevices, epsilon } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { explained, failing, injected } from '../support/faults.js'
import { random, sample } from '../support/random.js'
import { attentionGradients, reader } from '../support/reference.js'

type Half = Tensor<'bfloat16'>

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

describeDevices('hip mechanisms', (device) => {
  it('leave the layers and rows dense that are to be', async () => {
    const rng = random(320)
    const [q, k, v] = [
      await sample(rng, [1, 200, 4, 32], 'float32', device),
      await sample(rng, [1, 300, 2, 32], 'float32', device),
      await sample(rng, [1, 300, 2, 16], 'float32', device),
    ].map(({ tensor }) => tensor) as [Tensor<'float32'>, Tensor<'float32'>, Tensor<'float32'>]
    const small = { topK: 16, block: [16, 2], window: 16, sinkTokens: 4, softCap: 8 } as const
    const { softCap, ...searched } = small
    const dense = attention(q, k, v, { causal: true, softCap })
    const sparse = attention(q, k, v, { mask: hip(q, k, searched), softCap })
    const [all, few] = [await dense.out.read(), await sparse.out.read()]
    expect(maxError(all, few)).toBeGreaterThan(1e-2)
    const of = async (options: Parameters<typeof hipAttention>[3]) =>
      await hipAttention(q, k, v, options).out.read()
    expect(await of(small)).toEqual(few)
    const layers = { 0: 'dense', 3: { ...searched, topK: 400 } } as const
    expect(await of({ ...small, layers })).toEqual(all)
    expect(await of({ ...small, layers, layer: 1 })).toEqual(few)
    expect(maxError(await of({ ...small, layers, layer: 3 }), all)).toBeLessThan(1e-5)
    expect(await of({ ...small, denseThreshold: 300 })).toEqual(all)
    expect(await of({ ...small, denseTailRows: 101 })).toEqual(few)
    // 160 rows are whole blocks of 16
    const tail = hipAttention(q, k, v, { ...small, denseTailRows: 40 })
    const [out, lse] = [await tail.out.read(), await tail.lse.read()]
    const cut = 160 * 4 * 16
    expect(maxError(out.slice(0, cut), few.slice(0, cut))).toBeLessThan(1e-5)
    expect(maxError(out.slice(cut), all.slice(cut))).toBeLessThan(1e-5)
    const [a, b] = [await dense.lse.read(), await sparse.lse.read()]
    expect(
      maxError(
        lse,
        a.map((x, i) => (i % 200 < 160 ? b[i]! : x)),
      ),
    ).toBeLessThan(1e-5)
  })

  it('leave the last rows dense of sequences that are packed or stand in pages', async () => {
    const rng = random(331)
    const make = (...shape: number[]) =>
      tensor(rng.normals(shape.reduce((a, b) => a * b)), shape, { device })
    const options = {
      stages: [
        { chunk: 32, stride: 4, block: 16 },
        { chunk: 8, stride: 1, block: 16, topK: 64 },
      ],
      ...{ topK: 16, window: 16, sinkTokens: 8, denseTailRows: 20 },
    } as const
    const read = async ({ out, lse }: ReturnType<typeof hipAttention<'float32'>>) => [
      await out.read(),
      await lse.read(),
    ]
    const [q, k, v] = [make(2, 77, 4, 16), make(2, 200, 2, 16), make(2, 200, 2, 16)] as const
    const whole = await read(hipAttention(q, k, v, options))
    // pages of 8 keys in another order
    const order = range(25).map((i) => (i * 7) % 25)
    const paged = (x: Tensor<'float32'>) => {
      const pages = tensor(new Float32Array(x.size), [50, 8, 2, 16], { device })
      const own = x.reshape([50, 8, 2, 16])
      for (const b of [0, 1])
        order.forEach((to, i) => {
          pages
            .slice(0, b * 25 + to, b * 25 + to + 1)
            .copyFrom(own.slice(0, b * 25 + i, b * 25 + i + 1))
        })
      return pages
    }
    const table = [0, 1].flatMap((b) => order.map((to) => b * 25 + to))
    const blockTable = tensor(Int32Array.from(table), [2, 25], { device })
    const place = { blockTable, cacheSeqlens: [200, 200] }
    const inPages = await read(hipAttention(q, paged(k), paged(v), { ...options, ...place }))
    for (const i of [0, 1]) expect(maxError(inPages[i]!, whole[i]!)).toBeLessThan(1e-5)
    // one after the other, the second too short for a tail
    const cut = (x: Tensor<'float32'>, b: number, n: number) => x.slice(0, b, b + 1).slice(1, 0, n)
    const pack = (x: Tensor<'float32'>, first: number, second: number) => {
      const all = tensor(
        new Float32Array((first + second) * x.shape[2]! * 16),
        [...[1, first + second, x.shape[2]!, 16]],
        { device },
      )
      all.slice(1, 0, first).copyFrom(cut(x, 0, first))
      all.slice(1, first).copyFrom(cut(x, 1, second))
      return all
    }
    const packed = await read(
      hipAttention(pack(q, 77, 39), pack(k, 200, 190), pack(v, 200, 190), {
        ...{ ...options, cuSeqlensQ: [0, 77, 116], cuSeqlensK: [0, 200, 390] },
      }),
    )
    const short = [cut(q, 1, 39), cut(k, 1, 190), cut(v, 1, 190)] as const
    const alone = [
      await read(hipAttention(cut(q, 0, 77), cut(k, 0, 200), cut(v, 0, 200), options)),
      await read(hipAttention(...short, { ...options, denseTailRows: 0 })),
    ]
    const [first, second] = [packed[0]!.slice(0, 77 * 64), packed[0]!.slice(77 * 64)]
    expect(maxError(first, alone[0]![0]!)).toBeLessThan(1e-5)
    expect(maxError(second, alone[1]![0]!)).toBeLessThan(1e-5)
    for (const head of range(4)) {
      const row = packed[1]!.slice(head * 116, (head + 1) * 116)
      expect(
        maxError(row.slice(0, 77), alone[0]![1]!.slice(head * 77, (head + 1) * 77)),
      ).toBeLessThan(1e-5)
      expect(maxError(row.slice(77), alone[1]![1]!.slice(head * 39, (head + 1) * 39))).toBeLessThan(
        1e-5,
      )
    }
    // the tail is seen: rows of it are dense
    const dense = await attention(q, k, v, { causal: true }).out.read()
    expect(maxError(whole[0]!.slice(57 * 64, 77 * 64), dense.slice(57 * 64, 77 * 64))).toBeLessThan(
      1e-5,
    )
    expect(
      maxError(whole[0]!.slice(37 * 64, 57 * 64), dense.slice(37 * 64, 57 * 64)),
    ).toBeGreaterThan(1e-2)
  })

  it('have gradients through what was found', async () => {
    const rng = random(327)
    const c = {
      ...{ b: 2, sq: 90, sk: 250, hq: 4, hk: 2, d: 32, dv: 16, scale: 1 / Math.sqrt(32) },
      ...{ causal: true, window: undefined, softCap: 0, slopes: undefined, sink: undefined },
    }
    const q = await sample(rng, [c.b, c.sq, c.hq, c.d], 'float32', device)
    const k = await sample(rng, [c.b, c.sk, c.hk, c.d], 'float32', device)
    const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], 'float32', device)
    const dout = await sample(rng, [c.b, c.sq, c.hq, c.dv], 'float32', device)
    for (const block of [[16, 2] as const, [64, 8] as const]) {
      const mask = hip(q.tensor, k.tensor, { topK: 32, block, window: 16, sinkTokens: 8 })
      const seen = await mask.toDense()
      const each = c.hq / mask.heads
      const sees = (b: number, head: number, i: number, t: number) =>
        seen[((b * mask.heads + Math.floor(head / each)) * c.sq + i) * c.sk + t] === 1
      const reference = attentionGradients(
        { ...c, sees },
        reader(q.values, c.sq, c.hq, c.d),
        reader(k.values, c.sk, c.hk, c.d),
        reader(v.values, c.sk, c.hk, c.dv),
        reader(dout.values, c.sq, c.hq, c.dv),
        'float32',
      )
      const given = [q.tensor, k.tensor, v.tensor] as const
      const { out, lse } = attention(...given, { mask })
      const result = attentionBackward(...given, out, lse, dout.tensor, { mask })
      await expectGradients(result, reference, c, 'float32', `${block}`)
    }
  })

  it('decode as a search of every token, and lose nothing in between', async () => {
    const rng = random(321)
    const [T, d] = [420, 16]
    const k = await sample(rng, [1, T, 2, d], 'float32', device, { strided: false })
    const v = await sample(rng, [1, T, 2, d], 'float32', device, { strided: false })
    const q = await sample(rng, [1, T, 4, d], 'float32', device, { strided: false })
    const at = (x: Tensor, to: number, n = to) => x.slice(1, to - n, to) as Tensor<'float32'>
    const base = { topK: 32, window: 16, sinkTokens: 8 }
    const stages = [
      { chunk: 32, stride: 4 },
      { chunk: 4, stride: 1, topK: 128 },
    ]
    for (const own of [{ ...base, block: [64, 2] } as const, { ...base, stages }]) {
      const single =
        'stages' in own
          ? { ...own, stages: stages.map((stage) => ({ ...stage, block: 1, stride: 1 })) }
          : ({ ...own, block: [1, 2], stride: [1, 1] } as const)
      const parts = 'stages' in own ? 2 : 1
      using always = hipDecoder({ ...own, refresh: parts === 2 ? [1, 1] : 1 })
      using lazy = hipDecoder({ ...own, refresh: parts === 2 ? [6, 3] : 3 })
      using losing = hipDecoder({
        ...own,
        refresh: parts === 2 ? [6, 3] : 3,
        freezeWindowStart: false,
      })
      let kept = hipLists(at(q.tensor, 380, 1), at(k.tensor, 380), single)
      let listedAt = 0
      for (let n = 0; n < 14; n++) {
        const sk = 380 + n
        const [x, y, z] = [at(q.tensor, sk, 1), at(k.tensor, sk), at(v.tensor, sk)]
        const exact = attention(x, y, z, { mask: hip(x, y, single) })
        const out = await always.attend(x, y, z).out.read()
        expect(maxError(out, await exact.out.read())).toBeLessThan(1e-5)
        expect(always.tokens).toBe(n + 1)
        if (parts === 1 && n % 3 === 0) {
          kept = hipLists(x, y, single)
          listedAt = sk
        }
        for (const [decoder, frozen] of [
          [lazy, true],
          [losing, false],
        ] as const) {
          const { out, lse } = decoder.attend(x, y, z)
          if (parts === 2) continue
          // each head attends what it listed, the sink tokens and its window
          const [starts, all] = [await kept.index.read(), await kept.count.read()]
          for (const head of range(4)) {
            const seen = new Set(range(8))
            for (let t = (frozen ? listedAt : sk) - 16; t < sk; t++) seen.add(t)
            for (let i = 0; i < all[head]!; i++)
              for (const j of [0, 1])
                if (starts[head * 16 + i]! + j < sk) seen.add(starts[head * 16 + i]! + j)
            expect(seen.size).toBeLessThanOrEqual(8 + 16 + (frozen ? 2 : 0) + 32)
            const list = [...seen].sort((a, b) => a - b)
            const pick = async (from: Tensor, h: number) => {
              const values = await from.read({ as: 'float32' })
              return tensor(
                list.flatMap((t) =>
                  Array.from(values.subarray((t * 2 + h) * d, (t * 2 + h + 1) * d)),
                ),
                [1, list.length, 1, d],
                { device },
              )
            }
            const kv = Math.floor(head / 2)
            const one = attention(x.slice(2, head, head + 1), await pick(y, kv), await pick(z, kv))
            expect(
              maxError(await out.slice(2, head, head + 1).read(), await one.out.read()),
            ).toBeLessThan(1e-5)
            expect(
              maxError(await lse.slice(1, head, head + 1).read(), await one.lse.read()),
            ).toBeLessThan(1e-5)
          }
        }
      }
      const before = await lazy
        .attend(at(q.tensor, 394, 1), at(k.tensor, 394), at(v.tensor, 394))
        .out.read()
      lazy.reset()
      expect(lazy.tokens).toBe(0)
      const after = await lazy
        .attend(at(q.tensor, 394, 1), at(k.tensor, 394), at(v.tensor, 394))
        .out.read()
      const fresh = hip(at(q.tensor, 394, 1), at(k.tensor, 394), single)
      const whole = attention(at(q.tensor, 394, 1), at(k.tensor, 394), at(v.tensor, 394), {
        mask: fresh,
      })
      expect(maxError(after, await whole.out.read())).toBeLessThan(1e-5)
      expect(maxError(after, before)).toBeGreaterThan(1e-4)
    }
  })

  it('take up a search at the stage whose turn it is', async () => {
    const stages = [
      { chunk: 64, stride: 1 },
      { chunk: 16, stride: 1, topK: 256 },
      { chunk: 4, stride: 1, topK: 64 },
    ]
    // Chunks 2, 4, 6 and 8 of 64 keys enter the second stage, chunk 2 the third, and its first 16 keys are listed
    const hot = (t: number) => [2, 4, 6, 8].includes(((t - 64) / 64) >> 0)
    const key = (x: number) => [x, 0, 0, 0, 0, 0, 0, 0]
    const q = tensor(key(1), [1, 1, 1, 8], { device })
    const cases = [
      { refresh: [4, 2, 1], first: 64 + 5 * 64, keys: 64, found: 4 },
      { refresh: [4, 2, 1], first: 64 + 4 * 64, keys: 64, found: 2 },
      { refresh: [4, 2, 1], first: 64 + 2 * 64 + 16, keys: 16, found: 1 },
      { refresh: [4, 2, 2], first: 64 + 2 * 64 + 16, keys: 16, found: 2 },
    ]
    for (const { refresh, first, keys, found } of cases) {
      const k = tensor(
        range(800).flatMap((t) => key(hot(t) ? 1 : -5)),
        [1, 800, 1, 8],
        { device },
      )
      const v = tensor(new Float32Array(6400), [1, 800, 1, 8], { device })
      using decoder = hipDecoder({
        topK: 16,
        window: 16,
        sinkTokens: 64,
        stages,
        refresh,
        scale: 1,
      })
      const sees: number[] = []
      for (let n = 0; n < 6; n++) {
        if (n === 1) {
          k.slice(1, first, first + keys).write(
            Float32Array.from(range(keys).flatMap(() => key(30))),
          )
          v.slice(1, first, first + keys).write(new Float32Array(keys * 8).fill(1))
        }
        const at = 790 + n
        const { out } = decoder.attend(q, k.slice(1, 0, at), v.slice(1, 0, at))
        if ((await out.read())[0]! > 0.99) sees.push(n)
      }
      expect(sees, JSON.stringify({ refresh, first })).toEqual(range(6).slice(found))
    }
  })

  it('take several tokens at a time', async () => {
    const rng = random(323)
    const make = (n: number, h: number) =>
      tensor(rng.normals(n * h * 16), [1, n, h, 16], { device })
    const [q, k, v] = [make(40, 4), make(340, 2), make(340, 2)]
    const options = { topK: 32, block: [64, 2], window: 16, sinkTokens: 8 } as const
    using decoder = hipDecoder({ ...options, refresh: 1 })
    for (const [from, to] of [
      [0, 1],
      [1, 4],
      [4, 9],
      [9, 40],
    ] as const) {
      const [x, y, z] = [q.slice(1, from, to), k.slice(1, 0, 300 + to), v.slice(1, 0, 300 + to)]
      const block = 2 ** Math.ceil(Math.log2(to - from))
      const mask = hip(x, y, { ...options, block: [block, 2], stride: [Math.min(2, block), 1] })
      expect(await decoder.attend(x, y, z).out.read()).toEqual(
        await attention(x, y, z, { mask }).out.read(),
      )
    }
    expect(decoder.tokens).toBe(40)
  })

  it('decode pages as they decode keys', async () => {
    const rng = random(331)
    const [b, hk, d, page, most] = [2, 2, 16, 8, 12]
    const draw = async (heads: number) =>
      (await sample(rng, [b, page * most, heads, d], 'float32', device, { strided: false })).tensor
    const [q, k, v] = [await draw(4), await draw(hk), await draw(hk)]
    const table = range(b * most)
      .map((at) => [rng.next(), at] as const)
      .sort(([x], [y]) => x - y)
      .map(([, at]) => at)
    const nan = () =>
      tensor(new Float32Array(b * most * page * hk * d).fill(Number.NaN), undefined, { device })
    const stages = [
      { chunk: 16, stride: 2 },
      { chunk: 4, stride: 1, topK: 32 },
    ]
    const base = { topK: 16, window: 8, sinkTokens: 4 }
    for (const options of [
      { ...base, refresh: 3 },
      { ...base, refresh: 4, headMode: 'kv_group', freezeWindowStart: false },
      { ...base, block: [64, 4], headMode: 'all' },
      { ...base, stages, refresh: [6, 3] },
    ] as HipDecoderOptions[])
      for (const sequences of [1, b]) {
        const [keys, values] = [nan(), nan()].map((x) => x.reshape([b * most, page, hk, d]))
        using flat = hipDecoder(options)
        using paged = hipDecoder(options)
        let written = 0
        for (const [step, length] of [40, 41, 42, 45, 46, 47, 49, 50, 64, 65, 66, 70].entries()) {
          for (; written < length; written++)
            for (let i = 0; i < sequences; i++)
              for (const [pool, from] of [
                [keys!, k],
                [values!, v],
              ] as const) {
                const at = table[i * most + Math.floor(written / page)]!
                const row = from.slice(0, i, i + 1).slice(1, written, written + 1)
                const place = pool.slice(0, at, at + 1)
                place.slice(1, written % page, (written % page) + 1).copyFrom(row)
              }
          const n = [1, 1, 1, 3][step % 4]!
          const of = (x: typeof q, from: number) => x.slice(0, 0, sequences).slice(1, from, length)
          const [x, y, z] = [of(q, length - n), of(k, 0), of(v, 0)]
          const expected = flat.attend(x, y, z)
          // there may be more pages than keys, also where there were fewer before
          const width = Math.ceil(length / page) + (step % 3)
          const rows = range(sequences).flatMap((i) => table.slice(i * most, i * most + width))
          const blockTable = tensor(rows, [sequences, width], { dtype: 'int32', device })
          const isFlat = step === 7
          const { out, lse } = isFlat
            ? paged.attend(x, y, z)
            : paged.attend(x, keys!, values!, { blockTable, length })
          expect(maxError(await out.read(), await expected.out.read())).toBeLessThan(1e-5)
          expect(maxError(await lse.read(), await expected.lse.read())).toBeLessThan(1e-5)
        }
      }
  })

  it('decode in 16 bits as in 32', async () => {
    const rng = random(325)
    // products of small whole numbers are exact, so that lists agree
    const whole = (s: number, h: number) =>
      tensor(
        range(s * h * 64).map(() => rng.below(9) - 4),
        [1, s, h, 64],
        { device },
      )
    const [q, k, v] = [whole(40, 4), whole(340, 2), whole(340, 2)]
    for (const headMode of ['head', 'kv_group', 'all'] as const) {
      const options = {
        ...({ topK: 32, block: [64, 8], window: 16, sinkTokens: 8, refresh: 6, headMode } as const),
      }
      using decoder = hipDecoder(options)
      using exact = hipDecoder(options)
      for (let at = 0; at < 20; ) {
        const to = at + rng.pick([1, 1, 3])
        const step = [q.slice(1, at, to), k.slice(1, 0, 300 + to), v.slice(1, 0, 300 + to)] as const
        const [x, y, z] = step.map((one) => one.cast('bfloat16')) as [Half, Half, Half]
        const actual = await decoder.attend(x, y, z).out.read({ as: 'float32' })
        const expected = await exact.attend(...step).out.read()
        expect(maxError(actual, expected)).toBeLessThan(8 * epsilon.bfloat16)
        at = to
      }
    }
  })

  it('attend what is listed at positions that stand for its own', async () => {
    const rng = random(327)
    const [hq, hk, d, dv, w, sinks, bk] = [4, 2, 16, 8, 24, 8, 4]
    const [sk, sq, context] = [300, 75, 128]
    const angles = range(512 * 8).map((i) => Math.floor(i / 8) * 10000 ** ((i % 8) / -8))
    const [cos, sin] = [Math.cos, Math.sin].map((f) =>
      tensor(Float32Array.from(angles, f), [512, 8], { device }),
    ) as [Tensor<'float32'>, Tensor<'float32'>]
    const make = (b: number, s: number, h: number, width: number) =>
      sample(rng, [b, s, h, width], 'float32', device)
    const turned = (x: ArrayLike<number>, at: number) =>
      range(d).map((e) => {
        const [c, n] = [Math.cos, Math.sin].map((f) => Math.fround(f(angles[at * 8 + (e % 8)]!)))
        return x[e]! * c! + (e < 8 ? -x[e + 8]! : x[e - 8]!) * n!
      })
    // What a query at p of a block that begins at `first` and ends with `last` sees of a list, one softmax with its window
    const attend = (
      query: ArrayLike<number>,
      k: (t: number) => ArrayLike<number>,
      v: (t: number) => ArrayLike<number>,
      [p, first, last, window]: readonly [number, number, number, number],
      starts: readonly number[],
      mode: string,
    ) => {
      const slots = range(sinks).concat(starts.flatMap((start) => range(bk).map((j) => start + j)))
      const place = (t: number, j: number) => {
        const away = last - t
        if (mode === 'streaming') return j + first - window + 1 - slots.length
        if (mode === 'infllm') return first - window
        if (mode === 'self_extend')
          return away <= 8192 || last <= context ? t : Math.floor((t - first) / 16) + first
        if (away <= context / 4 || last <= context) return t
        const near = context / 4
        return last - near - Math.floor(((away - near) * (context - near)) / (last - near))
      }
      const seen = slots
        .map((t, j) => [t, Math.max(place(t, j), 0)] as const)
        .filter(([t]) => t <= p - window)
        .concat(range(p + 1).flatMap((t) => (t > p - window ? [[t, t] as const] : [])))
      const own = turned(query, p)
      const scores = seen.map(([t, at]) => {
        const key = turned(k(t), at)
        return range(d).reduce((sum, e) => sum + own[e]! * key[e]!, 0) / 4
      })
      const most = Math.max(...scores)
      const weights = scores.map((score) => Math.exp(score - most))
      const total = weights.reduce((sum, x) => sum + x, 0)
      return range(dv).map((e) =>
        seen.reduce((sum, [t], i) => sum + (weights[i]! / total) * v(t)[e]!, 0),
      )
    }
    const stages = [
      { chunk: 16, stride: 2, block: 16 },
      { chunk: bk, stride: 1, topK: 96, block: 16 },
    ]
    const base = { topK: 40, window: w, sinkTokens: sinks, stages }
    for (const [b, attended] of [
      [1, undefined],
      [2, 'infllm'],
      [1, 'dynamic_extend'],
      [1, 'self_extend'],
    ] as const) {
      const mode = attended ?? 'streaming'
      const [q, k, v] = [
        await make(b, sq, hq, d),
        await make(b, sk, hk, d),
        await make(b, sk, hk, dv),
      ]
      const given = [q.tensor, k.tensor, v.tensor] as const
      const rope = { cos, sin, positions: 'relative', attended, context } as const
      const options = { ...base, rope }
      const starts = async (x: Tensor<'float32'>, y: Tensor<'float32'>, own: HipOptions) => {
        const { index, count } = hipLists(x, y, own)
        const [all, counts] = [await index.read(), await count.read()]
        return [...counts].map((n, row) => [...all.slice(row * 10, row * 10 + n)])
      }
      const row =
        (x: Float32Array, s: number, h: number, width: number) =>
        (seq: number, head: number) =>
        (t: number) =>
          x.subarray(((seq * s + t) * h + head) * width, ((seq * s + t) * h + head + 1) * width)
      const [qs, ks, vs] = [
        row(q.values, sq, hq, d),
        row(k.values, sk, hk, d),
        row(v.values, sk, hk, dv),
      ]

      const lists = await starts(q.tensor, k.tensor, options)
      const { out } = hipAttention(...given, { ...options, denseTailRows: 0, denseThreshold: 0 })
      const actual = await out.read()
      const expected: number[] = []
      for (const seq of range(b))
        for (const i of range(sq)) {
          const first = sk - sq + i - (i % 16)
          const block = [sk - sq + i, first, Math.min(first + 15, sk - 1), w] as const
          for (const head of range(hq)) {
            const [keys, values] = [ks(seq, head >> 1), vs(seq, head >> 1)]
            const list = lists[seq * 5 + Math.floor(i / 16)]!
            expected.push(...attend(qs(seq, head)(i), keys, values, block, list, mode))
          }
        }
      expect(maxError(actual, Float32Array.from(expected)), mode).toBeLessThan(2e-5)

      // dense rows, and all of a short prompt, are turned by their own positions
      const own = hipAttention(...given, { ...options, denseThreshold: sk })
      const tail = hipAttention(...given, { ...options, denseThreshold: 0, denseTailRows: 20 })
      const [whole, part] = [await own.out.read(), await tail.out.read()]
      const each = sq * hq * dv
      const from = (sq - 20) * hq * dv
      expect(maxError(part.slice(from, each), whole.slice(from, each))).toBeLessThan(1e-5)
      expect(part.slice(0, from)).toEqual(actual.slice(0, from))

      if (b > 1) continue
      const single = stages.map((stage) => ({ ...stage, block: 1, stride: 1 }))
      const far = [k, v].map(({ tensor }) =>
        empty(tensor.shape, { device, pinned: true }).copyFrom(tensor),
      ) as [Tensor<'float32'>, Tensor<'float32'>]
      using decoder = hipDecoder({ ...options, refresh: [4, 2] })
      using offloaded = hipDecoder({ ...options, refresh: [4, 2], offload: { scanned: 50 } })
      let kept: number[][] = []
      for (let n = 0; n < 7; n++) {
        const length = 280 + n
        const x = q.tensor.slice(1, n, n + 1)
        const [y, z] = [k.tensor.slice(1, 0, length), v.tensor.slice(1, 0, length)]
        const result = decoder.attend(x, y, z)
        const out = await result.out.read()
        const same = offloaded.attend(x, far[0].slice(1, 0, length), far[1].slice(1, 0, length))
        expect(await same.out.read()).toEqual(out)
        if (n % 4 === 0) kept = await starts(x, y, { ...options, stages: single })
        // a search that is taken up goes on from what the first stage listed then
        if (n % 4 >= 2) continue
        const [p, window] = [length - 1, w + (n % 4)]
        const expected = range(hq).flatMap((head) =>
          attend(
            qs(0, head)(n),
            ks(0, head >> 1),
            vs(0, head >> 1),
            [p, p, p, window],
            kept[0]!,
            mode,
          ),
        )
        expect(maxError(out, Float32Array.from(expected)), `${mode} ${n}`).toBeLessThan(2e-5)
      }
      // many tokens at once, after steps that leave little of the room for a window
      for (const one of [decoder, offloaded]) one.reset()
      const steps = [...range(30).map((i) => [1, 201 + i] as const), [64, 294] as const]
      for (const [n, length] of steps) {
        const rows = q.tensor.slice(1, 0, n)
        const [near, other] = [[k.tensor, v.tensor] as const, far].map(([y, z], i) =>
          [decoder, offloaded][i]!.attend(rows, y!.slice(1, 0, length), z!.slice(1, 0, length)),
        )
        expect(await other!.out.read()).toEqual(await near!.out.read())
      }
      // several tokens are a block of queries
      const [x, y, z] = [
        q.tensor.slice(1, 0, 3),
        k.tensor.slice(1, 0, 290),
        v.tensor.slice(1, 0, 290),
      ]
      decoder.reset()
      const three = stages.map((stage) => ({
        ...stage,
        block: 4,
        stride: Math.min(stage.stride, 4),
      }))
      expect(
        maxError(
          await decoder.attend(x, y, z).out.read(),
          await hipAttention(x, y, z, {
            ...{ ...options, stages: three, denseTailRows: 0, denseThreshold: 0 },
          }).out.read(),
        ),
      ).toBeLessThan(1e-5)
    }
  })

  it('decode the same from pinned memory, of which little is on the device', async () => {
    const rng = random(326)
    const [T, first] = [900, 700]
    type Kind = readonly [dtype: 'float32' | 'bfloat16', d: number]
    const make = (h: number, s: number, [dtype, d]: Kind) =>
      tensor(rng.normals(s * h * d), [1, s, h, d], { device }).cast(dtype)
    const stages = [
      { chunk: 32, stride: 1 },
      { chunk: 8, stride: 1, topK: 256 },
    ]
    const cases: { own: HipDecoderOptions; counts: number[]; isShared: boolean }[] = [
      { own: { topK: 64, stages, refresh: [6, 3] }, counts: [1], isShared: true },
      {
        own: { topK: 64, stages, refresh: [4, 4], freezeWindowStart: false },
        ...{ counts: [1, 1, 3], isShared: true },
      },
      {
        own: { topK: 64, block: [64, 8], headMode: 'all', refresh: 2 },
        ...{ counts: [1, 2], isShared: true },
      },
      {
        own: { topK: 32, block: [64, 2], headMode: 'kv_group', refresh: 3 },
        ...{ counts: [1], isShared: false },
      },
      { own: { topK: 32, block: [64, 4], refresh: 2 }, counts: [1, 4], isShared: false },
      // too large to be gathered on Hopper
      {
        own: {
          topK: 128,
          block: [64, 64],
          headMode: 'all',
          refresh: 2,
          window: 64,
          sinkTokens: 64,
        },
        ...{ counts: [1], isShared: true },
      },
    ]
    const decode = async ({ own, counts, isShared }: (typeof cases)[number]) => {
      // a GPU gathers the last where they stand, and takes the others as pages
      const kinds: readonly Kind[] = [
        ['float32', 16],
        ['bfloat16', 16],
        ['bfloat16', 64],
      ]
      const kind = rng.pick(kinds)
      const [dtype] = kind
      const [q, k, v] = [make(4, T, kind), make(2, T, kind), make(2, T, kind)]
      const far = [k, v].map((x) =>
        empty(x.shape, { dtype, device, pinned: true }).copyFrom(x),
      ) as [Tensor<'float32'>, Tensor<'float32'>]
      const { sinkTokens = 16 } = own
      const options = { window: 32, ...own, sinkTokens }
      const offload = rng.pick([true, { scanned: 64, attended: own.topK! + sinkTokens }])
      using plain = hipDecoder(options)
      using offloaded = hipDecoder({ ...options, offload })
      let isWrong = true
      for (let at = first; at < first + 60; ) {
        const n = rng.pick(counts)
        at += n
        const rows = q.slice(1, at - n, at)
        const expected = plain.attend(rows, k.slice(1, 0, at), v.slice(1, 0, at))
        const actual = offloaded.attend(rows, far[0].slice(1, 0, at), far[1].slice(1, 0, at))
        const what = JSON.stringify({ own, kind, offload, at, n })
        expect(await actual.out.read(), what).toEqual(await expected.out.read())
        expect(await actual.lse.read(), what).toEqual(await expected.lse.read())
        // A guess was wrong
        if (isWrong && at > 730) {
          for (const x of [k, v, ...far])
            x.slice(1, 600, 740).copyFrom(q.slice(1, 0, 140).slice(2, 0, 2))
          for (const decoder of [plain, offloaded]) decoder.reset()
          at = 725
          isWrong = false
        }
      }
      const { scanned, attended } = await offloaded.cacheCounts()
      expect(scanned.missed).toBeGreaterThan(0)
      expect(scanned.found).toBeGreaterThan(scanned.missed / 20)
      if (isShared) {
        expect(attended.missed).toBeGreaterThan(0)
        expect(attended.found).toBeGreaterThan(0)
      }
      expect(await plain.cacheCounts()).toEqual({
        scanned: { found: 0, missed: 0 },
        attended: { found: 0, missed: 0 },
      })
    }
    for (const one of cases) {
      const held = memory(device).tensors
      await scope(() => decode(one))
      expect(memory(device).tensors).toBeLessThanOrEqual(held)
    }
  })

  it('decode on after a call that failed, whichever step of it did, as if it had not been', async () => {
    const rng = random(328)
    const [T, first] = [310, 250]
    const stages = [
      { chunk: 32, stride: 1 },
      { chunk: 8, stride: 1, topK: 128 },
    ]
    const shared = { topK: 64, window: 32, sinkTokens: 16 }
    const cases: HipDecoderOptions[] = [
      { ...shared, stages, refresh: [6, 3] },
      { ...shared, block: [64, 8], headMode: 'all', refresh: 3 },
      // a word of bits is 32 keys
      { topK: 32, window: 16, sinkTokens: 8, block: [64, 1], refresh: 8 },
    ]
    const make = (h: number) => tensor(rng.normals(T * h * 64), [1, T, h, 64], { device })
    for (const own of cases)
      for (const offload of [false, { scanned: 64, attended: 160 }]) {
        const held = memory(device).tensors
        // told that it gathers, the CPU says at the reading that it does not
        const isGathered = device === 'cpu' && own.headMode === 'all'
        await scope(async () => {
          const [q, k, v] = [make(4), make(2), make(2)].map((x) => {
            const to = empty(x.shape, { dtype: 'bfloat16', device, pinned: offload !== false })
            return to.copyFrom(x)
          }) as [Half, Half, Half]
          using whole = hipDecoder({ ...own, offload })
          using struck = hipDecoder({ ...own, offload })
          // the last n tokens of so many
          const of = (decoder: typeof whole, at: number, n: number, values = at) => {
            const cut = (x: Half, from: number, to: number) => x.slice(1, from, to)
            const rows = cut(q, at - n, at)
            const call = () => decoder.attend(rows, cut(k, 0, at), cut(v, 0, values))
            return isGathered ? explained('all_gather', call) : call()
          }
          let at = first
          for (let step = 0; step < 8; step++) {
            const n = rng.pick([1, 1, 3])
            at += n
            const expected = of(whole, at, n)
            const what = JSON.stringify({ own, offload, isGathered, at, n })
            // a guess at some tokens that fails somewhere, and whose values are not all there
            const guess = 1 + rng.below(6)
            const refused = () => of(struck, at + 30, guess, at + 29)
            for (let call = rng.below(3); call < 60; call += 1 + rng.below(5))
              await failure(() => failing(call, refused))
            const gone = k.slice(1, 0, at)
            gone.dispose()
            for (const keys of [gone, k.slice(3, 0, 32), k.slice(1, 0, at).cast('float32')])
              await failure(() => struck.attend(q.slice(1, at - 1, at), keys as Half, v))
            let actual: ReturnType<typeof of> | undefined
            for (let call = 0; !actual; call++)
              try {
                actual = failing(call, () => of(struck, at, n))
              } catch (error) {
                expect(error, what).toBe(injected)
                expect(struck.tokens, what).toBe(whole.tokens - n)
              }
            expect(struck.tokens).toBe(whole.tokens)
            if (isGathered && offload) continue
            expect(await actual.out.read(), what).toEqual(await expected.out.read())
            expect(await actual.lse.read(), what).toEqual(await expected.lse.read())
          }
        })
        await synchronize(device)
        expect(memory(device).tensors).toBeLessThanOrEqual(held)
      }
  })

  it('decode on after a reset where a result could not be read', async () => {
    const rng = random(329)
    const options = { topK: 64, block: [64, 8], headMode: 'all', window: 32, refresh: 4 } as const
    const make = (n: number, h: number) => {
      const x = tensor(rng.normals(n * h * 16), [1, n, h, 16], { device })
      return empty(x.shape, { device, pinned: true }).copyFrom(x)
    }
    const [q, k, v] = [make(12, 4), make(212, 2), make(212, 2)]
    const cacheSeqlens = tensor([9], [1], { dtype: 'int32', device })
    const spoilt = (x: typeof q) => {
      const { out } = attention(x.slice(1, 0, 8), x.slice(1, 0, 8), x.slice(1, 0, 8), {
        cacheSeqlens,
      })
      const bad = empty(x.shape, { device, pinned: true }).copyFrom(x)
      bad.slice(1, 0, 8).copyFrom(out)
      return bad
    }
    const bad = [spoilt(q), spoilt(k), spoilt(v)]
    for (const offload of [false, true])
      for (let which = 0; which < 3; which++) {
        using decoder = hipDecoder({ ...options, offload })
        const step = (at: number, one = decoder, given = [q, k, v]) => {
          const [x, y, z] = given as [typeof q, typeof q, typeof q]
          const rows = x.slice(1, at - 200, at - 199)
          return one.attend(rows, y.slice(1, 0, at), z.slice(1, 0, at)).out
        }
        for (const at of [200, 201, 202, 203]) await step(at).read()
        const given = [q, k, v].with(which, bad[which]!)
        for (const at of [204, 205])
          expect(await failure(() => step(at, decoder, given).read())).toMatchObject({
            op: 'attention',
            code: 'ERR_ARGUMENT',
          })
        decoder.reset()
        using fresh = hipDecoder({ ...options, offload })
        for (const at of [206, 207, 208, 209, 210, 211])
          expect(await step(at).read()).toEqual(await step(at, fresh).read())
      }
  })

  it('keep sink tokens in sight that stood in the window when lists were made', async () => {
    const rng = random(330)
    const make = (h: number) => {
      const x = tensor(rng.normals(60 * h * 64), [1, 60, h, 64], { device })
      return empty(x.shape, { dtype: 'bfloat16', device, pinned: true }).copyFrom(x)
    }
    const [q, k, v] = [make(4), make(2), make(2)]
    for (const offload of [false, true]) {
      using decoder = hipDecoder({
        ...{ topK: 16, block: [64, 8], headMode: 'all', window: 16, sinkTokens: 16 },
        ...{ refresh: 50, freezeWindowStart: false, offload },
      })
      for (let at = 20; at <= 60; at++) {
        const given = [q.slice(1, at - 1, at), k.slice(1, 0, at), v.slice(1, 0, at)] as const
        const actual = await decoder.attend(...given).out.read({ as: 'float32' })
        const expected = await attention(...given).out.read({ as: 'float32' })
        expect(maxError(actual, expected), `${at} keys`).toBeLessThan(4 * epsilon.bfloat16)
      }
    }
  })

  it('decode from pinned memory what had fewer keys than a block when they were listed', async () => {
    const rng = random(327)
    const make = (h: number, d: number) =>
      tensor(rng.normals(40 * h * d), [1, 40, h, d], { device }).cast('bfloat16')
    // values of another size are not gathered
    for (const dv of [64, 32]) {
      const [q, k, v] = [make(4, 64), make(2, 64), make(2, dv)]
      const far = [k, v].map((x) =>
        empty(x.shape, { dtype: 'bfloat16', device, pinned: true }).copyFrom(x),
      ) as [typeof k, typeof v]
      using decoder = hipDecoder({
        ...{ topK: 64, block: [64, 32], headMode: 'all', window: 32, refresh: 8, offload: true },
      })
      for (let at = 29; at <= 40; at++) {
        const keys = [k, v].map((x) => x.slice(1, 0, at)) as [typeof k, typeof v]
        const rows = q.slice(1, at - 1, at)
        const actual = decoder.attend(rows, far[0].slice(1, 0, at), far[1].slice(1, 0, at))
        const expected = attention(rows, ...keys)
        const [x, y] = [
          await actual.out.read({ as: 'float32' }),
          await expected.out.read({ as: 'float32' }),
        ]
        expect(maxError(x, y), `${at} keys`).toBeLessThan(4 * epsilon.bfloat16)
      }
    }
  })

  it('give the same however the keys are split', async () => {
    const rng = random(324)
    const make = (n: number, h: number) =>
      tensor(rng.normals(n * h * 16), [1, n, h, 16], { device })
    const [q, k, v] = [make(1, 4), make(340, 2), make(340, 2)]
    const mask = hip(q, k, { topK: 32, block: [1, 2], stride: [1, 1], window: 16, sinkTokens: 8 })
    const whole = attention(q, k, v, { mask })
    const dense = await mask.toDense()
    const int32 = (values: number[], shape: number[]) =>
      tensor(values, shape, { dtype: 'int32', device })
    for (const splits of [1, 3, 7, 40]) {
      const parts = range(splits).map((split) => {
        const [from, to] = [split, split + 1].map((x) => Math.floor((x * 340) / splits)) as [
          number,
          number,
        ]
        const seen = range(4).map((head) =>
          range(to - from).filter((t) => dense[head * 340 + from + t]),
        )
        const index = seen.flatMap((list) => range(to - from).map((i) => list[i] ?? -1))
        const columns = {
          count: int32(
            seen.map((list) => list.length),
            [1, 4],
          ),
          index: int32(index, [1, 4, to - from]),
        }
        const own = Mask.fromTokens({ columns }, { sq: 1, sk: to - from, causal: false })
        return attention(q, k.slice(1, from, to), v.slice(1, from, to), { mask: own })
      })
      // a split of nothing changes nothing
      if (splits === 40) {
        const empty = await Promise.all(parts.map(({ lse }) => lse.read()))
        expect(empty.some((lse) => lse.includes(Number.NEGATIVE_INFINITY))).toBe(true)
      }
      const joined = merge(parts)
      expect(maxError(await joined.out.read(), await whole.out.read())).toBeLessThan(1e-5)
      expect(maxError(await joined.lse.read(), await whole.lse.read())).toBeLessThan(1e-5)
    }
  })

  it('refuse what they cannot do', async () => {
    const z = tensor(new Float32Array(32), [1, 2, 2, 8], { device })
    const tables = { cos: z.reshape([8, 4]), sin: z.reshape([8, 4]) }
    const pages = { blockTable: tensor([0, 0], [1, 2], { dtype: 'int32', device }), length: 3 }
    const cases = [
      [
        () => hipDecoder({ refresh: 0 }),
        'hipDecoder: refresh must be an integer at least 1, got 0',
      ],
      [
        () => hipDecoder({ refresh: [8, 4] }),
        'hipDecoder: refresh must be one number, got an array of 2',
      ],
      [
        () => hipDecoder({ stages: hipStages, refresh: [8, 16, 4] }),
        'hipDecoder: refresh must never grow, got 16 after 8',
      ],
      [
        () => hipDecoder({ cacheSeqlens: [1] } as never),
        "hipDecoder: cacheSeqlens is not taken here: a decoder is one sequence's; give attend the keys that are there, k.slice(1, 0, length), or pages",
      ],
      [
        () => hipDecoder({ blockTable: z } as never),
        "hipDecoder: blockTable is not taken here: a decoder is one sequence's; give it to attend",
      ],
      [
        () => hipDecoder({ cuSeqlensK: [0, 2] } as never),
        "hipDecoder: cuSeqlensK is not taken here: a decoder is one sequence's; make a decoder for each sequence",
      ],
      [
        () => hipDecoder({ offload: { attended: 16 } }),
        'hipDecoder: offload.attended must be an integer at least 528, got 16',
      ],
      [
        () => hipDecoder({ offload: { scaned: 16 } as never }),
        'hipDecoder: unknown option "scaned"; did you mean "scanned"?',
      ],
      [
        () => hipDecoder({ stages: hipStages, headMode: 'kv_group', rope: tables }),
        'hipDecoder: rope with keys attended elsewhere than they stand takes one list for all heads and a window of at least a block',
      ],
      [
        () => hipDecoder({ stages: hipStages, rope: { ...tables, attended: 'relative' as never } }),
        'hipDecoder: rope.attended must be one of own, streaming, infllm, self_extend, dynamic_extend, got "relative"',
      ],
      [
        () => hipDecoder({ offload: [] as never }),
        'hipDecoder: offload must be a boolean or an object, got an array of 0',
      ],
      [
        () => hip(z, z, { stages: hipStages, rope: [] as never }),
        'hip: rope must be an object, got an array of 0',
      ],
      [
        () => hipAttention(z, z, z, { layers: null as never }),
        'hipAttention: layers must be an object with what some layers do, got null',
      ],
      [
        () => hipAttention(z, z, z, { scale: Number.NaN }),
        'hipAttention: scale must be a finite number, got NaN',
      ],
      [
        () => hipAttention(z, z.slice(1, 0, 1), z, { denseThreshold: 0 }),
        'hipAttention: sq must be at most sk, got 2 and 1',
      ],
      [
        () => hipAttention(z, z, z, { stages: hipStages, rope: tables, cacheSeqlens: [1] }),
        'hipAttention: rope cannot be combined with cacheSeqlens',
      ],
      [
        () => hipAttention(z, z, z, { stages: hipStages, rope: tables, cuSeqlensK: [0, 2] }),
        'hipAttention: rope cannot be combined with cuSeqlensK',
      ],
      [
        () => hipDecoder({ offload: true }).attend(z, z.transpose(1, 2), z),
        'hipDecoder: offload takes contiguous keys and values of one sequence',
      ],
      [
        () => hipDecoder({ offload: true }).attend(z, z, undefined as never),
        'hipDecoder: v must be a tensor, got undefined',
      ],
      [
        () => {
          const two = z.expand([2, 2, 2, 8])
          return hipDecoder({ stages: hipStages, rope: tables }).attend(two, two, two)
        },
        'hipDecoder: rope with keys attended elsewhere than they stand takes one sequence; make a decoder for each',
      ],
      [
        () => hipDecoder({ stages: hipStages, rope: tables }).attend(z, z, z, pages),
        'hipDecoder: rope cannot be combined with blockTable',
      ],
      [
        () => hipDecoder({ offload: true }).attend(z, z, z, pages),
        'hipDecoder: offload cannot be combined with blockTable',
      ],
      [
        () => hipDecoder().attend(z, z, z, { ...pages, length: 5 }),
        'hipDecoder: length must be an integer from 2 to 4, got 5',
      ],
      [
        () => hipDecoder().attend(z, z, z, { length: 2 } as never),
        'hipDecoder: blockTable must be a tensor, got undefined',
      ],
      [
        () => hipDecoder().attend(z, z, z, { ...pages, cacheSeqlens: [2] } as never),
        'hipDecoder: unknown option "cacheSeqlens"',
      ],
      [
        () => hipDecoder({ topK: 7 }),
        'hipDecoder: topK must be a positive multiple of the block of keys, 2, got 7',
      ],
    ] as const
    for (const [call, message] of cases) expect((await failure(call)).message).toBe(message)
    // what was refused leaves no cache of its sizes
    using decoder = hipDecoder({ offload: true })
    const narrow = tensor(new Float32Array(16), [1, 2, 2, 4], { device })
    expect((await failure(() => decoder.attend(z, narrow, z))).message).toContain('but q has d = 8')
    const mixed = z.cast('bfloat16') as never
    expect((await failure(() => hipDecoder().attend(z, mixed, z))).message).toContain(
      'hipDecoder: k must be float32, got bfloat16',
    )
    const before = decoder.tokens
    expect((await failure(() => decoder.attend(z, z, z.slice(1, 1)))).message).toContain(
      'v must be',
    )
    expect(decoder.tokens).toBe(before)
    expect(decoder.attend(z, z, z).out.shape).toEqual([1, 2, 2, 8])
    // nor may its keys be others than before
    for (const [rows, keys] of [
      [z, z.slice(1, 1)],
      [z.slice(2, 1), z.slice(2, 1)],
      [z.expand([2, 2, 2, 8]), z.expand([2, 2, 2, 8])],
    ] as const)
      expect((await failure(() => decoder.attend(rows, keys, keys))).message).toBe(
        `hipDecoder: k must be [1, from 2 on, 2, 8] and q have 2 heads as in the call before, got [${keys.shape.join(', ')}] and ${rows.shape[2]}; call reset() for other keys`,
      )
    const q = tensor(new Float32Array(129 * 8), [1, 129, 1, 8], { device })
    expect((await failure(() => hipDecoder().attend(q, q, q))).message).toBe(
      'hipDecoder: q.shape[1] must be an integer from 1 to 128, got 129',
    )
  })

  it('answer what is asked of byte-lm, token by token', async () => {
    const directory = join(__dirname, '..', '..', 'examples', 'byte-lm')
    const model = await load(directory, { device })
    const file = await openSafetensors(join(directory, 'eval-dev.safetensors'))
    const ids = await (await file.load('dev4k.ids', { dtype: 'uint8' })).read()
    const pairs = await (await file.load('dev4k.answers', { dtype: 'int32' })).read()
    await file.close()
    const searched = { topK: 256, window: 128, sinkTokens: 64, stages: hipStages } as const
    const prompt: Attend = (q, k, v) =>
      attention(q, k, v, { mask: infiniteHip(q, k, searched) }).out
    const softmaxLayers = model.config.attention.filter((kind) => kind === 'softmax').length

    // Reads the document up to an answer, gives that token by token, and reads on
    const answered = async (document: number, refresh?: number): Promise<number[]> => {
      const text = ids.subarray(document * 4096, (document + 1) * 4096)
      const answers = range(pairs.length / 2)
        .filter((i) => pairs[2 * i] === document)
        .map((i) => pairs[2 * i + 1]!)
      const cache = newCache(model, text.length)
      const right: number[] = []
      let read = 0
      for (const at of answers.sort((a, b) => a - b)) {
        forward(model, text.subarray(read, at - 1), cache, prompt).dispose()
        const decoders = range(refresh ? softmaxLayers : 0).map(() =>
          hipDecoder({ ...searched, refresh: [refresh!, refresh!, refresh!] }),
        )
        let hits = 0
        for (let t = at - 1; t < at + 4; t++) {
          let layer = 0
          const step: Attend = (q, k, v) => decoders[layer++]!.attend(q, k, v).out
          const logits = forward(model, text.subarray(t, t + 1), cache, refresh ? step : prompt)
          const row = await logits.read()
          logits.dispose()
          hits += Number(row.indexOf(Math.max(...row)) === text[t + 1])
        }
        if (hits === 5) right.push(at)
        for (const decoder of decoders) decoder.dispose()
        read = at + 4
      }
      disposeCache(cache)
      return right
    }
    let [always, seldom, all] = [0, 0, 0]
    for (const document of [0, 1]) {
      const whole = await answered(document)
      expect(await answered(document, 1)).toEqual(whole)
      always += whole.length
      seldom += (await answered(document, 8)).length
      all += 8
    }
    expect(seldom).toBeGreaterThanOrEqual(always - 1)
    expect(always).toBeGreaterThanOrEqual(all - 1)
  }, 120000)
})
