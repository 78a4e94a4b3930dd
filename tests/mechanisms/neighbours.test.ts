import {
  achievedMass,
  attention,
  findPatterns,
  flexPrefill,
  flexPrefillAttention,
  hipLists,
  infiniteHip,
  type Mask,
  type MInferencePattern,
  minference,
  mul,
  type PackedOptions,
  sampled,
  softplusAttention,
  streaming,
  type Tensor,
  tensor,
  xattention,
} from 'heddle'
import { expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random, sample } from '../support/random.js'

describeDevices('mechanisms', (device) => {
  it('are dense where their budget is everything', async () => {
    const rng = random(96)
    const q = await sample(rng, [1, 200, 4, 32], 'float32', device)
    const k = await sample(rng, [1, 260, 2, 32], 'float32', device)
    const [x, y] = [q.tensor, k.tensor]
    const dense = await attention(x, y, y, { causal: true }).out.read()
    const masks = [
      streaming(x, y, { window: 260 }),
      streaming(x, y, { sinkTokens: 260, window: 0 }),
      xattention(x, y, { threshold: 1, block: 64 }),
      sampled(x, y, { topK: 260 }),
      minference(x, y, { patterns: [{ kind: 'block-sparse', topBlocks: 5 }] }),
      minference(x, y, { patterns: [{ kind: 'vertical-slash', vertical: 30, slash: 260 }] }),
      minference(x, y, { patterns: [{ kind: 'a-shape', sinkTokens: 0, window: 260 }] }),
    ]
    for (const mask of masks) {
      expect(await mask.density()).toBe(1)
      const out = await attention(x, y, y, { mask }).out.read()
      expect(maxError(out, dense)).toBeLessThan(1e-5)
    }
  })

  it('refuse patterns that say too little or too much', async () => {
    const [x, y] = [3, 2].map((heads) =>
      tensor(new Float32Array(heads * 16), [1, 1, heads, 16], { device }),
    )
    const cases = [
      [{ kind: 'a-shape', sinkTokens: 4 }, 'patterns[0].window must be an integer at least 0'],
      [
        { kind: 'vertical-slash', vertical: 1.5, slash: 2 },
        'patterns[0].vertical must be an integer at least 0, got 1.5',
      ],
      [
        { kind: 'block-sparse', topBlock: 2 },
        'unknown option "topBlock"; did you mean "topBlocks"',
      ],
      [{ kind: 'diagonal' }, 'patterns[0].kind must be a-shape, vertical-slash or block-sparse'],
    ] as const
    for (const [pattern, message] of cases) {
      const patterns = [pattern] as unknown as [{ kind: 'block-sparse'; topBlocks: number }]
      expect((await failure(() => minference(x!, x!, { patterns }))).message).toContain(message)
    }
    expect((await failure(() => minference(x!, y!))).message).toBe(
      'minference: hq must be a multiple of hk, got 3 and 2',
    )
  })

  it('refuse in their own name what their operators refuse', async () => {
    const [q, k] = [4, 2].map((heads) =>
      tensor(new Float32Array(300 * heads * 16), [1, 300, heads, 16], { device }),
    ) as [Tensor<'float32'>, Tensor<'float32'>]
    const shape = { kind: 'a-shape', sinkTokens: 4, window: 8 } as const
    const cases = [
      [() => sampled(q, k, { stride: 0 }), 'sampled: stride must be at least 1, got 0'],
      [
        () => sampled(q, k, { block: 48 }),
        'sampled: block must be a power of two for keys, got 48',
      ],
      [() => sampled(q, k.cast('bfloat16') as never), 'sampled: k must be float32, got bfloat16'],
      [() => xattention(q, k, { stride: 7 }), 'xattention: stride must divide the blocks, got 7'],
      [
        () => xattention(q, k, { threshold: 2 }),
        'xattention: threshold must be from 0 to 1, got 2',
      ],
      [
        () => xattention(q, k, { cuSeqlensQ: [0, 300], cuSeqlensK: [0, 100, 300] }),
        'xattention: cuSeqlensK must be [2] as cuSeqlensQ, got [3]',
      ],
      [
        () => sampled(q.expand([2, 300, 4, 16]), k, { cuSeqlensQ: [0, 300], cuSeqlensK: [0, 300] }),
        'sampled: b must be 1 with cuSeqlensQ, got 2',
      ],
      [
        () => sampled(q, k, { cuSeqlensQ: q as never, cuSeqlensK: [0, 300] }),
        'sampled: cuSeqlensQ must be an array of numbers, got a tensor',
      ],
      [
        () => streaming(q, k, { window: 1.5 }),
        'streaming: window must be an integer at least 0, got 1.5',
      ],
      [
        () => streaming(q, k, { cuSeqlensQ: [0, 300] }),
        'streaming: cuSeqlensQ and cuSeqlensK must be given together',
      ],
      [
        () => minference(q, k.slice(3, 0, 8)),
        'minference: k must be [b, sk, hk, d], got [1, 300, 2, 8] (d is 8, but q has d = 16)',
      ],
      [
        () => minference(q.select(0, 0), k.select(0, 0)),
        'minference: q must be [b, s, h, d], got [300, 4, 16]',
      ],
      [
        () => achievedMass(q, k, undefined as never),
        'achievedMass: mask must be a mask, got undefined',
      ],
      [
        () => achievedMass(q, k, streaming(q.slice(1, 1), k)),
        'achievedMass: mask must be of sq = 300 and sk = 300, got one of 299 and 300',
      ],
      [
        () => findPatterns(q, k, [shape, { kind: 'block-sparse' } as never]),
        'findPatterns: candidates[1].topBlocks must be an integer at least 0, got undefined',
      ],
      [
        () => minference(q, k.slice(3, 0, 8), { patterns: [shape] }),
        'minference: k must be [b, sk, hk, d], got [1, 300, 2, 8] (d is 8, but q has d = 16)',
      ],
      [
        () => minference(q.expand([2, ...q.shape.slice(1)]), k, { patterns: [shape] }),
        'minference: k must be [b, sk, hk, d], got [1, 300, 2, 16] (b is 1, but q has b = 2)',
      ],
      [
        () => minference(q, k.cast('bfloat16') as never, { patterns: [shape] }),
        'minference: k must be float32, got bfloat16',
      ],
      [
        () => achievedMass(q.select(0, 0), k, streaming(q, k)),
        'achievedMass: q must be [b, s, h, d], got [300, 4, 16]',
      ],
      [() => infiniteHip(q, k, { topK: 7 }), 'infiniteHip: topK must be a positive multiple of'],
      [
        () => hipLists(q, k.cast('bfloat16') as never, { topK: 16 }),
        'hipLists: k must be float32, got bfloat16',
      ],
      [
        () => softplusAttention(q, k, k.reshape([300, 2, 16])),
        'softplusAttention: v must be [b, s, h, d], got [300, 2, 16]',
      ],
    ] as const
    for (const [call, message] of cases) expect((await failure(call)).message).toContain(message)
  })

  it('choose for packed sequences as they do for each alone', async () => {
    const rng = random(99)
    // neighbours of one length, others, none, and queries that are a part
    const lengths = [
      [100, 100],
      [100, 100],
      [100, 130],
      [0, 40],
      [0, 0],
      [1, 200],
      [192, 256],
      [192, 256],
      [192, 256],
      [70, 70],
    ] as const
    const starts = (of: 0 | 1) =>
      lengths.reduce((list, one) => [...list, list.at(-1)! + one[of]], [0])
    const [cuSeqlensQ, cuSeqlensK] = [starts(0), starts(1)]
    const draw = (s: number, heads: number) => sample(rng, [1, s, heads, 16], 'float32', device)
    const q = (await draw(cuSeqlensQ.at(-1)!, 4)).tensor
    const k = (await draw(cuSeqlensK.at(-1)!, 2)).tensor
    const patterns: readonly MInferencePattern[] = [
      { kind: 'vertical-slash', vertical: 40, slash: 110 },
      { kind: 'a-shape', sinkTokens: 3, window: 45 },
      { kind: 'block-sparse', topBlocks: 2 },
      { kind: 'block-sparse', topBlocks: 2 },
    ]
    type Select = (x: typeof q, y: typeof k, packed?: PackedOptions) => Mask
    const selectors: Select[] = [
      (x, y, packed) => minference(x, y, { ...packed, patterns }),
      (x, y, packed) => minference(x, y, { ...packed, patterns: patterns.slice(1, 2) }),
      (x, y, packed) => sampled(x, y, { ...packed, topK: 64, block: [32, 64] }),
      (x, y, packed) => xattention(x, y, { ...packed, threshold: 0.5, block: 32 }),
      (x, y, packed) => streaming(x, y, { ...packed, sinkTokens: 2, window: 20 }),
      (x, y, packed) => flexPrefill(x, y, { ...packed, block: 32, minBudget: 32, gamma: 0.5 }),
    ]
    for (const select of selectors) {
      const mask = select(q, k, { cuSeqlensQ, cuSeqlensK })
      const dense = await mask.toDense()
      const { heads, sk: width } = mask
      const { out } = attention(q, k, k, { mask })
      for (const [i, [sq, sk]] of lengths.entries()) {
        if (sq === 0) continue
        const own = q.slice(1, cuSeqlensQ[i]!, cuSeqlensQ[i + 1])
        const keys = k.slice(1, cuSeqlensK[i]!, cuSeqlensK[i + 1])
        const alone = select(own, keys)
        const seen = await alone.toDense()
        const rows = out.slice(1, cuSeqlensQ[i]!, cuSeqlensQ[i + 1])
        const result = attention(own, keys, keys, { mask: alone }).out
        expect(maxError(await rows.read(), await result.read())).toBeLessThan(1e-5)
        for (let head = 0; head < heads; head++)
          for (let row = 0; row < sq; row++) {
            const at = ((i * heads + head) * mask.sq + row) * width
            const from = ((alone.heads === 1 ? 0 : head) * sq + row) * sk
            expect(dense.subarray(at, at + sk)).toEqual(seen.subarray(from, from + sk))
          }
      }
    }
  })

  it('choose nothing for no queries', async () => {
    const make = (s: number) => tensor(new Float32Array(s * 32), [1, s, 2, 16], { device })
    const flex: typeof sampled = (q, k, packed) =>
      flexPrefill(q, k, { ...(packed as PackedOptions), minBudget: 0, block: 16 })
    for (const select of [streaming, xattention, sampled, minference, flex] as const)
      for (const sk of [0, 300])
        for (const packed of [{}, { cuSeqlensQ: [0, 0, 0], cuSeqlensK: [0, sk, sk] }]) {
          const [q, k] = [make(0), make(sk)]
          const mask = select(q, k, packed)
          expect(await mask.count()).toBe(0)
          expect(attention(q, k, k, { mask }).out.shape).toEqual([1, 0, 2, 16])
          const always = { ...packed, denseBelow: 0 }
          expect(flexPrefillAttention(q, k, k, always).out.shape).toEqual([1, 0, 2, 16])
        }
  })

  it('have the first block and their own, whatever the others weigh', async () => {
    const direction = (s: number, like: (t: number) => boolean) =>
      tensor(
        Float32Array.from({ length: s * 16 }, (_, i) =>
          i % 16 === 0 && like(Math.floor(i / 16)) ? 16 : 0,
        ),
        [1, s, 1, 16],
        { device },
      )
    const [sq, sk] = [200, 520]
    const q = direction(sq, () => true)
    // all of the mass in the first block, or in the third
    for (const heavy of [0, 2]) {
      const k = direction(sk, (t) => Math.floor(t / 64) === heavy)
      const seen = await xattention(q, k, { block: 64 }).toDense()
      for (let i = 0; i < sq; i++) {
        const row = seen.subarray(i * sk, (i + 1) * sk)
        const p = sk - sq + i
        expect([row[0], row[p], row[heavy * 64]]).toEqual([1, 1, 1])
        expect(row.reduce((sum, x) => sum + x, 0)).toBeLessThanOrEqual(4 * 64)
      }
    }
  })

  it('find what is planted, and the pattern that fits', async () => {
    const rng = random(97)
    const q = await sample(rng, [1, 1024, 1, 32], 'float32', device, { strided: false })
    const k = await sample(rng, [1, 1024, 1, 32], 'float32', device, { strided: false })
    // every query looks at the key of one token
    const strong = tensor([4], [1], { device })
    k.tensor.slice(1, 300, 301).copyFrom(mul(q.tensor.slice(1, 0, 1), strong))
    const wanted = q.tensor.slice(1, 0, 1).expand([1, 1024, 1, 32])
    const x = wanted.contiguous()
    const at = async (mask: ReturnType<typeof streaming>) =>
      (await mask.toDense())[1000 * 1024 + 300]
    expect(await at(sampled(x, k.tensor, { topK: 128 }))).toBe(1)
    const line = { kind: 'vertical-slash', vertical: 40, slash: 100 } as const
    const shape = { kind: 'a-shape', sinkTokens: 40, window: 100 } as const
    expect(await at(minference(x, k.tensor, { patterns: [line] }))).toBe(1)
    expect(await findPatterns(x, k.tensor, [shape, line])).toEqual([line])
    const [mass] = await achievedMass(x, k.tensor, sampled(x, k.tensor, { topK: 128 }))
    expect(mass).toBeGreaterThan(0.3)
  })
})
