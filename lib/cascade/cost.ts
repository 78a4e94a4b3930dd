import type { Node } from './graph.js'
import {
  type CascadeIR,
  type Expr,
  type FunctionName,
  type Predicate,
  visitExprs,
  visitPredicate,
} from './ir.js'

/** @internal Operations of one einsum. */
export interface Work {
  /** Multiplications and additions of matrix products. */
  tensor: number
  /** All other multiplications and additions. */
  vector: number
  exp: number
  other: number
}

// How many operations of the exponential unit a function takes; the others are comparisons
const units: Readonly<Partial<Record<FunctionName, number>>> = {
  exp: 1,
  exp2: 1,
  log: 1,
  log1p: 1,
  tanh: 1,
  sigmoid: 2,
  softplus: 2,
  pow: 2,
  sqrt: 1,
  rsqrt: 1,
  erf: 1,
  sin: 1,
  cos: 1,
}

/** @internal A product taken apart: what it multiplies by and what it divides by. */
export interface Product {
  factors: Expr[]
  divisors: Expr[]
}

/** @internal The factors of an expression, through nested products and quotients. */
export function productOf(expr: Expr): Product {
  if (expr.kind !== 'binary' || expr.op === '+' || expr.op === '-')
    return { factors: [expr], divisors: [] }
  const [a, b] = [productOf(expr.a), productOf(expr.b)]
  return expr.op === '*'
    ? { factors: [...a.factors, ...b.factors], divisors: [...a.divisors, ...b.divisors] }
    : { factors: [...a.factors, ...b.divisors], divisors: [...a.divisors, ...b.factors] }
}

/** @internal Variables that an expression depends on. */
export function variablesIn(expr: Expr, known: readonly string[]): Set<string> {
  const found = new Set<string>()
  visitExprs(expr, (one) => {
    if (one.kind === 'name' && known.includes(one.name)) found.add(one.name)
  })
  return found
}

/** @internal Whether a sum is a matrix product: two of its factors have a summed variable, and each one that the other lacks. */
export function isContraction(node: Node, known: readonly string[]): boolean {
  const { reduce, expr } = node.statement
  if (reduce?.op !== 'sum' || reduce.over.length === 0) return false
  const names = productOf(expr).factors.map((one) => variablesIn(one, known))
  const lacks = (a: ReadonlySet<string>, b: ReadonlySet<string>) => [...a].some((v) => !b.has(v))
  return names.some((a) =>
    names.some((b) => lacks(a, b) && lacks(b, a) && reduce.over.some((v) => a.has(v) && b.has(v))),
  )
}

/**
 * @internal Operations of one einsum as it is written: each once for every combination of the variables that it depends
 * on. Numbers, scalars and sizes in a product that is summed are folded into an operand and cost nothing.
 */
export function workOf(
  node: Node,
  ir: CascadeIR,
  points: (variables: Iterable<string>) => number,
): Work {
  const { expr, reduce } = node.statement
  const work: Work = { tensor: 0, vector: 0, exp: 0, other: 0 }
  const summed = reduce?.op === 'sum' && reduce.over.length > 0
  const total = points(node.variables)
  const contraction = isContraction(node, ir.variables)
  // Known before the first point: made of numbers, scalars and sizes
  const free = (one: Expr) => {
    let known = true
    visitExprs(one, (part) => {
      if (part.kind === 'access' || (part.kind === 'name' && ir.variables.includes(part.name)))
        known = false
    })
    return known
  }

  const count = (one: Expr, top: boolean): Set<string> => {
    const names = variablesIn(one, ir.variables)
    if (free(one)) return names
    switch (one.kind) {
      case 'negate':
        count(one.x, false)
        work.vector += points(names)
        break
      case 'binary': {
        const product = one.op === '*' || one.op === '/'
        const below = top && product
        count(one.a, below)
        count(one.b, below)
        const folded = below && summed && (free(one.a) || free(one.b))
        if (folded) break
        if (one.op === '/') work.other += points(names)
        else if (below && contraction) work.tensor += points(names)
        else work.vector += points(names)
        break
      }
      case 'call': {
        for (const arg of one.args) count(arg, false)
        const unit = units[one.fn]
        const power = one.fn === 'pow' ? one.args[1] : undefined
        if (power?.kind === 'number' && Number.isInteger(power.value) && power.value <= 64)
          work.vector += points(names) * Math.max(1, Math.ceil(Math.log2(Math.max(power.value, 2))))
        else if (unit === undefined) work.other += points(names)
        else work.exp += unit * points(names)
        break
      }
      case 'if':
        count(one.yes, false)
        count(one.no, false)
        work.other += points(names)
    }
    return names
  }
  count(expr, true)
  if (reduce && reduce.over.length > 0) {
    if (summed) work[contraction ? 'tensor' : 'vector'] += total
    else if (reduce.op === 'prod') work.vector += total
    else {
      work.other += total
      if (reduce.op === 'logsumexp') {
        work.exp += total
        work.vector += 2 * total
      }
    }
  }
  return work
}

/**
 * @internal The share of points that a predicate leaves, as far as sizes and scalars decide it: counted exactly up to a
 * quarter of a million points, on a regular grid beyond. What depends on a tensor counts as true.
 */
export function visibleShare(
  predicate: Predicate,
  ir: CascadeIR,
  size: (rank: string) => number,
  scalars: Readonly<Record<string, number>>,
): number {
  const decided = conjuncts(predicate).filter((one) => {
    let known = true
    visitPredicate(one, (expr) => {
      if (expr.kind === 'access') known = false
      else if (expr.kind === 'name' && !ir.variables.includes(expr.name))
        known &&= scalars[expr.name] !== undefined || !Number.isNaN(size(expr.name))
    })
    return known
  })
  if (decided.length === 0) return 1
  const names = new Set<string>()
  for (const one of decided)
    visitPredicate(one, (expr) => {
      if (expr.kind === 'name' && ir.variables.includes(expr.name)) names.add(expr.name)
    })
  const variables = [...names]
  const sizes = variables.map((v) => size(v.toUpperCase()))
  if (sizes.some(Number.isNaN)) return 1
  if (sizes.includes(0)) return 0
  const most = 2 ** 18
  const whole = sizes.reduce((a, b) => a * b, 1) <= most
  const steps = whole
    ? sizes
    : sizes.map((n) => Math.min(n, Math.floor(most ** (1 / sizes.length))))
  const at: Record<string, number> = {}
  const value = (expr: Expr): number => {
    switch (expr.kind) {
      case 'number':
        return expr.value
      case 'name':
        return at[expr.name] ?? scalars[expr.name] ?? size(expr.name)
      case 'negate':
        return -value(expr.x)
      case 'binary': {
        const [a, b] = [value(expr.a), value(expr.b)]
        return expr.op === '+' ? a + b : expr.op === '-' ? a - b : expr.op === '*' ? a * b : a / b
      }
      case 'call':
        return expr.fn === 'max' || expr.fn === 'min'
          ? Math[expr.fn](value(expr.args[0]!), value(expr.args[1]!))
          : expr.fn === 'abs'
            ? Math.abs(value(expr.args[0]!))
            : Number.NaN
      case 'if':
        return holds(expr.test) ? value(expr.yes) : value(expr.no)
      case 'access':
        return Number.NaN
    }
  }
  const holds = (one: Predicate): boolean => {
    if (one.kind === 'not') return !holds(one.x)
    if (one.kind !== 'compare')
      return one.kind === 'and' ? holds(one.a) && holds(one.b) : holds(one.a) || holds(one.b)
    const [a, b] = [value(one.a), value(one.b)]
    switch (one.op) {
      case '<':
        return a < b
      case '<=':
        return a <= b
      case '>':
        return a > b
      case '>=':
        return a >= b
      case '==':
        return a === b
      case '!=':
        return a !== b
    }
  }
  let [seen, all] = [0, 0]
  const visit = (level: number): void => {
    if (level === variables.length) {
      all++
      if (decided.every(holds)) seen++
      return
    }
    const n = sizes[level]!
    for (let i = 0; i < steps[level]!; i++) {
      at[variables[level]!] = whole ? i : Math.floor(((i + 0.5) * n) / steps[level]!)
      visit(level + 1)
    }
  }
  visit(0)
  return seen / all
}

function conjuncts(predicate: Predicate): Predicate[] {
  return predicate.kind === 'and'
    ? [...conjuncts(predicate.a), ...conjuncts(predicate.b)]
    : [predicate]
}
