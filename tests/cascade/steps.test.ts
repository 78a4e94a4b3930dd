import {
  cascade,
  type DenseArray,
  definitions,
  full,
  type HeddleError,
  scope,
  type Tensor,
  tensor,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { productOf } from '../../dist/cascade/product.js'
import { run } from '../../dist/native.js'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random } from '../support/random.js'

// Texts that no operator takes, with the axes of their inputs: ranks, or `ids < R` for indices of one
const texts: Record<string, { text: string; inputs: Record<string, string>; scalars?: object }> = {
  'the sum of squared weights as divisor': {
    text: `
      S[p,m] = sum(e) Q[p,e] * K[m,e] * scale   where m <= p + off
      G[p]   = max(m) S[p,m]
      N[p,m] = exp(S[p,m] - G[p])
      D[p]   = sum(m) N[p,m] * N[p,m]
      O[p,f] = sum(m) N[p,m] * V[m,f] / D[p]`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F' },
    scalars: { scale: 0.4, off: -2 },
  },
  'a running maximum over a split rank, of another divisor': {
    text: `
      split m -> (m1, m0 : 4) tail mask
      init RM[m1=0,p] = -inf;   init RD[m1=0,p] = 0;   init RNV[f,m1=0,p] = 0
      iterate m1 {
        BQK[m1,m0,p]  = sum(e) Q[e,p] * K[e, m1*M0 + m0] * scale   where m1*M0 + m0 <= p + off
        LM[m1,p]      = max(m0) BQK[m1,m0,p]
        RM[m1+1,p]    = max(RM[m1,p], LM[m1,p])
        SLN[m1,m0,p]  = exp(BQK[m1,m0,p] - RM[m1+1,p])
        PRM[m1,p]     = exp(RM[m1,p] - RM[m1+1,p])
        SLD[m1,p]     = sum(m0) SLN[m1,m0,p] * SLN[m1,m0,p]
        SLNV[f,m1,p]  = sum(m0) SLN[m1,m0,p] * V[f, m1*M0 + m0]
        RD[m1+1,p]    = SLD[m1,p] + RD[m1,p] * PRM[m1,p] * PRM[m1,p]
        RNV[f,m1+1,p] = SLNV[f,m1,p] + RNV[f,m1,p] * PRM[m1,p]
      }
      AV[f,p] = RNV[f,M1,p] / sqrt(RD[M1,p])`,
    inputs: { Q: 'E P', K: 'E M', V: 'F M' },
    scalars: { scale: 0.4, off: 0 },
  },
  'the delta rule': {
    text: `
      init S[t=0,e,f] = 0
      iterate t {
        W[t,f]     = sum(e) S[t,e,f] * K[t,e]
        S[t+1,e,f] = S[t,e,f] + sigmoid(beta[t]) * K[t,e] * (V[t,f] - W[t,f])
        O[t,f]     = sum(e) Q[t,e] * S[t+1,e,f]
      }`,
    inputs: { K: 'T E', beta: 'T', V: 'T F', Q: 'T E' },
  },
  'a soft maximum over documents, of shifted keys': {
    text: `
      S[p,m] = sum(e) Q[p,e] * K[m-1,e]                where doc[p] == row[m] && !(m > p + 3) || m == p
      L[p]   = logsumexp(m) S[p,m]
      B[p,m] = exp(S[p,m] - L[p]) * T[clamp(m - p + 3, 0, 6)]
      O[p,f] = sum(m) B[p,m] * V[m,f]`,
    inputs: { Q: 'P E', K: 'M E', V: 'M F', T: '7', doc: 'P < 3', row: 'M < 3' },
  },
  'what is looked up, chosen and multiplied': {
    text: `
      X[n,d] = Table[ids[n],d] * if(Table[ids[n],d] > 0 || n < 2, 2, -1/D)
      Y[n]   = prod(d) X[n,d]
      Z[d]   = min(n) X[n,d] + erf(A[d]) - abs(A[d]) + max(A[d], Y[N])
      R[d]   = Z[D - 1 - d] + cos(A[d]) * sin(A[d])
      C      = sum(d) R[d] * D
      U[d]   = if(d == 1, C, rsqrt(C * C + 1) + sqrt(abs(R[d])))   where d != 3`,
    inputs: { Table: 'V D', ids: 'N < V', A: 'D' },
  },
  'reducers of nothing': {
    text: `
      M[p] = max(m) X[m]                where m < p - 1
      L[p] = logsumexp(m) X[m]          where m < p - 1
      N[p] = min(m) X[m]                where m < p - 1
      Y[p] = exp(M[p] - M[p]) + log1p(relu(X[p])) + exp2(tanh(X[p])) + softplus(X[p])
      Z[p] = Y[p] / (N[p] - N[p+1])     where p > 1
      W[p] = pow(abs(X[p]), 1.5) * L[p]`,
    inputs: { X: 'M' },
  },
  ...Object.fromEntries(
    // A second result of its own keeps operators away from what they take
    Object.entries({
      attention: { Q: 'P E', K: 'M E', V: 'M F' },
      'attention.backward': { Q: 'P E', K: 'M E', LSE: 'P', DO: 'P F', V: 'M F', O: 'P F' },
      lightning: { S0: 'E F', K: 'T E', V: 'T F', Q: 'T E' },
      merge: { LA: 'P', LB: 'P', A: 'P F', B: 'P F' },
      norm: { X: 'N D', W: 'D' },
      keep: { S: 'R C' },
      // of one element all cosines may be equal, and nothing but rounding is left of such shares
      softplus: { Q: 'P 5', K: 'M 5', V: 'M F' },
    }).map(([name, inputs]) => [
      name,
      {
        text: `${definitions[name as keyof typeof definitions]}
          Other = sum(x9) X9[x9] * X9[x9] * X9[x9]`,
        inputs: { ...inputs, X9: 'X9' },
        scalars: { scale: 0.3, off: 1, slope: 0.2, eps: 1e-3, top: 2, logD: 1.5, power: 3 },
      },
    ]),
  ),
}

interface Given {
  inputs: Record<string, DenseArray>
  tensors: Record<string, Tensor>
}

function draw(rng: Random, axes: Record<string, string>, device: 'cpu' | `cuda:${number}`): Given {
  const sizes = new Map<string, number>()
  const size = (rank: string) => {
    if (/^\d/.test(rank)) return Number(rank)
    if (!sizes.has(rank)) sizes.set(rank, 1 + rng.below(rng.pick([3, 9, 30])))
    return sizes.get(rank)!
  }
  // Rows that are rows of each other
  for (const [a, b] of [
    ['P', 'M'],
    ['M1', 'M'],
  ] as const)
    sizes.set(a, size(b))
  const given: Given = { inputs: {}, tensors: {} }
  for (const [name, text] of Object.entries(axes)) {
    const [ranks, below] = text.split(' < ') as [string, string?]
    const shape = ranks.split(' ').map(size)
    const n = shape.reduce((a, b) => a * b, 1)
    const data = below
      ? Int32Array.from({ length: n }, () => rng.below(size(below)))
      : rng.normals(n)
    given.inputs[name] = { data, shape }
    given.tensors[name] = tensor(data, shape, { device })
  }
  return given
}

describeDevices('statement by statement', (device) => {
  const rng = random(91)

  it.each(Object.entries(texts))('runs %s', async (_, { text, inputs: axes, scalars = {} }) => {
    const parsed = cascade(text)
    const plan = parsed.compile({ fused: 'preferred' })
    expect(plan.explain().operator).toBe('einsum')
    for (let n = 0; n < 6; n++) {
      const { inputs, tensors } = draw(rng, axes, device)
      const numbers = Object.fromEntries(
        Object.entries(scalars).filter(([name]) => parsed.ir.scalars.includes(name)),
      )
      const expected = parsed.evaluate(inputs, numbers)
      const results = plan(...parsed.ir.inputs.map((name) => tensors[name]!), numbers)
      expect(Object.keys(results).sort()).toEqual(Object.keys(expected).sort())
      for (const [name, { data, shape }] of Object.entries(expected)) {
        const result = results[name]!
        expect(result.shape, name).toEqual([...shape])
        const finite = data.filter((x) => Number.isFinite(x))
        expect(maxError((await result.read()) as Float32Array, data), name).toBeLessThanOrEqual(
          5e-5 * Math.max(1, largest(finite)),
        )
      }
    }
  })

  // As large as these, they are those of `linear`
  it('multiplies matrices', async () => {
    const text = `
      S[h,p,m] = sum(e) Q[p,h,e] * K[e,m,h] * 2 * scale
      G[h,p,m] = tanh(S[h,p,m])                           where m <= p + 30
      O[p,h,f] = sum(m) S[h,p,m] * V[m,f]
      U[p,h,f] = sum(m) G[h,p,m] * V[m,f]
      L[h,p]   = sum(m) S[h,p,m] * S[h,p,m]`
    const parsed = cascade(text)
    const [h, p, m, e, f] = [3, 70, 90, 24, 20]
    const shapes = { Q: [p, h, e], K: [e, m, h], V: [m, f] }
    const inputs = Object.fromEntries(
      Object.entries(shapes).map(([name, shape]) => [
        name,
        { shape, data: rng.normals(shape.reduce((a, b) => a * b, 1)) },
      ]),
    )
    const expected = parsed.evaluate(inputs, { scale: 0.2 })
    const plan = parsed.compile({ fused: 'preferred' })
    const tensors = Object.values(inputs).map(({ data, shape }) => tensor(data, shape, { device }))
    const results = plan(...tensors, { scale: 0.2 })
    for (const [name, { data }] of Object.entries(expected))
      expect(
        maxError((await results[name]!.read()) as Float32Array, data),
        name,
      ).toBeLessThanOrEqual(5e-6 * largest(data))
    const products = parsed.ir.steps.map((step) => ('body' in step ? undefined : productOf(step)))
    expect(products.map((one) => one && [one.batch, one.rows, one.columns, one.over])).toEqual([
      [['h'], ['p'], ['m'], ['e']],
      undefined,
      [[], ['h', 'p'], ['f'], ['m']],
      [[], ['h', 'p'], ['f'], ['m']],
      undefined,
    ])
  })

  it('touches nothing but its memory, whatever the program', async () => {
    // Y[i] = sum(j) A[i,j], A being 3 x 2, and Y behind it
    const header = [1, 2, 1, 1, 0, 0, 10, 18, 3, 2]
    const body = [3, 0, 2, 0, 2, 1, 1, 0]
    const whole = [...header, ...body, 1, 0x4018n << 48n, 2, 0, 8, 0].map(BigInt)
    const odd = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 20, -1, 40, 2 ** 40]
    let refused = 0
    for (let n = 0; n < 500; n++) {
      const program = BigInt64Array.from(whole)
      for (let changes = rng.below(3); changes >= 0 && n > 0; changes--)
        program[rng.below(program.length)] = BigInt(rng.pick(odd))
      await scope(async () => {
        const work = full([9], 1, { device })
        run('einsum', {
          program: tensor(program, [program.length], { device }),
          work,
          start: n > 0 && rng.chance(0.1) ? rng.below(program.length) : 0,
          count: 3,
          step: rng.below(9),
        })
        try {
          const values = (await work.read()) as Float32Array
          if (n === 0) expect([...values]).toEqual([1, 1, 1, 1, 1, 1, 2, 2, 2])
        } catch (error) {
          expect((error as HeddleError).message).toBe('einsum: program must be a statement')
          refused++
        }
      })
    }
    expect(refused).toBeGreaterThan(50)
    expect(refused).toBeLessThan(500)
  })

  // Expressions of everything that the grammar has
  it('runs what chance writes', async () => {
    const leaf = () =>
      rng.pick(['A[i,j]', 'B[j]', 'C', 'x', 'i', 'j', 'I', '0.5', '-inf', 'A[i-1,j]'])
    const test = (depth: number): string => {
      if (depth > 0 && rng.chance(0.4))
        return rng.pick([
          `!(${test(depth - 1)})`,
          `(${test(depth - 1)} && ${test(depth - 1)})`,
          `(${test(depth - 1)} || ${test(depth - 1)})`,
        ])
      const op = rng.pick(['<', '<=', '>', '>=', '==', '!='])
      return `${rng.pick(['i', 'j', 'd[i]'])} ${op} ${rng.pick(['i', 'j + 1', '2', 'I - j'])}`
    }
    const expr = (depth: number): string => {
      if (depth === 0) return leaf()
      const [a, b] = [expr(depth - 1), expr(rng.below(depth))]
      return rng.pick([
        `(${a} ${rng.pick(['+', '-', '*', '/'])} ${b})`,
        `${rng.pick(['max', 'min'])}(${a}, ${b})`,
        `tanh(${rng.pick(['exp', 'exp2', 'log', 'log1p', 'sigmoid', 'relu', 'softplus', 'abs', 'sqrt', 'rsqrt', 'erf', 'sin', 'cos'])}(${a}))`,
        `pow(${a}, 2)`,
        `if(${test(1)}, ${a}, ${b})`,
        `-${a}`,
      ])
    }
    for (let n = 0; n < 300; n++) {
      const mask = () => (rng.chance(0.5) ? `where ${test(2)}` : '')
      const over = rng.pick(['sum', 'max', 'min', 'prod', 'logsumexp'])
      const text = `
        C      = max(i,j) A[i,j] * d[i]
        T[i,j] = tanh(${expr(1 + rng.below(4))} + 0 * (i + j) * A[i,j]) ${mask()}
        R[i]   = ${over}(j) T[i,j] + 0.25 * B[j] ${mask()}
        Y[i,j] = T[i,j] * R[i] + T[${rng.pick(['i+1', 'I - 1 - i', 'clamp(i - 1, 0, 2)', 'd[i]'])},j]`
      const parsed = cascade(text)
      const { inputs, tensors } = draw(rng, { A: 'I J', B: 'J', d: 'I < I' }, device)
      const expected = parsed.evaluate(inputs, { x: 0.7 }).Y!.data
      const plan = parsed.compile({ fused: 'preferred' })
      const scalars = parsed.ir.scalars.includes('x') ? { x: 0.7 } : {}
      const { Y } = plan(...parsed.ir.inputs.map((name) => tensors[name]!), scalars)
      const actual = (await Y!.read()) as Float32Array
      const finite = expected.filter((x) => Number.isFinite(x) && Math.abs(x) < 1e30)
      const allowed = 1e-4 * Math.max(1, largest(finite))
      actual.forEach((x, at) => {
        const wanted = expected[at]!
        if (Math.abs(wanted) > 1e30) return
        expect(
          Math.abs(x - wanted) <= allowed || Object.is(x, wanted),
          `${text}\n${x} ${wanted}`,
        ).toBe(true)
      })
    }
  })
})

describe('statement by statement', () => {
  const text = `
    D[p]   = sum(m) X[p,m] * X[p,m] * X[p,m]
    Y[p,m] = X[p,m] / (D[p] + N)   where some[m] == 1`

  it('is asked for', async () => {
    const all = cascade(text.replace(/where.*/, ''))
    const required = await failure(() => all.compile({ fused: 'required' }))
    expect(required.code).toBe('CAS021')
    const { operator, refusal, refused } = all.compile({ fused: 'preferred' }).explain()
    expect(operator).toBe('einsum')
    expect(refusal).toBe(required.message)
    expect(refused.map((one) => one.operator)).toEqual([
      ...['attention', 'lightning', 'fixed', 'linear'],
    ])
    const other = await failure(() => cascade(text).compile({ fused: 'perhaps' as 'required' }))
    expect(other.message).toBe("cascade: fused must be 'required' or 'preferred', got \"perhaps\"")
    const fused = cascade(definitions.attention)
    expect(fused.compile({ fused: 'preferred' }).explain().operator).toBe('attention')
  })

  it('takes sizes that no input tells, and integers as masks', async () => {
    const plan = cascade(text).compile({ fused: 'preferred' })
    const x = tensor([1, 2, 3, 4], [2, 2])
    const some = tensor([0, 1], [2], { dtype: 'int32' })
    const { Y } = plan(x, some, { N: 1 })
    expect([...((await Y!.read()) as Float32Array)].map((y) => Math.round(y * 1e4) / 1e4)).toEqual([
      0, 0.2, 0, 0.0435,
    ])
    const floats = await failure(() => plan(x, tensor([0, 1], [2]), { N: 1 }))
    expect(floats.code).toBe('CAS010')
    expect(floats.span).toEqual([3, 42, 7])
    const missing = await failure(() => plan(x, some))
    expect(missing.message).toBe('cascade: N is missing')
    const shape = await failure(() => plan(tensor([1, 2], [2]), some, { N: 1 }))
    expect(shape.code).toBe('CAS002')
    const long = cascade(`Y[n] = ${'(X[n] + '.repeat(40)}1${')'.repeat(40)}`)
    const nested = await failure(() => long.compile({ fused: 'preferred' })(tensor([1], [1])))
    expect(nested.message).toBe('cascade: Y is too long for one step; take it apart')
  })
})
