import { checkInteger, checkOptions, elements, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { type Mask, makeMask } from '../mask.js'
import { keepBits } from '../ops/keep.js'
import { probe } from '../ops/probe.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor, zeros } from '../tensor.js'
import { achievedMass } from './flex-prefill.js'
import { everything, lengthsOf, under } from './packed.js'

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

/** What the heads of released configurations are: 1000 columns and 6096 diagonals. */
const usual: MInferencePattern = { kind: 'vertical-slash', vertical: 1000, slash: 6096 }

/**
 * Chooses keys by a pattern per head that was found before (MInference, arXiv 2407.02490): sinks and a window; the heaviest
 * columns and diagonals of the last 64 queries; or the blocks of 64 that pooling finds.
 *
 * @param q [b, sq, hq, d]; sq at most sk.
 * @param k [b, sk, hk, d].
 * @param options `patterns`: one per query head, or one for all; {@link findPatterns} finds them.
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
  options: { patterns?: readonly MInferencePattern[] | undefined } = {},
): Mask {
  const op = 'minference'
  checkTensor(op, 'q', q)
  checkTensor(op, 'k', k)
  checkOptions(op, options, new Set(['patterns']))
  const { sq, sk } = lengthsOf(op, q, k)
  const [b = 0, , heads = 0] = q.shape
  const kvHeads = k.shape[2] ?? 0
  if (heads % kvHeads !== 0)
    throw refuse('ERR_SHAPE', op, 'k', `hq must be a multiple of hk, got ${heads} and ${kvHeads}`)
  const group = heads / kvHeads
  const { patterns: given = [usual] } = options
  if (!Array.isArray(given)) throw mustBe(op, 'patterns', 'a list of patterns', given)
  const patterns = elements(op, 'patterns', given, (pattern, i): MInferencePattern => {
    if (pattern === null || typeof pattern !== 'object')
      throw mustBe(op, `patterns[${i}]`, 'an object with a kind', pattern)
    const copy = { ...(pattern as MInferencePattern) }
    const { kind, ...own } = copy
    if (!Object.hasOwn(sizes, kind))
      throw mustBe(op, 'kind', 'a-shape, vertical-slash or block-sparse', kind)
    checkOptions(op, own, new Set(sizes[kind]))
    for (const name of sizes[kind])
      checkInteger(op, `patterns[${i}].${name}`, (own as Record<string, unknown>)[name], 0)
    return copy
  })
  if (patterns.length !== 1 && patterns.length !== heads)
    throw mustBe(op, 'patterns', `a list of 1 or hq = ${heads}`, patterns)
  const bits = (...shape: number[]) => zeros(shape, { dtype: 'int32', device: q.device })
  const words = Math.ceil(sk / 32)
  const parts = everything(sq, sk, 64)
  if (sq === 0) return parts
  const lists = () => {
    const blocks = bits(b, heads, Math.ceil(sq / 64), Math.ceil(Math.ceil(sk / 64) / 32))
    const [columns, diagonals] = [bits(b, heads, words), bits(b, heads, words)]
    for (let head = 0; head < heads; head++) {
      const own = q.slice(2, head, head + 1)
      const keys = k.slice(2, Math.floor(head / group), Math.floor(head / group) + 1)
      const pattern = patterns[head % patterns.length]!
      const last = own.slice(1, Math.max(sq - 64, 0))
      const lines = (to: Tensor, per: 'key' | 'distance', top: number, forceFirst: number) => {
        const score = probe(last, keys, { kind: 'rows', per, block: [last.shape[1]!, 64] })
        const kept = keepBits(score, { rule: 'top', top, forceFirst })
        to.slice(1, head, head + 1).copyFrom(kept.reshape([b, 1, words]))
      }
      switch (pattern.kind) {
        case 'a-shape':
          lines(columns, 'key', pattern.sinkTokens, pattern.sinkTokens)
          lines(diagonals, 'distance', pattern.window, pattern.window)
          break
        case 'vertical-slash':
          lines(columns, 'key', pattern.vertical, 30)
          lines(diagonals, 'distance', pattern.slash, 100)
          break
        case 'block-sparse': {
          const score = probe(own, keys, { block: 64 })
          const kept = keepBits(score, { rule: 'top', top: pattern.topBlocks })
          blocks.slice(1, head, head + 1).copyFrom(kept)
          break
        }
      }
    }
    return makeMask({ ...parts, sequences: b, heads, sinkTokens: 0, blocks, columns, diagonals })
  }
  return scope(() => under(op, lists))
}

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
  for (const pattern of candidates) {
    using mask = minference(q, k, { patterns: [pattern] })
    masses.push(await achievedMass(q, k, mask))
  }
  return masses[0]!.map((_, head) => {
    const best = masses.reduce((top, mass, i) => (mass[head]! > masses[top]![head]! ? i : top), 0)
    return candidates[best]!
  })
}
