import {
  achievedMass,
  attention,
  findPatterns,
  minference,
  mul,
  sampled,
  streaming,
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
      [{ kind: 'diagonal' }, 'kind must be a-shape, vertical-slash or block-sparse'],
    ] as const
    for (const [pattern, message] of cases) {
      const patterns = [pattern] as unknown as [{ kind: 'block-sparse'; topBlocks: number }]
      expect((await failure(() => minference(x!, x!, { patterns }))).message).toContain(message)
    }
    expect((await failure(() => minference(x!, y!))).message).toBe(
      'minference: hq must be a multiple of hk, got 3 and 2',
    )
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
