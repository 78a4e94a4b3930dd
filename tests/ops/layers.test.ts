import {
  add,
  embed,
  type FloatDType,
  glu,
  linear,
  mul,
  norm,
  rope,
  sigmoid,
  silu,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectClose, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random, sample } from '../support/random.js'
import { round } from '../support/rounding.js'

const sigma = (x: number) => 1 / (1 + Math.exp(-x))

// One rounding is all that an operator on single elements may add; in float32 its exp adds two more
function expectRounded(
  actual: ArrayLike<number>,
  expected: readonly number[],
  dtype: FloatDType,
  what: string,
): void {
  expect(actual.length, what).toBe(expected.length)
  for (let i = 0; i < expected.length; i++) {
    const ulps = dtype === 'float32' ? 4 : 1
    const bound = ulps * epsilon[dtype] * Math.max(Math.abs(expected[i]!), 2 ** -14)
    expect(Math.abs(actual[i]! - expected[i]!), `${what} [${i}]`).toBeLessThanOrEqual(bound)
  }
}

describeDevices('layers', (device) => {
  describe.each(floats)('%s', (dtype) => {
    it('linear is the matrix product', async () => {
      const rng = random(40)
      for (let n = 0; n < 40; n++) {
        const [m, i, o] = [
          rng.pick([0, 1, 2, 7, 64, 130]),
          rng.pick([1, 3, 8, 64, 100, 257, 768]),
          rng.pick([1, 5, 64, 129, 256]),
        ]
        const x = await sample(rng, [rng.pick([1, 2]), m, i], dtype, device)
        const w = await sample(rng, [o, i], dtype, device)
        const bias = rng.chance(0.5) ? await sample(rng, [o], dtype, device) : undefined
        const wide = rng.chance(0.3)
        const result = linear(x.tensor, w.tensor, {
          bias: bias?.tensor,
          ...(wide ? { dtype: 'float32' as const } : {}),
        })
        expect(result.shape).toEqual([...x.tensor.shape.slice(0, -1), o])
        const target = wide ? 'float32' : dtype
        expect(result.dtype).toBe(target)
        const rows = x.values.length / i
        const expected = new Float64Array(rows * o)
        const plain = new Float64Array(rows * o)
        let terms = 2 ** -14
        for (let r = 0; r < rows; r++) {
          for (let c = 0; c < o; c++) {
            let [exact, squares] = [0, 0]
            let [up, down] = [0, 0]
            for (let j = 0; j < i; j++) {
              const product = (j: number) => x.values[r * i + j]! * w.values[c * i + j]!
              exact += product(j)
              squares += product(j) ** 2
              up = Math.fround(up + product(j))
              down = Math.fround(down + product(i - 1 - j))
            }
            // of few results one order of adding may be right by chance, or the sum be small
            terms = Math.max(terms, Math.sqrt(squares))
            const single = Math.abs(up - exact) > Math.abs(down - exact) ? up : down
            expected[r * o + c] = exact + (bias?.values[c] ?? 0)
            plain[r * o + c] = round(single + (bias?.values[c] ?? 0), target)
          }
        }
        expectClose(
          await result.read({ as: 'float32' }),
          expected,
          plain,
          target,
          `linear ${m} ${i} ${o}`,
          target === 'float32' ? { terms } : {},
        )
      }
    })

    it('norm divides by the root mean square', async () => {
      const rng = random(41)
      for (const [shape, eps] of [
        [[3, 5], 1e-5],
        [[1, 256], 1e-6],
        [[2, 3, 768], 0.1],
        [[0, 8], 1e-5],
        [[4, 1], 0],
        [[2, 4099], 1e-5],
      ] as const) {
        const x = await sample(rng, shape, dtype, device)
        const w = rng.chance(0.5) ? await sample(rng, [shape.at(-1)!], dtype, device) : undefined
        const d = shape.at(-1)!
        const expected = Array.from(x.values, (value, at) => {
          const row = x.values.subarray(at - (at % d), at - (at % d) + d)
          const square = row.reduce((sum, y) => sum + y * y, 0) / d
          return (value / Math.sqrt(square + eps)) * (w?.values[at % d] ?? 1)
        })
        const plain = expected.map((value) => round(value, dtype))
        expectClose(
          await norm(x.tensor, w?.tensor, { eps }).read({ as: 'float32' }),
          expected,
          plain,
          dtype,
          `norm ${shape}`,
        )
      }
    })

    it('rope turns pairs in both layouts, at far positions too', async () => {
      const rng = random(42)
      for (let n = 0; n < 16; n++) {
        const d = rng.pick([2, 64, 128])
        const [b, s, h] = [rng.pick([1, 2]), rng.pick([1, 5, 33]), rng.pick([1, 3])]
        const rotary = rng.chance(0.3) ? Math.max(2, d / 2) : d
        const layout = rng.pick(['half-split', 'interleaved'] as const)
        const theta = rng.pick([10000, 500000])
        // tables of any angles, for 40 positions
        const angles = rng.chance(0.4) ? rng.normals(20 * rotary, 9) : undefined
        const table = (f: (angle: number) => number) =>
          angles && tensor(angles.map(f), [40, rotary / 2], { device })
        const offset = rng.pick(angles ? [0, 7] : [0, 7, 100000])
        const positions = rng.chance(0.5)
          ? Array.from({ length: b * s }, () => rng.below(angles ? 40 : 200000))
          : undefined
        const x = await sample(rng, [b, s, h, d], dtype, device)
        const result = rope(x.tensor, {
          layout,
          ...(angles ? { cos: table(Math.cos), sin: table(Math.sin) } : { theta }),
          ...(rotary === d ? {} : { rotary }),
          ...(positions
            ? { positions: tensor(positions, [b, s], { dtype: 'int32', device }) }
            : { offset }),
        })
        const expected = Float64Array.from(x.values)
        for (let row = 0; row < b * s * h; row++) {
          const token = Math.floor(row / h)
          const position = positions ? positions[token]! : offset + (token % s)
          for (let i = 0; i < rotary / 2; i++) {
            const [first, second] =
              layout === 'half-split' ? [i, i + rotary / 2] : [2 * i, 2 * i + 1]
            const angle =
              angles?.[(position * rotary) / 2 + i] ?? position * theta ** ((-2 * i) / rotary)
            const [a, c] = [x.values[row * d + first]!, x.values[row * d + second]!]
            expected[row * d + first] = a * Math.cos(angle) - c * Math.sin(angle)
            expected[row * d + second] = c * Math.cos(angle) + a * Math.sin(angle)
          }
        }
        const error = maxError(await result.read({ as: 'float32' }), expected)
        expect(error, `rope ${layout} ${offset}`).toBeLessThanOrEqual(4 * epsilon[dtype] + 2e-6)
      }
      const [x, cos] = [zeros([1, 3, 1, 4], { dtype, device }), zeros([4, 2], { device })]
      expect((await failure(() => rope(x, { cos, sin: cos, theta: 5 }))).message).toBe(
        'rope: theta cannot be combined with cos',
      )
      expect((await failure(() => rope(x, { cos, sin: cos, offset: 2 }))).message).toBe(
        'rope: cos must be contiguous, with 2 columns and a row for every position, got [4, 2]',
      )
      const positions = tensor([0, 4, 0], [1, 3], { dtype: 'int32', device })
      expect((await failure(() => rope(x, { cos, sin: cos, positions }).read())).message).toMatch(
        /^rope: positions must be/,
      )
      expect((await failure(() => rope(x, { positions, offset: 2 }))).message).toBe(
        'rope: offset cannot be combined with positions',
      )
    })

    it('glu, silu, sigmoid, add and mul round once', async () => {
      const rng = random(43)
      for (const shape of [[1], [3, 5], [2, 130], [2, 3, 64], [0, 4]]) {
        const x = await sample(rng, shape, dtype, device, { scale: 4 })
        const y = await sample(rng, shape, dtype, device)
        const both = (f: (a: number, b: number) => number) =>
          Array.from(x.values, (a, i) => f(a, y.values[i]!))
        const read = (result: Tensor) => result.read({ as: 'float32' })
        expectRounded(
          await read(glu(x.tensor, y.tensor)),
          both((a, b) => a * sigma(a) * b),
          dtype,
          'glu',
        )
        expectRounded(
          await read(glu(x.tensor, y.tensor, { activation: 'sigmoid' })),
          both((a, b) => sigma(a) * b),
          dtype,
          'glu sigmoid',
        )
        expectRounded(
          await read(glu(x.tensor, y.tensor, { activation: 'identity' })),
          both((a, b) => a * b),
          dtype,
          'glu identity',
        )
        expectRounded(
          await read(silu(x.tensor)),
          both((a) => a * sigma(a)),
          dtype,
          'silu',
        )
        expectRounded(
          await read(sigmoid(x.tensor)),
          both((a) => sigma(a)),
          dtype,
          'sigmoid',
        )
        expectRounded(
          await read(add(x.tensor, y.tensor)),
          both((a, b) => a + b),
          dtype,
          'add',
        )
        expectRounded(
          await read(mul(x.tensor, y.tensor)),
          both((a, b) => a * b),
          dtype,
          'mul',
        )
      }
      const far = tensor([-1000, 1000, -88, 88], [4], { dtype, device })
      expect(
        (await sigmoid(far).read({ as: 'float32' })).every((value) => value >= 0 && value <= 1),
      ).toBe(true)
      expect((await silu(far).read({ as: 'float32' })).every(Number.isFinite)).toBe(true)
    })

    it('add and mul broadcast', async () => {
      const rng = random(44)
      const x = await sample(rng, [2, 1, 5], dtype, device)
      const y = await sample(rng, [3, 1], dtype, device)
      const sum = add(x.tensor, y.tensor)
      expect(sum.shape).toEqual([2, 3, 5])
      const expected = Array.from(
        { length: 30 },
        (_, i) => x.values[Math.floor(i / 15) * 5 + (i % 5)]! + y.values[Math.floor(i / 5) % 3]!,
      )
      expectRounded(await sum.read({ as: 'float32' }), expected, dtype, 'broadcast')
    })

    it('embed copies rows and refuses ids outside the table', async () => {
      const rng = random(45)
      const table = await sample(rng, [7, 10], dtype, device)
      for (const idType of ['int32', 'uint8', 'int64'] as const) {
        const list = [6, 0, 3, 3]
        const ids =
          idType === 'uint8'
            ? tensor(Uint8Array.from(list), [2, 2], { device })
            : tensor(list, [2, 2], { dtype: idType, device })
        const rows = await embed(ids, table.tensor).read({ as: 'float32' })
        expect([...rows]).toEqual(
          list.flatMap((id) => [...table.values.subarray(id * 10, id * 10 + 10)]),
        )
      }
      for (const bad of [7, -1]) {
        const rows = embed(tensor([0, bad], [2], { dtype: 'int32', device }), table.tensor)
        await expect(add(rows, rows).read()).rejects.toThrow(/^embed: ids must/)
      }
    })
  })
})
