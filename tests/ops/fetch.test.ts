import { type DType, empty, full, randn, type Tensor, tensor, zeros } from 'heddle'
import { expect, it } from 'vitest'
import { run } from '../../dist/native.js'
import { describeDevices } from '../support/devices.js'
import { failure } from '../support/failure.js'
import { random } from '../support/random.js'

const range = (n: number) => Array.from({ length: n }, (_, i) => i)

describeDevices('fetch', (device) => {
  const int32 = (values: number[]) => tensor(values, undefined, { dtype: 'int32', device })
  const make = (pages: number, slots: number, row: number[], dv: number, dtype: DType) => {
    const like = (n: number, d: number) => [n, ...row, d]
    const [d] = [row.length > 1 ? 16 : 6]
    const far = (width: number, seed: number) =>
      empty(like(pages, width), { dtype, device, pinned: true }).copyFrom(
        randn(like(pages, width), { seed, device }),
      )
    return {
      ...{ k: far(d, 1), v: dv > 0 ? far(dv, 2) : undefined },
      nearK: full(like(slots, d), Number.NaN, { dtype, device }),
      nearV: dv > 0 ? full(like(slots, dv), Number.NaN, { dtype, device }) : undefined,
      places: full([pages + 3], -1, { dtype: 'int32', device }),
      slots: full([slots, 2], -1, { dtype: 'int32', device }),
      counts: zeros([4], { dtype: 'int64', device }),
    }
  }
  const bytes = async (x: Tensor) => Buffer.from((await x.read()).buffer)

  it('has wanted pages nearby and keeps those that were wanted last', async () => {
    const rng = random(410)
    for (const [size, dv, dtype, patience] of [
      [4, 8, 'bfloat16', 0],
      [1, 0, 'float32', 2],
      [2, 5, 'float16', 1],
    ] as const) {
      const [pages, slots] = [40, 12]
      const state = make(pages, slots, [size, 2], dv, dtype)
      const [k, v] = [await bytes(state.k), state.v && (await bytes(state.v))]
      // pages that have a slot, and when they were wanted last
      let near = new Map<number, number>()
      let [hits, misses] = [0n, 0n]
      for (let call = 0; call < 12; call++) {
        const n = 1 + rng.below(8)
        const wanted = range(pages)
          .sort(() => rng.next() - 0.5)
          .slice(0, n)
        // what stands behind the length is not looked at
        const length = n * size - rng.below(size)
        const [found] = run('fetch', {
          ...{ ...state, patience, length: int32([length]) },
          wanted: int32([...wanted, 77, -5]),
        })
        const chosen = [...((await found!.read()) as Int32Array)]
        const held = (await state.slots.read()) as Int32Array
        const places = (await state.places.read()) as Int32Array
        const [nearK, nearV] = [await bytes(state.nearK), state.nearV && (await bytes(state.nearV))]
        const next = new Map<number, number>()
        for (let slot = 0; slot < slots; slot++) {
          const [page, last] = [held[2 * slot]!, held[2 * slot + 1]!]
          if (page < 0) continue
          next.set(page, last)
          expect(places[page]).toBe(slot)
        }
        expect(places.filter((slot) => slot >= 0).length).toBe(next.size)
        // who had to stay did, and only the wanted came
        for (const [page, last] of near)
          if (call - last <= patience) expect(next.has(page)).toBe(true)
        for (const page of next.keys()) expect(near.has(page) || wanted.includes(page)).toBe(true)
        const free = slots - [...near.values()].filter((last) => call - last <= patience).length
        wanted.forEach((page, i) => {
          if (near.has(page)) hits++
          else misses++
          if (chosen[i]! < 0) {
            expect(near.has(page)).toBe(false)
            return
          }
          expect(next.get(page)).toBe(call)
          expect(places[page]).toBe(chosen[i])
          for (const [far, copy] of [
            [k, nearK],
            [v, nearV],
          ]) {
            if (!far || !copy) continue
            const width = copy.length / slots
            const slot = copy.subarray(chosen[i]! * width, (chosen[i]! + 1) * width)
            expect(Buffer.compare(slot, far.subarray(page * width, (page + 1) * width))).toBe(0)
          }
        })
        if (patience === 0) expect(chosen.slice(0, n).every((slot) => slot >= 0)).toBe(true)
        const came = wanted.filter((page, i) => !near.has(page) && chosen[i]! >= 0).length
        expect(came).toBeLessThanOrEqual(free)
        expect(chosen.slice(n)).toEqual([0, 0])
        near = next
      }
      expect([...((await state.counts.read()) as BigInt64Array)].slice(0, 3)).toEqual([
        hits,
        misses,
        12n,
      ])
    }
  })

  it('takes a page that is named twice once, and counts what it has no list of', async () => {
    const state = make(9, 4, [1, 1], 0, 'float32')
    const wanted = int32([5, 5, 7, 5])
    const [found] = run('fetch', { ...state, wanted, length: int32([11]) })
    expect([...((await found!.read()) as Int32Array)].filter((slot) => slot >= 0).length).toBe(2)
    const held = [...((await state.slots.read()) as Int32Array)]
    expect(
      range(4)
        .map((i) => held[2 * i])
        .sort(),
    ).toEqual([-1, -1, 5, 7])
    expect([...((await state.counts.read()) as BigInt64Array)].slice(0, 2)).toEqual([0n, 11n])
    // a list without room is missed as a whole, and a call all the same
    const [time] = ((await state.counts.read()) as BigInt64Array).slice(2, 3)
    run('fetch', { ...state, wanted: int32([]), length: int32([3]) })
    const counts = [...((await state.counts.read()) as BigInt64Array)].slice(0, 3)
    expect(counts).toEqual([0n, 14n, time! + 1n])
  })

  it('refuses pages that do not exist', async () => {
    const state = make(9, 4, [1, 1], 4, 'float32')
    const [found] = run('fetch', { ...state, wanted: int32([1, 9]), length: int32([2]) })
    const { nearK, nearV, places, slots, counts } = state
    for (const written of [found, nearK, nearV, places, slots, counts])
      expect((await failure(() => written!.read())).message).toMatch(
        /^fetch: wanted must name pages that exist/,
      )
  })
})
