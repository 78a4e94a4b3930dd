import {
  type Access,
  type Expr,
  rankOf,
  rewrite,
  type Statement,
  visitAccesses,
  visitExprs,
} from './ir.js'
import { printExpr } from './print.js'
import { plainVariable, stepOf } from './validate.js'

/** @internal The statements that make a tensor, its initial ones left out; none for an input. */
export type Producers = (tensor: string) => readonly Statement[]

/** @internal The first exponential of a score that nothing bounds from above, if there is one. */
export function unshiftedExp(expr: Expr, producers: Producers): Expr | undefined {
  let found: Expr | undefined
  // if(x > 0, …, exp(x))
  const guarded = new Set<Expr>()
  visitExprs(expr, (one) => {
    if (one.kind !== 'if' || one.test.kind !== 'compare') return
    const { op, a } = one.test
    if (op === '==' || op === '!=') return
    visitExprs(op.startsWith('>') ? one.no : one.yes, (part) => {
      if (part.kind === 'call' && printExpr(part.args[0]!) === printExpr(a)) guarded.add(part)
    })
  })
  visitExprs(expr, (one) => {
    if (one.kind !== 'call' || (one.fn !== 'exp' && one.fn !== 'exp2') || guarded.has(one)) return
    if (!new Bounds(producers).above(one.args[0]!)) found ??= one
  })
  return found
}

const readsTensor = (expr: Expr): boolean => {
  let found = false
  visitAccesses(expr, () => {
    found = true
  })
  return found
}

const variablesOf = ({ indices }: Access) => indices.map((index) => plainVariable(index) ?? '')

// A sum as what is added and what is taken away
interface Terms {
  plus: Expr[]
  minus: Expr[]
}

function termsOf(expr: Expr): Terms {
  const turned = ({ plus, minus }: Terms): Terms => ({ plus: minus, minus: plus })
  if (expr.kind === 'negate') return turned(termsOf(expr.x))
  if (expr.kind !== 'binary' || expr.op === '*' || expr.op === '/')
    return { plus: [expr], minus: [] }
  const [a, b] = [termsOf(expr.a), termsOf(expr.b)]
  const { plus, minus } = expr.op === '-' ? turned(b) : b
  return { plus: [...a.plus, ...plus], minus: [...a.minus, ...minus] }
}

const sumOf = ({ plus, minus }: Terms): Expr | undefined => {
  const [first, ...more] = plus
  if (!first) return undefined
  const join =
    (op: '+' | '-') =>
    (a: Expr, b: Expr): Expr => ({
      kind: 'binary',
      op,
      a,
      b,
      span: first.span,
    })
  return minus.reduce(join('-'), more.reduce(join('+'), first))
}

interface Made {
  reduce: string | undefined
  expr: Expr
  /** Variables that may take any value. */
  free: readonly string[]
}

// With variables that are nobody else's
const apart = (expr: Expr, free: readonly string[]): Expr =>
  rewrite(expr, (one) =>
    one.kind === 'name' && free.includes(one.name) ? { ...one, name: `${one.name}'` } : undefined,
  )

// What is proved follows names through the text, and gives up on a long way
class Bounds {
  #steps = 500

  constructor(readonly producers: Producers) {}

  // What a tensor is made of, under the indices of this access
  *#made(access: Access): Generator<Made> {
    if (this.#steps-- < 0) return
    for (const { out, expr, reduce } of this.producers(access.name)) {
      const free = [...(reduce?.over ?? [])]
      const by = new Map<string, Expr>()
      const fits = out.indices.every((index, i) => {
        const own = access.indices[i]!
        if (index.kind !== 'expr' || own.kind !== 'expr') return false
        const variable = plainVariable(index)
        if (variable !== undefined) by.set(variable, own.expr)
        if (variable !== undefined || printExpr(index.expr) === printExpr(own.expr)) return true
        // the last state has met every step
        const { expr: last } = own
        const iterated = out.indices.map(variableAhead)[i]
        const whole =
          last.kind === 'name' && iterated !== undefined && last.name === rankOf(iterated)
        if (whole) free.push(iterated)
        return whole
      })
      if (!fits) continue
      const change = (one: Expr) => (one.kind === 'name' ? by.get(one.name) : undefined)
      const reducer = reduce && reduce.over.length > 0 ? reduce.op : undefined
      yield { reduce: reducer, expr: rewrite(expr, change), free }
    }
  }

  #every(access: Access, reducers: readonly string[], holds: (expr: Expr) => boolean): boolean {
    const all = [...this.#made(access)]
    const known = ({ reduce }: { reduce: string | undefined }) =>
      reduce === undefined || reducers.includes(reduce)
    return all.length > 0 && all.every((one) => known(one) && holds(one.expr))
  }

  /** Whether a value cannot run away upwards. Numbers of the call and negated inputs, as of rates and costs, are taken not to. */
  above(x: Expr): boolean {
    if (!readsTensor(x)) return true
    switch (x.kind) {
      case 'access':
        return (
          this.#every(x, ['max', 'min'], (expr) => this.above(expr)) ||
          this.#every(x, ['sum', 'max', 'min'], (expr) => this.#negative(expr))
        )
      case 'call': {
        const [a, b] = x.args as [Expr, Expr]
        if (x.fn === 'min') return this.above(a) || this.above(b)
        if (x.fn === 'max') return this.above(a) && this.above(b)
        if (['exp', 'exp2', 'relu', 'softplus'].includes(x.fn)) return this.above(a)
        return ['tanh', 'sigmoid', 'erf', 'sin', 'cos', 'log', 'log1p'].includes(x.fn)
      }
      case 'if':
        return this.above(x.yes) && this.above(x.no)
      case 'binary':
        if (x.op === '/') return this.above(x.a)
        if (x.op === '*') return this.#product(x.a, x.b) || this.#product(x.b, x.a)
    }
    const terms = termsOf(x)
    const plus = terms.plus.filter((term) => !this.above(term))
    if (plus.length === 0 && terms.minus.every((term) => this.#magnitude(term))) return true
    return terms.minus.some((reference) => {
      const others = terms.minus.filter((term) => term !== reference)
      const whole = sumOf({ plus: terms.plus, minus: others })
      if (whole && this.#atMost(whole, reference)) return true
      const rest = sumOf({ plus, minus: [] })
      if (!rest || !others.every((term) => this.#magnitude(term))) return false
      // a tensor at two places, as decays between two tokens
      const two = rest.kind === 'access' && reference.kind === 'access'
      return (two && rest.name === reference.name) || this.#atMost(rest, reference)
    })
  }

  // A bounded factor times what only scales it
  #product(x: Expr, scale: Expr): boolean {
    if (!this.above(x)) return false
    if (this.above(scale)) return true
    return (
      scale.kind === 'access' && this.producers(scale.name).length === 0 && !this.#widens(scale, x)
    )
  }

  // Whether an input has a variable that an expression lacks, or all that it has
  #widens(input: Access, x: Expr): boolean {
    const own = new Set(variablesOf(input))
    const names = new Set<string>()
    visitAccesses(x, (read) => {
      for (const v of variablesOf(read)) names.add(v)
    })
    return [...own].some((v) => !names.has(v)) || [...names].every((v) => own.has(v))
  }

  #negative(x: Expr): boolean {
    const { plus, minus } = termsOf(x)
    return plus.length === 0 && minus.every((term) => this.#positive(term))
  }

  #positive(x: Expr): boolean {
    if (x.kind === 'number') return x.value >= 0
    if (x.kind === 'binary' && x.op === '*' && printExpr(x.a) === printExpr(x.b)) return true
    if (x.kind === 'binary') return x.op !== '-' && this.#positive(x.a) && this.#positive(x.b)
    if (x.kind === 'access')
      return this.#every(x, ['sum', 'max', 'min', 'prod'], (expr) => this.#positive(expr))
    const known = ['exp', 'exp2', 'sigmoid', 'relu', 'softplus', 'abs', 'sqrt', 'rsqrt']
    return x.kind === 'call' && known.includes(x.fn)
  }

  // What may be taken away without a value growing
  #magnitude(x: Expr): boolean {
    if (!readsTensor(x) || this.#positive(x)) return true
    if (x.kind === 'binary' && x.op === '*') {
      const [a, b] = readsTensor(x.a) ? [x.a, x.b] : [x.b, x.a]
      return a.kind === 'access' && !readsTensor(b) && this.#magnitude(a)
    }
    if (x.kind === 'binary' && x.op === '/') return this.#magnitude(x.a) && this.#magnitude(x.b)
    return x.kind === 'access' && this.producers(x.name).length === 0
  }

  // Whether b is no less than a: a itself, a maximum or a log-sum-exp of it, or what an earlier call has left of them
  #atMost(a: Expr, b: Expr, free: readonly string[] = []): boolean {
    if (this.#steps-- < 0) return false
    if (matches(b, a, free)) return true
    if (b.kind === 'call') {
      const [x, y] = b.args as [Expr, Expr]
      if (b.fn === 'max') return this.#atMost(a, x, free) || this.#atMost(a, y, free)
      if (['relu', 'softplus', 'abs'].includes(b.fn) && this.#atMost(a, x, free)) return true
    }
    if (b.kind === 'binary' && b.op === '+') {
      const isLog = (x: Expr) => !readsTensor(x) || (x.kind === 'call' && x.fn.startsWith('log'))
      if (isLog(b.b) && this.#atMost(a, b.a, free)) return true
      if (isLog(b.a) && this.#atMost(a, b.b, free)) return true
    }
    if (b.kind === 'access') {
      const known = this.producers(b.name)
      if (known.length === 0 && !this.#widens(b, a)) return true
      for (const { reduce, expr, free: more } of this.#made(b)) {
        if (reduce !== undefined && reduce !== 'max' && reduce !== 'logsumexp') continue
        if (this.#atMost(a, expr, [...free, ...more])) return true
      }
    }
    if (a.kind === 'access') {
      const all = [...this.#made(a)]
      const holds = ({ reduce, expr, free: more }: Made) =>
        (reduce === undefined || reduce === 'max') && this.#atMost(apart(expr, more), b, free)
      return all.length > 0 && all.every(holds)
    }
    if (a.kind === 'call' && a.fn === 'max') return a.args.every((x) => this.#atMost(x, b, free))
    return a.kind === 'call' && a.fn === 'min' && a.args.some((x) => this.#atMost(x, b, free))
  }
}

// m of an index m + 1
function variableAhead(index: Access['indices'][number]): string | undefined {
  let found: string | undefined
  if (index.kind === 'expr')
    visitExprs(index.expr, (one) => {
      if (one.kind === 'name' && stepOf(index, one.name) === 1) found = one.name
    })
  return found
}

// Whether an expression is another one with values for free variables
function matches(pattern: Expr, expr: Expr, free: readonly string[]): boolean {
  const by = new Map<string, Expr>()
  const fits = (a: Expr, b: Expr): boolean => {
    if (a.kind === 'name' && free.includes(a.name)) {
      const known = by.get(a.name)
      if (!known) by.set(a.name, b)
      return !known || printExpr(known) === printExpr(b)
    }
    if (a.kind === 'access' && b.kind === 'access')
      return (
        a.name === b.name &&
        a.indices.every((index, i) => {
          const other = b.indices[i]!
          return index.kind === 'expr' && other.kind === 'expr' && fits(index.expr, other.expr)
        })
      )
    if (a.kind === 'negate' && b.kind === 'negate') return fits(a.x, b.x)
    if (a.kind === 'binary' && b.kind === 'binary')
      return a.op === b.op && fits(a.a, b.a) && fits(a.b, b.b)
    if (a.kind === 'call' && b.kind === 'call')
      return a.fn === b.fn && a.args.every((arg, i) => fits(arg, b.args[i]!))
    return printExpr(a) === printExpr(b)
  }
  return fits(pattern, expr)
}
