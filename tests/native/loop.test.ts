import { monitorEventLoopDelay, performance } from 'node:perf_hooks'
import { setTimeout as pause } from 'node:timers/promises'
import { add, attention, randn, synchronize, zeros } from 'heddle'
import { describe, expect, it } from 'vitest'

const milliseconds = (nanoseconds: number) => nanoseconds / 1e6

// Other processes share the machine, so each bound is for the best of some rounds
async function best(rounds: number, enough: number, measure: () => Promise<number>) {
  let least = Number.POSITIVE_INFINITY
  for (let i = 0; i < rounds && least >= enough; i++) least = Math.min(least, await measure())
  return least
}

describe('the event loop', () => {
  it('goes on while operators work', async () => {
    const q = randn([1, 1024, 8, 64])
    const delay = await best(15, 5, async () => {
      const monitor = monitorEventLoopDelay({ resolution: 1 })
      const began = performance.now()
      let calls = 0
      let ticks = 0
      monitor.enable()
      let working = true
      const work = (async () => {
        while (performance.now() - began < 1000) {
          for (let i = 0; i < 8; i++) attention(q, q, q).out.dispose()
          calls += 8
          await synchronize()
        }
        working = false
      })()
      while (working) {
        await pause(1)
        ticks++
      }
      await work
      monitor.disable()
      expect(calls).toBeGreaterThan(8)
      expect(ticks).toBeGreaterThan(100)
      // the monitor counts its own resolution as delay
      return milliseconds(monitor.percentile(99))
    })
    expect(delay).toBeLessThan(5)
  })

  it('is not held by one call of many seconds of work', async () => {
    const q = randn([1, 4096, 8, 64])
    const enqueue = await best(5, 5, async () => {
      await synchronize()
      const began = performance.now()
      const { out } = attention(q, q, q)
      const reading = out.read()
      const took = performance.now() - began
      await reading
      expect(performance.now() - began).toBeGreaterThan(4 * took)
      return took
    })
    expect(enqueue).toBeLessThan(5)
  })

  it('pays less than 5 µs to enqueue a small operator', async () => {
    const x = zeros([4])
    const cost = await best(20, 0.005, async () => {
      const costs: number[] = []
      for (let i = 0; i < 2000; i++) {
        const began = performance.now()
        const y = add(x, x)
        costs.push(performance.now() - began)
        y.dispose()
      }
      await synchronize()
      return costs.sort((a, b) => a - b)[costs.length / 2]!
    })
    expect(cost * 1000).toBeLessThan(5)
  })
})
