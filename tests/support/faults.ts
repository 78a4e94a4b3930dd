import { HeddleError } from 'heddle'
import { addon } from '../../dist/native.js'

type Function = (...given: unknown[]) => unknown

/** What a function returns or throws while some functions of the addon are others, which `change` makes of them. */
export function changed<T>(
  names: readonly string[],
  change: (original: Function) => Function,
  body: () => T,
): T {
  const native = addon() as unknown as Record<string, Function>
  const whole = names.map((name) => [name, native[name]!] as const)
  try {
    for (const [name, original] of whole) native[name] = change(original)
    return body()
  } finally {
    for (const [name, original] of whole) native[name] = original
  }
}

/** What {@link failing} throws. */
export const injected = new HeddleError('ERR_MEMORY', 'test: this call was to fail', { op: 'test' })

/** What a function returns or throws if a call of the addon that makes or writes something fails, counted from 0. */
export function failing<T>(at: number, body: () => T): T {
  let calls = 0
  const fail =
    (original: Function): Function =>
    (...given) => {
      if (calls++ === at) throw injected
      return original(...given)
    }
  return changed(['run', 'empty', 'from', 'view', 'transfer', 'write'], fail, body)
}

/** What a function returns that asks which kernel takes a call, and is told this one. */
export const explained = <T>(variant: string, body: () => T): T =>
  changed(['explain'], () => () => ({ variant, declined: [] }), body)
