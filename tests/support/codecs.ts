/** The 16-bit and 8-bit formats, by the textbook and apart from the library's bit arithmetic. */
export interface Format {
  bits: number
  exponent: number
  mantissa: number
  /** One NaN per sign, no infinity. */
  finite: boolean
}

export const formats = {
  float16: { bits: 16, exponent: 5, mantissa: 10, finite: false },
  bfloat16: { bits: 16, exponent: 8, mantissa: 7, finite: false },
  float8_e4m3fn: { bits: 8, exponent: 4, mantissa: 3, finite: true },
  float8_e5m2: { bits: 8, exponent: 5, mantissa: 2, finite: false },
} as const satisfies Record<string, Format>

export type FormatName = keyof typeof formats

// What a code would be if the format went on: the largest exponent holds numbers too
function numberOf({ exponent, mantissa }: Format, magnitude: number): number {
  const bias = 2 ** (exponent - 1) - 1
  const e = Math.floor(magnitude / 2 ** mantissa)
  const m = magnitude % 2 ** mantissa
  return e === 0 ? m * 2 ** (1 - bias - mantissa) : (1 + m / 2 ** mantissa) * 2 ** (e - bias)
}

/** The magnitudes from 0 up, and after the largest the one that would follow it. */
function ladder(format: Format): Float64Array {
  const { bits, exponent, mantissa, finite } = format
  const beyond = finite ? 2 ** (bits - 1) - 1 : (2 ** exponent - 1) * 2 ** mantissa
  return Float64Array.from({ length: beyond + 1 }, (_, code) => numberOf(format, code))
}

export const ladders: Readonly<Record<FormatName, Float64Array>> = {
  float16: ladder(formats.float16),
  bfloat16: ladder(formats.bfloat16),
  float8_e4m3fn: ladder(formats.float8_e4m3fn),
  float8_e5m2: ladder(formats.float8_e5m2),
}

/** The number that a code stands for. */
export function decode(name: FormatName, code: number): number {
  const { bits, finite } = formats[name]
  const values = ladders[name]
  const magnitude = code % 2 ** (bits - 1)
  const sign = code >= 2 ** (bits - 1) ? -1 : 1
  if (magnitude < values.length - 1) return sign * values[magnitude]!
  return !finite && magnitude === values.length - 1 ? sign * Number.POSITIVE_INFINITY : Number.NaN
}

/** What a number becomes: the nearest of the format, of two equally near the one with the even code. */
export function rounded(name: FormatName, x: number): number {
  const values = ladders[name]
  const size = Math.abs(x)
  if (Number.isNaN(x)) return x
  const past = values.length - 1
  let low = 0
  let high = past
  while (low < high) {
    const middle = (low + high + 1) >> 1
    if (values[middle]! <= size) low = middle
    else high = middle - 1
  }
  let code = low
  if (low < past) {
    const [below, above] = [size - values[low]!, values[low + 1]! - size]
    if (above < below || (above === below && low % 2 === 1)) code = low + 1
  }
  const overflow = formats[name].finite ? Number.NaN : Number.POSITIVE_INFINITY
  return (Object.is(x, -0) || x < 0 ? -1 : 1) * (code === past ? overflow : values[code]!)
}

/** An integer as a float with so many bits, to nearest even. */
export function roundedInteger(x: bigint, precision: number): number {
  const size = x < 0n ? -x : x
  const extra = BigInt(Math.max(size.toString(2).length - precision, 0))
  const [kept, rest] = [size >> extra, size & ((1n << extra) - 1n)]
  const half = extra > 0n ? 1n << (extra - 1n) : 1n
  const up = rest > half || (rest === half && kept % 2n === 1n)
  return Number(x < 0n ? -1n : 1n) * Number((kept + (up ? 1n : 0n)) << extra)
}
