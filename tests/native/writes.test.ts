import {
  add,
  attention,
  attentionBackward,
  cascade,
  embed,
  empty,
  flexPrefill,
  glu,
  HeddleError,
  hip,
  hipDecoder,
  keep,
  lightning,
  lightningBackward,
  lightningDecode,
  linear,
  Mask,
  merge,
  norm,
  probe,
  randn,
  rope,
  scatter,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { expect, it } from 'vitest'
import { addon, operatorSchemas } from '../../dist/native.js'
import { describeDevices } from '../support/devices.js'
import { changed } from '../support/faults.js'

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

/** The operators that a function calls, none of which changes what its schema calls an input. */
function watched(body: () => unknown): Set<string> {
  const native = addon()
  const shared = native.init(HeddleError)
  const seen = new Set<string>()
  const bytesOf = (handle: number) => {
    try {
      return Buffer.from(native.readSync(handle))
    } catch {
      return undefined // a view with gaps
    }
  }
  changed(
    ['run'],
    (run) =>
      (operator, tensors, ...values) => {
        const { name, arguments: all } = operatorSchemas()[operator as number]!
        seen.add(name)
        const inputs = range(tensors as number)
          .map((i) => ({ argument: all[shared[2 * i]!]!, handle: shared[2 * i + 1]! }))
          .filter(({ argument: { kind } }) => kind === 'input' || kind === 'optional')
        const before = inputs.map(({ handle }) => bytesOf(handle))
        const made = run(operator, tensors, ...values)
        inputs.forEach(({ argument, handle }, i) => {
          const isSame = before[i]?.equals(bytesOf(handle)!) ?? true
          expect(isSame, `${name} writes ${argument.name}`).toBe(true)
        })
        return made
      },
    body,
  )
  return seen
}

describeDevices('operators', (device) => {
  it('write nothing that their schemas call an input', () => {
    const int32 = (values: number[], shape?: number[]) =>
      tensor(values, shape, { dtype: 'int32', device })
    const draw = (shape: readonly number[], seed: number) => randn(shape, { seed, device })
    const [q, k, v] = [draw([1, 160, 4, 16], 1), draw([1, 160, 2, 16], 2), draw([1, 160, 2, 16], 3)]
    const pinned = (x: Tensor<'float32'>) => empty(x.shape, { device, pinned: true }).copyFrom(x)
    const seen = watched(() => {
      const cacheSeqlens = int32([150])
      const sink = draw([4], 4)
      const bias = draw([1, 4, 160, 160], 5)
      const { out, lse } = attention(q, k, v, { causal: true, sink, bias })
      attentionBackward(q, k, v, out, lse, draw(out.shape, 6), { causal: true, sink, bias })
      attention(q.slice(1, 0, 1).contiguous(), k, v, { cacheSeqlens })
      merge([{ out, lse }, attention(q, k, v)])

      const best = (topBlocks: number) =>
        keep(probe(q, k, { block: 16 }), { topBlocks, block: 16, sq: 160 })
      const mask = best(2)
      const tokens = Mask.fromTokens({ columns: [3, 7] }, { sq: 160, block: 16, device })
      attention(q, k, v, { mask: mask.union(tokens) })
      mask.intersect(best(3))
      flexPrefill(q, k, { block: 16, minBudget: 32 })
      attention(q, k, v, { mask: hip(q, k, { topK: 32, window: 16 }) })
      const stages = [
        { chunk: 16, stride: 1 },
        { chunk: 8, stride: 1, topK: 64 },
      ]
      const [cos, sin] = [draw([200, 8], 7), draw([200, 8], 8)]
      for (const turned of [undefined, { cos, sin }]) {
        const own = { topK: 32, stages, window: 16, sinkTokens: 8, refresh: [2, 1], rope: turned }
        using decoder = hipDecoder({ ...own, offload: { scanned: 32, attended: 48 } })
        const [far, values] = [pinned(k), pinned(v)]
        for (let at = 150; at <= 160; at++) {
          const given = [far, values].map((x) => x.slice(1, 0, at))
          decoder.attend(q.slice(1, at - 1, at), given[0]!, given[1]!)
        }
      }

      const slopes = [0.1, 0.2, 0, 0.01]
      const initialState = draw([1, 4, 16, 16], 9)
      const scanned = lightning(q, k, v, { slopes, initialState, outputFinalState: true })
      lightningBackward(q, k, v, draw(scanned.out.shape, 10), { slopes, initialState })
      const step = draw([1, 1, 4, 16], 11)
      lightningDecode(step, step, step, scanned.state, int32([0]), { slopes })

      const x = draw([8, 16], 12)
      linear(x, draw([24, 16], 13), { bias: draw([24], 14) })
      norm(x, draw([16], 15))
      rope(q, { cos, sin })
      glu(x, x)
      embed(int32([1, 2]), x)
      scatter(zeros([3, 16], { device }), int32([2]), x.slice(0, 3, 4))
      add(x, zeros([8, 16], { device }))
      cascade('T[i] = sum(j) A[i,j] * A[i,j] * A[i,j]').compile({ fused: 'preferred' })(x)
    })
    expect([...seen].sort()).toEqual(operatorSchemas().map(({ name }) => name))
  })
})
