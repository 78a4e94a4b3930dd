import { mustBe } from './check.js'
import type { Device } from './device.js'
import { HeddleError } from './errors.js'
import { loadAddon } from './load.js'
import { type Layout, Tensor } from './tensor.js'

/** @internal One argument of an operator as its native schema describes it. */
export interface SchemaArgument {
  name: string
  kind:
    | 'input'
    | 'optional'
    | 'inout'
    | 'output'
    | 'number'
    | 'integer'
    | 'flag'
    | 'choice'
    | 'dtype'
  shape?: string[]
  dtype?: string
  choices?: string[]
}

/** @internal */
export interface Schema {
  name: string
  arguments: SchemaArgument[]
  /** The instruction set of the CPU implementation, empty without one. */
  cpu: string
  cuda: boolean
}

/** What `explain` returns. */
export interface Explanation {
  /** The variant that the call would run, `undefined` if all decline; on the CPU the instruction set. */
  variant: string | undefined
  /** Better variants that do not take the call, best first, and why. */
  declined: { variant: string; reason: string }[]
}

/** @internal What the addon knows of CUDA on this machine. */
export interface NativeCuda {
  built: boolean
  code: string
  text: string
  remedy: string
  driver: number
  runtime: number
  devices: { name: string; arch: number; processors: number; memory: number }[]
}

/** @internal The addon's functions; binding/ says what each takes. */
export interface Addon {
  init(errorClass: typeof HeddleError): Float64Array
  operators(): Schema[]
  run(operator: number, tensors: number, ...positionsAndValues: unknown[]): number
  explain(operator: number, tensors: number, ...positionsAndValues: unknown[]): Explanation
  empty(
    dtype: number,
    shape: readonly number[],
    kind: number,
    index: number,
    pinned: boolean,
  ): number
  from(
    bytes: ArrayBufferView,
    dtype: number,
    shape: readonly number[],
    kind: number,
    index: number,
    pinned: boolean,
  ): number
  view(handle: number, offset: number, shape: readonly number[], strides: readonly number[]): number
  transfer(handle: number, kind: number, index: number): number
  write(handle: number, bytes: ArrayBufferView): void
  read(handle: number): Promise<ArrayBuffer>
  readSync(handle: number): ArrayBuffer
  checkReading(): void
  finish(kind: number, index: number): Promise<void>
  beginSpan(kind: number, index: number): number
  endSpan(span: number): Promise<number>
  release(handle: number): void
  beginGraph(): void
  endGraph(keep: true): number
  endGraph(keep: false): undefined
  replayGraph(graph: number): void
  releaseGraph(graph: number): void
  memory(
    kind: number,
    index: number,
  ): [tensors: number, bytes: number, peakBytes: number, pinnedBytes: number]
  cuda(): NativeCuda
}

interface Entry {
  index: number
  inputs: Map<string, { position: number; isTensor: boolean }>
  /** Sizes of the last outputs, which the next ones mostly share. */
  layouts: Layout[]
}

let loaded: Addon | undefined
let schemas: Schema[] = []
let shared: Float64Array
const entries = new Map<string, Entry>()

/** @internal The addon, loaded when it is first needed. */
export function addon(): Addon {
  if (loaded) return loaded
  const found = loadAddon() as Addon
  shared = found.init(HeddleError)
  schemas = found.operators()
  schemas.forEach((schema, index) => {
    const inputs: Entry['inputs'] = new Map()
    schema.arguments.forEach(({ name, kind }, position) => {
      const isTensor = kind === 'input' || kind === 'optional' || kind === 'inout'
      if (kind !== 'output') inputs.set(name, { position, isTensor })
    })
    entries.set(schema.name, { index, inputs, layouts: [] })
  })
  loaded = found
  return found
}

/** @internal The schema of every operator that this addon has. */
export function operatorSchemas(): readonly Schema[] {
  addon()
  return schemas
}

// Thrown in place of running an operator while its call is explained
class Explained {}
let explaining: { found?: Explanation } | undefined

/** @internal Makes a call up to its first operator, which is explained instead of run. */
export function explainCall(call: () => unknown): Explanation | undefined {
  const outer = explaining
  const own: typeof explaining = {}
  explaining = own
  try {
    const result = call()
    // An async function has met its first operator by now, or none
    if (result instanceof Promise) result.catch(() => {})
  } catch (error) {
    if (!(error instanceof Explained)) throw error
  } finally {
    explaining = outer
  }
  return own.found
}

/** @internal Whether a call is explained, which then must not do what is no operator. */
export const isExplaining = (): boolean => explaining !== undefined

/**
 * @internal Runs a native operator on named arguments and returns its outputs in the schema's order, `undefined` where one
 * was not asked for. Arguments that the schema does not have are ignored: callers check their options first.
 */
export function run(name: string, named: Record<string, unknown>): (Tensor | undefined)[] {
  const native = addon()
  const entry = entries.get(name)
  if (!entry) throw mustBe(name, 'operator', 'one that this build has', name)
  let device: Device = 'cpu'
  let tensors = 0
  const values: unknown[] = []
  for (const key in named) {
    const value = named[key]
    const input = value === undefined ? undefined : entry.inputs.get(key)
    if (!input) continue
    if (!input.isTensor) {
      values.push(input.position, value)
      continue
    }
    if (!(value instanceof Tensor)) throw mustBe(name, key, 'a tensor', value)
    device = value.device
    shared[2 * tensors] = input.position
    shared[2 * tensors + 1] = value.handle
    tensors++
  }
  // copies of operands and zeros to write on come before what is asked about
  if (explaining && name !== 'copy' && name !== 'fill') {
    explaining.found ??= native.explain(entry.index, tensors, ...values)
    throw new Explained()
  }
  const count = native.run(entry.index, tensors, ...values)
  const outputs = new Array<Tensor | undefined>(count)
  for (let i = 0, at = 0; i < count; i++) {
    const handle = shared[at]!
    if (handle < 0) {
      outputs[i] = undefined
      at += 1
      continue
    }
    const [dtype, rank] = [shared[at + 1]!, shared[at + 2]!]
    at += 3
    let layout = entry.layouts[i]
    if (!layout || !isShape(layout.shape, rank, at)) {
      layout = Tensor.layout(Array.from(shared.subarray(at, at + rank)))
      entry.layouts[i] = layout
    }
    outputs[i] = Tensor.adopt(handle, dtype, layout, device)
    at += rank
  }
  return outputs
}

// Whether an output has this shape at a place
function isShape(shape: readonly number[], rank: number, at: number): boolean {
  if (shape.length !== rank) return false
  for (let i = 0; i < rank; i++) if (shape[i] !== shared[at + i]) return false
  return true
}
