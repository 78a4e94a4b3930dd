import { checkOptions, mustBe } from '../check.js'
import { type Analysis, type AnalyzeOptions, analyze } from './analyze.js'
import { type DenseArray, type DenseResult, type EvaluateOptions, evaluate } from './evaluate.js'
import type { CascadeIR } from './ir.js'
import { type CompileOptions, compile, fusedOf, type Plan } from './lower.js'
import { parse } from './parse.js'
import { print } from './print.js'
import { validate } from './validate.js'

export type {
  Analysis,
  AnalysisWarning,
  AnalyzeOptions,
  EinsumWork,
  LiveTensor,
} from './analyze.js'
export type { DenseArray, DenseResult, EvaluateOptions } from './evaluate.js'
export type {
  Access,
  CascadeIR,
  Expr,
  Family,
  FunctionName,
  Index,
  Iteration,
  Predicate,
  Reducer,
  Span,
  Split,
  Statement,
} from './ir.js'
export { definitions } from './library.js'
export type { CompileOptions, Plan, PlanExplanation, Scalars } from './lower.js'
export type { Machine, MachineName } from './machine.js'
export type { PassStep, RankPasses } from './passes.js'
export type { Suggestion } from './suggest.js'

/** A cascade of einsums: what a mechanism computes, as text that can be checked and run. */
export interface Cascade {
  /** The text as it was given. */
  readonly text: string
  readonly ir: CascadeIR
  /**
   * Runs the text in float64, by its definition.
   *
   * @param inputs The tensors that the text does not produce, with their axes as written.
   * @param scalars The names that are neither tensors, index variables nor ranks.
   * @returns Every tensor that no later statement reads, and those that `keep` names; empty coordinates are 0.
   * @throws HeddleError with a `CAS` code and a `span`.
   */
  evaluate(
    inputs: Readonly<Record<string, DenseArray>>,
    scalars?: Readonly<Record<string, number>>,
    options?: EvaluateOptions,
  ): Record<string, DenseResult>
  /**
   * What the text tells of its cost: passes over each rank with the reasons, what stays live, operations by unit, traffic,
   * a lower bound of the time on a machine, and rewrites that need fewer passes. See docs/design/cascade.md.
   *
   * @throws HeddleError `CAS003` or `CAS008` if sizes do not go together, `CAS010` if a mask is a float tensor.
   */
  analyze(options?: AnalyzeOptions): Analysis
  /**
   * The operator of the library that computes the text, as a function of tensors: its kernels, its errors, its speed. Texts
   * that compute the same (with a maximum or without, divided late or early, split or iterated) get the same operator.
   *
   * @example
   * import { attentionDefinition, cascade, explain, randn } from 'heddle'
   * const [q, k, v] = [randn([1, 128, 8, 64]), randn([1, 128, 8, 64]), randn([1, 128, 8, 64])]
   * const plan = cascade(attentionDefinition).compile()
   * const { O, LSE } = plan(q, k, v, { scale: 0.125 })
   * console.log(plan.explain().slots, explain(plan, q, k, v).variant)
   * @throws HeddleError `CAS020` if no kernel computes it, `CAS021` if it takes several passes besides, `CAS022` if an
   * operator has the form but not this sink, scale or distance; with `fused: 'preferred'` it runs statement by statement
   * instead.
   */
  compile(options?: CompileOptions): Plan
  /** The text in the usual form; it parses back to the same cascade. */
  toString(): string
}

function literal(value: string | number): string {
  if (typeof value === 'string') return value
  if (typeof value !== 'number' || Number.isNaN(value))
    throw mustBe('cascade', 'values', 'strings and numbers', value)
  return String(value).replace('Infinity', 'inf')
}

const known: ReadonlySet<string> = new Set<keyof EvaluateOptions>(['sizes', 'maxPoints', 'keep'])

/**
 * Reads a cascade of einsums. Capitals with brackets are tensors, lower case inside brackets are index variables; a variable
 * that is missing on the left is reduced, by a sum unless a reducer such as `max(k)` stands in front; `where` limits the
 * points. Works as a template tag and as a function.
 *
 * @throws HeddleError with a `CAS` code and the `span` of the text that is wrong.
 * @example
 * import { cascade } from 'heddle'
 * const softmax = cascade`
 *   M[p]   = max(k) S[p,k]
 *   N[p,k] = exp(S[p,k] - M[p])
 *   D[p]   = sum(k) N[p,k]
 *   A[p,k] = N[p,k] / D[p]`
 * const { A } = softmax.evaluate({ S: { data: [1, 2, 3], shape: [1, 3] } })
 */
export function cascade(
  text: string | TemplateStringsArray,
  ...values: readonly (string | number)[]
): Cascade {
  const whole =
    typeof text === 'string'
      ? text
      : Array.isArray(text)
        ? String.raw({ raw: text }, ...values.map(literal))
        : undefined
  if (whole === undefined) throw mustBe('cascade', 'text', 'a string', text)
  const ir = validate(parse(whole))
  const plans: { [fused in 'required' | 'preferred']?: Plan } = {}
  return Object.freeze({
    text: whole,
    ir,
    evaluate(
      inputs: Readonly<Record<string, DenseArray>>,
      scalars: Readonly<Record<string, number>> = {},
      options: EvaluateOptions = {},
    ) {
      checkOptions('cascade', options, known)
      if (inputs === null || typeof inputs !== 'object')
        throw mustBe('cascade', 'inputs', 'an object of tensors', inputs)
      if (scalars === null || typeof scalars !== 'object')
        throw mustBe('cascade', 'scalars', 'an object of numbers', scalars)
      return evaluate(ir, inputs, scalars, options)
    },
    analyze: (options: AnalyzeOptions = {}) => analyze(ir, options),
    compile(options: CompileOptions = {}) {
      const fused = fusedOf(options)
      plans[fused] ??= compile(ir, fused)
      return plans[fused]
    },
    toString: () => print(ir),
  })
}
