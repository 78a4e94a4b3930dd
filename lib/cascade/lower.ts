import { checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { HeddleError, refuse } from '../errors.js'
import { type AttentionOptions, attention } from '../ops/attention.js'
import { sigmoid, silu } from '../ops/elementwise.js'
import { glu } from '../ops/glu.js'
import { lightning } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { merge } from '../ops/merge.js'
import { norm } from '../ops/norm.js'
import { scope } from '../scope.js'
import { checkTensor, empty, full, type Tensor } from '../tensor.js'
import { type Analysis, type AnalyzeOptions, analyze } from './analyze.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, type Statement, statementsOf } from './ir.js'
import { definitions } from './library.js'
import {
  type Atom,
  access,
  argument,
  atomForm,
  type Condition,
  exponential,
  type Factor,
  type Form,
  formOf,
  logarithm,
  minus,
  Normal,
  name,
  number,
  plus,
  power,
  rankIn,
  type Term,
  TooLarge,
  termOf,
  times,
} from './normal.js'
import { parse } from './parse.js'
import { print } from './print.js'
import { type Layout, Side } from './side.js'
import { runSteps } from './steps.js'
import { validate } from './validate.js'

// Which operator of the library computes a cascade: the normal forms of its outputs are taken apart slot by slot. What is
// only a number or a tensor (scale, cap, slopes, sink, window) is handed to the operator by the call.

/** Numbers of a call by their names in the text. */
export type Scalars = Readonly<Record<string, number>>

/** What {@link Plan.explain} returns. */
export interface PlanExplanation {
  /** The operator that the plan calls. */
  operator: string
  /** Its slots and what of the text fills them. */
  slots: Readonly<Record<string, string>>
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

interface Call {
  tensors: Readonly<Record<string, Tensor>>
  scalars: Scalars
}

interface Lowered {
  operator: string
  slots: Record<string, string>
  refusal?: string
  /** Names that a call may give besides scalars. */
  ranks?: readonly string[]
  run(call: Call): Record<string, Tensor>
}

// Why an operator does not take a cascade; `fit` grows with what it does take
class Mismatch {
  constructor(
    readonly einsum: string,
    readonly reason: string,
    readonly fit: number,
    readonly code: 'CAS020' | 'CAS022' = 'CAS020',
  ) {}
}

interface Refused {
  operator: string
  mismatch: Mismatch
}

const has = (one: { free: ReadonlySet<string> }, names: Iterable<string>) =>
  [...names].some((each) => one.free.has(each))
const isSum = ({ atom, power }: Factor) =>
  atom.kind === 'reduce' && atom.op === 'sum' && power === 1
const single = (factors: readonly Factor[]): Form => formOf([termOf(1, factors)])

type Access = Atom & { kind: 'access' }
type Reduce = Atom & { kind: 'reduce' }

// Which function of which score a weight is
function weightsOf(weight: Form) {
  const [term] = weight.terms
  const [factor, ...more] = term?.factors ?? []
  if (!factor || more.length > 0 || factor.atom.kind !== 'call') return undefined
  const { fn, args } = factor.atom
  const [score] = args as [Form]
  const { power } = factor
  if (fn === 'relu' && Number.isInteger(power) && power >= 1 && power <= 8)
    return { weights: 'relu', power, score } as const
  if (power !== 1) return undefined
  if (fn === 'exp') return { weights: 'softmax', power, score } as const
  return fn === 'sigmoid' || fn === 'softplus'
    ? ({ weights: fn, power, score } as const)
    : undefined
}

// An operand of attention: what is computed from the tensor that has its axes, or only that tensor
interface Operand {
  main: Access
  form: Form
}

// sum(e) Q K with a factor: the two operands of a score and its scale
interface Dot {
  q: Operand
  k: Operand
  e: string
  scale: Form
}

const isNumber = (form: Pick<Form, 'free'>, variables: readonly string[]) =>
  !has(form, variables) && ![...form.free].some((one) => one.endsWith('[]'))

function accessesIn({ terms }: Form): Access[] {
  const inside = (atom: Atom): Access[] => {
    if (atom.kind === 'access') return [atom]
    if (atom.kind === 'call') return atom.args.flatMap(accessesIn)
    if (atom.kind === 'sum') return accessesIn(atom.form)
    return atom.kind === 'if' ? [atom.yes, atom.no].flatMap(accessesIn) : []
  }
  return terms.flatMap(({ factors }) => factors.flatMap(({ atom }) => inside(atom)))
}

// The tensor that has these axes, each as a variable of its own
function operandOf(form: Form, axes: readonly string[]): Operand | undefined {
  const main = accessesIn(form).find((one) => {
    const names = one.indices.map(({ key }) => key)
    return new Set(names).size === names.length && axes.every((axis) => names.includes(axis))
  })
  return main && { main, form }
}

function dotOf(term: Term, key: string, variables: readonly string[]): Dot | undefined {
  const sums = term.factors.filter((one) => isSum(one) && has(one.atom, [key]))
  const { over, body, where } = (sums[0]?.atom ?? {}) as Reduce
  if (sums.length !== 1 || over.length !== 1 || where.length > 0 || body.terms.length !== 1)
    return undefined
  const [e] = over as [string]
  const rest = term.factors.filter((one) => !sums.includes(one))
  const [product] = body.terms as [Term]
  const split = (factors: readonly Factor[]) =>
    [false, true].map((wanted) => factors.filter(({ atom }) => has(atom, [key]) === wanted))
  const [ofQ, ofK] = split(product.factors) as [Factor[], Factor[]]
  const [before, withKey] = split(rest) as [Factor[], Factor[]]
  const scales = before.filter(({ atom }) => isNumber(atom, variables))
  const q = single([...ofQ, ...before.filter((one) => !scales.includes(one))])
  const k = single([...ofK, ...withKey])
  const rows = variables.filter((v) => q.free.has(v) && !single(ofK).free.has(v))
  const operands = {
    q: rows.map((row) => operandOf(q, [row, e])).find((one) => one !== undefined),
    k: operandOf(k, [key, e]),
  }
  if (!operands.q || !operands.k || rows.some((row) => k.free.has(row))) return undefined
  const scale = formOf([termOf(term.coefficient * product.coefficient, scales)])
  return { q: operands.q, k: operands.k, e, scale }
}

// Whether a form reduces over a rank
function sweeps({ terms }: Form, rank: string): boolean {
  const inside = (atom: Atom): boolean => {
    if (atom.kind === 'reduce')
      return atom.over.some((v) => rankIn(v) === rank) || sweeps(atom.body, rank)
    if (atom.kind === 'call') return atom.args.some((arg) => sweeps(arg, rank))
    if (atom.kind === 'sum') return sweeps(atom.form, rank)
    return atom.kind === 'if' && (sweeps(atom.yes, rank) || sweeps(atom.no, rank))
  }
  return terms.some(({ factors }) => factors.some(({ atom }) => inside(atom)))
}

// Whether every index is a variable of its own: those that must be there, and some that may
function hasAxes(
  { indices }: Access,
  axes: readonly string[],
  more: readonly string[] = [],
): boolean {
  const names = indices.map(({ key }) => key)
  return (
    new Set(names).size === names.length &&
    axes.every((axis) => names.includes(axis)) &&
    names.every((each) => axes.includes(each) || more.includes(each))
  )
}

// A number per head: a tensor over heads or a scalar
type PerHead = Form

// Where a row ends and how far back it begins, as offsets from its own index; the rest of the mask
interface Interval {
  off: Form | undefined
  back: Form | undefined
  rest: Condition[]
}

function intervalOf(
  where: readonly Condition[],
  key: string,
  row: string,
  variables: readonly string[],
): Interval {
  const interval: Interval = { off: undefined, back: undefined, rest: [] }
  for (const one of where) {
    const form = one.kind === '<=' ? one.form : undefined
    const sign = (text: string) => form?.terms.find((term) => term.key === text)?.coefficient
    const rest = form && formOf(form.terms.filter((term) => term.key !== key && term.key !== row))
    const up = sign(key) === 1 && sign(row) === -1
    const down = sign(key) === -1 && sign(row) === 1
    const slot = up ? 'off' : 'back'
    if (!rest || (!up && !down) || !isNumber(rest, [key, ...variables]) || interval[slot])
      interval.rest.push(one)
    else interval[slot] = up ? times(number(-1), rest) : rest
  }
  // A window looks back from a causal row alone
  if (interval.back && !interval.off) return { off: undefined, back: undefined, rest: [...where] }
  return interval
}

// post * sum(m) weight * value, or that divided by the sum of the weights
interface Weighted {
  slots: Record<string, string>
  post: Form
  /** Axes [b, s, h, d] of the result. */
  axes: readonly string[]
  layouts: Layouts
  run(call: Call): { out: F32; lse: F32; known: Known }
}
type Known = Record<string, number>

// Axes [b, s, h, d] of a tensor as places in its text, and what stands for those that the text leaves out
type Layouts = Map<string, (indices: readonly string[]) => readonly string[]>

function attentionOf(normal: Normal, ir: CascadeIR): Lowered {
  const outputs = ir.outputs.map((tensor) => ({ tensor, ...normal.forms.get(tensor)! }))
  const [first] = ir.outputs as [string]
  const out = outputs.find(
    ({ form: { terms } }) =>
      terms.length > 0 && terms.length < 3 && terms.every(({ factors }) => factors.some(isSum)),
  )
  if (!out) throw new Mismatch(first, 'it is no weighted sum', 0)
  const others = outputs.filter((one) => one !== out)
  const parts = out.form.terms.map((term) => weightedSum(ir, out, term, others))
  const [part] = parts as [Weighted]
  const spread = parts.some(({ axes }) => axes.join() !== part.axes.join())
  if (spread) throw new Mismatch(out.tensor, 'its parts have no common axes', 2)
  const layouts: Layouts = new Map(parts.flatMap((one) => [...one.layouts]))
  const raw = parts.map((_, i) => access(`O${i}_`, part.axes.map(name)))
  const sum = plus(...parts.map(({ post }, i) => times(raw[i]!, post)))
  const post = sum.key === raw[0]!.key ? undefined : sideOf(ir, layouts, sum, part.axes)
  const slots = Object.assign(
    {},
    ...parts.map((one, i) =>
      Object.fromEntries(
        Object.entries(one.slots).map(([slot, text]) => [i ? slot + i : slot, text]),
      ),
    ),
  ) as Record<string, string>
  if (post) slots.result = sum.key
  const lse = others[0]?.tensor
  return {
    operator: 'attention',
    slots,
    run: (call) =>
      scope(() => {
        const results = parts.map((one) => one.run(call))
        const [{ out: whole, known, lse: logarithms }] = results as [(typeof results)[number]]
        const raws = Object.fromEntries(results.map((one, i) => [`O${i}_`, one.out]))
        const result = post
          ? cast(post.run({ ...call.tensors, ...raws }, known), whole.dtype)
          : whole
        return { [out.tensor]: result, ...(lse === undefined ? {} : { [lse]: logarithms }) }
      }),
  }
}

const cast = (x: Tensor, dtype: FloatDType): F32 =>
  (x.dtype === dtype ? x : (x as F32).cast(dtype)) as F32

function sideOf(
  ir: CascadeIR,
  layouts: Layouts,
  form: Form,
  left: readonly string[],
  names: ReadonlyMap<string, string> = new Map(),
  where?: readonly Condition[],
): Side {
  const layout: Layout = (tensor, indices) => layouts.get(tensor)?.(indices) ?? indices
  return new Side(ir.variables, layout, names, form, left, where)
}

// Tensors of [b, s, h, d], whatever axes the text writes; what it leaves out is b_ or h_, or the only head of all
function layoutsOf(
  operands: readonly (readonly [Operand, readonly string[]])[],
  heads: readonly string[],
  tokens: readonly string[],
): Layouts {
  const [batch, head] = heads.length > 1 ? heads : [undefined, heads[0]]
  const absent = [batch === undefined ? 'b_' : '0', '', head === undefined ? 'h_' : '0', '']
  return new Map(
    operands.map(([{ main }, axes]) => {
      const token = axes.find((x) => tokens.includes(x))
      const places = [batch, token, head, axes.at(-1)].map((axis) =>
        main.indices.findIndex(({ key }) => key === axis),
      )
      return [main.name, (given) => places.map((at, i) => (at < 0 ? absent[i]! : given[at]!))]
    }),
  )
}

function weightedSum(
  ir: CascadeIR,
  out: { tensor: string; left: readonly string[] },
  { factors, coefficient }: Term,
  others: readonly { tensor: string; form: Form }[],
): Weighted {
  let fit = 0
  let einsum = out.tensor
  const fail = (reason: string, code: 'CAS020' | 'CAS022' = 'CAS020') =>
    new Mismatch(einsum, reason, fit, code)
  const sums = factors.filter(isSum)
  const numerator = sums[0]!.atom as Reduce
  if (sums.length > 1 || numerator.over.length !== 1 || numerator.body.terms.length !== 1)
    throw fail('it is no sum of weights times values over one variable')
  const [m] = numerator.over as [string]
  const inner = numerator.body.terms[0]!.factors

  const divisors = factors.filter(({ power }) => power === -1)
  const summed = (atom: Atom) =>
    atom.kind === 'reduce' &&
    atom.op === 'sum' &&
    atom.where.map(({ key }) => key).join() === numerator.where.map(({ key }) => key).join()
      ? [atom.body]
      : []
  // The weight is what the divisor sums up, or a function of a score; the rest is the value, which has a variable of its own
  const candidates = [
    ...divisors.flatMap(({ atom }) =>
      atom.kind === 'sum'
        ? atom.form.terms.flatMap(({ factors }) => factors.flatMap((one) => summed(one.atom)))
        : summed(atom),
    ),
    ...inner.map((one) => single([one])),
  ]
  const columnsOf = (value: Form, weight: Form) =>
    out.left.filter((x) => value.free.has(x) && !weight.free.has(x))
  const found = candidates.flatMap((weight) => {
    const value = times(single(inner), power(weight, -1))
    const [column, ...more] = columnsOf(value, weight)
    const v = column === undefined || more.length > 0 ? undefined : operandOf(value, [m, column])
    const own = weightsOf(weight)
    const apart = out.left.every((x) => x === column || !value.free.has(x) || v?.main.free.has(x))
    return v && own && apart && has(own.score, [m]) ? [{ ...own, weight, v, column: column! }] : []
  })
  if (found.length === 0) {
    const isValue = ({ atom }: Factor) =>
      atom.kind === 'access' &&
      columnsOf(atomForm(atom), single(inner.filter((x) => x.atom !== atom))).length > 0
    const rest = single(inner.filter((one) => !isValue(one)))
    if (!inner.some(isValue)) throw fail('it has no value that is summed')
    fit++
    throw fail(`its weights are ${rest.key}, no function of a score that attention has`)
  }
  const [{ weights, power: exponent, score, weight, v, column }] = found as [(typeof found)[number]]
  fit += 2

  // exp(shift) sum(…) in both, and a sink beside the sum below
  const outside = formOf([
    termOf(
      coefficient,
      factors.filter((one) => one !== sums[0] && !divisors.includes(one)),
    ),
  ])
  const isNormaliser = (atom: Atom) => summed(atom)[0]?.key === weight.key
  const apart = divisors.filter(
    ({ atom }) => atom.kind !== 'sum' && !isNormaliser(atom) && !sweeps(atomForm(atom), rankIn(m)),
  )
  const [divisor, ...second] = divisors.filter((one) => !apart.includes(one))
  if (second.length > 0) throw fail('it is divided twice')
  if (!divisor && weights === 'softmax') throw fail('its weights are not divided by their sum')
  let post = times(outside, single(apart))
  let total = divisor && atomForm(divisor.atom)
  let shift = number(0)
  let sink: PerHead | undefined
  if (divisor?.atom.kind === 'sum' && weights === 'softmax') {
    total = divisor.atom.form
    const [own, other, ...more] = [...total.terms].sort(
      (a, b) => Number(b.factors.some(isSum)) - Number(a.factors.some(isSum)),
    )
    const sum = own!.factors.find(isSum)
    const before = formOf([
      termOf(
        own!.coefficient,
        own!.factors.filter((one) => one !== sum),
      ),
    ])
    if (!sum || !isNormaliser(sum.atom) || more.length > 0)
      throw fail('its divisor is no sum of its weights and one more')
    post = times(post, power(before, -1))
    shift = logarithm(before)
    sink = logarithm(formOf([other!]))
  } else if (divisor && !isNormaliser(divisor.atom))
    throw fail('its divisor is not the sum of its weights')
  if (sweeps(post, rankIn(m))) throw fail(`it is multiplied by ${post.key}, which takes all keys`)
  fit++

  // scale q.k, the sum of several, or cap tanh(scale q.k / cap); then what is added to it
  let dots: Dot[] = []
  let cap: Form | undefined
  const terms: Term[] = []
  for (const term of score.terms) {
    const bent = term.factors.find(({ atom }) => atom.kind === 'call' && atom.fn === 'tanh')
    const own = dotOf(term, m, ir.variables)
    if (own && !cap) dots.push(own)
    else if (bent?.power === 1 && bent.atom.kind === 'call' && dots.length === 0) {
      const inside = bent.atom.args[0]!.terms
      cap = formOf([
        termOf(
          term.coefficient,
          term.factors.filter((one) => one !== bent),
        ),
      ])
      dots = inside.flatMap((one) => dotOf(one, m, ir.variables) ?? [])
      if (!isNumber(cap, [m, ...ir.variables]) || dots.length < inside.length)
        throw fail(`its score has ${bent.atom.key}, which is no soft cap`)
    } else terms.push(term)
  }
  const [dot] = dots
  if (!dot) throw fail(`its score ${score.key} has no product of a query and a key`)
  fit++
  const { q, k } = dot
  let rows = out.left.filter((x) => has(q.form, [x]) && !has(k.form, [x]) && !has(v.form, [x]))
  // Heads that share keys and values look like rows, but for the mask, and are as good as rows where nothing names them
  const masked = rows.filter((x) => numerator.where.some((one) => has(one, [x])))
  if (masked.length > 0) rows = masked
  const rest = [...terms.map((term) => formOf([term])), post, shift, ...(sink ? [sink] : [])]
  if (rows.length > 1 && !rest.some((form) => has(form, rows))) {
    const order = q.main.indices.map(({ key }) => key)
    rows = [rows.reduce((x, y) => (order.indexOf(y) > order.indexOf(x) ? y : x))]
  }
  if (rows.length !== 1)
    throw fail('its queries have no variable for rows that a mask, keys or values tell from heads')
  const [row] = rows as [string]
  const heads = out.left.filter((x) => x !== row && x !== column)
  // Groups of queries with a head of keys each: an axis of the text, and part of the heads for attention
  const [group = '', own = ''] = [heads.at(-1), heads.at(-2)]
  const grouped =
    heads.length > 1 &&
    [...dots.map(({ k }) => k), v].every(({ form }) => has(form, [own]) && !has(form, [group]))
  if (heads.length > (grouped ? 3 : 2)) throw fail('its result has more axes than [b, s, h, d]')
  const operands = [
    ...dots.flatMap(({ q, k, e }) => [[q, [...heads, row, e]] as const, [k, [m, e]] as const]),
    [v, [m, column]] as const,
  ]
  for (const [{ main, form }, axes] of operands)
    if (!hasAxes(main, axes, heads) || (has(form, [row]) && !axes.includes(row)))
      throw fail(`${form.key} is not read along its axes`, 'CAS022')

  const [batch, head] = heads.length > 1 ? heads : [undefined, heads[0]]
  const layouts = layoutsOf(operands, heads, [row, m])
  const axes = [batch ?? 'b_', row, head ?? 'h_', column]
  const names = new Map([[m, 'm_'], ...dots.map(({ e }) => [e, 'e_'] as const)])
  const side = (form: Form, left: readonly string[], where?: readonly Condition[]) =>
    sideOf(ir, layouts, form, left, names, where)
  // What an operand is computed from, undefined where it is a tensor as it stands
  const sideFor = ({ main, form }: Operand, at: string, last: string) =>
    form.key === main.key ? undefined : side(form, [axes[0]!, at, axes[2]!, last])

  const isPerHead = (form: Form) =>
    [m, ...ir.variables].every((x) => heads.includes(x) || !has(form, [x]))
  let bias = number(0)
  let added = number(0)
  let slope: Form | undefined
  for (const term of terms) {
    const own = formOf([term])
    const position = term.factors.some(({ atom, power }) => atom.key === m && power === 1)
    const rest = formOf([
      termOf(
        term.coefficient,
        term.factors.filter(({ atom }) => atom.key !== m),
      ),
    ])
    if (position && !slope && isPerHead(rest) && heads.length < 2) slope = rest
    else if (has(own, [m])) bias = plus(bias, own)
    else added = plus(added, own)
  }
  if (sink && (!isPerHead(sink) || (heads.length > 1 && !isNumber(sink, ir.variables))))
    throw fail(`its sink is ${sink.key}, no number for each head`, 'CAS022')
  if (!isNumber(dot.scale, ir.variables))
    throw fail(`its scale is ${dot.scale.key}, no number`, 'CAS022')
  const scale = cap ? times(dot.scale, cap) : dot.scale
  // Further products have the scale of the first
  const parts = dots.map((one, i) => {
    const ratio = i === 0 ? number(1) : times(one.scale, power(dot.scale, -1))
    const ofQ = { main: one.q.main, form: times(ratio, one.q.form) }
    return { ...one, ofQ: sideFor(ofQ, row, 'e_'), ofK: sideFor(one.k, 'm_', 'e_') }
  })
  const ofV = sideFor(v, 'm_', column)
  const { off, back, rest: hidden } = intervalOf(numerator.where, m, row, ir.variables)

  // What must be the distance of the last row from the last key
  const distances = off ? [off] : []
  // A part of the score that is the same for all keys: slopes have theirs, the rest is a bias
  const rowPart = (form: Form) => {
    if (form.terms.length === 0 && !slope) return
    const rest = slope && times(plus(form, times(slope, name(row))), power(slope, -1))
    if (rest && isNumber(rest, [m, ...ir.variables])) {
      distances.push(times(number(-1), rest))
      return
    }
    bias = plus(bias, form, slope ? times(slope, name(m)) : number(0))
    slope = undefined
  }
  if (sink) rowPart(shift)
  if (weights !== 'softmax') {
    const own = added.terms.filter((term) => !slope || !has(formOf([term]), slope.free))
    bias = plus(bias, formOf(own))
    rowPart(formOf(added.terms.filter((term) => !own.includes(term))))
  }
  for (const other of others) {
    einsum = other.tensor
    if (!total || others.length > 1 || other.form.terms.length === 0)
      throw fail('attention gives a result and the logarithm of its divisor')
    const difference = minus(other.form, logarithm(total))
    const cancels = !sink && weights === 'softmax'
    if (cancels ? sweeps(difference, rankIn(m)) : difference.key !== '0')
      throw fail('it is not the logarithm of the divisor')
    if (cancels) rowPart(difference)
  }
  einsum = out.tensor

  const slots: Record<string, string> = { q: shown(q), k: shown(k), v: shown(v) }
  for (const { q, k } of dots.slice(1)) Object.assign(slots, { q2: shown(q), k2: shown(k) })
  slots.scale = scale.key
  const note = (slot: string, form: Form | undefined) => {
    if (form) slots[slot] = form.key
  }
  if (weights !== 'softmax')
    Object.assign(slots, { weights, normalise: String(divisor !== undefined) })
  if (exponent !== 1) slots.power = String(exponent)
  note('bias', bias.terms.length > 0 ? bias : undefined)
  note('softCap', cap)
  note('slopes', slope)
  note('sink', sink)
  note('causal', off && plus(name(row), off))
  note('window', back && plus(name(row), back))
  if (hidden.length > 0) slots.mask = hidden.map(({ key }) => key).join(', ')

  const biasAxes = [axes[0]!, axes[2]!, row, 'm_']
  const biasPlaces = biasPlacesOf(bias, [batch, head, row, m])
  const computed =
    hidden.length > 0 || (biasPlaces === undefined && !isNumber(bias, [m, ...ir.variables]))
      ? new Side(ir.variables, layoutOf(layouts), names, bias, biasAxes, hidden, false)
      : undefined
  const perHead = (form: Form | undefined) =>
    form && !isNumber(form, ir.variables) && tensorIn(form) === undefined
      ? side(form, [head!])
      : undefined
  const [ofSlope, ofSink] = [perHead(slope), perHead(sink)]
  const sides = [computed, ofSlope, ofSink, ofV, ...parts.flatMap(({ ofQ, ofK }) => [ofQ, ofK])]
  const alone = post.key === '1' && sides.every((one) => one === undefined)
  if (heads.length > 2 && !alone)
    throw fail('what is computed beside it has more axes than [b, s, h, d]', 'CAS022')
  return {
    slots,
    post,
    axes,
    layouts,
    run(call) {
      const tensors = { ...call.tensors }
      if (!grouped || !alone)
        for (const [{ main }, own] of operands) oneHead(call, main, heads, own.includes(row))
      const [tq, tk, tv] = [q, k, v].map(({ main }) => batched(call, main.name)) as [F32, F32, F32]
      const [sq, hq, d, sk, dv] = [
        tq.shape[1]!,
        tq.shape[2]!,
        tq.shape[3]!,
        tk.shape[1]!,
        tv.shape[3]!,
      ]
      const ends = sk - sq
      const sizes = { [rankOf(column)]: dv, [rankOf(row)]: sq, [rankIn(m)]: sk, [rankIn(dot.e)]: d }
      const known: Known = { ...sizes, M_: sk, ...call.scalars }
      // A name that the call leaves out stands for what the operator takes
      for (const form of distances) {
        const only = bareName(form)
        if (only !== undefined) known[only] ??= ends
        const got = numberOf(form, known)
        if (got !== ends)
          throw broken(
            'CAS022',
            `attention ends its last row at the last key, ${ends} from its index here, but ${form.key} is ${got}`,
            spanOf(ir, out.tensor),
            out.tensor,
          )
      }
      const vector = (form: Form, own: Side | undefined): F32 | number[] => {
        if (own) return own.run(tensors, known)
        const tensor = tensorIn(form)
        if (tensor !== undefined) return call.tensors[tensor] as F32
        return new Array<number>(hq).fill(numberOf(form, known))
      }
      const plain = bareName(scale)
      const options: AttentionOptions = { causal: off !== undefined }
      if (plain === undefined || known[plain] !== undefined) options.scale = numberOf(scale, known)
      if (weights !== 'softmax')
        Object.assign(options, { weights, power: exponent, normalise: divisor !== undefined })
      if (computed)
        options.bias = computed
          .run(tensors, known, Number.NEGATIVE_INFINITY)
          .reshape(
            biasAxes.map((axis, i) =>
              computed.left.includes(axis) ? [tq.shape[0]!, hq, sq, sk][i]! : 1,
            ),
          )
      else if (biasPlaces) options.bias = placed(call.tensors[tensorIn(bias)!]!, biasPlaces) as F32
      else if (bias.terms.length > 0) options.bias = numberOf(bias, known)
      if (cap) options.softCap = numberOf(cap, known)
      if (slope) options.slopes = vector(slope, ofSlope)
      if (sink) options.sink = vector(sink, ofSink)
      if (back) options.window = ends + 1 - numberOf(back, known)
      const whole = (own: Side | undefined, { main }: Operand) => {
        const given = batched(call, main.name)
        return own ? cast(own.run(tensors, known).reshape(given.shape), tq.dtype) : (given as F32)
      }
      const heads2 = Math.max(...parts.map(({ k }) => batched(call, k.main.name).shape[2]!))
      const qs = parts.map((one) => whole(one.ofQ, one.q))
      const ks = parts.map((one) => whole(one.ofK, one.k))
      const result = attention(joined(qs, hq), joined(ks, heads2), whole(ofV, v), options)
      return { ...result, known }
    },
  }
}

const layoutOf =
  (layouts: Layouts): Layout =>
  (tensor, indices) =>
    layouts.get(tensor)?.(indices) ?? indices

// Side by side along the last axis, heads that are shared repeated
function joined(parts: readonly F32[], heads: number): F32 {
  const [first] = parts as [F32]
  if (parts.length === 1) return first
  const [b, s] = first.shape as [number, number]
  const sizes = parts.map(({ shape }) => shape[3]!)
  const d = sizes.reduce((sum, size) => sum + size, 0)
  const whole = empty([b, s, heads, d], { dtype: first.dtype, device: first.device })
  let at = 0
  parts.forEach((part, i) => {
    const to = whole.slice(-1, at, at + sizes[i]!)
    to.copyFrom(part.expand(to.shape))
    at += sizes[i]!
  })
  return whole
}

// Where the axes of a bias stand among [b, h, s, keys], if it is a tensor with some of them in this order
function biasPlacesOf(bias: Form, axes: readonly (string | undefined)[]): number[] | undefined {
  const atom = tensorIn(bias) === undefined ? undefined : bias.terms[0]!.factors[0]!.atom
  if (atom?.kind !== 'access') return undefined
  const places = atom.indices.map(({ key }) => axes.indexOf(key))
  return places.every((at, i) => at >= 0 && at > (places[i - 1] ?? -1)) ? places : undefined
}

// A tensor with the axes of the text under all four; one that has four is taken as it is
function placed(tensor: Tensor, places: readonly number[]): Tensor {
  if (tensor.rank !== places.length || places.length === 4) return tensor
  const shape = [1, 1, 1, 1]
  places.forEach((at, i) => {
    shape[at] = tensor.shape[i]!
  })
  return tensor.reshape(shape)
}

// What the text reads without a variable of the heads has one
function oneHead(call: Call, main: Access, heads: readonly string[], isQuery: boolean): void {
  const shared = heads.filter((x) => !has(main, [x]))
  const given = batched(call, main.name).shape[2]!
  if (isQuery || shared.length === 0 || given === 1) return
  throw refuse(
    'ERR_SHAPE',
    'cascade',
    main.name,
    `${main.name} must have one head, got ${given} (the text reads it without ${shared.join(' and ')})`,
  )
}

type F32 = Tensor<'float32'>

function lightningOf(normal: Normal, ir: CascadeIR): Lowered {
  const [tensor, ...more] = ir.outputs as [string]
  let fit = 0
  const fail = (reason: string, code: 'CAS020' | 'CAS022' = 'CAS020') =>
    new Mismatch(tensor, reason, fit, code)
  if (more.length > 0) throw fail('lightning gives one result')
  const { form, left } = normal.forms.get(tensor)!
  const sumOf = (term: Term) => term.factors.find(isSum)?.atom as Reduce | undefined
  const main = form.terms.find((term) => sumOf(term)?.over.length === 2)
  if (!main || form.terms.length > 2) throw fail('it is no sum over keys and channels')
  const { over, body, where } = sumOf(main)!
  const [product, ...others] = body.terms
  if (others.length > 0) throw fail('it does not multiply q, k and v')
  const [limit] = where
  const [m, row] = (limit && 'form' in limit ? limit.form.terms : []).map(({ key }) => key)
  if (where.length !== 1 || m === undefined || row === undefined || !over.includes(m))
    throw fail('its rows do not end at their own index')
  if (limit!.key !== `${m} + -1 ${row} <= 0`) throw fail(`where ${limit!.key} is not causal`)
  const e = over.find((x) => x !== m)!

  // Factors by the operand that has their variables; what keys alone have is their decay
  const parts = { q: number(1), k: number(1), v: number(1), decay: number(1) }
  const sort = (one: Form) => {
    const tensors = [...one.free].some((x) => x.endsWith('[]') && one.free.has(m))
    const part = has(one, [e]) ? (has(one, [m]) ? 'k' : 'q') : tensors ? 'v' : 'decay'
    parts[part] = times(parts[part], one)
  }
  for (const { atom, power: exponent } of product!.factors) {
    const inner = argument(atom)
    // slope m, of a slope for each head, is no value
    const isDecay = (term: Term) => term.factors.some(({ atom }) => atom.key === m)
    if (!inner) sort(power(atomForm(atom), exponent))
    else
      for (const term of inner.terms) {
        const own = exponential(formOf([term]))
        if (isDecay(term)) parts.decay = times(parts.decay, own)
        else sort(own)
      }
  }
  const columns = left.filter((x) => has(parts.v, [x]) && !has(parts.q, [x]) && !has(parts.k, [x]))
  const heads = left.filter((x) => x !== row && !columns.includes(x))
  const [column = ''] = columns
  const q = operandOf(parts.q, [row, e])
  const k = operandOf(parts.k, [m, e])
  const v = operandOf(parts.v, [m, column])
  if (!q || !k || !v || columns.length !== 1) throw fail('it does not multiply q, k and v')
  const axes =
    hasAxes(q.main, [...heads, row, e]) &&
    hasAxes(k.main, [m, e], heads) &&
    hasAxes(v.main, [m, column], heads)
  if (heads.length > 2 || !axes || has(k.form, [row]) || has(v.form, [row]))
    throw fail('q, k and v are not read along their axes')
  fit += 2

  // The sum of the weights, which a column of ones in v gives
  const divisors = main.factors.filter(({ atom, power }) => atom.kind === 'reduce' && power === -1)
  const weight = times(body, power(v.form, -1))
  for (const { atom } of divisors) {
    const { body: own, where: limits } = atom as Reduce
    const same = own.key === weight.key && limits.map(({ key }) => key).join() === limit!.key
    if (!same || divisors.length > 1) throw fail('its divisor is not the sum of its weights')
  }
  const [divisor] = divisors

  // exp(-slope t) in front, unless it is divided by, exp(slope m) inside
  const [factor] = parts.decay.terms[0]!.factors
  const inside = parts.decay.key === '1' ? number(0) : factor && argument(factor.atom)
  const slope = inside && times(inside, power(name(m), -1))
  const decay = slope && exponential(times(times(number(-1), slope), name(row)))
  const outside = formOf([
    termOf(
      main.coefficient * product!.coefficient,
      main.factors.filter((one) => !isSum(one) && one !== divisor),
    ),
  ])
  const factors = decay && (divisor ? outside : times(outside, power(decay, -1)))
  const [only, ...rests] = factors?.terms ?? []
  if (!slope || !only || rests.length > 0 || has(slope, [m, ...over]))
    throw fail('its weights are no decay by distance')
  const scales = only.factors.filter(({ atom }) => isNumber(atom, ir.variables))
  const scale = formOf([termOf(only.coefficient, scales)])
  const post = single(only.factors.filter((one) => !scales.includes(one)))
  fit++
  if (left.some((x) => has(slope, [x]) && !heads.includes(x)))
    throw fail(`its decay is ${slope.key}, no number for each head`, 'CAS022')

  // What the state before the first token adds
  let initial: Access | undefined
  const rest = form.terms.find((term) => term !== main)
  if (rest) {
    const start = sumOf(rest)?.body.terms[0]?.factors.map(({ atom }) => atom)
    initial = start?.find((one): one is Access => one.kind === 'access' && one.name !== q.main.name)
    const first = formOf([
      termOf(
        rest.coefficient,
        rest.factors.filter((one) => !isSum(one)),
      ),
    ])
    const wanted = times(times(outside, decay!), exponential(times(number(-1), slope)))
    const before = times(wanted, power(decay!, -1))
    if (
      !initial ||
      divisor ||
      q.form.key !== q.main.key ||
      start!.length !== 2 ||
      first.key !== before.key ||
      !start!.some(({ key }) => key.startsWith(`${q.main.name}[`))
    )
      throw fail(`it adds ${formOf([rest]).key}`)
  }

  const operands = [
    [q, [...heads, row, e]],
    [k, [m, e]],
    [v, [m, column]],
  ] as const
  const layouts = layoutsOf(operands, heads, [row, m])
  const names = new Map([
    [m, 'm_'],
    [e, 'e_'],
  ])
  const [batch = 'b_', head = 'h_'] = heads.length > 1 ? heads : [undefined, heads[0]]
  const [ofQ, ofK, ofV] = operands.map(([{ main, form }, own]) =>
    form.key === main.key
      ? undefined
      : sideOf(
          ir,
          layouts,
          form,
          [batch, own.includes(row) ? row : 'm_', head, names.get(own.at(-1)!) ?? own.at(-1)!],
          names,
        ),
  )
  const ofSlope =
    isNumber(slope, ir.variables) || tensorIn(slope) !== undefined
      ? undefined
      : sideOf(ir, layouts, slope, [head], names)
  const all = [batch, row, head, column].map(name)
  const whole = times(access('N_', all), post)
  const result = divisor
    ? times(whole, power(access('D_', [...all.slice(0, 3), number(0)]), -1))
    : whole
  const finish =
    result.key === access('N_', all).key
      ? undefined
      : sideOf(ir, layouts, result, [batch, row, head, column])
  const slots: Record<string, string> = {
    q: shown(q),
    k: shown(k),
    v: shown(v),
    scale: scale.key,
    slopes: slope.key,
  }
  if (initial) slots.initialState = initial.name
  if (divisor) slots.normalise = 'true'
  if (post.key !== '1') slots.result = post.key
  return {
    operator: 'lightning',
    slots,
    run: (call) =>
      scope(() => {
        const [first] = [batched(call, q.main.name)] as [F32]
        const known = call.scalars
        const sizes = {
          M_: first.shape[1]!,
          [rankOf(row)]: first.shape[1]!,
          [rankIn(e)]: first.shape[3]!,
        }
        const all = { ...sizes, ...known }
        const [tq, tk, tv] = [ofQ, ofK, ofV].map((side, i) => {
          const given = batched(call, operands[i]![0].main.name) as F32
          return side ? cast(side.run(call.tensors, all).reshape(given.shape), first.dtype) : given
        }) as [F32, F32, F32]
        const own = tensorIn(slope)
        const { out } = lightning(tq, tk, divisor ? withOnes(tv) : tv, {
          slopes: ofSlope
            ? ofSlope.run(call.tensors, all)
            : own !== undefined
              ? (call.tensors[own] as F32)
              : new Array<number>(tq.shape[2]!).fill(numberOf(slope, all)),
          scale: numberOf(scale, all),
          initialState: initial && (call.tensors[initial.name] as F32),
        })
        if (!finish) return { [tensor]: out }
        const dv = tv.shape[3]!
        const raw = { N_: out.slice(-1, 0, dv), D_: out.slice(-1, dv) }
        return { [tensor]: cast(finish.run({ ...call.tensors, ...raw }, all), out.dtype) }
      }),
  }
}

const shown = ({ main, form }: Operand) => (form.key === main.key ? main.name : form.key)

// v with one more column, of ones
function withOnes(v: F32): F32 {
  const [b, s, h, d] = v.shape as [number, number, number, number]
  const whole = full([b, s, h, d + 1], 1, { dtype: v.dtype, device: v.device })
  whole.slice(-1, 0, d).copyFrom(v)
  return whole
}

// Operators without slots take exactly their own text, whatever its names
interface Fixed {
  operator: string
  text: string
  run(inputs: readonly F32[], numbers: readonly number[]): readonly Tensor[]
}

const fixed: readonly Fixed[] = [
  {
    operator: 'merge',
    text: definitions.merge,
    run: ([lseA, lseB, outA, outB]) => {
      const { out, lse } = merge([
        { out: outA!, lse: lseA! },
        { out: outB!, lse: lseB! },
      ])
      return [out, lse]
    },
  },
  {
    operator: 'linear',
    text: definitions.linear,
    run: ([x, weight, bias]) => [linear(x!, weight!, { bias })],
  },
  {
    operator: 'linear',
    text: 'Y[n,o] = sum(i) X[n,i] * W[o,i]',
    run: ([x, weight]) => [linear(x!, weight!)],
  },
  {
    operator: 'norm',
    text: definitions.norm,
    run: ([x, weight], [eps]) => [norm(x!, weight, { eps })],
  },
  { operator: 'glu', text: definitions.glu, run: ([gate, up]) => [glu(gate!, up!)] },
  { operator: 'silu', text: definitions.silu, run: ([x]) => [silu(x!)] },
  { operator: 'sigmoid', text: definitions.sigmoid, run: ([x]) => [sigmoid(x!)] },
]

// The outputs by their forms, with names in the order of the text
function signature(ir: CascadeIR): string {
  const names = new Map<string, string>()
  ir.variables.forEach((v, i) => {
    names.set(v, `v${i}`)
    names.set(rankOf(v), `V${i}`)
  })
  const tensors = new Map(ir.inputs.map((tensor, i) => [tensor, `T${i}`]))
  ir.scalars.forEach((scalar, i) => {
    names.set(scalar, `s${i}`)
  })
  const text = print(ir).replace(/[A-Za-z_]\w*(\[?)/g, (whole, bracket: string) => {
    const word = bracket ? whole.slice(0, -1) : whole
    return `${(bracket ? tensors : names).get(word) ?? word}${bracket}`
  })
  const other = validate(parse(text))
  const { forms } = new Normal(other)
  return other.outputs.map((tensor) => `${forms.get(tensor)!.form.key}`).join('\n')
}

let signatures: Map<string, Fixed> | undefined

function fixedOf(_: Normal, ir: CascadeIR): Lowered {
  signatures ??= new Map(fixed.map((one) => [signature(validate(parse(one.text))), one]))
  const found = signatures.get(signature(ir))
  if (!found) throw new Mismatch(ir.outputs[0]!, 'it is no text of an operator without slots', -1)
  return {
    operator: found.operator,
    slots: {},
    run({ tensors, scalars }) {
      const results = found.run(
        ir.inputs.map((tensor) => tensors[tensor] as F32),
        ir.scalars.map((scalar) => numberOf(name(scalar), scalars)),
      )
      return Object.fromEntries(ir.outputs.map((tensor, i) => [tensor, results[i]!]))
    },
  }
}

const families = { attention: attentionOf, lightning: lightningOf, fixed: fixedOf }

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

/** @internal */
export function compile(ir: CascadeIR, fused: 'required' | 'preferred'): Plan {
  const key = `${fused} ${print(ir)}`
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
  const normal = normalOf(ir)
  const made = new Set(statementsOf(ir.steps).map(({ out }) => `${out.name}[]`))
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
      throw broken(
        'CAS020',
        `no kernel takes this cascade; ${tensor} ${why}`,
        spanOf(ir, tensor),
        tensor,
      )
  }
  for (const [operator, lower] of Object.entries(families)) {
    try {
      return lower(normal, ir)
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
  throw refusal(ir, refused)
}

function normalOf(ir: CascadeIR): Normal {
  try {
    return new Normal(ir)
  } catch (error) {
    if (!(error instanceof TooLarge)) throw error
    const [tensor] = ir.outputs as [string]
    const text = 'no kernel takes this cascade; it computes far more than one operator does'
    throw broken('CAS020', text, spanOf(ir, tensor), tensor)
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
  const [rewrite] = suggestions
  const remedy = rewrite ? `; ${rewrite.rule} makes it ${rewrite.effect}` : ''
  return broken(
    'CAS021',
    `${rank} takes ${headline} passes that no kernel fuses (${chain}); ${nearest}${remedy}`,
    span,
    rank,
  )
}

function planOf(ir: CascadeIR, lowered: Lowered, refused: readonly Refused[]): Plan {
  const scalarNames: ReadonlySet<string> = new Set([...ir.scalars, ...(lowered.ranks ?? [])])
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
    const scalars = (inputs[count] ?? {}) as Scalars
    checkOptions('cascade', scalars, scalarNames)
    for (const [scalar, value] of Object.entries(scalars))
      if (typeof value !== 'number') throw mustBe('cascade', scalar, 'a number', value)
    return lowered.run({ tensors, scalars })
  }
  return Object.freeze(
    Object.assign(plan, {
      explain: (options: AnalyzeOptions = {}): PlanExplanation => ({
        operator: lowered.operator,
        slots: lowered.slots,
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

function spanOf(ir: CascadeIR, tensor: string) {
  return statementsOf(ir.steps).find(({ out }: Statement) => out.name === tensor)!.out.span
}

function batched({ tensors }: Call, argument: string): Tensor {
  const tensor = tensors[argument]!
  if (tensor.rank === 4) return tensor
  throw refuse(
    'ERR_SHAPE',
    'cascade',
    argument,
    `${argument} must be [b, s, h, d], got [${tensor.shape.join(', ')}]`,
  )
}

function bareName({ terms }: Form): string | undefined {
  const [term] = terms
  const [factor] = term?.factors ?? []
  return terms.length === 1 &&
    term!.factors.length === 1 &&
    term!.coefficient === 1 &&
    factor!.power === 1 &&
    factor!.atom.kind === 'name'
    ? factor!.atom.name
    : undefined
}

function tensorIn(form: Form): string | undefined {
  const atom = form.terms[0]?.factors[0]?.atom
  return form.terms.length === 1 && atom?.kind === 'access' && form.key === atom.key
    ? atom.name
    : undefined
}

// A form of numbers alone
function numberOf(form: Form, known: Readonly<Record<string, number>>): number {
  const value = ({ factors, coefficient }: Term): number =>
    factors.reduce(
      (product, { atom, power }) => product * atomValue(atom, known) ** power,
      coefficient,
    )
  return form.terms.reduce((sum, term) => sum + value(term), 0)
}

function atomValue(atom: Atom, known: Readonly<Record<string, number>>): number {
  if (atom.kind === 'name') {
    const value = known[atom.name]
    if (value === undefined)
      throw refuse('ERR_ARGUMENT', 'cascade', atom.name, `${atom.name} is missing`)
    return value
  }
  if (atom.kind === 'sum') return numberOf(atom.form, known)
  if (atom.kind === 'call') {
    const args = atom.args.map((arg) => numberOf(arg, known))
    const of = {
      exp: Math.exp,
      log: Math.log,
      log1p: Math.log1p,
      tanh: Math.tanh,
      abs: Math.abs,
      max: Math.max,
      min: Math.min,
      pow: Math.pow,
    } as const
    const fn = of[atom.fn as keyof typeof of] as ((...x: number[]) => number) | undefined
    if (fn) return fn(...args)
  }
  throw refuse('ERR_UNSUPPORTED', 'cascade', undefined, `${atom.key} is no number`)
}
