import type { FloatDType } from '../dtype.js'
import { named, refuse } from '../errors.js'
import { blockTable, Mask, makeMask } from '../mask.js'
import { full, type Tensor, zeros } from '../tensor.js'

/** Packed sequences of a selector. */
export interface PackedOptions {
  /** Where each packed sequence of q begins, then the total; b must be 1. With `cuSeqlensK`. */
  cuSeqlensQ?: readonly number[] | undefined
  /** Where each packed sequence of k begins, then the total. */
  cuSeqlensK?: readonly number[] | undefined
}

/** @internal A mask that lists everything, without lists. */
export function everything(
  sq: number,
  sk: number,
  block: number | readonly [number, number],
): Mask {
  return Mask.fromWindow({ sinkTokens: sk }, { sq, sk, block })
}

function checkRanks(op: string, q: Tensor, k: Tensor): void {
  for (const [name, { rank, shape }] of Object.entries({ q, k }))
    if (rank !== 4)
      throw refuse('ERR_SHAPE', op, name, `${name} must be [b, s, h, d], got [${shape.join(', ')}]`)
}

/** @internal Lengths of the call, which a selector refuses where queries outnumber keys. */
export function lengthsOf(op: string, q: Tensor, k: Tensor): { sq: number; sk: number } {
  checkRanks(op, q, k)
  const [sq = 0, sk = 0] = [q.shape[1], k.shape[1]]
  checkLengths(op, sq, sk)
  return { sq, sk }
}

function checkLengths(op: string, sq: number, sk: number): void {
  if (sq > sk) throw refuse('ERR_SHAPE', op, 'q', `sq must be at most sk, got ${sq} and ${sk}`)
}

/** @internal What mechanisms are made of. */
export const ofMechanisms: readonly string[] = [
  ...['mask', 'probe', 'keep', 'flexprefill', 'hip'],
  ...['rope', 'attention', 'attention.backward'],
]

/** @internal What the operators of a mechanism refuse comes under its own name. */
export const under = <T>(op: string, call: () => T): T => named(op, call, ...ofMechanisms)

/** @internal Packed sequences of a selector, checked: a mask that lists nothing. */
export function packedMask(
  op: string,
  q: Tensor,
  k: Tensor,
  block: readonly [number, number],
  { cuSeqlensQ, cuSeqlensK }: PackedOptions,
): Mask {
  checkRanks(op, q, k)
  const [[b = 0, sq = 0], [, sk = 0]] = [q.shape, k.shape]
  if (b !== 1) throw refuse('ERR_SHAPE', op, 'cuSeqlensQ', `b must be 1 with cuSeqlensQ, got ${b}`)
  const mask = under(op, () => Mask.fromWindow({}, { sq, sk, block, cuSeqlensQ, cuSeqlensK }))
  for (let i = 0; i < mask.sequences; i++) {
    const [queries, keys] = [mask.cuSeqlensQ!, mask.cuSeqlensK!].map((x) => x[i + 1]! - x[i]!)
    checkLengths(op, queries!, keys!)
  }
  return mask
}

/** @internal Runs a selector that lists blocks on every packed sequence, and packs what it lists. */
export function perSequence<D extends FloatDType>(
  op: string,
  q: Tensor<D>,
  k: Tensor<D>,
  block: readonly [number, number],
  packed: PackedOptions,
  select: (q: Tensor<D>, k: Tensor<D>) => Mask,
  heads: number = q.shape[2] ?? 0,
): Mask {
  const { cuSeqlensQ: ofQ, cuSeqlensK: ofK } = packed
  if (ofQ === undefined && ofK === undefined) {
    lengthsOf(op, q, k)
    return under(op, () => select(q, k))
  }
  const whole = packedMask(op, q, k, block, packed)
  const { cuSeqlensQ, cuSeqlensK } = whole
  const parts = { ...whole, heads }
  const { rows, columns } = blockTable(parts)
  const options = { dtype: 'int32', device: q.device } as const
  const blocks = zeros([1, heads, rows, Math.ceil(columns / 32)], options)
  for (let i = 0; i < parts.sequences; i++) {
    const own = q.slice(1, cuSeqlensQ![i]!, cuSeqlensQ![i + 1])
    const keys = k.slice(1, cuSeqlensK![i]!, cuSeqlensK![i + 1])
    const queries = own.shape[1]!
    if (queries === 0) continue
    const mask = under(op, () => select(own, keys))
    const first = Math.floor(cuSeqlensQ![i]! / block[0]) + i
    const place = blocks.slice(2, first, first + Math.ceil(queries / block[0]))
    if (mask.blocks)
      place
        .slice(3, 0, mask.blocks.shape[3])
        .copyFrom(mask.blocks.expand([1, heads, ...mask.blocks.shape.slice(2)]))
    // A short sequence without lists sees all of itself
    else place.copyFrom(full([], -1, options).expand(place.shape))
    mask.dispose()
  }
  return makeMask({ ...parts, blocks })
}
