import { checkSynchronous, mustBe } from './check.js'
import { named, refuse } from './errors.js'
import { addon, isExplaining } from './native.js'
import { scope } from './scope.js'

/** Calls that were made once and can be made again at the cost of one. */
export interface Graph<T> {
  /** What the function returned. Each replay computes its tensors anew, in the same memory. */
  readonly result: T
  /** Enqueues all calls again, on what their tensors hold by then, and returns `result` at once. */
  replay(): T
  /** Gives back the memory that only the graph needs; its tensors in `result` stay. */
  dispose(): void
  /** {@link Graph.dispose} at the end of a `using` block. */
  [Symbol.dispose](): void
}

// Graphs that are collected without dispose()
const abandoned = new FinalizationRegistry<number>((handle) => addon().releaseGraph(handle))

/**
 * Runs a function once and keeps the calls that it made to be replayed: on a GPU as one CUDA graph, whose launch costs a few
 * microseconds however many kernels it has. To compute on other values, put them into the tensors that the function used,
 * with `write` or `copyFrom`, before `replay`.
 *
 * The function must be synchronous and stay on one device. It may make tensors; those that it does not return are freed for
 * everybody else, but keep their memory for the graph. What it writes is written again, and random numbers are those of the
 * first run. It must not read, and not move tensors to another device.
 *
 * @throws HeddleError `ERR_ARGUMENT` if the function calls no operator, makes a graph itself or is async, `ERR_DEVICE` if it
 * uses two devices, `ERR_UNSUPPORTED` where it reads, and whatever it throws itself.
 * @example
 * import { attention, graph, randn, zeros } from 'heddle'
 * const q = zeros([1, 1, 8, 64])
 * const [k, v] = [randn([1, 256, 8, 64]), randn([1, 256, 8, 64])]
 * const step = graph(() => attention(q, k, v))
 * q.copyFrom(randn([1, 1, 8, 64]))
 * const { out } = step.replay()
 * console.log((await out.read()).length) // 512
 */
export function graph<T>(body: () => T): Graph<T> {
  if (typeof body !== 'function') throw mustBe('graph', 'body', 'a function', body)
  const native = addon()
  named('graph', () => native.beginGraph())
  let result: T
  try {
    result = scope(body)
    checkSynchronous('graph', result)
  } catch (error) {
    native.endGraph(false)
    throw error
  }
  const handle = named('graph', () => native.endGraph(true))
  let disposed = false
  const made: Graph<T> = {
    result,
    replay() {
      if (disposed) throw refuse('ERR_DISPOSED', 'graph', undefined, 'this graph was disposed')
      if (isExplaining())
        throw refuse(
          'ERR_UNSUPPORTED',
          'graph',
          undefined,
          'a graph that is replayed cannot be explained; explain the calls of its body',
        )
      named('graph', () => native.replayGraph(handle))
      return result
    },
    dispose() {
      disposed = true
      abandoned.unregister(made)
      native.releaseGraph(handle)
    },
    [Symbol.dispose]() {
      made.dispose()
    },
  }
  abandoned.register(made, handle, made)
  return made
}
