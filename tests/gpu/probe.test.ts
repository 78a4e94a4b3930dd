import { explain, probe, randn } from 'heddle'
import { expect, it } from 'vitest'
import { describeGpu } from '../support/gpu.js'
import { random } from '../support/random.js'

// Maps of many tiles, whose rows end in the middle of a stride and stand behind a prefix, against the CPU
describeGpu('probe', () => {
  it.each(['rows', 'antidiagonal'] as const)('agrees with the CPU on long %s', async (kind) => {
    const rng = random(96)
    const ways = [
      [1, 3001, 0, 4, 2, 128, 64, 64, 2],
      [2, 1500, 517, 2, 2, 64, 128, 128, 4],
      [1, 4096, 0, 2, 1, 128, 128, 128, 8],
      [1, 1031, 67, 3, 3, 40, 32, 128, 8],
      [1, 2050, 32, 2, 1, 96, 64, 128, 16],
    ] as const
    for (const [b, sq, before, hq, hk, d, blockQ, blockK, stride] of ways)
      for (const dtype of ['bfloat16', 'float16'] as const) {
        const [q, k] = [
          [sq, hq],
          [sq + before, hk],
        ].map(([s, h]) => randn([b, s!, h!, d], { dtype, seed: rng.below(1000) }))
        const options = { kind, block: [blockQ, blockK], stride } as const
        const run = () => probe(q!.to('cuda:0'), k!.to('cuda:0'), options)
        const what = JSON.stringify({ b, sq, before, hq, hk, d, dtype, ...options })
        expect(explain(run), what).toMatchObject({ variant: 'sm90_rows' })
        const [actual, expected] = [await run().read(), await probe(q!, k!, options).read()]
        let worst = 0
        for (const [i, wanted] of expected.entries()) {
          const error = actual[i] === wanted ? 0 : Math.abs(actual[i]! - wanted)
          worst = Math.max(worst, error / (wanted === Number.NEGATIVE_INFINITY ? 1 : wanted + 1e-6))
          if (Number.isNaN(error)) worst = Number.NaN
        }
        expect(worst, what).toBeLessThan(2e-4)
        // nothing depends on timing
        expect(await run().read(), what).toEqual(actual)
      }
  })
})
