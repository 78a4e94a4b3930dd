import { flexPrefill, randn } from 'heddle'
import { expect, it } from 'vitest'
import { describeGpu } from '../support/gpu.js'
import { random } from '../support/random.js'

// Few heads have several CTAs each, and meet; of many each has one, and some wait for a CTA. Float32 is probed alike.
describeGpu('flexPrefill', () => {
  it.each(['reference', 'coverage'] as const)('chooses alike with many CTAs: %s', async (mode) => {
    const rng = random(95)
    for (const tau of [0, 0.3, 1]) {
      const [n, many] = [4096 + 16 * rng.below(3), 400]
      const [q, k] = [1, 2].map(() =>
        randn([1, n, 1, 16], { device: 'cuda:0', seed: rng.below(1000) }),
      )
      const options = { mode, tau, gamma: rng.pick([0.5, 0.9]), minBudget: 32, block: 16 } as const
      const one = await flexPrefill(q!, k!, options).blocks!.read()
      const all = await flexPrefill(q!.expand([1, n, many, 16]), k!, options).blocks!.read()
      for (let head = 0; head < many; head++)
        expect(all.subarray(head * one.length, (head + 1) * one.length), `${tau}`).toEqual(one)
    }
  })
})
