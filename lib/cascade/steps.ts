import { refuse } from '../errors.js'
import { run } from '../native.js'
import { scope } from '../scope.js'
import { type Tensor, tensor, zeros } from '../tensor.js'
import { broken } from './error.js'
import {
  type Access,
  type CascadeIR,
  type Expr,
  type Index,
  namesIn,
  type Predicate,
  rankOf,
  type Statement,
  statementsOf,
} from './ir.js'
import { multiply, type Product, productOf } from './product.js'
import { leftOf, Sizes } from './sizes.js'
import { plainVariable, readsOf } from './validate.js'

// What no operator computes, one statement after another: a program of the operator `einsum`, whose words core/einsum.h
// explains. All tensors of the cascade lie in one, in f32. Large products of matrices are those of `linear`.

const codes = [
  ...['end', 'constant', 'variable', 'load', 'gather', 'clamp', 'jump', 'jumpIfNot'],
  ...['+', '-', '*', '/', 'pow', 'max', 'min', '<', '<=', '>', '>=', '==', '!=', 'negate', 'not'],
  ...['exp', 'exp2', 'log', 'log1p', 'tanh', 'sigmoid', 'relu', 'softplus', 'abs', 'sqrt'],
  ...['rsqrt', 'erf', 'sin', 'cos'],
]
const words: Readonly<Record<string, number>> = Object.fromEntries(
  codes.map((code, i) => [code, i]),
)
const reducers = ['', 'sum', 'max', 'min', 'prod', 'logsumexp']
const pieces = ['outer', 'inner', 'body', 'place'] as const
const most = { variables: 16, stack: 32 }

const bits = new DataView(new ArrayBuffer(8))
function constant(value: number): bigint {
  bits.setFloat64(0, value)
  return bits.getBigInt64(0)
}

interface Place {
  offset: number
  shape: readonly number[]
  strides: readonly number[]
}

const sizeOf = (shape: readonly number[]) => shape.reduce((product, size) => product * size, 1)

interface Launch {
  start: number
  count: number
}

/**
 * @internal Runs a cascade statement by statement, on tensors with the axes of the text, and gives f32. `hole` is what empty
 * coordinates of results hold.
 */
export function runSteps(
  ir: CascadeIR,
  tensors: Readonly<Record<string, Tensor>>,
  scalars: Readonly<Record<string, number>>,
  hole = 0,
): Record<string, Tensor> {
  const shapes = new Map(ir.inputs.map((name) => [name, tensors[name]!.shape]))
  const ranks = Object.entries(scalars).filter(([name]) => !ir.scalars.includes(name))
  const sizes = new Sizes(ir, shapes, Object.fromEntries(ranks), 'give it beside the scalars')
  const all = statementsOf(ir.steps)
  const places = new Map<string, Place>()
  let end = 0
  const place = (name: string, shape: readonly number[]) => {
    const strides = shape.map((_, i) => sizeOf(shape.slice(i + 1)))
    places.set(name, { offset: end, shape, strides })
    end += sizeOf(shape)
  }
  for (const [name, shape] of shapes) place(name, shape)
  for (const { out } of all) if (!places.has(out.name)) place(out.name, sizes.shapeOf(out))

  const program = new Program(ir, sizes, places, scalars, hole === 0 ? 1 : 2)
  const launches = new Map<Statement, Launch>()
  for (const step of ir.steps) {
    const iterated = 'body' in step ? step.variable : undefined
    for (const statement of 'body' in step ? step.body : [step])
      launches.set(statement, program.add(statement, iterated))
  }
  return scope(() => {
    const { device } = Object.values(tensors)[0] ?? { device: 'cpu' }
    const work = zeros([Math.max(end, 1)], { device })
    const view = (name: string) => {
      const { offset, shape } = places.get(name)!
      return work.slice(0, offset, offset + sizeOf(shape)).reshape(shape)
    }
    for (const name of ir.inputs) view(name).copyFrom(tensors[name]!)
    const code = tensor(BigInt64Array.from(program.words), [program.words.length], { device })
    const launch = (statement: Statement, step: number) =>
      run('einsum', { program: code, work, step, ...launches.get(statement)! })
    const products = productsIn(ir, sizes, places, scalars)
    for (const step of ir.steps) {
      if (!('body' in step)) {
        const found = products.get(step)
        if (!found) launch(step, 0)
        else {
          const { product, factor } = found
          const operands = [view(product.a.name), view(product.b.name)] as const
          view(step.out.name).copyFrom(multiply(product, operands, factor))
        }
        continue
      }
      const steps = sizes.of(rankOf(step.variable), step.span)
      for (let i = 0; i < steps; i++) for (const statement of step.body) launch(statement, i)
    }
    return Object.fromEntries(ir.outputs.map((name) => [name, view(name).clone()]))
  })
}

// Products that are large, and of operands that are read whole and have no empty coordinates
function productsIn(
  ir: CascadeIR,
  sizes: Sizes,
  places: ReadonlyMap<string, Place>,
  scalars: Readonly<Record<string, number>>,
): Map<Statement, { product: Product; factor: number }> {
  const least = { points: 1 << 18, summands: 16 }
  const mostProducts = 64
  const found = new Map<Statement, { product: Product; factor: number }>()
  const holey = new Set<string>()
  const isWhole = ({ name, indices }: Access) =>
    !holey.has(name) &&
    indices.every((index, i) => {
      const variable = plainVariable(index)
      return variable !== undefined && sizes.get(rankOf(variable)) === places.get(name)!.shape[i]
    })
  const parts = new Set(ir.splits.flatMap(({ outer, inner }) => [outer, inner]))
  for (const statement of statementsOf(ir.steps)) {
    const { out, where, reduce } = statement
    const reads = readsOf(statement)
    const variables = [...leftOf(statement), ...(reduce?.over ?? [])]
    if (where || !reads.every(isWhole) || variables.some((name) => parts.has(name)))
      holey.add(out.name)
    else {
      const product = productOf(statement)
      const count = (names: readonly string[]) =>
        names.reduce((n, name) => n * sizes.of(rankOf(name), out.span), 1)
      const values = new Map(
        product?.names.map((name) => [
          name,
          ir.variables.includes(name) ? undefined : (sizes.get(name) ?? scalars[name]),
        ]),
      )
      if (!product || [...values.values()].includes(undefined) || !isWhole(out)) continue
      const { batch, over } = product
      const small = count(variables) < least.points || count(over) < least.summands
      if (small || count(batch) > mostProducts) continue
      found.set(statement, {
        product,
        factor: product.scale(Object.fromEntries(values) as Record<string, number>),
      })
    }
  }
  return found
}

class Program {
  readonly words: bigint[] = []
  #start = 0 // of the statement at hand
  #depth = 0
  #statement!: Statement
  #slots: ReadonlyMap<string, number> = new Map()

  constructor(
    readonly ir: CascadeIR,
    readonly sizes: Sizes,
    readonly places: ReadonlyMap<string, Place>,
    readonly scalars: Readonly<Record<string, number>>,
    readonly hole: number,
  ) {}

  add(statement: Statement, iterated: string | undefined): Launch {
    const { out, reduce, expr, where } = statement
    const over = reduce?.over ?? []
    const left = leftOf(statement)
    if (iterated !== undefined) left.delete(iterated)
    const loops = [...left, ...over]
    const slots = new Map(loops.map((name, i) => [name, i]))
    if (iterated !== undefined) slots.set(iterated, loops.length)
    this.#statement = statement
    this.#slots = slots
    this.#start = this.words.length
    if (loops.length > most.variables) throw this.#tooLarge()
    const sizes = loops.map((name) => this.sizes.of(rankOf(name), out.span))
    this.#checkPlace(out, iterated)
    const header = [left.size, loops.length, reducers.indexOf(reduce?.op ?? '')]
    this.#push(...header, this.ir.outputs.includes(out.name) ? this.hole : 0, 0, 0, 0, 0, ...sizes)

    const inside = (names: Iterable<string>) => [...names].some((name) => over.includes(name))
    const tests = { outer: [] as (() => void)[], inner: [] as (() => void)[] }
    if (where) tests[inside(namesIn(where)) ? 'inner' : 'outer'].push(() => this.#predicate(where))
    const tails = this.ir.splits.filter(
      ({ variable, outer, inner, size, tailMask }) =>
        tailMask &&
        slots.has(outer) &&
        slots.has(inner) &&
        this.sizes.get(rankOf(variable))! % size !== 0,
    )
    for (const { variable, outer, inner, size } of tails) {
      const whole = this.sizes.get(rankOf(variable))!
      tests[inside(tails.flatMap((one) => [one.outer, one.inner])) ? 'inner' : 'outer'].push(() => {
        this.#variable(outer)
        this.#constant(size)
        this.#binary('*')
        this.#variable(inner)
        this.#binary('+')
        this.#constant(whole)
        this.#binary('<')
      })
    }
    const code = {
      outer: () => this.#all(tests.outer),
      inner: () => this.#all(tests.inner),
      body: () => this.#expr(expr),
      place: () => this.#place(out),
    }
    pieces.forEach((piece, i) => {
      if (piece in tests && tests[piece as 'outer' | 'inner'].length === 0) return
      this.words[this.#start + header.length + 1 + i] = BigInt(this.words.length - this.#start)
      this.#depth = 0
      code[piece]()
      this.#op('end')
    })
    return { start: this.#start, count: sizeOf(sizes.slice(0, left.size)) }
  }

  #tooLarge() {
    const { out } = this.#statement
    return broken(
      'CAS020',
      `${out.name} is too long for one step; take it apart`,
      out.span,
      out.name,
    )
  }

  // Nothing is written outside its tensor, whatever names its axes have in another statement
  #checkPlace({ name, indices, span }: Access, iterated: string | undefined): void {
    const { shape } = this.places.get(name)!
    indices.forEach((index, i) => {
      const variable = plainVariable(index)
      const needed =
        index.kind === 'pin'
          ? index.value + 1
          : variable !== undefined
            ? this.sizes.of(rankOf(variable), span)
            : this.sizes.of(rankOf(iterated!), span) + 1
      if (needed > shape[i]!)
        throw broken(
          'CAS003',
          `${name} has ${shape[i]} along axis ${i} but is written up to ${needed}`,
          span,
          name,
        )
    })
  }

  #push(...values: readonly number[]): void {
    for (const value of values) this.words.push(BigInt(value))
  }

  #op(code: string, ...operands: readonly number[]): void {
    this.#push(words[code]!, ...operands)
  }

  #grow(): void {
    if (++this.#depth > most.stack) throw this.#tooLarge()
  }

  #constant(value: number): void {
    this.#grow()
    this.#op('constant')
    this.words.push(constant(value))
  }

  #variable(name: string): void {
    this.#grow()
    this.#op('variable', this.#slots.get(name)!)
  }

  #binary(code: string): void {
    this.#depth--
    this.#op(code)
  }

  // A jump whose target is set once it is known
  #jump(code: 'jump' | 'jumpIfNot'): () => void {
    if (code === 'jumpIfNot') this.#depth--
    this.#op(code, 0)
    const at = this.words.length - 1
    return () => {
      this.words[at] = BigInt(this.words.length - this.#start)
    }
  }

  // One of two values
  #choose(yes: () => void, no: () => void): void {
    const otherwise = this.#jump('jumpIfNot')
    yes()
    const done = this.#jump('jump')
    otherwise()
    this.#depth--
    no()
    done()
  }

  #all([first, ...others]: readonly (() => void)[]): void {
    first!()
    if (others.length > 0)
      this.#choose(
        () => this.#all(others),
        () => this.#constant(0),
      )
  }

  #place({ name, indices }: Access): void {
    const { offset, strides } = this.places.get(name)!
    this.#constant(offset)
    indices.forEach((index, i) => {
      this.#index(index, 0)
      this.#constant(strides[i]!)
      this.#binary('*')
      this.#binary('+')
    })
  }

  #index(index: Index, size: number): void {
    if (index.kind === 'pin') this.#constant(index.value)
    else if (index.kind === 'expr' && index.expr.kind === 'name' && /^[A-Z]/.test(index.expr.name))
      this.#constant(size - 1)
    else this.#expr(index.expr)
    if (index.kind !== 'clamp') return
    this.#op('clamp')
    this.words.push(constant(index.least), constant(index.most))
  }

  #read({ name, indices }: Access): void {
    const { offset, shape, strides } = this.places.get(name)!
    const slots = indices.map((index, i) => {
      const variable = plainVariable(index)
      const fits = variable !== undefined && (this.sizes.get(rankOf(variable)) ?? 0) <= shape[i]!
      return fits ? this.#slots.get(variable) : undefined
    })
    if (slots.every((slot) => slot !== undefined)) {
      this.#grow()
      const parts = slots.flatMap((slot, i) => [slot, strides[i]!])
      this.#op('load', offset, slots.length, ...parts)
      return
    }
    indices.forEach((index, i) => {
      this.#index(index, shape[i]!)
    })
    this.#depth -= indices.length - 1
    const parts = indices.flatMap((_, i) => [shape[i]!, strides[i]!])
    this.#op('gather', offset, indices.length, ...parts)
  }

  #expr(expr: Expr): void {
    switch (expr.kind) {
      case 'number':
        this.#constant(expr.value)
        break
      case 'name':
        if (this.#slots.has(expr.name)) this.#variable(expr.name)
        else this.#constant(this.#bare(expr))
        break
      case 'access':
        this.#read(expr)
        break
      case 'negate':
        this.#expr(expr.x)
        this.#op('negate')
        break
      case 'binary':
        this.#expr(expr.a)
        this.#expr(expr.b)
        this.#binary(expr.op)
        break
      case 'call':
        for (const arg of expr.args) this.#expr(arg)
        if (expr.args.length === 2) this.#binary(expr.fn)
        else this.#op(expr.fn)
        break
      case 'if':
        this.#predicate(expr.test)
        this.#choose(
          () => this.#expr(expr.yes),
          () => this.#expr(expr.no),
        )
    }
  }

  #bare({ name, span }: Expr & { kind: 'name' }): number {
    const value = this.sizes.get(name) ?? this.scalars[name]
    if (value === undefined)
      throw this.ir.scalars.includes(name)
        ? refuse('ERR_ARGUMENT', 'cascade', name, `${name} is missing`)
        : broken('CAS003', `rank ${name} has no size; give it in sizes`, span, name)
    return value
  }

  #predicate(one: Predicate): void {
    if (one.kind === 'compare') {
      this.#expr(one.a)
      this.#expr(one.b)
      this.#binary(one.op)
      return
    }
    if (one.kind === 'not') {
      this.#predicate(one.x)
      this.#op('not')
      return
    }
    this.#predicate(one.a)
    const rest = () => this.#predicate(one.b)
    if (one.kind === 'and') this.#choose(rest, () => this.#constant(0))
    else this.#choose(() => this.#constant(1), rest)
  }
}
