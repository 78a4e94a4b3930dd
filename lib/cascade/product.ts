import { refuse } from '../errors.js'
import { mul } from '../ops/elementwise.js'
import { linear } from '../ops/linear.js'
import { empty, full } from '../tensor.js'
import { productOf as factorsOf } from './cost.js'
import { unary } from './evaluate.js'
import { type Access, type Expr, type Statement, visitExprs } from './ir.js'
import type { F32 } from './slots.js'
import { plainVariable } from './validate.js'

// A statement of the form sum(i) A[…] * B[…] * numbers is a product of matrices: rows of A, rows of B, and what both share with
// the result, for each of which there is a product of its own

/** @internal */
export interface Product {
  a: Access
  b: Access
  batch: readonly string[]
  rows: readonly string[]
  columns: readonly string[]
  over: readonly string[]
  /** The order of the result. */
  left: readonly string[]
  /** Names in what the product is multiplied by, and that of their values. */
  names: readonly string[]
  scale(values: Readonly<Record<string, number>>): number
}

// An expression of numbers and names
function constantOf(expr: Expr, values: Readonly<Record<string, number>>): number {
  switch (expr.kind) {
    case 'number':
      return expr.value
    case 'name':
      return values[expr.name]!
    case 'negate':
      return -constantOf(expr.x, values)
    case 'binary': {
      const [a, b] = [constantOf(expr.a, values), constantOf(expr.b, values)]
      return expr.op === '+' ? a + b : expr.op === '-' ? a - b : expr.op === '*' ? a * b : a / b
    }
    case 'call': {
      const [a, b] = expr.args.map((arg) => constantOf(arg, values)) as [number, number]
      const { fn } = expr
      if (fn === 'pow' || fn === 'max' || fn === 'min') return Math[fn](a, b)
      return unary[fn](a)
    }
    default:
      return Number.NaN
  }
}

// Variables of an access all of whose indices are one of its own
function variablesOf({ indices }: Access): string[] | undefined {
  const names = indices.map(plainVariable)
  const plain = names.every((name) => name !== undefined) && new Set(names).size === names.length
  return plain ? (names as string[]) : undefined
}

/** @internal */
export function productOf({ out, reduce, expr, where }: Statement): Product | undefined {
  if (where || reduce?.op !== 'sum') return undefined
  const { factors, divisors } = factorsOf(expr)
  const [a, b, ...more] = factors.filter((one) => one.kind === 'access')
  const numbers = factors.filter((one) => one.kind !== 'access')
  const names: string[] = []
  let constant = true
  for (const one of [...numbers, ...divisors])
    visitExprs(one, (part) => {
      if (part.kind === 'access' || part.kind === 'if') constant = false
      if (part.kind === 'name') names.push(part.name)
    })
  if (!a || !b || more.length > 0 || !constant) return undefined
  const [ofA, ofB, left] = [a, b, out].map(variablesOf)
  if (!ofA || !ofB || !left) return undefined
  const { over } = reduce
  const both = ofA.filter((name) => ofB.includes(name))
  const batch = both.filter((name) => left.includes(name))
  const rows = ofA.filter((name) => !both.includes(name))
  const columns = ofB.filter((name) => !both.includes(name))
  const apart =
    rows.length > 0 &&
    columns.length > 0 &&
    [...rows, ...columns].every((name) => left.includes(name))
  const found = left.length === batch.length + rows.length + columns.length
  if (!apart || !found || batch.length + over.length !== both.length) return undefined
  const scale: Product['scale'] = (values) => {
    const all = (of: readonly Expr[]) => of.reduce((x, one) => x * constantOf(one, values), 1)
    return all(numbers) / all(divisors)
  }
  return { a, b, batch, rows, columns, over, left, names, scale }
}

// The axes `from` in the order of `to`
/** @internal */
export function arranged(x: F32, from: readonly string[], to: readonly string[]): F32 {
  const order = [...from]
  return to.reduce((view, name, at) => {
    const other = order.indexOf(name)
    ;[order[at], order[other]] = [order[other]!, order[at]!]
    return view.transpose(at, other)
  }, x)
}

/** @internal The product of two tensors, with axes in the order of the text. */
export function multiply(
  { a, b, batch, rows, columns, over, left }: Product,
  operands: readonly [F32, F32],
  factor: number,
): F32 {
  const sizes = new Map<string, number>()
  const names = [a, b].map((access) => variablesOf(access)!)
  operands.forEach(({ shape }, i) => {
    names[i]!.forEach((name, at) => {
      const known = sizes.get(name) ?? shape[at]!
      if (known !== shape[at]) {
        const text = `${b.name} must be [${names[i]!.join(', ')}], got [${shape.join(', ')}]`
        const why = `${name} is ${shape[at]}, but ${a.name} has ${name} = ${known}`
        throw refuse('ERR_SHAPE', 'cascade', b.name, `${text} (${why})`)
      }
      sizes.set(name, known)
    })
  })
  const count = (of: readonly string[]) => of.reduce((n, name) => n * sizes.get(name)!, 1)
  const [x, y] = operands.map((operand, i) => {
    const own = [rows, columns][i]!
    const whole = arranged(operand, names[i]!, [...batch, ...own, ...over]).contiguous()
    return whole.reshape([count(batch), count(own), count(over)])
  }) as [F32, F32]
  const { dtype, device } = x
  const result = empty([count(batch), count(rows), count(columns)], { dtype, device })
  for (let i = 0; i < count(batch); i++)
    result.select(0, i).copyFrom(linear(x.select(0, i), y.select(0, i)))
  const scaled = factor === 1 ? result : mul(result, full([1], factor, { dtype, device }))
  const axes = [...batch, ...rows, ...columns]
  const shape = axes.map((name) => sizes.get(name)!)
  return arranged(scaled.reshape(shape), axes, left)
}
