/** Every code a {@link HeddleError} can carry. `CAS…` codes belong to cascades and carry a `span`. */
export type ErrorCode =
  | 'ERR_SHAPE'
  | 'ERR_DTYPE'
  | 'ERR_DEVICE'
  | 'ERR_ARGUMENT'
  | 'ERR_UNSUPPORTED'
  | 'ERR_DISPOSED'
  | 'ERR_MEMORY'
  | 'ERR_CUDA'
  | `CAS${number}`

/** What a {@link HeddleError} knows beside its message. */
export interface ErrorDetails {
  /** The operator or function that refused, as in the first word of the message. */
  op: string
  /** The argument at fault, spelled as the caller spelled it. */
  argument?: string | undefined
  /** For cascades: line, column (both from 1) and length of the offending text. */
  span?: readonly [line: number, column: number, length: number] | undefined
  cause?: unknown
}

/**
 * The only error class of the library. Messages read
 * `<op>: <argument> must be <rule>, got <value> (<why>); <remedy>`.
 *
 * Argument errors are thrown by the call; device errors reject the read that meets them.
 *
 * @example
 * import { attention, HeddleError, randn } from 'heddle'
 *
 * const [q, k] = [randn([1, 4, 2, 64]), randn([1, 9, 2, 32])]
 * try {
 *   attention(q, k, k)
 * } catch (error) {
 *   if (error instanceof HeddleError && error.code === 'ERR_SHAPE') console.log(error.message)
 * }
 */
export class HeddleError extends Error {
  override readonly name = 'HeddleError'
  readonly code: ErrorCode
  readonly op: string
  readonly argument: string | undefined
  readonly span: readonly [line: number, column: number, length: number] | undefined

  constructor(code: ErrorCode, message: string, details: ErrorDetails) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause })
    this.code = code
    this.op = details.op
    this.argument = details.argument
    this.span = details.span
  }
}

/** @internal An error under the name of the call that the user made, if it is one of these operators. */
export function renamed(op: string, error: unknown, natives: readonly string[]): unknown {
  if (!(error instanceof HeddleError) || error.code === 'ERR_DISPOSED') return error
  const { op: native } = error
  if (native === undefined || !natives.includes(native)) return error
  return refuse(error.code, op, error.argument, error.message.slice(native.length + 2))
}

/** @internal Errors of the addon come under the name of the call that the user made. */
export function named<T>(op: string, call: () => T, ...natives: readonly string[]): T {
  try {
    return call()
  } catch (error) {
    throw renamed(op, error, natives.length > 0 ? natives : ['tensor'])
  }
}

/** Builds the usual message, `<op>: <text>`, so that no caller repeats the operator's name. */
export function refuse(
  code: ErrorCode,
  op: string,
  argument: string | undefined,
  text: string,
): HeddleError {
  return new HeddleError(code, `${op}: ${text}`, { op, argument })
}
