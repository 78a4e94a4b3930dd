import { checkInteger, checkOptions, elements, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { named } from '../errors.js'
import { firstBits, type Mask, makeMask } from '../mask.js'
import { keepBits } from '../ops/keep.js'
import { probe } from '../ops/probe.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor, tensor, zeros } from '../tensor.js'
import { achievedMass } from './flex-prefill.js'
import { checkRanks, everything, type PackedOptions, perSequence } from './packed.js'

/** What a head of {@link minference} sees. Sizes are tokens but for `topBlocks`. */
export type MInferencePattern =
  | { kind: 'a-shape'; sinkTokens: number; window: number }
  | { kind: 'vertical-slash'; vertical: number; slash: number }
  | { kind: 'block-sparse'; topBlocks: number }

const sizes = {
  'a-shape': ['sinkTokens', 'window'],
  'vertical-slash': ['vertical', 'slash'],
  'block-sparse': ['topBlocks'],
} as const

const known: ReadonlySet<string> = new Set(['patterns', 'cuSeqlensQ', 'cuSeqlensK'])

/** What the heads of released configurations are: 1000 columns and 6096 diagonals. */
const usual: MInferencePattern = { kind: 'vertical-slash', vertical: 1000, slash: 6096 }

/**
 * Chooses keys by a pattern per head that was found before (MInference, arXiv 2407.02490): sinks and a window; the heaviest
 * columns and diagonals of the last 64 queries; or the blocks of 64 that pooling finds.
 *
 * @param q [b, sq, hq, d]; sq at most sk.
 * @param k [b, sk, hk, d].
 * @param options `patterns`: one per query head, or one for all; {@link findPatterns} finds them. Packed sequences have the
 * same.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, minference, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 512, 2, 64]), randn([1, 512, 2, 64]), randn([1, 512, 2, 64])]
 * const patterns = [{ kind: 'vertical-slash', vertical: 40, slash: 100 }] as const
 * const { out } = attention(q, k, v, { mask: minference(q, k, { patterns }) })
 */
export function minference<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  options: PackedOptions & { patterns?: readonly MInferencePattern[] | undefined } = {},
): Mask {
  const op = 'minference'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkOptions(op, options, known)
  const { patterns: given = [usual], ...packed } = options
  checkRanks(op, { q, k })
  const heads = q.shape[2]!
  if (!Array.isArray(given)) throw mustBe(op, 'patterns', 'a list of patterns', given)
  const patterns = checkPatterns(op, 'patterns', given)
  if (patterns.length !== 1 && patterns.length !== heads)
    throw mustBe(op, 'patterns', `a list of 1 or hq = ${heads}`, patterns)
  const select = (own: Tensor<D>, keys: Tensor<D>): Mask => {
    const [b = 0, sq = 0] = own.shape
    const sk = keys.shape[1]!
    const parts = everything(sq, sk, 64)
    if (sq === 0) return parts
    const made: { [kind in 'blocks' | 'columns' | 'diagonals']?: Tensor<'int32'> } = {}
    const place = (kind: keyof typeof made, from: number, to: number, shape: readonly number[]) => {
      made[kind] ??= zeros([b, heads, ...shape], { dtype: 'int32', device: q.device })
      return made[kind].slice(1, from, to)
    }
    const words = Math.ceil(sk / 32)
    let scores: Tensor<'float32'> | undefined
    let pooled: Tensor<'float32'> | undefined
    for (let from = 0, to: number; from < heads; from = to) {
      const pattern = patterns[from % patterns.length]!
      for (to = from + 1; to < heads && same(patterns[to % patterns.length]!, pattern); ) to++
      const best = (score: Tensor<'float32'>, top: number, forceFirst = 0) =>
        keepBits(score.slice(1, from, to).contiguous(), { rule: 'top', top, forceFirst })
      const lines = (kind: 'columns' | 'diagonals', top: number, forceFirst: number) => {
        const last = own.slice(1, Math.max(sq - 64, 0))
        const block = [last.shape[1]!, 64] as const
        scores ??= probe(last, keys, { kind: 'rows', per: 'line', block })
        const line = kind === 'columns' ? 0 : 1
        const kept = best(scores.slice(2, line, line + 1), top, forceFirst)
        place(kind, from, to, [words]).copyFrom(kept.reshape([b, to - from, words]))
      }
      const first = (kind: 'columns' | 'diagonals', count: number) => {
        const bits = tensor(firstBits(count, words), undefined, { device: q.device })
        const own = place(kind, from, to, [words])
        own.copyFrom(bits.expand(own.shape))
      }
      switch (pattern.kind) {
        case 'a-shape':
          first('columns', pattern.sinkTokens)
          first('diagonals', pattern.window)
          break
        case 'vertical-slash':
          lines('columns', pattern.vertical, 30)
          lines('diagonals', pattern.slash, 100)
          break
        case 'block-sparse': {
          pooled ??= probe(own, keys, { block: 64 })
          const kept = best(pooled, pattern.topBlocks)
          place('blocks', from, to, kept.shape.slice(2)).copyFrom(kept)
          break
        }
      }
    }
    return makeMask({ ...parts, sequences: b, heads, sinkTokens: 0, ...made })
  }
  return scope(() => perSequence(op, q, k, [64, 64], packed, select))
}

function checkPatterns(op: string, argument: string, given: readonly unknown[]) {
  return elements(op, argument, given, (pattern, i): MInferencePattern => {
    const place = `${argument}[${i}]`
    if (pattern === null || typeof pattern !== 'object')
      throw mustBe(op, place, 'an object with a kind', pattern)
    const copy = { ...(pattern as MInferencePattern) }
    const { kind, ...own } = copy
    if (!Object.hasOwn(sizes, kind))
      throw mustBe(op, `${place}.kind`, 'a-shape, vertical-slash or block-sparse', kind)
    checkOptions(op, own, new Set(sizes[kind]))
    for (const name of sizes[kind])
      checkInteger(op, `${place}.${name}`, (own as Record<string, unknown>)[name], 0)
    return copy
  })
}

const same = (a: MInferencePattern, b: MInferencePattern): boolean =>
  JSON.stringify(a) === JSON.stringify(b)

/**
 * The offline search of MInference: for every head the candidate that covers most of the attention mass of a sample. Give it
 * candidates of the same cost.
 *
 * @param q [b, sq, hq, d]; sq at most sk.
 * @param k [b, sk, hk, d].
 * @returns One pattern per query head, for {@link minference}.
 * @throws HeddleError as {@link minference} does, by rejecting.
 * @example
 * import { findPatterns, minference, randn } from 'heddle'
 * const [q, k] = [randn([1, 256, 2, 64]), randn([1, 256, 2, 64])]
 * const candidates = [
 *   { kind: 'a-shape', sinkTokens: 32, window: 96 },
 *   { kind: 'vertical-slash', vertical: 30, slash: 100 },
 * ] as const
 * const mask = minference(q, k, { patterns: await findPatterns(q, k, candidates) })
 */
export async function findPatterns<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  candidates: readonly MInferencePattern[],
): Promise<MInferencePattern[]> {
  if (!Array.isArray(candidates) || candidates.length === 0)
    throw mustBe('findPatterns', 'candidates', 'a list of patterns', candidates)
  const masses: number[][] = []
  const patterns = checkPatterns('findPatterns', 'candidates', candidates)
  for (const pattern of patterns) {
    const select = () => minference(q, k, { patterns: [pattern] })
    using mask = named('findPatterns', select, 'minference')
    masses.push(await achievedMass(q, k, mask))
  }
  return masses[0]!.map((_, head) => {
    const best = masses.reduce((top, mass, i) => (mass[head]! > masses[top]![head]! ? i : top), 0)
    return patterns[best]!
  })
}
