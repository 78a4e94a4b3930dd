import { elements, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { HeddleError, refuse } from '../errors.js'
import { run } from '../native.js'
import { checkTensor, full } from '../tensor.js'
import type { AttentionResult } from './attention.js'

/** What {@link merge} computes from two parts A and B of one head. */
export const mergeDefinition = `
  M[p]   = max(LA[p], LB[p])
  WA[p]  = exp(LA[p] - M[p])
  WB[p]  = exp(LB[p] - M[p])
  O[p,f] = (WA[p] * A[p,f] + WB[p] * B[p,f]) / (WA[p] + WB[p])
  L[p]   = M[p] + log(WA[p] + WB[p])`

/**
 * Joins attention results over disjoint sets of keys into the result over their union, in the order given. A part that
 * saw no key (`lse = -inf`) changes nothing.
 *
 * @param parts At least one; `out` [b, s, h, d] and `lse` [b, h, s] f32, as {@link attention} returns them.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_DEVICE` if the parts do not go together.
 * @example
 * import { attention, merge, randn } from 'heddle'
 * const q = randn([1, 4, 2, 64])
 * const k = randn([1, 100, 2, 64])
 * const v = randn([1, 100, 2, 64])
 * const halves = [0, 50].map((at) => attention(q, k.slice(1, at, at + 50), v.slice(1, at, at + 50)))
 * const { out } = merge(halves) // attention(q, k, v).out
 */
export function merge<D extends FloatDType>(
  parts: readonly AttentionResult<D>[],
): AttentionResult<D> {
  if (!Array.isArray(parts) || parts.length === 0)
    throw mustBe('merge', 'parts', 'a list of results', parts)
  const [first, ...others] = elements('merge', 'parts', parts, (part, i) => {
    if (part === null || typeof part !== 'object')
      throw mustBe('merge', `parts[${i}]`, 'a result { out, lse }', part)
    const { out, lse } = part as AttentionResult<D>
    checkTensor('merge', `parts[${i}].out`, out)
    checkTensor('merge', `parts[${i}].lse`, lse)
    return { out, lse }
  }) as [AttentionResult<D>, ...AttentionResult<D>[]]
  // one part is joined with nothing
  if (others.length === 0) {
    using lse = full(first.lse.shape, Number.NEGATIVE_INFINITY, { device: first.lse.device })
    return merge([first, { out: first.out, lse }])
  }
  let total = first
  for (const [i, part] of others.entries()) {
    const before = total
    try {
      const [out, lse] = run('merge', {
        outA: before.out,
        lseA: before.lse,
        outB: part.out,
        lseB: part.lse,
      })
      total = { out, lse } as AttentionResult<D>
    } catch (error) {
      throw spelled(error, i + 1)
    } finally {
      if (before !== first) {
        before.out.dispose()
        before.lse.dispose()
      }
    }
  }
  return total
}

// As the caller knows the arguments; what was merged before is like the first part
function spelled(error: unknown, part: number): unknown {
  if (!(error instanceof HeddleError) || error.argument === undefined) return error
  const spell = (text: string) =>
    text.replace(
      /\b(out|lse)([AB])\b/g,
      (_, name, side) => `parts[${side === 'A' ? 0 : part}].${name}`,
    )
  return refuse(error.code, 'merge', spell(error.argument), spell(error.message.slice(7)))
}
