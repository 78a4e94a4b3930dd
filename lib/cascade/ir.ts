/** Line and column, both from 1, and length of a piece of the text. */
export type Span = readonly [line: number, column: number, length: number]

/** Arithmetic on the right of a statement, in an index or in a predicate. */
export type Expr =
  | { kind: 'number'; value: number; span: Span }
  | { kind: 'name'; name: string; span: Span }
  | Access
  | { kind: 'negate'; x: Expr; span: Span }
  | { kind: 'binary'; op: '+' | '-' | '*' | '/'; a: Expr; b: Expr; span: Span }
  | { kind: 'call'; fn: FunctionName; args: readonly Expr[]; span: Span }
  | { kind: 'if'; test: Predicate; yes: Expr; no: Expr; span: Span }

/** Reading or writing a tensor at some coordinates. */
export interface Access {
  kind: 'access'
  name: string
  indices: readonly Index[]
  span: Span
}

/** One coordinate: an expression over index variables, a variable pinned to a number, or a bounded expression. */
export type Index =
  | { kind: 'expr'; expr: Expr }
  | { kind: 'pin'; name: string; value: number }
  | { kind: 'clamp'; expr: Expr; least: number; most: number }

/** Which points a statement visits. */
export type Predicate =
  | { kind: 'compare'; op: '<' | '<=' | '>' | '>=' | '==' | '!='; a: Expr; b: Expr; span: Span }
  | { kind: 'and' | 'or'; a: Predicate; b: Predicate }
  | { kind: 'not'; x: Predicate }

/** How points that fall on one coordinate are combined. */
export type Reducer = 'sum' | 'max' | 'min' | 'prod' | 'logsumexp'

/** Functions that an expression may call. */
export type FunctionName =
  | 'exp'
  | 'exp2'
  | 'log'
  | 'log1p'
  | 'tanh'
  | 'sigmoid'
  | 'relu'
  | 'softplus'
  | 'pow'
  | 'max'
  | 'min'
  | 'abs'
  | 'sqrt'
  | 'rsqrt'
  | 'erf'
  | 'sin'
  | 'cos'

/** @internal */
export const reducers: readonly string[] = ['sum', 'max', 'min', 'prod', 'logsumexp']

/** One einsum. */
export interface Statement {
  out: Access
  /** `over` lists the variables that are absent on the left, in the order of their loops. */
  reduce: { op: Reducer; over: readonly string[] } | undefined
  expr: Expr
  where: Predicate | undefined
  init: boolean
  src: { line: number; col: number; text: string }
}

/** Statements that run once for each value of an iterative variable, in ascending order. */
export interface Iteration {
  variable: string
  body: readonly Statement[]
  span: Span
}

/** A variable taken apart into an outer and an inner one: `m = m1 * M0 + m0`. */
export interface Split {
  variable: string
  outer: string
  inner: string
  size: number
  tailMask: boolean
  span: Span
}

/** A rank and the variables that run over it, outermost first; more than one where it is split. */
export interface Family {
  name: string
  levels: readonly string[]
}

/** A parsed and checked cascade. */
export interface CascadeIR {
  /** Declared sizes; undefined for one that is known at run time. */
  ranks: ReadonlyMap<string, number | undefined>
  splits: readonly Split[]
  /** Every rank that the text iterates, in order of first use. */
  families: readonly Family[]
  steps: readonly (Statement | Iteration)[]
  /** Tensors that the text reads and does not produce, in order of first use. */
  inputs: readonly string[]
  /** Tensors that are produced and never read by a later statement. */
  outputs: readonly string[]
  /** Run-time scalars. */
  scalars: readonly string[]
  /** Index variables, in order of first use. */
  variables: readonly string[]
}

/** @internal Every statement in the order of the text. */
export function statementsOf(steps: CascadeIR['steps']): Statement[] {
  return steps.flatMap((step) => ('body' in step ? step.body : [step]))
}

/** @internal The rank that a variable runs over. */
export function rankOf(variable: string): string {
  return variable.toUpperCase()
}

/** @internal Ranks that have a size, those of a split variable's parts among them. */
export function sizedRanks({
  ranks,
  families,
}: Pick<CascadeIR, 'ranks' | 'families'>): Set<string> {
  const own = families.flatMap(({ name, levels }) => [name, ...levels.map(rankOf)])
  return new Set([...ranks.keys(), ...own])
}

/** @internal */
export const tensorsOf = ({ inputs, steps }: CascadeIR): Set<string> =>
  new Set([...inputs, ...statementsOf(steps).map(({ out }) => out.name)])

/** @internal Calls back for every access in an expression, its indices included, reads before what contains them. */
export function visitAccesses(expr: Expr, visit: (access: Access) => void): void {
  visitExprs(expr, (one) => {
    if (one.kind === 'access') visit(one)
  })
}

/** @internal Calls back for every expression inside one, itself last. */
export function visitExprs(expr: Expr, visit: (expr: Expr) => void): void {
  switch (expr.kind) {
    case 'access':
      for (const index of expr.indices) if (index.kind !== 'pin') visitExprs(index.expr, visit)
      break
    case 'negate':
      visitExprs(expr.x, visit)
      break
    case 'binary':
      visitExprs(expr.a, visit)
      visitExprs(expr.b, visit)
      break
    case 'call':
      for (const arg of expr.args) visitExprs(arg, visit)
      break
    case 'if':
      visitPredicate(expr.test, visit)
      visitExprs(expr.yes, visit)
      visitExprs(expr.no, visit)
      break
  }
  visit(expr)
}

/** @internal Calls back for every expression inside a predicate. */
export function visitPredicate(predicate: Predicate, visit: (expr: Expr) => void): void {
  if (predicate.kind === 'compare') {
    visitExprs(predicate.a, visit)
    visitExprs(predicate.b, visit)
  } else if (predicate.kind === 'not') {
    visitPredicate(predicate.x, visit)
  } else {
    visitPredicate(predicate.a, visit)
    visitPredicate(predicate.b, visit)
  }
}

/** @internal An expression with some of its parts exchanged; what `change` leaves undefined is looked into. */
export function rewrite(expr: Expr, change: (expr: Expr) => Expr | undefined): Expr {
  const changed = change(expr)
  if (changed) return changed
  const into = (one: Expr) => rewrite(one, change)
  switch (expr.kind) {
    case 'number':
    case 'name':
      return expr
    case 'access':
      return {
        ...expr,
        indices: expr.indices.map((index) =>
          index.kind === 'pin' ? index : { ...index, expr: into(index.expr) },
        ),
      }
    case 'negate':
      return { ...expr, x: into(expr.x) }
    case 'binary':
      return { ...expr, a: into(expr.a), b: into(expr.b) }
    case 'call':
      return { ...expr, args: expr.args.map(into) }
    case 'if':
      return {
        ...expr,
        test: rewriteTest(expr.test, change),
        yes: into(expr.yes),
        no: into(expr.no),
      }
  }
}

/** @internal */
export function rewriteTest(test: Predicate, change: (expr: Expr) => Expr | undefined): Predicate {
  if (test.kind === 'compare')
    return { ...test, a: rewrite(test.a, change), b: rewrite(test.b, change) }
  if (test.kind === 'not') return { ...test, x: rewriteTest(test.x, change) }
  return { ...test, a: rewriteTest(test.a, change), b: rewriteTest(test.b, change) }
}

/** @internal The names without brackets in a predicate. */
export function namesIn(predicate: Predicate): Set<string> {
  const names = new Set<string>()
  visitPredicate(predicate, (one) => {
    if (one.kind === 'name') names.add(one.name)
  })
  return names
}
