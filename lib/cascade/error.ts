import { HeddleError } from '../errors.js'
import type { Span } from './ir.js'

/** @internal An error of a cascade's text: a stable code, and where in the text it is. */
export function broken(
  code: `CAS${number}`,
  text: string,
  span: Span,
  argument?: string,
): HeddleError {
  return new HeddleError(code, `cascade: ${text}`, { op: 'cascade', argument, span })
}
