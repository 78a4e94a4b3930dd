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
  flags: ReadonlySet<string>
  /** A size by its letters; refuses a string that lacks it unless there is a fallback. */
  size(name: string, fallback?: number): number
}

/** Takes a problem string apart. */
export function parseProblem(text: string): Problem {
  const match = /^([a-z.]+):(.+)$/.exec(text.trim())
  if (!match) throw refuse(`a problem must be operator:sizes, got "${text}"`)
  const sizes = new Map<string, number>()
  const flags = new Set<string>()
  let dtype: FloatDType = 'float32'
  for (const word of match[2]!.trim().split(/\s+/)) {
    const size = /^([a-zA-Z]+)(\d+(?:\.\d+)?)$/.exec(word)
    const known = dtypes[word]
    if (known) dtype = known
    else if (size) sizes.set(size[1]!, Number(size[2]))
    else flags.add(word)
  }
  const size = (name: string, fallback?: number) => {
    const value = sizes.get(name) ?? fallback
    if (value === undefined) throw refuse(`"${text}" lacks the size ${name}`)
    return value
  }
  return { text: text.trim(), operator: match[1]!, dtype, flags, size }
}
