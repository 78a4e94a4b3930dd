import {
  alibiSlopes,
  empty,
  type FloatDType,
  hfMiniMaxSlopes,
  lightning,
  lightningBackward,
  lightningDecode,
  mul,
  type Tensor,
  tensor,
  tnlPaperSlopes,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectRms, maxError, relativeRms } from '../support/compare.js'
import { describeDevices, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random, sample, starts } from '../support/random.js'
import {
  type LightningCase,
  lazily,
  lightningCase,
  lightningReference,
  type Read,
  reader,
  squared,
  squaredCase,
  squaredReads,
} from '../support/reference.js'

const bounds = { float32: 1e-5, float16: 1e-3, bfloat16: 5e-3 } as const

const drawCase = (rng: Random) =>
  lightningCase(rng, {
    s: [0, 1, 2, 63, 64, 65, 131, 200, 300],
    d: [1, 7, 32, 64, 96, 128, 200],
    e: [1, 5, 32, 64, 80, 128],
  })

async function draw(
  rng: Random,
  c: LightningCase,
  dtype: (typeof floats)[number],
  device: 'cpu' | `cuda:${number}`,
) {
  const q = await sample(rng, [c.b, c.s, c.hq, c.d], dtype, device)
  const k = await sample(rng, [c.b, c.s, c.hk, c.d], dtype, device, { scale: 0.3 })
  const v = await sample(rng, [c.b, c.s, c.hv, c.e], dtype, device)
  const reads = [
    reader(q.values, c.s, c.hq, c.d),
    reader(k.values, c.s, c.hk, c.d),
    reader(v.values, c.s, c.hv, c.e),
  ] as const
  return { q: q.tensor, k: k.tensor, v: v.tensor, reads }
}

interface Expected {
  sums: Float64Array
  squares: () => Float64Array
}

function reference(
  c: LightningCase,
  reads: readonly [q: Read, k: Read, v: Read],
  initial: Float32Array | undefined,
  segments: readonly (readonly [b: number, from: number, to: number, state: number])[],
): Record<'out' | 'state', Expected> {
  const sums = lightningReference(c, ...reads, initial, segments)
  const own = squaredReads(reads)
  const squares = lazily(() =>
    lightningReference(squaredCase(c), ...own, squared(initial), segments),
  )
  return {
    out: { sums: sums.out, squares: () => squares().out },
    state: { sums: sums.state, squares: () => squares().state },
  }
}

type Slopes = Tensor<'float32'> | readonly number[]

describeDevices('lightning', (device) => {
  describe.each(floats)('%s', (dtype) => {
    const close = (
      actual: ArrayLike<number>,
      { sums, squares }: Expected,
      bound: number,
      what: string,
    ) => expectRms(actual, sums, bound, what, squares)

    it('agrees with the float64 recurrence', async () => {
      const rng = random(20)
      for (let n = 0; n < (device === 'cpu' ? 60 : 150); n++) {
        const c = drawCase(rng)
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const initial = rng.chance(0.5) ? rng.normals(c.b * c.hs * c.d * c.e) : undefined
        const initialState = initial && tensor(initial, [c.b, c.hs, c.d, c.e], { device })
        const segments = Array.from({ length: c.b }, (_, b) => [b, 0, c.s, b] as const)
        const exact = reference(c, reads, initial, segments)
        const chunkSize = rng.pick([16, 32, 64, 128, 256])
        const { out, state } = lightning(q, k, v, {
          slopes: c.slopes,
          scale: c.scale,
          initialState,
          outputFinalState: true,
          chunkSize,
        })
        const what = `chunk ${chunkSize} ${JSON.stringify(c)}`
        close(await out.read({ as: 'float32' }), exact.out, bounds[dtype], `out ${what}`)
        close(await state.read(), exact.state, bounds.float32, `state ${what}`)
      }
    })

    it('rounds but once with high precision', async () => {
      const rng = random(25)
      // half a unit of the result, and what f32 loses on the way
      const once = { float32: 1e-5, float16: 2 ** -11 + 1e-5, bfloat16: 2 ** -8 + 1e-5 }
      for (let n = 0; n < 12; n++) {
        const c = drawCase(rng)
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const segments = Array.from({ length: c.b }, (_, b) => [b, 0, c.s, b] as const)
        const exact = reference(c, reads, undefined, segments)
        const { out, state } = lightning(q, k, v, {
          slopes: c.slopes,
          scale: c.scale,
          outputFinalState: true,
          precision: 'high',
        })
        close(await out.read({ as: 'float32' }), exact.out, once[dtype], JSON.stringify(c))
        close(await state.read(), exact.state, 5e-6, `state ${JSON.stringify(c)}`)
      }
    })

    it('keeps packed sequences apart, empty ones too', async () => {
      const rng = random(21)
      for (let n = 0; n < 10; n++) {
        const sizes = Array.from({ length: rng.pick([1, 3, 6]) }, () =>
          rng.pick([0, 1, 17, 64, 100]),
        )
        const cuSeqlens = starts(sizes)
        const c = { ...drawCase(rng), b: 1, s: cuSeqlens.at(-1)! }
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const initial = rng.normals(sizes.length * c.hs * c.d * c.e)
        const segments = sizes.map(
          (size, i) => [0, cuSeqlens[i]!, cuSeqlens[i]! + size, i] as const,
        )
        const exact = reference(c, reads, initial, segments)
        const { out, state } = lightning(q, k, v, {
          slopes: c.slopes,
          scale: c.scale,
          initialState: tensor(initial, [sizes.length, c.hs, c.d, c.e], { device }),
          outputFinalState: true,
          cuSeqlens: rng.chance(0.5)
            ? cuSeqlens
            : tensor(cuSeqlens, undefined, { dtype: 'int32', device }),
        })
        const what = `${sizes} ${JSON.stringify(c)}`
        close(await out.read({ as: 'float32' }), exact.out, bounds[dtype], `out ${what}`)
        close(await state.read(), exact.state, bounds.float32, `state ${what}`)
      }
    })

    it('gives the same in pieces, prefill and decode mixed', async () => {
      const rng = random(22)
      for (let n = 0; n < 10; n++) {
        const c = { ...drawCase(rng), b: 2, s: 150 }
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const exact = reference(c, reads, undefined, [
          [0, 0, 150, 0],
          [1, 0, 150, 1],
        ])
        const layout = rng.pick(['dk-ev', 'ev-dk'] as const)
        const inLayout = (state: Tensor<'float32'>) =>
          layout === 'dk-ev' ? state.clone() : state.transpose(2, 3).contiguous()
        let state: Tensor<'float32'> = zeros([2, c.hs, c.d, c.e], { device })
        const slots = tensor([2, 0], [2], { dtype: 'int32', device })
        for (let at = 0; at < c.s; ) {
          const size = Math.min(rng.pick([1, 3, 16, 40, 64]), c.s - at)
          const part = [q, k, v].map((x) => x.slice(1, at, at + size)) as [
            typeof q,
            typeof k,
            typeof v,
          ]
          const expected = (b: number): Expected => {
            const row = Math.max(c.hq, c.hv) * c.e
            const rows = (x: Float64Array) =>
              x.subarray((b * c.s + at) * row, (b * c.s + at + size) * row)
            return { sums: rows(exact.out.sums), squares: () => rows(exact.out.squares()) }
          }
          let out: Tensor
          if (size <= 16) {
            const pool = zeros([3, c.hs, ...(layout === 'dk-ev' ? [c.d, c.e] : [c.e, c.d])], {
              device,
            })
            const stored = inLayout(state)
            pool.select(0, 2).copyFrom(stored.select(0, 0))
            pool.select(0, 0).copyFrom(stored.select(0, 1))
            const step = {
              slopes: c.slopes,
              scale: c.scale,
              stateLayout: layout,
              outputAllStates: true,
            }
            const result = lightningDecode(...part, pool, slots, step)
            out = result.out
            state = zeros([2, c.hs, c.d, c.e], { device })
            const back = (slot: number) =>
              layout === 'dk-ev' ? pool.select(0, slot) : pool.select(0, slot).transpose(1, 2)
            state.select(0, 0).copyFrom(back(2))
            state.select(0, 1).copyFrom(back(0))
            // the last of the states after each token is the one in the pool
            const last = await result.allStates!.select(1, -1).select(0, 0).read()
            expect(maxError(last, await pool.select(0, 2).read())).toBe(0)
            expect((await pool.select(0, 1).read()).every((x) => x === 0)).toBe(true)
          } else {
            const options = {
              slopes: c.slopes,
              scale: c.scale,
              initialState: state,
              outputFinalState: true as const,
            }
            const result = lightning(...part, options)
            out = result.out
            state = result.state
          }
          for (const b of [0, 1]) {
            const own = await out.select(0, b).read({ as: 'float32' })
            close(
              own,
              expected(b),
              bounds[dtype] * 2,
              `rows ${at} to ${at + size} ${JSON.stringify(c)}`,
            )
          }
          at += size
        }
        close(await state.read(), exact.state, bounds.float32, `state ${JSON.stringify(c)}`)
      }
    })

    it('agrees on long sequences with few heads', async () => {
      const rng = random(26)
      const long = [
        { s: 4133, d: 64, e: 64 },
        { s: 4500, d: 128, e: 128 },
        { s: 14001, d: 40, e: 64, sizes: [9000, 1, 5000] },
      ]
      for (const { sizes, ...size } of long) {
        const slopes = [Math.fround(rng.pick([0, 0.0005, 0.01, 0.5]))]
        const c = { b: 1, hq: 1, hk: 1, hv: 1, hs: 1, scale: 1, slopes, ...size }
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const cuSeqlens = sizes && starts(sizes)
        const segments = (sizes ?? [c.s]).map(
          (length, i) => [0, cuSeqlens?.[i] ?? 0, (cuSeqlens?.[i] ?? 0) + length, i] as const,
        )
        const initial = rng.normals(segments.length * c.d * c.e)
        const exact = reference(c, reads, initial, segments)
        for (const schedule of ['auto', 'fused', 'two-pass'] as const) {
          const outputFinalState = schedule !== 'auto' || rng.chance(0.5)
          const { out, state } = lightning(q, k, v, {
            slopes,
            cuSeqlens,
            outputFinalState,
            schedule,
            initialState: tensor(initial, [segments.length, 1, c.d, c.e], { device }),
          })
          const what = `${JSON.stringify(c)} ${sizes} ${schedule}`
          close(await out.read({ as: 'float32' }), exact.out, bounds[dtype], `out ${what}`)
          if (state) close(await state.read(), exact.state, bounds.float32, `state ${what}`)
        }
      }
    })

    it('gives a sequence the same bits in any batch, by a schedule that was chosen', async () => {
      const rng = random(31)
      const sizes = { s: 1100, hq: 2, hk: 2, hv: 2, hs: 2, d: 128, e: 128 }
      const slopes = [0.001, 0.02]
      const few = await draw(rng, { ...sizes, b: 3, scale: 1, slopes }, dtype, device)
      // on a GPU more states than multiprocessors
      const many = device === 'cpu' ? 6 : 70
      const all = ([few.q, few.k, few.v] as const).map((x) => {
        const batch = empty([many, ...x.shape.slice(1)], { dtype, device })
        for (let i = 0; i < many; i++)
          batch.slice(0, i, i + 1).copyFrom(x.slice(0, i % 3, (i % 3) + 1))
        return batch
      }) as [typeof few.q, typeof few.q, typeof few.q]
      const bytes = async (x: Tensor) => Buffer.from((await x.contiguous().read()).buffer)
      for (const schedule of ['fused', 'two-pass'] as const) {
        const options = { slopes, schedule, outputFinalState: true } as const
        const [batch, three, one] = [
          lightning(...all, options),
          lightning(few.q, few.k, few.v, options),
          lightning(...(all.map((x) => x.slice(0, 3, 4)) as typeof all), options),
        ]
        for (const key of ['out', 'state'] as const) {
          const expected = await bytes(batch[key].slice(0, 3, 6))
          expect((await bytes(three[key])).equals(expected), `${schedule} ${key}`).toBe(true)
          const own = await bytes(one[key])
          expect(own.equals(expected.subarray(0, own.length)), `${schedule} ${key}`).toBe(true)
        }
      }
    })

    it('decodes many states at once, in any order of slots', async () => {
      const rng = random(27)
      const several = { s: 2, hq: 16, hk: 8, hv: 8, hs: 8 }
      for (const [d, e, sizes] of [
        [128, 128, several],
        [128, 128, { ...several, s: 1, hq: 8 }],
        [72, 100, several],
        [24, 136, several],
      ] as const) {
        const slopes = Array.from({ length: 8 }, () => Math.fround(rng.pick([0, 0.01, 0.5, 200])))
        const c = { b: 40, d, e, scale: 0.7, slopes, ...sizes }
        const { q, k, v, reads } = await draw(rng, c, dtype, device)
        const initial = rng.normals(c.b * c.hs * d * e)
        const segments = Array.from({ length: c.b }, (_, b) => [b, 0, c.s, b] as const)
        const exact = reference(c, reads, initial, segments)
        const order = segments.map(([b]) => (7 * b) % c.b)
        const slots = tensor(order, undefined, { dtype: 'int32', device })
        for (const stateLayout of ['dk-ev', 'ev-dk'] as const) {
          const turned = (x: Tensor<'float32'>) =>
            stateLayout === 'dk-ev' ? x : x.transpose(2, 3).contiguous()
          const given = turned(tensor(initial, [c.b, c.hs, d, e], { device }))
          const states = zeros(given.shape, { device })
          for (const [b, slot] of order.entries())
            states.select(0, slot).copyFrom(given.select(0, b))
          const { out } = lightningDecode(q, k, v, states, slots, {
            slopes,
            scale: 0.7,
            stateLayout,
          })
          const what = `${d} ${e} ${c.s} ${stateLayout}`
          close(await out.read({ as: 'float32' }), exact.out, bounds[dtype], `out ${what}`)
          for (const [b, slot] of order.entries())
            given.select(0, b).copyFrom(states.select(0, slot))
          close(await turned(given).read(), exact.state, bounds.float32, `state ${what}`)
        }
      }
    })

    it('skips rows with a negative slot', async () => {
      const rng = random(23)
      const common = { s: 1, d: 128, e: 128, hq: 2, hk: 2, hv: 2, hs: 2, slopes: [0, 0.5] }
      for (const sizes of [{ s: 3 }, common]) {
        const c = { ...drawCase(rng), ...sizes, b: 2 }
        const { q, k, v } = await draw(rng, c, dtype, device)
        const before = rng.normals(4 * c.hs * c.d * c.e)
        const states = tensor(before, [4, c.hs, c.d, c.e], { device })
        const slots = tensor([-1, 3], [2], { dtype: 'int32', device })
        const { out } = lightningDecode(q, k, v, states, slots, { slopes: c.slopes })
        expect((await out.select(0, 0).read({ as: 'float32' })).every((x) => x === 0)).toBe(true)
        const after = await states.read()
        const size = c.hs * c.d * c.e
        expect([...after.subarray(0, 3 * size)]).toEqual([...before.subarray(0, 3 * size)])
        expect(maxError(after.subarray(3 * size), before.subarray(3 * size))).toBeGreaterThan(0)
      }
    })

    it('leaves earlier outputs alone when a token changes', async () => {
      const rng = random(24)
      const c = { ...drawCase(rng), b: 1, s: 130 }
      const { q, k, v } = await draw(rng, c, dtype, device)
      const run = () =>
        lightning(q, k, v, { slopes: c.slopes }).out.slice(1, 0, 100).read({ as: 'float32' })
      const before = await run()
      v.slice(1, 100).copyFrom(tensor([5], [1], { device }).expand([1, 30, c.hv, c.e]))
      expect(maxError(await run(), before)).toBe(0)
    })
  })

  it('is linear, and heads go their own ways', async () => {
    const rng = random(32)
    const whole = (n: number) => Float32Array.from({ length: n }, () => rng.below(5) - 2)
    const add = (x: Float32Array, y: Float32Array) => x.map((one, i) => one + y[i]!)
    const slopes = [0, 0.01, 0.2, 3]
    const order = [2, 0, 3, 1]
    for (const dtype of floats)
      for (const [s, d, e] of [
        [1, 8, 8],
        [70, 40, 24],
        [150, 128, 64],
      ] as const) {
        const make = (values: Float32Array, size: number): Tensor<FloatDType> =>
          tensor(values, [1, s, 4, size], { dtype, device })
        const [q, k] = [make(whole(s * 4 * d), d), make(whole(s * 4 * d), d)]
        const values = [whole(s * 4 * e), whole(s * 4 * e)] as const
        const states = [whole(4 * d * e), whole(4 * d * e)] as const
        const v = make(values[0], e)
        const run = async (
          given: readonly Tensor<FloatDType>[],
          initial: Float32Array,
          own = slopes,
        ) => {
          const initialState = tensor(initial, [1, 4, d, e], { device })
          const options = { slopes: own, initialState, outputFinalState: true } as const
          const { out, state } = lightning(given[0]!, given[1]!, given[2]!, options)
          return [await out.read({ as: 'float32' }), await state.read()] as const
        }
        const what = `${dtype} ${s} ${d} ${e}`
        const first = await run([q, k, v], states[0])
        const second = await run([q, k, make(values[1], e)], states[1])
        const both = await run([q, k, make(add(...values), e)], add(...states))
        expect(relativeRms(both[0], add(first[0], second[0])), what).toBeLessThan(2 * bounds[dtype])
        expect(relativeRms(both[1], add(first[1], second[1])), what).toBeLessThan(1e-5)

        // powers of two change no digit, but of what is next to nothing in 16 bits; beside it a few results of float16 round
        // the other way
        const same = dtype === 'float16' ? 5e-5 : 1e-6
        const times = (x: Tensor<FloatDType>, factor: number) =>
          mul(x, tensor([factor], [1], { device }).cast(dtype))
        const twice = await run([times(q, 2), k, v], states[0])
        expect(relativeRms(twice[0], add(first[0], first[0])), what).toBeLessThan(same)
        const moved = await run([q, times(k, 2), times(v, 0.5)], states[0])
        expect(relativeRms(moved[0], first[0]), what).toBeLessThan(same)
        expect(relativeRms(moved[1], first[1]), what).toBeLessThan(1e-6)

        const heads = (x: Tensor<FloatDType>, axis: number) => {
          const to = empty(x.shape, { dtype: x.dtype, device })
          for (const [h, from] of order.entries())
            to.slice(axis, h, h + 1).copyFrom(x.slice(axis, from, from + 1))
          return to
        }
        const state = (x: Float32Array) =>
          heads(tensor(x, [1, 4, d, e], { device }), 1).read({ as: 'float32' })
        const given = [q, k, v].map((x) => heads(x, 2))
        const turned = await run(
          given,
          await state(states[0]),
          order.map((h) => slopes[h]!),
        )
        const out = await heads(make(first[0], e), 2).read({ as: 'float32' })
        expect(maxError(turned[0], out), what).toBe(0)
        expect(maxError(turned[1], await state(first[1])), what).toBe(0)
      }
  })

  it('takes states in either layout, and of 16 bits', async () => {
    const rng = random(29)
    const c = { ...drawCase(rng), b: 2, s: 70, hq: 2, hk: 2, hv: 2, hs: 2, d: 32, e: 24 }
    const { q, k, v } = await draw(rng, c, 'bfloat16', device)
    const dout = (await sample(rng, [2, 70, 2, 24], 'bfloat16', device)).tensor
    const given = async (dtype: 'float32' | 'bfloat16') =>
      (await sample(rng, [2, 2, 32, 24], dtype, device)).tensor as Tensor<FloatDType>
    const [initialState, dstate] = [await given('bfloat16'), await given('float32')]
    const turn = (x: Tensor<FloatDType>) => x.transpose(2, 3).contiguous()
    const options = { slopes: [0.1, 0.01] }
    const all = (turned: boolean, narrow: boolean) => {
      const place = (x: Tensor<FloatDType>) => (turned ? turn(x) : x)
      const initial = place(narrow ? initialState : initialState.cast('float32'))
      const own = {
        ...options,
        initialState: initial,
        ...(turned && { stateLayout: 'ev-dk' as const }),
      }
      const { out, state } = lightning(q, k, v, { ...own, outputFinalState: true })
      const backward = lightningBackward(q, k, v, dout, { ...own, dstate: place(dstate) })
      const { dq, dk, dv, dinitialState } = backward
      // nothing that was given is freed
      expect(initial.disposed).toBe(false)
      return [out, place(state), dq, dk, dv, place(dinitialState!)]
    }
    const bytes = async (x: Tensor<FloatDType>) => Buffer.from((await x.read()).buffer)
    const expected = await Promise.all(all(false, false).map(bytes))
    for (const [turned, narrow] of [
      [false, true],
      [true, false],
      [true, true],
    ] as const)
      for (const [i, tensor] of all(turned, narrow).entries())
        expect((await bytes(tensor)).equals(expected[i]!), `${turned} ${narrow} ${i}`).toBe(true)
    const wrong = await failure(() =>
      lightning(q, k, v, { ...options, stateLayout: 'v' as 'dk-ev' }),
    )
    expect(wrong.message).toBe('lightning: stateLayout must be "dk-ev" or "ev-dk", got "v"')
  })

  it('sums when nothing decays, and sees only itself when everything does', async () => {
    const n = 200
    const ones = tensor(new Float32Array(n).fill(1), [1, n, 1, 1], { device })
    const sums = await lightning(ones, ones, ones, { slopes: [0] }).out.read()
    sums.forEach((sum, t) => expect(sum).toBe(t + 1))
    const alone = await lightning(ones, ones, ones, { slopes: [200] }).out.read()
    alone.forEach((value) => expect(value).toBe(1))
    const decay = Math.exp(-Math.fround(0.1))
    const geometric = await lightning(ones, ones, ones, { slopes: [0.1] }).out.read()
    geometric.forEach((value, t) =>
      expect(value).toBeCloseTo((1 - decay ** (t + 1)) / (1 - decay), 4),
    )
  })

  it('refuses slopes that would grow, at the call or at the read', async () => {
    const x = tensor(new Float32Array(32).fill(1), [1, 4, 1, 8], { device })
    const slots = tensor([0], [1], { dtype: 'int32', device })
    for (const bad of [-0.5, Number.NaN, Number.POSITIVE_INFINITY]) {
      const slopes = tensor([bad], [1], { device })
      for (const [op, call] of [
        ['lightning', (slopes: Slopes) => lightning(x, x, x, { slopes }).out],
        ['lightning.backward', (slopes: Slopes) => lightningBackward(x, x, x, x, { slopes }).dv],
        [
          'lightning.decode',
          (slopes: Slopes) =>
            lightningDecode(x, x, x, zeros([1, 1, 8, 8], { device }), slots, { slopes }).out,
        ],
      ] as const) {
        expect((await failure(() => call([bad]))).message).toContain(
          `${op}: slopes[0] must be a finite number`,
        )
        expect((await failure(() => call(slopes).read())).message).toMatch(
          new RegExp(`^${op}: .*slopes.* finite and at least 0`),
        )
      }
    }
  })

  it('rejects the read when slots or offsets on the device are out of range', async () => {
    const x = tensor(new Float32Array(4), [2, 2, 1, 1], { device })
    const states = zeros([2, 1, 1, 1], { device })
    for (const bad of [
      [0, 2],
      [0, 0],
    ]) {
      const slots = tensor(bad, [2], { dtype: 'int32', device })
      if (device !== 'cpu' && bad[1] === 0) continue // two rows on one slot are only looked for on the CPU
      await expect(
        lightningDecode(x, x, x, states, slots, { slopes: [0] }).out.read(),
      ).rejects.toThrow(/^lightning.decode: slots must/)
    }
    const packed = x.reshape([1, 4, 1, 1])
    for (const bad of [
      [0, 3],
      [1, 4],
      [0, 3, 2, 4],
    ]) {
      const cuSeqlens = tensor(bad, undefined, { dtype: 'int32', device })
      await expect(
        lightning(packed, packed, packed, { slopes: [0], cuSeqlens }).out.read(),
      ).rejects.toThrow(/^lightning: cuSeqlens must/)
    }
  })
})

describe('slopes', () => {
  it('are those of released weights', () => {
    expect(alibiSlopes(8)).toEqual([1, 2, 3, 4, 5, 6, 7, 8].map((i) => 2 ** -i))
    expect(alibiSlopes(64)[0]).toBeCloseTo(0.917004, 6)
    expect(alibiSlopes(64)[63]).toBe(2 ** -8)
    expect(
      alibiSlopes(12)
        .slice(8)
        .map((x) => x.toFixed(6)),
    ).toEqual(['0.707107', '0.353553', '0.176777', '0.088388'])
    expect(alibiSlopes(8, 5, 6)[0]).toBeCloseTo(0.5e-5, 12)
    expect(alibiSlopes(8, 0, 1)[0]).toBeCloseTo(0.5 * (1 + 1e-5), 12)
  })

  it('differ by convention where they should', () => {
    expect(hfMiniMaxSlopes(12, 0, 4)[11]).toBeCloseTo(2 ** -8 * (1 + 1e-5), 12)
    expect(tnlPaperSlopes(8, 0, 6)).toEqual([0, 1, 2, 3, 4, 5, 6, 7])
  })
})
