import { type Device, type DType, type FloatDType, type Tensor, tensor } from 'heddle'

/** Numbers that differ from run to run; HEDDLE_TEST_SEED repeats a run. */
export const seed = Number(process.env.HEDDLE_TEST_SEED ?? Math.floor(Math.random() * 2 ** 31))
process.stdout.write(`HEDDLE_TEST_SEED=${seed}\n`)

export interface Random {
  /** From 0 to 1. */
  next(): number
  /** An integer below `n`. */
  below(n: number): number
  pick<T>(from: readonly T[]): T
  chance(p: number): boolean
  normal(): number
  normals(n: number, scale?: number): Float32Array<ArrayBuffer>
}

export function random(stream: number): Random {
  let state = (seed ^ Math.imul(stream + 1, 0x9e3779b1)) | 0
  const next = () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
  const normal = () => Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next())
  const below = (n: number) => Math.floor(next() * n)
  return {
    next,
    below,
    pick: (from) => from[below(from.length)]!,
    chance: (p) => next() < p,
    normal,
    normals: (n, scale = 1) => Float32Array.from({ length: n }, () => normal() * scale),
  }
}

/** Where sequences of these lengths begin, then the total. */
export function starts(lengths: readonly number[]): number[] {
  return lengths.reduce((list, length) => [...list, list.at(-1)! + length], [0])
}

/** A tensor of given numbers and those numbers as the dtype rounds them. */
export interface Sample<D extends DType = FloatDType> {
  tensor: Tensor<D>
  values: Float32Array
}

/**
 * Random numbers as a tensor, now and then as a view with gaps: of a larger tensor whose other elements are NaN, or with
 * two dimensions stored the other way round.
 */
export async function sample<D extends DType>(
  rng: Random,
  shape: readonly number[],
  dtype: D,
  device: Device,
  options: { scale?: number; strided?: boolean } = {},
): Promise<Sample<D>> {
  const count = shape.reduce((product, size) => product * size, 1)
  const data = rng.normals(count, options.scale)
  const made = place(rng, data, shape, dtype, device, options.strided ?? rng.chance(0.4))
  return { tensor: made, values: await made.read({ as: 'float32' }) }
}

function place<D extends DType>(
  rng: Random,
  data: Float32Array,
  shape: readonly number[],
  dtype: D,
  device: Device,
  strided: boolean,
): Tensor<D> {
  const dense = tensor(data, shape, { dtype, device })
  if (!strided || shape.length < 3) return dense
  if (rng.chance(0.5)) {
    // the middle dimensions stored the other way round
    return dense.transpose(1, 2).contiguous().transpose(1, 2)
  }
  const wide = shape.with(1, shape[1]! + 3).with(-1, shape.at(-1)! + 8)
  const gaps = wide.reduce((product, size) => product * size, 1)
  const host = tensor(new Float32Array(gaps).fill(Number.NaN), wide, { dtype, device })
  const inner = host.slice(1, 2, 2 + shape[1]!).slice(-1, 8)
  return inner.copyFrom(dense)
}
