import { join } from 'node:path'
import {
  attention,
  type FloatDType,
  lightning,
  memory,
  openSafetensors,
  synchronize,
  type Tensor,
} from 'heddle'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
import {
  disposeCache,
  forward,
  generate,
  load,
  type Model,
  newCache,
  score,
} from '../../examples/byte-lm/decoder.js'
import { relativeRms } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'

const directory = join(__dirname, '../../examples/byte-lm')
// The first rows of the reference values; HEDDLE_GOLDEN names a file with more of them
const golden = process.env.HEDDLE_GOLDEN ?? join(__dirname, 'golden.safetensors')

describeDevices('byte-lm', (device) => {
  const dtype: FloatDType = device === 'cpu' ? 'float32' : 'bfloat16'
  const bound = device === 'cpu' ? 1e-5 : 5e-3
  let model: Model
  beforeAll(async () => {
    model = await load(directory, { device, dtype })
  })
  afterAll(() => {
    for (const tensor of [...model.weights.values(), ...model.slopes]) tensor.dispose()
  })

  const rows = async (count: number, at = 0) => {
    const file = await openSafetensors(join(directory, 'eval-dev.safetensors'))
    const ids = await (await file.load('dev16k.ids', { dtype: 'uint8', rows: [0, 1] })).read()
    await file.close()
    return ids.slice(at, at + count)
  }

  describe('golden values', () => {
    const read = async (name: string) => {
      const file = await openSafetensors(golden)
      const stored = await file.load(name, { device })
      await file.close()
      return stored
    }
    const input = async (name: string) =>
      (await read(name))
        .cast(dtype)
        .reshape([
          1,
          -1,
          name.endsWith('q') ? 4 : name === 'layer0.k' || name === 'layer0.v' ? 4 : 2,
          64,
        ]) as Tensor<FloatDType>
    const expected = async (name: string) => (await read(name)).read({ as: 'float32' })

    it('attention gives the stored outputs and lse', async () => {
      const [q, k, v] = [await input('layer1.q'), await input('layer1.k'), await input('layer1.v')]
      const { out, lse } = attention(q, k, v, { causal: true })
      expect(
        relativeRms(await out.read({ as: 'float32' }), await expected('layer1.out')),
      ).toBeLessThan(bound)
      expect(relativeRms(await lse.read(), await expected('layer1.lse'))).toBeLessThan(bound)
    })

    it('lightning gives the stored outputs, and the state where the file has it', async () => {
      const [q, k, v] = [await input('layer0.q'), await input('layer0.k'), await input('layer0.v')]
      const slopes = (await read('layer0.slopes')) as Tensor<'float32'>
      const { out, state } = lightning(q, k, v, { slopes, scale: 0.125, outputFinalState: true })
      expect(
        relativeRms(await out.read({ as: 'float32' }), await expected('layer0.out')),
      ).toBeLessThan(bound)
      if (process.env.HEDDLE_GOLDEN) {
        expect(relativeRms(await state.read(), await expected('layer0.state'))).toBeLessThan(bound)
      }
    })

    it('the decoder gives the stored logits', async () => {
      const ids = (await (await read('ids')).read()) as Uint8Array
      const logits = await forward(model, ids).read()
      const error = relativeRms(logits, await expected('logits'))
      expect(error).toBeLessThan(device === 'cpu' ? 1e-3 : 3e-2)
    })
  })

  it('any split of a prompt gives the logits of one prefill', async () => {
    const ids = await rows(200)
    const whole = await forward(model, ids).read()
    for (const cuts of [
      [0, 200],
      [0, 1, 200],
      [0, 64, 65, 128, 199, 200],
      [0, 150, ...Array.from({ length: 50 }, (_, i) => 151 + i)],
    ]) {
      const cache = newCache(model, 200)
      for (let i = 0; i + 1 < cuts.length; i++) {
        const logits = await forward(model, ids.slice(cuts[i], cuts[i + 1]), cache).read()
        const own = whole.subarray(cuts[i]! * 256, cuts[i + 1]! * 256)
        expect(relativeRms(logits, own), `${cuts} at ${cuts[i]}`).toBeLessThan(
          device === 'cpu' ? 1e-4 : 3e-2,
        )
      }
      disposeCache(cache)
    }
  })

  it('recalls a key that it has read', async () => {
    const text = new TextEncoder()
    const filler = new TextDecoder().decode(await rows(1500))
    const prompt = text.encode(`\n[KEY qzvlab: 40713]\n${filler}\n[RECALL qzvlab: `)
    const bytes: number[] = []
    for await (const byte of generate(model, prompt, { maxTokens: 5 })) bytes.push(byte)
    expect(String.fromCharCode(...bytes)).toBe('40713')
  })

  it('holds nothing once it is given up', async () => {
    await synchronize(device)
    const before = memory(device).tensors
    const controller = new AbortController()
    const prompt = new TextEncoder().encode('The compiler')
    const bytes = generate(model, prompt, { signal: controller.signal })
    await bytes.next()
    const next = bytes.next()
    controller.abort(new Error('enough'))
    await expect(next).rejects.toThrow('enough')
    await synchronize(device)
    // what earlier tests left may have been collected meanwhile
    expect(memory(device).tensors).toBeLessThanOrEqual(before)
  })

  it('scores a sequence as it was measured elsewhere', async () => {
    const file = await openSafetensors(join(directory, 'eval-dev.safetensors'))
    const ids = await (await file.load('dev4k.ids', { dtype: 'uint8', rows: [1, 2] })).read()
    const pairs = await (await file.load('dev4k.answers', { dtype: 'int32' })).read()
    await file.close()
    const answers = Array.from({ length: pairs.length / 2 }, (_, i) => i)
      .filter((i) => pairs[2 * i] === 1)
      .map((i) => pairs[2 * i + 1]!)
    expect(answers.length).toBeGreaterThan(0)
    const { bits, bytes, recalled } = await score(model, ids, answers)
    expect(Math.abs(bits / bytes - 1.1241)).toBeLessThan(0.002)
    expect(recalled.every(Boolean)).toBe(true)
  })
})
