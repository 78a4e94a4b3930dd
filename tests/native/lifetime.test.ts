import { getEventListeners } from 'node:events'
import { setTimeout as pause } from 'node:timers/promises'
import {
  add,
  attention,
  full,
  linear,
  memory,
  randn,
  scope,
  silu,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { beforeEach, describe, expect, it } from 'vitest'
import { runScript } from '../support/child.js'
import { failure } from '../support/failure.js'

async function settled() {
  await synchronize()
  const { tensors, bytes } = memory()
  return { tensors, bytes }
}

describe('lifetime', () => {
  let before: { tensors: number; bytes: number }
  beforeEach(async () => {
    before = await settled()
  })

  it('of 100 000 tensors leaves nothing behind', async () => {
    const churn = async (cycles: number) => {
      for (let i = 0; i < cycles; i++) {
        const x = zeros([64, 64])
        const view = x.transpose(0, 1)
        x.dispose()
        view.dispose()
        if (i % 256 === 0) await synchronize()
      }
      await synchronize()
      return process.memoryUsage.rss()
    }
    const warm = await churn(30_000)
    const end = await churn(100_000)
    expect(await settled()).toEqual(before)
    // 100 000 of these tensors are 1.6 GB, their records alone several MB
    expect((end - warm) / 2 ** 20).toBeLessThan(48)
  })

  it('of views and of work in the queue keeps the memory they need', async () => {
    const values = Float32Array.from({ length: 64 * 64 }, (_, i) => (i % 7) - 3)
    const x = tensor(values, [64, 64])
    const row = x.slice(0, 5, 6)
    const results: Tensor<'float32'>[] = []
    for (let i = 0; i < 200; i++) results.push(linear(x, x))
    x.dispose()
    expect(await row.read()).toEqual(values.slice(320, 384))
    const [first, ...others] = await Promise.all(results.map((result) => result.read()))
    for (const other of others) expect(other).toEqual(first)
    let dot = 0
    for (let i = 0; i < 64; i++) dot += values[i]! * values[64 + i]!
    expect(first![1]).toBe(dot)
    for (const result of [...results, row]) result.dispose()
    expect(await settled()).toEqual(before)
  })

  it('of an input ends while an operator runs on it', async () => {
    const expected = await attention(
      ...([1, 2, 3].map((seed) => randn([1, 512, 4, 64], { seed })) as [
        Tensor<'float32'>,
        Tensor<'float32'>,
        Tensor<'float32'>,
      ]),
    ).out.read()
    for (let round = 0; round < 20; round++) {
      const [q, k, v] = [1, 2, 3].map((seed) => randn([1, 512, 4, 64], { seed }))
      const { out, lse } = attention(q!, k!, v!)
      if (round % 2) await pause(1)
      for (const input of [q, k, v, lse]) input!.dispose()
      // takes the place of what was freed, if that was too early
      const others = [1, 2, 3].map(() => full([1, 512, 4, 64], Number.NaN))
      expect(await out.read()).toEqual(expected)
      for (const other of [out, ...others]) other.dispose()
    }
  })

  it('of a result ends while it is read', async () => {
    const x = randn([1 << 16], { seed: 1 })
    const expected = await x.read()
    const reading = Array.from({ length: 8 }, () => x.read())
    x.dispose()
    const other = full([1 << 16], Number.NaN)
    for (const values of await Promise.all(reading)) expect(values).toEqual(expected)
    other.dispose()
    expect(await settled()).toEqual(before)
  })

  it('ends once, however often it is ended', async () => {
    const x = zeros([4])
    const other = zeros([4])
    for (let i = 0; i < 3; i++) x.dispose()
    const next = zeros([4])
    x.dispose()
    expect(await next.read()).toEqual(new Float32Array(4))
    expect((await failure(() => x.read())).code).toBe('ERR_DISPOSED')
    other.dispose()
    next.dispose()
    expect(await settled()).toEqual(before)
  })

  it('of what was to hold a copy ends where there is none', async () => {
    const x = zeros([4])
    x.dispose()
    const now = await settled()
    for (const copy of [() => x.clone(), () => x.cast('int32'), () => x.read({ as: 'float32' })])
      expect((await failure(copy)).code).toBe('ERR_DISPOSED')
    expect(await settled()).toEqual(now)
  })

  it('of values that were read goes on after their tensor', async () => {
    const x = full([4096], 3)
    const [values, again] = await Promise.all([x.read(), x.read()])
    x.dispose()
    values[0] = 5
    expect(again[0]).toBe(3)
    expect(values[4095]).toBe(3)
    expect(structuredClone(values.buffer, { transfer: [values.buffer] }).byteLength).toBe(4 * 4096)
  })
})

describe('a scope', () => {
  it('frees what an async function made, and keeps its result', async () => {
    const before = await settled()
    const kept = await Promise.all(
      [1, 2, 3].map((value) =>
        scope(async () => {
          const x = full([100], value)
          await pause(value)
          const y = add(x, x)
          const [first] = await y.read()
          await pause(1)
          return { z: silu(y), list: [full([1], first!)], zero: first! - 2 * value }
        }),
      ),
    )
    expect(kept.map(({ zero }) => zero)).toEqual([0, 0, 0])
    expect((await settled()).tensors).toBe(before.tensors + 6)
    for (const [i, { z, list }] of kept.entries()) {
      expect(await list[0]!.read()).toEqual(Float32Array.of(2 * (i + 1)))
      list[0]!.dispose()
      z.dispose()
    }
    expect(await settled()).toEqual(before)
  })

  it('frees what a failing function made', async () => {
    const before = await settled()
    const wrong = new Error('on purpose')
    expect(() =>
      scope(() => {
        zeros([9])
        throw wrong
      }),
    ).toThrow(wrong)
    await expect(
      scope(async () => {
        zeros([9])
        await pause(1)
        zeros([9])
        throw wrong
      }),
    ).rejects.toBe(wrong)
    expect(await settled()).toEqual(before)
  })

  it('ends while its work still runs', async () => {
    const before = await settled()
    const { out } = scope(() => {
      const q = randn([1, 512, 4, 64])
      return { out: attention(q, q, q).out }
    })
    expect((await out.read()).every(Number.isFinite)).toBe(true)
    out.dispose()
    expect(await settled()).toEqual(before)
  })
})

describe('an AbortSignal', () => {
  it('ends the waiting, not the work', async () => {
    const q = randn([1, 2048, 8, 64])
    const { out } = attention(q, q, q)
    const controller = new AbortController()
    const reason = new Error('no longer wanted')
    const reading = out.read({ signal: controller.signal })
    controller.abort(reason)
    await expect(reading).rejects.toBe(reason)
    await expect(out.read({ signal: AbortSignal.abort(reason) })).rejects.toBe(reason)
    expect((await out.read({ signal: AbortSignal.timeout(50_000) })).length).toBe(out.size)
  })

  it('may end any number of reads, and keeps no listener', async () => {
    const x = full([2], 4)
    const q = randn([1, 2048, 8, 64])
    const { out } = attention(q, q, q)
    const controller = new AbortController()
    const { signal } = controller
    const wait = (tensor: Tensor) => Array.from({ length: 20 }, () => tensor.read({ signal }))
    const early = wait(x)
    expect(getEventListeners(signal, 'abort')).toHaveLength(1)
    await Promise.all(early)
    expect(getEventListeners(signal, 'abort')).toHaveLength(0)
    const late = Promise.allSettled(wait(out))
    controller.abort('enough')
    for (const one of await late) expect(one).toEqual({ status: 'rejected', reason: 'enough' })
    expect(getEventListeners(signal, 'abort')).toHaveLength(0)
  })

  it('that was aborted before keeps a blocking read from waiting', () => {
    const reason = new Error('no longer wanted')
    expect(() => full([2], 4).readSync({ signal: AbortSignal.abort(reason) })).toThrow(reason)
  })

  it('that comes late changes nothing', async () => {
    const controller = new AbortController()
    const values = await full([2], 4).read({ signal: controller.signal, as: 'float32' })
    controller.abort()
    expect(values).toEqual(Float32Array.of(4, 4))
  })
})

describe('collection', () => {
  it('frees tensors that nobody holds', async () => {
    const { status, stdout, stderr } = await runScript(
      `
      const { memory, zeros, add, synchronize } = heddle
      const kept = zeros([10])
      const make = () => { for (let i = 0; i < 1000; i++) add(zeros([1000]), zeros([1000])).transpose(0, 0) }
      const run = async () => {
        const peaks = []
        for (let round = 0; round < 20; round++) {
          make()
          await synchronize()
          for (let i = 0; i < 50 && memory().tensors > 1; i++) {
            globalThis.gc()
            await new Promise(setImmediate)
          }
          peaks.push(memory().tensors)
        }
        console.log(JSON.stringify({ peaks, bytes: memory().bytes, kept: kept.readSync()[0] }))
      }
      run()`,
      { flags: ['--expose-gc'] },
    )
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    expect(JSON.parse(stdout)).toEqual({ peaks: Array(20).fill(1), bytes: 40, kept: 0 })
  })

  it('comes by itself when tensors pile up', async () => {
    const { status, stdout, stderr } = await runScript(`
      const { memory, empty } = heddle
      let most = 0
      const more = (left) => {
        for (let i = 0; i < 20; i++) empty([1 << 20])
        most = Math.max(most, memory().bytes)
        if (left > 0) setImmediate(more, left - 1)
        else console.log(most)
      }
      more(1000)`)
    expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
    // 84 GB in all
    expect(Number(stdout)).toBeLessThan(2 ** 33)
  })
})
