import { type FileHandle, open, rename, rm } from 'node:fs/promises'
import { checkInteger, checkOptions, mustBe, show } from './check.js'
import type { DeviceLike } from './device.js'
import { bytesPerElement, type DType } from './dtype.js'
import { type HeddleError, refuse } from './errors.js'
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
export interface LoadOptions {
  device?: DeviceLike | undefined
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
  load(name: string, options?: LoadOptions): Promise<Tensor>
  /** Closes the file; tensors that were loaded stay. */
  close(): Promise<void>
  /** Lets `await using file = …` close it. */
  [Symbol.asyncDispose](): Promise<void>
}

interface Located extends SafetensorsEntry {
  begin: number
}

const loadOptions: ReadonlySet<string> = new Set<keyof LoadOptions>(['device', 'rows'])

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

// Every size and offset of the header is checked before anything is allocated or read by it
function parseHeader(
  path: string,
  header: unknown,
  dataBytes: number,
): { entries: Map<string, Located>; metadata: Record<string, string> } {
  const broken = (text: string) =>
    refuse('ERR_ARGUMENT', 'safetensors', 'path', `${path} is no valid file: ${text}`)
  if (!isRecord(header)) throw broken('its header is no JSON object')
  const entries = new Map<string, Located>()
  const metadata: Record<string, string> = {}
  for (const [name, entry] of Object.entries(header)) {
    if (name === '__metadata__') {
      if (!isRecord(entry) || Object.values(entry).some((text) => typeof text !== 'string')) {
        throw broken('__metadata__ must map names to strings')
      }
      Object.assign(metadata, entry)
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
        `${show(name)} is ${dtype} [${shape.join(', ')}], ${nbytes} bytes, but has ${end - begin}`,
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

/**
 * Opens a safetensors file. The header is read and all of its sizes and offsets are checked; data is read when it is asked
 * for.
 *
 * @throws The promise rejects with `ERR_ARGUMENT` if the file cannot be read, is truncated or contradicts itself.
 * @example
 * import { openSafetensors, writeSafetensors, zeros } from 'heddle'
 * await writeSafetensors('/tmp/example.safetensors', { w: zeros([2, 3]) })
 * const file = await openSafetensors('/tmp/example.safetensors')
 * console.log((await file.load('w')).shape) // [2, 3]
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
  const broken = (text: string) =>
    refuse('ERR_ARGUMENT', 'safetensors', 'path', `${path} is no valid file: ${text}`)
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
    let header: unknown
    try {
      header = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(text))
    } catch (cause) {
      throw broken(`its header is no JSON (${(cause as Error).message})`)
    }
    const { entries, metadata } = parseHeader(path, header, stat.size - dataStart)

    const load = async (name: string, options: LoadOptions = {}): Promise<Tensor> => {
      checkOptions('safetensors', options, loadOptions)
      const entry = entries.get(name)
      if (!entry)
        throw refuse('ERR_ARGUMENT', 'safetensors', 'name', `${path} has no tensor ${show(name)}`)
      if (!entry.dtype)
        throw refuse(
          'ERR_DTYPE',
          'safetensors',
          'name',
          `${show(name)} has a dtype that tensors cannot have`,
        )
      const [count = 1, ...rest] = entry.shape
      const [first, last] = options.rows ?? [0, count]
      checkInteger('safetensors', 'rows[0]', first, 0, count)
      checkInteger('safetensors', 'rows[1]', last, first, count)
      const shape = entry.shape.length === 0 ? [] : [last - first, ...rest]
      const tensor = Tensor.make('safetensors', shape, entry.dtype, options.device)
      try {
        const begin = dataStart + entry.begin + (count === 0 ? 0 : (entry.nbytes / count) * first)
        const buffer = Buffer.alloc(Math.min(chunkBytes, tensor.nbytes))
        for (let at = 0; at < tensor.nbytes; at += buffer.length) {
          const part = buffer.subarray(0, Math.min(buffer.length, tensor.nbytes - at))
          await readFully(file, part, begin + at, truncated)
          tensor.writeBytes(part, at)
        }
        return tensor
      } catch (error) {
        tensor.dispose()
        throw error
      }
    }
    const close = () => file.close()
    return { entries, metadata, load, close, [Symbol.asyncDispose]: close }
  } catch (error) {
    await file.close()
    throw error
  }
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
  const header: Record<string, unknown> = options.metadata ? { __metadata__: options.metadata } : {}
  let at = 0
  for (const [name, tensor] of Object.entries(tensors)) {
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
  const partial = `${path}.partial-${process.pid}`
  try {
    const file = await open(partial, 'w')
    try {
      await file.writeFile(start)
      for (const tensor of Object.values(tensors))
        await file.writeFile(new Uint8Array((await tensor.read()).buffer))
    } finally {
      await file.close()
    }
    await rename(partial, path)
  } catch (error) {
    await rm(partial, { force: true })
    throw error
  }
}
