import { checkInteger, checkOptions, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { HeddleError } from '../errors.js'
import { run } from '../native.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { checkHeads, checkPlace, offsets, vector } from './arguments.js'

/** What {@link lightning} computes for one head; `slope` is its decay rate and S0 its initial state. */
export const lightningDefinition = `
  init S[t=0,e,f] = S0[e,f]
  iterate t {
    S[t+1,e,f] = exp(-slope) * S[t,e,f] + K[t,e] * V[t,f]
    O[t,f]     = sum(e) Q[t,e] * S[t+1,e,f] * scale
  }`

/** How a state lies in memory: [d, e] or [e, d]. */
export type StateLayout = 'dk-ev' | 'ev-dk'

/** Options of {@link lightning}. */
export interface LightningOptions {
  /**
   * Decay rate per token, one per state, f32, at least 0: states decay by `exp(-slope)`. {@link alibiSlopes} and its
   * neighbours compute those that released models use.
   */
  slopes: Tensor<'float32'> | readonly number[]
  /** Factor of the output, 1 if left out: released models have no `1/√d` here. */
  scale?: number | undefined
  /** [b, hs, d, e], or one per packed sequence; zeros if left out. What is not f32 is copied into f32. */
  initialState?: Tensor<FloatDType> | undefined
  /** Whether states are [d, e] (`'dk-ev'`, as if left out) or [e, d] (`'ev-dk'`). */
  stateLayout?: StateLayout | undefined
  /** Whether to return the state after the last token. */
  outputFinalState?: boolean | undefined
  /** Where each packed sequence begins, then the total; b must be 1. */
  cuSeqlens?: Tensor<'int32'> | readonly number[] | undefined
  /** Tokens that are computed together, a power of two from 16 to 256. Changes speed and rounding only. */
  chunkSize?: number | undefined
  /**
   * With `'high'` nothing between inputs and outputs has fewer digits than f32. By default f16 and bf16 inputs may meet
   * decays, pairs and states that were rounded to their dtype; final states keep their digits either way.
   */
  precision?: 'default' | 'high' | undefined
  /**
   * How a sequence is gone through, where a kernel knows both ways: in one pass (`'fused'`), or in segments side by side, whose
   * states a pass over k and v finds before (`'two-pass'`). If left out, whichever is faster by the number of heads, sequences
   * and tokens. With one given, a sequence gives the same bits in whatever batch it stands, of 16 tokens and more in all. Two
   * passes keep a state for every 1,024 tokens and head, and where nothing decays a segment reads those of all before it.
   */
  schedule?: 'auto' | 'fused' | 'two-pass' | undefined
}

/** What {@link lightning} returns. */
export interface LightningResult<D extends FloatDType = FloatDType> {
  /** [b, s, max(hq, hv), e], the dtype of q. */
  out: Tensor<D>
  /** [b, hs, d, e] f32, or [n, hs, d, e] for n packed sequences, [e, d] as `stateLayout` says; only with `outputFinalState`. */
  state: Tensor<'float32'> | undefined
}

const shared = [
  ...(['slopes', 'scale', 'initialState', 'stateLayout', 'cuSeqlens'] as const),
  ...(['chunkSize', 'precision'] as const),
]

const known: ReadonlySet<string> = new Set<keyof LightningOptions>([
  ...shared,
  ...(['outputFinalState', 'schedule'] as const),
])

// States as the operators have them, [d, e] in f32, and back again
function layoutOf(op: string, layout: unknown, made: Tensor[]) {
  if (layout !== undefined && layout !== 'dk-ev' && layout !== 'ev-dk')
    throw mustBe(op, 'stateLayout', '"dk-ev" or "ev-dk"', layout)
  const turned = layout === 'ev-dk'
  return {
    take(name: string, state: Tensor<FloatDType> | undefined): Tensor<'float32'> | undefined {
      if (state === undefined) return undefined
      checkTensor(op, name, state)
      const keep = (own: Tensor<FloatDType>) => {
        made.push(own)
        return own
      }
      const wide = ['bfloat16', 'float16'].includes(state.dtype)
        ? keep(state.cast('float32'))
        : state
      return (turned && wide.rank === 4 ? keep(wide.transpose(2, 3)) : wide) as Tensor<'float32'>
    },
    give(state: Tensor<'float32'> | undefined): Tensor<'float32'> | undefined {
      if (!turned || state === undefined) return state
      made.push(state)
      const view = state.transpose(2, 3)
      made.push(view)
      return view.contiguous()
    },
  }
}

// As the caller has the state that an operator refused
function turnedBack(error: unknown): unknown {
  if (!(error instanceof HeddleError) || !/state$/i.test(error.argument ?? '')) return error
  const { code, op, argument, message } = error
  const text = message.replace(/\[(\w+), (\w+), (\w+), (\w+)\]/g, '[$1, $2, $4, $3]')
  return new HeddleError(code, text, { op, argument })
}

/**
 * Lightning attention: causal linear attention with one constant decay per head, in time linear in the sequence. Its
 * definition is {@link lightningDefinition}. Running a sequence in pieces, each from the state of the last, gives the
 * result of one run.
 *
 * @param q [b, s, hq, d]; d from 1 to 256.
 * @param k [b, s, hk, d], same dtype.
 * @param v [b, s, hv, e], same dtype; e from 1 to 256. Either hq = hk with hv a multiple (value heads share), or hk = hv
 * with hq a multiple (query heads share; as many slopes as query heads give each a state, as many as hk share them).
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call; reading rejects if a slope of a
 * tensor is negative or not finite.
 * @example
 * import { alibiSlopes, lightning, randn } from 'heddle'
 * const [q, k, v] = [randn([1, 256, 8, 64]), randn([1, 256, 8, 64]), randn([1, 256, 8, 64])]
 * const { out, state } = lightning(q, k, v, { slopes: alibiSlopes(8), outputFinalState: true })
 * console.log(out.shape, state.shape) // [1, 256, 8, 64] [1, 8, 64, 64]
 */
export function lightning<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: LightningOptions & { outputFinalState: true },
): LightningResult<D> & { state: Tensor<'float32'> }
export function lightning<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: LightningOptions,
): LightningResult<D>
export function lightning<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  options: LightningOptions,
): LightningResult<D> {
  checkTensor('lightning', 'q', q)
  checkOptions('lightning', options, known)
  const { slopes, cuSeqlens, initialState, stateLayout, ...rest } = options ?? {}
  const made: Tensor[] = []
  try {
    const states = layoutOf('lightning', stateLayout, made)
    const [out, state] = run('lightning', {
      q,
      k,
      v,
      ...rest,
      initialState: states.take('initialState', initialState),
      slopes: vector('lightning', 'slopes', slopes, q.device, made, 0),
      cuSeqlens: offsets('lightning', 'cuSeqlens', cuSeqlens, q.shape[1], q.device, made),
    })
    return { out, state: states.give(state as Tensor<'float32'>) } as LightningResult<D>
  } catch (error) {
    throw stateLayout === 'ev-dk' ? turnedBack(error) : error
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

/** Options of {@link lightningBackward}: those of the forward call, and what its final state is worth. */
export interface LightningBackwardOptions
  extends Pick<
    LightningOptions,
    'slopes' | 'scale' | 'initialState' | 'stateLayout' | 'cuSeqlens' | 'chunkSize' | 'precision'
  > {
  /** Gradient of the final state, shaped as it; zeros if left out. */
  dstate?: Tensor<FloatDType> | undefined
  /** Whether to return the gradient of the slopes. */
  outputDslopes?: boolean | undefined
}

/** What {@link lightningBackward} returns. */
export interface LightningGradients<D extends FloatDType = FloatDType> {
  /** Shaped as q. */
  dq: Tensor<D>
  /** Shaped as k. */
  dk: Tensor<D>
  /** Shaped as v. */
  dv: Tensor<D>
  /** Shaped as the initial state, f32; only if there was one. */
  dinitialState: Tensor<'float32'> | undefined
  /** [hs] f32; only with `outputDslopes`. */
  dslopes: Tensor<'float32'> | undefined
}

const knownToBackward: ReadonlySet<string> = new Set<keyof LightningBackwardOptions>([
  ...shared,
  ...(['dstate', 'outputDslopes'] as const),
])

/**
 * The gradients of {@link lightning}, which nothing of the forward call but its arguments is needed for. Heads that share
 * a tensor add up in f32. Bitwise the same from run to run.
 *
 * @param q [b, s, hq, d]; k and v as for {@link lightning}, with the same options.
 * @param dout [b, s, max(hq, hv), e], the gradient of `out`, same dtype.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call; reading rejects if a slope of a
 * tensor is negative or not finite.
 * @example
 * import { alibiSlopes, lightningBackward, randn } from 'heddle'
 * const draw = () => randn([1, 256, 8, 64])
 * const [q, k, v, dout] = [draw(), draw(), draw(), draw()]
 * const { dq, dk, dv } = lightningBackward(q, k, v, dout, { slopes: alibiSlopes(8) })
 * console.log(dq.shape, dk.shape, dv.shape)
 */
export function lightningBackward<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  dout: Tensor<D>,
  options: LightningBackwardOptions,
): LightningGradients<D> {
  const op = 'lightning.backward'
  checkTensor(op, 'q', q)
  checkOptions(op, options, knownToBackward)
  const { slopes, cuSeqlens, initialState, dstate, stateLayout, ...rest } = options ?? {}
  const made: Tensor[] = []
  try {
    const states = layoutOf(op, stateLayout, made)
    const [dq, dk, dv, dinitialState, dslopes] = run(op, {
      q,
      k,
      v,
      dout,
      ...rest,
      initialState: states.take('initialState', initialState),
      dstate: states.take('dstate', dstate),
      slopes: vector(op, 'slopes', slopes, q.device, made, 0),
      cuSeqlens: offsets(op, 'cuSeqlens', cuSeqlens, q.shape[1], q.device, made),
      outputDinitialState: initialState !== undefined,
    })
    const given = states.give(dinitialState as Tensor<'float32'>)
    return { dq, dk, dv, dinitialState: given, dslopes } as LightningGradients<D>
  } catch (error) {
    throw stateLayout === 'ev-dk' ? turnedBack(error) : error
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

/** {@link lightningBackward} by another name. */
lightning.backward = lightningBackward

/** Options of {@link lightningDecode}. */
export interface LightningDecodeOptions {
  /** Decay rate per token, one per state, f32, at least 0. */
  slopes: Tensor<'float32'> | readonly number[]
  /** Factor of the output, 1 if left out. */
  scale?: number | undefined
  /** Whether a state is stored as [d, e] (`'dk-ev'`, the default) or as [e, d] (`'ev-dk'`). */
  stateLayout?: StateLayout | undefined
  /** Whether to return the state after each token, so that a rejected guess can be rolled back by a copy. */
  outputAllStates?: boolean | undefined
}

const knownToDecode: ReadonlySet<string> = new Set<keyof LightningDecodeOptions>([
  'slopes',
  'scale',
  'stateLayout',
  'outputAllStates',
])

/**
 * Lightning attention for one to sixteen new tokens per sequence, on a pool of states that is updated in place: the step of
 * continuous batching.
 *
 * @param q [b, s, hq, d]; k and v as for {@link lightning}.
 * @param states [pool, hs, d, e] f32, contiguous; updated in place.
 * @param slots [b] i32: which state each row of the batch continues, no two the same. A negative slot skips its row: the
 * output is 0 and no state changes.
 * @returns `out` [b, s, max(hq, hv), e], and with `outputAllStates` `allStates` [b, s, hs, d, e] f32.
 * @throws HeddleError `ERR_SHAPE`, `ERR_DTYPE`, `ERR_DEVICE` or `ERR_ARGUMENT` at the call; reading rejects if a slope of a
 * tensor is negative or not finite.
 * @example
 * import { alibiSlopes, lightningDecode, randn, tensor, zeros } from 'heddle'
 * const [q, k, v] = [randn([2, 1, 8, 64]), randn([2, 1, 8, 64]), randn([2, 1, 8, 64])]
 * const states = zeros([16, 8, 64, 64])
 * const slots = tensor([5, 0], [2], { dtype: 'int32' })
 * const options = { slopes: alibiSlopes(8), outputAllStates: true } as const
 * const { out, allStates } = lightningDecode(q, k, v, states, slots, options)
 * console.log(out.shape, allStates.shape) // [2, 1, 8, 64] [2, 1, 8, 64, 64]
 */
export function lightningDecode<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  states: Tensor<'float32'>,
  slots: Tensor<'int32'>,
  options: LightningDecodeOptions & { outputAllStates: true },
): { out: Tensor<D>; allStates: Tensor<'float32'> }
export function lightningDecode<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  states: Tensor<'float32'>,
  slots: Tensor<'int32'>,
  options: LightningDecodeOptions,
): { out: Tensor<D>; allStates: Tensor<'float32'> | undefined }
export function lightningDecode<D extends FloatDType>(
  q: Tensor<D>,
  k: Tensor<D>,
  v: Tensor<D>,
  states: Tensor<'float32'>,
  slots: Tensor<'int32'>,
  options: LightningDecodeOptions,
): { out: Tensor<D>; allStates: Tensor<'float32'> | undefined } {
  checkTensor('lightning.decode', 'q', q)
  checkOptions('lightning.decode', options, knownToDecode)
  const { slopes, ...rest } = options ?? {}
  const made: Tensor[] = []
  try {
    const [out, allStates] = run('lightning.decode', {
      q,
      k,
      v,
      states,
      slots,
      ...rest,
      slopes: vector('lightning.decode', 'slopes', slopes, q.device, made, 0),
    })
    return { out, allStates } as { out: Tensor<D>; allStates: Tensor<'float32'> | undefined }
  } finally {
    for (const tensor of made) tensor.dispose()
  }
}

function powersOfTwo(heads: number): number[] {
  return Array.from({ length: heads }, (_, h) => 2 ** ((-8 * (h + 1)) / heads))
}

/**
 * The slopes of released TransNormerLLM and MiniMax-01 weights: `2^(-8(h+1)/H)` for a power of two of heads; for other
 * counts the next smaller power's, then every other one of the next larger's. With `layers`, scaled by
 * `1 - layer/(layers - 1) + 1e-5`, where hybrids count all layers.
 *
 * @example
 * import { alibiSlopes } from 'heddle'
 * console.log(alibiSlopes(8)[0]) // 0.5
 */
export function alibiSlopes(heads: number, layer?: number, layers?: number): number[] {
  if (layers !== undefined) checkPlace('alibiSlopes', heads, layer ?? 0, layers)
  else {
    checkHeads('alibiSlopes', heads)
    if (layer !== undefined) checkInteger('alibiSlopes', 'layer', layer, 0)
  }
  const whole = 2 ** Math.floor(Math.log2(heads))
  const more = powersOfTwo(2 * whole).filter((_, i) => i % 2 === 0)
  const slopes = [...powersOfTwo(whole), ...more.slice(0, heads - whole)]
  if (layer === undefined || layers === undefined) return slopes
  const factor = 1 - layer / Math.max(layers - 1, 1) + 1e-5
  return slopes.map((slope) => slope * factor)
}

/**
 * The slopes of the Hugging Face port of MiniMax: `2^(-8(h+1)/H)` for every H, scaled by
 * `1 - layer/(layers - 1 + 1e-5) + 1e-5`. Other than {@link alibiSlopes} when H is no power of two.
 */
export function hfMiniMaxSlopes(heads: number, layer: number, layers: number): number[] {
  checkPlace('hfMiniMaxSlopes', heads, layer, layers)
  const factor = 1 - layer / (layers - 1 + 1e-5) + 1e-5
  return powersOfTwo(heads).map((slope) => slope * factor)
}

/**
 * The slopes as the TransNormerLLM paper prints them, `8h/H (1 - layer/layers)`, linear in the head: head 0 never decays.
 * Released weights use {@link alibiSlopes}.
 */
export function tnlPaperSlopes(heads: number, layer: number, layers: number): number[] {
  checkPlace('tnlPaperSlopes', heads, layer, layers)
  return Array.from({ length: heads }, (_, h) => ((8 * h) / heads) * (1 - layer / layers))
}
