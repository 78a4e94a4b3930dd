import {
  attention,
  attentionBackward,
  type DType,
  empty,
  explain,
  type FloatDType,
  full,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, expectTypeOf, it } from 'vitest'
import { expectClose, largest, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random, type Sample, sample, starts } from '../support/random.js'
import {
  type AttentionCase,
  attentionReference,
  type Reference,
  reader,
} from '../support/reference.js'

// Out of float8 has another dtype
const range = (n: number) => Array.from({ length: n }, (_, i) => i)

const dtypes = [...floats, 'float8_e4m3fn'] as const
const resultOf = (dtype: (typeof dtypes)[number]) =>
  dtype === 'float8_e4m3fn' ? 'bfloat16' : dtype

// On Hopper's matrix instructions weights of float8 are of 8 bits as well
const isCoarse = (...call: Parameters<typeof attention>) =>
  call[0].dtype === 'float8_e4m3fn' && explain(attention, ...call).variant === 'sm90_wgmma'

const lengths = [1, 2, 3, 31, 63, 64, 65]
const longer = [...lengths, 113, 127, 130, 257]

function drawCase(rng: Random, dtype: DType): AttentionCase {
  const hk = rng.pick([1, 2, 3])
  // what the matrix instructions of newer GPUs take
  const plain = rng.chance(0.3)
  const d = rng.pick(plain ? [64, 128, 256] : [8, 16, 40, 64, 80, 96, 128, 192, 256])
  const some = (p: number) => !plain && rng.chance(p)
  const hq = hk * rng.pick([1, 1, 2, 4])
  const factors = (heads: number) =>
    Array.from({ length: heads }, () => Math.fround(0.5 + rng.next()))
  return {
    b: rng.pick([1, 2]),
    sq: rng.pick(rng.chance(0.4) ? longer : lengths),
    sk: rng.pick(rng.chance(0.4) ? longer : lengths),
    hq,
    hk,
    d,
    dv: some(0.3) ? rng.pick([8, 64, 72, 128, 256]) : d,
    causal: rng.chance(0.6),
    window: some(0.3) ? rng.pick([1, 2, 17, 64, 100, 1000]) : undefined,
    scale: rng.chance(0.7) ? 1 / Math.sqrt(d) : rng.pick([0.01, 0.3, 1]),
    softCap: some(0.25) ? rng.pick([2, 30]) : 0,
    slopes: some(0.25)
      ? Array.from(rng.normals(hq), (x) => Math.fround(Math.abs(x) * 0.1))
      : undefined,
    sink: some(0.25) ? Array.from(rng.normals(hq)) : undefined,
    ...(dtype === 'float8_e4m3fn' && rng.chance(0.7)
      ? { factors: { q: factors(hq), k: factors(hk), v: factors(hk) } }
      : {}),
  }
}

function optionsOf(c: AttentionCase) {
  return {
    causal: c.causal,
    scale: c.scale,
    softCap: c.softCap,
    ...(c.window === undefined ? {} : { window: c.window }),
    ...(c.slopes ? { slopes: c.slopes } : {}),
    ...(c.sink ? { sink: c.sink } : {}),
    ...(c.factors ? { qScale: c.factors.q, kScale: c.factors.k, vScale: c.factors.v } : {}),
  }
}

async function expectReference(
  result: { out: Tensor<FloatDType>; lse: Tensor<'float32'> },
  reference: Reference,
  dtype: FloatDType,
  what: string,
): Promise<void> {
  const out = await result.out.read({ as: 'float32' })
  const lse = await result.lse.read()
  const { terms, unit } = reference
  expectClose(out, reference.out, reference.plain, dtype, `${what} out`, {
    exponent: terms,
    ...(unit ? { unit } : {}),
  })
  for (let i = 0; i < lse.length; i++) {
    // an empty row has no smaller neighbour to be close to
    if (reference.lse[i] === Number.NEGATIVE_INFINITY)
      expect(lse[i], `${what} lse`).toBe(Number.NEGATIVE_INFINITY)
  }
  expectClose(lse, reference.lse, reference.plainLse, 'float32', `${what} lse`, { terms })
}

describeDevices('attention', (device) => {
  describe.each(dtypes)('%s', (dtype) => {
    const result = resultOf(dtype)

    it('agrees with float64 on random shapes and options', async () => {
      const rng = random(1)
      const cases = device === 'cpu' ? 60 : 500
      for (let n = 0; n < cases; n++) {
        const c = drawCase(rng, dtype)
        const out = dtype === 'float8_e4m3fn' ? rng.pick(floats) : dtype
        const scale = rng.chance(0.1) ? 30 : 1
        const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device, { scale })
        const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device)
        const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device)
        const options = { ...optionsOf(c), ...(out === dtype ? {} : { dtype: out }) }
        const reference = attentionReference(
          { ...c, coarse: isCoarse(q.tensor, k.tensor, v.tensor, options) },
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
          out,
        )
        const got = attention(q.tensor, k.tensor, v.tensor, options)
        await expectReference(got, reference, out, JSON.stringify(c))
      }
    }, 300_000)

    it('keeps packed sequences apart', async () => {
      const rng = random(2)
      for (let n = 0; n < 12; n++) {
        const c = drawCase(rng, dtype)
        const count = rng.pick([1, 3, 5])
        const parts = Array.from({ length: count }, () => ({
          sq: rng.pick([0, 1, 5, 64, 70]),
          sk: rng.pick([0, 1, 9, 65, 130]),
        }))
        const cuSeqlensQ = starts(parts.map(({ sq }) => sq))
        const cuSeqlensK = starts(parts.map(({ sk }) => sk))
        const [totalQ, totalK] = [cuSeqlensQ.at(-1)!, cuSeqlensK.at(-1)!]
        const q = await sample(rng, [1, totalQ, c.hq, c.d], dtype, device)
        const k = await sample(rng, [1, totalK, c.hk, c.d], dtype, device)
        const v = await sample(rng, [1, totalK, c.hk, c.dv], dtype, device)
        const asTensor = rng.chance(0.5)
        const list = (values: number[]) =>
          asTensor ? tensor(values, undefined, { dtype: 'int32', device }) : values
        const options = {
          ...optionsOf(c),
          cuSeqlensQ: list(cuSeqlensQ),
          cuSeqlensK: list(cuSeqlensK),
        }
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, options)
        const coarse = isCoarse(q.tensor, k.tensor, v.tensor, options)
        expect(out.shape).toEqual([1, totalQ, c.hq, c.dv])
        for (const [i, part] of parts.entries()) {
          const shift =
            (read: ReturnType<typeof reader>, by: number): ReturnType<typeof reader> =>
            (_, row, head, e) =>
              read(0, row + by, head, e)
          const reference = attentionReference(
            { ...c, b: 1, ...part, coarse },
            shift(reader(q.values, totalQ, c.hq, c.d), cuSeqlensQ[i]!),
            shift(reader(k.values, totalK, c.hk, c.d), cuSeqlensK[i]!),
            shift(reader(v.values, totalK, c.hk, c.dv), cuSeqlensK[i]!),
            result,
          )
          const rows = [cuSeqlensQ[i]!, cuSeqlensQ[i + 1]!] as const
          const own = { out: out.slice(1, ...rows), lse: lse.slice(2, ...rows) }
          await expectReference(
            own,
            reference,
            result,
            `${JSON.stringify(parts)}[${i}] ${JSON.stringify(c)}`,
          )
        }
      }
    })

    it('reads a cache in pages, and nothing of unused ones', async () => {
      const rng = random(3)
      for (let n = 0; n < 24; n++) {
        const packed = n % 2 === 1
        const c = { ...drawCase(rng, dtype), b: packed ? rng.pick([1, 3, 40]) : 3 }
        const most = rng.pick([1, 1, 4, 33])
        const queries = range(c.b).map(() => (packed ? rng.pick([0, 1, 2, most]) : most))
        const pageSize = rng.pick([1, 2, 16, 64, 128])
        const used = range(c.b).map(() => rng.pick([0, 1, 17, 64, 150]))
        const maxPages = Math.max(...used.map((keys) => Math.ceil(keys / pageSize)), 1)
        const order = range(c.b * maxPages + 2).sort(() => rng.next() - 0.5)
        const table = used.map((keys, b) =>
          range(maxPages).map((i) =>
            i * pageSize < keys && queries[b]! > 0
              ? order[b * maxPages + i]!
              : rng.pick([-1, 2 ** 31 - 1, 0]),
          ),
        )
        const cuSeqlensQ = starts(queries)
        const shape = packed ? [1, cuSeqlensQ.at(-1)!] : [c.b, most]
        const q = await sample(rng, [...shape, c.hq, c.d], dtype, device)
        const pages = async (size: number) => {
          const shape = [order.length, pageSize, c.hk, size]
          const data = rng.normals(shape.reduce((a, x) => a * x, 1))
          const visible = new Set(
            table.flatMap((row, b) =>
              range(used[b]!).map(
                (t) => row[Math.floor(t / pageSize)]! * pageSize + (t % pageSize),
              ),
            ),
          )
          const row = c.hk * size
          for (let i = 0; i < order.length * pageSize; i++) {
            if (!visible.has(i)) data.fill(Number.NaN, i * row, (i + 1) * row)
          }
          const made = tensor(data, shape, { dtype, device })
          return { tensor: made, values: await made.read({ as: 'float32' }) } as Sample
        }
        const k = await pages(c.d)
        const v = await pages(c.dv)
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, {
          ...optionsOf(c),
          blockTable: tensor(table.flat(), [c.b, maxPages], { dtype: 'int32', device }),
          cacheSeqlens: used,
          ...(packed && { cuSeqlensQ }),
        })
        expect(out.shape).toEqual([...shape, c.hq, c.dv])
        for (const [b, sq] of queries.entries()) {
          const paged =
            (values: Float32Array, size: number): ReturnType<typeof reader> =>
            (_, t, head, e) =>
              values[
                ((table[b]![Math.floor(t / pageSize)]! * pageSize + (t % pageSize)) * c.hk + head) *
                  size +
                  e
              ]!
          const [batch, first] = packed ? [0, cuSeqlensQ[b]!] : [b, 0]
          const rows = reader(q.values, shape[1]!, c.hq, c.d)
          const reference = attentionReference(
            { ...c, b: 1, sq, sk: used[b]! },
            (_, row, head, e) => rows(batch, first + row, head, e),
            paged(k.values, c.d),
            paged(v.values, c.dv),
            result,
          )
          const own = (x: Tensor, axis: number) =>
            x.slice(0, batch, batch + 1).slice(axis, first, first + sq)
          await expectReference(
            { out: own(out, 1) as Tensor<FloatDType>, lse: own(lse, 2) as Tensor<'float32'> },
            reference,
            result,
            `pages of ${pageSize}, ${used[b]} keys of ${b}, ${sq} queries, ${packed}, ${JSON.stringify(c)}`,
          )
        }
      }
    })

    it('reads a contiguous cache up to its lengths', async () => {
      const rng = random(4)
      const c = { ...drawCase(rng, dtype), b: 3, sq: 2, sk: 200 }
      const used = [0, 77, 200]
      const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device)
      const poison = (made: Sample<typeof dtype>) => {
        used.forEach((keys, b) => {
          const rest = made.tensor.slice(0, b, b + 1).slice(1, keys)
          if (rest.size > 0) rest.copyFrom(tensor([Number.NaN], [1], { device }).expand(rest.shape))
        })
        return made
      }
      const k = poison(await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device))
      const v = poison(await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device))
      const reference = attentionReference(
        c,
        reader(q.values, c.sq, c.hq, c.d),
        reader(k.values, c.sk, c.hk, c.d),
        reader(v.values, c.sk, c.hk, c.dv),
        result,
        (b) => ({ sq: c.sq, sk: used[b]! }),
      )
      const got = attention(q.tensor, k.tensor, v.tensor, {
        ...optionsOf(c),
        cacheSeqlens: used,
      })
      await expectReference(got, reference, result, JSON.stringify(c))
    })

    it('decodes one row over many keys', async () => {
      const rng = random(5)
      for (const sk of [1000, 4099]) {
        const c = {
          ...drawCase(rng, dtype),
          b: 1,
          sq: 1,
          sk,
          hq: 4,
          hk: 2,
          d: 64,
          dv: 64,
          slopes: undefined,
          sink: undefined,
          factors: undefined,
        }
        const q = await sample(rng, [1, 1, 4, 64], dtype, device)
        const k = await sample(rng, [1, sk, 2, 64], dtype, device)
        const v = await sample(rng, [1, sk, 2, 64], dtype, device)
        const [rq, rk, rv] = [
          reader(q.values, 1, 4, 64),
          reader(k.values, sk, 2, 64),
          reader(v.values, sk, 2, 64),
        ]
        const reference = attentionReference(c, rq, rk, rv, result)
        await expectReference(
          attention(q.tensor, k.tensor, v.tensor, optionsOf(c)),
          reference,
          result,
          JSON.stringify(c),
        )
      }
    })

    it('gives nothing where there is nothing', async () => {
      const q = tensor(new Float32Array(5 * 2 * 16).fill(1), [1, 5, 2, 16], { dtype, device })
      const none = empty([1, 0, 1, 16], { dtype, device })
      const { out, lse } = attention(q, none, none)
      expect([...(await out.read({ as: 'float32' }))]).toEqual(new Array(160).fill(0))
      expect([...(await lse.read())]).toEqual(new Array(10).fill(Number.NEGATIVE_INFINITY))
      const rows = attention(none, q.slice(2, 0, 1), q.slice(2, 0, 1))
      expect(rows.out.shape).toEqual([1, 0, 1, 16])
      expect((await rows.out.read()).length).toBe(0)
    })

    it('stays finite for logits of 1e4', async () => {
      const rng = random(6)
      const q = await sample(rng, [1, 65, 1, 64], dtype, device, { scale: 60 })
      const k = await sample(rng, [1, 65, 1, 64], dtype, device, { scale: 60 })
      const v = await sample(rng, [1, 65, 1, 64], dtype, device)
      const { out, lse } = attention(q.tensor, k.tensor, v.tensor, { causal: true })
      expect((await out.read({ as: 'float32' })).every(Number.isFinite)).toBe(true)
      expect((await lse.read()).every(Number.isFinite)).toBe(true)
    })

    it('is the same every time', async () => {
      const rng = random(7)
      const [q, k, v] = await Promise.all(
        [4, 2, 2].map((heads) =>
          sample(rng, [2, 300, heads, 64], dtype, device, { strided: false }),
        ),
      )
      const once = () => attention(q!.tensor, k!.tensor, v!.tensor, { causal: true }).out.read()
      const first = await once()
      for (let i = 0; i < 20; i++)
        expect(Buffer.compare(Buffer.from((await once()).buffer), Buffer.from(first.buffer))).toBe(
          0,
        )
    })

    it('does not let a masked NaN through', async () => {
      const rng = random(8)
      const [q, k, v] = await Promise.all(
        [1, 2, 3].map(() => sample(rng, [1, 70, 1, 64], dtype, device, { strided: false })),
      )
      const clean = await attention(q!.tensor, k!.tensor, v!.tensor, { causal: true }).out.read({
        as: 'float32',
      })
      for (const poisoned of [k!, v!]) {
        poisoned.tensor
          .slice(1, 50)
          .copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 20, 1, 64]))
      }
      const dirty = await attention(q!.tensor, k!.tensor, v!.tensor, { causal: true }).out.read({
        as: 'float32',
      })
      const [seen, before] = [dirty, clean].map((x) => x.subarray(0, 50 * 64))
      // what is computed once more is so without rounding its weights
      expect(maxError(seen!, before!)).toBeLessThanOrEqual(
        dtype === 'float8_e4m3fn' ? 2 ** -3 : epsilon[result] * Math.max(largest(before!), 1),
      )
      expect(dirty.subarray(50 * 64).every(Number.isNaN)).toBe(true)
    })
  })

  it('rejects the read when lengths or pages on the device are out of range', async () => {
    const q = tensor(new Float32Array(4 * 16), [1, 4, 1, 16], { device })
    const int32 = (values: number[], shape?: number[]) =>
      tensor(values, shape, { dtype: 'int32', device })
    const bad = [
      { cuSeqlensQ: int32([0, 3]), cuSeqlensK: int32([0, 4]) },
      { cuSeqlensQ: int32([0, 4]), cuSeqlensK: int32([1, 4]) },
      { cuSeqlensQ: int32([0, 5, 4]), cuSeqlensK: int32([0, 2, 4]) },
      { cacheSeqlens: int32([5]) },
      { cacheSeqlens: int32([-1]) },
      { blockTable: int32([7], [1, 1]), cacheSeqlens: int32([4]) },
      { blockTable: int32([-1], [1, 1]), cacheSeqlens: int32([1]) },
      { blockTable: int32([0, 7], [2, 1]), cacheSeqlens: int32([4, 1]), cuSeqlensQ: [0, 3, 4] },
      { blockTable: int32([0, 0], [2, 1]), cacheSeqlens: int32([4, 5]), cuSeqlensQ: [0, 3, 4] },
      ...[
        [0, 3, 3],
        [0, 5, 4],
        [1, 2, 4],
      ].map((offsets) => ({
        blockTable: int32([0, 0], [2, 1]),
        cacheSeqlens: int32([4, 4]),
        cuSeqlensQ: int32(offsets),
      })),
    ]
    for (const options of bad) {
      await expect(
        attention(q, q, q, options).out.read(),
        Object.keys(options).join(),
      ).rejects.toThrow(/^attention: .*must/)
    }
  })

  it('counts with numbers up to the ends of float32', async () => {
    const [q, k, v] = [1e-30, 1, 1].map((x) => full([1, 3, 2, 16], x, { device }))
    for (const options of [
      { scale: 1e30 },
      { scale: 1e30, softCap: 1e30 },
      { softCap: 1e-36 },
      { bias: 2e38 },
      { sink: [-3.4e38, -1] },
      { slopes: [1e38, 1], causal: true },
    ]) {
      const { out, lse } = attention(q!, k!, v!, options)
      const all = [...(await out.read({ as: 'float32' })), ...(await lse.read())]
      expect(all.every(Number.isFinite), JSON.stringify(options)).toBe(true)
    }
  })

  it('refuses numbers that float32 cannot count with', async () => {
    const q = zeros([1, 4, 2, 16], { device })
    const e4m3 = q.cast('float8_e4m3fn')
    const wrong = (argument: string, number: number) =>
      `${argument} must not overflow float32 arithmetic, got ${number}`
    for (const [argument, number, options] of [
      ['scale', 1e39, { scale: 1e39 }],
      ['scale', 3e38, { scale: 3e38 }],
      ['softCap', 1e39, { softCap: 1e39 }],
      ['softCap', 3e38, { softCap: 3e38 }],
      ['softCap', 1e-40, { softCap: 1e-40 }],
      ['softCap', 1e-10, { softCap: 1e-10, scale: 1e30 }],
      ['lengthScale', 1e39, { lengthScale: 1e39 }],
      ['lengthScale', 1e30, { lengthScale: 1e30, scale: 1e30 }],
      ['offset', 1e39, { weights: 'reweighted', offset: 1e39 }],
      ['bias', 1e39, { bias: 1e39 }],
      ['bias', 3e38, { bias: 3e38 }],
      ['bias', -1e39, { bias: -1e39 }],
      ['sink[0]', 1e39, { sink: [1e39, 0] }],
      ['sink[1]', 3e38, { sink: [0, 3e38] }],
      ['slopes[0]', 1e300, { slopes: [1e300, 1] }],
    ] as const) {
      const message = wrong(argument, number)
      const lse = zeros([1, 2, 4], { device })
      const error = await failure(() => attention(q, q, q, options))
      expect(error.message).toBe(`attention: ${message}`)
      const backward = await failure(() => attentionBackward(q, q, q, q, lse, q, options))
      expect(backward.message).toBe(`attention.backward: ${message}`)
    }
    const error = await failure(() => attention(e4m3, e4m3, e4m3, { qScale: [1e39, 1] }))
    expect(error.message).toBe(`attention: ${wrong('qScale[0]', 1e39)}`)
  })
})

// Checked by the compiler alone
export function types(
  q: Tensor<'float32'>,
  half: Tensor<'bfloat16'>,
  e4m3: Tensor<'float8_e4m3fn'>,
) {
  const small = { slopes: new Float32Array(2), sink: new Float32Array(2) }
  const offsets = { cuSeqlensQ: new Int32Array(2), cuSeqlensK: new Int32Array(2) }
  expectTypeOf(attention(q, q, q, { ...small, ...offsets }).out).toEqualTypeOf<Tensor<'float32'>>()
  expectTypeOf(attention(e4m3, e4m3, e4m3).out).toEqualTypeOf<Tensor<'bfloat16'>>()
  const scaled = attention(e4m3, e4m3, e4m3, { qScale: new Float32Array(2), dtype: 'float16' })
  expectTypeOf(scaled.out).toEqualTypeOf<Tensor<'float16'>>()
  const open = q as Tensor<FloatDType | 'float8_e4m3fn'>
  expectTypeOf(attention(open, open, open, { kScale: [1] }).out).toEqualTypeOf<Tensor<FloatDType>>()
  explain(attention, e4m3, e4m3, e4m3, { vScale: [1, 1] })
  // @ts-expect-error k and v are of the dtype of q
  attention(q, half, half)
  // @ts-expect-error
  attention(e4m3, half, half)
  // @ts-expect-error
  attentionBackward(q, half, half, q, q, half)
  // @ts-expect-error the dtype of out is a choice of float8, whose scales there are
  attention(q, q, q, { dtype: 'bfloat16' })
  // @ts-expect-error
  attention(q, q, q, { qScale: [1, 1] })
}
