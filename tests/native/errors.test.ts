import { constants } from 'node:buffer'
import {
  add,
  alibiSlopes,
  attention,
  attentionBackward,
  cascade,
  cuda,
  elapsed,
  embed,
  empty,
  flexPrefill,
  flexPrefillAttention,
  full,
  glu,
  graph,
  hip,
  hipAttention,
  hipDecoder,
  hipStages,
  keep,
  lightning,
  lightningBackward,
  lightningDecode,
  linear,
  Mask,
  memory,
  merge,
  norm,
  randn,
  rope,
  scope,
  silu,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { describeDevices } from '../support/devices.js'
import { faultOf } from '../support/errors.js'
import { failure } from '../support/failure.js'
import { describeGpu } from '../support/gpu.js'

// What users get wrong most, and what they are told

type Wrong = [
  what: string,
  call: () => unknown,
  code: string,
  message: string | ((inUse: number) => string),
]

const heads = (s = 4, h = 4, d = 16) => zeros([1, s, h, d])
const q = heads()
const kv = heads(4, 2)
const half = zeros([1, 4, 2, 16], { dtype: 'float16' })
const e4m3 = zeros([1, 4, 4, 16], { dtype: 'float8_e4m3fn' })
const e5m2 = zeros([1, 4, 4, 16], { dtype: 'float8_e5m2' })
const matrix = zeros([2, 3])
const one = zeros([1])
const pages = { blockTable: zeros([1, 2], { dtype: 'int32' }), cacheSeqlens: [3] }

const gone = zeros([2])
gone.dispose()
const detached = new Float32Array(4)
structuredClone(detached.buffer, { transfer: [detached.buffer] })
const shrunk = (() => {
  const buffer = Reflect.construct(ArrayBuffer, [16, { maxByteLength: 64 }])
  const array = new Float32Array(buffer, 0, 4)
  buffer.resize(8)
  return array
})()
const shared = new Float32Array(new SharedArrayBuffer(16))

// Calls that the types forbid
// biome-ignore lint/suspicious/noExplicitAny: that is the point
const any = (value: unknown): any => value

const wrong: Wrong[] = [
  [
    'no tensor',
    () => attention(any([1]), q, q),
    'ERR_ARGUMENT',
    'attention: q must be a tensor, got an array of 1',
  ],
  [
    'a missing tensor',
    () => attention(q, kv, any(undefined)),
    'ERR_ARGUMENT',
    'attention: v is missing',
  ],
  [
    'another dtype than q',
    () => attention(any(q), any(half), any(half)),
    'ERR_DTYPE',
    'attention: k must be float32, got float16 (q is float32)',
  ],
  [
    'a float8 tensor',
    () => attention(any(e5m2), any(e5m2), any(e5m2)),
    'ERR_DTYPE',
    'attention: q must be float32, float16, bfloat16 or float8_e4m3fn, got float8_e5m2',
  ],
  [
    'scales of what is not float8',
    () => attention(q, q, q, any({ kScale: [1, 1, 1, 1] })),
    'ERR_ARGUMENT',
    'attention: kScale goes with q, k and v of float8_e4m3fn',
  ],
  [
    'another dtype of out than that of q',
    () => attention(q, q, q, any({ dtype: 'bfloat16' })),
    'ERR_ARGUMENT',
    'attention: dtype goes with q, k and v of float8_e4m3fn, which need it',
  ],
  [
    'scales of what is divided by its length',
    () => attention(e4m3, e4m3, e4m3, { cosine: true, kScale: [1, 1, 1, 1] }),
    'ERR_ARGUMENT',
    'attention: kScale cannot be combined with cosine',
  ],
  [
    'an integer tensor',
    () => silu(any(zeros([2], { dtype: 'int32' }))),
    'ERR_DTYPE',
    'silu: x must be float32, float16 or bfloat16, got int32',
  ],
  [
    'one dimension too few',
    () => attention(zeros([4, 4, 16]), kv, kv),
    'ERR_SHAPE',
    'attention: q must be [b, sq, hq, d], got [4, 4, 16] (it has 3 dimensions instead of 4)',
  ],
  [
    'another head size',
    () => attention(q, heads(4, 2, 32), kv),
    'ERR_SHAPE',
    'attention: k must be [b, sk, hk, d], got [1, 4, 2, 32] (d is 32, but q has d = 16)',
  ],
  [
    'keys and values of other lengths',
    () => attention(q, kv, heads(5, 2)),
    'ERR_SHAPE',
    'attention: v must be [b, sk, hk, dv], got [1, 5, 2, 16] (sk is 5, but k has sk = 4)',
  ],
  [
    'heads that do not divide',
    () => attention(q, heads(4, 3), heads(4, 3)),
    'ERR_SHAPE',
    'attention: hq must be a multiple of hk, got 4 and 3',
  ],
  [
    'a head size that no kernel has',
    () => attention(heads(4, 2, 12), heads(4, 2, 12), kv),
    'ERR_SHAPE',
    'attention: d must be a multiple of 8 up to 256, got 12',
  ],
  [
    'a misspelled option',
    () => attention(q, kv, kv, any({ casual: true })),
    'ERR_ARGUMENT',
    'attention: unknown option "casual"; did you mean "causal"?',
  ],
  [
    'an option of nowhere',
    () => attention(q, kv, kv, any({ dropout: 0.1 })),
    'ERR_ARGUMENT',
    'attention: unknown option "dropout"',
  ],
  [
    'options that are none',
    () => attention(q, kv, kv, any(true)),
    'ERR_ARGUMENT',
    'attention: options must be an object, got true',
  ],
  [
    'a flag that is none',
    () => attention(q, kv, kv, { causal: any(1) }),
    'ERR_ARGUMENT',
    'attention: causal must be a boolean, got 1',
  ],
  [
    'a negative window',
    () => attention(q, kv, kv, { window: -1 }),
    'ERR_ARGUMENT',
    'attention: window must be at least 1, got -1',
  ],
  [
    'a window of 0',
    () => attention(q, kv, kv, { window: 0 }),
    'ERR_ARGUMENT',
    'attention: window must be at least 1, got 0',
  ],
  [
    'a fractional window',
    () => attention(q, kv, kv, { window: 1.5 }),
    'ERR_ARGUMENT',
    'attention: window must be an integer, got 1.5',
  ],
  [
    'a scale of NaN',
    () => attention(q, kv, kv, { scale: Number.NaN }),
    'ERR_ARGUMENT',
    'attention: scale must be a finite number, got NaN',
  ],
  [
    'a window of a bigint',
    () => attention(q, kv, kv, { window: any(2n) }),
    'ERR_ARGUMENT',
    'attention: window must be an integer, got 2n',
  ],
  [
    'a window that is no safe integer',
    () => attention(q, kv, kv, { window: 2 ** 53 }),
    'ERR_ARGUMENT',
    'attention: window must be an integer from -(2^53 - 1) to 2^53 - 1, got 9007199254740992',
  ],
  [
    'a negative soft cap',
    () => attention(q, kv, kv, { softCap: -1 }),
    'ERR_ARGUMENT',
    'attention: softCap must be at least 0, got -1',
  ],
  [
    'a sink of weights that have none',
    () => attention(q, kv, kv, { weights: 'sigmoid', sink: [1, 2, 3, 4] }),
    'ERR_ARGUMENT',
    'attention: sink goes with weights of softmax, softplus if normalised, and reweighted',
  ],
  [
    'a power of no relu',
    () => attention(q, kv, kv, { weights: 'softplus', power: 2 }),
    'ERR_ARGUMENT',
    'attention: power goes with weights of relu and reweighted',
  ],
  [
    'half a power of relu',
    () => attention(q, kv, kv, { weights: 'relu', power: 1.5 }),
    'ERR_ARGUMENT',
    'attention: power must be a whole number up to 8 with weights of relu, got 1.5',
  ],
  [
    'a level of weights that need none',
    () => attention(q, kv, kv, { level: zeros([1, 4, 4]) }),
    'ERR_ARGUMENT',
    'attention: level goes with weights of reweighted',
  ],
  [
    'no level for gradients',
    () => attentionBackward(q, kv, kv, q, zeros([1, 4, 4]), q, { weights: 'reweighted' }),
    'ERR_ARGUMENT',
    'attention.backward: level must be given with weights of reweighted',
  ],
  [
    'nothing for a flag',
    () => attention(q, kv, kv, { weights: 'relu', normalise: any(null) }),
    'ERR_ARGUMENT',
    'attention: normalise must be a boolean, got null',
  ],
  [
    'nothing for a dtype',
    () => attention(e4m3, e4m3, e4m3, { dtype: any(null) }),
    'ERR_ARGUMENT',
    'attention: dtype must be float32, float16 or bfloat16, got null',
  ],
  [
    'nothing for lengths, beside a mask',
    () => {
      const mask = Mask.fromWindow({ window: 2 }, { sq: 4 })
      return attention(q, kv, kv, { mask, cacheSeqlens: any(null) })
    },
    'ERR_ARGUMENT',
    'attention: cacheSeqlens must be a tensor or an array of numbers, got null',
  ],
  [
    'a bias of keys in pages',
    () => attention(q, kv, kv, { ...pages, bias: zeros([8]) }),
    'ERR_ARGUMENT',
    'attention: bias cannot be combined with blockTable',
  ],
  [
    'a bias of packed sequences',
    () =>
      attentionBackward(q, kv, kv, q, zeros([1, 4, 4]), q, {
        ...{ cuSeqlensQ: [0, 4], cuSeqlensK: [0, 4], bias: zeros([3]) },
      }),
    'ERR_ARGUMENT',
    'attention.backward: bias cannot be combined with cuSeqlensQ',
  ],
  [
    'a bias of too few dimensions',
    () => attention(zeros([4, 4, 16]), kv, kv, { bias: zeros([4]) }),
    'ERR_SHAPE',
    'attention: q must be [b, sq, hq, d], got [4, 4, 16] (it has 3 dimensions instead of 4)',
  ],
  [
    'a bias of no dimensions',
    () => attention(zeros([]), kv, kv, { bias: 1, slopes: [1] }),
    'ERR_SHAPE',
    'attention: q must be [b, sq, hq, d], got [] (it has 0 dimensions instead of 4)',
  ],
  [
    'packed sequences of one dimension',
    () => attention(q, zeros([4]), kv, { cuSeqlensQ: [0, 4], cuSeqlensK: [0, 4] }),
    'ERR_SHAPE',
    'attention: k must be [b, sk, hk, d], got [4] (it has 1 dimensions instead of 4)',
  ],
  [
    'gradients of too few dimensions',
    () => attentionBackward(zeros([4]), kv, kv, q, zeros([1, 4, 4]), q, { bias: zeros([4]) }),
    'ERR_SHAPE',
    'attention.backward: q must be [b, sq, hq, d], got [4] (it has 1 dimensions instead of 4)',
  ],
  [
    'more keys than there are',
    () => attention(q, kv, kv, { cacheSeqlens: [5] }),
    'ERR_ARGUMENT',
    'attention: cacheSeqlens[0] must be an integer from 0 to 4, got 5',
  ],
  [
    'more keys than have pages',
    () => attention(q, kv, kv, { ...pages, cacheSeqlens: Int32Array.of(9) }),
    'ERR_ARGUMENT',
    'attention: cacheSeqlens[0] must be an integer from 0 to 8, got 9',
  ],
  [
    'a bias of another shape',
    () => attention(q, kv, kv, { bias: zeros([3, 4]) }),
    'ERR_SHAPE',
    'attention: bias must broadcast to [1, 4, 4, 4], got [3, 4]',
  ],
  [
    'a string for a number',
    () => attention(q, kv, kv, { scale: any('0.1') }),
    'ERR_ARGUMENT',
    'attention: scale must be a finite number, got "0.1"',
  ],
  [
    'too few slopes',
    () => attention(q, kv, kv, { slopes: [1, 2] }),
    'ERR_SHAPE',
    'attention: slopes must be [hq], got [2] (hq is 2, but q has hq = 4)',
  ],
  [
    'a slope of NaN',
    () => attention(q, kv, kv, { slopes: [1, 2, Number.NaN, 4] }),
    'ERR_ARGUMENT',
    'attention: slopes[2] must be a finite number, got NaN',
  ],
  [
    'a number for slopes',
    () => attention(q, kv, kv, { slopes: any(2) }),
    'ERR_ARGUMENT',
    'attention: slopes must be a tensor or an array of numbers, got 2',
  ],
  [
    'half of the lengths',
    () => attention(q, kv, kv, { cuSeqlensK: [0, 4] }),
    'ERR_ARGUMENT',
    'attention: cuSeqlensQ and cuSeqlensK must be given together',
  ],
  [
    'lengths that end early',
    () => attention(q, kv, kv, { cuSeqlensQ: [0, 3], cuSeqlensK: [0, 4] }),
    'ERR_ARGUMENT',
    'attention: cuSeqlensQ must start at 0, never descend and end at 4, got 3 at its end',
  ],
  [
    'lengths that descend',
    () => attention(q, kv, kv, { cuSeqlensQ: [0, 3, 2, 4], cuSeqlensK: [0, 4] }),
    'ERR_ARGUMENT',
    'attention: cuSeqlensQ must start at 0, never descend and end at 4, got 2 at index 2',
  ],
  [
    'lengths of other counts',
    () => attention(q, kv, kv, { cuSeqlensQ: [0, 4], cuSeqlensK: [0, 1, 4] }),
    'ERR_SHAPE',
    'attention: cuSeqlensK must be [n+1], got [3] (n is 2, but cuSeqlensQ has n = 1)',
  ],
  [
    'lengths with a batch',
    () => {
      const two = zeros([2, 4, 2, 16])
      return attention(two, two, two, { cuSeqlensQ: [0, 4], cuSeqlensK: [0, 4] })
    },
    'ERR_SHAPE',
    'attention: b must be 1 with cuSeqlensQ, got 2',
  ],
  [
    'offsets of keys that stand in pages',
    () => attention(q, kv, kv, { ...pages, cuSeqlensQ: [0, 4], cuSeqlensK: [0, 5] }),
    'ERR_ARGUMENT',
    'attention: cuSeqlensK cannot be combined with blockTable',
  ],
  [
    'packed queries over a cache that is not in pages',
    () => attention(q, kv, kv, { cuSeqlensQ: [0, 4], cacheSeqlens: [3] }),
    'ERR_ARGUMENT',
    'attention: cuSeqlensQ goes with cuSeqlensK or blockTable',
  ],
  [
    'packed queries under a mask of one sequence over pages',
    () => {
      const mask = Mask.fromWindow({ window: 2 }, { sq: 4, sk: 8 })
      return attention(q, kv, kv, { ...pages, mask, cuSeqlensQ: [0, 4] })
    },
    'ERR_ARGUMENT',
    'attention: mask must not be of packed sequences with blockTable, got one that is',
  ],
  [
    'documents of more rows than have bounds',
    () => Mask.fromDocuments([0, 2 ** 32], { sq: 2 ** 32 }),
    'ERR_ARGUMENT',
    'mask: sq must be at most 268435456 over all sequences, got 4294967296',
  ],
  [
    'a table of another number of packed sequences',
    () => attention(q, kv, kv, { ...pages, cuSeqlensQ: [0, 1, 4] }),
    'ERR_SHAPE',
    'attention: blockTable must be [n, max_pages], got [1, 2] (n is 1, but cuSeqlensQ has n = 2)',
  ],
  [
    'a mask of packed sequences over pages',
    () => {
      const packed = { cuSeqlensQ: [0, 4], cuSeqlensK: [0, 8] }
      const mask = Mask.fromWindow({ window: 2 }, { sq: 4, sk: 8, ...packed })
      return attention(q, kv, kv, { ...pages, mask })
    },
    'ERR_ARGUMENT',
    'attention: mask must not be of packed sequences with blockTable, got one that is',
  ],
  [
    'pages without lengths',
    () => attention(q, kv, kv, { blockTable: pages.blockTable }),
    'ERR_ARGUMENT',
    'attention: cacheSeqlens must be given with blockTable',
  ],
  [
    'pages of a size that is none',
    () => attention(q, heads(3, 2), heads(3, 2), pages),
    'ERR_SHAPE',
    'attention: the page size must be a power of two up to 256, got 3',
  ],
  ['no slopes', () => lightning(q, q, q, any({})), 'ERR_ARGUMENT', 'lightning: slopes is missing'],
  [
    'a chunk that is no power of two',
    () => lightning(q, q, q, { slopes: alibiSlopes(4), chunkSize: 48 }),
    'ERR_ARGUMENT',
    'lightning: chunkSize must be a power of two, got 48',
  ],
  [
    'a state of another size',
    () => lightning(q, q, q, { slopes: alibiSlopes(4), initialState: zeros([1, 4, 16, 8]) }),
    'ERR_SHAPE',
    'lightning: initialState must be [b, hs, d, e], got [1, 4, 16, 8] (e is 8, but v has e = 16)',
  ],
  [
    'a gradient with the heads of the keys',
    () => lightningBackward(q, q, q, heads(4, 2), { slopes: alibiSlopes(4) }),
    'ERR_SHAPE',
    'lightning.backward: dout must have as many heads as the output, 4, got 2',
  ],
  [
    'an unknown precision',
    () => lightning(q, q, q, { slopes: alibiSlopes(4), precision: any('low') }),
    'ERR_ARGUMENT',
    'lightning: precision must be default or high, got "low"',
  ],
  [
    'too many tokens at once',
    () =>
      lightningDecode(
        heads(17),
        heads(17),
        heads(17),
        zeros([3, 4, 16, 16]),
        tensor([0], [1], { dtype: 'int32' }),
        { slopes: alibiSlopes(4) },
      ),
    'ERR_SHAPE',
    'lightning.decode: s must be at most 16, got 17; longer runs belong to lightning',
  ],
  [
    'heads below 1',
    () => alibiSlopes(0),
    'ERR_ARGUMENT',
    'alibiSlopes: heads must be an integer from 1 to 65536, got 0',
  ],
  [
    'nothing to merge',
    () => merge([]),
    'ERR_ARGUMENT',
    'merge: parts must be a list of results, got an array of 0',
  ],
  [
    'half a part',
    () => merge([{ out: q, lse: any(undefined) }]),
    'ERR_ARGUMENT',
    'merge: parts[0].lse must be a tensor, got undefined',
  ],
  [
    'weights the other way round',
    () => linear(matrix, zeros([3, 4])),
    'ERR_SHAPE',
    'linear: weight must be [o, i], got [3, 4] (i is 4, but x has i = 3)',
  ],
  [
    'a dtype that no result has',
    () => linear(matrix, matrix, { dtype: any('int8') }),
    'ERR_ARGUMENT',
    'linear: dtype must be float32, float16 or bfloat16, got "int8"',
  ],
  [
    'options in place of a weight',
    () => norm(matrix, any({ eps: 1 })),
    'ERR_ARGUMENT',
    'norm: weight must be a tensor, got an object',
  ],
  [
    'an odd number of channels to turn',
    () => rope(q, { rotary: 3 }),
    'ERR_ARGUMENT',
    'rope: rotary must be even and at most d = 16, got 3',
  ],
  [
    'a word that is no choice',
    () => rope(q, { layout: any('neox') }),
    'ERR_ARGUMENT',
    'rope: layout must be half-split or interleaved, got "neox"',
  ],
  [
    'gate and up of other sizes',
    () => glu(matrix, zeros([2, 4])),
    'ERR_SHAPE',
    'glu: up must be [..., d], got [2, 4] (d is 4, but gate has d = 3)',
  ],
  [
    'ids that are floats',
    () => embed(any(matrix), matrix),
    'ERR_DTYPE',
    'embed: ids must be int32, int64 or uint8, got float32',
  ],
  [
    'shapes that do not broadcast',
    () => add(matrix, zeros([2])),
    'ERR_SHAPE',
    'add: y must broadcast with x, got [2] (x is [2, 3])',
  ],
  ['a disposed tensor', () => add(gone, gone), 'ERR_DISPOSED', 'tensor: this tensor was disposed'],
  [
    'a read of a disposed tensor',
    () => gone.read(),
    'ERR_DISPOSED',
    'tensor: this tensor was disposed',
  ],
  [
    'a view of a disposed tensor',
    () => gone.slice(0, 0, 1),
    'ERR_DISPOSED',
    'tensor: this tensor was disposed',
  ],
  [
    'a detached buffer',
    () => tensor(detached),
    'ERR_ARGUMENT',
    'tensor: data must be attached to memory, got a Float32Array (its buffer was transferred or became too short)',
  ],
  [
    'a buffer that became too short',
    () => tensor(shrunk),
    'ERR_ARGUMENT',
    'tensor: data must be attached to memory, got a Float32Array (its buffer was transferred or became too short)',
  ],
  [
    'a shared buffer',
    () => tensor(shared),
    'ERR_ARGUMENT',
    'tensor: data must not be shared memory; copy it first',
  ],
  [
    'too few values',
    () => tensor([1, 2, 3], [2, 2]),
    'ERR_SHAPE',
    'tensor: data must have 4 elements for shape [2, 2], got 3',
  ],
  [
    'an array of strings',
    () => tensor(any(['1'])),
    'ERR_ARGUMENT',
    'tensor: data[0] must be a number, got "1"',
  ],
  [
    'an integer that is none',
    () => tensor([1.5], [1], { dtype: 'int32' }),
    'ERR_ARGUMENT',
    'tensor: data[0] must be an integer from -2147483648 to 2147483647, got 1.5',
  ],
  [
    'doubles',
    () => tensor(any(new Float64Array(2))),
    'ERR_DTYPE',
    'tensor: data must be a Float32Array, Float16Array, Uint16Array, Uint8Array, Int32Array or BigInt64Array, got a Float64Array',
  ],
  [
    'bits of another dtype',
    () => tensor(new Int32Array(2), [2], { dtype: 'float16' }),
    'ERR_DTYPE',
    'tensor: data must be a Uint16Array or Float32Array for float16, got Int32Array',
  ],
  [
    'a dtype of elsewhere',
    () => empty([2], { dtype: any('float64') }),
    'ERR_ARGUMENT',
    'empty: dtype must be one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int32, int64, uint8, bool, got "float64"',
  ],
  [
    'a device of elsewhere',
    () => empty([2], { device: any('gpu') }),
    'ERR_ARGUMENT',
    'empty: device must be "cpu", "cuda" or "cuda:N", got "gpu"',
  ],
  [
    'a shape that is a number',
    () => zeros(any(4)),
    'ERR_ARGUMENT',
    'zeros: shape must be an array of sizes, got 4',
  ],
  [
    'a negative size',
    () => zeros([2, -1]),
    'ERR_ARGUMENT',
    'zeros: shape[1] must be an integer at least 0, got -1',
  ],
  [
    'a size beyond all memory',
    () => empty([2 ** 50]),
    'ERR_MEMORY',
    (inUse) =>
      `empty: cannot allocate 4503599627370496 bytes on cpu, where ${inUse} bytes are in use; dispose tensors that are no longer needed`,
  ],
  [
    'sizes whose product overflows',
    () => empty([2 ** 40, 2 ** 40]),
    'ERR_SHAPE',
    'empty: shape [1099511627776, 1099511627776] has more bytes than can be addressed',
  ],
  [
    'too many dimensions',
    () => empty(Array(9).fill(1)),
    'ERR_SHAPE',
    'empty: shape must have at most 8 dimensions, got 9',
  ],
  [
    'random integers',
    () => randn([2], { dtype: any('int32') }),
    'ERR_DTYPE',
    'randn: dtype must be float32, float16 or bfloat16 for random numbers, got int32',
  ],
  [
    'a value that is no number',
    () => full([2], any('1')),
    'ERR_ARGUMENT',
    'full: value must be a number, got "1"',
  ],
  [
    'a dimension that is not there',
    () => matrix.slice(2, 0),
    'ERR_ARGUMENT',
    'slice: dimension must be an integer from -2 to 1, got 2',
  ],
  [
    'an index that is not there',
    () => matrix.select(0, 2),
    'ERR_ARGUMENT',
    'select: index must be an integer from -2 to 1, got 2',
  ],
  [
    'another number of elements',
    () => matrix.reshape([4, 2]),
    'ERR_SHAPE',
    'reshape: shape must have 6 elements, got [4, 2] (the tensor is [2, 3])',
  ],
  [
    'a shape that only a copy has',
    () => matrix.transpose(0, 1).reshape([6]),
    'ERR_SHAPE',
    'reshape: shape [6] would need a copy (the strides are [1, 3]); call contiguous() first',
  ],
  [
    'scores that are a view with strides',
    () => keep(zeros([1, 1, 4, 4]).transpose(2, 3), { sq: 256, block: 64, topBlocks: 1 }),
    'ERR_SHAPE',
    'keep: score must be contiguous; call contiguous() first',
  ],
  [
    'a size that does not repeat',
    () => matrix.expand([4, 3]),
    'ERR_SHAPE',
    'expand: shape must extend [2, 3], got [4, 3]',
  ],
  [
    'a cast to nowhere',
    () => matrix.cast(any('half')),
    'ERR_ARGUMENT',
    'cast: dtype must be one of float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int32, int64, uint8, bool, got "half"',
  ],
  [
    'a copy from another shape',
    () => matrix.copyFrom(zeros([3, 2])),
    'ERR_SHAPE',
    'copyFrom: source must be [2, 3], got [3, 2]',
  ],
  [
    'values of another count',
    () => matrix.write([1, 2]),
    'ERR_SHAPE',
    'write: data must have 6 elements for shape [2, 3], got 2',
  ],
  [
    'a read as another dtype',
    () => matrix.read(any({ as: 'float64' })),
    'ERR_ARGUMENT',
    'read: as must be "float32", got "float64"',
  ],
  [
    'a read of more than an array can hold',
    () =>
      zeros([1])
        .expand([2 ** 52])
        .read(),
    'ERR_UNSUPPORTED',
    `read: the tensor must have at most ${constants.MAX_LENGTH} bytes to be read at once, got ${2 ** 54}; read slices of it`,
  ],
  [
    'such a read that blocks',
    () =>
      zeros([1], { dtype: 'float16' })
        .expand([2 ** 52])
        .readSync({ as: 'float32' }),
    'ERR_UNSUPPORTED',
    `read: the tensor must have at most ${constants.MAX_LENGTH} bytes to be read at once, got ${2 ** 54}; read slices of it`,
  ],
  [
    'more than there is memory for',
    () => one.expand([2 ** 52]).contiguous(),
    'ERR_MEMORY',
    (inUse) =>
      `contiguous: cannot allocate ${2 ** 54} bytes on cpu, where ${inUse} bytes are in use; dispose tensors that are no longer needed`,
  ],
  [
    'a size that is no safe integer',
    () => zeros([2 ** 53]),
    'ERR_ARGUMENT',
    'zeros: shape[0] must be an integer from 0 to 9007199254740991, got 9007199254740992',
  ],
  [
    'a bias in the place of the options',
    () => linear(matrix, matrix, any(zeros([2]))),
    'ERR_ARGUMENT',
    'linear: options must be an object, got a tensor',
  ],
  [
    'a tensor for a mask',
    () => attention(q, q, q, { mask: any(zeros([4, 4])) }),
    'ERR_ARGUMENT',
    'attention: mask must be a mask, got a tensor',
  ],
  [
    'a bias that is no number',
    () => attention(q, q, q, { bias: Number.NaN }),
    'ERR_ARGUMENT',
    'attention: bias must be a tensor or a finite number, got NaN',
  ],
  [
    'a table of numbers',
    () => Mask.fromBlocks(any(zeros([1, 1, 1, 1])), { sq: 128 }),
    'ERR_DTYPE',
    'mask: table must be uint8 or bool, got float32',
  ],
  [
    'bits of numbers',
    () => Mask.fromBits(any(zeros([1, 1, 1, 1])), { sq: 128 }),
    'ERR_DTYPE',
    'mask: bits must be int32 or int64, got float32',
  ],
  [
    'too few bits',
    () => Mask.fromBits(zeros([1, 1, 1, 0], { dtype: 'int32' }), { sq: 128 }),
    'ERR_SHAPE',
    'mask: bits must have a bit for each of 1 blocks, got [1, 1, 1, 0]',
  ],
  [
    'pairs of numbers',
    () => Mask.fromPairs(any(zeros([1, 1, 1])), { sq: 128 }),
    'ERR_DTYPE',
    'mask: pairs must be int32, got float32',
  ],
  [
    'a part whose halves differ',
    () => merge([{ out: q, lse: zeros([1, 3, 4]) }]),
    'ERR_SHAPE',
    'merge: parts[0].lse must be [b, h, s], got [1, 3, 4] (h is 3, but parts[0].out has h = 4)',
  ],
  [
    'keys of another prompt',
    () => flexPrefill(q, zeros([1, 4, 2, 8])),
    'ERR_SHAPE',
    'flexPrefill: k must be [b, sk, hk, d], got [1, 4, 2, 8] (d is 8, but q has d = 16)',
  ],
  [
    'heads that do not go together, in a prompt that is dense',
    () => flexPrefill(q, heads(4, 3)),
    'ERR_SHAPE',
    'flexPrefill: hq must be a multiple of hk, got 4 and 3',
  ],
  [
    'more queries than keys, in a prompt that is dense',
    () => hipAttention(heads(8), heads(4, 2), heads(4, 2)),
    'ERR_SHAPE',
    'hipAttention: sq must be at most sk, got 8 and 4',
  ],
  [
    'a state in the other layout',
    () =>
      lightning(q, q, zeros([1, 4, 4, 24]), {
        slopes: [1, 1, 1, 1],
        stateLayout: 'ev-dk',
        initialState: zeros([1, 4, 16, 24]),
      }),
    'ERR_SHAPE',
    'lightning: initialState must be [b, hs, e, d], got [1, 4, 16, 24] (d is 24, but q has d = 16)',
  ],
  [
    'the gradient of a state in the other layout',
    () =>
      lightningBackward(q, q, zeros([1, 4, 4, 24]), zeros([1, 4, 4, 24]), {
        slopes: [1, 1, 1, 1],
        stateLayout: 'ev-dk',
        dstate: zeros([1, 4, 16, 24]),
      }),
    'ERR_SHAPE',
    'lightning.backward: dstate must be [b, hs, e, d], got [1, 4, 16, 24] (d is 24, but q has d = 16)',
  ],
  [
    'a signal that is none',
    () => matrix.read({ signal: any(5) }),
    'ERR_ARGUMENT',
    'read: signal must be an AbortSignal, got 5',
  ],
  [
    'a scope of nothing',
    () => scope(any(undefined)),
    'ERR_ARGUMENT',
    'scope: body must be a function, got undefined',
  ],
  [
    'memory of nowhere',
    () => memory(any('disk')),
    'ERR_ARGUMENT',
    'memory: device must be "cpu", "cuda" or "cuda:N", got "disk"',
  ],
  [
    'a length left out',
    () => matrix.slice(0, any(undefined)),
    'ERR_ARGUMENT',
    'slice: start must be an integer, got undefined',
  ],
  [
    'a graph that waits',
    () => graph(async () => add(matrix, matrix)),
    'ERR_ARGUMENT',
    'graph: body must be synchronous, got one that returns a promise',
  ],
  [
    'a time that waits',
    () => elapsed(async () => {}),
    'ERR_ARGUMENT',
    'elapsed: body must be synchronous, got one that returns a promise',
  ],
  [
    'a mask of other lengths',
    () => attention(q, q, q, { mask: Mask.fromWindow({ window: 2 }, { sq: 4, sk: 8 }) }),
    'ERR_SHAPE',
    'attention: mask must be of sq = 4 and sk = 4, got one of 4 and 8',
  ],
  [
    'a mask of a prompt for pages',
    () => attention(q, kv, kv, { ...pages, mask: Mask.fromWindow({ window: 2 }, { sq: 4 }) }),
    'ERR_SHAPE',
    'attention: mask must be of sq = 4 and sk = 8, got one of 4 and 4',
  ],
  [
    'a table of another size',
    () => Mask.fromBlocks(zeros([1, 1, 2, 3], { dtype: 'uint8' }), { sq: 256 }),
    'ERR_SHAPE',
    'mask: table must be [b, heads, 2, 2], got [1, 1, 2, 3]',
  ],
  [
    'a misspelled list of a mask',
    () => Mask.fromTokens(any({ colums: [1] }), { sq: 4 }),
    'ERR_ARGUMENT',
    'mask: unknown option "colums"; did you mean "columns"?',
  ],
  [
    'a misspelled option of a decoder',
    () => hipDecoder(any({ offlod: true })),
    'ERR_ARGUMENT',
    'hipDecoder: unknown option "offlod"; did you mean "offload"?',
  ],
  [
    'a misspelled option of a prefill',
    () => flexPrefillAttention(q, kv, kv, any({ denseBelo: 1 })),
    'ERR_ARGUMENT',
    'flexPrefillAttention: unknown option "denseBelo"; did you mean "denseBelow"?',
  ],
  [
    'tables of a rope left out',
    () => hip(q, kv, { stages: hipStages, rope: any({}) }),
    'ERR_ARGUMENT',
    'hip: rope.cos must be a tensor, got undefined',
  ],
  [
    'a size of no rank',
    () => cascade('Y[n,o] = sum(i) X[n,i] * W[o,i]').analyze({ sizes: { n: 4 } }),
    'ERR_ARGUMENT',
    'cascade: unknown size "n"; did you mean "N"?',
  ],
  [
    'a scalar that the text has not',
    () => cascade('Y[n] = X[n] * scale').analyze({ scalars: { scal: 4 } }),
    'ERR_ARGUMENT',
    'cascade: unknown scalar "scal"; did you mean "scale"?',
  ],
]

describe('messages', () => {
  it.each(wrong)('%s', async (_what, call, code, message) => {
    const before = memory().bytes
    const error = await failure(call)
    expect(faultOf(error)).toBeUndefined()
    if (typeof message === 'string') expect(error.message).toBe(message)
    else {
      // tensors of other cases may be collected at any time
      const inUse = Number(/(\d+) bytes are in use/.exec(error.message)?.[1])
      expect(error.message).toBe(message(inUse))
      expect(inUse).toBeLessThanOrEqual(before)
      expect(inUse).toBeGreaterThanOrEqual(memory().bytes)
    }
    expect(error.code).toBe(code)
  })
})

describe('a device that is not there', () => {
  it.skipIf(cuda.available)('is refused with the reason and the remedy', async () => {
    const { text, remedy } = cuda.reason!
    for (const [op, call] of [
      ['empty', () => empty([2], { device: 'cuda' })],
      ['tensor', () => tensor([1], [1], { device: 'cuda:0' })],
      ['to', () => matrix.to('cuda:0')],
      ['memory', () => memory('cuda:0')],
      ['synchronize', () => synchronize('cuda:0')],
    ] as const) {
      const error = await failure(call)
      expect(error).toMatchObject({ code: 'ERR_DEVICE', op, argument: 'device' })
      expect(error.message).toBe(`${op}: device cuda:0 cannot be used: ${text}; ${remedy}`)
    }
  })
})

describeGpu('tensors of two devices', () => {
  it('are refused with the remedy', async () => {
    const error = await failure(() => attention(q.to('cuda:0'), kv, kv))
    expect(error).toMatchObject({ code: 'ERR_DEVICE', op: 'attention', argument: 'k' })
    expect(error.message).toBe(
      "attention: k is on cpu, but q is on cuda:0; move it with k.to('cuda:0')",
    )
    const mask = Mask.fromDocuments([0, 2, 4], { sq: 4 })
    const [rows, keys] = [q.to('cuda:0'), kv.to('cuda:0')]
    expect((await failure(() => attention(rows, keys, keys, { mask }))).message).toBe(
      "attention: mask is on cpu, but q is on cuda:0; make it with device: 'cuda:0'",
    )
  })
})

describe('errors of the device', () => {
  const ids = tensor([0, 9], [2], { dtype: 'int32' })

  it('reject the read, name the operator and follow what was made of it', async () => {
    const rows = embed(ids, matrix)
    const error = await failure(() => silu(add(rows, rows)).read())
    expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'embed', argument: 'ids' })
    expect(error.message).toBe('embed: ids must be at least 0 and below 2, got 9')
    expect((await failure(() => rows.readSync())).message).toBe(error.message)
  })

  it('are of the one class, with a stack', async () => {
    const error = await failure(() => embed(ids, matrix).read())
    expect(error.name).toBe('HeddleError')
    expect(error).toBeInstanceOf(Error)
    expect(error.stack).toContain(error.message)
  })
})

describeDevices('a tensor that failed', (device) => {
  const int32 = (values: number[]) => tensor(values, [2], { dtype: 'int32', device })
  const table = () => tensor([1, 2, 3, 4, 5, 6], [2, 3], { device })
  const make = () => embed(int32([0, 9]), table())
  const failed = async (x: Tensor) => expect((await failure(() => x.read())).op).toBe('embed')
  const numbers = async (x: Tensor) => Array.from((await x.read()) as Float32Array)

  it('is well again once it is overwritten whole, by nothing else', async () => {
    for (const overwrite of [
      (x: Tensor) => x.copyFrom(table()),
      (x: Tensor) => x.write([1, 2, 3, 4, 5, 6]),
      (x: Tensor) => x.reshape([3, 2, 1]).write([1, 2, 3, 4, 5, 6]),
      (x: Tensor) => x.transpose(0, 1).copyFrom(table().transpose(0, 1)),
    ]) {
      const x = make()
      const doubled = add(x, x)
      const before = failed(x)
      overwrite(x)
      expect(await numbers(x)).toEqual([1, 2, 3, 4, 5, 6])
      expect(await numbers(add(x, x))).toEqual([2, 4, 6, 8, 10, 12])
      await before
      await failed(doubled)
    }
    const x = make()
    await failed(x.copyFrom(x))
    await failed(x.copyFrom(make()))
    x.slice(0, 0, 1).copyFrom(table().slice(0, 0, 1))
    x.slice(0, 1).copyFrom(table().slice(0, 1))
    await failed(x)
    await failed(
      x
        .expand([2, 2, 3])
        .slice(0, 0, 0)
        .copyFrom(zeros([0, 2, 3], { device })),
    )
  })

  it('is well again where a graph overwrites it', async () => {
    const ids = int32([0, 9])
    const [x, values] = [make(), table()]
    const step = graph(() => add(x.copyFrom(embed(ids, values)), x))
    await failed(step.result)
    for (const id of [1, 9, 0]) {
      ids.write([0, id])
      step.replay()
      if (id > 1) await failed(step.result)
      else expect((await numbers(step.result))[3]).toBe(id ? 8 : 2)
    }
    expect(await numbers(x)).toEqual([1, 2, 3, 1, 2, 3])
  })

  it('has failed on other devices, too', async () => {
    for (const to of ['cpu', device] as const) {
      const moved = make().to('cpu').to(to)
      await failed(add(moved, moved))
      moved.copyFrom(table().to(to))
      expect(await numbers(moved)).toEqual([1, 2, 3, 4, 5, 6])
    }
  })
})
