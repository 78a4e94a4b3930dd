import type { FloatDType } from 'heddle'

const number = new Float64Array(1)
const words = new Uint32Array(number.buffer)

/** To a significand of so many bits behind its first, where `least` is the exponent of the smallest normal number. */
function toDigits(x: number, digits: number, least: number, largest: number): number {
  if (!Number.isFinite(x)) return x
  number[0] = x
  const exponent = Math.max(((words[1]! >>> 20) & 0x7ff) - 1023, least)
  // the units of a float64 of this size are those of the result
  words[0] = 0
  words[1] = ((exponent - digits + 52 + 1023) << 20) | 0x80000
  const rounded = x + number[0]! - number[0]!
  return Math.abs(rounded) > largest ? Math.sign(x) * Number.POSITIVE_INFINITY : rounded
}

/** Rounds a number to the nearest of a format, ties to even: the tests' own, apart from the library's. */
export function round(x: number, dtype: FloatDType): number {
  if (dtype === 'float32') return Math.fround(x)
  return dtype === 'bfloat16'
    ? toDigits(x, 7, -126, (2 - 2 ** -7) * 2 ** 127)
    : toDigits(x, 10, -14, 65504)
}
