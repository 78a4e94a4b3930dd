import { checkInteger, checkSynchronous, mustBe } from './check.js'
import { named } from './errors.js'
import { addon } from './native.js'

/** Where a tensor lives: `'cpu'`, or a GPU by number; `'cuda'` is short for `'cuda:0'`. */
export type Device = 'cpu' | `cuda:${number}`

/** A device as callers may write it. */
export type DeviceLike = Device | 'cuda'

/** Why no GPU can be used. */
export interface CudaReason {
  /** A stable word such as `ERR_NO_DRIVER`. */
  code: string
  text: string
  remedy: string
}

/** One GPU. */
export interface CudaDevice {
  device: Device
  name: string
  /** Compute capability, 90 for 9.0. */
  arch: number
  multiprocessors: number
  /** Bytes. */
  memory: number
}

/** What is known of CUDA on this machine. */
export interface CudaInfo {
  readonly available: boolean
  /** Present when `available` is false. */
  readonly reason: CudaReason | undefined
  readonly devices: readonly CudaDevice[]
  /** Versions as CUDA numbers them, 13000 for 13.0; 0 when unknown. */
  readonly driver: number
  readonly runtime: number
}

let known: CudaInfo | undefined

function probe(): CudaInfo {
  if (known) return known
  const status = addon().cuda()
  const { code, text, remedy } = status
  known = Object.freeze({
    available: text === '',
    reason: text === '' ? undefined : Object.freeze({ code, text, remedy }),
    devices: status.devices.map(({ processors, ...rest }, index) => ({
      device: `cuda:${index}` as const,
      multiprocessors: processors,
      ...rest,
    })),
    driver: status.driver,
    runtime: status.runtime,
  })
  return known
}

/**
 * CUDA on this machine. Asking never fails and starts nothing on a GPU.
 *
 * @example
 * import { cuda } from 'heddle'
 * console.log(cuda.available ? cuda.devices : cuda.reason?.text)
 */
export const cuda: CudaInfo = {
  get available() {
    return probe().available
  },
  get reason() {
    return probe().reason
  },
  get devices() {
    return probe().devices
  },
  get driver() {
    return probe().driver
  },
  get runtime() {
    return probe().runtime
  },
}

/** @internal A device as the addon takes it. */
export function parseDevice(
  op: string,
  device: unknown,
): { kind: number; index: number; device: Device } {
  if (device === undefined || device === 'cpu') return { kind: 0, index: 0, device: 'cpu' }
  const match = typeof device === 'string' ? /^cuda(?::(\d{1,3}))?$/.exec(device) : null
  if (!match) throw mustBe(op, 'device', '"cpu", "cuda" or "cuda:N"', device)
  const index = checkInteger(op, 'device', Number(match[1] ?? 0), 0)
  return { kind: 1, index, device: `cuda:${index}` }
}

/** What tensors of this thread hold on one device. */
export interface MemoryInfo {
  /** Allocations that are alive, pinned ones among them, views not counted. */
  tensors: number
  bytes: number
  peakBytes: number
  /** Of `pinned` tensors, which take nothing of the device's own memory and do not count in `bytes`. */
  pinnedBytes: number
}

/**
 * Counts the memory that tensors of this thread hold on a device.
 *
 * @example
 * import { memory, zeros } from 'heddle'
 * const before = memory().bytes
 * const x = zeros([1024])
 * console.log(memory().bytes - before) // 4096
 * x.dispose()
 */
export function memory(device: DeviceLike = 'cpu'): MemoryInfo {
  const { kind, index } = parseDevice('memory', device)
  const [tensors, bytes, peakBytes, pinnedBytes] = named('memory', () =>
    addon().memory(kind, index),
  )
  return { tensors, bytes, peakBytes, pinnedBytes }
}

/**
 * Resolves when everything enqueued on a device so far is done. Reading a tensor waits by itself; this is for timing.
 *
 * @throws The promise rejects with `ERR_CUDA` if the device failed.
 * @example
 * import { synchronize } from 'heddle'
 * await synchronize('cpu')
 */
export function synchronize(device: DeviceLike = 'cpu'): Promise<void> {
  const { kind, index } = parseDevice('synchronize', device)
  return named('synchronize', () => addon().finish(kind, index))
}

/**
 * Measures how long a device takes for what a function enqueues: the time between two points of its queue, on a GPU by two
 * events. The queue may still be busy with earlier work, which does not count.
 *
 * @returns A promise of milliseconds, which resolves when that work is done.
 * @throws HeddleError `ERR_ARGUMENT` if `body` is not a synchronous function, `ERR_UNSUPPORTED` inside of `graph`, and
 * whatever it throws itself. The promise rejects with `ERR_CUDA` if the device failed.
 * @example
 * import { attention, elapsed, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 256, 8, 64]), randn([1, 256, 8, 64]), randn([1, 256, 8, 64])]
 * console.log(`${await elapsed(() => attention(q, k, v))} ms`)
 */
export function elapsed(body: () => unknown, device: DeviceLike = 'cpu'): Promise<number> {
  if (typeof body !== 'function') throw mustBe('elapsed', 'body', 'a function', body)
  const { kind, index } = parseDevice('elapsed', device)
  const native = addon()
  const span = named('elapsed', () => native.beginSpan(kind, index))
  try {
    checkSynchronous('elapsed', body())
  } catch (error) {
    native.endSpan(span).catch(() => {})
    throw error
  }
  return named('elapsed', () => native.endSpan(span))
}
