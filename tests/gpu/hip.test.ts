import { type FloatDType, graph, type HipLists, type HipOptions, hipLists, tensor } from 'heddle'
import { expect, it } from 'vitest'
import { describeGpu } from '../support/gpu.js'
import { random } from '../support/random.js'

interface Problem extends HipOptions {
  dtype: FloatDType
  /** Keys of a page, in descending order. */
  page?: number
  /** Of packed sequences of queries. */
  ends?: number[]
}

// More lists than a GPU has warps for, of which those of a kv head's heads begin together. Products of whole numbers are exact.
const problems: [
  shape: [b: number, sq: number, sk: number, hq: number, hk: number, d: number],
  Problem,
][] = [
  [[1, 820, 1000, 8, 2, 64], { dtype: 'bfloat16', block: [2, 2], topK: 32 }],
  [[2, 541, 700, 6, 2, 128], { dtype: 'float16', block: [2, 4], topK: 20 }],
  [[1, 410, 2000, 8, 4, 200], { dtype: 'bfloat16', block: [1, 1], stride: [1, 1], topK: 33 }],
  [[2, 270, 900, 12, 1, 40], { dtype: 'bfloat16', block: [2, 8], topK: 64, page: 32 }],
  [
    [1, 800, 1100, 16, 4, 72],
    { dtype: 'float16', block: [4, 2], topK: 16, ends: [3, 3, 400, 800] },
  ],
]

describeGpu('hip of many lists', () => {
  it.each(problems)(
    'finds those that the CPU does: %j, %j',
    async ([b, sq, sk, hq, hk, d], { dtype, page, ends, ...rest }) => {
      const rng = random(sq)
      const draw = (...shape: [number, number, number, number]) => {
        const size = shape.reduce((x, y) => x * y)
        return tensor(
          Float32Array.from({ length: size }, () => rng.below(9) - 4),
          shape,
        ).cast(dtype)
      }
      const pages = Math.ceil(sk / (page ?? sk))
      const [q, k] = [draw(b, sq, hq, d), draw(page ? b * pages : b, page ?? sk, hk, d)]
      const table = Array.from({ length: b * pages }, (_, i) => b * pages - 1 - i)
      const searchOn = (device: 'cpu' | 'cuda') => {
        const options: HipOptions = { window: 16, sinkTokens: 8, ...rest }
        if (page) {
          options.blockTable = tensor(table, [b, pages], { dtype: 'int32', device })
          options.cacheSeqlens = tensor([sk, sq + 9], [b], { dtype: 'int32', device })
        }
        if (ends) {
          options.cuSeqlensQ = [0, ...ends]
          options.cuSeqlensK = [0, ...ends.map((end, i) => (end < sq ? end + 60 * i : sk))]
        }
        const [own, keys] = [q.to(device), k.to(device)]
        return () => hipLists(own, keys, options)
      }
      const read = async ({ index, count }: HipLists) => [await index.read(), await count.read()]
      const expected = await read(searchOn('cpu')())
      // time and again, as each search leaves its queue as it found it
      const search = searchOn('cuda')
      expect(await read(search())).toEqual(expected)
      const replayed = graph(search)
      expect(await read(replayed.result)).toEqual(expected)
      expect(await read(replayed.replay())).toEqual(expected)
      expect(await read(search())).toEqual(expected)
    },
  )
})
