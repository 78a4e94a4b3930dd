import {
  cascade,
  type DenseArray,
  definitions,
  type HeddleError,
  type Tensor,
  tensor,
} from 'heddle'
import { expect, it } from 'vitest'
import { rounded } from '../support/codecs.js'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { type Random, random } from '../support/random.js'

// Mechanisms as papers and code bases write them. Each becomes the operator named here and gives what the text gives, or is
// refused for the reason named here and runs statement by statement.
interface Case {
  text: string
  /** Axes of each tensor as its text has them, an integer tensor as `P < 3`. */
  inputs: Record<string, string>
  scalars?: Record<string, number>
  operator?: 'attention' | 'lightning'
  refused?: [code: string, reason: string]
  /** Ranks whose sizes no input tells. */
  ranks?: readonly string[]
  /** Slots that tell how it was taken. */
  slots?: Record<string, unknown>
  /** As many rows as keys. */
  square?: boolean
  /** Numbers of a tensor by their places. */
  numbers?: Record<string, (i: number, rng: Random) => number>
  /** `off` is not the distance alone that attention has anyway, and is given. */
  told?: boolean
}

const scores = 'S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)'
const heads = { Q: 'H P E', K: 'H M E', V: 'H M F' }
const softmax = `
  A[h,p,m] = exp(T[h,p,m])
  D[h,p]   = sum(m) A[h,p,m]
  O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]`

const cases: Record<string, Case> = {
  'queries scaled in advance (Transformer)': {
    text: `
      Qs[h,p,e] = Q[h,p,e] * rsqrt(E)
      T[h,p,m]  = sum(e) Qs[h,p,e] * K[h,m,e]   where !(m > p + off)${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { q: 'Q', scale: 'E^-0.5', causal: 'off + p' },
  },
  'softmax of base two with a temperature': {
    text: `
      ${scores}
      G[h,p]   = max(m) S[h,p,m] / tau
      A[h,p,m] = exp2((S[h,p,m] / tau - G[h,p]) * 1.4426950408889634)
      D[h,p]   = sum(m) A[h,p,m]
      W[h,p,m] = A[h,p,m] / D[h,p]
      O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f]`,
    inputs: heads,
    scalars: { tau: 1.7 },
    operator: 'attention',
  },
  'a sink under the running maximum (gpt-oss)': {
    text: `
      ${scores}                                    where p + off - m >= 0
      G[h,p]   = max(m) S[h,p,m]
      X[h,p]   = max(G[h,p], sink[h])
      A[h,p,m] = exp(S[h,p,m] - X[h,p])
      Z[h,p]   = exp(sink[h] - X[h,p])
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / (D[h,p] + Z[h,p])`,
    inputs: { ...heads, sink: 'H' },
    operator: 'attention',
    slots: { sink: 'sink[h]' },
  },
  'softmax off by one with its maximum (Miller)': {
    text: `
      ${scores}
      G[h,p]   = max(m) S[h,p,m]
      A[h,p,m] = exp(S[h,p,m] - G[h,p])
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] / (exp(-G[h,p]) + D[h,p]) * V[h,m,f]`,
    inputs: heads,
    operator: 'attention',
    slots: { sink: '0' },
  },
  'a sliding window (Mistral)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)   where m <= p + off && p + off - m < w${softmax}`,
    inputs: heads,
    scalars: { w: 4 },
    operator: 'attention',
    slots: { window: '1 + off + p + -1 w' },
  },
  'a window on both sides (Longformer)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)   where abs(p - m) <= w || m < g || p < g${softmax}`,
    inputs: heads,
    scalars: { w: 3, g: 1 },
    operator: 'attention',
    square: true,
  },
  'documents and a prefix (PrefixLM in packed rows)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where doc[p] == dok[m] && (m <= p || m < n)${softmax}`,
    inputs: { ...heads, doc: 'P < 3', dok: 'M < 3' },
    scalars: { n: 4 },
    operator: 'attention',
  },
  'dilated rows (Sparse Transformer)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where m <= p + off && (p - m < 3 || slot[m] == 0)${softmax}`,
    inputs: { ...heads, slot: 'M < 3' },
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'ALiBi as a distance (Press)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] - slope[h] * (p + off - m)   where m <= p + off${softmax}`,
    inputs: { ...heads, slope: 'H' },
    operator: 'attention',
    slots: { slopes: 'slope[h]' },
  },
  'ALiBi without a mask': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] - slope[h] * abs(p - m)${softmax}`,
    inputs: { ...heads, slope: 'H' },
    operator: 'attention',
    square: true,
  },
  'a table of clamped distances (Shaw, T5)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + R[h, clamp(m - p + 4, 0, 8)]   where m <= p + off${softmax}`,
    inputs: { ...heads, R: 'H 9' },
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'a table that ends, beyond which nothing is seen (Swin)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + R[h, m - p + 4]${softmax}`,
    inputs: { ...heads, R: 'H 9' },
    operator: 'attention',
    square: true,
  },
  'vectors of clamped distances (Shaw)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      B[h,p,m] = sum(e) Q[h,p,e] * R[clamp(m - p + 4, 0, 8), e]
      T[h,p,m] = (S[h,p,m] + B[h,p,m]) / sqrt(E)${softmax}`,
    inputs: { ...heads, R: '9 E' },
    operator: 'attention',
    square: true,
  },
  'content and position biases (Transformer-XL)': {
    text: `
      T[h,p,m] = sum(e) (Q[h,p,e] + u[h,e]) * K[h,m,e] * 0.3   where m <= p + off${softmax}`,
    inputs: { ...heads, u: 'H E' },
    operator: 'attention',
  },
  'cosine scores with a learned temperature (Swin v2)': {
    text: `
      NQ[h,p]  = sum(e) Q[h,p,e] * Q[h,p,e]
      NK[h,m]  = sum(e) K[h,m,e] * K[h,m,e]
      C[h,p,m] = sum(e) Q[h,p,e] / sqrt(NQ[h,p]) * K[h,m,e] / sqrt(NK[h,m])
      T[h,p,m] = C[h,p,m] * exp(t[h]) + Bias[h,p,m]${softmax}`,
    inputs: { ...heads, t: 'H', Bias: 'H P M' },
    operator: 'attention',
    slots: { bias: 'Bias[h,p,#2M]' },
  },
  'normalised queries and keys with gains (Qwen3)': {
    text: `
      NQ[h,p]   = sum(e) Q[h,p,e] * Q[h,p,e]
      NK[h,m]   = sum(e) K[h,m,e] * K[h,m,e]
      X[h,p,e]  = Q[h,p,e] * rsqrt(NQ[h,p] / E + eps) * WQ[e]
      Y[h,m,e]  = K[h,m,e] * rsqrt(NK[h,m] / E + eps) * WK[e]
      T[h,p,m]  = sum(e) X[h,p,e] * Y[h,m,e] * 0.3      where m <= p + off${softmax}`,
    inputs: { ...heads, WQ: 'E', WK: 'E' },
    scalars: { eps: 1e-3 },
    operator: 'attention',
  },
  'squared distances (L2 attention, Kim)': {
    text: `
      T[h,p,m] = sum(e) -(Q[h,p,e] - K[h,m,e]) * (Q[h,p,e] - K[h,m,e]) / sqrt(E)${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { scale: '2 E^-0.5' },
  },
  'the logarithm of the length as scale (SSMax)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] * s[h] * log(p + off + 1)   where m <= p + off${softmax}`,
    inputs: { ...heads, s: 'H' },
    operator: 'attention',
  },
  'temperatures of tokens (Selective attention)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] * tanh(a[h,p]) * sigmoid(c[h,m])   where m <= p + off${softmax}`,
    inputs: { ...heads, a: 'H P', c: 'H M' },
    operator: 'attention',
  },
  'a forget gate (FoX)': {
    text: `
      F1[h,m]  = sum(j) log(sigmoid(g[h,j]))          where j <= m
      ${scores}
      T[h,p,m] = S[h,p,m] + F1[h,p] - F1[h,m]         where m <= p${softmax}`,
    inputs: { ...heads, g: 'H M' },
    operator: 'attention',
    square: true,
  },
  'a gate behind it (gated attention, Qwen)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where m <= p + off
      A[h,p,m] = exp(T[h,p,m])
      D[h,p]   = sum(m) A[h,p,m]
      X[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]
      O[h,p,f] = X[h,p,f] * sigmoid(G[h,p,f])`,
    inputs: { ...heads, G: 'H P F' },
    operator: 'attention',
  },
  'values with a factor of their token': {
    text: `
      ${scores}
      D[h,p]   = sum(m) exp(S[h,p,m])
      O[h,p,f] = sum(m) exp(S[h,p,m]) / D[h,p] * V[h,m,f] * relu(r[h,m])`,
    inputs: { ...heads, r: 'H M' },
    operator: 'attention',
  },
  'two maps of which one is taken off (Differential Transformer)': {
    text: `
      S1[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)    where m <= p + off
      S2[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e] / sqrt(E)    where m <= p + off
      A1[h,p,m] = exp(S1[h,p,m])
      A2[h,p,m] = exp(S2[h,p,m])
      D1[h,p]   = sum(m) A1[h,p,m]
      D2[h,p]   = sum(m) A2[h,p,m]
      O[h,p,f]  = sum(m) (A1[h,p,m] / D1[h,p] - lambda * A2[h,p,m] / D2[h,p]) * V[h,m,f]`,
    inputs: { ...heads, X: 'H P E', Y: 'H M E' },
    scalars: { lambda: 0.4 },
    operator: 'attention',
  },
  'a decoupled position (MLA)': {
    text: `
      SC[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      SR[h,p,m] = sum(r) QR[h,p,r] * KR[m,r]
      T[h,p,m]  = (SC[h,p,m] + SR[h,p,m]) * scale     where m <= p + off${softmax}`,
    inputs: { ...heads, QR: 'H P R', KR: 'M R' },
    scalars: { scale: 0.2 },
    operator: 'attention',
    slots: { q2: 'QR', k2: 'KR' },
  },
  'one head of keys for all queries (MQA)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[m,e]   where m <= p + off
      D[h,p]   = sum(m) exp(S[h,p,m])
      O[h,p,f] = sum(m) exp(S[h,p,m]) * V[m,f] / D[h,p]`,
    inputs: { Q: 'H P E', K: 'M E', V: 'M F' },
    operator: 'attention',
  },
  'groups of queries as an axis of their own (GQA)': {
    text: `
      S[b,g,p,m] = sum(e) Q[b,g,p,e] * K[b,m,e]   where m <= p + off
      D[b,g,p]   = sum(m) exp(S[b,g,p,m])
      O[b,g,p,f] = sum(m) exp(S[b,g,p,m]) * V[b,m,f] / D[b,g,p]`,
    inputs: { Q: 'B G P E', K: 'B M E', V: 'B M F' },
    operator: 'attention',
  },
  'heads without a mask that share keys (MQA)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[m,e]
      D[h,p]   = sum(m) exp(S[h,p,m])
      O[h,p,f] = sum(m) exp(S[h,p,m]) * V[m,f] / D[h,p]`,
    inputs: { Q: 'H P E', K: 'M E', V: 'M F' },
    operator: 'attention',
  },
  'groups of queries in a batch (GQA)': {
    text: `
      S[b,n,g,p,m] = sum(e) Q[b,n,g,p,e] * K[b,n,m,e]   where m <= p + off
      D[b,n,g,p]   = sum(m) exp(S[b,n,g,p,m])
      O[b,n,g,p,f] = sum(m) exp(S[b,n,g,p,m]) * V[b,n,m,f] / D[b,n,g,p]`,
    inputs: { Q: 'B N G P E', K: 'B N M E', V: 'B N M F' },
    operator: 'attention',
  },
  'groups of queries of one sequence (GQA)': {
    text: `
      S[n,g,p,m] = sum(e) Q[n,g,p,e] * K[n,m,e] / sqrt(E)
      G1[n,g,p]  = max(m) S[n,g,p,m]
      A[n,g,p,m] = exp(S[n,g,p,m] - G1[n,g,p])
      D[n,g,p]   = sum(m) A[n,g,p,m]
      O[n,g,p,f] = sum(m) A[n,g,p,m] * V[n,m,f] / D[n,g,p]`,
    inputs: { Q: 'N G P E', K: 'N M E', V: 'N M F' },
    operator: 'attention',
  },
  'heads that look up their keys (GQA)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[own[h],m,e] / sqrt(E)   where m <= p + off
      D[h,p]   = sum(m) exp(S[h,p,m])
      O[h,p,f] = sum(m) exp(S[h,p,m]) * V[own[h],m,f] / D[h,p]`,
    inputs: { Q: 'H P E', K: 'N M E', V: 'N M F', own: 'H < 2' },
    operator: 'attention',
    slots: { k: 'K[own[h],#2M,#1E]', v: 'V[own[h],#2M,f]' },
  },
  'heads that look up their keys (GLA)': {
    text: `
      S[h,t,u] = sum(e) Q[h,t,e] * K[own[h],u,e]   where u <= t
      O[h,t,f] = sum(u) S[h,t,u] * pow(0.9, t - u) * V[own[h],u,f]`,
    inputs: { Q: 'H T E', K: 'N U E', V: 'N U F', own: 'H < 2' },
    operator: 'lightning',
  },
  'relu divided by the length (Wortsman)': {
    text: `
      ${scores}
      O[h,p,f] = sum(m) relu(S[h,p,m]) / M * V[h,m,f]`,
    inputs: heads,
    operator: 'attention',
    slots: { weights: 'relu', normalise: 'false' },
  },
  'sigmoid with the logarithm of the length (Ramapuram)': {
    text: `
      ${scores}
      O[h,p,f] = sum(m) V[h,m,f] / (1 + exp(log(M) - S[h,p,m]))`,
    inputs: heads,
    operator: 'attention',
    slots: { weights: 'sigmoid' },
  },
  ...Object.fromEntries(
    ['sigmoid(S[h,p,m])', 'relu(S[h,p,m]) * relu(S[h,p,m])', 'softplus(S[h,p,m])'].flatMap(
      (weight) =>
        ['', ' / D[h,p]'].map((divided): [string, Case] => [
          `${weight}${divided} over documents`,
          {
            text: `
            S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where doc[p] == dok[m]
            W[h,p,m] = ${weight}${
              divided &&
              `
            D[h,p]   = sum(m) W[h,p,m]`
            }
            O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f]${divided}`,
            inputs: { ...heads, doc: 'P < 4', dok: 'M < 4' },
            operator: 'attention',
            slots: { normalise: String(divided !== '') },
          },
        ]),
    ),
  ),
  'all that is added to a score': {
    text: definitions['attention.options'],
    inputs: { Q: 'P E', K: 'M E', B: 'P M', V: 'M F' },
    scalars: { scale: 0.4, window: 9, cap: 2, slope: 0.2, sink: -0.3 },
    operator: 'attention',
    slots: { window: '1 + off + p + -1 window', softCap: 'cap', slopes: 'slope', sink: 'sink' },
  },
  'capped scores (Gemma 2)': {
    text: `
      ${scores}
      T[h,p,m] = tanh(S[h,p,m] / 50) * 50     where m <= p + off${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { softCap: '50' },
  },
  'capped scores of two products with a bias behind': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      X[h,p,m] = sum(r) QR[h,p,r] * KR[h,m,r]
      T[h,p,m] = 3 * tanh((S[h,p,m] + X[h,p,m]) / 3) + Bias[p,m]${softmax}`,
    inputs: { ...heads, QR: 'H P R', KR: 'H M R', Bias: 'P M' },
    operator: 'attention',
  },
  'retention in parallel (RetNet)': {
    text: `
      S[h,t,u] = sum(e) Q[h,t,e] * K[h,u,e]              where u <= t
      O[h,t,f] = sum(u) S[h,t,u] * pow(gamma[h], t - u) * V[h,u,f]`,
    inputs: { Q: 'H T E', K: 'H U E', V: 'H U F', gamma: 'H' },
    operator: 'lightning',
    square: true,
  },
  'retention as a recurrence (RetNet)': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = gamma[h] * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f] / sqrt(E)
      }`,
    inputs: { K: 'H T E', V: 'H T F', gamma: 'H', Q: 'H T E' },
    operator: 'lightning',
  },
  'linear attention of features with its normaliser (Katharopoulos)': {
    text: `
      PQ[h,t,e] = if(Q[h,t,e] > 0, Q[h,t,e] + 1, exp(Q[h,t,e]))
      PK[h,t,e] = if(K[h,t,e] > 0, K[h,t,e] + 1, exp(K[h,t,e]))
      init S[t=0,h,e,f] = 0
      init Z[t=0,h,e] = 0
      iterate t {
        S[t+1,h,e,f] = S[t,h,e,f] + PK[h,t,e] * V[h,t,f]
        Z[t+1,h,e]   = Z[t,h,e] + PK[h,t,e]
        N[h,t,f]     = sum(e) PQ[h,t,e] * S[t+1,h,e,f]
        D[h,t]       = sum(e) PQ[h,t,e] * Z[t+1,h,e]
        O[h,t,f]     = N[h,t,f] / D[h,t]
      }`,
    inputs: { Q: 'H T E', K: 'H T E', V: 'H T F' },
    operator: 'lightning',
  },
  'a decay of each head from a state (Lightning Attention 2)': {
    text: `
      init S[t=0,h,e,f] = S0[h,e,f]
      iterate t {
        S[t+1,h,e,f] = lambda[h] * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      }`,
    inputs: { S0: 'H E F', lambda: 'H', K: 'H T E', V: 'H T F', Q: 'H T E' },
    operator: 'lightning',
    slots: { initialState: 'S0' },
  },
  'a decay that is a number, with a gate': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = 0.9 * S[t,h,e,f] + relu(K[h,t,e]) * V[h,t,f]
        O[h,t,f]     = sum(e) exp(Q[h,t,e]) * S[t+1,h,e,f] * sigmoid(G[h,t,f])
      }`,
    inputs: { K: 'H T E', V: 'H T F', Q: 'H T E', G: 'H T F' },
    operator: 'lightning',
  },
  'retention in chunks (RetNet)': {
    text: `
      rank J = 4;   split t -> (c, i : 4) tail mask
      init S[c=0,h,e,f] = 0
      iterate c {
        A[c,h,i,f]   = sum(e) Q[h, c*I + i, e] * S[c,h,e,f] * exp(-slope[h] * (i + 1))
        W[c,h,i,j]   = sum(e) Q[h, c*I + i, e] * K[h, c*I + j, e] * exp(-slope[h] * (i - j))   where j <= i
        B[c,h,i,f]   = sum(j) W[c,h,i,j] * V[h, c*I + j, f]
        O[h,c,i,f]   = A[c,h,i,f] + B[c,h,i,f]
        U[c,h,e,f]   = sum(j) exp(-slope[h] * (I - 1 - j)) * K[h, c*I + j, e] * V[h, c*I + j, f]
        S[c+1,h,e,f] = exp(-slope[h] * I) * S[c,h,e,f] + U[c,h,e,f]
      }`,
    inputs: { Q: 'H T E', slope: 'H', K: 'H T E', V: 'H T F' },
    refused: ['CAS020', ''],
  },
  'a decay of the token (Mamba 2, GLA)': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = sigmoid(a[h,t]) * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      }`,
    inputs: { a: 'H T', K: 'H T E', V: 'H T F', Q: 'H T E' },
    refused: ['CAS020', 'O hangs on S, whose recurrence'],
  },
  'the delta rule (DeltaNet)': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        W[h,t,f]     = sum(e) S[t,h,e,f] * K[h,t,e]
        S[t+1,h,e,f] = S[t,h,e,f] + beta[h,t] * K[h,t,e] * (V[h,t,f] - W[h,t,f])
        O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      }`,
    inputs: { K: 'H T E', beta: 'H T', V: 'H T F', Q: 'H T E' },
    refused: ['CAS020', 'O hangs on S, whose recurrence'],
  },
  'rotated queries and keys, pairs half a row apart (RoPE)': {
    text: `
      X[h,p,e] = Q[h,p,e] * cs[p + M - P,e] + if(e < E / 2, -Q[h,p,e + E / 2], Q[h,p,e - E / 2]) * sn[p + M - P,e]
      Y[h,m,e] = K[h,m,e] * cs[m,e] + if(e < E / 2, -K[h,m,e + E / 2], K[h,m,e - E / 2]) * sn[m,e]
      T[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e] / sqrt(E)   where m <= p + off${softmax}`,
    inputs: { ...heads, cs: 'M E', sn: 'M E' },
    operator: 'attention',
    slots: { bias: undefined, causal: 'off + p' },
  },
  'queries and keys under a layer norm (ViT-22B)': {
    text: `
      MQ[h,p]  = sum(e) Q[h,p,e] / E
      MK[h,m]  = sum(e) K[h,m,e] / E
      VQ[h,p]  = sum(e) (Q[h,p,e] - MQ[h,p]) * (Q[h,p,e] - MQ[h,p]) / E
      VK[h,m]  = sum(e) (K[h,m,e] - MK[h,m]) * (K[h,m,e] - MK[h,m]) / E
      X[h,p,e] = (Q[h,p,e] - MQ[h,p]) * rsqrt(VQ[h,p] + 0.1) * WQ[e]
      Y[h,m,e] = (K[h,m,e] - MK[h,m]) * rsqrt(VK[h,m] + 0.1) * WK[e]
      T[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e] / sqrt(E)${softmax}`,
    inputs: { ...heads, WQ: 'E', WK: 'E' },
    operator: 'attention',
    slots: { bias: undefined, scale: 'E^-0.5' },
  },
  'keys and values made from what all heads share (MLA)': {
    text: `
      K[h,m,e]  = sum(c) KV[m,c] * WK[h,c,e]
      V[h,m,f]  = sum(c) KV[m,c] * WV[h,c,f]
      S1[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      S2[h,p,m] = sum(r) QR[h,p,r] * KR[m,r]
      T[h,p,m]  = (S1[h,p,m] + S2[h,p,m]) * 0.2   where m <= p + off${softmax}`,
    inputs: { KV: 'M C', WK: 'H C E', WV: 'H C F', Q: 'H P E', QR: 'H P R', KR: 'M R' },
    operator: 'attention',
    slots: { q: 'Q', k: 'K', v: 'V', q2: 'QR', before: 'K, V' },
  },
  'products moved to queries and results instead (MLA, absorbed)': {
    text: `
      X[h,p,c]  = sum(e) Q[h,p,e] * WK[h,c,e]
      S1[h,p,m] = sum(c) X[h,p,c] * KV[m,c]
      S2[h,p,m] = sum(r) QR[h,p,r] * KR[m,r]
      T[h,p,m]  = (S1[h,p,m] + S2[h,p,m]) * 0.2   where m <= p + off
      A[h,p,m]  = exp(T[h,p,m])
      D[h,p]    = sum(m) A[h,p,m]
      L[h,p,c]  = sum(m) A[h,p,m] * KV[m,c] / D[h,p]
      O[h,p,f]  = sum(c) L[h,p,c] * WV[h,c,f]`,
    inputs: { Q: 'H P E', WK: 'H C E', KV: 'M C', QR: 'H P R', KR: 'M R', WV: 'H C F' },
    operator: 'attention',
    slots: { q: 'X', k: 'KV', v: 'KV', before: 'X', result: 'sum(#1C | L[h,p,#1C] WV[h,#1C,f])' },
  },
  'a layer from its tokens to its result (Transformer)': {
    text: `
      Q[h,t,e] = sum(i) X[t,i] * WQ[h,e,i]
      K[h,t,e] = sum(i) X[t,i] * WK[h,e,i]
      V[h,t,f] = sum(i) X[t,i] * WV[h,f,i]
      T[h,t,u] = sum(e) Q[h,t,e] * K[h,u,e] / sqrt(E)   where u <= t
      G[h,t]   = max(u) T[h,t,u]
      A[h,t,u] = exp(T[h,t,u] - G[h,t])
      D[h,t]   = sum(u) A[h,t,u]
      L[h,t,f] = sum(u) A[h,t,u] * V[h,u,f] / D[h,t]
      O[t,c]   = sum(h,f) L[h,t,f] * WO[c,h,f]`,
    inputs: { X: 'T C', WQ: 'H E C', WK: 'H E C', WV: 'H F C', WO: 'C H F' },
    operator: 'attention',
    slots: { q: 'Q', k: 'K', v: 'V', before: 'Q, K, V' },
  },
  'two maps under a norm, with a learned share (Differential Transformer)': {
    text: `
      S1[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)    where m <= p + off
      S2[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e] / sqrt(E)    where m <= p + off
      L1        = sum(r) la[r] * lb[r]
      L2        = sum(r) lc[r] * ld[r]
      LAM       = exp(0.1 * L1) - exp(0.1 * L2) + 0.8
      G1[h,p]   = max(m) S1[h,p,m]
      G2[h,p]   = max(m) S2[h,p,m]
      A1[h,p,m] = exp(S1[h,p,m] - G1[h,p])
      A2[h,p,m] = exp(S2[h,p,m] - G2[h,p])
      D1[h,p]   = sum(m) A1[h,p,m]
      D2[h,p]   = sum(m) A2[h,p,m]
      U[h,p,f]  = sum(m) (A1[h,p,m] / D1[h,p] - LAM * A2[h,p,m] / D2[h,p]) * V[h,m,f]
      MS[h,p]   = sum(f) U[h,p,f] * U[h,p,f]
      O[h,p,f]  = U[h,p,f] * rsqrt(MS[h,p] / F + 0.1) * 0.2`,
    inputs: { ...heads, X: 'H P E', Y: 'H M E', la: 'R', lb: 'R', lc: 'R', ld: 'R' },
    operator: 'attention',
    slots: { before: 'LAM' },
  },
  'a memory beside a window (Infini-attention)': {
    text: `
      PQ[h,p,e] = if(Q[h,p,e] > 0, Q[h,p,e] + 1, exp(Q[h,p,e]))
      NM[h,p,f] = sum(e) PQ[h,p,e] * MEM[h,e,f]
      DM[h,p]   = sum(e) PQ[h,p,e] * ZM[e]
      T[h,p,m]  = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)    where m <= p + off
      A[h,p,m]  = exp(T[h,p,m])
      D[h,p]    = sum(m) A[h,p,m]
      L[h,p,f]  = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]
      O[h,p,f]  = sigmoid(b) * NM[h,p,f] / (1 + DM[h,p] * DM[h,p]) + (1 - sigmoid(b)) * L[h,p,f]`,
    inputs: { ...heads, MEM: 'H E F', ZM: 'E' },
    scalars: { b: 0.3 },
    operator: 'attention',
  },
  'results divided in every step (FlashAttention 1)': {
    text: `
      split m -> (m1, m0 : 4) tail mask
      init R[m1=0,p] = -inf;  init L[m1=0,p] = 0;  init Z[m1=0,p,f] = 0
      iterate m1 {
        S[p,m1,m0] = sum(e) Q[p,e] * K[m1*M0 + m0, e]
        LM[m1,p]   = max(m0) S[p,m1,m0]
        N[p,m1,m0] = exp(S[p,m1,m0] - LM[m1,p])
        LD[m1,p]   = sum(m0) N[p,m1,m0]
        R[m1+1,p]  = max(R[m1,p], LM[m1,p])
        L[m1+1,p]  = exp(R[m1,p] - R[m1+1,p]) * L[m1,p] + exp(LM[m1,p] - R[m1+1,p]) * LD[m1,p]
        X[m1,p,f]  = sum(m0) N[p,m1,m0] * V[m1*M0 + m0, f]
        Z[m1+1,p,f] = (L[m1,p] * exp(R[m1,p] - R[m1+1,p]) * Z[m1,p,f] + exp(LM[m1,p] - R[m1+1,p]) * X[m1,p,f]) / L[m1+1,p]
      }
      O[p,f] = Z[M1,p,f]`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F' },
    operator: 'attention',
    slots: { scale: '1' },
  },
  'parts that are merged in turn by their logarithms (ring attention)': {
    text: `
      split m -> (m1, m0 : 4) tail mask
      S[p,m1,m0] = sum(e) Q[p,e] * K[m1*M0 + m0, e]
      L[p,m1]    = logsumexp(m0) S[p,m1,m0]
      X[p,m1,f]  = sum(m0) exp(S[p,m1,m0] - L[p,m1]) * V[m1*M0 + m0, f]
      init R[m1=0,p] = -inf;  init Z[m1=0,p,f] = 0
      iterate m1 {
        G[m1,p]     = max(R[m1,p], L[p,m1])
        R[m1+1,p]   = G[m1,p] + log(exp(R[m1,p] - G[m1,p]) + exp(L[p,m1] - G[m1,p]))
        Z[m1+1,p,f] = exp(R[m1,p] - R[m1+1,p]) * Z[m1,p,f] + exp(L[p,m1] - R[m1+1,p]) * X[p,m1,f]
      }
      O[p,f] = Z[M1,p,f]`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F' },
    operator: 'attention',
    slots: { scale: '1' },
  },
  'sinusoids as a bias (Sandwich)': {
    text: `
      B[p,m]   = sum(r) cos((p - m) / pow(10000, r / R))
      ${scores}                                           where m <= p
      T[h,p,m] = S[h,p,m] + B[p,m]${softmax}`,
    inputs: heads,
    ranks: ['R'],
    operator: 'attention',
    slots: { causal: 'p' },
    square: true,
  },
  'distances by their logarithm (KERPLE)': {
    text: `
      ${scores}                                           where m <= p + off
      T[h,p,m] = S[h,p,m] - r1[h] * log(1 + exp(r2[h]) * abs(p + off - m))${softmax}`,
    inputs: { ...heads, r1: 'H', r2: 'H' },
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'keys of each entry, padded': {
    text: `
      T[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e] / sqrt(E)    where m < len[b]
      A[b,h,p,m] = exp(T[b,h,p,m])
      D[b,h,p]   = sum(m) A[b,h,p,m]
      O[b,h,p,f] = sum(m) A[b,h,p,m] * V[b,h,m,f] / D[b,h,p]`,
    inputs: { Q: 'B H P E', K: 'B H M E', len: 'B < 4', V: 'B H M F' },
    operator: 'attention',
  },
  'features that are sums (relu plus one)': {
    text: `
      X[h,t,e] = relu(Q[h,t,e]) + 1
      Y[h,t,e] = relu(K[h,t,e]) + 1
      init S[t=0,h,e,f] = 0
      init Z[t=0,h,e] = 0
      iterate t {
        S[t+1,h,e,f] = S[t,h,e,f] + Y[h,t,e] * V[h,t,f]
        Z[t+1,h,e]   = Z[t,h,e] + Y[h,t,e]
        N[h,t,f]     = sum(e) X[h,t,e] * S[t+1,h,e,f]
        D[h,t]       = sum(e) X[h,t,e] * Z[t+1,h,e]
        O[h,t,f]     = N[h,t,f] / D[h,t]
      }`,
    inputs: { Q: 'H T E', K: 'H T E', V: 'H T F' },
    operator: 'lightning',
  },
  'retention under a norm and a gate (RetNet)': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = gamma[h] * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        Y[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      }
      N[h,t]   = sum(f) Y[h,t,f] * Y[h,t,f]
      O[h,t,f] = Y[h,t,f] * rsqrt(N[h,t] / F + 0.1) * G[h,t,f] * sigmoid(G[h,t,f])`,
    inputs: { gamma: 'H', K: 'H T E', V: 'H T F', Q: 'H T E', G: 'H T F' },
    operator: 'lightning',
    slots: {
      result: '(0.1 + F^-1 sum(#1F | Y[h,t,#1F]^2))^-0.5 G[h,t,f] Y[h,t,f] sigmoid(G[h,t,f])',
    },
  },
  'the same with all of it in the loop': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = 0.9 * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        Y[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
        N[h,t]       = sum(f) Y[h,t,f] * Y[h,t,f]
        O[h,t,f]     = Y[h,t,f] * rsqrt(N[h,t] / F + 0.1)
      }`,
    inputs: { K: 'H T E', V: 'H T F', Q: 'H T E' },
    operator: 'lightning',
    slots: { result: '(0.1 + F^-1 sum(#1F | Y[h,t,#1F]^2))^-0.5 Y[h,t,f]' },
  },
  'retention divided by its weights (RetNet)': {
    text: `
      S[h,t,u] = sum(e) Q[h,t,e] * K[h,u,e] * pow(gamma[h], t - u)   where u <= t
      R[h,t]   = sum(u) S[h,t,u]
      O[h,t,f] = sum(u) S[h,t,u] / max(abs(R[h,t]), 1) * V[h,u,f]`,
    inputs: { Q: 'H T E', K: 'H U E', gamma: 'H', V: 'H U F' },
    operator: 'lightning',
    square: true,
  },
  'weights of a Taylor series (Based)': {
    text: `
      ${scores}                                           where m <= p + off
      W[h,p,m] = 1 + S[h,p,m] + S[h,p,m] * S[h,p,m] / 2
      D[h,p]   = sum(m) W[h,p,m]
      O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f] / D[h,p]`,
    inputs: heads,
    refused: ['CAS021', 'it is no sum of weights times values'],
  },
  'keys and values in blocks with weights (NSA, compressed)': {
    text: `
      KC[h,u,e] = sum(r) K[h, u*4 + r, e] * w[r]
      VC[h,u,f] = sum(r) V[h, u*4 + r, f] * w[r]
      S[h,p,u]  = sum(e) Q[h,p,e] * KC[h,u,e] / sqrt(E)   where u*4 + 7 <= p + off
      A[h,p,u]  = exp(S[h,p,u])
      D[h,p]    = sum(u) A[h,p,u]
      O[h,p,f]  = sum(u) A[h,p,u] * VC[h,u,f] / D[h,p]`,
    inputs: { K: 'H 170 E', w: 'R', V: 'H 170 F', Q: 'H P E' },
    operator: 'attention',
    slots: { before: 'KC, VC' },
    ranks: ['U'],
    told: true,
  },
  'two branches under gates (NSA)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]     where m <= p + off && p + off - m < 4
      A[h,p,m] = exp(S[h,p,m])
      D[h,p]   = sum(m) A[h,p,m]
      X[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]
      R[h,p,u] = sum(e) Q[h,p,e] * KC[h,u,e]    where u * 4 + 3 <= p + off
      W[h,p,u] = exp(R[h,p,u])
      N[h,p]   = sum(u) W[h,p,u]
      Y[h,p,f] = sum(u) W[h,p,u] * VC[h,u,f] / N[h,p]
      O[h,p,f] = sigmoid(g[h,p]) * X[h,p,f] + sigmoid(k[h,p]) * Y[h,p,f]`,
    inputs: { ...heads, KC: 'H U E', VC: 'H U F', g: 'H P', k: 'H P' },
    operator: 'attention',
    told: true,
  },
  'a table of buckets that a list names (T5)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + R[bucket[p,m], h]   where m <= p + off${softmax}`,
    inputs: { ...heads, R: '9 H', bucket: 'P M < 9' },
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'distances on a plane (Swin)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + R[h, y[p] - y[m] + 3, x[p] - x[m] + 3]${softmax}`,
    inputs: { ...heads, R: 'H 7 7', y: 'P < 4', x: 'P < 4' },
    operator: 'attention',
    square: true,
  },
  'keys and values that are products (TPA)': {
    text: `
      K[h,m,e] = sum(r) AK[m,r,h] * BK[m,r,e] / R
      V[h,m,f] = sum(r) AV[m,r,h] * BV[m,r,f] / R
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)   where m <= p + off${softmax}`,
    inputs: { AK: 'M R H', BK: 'M R E', Q: 'H P E', AV: 'M R H', BV: 'M R F' },
    operator: 'attention',
    slots: { before: 'K, V' },
  },
  'a hidden layer that is attention (GAU)': {
    text: `
      X[p,e]   = Z[p,e] * g[e] + b[e]
      Y[m,e]   = Z[m,e] * k[e] + c[e]
      S[p,m]   = sum(e) X[p,e] * Y[m,e] / M   where m <= p
      A[p,m]   = pow(relu(S[p,m]), 2)
      O[p,f]   = sum(m) U[p,f] * A[p,m] * V[m,f]`,
    inputs: { Z: 'P E', g: 'E', b: 'E', k: 'E', c: 'E', U: 'P F', V: 'M F' },
    operator: 'attention',
    slots: { weights: 'relu', power: '2', causal: 'p' },
    square: true,
  },
  'rows that see what is before them alone': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)   where m < p${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { causal: '-1 + p' },
    square: true,
  },
  'rows from the first key on (top left)': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)   where m <= p && m > p - 4${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { causal: 'p' },
  },
  'values that heads share, and keys that they do not': {
    text: `
      T[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]   where m <= p + off
      A[h,p,m] = exp(T[h,p,m])
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[m,f] / D[h,p]`,
    inputs: { ...heads, V: 'M F' },
    operator: 'attention',
  },
  'keys that a batch shares': {
    text: `
      T[b,h,p,m] = sum(e) Q[b,h,p,e] * K[h,m,e]   where m <= p + off
      A[b,h,p,m] = exp(T[b,h,p,m])
      D[b,h,p]   = sum(m) A[b,h,p,m]
      O[b,h,p,f] = sum(m) A[b,h,p,m] * V[b,h,m,f] / D[b,h,p]`,
    inputs: { Q: 'B H P E', K: 'H M E', V: 'B H M F' },
    operator: 'attention',
  },
  'a Taylor series beside a window (Based)': {
    text: `
      ${scores}   where m <= p + off
      A[h,p,m] = 1 + S[h,p,m] + S[h,p,m] * S[h,p,m] / 2
      D[h,p]   = sum(m) A[h,p,m]
      X[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]
      T[h,p,m] = sum(e) Z[h,p,e] * Y[h,m,e]   where m <= p + off && m > p + off - 4
      W[h,p,m] = exp(T[h,p,m])
      C[h,p]   = sum(m) W[h,p,m]
      R[h,p,f] = sum(m) W[h,p,m] * V[h,m,f] / C[h,p]
      O[h,p,f] = X[h,p,f] + R[h,p,f]`,
    inputs: { ...heads, Z: 'H P E', Y: 'H M E' },
    operator: 'attention',
    told: true,
  },
  'keys mixed with those before them (RWKV)': {
    text: `
      X[h,m,e] = mu[e] * K[h,m,e] + (1 - mu[e]) * K[h,m - 1,e]
      T[h,p,m] = sum(e) Q[h,p,e] * X[h,m,e]   where m <= p + off${softmax}`,
    inputs: { mu: 'E', ...heads },
    operator: 'attention',
  },
  'what is left of a stick (stick-breaking)': {
    text: `
      ${scores}
      B[h,p,m] = sigmoid(S[h,p,m])
      C[h,p,m] = prod(j) 1 - B[h,p,j]   where j > m && j < p
      O[h,p,f] = sum(m) B[h,p,m] * C[h,p,m] * V[h,m,f]   where m < p`,
    inputs: heads,
    refused: ['CAS020', ''],
    square: true,
  },
  'weights that may be 0 (softpick)': {
    text: `
      ${scores}   where m <= p + off
      G[h,p]   = max(m) S[h,p,m]
      X[h,p,m] = exp(S[h,p,m] - G[h,p]) - exp(-G[h,p])
      D[h,p]   = sum(m) abs(X[h,p,m])
      O[h,p,f] = sum(m) relu(X[h,p,m]) * V[h,m,f] / (D[h,p] + 0.001)`,
    inputs: heads,
    refused: ['CAS021', ''],
  },
  'what others have seen is taken off (Selective Attention)': {
    text: `
      ${scores}
      R[i,m]   = relu(S[0,i,m])   where m < i && m > 0
      F0[p,m]  = sum(i) R[i,m]    where i <= p
      T[h,p,m] = S[h,p,m] - F0[p,m]   where m <= p${softmax}`,
    inputs: heads,
    operator: 'attention',
    square: true,
  },
  'a decay that grows': {
    text: `
      init S[t=0,h,e,f] = 0
      iterate t {
        S[t+1,h,e,f] = 1.1 * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
        O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
      }`,
    inputs: { K: 'H T E', V: 'H T F', Q: 'H T E' },
    refused: ['CAS022', 'its weights grow with the distance'],
  },
  'rotated pairs that stand beside each other (RoPE)': {
    text: `
      X[h,p,r] = Q[h,p,2*r] * cs[p + M - P,r] - Q[h,p,2*r + 1] * sn[p + M - P,r]
      Y[h,p,r] = Q[h,p,2*r] * sn[p + M - P,r] + Q[h,p,2*r + 1] * cs[p + M - P,r]
      A[h,m,r] = K[h,m,2*r] * cs[m,r] - K[h,m,2*r + 1] * sn[m,r]
      B[h,m,r] = K[h,m,2*r] * sn[m,r] + K[h,m,2*r + 1] * cs[m,r]
      S[h,p,m] = sum(r) (X[h,p,r] * A[h,m,r] + Y[h,p,r] * B[h,m,r]) / 4   where m <= p + off
      W[h,p,m] = exp(S[h,p,m])
      D[h,p]   = sum(m) W[h,p,m]
      O[h,p,f] = sum(m) W[h,p,m] * V[h,m,f] / D[h,p]`,
    inputs: { Q: 'H P 16', cs: 'M R', sn: 'M R', K: 'H M 16', V: 'H M F' },
    operator: 'attention',
    slots: { before: 'X, A, Y, B' },
  },
  'random features, causal (Performer)': {
    text: `
      NK[h,t]   = sum(e) K[h,t,e] * K[h,t,e] / 2
      NQ[h,t]   = sum(e) Q[h,t,e] * Q[h,t,e] / 2
      XK[h,t,r] = sum(e) K[h,t,e] * W[r,e]
      XQ[h,t,r] = sum(e) Q[h,t,e] * W[r,e]
      FK[h,t,r] = exp(XK[h,t,r] / 8 - NK[h,t] / 64) * rsqrt(R)
      FQ[h,t,r] = exp(XQ[h,t,r] / 8 - NQ[h,t] / 64) * rsqrt(R)
      init S[t=0,h,r,f] = 0
      init Z[t=0,h,r]   = 0
      iterate t {
        S[t+1,h,r,f] = S[t,h,r,f] + FK[h,t,r] * V[h,t,f]
        Z[t+1,h,r]   = Z[t,h,r] + FK[h,t,r]
        N[h,t,f]     = sum(r) FQ[h,t,r] * S[t+1,h,r,f]
        D[h,t]       = sum(r) FQ[h,t,r] * Z[t+1,h,r]
        O[h,t,f]     = 2 * N[h,t,f] / D[h,t]
      }`,
    inputs: { K: 'H T E', Q: 'H T E', W: 'R E', V: 'H T F' },
    operator: 'lightning',
    slots: { before: 'FK, FQ', normalise: 'true', scale: '1', result: '2' },
  },
  'no products (AFT)': {
    text: `
      X[p,m,f] = exp(K[m,f] + w[p,m])   where m <= p + off
      N[p,f]   = sum(m) X[p,m,f] * V[m,f]
      D[p,f]   = sum(m) X[p,m,f]
      O[p,f]   = sigmoid(Q[p,f]) * N[p,f] / D[p,f]`,
    inputs: { K: 'M F', w: 'P M', V: 'M F', Q: 'P F' },
    refused: ['CAS020', 'attention'],
  },
  'additive scores (GAT)': {
    text: `
      T[p,m]  = if(a[p] + b[m] > 0, a[p] + b[m], 0.2 * (a[p] + b[m]))
      A[p,m]  = exp(T[p,m])
      D[p]    = sum(m) A[p,m]
      O[p,f]  = sum(m) A[p,m] * V[m,f] / D[p]`,
    inputs: { a: 'P', b: 'M', V: 'M F' },
    refused: ['CAS021', 'has no product of a query and a key'],
  },
  'mixed heads (talking heads)': {
    text: `
      S[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e]
      T[g,p,m] = sum(h) L[g,h] * S[h,p,m]
      A[g,p,m] = exp(T[g,p,m])
      D[g,p]   = sum(m) A[g,p,m]
      O[g,p,f] = sum(m) A[g,p,m] * V[g,m,f] / D[g,p]`,
    inputs: { Q: 'H P E', K: 'H M E', L: 'G H', V: 'G M F' },
    refused: ['CAS021', 'has no product of a query and a key'],
  },
  'a mask that is added to scores': {
    text: `
      ${scores}
      B[p,m]   = if(m > p + off, -inf, 0)
      X[h,p,m] = S[h,p,m] + B[p,m] + if(m <= p + off - 5, -inf, 0)
      G[h,p]   = max(m) X[h,p,m]
      T[h,p,m] = X[h,p,m] - G[h,p]${softmax}`,
    inputs: heads,
    operator: 'attention',
    slots: { causal: 'off + p', window: '-4 + off + p' },
  },
  'scores that are chosen or hidden, under slopes': {
    text: `
      ${scores}
      T[h,p,m] = if(p + off >= m, S[h,p,m] + slope[h] * (m - p), -inf)${softmax}`,
    inputs: { ...heads, slope: 'H' },
    operator: 'attention',
    slots: { causal: 'off + p', slopes: 'slope[h]' },
  },
  'weights that are multiplied by a mask': {
    text: `
      ${scores}
      A[h,p,m] = exp(S[h,p,m]) * if(m <= p + off, 1, 0)
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]`,
    inputs: heads,
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'rows that are multiplied by a mask, which leaves 0 / 0': {
    text: `
      ${scores}
      A[h,p,m] = exp(S[h,p,m]) * if(p > 1, 1, 0)
      D[h,p]   = sum(m) A[h,p,m]
      O[h,p,f] = sum(m) A[h,p,m] * V[h,m,f] / D[h,p]`,
    inputs: heads,
    operator: 'attention',
  },
  'a mask that is added to scores in blocks (FlashAttention 2)': {
    text: `
      split m -> (j, i : 4) tail mask
      init X[j=0,h,p] = -inf;  init D[j=0,h,p] = 0;  init A[j=0,h,p,f] = 0
      iterate j {
        S[j,i,h,p]   = sum(e) Q[h,p,e] * K[h,j*I + i,e] * 0.3 + if(j*I + i > p + off, -inf, 0)
        G[j,h,p]     = max(i) S[j,i,h,p]
        X[j+1,h,p]   = max(X[j,h,p], G[j,h,p])
        W[j,i,h,p]   = exp(S[j,i,h,p] - X[j+1,h,p])
        Y[j,h,p]     = sum(i) W[j,i,h,p]
        Z[j,h,p,f]   = sum(i) W[j,i,h,p] * V[h,j*I + i,f]
        C[j,h,p]     = exp(X[j,h,p] - X[j+1,h,p])
        D[j+1,h,p]   = D[j,h,p] * C[j,h,p] + Y[j,h,p]
        A[j+1,h,p,f] = A[j,h,p,f] * C[j,h,p] + Z[j,h,p,f]
      }
      O[h,p,f] = A[J,h,p,f] / D[J,h,p]`,
    inputs: heads,
    operator: 'attention',
    slots: { causal: 'off + p' },
  },
  'a table of distances under a maximum': {
    text: `
      ${scores}
      X[h,p,m] = S[h,p,m] + R[h, p - m + M - 1]
      G[h,p]   = max(m) X[h,p,m]
      T[h,p,m] = X[h,p,m] - G[h,p]${softmax}`,
    inputs: { ...heads, R: 'H 99' },
    operator: 'attention',
  },
  'a sink by the logarithm of the divisor (gpt-oss)': {
    text: `
      ${scores}   where m <= p + off
      L[h,p]   = logsumexp(m) S[h,p,m]
      X[h,p,f] = sum(m) exp(S[h,p,m] - L[h,p]) * V[h,m,f]
      O[h,p,f] = X[h,p,f] * sigmoid(L[h,p] - sink[h])`,
    inputs: { ...heads, sink: 'H' },
    operator: 'attention',
    told: true,
  },
  'squares of relu by the number of keys (Primer)': {
    text: `
      ${scores}   where m <= p + off
      R[h,p,m] = if(S[h,p,m] > 0, S[h,p,m], 0)
      O[h,p,f] = sum(m) R[h,p,m] * R[h,p,m] / (p + off + 1) * V[h,m,f]`,
    inputs: heads,
    operator: 'attention',
    slots: { weights: 'relu', power: '2', causal: 'off + p' },
    told: true,
  },
  'two maps with a share of exponentials (Differential Transformer)': {
    text: `
      L1       = sum(r) a[r] * b[r]
      L2       = sum(r) c[r] * d[r]
      S1[h,p,m] = sum(e) Q[h,p,e] * K[h,m,e] / sqrt(E)    where m <= p + off
      S2[h,p,m] = sum(e) X[h,p,e] * Y[h,m,e] / sqrt(E)    where m <= p + off
      A1[h,p,m] = exp(S1[h,p,m])
      A2[h,p,m] = exp(S2[h,p,m])
      D1[h,p]   = sum(m) A1[h,p,m]
      D2[h,p]   = sum(m) A2[h,p,m]
      W[h,p,m]  = A1[h,p,m] / D1[h,p] - (exp(L1) - exp(L2) + l0) * A2[h,p,m] / D2[h,p]
      Z[h,p,f]  = sum(m) W[h,p,m] * V[h,m,f]
      O[h,p,f]  = (1 - l0) * Z[h,p,f]`,
    inputs: { a: 'R', b: 'R', c: 'R', d: 'R', ...heads, X: 'H P E', Y: 'H M E' },
    scalars: { l0: 0.2 },
    operator: 'attention',
  },
  'three branches under gates (NSA)': {
    text: `
      S1[h,p,u] = sum(e) Q[h,p,e] * K1[h,u,e]   where u * 4 + 3 <= p + off
      S2[h,p,m] = sum(e) Q[h,p,e] * K2[h,m,e]   where m <= p + off && chosen[p,m] == 1
      S3[h,p,m] = sum(e) Q[h,p,e] * K3[h,m,e]   where m <= p + off && m > p + off - 4
      D1[h,p]   = sum(u) exp(S1[h,p,u])
      D2[h,p]   = sum(m) exp(S2[h,p,m])
      D3[h,p]   = sum(m) exp(S3[h,p,m])
      O1[h,p,f] = sum(u) exp(S1[h,p,u]) * V1[h,u,f] / D1[h,p]
      O2[h,p,f] = sum(m) exp(S2[h,p,m]) * V2[h,m,f] / D2[h,p]
      O3[h,p,f] = sum(m) exp(S3[h,p,m]) * V3[h,m,f] / D3[h,p]
      O[h,p,f]  = sigmoid(g[h,p]) * O1[h,p,f] + sigmoid(k[h,p]) * O2[h,p,f] + sigmoid(w[h,p]) * O3[h,p,f]`,
    inputs: {
      Q: 'H P E',
      ...Object.fromEntries(
        ['U', 'M', 'M'].flatMap((s, i) => [
          [`K${i + 1}`, `H ${s} E`],
          [`V${i + 1}`, `H ${s} F`],
        ]),
      ),
      chosen: 'P M < 2',
      g: 'H P',
      k: 'H P',
      w: 'H P',
    },
    operator: 'attention',
    slots: { k2: 'K3', window2: '-3 + off + p' },
    told: true,
  },
  ...Object.fromEntries(
    ['1 - pow(2, -5 - h)', '1 - 0.5 * gamma[h]', 'sigmoid(gamma[h])', '0.5 * gamma[h]'].map(
      (decay): [string, Case] => [
        `a decay of each head by ${decay} (RetNet)`,
        {
          text: `
            init S[t=0,h,e,f] = 0
            iterate t {
              S[t+1,h,e,f] = (${decay}) * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
              O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
            }`,
          inputs: { gamma: 'H', K: 'H T E', V: 'H T F', Q: 'H T E' },
          operator: 'lightning',
        },
      ],
    ),
  ),
  ...Object.fromEntries(
    Object.entries({ 'h,e,f': 'lightning', 'h,f,e': undefined } as const).map(
      ([axes, operator]): [string, Case] => [
        `a state to begin with that lies as ${axes}`,
        {
          text: `
            init S[t=0,h,e,f] = Z[${axes}]
            iterate t {
              S[t+1,h,e,f] = gamma[h] * S[t,h,e,f] + K[h,t,e] * V[h,t,f]
              O[h,t,f]     = sum(e) Q[h,t,e] * S[t+1,h,e,f]
            }`,
          inputs: {
            Z: axes.toUpperCase().replaceAll(',', ' '),
            gamma: 'H',
            K: 'H T E',
            V: 'H T F',
            Q: 'H T E',
          },
          ...(operator
            ? { operator }
            : { refused: ['CAS020', 'lightning, does not take O: it adds'] }),
        },
      ],
    ),
  ),
  'logarithms of numbers and of distances beside a score (Token Merging)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + log(gamma[m]) + log(1 + abs(p - m))${softmax}`,
    inputs: { ...heads, gamma: 'M' },
    operator: 'attention',
  },
  'decays of tokens as a product of matrices (Mamba 2)': {
    text: `
      init A[t=0,h] = 0
      iterate t { A[t+1,h] = A[t,h] - softplus(g[h,t]) }
      S[h,t,u] = sum(e) Q[h,t,e] * K[h,u,e] * exp(9 * (A[t+1,h] - A[u+1,h]))   where u <= t
      O[h,t,f] = sum(u) S[h,t,u] * V[h,u,f]`,
    inputs: { g: 'H T', Q: 'H T E', K: 'H T E', V: 'H T F' },
    refused: ['CAS021', 'lightning, does not take O: it decays by token'],
  },
  'one query of each head (decoding)': {
    text: `
      S[b,h,m] = sum(e) Q[b,h,e] * K[b,h,m,e] / sqrt(E)   where m < len[b]
      G[b,h]   = max(m) S[b,h,m]
      A[b,h,m] = exp(S[b,h,m] - G[b,h])
      D[b,h]   = sum(m) A[b,h,m]
      O[b,h,f] = sum(m) A[b,h,m] * V[b,h,m,f] / D[b,h]`,
    inputs: { Q: 'B H E', K: 'B H M E', len: 'B < 4', V: 'B H M F' },
    operator: 'attention',
  },
  'one query for all (attention pooling)': {
    text: `
      S[b,m] = sum(e) w[e] * X[b,m,e]
      L[b]   = logsumexp(m) S[b,m]
      O[b,e] = sum(m) exp(S[b,m] - L[b]) * X[b,m,e]`,
    inputs: { w: 'E', X: 'B M E' },
    operator: 'attention',
  },
  'queries that a batch shares (DETR)': {
    text: `
      S[b,h,p,m] = sum(e) Q[h,p,e] * K[b,h,m,e] / sqrt(E)
      A[b,h,p,m] = exp(S[b,h,p,m])
      D[b,h,p]   = sum(m) A[b,h,p,m]
      X[b,h,p,f] = sum(m) A[b,h,p,m] * V[b,h,m,f] / D[b,h,p]
      O[b,p,c]   = sum(h,f) X[b,h,p,f] * W[c,h,f]`,
    inputs: { Q: 'H P E', K: 'B H M E', V: 'B H M F', W: 'C H F' },
    operator: 'attention',
  },
  'ones and zeros under a large number (BERT)': {
    text: `
      ${scores}
      B[m]     = (1 - seen[m]) * -3.4028234663852886e38
      X[h,p,m] = S[h,p,m] + B[m]
      G[h,p]   = max(m) X[h,p,m]
      T[h,p,m] = X[h,p,m] - G[h,p]${softmax}`,
    inputs: { ...heads, seen: 'M' },
    numbers: { seen: (i, rng) => (i === 0 ? 1 : rng.below(2)) },
    operator: 'attention',
  },
  'squares of distances, far from the first token (Gaussian)': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] - (at[p] - at[m]) * (at[p] - at[m]) / 8${softmax}`,
    inputs: { ...heads, at: 'P' },
    numbers: { at: (i) => 20_000 + i },
    operator: 'attention',
    square: true,
  },
  'scores that a tensor hides by if': {
    text: `
      ${scores}
      X[h,p,m] = if(seen[p,m] == 0, -inf, S[h,p,m])
      G[h,p]   = max(m) X[h,p,m]
      T[h,p,m] = X[h,p,m] - G[h,p]${softmax}`,
    inputs: { ...heads, seen: 'P M' },
    numbers: { seen: (_, rng) => rng.below(3) / 2 },
    operator: 'attention',
    slots: { mask: '-1 seen[p,#2M] != 0' },
  },
  'keys under a norm, and values with a gain, that heads share (MQA)': {
    text: `
      N[b,m]     = sum(e) K[b,m,e] * K[b,m,e]
      T[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,m,e] * rsqrt(N[b,m] + 0.1)   where m <= p + off
      L[b,h,p]   = logsumexp(m) T[b,h,p,m]
      O[b,h,p,f] = sum(m) exp(T[b,h,p,m] - L[b,h,p]) * V[m,f] * r[m]`,
    inputs: { K: 'B M E', Q: 'B H P E', V: 'M F', r: 'M' },
    operator: 'attention',
  },
  'features of keys that heads share': {
    text: `
      S[h,t,u] = sum(e) relu(Q[h,t,e]) * relu(K[u,e])   where u <= t
      O[h,t,f] = sum(u) S[h,t,u] * V[u,f] * r[u]`,
    inputs: { Q: 'H T E', K: 'U E', V: 'U F', r: 'U' },
    operator: 'lightning',
    square: true,
  },
  'a bias that a number chooses': {
    text: `
      ${scores}
      T[h,p,m] = S[h,p,m] + if(a > 0, b[m], -b[m])   where m <= p + off${softmax}`,
    inputs: { ...heads, b: 'M' },
    scalars: { a: 0.5 },
    operator: 'attention',
  },
  'a layer whose queries and keys have a norm and are turned (Qwen3)': {
    text: `
      Q[h,t,e] = sum(i) X[t,i] * WQ[h,e,i]
      K[h,t,e] = sum(i) X[t,i] * WK[h,e,i]
      V[h,t,f] = sum(i) X[t,i] * WV[h,f,i]
      NQ[h,t]  = sum(e) Q[h,t,e] * Q[h,t,e]
      NK[h,t]  = sum(e) K[h,t,e] * K[h,t,e]
      A[h,t,e] = Q[h,t,e] * rsqrt(NQ[h,t] / E + 0.1) * gq[e]
      B[h,t,e] = K[h,t,e] * rsqrt(NK[h,t] / E + 0.1) * gk[e]
      Y[h,t,e] = A[h,t,e] * cs[t,e] + if(e < E / 2, -A[h,t,e + E / 2], A[h,t,e - E / 2]) * sn[t,e]
      Z[h,t,e] = B[h,t,e] * cs[t,e] + if(e < E / 2, -B[h,t,e + E / 2], B[h,t,e - E / 2]) * sn[t,e]
      T[h,t,u] = sum(e) Y[h,t,e] * Z[h,u,e] / sqrt(E)   where u <= t
      G[h,t]   = max(u) T[h,t,u]
      P[h,t,u] = exp(T[h,t,u] - G[h,t])
      D[h,t]   = sum(u) P[h,t,u]
      L[h,t,f] = sum(u) P[h,t,u] * V[h,u,f] / D[h,t]
      O[t,c]   = sum(h,f) L[h,t,f] * WO[c,h,f]`,
    inputs: {
      X: 'T C',
      WQ: 'H E C',
      WK: 'H E C',
      WV: 'H F C',
      gq: 'E',
      gk: 'E',
      cs: 'T E',
      sn: 'T E',
      WO: 'C H F',
    },
    operator: 'attention',
    slots: { before: 'Y, Z, V', causal: 't' },
  },
  'linear attention whose divisor has a number more': {
    text: `
      X[h,t,e] = relu(Q[h,t,e])
      Y[h,u,e] = relu(K[h,u,e])
      S[h,t,u] = sum(e) X[h,t,e] * Y[h,u,e] * pow(0.9, t - u)   where u <= t
      Z[h,t]   = sum(u) S[h,t,u]
      N[h,t,f] = sum(u) S[h,t,u] * V[h,u,f]
      O[h,t,f] = 2 * N[h,t,f] / (Z[h,t] + eps)`,
    inputs: { Q: 'H T E', K: 'H U E', V: 'H U F' },
    scalars: { eps: 0.3 },
    operator: 'lightning',
    slots: { result: '2' },
    square: true,
  },
  'biases of content and of positions, both with a vector (Transformer-XL)': {
    text: `
      C[h,p,m] = sum(e) (Q[h,p,e] + u[h,e]) * K[h,m,e]
      R[h,p,m] = sum(e) (Q[h,p,e] + v[h,e]) * W[h,p - m + M - 1,e]
      T[h,p,m] = (C[h,p,m] + R[h,p,m]) * 0.3   where m <= p${softmax}`,
    inputs: { ...heads, u: 'H E', v: 'H E', W: 'H 99 E' },
    operator: 'attention',
    slots: { causal: 'p' },
    square: true,
  },
  ...Object.fromEntries(
    [
      'slope[h] * abs(p - m)',
      'slope[h] * (p - m)',
      'R[h, clamp(p - m + 4, 0, 8)]',
      'R[h, bucket[p,m]]',
      'B[h,p,m]',
    ].map((bias): [string, Case] => [
      `${bias} of heads that share keys (MQA)`,
      {
        text: `
          S[h,p,m] = sum(e) Q[h,p,e] * K[m,e]
          T[h,p,m] = S[h,p,m] - ${bias}
          G[h,p]   = max(m) T[h,p,m]
          A[h,p,m] = exp(T[h,p,m] - G[h,p])
          D[h,p]   = sum(m) A[h,p,m]
          O[h,p,f] = sum(m) A[h,p,m] * V[m,f] / D[h,p]`,
        inputs: {
          Q: 'H P E',
          K: 'M E',
          V: 'M F',
          slope: 'H',
          R: 'H 9',
          bucket: 'P M < 9',
          B: 'H P M',
        },
        operator: 'attention',
      },
    ]),
  ),
  'tokens through a convolution (memory-compressed attention)': {
    text: `
      X[u,e] = sum(r,c) K[u*3 + r,c] * WK[r,c,e]
      Y[u,f] = sum(r,c) V[u*3 + r,c] * WV[r,c,f]
      S[p,u] = sum(e) Q[p,e] * X[u,e] / sqrt(E)
      L[p]   = logsumexp(u) S[p,u]
      O[p,f] = sum(u) exp(S[p,u] - L[p]) * Y[u,f]`,
    inputs: { K: '170 C', WK: '3 C E', V: '170 C', WV: '3 C F', Q: 'P E' },
    operator: 'attention',
    slots: { before: 'X, Y' },
    ranks: ['U'],
  },
  'a bias for the largest of other scores': {
    text: `
      C[p,m]   = sum(e) X[p,e] * Y[m,e]
      B[p,m]   = 0.3 * C[p,m] + b[m]
      G[p]     = max(m) B[p,m]
      ${scores}
      T[h,p,m] = S[h,p,m] + if(B[p,m] == G[p], 3, 0)${softmax}`,
    inputs: { X: 'P E', Y: 'M E', b: 'M', ...heads },
    refused: ['CAS021', 'it looks for where a maximum is beside the operator'],
  },
  'weights that are squared again (the power of a softmax)': {
    text: `
      ${scores}
      D[h,p]   = sum(m) exp(S[h,p,m])
      W[h,p,m] = exp(S[h,p,m]) / D[h,p]
      O[h,p,f] = sum(m) W[h,p,m] * W[h,p,m] * V[h,m,f]`,
    inputs: heads,
    refused: ['CAS021', ''],
  },
}

const roles: Record<string, string> = {
  B: 'b',
  H: 'h',
  N: 'h',
  G: 'h',
  P: 's',
  M: 's',
  T: 's',
  U: 's',
}

/** Numbers with the axes of the text as [b, s, h, d], or back. */
function turned(data: ArrayLike<number>, ranks: string[], lengths: number[], back = false) {
  // N and G together are the heads
  const group = ranks.includes('N') ? ranks.indexOf('G') : -1
  const axes = ranks.filter((_, i) => i !== group)
  const sizes = lengths.filter((_, i) => i !== group)
  if (group >= 0) sizes[group - 1]! *= lengths[group]!
  const at = ['b', 's', 'h', 'd'].map((role) =>
    axes.findIndex((axis) => (roles[axis] ?? 'd') === role),
  )
  const shape = at.map((i) => (i < 0 ? 1 : sizes[i]!))
  const out = new Float64Array(data.length)
  for (let i = 0; i < data.length; i++) {
    const index = sizes.map((size, a) => {
      const below = sizes.slice(a + 1).reduce((x, y) => x * y, 1)
      return Math.floor(i / below) % size
    })
    const to = at.reduce((sum, a, r) => sum * shape[r]! + (a < 0 ? 0 : index[a]!), 0)
    if (back) out[i] = data[to]!
    else out[to] = data[i]!
  }
  return { data: out, shape }
}

function sizesFor(rng: Random, square: boolean): Record<string, number> {
  const P = 1 + rng.below(rng.pick([2, 12, 40]))
  const M = square ? P : P + rng.below(20)
  const [E, F] = rng.pick([
    [8, 16],
    [6, 7],
  ] as const)
  return { B: 2, H: 3, N: 2, G: 3, P, M, T: P, U: P, E, F, R: 8, C: 8 }
}

describeDevices('published mechanisms', (device) => {
  const rng = random(97)

  it.each(Object.entries(cases))('%s', async (_, one) => {
    const { text, inputs: axes, scalars = {}, operator, refused, slots = {} } = one
    const parsed = cascade(text)
    if (refused) {
      let error: HeddleError | undefined
      try {
        parsed.compile()
      } catch (caught) {
        error = caught as HeddleError
      }
      expect(error?.code).toBe(refused[0])
      expect(error?.message).toContain(refused[1])
      expect(error?.span).toBeDefined()
    }
    const plan = parsed.compile({ fused: refused ? 'preferred' : 'required' })
    const found = plan.explain()
    expect(found.operator).toBe(operator ?? 'einsum')
    for (const [slot, filled] of Object.entries(slots)) expect(found.slots[slot]).toBe(filled)
    const { packed } = found
    for (let n = 0; n < 4; n++) {
      const sizes = sizesFor(rng, one.square ?? false)
      const given: Record<string, DenseArray> = {}
      const tensors = parsed.ir.inputs.map((name): Tensor => {
        const [ranks, below] = axes[name]!.split(' < ') as [string, string?]
        const names = ranks.split(' ')
        const shape = names.map((rank) => sizes[rank] ?? Number(rank))
        const count = shape.reduce((a, b) => a * b, 1)
        const drawn = below
          ? Int32Array.from({ length: count }, () => rng.below(Number(below)))
          : one.numbers?.[name]
            ? Float32Array.from({ length: count }, (_, i) => one.numbers![name]!(i, rng))
            : name === 'gamma' || name === 'lambda'
              ? Float32Array.from({ length: count }, () => 0.5 + rng.next() / 2)
              : name === 'slope' // a state that grows leaves the range of float32
                ? rng.normals(count).map(Math.abs)
                : rng.normals(count)
        // a weight of 0 must not get one by rounding what is cast below
        const coarse = operator && n === 0 && !below
        const data = coarse ? drawn.map((x) => rounded('bfloat16', x)) : drawn
        given[name] = { data, shape }
        const own = name === 'S0' ? [1, ...shape] : shape
        if (!packed.includes(name)) return tensor(data, own, { device })
        const { data: moved, shape: four } = turned(data, names, shape)
        return tensor(Float32Array.from(moved), four, { device })
      })
      const off = parsed.ir.scalars.includes('off') ? { off: sizes.M! - sizes.P! } : {}
      const ranks = Object.fromEntries((one.ranks ?? []).map((rank) => [rank, sizes[rank]!]))
      const expected = parsed.evaluate(given, { ...scalars, ...off }, { sizes: ranks })
      const numbers = { ...scalars, ...ranks, ...(refused || one.told ? off : {}) }
      const results = plan(...tensors, numbers)
      expect(Object.keys(results).sort()).toEqual(Object.keys(expected).sort())
      const { data, shape } = expected.O!
      const left = text
        .match(/\bO\[([a-z,]+)\]/)![1]!
        .toUpperCase()
        .split(',')
      const raw = (await results.O!.read()) as Float32Array
      const actual = refused ? raw : turned(raw, left, [...shape], true).data
      expect(maxError(actual, data), JSON.stringify(sizes)).toBeLessThanOrEqual(
        3e-5 * Math.max(1, largest(data)),
      )
      // In 16 bits too, which what is computed beside the operator is rounded to
      if (!operator || n > 0) continue
      const halves = tensors.map((x, i) =>
        packed.includes(parsed.ir.inputs[i]!) || packed.length === 0
          ? (x as Tensor<'float32'>).cast('bfloat16')
          : x,
      )
      const { O } = plan(...halves, numbers)
      expect(O!.dtype).toBe('bfloat16')
      const rough = turned(
        (await O!.read({ as: 'float32' })) as Float32Array,
        left,
        [...shape],
        true,
      )
      expect(maxError(rough.data, data)).toBeLessThanOrEqual(0.1 * Math.max(1, largest(data)))
    }
  })
})
