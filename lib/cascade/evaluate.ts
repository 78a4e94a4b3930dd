import { checkNumber, checkOptions, mustBe, show } from '../check.js'
import { broken } from './error.js'
import {
  type Access,
  type CascadeIR,
  type Expr,
  type FunctionName,
  namesIn,
  type Predicate,
  type Reducer,
  rankOf,
  type Span,
  type Statement,
  sizedRanks,
  statementsOf,
  tensorsOf,
  visitExprs,
  visitPredicate,
} from './ir.js'
import { leftOf, Sizes } from './sizes.js'
import { plainVariable } from './validate.js'

/** A dense array with a shape, axes as the cascade writes them. */
export interface DenseArray {
  data: ArrayLike<number>
  shape: readonly number[]
}

/** A result: float64, empty coordinates as 0. */
export interface DenseResult {
  data: Float64Array
  shape: readonly number[]
}

/** Options of an evaluation. */
export interface EvaluateOptions {
  /** Sizes of ranks that no input tells. */
  sizes?: Readonly<Record<string, number>> | undefined
  /** Points that one statement may visit, 1e9 if left out. */
  maxPoints?: number | undefined
  /** Tensors to return beside the outputs. */
  keep?: readonly string[] | undefined
}

interface Store {
  data: Float64Array
  shape: number[]
  strides: number[]
  /** 1 where a coordinate is not empty; undefined while none is. */
  present: Uint8Array | undefined
}

// Variables of the statement at hand, one slot each, and whether what was just computed is empty
interface State {
  at: Int32Array
  empty: boolean
}
type Compute = (state: State) => number
type Test = (state: State) => boolean

const erf = (x: number): number => {
  // Series near zero, continued fraction beyond: full double precision either way
  const z = Math.abs(x)
  if (z < 2.5) {
    let term = z
    let sum = z
    for (let n = 1; n < 100; n++) {
      term *= (-z * z) / n
      sum += term / (2 * n + 1)
      if (Math.abs(term) < 1e-18) break
    }
    return (Math.sign(x) * 2 * sum) / Math.sqrt(Math.PI)
  }
  let fraction = 0
  for (let n = 60; n > 0; n--) fraction = n / 2 / (z + fraction)
  return Math.sign(x) * (1 - Math.exp(-z * z) / (Math.sqrt(Math.PI) * (z + fraction)))
}

/** @internal */
export const unary: Readonly<
  Record<Exclude<FunctionName, 'pow' | 'max' | 'min'>, (x: number) => number>
> = {
  exp: Math.exp,
  exp2: (x) => 2 ** x,
  log: Math.log,
  log1p: Math.log1p,
  tanh: Math.tanh,
  sigmoid: (x) => 1 / (1 + Math.exp(-x)),
  relu: (x) => Math.max(x, 0),
  softplus: (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))),
  abs: Math.abs,
  sqrt: Math.sqrt,
  rsqrt: (x) => 1 / Math.sqrt(x),
  erf,
  sin: Math.sin,
  cos: Math.cos,
}

const identities: Readonly<Record<Reducer, number>> = {
  sum: 0,
  prod: 1,
  max: Number.NEGATIVE_INFINITY,
  min: Number.POSITIVE_INFINITY,
  logsumexp: Number.NEGATIVE_INFINITY,
}

/** @internal Runs a cascade in float64 by its definition; loops go left-hand variables first, ascending. */
export function evaluate(
  ir: CascadeIR,
  inputs: Readonly<Record<string, DenseArray>>,
  scalars: Readonly<Record<string, number>>,
  options: EvaluateOptions,
): Record<string, DenseResult> {
  return new Evaluation(ir, inputs, scalars, options).run()
}

class Evaluation {
  readonly #sizes: Sizes
  readonly #stores = new Map<string, Store>()
  readonly #first: Span

  constructor(
    readonly ir: CascadeIR,
    readonly inputs: Readonly<Record<string, DenseArray>>,
    readonly scalars: Readonly<Record<string, number>>,
    readonly options: EvaluateOptions,
  ) {
    const { maxPoints = 1e9 } = options
    checkNumber('cascade', 'maxPoints', maxPoints, 'a number from 1 on', (x) => x >= 1)
    const all = statementsOf(ir.steps)
    this.#first = all[0]!.out.span
    const tensors = tensorsOf(ir)
    const { keep = [] } = options
    if (!Array.isArray(keep) || !keep.every((name) => typeof name === 'string'))
      throw mustBe('cascade', 'keep', 'a list of tensors', keep)
    for (const name of keep) checkOptions('cascade', { [name]: 0 }, tensors, 'tensor')
    checkOptions('cascade', options.sizes, sizedRanks(ir), 'size')
    for (const name of ir.inputs) this.#input(name)
    const shapes = new Map([...this.#stores].map(([name, { shape }]) => [name, shape]))
    this.#sizes = new Sizes(ir, shapes, options.sizes)
    for (const name of ir.scalars) {
      if (typeof scalars[name] !== 'number') throw this.#missing(name, 'scalar')
    }
    this.#checkMasks(all)
    this.#sizes.checkPoints(maxPoints)
    for (const statement of all) this.#allocate(statement)
  }

  run(): Record<string, DenseResult> {
    for (const step of this.ir.steps) {
      if (!('body' in step)) {
        this.#compile(step, undefined)(0)
        continue
      }
      const body = step.body.map((statement) => this.#compile(statement, step.variable))
      const count = this.#sizes.of(rankOf(step.variable), step.span)
      for (let i = 0; i < count; i++) for (const run of body) run(i)
    }
    const wanted = new Set([...this.ir.outputs, ...(this.options.keep ?? [])])
    const results: Record<string, DenseResult> = {}
    for (const name of wanted) {
      const store = this.#stores.get(name)
      if (!store) throw this.#missing(name, 'tensor')
      const data = store.data.slice()
      store.present?.forEach((present, i) => {
        if (!present) data[i] = 0
      })
      results[name] = { data, shape: store.shape }
    }
    return results
  }

  #missing(name: string, what: string) {
    return broken('CAS004', `${what} ${name} was not given`, this.#placeOf(name), name)
  }

  // Where the text first mentions a name
  #placeOf(name: string): Span {
    let place: Span | undefined
    const look = (one: Expr) => {
      if ((one.kind === 'access' || one.kind === 'name') && one.name === name) place ??= one.span
    }
    for (const { expr, where } of statementsOf(this.ir.steps)) {
      visitExprs(expr, look)
      if (where) visitPredicate(where, look)
    }
    return place ?? this.#first
  }

  #input(name: string): void {
    const given = this.inputs[name]
    if (!given) throw this.#missing(name, 'tensor')
    const { data, shape } = given
    const must = (rule: string, got: unknown) =>
      broken('CAS003', `${name} must ${rule}, got ${show(got)}`, this.#placeOf(name), name)
    if (typeof given !== 'object' || !data || !Array.isArray(shape))
      throw must('be an object of data and shape', given)
    const odd = shape.find((size) => !(Number.isInteger(size) && size >= 0))
    if (odd !== undefined) throw must('have a shape of integers at least 0', odd)
    if (data.length !== shape.reduce((product, size) => product * size, 1)) {
      throw broken(
        'CAS003',
        `${name} has ${data.length} numbers for shape [${shape}]`,
        this.#first,
        name,
      )
    }
    this.#stores.set(name, store(Float64Array.from(data), [...shape]))
  }

  #checkMasks(all: readonly Statement[]): void {
    for (const { where } of all) {
      if (!where) continue
      visitPredicate(where, (one) => {
        if (one.kind !== 'access') return
        if (!this.#stores.get(one.name)!.data.every(Number.isInteger)) {
          throw broken(
            'CAS010',
            'masks must be decidable from indices and integer tensors',
            one.span,
            one.name,
          )
        }
      })
    }
  }

  #allocate({ out }: Statement): void {
    if (this.#stores.has(out.name)) return
    const shape = this.#sizes.shapeOf(out)
    const points = shape.reduce((product, size) => product * size, 1)
    this.#stores.set(out.name, store(new Float64Array(points), shape))
  }

  // A statement as a function of the iterated variable's value
  #compile(statement: Statement, iterated: string | undefined): (step: number) => void {
    const { out, reduce, expr, where } = statement
    const over = reduce?.over ?? []
    const left = leftOf(statement)
    if (iterated !== undefined) left.delete(iterated)
    const loops = [...left, ...over]
    const slots = new Map<string, number>(loops.map((name, i) => [name, i]))
    if (iterated !== undefined) slots.set(iterated, loops.length)
    const sizes = loops.map((name) => this.#sizes.of(rankOf(name), out.span))

    const state: State = { at: new Int32Array(loops.length + 1), empty: false }
    const target = this.#stores.get(out.name)!
    const place = this.#offset(out, target, slots)
    const compute = this.#expr(expr, slots)
    const test = where ? this.#predicate(where, slots) : undefined
    const leftOnly =
      where !== undefined && [...namesIn(where)].every((name) => !over.includes(name))
    const tail = this.#tail(slots)
    const whole = tail?.variables.every((name) => !over.includes(name))
    const { at } = state
    const depth = left.size

    const put = (value: number, empty: boolean) => {
      const offset = place(state)
      target.data[offset] = value
      if (empty) target.present ??= new Uint8Array(target.data.length).fill(1)
      if (target.present) target.present[offset] = empty ? 0 : 1
    }
    const both = (a: Test | undefined, b: Test | undefined): Test | undefined =>
      a && b ? (state) => a(state) && b(state) : (a ?? b)
    const outer = both(leftOnly ? test : undefined, whole ? tail?.test : undefined)
    const inner = both(leftOnly ? undefined : test, whole ? undefined : tail?.test)
    const point = reduce
      ? this.#reduction(reduce.op, compute, outer, inner, sizes, depth, state, put)
      : () => {
          if (outer && !outer(state)) return put(0, true)
          state.empty = false
          const value = compute(state)
          put(state.empty ? 0 : value, state.empty)
        }
    const loop = (level: number): void => {
      if (level === depth) {
        point()
        return
      }
      const size = sizes[level]!
      for (let i = 0; i < size; i++) {
        at[level] = i
        loop(level + 1)
      }
    }
    return (step) => {
      at[loops.length] = step
      loop(0)
    }
  }

  // The points behind the end of a rank that a split with a tail has rounded up
  #tail(slots: ReadonlyMap<string, number>): { test: Test; variables: string[] } | undefined {
    const tails = this.ir.splits.flatMap(({ variable, outer, inner, size, tailMask }) => {
      const [a, b] = [slots.get(outer), slots.get(inner)]
      const whole = this.#sizes.get(rankOf(variable))!
      if (!tailMask || whole % size === 0 || a === undefined || b === undefined) return []
      return [{ a, b, size, whole, names: [outer, inner] }]
    })
    if (tails.length === 0) return undefined
    return {
      test: ({ at }) => tails.every(({ a, b, size, whole }) => at[a]! * size + at[b]! < whole),
      variables: tails.flatMap(({ names }) => names),
    }
  }

  #reduction(
    op: Reducer,
    compute: Compute,
    outer: Test | undefined,
    visible: Test | undefined,
    sizes: readonly number[],
    from: number,
    state: State,
    put: (value: number, empty: boolean) => void,
  ): () => void {
    const { at } = state
    let total = 0
    let scale = 0 // of logsumexp: its sum is relative to this maximum
    const last = sizes.length - 1
    const inner = (level: number): void => {
      const size = sizes[level]!
      for (let i = 0; i < size; i++) {
        at[level] = i
        if (level < last) {
          inner(level + 1)
          continue
        }
        if (visible && !visible(state)) continue
        state.empty = false
        const value = compute(state)
        if (state.empty) continue
        if (op === 'sum') total += value
        else if (op === 'max') total = value > total || Number.isNaN(value) ? value : total
        else if (op === 'min') total = value < total || Number.isNaN(value) ? value : total
        else if (op === 'prod') total *= value
        else if (value > scale) {
          total = total * Math.exp(scale - value) + 1
          scale = value
        } else if (value !== Number.NEGATIVE_INFINITY) total += Math.exp(value - scale)
      }
    }
    return () => {
      if (outer && !outer(state)) return put(0, true)
      total = op === 'logsumexp' ? 0 : identities[op]
      scale = Number.NEGATIVE_INFINITY
      if (from <= last) inner(from)
      put(op === 'logsumexp' ? scale + Math.log(total) : total, false)
    }
  }

  #expr(expr: Expr, slots: ReadonlyMap<string, number>): Compute {
    switch (expr.kind) {
      case 'number': {
        const { value } = expr
        return () => value
      }
      case 'name':
        return this.#bare(expr.name, expr.span, slots)
      case 'access':
        return this.#read(expr, slots)
      case 'negate': {
        const x = this.#expr(expr.x, slots)
        return (state) => -x(state)
      }
      case 'binary': {
        const [a, b] = [this.#expr(expr.a, slots), this.#expr(expr.b, slots)]
        if (expr.op === '+') return (state) => a(state) + b(state)
        if (expr.op === '*') return (state) => a(state) * b(state)
        if (expr.op === '-') {
          return (state) => {
            const [x, y] = [a(state), b(state)]
            return x === Number.NEGATIVE_INFINITY && y === Number.NEGATIVE_INFINITY ? x : x - y
          }
        }
        return (state) => {
          const [x, y] = [a(state), b(state)]
          return x === 0 && y === 0 ? 0 : x / y
        }
      }
      case 'call': {
        const [a, b] = expr.args.map((arg) => this.#expr(arg, slots)) as [Compute, Compute]
        if (expr.fn === 'pow') return (state) => a(state) ** b(state)
        if (expr.fn === 'max') return (state) => Math.max(a(state), b(state))
        if (expr.fn === 'min') return (state) => Math.min(a(state), b(state))
        const f = unary[expr.fn]
        return (state) => f(a(state))
      }
      case 'if': {
        const test = this.#predicate(expr.test, slots)
        const [a, b] = [this.#expr(expr.yes, slots), this.#expr(expr.no, slots)]
        return (state) => (test(state) ? a(state) : b(state))
      }
    }
  }

  // A name without brackets: an index variable, the size of a rank, or a scalar
  #bare(name: string, span: Span, slots: ReadonlyMap<string, number>): Compute {
    const slot = slots.get(name)
    if (slot !== undefined) return (state) => state.at[slot]!
    const size = this.#sizes.get(name)
    if (size !== undefined) return () => size
    const scalar = this.scalars[name]
    if (scalar === undefined)
      throw this.ir.scalars.includes(name)
        ? this.#missing(name, 'scalar')
        : broken('CAS003', `rank ${name} has no size; give it in sizes`, span, name)
    return () => scalar
  }

  #read(access: Access, slots: ReadonlyMap<string, number>): Compute {
    const from = this.#stores.get(access.name)!
    const { data } = from
    const { indices } = access
    const plain = indices.map((index) => {
      const name = plainVariable(index)
      return name === undefined ? undefined : slots.get(name)
    })
    const safe = plain.every((slot, i) => {
      const name = plainVariable(indices[i]!)
      return slot !== undefined && this.#sizes.get(rankOf(name!))! <= from.shape[i]!
    })
    if (safe) {
      const offset = plainOffset(plain as number[], from.strides)
      return (state) => {
        const at = offset(state.at)
        if (from.present && !from.present[at]) state.empty = true
        return data[at]!
      }
    }
    const offset = this.#offset(access, from, slots)
    return (state) => {
      const at = offset(state)
      if (at < 0 || (from.present && !from.present[at])) {
        state.empty = true
        return 0
      }
      return data[at]!
    }
  }

  // Where an access lies, -1 outside the tensor
  #offset(access: Access, to: Store, slots: ReadonlyMap<string, number>): Compute {
    const parts = access.indices.map((index, i) => {
      const size = to.shape[i]!
      const stride = to.strides[i]!
      if (index.kind === 'pin') return { at: () => index.value, size, stride }
      if (index.expr.kind === 'name' && /^[A-Z]/.test(index.expr.name) && index.kind === 'expr') {
        return { at: () => size - 1, size, stride }
      }
      const value = this.#expr(index.expr, slots)
      if (index.kind === 'expr') return { at: value, size, stride }
      const { least, most } = index
      return { at: (state: State) => Math.min(Math.max(value(state), least), most), size, stride }
    })
    return (state) => {
      let offset = 0
      for (const { at, size, stride } of parts) {
        const i = at(state)
        if (!(i >= 0 && i < size && Number.isInteger(i))) return -1
        offset += i * stride
      }
      return offset
    }
  }

  #predicate(predicate: Predicate, slots: ReadonlyMap<string, number>): Test {
    if (predicate.kind === 'not') {
      const x = this.#predicate(predicate.x, slots)
      return (state) => !x(state)
    }
    if (predicate.kind !== 'compare') {
      const [a, b] = [this.#predicate(predicate.a, slots), this.#predicate(predicate.b, slots)]
      return predicate.kind === 'and'
        ? (state) => a(state) && b(state)
        : (state) => a(state) || b(state)
    }
    const [a, b] = [this.#expr(predicate.a, slots), this.#expr(predicate.b, slots)]
    switch (predicate.op) {
      case '<':
        return (state) => a(state) < b(state)
      case '<=':
        return (state) => a(state) <= b(state)
      case '>':
        return (state) => a(state) > b(state)
      case '>=':
        return (state) => a(state) >= b(state)
      case '==':
        return (state) => a(state) === b(state)
      case '!=':
        return (state) => a(state) !== b(state)
    }
  }
}

function plainOffset(
  slots: readonly number[],
  strides: readonly number[],
): (at: Int32Array) => number {
  const [a = 0, b = 0, c = 0] = slots
  const [sa = 0, sb = 0, sc = 0] = strides
  if (slots.length === 0) return () => 0
  if (slots.length === 1) return (at) => at[a]! * sa
  if (slots.length === 2) return (at) => at[a]! * sa + at[b]! * sb
  if (slots.length === 3) return (at) => at[a]! * sa + at[b]! * sb + at[c]! * sc
  return (at) => slots.reduce((sum, slot, i) => sum + at[slot]! * strides[i]!, 0)
}

function store(data: Float64Array, shape: number[]): Store {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]!
  }
  return { data, shape, strides, present: undefined }
}
