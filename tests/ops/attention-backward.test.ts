import { attention, attentionBackward, type Tensor, tensor } from 'heddle'
import { describe, expect, it } from 'vitest'
import { expectGradients, largest, maxError } from '../support/compare.js'
import { describeDevices, epsilon, floats } from '../support/devices.js'
import { type Random, random, sample, starts } from '../support/random.js'
import {
  type AttentionCase,
  attentionGradients,
  attentionReference,
  type GradientReference,
  type Gradients,
  reader,
} from '../support/reference.js'

const lengths = [1, 2, 3, 31, 63, 64, 65, 113, 127, 130, 200]

function drawCase(rng: Random): AttentionCase {
  const hk = rng.pick([1, 2, 3])
  // what the matrix instructions of newer GPUs take
  const plain = rng.chance(0.3)
  const d = rng.pick(plain ? [64, 128] : [8, 16, 40, 64, 96, 128, 256])
  const some = (p: number) => !plain && rng.chance(p)
  const hq = hk * rng.pick([1, 1, 2, 4])
  return {
    b: rng.pick([1, 2]),
    sq: rng.pick(lengths),
    sk: rng.pick(lengths),
    hq,
    hk,
    d,
    dv: some(0.3) ? rng.pick([8, 64, 72, 128]) : d,
    causal: rng.chance(0.6),
    window: rng.chance(0.3) ? rng.pick([1, 2, 17, 64, 100, 1000]) : undefined,
    scale: rng.chance(0.7) ? 1 / Math.sqrt(d) : rng.pick([0.01, 0.3, 1]),
    softCap: some(0.3) ? rng.pick([2, 30]) : 0,
    slopes: some(0.3)
      ? Array.from(rng.normals(hq), (x) => Math.fround(Math.abs(x) * 0.1))
      : undefined,
    sink: some(0.3) ? Array.from(rng.normals(hq)) : undefined,
  }
}

function optionsOf(c: AttentionCase) {
  const { causal, scale, softCap, window, slopes, sink } = c
  return { causal, scale, softCap, window, slopes, sink }
}

describe('the reference', () => {
  it('agrees with central differences of the forward definition', () => {
    const rng = random(20)
    for (let n = 0; n < 12; n++) {
      const c: AttentionCase = {
        b: 1,
        sq: rng.pick([1, 3, 5]),
        sk: rng.pick([1, 4, 6]),
        hq: 2,
        hk: rng.pick([1, 2]),
        d: 3,
        dv: 2,
        causal: rng.chance(0.5),
        window: rng.chance(0.3) ? 2 : undefined,
        scale: 0.7,
        softCap: rng.chance(0.5) ? 1.5 : 0,
        slopes: rng.chance(0.5) ? [0.2, 0.5] : undefined,
        sink: rng.chance(0.5) ? [0.3, -0.4] : undefined,
      }
      const pattern = Array.from({ length: c.hq * c.sq * c.sk }, () => rng.chance(0.6))
      if (rng.chance(0.5)) c.sees = (_, h, i, t) => pattern[(h * c.sq + i) * c.sk + t]!
      const wide = (count: number) => Float64Array.from(rng.normals(count))
      const q = wide(c.sq * c.hq * c.d)
      const k = wide(c.sk * c.hk * c.d)
      const v = wide(c.sk * c.hk * c.dv)
      const dout = wide(c.sq * c.hq * c.dv)
      const readers = () =>
        [
          reader(q, c.sq, c.hq, c.d),
          reader(k, c.sk, c.hk, c.d),
          reader(v, c.sk, c.hk, c.dv),
        ] as const
      const loss = (changed: AttentionCase) =>
        attentionReference(changed, ...readers(), 'float32').out.reduce(
          (sum, x, i) => sum + x * dout[i]!,
          0,
        )
      const { exact } = attentionGradients(
        c,
        ...readers(),
        reader(dout, c.sq, c.hq, c.dv),
        'float32',
      )
      const step = 1e-5
      const check = (
        name: keyof Gradients,
        values: ArrayLike<number>,
        set: (x: number, i: number) => AttentionCase,
      ) => {
        for (let i = 0; i < values.length; i++) {
          const x = values[i]!
          const difference = (loss(set(x + step, i)) - loss(set(x - step, i))) / (2 * step)
          set(x, i)
          expect(exact[name][i], `${name}[${i}] ${JSON.stringify(c)}`).toBeCloseTo(difference, 7)
        }
      }
      const inPlace = (values: Float64Array) => (x: number, i: number) => {
        values[i] = x
        return c
      }
      check('dq', q, inPlace(q))
      check('dk', k, inPlace(k))
      check('dv', v, inPlace(v))
      if (c.sink) check('dsink', c.sink, (x, i) => ({ ...c, sink: c.sink!.with(i, x) }))
      if (c.slopes) check('dslopes', c.slopes, (x, i) => ({ ...c, slopes: c.slopes!.with(i, x) }))
    }
  })
})

describeDevices('attention.backward', (device) => {
  describe.each(floats)('%s', (dtype) => {
    it('agrees with float64 on random shapes and options', async () => {
      const rng = random(21)
      const cases = device === 'cpu' ? 16 : 80
      for (let n = 0; n < cases; n++) {
        const c = drawCase(rng)
        const scale = rng.chance(0.1) ? 8 : 1
        const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device, { scale })
        const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device)
        const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device)
        const dout = await sample(rng, [c.b, c.sq, c.hq, c.dv], dtype, device)
        const reference = attentionGradients(
          c,
          reader(q.values, c.sq, c.hq, c.d),
          reader(k.values, c.sk, c.hk, c.d),
          reader(v.values, c.sk, c.hk, c.dv),
          reader(dout.values, c.sq, c.hq, c.dv),
          dtype,
        )
        const options = optionsOf(c)
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, options)
        const result = attentionBackward(q.tensor, k.tensor, v.tensor, out, lse, dout.tensor, {
          ...options,
          deterministic: rng.chance(0.7),
        })
        await expectGradients(result, reference, c, dtype, JSON.stringify(c))
      }
    }, 300_000)

    it('keeps packed sequences apart', async () => {
      const rng = random(22)
      for (let n = 0; n < 6; n++) {
        const c = drawCase(rng)
        const parts = Array.from({ length: rng.pick([1, 3, 5]) }, () => ({
          sq: rng.pick([0, 1, 5, 64, 70]),
          sk: rng.pick([0, 1, 9, 65, 130]),
        }))
        const cuSeqlensQ = starts(parts.map(({ sq }) => sq))
        const cuSeqlensK = starts(parts.map(({ sk }) => sk))
        const [totalQ, totalK] = [cuSeqlensQ.at(-1)!, cuSeqlensK.at(-1)!]
        const q = await sample(rng, [1, totalQ, c.hq, c.d], dtype, device)
        const k = await sample(rng, [1, totalK, c.hk, c.d], dtype, device)
        const v = await sample(rng, [1, totalK, c.hk, c.dv], dtype, device)
        const dout = await sample(rng, [1, totalQ, c.hq, c.dv], dtype, device)
        const options = { ...optionsOf(c), cuSeqlensQ, cuSeqlensK }
        const { out, lse } = attention(q.tensor, k.tensor, v.tensor, options)
        const result = attentionBackward(
          q.tensor,
          k.tensor,
          v.tensor,
          out,
          lse,
          dout.tensor,
          options,
        )
        const expected = parts.map((part, i) => {
          const from =
            (read: ReturnType<typeof reader>, by: number): ReturnType<typeof reader> =>
            (_, row, head, e) =>
              read(0, row + by, head, e)
          return attentionGradients(
            { ...c, b: 1, ...part },
            from(reader(q.values, totalQ, c.hq, c.d), cuSeqlensQ[i]!),
            from(reader(k.values, totalK, c.hk, c.d), cuSeqlensK[i]!),
            from(reader(v.values, totalK, c.hk, c.dv), cuSeqlensK[i]!),
            from(reader(dout.values, totalQ, c.hq, c.dv), cuSeqlensQ[i]!),
            dtype,
          )
        })
        await expectGradients(result, joined(expected), c, dtype, JSON.stringify({ parts, c }))
      }
    }, 60_000)

    it('gives nothing to keys behind the lengths of a cache', async () => {
      const rng = random(23)
      const c = { ...drawCase(rng), b: 3, sq: 70, sk: 150 }
      const used = [0, 77, 150]
      const q = await sample(rng, [c.b, c.sq, c.hq, c.d], dtype, device)
      const k = await sample(rng, [c.b, c.sk, c.hk, c.d], dtype, device, { strided: false })
      const v = await sample(rng, [c.b, c.sk, c.hk, c.dv], dtype, device, { strided: false })
      const dout = await sample(rng, [c.b, c.sq, c.hq, c.dv], dtype, device)
      for (const { tensor: made } of [k, v])
        used.forEach((keys, b) => {
          const rest = made.slice(0, b, b + 1).slice(1, keys)
          if (rest.size > 0) rest.copyFrom(tensor([Number.NaN], [1], { device }).expand(rest.shape))
        })
      const reference = attentionGradients(
        c,
        reader(q.values, c.sq, c.hq, c.d),
        reader(k.values, c.sk, c.hk, c.d),
        reader(v.values, c.sk, c.hk, c.dv),
        reader(dout.values, c.sq, c.hq, c.dv),
        dtype,
        (b) => ({ sq: c.sq, sk: used[b]! }),
      )
      const options = { ...optionsOf(c), cacheSeqlens: used }
      const { out, lse } = attention(q.tensor, k.tensor, v.tensor, options)
      const result = attentionBackward(q.tensor, k.tensor, v.tensor, out, lse, dout.tensor, options)
      await expectGradients(result, reference, c, dtype, JSON.stringify(c))
    })

    it('gives zero where there is nothing', async () => {
      const of = (shape: number[]) =>
        tensor(new Float32Array(shape.reduce((a, x) => a * x, 1)).fill(1), shape, { dtype, device })
      for (const [sq, sk] of [
        [5, 0],
        [0, 5],
        [0, 0],
      ] as const) {
        const [q, k] = [of([1, sq, 2, 16]), of([1, sk, 1, 16])]
        const { out, lse } = attention(q, k, k, { sink: [0, 1] })
        const { dq, dk, dv, dsink } = attentionBackward(q, k, k, out, lse, q, { sink: [0, 1] })
        for (const [gradient, like] of [
          [dq, q],
          [dk, k],
          [dv, k],
        ] as const) {
          expect(gradient.shape).toEqual(like.shape)
          expect((await gradient.read({ as: 'float32' })).every((x) => x === 0)).toBe(true)
        }
        expect([...(await dsink!.read())].map(Math.abs)).toEqual([0, 0])
      }
    })

    it('does not let a masked NaN through', async () => {
      const rng = random(24)
      const make = () => sample(rng, [1, 70, 2, 64], dtype, device, { strided: false })
      const [q, k, v, dout] = [await make(), await make(), await make(), await make()]
      const gradients = async () => {
        const tensors = [q.tensor, k.tensor, v.tensor] as const
        const { out, lse } = attention(...tensors, { causal: true })
        const result = attentionBackward(...tensors, out, lse, dout.tensor, { causal: true })
        return Promise.all([result.dq.read({ as: 'float32' }), result.dk.read({ as: 'float32' })])
      }
      const row = 2 * 64
      const poison = (made: Tensor) =>
        made.slice(1, 50).copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 20, 2, 64]))
      const [cleanQ] = await gradients()
      poison(k.tensor)
      poison(v.tensor)
      const [dirtyQ] = await gradients()
      // rows before the first NaN do not see it, those from it on do; the forward call may have computed the former in
      // another way, so that out and what follows from it was rounded differently
      expect(
        maxError(dirtyQ.subarray(0, 50 * row), cleanQ.subarray(0, 50 * row)),
      ).toBeLessThanOrEqual(4 * epsilon[dtype] * largest(cleanQ))
      expect(dirtyQ.subarray(50 * row).every(Number.isNaN)).toBe(true)
    })

    it('does not let a NaN of a row reach keys that it does not see', async () => {
      const rng = random(25)
      const make = () => sample(rng, [1, 70, 1, 64], dtype, device, { strided: false })
      const [q, k, v, dout] = [await make(), await make(), await make(), await make()]
      const { out, lse } = attention(q.tensor, k.tensor, v.tensor, { window: 8 })
      const gradients = async () => {
        const { dk, dv } = attentionBackward(q.tensor, k.tensor, v.tensor, out, lse, dout.tensor, {
          window: 8,
        })
        return [await dk.read({ as: 'float32' }), await dv.read({ as: 'float32' })] as const
      }
      const clean = await gradients()
      dout.tensor
        .slice(1, 20, 21)
        .copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 1, 1, 64]))
      const dirty = await gradients()
      clean.forEach((before, i) => {
        const after = dirty[i]!
        // row 20 sees keys 13 to 20; the others may have been computed in another way
        expect(after.subarray(13 * 64, 21 * 64).every(Number.isNaN)).toBe(true)
        const most = 4 * epsilon[dtype] * largest(before)
        for (const [from, to] of [
          [0, 13],
          [21, 70],
        ] as const)
          expect(
            maxError(after.subarray(from * 64, to * 64), before.subarray(from * 64, to * 64)),
          ).toBeLessThanOrEqual(most)
      })
    })

    it('takes nothing from rows that see no key, whatever dout holds there', async () => {
      const rng = random(27)
      const draw = async (tokens: number) =>
        (await sample(rng, [1, tokens, 2, 64], dtype, device, { strided: false })).tensor
      const [q, k, v, dout] = [await draw(70), await draw(20), await draw(20), await draw(70)]
      // rows 0 to 49 stand before the first key
      dout.slice(1, 0, 50).copyFrom(tensor([Number.NaN], [1], { device }).expand([1, 50, 2, 64]))
      const options = { causal: true, sink: [0.5, -1], slopes: [0.1, 0.2] }
      const { out, lse } = attention(q, k, v, options)
      const result = attentionBackward(q, k, v, out, lse, dout, options)
      const { dlevel, dbias, ...given } = result
      expect([dlevel, dbias]).toEqual([undefined, undefined])
      for (const gradient of Object.values(given)) {
        const values = await gradient!.read({ as: 'float32' })
        expect([...values].some(Number.isNaN)).toBe(false)
      }
      const dq = await result.dq.read({ as: 'float32' })
      expect(dq.subarray(0, 50 * 128).every((x) => x === 0)).toBe(true)
      expect(dq.subarray(50 * 128).some((x) => x !== 0)).toBe(true)
    })

    it('is the same every time', async () => {
      const rng = random(26)
      const shapes = [4, 2, 2, 4].map((heads) => [2, 300, heads, 64])
      const [q, k, v, dout] = await Promise.all(
        shapes.map(
          async (shape) => (await sample(rng, shape, dtype, device, { strided: false })).tensor,
        ),
      )
      const { out, lse } = attention(q!, k!, v!, { causal: true })
      const once = async () => {
        const { dq, dk, dv } = attentionBackward(q!, k!, v!, out, lse, dout!, { causal: true })
        const read = await Promise.all([dq.read(), dk.read(), dv.read()])
        return Buffer.concat(read.map(({ buffer }) => new Uint8Array(buffer)))
      }
      const first = await once()
      for (let i = 0; i < 20; i++) expect(Buffer.compare(await once(), first)).toBe(0)
    })
  })

  it('gives zeros to keys without queries', async () => {
    for (const [sq, hq] of [
      [0, 2],
      [5, 0],
    ] as const) {
      const rng = random(26)
      const q = tensor(new Float32Array(sq * hq * 16), [1, sq, hq, 16], { device })
      const k = await sample(rng, [1, 7, 2, 16], 'float32', device)
      const bias = (await sample(rng, [7], 'float32', device)).tensor
      // memory that others have written to
      for (let n = 0; n < 8; n++) attention(k.tensor, k.tensor, k.tensor).out.dispose()
      const { out, lse } = attention(q, k.tensor, k.tensor, { bias })
      const { dk, dv, dbias } = attentionBackward(q, k.tensor, k.tensor, out, lse, out, {
        bias,
        dbias: true,
      })
      for (const sum of [dk, dv, dbias!]) expect(largest(await sum.read())).toBe(0)
    }
  })

  it('rejects the read when lengths on the device are out of range', async () => {
    const x = tensor(new Float32Array(4 * 16), [1, 4, 1, 16], { device })
    const lse = tensor(new Float32Array(4), [1, 1, 4], { device })
    const int32 = (values: number[]) => tensor(values, undefined, { dtype: 'int32', device })
    for (const options of [
      { cuSeqlensQ: int32([0, 3]), cuSeqlensK: int32([0, 4]) },
      { cuSeqlensQ: int32([0, 5, 4]), cuSeqlensK: int32([0, 2, 4]) },
      { cacheSeqlens: int32([5]) },
    ])
      await expect(
        attentionBackward(x, x, x, x, lse, x, options).dq.read(),
        Object.keys(options).join(),
      ).rejects.toThrow(/^attention\.backward: .*must/)
  })

  it('says what is wrong with its arguments', () => {
    const x = tensor(new Float32Array(4 * 16), [1, 4, 1, 16], { device })
    const lse = tensor(new Float32Array(4), [1, 1, 4], { device })
    expect(() => attention.backward(x, x, x, x, x as never, x)).toThrow(
      'attention.backward: lse must be [b, hq, sq]',
    )
    expect(() => attention.backward(x, x, x, x, lse, x, { casual: true } as never)).toThrow(
      'attention.backward: unknown option "casual"; did you mean "causal"?',
    )
    expect(() =>
      attention.backward(x, x, x, x, lse, tensor([1], [1, 1, 1, 1], { device })),
    ).toThrow('attention.backward: dout must be [b, sq, hq, dv], got [1, 1, 1, 1]')
  })
})

/** Packed sequences one after the other: what belongs to heads is added up. */
function joined(parts: GradientReference[]): GradientReference {
  const of = (which: (part: GradientReference) => Gradients): Gradients => {
    const list = (name: keyof Gradients) =>
      Float64Array.from(parts.flatMap((part) => [...which(part)[name]]))
    const total = (name: keyof Gradients) =>
      which(parts[0]!)[name].map((_, i) =>
        parts.reduce((sum, part) => sum + which(part)[name][i]!, 0),
      )
    return {
      dq: list('dq'),
      dk: list('dk'),
      dv: list('dv'),
      dsink: total('dsink'),
      dslopes: total('dslopes'),
    }
  }
  const most = (name: keyof Gradients) =>
    parts.reduce((a, part) => Math.max(a, part.sizes[name]), 0)
  const noise = (name: 'dq' | 'dk') => Math.max(...parts.map((part) => part.noises[name]))
  const sum = (name: keyof Gradients) => parts.reduce((a, part) => a + part.sizes[name], 0)
  return {
    exact: of((part) => part.exact),
    plain: of((part) => part.plain),
    sizes: {
      dq: most('dq'),
      dk: most('dk'),
      dv: most('dv'),
      dsink: sum('dsink'),
      dslopes: sum('dslopes'),
    },
    noises: { dq: noise('dq'), dk: noise('dk') },
    exponent: parts.reduce((a, part) => Math.max(a, part.exponent), 0),
  }
}
