// Every kernel once on small odd shapes, for the tools of the CUDA toolkit:
//   compute-sanitizer --tool memcheck --error-exitcode 1 node tests/gpu/sanitize.mjs
// Slow tools take it in parts: words select the checks whose names have one of them.
//   compute-sanitizer --tool racecheck --error-exitcode 1 node tests/gpu/sanitize.mjs lightning masks
// What racecheck of CUDA 13.0 says of attention.backward (lse and delta), many heads (what a tile is), re-weighted (factors) and
// hip 128 of a prompt (boxes) is none: it does not see that __syncwarp, or bar.sync, and then one lane's arrival at a barrier in
// shared memory order what the other lanes did before. A program of 40 lines whose lanes read a bulk copy and let a lane give the
// stage back so is reported as well, and not when every lane arrives itself. Its initcheck does not see what bulk copies write to
// global memory.
import {
  add,
  alibiSlopes,
  attention,
  attentionBackward,
  cascade,
  embed,
  flexPrefill,
  full,
  glu,
  hip,
  lightning,
  lightningBackward,
  lightningDecode,
  linear,
  Mask,
  merge,
  minference,
  norm,
  randn,
  rope,
  sampled,
  scatter,
  silu,
  softplusAttention,
  synchronize,
  tensor,
  xattention,
  zeros,
} from 'heddle'

const device = 'cuda:0'
let seed = 0
const draw = (shape, dtype = 'bfloat16') => randn(shape, { seed: seed++, dtype, device })
const results = []
const keep = (made) => results.push(...(made.lse ? [made.out, made.lse] : [made]))
const differentiate = (q, k, v, { deterministic, ...options }) => {
  const { out, lse } = attention(q, k, v, options)
  const { dq, dk, dv, dsink, dslopes } = attentionBackward(q, k, v, out, lse, out, {
    ...options,
    deterministic,
  })
  results.push(...[out, lse, dq, dk, dv, dsink, dslopes].filter((made) => made !== undefined))
}
const words = process.argv.slice(2)
const check = (name, body) => {
  if (words.length === 0 || words.some((word) => name.includes(word))) body()
}

for (const dtype of ['bfloat16', 'float16', 'float32'])
  for (const d of [64, 128, 256, 40])
    for (const causal of [true, false])
      check(`attention ${dtype} ${d} ${causal ? 'causal' : 'dense'}`, () => {
        const [q, k, v] = [
          draw([2, 193, 4, d], dtype),
          draw([2, 257, 2, d], dtype),
          draw([2, 257, 2, d], dtype),
        ]
        differentiate(q, k, v, { causal })
        const options = {
          causal,
          window: 70,
          softCap: 20,
          slopes: alibiSlopes(4),
          sink: [0, 1, 2, 3],
        }
        if (d < 256) differentiate(q, k, v, options)
        differentiate(q, k, v, { causal, softCap: 20, sink: [0, 1, 2, 3], deterministic: false })
      })
// so many heads that rows are taken by 192
for (const d of [72, 128])
  check(`many heads ${d}`, () => {
    const [q, k] = [draw([1, 1100, 64, d]), draw([1, 1100, 2, d])]
    keep(attention(q, k, k, { causal: true, scale: 3 }))
    keep(attention(q, k, k))
  })
const cu = [0, 1, 1, 70, 150]
const slopes = alibiSlopes(4)
check('decode', () => {
  const pages = draw([9, 16, 2, 64])
  const blockTable = tensor([3, 1, 8, 0, 2, 7], [2, 3], { dtype: 'int32', device })
  keep(
    attention(draw([2, 3, 4, 64]), pages, pages, {
      blockTable,
      cacheSeqlens: [33, 48],
      causal: true,
    }),
  )
  keep(attention(draw([3, 1, 8, 128]), draw([3, 1500, 2, 128]), draw([3, 1500, 2, 128])))
})
// rows for all multiprocessors, and short sequences beside them
for (const d of [64, 128])
  check(`prompts over pages ${d}`, () => {
    const pages = draw([24, 32, 2, d])
    const blockTable = tensor([...Array(24).keys()], [3, 8], { dtype: 'int32', device })
    const lengths = { blockTable, cacheSeqlens: [250, 33, 131], causal: true }
    keep(attention(draw([3, 384, 34, d]), pages, pages, lengths))
    const cuSeqlensQ = [0, 300, 310, 1100]
    keep(attention(draw([1, 1100, 34, d]), pages, pages, { ...lengths, cuSeqlensQ }))
  })
check('packed', () => {
  const packed = draw([1, 150, 2, 128])
  differentiate(packed, packed, packed, { causal: true, cuSeqlensQ: cu, cuSeqlensK: cu })
})
// by Hopper's kernel, then by the portable one
for (const [d, softCap] of [
  [64, 0],
  [128, 0],
  [40, 20],
])
  check(`float8 ${d}`, () => {
    const make = (shape) => draw(shape).cast('float8_e4m3fn')
    const cache = make([2, 300, 2, d])
    keep(attention(make([2, 2, 4, d]), cache, cache, { causal: true }))
    const [q, k] = [make([2, 193, 4, d]), make([2, 257, 2, d])]
    keep(attention(q, k, k, { window: 150, softCap, kScale: [0.5, 2], sink: [0, 1, 2, 3] }))
    const x = make([1, 150, 2, d])
    const cuSeqlens = { cuSeqlensQ: cu, cuSeqlensK: cu }
    keep(attention(x, x, x, { causal: true, softCap, ...cuSeqlens, dtype: 'float16' }))
  })
for (const [d, e] of [
  [64, 64],
  [128, 128],
  [136, 72],
  [256, 40],
])
  check(`lightning ${d} ${e}`, () => {
    const [q, k, v] = [draw([1, 150, 4, d]), draw([1, 150, 4, d]), draw([1, 150, 4, e])]
    const initialState = randn([4, 4, d, e], { seed: seed++, device })
    const options = { slopes, initialState, cuSeqlens: cu }
    results.push(...Object.values(lightning(q, k, v, { ...options, outputFinalState: true })))
    const dout = draw([1, 150, 4, e])
    // in portable code and in Hopper's
    for (const outputDslopes of [true, false]) {
      const gradients = lightningBackward(q, k, v, dout, { ...options, outputDslopes })
      results.push(...Object.values(gradients).filter((made) => made !== undefined))
    }
  })
// few heads and a long sequence: segments side by side
check('lightning long', () => {
  const long = draw([1, 4200, 1, 64])
  keep(lightning(long, long, long, { slopes: [0.01] }).out)
  keep(lightningBackward(long, long, long, long, { slopes: [0.01] }).dk)
})
for (const dtype of ['bfloat16', 'float32']) {
  check(`lightning decode ${dtype}`, () => {
    const x = draw([1, 150, 4, 72], dtype)
    keep(lightning(x, x, x, { slopes, cuSeqlens: cu }).out)
    const token = draw([2, 2, 4, 72], dtype)
    const states = zeros([3, 4, 72, 72], { device })
    const slots = tensor([2, -1], [2], { dtype: 'int32', device })
    keep(lightningDecode(token, token, token, states, slots, { slopes }).out)
  })
  check(`small ${dtype}`, () => {
    const x = draw([1, 150, 4, 72], dtype)
    const part = () => attention(x, x, x)
    const [a, b] = [part(), part()]
    keep(merge([a, b]))
    const wide = draw([33, 136], dtype)
    keep(linear(wide, draw([72, 136], dtype)))
    keep(norm(wide, draw([136], dtype)))
    keep(glu(wide, wide))
    keep(rope(x))
    keep(add(silu(wide), wide))
    const ids = tensor([0, 49, 7], [3], { dtype: 'int32', device })
    keep(embed(ids, draw([50, 24], dtype)))
    keep(scatter(draw([25, 2, 3, 8], dtype), ids, draw([3, 3, 8], dtype)))
    keep(scatter(draw([50, 3], dtype), ids, draw([3, 3], dtype)))
  })
  check(`masks ${dtype}`, () => {
    const [q, k] = [draw([1, 333, 4, 72], dtype), draw([1, 401, 2, 72], dtype)]
    const over = (mask) => keep(attention(q, k, k, { mask }))
    const options = { gamma: 0.7, minBudget: 0, block: 64 }
    for (const mode of ['reference', 'coverage']) over(flexPrefill(q, k, { ...options, mode }))
    // at this size matrix units look at the last queries
    over(flexPrefill(draw([1, 333, 4, 64], dtype), draw([1, 401, 2, 64], dtype), options))
    // and decide after the first look, on either kind of heads
    for (const tau of [0, 1]) {
      const [queries, keys] = [draw([1, 333, 4, 64], dtype), draw([1, 401, 2, 64], dtype)]
      over(flexPrefill(queries, keys, { gamma: 0.7, minBudget: 0, tau }))
    }
    over(sampled(q, k, { topK: 100 }))
    over(xattention(q, k, { block: 64 }))
    // of 16 bits by matrix units
    for (const [way, options] of [
      [sampled, { topK: 100 }],
      [xattention, { block: 64 }],
      [xattention, { stride: 16 }],
    ])
      keep(way(draw([1, 333, 4, 64], dtype), draw([1, 381, 2, 64], dtype), options).blocks)
    over(minference(q, k, { patterns: [{ kind: 'vertical-slash', vertical: 40, slash: 110 }] }))
    const int32 = (values, shape) => tensor(values, shape, { dtype: 'int32', device })
    const lists = {
      count: int32([1, 0, 2], [1, 1, 3]),
      index: int32([3, -1, 0, 0, 1, 2], [1, 1, 3, 2]),
    }
    const shape = { sq: 333, sk: 401, device }
    over(Mask.fromLists(lists, shape).union(Mask.fromWindow({ window: 9, sinkTokens: 2 }, shape)))
    over(Mask.fromDocuments([0, 100, 401], shape))
  })
}
for (const d of [64, 128])
  check(`gradients of masks ${d}`, () => {
    const [q, k] = [draw([1, 150, 4, d]), draw([1, 150, 2, d])]
    const shape = { sq: 150, sk: 150, block: 32, device }
    const mask = Mask.fromWindow({ window: 40, sinkTokens: 3 }, shape)
    differentiate(q, k, k, { mask })
    differentiate(q, k, k, { mask, deterministic: false })
    differentiate(q, k, k, { mask: hip(q, k, { topK: 16, window: 32 }) })
    const starts = [0, 70, 150]
    const packed = { ...shape, cuSeqlensQ: starts, cuSeqlensK: starts }
    const lines = Mask.fromTokens({ columns: [3], diagonals: [0, 9] }, packed)
    differentiate(q, k, k, { mask: lines })
  })
for (const weights of ['softmax', 'sigmoid', 'relu', 'softplus'])
  check(`weights ${weights}`, () => {
    const [q, k] = [draw([2, 193, 4, 128]), draw([2, 257, 2, 128])]
    const bias = draw([4, 1, 257])
    for (const normalise of [true, false].slice(weights === 'softmax' ? 1 : 0))
      differentiate(q, k, k, { weights, bias, normalise: normalise || weights === 'softmax' })
    keep(attention(q, k, k, { weights, causal: true, cosine: true, scale: 4 }))
  })
check('reweighted', () => {
  const [q, k] = [draw([2, 193, 4, 128]), draw([2, 257, 2, 128])]
  keep(softplusAttention(q, k, k))
})
for (const d of [64, 128])
  check(`hip ${d}`, () => {
    const [q, k] = [draw([1, 333, 4, d]), draw([1, 401, 2, d])]
    const stages = [
      { chunk: 32, stride: 2 },
      { chunk: 8, stride: 1, topK: 128 },
    ]
    keep(attention(q, k, k, { mask: hip(q, k, { topK: 64, window: 64 }) }))
    keep(attention(q, k, k, { mask: hip(q, k, { stages, topK: 64, window: 64, sinkTokens: 8 }) }))
  })
// with 64 rows of two heads for every multiprocessor of an H200, which its own kernel gathers for
check('hip 128 of a prompt', () => {
  const [q, k] = [draw([1, 1100, 16, 128]), draw([1, 1201, 2, 128])]
  const options = { topK: 32, block: [64, 8], window: 40, sinkTokens: 8, headMode: 'kv_group' }
  keep(attention(q, k, k, { mask: hip(q, k, options) }))
})
for (const d of [64, 128])
  check(`lightning decode of many ${d}`, () => {
    const token = draw([40, 2, 8, d])
    const states = zeros([41, 8, d, d], { device })
    const slots = tensor(
      Array.from({ length: 40 }, (_, i) => (i === 7 ? -1 : 40 - i)),
      undefined,
      { dtype: 'int32', device },
    )
    for (const x of [token, token.slice(1, 0, 1)])
      keep(lightningDecode(x, x, x, states, slots, { slopes: alibiSlopes(8) }).out)
  })
for (const d of [64, 128])
  check(`float8 attention ${d}`, () => {
    const [q, k] = [draw([2, 193, 4, d]), draw([2, 257, 2, d])].map((x) => x.cast('float8_e4m3fn'))
    for (const causal of [true, false])
      keep(attention(q, k, k, { causal, qScale: [1, 2, 3, 4], kScale: [0.5, 2] }))
  })
check('einsum', () => {
  const plan = cascade('Y[i] = max(j) A[i,j] * B[j]').compile({ fused: 'preferred' })
  keep(plan(draw([5, 7], 'float32'), draw([7], 'float32')).Y)
})
check('float8', () => keep(full([1001], 3, { device }).cast('float8_e4m3fn').cast('float16')))
await synchronize(device)
for (const result of results) await result.read()
process.stdout.write(`${results.length} results\n`)
