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
  /** A size by its letters; refuses a string that lacks it unless there is a fallback. */
  size(name: string, fallback?: number): number
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
  const size = (name: string, fallback?: number) => {
    asked.add(name)
    const value = sizes.get(name) ?? fallback
    if (value === undefined) throw refuse(`"${text}" lacks the size ${name}`)
    if (fallback === undefined && !(Number.isInteger(value) && value > 0))
      throw refuse(`"${text}" must have a whole ${name} from 1 on, got ${value}`)
    return value
  }
  const unasked = () => [
    ...[...words].filter((word) => !asked.has(word)),
    ...[...sizes].filter(([name]) => !asked.has(name)).map((size) => size.join('')),
  ]
  return { text: text.trim(), operator: match[1]!, dtype, flags, size, asked, unasked }
}
