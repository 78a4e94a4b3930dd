import { type DType, dtypes, full, type Tensor, tensor } from 'heddle'
import { describe, expect, it } from 'vitest'
import {
  decode,
  type FormatName,
  formats,
  ladders,
  rounded,
  roundedInteger,
} from '../support/codecs.js'
import { describeDevices } from '../support/devices.js'
import { random } from '../support/random.js'

const names = Object.keys(formats) as FormatName[]

function everyCode(name: FormatName) {
  const count = 2 ** formats[name].bits
  return formats[name].bits === 16
    ? Uint16Array.from({ length: count }, (_, i) => i)
    : Uint8Array.from({ length: count }, (_, i) => i)
}

/** The first place where two lists differ; -0 is not 0, and NaN is NaN. */
function difference(
  actual: ArrayLike<number | bigint>,
  expected: ArrayLike<number | bigint>,
  given?: ArrayLike<number | bigint>,
): string | undefined {
  if (actual.length !== expected.length) return `${actual.length} of ${expected.length}`
  for (let i = 0; i < expected.length; i++) {
    if (!Object.is(actual[i], expected[i]))
      return `[${i}] ${given?.[i]}: ${actual[i]} instead of ${expected[i]}`
  }
  return undefined
}

const singles = new Float32Array(1)
const bitsOfSingle = new Int32Array(singles.buffer)
function neighbour(x: number, steps: number): number {
  singles[0] = x
  bitsOfSingle[0]! += x === 0 && steps < 0 ? 2 ** 31 + 1 : steps
  return singles[0]
}

const specials = Float32Array.of(
  0,
  -0,
  Number.NaN,
  Number.POSITIVE_INFINITY,
  Number.NEGATIVE_INFINITY,
  2 ** -149,
  -(2 ** -149),
  2 ** -126,
  2 ** -126 - 2 ** -149,
  (2 - 2 ** -23) * 2 ** 127,
  -(2 - 2 ** -23) * 2 ** 127,
)

// Any bit pattern, so mostly huge and tiny numbers; and as many of everyday size
function anySingles(stream: number, count: number): Float32Array {
  const rng = random(stream)
  const bits = Uint32Array.from({ length: count }, () => rng.below(2 ** 32))
  return Float32Array.of(
    ...specials,
    ...new Float32Array(bits.buffer),
    ...Float32Array.from({ length: count }, () => rng.normal() * 2 ** (rng.below(40) - 25)),
  )
}

describeDevices('codecs', (device) => {
  // With and without neighbours in memory: vectors convert the one, single elements the other
  const layouts: readonly [string, (x: Tensor) => Tensor][] = [
    ['together', (x) => x],
    [
      'apart',
      (x) =>
        x
          .expand([2, ...x.shape])
          .transpose(0, 1)
          .contiguous()
          .select(1, 1),
    ],
  ]

  describe.each(names)('%s', (name) => {
    const codes = everyCode(name)
    const values = Float32Array.from(codes, (code) => decode(name, code))

    it.each(layouts)('every pattern is its number, and back, %s', async (_, layout) => {
      const x = layout(tensor(codes, undefined, { dtype: name, device }))
      const singles = x.cast('float32')
      expect(difference(await singles.read(), values, codes)).toBeUndefined()
      expect(difference(await x.read({ as: 'float32' }), values, codes)).toBeUndefined()
      const back = await layout(singles).cast(name).read()
      for (let code = 0; code < codes.length; code++) {
        if (Number.isNaN(values[code])) expect(decode(name, back[code]!)).toBeNaN()
        else if (back[code] !== code) expect.fail(`${code} came back as ${back[code]}`)
      }
    })

    it.each(layouts)(
      'rounds at every tie, beside it, and beyond the range, %s',
      async (_, layout) => {
        const ladder = ladders[name]
        const positive: number[] = [...specials]
        for (let code = 0; code + 1 < ladder.length; code++) {
          const tie = (ladder[code]! + ladder[code + 1]!) / 2
          if (Math.fround(tie) !== tie) expect.fail(`${tie} is no float32`)
          positive.push(ladder[code]!, neighbour(tie, -1), tie, neighbour(tie, 1))
        }
        const last = ladder.at(-1)!
        if (Number.isFinite(Math.fround(last))) positive.push(neighbour(last, -1), last, last * 1.5)
        const given = Float32Array.from([...positive, ...positive.map((x) => -x)])
        const x = layout(tensor(given, undefined, { device })).cast(name)
        const expected = Float32Array.from(given, (one) => rounded(name, one))
        expect(difference(await x.read({ as: 'float32' }), expected, given)).toBeUndefined()
      },
    )

    it.each(layouts)('rounds any float32, %s', async (_, layout) => {
      const given = anySingles(100 + names.indexOf(name), 30_000)
      const x = layout(tensor(given, undefined, { device })).cast(name)
      const expected = Float32Array.from(given, (one) => rounded(name, one))
      expect(difference(await x.read({ as: 'float32' }), expected, given)).toBeUndefined()
      const written = full([given.length], 0, { dtype: name, device }).write(given)
      expect(difference(await written.read({ as: 'float32' }), expected, given)).toBeUndefined()
    })

    it.each(names)('every pattern becomes %s in one rounding', async (to) => {
      const x = tensor(codes, undefined, { dtype: name, device }).cast(to)
      const expected = values.map((value) => rounded(to, value))
      expect(difference(await x.read({ as: 'float32' }), expected, values)).toBeUndefined()
    })

    it.each(['int32', 'int64', 'uint8', 'bool'] as const)('every pattern as %s', async (to) => {
      const x = tensor(codes, undefined, { dtype: name, device }).cast(to)
      const expected = Array.from(values, (value) => integer(to, value))
      expect(difference(await x.read(), expected, values)).toBeUndefined()
    })

    it('a double is rounded once', async () => {
      const rng = random(110)
      const ladder = ladders[name]
      for (let n = 0; n < 200; n++) {
        const code = rng.below(ladder.length - 1)
        const tie = (ladder[code]! + ladder[code + 1]!) / 2
        const value =
          rng.pick([-1, 1]) * tie * (1 + rng.pick([-1, 0, 1]) * 2 ** -rng.pick([30, 45]))
        const [got] = await full([1], value, { dtype: name, device }).read({ as: 'float32' })
        expect(difference([got!], [rounded(name, value)], [value])).toBeUndefined()
      }
    })
  })

  describe('float32', () => {
    it.each(['int32', 'int64', 'uint8', 'bool'] as const)('truncates to %s', async (to) => {
      const edges = [8, 31, 32, 53, 62, 63, 64].flatMap((power) =>
        [-2, -1, 0, 1, 2].map((steps) => neighbour(2 ** power, steps)),
      )
      const small = Array.from({ length: 600 }, (_, i) => (i - 20) / 2)
      const given = Float32Array.from([
        ...anySingles(120, 10_000),
        ...[...edges, ...small].flatMap((x) => [x, -x]),
      ])
      const expected = Array.from(given, (one) => integer(to, one))
      for (const [, layout] of layouts) {
        const x = layout(tensor(given, undefined, { device })).cast(to)
        expect(difference(await x.read(), expected, given)).toBeUndefined()
      }
    })

    it('keeps every bit of a float32', async () => {
      const given = anySingles(121, 1000)
      const bits = await tensor(given, undefined, { device }).cast('float32').read()
      expect(Buffer.compare(Buffer.from(bits.buffer), Buffer.from(given.buffer))).toBe(0)
    })
  })

  describe.each(['int32', 'int64', 'uint8', 'bool'] as const)('%s', (from) => {
    const rng = random(130)
    const wide = [0, 8, 11, 16, 24, 31, 32, 53, 54, 62, 63].flatMap((power) =>
      [-3n, -2n, -1n, 0n, 1n, 2n, 3n].flatMap((step) => [
        2n ** BigInt(power) + step,
        -(2n ** BigInt(power)) + step,
        // ties of float32 and bfloat16, and their neighbours
        2n ** BigInt(power) + 2n ** BigInt(Math.max(power - 24, 0)) + step,
        2n ** BigInt(power) + 3n * 2n ** BigInt(Math.max(power - 8, 0)) + step,
      ]),
    )
    for (let n = 0; n < 3000; n++) {
      const word = (BigInt(rng.below(2 ** 32)) << 32n) | BigInt(rng.below(2 ** 32))
      wide.push(BigInt.asIntN(64, word) >> BigInt(rng.below(64)))
    }
    const given = [
      ...new Set(
        wide
          .filter((x) => BigInt.asIntN(64, x) === x)
          .map((x) =>
            from === 'int32'
              ? BigInt.asIntN(32, x)
              : from === 'uint8'
                ? BigInt.asUintN(8, x)
                : from === 'bool'
                  ? BigInt(Number(x !== 0n))
                  : x,
          ),
      ),
    ]
    const data =
      from === 'int64'
        ? BigInt64Array.from(given)
        : from === 'int32'
          ? Int32Array.from(given, Number)
          : Uint8Array.from(given, Number)

    it.each(dtypes)('becomes %s', async (to) => {
      for (const [, layout] of layouts) {
        const x = layout(tensor(data, undefined, { dtype: from, device })).cast(to)
        if (to === 'int32' || to === 'int64' || to === 'uint8' || to === 'bool') {
          const expected = given.map((one) => integer(to, one))
          expect(difference(await x.read(), expected, given)).toBeUndefined()
        } else {
          const expected = Float32Array.from(given, (one) => fromInteger(to, one))
          expect(difference(await x.read({ as: 'float32' }), expected, given)).toBeUndefined()
        }
      }
    })
  })

  it('int64 keeps what a double cannot', async () => {
    const given = BigInt64Array.of(2n ** 53n + 1n, -(2n ** 53n) - 1n, 2n ** 63n - 1n, -(2n ** 63n))
    const x = tensor(given, [2, 2], { device })
    expect(await x.transpose(0, 1).contiguous().transpose(0, 1).read()).toEqual(given)
    expect([...(await x.read({ as: 'float32' }))]).toEqual([
      2 ** 53,
      -(2 ** 53),
      2 ** 63,
      -(2 ** 63),
    ])
    const numbers = [2 ** 53 - 1, -(2 ** 53) + 1]
    expect(await tensor(numbers, [2], { dtype: 'int64', device }).read()).toEqual(
      BigInt64Array.from(numbers, BigInt),
    )
  })

  it('any byte but 0 is true', async () => {
    const x = tensor(Uint8Array.of(0, 1, 2, 255), undefined, { dtype: 'bool', device })
    for (const to of dtypes.filter((one) => one !== 'bool'))
      expect([...(await x.cast(to).read({ as: 'float32' }))], to).toEqual([0, 1, 1, 1])
  })
})

const ranges = {
  int32: [-(2n ** 31n), 2n ** 31n - 1n],
  int64: [-(2n ** 63n), 2n ** 63n - 1n],
  uint8: [0n, 255n],
} as const

/** Truncated and saturated, NaN as 0; as bool, whether it is not 0. */
function integer(to: keyof typeof ranges | 'bool', x: number | bigint): number | bigint {
  if (to === 'bool') return Number(typeof x === 'bigint' ? x !== 0n : x !== 0)
  const [least, most] = ranges[to]
  const exact =
    typeof x === 'bigint'
      ? x
      : Number.isFinite(x)
        ? BigInt(Math.trunc(x))
        : Number.isNaN(x)
          ? 0n
          : x > 0
            ? most
            : least
  const kept = exact < least ? least : exact > most ? most : exact
  return to === 'int64' ? kept : Number(kept)
}

function fromInteger(to: Exclude<DType, keyof typeof ranges | 'bool'>, x: bigint): number {
  if (to === 'float32') return roundedInteger(x, 24)
  if (to === 'bfloat16') return roundedInteger(x, 8)
  // far beyond the range where a double is not exact
  return rounded(to, Number(x))
}
