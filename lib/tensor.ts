import { constants } from 'node:buffer'
import { inspect } from 'node:util'
import { checkInteger, checkOptions, elements, mustBe, show } from './check.js'
import { type Device, type DeviceLike, parseDevice } from './device.js'
import {
  bytesPerElement,
  type DType,
  type DTypeOf,
  dtypeOfArray,
  dtypes,
  type FloatDType,
  type HostArray,
  type HostValues,
  hostArrays,
  isDType,
} from './dtype.js'
import { named, refuse } from './errors.js'
import { addon, run } from './native.js'
import { track, untrack } from './scope.js'

/** How {@link Tensor.read} hands over the values. */
export interface ReadOptions {
  /** `'float32'` decodes any dtype to numbers; without it 16-bit and 8-bit floats come as bit patterns. */
  as?: 'float32' | undefined
  /** Gives up waiting; the device still finishes what was enqueued. */
  signal?: AbortSignal | undefined
}

/** Where and as what a new tensor is made. */
export interface CreateOptions<D extends DType = DType> {
  /** `'float32'` unless the data says otherwise. */
  dtype?: D | undefined
  /** `'cpu'` unless given. */
  device?: DeviceLike | undefined
  /**
   * Whether a GPU's tensor stands in page-locked memory of the host, which its kernels reach at the speed of the bus: for
   * what the GPU has no room for. It stays a tensor of that device. What is computed from it stands on the GPU again. On
   * `'cpu'` it changes nothing but what `memory()` counts it as.
   */
  pinned?: boolean | undefined
}

const mostDimensions = 8

// Collected with the tensor that has it; what it watches over is apart from it, for the registry to hold
interface Guard {
  readonly watched: { handle: number | undefined }
}

// Tensors that are collected without dispose() give their memory back here, in time but not at a known time
const abandoned = new FinalizationRegistry<Guard['watched']>(({ handle }) => {
  if (handle === undefined) return
  try {
    addon().release(handle)
  } catch {
    // freed in another way, or the environment is closing
  }
})

// Those of disposed tensors serve again: to register and unregister one takes as long as all else that JavaScript does
// for a call
const guards: Guard[] = []
const mostGuards = 4096

function guardOf(handle: number): Guard {
  let guard = guards.pop()
  if (!guard) {
    guard = { watched: { handle } }
    abandoned.register(guard, guard.watched)
  }
  guard.watched.handle = handle
  return guard
}

function checkShape(op: string, shape: unknown, least: number): number[] {
  if (!Array.isArray(shape)) throw mustBe(op, 'shape', 'an array of sizes', shape)
  return elements(op, 'shape', shape, (size, i) => {
    if (i === mostDimensions)
      throw refuse(
        'ERR_SHAPE',
        op,
        'shape',
        `shape must have at most ${mostDimensions} dimensions, got ${shape.length}`,
      )
    return checkInteger(op, `shape[${i}]`, size, least)
  })
}

function contiguousStrides(shape: readonly number[]): number[] {
  const strides = new Array<number>(shape.length)
  let stride = 1
  for (let i = shape.length - 1; i >= 0; i--) {
    strides[i] = stride
    stride *= shape[i]!
  }
  return strides
}

/** @internal Frozen, as tensors share them. */
export interface Layout {
  readonly shape: readonly number[]
  readonly strides: readonly number[]
}

/**
 * A typed, strided array on a device. Operators take tensors and return new ones at once; the device works in the
 * background, and only {@link Tensor.read} waits. Memory is freed by {@link Tensor.dispose}, at the end of a `using` block
 * or of a {@link scope}, or when the tensor is collected. Work that is already enqueued keeps what it needs.
 *
 * @example
 * import { randn } from 'heddle'
 * const x = randn([2, 3], { seed: 1 })
 * console.log(x.shape, await x.transpose(0, 1).read())
 */
export class Tensor<D extends DType = DType> {
  readonly dtype: D
  readonly shape: readonly number[]
  /** Elements from one index to the next, per dimension. */
  readonly strides: readonly number[]
  readonly device: Device
  #guard: Guard | undefined
  // What views of one memory have in common, once there are some, and where in it they begin
  #memory: object | undefined
  #offset = 0

  private constructor(handle: number, dtype: D, { shape, strides }: Layout, device: Device) {
    this.#guard = guardOf(handle)
    this.dtype = dtype
    this.shape = shape
    this.strides = strides
    this.device = device
    track(this)
  }

  /** @internal What only looks like a tensor is none. */
  static [Symbol.hasInstance](value: unknown): boolean {
    return typeof value === 'object' && value !== null && #guard in value
  }

  /** @internal Wraps what the addon made. */
  static adopt(handle: number, dtype: number, layout: Layout, device: Device): Tensor {
    return new Tensor(handle, dtypes[dtype]!, layout, device)
  }

  /** @internal Arrays that tensors may share. */
  static layout(shape: number[], strides: number[] = contiguousStrides(shape)): Layout {
    return { shape: Object.freeze(shape), strides: Object.freeze(strides) }
  }

  /** @internal */
  static make<D extends DType>(
    op: string,
    shape: unknown,
    dtype: D,
    device: DeviceLike | undefined,
    bytes?: ArrayBufferView,
    pinned = false,
  ): Tensor<D> {
    const sizes = checkShape(op, shape, 0)
    if (!isDType(dtype)) throw mustBe(op, 'dtype', `one of ${dtypes.join(', ')}`, dtype)
    const target = parseDevice(op, device)
    if (typeof pinned !== 'boolean') throw mustBe(op, 'pinned', 'a boolean', pinned)
    const number = dtypes.indexOf(dtype)
    const handle = named(op, () =>
      bytes
        ? addon().from(bytes, number, sizes, target.kind, target.index, pinned)
        : addon().empty(number, sizes, target.kind, target.index, pinned),
    )
    return new Tensor(handle, dtype, Tensor.layout(sizes), target.device)
  }

  /** @internal The addon's name for it; a disposed tensor has none. */
  get handle(): number {
    const handle = this.#guard?.watched.handle
    if (handle === undefined) {
      throw refuse('ERR_DISPOSED', 'tensor', undefined, 'this tensor was disposed')
    }
    return handle
  }

  /** Number of dimensions. */
  get rank(): number {
    return this.shape.length
  }

  /** Number of elements. */
  get size(): number {
    return this.shape.reduce((product, size) => product * size, 1)
  }

  /** Bytes of its elements, without gaps that strides leave. */
  get nbytes(): number {
    return this.size * bytesPerElement[this.dtype]
  }

  /** Whether the elements lie in row-major order without gaps. */
  get isContiguous(): boolean {
    let expected = 1
    for (let i = this.rank - 1; i >= 0; i--) {
      if (this.shape[i] !== 1 && this.strides[i] !== expected) return false
      expected *= this.shape[i]!
    }
    return true
  }

  /** Whether {@link Tensor.dispose} was called. */
  get disposed(): boolean {
    return this.#guard === undefined
  }

  #view(op: string, offset: number, shape: number[], strides: number[]): Tensor<D> {
    // nothing lies anywhere, also where the offset would be outside
    const start = shape.includes(0) ? 0 : offset
    const handle = named(op, () => addon().view(this.handle, start, shape, strides))
    const view = new Tensor(handle, this.dtype, Tensor.layout(shape, strides), this.device)
    this.#memory ??= {}
    view.#memory = this.#memory
    view.#offset = this.#offset + start
    return view
  }

  /** @internal Whether an element of the other may lie where another one of this does. */
  meets(other: Tensor): boolean {
    if (this.#memory === undefined || this.#memory !== other.#memory) return false
    const last = ({ shape, strides }: Tensor) =>
      shape.reduce((sum, size, i) => sum + (size - 1) * strides[i]!, 0)
    const apart =
      this.#offset > other.#offset + last(other) || other.#offset > this.#offset + last(this)
    const same = this.#offset === other.#offset && `${this.strides}` === `${other.strides}`
    return !apart && !same
  }

  #dimension(op: string, argument: string, value: unknown): number {
    const dimension = checkInteger(op, argument, value, -this.rank, this.rank - 1)
    return dimension < 0 ? dimension + this.rank : dimension
  }

  /**
   * The elements `start` to `end` (excluded) of one dimension, without a copy. Negative numbers count from the end, as in
   * `Array.prototype.slice`; what lies outside is cut off.
   *
   * @example
   * import { zeros } from 'heddle'
   * console.log(zeros([4, 6]).slice(1, 2, 5).shape) // [4, 3]
   */
  slice(dimension: number, start: number, end?: number): Tensor<D> {
    const at = this.#dimension('slice', 'dimension', dimension)
    const size = this.shape[at]!
    const clamp = (argument: string, value: unknown) => {
      const index = checkInteger('slice', argument, value, Number.MIN_SAFE_INTEGER)
      return Math.min(Math.max(index < 0 ? index + size : index, 0), size)
    }
    const first = clamp('start', start)
    const length = Math.max(clamp('end', end ?? size) - first, 0)
    const offset = first * this.strides[at]!
    return this.#view('slice', offset, this.shape.with(at, length), [...this.strides])
  }

  /** One element of one dimension, which disappears; without a copy. Negative indices count from the end. */
  select(dimension: number, index: number): Tensor<D> {
    const at = this.#dimension('select', 'dimension', dimension)
    const size = this.shape[at]!
    const chosen = checkInteger('select', 'index', index, -size, size - 1)
    const offset = (chosen < 0 ? chosen + size : chosen) * this.strides[at]!
    return this.#view('select', offset, this.shape.toSpliced(at, 1), this.strides.toSpliced(at, 1))
  }

  /**
   * The same elements under another shape; one size may be -1 and is inferred. Without a copy while the strides allow it,
   * which they always do for a contiguous tensor.
   *
   * @throws HeddleError `ERR_SHAPE` if the number of elements differs, or if only a copy could have that shape: call
   * {@link Tensor.contiguous} first.
   */
  reshape(shape: readonly number[]): Tensor<D> {
    const sizes = checkShape('reshape', shape, -1)
    const given = sizes.join(', ')
    const open = sizes.indexOf(-1)
    if (open >= 0) {
      const others = sizes.reduce((product, size, i) => (i === open ? product : product * size), 1)
      sizes[open] = others === 0 ? 0 : this.size / others
    }
    if (
      sizes.reduce((product, size) => product * size, 1) !== this.size ||
      sizes.some((size) => size < 0 || !Number.isInteger(size))
    ) {
      throw refuse(
        'ERR_SHAPE',
        'reshape',
        'shape',
        `shape must have ${this.size} elements, got [${given}] (the tensor is [${this.shape.join(', ')}])`,
      )
    }
    return this.#view('reshape', 0, sizes, this.#restride(sizes))
  }

  // Strides under another shape: runs of dimensions that lie together in memory are split and joined freely
  #restride(sizes: readonly number[]): number[] {
    if (this.isContiguous || this.size === 0) return contiguousStrides(sizes)
    const old = this.shape
      .map((size, i) => ({ size, stride: this.strides[i]! }))
      .filter(({ size }) => size !== 1)
    const strides = new Array<number>(sizes.length).fill(1)
    let from = 0
    let to = 0
    while (from < old.length) {
      let have = old[from]!.size
      let want = 1
      let fromEnd = from + 1
      let toEnd = to
      while (want !== have || toEnd === to) {
        if (want < have || toEnd === to) want *= sizes[toEnd++]!
        else {
          const previous = old[fromEnd - 1]!
          const next = old[fromEnd]!
          if (previous.stride !== next.size * next.stride) {
            throw refuse(
              'ERR_SHAPE',
              'reshape',
              'shape',
              `shape [${sizes.join(', ')}] would need a copy (the strides are [${this.strides.join(', ')}]); call contiguous() first`,
            )
          }
          have *= next.size
          fromEnd++
        }
      }
      let stride = old[fromEnd - 1]!.stride
      for (let i = toEnd - 1; i >= to; i--) {
        strides[i] = stride
        stride *= sizes[i]!
      }
      from = fromEnd
      to = toEnd
    }
    return strides
  }

  /** Exchanges two dimensions, without a copy. */
  transpose(a: number, b: number): Tensor<D> {
    const first = this.#dimension('transpose', 'a', a)
    const second = this.#dimension('transpose', 'b', b)
    const swap = (list: readonly number[]) =>
      list.with(first, list[second]!).with(second, list[first]!)
    return this.#view('transpose', 0, swap(this.shape), swap(this.strides))
  }

  /** Repeats dimensions of size 1, and adds leading ones, to reach a shape; without a copy. */
  expand(shape: readonly number[]): Tensor<D> {
    const sizes = checkShape('expand', shape, 0)
    const lead = sizes.length - this.rank
    const strides = sizes.map((size, i) => {
      const own = this.shape[i - lead] ?? 1
      if (lead < 0 || (own !== size && own !== 1)) {
        throw refuse(
          'ERR_SHAPE',
          'expand',
          'shape',
          `shape must extend [${this.shape.join(', ')}], got [${sizes.join(', ')}]`,
        )
      }
      return own === size && i >= lead ? this.strides[i - lead]! : 0
    })
    if (lead < 0) {
      throw refuse(
        'ERR_SHAPE',
        'expand',
        'shape',
        `shape must have at least ${this.rank} dimensions, got ${sizes.length}`,
      )
    }
    return this.#view('expand', 0, sizes, strides)
  }

  /** A copy in row-major order, or another view of the same memory if it is so already. */
  contiguous(): Tensor<D> {
    return this.isContiguous
      ? this.#view('contiguous', 0, [...this.shape], [...this.strides])
      : this.#copy('contiguous', this.dtype)
  }

  /** A copy of its own, in row-major order. */
  clone(): Tensor<D> {
    return this.#copy('clone', this.dtype)
  }

  #copy<E extends DType>(op: string, dtype: E): Tensor<E> {
    const made = Tensor.make(op, this.shape, dtype, this.device)
    try {
      return made.copyFrom(this)
    } catch (error) {
      made.dispose()
      throw error
    }
  }

  /**
   * Converts to another dtype, into new memory. Floats round to nearest even; to integers they truncate and saturate, NaN
   * gives 0; to `bool` everything but 0 is true.
   */
  cast<E extends DType>(dtype: E): Tensor<E> {
    if (!isDType(dtype)) throw mustBe('cast', 'dtype', `one of ${dtypes.join(', ')}`, dtype)
    return this.#copy('cast', dtype)
  }

  /**
   * Copies to another device; on its own device this is another view of the same memory. Enqueued like any operator.
   *
   * @throws HeddleError `ERR_DEVICE` if there is no such device, with the reason.
   */
  to(device: DeviceLike): Tensor<D> {
    const target = parseDevice('to', device)
    if (target.device === this.device)
      return this.#view('to', 0, [...this.shape], [...this.strides])
    const source = this.contiguous()
    try {
      const handle = named('to', () => addon().transfer(source.handle, target.kind, target.index))
      return new Tensor(handle, this.dtype, Tensor.layout([...this.shape]), target.device)
    } finally {
      source.dispose()
    }
  }

  /**
   * Overwrites the elements with those of a tensor of the same shape on the same device, converting the dtype. That may be
   * another view of the same memory, whose elements are those from before. Where that is all of its memory, a tensor whose
   * reads were rejected can be read again.
   *
   * @throws HeddleError `ERR_SHAPE`, `ERR_DEVICE` or `ERR_ARGUMENT`, that where elements of this tensor share memory, as after
   * {@link Tensor.expand}.
   */
  copyFrom(source: Tensor): this {
    checkTensor('copyFrom', 'source', source)
    this.#overwrite('copyFrom', source)
    return this
  }

  /** @internal That no element is another one, too. */
  checkApart(op: string, name?: string): void {
    if (this.shape.includes(0) || !this.shape.some((n, i) => n > 1 && this.strides[i] === 0)) return
    const rule =
      name === undefined
        ? 'elements must not share'
        : `${name} must be of elements that do not share`
    const text = `${rule} memory, got strides [${this.strides.join(', ')}]; call contiguous() first`
    throw refuse('ERR_ARGUMENT', op, name, text)
  }

  #overwrite(op: string, source: Tensor): void {
    if (source.rank !== this.rank || source.shape.some((size, i) => size !== this.shape[i])) {
      throw refuse(
        'ERR_SHAPE',
        op,
        'source',
        `source must be [${this.shape.join(', ')}], got [${source.shape.join(', ')}]`,
      )
    }
    this.checkApart(op)
    const copy = (x: Tensor) => named(op, () => run('copy', { x, to: this }), 'copy')
    if (!this.meets(source)) return void copy(source)
    using before = source.clone()
    copy(before)
  }

  /**
   * Overwrites the elements with host values in row-major order. They are taken at the call; the array may change right
   * after. Numbers in a `Float32Array` or a plain array are converted to the dtype. As with {@link Tensor.copyFrom}, a tensor
   * that failed is well again where that is all of its memory.
   */
  write(data: HostValues | readonly number[]): this {
    const given = hostValues('write', data, this.dtype)
    const source = Tensor.make('write', this.shape, given.dtype, this.device, given.bytes)
    try {
      this.#overwrite('write', source)
    } finally {
      source.dispose()
    }
    return this
  }

  /** @internal Overwrites part of a contiguous tensor with raw bytes. */
  writeBytes(bytes: Uint8Array, offset: number): void {
    const size = bytesPerElement[this.dtype]
    const part = this.#view('write', offset / size, [bytes.length / size], [1])
    addon().write(part.handle, bytes)
    part.dispose()
  }

  #prepared(options: ReadOptions | undefined): {
    source: Tensor
    temporary: boolean
    signal: AbortSignal | undefined
  } {
    checkOptions('read', options, readOptions)
    const as = options?.as
    if (as !== undefined && as !== 'float32') throw mustBe('read', 'as', '"float32"', as)
    const signal: unknown = options?.signal
    if (signal !== undefined && !(signal instanceof AbortSignal))
      throw mustBe('read', 'signal', 'an AbortSignal', signal)
    const dtype = as ?? this.dtype
    // Node.js crashes on memory that is more than one of its buffers may be
    const bytes = this.size * bytesPerElement[dtype]
    if (bytes > constants.MAX_LENGTH)
      throw refuse(
        'ERR_UNSUPPORTED',
        'read',
        undefined,
        `the tensor must have at most ${constants.MAX_LENGTH} bytes to be read at once, got ${bytes}; read slices of it`,
      )
    return dtype === this.dtype && this.isContiguous
      ? { source: this, temporary: false, signal }
      : { source: this.#copy('read', dtype), temporary: true, signal }
  }

  /**
   * Waits for the elements, in row-major order. float16 and bfloat16 come as `Uint16Array`, 8-bit floats and bool as
   * `Uint8Array`, unless `as: 'float32'` asks for numbers.
   *
   * @throws The promise rejects with a {@link HeddleError} if the operator that made the tensor, or one before it, failed on
   * the device, unless it was overwritten whole since; the error names it. `ERR_UNSUPPORTED` of more bytes than an array of
   * this Node.js may have, which are 4 GiB in version 20.
   */
  read(options: ReadOptions & { as: 'float32' }): Promise<Float32Array<ArrayBuffer>>
  read(options?: ReadOptions): Promise<HostArray<D>>
  read(options?: ReadOptions): Promise<unknown> {
    // The body of a graph has nobody who would wait for a promise
    named('read', () => addon().checkReading())
    return this.#read(options)
  }

  async #read(options?: ReadOptions): Promise<unknown> {
    const { source, temporary, signal } = this.#prepared(options)
    try {
      signal?.throwIfAborted()
      const bytes = await unlessAborted(
        named('read', () => addon().read(source.handle)),
        signal,
      )
      return new hostArrays[source.dtype](bytes)
    } finally {
      if (temporary) source.dispose()
    }
  }

  /**
   * Like {@link Tensor.read}, but blocks the thread: for workers that have nothing else to do. A signal counts if it was
   * aborted before.
   */
  readSync(options: ReadOptions & { as: 'float32' }): Float32Array<ArrayBuffer>
  readSync(options?: ReadOptions): HostArray<D>
  readSync(options?: ReadOptions): unknown {
    const { source, temporary, signal } = this.#prepared(options)
    try {
      signal?.throwIfAborted()
      return new hostArrays[source.dtype](named('read', () => addon().readSync(source.handle)))
    } finally {
      if (temporary) source.dispose()
    }
  }

  /** Lets go of the memory; views of it and enqueued work keep what they need. Doing it twice does nothing. */
  dispose(): void {
    if (this.#guard === undefined) return
    untrack(this)
    addon().release(this.handle)
    this.#guard.watched.handle = undefined
    if (guards.length < mostGuards) guards.push(this.#guard)
    this.#guard = undefined
  }

  /** Lets `using x = …` dispose of it. */
  [Symbol.dispose](): void {
    this.dispose()
  }

  /** What it is, not what it holds. */
  toString(): string {
    return `Tensor ${this.dtype} [${this.shape.join(', ')}] ${this.disposed ? 'disposed' : this.device}`
  }

  /** @internal */
  [inspect.custom](): string {
    return this.toString()
  }
}

const readOptions: ReadonlySet<string> = new Set(['as', 'signal'])
const createOptions: ReadonlySet<string> = new Set(['dtype', 'device', 'pinned'])
const randnOptions: ReadonlySet<string> = new Set([...createOptions, 'seed'])

// What waits for a signal, behind one listener: Node.js warns of more than ten
const waiting = new WeakMap<AbortSignal, { calls: Set<() => void>; listener: () => void }>()

function waitingFor(signal: AbortSignal) {
  const known = waiting.get(signal)
  if (known) return known
  const calls = new Set<() => void>()
  const listener = () => {
    for (const call of calls) call()
  }
  const made = { calls, listener }
  waiting.set(signal, made)
  signal.addEventListener('abort', listener)
  return made
}

async function unlessAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (!signal) return promise
  const { calls, listener } = waitingFor(signal)
  let abort: (() => void) | undefined
  const aborted = new Promise<never>((_, reject) => {
    abort = () => reject(signal.reason)
    calls.add(abort)
  })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    promise.catch(() => {}) // nobody else hears of a failure that comes after the abort
    calls.delete(abort!)
    if (calls.size === 0 && waiting.delete(signal)) signal.removeEventListener('abort', listener)
  }
}

const carriers =
  'a Float32Array, Float16Array, Uint16Array, Uint8Array, Int32Array or BigInt64Array'

// Whether the buffer under a typed array was transferred, or became too short for it
function isStale(array: ArrayBufferView): boolean {
  try {
    Uint8Array.prototype.at.call(array, 0)
    return false
  } catch {
    return true
  }
}

// Host data as bytes and the dtype that those bytes have: the wanted one, or float32 to be converted on the device
function hostValues(
  op: string,
  data: unknown,
  wanted: DType | undefined,
): { bytes: HostValues; dtype: DType } {
  if (Array.isArray(data)) {
    const values = elements(op, 'data', data, (value, i) => {
      const argument = `data[${i}]`
      if (wanted === 'int64') return checkInteger(op, argument, value, Number.MIN_SAFE_INTEGER)
      if (wanted === 'int32') return checkInteger(op, argument, value, -(2 ** 31), 2 ** 31 - 1)
      if (typeof value !== 'number') throw mustBe(op, argument, 'a number', value)
      return value
    })
    if (wanted === 'int64') return { bytes: BigInt64Array.from(values, BigInt), dtype: wanted }
    if (wanted === 'int32') return { bytes: Int32Array.from(values), dtype: wanted }
    return { bytes: Float32Array.from(values), dtype: 'float32' }
  }
  if (!ArrayBuffer.isView(data) || data instanceof DataView) {
    throw mustBe(op, 'data', 'a typed array or an array of numbers', data)
  }
  if (isStale(data)) {
    throw refuse(
      'ERR_ARGUMENT',
      op,
      'data',
      `data must be attached to memory, got ${show(data)} (its buffer was transferred or became too short)`,
    )
  }
  const kind = Object.prototype.toString.call(data).slice(8, -1)
  const own = dtypeOfArray[kind]
  if (own === 'float32' || own === 'float16') return { bytes: data as HostValues, dtype: own }
  if (wanted === undefined) {
    if (own !== undefined) return { bytes: data as HostValues, dtype: own }
    throw kind === 'Uint16Array'
      ? refuse('ERR_DTYPE', op, 'dtype', `dtype must be given for a ${kind}`)
      : refuse('ERR_DTYPE', op, 'data', `data must be ${carriers}, got a ${kind}`)
  }
  const carrier = hostArrays[wanted].name
  if (kind !== carrier) {
    throw refuse(
      'ERR_DTYPE',
      op,
      'data',
      `data must be a ${carrier}${wanted === 'float32' ? '' : ' or Float32Array'} for ${wanted}, got ${kind}`,
    )
  }
  return { bytes: data as HostValues, dtype: wanted }
}

/**
 * Makes a tensor from host values in row-major order; they are copied at the call. 16-bit floats are given as
 * `Uint16Array` bit patterns, or as numbers in a `Float32Array` or plain array, which are rounded.
 *
 * @param shape One dimension if left out.
 * @throws HeddleError `ERR_SHAPE` if the shape has another number of elements than the data.
 * @example
 * import { tensor } from 'heddle'
 * const x = tensor([1, 2, 3, 4], [2, 2], { dtype: 'bfloat16' })
 * console.log(await x.read({ as: 'float32' }))
 */
export function tensor<A extends HostValues | readonly number[], D extends DType = DTypeOf<A>>(
  data: A,
  shape?: readonly number[],
  options?: CreateOptions<D>,
): Tensor<D> {
  checkOptions('tensor', options, createOptions)
  const dtype = options?.dtype
  if (dtype !== undefined && !isDType(dtype))
    throw mustBe('tensor', 'dtype', `one of ${dtypes.join(', ')}`, dtype)
  const given = hostValues('tensor', data, dtype)
  const sizes = shape ?? [given.bytes.length]
  const make = <E extends DType>(as: E, bytes?: HostValues, pinned?: boolean) =>
    Tensor.make('tensor', sizes, as, options?.device, bytes, pinned)
  if (dtype === undefined || dtype === given.dtype)
    return make(given.dtype, given.bytes, options?.pinned) as unknown as Tensor<D>
  const made = make(given.dtype, given.bytes)
  try {
    return make(dtype, undefined, options?.pinned).copyFrom(made)
  } finally {
    made.dispose()
  }
}

const emptyOf = <D extends DType>(
  op: string,
  shape: readonly number[],
  options: CreateOptions<D> | undefined,
): Tensor<D> => {
  const { dtype = 'float32' as D, device, pinned } = options ?? {}
  return Tensor.make(op, shape, dtype, device, undefined, pinned)
}

/** Makes a tensor whose elements are whatever the memory held. */
export function empty<D extends DType = 'float32'>(
  shape: readonly number[],
  options?: CreateOptions<D>,
): Tensor<D> {
  checkOptions('empty', options, createOptions)
  return emptyOf('empty', shape, options)
}

function filled<D extends DType = 'float32'>(
  op: string,
  shape: readonly number[],
  value: number,
  options: CreateOptions<D> | undefined,
): Tensor<D> {
  checkOptions(op, options, createOptions)
  if (typeof value !== 'number') throw mustBe(op, 'value', 'a number', value)
  const made = emptyOf(op, shape, options)
  if (Number.isFinite(value)) run('fill', { to: made, value })
  else {
    const one = tensor([value], [], { device: made.device })
    const repeated = one.expand(made.shape)
    made.copyFrom(repeated)
    repeated.dispose()
    one.dispose()
  }
  return made
}

/** Makes a tensor of one value, converted to the dtype. */
export function full<D extends DType = 'float32'>(
  shape: readonly number[],
  value: number,
  options?: CreateOptions<D>,
): Tensor<D> {
  return filled('full', shape, value, options)
}

/** Makes a tensor of zeros. */
export function zeros<D extends DType = 'float32'>(
  shape: readonly number[],
  options?: CreateOptions<D>,
): Tensor<D> {
  return filled('zeros', shape, 0, options)
}

/**
 * Makes a tensor of standard normal random numbers. They depend on the seed and the element's position alone: every device
 * gives the same ones up to rounding.
 *
 * @param options `seed` is an integer from 0 to 2^53 - 1; without one it is random.
 */
export function randn<D extends FloatDType = 'float32'>(
  shape: readonly number[],
  options?: CreateOptions<D> & { seed?: number | undefined },
): Tensor<D> {
  checkOptions('randn', options, randnOptions)
  const made = emptyOf('randn', shape, options)
  const seed = options?.seed ?? Math.floor(Math.random() * Number.MAX_SAFE_INTEGER)
  try {
    const from = checkInteger('randn', 'seed', seed, 0)
    named('randn', () => run('fill', { to: made, source: 'normal', seed: from }), 'fill')
  } catch (error) {
    made.dispose()
    throw error
  }
  return made
}

/** @internal Shows what a message calls a tensor that is none. */
export function checkTensor(op: string, argument: string, value: unknown): asserts value is Tensor {
  if (!(value instanceof Tensor)) {
    throw refuse('ERR_ARGUMENT', op, argument, `${argument} must be a tensor, got ${show(value)}`)
  }
}
