import { HeddleError } from '../errors.js'
import type { Analysis } from './analyze.js'
import { type Product, productOf, variablesIn } from './cost.js'
import {
  type Access,
  type CascadeIR,
  type Expr,
  type Index,
  type Iteration,
  type Predicate,
  rankOf,
  rewrite,
  rewriteTest,
  type Span,
  type Split,
  type Statement,
  sizedRanks,
  tensorsOf,
  visitAccesses,
  visitExprs,
  visitPredicate,
} from './ir.js'
import { parse } from './parse.js'
import { print, printExpr, printPredicate } from './print.js'
import { untoldRanks } from './sizes.js'
import { plainVariable, readsOf, validate } from './validate.js'

/** A rewrite of a cascade that computes the same, in no more passes. */
export interface Suggestion {
  rule: 'defer-division' | 'iterate-max' | 'precompute-delta' | 'split-kv' | 'partition'
  /** What it changes. */
  effect: string
  /** The whole cascade, rewritten. */
  rewritten: string
}

type Draft = Pick<CascadeIR, 'ranks' | 'splits' | 'steps'>
type Candidate = {
  rule: Suggestion['rule']
  draft: Draft
  effect: string
  rank?: string | undefined
}

/** @internal Rewrites that apply and pay: each is read back and analysed, and dropped if any rank gets more passes. */
export function suggest(
  ir: CascadeIR,
  before: Analysis,
  tile: number,
  sizes: ReadonlyMap<string, number>,
  analyze: (ir: CascadeIR) => Analysis,
): Suggestion[] {
  const suggestions: Suggestion[] = []
  const untold = new Set(untoldRanks(ir))
  for (const { rule, draft, effect, rank } of candidates(ir, before, tile, sizes)) {
    const rewritten = print(withoutUnread(ir, draft))
    let after: Analysis
    try {
      const other = validate(parse(rewritten))
      // one that asks for a size that the text tells is no help
      if (untoldRanks(other).some((one) => !untold.has(one))) continue
      after = analyze(other)
    } catch (error) {
      // a rewrite may need a size that its text does not fit, such as one declared for a rank that is gone
      if (error instanceof HeddleError) continue
      throw error
    }
    const fewer: string[] = []
    let more = false
    for (const [name, { headline }] of Object.entries(before.passes)) {
      const now = after.passes[name]?.headline ?? 1
      if (now > headline) more = true
      if (now < headline) fewer.push(`${name}: ${headline} -> ${now} passes`)
    }
    const cheaper = operations(after) < operations(before)
    const pays =
      rule === 'partition' ||
      (rule === 'defer-division' && cheaper) ||
      fewer.some((one) => rank === undefined || one.startsWith(`${rank}:`))
    if (more || !pays) continue
    suggestions.push({ rule, effect: [...fewer, effect].join('; '), rewritten })
  }
  return suggestions
}

const operations = ({ flops }: Analysis): number =>
  flops.reduce((sum, { mulAdd, exp, other }) => sum + mulAdd + exp + other, 0)

// A rewrite may leave statements behind that nothing reads any more
function withoutUnread(ir: CascadeIR, draft: Draft): Draft {
  for (let steps = draft.steps; ; ) {
    const read = new Set(ir.outputs)
    const note = (one: Expr) => {
      if (one.kind === 'access') read.add(one.name)
    }
    for (const step of steps) {
      for (const { expr, where } of 'body' in step ? step.body : [step]) {
        visitExprs(expr, note)
        if (where) visitPredicate(where, note)
      }
    }
    const kept = steps.filter((step) => 'body' in step || step.init || read.has(step.out.name))
    if (kept.length === steps.length) return { ...draft, steps }
    steps = kept
  }
}

function* candidates(
  ir: CascadeIR,
  before: Analysis,
  tile: number,
  sizes: ReadonlyMap<string, number>,
): Generator<Candidate> {
  const deferred = deferDivision(ir)
  if (deferred) yield { rule: 'defer-division', ...deferred }
  for (const { name, levels } of ir.families) {
    const [variable] = levels
    if (levels.length > 1 || variable === undefined) continue
    const headline = before.passes[name]?.headline ?? 1
    if (headline > 1) {
      const delta = precomputeDelta(ir, variable)
      if (delta) yield { rule: 'precompute-delta', rank: name, ...delta }
    }
    const plan = planOf(ir, variable)
    if (!plan) continue
    if (plan.shifted.length > 0 && headline > 1) {
      const scaled = plan.scale.map((one) => `; ${one} must be above 0`).join('')
      const reductions = [...plan.maxima, ...plan.logs, ...plan.sums.map(({ one }) => one)]
      if (reductions.every((one) => !emptiedBy(one, plan)))
        yield {
          rule: 'iterate-max',
          rank: name,
          draft: runningForm(ir, plan, tile),
          effect: `results so far are corrected whenever the running maximum over ${variable} grows${scaled}`,
        }
      yield {
        rule: 'split-kv',
        rank: name,
        draft: mergedForm(ir, plan, tile),
        effect: `parts of ${tile} along ${variable} run side by side, and results of size ${name}1 are merged${scaled}`,
      }
    } else if (
      plan.shifted.length === 0 &&
      plan.before.length > 0 &&
      !((sizes.get(name) ?? Number.POSITIVE_INFINITY) <= tile)
    ) {
      yield {
        rule: 'partition',
        rank: name,
        draft: mergedForm(ir, plan, tile),
        effect: `parts of ${tile} along ${variable} run side by side, and their results are reduced once more`,
      }
    }
  }
}

const nowhere: Span = [1, 1, 0]
const name = (text: string): Expr => ({ kind: 'name', name: text, span: nowhere })
const plain = (variable: string): Index => ({ kind: 'expr', expr: name(variable) })
const access = (tensor: string, indices: readonly Index[]): Access => ({
  kind: 'access',
  name: tensor,
  indices,
  span: nowhere,
})
const on = (tensor: string, variables: readonly string[]): Access =>
  access(tensor, variables.map(plain))
const binary = (op: '+' | '-' | '*' | '/', a: Expr, b: Expr): Expr => ({
  kind: 'binary',
  op,
  a,
  b,
  span: nowhere,
})
const call = (fn: 'exp' | 'exp2' | 'log' | 'max', ...args: Expr[]): Expr => ({
  kind: 'call',
  fn,
  args,
  span: nowhere,
})
const number = (value: number): Expr => ({ kind: 'number', value, span: nowhere })

function statement(
  out: Access,
  expr: Expr,
  more: Partial<Pick<Statement, 'reduce' | 'where' | 'init'>> = {},
): Statement {
  const { reduce, where, init = false } = more
  const named = reduce && reduce.over.length > 0 ? reduce : undefined
  return { out, expr, reduce: named, where, init, src: { line: 1, col: 1, text: '' } }
}

function quotient(factors: readonly Expr[], divisors: readonly Expr[]): Expr {
  const [first = number(1), ...rest] = factors
  const product = rest.reduce((a, b) => binary('*', a, b), first)
  return divisors.reduce((a, b) => binary('/', a, b), product)
}

interface Namer {
  (wanted: string): string
  /** A variable that no name of the text is, and neither is its rank. */
  variable(wanted: string): string
}

function namer(ir: CascadeIR): Namer {
  const variables = [
    ...ir.variables,
    ...ir.splits.flatMap(({ variable, outer, inner }) => [variable, outer, inner]),
  ]
  const taken = new Set([
    ...tensorsOf(ir),
    ...ir.scalars,
    ...variables,
    ...variables.map(rankOf),
    ...ir.ranks.keys(),
  ])
  const fresh = (wanted: string) => {
    let name = wanted
    for (let i = 2; taken.has(name); i++) name = `${wanted}_${i}`
    taken.add(name)
    return name
  }
  const variable = (wanted: string) => {
    let name = wanted
    while (taken.has(name) || taken.has(rankOf(name))) name += '_'
    taken.add(name).add(rankOf(name))
    return name
  }
  return Object.assign(fresh, { variable })
}

const plainNames = (indices: readonly Index[]): string[] | undefined => {
  const names = indices.map(plainVariable)
  return names.some((one) => one === undefined) ? undefined : (names as string[])
}

const readsTensor = (expr: Expr): boolean => {
  let found = false
  visitAccesses(expr, () => {
    found = true
  })
  return found
}

function predicateNames(predicate: Predicate | undefined): Set<string> {
  const found = new Set<string>()
  if (predicate) visitPredicate(predicate, (one) => one.kind === 'name' && found.add(one.name))
  return found
}

// Read at an index that may lie beyond the axis
const isComputed = ({ indices }: Access): boolean =>
  indices.some((index) => index.kind === 'expr' && index.expr.kind === 'binary')

// Tensors that may have empty coordinates: what reads one is empty there, so it must not move past a sum
function emptyable(ir: CascadeIR): Set<string> {
  const found = new Set<string>()
  for (const step of ir.steps) {
    for (const one of 'body' in step ? step.body : [step]) {
      const { out, reduce, where } = one
      const bounds = predicateNames(where)
      const summed = reduce?.over ?? []
      const wholly = where !== undefined && !summed.some((v) => bounds.has(v))
      const reads = readsOf(one)
      const beyond = reads.some((read) => found.has(read.name) || isComputed(read))
      if (wholly || (summed.length === 0 && beyond)) found.add(out.name)
    }
  }
  return found
}

// x / D summed later: what does not depend on the summed variables is applied to the sum instead
function deferDivision(ir: CascadeIR): Omit<Candidate, 'rule'> | undefined {
  const fresh = namer(ir)
  const empty = emptyable(ir)
  let steps: (Statement | Iteration)[] = [...ir.steps]
  const moved: string[] = []
  const space = (variables: Iterable<string>) => [...variables].map(rankOf).join('*') || '1'
  for (;;) {
    const inlined = inlineProduct(ir, steps)
    const next = hoist(ir, inlined?.steps ?? steps, empty, fresh)
    if (!next) break
    const from = space(inlined?.variables ?? next.from)
    moved.push(`${next.operations} over ${from} become ${next.operations} over ${space(next.to)}`)
    steps = next.steps
  }
  if (moved.length === 0) return undefined
  return { draft: { ...ir, steps }, effect: [...new Set(moved)].join('; ') }
}

// A tensor that is only a product with something finished, and that is only summed, is written into its sums
function inlineProduct(
  ir: CascadeIR,
  steps: readonly (Statement | Iteration)[],
): { steps: (Statement | Iteration)[]; variables: string[] } | undefined {
  for (const one of steps) {
    if ('body' in one || one.init || one.reduce || one.where) continue
    if (ir.outputs.includes(one.out.name)) continue
    const own = plainNames(one.out.indices)
    const { factors, divisors } = productOf(one.expr)
    if (!own || factors.length + divisors.length < 2) continue
    const readers = steps.filter((step) =>
      ('body' in step ? step.body : [step]).some((reader) =>
        readsOf(reader).some(({ name: tensor }) => tensor === one.out.name),
      ),
    )
    const fits = readers.every((reader) => {
      if ('body' in reader || reader.init || reader.reduce?.op !== 'sum') return false
      const over = reader.reduce.over
      const part = productOf(reader.expr).factors.filter(
        (factor): factor is Access => factor.kind === 'access' && factor.name === one.out.name,
      )
      const all = readsOf(reader).filter(({ name: tensor }) => tensor === one.out.name)
      const same = part[0] && plainNames(part[0].indices)?.join() === own.join()
      const finished = [...factors, ...divisors].some((factor) => {
        const names = variablesIn(factor, ir.variables)
        return readsTensor(factor) && !over.every((v) => names.has(v))
      })
      return part.length === 1 && all.length === 1 && same && finished
    })
    if (!fits || readers.length === 0) continue
    const change = (expr: Expr) =>
      expr.kind === 'access' && expr.name === one.out.name ? one.expr : undefined
    return {
      variables: own,
      steps: steps
        .filter((step) => step !== one)
        .map((step) =>
          readers.includes(step) && !('body' in step)
            ? { ...step, expr: rewrite(step.expr, change) }
            : step,
        ),
    }
  }
  return undefined
}

function hoist(
  ir: CascadeIR,
  steps: readonly (Statement | Iteration)[],
  empty: ReadonlySet<string>,
  fresh: (wanted: string) => string,
):
  | { steps: (Statement | Iteration)[]; from: Set<string>; to: Set<string>; operations: string }
  | undefined {
  for (const one of steps) {
    if ('body' in one || one.init || one.reduce?.op !== 'sum' || one.reduce.over.length === 0)
      continue
    const left = plainNames(one.out.indices)
    if (!left) continue
    const { over } = one.reduce
    const { factors, divisors } = productOf(one.expr)
    const inner = over.filter((v) => ir.splits.some((split) => split.inner === v))
    for (const within of [
      over,
      ...(inner.length > 0 && inner.length < over.length ? [inner] : []),
    ]) {
      const movable = (factor: Expr) => {
        const names = variablesIn(factor, ir.variables)
        let solid = true
        visitExprs(factor, (part) => {
          if (part.kind === 'access' && (empty.has(part.name) || isComputed(part))) solid = false
        })
        return readsTensor(factor) && solid && within.every((v) => !names.has(v))
      }
      const out = { factors: factors.filter(movable), divisors: divisors.filter(movable) }
      const rest = factors.filter((factor) => !movable(factor))
      if (
        out.factors.length + out.divisors.length === 0 ||
        !rest.some((factor) => readsTensor(factor))
      )
        continue
      const kept = quotient(
        rest,
        divisors.filter((divisor) => !movable(divisor)),
      )
      const names = new Set([...variablesIn(kept, ir.variables), ...predicateNames(one.where)])
      const outer = over.filter((v) => !within.includes(v))
      const space = [...left, ...outer].filter((v) => names.has(v))
      const part = on(fresh(`${within === over ? 'N' : 'L'}${one.out.name}`), space)
      const first = statement(part, kept, {
        reduce: { op: 'sum', over: within },
        where: one.where,
      })
      const second = statement(one.out, quotient([part, ...out.factors], out.divisors), {
        reduce: { op: 'sum', over: outer },
      })
      const at = steps.indexOf(one)
      return {
        steps: [...steps.slice(0, at), first, second, ...steps.slice(at + 1)],
        from: new Set([...left, ...over]),
        to: new Set([...left, ...outer]),
        operations: out.divisors.length > 0 ? 'divisions' : 'multiplications',
      }
    }
  }
  return undefined
}

function hasExponential(expr: Expr, producer: (tensor: string) => Statement | undefined): boolean {
  let found = false
  visitExprs(expr, (one) => {
    if (one.kind === 'call') found ||= ['exp', 'exp2', 'sigmoid'].includes(one.fn)
    const from = one.kind === 'access' ? producer(one.name) : undefined
    if (from && !from.reduce) found ||= hasExponential(from.expr, producer)
  })
  return found
}

// sum(m) A * B with B = sum(f) X * Y and X without m is sum(f) X * O, where O = sum(m) A * Y is what a forward pass leaves
function precomputeDelta(ir: CascadeIR, variable: string): Omit<Candidate, 'rule'> | undefined {
  const single = ir.steps.filter((step): step is Statement => !('body' in step))
  const producer = (tensor: string) => single.find(({ out }) => out.name === tensor)
  for (const one of single) {
    if (one.reduce?.op !== 'sum' || one.reduce.over.join() !== variable || one.where) continue
    const { factors, divisors } = productOf(one.expr)
    const left = plainNames(one.out.indices)
    if (factors.length !== 2 || divisors.length > 0 || !left) continue
    // a result in its own right is computed here; only what another sweep waits for comes from elsewhere
    if (ir.outputs.includes(one.out.name)) continue
    for (const [weight, grad] of [factors, [...factors].reverse()] as [Expr, Expr][]) {
      if (weight.kind !== 'access' || grad.kind !== 'access') continue
      // weights of attention are computed from an exponential, coordinate by coordinate
      const weigher = producer(weight.name)
      if (!weigher || weigher.reduce || !hasExponential(weigher.expr, producer)) continue
      const from = producer(grad.name)
      if (from?.reduce?.op !== 'sum' || from.where) continue
      const same = plainNames(grad.indices)?.join() === plainNames(from.out.indices)?.join()
      const parts = productOf(from.expr)
      const apart = parts.factors.filter((part) => !variablesIn(part, ir.variables).has(variable))
      const along = parts.factors.filter((part) => variablesIn(part, ir.variables).has(variable))
      if (!same || parts.divisors.length > 0 || apart.length === 0 || along.length === 0) continue
      if (!apart.some((part) => readsTensor(part))) continue
      const summed = from.reduce.over
      const needs = new Set(along.flatMap((part) => [...variablesIn(part, ir.variables)]))
      for (const v of variablesIn(weight, ir.variables)) needs.add(v)
      const space = [...summed, ...left].filter((v) => needs.has(v))
      const output = on(namer(ir)('O'), space)
      const ahead = statement(one.out, quotient([...apart, output], []), {
        reduce: { op: 'sum', over: summed },
      })
      const terms = [weight, ...along].map((part) => printExpr(part, 2)).join(' * ')
      return {
        draft: { ...ir, steps: ir.steps.map((step) => (step === one ? ahead : step)) },
        effect: `${one.out.name} reads ${printExpr(output)} = sum(${variable}) ${terms}, which the forward pass leaves`,
      }
    }
  }
  return undefined
}

interface Reduced {
  /** The statement whose result it is. */
  one: Statement
  left: readonly string[]
  /** What is summed, without the exponential. */
  rest: Expr
  /** The reference of the exponential, undefined for a plain reduction. */
  reference: Expr | undefined
}
interface Shift {
  one: Statement
  /** Everything that multiplies the exponential. */
  rest: Expr[]
  divisors: Expr[]
  reference: Expr
}

// A cascade taken apart along one variable: what comes before any reduction over it, exponentials of a score that such a
// reduction shifts, sums that are linear in them, and what only follows
interface Plan {
  variable: string
  before: readonly Statement[]
  shifted: readonly Shift[]
  /** The exponential of a difference, times a scale if there is one. */
  power(difference: Expr): Expr
  /** What has to be above 0 for the difference to be the largest where the score is. */
  scale: readonly string[]
  score: Expr | undefined
  scoreWhere: Predicate | undefined
  maxima: readonly Statement[]
  logs: readonly Statement[]
  sums: readonly Reduced[]
  /** Statements without the variable, in order, and the reductions at the places of their results. */
  rest: readonly Statement[]
  space: readonly string[]
}

function planOf(ir: CascadeIR, variable: string): Plan | undefined {
  const all: Statement[] = []
  for (const step of ir.steps) {
    if ('body' in step || step.init) return undefined
    all.push(step)
  }
  const source = hoistExponentials(ir, inlineDifferences(ir, all, variable), variable)
  const late = new Set<string>()
  const carried = new Set<string>()
  const before: Statement[] = []
  const shifted: Shift[] = []
  const maxima: Statement[] = []
  const logs: Statement[] = []
  const sums: Reduced[] = []
  const rest: Statement[] = []
  const byName = new Map<string, Shift>()
  let shape: Pick<Difference, 'scale'> & { fn: 'exp' | 'exp2' } = {
    fn: 'exp',
    scale: { factors: [], divisors: [] },
  }
  const power: Plan['power'] = (difference) =>
    call(shape.fn, quotient([difference, ...shape.scale.factors], shape.scale.divisors))
  let score: Expr | undefined
  const isLate = (expr: Expr): boolean => {
    let found = false
    visitExprs(expr, (part) => {
      if (part.kind === 'access' && late.has(part.name)) found = true
    })
    return found
  }
  const has = (expr: Expr) => variablesIn(expr, ir.variables).has(variable)
  for (const one of source) {
    const { out, reduce, expr, where } = one
    const reads = has(expr) || predicateNames(where).has(variable)
    const left = plainNames(out.indices)
    if (!left) return undefined
    if (!reads) {
      // a statement without the variable: afterwards if it needs a reduction over it, ahead otherwise
      rest.push(one)
      if (isLate(expr)) late.add(out.name)
      continue
    }
    // elements of computed tensors are met in order only under the plain variable
    for (const { name: tensor, indices } of readsOf(one)) {
      if (!carried.has(tensor)) continue
      for (const index of indices) {
        if (index.kind === 'pin') return undefined
        const odd = has(index.expr) && plainVariable(index) !== variable
        const last = index.expr.kind === 'name' && index.expr.name === rankOf(variable)
        if (odd || last) return undefined
      }
    }
    const reduced = reduce?.over.includes(variable) ?? false
    if (reduced && reduce!.over.length > 1) return undefined
    if (!reduced) {
      if (!left.includes(variable) || ir.outputs.includes(out.name)) return undefined
      carried.add(out.name)
      if (!isLate(expr)) {
        before.push(one)
        continue
      }
      if (reduce) return undefined
      const { factors, divisors } = productOf(expr)
      const tops = factors.filter(isLate)
      if (tops.length !== 1 || divisors.some(isLate)) return undefined
      const [top] = tops as [Expr]
      const others = factors.filter((factor) => factor !== top)
      if (top.kind === 'access') {
        const base = byName.get(top.name)
        if (!base) return undefined
        const shift = { one, rest: [top, ...others], divisors, reference: base.reference }
        shifted.push(shift)
        byName.set(out.name, shift)
        late.add(out.name)
        continue
      }
      const difference = shiftOf(top)
      if (!difference || isLate(difference.score) || has(difference.reference)) return undefined
      if (!has(difference.score) || !isLate(difference.reference)) return undefined
      const parts = [...difference.scale.factors, ...difference.scale.divisors]
      if (parts.some((part) => isLate(part) || has(part) || !keepsOrder(part, ir.variables)))
        return undefined
      const known = score && printExpr(power(score))
      shape = difference
      if (known !== undefined && known !== printExpr(power(difference.score))) return undefined
      score ??= difference.score
      const shift = { one, rest: others, divisors, reference: difference.reference }
      shifted.push(shift)
      byName.set(out.name, shift)
      late.add(out.name)
      continue
    }
    late.add(out.name)
    rest.push(one)
    if (reduce!.op === 'max' && !isLate(expr)) {
      maxima.push(one)
      continue
    }
    if (reduce!.op === 'logsumexp' && !isLate(expr)) {
      logs.push(one)
      continue
    }
    if (!isLate(expr)) {
      if (reduce!.op === 'logsumexp') return undefined
      sums.push({ one, left, rest: expr, reference: undefined })
      continue
    }
    if (reduce!.op !== 'sum') return undefined
    const { factors, divisors } = productOf(expr)
    const tops = factors.filter(isLate)
    if (tops.length !== 1 || divisors.some(isLate) || tops[0]!.kind !== 'access') return undefined
    const base = byName.get(tops[0]!.name)
    if (!base) return undefined
    sums.push({ one, left, rest: expr, reference: base.reference })
  }
  const space = shifted[0]
    ? plainNames(shifted[0].one.out.indices)!.filter((v) => v !== variable)
    : []
  let scoreWhere: Predicate | undefined
  if (score) {
    // the maximum is taken over at least the points that are shifted by it
    const bound = (limit: Predicate | undefined) => (limit ? printPredicate(limit) : '')
    const limits = [...maxima, ...logs].map(({ where }) => where)
    if (limits.length === 0) limits.push(...shifted.map(({ one }) => one.where))
    const same = limits.every((limit) => bound(limit) === bound(limits[0]))
    if (!same && maxima.length > 0) return undefined
    scoreWhere = same ? limits[0] : undefined
    const text = printExpr(score)
    for (const { expr, out } of [...maxima, ...logs]) {
      if (printExpr(expr) !== text) return undefined
      if (plainNames(out.indices)!.length !== space.length) return undefined
    }
    if (scoreWhere && shifted.some(({ one }) => bound(one.where) !== bound(scoreWhere)))
      return undefined
    for (const { one } of shifted) {
      const own = plainNames(one.out.indices)!.filter((v) => v !== variable)
      if (!space.every((v) => own.includes(v))) return undefined
    }
    const scale = [...shape.scale.factors, ...shape.scale.divisors]
    if (logs.length > 0 && (shape.fn === 'exp2' || scale.length > 0)) return undefined
    for (const part of scale)
      for (const v of variablesIn(part, ir.variables)) if (!space.includes(v)) return undefined
  } else if (logs.length > 0) return undefined
  else {
    // nothing is shifted: maxima are reductions like any other
    for (const one of maxima.splice(0))
      sums.push({ one, left: plainNames(one.out.indices)!, rest: one.expr, reference: undefined })
  }
  if (sums.length + maxima.length === 0) return undefined
  const sized = sizedRanks(ir)
  const scale = [...shape.scale.factors, ...shape.scale.divisors].filter(
    (part) => part.kind === 'access' || (part.kind === 'name' && !sized.has(part.name)),
  )
  return {
    variable,
    before,
    shifted,
    power,
    scale: scale.map((part) => printExpr(part)),
    score,
    scoreWhere,
    maxima,
    logs,
    sums,
    rest,
    space,
  }
}

interface Difference {
  score: Expr
  reference: Expr
  /** What the difference is multiplied by and divided by. */
  scale: Product
}

// (a - b) * scale, -b + a, -(b - a), with what is taken away as the reference
function differenceOf(expr: Expr): Difference | undefined {
  const of = (score: Expr, reference: Expr): Difference => ({
    score,
    reference,
    scale: { factors: [], divisors: [] },
  })
  if (expr.kind === 'negate') {
    const inner = differenceOf(expr.x)
    return inner && { ...inner, score: inner.reference, reference: inner.score }
  }
  if (expr.kind !== 'binary') return undefined
  const { op, a, b } = expr
  if (op === '-') return of(a, b)
  if (op === '+')
    return a.kind === 'negate' ? of(b, a.x) : b.kind === 'negate' ? of(a, b.x) : undefined
  const { factors, divisors } = productOf(expr)
  const [whole, ...more] = factors.filter((factor) => differenceOf(factor))
  const inner = whole && more.length === 0 ? differenceOf(whole) : undefined
  const others = factors.filter((factor) => factor !== whole)
  return inner && { ...inner, scale: { factors: others, divisors } }
}

function shiftOf(expr: Expr): (Difference & { fn: 'exp' | 'exp2' }) | undefined {
  if (expr.kind !== 'call' || (expr.fn !== 'exp' && expr.fn !== 'exp2')) return undefined
  const difference = differenceOf(expr.args[0]!)
  return difference && { fn: expr.fn, ...difference }
}

// Whether a factor of an exponent keeps the order of scores, as far as the text tells: a number of the call is taken to
const keepsOrder = (expr: Expr, variables: readonly string[]): boolean => {
  if (expr.kind === 'number') return expr.value > 0 && expr.value < Number.POSITIVE_INFINITY
  if (expr.kind === 'name') return !variables.includes(expr.name)
  if (expr.kind === 'call') return ['exp', 'exp2', 'sqrt', 'rsqrt', 'softplus'].includes(expr.fn)
  return expr.kind === 'access'
}

// X[m,p] = S[m,p] - G[p] in front of exp(X[m,p]) is written into it
function inlineDifferences(
  ir: CascadeIR,
  all: readonly Statement[],
  variable: string,
): readonly Statement[] {
  const late = new Set<string>()
  let rest = all
  for (const one of all) {
    const { out, reduce, where, expr } = one
    const left = plainNames(out.indices)
    const waits = readsOf(one).some((read) => late.has(read.name))
    if (waits || reduce?.over.includes(variable)) late.add(out.name)
    const difference = reduce || where ? undefined : differenceOf(expr)
    if (!waits || !difference || !left?.includes(variable) || ir.outputs.includes(out.name))
      continue
    const reads = rest.flatMap(readsOf).filter((read) => read.name === out.name)
    if (!reads.every(({ indices }) => plainNames(indices)?.join() === left.join())) continue
    const own = rest.find((other) => other.out.name === out.name)!.expr
    const change = (part: Expr) =>
      part.kind === 'access' && part.name === out.name ? own : undefined
    rest = rest
      .filter((other) => other.out.name !== out.name)
      .map((other) => ({ ...other, expr: rewrite(other.expr, change) }))
  }
  return rest
}

// sum(m) exp(S[m,p] - G[p]) * V[m]: the exponential gets a name of its own
function hoistExponentials(
  ir: CascadeIR,
  all: readonly Statement[],
  variable: string,
): readonly Statement[] {
  const fresh = namer(ir)
  const named = new Map<string, Access>()
  return all.flatMap((one) => {
    const { reduce, expr, where } = one
    if (reduce?.op !== 'sum' || !reduce.over.includes(variable)) return [one]
    const made: Statement[] = []
    const { factors, divisors } = productOf(expr)
    const kept = factors.map((factor) => {
      if (!shiftOf(factor)) return factor
      const key = `${printExpr(factor)} ${where ? printPredicate(where) : ''}`
      let access = named.get(key)
      if (!access) {
        const variables = new Set([...variablesIn(factor, ir.variables), ...predicateNames(where)])
        access = on(
          fresh('E'),
          ir.variables.filter((v) => variables.has(v)),
        )
        named.set(key, access)
        made.push(statement(access, factor, { where }))
      }
      return access
    })
    return made.length === 0 && kept.every((factor, i) => factor === factors[i])
      ? [one]
      : [...made, { ...one, expr: quotient(kept, divisors), where: undefined }]
  })
}

// Names and substitutions that both forms share
function partsOf(ir: CascadeIR, plan: Plan, tile: number) {
  const { variable } = plan
  const fresh = namer(ir)
  const [outer, inner] = [fresh.variable(`${variable}1`), fresh.variable(`${variable}0`)]
  const split: Split = { variable, outer, inner, size: tile, tailMask: true, span: nowhere }
  const position = binary('+', binary('*', name(outer), name(rankOf(inner))), name(inner))
  const carried = new Set(
    [...plan.before, ...plan.shifted.map(({ one }) => one)].map(({ out }) => out.name),
  )
  const change = (expr: Expr): Expr | undefined => {
    if (expr.kind === 'name' && expr.name === variable) return position
    if (expr.kind !== 'access' || !carried.has(expr.name)) return undefined
    return access(
      expr.name,
      expr.indices.flatMap((index) =>
        plainVariable(index) === variable
          ? [plain(outer), plain(inner)]
          : [index.kind === 'pin' ? index : { ...index, expr: rewrite(index.expr, change) }],
      ),
    )
  }
  const expr = (one: Expr) => rewrite(one, change)
  const where = (one: Predicate | undefined) => one && rewriteTest(one, change)
  const whole = (one: Statement): Statement =>
    statement(change(one.out) as Access, expr(one.expr), {
      reduce: one.reduce,
      where: where(one.where),
    })
  const draft = (steps: readonly (Statement | Iteration)[]): Draft => ({
    ranks: ir.ranks,
    splits: [...ir.splits, split],
    steps,
  })
  return { outer, inner, expr, where, whole, draft, fresh }
}

// The mask of a reduction that empties whole coordinates of it
const emptiedBy = ({ where }: Statement, { variable }: Plan): Predicate | undefined =>
  where && predicateNames(where).has(variable) ? undefined : where

// Statements that need no reduction over the variable, and those that do
function around(plan: Plan): { ahead: Statement[]; after: Statement[] } {
  const late = new Set(
    [...plan.maxima, ...plan.logs, ...plan.sums.map(({ one }) => one)].map(({ out }) => out.name),
  )
  const [ahead, after]: [Statement[], Statement[]] = [[], []]
  for (const one of plan.rest) {
    let needs = late.has(one.out.name)
    visitExprs(one.expr, (part) => {
      if (part.kind === 'access' && late.has(part.name)) needs = true
    })
    if (needs) late.add(one.out.name)
    ;(needs ? after : ahead).push(one)
  }
  return { ahead, after }
}

const combine = (op: string, a: Expr, b: Expr): Expr =>
  op === 'max' || op === 'min'
    ? { kind: 'call', fn: op, args: [a, b], span: nowhere }
    : binary(op === 'prod' ? '*' : '+', a, b)
const identity = (op: string): Expr =>
  op === 'max'
    ? { kind: 'negate', x: number(Number.POSITIVE_INFINITY), span: nowhere }
    : number(op === 'min' ? Number.POSITIVE_INFINITY : op === 'prod' ? 1 : 0)

// The exponential itself, shifted by a reference that is at hand
function shiftedBy(
  plan: Plan,
  { one, rest, divisors }: Shift,
  expr: (e: Expr) => Expr,
  reference: Expr,
) {
  if (
    rest[0]?.kind === 'access' &&
    plan.shifted.some(({ one: base }) => base !== one && base.out.name === (rest[0] as Access).name)
  )
    return quotient(rest.map(expr), divisors.map(expr))
  const top = plan.power(binary('-', expr(plan.score!), reference))
  return quotient([top, ...rest.map(expr)], divisors.map(expr))
}

// One pass: a running maximum, and everything so far corrected whenever it grows
function runningForm(ir: CascadeIR, plan: Plan, tile: number): Draft {
  const { outer, inner, expr, where, whole, draft, fresh } = partsOf(ir, plan, tile)
  const { space } = plan
  const pinned = (tensor: string, variables: readonly string[]) =>
    access(tensor, [{ kind: 'pin', name: outer, value: 0 }, ...variables.map(plain)])
  const now = (tensor: string, variables: readonly string[]) => on(tensor, [outer, ...variables])
  const next = (tensor: string, variables: readonly string[]) =>
    access(tensor, [
      { kind: 'expr', expr: binary('+', name(outer), number(1)) },
      ...variables.map(plain),
    ])
  const last = (tensor: string, variables: readonly string[]) =>
    access(tensor, [plain(rankOf(outer)), ...variables.map(plain)])

  const [local, running, correction] = [fresh('LM'), fresh('RM'), fresh('PRM')]
  const init = [statement(pinned(running, space), identity('max'), { init: true })]
  const body: Statement[] = plan.before.map(whole)
  body.push(
    statement(now(local, space), expr(plan.score!), {
      reduce: { op: 'max', over: [inner] },
      where: where(plan.scoreWhere),
    }),
    statement(next(running, space), call('max', now(running, space), now(local, space))),
    ...plan.shifted.map((shift) =>
      statement(whole(shift.one).out, shiftedBy(plan, shift, expr, next(running, space)), {
        where: where(shift.one.where),
      }),
    ),
    statement(
      now(correction, space),
      plan.power(binary('-', now(running, space), next(running, space))),
    ),
  )
  const results = new Map<string, Expr>()
  for (const { out } of plan.maxima) results.set(out.name, last(running, space))
  const accumulate = (
    tensor: string,
    left: readonly string[],
    op: string,
    summand: Expr,
    limit: Predicate | undefined,
    corrected: boolean,
  ) => {
    const [part, total] = [fresh(`L${tensor}`), fresh(`R${tensor}`)]
    init.push(statement(pinned(total, left), identity(op), { init: true }))
    const before = corrected
      ? binary('*', now(total, left), now(correction, space))
      : now(total, left)
    body.push(
      statement(now(part, left), summand, {
        reduce: { op: op as 'sum', over: [inner] },
        where: limit,
      }),
      statement(next(total, left), combine(op, now(part, left), before)),
    )
    return last(total, left)
  }
  for (const { out, where: limit } of plan.logs) {
    const summand = plan.power(binary('-', expr(plan.score!), next(running, space)))
    const total = accumulate(out.name, space, 'sum', summand, where(limit), true)
    results.set(out.name, binary('+', last(running, space), call('log', total)))
  }
  for (const { one, left, rest, reference } of plan.sums) {
    const total = accumulate(
      one.out.name,
      left,
      one.reduce!.op,
      expr(rest),
      where(one.where),
      reference !== undefined,
    )
    results.set(one.out.name, corrected(plan, total, reference, last(running, space)))
  }
  const { ahead, after } = around(plan)
  return draft([
    ...ahead,
    ...init,
    { variable: outer, body, span: nowhere },
    ...inPlace(ir, after, results),
  ])
}

// What only renames a final state is read where it stands
function inPlace(
  ir: CascadeIR,
  after: readonly Statement[],
  results: ReadonlyMap<string, Expr>,
): Statement[] {
  const named = new Map(after.map(({ out }) => [out.name, plainNames(out.indices)?.join()]))
  const inlined = new Map<string, Access>()
  for (const [tensor, result] of results) {
    const reads = after.flatMap(readsOf).filter(({ name: read }) => read === tensor)
    const same = reads.every(({ indices }) => plainNames(indices)?.join() === named.get(tensor))
    if (result.kind === 'access' && same && reads.length > 0 && !ir.outputs.includes(tensor))
      inlined.set(tensor, result)
  }
  const change = (expr: Expr) => (expr.kind === 'access' ? inlined.get(expr.name) : undefined)
  return after
    .filter(({ out }) => !inlined.has(out.name))
    .map((one) => {
      const result = results.get(one.out.name)
      return result
        ? statement(one.out, rewrite(result, change))
        : { ...one, expr: rewrite(one.expr, change) }
    })
}

// A sum that is relative to the maximum, made relative to what the text subtracts
function corrected(plan: Plan, total: Expr, reference: Expr | undefined, maximum: Expr): Expr {
  if (!reference) return total
  const plainMax =
    reference.kind === 'access' && plan.maxima.some(({ out }) => out.name === reference.name)
  return plainMax ? total : binary('*', total, plan.power(binary('-', maximum, reference)))
}

// Parts along the variable, each with a maximum of its own, and their merge
function mergedForm(ir: CascadeIR, plan: Plan, tile: number): Draft {
  const { outer, inner, expr, where, whole, draft, fresh } = partsOf(ir, plan, tile)
  const { space } = plan
  const part = (tensor: string, variables: readonly string[]) => on(tensor, [outer, ...variables])
  const { ahead, after } = around(plan)
  const steps: Statement[] = [...ahead, ...plan.before.map(whole)]
  const results = new Map<string, Statement>()
  // What a mask empties is empty again: parts that are skipped would leave the identity
  const finished = (one: Statement, value: Expr, reduce?: Statement['reduce']) =>
    statement(one.out, value, { reduce, where: emptiedBy(one, plan) })
  const done: Statement[] = []
  let weight: Expr | undefined
  let maximum: Expr | undefined
  const local = plan.score ? fresh('LM') : ''
  if (plan.score) {
    const [global, factor] = [fresh('RM'), fresh('PLM')]
    steps.push(
      statement(part(local, space), expr(plan.score), {
        reduce: { op: 'max', over: [inner] },
        where: where(plan.scoreWhere),
      }),
      ...plan.shifted.map((shift) =>
        statement(whole(shift.one).out, shiftedBy(plan, shift, expr, part(local, space)), {
          where: where(shift.one.where),
        }),
      ),
    )
    maximum = on(global, space)
    weight = part(factor, space)
    done.push(
      statement(maximum as Access, part(local, space), { reduce: { op: 'max', over: [outer] } }),
      statement(weight as Access, plan.power(binary('-', part(local, space), maximum))),
    )
    for (const one of plan.maxima) results.set(one.out.name, finished(one, maximum))
  }
  const merge = (
    one: Statement,
    left: readonly string[],
    op: string,
    summand: Expr,
    weighted: boolean,
    limit: Predicate | undefined,
  ) => {
    const partial = fresh(`L${one.out.name}`)
    steps.push(
      statement(part(partial, left), summand, {
        reduce: { op: op as 'sum', over: [inner] },
        where: limit,
      }),
    )
    const own = part(partial, left)
    return {
      expr: weighted ? binary('*', own, weight!) : own,
      reduce: { op: op as 'sum', over: [outer] },
    }
  }
  for (const one of plan.logs) {
    const summand = plan.power(binary('-', expr(plan.score!), part(local, space)))
    const { expr: value, reduce } = merge(one, space, 'sum', summand, true, where(one.where))
    const total = on(fresh(`S${one.out.name}`), space)
    done.push(statement(total, value, { reduce }))
    results.set(one.out.name, finished(one, binary('+', maximum!, call('log', total))))
  }
  for (const { one, left, rest, reference } of plan.sums) {
    const op = one.reduce!.op
    const { expr: value, reduce } = merge(
      one,
      left,
      op,
      expr(rest),
      reference !== undefined,
      where(one.where),
    )
    results.set(
      one.out.name,
      finished(one, maximum ? corrected(plan, value, reference, maximum) : value, reduce),
    )
  }
  return draft([...steps, ...done, ...after.map((one) => results.get(one.out.name) ?? one)])
}
