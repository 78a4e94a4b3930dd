import { checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import type { Tensor } from '../tensor.js'

/** Options of {@link linear}. */
export interface LinearOptions<D extends FloatDType, O extends FloatDType = D> {
  /** [o], the dtype of x. */
  bias?: Tensor<D> | undefined
  /** The dtype of the result, that of x if left out. */
  dtype?: O | undefined
}

const known: ReadonlySet<string> = new Set(['bias', 'dtype'])

/**
 * Matrix product with the weights of a layer: `x weightᵀ + bias`, accumulated in float32.
 *
 * @param x [..., i], float32, float16 or bfloat16.
 * @param weight [o, i] as checkpoints store it, same dtype.
 * @returns [..., o].
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_DEVICE` at the call.
 * @example
 * import { linear, randn } from 'heddle'
 * console.log(linear(randn([2, 5, 16]), randn([32, 16])).shape) // [2, 5, 32]
 */
export function linear<D extends FloatDType, O extends FloatDType = D>(
  x: Tensor<D>,
  weight: Tensor<D>,
  options: LinearOptions<D, O> = {},
): Tensor<O> {
  checkOptions('linear', options, known)
  return run('linear', { x, weight, ...options })[0] as Tensor<O>
}
