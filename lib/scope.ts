import { AsyncLocalStorage } from 'node:async_hooks'
import { mustBe } from './check.js'
import type { Tensor } from './tensor.js'

type Tracked = Set<Tensor>

const scopes = new AsyncLocalStorage<Tracked>()

/** @internal */
export function track(tensor: Tensor): void {
  scopes.getStore()?.add(tensor)
}

/** @internal The tensor, which outlives the scope that it was made in. */
export function untrack<T extends Tensor>(tensor: T): T {
  scopes.getStore()?.delete(tensor)
  return tensor
}

/** @internal What has this holds tensors in its properties, as a plain object does. */
export const holdsTensors = Symbol('holdsTensors')

// Takes the tensors that a result holds out of the inner scope, so that they outlive it
function keep(value: unknown, inner: Tracked, outer: Tracked | undefined, seen: Set<object>): void {
  if (value === null || typeof value !== 'object' || seen.has(value)) return
  seen.add(value)
  if (inner.delete(value as Tensor)) {
    outer?.add(value as Tensor)
    return
  }
  const parts =
    value instanceof Set
      ? value
      : value instanceof Map
        ? value.values()
        : Array.isArray(value) ||
            Object.getPrototypeOf(value) === Object.prototype ||
            Object.getPrototypeOf(value) === null ||
            holdsTensors in value
          ? Object.values(value)
          : []
  for (const part of parts) keep(part, inner, outer, seen)
}

/**
 * Runs a function and disposes of every tensor that it made, except those in its result (directly, or in arrays, plain
 * objects, masks, maps and sets). The function may be async: what belongs to the scope follows the chain of calls and awaits, so
 * scopes that run at the same time do not mix. Scopes nest.
 *
 * @example
 * import { add, mul, randn, scope } from 'heddle'
 * const y = scope(() => {
 *   const x = randn([8])
 *   return add(mul(x, x), x) // the product and x are freed, the sum is kept
 * })
 * @returns What the function returns; a promise of it if that is what the function returns.
 */
export function scope<T>(body: () => T): T {
  if (typeof body !== 'function') throw mustBe('scope', 'body', 'a function', body)
  const outer = scopes.getStore()
  const inner: Tracked = new Set()
  const close = (result: unknown) => {
    keep(result, inner, outer, new Set())
    for (const tensor of [...inner]) tensor.dispose()
  }
  let result: T
  try {
    result = scopes.run(inner, body)
  } catch (error) {
    close(undefined)
    throw error
  }
  if (result instanceof Promise) {
    return result.then(
      (value: unknown) => {
        close(value)
        return value
      },
      (error: unknown) => {
        close(undefined)
        throw error
      },
    ) as T
  }
  close(result)
  return result
}
