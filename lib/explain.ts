import { mustBe } from './check.js'
import { type Explanation, explainCall } from './native.js'

export type { Explanation } from './native.js'

/**
 * Which kernel a call of an operator would run, and why better ones do not take it. Arguments are checked as by the call
 * itself, but nothing runs, but for copies of operands and fills. Of a function that runs several operators it explains the
 * first; an async one must come to it before it waits for anything.
 *
 * @param operator {@link attention}, {@link attentionBackward}, {@link linear} or another operator.
 * @param args what the operator would be called with.
 * @throws HeddleError what the call would throw, but for `ERR_UNSUPPORTED` where all variants decline: then `variant` is
 * `undefined` and `declined` tells why.
 * @example
 * import { attention, explain, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 128, 8, 64]), randn([1, 128, 8, 64]), randn([1, 128, 8, 64])]
 * const { variant, declined } = explain(attention, q, k, v, { causal: true })
 * console.log(variant, declined) // 'avx2' [], or 'sm80_simt' and why 'sm90_wgmma' declined
 */
export function explain<A extends readonly unknown[]>(
  operator: (...args: A) => unknown,
  ...args: A
): Explanation {
  if (typeof operator !== 'function') throw mustBe('explain', 'operator', 'a function', operator)
  const explanation = explainCall(() => operator(...args))
  if (!explanation) throw mustBe('explain', 'operator', 'one that runs a kernel', operator)
  return explanation
}
