import { checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { run } from '../native.js'
import type { Tensor } from '../tensor.js'

/** Options of {@link rope}. */
export interface RopeOptions {
  /** Base of the wavelengths, 10000 if left out. */
  theta?: number | undefined
  /** Position of the first row, 0 if left out; row i stands at `offset + i`. */
  offset?: number | undefined
  /** [b, s] i32: the position of each row, instead of `offset`. */
  positions?: Tensor<'int32'> | undefined
  /** Which channels form a pair: i with i + rotary/2 (`'half-split'`, the default), or 2i with 2i + 1. */
  layout?: 'half-split' | 'interleaved' | undefined
  /** Cosines of every position, `[rows, rotary / 2]`, instead of those of `theta`; with `sin`. */
  cos?: Tensor<'float32'> | undefined
  /** As `cos`. */
  sin?: Tensor<'float32'> | undefined
  /** How many leading channels turn, an even number; as many as tables have, or all of them, if left out. */
  rotary?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof RopeOptions>([
  'theta',
  'offset',
  'positions',
  'layout',
  'rotary',
  'cos',
  'sin',
])

/**
 * Rotary position embedding: turns each pair of channels (a, b) by the angle `position * theta^(-2i/rotary)` into
 * `(a cos - b sin, b cos + a sin)`.
 *
 * @param x [b, s, h, d], float32, float16 or bfloat16.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { randn, rope } from 'heddle'
 * const q = rope(randn([1, 10, 4, 64]), { theta: 500000, offset: 100 })
 */
export function rope<D extends FloatDType>(x: Tensor<D>, options: RopeOptions = {}): Tensor<D> {
  checkOptions('rope', options, known)
  if (options.theta !== undefined && options.cos !== undefined)
    throw refuse('ERR_ARGUMENT', 'rope', 'theta', 'theta cannot be combined with cos')
  if (options.offset !== undefined && options.positions !== undefined)
    throw refuse('ERR_ARGUMENT', 'rope', 'offset', 'offset cannot be combined with positions')
  return run('rope', { x, ...options })[0] as Tensor<D>
}
