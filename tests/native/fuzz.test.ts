import fc from 'fast-check'
import * as heddle from 'heddle'
import { type DType, dtypes, HeddleError, memory, scope, synchronize, Tensor } from 'heddle'
import { describe, expect, it } from 'vitest'
import { addon } from '../../dist/native.js'
import { faultOf } from '../support/errors.js'
import { seed } from '../support/random.js'

// A call is drawn as plain data, so that a counterexample prints and shrinks, and made into values when it runs.

const own = new Error("thrown by the caller's own code")
const fail = (): never => {
  throw own
}

function detached<A extends ArrayBufferView>(array: A): A {
  structuredClone(array.buffer, { transfer: [array.buffer as ArrayBuffer] })
  return array
}

type Resizable = ArrayBuffer & { resize(bytes: number): void }
const resizable = (bytes: number) =>
  Reflect.construct(ArrayBuffer, [bytes, { maxByteLength: 64 }]) as Resizable

function disposed(dtype: DType, shape: number[]): Tensor {
  const tensor = heddle.empty(shape, { dtype })
  tensor.dispose()
  return tensor
}

// An array that says it has another length and other elements than it has
const lying = (length: number, at: (index: number) => unknown) =>
  new Proxy([] as unknown[], {
    get: (target, key) =>
      key === 'length'
        ? length
        : typeof key === 'string' && /^\d+$/.test(key)
          ? at(Number(key))
          : Reflect.get(target, key),
  })

const numbers = [
  ...[Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY, -0, -1, 0, 0.5, 1, 2, 3, 4],
  ...[7, 16, 257, 1e-320, 1e308, 2 ** 31 - 1, 2 ** 31, -(2 ** 31) - 1, 2 ** 32, 2 ** 53 - 1],
  ...[2 ** 53, 2 ** 63, -(2 ** 63), 2 ** 64],
]

const words = [
  ...['', 'x', '4', ...dtypes, 'float64', 'cpu', 'cuda', 'cuda:0', 'cuda:999', 'cuda:1e3', 'CPU'],
  ...['silu', 'identity', 'interleaved', 'ev-dk', 'half-split\0', '\ud800', 'é'.repeat(4000)],
  ...['__proto__', 'constructor', 'length'],
]

// What is small, or refused at once; sizes between would fit in memory and take long to fill
const sizes = [0, 1, 1, 2, 2, 3, 4, 8, -1, 1.5, Number.NaN, 2 ** 50, 2 ** 53 - 1, 2 ** 53, 2 ** 63]
const lazySizes = [...sizes, 2 ** 31, 2 ** 32, 2 ** 33]

const shapes = [
  ...[[], [0], [1], [2], [4], [8], [2, 4], [8, 8], [1, 4, 2], [1, 2, 4], [1, 4, 2, 8]],
  ...[
    [1, 4, 1, 8],
    [1, 4, 3, 8],
    [1, 0, 2, 8],
    [1, 4, 2, 12],
    [2, 4, 2, 8],
    [2, 2, 8, 8],
  ],
  ...[[0, 2 ** 40], Array(8).fill(1), [1, 2, 1, 2, 1, 2, 1, 2]],
] as number[][]

const views: readonly ((tensor: Tensor) => Tensor)[] = [
  (tensor) => tensor,
  (tensor) => tensor,
  (tensor) => (tensor.rank > 1 ? tensor.transpose(0, -1) : tensor),
  (tensor) => (tensor.rank < 8 ? tensor.expand([2, ...tensor.shape]) : tensor),
  (tensor) => (tensor.rank > 0 ? tensor.slice(-1, 1) : tensor),
  (tensor) => (tensor.rank > 0 && tensor.shape[0]! > 0 ? tensor.select(0, -1) : tensor),
  (tensor) => {
    tensor.dispose()
    return tensor
  },
]

const oddities: readonly (() => unknown)[] = [
  () => undefined,
  () => null,
  () => true,
  () => false,
  () => 1n,
  () => 2n ** 64n,
  () => Symbol('odd'),
  () => Symbol.iterator,
  () => () => 1,
  () => class {},
  () => Tensor,
  () => new Date(),
  () => /x/,
  () => new Map([[0, 1]]),
  () => Object(4),
  () => ({}),
  () => Object.create(null),
  () => [],
  () => [Symbol('odd')],
  () => [1n],
  () => ['4'],
  () => [{}],
  () => [null],
  () => [[1]],
  () => [0.5],
  () => [0, -1],
  () => [0, 4],
  () => [0, 3, 2, 4],
  () => [0, 2 ** 31],
  () => [1e300, Number.NaN],
  () => [0.5, 0.25],
  () => [0.5, 0.25, 0.125],
  () => [1, 2, 3, 4],
  () => Object.assign([], { 1: 1 }),
  () => new Array(5),
  () => new Array(2 ** 32 - 1),
  () => Object.assign([0, 4], { map: () => null, [Symbol.iterator]: null }),
  () => Object.assign([0, 4], { join: fail, constructor: null }),
  () => Object.defineProperty([0, 4], 1, { get: fail }),
  () => ({ length: 2 ** 53, 0: 1 }),
  () => ({ length: -1 }),
  () => ({ out: undefined, lse: 5 }),
  () => ({ valueOf: fail, toString: fail, [Symbol.toPrimitive]: fail }),
  () => lying(2 ** 53, (i) => (i < 4 ? 1 : undefined)),
  () => lying(2 ** 40, () => 1),
  () => lying(-1, () => 1),
  () => lying(Number.NaN, () => 1),
  () => lying(2, (i) => (i === 0 ? 0 : 'x')),
  () => lying(2, fail),
  () => new Proxy({}, { get: fail, ownKeys: fail, getPrototypeOf: fail, has: fail }),
  () => new Proxy(heddle.zeros([1, 4, 2, 8]), {}),
  () => Object.create(Tensor.prototype),
  () => Object.create(heddle.zeros([1, 4, 2, 8])),
  () => disposed('float32', [1, 4, 2, 8]),
  () => disposed('float32', [8]),
  () => disposed('int32', [2]),
  () => new ArrayBuffer(16),
  () => new SharedArrayBuffer(16),
  () => new DataView(new ArrayBuffer(16)),
  () => Buffer.from([1, 2, 3, 4]),
  () => new Float32Array(0),
  () => new Float32Array([1, 2, 3, 4]),
  () => new Float64Array([1, 2, 3, 4]),
  () => new Int32Array([0, 4]),
  () => new Uint16Array([1, 2, 3, 4]),
  () => new Uint8Array([1, 2, 3, 4]),
  () => new Uint8ClampedArray(4),
  () => new Int8Array(4),
  () => new BigInt64Array([1n, 2n, 3n, 4n]),
  () => new BigUint64Array(4),
  () => new Float32Array(new SharedArrayBuffer(16)),
  () => new Int32Array(new SharedArrayBuffer(8)),
  () => detached(new Float32Array(4)),
  () => detached(new Int32Array(4)),
  () => new Float32Array(resizable(16)),
  () => {
    const buffer = resizable(16)
    const array = new Float32Array(buffer)
    buffer.resize(8)
    return array
  },
  () => {
    const buffer = resizable(16)
    const array = new Float32Array(buffer, 8, 2)
    buffer.resize(8)
    return array
  },
  () => Object.defineProperty(new Float32Array(4), 'length', { value: 2 ** 40 }),
  () => Object.defineProperty(new Float32Array(4), 'byteLength', { value: 2 ** 40 }),
  () => Object.defineProperty(new Float32Array(4), Symbol.toStringTag, { value: 'BigInt64Array' }),
  () => Object.defineProperty(new Float32Array(4), Symbol.toStringTag, { value: 'constructor' }),
  () => Object.defineProperty(new Float32Array(4), 'length', { get: fail }),
  () => AbortSignal.abort(own),
]

type Recipe =
  | { number: number }
  | { double: number }
  | { word: number }
  | { string: string }
  | { oddity: number }
  | { shape: number[]; lazy: number[] }
  | { dtype: number; shape: number; view: number }

const index = (list: ArrayLike<unknown>) => fc.nat({ max: list.length - 1 })

const recipe: fc.Arbitrary<Recipe> = fc.oneof(
  { weight: 3, arbitrary: fc.record({ number: index(numbers) }) },
  { weight: 1, arbitrary: fc.record({ double: fc.double() }) },
  { weight: 1, arbitrary: fc.record({ word: index(words) }) },
  { weight: 1, arbitrary: fc.record({ string: fc.string({ maxLength: 8 }) }) },
  { weight: 5, arbitrary: fc.record({ oddity: index(oddities) }) },
  {
    weight: 2,
    arbitrary: fc.record({
      shape: fc.array(index(sizes), { maxLength: 10 }),
      lazy: fc.array(index(lazySizes), { maxLength: 5 }),
    }),
  },
  {
    weight: 5,
    arbitrary: fc.record({ dtype: index(dtypes), shape: index(shapes), view: index(views) }),
  },
)

function cook(drawn: Recipe, lazy: boolean): unknown {
  if ('number' in drawn) return numbers[drawn.number]
  if ('double' in drawn) return drawn.double
  if ('word' in drawn) return words[drawn.word]
  if ('string' in drawn) return drawn.string
  if ('oddity' in drawn) return oddities[drawn.oddity]!()
  if ('lazy' in drawn)
    return lazy ? drawn.lazy.map((i) => lazySizes[i]) : drawn.shape.map((i) => sizes[i])
  const made = heddle.full(shapes[drawn.shape]!, 1, { dtype: dtypes[drawn.dtype]! })
  return views[drawn.view]!(made)
}

interface Target {
  name: string
  call: (...args: never[]) => unknown
  /** Valid arguments, options left out; those of a method begin with its tensor. */
  args: () => unknown[]
  /** Options with a valid value each, those that the shortest call needs first. */
  options?: Record<string, () => unknown>
  needed?: number
  /** Whether nothing is computed from a shape, so that it may be a large one. */
  lazy?: boolean
}

const { empty, full, randn, tensor, zeros } = heddle
const floats = (...shape: number[]) => zeros(shape)
const ints = (...values: number[]) => tensor(values, [values.length], { dtype: 'int32' })
const create = { dtype: () => 'bfloat16', device: () => 'cpu' }
const read = { as: () => 'float32', signal: () => new AbortController().signal }
const heads = () => [floats(1, 4, 2, 8), floats(1, 4, 1, 8), floats(1, 4, 1, 8)]
const queries = () => heads().slice(0, 2)
const packed = (tokens: number) => ({
  cuSeqlensQ: () => [0, 1, tokens],
  cuSeqlensK: () => [0, 1, tokens],
})
const lists = () => ({
  count: ints(1, 2).reshape([1, 1, 2]),
  index: ints(0, -1, 1, 0).reshape([1, 1, 2, 2]),
})
const maskOptions = {
  sq: () => 4,
  block: () => 2,
  sk: () => 4,
  causal: () => true,
  device: () => 'cpu',
  ...packed(4),
}
const choiceOptions = {
  ...packed(4),
  stride: () => 2,
  block: () => [2, 2],
  scale: () => 0.5,
}
const hipOptions = {
  topK: () => 2,
  block: () => [2, 2],
  stride: () => [1, 1],
  window: () => 2,
  sinkTokens: () => 2,
  headMode: () => 'all',
  representative: () => 'first',
  stages: () => [
    { chunk: 4, stride: 1, block: 2 },
    { chunk: 2, stride: 1, block: 2, topK: 4 },
  ],
  rope: () => ({ cos: floats(8, 4), sin: floats(8, 4), positions: 'relative' }),
  blockTable: () => zeros([1, 1], { dtype: 'int32' }),
  cacheSeqlens: () => [3],
  ...packed(4),
}
const part = () => ({ out: floats(1, 4, 2, 8), lse: floats(1, 2, 4) })

const method = (name: keyof Tensor, ...args: (() => unknown)[]): Target => ({
  name: `Tensor.${String(name)}`,
  call: (receiver: Tensor, ...rest: unknown[]) =>
    (receiver[name] as (...args: unknown[]) => unknown)(...rest),
  args: () => [floats(2, 4), ...args.map((make) => make())],
})

const targets: readonly Target[] = [
  {
    name: 'attention',
    call: heddle.attention,
    args: heads,
    options: {
      causal: () => true,
      window: () => 2,
      scale: () => 0.5,
      softCap: () => 3,
      slopes: () => [0.5, 0.25],
      sink: () => floats(2),
      cuSeqlensQ: () => [0, 1, 4],
      cuSeqlensK: () => ints(0, 1, 4),
      cacheSeqlens: () => [3],
      blockTable: () => zeros([1, 1], { dtype: 'int32' }),
      bias: () => floats(2, 1, 4),
      weights: () => 'relu',
      power: () => 2,
      normalise: () => true,
      cosine: () => true,
      lengthScale: () => 2,
      level: () => floats(1, 2, 4),
      offset: () => 0.5,
      qScale: () => [0.5, 2],
      kScale: () => floats(2),
      vScale: () => [1, 3],
      dtype: () => 'float16',
    },
  },
  {
    name: 'softplusAttention',
    call: heddle.softplusAttention,
    args: heads,
    options: {
      causal: () => false,
      window: () => 2,
      cuSeqlensQ: () => [0, 1, 4],
      cuSeqlensK: () => ints(0, 1, 4),
      cacheSeqlens: () => [3],
      blockTable: () => zeros([1, 1], { dtype: 'int32' }),
      reweight: () => true,
      power: () => 2.5,
      offset: () => 0.5,
      qkNorm: () => false,
      logD: () => 2,
      scale: () => 0.5,
      eps: () => 1e-8,
      degenerate: () => 'mean',
    },
  },
  {
    name: 'attentionBackward',
    call: heddle.attentionBackward,
    args: () => [...heads(), floats(1, 4, 2, 8), floats(1, 2, 4), floats(1, 4, 2, 8)],
    options: {
      causal: () => true,
      window: () => 2,
      scale: () => 0.5,
      softCap: () => 3,
      slopes: () => [0.5, 0.25],
      sink: () => floats(2),
      cuSeqlensQ: () => [0, 1, 4],
      cuSeqlensK: () => ints(0, 1, 4),
      cacheSeqlens: () => [3],
      deterministic: () => false,
      bias: () => floats(2, 1, 4),
      weights: () => 'relu',
      power: () => 2,
      normalise: () => true,
      cosine: () => true,
      lengthScale: () => 2,
      level: () => floats(1, 2, 4),
      offset: () => 0.5,
      dlse: () => floats(1, 2, 4),
      dbias: () => true,
    },
  },
  {
    name: 'softplusBackward',
    call: heddle.softplusBackward,
    args: () => [...heads(), floats(1, 4, 2, 8), floats(1, 2, 4), floats(1, 4, 2, 8)],
    options: {
      causal: () => false,
      window: () => 2,
      cuSeqlensQ: () => [0, 1, 4],
      cuSeqlensK: () => ints(0, 1, 4),
      cacheSeqlens: () => [3],
      reweight: () => true,
      power: () => 2.5,
      offset: () => 0.5,
      qkNorm: () => false,
      logD: () => 2,
      scale: () => 0.5,
      eps: () => 1e-8,
      degenerate: () => 'mean',
    },
  },
  {
    name: 'lightning',
    call: heddle.lightning,
    args: heads,
    options: {
      slopes: () => [0.5, 0.25],
      scale: () => 0.5,
      initialState: () => floats(1, 2, 8, 8),
      stateLayout: () => 'ev-dk',
      outputFinalState: () => true,
      schedule: () => 'two-pass',
      cuSeqlens: () => [0, 4],
      chunkSize: () => 16,
      precision: () => 'high',
    },
    needed: 1,
  },
  {
    name: 'lightningBackward',
    call: heddle.lightningBackward,
    args: () => [...heads(), heads()[0]],
    options: {
      slopes: () => [0.5, 0.25],
      scale: () => 0.5,
      initialState: () => floats(1, 2, 8, 8),
      stateLayout: () => 'ev-dk',
      cuSeqlens: () => [0, 4],
      chunkSize: () => 16,
      precision: () => 'high',
      dstate: () => floats(1, 2, 8, 8),
      outputDslopes: () => true,
    },
    needed: 1,
  },
  {
    name: 'lightningDecode',
    call: heddle.lightningDecode,
    args: () => [...heads(), floats(3, 2, 8, 8), ints(1)],
    options: {
      slopes: () => floats(2),
      scale: () => 0.5,
      stateLayout: () => 'ev-dk',
      outputAllStates: () => true,
    },
    needed: 1,
  },
  { name: 'merge', call: heddle.merge, args: () => [[part(), part()]] },
  {
    name: 'merge of parts',
    call: (...parts: unknown[]) => heddle.merge(parts as Parameters<typeof heddle.merge>[0]),
    args: () => [part(), part(), part()],
  },
  {
    name: 'merge of tensors',
    call: (outA: Tensor, lseA: Tensor, outB: Tensor, lseB: Tensor) =>
      heddle.merge([
        { out: outA, lse: lseA },
        { out: outB, lse: lseB },
      ] as Parameters<typeof heddle.merge>[0]),
    args: () => [part(), part()].flatMap(({ out, lse }) => [out, lse]),
  },
  {
    name: 'linear',
    call: heddle.linear,
    args: () => [floats(2, 4), floats(3, 4)],
    options: { bias: () => floats(3), dtype: () => 'float16' },
  },
  {
    name: 'norm',
    call: heddle.norm,
    args: () => [floats(2, 8), floats(8)],
    options: { eps: () => 1 },
  },
  {
    name: 'rope',
    call: heddle.rope,
    args: () => [floats(1, 4, 2, 8)],
    options: {
      theta: () => 100,
      offset: () => 3,
      positions: () => zeros([1, 4], { dtype: 'int32' }),
      layout: () => 'interleaved',
      rotary: () => 4,
      cos: () => floats(8, 2),
      sin: () => floats(8, 2),
    },
  },
  {
    name: 'glu',
    call: heddle.glu,
    args: () => [floats(2, 4), floats(2, 4)],
    options: { activation: () => 'sigmoid' },
  },
  {
    name: 'probe',
    call: heddle.probe,
    args: queries,
    options: {
      kind: () => 'rows',
      block: () => [2, 4],
      stride: () => 2,
      per: () => 'key',
      softmax: () => true,
      scale: () => 0.5,
    },
  },
  {
    name: 'keep',
    call: heddle.keep,
    args: () => [floats(1, 2, 2, 2)],
    options: {
      sq: () => 4,
      topBlocks: () => 1,
      sk: () => 4,
      block: () => 2,
      coverage: () => 0.5,
      threshold: () => 0.5,
      over: () => 'map',
      minBlocks: () => 1,
      maxBlocks: () => 2,
      forceFirst: () => 1,
      forceDiagonal: () => 1,
    },
    needed: 4,
  },
  { name: 'hip', call: heddle.hip, args: queries, options: hipOptions },
  { name: 'hipLists', call: heddle.hipLists, args: queries, options: hipOptions },
  {
    name: 'hipAttention',
    call: heddle.hipAttention,
    args: heads,
    options: {
      ...hipOptions,
      layer: () => 1,
      layers: () => ({ 0: 'dense', 1: { topK: 4 } }),
      denseTailRows: () => 1,
      denseThreshold: () => 2,
      scale: () => 0.5,
      softCap: () => 3,
    },
  },
  {
    name: 'flexPrefill',
    call: heddle.flexPrefill,
    args: () => [floats(1, 64, 2, 8), floats(1, 64, 1, 8)],
    options: {
      ...packed(64),
      mode: () => 'coverage',
      gamma: () => 0.5,
      tau: () => 0.5,
      minBudget: () => 16,
      maxBudget: () => 32,
      block: () => 16,
      gqaInterleave: () => true,
      scale: () => 0.5,
    },
  },
  {
    name: 'xattention',
    call: heddle.xattention,
    args: queries,
    options: { ...choiceOptions, threshold: () => 0.5 },
  },
  {
    name: 'sampled',
    call: heddle.sampled,
    args: queries,
    options: { ...choiceOptions, topK: () => 2 },
  },
  {
    name: 'streaming',
    call: heddle.streaming,
    args: queries,
    options: { ...packed(4), sinkTokens: () => 1, window: () => 2 },
  },
  {
    name: 'minference',
    call: heddle.minference,
    args: queries,
    options: {
      patterns: () => [
        { kind: 'a-shape', sinkTokens: 1, window: 2 },
        { kind: 'vertical-slash', vertical: 2, slash: 2 },
      ],
    },
  },
  {
    name: 'Mask.fromBlocks',
    call: heddle.Mask.fromBlocks,
    args: () => [zeros([1, 2, 2, 2], { dtype: 'uint8' })],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromLists',
    call: heddle.Mask.fromLists,
    args: () => [lists()],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromLists of several',
    call: (count: never, options: never) =>
      heddle.Mask.fromLists([lists(), { ...lists(), count }], options),
    args: () => [lists().count],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromRows',
    call: heddle.Mask.fromRows,
    args: () => [{ rowPtr: ints(0, 1, 3), column: ints(0, 0, 1) }],
    options: { ...maskOptions, b: () => 1, heads: () => 1 },
    needed: 2,
  },
  {
    name: 'Mask.fromPairs',
    call: heddle.Mask.fromPairs,
    args: () => [ints(0, 3, -1).reshape([1, 1, 3])],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromRuns',
    call: heddle.Mask.fromRuns,
    args: () => [lists()],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromBits',
    call: heddle.Mask.fromBits,
    args: () => [ints(3, 1).reshape([1, 1, 2, 1])],
    options: maskOptions,
    needed: 2,
  },
  {
    name: 'Mask.fromTokens',
    call: heddle.Mask.fromTokens,
    args: () => [{ columns: [0, 2], diagonals: [1] }],
    options: maskOptions,
    needed: 1,
  },
  {
    name: 'Mask.fromTokens of lists',
    call: (columns: never, diagonals: never, options: never) =>
      heddle.Mask.fromTokens({ columns, diagonals }, options),
    args: () => [[0, 2], { count: ints(1).reshape([1, 1]), index: ints(0).reshape([1, 1, 1]) }],
    options: maskOptions,
    needed: 1,
  },
  {
    name: 'Mask.fromWindow',
    call: (window: never, sinkTokens: never, options: never) =>
      heddle.Mask.fromWindow({ window, sinkTokens }, options),
    args: () => [2, 1],
    options: maskOptions,
    needed: 1,
  },
  {
    name: 'Mask.fromDocuments',
    call: heddle.Mask.fromDocuments,
    args: () => [[0, 1, 4]],
    options: maskOptions,
    needed: 1,
  },
  {
    name: 'attention under a mask',
    call: (q: never, k: never, v: never, mask: never, options: object) =>
      heddle.attention(q, k, v, { mask, ...options }),
    args: () => [...heads(), heddle.Mask.fromWindow({ window: 2 }, { sq: 4, block: 2 })],
    options: { causal: () => true, softCap: () => 3, sink: () => floats(2) },
  },
  { name: 'embed', call: heddle.embed, args: () => [ints(1, 0), floats(2, 4)] },
  { name: 'scatter', call: heddle.scatter, args: () => [floats(3, 4), ints(1, 0), floats(2, 4)] },
  { name: 'add', call: heddle.add, args: () => [floats(2, 4), floats(4)] },
  { name: 'mul', call: heddle.mul, args: () => [floats(2, 1), floats(2, 4)] },
  { name: 'silu', call: heddle.silu, args: () => [floats(2, 4)] },
  { name: 'sigmoid', call: heddle.sigmoid, args: () => [floats(2, 4)] },
  { name: 'alibiSlopes', call: heddle.alibiSlopes, args: () => [4, 1, 2] },
  { name: 'hfMiniMaxSlopes', call: heddle.hfMiniMaxSlopes, args: () => [4, 1, 2] },
  { name: 'tnlPaperSlopes', call: heddle.tnlPaperSlopes, args: () => [4, 1, 2] },
  {
    name: 'tensor',
    call: tensor,
    args: () => [
      [1, 2, 3, 4],
      [2, 2],
    ],
    options: { dtype: () => 'int32', device: () => 'cpu' },
  },
  {
    name: 'tensor of bytes',
    call: tensor,
    args: () => [new Uint16Array(4), [2, 2]],
    options: create,
    needed: 1,
  },
  { name: 'empty', call: empty, args: () => [[2, 3]], options: create, lazy: true },
  { name: 'zeros', call: zeros, args: () => [[2, 3]], options: create },
  { name: 'full', call: full, args: () => [[2, 3], 1.5], options: create },
  { name: 'randn', call: randn, args: () => [[2, 3]], options: { ...create, seed: () => 1 } },
  method(
    'slice',
    () => 1,
    () => 1,
    () => 3,
  ),
  method(
    'select',
    () => 1,
    () => -1,
  ),
  method('reshape', () => [4, -1]),
  method(
    'transpose',
    () => 0,
    () => 1,
  ),
  { ...method('expand', () => [3, 2, 4]), lazy: true },
  method('contiguous'),
  method('clone'),
  method('cast', () => 'float16'),
  method('to', () => 'cpu'),
  method('copyFrom', () => floats(2, 4)),
  method('write', () => [1, 2, 3, 4, 5, 6, 7, 8]),
  { ...method('readSync'), options: read },
  { name: 'memory', call: memory, args: () => ['cpu'] },
  {
    name: 'scope',
    call: (body: unknown) =>
      scope((typeof body === 'function' ? () => body : body) as () => unknown),
    args: () => [() => floats(2)],
  },
  { name: 'scope of a value', call: (value: unknown) => scope(() => value), args: () => [1] },
]

interface Drawn {
  target: number
  /** Which options are there. */
  given: number
  /** How the options behave. */
  guise: number
  change: { at: number; value: Recipe }[]
  extra: { key: string; value: Recipe }[]
}

const optionNames = [...new Set(targets.flatMap(({ options }) => Object.keys(options ?? {})))]
const optionName = fc.oneof(fc.constantFrom(...optionNames, 'casual', '__proto__'), fc.string())

const drawnCall: fc.Arbitrary<Drawn> = fc.record({
  target: index(targets),
  given: fc.nat({ max: 2 ** 31 - 1 }),
  guise: fc.nat({ max: 7 }),
  change: fc.array(fc.record({ at: fc.nat({ max: 15 }), value: recipe }), { maxLength: 2 }),
  extra: fc.oneof(
    { weight: 6, arbitrary: fc.constant<Drawn['extra']>([]) },
    {
      weight: 1,
      arbitrary: fc.array(fc.record({ key: optionName, value: recipe }), { maxLength: 1 }),
    },
  ),
})

// The same options behind a Proxy, behind getters that change or throw, or with a prototype
function disguise(options: Record<string, unknown>, guise: number, odd: unknown): unknown {
  const names = Object.keys(options)
  const last = names.at(-1)
  if (last === undefined) return options
  let reads = 0
  const value = options[last]
  switch (guise) {
    case 0:
      return new Proxy(options, {})
    case 1:
      return Object.defineProperty(options, last, { get: () => (reads++ === 0 ? value : odd) })
    case 2:
      return Object.defineProperty(options, last, { get: fail })
    case 3:
      return Object.assign(Object.create({ inherited: odd }), options)
    case 4:
      return new Proxy(options, { ownKeys: () => (reads++ === 0 ? [] : names) })
    default:
      return options
  }
}

type Outcome = 'result' | 'refused' | 'own'

function refusal(error: unknown): Outcome {
  if (error === own) return 'own'
  const fault = faultOf(error)
  if (fault !== undefined) throw new Error(fault)
  return 'refused'
}

function readAll(result: unknown): void {
  if (result instanceof Tensor) {
    if (result.size > 1 << 16) return
    const values = result.readSync()
    if (values.length !== result.size) throw new Error(`read ${values.length} of ${result}`)
  } else if (result !== null && typeof result === 'object' && !ArrayBuffer.isView(result)) {
    for (const part of Object.values(result).slice(0, 4)) readAll(part)
  }
}

// Which options were given to what
const tried = new Set<string>()

function perform({ target, given, guise, change, extra }: Drawn): Outcome {
  const { name, call, args, options, needed = 0, lazy = false } = targets[target]!
  return scope(() => {
    const list = args()
    const named: Record<string, unknown> = {}
    Object.entries(options ?? {}).forEach(([option, make], i) => {
      if (i >= needed && !((given >> i) & (given >> (i + 3)) & (given >> (i + 6)) & 1)) return
      named[option] = make()
      tried.add(`${name} ${option}`)
    })
    const present = Object.keys(named)
    const slots = list.length + present.length
    const changes = change.map(({ at, value }) => ({
      at: at % (slots + 1),
      value: cook(value, lazy),
    }))
    const isReceiver = (at: number) => at === 0 && name.startsWith('Tensor.')
    for (const { at, value } of changes) {
      if (at >= list.length) {
        if (at < slots) named[present[at - list.length]!] = value
      } else if (!isReceiver(at) || value instanceof Tensor) list[at] = value
    }
    for (const { key, value } of extra)
      Object.defineProperty(named, key, {
        value: cook(value, lazy),
        enumerable: true,
        configurable: true,
      })
    if (options || extra.length > 0) list.push(disguise(named, guise, changes[0]?.value ?? fail))
    // The place after the last replaces the options or what stands there instead
    for (const { at, value } of changes)
      if (at === slots && !isReceiver(list.length - 1)) list[list.length - 1] = value
    try {
      readAll((call as (...args: unknown[]) => unknown)(...list))
      return 'result'
    } catch (error) {
      return refusal(error)
    }
  })
}

describe('the boundary', () => {
  it('gives a result or a HeddleError that says why, whatever it is given', async () => {
    const before = memory()
    const counts = new Map<string, Record<Outcome, number>>()
    fc.assert(
      fc.property(drawnCall, (drawn) => {
        const { name } = targets[drawn.target]!
        const count = counts.get(name) ?? { result: 0, refused: 0, own: 0 }
        counts.set(name, count)
        count[perform(drawn)]++
      }),
      { numRuns: 100_000, seed },
    )
    expect(counts.size).toBe(targets.length)
    for (const { name, options } of targets)
      for (const option of Object.keys(options ?? {})) expect(tried).toContain(`${name} ${option}`)
    for (const [name, { result, refused, own }] of counts) {
      expect(result, `results of ${name}`).toBeGreaterThan(100)
      expect(refused, `refusals of ${name}`).toBeGreaterThan(10)
      if (targets.find((target) => target.name === name)?.options)
        expect(own, `errors of the caller in ${name}`).toBeGreaterThan(0)
    }
    // everything was made in a scope, also what a refused call had made so far
    await synchronize()
    expect(memory()).toMatchObject({ tensors: before.tensors, bytes: before.bytes })
  })

  it('rejects reads with the same errors', async () => {
    const options: fc.Arbitrary<unknown> = fc.oneof(
      recipe,
      fc.record({ as: recipe }),
      fc.record({ signal: recipe }),
    )
    const isRecipe = (drawn: object): drawn is Recipe => !('as' in drawn || 'signal' in drawn)
    const counts = { result: 0, refused: 0, own: 0 }
    await fc.assert(
      fc.asyncProperty(recipe, options, async (drawn, given) => {
        await scope(async () => {
          const source = cook(drawn, false)
          const raw = given as Recipe & { as?: Recipe; signal?: Recipe }
          const argument = isRecipe(raw)
            ? cook(raw, false)
            : Object.fromEntries(
                Object.entries(raw).map(([name, value]) => [name, cook(value as Recipe, false)]),
              )
          const target = source instanceof Tensor ? source : floats(2)
          try {
            const values = await target.read(argument as { as: 'float32' })
            expect(values.length).toBe(target.size)
            counts.result++
          } catch (error) {
            counts[refusal(error)]++
          }
        })
      }),
      { numRuns: 5_000, seed },
    )
    // the rarest happens about twenty times
    for (const count of Object.values(counts)) expect(count).toBeGreaterThan(0)
  })
})

describe('the addon by itself', () => {
  const raw = addon() as unknown as Record<string, (...args: unknown[]) => unknown>
  const names = Object.keys(raw).filter((name) => name !== 'init')
  const shared = raw.init!(HeddleError) as Float64Array

  it('throws on garbage and keeps working', async () => {
    await synchronize()
    const before = memory()
    let live: number[] = []
    const pending: Promise<unknown>[] = []
    const argument = fc.oneof(
      { weight: 2, arbitrary: recipe },
      { weight: 1, arbitrary: fc.record({ live: fc.nat({ max: 7 }) }) },
    )
    let thrown = 0
    fc.assert(
      fc.property(
        fc.constantFrom(...names),
        fc.array(argument, { maxLength: 9 }),
        fc.array(fc.oneof(fc.nat({ max: 40 }), fc.double()), { maxLength: 16 }),
        (name, drawn, left) => {
          if (live.length > 64 || live.length < 8) {
            for (const handle of live) raw.release!(handle)
            live = Array.from({ length: 8 }, () => raw.empty!(0, [2, 2], 0, 0) as number)
          }
          scope(() => {
            const args = drawn.map((value) =>
              'live' in value ? live[value.live] : cook(value, false),
            )
            // positions and handles
            shared.set(left.map((x, i) => (i % 2 && Number.isInteger(x) ? live[x % 8]! : x)))
            try {
              const result = raw[name]!(...args)
              if (result instanceof Promise) pending.push(result.catch(() => {}))
              if (name === 'release') live = live.filter((handle) => handle !== args[0])
              else if (name === 'endGraph') raw.releaseGraph!(result)
              else if (name === 'beginSpan')
                pending.push((raw.endSpan!(result) as Promise<number>).catch(() => {}))
              else if (typeof result === 'number') live.push(result)
              else if (name === 'run') raw.release!((result as number[])[0])
            } catch (error) {
              expect(error).toBeInstanceOf(Error)
              thrown++
            }
          })
        },
      ),
      { numRuns: 30_000, seed },
    )
    await Promise.all(pending)
    try {
      raw.endGraph!(false)
    } catch {
      // none was begun since the last one ended
    }
    for (const handle of live) raw.release!(handle)
    expect(thrown).toBeGreaterThan(10_000)
    await synchronize()
    expect(memory()).toMatchObject({ tensors: before.tensors, bytes: before.bytes })
  })

  it('reads lists whose getters free the tensor or make others', () => {
    for (let round = 0; round < 200; round++) {
      const handle = raw.empty!(0, [2, 2], 0, 0) as number
      const made: unknown[] = []
      const shape = Object.defineProperty([2, 2], 1, {
        get() {
          if (round % 2) raw.release!(handle)
          for (let i = 0; i < 100; i++) made.push(raw.empty!(0, [1], 0, 0))
          return 2
        },
      })
      try {
        made.push(raw.view!(handle, 0, shape, [2, 1]))
      } catch (error) {
        expect(error).toBeInstanceOf(Error)
      }
      for (const other of made) raw.release!(other)
      if (round % 2 === 0) raw.release!(handle)
    }
  })

  it('does not need its error class to refuse', () => {
    for (const wrong of [undefined, null, 5, {}, () => 5, Symbol('odd')]) {
      try {
        expect(() => raw.init!(wrong)).not.toThrow(HeddleError)
      } catch {
        // refused, which is as good
      }
      expect(() => raw.release!(-1)).toThrow()
      expect(() => raw.run!(0, 'x')).toThrow()
    }
    raw.init!(HeddleError)
    expect(() => raw.release!(-1)).toThrow(HeddleError)
  })
})
