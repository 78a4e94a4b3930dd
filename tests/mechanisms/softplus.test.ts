import { attention, type FloatDType, full, randn, softplusAttention, tensor } from 'heddle'
import { expect, it } from 'vitest'
import { maxError, relativeRms } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { random, sample } from '../support/random.js'
import { reader } from '../support/reference.js'

interface Sizes {
  b: number
  sq: number
  sk: number
  hq: number
  hk: number
  d: number
  dv: number
}
interface Given {
  causal?: boolean
  window?: number
  reweight?: boolean
  power?: number
  offset?: number
  qkNorm?: boolean
  eps?: number
}
type Read = ReturnType<typeof reader>

/** The definition, row by row; what a row keeps is divided by its largest first, as powers overflow. */
function oracle(c: Sizes, given: Given, q: Read, k: Read, v: Read) {
  const { causal = true, window, reweight = true, power = 15, offset = 1, qkNorm = true } = given
  const { eps = 0 } = given
  const out = new Float64Array(c.b * c.sq * c.hq * c.dv)
  const length = (row: (e: number) => number) => {
    let sum = 0
    for (let e = 0; e < c.d; e++) sum += row(e) ** 2
    return qkNorm ? Math.max(Math.sqrt(sum), 1e-12) : 1
  }
  for (let b = 0; b < c.b; b++)
    for (let h = 0; h < c.hq; h++)
      for (let i = 0; i < c.sq; i++) {
        const hk = Math.floor(h / (c.hq / c.hk))
        const p = c.sk - c.sq + i
        const last = causal || window ? Math.min(p + 1, c.sk) : c.sk
        const first = window ? Math.max(0, p - window + 1) : 0
        const n = last - first
        if (n <= 0) continue
        const lq = length((e) => q(b, i, h, e))
        const a = Array.from({ length: n }, (_, j) => {
          let dot = 0
          for (let e = 0; e < c.d; e++) dot += q(b, i, h, e) * k(b, first + j, hk, e)
          const lk = length((e) => k(b, first + j, hk, e))
          const x = (dot / lq / lk) * Math.log(c.d) * Math.log(n)
          return Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)))
        })
        const z = a.reduce((x, y) => x + y, 0) + eps
        const t = a.map((x) => (reweight ? (n * x) / z - (n > 3 ? offset : 0) : x))
        const top = t.reduce((x, y) => Math.max(x, y), 0)
        const w = t.map((x) => Math.max(x / top, 0) ** (reweight ? power : 1))
        const sum = w.reduce((x, y) => x + y, 0) + eps * top ** -(reweight ? power : 1)
        for (let f = 0; f < c.dv && top > 0; f++) {
          let value = 0
          for (let j = 0; j < n; j++) value += (w[j]! / sum) * v(b, first + j, hk, f)
          out[((b * c.sq + i) * c.hq + h) * c.dv + f] = value
        }
      }
  return out
}

const tolerance: Record<FloatDType, number> = { float32: 2e-5, float16: 3e-3, bfloat16: 3e-3 }
const read = (x: { read(o: { as: 'float32' }): Promise<Float32Array> }) => x.read({ as: 'float32' })

describeDevices('softplus attention', (device) => {
  it.each(floats)(
    'agrees with float64 in %s',
    async (dtype) => {
      const rng = random(17)
      for (const s of [1, 2, 3, 4, 5, 63, 64, 65, 200, 0, 0, 0]) {
        const hk = rng.pick([1, 2])
        const sq = s || rng.pick([1, 2, 40, 130])
        const c: Sizes = {
          b: rng.pick([1, 2]),
          sq,
          sk: s || sq + rng.pick([0, 1, 70, 500]),
          hk,
          hq: hk * rng.pick([1, 3]),
          d: rng.pick([8, 40, 64]),
          dv: rng.pick([8, 72]),
        }
        const given: Given = {
          causal: rng.chance(0.8),
          ...(rng.chance(0.2) ? { window: rng.pick([2, 30]) } : {}),
          reweight: rng.chance(0.8),
          power: rng.pick([1, 2.5, 3, 15]),
          offset: rng.pick([0, 1, 0.5]),
          qkNorm: rng.chance(0.8),
          eps: rng.pick([0, 1e-8, 0.1]),
        }
        const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device)
        const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device)
        const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device)
        const expected = oracle(
          c,
          given,
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
        )
        const { out } = softplusAttention(q.tensor, k.tensor, v.tensor, given)
        const what = JSON.stringify({ ...c, ...given })
        expect(relativeRms(await read(out), expected), what).toBeLessThan(tolerance[dtype])
      }
    },
    300_000,
  )

  it('finds the level of a call that gives none', async () => {
    const at = (seed: number, s: number, h: number) =>
      randn([2, s, h, 64], { seed, dtype: 'bfloat16', device })
    const [q, k, v] = [at(1, 150, 4), at(2, 170, 2), at(3, 170, 2)]
    const scores = { cosine: true, scale: 1, lengthScale: Math.log(64) } as const
    for (const keys of [{ causal: true }, { window: 60 }, {}])
      for (const power of [15, 3, 2.5]) {
        const call = { ...scores, ...keys, power, weights: 'reweighted' } as const
        const level = attention(q, k, v.slice(3, 0, 0), { ...scores, ...keys, weights: 'softplus' })
        const given = attention(q, k, v, { ...call, level: level.lse })
        const found = attention(q, k, v, call)
        const alone = attention(q, k, v.slice(3, 0, 0), call)
        expect(maxError(await read(alone.lse), await read(given.lse))).toBeLessThan(0.1)
        const expected = await read(given.out)
        expect(relativeRms(await read(found.out), expected)).toBeLessThan(2 * tolerance.bfloat16)
        expect(maxError(await read(found.lse), await read(given.lse))).toBeLessThan(0.1)
      }
  })

  it('keeps the digits of keys that are nearly alike', async () => {
    const rng = random(31)
    const shape = [1, 300, 2, 128] as const
    const common = rng.normals(128)
    const near = () => {
      const values = rng.normals(300 * 2 * 128, 0.05).map((x, i) => common[i % 128]! * (1 + x))
      return tensor(values, shape, { device }).cast('bfloat16')
    }
    const [q, k, v] = [2, 3, 5].map((seed) => randn(shape, { seed, device }).cast('bfloat16'))
    // where queries are alike as well, weights differ by less than a GPU's fast exponentials see
    for (const [queries, keys, precision] of [
      [q!, near(), 'default'],
      [q!, near(), 'high'],
      [near(), near(), 'high'],
    ] as const) {
      const { out } = softplusAttention(queries, keys, v!, { precision })
      const wide = [queries, keys, v!].map((x) => x.cast('float32'))
      const exact = softplusAttention(wide[0]!, wide[1]!, wide[2]!)
      const error = relativeRms(await read(out), await read(exact.out))
      expect(error, precision).toBeLessThan(tolerance.bfloat16)
    }
    expect(() => softplusAttention(q!, k!, v!, { precision: 'most' as 'high' })).toThrow(
      /precision must be "default" or "high", got "most"/,
    )
  })

  it.each([
    [131072, 8],
    [16384, 128],
  ])('has no weight for any of %d keys of %d that are equal', async (sk, d) => {
    const one = randn([1, 1, 1, d], { seed: 41, dtype: 'bfloat16', device })
    const q = randn([1, 64, 2, d], { seed: 42, dtype: 'bfloat16', device })
    const k = one.expand([1, sk, 1, d])
    for (const precision of ['default', 'high'] as const) {
      const { out, lse } = softplusAttention(q, k, k, { causal: false, precision })
      expect(
        (await read(out)).every((x) => x === 0),
        precision,
      ).toBe(true)
      const none = (x: number) => x === Number.NEGATIVE_INFINITY
      expect((await lse.read()).every(none), precision).toBe(true)
    }
  })

  it('sees directions alone, whatever their lengths', async () => {
    const rng = random(19)
    const [s, d] = [90, 16]
    const { values, tensor: q } = await sample(rng, [1, s, 1, d], 'float32', device)
    const k = await sample(rng, [1, s, 1, d], 'float32', device)
    const expected = await read(softplusAttention(q, k.tensor, k.tensor).out)
    // The largest squares overflow float32, the smallest are 0
    const factors = [1e37, 1, 1e-9, 1e-4]
    const stretched = (x: ArrayLike<number>) =>
      tensor(
        Float32Array.from(x, (y, i) => y * factors[Math.floor(i / d) % factors.length]!),
        [1, s, 1, d],
        { device },
      )
    const { out } = softplusAttention(stretched(values), stretched(k.values), k.tensor)
    expect(maxError(await read(out), expected)).toBeLessThan(1e-4)
  })

  it('does so where products of 16-bit rows leave the range of float32', async () => {
    const [s, d] = [90, 16]
    const draw = (seed: number) => randn([1, s, 1, d], { seed, dtype: 'bfloat16', device })
    const [q, k, v] = [draw(1), draw(2), draw(3)]
    const expected = await read(softplusAttention(q, k, v).out)
    // powers of two change no digit
    for (const factors of [
      [8, 1, 0.5, 1],
      [2 ** 90, 1, 2 ** -20, 1],
    ]) {
      const stretched = async (x: typeof q) =>
        tensor(
          (await read(x)).map((y, i) => y * factors[Math.floor(i / d) % factors.length]!),
          [1, s, 1, d],
          { dtype: 'bfloat16', device },
        )
      const { out } = softplusAttention(await stretched(q), await stretched(k), v)
      expect(relativeRms(await read(out), expected)).toBeLessThan(3e-3)
    }
  })

  it.each([true, false])(
    'overflows for no finite input, with cosines: %s',
    async (qkNorm) => {
      const [s, d] = [2000, 8]
      for (const size of [1e18, 1, 1e-30]) {
        const ones = new Float32Array(s * d).fill(size)
        // One key against the direction of all others
        const keys = ones.map((x, i) => (Math.floor(i / d) === 1000 ? x : -x))
        const at = { device }
        const [q, k] = [tensor(ones, [1, s, 1, d], at), tensor(keys, [1, s, 1, d], at)]
        const v = randn([1, s, 1, 8], { device, seed: 3 })
        for (const power of [1, 15, 64]) {
          const { out } = softplusAttention(q, k, v, { power, qkNorm })
          const [values, all] = [await read(v), await read(out)]
          expect(all.every(Number.isFinite)).toBe(true)
          // Vectors shorter than 1e-12 are nearly those of zeros, and without cosines so are their scores
          if (size >= 1)
            for (let f = 0; f < 8; f++)
              expect(all[1999 * 8 + f]).toBeCloseTo(values[1000 * 8 + f]!, 4)
        }
      }
    },
    60_000,
  )

  // Directional derivatives of float64 hold the gradients as a whole, one number for each of q, k and v
  it.each(floats)(
    'has the gradients that differences of float64 have in %s',
    async (dtype) => {
      const rng = random(18)
      for (let n = 0; n < 12; n++) {
        const hk = rng.pick([1, 2])
        const sq = rng.pick([1, 3, 40, 70])
        const c: Sizes = {
          b: rng.pick([1, 2]),
          sq,
          sk: sq + rng.pick([0, 1, 70]),
          hk,
          hq: hk * rng.pick([1, 3]),
          d: rng.pick([8, 40]),
          dv: rng.pick([8, 24]),
        }
        const offset = rng.pick([0, 1, 0.5])
        const given: Given = {
          causal: rng.chance(0.8),
          ...(rng.chance(0.2) ? { window: rng.pick([2, 30]) } : {}),
          reweight: rng.chance(0.8),
          // the first power of what an offset cuts has a kink, where float32 may be on the other side
          power: rng.pick(offset ? [2.5, 3, 15] : [1, 2.5, 3, 15]),
          offset,
          qkNorm: rng.chance(0.7),
          eps: rng.pick([0, 0, 0.1]),
        }
        const shapes = [
          [c.b, c.sq, c.hq, c.d],
          [c.b, c.sk, c.hk, c.d],
          [c.b, c.sk, c.hk, c.dv],
          [c.b, c.sq, c.hq, c.dv],
        ] as const
        const scale = given.qkNorm ? 1 : 0.3
        const [q, k, v, dout] = [
          await sample(rng, shapes[0], dtype, device, { scale }),
          await sample(rng, shapes[1], dtype, device, { scale }),
          await sample(rng, shapes[2], dtype, device),
          await sample(rng, shapes[3], dtype, device),
        ]
        const call = [q.tensor, k.tensor, v.tensor] as const
        const { out, lse } = softplusAttention(...call, given)
        const gradients = softplusAttention.backward(...call, out, lse, dout.tensor, given)
        const inputs = [q, k, v].map(({ values }) => Float64Array.from(values))
        const loss = () => {
          const [x, y, z] = inputs.map((values, i) =>
            reader(values, ...(shapes[i]!.slice(1) as [number, number, number])),
          )
          const result = oracle(c, given, x!, y!, z!)
          return result.reduce((sum, value, i) => sum + value * dout.values[i]!, 0)
        }
        for (const [i, name] of (['dq', 'dk', 'dv'] as const).entries()) {
          const direction = rng.normals(inputs[i]!.length)
          const before = inputs[i]!
          const moved = (step: number) => {
            inputs[i] = before.map((x, at) => x + step * direction[at]!)
            return loss()
          }
          const expected = (moved(1e-6) - moved(-1e-6)) / 2e-6
          inputs[i] = before
          const gradient = await read(gradients[name])
          let [actual, size] = [0, 0]
          gradient.forEach((x, at) => {
            actual += x * direction[at]!
            size += (x * direction[at]!) ** 2
          })
          // out was rounded, and a power makes that as much larger
          const { reweight, power = 1 } = given
          const terms = Math.sqrt(size) + (reweight ? power : 1)
          const bound = 12 * (dtype === 'float32' ? 5e-6 : epsilon[dtype]) * terms
          expect(
            Math.abs(actual - expected),
            `${name} ${actual} ${expected} ${JSON.stringify({ ...c, ...given })}`,
          ).toBeLessThan(bound)
          // a row only turns; in 16 bits what two passes add was rounded before, and may be far longer than their sum
          if (name === 'dv' || !given.qkNorm || dtype !== 'float32') continue
          const x = inputs[i]!
          for (let row = 0; row < x.length; row += c.d) {
            let [along, length, most] = [0, 0, 0]
            for (let e = row; e < row + c.d; e++) {
              along += x[e]! * gradient[e]!
              length += x[e]! ** 2
              most += gradient[e]! ** 2
            }
            const rounding = 8 * epsilon[dtype] * Math.sqrt(length * most)
            expect(Math.abs(along), `${name} ${row}`).toBeLessThanOrEqual(rounding + 1e-6)
          }
        }
      }
    },
    120_000,
  )

  it('moves keys that weigh nothing, and no rows of zeros', async () => {
    const rng = random(19)
    const draw = async () =>
      (await sample(rng, [1, 60, 1, 16], 'float32', device, { strided: false })).tensor
    const [q, k, v, dout] = [await draw(), await draw(), await draw(), await draw()]
    const row = 7
    for (const one of [q, k])
      one.slice(1, row, row + 1).copyFrom(tensor([0], [1], { device }).expand([1, 1, 1, 16]))
    // the last key is seen by the last row alone, and is as far from it as can be
    const last = await read(q.slice(1, 59))
    k.slice(1, 59).write(last.map((x) => -x))
    const { out, lse } = softplusAttention(q, k, v)
    const { dq, dk, dv } = softplusAttention.backward(q, k, v, out, lse, dout)
    const [a, b, c] = [await read(dq), await read(dk), await read(dv)]
    const zero = (x: Float32Array, at: number) =>
      x.subarray(at * 16, at * 16 + 16).every((value) => value === 0)
    expect([zero(a, row), zero(b, row)]).toEqual([true, true])
    expect([zero(b, 59), zero(c, 59)]).toEqual([false, true])
  })

  it('gives nothing where all keys weigh the same, and ones for values of ones', async () => {
    const at = { device } as const
    const [q, k, v] = [
      randn([1, 40, 2, 16], at),
      full([1, 40, 2, 16], 1, at),
      full([1, 40, 2, 8], 1, at),
    ]
    const { out, lse } = softplusAttention(q, k, v)
    const [same, sums] = [await read(out), await read(lse)]
    for (let i = 0; i < 40; i++)
      for (let h = 0; h < 2; h++) {
        expect(same[(i * 2 + h) * 8]).toBeCloseTo(i < 3 ? 1 : 0, 5)
        expect(Number.isFinite(sums[h * 40 + i]!)).toBe(i < 3)
      }
    const differ = await read(softplusAttention(q, q, v).out)
    for (const x of differ) expect(x).toBeCloseTo(1, 4)
  })

  it('gives the mean instead where it is asked for, and changes no other row', async () => {
    for (const dtype of ['float32', 'bfloat16'] as const) {
      const at = { device, dtype } as const
      const [q, v] = [
        randn([1, 40, 2, 16], { seed: 1, ...at }),
        randn([1, 40, 2, 8], { seed: 2, ...at }),
      ]
      // keys are the same up to row 20, and differ behind it
      const k = randn([1, 40, 2, 16], { seed: 3, ...at })
      k.slice(1, 0, 20).copyFrom(full([1, 20, 2, 16], 1, at))
      const zero = softplusAttention(q, k, v)
      const mean = softplusAttention(q, k, v, { degenerate: 'mean' })
      const plain = await read(softplusAttention(q, k, v, { reweight: false }).out)
      const [zeros, means] = [await read(zero.out), await read(mean.out)]
      for (const [i, value] of means.entries())
        expect(value, `${i}`).toBe(i >= 3 * 16 && i < 20 * 16 ? plain[i] : zeros[i])
      expect(await read(mean.lse)).toEqual(await read(zero.lse))
    }
  })

  it('is the same in packed sequences, in pages, and row by row', async () => {
    const at = { device } as const
    const [first, s, d] = [37, 90, 32]
    const [q, k, v] = [1, 2, 3].map((seed) => randn([1, s, 2, d], { ...at, seed }))
    const part = (begin: number, end: number) =>
      read(
        softplusAttention(q!.slice(1, begin, end), k!.slice(1, begin, end), v!.slice(1, begin, end))
          .out,
      )
    const offsets = [0, first, s]
    const packed = softplusAttention(q!, k!, v!, { cuSeqlensQ: offsets, cuSeqlensK: offsets })
    const separate = [...(await part(0, first)), ...(await part(first, s))]
    expect(maxError(await read(packed.out), separate)).toBeLessThan(1e-5)

    const whole = await read(softplusAttention(q!, k!, v!).out)
    const rows = await read(softplusAttention(q!.slice(1, 80), k!, v!).out)
    expect(maxError(rows, whole.subarray(80 * 2 * d))).toBeLessThan(1e-5)
    // Two pages of 64, of which the second is partly in use
    const pages = [k!, v!].map((x) => {
      const room = new Float32Array(128 * 2 * d).fill(Number.NaN)
      return x.read({ as: 'float32' }).then((values) => {
        room.set(values)
        return tensor(room, [2, 64, 2, d], at)
      })
    })
    const [pagedK, pagedV] = await Promise.all(pages)
    const blockTable = tensor([0, 1], [1, 2], { dtype: 'int32', device })
    const last = q!.slice(1, s - 1)
    const decoded = softplusAttention(last, pagedK!, pagedV!, { blockTable, cacheSeqlens: [s] })
    expect(maxError(await read(decoded.out), whole.subarray((s - 1) * 2 * d))).toBeLessThan(1e-5)
  })

  it('refuses what makes no sense', () => {
    const q = randn([1, 4, 1, 8], { device })
    const level = full([1, 1, 4], 0, { device })
    expect(() => softplusAttention(q, q, q, { power: 0.5 })).toThrow(
      'softplusAttention: power must be at least 1, got 0.5',
    )
    expect(() => softplusAttention(q, q, q, { eps: -1 })).toThrow(/eps must be a number from 0 on/)
    expect(() => softplusAttention(q, q, q, { eps: 1e-8, degenerate: 'mean' })).toThrow(
      'softplusAttention: degenerate must be "zero" where eps is above 0, got "mean"',
    )
    expect(() => softplusAttention(q, q, q, { scale: 0 })).toThrow(
      /scale must be a positive number/,
    )
    expect(() => softplusAttention(q, q, q, { logD: Number.NaN })).toThrow(
      'softplusAttention: logD must be a finite number, got NaN',
    )
    for (const flag of ['qkNorm', 'reweight'])
      expect(() => softplusAttention(q, q, q, { [flag]: 1 })).toThrow(
        `softplusAttention: ${flag} must be a boolean, got 1`,
      )
    expect(() => attention(q, q, q, { offset: 0 })).toThrow(
      'attention: offset goes with weights of reweighted',
    )
    const wide = full([1, 0, 2 ** 40, 8], 1, { device })
    expect(() => softplusAttention(wide, wide, wide, { eps: 0.1 })).toThrow(
      'softplusAttention: q must have at most 65536 heads, got 1099511627776',
    )
    expect(() => attention(q, q, q, { level })).toThrow(/level goes with/)
    expect(() => attention(q, q, q, { weights: 'relu', power: 2.5 })).toThrow(/whole number/)
  })
})
