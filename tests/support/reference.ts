import type { FloatDType } from 'heddle'
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
}

type Read = (b: number, row: number, head: number, i: number) => number

/** Reads [b, s, h, d] values. */
export function reader(values: ArrayLike<number>, s: number, h: number, d: number): Read {
  return (b, row, head, i) => values[((b * s + row) * h + head) * d + i]!
}

export interface Reference {
  out: Float64Array
  lse: Float64Array
  /** The same with scores, probabilities and results rounded to the dtype: what plain code would give. */
  plain: Float64Array
  plainLse: Float64Array
  /** The largest score, with every term of its sum taken by magnitude. */
  terms: number
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
    for (let h = 0; h < c.hq; h++) {
      const hk = Math.floor(h / (c.hq / c.hk))
      for (let i = 0; i < sq; i++) {
        const p = sk - sq + i
        const seen: number[] = []
        for (let t = 0; t < sk; t++) {
          if (c.causal && t > p) continue
          if (c.window !== undefined && (t > p || t <= p - c.window)) continue
          seen.push(t)
        }
        for (const rounded of [false, true]) {
          const r = (x: number) => (rounded ? round(x, dtype) : x)
          const accumulated = (x: number) => (rounded ? Math.fround(x) : x)
          const scores = seen.map((t) => {
            let dot = 0
            let size = 0
            for (let e = 0; e < c.d; e++) {
              const term = q(b, i, h, e) * k(b, t, hk, e)
              dot = accumulated(dot + term)
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
          const weights = scores.map((score) => Math.exp(score - top))
          const sum = weights.reduce(
            (a, w) => accumulated(a + w),
            sink === undefined ? 0 : Math.exp(sink - top),
          )
          if (top === Number.NEGATIVE_INFINITY) continue
          const at = (b * c.hq + h) * c.sq + i
          ;(rounded ? plainLse : lse)[at] = rounded
            ? Math.fround(top + Math.log(sum))
            : top + Math.log(sum)
          for (let f = 0; f < c.dv; f++) {
            let value = 0
            seen.forEach((t, j) => {
              value = accumulated(value + r(weights[j]! / sum) * v(b, t, hk, f))
            })
            ;(rounded ? plain : out)[((b * c.sq + i) * c.hq + h) * c.dv + f] = r(value)
          }
        }
      }
    }
  }
  return { out, lse, plain, plainLse, terms: largest }
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
