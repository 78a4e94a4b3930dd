import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import type { Tensor } from '../tensor.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, type Span, type Statement, statementsOf } from './ir.js'
import {
  type Atom,
  argument,
  atomForm,
  type Condition,
  exponential,
  type Factor,
  type Form,
  formOf,
  isRank,
  meets,
  type Normal,
  number,
  plus,
  power,
  rankIn,
  readsTensors,
  rebuilt,
  reduction,
  replace,
  type Term,
  times,
} from './normal.js'
import { freshIn, type Layout, Side } from './side.js'
import { splitBy, tie } from './sizes.js'
import { indivisible, plainVariable, readsOf } from './validate.js'

// What the families of operators have in common when they take a cascade apart

/** Numbers of a call by their names in the text. */
export type Scalars = Readonly<Record<string, number>>

/** @internal */
export interface Call {
  tensors: Readonly<Record<string, Tensor>>
  scalars: Scalars
}

/** @internal */
export interface Lowered {
  operator: string
  slots: Record<string, string>
  refusal?: string
  /** Names that a call may give besides scalars. */
  ranks?: readonly string[]
  /** Axes [b, s, h, d] of the result, and where those of operands stand in the text. */
  axes?: readonly string[]
  layouts?: Layouts
  run(call: Call): Record<string, Tensor>
}

/** @internal Why an operator does not take a cascade; `fit` grows with what it does take. */
export class Mismatch {
  constructor(
    readonly einsum: string,
    readonly reason: string,
    readonly fit: number,
    readonly code: 'CAS020' | 'CAS022' = 'CAS020',
  ) {}
}

/** @internal */
export const has = (one: { free: ReadonlySet<string> }, names: Iterable<string>) =>
  [...names].some((each) => one.free.has(each))
/** @internal */
export const isSum = ({ atom, power }: Factor) =>
  atom.kind === 'reduce' && atom.op === 'sum' && power === 1
/** @internal */
export type Access = Atom & { kind: 'access' }
/** @internal */
export type Reduce = Atom & { kind: 'reduce' }

/** @internal An operand of attention: what is computed from the tensor that has its axes, or only that tensor. */
export interface Operand {
  main: Access
  form: Form
}

/** @internal */
export const isNumber = (form: Pick<Form, 'free' | 'height'>, variables: readonly string[]) =>
  form.height === 0 && !has(form, variables) && !readsTensors(form)

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
function mainIn(form: Form, axes: readonly string[]): Access | undefined {
  const mains = accessesIn(form).filter((one) => {
    const names = one.indices.map(({ key }) => key)
    return new Set(names).size === names.length && axes.every((axis) => names.includes(axis))
  })
  // a table of positions has no heads
  return mains.length === 0
    ? undefined
    : mains.reduce((a, b) => (b.indices.length > a.indices.length ? b : a))
}

// Whether an index goes further than its variable does, as r + R and 2 * r do
const reachesBeyond = ({ terms }: Form, variable: string): boolean => {
  const rank = /^[#%]/.test(variable) ? rankIn(variable) : rankOf(variable)
  const of = (key: string) => terms.find((term) => term.key === key)?.coefficient ?? 0
  return of(variable) > 1 || (of(variable) === 1 && of(rank) >= 1)
}

/**
 * @internal What is computed row by row from the tensor that has these axes. A kept tensor is taken apart, unless none of
 * those that it is computed from has them: then it is made before.
 */
export function operandOf(
  form: Form,
  axes: readonly string[],
  { kept, forms, taken, unsaid }: Normal,
): Operand | undefined {
  const found = mainIn(form, axes)
  if (!found || !kept.get(found.name) || unsaid.has(found.name))
    return found && { main: found, form }
  const { form: own, left } = forms.get(found.name)!
  const whole = replace(own, new Map(left.map((v, i) => [v, found.indices[i]!])))
  const apart = plus(
    ...form.terms.map(({ coefficient, factors }) =>
      factors.reduce(
        (value, { atom, power: exponent }) =>
          times(value, power(atom.key === found.key ? whole : atomForm(atom), exponent)),
        number(coefficient),
      ),
    ),
  )
  const main = mainIn(apart, axes)
  // a tensor that this is no whole row of is read along other axes
  const e = axes.at(-1)!
  const partly = accessesIn(apart).some(
    ({ name, indices }) =>
      indices.length > (main?.indices.length ?? 0) ||
      (name === main?.name && indices.some((index) => reachesBeyond(index, e))),
  )
  if (!main || partly || [...kept.keys()].some((one) => apart.free.has(`${one}[]`)))
    return { main: found, form }
  taken.add(found.name)
  return { main, form: apart }
}

// Whether a form has a reduction that is such
function reduces({ terms }: Form, such: (one: Reduce) => boolean): boolean {
  const inside = (atom: Atom): boolean => {
    if (atom.kind === 'reduce') return such(atom) || reduces(atom.body, such)
    if (atom.kind === 'call') return atom.args.some((arg) => reduces(arg, such))
    if (atom.kind === 'sum') return reduces(atom.form, such)
    return atom.kind === 'if' && (reduces(atom.yes, such) || reduces(atom.no, such))
  }
  return terms.some(({ factors }) => factors.some(({ atom }) => inside(atom)))
}

/** @internal Whether a form reduces over a rank. */
export const sweeps = (form: Form, rank: string): boolean =>
  reduces(form, ({ over }) => over.some((v) => rankIn(v) === rank))

const formsIn = (test: Condition): Form[] =>
  'form' in test ? [test.form] : test.parts.flatMap(formsIn)

// What choices compare with 0
function comparedIn({ terms }: Form): Form[] {
  const inside = (atom: Atom): Form[] => {
    switch (atom.kind) {
      case 'name':
        return []
      case 'access':
        return atom.indices.flatMap(comparedIn)
      case 'call':
        return atom.args.flatMap(comparedIn)
      case 'sum':
        return comparedIn(atom.form)
      case 'reduce':
        return comparedIn(atom.body)
      case 'if': {
        const own = formsIn(atom.test)
        return [...own, ...[...own, atom.yes, atom.no].flatMap(comparedIn)]
      }
    }
  }
  return terms.flatMap(({ factors }) => factors.flatMap(({ atom }) => inside(atom)))
}

// Indices and sizes, which are not rounded
const counts = ({ terms }: Form): boolean =>
  terms.every(({ coefficient, factors }) => {
    const whole = ({ atom, power }: Factor) =>
      power > 0 &&
      (atom.kind === 'if'
        ? counts(atom.yes) && counts(atom.no)
        : atom.kind === 'name' && (/^#/.test(atom.name) || isRank(atom.name)))
    return Number.isInteger(coefficient) && factors.every(whole)
  })

/**
 * @internal exp(a p) sum(m) exp(-a m) x as sum(m) exp(a (p - m)) x: where p is large both are far from 1, and their product
 * is not.
 */
export function rejoined({ terms }: Form): Form {
  return plus(
    ...terms.map(({ coefficient, factors }) => {
      let outside = factors.flatMap(({ atom }) => argument(atom)?.terms ?? [])
      let value = number(coefficient)
      for (const { atom, power: exponent } of factors) {
        if (argument(atom)) continue
        if (atom.kind !== 'reduce' || atom.op !== 'sum') {
          value = times(value, power(rebuilt(atom, rejoined), exponent))
          continue
        }
        const { over, body, where } = atom
        const isOwn = (other: Term) =>
          body.terms.every(({ factors }) =>
            factors
              .flatMap(({ atom }) => argument(atom)?.terms ?? [])
              .some((one) =>
                over.some((v) => has(formOf([one]), [v]) && meets(one, v, other, 1 / exponent)),
              ),
          )
        const own = outside.filter(isOwn)
        outside = outside.filter((one) => !own.includes(one))
        const moved = exponential(times(number(1 / exponent), formOf(own)))
        const sum = reduction('sum', over, times(moved, rejoined(body)), where)
        value = times(value, power(sum, exponent))
      }
      return times(value, exponential(formOf(outside)))
    }),
  )
}

/**
 * @internal Refuses sums of exponentials of scores, or of anything along a rank that the text takes a maximum or a logsumexp
 * over: none is taken off beside an operator, which the text may do. Those of positions too, unless they are of distances. And
 * choices that look for where a maximum is, which is rounded there.
 */
export function checkSums(form: Form, ir: CascadeIR): void {
  const isRounded = ({ op, body }: Reduce) => (op === 'max' || op === 'min') && !counts(body)
  if (comparedIn(form).some((one) => reduces(one, isRounded))) {
    const text = 'it looks for where a maximum is beside the operator, where that is rounded'
    throw refuse('ERR_UNSUPPORTED', 'cascade', undefined, text)
  }
  const largest = statementsOf(ir.steps).flatMap(({ reduce }) =>
    reduce?.op === 'max' || reduce?.op === 'logsumexp' ? reduce.over.map(rankOf) : [],
  )
  const grows = ({ op, over, body }: Reduce) => {
    const along = over.some((v) => largest.includes(rankIn(v)))
    return (
      op === 'sum' &&
      body.terms.some(({ factors }) =>
        factors.some(({ atom }) => {
          const inner = argument(atom)
          const isFar = (one: Term) => {
            const at = over.find((v) => one.factors.some(({ atom }) => atom.key === v))
            return at !== undefined && !inner!.terms.some((other) => meets(one, at, other))
          }
          return inner && (along || inner.terms.some(isFar) || reduces(inner, () => true))
        }),
      )
    )
  }
  if (!reduces(form, grows)) return
  const text = 'it sums exponentials beside the operator, which may overflow'
  throw refuse('ERR_UNSUPPORTED', 'cascade', undefined, text)
}

// The variable of an axis: an index that is one, or the only one of `heads` by which it is looked up, as in K[map[h],m,e]
function axisOf(index: Form, heads: readonly string[]): string {
  const own = [...index.free].filter((one) => !one.endsWith('[]'))
  return own.length === 1 && heads.includes(own[0]!) ? own[0]! : index.key
}

/** @internal Whether an operand is its tensor as it stands. */
export const isWhole = ({ main, form }: Operand) =>
  form.key === main.key && main.indices.every(({ key, free }) => free.has(key))

/**
 * @internal Whether every index is a variable of its own: those that must be there, and some that may and may be looked up.
 */
export function hasAxes(
  { indices }: Access,
  axes: readonly string[],
  more: readonly string[] = [],
): boolean {
  const names = indices.map((index) => axisOf(index, more))
  return (
    new Set(names).size === names.length &&
    axes.every((axis) => names.includes(axis)) &&
    names.every((each) => axes.includes(each) || more.includes(each))
  )
}

/**
 * @internal Axes [b, s, h, d] of a tensor as places in its text, and what stands for those that the text leaves out.
 */
export type Layouts = Map<string, (indices: readonly string[]) => readonly string[]>

/** @internal */
export const cast = (x: Tensor, dtype: FloatDType): F32 =>
  (x.dtype === dtype ? x : (x as F32).cast(dtype)) as F32

/** @internal */
export function sideOf(
  ir: CascadeIR,
  layouts: Layouts,
  form: Form,
  left: readonly string[],
  names: ReadonlyMap<string, string> = new Map(),
  where?: readonly Condition[],
): Side {
  const whole = rejoined(form)
  checkSums(whole, ir)
  const layout: Layout = (tensor, indices) => layouts.get(tensor)?.(indices) ?? indices
  return new Side(ir, layout, names, whole, left, where)
}

/**
 * @internal Tensors of [b, s, h, d], whatever axes the text writes; what it leaves out has names of its own, or is the
 * only head of all.
 */
export function layoutsOf(
  ir: CascadeIR,
  operands: readonly (readonly [Operand, readonly string[]])[],
  heads: readonly string[],
  tokens: readonly string[],
): Layouts {
  const [batch, head] = heads.length > 1 ? heads : [undefined, heads[0]]
  const own = freshIn(ir)
  const absent = [batch ? '0' : own('b'), own('p'), head ? '0' : own('h'), '']
  return new Map(
    operands.map(([{ main }, axes]) => {
      const token = axes.find((x) => tokens.includes(x))
      const places = [batch, token, head, axes.at(-1)].map((axis) =>
        main.indices.findIndex((index) => axisOf(index, heads) === axis),
      )
      return [main.name, (given) => places.map((at, i) => (at < 0 ? absent[i]! : given[at]!))]
    }),
  )
}

/** @internal An operand that is computed from its tensor, [b, s, h, d]; of heads that it is not read by there is one. */
export function operandSide(
  ir: CascadeIR,
  layouts: Layouts,
  { main, form }: Operand,
  axes: readonly string[],
  heads: readonly string[],
  names: ReadonlyMap<string, string>,
): (tensors: Call['tensors'], known: Known) => F32 {
  const left = axes.filter(
    (axis) => !heads.includes(axis) || has(main, [axis]) || has(form, [axis]),
  )
  const side = sideOf(ir, layouts, form, left, names)
  return (tensors, known) => {
    const made = side.run(tensors, known)
    const sizes = [...made.shape]
    return made.reshape(axes.map((axis) => (left.includes(axis) ? sizes.shift()! : 1)))
  }
}

/** @internal A tensor that the text reads without a variable of heads or of the batch: an axis of [b, s, h, d]. */
export interface Shared {
  tensor: string
  by: string
  axis: 0 | 2
  /** The only such variable of the text, which may be the other axis in a call. */
  either: boolean
}

/** @internal */
export const sharedOf = (
  operands: readonly (readonly [Operand, readonly string[]])[],
  heads: readonly string[],
): Shared[] =>
  operands.flatMap(([{ main }]) =>
    heads
      .filter((x) => !has(main, [x]))
      .map((by) => ({
        tensor: main.name,
        by,
        axis: heads.length > 1 && by === heads[0] ? 0 : 2,
        either: heads.length === 1,
      })),
  )

/** @internal Refuses more sequences or heads than the text reads. */
export function onlyOne(call: Call, { tensor, by, axis }: Shared): void {
  const given = batched(call, tensor).shape[axis]!
  if (given === 1) return
  const what = axis === 0 ? 'sequence' : 'head'
  const text = `${tensor} must have one ${what}, got ${given} (the text reads it without ${by})`
  throw refuse('ERR_SHAPE', 'cascade', tensor, text)
}

/** @internal With as many sequences and heads as others have, if the text reads it without a variable of them. */
export function repeated(
  x: F32,
  tensor: string,
  shared: readonly Shared[],
  sequences: number,
  heads: number,
): F32 {
  const own = shared.filter((one) => one.tensor === tensor)
  const shape = x.shape.map((size, i) => {
    const wide = own.some(({ axis, either }) => axis === i || (either && i === 0 && size === 1))
    return wide ? (i === 0 ? sequences : heads) : size
  })
  return shape.every((size, i) => size === x.shape[i]) ? x : x.expand(shape)
}

/** @internal */
export type F32 = Tensor<'float32'>

/** @internal */
export const shown = (operand: Operand) => (isWhole(operand) ? operand.main.name : operand.form.key)

/** @internal */
export function spanOf(ir: CascadeIR, tensor: string) {
  return statementsOf(ir.steps).find(({ out }: Statement) => out.name === tensor)!.out.span
}

/** @internal */
export function batched({ tensors }: Call, argument: string): Tensor {
  const tensor = tensors[argument]!
  if (tensor.rank === 4) return tensor
  throw refuse(
    'ERR_SHAPE',
    'cascade',
    argument,
    `${argument} must be [b, s, h, d], got [${tensor.shape.join(', ')}]`,
  )
}

/** @internal */
export function bareName({ terms }: Form): string | undefined {
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

/** @internal The tensor that a form is, each of its indices a variable. */
export function tensorIn(form: Form): string | undefined {
  const atom = form.terms[0]?.factors[0]?.atom
  const alone = form.terms.length === 1 && atom?.kind === 'access' && form.key === atom.key
  return alone && atom.indices.every((index) => bareName(index) !== undefined)
    ? atom.name
    : undefined
}

/** @internal A form of numbers alone. */
export function numberOf(form: Form, known: Readonly<Record<string, number>>): number {
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
      sin: Math.sin,
      cos: Math.cos,
      relu: (x: number) => Math.max(x, 0),
      sigmoid: (x: number) => 1 / (1 + Math.exp(-x)),
      softplus: (x: number) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
    } as const
    const fn = of[atom.fn as keyof typeof of] as ((...x: number[]) => number) | undefined
    if (fn) return fn(...args)
  }
  throw refuse('ERR_UNSUPPORTED', 'cascade', undefined, `${atom.key} is no number`)
}

/** @internal */
export type Known = Record<string, number>

/** @internal What tells the sizes of ranks in a call, by the axes of its tensors. */
export function sizesOf(ir: CascadeIR, layouts: Layouts): (call: Call) => Known {
  const reads = statementsOf(ir.steps)
    .flatMap(readsOf)
    .filter(({ name }) => ir.inputs.includes(name))
  const axes = reads.map(({ name, indices }) => {
    const own = indices.map((index) => plainVariable(index) ?? '')
    return [name, layouts.get(name)?.(own) ?? own] as const
  })
  const told = [...new Set(axes.flatMap(([, variables]) => variables))].map(rankOf)
  const same = new Map<string, string>()
  const place = (rank: string) => told.indexOf(same.get(rank) ?? rank)
  tie(
    ir,
    (rank) => (place(rank) < 0 ? undefined : place(rank)),
    (rank, at) => same.set(rank, told[at]!),
  )
  return ({ tensors }) => {
    const known: Known = {}
    for (const [tensor, variables] of axes)
      variables.forEach((variable, axis) => {
        const size = tensors[tensor]?.shape[axis]
        if (size !== undefined && ir.variables.includes(variable)) known[rankOf(variable)] = size
      })
    for (const [rank, other] of same) known[rank] = known[other]!
    return known
  }
}

interface Fact {
  rank: string
  at: number
  source: string
  span: Span
}

/**
 * @internal Checks that sizes of declarations, splits, the call and its tensors go together, under the names of the text.
 */
export function agreement(
  ir: CascadeIR,
  layouts: Layouts = new Map(),
): (inputs: readonly Tensor[], scalars: Scalars) => void {
  const [first] = statementsOf(ir.steps)
  const ranks: string[] = []
  const numberOf = (rank: string) => {
    if (!ranks.includes(rank)) ranks.push(rank)
    return ranks.indexOf(rank)
  }
  const reads = statementsOf(ir.steps)
    .flatMap(readsOf)
    .filter(({ name }) => ir.inputs.includes(name))
  const told = reads.flatMap(({ name, indices, span }) => {
    const marks = indices.map((_, i) => `axis ${i}`)
    const four = layouts.get(name)?.(marks)
    const grouped = four && marks.some((mark) => !four.includes(mark))
    return indices.flatMap((index, i) => {
      const variable = plainVariable(index)
      const own = variable !== undefined && ir.variables.includes(variable) ? [variable] : []
      const axis = four ? four.indexOf(marks[i]!) : i
      // of several axes that are one no size is told
      if (axis < 0 || (grouped && axis === 2)) return []
      const axes = four ? 4 : indices.length
      const sharing = four && axis % 2 === 0 ? 'bshd'[axis] : undefined
      const either = axis === 2 && !marks.includes(four?.[0] ?? '')
      const variables = variable === undefined ? splitBy(ir, index) : own
      // operators take rows along several axes
      const last = !four && layouts.size === 0 && i === axes - 1
      const source = sharing ? `axis ${sharing} of tensors that are [b, s, h, d]` : name
      return variables.map((one) => {
        const rank = rankOf(one)
        const [input, at] = [ir.inputs.indexOf(name), numberOf(rank)]
        return { input, span, rank, at, axis, axes, sharing, either, last, source }
      })
    })
  })
  // what some tensors may have fewer of, behind what all have
  const exact = told.filter(({ sharing }) => !sharing)
  const shared = told.filter(({ sharing }) => sharing)
  const sized = [...ir.ranks].filter((one): one is [string, number] => one[1] !== undefined)
  const stated = [
    ...sized.map(([rank, size]) => ({ rank, size, source: 'its declaration' })),
    ...ir.splits.map(({ inner, size }) => ({ rank: rankOf(inner), size, source: 'its split' })),
  ].map((one) => ({ ...one, at: numberOf(one.rank), span: first!.out.span }))
  const splits = ir.splits.map((one) => {
    const [rank, outer] = [rankOf(one.variable), rankOf(one.outer)]
    const { span } = one
    const parts = { rank: outer, at: numberOf(outer), source: 'its split', span }
    return { ...one, rank, at: numberOf(rank), parts }
  })
  // Every call looks: by numbers of ranks, in memory that stays
  const sizes = ranks.map(() => -1)
  const most = ranks.map(() => -1)
  const facts: Fact[] = []
  const learn = (fact: Fact, size: number, span = fact.span) => {
    const { at, rank, source } = fact
    const before = sizes[at]!
    if (before === size) return
    if (before >= 0) {
      const text = `rank ${rank} is ${before} from ${facts[at]!.source} but ${size} from ${source}`
      throw broken('CAS003', text, span, rank)
    }
    sizes[at] = size
    facts[at] = fact
  }
  return (inputs, scalars) => {
    sizes.fill(-1)
    for (const fact of stated) learn(fact, fact.size)
    for (const fact of exact) {
      const { shape } = inputs[fact.input]!
      if (shape.length === fact.axes || fact.last)
        learn(fact, shape[shape.length + fact.axis - fact.axes]!)
    }
    if (shared.length > 0) most.fill(-1)
    for (const { input, at, axis, either } of shared) {
      const { shape } = inputs[input]!
      if (shape.length !== 4) continue
      const size = either && sizes[at] === shape[0] ? shape[0]! : shape[axis]!
      most[at] = Math.max(size, most[at]!)
    }
    for (const fact of shared) {
      const { at } = fact
      if (most[at]! >= 0 && sizes[at]! >= 0) learn(fact, most[at]!, facts[at]!.span)
    }
    for (const { variable, rank, at, size, tailMask, span, parts } of splits) {
      const whole = sizes[at]! >= 0 ? sizes[at]! : scalars[rank]
      if (whole === undefined) continue
      if (whole % size !== 0 && !tailMask) throw indivisible(variable, size, whole, span)
      learn(parts, Math.ceil(whole / size))
    }
    for (const { rank, size, source, span } of stated)
      if (scalars[rank] !== undefined && scalars[rank] !== size) {
        const text = `rank ${rank} is ${scalars[rank]} from the call but ${size} from ${source}`
        throw broken('CAS003', text, span, rank)
      }
  }
}

/** @internal An operator that checks what its text may read beyond an axis, and scalars of masks, before it runs. */
export function checked(lowered: Lowered, { reaches, whole }: Normal, ir: CascadeIR): Lowered {
  if (reaches.length === 0 && whole.size === 0) return lowered
  const layouts: Layouts = lowered.layouts ?? new Map()
  const told = sizesOf(ir, layouts)
  const most = Math.max(-1, ...reaches.map(({ axis }) => axis)) + 1
  const own = Array.from({ length: most }, (_, axis) => `axis ${axis}`)
  return {
    ...lowered,
    run(call) {
      for (const one of whole) {
        const value = call.scalars[one] ?? 0
        if (Number.isInteger(value)) continue
        const text = `masks count in whole numbers, but ${one} is ${value}`
        throw broken('CAS022', text, spanOf(ir, ir.outputs[0]!), one)
      }
      if (reaches.length === 0) return lowered.run(call)
      const known = { ...told(call), ...call.scalars }
      for (const { tensor, axis, index } of reaches) {
        const places = layouts.get(tensor)?.(own) ?? own
        const size = call.tensors[tensor]!.shape[places.indexOf(`axis ${axis}`)]!
        const at = (last: boolean) => {
          const value = (one: string) => {
            if (/^[A-Z]/.test(one) || ir.scalars.includes(one)) return known[one]!
            return last ? known[/^[#%]/.test(one) ? rankIn(one) : rankOf(one)]! - 1 : 0
          }
          return numberOf(
            index,
            Object.fromEntries([...index.free].map((one) => [one, value(one)])),
          )
        }
        if (at(false) >= 0 && at(true) < size) continue
        const text = `${tensor} is read from ${at(false)} to ${at(true)} along an axis of ${size}, where nothing is empty`
        throw broken('CAS022', text, spanOf(ir, ir.outputs[0]!), tensor)
      }
      return lowered.run(call)
    },
  }
}
