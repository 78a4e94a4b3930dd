import {
  achievedMass,
  alibiSlopes,
  attention,
  attentionBackward,
  cuda,
  explain,
  flexPrefill,
  graph,
  keep,
  lightningDecode,
  linear,
  Mask,
  memory,
  norm,
  probe,
  randn,
  silu,
  synchronize,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { operatorSchemas } from '../../lib/native.js'
import { describeDevices } from '../support/devices.js'

const variants = ['sm90_split', 'sm90_gather', 'sm80_gather', 'sm90_wgmma', 'sm80_simt']

describeDevices('explain', (device) => {
  const draw = (shape: number[], dtype: 'float32' | 'bfloat16' = 'bfloat16') =>
    randn(shape, { dtype, device })

  it('names what would run and leaves no trace', async () => {
    const [q, k] = [draw([1, 64, 4, 64]), draw([1, 64, 2, 64])]
    const before = memory(device)
    const { variant, declined } = explain(attention, q, k, k, {
      causal: true,
      sink: [1, 2, 3, 4],
      cuSeqlensQ: [0, 64],
      cuSeqlensK: [0, 64],
    })
    if (device === 'cpu') {
      expect(variant).toBe(operatorSchemas().find(({ name }) => name === 'attention')!.cpu)
      expect(declined).toEqual([])
    } else {
      const names = [...declined.map((entry) => entry.variant), variant]
      expect(names).toEqual(variants.slice(0, names.length))
    }
    // the upload of an array keeps its tensor until it is done, which the next call notices
    await synchronize(device)
    await synchronize(device)
    expect(memory(device).tensors).toBe(before.tensors)
    expect(memory(device).bytes).toBe(before.bytes)
  })

  it('says why a faster kernel does not take a call', () => {
    const q = draw([1, 64, 4, 64], 'float32')
    const { variant, declined } = explain(attention, q, q, q)
    if (device === 'cpu') return expect(declined).toEqual([])
    expect(variant).toBe('sm80_simt')
    expect(declined.map((entry) => entry.variant)).toEqual(variants.slice(0, -1))
    for (const { reason } of declined) expect(reason).toMatch(/must be/)
  })

  it('takes every operator, with several arguments or options', () => {
    const [x, w] = [draw([8, 16]), draw([4, 16])]
    expect(explain(linear, x, w).variant).toBeTypeOf('string')
    expect(explain(norm, x, undefined).variant).toBeTypeOf('string')
    const q = draw([1, 8, 2, 16])
    const lse = zeros([1, 2, 8], { device })
    expect(explain(attentionBackward, q, q, q, q, lse, q, { window: 3 }).variant).toBeTypeOf(
      'string',
    )
  })

  it('takes calls without sequences, rows or heads', () => {
    const q = draw([1, 8, 2, 16])
    const [none, headless, rowless] = [q.slice(0, 0, 0), q.slice(2, 0, 0), q.slice(1, 0, 0)]
    expect(explain(attention, none, none, none).variant).toBeTypeOf('string')
    expect(explain(attention, headless, headless, headless).variant).toBeTypeOf('string')
    expect(explain(attention, rowless, q, q).variant).toBeTypeOf('string')
    const options = { kind: 'rows', stride: 2, block: 64 } as const
    for (const [x, y] of [
      [none, none],
      [headless, q],
      [rowless, q],
    ] as const)
      expect(explain(probe, x, y, options).variant).toBeTypeOf('string')
  })

  it('takes decoding to the kernel that splits keys, of float8 too', () => {
    for (const dtype of ['bfloat16', 'float8_e4m3fn'] as const) {
      const [q, k] = [draw([2, 1, 8, 128]).cast(dtype), draw([2, 99, 2, 128]).cast(dtype)]
      const call = [q, k, k] as unknown as Parameters<typeof attention>
      const { variant, declined } = explain(attention, ...call)
      if (device === 'cpu') expect(declined).toEqual([])
      else expect(variant).toBe(cuda.devices[0]!.arch === 90 ? 'sm90_split' : 'sm80_simt')
    }
  })

  it('takes gradients to matrix instructions where there are some', () => {
    const q = draw([1, 70, 4, 64])
    const k = draw([1, 70, 2, 64])
    const lse = zeros([1, 4, 70], { device })
    const gradients = (options = {}) => explain(attentionBackward, q, k, k, q, lse, q, options)
    if (device === 'cpu') return expect(gradients().declined).toEqual([])
    const hopper = cuda.devices[0]!.arch === 90
    const slopes = [1, 2, 3, 4]
    for (const options of [{}, { causal: true, softCap: 20, slopes }, { deterministic: false }])
      expect(gradients(options).variant).toBe(hopper ? 'sm90_wgmma' : 'sm80_simt')
    const mask = Mask.fromWindow({ window: 9 }, { sq: 70, device })
    expect(gradients({ mask }).variant).toBe(hopper ? 'sm90_wgmma' : 'sm80_simt')
    const { variant, declined } = gradients({ mask, softCap: 20 })
    expect(variant).toBe('sm80_simt')
    expect(declined.map((entry) => entry.variant)).toEqual(['sm90_wgmma'])
    if (hopper) expect(declined[0]!.reason).toBe('softCap and slopes must be left out under a mask')
  })

  it('takes one token of lightning to the kernel that knows its sizes', () => {
    const states = zeros([2, 8, 128, 128], { device })
    const slots = zeros([2], { device, dtype: 'int32' })
    const decode = (s: number) => {
      const x = draw([2, s, 8, 128])
      return explain(lightningDecode, x, x, x, states, slots, { slopes: alibiSlopes(8) })
    }
    if (device === 'cpu') return expect(decode(1).declined).toEqual([])
    const hopper = cuda.devices[0]!.arch === 90
    expect(decode(1).variant).toBe(hopper ? 'sm90_simt' : 'sm80_simt')
    expect(decode(2).variant).toBe('sm80_simt')
    if (hopper) expect(decode(2).declined[0]!.reason).toBe('s must be 1')
  })

  it('leaves no lists of a selector', async () => {
    const q = draw([1, 300, 2, 16])
    await synchronize(device)
    const before = memory(device).tensors
    const { variant } = explain(flexPrefill, q, q, { block: 16, minBudget: 0 })
    expect(variant).toBeTypeOf('string')
    await synchronize(device)
    expect(memory(device).tensors).toBe(before)
  })

  it('checks what the call would check, and runs again afterwards', async () => {
    const q = draw([1, 8, 2, 16])
    expect(() => explain(attention, q, draw([1, 8, 2, 24]), q)).toThrow(
      'attention: k must be [b, sk, hk, d]',
    )
    const scores = zeros([1, 1, 2, 2], { dtype: 'float16', device })
    expect(() => explain(keep, scores as never, { sq: 256, topBlocks: 1 })).toThrow(
      'keep: score must be float32, got float16',
    )
    const { out } = attention(q, q, q)
    expect((await out.read({ as: 'float32' })).every(Number.isFinite)).toBe(true)
  })
})

describe('explain', () => {
  it('refuses what is no operator', () => {
    expect(() => explain('attention' as never)).toThrow('explain: operator must be a function')
    expect(() => explain(() => 1)).toThrow('explain: operator must be one that runs a kernel')
    const x = randn([4])
    const step = graph(() => silu(x))
    expect(() => explain(step.replay)).toThrow(
      'graph: a graph that is replayed cannot be explained',
    )
  })

  it('explains what an async function runs first, and nothing runs', async () => {
    const q = randn([1, 64, 2, 16])
    const mask = Mask.fromWindow({ window: 3 }, { sq: 64 })
    const { variant } = explain(achievedMass, q, q, mask)
    expect(variant).toBe(explain(attention, q, q, q, { mask }).variant)
    // its promise is refused when nobody waits for it
    await new Promise((resolve) => setImmediate(resolve))
    expect((await achievedMass(q, q, mask)).length).toBe(2)
    // nor is what catches everything believed
    const careless = () => {
      try {
        return silu(q)
      } catch {
        return attention(q, q, q)
      }
    }
    expect(explain(careless).variant).toBe(explain(silu, q).variant)
  })
})
