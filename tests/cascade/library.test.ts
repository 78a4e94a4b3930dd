import * as heddle from 'heddle'
import {
  alibiSlopes,
  attention,
  type Cascade,
  cascade,
  type DenseArray,
  definitions,
  type Tensor,
  tensor,
} from 'heddle'
import { expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { type Random, random, sample } from '../support/random.js'

type F32 = Tensor<'float32'>
type Numbers = ArrayLike<number>

/** Tensors that a row draws: one for the kernel, numbers for the text. */
interface Draw {
  rng: Random
  /** Two views of the same numbers: `shape` for the operator, `axes` for the text, the same if left out. */
  of(shape: readonly number[], axes?: readonly number[], scale?: number): Promise<[F32, DenseArray]>
  place(values: Float32Array | number[], shape: readonly number[]): F32
  size(): number
}

interface Row {
  inputs: Record<string, DenseArray>
  scalars?: Record<string, number>
  sizes?: Record<string, number>
  /** What the kernel gives for each output of the text. */
  results: Record<string, Tensor | Numbers>
}

const numbers = async (x: Tensor) => (await x.read({ as: 'float32' } as never)) as Float32Array

async function qkv({ of, size }: Draw, causal = false) {
  const [sq, d, f] = [size(), 8, 16]
  const sk = causal ? sq + size() : size()
  const [q, Q] = await of([1, sq, 1, d], [sq, d])
  const [k, K] = await of([1, sk, 1, d], [sk, d])
  const [v, V] = await of([1, sk, 1, f], [sk, f])
  return { q, k, v, Q, K, V, sq, sk, d, f, off: sk - sq }
}

// Whole blocks of queries and keys, whose sizes `unit` divides
async function blocksOf({ of, rng }: Draw, unit: number) {
  const [i, j, d] = [unit * rng.pick([1, 2, 4]), unit * rng.pick([1, 2, 4]), 8]
  const r = 1 + rng.below(4)
  const c = Math.ceil((r * i) / j) + rng.below(3)
  const [sq, sk] = [r * i, c * j]
  const [q, Q] = await of([1, sq, 1, d], [sq, d])
  const [k, K] = await of([1, sk, 1, d], [sk, d])
  return { i, j, r, c, q, k, Q, K, sq, sk, off: sk - sq }
}

// What a row of blocks does not see is -inf, where a text has an empty point
const seen = async (score: Tensor) =>
  Float64Array.from(await numbers(score), (x) => (x === Number.NEGATIVE_INFINITY ? 0 : x))

// 1 for each block that a mask keeps
async function kept(mask: heddle.Mask, columns: number): Promise<Float64Array> {
  const bits = await mask.blocks!.read()
  const words = mask.blocks!.shape.at(-1)!
  const rows = bits.length / words
  return Float64Array.from({ length: rows * columns }, (_, at) => {
    const [row, column] = [Math.floor(at / columns), at % columns]
    return (bits[row * words + Math.floor(column / 32)]! >> (column % 32)) & 1
  })
}

function wholeNumbers({ rng, place }: Pick<Draw, 'rng' | 'place'>, sq: number, sk: number) {
  const draw = (s: number) => {
    const data = Float32Array.from({ length: s * 4 }, () => rng.below(5) - 2)
    return { made: place(data, [1, s, 1, 4]), dense: { data, shape: [s, 4] } }
  }
  const [{ made: q, dense: Q }, { made: k, dense: K }] = [draw(sq), draw(sk)]
  return [
    { q, Q },
    { k, K },
  ] as const
}

const rows: Record<keyof typeof definitions, (draw: Draw) => Promise<Row>> = {
  async attention(draw) {
    const { q, k, v, Q, K, V, off } = await qkv(draw)
    const { out, lse } = attention(q, k, v, { causal: true, scale: 0.4 })
    return { inputs: { Q, K, V }, scalars: { scale: 0.4, off }, results: { O: out, LSE: lse } }
  },
  async 'attention.backward'(draw) {
    const { q, k, v, Q, K, V, sq, f, off } = await qkv(draw, true)
    const [dout, DO] = await draw.of([1, sq, 1, f], [sq, f])
    const options = { causal: true, scale: 0.4 }
    const { out, lse } = attention(q, k, v, options)
    const { dq, dk, dv } = attention.backward(q, k, v, out, lse, dout, options)
    const O = { data: await numbers(out), shape: [sq, f] }
    const LSE = { data: await numbers(lse), shape: [sq] }
    const inputs = { Q, K, V, O, LSE, DO }
    return { inputs, scalars: { scale: 0.4, off }, results: { DQ: dq, DK: dk, DV: dv } }
  },
  async 'attention.sigmoid'(draw) {
    const { q, k, v, Q, K, V, off } = await qkv(draw)
    const options = { causal: true, scale: 0.4, weights: 'sigmoid', bias: -2 } as const
    const { out } = attention(q, k, v, options)
    const scalars = { scale: 0.4, off, bias: -2 }
    return { inputs: { Q, K, V }, scalars, results: { O: out } }
  },
  async lightning({ of, size }) {
    const [s, d, e] = [size(), 5, 6]
    const [q, Q] = await of([1, s, 1, d], [s, d])
    const [k, K] = await of([1, s, 1, d], [s, d])
    const [v, V] = await of([1, s, 1, e], [s, e])
    const [initialState, S0] = await of([1, 1, d, e], [d, e])
    const scalars = { slope: Math.fround(0.3), scale: 0.5 }
    const { out } = heddle.lightning(q, k, v, { slopes: [0.3], scale: 0.5, initialState })
    return { inputs: { Q, K, V, S0 }, scalars, results: { O: out } }
  },
  async 'lightning.backward'({ of, size }) {
    const [s, d, e] = [size(), 5, 6]
    const [q, Q] = await of([1, s, 1, d], [s, d])
    const [k, K] = await of([1, s, 1, d], [s, d])
    const [v, V] = await of([1, s, 1, e], [s, e])
    const [dout, DO] = await of([1, s, 1, e], [s, e])
    const scalars = { slope: Math.fround(0.3), scale: 0.5 }
    const { dq, dk, dv } = heddle.lightningBackward(q, k, v, dout, { slopes: [0.3], scale: 0.5 })
    return { inputs: { Q, K, V, DO }, scalars, results: { DQ: dq, DK: dk, DV: dv } }
  },
  async 'lightning.decode'({ of, place }) {
    const [s, d, e] = [3, 5, 6]
    const [q, Q] = await of([1, s, 1, d], [s, d])
    const [k, K] = await of([1, s, 1, d], [s, d])
    const [v, V] = await of([1, s, 1, e], [s, e])
    const [state, S0] = await of([1, 1, d, e], [d, e])
    const slots = tensor([0], [1], { dtype: 'int32', device: state.device })
    const pool = place(Array.from(S0.data), [1, 1, d, e])
    const options = { slopes: [0.3], scale: 0.5 }
    const { out } = heddle.lightningDecode(q, k, v, pool, slots, options)
    const scalars = { slope: Math.fround(0.3), scale: 0.5 }
    return { inputs: { Q, K, V, S0 }, scalars, results: { O: out } }
  },
  async merge({ of, rng, place, size }) {
    const [s, d] = [size(), 8]
    const [a, A] = await of([1, s, 1, d], [s, d])
    const [b, B] = await of([1, s, 1, d], [s, d])
    const [LA, LB] = [rng.normals(s), rng.normals(s)]
    LA[s - 1] = Number.NEGATIVE_INFINITY
    if (rng.chance(0.5)) LB[s - 1] = Number.NEGATIVE_INFINITY
    const part = (out: F32, lse: Float32Array) => ({ out, lse: place(lse, [1, 1, s]) })
    const { out, lse } = heddle.merge([part(a, LA), part(b, LB)])
    const inputs = { A, B, LA: { data: LA, shape: [s] }, LB: { data: LB, shape: [s] } }
    return { inputs, results: { O: out, L: lse } }
  },
  async linear({ of, size }) {
    const [n, i, o] = [size(), size(), size()]
    const [x, X] = await of([n, i])
    const [weight, W] = await of([o, i])
    const [bias, B] = await of([o])
    return { inputs: { X, W, B }, results: { Y: heddle.linear(x, weight, { bias }) } }
  },
  async norm({ of, size }) {
    const [n, d] = [size(), size()]
    const [x, X] = await of([n, d])
    const [weight, W] = await of([d])
    const results = { Y: heddle.norm(x, weight, { eps: 1e-3 }) }
    return { inputs: { X, W }, scalars: { eps: 1e-3 }, results }
  },
  async rope({ of, size }) {
    const [s, half] = [size(), 6]
    const [x, X] = await of([1, s, 1, 2 * half], [s, 2, half])
    const y = heddle.rope(x, { theta: 500 })
    const results = { YA: y.slice(-1, 0, half), YB: y.slice(-1, half) }
    return { inputs: { X }, scalars: { theta: 500 }, results }
  },
  async embed({ of, rng, size, place }) {
    const [n, d, vocabulary] = [size(), size(), 11]
    const [table, T] = await of([vocabulary, d])
    const ids = Int32Array.from({ length: n }, () => rng.below(vocabulary))
    const { device } = place([0], [1])
    const y = heddle.embed(tensor(ids, [n], { device }), table)
    return { inputs: { T, ids: { data: ids, shape: [n] } }, results: { Y: y } }
  },
  async glu({ of, size }) {
    const n = size()
    const [gate, G] = await of([n])
    const [up, U] = await of([n])
    return { inputs: { G, U }, results: { Y: heddle.glu(gate, up) } }
  },
  async add({ of, size }) {
    const [n, d] = [size(), size()]
    const [[x, X], [z, Z]] = [await of([n, d]), await of([d])]
    return { inputs: { X, Z }, results: { Y: heddle.add(x, z) } }
  },
  async mul({ of, size }) {
    const [n, d] = [size(), size()]
    const [[x, X], [z, Z]] = [await of([n, d]), await of([d])]
    return { inputs: { X, Z }, results: { Y: heddle.mul(x, z) } }
  },
  async silu({ of, size }) {
    const [x, X] = await of([size()])
    return { inputs: { X }, results: { Y: heddle.silu(x) } }
  },
  async sigmoid({ of, size }) {
    const [x, X] = await of([size()])
    return { inputs: { X }, results: { Y: heddle.sigmoid(x) } }
  },
  async probe({ of, rng }) {
    const [i, j, d] = [3, 5, 8]
    const r = 1 + rng.below(6)
    const [sq, sk] = [r * i, j * (Math.ceil((r * i) / j) + rng.below(4))]
    const [q, Q] = await of([1, sq, 1, d], [sq, d])
    const [k, K] = await of([1, sk, 1, d], [sk, d])
    const S = await seen(heddle.probe(q, k, { block: [i, j], scale: 0.7 }))
    const sizes = { I: i, J: j, R: r, C: sk / j }
    return { inputs: { Q, K }, scalars: { scale: 0.7, off: sk - sq }, sizes, results: { S } }
  },
  async keep({ rng, place }) {
    const [r, c, top] = [7, 9, 1 + rng.below(9)]
    const values = Float32Array.from({ length: r * c }, () => rng.below(5))
    const score = place(values, [1, 1, r, c])
    const mask = heddle.keep(score, { sq: 16 * r, sk: 16 * c, block: 16, topBlocks: top })
    const B = await kept(mask, c)
    return { inputs: { S: { data: values, shape: [r, c] } }, scalars: { top }, results: { B } }
  },
  async 'keep.coverage'({ rng, place }) {
    const [r, c, coverage] = [7, 9, 0.05 + 0.9 * rng.next()]
    const values = Float32Array.from({ length: r * c }, () => 1 + rng.below(5))
    const score = place(values, [1, 1, r, c])
    const B = await kept(heddle.keep(score, { sq: 16 * r, sk: 16 * c, block: 16, coverage }), c)
    return { inputs: { S: { data: values, shape: [r, c] } }, scalars: { coverage }, results: { B } }
  },
  async 'probe.rows'(draw) {
    const { i, j, r, c, q, k, Q, K, off } = await blocksOf(draw, 1)
    const probed = heddle.probe(q, k, { kind: 'rows', stride: 1, block: [i, j], scale: 0.7 })
    const sizes = { I: i, J: j, R: r, C: c }
    return {
      inputs: { Q, K },
      scalars: { scale: 0.7, off },
      sizes,
      results: { P: await seen(probed) },
    }
  },
  async 'probe.lines'(draw) {
    const { q, k, Q, K, sq, sk, off } = await qkv(draw, true)
    const lines = (per: 'key' | 'distance') =>
      seen(heddle.probe(q, k, { kind: 'rows', per, block: [sq, 16], scale: 0.7 }))
    const results = { C: await lines('key'), D: await lines('distance') }
    return { inputs: { Q, K }, scalars: { scale: 0.7, off }, sizes: { X: sk }, results }
  },
  async 'probe.antidiagonal'(draw) {
    const { i, j, r, c, q, k, Q, K, off } = await blocksOf(draw, 4)
    const probed = heddle.probe(q, k, {
      kind: 'antidiagonal',
      stride: 4,
      block: [i, j],
      scale: 0.7,
    })
    const sizes = { A: 4, G: i / 4, H: j / 4, R: r, C: c }
    return {
      inputs: { Q, K },
      scalars: { scale: 0.7, off },
      sizes,
      results: { P: await seen(probed) },
    }
  },
  async 'attention.blocks'(draw) {
    const { i, j, r, c, q, k, Q, K, off, sk } = await blocksOf(draw, 16)
    const [v, V] = await draw.of([1, sk, 1, 8], [sk, 8])
    const score = draw.place(draw.rng.normals(r * c), [1, 1, r, c])
    const topBlocks = 1 + draw.rng.below(c)
    const mask = heddle.keep(score, { sq: r * i, sk, block: [i, j], topBlocks })
    const { out } = attention(q, k, v, { mask, scale: 0.4 })
    const bits = { data: await kept(mask, c), shape: [r, c] }
    const scalars = { scale: 0.4, off }
    const sizes = { I: i, J: j, R: r, C: c }
    return { inputs: { Q, K, V, kept: bits }, scalars, sizes, results: { O: out } }
  },
  async 'attention.relu'(draw) {
    const { q, k, v, Q, K, V, off } = await qkv(draw)
    const { out } = attention(q, k, v, { causal: true, scale: 0.4, weights: 'relu', power: 2 })
    return { inputs: { Q, K, V }, scalars: { scale: 0.4, off }, results: { O: out } }
  },
  async 'attention.softplus'(draw) {
    const { q, k, v, Q, K, V, off } = await qkv(draw)
    const { out, lse } = attention(q, k, v, { causal: true, scale: 0.4, weights: 'softplus' })
    return { inputs: { Q, K, V }, scalars: { scale: 0.4, off }, results: { O: out, LSE: lse } }
  },
  async 'attention.options'(draw) {
    const { q, k, v, Q, K, V, sq, sk, off } = await qkv(draw)
    const [bias, B] = await draw.of([1, 1, sq, sk], [sq, sk])
    const [slope, sink] = [Math.fround(0.2), Math.fround(-0.3)]
    const scalars = { scale: 0.4, off, window: 9, cap: 2, slope, sink }
    const options = { window: 9, softCap: 2, slopes: [slope], sink: [sink] }
    const { out, lse } = attention(q, k, v, { causal: true, scale: 0.4, bias, ...options })
    return { inputs: { Q, K, V, B }, scalars, results: { O: out, LSE: lse } }
  },
  async softplus(draw) {
    const { q, k, v, Q, K, V, d, off } = await qkv(draw, true)
    const { out } = heddle.softplusAttention(q, k, v, { power: 3 })
    const scalars = { off, logD: Math.log(d), power: 3 }
    return { inputs: { Q, K, V }, scalars, results: { O: out } }
  },
  async streaming(draw) {
    const { q, k, v, Q, K, V, off } = await qkv(draw, true)
    const [sinks, window] = [2, 5]
    const mask = heddle.streaming(q, k, { sinkTokens: sinks, window })
    const { out, lse } = attention(q, k, v, { mask, scale: 0.4 })
    const scalars = { scale: 0.4, off, sinks, window }
    return { inputs: { Q, K, V }, scalars, results: { O: out, LSE: lse } }
  },
  // Whole numbers: every score is exact and many are equal
  async hip({ rng, place }) {
    const [block, J, N, L] = [rng.pick([4, 16]), rng.pick([1, 2, 4]), rng.pick([2, 3, 8]), 3]
    const [T, window, sinks] = [rng.pick([1, 2]), 1 + rng.below(9), J * rng.below(5)]
    const sk = sinks + N * 2 ** L * J + window
    const [{ q, Q }, { k, K }] = wholeNumbers({ rng, place }, block, sk)
    const options = { topK: N * J, block: [block, J], stride: [T, 1] } as const
    const mask = heddle.hip(q, k, { ...options, window, sinkTokens: sinks })
    const sizes = { I: block / T, T, J, L, N, S: 2, X: N, Y: 2, B: Math.ceil(sk / J) }
    const scalars = { window, sinks, off: sk - block }
    return { inputs: { Q, K }, scalars, sizes, results: { B: await kept(mask, sizes.B) } }
  },
  async infiniteHip({ rng, place }) {
    const [block, A] = [rng.pick([4, 16]), rng.pick([1, 2])]
    const [C1, W1, W2] = [9, 1 + rng.below(8), 1 + rng.below(2)]
    const [U1, U2] = [rng.pick([2, 3, 4]), rng.pick([1, 2])]
    const G = 2 ** (U1 - U2)
    const [window, sinks] = [block + rng.below(9), 2 ** U2 * rng.below(3)]
    const sk = sinks + C1 * 2 ** U1 + window
    const [{ q, Q }, { k, K }] = wholeNumbers({ rng, place }, block, sk)
    const last = Math.min(W2, W1 * G)
    const mask = heddle.infiniteHip(q, k, {
      stages: [
        { chunk: 2 ** U1, stride: A, block },
        { chunk: 2 ** U2, stride: A, block, topK: W1 * 2 ** U1 },
      ],
      topK: last * 2 ** U2,
      window,
      sinkTokens: sinks,
    })
    const ranks = { C1, U1, W1, X1: C1, C2: W1 * G, U2, W2: last, X2: W1 * G }
    const sizes = { A, G, I: block / A, S: 2, ...ranks, B: Math.ceil(sk / 2 ** U2) }
    const results = { B: await kept(mask, sizes.B) }
    return { inputs: { Q, K }, scalars: { sinks }, sizes, results }
  },
  async flexPrefill({ of, rng }) {
    const [block, d] = [16, 8]
    const [r, least] = [5 + rng.below(4), 1 + rng.below(3)]
    for (;;) {
      const [q, Q] = await of([1, r * block, 1, d], [r * block, d], rng.pick([0.3, 2]))
      const [k, K] = await of([1, r * block, 1, d], [r * block, d])
      const scalars = {
        ...{ scale: 0.4, least, gamma: 0.3 + 0.6 * rng.next(), tau: rng.pick([0.1, 0.5, 0.9]) },
      }
      const sizes = { I: block, J: block, R: r, C: r, D: r * block, X: r, Y: r }
      const keep = ['V', 'O', 'BV', 'BO', 'BP', 'W']
      const parts = cascade(definitions.flexPrefill).evaluate({ Q, K }, scalars, { sizes, keep })
      // What float32 may decide otherwise is drawn again
      const near = (name: string, cut: number) =>
        parts[name]!.data.some((x) => Math.abs(x - cut) < 1e-5)
      const tied = (name: string) =>
        parts[name]!.data.toSorted().some((x, i, all) => x - all[i - 1]! < 1e-6)
      const { gamma, tau, scale } = scalars
      const cuts = near('BV', gamma) || near('BO', gamma) || near('BP', gamma * r) || near('W', tau)
      if (cuts || tied('V') || tied('O')) continue
      const budget = { gamma, tau, minBudget: least * block }
      const mask = heddle.flexPrefill(q, k, { ...budget, mode: 'coverage', block, scale })
      return { inputs: { Q, K }, scalars, sizes, results: { B: await kept(mask, r) } }
    }
  },
  async minimax({ of, rng }) {
    const [s, heads, d, model] = [1 + rng.below(20), 3, 4, 10]
    const [x, X] = await of([1, s, model], [s, model])
    const [qkv, WQKV] = await of([heads * 3 * d, model], [heads, 3, d, model], 0.3)
    const [gate, WG] = await of([heads * d, model], [heads, d, model], 0.3)
    const [gain, W] = await of([heads * d], [heads, d])
    const [out, WO] = await of([model, heads * d], [model, heads, d], 0.3)
    const [state, S0] = await of([1, heads, d, d], [heads, d, d])
    const options = { heads, layer: 1, layers: 4, eps: 1e-5, state }
    const results = heddle.minimax(x, { qkv, gate, norm: gain, out }, options)
    const slope = { data: Float32Array.from(alibiSlopes(heads, 1, 4)), shape: [heads] }
    const inputs = { X, WQKV, WG, W, WO, S0, slope }
    return { inputs, scalars: { eps: 1e-5 }, results: { Y: results.out } }
  },
  async transnormer({ of, rng }) {
    const [s, heads, d, model, hidden] = [1 + rng.below(20), 3, 4, 10, 14]
    const [x, X] = await of([1, s, model], [s, model])
    const [qkvu, WQKVU] = await of([4 * heads * d, model], [4, heads, d, model], 0.3)
    const [out, WO] = await of([model, heads * d], [model, heads, d], 0.3)
    const [gate, WG] = await of([hidden, model], undefined, 0.3)
    const [up, WU] = await of([hidden, model], undefined, 0.3)
    const [down, WD] = await of([model, hidden], undefined, 0.3)
    const [state, S0] = await of([1, heads, d, d], [heads, d, d])
    const options = { heads, layer: 1, layers: 4, eps: 1e-5, state }
    const results = heddle.transnormer(x, { qkvu, out, gate, up, down }, options)
    const slope = { data: Float32Array.from(alibiSlopes(heads, 1, 4)), shape: [heads] }
    const inputs = { X, WQKVU, WO, WG, WU, WD, S0, slope }
    return { inputs, scalars: { eps: 1e-5 }, results: { Y: results.out } }
  },
}

describeDevices('definitions of the library', (device) => {
  const rng = random(71)
  const draw: Draw = {
    rng,
    size: () => 1 + rng.below(rng.pick([4, 40, 80])),
    place: (values, shape) => tensor(values as Float32Array, shape, { device }) as F32,
    async of(shape, axes = shape, scale = 1) {
      const { tensor: made, values } = await sample(rng, shape, 'float32', device, { scale })
      return [made as F32, { data: values, shape: axes }]
    },
  }

  it.each(Object.entries(rows))('%s is what its kernel computes', async (name, row) => {
    const parsed: Cascade = cascade(definitions[name as keyof typeof definitions])
    for (let n = 0; n < 4; n++) {
      const { inputs, scalars = {}, sizes, results } = await row(draw)
      const expected = parsed.evaluate(inputs, scalars, {
        keep: Object.keys(results),
        ...(sizes ? { sizes } : {}),
      })
      for (const [output, result] of Object.entries(results)) {
        const actual = 'dtype' in result ? await numbers(result as Tensor) : (result as Numbers)
        const wanted = expected[output]!.data
        expect(actual.length, output).toBe(wanted.length)
        const allowed = 3e-5 * Math.max(1, largest(wanted))
        expect(maxError(actual, wanted), `${output} of ${name}`).toBeLessThanOrEqual(allowed)
      }
    }
  })
})
