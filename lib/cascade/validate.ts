import { broken } from './error.js'
import {
  type Access,
  type CascadeIR,
  type Expr,
  type Family,
  type Index,
  type Iteration,
  type Reducer,
  rankOf,
  rewrite,
  rewriteTest,
  type Span,
  type Split,
  type Statement,
  sizedRanks,
  statementsOf,
  visitAccesses,
  visitExprs,
  visitPredicate,
} from './ir.js'
import type { Syntax } from './parse.js'

/** @internal The name of an index that is one bare variable. */
export function plainVariable(index: Index): string | undefined {
  return index.kind === 'expr' && index.expr.kind === 'name' && /^[a-z]/.test(index.expr.name)
    ? index.expr.name
    : undefined
}

/** @internal k for an index of the form variable + k. */
export function stepOf(index: Index, variable: string): number | undefined {
  if (index.kind !== 'expr') return undefined
  const { expr } = index
  if (expr.kind === 'name') return expr.name === variable ? 0 : undefined
  if (expr.kind !== 'binary' || expr.op !== '+') return undefined
  const [a, b] = expr.a.kind === 'name' ? [expr.a, expr.b] : [expr.b, expr.a]
  return a.kind === 'name' && a.name === variable && b.kind === 'number' ? b.value : undefined
}

/** @internal Every access that a statement reads, those of its predicate and of indices included. */
export function readsOf(statement: Statement): Access[] {
  const reads: Access[] = []
  const add = (access: Access) => reads.push(access)
  visitAccesses(statement.expr, add)
  if (statement.where) {
    visitPredicate(statement.where, (expr) => {
      if (expr.kind === 'access') add(expr)
    })
  }
  return reads
}

// Whether an index is the last of a variable's rank: its name alone
const isLast = (index: Index, variable: string): boolean =>
  index.kind === 'expr' && index.expr.kind === 'name' && index.expr.name === rankOf(variable)

const list = (names: readonly string[]) => `[${names.join(',')}]`

function namesOf(access: Access): string[] {
  return access.indices.map(
    (index) => plainVariable(index) ?? (index.kind === 'pin' ? index.name : '*'),
  )
}

/** @internal Gives names their meanings and checks every rule that the text alone decides. */
export function validate(syntax: Syntax): CascadeIR {
  const { splits } = syntax
  const written = statementsOf(syntax.steps)
  const end: Span = [1, 1, 0]
  if (written.length === 0) throw broken('CAS001', 'line 1: expected a statement', end)

  const ranks = new Map<string, number | undefined>()
  for (const { name, size, span } of syntax.ranks) {
    if (ranks.has(name) && ranks.get(name) !== size) {
      throw broken(
        'CAS003',
        `rank ${name} is ${ranks.get(name) ?? '?'} but is declared as ${size ?? '?'} on line ${span[0]}`,
        span,
        name,
      )
    }
    ranks.set(name, size)
  }

  const variables = variablesOf(written)
  const steps = resolved(syntax.steps, variables, ranks)
  const all = statementsOf(steps)
  const produced = new Set(all.map(({ out }) => out.name))
  checkSplits(splits, ranks)
  checkRanks(all)
  checkIterations(steps, all)
  const inputs = checkOrder(steps, produced)
  const bound = steps.map((step) =>
    'body' in step
      ? { ...step, body: step.body.map((one) => bindReduction(one, variables, step.variable)) }
      : bindReduction(step, variables, undefined),
  )

  for (const { where } of all) {
    if (!where) continue
    visitPredicate(where, (expr) => {
      if (expr.kind === 'access' && produced.has(expr.name)) {
        throw broken(
          'CAS010',
          'masks must be decidable from indices and integer tensors',
          expr.span,
          expr.name,
        )
      }
    })
  }

  const families = familiesOf(splits, variables)
  const sized = sizedRanks({ ranks, families })
  const read = new Set<string>()
  const scalars: string[] = []
  for (const { expr, where } of all) {
    const bare = (one: Expr) => {
      if (one.kind === 'access') read.add(one.name)
      if (one.kind !== 'name' || variables.includes(one.name)) return
      if (!sized.has(one.name) && !scalars.includes(one.name)) scalars.push(one.name)
    }
    visitExprs(expr, bare)
    if (where) visitPredicate(where, bare)
  }
  const outputs = [...produced].filter((name) => !read.has(name))
  return { ranks, splits, families, steps: bound, inputs, outputs, scalars, variables }
}

// Names that index something, in the order of the text
function variablesOf(all: readonly Statement[]): string[] {
  const variables: string[] = []
  const note = (name: string) => {
    if (/^[a-z]/.test(name) && !variables.includes(name)) variables.push(name)
  }
  const noteIndex = (index: Index) => {
    if (index.kind === 'pin') note(index.name)
    else visitExprs(index.expr, (expr) => expr.kind === 'name' && note(expr.name))
  }
  for (const { out, expr, where, reduce } of all) {
    out.indices.forEach(noteIndex)
    visitAccesses(expr, ({ indices }) => indices.forEach(noteIndex))
    if (where)
      visitPredicate(where, (one) => one.kind === 'access' && one.indices.forEach(noteIndex))
    for (const name of reduce?.over ?? []) note(name)
  }
  return variables
}

// A bare name that some statement makes without ranks reads it, though a rank has the name too unless in brackets
function resolved(
  steps: Syntax['steps'],
  variables: readonly string[],
  ranks: ReadonlyMap<string, number | undefined>,
): Syntax['steps'] {
  const made = new Set(
    statementsOf(steps).flatMap(({ out }) => (out.indices.length === 0 ? [out.name] : [])),
  )
  if (made.size === 0) return steps
  const sized = new Set([...ranks.keys(), ...variables.map(rankOf)])
  const read = (expr: Expr): Expr | undefined => {
    if (expr.kind === 'name' && made.has(expr.name) && !variables.includes(expr.name))
      return { kind: 'access', name: expr.name, indices: [], span: expr.span }
    if (expr.kind !== 'access') return undefined
    const inside = (one: Expr) => (one.kind === 'name' && sized.has(one.name) ? one : read(one))
    return {
      ...expr,
      indices: expr.indices.map((index) =>
        index.kind === 'pin' ? index : { ...index, expr: rewrite(index.expr, inside) },
      ),
    }
  }
  const whole = (one: Statement): Statement => ({
    ...one,
    expr: rewrite(one.expr, read),
    where: one.where && rewriteTest(one.where, read),
  })
  return steps.map((step) =>
    'body' in step ? { ...step, body: step.body.map(whole) } : whole(step),
  )
}

function checkSplits(
  splits: readonly Split[],
  ranks: ReadonlyMap<string, number | undefined>,
): void {
  const line = new Map<string, number>()
  for (const { variable, outer, inner, size, tailMask, span } of splits) {
    if (new Set([variable, outer, inner]).size < 3) {
      throw broken(
        'CAS001',
        `line ${span[0]}: split ${variable} needs three different variables, got ${variable}, ${outer} and ${inner}`,
        span,
        rankOf(variable),
      )
    }
    // a part may be split again, but nothing twice, and nothing is part of two
    for (const [name, what] of [
      [variable, 'is split'],
      [outer, 'is part of a split'],
      [inner, 'is part of a split'],
    ] as const) {
      const before = line.get(`${name} ${what}`)
      if (before !== undefined) {
        throw broken(
          'CAS004',
          `${name} ${what} on line ${before} and again on line ${span[0]}`,
          span,
          rankOf(name),
        )
      }
      line.set(`${name} ${what}`, span[0])
    }
    for (let at = outer, steps = 0; ; steps++) {
      const next = splits.find((one) => one.variable === at)
      if (!next) break
      if (steps > splits.length || next.outer === variable || next.inner === variable) {
        throw broken(
          'CAS011',
          `${variable} -> ${at} -> ${variable} split each other; the parts of a split need new names`,
          span,
          rankOf(variable),
        )
      }
      at = next.outer
    }
    const whole = ranks.get(rankOf(variable))
    if (whole !== undefined && whole % size !== 0 && !tailMask)
      throw indivisible(variable, size, whole, span)
  }
}

/** @internal */
export function indivisible(variable: string, size: number, whole: number, span: Span) {
  return broken(
    'CAS008',
    `split ${variable} by ${size} with ${rankOf(variable)}=${whole}: add "tail mask"`,
    span,
    rankOf(variable),
  )
}

// A split rank is one family with its parts as levels; every other variable is a family of its own
function familiesOf(splits: readonly Split[], variables: readonly string[]): Family[] {
  const parts = new Map(splits.map((split) => [split.variable, split]))
  const within = new Set(splits.flatMap(({ outer, inner }) => [outer, inner]))
  const levels = (variable: string): string[] => {
    const split = parts.get(variable)
    return split ? [...levels(split.outer), ...levels(split.inner)] : [variable]
  }
  const roots = [...variables, ...parts.keys()].filter((name) => !within.has(name))
  return [...new Set(roots)].map((name) => ({ name: rankOf(name), levels: levels(name) }))
}

function checkRanks(all: readonly Statement[]): void {
  const first = new Map<string, { names: string[]; line: number }>()
  const check = (access: Access) => {
    const names = namesOf(access)
    const before = first.get(access.name)
    if (!before) {
      first.set(access.name, { names, line: access.span[0] })
      return
    }
    const plain = !names.includes('*') && !before.names.includes('*')
    const reordered =
      plain &&
      names.join() !== before.names.join() &&
      [...names].sort().join() === [...before.names].sort().join()
    if (names.length !== before.names.length || reordered) {
      throw broken(
        'CAS002',
        `${access.name} has ranks ${list(before.names)} on line ${before.line} but is read as ${list(names)} on line ${access.span[0]}`,
        access.span,
        access.name,
      )
    }
  }
  for (const statement of all) {
    for (const access of readsOf(statement)) check(access)
    check(statement.out)
  }
}

function checkIterations(steps: Syntax['steps'], all: readonly Statement[]): void {
  for (const step of steps) {
    if (!('body' in step)) continue
    const { variable, body } = step
    for (const { out, init } of body) {
      if (init) {
        throw broken(
          'CAS007',
          `init of ${out.name} stands inside iterate ${variable}, where it would run at every step; put it in front`,
          out.span,
          out.name,
        )
      }
      out.indices.forEach((index, at) => {
        const ahead = stepOf(index, variable)
        if (ahead === undefined && plainVariable(index) === undefined) {
          throw broken(
            'CAS007',
            `${out.name} is written at an index that is neither a plain variable nor ${variable}+1`,
            out.span,
            out.name,
          )
        }
        if (ahead === undefined || ahead === 0) return
        if (ahead !== 1) {
          throw broken(
            'CAS007',
            `${out.name} is written at ${variable}+${ahead}; an iterative tensor is written at ${variable}+1`,
            out.span,
            out.name,
          )
        }
        const starts = all.filter((one) => one.init && one.out.name === out.name)
        const starting = starts.map((one) => ({ ...one.out, pin: one.out.indices[at] }))
        const odd = starting.find(
          ({ pin }) => pin?.kind === 'pin' && (pin.name !== variable || pin.value !== 0),
        )
        if (odd?.pin?.kind === 'pin') {
          throw broken(
            'CAS007',
            `${out.name} starts at ${odd.pin.name}=${odd.pin.value}; an iterative tensor over ${variable} starts at ${variable}=0`,
            odd.span,
            out.name,
          )
        }
        if (!starting.some(({ pin }) => pin?.kind === 'pin')) {
          throw broken(
            'CAS007',
            `${out.name} is iterative over ${variable} but has no init; add init ${out.name}[…${variable}=0…]`,
            out.span,
            out.name,
          )
        }
      })
    }
    const iterative = new Set(
      body
        .filter(({ out }) => out.indices.some((index) => stepOf(index, variable) === 1))
        .map(({ out }) => out.name),
    )
    for (const statement of body) {
      for (const access of readsOf(statement)) {
        for (const index of access.indices) {
          const ahead = stepOf(index, variable)
          if (iterative.has(access.name) && isLast(index, variable)) {
            throw broken(
              'CAS007',
              `${access.name} is read at ${rankOf(variable)} inside iterate ${variable}, where its last value is not there yet; read it after the iteration`,
              access.span,
              access.name,
            )
          }
          if (iterative.has(access.name) && ahead !== undefined && ahead > 1) {
            throw broken(
              'CAS007',
              `${access.name} is read at ${variable}+${ahead}, which is not there yet; at most ${variable}+1 is`,
              access.span,
              access.name,
            )
          }
        }
      }
    }
  }
}

// Reads come after what they read, except from the step before in an iteration. Returns the tensors nobody produces.
function checkOrder(steps: Syntax['steps'], produced: ReadonlySet<string>): string[] {
  const inputs: string[] = []
  const done = new Map<string, Statement>()
  const depends = new Map<string, Set<string>>()
  // What a step of an iteration reads of the step before is no dependency within the step
  const iterative = (step: Iteration) =>
    new Set(
      step.body
        .filter(({ out }) => out.indices.some((index) => stepOf(index, step.variable) === 1))
        .map(({ out }) => out.name),
    )
  const previous = (access: Access, step: Iteration | undefined, states: ReadonlySet<string>) =>
    step !== undefined &&
    states.has(access.name) &&
    access.indices.some((index) => stepOf(index, step.variable) === 0)
  for (const step of steps) {
    const iteration = 'body' in step ? step : undefined
    const states = iteration ? iterative(iteration) : new Set<string>()
    for (const statement of 'body' in step ? step.body : [step]) {
      const set = depends.get(statement.out.name) ?? new Set()
      for (const access of readsOf(statement)) {
        if (produced.has(access.name) && !previous(access, iteration, states)) set.add(access.name)
      }
      depends.set(statement.out.name, set)
    }
  }
  const cycleFrom = (start: string): string[] | undefined => {
    const seen = new Set<string>()
    const path = [{ name: start, next: depends.get(start)?.values() }]
    for (let at = path.at(-1); at; at = path.at(-1)) {
      const { value: name, done } = at.next?.next() ?? { done: true }
      if (done) path.pop()
      else if (name === start) return [...path.map((one) => one.name), name]
      else if (!seen.has(name)) {
        seen.add(name)
        path.push({ name, next: depends.get(name)?.values() })
      }
    }
    return undefined
  }
  let states: ReadonlySet<string> = new Set()
  const stepped = new Set<string>()
  const visit = (statement: Statement, iteration: Iteration | undefined) => {
    for (const access of readsOf(statement)) {
      if (!produced.has(access.name)) {
        if (!inputs.includes(access.name)) inputs.push(access.name)
        continue
      }
      const ahead =
        iteration !== undefined &&
        states.has(access.name) &&
        !stepped.has(access.name) &&
        access.indices.some((index) => stepOf(index, iteration.variable) === 1)
      if (done.has(access.name) && !ahead) continue
      const cycle = cycleFrom(access.name)
      if (cycle) {
        throw broken(
          'CAS011',
          `${cycle.join(' -> ')} depend on each other without an iterative rank`,
          access.span,
          access.name,
        )
      }
      throw broken(
        'CAS004',
        `${access.name} is read on line ${access.span[0]} before it is produced`,
        access.span,
        access.name,
      )
    }
    const { out, init } = statement
    const before = done.get(out.name)
    const continues =
      before?.init &&
      iteration &&
      out.indices.some((index) => stepOf(index, iteration.variable) === 1)
    if (before && !continues) {
      throw broken(
        'CAS004',
        `${out.name} is produced on line ${before.src.line} and again on line ${out.span[0]}`,
        out.span,
        out.name,
      )
    }
    if (!init && !iteration) {
      const odd = out.indices.find((index) => plainVariable(index) === undefined)
      if (odd) {
        throw broken(
          'CAS007',
          `${out.name} is written at an index that is no plain variable; only iterative tensors are, inside iterate`,
          out.span,
          out.name,
        )
      }
    }
    if (iteration) stepped.add(out.name)
    done.set(out.name, statement)
  }
  for (const step of steps) {
    if ('body' in step) {
      states = iterative(step)
      stepped.clear()
      for (const statement of step.body) visit(statement, step)
    } else visit(step, undefined)
  }
  return inputs
}

// Variables that are absent on the left are reduced, by a sum unless the text says otherwise
function bindReduction(
  statement: Statement,
  variables: readonly string[],
  iterated: string | undefined,
): Statement {
  const { out, expr, where, reduce, init } = statement
  const left = new Set<string>(iterated === undefined ? [] : [iterated])
  for (const index of out.indices) {
    if (index.kind === 'pin') continue
    visitExprs(index.expr, (one) => one.kind === 'name' && left.add(one.name))
  }
  const right: string[] = []
  const note = (one: Expr) => {
    if (one.kind === 'name' && variables.includes(one.name) && !right.includes(one.name))
      right.push(one.name)
  }
  visitExprs(expr, note)
  if (where) visitPredicate(where, note)
  const reduced = right.filter((name) => !left.has(name))
  const named = reduce?.over ?? []
  for (const name of named) {
    if (left.has(name)) {
      throw broken(
        'CAS005',
        `${name} is reduced on the right of ${out.name} but stands on its left`,
        out.span,
        out.name,
      )
    }
  }
  const missing = reduced.filter((name) => !named.includes(name))
  if (reduce && missing.length > 0) {
    const inside = readsOf(statement).flatMap(({ indices }) => indices.map(plainVariable))
    const hint = inside.includes(missing[0])
      ? ''
      : '; in brackets lower case is an index variable, a number of the call has a capital there'
    throw broken(
      'CAS005',
      `${missing[0]} is neither on the left of ${out.name} nor reduced by ${reduce.op}(${named.join(',')})${hint}`,
      out.span,
      out.name,
    )
  }
  if (!init) {
    for (const name of left) {
      if (name !== iterated && /^[a-z]/.test(name) && !right.includes(name)) {
        throw broken(
          'CAS005',
          `${name} appears on the left of ${out.name} but in no operand`,
          out.span,
          out.name,
        )
      }
    }
  }
  const over = reduce ? named : reduced
  const op: Reducer = reduce?.op ?? 'sum'
  return { ...statement, reduce: over.length > 0 || reduce ? { op, over } : undefined }
}
