import { cascade, definitions, type Plan, type Tensor, tensor } from 'heddle'
import { describe, expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { thrown } from '../support/failure.js'
import { random } from '../support/random.js'

// Calls of plans against the text in float64, on tensors that are named by their axes, as in 'h p e'

interface Given {
  data: Float32Array<ArrayBuffer>
  shape: number[]
  axes: string[]
  whole?: boolean
}

type Sizes = Readonly<Record<string, number>>

const places = ['b', 'pmtu', 'h', 'efcdr']
const placeOf = (axis: string) => places.findIndex((some) => some.includes(axis[0]!))

// Numbers of [b, s, h, d] in the order of the text, or the other way round
function turned({ data, shape, axes }: Given, back = false): Given {
  const lengths = places.map((_, at) =>
    shape.reduce((size, n, i) => (placeOf(axes[i]!) === at ? size * n : size), 1),
  )
  const moved = new Float32Array(data.length)
  for (let i = 0; i < data.length; i++) {
    const at = [0, 0, 0, 0]
    for (let axis = axes.length - 1, rest = i; axis >= 0; axis--) {
      at[placeOf(axes[axis]!)] = rest % shape[axis]!
      rest = Math.floor(rest / shape[axis]!)
    }
    const to = at.reduce((place, index, axis) => place * lengths[axis]! + index, 0)
    if (back) moved[i] = data[to]!
    else moved[to] = data[i]!
  }
  return { data: moved, shape: lengths, axes }
}

describeDevices('calls of plans', (device) => {
  const rng = random(31)

  // 'n < 5' are whole numbers
  function draw(text: string, sizes: Sizes): Given {
    const [axes, below] = text.split(' < ') as [string, string?]
    const names = axes.split(' ').filter(Boolean)
    const shape = names.map((axis) => sizes[axis] ?? Number(axis))
    const data = rng.normals(shape.reduce((a, b) => a * b, 1))
    if (below !== undefined) data.forEach((_, i) => (data[i] = rng.below(Number(below))))
    return { data, shape, axes: names, whole: below !== undefined }
  }

  const asTensor = ({ data, shape, whole }: Given): Tensor =>
    tensor(data, shape, { device, dtype: whole ? 'int32' : 'float32' })

  function call(plan: Plan, text: string, given: Record<string, Given>, scalars = {}) {
    const { packed } = plan.explain()
    const inputs = cascade(text).ir.inputs.map((name) =>
      asTensor(packed.includes(name) ? turned(given[name]!) : given[name]!),
    )
    return plan(...inputs, scalars)
  }

  async function check(
    text: string,
    axes: Readonly<Record<string, string>>,
    sizes: Sizes,
    scalars: Readonly<Record<string, number>> = {},
    tolerance = 2e-5,
  ): Promise<Plan> {
    const parsed = cascade(text)
    const given = Object.fromEntries(
      parsed.ir.inputs.map((name) => [name, draw(axes[name]!, sizes)]),
    )
    const expected = parsed.evaluate(given, scalars)
    const plan = parsed.compile()
    const results = call(plan, text, given, scalars)
    for (const [name, { data, shape }] of Object.entries(expected)) {
      const made = (await results[name]!.read()) as Float32Array<ArrayBuffer>
      const steps = parsed.ir.steps.flatMap((step) => ('body' in step ? step.body : [step]))
      const out = steps.map((one) => one.out)
      const left = out
        .find((one) => one.name === name)!
        .indices.map((index) => {
          if (index.kind !== 'expr' || index.expr.kind !== 'name') throw new Error('no variable')
          return index.expr.name
        })
      const four = left.length > 1 && results[name]!.rank === 4 && shape.length < 5
      const got = four ? turned({ data: made, shape: [...shape], axes: left }, true).data : made
      const bound = tolerance * Math.max(1, largest(data))
      expect(maxError(got, data), `${name} of ${text}`).toBeLessThanOrEqual(bound)
    }
    return plan
  }

  const score = 'S[p,m] = sum(e) Q[p,e] * K[m,e]'
  const softmax = (scores: string, out = 'O') => `
    G[p]   = max(m) ${scores}[p,m]
    A[p,m] = exp(${scores}[p,m] - G[p])
    D[p]   = sum(m) A[p,m]
    ${out}[p,f] = sum(m) A[p,m] * V[m,f] / D[p]`
  const one = { Q: 'p e', K: 'm e', V: 'm f' }
  const four = { Q: 'b h p e', K: 'b h m e', V: 'b h m f' }
  const sizes = { b: 2, h: 3, p: 5, m: 7, e: 8, f: 8 }

  describe('of names that what is made beside an operator might have', () => {
    it.each(['e_1', 'm_', 'M_', 'e_', 'Y_', 'R2_', 'E1__'])('as the scalar %s', async (s) => {
      const text = `${score}
        R[m]   = sum(e) K[m,e] * K[m,e]
        T[p,m] = S[p,m] - R[m] * ${s}${softmax('T')}`
      await check(text, one, sizes, { [s]: 0.3 })
    })

    it.each(['C', 'SCALE', 'c'])('as the scalar %s, which may be below 0', async (s) => {
      for (const factor of [`sqrt(${s} * ${s})`, `${s} * log(${s} * ${s})`, `relu(1 + ${s})`])
        await check(`${score} * ${factor}${softmax('S')}`, one, sizes, { [s]: -0.5 })
    })

    it.each(['m_', 'm__'])('as the row %s', async (row) => {
      const text = `${score} where abs(p - m) <= 1${softmax('S')}`.replace(/\bp\b/g, row)
      for (const rows of [5, 7])
        await check(text, { ...one, Q: `${row} e` }, { ...sizes, [row]: rows })
    })

    it.each(['N_', 'O0_', 'D_', 'Y_', 'X0'])('as the gate %s', async (gate) => {
      const product = 'S[b,h,p,m] = sum(e) Q[b,h,p,e] * K[b,h,m,e]'
      const axes = { ...four, [gate]: 'b p h f' }
      const attention = `${product}
        A[b,h,p,m] = exp(S[b,h,p,m])
        L[b,h,p]   = sum(m) A[b,h,p,m]
        X[b,h,p,f] = sum(m) A[b,h,p,m] * V[b,h,m,f] / L[b,h,p]
        O[b,p,h,f] = X[b,h,p,f] * sigmoid(${gate}[b,p,h,f])`
      const plan = await check(attention, axes, sizes)
      expect(plan.explain().operator).toBe('attention')
      const lightning = `${product} where m <= p
        X[b,h,p,f] = sum(m) S[b,h,p,m] * V[b,h,m,f]
        O[b,p,h,f] = X[b,h,p,f] * ${gate}[b,p,h,f]`
      const other = await check(lightning, axes, { ...sizes, p: 7 })
      expect(other.explain().operator).toBe('lightning')
    })

    it.each(['Y_', 'R2_', 'R1_'])('as the bias %s', async (bias) => {
      const text = `${score}
        R[m]   = sum(e) K[m,e] * K[m,e]
        T[p,m] = S[p,m] - R[m] * ${bias}[m]${softmax('T')}`
      await check(text, { ...one, [bias]: 'm' }, sizes)
    })

    it('as sums of a norm that are called T0', async () => {
      const text = `
        T0[n]  = sum(d) X[n,d] * X[n,d]
        Y[n,d] = X[n,d] * rsqrt(T0[n] / D + eps) * W[d]`
      const plan = await check(text, { X: '4 8', W: '8' }, {}, { eps: 0.01 })
      expect(plan.explain().operator).toBe('norm')
    })
  })

  describe('of sizes', () => {
    const lengths = 'rank E = 8; rank M = 7\n'
    const divided = score.replace('K[m,e]', 'K[m,e] / sqrt(E)')
    const product = `${score} where m <= p\nO[p,f] = sum(m) S[p,m] * V[m,f]`
    const recurrent = `
      init H[t=0,e,f] = 0
      iterate t {
        H[t+1,e,f] = H[t,e,f] + K[t,e] * V[t,f]
        O[t,f]     = sum(e) Q[t,e] * H[t+1,e,f]
      }`
    const own = { Q: 't e', K: 't e', V: 't f' }
    const split = `split m -> (m1, m0 : 4)
      init BK[m1,m0,e] = K[m1*M0 + m0,e];   init BV[m1,m0,f] = V[m1*M0 + m0,f]
      S[m1,m0,p] = sum(e) Q[p,e] * BK[m1,m0,e]
      A[m1,m0,p] = exp(S[m1,m0,p])
      D[p]       = sum(m1,m0) A[m1,m0,p]
      O[p,f]     = sum(m1,m0) A[m1,m0,p] * BV[m1,m0,f] / D[p]`
    const norm = `
      S[n]   = sum(d) X[n,d] * X[n,d]
      Y[n,d] = X[n,d] * rsqrt(S[n] / D + eps)`
    const matrix = 'Y[n,o] = sum(i) X[n,i] * W[o,i]'
    const [x, w] = [{ X: '4 8' }, { X: '4 8', W: '5 8' }]

    it('computes with those that are declared and met', async () => {
      await check(`${lengths}${divided}${softmax('S')}`, one, sizes)
      await check(`rank T = 7\n${recurrent}`, own, { ...sizes, t: 7 })
      await check(split, one, { ...sizes, m: 8 })
      await check(`rank D = 8\n${norm}`, x, {}, { eps: 0.1 })
      await check(`rank I = 8\n${matrix}`, w, {})
      await check(product, one, { ...sizes, p: 7 })
    })

    it.each<[string, string, Record<string, string>, Sizes]>([
      ['E is 32 from its declaration but 8', `rank E = 32\n${divided}${softmax('S')}`, one, sizes],
      ['M is 6 from its declaration but 7', `rank M = 6\n${score}${softmax('S')}`, one, sizes],
      [
        'E is 8 from Q but 9',
        `${score} * 2${softmax('S')}`,
        { ...one, K: 'm c' },
        { ...sizes, c: 9 },
      ],
      [
        'M is 5 from K but 7',
        `${score} * b[m]${softmax('S')}`,
        { ...one, b: 'm', K: 't e' },
        { ...sizes, t: 5 },
      ],
      ['T is 9 from its declaration', `rank T = 9\n${recurrent}`, own, { ...sizes, t: 7 }],
      ['D is 3 from its declaration but 8', `rank D = 3\n${norm}`, x, {}],
      ['I is 4 from its declaration but 8', `rank I = 4\n${matrix}`, w, {}],
      ['M by 4 with M=7', split, one, sizes],
    ])('refuses as the interpreter does: %s', (part, text, axes, given) => {
      const parsed = cascade(text)
      const scalars = text === `rank D = 3\n${norm}` ? { eps: 0.1 } : {}
      const drawn = Object.fromEntries(
        parsed.ir.inputs.map((name) => [name, draw(axes[name]!, given)]),
      )
      const wanted = thrown(() => parsed.evaluate(drawn, scalars))
      const error = thrown(() => call(parsed.compile(), text, drawn, scalars))
      expect(error.code, error.message).toBe(wanted.code)
      expect(error.message).toContain(part.replace('M by', 'm by'))
      expect(error.span).toEqual(wanted.span)
    })

    it('names those of the text where an operator takes fewer', () => {
      for (const text of [product, product.replace('S[p,m] *', 'S[p,m] * k[m] *')]) {
        const given: Record<string, Given> = { k: draw('m', sizes) }
        for (const [name, axes] of Object.entries(one)) given[name] = draw(axes, sizes)
        const error = thrown(() => call(cascade(text).compile(), text, given))
        expect(error.code).toBe('CAS022')
        expect(error.message).toBe(
          'cascade: lightning has as many queries as keys, but P is 5 and M is 7',
        )
        expect(error.span![0]).toBe(2)
      }
    })
  })

  describe('of texts of operators', () => {
    // with heads, or batches and heads, in front of all axes
    const fronts = ['', 'h', 'b h']
    const withFront = (text: string, front: string) =>
      front === '' ? text : text.replaceAll(/\[(?=\w)/g, `[${front.replace(' ', ',')},`)
    const every = (axes: Readonly<Record<string, string>>, front: string) =>
      Object.fromEntries(Object.entries(axes).map(([name, own]) => [name, `${front} ${own}`]))
    const renamed = (text: string) =>
      text
        .replace(/\b(DO|DQ|DK|DV|[A-Z]+)(?=\[)/g, 'N$1')
        .replace(/\b([pmetuf])\b/g, (_, v: string) => `${v}x`)
        .replaceAll(/\b([EMP])\b/g, '$1X')
    const longer = (axes: Readonly<Record<string, string>>) =>
      Object.fromEntries(
        Object.entries(axes).map(([name, own]) => [
          `N${name}`,
          own.replace(/\b([pmetuf])\b/g, '$1x'),
        ]),
      )

    it.each(fronts)('finds softplusAttention with %j', async (front) => {
      for (const [p, m] of [
        [1, 1],
        [5, 7],
        [7, 7],
        [3, 40],
      ] as const) {
        const scalars = { off: m - p, logD: 1.3, power: 3 }
        const text = withFront(definitions.softplus, front)
        const plan = await check(text, every(one, front), { ...sizes, p, m }, scalars, 1e-4)
        expect(plan.explain().operator).toBe('softplusAttention')
        expect(plan.explain().packed).toEqual(['Q', 'K', 'V'])
      }
      const text = renamed(withFront(definitions.softplus, front))
      const own = { ...sizes, px: 6, mx: 9, ex: 8, fx: 16 }
      const scalars = { off: 3, logD: 2, power: 15 }
      await check(text, longer(every(one, front)), own, scalars, 1e-4)
    })

    it('refuses rows of softplusAttention that end elsewhere', () => {
      const plan = cascade(definitions.softplus).compile()
      const given = Object.fromEntries(
        Object.entries(one).map(([name, axes]) => [name, draw(axes, sizes)]),
      )
      const rest = { logD: 1, power: 3 }
      const error = thrown(() => call(plan, definitions.softplus, given, { ...rest, off: 0 }))
      expect(error.code).toBe('CAS022')
      expect(call(plan, definitions.softplus, given, rest).O!.shape).toEqual([1, 5, 1, 8])
    })

    it.each(fronts)('finds attention.backward with %j', async (front) => {
      const axes = { ...one, LSE: 'p', DO: 'p f', O: 'p f' }
      const text = withFront(definitions['attention.backward'], front)
      const scalars = { scale: 0.4, off: 2 }
      const plan = await check(text, every(axes, front), sizes, scalars)
      expect(plan.explain().operator).toBe('attention.backward')
      // axes of results are those of the operator
      const other = text.replace(/DQ\[(.*)p,e\]/, 'DQ[$1e,p]')
      expect(thrown(() => cascade(other).compile()).code).toBe('CAS021')
    })

    it.each(fronts)('finds lightning.backward with %j', async (front) => {
      const axes = { Q: 't e', K: 'u e', V: 'u f', DO: 't f' }
      const whole = withFront(definitions['lightning.backward'], front)
      const own = { ...sizes, t: 9, u: 9 }
      const scalars = { scale: 0.4, slope: 0.2 }
      const alike = whole.replaceAll(/W\[.*?t,u\]/g, 'W[t,u]')
      const plan = await check(alike, every(axes, front), own, scalars)
      expect(plan.explain().operator).toBe('lightning.backward')
      if (front === '') return
      const apart = whole.replaceAll(/W\[.*?t,u\]/g, 'W[h,t,u]').replace('-slope', '-slope[h]')
      const given = { ...every(axes, front), slope: 'h' }
      const slopes = cascade(apart).compile()
      expect(slopes.explain().operator).toBe('lightning.backward')
      const drawn = Object.fromEntries(
        Object.entries(given).map(([name, text]) => [name, draw(text, own)]),
      )
      drawn.slope!.data.forEach((x, i, all) => (all[i] = Math.abs(x)))
      const expected = cascade(apart).evaluate(drawn, { scale: 0.4 })
      const made = call(slopes, apart, drawn, { scale: 0.4 })
      for (const [name, { data, shape }] of Object.entries(expected)) {
        const values = (await made[name]!.read()) as Float32Array<ArrayBuffer>
        const left = [...front.split(' '), ...axes[name.slice(1) as 'Q'].split(' ')]
        const got = turned({ data: values, shape: [...shape], axes: left }, true).data
        expect(maxError(got, data)).toBeLessThanOrEqual(2e-5 * Math.max(1, largest(data)))
      }
    })

    it.each<[keyof typeof definitions, Record<string, string>, Record<string, number>]>([
      ['rope', { X: 'p 2 c' }, { theta: 100 }],
      ['embed', { T: '5 d', ids: '7 < 5' }, {}],
      ['add', { X: '6 8', Z: '8' }, {}],
      ['mul', { X: '6 8', Z: '8' }, {}],
    ])('finds %s', async (name, axes, scalars) => {
      const plan = await check(definitions[name], axes, { p: 6, c: 5, d: 8 }, scalars)
      expect(plan.explain().operator).toBe(name)
    })
  })

  // Spellings of each function, of a score x; what differs by more than rounding is no spelling
  const spellings: Record<string, readonly string[]> = {
    'sigmoid false 1': [
      'sigmoid(x)',
      '1 / (1 + exp(-x))',
      'pow(exp(-x) + 1, -1)',
      'exp(x) / (1 + exp(x))',
      '1 - sigmoid(-x)',
      '1 - 1 / (1 + exp(x))',
      '(1 + tanh(x / 2)) / 2',
      '0.5 - 0.5 * tanh(-x / 2)',
      'exp(-softplus(-x))',
      'exp(x - softplus(x))',
    ],
    'softplus true 1': [
      'softplus(x)',
      'log(1 + exp(x))',
      'log1p(exp(x))',
      'max(x, 0) + log1p(exp(-abs(x)))',
      'relu(x) + log(1 + exp(-abs(-x)))',
      'x + softplus(-x)',
    ],
    'relu false 1': [
      'relu(x)',
      'max(0, x)',
      'if(x > 0, x, 0)',
      'if(x <= 0, 0, x)',
      '(x + abs(x)) / 2',
      '0.5 * abs(-x) + x / 2',
      'x * if(x > 0, 1, 0)',
      'if(x < 0, 0, 1) * x',
      '-min(-x, 0)',
    ],
    'relu false 2': [
      'relu(x) * relu(x)',
      'pow(max(x, 0), 2)',
      'relu(x) * x',
      'x * relu(x)',
      'if(x > 0, x * x, 0)',
      'if(x > 0, 1, 0) * x * x',
    ],
    'relu false 3': ['pow(relu(x), 3)', 'relu(x) * x * x', 'if(x >= 0, pow(x, 3), 0)'],
    'relu false n': ['pow(relu(x), n)', 'pow((x + abs(x)) / 2, n)'],
  }
  const spelled = Object.entries(spellings).flatMap(([slots, all]) =>
    all.map((x) => [x, ...slots.split(' ')] as [string, string, string, string]),
  )

  it.each(spelled)('takes weights %s as %s', async (x, weights, normalise, power) => {
    const scalars: Record<string, number> = power === 'n' ? { n: 3 } : {}
    // of a score of one summand and of several, masked and not
    for (const s of ['S[p,m]', '(0.5 * S[p,m] + B[p,m])']) {
      const where = s === 'S[p,m]' ? '' : 'where m <= p + 2'
      const text = `${score} ${where}
        A[p,m] = ${x.replaceAll(/\bx\b/g, s)} ${where}
        D[p]   = sum(m) A[p,m]
        O[p,f] = sum(m) A[p,m] * V[m,f] / D[p]`
      const whole = normalise === 'true' ? text : text.replace(/\n *D.*/, '').replace(' / D[p]', '')
      const plan = await check(whole, { ...one, B: 'p m' }, sizes, scalars)
      const { operator, slots } = plan.explain()
      expect([operator, slots.weights, slots.normalise]).toEqual(['attention', weights, normalise])
      expect(slots.power ?? '1').toBe(power)
    }
  })

  it('refuses powers that attention has not', () => {
    const text = `${score}\nO[p,f] = sum(m) pow(relu(S[p,m]), n) * V[m,f]`
    const given = Object.fromEntries(
      Object.entries(one).map(([name, axes]) => [name, draw(axes, sizes)]),
    )
    const plan = cascade(text).compile()
    for (const n of [1.5, 0, 9]) {
      const error = thrown(() => call(plan, text, given, { n }))
      expect(error.code).toBe('CAS022')
      expect(error.message).toBe(
        `cascade: attention has powers from 1 to 8 of its weights, whole numbers, but n is ${n}`,
      )
    }
  })

  it('names places of the text that was compiled, not of one that reads the same', () => {
    const text = `${score}   where m <= p + off && m > p + off - w${softmax('S')}`
    const own = cascade(text)
    const moved = cascade(`# a comment\n\n\n  ${text.replaceAll('\n', '\n  ')}`)
    const other = cascade(text.replace('S[p,m] = sum', 'S[p,m]    = sum'))
    expect(moved.toString()).toBe(own.toString())
    const given = Object.fromEntries(
      Object.entries(one).map(([name, axes]) => [name, draw(axes, sizes)]),
    )
    for (const parsed of [own, moved, other]) {
      const plan = parsed.compile()
      expect(plan.explain().analysis).toEqual(parsed.analyze())
      const error = thrown(() => call(plan, text, given, { w: 1.5 }))
      expect(error.code).toBe('CAS022')
      expect(error.span).toEqual(
        parsed.ir.steps.flatMap((x) => ('out' in x ? [x.out] : [])).at(-1)!.span,
      )
      const wide = { ...given, K: draw('m c', { ...sizes, c: 9 }) }
      const wanted = thrown(() => parsed.evaluate(wide, { off: 2, w: 2 }))
      expect(thrown(() => call(plan, text, wide, { w: 2 })).span).toEqual(wanted.span)
    }
    // the same text has the same plan
    expect(cascade(text).compile()).toBe(own.compile())
  })

  it('takes powers of sums that are not multiplied out', async () => {
    const sum = '(a[m] + b[p] + c[m] + d[p] + r[m])'
    for (const bias of [
      `pow(${sum}, 3) / 50`,
      `pow(${sum}, 4) / 500`,
      `${sum} * pow(${sum}, 3) / 500`,
    ]) {
      const text = `${score}\nT[p,m] = S[p,m] + ${bias}${softmax('T')}`
      await check(text, { ...one, a: 'm', b: 'p', c: 'm', d: 'p', r: 'm' }, sizes)
    }
  })
})
