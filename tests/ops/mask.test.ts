import { inspect } from 'node:util'
import {
  achievedMass,
  add,
  attention,
  attentionBackward,
  type Device,
  explain,
  type FloatDType,
  hip,
  Mask,
  memory,
  merge,
  synchronize,
  type Tensor,
  tensor,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectClose, expectGradients, largest, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random, sample, starts } from '../support/random.js'
import {
  type AttentionCase,
  attentionGradients,
  attentionReference,
  reader,
} from '../support/reference.js'

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

const lengths = [1, 17, 63, 64, 65, 130, 257]

interface Draw {
  b: number
  heads: number
  sq: number
  sk: number
  block: readonly [number, number]
  causal: boolean
  /** [b][head][row of blocks][column] */
  table: boolean[][][][] | undefined
  columns: Set<number>[][] | undefined
  diagonals: Set<number>[][] | undefined
  window: number
  sinkTokens: number
}

function drawMask(rng: Random, b: number, heads: number, sq: number, sk: number): Draw {
  const block = [rng.pick([1, 16, 64, 64, 128]), rng.pick([1, 2, 4, 8, 16, 32, 64, 128])] as const
  const share = rng.pick([0, 0.1, 0.3, 0.6])
  const [rows, columns] = [Math.ceil(sq / block[0]), Math.ceil(sk / block[1])]
  const each = <T>(make: () => T) =>
    Array.from({ length: b }, () => Array.from({ length: heads }, make))
  const tokens = () =>
    new Set(Array.from({ length: rng.pick([0, 1, 5, 40]) }, () => rng.below(Math.max(sk, 1))))
  return {
    ...{ b, heads, sq, sk, block, causal: rng.chance(0.7) },
    table: rng.chance(0.8)
      ? each(() =>
          Array.from({ length: rows }, () =>
            Array.from({ length: columns }, () => rng.chance(share)),
          ),
        )
      : undefined,
    columns: rng.chance(0.4) ? each(tokens) : undefined,
    diagonals: rng.chance(0.4) ? each(tokens) : undefined,
    window: rng.chance(0.3) ? rng.pick([1, 20, 100]) : 0,
    sinkTokens: rng.chance(0.3) ? rng.pick([1, 4, 70]) : 0,
  }
}

function sees(m: Draw, b: number, head: number, i: number, t: number): boolean {
  const p = m.sk - m.sq + i
  if (m.causal && t > p) return false
  const listed = (sets: Set<number>[][] | undefined, x: number) =>
    sets?.[b]?.[head]?.has(x) ?? false
  return (
    (m.table?.[b]?.[head]?.[Math.floor(i / m.block[0])]?.[Math.floor(t / m.block[1])] ?? false) ||
    listed(m.columns, t) ||
    listed(m.diagonals, p - t) ||
    (t <= p && t > p - m.window) ||
    t < m.sinkTokens
  )
}

const formats = ['table', 'padded', 'split', 'rows', 'pairs', 'runs', 'words', 'long'] as const
type Format = (typeof formats)[number]

function shuffled<T>(rng: Random, list: readonly T[]): T[] {
  return list
    .map((value) => [rng.next(), value] as const)
    .sort((x, y) => x[0] - y[0])
    .map(([, value]) => value)
}

function blockMask(rng: Random, m: Draw, format: Format, device: Device): Mask {
  const options = { sq: m.sq, sk: m.sk, block: m.block, causal: m.causal, device }
  const [rows, columns] = [Math.ceil(m.sq / m.block[0]), Math.ceil(m.sk / m.block[1])]
  const int32 = (values: number[], shape: number[]) =>
    tensor(values, shape, { dtype: 'int32', device })
  const lists = m.table!.flat(2).map((row) =>
    shuffled(
      rng,
      row.flatMap((listed, c) => (listed ? [c] : [])),
    ),
  )
  const shape = [m.b, m.heads, rows]
  const padded = (of: number[][]) => {
    const width = Math.max(1, ...of.map((list) => list.length)) + 1
    const index = of.flatMap((list) => [
      ...list,
      ...Array.from({ length: width - list.length }, () => rng.pick([-1, 2 ** 31 - 1, 0])),
    ])
    const count = of.map((list) => list.length)
    return { count: int32(count, shape), index: int32(index, [...shape, width]) }
  }
  switch (format) {
    case 'table':
      return Mask.fromBlocks(
        tensor(Uint8Array.from(m.table!.flat(3), Number), [...shape, columns], { device }),
        options,
      )
    case 'padded':
      return Mask.fromLists(padded(lists), options)
    case 'split':
      return Mask.fromLists(
        [
          padded(lists.map((list) => list.filter((_, i) => i % 2 === 0))),
          padded(lists.map((list) => list.filter((_, i) => i % 2 === 1))),
        ],
        options,
      )
    case 'rows': {
      const rowPtr = starts(lists.map((list) => list.length))
      const column = lists.flat()
      return Mask.fromRows(
        { rowPtr: int32(rowPtr, [rowPtr.length]), column: int32(column, [column.length]) },
        { ...options, b: m.b, heads: m.heads },
      )
    }
    // runs of several blocks are single keys here
    case 'runs': {
      const { count, index } = padded(lists.map((list) => list.map((c) => c * m.block[1])))
      const runs = { sq: m.sq, sk: m.sk, causal: m.causal, block: m.block }
      return Mask.fromRuns({ count, index }, runs)
    }
    case 'words':
    case 'long': {
      const size = format === 'long' ? 64 : 32
      const width = Math.ceil(columns / size) + rng.below(2)
      const words = lists.flatMap((list) => {
        // beyond the last block there may be anything
        const own = new Array<bigint>(width).fill(rng.chance(0.5) ? (1n << BigInt(size)) - 1n : 0n)
        for (let c = 0; c < columns; c++) {
          const bit = 1n << BigInt(c % size)
          own[Math.floor(c / size)]! &= ~bit
          if (list.includes(c)) own[Math.floor(c / size)]! |= bit
        }
        return own.map((word) => BigInt.asIntN(size, word))
      })
      const given = [...shape, width]
      return Mask.fromBits(
        format === 'long'
          ? tensor(BigInt64Array.from(words), given, { device })
          : tensor(Int32Array.from(words, Number), given, { device }),
        options,
      )
    }
    default: {
      const flat = m.table!.flatMap((heads) =>
        heads.map((table) => table.flat().flatMap((listed, i) => (listed ? [i] : []))),
      )
      const most = Math.max(...flat.map((list) => list.length)) + 2
      const all = flat.flatMap((list) => [
        ...list,
        ...new Array(most - list.length).fill(rows * columns),
      ])
      return Mask.fromPairs(int32(all, [m.b, m.heads, most]), options)
    }
  }
}

function maskOf(rng: Random, m: Draw, device: Device): Mask {
  const options = { sq: m.sq, sk: m.sk, block: m.block, causal: m.causal, device }
  const lists = (sets: Set<number>[][]) => {
    const flat = sets.flat().map((set) => [...set])
    const width = Math.max(1, ...flat.map((list) => list.length))
    const index = flat.flatMap((list) => [...list, ...new Array(width - list.length).fill(-7)])
    return {
      count: tensor(
        flat.map((list) => list.length),
        [m.b, m.heads],
        { dtype: 'int32', device },
      ),
      index: tensor(index, [m.b, m.heads, width], { dtype: 'int32', device }),
    }
  }
  let mask = Mask.fromWindow({ window: m.window, sinkTokens: m.sinkTokens }, options)
  if (m.table) mask = mask.union(blockMask(rng, m, rng.pick(formats), device))
  if (m.columns || m.diagonals) {
    mask = mask.union(
      Mask.fromTokens(
        {
          columns: m.columns && lists(m.columns),
          diagonals: m.diagonals && lists(m.diagonals),
        },
        options,
      ),
    )
  }
  return mask
}

const plainCase = (rng: Random): AttentionCase => {
  const hk = rng.pick([1, 2])
  const d = rng.pick([16, 64, 128])
  return {
    b: rng.pick([1, 2]),
    sq: rng.pick(lengths),
    sk: rng.pick(lengths),
    hq: hk * rng.pick([1, 2, 4]),
    hk,
    d,
    dv: rng.chance(0.2) ? 72 : d,
    causal: true,
    window: undefined,
    scale: 1 / Math.sqrt(d),
    softCap: rng.chance(0.2) ? 5 : 0,
    slopes: undefined,
    sink: undefined,
  }
}

async function inputs(rng: Random, c: AttentionCase, dtype: FloatDType, device: Device) {
  const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device)
  const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device)
  const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device)
  return { q, k, v }
}

// A case under a mask of its own, with slopes and sinks now and then
function maskedCase(rng: Random) {
  const c = plainCase(rng)
  if (rng.chance(0.4)) {
    c.slopes = Array.from(rng.normals(c.hq), (x) => Math.fround(Math.abs(x) * 0.1))
    c.sink = Array.from(rng.normals(c.hq))
  }
  const m = drawMask(rng, c.b, rng.pick([1, c.hk, c.hq]), c.sq, c.sk)
  c.causal = m.causal
  c.sees = (b, head, i, t) => sees(m, b, Math.floor(head / (c.hq / m.heads)), i, t)
  return { c, m }
}

async function bytes(result: Tensor): Promise<Buffer> {
  const values = await result.read()
  return Buffer.from(values.buffer, values.byteOffset, values.byteLength)
}

describeDevices('attention over a mask', (device) => {
  describe.each(floats)('%s', (dtype) => {
    it('agrees with float64 on random masks of every kind', async () => {
      const rng = random(70)
      for (let n = 0; n < 30; n++) {
        const { c, m } = maskedCase(rng)
        const { q, k, v } = await inputs(rng, c, dtype, device)
        const reference = attentionReference(
          c,
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
          dtype,
        )
        const mask = maskOf(rng, m, device)
        const what = `${JSON.stringify(c)} ${JSON.stringify({ ...m, table: undefined })}`
        const dense = await mask.toDense()
        for (let i = 0; i < dense.length; i++) {
          const [t, row] = [i % c.sk, Math.floor(i / c.sk)]
          const head = Math.floor(row / c.sq) % mask.heads
          const b = Math.floor(row / c.sq / mask.heads)
          const expected = sees(m, b, head, row % c.sq, t) ? 1 : 0
          if (dense[i] !== expected) expect(dense[i], `${i} of ${what}`).toBe(expected)
        }
        const result = attention(q.tensor, k.tensor, v.tensor, {
          mask,
          scale: c.scale,
          softCap: c.softCap,
          ...(c.slopes && { slopes: c.slopes }),
          ...(c.sink && { sink: c.sink }),
        })
        const { terms } = reference
        expectClose(
          await result.out.read({ as: 'float32' }),
          reference.out,
          reference.plain,
          dtype,
          `${what} out`,
          { exponent: terms },
        )
        const lse = await result.lse.read()
        for (let i = 0; i < lse.length; i++)
          if (reference.lse[i] === Number.NEGATIVE_INFINITY)
            expect(lse[i], what).toBe(Number.NEGATIVE_INFINITY)
        expectClose(lse, reference.lse, reference.plainLse, 'float32', `${what} lse`, { terms })
      }
    }, 300_000)

    it('has the gradients of random masks of every kind', async () => {
      const rng = random(78)
      for (let n = 0; n < 14; n++) {
        const { c, m } = maskedCase(rng)
        const { q, k, v } = await inputs(rng, c, dtype, device)
        const dout = await sample(rng, [c.b, c.sq, c.hq, c.dv], dtype, device)
        const reference = attentionGradients(
          c,
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
          reader(dout.values, c.sq, c.hq, c.dv),
          dtype,
        )
        const { scale, softCap, slopes, sink } = c
        const options = { mask: maskOf(rng, m, device), scale, softCap, slopes, sink }
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, options)
        const result = attentionBackward(
          q.tensor,
          k.tensor,
          v.tensor,
          out,
          lse,
          dout.tensor,
          options,
        )
        const what = `${JSON.stringify(c)} ${JSON.stringify({ ...m, table: undefined })}`
        await expectGradients(result, reference, c, dtype, what)
      }
    }, 300_000)

    it('takes nothing from, and gives nothing to, what is not listed', async () => {
      const rng = random(79)
      const draw = async () =>
        (await sample(rng, [1, 256, 2, 64], dtype, device, { strided: false })).tensor
      const [q, k, v, dout] = [await draw(), await draw(), await draw(), await draw()]
      // nobody sees the second block of keys, and the last queries see none
      const listed = Uint8Array.from({ length: 16 }, (_, i) => (i % 4 === 1 || i >= 12 ? 0 : 1))
      const table = tensor(listed, [1, 1, 4, 4], { device })
      const mask = Mask.fromBlocks(table, { sq: 256, block: 64, causal: false })
      const gradients = async () => {
        const { out, lse } = attention(q, k, v, { mask })
        const { dq, dk, dv } = attentionBackward(q, k, v, out, lse, dout, { mask })
        return Promise.all([dq, dk, dv].map((x) => x.read({ as: 'float32' })))
      }
      const clean = await gradients()
      const zero = (of: Float32Array, from: number, to: number) =>
        of.subarray((of.length / 256) * from, (of.length / 256) * to).every((x) => x === 0)
      expect(zero(clean[0]!, 192, 256)).toBe(true)
      expect(zero(clean[0]!, 0, 192)).toBe(false)
      for (const of of clean.slice(1)) {
        expect(zero(of, 64, 128)).toBe(true)
        expect(zero(of, 128, 256)).toBe(false)
      }
      const poison = (of: Tensor, from: number) =>
        of
          .slice(1, from, from + 64)
          .copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 64, 2, 64]))
      poison(k, 64)
      poison(v, 64)
      poison(q, 192)
      poison(dout, 192)
      // tiles with what is no number may have been computed in another way
      const dirty = await gradients()
      clean.forEach((of, i) => {
        expect(maxError(dirty[i]!, of)).toBeLessThanOrEqual(4 * epsilon[dtype] * largest(of))
        expect(zero(dirty[i]!, i ? 64 : 192, i ? 128 : 256)).toBe(true)
      })
    })

    it('is the same for every format, order and head axis of one mask', async () => {
      const rng = random(71)
      const c = { ...plainCase(rng), b: 2, sq: 130, sk: 257, hq: 4, hk: 2 }
      const m = { ...drawMask(rng, c.b, 2, c.sq, c.sk), columns: undefined, diagonals: undefined }
      const rows = Math.ceil(m.sq / m.block[0])
      const columns = Math.ceil(m.sk / m.block[1])
      const table = Array.from({ length: 2 }, () =>
        Array.from({ length: 2 }, () =>
          Array.from({ length: rows }, () =>
            Array.from({ length: columns }, () => rng.chance(0.4)),
          ),
        ),
      )
      const { q, k, v } = await inputs(rng, c, dtype, device)
      const results: Buffer[] = []
      // single keys may be taken in another order
      for (const format of formats.filter((one) => one !== 'runs')) {
        const mask = blockMask(rng, { ...m, table }, format, device)
        results.push(await bytes(attention(q.tensor, k.tensor, v.tensor, { mask }).out))
      }
      const perHead = table.map((heads) => heads.flatMap((one) => [one, one]))
      const mask = blockMask(rng, { ...m, heads: 4, table: perHead }, 'padded', device)
      results.push(await bytes(attention(q.tensor, k.tensor, v.tensor, { mask }).out))
      for (const one of results) expect(Buffer.compare(one, results[0]!)).toBe(0)
    })

    it('equals dense where everything is listed', async () => {
      const rng = random(72)
      for (const causal of [true, false]) {
        const c = { ...plainCase(rng), b: 1, sq: 200, sk: 313, hq: 2, hk: 1 }
        const { q, k, v } = await inputs(rng, c, dtype, device)
        const dense = attention(q.tensor, k.tensor, v.tensor, { causal })
        const table = tensor(new Uint8Array(4 * 5).fill(1), [1, 1, 4, 5], { device })
        const mask = Mask.fromBlocks(table, { sq: 200, sk: 313, block: 64, causal })
        const listed = attention(q.tensor, k.tensor, v.tensor, { mask })
        if (device === 'cpu')
          expect(Buffer.compare(await bytes(listed.out), await bytes(dense.out))).toBe(0)
        const expected = await dense.out.read({ as: 'float32' })
        const error = maxError(await listed.out.read({ as: 'float32' }), expected)
        expect(error).toBeLessThan(dtype === 'bfloat16' ? 0.05 : 0.005)
        expect(await mask.density()).toBe(1)
      }
    })

    it('reads nothing of blocks that are not listed', async () => {
      const rng = random(73)
      const c = { ...plainCase(rng), b: 1, sq: 256, sk: 256, hq: 2, hk: 2, d: 64, dv: 64 }
      const { q, k, v } = await inputs(rng, c, dtype, device)
      const listed = Uint8Array.from({ length: 16 }, (_, i) => (i % 4 === 1 ? 0 : 1))
      const mask = Mask.fromBlocks(tensor(listed, [1, 1, 4, 4], { device }), {
        sq: 256,
        block: 64,
      })
      const clean = await bytes(attention(q.tensor, k.tensor, v.tensor, { mask }).out)
      for (const one of [k, v])
        one.tensor
          .slice(1, 64, 128)
          .copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 64, 2, 64]))
      const dirty = await bytes(attention(q.tensor, k.tensor, v.tensor, { mask }).out)
      expect(Buffer.compare(clean, dirty)).toBe(0)
    })
  })

  it('holds for every sequence of a batch if it is of one', async () => {
    const rng = random(96)
    const [b, sq, sk] = [3, 20, 33]
    const draw = async (s: number) => (await sample(rng, [b, s, 2, 16], 'float32', device)).tensor
    const [q, k, v, dout] = [await draw(sq), await draw(sk), await draw(sk), await draw(sq)]
    const about = { sq, sk, block: 8, device }
    const masks = [
      Mask.fromTokens({ columns: [0, 3], diagonals: [0, 5] }, about),
      Mask.fromDocuments([0, 20, sk], about),
      Mask.fromBlocks(
        tensor(
          Uint8Array.from({ length: 15 }, () => rng.below(2)),
          [1, 1, 3, 5],
          { device },
        ),
        about,
      ),
    ]
    for (const mask of masks) {
      const { out, lse } = attention(q, k, v, { mask })
      const { dk } = attentionBackward(q, k, v, out, lse, dout, { mask })
      const of = (x: Tensor, i = 0) => x.slice(0, i, i + 1) as Tensor<'float32'>
      for (let i = 0; i < b; i++) {
        const own = attention(of(q, i), of(k, i), of(v, i), { mask })
        expect(await of(out, i).read()).toEqual(await own.out.read())
        const back = attentionBackward(
          of(q, i),
          of(k, i),
          of(v, i),
          own.out,
          own.lse,
          of(dout, i),
          { mask },
        )
        expect(maxError(await of(dk, i).read(), await back.dk.read())).toBeLessThan(1e-5)
      }
      // what is explained is attention, not the copy of what is shared
      const own = explain(attention, of(q), of(k), of(v), { mask }).variant
      expect(explain(attention, q, k, v, { mask }).variant).toBe(own)
    }
    const table = tensor(new Uint8Array(2 * 15), [2, 1, 3, 5], { device })
    const two = Mask.fromBlocks(table, about)
    expect((await failure(() => attention(q, k, v, { mask: two }))).message).toBe(
      'attention: mask must be of 1 sequence or of b = 3, got one of 2',
    )
  })

  it('keeps packed sequences apart', async () => {
    const rng = random(74)
    for (let n = 0; n < 6; n++) {
      const c = { ...plainCase(rng), b: 1, softCap: 0 }
      const parts = Array.from({ length: 3 }, () => {
        const sk = rng.pick([0, 4, 65, 150])
        return { sk, sq: Math.min(rng.pick([1, 64, 100]), sk) }
      })
      const cuSeqlensQ = starts(parts.map(({ sq }) => sq))
      const cuSeqlensK = starts(parts.map(({ sk }) => sk))
      c.sq = cuSeqlensQ.at(-1)!
      c.sk = cuSeqlensK.at(-1)!
      const { q, k, v } = await inputs(rng, c, 'float32', device)
      const [bq, bk] = [rng.pick([16, 64]), rng.pick([16, 64])]
      const rows = Math.floor(c.sq / bq) + 3
      const columns = Math.ceil(c.sk / bk)
      const table = Uint8Array.from({ length: rows * columns }, () => (rng.chance(0.5) ? 1 : 0))
      const block = [bq, bk] as const
      const mask = Mask.fromBlocks(tensor(table, [1, 1, rows, columns], { device }), {
        ...{ sq: c.sq, sk: c.sk, block, cuSeqlensQ, cuSeqlensK },
      }).union(
        Mask.fromTokens(
          { columns: [3].filter((x) => x < c.sk), diagonals: [0, 9].filter((x) => x < c.sk) },
          { sq: c.sq, sk: c.sk, block, cuSeqlensQ, cuSeqlensK, device },
        ),
      )
      const dout = await sample(rng, [1, c.sq, c.hq, c.dv], 'float32', device)
      const compute = (mask: Mask, of: readonly Tensor<FloatDType>[]) => {
        const [q, k, v, dout] = of
        const { out, lse } = attention(q!, k!, v!, { mask })
        const { dq, dk, dv } = attentionBackward(q!, k!, v!, out, lse, dout!, { mask })
        return [out, dq, dk, dv]
      }
      const packed = compute(mask, [q.tensor, k.tensor, v.tensor, dout.tensor])
      for (const [i, { sq, sk }] of parts.entries()) {
        const own = (of: Tensor<FloatDType>, cu: number[]) => of.slice(1, cu[i]!, cu[i + 1])
        const first = Math.floor(cuSeqlensQ[i]! / bq) + i
        const [ownRows, ownColumns] = [Math.ceil(sq / bq), Math.ceil(sk / bk)]
        const ownTable = Uint8Array.from(
          { length: ownRows * ownColumns },
          (_, at) => table[(first + Math.floor(at / ownColumns)) * columns + (at % ownColumns)]!,
        )
        const options = { sq, sk, block, device }
        const single = Mask.fromBlocks(
          tensor(ownTable, [1, 1, ownRows, ownColumns], { device }),
          options,
        ).union(
          Mask.fromTokens(
            { columns: sk > 3 ? [3] : [], diagonals: [0, 9].filter((x) => x < sk) },
            options,
          ),
        )
        const alone = compute(single, [
          own(q.tensor, cuSeqlensQ),
          own(k.tensor, cuSeqlensK),
          own(v.tensor, cuSeqlensK),
          own(dout.tensor, cuSeqlensQ),
        ])
        for (const [n, cu] of [cuSeqlensQ, cuSeqlensQ, cuSeqlensK, cuSeqlensK].entries()) {
          const expected = await alone[n]!.read({ as: 'float32' })
          const error = maxError(await own(packed[n]!, cu).read({ as: 'float32' }), expected)
          const most = 1e-5 * Math.max(1, largest(expected))
          expect(error, JSON.stringify({ parts, i, block, n })).toBeLessThan(most)
        }
      }
    }
  })

  it('splits into parts that merge', async () => {
    const rng = random(75)
    const c = { ...plainCase(rng), b: 1, sq: 100, sk: 200, d: 64, dv: 64, hq: 2, hk: 1 }
    const { q, k, v } = await inputs(rng, c, 'float32', device)
    const whole = Uint8Array.from({ length: 2 * 4 }, () => (rng.chance(0.6) ? 1 : 0))
    const side = whole.map((listed) => (rng.chance(0.5) ? listed : 0))
    const other = whole.map((listed, i) => listed - side[i]!)
    const run = (table: Uint8Array) =>
      attention(q.tensor, k.tensor, v.tensor, {
        mask: Mask.fromBlocks(tensor(table, [1, 1, 2, 4], { device }), {
          sq: 100,
          sk: 200,
          block: 64,
        }),
      })
    const joined = merge([run(side), run(other)])
    const expected = run(whole)
    expect(maxError(await joined.out.read(), await expected.out.read())).toBeLessThan(1e-5)
    expect(maxError(await joined.lse.read(), await expected.lse.read())).toBeLessThan(1e-5)
  })

  it('does what the definition of its lists promises', async () => {
    const rng = random(80)
    const [sq, sk, block, heads, d] = [150, 300, 64, 4, 16]
    const [rows, columns] = [Math.ceil(sq / block), Math.ceil(sk / block)]
    const draw = async (s: number, h: number) =>
      (await sample(rng, [1, s, h, d], 'float32', device, { strided: false })).tensor
    const [q, k, v] = [await draw(sq, heads), await draw(sk, 2), await draw(sk, 2)]
    const of = (listed: (head: number, row: number, column: number) => boolean) => {
      const table = range(heads).flatMap((h) =>
        range(rows).flatMap((r) => range(columns).map((c) => Number(listed(h, r, c)))),
      )
      const shape = [1, heads, rows, columns]
      return Mask.fromBlocks(tensor(Uint8Array.from(table), shape, { device }), { sq, sk, block })
    }
    const run = async (mask: Mask, keys = k, values = v) => {
      const { out, lse } = attention(q, keys, values, { mask })
      return [await out.read({ as: 'float32' }), await lse.read()] as const
    }
    const some = range(heads * rows * columns).map(() => rng.chance(0.4))
    const listed = (h: number, r: number, c: number) => some[(h * rows + r) * columns + c]!
    const position = (row: number) => sk - sq + Math.min((row + 1) * block, sq) - 1
    const plain = await run(of(listed))

    // blocks that nobody of a row may see change nothing
    expect(await run(of((h, r, c) => listed(h, r, c) || c * block > position(r)))).toEqual(plain)

    // one block a row, whose values are the same
    const one = of((_, r, c) => c === r)
    const constant = tensor(
      Float32Array.from({ length: sk * 2 * d }, (_, i) => (i % d) - 3),
      v.shape,
      {
        device,
      },
    )
    const same = Float32Array.from({ length: sq * heads * d }, (_, i) => (i % d) - 3)
    expect(maxError((await run(one, k, constant))[0], same)).toBeLessThan(1e-5)

    // values that tell keys apart give the weights, which sum to 1
    const tell = tensor(
      Float32Array.from({ length: sk * 2 * d }, (_, i) =>
        Number(Math.floor(i / (2 * d)) % d === i % d),
      ),
      v.shape,
      { device },
    )
    const [weights, sums] = await run(
      of((_, __, c) => c < 2),
      k,
      tell,
    )
    const totals = Float32Array.from({ length: sq * heads }, (_, i) =>
      weights.subarray(i * d, (i + 1) * d).reduce((sum, x) => sum + x, 0),
    )
    expect(
      maxError(
        totals,
        totals.map(() => 1),
      ),
    ).toBeLessThan(1e-5)
    expect(weights.every((x) => x >= 0)).toBe(true)
    expect(sums.every(Number.isFinite)).toBe(true)

    // what all keys have in common moves lse alone
    const shift = Float32Array.from(rng.normals(d))
    const moved = await run(of(listed), add(k, tensor(shift, [1, 1, 1, d], { device })))
    expect(maxError(moved[0], plain[0])).toBeLessThan(1e-4)
    const rowsOfQ = await q.read()
    const expected = plain[1].map((lse, at) => {
      const [h, i] = [Math.floor(at / sq), at % sq]
      const own = rowsOfQ.subarray((i * heads + h) * d, (i * heads + h + 1) * d)
      return lse + own.reduce((sum, x, e) => sum + x * shift[e]!, 0) / Math.sqrt(d)
    })
    expect(maxError(moved[1], expected)).toBeLessThan(1e-4)

    // groups of tokens, half of the heads half a group on (shifted sparse attention)
    const group = 128
    const shifted = (h: number, t: number) => Math.floor((t + (h < 2 ? 0 : group / 2)) / group)
    const square = range(2).flatMap((shared) =>
      range(columns).flatMap((r) =>
        range(columns).map((c) =>
          Number(shifted(2 * shared, r * block) === shifted(2 * shared, c * block)),
        ),
      ),
    )
    const table = tensor(Uint8Array.from(square), [1, 2, columns, columns], { device })
    const seen = await Mask.fromBlocks(table, { sq: sk, block }).toDense()
    for (let at = 0; at < seen.length; at++) {
      const [h, i, t] = [Math.floor(at / sk / sk), Math.floor(at / sk) % sk, at % sk]
      if (seen[at] !== Number(t <= i && shifted(2 * h, i) === shifted(2 * h, t)))
        expect.fail(`${[h, i, t]}`)
    }
  })

  it('counts the visible keys in lse where all keys are zero', async () => {
    const rng = random(76)
    const m = drawMask(rng, 1, 2, 130, 257)
    const zero = (s: number) => tensor(new Float32Array(s * 2 * 16), [1, s, 2, 16], { device })
    const { lse } = attention(zero(130), zero(257), zero(257), { mask: maskOf(rng, m, device) })
    const values = await lse.read()
    for (let at = 0; at < values.length; at++) {
      let keys = 0
      for (let t = 0; t < 257; t++) if (sees(m, 0, Math.floor(at / 130), at % 130, t)) keys++
      expect(Math.round(Math.exp(values[at]!))).toBe(keys)
    }
  })

  it('sees documents and windows as they are defined', async () => {
    const begins = [0, 50, 50, 131, 200]
    const options = { sq: 170, sk: 200, device }
    const documents = Mask.fromDocuments(begins, options)
    const window = Mask.fromWindow({ window: 20, sinkTokens: 3 }, options)
    const both = documents.intersect(window)
    const document = (t: number) => begins.findLastIndex((begin) => begin <= t)
    const [a, b, c] = await Promise.all([documents.toDense(), window.toDense(), both.toDense()])
    for (let i = 0; i < 170; i++)
      for (let t = 0; t < 200; t++) {
        const p = 30 + i
        const same = t <= p && document(t) === document(p)
        const near = t <= p && (t > p - 20 || t < 3)
        expect([a[i * 200 + t], b[i * 200 + t], c[i * 200 + t]], `${i} ${t}`).toEqual(
          [same, near, same && near].map(Number),
        )
      }
    const rng = random(77)
    const q = await sample(rng, [1, 170, 2, 16], 'float32', device)
    const k = await sample(rng, [1, 200, 2, 16], 'float32', device)
    const whole = await attention(q.tensor, k.tensor, k.tensor, { mask: documents }).out.read()
    const last = await attention(
      q.tensor.slice(1, 101),
      k.tensor.slice(1, 131),
      k.tensor.slice(1, 131),
      {
        causal: true,
      },
    ).out.read()
    expect(maxError(whole.subarray(101 * 32), last)).toBeLessThan(1e-5)
  })

  it('joins what is of one sequence with what is of several', async () => {
    const rng = random(97)
    const options = { sq: 20, sk: 24, block: 4, device }
    const table = tensor(
      Uint8Array.from({ length: 2 * 30 }, () => rng.below(2)),
      [2, 1, 5, 6],
      { device },
    )
    const documents = Mask.fromDocuments([0, 10, 24], options)
    const lists = Mask.fromBlocks(table, options)
    const alone = await Promise.all(
      range(2).map((i) =>
        Mask.fromBlocks(table.slice(0, i, i + 1).contiguous(), options)
          .intersect(documents)
          .toDense(),
      ),
    )
    const expected = alone.flatMap((dense) => [...dense])
    const q = (await sample(rng, [2, 20, 2, 16], 'float32', device)).tensor
    const k = (await sample(rng, [2, 24, 2, 16], 'float32', device)).tensor
    for (const mask of [documents.intersect(lists), lists.intersect(documents)]) {
      expect([...(await mask.toDense())]).toEqual(expected)
      expect(await mask.count()).toBe(expected.filter(Boolean).length)
      const own = attention(q.slice(0, 1), k.slice(0, 1), k.slice(0, 1), {
        mask: Mask.fromBlocks(table.slice(0, 1).contiguous(), options).intersect(documents),
      })
      const { out } = attention(q, k, k, { mask })
      expect(await out.slice(0, 1).read()).toEqual(await own.out.read())
    }
  })

  it('joins masks of one cache', async () => {
    const [sq, sk] = [3, 128]
    const options = { sq, sk, block: [4, 2], device } as const
    const searched = (cacheSeqlens: number[]) => {
      const b = cacheSeqlens.length
      const zeros = (s: number) =>
        tensor(new Float32Array(b * s * 32), [b, s, 2, 16], { device }) as Tensor<'float32'>
      const own = { topK: 16, block: [4, 2], window: 8, sinkTokens: 4, cacheSeqlens } as const
      return hip(zeros(sq), zeros(sk), own)
    }
    const one = searched([100])
    const all = Mask.fromBlocks(
      tensor(new Uint8Array(2 * 64).fill(1), [2, 1, 1, 64], { device }),
      options,
    )
    // 98 + 99 + 100 keys of two heads of two sequences
    for (const mask of [one.union(all), all.union(one), all.intersect(all).union(one)])
      expect(await mask.count()).toBe(4 * 297)
    const heads = Mask.fromHeads([one, all], options)
    expect(await heads.count()).toBe(2 * 297 + (await one.count()))
    const two = searched([100, 40])
    for (const [x, y] of [
      [one, two],
      [two, one],
    ] as const)
      expect((await failure(() => x.union(y))).message).toMatch(
        /^mask: other must be a mask of a cache of [12] sequences, got [12]$/,
      )
    expect((await failure(() => Mask.fromHeads([two, one], options))).message).toBe(
      'mask: heads[1] must be a mask of a cache of 2 sequences, got 1',
    )
  })

  it('intersects with what sees nothing, or everything', async () => {
    const options = { sq: 20, block: 4, device }
    const nothing = Mask.fromWindow({}, options)
    const everything = Mask.fromWindow({ sinkTokens: 20 }, options)
    const documents = Mask.fromDocuments([0, 10, 20], options)
    const lists = Mask.fromTokens({ columns: [0, 12], diagonals: [1] }, options)
    for (const mask of [lists, documents, everything, documents.intersect(lists)]) {
      expect(await mask.intersect(nothing).count()).toBe(0)
      expect(await nothing.intersect(mask).count()).toBe(0)
      expect(await mask.intersect(everything).toDense()).toEqual(await mask.toDense())
      expect(await everything.intersect(mask).toDense()).toEqual(await mask.toDense())
    }
    // bounds of rows are one list
    const other = Mask.fromDocuments([0, 5, 20], options)
    expect((await failure(() => documents.intersect(other))).message).toBe(
      'mask: other must have no bounds of rows beside such bounds, got some',
    )
  })

  it('keeps documents of packed sequences apart', async () => {
    const packed = { cuSeqlensQ: [0, 4, 4, 10], cuSeqlensK: [0, 9, 12, 20] }
    const begins = [0, 7, 15, 20]
    const mask = Mask.fromDocuments(begins, { sq: 10, sk: 20, causal: false, ...packed, device })
    const seen = await mask.toDense()
    const document = (t: number) => begins.findLastIndex((begin) => begin <= t)
    for (const [i, from] of packed.cuSeqlensK.slice(0, 3).entries()) {
      const [sq, to] = [
        packed.cuSeqlensQ[i + 1]! - packed.cuSeqlensQ[i]!,
        packed.cuSeqlensK[i + 1]!,
      ]
      for (let row = 0; row < sq; row++)
        for (let t = from; t < to; t++)
          expect(seen[(i * 10 + row) * 20 + t - from], `${[i, row, t]}`).toBe(
            Number(document(t) === document(to - sq + row)),
          )
    }
    const q = tensor(new Float32Array(10 * 16), [1, 10, 1, 16], { device })
    const k = tensor(new Float32Array(20 * 16), [1, 20, 1, 16], { device })
    const { lse } = attention(q, k, k, { mask })
    const keys = (await lse.read()).reduce((sum, x) => sum + Math.round(Math.exp(x)), 0)
    expect(keys).toBe(await mask.count())
    const long = { sq: 10, sk: 20, cuSeqlensQ: [0, 6, 10], cuSeqlensK: [0, 5, 20], device }
    expect((await failure(() => Mask.fromDocuments([0, 20], long))).message).toBe(
      'mask: sq must be an integer from 0 to 5, got 6',
    )
  })

  it('keeps documents apart at the ends of caches', async () => {
    const rng = random(314)
    const [sq, sk, hk, page] = [3, 64, 2, 16]
    const begins = [0, 20, 20, 39, 50, 64]
    const document = (t: number) => begins.findLastIndex((begin) => begin <= t)
    const cacheSeqlens = [41, 64, 3, 21]
    const b = cacheSeqlens.length
    const q = (await sample(rng, [b, sq, 4, 16], 'float32', device)).tensor
    const k = (await sample(rng, [b, sk, hk, 16], 'float32', device, { strided: false })).tensor
    for (const causal of [true, false]) {
      const about = { sq, sk, causal, device }
      const mask = Mask.fromDocuments(begins, { ...about, cacheSeqlens })
      const dense = await mask.toDense()
      let [seen, causalPairs] = [0, 0]
      for (const [i, length] of cacheSeqlens.entries())
        for (let row = 0; row < sq; row++)
          for (let t = 0; t < sk; t++) {
            const p = length - sq + row
            const inside = t < length && (!causal || t <= p)
            const own = inside && document(t) === document(p)
            expect(dense[(i * sq + row) * sk + t], `${[causal, i, row, t]}`).toBe(Number(own))
            seen += Number(own)
            causalPairs += Number(inside)
          }
      expect(await mask.count()).toBe(seen)
      expect(await mask.density()).toBeCloseTo(seen / causalPairs, 12)
      // its lengths come with it, and are the same where the call has them too
      const { out, lse } = attention(q, k, k, { mask })
      const given = attention(q, k, k, { mask, cacheSeqlens })
      expect(await given.out.read()).toEqual(await out.read())
      const blockTable = tensor(range(b * 4), [b, 4], { dtype: 'int32', device })
      const pages = k.reshape([b * 4, page, hk, 16])
      const paged = attention(q, pages, pages, { mask, blockTable })
      expect(maxError(await paged.out.read(), await out.read())).toBeLessThan(1e-5)
      const { dk } = attentionBackward(q, k, k, out, lse, out, { mask })
      for (const [i, length] of cacheSeqlens.entries()) {
        const [own, keys] = [q.slice(0, i, i + 1), k.slice(0, i, i + 1).slice(1, 0, length)]
        const starts = [...begins.filter((begin) => begin < length), length]
        const alone = Mask.fromDocuments(starts, { ...about, sk: length })
        const result = attention(own, keys, keys, { mask: alone })
        const rows = out.slice(0, i, i + 1)
        expect(maxError(await rows.read(), await result.out.read())).toBeLessThan(1e-5)
        const behind = await dk
          .slice(0, i, i + 1)
          .slice(1, length)
          .read()
        expect(behind.every((x) => x === 0)).toBe(true)
      }
    }
    // bounds that end with all sk keys are of no shorter cache
    const whole = Mask.fromDocuments(begins, { sq, sk, device })
    const options = { topK: 8, block: [4, 2], window: 8, sinkTokens: 4, cacheSeqlens } as const
    const listed = hip(q, k, options)
    const remedy =
      'must be made with cacheSeqlens, where its rows stand at the ends of caches, got one without'
    expect((await failure(() => attention(q, k, k, { mask: whole, cacheSeqlens }))).message).toBe(
      `attention: mask ${remedy}`,
    )
    expect((await failure(() => whole.intersect(listed))).message).toBe(`mask: this ${remedy}`)
    expect((await failure(() => listed.intersect(whole))).message).toBe(`mask: other ${remedy}`)
    const both = listed.intersect(Mask.fromDocuments(begins, { sq, sk, device, cacheSeqlens }))
    const [of, all] = await Promise.all([both.toDense(), listed.toDense()])
    of.forEach((bit, at) => {
      const [t, row] = [at % sk, Math.floor(at / sk) % sq]
      const p = cacheSeqlens[Math.floor(at / (sk * sq * listed.heads))]! - sq + row
      if (bit !== Number(all[at] && document(t) === document(p))) expect(bit, `${at}`).toBe(-1)
    })
    for (const [wrong, message] of [
      [{ cacheSeqlens: [2] }, 'mask: cacheSeqlens[0] must be an integer from 3 to 64, got 2'],
      [{ cacheSeqlens: 9 }, 'mask: cacheSeqlens must be an array of numbers, got 9'],
      [
        { cacheSeqlens: [64], cuSeqlensQ: [0, 3], cuSeqlensK: [0, 64] },
        'mask: cacheSeqlens cannot be combined with cuSeqlensQ',
      ],
    ] as const)
      expect(
        (await failure(() => Mask.fromDocuments(begins, { sq, sk, ...(wrong as object) }))).message,
      ).toBe(message)
  })

  it('brings the lengths of its cache to a call', async () => {
    const rng = random(315)
    const q = (await sample(rng, [2, 3, 2, 16], 'float32', device)).tensor
    const k = (await sample(rng, [2, 64, 2, 16], 'float32', device)).tensor
    const cacheSeqlens = [41, 20]
    const options = { topK: 8, block: [4, 2], window: 8, sinkTokens: 4, cacheSeqlens } as const
    const mask = hip(q, k, options)
    const given = attention(q, k, k, { mask, cacheSeqlens })
    expect(await attention(q, k, k, { mask }).out.read()).toEqual(await given.out.read())
    const dense = attention(q, k, k, { causal: true, cacheSeqlens })
    const [own, all] = await Promise.all([given.lse.read(), dense.lse.read()])
    const masses = await achievedMass(q, k, mask)
    for (const [head, mass] of masses.entries()) {
      let sum = 0
      for (const b of [0, 1])
        for (let i = 0; i < 3; i++) {
          const at = (b * 2 + head) * 3 + i
          sum += Math.exp(own[at]! - all[at]!) / 6
        }
      expect(mass).toBeCloseTo(sum, 5)
    }
  })

  it('takes tokens of every head beside tokens of all', async () => {
    const options = { sq: 9, sk: 12, device }
    const lists = (b: number, heads: number) => ({
      count: tensor(new Int32Array(b * heads).fill(1), [b, heads], { device }),
      index: tensor(
        Int32Array.from({ length: b * heads }, (_, i) => i),
        [b, heads, 1],
        { device },
      ),
    })
    const mask = Mask.fromTokens({ columns: [7], diagonals: lists(2, 3) }, options)
    expect([mask.sequences, mask.heads]).toEqual([2, 3])
    const dense = await mask.toDense()
    for (let at = 0; at < dense.length; at++) {
      const [line, p, t] = [Math.floor(at / 108), 3 + (Math.floor(at / 12) % 9), at % 12]
      expect(dense[at], `${[line, p, t]}`).toBe(Number(t <= p && (t === 7 || p - t === line)))
    }
    const wrong = async (columns: [number, number], diagonals: [number, number], more = {}) =>
      (
        await failure(() =>
          Mask.fromTokens(
            { columns: lists(...columns), diagonals: lists(...diagonals) },
            { ...options, ...more },
          ),
        )
      ).message
    expect(await wrong([2, 3], [1, 4])).toBe(
      'mask: diagonals must be of 1 or 2 sequences and 1 or 3 heads, got 1 and 4',
    )
    expect(await wrong([2, 1], [1, 1], { cuSeqlensQ: [0, 9], cuSeqlensK: [0, 12] })).toBe(
      'mask: columns must be of 1 or 1 sequences and 1 or 1 heads, got 2 and 1',
    )
    const packed = { sq: 9, sk: 12, cuSeqlensQ: [0, 4, 9], cuSeqlensK: [0, 4, 12], device }
    const table = tensor(new Uint8Array(4), [2, 1, 2, 1], { device })
    expect((await failure(() => Mask.fromBlocks(table, packed))).message).toBe(
      'mask: b must be 1 with cuSeqlensQ, got 2',
    )
  })

  it('lets every head see as its own mask says', async () => {
    const rng = random(78)
    for (const [sq, sk, causal, dtype] of [
      [150, 150, true, 'float32'],
      [70, 301, true, 'bfloat16'],
      [150, 97, false, 'float16'],
    ] as const) {
      const options = { sq, sk, causal, block: 32, device }
      const [rows, columns] = [Math.ceil(sq / 32), Math.ceil(sk / 32)]
      const table = Uint8Array.from({ length: 2 * 6 * rows * columns }, () => rng.below(2))
      const listed = Mask.fromBlocks(tensor(table, [2, 6, rows, columns], { device }), options)
      const shared = Mask.fromTokens({ columns: [2, 40], diagonals: [0, 7] }, options).union(
        Mask.fromWindow({ window: 3, sinkTokens: 1 }, options),
      )
      const single = (i: number) => {
        const own = tensor(table, [2, 6, rows, columns], { device }).slice(0, i, i + 1)
        return Mask.fromBlocks(own.slice(1, 2, 3).contiguous(), options)
      }
      const streaming = { window: 40, sinkTokens: 5 }
      const mask = Mask.fromHeads(['dense', streaming, listed, shared, { window: 1 }, {}], options)
      const alone = (i: number) => [
        Mask.fromWindow({ sinkTokens: sk }, options),
        Mask.fromWindow(streaming, options),
        single(i),
        shared,
        Mask.fromWindow({ window: 1 }, options),
        Mask.fromWindow({}, options),
      ]
      const q = await sample(rng, [2, sq, 6, 32], dtype, device, { strided: false })
      const k = await sample(rng, [2, sk, 2, 32], dtype, device, { strided: false })
      const { out, lse } = attention(q.tensor, k.tensor, k.tensor, { mask })
      for (let at = 0; at < 12; at++) {
        const [i, head] = [at % 2, at >> 1]
        const of = (x: Tensor<FloatDType>, dimension: number, head: number) =>
          x.slice(0, i, i + 1).slice(dimension, head, head + 1)
        const kv = of(k.tensor, 2, Math.floor(head / 3))
        const other = attention(of(q.tensor, 2, head), kv, kv, { mask: alone(i)[head]! })
        const read = (x: Tensor<FloatDType>) => x.contiguous().read({ as: 'float32' })
        const text = `${sq} ${sk} ${dtype} sequence ${i} head ${head}`
        const error = maxError(await read(of(out, 2, head)), await read(other.out))
        expect(error, text).toBeLessThan(dtype === 'float32' ? 1e-5 : 2e-2)
        const [a, b] = [await read(of(lse, 1, head)), await read(other.lse)]
        for (const [row, value] of a.entries())
          if (value !== b[row]) expect(Math.abs(value - b[row]!), text).toBeLessThan(1e-3)
      }
    }
    const options = { sq: 64, device }
    const message = async (heads: unknown) =>
      (await failure(() => Mask.fromHeads(heads as ['dense'], options))).message
    expect(await message([])).toBe(
      'mask: heads must be a list of what each head sees, got an array of 0',
    )
    expect(await message(['streaming'])).toBe(
      'mask: heads[0] must be "dense", a window and sinks, or a mask, got "streaming"',
    )
    expect(await message(['dense', { window: -1 }])).toBe(
      'mask: heads[1].window must be an integer at least 0, got -1',
    )
    expect(await message([{ windows: 1 }])).toBe(
      'mask: unknown option "windows"; did you mean "window"?',
    )
    const batch = (n: number) =>
      Mask.fromBlocks(tensor(new Uint8Array(n), [n, 1, 1, 1], { device }), options)
    expect(await message([batch(2), batch(3), 'dense'])).toBe(
      'mask: heads[1] must be a mask of 1 or 2 sequences, got 3',
    )
    expect(await message([Mask.fromWindow({ window: 1 }, { sq: 65 })])).toBe(
      'mask: heads[0] must be a mask with sq 64, got 65',
    )
  })

  it('takes rows of packed sequences one after the other, in every format', async () => {
    const rng = random(92)
    for (const [block, lengths] of [
      [16, [40, 0, 16, 5, 33]],
      [64, [64, 64]],
      [32, [1, 100]],
    ] as const) {
      const cuSeqlensQ = starts(lengths)
      const sq = cuSeqlensQ.at(-1)!
      const options = { sq, block, cuSeqlensQ, cuSeqlensK: cuSeqlensQ, device }
      const rows = lengths.flatMap((length) => range(Math.ceil(length / block)))
      const columns = Math.ceil(sq / block)
      const listed = rows.map((own) => range(own + 1).filter(() => rng.chance(0.6)))
      const place = (values: number[], shape: number[]) =>
        tensor(values, shape, { dtype: 'int32', device })
      const counts = listed.map((list) => list.length)
      const table = listed.flatMap((list) => range(columns).map((c) => Number(list.includes(c))))
      const padded = listed.flatMap((list) => range(columns).map((i) => list[i] ?? -1))
      const pairs = listed.flatMap((list, row) => list.map((c) => row * columns + c))
      const masks = {
        blocks: Mask.fromBlocks(
          tensor(Uint8Array.from(table), [1, 1, rows.length, columns], { device }),
          options,
        ),
        lists: Mask.fromLists(
          {
            count: place(counts, [1, 1, rows.length]),
            index: place(padded, [1, 1, rows.length, columns]),
          },
          options,
        ),
        rows: Mask.fromRows(
          {
            rowPtr: place(starts(counts), [rows.length + 1]),
            column: place([...listed.flat(), 0], [listed.flat().length + 1]),
          },
          options,
        ),
        pairs: Mask.fromPairs(place([...pairs, -1], [1, 1, pairs.length + 1]), options),
      }
      for (const [format, mask] of Object.entries(masks)) {
        const dense = await mask.toDense()
        lengths.forEach((length, i) => {
          const first = lengths
            .slice(0, i)
            .reduce<number>((sum, n) => sum + Math.ceil(n / block), 0)
          for (let p = 0; p < length; p++)
            for (let key = 0; key < length; key++) {
              const own = listed[first + Math.floor(p / block)]!
              const sees = key <= p && own.includes(Math.floor(key / block))
              expect(dense[(i * sq + p) * sq + key], `${format} ${i} ${p} ${key}`).toBe(
                Number(sees),
              )
            }
        })
      }
      const bits = listed.map((list) => list.reduce((sum, c) => sum | (1 << c), 0))
      const ofBits = Mask.fromBits(place(bits, [1, 1, rows.length, 1]), options)
      expect(await ofBits.toDense()).toEqual(await masks.rows.toDense())
      const wrong = tensor(new Uint8Array(columns), [1, 1, 1, columns], { device })
      expect((await failure(() => Mask.fromBlocks(wrong, options))).message).toBe(
        `mask: table must be [b, heads, ${rows.length}, ${columns}], got [1, 1, 1, ${columns}]`,
      )
      const few = { count: place([0], [1, 1, 1]), index: place([0], [1, 1, 1, 1]) }
      expect((await failure(() => Mask.fromLists(few, options))).message).toBe(
        `mask: index must have ${rows.length} rows of blocks, got 1`,
      )
    }
  })

  it('lists runs that begin anywhere', async () => {
    const rng = random(95)
    for (const [sq, sk, run, causal] of [
      [70, 150, 64, true],
      [33, 33, 16, false],
      [100, 257, 1, true],
      [1, 90, 128, false],
    ] as const) {
      const rows = Math.ceil(sq / 32)
      const starts = Array.from({ length: 2 * rows }, () =>
        range(rng.below(5)).map(() => rng.below(sk)),
      )
      const index = starts.flatMap((list) => range(5).map((i) => list[i] ?? -1))
      const place = (values: number[], shape: number[]) =>
        tensor(values, shape, { dtype: 'int32', device })
      const count = place(
        starts.map((list) => list.length),
        [1, 2, rows],
      )
      const options = { sq, sk, causal, device, block: [32, run] as const }
      const mask = Mask.fromRuns({ count, index: place(index, [1, 2, rows, 5]) }, options)
      const dense = await mask.toDense()
      for (let i = 0; i < dense.length; i++) {
        const [line, t] = [Math.floor(i / sk), i % sk]
        const [head, query] = [Math.floor(line / sq), line % sq]
        const own = starts[head * rows + Math.floor(query / 32)]!
        const sees = own.some((first) => t >= first && t < first + run)
        expect(dense[i], `${i}`).toBe(Number(sees && (!causal || t <= sk - sq + query)))
      }
    }
  })

  it('joins masks of kv heads with masks of their queries', async () => {
    const rng = random(93)
    const options = { sq: 70, sk: 90, block: 16, device }
    const draw = (heads: number) =>
      Mask.fromBlocks(
        tensor(
          Uint8Array.from({ length: heads * 30 }, () => rng.below(2)),
          [1, heads, 5, 6],
          { device },
        ),
        options,
      )
    const [shared, own] = [draw(2), draw(6)]
    const [a, b] = [await shared.toDense(), await own.toDense()]
    const pairs = 70 * 90
    for (const joined of [shared.union(own), own.union(shared)])
      expect(await joined.toDense()).toEqual(
        b.map((x, i) => x | a[Math.floor(i / pairs / 3) * pairs + (i % pairs)]!),
      )
    for (const joined of [shared.intersect(own), own.intersect(shared)])
      expect(await joined.toDense()).toEqual(
        b.map((x, i) => x & a[Math.floor(i / pairs / 3) * pairs + (i % pairs)]!),
      )
    expect((await failure(() => own.union(draw(4)))).message).toBe(
      'mask: other must have heads 6, got 4',
    )
    // a window of all keys is everything
    const all = Mask.fromWindow({ window: 90 }, options)
    expect(await all.intersect(own).toDense()).toEqual(b)
    const two = Mask.fromWindow({ window: 3, sinkTokens: 2 }, options)
    expect((await failure(() => own.intersect(two))).message).toBe(
      'mask: masks that intersect must each have one and the same kind of lists, got blocks with window and sinkTokens',
    )
  })

  it('counts what it sees, and lets others have their turn', async () => {
    const rng = random(94)
    for (let n = 0; n < 40; n++) {
      const [sq, sk] = [rng.pick([1, 33, 100]), rng.pick([1, 64, 77, 130])]
      const c = drawMask(rng, 2, 2, sq, sk)
      const mask = maskOf(rng, c, device)
      let counted = 0
      for (const [b, head] of [
        [0, 0],
        [0, 1],
        [1, 0],
        [1, 1],
      ] as const)
        for (let i = 0; i < sq; i++)
          for (let t = 0; t < sk; t++) counted += Number(sees(c, b, head, i, t))
      const own = mask.sequences * mask.heads
      counted *= own / 4
      expect(await mask.count(), `${mask}`).toBe(counted)
      const all = range(sq).reduce(
        (sum, i) => sum + (c.causal ? Math.max(sk - sq + i + 1, 0) : sk),
        0,
      )
      expect(await mask.density()).toBeCloseTo(all === 0 ? 0 : counted / (own * all), 12)
    }
    const tokens = Array.from({ length: 500 }, () => rng.below(49_152))
    const large = Mask.fromTokens({ columns: tokens, diagonals: tokens }, { sq: 49_152, device })
    let [turns, done] = [0, false]
    const next = () => {
      turns++
      if (!done) setImmediate(next)
    }
    setImmediate(next)
    expect(await large.density()).toBeGreaterThan(0.01)
    done = true
    expect(turns).toBeGreaterThan(5)
  })

  it('is of the packed sequences that it was made with', async () => {
    const q = tensor(new Float32Array(64 * 16), [1, 64, 1, 16], { device })
    const [cuSeqlensQ, cuSeqlensK] = [
      [0, 10, 64],
      [0, 10, 64],
    ]
    const packed = { cuSeqlensQ, cuSeqlensK }
    const table = tensor(new Uint8Array(6 * 4).fill(1), [1, 1, 6, 4], { device })
    const mask = Mask.fromBlocks(table, { sq: 64, block: 16, ...packed, device })
    const out = async (options: object) =>
      (await attention(q, q, q, { mask, ...options }).lse.read()) as Float32Array
    const own = await out({})
    expect(await out(packed)).toEqual(own)
    const offsets = tensor(cuSeqlensQ, [3], { dtype: 'int32', device })
    expect(await out({ cuSeqlensQ: offsets, cuSeqlensK: offsets })).toEqual(own)
    // what tensors hold is not known here: the mask's own are taken
    const others = tensor([0, 20, 64], [3], { dtype: 'int32', device })
    expect(await out({ cuSeqlensQ: others, cuSeqlensK: others })).toEqual(own)
    expect(await out({ cuSeqlensK: others })).toEqual(own)
    // whose blocks would stand elsewhere, and whose documents elsewhere still
    const documents = Mask.fromDocuments([0, 30, 64], { sq: 64, device })
    for (const [options, message] of [
      [
        { cuSeqlensQ: [0, 20, 64], cuSeqlensK: [0, 20, 64] },
        'cuSeqlensQ must be as the mask has it, 3 offsets, got 20 instead of 10 at index 1; leave it out',
      ],
      [
        { cuSeqlensK: [0, 10, 64, 64] },
        'cuSeqlensK must be as the mask has it, 3 offsets, got 4; leave it out',
      ],
      [
        { ...packed, mask: documents },
        'mask must be made with cuSeqlensQ, which then comes with it, got one without',
      ],
    ] as const)
      expect((await failure(() => attention(q, q, q, { mask, ...options }))).message).toBe(
        `attention: ${message}`,
      )
  })

  it('gives back what heads were made of', async () => {
    const options = { sq: 256, block: 64, device }
    const held = async () => {
      await synchronize(device)
      return memory(device).bytes
    }
    const table = tensor(new Uint8Array(16).fill(1), [1, 1, 4, 4], { device })
    const listed = Mask.fromBlocks(table, options)
    const before = await held()
    const modes = ['dense', { window: 4, sinkTokens: 9 }, listed] as const
    Mask.fromHeads(modes, options).dispose()
    expect(await held()).toBe(before)
    listed.dispose()
  })

  it('refuses lists that do not fit, at the call or at the read', async () => {
    const q = tensor(new Float32Array(128 * 16), [1, 128, 1, 16], { device })
    const int32 = (values: number[], shape: number[]) =>
      tensor(values, shape, { dtype: 'int32', device })
    const lists = (count: number, index: number[]) => ({
      count: int32([count, 0], [1, 1, 2]),
      index: int32([...index, 0, 0], [1, 1, 2, 2]),
    })
    const options = { sq: 128, block: 64 }
    for (const bad of [lists(2, [0, 2]), lists(1, [-1, 0]), lists(3, [0, 1]), lists(-1, [0, 1])]) {
      const error = await failure(() =>
        attention(q, q, q, { mask: Mask.fromLists(bad, options) }).out.read(),
      )
      expect(error.message).toMatch(/^mask\.pack: (index|count) must/)
    }
    const mask = Mask.fromLists(lists(1, [0, 0]), options)
    const wrong = await failure(() =>
      attention(q.slice(1, 0, 60), q, q, { mask: Mask.fromLists(lists(1, [0, 0]), options) }),
    )
    expect(wrong.message).toBe(
      'attention: mask must be of sq = 60 and sk = 128, got one of 128 and 128',
    )
    expect((await failure(() => attention(q, q, q, { mask, causal: false }))).message).toBe(
      'attention: causal must be as the mask has it, true, got false',
    )
    expect((await failure(() => attention(q, q, q, { mask, window: 3 }))).message).toBe(
      'attention: window cannot be combined with mask',
    )
  })

  it('refuses in the words of the caller', async () => {
    const options = { sq: 8, block: 4, device }
    const window = Mask.fromWindow({ window: 2 }, options)
    const int32 = (shape: number[]) =>
      tensor(new Int32Array(shape.reduce((all, size) => all * size, 1)), shape, { device })
    const wide = Mask.fromBlocks(tensor(new Uint8Array(1), [1, 1, 1, 1], { device }), { sq: 8 })
    const cases = [
      [
        () => Mask.fromTokens({ columns: [1, 1.5] }, options),
        'columns[1] must be an integer from 0 to 7, got 1.5',
      ],
      [
        () => Mask.fromTokens({ diagonals: [8] }, options),
        'diagonals[0] must be an integer from 0 to 7, got 8',
      ],
      [
        () => Mask.fromTokens({ columns: { count: int32([2]), index: int32([2]) } }, options),
        'columns must be a count [b, heads] and an index [b, heads, width], got [2] and [2]',
      ],
      [() => window.union(null as never), 'other must be a mask, got null'],
      [
        () => Mask.fromHeads([wide], options),
        'heads[0] must be a mask with block 4,4, got 128,128',
      ],
      [() => window.svg({ heads: 1 } as never), 'unknown option "heads"; did you mean "head"?'],
      [() => window.svg(null as never), 'options must be an object, got null'],
      [
        () => Mask.fromWindow({ window: null as never }, options),
        'window must be an integer at least 0, got null',
      ],
      [
        () => Mask.fromWindow({}, { sq: 4, sk: null as never }),
        'sk must be an integer at least 0, got null',
      ],
      [
        () => Mask.fromWindow({}, { sq: 4, device: 'nope' as never }),
        'device must be "cpu", "cuda" or "cuda:N", got "nope"',
      ],
    ] as const
    for (const [call, text] of cases) expect((await failure(call)).message).toBe(`mask: ${text}`)
  })

  it('may be of no sequences or heads', async () => {
    const options = { sq: 8, block: 4, device }
    const window = Mask.fromWindow({ window: 2 }, options)
    for (const [b, heads] of [
      [0, 1],
      [1, 0],
    ] as const) {
      const none = Mask.fromBlocks(tensor(new Uint8Array(0), [b, heads, 2, 2], { device }), options)
      for (const mask of [none.union(window), window.union(none), none.intersect(none)]) {
        expect([mask.sequences, mask.heads, await mask.count()]).toEqual([b, heads, 0])
        expect(await mask.svg()).toMatch(/<svg/)
        expect(await mask.density()).toBe(0)
      }
      if (heads) expect((await Mask.fromHeads([none, 'dense'], options).toDense()).length).toBe(0)
    }
  })

  it('draws and names itself', async () => {
    const mask = Mask.fromWindow({ window: 40, sinkTokens: 8 }, { sq: 300, device })
    expect(`${mask}`).toBe('Mask [1, 1, 300, 300] causal, window 40, sinkTokens 8')
    const blocks = tensor(new Uint8Array(6), [1, 2, 1, 3], { device })
    const listed = Mask.fromBlocks(blocks, { sq: 16, sk: 48, block: 16, causal: false })
    expect(inspect({ listed })).toBe('{ listed: Mask [1, 2, 16, 48] blocks of 16 x 16 }')
    const picture = await mask.svg({ size: 100 })
    expect(picture).toMatch(/^<svg .*<\/svg>$/)
    expect(picture.match(/<rect/g)!.length).toBeGreaterThan(90)
  })
})
