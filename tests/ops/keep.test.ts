import { keep, type Mask, tensor } from 'heddle'
import { expect, it } from 'vitest'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random } from '../support/random.js'

/** Listed blocks of a mask as [head][row] lists. */
async function listed(mask: Mask, columns: number): Promise<number[][][]> {
  const [, heads = 0, rows = 0, words = 0] = mask.blocks!.shape
  const bits = await mask.blocks!.read()
  return Array.from({ length: heads }, (_, h) =>
    Array.from({ length: rows }, (_, r) =>
      Array.from({ length: columns }, (_, c) => c).filter(
        (c) => (bits[(h * rows + r) * words + (c >> 5)]! >> (c & 31)) & 1,
      ),
    ),
  )
}

describeDevices('keep', (device) => {
  it('keeps what a sort would keep, ties to the lower index', async () => {
    const rng = random(85)
    for (let n = 0; n < 80; n++) {
      // and now and then so many columns that a warp, or a CTA, has several at a time
      const many = n % 4 === 3
      const [sq, sk] = [
        rng.pick([16, 100, 256]),
        many ? rng.pick([256, 257, 511, 1024, 2048, 2049, 3000]) : 256 + rng.pick([0, 16, 33]),
      ]
      const block = [rng.pick([16, 64]), many ? 1 : rng.pick([16, 64])] as const
      const [rows, columns] = [Math.ceil(sq / block[0]), Math.ceil(sk / block[1])]
      // few values, so that many are equal
      const values = Float32Array.from({ length: 2 * rows * columns }, () =>
        rng.pick([0, -0, 0.25, 0.25, 0.5, 1, rng.next(), Number.NaN, Number.NEGATIVE_INFINITY]),
      )
      const over = rng.pick(['row', 'map'] as const)
      const rule = rng.pick(['topBlocks', 'coverage', 'threshold'] as const)
      const amount =
        rule === 'topBlocks' ? rng.pick([0, 1, 3, 100, 1500]) : rng.pick([0, 0.25, 0.6, 0.9, 1])
      const [forceFirst, forceDiagonal] = [rng.pick([0, 1]), rng.pick([0, 1, 2])]
      const [minBlocks, maxBlocks] = [rng.pick([0, 2]), rng.pick([undefined, 2, 4, 2 ** 53 - 1])]
      const budget = rule === 'threshold' ? {} : { minBlocks, maxBlocks }
      const options = { sq, sk, block, over, [rule]: amount, forceFirst, forceDiagonal, ...budget }
      const score = tensor(values, [1, 2, rows, columns], { device })
      const actual = await listed(keep(score, options), columns)

      const top = (x: number) => (Number.isNaN(x) ? -1e30 : x)
      for (let head = 0; head < 2; head++) {
        const pairs = Array.from({ length: rows * columns }, (_, i) => {
          const [r, c] = [Math.floor(i / columns), i % columns]
          const p = sk - sq + r * block[0]
          const last = Math.floor((sk - sq + Math.min((r + 1) * block[0], sq) - 1) / block[1])
          const own = Math.floor(p / block[1])
          const forced =
            c < forceFirst || (forceDiagonal > 0 && c > own - forceDiagonal && c <= last)
          return { i, r, c, x: values[head * rows * columns + i]!, forced }
        })
        const groups =
          over === 'map'
            ? [pairs]
            : Array.from({ length: rows }, (_, r) => pairs.filter((one) => one.r === r))
        const expected: number[][] = Array.from({ length: rows }, () => [])
        for (const group of groups) {
          const count = over === 'map' ? rows : 1
          const order = group
            .filter(({ x }) => x !== Number.NEGATIVE_INFINITY)
            .sort(
              (a, b) =>
                Number(b.forced) - Number(a.forced) ||
                (a.forced ? 0 : top(b.x) - top(a.x)) ||
                a.i - b.i,
            )
          let taken = order.length
          if (rule === 'topBlocks') taken = amount * count
          if (rule === 'threshold')
            taken = order.filter(({ x, forced }) => forced || x >= amount).length
          if (rule === 'coverage' && amount < 1) {
            // the operator's masses are whole multiples of 2^-40 of the largest
            const most = Math.max(0, ...order.map(({ x }) => x).filter((x) => x > 0))
            const mass = (x: number) => (x > 0 ? Math.floor((x / most) * 2 ** 40) : 0)
            const wanted = Math.ceil(amount * order.reduce((sum, { x }) => sum + mass(x), 0))
            let sum = 0
            taken = 0
            while (sum < wanted) sum += mass(order[taken++]!.x)
            taken = Math.max(taken, order.filter(({ forced }) => forced).length)
          }
          if (rule !== 'threshold') {
            if (minBlocks) taken = Math.max(taken, minBlocks * count)
            if (maxBlocks) taken = Math.min(taken, maxBlocks * count)
          }
          for (const { r, c } of order.slice(0, taken)) expected[r]!.push(c)
        }
        for (const row of expected) row.sort((a, b) => a - b)
        expect(actual[head], JSON.stringify(options)).toEqual(expected)
      }
    }
  })

  it('takes what is infinite for all of the mass', async () => {
    const inf = Number.POSITIVE_INFINITY
    const score = tensor([1, inf, 5, inf], [1, 1, 1, 4], { device })
    for (const [coverage, columns] of [
      [0.5, [1]],
      [0.9, [1, 3]],
    ] as const)
      expect(await listed(keep(score, { sq: 16, sk: 64, block: 16, coverage }), 4)).toEqual([
        [columns],
      ])
  })

  it('compares with thresholds between the numbers of float32', async () => {
    const values = [0, 1, Number.NaN, 1e-45, Number.NEGATIVE_INFINITY, -1, Math.fround(0.1), 1e38]
    const score = tensor(Float32Array.from(values), [1, 1, 1, 8], { device })
    for (const threshold of [1e-50, 1e-45, -1e-50, 0, 0.1, 0.10000000149011613, -1e300, 1e39, 1]) {
      const kept = await listed(keep(score, { sq: 1, sk: 8, block: 1, threshold }), 8)
      const own = [...(await score.read())]
      expect(kept, `${threshold}`).toEqual([
        [own.flatMap((value, i) => (value >= threshold && value > -1e308 ? [i] : []))],
      ])
    }
  })

  it('refuses what is no rule or no score', async () => {
    const score = tensor(new Float32Array(4), [1, 1, 2, 2], { device })
    expect((await failure(() => keep(score, { sq: 256 }))).message).toBe(
      'keep: options must have one of topBlocks, coverage and threshold, got 0',
    )
    expect((await failure(() => keep(score, { sq: 300, topBlocks: 1 }))).message).toBe(
      'keep: score must be [b, heads, 3, 3], got [1, 1, 2, 2]',
    )
    for (const [options, message] of [
      [{ topBlocks: 1.5 }, 'topBlocks must be an integer at least 0, got 1.5'],
      [{ topBlocks: 1, minBlocks: -1 }, 'minBlocks must be an integer at least 0, got -1'],
      [{ topBlocks: 1, maxBlocks: 0 }, 'maxBlocks must be an integer at least 1, got 0'],
      [
        { topBlocks: 1, minBlocks: 9, maxBlocks: 1 },
        'maxBlocks must be at least minBlocks = 9, got 1',
      ],
      [
        { topBlocks: 1, minBlocks: 1000, maxBlocks: 500 },
        'maxBlocks must be at least minBlocks = 1000, got 500',
      ],
      [
        { topBlocks: 1, block: 3 },
        'block must be a power of two or a multiple of 16 for queries, got 3',
      ],
    ] as const)
      expect((await failure(() => keep(score, { sq: 256, ...options }))).message).toBe(
        `keep: ${message}`,
      )
    // numbers beyond what there is are all of it
    const most = Number.MAX_SAFE_INTEGER
    for (const options of [
      { topBlocks: most, over: 'map' },
      { coverage: Infinity },
      { topBlocks: 0, minBlocks: most },
    ])
      expect(await listed(keep(score, { sq: 256, ...options } as never), 2)).toEqual([
        [
          [0, 1],
          [0, 1],
        ],
      ])
  })
})
