import { elapsed, empty, hipDecoder, hipStages, memory, randn, synchronize } from 'heddle'
import { expect, it } from 'vitest'
import { describeGpu } from '../support/gpu.js'

const device = 'cuda:0'

describeGpu('hip of a million tokens in pinned memory', () => {
  it('decodes in little memory of the device, as from all of it', async () => {
    const [T, steps, gib] = [2 ** 20, 64, 2 ** 30]
    const shape = [1, T, 8, 128]
    const make = (seed: number) => randn(shape, { seed, dtype: 'bfloat16', device, pinned: true })
    const [k, v] = [make(1), make(2)]
    const rows = randn([1, steps, 32, 128], { seed: 3, dtype: 'bfloat16', device })
    const decode = async (offload: boolean, [keys, values]: readonly [typeof k, typeof v]) => {
      using decoder = hipDecoder({ stages: hipStages, offload })
      const read: Uint16Array[] = []
      const times: number[] = []
      for (let n = 0; n < steps; n++) {
        const sk = T - steps + n + 1
        const step = () =>
          decoder.attend(rows.slice(1, n, n + 1), keys.slice(1, 0, sk), values.slice(1, 0, sk))
        let result: ReturnType<typeof step> | undefined
        const time = elapsed(() => {
          result = step()
        }, device)
        read.push(await result!.out.read())
        times.push(await time)
        result!.out.dispose()
        result!.lse.dispose()
      }
      return { read, times, counts: await decoder.cacheCounts() }
    }
    const far = await decode(true, [k, v])
    await synchronize(device)
    const { peakBytes, pinnedBytes } = memory(device)
    expect(pinnedBytes).toBe(4 * gib)
    expect(peakBytes).toBeLessThan(gib)

    const near = await decode(
      false,
      [k, v].map((x) => empty(shape, { dtype: 'bfloat16', device }).copyFrom(x)) as never,
    )
    expect(far.read).toEqual(near.read)
    const { scanned, attended } = far.counts
    expect(scanned.found).toBeGreaterThan(0)
    expect(attended.found).toBeGreaterThan(0)
    const share = ({ found, missed }: typeof scanned) => (found / (found + missed)).toFixed(3)
    // a search of all stages, of the last, and none
    const of = ({ times }: typeof far) => [32, 40, 41].map((n) => times[n]!.toFixed(3)).join(' ')
    process.stdout.write(
      `a step of 1M tokens takes ${of(far)} ms pinned and ${of(near)} ms not; found are ` +
        `${share(scanned)} of scanned rows and ${share(attended)} of listed blocks; ` +
        `${(peakBytes / 2 ** 20).toFixed(0)} MiB on the device\n`,
    )
  }, 300_000)
})
