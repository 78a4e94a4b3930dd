import { type AttentionResult, attention, type FloatDType, merge, tensor, zeros } from 'heddle'
import { describe, expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random, sample } from '../support/random.js'

describeDevices('merge', (device) => {
  describe.each(floats)('%s', (dtype) => {
    it('joins any split of the keys into the whole', async () => {
      const rng = random(30)
      for (let n = 0; n < 10; n++) {
        const d = rng.pick([8, 64, 128])
        const q = await sample(rng, [2, 5, 4, d], dtype, device)
        const k = await sample(rng, [2, 120, 2, d], dtype, device)
        const v = await sample(rng, [2, 120, 2, d], dtype, device)
        const whole = attention(q.tensor, k.tensor, v.tensor)
        const cuts = [0, rng.below(121), rng.below(121), 120].sort((a, b) => a - b)
        const parts: AttentionResult[] = [0, 1, 2].map((i) =>
          attention(
            q.tensor,
            k.tensor.slice(1, cuts[i]!, cuts[i + 1]),
            v.tensor.slice(1, cuts[i]!, cuts[i + 1]),
          ),
        )
        const joined = merge(parts)
        const expected = await whole.out.read({ as: 'float32' })
        const error = maxError(await joined.out.read({ as: 'float32' }), expected)
        expect(error, `${cuts}`).toBeLessThanOrEqual(
          8 * epsilon[dtype] * Math.max(largest(expected), 1),
        )
        expect(maxError(await joined.lse.read(), await whole.lse.read())).toBeLessThan(1e-5)
      }
    })

    it('treats a part without keys as nothing, whatever it holds', async () => {
      const out = (value: number) => tensor([value, value], [1, 1, 1, 2], { dtype, device })
      const lse = (value: number) => tensor([value], [1, 1, 1], { device })
      const nothing = { out: out(Number.NaN), lse: lse(Number.NEGATIVE_INFINITY) }
      const something = { out: out(3), lse: lse(2) }
      for (const parts of [
        [nothing, something],
        [something, nothing],
      ]) {
        const joined = merge(parts)
        expect([...(await joined.out.read({ as: 'float32' }))]).toEqual([3, 3])
        expect([...(await joined.lse.read())]).toEqual([2])
      }
      const empty = merge([nothing, nothing])
      expect([...(await empty.out.read({ as: 'float32' }))]).toEqual([0, 0])
      expect([...(await empty.lse.read())]).toEqual([Number.NEGATIVE_INFINITY])
    })
  })

  it('names parts as its caller does', async () => {
    const part = (s: number, dtype: FloatDType = 'float32') => ({
      out: zeros([1, s, 1, 8], { dtype, device }),
      lse: zeros([1, 1, s], { device }),
    })
    expect((await failure(() => merge([part(2), part(2), part(3)]))).message).toBe(
      'merge: parts[2].out must be [b, s, h, d], got [1, 3, 1, 8] (s is 3, but parts[0].out has s = 2)',
    )
    const narrow = await failure(() => merge([part(2), part(2, 'bfloat16')]))
    expect(narrow).toMatchObject({ code: 'ERR_DTYPE', op: 'merge', argument: 'parts[1].out' })
  })
})
