import {
  achievedMass,
  add,
  attention,
  empty,
  type FloatDType,
  flexPrefill,
  flexPrefillAttention,
  type Mask,
  mul,
  streaming,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { expect, it } from 'vitest'
import { run } from '../../dist/native.js'
import { maxError, relativeRms } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random, sample } from '../support/random.js'
import { reader } from '../support/reference.js'

interface Settings {
  mode: 'reference' | 'coverage'
  gamma: number
  tau: number
  minBudget: number
  block: number
}

interface Selection {
  set: Set<number>
  near: boolean
  aware: boolean
  distance: number
  /** Masses that sum to 1, of keys and distances, and of their blocks. */
  masses: number[][]
  /** What of the last two was chosen. */
  chosen: number[][]
}

/** Section by section the selection of one head, with sorts and in float64; `near` tells that a cut is too close to call. */
function selection(
  n: number,
  score: (i: number, t: number) => number,
  pooled: (from: number, to: number, column: number) => number,
  { mode, gamma, tau, minBudget, block: b }: Settings,
): Selection {
  const nb = Math.ceil(n / b)
  const pad = nb * b - n
  let near = false
  const softmax = (scores: number[]) => {
    const top = Math.max(...scores)
    const sum = scores.reduce((total, x) => total + Math.exp(x - top), 0)
    return scores.map((x) => Math.exp(x - top) / sum)
  }
  const av = new Array<number>(n).fill(0)
  const as = new Array<number>(n).fill(0)
  for (let i = n - b; i < n; i++)
    softmax(Array.from({ length: i + 1 }, (_, t) => score(i, t))).forEach((p, t) => {
      av[t]! += p / b
      as[i - t]! += p / b
    })
  const V = new Array<number>(nb).fill(0)
  const O = new Array<number>(nb).fill(0)
  av.forEach((x, t) => {
    V[Math.floor(t / b)]! += x
  })
  as.forEach((x, d) => {
    if (mode === 'reference') O[Math.floor((d + pad) / b)]! += x
    else {
      // for some queries of a block it lies on one diagonal of blocks, for the others on the next
      const o = Math.floor(d / b)
      O[o]! += x * (o + 1 - d / b)
      if (o + 1 < nb) O[o + 1]! += x * (d / b - o)
    }
  })
  const estimate = softmax(Array.from({ length: nb }, (_, c) => pooled(n - b, n, c)))
  const js = estimate.reduce((sum, a, c) => {
    const m = (a + V[c]!) / 2
    return sum + (a * Math.log(a / m) + V[c]! * Math.log(V[c]! / m)) / 2
  }, 0)
  const distance = Math.sqrt(js)
  if (Math.abs(distance - tau) < 1e-5) near = true
  const aware = distance < tau
  const order = (values: number[], forced = -1) =>
    values
      .map((x, i) => [i === forced ? Number.POSITIVE_INFINITY : x, i] as const)
      .sort((x, y) => y[0] - x[0] || x[1] - y[1])
      .map(([, i]) => i)
  const least = Math.max(Math.ceil(minBudget / b), 1)
  const cover = (values: number[], exceed: boolean, forced = -1) => {
    let [sum, count] = [0, 0]
    for (const i of order(values, forced)) {
      sum += values[i]!
      count++
      if (Math.abs(sum - gamma) < 1e-5) near = true
      if (exceed ? sum > gamma : sum >= gamma) break
    }
    return count
  }
  const best = (blocks: number[], tokens: number[]) => {
    let count = least
    if (!aware)
      count =
        mode === 'coverage' ? cover(blocks, false, 0) : Math.floor(cover(tokens, true) / 128) + 1
    count = Math.min(Math.max(count, least), nb)
    const list = order(blocks, 0)
    const edge = [list[count - 1], list[count]].map((i) => (i === undefined ? -1 : blocks[i]!))
    if (count > 1 && count < nb && Math.abs(edge[0]! - edge[1]!) < 1e-6) near = true
    return list.slice(0, count)
  }
  const set = new Set<number>()
  const columns = best(V, av)
  const offsets = best(O, as)
  for (let i = 0; i < nb; i++) {
    for (const c of columns) if (c <= i) set.add(i * nb + c)
    for (const o of offsets) if (o <= i) set.add(i * nb + i - o)
  }
  if (aware) {
    const pairs: { at: number; p: number }[] = []
    for (let i = 0; i < nb; i++)
      softmax(
        Array.from({ length: i + 1 }, (_, c) => pooled(i * b, Math.min((i + 1) * b, n), c)),
      ).forEach((p, c) => {
        pairs.push({ at: i * nb + c, p })
      })
    pairs.sort((x, y) => y.p - x.p || x.at - y.at)
    let sum = 0
    for (const { at, p } of pairs) {
      const before = sum
      sum += p
      if (Math.abs(sum - gamma * nb) < 1e-4) near = true
      if (mode === 'reference' ? sum <= gamma * nb : before <= gamma * nb) set.add(at)
      else break
    }
  }
  return { set, near, aware, distance, masses: [av, as, V, O], chosen: [columns, offsets] }
}

/** What a head of q and k, [n, heads, d], selects. */
function selectionOf(
  q: Float32Array,
  k: Float32Array,
  n: number,
  heads: number,
  head: number,
  settings: Settings,
  d = 32,
): Selection {
  const [rq, rk] = [reader(q, n, heads, d), reader(k, n, heads, d)]
  const score = (i: number, t: number) => {
    let sum = 0
    for (let e = 0; e < d; e++) sum += rq(0, i, head, e) * rk(0, t, head, e)
    return sum / Math.sqrt(d)
  }
  const mean = (read: typeof rq, from: number, to: number, e: number) => {
    let sum = 0
    for (let i = from; i < to; i++) sum += read(0, i, head, e)
    return sum / (to - from)
  }
  const b = settings.block
  const pooled = (from: number, to: number, c: number) => {
    let sum = 0
    for (let e = 0; e < d; e++)
      sum += mean(rq, from, to, e) * mean(rk, c * b, Math.min((c + 1) * b, n), e)
    return sum / Math.sqrt(d)
  }
  return selection(n, score, pooled, settings)
}

async function pairsOf(mask: Mask, head: number, nb: number): Promise<Set<number>> {
  const bits = await mask.blocks!.read()
  const words = mask.blocks!.shape[3]!
  const set = new Set<number>()
  for (let r = 0; r < nb; r++)
    for (let c = 0; c < nb; c++)
      if ((bits[(head * nb + r) * words + (c >> 5)]! >> (c & 31)) & 1) set.add(r * nb + c)
  return set
}

/** Random q and k with something to find: a sink, a column, a slash; flat ones are query-aware. */
function planted(rng: Random, n: number, heads: number, flat: boolean, d = 32): Float32Array[] {
  const [q, k] = [
    rng.normals(n * heads * d, flat ? 0.3 : 1),
    rng.normals(n * heads * d, flat ? 0.3 : 1),
  ]
  const column = rng.below(n)
  for (let i = 0; i < n && !flat; i++)
    for (let h = 0; h < heads; h++)
      for (let e = 0; e < 8; e++) {
        q[(i * heads + h) * d + e]! += 1.5
        if (i === column || i < 2) k[(i * heads + h) * d + e]! += 2
      }
  return [q, k]
}

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

/** Every head where the next was. */
function turnHeads(x: Tensor<'float32'>): Tensor<'float32'> {
  const to = empty(x.shape, { device: x.device })
  const heads = x.shape[2]!
  for (let h = 0; h < heads; h++) {
    const next = (h + 1) % heads
    to.slice(2, next, next + 1).copyFrom(x.slice(2, h, h + 1))
  }
  return to
}

describeDevices('flexPrefill', (device) => {
  it('selects what float64 selects', async () => {
    const rng = random(90)
    let compared = 0
    for (const n of [640, 700, 1000, 1024])
      for (const flat of [false, true]) {
        const [heads, d] = [2, 32]
        const settings: Settings = {
          mode: rng.pick(['reference', 'coverage']),
          gamma: rng.pick([0.5, 0.9, 0.95]),
          tau: rng.pick([0, 0.1, 0.3, 1]),
          minBudget: rng.pick([0, 200]),
          block: rng.pick([64, 128]),
        }
        const [q, k] = planted(rng, n, heads, flat)
        const place = (x: Float32Array) => tensor(x, [1, n, heads, d], { device })
        const mask = flexPrefill(place(q!), place(k!), settings)
        for (let head = 0; head < heads; head++) {
          const expected = selectionOf(q!, k!, n, heads, head, settings)
          if (expected.near) continue
          compared++
          const actual = await pairsOf(mask, head, Math.ceil(n / settings.block))
          const text = `${JSON.stringify(settings)} n ${n} head ${head} aware ${expected.aware}`
          expect(
            [...actual].sort((x, y) => x - y),
            text,
          ).toEqual([...expected.set].sort((x, y) => x - y))
        }
      }
    expect(compared).toBeGreaterThan(4)
  })

  it('selects that of 16 bits, in blocks of 128, whose first look may decide', async () => {
    const rng = random(98)
    const found = [0, 0]
    let problem = 0
    for (const n of [640, 700, 1000, 1024])
      for (const [dtype, d] of [
        ['bfloat16', 64],
        ['float16', 128],
      ] as const) {
        const heads = 4
        const settings: Settings = {
          mode: 'reference',
          gamma: rng.pick([0.5, 0.9, 0.95]),
          // from most heads by columns and diagonals to most of them query-aware
          tau: [0.05, 0.1, 0.2][problem++ % 3]!,
          minBudget: rng.pick([0, 200]),
          block: 128,
        }
        // heads of both kinds beside each other
        const kinds = [false, true].map((flat) => planted(rng, n, heads, flat, d))
        const [q, k] = [0, 1].map((of) => {
          const values = kinds[0]![of]!.map((x, i) =>
            Math.floor(i / d) % heads < 2 + of * 2 ? x : kinds[1]![of]![i]!,
          )
          return tensor(values, [1, n, heads, d], { device }).cast(dtype)
        })
        const mask = flexPrefill(q!, k!, settings)
        const [qs, ks] = await Promise.all([q!, k!].map((x) => x.read({ as: 'float32' })))
        for (let head = 0; head < heads; head++) {
          const expected = selectionOf(qs!, ks!, n, heads, head, settings, d)
          if (expected.near) continue
          found[Number(expected.aware)]!++
          const actual = await pairsOf(mask, head, Math.ceil(n / 128))
          expect(
            [...actual].sort((x, y) => x - y),
            `${JSON.stringify(settings)} n ${n} head ${head} aware ${expected.aware}`,
          ).toEqual([...expected.set].sort((x, y) => x - y))
        }
      }
    expect(found[0]).toBeGreaterThan(2)
    expect(found[1]).toBeGreaterThan(2)
  })

  it('is dense from gamma 1 on, in short calls and where numbers are not finite', async () => {
    const rng = random(91)
    const q = await sample(rng, [1, 640, 2, 32], 'float32', device, { strided: false })
    const k = await sample(rng, [1, 640, 1, 32], 'float32', device, { strided: false })
    const dense = await attention(q.tensor, k.tensor, k.tensor, { causal: true }).out.read()
    for (const options of [{ gamma: 1 }, { minBudget: 640 }, { gamma: 2, block: 64 }]) {
      const mask = flexPrefill(q.tensor, k.tensor, options)
      expect(await mask.density()).toBe(1)
      const out = await attention(q.tensor, k.tensor, k.tensor, { mask }).out.read()
      expect(maxError(out, dense)).toBeLessThan(1e-5)
    }
    q.tensor
      .slice(1, 630, 631)
      .slice(2, 0, 1)
      .copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 1, 1, 32]))
    const mask = flexPrefill(q.tensor, k.tensor, { gamma: 0.5, minBudget: 0, block: 64 })
    expect((await pairsOf(mask, 0, 10)).size).toBe(55)
    expect((await pairsOf(mask, 1, 10)).size).toBeLessThan(55)
  })

  it('is dense for heads that a number reaches which is not finite, wherever it stands', async () => {
    const rng = random(97)
    const options = { gamma: 0.5, minBudget: 0, block: 64 } as const
    for (const odd of [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY])
      for (const [of, token] of [
        ['q', 0],
        ['q', 100],
        ['q', 639],
        ['k', 0],
        ['k', 639],
      ] as const) {
        const draw = () => sample(rng, [1, 640, 2, 32], 'float32', device, { strided: false })
        const made = { q: (await draw()).tensor, k: (await draw()).tensor }
        const place = made[of].slice(1, token, token + 1).slice(3, 5, 6)
        place.slice(2, 0, 1).copyFrom(tensor([odd], [1, 1, 1, 1], { device }))
        const mask = flexPrefill(made.q, made.k, options)
        expect((await pairsOf(mask, 0, 10)).size, `${odd} in ${of} at ${token}`).toBe(55)
        expect((await pairsOf(mask, 1, 10)).size).toBeLessThan(55)
      }
  })

  it('grows with gamma and minBudget, keeps column 0 and the diagonal, and covers what it says', async () => {
    const rng = random(92)
    const [q, k] = planted(rng, 1000, 2, false).map((x) => tensor(x, [1, 1000, 2, 32], { device }))
    let before = new Set<number>()
    for (const gamma of [0.3, 0.6, 0.9, 0.99]) {
      const mask = flexPrefill(q!, k!, { gamma, tau: 0, minBudget: 0, block: 64, mode: 'coverage' })
      const set = await pairsOf(mask, 0, 16)
      for (const pair of before) expect(set.has(pair)).toBe(true)
      for (let i = 0; i < 16; i++) expect(set.has(i * 16) && set.has(i * 17)).toBe(true)
      before = set
      const [mass] = await achievedMass(q!, k!, mask)
      expect(mass).toBeGreaterThan(0)
      expect(mass).toBeLessThan(1.00001)
    }
  })

  it('has the properties of its definition', async () => {
    const rng = random(98)
    const [n, heads, d, block] = [900, 3, 32, 64]
    const nb = Math.ceil(n / block)
    const place = (x: Float32Array) => tensor(x, [1, n, heads, d], { device })
    const base = { block, tau: 0.1, gamma: 0.9, minBudget: 0 }
    const [rough, flat] = [planted(rng, n, heads, false), planted(rng, n, heads, true)]
    const sizeOf = async (mask: Mask) =>
      (await Promise.all(range(heads).map((head) => pairsOf(mask, head, nb)))).map(
        ({ size }) => size,
      )
    for (const mode of ['reference', 'coverage'] as const)
      for (const [q, k] of [rough, flat] as const) {
        const [x, y] = [place(q!), place(k!)]
        const words = Math.ceil(nb / 32)
        const blocks = zeros([1, heads, nb, words], { dtype: 'int32', device })
        const [distances] = run('flexprefill', {
          q: x,
          k: y,
          blocks,
          block,
          coverage: mode === 'coverage',
        })
        const found = await (distances as Tensor<'float32'>).read()
        const expected = range(heads).map((head) =>
          selectionOf(q!, k!, n, heads, head, { ...base, mode }),
        )
        for (const [head, { distance, masses, chosen, aware, near }] of expected.entries()) {
          expect(distance).toBeLessThanOrEqual(Math.sqrt(Math.log(2)))
          expect(Math.abs(found[head]! - distance)).toBeLessThan(1e-3)
          // of `coverage` the part beyond the last diagonal is none
          for (const mass of mode === 'coverage' ? masses.slice(0, 3) : masses)
            expect(mass.reduce((sum, p) => sum + p, 0)).toBeCloseTo(1, 9)
          if (mode === 'coverage' && !aware && !near)
            for (const [i, list] of chosen.entries())
              expect(list.reduce((sum, c) => sum + masses[i + 2]![c]!, 0)).toBeGreaterThan(
                base.gamma - 1e-6,
              )
        }
        const options = { ...base, mode }
        const mask = flexPrefill(x, y, options)
        // no factor that q and k share is seen, nor where a head stands
        const factor = (t: Tensor<'float32'>, by: number) => mul(t, tensor([by], [1], { device }))
        const scaled = flexPrefill(factor(x, 4), factor(y, 0.25), options)
        const turned = flexPrefill(turnHeads(x), turnHeads(y), options)
        // nor what all keys have in common, which costs a digit
        const shift = tensor(rng.normals(heads * d), [1, 1, heads, d], { device })
        const moved = flexPrefill(x, add(y, shift), options)
        for (const head of range(heads)) {
          const set = await pairsOf(mask, head, nb)
          expect(await pairsOf(scaled, head, nb)).toEqual(set)
          expect(await pairsOf(turned, (head + 1) % heads, nb)).toEqual(set)
          if (!expected[head]!.near) expect(await pairsOf(moved, head, nb)).toEqual(set)
        }
        // budgets of lines and blocks
        const lines = { ...options, tau: 0 }
        let before = new Set<number>()
        for (const minBudget of [0, 100, 256, 512]) {
          const set = await pairsOf(flexPrefill(x, y, { ...lines, minBudget }), 0, nb)
          for (const pair of before) expect(set.has(pair)).toBe(true)
          before = set
        }
        const least = await sizeOf(flexPrefill(x, y, { ...lines, minBudget: 128, maxBudget: 128 }))
        const free = await sizeOf(flexPrefill(x, y, { ...lines, minBudget: 128 }))
        least.forEach((size, head) => {
          expect(size).toBeLessThanOrEqual(free[head]!)
        })
      }
  })

  it('finds what is planted, and comes closer to dense with gamma', async () => {
    const rng = random(99)
    const [n, d, block] = [1000, 32, 64]
    const nb = Math.ceil(n / block)
    const options = { block, minBudget: 0, gamma: 0.8 } as const
    const place = (x: Float32Array) => tensor(x, [1, n, 1, d], { device })
    // all queries want one key
    const at = block + rng.below(n - 3 * block)
    const [q, k] = planted(rng, n, 1, true)
    for (let i = 0; i < n; i++) q![i * d] = 8
    for (let t = 0; t < n; t++) k![t * d] = t === at ? 8 : 0
    for (const mode of ['reference', 'coverage'] as const) {
      // of one block `reference` would take the first alone
      const lines = { ...options, mode, tau: 0, minBudget: 2 * block }
      const set = await pairsOf(flexPrefill(place(q!), place(k!), lines), 0, nb)
      const column = Math.floor(at / block)
      for (let i = column; i < nb; i++)
        expect(set.has(i * nb + column), `${mode} ${at} ${i}`).toBe(true)
    }
    // every block of queries wants a block of keys of its own, and all of them are alike
    const wanted = range(nb).map((i) => rng.below(i + 1))
    const of = (like: (block: number) => number) =>
      place(
        Float32Array.from({ length: n * d }, (_, i) =>
          like(Math.floor(i / d / block)) === i % d ? 8 : 0,
        ),
      )
    const all = { ...options, mode: 'coverage', gamma: 0.99, tau: 0.3 } as const
    const diverse = flexPrefill(
      of((i) => wanted[i]!),
      of((c) => c),
      all,
    )
    const set = await pairsOf(diverse, 0, nb)
    for (const [i, c] of wanted.entries())
      expect(set.has(i * nb + c), `${i} of ${wanted}`).toBe(true)
    expect(set.size).toBeLessThan(nb * 5)

    const [x, y] = planted(rng, n, 1, false).map(place) as [Tensor<'float32'>, Tensor<'float32'>]
    const dense = await attention(x, y, y, { causal: true }).out.read()
    const errors: number[] = []
    for (const gamma of [0.3, 0.8, 0.99, 1]) {
      const mask = flexPrefill(x, y, { ...options, gamma, mode: 'coverage', tau: 0 })
      errors.push(relativeRms(await attention(x, y, y, { mask }).out.read(), dense))
    }
    for (const i of [1, 2, 3]) expect(errors[i]).toBeLessThanOrEqual(errors[i - 1]! * 1.25 + 1e-6)
    expect(errors[0]).toBeGreaterThan(0.01)
    expect(errors[3]).toBeLessThan(1e-5)
  })

  it('selects chunks, batches and packed sequences as it does single ones', async () => {
    const rng = random(93)
    const [q, k] = planted(rng, 640, 2, false).map((x) => tensor(x, [1, 640, 2, 32], { device }))
    const options = { gamma: 0.8, minBudget: 0, block: 64 } as const
    const whole = await pairsOf(flexPrefill(q!, k!, options), 1, 10)
    const chunk = flexPrefill(q!.slice(1, 320), k!, options)
    expect(chunk.blocks!.shape).toEqual([1, 2, 5, 1])
    const cu = [0, 640, 740]
    const join = (x: typeof q) => {
      const all = tensor(new Float32Array(740 * 64), [1, 740, 2, 32], { device })
      all.slice(1, 0, 640).copyFrom(x!)
      all.slice(1, 640).copyFrom(x!.slice(1, 0, 100))
      return all
    }
    const [pq, pk] = [join(q), join(k)]
    const packed = flexPrefill(pq, pk, { ...options, cuSeqlensQ: cu, cuSeqlensK: cu })
    expect(packed.blocks!.shape[2]).toBe(13)
    const bits = await packed.blocks!.read()
    const single = await flexPrefill(q!, k!, options).blocks!.read()
    for (let head = 0; head < 2; head++)
      for (let r = 0; r < 10; r++) expect(bits[head * 13 + r]).toBe(single[head * 10 + r])
    const { out } = attention(pq, pk, pk, { mask: packed })
    const alone = attention(q!, k!, k!, { mask: flexPrefill(q!, k!, options) }).out
    expect(maxError(await out.slice(1, 0, 640).read(), await alone.read())).toBeLessThan(1e-5)
    expect(whole.size).toBeGreaterThan(10)
  })

  it('covers a diagonal wherever a chunk begins', async () => {
    // Query i wants the key 198 before it: three blocks and a bit, or four for most rows of a block that begins late
    const [n, d, away] = [1024, 64, 198]
    const codes = random(97).normals(n * d)
    const row = (t: number) => codes.subarray(t * d, (t + 1) * d)
    const k = tensor(codes, [1, n, 1, d], { device })
    const q = tensor(
      Float32Array.from(
        { length: n * d },
        (_, i) => 1.5 * row(Math.max(Math.floor(i / d) - away, 0))[i % d]!,
      ),
      [1, n, 1, d],
      { device },
    )
    for (const begin of [384, 400, 416, 447]) {
      const options = { mode: 'coverage', gamma: 0.8, tau: 0, minBudget: 0, block: 64 } as const
      const mask = flexPrefill(q.slice(1, begin), k, options)
      const dense = await mask.toDense()
      let seen = 0
      for (let i = begin; i < n; i++) seen += dense[(i - begin) * n + i - away]!
      expect(seen / (n - begin), `${begin}`).toBeGreaterThan(0.8)
      expect(await mask.density()).toBeLessThan(0.6)
    }
  })

  it('attends to all of short sequences and to what it chooses of long ones', async () => {
    const rng = random(95)
    const [q, k] = planted(rng, 640, 2, false).map((x) => tensor(x, [1, 640, 2, 32], { device }))
    const options = { gamma: 0.5, minBudget: 0, block: 64 } as const
    const bytes = async ({ out }: { out: Tensor }) => Buffer.from((await out.read()).buffer)
    const dense = await bytes(attention(q!, k!, k!, { causal: true }))
    for (const denseBelow of [undefined, 640]) {
      const out = await bytes(flexPrefillAttention(q!, k!, k!, { ...options, denseBelow }))
      expect(out.equals(dense), `${denseBelow}`).toBe(true)
    }
    const mask = flexPrefill(q!, k!, options)
    const sparse = await bytes(attention(q!, k!, k!, { mask }))
    const own = await bytes(flexPrefillAttention(q!, k!, k!, { ...options, denseBelow: 639 }))
    expect(own.equals(sparse)).toBe(true)
    expect(own.equals(dense)).toBe(false)
    const last = q!.slice(1, 639)
    const step = await bytes(flexPrefillAttention(last, k!, k!, { ...options, denseBelow: 0 }))
    expect(step.equals(await bytes(attention(last, k!, k!, { causal: true })))).toBe(true)
    // so is one query of a packed sequence
    const cuSeqlensQ = [0, 1, 201]
    const several = { cuSeqlensQ, cuSeqlensK: [0, 440, 640] }
    const some = q!.slice(1, 439)
    const of = async (x: { out: Tensor<FloatDType> }, from: number, to: number) =>
      x.out.slice(1, from, to).read({ as: 'float32' })
    const mixed = flexPrefillAttention(some, k!, k!, { ...options, ...several, denseBelow: 0 })
    const causal = attention(some, k!, k!, { causal: true, ...several })
    expect(maxError(await of(mixed, 0, 1), await of(causal, 0, 1))).toBeLessThan(1e-5)
    expect(maxError(await of(mixed, 1, 201), await of(causal, 1, 201))).toBeGreaterThan(1e-3)
    // the first of two packed sequences is long
    const cu = [0, 440, 640]
    const packed = { ...options, cuSeqlensQ: cu, cuSeqlensK: cu }
    const { out } = flexPrefillAttention(q!, k!, k!, { ...packed, denseBelow: 300 })
    const [first, second] = [q!.slice(1, 0, 440), q!.slice(1, 440)]
    const keys = [k!.slice(1, 0, 440), k!.slice(1, 440)] as const
    const chosen = attention(first, keys[0], keys[0], {
      mask: flexPrefill(first, keys[0], options),
    })
    const all = attention(second, keys[1], keys[1], { causal: true })
    expect(maxError(await out.slice(1, 0, 440).read(), await chosen.out.read())).toBeLessThan(1e-5)
    expect(maxError(await out.slice(1, 440).read(), await all.out.read())).toBeLessThan(1e-5)
    const whole = await bytes(
      attention(q!, k!, k!, { causal: true, cuSeqlensQ: cu, cuSeqlensK: cu }),
    )
    expect((await bytes(flexPrefillAttention(q!, k!, k!, packed))).equals(whole)).toBe(true)
  })

  it('takes query heads that their kv heads take in turns', async () => {
    const rng = random(96)
    const [flat, keys] = planted(rng, 640, 6, false)
    const q = tensor(flat!, [1, 640, 6, 32], { device })
    const k = tensor(keys!, [1, 640, 6, 32], { device }).slice(2, 0, 2)
    const options = { gamma: 0.6, minBudget: 0, block: 64, gqaInterleave: true } as const
    const mask = flexPrefill(q, k, options)
    const { out, lse } = flexPrefillAttention(q, k, k, { ...options, denseBelow: 0 })
    for (let head = 0; head < 6; head++) {
      const own = q.slice(2, head, head + 1)
      const kv = k.slice(2, head % 2, (head % 2) + 1)
      const single = flexPrefill(own, kv, { ...options, gqaInterleave: false })
      expect(await pairsOf(mask, head, 10)).toEqual(await pairsOf(single, 0, 10))
      const alone = attention(own, kv, kv, { mask: single })
      const of = (x: Tensor<FloatDType>, axis: number) =>
        x.slice(axis, head, head + 1).read({ as: 'float32' })
      expect(maxError(await of(out, 2), await alone.out.read())).toBeLessThan(1e-5)
      expect(maxError(await of(lse, 1), await alone.lse.read())).toBeLessThan(1e-5)
    }
  })

  it('takes a budget without end for none', async () => {
    const [q, k] = planted(random(101), 640, 2, false).map((x) =>
      tensor(x, [1, 640, 2, 32], { device }),
    )
    const options = { gamma: 0.8, minBudget: 0, block: 64 } as const
    const free = await flexPrefill(q!, k!, options).blocks!.read()
    for (const maxBudget of [640, 2 ** 60, Number.POSITIVE_INFINITY])
      expect(await flexPrefill(q!, k!, { ...options, maxBudget }).blocks!.read()).toEqual(free)
  })

  it('refuses what it cannot select', async () => {
    const rng = random(94)
    const q = await sample(rng, [1, 300, 1, 16], 'float32', device)
    const call = (options: object) => failure(() => flexPrefill(q.tensor, q.tensor, options))
    expect((await call({ gamma: 0 })).message).toBe('flexPrefill: gamma must be above 0, got 0')
    expect((await call({ block: 48 })).code).toBe('ERR_ARGUMENT')
    expect((await call({ minBudget: 512, maxBudget: 100 })).message).toBe(
      'flexPrefill: maxBudget must be at least minBudget = 512, got 100',
    )
    const attend = (options: object) =>
      failure(() => flexPrefillAttention(q.tensor, q.tensor, q.tensor, options))
    expect((await attend({ gamma: 0 })).message).toBe(
      'flexPrefillAttention: gamma must be above 0, got 0',
    )
    expect((await attend({ denseBelow: -1 })).message).toBe(
      'flexPrefillAttention: denseBelow must be an integer at least 0, got -1',
    )
    expect((await attend({ cuSeqlensQ: 1, cuSeqlensK: 1 })).message).toBe(
      'flexPrefillAttention: cuSeqlensQ must be an array of numbers, got 1',
    )
    const short = await failure(() => flexPrefill(q.tensor, q.tensor.slice(1, 0, 200)))
    expect(short.message).toBe('flexPrefill: sq must be at most sk, got 300 and 200')
    // nor what its operators do not take
    const other = q.tensor.cast('bfloat16') as never
    const mixed = await failure(() => flexPrefill(q.tensor, other, { block: 64, minBudget: 0 }))
    expect(mixed.message).toContain('flexPrefill: k must be float32, got bfloat16')
    const values = await failure(() => flexPrefillAttention(q.tensor, q.tensor, other))
    expect(values.message).toContain('flexPrefillAttention: v must be float32, got bfloat16')
    // whether a selection would look at them or not
    const eight = q.tensor.cast('float8_e4m3fn') as never
    for (const options of [{}, { minBudget: 0, block: 64 }, { gamma: 1 }])
      for (const bad of [
        failure(() => flexPrefill(eight, eight, options)),
        failure(() => flexPrefillAttention(eight, eight, eight, options)),
      ])
        expect((await bad).message).toMatch(
          /^flexPrefill(Attention)?: q must be float32, float16 or bfloat16, got float8_e4m3fn$/,
        )
    const wide = zeros([1, 300, 1, 257], { device })
    expect((await failure(() => flexPrefill(wide, wide))).message).toBe(
      'flexPrefill: q must be [b, sq, hq, d] with d from 1 to 256, got d = 257',
    )
    const packed = { cuSeqlensQ: [0, 150, 300], cuSeqlensK: [0, 20, 300] }
    for (const [name, call] of Object.entries({
      flexPrefill: () => flexPrefill(q.tensor, q.tensor, packed),
      flexPrefillAttention: () => flexPrefillAttention(q.tensor, q.tensor, q.tensor, packed),
      streaming: () => streaming(q.tensor, q.tensor, packed),
    }))
      expect((await failure(call as () => unknown)).message).toBe(
        `${name}: sq must be at most sk, got 150 and 20`,
      )
    const two = zeros([2, 10, 1, 16], { device })
    const offsets = { cuSeqlensQ: [0, 10], cuSeqlensK: [0, 10] }
    expect((await failure(() => streaming(two, two, offsets))).message).toBe(
      'streaming: b must be 1 with cuSeqlensQ, got 2',
    )
  })

  it('is dense for one query', async () => {
    const rng = random(99)
    const q = await sample(rng, [1, 1, 2, 16], 'float32', device)
    const k = await sample(rng, [1, 1000, 2, 16], 'float32', device)
    const mask = flexPrefill(q.tensor, k.tensor, { gamma: 0.5, minBudget: 0, block: 64 })
    expect(await mask.density()).toBe(1)
  })
})
