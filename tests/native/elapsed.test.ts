import { elapsed, graph, linear, randn, silu } from 'heddle'
import { expect, it } from 'vitest'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'

describeDevices('elapsed', (device) => {
  const draw = () => randn([512, 512], { seed: 1, device })
  const product = (times: number) => () => {
    const x = draw()
    for (let i = 0; i < times; i++) linear(x, x).dispose()
  }

  it('is the time of the work, not of enqueueing or of what was queued before', async () => {
    await elapsed(product(1), device)
    const [started, few, many] = [
      performance.now(),
      elapsed(product(2), device),
      elapsed(product(40), device),
    ]
    const [short, long] = await Promise.all([few, many])
    expect(short).toBeGreaterThan(0)
    expect(long).toBeGreaterThan(5 * short)
    expect(short + long).toBeLessThan(performance.now() - started)
    expect(await elapsed(() => {}, device)).toBeLessThan(long / 4)
  })

  it('refuses what it cannot measure and passes on what the function throws', async () => {
    const problem = new Error('mine')
    const fail = () =>
      elapsed(() => {
        throw problem
      }, device)
    expect(fail).toThrow(problem)
    for (const body of [undefined, 1, async () => {}]) {
      const error = await failure(() => elapsed(body as () => void, device))
      expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'elapsed', argument: 'body' })
    }
    const inside = await failure(() => graph(() => elapsed(() => silu(draw()), device)))
    expect(inside).toMatchObject({ code: 'ERR_UNSUPPORTED', op: 'elapsed' })
    expect(await elapsed(product(1), device)).toBeGreaterThan(0)
  })
})
