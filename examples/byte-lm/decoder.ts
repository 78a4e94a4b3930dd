import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import {
  add,
  alibiSlopes,
  attention,
  type DeviceLike,
  embed,
  empty,
  type FloatDType,
  glu,
  lightning,
  lightningDecode,
  linear,
  norm,
  openSafetensors,
  type RopeOptions,
  rope,
  scope,
  silu,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'

// byte-lm: a decoder over bytes whose layers alternate between lightning attention and softmax attention.

/** Sizes and layer kinds, as config.json has them. */
export interface Config {
  attention: ('lightning' | 'softmax')[]
  vocab_size: number
  hidden_size: number
  num_hidden_layers: number
  num_attention_heads: number
  num_key_value_heads: number
  head_dim: number
  rope_theta: number
  rope_layout: 'half-split' | 'interleaved'
  rms_norm_eps: number
  lightning_scale: number
}

/** A loaded checkpoint. */
export interface Model {
  config: Config
  device: DeviceLike
  dtype: FloatDType
  weights: ReadonlyMap<string, Tensor<FloatDType>>
  slopes: readonly Tensor<'float32'>[]
}

/** What a sequence leaves behind for its next token: keys and values, or a state, for each layer. */
export interface Cache {
  length: number
  readonly capacity: number
  readonly layers: readonly {
    k?: Tensor<FloatDType>
    v?: Tensor<FloatDType>
    state?: Tensor<'float32'>
  }[]
  readonly slot: Tensor<'int32'>
}

/** What the softmax layers compute from q, k and v: [1, n, heads, d], over keys that may have a prefix. */
export type Attend = (
  q: Tensor<FloatDType>,
  k: Tensor<FloatDType>,
  v: Tensor<FloatDType>,
) => Tensor<FloatDType>

const dense: Attend = (q, k, v) => attention(q, k, v, { causal: true }).out

/** Loads the checkpoint in a directory onto a device. */
export async function load(
  directory: string,
  options: { device?: DeviceLike; dtype?: FloatDType } = {},
): Promise<Model> {
  const { device = 'cpu', dtype = 'float32' } = options
  const config = JSON.parse(await readFile(join(directory, 'config.json'), 'utf8')) as Config
  const file = await openSafetensors(join(directory, 'model.safetensors'))
  const weights = new Map<string, Tensor<FloatDType>>()
  try {
    for (const name of file.entries.keys())
      weights.set(name, await file.load(name, { device, dtype }))
  } finally {
    await file.close()
  }
  const layers = config.num_hidden_layers
  const slopes = config.attention.map((_, layer) =>
    tensor(alibiSlopes(config.num_attention_heads, layer, layers), undefined, { device }),
  )
  return { config, device, dtype, weights, slopes }
}

/** Makes room for a sequence of up to `capacity` tokens. */
export function newCache({ config, device, dtype }: Model, capacity: number): Cache {
  const { num_attention_heads: heads, num_key_value_heads: pairs, head_dim: d } = config
  const layers = config.attention.map((kind) =>
    kind === 'softmax'
      ? {
          k: empty([1, capacity, pairs, d], { device, dtype }),
          v: empty([1, capacity, pairs, d], { device, dtype }),
        }
      : { state: zeros([1, heads, d, d], { device }) },
  )
  return { length: 0, capacity, layers, slot: tensor([0], [1], { device, dtype: 'int32' }) }
}

/** Frees a cache. */
export function disposeCache(cache: Cache): void {
  for (const { k, v, state } of cache.layers) for (const part of [k, v, state]) part?.dispose()
  cache.slot.dispose()
}

/** What mixes tokens: where they stand, and what the layers of either kind make of q, k and v, [1, n, heads, d]. */
export interface Mixer {
  turn: RopeOptions
  softmax(
    q: Tensor<FloatDType>,
    k: Tensor<FloatDType>,
    v: Tensor<FloatDType>,
    layer: number,
  ): Tensor<FloatDType>
  recurrent(
    q: Tensor<FloatDType>,
    k: Tensor<FloatDType>,
    v: Tensor<FloatDType>,
    layer: number,
  ): Tensor<FloatDType>
}

/**
 * Runs all layers over tokens, [1, n], and returns logits, [n, vocabulary] float32, or [rows, vocabulary] where `rows` names
 * some of the tokens.
 */
export function run(
  model: Model,
  ids: Tensor<'uint8'>,
  mixer: Mixer,
  rows?: Tensor<'int32'>,
): Tensor<'float32'> {
  const { config, weights } = model
  const {
    num_attention_heads: heads,
    num_key_value_heads: pairs,
    head_dim: d,
    rms_norm_eps: eps,
  } = config
  const n = ids.shape[1]!
  const weight = (name: string) => {
    const found = weights.get(`${name}.weight`)
    if (!found) throw new Error(`the checkpoint has no ${name}.weight`)
    return found
  }

  const softmax = (h: Tensor<FloatDType>, layer: number) => {
    const project = (name: string, count: number) =>
      linear(h, weight(`model.layers.${layer}.${name}`)).reshape([1, n, count, d])
    const turn = { theta: config.rope_theta, layout: config.rope_layout, ...mixer.turn }
    const q = rope(project('q_proj', heads), turn)
    const k = rope(project('k_proj', pairs), turn)
    return mixer.softmax(q, k, project('v_proj', pairs), layer).reshape([1, n, heads * d])
  }

  const recurrent = (h: Tensor<FloatDType>, layer: number) => {
    const name = `model.layers.${layer}`
    const project = (part: string) =>
      silu(linear(h, weight(`${name}.${part}`))).reshape([1, n, heads, d])
    const out = mixer.recurrent(project('q_proj'), project('k_proj'), project('v_proj'), layer)
    const normed = norm(out.reshape([1, n, heads * d]), weight(`${name}.o_norm`), { eps })
    return glu(linear(h, weight(`${name}.g_proj`)), normed, { activation: 'sigmoid' })
  }

  const block = (x: Tensor<FloatDType>, layer: number) => {
    const name = `model.layers.${layer}`
    const h = norm(x, weight(`${name}.input_layernorm`), { eps })
    const mixed = config.attention[layer] === 'softmax' ? softmax(h, layer) : recurrent(h, layer)
    const y = add(x, linear(mixed, weight(`${name}.o_proj`)))
    const m = norm(y, weight(`${name}.post_attention_layernorm`), { eps })
    const gated = glu(linear(m, weight(`${name}.gate_proj`)), linear(m, weight(`${name}.up_proj`)))
    return add(y, linear(gated, weight(`${name}.down_proj`)))
  }

  return scope(() => {
    let x = embed(ids, weight('model.embed_tokens'))
    for (let layer = 0; layer < config.num_hidden_layers; layer++) {
      const before = x
      x = scope(() => block(before, layer))
      before.dispose()
    }
    const all = x.reshape([n, config.hidden_size])
    const last = norm(rows ? embed(rows, all) : all, weight('model.norm'), { eps })
    return linear(last, weight('lm_head'), { dtype: 'float32' })
  })
}

/**
 * Runs the model over the next tokens of a sequence and returns their logits, [n, vocabulary] float32. With a cache the
 * tokens continue what it holds and are added to it: a whole prompt, pieces of it or single tokens give the same result.
 */
export function forward(
  model: Model,
  ids: Uint8Array,
  cache?: Cache,
  attend: Attend = dense,
): Tensor<'float32'> {
  const { config, device, slopes } = model
  const n = ids.length
  const at = cache?.length ?? 0
  if (cache && at + n > cache.capacity)
    throw new RangeError(`the cache holds ${cache.capacity} tokens`)

  const mixer: Mixer = {
    turn: { offset: at },
    softmax(q, k, v, layer) {
      const kept = cache?.layers[layer]
      if (!kept?.k || !kept.v) return attend(q, k, v)
      kept.k.slice(1, at, at + n).copyFrom(k)
      kept.v.slice(1, at, at + n).copyFrom(v)
      return attend(q, kept.k.slice(1, 0, at + n), kept.v.slice(1, 0, at + n))
    },
    recurrent(q, k, v, layer) {
      const options = { slopes: slopes[layer]!, scale: config.lightning_scale }
      const state = cache?.layers[layer]?.state
      if (!cache || !state) return lightning(q, k, v, options).out
      if (n <= 16) return lightningDecode(q, k, v, state, cache.slot, options).out
      const result = lightning(q, k, v, { ...options, initialState: state, outputFinalState: true })
      state.copyFrom(result.state)
      return result.out
    },
  }
  const logits = scope(() => run(model, tensor(ids, [1, n], { device, dtype: 'uint8' }), mixer))
  if (cache) cache.length += n
  return logits
}

/** Continues a prompt byte by byte: the likeliest byte at temperature 0, else a draw. */
export async function* generate(
  model: Model,
  prompt: Uint8Array,
  options: {
    maxTokens?: number
    temperature?: number
    random?: () => number
    signal?: AbortSignal
  } = {},
): AsyncGenerator<number, void, void> {
  const { maxTokens = 256, temperature = 0, random = Math.random, signal } = options
  if (prompt.length === 0) throw new RangeError('the prompt is empty')
  const cache = newCache(model, prompt.length + maxTokens)
  try {
    let next = prompt
    for (let i = 0; i < maxTokens; i++) {
      const tokens = next
      const row = await scope(() => forward(model, tokens, cache).slice(0, -1).read({ signal }))
      const byte = pick(row, temperature, random)
      yield byte
      next = Uint8Array.of(byte)
    }
  } finally {
    disposeCache(cache)
  }
}

/** The likeliest byte at temperature 0, else a draw. */
export function pick(logits: Float32Array, temperature: number, random: () => number): number {
  const best = logits.reduce((top, value, i) => (value > logits[top]! ? i : top), 0)
  if (temperature <= 0) return best
  const odds = Array.from(logits, (value) => Math.exp((value - logits[best]!) / temperature))
  let left = random() * odds.reduce((sum, odd) => sum + odd, 0)
  const drawn = odds.findIndex((odd) => {
    left -= odd
    return left < 0
  })
  return drawn < 0 ? best : drawn
}

/** How well one sequence is predicted. */
export interface Score {
  /** Sum of -log2 p(next byte), and how many bytes were predicted. */
  bits: number
  bytes: number
  /** For each answer, whether all of its five digits came first. */
  recalled: boolean[]
}

/** Scores a sequence; `answers` are the positions of the first digit of each answer. */
export async function score(
  model: Model,
  ids: Uint8Array,
  answers: readonly number[],
  attend?: Attend,
): Promise<Score> {
  const values = await scope(() => forward(model, ids, undefined, attend).read())
  const width = model.config.vocab_size
  const right = new Uint8Array(ids.length)
  let bits = 0
  for (let i = 0; i + 1 < ids.length; i++) {
    const row = values.subarray(i * width, (i + 1) * width)
    let best = 0
    for (let j = 1; j < width; j++) if (row[j]! > row[best]!) best = j
    let sum = 0
    for (let j = 0; j < width; j++) sum += Math.exp(row[j]! - row[best]!)
    bits += (Math.log(sum) + row[best]! - row[ids[i + 1]!]!) / Math.LN2
    right[i + 1] = best === ids[i + 1] ? 1 : 0
  }
  const recalled = answers.map((at) => {
    const digits = right.subarray(at, at + 5)
    return digits.length === 5 && digits.every((hit) => hit === 1)
  })
  return { bits, bytes: Math.max(ids.length - 1, 0), recalled }
}
