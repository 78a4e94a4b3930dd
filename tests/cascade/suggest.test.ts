import { type Analysis, cascade } from 'heddle'
import { describe, expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { random } from '../support/random.js'

const rng = random(63)
const score = 'QK[m,p] = sum(e) Q[e,p] * K[e,m] * scale'
const softmax = `
  GM[p]   = max(m) QK[m,p]
  SN[m,p] = exp(QK[m,p] - GM[p])
  SD[p]   = sum(m) SN[m,p]`
const divided = `
  A[m,p]  = SN[m,p] / SD[p]
  AV[f,p] = sum(m) A[m,p] * V[f,m]`

// Rules in the order in which they are applied, then the passes over M after each
const rows: readonly (readonly [
  name: string,
  text: string,
  rules: readonly string[],
  passes: readonly number[],
])[] = [
  [
    'a stable softmax',
    `${score}${softmax}${divided}`,
    ['defer-division', 'iterate-max'],
    [3, 2, 1],
  ],
  [
    'a stable softmax, split',
    `${score}${softmax}${divided}`,
    ['defer-division', 'split-kv'],
    [3, 2, 1],
  ],
  [
    'a division inside the sum, causal',
    `${score} where m <= p + off${softmax}\nAV[f,p] = sum(m) SN[m,p] * V[f,m] / SD[p]\nLSE[p] = GM[p] + log(SD[p])`,
    ['defer-division', 'iterate-max'],
    [3, 2, 1],
  ],
  [
    'masks on every line, slopes',
    `S[q,m] = sum(e) Q[e,q] * K[e,m] + slope * (m - q)
     G[q]   = max(m) S[q,m]          where m <= q + off && m > q + off - 5
     N[q,m] = exp(S[q,m] - G[q])     where m <= q + off && m > q + off - 5
     L[q]   = sum(m) N[q,m]          where m <= q + off
     P[q,f] = N[q,m] * V[f,m]        where m <= q + off
     O[q,f] = P[q,f] / L[q]`,
    ['iterate-max'],
    [2, 1],
  ],
  [
    'a sink, soft cap, per-key factors',
    `${score}
     C[m,p]   = cap * tanh(QK[m,p] / cap)
     TM[p]    = max(m) C[m,p]
     GM[p]    = max(TM[p], sink)
     SN[m,p]  = exp(C[m,p] - GM[p])
     W[m,p]   = SN[m,p] * gate[m]
     SK[p]    = sum(m) SN[m,p]
     SD[p]    = SK[p] + exp(sink - GM[p])
     SNV[f,p] = sum(m) W[m,p] * V[f,m]
     AV[f,p]  = SNV[f,p] / SD[p]`,
    ['split-kv'],
    [2, 1],
  ],
  [
    'a sink, running',
    `${score}
     TM[p]    = max(m) QK[m,p]
     GM[p]    = max(TM[p], sink)
     SN[m,p]  = exp(QK[m,p] - GM[p])
     SK[p]    = sum(m) SN[m,p]
     SD[p]    = SK[p] + exp(sink - GM[p])
     SNV[f,p] = sum(m) SN[m,p] * V[f,m]
     AV[f,p]  = SNV[f,p] / SD[p]`,
    ['iterate-max'],
    [2, 1],
  ],
  [
    'a softmax by its log-sum-exp',
    `${score} where m <= p + off\nL[p] = logsumexp(m) QK[m,p]\nP[m,p] = exp(QK[m,p] - L[p])\nAV[f,p] = P[m,p] * V[f,m]`,
    ['iterate-max'],
    [2, 1],
  ],
  [
    'the same, split, without a name for the probabilities',
    `${score}\nL[p] = logsumexp(m) QK[m,p]\nAV[f,p] = sum(m) exp(QK[m,p] - L[p]) * V[f,m]`,
    ['split-kv'],
    [2, 1],
  ],
  [
    'powers of two',
    `${score}\nGM[p] = max(m) QK[m,p]\nSD[p] = sum(m) exp2(QK[m,p] - GM[p])\nNV[f,p] = sum(m) exp2(QK[m,p] - GM[p]) * V[f,m]\nAV[f,p] = NV[f,p] / SD[p]`,
    ['iterate-max'],
    [2, 1],
  ],
  ...[
    'exp((QK[m,p] - GM[p]) * scale)',
    'exp(scale * (QK[m,p] - GM[p]) / sqrt(E))',
    'exp2((QK[m,p] - GM[p]) * 1.4426950408889634)',
    'exp(-GM[p] + QK[m,p])',
    'exp(-(GM[p] - QK[m,p]) * warm[p])',
  ].flatMap((weight) =>
    (['iterate-max', 'split-kv'] as const).map(
      (rule) =>
        [
          `${rule}, weights ${weight}`,
          `${score} where m <= p + off${softmax.replace('exp(QK[m,p] - GM[p])', weight)}${divided}`,
          ['defer-division', rule],
          [3, 2, 1],
        ] as const,
    ),
  ),
  [
    'a difference with a name',
    `${score} where m <= p + off${softmax.replace('SN[m,p] = exp(QK[m,p] - GM[p])', 'X[m,p] = QK[m,p] - GM[p]\nSN[m,p] = exp(X[m,p] * scale)')}${divided}`,
    ['defer-division', 'iterate-max'],
    [3, 2, 1],
  ],
  [
    'a scale that may change its sign along the keys',
    `${score}${softmax.replace('exp(QK[m,p] - GM[p])', 'exp((QK[m,p] - GM[p]) * gate[m])')}\nAV[f,p] = SN[m,p] * V[f,m]`,
    [],
    [2],
  ],
  [
    'a local maximum',
    `split m -> (m1, m0 : 4) tail mask
     BQK[m1,m0,p] = sum(e) Q[e,p] * K[e, m1*M0 + m0] * scale
     LM[m1,p]     = max(m0) BQK[m1,m0,p]
     SLN[m1,m0,p] = exp(BQK[m1,m0,p] - LM[m1,p])
     SLD[m1,p]    = sum(m0) SLN[m1,m0,p]
     GM[p]        = max(m1) LM[m1,p]
     PLM[m1,p]    = exp(LM[m1,p] - GM[p])
     SD[p]        = sum(m1) SLD[m1,p] * PLM[m1,p]
     A[m1,m0,p]   = SLN[m1,m0,p] * PLM[m1,p] / SD[p]
     AV[f,p]      = sum(m1,m0) A[m1,m0,p] * V[f, m1*M0 + m0]`,
    ['defer-division'],
    [2, 1],
  ],
  [
    'a factor that is a sum',
    'Y = sum(m) A[m] * B[m]\nZ = sum(m) Y * A[m]',
    ['defer-division'],
    [2, 1],
  ],
  [
    'sigmoid attention',
    `${score}\nA[m,p] = sigmoid(QK[m,p] + bias)\nAV[f,p] = A[m,p] * V[f,m]`,
    ['partition'],
    [1, 1],
  ],
  [
    'the largest score and the sum of all',
    `${score}\nT[p] = max(m) QK[m,p]\nU[p] = sum(m) QK[m,p] where m <= p + off`,
    ['partition'],
    [1, 1],
  ],
  [
    'one query, batches',
    `S[b,m] = sum(e) Qb[b,e] * Kb[b,e,m]
     GM[b]  = max(m) S[b,m]
     SN[b,m] = exp(S[b,m] - GM[b])
     SD[b]  = sum(m) SN[b,m]
     AV[b,f] = sum(m) SN[b,m] * Vb[b,f,m] / SD[b]`,
    ['defer-division', 'split-kv'],
    [3, 2, 1],
  ],
  [
    'one query, no ranks at all',
    `S[m] = sum(e) q[e] * K[e,m]
     GM = max(m) S[m]
     SN[m] = exp(S[m] - GM)
     SD = sum(m) SN[m]
     AV[f] = sum(m) SN[m] * V[f,m] / SD`,
    ['defer-division', 'iterate-max'],
    [3, 2, 1],
  ],
  [
    'differential attention',
    `SA[m,p] = sum(e) Q[e,p] * K[e,m] * scale
     SB[m,p] = sum(e) Q2[e,p] * K2[e,m] * scale
     LA[p]   = logsumexp(m) SA[m,p]
     LB[p]   = logsumexp(m) SB[m,p]
     W[m,p]  = exp(SA[m,p] - LA[p]) - lambda * exp(SB[m,p] - LB[p])
     AV[f,p] = sum(m) W[m,p] * V[f,m]`,
    [],
    [2],
  ],
]

const shapes: Readonly<Record<string, readonly string[]>> = {
  Q: ['E', 'P'],
  Q2: ['E', 'P'],
  K: ['E', 'M'],
  K2: ['E', 'M'],
  V: ['F', 'M'],
  A: ['M'],
  B: ['M'],
  gate: ['M'],
  warm: ['P'],
  q: ['E'],
  Qb: ['B', 'E'],
  Kb: ['B', 'E', 'M'],
  Vb: ['B', 'F', 'M'],
}

function inputsOf(names: readonly string[], sizes: Record<string, number>) {
  return Object.fromEntries(
    names.map((name) => {
      const shape = shapes[name]!.map((rank) => sizes[rank]!)
      return [
        name,
        {
          data: Float64Array.from(rng.normals(shape.reduce((a, b) => a * b, 1)), (x) =>
            name === 'warm' ? Math.abs(x) + 0.1 : x,
          ),
          shape,
        },
      ]
    }),
  )
}

function expectSame(before: string, after: string, sizes: Record<string, number>): void {
  const [a, b] = [cascade(before), cascade(after)]
  const inputs = inputsOf(a.ir.inputs, sizes)
  const scalars = {
    scale: 0.4,
    off: sizes.M! - sizes.P!,
    slope: 0.3,
    sink: rng.normal(),
    cap: 3,
    bias: -1,
    lambda: 0.3,
    m0: 0.4,
    m1: 0.4,
    M0: 0.4,
    M1: 0.4,
    RM: 0.4,
  }
  const [x, y] = [a.evaluate(inputs, scalars), b.evaluate(inputs, scalars)]
  expect(Object.keys(y).sort()).toEqual(Object.keys(x).sort())
  for (const [name, { data, shape }] of Object.entries(x)) {
    expect(y[name]!.shape).toEqual(shape)
    expect(maxError(y[name]!.data, data), `${name} of\n${after}`).toBeLessThan(
      1e-12 * Math.max(1, largest(data)),
    )
  }
}

describe('suggestions', () => {
  it.each(rows)('%s', (_, start, rules, passes) => {
    const variable = 'M'
    const small = { a100: { ...machine, tile: 4 } }
    let text = start
    const seen = [headline(cascade(start).analyze(), variable)]
    for (const rule of rules) {
      const { suggestions } = cascade(text).analyze({ machine: small.a100 })
      const found = suggestions.find((one) => one.rule === rule)
      expect(
        found,
        `${rule} for\n${text}\nnot only ${suggestions.map((one) => one.rule)}`,
      ).toBeDefined()
      text = found!.rewritten
      seen.push(headline(cascade(text).analyze(), variable))
    }
    expect(seen).toEqual(passes)
    if (rules.length === 0) expect(cascade(text).analyze().suggestions).toEqual([])
  })

  it.each(rows)(
    'compute the same, whatever the sizes, and never need more passes: %s',
    (_, start) => {
      let checked = [start]
      for (let depth = 0; depth < 3; depth++) {
        checked = checked.flatMap((text) => {
          const before = cascade(text).analyze({ machine: { ...machine, tile: 4 } })
          return before.suggestions.map(({ rewritten }) => {
            const after = cascade(rewritten).analyze()
            for (const [rank, { headline }] of Object.entries(before.passes))
              expect(after.passes[rank]?.headline ?? 1).toBeLessThanOrEqual(headline)
            for (const M of [1, 3, 4, 9, 16])
              expectSame(text, rewritten, { B: 2, E: 2, F: 3, M, P: 1 + rng.below(7) })
            return rewritten
          })
        })
      }
    },
  )

  it.each(['m0', 'm1', 'M0', 'M1', 'RM'])('take no name that a scalar has: %s', (name) => {
    const text = `${score.replace('scale', name)}${softmax}\nAV[f,p] = sum(m) SN[m,p] * V[f,m]\nO[f,p] = AV[f,p] / SD[p]`
    const { suggestions } = cascade(text).analyze({ machine })
    expect(suggestions.map(({ rule }) => rule)).toEqual(['iterate-max', 'split-kv'])
    for (const { rewritten } of suggestions) expectSame(text, rewritten, { E: 2, F: 3, M: 9, P: 5 })
  })

  it('name the scale of an exponent that the call gives', () => {
    const effects = (scale: string) =>
      cascade(
        `${score}${softmax.replace('exp(QK[m,p] - GM[p])', `exp((QK[m,p] - GM[p]) ${scale})`)}`,
      )
        .analyze()
        .suggestions.map(({ effect }) => effect.split('; ').at(-1))
    expect(effects('* scale')).toEqual(['scale must be above 0', 'scale must be above 0'])
    expect(effects('/ sqrt(E)')).not.toContain('sqrt(E) must be above 0')
  })

  it('take delta from what the forward pass leaves', () => {
    const text = `
      P[m,p]  = exp(S[m,p] - L[p])
      dP[m,p] = sum(f) dO[f,p] * V[f,m]
      D[p]    = sum(m) P[m,p] * dP[m,p]
      dS[m,p] = P[m,p] * (dP[m,p] - D[p])
      dQ[e,p] = sum(m) dS[m,p] * K[e,m]`
    const { passes, suggestions } = cascade(text).analyze()
    expect(passes.M!.headline).toBe(2)
    const { rewritten, effect } = suggestions.find(({ rule }) => rule === 'precompute-delta')!
    expect(effect).toBe(
      'M: 2 -> 1 passes; D reads O[f,p] = sum(m) P[m,p] * V[f,m], which the forward pass leaves',
    )
    expect(cascade(rewritten).analyze().passes.M!.headline).toBe(1)
    // a product of products leaves nothing that a forward pass has
    const plain = text.replace('exp(S[m,p] - L[p])', 'S[m,p] * L[p]')
    expect(
      cascade(plain)
        .analyze()
        .suggestions.map(({ rule }) => rule),
    ).not.toContain('precompute-delta')
    const [M, P, E, F] = [7, 5, 3, 2]
    const array = (shape: number[]) => ({
      data: Float64Array.from(rng.normals(shape.reduce((a, b) => a * b, 1))),
      shape,
    })
    const S = array([M, P])
    const V = array([F, M])
    const forward = cascade(
      'L[p] = logsumexp(m) S[m,p]\nO[f,p] = sum(m) exp(S[m,p] - L[p]) * V[f,m]',
    )
    const { O, L } = forward.evaluate({ S, V }, {}, { keep: ['L'] })
    const inputs = { S, V, L: L!, dO: array([F, P]), K: array([E, M]) }
    const before = cascade(text).evaluate(inputs).dQ!
    const after = cascade(rewritten).evaluate({ ...inputs, O: O! }).dQ!
    expect(maxError(after.data, before.data)).toBeLessThan(1e-12)
  })

  it('count what a list reads again once a rank is split', () => {
    const text = `
      M[n] = max(v) X[n,v]
      Z[n] = sum(v) exp(X[n,v] - M[n])
      Y[n] = M[n] + log(Z[n]) - X[n,label[n]]`
    const { suggestions } = cascade(text).analyze()
    const { effect, rewritten } = suggestions.find(({ rule }) => rule === 'iterate-max')!
    expect(effect).toMatch(/^V: 3 -> 2 passes/)
    expect(headline(cascade(rewritten).analyze(), 'V')).toBe(2)
  })

  it('know where a text may read beyond an axis, and sizes of ranks that read what it makes', () => {
    const shapes = { Q: [5, 3], K: [9, 3], V: [9, 2] }
    const inputs = Object.fromEntries(
      Object.entries(shapes).map(([name, shape]) => [
        name,
        { data: rng.normals(shape[0]! * shape[1]!), shape },
      ]),
    )
    const later = `
      N[p]   = sum(e) Q[p,e] * Q[p,e]
      A[p,m] = sum(e) Q[p,e] * K[m,e] / N[p + 1]
      O[p,f] = sum(m) exp(A[p,m]) * V[m,f]`
    const stick = `
      S[p,m] = sum(e) Q[p,e] * K[m,e]
      L[p,j] = softplus(S[p,j])
      C[p,m] = sum(j) L[p,j]   where j > m && j <= p
      O[p,f] = sum(m) exp(S[p,m] - C[p,m]) * V[m,f]   where m <= p`
    for (const [text, wanted] of [
      [later, []],
      [stick, ['partition']],
    ] as const) {
      const { O } = cascade(text).evaluate(inputs)
      const { suggestions } = cascade(text).analyze({ machine })
      const rules = suggestions.map(({ rule }) => rule)
      expect(rules).toEqual(expect.arrayContaining([...wanted]))
      if (wanted.length === 0) expect(rules).not.toContain('defer-division')
      for (const { rule, rewritten } of suggestions) {
        const other = cascade(rewritten).evaluate(inputs)
        expect(maxError(other.O!.data, O!.data), rule).toBeLessThan(1e-9 * largest(O!.data))
      }
    }
  })
})

const machine = {
  name: 'small',
  cores: 1,
  clock: 1,
  tensor: { bfloat16: 1, float32: 1 },
  exp: 1,
  lanes: 1,
  memory: 1,
  onChip: 1,
  cache: 1,
  tile: 4,
}
const headline = ({ passes }: Analysis, rank: string) => passes[rank]!.headline
