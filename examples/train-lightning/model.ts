import {
  add,
  alibiSlopes,
  type Device,
  embed,
  full,
  glu,
  lightning,
  lightningBackward,
  linear,
  mul,
  norm,
  scope,
  sigmoid,
  silu,
  type Tensor,
  tensor,
} from 'heddle'

// A small language model in the manner of TransNormerLLM, its gradients by hand, and Adam. Matrices are [tokens, width];
// weights are [outputs, inputs] and live on the host, where Adam changes them.

type Matrix = Tensor<'float32'>

export interface Config {
  vocabulary: number
  width: number
  heads: number
  hidden: number
  layers: number
}

export interface Parameter {
  rows: number
  columns: number
  values: Float32Array
  /** Running means of the gradient and of its square. */
  first: Float32Array
  second: Float32Array
}

export interface Model {
  config: Config
  parameters: Map<string, Parameter>
  steps: number
}

const eps = 1e-6

/** Weights of random normal numbers, with which rows keep their size. */
export function create(config: Config, seed: number): Model {
  const { vocabulary, width, hidden, layers } = config
  let state = seed
  const uniform = () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state + 1) / (2 ** 32 + 1)
  }
  const parameters = new Map<string, Parameter>()
  const make = (name: string, rows: number, columns: number, size: number) => {
    const normal = () =>
      Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform()) * size
    const values = Float32Array.from({ length: rows * columns }, normal)
    const zeros = () => new Float32Array(values.length)
    parameters.set(name, { rows, columns, values, first: zeros(), second: zeros() })
  }
  make('embedding', vocabulary, width, 1)
  for (let layer = 0; layer < layers; layer++) {
    make(`${layer}.qkvu`, 4 * width, width, width ** -0.5)
    make(`${layer}.out`, width, width, 0.5 * width ** -0.5)
    make(`${layer}.gate`, hidden, width, width ** -0.5)
    make(`${layer}.up`, hidden, width, width ** -0.5)
    make(`${layer}.down`, width, hidden, 0.5 * hidden ** -0.5)
  }
  make('logits', vocabulary, width, 0.5 * width ** -0.5)
  return { config, parameters, steps: 0 }
}

/** The gradient of x in x weightᵀ, and of the weight. */
const throughWeight = (dy: Matrix, weight: Matrix) => linear(dy, weight.transpose(0, 1))
const ofWeight = (dy: Matrix, x: Matrix) => linear(dy.transpose(0, 1), x.transpose(0, 1))

/** dy s (1 + x (1 - s)) with s = sigmoid(x). */
function throughSilu(dy: Matrix, x: Matrix): Matrix {
  const s = sigmoid(x)
  const [one, minus] = [full([1], 1, { device: x.device }), full([1], -1, { device: x.device })]
  const slope = add(one, mul(x, add(one, mul(minus, s))))
  return mul(dy, mul(s, slope))
}

/** (dy - y mean(y dy)) / rms(x) with y = x / rms(x), row by row. */
async function throughNorm(dy: Matrix, x: Matrix): Promise<Matrix> {
  const [values, gradients] = await Promise.all([x.read(), dy.read()])
  const width = x.shape[1]!
  const result = new Float32Array(values.length)
  for (let at = 0; at < values.length; at += width) {
    let [squares, products] = [0, 0]
    for (let i = at; i < at + width; i++) {
      squares += values[i]! ** 2
      products += values[i]! * gradients[i]!
    }
    const scale = 1 / Math.sqrt(squares / width + eps)
    const shift = (products / width) * scale ** 2
    for (let i = at; i < at + width; i++) result[i] = scale * (gradients[i]! - values[i]! * shift)
  }
  return tensor(result, x.shape, { device: x.device })
}

/** Mean cross entropy in nats, and its gradient. */
async function crossEntropy(logits: Matrix, targets: Uint8Array): Promise<[number, Matrix]> {
  const values = await logits.read()
  const width = logits.shape[1]!
  const gradient = new Float32Array(values.length)
  let loss = 0
  for (const [row, target] of targets.entries()) {
    const scores = values.subarray(row * width, (row + 1) * width)
    const top = scores.reduce((a, b) => Math.max(a, b))
    const sum = scores.reduce((total, score) => total + Math.exp(score - top), 0)
    loss += top + Math.log(sum) - scores[target]!
    scores.forEach((score, i) => {
      const weight = Math.exp(score - top) / sum - (i === target ? 1 : 0)
      gradient[row * width + i] = weight / targets.length
    })
  }
  return [loss / targets.length, tensor(gradient, logits.shape, { device: logits.device })]
}

/** What a layer keeps for its gradients. */
interface Layer {
  x: Matrix
  normal: Matrix
  q: Matrix
  k: Matrix
  v: Matrix
  u: Matrix
  o: Matrix
  normalO: Matrix
  mixed: Matrix
  middle: Matrix
  normalMiddle: Matrix
  gate: Matrix
  up: Matrix
  gated: Matrix
}

/**
 * The loss on sequences of `length` bytes, each followed by the byte behind it, and the gradient of every parameter.
 */
export async function gradients(
  model: Model,
  bytes: Uint8Array,
  length: number,
  device: Device,
): Promise<{ loss: number; gradients: Map<string, Float32Array> }> {
  const { width, heads, layers } = model.config
  const sequences = bytes.length / (length + 1)
  const pick = (from: number) =>
    Uint8Array.from({ length: sequences * length }, (_, i) => {
      const sequence = Math.floor(i / length)
      return bytes[sequence * (length + 1) + (i % length) + from]!
    })
  const [inputs, targets] = [pick(0), pick(1)]
  return scope(async () => {
    const weights = new Map<string, Matrix>()
    for (const [name, { rows, columns, values }] of model.parameters)
      weights.set(name, tensor(values, [rows, columns], { device }))
    const weight = (name: string) => weights.get(name)!
    const found = new Map<string, Matrix>()
    const plain = (x: Matrix) => norm(x, undefined, { eps })
    const split = (x: Matrix) => x.reshape([sequences, length, heads, width / heads])
    const joined = (x: Matrix) => x.reshape([sequences * length, width])
    const slopes = (layer: number) => alibiSlopes(heads, layer, layers)

    const kept: Layer[] = []
    let x: Matrix = embed(
      tensor(Int32Array.from(inputs), [inputs.length], { dtype: 'int32', device }),
      weight('embedding'),
    )
    for (let layer = 0; layer < layers; layer++) {
      const normal = plain(x)
      const qkvu = linear(normal, weight(`${layer}.qkvu`))
      const part = (i: number) => qkvu.slice(1, i * width, (i + 1) * width).contiguous()
      const [q, k, v, u] = [part(0), part(1), part(2), part(3)]
      const options = { slopes: slopes(layer) }
      const o = joined(lightning(split(silu(q)), split(silu(k)), split(v), options).out)
      const normalO = plain(o)
      const mixed = mul(u, normalO)
      const middle = add(x, linear(mixed, weight(`${layer}.out`)))
      const normalMiddle = plain(middle)
      const gate = linear(normalMiddle, weight(`${layer}.gate`))
      const up = linear(normalMiddle, weight(`${layer}.up`))
      const gated = glu(gate, up, { activation: 'identity' })
      kept.push({
        ...{ x, normal, q, k, v, u, o, normalO, mixed },
        ...{ middle, normalMiddle, gate, up, gated },
      })
      x = add(middle, linear(gated, weight(`${layer}.down`)))
    }
    const last = plain(x)
    const [loss, dlogits] = await crossEntropy(linear(last, weight('logits')), targets)

    found.set('logits', ofWeight(dlogits, last))
    let dx = await throughNorm(throughWeight(dlogits, weight('logits')), x)
    for (let layer = layers - 1; layer >= 0; layer--) {
      const c = kept[layer]!
      const dgated = throughWeight(dx, weight(`${layer}.down`))
      const [dgate, dup] = [mul(dgated, c.up), mul(dgated, c.gate)]
      const dnormalMiddle = add(
        throughWeight(dgate, weight(`${layer}.gate`)),
        throughWeight(dup, weight(`${layer}.up`)),
      )
      found.set(`${layer}.down`, ofWeight(dx, c.gated))
      found.set(`${layer}.gate`, ofWeight(dgate, c.normalMiddle))
      found.set(`${layer}.up`, ofWeight(dup, c.normalMiddle))
      const dmiddle = add(dx, await throughNorm(dnormalMiddle, c.middle))

      const dmixed = throughWeight(dmiddle, weight(`${layer}.out`))
      found.set(`${layer}.out`, ofWeight(dmiddle, c.mixed))
      const dout = await throughNorm(mul(dmixed, c.u), c.o)
      const { dq, dk, dv } = lightningBackward(
        split(silu(c.q)),
        split(silu(c.k)),
        split(c.v),
        split(dout),
        { slopes: slopes(layer) },
      )
      const dqkvu = full([sequences * length, 4 * width], 0, { device })
      const parts = [
        throughSilu(joined(dq), c.q),
        throughSilu(joined(dk), c.k),
        joined(dv),
        mul(dmixed, c.normalO),
      ]
      for (const [i, part] of parts.entries())
        dqkvu.slice(1, i * width, (i + 1) * width).copyFrom(part)
      found.set(`${layer}.qkvu`, ofWeight(dqkvu, c.normal))
      dx = add(dmiddle, await throughNorm(throughWeight(dqkvu, weight(`${layer}.qkvu`)), c.x))
    }

    const result = new Map<string, Float32Array>()
    for (const [name, gradient] of found) result.set(name, await gradient.read())
    const embedding = new Float32Array(model.parameters.get('embedding')!.values.length)
    const rows = await dx.read()
    for (const [row, byte] of inputs.entries())
      for (let i = 0; i < width; i++)
        embedding[byte * width + i] = embedding[byte * width + i]! + rows[row * width + i]!
    result.set('embedding', embedding)
    return { loss, gradients: result }
  })
}

/** One step of Adam. */
export function update(model: Model, gradients: Map<string, Float32Array>, rate: number): void {
  const [beta1, beta2] = [0.9, 0.99]
  model.steps++
  const [warm1, warm2] = [1 - beta1 ** model.steps, 1 - beta2 ** model.steps]
  for (const [name, { values, first, second }] of model.parameters)
    gradients.get(name)!.forEach((gradient, i) => {
      first[i] = beta1 * first[i]! + (1 - beta1) * gradient
      second[i] = beta2 * second[i]! + (1 - beta2) * gradient ** 2
      const step = first[i]! / warm1 / (Math.sqrt(second[i]! / warm2) + 1e-8)
      values[i] = values[i]! - rate * step
    })
}
