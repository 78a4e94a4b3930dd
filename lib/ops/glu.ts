import { checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import type { Tensor } from '../tensor.js'

/** Options of {@link glu}. */
export interface GluOptions {
  /** What the gate goes through, `'silu'` if left out. */
  activation?: 'silu' | 'sigmoid' | 'identity' | undefined
}

const known: ReadonlySet<string> = new Set<keyof GluOptions>(['activation'])

/**
 * Gated linear unit: `activation(gate) * up`, computed in float32.
 *
 * @param gate Any shape, float32, float16 or bfloat16.
 * @param up Same shape and dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { glu, randn } from 'heddle'
 * const y = glu(randn([4, 32]), randn([4, 32]))
 */
export function glu<D extends FloatDType>(
  gate: Tensor<D>,
  up: Tensor<D>,
  options: GluOptions = {},
): Tensor<D> {
  checkOptions('glu', options, known)
  return run('glu', { gate, up, ...options })[0] as Tensor<D>
}
