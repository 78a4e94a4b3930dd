import { type Cascade, cascade, type DenseArray, tensor } from 'heddle'
import { expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { type Random, random } from '../support/random.js'

// Algorithms beyond attention, each against its definition written out here: what the text gives, what every rewrite of it
// gives, what its plan gives, and how many passes it takes
type At = (...index: number[]) => number
type Sizes = Record<string, number>
interface Case {
  text: string
  /** Axes of each input; `N < V` holds whole numbers. */
  inputs: Record<string, string>
  sizes: Sizes
  scalars?: Sizes
  passes: Sizes
  /** The first result by its coordinates. */
  is(at: Record<string, At>, z: Sizes): At
  /** Of the plan, where a result is a small difference of large numbers. */
  loose?: number
}

const sum = (n: number, f: (i: number) => number) => {
  let total = 0
  for (let i = 0; i < n; i++) total += f(i)
  return total
}
const each = <T>(n: number, f: (i: number) => T): T[] => Array.from({ length: n }, (_, i) => f(i))
const { exp, log, sqrt, abs, min } = Math
const sigmoid = (x: number) => 1 / (1 + exp(-x))
const share = (scores: number[]) => {
  const total = scores.reduce((a, x) => a + exp(x), 0)
  return scores.map((x) => exp(x) / total)
}

const wkv = ({ K, V, R, w, bonus }: Record<string, At>): At => {
  const past = (t: number, f: number) => (u: number) => exp(K!(u, f) - (t - 1 - u) * exp(w!(f)))
  return (t, f) => {
    const now = exp(bonus!(f) + K!(t, f))
    const above = sum(t, (u) => past(t, f)(u) * V!(u, f)) + now * V!(t, f)
    return (sigmoid(R!(t, f)) * above) / (sum(t, past(t, f)) + now)
  }
}
const sinkhorn = ({ C, a, b }: Record<string, At>, z: Sizes): At => {
  const g: At = (i, j) => exp(-C!(i, j))
  let [u, v] = [each(z.I!, () => 1), each(z.J!, () => 1)]
  for (let s = 0; s < z.S!; s++) {
    u = each(z.I!, (i) => exp(a!(i)) / sum(z.J!, (j) => g(i, j) * v[j]!))
    v = each(z.J!, (j) => exp(b!(j)) / sum(z.I!, (i) => g(i, j) * u[i]!))
  }
  return (i, j) => u[i]! * g(i, j) * v[j]!
}
const decayed = ({ A, C, B, X }: Record<string, At>, z: Sizes): At => {
  const past = (t: number, u: number) => exp(-sum(t - u, (w) => abs(A!(u + 1 + w))))
  return (t, f) => sum(t + 1, (u) => past(t, u) * sum(z.N!, (n) => C!(t, n) * B!(u, n)) * X!(u, f))
}

const cases: Record<string, Case> = {
  'softmax by an online normaliser (Milakov)': {
    text: `
      init M[v=0,n] = -inf;  init D[v=0,n] = 0
      iterate v {
        M[v+1,n] = max(M[v,n], X[n,v])
        D[v+1,n] = D[v,n] * exp(M[v,n] - M[v+1,n]) + exp(X[n,v] - M[v+1,n])
      }
      Y[n,v] = exp(X[n,v] - M[V,n]) / D[V,n]`,
    inputs: { X: 'N V' },
    sizes: { N: 3, V: 7 },
    passes: { V: 2, N: 1 },
    is:
      ({ X }, z) =>
      (n, v) =>
        share(each(z.V!, (i) => X!(n, i)))[v]!,
  },
  'cross entropy with labels': {
    text: `
      M[n] = max(v) X[n,v]
      Z[n] = sum(v) exp(X[n,v] - M[n])
      L[n] = M[n] + log(Z[n]) - X[n, label[n]]
      Y    = sum(n) L[n] / N`,
    inputs: { X: 'N V', label: 'N < V' },
    sizes: { N: 3, V: 9 },
    passes: { V: 3, N: 1 },
    is:
      ({ X, label }, z) =>
      () =>
        -sum(z.N!, (n) => log(share(each(z.V!, (v) => X!(n, v)))[label!(n)]!)) / z.N!,
  },
  'batch norm by two moments, of a tensor with the name of a rank': {
    text: `
      S1[c]    = sum(n,x) X[n,c,x]
      S2[c]    = sum(n,x) X[n,c,x] * X[n,c,x]
      U[c]     = S1[c] / (N * X)
      Y[n,c,x] = (X[n,c,x] - U[c]) * rsqrt(S2[c] / (N * X) - U[c] * U[c] + 0.1)`,
    inputs: { X: 'N C X' },
    sizes: { N: 3, C: 2, X: 5 },
    passes: { N: 2, X: 2, C: 1 },
    is: ({ X }, z) => {
      const mean = (f: (x: number) => number, c: number) =>
        sum(z.N!, (n) => sum(z.X!, (x) => f(X!(n, c, x)))) / (z.N! * z.X!)
      return (n, c, x) => {
        const u = mean((y) => y, c)
        return (X!(n, c, x) - u) / sqrt(mean((y) => (y - u) ** 2, c) + 0.1)
      }
    },
  },
  'layer norm by Welford': {
    text: `
      init U[d=0,n] = 0;  init W[d=0,n] = 0
      iterate d {
        G[d,n]   = X[n,d] - U[d,n]
        U[d+1,n] = U[d,n] + G[d,n] / (d + 1)
        W[d+1,n] = W[d,n] + G[d,n] * (X[n,d] - U[d+1,n])
      }
      Y[n,d] = (X[n,d] - U[D,n]) * rsqrt(W[D,n] / D + 0.1)`,
    inputs: { X: 'N D' },
    sizes: { N: 3, D: 7 },
    passes: { D: 2, N: 1 },
    is:
      ({ X }, z) =>
      (n, d) => {
        const u = sum(z.D!, (i) => X!(n, i)) / z.D!
        return (X!(n, d) - u) / sqrt(sum(z.D!, (i) => (X!(n, i) - u) ** 2) / z.D! + 0.1)
      },
  },
  'random features of both sides (Performer)': {
    text: `
      NQ[p]   = sum(e) Q[p,e] * Q[p,e]
      NK[m]   = sum(e) K[m,e] * K[m,e]
      XQ[p,r] = sum(e) W[r,e] * Q[p,e]
      XK[m,r] = sum(e) W[r,e] * K[m,e]
      PQ[p,r] = exp(XQ[p,r] - NQ[p] / 2)
      PK[m,r] = exp(XK[m,r] - NK[m] / 2)
      KV[r,f] = sum(m) PK[m,r] * V[m,f]
      KS[r]   = sum(m) PK[m,r]
      N[p,f]  = sum(r) PQ[p,r] * KV[r,f]
      D[p]    = sum(r) PQ[p,r] * KS[r]
      Y[p,f]  = N[p,f] / D[p]`,
    inputs: { Q: 'P E', K: 'M E', W: 'R E', V: 'M F' },
    sizes: { P: 3, M: 6, E: 4, R: 5, F: 3 },
    passes: { M: 1, P: 1, R: 1 },
    is: ({ Q, K, W, V }, z) => {
      const phi = (X: At, i: number, r: number) =>
        exp(sum(z.E!, (e) => W!(r, e) * X(i, e) - X(i, e) ** 2 / 2))
      const a = (p: number, m: number) => sum(z.R!, (r) => phi(Q!, p, r) * phi(K!, m, r))
      return (p, f) => sum(z.M!, (m) => a(p, m) * V!(m, f)) / sum(z.M!, (m) => a(p, m))
    },
  },
  'state spaces as a recurrence (Mamba 2)': {
    text: `
      init S[t=0,n,f] = 0
      iterate t {
        S[t+1,n,f] = exp(-abs(A[t])) * S[t,n,f] + B[t,n] * X[t,f]
        Y[t,f]     = sum(n) C[t,n] * S[t+1,n,f]
      }`,
    inputs: { A: 'T', B: 'T N', X: 'T F', C: 'T N' },
    sizes: { T: 9, N: 3, F: 2 },
    passes: { T: 1, N: 1 },
    is: decayed,
  },
  'state spaces in chunks (Mamba 2)': {
    text: `
      rank J = 3
      split t -> (c, i : 3)
      F1[c,i]   = sum(j) if(j <= i, -abs(A[c*I + j]), 0)
      E1[c]     = sum(j) -abs(A[c*I + j])
      G[c,i,j]  = sum(n) C[c*I + i, n] * B[c*I + j, n] * exp(F1[c,i] - F1[c,j])   where j <= i
      YD[c,i,f] = sum(j) G[c,i,j] * X[c*I + j, f]
      Z[c,n,f]  = sum(j) B[c*I + j, n] * exp(E1[c] - F1[c,j]) * X[c*I + j, f]
      init S[c=0,n,f] = 0
      iterate c {
        S[c+1,n,f] = exp(E1[c]) * S[c,n,f] + Z[c,n,f]
        YO[c,i,f]  = sum(n) C[c*I + i, n] * exp(F1[c,i]) * S[c,n,f]
      }
      Y[c,i,f] = YD[c,i,f] + YO[c,i,f]`,
    inputs: { A: 'T', C: 'T N', B: 'T N', X: 'T F' },
    sizes: { T: 9, N: 3, F: 2 },
    passes: { J: 2, N: 1, T: 1 },
    is: (at, z) => (c, i, f) => decayed(at, z)(3 * c! + i!, f!),
  },
  'a bonus for the token at hand (RWKV 4)': {
    text: `
      A[t,u,f] = exp(K[u,f] - (t - 1 - u) * exp(w[f]))     where u < t
      N[t,f]   = sum(u) A[t,u,f] * V[u,f]
      D[t,f]   = sum(u) A[t,u,f]
      B[t,f]   = exp(bonus[f] + K[t,f])
      Y[t,f]   = sigmoid(R[t,f]) * (N[t,f] + B[t,f] * V[t,f]) / (D[t,f] + B[t,f])`,
    inputs: { K: 'T F', w: 'F', V: 'T F', bonus: 'F', R: 'T F' },
    sizes: { T: 6, F: 3, U: 6 },
    passes: { T: 1, U: 1 },
    is: wkv,
  },
  'the same under a running maximum': {
    text: `
      init A[t=0,f] = 0;  init B[t=0,f] = 0;  init P[t=0,f] = -1e30
      iterate t {
        G[t,f]   = max(P[t,f], bonus[f] + K[t,f])
        E1[t,f]  = exp(P[t,f] - G[t,f])
        E2[t,f]  = exp(bonus[f] + K[t,f] - G[t,f])
        Y[t,f]   = sigmoid(R[t,f]) * (E1[t,f] * A[t,f] + E2[t,f] * V[t,f]) / (E1[t,f] * B[t,f] + E2[t,f])
        P[t+1,f] = max(P[t,f] - exp(w[f]), K[t,f])
        A[t+1,f] = exp(P[t,f] - exp(w[f]) - P[t+1,f]) * A[t,f] + exp(K[t,f] - P[t+1,f]) * V[t,f]
        B[t+1,f] = exp(P[t,f] - exp(w[f]) - P[t+1,f]) * B[t,f] + exp(K[t,f] - P[t+1,f])
      }`,
    inputs: { bonus: 'F', K: 'T F', R: 'T F', V: 'T F', w: 'F' },
    sizes: { T: 6, F: 3 },
    passes: { T: 1, F: 1 },
    is: wkv,
  },
  'the delta rule in chunks, by forward substitution (DeltaNet)': {
    text: `
      rank J = 3;  rank X = 3
      split t -> (c, i : 3)
      A[c,i,j]  = sum(e) beta[c*I + i] * K[c*I + i, e] * K[c*I + j, e]     where j < i
      init U[x=0,c,i,f] = 0
      init W[x=0,c,i,e] = 0
      iterate x {
        AU[x,c,f]    = sum(j) if(j < x, A[c,x,j] * U[x,c,j,f], 0)
        AW[x,c,e]    = sum(j) if(j < x, A[c,x,j] * W[x,c,j,e], 0)
        U[x+1,c,i,f] = if(i == x, beta[c*I + i] * V[c*I + i, f] - AU[x,c,f], U[x,c,i,f])
        W[x+1,c,i,e] = if(i == x, beta[c*I + i] * K[c*I + i, e] - AW[x,c,e], W[x,c,i,e])
      }
      P[c,i,j]  = sum(e) Q[c*I + i, e] * K[c*I + j, e]                     where j <= i
      init S[c=0,e,f] = 0
      iterate c {
        R[c,i,f]   = sum(e) W[X,c,i,e] * S[c,e,f]
        N[c,i,f]   = U[X,c,i,f] - R[c,i,f]
        Y1[c,i,f]  = sum(e) Q[c*I + i, e] * S[c,e,f]
        Y2[c,i,f]  = sum(j) P[c,i,j] * N[c,j,f]
        Y[c,i,f]   = Y1[c,i,f] + Y2[c,i,f]
        G[c,e,f]   = sum(i) K[c*I + i, e] * N[c,i,f]
        S[c+1,e,f] = S[c,e,f] + G[c,e,f]
      }`,
    inputs: { beta: 'T', K: 'T E', V: 'T F', Q: 'T E' },
    sizes: { T: 9, E: 3, F: 2 },
    passes: { T: 1, J: 2, E: 3, F: 1 },
    is: ({ beta, K, V, Q }, z) => {
      const state = each(z.E!, () => each(z.F!, () => 0))
      const rows = each(z.T!, (t) => {
        const old = each(z.F!, (f) => sum(z.E!, (e) => state[e]![f]! * K!(t, e)))
        for (let e = 0; e < z.E!; e++)
          for (let f = 0; f < z.F!; f++) state[e]![f]! += beta!(t) * K!(t, e) * (V!(t, f) - old[f]!)
        return each(z.F!, (f) => sum(z.E!, (e) => Q!(t, e) * state[e]![f]!))
      })
      return (c, i, f) => rows[3 * c! + i!]![f!]!
    },
    loose: 20,
  },
  'a step of k-means': {
    text: `
      D[n,k] = sum(e) (X[n,e] - Z[k,e]) * (X[n,e] - Z[k,e])
      G[n]   = min(k) D[n,k]
      I[n]   = min(k) if(D[n,k] == G[n], k, K)
      N[k]   = sum(n) if(I[n] == k, 1, 0)
      S[k,e] = sum(n) if(I[n] == k, X[n,e], 0)
      Y[k,e] = if(N[k] > 0, S[k,e] / N[k], Z[k,e])`,
    inputs: { X: 'N E', Z: 'K E' },
    sizes: { N: 9, K: 3, E: 2 },
    passes: { N: 1, K: 3 },
    is: ({ X, Z }, z) => {
      const own = each(z.N!, (n) => {
        const d = each(z.K!, (k) => sum(z.E!, (e) => (X!(n, e) - Z!(k, e)) ** 2))
        return d.indexOf(min(...d))
      })
      return (k, e) => {
        const mine = own.flatMap((other, n) => (other === k ? [n] : []))
        return mine.length > 0
          ? mine.reduce((total, n) => total + X!(n, e), 0) / mine.length
          : Z!(k, e)
      }
    },
  },
  'transport by scaling (Sinkhorn)': {
    text: `
      G[i,j] = exp(-C[i,j])
      init V[s=0,j] = 1
      init U[s=0,i] = 1
      iterate s {
        A[s,i]   = sum(j) G[i,j] * V[s,j]
        U[s+1,i] = exp(a[i]) / A[s,i]
        B[s,j]   = sum(i) G[i,j] * U[s+1,i]
        V[s+1,j] = exp(b[j]) / B[s,j]
      }
      Y[i,j] = U[S,i] * G[i,j] * V[S,j]`,
    inputs: { C: 'I J', a: 'I', b: 'J' },
    sizes: { I: 4, J: 3, S: 5 },
    passes: { S: 1, J: 2, I: 2 },
    is: sinkhorn,
  },
  'transport in logarithms': {
    text: `
      init V[s=0,j] = 0
      init U[s=0,i] = 0
      iterate s {
        A[s,i]   = logsumexp(j) V[s,j] - C[i,j]
        U[s+1,i] = a[i] - A[s,i]
        B[s,j]   = logsumexp(i) U[s+1,i] - C[i,j]
        V[s+1,j] = b[j] - B[s,j]
      }
      Y[i,j] = exp(U[S,i] + V[S,j] - C[i,j])`,
    inputs: { C: 'I J', a: 'I', b: 'J' },
    sizes: { I: 4, J: 3, S: 5 },
    passes: { S: 1, J: 2, I: 2 },
    is: sinkhorn,
  },
  'the likeliest path of a chain (Viterbi)': {
    text: `
      init A[t=0,j] = first[j]
      iterate t {
        X[t,i,j] = A[t,i] + step[i,j]
        B[t,j]   = max(i) X[t,i,j]
        F[t,j]   = min(i) if(X[t,i,j] == B[t,j], i, I)
        A[t+1,j] = B[t,j] + seen[t,j]
      }
      G  = max(j) A[T,j]
      E  = min(j) if(A[T,j] == G, j, J)
      init Z[s=0] = E
      iterate s { Z[s+1] = F[T - 1 - s, Z[s]] }
      Y[s] = Z[s]`,
    inputs: { first: 'J', step: 'J J', seen: 'T J' },
    sizes: { J: 4, T: 6, I: 4, S: 6 },
    passes: { T: 1, S: 1 },
    is: ({ first, step, seen }, z) => {
      let best = each(z.J!, (j) => ({ path: [j], value: first!(j) }))
      for (let t = 0; t < z.T!; t++)
        best = each(z.J!, (j) => {
          const all = best.map(({ path, value }, i) => ({
            path: [j, ...path],
            value: value + step!(i, j) + seen!(t, j),
          }))
          return all.reduce((a, b) => (b.value > a.value ? b : a))
        })
      return (s) => best.reduce((a, b) => (b.value > a.value ? b : a)).path[s!]!
    },
  },
  'a prefix in steps that double (Hillis and Steele)': {
    text: `
      init X[s=0,t] = A[t]
      iterate s { X[s+1,t] = X[s,t] + if(t >= pow(2, s), X[s, max(t - pow(2, s), 0)], 0) }
      Y[t] = X[S,t]`,
    inputs: { A: 'T' },
    sizes: { T: 11, S: 4 },
    passes: { S: 1, T: 1 },
    is:
      ({ A }) =>
      (t) =>
        sum(t! + 1, A!),
  },
  'experts that a list chooses': {
    text: `
      A[t,k,j] = sum(i) X[t,i] * W1[idx[t,k], j, i]
      B[t,k,o] = sum(j) relu(A[t,k,j]) * W2[idx[t,k], o, j]
      Y[t,o]   = sum(k) w[t,k] * B[t,k,o]`,
    inputs: { X: 'T I', W1: 'N J I', idx: 'T K < N', W2: 'N O J', w: 'T K' },
    sizes: { T: 3, I: 4, N: 5, J: 6, K: 2, O: 3 },
    passes: { K: 1, J: 1, I: 1 },
    is: ({ X, W1, idx, W2, w }, z) => {
      const hidden = (t: number, n: number, j: number) =>
        Math.max(
          0,
          sum(z.I!, (i) => X!(t, i) * W1!(n, j, i)),
        )
      const expert = (t: number, n: number, o: number) =>
        sum(z.J!, (j) => hidden(t, n, j) * W2!(n, o, j))
      return (t, o) => sum(z.K!, (k) => w!(t, k) * expert(t, idx!(t, k), o))
    },
  },
  'a memory beside a masked softmax (Infini-attention)': {
    text: `
      S[p,m] = sum(e) Q[p,e] * K[m,e] / sqrt(E)    where m <= p
      G[p]   = max(m) S[p,m]
      A[p,m] = exp(S[p,m] - G[p])
      D[p]   = sum(m) A[p,m]
      X[p,f] = sum(m) A[p,m] * V[m,f] / D[p]
      N[p,f] = sum(e) Q[p,e] * MEM[e,f]
      Y[p,f] = (X[p,f] + relu(N[p,f])) / 2`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F', MEM: 'E F' },
    sizes: { P: 6, M: 6, E: 4, F: 3 },
    passes: { M: 3, E: 1 },
    is: ({ Q, K, V, MEM }, z) => {
      const row = (p: number) =>
        share(each(p + 1, (m) => sum(z.E!, (e) => Q!(p, e) * K!(m, e)) / sqrt(z.E!)))
      const memory = (p: number, f: number) => sum(z.E!, (e) => Q!(p, e) * MEM!(e, f))
      return (p, f) =>
        (row(p).reduce((total, x, m) => total + x * V!(m, f), 0) + Math.max(0, memory(p, f))) / 2
    },
  },
}

function draw(rng: Random, axes: string, sizes: Sizes): DenseArray {
  const [ranks, below] = axes.split(' < ') as [string, string?]
  const shape = ranks.split(' ').map((rank) => sizes[rank]!)
  const count = shape.reduce((a, b) => a * b, 1)
  const data = below
    ? Int32Array.from({ length: count }, () => rng.below(sizes[below]!))
    : rng.normals(count)
  return { data, shape }
}

describeDevices('algorithms beyond attention', (device) => {
  const rng = random(98)

  it.each(Object.entries(cases))('%s', async (_, one) => {
    const { text, inputs: axes, sizes, scalars = {}, passes, is, loose = 1 } = one
    const parsed = cascade(text)
    const analysis = parsed.analyze()
    for (const [rank, count] of Object.entries(passes))
      expect(analysis.passes[rank]!.headline, rank).toBe(count)
    const inputs = Object.fromEntries(
      Object.entries(axes).map(([name, text]) => [name, draw(rng, text, sizes)]),
    )
    const at = Object.fromEntries(
      Object.entries(inputs).map(([name, { data, shape }]): [string, At] => [
        name,
        (...index) => data[index.reduce((place, i, axis) => place * shape[axis]! + i, 0)]!,
      ]),
    )
    const own = ({ ir }: Cascade) =>
      Object.fromEntries(
        ir.families.flatMap(({ name }) =>
          sizes[name] === undefined ? [] : [[name, sizes[name]] as const],
        ),
      )
    const { Y } = parsed.evaluate(inputs, scalars, { sizes: own(parsed) })
    const { data, shape } = Y!
    const definition = is(at, sizes)
    const wanted = data.map((_, i) => {
      const below = shape.map((_, axis) => shape.slice(axis + 1).reduce((a, b) => a * b, 1))
      return definition(...shape.map((size, axis) => Math.floor(i / below[axis]!) % size))
    })
    const most = Math.max(1, largest(wanted))
    expect(maxError(data, wanted)).toBeLessThanOrEqual(1e-9 * most)
    for (const { rule, rewritten } of analysis.suggestions) {
      const other = cascade(rewritten)
      const { Y } = other.evaluate(inputs, scalars, { sizes: own(other) })
      expect(maxError(Y!.data, wanted), rule).toBeLessThanOrEqual(1e-9 * most)
    }
    const plan = parsed.compile({ fused: 'preferred' })
    if (plan.explain().operator !== 'einsum') return
    const given = parsed.ir.inputs.map((name) => {
      const { data, shape } = inputs[name]!
      return tensor(data as Float32Array, [...shape], { device })
    })
    const result = plan(...given, { ...scalars, ...own(parsed) })
    expect(maxError((await result.Y!.read()) as Float32Array, wanted), 'plan').toBeLessThanOrEqual(
      3e-5 * loose * most,
    )
  })
})
