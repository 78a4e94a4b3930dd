import { checkOptions, mustBe } from '../check.js'
import { HeddleError, refuse } from '../errors.js'
import { type AttentionOptions, attention } from '../ops/attention.js'
import { sigmoid, silu } from '../ops/elementwise.js'
import { glu } from '../ops/glu.js'
import { lightning } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { merge } from '../ops/merge.js'
import { norm } from '../ops/norm.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { type Analysis, type AnalyzeOptions, analyze } from './analyze.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, type Statement, statementsOf } from './ir.js'
import { definitions } from './library.js'
import {
  type Atom,
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

// sum(e) Q K with a factor: what of a score the two operands and what the scale is
interface Dot {
  q: Access
  k: Access
  e: string
  scale: Form
}

function dotOf(term: Term, key: string, variables: readonly string[]): Dot | undefined {
  const sums = term.factors.filter(isSum)
  const rest = formOf([
    termOf(
      term.coefficient,
      term.factors.filter((one) => !sums.includes(one)),
    ),
  ])
  if (sums.length !== 1 || has(rest, [key, ...variables])) return undefined
  const { over, body, where } = sums[0]!.atom as Reduce
  const [product] = body.terms
  const operands = product?.factors.map(({ atom }) => atom) ?? []
  if (over.length !== 1 || where.length > 0 || body.terms.length !== 1 || operands.length !== 2)
    return undefined
  if (product!.coefficient !== 1 || product!.factors.some((one) => one.power !== 1))
    return undefined
  const k = operands.find((one): one is Access => one.kind === 'access' && has(one, [key]))
  const q = operands.find((one): one is Access => one.kind === 'access' && !has(one, [key]))
  return q && k ? { q, k, e: over[0]!, scale: rest } : undefined
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

// Where a row ends and how far back it begins, as offsets from its own index
interface Interval {
  off: Form | undefined
  back: Form | undefined
}

function intervalOf(
  where: readonly Condition[],
  key: string,
  row: string,
  variables: readonly string[],
  fail: (reason: string) => Mismatch,
) {
  const interval: Interval = { off: undefined, back: undefined }
  for (const one of where) {
    const form = one.kind === '<=' ? one.form : undefined
    const sign = (text: string) => form?.terms.find((term) => term.key === text)?.coefficient
    const rest = form && formOf(form.terms.filter((term) => term.key !== key && term.key !== row))
    const up = sign(key) === 1 && sign(row) === -1
    const down = sign(key) === -1 && sign(row) === 1
    if (!rest || (!up && !down) || has(rest, [key, ...variables]))
      throw fail(`where ${one.key} is no interval of keys around the row`)
    const slot = up ? 'off' : 'back'
    if (interval[slot]) throw fail('there are two bounds on one side')
    interval[slot] = up ? times(number(-1), rest) : rest
  }
  if (interval.back && !interval.off) throw fail('a window looks back from a causal row alone')
  return interval
}

function attentionOf(normal: Normal, ir: CascadeIR): Lowered {
  const outputs = ir.outputs.map((tensor) => ({ tensor, ...normal.forms.get(tensor)! }))
  let fit = 0
  let einsum = ir.outputs[0]!
  const fail = (reason: string, code: 'CAS020' | 'CAS022' = 'CAS020') =>
    new Mismatch(einsum, reason, fit, code)

  const isRatio = ({ form }: (typeof outputs)[number]) =>
    form.terms.length === 1 && form.terms[0]!.factors.some(isSum)
  const out = outputs.find(isRatio)
  if (!out) throw fail('it is no weighted sum')
  einsum = out.tensor
  const { factors, coefficient } = out.form.terms[0]!
  const sums = factors.filter(isSum)
  const numerator = sums[0]!.atom as Reduce
  if (sums.length > 1 || numerator.over.length !== 1 || numerator.body.terms.length !== 1)
    throw fail('it is no sum of weights times values over one variable')
  const [m] = numerator.over as [string]
  const inner = numerator.body.terms[0]!.factors

  // The value has a variable of the result that the weight lacks
  const values = inner.filter(
    ({ atom, power }) =>
      atom.kind === 'access' &&
      power === 1 &&
      has(atom, [m]) &&
      out.left.some(
        (v) => atom.free.has(v) && inner.every((one) => one.atom === atom || !has(one.atom, [v])),
      ),
  )
  if (values.length !== 1) throw fail('it has no value that is summed')
  const v = values[0]!.atom as Access
  fit++
  const weight = single(inner.filter((one) => one !== values[0]))
  const { weights, power: exponent, score } = weightsOf(weight) ?? {}
  if (!weights || !score)
    throw fail(`its weights are ${weight.key}, no function of a score that attention has`)
  fit++

  // exp(shift) sum(…) in both, and a sink beside the sum below
  const divisors = factors.filter(({ power }) => power === -1)
  const outside = formOf([
    termOf(
      coefficient,
      factors.filter((one) => one !== sums[0] && !divisors.includes(one)),
    ),
  ])
  const isNormaliser = (atom: Atom) =>
    atom.kind === 'reduce' &&
    atom.op === 'sum' &&
    atom.body.key === weight.key &&
    atom.where.map(({ key }) => key).join() === numerator.where.map(({ key }) => key).join()
  const [divisor] = divisors
  if (divisors.length > 1) throw fail('it is divided twice')
  if (!divisor && weights === 'softmax') throw fail('its weights are not divided by their sum')
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
    if (!sum || !isNormaliser(sum.atom) || more.length > 0 || before.key !== outside.key)
      throw fail('its divisor is no sum of its weights and one more')
    shift = logarithm(before)
    sink = logarithm(formOf([other!]))
  } else if ((divisor && !isNormaliser(divisor.atom)) || outside.key !== '1') {
    throw fail('its divisor is not the sum of its weights')
  }
  fit++

  // scale q.k, or cap tanh(scale q.k / cap); slope m; a bias; and where nothing cancels it, what a row adds
  let bias: Form | undefined
  let added = number(0)
  let dot: Dot | undefined
  let cap: Form | undefined
  let slope: PerHead | undefined
  for (const term of score.terms) {
    const bent = term.factors.find(({ atom }) => atom.kind === 'call' && atom.fn === 'tanh')
    const others = term.factors.filter((one) => one !== bent)
    const own = dotOf(term, m, ir.variables)
    if (own && !dot) dot = own
    else if (bent?.power === 1 && bent.atom.kind === 'call' && !dot) {
      cap = formOf([termOf(term.coefficient, others)])
      const [inside, ...more] = bent.atom.args[0]!.terms
      dot =
        more.length === 0 && !has(cap, [m, ...ir.variables]) && inside
          ? dotOf(inside, m, ir.variables)
          : undefined
      if (!dot) throw fail(`its score has ${bent.atom.key}, which is no soft cap`)
    } else if (term.factors.some(({ atom, power }) => atom.key === m && power === 1) && !slope) {
      slope = formOf([
        termOf(
          term.coefficient,
          term.factors.filter(({ atom }) => atom.key !== m),
        ),
      ])
    } else if (tensorIn(formOf([term])) !== undefined && !bias) bias = formOf([term])
    else if (has(formOf([term]), [m])) throw fail(`its score has ${formOf([term]).key}`)
    else added = plus(added, formOf([term]))
  }
  if (!dot) throw fail(`its score ${score.key} has no product of a query and a key`)
  fit++
  const { q, k } = dot
  const rows = out.left.filter((x) => q.free.has(x) && !k.free.has(x) && !v.free.has(x))
  if (rows.length !== 1) throw fail('its queries have no variable for rows of their own')
  const [row] = rows as [string]
  const heads = out.left.filter((x) => q.free.has(x) && x !== row)
  const columns = out.left.filter((x) => x !== row && !heads.includes(x))
  if (columns.length !== 1 || heads.length > 2)
    throw fail('its result has more axes than [b, s, h, d]')
  const [column] = columns as [string]
  for (const [one, axes] of [
    [q, [...heads, row, dot.e]],
    [k, [m, dot.e]],
    [v, [m, column]],
  ] as const)
    if (!hasAxes(one, axes, heads)) throw fail(`${one.key} is not read along its axes`, 'CAS022')
  const [only] = bias?.terms[0]?.factors ?? []
  if (only?.atom.kind === 'access' && !hasAxes(only.atom, [], [...heads, row, m]))
    throw fail(`its bias is ${bias!.key}, which is not read along its axes`, 'CAS022')
  const perHead = (form: Form, what: string): PerHead => {
    const [term] = form.terms
    const [factor] = term?.factors ?? []
    const plain = factor?.atom.kind === 'access' && term!.coefficient === 1 && factor.power === 1
    if (plain && term!.factors.length === 1 && factor.atom.kind === 'access') {
      const [index] = factor.atom.indices
      if (factor.atom.indices.length === 1 && index && heads.includes(index.key)) return form
    }
    if ([...form.free].some((one) => one.endsWith('[]') || ir.variables.includes(one)))
      throw fail(`its ${what} is ${form.key}, no number for each head`, 'CAS022')
    return form
  }
  if (slope) perHead(slope, 'slope')
  if (sink) perHead(sink, 'sink')
  if (has(dot.scale, ir.variables) || [...dot.scale.free].some((one) => one.endsWith('[]')))
    throw fail(`its scale is ${dot.scale.key}, no number`, 'CAS022')
  const scale = cap ? times(dot.scale, cap) : dot.scale
  const { off, back } = intervalOf(numerator.where, m, row, ir.variables, (reason) =>
    fail(reason, 'CAS022'),
  )

  // What must be the distance of the last row from the last key
  const distances = off ? [off] : []
  const aligned = (form: Form) => {
    if (form.terms.length === 0 && !slope) return
    const rest = slope && times(plus(form, times(slope, name(row))), power(slope, -1))
    if (!rest || has(rest, [row, m]))
      throw fail('its score has a part that is the same for all keys')
    distances.push(times(number(-1), rest))
  }
  if (sink) aligned(shift)
  if (added.terms.length > 0 && !slope) {
    if (bias || has(added, ir.variables) || [...added.free].some((one) => one.endsWith('[]')))
      throw fail(`its score has ${added.key}`)
    bias = added
  } else if (weights !== 'softmax') aligned(added)
  let lse: string | undefined
  for (const other of outputs) {
    if (other === out) continue
    einsum = other.tensor
    if (!total || lse !== undefined || other.form.terms.length === 0)
      throw fail('attention gives a result and the logarithm of its divisor')
    const difference = minus(other.form, logarithm(total))
    if (sink ? difference.key !== '0' : difference.terms.some((term) => term.factors.some(isSum)))
      throw fail('it is not the logarithm of the divisor')
    if (!sink && weights === 'softmax') aligned(difference)
    else if (difference.key !== '0') throw fail('it is not the logarithm of the divisor')
    lse = other.tensor
  }

  const slots: Record<string, string> = { q: q.name, k: k.name, v: v.name, scale: scale.key }
  const note = (slot: string, form: Form | undefined) => {
    if (form) slots[slot] = form.key
  }
  if (weights !== 'softmax')
    Object.assign(slots, { weights, normalise: String(divisor !== undefined) })
  if (exponent !== 1) slots.power = String(exponent)
  note('bias', bias)
  note('softCap', cap)
  note('slopes', slope)
  note('sink', sink)
  note('causal', off && plus(name(row), off))
  note('window', back && plus(name(row), back))
  const shared = heads.filter((x) => !k.free.has(x) || !v.free.has(x))
  return {
    operator: 'attention',
    slots,
    run(call) {
      const [tq, tk, tv] = [q, k, v].map(({ name }) => batched(call, name)) as [F32, F32, F32]
      const [, sq, hq, d] = tq.shape as [number, number, number, number]
      const [, sk, hk, dv] = [...tk.shape.slice(0, 3), tv.shape[3]] as [
        number,
        number,
        number,
        number,
      ]
      if (shared.length > 0 && hk !== 1)
        throw refuse(
          'ERR_SHAPE',
          'cascade',
          k.name,
          `${k.name} must have one head, got ${hk} (the text reads it without ${shared.join(' and ')})`,
        )
      const ends = sk - sq
      const sizes = { [rankOf(column)]: dv, [rankOf(row)]: sq, [rankIn(m)]: sk, [rankIn(dot.e)]: d }
      const known: Record<string, number> = { ...sizes, ...call.scalars }
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
      const head = (form: Form): F32 | number[] => {
        const tensor = tensorIn(form)
        if (tensor !== undefined) return call.tensors[tensor] as F32
        return new Array<number>(hq).fill(numberOf(form, known))
      }
      const plain = bareName(scale)
      const options: AttentionOptions = { causal: off !== undefined }
      if (plain === undefined || known[plain] !== undefined) options.scale = numberOf(scale, known)
      if (weights !== 'softmax')
        Object.assign(options, { weights, power: exponent, normalise: divisor !== undefined })
      if (bias) {
        const tensor = tensorIn(bias)
        options.bias = tensor === undefined ? numberOf(bias, known) : (call.tensors[tensor] as F32)
      }
      if (cap) options.softCap = numberOf(cap, known)
      if (slope) options.slopes = head(slope)
      if (sink) options.sink = head(sink)
      if (back) options.window = ends + 1 - numberOf(back, known)
      const result = attention(tq, tk, tv, options)
      if (lse !== undefined) return { [out.tensor]: result.out, [lse]: result.lse }
      result.lse.dispose()
      return { [out.tensor]: result.out }
    },
  }
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
  const accesses = product!.factors.map(({ atom }) => atom).filter((atom) => atom.kind === 'access')
  if (others.length > 0 || accesses.length !== 3) throw fail('it does not multiply q, k and v')
  const [limit] = where
  const [m, row] = (limit && 'form' in limit ? limit.form.terms : []).map(({ key }) => key)
  if (where.length !== 1 || m === undefined || row === undefined || !over.includes(m))
    throw fail('its rows do not end at their own index')
  if (limit!.key !== `${m} + -1 ${row} <= 0`) throw fail(`where ${limit!.key} is not causal`)
  const k = accesses.find((one) => over.every((x) => one.free.has(x)))
  const v = accesses.find((one) => one !== k && one.free.has(m))
  const q = accesses.find((one) => one !== k && one.free.has(row))
  if (!k || !v || !q || q === v) throw fail('it does not multiply q, k and v')
  const e = over.find((x) => x !== m)!
  const columns = left.filter((x) => v.free.has(x) && !q.free.has(x))
  const heads = left.filter((x) => x !== row && !columns.includes(x))
  const [column = ''] = columns
  const axes =
    hasAxes(q, [...heads, row, e]) && hasAxes(k, [m, e], heads) && hasAxes(v, [m, column], heads)
  if (columns.length !== 1 || !axes) throw fail('q, k and v are not read along their axes')
  fit += 2

  // exp(-slope t) in front, exp(slope m) inside
  const weights = product!.factors.filter(({ atom }) => !accesses.includes(atom as Access))
  const inside =
    weights.length === 1 ? argument(weights[0]!.atom) : weights.length === 0 ? number(0) : undefined
  const slope = inside && times(inside, power(name(m), -1))
  const decay = slope && exponential(times(times(number(-1), slope), name(row)))
  const outside = formOf([
    termOf(
      main.coefficient,
      main.factors.filter((one) => !isSum(one)),
    ),
  ])
  const scale = decay && times(outside, power(decay, -1))
  if (!slope || !scale || has(slope, [m, ...over]) || has(scale, ir.variables))
    throw fail('its weights are no decay by distance')
  fit++
  const own = tensorIn(slope)
  if (own === undefined && has(slope, ir.variables))
    throw fail(`its decay is ${slope.key}, no number for each head`, 'CAS022')

  // What the state before the first token adds
  let initial: Access | undefined
  const rest = form.terms.find((term) => term !== main)
  if (rest) {
    const start = sumOf(rest)?.body.terms[0]?.factors.map(({ atom }) => atom)
    initial = start?.find((one): one is Access => one.kind === 'access' && one.name !== q.name)
    const first = formOf([
      termOf(
        rest.coefficient,
        rest.factors.filter((one) => !isSum(one)),
      ),
    ])
    const wanted = times(times(scale, decay!), exponential(times(number(-1), slope)))
    if (
      !initial ||
      start!.length !== 2 ||
      first.key !== wanted.key ||
      !start!.some(({ key }) => key.startsWith(`${q.name}[`))
    )
      throw fail(`it adds ${formOf([rest]).key}`)
  }
  const slots = { q: q.name, k: k.name, v: v.name, scale: scale.key, slopes: slope.key }
  return {
    operator: 'lightning',
    slots: initial ? { ...slots, initialState: initial.name } : slots,
    run(call) {
      const [tq, tk, tv] = [q, k, v].map((one) => batched(call, one.name)) as [F32, F32, F32]
      const { out } = lightning(tq, tk, tv, {
        slopes:
          own !== undefined
            ? (call.tensors[own] as F32)
            : new Array<number>(tq.shape[2]!).fill(numberOf(slope, call.scalars)),
        scale: numberOf(scale, call.scalars),
        initialState: initial && (call.tensors[initial.name] as F32),
      })
      return { [tensor]: out }
    },
  }
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
  const normal = normalOf(ir)
  for (const tensor of ir.outputs) {
    const found = normal.forms.get(tensor)
    const why = !found
      ? 'is the state of an iteration'
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
      if (!(error instanceof Mismatch)) throw error
      refused.push({ operator, mismatch: error })
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
