import type { AttentionGradients, FloatDType, Tensor } from 'heddle'
import { expect } from 'vitest'
import { epsilon } from './devices.js'
import type { AttentionCase, GradientReference, Gradients } from './reference.js'

type Numbers = ArrayLike<number>

/** √(Σ(x - y)² / Σ y²) */
export function relativeRms(actual: Numbers, expected: Numbers, least = 0): number {
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    difference += (actual[i]! - expected[i]!) ** 2
    norm += expected[i]! ** 2
  }
  return Math.sqrt(difference / Math.max(norm, least, Number.MIN_VALUE))
}

/**
 * Expects a small relativeRms. A few sums may all come out next to nothing and err by their terms all the same, so
 * `squares`, the sums of the squared terms, take the place of y² where there is more of them.
 */
export function expectRms(
  actual: Numbers,
  expected: Numbers,
  bound: number,
  what: string,
  squares: () => Float64Array,
): void {
  expect(actual.length, what).toBe(expected.length)
  if (relativeRms(actual, expected) <= bound) return
  const usual = squares().reduce((sum, x) => sum + x, 0)
  expect(relativeRms(actual, expected, usual), what).toBeLessThanOrEqual(bound)
}

/** All bytes after another, for comparisons that vitest would take minutes for. */
export const bytesOf = (parts: readonly ArrayBufferView[]): Buffer =>
  Buffer.concat(parts.map((x) => new Uint8Array(x.buffer, x.byteOffset, x.byteLength)))

export function maxError(actual: Numbers, expected: Numbers): number {
  let worst = 0
  for (let i = 0; i < expected.length; i++) {
    const [a, e] = [actual[i]!, expected[i]!]
    if (a === e) continue
    const error = Math.abs(a - e)
    if (!(error <= worst)) worst = Number.isNaN(error) ? Number.POSITIVE_INFINITY : error
  }
  return worst
}

export function largest(values: Numbers): number {
  let top = 0
  for (let i = 0; i < values.length; i++) {
    const size = Math.abs(values[i]!)
    if (Number.isFinite(size) && size > top) top = size
  }
  return top
}

/** What makes a float32 result of a sum sensitive to the order of the sum. */
export interface Sensitivity {
  /** Sums are exponents of the result, and a unit counts as often as the largest of them is large. */
  exponent?: number
  /** The result is such a sum, whose terms are this large while it may be small. */
  terms?: number
  /** Takes the place of the format's epsilon. */
  unit?: number
}

/**
 * The rule for every operator: at most twice the error of the plain computation in the same dtype, plus the format's
 * epsilon. Infinities must match exactly. A float32 sum depends on its order, which is worth a few units more.
 */
export function expectClose(
  actual: Numbers,
  expected: Numbers,
  plain: Numbers,
  dtype: FloatDType,
  what: string,
  { exponent = 0, terms = 2 ** -14, unit = epsilon[dtype] }: Sensitivity = {},
): void {
  expect(actual.length, what).toBe(expected.length)
  const units = dtype === 'float32' ? 4 + exponent : 1
  const bound = 2 * maxError(plain, expected) + units * unit * Math.max(largest(expected), terms)
  const error = maxError(actual, expected)
  expect(error, `${what}: error ${error}, allowed ${bound}`).toBeLessThanOrEqual(bound)
}

/** The same rule for all that a call of attention.backward gives. */
export async function expectGradients(
  result: AttentionGradients,
  { exact, plain, sizes, noises, exponent }: GradientReference,
  c: AttentionCase,
  dtype: FloatDType,
  what: string,
): Promise<void> {
  const compare = async (name: keyof Gradients, tensor: Tensor) => {
    const actual = (await tensor.read({ as: 'float32' })) as Float32Array
    // what a sink or a slope gets is a float32 sum over all rows, but of what the dtype has rounded
    const whole = name === 'dsink' || name === 'dslopes'
    // and dq and dk inherit how out was rounded, which counts where its parts nearly cancel
    const inherited = name === 'dq' || name === 'dk' ? { terms: 1.5 * noises[name] } : undefined
    const sensitivity = whole || dtype === 'float32' ? { exponent, terms: sizes[name] } : inherited
    expectClose(actual, exact[name], plain[name], dtype, `${what} ${name}`, sensitivity)
  }
  await compare('dq', result.dq)
  await compare('dk', result.dk)
  await compare('dv', result.dv)
  expect(result.dsink !== undefined).toBe(c.sink !== undefined)
  expect(result.dslopes !== undefined).toBe(c.slopes !== undefined)
  if (result.dsink) await compare('dsink', result.dsink)
  if (result.dslopes) await compare('dslopes', result.dslopes)
}
