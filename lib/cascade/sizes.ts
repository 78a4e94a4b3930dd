import { checkInteger } from '../check.js'
import { broken } from './error.js'
import {
  type Access,
  type CascadeIR,
  type Expr,
  type Index,
  rankOf,
  type Span,
  type Statement,
  statementsOf,
  visitAccesses,
  visitExprs,
  visitPredicate,
} from './ir.js'
import { indivisible, plainVariable, readsOf, stepOf } from './validate.js'

/**
 * @internal The sizes of all ranks in one call. They come from declarations, the caller, splits, and the shapes of inputs
 * under plain variables.
 */
export class Sizes {
  readonly #sizes = new Map<string, { size: number; source: string }>()

  constructor(
    readonly ir: CascadeIR,
    shapes: ReadonlyMap<string, readonly number[]>,
    given: Readonly<Record<string, number>> = {},
    readonly remedy = 'give it in sizes',
  ) {
    const all = statementsOf(ir.steps)
    const first = all[0]!.out.span
    for (const [rank, size] of ir.ranks)
      if (size !== undefined) this.#learn(rank, size, 'its declaration', first)
    for (const [rank, size] of Object.entries(given))
      this.#learn(rank, checkInteger('cascade', `sizes.${rank}`, size, 0), 'sizes', first)
    const fromAccess = (access: Access) => {
      const { name, indices, span } = access
      const shape = shapes.get(name)
      if (!shape) return
      if (shape.length !== indices.length) {
        throw broken(
          'CAS002',
          `${name} has ${indices.length} ranks on line ${span[0]} but was given with ${shape.length}`,
          span,
          name,
        )
      }
      indices.forEach((index, i) => {
        const variable = plainVariable(index)
        if (variable !== undefined && ir.variables.includes(variable))
          this.#learn(rankOf(variable), shape[i]!, name, span)
        else
          for (const whole of splitBy(ir, index)) this.#learn(rankOf(whole), shape[i]!, name, span)
      })
    }
    for (const { expr, where } of all) {
      visitAccesses(expr, fromAccess)
      if (where) visitPredicate(where, (one) => one.kind === 'access' && fromAccess(one))
    }
    this.#tie()
    for (const { variable, outer, inner, size, tailMask, span } of ir.splits) {
      const whole = this.of(rankOf(variable), span)
      if (whole % size !== 0 && !tailMask) throw indivisible(variable, size, whole, span)
      this.#learn(rankOf(inner), size, 'its split', span)
      this.#learn(rankOf(outer), Math.ceil(whole / size), 'its split', span)
    }
    this.#tie()
  }

  // What nothing else tells is as large as the axis that it reads
  #tie(): void {
    tie(
      this.ir,
      (rank) => this.get(rank),
      (rank, size) => {
        this.#sizes.set(rank, { size, source: 'another' })
      },
    )
  }

  #learn(rank: string, size: number, source: string, span: Span): void {
    const known = this.#sizes.get(rank)
    if (known && known.size !== size) {
      throw broken(
        'CAS003',
        `rank ${rank} is ${known.size} from ${known.source} but ${size} from ${source}`,
        span,
        rank,
      )
    }
    if (!known) this.#sizes.set(rank, { size, source })
  }

  get(rank: string): number | undefined {
    return this.#sizes.get(rank)?.size
  }

  of(rank: string, span: Span): number {
    const size = this.get(rank)
    if (size === undefined)
      throw broken('CAS003', `rank ${rank} has no size; ${this.remedy}`, span, rank)
    return size
  }

  /** The shape of a tensor that the text produces. */
  shapeOf(out: Access): number[] {
    const all = statementsOf(this.ir.steps).filter((one) => one.out.name === out.name)
    return out.indices.map((index, i) => {
      const variable = index.kind === 'pin' ? index.name : [...variablesOf(index)][0]
      if (variable === undefined)
        throw broken(
          'CAS001',
          `line ${out.span[0]}: expected a variable on the left of ${out.name}`,
          out.span,
          out.name,
        )
      const size = this.of(rankOf(variable), out.span)
      // An iterative tensor has one more: before the first step
      const iterative = all.some(
        (one) => stepOf(one.out.indices[i]!, variable) === 1 || one.out.indices[i]!.kind === 'pin',
      )
      return iterative ? size + 1 : size
    })
  }

  /** Before anything is allocated: a tensor has no more coordinates than its statement has points. */
  checkPoints(limit: number): void {
    for (const step of this.ir.steps) {
      for (const statement of 'body' in step ? step.body : [step]) {
        const { out, reduce } = statement
        const variables = new Set([...leftOf(statement), ...(reduce?.over ?? [])])
        if ('body' in step) variables.add(step.variable)
        let points = 1
        for (const name of variables) points *= this.of(rankOf(name), out.span)
        if (points <= limit) continue
        const size = (name: string) => this.get(rankOf(name))!
        const largest = [...variables].reduce((a, b) => (size(b) > size(a) ? b : a))
        const short = (n: number) => n.toExponential(1).replace('e+', 'e').replace('.0e', 'e')
        throw broken(
          'CAS012',
          `${out.name} has ${short(points)} points, the limit is ${short(limit)}; raise maxPoints or shrink ${rankOf(largest)}`,
          out.span,
          out.name,
        )
      }
    }
  }
}

/** @internal K[e, m1*M0 + m0] tells the size of M, of which m1 and m0 are the parts. */
export function splitBy({ splits }: CascadeIR, index: Index): string[] {
  if (index.kind !== 'expr' || index.expr.kind !== 'binary' || index.expr.op !== '+') return []
  const { a, b } = index.expr
  const isPart = (x: Expr, part: string): boolean =>
    (x.kind === 'name' && x.name === part) ||
    (x.kind === 'binary' && x.op !== '/' && (isPart(x.a, part) || isPart(x.b, part)))
  return splits.flatMap(({ outer, inner, variable }) =>
    [
      [a, b],
      [b, a],
    ].some(
      ([high, low]) =>
        low!.kind === 'name' &&
        low!.name === inner &&
        high!.kind === 'binary' &&
        high!.op === '*' &&
        isPart(high!, outer),
    )
      ? [variable]
      : [],
  )
}

/**
 * @internal Sizes of ranks that only read what the text makes along another one, as u does in `S[t,u] = Q[t] * K[u]` of a K
 * that is made along t.
 */
export function tie(
  ir: CascadeIR,
  get: (rank: string) => number | undefined,
  set: (rank: string, size: number) => void,
): void {
  const all = statementsOf(ir.steps)
  const made = new Map(all.filter(({ init }) => !init).map(({ out }) => [out.name, out.indices]))
  const started = new Set(all.filter(({ init }) => init).map(({ out }) => out.name))
  const pairs = all.flatMap((one) =>
    readsOf(one).flatMap(({ name, indices }) =>
      indices.flatMap((index, axis) => {
        const own = made.get(name)?.[axis]
        const a = plainVariable(index) ?? splitBy(ir, index)[0]
        const b = own && plainVariable(own)
        const apart = a !== undefined && b !== undefined && a !== b && !started.has(name)
        return apart ? [[rankOf(a), rankOf(b)] as const] : []
      }),
    ),
  )
  for (let count = pairs.length; count > 0; count--) {
    for (const [a, b] of pairs) {
      const [x, y] = [get(a), get(b)]
      if (x === undefined && y !== undefined) set(a, y)
      if (y === undefined && x !== undefined) set(b, x)
    }
  }
}

/** @internal Ranks whose sizes neither an input nor a declaration tells. */
export function untoldRanks(ir: CascadeIR): string[] {
  const told = new Set<string>(ir.splits.flatMap(({ outer, inner }) => [outer, inner]))
  const note = ({ name, indices }: Access) => {
    if (!ir.inputs.includes(name)) return
    for (const index of indices) told.add(plainVariable(index) ?? '')
  }
  for (const one of statementsOf(ir.steps)) readsOf(one).forEach(note)
  const ranks = new Set([...told].map(rankOf))
  for (const [rank, size] of ir.ranks) if (size !== undefined) ranks.add(rank)
  tie(
    ir,
    (rank) => (ranks.has(rank) ? 1 : undefined),
    (rank) => ranks.add(rank),
  )
  return ir.variables.map(rankOf).filter((rank) => !ranks.has(rank))
}

function variablesOf(index: Index): Set<string> {
  const names = new Set<string>()
  if (index.kind === 'pin') return names
  visitExprs(index.expr, (one) => {
    if (one.kind === 'name' && /^[a-z]/.test(one.name)) names.add(one.name)
  })
  return names
}

/** @internal The variables on the left of a statement, in the order of their loops. */
export function leftOf({ out }: Statement): Set<string> {
  const left = new Set<string>()
  for (const index of out.indices) for (const name of variablesOf(index)) left.add(name)
  return left
}
