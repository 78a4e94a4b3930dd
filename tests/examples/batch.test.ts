import { join } from 'node:path'
import { memory, openSafetensors, scope, synchronize } from 'heddle'
import { afterAll, beforeAll, expect, it } from 'vitest'
import { Batch } from '../../examples/byte-lm/batch.js'
import { forward, load, type Model } from '../../examples/byte-lm/decoder.js'
import { describeDevices } from '../support/devices.js'
import { random } from '../support/random.js'

const directory = join(__dirname, '../../examples/byte-lm')

describeDevices('a batch of byte-lm', (device) => {
  let model: Model
  let text: Uint8Array
  beforeAll(async () => {
    const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
    model = await load(directory, { device, dtype })
    const file = await openSafetensors(join(directory, 'eval-dev.safetensors'))
    text = await (await file.load('dev4k.ids', { dtype: 'uint8', rows: [0, 1] })).read()
    await file.close()
  })
  afterAll(() => {
    for (const tensor of [...model.weights.values(), ...model.slopes]) tensor.dispose()
  })

  const collect = async (bytes: AsyncGenerator<number>, most = Number.POSITIVE_INFINITY) => {
    const all: number[] = []
    for await (const byte of bytes) {
      all.push(byte)
      if (all.length === most) break
    }
    return all
  }
  // Each byte is the likeliest behind what stands before it, as one call over the whole text sees it
  const expectLikeliest = async (prompt: Uint8Array, made: number[]) => {
    const whole = Uint8Array.from([...prompt, ...made])
    const logits = await scope(() => forward(model, whole).read())
    const width = model.config.vocab_size
    for (const [i, byte] of made.entries()) {
      const at = prompt.length + i - 1
      const row = logits.subarray(at * width, (at + 1) * width)
      const best = row.reduce((a, b) => Math.max(a, b))
      expect(row[byte], `byte ${i} of ${prompt.length}`).toBeGreaterThanOrEqual(
        best - (device === 'cpu' ? 1e-3 : 0.5),
      )
    }
  }

  it('writes what each sequence gets alone, whoever comes and goes', async () => {
    const rng = random(71)
    // room for three at a time, which share little, and prompts in pieces
    const batch = new Batch(model, { sequences: 3, pages: 40, pageSize: 16, stepTokens: 50 })
    const calls = Array.from({ length: 9 }, (_, i) => {
      const from = rng.below(3000)
      const prompt = text.slice(from, from + rng.pick([1, 2, 17, 130, 300]))
      return { prompt, maxTokens: 4 + rng.below(12), after: i % 3 === 0 ? 0 : rng.below(40) }
    })
    const made = await Promise.all(
      calls.map(async ({ prompt, maxTokens, after }) => {
        await new Promise((resolve) => setTimeout(resolve, after))
        return collect(batch.generate(prompt, { maxTokens }))
      }),
    )
    for (const [i, { prompt, maxTokens }] of calls.entries()) {
      expect(made[i]!.length).toBe(maxTokens)
      await expectLikeliest(prompt, made[i]!)
    }
    expect(batch.state).toEqual({ running: 0, waiting: 0, freePages: 40 })
    batch.dispose()
  })

  it('lets go of what nobody listens to, and refuses what does not fit', async () => {
    await synchronize(device)
    const before = memory(device).bytes
    const batch = new Batch(model, { sequences: 2, pages: 12, pageSize: 16, stepTokens: 64 })
    const prompt = text.slice(0, 40)
    const stopped = collect(batch.generate(prompt, { maxTokens: 100 }), 3)
    const [long, short] = await Promise.all([
      collect(batch.generate(prompt, { maxTokens: 20 })),
      collect(batch.generate(text.slice(50, 55), { maxTokens: 5 })),
    ])
    await expectLikeliest(prompt, await stopped)
    await expectLikeliest(prompt, long)
    await expectLikeliest(text.slice(50, 55), short)
    expect(batch.state).toEqual({ running: 0, waiting: 0, freePages: 12 })
    await expect(collect(batch.generate(prompt, { maxTokens: 153 }))).rejects.toThrow(/at most 192/)
    await expect(collect(batch.generate(new Uint8Array(0)))).rejects.toThrow(/empty/)
    expect(await collect(batch.generate(prompt, { maxTokens: 0 }))).toEqual([])
    batch.dispose()
    await synchronize(device)
    expect(memory(device).bytes).toBe(before)
  })
})
