import type { FloatDType } from 'heddle'

const buffer = new DataView(new ArrayBuffer(4))

function toBfloat16(x: number): number {
  if (!Number.isFinite(x)) return x
  buffer.setFloat32(0, x)
  const bits = buffer.getUint32(0)
  buffer.setUint32(0, (bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000)
  return buffer.getFloat32(0)
}

function toFloat16(x: number): number {
  if (!Number.isFinite(x) || x === 0) return x
  const exponent = Math.max(Math.floor(Math.log2(Math.abs(x))), -14)
  const unit = 2 ** (exponent - 10)
  const steps = x / unit
  const low = Math.floor(steps)
  const rest = steps - low
  const rounded = rest > 0.5 || (rest === 0.5 && low % 2 !== 0) ? low + 1 : low
  const value = rounded * unit
  return Math.abs(value) > 65504 ? Math.sign(x) * Number.POSITIVE_INFINITY : value
}

/** Rounds a number to the nearest of a format, ties to even: the tests' own, apart from the library's. */
export function round(x: number, dtype: FloatDType): number {
  return dtype === 'float32' ? Math.fround(x) : dtype === 'bfloat16' ? toBfloat16(x) : toFloat16(x)
}
