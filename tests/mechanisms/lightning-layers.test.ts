import { alibiSlopes, full, minimax, type Tensor, transnormer, zeros } from 'heddle'
import { expect, it } from 'vitest'
import { relativeRms } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { thrown } from '../support/failure.js'
import { type Random, random, sample } from '../support/random.js'
import { lightningReference, reader } from '../support/reference.js'

// The layers once more in float64, on rows of numbers

type Matrix = number[][]

const silu = (x: number) => x / (1 + Math.exp(-x))
const sigmoid = (x: number) => 1 / (1 + Math.exp(-x))
const rows = (values: ArrayLike<number>, width: number): Matrix =>
  Array.from({ length: values.length / width }, (_, i) =>
    Array.from({ length: width }, (_, j) => values[i * width + j]!),
  )
const product = (x: Matrix, weight: Matrix): Matrix =>
  x.map((row) => weight.map((w) => w.reduce((sum, y, i) => sum + y * row[i]!, 0)))
const norm = (x: Matrix, eps: number): Matrix =>
  x.map((row) => {
    const mean = row.reduce((sum, y) => sum + y * y, 0) / row.length
    return row.map((y) => y / Math.sqrt(mean + eps))
  })
const zip = (x: Matrix, y: Matrix, f: (a: number, b: number) => number): Matrix =>
  x.map((row, i) => row.map((a, j) => f(a, y[i]![j]!)))
const columns = (x: Matrix, pick: (j: number) => boolean): Matrix =>
  x.map((row) => row.filter((_, j) => pick(j)))

const [b, s, heads, d] = [2, 37, 3, 8]
const width = heads * d

function scan(q: Matrix, k: Matrix, v: Matrix, slopes: number[]) {
  const wide = q[0]!.length / heads
  const c = { b, s, hq: heads, hk: heads, hv: heads, hs: heads, d: wide, e: d, scale: 1, slopes }
  const read = (x: Matrix) => reader(x.flat(), s, heads, x[0]!.length / heads)
  const segments = [0, 1].map((i) => [i, 0, s, i] as const)
  const { out, state } = lightningReference(c, read(q), read(k), read(v), undefined, segments)
  return { out: rows(out, width), state }
}

describeDevices('layers of lightning attention', (device) => {
  async function draw(rng: Random, ...shape: number[]) {
    const scale = shape.length === 2 ? 1 / Math.sqrt(shape[1]!) : 1
    const { tensor, values } = await sample(rng, shape, 'float32', device, { scale })
    return { tensor: tensor as Tensor<'float32'>, matrix: rows(values, shape.at(-1)!) }
  }

  /** Whole, and in two parts of which the second continues from the state of the first. */
  async function check(
    run: (
      x: Tensor<'float32'>,
      state?: Tensor<'float32'>,
    ) => { out: Tensor<'float32'>; state: Tensor<'float32'> },
    x: Tensor<'float32'>,
    expected: { out: Matrix; state: Float64Array },
  ) {
    const whole = run(x)
    expect(relativeRms(await whole.out.read(), expected.out.flat())).toBeLessThan(1e-5)
    expect(relativeRms(await whole.state.read(), expected.state)).toBeLessThan(1e-5)
    const first = run(x.slice(1, 0, 20))
    const second = run(x.slice(1, 20), first.state)
    expect(relativeRms(await second.state.read(), expected.state)).toBeLessThan(1e-5)
    const rest = await whole.out.slice(1, 20).read()
    expect(relativeRms(await second.out.read(), rest)).toBeLessThan(1e-5)
  }

  const learnt = Array.from({ length: width }, (_, i) => Math.sin(i + 1))
  const first = Array.from({ length: width }, (_, i) => 10000 ** ((-2 * i) / width))
  it.each([
    ['without positions', undefined, undefined],
    ['with the positions it starts from', {}, first],
    ['with positions it has learnt', { theta: learnt }, learnt],
  ])('transnormer is the block in float64, %s', async (_, lrpe, theta) => {
    const rng = random(40)
    const model = 20
    const x = await draw(rng, b, s, model)
    const qkvu = await draw(rng, 4 * width, model)
    const out = await draw(rng, model, width)
    const gate = await draw(rng, 33, model)
    const up = await draw(rng, 33, model)
    const down = await draw(rng, model, 33)
    const eps = 1e-6
    const projected = product(norm(x.matrix, eps), qkvu.matrix)
    const part = (i: number) => columns(projected, (j) => Math.floor(j / width) === i)
    const active = (y: Matrix) => y.map((row) => row.map(silu))
    // the channels of a head times cosines, then times sines
    const turn = (y: Matrix) =>
      theta
        ? y.map((row, t) =>
            Array.from({ length: 2 * width }, (_, j) => {
              const channel = Math.floor(j / (2 * d)) * d + (j % d)
              const angle = theta[channel]! * (t % s)
              return row[channel]! * (j % (2 * d) < d ? Math.cos(angle) : Math.sin(angle))
            }),
          )
        : y
    const [q, k] = [turn(active(part(0))), turn(active(part(1)))]
    const o = scan(q, k, part(2), alibiSlopes(heads, 1, 4))
    const mixed = zip(part(3), norm(o.out, eps), (u, y) => u * y)
    const first = zip(x.matrix, product(mixed, out.matrix), (a, y) => a + y)
    const y = norm(first, eps)
    const gated = zip(product(y, gate.matrix), product(y, up.matrix), (a, c) => a * c)
    const expected = zip(first, product(gated, down.matrix), (a, c) => a + c)
    const weights = {
      qkvu: qkvu.tensor,
      out: out.tensor,
      gate: gate.tensor,
      up: up.tensor,
      down: down.tensor,
    }
    await check(
      (part, state) =>
        transnormer(part, weights, {
          ...{ heads, layer: 1, layers: 4, state, lrpe },
          offset: state ? 20 : 0,
        }),
      x.tensor,
      { out: expected, state: o.state },
    )
  })

  it('minimax is the layer in float64', async () => {
    const rng = random(41)
    const model = 20
    const x = await draw(rng, b, s, model)
    const qkv = await draw(rng, 3 * width, model)
    const gate = await draw(rng, width, model)
    const gain = await draw(rng, width)
    const out = await draw(rng, model, width)
    const active = product(x.matrix, qkv.matrix).map((row) => row.map(silu))
    // per head its queries, then its keys, then its values
    const part = (i: number) => columns(active, (j) => Math.floor(j / d) % 3 === i)
    const o = scan(part(0), part(1), part(2), alibiSlopes(heads, 2, 8))
    const even = norm(o.out, 1e-5).map((row) => row.map((y, j) => y * gain.matrix[0]![j]!))
    const gated = zip(product(x.matrix, gate.matrix), even, (a, y) => sigmoid(a) * y)
    const weights = { qkv: qkv.tensor, gate: gate.tensor, norm: gain.tensor, out: out.tensor }
    await check(
      (part, state) => minimax(part, weights, { heads, layer: 2, layers: 8, state }),
      x.tensor,
      { out: product(gated, out.matrix), state: o.state },
    )
  })
})

it('say what is wrong with weights, sizes and options', () => {
  const x = zeros([1, 4, 8])
  const own = { qkv: zeros([24, 8]), gate: zeros([8, 8]), norm: full([8], 1), out: zeros([8, 8]) }
  const block = {
    ...{ qkvu: zeros([32, 8]), out: zeros([8, 8]) },
    ...{ gate: zeros([16, 8]), up: zeros([16, 8]), down: zeros([8, 16]) },
  }
  const place = { heads: 2, layer: 0, layers: 4 }
  // biome-ignore lint/suspicious/noExplicitAny: what types refuse
  const any = (value: unknown) => value as any
  for (const [call, message] of [
    [() => minimax(zeros([4, 8]), own, place), 'minimax: x must be [b, s, model], got [4, 8]'],
    [() => minimax(x, any(null), place), 'minimax: weights must be an object of tensors, got null'],
    [
      () => minimax(x, any({ ...own, gate: undefined }), place),
      'minimax: weights.gate must be a tensor, got undefined',
    ],
    [() => minimax(x, own, any(undefined)), 'minimax: options must be an object, got undefined'],
    [
      () => minimax(x, own, { ...place, heads: 3 }),
      'minimax: weights.qkv must be [3 h d, model] of 3 heads, got [24, 8]',
    ],
    [
      () => minimax(x, own, { ...place, layer: 4 }),
      'minimax: layer must be an integer from 0 to 3, got 4',
    ],
    [
      () => transnormer(x, any({ ...block, down: 3 }), place),
      'transnormer: weights.down must be a tensor, got 3',
    ],
    [
      () => transnormer(x, block, { ...place, lrpe: { theta: [1, Number.NaN] } }),
      'transnormer: theta[1] must be a finite number, got NaN',
    ],
    [
      () => transnormer(x, block, { ...place, lrpe: { theta: [1, 2] } }),
      'transnormer: theta must be 8 numbers, one per channel, got 2',
    ],
  ] as const)
    expect(thrown(call).message).toBe(message)
})
