import { checkOptions, mustBe } from '../check.js'
import { HeddleError, refuse } from '../errors.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { type Analysis, type AnalyzeOptions, analyze } from './analyze.js'
import { coreOf, keptOf } from './core.js'
import { broken } from './error.js'
import {
  type Access,
  type CascadeIR,
  rankOf,
  type Statement,
  statementsOf,
  visitPredicate,
} from './ir.js'
import { attentionOf } from './lower-attention.js'
import { fixedOf } from './lower-fixed.js'
import { lightningOf } from './lower-lightning.js'
import { Normal, name, startOver, TooLarge } from './normal.js'
import { print } from './print.js'
import { multiply, productOf } from './product.js'
import {
  agreement,
  checked,
  type F32,
  type Lowered,
  Mismatch,
  numberOf,
  type Scalars,
  sizesOf,
  spanOf,
} from './slots.js'
import { runSteps } from './steps.js'
import { plainVariable } from './validate.js'

export type { Scalars } from './slots.js'

// Which operator of the library computes a cascade: the normal forms of its outputs are taken apart slot by slot. What is
// only a number or a tensor (scale, cap, slopes, sink, window) is handed to the operator by the call.

/** What {@link Plan.explain} returns. */
export interface PlanExplanation {
  /** The operator that the plan calls. */
  operator: string
  /** Its slots and what of the text fills them. */
  slots: Readonly<Record<string, string>>
  /** Inputs that a call gives as [b, s, h, d]; others have the axes of the text, or those of an operator without slots. */
  packed: readonly string[]
  /** Operators that were looked at before, and why they do not take the cascade. */
  refused: readonly { operator: string; einsum: string; reason: string }[]
  /** Why no operator takes it, where it runs statement by statement. */
  refusal: string | undefined
  analysis: Analysis
}

/**
 * A cascade as calls of the library. Tensors come in the order in which the text first reads them, in the layout of the
 * operator ([b, s, h, d] for attention, whatever axes the text writes), then the scalars. Runs where the tensors are.
 * `explain(plan, q, k, v)` tells the kernel.
 */
export interface Plan {
  (...inputs: readonly (Tensor | Scalars)[]): Record<string, Tensor>
  /** What the cascade costs, the operator and slots that it became, and why others were refused. */
  explain(options?: AnalyzeOptions): PlanExplanation
}

interface Refused {
  operator: string
  mismatch: Mismatch
}

// One product of matrices, along whatever axes
function matrixOf(_: Normal, ir: CascadeIR): Lowered {
  const [only, ...more] = statementsOf(ir.steps) as [Statement]
  const product = more.length === 0 ? productOf(only) : undefined
  const { a, b, names } = product ?? { names: [] }
  const ranks = [a, b].map(
    (one) => one?.indices.map((index) => rankOf(plainVariable(index)!)) ?? [],
  )
  if (!product || !names.every((one) => ir.scalars.includes(one) || ranks.flat().includes(one)))
    throw new Mismatch(ir.outputs[0]!, 'it is no product of matrices', -1)
  return {
    operator: 'linear',
    slots: { x: a!.name, weight: b!.name },
    run: ({ tensors, scalars }) =>
      scope(() => {
        const operands = [a, b].map((one) => {
          const given = tensors[one!.name]!
          if (given.rank === one!.indices.length) return given as F32
          const axes = one!.indices.map((index) => plainVariable(index)).join(', ')
          const got = given.shape.join(', ')
          const text = `${one!.name} must be [${axes}], got [${got}]`
          throw refuse('ERR_SHAPE', 'cascade', one!.name, text)
        }) as [F32, F32]
        const known = { ...scalars }
        operands.forEach(({ shape }, i) => {
          ranks[i]!.forEach((rank, axis) => {
            known[rank] = shape[axis]!
          })
        })
        const values = names.map((one) => [one, numberOf(name(one), known)] as const)
        const factor = product.scale(Object.fromEntries(values))
        return { [only.out.name]: multiply(product, operands, factor).contiguous() }
      }),
  }
}

const families = {
  attention: attentionOf,
  lightning: lightningOf,
  fixed: fixedOf,
  linear: matrixOf,
}

/** Options of compiling a cascade. */
export interface CompileOptions {
  /**
   * With `'required'`, as if left out, one operator computes all outputs, or the text is refused. With `'preferred'` what
   * would be refused runs statement by statement: the operator is then `'einsum'`, tensors have the axes of the text, results
   * and what lies between them are float32, and sizes that no input tells are given beside the scalars. It traverses
   * everything as often as the text says.
   */
  fused?: 'required' | 'preferred' | undefined
}

const known: ReadonlySet<string> = new Set<keyof CompileOptions>(['fused'])
const plans = new Map<string, Plan>()
const mostPlans = 1000 // the oldest is forgotten then

/** @internal The option after checks. */
export function fusedOf(options: CompileOptions): 'required' | 'preferred' {
  checkOptions('cascade', options, known)
  const { fused = 'required' } = options
  if (fused !== 'required' && fused !== 'preferred')
    throw mustBe('cascade', 'fused', "'required' or 'preferred'", fused)
  return fused
}

// Where all stands in the text
const placesOf = ({ steps, splits }: CascadeIR): string =>
  JSON.stringify([steps, splits], (key, value) => (key === 'src' ? undefined : value))
    .match(/"span":\[[^\]]*/g)!
    .join()

/** @internal */
export function compile(ir: CascadeIR, fused: 'required' | 'preferred'): Plan {
  // errors of a plan name places of its own text
  const key = `${fused} ${print(ir)} ${placesOf(ir)}`
  const before = plans.get(key)
  if (before) return before
  const refused: Refused[] = []
  const plan = planOf(
    ir,
    fused === 'required' ? fusedOne(ir, refused) : either(ir, refused),
    refused,
  )
  if (plans.size >= mostPlans) plans.delete(plans.keys().next().value!)
  plans.set(key, plan)
  return plan
}

function either(ir: CascadeIR, refused: Refused[]): Lowered {
  try {
    return fusedOne(ir, refused)
  } catch (error) {
    if (!(error instanceof HeddleError)) throw error
    return stepsOf(ir, error.message)
  }
}

// Statement by statement
function stepsOf(ir: CascadeIR, refusal: string): Lowered {
  const ranks = [...ir.families.map(({ name }) => name), ...ir.ranks.keys()]
  return {
    operator: 'einsum',
    slots: {},
    refusal,
    ranks,
    run: ({ tensors, scalars }) => runSteps(ir, tensors, scalars),
  }
}

function fusedOne(ir: CascadeIR, refused: Refused[]): Lowered {
  if (ir.outputs.length === 0) {
    const { out } = statementsOf(ir.steps)[0]!
    const text =
      'no kernel takes this cascade; every tensor is read by another, so it has no result'
    throw broken('CAS020', text, out.span, out.name)
  }
  startOver()
  // with operands that stay what the text makes them: an operator then takes fewer terms
  for (const lower of [attentionOf, lightningOf]) {
    const found = keptOf(ir, lower)
    if (found) return found
  }
  const direct = directOne(ir, refused)
  if (!(direct instanceof HeddleError)) return direct
  // of features that stay what they are, or all but the end of it
  for (const part of [(ir, lower) => keptOf(ir, lower, true), coreOf] satisfies (typeof coreOf)[])
    for (const lower of [attentionOf, lightningOf]) {
      startOver()
      const found = part(ir, lower)
      if (!found) continue
      refused.length = 0 // they were of the whole
      return found
    }
  throw direct
}

function directOne(ir: CascadeIR, refused: Refused[]): Lowered | HeddleError {
  startOver()
  const normal = normalOf(ir)
  if (normal instanceof HeddleError) return normal
  const made = new Set(statementsOf(ir.steps).map(({ out }) => `${out.name}[]`))
  const { beyond } = normal
  if (beyond !== undefined) {
    const text = `no kernel takes this cascade; ${beyond} may read beyond an axis or what a mask hides, which leaves it empty in parts`
    return broken('CAS020', text, spanOf(ir, beyond), beyond)
  }
  for (const tensor of ir.outputs) {
    const found = normal.forms.get(tensor)
    const state = [...(found?.form.free ?? [])].find((one) => made.has(one))
    const why = !found
      ? 'is the state of an iteration'
      : state
        ? `hangs on ${state.slice(0, -2)}, whose recurrence is not a sum with a constant decay`
        : found.where.length > 0
          ? 'leaves points of its result empty'
          : found.form.free.has('inf') && 'computes with infinity'
    if (why)
      return broken(
        'CAS020',
        `no kernel takes this cascade; ${tensor} ${why}`,
        spanOf(ir, tensor),
        tensor,
      )
  }
  for (const [operator, lower] of Object.entries(families)) {
    if (normal.pages.size > 0 && operator !== 'attention') continue
    try {
      return checked(lower(normal, ir), normal, ir)
    } catch (error) {
      // What would be computed beside an operator may be no text, or too long a one
      const why =
        error instanceof TooLarge
          ? 'it computes far more'
          : error instanceof HeddleError && error.message.replace(/^cascade: /, '')
      const mismatch = why ? new Mismatch(ir.outputs[0]!, why, 0) : error
      if (!(mismatch instanceof Mismatch)) throw error
      refused.push({ operator, mismatch })
    }
  }
  return refusal(ir, refused)
}

function normalOf(ir: CascadeIR): Normal | HeddleError {
  try {
    return new Normal(ir)
  } catch (error) {
    if (!(error instanceof TooLarge)) throw error
    const [tensor] = ir.outputs as [string]
    const text = 'no kernel takes this cascade; it computes far more than one operator does'
    return broken('CAS020', text, spanOf(ir, tensor), tensor)
  }
}

function refusal(ir: CascadeIR, refused: readonly Refused[]) {
  const { operator, mismatch } = refused.reduce((a, b) => (b.mismatch.fit > a.mismatch.fit ? b : a))
  const nearest = `the nearest operator, ${operator}, does not take ${mismatch.einsum}: ${mismatch.reason}`
  const span = spanOf(ir, mismatch.einsum)
  if (mismatch.code === 'CAS022') return broken('CAS022', nearest, span, mismatch.einsum)
  const { passes, suggestions } = analyze(ir, {})
  const [rank, { headline, why }] = Object.entries(passes).reduce(
    (a, b) => (b[1].headline > a[1].headline ? b : a),
    ['', { headline: 0, why: [] as Analysis['passes'][string]['why'] }],
  )
  if (headline < 2)
    return broken('CAS020', `no kernel takes this cascade; ${nearest}`, span, mismatch.einsum)
  const chain = why.map(({ from, via, to }) => `${from}; ${via}; ${to}`).join('. ')
  const rewrite = suggestions.find(({ effect }) => effect.startsWith(`${rank}: `))
  const remedy = rewrite ? `; ${rewrite.rule} makes it ${rewrite.effect}` : ''
  return broken(
    'CAS021',
    `${rank} takes ${headline} passes that no kernel fuses (${chain}); ${nearest}${remedy}`,
    span,
    rank,
  )
}

function planOf(ir: CascadeIR, lowered: Lowered, refused: readonly Refused[]): Plan {
  const wanted: ReadonlySet<string> = new Set([...ir.scalars, ...(lowered.ranks ?? [])])
  const sizes = ir.families.flatMap(({ name, levels }) => [name, ...levels.map(rankOf)])
  const scalarNames: ReadonlySet<string> = new Set([...wanted, ...sizes])
  const told = sizesOf(ir, lowered.layouts ?? new Map())
  const declared = [...ir.ranks].filter((one): one is [string, number] => one[1] !== undefined)
  const masks: Access[] = []
  for (const { where } of statementsOf(ir.steps))
    if (where) visitPredicate(where, (one) => one.kind === 'access' && masks.push(one))
  const agree = agreement(ir, lowered.layouts)
  const count = ir.inputs.length
  const plan = (...inputs: readonly (Tensor | Scalars)[]) => {
    if (inputs.length < count || inputs.length > count + 1)
      throw mustBe(
        'cascade',
        'inputs',
        `${count} tensors (${ir.inputs.join(', ')}) and the scalars`,
        inputs,
      )
    const tensors: Record<string, Tensor> = {}
    ir.inputs.forEach((tensor, i) => {
      checkTensor('cascade', tensor, inputs[i])
      tensors[tensor] = inputs[i] as Tensor
    })
    for (const { name, span } of masks) {
      if (/^(int|uint|bool)/.test(tensors[name]!.dtype)) continue
      const text = 'masks must be decidable from indices and integer tensors'
      throw broken('CAS010', text, span, name)
    }
    let scalars = (inputs[count] ?? {}) as Scalars
    checkOptions('cascade', scalars, scalarNames)
    for (const scalar of Object.keys(scalars))
      if (typeof scalars[scalar] !== 'number')
        throw mustBe('cascade', scalar, 'a number', scalars[scalar])
    agree(inputs as readonly Tensor[], scalars)
    // Sizes that the tensors tell as well
    const more = Object.keys(scalars).filter((one) => !wanted.has(one))
    if (more.length > 0) {
      const own = told({ tensors, scalars })
      for (const rank of more)
        if (own[rank] !== undefined && own[rank] !== scalars[rank]) {
          const text = `rank ${rank} is ${scalars[rank]} from the call but ${own[rank]} from its tensors`
          throw broken('CAS003', text, statementsOf(ir.steps)[0]!.out.span, rank)
        }
      const rest = Object.entries(scalars).filter(([name]) => wanted.has(name))
      scalars = Object.fromEntries(rest)
    }
    if (declared.length > 0) scalars = { ...Object.fromEntries(declared), ...scalars }
    return lowered.run({ tensors, scalars })
  }
  return Object.freeze(
    Object.assign(plan, {
      explain: (options: AnalyzeOptions = {}): PlanExplanation => ({
        operator: lowered.operator,
        slots: lowered.slots,
        packed: ir.inputs.filter((tensor) => lowered.layouts?.has(tensor)),
        refused: refused.map(({ operator, mismatch }) => ({
          operator,
          einsum: mismatch.einsum,
          reason: mismatch.reason,
        })),
        refusal: lowered.refusal,
        analysis: analyze(ir, options),
      }),
    }),
  )
}
