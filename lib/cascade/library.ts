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

// Of the chunks that begin at F, each by the best of a descent that halves it, the W best in order: they begin at Y
const stage = (n: number) =>
  `
  init X_[u_=0,c_] = F_[c_];   init T_[u_=0,c_] = -inf
  iterate u_ {
    D_[u_,c_,s,i] = sum(e) QM[i,e] * K[X_[u_,c_] + s * pow(2, U_ - 1 - u_) + if(u_ < U_ - 1, pow(2, U_ - 2 - u_), 0), e]
    A_[u_,c_,s]   = max(i) D_[u_,c_,s,i]
    M_[u_,c_]     = max(s) A_[u_,c_,s]
    T_[u_+1,c_]   = max(T_[u_,c_], M_[u_,c_])
    X_[u_+1,c_]   = X_[u_,c_] + if(A_[u_,c_,0] >= A_[u_,c_,1], 0, pow(2, U_ - 1 - u_))
  }
  R_[c_] = sum(x_) if(T_[U_,x_] > T_[U_,c_] || T_[U_,x_] == T_[U_,c_] && x_ < c_, 1, 0)
  P_[c_] = sum(x_) if(x_ < c_ && R_[x_] < W_, 1, 0)
  Y_[w_] = sum(c_) if(R_[c_] < W_ && P_[c_] == w_, F_[c_], 0)`.replaceAll('_', `${n}`)

/**
 * What every operator and mechanism computes, as cascades: for one batch entry,
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
  /**
   * {@link hip} for one block of queries: N intervals of blocks of J keys are cut in two and the best N halves kept, L times.
   * One query of T is looked at. B has 1 for what is listed.
   */
  hip: `
  rank T = ?
  init X[l=0,n] = n * pow(2, L)
  iterate l {
    H[l,n,s]     = X[l,n] + s * pow(2, L - 1 - l)
    M[l,n,s]     = sinks + (H[l,n,s] + if(l < L - 1, pow(2, L - 2 - l), 0)) * J
    D[l,n,s,i,j] = sum(e) Q[i*T + T - 1, e] * K[M[l,n,s] + j, e]
    A[l,n,s]     = max(i,j) if(M[l,n,s] + j <= i*T + T - 1 + off - window, D[l,n,s,i,j], -inf)
    R[l,n,s]     = sum(x,y) if(A[l,x,y] > A[l,n,s] || A[l,x,y] == A[l,n,s] && 2*x + y < 2*n + s, 1, 0)
    P[l,n,s]     = sum(x,y) if(2*x + y < 2*n + s && R[l,x,y] < N, 1, 0)
    X[l+1,n]     = sum(x,y) if(R[l,x,y] < N && P[l,x,y] == n, H[l,x,y], 0)
  }
  B[b] = sum(n) if(X[L,n]*J + sinks == b*J, 1, 0)`,
  /** {@link infiniteHip} for one block of queries and two stages: the best of all chunks, and the best of what they are cut into. */
  infiniteHip: `
  QM[i,e] = sum(a) Q[i*A + a, e] / A
  F1[c1]  = sinks + c1 * pow(2, U1)${stage(1)}
  F2[c2]  = sum(w1,g) if(w1*G + g == c2, Y1[w1] + g * pow(2, U2), 0)${stage(2)}
  B[b]    = sum(w2) if(Y2[w2] == b * pow(2, U2), 1, 0)`,
  /**
   * {@link flexPrefill} in the mode `'coverage'`, for whole blocks. V has the mass of columns of blocks and O of diagonals, for the
   * last queries, E what pooling expects of V. B has 1 for what is listed.
   */
  flexPrefill: `
  S[i,m]  = sum(e) Q[R*I - I + i, e] * K[m,e] * scale    where m <= R*I - I + i
  L[i]    = logsumexp(m) S[i,m]
  A[i,m]  = exp(S[i,m] - L[i]) / I
  V[c]    = sum(i,j) A[i, c*I + j]
  D[d]    = sum(i) A[i, R*I - I + i - d]
  O1[c]   = sum(j) D[c*I + j] * (1 - j / I)
  O2[c]   = sum(j) D[c*I - I + j] * j / I
  O[c]    = O1[c] + O2[c]
  QM[r,e] = sum(i) Q[r*I + i, e] / I
  KM[c,e] = sum(j) K[c*I + j, e] / I
  G[r,c]  = sum(e) QM[r,e] * KM[c,e] * scale             where c <= r
  LG[r]   = logsumexp(c) G[r,c]
  P[r,c]  = exp(G[r,c] - LG[r])
  E[c]    = P[R,c]
  JS      = sum(c) E[c] * log(2 * E[c] / (E[c] + V[c])) + V[c] * log(2 * V[c] / (E[c] + V[c]))
  W       = sqrt(JS / 2)
  V0[c]   = if(c == 0, inf, V[c])
  O0[c]   = if(c == 0, inf, O[c])
  RV[c]   = sum(x) if(V0[x] > V0[c] || V0[x] == V0[c] && x < c, 1, 0)
  RO[c]   = sum(x) if(O0[x] > O0[c] || O0[x] == O0[c] && x < c, 1, 0)
  BV[c]   = sum(x) if(RV[x] < RV[c], V[x], 0)
  BO[c]   = sum(x) if(RO[x] < RO[c], O[x], 0)
  NV      = sum(c) if(W >= tau && BV[c] < gamma, 1, 0)
  NO      = sum(c) if(W >= tau && BO[c] < gamma, 1, 0)
  BP[r,c] = sum(x,y) if(P[x,y] > P[r,c] || P[x,y] == P[r,c] && x*R + y < r*R + c, P[x,y], 0)
  B[r,c]  = if(c == 0 || c == r || RV[c] < max(NV, least) || RO[r - c] < max(NO, least) || W < tau && BP[r,c] <= gamma * R, 1, 0)   where c <= r`,
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
