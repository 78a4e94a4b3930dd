import {
  type AttentionResult,
  add,
  alibiSlopes,
  attention,
  attentionBackward,
  bytesPerElement,
  type Device,
  type FloatDType,
  flexPrefill,
  flexPrefillAttention,
  hip,
  hipDecoder,
  hipLists,
  hipStages,
  lightning,
  lightningBackward,
  lightningDecode,
  linear,
  Mask,
  mul,
  norm,
  randn,
  rope,
  sampled,
  scatter,
  scope,
  softplusAttention,
  type Tensor,
  tensor,
  xattention,
  zeros,
} from 'heddle'
import { type Problem, refuse } from './problem.js'

/** One problem made ready to run. */
export interface Case {
  /** Enqueues the operator once and returns what it made, for the caller to dispose of. */
  run(): Tensor[]
  flops: number
  /** The least bytes that have to move. */
  bytes: number
  /** Which share of `flops` is done, where the input decides. */
  share?(): Promise<number>
  /** The largest error of some sampled results against float64, relative to the largest value; runs the operator. */
  check(): Promise<number>
  /** What peers need to run the same. */
  inputs: readonly Tensor[]
  /** Other operators of ours for the same inputs, to compare with. */
  others?: Readonly<Record<string, () => Tensor[]>>
}

/** The same numbers from 0 to 1 from the same seed. */
function numbersFrom(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state / 2 ** 32
  }
}

/** 0 to n - 1 in another order, always the same. */
function shuffled(n: number): number[] {
  const list = Array.from({ length: n }, (_, i) => i)
  const draw = numbersFrom(1)
  for (let i = n - 1; i > 0; i--) {
    const j = Math.floor(draw() * (i + 1))
    ;[list[i], list[j]] = [list[j]!, list[i]!]
  }
  return list
}

/**
 * Blocks that the seed lists for each head: `top` of every row, or those of the lower triangle with probability `density` and
 * beside them the diagonal and the first column.
 */
function drawBlocks({ text, size, share, flags }: Problem, device: Device) {
  const [sq, sk, hq, block] = [size('sq'), size('sk'), size('hq'), size('blocks', 0)]
  if (!block) return undefined
  const [top, density, draw] = [size('top', 0), share('density'), numbersFrom(size('seed', 1))]
  const [rows, columns] = [Math.ceil(sq / block), Math.ceil(sk / block)]
  if (!top === !density) throw refuse(`"${text}" must have blocks with either top or density`)
  if (top > columns)
    throw refuse(`"${text}" must have a top up to its ${columns} columns of blocks, got ${top}`)
  const table = new Uint8Array(hq * rows * columns)
  for (let line = 0; line < hq * rows; line++) {
    const row = table.subarray(line * columns, (line + 1) * columns)
    const last = (line % rows) + columns - rows
    for (let left = top; left > 0; ) {
      const c = Math.floor(draw() * columns)
      left -= 1 - row[c]!
      row[c] = 1
    }
    for (let c = 0; !top && c <= last; c++)
      row[c] = Number(draw() < density || c === 0 || c === last)
  }
  const given = tensor(table, [1, hq, rows, columns], { device })
  const mask = Mask.fromBlocks(given, { sq, sk, block, causal: flags.has('causal') })
  given.dispose()
  const listed = table.reduce((sum, bit) => sum + bit, 0)
  const sees = (head: number, row: number, t: number) =>
    table[(head * rows + Math.floor(row / block)) * columns + Math.floor(t / block)] === 1
  return { mask, listed: listed * block * block, sees }
}

/**
 * Queries and keys as models have them: half of the channels turn with their positions, so that near keys score more; four sinks
 * and 64 keys that the seed draws score high for every query; and noise.
 */
function structured(
  [b, s, hq, hk, d]: readonly [number, number, number, number, number],
  dtype: FloatDType,
  device: Device,
  seed: number,
): [q: Tensor<FloatDType>, k: Tensor<FloatDType>] {
  const half = d / 2
  // along the channels: what turns, what the high keys have, and what q has of that
  const channels = (turning: number, fixed: number) =>
    tensor(
      Array.from({ length: d }, (_, e) => (e < half ? turning : fixed)),
      undefined,
      { dtype, device },
    )
  const make = (heads: number, own: number, fixed: number) =>
    scope(() => {
      const noise = randn([b, s, heads, d], { seed: own, dtype, device })
      const all = add(mul(noise, channels(0.5, 0.5)), channels(1.3, fixed))
      return rope(all, { rotary: half })
    })
  const [q, k] = [make(hq, seed, 1), make(hk, seed + 1, 0)]
  const draw = numbersFrom(seed)
  for (let i = 0; i < 68; i++) {
    const t = i < 4 ? i : Math.floor(draw() * s)
    const high = channels(0, i < 4 ? 2.5 : 2)
    k.slice(1, t, t + 1).copyFrom(high.expand([b, 1, hk, d]))
    high.dispose()
  }
  return [q, k]
}

/** The largest error of a row of attention over some of the keys, relative to the largest value. */
function rowError(
  q: Float32Array,
  k: Float32Array,
  v: Float32Array,
  out: Float32Array,
  keys: Iterable<number>,
): number {
  const d = q.length
  const scores = Array.from(keys, (t) => {
    let dot = 0
    for (let e = 0; e < d; e++) dot += q[e]! * k[t * d + e]!
    return [t, Math.exp(dot / Math.sqrt(d))] as const
  })
  const sum = scores.reduce((total, [, p]) => total + p, 0)
  let [worst, top] = [0, 0]
  for (let f = 0; f < d; f++) {
    const value = scores.reduce((total, [t, p]) => total + p * v[t * d + f]!, 0) / sum
    worst = Math.max(worst, Math.abs(value - out[f]!))
    top = Math.max(top, Math.abs(value))
  }
  return worst / top
}

// What the operator does not take together, or the check does not know together
const apart: Readonly<Record<string, readonly string[]>> = {
  blocks: ['window', 'page', 'ragged'],
  page: ['bias', 'sigmoid'],
  reweighted: [
    ...['e4m3', 'sigmoid', 'bias', 'slopes', 'softCap'],
    ...['window', 'blocks', 'page', 'ragged'],
  ],
}

/** Sizes and mask of an attention problem. */
function attentionProblem({ text, operator, dtype, size, flags, has }: Problem, device: Device) {
  for (const [one, others] of Object.entries(apart))
    for (const other of others)
      if (has(one) && has(other))
        throw refuse(`"${text}" has ${one} and ${other}, which do not go together`)
  const [b, sq, sk, hq, d] = [size('b'), size('sq'), size('sk'), size('hq'), size('d')]
  const [hk, dv] = [size('hk', hq), size('dv', d)]
  const causal = flags.has('causal')
  const window = size('window', 0) || undefined
  const softCap = size('softCap', 0) || undefined
  // gradients know no pages
  const page = operator === 'attention' ? size('page', 0) : 0
  // how many keys each batch entry has: all, or as the seed draws them, from 1,024 on where there are so many
  const ragged = size('ragged', 0)
  const draw = numbersFrom(ragged)
  const least = sk < 1024 ? 1 : 1024
  const lengths = Array.from({ length: b }, () =>
    ragged ? least + Math.floor(draw() * (sk - least + 1)) : sk,
  )
  const last = lengths[b - 1]!
  const make = (seed: number, shape: number[]) => randn(shape, { seed, dtype, device })
  // keys of one batch entry, or pages of them that lie in no order
  const entries = page ? Math.ceil(sk / page) : 0
  const held = lengths.map((keys) => (page ? Math.ceil(keys / page) : 0))
  const blocks = page ? [held.reduce((sum, n) => sum + n, 0), page] : [b, sk]
  const [q, k, v] = [
    make(1, [b, sq, hq, d]),
    make(2, [...blocks, hk, d]),
    make(3, [...blocks, hk, dv]),
  ]
  const drawn = shuffled(page ? blocks[0]! : 0)
  // which page holds a row of the batch entry; entries behind the last row are never read
  const tables = held.map((n) => [...drawn.splice(0, n), ...new Array<number>(entries - n).fill(0)])
  // sigmoid(score - log sk), a bias for all heads, slopes of ALiBi
  const isSigmoid = flags.has('sigmoid')
  const isBiased = flags.has('bias')
  const int32 = { dtype: 'int32', device } as const
  const options = {
    causal,
    window,
    softCap,
    slopes: flags.has('slopes') ? alibiSlopes(hq) : undefined,
    weights: isSigmoid ? ('sigmoid' as const) : undefined,
    bias: isBiased ? make(5, [1, 1, sq, sk]) : isSigmoid ? -Math.log(sk) : undefined,
    cacheSeqlens: page || ragged ? tensor(lengths, [b], int32) : undefined,
    ...(page && { blockTable: tensor(tables.flat(), [b, entries], int32) }),
  }
  // keys that a row of the last batch entry, or of one with so many keys, sees
  const sees = (row: number, keys = last) => {
    const at = keys - sq + row
    const end = causal || window ? Math.min(at + 1, keys) : keys
    return [Math.max(window ? at - window + 1 : 0, 0), Math.max(end, 0)] as const
  }
  // the score of a row of the last batch entry from its product with a key, and what the soft cap leaves of its slope
  const score = (head: number, row: number, t: number, dot: number) => {
    const plain = dot / Math.sqrt(d)
    const tanh = softCap ? Math.tanh(plain / softCap) : 0
    const distance = t - (last - sq + row)
    const capped = softCap ? softCap * tanh : plain
    return [capped + (options.slopes?.[head] ?? 0) * distance, 1 - tanh ** 2] as const
  }
  // what is added to the scores of a row or a key
  const biasAlong = async (axis: 0 | 1, at: number) => {
    const { bias } = options
    if (typeof bias !== 'object') return () => bias ?? 0
    const map = bias.select(0, 0).select(0, 0)
    const values = await map.select(axis, at).read({ as: 'float32' })
    return (i: number) => values[i]!
  }
  let pairs = 0
  for (const keys of lengths)
    for (let row = 0; row < sq; row++) {
      const [from, to] = sees(row, keys)
      pairs += Math.max(to - from, 0)
    }
  const keys = lengths.reduce((sum, n) => sum + n, 0)
  const table = tables[b - 1]!
  const sizes = { b, sq, sk, hq, hk, d, dv, pairs, keys, last, page }
  return { ...sizes, q, k, v, make, options, sees, score, biasAlong, table }
}

/** What the keys of a row weigh. */
function weigh(scores: readonly number[], weights: 'softmax' | 'sigmoid' | 'reweighted'): number[] {
  if (weights === 'sigmoid') return scores.map((s) => 1 / (1 + Math.exp(-s)))
  const sum = (values: readonly number[]) => values.reduce((a, x) => a + x, 0)
  const most = (values: readonly number[]) =>
    values.reduce((a, x) => Math.max(a, x), Number.NEGATIVE_INFINITY)
  if (weights === 'softmax') {
    const top = most(scores)
    if (top === Number.NEGATIVE_INFINITY) return scores.map(() => 0) // sees no key
    const powers = scores.map((s) => Math.exp(s - top))
    const total = sum(powers)
    return powers.map((x) => x / total)
  }
  const soft = scores.map((s) => Math.max(s, 0) + Math.log1p(Math.exp(-Math.abs(s))))
  const mean = sum(soft) / soft.length
  const above = soft.map((x) => Math.max(x / mean - (soft.length > 3 ? 1 : 0), 0))
  const top = most(above)
  const powers = above.map((x) => (x / top) ** 15)
  const total = sum(powers)
  return powers.map((x) => x / total)
}

const both = ({ out, lse }: AttentionResult<FloatDType>): Tensor[] => [out, lse]

/** A mechanism that chooses blocks, on q and k as the heads of a model have them, beside attention to everything. */
function selecting(
  { dtype, size }: Problem,
  device: Device,
  select: (q: Tensor<FloatDType>, k: Tensor<FloatDType>) => Mask,
  {
    denseBelow = 0,
    attend = (q, k, v) => {
      using mask = select(q, k)
      return attention(q, k, v, { causal: true, mask })
    },
  }: {
    denseBelow?: number
    attend?: (
      q: Tensor<FloatDType>,
      k: Tensor<FloatDType>,
      v: Tensor<FloatDType>,
    ) => AttentionResult<FloatDType>
  } = {},
): Case {
  const [b, s, hq, hk, d] = [size('b'), size('s'), size('hq'), size('hk'), size('d')]
  const [q, k] = structured([b, s, hq, hk, d], dtype, device, size('seed', 1))
  const v = randn([b, s, hk, d], { seed: 3, dtype, device })
  return {
    inputs: [q, k, v],
    flops: 2 * b * hq * s * (s + 1) * d,
    bytes: q.nbytes * 2 + k.nbytes + v.nbytes,
    run: () => both(attend(q, k, v)),
    others: { 'our softmax attention': () => both(attention(q, k, v, { causal: true })) },
    async share() {
      if (s <= denseBelow) return 1
      using mask = select(q, k)
      return mask.density()
    },
    // the last row of the last head, by the blocks that are listed for it
    async check() {
      const { out } = attend(q, k, v)
      using mask = select(q, k)
      const row = mask.blocks
        ?.select(0, b - 1)
        .select(0, hq - 1)
        .select(0, -1)
      const bits = s > denseBelow && row ? await row.read() : undefined
      const last = (x: Tensor, h: number) => x.select(0, b - 1).select(1, h - 1)
      const read = (x: Tensor) => x.read({ as: 'float32' })
      const [qs, os] = [
        await read(last(q, hq).select(0, -1)),
        await read(last(out, hq).select(0, -1)),
      ]
      const [ks, vs] = [await read(last(k, hk)), await read(last(v, hk))]
      const keys = Array.from({ length: s }, (_, t) => t).filter((t) => {
        const c = Math.floor(t / mask.block[1])
        return !bits || (bits[c >> 5]! >>> (c & 31)) & 1
      })
      out.dispose()
      return rowError(qs, ks, vs, os, keys)
    },
  }
}

/** How to make the case of an operator's problem. */
export const operators: Readonly<Record<string, (problem: Problem, device: Device) => Case>> = {
  attention(problem, device) {
    const given = attentionProblem(problem, device)
    const { b, sq, sk, hq, hk, d, dv, options, pairs, keys, page, table } = given
    const { sees, score, biasAlong } = given
    const element = bytesPerElement[problem.dtype]
    const blocks = drawBlocks(problem, device)
    const reweighted = problem.flags.has('reweighted')
    // what goes in; out keeps the dtype of the problem
    const float8 = problem.flags.has('e4m3')
    const stored = (x: Tensor<FloatDType>) => {
      if (!float8) return x
      const cast = x.cast('float8_e4m3fn')
      x.dispose()
      return cast
    }
    const [q, k, v] = [stored(given.q), stored(given.k), stored(given.v)]
    const run = () =>
      reweighted
        ? softplusAttention(given.q, given.k, given.v, { causal: options.causal })
        : attention(q, k, v, {
            ...options,
            mask: blocks?.mask,
            ...(float8 ? { dtype: problem.dtype } : {}),
          })
    // takes turns with what it is to be as fast as, since clocks depend on what ran before
    const { window, softCap, slopes, bias } = options
    const isPlain = !blocks && !reweighted && !window && !softCap && !slopes && bias === undefined
    const beside = options.causal && sq === sk && !isPlain && !float8 && !page
    return {
      inputs: [q, k, v],
      ...(beside && {
        others: { 'our causal attention': () => both(attention(q, k, v, { causal: true })) },
      }),
      // every listed block counts whole; re-weighting needs all scores twice
      flops: 2 * (blocks ? b * blocks.listed : hq * pairs) * (d + dv + (reweighted ? d : 0)),
      bytes:
        (float8 ? 1 : element) * (b * sq * hq * d + keys * hk * (d + dv)) +
        (element * dv + 4) * b * sq * hq,
      run: () => both(run()),
      async check() {
        const { out, lse } = run()
        const [head, batch] = [hq - 1, b - 1]
        const read = async (x: Tensor, h: number) =>
          x.select(0, batch).select(1, h).read({ as: 'float32' })
        const keyHead = Math.floor(head / (hq / hk))
        // all pages of the head, or the keys of the batch entry
        const readKeys = (x: Tensor) =>
          page ? x.select(2, keyHead).read({ as: 'float32' }) : read(x, keyHead)
        const rowOf = (t: number) => (page ? table[Math.floor(t / page)]! * page + (t % page) : t)
        const [qs, ks, vs, os] = [
          await read(q, head),
          await readKeys(k),
          await readKeys(v),
          await read(out, head),
        ]
        let [worst, top] = [0, 0]
        for (const row of [0, Math.floor(sq / 3), Math.floor(sq / 2), sq - 1]) {
          const [from, to] = sees(row)
          const added = await biasAlong(0, row)
          const scores: number[] = []
          for (let t = from; t < to; t++) {
            let [dot, qq, kk] = [0, 0, 0]
            for (let e = 0; e < d; e++) {
              const [x, y] = [qs[row * d + e]!, ks[rowOf(t) * d + e]!]
              dot += x * y
              qq += x * x
              kk += y * y
            }
            const seen = blocks?.sees(head, row, t) ?? true
            const cosine = (dot / Math.sqrt(qq * kk)) * Math.log(d) * Math.log(to - from)
            const value = reweighted ? cosine : score(head, row, t, dot)[0] + added(t)
            scores.push(seen ? value : Number.NEGATIVE_INFINITY)
          }
          const weights = weigh(scores, options.weights ?? (reweighted ? 'reweighted' : 'softmax'))
          for (let f = 0; f < dv; f++) {
            let value = 0
            weights.forEach((weight, j) => {
              value += weight * vs[rowOf(from + j) * dv + f]!
            })
            worst = Math.max(worst, Math.abs(value - os[row * dv + f]!))
            top = Math.max(top, Math.abs(value))
          }
        }
        out.dispose()
        lse.dispose()
        return worst / top
      },
    }
  },

  'attention.backward'(problem, device) {
    const sizes = attentionProblem(problem, device)
    const { b, sq, sk, hq, hk, d, dv, pairs, last, q, k, v, make } = sizes
    const { sees, score, biasAlong } = sizes
    const blocks = drawBlocks(problem, device)
    const given = { ...sizes.options, mask: blocks?.mask }
    const options = { ...given, deterministic: !problem.flags.has('atomic') }
    const dout = make(4, [b, sq, hq, dv])
    const { out, lse } = attention(q, k, v, given)
    const run = () => attentionBackward(q, k, v, out, lse, dout, options)
    const element = bytesPerElement[problem.dtype]
    return {
      inputs: [q, k, v, out, lse, dout],
      flops: 2 * (blocks ? b * blocks.listed : hq * pairs) * (3 * d + 2 * dv),
      bytes: element * b * (2 * sq * hq * (d + dv) + 2 * sk * hk * (d + dv)) + 4 * b * hq * sq,
      run() {
        const { dq, dk, dv, dslopes } = run()
        return dslopes ? [dq, dk, dv, dslopes] : [dq, dk, dv]
      },
      async check() {
        const gradients = run()
        const read = async (x: Tensor, head: number) =>
          x
            .select(0, b - 1)
            .select(1, head)
            .read({ as: 'float32' })
        const group = hq / hk
        const [ks, vs, dks, dvs] = [
          await read(k, hk - 1),
          await read(v, hk - 1),
          await read(gradients.dk, hk - 1),
          await read(gradients.dv, hk - 1),
        ]
        const scale = 1 / Math.sqrt(d)
        const dot = (x: Float32Array, i: number, y: Float32Array, j: number, n: number) => {
          let sum = 0
          for (let e = 0; e < n; e++) sum += x[i * n + e]! * y[j * n + e]!
          return sum
        }
        const few = (n: number) => [0, Math.floor(n / 3), n - 1]
        const keys = await Promise.all(
          few(last).map(async (t) => ({
            t,
            added: await biasAlong(1, t),
            dk: new Float64Array(d),
            dv: new Float64Array(dv),
          })),
        )
        const largest = { dq: 0, dk: 0, dv: 0 }
        const worst = { dq: 0, dk: 0, dv: 0 }
        const compare = (name: 'dq' | 'dk' | 'dv', exact: Float64Array, got: Float32Array) =>
          exact.forEach((x, e) => {
            largest[name] = Math.max(largest[name], Math.abs(x))
            worst[name] = Math.max(worst[name], Math.abs(x - got[e]!))
          })
        for (let head = hq - group; head < hq; head++) {
          const [qs, os, gs, dqs] = [
            await read(q, head),
            await read(out, head),
            await read(dout, head),
            await read(gradients.dq, head),
          ]
          const ls = await lse
            .select(0, b - 1)
            .select(0, head)
            .read()
          const pair = (row: number, t: number, added: number) => {
            if (!(blocks?.sees(head, row, t) ?? true)) return { p: 0, ds: 0 }
            const [s, slope] = score(head, row, t, dot(qs, row, ks, t, d))
            const dp = dot(gs, row, vs, t, dv)
            if (given.weights === 'sigmoid') {
              const p = 1 / (1 + Math.exp(-s - added))
              return { p, ds: p * (1 - p) * dp * slope * scale }
            }
            const p = Math.exp(s + added - ls[row]!)
            return { p, ds: p * (dp - dot(gs, row, os, row, dv)) * slope * scale }
          }
          for (const row of few(sq)) {
            const dq = new Float64Array(d)
            const added = await biasAlong(0, row)
            for (let [t, end] = sees(row); t < end; t++) {
              const { ds } = pair(row, t, added(t))
              for (let e = 0; e < d; e++) dq[e]! += ds * ks[t * d + e]!
            }
            compare('dq', dq, dqs.subarray(row * d))
          }
          for (const key of keys)
            for (let row = 0; row < sq; row++) {
              const [from, to] = sees(row)
              if (key.t < from || key.t >= to) continue
              const { p, ds } = pair(row, key.t, key.added(row))
              for (let e = 0; e < d; e++) key.dk[e]! += ds * qs[row * d + e]!
              for (let f = 0; f < dv; f++) key.dv[f]! += p * gs[row * dv + f]!
            }
        }
        for (const key of keys) {
          compare('dk', key.dk, dks.subarray(key.t * d))
          compare('dv', key.dv, dvs.subarray(key.t * dv))
        }
        for (const tensor of Object.values(gradients)) tensor?.dispose()
        // where each row sees one key those of q and k are nothing but rounding, and a key may be seen by none
        const least = Math.max(largest.dq, largest.dk, largest.dv) / 300
        const share = (name: 'dq' | 'dk' | 'dv') =>
          worst[name] === 0 ? 0 : worst[name] / Math.max(largest[name], least)
        return Math.max(share('dq'), share('dk'), share('dv'))
      },
    }
  },

  lightning(problem, device) {
    const { dtype, size, flags } = problem
    const [b, h, s, d] = [size('b'), size('h'), size('s'), size('d')]
    const e = size('e', d)
    const make = (seed: number, last: number) => randn([b, s, h, last], { seed, dtype, device })
    const [q, k, v] = [make(1, d), make(2, d), make(3, e)]
    const rates = alibiSlopes(h)
    const slopes = tensor(rates, undefined, { device })
    return {
      inputs: [q, k, v],
      flops: b * h * s * (2 * 64 * (d + e) + 4 * d * e),
      bytes: bytesPerElement[dtype] * b * h * s * (2 * d + 2 * e),
      run: () => [lightning(q, k, v, { slopes }).out],
      ...(flags.has('softmax') && {
        others: { 'our softmax attention': () => both(attention(q, k, v, { causal: true })) },
      }),
      async check() {
        const { out } = lightning(q, k, v, { slopes })
        const rows = (x: Tensor) => x.select(0, b - 1).select(1, h - 1)
        const read = (x: Tensor) => x.read({ as: 'float32' })
        const [qs, ks] = [await read(rows(q)), await read(rows(k))]
        const [vs, os] = [
          await read(rows(v).select(1, e - 1)),
          await read(rows(out).select(1, e - 1)),
        ]
        const decay = Math.exp(-rates[h - 1]!)
        const state = new Float64Array(d)
        let [worst, top] = [0, 0]
        for (let t = 0; t < s; t++) {
          let value = 0
          for (let i = 0; i < d; i++) {
            state[i] = decay * state[i]! + ks[t * d + i]! * vs[t]!
            value += qs[t * d + i]! * state[i]!
          }
          worst = Math.max(worst, Math.abs(value - os[t]!))
          top = Math.max(top, Math.abs(value))
        }
        out.dispose()
        return worst / top
      },
    }
  },

  'lightning.backward'(problem, device) {
    const { dtype, size } = problem
    const [b, h, s, d] = [size('b'), size('h'), size('s'), size('d')]
    const e = size('e', d)
    const make = (seed: number, last: number) => randn([b, s, h, last], { seed, dtype, device })
    const [q, k, v, dout] = [make(1, d), make(2, d), make(3, e), make(4, e)]
    const rates = alibiSlopes(h)
    const slopes = tensor(rates, undefined, { device })
    return {
      inputs: [q, k, v, dout],
      flops: b * h * s * (6 * 64 * (d + e) + 10 * d * e),
      // k, v and dout for dq, then q, k, v and dout for dk and dv
      bytes: bytesPerElement[dtype] * b * h * s * 5 * (d + e),
      run: () => {
        const { dq, dk, dv } = lightningBackward(q, k, v, dout, { slopes })
        return [dq, dk, dv]
      },
      async check() {
        const { dq, dk, dv } = lightningBackward(q, k, v, dout, { slopes })
        const read = (x: Tensor) =>
          x
            .select(0, b - 1)
            .select(1, h - 1)
            .read({ as: 'float32' })
        const [qs, ks, gs, vs] = [await read(q), await read(k), await read(dout), await read(dv)]
        const decay = Math.exp(-rates[h - 1]!)
        const column = e - 1
        const carried = new Float64Array(d)
        let [worst, top] = [0, 0]
        for (let t = s - 1; t >= 0; t--) {
          let value = 0
          for (let i = 0; i < d; i++) {
            carried[i] = decay * carried[i]! + qs[t * d + i]! * gs[t * e + column]!
            value += ks[t * d + i]! * carried[i]!
          }
          worst = Math.max(worst, Math.abs(value - vs[t * e + column]!))
          top = Math.max(top, Math.abs(value))
        }
        for (const gradient of [dq, dk, dv]) gradient.dispose()
        return worst / top
      },
    }
  },

  'lightning.decode'(problem, device) {
    const { dtype, size } = problem
    const [b, h, d] = [size('b'), size('h'), size('d')]
    const e = size('e', d)
    const make = (seed: number, last: number) => randn([b, 1, h, last], { seed, dtype, device })
    const [q, k, v] = [make(1, d), make(2, d), make(3, e)]
    const slopes = tensor(alibiSlopes(h), undefined, { device })
    const states = randn([b, h, d, e], { seed: 4, device })
    const slots = tensor(
      Array.from({ length: b }, (_, i) => i),
      [b],
      { dtype: 'int32', device },
    )
    return {
      inputs: [q, k, v],
      flops: 4 * b * h * d * e,
      bytes: 8 * b * h * d * e,
      run: () => [lightningDecode(q, k, v, states, slots, { slopes }).out],
      async check() {
        const before = await states.select(0, 0).select(0, 0).read()
        const { out } = lightningDecode(q, k, v, states, slots, { slopes })
        const read = (x: Tensor) => x.select(0, 0).select(0, 0).select(0, 0).read({ as: 'float32' })
        const [qs, ks, vs, os] = [await read(q), await read(k), await read(v), await read(out)]
        const decay = Math.exp(-alibiSlopes(h)[0]!)
        let [worst, top] = [0, 0]
        for (let f = 0; f < e; f++) {
          let value = 0
          for (let i = 0; i < d; i++)
            value += qs[i]! * (decay * before[i * e + f]! + ks[i]! * vs[f]!)
          worst = Math.max(worst, Math.abs(value - os[f]!))
          top = Math.max(top, Math.abs(value))
        }
        out.dispose()
        return worst / top
      },
    }
  },

  // A search and attention over what it lists; the search alone with `lists`; with one row a decoder's step, its searches
  // spread over the steps they stand for, and with `offload` keys and values in pinned memory
  hip(problem, device) {
    const { dtype, size, flags } = problem
    const [b, sq, sk, hq, d] = [size('b'), size('sq'), size('sk'), size('hq'), size('d')]
    const hk = size('hk', hq)
    const offload = flags.has('offload')
    const make = (seed: number, s: number, h: number, pinned: boolean) =>
      randn([b, s, h, d], { seed, dtype, device, pinned })
    const [q, k, v] = [make(1, sq, hq, false), make(2, sk, hk, offload), make(3, sk, hk, offload)]
    const staged = flags.has('stages')
    const topK = size('k', staged ? 2048 : 512)
    const window = size('w', staged ? 1024 : 256, 0)
    const sinkTokens = size('n', staged ? 256 : 16, 0)
    const bq = Math.min(64, 2 ** Math.ceil(Math.log2(sq)))
    const block = [bq, size('bk', 2)] as const
    const stride = [Math.min(2, bq), 1] as const
    const budget = { topK, window, sinkTokens }
    const stages = hipStages.map((stage) => ({
      ...stage,
      block: bq,
      stride: Math.min(stage.stride, bq),
    }))
    const options = staged ? { ...budget, stages } : { ...budget, block, stride }
    const searched = staged ? { ...budget, stages: hipStages } : { ...budget, block }
    const decoder = hipDecoder({ ...searched, offload })
    const rows = b * Math.ceil(sq / bq)
    // keys that the searches of a layer multiply, each with the queries that are looked at
    const products = () => {
      if (staged) {
        const chunks = [sk / 256 / (sq > 1 ? 2 : 1), 32768 / 32, 8192 / 8]
        const each = [16, 10, 6].map((perChunk, i) => Math.min(chunks[i]!, sk / 8) * perChunk)
        return each.reduce((sum, keys, i) => sum + keys * Math.max(bq / hipStages[i]!.stride, 1), 0)
      }
      return 2 * topK * Math.max(Math.ceil(Math.log2(sk / topK)), 0) * Math.max(bq / 2, 1)
    }
    const seen = Math.min(topK + window + sinkTokens, sk)
    const lists = flags.has('lists')
    return {
      inputs: [q, k, v],
      flops: rows * hq * 2 * d * products() + (lists ? 0 : 4 * b * sq * hq * seen * d),
      bytes: bytesPerElement[dtype] * b * d * (sq * hq * 2 + (sq > 1 ? sk : seen) * hk * 2),
      run() {
        if (lists) {
          const { index, count } = hipLists(q, k, options)
          return [index, count]
        }
        if (sq === 1) {
          return both(decoder.attend(q, k, v))
        }
        using mask = hip(q, k, options)
        return both(attention(q, k, v, { mask }))
      },
      async check() {
        const { index, count } = hipLists(q, k, options)
        decoder.reset()
        const out =
          sq === 1
            ? decoder.attend(q, k, v).out
            : attention(q, k, v, { mask: hip(q, k, options) }).out
        const read = async (x: Tensor, h: number) =>
          x.select(0, 0).select(1, h).read({ as: 'float32' })
        const last = async (x: Tensor) => x.select(0, 0).select(0, 0).select(0, -1).read()
        const starts = await last(index)
        const [listed = 0] = await last(count.reshape([...count.shape, 1]))
        const size = staged ? 8 : block[1]
        const keys = new Set<number>()
        for (let t = 0; t < sinkTokens; t++) keys.add(t)
        for (let t = Math.max(sk - window, 0); t < sk; t++) keys.add(t)
        for (let i = 0; i < Number(listed); i++)
          for (let j = 0; j < size; j++) keys.add(Number(starts[i]) + j)
        const [qs, ks, vs, os] = [
          await read(q, 0),
          await read(k, 0),
          await read(v, 0),
          await read(out, 0),
        ]
        for (const one of [index, count, out]) one.dispose()
        const row = (x: Float32Array) => x.subarray((sq - 1) * d)
        return rowError(row(qs), ks, vs, row(os), keys)
      },
    }
  },

  // everything of FlexPrefill before the attention
  'flexprefill.select'(problem, device) {
    const { dtype, size } = problem
    const [b, s, hq, hk, d] = [size('b'), size('s'), size('hq'), size('hk'), size('d')]
    // heads of noise are query-aware, those of a seed have columns and diagonals
    const seed = size('seed', 0)
    const noise = (heads: number, its: number) =>
      randn([b, s, heads, d], { seed: its, dtype, device })
    const [q, k] = seed
      ? structured([b, s, hq, hk, d], dtype, device, seed)
      : [noise(hq, 1), noise(hk, 2)]
    const select = () => flexPrefill(q, k, { gamma: 0.95 })
    const [last, blocks] = [Math.min(128, s), Math.ceil(s / 128)]
    return {
      inputs: [q, k],
      // two walks of the last queries over all keys, and the pooled map
      flops: b * hq * (4 * last * s * d + 2 * blocks * blocks * d),
      bytes: q.nbytes + 2 * k.nbytes + (b * hq * blocks * blocks) / 8,
      run() {
        const { blocks } = select()
        return blocks ? [blocks] : []
      },
      // the first block and its own belong to every row
      async check() {
        using mask = select()
        if (!mask.blocks) return 0
        const bits = await mask.blocks.read()
        const [, heads, rows, words] = mask.blocks.shape as [number, number, number, number]
        let missing = 0
        for (let line = 0; line < b * heads * rows; line++) {
          const has = (c: number) => (bits[line * words + (c >> 5)]! >>> (c & 31)) & 1
          missing += 2 - has(0) - has(line % rows)
        }
        return missing
      },
    }
  },

  // from q, k and v to the result
  flexprefill(problem, device) {
    const [options, denseBelow] = [{ gamma: 0.95 }, 8192]
    return selecting(problem, device, (q, k) => flexPrefill(q, k, options), {
      denseBelow,
      attend: (q, k, v) => flexPrefillAttention(q, k, v, { ...options, denseBelow }),
    })
  },
  sampled: (problem, device) => selecting(problem, device, (q, k) => sampled(q, k)),
  xattention: (problem, device) => selecting(problem, device, (q, k) => xattention(q, k)),

  linear(problem, device) {
    const { dtype, size } = problem
    const [m, n, k] = [size('m'), size('n'), size('k')]
    const x = randn([m, k], { seed: 1, dtype, device })
    const weight = randn([n, k], { seed: 2, dtype, device })
    return {
      inputs: [x, weight],
      flops: 2 * m * n * k,
      bytes: bytesPerElement[dtype] * (m * k + n * k + m * n),
      run: () => [linear(x, weight)],
      async check() {
        const out = linear(x, weight)
        const [xs, ws] = [
          await x.select(0, m - 1).read({ as: 'float32' }),
          await weight.select(0, n - 1).read({ as: 'float32' }),
        ]
        const last = (await out.select(0, m - 1).read({ as: 'float32' }))[n - 1]!
        let exact = 0
        for (let i = 0; i < k; i++) exact += xs[i]! * ws[i]!
        out.dispose()
        return Math.abs(last - exact) / Math.sqrt(k)
      },
    }
  },

  norm(problem, device) {
    const { dtype, size } = problem
    const x = randn([size('m'), size('d')], { seed: 1, dtype, device })
    return {
      inputs: [x],
      flops: 4 * x.size,
      bytes: 2 * x.nbytes,
      run: () => [norm(x)],
      async check() {
        const out = norm(x)
        const [xs, os] = [
          await x.select(0, 0).read({ as: 'float32' }),
          await out.select(0, 0).read({ as: 'float32' }),
        ]
        const root = Math.sqrt(xs.reduce((sum, value) => sum + value * value, 0) / xs.length + 1e-5)
        out.dispose()
        return os.reduce((worst, value, i) => Math.max(worst, Math.abs(value - xs[i]! / root)), 0)
      },
    }
  },

  scatter(problem, device) {
    const { dtype, size } = problem
    const [m, d] = [size('m'), size('d')]
    const x = randn([m, d], { seed: 1, dtype, device })
    const to = zeros([m, d], { dtype, device })
    // each row once, far from the one before unless m has a factor of 7
    const places = Array.from({ length: m }, (_, i) => (i * (m % 7 ? 7 ** 5 : 1)) % m)
    const indices = tensor(places, [m], { dtype: 'int32', device })
    const run = () => {
      scatter(to, indices, x)
      return []
    }
    return {
      inputs: [x, to, indices],
      flops: 0,
      bytes: 2 * x.nbytes + indices.nbytes,
      run,
      async check() {
        run()
        const row = (of: Tensor, i: number) => of.select(0, i).read({ as: 'float32' })
        const last = m - 1
        const [wanted, found] = [await row(x, last), await row(to, places[last]!)]
        return found.reduce((worst, value, i) => Math.max(worst, Math.abs(value - wanted[i]!)), 0)
      },
    }
  },

  copy(problem, device) {
    const x = randn([problem.size('n')], { seed: 1, device })
    const to = zeros([problem.size('n')], { device })
    const run = () => {
      to.copyFrom(x)
      return []
    }
    return {
      inputs: [x, to],
      flops: 0,
      bytes: 2 * x.nbytes,
      run,
      async check() {
        run()
        const [copied, given] = [await to.read(), await x.read()]
        return copied.every((value, i) => value === given[i]) ? 0 : 1
      },
    }
  },
}

/** What `npm run bench` measures when no problem is named, by kind of device. */
export const suites: Readonly<Record<'cpu' | 'cuda', readonly string[]>> = {
  cpu: [
    'attention:b1 sq2048 sk2048 hq8 hk8 d64 f32 causal',
    'attention:b1 sq2048 sk2048 hq8 hk8 d64 f32',
    'attention:b1 sq1 sk16384 hq8 hk2 d128 f32',
    'attention:b1 sq4096 sk4096 hq8 hk8 d64 f32 causal blocks128 density0.25 seed1',
    'attention.backward:b1 sq2048 sk2048 hq8 hk8 d64 f32 causal',
    'lightning:b1 h8 s4096 d64 e64 f32',
    'lightning.backward:b1 h8 s4096 d64 e64 f32',
    'lightning.decode:b8 h8 d64 e64 f32',
    'hip:b1 sq4096 sk4096 hq8 hk8 d64 f32',
    'linear:m512 n768 k256 f32',
    'linear:m1 n4096 k4096 f32',
    'norm:m4096 d1024 f32',
  ],
  cuda: [
    'attention:b16 sq1024 sk1024 hq16 hk16 d128 bf16',
    'attention:b4 sq4096 sk4096 hq16 hk16 d128 bf16',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16',
    'attention:b1 sq16384 sk16384 hq16 hk16 d128 bf16',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16',
    'attention:b16 sq1024 sk1024 hq16 hk16 d128 bf16 causal',
    'attention:b4 sq4096 sk4096 hq16 hk16 d128 bf16 causal',
    'attention:b1 sq16384 sk16384 hq16 hk16 d128 bf16 causal',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal',
    'attention:b4 sq4096 sk4096 hq32 hk32 d64 bf16',
    'attention:b1 sq32768 sk32768 hq32 hk32 d64 bf16',
    'attention:b4 sq4096 sk4096 hq32 hk32 d64 bf16 causal',
    'attention:b2 sq8192 sk8192 hq32 hk32 d64 bf16 causal',
    'attention:b1 sq32768 sk32768 hq32 hk32 d64 bf16 causal',
    'attention:b2 sq8192 sk8192 hq8 hk8 d256 bf16',
    'attention:b2 sq8192 sk8192 hq21 hk21 d96 bf16',
    'attention:b2 sq8192 sk8192 hq10 hk10 d192 bf16',
    'attention:b2 sq8192 sk8192 hq8 hk8 d256 bf16 causal',
    'attention:b2 sq8192 sk8192 hq21 hk21 d96 bf16 causal',
    'attention:b2 sq8192 sk8192 hq10 hk10 d192 bf16 causal',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal window1024',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal',
    'attention:b4 sq4096 sk4096 hq16 hk16 d128 bf16 e4m3',
    'attention:b4 sq4096 sk4096 hq16 hk16 d128 bf16 e4m3 causal',
    'attention:b1 sq16384 sk16384 hq16 hk16 d128 bf16 e4m3',
    'attention:b1 sq16384 sk16384 hq16 hk16 d128 bf16 e4m3 causal',
    'attention:b4 sq4096 sk4096 hq32 hk32 d64 bf16 e4m3 causal',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal sigmoid',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal bias',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal slopes',
    'attention:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal reweighted',
    'attention:b1 sq4096 sk4096 hq32 hk32 d128 bf16 causal',
    'attention:b4 sq4096 sk4096 hq32 hk8 d128 bf16 causal page64',
    'attention:b1 sq2048 sk32768 hq32 hk8 d128 bf16 causal page64',
    'attention:b1 sq128 sk8192 hq32 hk8 d128 bf16 causal',
    'attention:b4 sq16 sk8192 hq32 hk8 d128 bf16 causal',
    'attention:b8 sq1 sk32768 hq32 hk8 d128 bf16',
    'attention:b8 sq1 sk32768 hq32 hk8 d128 bf16 page64',
    'attention:b8 sq1 sk32768 hq32 hk8 d128 bf16 e4m3',
    'attention:b32 sq1 sk8192 hq32 hk8 d128 bf16',
    'attention:b32 sq1 sk8192 hq32 hk8 d128 bf16 page16',
    'attention:b1 sq1 sk131072 hq32 hk8 d128 bf16',
    'attention:b64 sq1 sk65536 hq32 hk8 d128 bf16 page64 ragged1',
    'attention:b1 sq1 sk4096 hq32 hk8 d128 bf16 graph',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.5 seed1',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.25 seed1',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.1 seed1',
    'attention:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.05 seed1',
    'attention:b1 sq109632 sk109632 hq7 hk7 d128 bf16 blocks64 top64 seed1',
    'flexprefill.select:b1 s8192 hq32 hk8 d128 bf16',
    'flexprefill.select:b1 s32768 hq32 hk8 d128 bf16',
    'flexprefill.select:b1 s131072 hq32 hk8 d128 bf16',
    'flexprefill.select:b1 s8192 hq32 hk8 d128 bf16 seed1',
    'flexprefill.select:b1 s32768 hq32 hk8 d128 bf16 seed1',
    'flexprefill.select:b1 s131072 hq32 hk8 d128 bf16 seed1',
    'flexprefill:b1 s8192 hq16 hk16 d128 bf16',
    'flexprefill:b1 s32768 hq16 hk16 d128 bf16',
    'flexprefill:b1 s131072 hq16 hk16 d128 bf16',
    'sampled:b1 s8192 hq16 hk16 d128 bf16',
    'sampled:b1 s32768 hq16 hk16 d128 bf16',
    'sampled:b1 s131072 hq16 hk16 d128 bf16',
    'xattention:b1 s32768 hq16 hk16 d128 bf16',
    'xattention:b1 s131072 hq16 hk16 d128 bf16',
    'attention.backward:b4 sq4096 sk4096 hq16 hk16 d128 bf16',
    'attention.backward:b4 sq4096 sk4096 hq16 hk16 d128 bf16 causal',
    'attention.backward:b1 sq16384 sk16384 hq16 hk16 d128 bf16',
    'attention.backward:b1 sq16384 sk16384 hq16 hk16 d128 bf16 causal',
    'attention.backward:b4 sq4096 sk4096 hq32 hk32 d64 bf16',
    'attention.backward:b4 sq4096 sk4096 hq32 hk32 d64 bf16 causal',
    'attention.backward:b1 sq16384 sk16384 hq32 hk32 d64 bf16',
    'attention.backward:b1 sq16384 sk16384 hq32 hk32 d64 bf16 causal',
    'attention.backward:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal',
    'attention.backward:b2 sq8192 sk8192 hq16 hk4 d128 bf16 causal',
    'attention.backward:b2 sq8192 sk8192 hq16 hk16 d128 bf16 causal slopes',
    'attention.backward:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal',
    'attention.backward:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.5 seed1',
    'attention.backward:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.1 seed1',
    'attention.backward:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks128 density0.1 seed1 atomic',
    'attention.backward:b1 sq32768 sk32768 hq16 hk16 d128 bf16 causal blocks64 density0.1 seed1',
    'attention.backward:b4 sq4096 sk4096 hq16 hk16 d128 bf16 atomic',
    'attention.backward:b4 sq4096 sk4096 hq16 hk16 d128 bf16 causal atomic',
    'attention.backward:b1 sq16384 sk16384 hq16 hk16 d128 bf16 atomic',
    'attention.backward:b1 sq16384 sk16384 hq16 hk16 d128 bf16 causal atomic',
    'attention.backward:b4 sq4096 sk4096 hq32 hk32 d64 bf16 atomic',
    'attention.backward:b4 sq4096 sk4096 hq32 hk32 d64 bf16 causal atomic',
    'attention.backward:b2 sq8192 sk8192 hq16 hk4 d128 bf16 causal atomic',
    'lightning:b4 h32 s512 d128 e128 bf16',
    'lightning:b4 h32 s2048 d128 e128 bf16',
    'lightning:b4 h32 s8192 d128 e128 bf16',
    'lightning:b4 h32 s32768 d128 e128 bf16',
    'lightning:b1 h16 s8192 d128 e128 bf16',
    'lightning:b1 h16 s32768 d128 e128 bf16',
    'lightning:b1 h64 s4096 d128 e128 bf16',
    'lightning:b1 h64 s131072 d128 e128 bf16',
    'lightning:b32 h64 s32768 d128 e128 bf16',
    'lightning:b8 h64 s131072 d128 e128 bf16',
    'lightning:b1 h64 s1048576 d128 e128 bf16',
    'lightning:b4 h32 s1024 d128 e128 bf16 softmax',
    'lightning:b4 h32 s2048 d128 e128 bf16 softmax',
    'lightning.backward:b4 h32 s8192 d128 e128 bf16',
    'lightning.backward:b4 h32 s32768 d128 e128 bf16',
    'lightning.backward:b1 h16 s32768 d128 e128 bf16',
    'lightning.decode:b1 h64 d128 e128 bf16 graph',
    'lightning.decode:b16 h64 d128 e128 bf16',
    'lightning.decode:b64 h64 d128 e128 bf16',
    'attention:b1 sq32768 sk32768 hq32 hk8 d128 bf16 causal',
    'attention:b1 sq131072 sk131072 hq32 hk8 d128 bf16 causal',
    'attention:b1 sq1 sk1048576 hq32 hk8 d128 bf16',
    'hip:b1 sq32768 sk32768 hq32 hk8 d128 bf16',
    'hip:b1 sq131072 sk131072 hq32 hk8 d128 bf16',
    'hip:b1 sq1048576 sk1048576 hq32 hk8 d128 bf16',
    'hip:b1 sq131072 sk131072 hq32 hk8 d128 bf16 lists',
    'hip:b1 sq131072 sk131072 hq32 hk8 d128 bf16 stages',
    'hip:b1 sq131072 sk131072 hq32 hk8 d128 bf16 stages lists',
    'hip:b1 sq1 sk131072 hq32 hk8 d128 bf16 stages',
    'hip:b1 sq1 sk131072 hq32 hk8 d128 bf16 stages lists',
    'hip:b1 sq1 sk1048576 hq32 hk8 d128 bf16 stages',
    'hip:b1 sq1 sk1048576 hq32 hk8 d128 bf16 stages offload',
    'linear:m8192 n8192 k8192 bf16',
    'linear:m1 n8192 k8192 bf16',
    'norm:m16384 d4096 bf16',
    'scatter:m65536 d1024 bf16',
  ],
}
