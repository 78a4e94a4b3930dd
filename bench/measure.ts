import { type Device, elapsed, type Tensor, zeros } from 'heddle'

/** Milliseconds of each of several rounds. */
export interface Timing {
  ms: number
  /** Half the distance of the quartiles, relative to the median. */
  spread: number
}

/** The median of some numbers, and how far apart they lie. */
export function summarise(rounds: readonly number[]): Timing {
  const sorted = [...rounds].sort((a, b) => a - b)
  // between two where a share falls between them
  const at = (share: number) => {
    const place = share * (sorted.length - 1)
    const below = sorted[Math.floor(place)]!
    return below + (sorted[Math.ceil(place)]! - below) * (place % 1)
  }
  const ms = at(0.5)
  return { ms, spread: (at(0.75) - at(0.25)) / 2 / ms }
}

function enqueue(run: () => Tensor[], times: number): void {
  for (let i = 0; i < times; i++) for (const made of run()) made.dispose()
}

/**
 * Times one round of a function that enqueues work: several times over between two points of the device's queue. Memory is
 * handed back between calls as a program would, so allocation is part of it.
 */
export async function timeRound(
  run: () => Tensor[],
  device: Device,
  times: number,
): Promise<number> {
  return (await elapsed(() => enqueue(run, times), device)) / times
}

/** What one run takes, and how often to repeat it so that a round takes about `budget` milliseconds. */
export async function repeatsFor(
  run: () => Tensor[],
  device: Device,
  budget: number,
): Promise<{ times: number; once: number }> {
  await timeRound(run, device, 1) // the first call makes what later ones find
  const once = await timeRound(run, device, 1)
  const times = Math.max(1, Math.min(Math.round(budget / Math.max(once, 0.001)), 2000))
  return { times, once }
}

/**
 * Times single runs, each after a copy that pushes everything else out of the caches. The device is still busy with that
 * copy while the run is enqueued, so what enqueueing takes does not count here.
 */
export async function timeCold(
  run: () => Tensor[],
  device: Device,
  times: number,
): Promise<number[]> {
  const bytes = device === 'cpu' ? 2 ** 27 : 2 ** 29
  const [from, to] = [zeros([bytes / 4], { device }), zeros([bytes / 4], { device })]
  const samples: number[] = []
  for (let i = 0; i < times; i++) {
    to.copyFrom(from)
    samples.push(await elapsed(() => enqueue(run, 1), device))
  }
  from.dispose()
  to.dispose()
  return samples
}
