import { attention, attentionBackward, type FloatDType, randn } from 'heddle'
import { describe, expect, it } from 'vitest'
import { maxError, relativeRms } from '../support/compare.js'
import { describeGpu } from '../support/gpu.js'
import { random } from '../support/random.js'

const device = 'cuda:0'

// Shapes that are too large for an oracle on the CPU: 16-bit results against those in float32, which other kernels give
describeGpu('attention on large shapes', () => {
  describe.each(['bfloat16', 'float16'] as const)('%s', (dtype) => {
    it.each([64, 128, 256])('head size %d agrees with float32', async (d) => {
      const rng = random(d)
      for (let n = 0; n < 12; n++) {
        const hk = rng.pick([1, 2, 5])
        const [b, hq] = [rng.pick([1, 3]), hk * rng.pick([1, 3, 4])]
        const [sq, sk] = [1 + rng.below(1500), 1 + rng.below(3000)]
        const causal = rng.chance(0.6)
        const draw = (s: number, h: number, seed: number) =>
          randn([b, s, h, d], { dtype, device, seed })
        const q = draw(sq, hq, 3 * n)
        const k = draw(sk, hk, 3 * n + 1)
        const v = draw(sk, hk, 3 * n + 2)
        const ours = attention(q, k, v, { causal })
        const wide = (t: typeof q) => t.cast('float32')
        const exact = attention<FloatDType>(wide(q), wide(k), wide(v), { causal })
        const what = JSON.stringify({ b, sq, sk, hq, hk, causal })
        const [out, expected] = [
          await ours.out.read({ as: 'float32' }),
          await exact.out.read({ as: 'float32' }),
        ]
        expect(relativeRms(out, expected), what).toBeLessThan(dtype === 'bfloat16' ? 4e-3 : 6e-4)
        expect(maxError(await ours.lse.read(), await exact.lse.read()), what).toBeLessThan(1e-4)
      }
    })
  })
})

describeGpu('attention.backward in its order', () => {
  it.each([64, 128])(
    'head size %d gives the same bits 1,000 times while memory moves',
    async (d) => {
      const draw = (heads: number, seed: number) =>
        randn([2, 300, heads, d], { dtype: 'bfloat16', device, seed })
      const [q, k, v, dout] = [draw(4, 1), draw(2, 2), draw(2, 3), draw(4, 4)]
      const { out, lse } = attention(q, k, v, { causal: true })
      const once = async (seed: number) => {
        // lies where the scratch of the last call was
        using pressure = randn([1 + (seed % 7), 100_003], { device, seed })
        const gradients = attentionBackward(q, k, v, out, lse, dout, { causal: true })
        const { dq, dk, dv } = gradients
        const read = await Promise.all([dq.read(), dk.read(), dv.read()])
        for (const made of [dq, dk, dv]) made.dispose()
        expect(pressure.size).toBeGreaterThan(0)
        return Buffer.concat(read.map(({ buffer }) => new Uint8Array(buffer)))
      }
      const first = await once(0)
      for (let i = 1; i <= 1000; i++) expect(Buffer.compare(await once(i), first)).toBe(0)
    },
    120_000,
  )
})
