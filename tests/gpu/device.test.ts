import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import {
  add,
  attention,
  cuda,
  type DType,
  dtypes,
  full,
  linear,
  memory,
  randn,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { expect, it } from 'vitest'
import { root, runScript } from '../support/child.js'
import { maxError } from '../support/compare.js'
import { describeGpu } from '../support/gpu.js'

const device = 'cuda:0'

describeGpu('cuda', () => {
  it('names its devices', () => {
    expect(cuda.devices[0]).toMatchObject({ device, arch: expect.any(Number) })
    expect(cuda.devices[0]!.arch).toBeGreaterThanOrEqual(80)
    expect(cuda.reason).toBeUndefined()
  })

  it('lets garbage be collected when tensors pile up, and not for results that are disposed of', async () => {
    const { stdout, stderr } = await runScript(`
      const { constants, PerformanceObserver } = require('node:perf_hooks')
      const { cuda, empty, memory } = heddle
      const device = 'cuda:0'
      const turn = () => new Promise(setImmediate)
      let collections = 0
      new PerformanceObserver((list) => {
        for (const { detail } of list.getEntries())
          if (detail.kind !== constants.NODE_PERFORMANCE_GC_MINOR) collections++
      }).observe({ entryTypes: ['gc'] })
      const run = async () => {
        for (let i = 0; i < 50; i++) {
          const made = [1, 2, 3].map(() => empty([2 ** 28], { device }))
          for (const one of made) one.dispose()
          await turn()
        }
        console.log(collections)
        let most = 0
        for (let i = 0; i < 1000; i++) {
          for (let j = 0; j < 20; j++) empty([2 ** 24], { device })
          most = Math.max(most, memory(device).bytes)
          await turn()
        }
        console.log(most)
      }
      run()`)
    expect(stderr).toBe('')
    const [collections, most] = stdout.split('\n').map(Number)
    expect(collections).toBe(0)
    // 1,342 GB in all
    expect(most).toBeLessThan(cuda.devices[0]!.memory / 3)
  }, 60_000)

  it('takes a call of nothing as the first of a process', async () => {
    const { stdout, stderr } = await runScript(`
      const x = heddle.zeros([1, 0, 2, 8], { device: 'cuda' })
      const { dq } = heddle.lightningBackward(x, x, x, x, { slopes: [0, 1], outputDslopes: true })
      dq.read().then((values) => console.log(values.length))`)
    expect(stderr).toBe('')
    expect(stdout).toBe('0\n')
  })

  it('moves tensors there and back in the order of the calls', async () => {
    const x = randn([1000, 37], { seed: 5 })
    const there = add(x, x).to(device)
    const again = add(there, there).to('cpu')
    const sum = add(again, again)
    const values = await x.read()
    expect(
      maxError(
        await sum.read(),
        values.map((value) => value * 8),
      ),
    ).toBe(0)
    x.copyFrom(zeros([1000, 37]))
    expect(
      maxError(
        await again.read(),
        values.map((value) => value * 4),
      ),
    ).toBe(0)
  })

  it('makes the same random numbers as the CPU', async () => {
    for (const dtype of ['float32', 'bfloat16', 'float16'] as const) {
      const [a, b] = [
        randn([4099], { seed: 11, dtype }),
        randn([4099], { seed: 11, dtype, device }),
      ]
      const [x, y] = [await a.read({ as: 'float32' }), await b.read({ as: 'float32' })]
      expect(maxError(y, x)).toBeLessThan(dtype === 'float32' ? 1e-5 : 0.05)
    }
  })

  it('converts between all dtypes as the CPU does', async () => {
    const values = [
      0,
      -0,
      1,
      -1,
      0.1,
      2.5,
      3.5,
      -7.5,
      240,
      300,
      448,
      449,
      464,
      480,
      65504,
      65520,
      1e6,
      1e-3,
      1e-8,
      1e30,
      -1e30,
      Number.NaN,
      Number.POSITIVE_INFINITY,
      Number.NEGATIVE_INFINITY,
      2147483648,
      255.5,
      2 ** -10,
      3 * 2 ** -10,
    ]
    const base = tensor(values)
    for (const from of dtypes) {
      const a = base.cast(from)
      const b = a.to(device)
      for (const to of dtypes as readonly DType[]) {
        const [x, y] = [
          await a.cast(to).read({ as: 'float32' }),
          await b.cast(to).read({ as: 'float32' }),
        ]
        expect([...y], `${from} to ${to}`).toEqual([...x])
      }
    }
  })

  it('copies strided views', async () => {
    const x = randn([5, 6, 7], { seed: 3 })
    const y = x.to(device)
    const view = (t: Tensor) => t.transpose(0, 2).slice(1, 1, 5).select(0, 3)
    expect(
      maxError((await view(y).read()) as Float32Array, (await view(x).read()) as Float32Array),
    ).toBe(0)
    const to = zeros([5, 6, 7], { device })
    to.slice(2, 1, 6).copyFrom(y.slice(2, 0, 5))
    expect(maxError(await to.slice(2, 1, 6).read(), await x.slice(2, 0, 5).read())).toBe(0)
    expect((await to.select(2, 0).read()).every((value) => value === 0)).toBe(true)
  })

  it('writes and reads large tensors whole', async () => {
    const n = 20_000_003
    const data = Float32Array.from({ length: n }, (_, i) => i % 65537)
    const x = tensor(data, [n], { device })
    data.fill(0) // taken at the call
    const back = await x.read()
    let wrong = 0
    for (let i = 0; i < n; i++) if (back[i] !== i % 65537) wrong++
    expect(wrong).toBe(0)
  })

  it('gives memory back', async () => {
    await synchronize(device)
    const before = memory(device)
    for (let i = 0; i < 20_000; i++) randn([256], { device, seed: i }).dispose()
    await synchronize(device)
    expect(memory(device).bytes).toBe(before.bytes)
    expect(memory(device).tensors).toBe(before.tensors)
  })

  it('refuses what does not fit with a code, and goes on', async () => {
    expect(() => zeros([2 ** 40], { device })).toThrow(/cannot allocate/)
    expect([...(await full([2], 3, { device }).read())]).toEqual([3, 3])
  })

  it('refuses tensors of two devices', () => {
    const x = randn([1, 4, 1, 16], { seed: 1 })
    expect(() => attention(x.to(device), x, x)).toThrow(
      "attention: k is on cpu, but q is on cuda:0; move it with k.to('cuda:0')",
    )
  })

  it('leaves the event loop free while it works', async () => {
    const [x, w] = [
      randn([8192, 8192], { seed: 1, device }),
      randn([8192, 8192], { seed: 2, device }),
    ]
    await synchronize(device)
    const delay = monitorEventLoopDelay({ resolution: 1 })
    delay.enable()
    const started = performance.now()
    for (let i = 0; i < 30; i++) linear(x, w).dispose()
    const enqueued = performance.now() - started
    await synchronize(device)
    const total = performance.now() - started
    delay.disable()
    expect(total).toBeGreaterThan(200)
    expect(enqueued).toBeLessThan(total / 3)
    expect(delay.percentile(99) / 1e6).toBeLessThan(5)
  })

  it('enqueues attention within microseconds', async () => {
    const x = randn([1, 1, 1, 16], { seed: 1, device })
    let least = Number.POSITIVE_INFINITY
    for (let round = 0; round < 20; round++) {
      const started = performance.now()
      for (let i = 0; i < 200; i++) {
        const { out, lse } = attention(x, x, x)
        out.dispose()
        lse.dispose()
      }
      least = Math.min(least, ((performance.now() - started) / 200) * 1000)
      await synchronize(device)
    }
    process.stdout.write(`one attention call is enqueued in ${least.toFixed(2)} µs\n`)
    expect(least).toBeLessThan(50)
  })

  it('lets workers search lists of different sizes at once', async () => {
    const worker = `
      const { hipLists, randn } = require(${JSON.stringify(join(root, 'dist'))})
      const { parentPort, workerData: topK } = require('node:worker_threads')
      const draw = (heads, seed) =>
        randn([1, 8192, heads, 64], { dtype: 'bfloat16', device: '${device}', seed })
      const [q, k] = [draw(8, 1), draw(2, 2)]
      const search = () => hipLists(q, k, { topK, block: [16, 2] })
      for (let i = 0; i < 300; i++) search()
      search().count.read().then((counts) => parentPort.postMessage(Math.max(...counts)))`
    const { stdout } = await runScript(`
      const { Worker } = require('node:worker_threads')
      const ended = (topK) => new Promise((resolve) => {
        const worker = new Worker(${JSON.stringify(worker)}, { eval: true, workerData: topK })
        worker.on('message', resolve).on('error', (error) => resolve(error.message))
      })
      Promise.all([512, 1024, 1536].map(ended)).then((all) => console.log(...all))`)
    expect(stdout).toBe('256 512 768\n')
  })

  it('is the same every time under memory pressure', async () => {
    const [q, k, v] = [1, 2, 3].map((seed) =>
      randn([2, 700, 4, 128], { seed, dtype: 'bfloat16', device }),
    )
    const once = async () => {
      const filler = randn([50_000_000], { seed: 9, device })
      const read = await attention(q!, k!, v!, { causal: true }).out.read()
      filler.dispose()
      return Buffer.from(read.buffer)
    }
    const first = await once()
    for (let i = 0; i < 100; i++) expect(Buffer.compare(await once(), first)).toBe(0)
  })
})
