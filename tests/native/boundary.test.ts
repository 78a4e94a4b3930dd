import { createRequire } from 'node:module'
import { join } from 'node:path'
import fc from 'fast-check'
import * as heddle from 'heddle'
import { HeddleError, Tensor, zeros } from 'heddle'
import { afterEach, describe, expect, it } from 'vitest'

// What no caller should pass, passed everywhere: each call gives a result or a HeddleError that says what was wrong.

const exported: Readonly<Record<string, unknown>> = heddle

class CallersError extends Error {}

const f32 = (shape: number[]) => zeros(shape)
const disposed = f32([2, 2])
disposed.dispose()
const detached = new Float32Array(8)
structuredClone(detached.buffer, { transfer: [detached.buffer] })
const Resizable = ArrayBuffer as unknown as new (
  size: number,
  options: { maxByteLength: number },
) => ArrayBuffer

/** Values that are wrong almost everywhere. Sizes are small, or so large that nothing could hold them. */
const junk = fc.oneof(
  fc.constantFrom<unknown>(
    undefined,
    null,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    Number.NEGATIVE_INFINITY,
    -1,
    -0,
    0.5,
    1e-320,
    2 ** 31,
    -(2 ** 31),
    2 ** 32,
    2 ** 53,
    2 ** 63,
    1e308,
    true,
    '',
    'cpu',
    'cuda:7',
    'bfloat16',
    'int32',
    '__proto__',
    'x'.repeat(5000),
    10n,
    -(2n ** 70n),
    Symbol('wrong'),
    [],
    {},
    () => 1,
    new Date(0),
    new Map(),
    disposed,
    detached,
    new Float32Array(new Resizable(16, { maxByteLength: 64 })),
    new Float32Array(new SharedArrayBuffer(16)),
    new Uint8Array(3),
    new Float64Array(4),
    new BigInt64Array(2),
    new DataView(new ArrayBuffer(8)),
    new ArrayBuffer(8),
  ),
  fc
    .constantFrom<() => unknown>(
      () => new Array(5),
      () => [2 ** 31, 2 ** 31, 2 ** 31],
      () => [2 ** 53, 4],
      () => [-1, 4],
      () => [1.5, 4],
      () => [2 ** 40],
      () => Array.from({ length: 40 }, () => 1),
      () => ({ length: 3, 0: 1, 1: 2, 2: 3 }),
      () => new Proxy([2, 3], {}),
      () => new Proxy({}, { get: () => 1, ownKeys: () => ['causal'] }),
      () => ({
        get dtype(): string {
          throw new CallersError('a getter of the caller')
        },
      }),
      () => Object.create(Tensor.prototype),
      () => ({ __proto__: f32([1]) }),
      () => f32([]),
      () => f32([0]),
      () => f32([3]),
      () => f32([2, 3]),
      () => f32([1, 2, 3, 8]),
      () => zeros([1, 4, 2, 8], { dtype: 'int64' }),
      () => zeros([1, 4, 2, 8], { dtype: 'float8_e4m3fn' }),
      () => zeros([1, 4, 2, 8], { dtype: 'bfloat16' }).transpose(1, 2),
      () => f32([1, 1, 1, 8]).expand([1, 4, 2, 8]),
    )
    .map((make) => make()),
  fc.integer({ min: -3, max: 9 }),
  fc.array(fc.integer({ min: -2, max: 5 }), { maxLength: 6 }),
  fc.anything({ maxDepth: 2, maxKeys: 3 }),
)

type Call = (...args: unknown[]) => unknown
interface Target {
  name: string
  call: Call
  /** Arguments that are right, made anew for each call. */
  args(): unknown[]
  /** Options that exist, the last argument. */
  options: readonly string[]
  /** A method, whose first argument here is its tensor. */
  self?: true
}

const q = () => zeros([1, 4, 2, 8], { dtype: 'bfloat16' })
const q32 = () => f32([1, 4, 2, 8])
const pair = () => ({ out: q32(), lse: f32([1, 2, 4]) })
const ints = (values: number[]) =>
  heddle.tensor(Int32Array.from(values), [values.length], { dtype: 'int32' })
const method =
  (name: string): Call =>
  (self, ...args) =>
    (self as Record<string, Call>)[name]!(...args)
const matrix = () => f32([4, 6])

const targets: Target[] = [
  {
    name: 'attention',
    call: heddle.attention as Call,
    args: () => [q(), q(), q(), { causal: true, window: 3, softCap: 2, slopes: [1, 2] }],
    options: [
      'causal',
      'window',
      'scale',
      'softCap',
      'slopes',
      'sink',
      'cuSeqlensQ',
      'cuSeqlensK',
      'blockTable',
      'cacheSeqlens',
      'qScale',
      'dtype',
    ],
  },
  {
    name: 'lightning',
    call: heddle.lightning as Call,
    args: () => [q32(), q32(), q32(), { slopes: [0.5, 1] }],
    options: [
      'slopes',
      'scale',
      'initialState',
      'outputFinalState',
      'cuSeqlens',
      'chunkSize',
      'precision',
    ],
  },
  {
    name: 'lightningBackward',
    call: heddle.lightningBackward as Call,
    args: () => [q32(), q32(), q32(), q32(), { slopes: [0.5, 1] }],
    options: [
      'slopes',
      'scale',
      'initialState',
      'cuSeqlens',
      'chunkSize',
      'precision',
      'dstate',
      'outputDslopes',
    ],
  },
  {
    name: 'lightningDecode',
    call: heddle.lightningDecode as Call,
    args: () => [q32(), q32(), q32(), f32([3, 2, 8, 8]), ints([1]), { slopes: [0.5, 1] }],
    options: ['slopes', 'scale', 'stateLayout', 'outputAllStates'],
  },
  { name: 'merge', call: heddle.merge as Call, args: () => [[pair(), pair()]], options: [] },
  {
    name: 'linear',
    call: heddle.linear as Call,
    args: () => [matrix(), f32([5, 6]), { bias: f32([5]) }],
    options: ['bias', 'dtype'],
  },
  {
    name: 'norm',
    call: heddle.norm as Call,
    args: () => [matrix(), f32([6]), {}],
    options: ['eps', 'weight'],
  },
  {
    name: 'rope',
    call: heddle.rope as Call,
    args: () => [q32(), { offset: 3 }],
    options: ['theta', 'rotary', 'layout', 'offset', 'positions'],
  },
  {
    name: 'glu',
    call: heddle.glu as Call,
    args: () => [matrix(), matrix(), {}],
    options: ['activation'],
  },
  { name: 'embed', call: heddle.embed as Call, args: () => [ints([0, 1]), matrix()], options: [] },
  {
    name: 'scatter',
    call: heddle.scatter as Call,
    args: () => [matrix(), ints([3, 0, -1, 2]), matrix()],
    options: [],
  },
  ...(['add', 'mul'] as const).map((name) => ({
    name,
    call: exported[name] as Call,
    args: () => [matrix(), matrix()],
    options: [],
  })),
  ...(['silu', 'sigmoid'] as const).map((name) => ({
    name,
    call: exported[name] as Call,
    args: () => [matrix()],
    options: [],
  })),
  {
    name: 'tensor',
    call: heddle.tensor as Call,
    args: () => [new Float32Array(6), [2, 3], { dtype: 'float16' }],
    options: ['dtype', 'device'],
  },
  ...(['empty', 'zeros', 'randn'] as const).map((name) => ({
    name,
    call: exported[name] as Call,
    args: () => [[2, 3], { dtype: 'float32' }],
    options: ['dtype', 'device', 'seed'],
  })),
  {
    name: 'full',
    call: heddle.full as Call,
    args: () => [[2, 3], 1, { dtype: 'uint8' }],
    options: ['dtype', 'device'],
  },
  {
    name: 'slice',
    call: method('slice'),
    self: true,
    args: () => [matrix(), 0, 1, 3],
    options: [],
  },
  { name: 'select', call: method('select'), self: true, args: () => [matrix(), 1, 2], options: [] },
  {
    name: 'reshape',
    call: method('reshape'),
    self: true,
    args: () => [matrix(), [3, 8]],
    options: [],
  },
  {
    name: 'transpose',
    call: method('transpose'),
    self: true,
    args: () => [matrix(), 0, 1],
    options: [],
  },
  {
    name: 'expand',
    call: method('expand'),
    self: true,
    args: () => [f32([1, 6]), [4, 6]],
    options: [],
  },
  {
    name: 'cast',
    call: method('cast'),
    self: true,
    args: () => [matrix(), 'float16'],
    options: [],
  },
  { name: 'to', call: method('to'), self: true, args: () => [matrix(), 'cpu'], options: [] },
  {
    name: 'copyFrom',
    call: method('copyFrom'),
    self: true,
    args: () => [matrix(), matrix()],
    options: [],
  },
  {
    name: 'write',
    call: method('write'),
    self: true,
    args: () => [matrix(), new Float32Array(24)],
    options: [],
  },
  {
    name: 'read',
    call: method('read'),
    self: true,
    args: () => [matrix(), { as: 'float32' }],
    options: ['as', 'signal'],
  },
  { name: 'memory', call: heddle.memory as Call, args: () => ['cpu'], options: [] },
  { name: 'synchronize', call: heddle.synchronize as Call, args: () => ['cpu'], options: [] },
  { name: 'scope', call: heddle.scope as Call, args: () => [() => 1], options: [] },
]

/** A right call with some of it replaced. */
const mutated = (target: Target) =>
  fc
    .record({
      // which argument, or which option of the last one
      places: fc.array(fc.tuple(fc.nat(5), fc.boolean(), fc.nat(11), junk), { maxLength: 3 }),
      dropped: fc.option(fc.nat(4), { freq: 8 }),
    })
    .map(({ places, dropped }) => {
      // `this` of a method stays a tensor
      const first = target.self ? 1 : 0
      const args = target.args()
      for (const [at, inside, option, value] of places) {
        const last = args.at(-1)
        if (inside && target.options.length > 0 && isPlain(last)) {
          const name = target.options[option] ?? 'casual'
          args[args.length - 1] = Object.defineProperties(
            { [name]: value },
            { ...Object.getOwnPropertyDescriptors(last), [name]: { value, enumerable: true } },
          )
        } else if (first + at < args.length + 1) args[Math.max(at, first)] = value
      }
      if (dropped !== null) args.length = Math.min(args.length, Math.max(dropped, first))
      return args
    })

function isPlain(value: unknown): value is object {
  return (
    typeof value === 'object' && value !== null && Object.getPrototypeOf(value) === Object.prototype
  )
}

const codes = /^(ERR_(SHAPE|DTYPE|DEVICE|ARGUMENT|UNSUPPORTED|DISPOSED|MEMORY|CUDA)|CAS\d+)$/

function expectRefusal(error: unknown): void {
  if (error instanceof CallersError) return
  if (!(error instanceof HeddleError)) throw error
  expect(error.code).toMatch(codes)
  expect(error.message.startsWith(`${error.op}: `), error.message).toBe(true)
  expect(error.message).not.toMatch(/\n|\[object|\bnullptr\b|std::|\.cpp|\bnan is nan\b/i)
  expect(error.message.length).toBeLessThan(600)
}

/** Every tensor of a result. */
function tensorsOf(value: unknown): Tensor[] {
  if (value instanceof Tensor) return [value]
  return isPlain(value) ? Object.values(value).filter((part) => part instanceof Tensor) : []
}

const perTarget = 4000
let calls = 0

describe('wrong calls', () => {
  const made: Promise<unknown>[] = []
  let rejected = 0
  afterEach(async () => {
    for (const outcome of await Promise.allSettled(made.splice(0)))
      if (outcome.status === 'rejected') {
        expectRefusal(outcome.reason)
        rejected++
      }
  })

  it.each(targets)('of $name', async (target) => {
    let refused = 0
    let count = 0
    fc.assert(
      fc.property(mutated(target), (args) => {
        count++
        try {
          const result = target.call(...args)
          for (const tensor of tensorsOf(result)) {
            // some are read, so that what runs on them has to be right as well
            if (!tensor.disposed && tensor.size < 1000 && count % 16 === 0) made.push(tensor.read())
            if (!args.includes(tensor)) tensor.dispose()
          }
          if (result instanceof Promise) made.push(result)
        } catch (error) {
          expectRefusal(error)
          refused++
        } finally {
          for (const arg of args) if (arg instanceof Tensor && arg !== disposed) arg.dispose()
        }
      }),
      { numRuns: perTarget },
    )
    calls += count
    // a fuzz that is never refused, or always, tests nothing
    const waits = ['read', 'memory', 'synchronize', 'scope'].includes(target.name)
    expect(refused).toBeGreaterThan(waits ? -1 : 100)
    expect(refused).toBeLessThan(count)
  })

  it('were many', () => {
    expect(rejected).toBeGreaterThan(1000)
    expect(calls).toBeGreaterThanOrEqual(targets.length * perTarget)
  })
})

describe('the addon itself', () => {
  type Addon = Record<string, Call>
  const addon = createRequire(__filename)(
    process.env.HEDDLE_BINDING ?? join(__dirname, '../../build/Release/heddle.node'),
  ) as Addon
  const names = ['run', 'empty', 'from', 'view', 'transfer', 'write', 'read', 'memory', 'finish']
  const handle = fc.oneof(
    fc.constantFrom<unknown>(0, 1, 2, 3, 2 ** 31, 2 ** 32, 2 ** 52, -1, 0.5, Number.NaN),
    junk,
  )

  it('throws or answers, whatever it is given', async () => {
    const pending: Promise<unknown>[] = []
    let thrown = 0
    fc.assert(
      fc.property(fc.constantFrom(...names), fc.array(handle, { maxLength: 8 }), (name, args) => {
        try {
          const result = addon[name]!(...args)
          if (result instanceof Promise) pending.push(result)
        } catch (error) {
          expect(error).toBeInstanceOf(Error)
          thrown++
        }
      }),
      { numRuns: 20_000 },
    )
    expect(thrown).toBeGreaterThan(10_000)
    await Promise.allSettled(pending)
    // it still works
    expect([...(await heddle.add(f32([2]), heddle.full([2], 3)).read())]).toEqual([3, 3])
  })
})
