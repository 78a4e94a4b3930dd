import { attention, attentionDefinition, cascade, tensor } from 'heddle'
import { describe, expect, it } from 'vitest'

describe('compile', () => {
  // The shortest of many times of each, in turns, in microseconds: so many that what is hot is compiled
  const costs = (...calls: (() => unknown)[]) => {
    const best = calls.map(() => Number.POSITIVE_INFINITY)
    for (let n = 0; n < 2000; n++)
      for (const [i, call] of calls.entries()) {
        const start = performance.now()
        for (let again = 0; again < 20; again++) call()
        best[i] = Math.min(best[i]!, (performance.now() - start) * 50)
      }
    return best as [number, ...number[]]
  }

  it('keeps plans', () => {
    const parsed = cascade(attentionDefinition)
    expect(cascade(attentionDefinition).compile()).toBe(parsed.compile())
    expect(costs(() => parsed.compile())[0]).toBeLessThan(3)
  })

  it('adds less to a call of the operator than it takes to look up a plan', () => {
    const x = tensor(new Float32Array(8), [1, 1, 1, 8])
    const plan = cascade(attentionDefinition).compile()
    const free = (results: object) => {
      for (const one of Object.values(results)) one.dispose()
    }
    const [direct, planned] = costs(
      () => free(attention(x, x, x, { causal: true, scale: 0.3 })),
      () => free(plan(x, x, x, { scale: 0.3 })),
    )
    expect(planned! - direct).toBeLessThan(3)
  })
})
