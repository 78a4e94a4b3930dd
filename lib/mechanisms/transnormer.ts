import { checkInteger, checkOptions } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { add, silu } from '../ops/elementwise.js'
import { glu } from '../ops/glu.js'
import { alibiSlopes, lightning } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { norm } from '../ops/norm.js'
import { scope } from '../scope.js'
import { checkTensor, type Tensor } from '../tensor.js'

/** The weights of a {@link transnormer} block, each [outputs, inputs] as {@link linear} takes them. */
export interface TransnormerWeights<D extends FloatDType = FloatDType> {
  /** Queries, keys, values and gates below each other, [4 h d, model]. */
  qkvu: Tensor<D>
  /** [model, h d]. */
  out: Tensor<D>
  /** The two factors of the second half, [hidden, model] each. */
  gate: Tensor<D>
  /** [hidden, model]. */
  up: Tensor<D>
  /** [model, hidden]. */
  down: Tensor<D>
}

/** Options of {@link transnormer}. */
export interface TransnormerOptions {
  /** How many heads there are. */
  heads: number
  /** Which layer this is, from 0 on: later ones decay less. */
  layer: number
  /** How many layers the model has. */
  layers: number
  /** Added to the mean square of a norm, 1e-6 if left out; float16 needs 1.6e-5 or more. */
  eps?: number | undefined
  /** [b, h, d, d] f32, the state behind the tokens before; zeros if left out. */
  state?: Tensor<'float32'> | undefined
}

const known: ReadonlySet<string> = new Set<keyof TransnormerOptions>([
  'heads',
  'layer',
  'layers',
  'eps',
  'state',
])

/**
 * A block of TransNormerLLM: `x += GLA(norm(x))`, then `x += SGLU(norm(x))`, with norms that have no gain.
 *
 * - GLA: q and k pass SiLU, {@link lightning} with {@link alibiSlopes} gives o, and the result is
 *   `(u * norm(o)) out`, the norm over all heads together.
 * - SGLU: `((x gate) * (x up)) down`, without an activation.
 *
 * @param x [b, s, model].
 * @returns `out`, shaped as x, and the `state` to continue from.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { randn, transnormer } from 'heddle'
 * const draw = (...shape: number[]) => randn(shape, { seed: shape[0] })
 * const weights = {
 *   qkvu: draw(128, 32), out: draw(32, 32), gate: draw(64, 32), up: draw(64, 32), down: draw(32, 64),
 * }
 * const { out, state } = transnormer(draw(1, 20, 32), weights, { heads: 4, layer: 0, layers: 2 })
 * console.log(out.shape, state.shape) // [1, 20, 32] [1, 4, 8, 8]
 */
export function transnormer<D extends FloatDType>(
  x: Tensor<D>,
  weights: TransnormerWeights<D>,
  options: TransnormerOptions,
): { out: Tensor<D>; state: Tensor<'float32'> } {
  checkTensor('transnormer', 'x', x)
  checkOptions('transnormer', options, known)
  const { heads, layer, layers, eps = 1e-6, state: before } = options
  checkInteger('transnormer', 'heads', heads, 1)
  return scope(() => {
    const plain = (y: Tensor<D>) => norm(y, undefined, { eps })
    const qkvu = linear(plain(x), weights.qkvu)
    const width = qkvu.shape.at(-1)! / 4
    const part = (i: number) => qkvu.slice(-1, i * width, (i + 1) * width)
    const split = (y: Tensor<D>) => y.reshape([...x.shape.slice(0, 2), heads, width / heads])
    const { out: o, state } = lightning(
      split(silu(part(0))),
      split(silu(part(1))),
      split(part(2)),
      {
        slopes: alibiSlopes(heads, layer, layers),
        initialState: before,
        outputFinalState: true,
      },
    )
    const mixed = glu(part(3), plain(o.reshape([...x.shape.slice(0, 2), width])), {
      activation: 'identity',
    })
    const first = add(x, linear(mixed, weights.out))
    const y = plain(first)
    const gated = glu(linear(y, weights.gate), linear(y, weights.up), { activation: 'identity' })
    return { out: add(first, linear(gated, weights.down)), state }
  })
}
