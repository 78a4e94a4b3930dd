import {
  bytesPerElement,
  type DType,
  dtypes,
  memory,
  scope,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { type Random, random } from '../support/random.js'

// A view by its definition: which element of the base stands at each place, in row-major order
interface Places {
  shape: readonly number[]
  at: readonly number[]
}

const product = (sizes: readonly number[]) => sizes.reduce((all, size) => all * size, 1)

function coordinates(shape: readonly number[]): number[][] {
  return shape.reduce<number[][]>(
    (list, size) => list.flatMap((one) => Array.from({ length: size }, (_, i) => [...one, i])),
    [[]],
  )
}

function lookUp({ shape, at }: Places, c: readonly number[]): number {
  return at[c.reduce((place, i, dimension) => place * shape[dimension]! + i, 0)]!
}

// A new shape, and for each of its coordinates the old one
function viewed(
  from: Places,
  shape: readonly number[],
  old: (c: readonly number[]) => readonly number[],
): Places {
  return { shape, at: coordinates(shape).map((c) => lookUp(from, old(c))) }
}

// Whether strides exist under which these places lie one after the other
function isStrided({ shape, at }: Places): boolean {
  if (at.length === 0) return true
  const steps = shape.map((size, i) => {
    if (size === 1) return 0
    const one = shape.map((_, j) => (i === j ? 1 : 0))
    return lookUp({ shape, at }, one) - at[0]!
  })
  return coordinates(shape).every(
    (c, i) => at[i] === c.reduce((sum, x, j) => sum + x * steps[j]!, at[0]!),
  )
}

function factors(rng: Random, size: number): number[] {
  if (size === 0) return rng.pick([[0], [2, 0], [0, 3, 1]])
  const shape: number[] = []
  let rest = size
  while (rest > 1) {
    const divisors = Array.from({ length: rest }, (_, i) => i + 1).filter((i) => rest % i === 0)
    const factor = rng.pick(divisors)
    if (shape.length > 6) break
    shape.push(factor)
    rest /= factor
  }
  return rest === 1 && shape.length > 0 ? shape : [...shape, rest]
}

interface Step {
  text: string
  apply(x: Tensor): Tensor
  /** The same on places. */
  move(places: Places): Places
}

function step(rng: Random, shape: readonly number[]): Step {
  const rank = shape.length
  const kinds = ['reshape', 'expand', 'contiguous', 'to']
  if (rank > 0) kinds.push('slice', 'slice', 'slice', 'transpose', 'transpose', 'select')
  const kind = rng.pick(kinds)
  const spell = (dimension: number) => (rng.chance(0.3) ? dimension - rank : dimension)
  const d = rng.below(Math.max(rank, 1))
  switch (kind) {
    case 'slice': {
      const size = shape[d]!
      const some = () => rng.below(2 * size + 4) - size - 2
      const first = rng.below(Math.max(size, 1))
      const last = first + 1 + rng.below(size - first + 1)
      const [start, end] = rng.chance(0.15)
        ? [some(), some()]
        : [rng.chance(0.3) ? first - size : first, rng.chance(0.3) ? undefined : last]
      const kept = Array.from({ length: size }, (_, i) => i).slice(start, end)
      const [dimension, next] = [spell(d), shape.with(d, kept.length)]
      return {
        text: `slice(${dimension}, ${start}, ${end})`,
        move: (places) => viewed(places, next, (c) => c.with(d, kept[c[d]!]!)),
        apply: (x) => x.slice(dimension, start, end),
      }
    }
    case 'select': {
      const size = shape[d]!
      if (size === 0) return step(rng, shape)
      const i = rng.below(size)
      const [dimension, index] = [spell(d), rng.chance(0.3) ? i - size : i]
      return {
        text: `select(${dimension}, ${index})`,
        move: (places) => viewed(places, shape.toSpliced(d, 1), (c) => c.toSpliced(d, 0, i)),
        apply: (x) => x.select(dimension, index),
      }
    }
    case 'transpose': {
      const e = rng.below(rank)
      const [a, b] = [spell(d), spell(e)]
      const swap = (list: readonly number[]) => list.with(d, list[e]!).with(e, list[d]!)
      return {
        text: `transpose(${a}, ${b})`,
        move: (places) => viewed(places, swap(shape), swap),
        apply: (x) => x.transpose(a, b),
      }
    }
    case 'reshape': {
      const next = factors(rng, product(shape))
      const open = rng.below(next.length)
      const asked = product(shape) > 0 && rng.chance(0.3) ? next.with(open, -1) : next
      return {
        text: `reshape([${asked}])`,
        move: ({ at }) => ({ shape: next, at }),
        apply: (x) => x.reshape(asked),
      }
    }
    case 'expand': {
      const lead = rank < 6 ? factors(rng, rng.pick([1, 2, 3])).slice(0, 2) : []
      const grown = shape.map((size) =>
        size === 1 && rng.chance(0.5) ? rng.pick([0, 2, 3, 4, 5]) : size,
      )
      const next = [...lead, ...grown]
      if (product(next) > 200) return step(rng, shape)
      return {
        text: `expand([${next}])`,
        move: (places) =>
          viewed(places, next, (c) => c.slice(lead.length).map((i, j) => (shape[j] === 1 ? 0 : i))),
        apply: (x) => x.expand(next),
      }
    }
    default:
      return {
        text: kind,
        move: (places) => places,
        apply: (x) => (kind === 'to' ? x.to(x.device) : x.contiguous()),
      }
  }
}

// Bit patterns of a dtype, no two neighbours the same; a bool is 0 or 1
function patterns(rng: Random, dtype: DType, count: number) {
  const bytes = Uint8Array.from({ length: count * bytesPerElement[dtype] }, () =>
    dtype === 'bool' ? rng.below(2) : rng.below(256),
  ).buffer
  switch (dtype) {
    case 'float32':
      return new Float32Array(bytes)
    case 'int32':
      return new Int32Array(bytes)
    case 'int64':
      return new BigInt64Array(bytes)
    default:
      return bytesPerElement[dtype] === 2 ? new Uint16Array(bytes) : new Uint8Array(bytes)
  }
}

const baseShape = (rng: Random) =>
  Array.from({ length: rng.below(5) }, () => rng.pick([1, 2, 3, 4, 5]))
const identity = (shape: readonly number[]): Places => ({
  shape,
  at: Array.from({ length: product(shape) }, (_, i) => i),
})
const hex = (x: ArrayBufferView) =>
  Buffer.from(x.buffer, x.byteOffset, x.byteLength).toString('hex')

describeDevices('views', (device) => {
  it.each(dtypes)('chains of views are what they are by definition, %s', async (dtype) => {
    const rng = random(80 + dtypes.indexOf(dtype))
    const counts = { reshaped: 0, refused: 0, empty: 0 }
    for (let n = 0; n < 400; n++) {
      const shape = baseShape(rng)
      const data = patterns(rng, dtype, product(shape))
      const size = bytesPerElement[dtype]
      const bits = new Uint8Array(data.buffer)
      const base = tensor(data, shape, { dtype, device })
      let view: Tensor = base
      let places = identity(shape)
      // where each element of the view lies in memory, which a copy changes
      let inMemory = places
      let trace = `[${shape}]`
      for (let length = 1 + rng.below(7); length > 0; length--) {
        const next = step(rng, view.shape)
        trace += `.${next.text}`
        const reshaped = next.text.startsWith('reshape')
        const moved = next.move(inMemory)
        if (reshaped && !isStrided(moved)) {
          const error = await failure(() => next.apply(view))
          expect(error, trace).toMatchObject({ code: 'ERR_SHAPE', op: 'reshape' })
          expect(error.message).toContain('would need a copy')
          counts.refused++
          view = view.contiguous()
          inMemory = identity(view.shape)
          continue
        }
        if (reshaped) counts.reshaped++
        inMemory = next.text === 'contiguous' && !view.isContiguous ? identity(view.shape) : moved
        view = next.apply(view)
        places = next.move(places)
        if (view.size > 0) {
          const dense = inMemory.at.every((place, i) => place === inMemory.at[0]! + i)
          expect(view.isContiguous, trace).toBe(dense)
        }
      }
      if (view.size === 0) counts.empty++
      expect(view.shape, trace).toEqual(places.shape)
      expect(view.dtype).toBe(dtype)
      const expected = new Uint8Array(places.at.length * size)
      places.at.forEach((from, to) =>
        expected.set(bits.subarray(from * size, (from + 1) * size), to * size),
      )
      expect(hex(await view.read()), trace).toBe(hex(expected))
      expect(hex(await view.contiguous().read()), trace).toBe(hex(expected))
      expect(hex(await view.clone().read()), trace).toBe(hex(expected))
    }
    expect(Math.min(...Object.values(counts)), JSON.stringify(counts)).toBeGreaterThan(5)
  })

  it('writing through a view changes what it shows and nothing else', async () => {
    const rng = random(90)
    for (let n = 0; n < 500; n++) {
      const dtype = rng.pick(dtypes)
      const shape = [...baseShape(rng), rng.pick([2, 3, 9])]
      const base = zeros(shape, { dtype, device })
      let view: Tensor = base
      let places = identity(shape)
      let trace = `${dtype} [${shape}]`
      for (let length = 1 + rng.below(5); length > 0; length--) {
        const next = step(rng, view.shape)
        const moved = next.move(places)
        // an element must not stand in two places, nor in a copy
        if (next.text.startsWith('expand')) continue
        if (next.text === 'contiguous' && !view.isContiguous) continue
        if (next.text.startsWith('reshape') && !isStrided(moved)) continue
        trace += `.${next.text}`
        view = next.apply(view)
        places = moved
      }
      const values = Float32Array.from(places.at, () => (dtype === 'bool' ? 1 : 1 + rng.below(8)))
      if (rng.chance(0.5)) view.write(values)
      else view.copyFrom(tensor(values, view.shape, { device }))
      const expected = new Float32Array(product(shape))
      places.at.forEach((to, i) => {
        expected[to] = values[i]!
      })
      expect(await base.read({ as: 'float32' }), trace).toEqual(expected)
      expect(await view.read({ as: 'float32' }), trace).toEqual(values)
    }
  })

  it('copies between views of any two dtypes, laid out in any way', async () => {
    const rng = random(91)
    for (let n = 0; n < 1000; n++) {
      const [from, to] = [rng.pick(dtypes), rng.pick(dtypes)]
      const shape = Array.from({ length: 1 + rng.below(4) }, () => rng.pick([1, 2, 3, 9, 17]))
      if (product(shape) > 1000) continue
      // dimensions in another order, with a margin around
      const placed = (dtype: DType) => {
        const order = shape.map((_, i) => i).sort(() => rng.next() - 0.5)
        const margins = order.map(() => [rng.below(2), rng.below(3)] as const)
        const wide = order.map((i, j) => margins[j]![0] + shape[i]! + margins[j]![1])
        const base = zeros(wide, { dtype, device })
        let places = identity(wide)
        let view: Tensor = base
        order.forEach((i, j) => {
          const start = margins[j]![0]
          view = view.slice(j, start, start + shape[i]!)
          places = viewed(places, view.shape, (c) => c.with(j, c[j]! + start))
        })
        const now = [...order]
        for (let i = 0; i < now.length; i++) {
          const j = now.indexOf(i)
          if (i === j) continue
          view = view.transpose(i, j)
          const swap = (list: readonly number[]) => list.with(i, list[j]!).with(j, list[i]!)
          places = viewed(places, view.shape, swap)
          now[j] = now[i]!
          now[i] = i
        }
        return { base, view, places, count: product(wide) }
      }
      const [source, target] = [placed(from), placed(to)]
      const what = `${from} [${source.view.strides}] to ${to} [${target.view.strides}] of [${shape}]`
      const values = Float32Array.from({ length: product(shape) }, () => rng.below(9))
      source.view.write(values)
      target.view.copyFrom(source.view)
      const bool = from === 'bool' || to === 'bool'
      const seen = values.map((x) => (bool ? Number(x !== 0) : x))
      const expected = new Float32Array(target.count)
      target.places.at.forEach((at, i) => {
        expected[at] = seen[i]!
      })
      expect(target.view.shape).toEqual(shape)
      expect(await target.base.read({ as: 'float32' }), what).toEqual(expected)
      expect(await source.view.cast(to).read({ as: 'float32' }), what).toEqual(seen)
    }
  })

  it('copies large transposed tensors whole', async () => {
    const rng = random(92)
    for (const [rows, columns] of [
      [1000, 700],
      [8, 4099],
      [4099, 7],
      [513, 512],
    ] as const) {
      const data = rng.normals(rows * columns)
      const x = tensor(data, [rows, columns], { device })
      const turned = await x.transpose(0, 1).read()
      const wrong = turned.findIndex(
        (value, i) => value !== data[(i % rows) * columns + Math.floor(i / rows)],
      )
      expect(wrong, `${rows} ${columns}`).toBe(-1)
      const back = zeros([rows, columns], { device })
      back.transpose(0, 1).copyFrom(tensor(turned, [columns, rows], { device }))
      expect(maxError(await back.read(), data)).toBe(0)
    }
  })

  it('copies between views of the same memory as between others', async () => {
    const rng = random(92)
    for (let n = 0; n < 100; n++) {
      const [from, to] = [rng.pick(['slice', 'turn']), rng.pick(['slice', 'turn'])]
      const [rows, inner] = [rng.pick([2, 9, 40]), rng.pick([1, 3])]
      const base = tensor(rng.normals(rows * rows * inner), [rows, rows, inner], { device })
      const part = (x: Tensor) => x.slice(0, rng.below(2)).slice(1, rng.below(2))
      const views = [from, to].map((kind) =>
        part(kind === 'turn' ? base.transpose(0, 1) : base),
      ) as [Tensor, Tensor]
      const [a, b] = [0, 1].map((i) => Math.min(...views.map((x) => x.shape[i]!))) as [
        number,
        number,
      ]
      const [source, target] = views.map((x) => x.slice(0, 0, a).slice(1, 0, b)) as [Tensor, Tensor]
      const expected = await source.read()
      target.copyFrom(source)
      expect(await target.read(), `${from} ${to} ${base.shape}`).toEqual(expected)
      for (const one of [base, ...views, source, target]) one.dispose()
    }
  })

  it('is not written where elements share memory', async () => {
    const x = tensor([1, 2, 3], [1, 3], { device }).expand([2, 3])
    expect((await failure(() => x.write([1, 2, 3, 4, 5, 6]))).message).toBe(
      'write: elements must not share memory, got strides [0, 1]; call contiguous() first',
    )
    expect((await failure(() => x.copyFrom(x))).op).toBe('copyFrom')
    expect([...(await x.read())]).toEqual([1, 2, 3, 1, 2, 3])
    x.slice(0, 0, 1).write([4, 5, 6])
    expect([...(await x.read())]).toEqual([4, 5, 6, 4, 5, 6])
  })

  it('is contiguous or a copy', async () => {
    const x = tensor([1, 2, 3, 4, 5, 6], [2, 3], { device })
    const same = x.contiguous()
    same.write([6, 5, 4, 3, 2, 1])
    expect([...(await x.read())]).toEqual([6, 5, 4, 3, 2, 1])
    const copy = x.transpose(0, 1).contiguous()
    expect(copy.strides).toEqual([2, 1])
    copy.write([0, 0, 0, 0, 0, 0])
    const clone = x.clone()
    clone.write([0, 0, 0, 0, 0, 0])
    expect([...(await x.read())]).toEqual([6, 5, 4, 3, 2, 1])
    expect(x.transpose(0, 1).isContiguous).toBe(false)
    expect(x.slice(0, 1).isContiguous).toBe(true)
    expect(x.slice(1, 1).isContiguous).toBe(false)
    expect(x.slice(1, 1).slice(0, 0, 1).isContiguous).toBe(true)
  })

  it('keeps the memory after the base was disposed', async () => {
    const base = tensor([1, 2, 3, 4, 5, 6], [2, 3], { device })
    const bytes = memory(device).bytes
    const views = [base.select(0, 1), base.transpose(0, 1), base.contiguous(), base.to(device)]
    const inner = base.slice(0, 1).slice(1, 1)
    base.dispose()
    expect(base.disposed).toBe(true)
    expect([...(await views[0]!.read())]).toEqual([4, 5, 6])
    expect([...(await views[1]!.read())]).toEqual([1, 4, 2, 5, 3, 6])
    for (const view of views) {
      expect(view.disposed).toBe(false)
      view.dispose()
    }
    expect([...(await inner.read())]).toEqual([5, 6])
    // filled again, memory that was freed too early would show
    const others = Array.from({ length: 50 }, () => zeros([2, 3], { device }))
    expect([...(await inner.read())]).toEqual([5, 6])
    for (const other of others) other.dispose()
    inner.dispose()
    expect(memory(device).bytes).toBeLessThanOrEqual(bytes)
  })

  it('keeps the memory beyond a scope', async () => {
    const view = scope(() => tensor([1, 2, 3, 4], [2, 2], { device }).transpose(0, 1))
    expect([...(await view.read())]).toEqual([1, 3, 2, 4])
  })

  describe('errors', () => {
    const x = () => zeros([2, 3], { device })
    it.each<[string, string, string | undefined, (x: Tensor) => unknown]>([
      ['slice', 'ERR_ARGUMENT', 'dimension', (x) => x.slice(2, 0)],
      ['slice', 'ERR_ARGUMENT', 'dimension', (x) => x.slice(-3, 0)],
      ['slice', 'ERR_ARGUMENT', 'dimension', (x) => x.slice(0.5, 0)],
      ['slice', 'ERR_ARGUMENT', 'start', (x) => x.slice(0, Number.NaN)],
      ['slice', 'ERR_ARGUMENT', 'start', (x) => x.slice(0, '1' as never)],
      ['slice', 'ERR_ARGUMENT', 'end', (x) => x.slice(0, 0, 1.5)],
      ['slice', 'ERR_ARGUMENT', 'end', (x) => x.slice(0, 0, Number.POSITIVE_INFINITY)],
      ['select', 'ERR_ARGUMENT', 'index', (x) => x.select(0, 2)],
      ['select', 'ERR_ARGUMENT', 'index', (x) => x.select(0, -3)],
      ['select', 'ERR_ARGUMENT', 'index', (x) => x.slice(0, 2).select(0, 0)],
      ['select', 'ERR_ARGUMENT', 'dimension', (x) => x.select(2, 0)],
      ['transpose', 'ERR_ARGUMENT', 'a', (x) => x.transpose(2, 0)],
      ['transpose', 'ERR_ARGUMENT', 'b', (x) => x.transpose(0, -3)],
      ['transpose', 'ERR_ARGUMENT', 'a', (x) => x.select(0, 0).select(0, 0).transpose(0, 0)],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([7])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([4, -1])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([-1, -1])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([0, -1])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.reshape([2 ** 40, 2 ** 40, -1])],
      ['reshape', 'ERR_SHAPE', 'shape', (x) => x.transpose(0, 1).reshape([6])],
      ['reshape', 'ERR_ARGUMENT', 'shape[0]', (x) => x.reshape([-2])],
      ['reshape', 'ERR_ARGUMENT', 'shape[1]', (x) => x.reshape([6, 1.5])],
      ['reshape', 'ERR_ARGUMENT', 'shape', (x) => x.reshape(6 as never)],
      ['expand', 'ERR_SHAPE', 'shape', (x) => x.expand([3])],
      ['expand', 'ERR_SHAPE', 'shape', (x) => x.expand([])],
      ['expand', 'ERR_SHAPE', 'shape', (x) => x.expand([2, 6])],
      ['expand', 'ERR_SHAPE', 'shape', (x) => x.expand([2, 3, 1])],
      ['expand', 'ERR_SHAPE', 'shape', (x) => x.slice(0, 0, 1).expand([2 ** 12, 2 ** 52, 3])],
      ['expand', 'ERR_ARGUMENT', 'shape[0]', (x) => x.slice(0, 0, 1).expand([-1, 3])],
      ['expand', 'ERR_ARGUMENT', 'shape[0]', (x) => x.slice(0, 0, 1).expand(['2' as never, 3])],
      ['expand', 'ERR_ARGUMENT', 'shape[0]', (x) => x.slice(0, 0, 1).expand([1.5, 3])],
      ['expand', 'ERR_ARGUMENT', 'shape', (x) => x.expand(undefined as never)],
      ['copyFrom', 'ERR_SHAPE', 'source', (x) => x.copyFrom(x.reshape([3, 2]))],
      ['copyFrom', 'ERR_SHAPE', 'source', (x) => x.copyFrom(x.reshape([1, 2, 3]))],
      ['copyFrom', 'ERR_ARGUMENT', 'source', (x) => x.copyFrom({ shape: [2, 3] } as never)],
      ['cast', 'ERR_ARGUMENT', 'dtype', (x) => x.cast('float64' as never)],
      ['to', 'ERR_ARGUMENT', 'device', (x) => x.to('gpu' as never)],
      ['to', 'ERR_DEVICE', 'device', (x) => x.to('cuda:99')],
    ])('%s throws %s for %s (%#)', async (op, code, argument, use) => {
      const error = await failure(() => use(x()))
      expect(error).toMatchObject({ code, op, argument })
      expect(error.message.startsWith(`${op}: `)).toBe(true)
    })

    it('leaves the tensor as it was', async () => {
      const kept = tensor([1, 2, 3, 4, 5, 6], [2, 3], { device })
      await failure(() => kept.reshape([5]))
      await failure(() => kept.copyFrom(zeros([2], { device })))
      expect([...(await kept.read())]).toEqual([1, 2, 3, 4, 5, 6])
    })
  })
})
