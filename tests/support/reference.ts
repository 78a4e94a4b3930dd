import type { FloatDType } from 'heddle'
import { rounded as nearest } from './codecs.js'
import type { Random } from './random.js'
import { round } from './rounding.js'

// Textbook float64 versions of the operators, written for clarity alone and apart from everything they test.

export interface AttentionCase {
  b: number
  sq: number
  sk: number
  hq: number
  hk: number
  d: number
  dv: number
  causal: boolean
  window: number | undefined
  scale: number
  softCap: number
  slopes: readonly number[] | undefined
  sink: readonly number[] | undefined
  /** Numbers of q, k and v of each of their heads are multiplied by these. */
  factors?: { q: readonly number[]; k: readonly number[]; v: readonly number[] } | undefined
  /** Whether plain code multiplies values by weights of e4m3, which are lifted by 2^8 for its range. */
  coarse?: boolean
  /** Whether query i of a head sees key t, beside causality and the window; everything if left out. */
  sees?: (b: number, head: number, i: number, t: number) => boolean
}

export type Read = (b: number, row: number, head: number, i: number) => number

/** Reads [b, s, h, d] values. */
export function reader(values: ArrayLike<number>, s: number, h: number, d: number): Read {
  return (b, row, head, i) => values[((b * s + row) * h + head) * d + i]!
}

/** One row of a head. */
const line = (read: Read, b: number, row: number, head: number, n: number) =>
  Float64Array.from({ length: n }, (_, e) => read(b, row, head, e))

export interface Reference {
  out: Float64Array
  lse: Float64Array
  /** The same with scores, probabilities and results rounded to the dtype: what plain code would give. */
  plain: Float64Array
  plainLse: Float64Array
  /** The largest score, with every term of its sum taken by magnitude. */
  terms: number
  /** The epsilon of weights that have fewer digits than the dtype. */
  unit?: number
}

/** `lengths` gives each batch entry its own number of rows and keys. */
export function attentionReference(
  c: AttentionCase,
  q: Read,
  k: Read,
  v: Read,
  dtype: FloatDType,
  lengths: (b: number) => { sq: number; sk: number } = () => c,
): Reference {
  const out = new Float64Array(c.b * c.sq * c.hq * c.dv)
  const plain = new Float64Array(out.length)
  const lse = new Float64Array(c.b * c.hq * c.sq).fill(Number.NEGATIVE_INFINITY)
  const plainLse = new Float64Array(lse.length).fill(Number.NEGATIVE_INFINITY)
  let largest = 0
  for (let b = 0; b < c.b; b++) {
    const { sq, sk } = lengths(b)
    const lines = (read: Read, head: number, n: number) =>
      Array.from({ length: sk }, (_, t) => line(read, b, t, head, n))
    const [keys, values] = [
      Array.from({ length: c.hk }, (_, head) => lines(k, head, c.d)),
      Array.from({ length: c.hk }, (_, head) => lines(v, head, c.dv)),
    ]
    for (let h = 0; h < c.hq; h++) {
      const hk = Math.floor(h / (c.hq / c.hk))
      const factor = (c.factors?.q[h] ?? 1) * (c.factors?.k[hk] ?? 1)
      const factorV = c.factors?.v[hk] ?? 1
      for (let i = 0; i < sq; i++) {
        const p = sk - sq + i
        const query = line(q, b, i, h, c.d)
        const seen: number[] = []
        for (let t = 0; t < sk; t++) {
          if (c.causal && t > p) continue
          if (c.window !== undefined && (t > p || t <= p - c.window)) continue
          if (c.sees && !c.sees(b, h, i, t)) continue
          seen.push(t)
        }
        for (const rounded of [false, true]) {
          const r = (x: number) => (rounded ? round(x, dtype) : x)
          const scores = seen.map((t) => {
            const key = keys[hk]![t]!
            let dot = 0
            let size = 0
            for (let e = 0; e < c.d; e++) {
              const term = factor * query[e]! * key[e]!
              dot = rounded ? Math.fround(dot + term) : dot + term
              size += Math.abs(term)
            }
            largest = Math.max(largest, size * c.scale)
            let score = r(dot) * c.scale
            if (c.softCap > 0) score = c.softCap * Math.tanh(score / c.softCap)
            if (c.slopes) score += c.slopes[h]! * (t - p)
            return r(score)
          })
          const sink = c.sink?.[h]
          const top = Math.max(...scores, sink ?? Number.NEGATIVE_INFINITY)
          if (top === Number.NEGATIVE_INFINITY) continue
          const weights = scores.map((score) => Math.exp(score - top))
          const sum = weights.reduce(
            (a, w) => (rounded ? Math.fround(a + w) : a + w),
            sink === undefined ? 0 : Math.exp(sink - top),
          )
          const at = (b * c.hq + h) * c.sq + i
          ;(rounded ? plainLse : lse)[at] = rounded
            ? Math.fround(top + Math.log(sum))
            : top + Math.log(sum)
          const row = ((b * c.sq + i) * c.hq + h) * c.dv
          const to = (rounded ? plain : out).subarray(row, row + c.dv)
          seen.forEach((t, j) => {
            const weight =
              factorV *
              (rounded && c.coarse
                ? nearest('float8_e4m3fn', 256 * weights[j]!) / 256 / sum
                : r(weights[j]! / sum))
            const value = values[hk]![t]!
            for (let f = 0; f < c.dv; f++) {
              const term = to[f]! + weight * value[f]!
              to[f] = rounded ? Math.fround(term) : term
            }
          })
          if (rounded) for (let f = 0; f < c.dv; f++) to[f] = r(to[f]!)
        }
      }
    }
  }
  return { out, lse, plain, plainLse, terms: largest, ...(c.coarse ? { unit: 2 ** -4 } : {}) }
}

/** Gradients of one call, each as long as its tensor. */
export interface Gradients {
  dq: Float64Array
  dk: Float64Array
  dv: Float64Array
  dsink: Float64Array
  dslopes: Float64Array
}

export interface GradientReference {
  exact: Gradients
  /** With scores, probabilities, their gradients and results rounded to the dtype. */
  plain: Gradients
  /** The largest sum of each gradient, with every term of it taken by magnitude. */
  sizes: Record<keyof Gradients, number>
  /** The largest that rounding out by 1 can change the gradients of q and of k by, typically. */
  noises: { dq: number; dk: number }
  /** The largest score taken so. */
  exponent: number
}

/** Gradients of sum(out * dout), by the chain rule row after row. */
export function attentionGradients(
  c: AttentionCase,
  q: Read,
  k: Read,
  v: Read,
  dout: Read,
  dtype: FloatDType,
  lengths: (b: number) => { sq: number; sk: number } = () => c,
): GradientReference {
  const zeros = (): Gradients => ({
    dq: new Float64Array(c.b * c.sq * c.hq * c.d),
    dk: new Float64Array(c.b * c.sk * c.hk * c.d),
    dv: new Float64Array(c.b * c.sk * c.hk * c.dv),
    dsink: new Float64Array(c.hq),
    dslopes: new Float64Array(c.hq),
  })
  const [exact, plain, size, inherited] = [zeros(), zeros(), zeros(), zeros()]
  let exponent = 0
  for (let b = 0; b < c.b; b++) {
    const { sq, sk } = lengths(b)
    for (let h = 0; h < c.hq; h++) {
      const hk = Math.floor(h / (c.hq / c.hk))
      const keys = Array.from({ length: sk }, (_, t) => line(k, b, t, hk, c.d))
      const values = Array.from({ length: sk }, (_, t) => line(v, b, t, hk, c.dv))
      for (let i = 0; i < sq; i++) {
        const p = sk - sq + i
        const seen: number[] = []
        for (let t = 0; t < sk; t++) {
          if (c.causal && t > p) continue
          if (c.window !== undefined && (t > p || t <= p - c.window)) continue
          if (c.sees && !c.sees(b, h, i, t)) continue
          seen.push(t)
        }
        if (seen.length === 0) continue
        const query = line(q, b, i, h, c.d)
        const gradient = line(dout, b, i, h, c.dv)
        for (const rounded of [false, true]) {
          const r = (x: number) => (rounded ? round(x, dtype) : x)
          const to = rounded ? plain : exact
          const product = (x: Float64Array, y: Float64Array) => {
            let sum = 0
            for (let e = 0; e < x.length; e++) sum += x[e]! * y[e]!
            return sum
          }
          const magnitude = (x: Float64Array, y: Float64Array) => {
            let sum = 0
            for (let e = 0; e < x.length; e++) sum += Math.abs(x[e]! * y[e]!)
            return sum
          }
          const slopes: number[] = []
          const scores = seen.map((t) => {
            let score = r(product(query, keys[t]!)) * c.scale
            if (!rounded) exponent = Math.max(exponent, magnitude(query, keys[t]!) * c.scale)
            let slope = 1
            if (c.softCap > 0) {
              const bent = Math.tanh(score / c.softCap)
              slope = 1 - bent * bent
              score = c.softCap * bent
            }
            slopes.push(slope)
            if (c.slopes) score += c.slopes[h]! * (t - p)
            return r(score)
          })
          const sink = c.sink?.[h]
          const top = Math.max(...scores, sink ?? Number.NEGATIVE_INFINITY)
          const weights = scores.map((score) => Math.exp(score - top))
          const sinkWeight = sink === undefined ? 0 : Math.exp(sink - top)
          const sum = weights.reduce((a, w) => a + w, sinkWeight)
          const out = new Float64Array(c.dv)
          weights.forEach((w, j) => {
            for (let f = 0; f < c.dv; f++) out[f]! += r(w / sum) * values[seen[j]!]![f]!
          })
          for (let f = 0; f < c.dv; f++) out[f] = r(out[f]!)
          const delta = product(out, gradient)
          const deltaSize = magnitude(out, gradient)
          // how far it moves where every number of out is rounded by as much as it may be
          const deltaNoise = Math.hypot(...out.map((x, f) => x * gradient[f]!))
          to.dsink[h]! -= (sinkWeight / sum) * delta
          if (!rounded) size.dsink[h]! += (sinkWeight / sum) * deltaSize
          const atQ = ((b * c.sq + i) * c.hq + h) * c.d
          seen.forEach((t, j) => {
            const weight = r(weights[j]! / sum)
            const dscore = weight * (r(product(gradient, values[t]!)) - delta)
            const dscoreSize = weight * (magnitude(gradient, values[t]!) + deltaSize)
            to.dslopes[h]! += dscore * (t - p)
            if (!rounded) size.dslopes[h]! += dscoreSize * Math.abs(t - p)
            const ds = r(dscore * slopes[j]!)
            const dsSize = dscoreSize * slopes[j]! * Math.abs(c.scale)
            const atK = ((b * c.sk + t) * c.hk + hk) * c.d
            const atV = ((b * c.sk + t) * c.hk + hk) * c.dv
            for (let e = 0; e < c.d; e++) {
              to.dq[atQ + e]! += ds * keys[t]![e]! * c.scale
              to.dk[atK + e]! += ds * query[e]! * c.scale
              if (rounded) continue
              size.dq[atQ + e]! += dsSize * Math.abs(keys[t]![e]!)
              size.dk[atK + e]! += dsSize * Math.abs(query[e]!)
              const noise = Math.abs(weight * slopes[j]! * c.scale) * deltaNoise
              inherited.dq[atQ + e]! += noise * Math.abs(keys[t]![e]!)
              inherited.dk[atK + e]! = Math.hypot(inherited.dk[atK + e]!, noise * query[e]!)
            }
            for (let f = 0; f < c.dv; f++) {
              to.dv[atV + f]! += weight * gradient[f]!
              if (!rounded) size.dv[atV + f]! += Math.abs(weight * gradient[f]!)
            }
          })
        }
      }
    }
  }
  for (const name of ['dq', 'dk', 'dv'] as const)
    plain[name].forEach((x, i) => {
      plain[name][i] = round(x, dtype)
    })
  const most = (x: Float64Array) => x.reduce((a, y) => Math.max(a, y), 0)
  const sizes = {
    dq: most(size.dq),
    dk: most(size.dk),
    dv: most(size.dv),
    dsink: most(size.dsink),
    dslopes: most(size.dslopes),
  }
  const noises = { dq: most(inherited.dq), dk: most(inherited.dk) }
  return { exact, plain, sizes, noises, exponent }
}

export interface LightningCase {
  b: number
  s: number
  hq: number
  hk: number
  hv: number
  hs: number
  d: number
  e: number
  scale: number
  slopes: readonly number[]
}

/** Heads of which some share, and one of each of the sizes. */
export function lightningCase(
  rng: Random,
  sizes: Readonly<Record<'s' | 'd' | 'e', readonly number[]>>,
): LightningCase {
  const few = rng.pick([1, 2, 3])
  const more = few * rng.pick([1, 1, 2, 3])
  const share = rng.pick(['none', 'values', 'queries'] as const)
  const hq = share === 'queries' ? more : few
  const hv = share === 'values' ? more : few
  const hs = share === 'queries' && rng.chance(0.5) ? few : Math.max(hq, hv)
  return {
    b: rng.pick([1, 2]),
    s: rng.pick(sizes.s),
    hq,
    hk: few,
    hv,
    hs,
    d: rng.pick(sizes.d),
    e: rng.pick(sizes.e),
    scale: rng.pick([1, 0.125, -0.7]),
    slopes: Array.from({ length: hs }, () => Math.fround(rng.pick([0, 0.004, 0.1, 0.9, 8, 200]))),
  }
}

/**
 * A case whose results are, of squared inputs, the sums of the squared terms that results of `c` are the sums of: every
 * term is a product of inputs, a scale and a decay.
 */
export const squaredCase = (c: LightningCase): LightningCase => ({
  ...c,
  scale: c.scale ** 2,
  slopes: c.slopes.map((slope) => 2 * slope),
})

export const squaredReads = <R extends readonly Read[]>(reads: R): R =>
  reads.map(
    (read): Read =>
      (...at) =>
        read(...at) ** 2,
  ) as readonly Read[] as R

export const squared = (numbers: ArrayLike<number> | undefined): Float64Array | undefined =>
  numbers && Float64Array.from(numbers, (x) => x ** 2)

/** Computes what most callers never ask for. */
export function lazily<T>(compute: () => T): () => T {
  let result: T | undefined
  return () => {
    result ??= compute()
    return result
  }
}

/** The recurrence, token by token; `segments` lists [batch, first, last + 1, index of its state]. */
export function lightningReference(
  c: LightningCase,
  q: Read,
  k: Read,
  v: Read,
  initial: ArrayLike<number> | undefined,
  segments: readonly (readonly [b: number, from: number, to: number, state: number])[],
): { out: Float64Array; state: Float64Array } {
  const ho = Math.max(c.hq, c.hv)
  const out = new Float64Array(c.b * c.s * ho * c.e)
  const state = new Float64Array(segments.length * c.hs * c.d * c.e)
  for (const [b, from, to, index] of segments) {
    for (let o = 0; o < ho; o++) {
      const head = (heads: number) => Math.floor(o / (ho / heads))
      const hs = head(c.hs)
      const decay = Math.exp(-c.slopes[hs]!)
      const at = (index * c.hs + hs) * c.d * c.e
      const S = Float64Array.from({ length: c.d * c.e }, (_, i) => initial?.[at + i] ?? 0)
      for (let t = from; t < to; t++) {
        for (let i = 0; i < c.d; i++) {
          const key = k(b, t, head(c.hk), i)
          for (let f = 0; f < c.e; f++)
            S[i * c.e + f] = decay * S[i * c.e + f]! + key * v(b, t, head(c.hv), f)
        }
        for (let f = 0; f < c.e; f++) {
          let sum = 0
          for (let i = 0; i < c.d; i++) sum += q(b, t, head(c.hq), i) * S[i * c.e + f]!
          out[((b * c.s + t) * ho + o) * c.e + f] = c.scale * sum
        }
      }
      state.set(S, at)
    }
  }
  return { out, state }
}

export interface LightningGradients {
  dq: Float64Array
  dk: Float64Array
  dv: Float64Array
  dinitial: Float64Array
  dslopes: Float64Array
}

/** The gradients of the sum of out times `dout` and the final state times `dstate`, token by token. */
export function lightningGradients(
  c: LightningCase,
  q: Read,
  k: Read,
  v: Read,
  dout: Read,
  initial: ArrayLike<number> | undefined,
  dstate: ArrayLike<number> | undefined,
  segments: readonly (readonly [b: number, from: number, to: number, state: number])[],
): LightningGradients {
  const ho = Math.max(c.hq, c.hv)
  const dq = new Float64Array(c.b * c.s * c.hq * c.d)
  const dk = new Float64Array(c.b * c.s * c.hk * c.d)
  const dv = new Float64Array(c.b * c.s * c.hv * c.e)
  const dinitial = new Float64Array(segments.length * c.hs * c.d * c.e)
  const dslopes = new Float64Array(c.hs)
  const size = c.d * c.e
  for (const [b, from, to, index] of segments) {
    for (let o = 0; o < ho; o++) {
      const head = (heads: number) => Math.floor(o / (ho / heads))
      const hs = head(c.hs)
      const decay = Math.exp(-c.slopes[hs]!)
      const at = (index * c.hs + hs) * size
      // the states before each token, then the one behind the last
      const states = [Float64Array.from({ length: size }, (_, i) => initial?.[at + i] ?? 0)]
      for (let t = from; t < to; t++) {
        const before = states.at(-1)!
        states.push(
          before.map((x, i) => {
            const row = Math.floor(i / c.e)
            return decay * x + k(b, t, head(c.hk), row) * v(b, t, head(c.hv), i % c.e)
          }),
        )
      }
      // heads that share a state have its gradient once
      const first = o % (ho / c.hs) === 0
      const R = Float64Array.from({ length: size }, (_, i) => (first && dstate?.[at + i]) || 0)
      for (let t = to - 1; t >= from; t--) {
        const [before, after] = [states[t - from]!, states[t - from + 1]!]
        for (let i = 0; i < c.d; i++) {
          for (let f = 0; f < c.e; f++) {
            const gradient = c.scale * dout(b, t, o, f)
            const cell = i * c.e + f
            R[cell] = R[cell]! + gradient * q(b, t, head(c.hq), i)
            const atK = ((b * c.s + t) * c.hk + head(c.hk)) * c.d + i
            const atQ = ((b * c.s + t) * c.hq + head(c.hq)) * c.d + i
            const atV = ((b * c.s + t) * c.hv + head(c.hv)) * c.e + f
            dq[atQ] = dq[atQ]! + gradient * after[cell]!
            dk[atK] = dk[atK]! + R[cell]! * v(b, t, head(c.hv), f)
            dv[atV] = dv[atV]! + R[cell]! * k(b, t, head(c.hk), i)
            dslopes[hs] = dslopes[hs]! - decay * R[cell]! * before[cell]!
            R[cell] = decay * R[cell]!
          }
        }
      }
      for (let i = 0; i < size; i++) dinitial[at + i] = dinitial[at + i]! + R[i]!
    }
  }
  return { dq, dk, dv, dinitial, dslopes }
}
