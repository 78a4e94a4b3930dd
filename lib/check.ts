import { type HeddleError, refuse } from './errors.js'
import { Tensor } from './tensor.js'

// The engine's own word for a typed array, whatever the array says of itself
const arrayName: (this: unknown) => string | undefined = Object.getOwnPropertyDescriptor(
  Object.getPrototypeOf(Uint8Array.prototype),
  Symbol.toStringTag,
)!.get!

/** @internal How messages show a value: short, and never by running the caller's code. */
export function show(value: unknown): string {
  if (typeof value === 'string')
    return JSON.stringify(value.length > 60 ? `${value.slice(0, 57)}…` : value)
  if (typeof value === 'bigint') return `${value}n`
  if (typeof value === 'function') return 'a function'
  if (typeof value === 'symbol') return 'a symbol'
  if (value === null || typeof value !== 'object') return String(value)
  if (ArrayBuffer.isView(value)) return `a ${arrayName.call(value) ?? 'DataView'}`
  if (Array.isArray(value)) return `an array of ${value.length}`
  return value instanceof Tensor ? 'a tensor' : 'an object'
}

/** @internal */
export function mustBe(op: string, argument: string, rule: string, value: unknown): HeddleError {
  return refuse('ERR_ARGUMENT', op, argument, `${argument} must be ${rule}, got ${show(value)}`)
}

function distance(a: string, b: string): number {
  let row = Array.from({ length: b.length + 1 }, (_, j) => j)
  for (let i = 1; i <= a.length; i++) {
    const next = [i]
    for (let j = 1; j <= b.length; j++) {
      const swap = row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)
      next.push(Math.min(swap, row[j]! + 1, next[j - 1]! + 1))
    }
    row = next
  }
  return row[b.length]!
}

/** @internal The known word closest to a misspelled one, if any is close. */
export function closest(word: string, known: Iterable<string>): string | undefined {
  if (word.length > 40) return undefined
  let best: string | undefined
  let least = Math.max(2, Math.floor(word.length / 3)) + 1
  for (const candidate of known) {
    const d = distance(word.toLowerCase(), candidate.toLowerCase())
    if (d < least) [best, least] = [candidate, d]
  }
  return best
}

/** @internal Refuses what is no options object and options that do not exist, with the closest that does. */
export function checkOptions(
  op: string,
  options: unknown,
  known: ReadonlySet<string>,
  what = 'option',
): void {
  if (options === undefined) return
  if (
    options === null ||
    typeof options !== 'object' ||
    Array.isArray(options) ||
    options instanceof Tensor
  ) {
    throw mustBe(op, `${what}s`, 'an object', options)
  }
  for (const key of Object.keys(options)) {
    if (known.has(key)) continue
    const near = closest(key, known)
    throw refuse(
      'ERR_ARGUMENT',
      op,
      key,
      `unknown ${what} ${show(key)}${near === undefined ? '' : `; did you mean "${near}"?`}`,
    )
  }
}

/** @internal The elements of a list, each read once: what else a caller's array says of itself is not asked. */
export function elements<T>(
  op: string,
  argument: string,
  list: readonly unknown[] | ArrayLike<number>,
  check: (value: unknown, index: number) => T,
): T[] {
  const length: unknown = list.length
  if (typeof length !== 'number' || !(length >= 0 && length < 2 ** 32)) {
    throw mustBe(op, argument, 'a list of fewer than 2^32 elements', list)
  }
  const values: T[] = []
  for (let i = 0; i < length; i++) values.push(check(list[i], i))
  return values
}

/** @internal */
export function checkInteger(
  op: string,
  argument: string,
  value: unknown,
  least: number,
  most: number = Number.MAX_SAFE_INTEGER,
): number {
  if (typeof value !== 'number' || !Number.isInteger(value) || value < least || value > most) {
    const bounded = most < Number.MAX_SAFE_INTEGER || (typeof value === 'number' && value > most)
    const bounds = bounded ? ` from ${least} to ${most}` : ` at least ${least}`
    throw mustBe(op, argument, `an integer${least > Number.MIN_SAFE_INTEGER ? bounds : ''}`, value)
  }
  return value
}

/** @internal Refuses a promise, of whose failure nobody else hears. */
export function checkSynchronous(op: string, result: unknown): void {
  if (!(result instanceof Promise)) return
  result.catch(() => {})
  throw refuse(
    'ERR_ARGUMENT',
    op,
    'body',
    'body must be synchronous, got one that returns a promise',
  )
}

/** @internal Nothing else may compare what a caller gave: an object would be asked for its value. */
export function checkNumber(
  op: string,
  argument: string,
  value: unknown,
  rule: string,
  accepts: (value: number) => boolean,
): number {
  if (typeof value !== 'number' || !accepts(value)) throw mustBe(op, argument, rule, value)
  return value
}

/** @internal The numbers of an array, each checked. */
export function numbers(
  op: string,
  argument: string,
  value: unknown,
  check: (number: unknown, index: number) => number,
  rule = 'an array of numbers',
): number[] {
  if (Array.isArray(value) || value instanceof Float32Array || value instanceof Int32Array)
    return elements(op, argument, value, check)
  throw mustBe(op, argument, rule, value)
}

/** @internal Ascending offsets that start at 0 and end at `total`, as numbers. */
export function offsetNumbers(
  op: string,
  argument: string,
  value: unknown,
  total: number | undefined,
  rule?: string,
): number[] {
  const wrong = (got: string) =>
    refuse(
      'ERR_ARGUMENT',
      op,
      argument,
      `${argument} must start at 0, never descend and end at ${total}, got ${got}`,
    )
  let last = 0
  const check = (number: unknown, i: number) => {
    if (typeof number !== 'number' || !Number.isInteger(number) || (i ? number < last : number))
      throw wrong(`${show(number)} at index ${i}`)
    last = number
    return number
  }
  const values = numbers(op, argument, value, check, rule)
  if (values.length === 0) throw wrong('no elements')
  if (last !== total) throw wrong(`${last} at its end`)
  return values
}
