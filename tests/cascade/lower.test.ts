import {
  attention,
  attentionDefinition,
  type Cascade,
  cascade,
  definitions,
  explain,
  glu,
  type HeddleError,
  lightningDefinition,
  linear,
  memory,
  mergeDefinition,
  norm,
  type Tensor,
  tensor,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random, sample } from '../support/random.js'

// One mechanism, six ways: the text as it is defined, its rewrites, and forms of other hands
function rewritten(text: string, ...rules: readonly string[]): string {
  for (const rule of rules)
    text = cascade(text)
      .analyze()
      .suggestions.find((one) => one.rule === rule)!.rewritten
  return text
}

const onePass = `
  split m -> (m1, m0 : 4) tail mask
  init BK[e,m1,m0] = K[m1*M0 + m0,e];   init BV[f,m1,m0] = V[m1*M0 + m0,f]
  init RM[m1=0,p] = -inf;   init RD[m1=0,p] = 0;   init RNV[f,m1=0,p] = 0
  iterate m1 {
    BQK[m1,m0,p]  = sum(e) Q[p,e] * BK[e,m1,m0] * scale   where m1*M0 + m0 <= p + off
    LM[m1,p]      = max(m0) BQK[m1,m0,p]
    RM[m1+1,p]    = max(RM[m1,p], LM[m1,p])
    SLN[m1,m0,p]  = exp(BQK[m1,m0,p] - RM[m1+1,p])
    PRM[m1,p]     = exp(RM[m1,p] - RM[m1+1,p])
    SLD[m1,p]     = sum(m0) SLN[m1,m0,p]
    SLNV[f,m1,p]  = sum(m0) SLN[m1,m0,p] * BV[f,m1,m0]
    RD[m1+1,p]    = SLD[m1,p] + RD[m1,p] * PRM[m1,p]
    RNV[f,m1+1,p] = SLNV[f,m1,p] + RNV[f,m1,p] * PRM[m1,p]
  }
  O[p,f] = RNV[f,M1,p] / RD[M1,p]
  LSE[p] = RM[M1,p] + log(RD[M1,p])`

const weighted = `
  A[p,m] = exp(T[p,m])
  D[p]   = sum(m) A[p,m]
  O[p,f] = sum(m) A[p,m] * V[m,f] / D[p]`

// Texts whose empty coordinates decide what they compute, and who computes them
const empties: Record<string, readonly [operator: string, text: string]> = {
  'a product that a mask leaves without points, which is 0': [
    'einsum',
    `R[p,m,e] = Q[p,e] * K[m,e]   where m <= p
     T[p,m]   = sum(e) R[p,m,e]${weighted}`,
  ],
  'a bias of rows alone, masked with what it sums': [
    'attention',
    `B[p,m] = sum(e) Q[p,e] * C[m,e]   where m > 0 && e <= p
     S[p,m] = sum(e) Q[p,e] * K[m,e]
     T[p,m] = S[p,m] + B[p,m]${weighted}`,
  ],
  'a predicate that always holds of what is summed': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]   where m >= p && e <= e${weighted}`,
  ],
  'rows without a key, of which sums are 0': [
    'attention',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]   where m <= p && p > 1${weighted}`,
  ],
  'a choice that reads a masked score': [
    'einsum',
    `S[p,m] = sum(e) Q[p,e] * K[m,e]   where m < 3
     R[p,m] = sum(e) Q[p,e] * C[m,e]
     T[p,m] = if(m < 3, S[p,m], R[p,m])${weighted}`,
  ],
  'queries, keys and values mixed with those before them': [
    'attention',
    `X[p,e] = Q[p,e] + Q[p - 1,e]
     Y[m,e] = K[m,e] - K[m - 1,e]
     Z[m,f] = V[m,f] + V[m - 1,f]
     T[p,m] = sum(e) X[p,e] * Y[m,e]   where m <= p
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]
     O[p,f] = sum(m) A[p,m] * Z[m,f] / D[p]`,
  ],
  'the same in one product, of which nothing is left at the end': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * (K[m,e] - K[m - 1,e])   where m <= p${weighted}`,
  ],
  'a maximum of the row before': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     G[p]   = max(m) T[p,m]
     A[p,m] = exp(T[p,m] - G[p - 1])
     D[p]   = sum(m) A[p,m]
     O[p,f] = sum(m) A[p,m] * V[m,f] / D[p]`,
  ],
  'a state whose steps begin late': [
    'einsum',
    `init S[p=0,e,f] = 0
     iterate p {
       S[p+1,e,f] = S[p,e,f] + K[p,e] * V[p,f]   where p >= 2
       O[p,f]     = sum(e) Q[p,e] * S[p+1,e,f]
     }`,
  ],
  'a state that adds what is masked': [
    'einsum',
    `X[p,e] = K[p,e]   where p >= 2
     init S[p=0,e,f] = 0
     iterate p {
       S[p+1,e,f] = S[p,e,f] + X[p,e] * V[p,f]
       O[p,f]     = sum(e) Q[p,e] * S[p+1,e,f]
     }`,
  ],
  'a state of keys and those before them': [
    'einsum',
    `X[p,e] = K[p,e] - K[p - 1,e]
     init S[p=0,e,f] = 0
     iterate p {
       S[p+1,e,f] = 0.9 * S[p,e,f] + X[p,e] * V[p,f]
       O[p,f]     = sum(e) Q[p,e] * S[p+1,e,f]
     }`,
  ],
  'a state that is read before its step': [
    'einsum',
    `init S[p=0,e,f] = 0
     iterate p {
       O[p,f]     = sum(e) Q[p,e] * S[p,e,f]
       S[p+1,e,f] = 0.9 * S[p,e,f] + K[p,e] * V[p,f]
     }`,
  ],
  ...Object.fromEntries(
    ['max(R[m,p], S[p,m]) where m <= p', 'max(R[m,p], Q[m - 1,0])'].map((step) => [
      `a running maximum that is empty in parts: ${step}`,
      [
        'einsum',
        `S[p,m] = sum(e) Q[p,e] * K[m,e]
         init R[m=0,p] = -inf;  init D[m=0,p] = 0;  init X[m=0,p,f] = 0
         iterate m {
           R[m+1,p]   = ${step}
           W[m,p]     = exp(S[p,m] - R[m+1,p])
           C[m,p]     = exp(R[m,p] - R[m+1,p])
           D[m+1,p]   = D[m,p] * C[m,p] + W[m,p]
           X[m+1,p,f] = X[m,p,f] * C[m,p] + W[m,p] * V[m,f]
         }
         O[p,f] = X[M,p,f] / D[M,p]`,
      ] as const,
    ]),
  ),
  'a divisor that hides keys by a large number': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     L[p]   = logsumexp(m) T[p,m] + (1 - if(m == 1, 0, 1)) * -10000
     O[p,f] = sum(m) exp(T[p,m] - L[p]) * V[m,f]`,
  ],
  'a divisor that sees less': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]   where m <= p && p > 0
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]   where m > 0
     O[p,f] = sum(m) A[p,m] * V[m,f] / D[p]`,
  ],
  'a mask of columns': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]   where m != 2
     O[p,f] = sum(m) A[p,m] * V[m,f] / D[p]   where f > 0 && m != 2`,
  ],
  'a second branch whose divisor is empty in some rows': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]
     X[p,f] = sum(m) A[p,m] * V[m,f] / D[p]
     S[p,m] = sum(e) Q[p,e] * C[m,e]
     B[p,m] = exp(S[p,m])
     N[p]   = sum(m) B[p,m]   where p < 3
     Y[p,f] = sum(m) B[p,m] * V[m,f] / N[p]
     O[p,f] = X[p,f] + Y[p,f]`,
  ],
  'a second branch whose divisor is 0 in some rows': [
    'attention',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]
     X[p,f] = sum(m) A[p,m] * V[m,f] / D[p]
     S[p,m] = sum(e) Q[p,e] * C[m,e]
     B[p,m] = relu(S[p,m])   where p < 3
     N[p]   = sum(m) B[p,m]
     Z[p,f] = sum(m) B[p,m] * V[m,f] / N[p]
     O[p,f] = X[p,f] + Z[p,f] * Z[p,f]`,
  ],
  'a sink of the first head': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     D[p]   = sum(m) exp(T[p,m])
     O[p,f] = sum(m) exp(T[p,m]) * V[m,f] / (D[p] + exp(sink[0]))`,
  ],
  'a soft cap below 0': [
    'attention',
    `S[p,m] = sum(e) Q[p,e] * K[m,e]
     T[p,m] = -3 * tanh(S[p,m] / 5)${weighted}`,
  ],
  'keys of length 1, of which one is 0': [
    'attention',
    `N[m]   = sum(e) C[m,e] * C[m,e]
     X[m,e] = C[m,e] / sqrt(N[m])
     T[p,m] = sum(e) Q[p,e] * X[m,e]${weighted}`,
  ],
  'shares of channels, with their maximum taken off': [
    'attention',
    `G[m]   = max(e) K[m,e]
     W[m,e] = exp(K[m,e] - G[m])
     N[m]   = sum(e) W[m,e]
     X[m,e] = W[m,e] / N[m]
     T[p,m] = sum(e) Q[p,e] * X[m,e]${weighted}`,
  ],
  'a bias of the row behind, which the last has not': [
    'einsum',
    `S[p,m] = sum(e) Q[p,e] * K[m,e]
     T[p,m] = S[p,m] + Q[p + 1,0] * K[m,0]${weighted}`,
  ],
  'a window without keys': [
    'attention',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]   where m <= p + M - P && m > p + M - P${weighted}`,
  ],
  'a mask that ends between two keys': [
    'attention',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]   where m < M / 2${weighted}`,
  ],
  'slopes, a number and a sink': [
    'attention',
    `S[p,m] = sum(e) Q[p,e] * K[m,e]   where m <= p + M - P
     T[p,m] = S[p,m] - 0.2 * (p + M - P - m) - 2
     A[p,m] = exp(T[p,m])
     D[p]   = sum(m) A[p,m]
     O[p,f] = sum(m) A[p,m] * V[m,f] / (D[p] + 0.7)`,
  ],
  'scores that are nowhere finite': [
    'einsum',
    `S[p,m] = sum(e) Q[p,e] * K[m,e]
     T[p,m] = S[p,m] - inf${weighted}`,
  ],
  'a divisor with a number of a tensor, which may be below 0': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     D[p]   = sum(m) exp(T[p,m])
     O[p,f] = sum(m) exp(T[p,m]) * V[m,f] / (D[p] + C[0,0])`,
  ],
  'a sink below 0': [
    'einsum',
    `T[p,m] = sum(e) Q[p,e] * K[m,e]
     D[p]   = sum(m) exp(T[p,m])
     O[p,f] = sum(m) exp(T[p,m]) * V[m,f] / (D[p] - exp(-9))`,
  ],
}

// Texts of which a part is far beyond float32, or takes all of its digits, where the whole is not
interface Far {
  text: string
  /** Axes of inputs that are not Q, K and V. */
  inputs?: Record<string, string>
  sizes?: Record<string, number>
  scalars?: Record<string, number>
  numbers?: Record<string, (i: number) => number>
  /** Of numbers that have lost so many digits as they were rounded. */
  loose?: number
  /** Undefined where only a plan statement by statement is right. */
  operator?: string
}

const retention = (end: string, more = '') => `
  S[p,m] = sum(e) Q[p,e] * K[m,e]
  W[p,m] = S[p,m] * pow(g, p - m)   where m <= p
  ${more}
  X[p,f] = sum(m) W[p,m] * V[m,f]
  O[p,f] = X[p,f] / ${end}`
const long = { P: 300, M: 300 }

const layer = (x: string, axes: string, out: string) => {
  const [row, column] = axes.split(',') as [string, string]
  return `
  U${x}[${row}]  = sum(${column}) ${x}[${axes}] / ${column.toUpperCase()}
  C${x}[${axes}] = ${x}[${axes}] - U${x}[${row}]
  W${x}[${row}]  = sum(${column}) C${x}[${axes}] * C${x}[${axes}] / ${column.toUpperCase()}
  ${out}[${axes}] = C${x}[${axes}] * rsqrt(W${x}[${row}] + 0.00001)`
}

const far: Record<string, Far> = {
  'a layer norm of results far from 0': {
    text: `T[p,m] = sum(e) Q[p,e] * K[m,e]${weighted.replace('O[', 'X[')}${layer('X', 'p,f', 'O')}`,
    numbers: { V: (i) => 30 + 9 * Math.sin(i * i) },
    loose: 10,
    operator: 'attention',
  },
  'layer norms of queries and keys far from 0': {
    text: `${layer('Q', 'p,e', 'X')}${layer('K', 'm,e', 'Y')}
      T[p,m] = sum(e) X[p,e] * Y[m,e]${weighted}`,
    numbers: { Q: (i) => 300 + Math.sin(i * i), K: (i) => 300 + Math.cos(i * i) },
    loose: 20,
    operator: 'attention',
  },
  'retention divided by its weights, far from the first token': {
    text: retention('max(abs(B[p]), 1)', 'B[p] = sum(m) W[p,m]'),
    sizes: long,
    scalars: { g: 0.5 },
    operator: 'lightning',
  },
  'retention divided by the root of its decays': {
    text: retention('sqrt(B[p])', 'B[p] = sum(m) pow(g, p - m)   where m <= p'),
    sizes: long,
    scalars: { g: 0.5 },
    operator: 'lightning',
  },
  'retention as a recurrence, divided by its weights': {
    text: `
      init S[t=0,e,f] = 0
      init Z[t=0,e] = 0
      iterate t {
        S[t+1,e,f] = g * S[t,e,f] + K[t,e] * V[t,f]
        Z[t+1,e]   = g * Z[t,e] + K[t,e]
        N[t,f]     = sum(e) Q[t,e] * S[t+1,e,f]
        D[t]       = sum(e) Q[t,e] * Z[t+1,e]
        O[t,f]     = N[t,f] / max(abs(D[t]), 1)
      }`,
    sizes: { ...long, T: 300 },
    scalars: { g: 0.5 },
    operator: 'lightning',
  },
  ...Object.fromEntries(
    ['pow(z[e], p - m)', 'exp(-z[e] * (p - m))', 'exp(c[p] - c[m])', 'exp(c[p] - d[m])'].flatMap(
      (decay) =>
        [weighted, '\nO[p,f] = sum(m) T[p,m] * V[m,f]'].map((end, i) => [
          `${i ? 'products' : 'scores'} that decay by ${decay}`,
          {
            text: `T[p,m] = sum(e) Q[p,e] * K[m,e] * ${decay}   where m <= p${end}`,
            inputs: { z: 'E', c: 'P', d: 'M' },
            sizes: long,
            numbers: {
              z: (i: number) => 0.5 + i / 20,
              c: (i: number) => -0.5 * i,
              d: (i: number) => -0.5 * i,
            },
          },
        ]),
    ),
  ),
  'scores that decay by running sums of tokens': {
    text: `
      init C[t=0,h] = 0
      iterate t {
        C[t+1,h] = C[t,h] + a[h,t]
      }
      T[h,p,m] = sum(e) Q[p,e] * K[m,e] * exp(C[p+1,h] - C[m+1,h])   where m <= p
      A[h,p,m] = exp(T[h,p,m])
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[m,f] / D[h,p]`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F', a: 'H T' },
    sizes: { ...long, T: 300, H: 2 },
    numbers: { a: () => -1 },
  },
  'features of either sign, as the text multiplies them': {
    text: `
      X[p,e] = exp(Q[p,e] / 4)
      Y[m,e] = exp(-K[m,e] / 4)
      T[p,m] = sum(e) X[p,e] * Y[m,e]   where m <= p
      O[p,f] = sum(m) T[p,m] * V[m,f]`,
    sizes: { P: 7 },
    operator: 'lightning',
  },
  'slopes beside such features': {
    text: `
      X[p,e] = Q[p,e] * pow(z[e], p)
      Y[m,e] = K[m,e] * pow(z[e], -m)
      S[p,m] = sum(e) X[p,e] * Y[m,e]   where m <= p
      T[p,m] = S[p,m] - slope * (p - m)${weighted}`,
    inputs: { z: 'E' },
    sizes: { P: 7 },
    scalars: { slope: 0.3 },
    numbers: { z: (i) => 0.5 + i / 20 },
    operator: 'attention',
  },
  'large queries whose shares are by a logsumexp': {
    text: `
      L[p]   = logsumexp(e) Q[p,e]
      R[p,e] = exp(Q[p,e] - L[p])
      T[p,m] = sum(e) R[p,e] * K[m,e]${weighted}`,
    numbers: { Q: (i) => 100 * Math.sin(i * i) },
  },
  'large gates whose shares are by a logsumexp': {
    text: `
      T[p,m] = sum(e) Q[p,e] * K[m,e]${weighted.replace('O[', 'X[')}
      L[p]   = logsumexp(g) G[p,g]
      O[p,f] = X[p,f] * exp(G[p,0] - L[p])`,
    inputs: { G: 'P G' },
    sizes: { G: 3 },
    numbers: { G: (i) => 200 * Math.sin(i * i) },
  },
  ...Object.fromEntries(
    [
      'pow(p + off - m, 2) / 2',
      'pow(p + M - P - m, 2) / (2 * w * w)',
      'pow(m - off * x[p], 2) / 2',
    ].map((square) => [
      `a square of distances from late rows, ${square}`,
      {
        text: `
          S[p,m] = sum(e) Q[p,e] * K[m,e]
          T[p,m] = S[p,m] - ${square}${weighted}`,
        inputs: { x: 'P' },
        sizes: { P: 3, M: 3000 },
        numbers: { x: () => 1 },
        scalars: square.includes('w * w') ? { w: 2 } : { off: 2997 },
        operator: 'attention',
      },
    ]),
  ),
  ...Object.fromEntries(
    [
      '(1 - x[p] * y[m]) * -1e9',
      '(1 - y[m] * z[m]) * -1e9',
      '(1 - min(y[m], z[m])) * -10000',
      '(1 - x[p] * (1 - y[m])) * -1e9',
      '(1 - if(m <= p, 1, 0) * y[m]) * -1e9',
      '(1 - x[p]) * -1e9 + (1 - y[m]) * -1e9',
      'large * x[p] * y[m] - large',
    ].map((mask) => [
      `a mask ${mask}`,
      {
        text: `
          S[p,m] = sum(e) Q[p,e] * K[m,e]
          T[p,m] = S[p,m] + ${mask}${weighted}`,
        inputs: { x: 'P', y: 'M', z: 'M' },
        ...(mask.includes('large') ? { scalars: { large: 1e9 } } : {}),
        numbers: { x: () => 1, y: (i: number) => (i + 1) % 2, z: (i: number) => Number(i < 4) },
        operator: 'attention',
      },
    ]),
  ),
}

const causal: Record<string, string> = {
  'as defined': attentionDefinition,
  'with a late division': rewritten(attentionDefinition, 'defer-division'),
  'with a running maximum': rewritten(attentionDefinition, 'defer-division', 'iterate-max'),
  'in parts': rewritten(attentionDefinition, 'defer-division', 'split-kv'),
  'in one pass, by hand': onePass,
  'without a maximum': `
    S[p,m] = sum(e) K[m,e] * Q[p,e]   where p + off >= m
    D[p]   = sum(m) exp(scale * S[p,m])
    O[p,f] = sum(m) V[m,f] * exp(scale * S[p,m]) / D[p]
    LSE[p] = logsumexp(m) scale * S[p,m]`,
}

interface Case {
  what: string
  text: string
  scalars?: Record<string, number>
  slots: Record<string, string>
  /** Numbers for each head, by the name of their tensor. */
  perHead?: readonly string[]
  square?: boolean
  /** A tensor over rows and keys. */
  pairs?: string
}

const head = `S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]`
const softmax = (score: string, where = '', more = '') => `
  ${head}
  T[h,p,m] = ${score} ${where}
  G[h,p]   = max(m) T[h,p,m]
  N[h,p,m] = exp(T[h,p,m] - G[h,p])
  B[h,p]   = sum(m) N[h,p,m]
  D[h,p]   = B[h,p] ${more}
  O[h,p,f] = sum(m) N[h,p,m] * V[h,m,f] / D[h,p]
  L[h,p]   = G[h,p] + log(D[h,p])`

const cases: readonly Case[] = [
  { what: 'dense', text: softmax('S[h,p,m] * 0.3'), slots: { scale: '0.3' } },
  {
    what: 'scale of a size',
    text: softmax('S[h,p,m] / sqrt(E)', 'where m <= p + off'),
    slots: { scale: 'E^-0.5', causal: 'off + p' },
  },
  {
    what: 'scale of the number of heads',
    text: softmax('S[h,p,m] / H', 'where m <= p + off'),
    slots: { scale: 'H^-1' },
  },
  {
    what: 'soft cap',
    text: softmax('cap * tanh(S[h,p,m] * scale / cap)', 'where m <= p + off'),
    scalars: { cap: 2, scale: 0.7 },
    slots: { softCap: 'cap', scale: 'scale' },
  },
  {
    what: 'slopes and a sink',
    text: softmax(
      'S[h,p,m] * scale + slope[h] * (m - p - off)',
      'where m <= p + off',
      '+ exp(sink[h] - G[h,p])',
    ),
    scalars: { scale: 0.4 },
    perHead: ['slope', 'sink'],
    slots: { slopes: 'slope[h]', sink: 'sink[h]' },
  },
  {
    what: 'slopes from the key alone',
    text: softmax('S[h,p,m] * 0.5 + slope * m', 'where m <= p').replace(/L\[h,p\].*/, ''),
    scalars: { slope: 0.3 },
    slots: { slopes: 'slope' },
    square: true,
  },
  {
    what: 'off by one',
    text: `${head}
      D[h,p]   = sum(m) exp(S[h,p,m] * 0.2)
      O[h,p,f] = sum(m) exp(S[h,p,m] * 0.2) * V[h,m,f] / (1 + D[h,p])`,
    slots: { sink: '0' },
  },
  {
    what: 'sigmoid with a bias',
    text: `${head} where m <= p + off
      O[h,p,f] = sum(m) sigmoid(S[h,p,m] * scale + b) * V[h,m,f]`,
    scalars: { scale: 0.5, b: -1.5 },
    slots: { weights: 'sigmoid', bias: 'b', normalise: 'false' },
  },
  {
    what: 'sigmoid as a quotient, with slopes',
    text: `${head} where m <= p + off
      O[h,p,f] = sum(m) V[h,m,f] / (1 + exp(-S[h,p,m] * scale - slope[h] * (m - p - off)))`,
    scalars: { scale: 0.5 },
    perHead: ['slope'],
    slots: { weights: 'sigmoid', slopes: 'slope[h]' },
  },
  {
    what: 'squared relu',
    text: `${head}
      W[h,p,m] = pow(max(S[h,p,m] * scale, 0), 2)
      D[h,p]   = sum(m) W[h,p,m]
      O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f] / D[h,p]`,
    scalars: { scale: 0.5 },
    slots: { weights: 'relu', power: '2', normalise: 'true' },
  },
  {
    what: 'softplus, with the logarithm of its sum',
    text: `${head} where m <= p + off
      W[h,p,m] = log(1 + exp(S[h,p,m] / sqrt(E)))
      D[h,p]   = sum(m) W[h,p,m]
      O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f] / D[h,p]
      L[h,p]   = log(D[h,p])`,
    slots: { weights: 'softplus', scale: 'E^-0.5', normalise: 'true' },
  },
  {
    what: 'a bias for each pair',
    text: softmax('S[h,p,m] * 0.2 + Bias[p,m]', 'where m <= p + off'),
    pairs: 'Bias',
    slots: { bias: 'Bias[p,#2M]' },
  },
  {
    what: 'a scale that is a sum, as of YaRN',
    text: softmax('S[h,p,m] * pow(0.1 * log(s) + 1, 2) / sqrt(E)', 'where m <= p + off'),
    scalars: { s: 8 },
    slots: { q: 'Q', k: 'K', causal: 'off + p' },
  },
  {
    what: 'factors that grow with the positions of both, as of xPos',
    text: `X[h,p,e] = Q[h,p,e] * exp(0.1 * zeta[h] * p)
      Y[h,m,e] = K[h,m,e] * exp(-0.1 * zeta[h] * m)
      S[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e]   where m <= p + off
      L[h,p]   = logsumexp(m) S[h,p,m]
      O[h,p,f] = sum(m) exp(S[h,p,m] - L[h,p]) * V[h,m,f]`,
    perHead: ['zeta'],
    slots: { v: 'V', causal: 'off + p' },
  },
  {
    what: 'queries of length 1 behind a gain of either sign',
    text: `X[h,p,e] = Q[h,p,e] * gain[h]
      N[h,p]   = sum(e) X[h,p,e] * X[h,p,e]
      S[h,p,m] = sum(e) X[h,p,e] / sqrt(N[h,p]) * K[h,m,e]   where m <= p + off
      L[h,p]   = logsumexp(m) S[h,p,m]
      O[h,p,f] = sum(m) exp(S[h,p,m] - L[h,p]) * V[h,m,f]`,
    perHead: ['gain'],
    slots: {},
  },
  ...['if(Bias[p,m] > -2, 1, 0)', 'sigmoid(Bias[p,m])', 'Bias[p,m] * Bias[p,m]'].map(
    (factor): Case => ({
      what: `weights that are multiplied by ${factor}`,
      text: `${head}
        G[h,p]   = max(m) S[h,p,m]
        A[h,p,m] = exp(S[h,p,m] - G[h,p]) * ${factor}
        D[h,p]   = sum(m) A[h,p,m]
        O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]`,
      pairs: 'Bias',
      slots: { q: 'Q', k: 'K', v: 'V' },
    }),
  ),
  {
    what: 'a window',
    text: softmax('S[h,p,m] * 0.2', 'where m <= p + off && m > p + off - w'),
    scalars: { w: 5 },
    slots: { window: '1 + off + p + -1 w' },
  },
]

const close = (actual: ArrayLike<number>, expected: ArrayLike<number>, what: string) =>
  expect(maxError(actual, expected), what).toBeLessThanOrEqual(
    2e-5 * Math.max(1, largest(expected)),
  )

describeDevices('compile', (device) => {
  const rng = random(7)

  it.each(Object.entries(causal))('finds attention %s', async (what, text) => {
    const plan = cascade(text).compile()
    expect(plan.explain().operator).toBe('attention')
    for (const [sq, sk] of [
      [1, 1],
      [5, 9],
      [9, 5],
      [33, 67],
    ] as const) {
      const [q, k, v] = [
        await sample(rng, [1, sq, 1, 8], 'float32', device),
        await sample(rng, [1, sk, 1, 8], 'float32', device),
        await sample(rng, [1, sk, 1, 16], 'float32', device),
      ]
      const dense = ({ values }: { values: Float32Array }, s: number) => ({
        data: values,
        shape: [s, values.length / s],
      })
      const expected = cascade(text).evaluate(
        { Q: dense(q, sq), K: dense(k, sk), V: dense(v, sk) },
        { scale: 0.4, off: sk - sq },
      )
      const by: Record<string, Tensor> = { Q: q.tensor, K: k.tensor, V: v.tensor }
      const inputs = cascade(text).ir.inputs.map((tensor) => by[tensor]!)
      const { O, LSE } = plan(...inputs, { scale: 0.4 })
      close((await O!.read()) as Float32Array, expected.O!.data, `${what} ${sq} ${sk}`)
      close((await LSE!.read()) as Float32Array, expected.LSE!.data, `${what} ${sq} ${sk}`)
    }
  })

  it.each(cases)(
    'fills the slots of $what',
    async ({ text, scalars, slots, perHead, square, pairs }) => {
      const parsed = cascade(text)
      const plan = parsed.compile()
      expect(plan.explain().slots).toMatchObject(slots)
      const [h, d, f] = [3, 8, 16]
      for (const [sq, sk] of [
        [7, 7],
        [21, 35],
      ] as const) {
        if (square && sq !== sk) continue
        const given: Record<string, Tensor> = {}
        const dense: Record<string, { data: Float32Array; shape: number[] }> = {}
        for (const [name, s, size] of [
          ['Q', sq, d],
          ['K', sk, d],
          ['V', sk, f],
        ] as const) {
          const { tensor: whole, values } = await sample(rng, [1, s, h, size], 'float32', device)
          given[name] = whole
          const data = new Float32Array(values.length)
          for (let i = 0; i < s; i++)
            for (let j = 0; j < h; j++)
              for (let e = 0; e < size; e++)
                data[(j * s + i) * size + e] = values[(i * h + j) * size + e]!
          dense[name] = { data, shape: [h, s, size] }
        }
        for (const name of perHead ?? []) {
          const data = rng.normals(h).map((x) => x * 0.2)
          given[name] = tensor(data, [h], { device })
          dense[name] = { data, shape: [h] }
        }
        if (pairs) {
          const data = rng.normals(sq * sk)
          const shape = plan.explain().packed.includes(pairs) ? [1, 1, sq, sk] : [sq, sk]
          given[pairs] = tensor(data, shape, { device })
          dense[pairs] = { data, shape: [sq, sk] }
        }
        const off = parsed.ir.scalars.includes('off') ? { off: sk - sq } : {}
        const expected = parsed.evaluate(dense, { ...scalars, ...off })
        const results = plan(...parsed.ir.inputs.map((name) => given[name]!), { ...scalars })
        expect(Object.keys(results).sort()).toEqual(Object.keys(expected).sort())
        const out = await results.O!.read()
        const turned = expected.O!.data.map((_, at) => {
          const [row, rest] = [Math.floor(at / (h * f)), at % (h * f)]
          return expected.O!.data[(Math.floor(rest / f) * sq + row) * f + (rest % f)]!
        })
        close(out as Float32Array, turned, `${sq} ${sk}`)
        if (results.L) close((await results.L.read()) as Float32Array, expected.L!.data, 'lse')
      }
    },
  )

  it('finds lightning as a recurrence and as a masked product', async () => {
    const product = `
      S[t,u] = sum(e) Q[t,e] * K[u,e] * scale   where u <= t
      O[t,f] = sum(u) S[t,u] * exp(-slope * (t - u)) * V[u,f]`
    const [t, e, f] = [37, 8, 5]
    const [q, k, v] = [
      await sample(rng, [1, t, 1, e], 'float32', device),
      await sample(rng, [1, t, 1, e], 'float32', device),
      await sample(rng, [1, t, 1, f], 'float32', device),
    ]
    const S0 = rng.normals(e * f)
    const scalars = { slope: 0.3, scale: 0.5 }
    for (const text of [product, lightningDefinition]) {
      const parsed = cascade(text)
      const given: Record<string, [Tensor, ArrayLike<number>, number[]]> = {
        Q: [q.tensor, q.values, [t, e]],
        K: [k.tensor, k.values, [t, e]],
        V: [v.tensor, v.values, [t, f]],
        S0: [tensor(S0, [1, 1, e, f], { device }), S0, [e, f]],
      }
      const inputs = parsed.ir.inputs.map((name) => [name, ...given[name]!] as const)
      const { O } = parsed.evaluate(
        Object.fromEntries(inputs.map(([name, , data, shape]) => [name, { data, shape }])),
        scalars,
      )
      const plan = parsed.compile()
      expect(plan.explain().operator).toBe('lightning')
      const result = plan(...inputs.map(([, given]) => given), scalars)
      close((await result.O!.read()) as Float32Array, O!.data, text)
    }
  })

  it.each(Object.entries(empties))('computes %s', async (_, [operator, text]) => {
    const parsed = cascade(text)
    const [p, m, e, f] = [6, text.includes('iterate') ? 6 : 9, 8, 8]
    const shapes: Record<string, number[]> = { Q: [p, e], K: [m, e], C: [m, e], V: [m, f] }
    const given = Object.fromEntries(
      parsed.ir.inputs.map((name) => {
        const shape = shapes[name] ?? [2]
        return [name, { data: rng.normals(shape.reduce((a, b) => a * b, 1)), shape }]
      }),
    )
    given.C?.data.fill(0, 0, e)
    const { O } = parsed.evaluate(given)
    let operators = 0
    for (const fused of ['required', 'preferred'] as const) {
      let plan: ReturnType<Cascade['compile']>
      try {
        plan = parsed.compile({ fused })
      } catch (error) {
        expect((error as HeddleError).code).toMatch(/^CAS02[012]$/)
        expect((error as HeddleError).span).toBeDefined()
        continue
      }
      const { operator: own, packed } = plan.explain()
      expect(own).toBe(operator)
      const tensors = parsed.ir.inputs.map((name) => {
        const { data, shape } = given[name]!
        const four = packed.includes(name) ? [1, shape[0]!, 1, shape[1]!] : shape
        return tensor(data, four, { device })
      })
      const result = plan(...tensors)
      close((await result.O!.read()) as Float32Array, O!.data, `${fused} ${text}`)
      operators++
    }
    expect(operators).toBe(operator === 'einsum' ? 1 : 2)
  })

  it.each(Object.entries(far))('computes %s', async (_, one) => {
    const parsed = cascade(one.text)
    const sizes: Record<string, number> = { P: 5, M: 7, E: 8, F: 8, ...one.sizes }
    const rows = parsed.ir.variables.includes('t') ? ['T', 'T'] : ['P', 'M']
    const axes: Record<string, string> = {
      ...{ Q: `${rows[0]} E`, K: `${rows[1]} E`, V: `${rows[1]} F` },
      ...one.inputs,
    }
    const given = Object.fromEntries(
      parsed.ir.inputs.map((name) => {
        const shape = axes[name]!.split(' ').map((rank) => sizes[rank]!)
        const data = rng.normals(shape.reduce((a, b) => a * b, 1))
        const own = one.numbers?.[name]
        return [name, { data: own ? data.map((_, i) => own(i)) : data, shape }]
      }),
    )
    const { O } = parsed.evaluate(given, one.scalars ?? {})
    for (const fused of ['required', 'preferred'] as const) {
      if (fused === 'required' && one.operator === undefined) {
        expect((await failure(() => parsed.compile())).code).toMatch(/^CAS02[012]$/)
        continue
      }
      const plan = parsed.compile({ fused })
      const { operator, packed } = plan.explain()
      expect(operator).toBe(one.operator ?? 'einsum')
      const tensors = parsed.ir.inputs.map((name) => {
        const { data, shape } = given[name]!
        const four = packed.includes(name) ? [1, shape[0]!, 1, shape[1]!] : shape
        return tensor(data, four, { device })
      })
      const result = plan(...tensors, one.scalars ?? {})
      const bound = 2e-5 * (one.loose ?? 1) * Math.max(1, largest(O!.data))
      const made = (await result.O!.read()) as Float32Array
      expect(maxError(made, O!.data), fused).toBeLessThanOrEqual(bound)
    }
  })

  it.each([
    {
      what: 'a gate that is projected',
      text: `
        G[p,f] = sum(c) X[p,c] * WG[c,f]
        T[p,m] = sum(e) Q[p,e] * K[m,e]${weighted.replace('O[', 'Y[')}
        O[p,o] = sum(f) Y[p,f] * G[p,f] * WO[o,f]`,
    },
    {
      what: 'a gated unit',
      text: `
        G[p,f] = sum(c) X[p,c] * WG[c,f]
        S[p,m] = sum(e) Q[p,e] * K[m,e] / P   where m <= p
        Y[p,f] = sum(m) pow(relu(S[p,m]), 2) * V[m,f]
        O[p,o] = sum(f) G[p,f] * Y[p,f] * WO[o,f]`,
    },
  ])('makes what is beside an operator as the text does: $what', async ({ text }) => {
    const parsed = cascade(text)
    const plan = parsed.compile()
    expect(plan.explain().operator).toBe('attention')
    const [p, c, f, o] = [32, 512, 32, 256]
    const shapes: Record<string, number[]> = {
      ...{ X: [p, c], WG: [c, f], WO: [o, f], Q: [p, 8], K: [p, 8], V: [p, f] },
    }
    const given = Object.fromEntries(
      parsed.ir.inputs.map((name) => {
        const shape = shapes[name]!
        return [name, { data: rng.normals(shape.reduce((a, b) => a * b, 1)), shape }]
      }),
    )
    const { packed } = plan.explain()
    const tensors = parsed.ir.inputs.map((name) => {
      const { data, shape } = given[name]!
      const four = packed.includes(name) ? [1, shape[0]!, 1, shape[1]!] : shape
      return tensor(data, four, { device })
    })
    // multiplied out, 1.3e8 products take far longer
    const start = performance.now()
    const made = (await plan(...tensors).O!.read()) as Float32Array
    expect(performance.now() - start).toBeLessThan(5000)
    close(made, parsed.evaluate(given).O!.data, text)
  })

  it('repeats what heads share, and disposes of it', async () => {
    const [t, h, d] = [5, 3, 6]
    const q = await sample(rng, [1, t, h, d], 'float32', device)
    const k = await sample(rng, [1, t, h, d], 'float32', device)
    const v = await sample(rng, [1, t, 1, d], 'float32', device)
    const heads = ({ values }: { values: Float32Array }, n: number) => ({
      data: values.map(
        (_, i) => values[((Math.floor(i / d) % t) * n + Math.floor(i / t / d)) * d + (i % d)]!,
      ),
      shape: n === 1 ? [t, d] : [n, t, d],
    })
    const inputs = { Q: heads(q, h), K: heads(k, h), V: heads(v, 1) }
    const score = 'S[h,t,u] = sum(e) Q[h,t,e] * K[h,u,e]   where u <= t'
    for (const text of [
      `${score}
       O[h,t,f] = sum(u) S[h,t,u] * exp(-0.3 * (t - u)) * V[u,f]`,
      `${score}
       A[h,t,u] = exp(S[h,t,u])
       D[h,t]   = sum(u) A[h,t,u]
       O[h,t,f] = sum(u) A[h,t,u] * V[u,f] / D[h,t]`,
    ]) {
      const parsed = cascade(text)
      const [plan, expected] = [parsed.compile(), parsed.evaluate(inputs).O!.data]
      const before = memory().tensors
      const { O } = plan(q.tensor, k.tensor, v.tensor)
      const out = (await O!.read()) as Float32Array
      close(heads({ values: out }, h).data, expected, text)
      O!.dispose()
      expect(memory().tensors, text).toBeLessThanOrEqual(before)
      const two = await failure(() => plan(q.tensor, k.tensor, k.tensor))
      expect(two.message).toBe('cascade: V must have one head, got 3 (the text reads it without h)')
    }
  })

  it('finds merge under other names', async () => {
    const text = mergeDefinition.replace(/\bp\b/g, 'row').replace(/\bA\[/g, 'First[')
    const plan = cascade(text).compile()
    expect(plan.explain().operator).toBe('merge')
    const [q, k] = [
      (await sample(rng, [1, 5, 2, 8], 'float32', device)).tensor,
      (await sample(rng, [1, 9, 2, 8], 'float32', device)).tensor,
    ]
    const parts = [k.slice(1, 0, 4), k.slice(1, 4)].map((part) => attention(q, part, part))
    const { O } = plan(parts[0]!.lse, parts[1]!.lse, parts[0]!.out, parts[1]!.out)
    const whole = await attention(q, k, k).out.read()
    close((await O!.read()) as Float32Array, whole as Float32Array, 'merge')
  })

  it('finds pages', async () => {
    const parsed = cascade(`
      split m -> (m1, m0 : 8) tail mask
      S[b,h,p,m1,m0] = sum(e) Q[b,p,h,e] * K[table[b,m1],m0,h,e] * scale   where m1*M0 + m0 <= p + off
      G[b,h,p]       = max(m1,m0) S[b,h,p,m1,m0]
      N[b,h,p,m1,m0] = exp(S[b,h,p,m1,m0] - G[b,h,p])
      D[b,h,p]       = sum(m1,m0) N[b,h,p,m1,m0]
      O[b,p,h,f]     = sum(m1,m0) N[b,h,p,m1,m0] * V[table[b,m1],m0,h,f] / D[b,h,p]`)
    const plan = parsed.compile()
    expect(plan.explain().slots).toMatchObject({ k: 'K', v: 'V', blockTable: 'table' })
    const [b, sq, h, e, f, pages] = [2, 5, 2, 8, 16, 9]
    const draw = async (...shape: number[]) => {
      const { tensor: made, values } = await sample(rng, shape, 'float32', device)
      return [made, { data: values, shape }] as const
    }
    const [q, Q] = await draw(b, sq, h, e)
    const [k, K] = await draw(pages, 8, h, e)
    const [v, V] = await draw(pages, 8, h, f)
    const order = Int32Array.from([4, 0, 8, 3, 7, 1])
    const table = tensor(order, [b, 3], { device })
    const by: Record<string, Tensor> = { Q: q, K: k, V: v, table }
    const tensors = parsed.ir.inputs.map((name) => by[name]!)
    for (const m of [17, 24]) {
      const inputs = { Q, K, V, table: { data: order, shape: [b, 3] } }
      const scalars = { scale: 0.4, off: m - sq }
      const { O } = parsed.evaluate(inputs, scalars, { sizes: { M: m } })
      // all that the table has, unless the call says less
      const given = m === 24 ? { scale: 0.4 } : { ...scalars, M: m }
      close((await plan(...tensors, given).O!.read()) as Float32Array, O!.data, `${m} keys`)
    }
    const short = await failure(() => plan(q, table, k.slice(1, 0, 4), v.slice(1, 0, 4)))
    expect(short.message).toBe('cascade: rank M0 is 8 from its split but 4 from K')
    const half = parsed.toString().replace('V[table[b,m1],m0,h,f]', 'V[b,m1*M0 + m0,h,f]')
    const refused = await failure(() => cascade(half).compile())
    expect(refused.message).toContain('its pages are not those of k and v alone')
    // the values of one page and the keys of another, of one tensor
    const both = parsed.toString().replace('V[table', 'K[other')
    expect((await failure(() => cascade(both).compile())).message).toContain('by one table')
  })

  it('finds a product of matrices along whatever axes', async () => {
    const text = 'Y[b,o,s] = sum(i,j) X[j,b,s,i] * 0.5 * W[i,o,j] * scale'
    const parsed = cascade(text)
    const plan = parsed.compile()
    expect(plan.explain()).toMatchObject({ operator: 'linear', slots: { x: 'X', weight: 'W' } })
    const x = await sample(rng, [3, 2, 7, 5], 'float32', device)
    const w = await sample(rng, [5, 9, 3], 'float32', device)
    const inputs = {
      X: { data: x.values, shape: [3, 2, 7, 5] },
      W: { data: w.values, shape: [5, 9, 3] },
    }
    const expected = parsed.evaluate(inputs, { scale: 0.7 }).Y!
    const { Y } = plan(x.tensor, w.tensor, { scale: 0.7 })
    expect(Y!.shape).toEqual(expected.shape)
    close((await Y!.read()) as Float32Array, expected.data, text)
    // with a batch of products, of bfloat16
    const batched = cascade('Y[p,h,m] = sum(e) Q[h,p,e] * K[h,m,e]').compile()
    const q = (await sample(rng, [3, 7, 16], 'bfloat16', device)).tensor
    const { Y: scores } = batched(q, q)
    expect(scores!.dtype).toBe('bfloat16')
    expect(await scores!.select(1, 2).read()).toEqual(
      await linear(q.select(0, 2), q.select(0, 2)).read(),
    )
    const error = await failure(() => batched(q.select(0, 0), q))
    expect(error.message).toBe('cascade: Q must be [h, p, e], got [7, 16]')
    const other = await failure(() => batched(q, q.slice(2, 0, 8).contiguous().reshape([6, 7, 4])))
    expect(other.message).toBe('cascade: rank H is 3 from Q but 6 from K')
    // a sum over what neither operand has is as many times as large
    const unread = await failure(() => cascade('Y[a,b] = sum(i,j) A[a,i] * B[b,i]').compile())
    expect(unread.message).toContain('no kernel takes this cascade')
  })

  it('finds a norm under other names', async () => {
    const plan = cascade(`
      Square[r] = sum(c) In[r,c] * In[r,c]
      Out[r,c]  = Gain[c] * In[r,c] / sqrt(Square[r] / C + small)`).compile()
    const [x, gain] = [
      (await sample(rng, [5, 24], 'float32', device)).tensor as Tensor<'float32'>,
      (await sample(rng, [24], 'float32', device)).tensor as Tensor<'float32'>,
    ]
    const { Out } = plan(x, gain, { small: 0.1 })
    expect(await Out!.read()).toEqual(await norm(x, gain, { eps: 0.1 }).read())
  })

  it('finds element-wise operators and norms along several axes', async () => {
    const [a, b] = [
      (await sample(rng, [2, 3, 16], 'float32', device)).tensor as Tensor<'float32'>,
      (await sample(rng, [2, 3, 16], 'float32', device)).tensor as Tensor<'float32'>,
    ]
    const gated = cascade('Y[b,t,j] = A[b,t,j] / (1 + exp(-A[b,t,j])) * U[b,t,j]').compile()
    expect(gated.explain().operator).toBe('glu')
    expect(await gated(a, b).Y!.read()).toEqual(await glu(a, b).read())
    // in the order in which a text reads them
    const turned = cascade('Y[b,t,j] = U[b,t,j] * (A[b,t,j] * sigmoid(A[b,t,j]))').compile()
    expect(turned.explain().operator).toBe('glu')
    expect(await turned(b, a).Y!.read()).toEqual(await glu(a, b).read())
    const bare = cascade(`
      S[b,t]   = sum(c) X[b,t,c] * X[b,t,c]
      Y[b,t,c] = X[b,t,c] * rsqrt(S[b,t] / C + eps)`).compile()
    expect(await bare(a, { eps: 0.1 }).Y!.read()).toEqual(
      await norm(a, undefined, { eps: 0.1 }).read(),
    )
    const normed = cascade(`
      S[b,t]   = sum(c) X[b,t,c] * X[b,t,c]
      Y[b,t,c] = X[b,t,c] * rsqrt(S[b,t] / C + eps) * g[c]`).compile()
    const gain = b.slice(0, 0, 1).slice(1, 0, 1).contiguous().reshape([16])
    const { Y } = normed(a, gain, { eps: 0.1 })
    expect(await Y!.read()).toEqual(await norm(a, gain, { eps: 0.1 }).read())
  })

  it('runs the kernel that the operator runs, which explain names', async () => {
    const q = (await sample(rng, [1, 128, 2, 64], 'bfloat16', device)).tensor
    const plan = cascade(attentionDefinition).compile()
    expect(explain(plan, q, q, q)).toEqual(explain(attention, q, q, q, { causal: true }))
    const { O } = plan(q, q, q)
    expect(await O!.read()).toEqual(await attention(q, q, q, { causal: true }).out.read())
  })
})

describe('compile', () => {
  it('finds the operator of every definition that is one call', async () => {
    const found: Record<string, string> = {}
    for (const [operator, text] of Object.entries(definitions)) {
      try {
        found[operator] = cascade(text).compile().explain().operator
      } catch (error) {
        found[operator] = (error as HeddleError).code
      }
    }
    expect(found).toEqual({
      attention: 'attention',
      'attention.backward': 'attention.backward',
      'attention.sigmoid': 'attention',
      'attention.blocks': 'CAS021',
      'attention.relu': 'attention',
      'attention.softplus': 'attention',
      'attention.options': 'attention',
      lightning: 'lightning',
      'lightning.backward': 'lightning.backward',
      'lightning.decode': 'lightning',
      merge: 'merge',
      linear: 'linear',
      norm: 'norm',
      rope: 'rope',
      embed: 'embed',
      glu: 'glu',
      add: 'add',
      mul: 'mul',
      silu: 'silu',
      sigmoid: 'sigmoid',
      probe: 'CAS020',
      'probe.rows': 'CAS021',
      'probe.lines': 'CAS020',
      'probe.antidiagonal': 'CAS021',
      keep: 'CAS020',
      'keep.coverage': 'CAS021',
      softplus: 'softplusAttention',
      streaming: 'attention',
      hip: 'CAS020',
      infiniteHip: 'CAS020',
      flexPrefill: 'CAS020',
      minimax: 'CAS020',
      transnormer: 'CAS020',
    })
  })

  const score = 'S[p,m] = sum(e) Q[p,e] * K[m,e]'
  const refused = (text: string) => failure(() => (cascade(text) as Cascade).compile())
  it.each([
    [
      'CAS020',
      'Y[p] = X[p] * X[p]',
      'no kernel takes this cascade; the nearest operator, attention, does not take Y: it is no weighted sum',
    ],
    [
      'CAS020',
      'init S[i=0] = 0\niterate i {\nS[i+1] = S[i] + A[i]\n}',
      'no kernel takes this cascade; every tensor is read by another, so it has no result',
    ],
    [
      'CAS020',
      'init S[t=0,p] = 0\niterate t {\nS[t+1,p] = S[t,p] + A[t,p] * S[t,p]\n}\nY[p] = S[T,p]',
      'no kernel takes this cascade; Y hangs on S, whose recurrence is not a sum with a constant decay',
    ],
    [
      'CAS020',
      'Y[p] = X[p] where p > 2',
      'no kernel takes this cascade; Y leaves points of its result empty',
    ],
    ['CAS020', 'Y[p] = max(X[p], -inf)', 'no kernel takes this cascade; Y computes with infinity'],
    [
      'CAS022',
      `${score}
       D[p] = sum(m) exp(S[p,m])
       O[p,f] = sum(m) exp(S[p,m]) * V[m,f] / (D[p] + exp(sink[p]))`,
      'the nearest operator, attention, does not take O: its sink is sink[p], no number for each head',
    ],
  ])('refuses with %s', async (code, text, message) => {
    const error = await refused(text)
    expect(error.message).toBe(`cascade: ${message}`)
    expect(error.code).toBe(code)
    expect(error.span).toBeDefined()
  })

  it('refuses what grows beyond bounds', async () => {
    const double = Array.from(
      { length: 20 },
      (_, i) => `T${i + 1}[p] = T${i}[p] + T${i}[p+${2 ** i}]`,
    )
    const error = await refused(['T0[p] = X[p]', ...double].join('\n'))
    expect(error.message).toBe(
      'cascade: no kernel takes this cascade; it computes far more than one operator does',
    )
    expect(error.code).toBe('CAS020')
  })

  it('refuses several passes with the reasons and the rewrite', async () => {
    const error = await refused(`${score}
      G[p] = max(m) S[p,m]
      N[p,m] = exp(S[p,m] - G[p])
      D[p] = sum(m) N[p,m] * N[p,m]
      O[p,f] = sum(m) N[p,m] * V[m,f] / D[p]`)
    expect(error.code).toBe('CAS021')
    expect(error.message).toBe(
      'cascade: M takes 3 passes that no kernel fuses (S read by G; G complete only after all m; N reads S again. ' +
        'N read by D; D complete only after all m; O reads N again); the nearest operator, attention, does not take O: ' +
        'its divisor is not the sum of its weights; ' +
        'defer-division makes it M: 3 -> 2 passes; divisions over P*F*M become divisions over P*F',
    )
    // parts of heads take no pass over keys away
    const mixed = await refused(`
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      L[h,p]   = logsumexp(m) S[h,p,m]
      A[h,p,m] = exp(S[h,p,m] - L[h,p])
      B[g,p,m] = sum(h) W[g,h] * A[h,p,m]
      O[g,p,f] = sum(m) B[g,p,m] * V[g,m,f]`)
    expect(mixed.code).toBe('CAS021')
    expect(mixed.message).not.toContain('makes it parts')
  })

  it('refuses calls that the operator would compute otherwise', async () => {
    const q = tensor(new Float32Array(2 * 8), [1, 2, 1, 8])
    const k = tensor(new Float32Array(3 * 8), [1, 3, 1, 8])
    const plan = cascade(attentionDefinition).compile()
    const top = await failure(() => plan(q, k, k, { off: 0 }))
    expect(top.message).toBe(
      'cascade: attention ends its last row at the last key, 1 from its index here, but off is 0',
    )
    expect(top.code).toBe('CAS022')
    // widths that differ before zeros are put behind, and heads that the text does not share
    const narrow = await failure(() => plan(q.slice(3, 0, 6), k.slice(3, 0, 7), k))
    expect(narrow.message).toBe('cascade: rank E is 6 from Q but 7 from K')
    expect(narrow.code).toBe('CAS003')
    const heads = cascade(`
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      A[h,p,m] = exp(S[h,p,m])
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]`).compile()
    const [two, three] = [q.expand([1, 2, 2, 8]), k.expand([1, 3, 2, 8])]
    expect((await failure(() => heads(two, k, three))).code).toBe('ERR_SHAPE')
    expect((await failure(() => heads(q.expand([2, 2, 1, 8]), k, k))).code).toBe('ERR_SHAPE')
    // what a call is told of its own text
    const masked = cascade(`
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where seen[h,m] == 1
      D[h,p]   = sum(m) exp(S[h,p,m])
      O[h,p,f] = sum(m) exp(S[h,p,m]) * V[h,m,f] / D[h,p]`).compile()
    const floats = await failure(() => masked(q, k, tensor([1, 1, 1], [1, 3]), k))
    expect(floats.code).toBe('CAS010')
    expect(floats.span).toEqual([2, 53, 9])
    const ones = tensor([1, 1, 1, 1, 1, 1], [2, 3], { dtype: 'int32' })
    const more = await failure(() => masked(q, k, ones, k))
    expect(more.message).toBe(
      'cascade: rank H is 2 from seen but 1 from axis h of tensors that are [b, s, h, d]',
    )
    expect(more.span).toEqual([2, 53, 9])
    const before = cascade(`
      S[p,m] = sum(e) Q[p,e] * K[m,e]   where m < n
      L[p]   = logsumexp(m) S[p,m]
      O[p,f] = sum(m) exp(S[p,m] - L[p]) * V[m,f]`).compile()
    const parts = await failure(() => before(q, k, k, { n: 1.5 }))
    expect(parts.message).toBe('cascade: masks count in whole numbers, but n is 1.5')
    const forgets = cascade(`
      S[t,u] = sum(e) Q[t,e] * K[u,e]   where u <= t
      O[t,f] = sum(u) S[t,u] * pow(a, t - u) * V[u,f]`).compile()
    for (const a of [0, -0.5]) {
      const error = await failure(() => forgets(q, q, q, { a }))
      expect(error.message).toContain('lightning takes finite slopes from 0 on')
      expect(error.code).toBe('CAS022')
    }
    // pairs of an odd number of channels, of which the last has no other
    const pairs = cascade(`
      X[p,r] = Q[p,2*r] * c[r] - Q[p,2*r + 1] * s[r]
      T[p,m] = sum(r) (X[p,r] * A[m,r] + Y[p,r] * B[m,r])
      W[p,m] = exp(T[p,m])
      D[p]   = sum(m) W[p,m]
      O[p,f] = sum(m) W[p,m] * V[m,f] / D[p]`).compile()
    const c = tensor(new Float32Array(4), [4])
    const [y, a] = [q.slice(3, 0, 4), k.slice(3, 0, 4)]
    const lone = tensor(new Float32Array(14), [2, 7])
    const odd = await failure(() => pairs(lone, c, c, a, y, a, k))
    expect(odd.message).toBe(
      'cascade: Q is read from 1 to 7 along an axis of 7, where nothing is empty',
    )
    expect(odd.code).toBe('CAS022')
    // sizes that tensors have may be given, and have to agree
    expect(plan(q, k, k, { M: 3, E: 8 }).O!.shape).toEqual([1, 2, 1, 8])
    const other = await failure(() => plan(q, k, k, { M: 4 }))
    expect(other.message).toBe('cascade: rank M is 4 from the call but 3 from its tensors')
    expect(other.code).toBe('CAS003')
    expect((await failure(() => plan(q, k))).message).toBe(
      'cascade: inputs must be 3 tensors (Q, K, V) and the scalars, got an array of 2',
    )
    expect((await failure(() => plan(q, k, k, { skale: 1 }))).message).toBe(
      'cascade: unknown option "skale"; did you mean "scale"?',
    )
  })
})
