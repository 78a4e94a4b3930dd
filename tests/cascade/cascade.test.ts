import { type Cascade, cascade, definitions, HeddleError } from 'heddle'
import { describe, expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { thrown } from '../support/failure.js'
import { random } from '../support/random.js'
import { attentionReference } from '../support/reference.js'

const threePass = `
  QK[m,p] = sum(e) Q[e,p] * K[e,m] * scale   where m <= p + off
  GM[p]   = max(m) QK[m,p]
  SN[m,p] = exp(QK[m,p] - GM[p])
  SD[p]   = sum(m) SN[m,p]
  A[m,p]  = SN[m,p] / SD[p]
  AV[f,p] = A[m,p] * V[f,m]`
const twoPass = `
  QK[m,p] = sum(e) Q[e,p] * K[e,m] * scale   where m <= p + off
  GM[p]   = max(m) QK[m,p]
  SN[m,p] = exp(QK[m,p] - GM[p])
  SD[p]   = sum(m) SN[m,p]
  AV[f,p] = sum(m) SN[m,p] * V[f,m] / SD[p]`
const onePass = `
  split m -> (m1, m0 : 8) tail mask
  init BK[e,m1,m0] = K[e, m1*M0 + m0];   init BV[f,m1,m0] = V[f, m1*M0 + m0]
  init RM[m1=0,p] = -inf;   init RD[m1=0,p] = 0;   init RNV[f,m1=0,p] = 0
  iterate m1 {
    BQK[m1,m0,p]  = sum(e) Q[e,p] * BK[e,m1,m0] * scale   where m1*M0 + m0 <= p + off
    LM[m1,p]      = max(m0) BQK[m1,m0,p]
    RM[m1+1,p]    = max(RM[m1,p], LM[m1,p])
    SLN[m1,m0,p]  = exp(BQK[m1,m0,p] - RM[m1+1,p])
    PRM[m1,p]     = exp(RM[m1,p] - RM[m1+1,p])
    SLD[m1,p]     = sum(m0) SLN[m1,m0,p]
    SLNV[f,m1,p]  = sum(m0) SLN[m1,m0,p] * BV[f,m1,m0]
    RD[m1+1,p]    = SLD[m1,p] + RD[m1,p] * PRM[m1,p]
    RNV[f,m1+1,p] = SLNV[f,m1,p] + RNV[f,m1,p] * PRM[m1,p]
  }
  AV[f,p] = RNV[f,M1,p] / RD[M1,p]`

describe('attention cascades', () => {
  it.each([
    ['three passes', threePass],
    ['two passes', twoPass],
    ['one pass', onePass],
  ])('%s', (_, text) => {
    const attention = cascade(text)
    const rng = random(60)
    for (const [m, p] of [
      [1, 1],
      [5, 9],
      [9, 5],
      [8, 8],
      [24, 3],
      [17, 20],
    ] as const) {
      const [e, f] = [4, 3]
      const array = (shape: number[]) => ({
        data: rng.normals(shape.reduce((a, b) => a * b, 1)),
        shape,
      })
      const [Q, K, V] = [array([e, p]), array([e, m]), array([f, m])]
      const { AV } = attention.evaluate({ Q, K, V }, { scale: 0.5, off: m - p })
      const at = (x: typeof Q) => (_b: number, row: number, _h: number, i: number) =>
        x.data[i * x.shape[1]! + row]!
      const c = {
        b: 1,
        sq: p,
        sk: m,
        hq: 1,
        hk: 1,
        d: e,
        dv: f,
        causal: true,
        window: undefined,
        scale: 0.5,
        softCap: 0,
        slopes: undefined,
        sink: undefined,
      }
      const { out } = attentionReference(c, at(Q), at(K), at(V), 'float32')
      const turned = Float64Array.from(
        { length: f * p },
        (_, i) => out[(i % p) * f + Math.floor(i / p)]!,
      )
      expect(AV!.shape).toEqual([f, p])
      expect(maxError(AV!.data, turned), `${m} ${p}`).toBeLessThan(1e-12)
    }
  })
})

const localMax = `
  split m -> (m1, m0 : 8) tail mask
  BQK[m1,m0,p] = sum(e) Q[e,p] * K[e, m1*M0 + m0] * scale
  LM[m1,p]     = max(m0) BQK[m1,m0,p]
  SLN[m1,m0,p] = exp(BQK[m1,m0,p] - LM[m1,p])
  SLD[m1,p]    = sum(m0) SLN[m1,m0,p]
  GM[p]        = max(m1) LM[m1,p]
  PLM[m1,p]    = exp(LM[m1,p] - GM[p])
  SD[p]        = sum(m1) SLD[m1,p] * PLM[m1,p]
  A[m1,m0,p]   = SLN[m1,m0,p] * PLM[m1,p] / SD[p]
  AV[f,p]      = sum(m1,m0) A[m1,m0,p] * V[f, m1*M0 + m0]`
const splitKV = `
  split m -> (m1, m0 : 8) tail mask
  BQK[m1,m0,p] = sum(e) Q[e,p] * K[e, m1*M0 + m0] * scale
  LM[m1,p]     = max(m0) BQK[m1,m0,p]
  SLN[m1,m0,p] = exp(BQK[m1,m0,p] - LM[m1,p])
  SLD[m1,p]    = sum(m0) SLN[m1,m0,p]
  LNV[f,m1,p]  = sum(m0) SLN[m1,m0,p] * V[f, m1*M0 + m0]
  GM[p]        = max(m1) LM[m1,p]
  PLM[m1,p]    = exp(LM[m1,p] - GM[p])
  SD[p]        = sum(m1) SLD[m1,p] * PLM[m1,p]
  NV[f,p]      = sum(m1) LNV[f,m1,p] * PLM[m1,p]
  AV[f,p]      = NV[f,p] / SD[p]`

describe('partitioned forms', () => {
  const dense = (text: string) => text.replace(/ +where .*/g, '')
  const rng = random(61)
  const array = (shape: number[], change: (x: number) => number = (x) => x) => ({
    data: Float64Array.from(rng.normals(shape.reduce((a, b) => a * b, 1)), change),
    shape,
  })

  it.each([1, 7, 8, 9, 23, 40])(
    'agree with the plain one where no mask hides the tail: M = %d',
    (m) => {
      const [Q, K, V] = [array([4, 5]), array([4, m]), array([3, m])]
      const plain = cascade(dense(threePass)).evaluate({ Q, K, V }, { scale: 0.5 }).AV!
      for (const text of [dense(onePass), localMax, splitKV]) {
        const { AV } = cascade(text).evaluate({ Q, K, V }, { scale: 0.5 })
        expect(maxError(AV!.data, plain.data)).toBeLessThan(1e-12)
      }
    },
  )

  it('agree where scores are -inf and where a row sees nothing', () => {
    const m = 21
    const Q = array([1, 6], Math.abs)
    const hidden = rng.below(m)
    const K = array([1, m])
    const bias = { data: new Float64Array(m), shape: [m] }
    bias.data[hidden] = Number.NEGATIVE_INFINITY
    const V = array([3, m])
    const some = { data: Float64Array.from({ length: 6 }, (_, p) => (p === 2 ? 0 : m)), shape: [6] }
    const masked = (text: string) =>
      text.includes('split')
        ? dense(text).replace(
            /(BQK.*\* scale)/,
            '$1 + bias[m1*M0 + m0]   where m1*M0 + m0 < some[p]',
          )
        : dense(text).replace(/(QK.*\* scale)/, '$1 + bias[m]   where m < some[p]')
    const run = (text: string) =>
      cascade(masked(text)).evaluate({ Q, K, V, bias, some }, { scale: 0.5 }).AV!.data
    const plain = run(threePass)
    expect([0, 1, 2].map((f) => plain[f * 6 + 2])).toEqual([0, 0, 0])
    for (const text of [onePass, localMax, splitKV])
      expect(maxError(run(text), plain)).toBeLessThan(1e-12)
  })
})

describe('semantics', () => {
  const one = (
    text: string,
    inputs: Record<string, number[]> = {},
    scalars: Record<string, number> = {},
    sizes = {},
  ) => {
    const arrays = Object.fromEntries(
      Object.entries(inputs).map(([name, data]) => [name, { data, shape: [data.length] }]),
    )
    const results = cascade(text).evaluate(arrays, scalars, { sizes })
    return Object.fromEntries(Object.entries(results).map(([name, { data }]) => [name, [...data]]))
  }

  it('sums what is absent on the left', () => {
    expect(one('Y = A[k] * B[k]', { A: [1, 2, 3], B: [4, 5, 6] })).toEqual({ Y: [32] })
    expect(one('Y[i,j] = A[i] * B[j]', { A: [1, 2], B: [3, 4] })).toEqual({ Y: [3, 4, 6, 8] })
  })

  it('reduces by every reducer', () => {
    const A = [1, -2, 3]
    expect(one('Y = max(k) A[k]', { A })).toEqual({ Y: [3] })
    expect(one('Y = min(k) A[k]', { A })).toEqual({ Y: [-2] })
    expect(one('Y = prod(k) A[k]', { A })).toEqual({ Y: [-6] })
    expect(one('Y = sum(k) -A[k]', { A })).toEqual({ Y: [-2] })
    expect(one('Y = logsumexp(k) A[k]', { A }).Y![0]).toBeCloseTo(
      Math.log(Math.exp(1) + Math.exp(-2) + Math.exp(3)),
      12,
    )
  })

  it('tells the function max from the reducer', () => {
    expect(one('Y[k] = max(A[k], 0)', { A: [1, -2] })).toEqual({ Y: [1, 0] })
    expect(one('Y[k] = max(A[k], B[k]) - 1', { A: [1, -2], B: [0, 5] })).toEqual({ Y: [0, 4] })
  })

  it('gives identities where nothing is visible, and skips empty coordinates', () => {
    expect(one('Y[p] = max(m) A[m] where m < p - 1', { A: [5, 6] }, {}, { P: 4 })).toEqual({
      Y: [Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY, 5, 6],
    })
    expect(one('B[m] = A[m] where m > 0\nY = sum(m) B[m] + 10', { A: [5, 6] })).toEqual({ Y: [16] })
    expect(one('B[m] = A[m] where m > 0', { A: [5, 6] })).toEqual({ B: [0, 6] })
  })

  it('knows the conventions for infinities and zeros', () => {
    expect(
      one('Y = sum(k) exp(A[k] - B[k])', {
        A: [Number.NEGATIVE_INFINITY],
        B: [Number.NEGATIVE_INFINITY],
      }),
    ).toEqual({ Y: [0] })
    expect(one('Y[k] = A[k] / B[k]', { A: [0, 1], B: [0, 0] })).toEqual({
      Y: [0, Number.POSITIVE_INFINITY],
    })
  })

  it('runs iterations, reads the last index under a rank, and shifts', () => {
    const sums = 'init S[i=0] = 0\niterate i {\n S[i+1] = S[i] + A[i]\n}\nZ = S[I]'
    expect(one(sums, { A: [1, 2, 3, 4] })).toEqual({ Z: [10] })
    expect(one('D[i] = A[i] - A[clamp(i - 1, 0, 100)]', { A: [1, 4, 9] })).toEqual({ D: [0, 3, 5] })
    expect(one('L = A[K] where 1 <= 2\nY[k] = A[k] * L', { A: [1, 2, 3] })).toEqual({
      Y: [3, 6, 9],
    })
  })

  it('compares documents, chooses by if, takes scalars', () => {
    expect(
      one('Y[p] = sum(m) A[m] where doc[m] == doc[p] && m <= p', {
        A: [1, 2, 4, 8],
        doc: [0, 0, 1, 1],
      }),
    ).toEqual({ Y: [1, 3, 4, 12] })
    expect(one('Y[k] = if(k < n && !(k == 0), 1, 2) * A[k]', { A: [1, 1, 1] }, { n: 2 })).toEqual({
      Y: [2, 1, 2],
    })
  })

  it('computes its functions', () => {
    const x = [-1.5, 0, 0.3, 3]
    const { Y } = one('Y[k] = erf(A[k])', { A: x })
    ;[-0.9661051464753108, 0, 0.3286267594591274, 0.9999779095030014].forEach((value, i) =>
      expect(Y![i]).toBeCloseTo(value, 14),
    )
    const all = one(
      'Y[k] = softplus(A[k]) + relu(A[k]) + rsqrt(4) + pow(2, 3) + exp2(1) + log1p(0) + abs(A[k]) + min(A[k], 1)',
      { A: [-1] },
    )
    expect(all.Y![0]).toBeCloseTo(Math.log1p(Math.exp(-1)) + 0 + 0.5 + 8 + 2 + 0 + 1 - 1, 12)
  })

  it('is lightning attention when written as a recurrence', () => {
    const text = `
      init S[t=0,e,f] = 0
      iterate t {
        S[t+1,e,f] = exp(-slope) * S[t,e,f] + K[t,e] * V[t,f]
        O[t,f]     = sum(e) Q[t,e] * S[t+1,e,f]
      }`
    const ones = { data: new Float64Array(5).fill(1), shape: [5, 1] }
    const { O } = cascade(text).evaluate({ Q: ones, K: ones, V: ones }, { slope: 0.1 })
    const decay = Math.exp(-0.1)
    O!.data.forEach((value, t) =>
      expect(value).toBeCloseTo((1 - decay ** (t + 1)) / (1 - decay), 12),
    )
  })

  it('keeps what is asked for, and lists inputs, outputs and scalars', () => {
    const parsed: Cascade = cascade(twoPass)
    expect(parsed.ir.inputs).toEqual(['Q', 'K', 'V'])
    expect(parsed.ir.outputs).toEqual(['AV'])
    expect(parsed.ir.scalars).toEqual(['scale', 'off'])
    const X = { data: [1, 2], shape: [2] }
    expect(
      Object.keys(cascade('A[k] = X[k]\nB = A[k]').evaluate({ X }, {}, { keep: ['A'] })),
    ).toEqual(['B', 'A'])
  })

  it('takes a name that is neither tensor, variable nor rank as a scalar, capital or not', () => {
    expect(one('Y[k] = A[k] * Cap + K', { A: [1, 2] }, { Cap: 3 })).toEqual({ Y: [5, 8] })
  })

  it('tells the size of a rank from a tensor of that name, and reads along another rank as far as it goes', () => {
    const N = { data: [1, 2, 6], shape: [3] }
    expect(cascade('Y[n] = N[n] / N').evaluate({ N }).Y!.data).toEqual(
      Float64Array.of(1 / 3, 2 / 3, 2),
    )
    const made = cascade('N[n] = X[n] * 2\nY = sum(n) N[n] / N')
    expect(made.ir.outputs).toEqual(['Y'])
    expect(made.evaluate({ X: N }).Y!.data).toEqual(Float64Array.of(6))
    const pairs = cascade('K[n] = X[n] * 2\nY[n] = sum(u) K[n] * K[u]')
    expect(pairs.evaluate({ X: N }).Y!.data).toEqual(Float64Array.of(36, 72, 216))
    expect(pairs.analyze({ sizes: { N: 4 } }).flops[1]!.mulAdd).toBe(32)
  })

  it('reads nothing between two coordinates', () => {
    expect(one('Y[k] = A[k / 2]', { A: [3, 4] }, {}, { K: 4 })).toEqual({ Y: [3, 0, 4, 0] })
  })

  it('reads over a byte order mark', () => {
    expect(one('\ufeffY = sum(k) A[k]', { A: [1, 2] })).toEqual({ Y: [3] })
  })

  it('works as a tag', () => {
    expect(
      cascade`Y = max(k) max(A[k], ${-Infinity})`.evaluate({ A: { data: [2], shape: [1] } }).Y!
        .data[0],
    ).toBe(2)
    expect(cascade`Y[k] = A[k] * ${3}`.evaluate({ A: { data: [2], shape: [1] } }).Y!.data[0]).toBe(
      6,
    )
  })
})

describe('errors', () => {
  const X = (shape: number[]) => ({
    data: new Float64Array(shape.reduce((a, b) => a * b, 1)),
    shape,
  })
  it.each([
    [
      'CAS001',
      'A[k] = B[k]\nC[k] = A[k]\nSN[m,p] exp(A[m])',
      "cascade: line 3: expected '=' after 'SN[m,p]'",
      [3, 9, 3],
    ],
    ['CAS001', 'A[k] = B[k', "cascade: line 1: expected ']' after 'k'", [1, 11, 0]],
    ['CAS001', 'A[k] = B[k] $ 2', "cascade: line 1: unexpected '$'", [1, 13, 1]],
    [
      'CAS001',
      'A = nope(B[k])',
      "cascade: line 1: 'nope' is no function (exp, exp2, log, log1p, tanh, sigmoid, relu, softplus, pow, max, min, abs, sqrt, rsqrt, erf, sin, cos)",
      [1, 5, 4],
    ],
    ['CAS001', 'A = pow(B)', 'cascade: line 1: pow takes 2 arguments, got 1', [1, 5, 3]],
    ...['log(sum(m) B[m])', '2 * sum(m) B[m]'].map(
      (right) =>
        [
          'CAS001',
          `A = ${right}`,
          "cascade: line 1: 'sum' begins a right-hand side, as in sum(m) S[p,m], and takes all of it; give it a statement of its own",
          [1, 9, 3],
        ] as const,
    ),
    ['CAS001', '', 'cascade: line 1: expected a statement', [1, 1, 0]],
    [
      'CAS002',
      'A[m] = K[e,m]\nB[m] = K[m]',
      'cascade: K has ranks [e,m] on line 1 but is read as [m] on line 2',
      [2, 8, 4],
    ],
    [
      'CAS002',
      'A[m] = K[e,m]\nB[m] = K[m,e]',
      'cascade: K has ranks [e,m] on line 1 but is read as [m,e] on line 2',
      [2, 8, 6],
    ],
    [
      'CAS004',
      'B[m] = A[m]\nA[m] = K[m]',
      'cascade: A is read on line 1 before it is produced',
      [1, 8, 4],
    ],
    [
      'CAS004',
      'A[m] = K[m]\nA[m] = L[m]',
      'cascade: A is produced on line 1 and again on line 2',
      [2, 1, 4],
    ],
    [
      'CAS005',
      'S[p] = sum(m) A[m] * R[p + off - m]',
      'cascade: off is neither on the left of S nor reduced by sum(m); in brackets lower case is an index variable, a number of the call has a capital there',
      [1, 1, 4],
    ],
    [
      'CAS004',
      'Y[n] = X[n] / D\nD = sum(n) X[n]',
      'cascade: D is read on line 1 before it is produced',
      [1, 15, 1],
    ],
    ['CAS005', 'AV[f] = A[m]', 'cascade: f appears on the left of AV but in no operand', [1, 1, 5]],
    [
      'CAS007',
      'iterate i {\nS[i+1] = S[i] + A[i]\n}',
      'cascade: S is iterative over i but has no init; add init S[…i=0…]',
      [2, 1, 6],
    ],
    ...['i=1', 'j=0'].map(
      (start) =>
        [
          'CAS007',
          `init S[${start}] = 5\niterate i {\nS[i+1] = S[i] + A[i]\n}`,
          `cascade: S starts at ${start}; an iterative tensor over i starts at i=0`,
          [1, 6, 6],
        ] as const,
    ),
    [
      'CAS007',
      'init S[i=0] = 0\niterate i {\nS[i+2] = S[i] + A[i]\n}',
      'cascade: S is written at i+2; an iterative tensor is written at i+1',
      [3, 1, 6],
    ],
    [
      'CAS007',
      'init S[i=0] = 0\niterate i {\nS[i+1] = S[i+2] + A[i]\n}',
      'cascade: S is read at i+2, which is not there yet; at most i+1 is',
      [3, 10, 6],
    ],
    [
      'CAS004',
      'init S[i=0] = 0\niterate i {\nZ[i] = S[i+1]\nS[i+1] = S[i] + A[i]\n}',
      'cascade: S is read on line 3 before it is produced',
      [3, 8, 6],
    ],
    [
      'CAS007',
      'init S[i=0] = 0\niterate i {\nS[i+1] = S[I] + A[i]\n}',
      'cascade: S is read at I inside iterate i, where its last value is not there yet; read it after the iteration',
      [3, 10, 4],
    ],
    [
      'CAS007',
      'iterate i {\nS[2 * i] = A[i]\n}',
      'cascade: S is written at an index that is neither a plain variable nor i+1',
      [2, 1, 8],
    ],
    [
      'CAS007',
      'iterate i {\ninit S[i=0] = 0\nS[i+1] = S[i] + A[i]\n}',
      'cascade: init of S stands inside iterate i, where it would run at every step; put it in front',
      [2, 6, 6],
    ],
    [
      'CAS008',
      'rank M = 1000\nsplit m -> (m1, m0 : 128)\nY[m1] = sum(m0) K[m1*M0 + m0]',
      'cascade: split m by 128 with M=1000: add "tail mask"',
      [2, 1, 5],
    ],
    [
      'CAS001',
      'split m -> (m, m0 : 8)\nY = K[m]',
      'cascade: line 1: split m needs three different variables, got m, m and m0',
      [1, 1, 5],
    ],
    [
      'CAS004',
      'split m -> (a, b : 8)\nsplit m -> (c, d : 8)\nY = K[a*8 + b]',
      'cascade: m is split on line 1 and again on line 2',
      [2, 1, 5],
    ],
    [
      'CAS010',
      'S[m] = A[m]\nB[m] = A[m] where S[m] > 0',
      'cascade: masks must be decidable from indices and integer tensors',
      [2, 19, 4],
    ],
    [
      'CAS011',
      'A[m] = B[m]\nB[m] = A[m]',
      'cascade: B -> A -> B depend on each other without an iterative rank',
      [1, 8, 4],
    ],
    [
      'CAS001',
      'A[k] = nope(k) B[k]',
      "cascade: line 1: 'nope' is no reducer (sum, max, min, prod, logsumexp)",
      [1, 8, 4],
    ],
    [
      'CAS001',
      'split M -> (m1, m0 : 8)\nY = K[m]',
      "cascade: line 1: 'M' must start with a lower-case letter to be an index variable",
      [1, 7, 1],
    ],
    ...['Y[i] = where[m] * A[i,m]', 'rank where = 2; Y[i] = A[i]', 'Y[i] = A[where]'].map(
      (text) =>
        [
          'CAS001',
          text,
          "cascade: line 1: 'where' begins a predicate and is no name",
          [1, text.indexOf('where') + 1, 5],
        ] as const,
    ),
    ...['__proto__', 'constructor'].map(
      (name) =>
        [
          'CAS001',
          `${name}[i] = X[i]`,
          `cascade: line 1: '${name}' cannot be a name`,
          [1, 1, name.length],
        ] as const,
    ),
    [
      'CAS001',
      'split m -> (m1, m0 : 0)\nY = K[m]',
      'cascade: line 1: split sizes must be at least 1, got 0',
      [1, 1, 5],
    ],
    [
      'CAS001',
      `Y[m] = ${'('.repeat(300)}K[m]${')'.repeat(300)}`,
      'cascade: line 1: expressions nest more than 200 deep',
      [1, 208, 1],
    ],
    [
      'CAS003',
      'rank M = 4\nrank M = 5\nY[m] = K[m]',
      'cascade: rank M is 4 but is declared as 5 on line 2',
      [2, 6, 1],
    ],
    [
      'CAS003',
      'rank M = ?\nrank M = 5\nY[m] = K[m]',
      'cascade: rank M is ? but is declared as 5 on line 2',
      [2, 6, 1],
    ],
    [
      'CAS004',
      'split m -> (a, b : 8)\nsplit n -> (a, c : 8)\nY = K[a*8 + b]',
      'cascade: a is part of a split on line 1 and again on line 2',
      [2, 1, 5],
    ],
    [
      'CAS005',
      'O[m] = sum(m) A[m]',
      'cascade: m is reduced on the right of O but stands on its left',
      [1, 1, 4],
    ],
    [
      'CAS005',
      'O[m] = sum(k) A[m,k] * B[j]',
      'cascade: j is neither on the left of O nor reduced by sum(k)',
      [1, 1, 4],
    ],
    [
      'CAS007',
      'O[m+1] = A[m]',
      'cascade: O is written at an index that is no plain variable; only iterative tensors are, inside iterate',
      [1, 1, 6],
    ],
    [
      'CAS011',
      'split m -> (a, b : 8)\nsplit a -> (m, c : 8)\nY = K[m]',
      'cascade: m -> a -> m split each other; the parts of a split need new names',
      [1, 1, 5],
    ],
  ] as const)('%s in %j', (code, text, message, span) => {
    const error = thrown(() => cascade(text))
    expect(error.code).toBe(code)
    expect(error.message).toBe(message)
    expect(error.span).toEqual(span)
    expect(error.op).toBe('cascade')
  })

  it.each([
    [
      'CAS003',
      'Y = K[m] * V[m]',
      { K: X([4]), V: X([8]) },
      'cascade: rank M is 4 from K but 8 from V',
    ],
    [
      'CAS003',
      'rank M = 5\nY = K[m]',
      { K: X([4]) },
      'cascade: rank M is 5 from its declaration but 4 from K',
    ],
    [
      'CAS008',
      'split m -> (m1, m0 : 128)\nY[m1] = sum(m0) K[m1*M0 + m0]',
      { K: X([1000]) },
      'cascade: split m by 128 with M=1000: add "tail mask"',
    ],
    [
      'CAS010',
      'Y = K[m] where D[m] > 0',
      { K: X([1]), D: { data: [0.5], shape: [1] } },
      'cascade: masks must be decidable from indices and integer tensors',
    ],
    [
      'CAS012',
      'Y[a,b] = A[a] * B[b]',
      { A: X([50000]), B: X([50000]) },
      'cascade: Y has 2.5e9 points, the limit is 1e9; raise maxPoints or shrink A',
    ],
    [
      'CAS002',
      'Y = K[m]',
      { K: X([2, 3]) },
      'cascade: K has 1 ranks on line 1 but was given with 2',
    ],
    [
      'CAS003',
      'Y = K[m]',
      { K: { data: [1, 2], shape: [3] } },
      'cascade: K has 2 numbers for shape [3]',
    ],
    ...[3, [1, 2], { data: [1] }, { shape: [1] }].map(
      (K) =>
        [
          'CAS003',
          'Y = K[m]',
          { K },
          `cascade: K must be an object of data and shape, got ${K === 3 ? 3 : Array.isArray(K) ? 'an array of 2' : 'an object'}`,
        ] as const,
    ),
    ...[
      [0.5, 2],
      [-1, -1],
    ].map(
      (shape) =>
        [
          'CAS003',
          'Y = K[m,n]',
          { K: { data: [1], shape } },
          `cascade: K must have a shape of integers at least 0, got ${shape[0]}`,
        ] as const,
    ),
    ['CAS003', 'Y[n] = K[m] * n', { K: X([1]) }, 'cascade: rank N has no size; give it in sizes'],
    ['CAS004', 'Y = K[m]', {}, 'cascade: tensor K was not given'],
    ['CAS004', 'Y = K[m] * s', { K: X([1]) }, 'cascade: scalar s was not given'],
  ] as const)('%s when evaluating %j', (code, text, inputs, message) => {
    const error = thrown(() =>
      cascade(text).evaluate(inputs as Record<string, ReturnType<typeof X>>),
    )
    expect(error.code).toBe(code)
    expect(error.message).toBe(message)
    expect(error.span).toHaveLength(3)
  })

  it('takes sizes of ranks only', () => {
    const evaluate = (sizes: Record<string, number>) =>
      cascade('Y[i] = X[i] * s').evaluate({ X: X([2]) }, { s: 1 }, { sizes })
    expect(thrown(() => evaluate({ s: 7 })).message).toContain('unknown size "s"')
    expect(thrown(() => evaluate({ II: 7 })).message).toBe(
      'cascade: unknown size "II"; did you mean "I"?',
    )
  })

  it('finds what is read too early in a long text written from its result down', () => {
    const lines = Array.from(
      { length: 5000 },
      (_, k) => `A${k}[i] = A${k + 1}[i] + B${k + 1}[i]\nB${k}[i] = A${k + 1}[i] * B${k + 1}[i]`,
    )
    const text = `Y[i] = A0[i] + B0[i]\n${lines.join('\n')}`
    expect(thrown(() => cascade(text)).message).toBe(
      'cascade: A0 is read on line 1 before it is produced',
    )
    const closed = text.replaceAll('A5000[i] *', 'Y[i] *')
    expect(thrown(() => cascade(closed)).code).toBe('CAS011')
  })

  it('names tensors to keep that there are none of', () => {
    const error = thrown(() => cascade('Y = K[m]').evaluate({ K: X([1]) }, {}, { keep: ['YY'] }))
    expect(error.message).toBe('cascade: unknown tensor "YY"; did you mean "Y"?')
    for (const keep of [3, 'Y', [3]] as never[]) {
      const { code, message } = thrown(() =>
        cascade('Y = K[m]').evaluate({ K: X([1]) }, {}, { keep }),
      )
      expect(code).toBe('ERR_ARGUMENT')
      expect(message).toContain('cascade: keep must be a list of tensors, got ')
    }
  })
})

describe('text', () => {
  const samples = [
    threePass,
    twoPass,
    onePass,
    'Y[p] = sum(m) if(m < p || !(m == 3), A[m] - (B[m] - 1) / 2, -A[clamp(m - p, -5, 5)]) where (m + 1) * 2 <= p && (m > 0 || p > 1)',
    'rank M = ?\nrank P = 7\nY[p] = logsumexp(m) -A[m] * Q[p]',
    'Y[p] = max(a,b) (-A[a,b] * Q[p])\nZ[p] = max(Y[p], 1) - -Y[p] / 1e-30',
    localMax,
    splitKV,
    // what is computed before an operator and behind it
    `X[h,p,c] = sum(e) Q[h,p,e] * WK[h,c,e]
    S[h,p,m] = sum(c) X[h,p,c] * KV[m,c]                where m <= p + off
    A[h,p,m] = exp(S[h,p,m])
    D[h,p] = sum(m) A[h,p,m]
    L[h,p,c] = sum(m) A[h,p,m] * KV[m,c] / D[h,p]
    O[h,p,f] = sum(c) L[h,p,c] * WV[h,c,f]`,
    `C = sum(i) X[i] - 1
    init S[t=0,h,e,f] = 0
    iterate t {
      S[t+1,h,e,f] = 0.9 * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
      Y[h,t,f] = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      N[h,t] = sum(f) Y[h,t,f] * Y[h,t,f]
      O[h,t,f] = Y[h,t,f] * rsqrt(N[h,t] / F + C)
    }`,
  ]

  it.each(samples)('prints what parses back: %#', (text) => {
    const printed = cascade(text).toString()
    expect(cascade(printed).toString()).toBe(printed)
    const shape = (ir: unknown) =>
      JSON.stringify(ir, (key, value) => (key === 'span' || key === 'src' ? undefined : value))
    expect(shape(cascade(printed).ir)).toBe(shape(cascade(text).ir))
  })

  it('is read or refused with a code and a place, whatever it is', () => {
    const pieces = [
      '[',
      ']',
      '(',
      ')',
      '=',
      '-',
      'max(',
      'sum(m)',
      'where',
      'm',
      'M1',
      '+1',
      ',',
      '\n',
      ';',
      'iterate',
      '{',
      '}',
      'init',
      '<=',
      '&&',
      '!',
      '1e9',
      'inf',
      'if(',
      '#',
      'é',
      'split',
      'rank',
      '?',
    ]
    // What a slip of a pen or of a clipboard makes of a text
    const word = (text: string) => {
      const words = [...text.matchAll(/[A-Za-z_]\w*|\d+|<=|>=|==|&&|\|\||[-+*/<>]/g)]
      return words[rng.below(words.length)] ?? { 0: '', index: 0 }
    }
    const changes: readonly ((text: string) => string)[] = [
      (text) => {
        const at = rng.below(text.length + 1)
        return text.slice(0, at) + rng.pick(pieces) + text.slice(at + rng.below(4))
      },
      (text) => {
        const { 0: old, index } = word(text)
        return (
          text.slice(0, index) +
          word(rng.chance(0.8) ? text : rng.pick(all))[0] +
          text.slice(index + old.length)
        )
      },
      (text) => {
        const lines = text.split('\n')
        const line = lines[rng.below(lines.length)]!
        lines.splice(
          rng.below(lines.length),
          rng.below(2),
          rng.chance(0.5) ? line : rng.pick(rng.pick(all).split('\n')),
        )
        return lines.join('\n')
      },
      (text) =>
        text
          .split('\n')
          .filter(() => rng.chance(0.9))
          .join('\n'),
      (text) => {
        const { 0: old } = word(text)
        const by = word(text)[0]
        return /^\w+$/.test(old) ? text.replace(new RegExp(`\\b${old}\\b`, 'g'), by) : text
      },
      (text) =>
        text.replace(/\d+/g, (x) => (rng.chance(0.3) ? String(rng.pick([0, 1, 2, 3, 7, 1e9])) : x)),
      (text) => text.replace(/ where.*/, ''),
      (text) => text.slice(0, rng.below(text.length)),
    ]
    const all = [...samples, ...Object.values(definitions)]
    // Plain loops and comparisons: a hundred thousand assertions would take longer than what they assert
    const rng = random(62)
    const trace = Error.stackTraceLimit
    Error.stackTraceLimit = 0
    let read = 0
    try {
      for (let run = 0; run < 100_000; run++) {
        let text = rng.pick(all)
        for (let edits = 1 + rng.below(4); edits > 0; edits--) text = rng.pick(changes)(text)
        try {
          const parsed = cascade(text)
          const printed = parsed.toString()
          read++
          if (run % 16 === 0) {
            if (cascade(printed).toString() !== printed)
              throw new Error(`prints what does not parse back: ${text}`)
            if (run % 64 === 0) parsed.analyze()
            if (run % 64 === 16) parsed.compile()
          }
        } catch (error) {
          const { code, span, message } = error as HeddleError
          const lines = text.split('\n')
          if (
            !(error instanceof HeddleError) ||
            !/^CAS0\d\d$/.test(code) ||
            !message.startsWith('cascade: ') ||
            span === undefined ||
            !(span[0] >= 1 && span[0] <= lines.length) ||
            !(span[1] >= 1 && span[1] - 1 + span[2] <= lines[span[0] - 1]!.length)
          )
            throw new Error(`${(error as Error).message} at ${span} in ${text}`, { cause: error })
        }
      }
    } finally {
      Error.stackTraceLimit = trace
    }
    expect(read).toBeGreaterThan(1000)
  }, 240_000)

  it.each([
    [' + ', (long: string) => `Y[i] = ${long}`, 'X[i]'],
    [' * ', (long: string) => `Y[i] = ${long}`, 'X[i]'],
    [' && ', (long: string) => `Y[i] = X[i] where ${long}`, 'i < 3'],
    [' || ', (long: string) => `Y[i] = X[i] where ${long}`, 'i < 3'],
  ])('reads, evaluates and compiles long rows of%s', (operator, whole, term) => {
    const text = (count: number) => whole(new Array(count).fill(term).join(operator))
    const parsed = cascade(text(501))
    parsed.analyze()
    parsed.compile({ fused: 'preferred' })
    parsed.evaluate({ X: { data: [1], shape: [1] } })
    expect(cascade(parsed.toString()).toString()).toBe(parsed.toString())
    for (const count of [502, 20_000]) {
      const error = thrown(() => cascade(text(count)))
      expect(error.code).toBe('CAS001')
      expect(error.message).toBe(
        'cascade: line 1: a statement has more than 500 operators; give parts of it names',
      )
      expect(text(count).slice(error.span![1] - 1, error.span![1] - 1 + error.span![2])).toBe(
        operator.trim(),
      )
    }
  })

  it('survives deep nesting', () => {
    for (const text of [
      `A = ${'('.repeat(10_000)}`,
      `A = ${'-'.repeat(10_000)}1`,
      `A = B where ${'!'.repeat(10_000)}`,
      `A = B where ${'('.repeat(5000)}1 < 2`,
    ]) {
      expect(thrown(() => cascade(text)).code).toBe('CAS001')
    }
  })
})
