import { softplusDefinition } from '../mechanisms/softplus.js'
import {
  attentionBackwardDefinition,
  attentionDefinition,
  sigmoidDefinition,
} from '../ops/attention.js'
import { lightningDefinition } from '../ops/lightning.js'
import { mergeDefinition } from '../ops/merge.js'

const silu = (to: string, from: string) => `${to} = ${from} * sigmoid(${from})`

// Heads of a linear attention layer and what follows them: X is normalised, or not, to Z before
const scan = `
  init S[t=0,h,e,f] = S0[h,e,f]
  iterate t {
    S[t+1,h,e,f] = exp(-slope[h]) * S[t,h,e,f] + K[t,h,e] * V[t,h,f]
    O[t,h,f]     = sum(e) Q[t,h,e] * S[t+1,h,e,f]
  }
  OS[t]    = sum(h,f) O[t,h,f] * O[t,h,f]
  ON[t,h,f] = O[t,h,f] * rsqrt(OS[t] / (H * F) + eps)`

/**
 * What every operator computes, and every mechanism that is a composition of operators, as cascades: for one batch entry,
 * and for one head where heads do not meet. Tests hold each against its kernels on every device.
 *
 * Selections are named by what they select: a mask is `where` in the cascade of attention.
 *
 * @example
 * import { cascade, definitions } from 'heddle'
 * console.log(cascade(definitions.norm).analyze({ sizes: { N: 4096, D: 8192 } }).bound) // 'memory'
 */
export const definitions = {
  attention: attentionDefinition,
  'attention.backward': `
  S[p,m]  = sum(e) Q[p,e] * K[m,e] * scale${attentionBackwardDefinition}`,
  /** {@link attention} with weights of `'sigmoid'` and a bias. */
  'attention.sigmoid': sigmoidDefinition,
  lightning: lightningDefinition,
  'lightning.backward': `
  A[t,u]  = sum(e) Q[t,e] * K[u,e] * scale       where u <= t
  DA[t,u] = sum(f) DO[t,f] * V[u,f] * scale      where u <= t
  W[t,u]  = exp(-slope * (t - u))                where u <= t
  DQ[t,e] = sum(u) DA[t,u] * W[t,u] * K[u,e]
  DK[u,e] = sum(t) DA[t,u] * W[t,u] * Q[t,e]
  DV[u,f] = sum(t) A[t,u] * W[t,u] * DO[t,f]`,
  'lightning.decode': lightningDefinition,
  merge: mergeDefinition,
  linear: `
  Z[n,o] = sum(i) X[n,i] * W[o,i]
  Y[n,o] = Z[n,o] + B[o]`,
  norm: `
  S[n]   = sum(d) X[n,d] * X[n,d]
  Y[n,d] = X[n,d] * rsqrt(S[n] / D + eps) * W[d]`,
  /** The layout `'half-split'`: pairs stand half a row apart, here as the second axis of X. */
  rope: `
  A[p,c]  = p * pow(theta, -c / C)
  YA[p,c] = X[p,0,c] * cos(A[p,c]) - X[p,1,c] * sin(A[p,c])
  YB[p,c] = X[p,1,c] * cos(A[p,c]) + X[p,0,c] * sin(A[p,c])`,
  embed: `
  Y[n,d] = T[ids[n],d]`,
  glu: `
  Y[n] = G[n] * sigmoid(G[n]) * U[n]`,
  add: `
  Y[n,d] = X[n,d] + Z[d]`,
  mul: `
  Y[n,d] = X[n,d] * Z[d]`,
  silu: `
  ${silu('Y[n]', 'X[n]')}`,
  sigmoid: `
  Y[n] = sigmoid(X[n])`,
  /** The kind `'pooled'`, for whole blocks: r counts blocks of queries from position `off` on, c blocks of keys. */
  probe: `
  QM[r,e] = sum(i) Q[r*I + i,e]
  KM[c,e] = sum(j) K[c*J + j,e]
  S[r,c]  = sum(e) QM[r,e] * KM[c,e] * scale / (I * J)   where c*J <= r*I + I - 1 + off`,
  /** The kind `'rows'` of every query, per block: what {@link sampled} ranks blocks by. */
  'probe.rows': `
  S[r,i,c,j] = sum(e) Q[r*I + i,e] * K[c*J + j,e] * scale   where c*J + j <= r*I + i + off
  L[r,i]     = logsumexp(c,j) S[r,i,c,j]
  A[r,i,c,j] = exp(S[r,i,c,j] - L[r,i])
  P[r,c]     = sum(i,j) A[r,i,c,j] / I`,
  /** The kind `'rows'` per key and per distance x: the columns and diagonals of {@link minference}. */
  'probe.lines': `
  S[p,m] = sum(e) Q[p,e] * K[m,e] * scale   where m <= p + off
  L[p]   = logsumexp(m) S[p,m]
  A[p,m] = exp(S[p,m] - L[p])
  C[m]   = sum(p) A[p,m] / P
  D[x]   = sum(p) A[p, p + M - P - x] / P`,
  /** The kind `'antidiagonal'` of {@link xattention}: g and h count groups in a block, a the tokens of a group. */
  'probe.antidiagonal': `
  S[r,g,c,h] = sum(a,e) Q[r*G*A + g*A + A - 1 - a, e] * K[c*H*A + h*A + a, e] * scale / A   where (c*H + h) * A <= (r*G + g) * A + A - 1 + off
  L[r,g]     = logsumexp(c,h) S[r,g,c,h]
  N[r,g,c,h] = exp(S[r,g,c,h] - L[r,g])
  P[r,c]     = sum(g,h) N[r,g,c,h] / G`,
  /** The rule `topBlocks`: 1 for what is kept. */
  keep: `
  R[r,c] = sum(x) if(S[r,x] > S[r,c] || S[r,x] == S[r,c] && x < c, 1, 0)
  B[r,c] = if(R[r,c] < top, 1, 0)`,
  /** The rule `coverage`: kept as long as what is before falls short of the share. */
  'keep.coverage': `
  T[r]   = sum(c) S[r,c]
  G[r,c] = sum(x) if(S[r,x] > S[r,c] || S[r,x] == S[r,c] && x < c, S[r,x], 0)
  B[r,c] = if(G[r,c] < coverage * T[r], 1, 0)`,
  /** {@link attention} under a mask of blocks: what every selection of blocks leads to. */
  'attention.blocks': `
  S[r,i,c,j] = sum(e) Q[r*I + i,e] * K[c*J + j,e] * scale   where kept[r,c] == 1 && c*J + j <= r*I + i + off
  GM[r,i]    = max(c,j) S[r,i,c,j]
  N[r,i,c,j] = exp(S[r,i,c,j] - GM[r,i])
  D[r,i]     = sum(c,j) N[r,i,c,j]
  O[r,i,f]   = sum(c,j) N[r,i,c,j] * V[c*J + j,f] / D[r,i]`,
  /** {@link attention} with weights of `'relu'` and a power of 2. */
  'attention.relu': `
  S[p,m] = sum(e) Q[p,e] * K[m,e] * scale        where m <= p + off
  O[p,f] = sum(m) relu(S[p,m]) * relu(S[p,m]) * V[m,f]`,
  /** {@link attention} with weights of `'softplus'`. */
  'attention.softplus': `
  S[p,m] = sum(e) Q[p,e] * K[m,e] * scale        where m <= p + off
  W[p,m] = softplus(S[p,m])
  D[p]   = sum(m) W[p,m]
  O[p,f] = sum(m) W[p,m] * V[m,f] / D[p]
  LSE[p] = log(D[p])`,
  /** {@link attention} with all that it adds to a score, and a sink. */
  'attention.options': `
  S[p,m]  = sum(e) Q[p,e] * K[m,e] * scale       where m <= p + off && m > p + off - window
  T[p,m]  = cap * tanh(S[p,m] / cap) + slope * (m - p - off) + B[p,m]
  G[p]    = max(m) T[p,m]
  GM[p]   = max(G[p], sink)
  N[p,m]  = exp(T[p,m] - GM[p])
  D[p]    = sum(m) N[p,m]
  Z[p]    = D[p] + exp(sink - GM[p])
  O[p,f]  = sum(m) N[p,m] * V[m,f] / Z[p]
  LSE[p]  = GM[p] + log(Z[p])`,
  /** {@link softplusAttention}, with all keys of a row among those that it sees. */
  softplus: softplusDefinition,
  streaming: attentionDefinition.replace(
    'm <= p + off',
    'm <= p + off && (m < sinks || m > p + off - window)',
  ),
  minimax: `
  AQ[t,h,e] = sum(i) X[t,i] * WQKV[h,0,e,i]
  AK[t,h,e] = sum(i) X[t,i] * WQKV[h,1,e,i]
  AV[t,h,f] = sum(i) X[t,i] * WQKV[h,2,f,i]
  ${silu('Q[t,h,e]', 'AQ[t,h,e]')}
  ${silu('K[t,h,e]', 'AK[t,h,e]')}
  ${silu('V[t,h,f]', 'AV[t,h,f]')}${scan}
  G[t,h,f]  = sum(i) X[t,i] * WG[h,f,i]
  U[t,h,f]  = sigmoid(G[t,h,f]) * ON[t,h,f] * W[h,f]
  Y[t,o]    = sum(h,f) U[t,h,f] * WO[o,h,f]`,
  transnormer: `
  XS[t]     = sum(i) X[t,i] * X[t,i]
  Z[t,i]    = X[t,i] * rsqrt(XS[t] / I + eps)
  AQ[t,h,e] = sum(i) Z[t,i] * WQKVU[0,h,e,i]
  AK[t,h,e] = sum(i) Z[t,i] * WQKVU[1,h,e,i]
  V[t,h,f]  = sum(i) Z[t,i] * WQKVU[2,h,f,i]
  U[t,h,f]  = sum(i) Z[t,i] * WQKVU[3,h,f,i]
  ${silu('Q[t,h,e]', 'AQ[t,h,e]')}
  ${silu('K[t,h,e]', 'AK[t,h,e]')}${scan}
  M[t,h,f]  = U[t,h,f] * ON[t,h,f]
  YO[t,i]   = sum(h,f) M[t,h,f] * WO[i,h,f]
  X1[t,i]   = X[t,i] + YO[t,i]
  X1S[t]    = sum(i) X1[t,i] * X1[t,i]
  Z1[t,i]   = X1[t,i] * rsqrt(X1S[t] / I + eps)
  G1[t,j]   = sum(i) Z1[t,i] * WG[j,i]
  U1[t,j]   = sum(i) Z1[t,i] * WU[j,i]
  GU[t,j]   = G1[t,j] * U1[t,j]
  YD[t,i]   = sum(j) GU[t,j] * WD[i,j]
  Y[t,i]    = X1[t,i] + YD[t,i]`,
} as const satisfies Record<string, string>
