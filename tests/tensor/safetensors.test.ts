import { mkdtempSync, readdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import {
  bytesPerElement,
  type DType,
  dtypes,
  HeddleError,
  memory,
  openSafetensors,
  randn,
  type Tensor,
  tensor,
  writeSafetensors,
  zeros,
} from 'heddle'
import { afterAll, describe, expect, it } from 'vitest'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random } from '../support/random.js'

const folder = mkdtempSync(join(tmpdir(), 'heddle-safetensors-'))
afterAll(() => rmSync(folder, { recursive: true }))
let files = 0
const fresh = () => join(folder, `${files++}.safetensors`)

const codes: Readonly<Record<DType, string>> = {
  float32: 'F32',
  float16: 'F16',
  bfloat16: 'BF16',
  float8_e4m3fn: 'F8_E4M3',
  float8_e5m2: 'F8_E5M2',
  int32: 'I32',
  int64: 'I64',
  uint8: 'U8',
  bool: 'BOOL',
}

function withLength(header: Uint8Array, data: Uint8Array, claimed?: bigint): Buffer {
  const length = Buffer.alloc(8)
  length.writeBigUInt64LE(claimed ?? BigInt(header.length))
  return Buffer.concat([length, header, data])
}

function put(header: unknown, dataBytes = 24): string {
  const path = fresh()
  const text = typeof header === 'string' ? header : JSON.stringify(header)
  writeFileSync(path, withLength(Buffer.from(text), Buffer.alloc(dataBytes, 7)))
  return path
}

function putBytes(bytes: Uint8Array): string {
  const path = fresh()
  writeFileSync(path, bytes)
  return path
}

const bytesOf = async (x: Tensor) => Buffer.from((await x.read()).buffer)

describeDevices('safetensors', (device) => {
  it('gives every dtype back, bit by bit', async () => {
    const rng = random(140)
    const path = fresh()
    const given = Object.fromEntries(
      dtypes.flatMap((dtype) =>
        [[], [5], [2, 3], [0, 4], [2, 1, 3, 1, 1, 1, 1, 1]].map((shape, i) => {
          const count = shape.reduce((all, size) => all * size, 1)
          const raw = Uint8Array.from({ length: count * bytesPerElement[dtype] }, () =>
            dtype === 'bool' ? rng.below(2) : rng.below(256),
          )
          const carried = { 1: Uint8Array, 2: Uint16Array, 4: Int32Array, 8: BigInt64Array }
          const Carrier =
            dtype === 'float32' ? Float32Array : carried[bytesPerElement[dtype] as 1 | 2 | 4 | 8]
          return [`${dtype}.${i}`, tensor(new Carrier(raw.buffer), shape, { dtype, device })]
        }),
      ),
    )
    await writeSafetensors(path, given)
    await using file = await openSafetensors(path)
    expect([...file.entries.keys()]).toEqual(Object.keys(given))
    expect(file.metadata).toEqual({})
    for (const [name, x] of Object.entries(given)) {
      const { dtype, shape, nbytes } = x
      expect(file.entries.get(name)).toMatchObject({ dtype, shape, nbytes })
      const back = await file.load(name, { device })
      expect({ ...back }).toEqual({ ...x })
      expect(Buffer.compare(await bytesOf(back), await bytesOf(x)), name).toBe(0)
    }
  })

  it('converts to the dtype that is asked for', async () => {
    const path = fresh()
    const x = randn([3, 4], { device })
    const rounded = x.cast('bfloat16')
    const values = await rounded.read()
    await writeSafetensors(path, { x, half: rounded })
    await using file = await openSafetensors(path)
    const before = memory(device).tensors
    const half: Tensor<'bfloat16'> = await file.load('x', {
      dtype: 'bfloat16',
      rows: [1, 3],
      device,
    })
    expect(await half.read()).toEqual(values.slice(4))
    const same = await file.load('half', { dtype: 'bfloat16', device })
    expect(await same.read()).toEqual(values)
    half.dispose()
    same.dispose()
    expect(memory(device).tensors).toBe(before)
    const error = await failure(() => file.load('x', { dtype: 'f16' as DType, device }))
    expect(error.message).toMatch(/^safetensors: dtype must be one of float32, .*, got "f16"$/)
  })

  it('writes the length, the header padded to 8 bytes, then the tensors in order', async () => {
    const path = fresh()
    const a = tensor([1, -2], [2], { dtype: 'float16', device })
    const b = tensor(Uint8Array.of(9, 8, 7), [3, 1], { device })
    // a view with gaps is written without them
    const c = tensor([1, 2, 3, 4, 5, 6], [2, 3], { dtype: 'int32', device })
      .slice(1, 1)
      .transpose(0, 1)
    await writeSafetensors(path, { b, a, c }, { metadata: { made: 'here', é: '"\n' } })
    const text =
      '{"__metadata__":{"made":"here","é":"\\"\\n"},' +
      '"b":{"dtype":"U8","shape":[3,1],"data_offsets":[0,3]},' +
      '"a":{"dtype":"F16","shape":[2],"data_offsets":[3,7]},' +
      '"c":{"dtype":"I32","shape":[2,2],"data_offsets":[7,23]}}'
    const size = Math.ceil(Buffer.byteLength(text) / 8) * 8
    const header = Buffer.alloc(size, ' ')
    header.write(text)
    const data = Buffer.concat([
      Buffer.from([9, 8, 7]),
      Buffer.from(Uint16Array.of(0x3c00, 0xc000).buffer),
      Buffer.from(Int32Array.of(2, 5, 3, 6).buffer),
    ])
    expect(await readFile(path)).toEqual(withLength(header, data))
    expect(readdirSync(folder).filter((name) => name.includes('partial'))).toEqual([])
    const file = await openSafetensors(path)
    expect(file.metadata).toEqual({ made: 'here', é: '"\n' })
    await file.close()
  })

  it('names every dtype as the format does', async () => {
    const path = fresh()
    const given = Object.fromEntries(dtypes.map((dtype) => [dtype, zeros([1], { dtype, device })]))
    await writeSafetensors(path, given)
    const bytes = await readFile(path)
    const header = JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE())).toString())
    expect(
      Object.entries(header).map(([name, entry]) => [name, (entry as { dtype: string }).dtype]),
    ).toEqual(Object.entries(codes))
  })

  it('writes a file without tensors', async () => {
    const path = fresh()
    await writeSafetensors(path, {})
    expect(await readFile(path)).toEqual(withLength(Buffer.from('{}      '), Buffer.alloc(0)))
    const file = await openSafetensors(path)
    expect(file.entries.size).toBe(0)
    await file.close()
  })

  it('loads rows alone, and tensors larger than one read', async () => {
    const path = fresh()
    const x = randn([1100, 4096], { device, seed: 3 })
    await writeSafetensors(path, { small: tensor([1, 2, 3], [3], { device }), x })
    const whole = await bytesOf(x)
    const file = await openSafetensors(path)
    expect(Buffer.compare(await bytesOf(await file.load('x', { device })), whole)).toBe(0)
    for (const [start, end] of [
      [0, 1],
      [1030, 1100],
      [7, 7],
      [0, 1100],
    ] as const) {
      const part = await file.load('x', { rows: [start, end], device })
      expect(part.shape).toEqual([end - start, 4096])
      const expected = whole.subarray(start * 4096 * 4, end * 4096 * 4)
      expect(Buffer.compare(await bytesOf(part), expected)).toBe(0)
    }
    await file.close()
  })

  it('names may be anything, those of prototypes too', async () => {
    const names = ['__proto__', 'constructor', 'toString', '', 'a.b', '10', '9', '\u0000é\ud800"\\']
    const given = Object.fromEntries(names.map((name, i) => [name, tensor([i], [1], { device })]))
    const path = fresh()
    await writeSafetensors(path, given, { metadata: Object.fromEntries([['__proto__', 'text']]) })
    await using file = await openSafetensors(path)
    expect([...file.entries.keys()].sort()).toEqual([...names].sort())
    for (const [i, name] of names.entries())
      expect([...(await (await file.load(name, { device })).read())], name).toEqual([i])
    expect(Object.entries(file.metadata)).toEqual([['__proto__', 'text']])
    expect(Object.getPrototypeOf({})).toBe(Object.prototype)
    for (const name of ['hasOwnProperty', 'valueOf'])
      expect(await failure(() => file.load(name))).toMatchObject({ code: 'ERR_ARGUMENT' })
  })

  it('opens what others write: other dtypes, spaces, any order of entries', async () => {
    const path = put(
      ' { "last" : {"shape": [2], "data_offsets": [16, 24], "dtype": "F32", "more": 1},\n' +
        '"strange":{"dtype":"F4","shape":[16],"data_offsets":[8,16]},' +
        '"double":{"dtype":"F64","shape":[],"data_offsets":[0,8]} }  ',
    )
    const file = await openSafetensors(path)
    expect(file.entries.get('double')).toMatchObject({ dtype: undefined, shape: [], nbytes: 8 })
    expect(file.entries.get('strange')).toMatchObject({ dtype: undefined, nbytes: 8 })
    expect((await (await file.load('last', { device })).read()).length).toBe(2)
    for (const name of ['double', 'strange']) {
      const error = await failure(() => file.load(name))
      expect(error).toMatchObject({ code: 'ERR_DTYPE', op: 'safetensors', argument: 'name' })
      expect(error.message).toContain(`"${name}"`)
      expect(error.message).toContain(path)
    }
    await file.close()
  })

  it('is closed once, twice, or by await using; tensors stay', async () => {
    const path = fresh()
    await writeSafetensors(path, { x: tensor([1, 2], [2], { device }) })
    const file = await openSafetensors(path)
    const x = await file.load('x', { device })
    await file.close()
    await file.close()
    expect([...(await x.read())]).toEqual([1, 2])
    expect(file.entries.has('x')).toBe(true)
    const late = await failure(() => file.load('x', { device }))
    expect(late).toMatchObject({ code: 'ERR_DISPOSED', op: 'safetensors' })
    expect(late.message).toBe(`safetensors: ${path} was closed`)
    let leaked: typeof file
    {
      await using scoped = await openSafetensors(path)
      leaked = scoped
    }
    expect((await failure(() => leaked.load('x'))).code).toBe('ERR_DISPOSED')
    const racing = await openSafetensors(path)
    const loads = Array.from({ length: 20 }, () => racing.load('x', { device }))
    const closing = racing.close()
    for (const load of await Promise.allSettled(loads)) {
      if (load.status === 'fulfilled') expect([...(await load.value.read())]).toEqual([1, 2])
      else expect(load.reason).toMatchObject({ name: 'HeddleError', code: 'ERR_DISPOSED' })
    }
    await closing
  })

  it('notices a file that shrinks after it was opened, and keeps nothing', async () => {
    const path = fresh()
    await writeSafetensors(path, { x: zeros([1000], { device }) })
    const file = await openSafetensors(path)
    truncateSync(path, 2000)
    const held = memory(device).tensors
    const error = await failure(() => file.load('x', { device }))
    expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'safetensors' })
    expect(error.message).toBe(`safetensors: ${path} is no valid file: it is truncated`)
    expect(memory(device).tensors).toBeLessThanOrEqual(held)
    await file.close()
  })

  it('refuses arguments that make no sense', async () => {
    const path = fresh()
    const x = zeros([4, 2], { device })
    await writeSafetensors(path, { x, scalar: zeros([], { device }) })
    const file = await openSafetensors(path)
    for (const rows of [[-1, 2], [0, 5], [3, 2], [0.5, 1], [0], [0, 1, 2], 3, null, 'ab', {}])
      expect(
        await failure(() => file.load('x', { rows: rows as never })),
        JSON.stringify(rows),
      ).toMatchObject({ code: 'ERR_ARGUMENT', op: 'safetensors' })
    for (const name of ['y', '', '__metadata__', 3, undefined, null, Symbol('x')]) {
      const error = await failure(() => file.load(name as string))
      expect(error).toMatchObject({ code: 'ERR_ARGUMENT', argument: 'name' })
      expect(error.message).toContain(path)
    }
    expect((await failure(() => file.load('x', { row: [0, 1] } as never))).message).toContain(
      'did you mean "rows"?',
    )
    await file.close()

    const nowhere = join(folder, 'no', 'such', 'folder')
    for (const bad of [undefined, null, 3, {}]) {
      expect(await failure(() => openSafetensors(bad as never))).toMatchObject({ argument: 'path' })
      expect(await failure(() => writeSafetensors(bad as never, { x }))).toMatchObject({
        argument: 'path',
      })
    }
    const writes: readonly (readonly [unknown, unknown, string])[] = [
      [null, {}, 'tensors'],
      [[x], {}, 'tensors'],
      [{ x: [1, 2] }, {}, 'x'],
      [{ x: undefined }, {}, 'x'],
      [{ __metadata__: x }, {}, 'tensors'],
      [{ x }, { metadata: { a: 1 } }, 'metadata'],
      [{ x }, { metadata: 'a' }, 'metadata'],
      [{ x }, { metadata: [] }, 'metadata'],
      [{ x }, { meta: {} }, 'meta'],
    ]
    for (const [tensors, options, argument] of writes)
      expect(
        await failure(() => writeSafetensors(fresh(), tensors as never, options as never)),
        argument,
      ).toMatchObject({ code: 'ERR_ARGUMENT', op: 'safetensors', argument })
    await expect(writeSafetensors(nowhere, { x })).rejects.toThrow('ENOENT')
  })

  it('is whole whoever writes it at the same time', async () => {
    const path = fresh()
    const sizes = [1, 1000, 3, 50_000, 7]
    const written = sizes.map((n) => writeSafetensors(path, { x: zeros([n], { device }) }))
    await Promise.all(written)
    await using file = await openSafetensors(path)
    expect(sizes).toContain((await file.load('x')).size)
    expect(readdirSync(folder).filter((name) => name.includes('partial'))).toEqual([])
  })

  it('leaves the old file and no part of a new one when a tensor fails', async () => {
    const path = fresh()
    await writeSafetensors(path, { x: tensor([1], [1], { device }) })
    const before = await readFile(path)
    const gone = zeros([3], { device })
    gone.dispose()
    const error = await failure(() => writeSafetensors(path, { gone }))
    expect(error.code).toBe('ERR_DISPOSED')
    expect(await readFile(path)).toEqual(before)
    expect(readdirSync(folder).filter((name) => name.includes('partial'))).toEqual([])
  })
})

describe('broken safetensors', () => {
  const f32 = (shape: unknown, begin: unknown, end: unknown) => ({
    dtype: 'F32',
    shape,
    data_offsets: [begin, end],
  })
  const whole = { x: f32([2, 3], 0, 24) }
  const deep = (open: string, close: string) => open.repeat(100_000) + close.repeat(100_000)

  it.each<[string, string | undefined, () => string]>([
    ['an empty file', undefined, () => putBytes(Buffer.alloc(0))],
    ['half a length', undefined, () => putBytes(Buffer.alloc(4))],
    [
      'a length and nothing else',
      undefined,
      () => putBytes(withLength(Buffer.alloc(0), Buffer.alloc(0), 9n)),
    ],
    ['no header', undefined, () => putBytes(Buffer.alloc(8))],
    [
      'half a header',
      undefined,
      () => putBytes(withLength(Buffer.from('{"x":'), Buffer.alloc(0), 60n)),
    ],
    [
      'a header length one too large',
      undefined,
      () => putBytes(withLength(Buffer.from('{}'), Buffer.alloc(0), 3n)),
    ],
    [
      'a header length too small',
      undefined,
      () => putBytes(withLength(Buffer.from('{"x":1}'), Buffer.alloc(9), 4n)),
    ],
    [
      'a length of 2^40',
      undefined,
      () => putBytes(withLength(Buffer.from('{}'), Buffer.alloc(0), 2n ** 40n)),
    ],
    [
      'a length of 2^64 - 1',
      undefined,
      () => putBytes(withLength(Buffer.from('{}'), Buffer.alloc(0), 2n ** 64n - 1n)),
    ],
    [
      'a length above 2^53',
      undefined,
      () => putBytes(withLength(Buffer.from('{}'), Buffer.alloc(0), 2n ** 53n + 2n)),
    ],
    ['no JSON', undefined, () => put('{x: 1}')],
    ['a byte order mark', undefined, () => put(`\ufeff${JSON.stringify(whole)}`)],
    [
      'no UTF-8',
      undefined,
      () => putBytes(withLength(Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x7d]), Buffer.alloc(0))),
    ],
    ['two values', undefined, () => put('{}{}', 0)],
    ['a NUL in the header', undefined, () => put('{}\u0000', 0)],
    ['a list', undefined, () => put('[]', 0)],
    ['null', undefined, () => put('null', 0)],
    ['a number', undefined, () => put('3', 0)],
    ['lists 100000 deep', undefined, () => put(deep('[', ']'))],
    [
      'objects 100000 deep',
      undefined,
      () => put(`${'{"x":'.repeat(100_000)}1${'}'.repeat(100_000)}`),
    ],
    ['an entry 100000 deep', 'x', () => put(`{"x":${deep('[', ']')}}`)],
    ['a shape 100000 deep', 'x', () => put(`{"x":{"dtype":"F32","shape":${deep('[', ']')}}}`)],
    [
      'a name twice',
      'x',
      () => put(`{"x":${JSON.stringify(whole.x)},"x":${JSON.stringify(whole.x)}}`),
    ],
    [
      'a name twice, once escaped',
      'x',
      () => put(`{"\\u0078":${JSON.stringify(whole.x)} , "x"  :${JSON.stringify(whole.x)}}`),
    ],
    [
      'a property twice',
      'shape',
      () => put('{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,24],"shape":[6]}}'),
    ],
    [
      'metadata twice',
      '__metadata__',
      () => put(`{"__metadata__":{"a":"b"},"__metadata__":{},"x":${JSON.stringify(whole.x)}}`),
    ],
    ['an entry that is null', 'x', () => put({ x: null })],
    ['an entry that is a list', 'x', () => put({ x: ['F32', [6], [0, 24]] })],
    ['an entry that is text', '__proto__', () => put('{"__proto__":"F32"}')],
    ['no dtype', 'x', () => put({ x: { shape: [6], data_offsets: [0, 24] } })],
    ['a dtype that is a number', 'x', () => put({ x: { ...whole.x, dtype: 0 } })],
    ['no shape', 'x', () => put({ x: { dtype: 'F32', data_offsets: [0, 24] } })],
    [
      'a shape from a prototype',
      '__proto__',
      () => put('{"__proto__":{"dtype":"F32","data_offsets":[0,24]}}'),
    ],
    ['a shape that is no list', 'x', () => put({ x: f32(6, 0, 24) })],
    ['a negative size', 'x', () => put({ x: f32([-2, -3], 0, 24) })],
    ['a fractional size', 'x', () => put({ x: f32([1.5, 4], 0, 24) })],
    ['a size that is text', 'x', () => put({ x: f32(['6'], 0, 24) })],
    ['a size that is null', 'x', () => put({ x: f32([6, null], 0, 24) })],
    [
      'a size above 2^53',
      'x',
      () => put('{"x":{"dtype":"F32","shape":[9007199254740993],"data_offsets":[0,24]}}'),
    ],
    ['sizes whose product overflows', 'x', () => put({ x: f32([2 ** 32, 2 ** 32], 0, 24) })],
    [
      'sizes whose product is infinite',
      'x',
      () => put({ x: f32([0, ...Array(30).fill(2 ** 52)], 0, 24) }),
    ],
    [
      'sizes whose product wraps to the right one',
      'x',
      () => put({ x: f32([2 ** 33, 2 ** 31, 6], 0, 24) }),
    ],
    ['no offsets', 'x', () => put({ x: { dtype: 'F32', shape: [6] } })],
    ['one offset', 'x', () => put({ x: { dtype: 'F32', shape: [6], data_offsets: [24] } })],
    [
      'three offsets',
      'x',
      () => put({ x: { dtype: 'F32', shape: [6], data_offsets: [0, 24, 24] } }),
    ],
    ['a negative offset', 'x', () => put({ x: f32([6], -24, 0) })],
    ['a fractional offset', 'x', () => put({ x: f32([6], 0.5, 24.5) })],
    ['an offset that is text', 'x', () => put({ x: f32([6], '0', '24') })],
    [
      'an offset of 1e400',
      'x',
      () => put('{"x":{"dtype":"F32","shape":[6],"data_offsets":[0,1e400]}}'),
    ],
    [
      'an offset above 2^53',
      'x',
      () =>
        put(
          '{"x":{"dtype":"F32","shape":[6],"data_offsets":[18446744073709551592,18446744073709551616]}}',
        ),
    ],
    ['offsets the other way round', 'x', () => put({ x: f32([6], 24, 0) })],
    ['an end beyond the file', 'x', () => put({ x: f32([7], 0, 28) })],
    ['data cut off', 'x', () => put(whole, 23)],
    ['no data at all', 'x', () => put(whole, 0)],
    ['data that nothing claims', undefined, () => put(whole, 25)],
    ['data without any tensor', undefined, () => put({})],
    ['more bytes than the shape says', 'x', () => put({ x: f32([5], 0, 24) })],
    ['fewer bytes than the shape says', 'x', () => put({ x: f32([7], 0, 24) })],
    ['the size of another dtype', 'x', () => put({ x: { ...whole.x, dtype: 'F64' } })],
    ['tensors that overlap', 'b', () => put({ a: f32([4], 0, 16), b: f32([3], 12, 24) })],
    ['a tensor inside another', 'b', () => put({ a: f32([6], 0, 24), b: f32([1], 8, 12) })],
    ['the same place twice', 'b', () => put({ a: f32([6], 0, 24), b: f32([6], 0, 24) })],
    ['a gap', 'b', () => put({ a: f32([2], 0, 8), b: f32([3], 12, 24) })],
    ['a gap in front', 'a', () => put({ a: f32([5], 4, 24) })],
    ['an empty tensor inside another', 'b', () => put({ a: f32([6], 0, 24), b: f32([0], 4, 4) })],
    ['metadata that is a list', '__metadata__', () => put({ __metadata__: [], ...whole })],
    ['metadata that is null', '__metadata__', () => put({ __metadata__: null, ...whole })],
    ['metadata with a number', '__metadata__', () => put({ __metadata__: { a: 1 }, ...whole })],
    ['a folder', undefined, () => folder],
    ['no file', undefined, () => join(folder, 'missing')],
    ['a path through a file', undefined, () => join(put(whole), 'x')],
    ['a path with a NUL', undefined, () => `${folder}/\u0000`],
    ['a device without end', undefined, () => '/dev/zero'],
  ])('%s', async (_, name, make) => {
    const path = make()
    const error = await failure(() => openSafetensors(path))
    expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'safetensors', argument: 'path' })
    expect(error.message).toMatch(/^safetensors: /)
    expect(error.message).toContain(path)
    if (name !== undefined) expect(error.message.slice(path.length)).toContain(name)
    expect(error.message.length).toBeLessThan(path.length + 400)
  })

  it('a valid file beside them opens', async () => {
    const file = await openSafetensors(put(whole))
    expect((await file.load('x')).shape).toEqual([2, 3])
    await file.close()
  })

  it('a shape that no tensor can have is refused when it is loaded', async () => {
    const path = put({
      many: f32([1, 1, 1, 1, 1, 1, 1, 1, 6], 0, 24),
      vast: f32([2 ** 52, 2 ** 52, 0], 24, 24),
    })
    await using file = await openSafetensors(path)
    for (const name of ['many', 'vast']) {
      const error = await failure(() => file.load(name))
      expect(error).toMatchObject({ code: 'ERR_SHAPE', op: 'safetensors' })
      expect(error.message).toContain(`"${name}" of ${path}`)
    }
  })

  it('any change of bytes is read or refused', async () => {
    const header = Buffer.from(
      JSON.stringify({
        __metadata__: { made: 'here' },
        a: { dtype: 'F32', shape: [2, 3], data_offsets: [0, 24] },
        b: { dtype: 'BF16', shape: [4], data_offsets: [24, 32] },
        c: { dtype: 'U8', shape: [0, 9], data_offsets: [32, 32] },
        d: { dtype: 'I64', shape: [], data_offsets: [32, 40] },
      }),
    )
    const valid = withLength(header, Buffer.alloc(40, 3))
    const path = fresh()
    const seen = { read: 0, refused: 0 }
    const byte = fc.oneof(
      fc.nat({ max: 255 }),
      fc.constantFrom(...Buffer.from('0123456789[]{}",:-.eE ')),
    )
    const edit = fc.record({
      at: fc.oneof(fc.nat({ max: valid.length }), fc.nat({ max: 8 })),
      remove: fc.oneof(fc.constant(1), fc.nat({ max: 12 })),
      insert: fc.oneof(
        fc.array(byte, { minLength: 1, maxLength: 1 }),
        fc.array(byte, { maxLength: 6 }),
      ),
      // so that the header's length often stays right
      repair: fc.boolean(),
    })
    await fc.assert(
      fc.asyncProperty(fc.array(edit, { minLength: 1, maxLength: 3 }), async (edits) => {
        let bytes: Buffer = valid
        let length = header.length
        for (const { at, remove, insert, repair } of edits) {
          const before = bytes.length
          bytes = Buffer.concat([
            bytes.subarray(0, at),
            Buffer.from(insert),
            bytes.subarray(at + remove),
          ])
          if (at >= 8 && at < 8 + length) length += bytes.length - before
          if (repair && bytes.length >= 8) bytes.writeBigUInt64LE(BigInt(Math.max(length, 0)))
        }
        writeFileSync(path, bytes)
        try {
          await using file = await openSafetensors(path)
          let total = 0
          for (const [name, { nbytes, shape, dtype }] of file.entries) {
            total += nbytes
            try {
              const x = await file.load(name)
              expect([x.dtype, x.shape, x.nbytes]).toEqual([dtype, shape, nbytes])
              x.dispose()
            } catch (error) {
              if (!(error instanceof HeddleError)) throw error
              expect(error.code).toMatch(/^ERR_(DTYPE|SHAPE)$/)
            }
          }
          expect(total).toBe(bytes.length - 8 - Number(bytes.readBigUInt64LE()))
          seen.read++
        } catch (error) {
          if (!(error instanceof HeddleError)) throw error
          expect(error).toMatchObject({ code: 'ERR_ARGUMENT', op: 'safetensors' })
          expect(error.message).toContain(path)
          seen.refused++
        }
      }),
      { numRuns: 4000 },
    )
    expect(Math.min(seen.read, seen.refused), JSON.stringify(seen)).toBeGreaterThan(100)
  })
})
