import type { FloatDType } from '../dtype.js'
import { named, refuse } from '../errors.js'
import { run } from '../native.js'
import { checkTensor, type Tensor } from '../tensor.js'

function apply<D extends FloatDType>(op: string, x: Tensor<D>, y?: Tensor<D>): Tensor<D> {
  return named(op, () => run('elementwise', { function: op, x, y })[0], 'elementwise') as Tensor<D>
}

// Both as views of their common shape, by the usual rules of broadcasting
function binary<D extends FloatDType>(op: 'add' | 'mul', x: Tensor<D>, y: Tensor<D>): Tensor<D> {
  checkTensor(op, 'x', x)
  checkTensor(op, 'y', y)
  const rank = Math.max(x.rank, y.rank)
  const sizes = (tensor: Tensor) => [
    ...new Array<number>(rank - tensor.rank).fill(1),
    ...tensor.shape,
  ]
  const b = sizes(y)
  const shape = sizes(x).map((size, i) => {
    const other = b[i]!
    if (size !== other && size !== 1 && other !== 1) {
      throw refuse(
        'ERR_SHAPE',
        op,
        'y',
        `y must broadcast with x, got [${y.shape.join(', ')}] (x is [${x.shape.join(', ')}])`,
      )
    }
    return size === 1 ? other : size
  })
  const fits = (tensor: Tensor) =>
    tensor.rank === rank && shape.every((size, i) => size === tensor.shape[i])
  const left = fits(x) ? x : x.expand(shape)
  const right = fits(y) ? y : y.expand(shape)
  try {
    return apply(op, left, right)
  } finally {
    if (left !== x) left.dispose()
    if (right !== y) right.dispose()
  }
}

/**
 * Sum, element by element; sizes of 1 and missing leading dimensions repeat.
 *
 * @param x float32, float16 or bfloat16.
 * @param y Same dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_DEVICE` at the call.
 * @example
 * import { add, randn } from 'heddle'
 * console.log(add(randn([4, 8]), randn([8])).shape) // [4, 8]
 */
export function add<D extends FloatDType>(x: Tensor<D>, y: Tensor<D>): Tensor<D> {
  return binary('add', x, y)
}

/**
 * Product, element by element; sizes of 1 and missing leading dimensions repeat.
 *
 * @param x float32, float16 or bfloat16.
 * @param y Same dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE` or `ERR_DEVICE` at the call.
 * @example
 * import { mul, randn } from 'heddle'
 * console.log(mul(randn([4, 8]), randn([4, 1])).shape) // [4, 8]
 */
export function mul<D extends FloatDType>(x: Tensor<D>, y: Tensor<D>): Tensor<D> {
  return binary('mul', x, y)
}

/**
 * `x / (1 + exp(-x))`, element by element.
 *
 * @param x float32, float16 or bfloat16.
 * @throws HeddleError `ERR_DTYPE` at the call.
 * @example
 * import { randn, silu } from 'heddle'
 * const y = silu(randn([4, 8]))
 */
export function silu<D extends FloatDType>(x: Tensor<D>): Tensor<D> {
  checkTensor('silu', 'x', x)
  return apply('silu', x)
}

/**
 * `1 / (1 + exp(-x))`, element by element.
 *
 * @param x float32, float16 or bfloat16.
 * @throws HeddleError `ERR_DTYPE` at the call.
 * @example
 * import { randn, sigmoid } from 'heddle'
 * const y = sigmoid(randn([4, 8]))
 */
export function sigmoid<D extends FloatDType>(x: Tensor<D>): Tensor<D> {
  checkTensor('sigmoid', 'x', x)
  return apply('sigmoid', x)
}
