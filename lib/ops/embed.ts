import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import type { Tensor } from '../tensor.js'

/**
 * Looks up rows of a table: `out[..., :] = table[ids[...], :]`.
 *
 * @param ids Any shape; int32, int64 or uint8.
 * @param table [vocabulary, d], float32, float16 or bfloat16.
 * @returns [..., d].
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_DEVICE` at the call; reading rejects if an id is outside the table.
 * @example
 * import { embed, randn, tensor } from 'heddle'
 * console.log(embed(tensor([3, 1], [2], { dtype: 'int32' }), randn([8, 16])).shape) // [2, 16]
 */
export function embed<D extends FloatDType>(
  ids: Tensor<'int32' | 'int64' | 'uint8'>,
  table: Tensor<D>,
): Tensor<D> {
  return run('embed', { ids, table })[0] as Tensor<D>
}
