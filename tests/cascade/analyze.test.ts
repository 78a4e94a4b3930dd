import { cascade, definitions, type Machine } from 'heddle'
import { describe, expect, it } from 'vitest'
import { thrown } from '../support/failure.js'

const passesOf = (text: string, rank: string) => cascade(text).analyze().passes[rank]!
const partition = `
  split m -> (m1, m0 : 128) tail mask
  init BK[e,m1,m0] = K[e, m1*M0 + m0];   init BV[f,m1,m0] = V[f, m1*M0 + m0]`
const scores = 'QK[m,p] = sum(e) Q[e,p] * K[e,m] * scale\n'
const stable = `${scores}
  GM[p]   = max(m) QK[m,p]
  SN[m,p] = exp(QK[m,p] - GM[p])
  SD[p]   = sum(m) SN[m,p]`
const threePass = `${stable}
  A[m,p]  = SN[m,p] / SD[p]
  AV[f,p] = sum(m) A[m,p] * V[f,m]`
const twoPass = `${stable}
  SNV[f,p] = sum(m) SN[m,p] * V[f,m]
  AV[f,p]  = SNV[f,p] / SD[p]`
const local = `${partition}
  BQK[m1,m0,p] = sum(e) Q[e,p] * BK[e,m1,m0] * scale
  LM[m1,p]     = max(m0) BQK[m1,m0,p]
  SLN[m1,m0,p] = exp(BQK[m1,m0,p] - LM[m1,p])
  SLD[m1,p]    = sum(m0) SLN[m1,m0,p]`
const merge = `
  GM[p]        = max(m1) LM[m1,p]
  PLM[m1,p]    = exp(LM[m1,p] - GM[p])
  SD[p]        = sum(m1) SLD[m1,p] * PLM[m1,p]`
const localMax = `${local}${merge}
  A[m1,m0,p]   = SLN[m1,m0,p] * PLM[m1,p] / SD[p]
  AV[f,p]      = sum(m1,m0) A[m1,m0,p] * BV[f,m1,m0]`
const splitKV = `${local}
  LNV[f,m1,p]  = sum(m0) SLN[m1,m0,p] * BV[f,m1,m0]${merge}
  NV[f,p]      = sum(m1) LNV[f,m1,p] * PLM[m1,p]
  AV[f,p]      = NV[f,p] / SD[p]`
const onePass = `${partition}
  init RM[m1=0,p] = -inf;   init RD[m1=0,p] = 0;   init RNV[f,m1=0,p] = 0
  iterate m1 {
    BQK[m1,m0,p]  = sum(e) Q[e,p] * BK[e,m1,m0] * scale
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
const backward = `
  P[m,p]  = exp(sQK[m,p] - L[p])
  dP[m,p] = sum(f) dO[f,p] * V[f,m]`

describe('passes', () => {
  it.each([
    ['C1', 'Y = A[k] * B[k]\nZ = sum(k) Y * A[k]', 'K', { A: 2, B: 1 }],
    ['C2', 'Y = A[k] * B[k]\nX = sum(k) A[k]\nZ = Y * X', 'K', { A: 1, B: 1 }],
    [
      'C3',
      `init RY[i=0] = 0;   init RZ[i=0] = 0
       iterate i {
         RY[i+1] = RY[i] + A[i] * B[i]
         RZ[i+1] = RZ[i] * RY[i+1] / RY[i] + RY[i+1] * A[i]
       }
       Z = RZ[I]`,
      'I',
      { A: 1, B: 1, RY: 1, RZ: 1 },
    ],
    [
      'a product in between',
      'C[k] = A[k] * B[k]\nY = sum(k) C[k]\nZ = sum(k) Y * A[k]',
      'K',
      { A: 2, B: 1, C: 1 },
    ],
    ['an unrelated tensor', 'Y = A[k] * B[k]\nZ = sum(k) Y * C[k]', 'K', { A: 1, B: 1, C: 1 }],
    [
      'softmax without max',
      `${scores}SN[m,p] = exp(QK[m,p])\nSD[p] = sum(m) SN[m,p]\nA[m,p] = SN[m,p] / SD[p]\nAV[f,p] = A[m,p] * V[f,m]`,
      'M',
      { K: 2, QK: 2, SN: 2, A: 1, V: 1 },
    ],
    [
      'softmax without max, deferred division',
      `${scores}SN[m,p] = exp(QK[m,p])\nSD[p] = sum(m) SN[m,p]\nSNV[f,p] = SN[m,p] * V[f,m]\nAV[f,p] = SNV[f,p] / SD[p]`,
      'M',
      { K: 1, QK: 1, SN: 1, V: 1 },
    ],
    ['three passes', threePass, 'M', { K: 3, QK: 3, SN: 2, A: 1, V: 1 }],
    ['three passes, deferred division', twoPass, 'M', { K: 2, QK: 2, SN: 1, V: 1 }],
    ['local maximum', localMax, 'M', { K: 2, BK: 2, BQK: 2, SLN: 2, A: 1, V: 1, BV: 1 }],
    ['running maximum', onePass, 'M', { K: 1, BK: 1, BQK: 1, SLN: 1, V: 1, BV: 1 }],
    ['split keys and merge', splitKV, 'M', { K: 1, BK: 1, BQK: 1, SLN: 1, V: 1, BV: 1 }],
    [
      'sigmoid attention',
      `${scores}A[m,p] = sigmoid(QK[m,p] + b)\nAV[f,p] = A[m,p] * V[f,m]`,
      'M',
      { K: 1, QK: 1, A: 1, V: 1 },
    ],
    [
      'linear attention',
      'KV[e,f] = K[e,m] * V[f,m]\nAV[f,p] = Q[e,p] * KV[e,f]',
      'M',
      { K: 1, V: 1 },
    ],
    [
      'sparsemax with its threshold',
      `${scores}T[p] = max(m) QK[m,p]\nA[m,p] = relu(QK[m,p] - T[p])\nAV[f,p] = A[m,p] * V[f,m]`,
      'M',
      { K: 2, QK: 2, A: 1, V: 1 },
    ],
    [
      'top-k, then a stable softmax',
      `${scores}T[p] = min(m) QK[m,p]\nTK[m,p] = if(QK[m,p] >= T[p], QK[m,p], -inf)
       GM[p] = max(m) TK[m,p]\nSN[m,p] = exp(TK[m,p] - GM[p])\nSD[p] = sum(m) SN[m,p]
       A[m,p] = SN[m,p] / SD[p]\nAV[f,p] = A[m,p] * V[f,m]`,
      'M',
      { K: 4, QK: 4, TK: 3, SN: 2, A: 1, V: 1 },
    ],
    [
      'top-k, then a stable softmax, deferred division',
      `${scores}T[p] = min(m) QK[m,p]\nTK[m,p] = if(QK[m,p] >= T[p], QK[m,p], -inf)
       GM[p] = max(m) TK[m,p]\nSN[m,p] = exp(TK[m,p] - GM[p])\nSD[p] = sum(m) SN[m,p]
       SNV[f,p] = SN[m,p] * V[f,m]\nAV[f,p] = SNV[f,p] / SD[p]`,
      'M',
      { K: 3, QK: 3, TK: 2, SN: 1, V: 1 },
    ],
    [
      'gradient of q, delta inside',
      `${backward}\nD[p] = sum(m) P[m,p] * dP[m,p]\ndS[m,p] = P[m,p] * (dP[m,p] - D[p])\ndQ[e,p] = sum(m) dS[m,p] * K[e,m]`,
      'M',
      { sQK: 2, P: 2, V: 2, dP: 2, dS: 1, K: 1 },
    ],
    [
      'gradient of q, delta ahead',
      `D[p] = sum(f) dO[f,p] * O[f,p]${backward}\ndS[m,p] = P[m,p] * (dP[m,p] - D[p])\ndQ[e,p] = sum(m) dS[m,p] * K[e,m]`,
      'M',
      { sQK: 1, P: 1, V: 1, dP: 1, dS: 1, K: 1 },
    ],
  ] as const)('%s', (_, text, rank, expected) => {
    const { perTensor, headline, why } = passesOf(text, rank)
    expect(perTensor).toEqual(expected)
    expect(headline).toBe(Math.max(...Object.values(expected)))
    expect(why).toHaveLength(headline - 1)
  })

  it('at the inner level of a running maximum', () => {
    const { perLevel } = passesOf(onePass, 'M')
    expect(perLevel).toEqual({ m1: 1, m0: 2 })
  })
})

describe('passes of published algorithms', () => {
  const headlines = (text: string) =>
    Object.fromEntries(
      Object.entries(cascade(text).analyze().passes).map(([rank, { headline }]) => [
        rank,
        headline,
      ]),
    )

  it('layer norm takes three, with the mean of squares two', () => {
    const end = 'Y[d,t] = (X[d,t] - U[t]) * rsqrt(W[t] + eps)'
    const mean = 'S[t] = sum(d) X[d,t]\nU[t] = S[t] / D'
    expect(
      headlines(`${mean}\nC[d,t] = X[d,t] - U[t]\nW[t] = sum(d) C[d,t] * C[d,t] / D\n${end}`),
    ).toEqual({ D: 3, T: 1 })
    expect(
      headlines(`${mean}\nQ[t] = sum(d) X[d,t] * X[d,t] / D\nW[t] = Q[t] - U[t] * U[t]\n${end}`),
    ).toEqual({ D: 2, T: 1 })
  })

  it('the delta rule takes one pass over the sequence, each step two over its features', () => {
    const text = `
      init S[t=0,e,f] = 0
      iterate t {
        R[t,f]     = sum(e) K[t,e] * S[t,e,f]
        S[t+1,e,f] = S[t,e,f] + beta[t] * K[t,e] * (V[t,f] - R[t,f])
        O[t,f]     = sum(e) Q[t,e] * S[t+1,e,f]
      }`
    expect(headlines(text)).toEqual({ T: 1, E: 2, F: 1 })
  })

  it('a state that runs backwards after one that ran forwards reads twice', () => {
    const text = `
      init S[t=0] = 0
      iterate t { S[t+1] = S[t] + X[t] }
      init B[u=0] = 0
      iterate u { B[u+1] = B[u] + S[T - u] }
      Y = B[U]`
    const { passes } = cascade(text).analyze()
    expect(passes.T!.headline).toBe(1)
    expect(passes.U!.headline).toBe(1)
    expect(passesOf('C[t] = X[t] * X[t]\nY[t] = C[T - 1 - t] + C[t]', 'T').headline).toBe(2)
  })

  it('attention over keys that a list selects reads keys twice if scores make the list', () => {
    const attend = `
      S[j,p]  = sum(e) Q[e,p] * K[e, LIST[j,p]]
      N[j,p]  = exp(S[j,p] - G[p])
      O[f,p]  = sum(j) N[j,p] * V[f, LIST[j,p]]`
    const selected = `C[m,p] = sum(e) Q[e,p] * K[e,m]\nG[p] = max(m) C[m,p]\nLIST[j,p] = R[j] + 0 * G[p]\n${attend}`
    expect(passesOf(selected, 'M').perTensor.K).toBe(2)
    expect(passesOf(attend.replace('G[p]', 'G[p]'), 'J').perTensor).toMatchObject({
      K: 1,
      S: 1,
      V: 1,
    })
  })

  it('a search by bisection sweeps the scores in every step, and says so', () => {
    const text = `
      ${scores}
      HI[p] = max(m) QK[m,p]
      init TAU[i=0,p] = HI[p] - 1
      iterate i {
        Z[i,p]     = sum(m) relu(QK[m,p] - TAU[i,p])
        TAU[i+1,p] = TAU[i,p] + if(Z[i,p] >= 1, 1, 0) * exp2(-i - 1)
      }
      A[m,p]  = relu(QK[m,p] - TAU[I,p])
      AV[f,p] = sum(m) A[m,p] * V[f,m]`
    const { passes, warnings } = cascade(text).analyze()
    expect(passes.M!.perTensor).toEqual({ K: 3, QK: 3, A: 1, V: 1 })
    expect(warnings).toEqual([
      {
        code: 'CAS032',
        message: 'Z sweeps m again in every step of i; passes count one step',
        span: [7, 9, 6],
      },
    ])
    expect(cascade(onePass).analyze().warnings).toEqual([])
  })

  it.each([
    [
      'softplus with re-weighting',
      'A[m,p] = softplus(QK[m,p])\nD[p] = sum(m) A[m,p]\nR[m,p] = relu(A[m,p] / D[p] * n - 1)\nC[m,p] = pow(R[m,p], 15)\nS[p] = sum(m) C[m,p]\nW[f,p] = sum(m) C[m,p] * V[f,m]\nAV[f,p] = W[f,p] / S[p]',
      2,
    ],
    [
      'heads mixed after the softmax',
      `GM[h,p] = max(m) QK[h,m,p]
      SN[h,m,p] = exp(QK[h,m,p] - GM[h,p])
      SD[h,p]   = sum(m) SN[h,m,p]
      A[h,m,p]  = SN[h,m,p] / SD[h,p]
      B[g,m,p]  = sum(h) W[g,h] * A[h,m,p]
      AV[g,f,p] = sum(m) B[g,m,p] * V[g,f,m]`,
      3,
    ],
    [
      'Nystrom',
      `GA[p] = max(l) FA[p,l]\nEA[p,l] = exp(FA[p,l] - GA[p])\nDA[p] = sum(l) EA[p,l]
      FB[l,m] = sum(e) QL[l,e] * K[m,e]\nGB[l] = max(m) FB[l,m]\nEB[l,m] = exp(FB[l,m] - GB[l])
      DB[l] = sum(m) EB[l,m]\nWV[l,f] = sum(m) EB[l,m] * V[m,f]\nX[l,f] = WV[l,f] / DB[l]
      Y[p,f] = sum(l) EA[p,l] * X[l,f]\nO[p,f] = Y[p,f] / DA[p]`,
      2,
    ],
    [
      'Performer',
      `KV[e,f] = sum(m) PK[e,m] * V[f,m]\nKS[e] = sum(m) PK[e,m]
      N[f,p] = sum(e) PQ[e,p] * KV[e,f]\nD[p] = sum(e) PQ[e,p] * KS[e]\nAV[f,p] = N[f,p] / D[p]`,
      1,
    ],
    [
      'a selective state space',
      `init H[m=0,d,n] = 0
      iterate m {
        G[m,d]     = softplus(X[m,d])
        H[m+1,d,n] = exp(min(G[m,d] * A[d,n], 0)) * H[m,d,n] + G[m,d] * B[m,n] * X[m,d]
        Y[m,d]     = sum(n) C[m,n] * H[m+1,d,n]
      }`,
      1,
    ],
  ] as const)('%s', (_, text, passes) => {
    expect(passesOf(text, 'M').headline).toBe(passes)
  })

  it('two layers read the first one twice, as keys and as queries', () => {
    const text = `
      X[f,p]  = sum(m) A[m,p] * V[f,m]
      Y[e,m]  = sum(f) W[e,f] * X[f,m]
      Z[m,p]  = sum(e) Y[e,m] * X[e,p]`
    expect(passesOf(text, 'P').perTensor.X).toBe(2)
  })

  it('says why', () => {
    expect(passesOf(threePass, 'M').why).toEqual([
      { from: 'QK read by GM', via: 'GM complete only after all m', to: 'SN reads QK again' },
      { from: 'SN read by SD', via: 'SD complete only after all m', to: 'A reads SN again' },
    ])
    expect(passesOf(localMax, 'M').why).toEqual([
      { from: 'BQK read by LM', via: 'GM complete only after all m1', to: 'A reads SLN again' },
    ])
  })

  it('counts the levels of a rank that an index takes apart without a split', () => {
    const text = `
      LM[a,p] = max(b) X[a*B + b, p]
      GM[p]   = max(a) LM[a,p]
      Y[a,b,p] = X[a*B + b, p] - GM[p]`
    const { passes } = cascade(text).analyze({ sizes: { A: 4, B: 8 } })
    expect(passes.AB).toMatchObject({ headline: 2, perLevel: { a: 2, b: 2 } })
  })

  it('lists windows as a rank of their own where they are swept again', () => {
    const text = `
      C[u,e] = sum(r) K[u*4 + r, e] * w[r]
      A[p,u] = sum(e) Q[p,e] * C[u,e]   where u*4 + 7 <= p
      N[p,u] = exp(A[p,u])
      D[p]   = sum(u) N[p,u]
      O[p,f] = sum(u) N[p,u] * V[u,f] / D[p]`
    const { passes, suggestions } = cascade(text).analyze()
    expect(passes.UR!.headline).toBe(1)
    expect(passes.U!.perTensor).toMatchObject({ C: 2, A: 2, N: 2, V: 1 })
    expect(suggestions[0]!.effect).toContain('U: 2 -> 1 passes')
    const deferred = cascade(suggestions[0]!.rewritten).analyze()
    expect(deferred.passes.U).toBeUndefined()
  })

  it('an index of a split rank may be written in any order', () => {
    const bytes = ['u*4 + r', '4*u + r', 'r + u*4', 'r + 4*u'].map((index) => {
      const text = `
        C[u,e] = sum(r) K[${index},e] * w[r]
        A[p,u] = sum(e) Q[p,e] * C[u,e]   where u*4 + 7 <= p
        N[p,u] = exp(A[p,u])
        D[p]   = sum(u) N[p,u]
        O[p,f] = sum(u) N[p,u] * V[u,f] / D[p]`
      return cascade(text).analyze({ sizes: { P: 64, E: 16, F: 16, U: 256, R: 4 } }).bytes
    })
    for (const one of bytes) expect(one).toEqual(bytes[0])
    expect(bytes[0]!.asWritten).toBe(bytes[0]!.minimal)
  })

  it('a sum over a prefix is told, and is no barrier', () => {
    const { passes, warnings } = cascade(
      'S[i] = sum(k) A[k] where k <= i\nZ[k] = A[k] * S[k]',
    ).analyze()
    expect(passes.K!.perTensor.A).toBe(1)
    expect(warnings).toEqual([
      {
        code: 'CAS031',
        message:
          'S reads a prefix again for each of its elements, O(K) traversals; rewrite k as an iterative rank',
        span: [1, 1, 4],
      },
    ])
    expect(cascade('S[p] = sum(m) N[m,p] where m <= p').analyze().warnings).toEqual([])
    // whatever else bounds it
    for (const bound of ['j > m', 'j > m && j < p', 'j < p && m < j']) {
      const stick = cascade(`
        Z[p,m] = sum(e) Q[p,e] * K[m,e]          where m < p
        L[p,m] = sum(j) -softplus(Z[p,j])        where ${bound}
        A[p,m] = exp(Z[p,m] - softplus(Z[p,m]) + L[p,m])
        O[p,f] = sum(m) A[p,m] * V[m,f]`).analyze()
      expect(stick.passes.M!.headline).toBe(1)
      expect(stick.warnings.map(({ code }) => code)).toEqual(['CAS031'])
    }
    // of what is made on the way too, but not where all of it is needed
    const passesOf = (text: string) => cascade(text).analyze().passes.M!.headline
    const sum = 'B[m] = X[m] * 2\nC[m] = sum(u) B[u] where u <= m\n'
    expect(passesOf(`${sum}Y[m] = C[m] * X[m]`)).toBe(1)
    expect(passesOf(`${sum}F[m] = exp(C[m])\nY[m] = sum(u) F[u] * X[u] where u <= m`)).toBe(1)
    expect(passesOf(`${sum}D = sum(m) C[m]\nY[m] = C[m] / D`)).toBe(2)
  })
})

describe('costs', () => {
  const [E, F, M, P, b, P0, M0] = [128, 128, 8192, 8192, 2, 128, 128]
  const sizes = { E, F, M, P }
  const io = b * (E * P + E * M + F * M + F * P)

  it('traffic: inputs and outputs once, and what crosses a sweep written and read', () => {
    expect(cascade(onePass).analyze({ sizes }).bytes).toEqual({ minimal: io, asWritten: io })
    expect(cascade(twoPass).analyze({ sizes }).bytes).toEqual({
      minimal: io,
      asWritten: io + 2 * M * P * b + 2 * P * b,
    })
    expect(cascade(threePass).analyze({ sizes }).bytes).toEqual({
      minimal: io,
      asWritten: io + 4 * M * P * b + 4 * P * b,
    })
  })

  it('traffic of BERT at 1024 tokens, and inputs that are traversed twice', () => {
    const heads = twoPass.replace(/\b([A-Z]+)\[/g, '$1[b,h,').replace(/\[b,h,\]/g, '[b,h]')
    const { bytes } = cascade(heads).analyze({
      sizes: { B: 64, H: 12, E: 64, F: 64, M: 1024, P: 1024 },
    })
    expect(bytes.minimal).toBe(402_653_184)
    const c1 = cascade('Y = A[k] * B[k]\nZ = sum(k) Y * A[k]').analyze({
      sizes: { K: 1000 },
      dtype: 'float32',
    })
    expect(c1.bytes).toEqual({ minimal: 8004, asWritten: 12_012 })
  })

  it('what stays on chip', () => {
    const footprint = (text: string) => cascade(text).analyze({ sizes }).footprint
    const statistics = 2 * P0 * 4
    expect(footprint(threePass)).toBe(M * P0 * b + M0 * P0 * b + statistics)
    expect(footprint(twoPass)).toBe(M * P0 * b + M0 * P0 * b + F * P0 * 4 + statistics)
    expect(footprint(localMax)).toBe(M * P0 * b + (2 * M * P0 * b) / M0 + M0 * P0 * b + statistics)
    expect(footprint(onePass)).toBe(M0 * P0 * b + (F + 2) * P0 * 4)
    const { live } = cascade(localMax).analyze({ sizes })
    const of = (tensor: string) => live.find((one) => one.tensor === tensor)
    expect(of('SLN')).toEqual({
      tensor: 'SLN',
      bytes: M * P0 * b,
      formula: 'M*P0*2',
      reason: 'whole fiber',
    })
    expect(of('LM')).toMatchObject({ formula: 'M1*P0*2', reason: 'whole fiber' })
    expect(of('BQK')).toMatchObject({ formula: 'M0*P0*2', reason: 'tile' })
    expect(cascade(onePass).analyze({ sizes }).live).toContainEqual({
      tensor: 'RNV',
      bytes: F * P0 * 4,
      formula: 'F*P0*4',
      reason: 'state',
    })
  })

  it('the 1-pass state does not grow with the keys', () => {
    const at = (m: number) => cascade(onePass).analyze({ sizes: { ...sizes, M: m } }).footprint
    expect(at(1 << 20)).toBe(at(1024))
  })

  it('operations by unit', () => {
    const { flops } = cascade(threePass).analyze({ sizes })
    const row = (einsum: string) => flops.find((one) => one.einsum === einsum)
    const points = M * P
    expect(row('QK')).toEqual({
      einsum: 'QK',
      mulAdd: 2 * E * points,
      exp: 0,
      other: 0,
      unit: 'tensor',
    })
    expect(row('SN')).toEqual({
      einsum: 'SN',
      mulAdd: points,
      exp: points,
      other: 0,
      unit: 'vector',
    })
    expect(row('A')).toMatchObject({ other: points, mulAdd: 0 })
    expect(row('AV')).toMatchObject({ mulAdd: 2 * F * points, unit: 'tensor' })
    const deferred = cascade(twoPass).analyze({ sizes }).flops
    expect(deferred.find(({ einsum }) => einsum === 'AV')).toMatchObject({
      other: F * P,
      mulAdd: 0,
    })
    const delta = cascade('D[p] = sum(f) dO[f,p] * O[f,p]').analyze({ sizes: { F, P } }).flops
    expect(delta).toEqual([{ einsum: 'D', mulAdd: 2 * F * P, exp: 0, other: 0, unit: 'vector' }])
  })

  it('folds sizes into an operand, and takes a sum of products times a tensor for a matrix product', () => {
    const { flops } = cascade(`
      S[p,m] = sum(e) Q[p,e] * K[m,e] / sqrt(E)
      O[p,f] = sum(m) (S[p,m] - 0.5 * R[p,m]) * V[m,f]`).analyze({
      sizes: { P: 7, M: 5, E: 3, F: 2 },
    })
    const none = { exp: 0, other: 0, unit: 'tensor' }
    expect(flops).toEqual([
      { einsum: 'S', mulAdd: 2 * 7 * 5 * 3, ...none },
      { einsum: 'O', mulAdd: 2 * 7 * 5 * 2 + 2 * 7 * 5, ...none },
    ])
  })

  it('a running maximum costs one more maximum, one more exp and 2F + 2 for each tile of a row', () => {
    const sum = (text: string, unit: 'mulAdd' | 'exp' | 'other') =>
      cascade(text)
        .analyze({ sizes })
        .flops.reduce((total, one) => total + one[unit], 0)
    const tiles = (M / M0) * P
    expect(sum(onePass, 'exp') - sum(twoPass, 'exp')).toBe(tiles)
    expect(sum(onePass, 'other') - sum(twoPass, 'other')).toBe(tiles)
    // 2F + 2 and the subtraction inside the exponential
    expect(sum(onePass, 'mulAdd') - sum(twoPass, 'mulAdd')).toBe((2 * F + 3) * tiles)
  })

  it.each([
    [64, 1.0, 2.0],
    [128, 0.5, 1.0],
    [256, 0.25, 0.5],
  ])('exponentials against matrix products at head size %d', (D, half, quarter) => {
    const tile = { E: D, F: D, M: 128, P: 128 }
    const ratio = (dtype: 'bfloat16' | 'float8_e4m3fn') => {
      const { times } = cascade(twoPass).analyze({ sizes: tile, dtype, machine: 'h200' })
      return times.exp / times.tensor
    }
    expect(ratio('bfloat16')).toBeCloseTo(half, 12)
    expect(ratio('float8_e4m3fn')).toBeCloseTo(quarter, 12)
    const { times } = cascade(twoPass).analyze({ sizes: tile })
    expect(times.tensor * 132 * 1830).toBeCloseTo(16 * D, 6)
    expect(times.exp * 132 * 1830).toBeCloseTo(1024, 6)
  })

  it('the bound, on every machine', () => {
    const at = (machine: 'h200' | 'h100' | 'a100' | 'cpu', p: number) =>
      cascade(twoPass).analyze({ sizes: { ...sizes, P: p }, machine })
    expect(at('h200', P).bound).toBe('tensor')
    expect(at('h200', P).timeLowerBoundUs).toBeCloseTo((4 * 128 * M * P) / (132 * 1830 * 4096), 6)
    expect(at('h100', 1).bound).toBe('memory')
    expect(at('h100', 1).timeLowerBoundUs / at('h200', 1).timeLowerBoundUs).toBeCloseTo(
      4.8 / 3.35,
      10,
    )
    expect(at('a100', P).timeLowerBoundUs).toBeGreaterThan(at('h100', P).timeLowerBoundUs)
    expect(at('cpu', P).timeLowerBoundUs).toBeGreaterThan(at('a100', P).timeLowerBoundUs)
    expect(at('cpu', P).times).toEqual(at('cpu', P).times)
  })

  it('counts what a mask leaves', () => {
    const text = twoPass.replace('* scale', '* scale where m <= p + off')
    const whole = cascade(text).analyze({ sizes: { ...sizes, M: 512, P: 512 } })
    const causal = cascade(text).analyze({
      sizes: { ...sizes, M: 512, P: 512 },
      scalars: { off: 0 },
    })
    const share = 513 / 1024
    expect(causal.flops[0]!.mulAdd).toBeCloseTo(whole.flops[0]!.mulAdd * share, 3)
    expect(causal.flops.find(({ einsum }) => einsum === 'SNV')!.mulAdd).toBeCloseTo(
      2 * F * 512 * 512 * share,
      3,
    )
  })

  it('which einsums share a loop', () => {
    const groups = (text: string, more = {}) =>
      cascade(text).analyze({ sizes: { ...sizes, ...more } }).fusionGroups
    expect(groups(threePass)).toEqual([
      ['QK', 'GM'],
      ['SN', 'SD'],
      ['A', 'AV'],
    ])
    expect(groups(twoPass)).toEqual([
      ['QK', 'GM'],
      ['SN', 'SD', 'SNV', 'AV'],
    ])
    expect(groups(onePass)).toHaveLength(1)
    expect(groups('KV[e,f] = K[e,m] * V[f,m]\nAV[f,p] = Q[e,p] * KV[e,f]')).toEqual([
      ['KV'],
      ['AV'],
    ])
    expect(groups(`K[e,m] = sum(d) W[e,d] * X[d,m]\n${threePass}`, { D: 4096 })[0]).toEqual(['K'])
  })

  it('without sizes tells what the text alone tells', () => {
    const analysis = cascade(threePass).analyze()
    expect(analysis.passes.M!.headline).toBe(3)
    expect(analysis.bytes.minimal).toBeNaN()
    expect(analysis.bound).toBeUndefined()
    expect(analysis.live[0]!.formula).toBe('M*P0*2')
  })

  it('warns of an exponential that nothing shifts', () => {
    const warnings = (text: string) =>
      cascade(text)
        .analyze()
        .warnings.map(({ code }) => code)
    const { warnings: found } = cascade('A[m,p] = exp(QK[m,p]) * V[m]').analyze()
    expect(found).toEqual([
      {
        code: 'CAS030',
        message: 'A takes exp of a score that nothing shifts; subtract its maximum first',
        span: [1, 10, 3],
      },
    ])
    expect(warnings(threePass)).toEqual([])
    expect(warnings('A[m] = exp(-slope * X[m])')).toEqual(['CAS030'])
    expect(warnings('A[m] = exp(-slope) * X[m]')).toEqual([])
    expect(warnings('A[m] = exp(min(X[m], 0))')).toEqual([])
    expect(warnings('A[m] = if(X[m] > 0, X[m] + 1, exp(X[m]))')).toEqual([])
    expect(warnings('A[m] = if(X[m] > 0, exp(X[m]), X[m] + 1)')).toEqual(['CAS030'])
    expect(warnings(onePass)).toEqual([])
    for (const text of Object.values(definitions)) {
      const { suggestions } = cascade(text).analyze()
      for (const one of [text, ...suggestions.map(({ rewritten }) => rewritten)])
        expect(warnings(one), one).not.toContain('CAS030')
    }
    const S = 'S[p,m] = sum(e) Q[p,e] * K[m,e]\n'
    const G = `${S}G[p] = max(m) S[p,m]\n`
    for (const shifted of [
      `${G}A[p,m] = exp(S[p,m] - G[p])`,
      `${G}A[p,m] = exp(-G[p] + S[p,m])`,
      `${G}A[p,m] = exp((S[p,m] - G[p]) / tau)`,
      `${G}X[p,m] = S[p,m] - G[p]\nA[p,m] = exp(X[p,m])`,
      `${G}H[p] = max(G[p], sink)\nA[p,m] = exp(S[p,m] - H[p])\nB[p] = exp(sink - H[p])`,
      `${S}L[p] = logsumexp(m) S[p,m]\nA[p,m] = exp(S[p,m] - L[p])`,
      `${S}T[p,m] = S[p,m] + B[p,m]\nG[p] = max(m) T[p,m]\nA[p,m] = exp(S[p,m] + B[p,m] - G[p])`,
      `${S}A[p,m] = exp(S[p,m] - L[p])`,
      `${S}A[p,m] = exp(-softplus(S[p,m]))`,
      `${S}L[p,m] = sum(j) -softplus(S[p,j]) where j > m\nA[p,m] = exp(S[p,m] - softplus(S[p,m]) + L[p,m])`,
      'A[t,u] = exp(C[t] - C[u])',
      'A[t] = exp(-rate[t])',
    ])
      expect(warnings(shifted), shifted).not.toContain('CAS030')
    for (const running of [
      `${S}A[p,m] = exp(S[p,m] - slope * (p - m))`,
      `${S}A[p,m] = exp(S[p,m] - B[p,m])`,
      `${S}A[p,m] = exp(S[p,m] - 1)`,
      `${S}A[p,m] = exp(-S[p,m])`,
      `${S}G[p] = max(m) B[p,m]\nA[p,m] = exp(S[p,m] - G[p])`,
      `${G}A[p,m] = exp(G[p] - S[p,m])`,
      `${S}G[p] = min(m) S[p,m]\nA[p,m] = exp(S[p,m] - G[p])`,
    ])
      expect(warnings(running), running).toContain('CAS030')
  })
})

describe('refusals', () => {
  it.each([
    [
      { sizes: { M: -1 } },
      'ERR_ARGUMENT',
      'cascade: sizes.M must be an integer at least 0, got -1',
    ],
    [
      { machine: 'h900' },
      'ERR_ARGUMENT',
      'cascade: machine must be one of h200, h100, a100, cpu, got "h900"',
    ],
    [
      { machine: { name: 'x' } },
      'ERR_ARGUMENT',
      'cascade: machine.cores must be a positive number, got undefined',
    ],
    [
      { dtype: 'float31' },
      'ERR_ARGUMENT',
      'cascade: dtype must be one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int32, int64, uint8, bool, got "float31"',
    ],
    [{ size: {} }, 'ERR_ARGUMENT', 'cascade: unknown option "size"; did you mean "sizes"?'],
    [
      { dtypes: { doc: 'float32' } },
      'CAS010',
      'cascade: masks must be decidable from indices and integer tensors',
    ],
    [
      { dtypes: { docs: 'int32' } },
      'ERR_ARGUMENT',
      'cascade: unknown tensor "docs"; did you mean "doc"?',
    ],
    [{ sizes: { M: 1000 } }, 'CAS008', 'cascade: split m by 128 with M=1000: add "tail mask"'],
  ])('%j', (options, code, message) => {
    const text = 'split m -> (m1, m0 : 128)\nY[m1] = sum(m0) X[m1*M0 + m0] where doc[m1] == 0'
    const error = thrown(() => cascade(text).analyze(options as never))
    expect(error.code).toBe(code)
    expect(error.message).toBe(message)
  })

  it('takes a machine that the caller describes', () => {
    const machine: Machine = {
      name: 'bench',
      cores: 1,
      clock: 1,
      tensor: { bfloat16: 1, float32: 1 },
      exp: 1,
      lanes: 1,
      memory: 1e6,
      onChip: 1,
      cache: 1,
      tile: 16,
    }
    const { machine: name, times } = cascade('Y = sum(k) A[k]').analyze({
      sizes: { K: 10 },
      machine,
    })
    expect(name).toBe('bench')
    expect(times.memory).toBe(22)
  })
})
