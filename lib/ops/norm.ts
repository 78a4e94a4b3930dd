import { checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import type { Tensor } from '../tensor.js'

/** Options of {@link norm}. */
export interface NormOptions {
  /** Added to the mean square, 1e-5 if left out. */
  eps?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof NormOptions>(['eps'])

/**
 * RMS norm over the last dimension: `x / √(mean(x²) + eps) * weight`, computed in float32.
 *
 * @param x [..., d], float32, float16 or bfloat16.
 * @param weight [d], same dtype; ones if undefined.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { full, norm, randn } from 'heddle'
 * console.log(norm(randn([2, 5, 16]), full([16], 1)).shape) // [2, 5, 16]
 */
export function norm<D extends FloatDType>(
  x: Tensor<D>,
  weight?: Tensor<D>,
  options: NormOptions = {},
): Tensor<D> {
  checkOptions('norm', options, known)
  return run('norm', { x, weight, ...options })[0] as Tensor<D>
}
