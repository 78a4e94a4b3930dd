import { checkInteger, checkNumber, checkOptions, mustBe, numbers } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { add, mul, silu } from '../ops/elementwise.js'
import { glu } from '../ops/glu.js'
import { alibiSlopes, lightning } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { norm } from '../ops/norm.js'
import { scope } from '../scope.js'
import { type Tensor, tensor } from '../tensor.js'
import { checkLayer } from './layers.js'

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
  /** [b, h, d, d] f32, or [b, h, 2 d, d] with `lrpe`, the state behind the tokens before; zeros if left out. */
  state?: Tensor<'float32'> | undefined
  /**
   * Turns q and k by position p into `[x cos(theta p), x sin(theta p)]`, twice as wide, as the first layer of released models
   * does. `theta` has a number for every channel of every head, {@link lrpeTheta} if left out.
   */
  lrpe?: { theta?: readonly number[] | undefined } | undefined
  /** Position of the first token, for `lrpe`; 0 if left out. */
  offset?: number | undefined
}

const known: ReadonlySet<string> = new Set<keyof TransnormerOptions>([
  'heads',
  'layer',
  'layers',
  'eps',
  'state',
  'lrpe',
  'offset',
])

const knownToLrpe: ReadonlySet<string> = new Set(['theta'])
const names: readonly (keyof TransnormerWeights)[] = ['qkvu', 'out', 'gate', 'up', 'down']

/** The angles per token that LRPE starts to learn from, `10000^(-2i/width)` for all channels of all heads together. */
export function lrpeTheta(width: number): number[] {
  checkInteger('lrpeTheta', 'width', width, 1)
  return Array.from({ length: width }, (_, i) => 10000 ** ((-2 * i) / width))
}

/** `1 s h 2 d`: cosines, then sines. */
function angles(theta: readonly number[], heads: number, tokens: number, offset: number): number[] {
  const d = theta.length / heads
  return Array.from({ length: 2 * tokens * theta.length }, (_, at) => {
    const [token, inToken] = [Math.floor(at / (2 * theta.length)), at % (2 * theta.length)]
    const [head, channel] = [Math.floor(inToken / (2 * d)), inToken % d]
    const angle = theta[head * d + channel]! * (offset + token)
    return inToken % (2 * d) < d ? Math.cos(angle) : Math.sin(angle)
  })
}

/**
 * A block of TransNormerLLM: `x += GLA(norm(x))`, then `x += SGLU(norm(x))`, with norms that have no gain.
 *
 * - GLA: q and k pass SiLU and, with `lrpe`, a rotation; {@link lightning} with {@link alibiSlopes} gives o, and the result is
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
  checkLayer('transnormer', x, weights, options, { known, names, parts: 4 })
  const { heads, layer, layers, eps = 1e-6, state: before, lrpe, offset = 0 } = options
  checkInteger('transnormer', 'offset', offset, 0)
  checkOptions('transnormer', lrpe, knownToLrpe)
  const given =
    lrpe?.theta &&
    numbers('transnormer', 'theta', lrpe.theta, (angle, i) =>
      checkNumber('transnormer', `theta[${i}]`, angle, 'a finite number', Number.isFinite),
    )
  return scope(() => {
    const plain = (y: Tensor<D>) => norm(y, undefined, { eps })
    const qkvu = linear(plain(x), weights.qkvu)
    const width = qkvu.shape.at(-1)! / 4
    const part = (i: number) => qkvu.slice(-1, i * width, (i + 1) * width)
    const split = (y: Tensor<D>) => y.reshape([...x.shape.slice(0, 2), heads, width / heads])
    let [q, k] = [split(silu(part(0))), split(silu(part(1)))]
    if (lrpe) {
      const theta = given ?? lrpeTheta(width)
      if (theta.length !== width)
        throw mustBe('transnormer', 'theta', `${width} numbers, one per channel`, theta.length)
      const [b, s, h, d] = q.shape as [number, number, number, number]
      const table = tensor(angles(theta, heads, s, offset), [1, s, h, 2, d], {
        dtype: x.dtype,
        device: x.device,
      })
      const turn = (y: Tensor<D>) =>
        mul(y.reshape([b, s, h, 1, d]), table).reshape([b, s, h, 2 * d])
      ;[q, k] = [turn(q), turn(k)]
    }
    const { out: o, state } = lightning(q, k, split(part(2)), {
      slopes: alibiSlopes(heads, layer, layers),
      initialState: before,
      outputFinalState: true,
    })
    const mixed = glu(part(3), plain(o.reshape([...x.shape.slice(0, 2), width])), {
      activation: 'identity',
    })
    const first = add(x, linear(mixed, weights.out))
    const y = plain(first)
    const gated = glu(linear(y, weights.gate), linear(y, weights.up), { activation: 'identity' })
    return { out: add(first, linear(gated, weights.down)), state }
  })
}
