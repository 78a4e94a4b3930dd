import { type Device, synchronize, type Tensor } from 'heddle'

/** Milliseconds of each of several rounds. */
export interface Timing {
  ms: number
  /** Half the distance of the quartiles, relative to the median. */
  spread: number
}

/** The median of some numbers, and how far apart they lie. */
export function summarise(rounds: readonly number[]): Timing {
  const sorted = [...rounds].sort((a, b) => a - b)
  const at = (share: number) =>
    sorted[Math.min(Math.floor(share * sorted.length), sorted.length - 1)]!
  const ms = at(0.5)
  return { ms, spread: (at(0.75) - at(0.25)) / 2 / ms }
}

/**
 * Times one round of a function that enqueues work: as often as fits the budget, one wait at the end. Memory is handed back
 * between calls as a program would, so allocation is part of it.
 */
export async function timeRound(
  run: () => Tensor[],
  device: Device,
  times: number,
): Promise<number> {
  await synchronize(device)
  const started = performance.now()
  for (let i = 0; i < times; i++) for (const made of run()) made.dispose()
  await synchronize(device)
  return (performance.now() - started) / times
}

/** How often to repeat a run so that a round takes about `budget` milliseconds. */
export async function repeatsFor(
  run: () => Tensor[],
  device: Device,
  budget: number,
): Promise<number> {
  const once = await timeRound(run, device, 1)
  return Math.max(1, Math.min(Math.round(budget / Math.max(once, 0.001)), 2000))
}
