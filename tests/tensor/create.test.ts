import {
  bytesPerElement,
  type DType,
  dtypes,
  empty,
  full,
  HeddleError,
  type HostValues,
  memory,
  randn,
  synchronize,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { describe, expect, it } from 'vitest'
import { maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random } from '../support/random.js'

const carriers: Readonly<Record<DType, string>> = {
  float32: 'Float32Array',
  float16: 'Uint16Array',
  bfloat16: 'Uint16Array',
  float8_e4m3fn: 'Uint8Array',
  float8_e5m2: 'Uint8Array',
  int32: 'Int32Array',
  int64: 'BigInt64Array',
  uint8: 'Uint8Array',
  bool: 'Uint8Array',
}
const rowMajor = (shape: readonly number[]) =>
  shape.map((_, i) => shape.slice(i + 1).reduce((product, size) => product * size, 1))
const kindOf = (x: unknown) => Object.prototype.toString.call(x).slice(8, -1)

// Philox 4x32-10 in BigInt, from the paper
function philox(counter: bigint, key: bigint): bigint[] {
  const low = 0xffffffffn
  let c = [counter & low, counter >> 32n, 0n, 0n]
  let [k0, k1] = [key & low, key >> 32n]
  for (let round = 0; round < 10; round++) {
    const [a, b] = [c[0]! * 0xd2511f53n, c[2]! * 0xcd9e8d57n]
    c = [(b >> 32n) ^ c[1]! ^ k0, b & low, (a >> 32n) ^ c[3]! ^ k1, a & low]
    k0 = (k0 + 0x9e3779b9n) & low
    k1 = (k1 + 0xbb67ae85n) & low
  }
  return c
}

function normal(index: number, seed: number): number {
  const words = philox(BigInt(Math.floor(index / 4)), BigInt(seed)).slice(index % 4 < 2 ? 0 : 2)
  const [u, turn] = words.map((word) => (Number(word) + 0.5) / 2 ** 32)
  const radius = Math.sqrt(-2 * Math.log(u!))
  return radius * (index % 2 === 0 ? Math.cos : Math.sin)(2 * Math.PI * turn!)
}

describeDevices('creating tensors', (device) => {
  it('makes pinned tensors that compute as others do and take no memory of the device', async () => {
    const before = memory(device)
    const x = empty([64, 33], { dtype: 'float32', device, pinned: true })
    const held = memory(device)
    expect(held.bytes).toBe(before.bytes)
    expect(held.pinnedBytes).toBe(before.pinnedBytes + 64 * 33 * 4)
    const y = randn([64, 33], { seed: 3, device })
    x.copyFrom(y)
    for (const one of [x, y]) {
      using part = one.slice(1, 3, 5)
      part.write(new Float32Array(128).fill(2))
    }
    expect(await x.read()).toEqual(await y.read())
    using there = x.to('cpu')
    expect(await there.read()).toEqual(await y.read())
    there.dispose()
    const half = tensor(await y.read(), [64, 33], { dtype: 'float16', device, pinned: true })
    expect(await half.read()).toEqual(await y.cast('float16').read())
    for (const one of [x, half]) one.dispose()
    await zeros([1], { device }).read()
    expect(memory(device).pinnedBytes).toBe(before.pinnedBytes)
    expect((await failure(() => empty([1], { pinned: 1 as never }))).message).toBe(
      'empty: pinned must be a boolean, got 1',
    )
    const { pinnedBytes } = before
    expect((await failure(() => empty([2 ** 48], { device, pinned: true }))).message).toBe(
      `empty: cannot allocate ${2 ** 50} pinned bytes on ${device}, where ${pinnedBytes} pinned bytes are in use; ` +
        'dispose tensors that are no longer needed',
    )
  })

  const expectLaidOut = (x: Tensor, dtype: DType, shape: readonly number[]) => {
    const size = shape.reduce((product, one) => product * one, 1)
    expect({ ...x }).toEqual({ dtype, shape, strides: rowMajor(shape), device })
    expect([x.rank, x.size, x.nbytes]).toEqual([shape.length, size, size * bytesPerElement[dtype]])
    expect(x.isContiguous).toBe(true)
    expect(x.disposed).toBe(false)
    expect(Object.isFrozen(x.shape) && Object.isFrozen(x.strides)).toBe(true)
  }

  describe('from typed arrays', () => {
    const samples: readonly [DType, HostValues][] = [
      ['float32', Float32Array.of(0, -0, 1.5, Number.NaN, Number.POSITIVE_INFINITY, 1e-45)],
      ['int32', Int32Array.of(0, -1, 2 ** 31 - 1, -(2 ** 31), 7, 8)],
      ['int64', BigInt64Array.of(0n, -1n, 2n ** 63n - 1n, -(2n ** 63n), 2n ** 53n + 1n, 5n)],
      ['uint8', Uint8Array.of(0, 1, 127, 128, 255, 3)],
    ]

    it.each(samples)('%s is the dtype that needs no name', async (dtype, data) => {
      const x = tensor(data, [2, 3], { device })
      expectLaidOut(x, dtype, [2, 3])
      const back = await x.read()
      expect(kindOf(back)).toBe(carriers[dtype])
      expect(back).toEqual(data)
      expect(x.readSync()).toEqual(data)
    })

    it.each(dtypes)('%s from the array that carries it, bit by bit', async (dtype) => {
      const bytes = Uint8Array.from({ length: 24 }, (_, i) => (dtype === 'bool' ? i % 2 : i * 11))
      const classes = { Float32Array, Uint16Array, Uint8Array, Int32Array, BigInt64Array }
      const data = new classes[carriers[dtype] as keyof typeof classes](bytes.buffer)
      const x = tensor(data, undefined, { dtype, device })
      expectLaidOut(x, dtype, [24 / bytesPerElement[dtype]])
      const back = await x.read()
      expect(kindOf(back)).toBe(carriers[dtype])
      expect(new Uint8Array(back.buffer)).toEqual(bytes)
    })

    it.each(dtypes)('%s from numbers', async (dtype) => {
      for (const data of [[0, 1, 2, 96], Float32Array.of(0, 1, 2, 96)]) {
        const x = tensor(data, [4], { dtype, device })
        expectLaidOut(x, dtype, [4])
        const expected = dtype === 'bool' ? [0, 1, 1, 1] : [0, 1, 2, 96]
        expect([...(await x.read({ as: 'float32' }))]).toEqual(expected)
        expect([...x.readSync({ as: 'float32' })]).toEqual(expected)
      }
    })

    it.skipIf(!('Float16Array' in globalThis))('Float16Array holds float16', async () => {
      const x: Tensor<'float16'> = tensor(Float16Array.of(1, -2, 0.5), undefined, { device })
      expectLaidOut(x, 'float16', [3])
      expect([...(await x.read())]).toEqual([0x3c00, 0xc000, 0x3800])
    })

    it('sees only the window of a subarray, and takes the values at the call', async () => {
      const whole = Float32Array.from({ length: 100 }, (_, i) => i)
      const x = tensor(whole.subarray(10, 14), [4], { device })
      const b = tensor(Buffer.from([9, 8, 7]).subarray(1), undefined, { device })
      whole.fill(-1)
      expect([...(await x.read())]).toEqual([10, 11, 12, 13])
      expect(b.dtype).toBe('uint8')
      expect([...(await b.read())]).toEqual([8, 7])
    })

    it.each(
      [
        Int8Array,
        Uint8ClampedArray,
        Int16Array,
        Uint16Array,
        Uint32Array,
        Float64Array,
        BigUint64Array,
      ].map((Kind) => [Kind.name, Kind] as const),
    )('refuses to guess what a %s holds', async (_, Kind) => {
      // the types take none of them but bits
      const data = new Kind(4) as unknown as HostValues
      const guess = await failure(() => tensor(data, [4], { device }))
      const bits = Kind === Uint16Array
      const argument = bits ? 'dtype' : 'data'
      expect(guess).toMatchObject({ code: 'ERR_DTYPE', op: 'tensor', argument })
      expect(guess.message).toContain(
        bits ? 'must be given for a' : `or BigInt64Array, got a ${Kind.name}`,
      )
      for (const dtype of dtypes) {
        if (carriers[dtype] === Kind.name) continue
        const wrong = await failure(() => tensor(data, [4], { dtype, device }))
        expect(wrong).toMatchObject({ code: 'ERR_DTYPE', argument: 'data' })
        expect(wrong.message).toContain(`for ${dtype}, got ${Kind.name}`)
        if (dtype === 'float32')
          expect(wrong.message).toContain('must be a Float32Array for float32')
      }
    })

    it.each([
      [undefined, 'ERR_ARGUMENT'],
      [null, 'ERR_ARGUMENT'],
      ['1234', 'ERR_ARGUMENT'],
      [{ length: 1 }, 'ERR_ARGUMENT'],
      [new ArrayBuffer(4), 'ERR_ARGUMENT'],
      [new DataView(new ArrayBuffer(4)), 'ERR_ARGUMENT'],
      [[1, '2'], 'ERR_ARGUMENT'],
      [[1, 2n], 'ERR_ARGUMENT'],
      // biome-ignore lint/suspicious/noSparseArray: a hole is no number
      [[1, , 3], 'ERR_ARGUMENT'],
      [[[1], [2]], 'ERR_ARGUMENT'],
      [new Float32Array(new SharedArrayBuffer(8)), 'ERR_ARGUMENT'],
    ])('refuses %o', async (data, code) => {
      const error = await failure(() => tensor(data as number[], undefined, { device }))
      expect(error).toMatchObject({ code, op: 'tensor' })
      expect(error.argument).toMatch(/^data/)
    })

    it('refuses integers that the dtype cannot hold', async () => {
      for (const bad of [1.5, Number.NaN, 2 ** 31, -(2 ** 31) - 1, Number.POSITIVE_INFINITY])
        expect((await failure(() => tensor([bad], [1], { dtype: 'int32', device }))).code).toBe(
          'ERR_ARGUMENT',
        )
      for (const bad of [0.5, 2 ** 53, Number.NaN])
        expect((await failure(() => tensor([bad], [1], { dtype: 'int64', device }))).code).toBe(
          'ERR_ARGUMENT',
        )
    })
  })

  describe('shapes', () => {
    it.each([[[6]], [[2, 3]], [[3, 1, 2]], [[1, 1, 6, 1]], [[1, 2, 1, 3, 1, 1, 1, 1]]])(
      '%j',
      async (shape) => {
        const data = Float32Array.of(1, 2, 3, 4, 5, 6)
        const x = tensor(data, shape, { device })
        expectLaidOut(x, 'float32', shape)
        expect(await x.read()).toEqual(data)
      },
    )

    it('a scalar has no dimensions and one element', async () => {
      const x = tensor([7], [], { device })
      expectLaidOut(x, 'float32', [])
      expect([...(await x.read())]).toEqual([7])
      expect([...(await x.cast('int64').read())]).toEqual([7n])
      expect([...(await full([], 3, { device, dtype: 'int32' }).read())]).toEqual([3])
      expect((await randn([], { device, seed: 1 }).read()).length).toBe(1)
      expect([...(await x.write([8]).read())]).toEqual([8])
      expect([...(await x.reshape([1, 1]).read())]).toEqual([8])
    })

    it.each([[[0]], [[0, 3]], [[3, 0]], [[2, 0, 4]], [[0, 0]]])('%j is empty', async (shape) => {
      for (const dtype of dtypes) {
        for (const x of [
          empty(shape, { dtype, device }),
          zeros(shape, { dtype, device }),
          full(shape, Number.NaN, { dtype, device }),
          tensor([], shape, { dtype, device }),
        ]) {
          expectLaidOut(x, dtype, shape)
          expect((await x.read()).length).toBe(0)
          expect((await x.read({ as: 'float32' })).length).toBe(0)
          expect((await x.clone().cast('float16').write([]).read()).length).toBe(0)
        }
      }
      expect((await randn(shape, { device }).read()).length).toBe(0)
    })

    it('may have eight dimensions and no more', async () => {
      const most = new Array<number>(8).fill(1)
      expectLaidOut(zeros(most, { device }), 'float32', most)
      const made = [
        () => zeros([...most, 1], { device }),
        () => empty([...most, 1], { device }),
        () => randn([...most, 1], { device }),
        () => tensor([1], [...most, 1], { device }),
        () => zeros(most, { device }).reshape([...most, 1]),
        () => zeros(most, { device }).expand([1, ...most]),
      ]
      for (const make of made) {
        const error = await failure(make)
        expect(error).toMatchObject({ code: 'ERR_SHAPE', argument: 'shape' })
        expect(error.message).toContain('at most 8 dimensions, got 9')
      }
    })

    it('must have the size of the data', async () => {
      for (const shape of [[], [5], [7], [2, 2], [6, 0]]) {
        const error = await failure(() => tensor(new Float32Array(6), shape, { device }))
        expect(error).toMatchObject({ code: 'ERR_SHAPE', op: 'tensor', argument: 'data' })
      }
    })

    it.each([
      ['zeros', [-1], 'ERR_ARGUMENT'],
      ['zeros', [1.5], 'ERR_ARGUMENT'],
      ['zeros', [Number.NaN], 'ERR_ARGUMENT'],
      ['zeros', [2 ** 53], 'ERR_ARGUMENT'],
      ['zeros', ['3'], 'ERR_ARGUMENT'],
      ['zeros', [null], 'ERR_ARGUMENT'],
      ['zeros', 3, 'ERR_ARGUMENT'],
      ['zeros', undefined, 'ERR_ARGUMENT'],
      ['zeros', [2 ** 32, 2 ** 32], 'ERR_SHAPE'],
      ['zeros', [2 ** 53 - 1, 2 ** 10], 'ERR_SHAPE'],
      ['zeros', [2 ** 53 - 1, 2 ** 53 - 1, 0], 'ERR_SHAPE'],
      ['zeros', [2 ** 47], 'ERR_MEMORY'],
    ])('%s refuses %j', async (_, shape, code) => {
      for (const make of [zeros, empty, randn]) {
        const error = await failure(() => make(shape as number[], { device }))
        expect(error).toMatchObject({ code })
        expect(error.message).toMatch(/^(zeros|empty|randn): /)
      }
    })
  })

  describe('constants', () => {
    it.each(dtypes)('%s is filled with zeros and ones', async (dtype) => {
      const zero = await zeros([3, 5], { dtype, device }).read()
      expect(new Uint8Array(zero.buffer)).toEqual(new Uint8Array(15 * bytesPerElement[dtype]))
      const ones = full([3, 5], 1, { dtype, device })
      expectLaidOut(ones, dtype, [3, 5])
      expect(await ones.read({ as: 'float32' })).toEqual(new Float32Array(15).fill(1))
    })

    it.each([
      ['float32', 0.1, Math.fround(0.1)],
      ['float32', 1e300, Number.POSITIVE_INFINITY],
      ['float32', -0, -0],
      ['float16', 65519, 65504],
      ['float16', 65520, Number.POSITIVE_INFINITY],
      // nearer to the upper neighbour in double, a tie once rounded to float32
      ['float16', 1 + 2 ** -11 + 2 ** -40, 1 + 2 ** -10],
      ['bfloat16', 1 + 2 ** -8 + 2 ** -40, 1 + 2 ** -7],
      ['bfloat16', 1 + 2 ** -8, 1],
      ['float8_e4m3fn', 448, 448],
      ['float8_e4m3fn', 500, Number.NaN],
      ['float8_e5m2', 57344, 57344],
      ['float8_e5m2', 1e6, Number.POSITIVE_INFINITY],
      ['int32', -2.9, -2],
      ['int32', 1e10, Math.fround(2 ** 31 - 1)],
      ['int64', -(2 ** 62), -(2 ** 62)],
      ['uint8', 300, 255],
      ['uint8', -3, 0],
      ['bool', 0.001, 1],
      ['float32', Number.NaN, Number.NaN],
      ['bfloat16', Number.NEGATIVE_INFINITY, Number.NEGATIVE_INFINITY],
      ['int32', Number.NaN, 0],
      ['int32', Number.NEGATIVE_INFINITY, -(2 ** 31)],
      ['bool', Number.NaN, 1],
    ] as const)('%s of %d is %d', async (dtype, value, expected) => {
      const x = full([2, 3], value, { dtype, device })
      expect(await x.read({ as: 'float32' })).toEqual(new Float32Array(6).fill(expected))
    })

    it('takes numbers only', async () => {
      for (const bad of [undefined, null, '1', 1n, [1]]) {
        const error = await failure(() => full([1], bad as never, { device }))
        expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'full', argument: 'value' })
      }
    })
  })

  describe('options', () => {
    it.each([
      ['tensor', (options: object) => tensor([1], [1], options)],
      ['empty', (options: object) => empty([1], options)],
      ['zeros', (options: object) => zeros([1], options)],
      ['full', (options: object) => full([1], 1, options)],
      ['randn', (options: object) => randn([1], options)],
    ])('%s refuses what it does not know', async (op, make) => {
      const misspelled = await failure(() => make({ dtpye: 'int32' }))
      expect(misspelled).toMatchObject({ code: 'ERR_ARGUMENT', op, argument: 'dtpye' })
      expect(misspelled.message).toBe(`${op}: unknown option "dtpye"; did you mean "dtype"?`)
      expect((await failure(() => make({ dtype: 'float64' }))).message).toMatch(
        new RegExp(`^${op}: dtype must be one of float32, .*, got "float64"$`),
      )
      for (const bad of ['gpu', 'cuda:', 'cuda:x', 'CPU', 0, null])
        expect(await failure(() => make({ device: bad }))).toMatchObject({
          code: 'ERR_ARGUMENT',
          argument: 'device',
        })
      expect((await failure(() => make({ device: 'cuda:99' }))).code).toBe('ERR_DEVICE')
      for (const bad of [null, [], 'float32', 3])
        expect(await failure(() => make(bad as object))).toMatchObject({ argument: 'options' })
    })

    it('reads only as float32', async () => {
      const x = tensor([1], [1], { device })
      expect(await failure(() => x.read({ as: 'int32' } as never))).toMatchObject({
        code: 'ERR_ARGUMENT',
        op: 'read',
        argument: 'as',
      })
      expect((await failure(() => x.readSync({ az: 1 } as never))).message).toContain('"as"')
      await expect(x.read({ signal: AbortSignal.abort(new Error('enough')) })).rejects.toThrow(
        'enough',
      )
    })
  })

  describe('write', () => {
    it.each(dtypes)('overwrites %s with numbers and with bit patterns', async (dtype) => {
      const x = zeros([2, 2], { dtype, device })
      x.write([1, 0, 1, 1])
      expect([...(await x.read({ as: 'float32' }))]).toEqual([1, 0, 1, 1])
      const bits = await x.read()
      const y = zeros([2, 2], { dtype, device }).write(bits)
      expect(await y.read()).toEqual(bits)
      expect([...(await x.write(Float32Array.of(0, 1, 0, 0)).read({ as: 'float32' }))]).toEqual([
        0, 1, 0, 0,
      ])
    })

    it('keeps the order of calls', async () => {
      const x = zeros([3], { device })
      const data = Float32Array.of(1, 2, 3)
      const before = x.write(data).read()
      data.fill(9)
      const after = x.write(data).read()
      expect([...(await before)]).toEqual([1, 2, 3])
      expect([...(await after)]).toEqual([9, 9, 9])
    })

    it('refuses another size or kind', async () => {
      const x = zeros([2, 2], { device })
      expect(await failure(() => x.write([1, 2, 3]))).toMatchObject({
        code: 'ERR_SHAPE',
        op: 'write',
      })
      expect(await failure(() => x.write(new Int32Array(4)))).toMatchObject({
        code: 'ERR_DTYPE',
        op: 'write',
      })
    })
  })

  describe('randn', () => {
    it('gives the same numbers for one seed, others for another', async () => {
      const read = (seed?: number) => randn([1001], { seed, device }).read()
      const first = await read(5)
      expect(await read(5)).toEqual(first)
      for (const other of [0, 4, 6, 5 + 2 ** 32, Number.MAX_SAFE_INTEGER, undefined]) {
        const values = await read(other)
        const same = values.filter((value, i) => value === first[i]).length
        expect(same, `${other}`).toBeLessThan(5)
      }
      expect(await read()).not.toEqual(await read())
    })

    it('depends on the position alone', async () => {
      const long = await randn([5000], { seed: 9, device }).read()
      for (const shape of [[1], [2], [3], [7, 11], [1, 63, 65], [5000]]) {
        const values = await randn(shape, { seed: 9, device }).read()
        expect(maxError(values, long.subarray(0, values.length)), `${shape}`).toBe(0)
      }
    })

    it.each(floats)('%s is Philox and Box-Muller, rounded once', async (dtype) => {
      const rng = random(70)
      expect(philox(0n, 0n)).toEqual([0x6627e8d5n, 0xe169c58dn, 0xbc57ac4cn, 0x9b00dbd8n])
      for (const seed of [0, 1, 2 ** 32 + 1, rng.below(2 ** 31) * 2 ** 20]) {
        const values = await randn([257], { seed, dtype, device }).read({ as: 'float32' })
        values.forEach((value, i) => {
          const exact = normal(i, seed)
          const bound = epsilon[dtype] * Math.max(Math.abs(exact), 2 ** -13)
          expect(Math.abs(value - exact), `${seed} [${i}]`).toBeLessThanOrEqual(bound)
        })
      }
    })

    it('has the moments of the normal distribution', async () => {
      const n = 400_000
      for (let round = 0; round < 3; round++) {
        const values = await randn([n], { device }).read()
        const moment = (k: number) => values.reduce((sum, x) => sum + x ** k, 0) / n
        // six standard errors of each
        expect(Math.abs(moment(1))).toBeLessThan(6 * Math.sqrt(1 / n))
        expect(Math.abs(moment(2) - 1)).toBeLessThan(6 * Math.sqrt(2 / n))
        expect(Math.abs(moment(3))).toBeLessThan(6 * Math.sqrt(15 / n))
        expect(Math.abs(moment(4) - 3)).toBeLessThan(6 * Math.sqrt(96 / n))
        const neighbours = values.reduce((sum, x, i) => sum + x * (values[i + 1] ?? 0), 0) / n
        expect(Math.abs(neighbours)).toBeLessThan(6 * Math.sqrt(1 / n))
        const far = values.filter((x) => Math.abs(x) > 3).length / n
        expect(far).toBeGreaterThan(0.0022)
        expect(far).toBeLessThan(0.0032)
      }
    })

    it('refuses other dtypes and seeds', async () => {
      const held = memory(device).tensors
      for (const dtype of dtypes.filter((one) => !(floats as readonly DType[]).includes(one))) {
        const error = await failure(() => randn([2], { dtype: dtype as 'float32', device }))
        expect(error.code).toBe('ERR_DTYPE')
      }
      for (const seed of [-1, 0.5, Number.NaN, 2 ** 53, '1', 1n]) {
        const error = await failure(() => randn([2], { seed: seed as number, device }))
        expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'randn', argument: 'seed' })
      }
      expect(memory(device).tensors).toBeLessThanOrEqual(held)
    })
  })

  it('says what it is, and nothing after it was disposed', async () => {
    const x = zeros([2, 3], { device })
    expect(String(x)).toBe(`Tensor float32 [2, 3] ${device}`)
    const held = memory(device).tensors
    x.dispose()
    x.dispose()
    await synchronize(device)
    expect(memory(device).tensors).toBeLessThan(held)
    expect(x.disposed).toBe(true)
    expect(String(x)).toBe('Tensor float32 [2, 3] disposed')
    for (const use of [
      () => x.read(),
      () => x.readSync(),
      () => x.clone(),
      () => x.cast('int32'),
      () => x.slice(0, 0),
      () => x.reshape([6]),
      () => x.contiguous(),
      () => x.to(device),
      () => x.write([1, 2, 3, 4, 5, 6]),
      () => zeros([2, 3], { device }).copyFrom(x),
    ]) {
      const error = await failure(use)
      expect(error).toBeInstanceOf(HeddleError)
      expect(error).toMatchObject({
        code: 'ERR_DISPOSED',
        message: 'tensor: this tensor was disposed',
      })
    }
  })
})
