import {
  add,
  attention,
  empty,
  flexPrefill,
  graph,
  hip,
  lightningDecode,
  memory,
  mul,
  randn,
  silu,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'

describeDevices('graph', (device) => {
  const draw = (shape: number[], seed: number) => randn(shape, { seed, device })
  const same = async (a: Tensor<'float32'>, b: Tensor<'float32'>) =>
    expect(await a.read()).toEqual(await b.read())

  it('computes again from what its inputs hold by then', async () => {
    const [x, y] = [draw([100, 7], 1), draw([100, 7], 2)]
    const step = graph(() => silu(add(mul(x, y), x)))
    await same(step.result, silu(add(mul(x, y), x)))
    for (let seed = 3; seed < 8; seed++) {
      x.copyFrom(draw([100, 7], seed))
      expect(step.replay()).toBe(step.result)
      await same(step.result, silu(add(mul(x, y), x)))
    }
    y.write(new Float32Array(700))
    await same(step.replay(), silu(x))
  })

  it('decodes over a cache that grows', async () => {
    const [q, k, v] = [draw([2, 1, 4, 64], 1), draw([2, 300, 2, 64], 2), draw([2, 300, 2, 64], 3)]
    const cacheSeqlens = tensor([1, 1], [2], { dtype: 'int32', device })
    const step = graph(() => attention(q, k, v, { cacheSeqlens, causal: true }))
    for (const lengths of [
      [1, 300],
      [299, 2],
      [0, 131],
    ]) {
      cacheSeqlens.write(lengths)
      q.copyFrom(draw([2, 1, 4, 64], lengths[0]!))
      const expected = attention(q, k, v, { cacheSeqlens: lengths, causal: true })
      const { out, lse } = step.replay()
      await same(out, expected.out)
      await same(lse, expected.lse)
    }
  })

  it('chooses blocks again', async () => {
    const make = (seed: number) => draw([1, 700, 2, 64], seed).cast('bfloat16')
    const [q, k, v] = [make(1), make(2), make(3)]
    const choose = () => {
      const mask = flexPrefill(q, k, { minBudget: 128, gamma: 0.6 })
      return { mask, ...attention(q, k, v, { mask, causal: true }) }
    }
    const step = graph(choose)
    for (let seed = 4; seed < 8; seed++) {
      q.copyFrom(make(seed))
      k.copyFrom(make(seed + 10))
      const [again, expected] = [step.replay(), choose()]
      expect(await again.mask.blocks!.read()).toEqual(await expected.mask.blocks!.read())
      expect(await again.out.read()).toEqual(await expected.out.read())
    }
  })

  it('writes constants again', async () => {
    const x = zeros([4], { device })
    const step = graph(() => add(x.write([1, 2, 3, 4]), x))
    x.write([0, 0, 0, 0])
    expect(Array.from(await step.replay().read())).toEqual([2, 4, 6, 8])
  })

  it('advances what it updates in place', async () => {
    const x = draw([1, 1, 2, 16], 1)
    const slopes = [0.5, 0.25]
    const slots = tensor([0], [1], { dtype: 'int32', device })
    const states = zeros([1, 2, 16, 16], { device })
    const others = zeros([1, 2, 16, 16], { device })
    const step = graph(() => lightningDecode(x, x, x, states, slots, { slopes }))
    for (let i = 0; i < 4; i++) {
      if (i > 0) step.replay()
      const expected = lightningDecode(x, x, x, others, slots, { slopes })
      await same(step.result.out, expected.out)
      await same(states, others)
    }
  })

  it('fails where a replay meets bad data, and recovers', async () => {
    const q = draw([1, 1, 2, 64], 1)
    const cacheSeqlens = tensor([1], [1], { dtype: 'int32', device })
    const step = graph(() => silu(attention(q, q, q, { cacheSeqlens }).out))
    const good = await step.result.read()
    cacheSeqlens.write([2])
    const error = await failure(() => step.replay().read())
    expect(error).toMatchObject({ op: 'attention', code: 'ERR_ARGUMENT' })
    cacheSeqlens.write([1])
    expect(await step.replay().read()).toEqual(good)
  })

  it('recovers in what it makes first and fills then, too', async () => {
    const q = draw([1, 1, 2, 64], 1)
    const k = draw([1, 300, 2, 64], 2)
    const cacheSeqlens = tensor([300], [1], { dtype: 'int32', device })
    const attend = () => attention(q, k, k, { cacheSeqlens }).out
    const bodies: (() => Tensor)[] = [
      () => attend().cast('float16'),
      () => zeros([1, 2, 2, 64], { device }).slice(1, 1).copyFrom(attend()).transpose(2, 3).clone(),
      () => attention(q, k, k, { mask: hip(q, k, { topK: 64, cacheSeqlens }), cacheSeqlens }).out,
      () => {
        // what failed in one half is no better for the other
        const halves = empty([1, 1, 2, 64], { device })
        halves.slice(2, 0, 1).copyFrom(attend().slice(2, 0, 1))
        halves.slice(2, 1).copyFrom(q.slice(2, 1))
        return halves
      },
    ]
    for (const body of bodies) {
      // made while all is well, and while it is not
      const good = await graph(body).result.read()
      cacheSeqlens.write([301])
      const step = graph(body)
      for (const length of [301, 300, 301, 302, 300, 300]) {
        cacheSeqlens.write([length])
        const { result } = step
        step.replay()
        if (length === 300) expect(await result.read()).toEqual(good)
        else expect((await failure(() => result.read())).message).toContain('cacheSeqlens must be')
      }
      cacheSeqlens.write([300])
    }
  })

  it('fails where its inputs became what failed after it was made', async () => {
    const [q, x] = [draw([1, 1, 2, 64], 1), draw([1, 1, 2, 64], 2)]
    const step = graph(() => silu(silu(x)))
    const cacheSeqlens = tensor([2], [1], { dtype: 'int32', device })
    x.copyFrom(attention(q, q, q, { cacheSeqlens }).out)
    expect(await failure(() => step.replay().read())).toMatchObject({ op: 'attention' })
  })

  it('may be the first to need memory that calls share', async () => {
    // what was recorded while its input had failed was never enqueued
    const rows = 3000
    const make = (keys: number, seed: number) =>
      randn([rows, keys, 1, 64], { seed, dtype: 'bfloat16' })
    const [q, k] = [make(1, 1), make(2, 2)]
    const cacheSeqlens = tensor(new Int32Array(rows).fill(3), [rows])
    const failed = attention(q, k, k, { cacheSeqlens }).out.to(device)
    expect(await failure(() => failed.read())).toMatchObject({ op: 'attention' })
    const [q1, k1] = [q.to(device), k.to(device)]
    const step = graph(() => attention(failed, k1, k1))
    expect(await failure(() => step.result.out.read())).toMatchObject({ op: 'attention' })
    step.dispose()
    const [actual, expected] = [attention(q1, k1, k1), attention(q, k, k)]
    const [a, b] = [await actual.lse.read(), await expected.lse.read()]
    expect(Math.max(...a.map((x, i) => Math.abs(x - b[i]!)))).toBeLessThan(1e-3)
  })

  it('holds the memory it needs, and no more after dispose', async () => {
    await synchronize(device)
    const before = memory(device)
    const x = draw([1000], 1)
    const step = graph(() => silu(silu(silu(x))))
    x.dispose()
    const noise = Array.from({ length: 20 }, (_, i) => draw([1000], i))
    const expected = await step.result.read()
    expect(await step.replay().read()).toEqual(expected)
    for (let i = 0; i < 300; i++) step.replay()
    step.dispose()
    expect(await step.result.read()).toEqual(expected)
    for (const one of [...noise, step.result]) one.dispose()
    await synchronize(device)
    expect(memory(device).bytes).toBe(before.bytes)
    expect(memory(device).tensors).toBe(before.tensors)
    const error = await failure(async () => step.replay())
    expect(error).toMatchObject({ code: 'ERR_DISPOSED', op: 'graph' })
    expect(error.message).toBe('graph: this graph was disposed')
  })

  it('refuses what would not happen again', async () => {
    const x = draw([4], 1)
    const refused = async (body: () => unknown, code: string) => {
      const error = await failure(async () => graph(body))
      expect(error).toMatchObject({ code })
      expect(error.message).toMatch(/^(graph|read|write|to|synchronize): /)
    }
    await refused(() => x.readSync(), 'ERR_UNSUPPORTED')
    // at once: nobody would wait for a promise
    await refused(() => {
      x.read()
      return silu(x)
    }, 'ERR_UNSUPPORTED')
    await refused(() => [silu(x).read()], 'ERR_UNSUPPORTED')
    await refused(() => graph(() => silu(x)), 'ERR_ARGUMENT')
    await refused(async () => silu(x), 'ERR_ARGUMENT')
    await refused(() => 1, 'ERR_ARGUMENT')
    const step = graph(() => silu(x))
    await refused(() => step.replay(), 'ERR_UNSUPPORTED')
    await refused(() => {
      throw new RangeError('mine')
    }, 'ERR_ARGUMENT').catch((error) => expect(error.message).toContain('mine'))
    // and nothing is left behind
    expect(await graph(() => silu(x)).result.read()).toEqual(await silu(x).read())
  })
})

describe('graph', () => {
  it('says what it takes', async () => {
    for (const bad of [undefined, null, 1, {}])
      expect(await failure(async () => graph(bad as never))).toMatchObject({
        code: 'ERR_ARGUMENT',
        op: 'graph',
      })
  })
})
