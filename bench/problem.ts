import { type FloatDType, HeddleError } from 'heddle'

// Problem strings such as `attention:b1 sq2048 sk2048 hq8 hk8 d64 f32 causal`: an operator, sizes as letters with a
// number, a dtype and flags. A result can be repeated from its string alone.

const dtypes: Readonly<Record<string, FloatDType>> = {
  f32: 'float32',
  f16: 'float16',
  bf16: 'bfloat16',
}

/** An error of the kind that the command line shows without a stack. */
export const refuse = (text: string) =>
  new HeddleError('ERR_ARGUMENT', `bench: ${text}`, { op: 'bench', argument: 'problem' })

/** A problem string taken apart. */
export interface Problem {
  text: string
  operator: string
  dtype: FloatDType
  flags: { has(name: string): boolean }
  /** A size by its letters, a whole number; refuses a string that lacks it unless there is a fallback. */
  size(name: string, fallback?: number, least?: number): number
  /** A number above 0 up to 1 by its letters, 0 if left out. */
  share(name: string): number
  /** Whether the string has a flag or a size, which does not count as asked for. */
  has(name: string): boolean
  /** What was asked for so far, and the words of the string that were not. */
  asked: ReadonlySet<string>
  unasked(): string[]
}

/** Takes a problem string apart. */
export function parseProblem(text: string): Problem {
  const match = /^([a-z.]+):(.+)$/.exec(text.trim())
  if (!match) throw refuse(`a problem must be operator:sizes, got "${text}"`)
  const sizes = new Map<string, number>()
  const words = new Set<string>()
  const asked = new Set<string>()
  let dtype: FloatDType = 'float32'
  const given = new Set<string>()
  for (const word of match[2]!.trim().split(/\s+/)) {
    const size = /^([a-zA-Z]+)(\d+(?:\.\d+)?)$/.exec(word)
    const known = dtypes[word]
    const name = known ? 'a dtype' : (size?.[1] ?? word)
    if (given.has(name)) throw refuse(`"${text}" has ${name} twice`)
    given.add(name)
    if (known) dtype = known
    else if (size) sizes.set(size[1]!, Number(size[2]))
    else words.add(word)
  }
  const flags = { has: (name: string) => !!asked.add(name) && words.has(name) }
  const size = (name: string, fallback?: number, least = 1) => {
    asked.add(name)
    const value = sizes.get(name)
    if (value === undefined) {
      if (fallback === undefined) throw refuse(`"${text}" lacks the size ${name}`)
      return fallback
    }
    if (!(Number.isInteger(value) && value >= least))
      throw refuse(`"${text}" must have a whole ${name} from ${least} on, got ${value}`)
    return value
  }
  const share = (name: string) => {
    asked.add(name)
    const value = sizes.get(name)
    if (value !== undefined && !(value > 0 && value <= 1))
      throw refuse(`"${text}" must have a ${name} above 0 up to 1, got ${value}`)
    return value ?? 0
  }
  const has = (name: string) => given.has(name)
  const unasked = () => [
    ...[...words].filter((word) => !asked.has(word)),
    ...[...sizes].filter(([name]) => !asked.has(name)).map((size) => size.join('')),
  ]
  const operator = match[1]!
  return { text: text.trim(), operator, dtype, flags, size, share, has, asked, unasked }
}

/** What the error of a case stays below where nothing is wrong, whatever its sizes. */
export function errorBound({ dtype, has }: Problem): number {
  if (has('e4m3')) return 0.1
  return { float32: 1e-3, float16: 1e-2, bfloat16: 3e-2 }[dtype]
}
