import { alibiSlopes, lightning, lightningBackward, randn, type Tensor } from 'heddle'
import { expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { describeGpu } from '../support/gpu.js'

const device = 'cuda:0'
const draw = (shape: readonly number[], seed: number) =>
  randn(shape, { dtype: 'bfloat16', device, seed })

/** Two heads of each: reading all would take minutes. */
async function sampled(tensors: readonly Tensor[]): Promise<Float32Array[]> {
  const read = await Promise.all(tensors.map((x) => x.slice(2, 0, 2).read({ as: 'float32' })))
  for (const tensor of tensors) tensor.dispose()
  return read
}

async function expectSame(times: number, run: () => Promise<Float32Array[]>): Promise<void> {
  const first = await run()
  for (let n = 1; n < times; n++)
    for (const [i, values] of (await run()).entries())
      expect(maxError(values, first[i]!), `run ${n}, result ${i}`).toBe(0)
}

describeGpu('lightning on large shapes', () => {
  // one pass, halves of e, and segments side by side
  it.each([
    { b: 4, h: 32, s: 700 },
    { b: 1, h: 64, s: 1000 },
    { b: 1, h: 16, s: 8200 },
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

  it('gives the same gradients 100 times', async () => {
    const shape = [2, 300, 4, 64]
    const [q, k, v, dout] = [draw(shape, 1), draw(shape, 2), draw(shape, 3), draw(shape, 4)]
    await expectSame(100, () => {
      const { dq, dk, dv } = lightningBackward(q, k, v, dout, { slopes: alibiSlopes(4) })
      return sampled([dq, dk, dv])
    })
  }, 600_000)
})
