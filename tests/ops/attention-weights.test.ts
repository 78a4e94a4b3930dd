import {
  type AttentionOptions,
  attention,
  attentionBackward,
  cuda,
  explain,
  type FloatDType,
  full,
  Mask,
  randn,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { expect, it } from 'vitest'
import { expectClose, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { type Random, random, sample } from '../support/random.js'
import { type AttentionCase, reader } from '../support/reference.js'
import { round } from '../support/rounding.js'

// Weights other than exponentials, and biases

const functions = {
  softmax: Math.exp,
  sigmoid: (s: number) => 1 / (1 + Math.exp(-s)),
  relu: (s: number) => Math.max(s, 0),
  softplus: (s: number) => Math.max(s, 0) + Math.log1p(Math.exp(-Math.abs(s))),
}

interface WeightCase extends AttentionCase {
  weights: keyof typeof functions
  power: number
  normalise: boolean
  lengthScale?: number
  /** Which axes of the bias have their size; the others are 1. */
  biased: readonly boolean[] | undefined
}

const lengths = [1, 2, 31, 63, 65, 130, 257]

function drawCase(rng: Random): WeightCase {
  const hk = rng.pick([1, 2])
  const hq = hk * rng.pick([1, 3])
  const d = rng.pick([8, 40, 64])
  const weights = rng.pick(['softmax', 'sigmoid', 'relu', 'softplus'] as const)
  return {
    b: rng.pick([1, 2]),
    sq: rng.pick(lengths),
    sk: rng.pick(lengths),
    hq,
    hk,
    d,
    dv: rng.pick([8, 72]),
    causal: rng.chance(0.5),
    window: rng.chance(0.3) ? rng.pick([1, 17, 100]) : undefined,
    scale: 1 / Math.sqrt(d),
    softCap: rng.chance(0.2) ? 2 : 0,
    slopes: rng.chance(0.2) ? Array.from(rng.normals(hq), (x) => Math.fround(x * 0.01)) : undefined,
    sink: undefined,
    weights,
    power: weights === 'relu' ? rng.pick([1, 2, 3]) : 1,
    normalise: weights === 'softmax' || rng.chance(0.5),
    biased: rng.chance(0.5) ? [0, 1, 2, 3].map(() => rng.chance(0.6)) : undefined,
  }
}

type Read = ReturnType<typeof reader>

const biasAt =
  (bias: { values: ArrayLike<number> } | undefined, axes: readonly number[] | undefined): Read =>
  (...place) => {
    if (!bias) return 0
    const index = axes!.reduce((sum, size, i) => sum * size + (size === 1 ? 0 : place[i]!), 0)
    return bias.values[index]!
  }

function seesOf({ causal, window, sk }: WeightCase, p: number): number {
  if (!causal && window === undefined) return sk
  const end = Math.max(0, Math.min(p + 1, sk))
  return end - Math.min(end, Math.max(0, p + 1 - (window ?? sk + p + 1)))
}

const tail = (shape: readonly number[]) => shape.slice(1) as [number, number, number]

/**
 * `terms` is the largest sum of values by magnitude, where weights do not sum to 1; `steep` by how much scores that all move
 * by 1 move what a row weighs.
 */
function reference(
  c: WeightCase,
  q: Read,
  k: Read,
  v: Read,
  bias: Read,
  dtype: (typeof floats)[number],
) {
  const make = () => new Float64Array(c.b * c.sq * c.hq * c.dv)
  const [out, plain] = [make(), make()]
  const lse = new Float64Array(c.b * c.hq * c.sq).fill(Number.NEGATIVE_INFINITY)
  let [terms, steep] = [0, 1]
  for (let b = 0; b < c.b; b++)
    for (let h = 0; h < c.hq; h++)
      for (let i = 0; i < c.sq; i++) {
        const p = c.sk - c.sq + i
        const hk = Math.floor(h / (c.hq / c.hk))
        for (const rounded of [false, true]) {
          const r = (x: number) => (rounded ? round(x, dtype) : x)
          const seen: number[] = []
          const weights: number[] = []
          let rate = 0
          for (let t = 0; t < c.sk; t++) {
            if ((c.causal || c.window !== undefined) && t > p) continue
            if (c.window !== undefined && t <= p - c.window) continue
            let dot = 0
            for (let e = 0; e < c.d; e++) dot += q(b, i, h, e) * k(b, t, hk, e)
            let s = r(dot) * c.scale * (c.lengthScale ? c.lengthScale * Math.log(seesOf(c, p)) : 1)
            if (c.softCap > 0) s = c.softCap * Math.tanh(s / c.softCap)
            if (c.slopes) s += c.slopes[h]! * (t - p)
            seen.push(t)
            const weigh = (x: number) => functions[c.weights](x) ** c.power
            const score = r(s + bias(b, h, i, t))
            weights.push(r(weigh(score)))
            rate += (weigh(score + 1e-6) - weigh(score - 1e-6)) / 2e-6
          }
          const sum = weights.reduce((x, y) => x + y, 0)
          if (sum === 0) continue
          if (!rounded) steep = Math.max(steep, rate / (c.normalise ? sum : 1))
          if (!rounded) lse[(b * c.hq + h) * c.sq + i] = Math.log(sum)
          for (let f = 0; f < c.dv; f++) {
            let [value, size] = [0, 0]
            seen.forEach((t, j) => {
              const term = (weights[j]! / (c.normalise ? sum : 1)) * v(b, t, hk, f)
              value += term
              size += Math.abs(term)
            })
            ;(rounded ? plain : out)[((b * c.sq + i) * c.hq + h) * c.dv + f] = r(value)
            if (!rounded) terms = Math.max(terms, size)
          }
        }
      }
  return { out, plain, lse, terms, steep }
}

describeDevices('attention with other weights', (device) => {
  it.each(floats)(
    'agrees with float64 on random shapes and options in %s',
    async (dtype) => {
      const rng = random(11)
      for (let n = 0; n < 40; n++) {
        const c = drawCase(rng)
        const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device)
        const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device)
        const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device)
        const axes = c.biased && [c.b, c.hq, c.sq, c.sk].map((size, i) => (c.biased![i] ? size : 1))
        const bias = axes && (await sample(rng, axes, rng.pick(floats), device))
        const expected = reference(
          c,
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
          biasAt(bias, axes),
          dtype,
        )
        const { causal, window, scale, softCap, slopes, weights, power, normalise } = c
        const options = { causal, window, scale, softCap, slopes, weights, power, normalise }
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, {
          ...options,
          bias: bias?.tensor,
        })
        const what = JSON.stringify(c)
        const { terms, steep } = expected
        const values = await out.read({ as: 'float32' })
        // What a dot product loses where it nearly cancels is no part of its own rounding
        const own = c.normalise ? terms * steep : terms
        // a power of a score that nearly cancels loses as many times the power below
        const below = weights === 'relu' ? power * terms ** (1 - 1 / power) : 0
        const sensitivity = { terms: Math.max(own, below), exponent: terms }
        expectClose(values, expected.out, expected.plain, dtype, what, sensitivity)
        const sums = await lse.read()
        for (let i = 0; i < sums.length; i++) {
          if (expected.lse[i] === Number.NEGATIVE_INFINITY)
            expect(sums[i], what).toBe(expected.lse[i])
          // A sum of nearly nothing has few digits, and relu has none at all near zero
          else if (expected.lse[i]! > -3)
            expect(Math.abs(sums[i]! - expected.lse[i]!), what).toBeLessThan(2e-4)
        }
      }
    },
    300_000,
  )

  it.each(floats)('sums weights alone where v has no columns, in %s', async (dtype) => {
    const rng = random(31)
    for (let n = 0; n < 24; n++) {
      const { b, hq, hk, causal, window, softCap, slopes, weights, power, normalise } =
        drawCase(rng)
      const [sq, sk] = [rng.pick([1, 20, 130, 300]), rng.pick(lengths)]
      const d = rng.pick([8, 40, 128, 136])
      const draw = async (shape: number[]) => (await sample(rng, shape, dtype, device)).tensor
      const [q, k] = [await draw([b, sq, hq, d]), await draw([b, sk, hk, d])]
      const options: AttentionOptions = {
        ...{ causal, softCap, slopes, weights, power, normalise },
        cosine: rng.chance(0.5),
        lengthScale: rng.pick([0, 0.7]),
        ...rng.pick<AttentionOptions>([
          { window },
          { window, cacheSeqlens: Array.from({ length: b }, () => rng.below(sk + 1)) },
          ...(b === 1 ? [{ cuSeqlensQ: [0, sq >> 1, sq], cuSeqlensK: [0, sk >> 2, sk] }] : []),
          { bias: await draw([1, hq, 1, sk]) },
          ...(weights === 'softmax' ? [{ sink: Array.from(rng.normals(hq)) }] : []),
        ]),
      }
      const what = JSON.stringify({ b, sq, sk, hq, hk, d, ...options, bias: !!options.bias })
      const whole = attention(q, k, k, options)
      const { out, lse } = attention(q, k, k.slice(3, 0, 0), options)
      expect(out.shape).toEqual([b, sq, hq, 0])
      const [actual, wanted] = [await lse.read(), await whole.lse.read()]
      for (const [i, sum] of wanted.entries()) {
        if (sum === Number.NEGATIVE_INFINITY) expect(actual[i], what).toBe(sum)
        // the rule of the test above
        else if (sum > -3) expect(Math.abs(actual[i]! - sum), what).toBeLessThan(2e-4)
      }
    }
    const [q, k] = [randn([1, 9, 2, 8], { device }), randn([1, 80, 2, 8], { device })]
    const mask = Mask.fromWindow({ window: 9 }, { sq: 9, sk: 80 })
    const lse = (v: typeof k) => attention(q, k, v, { mask }).lse.read()
    expect(maxError(await lse(k.slice(3, 0, 0)), await lse(k))).toBeLessThan(1e-5)
    const { out, lse: sums } = attention(q, k, k)
    expect(() =>
      attention.backward(q, k, k.slice(3, 0, 0), out.slice(3, 0, 0), sums, out.slice(3, 0, 0)),
    ).toThrow('attention.backward: v must have columns')
  })

  // Directional derivatives of float64 hold the gradients as a whole, one number for each of q, k, v and the bias
  it.each(floats)(
    'has the gradients that differences of float64 have in %s',
    async (dtype) => {
      const rng = random(29)
      for (let n = 0; n < 24; n++) {
        const c = { ...drawCase(rng), sq: rng.pick([1, 5, 70]), sk: rng.pick([1, 3, 66, 130]) }
        const lengthScale = rng.chance(0.3) ? 0.7 : 0
        const shapes = [
          [c.b, c.sq, c.hq, c.d],
          [c.b, c.sk, c.hk, c.d],
          [c.b, c.sk, c.hk, c.dv],
        ] as const
        const [q, k, v] = [
          await sample(rng, shapes[0], dtype, device),
          await sample(rng, shapes[1], dtype, device),
          await sample(rng, shapes[2], dtype, device),
        ]
        const dout = await sample(rng, [c.b, c.sq, c.hq, c.dv], dtype, device)
        const axes = c.biased && [c.b, c.hq, c.sq, c.sk].map((size, i) => (c.biased![i] ? size : 1))
        const bias = axes && (await sample(rng, axes, rng.pick(floats), device))
        const { causal, window, scale, softCap, slopes, weights, power, normalise } = c
        const options = { causal, window, scale, softCap, slopes, weights, power, normalise }
        const call = { ...options, lengthScale, bias: bias?.tensor }
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, call)
        const gradients = attention.backward(q.tensor, k.tensor, v.tensor, out, lse, dout.tensor, {
          ...call,
          dbias: bias !== undefined,
        })
        expect(gradients.dbias?.shape).toEqual(axes)
        let steep = 1
        const inputs = [q, k, v, ...(bias ? [bias] : [])].map(({ values }) =>
          Float64Array.from(values),
        )
        const loss = () => {
          const [a, b, d] = shapes.map((shape, i) => reader(inputs[i]!, ...tail(shape)))
          const added = biasAt(inputs[3] && { values: inputs[3] }, axes)
          const expected = reference({ ...c, lengthScale }, a!, b!, d!, added, dtype)
          steep = expected.steep
          return expected.out.reduce((sum, x, i) => sum + x * dout.values[i]!, 0)
        }
        for (const [i, name] of (['dq', 'dk', 'dv', 'dbias'] as const).entries()) {
          if (name === 'dbias' && !bias) continue
          const direction = rng.normals(inputs[i]!.length)
          const moved = (step: number, jitter: number) => {
            const before = inputs[i]!
            inputs[i] = before.map((x, at) => x * (1 + jitter * noise[at]!) + step * direction[at]!)
            const result = loss()
            inputs[i] = before
            return result
          }
          const slope = (step: number, jitter: number) =>
            (moved(step, jitter) - moved(-step, jitter)) / (2 * step)
          const noise = rng.normals(inputs[i]!.length)
          // Powers of next to nothing that are divided by their sum are as uncertain as this
          const expected = slope(1e-6, 0)
          const uncertain = Math.abs(slope(2e-6, epsilon.float32) - expected)
          const gradient = await gradients[name]!.read({ as: 'float32' })
          let [actual, size] = [0, 0]
          gradient.forEach((x, at) => {
            actual += x * direction[at]!
            size += (x * direction[at]!) ** 2
          })
          // Errors of the terms are as random as their signs. A difference of dP and delta may vanish, but neither its
          // terms nor that out was rounded
          const rows = c.b * c.sq * c.hq
          const coarse = dtype === 'float32' ? 0 : epsilon[dtype]
          const floor = (24 * epsilon.float32 + coarse / 2) * Math.sqrt(rows * c.dv) * steep
          const bound = 8 * ((coarse + 2e-6) * Math.sqrt(size) + uncertain) + floor
          expect(
            Math.abs(actual - expected),
            `${name} ${actual} ${expected} ${JSON.stringify({ ...c, lengthScale })}`,
          ).toBeLessThan(bound)
        }
      }
    },
    300_000,
  )

  it('weighs what a mask leaves, and empty rows with nothing', async () => {
    const rng = random(13)
    const [s, d] = [70, 8]
    const q = (await sample(rng, [1, s, 2, d], 'float32', device)).tensor
    const k = (await sample(rng, [1, s, 2, d], 'float32', device)).tensor
    const mask = Mask.fromWindow({ window: 9 }, { sq: s })
    for (const weights of ['sigmoid', 'relu', 'softplus'] as const) {
      const whole = attention(q, k, k, { weights, window: 9 })
      const masked = attention(q, k, k, { weights, mask })
      expect(
        maxError(await masked.out.read({ as: 'float32' }), await whole.out.read({ as: 'float32' })),
      ).toBeLessThan(1e-5)
      const empty = attention(q, k.slice(1, 0, 3), k.slice(1, 0, 3), { weights, causal: true })
      const [out, lse] = [await empty.out.read({ as: 'float32' }), await empty.lse.read()]
      for (let i = 0; i < (s - 3) * 2 * d; i++) expect(out[i]).toBe(0)
      for (let i = 0; i < s - 3; i++) expect(lse[i]).toBe(Number.NEGATIVE_INFINITY)
    }
  })

  it('hides keys by biases however low', async () => {
    const [s, seen] = [500, 290]
    for (const dtype of floats)
      for (const low of [-3e4, -1e9, -1e30]) {
        if (dtype === 'float16' && low < -6e4) continue
        const [q, k, v] = [1, 2, 3].map((seed) => randn([1, s, 2, 128], { seed, dtype, device }))
        const numbers = Float32Array.from({ length: s * s }, (_, i) => (i % s < seen ? 0 : low))
        const bias = tensor(numbers, [1, 1, s, s], { dtype, device })
        const read = ({ out }: { out: Tensor<FloatDType> }) => out.read({ as: 'float32' })
        const hidden = await read(attention(q!, k!, v!, { bias }))
        const cut = [k!, v!].map((x) => x.slice(1, 0, seen))
        const expected = await read(attention(q!, cut[0]!, cut[1]!))
        const error = maxError(hidden, expected)
        expect(error, `${dtype} ${low}`).toBeLessThan(dtype === 'float32' ? 1e-5 : 1e-2)
      }
  })

  it('sees nothing in rows whose biases all are as low', async () => {
    const [sq, sk, heads] = [20, 300, 2]
    for (const dtype of floats)
      for (const d of [64, 128])
        for (const low of [-1.6e9, -1e30, Number.NEGATIVE_INFINITY]) {
          if (dtype === 'float16' && Number.isFinite(low)) continue
          const what = `${dtype} ${d} ${low}`
          const draw = (s: number, seed: number) => randn([1, s, heads, d], { seed, dtype, device })
          const [q, k, v] = [draw(sq, 1), draw(sk, 2), draw(sk, 3)]
          const isHidden = (row: number) => row % 2 === 1
          const numbers = Float32Array.from({ length: sq * sk }, (_, i) =>
            isHidden(Math.floor(i / sk)) ? low : 0,
          )
          const bias = tensor(numbers, [sq, sk], { dtype, device })
          const { out, lse } = attention(q, k, v, { bias })
          const plain = attention(q, k, v)
          const rows = await out.read({ as: 'float32' })
          const expected = (await plain.out.read({ as: 'float32' })).map((x, i) =>
            isHidden(Math.floor(i / heads / d)) ? 0 : x,
          )
          expect(maxError(rows, expected), what).toBeLessThan(dtype === 'float32' ? 1e-5 : 1e-2)
          const sums = await lse.read()
          for (const [i, x] of (await plain.lse.read()).entries())
            if (isHidden(i % sq)) expect(sums[i], what).toBe(Number.NEGATIVE_INFINITY)
            else expect(Math.abs(sums[i]! - x), what).toBeLessThan(1e-3)
          const { dq, dk, dv } = attentionBackward(q, k, v, out, lse, draw(sq, 4), { bias })
          const gradient = await dq.read({ as: 'float32' })
          for (let i = 0; i < gradient.length; i++)
            expect(gradient[i] === 0, `${what} dq ${i}`).toBe(isHidden(Math.floor(i / heads / d)))
          for (const x of [dk, dv])
            expect((await x.read({ as: 'float32' })).every(Number.isFinite), what).toBe(true)
        }
  })

  it('multiplies what is no number by a weight of 0', async () => {
    for (const dtype of floats)
      for (const d of [64, 128])
        for (const s of [1, 40]) {
          const [q, k, v] = [s, 90, 90].map((n, seed) =>
            randn([1, n, 1, d], { seed, dtype, device }),
          )
          v!.slice(1, 60, 61).copyFrom(full([1, 1, 1, d], Number.POSITIVE_INFINITY, { device }))
          const numbers = Float32Array.from({ length: 90 }, (_, t) =>
            t === 60 ? Number.NEGATIVE_INFINITY : 0,
          )
          const bias = tensor(numbers, [90], { dtype, device })
          const { out, lse } = attention(q!, k!, v!, { bias })
          expect((await out.read({ as: 'float32' })).every(Number.isNaN), `${dtype} ${d}`).toBe(
            true,
          )
          expect((await lse.read()).every(Number.isFinite), `${dtype} ${d}`).toBe(true)
        }
  })

  it('takes what scores and weights are made of to matrix instructions where there are some', () => {
    const draw = (shape: number[]) => randn(shape, { device, dtype: 'bfloat16' })
    const [q, k] = [draw([1, 64, 4, 64]), draw([1, 70, 2, 64])]
    const level = zeros([1, 4, 64], { device })
    const bias = draw([1, 1, 64, 70])
    const hopper = device !== 'cpu' && cuda.devices[0]!.arch === 90
    const calls: AttentionOptions[] = [
      { weights: 'sigmoid', bias: -4 },
      { weights: 'relu', power: 3, cosine: true },
      { weights: 'softplus', lengthScale: 2, softCap: 5 },
      { weights: 'reweighted', level, power: 15 },
      { weights: 'reweighted', power: 15, cosine: true },
      { bias, causal: true, slopes: [1, 2, 3, 4] },
      { bias: zeros([70], { device }) },
    ]
    for (const options of calls) {
      const { variant, declined } = explain(attention, q, k, k, options)
      if (device === 'cpu') expect(declined).toEqual([])
      else expect(variant).toBe(hopper ? 'sm90_wgmma' : 'sm80_simt')
    }
    const { variant } = explain(attention, q, k, k.slice(3, 0, 0), { weights: 'softplus' })
    if (device !== 'cpu') expect(variant).toBe(hopper ? 'sm90_wgmma' : 'sm80_simt')
    if (!hopper) return
    const refusals: [AttentionOptions, RegExp][] = [
      [{ bias: draw([70, 64]).transpose(0, 1) }, /^bias must be contiguous along sk$/],
      [{ bias: draw([64, 70, 2]).select(2, 0) }, /^bias must be contiguous along sk$/],
      [
        { weights: 'sigmoid', mask: Mask.fromWindow({ window: 9 }, { sq: 64, sk: 70 }) },
        /^weights must be/,
      ],
    ]
    for (const [options, reason] of refusals) {
      const { variant, declined } = explain(attention, q, k, k, options)
      expect(variant).toBe('sm80_simt')
      expect(declined.at(-1)!.reason).toMatch(reason)
    }
    // a few rows stay where they were
    const few = explain(attention, draw([1, 1, 4, 64]), k, k, { weights: 'sigmoid' })
    expect(few.declined[0]!.reason).toBe('weights must be of softmax')
  })
})
