import type { FloatDType } from '../dtype.js'
import { run } from '../native.js'
import { untrack } from '../scope.js'
import { empty, full, type Tensor, zeros } from '../tensor.js'

/** How often something that was wanted stood in a cache. */
export interface CacheCounts {
  found: number
  missed: number
}

/** @internal Slots on a device for pages of tensors that stand in pinned memory. */
export interface Nearby<D extends FloatDType = FloatDType> {
  k: Tensor<D>
  v: Tensor<D> | undefined
  places: Tensor<'int32'>
  slots: Tensor<'int32'>
  counts: Tensor<'int64'>
}

/** @internal The whole pages of one sequence, [1, s, h, d], in its memory. */
export function pagesOf<D extends FloatDType>(x: Tensor<D>, size: number): Tensor<D> {
  const whole = Math.floor(x.shape[1]! / size)
  return x.slice(1, 0, whole * size).reshape([whole, size, ...x.shape.slice(2)])
}

/** @internal Empty slots for pages of k, [pages, pageSize, hk, d], and v, which outlive the scope that they are made in. */
export function makeNearby<D extends FloatDType>(
  slots: number,
  k: Tensor<D>,
  v?: Tensor<D>,
): Nearby<D> {
  const { device } = k
  const like = (x: Tensor<D>) => empty([slots, ...x.shape.slice(1)], { dtype: x.dtype, device })
  const none = (shape: number[]) => full(shape, -1, { dtype: 'int32', device })
  const near = {
    k: like(k),
    v: v && like(v),
    places: none([k.shape[0]!]),
    slots: none([slots, 2]),
    counts: zeros([4], { dtype: 'int64', device }),
  }
  for (const tensor of Object.values(near)) if (tensor) untrack(tensor)
  return near
}

/** @internal Room for `pages` pages, as sequences grow. */
export function growNearby(near: Nearby, pages: number): void {
  const { places } = near
  if (pages <= places.size) return
  const more = full([2 * pages], -1, { dtype: 'int32', device: places.device })
  using old = more.slice(0, 0, places.size)
  old.copyFrom(places)
  near.places = untrack(more)
  places.dispose()
}

/** @internal The slots of wanted pages, which are fetched where they are not there; `ops/fetch.h` says how. */
export function fetchPages<D extends FloatDType>(
  near: Nearby<D>,
  k: Tensor<D>,
  v: Tensor<D> | undefined,
  pages: { wanted: Tensor<'int32'>; length: Tensor<'int32'>; patience?: number },
): Tensor<'int32'> {
  growNearby(near, k.shape[0]!)
  const { k: nearK, v: nearV, places, slots, counts } = near
  const [found] = run('fetch', { k, v, nearK, nearV, places, slots, counts, ...pages })
  return found as Tensor<'int32'>
}

/** @internal */
export async function countsOf(near: Nearby | undefined): Promise<CacheCounts> {
  const [found = 0n, missed = 0n] = near ? await near.counts.read() : []
  return { found: Number(found), missed: Number(missed) }
}

/** @internal */
export function disposeNearby({ k, v, places, slots, counts }: Nearby): void {
  for (const tensor of [k, v, places, slots, counts]) tensor?.dispose()
}
