import type { FloatDType } from '../dtype.js'
import { silu } from '../ops/elementwise.js'
import { glu } from '../ops/glu.js'
import { alibiSlopes, lightning } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { norm } from '../ops/norm.js'
import { scope } from '../scope.js'
import type { Tensor } from '../tensor.js'
import { checkLayer } from './layers.js'

/** The weights of a {@link minimax} layer, each [outputs, inputs] as {@link linear} takes them. */
export interface MinimaxWeights<D extends FloatDType = FloatDType> {
  /** Per head its queries, keys and values, [h 3 d, model]. */
  qkv: Tensor<D>
  /** [h d, model]. */
  gate: Tensor<D>
  /** The gain of the norm, [h d]. */
  norm: Tensor<D>
  /** [model, h d]. */
  out: Tensor<D>
}

/** Options of {@link minimax}. */
export interface MinimaxOptions {
  /** How many heads there are. */
  heads: number
  /** Which layer this is, from 0 on. Layers with softmax count too. */
  layer: number
  /** How many layers the model has, those with softmax included. */
  layers: number
  /** Added to the mean square of the norm, 1e-5 if left out. */
  eps?: number | undefined
  /** [b, h, d, d] f32, the state behind the tokens before; zeros if left out. */
  state?: Tensor<'float32'> | undefined
}

const known: ReadonlySet<string> = new Set<keyof MinimaxOptions>([
  'heads',
  'layer',
  'layers',
  'eps',
  'state',
])

const names: readonly (keyof MinimaxWeights)[] = ['qkv', 'gate', 'norm', 'out']

/**
 * The lightning layer of MiniMax-01: `(sigmoid(x gate) * norm(o)) out`, where q, k and v all pass SiLU, {@link lightning}
 * with {@link alibiSlopes} gives o, and the norm is over all heads together. There is no positional encoding.
 *
 * @param x [b, s, model], normalised already.
 * @returns `out`, shaped as x, and the `state` to continue from.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { full, minimax, randn } from 'heddle'
 * const draw = (...shape: number[]) => randn(shape, { seed: shape[0] })
 * const weights = {
 *   qkv: draw(96, 32), gate: draw(32, 32), norm: full([32], 1), out: draw(32, 32),
 * }
 * const { out, state } = minimax(draw(1, 20, 32), weights, { heads: 4, layer: 0, layers: 8 })
 * console.log(out.shape, state.shape) // [1, 20, 32] [1, 4, 8, 8]
 */
export function minimax<D extends FloatDType>(
  x: Tensor<D>,
  weights: MinimaxWeights<D>,
  options: MinimaxOptions,
): { out: Tensor<D>; state: Tensor<'float32'> } {
  checkLayer('minimax', x, weights, options, { known, names, parts: 3 })
  const { heads, layer, layers, eps = 1e-5, state: before } = options
  return scope(() => {
    const tokens = x.shape.slice(0, 2)
    const qkv = silu(linear(x, weights.qkv))
    const width = qkv.shape.at(-1)! / 3
    const size = width / heads
    const perHead = qkv.reshape([...tokens, heads, 3 * size])
    const part = (i: number) => perHead.slice(-1, i * size, (i + 1) * size)
    const { out: o, state } = lightning(part(0), part(1), part(2), {
      slopes: alibiSlopes(heads, layer, layers),
      initialState: before,
      outputFinalState: true,
    })
    const even = norm(o.reshape([...tokens, width]), weights.norm, { eps })
    const gated = glu(linear(x, weights.gate), even, { activation: 'sigmoid' })
    return { out: linear(gated, weights.out), state }
  })
}
