import { full, probe } from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectClose } from '../support/compare.js'
import { describeDevices, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random, sample } from '../support/random.js'
import { reader } from '../support/reference.js'

const kinds = ['pooled', 'strided', 'rows', 'antidiagonal'] as const

describeDevices('probe', (device) => {
  describe.each(floats)('%s', (dtype) => {
    it('agrees with float64 for every kind', async () => {
      const rng = random(80)
      for (let n = 0; n < 24; n++) {
        const kind = kinds[n % 4]!
        const hk = rng.pick([1, 2])
        const hq = hk * rng.pick([1, 2])
        const [b, sq, d] = [rng.pick([1, 2]), rng.pick([1, 33, 64, 130]), rng.pick([16, 40, 64])]
        const sk = sq + rng.pick([0, 0, 16, 70])
        const block = [rng.pick([16, 32, 64]), rng.pick([16, 32, 64])] as const
        const stride = kind === 'pooled' ? 1 : rng.pick([1, 2, 8])
        const per = kind === 'rows' ? rng.pick(['block', 'key', 'distance'] as const) : 'block'
        const scale = 0.3
        const q = await sample(rng, [b, sq, hq, d], dtype, device)
        const k = await sample(rng, [b, sk, hk, d], dtype, device)
        const [rq, rk] = [reader(q.values, sq, hq, d), reader(k.values, sk, hk, d)]
        const rows = Math.ceil(sq / block[0])
        const columns = per === 'block' ? Math.ceil(sk / block[1]) : sk
        const expected = new Float64Array(b * hq * rows * columns).fill(Number.NEGATIVE_INFINITY)
        for (let at = 0; at < b * hq * rows; at++) {
          const r = at % rows
          const h = Math.floor(at / rows) % hq
          const [ib, ik] = [Math.floor(at / rows / hq), Math.floor(h / (hq / hk))]
          const [first, last] = [r * block[0], Math.min((r + 1) * block[0], sq)]
          const dot = (i: number, t: number) => {
            let sum = 0
            for (let e = 0; e < d; e++) sum += rq(ib, i, h, e) * rk(ib, t, ik, e)
            return sum * scale
          }
          const row = expected.subarray(at * columns, (at + 1) * columns)
          const end = sk - sq + last
          const queries: number[] = []
          for (let i = first; i < last; i += stride) queries.push(Math.min(i + stride, last) - 1)
          row.fill(
            kind === 'rows' || kind === 'antidiagonal' ? 0 : Number.NEGATIVE_INFINITY,
            0,
            per === 'block' ? Math.ceil(end / block[1]) : end,
          )
          const add = (scores: number[], unit: (t: number) => number, share: number) => {
            const top = Math.max(...scores)
            const total = scores.reduce((sum, x) => sum + Math.exp(x - top), 0)
            scores.forEach((x, t) => {
              row[unit(t)]! += (Math.exp(x - top) / total) * share
            })
          }
          if (kind === 'pooled') {
            for (let c = 0; c * block[1] < end; c++) {
              const keys = Math.min((c + 1) * block[1], sk) - c * block[1]
              let sum = 0
              for (let i = first; i < last; i++)
                for (let t = 0; t < keys; t++) sum += dot(i, c * block[1] + t)
              row[c] = sum / (last - first) / keys
            }
          } else if (kind === 'strided') {
            for (let t = 0; t < end; t += stride) {
              const key = Math.min(t + stride, end) - 1
              const c = Math.floor(key / block[1])
              for (const i of queries)
                if (key <= sk - sq + i) row[c] = Math.max(row[c]!, dot(i, key))
            }
          } else if (kind === 'rows') {
            for (const i of queries) {
              const p = sk - sq + i
              const scores = Array.from({ length: p + 1 }, (_, t) => dot(i, t))
              const unit = (t: number) =>
                per === 'block' ? Math.floor(t / block[1]) : per === 'key' ? t : p - t
              add(scores, unit, 1 / queries.length)
            }
          } else {
            const groups = Math.ceil((last - first) / stride)
            for (let g = 0; g < groups; g++) {
              const p = sk - sq + first + (g + 1) * stride - 1
              const seen = Math.min(Math.floor(p / stride) + 1, Math.ceil(end / stride))
              const scores = Array.from({ length: seen }, (_, m) => {
                let sum = 0
                for (let s = 0; s < stride; s++) {
                  const [i, t] = [first + (g + 1) * stride - 1 - s, m * stride + s]
                  if (i < last && t < end) sum += dot(i, t)
                }
                return sum / stride
              })
              add(scores, (m) => Math.floor((m * stride) / block[1]), 1 / groups)
            }
          }
        }
        const options = { kind, block, stride, per, scale }
        const actual = await probe(q.tensor, k.tensor, options).read()
        // float32 sums of up to `sk` products of rounded inputs
        expectClose(actual, expected, expected, 'float32', JSON.stringify({ ...options, sq, sk }), {
          exponent: 16,
          terms: 4,
        })
      }
    })

    it('finds the lines of the last queries in one go', async () => {
      const rng = random(83)
      const scale = 0.06
      for (const [b, sq, sk, hq, hk, d] of [
        [1, 128, 700, 4, 2, 128],
        [1, 128, 1100, 3, 1, 64],
        [2, 100, 457, 2, 2, 64],
        [1, 33, 33, 1, 1, 64],
        [1, 1, 300, 2, 1, 128],
      ] as const) {
        const q = await sample(rng, [b, sq, hq, d], dtype, device)
        const k = await sample(rng, [b, sk, hk, d], dtype, device)
        const [rq, rk] = [reader(q.values, sq, hq, d), reader(k.values, sk, hk, d)]
        const expected = new Float64Array(b * hq * 2 * sk)
        for (let at = 0; at < b * hq; at++) {
          const [ib, h] = [Math.floor(at / hq), at % hq]
          for (let i = 0; i < sq; i++) {
            const p = sk - sq + i
            const scores = Array.from({ length: p + 1 }, (_, t) => {
              let sum = 0
              for (let e = 0; e < d; e++)
                sum += rq(ib, i, h, e) * rk(ib, t, Math.floor(h / (hq / hk)), e)
              return sum * scale
            })
            const top = Math.max(...scores)
            const total = scores.reduce((sum, x) => sum + Math.exp(x - top), 0)
            scores.forEach((x, t) => {
              const share = Math.exp(x - top) / total / sq
              expected[at * 2 * sk + t]! += share
              expected[(at * 2 + 1) * sk + p - t]! += share
            })
          }
        }
        const options = { kind: 'rows', per: 'line', block: 128, scale } as const
        const actual = await probe(q.tensor, k.tensor, options).read()
        const text = JSON.stringify({ b, sq, sk, hq, hk, d })
        expectClose(actual, expected, expected, 'float32', text, { exponent: 16, terms: 2 ** -6 })
        // nothing depends on timing
        expect(await probe(q.tensor, k.tensor, options).read(), text).toEqual(actual)
      }
    })
  })

  it.each([1024, 2 ** 30, 2 ** 32 + 64])(
    'takes a block of %i keys for all of them',
    async (keys) => {
      const rng = random(87)
      for (const kind of ['rows', 'antidiagonal'] as const) {
        const [q, k] = [
          await sample(rng, [1, 128, 2, 64], 'bfloat16', device),
          await sample(rng, [1, 200, 1, 64], 'bfloat16', device),
        ]
        const score = probe(q.tensor, k.tensor, { kind, stride: 8, block: [64, keys] })
        for (const share of await score.read()) expect(share).toBeCloseTo(1, 5)
      }
    },
  )

  it('keeps what is no number in a query from keys and distances beyond it', async () => {
    const rng = random(84)
    for (const dtype of floats) {
      const [sq, sk] = [40, 100]
      const { tensor: q } = await sample(rng, [1, sq, 1, 64], dtype, device)
      const { tensor: k } = await sample(rng, [1, sk, 1, 64], dtype, device)
      q.slice(1, 10, 11).copyFrom(full([1, 1, 1, 64], Number.NaN, { dtype, device }))
      const score = await probe(q, k, { kind: 'rows', per: 'line', block: 128 }).read()
      for (let i = 0; i < 2 * sk; i++)
        expect(Number.isNaN(score[i]), `${dtype} ${i}`).toBe(i % sk <= sk - sq + 10)
    }
  })

  it('makes rows of scores sum to 1', async () => {
    const rng = random(81)
    const q = await sample(rng, [1, 100, 2, 16], 'float32', device)
    const k = await sample(rng, [1, 160, 2, 16], 'float32', device)
    const values = await probe(q.tensor, k.tensor, { block: 16, softmax: true }).read()
    for (let row = 0; row < 2 * 7; row++) {
      const visible = values.subarray(row * 10, row * 10 + 10).filter((x) => x >= 0)
      expect(visible.length).toBe(Math.ceil((60 + Math.min(((row % 7) + 1) * 16, 100)) / 16))
      expect(visible.reduce((sum, x) => sum + x, 0)).toBeCloseTo(1, 5)
    }
  })

  it('refuses what it cannot look at', async () => {
    const rng = random(82)
    const q = await sample(rng, [1, 4, 2, 16], 'float32', device)
    const k = await sample(rng, [1, 3, 2, 16], 'float32', device)
    expect((await failure(() => probe(q.tensor, k.tensor))).message).toBe(
      'probe: sq must be at most sk, got 4 and 3',
    )
    expect((await failure(() => probe(k.tensor, q.tensor, { per: 'key' }))).message).toBe(
      'probe: per goes with kind rows',
    )
    for (const [options, message] of [
      [{ stride: 4 }, 'probe: stride must be 1 with kind pooled, which looks at all, got 4'],
      [
        { kind: 'strided', stride: 32, block: [64, 16] },
        'probe: stride must be at most a block of keys, 16, got 32',
      ],
      [{ block: [64, 0] }, 'probe: block must be an integer at least 1, got 0'],
      [{ block: 2.5 }, 'probe: block must be an integer at least 1, got 2.5'],
    ] as const)
      expect((await failure(() => probe(k.tensor, q.tensor, options))).message).toBe(message)
  })
})
