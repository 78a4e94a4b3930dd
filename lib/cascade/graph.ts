import {
  type Access,
  type CascadeIR,
  type Expr,
  type Family,
  type Index,
  rankOf,
  type Statement,
  visitAccesses,
  visitExprs,
  visitPredicate,
} from './ir.js'
import { splitBy } from './sizes.js'
import { plainVariable, readsOf, stepOf } from './validate.js'

/** @internal Where along a variable a tensor is touched: here, one step ahead, at the end, or at a fixed place. */
export type Place = 'cur' | 'next' | 'last' | 'first'

/** @internal One tensor as one statement touches it. */
export interface Use {
  tensor: string
  places: ReadonlyMap<string, Place>
  /** Variables of each axis; undefined where the axis is at a fixed place. */
  axes: readonly (ReadonlySet<string> | undefined)[]
  /** Variables along which the elements come in no ascending order: reversed, or looked up through a list. */
  scattered: ReadonlySet<string>
}

/** @internal One einsum of the dependency graph. */
export interface Node {
  name: string
  statement: Statement
  /** The variable of the iteration that the statement belongs to. */
  iteration: string | undefined
  out: Use
  ins: readonly Use[]
  variables: ReadonlySet<string>
  /** Variables that the sum of a prefix runs over: `sum(k) A[k] where k <= i`. */
  prefix: ReadonlySet<string>
}

/** @internal A cascade as its dependencies. */
export interface Graph {
  nodes: readonly Node[]
  producers: ReadonlyMap<string, readonly Node[]>
  /** Tensors that are another one with its ranks taken apart. */
  aliases: ReadonlyMap<string, string>
  families: readonly Family[]
}

/** @internal The variables that index a tensor here, the pinned and the last ones left out. */
export const indexedBy = (use: Use, variable: string): boolean => {
  const place = use.places.get(variable)
  return place === 'cur' || place === 'next'
}

/** @internal The dependency graph of a checked cascade. Initial statements that only take a rank apart become aliases. */
export function graphOf(ir: CascadeIR): Graph {
  const aliases = new Map<string, string>()
  const families = familiesOf(ir)
  const levels = new Map(families.map(({ name, levels }) => [name, levels]))
  const expand = (variable: string): readonly string[] => levels.get(rankOf(variable)) ?? [variable]
  const ranks = new Map<string, readonly string[]>([...levels])
  for (const variable of ir.variables)
    if (!ranks.has(rankOf(variable))) ranks.set(rankOf(variable), [variable])
  const homes = homesOf(ir)

  const nodes: Node[] = []
  for (const step of ir.steps) {
    const iteration = 'body' in step ? step.variable : undefined
    const body = 'body' in step ? step.body : [step]
    const inBody = new Set(iteration === undefined ? [] : body.map(({ out }) => out.name))
    for (const statement of body) {
      const source = aliasOf(statement)
      if (source !== undefined) {
        aliases.set(statement.out.name, aliases.get(source) ?? source)
        continue
      }
      const use = (access: Access): Use => {
        const places = new Map<string, Place>()
        const scattered = new Set<string>()
        const axes = access.indices.map((index, axis) => {
          if (index.kind === 'pin') {
            for (const v of expand(index.name)) places.set(v, 'first')
            return undefined
          }
          const { expr } = index
          if (expr.kind === 'name' && ranks.has(expr.name) && index.kind === 'expr') {
            for (const v of ranks.get(expr.name)!) places.set(v, 'last')
            return undefined
          }
          const found = new Set<string>()
          let lookedUp = false
          visitExprs(expr, (one) => {
            if (one.kind === 'access') lookedUp = true
            if (one.kind === 'name' && ir.variables.includes(one.name))
              for (const v of expand(one.name)) found.add(v)
          })
          const ahead =
            iteration !== undefined && stepOf(index, iteration) === 1 && inBody.has(access.name)
          for (const v of found) {
            places.set(v, ahead && v === iteration ? 'next' : 'cur')
            if (descends(expr, v)) scattered.add(v)
          }
          if (lookedUp) {
            for (const v of expand(homes.get(`${access.name} ${axis}`) ?? '')) {
              if (v === '') continue
              places.set(v, 'cur')
              scattered.add(v)
            }
          }
          return found.size > 0 ? found : undefined
        })
        // What a step computes for itself alone belongs to the step
        if (iteration !== undefined && inBody.has(access.name) && !places.has(iteration))
          places.set(iteration, 'cur')
        return { tensor: access.name, places, axes, scattered }
      }
      const out = use(statement.out)
      const ins = readsOf(statement).map(use)
      const variables = new Set<string>(iteration === undefined ? [] : [iteration])
      for (const one of [out, ...ins])
        for (const [v, place] of one.places)
          if (place === 'cur' || place === 'next') variables.add(v)
      const note = (one: Expr) => {
        if (one.kind === 'name' && ir.variables.includes(one.name))
          for (const v of expand(one.name)) variables.add(v)
      }
      visitExprs(statement.expr, note)
      if (statement.where) visitPredicate(statement.where, note)
      nodes.push({
        name: statement.out.name,
        statement,
        iteration,
        out,
        ins,
        variables,
        prefix: prefixOf(statement, expand),
      })
    }
  }
  const producers = new Map<string, Node[]>()
  for (const node of nodes) producers.set(node.name, [...(producers.get(node.name) ?? []), node])
  return { nodes, producers, aliases, families }
}

// Parts of a rank that no split names: `K[a*8 + b]` says as much as a split of its rank would
function familiesOf(ir: CascadeIR): Family[] {
  const families = [...ir.families]
  const lone = (v: string) =>
    families.findIndex(({ levels }) => levels.length === 1 && levels[0] === v)
  for (const step of ir.steps) {
    for (const statement of 'body' in step ? step.body : [step]) {
      for (const { indices } of readsOf(statement)) {
        for (const index of indices) {
          const parts = partsOf(index)
          if (!parts || parts.some((v) => lone(v) < 0)) continue
          const at = Math.min(...parts.map(lone))
          const name = rankOf(commonStem(parts[0], parts[1]))
          families[at] = { name, levels: parts }
          const gone = parts.map(lone).find((i) => i >= 0)
          if (gone !== undefined) families.splice(gone, 1)
        }
      }
    }
  }
  return families
}

function partsOf(index: Index): [outer: string, inner: string] | undefined {
  if (index.kind !== 'expr' || index.expr.kind !== 'binary' || index.expr.op !== '+')
    return undefined
  // u*4 + r, in any order
  const isVariable = (x: Expr) => x.kind === 'name' && /^[a-z]/.test(x.name)
  const { a, b } = index.expr
  const [whole, inner] = isVariable(b) ? [a, b] : [b, a]
  if (inner.kind !== 'name' || whole.kind !== 'binary' || whole.op !== '*') return undefined
  const [outer, step] = isVariable(whole.a) ? [whole.a, whole.b] : [whole.b, whole.a]
  if (outer.kind !== 'name' || !isVariable(outer) || !isVariable(inner)) return undefined
  const fits =
    step.kind === 'number'
      ? step.value > 1
      : step.kind === 'name' && step.name === rankOf(inner.name)
  return fits ? [outer.name, inner.name] : undefined
}

function commonStem(a: string, b: string): string {
  let length = 0
  while (length < a.length && a[length] === b[length]) length++
  return a.slice(0, length) || `${a}${b}`
}

// init BK[e,m1,m0] = K[e, m1*M0 + m0]: nothing is computed, so nothing is traversed
function aliasOf({ init, out, expr, reduce, where }: Statement): string | undefined {
  const plain = out.indices.every((index) => plainVariable(index) !== undefined)
  return init && plain && expr.kind === 'access' && !reduce && !where ? expr.name : undefined
}

// The variable that names an axis: the first that stands on it alone
function homesOf(ir: CascadeIR): Map<string, string> {
  const homes = new Map<string, string>()
  const note = ({ name, indices }: Access) =>
    indices.forEach((index, axis) => {
      const variable = plainVariable(index) ?? splitBy(ir, index)[0]
      if (variable !== undefined && !homes.has(`${name} ${axis}`))
        homes.set(`${name} ${axis}`, variable)
    })
  for (const step of ir.steps) {
    for (const statement of 'body' in step ? step.body : [step]) {
      note(statement.out)
      for (const access of readsOf(statement)) note(access)
    }
  }
  return homes
}

// Whether an index falls as the variable rises, as in X[T - 1 - t]
function descends(expr: Expr, variable: string, sign = 1): boolean {
  switch (expr.kind) {
    case 'name':
      return expr.name === variable && sign < 0
    case 'negate':
      return descends(expr.x, variable, -sign)
    case 'binary': {
      if (expr.op === '+' || expr.op === '-')
        return (
          descends(expr.a, variable, sign) ||
          descends(expr.b, variable, expr.op === '-' ? -sign : sign)
        )
      const factor = (x: Expr) => (x.kind === 'negate' ? -1 : 1)
      return (
        descends(expr.a, variable, sign * factor(expr.b)) ||
        descends(expr.b, variable, sign * factor(expr.a))
      )
    }
    default:
      return false
  }
}

// A sum over a variable that the predicate bounds by one on the left, on which no summand with the variable depends
function prefixOf(
  { out, expr, where, reduce }: Statement,
  expand: (v: string) => readonly string[],
): Set<string> {
  const prefix = new Set<string>()
  if (!where || !reduce) return prefix
  const left = new Set(out.indices.map(plainVariable).filter((v) => v !== undefined))
  const bounds = new Map<string, Set<string>>()
  const pair = (a: Expr, b: Expr) => {
    const names = (x: Expr) => {
      const found = new Set<string>()
      visitExprs(x, (one) => one.kind === 'name' && found.add(one.name))
      return found
    }
    for (const k of names(a)) {
      if (!reduce.over.includes(k)) continue
      for (const i of names(b)) if (left.has(i)) bounds.set(k, (bounds.get(k) ?? new Set()).add(i))
    }
  }
  const walk = (predicate: typeof where): void => {
    if (predicate.kind === 'compare') {
      if (predicate.op === '==' || predicate.op === '!=') return
      pair(predicate.a, predicate.b)
      pair(predicate.b, predicate.a)
    } else if (predicate.kind === 'not') walk(predicate.x)
    else {
      walk(predicate.a)
      walk(predicate.b)
    }
  }
  walk(where)
  for (const [k, ends] of bounds) {
    const open = new Set(ends)
    visitAccesses(expr, ({ indices }) => {
      const names = new Set<string>()
      for (const index of indices) {
        if (index.kind !== 'pin')
          visitExprs(index.expr, (one) => one.kind === 'name' && names.add(one.name))
      }
      if (names.has(k)) for (const i of names) open.delete(i)
    })
    if (open.size > 0) for (const v of expand(k)) prefix.add(v)
  }
  return prefix
}
