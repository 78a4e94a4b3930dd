import type { FloatDType } from '../dtype.js'
import { HeddleError } from '../errors.js'
import { scope } from '../scope.js'
import type { Tensor } from '../tensor.js'
import { productOf, variablesIn } from './cost.js'
import {
  type CascadeIR,
  type Expr,
  rankOf,
  type Statement,
  statementsOf,
  visitAccesses,
} from './ir.js'
import { type Form, Normal, startOver, TooLarge } from './normal.js'
import { arranged } from './product.js'
import { untoldRanks } from './sizes.js'
import {
  cast,
  checked,
  type F32,
  has,
  type Known,
  type Layouts,
  type Lowered,
  Mismatch,
  sideOf,
  sizesOf,
} from './slots.js'
import { runSteps } from './steps.js'
import { plainVariable, readsOf } from './validate.js'

// A cascade whose end no operator computes, as an operator and statements behind it: a norm of what attention gives, its
// projection, a branch that is added

// The statements that some tensors need, where others are given
function without(ir: CascadeIR, wanted: readonly string[], given: readonly string[]): CascadeIR {
  const needed = new Set(wanted)
  const steps: CascadeIR['steps'][number][] = []
  const isNeeded = ({ out }: Statement) => needed.has(out.name) && !given.includes(out.name)
  const note = (all: readonly Statement[]) => {
    for (const { name } of all.filter(isNeeded).flatMap(readsOf)) needed.add(name)
  }
  for (const step of [...ir.steps].reverse()) {
    const all = 'body' in step ? step.body : [step]
    // a state is read before it is written
    for (let size = 0; size < needed.size; note(all)) size = needed.size
    const kept = all.filter(isNeeded)
    if (kept.length > 0) steps.unshift('body' in step ? { ...step, body: kept } : step)
  }
  return { ...ir, steps, inputs: [...ir.inputs, ...given], outputs: wanted }
}

const summandsOf = (expr: Expr): Expr[] =>
  expr.kind === 'binary' && (expr.op === '+' || expr.op === '-')
    ? [...summandsOf(expr.a), ...summandsOf(expr.b)]
    : [expr]

// Factors of what is added up, in a product of sums too
function productsIn(expr: Expr): Expr[][] {
  return summandsOf(expr).flatMap((part) => {
    const { factors } = productOf(part)
    const sums = factors.filter((one) => summandsOf(one).length > 1)
    return sums.length > 0 ? sums.flatMap(productsIn) : [[...factors]]
  })
}

// Operands of products that are sums, rows that are turned or projected, and single numbers that are; with `bent` also
// what is made of such sums, as features and norms of projected rows are, with the sums that it is made of
function operandsIn(ir: CascadeIR, bent: boolean): Map<string, boolean> {
  const all = ir.steps.filter((step): step is Statement => !('body' in step))
  const isSum = ({ reduce, where, init, expr, out }: Statement) => {
    const plain = out.indices.every((index) => plainVariable(index) !== undefined)
    let added = reduce?.op === 'sum'
    for (let parts = [expr]; parts.length > 0; ) {
      const one = parts.pop()!
      if (one.kind === 'binary') parts.push(one.a, one.b)
      added ||= one.kind === 'binary' && (one.op === '+' || one.op === '-')
    }
    return added && plain && !where && !init && (!reduce || reduce.op === 'sum')
  }
  const sums = new Set(all.filter(isSum).map(({ out }) => out.name))
  const readsOne = (expr: Expr, names: ReadonlySet<string>) => {
    let reads = false
    visitAccesses(expr, ({ name }) => (reads ||= names.has(name)))
    return reads
  }
  // x - mean: products of such rows are small where those of both are large
  const means = new Set(all.filter(({ reduce }) => reduce?.op === 'sum').map(({ out }) => out.name))
  const isCentred = ({ reduce, expr, out }: Statement) =>
    !reduce && sums.has(out.name) && readsOne(expr, means)
  const centred = new Set(all.filter(isCentred).map(({ out }) => out.name))
  const isFeature = ({ reduce, where, init, expr, out }: Statement, of: ReadonlySet<string>) => {
    const reads = readsOne(expr, of)
    const plain = out.indices.every((index) => plainVariable(index) !== undefined)
    return reads && plain && !reduce && !where && !init
  }
  for (const one of all) {
    if (isFeature(one, centred)) centred.add(one.out.name)
    if (isFeature(one, bent ? sums : centred)) sums.add(one.out.name)
  }
  const found = new Map<string, boolean>()
  const reads = statementsOf(ir.steps).flatMap(readsOf)
  for (const { name, indices } of reads)
    if (indices.length === 0 && sums.has(name)) found.set(name, false)
  for (const step of ir.steps) {
    for (const { expr, reduce } of 'body' in step ? step.body : [step]) {
      if (reduce?.op !== 'sum' && !('body' in step)) continue
      for (const factors of productsIn(expr)) {
        const names = factors.map((one) => [...variablesIn(one, ir.variables)].sort().join())
        factors.forEach((one, i) => {
          if (one.kind !== 'access') return
          const { name } = one
          const apart = names.some((their) => their !== '' && their !== names[i])
          if (sums.has(name) && apart && !ir.outputs.includes(name))
            found.set(name, reads.filter((read) => read.name === name).length === 1)
        })
      }
    }
  }
  return bent ? withSources(ir, found, sums) : found
}

// Operands that no others are in, with the sums that they are made of
function withSources(
  ir: CascadeIR,
  operands: ReadonlyMap<string, boolean>,
  sums: ReadonlySet<string>,
): Map<string, boolean> {
  const sources = (name: string) =>
    statementsOf(without(ir, [name], []).steps)
      .map(({ out }) => out.name)
      .filter((one) => one !== name)
  const first = [...operands].filter(([name]) => !sources(name).some((one) => operands.has(one)))
  const inner = first.flatMap(([name]) => sources(name).filter((one) => sums.has(one)))
  return new Map([...inner.map((name) => [name, false] as const), ...first])
}

/** @internal What an operator makes of a cascade whose operands of products stay what the text makes them. */
export function keptOf(
  ir: CascadeIR,
  lower: (normal: Normal, ir: CascadeIR) => Lowered,
  bent = false,
): Lowered | undefined {
  const kept = operandsIn(ir, bent)
  if (kept.size === 0) return undefined
  try {
    const normal = new Normal(ir, kept)
    if (!isClosed(normal, ir)) return undefined
    const found = checked(lower(normal, ir), normal, ir)
    const made = [...kept.keys()].filter(
      (name) =>
        !normal.taken.has(name) &&
        ir.outputs.some((tensor) => normal.forms.get(tensor)!.form.free.has(`${name}[]`)),
    )
    return made.length > 0 ? preceded(ir, found, made) : found
  } catch (error) {
    return fits(error)
  }
}

function wholeOf(ir: CascadeIR, lower: (normal: Normal, ir: CascadeIR) => Lowered) {
  const normal = new Normal(ir)
  return isClosed(normal, ir) ? checked(lower(normal, ir), normal, ir) : undefined
}

// What is computed beside an operator may be no text, or too long a one
function fits(error: unknown): undefined {
  const known = [Mismatch, TooLarge, HeddleError].some((one) => error instanceof one)
  if (!known) throw error
}

// Whether every result is an expression of inputs and kept tensors
function isClosed({ forms, kept, beyond }: Normal, ir: CascadeIR): boolean {
  if (beyond !== undefined) return false
  const states = statementsOf(ir.steps).flatMap(({ out }) =>
    kept.has(out.name) ? [] : [`${out.name}[]`],
  )
  return ir.outputs.every((tensor) => {
    const found = forms.get(tensor)
    return found && found.where.length === 0 && !has(found.form, [...states, 'inf'])
  })
}

// Operands that are made before, of tensors with the axes of the text
function preceded(ir: CascadeIR, core: Lowered, made: readonly string[]): Lowered {
  const before = alone(without(ir, made, []))
  const { layouts = new Map() as Layouts } = core
  const both = before.inputs.find((name) => layouts.has(name))
  if (both !== undefined) throw new Mismatch(ir.outputs[0]!, `${both} is read in two layouts`, 0)
  const operands = [...ir.inputs.filter((name) => layouts.has(name)), ...ir.inputs]
  const sizes = sizesOf(ir, layouts)
  return {
    ...core,
    slots: { ...core.slots, before: made.join(', ') },
    ranks: untoldRanks(ir),
    run: (call) =>
      scope(() => {
        const known = numbersOf(before, { ...sizes(call), ...call.scalars })
        const results = runSteps(before, call.tensors, known)
        const dtypes = operands.map((name) => call.tensors[name]!.dtype)
        const dtype = dtypes.find(isFloat) ?? 'float32'
        const tensors: Record<string, Tensor> = { ...call.tensors }
        for (const name of made)
          tensors[name] = cast(packed(results[name] as F32, layouts.get(name)), dtype)
        return core.run({ ...call, tensors })
      }),
  }
}

const isFloat = (dtype: string): dtype is FloatDType => /^b?float(16|32)$/.test(dtype)

// A tensor with the axes of the text as [b, s, h, d]
function packed(x: F32, layout: ((indices: readonly string[]) => readonly string[]) | undefined) {
  if (!layout) return x.rank > 0 ? x : x.reshape([1])
  const from = x.shape.map((_, i) => `axis ${i}`)
  const places = layout(from).map((axis) => from.indexOf(axis))
  const to = places.flatMap((at) => (at < 0 ? [] : [from[at]!]))
  const shape = places.map((at) => (at < 0 ? 1 : x.shape[at]!))
  return arranged(x, from, to).contiguous().reshape(shape)
}

/** @internal What `lower` makes of a tensor on the way, and what is computed from it. */
export function coreOf(
  ir: CascadeIR,
  lower: (normal: Normal, ir: CascadeIR) => Lowered,
): Lowered | undefined {
  const [result, ...more] = ir.outputs as [string]
  if (more.length > 0) return undefined
  // weights come from one sum of products and go into another
  const all = statementsOf(ir.steps)
  const isProduct = ({ expr, reduce }: Statement) =>
    reduce?.op === 'sum' && productOf(expr).factors.length > 1
  for (const { out } of [...all].reverse()) {
    const tensor = out.name
    if (tensor === result || out.indices.length < 2) continue
    try {
      const inner = without(ir, [tensor], [])
      if (inner.steps.every((step) => !('body' in step))) {
        if (statementsOf(inner.steps).filter(isProduct).length < 2) continue
      }
      startOver()
      const core = keptOf(inner, lower) ?? keptOf(inner, lower, true) ?? wholeOf(inner, lower)
      if (core?.axes) return followed(ir, core, tensor, result)
    } catch (error) {
      if (error instanceof TooLarge) return undefined
      fits(error)
    }
  }
  return undefined
}

// Whether functions of a tensor are summed
function bends({ terms }: Form, tensor: string, summed = false): boolean {
  return terms.some(({ factors }) =>
    factors.some(({ atom }) => {
      if (!atom.free.has(tensor)) return false
      if (atom.kind === 'reduce') return atom.op !== 'sum' || bends(atom.body, tensor, true)
      if (atom.kind === 'sum') return bends(atom.form, tensor, summed)
      return (
        atom.kind !== 'access' &&
        (summed || ('args' in atom && atom.args.some((one) => bends(one, tensor))))
      )
    }),
  )
}

// With the inputs that it reads
function alone(ir: CascadeIR): CascadeIR {
  const reads = new Set(
    statementsOf(ir.steps)
      .flatMap(readsOf)
      .map(({ name }) => name),
  )
  return { ...ir, inputs: ir.inputs.filter((name) => reads.has(name)) }
}

// Sums of products beside an operator, of tensors with the axes of the text: they are made before, as often as the text says
function besideOf(outer: CascadeIR, tensor: string, layouts: Layouts): string[] {
  const made = new Map(
    outer.steps.flatMap((step) => ('body' in step ? [] : [[step.out.name, step]])),
  )
  const isOwn = (name: string): boolean => {
    if (name === tensor || layouts.has(name)) return false
    const step = made.get(name)
    return step ? readsOf(step).every((read) => isOwn(read.name)) : outer.inputs.includes(name)
  }
  const isProduct = ({ reduce, where, init, expr, out }: Statement) =>
    reduce?.op === 'sum' &&
    !where &&
    !init &&
    productOf(expr).factors.length > 1 &&
    out.indices.every((index) => plainVariable(index) !== undefined) &&
    isOwn(out.name)
  return [...made.values()].filter(isProduct).map(({ out }) => out.name)
}

// Numbers of a call that a cascade has
const numbersOf = ({ scalars, families, ranks }: CascadeIR, known: Known): Known =>
  Object.fromEntries(
    Object.entries(known).filter(
      ([name]) =>
        scalars.includes(name) || ranks.has(name) || families.some((one) => one.name === name),
    ),
  )

function followed(ir: CascadeIR, core: Lowered, tensor: string, result: string): Lowered {
  const outer = without(ir, [result], [tensor])
  const { forms, beyond, reaches } = new Normal(outer)
  const found = beyond === undefined && reaches.length === 0 ? forms.get(result) : undefined
  if (!found) throw new Mismatch(result, 'it is the state of an iteration', 0)
  const { form, left, where } = found
  const beside = besideOf(outer, tensor, core.layouts!)
  const own = statementsOf(ir.steps).find(({ out }) => out.name === tensor)!.out.indices
  const names = own.map((index) => plainVariable(index)!)
  const [b, row, h, column] = core.axes as [string, string, string, string]
  const absent = [left.includes(b) ? '0' : b, row, left.includes(h) ? '0' : h, '']
  const layouts = new Map(core.layouts)
  layouts.set(tensor, (given) =>
    [b, row, h, column].map((axis, i) => given[names.indexOf(axis)] ?? absent[i]!),
  )
  const last = left.filter((v) => v !== b && v !== row && v !== h)
  // what is bent before it is summed, as scores are, is better an operand
  if (bends(form, `${tensor}[]`)) throw new Mismatch(result, `it sums functions of ${tensor}`, 0)
  const rows = !ir.variables.includes(row) || left.includes(row)
  if (last.length !== 1 || !rows || where.length > 0)
    throw new Mismatch(result, 'it has other axes than what it is computed from', 0)
  // heads that are summed leave [b, s, d]
  const axes =
    left.includes(h) || !ir.variables.includes(h) ? [b, row, h, last[0]!] : [b, row, last[0]!]
  const before = alone(without(outer, beside, []))
  const kept = new Map(beside.map((name) => [name, false]))
  const ending = beside.length > 0 ? new Normal(outer, kept).forms.get(result)!.form : form
  const side = sideOf(outer, layouts, ending, axes)
  const sizes = sizesOf(ir, core.layouts!)
  return {
    operator: core.operator,
    slots: { ...core.slots, result: [core.slots.result, ending.key].filter(Boolean).join('; ') },
    ranks: untoldRanks(ir),
    layouts: core.layouts!,
    run: (call) =>
      scope(() => {
        const made = core.run(call)[tensor] as F32
        const [, sq, , d] = made.shape as [number, number, number, number]
        const own = { [rankOf(row)]: sq, [rankOf(column)]: d, ...call.scalars }
        const known = { ...sizes(call), ...own }
        const results =
          beside.length > 0 ? runSteps(before, call.tensors, numbersOf(before, known)) : {}
        const tensors = { ...call.tensors, ...results, [tensor]: made }
        return { [result]: cast(side.run(tensors, known), made.dtype) }
      }),
  }
}
