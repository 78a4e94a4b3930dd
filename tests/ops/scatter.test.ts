import {
  attention,
  type DType,
  dtypes,
  empty,
  graph,
  memory,
  randn,
  scatter,
  scope,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random } from '../support/random.js'

describeDevices('scatter', (device) => {
  const bytesOf = async (x: Tensor) => Buffer.from((await x.read()).buffer)
  const indicesOf = (values: readonly number[], shape: readonly number[], dtype: DType = 'int32') =>
    tensor(values, shape, { dtype, device }) as Tensor<'int32' | 'int64'>

  it.each(dtypes)('writes rows of %s where indices say', async (dtype) => {
    const rng = random(610)
    for (let n = 0; n < 12; n++) {
      const [pages, size] = [rng.pick([1, 3, 7]), rng.pick([1, 4, 16])]
      const row = rng.pick([[], [5], [8], [2, 24], [3, 1, 7]])
      const wide = rng.chance(0.3)
      const draw = (shape: readonly number[], seed: number) =>
        randn(shape, { seed, device }).cast('uint8').cast(dtype)
      // with pages of something else between, as where keys and values share pages
      const all = draw([pages, wide ? 2 : 1, size, ...row], 1)
      const to = all.select(1, 0)
      const [b, s] = [rng.pick([1, 2]), rng.pick([1, 3])]
      const left = Array.from({ length: pages * size }, (_, i) => i)
      const places = Array.from({ length: b * s }, () =>
        rng.chance(0.2) || left.length === 0 ? -1 : left.splice(rng.below(left.length), 1)[0]!,
      )
      const wider = draw([b, s, 2, ...row], 2)
      const from = rng.chance(0.5) ? wider.select(2, 1) : wider.select(2, 1).contiguous()
      const [before, rows] = [await bytesOf(all), await bytesOf(from)]
      const width = rows.length / (b * s)
      places.forEach((place, i) => {
        if (place < 0) return
        const at = (Math.floor(place / size) * (wide ? 2 : 1) * size + (place % size)) * width
        rows.copy(before, at, i * width, (i + 1) * width)
      })
      const indices = indicesOf(places, [b, s], rng.pick(['int32', 'int64']))
      expect(scatter(to, indices, from)).toBe(to)
      expect(await bytesOf(all), JSON.stringify({ pages, size, row, places })).toEqual(before)
    }
  })

  it('takes rows of one dimension, of none, and of itself', async () => {
    const x = tensor([10, 11, 12, 13, 14], undefined, { device })
    scatter(x, indicesOf([4, 1], [2]), tensor([1, 2], undefined, { device }))
    expect([...(await x.read())]).toEqual([10, 2, 12, 13, 1])
    scatter(x, indicesOf([0, 1, 2, 3], [4]), x.slice(0, 1)) // each row moves up
    expect([...(await x.read())]).toEqual([2, 12, 13, 1, 1])
    scatter(x, indicesOf([], [0]), empty([0], { device }))
    scatter(zeros([0, 4], { device }), indicesOf([-1], [1]), zeros([1, 4], { device }))
    scatter(x, indicesOf([2], []), tensor([7], [], { device }))
    expect([...(await x.read())]).toEqual([2, 12, 7, 1, 1])
  })

  it('appends to the pages of a cache, in a graph', async () => {
    const [b, size, most] = [3, 4, 4]
    const [hq, hk, d] = [4, 2, 64]
    const lengths = [3, 9, 0]
    const table = [
      [7, 2, 9, 11],
      [0, 10, 5, 3],
      [8, 1, 6, 4],
    ]
    const blockTable = tensor(table.flat(), [b, most], { dtype: 'int32', device })
    const [cacheK, cacheV] = [1, 2].map((seed) =>
      randn([12, size, hk, d], { seed, dtype: 'bfloat16', device }),
    ) as [Tensor<'bfloat16'>, Tensor<'bfloat16'>]
    const step = { q: hq, k: hk, v: hk } as const
    const given = Object.fromEntries(
      Object.entries(step).map(([name, h]) => [
        name,
        zeros([b, 1, h, d], { dtype: 'bfloat16', device }),
      ]),
    ) as Record<keyof typeof step, Tensor<'bfloat16'>>
    const slots = indicesOf([-1, -1, -1], [b, 1])
    const cacheSeqlens = tensor(lengths, [b], { dtype: 'int32', device })
    let out!: Tensor
    const decode = graph(() => {
      scatter(cacheK, slots, given.k)
      scatter(cacheV, slots, given.v)
      out = attention(given.q, cacheK, cacheV, { blockTable, cacheSeqlens, causal: true }).out
      return out
    })
    for (let turn = 0; turn < 5; turn++) {
      const drawn = Object.fromEntries(
        Object.entries(step).map(([name, h], i) => [
          name,
          randn([b, 1, h, d], { seed: 10 * turn + i + 3, dtype: 'bfloat16', device }),
        ]),
      ) as typeof given
      for (const name of ['q', 'k', 'v'] as const) given[name].copyFrom(drawn[name])
      slots.write(lengths.map((n, i) => table[i]![Math.floor(n / size)]! * size + (n % size)))
      for (const i of [0, 1, 2]) lengths[i]!++
      cacheSeqlens.write(lengths)
      decode.replay()
      // by copies of rows, without pages
      for (const [i, n] of lengths.entries()) {
        const row = (cache: Tensor<'bfloat16'>, t: number) =>
          cache.select(0, table[i]![Math.floor(t / size)]!).slice(0, t % size, (t % size) + 1)
        const [k, v] = [cacheK, cacheV].map((cache) => {
          const all = empty([1, n, hk, d], { dtype: 'bfloat16', device })
          for (let t = 0; t < n; t++)
            all.slice(1, t, t + 1).copyFrom(row(cache, t).reshape([1, 1, hk, d]))
          return all
        }) as [Tensor<'bfloat16'>, Tensor<'bfloat16'>]
        expect(await bytesOf(k.slice(1, -1))).toEqual(await bytesOf(drawn.k.slice(0, i, i + 1)))
        const alone = attention(drawn.q.slice(0, i, i + 1), k, v, { causal: true })
        const [found, wanted] = [out.slice(0, i, i + 1), alone.out]
        const read = (x: Tensor) => x.read({ as: 'float32' })
        expect(maxError(await read(found), await read(wanted))).toBeLessThan(0.02)
      }
    }
  })

  it('refuses rows that do not fit, and keeps no memory', async () => {
    const to = zeros([4, 2, 8], { device })
    const one = indicesOf([1], [1])
    await synchronize(device)
    const before = memory(device).tensors
    for (const [make, message] of [
      [
        () => scatter(to, one, zeros([2, 8], { device })),
        'from must begin as indices do, [1], got [2, 8]',
      ],
      [
        () => scatter(to, one, zeros([1, 7], { device })),
        'to must be rows of [7] as from has them, got [4, 2, 8]',
      ],
      [
        () =>
          scatter(zeros([4, 2, 3, 8], { device }).transpose(1, 2), one, zeros([1, 8], { device })),
        /^to must have rows, .*contiguous tensor$/,
      ],
      [
        () => scatter(to, one, zeros([1, 8], { device, dtype: 'float16' }) as never),
        /^from must be float32/,
      ],
      [
        () => scatter(to, to.select(2, 0) as never, zeros([4, 2, 8], { device })),
        /^indices must be int32 or int64/,
      ],
      [() => scatter(to, 3 as never, to), /^indices must be a tensor/],
      [
        () => scatter(zeros([1, 8], { device }).expand([4, 8]), one, zeros([1, 8], { device })),
        'to must be of elements that do not share memory, got strides [0, 1]; call contiguous() first',
      ],
    ] as const) {
      const error = await failure(() => scope(make))
      const text = error.message.replace(/^scatter: /, '')
      expect(error.op).toBe('scatter')
      if (typeof message === 'string') expect(text).toBe(message)
      else expect(text).toMatch(message)
    }
    await synchronize(device)
    expect(memory(device).tensors).toBe(before)
    const beyond = zeros([4, 2, 8], { device })
    scatter(beyond, indicesOf([8], [1]), zeros([1, 8], { device }))
    const error = await failure(() => beyond.read())
    expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'scatter' })
    expect(error.message).toMatch(/indices must be below/)
  })
})
