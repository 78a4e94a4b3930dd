import type { DType } from '../dtype.js'
import { refuse } from '../errors.js'
import { run } from '../native.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor } from '../tensor.js'

/**
 * Writes rows to where indices say, in place: `to[indices[...]] = from[...]`. That is how new keys and values come into the
 * pages of a cache: token t of a sequence has the index `blockTable[t / pageSize] * pageSize + t % pageSize`. In a
 * {@link graph} the indices are read anew in each replay.
 *
 * @param to Rows in one or several leading dimensions, such as [pages, pageSize, hk, d], any dtype; updated in place.
 * @param indices Any shape; int32 or int64. Which row of `to` each row of `from` becomes, counted over all leading
 * dimensions, no two the same. A negative index leaves its row out.
 * @param from [...indices, ...row], of the dtype of `to`.
 * @returns `to`.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call, the last where elements of `to`
 * share memory; reading `to` rejects if an index is behind its last row.
 * @example
 * import { randn, scatter, tensor, zeros } from 'heddle'
 * const pages = zeros([8, 16, 2, 64]) // [pages, pageSize, hk, d]
 * const k = randn([3, 1, 2, 64]) // a token of each of three sequences
 * const slots = tensor([5 * 16 + 2, 0 * 16 + 9, -1], [3, 1], { dtype: 'int32' }) // the last one is padding
 * scatter(pages, slots, k)
 */
export function scatter<D extends DType>(
  to: Tensor<D>,
  indices: Tensor<'int32' | 'int64'>,
  from: Tensor<D>,
): Tensor<D> {
  const op = 'scatter'
  for (const [name, x] of Object.entries({ to, indices, from })) checkTensor(op, name, x)
  const row = from.shape.slice(indices.rank)
  const leading = to.rank - row.length
  const shape = (sizes: readonly number[]) => `[${sizes.join(', ')}]`
  const same = (a: readonly number[], b: readonly number[]) => `${a}` === `${b}`
  if (!same(from.shape.slice(0, indices.rank), indices.shape))
    throw refuse(
      'ERR_SHAPE',
      op,
      'from',
      `from must begin as indices do, ${shape(indices.shape)}, got ${shape(from.shape)}`,
    )
  if (leading < 1 || !same(to.shape.slice(leading), row))
    throw refuse(
      'ERR_SHAPE',
      op,
      'to',
      `to must be rows of ${shape(row)} as from has them, got ${shape(to.shape)}`,
    )
  to.checkApart(op, 'to')
  const product = (sizes: readonly number[]) => sizes.reduce((a, b) => a * b, 1)
  const [first = 0, ...others] = to.shape.slice(0, leading)
  const width = product(row)
  const flat = (x: Tensor, sizes: readonly number[]) =>
    (x.isContiguous ? x : x.contiguous()).reshape(sizes)
  const inPlace = () => {
    try {
      return to.reshape([first, product(others), width])
    } catch {
      const text = `to must have rows, and all their places but the first, in one piece, got strides ${shape(to.strides)}; write to a contiguous tensor`
      throw refuse('ERR_SHAPE', op, 'to', text)
    }
  }
  scope(() => {
    run(op, {
      to: inPlace(),
      indices: flat(indices, [indices.size]),
      from: flat(from.meets(to) ? from.clone() : from, [indices.size, width]),
    })
  })
  return to
}
