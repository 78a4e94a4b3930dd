import { spawnSync } from 'node:child_process'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { alibiSlopes } from 'heddle'
import { expect, it } from 'vitest'
import {
  type Config,
  create,
  gradients,
  type Model,
  update,
} from '../../examples/train-lightning/model.js'
import { describeDevices } from '../support/devices.js'
import { random } from '../support/random.js'
import { lightningGradients, lightningReference, reader } from '../support/reference.js'

// The same model and the same training in float64, on rows of numbers

type Matrix = number[][]

const config: Config = { vocabulary: 256, width: 16, heads: 2, hidden: 24, layers: 2 }
const [sequences, length] = [2, 20]
const eps = 1e-6

const sigmoid = (x: number) => 1 / (1 + Math.exp(-x))
const silu = (x: number) => x * sigmoid(x)
const siluSlope = (x: number) => sigmoid(x) * (1 + x * (1 - sigmoid(x)))
const map = (x: Matrix, f: (a: number) => number): Matrix => x.map((row) => row.map(f))
const zip = (x: Matrix, y: Matrix, f: (a: number, b: number) => number): Matrix =>
  x.map((row, i) => row.map((a, j) => f(a, y[i]![j]!)))
const add = (x: Matrix, y: Matrix) => zip(x, y, (a, b) => a + b)
const times = (x: Matrix, y: Matrix) => zip(x, y, (a, b) => a * b)
const transposed = (x: Matrix): Matrix => x[0]!.map((_, j) => x.map((row) => row[j]!))
/** x yᵀ */
const product = (x: Matrix, y: Matrix): Matrix =>
  x.map((row) => y.map((other) => other.reduce((sum, a, i) => sum + a * row[i]!, 0)))
const rms = (row: readonly number[]) =>
  Math.sqrt(row.reduce((sum, a) => sum + a * a, 0) / row.length + eps)
const norm = (x: Matrix): Matrix => x.map((row) => row.map((a) => a / rms(row)))
const throughNorm = (dy: Matrix, x: Matrix): Matrix =>
  x.map((row, i) => {
    const size = rms(row)
    const mean = row.reduce((sum, a, j) => sum + (a / size) * dy[i]![j]!, 0) / row.length
    return row.map((a, j) => (dy[i]![j]! - (a / size) * mean) / size)
  })
const columns = (x: Matrix, from: number, to: number): Matrix => x.map((row) => row.slice(from, to))
const rows = (values: ArrayLike<number>, width: number): Matrix =>
  Array.from({ length: values.length / width }, (_, i) =>
    Array.from({ length: width }, (_, j) => values[i * width + j]!),
  )

class Reference {
  readonly weights = new Map<string, Matrix>()
  private readonly moments = new Map<string, { first: Matrix; second: Matrix }>()
  private steps = 0

  constructor(model: Model) {
    for (const [name, { values, columns }] of model.parameters) {
      const weight = rows(values, columns)
      this.weights.set(name, weight)
      this.moments.set(name, { first: map(weight, () => 0), second: map(weight, () => 0) })
    }
  }

  /** One step; the loss before it. */
  train(inputs: readonly number[], targets: readonly number[], rate: number): number {
    const { width, heads, layers } = config
    const w = (name: string) => this.weights.get(name)!
    const found = new Map<string, Matrix>()
    const segments = Array.from({ length: sequences }, (_, b) => [b, 0, length, b] as const)
    const d = width / heads
    const sizes = { b: sequences, s: length, hq: heads, hk: heads, hv: heads, hs: heads, d, e: d }
    const scanOf = (layer: number) => ({
      ...sizes,
      scale: 1,
      slopes: alibiSlopes(heads, layer, layers).map(Math.fround),
    })
    const read = (x: Matrix) => reader(x.flat(), length, heads, d)

    let x = inputs.map((byte) => [...w('embedding')[byte]!])
    const kept = []
    for (let layer = 0; layer < layers; layer++) {
      const normal = norm(x)
      const qkvu = product(normal, w(`${layer}.qkvu`))
      const part = (i: number) => columns(qkvu, i * width, (i + 1) * width)
      const [q, k, v, u] = [part(0), part(1), part(2), part(3)]
      const scanned = [read(map(q, silu)), read(map(k, silu)), read(v)] as const
      const { out } = lightningReference(scanOf(layer), ...scanned, undefined, segments)
      const o = rows(out, width)
      const mixed = times(u, norm(o))
      const middle = add(x, product(mixed, w(`${layer}.out`)))
      const gate = product(norm(middle), w(`${layer}.gate`))
      const up = product(norm(middle), w(`${layer}.up`))
      kept.push({ x, normal, q, k, u, o, mixed, middle, gate, up, scanned })
      x = add(middle, product(times(gate, up), w(`${layer}.down`)))
    }
    const logits = product(norm(x), w('logits'))
    let loss = 0
    const dlogits = logits.map((row, i) => {
      const top = Math.max(...row)
      const sum = row.reduce((total, a) => total + Math.exp(a - top), 0)
      loss += (top + Math.log(sum) - row[targets[i]!]!) / targets.length
      return row.map(
        (a, j) => (Math.exp(a - top) / sum - (j === targets[i] ? 1 : 0)) / targets.length,
      )
    })

    const through = (dy: Matrix, name: string) => product(dy, transposed(w(name)))
    const ofWeight = (name: string, dy: Matrix, input: Matrix) =>
      found.set(name, product(transposed(dy), transposed(input)))
    ofWeight('logits', dlogits, norm(x))
    let dx = throughNorm(through(dlogits, 'logits'), x)
    for (let layer = layers - 1; layer >= 0; layer--) {
      const c = kept[layer]!
      const dgated = through(dx, `${layer}.down`)
      const [dgate, dup] = [times(dgated, c.up), times(dgated, c.gate)]
      ofWeight(`${layer}.down`, dx, times(c.gate, c.up))
      ofWeight(`${layer}.gate`, dgate, norm(c.middle))
      ofWeight(`${layer}.up`, dup, norm(c.middle))
      const dnormal = add(through(dgate, `${layer}.gate`), through(dup, `${layer}.up`))
      const dmiddle = add(dx, throughNorm(dnormal, c.middle))
      const dmixed = through(dmiddle, `${layer}.out`)
      ofWeight(`${layer}.out`, dmiddle, c.mixed)
      const dout = throughNorm(times(dmixed, c.u), c.o)
      const { dq, dk, dv } = lightningGradients(
        scanOf(layer),
        ...c.scanned,
        read(dout),
        undefined,
        undefined,
        segments,
      )
      const parts = [
        times(rows(dq, width), map(c.q, siluSlope)),
        times(rows(dk, width), map(c.k, siluSlope)),
        rows(dv, width),
        times(dmixed, norm(c.o)),
      ]
      const dqkvu = parts[0]!.map((_, i) => parts.flatMap((part) => part[i]!))
      ofWeight(`${layer}.qkvu`, dqkvu, c.normal)
      dx = add(dmiddle, throughNorm(through(dqkvu, `${layer}.qkvu`), c.x))
    }
    const dembedding = map(w('embedding'), () => 0)
    inputs.forEach((byte, i) => {
      dembedding[byte] = dembedding[byte]!.map((a, j) => a + dx[i]![j]!)
    })
    found.set('embedding', dembedding)
    this.adam(found, rate)
    return loss
  }

  private adam(gradients: Map<string, Matrix>, rate: number): void {
    this.steps++
    for (const [name, gradient] of gradients) {
      const moments = this.moments.get(name)!
      moments.first = zip(moments.first, gradient, (m, g) => 0.9 * m + 0.1 * g)
      moments.second = zip(moments.second, gradient, (m, g) => 0.99 * m + 0.01 * g * g)
      const step = zip(
        moments.first,
        moments.second,
        (a, b) => a / (1 - 0.9 ** this.steps) / (Math.sqrt(b / (1 - 0.99 ** this.steps)) + 1e-8),
      )
      this.weights.set(
        name,
        zip(this.weights.get(name)!, step, (a, s) => a - rate * s),
      )
    }
  }
}

describeDevices('train-lightning', (device) => {
  it('follows a float64 run over 20 steps, and learns', async () => {
    const rng = random(50)
    const model = create(config, rng.below(2 ** 31))
    const reference = new Reference(model)
    const losses: number[] = []
    for (let step = 0; step < 20; step++) {
      // a text of few letters, so that there is something to learn at once
      const bytes = Uint8Array.from({ length: sequences * (length + 1) }, () => 97 + rng.below(6))
      const sequence = (i: number, from: number) => [
        ...bytes.subarray(i * (length + 1) + from, i * (length + 1) + length + from),
      ]
      const all = (from: number) =>
        Array.from({ length: sequences }, (_, i) => sequence(i, from)).flat()
      const expected = reference.train(all(0), all(1), 1e-2)
      const found = await gradients(model, bytes, length, device)
      update(model, found.gradients, 1e-2)
      expect(Math.abs(found.loss / expected - 1), `step ${step}`).toBeLessThan(1e-3)
      losses.push(found.loss)
    }
    expect(losses.at(-1)!).toBeLessThan(0.6 * losses[0]!)
  }, 120_000)
})

it('train-lightning refuses to train for no steps', () => {
  const root = join(__dirname, '../..')
  const script = join(root, 'dist/examples/train-lightning/train.js')
  const out = join(tmpdir(), 'heddle-no-steps.svg')
  for (const steps of ['many', '0', '1.5']) {
    const args = [script, '--steps', steps, '--out', out, join(root, 'README.md')]
    const { status, stderr } = spawnSync(process.execPath, args, { encoding: 'utf8' })
    expect(stderr).toContain(`--steps must be a whole number from 1 on, got ${steps}`)
    expect(status).toBe(1)
  }
})
