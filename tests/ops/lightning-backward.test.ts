import { lightning, lightningBackward, type Tensor, tensor } from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectRms, maxError } from '../support/compare.js'
import { describeDevices, floats } from '../support/devices.js'
import { type Random, random, sample, starts } from '../support/random.js'
import {
  type LightningCase,
  type LightningGradients,
  lazily,
  lightningCase,
  lightningGradients,
  lightningReference,
  reader,
  squared,
  squaredCase,
  squaredReads,
} from '../support/reference.js'

const bounds = { float32: 1e-5, float16: 1e-3, bfloat16: 5e-3 } as const

const drawCase = (rng: Random) =>
  lightningCase(rng, {
    s: [0, 1, 2, 16, 63, 64, 65, 131, 200],
    d: [1, 7, 32, 40, 64, 136],
    e: [1, 5, 32, 48, 80],
  })

/** Central differences of the recurrence, which share nothing with the gradients but the definition. */
function byDifferences(
  loss: (numbers: Float64Array) => number,
  at: Float64Array,
  index: number,
): number {
  const step = 1e-5
  const moved = (by: number) => {
    const numbers = at.slice()
    numbers[index] = numbers[index]! + by
    return loss(numbers)
  }
  return (moved(step) - moved(-step)) / (2 * step)
}

describe('the float64 gradients', () => {
  it('agree with central differences', () => {
    const rng = random(30)
    for (let n = 0; n < 12; n++) {
      const drawn = drawCase(rng)
      const c = { ...drawn, b: 1, s: 9, d: 3, e: 2, slopes: drawn.slopes.map(() => rng.next()) }
      const ho = Math.max(c.hq, c.hv)
      const normals = (size: number) => Float64Array.from(rng.normals(size))
      const inputs = {
        q: normals(c.s * c.hq * c.d),
        k: normals(c.s * c.hk * c.d),
        v: normals(c.s * c.hv * c.e),
        initial: normals(2 * c.hs * c.d * c.e),
        slopes: Float64Array.from(c.slopes),
      }
      const [dout, dstate] = [normals(c.s * ho * c.e), normals(inputs.initial.length)]
      const segments = [
        [0, 0, 4, 0],
        [0, 4, 9, 1],
      ] as const
      const readers = ({ q, k, v }: typeof inputs) =>
        [reader(q, c.s, c.hq, c.d), reader(k, c.s, c.hk, c.d), reader(v, c.s, c.hv, c.e)] as const
      const dot = (x: Float64Array, y: Float64Array) => x.reduce((sum, a, i) => sum + a * y[i]!, 0)
      const loss = (x: typeof inputs) => {
        const forward = { ...c, slopes: [...x.slopes] }
        const { out, state } = lightningReference(forward, ...readers(x), x.initial, segments)
        return dot(out, dout) + dot(state, dstate)
      }
      const exact = lightningGradients(
        c,
        ...readers(inputs),
        reader(dout, c.s, ho, c.e),
        inputs.initial,
        dstate,
        segments,
      )
      const pairs = [
        ['q', exact.dq],
        ['k', exact.dk],
        ['v', exact.dv],
        ['initial', exact.dinitial],
        ['slopes', exact.dslopes],
      ] as const
      for (const [name, gradient] of pairs)
        for (let i = 0; i < 6; i++) {
          const index = rng.below(gradient.length)
          const difference = byDifferences(
            (numbers) => loss({ ...inputs, [name]: numbers }),
            inputs[name],
            index,
          )
          expect(gradient[index], `${name}[${index}] ${JSON.stringify(c)}`).toBeCloseTo(
            difference,
            5,
          )
        }
    }
  })
})

describeDevices('lightning.backward', (device) => {
  describe.each(floats)('%s', (dtype) => {
    async function draw(rng: Random, c: LightningCase) {
      const ho = Math.max(c.hq, c.hv)
      const q = await sample(rng, [c.b, c.s, c.hq, c.d], dtype, device)
      const k = await sample(rng, [c.b, c.s, c.hk, c.d], dtype, device, { scale: 0.3 })
      const v = await sample(rng, [c.b, c.s, c.hv, c.e], dtype, device)
      const dout = await sample(rng, [c.b, c.s, ho, c.e], dtype, device)
      return {
        tensors: [q.tensor, k.tensor, v.tensor, dout.tensor] as const,
        reads: [
          reader(q.values, c.s, c.hq, c.d),
          reader(k.values, c.s, c.hk, c.d),
          reader(v.values, c.s, c.hv, c.e),
          reader(dout.values, c.s, ho, c.e),
        ] as const,
      }
    }

    async function check(
      rng: Random,
      c: LightningCase,
      sizes: readonly number[] | undefined,
      runs: { chunkSize?: number },
    ) {
      const { tensors, reads } = await draw(rng, c)
      const cuSeqlens = sizes && starts(sizes)
      const segments = cuSeqlens
        ? sizes!.map((size, i) => [0, cuSeqlens[i]!, cuSeqlens[i]! + size, i] as const)
        : Array.from({ length: c.b }, (_, b) => [b, 0, c.s, b] as const)
      const count = segments.length * c.hs * c.d * c.e
      const state = () => (rng.chance(0.6) ? rng.normals(count) : undefined)
      const [initial, dstate] = [state(), state()]
      const place = (values: Float32Array | undefined) =>
        values && tensor(values, [segments.length, c.hs, c.d, c.e], { device })
      const expected = lightningGradients(c, ...reads, initial, dstate, segments)
      const squares = lazily(() =>
        lightningGradients(
          squaredCase(c),
          ...squaredReads(reads),
          squared(initial),
          squared(dstate),
          segments,
        ),
      )
      // a kernel need not be able to
      const outputDslopes = rng.chance(0.5)
      const result = lightningBackward(...tensors, {
        slopes: c.slopes,
        scale: c.scale,
        initialState: place(initial),
        dstate: place(dstate),
        cuSeqlens,
        outputDslopes,
        ...runs,
      })
      const what = `${JSON.stringify(c)} ${sizes} ${JSON.stringify(runs)} ${outputDslopes}`
      const read = (x: Tensor) => x.read({ as: 'float32' })
      const close = async (
        name: keyof LightningGradients,
        actual: Tensor,
        bound: number = bounds[dtype],
      ) => {
        // what underflows in f32 is zero
        const representable = Float32Array.from(expected[name])
        expectRms(
          await read(actual),
          representable,
          bound,
          `${name} ${what}`,
          () => squares()[name],
        )
      }
      await close('dq', result.dq)
      await close('dk', result.dk)
      await close('dv', result.dv)
      expect(result.dinitialState === undefined).toBe(initial === undefined)
      if (result.dinitialState) await close('dinitial', result.dinitialState, bounds.float32)
      expect(result.dslopes === undefined).toBe(!outputDslopes)
      if (!result.dslopes) return
      // a difference of sums over all tokens, each with the error of its gradients
      const dslopes = await read(result.dslopes)
      const top = Math.max(...expected.dslopes.map(Math.abs), c.s * Math.sqrt(c.d * c.e) * 0.01)
      // without decay it is a small difference of large sums
      const terms = expected.dq.reduce((sum: number, x: number) => sum + Math.abs(x), 0) * c.s
      const allowed = Math.max(1e-4 * top, 1e-8 * terms)
      expect(maxError(dslopes, expected.dslopes), `dslopes ${what}`).toBeLessThanOrEqual(allowed)
    }

    it('agrees with the float64 recurrence', async () => {
      const rng = random(31)
      for (let n = 0; n < (device === 'cpu' ? 30 : 60); n++)
        await check(rng, drawCase(rng), undefined, { chunkSize: rng.pick([16, 32, 64, 128, 256]) })
    })

    it('agrees where a GPU has kernels of its own', async () => {
      const rng = random(35)
      for (let n = 0; n < (device === 'cpu' ? 3 : 15); n++) {
        const drawn = drawCase(rng)
        const hs = rng.pick([drawn.hq, drawn.hk])
        const c = {
          ...drawn,
          hv: drawn.hk,
          hs,
          slopes: Array.from({ length: hs }, () => Math.fround(rng.pick([0, 0.004, 0.9, 8]))),
          s: rng.pick([16, 65, 200, 450]),
          d: rng.pick([8, 64, 72, 128]),
          e: rng.pick([8, 64, 72, 128]),
        }
        await check(rng, c, undefined, {})
      }
    })

    it('keeps packed sequences apart, empty ones too', async () => {
      const rng = random(32)
      for (let n = 0; n < 8; n++) {
        const sizes = Array.from({ length: rng.pick([1, 3, 6]) }, () =>
          rng.pick([0, 1, 17, 64, 90]),
        )
        const s = sizes.reduce((sum, size) => sum + size, 0)
        await check(rng, { ...drawCase(rng), b: 1, s }, sizes, {})
      }
    })

    it('gives the same bits every time', async () => {
      const rng = random(33)
      const c = { ...drawCase(rng), b: 2, s: 200 }
      const { tensors } = await draw(rng, c)
      const run = async () => {
        const { dq, dk, dv } = lightningBackward(...tensors, { slopes: c.slopes })
        return Promise.all([dq, dk, dv].map((x) => x.read({ as: 'float32' })))
      }
      const first = await run()
      for (let n = 0; n < 5; n++) expect(await run()).toEqual(first)
    })
  })

  it('is the adjoint of the forward', async () => {
    const rng = random(34)
    const c = { ...drawCase(rng), b: 1, s: 150 }
    const ho = Math.max(c.hq, c.hv)
    const make = async (h: number, last: number) =>
      sample(rng, [1, c.s, h, last], 'float32', device, { strided: false })
    const [q, k, v, dout] = [
      await make(c.hq, c.d),
      await make(c.hk, c.d),
      await make(c.hv, c.e),
      await make(ho, c.e),
    ]
    const options = { slopes: c.slopes, scale: c.scale }
    const out = await lightning(q.tensor, k.tensor, v.tensor, options).out.read({ as: 'float32' })
    const { dv } = lightning.backward(q.tensor, k.tensor, v.tensor, dout.tensor, options)
    const dot = (x: Float32Array, y: Float32Array) => x.reduce((sum, a, i) => sum + a * y[i]!, 0)
    const [left, right] = [dot(await dv.read({ as: 'float32' }), v.values), dot(out, dout.values)]
    const size = out.reduce((sum, x, i) => sum + Math.abs(x * dout.values[i]!), 0)
    expect(Math.abs(left - right)).toBeLessThanOrEqual(1e-5 * size)
  })
})
