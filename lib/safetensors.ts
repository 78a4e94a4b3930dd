import { randomUUID } from 'node:crypto'
import { type FileHandle, open, rename, rm } from 'node:fs/promises'
import { checkInteger, checkOptions, mustBe, show } from './check.js'
import type { DeviceLike } from './device.js'
import { bytesPerElement, type DType, dtypes, type HostArray, isDType } from './dtype.js'
import { HeddleError, refuse } from './errors.js'
import { scope } from './scope.js'
import { checkTensor, Tensor } from './tensor.js'

const names: Readonly<Record<string, DType>> = {
  F32: 'float32',
  F16: 'float16',
  BF16: 'bfloat16',
  F8_E4M3: 'float8_e4m3fn',
  F8_E5M2: 'float8_e5m2',
  I32: 'int32',
  I64: 'int64',
  U8: 'uint8',
  BOOL: 'bool',
}
// Known to the format though not to us, so that a file may hold them beside what is wanted
const otherSizes: Readonly<Record<string, number>> = {
  F64: 8,
  I8: 1,
  I16: 2,
  U16: 2,
  U32: 4,
  U64: 8,
}

const headerLimit = 100_000_000
const chunkBytes = 16 << 20

/** One entry of a safetensors file. */
export interface SafetensorsEntry {
  /** Undefined for a dtype that tensors here cannot have. */
  dtype: DType | undefined
  shape: readonly number[]
  nbytes: number
}

/** How {@link SafetensorsFile.load} makes a tensor. */
export interface LoadOptions<D extends DType = DType> {
  device?: DeviceLike | undefined
  /** What the tensor is converted to, where the file has another; the file's own if left out. */
  dtype?: D | undefined
  /** Only the rows `start` to `end` (excluded) of the first dimension. */
  rows?: readonly [start: number, end: number] | undefined
}

/** An open safetensors file. */
export interface SafetensorsFile {
  readonly entries: ReadonlyMap<string, SafetensorsEntry>
  /** The strings under `__metadata__`. */
  readonly metadata: Readonly<Record<string, string>>
  /**
   * Reads one tensor straight to a device, a part at a time.
   *
   * @throws The promise rejects with `ERR_ARGUMENT` for a name that is not there and `ERR_DTYPE` for a dtype that tensors
   * cannot have.
   */
  load<D extends DType = DType>(name: string, options?: LoadOptions<D>): Promise<Tensor<D>>
  /** Closes the file; tensors that were loaded stay. */
  close(): Promise<void>
  /** Lets `await using file = …` close it. */
  [Symbol.asyncDispose](): Promise<void>
}

interface Located extends SafetensorsEntry {
  begin: number
}

const loadOptions: ReadonlySet<string> = new Set<keyof LoadOptions>(['device', 'dtype', 'rows'])

async function readFully(
  file: FileHandle,
  into: Uint8Array,
  position: number,
  lost: () => HeddleError,
): Promise<void> {
  for (let done = 0; done < into.length; ) {
    const { bytesRead } = await file.read(into, done, into.length - done, position + done)
    if (bytesRead === 0) throw lost()
    done += bytesRead
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return value !== null && typeof value === 'object' && !Array.isArray(value)
}

function isSize(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 0
}

// The first name that an object of a valid JSON text has twice; parsing alone would keep the last of them
function repeatedName(json: string): string | undefined {
  const open: (Set<string> | undefined)[] = []
  let names: Set<string> | undefined
  let atName = false
  for (let i = 0; i < json.length; i++) {
    const character = json[i]
    if (character === '{' || character === '[') {
      names = character === '{' ? new Set() : undefined
      open.push(names)
      atName = true
    } else if (character === '}' || character === ']') {
      open.pop()
      names = open.at(-1)
    } else if (character === ':') atName = false
    else if (character === ',') atName = true
    else if (character === '"') {
      const start = i
      while (json[++i] !== '"') if (json[i] === '\\') i++
      if (!names || !atName) continue
      const name: string = JSON.parse(json.slice(start, i + 1))
      if (names.has(name)) return name
      names.add(name)
    }
  }
  return undefined
}

function few(shape: readonly number[]): string {
  return shape.length > 8 ? `${shape.slice(0, 8).join(', ')}, …` : shape.join(', ')
}

const invalid = (path: string, text: string) =>
  refuse('ERR_ARGUMENT', 'safetensors', 'path', `${path} is no valid file: ${text}`)

// Every size and offset of the header is checked before anything is allocated or read by it
function parseHeader(
  path: string,
  header: unknown,
  dataBytes: number,
): { entries: Map<string, Located>; metadata: Record<string, string> } {
  const broken = (text: string) => invalid(path, text)
  if (!isRecord(header)) throw broken('its header is no JSON object')
  const entries = new Map<string, Located>()
  let metadata: Record<string, string> = {}
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isRecord(entry) || Object.values(entry).some((text) => typeof text !== 'string')) {
        throw broken('__metadata__ must map names to strings')
      }
      metadata = Object.fromEntries(Object.entries(entry as Record<string, string>))
      continue
    }
    if (!isRecord(entry)) throw broken(`entry ${show(name)} is no object`)
    const { dtype, shape, data_offsets: range } = entry
    if (typeof dtype !== 'string') throw broken(`entry ${show(name)} has no dtype`)
    if (!Array.isArray(shape) || !shape.every(isSize))
      throw broken(`the shape of ${show(name)} is no list of sizes`)
    if (!Array.isArray(range) || range.length !== 2 || !range.every(isSize)) {
      throw broken(`data_offsets of ${show(name)} must be two offsets`)
    }
    const [begin, end] = range as [number, number]
    const ours = Object.hasOwn(names, dtype) ? names[dtype] : undefined
    const size = ours
      ? bytesPerElement[ours]
      : Object.hasOwn(otherSizes, dtype)
        ? otherSizes[dtype]
        : undefined
    const nbytes = shape.reduce((product: number, dim: number) => product * dim, size ?? 0)
    if (begin > end || end > dataBytes) {
      throw broken(
        `${show(name)} lies at ${begin} to ${end}, but the file has ${dataBytes} bytes of data`,
      )
    }
    if (size !== undefined && nbytes !== end - begin) {
      throw broken(
        `${show(name)} is ${dtype} [${few(shape)}], ${nbytes} bytes, but has ${end - begin}`,
      )
    }
    entries.set(name, {
      dtype: ours,
      shape: Object.freeze(shape as number[]),
      nbytes: end - begin,
      begin,
    })
  }
  let at = 0
  for (const [name, { begin, nbytes }] of [...entries].sort(
    ([, a], [, b]) => a.begin - b.begin || a.nbytes - b.nbytes,
  )) {
    if (begin !== at)
      throw broken(
        `${show(name)} starts at ${begin} instead of ${at}: tensors must not overlap or leave gaps`,
      )
    at = begin + nbytes
  }
  if (at !== dataBytes)
    throw broken(`its tensors end at ${at}, but the file has ${dataBytes} bytes of data`)
  return { entries, metadata }
}

// A shape that no tensor can have is the fault of one entry, so its error names that
function makeNamed(
  what: string,
  shape: readonly number[],
  dtype: DType,
  device: DeviceLike | undefined,
): Tensor {
  try {
    return Tensor.make('safetensors', shape, dtype, device)
  } catch (error) {
    if (!(error instanceof HeddleError) || error.argument !== 'shape') throw error
    const reason = error.message.slice('safetensors: '.length)
    throw refuse(error.code, 'safetensors', 'name', `${what} cannot be loaded: ${reason}`)
  }
}

/**
 * Opens a safetensors file. The header is read and all of its sizes and offsets are checked; data is read when it is asked
 * for.
 *
 * @throws The promise rejects with `ERR_ARGUMENT` if the file cannot be read, is truncated or contradicts itself.
 * @example
 * import { openSafetensors, writeSafetensors, zeros } from 'heddle'
 * await writeSafetensors('/tmp/example.safetensors', { w: zeros([2, 3]) })
 * const file = await openSafetensors('/tmp/example.safetensors')
 * const w = await file.load('w', { dtype: 'bfloat16' })
 * console.log(w.shape) // [2, 3]
 * await file.close()
 */
export async function openSafetensors(path: string): Promise<SafetensorsFile> {
  if (typeof path !== 'string') throw mustBe('safetensors', 'path', 'a path', path)
  let file: FileHandle
  try {
    file = await open(path)
  } catch (cause) {
    throw refuse(
      'ERR_ARGUMENT',
      'safetensors',
      'path',
      `cannot open ${path} (${(cause as Error).message})`,
    )
  }
  const broken = (text: string) => invalid(path, text)
  const truncated = () => broken('it is truncated')
  try {
    const stat = await file.stat()
    if (!stat.isFile()) throw broken('it is no regular file')
    const prefix = Buffer.alloc(8)
    await readFully(file, prefix, 0, truncated)
    const length = prefix.readBigUInt64LE()
    if (length > BigInt(headerLimit))
      throw broken(`its header claims ${length} bytes, the limit is ${headerLimit}`)
    const dataStart = 8 + Number(length)
    if (dataStart > stat.size) throw truncated()
    const text = Buffer.alloc(Number(length))
    await readFully(file, text, 8, truncated)
    let json: string
    let header: unknown
    try {
      json = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(text)
      header = JSON.parse(json)
    } catch (cause) {
      throw broken(`its header is no JSON (${(cause as Error).message})`)
    }
    const repeated = repeatedName(json)
    if (repeated !== undefined) throw broken(`its header has ${show(repeated)} twice`)
    const { entries, metadata } = parseHeader(path, header, stat.size - dataStart)

    let closed = false
    const load = async <D extends DType>(name: string, options: LoadOptions<D> = {}) => {
      checkOptions('safetensors', options, loadOptions)
      const disposed = () => refuse('ERR_DISPOSED', 'safetensors', undefined, `${path} was closed`)
      if (closed) throw disposed()
      const entry = entries.get(name)
      if (!entry)
        throw refuse('ERR_ARGUMENT', 'safetensors', 'name', `${path} has no tensor ${show(name)}`)
      if (!entry.dtype)
        throw refuse(
          'ERR_DTYPE',
          'safetensors',
          'name',
          `${show(name)} of ${path} has a dtype that tensors cannot have`,
        )
      const [count = 1, ...rest] = entry.shape
      const { rows = [0, count], dtype = entry.dtype } = options
      if (!isDType(dtype))
        throw mustBe('safetensors', 'dtype', `one of ${dtypes.join(', ')}`, dtype)
      if (!Array.isArray(rows) || rows.length !== 2)
        throw mustBe('safetensors', 'rows', 'two row numbers', rows)
      const [first, last] = rows
      checkInteger('safetensors', 'rows[0]', first, 0, count)
      checkInteger('safetensors', 'rows[1]', last, first, count)
      const shape = entry.shape.length === 0 ? [] : [last - first, ...rest]
      const tensor = makeNamed(`${show(name)} of ${path}`, shape, entry.dtype, options.device)
      try {
        const begin = dataStart + entry.begin + (count === 0 ? 0 : (entry.nbytes / count) * first)
        const buffer = Buffer.alloc(Math.min(chunkBytes, tensor.nbytes))
        for (let at = 0; at < tensor.nbytes; at += buffer.length) {
          const part = buffer.subarray(0, Math.min(buffer.length, tensor.nbytes - at))
          await readFully(file, part, begin + at, truncated)
          tensor.writeBytes(part, at)
        }
        if (dtype === entry.dtype) return tensor as Tensor<D>
        using stored = tensor
        return stored.cast(dtype as D)
      } catch (error) {
        tensor.dispose()
        throw closed ? disposed() : error
      }
    }
    const close = () => {
      closed = true
      return file.close()
    }
    return { entries, metadata, load, close, [Symbol.asyncDispose]: close }
  } catch (error) {
    await file.close()
    throw error
  }
}

// A tensor of one moment, also one that is too large to be read at once
function readParts(tensor: Tensor): Promise<HostArray[]> {
  return scope(() => {
    const flat = tensor.contiguous().reshape([-1])
    const step = chunkBytes / bytesPerElement[tensor.dtype]
    const parts = Array.from({ length: Math.ceil(flat.size / step) || 1 }, (_, i) =>
      flat.slice(0, i * step, (i + 1) * step).read(),
    )
    return Promise.all(parts)
  })
}

/**
 * Writes tensors to a safetensors file, in the order given. The file appears under its name once it is whole.
 *
 * @throws The promise rejects with the error of a tensor that could not be read, or of the file system.
 * @example
 * import { randn, writeSafetensors } from 'heddle'
 * await writeSafetensors('/tmp/example.safetensors', { w: randn([4, 4]) }, { metadata: { made: 'by hand' } })
 */
export async function writeSafetensors(
  path: string,
  tensors: Readonly<Record<string, Tensor>>,
  options: { metadata?: Readonly<Record<string, string>> | undefined } = {},
): Promise<void> {
  if (typeof path !== 'string') throw mustBe('safetensors', 'path', 'a path', path)
  if (!isRecord(tensors)) throw mustBe('safetensors', 'tensors', 'an object of tensors', tensors)
  checkOptions('safetensors', options, new Set(['metadata']))
  const { metadata } = options
  if (
    metadata !== undefined &&
    !(isRecord(metadata) && Object.values(metadata).every((text) => typeof text === 'string'))
  )
    throw mustBe('safetensors', 'metadata', 'an object of strings', metadata)
  // a name may be __proto__
  const header: Record<string, unknown> = Object.create(null)
  if (metadata) header.__metadata__ = metadata
  let at = 0
  for (const [name, tensor] of Object.entries(tensors)) {
    if (name === '__metadata__')
      throw mustBe('safetensors', 'tensors', 'without one called "__metadata__"', tensors)
    checkTensor('safetensors', name, tensor)
    const dtype = Object.keys(names).find((key) => names[key] === tensor.dtype)
    header[name] = { dtype, shape: tensor.shape, data_offsets: [at, at + tensor.nbytes] }
    at += tensor.nbytes
  }
  const text = Buffer.from(JSON.stringify(header))
  const padded = Math.ceil(text.length / 8) * 8
  const start = Buffer.alloc(8 + padded, ' ')
  start.writeBigUInt64LE(BigInt(padded))
  text.copy(start, 8)
  const partial = `${path}.partial-${randomUUID()}`
  try {
    const file = await open(partial, 'w')
    try {
      await file.writeFile(start)
      for (const tensor of Object.values(tensors))
        for (const part of await readParts(tensor))
          await file.writeFile(new Uint8Array(part.buffer))
    } finally {
      await file.close()
    }
    await rename(partial, path)
  } catch (error) {
    await rm(partial, { force: true })
    throw error
  }
}
