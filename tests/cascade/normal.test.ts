import { type CascadeIR, cascade } from 'heddle'
import { expect, it } from 'vitest'
import { Normal, startOver, TooLarge } from '../../dist/cascade/normal.js'
import { Side } from '../../dist/cascade/side.js'
import { tensor } from '../../dist/tensor.js'
import { random } from '../support/random.js'

// As a text again; not if it is too long for one
function formOf(ir: CascadeIR): Side | undefined {
  try {
    startOver()
    const { form } = new Normal(ir).forms.get('Y')!
    return new Side(ir, (_, indices) => indices, new Map(), form, ['i'])
  } catch (error) {
    if (error instanceof TooLarge) return undefined
    throw error
  }
}

// What a text computes is the same after normalisation, whatever its sums, exponentials and divisions: the form of its output
// runs as a text again. All numbers are positive, as identities hold where nothing is divided by 0.
it('never changes results', async () => {
  const rng = random(93)
  const leaf = () => rng.pick(['A[i,j]', 'A[i,j]', 'B[j]', 'C[i]', 'x', '0.5', '2'])
  const expr = (depth: number): string => {
    if (depth === 0) return leaf()
    const [a, b] = [expr(depth - 1), expr(rng.below(depth))]
    return rng.pick([
      `(${a} + ${b})`,
      `${a} * ${b}`,
      `${a} / ${b}`,
      `exp(${rng.pick(['', '-'])}tanh(${a}))`,
      `exp(tanh(${a}) - tanh(${b}))`,
      `exp2(sigmoid(${a}))`,
      `log1p(${a})`,
      `log(1 + exp(tanh(${a})))`,
      `log(exp(tanh(${a})) * ${b} + ${b}) * 0.1 + 2`,
      `${rng.pick(['sqrt', 'rsqrt', 'softplus', 'relu'])}(${a})`,
      `pow(${a}, ${rng.pick(['2', '3', '-1', '0.5'])})`,
      `pow(x, tanh(${a}))`,
      `${rng.pick(['max', 'min'])}(${a}, ${b})`,
      `if(i < j, ${a}, ${b})`,
    ])
  }
  let checked = 0
  for (let n = 0; n < 400; n++) {
    const [i, j] = [1 + rng.below(4), 1 + rng.below(5)]
    const mask = () =>
      rng.pick(['', '', 'where j <= i', 'where j <= i && j + 2 > i', 'where j > 0'])
    const text = `
      S[i,j] = ${expr(1 + rng.below(3))} + 0.1 * A[i,j]
      M[i]   = max(j) S[i,j]
      N[i,j] = exp(tanh(S[i,j]) - tanh(M[i])) * ${expr(1)} ${mask()}
      D[i]   = ${rng.pick(['sum', 'logsumexp', 'max'])}(j) N[i,j] + 0.5
      P[i,j] = N[i,j] / (D[i] + ${rng.pick(['1', 'C[i]'])}) * A[i,j]
      Y[i]   = sum(j) P[i,j] * ${expr(1)} * B[j] ${mask()}`
    const parsed = cascade(text)
    const draw = (shape: number[]) => ({
      data: Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, () => 0.5 + rng.next()),
      shape,
    })
    const inputs = { A: draw([i, j]), B: draw([j]), C: draw([i]) }
    const given = Object.fromEntries(
      parsed.ir.inputs.map((name) => [name, inputs[name as keyof typeof inputs]]),
    )
    const { data } = parsed.evaluate(given, { x: 0.7 }).Y!
    const side = formOf(parsed.ir)
    if (!side) continue
    const tensors = Object.fromEntries(
      Object.entries(given).map(([name, { data, shape }]) => [name, tensor(data, shape)]),
    )
    const result = await side.run(tensors, { x: 0.7, I: i, J: j }).read()
    data.forEach((wanted, at) => {
      // empty sums of a mask that hides the maximum are infinite on both sides
      if (!Number.isFinite(wanted)) return
      checked++
      expect(Math.abs(result[at]! - wanted), text).toBeLessThanOrEqual(
        2e-5 * (1 + Math.abs(wanted)),
      )
    })
  }
  expect(checked).toBeGreaterThan(500)
})

// A root or a logarithm of a product is that of its factors only where none of them is below 0
it('takes roots and logarithms of numbers of either sign', async () => {
  const rng = random(94)
  const leaf = () => rng.pick(['A[i,j]', 'B[j]', 'C[i]', 'x', 'y', '-2'])
  const even = (): string => {
    const [a, b] = [leaf(), leaf()]
    return rng.pick([
      `${a} * ${a}`,
      `pow(${a}, 2) * ${b} * ${b}`,
      `pow(${a} * ${b}, 2)`,
      `(${a} * ${a} + pow(${b}, 2))`,
      `exp(${a}) * pow(${b}, 2)`,
      `abs(${a})`,
      `${a} * ${b}`,
      `${a} * ${b} * ${a} / ${b}`,
      `(${a} * ${b} + ${a} * ${a})`,
      `pow(${a}, 4) / 3`,
    ])
  }
  const root = () =>
    rng.pick([
      `sqrt(${even()})`,
      `rsqrt(${even()})`,
      `log(${even()})`,
      `pow(${even()}, 0.25)`,
      `log1p(${even()} - 1)`,
      `pow(sqrt(${even()}), 2)`,
      `${leaf()} * rsqrt(${even()})`,
      `pow(${leaf()}, z)`,
    ])
  let checked = 0
  for (let n = 0; n < 400; n++) {
    const text = `
      P[i,j] = ${root()} * ${leaf()} + ${root()} + A[i,j]
      N[i]   = sum(j) A[i,j] * A[i,j] * C[i] * C[i] * x
      Y[i]   = sum(j) P[i,j] * B[j] + C[i] / sqrt(N[i] * x)`
    const parsed = cascade(text)
    const side = formOf(parsed.ir)
    if (!side) continue
    checked++
    const [i, j] = [3, 4]
    const draw = (shape: number[]) => ({
      data: rng.normals(shape.reduce((a, b) => a * b, 1)),
      shape,
    })
    const given = { A: draw([i, j]), B: draw([j]), C: draw([i]) }
    const scalars = { x: rng.normal(), y: rng.normal(), z: rng.pick([2, 3]) }
    const names = parsed.ir.inputs as (keyof typeof given)[]
    const used = Object.fromEntries(parsed.ir.scalars.map((one) => [one, scalars[one as 'x']]))
    const expected = parsed.evaluate(
      Object.fromEntries(names.map((one) => [one, given[one]])),
      used,
    ).Y!
    const tensors = Object.fromEntries(
      names.map((one) => [one, tensor(given[one].data, given[one].shape)]),
    )
    const actual = await side.run(tensors, { ...used, I: i, J: j }).read()
    for (const [at, value] of expected.data.entries()) {
      // what has no root is no number in both, or finds one where signs cancel
      if (!Number.isFinite(value)) continue
      const error = Math.abs(Number(actual[at]) - value)
      expect(error, `${text} ${JSON.stringify(scalars)}`).toBeLessThan(
        1e-3 * Math.max(1, Math.abs(value)),
      )
    }
  }
  expect(checked).toBeGreaterThan(300)
})
