import {
  type Access,
  type CascadeIR,
  type Expr,
  type FunctionName,
  type Index,
  namesIn,
  type Predicate,
  type Reducer,
  rankOf,
  type Statement,
} from './ir.js'
import { plainVariable, readsOf, stepOf } from './validate.js'

// What a cascade computes, apart from how: every output as one expression of the inputs, in a form that does not depend on
// the order of statements, loops, factors and summands.
//
//   form   = sum of terms            term = number * product of atoms to some power
//   atom   = name | access | function of forms | reduction of a form | sum of several terms, where it is no factor
//
// Three identities make the shifted, deferred, split and iterated texts of one mechanism the same form:
//
//   exp(a) exp(b) = exp(a + b)               and what of `a` a reduction does not run over leaves its sum as a factor, so
//                                            that a maximum that was subtracted cancels between dividend and divisor
//   sum(m) sum(k) x = sum(m,k) x             levels of a split rank become the rank again
//   R[i+1] = A[i] + R[i] g(i) / g(i+1)       has R[i] = sum(u < i) A[u] g(u+1) / g(i), if R starts at 0 or g is known

/** @internal A sum of terms. Equal keys mean equal values. */
export interface Form {
  terms: readonly Term[]
  key: string
  free: ReadonlySet<string>
  height: number
}

/** @internal */
export interface Term {
  coefficient: number
  factors: readonly Factor[]
  /** Of the factors alone. */
  key: string
}

/** @internal */
export interface Factor {
  atom: Atom
  power: number
}

interface Common {
  key: string
  /** Index variables, scalars and ranks that it depends on, and tensors with brackets behind their name. */
  free: ReadonlySet<string>
  /** How deep reductions stand inside each other: it names what they bind. */
  height: number
}

/** @internal */
export type Atom = Common &
  (
    | { kind: 'name'; name: string }
    | { kind: 'access'; name: string; indices: readonly Form[] }
    | { kind: 'call'; fn: FunctionName; args: readonly Form[] }
    | { kind: 'if'; test: Condition; yes: Form; no: Form }
    | {
        kind: 'reduce'
        op: Reducer
        over: readonly string[]
        body: Form
        where: readonly Condition[]
      }
    | { kind: 'sum'; form: Form }
  )

/** @internal A form that is at most, below, or is or is not 0, or a combination of such. */
export type Condition = Common &
  (
    | { kind: '<=' | '<' | '==' | '!='; form: Form }
    | { kind: 'or' | 'and'; parts: readonly Condition[] }
  )

// A condition or atom without what follows from it
type Bare<T> = T extends unknown ? Omit<T, keyof Common> : never

const most = 64 // terms that a product is multiplied out to
const longest = 4000 // key of a form; a text of a few lines can have one beyond memory
const budget = 1e6 // characters of all keys of one cascade, a few tenths of a second; attention needs 5e4

let spent = 0

/** @internal Gives the forms to come a budget of their own. */
export function startOver(): void {
  spent = 0
}

// Scalars of the cascade at hand that are written as sizes are, which may be below 0
let scalars: ReadonlySet<string> = new Set()

/** @internal Whether a name is that of a size. */
export const isRank = (name: string): boolean => /^[A-Z]/.test(name) && !scalars.has(name)

/** @internal A form is far larger than any operator's. */
export class TooLarge {}

function unite(parts: readonly Pick<Common, 'free' | 'height'>[], bound: readonly string[] = []) {
  const free = new Set<string>()
  let height = 0
  for (const part of parts) {
    for (const name of part.free) if (!bound.includes(name)) free.add(name)
    height = Math.max(height, part.height)
  }
  return { free, height: height + bound.length }
}

const byKey = (a: { key: string }, b: { key: string }) => (a.key < b.key ? -1 : 1)

/** @internal */
export function formOf(terms: Iterable<Term>): Form {
  const sorted = [...terms].filter(({ coefficient }) => coefficient !== 0).sort(byKey)
  const key = sorted
    .map(({ coefficient, key }) =>
      key === '' ? `${coefficient}` : coefficient === 1 ? key : `${coefficient} ${key}`,
    )
    .join(' + ')
  spent += key.length
  if (key.length > longest || spent > budget) throw new TooLarge()
  const atoms = sorted.flatMap(({ factors }) => factors.map(({ atom }) => atom))
  return { terms: sorted, key: key || '0', ...unite(atoms) }
}

/** @internal */
export function termOf(coefficient: number, factors: readonly Factor[]): Term {
  const sorted = factors.filter(({ power }) => power !== 0)
  sorted.sort((a, b) => byKey(a.atom, b.atom))
  const key = sorted
    .map(({ atom, power }) => (power === 1 ? atom.key : `${atom.key}^${power}`))
    .join(' ')
  return { coefficient, factors: sorted, key }
}

/** @internal */
export const single = (factors: readonly Factor[]): Form => formOf([termOf(1, factors)])

/** @internal */
export const number = (value: number): Form => formOf([termOf(value, [])])

/** @internal */
export function atomForm(atom: Atom): Form {
  return formOf([termOf(1, [{ atom, power: 1 }])])
}

/** @internal */
export function name(text: string): Form {
  return atomForm({ kind: 'name', name: text, key: text, free: new Set([text]), height: 0 })
}

/** @internal */
export function access(tensor: string, indices: readonly Form[]): Form {
  const key = `${tensor}[${indices.map((index) => index.key).join(',')}]`
  const { free, height } = unite(indices)
  free.add(`${tensor}[]`)
  return atomForm({ kind: 'access', name: tensor, indices, key, free, height })
}

// The number that a form is, if it is one
function numberIn({ terms }: Form): number | undefined {
  if (terms.length === 0) return 0
  return terms.length === 1 && terms[0]!.factors.length === 0 ? terms[0]!.coefficient : undefined
}

/** @internal */
export function plus(...forms: readonly Form[]): Form {
  const sums = new Map<string, Term>()
  for (const { terms } of forms)
    for (const term of terms) {
      const coefficient = (sums.get(term.key)?.coefficient ?? 0) + term.coefficient
      sums.set(term.key, { ...term, coefficient })
    }
  return formOf(sums.values())
}

/** @internal What an exponential is of. */
export const argument = (atom: Atom): Form | undefined =>
  atom.kind === 'call' && atom.fn === 'exp' ? atom.args[0] : undefined

// Exponentials of a product are one
function product(a: Term, b: Term): Form {
  const powers = new Map<string, Factor>()
  const exponents: Form[] = []
  for (const { atom, power } of [...a.factors, ...b.factors]) {
    const exponent = argument(atom)
    if (exponent) exponents.push(times(number(power), exponent))
    else {
      const before = powers.get(atom.key)?.power ?? 0
      powers.set(atom.key, { atom, power: before + power })
    }
  }
  const coefficient = a.coefficient * b.coefficient
  // if(t, x, 0) / if(t, x, 0) is 0 where t does not hold
  const hidden = [...powers.values()].flatMap((one) => (one.power === 0 && cutIn(one)) || [])
  if (hidden.length > 0) {
    for (const { key } of hidden) powers.delete(key)
    const rest = formOf([termOf(coefficient, [...powers.values()])])
    const value = exponents.length > 0 ? times(rest, exponential(plus(...exponents))) : rest
    return hidden.reduce((all, { test }) => times(all, choose(test, number(1), number(0))), value)
  }
  // exp(x) / (1 + exp(x))
  const whole = exponents.length > 0 ? plus(...exponents) : undefined
  for (const { atom, power } of whole && whole.height > 0 ? [...powers.values()] : []) {
    if (power !== 1 || plus(whole!, inCall(atom, 'sigmoid') ?? whole!).terms.length > 0) continue
    powers.delete(atom.key)
    return times(formOf([termOf(coefficient, [...powers.values()])]), apply('sigmoid', [whole!]))
  }
  // A sum to the power of one is a sum again
  const sums = [...powers.values()].filter(({ atom, power }) => atom.kind === 'sum' && power === 1)
  if (exponents.length < 2 && sums.length === 0) {
    const rest = exponents.length === 1 ? exponential(exponents[0]!).terms[0]!.factors : []
    return formOf([termOf(coefficient, [...powers.values(), ...rest])])
  }
  for (const { atom } of sums) powers.delete(atom.key)
  let result = formOf([termOf(coefficient, [...powers.values()])])
  if (exponents.length > 0) result = times(result, exponential(plus(...exponents)))
  for (const { atom } of sums) {
    if (atom.kind !== 'sum') continue
    // what has too many terms stays one factor
    const few = result.terms.length * atom.form.terms.length <= most
    result = few
      ? times(result, atom.form)
      : formOf(result.terms.map((one) => withFactor(one, atom)))
  }
  return result
}

function withFactor({ coefficient, factors }: Term, atom: Atom): Term {
  const before = factors.find((one) => one.atom.key === atom.key)
  const others = factors.filter((one) => one !== before)
  return termOf(coefficient, [...others, { atom, power: (before?.power ?? 0) + 1 }])
}

// x - mean, whose square is small where those of both are large
const isCentred = ({ terms }: Form): boolean =>
  terms.length > 1 &&
  terms.some(({ coefficient }) => coefficient > 0) &&
  terms.some(
    ({ coefficient, factors }) =>
      coefficient < 0 && factors.some(({ atom }) => atom.kind === 'reduce' && atom.op === 'sum'),
  )

/** @internal */
export function times(a: Form, b: Form): Form {
  if (a.key === b.key && isCentred(a)) {
    const [{ factors }] = wrapped(a).terms as [Term]
    return single([{ ...factors[0]!, power: 2 }])
  }
  if (a.terms.length * b.terms.length > most) {
    const wrap = (form: Form) => (form.terms.length > 1 ? wrapped(form) : form)
    return plus(product(wrap(a).terms[0]!, wrap(b).terms[0]!))
  }
  return plus(...a.terms.flatMap((x) => b.terms.map((y) => product(x, y))))
}

function wrapped(form: Form): Form {
  return atomForm({ kind: 'sum', form, key: `(${form.key})`, free: form.free, height: form.height })
}

/** @internal */
export const minus = (a: Form, b: Form): Form => plus(a, times(number(-1), b))

// What every term has as a factor, exponentials by the summands that their arguments share
function common({ terms }: Form): Form {
  const [first, ...others] = terms
  if (!first || others.length === 0) return number(1)
  const shared: Factor[] = []
  let exponent: Term[] = []
  for (const factor of first.factors) {
    const own = argument(factor.atom)
    if (own) {
      exponent = own.terms.filter((part) =>
        others.every(({ factors }) =>
          factors.some(({ atom }) =>
            argument(atom)?.terms.some(
              ({ key, coefficient }) => key === part.key && coefficient === part.coefficient,
            ),
          ),
        ),
      )
    } else if (
      others.every(({ factors }) =>
        factors.some(({ atom, power }) => atom.key === factor.atom.key && power === factor.power),
      )
    )
      shared.push(factor)
  }
  return times(formOf([termOf(1, shared)]), exponential(formOf(exponent)))
}

/** @internal Whether a factor is at least 0 wherever it is a number: a root is of nothing else. */
export function isAtLeast0({ atom, power }: Factor): boolean {
  if (power % 2 !== 1 && power % 2 !== -1) return true
  switch (atom.kind) {
    case 'name':
      return /^([#%]|inf$)/.test(atom.name) || isRank(atom.name)
    case 'access':
      return false
    case 'sum':
      return formIsAtLeast0(atom.form)
    case 'if':
      return [atom.yes, atom.no].every(formIsAtLeast0)
    case 'reduce':
      return formIsAtLeast0(atom.body)
    case 'call':
      if (['exp', 'sigmoid', 'softplus', 'relu', 'abs'].includes(atom.fn)) return true
      if (atom.fn === 'max') return atom.args.some(formIsAtLeast0)
      return (
        (atom.fn === 'min' || atom.fn === 'pow') &&
        formIsAtLeast0(atom.args[0]!) &&
        (atom.fn === 'pow' || formIsAtLeast0(atom.args[1]!))
      )
  }
}

const formIsAtLeast0 = ({ terms }: Form): boolean =>
  terms.every(({ coefficient, factors }) => coefficient >= 0 && factors.every(isAtLeast0))

// What roots and logarithms may be taken of apart from the rest of a term
const apart = ({ terms: [term] }: Form): Form => single((term?.factors ?? []).filter(isAtLeast0))

// The size of an atom, of which an even power has a root or a logarithm
function sizeOf(atom: Atom): Form {
  const form = atomForm(atom)
  return isAtLeast0({ atom, power: 1 }) ? form : atomForm(call('abs', [form]))
}

/** @internal */
export function power(form: Form, exponent: number): Form {
  if (exponent === 1) return form
  if (exponent === 0) return number(1)
  const [term] = form.terms
  if (!term) return atomForm(call('pow', [form, number(exponent)]))
  if (form.terms.length === 1) {
    const { coefficient, factors } = term
    const exponents = factors.flatMap(({ atom, power }) =>
      argument(atom) ? [times(number(power * exponent), argument(atom)!)] : [],
    )
    const rest = factors.filter(({ atom }) => !argument(atom))
    // the root of a product is the product of roots where no two factors may be below 0
    const signed = Number.isInteger(exponent) ? [] : rest.filter((one) => !isAtLeast0(one))
    if (signed.length > 1 || (coefficient < 0 && !Number.isInteger(exponent))) {
      const group = formOf([termOf(Math.sign(coefficient), signed)])
      const others = factors.filter((one) => !signed.includes(one))
      const outside = formOf([termOf(Math.abs(coefficient), others)])
      const { atom } = wrapped(group).terms[0]!.factors[0]!
      return times(power(outside, exponent), single([{ atom, power: exponent }]))
    }
    const raised = rest.map((one): Factor => {
      const its = one.power * exponent
      const isEven = one.power % 2 === 0 && its % 2 !== 0
      const atom = isEven ? sizeOf(one.atom).terms[0]!.factors[0]!.atom : one.atom
      return { atom, power: its }
    })
    const value = formOf([termOf(coefficient ** exponent, raised)])
    return exponents.length > 0 ? times(value, exponential(plus(...exponents))) : value
  }
  const shared = Number.isInteger(exponent) ? common(form) : apart(common(form))
  if (shared.key !== '1')
    return times(power(shared, exponent), power(times(form, power(shared, -1)), exponent))
  // 1 / (1 + exp(-x))
  if (exponent === -1 && form.terms.length === 2) {
    const one = form.terms.find(({ factors, coefficient }) => !factors.length && coefficient === 1)
    const other = form.terms.find((each) => each !== one)!
    const x = exponentOf(other)
    if (one && x) return apply('sigmoid', [times(number(-1), x)])
  }
  if (Number.isInteger(exponent) && exponent > 0 && exponent <= 4)
    return times(form, power(form, exponent - 1))
  return formOf([termOf(1, [{ atom: wrapped(form).terms[0]!.factors[0]!.atom, power: exponent }])])
}

// D of n log(D)
function logIn({ factors: [factor, ...more] }: Term): Form | undefined {
  const atom = factor?.power === 1 && more.length === 0 ? factor.atom : undefined
  return atom?.kind === 'call' && atom.fn === 'log' ? atom.args[0] : undefined
}

const sumsUp = ({ terms }: Form): boolean =>
  terms.some(({ factors }) =>
    factors.some(({ atom }) => atom.kind === 'reduce' && atom.op === 'sum'),
  )

const isSize = ({ atom }: Factor) => atom.kind === 'name' && isRank(atom.name)

/** @internal */
export const readsTensors = ({ free }: { free: ReadonlySet<string> }): boolean =>
  [...free].some((one) => one.endsWith('[]'))

// Whether indices and inputs decide, which sums would only as they are rounded
const isGiven = (test: Condition) => test.height === 0

// if(t, x, 0) of indices, or of a weight: a key or a value that a tensor hides is an operand
function cutIn({ atom }: Factor) {
  if (atom.kind !== 'if' || atom.no.key !== '0' || !isGiven(atom.test)) return undefined
  const bends = ({ atom }: Factor) => atom.kind === 'call' && atom.height > 0
  const isWeight = atom.yes.terms.some(({ factors }) => factors.some(bends))
  return isWeight || !readsTensors(atom.test) ? atom : undefined
}

// if(t, b, -inf), which sizes and positive numbers may multiply
function hidingIn({ coefficient, factors }: Term) {
  const [mask, ...more] = factors.filter((one) => !isSize(one))
  const alone = mask?.power === 1 && more.length === 0 && coefficient > 0
  const found = alone && mask.atom.kind === 'if' && isGiven(mask.atom.test) && mask.atom
  return found && found.no.key === '-1 inf' ? found : undefined
}

/** @internal */
export function exponential(form: Form): Form {
  if (form.terms.length === 0) return number(1)
  // exp(a + if(t, b, -inf)) = if(t, exp(a + b), 0)
  for (const term of form.terms) {
    const mask = hidingIn(term)
    if (!mask) continue
    const rest = formOf(form.terms.filter((one) => one !== term))
    const others = term.factors.filter(({ atom }) => atom !== mask)
    const own = times(formOf([termOf(term.coefficient, others)]), mask.yes)
    return choose(mask.test, exponential(plus(rest, own)), number(0))
  }
  // exp(-log(1 + exp(-x)))
  const soft = form.height > 0 && form.terms.find((term) => onlyCall(term, 'softplus', -1))
  if (soft) {
    const rest = formOf(form.terms.filter((term) => term !== soft))
    const x = times(number(-1), onlyCall(soft, 'softplus', -1)!)
    return times(exponential(rest), apply('sigmoid', [x]))
  }
  // exp(n log x) = x^n of sums over a rank and of numbers; the logarithm of a tensor is a summand of a score
  const logs = form.terms.filter((term) => {
    const inner = logIn(term)
    if (!inner || inner.terms.length === 0) return false
    return (inner.terms.length === 1 && !readsTensors(inner)) || sumsUp(inner)
  })
  if (logs.length === 0) return atomForm(call('exp', [form]))
  const rest = form.terms.filter((term) => !logs.includes(term))
  return logs.reduce(
    (value, term) => times(value, power(logIn(term)!, term.coefficient)),
    exponential(formOf(rest)),
  )
}

/** @internal */
export function logarithm(form: Form): Form {
  const shared = apart(common(form))
  const inner = shared.key === '1' ? form : times(form, power(shared, -1))
  if (form.terms.length > 1) {
    // log(1 + exp(x))
    const soft = softplusOf(inner)
    const value = soft ?? atomForm(call('log', [inner]))
    return shared.key === '1' ? value : plus(logarithm(shared), value)
  }
  const { coefficient, factors } = form.terms[0] ?? { coefficient: 0, factors: [] }
  if (coefficient <= 0) return atomForm(call('log', [form]))
  const signed = factors.filter((one) => !isAtLeast0(one))
  const split = factors.filter((one) => signed.length < 2 || !signed.includes(one))
  const group = signed.length < 2 ? number(0) : atomForm(call('log', [single(signed)]))
  return plus(
    number(Math.log(coefficient)),
    group,
    ...split.map(({ atom, power }) => {
      const size = power % 2 === 0 ? sizeOf(atom) : atomForm(atom)
      return times(number(power), argument(atom) ?? atomForm(call('log', [size])))
    }),
  )
}

// x for a term exp(x), which sizes and positive numbers may multiply
function exponentOf({ coefficient, factors }: Term): Form | undefined {
  const exps = factors.filter(({ atom }) => argument(atom))
  const rest = factors.filter((one) => !exps.includes(one))
  const positive = rest.every(isSize)
  if (exps.length !== 1 || coefficient <= 0 || !positive) return undefined
  return plus(argument(exps[0]!.atom)!, logarithm(formOf([termOf(coefficient, rest)])))
}

// Whether two summands of scores are large, and small together: masks c (1 - x[m] y[p]), squares of (p + c - m)
function cancels({ coefficient, factors }: Term, constant: Term): boolean {
  if (constant.factors.length === 0 && Math.abs(constant.coefficient) < 100) return false
  const ratio = ratioOf(factors, constant.factors)
  const count = -constant.coefficient / coefficient
  const isMask = ({ atom, power }: Factor) =>
    power === 1 && ['access', 'if', 'call'].includes(atom.kind) && !argument(atom)
  if (ratio.length > 0 && ratio.every(isMask)) return count > 0 && count % 1 === 0
  // 2 a b, and a^2
  const isPart = ({ atom, power }: Factor) =>
    power === 1 ||
    (power === -1 && constant.factors.some((one) => one.power === 2 && one.atom.key === atom.key))
  const mixes = ratio.some(({ power }) => power < 0) && ratio.some(({ power }) => power > 0)
  return mixes && ratio.every(isPart) && Math.abs(count) === 0.5
}

// Compared so often that no form is made of it
function ratioOf(factors: readonly Factor[], others: readonly Factor[]): Factor[] {
  const ratio = new Map(factors.map((one) => [one.atom.key, one]))
  for (const { atom, power } of others) {
    const rest = (ratio.get(atom.key)?.power ?? 0) - power
    ratio.set(atom.key, { atom, power: rest })
    if (rest === 0) ratio.delete(atom.key)
  }
  return [...ratio.values()]
}

// With the summands that are small only together with such
function withCancelled(some: readonly Term[], all: readonly Term[]): readonly Term[] {
  const isWith = (a: Term) => some.some((b) => a === b || cancels(a, b) || cancels(b, a))
  const more = all.filter(isWith)
  return more.length > some.length ? withCancelled(more, all) : some
}

function softplusOf({ terms }: Form): Form | undefined {
  const one = terms.find(({ factors, coefficient }) => !factors.length && coefficient === 1)
  const other = terms.find((each) => each !== one)
  if (!one || !other || terms.length !== 2) return undefined
  const x = exponentOf(other)
  return x && apply('softplus', [x])
}

// What a function is of, if an atom is it
const inCall = (atom: Atom, fn: FunctionName): Form | undefined =>
  atom.kind === 'call' && atom.fn === fn ? atom.args[0] : undefined

function onlyCall(
  { factors: [factor, ...more], coefficient }: Term,
  fn: FunctionName,
  times = coefficient,
): Form | undefined {
  const alone = factor?.power === 1 && more.length === 0 && coefficient === times
  return alone ? inCall(factor.atom, fn) : undefined
}

// Sums that are one function of a score, under the spellings that weights have
function united(form: Form): Form {
  if (form.height === 0) return form
  for (const term of form.terms) {
    const c = term.coefficient
    const rest = formOf(form.terms.filter((one) => one !== term))
    const [turned, scaled] = [(x: Form) => times(number(-1), x), (x: Form) => times(number(c), x)]
    const is = (a: Form, b: Form) => a.key === b.key
    // 1 - sigmoid(x)
    const gate = onlyCall(term, 'sigmoid')
    if (gate && c < 0 && numberIn(rest) === -c)
      return times(number(-c), apply('sigmoid', [turned(gate)]))
    // (1 + tanh(x)) / 2
    const bent = onlyCall(term, 'tanh')
    if (bent && Math.abs(c) <= 1 && numberIn(rest) === Math.abs(c))
      return times(
        number(2 * Math.abs(c)),
        apply('sigmoid', [times(number(2 * Math.sign(c)), bent)]),
      )
    // x + abs(x)
    const size = c > 0 ? onlyCall(term, 'abs') : undefined
    for (const x of size ? [size, turned(size)] : [])
      if (is(rest, scaled(x))) return times(number(2), scaled(apply('relu', [x])))
    // x + softplus(-x), and relu(x) + softplus(-abs(x))
    const soft = onlyCall(term, 'softplus')
    if (!soft) continue
    if (is(rest, scaled(turned(soft)))) return scaled(apply('softplus', [turned(soft)]))
    const [above] = rest.terms
    const x = rest.terms.length === 1 ? onlyCall(above!, 'relu', c) : undefined
    const sizes = x ? [x, turned(x)].map((one) => turned(apply('abs', [one]))) : []
    if (sizes.some((one) => is(one, soft))) return scaled(apply('softplus', [x!]))
  }
  return form
}

// relu(x) x, and x if(x > 0, 1, 0)
function cutAt0(form: Form, x: Form): Form | undefined {
  const [term, ...more] = form.terms
  if (!term || more.length > 0 || form.height === 0) return undefined
  for (const { atom, power: exponent } of term.factors) {
    if (exponent >= 1 && inCall(atom, 'relu')?.key === x.key) return times(form, apply('relu', [x]))
    if (atom.kind !== 'if' || exponent !== 1 || !('form' in atom.test)) continue
    const { kind, form: below } = atom.test
    const [yes, no] = [atom.yes.key, atom.no.key]
    if (kind === '==' || kind === '!=') continue
    const cuts = yes === '1' && no === '0' && plus(below, x).terms.length === 0
    if (!cuts && !(yes === '0' && no === '1' && below.key === x.key)) continue
    const rest = term.factors.filter((one) => one.atom !== atom)
    return times(formOf([termOf(term.coefficient, rest)]), apply('relu', [x]))
  }
  return undefined
}

function call(fn: FunctionName, args: readonly Form[]): Atom {
  const key = `${fn}(${args.map((arg) => arg.key).join(', ')})`
  return { kind: 'call', fn, args, key, ...unite(args) }
}

// A name or a tensor alone
function isPlain({ terms }: Form): boolean {
  const [term, ...more] = terms
  const [factor, ...others] = term?.factors ?? []
  const single = term?.coefficient === 1 && more.length === 0 && others.length === 0
  return single && factor?.power === 1 && ['name', 'access'].includes(factor.atom.kind)
}

// v + 1, which reads beyond an axis of v alone
const isShift = ({ terms: [a, b, ...more] }: Form): boolean =>
  more.length === 0 &&
  [a, b].some((one) => one?.factors.length === 0) &&
  [a, b].some(
    (one) => one?.factors.length === 1 && one.coefficient === 1 && /^[#%a-z]/.test(one.key),
  )

// An index that is largest where its variables are; sizes and numbers have capitals
const rises = (index: Form): boolean =>
  !isShift(index) &&
  index.terms.every(
    ({ coefficient, factors }) =>
      factors.every(({ atom, power }) => atom.kind === 'name' && power > 0) &&
      (coefficient >= 0 || (factors.length > 0 && factors.every(isSize))),
  )

function apply(fn: FunctionName, args: readonly Form[]): Form {
  const [x, y] = args as [Form, Form]
  switch (fn) {
    case 'exp':
      return exponential(x)
    case 'exp2':
      return exponential(times(number(Math.LN2), x))
    case 'log':
      return logarithm(x)
    case 'log1p':
      return logarithm(plus(number(1), x))
    case 'sqrt':
      return power(x, 0.5)
    case 'rsqrt':
      return power(x, -0.5)
    case 'pow': {
      const exponent = numberIn(y)
      if (exponent !== undefined) return power(x, exponent)
      const isBase = (numberIn(x) ?? 0) > 0
      return isBase ? exponential(times(y, logarithm(x))) : atomForm(call(fn, args))
    }
    case 'max': {
      if (numberIn(y) === 0) return apply('relu', [x])
      if (numberIn(x) === 0) return apply('relu', [y])
      return atomForm(call(fn, [...args].sort(byKey)))
    }
    case 'min':
      for (const [a, b] of [args, [y, x]] as [Form, Form][])
        if (numberIn(b) === 0 && a.height > 0)
          return times(number(-1), apply('relu', [times(number(-1), a)]))
      return atomForm(call(fn, [...args].sort(byKey)))
    case 'sigmoid': {
      // sigmoid(log D - s) = D / (D + exp(s))
      if (!x.terms.some((term) => logIn(term) && sumsUp(logIn(term)!)))
        return atomForm(call(fn, args))
      const value = exponential(x)
      return times(value, power(plus(number(1), value), -1))
    }
    default:
      return atomForm(call(fn, args))
  }
}

function condition(bare: Bare<Condition>): Condition {
  if ('form' in bare) {
    const { free, height } = bare.form
    return { ...bare, key: `${bare.form.key} ${bare.kind} 0`, free, height }
  }
  const parts = [...bare.parts].sort(byKey)
  const key = `${bare.kind}(${parts.map((part) => part.key).join('; ')})`
  return { ...bare, parts, key, ...unite(parts) }
}

const distinct = (conditions: readonly Condition[]): Condition[] =>
  [...new Map(conditions.map((one) => [one.key, one])).values()].sort(byKey)

/** @internal The same with other forms in place of names. */
export function replace(form: Form, by: ReadonlyMap<string, Form>): Form {
  if (![...by.keys()].some((name) => form.free.has(name))) return form
  return plus(
    ...form.terms.map(({ coefficient, factors }) =>
      factors.reduce(
        (value, { atom, power: exponent }) => times(value, power(replaceAtom(atom, by), exponent)),
        number(coefficient),
      ),
    ),
  )
}

function replaceAtom(atom: Atom, by: ReadonlyMap<string, Form>): Form {
  if (atom.kind === 'name') return by.get(atom.name) ?? atomForm(atom)
  return rebuilt(atom, (form) => replace(form, by))
}

/** @internal An atom of other forms. */
export function rebuilt(atom: Atom, inside: (form: Form) => Form): Form {
  const tested = (one: Condition): Condition =>
    condition(
      'form' in one
        ? { kind: one.kind, form: inside(one.form) }
        : { kind: one.kind, parts: one.parts.map(tested) },
    )
  switch (atom.kind) {
    case 'name':
      return atomForm(atom)
    case 'access':
      return access(atom.name, atom.indices.map(inside))
    case 'call':
      return apply(atom.fn, atom.args.map(inside))
    case 'if':
      return choose(tested(atom.test), inside(atom.yes), inside(atom.no))
    case 'sum':
      return power(inside(atom.form), 1)
    case 'reduce':
      return reduction(atom.op, atom.over, inside(atom.body), atom.where.map(tested))
  }
}

function replaceCondition(one: Condition, by: ReadonlyMap<string, Form>): Condition {
  return condition(
    'form' in one
      ? { kind: one.kind, form: replace(one.form, by) }
      : { kind: one.kind, parts: one.parts.map((part) => replaceCondition(part, by)) },
  )
}

function choose(test: Condition, yes: Form, no: Form): Form {
  // if(x > 0, x, 0) and if(x < 0, 0, x)
  if ('form' in test && test.kind !== '==' && test.kind !== '!=') {
    if (no.key === '0' && plus(test.form, yes).key === '0') return apply('relu', [yes])
    if (yes.key === '0' && test.form.key === no.key) return apply('relu', [no])
    // if(x > 0, x * x, 0)
    for (const n of [2, 3]) {
      const [x, other] = no.key === '0' ? [times(number(-1), test.form), yes] : [test.form, no]
      const cuts = other.height > 0 && x.terms.length < 4 && (no.key === '0' || yes.key === '0')
      if (cuts && power(x, n).key === other.key) return power(apply('relu', [x]), n)
    }
  }
  const key = `if(${test.key}, ${yes.key}, ${no.key})`
  return atomForm({ kind: 'if', test, yes, no, key, ...unite([test, yes, no]) })
}

/**
 * @internal Whether another summand of an exponent, so many times, is what has to be taken off for a variable to be a
 * distance: a p - a m
 */
export function meets(term: Term, variable: string, other: Term, times = 1): boolean {
  if (other.coefficient * times !== -term.coefficient) return false
  const form = formOf([{ ...term, coefficient: 1 }])
  return [...other.factors]
    .flatMap(({ atom }) => [...atom.free])
    .some((index) => {
      const plain = !index.endsWith('[]') && index !== variable
      return plain && replace(form, new Map([[variable, name(index)]])).key === other.key
    })
}

/**
 * @internal Whether summands of an exponent are a difference of two positions or tokens, as a p - a m and c[p] - d[m]: what is
 * far from 1 in parts where the whole is not.
 */
export function isDifference(a: Term, b: Term, key: string): boolean {
  const [one, other] = formOf([a]).free.has(key) ? [a, b] : [b, a]
  const isToken = ({ factors }: Term) =>
    factors.some(({ atom }) => atom.kind === 'access') &&
    factors.every(({ atom, power }) => power === 1 && ['access', 'name'].includes(atom.kind))
  const opposed = one.coefficient * other.coefficient < 0
  return meets(one, key, other) || (opposed && isToken(one) && isToken(other))
}

/** @internal The rank that a bound variable runs over. */
export const rankIn = (bound: string): string => bound.replace(/^[#%]\d+/, '')

/**
 * @internal A reduction as it stands, with its variables named by height and rank, in an order that does not depend on the text.
 */
export function reduction(
  op: Reducer,
  over: readonly string[],
  body: Form,
  where: readonly Condition[],
): Form {
  const anonymous = new Map(over.map((v) => [v, name(`_${rankIn(v)}`)]))
  const signature = (v: string) => {
    const by = new Map([...anonymous, [v, name(`@${rankIn(v)}`)]])
    return [replace(body, by).key, ...where.map((one) => replaceCondition(one, by).key)].join(';')
  }
  const ordered =
    over.length < 2 ? over : [...over].sort((a, b) => (signature(a) < signature(b) ? -1 : 1))
  const height = unite([body, ...where]).height
  const names = ordered.map((v, i) => `#${height + i + 1}${rankIn(v)}`)
  const by = new Map(ordered.map((v, i) => [v, name(names[i]!)]))
  const inner = replace(body, by)
  // the end of a rank ends nothing
  const ends = new Set(
    names.map((v) => `${minus(plus(name(v), number(1)), name(rankIn(v))).key} <= 0`),
  )
  const limits = distinct(where.map((one) => replaceCondition(one, by))).filter(
    ({ key }) => !ends.has(key),
  )
  const limit = limits.length > 0 ? ` : ${limits.map(({ key }) => key).join(', ')}` : ''
  const key = `${op}(${names.join(',')}${limit} | ${inner.key})`
  const atom = { kind: 'reduce', op, over: names, body: inner, where: limits, key } as const
  return atomForm({ ...atom, ...unite([inner, ...limits], names) })
}

/** @internal The normal forms of the outputs of a cascade, and of everything on the way. */
export class Normal {
  readonly forms = new Map<
    string,
    { form: Form; where: readonly Condition[]; left: readonly string[] }
  >()
  /**
   * Tables of the inputs that are read page by page, as K[table[m1],m0,e] of a split rank, or '' for several; they have m here.
   */
  readonly pages = new Map<string, string>()
  /** Of the kept tensors those that were taken apart after all. */
  readonly taken = new Set<string>()
  /** Of the kept tensors those that no form says. */
  readonly unsaid = new Set<string>()
  /** A tensor whose points may be empty for what they read beyond an axis or of a masked state: no form says that. */
  beyond: string | undefined
  /** Whether the text has an exponential of a difference of positions or tokens. */
  differs = false
  /** Scalars that masks compare as whole numbers. */
  readonly whole = new Set<string>()
  /** Reads of inputs that a call has to have room for, as of Q[p,2*r + 1]: where they may not end beyond an axis. */
  readonly reaches: { tensor: string; axis: number; index: Form }[] = []
  // An index that no axis ends before, those of a split rank together too
  private readonly isWithin = (index: Form): boolean =>
    isPlain(index) ||
    index.key === '0' ||
    this.ir.splits.some(({ outer, inner }) => {
      const whole = plus(times(name(outer), name(rankOf(inner))), name(inner))
      return index.key === whole.key
    })
  private current = ''
  private readonly states = new Map<string, State>()
  private fresh = 0

  /** Tensors that are `kept` stay what they are where they are read; true for those that are read once. */
  constructor(
    private readonly ir: CascadeIR,
    readonly kept: ReadonlyMap<string, boolean> = new Map(),
  ) {
    scalars = new Set(ir.scalars)
    for (const step of ir.steps) {
      if ('body' in step)
        for (const one of arrangedBody(step.body)) this.iterated(one, step.variable)
      else if (statementStarts(step)) this.start(step)
      else this.define(step)
    }
    for (const tensor of ir.outputs) {
      const marks = [...(this.forms.get(tensor)?.form.free ?? [])]
      this.beyond ??= marks.find((one) => one.endsWith('?[]'))?.slice(0, -3)
    }
  }

  // Whether indices are in it, and no tensors
  private moves({ free }: Form): boolean {
    const names = [...free].filter((one) => !/^[A-Z]/.test(one))
    return (
      names.every((one) => !one.endsWith('[]')) &&
      names.some((one) => !this.ir.scalars.includes(one))
    )
  }

  // Scores may have slopes, which are no factors of queries and keys
  private isOfDifference(terms: readonly Term[]): boolean {
    const forms = terms.map((one) => formOf([one]))
    const variables = forms.map(({ free }) => this.ir.variables.filter((v) => free.has(v)))
    const isScore = (...two: string[]) =>
      forms.some(({ free, height }) => height > 0 && two.every((v) => free.has(v)))
    return terms.some((one, i) =>
      terms.some((other, j) => {
        const rows = variables[j]!.filter((w) => !variables[i]!.includes(w))
        return variables[i]!.some(
          (v) => isDifference(one, other, v) && !rows.some((w) => isScore(v, w)),
        )
      }),
    )
  }

  private define(statement: Statement): void {
    const { name, indices } = statement.out
    const left = indices.map((index) => plainVariable(index)!)
    const { beyond } = this
    this.forms.set(name, { ...this.right(statement), left })
    // it is made as the text says
    if (!this.kept.has(name) || this.beyond === beyond) return
    this.beyond = beyond
    this.unsaid.add(name)
  }

  // init R[i=0,…]
  private start(statement: Statement): void {
    const at = statement.out.indices.findIndex(({ kind }) => kind === 'pin')
    const left = statement.out.indices.map((index) => plainVariable(index) ?? '')
    const { form, where } = this.right(statement)
    const whole = where.length === 0 && this.hasRoom(this.outside(form))
    this.states.set(statement.out.name, { at, left, initial: form, whole, closed: undefined })
  }

  private iterated(statement: Statement, variable: string): void {
    const { name: tensor, indices } = statement.out
    const state = this.states.get(tensor)
    if (!state || stepOf(indices[state.at]!, variable) !== 1) {
      this.define(statement)
      return
    }
    const left = indices.map((index, i) => (i === state.at ? variable : plainVariable(index)!))
    const { form, where } = this.right(statement)
    // A step that reads an empty coordinate leaves all after it empty
    state.whole &&= where.length === 0 && this.hasRoom(this.outside(form))
    if (state.whole)
      state.closed =
        this.solve(tensor, left, variable, state.initial, form) ??
        this.solveLogarithm(tensor, left, variable, state.initial, form)
    state.left = left
  }

  // Reads that may fall beyond an axis, but in reductions, which skip what is not there
  private outside({ terms }: Form, chosen = false): Read[] {
    const inside = (atom: Atom): Read[] => {
      if (atom.kind === 'call') return atom.args.flatMap((one) => this.outside(one, chosen))
      if (atom.kind === 'sum') return this.outside(atom.form, chosen)
      if (atom.kind === 'if') return [atom.yes, atom.no].flatMap((one) => this.outside(one, true))
      if (atom.kind !== 'access' || this.states.has(atom.name)) return []
      const made = this.forms.get(atom.name)
      const within = atom.indices.every(this.isWithin)
      return within && (!made || this.outside(made.form).length === 0) ? [] : [{ atom, chosen }]
    }
    return terms.flatMap(({ factors }) => factors.flatMap(({ atom }) => inside(atom)))
  }

  // Whether a call can tell that none of these falls beyond an axis, as a read at r + R cannot where r ends
  private hasRoom(reads: readonly Read[]): boolean {
    return reads.every(({ atom: { name: tensor, indices }, chosen }) => {
      const made = this.forms.get(tensor)
      if (made) return indices.every(this.isWithin) && this.hasRoom(this.outside(made.form))
      const computed = indices.flatMap((index, axis) =>
        this.isWithin(index) ? [] : [{ tensor, axis, index }],
      )
      this.reaches.push(...computed)
      return !chosen && computed.every(({ index }) => rises(index))
    })
  }

  // R[i+1] = log(A[i] + exp(R[i]) g(i) / g(i+1))
  private solveLogarithm(
    tensor: string,
    left: readonly string[],
    variable: string,
    initial: Form,
    form: Form,
  ): State['closed'] {
    const start = initial.key === '-1 inf' ? number(0) : exponential(initial)
    const before = exponential(access(tensor, left.map(name)))
    const closed = this.solve(tensor, left, variable, start, exponential(form), before)
    return closed && ((index) => logarithm(closed(index)))
  }

  // R[i+1] = A[i] + R[i] g(i) / g(i+1), as a function of i
  private solve(
    tensor: string,
    left: readonly string[],
    variable: string,
    initial: Form,
    form: Form,
    before = access(tensor, left.map(name)),
  ): State['closed'] {
    const [{ atom: state }] = before.terms[0]!.factors as [Factor]
    const old = argument(state)
    const isBefore = ({ atom }: Factor) =>
      old
        ? argument(atom)?.terms.some(({ key, coefficient }) => key === old.key && coefficient === 1)
        : atom.key === state.key
    const own = form.terms.filter(({ factors }) => factors.some(isBefore))
    const rest = formOf(form.terms.filter((term) => !own.includes(term)))
    const factor = times(formOf(own), power(before, -1))
    if ([rest, factor].some(({ free }) => free.has(`${tensor}[]`))) return undefined
    const next = new Map([[variable, plus(name(variable), number(1))]])
    let g = number(1)
    let constant = true
    let decays = true
    if (factor.key !== '1') {
      const [term, ...more] = factor.terms
      // a number of any kind; the call refuses one that is not above 0
      decays = !!term && !factor.free.has(variable) && (more.length > 0 || term.coefficient > 0)
      if (!decays && (!term || more.length > 0 || term.coefficient !== 1)) return undefined
      const others = decays ? [] : term!.factors.filter(({ atom }) => !argument(atom))
      const shifted = decays ? undefined : term!.factors.find(({ atom }) => argument(atom))
      const exponent = decays ? logarithm(factor) : shifted ? argument(shifted.atom)! : number(0)
      constant = others.length === 0 && !exponent.free.has(variable)
      // What a step has and takes away again in the next; a constant is a step of a line
      const opposed = (part: Term) => {
        const [ahead] = replace(formOf([part]), next).terms
        return exponent.terms.some(
          ({ key, coefficient }) => key === ahead?.key && coefficient === -ahead.coefficient,
        )
      }
      g = exponential(
        constant
          ? times(times(number(-1), exponent), name(variable))
          : formOf(exponent.terms.filter(opposed)),
      )
      // sums that a step multiplies by and the next divides by
      const met = others.filter(({ atom, power }) => {
        const ahead = replace(atomForm(atom), next).key
        return others.some((one) => one.atom.key === ahead && one.power === -power)
      })
      g = times(g, formOf([termOf(1, met)]))
    }
    const after = replace(g, next)
    if (!decays && times(times(factor, after), power(g, -1)).key !== '1') return undefined
    const added = times(rest, after)
    // A running maximum has no value before the first step
    if (initial.terms.length > 0 && !constant) return undefined
    return (index: Form) => {
      const u = `%${++this.fresh}${rankOf(variable)}`
      const body = replace(added, new Map([[variable, name(u)]]))
      // The sum over all of the rank has no end inside it
      const where =
        index.key === rankOf(variable)
          ? []
          : [condition({ kind: '<=', form: plus(name(u), number(1), times(number(-1), index)) })]
      const from = (i: Form) => this.rejoined(replace(g, new Map([[variable, i]])))
      const sum = this.sum(u, body, where)
      const whole = initial.terms.length > 0 ? plus(times(from(number(0)), initial), sum) : sum
      return times(power(from(index), -1), whole)
    }
  }

  private right(statement: Statement): { form: Form; where: readonly Condition[] } {
    const reads: Condition[] = []
    this.current = statement.out.name
    let form = this.expr(statement.expr, reads)
    const own = statement.where ? this.predicate(statement.where, reads) : []
    let where = distinct([...reads, ...own])
    const over = statement.reduce?.over ?? []
    if (statement.reduce && over.length > 0) {
      const { op } = statement.reduce
      // What a predicate of the left hides is empty; what sees no point otherwise is what the reduction begins with
      const names = statement.where ? namesIn(statement.where) : new Set()
      const hides = !over.some((v) => names.has(v))
      const inner = distinct(hides ? reads : where)
      const outside = this.outside(form)
      const apart = ({ atom }: Read) => !over.some((v) => atom.free.has(v))
      // summands that all read what is not there are skipped together
      const alike = ({ atom }: Read) =>
        form.terms.every(({ factors }) => factors.some((one) => one.atom.key === atom.key))
      const needed = (form.terms.length > 1 && !outside.every(alike)) || outside.some(apart)
      const logsum = op === 'logsumexp'
      const count = this.reaches.length
      const lacks = needed && !this.hasRoom(outside)
      if (lacks) this.reaches.length = count // it is refused, or a maximum
      where = hides ? distinct(own) : []
      // A maximum that is taken off again may be what it is
      const left = statement.out.indices.map((index) => plainVariable(index))
      if (lacks && op === 'max' && left.every((one) => one !== undefined))
        return { form: access(`${this.current}?`, left.map(name)), where }
      if (lacks) this.beyond = statement.out.name
      if (op === 'sum' || logsum) {
        if (logsum) form = exponential(form)
        let left = inner
        for (const [i, v] of [...over.entries()].reverse()) {
          const own = left.filter(({ free }) => i === 0 || free.has(v))
          left = left.filter((one) => !own.includes(one))
          form = this.sum(v, form, own)
        }
        if (logsum) form = logarithm(form)
      } else {
        const by = new Map(over.map((v) => [v, name(`%${++this.fresh}${rankOf(v)}`)]))
        form = reduction(
          op,
          [...by.values()].map(({ key }) => key),
          replace(form, by),
          inner.map((one) => replaceCondition(one, by)),
        )
      }
    }
    return { form, where }
  }

  // The sum over one variable: what does not depend on it goes in front, sums inside join it
  private sum(variable: string, form: Form, where: readonly Condition[]): Form {
    const depends = ({ free }: { free: ReadonlySet<string> }) => free.has(variable)
    return plus(
      ...form.terms.map((term) => {
        // if(t, x, 0) of what is summed is x where t holds
        const cuts = term.factors.flatMap((one) => (one.power === 1 && cutIn(one)) || [])
        const cut = cuts.find(({ test }) => depends(test))
        if (cut) {
          const others = term.factors.filter(({ atom }) => atom !== cut)
          const rest = formOf([termOf(term.coefficient, others)])
          const { test, yes } = cut
          const more = test.kind === 'and' ? test.parts : [test]
          return this.sum(variable, times(rest, yes), distinct([...where, ...more]))
        }
        let outside = number(term.coefficient)
        let inside = number(1)
        let over = [variable]
        let limits = [...where]
        for (const { atom, power: exponent } of term.factors) {
          const inner = argument(atom)
          if (inner) {
            // an infinity that cancels would leave what is not infinite
            const varying = inner.terms.filter(({ factors }) =>
              factors.some(({ atom }) => depends(atom) || atom.key === 'inf'),
            )
            const staying = withCancelled(varying, inner.terms)
            const parts = [true, false].map((wanted) =>
              formOf(inner.terms.filter((one) => staying.includes(one) === wanted)),
            )
            inside = times(inside, exponential(parts[0]!))
            outside = times(outside, exponential(parts[1]!))
          } else if (!depends(atom)) {
            outside = times(outside, power(atomForm(atom), exponent))
          } else if (atom.kind === 'reduce' && atom.op === 'sum' && exponent === 1) {
            const by = new Map(
              atom.over.map((v) => [v, name(`%${++this.fresh}${rankIn(v)}`)] as const),
            )
            inside = times(inside, replace(atom.body, by))
            over = [...over, ...[...by.values()].map(({ key }) => key)]
            limits = [...limits, ...atom.where.map((one) => replaceCondition(one, by))]
          } else inside = times(inside, power(atomForm(atom), exponent))
        }
        if (inside.terms.length !== 1)
          return times(
            outside,
            plus(...inside.terms.map((one) => this.sum(variable, formOf([one]), where))),
          )
        if (!depends(inside) && limits.length === 0)
          return times(outside, times(name(rankOf(variable)), inside))
        return times(outside, this.joined(over, inside, limits))
      }),
    )
  }

  // Sums that no longer end inside a rank may be sums over all of it
  private rejoined({ terms }: Form): Form {
    return plus(
      ...terms.map(({ coefficient, factors }) =>
        factors.reduce((value, { atom, power: exponent }) => {
          const sum = atom.kind === 'reduce' && atom.op === 'sum'
          const own = sum ? this.joined(atom.over, atom.body, atom.where) : atomForm(atom)
          return times(value, power(own, exponent))
        }, number(coefficient)),
      ),
    )
  }

  private joined(over: readonly string[], body: Form, where: readonly Condition[]): Form {
    const named = (v: string) =>
      v.startsWith('%') ? v : `%${++this.fresh}${v.startsWith('#') ? rankIn(v) : rankOf(v)}`
    const by = new Map(over.map((v) => [v, name(named(v))]))
    let variables = over.map((v) => by.get(v)!.key)
    let inner = replace(body, by)
    let limits = where.map((one) => replaceCondition(one, by))
    // m1*M0 + m0 over both is m: with m1 = (m - m0) / M0 the parts are gone
    for (const { variable, outer, inner: low } of this.ir.splits) {
      const [a, b] = [outer, low].map((v) => variables.find((x) => rankIn(x) === rankOf(v)))
      if (a === undefined || b === undefined) continue
      const whole = `%${++this.fresh}${rankOf(variable)}`
      const apart = times(minus(name(whole), name(b)), power(name(rankOf(low)), -1))
      const together = new Map([[a, apart]])
      const merged = replace(inner, together)
      const mergedLimits = limits.map((one) => replaceCondition(one, together))
      if ([merged, ...mergedLimits].some(({ free }) => free.has(b))) continue
      inner = merged
      limits = mergedLimits
      variables = [...variables.filter((x) => x !== a && x !== b), whole]
    }
    return reduction('sum', variables, inner, limits)
  }

  private expr(expr: Expr, limits: Condition[]): Form {
    switch (expr.kind) {
      case 'number':
        return Number.isFinite(expr.value) ? number(expr.value) : name('inf')
      case 'name':
        return name(expr.name)
      case 'access':
        return this.access(expr, limits)
      case 'negate':
        return times(number(-1), this.expr(expr.x, limits))
      case 'call': {
        const args = expr.args.map((arg) => this.expr(arg, limits))
        const [x, y] = args as [Form, Form]
        // a decay to the power of a distance; what is below 0 may have other powers
        const isDecay = expr.fn === 'pow' && isPlain(x) && this.moves(y)
        const value = isDecay ? exponential(times(y, logarithm(x))) : apply(expr.fn, args)
        this.differs ||= value.terms.some(({ factors }) =>
          factors.some(({ atom }) => this.isOfDifference(argument(atom)?.terms ?? [])),
        )
        return value
      }
      case 'if': {
        const [yes, no] = [this.expr(expr.yes, limits), this.expr(expr.no, limits)]
        // what is hidden stands behind
        const swaps =
          [yes.key, no.key].indexOf('-1 inf') === 0 || (yes.key === '0' && no.key !== '-1 inf')
        const [test] = this.predicate(expr.test, limits, true)
        if (!swaps || !isGiven(test!)) return choose(test!, yes, no)
        const [other] = this.predicate(expr.test, limits, true, true)
        return choose(other!, no, yes)
      }
      case 'binary': {
        const [a, b] = [this.expr(expr.a, limits), this.expr(expr.b, limits)]
        if (expr.op === '*') return cutAt0(a, b) ?? cutAt0(b, a) ?? times(a, b)
        if (expr.op === '/') return times(a, power(b, -1))
        return united(expr.op === '+' ? plus(a, b) : minus(a, b))
      }
    }
  }

  private access({ name: tensor, indices }: Access, limits: Condition[]): Form {
    const forms = indices.map((index) => this.index(index, limits))
    return this.read(
      tensor,
      this.ir.inputs.includes(tensor) ? this.paged(tensor, forms) : forms,
      limits,
    )
  }

  // [table[b,m1],m0,…] as [b,m,…]
  private paged(tensor: string, indices: readonly Form[]): readonly Form[] {
    for (const [at, index] of indices.entries()) {
      const page = index.terms[0]?.factors[0]?.atom
      const inner = indices[at + 1]
      if (page?.kind !== 'access' || page.key !== index.key || !inner) continue
      const outer = page.indices.at(-1)
      const { splits } = this.ir
      if (!outer || !splits.some((one) => one.outer === outer.key && one.inner === inner.key))
        continue
      const table = this.pages.get(tensor) ?? page.name
      this.pages.set(tensor, table === page.name ? table : '')
      const whole = plus(times(outer, name(rankOf(inner.key))), inner)
      return [
        ...indices.slice(0, at),
        ...page.indices.slice(0, -1),
        whole,
        ...indices.slice(at + 2),
      ]
    }
    return indices
  }

  private index(index: Index, limits: Condition[]): Form {
    if (index.kind === 'pin') return number(index.value)
    const form = this.expr(index.expr, limits)
    if (index.kind === 'expr') return form
    return atomForm(
      call('min', [atomForm(call('max', [form, number(index.least)])), number(index.most)]),
    )
  }

  private read(tensor: string, indices: readonly Form[], limits: Condition[]): Form {
    const state = this.states.get(tensor)
    if (state) {
      // what reads it is empty too, even if it cancels, as a running maximum does
      if (!state.whole) this.beyond = this.current
      if (!state.closed) return access(tensor, indices)
      const by = new Map(state.left.map((v, i) => [v, indices[i]!]))
      const at = state.left[state.at]!
      const index = by.get(at)!
      by.delete(at)
      return replace(state.closed(index), by)
    }
    const known = this.forms.get(tensor)
    if (!known) return access(tensor, indices)
    const by = new Map(known.left.map((v, i) => [v, indices[i]!]))
    limits.push(...known.where.map((one) => replaceCondition(one, by)))
    if (this.kept.has(tensor)) return access(tensor, indices)
    if (!indices.every(this.isWithin)) this.beyond = this.current
    return replace(known.form, by)
  }

  // Conjuncts; indices are integers, so `a < b` is `a + 1 <= b`
  private predicate(one: Predicate, limits: Condition[], whole = false, not = false): Condition[] {
    switch (one.kind) {
      case 'not':
        return this.predicate(one.x, limits, whole, !not)
      case 'or':
      case 'and': {
        const kind = not ? opposite[one.kind] : one.kind
        const parts = [one.a, one.b].flatMap((x) =>
          this.predicate(x, limits, kind === 'or' || whole, not),
        )
        return kind === 'and' && !whole ? parts : [condition({ kind, parts })]
      }
      case 'compare': {
        const op = not ? opposite[one.op] : one.op
        const [a, b] = [this.expr(one.a, limits), this.expr(one.b, limits)]
        const difference = op === '<' || op === '<=' ? minus(a, b) : minus(b, a)
        if (op === '==' || op === '!=') {
          const other = minus(a, b)
          const form = difference.key < other.key ? difference : other
          return [condition({ kind: op, form })]
        }
        if (op === '<=' || op === '>=') return [condition({ kind: '<=', form: difference })]
        // 1 more of what counts; m < M / 2 does not, nor do scalars alone
        const counts =
          [...difference.free].some((one) => !this.ir.scalars.includes(one)) &&
          !readsTensors(difference) &&
          difference.terms.every(
            ({ coefficient, factors }) =>
              Number.isInteger(coefficient) && factors.every(({ power }) => power > 0),
          )
        if (counts)
          for (const one of this.ir.scalars) if (difference.free.has(one)) this.whole.add(one)
        return counts
          ? [condition({ kind: '<=', form: plus(difference, number(1)) })]
          : [condition({ kind: '<', form: difference })]
      }
    }
  }
}

const opposite = {
  and: 'or',
  or: 'and',
  '<': '>=',
  '<=': '>',
  '>': '<=',
  '>=': '<',
  '==': '!=',
  '!=': '==',
} as const

// Statements of a loop behind those that make what they read: a state of the step before is known by its recurrence
function arrangedBody(body: readonly Statement[]): Statement[] {
  const left = [...body]
  const done: Statement[] = []
  while (left.length > 0) {
    const waits = (one: Statement) =>
      readsOf(one).some(({ name }) => left.some(({ out }) => out.name === name && out !== one.out))
    const ready = left.findIndex((one) => !waits(one))
    done.push(...left.splice(Math.max(ready, 0), 1))
  }
  return done
}

// A read, and whether only one branch of a choice makes it
interface Read {
  atom: Atom & { kind: 'access' }
  chosen: boolean
}

interface State {
  at: number
  left: readonly string[]
  initial: Form
  /** No coordinate of the first is empty, and no step leaves one so. */
  whole: boolean
  closed: ((index: Form) => Form) | undefined
}

function statementStarts({ init, out }: Statement): boolean {
  return init && out.indices.some(({ kind }) => kind === 'pin')
}
