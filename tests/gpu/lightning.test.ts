import { alibiSlopes, lightning, lightningBackward, randn, synchronize, type Tensor } from 'heddle'
import { expect, it } from 'vitest'
import { bytesOf, relativeRms } from '../support/compare.js'
import { describeGpu } from '../support/gpu.js'

const device = 'cuda:0'
const draw = (shape: readonly number[], seed: number) =>
  randn(shape, { dtype: 'bfloat16', device, seed })

/** The bytes of two heads of each: reading all would take minutes. */
async function sampled(tensors: readonly Tensor[]): Promise<Buffer> {
  const read = await Promise.all(tensors.map((x) => x.slice(2, 0, 2).read()))
  for (const tensor of tensors) tensor.dispose()
  return bytesOf(read)
}

async function expectSame(times: number, run: () => Promise<Buffer>): Promise<void> {
  const first = await run()
  for (let n = 1; n < times; n++) expect(first.equals(await run()), `run ${n}`).toBe(true)
}

describeGpu('lightning on large shapes', () => {
  // one pass, halves of e, and segments of halves or whole rows, with one or two CTAs to a summary
  it.each([
    { b: 4, h: 32, s: 700 },
    { b: 1, h: 64, s: 1000 },
    { b: 1, h: 16, s: 8200 },
    { b: 1, h: 4, s: 8200 },
    { b: 1, h: 24, s: 8200 },
  ])(
    'gives the same bits 1,000 times: %j',
    async ({ b, h, s }) => {
      const shape = [b, s, h, 128]
      const [q, k, v] = [draw(shape, 1), draw(shape, 2), draw(shape, 3)]
      const options = { slopes: alibiSlopes(h), outputFinalState: true as const }
      await expectSame(1000, () => {
        const { out, state } = lightning(q, k, v, options)
        return sampled([out, state])
      })
    },
    600_000,
  )

  // a kernel begins under the end of the one whose result it reads, and writes where that one read
  it.each([
    { b: 4, h: 32, s: 500 },
    { b: 1, h: 64, s: 1000 },
    { b: 1, h: 16, s: 8200 },
    { b: 1, h: 4, s: 8200 },
    { b: 1, h: 24, s: 8200 },
  ])(
    'waits for the call before: %j',
    async ({ b, h, s }) => {
      const shape = [b, s, h, 128]
      const [q, k, v] = [draw(shape, 1), draw(shape, 2), draw(shape, 3)]
      const options = { slopes: alibiSlopes(h), scale: 0.05 }
      const forward = (x: typeof q) => lightning(x, k, v, options).out
      const backward = (x: typeof q) => {
        const { dq, dk, dv } = lightningBackward(q, k, v, x, options)
        for (const gradient of [dk, dv]) gradient.dispose()
        return dq
      }
      const chain = async (waits: boolean) => {
        let x = q
        for (let n = 0; n < 20; n++) {
          const next = n % 3 < 2 ? forward(x) : backward(x)
          if (waits) await synchronize(device)
          if (x !== q) x.dispose()
          x = next
        }
        return sampled([x])
      }
      const expected = await chain(true)
      for (let n = 0; n < 100; n++)
        expect(expected.equals(await chain(false)), `run ${n}`).toBe(true)
    },
    600_000,
  )

  // portable code, which slopes need, and Hopper's in one piece and in segments
  it.each([
    { b: 2, h: 4, s: 300, d: 64, outputDslopes: true, times: 100 },
    { b: 2, h: 4, s: 300, d: 64, outputDslopes: false, times: 1000 },
    { b: 4, h: 32, s: 300, d: 128, outputDslopes: false, times: 1000 },
    { b: 1, h: 4, s: 4200, d: 128, outputDslopes: false, times: 1000 },
  ])(
    'gives the same gradients every time: %j',
    async ({ b, h, s, d, outputDslopes, times }) => {
      const shape = [b, s, h, d]
      const [q, k, v, dout] = [draw(shape, 1), draw(shape, 2), draw(shape, 3), draw(shape, 4)]
      const initialState = randn([b, h, d, d], { device, seed: 5 })
      const options = { slopes: alibiSlopes(h), initialState, outputDslopes }
      await expectSame(times, async () => {
        const { dq, dk, dv, dinitialState, dslopes } = lightningBackward(q, k, v, dout, options)
        const sums = dslopes ? [await dslopes.read()] : []
        dslopes?.dispose()
        const [state] = await Promise.all([dinitialState!.slice(1, 0, 2).read()])
        dinitialState!.dispose()
        return Buffer.concat([await sampled([dq, dk, dv]), bytesOf([...sums, state!])])
      })
    },
    600_000,
  )

  // few heads and a long sequence, whose segments depend on each other; none is in the unit tests
  it('agrees with the portable gradients in segments', async () => {
    const [b, s, h, d] = [1, 5000, 3, 128]
    const shape = [b, s, h, d]
    const [q, k, v, dout] = [draw(shape, 1), draw(shape, 2), draw(shape, 3), draw(shape, 4)]
    const dstate = randn([b, h, d, d], { device, seed: 6 })
    const options = { slopes: [0, 0.001, 0.3], dstate }
    const run = async (outputDslopes: boolean) => {
      const { dq, dk, dv } = lightningBackward(q, k, v, dout, { ...options, outputDslopes })
      return Promise.all([dq, dk, dv].map((x) => x.read({ as: 'float32' })))
    }
    const [fast, plain] = [await run(false), await run(true)]
    for (const [i, gradient] of fast.entries())
      expect(relativeRms(gradient, plain[i]!), `gradient ${i}`).toBeLessThanOrEqual(5e-3)
  })
})
