import {
  type AttentionOptions,
  type AttentionResult,
  attention,
  attentionBackward,
  cuda,
  explain,
  type FloatDType,
  Mask,
  randn,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { bytesOf, maxError, relativeRms } from '../support/compare.js'
import { describeGpu } from '../support/gpu.js'
import { random, starts } from '../support/random.js'

const device = 'cuda:0' as const

// 16-bit results against those in float32, which other kernels give, where shapes are too large for an oracle on the CPU
async function agree<D extends FloatDType>(
  [q, k, v]: readonly [Tensor<D>, Tensor<D>, Tensor<D>],
  options: AttentionOptions,
  what: string,
  lseBound = 1e-4,
) {
  const ours = attention(q, k, v, options)
  const wide = (t: Tensor<D>) => t.cast('float32')
  const exact = attention<FloatDType>(wide(q), wide(k), wide(v), options)
  await expectClose(ours, exact, what, lseBound)
  return { ours, exact }
}

async function expectClose(
  ours: AttentionResult,
  exact: AttentionResult,
  what: string,
  lseBound: number,
) {
  const [out, expected] = [
    await ours.out.read({ as: 'float32' }),
    await exact.out.read({ as: 'float32' }),
  ]
  expect(relativeRms(out, expected), what).toBeLessThan(ours.out.dtype === 'bfloat16' ? 4e-3 : 6e-4)
  expect(maxError(await ours.lse.read(), await exact.lse.read()), what).toBeLessThan(lseBound)
}

describeGpu('attention on large shapes', () => {
  describe.each(['bfloat16', 'float16'] as const)('%s', (dtype) => {
    it.each([64, 128, 256])('head size %d agrees with float32', async (d) => {
      const rng = random(d)
      for (let n = 0; n < 12; n++) {
        const hk = rng.pick([1, 2, 5])
        const [b, hq] = [rng.pick([1, 3]), hk * rng.pick([1, 3, 4])]
        const [sq, sk] = [1 + rng.below(1500), 1 + rng.below(3000)]
        const causal = rng.chance(0.6)
        const draw = (s: number, h: number, seed: number) =>
          randn([b, s, h, d], { dtype, device, seed })
        const q = draw(sq, hq, 3 * n)
        const k = draw(sk, hk, 3 * n + 1)
        const v = draw(sk, hk, 3 * n + 2)
        const what = JSON.stringify({ b, sq, sk, hq, hk, causal })
        await agree([q, k, v], { causal }, what)
      }
    })
  })
})

// So many heads that rows are taken by 192 instead of 128, and maxima that rise as they please
describeGpu('attention of many heads', () => {
  describe.each(['bfloat16', 'float16'] as const)('%s', (dtype) => {
    it.each([64, 88, 128])('head size %d agrees with float32', async (d) => {
      const rng = random(d)
      const calls = [
        { sq: 1100, sk: 1100, options: {} },
        { sq: 1301, sk: 1301, options: { causal: true } },
        { sq: 1537, sk: 2050, options: { causal: true, scale: dtype === 'float16' ? 1 : 3 } },
        { sq: 1200, sk: 3001, options: { scale: dtype === 'float16' ? 0.7 : 2 } },
        { sq: 1400, sk: 1400, options: { causal: true, slopes: Array(40).fill(0.02), scale: 0.9 } },
        {
          sq: 3000,
          sk: 3100,
          options: {
            causal: true,
            cuSeqlensQ: [0, 1000, 1001, 1001, 3000],
            cuSeqlensK: [0, 1100, 1100, 1100, 3100],
          },
        },
        { sq: 1290, sk: 1800, options: { causal: true, cacheSeqlens: [1300] } },
      ]
      for (const [n, { sq, sk, options }] of calls.entries()) {
        const hk = rng.pick([10, 40])
        const draw = (s: number, h: number, seed: number) =>
          randn([1, s, h, d], { dtype, device, seed })
        const q = draw(sq, 40, 3 * n)
        const [k, v] = [draw(sk, hk, 3 * n + 1), draw(sk, hk, 3 * n + 2)]
        const what = JSON.stringify({ sq, sk, hk, ...options })
        await agree([q, k, v], options, what, 3e-4)
      }
    })
  })
})

describeGpu('attention of prompts over pages', () => {
  it.each(['bfloat16', 'float16'] as const)('%s agrees with float32', async (dtype) => {
    const rng = random(51)
    const [hq, hk] = [32, 8]
    const [queries, used] = [
      [1, 700, 97, 0, 96, 1300],
      [900, 1500, 97, 33, 40, 1301],
    ]
    const [cuSeqlensQ, cuSeqlensK] = [starts(queries), starts(used)]
    for (const [d, page, options] of [
      [64, 16, { causal: true }],
      [128, 64, { causal: true, scale: 0.3 }],
      [120, 256, {}],
      [128, 8, { window: 200, sink: Array.from({ length: hq }, () => rng.normal()) }],
    ] as const) {
      const entries = Math.ceil(1501 / page)
      const order = Array.from({ length: entries * used.length }, (_, i) => i).sort(
        () => rng.next() - 0.5,
      )
      const blockTable = tensor(order, [used.length, entries], { dtype: 'int32', device })
      const draw = async (seed: number) => {
        const pages = randn([order.length, page, hk, d], { dtype, device, seed })
        const values = await pages.read({ as: 'float32' })
        const rows = used.flatMap((keys, i) =>
          Array.from({ length: keys }, (_, t) => {
            const at = order[i * entries + Math.floor(t / page)]! * page + (t % page)
            return values.subarray(at * hk * d, (at + 1) * hk * d)
          }),
        )
        const whole = new Float32Array(rows.length * hk * d)
        for (const [i, row] of rows.entries()) whole.set(row, i * hk * d)
        return { pages, packed: tensor(whole, [1, rows.length, hk, d], { device }) }
      }
      const [k, v] = [await draw(1), await draw(2)]
      const q = randn([1, cuSeqlensQ.at(-1)!, hq, d], { dtype, device, seed: 3 })
      const place = { ...options, blockTable, cacheSeqlens: used, cuSeqlensQ }
      const what = JSON.stringify({ d, page, ...options })
      const lengths = { ...options, cuSeqlensQ, cuSeqlensK }
      const exact = attention(q.cast('float32'), k.packed, v.packed, lengths)
      await expectClose(attention(q, k.pages, v.pages, place), exact, what, 3e-4)
      // the longest alone
      const last: [number, number] = [cuSeqlensQ.at(-2)!, cuSeqlensQ.at(-1)!]
      const alone = {
        ...options,
        blockTable: blockTable.slice(0, used.length - 1),
        cacheSeqlens: used.slice(-1),
      }
      const its = { out: exact.out.slice(1, ...last), lse: exact.lse.slice(2, ...last) }
      await expectClose(
        attention(q.slice(1, ...last), k.pages, v.pages, alone),
        its as AttentionResult,
        what,
        3e-4,
      )
      if (cuda.devices[0]!.arch !== 90) continue
      expect(explain(attention, q, k.pages, v.pages, place).variant).toBe('sm90_wgmma')
      const few = explain(attention, q.slice(1, 0, 90), k.pages, v.pages, {
        ...place,
        cuSeqlensQ: [0, 1, 2, 3, 4, 5, 90],
      })
      expect(few.variant).toBe('sm90_split')
      const tokens = Array.from({ length: 701 }, (_, i) => i)
      const single = explain(attention, q.slice(1, 0, 700), k.pages, v.pages, {
        ...options,
        blockTable: zeros([700, 2], { dtype: 'int32', device }),
        cacheSeqlens: tokens.slice(0, 700).fill(1),
        cuSeqlensQ: tokens,
      })
      expect(single.variant).toBe('sm90_split')
    }
  })
})

// What a kernel is launched by is kept, and takes the arguments of the next call
describeGpu('attention of many shapes by turns', () => {
  it('gives what each gives alone', async () => {
    const rng = random(47)
    const calls = [
      { b: 1, s: 900, h: 2, d: 128, options: { causal: true } },
      { b: 2, s: 300, h: 3, d: 128, options: {} },
      { b: 1, s: 1300, h: 4, d: 128, options: { window: 200 } },
      { b: 1, s: 700, h: 2, d: 64, options: { causal: true, softCap: 20 } },
      { b: 3, s: 520, h: 1, d: 64, options: { causal: true } },
      { b: 1, s: 640, h: 2, d: 256, options: { causal: true } },
    ].map(({ b, s, h, d, options }, i) => {
      const [q, k, v] = [1, 2, 3].map((seed) =>
        randn([b, s, h, d], { dtype: 'bfloat16', device, seed: 3 * i + seed }),
      )
      return () => attention(q!, k!, v!, options)
    })
    const bytes = async ({ out, lse }: ReturnType<(typeof calls)[0]>) =>
      bytesOf(await Promise.all([out.read(), lse.read()]))
    const alone: Buffer[] = []
    for (const call of calls) alone.push(await bytes(call()))
    const turns = Array.from({ length: 300 }, () => rng.below(calls.length))
    const results = turns.map((i) => calls[i]!())
    for (const [n, i] of turns.entries())
      expect(alone[i]!.equals(await bytes(results[n]!)), `call ${n} of shape ${i}`).toBe(true)
  })
})

describeGpu('attention.backward in its order', () => {
  it.each([
    [64, 'causality'],
    [128, 'causality'],
    [64, 'a mask'],
    [128, 'a mask'],
  ] as const)(
    'head size %d gives the same bits 1,000 times under %s while memory moves',
    async (d, under) => {
      const draw = (heads: number, seed: number) =>
        randn([2, 300, heads, d], { dtype: 'bfloat16', device, seed })
      const [q, k, v, dout] = [draw(4, 1), draw(2, 2), draw(2, 3), draw(4, 4)]
      const rng = random(d)
      const listed = Uint8Array.from({ length: 2 * 4 * 5 * 5 }, () => Number(rng.chance(0.4)))
      const options =
        under === 'causality'
          ? { causal: true }
          : {
              mask: Mask.fromBlocks(tensor(listed, [2, 4, 5, 5], { device }), {
                sq: 300,
                block: 64,
              }),
            }
      const { out, lse } = attention(q, k, v, options)
      const once = async (seed: number) => {
        // lies where the scratch of the last call was
        using pressure = randn([1 + (seed % 7), 100_003], { device, seed })
        const gradients = attentionBackward(q, k, v, out, lse, dout, options)
        const { dq, dk, dv } = gradients
        const read = await Promise.all([dq.read(), dk.read(), dv.read()])
        for (const made of [dq, dk, dv]) made.dispose()
        expect(pressure.size).toBeGreaterThan(0)
        return bytesOf(read)
      }
      const first = await once(0)
      for (let i = 1; i <= 1000; i++) expect(Buffer.compare(await once(i), first)).toBe(0)
    },
    120_000,
  )
})

describeGpu('attention over a mask on large shapes', () => {
  describe.each(['bfloat16', 'float16'] as const)('%s', (dtype) => {
    it.each([64, 128])(
      'head size %d agrees with float32, and with dense under a full mask',
      async (d) => {
        const rng = random(d)
        for (let n = 0; n < 12; n++) {
          const hk = rng.pick([1, 2])
          const [b, hq] = [rng.pick([1, 2]), hk * rng.pick([1, 4])]
          const [sq, sk] = [300 + rng.below(1500), 300 + rng.below(3000)]
          const heads = rng.pick([1, hk, hq])
          const block = [rng.pick([48, 64, 128, 256]), rng.pick([16, 64, 128])] as const
          const options = { sq, sk, block, causal: rng.chance(0.6), device }
          const [rows, columns] = [Math.ceil(sq / block[0]), Math.ceil(sk / block[1])]
          const share = rng.pick([0.05, 0.3, 0.8])
          const table = (listed: () => boolean) =>
            tensor(
              Uint8Array.from({ length: b * heads * rows * columns }, () => Number(listed())),
              [b, heads, rows, columns],
              { device },
            )
          const mask = Mask.fromBlocks(
            table(() => rng.chance(share)),
            options,
          ).union(
            Mask.fromWindow({ window: rng.pick([0, 100]), sinkTokens: rng.pick([0, 5]) }, options),
          )
          const draw = (s: number, h: number, seed: number) =>
            randn([b, s, h, d], { dtype, device, seed })
          const [q, k, v] = [draw(sq, hq, 3 * n), draw(sk, hk, 3 * n + 1), draw(sk, hk, 3 * n + 2)]
          const what = JSON.stringify({ ...options, b, hq, hk, heads, share })
          expect(explain(attention, q, k, v, { mask }).variant, what).toBe('sm90_wgmma')
          const wide = (t: typeof q) => t.cast('float32')
          const { ours, exact } = await agree([q, k, v], { mask }, what)
          const everything = Mask.fromBlocks(
            table(() => true),
            options,
          )
          const full = attention(q, k, v, { mask: everything })
          // so few heads that rows are taken by 128 as under a mask, if keys are not split
          for (let head = 0; head < hk; head++) {
            const group = hq / hk
            const [first, its] = [head * group, [head, head + 1] as const]
            const call = [
              q.slice(0, 0, 1).slice(2, first, first + group),
              k.slice(0, 0, 1).slice(2, ...its),
              v.slice(0, 0, 1).slice(2, ...its),
              { causal: options.causal },
            ] as const
            if (explain(attention, ...call).variant !== 'sm90_wgmma') continue
            const dense = attention(...call)
            const whole = full.out
              .slice(0, 0, 1)
              .slice(2, first, first + group)
              .contiguous()
            const bits = [await whole.read(), await dense.out.read()].map((x) => bytesOf([x]))
            expect(bits[0]!.equals(bits[1]!), what).toBe(true)
          }

          const dout = draw(sq, hq, 3 * n + 100)
          const { lse } = ours
          expect(
            explain(attentionBackward, q, k, v, ours.out, lse, dout, { mask }).variant,
            what,
          ).toBe('sm90_wgmma')
          const gradients = async (result: ReturnType<typeof attentionBackward>) =>
            Promise.all([result.dq, result.dk, result.dv].map((x) => x.read({ as: 'float32' })))
          const wanted = await gradients(
            attentionBackward<FloatDType>(
              ...([wide(q), wide(k), wide(v), exact.out, exact.lse, wide(dout)] as const),
              { mask },
            ),
          )
          for (const deterministic of [true, false]) {
            const got = await gradients(
              attentionBackward(q, k, v, ours.out, lse, dout, { mask, deterministic }),
            )
            wanted.forEach((x, i) => {
              expect(relativeRms(got[i]!, x), `${'qkv'[i]} ${what}`).toBeLessThan(
                dtype === 'bfloat16' ? 1e-2 : 1.5e-3,
              )
            })
          }
          const given = [q, k, v, full.out, full.lse, dout] as const
          const [under, without] = [{ mask: everything }, { causal: options.causal }].map(
            (option) => gradients(attentionBackward(...given, option)),
          )
          // without a mask or causality the last key tiles come in parts, whose sums are added another way
          const [covered, bare] = [await under!, await without!]
          if (options.causal) expect(bytesOf(covered).equals(bytesOf(bare)), what).toBe(true)
          else
            covered.forEach((x, i) => {
              expect(relativeRms(x, bare[i]!), what).toBeLessThan(
                dtype === 'bfloat16' ? 1e-3 : 1e-4,
              )
            })
        }
      },
      120_000,
    )
  })
})
