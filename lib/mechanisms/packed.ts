import type { FloatDType } from '../dtype.js'
import { named, refuse } from '../errors.js'
import { blockTable, firstBlockRow, Mask, makeMask } from '../mask.js'
import { scope } from '../scope.js'
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

/** @internal Refuses tensors that are not [b, s, h, d]. */
export function checkRanks(op: string, tensors: Readonly<Record<string, Tensor>>): void {
  for (const [name, { rank, shape }] of Object.entries(tensors))
    if (rank !== 4)
      throw refuse('ERR_SHAPE', op, name, `${name} must be [b, s, h, d], got [${shape.join(', ')}]`)
}

// What operators compare too, but not every selection runs one
function checkPair(op: string, q: Tensor, k: Tensor): void {
  for (const [at, name] of [
    [0, 'b'],
    [3, 'd'],
  ] as const)
    if (k.shape[at] !== q.shape[at]) {
      const why = `${name} is ${k.shape[at]}, but q has ${name} = ${q.shape[at]}`
      const text = `k must be [b, sk, hk, d], got [${k.shape.join(', ')}] (${why})`
      throw refuse('ERR_SHAPE', op, 'k', text)
    }
  if (k.dtype !== q.dtype)
    throw refuse('ERR_DTYPE', op, 'k', `k must be ${q.dtype}, got ${k.dtype} (q is ${q.dtype})`)
  if (k.device !== q.device) {
    const text = `k is on ${k.device}, but q is on ${q.device}; move it with k.to('${q.device}')`
    throw refuse('ERR_DEVICE', op, 'k', text)
  }
  const [hq, hk] = [q.shape[2]!, k.shape[2]!]
  if (hk > 0 ? hq % hk !== 0 : hq > 0)
    throw refuse('ERR_SHAPE', op, 'k', `hq must be a multiple of hk, got ${hq} and ${hk}`)
}

/** @internal Refuses, whatever is selected, what no selection could look at. */
export function checkLooks(op: string, { dtype, shape }: Tensor): void {
  if (!floats.has(dtype))
    throw refuse('ERR_DTYPE', op, 'q', `q must be float32, float16 or bfloat16, got ${dtype}`)
  const d = shape[3]!
  if (d < 1 || d > 256)
    throw refuse(
      'ERR_SHAPE',
      op,
      'q',
      `q must be [b, sq, hq, d] with d from 1 to 256, got d = ${d}`,
    )
}

const floats: ReadonlySet<string> = new Set<FloatDType>(['float32', 'float16', 'bfloat16'])

/** @internal Lengths of the call, which a selector refuses where queries outnumber keys. */
export function lengthsOf(op: string, q: Tensor, k: Tensor): { sq: number; sk: number } {
  checkRanks(op, { q, k })
  checkPair(op, q, k)
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
  checkRanks(op, { q, k })
  const [[b = 0, sq = 0], [, sk = 0]] = [q.shape, k.shape]
  if (b !== 1) throw refuse('ERR_SHAPE', op, 'cuSeqlensQ', `b must be 1 with cuSeqlensQ, got ${b}`)
  checkPair(op, q, k)
  const mask = under(op, () => Mask.fromWindow({}, { sq, sk, block, cuSeqlensQ, cuSeqlensK }))
  for (let i = 0; i < mask.sequences; i++) {
    const [queries, keys] = [mask.cuSeqlensQ!, mask.cuSeqlensK!].map((x) => x[i + 1]! - x[i]!)
    checkLengths(op, queries!, keys!)
  }
  return mask
}

/**
 * @internal Runs a selector on packed sequences, on neighbours of the same lengths at once, and packs what it lists: blocks, or
 * single keys and distances.
 */
export function perSequence<D extends FloatDType>(
  op: string,
  q: Tensor<D>,
  k: Tensor<D>,
  block: readonly [number, number],
  packed: PackedOptions,
  select: (q: Tensor<D>, k: Tensor<D>) => Mask,
): Mask {
  checkRanks(op, { q, k })
  checkLooks(op, q)
  const { cuSeqlensQ: ofQ, cuSeqlensK: ofK } = packed
  if (ofQ === undefined && ofK === undefined) {
    lengthsOf(op, q, k)
    return under(op, () => select(q, k))
  }
  const parts = { ...packedMask(op, q, k, block, packed), heads: q.shape[2]! }
  const { heads, sequences, cuSeqlensQ, cuSeqlensK } = parts
  const { rows, columns } = blockTable(parts)
  const words = { blocks: Math.ceil(columns / 32), lines: Math.ceil(Math.max(parts.sk, 1) / 32) }
  const options = { dtype: 'int32', device: q.device } as const
  const lengths = Array.from({ length: sequences }, (_, i): [sq: number, sk: number] => [
    cuSeqlensQ![i + 1]! - cuSeqlensQ![i]!,
    cuSeqlensK![i + 1]! - cuSeqlensK![i]!,
  ])
  return scope(() => {
    const made: { [kind in 'blocks' | 'columns' | 'diagonals']?: Tensor<'int32'> } = {}
    for (let i = 0, next: number; i < sequences; i = next) {
      const [sq, sk] = lengths[i]!
      for (next = i + 1; next < sequences && `${lengths[next]}` === `${lengths[i]}`; ) next++
      if (sq === 0) continue
      const alike = (x: Tensor<D>, from: number, size: number) =>
        x.slice(1, from, from + (next - i) * size).reshape([next - i, size, ...x.shape.slice(2)])
      const own = [alike(q, cuSeqlensQ![i]!, sq), alike(k, cuSeqlensK![i]!, sk)] as const
      const mask = under(op, () => select(...own))
      // A short sequence without lists sees all of itself
      const all = mask.sinkTokens >= sk
      const listed = all ? full([1, 1, 1, words.blocks], -1, options) : mask.blocks
      if (listed) made.blocks ??= zeros([1, heads, rows, words.blocks], options)
      for (let j = i; listed && j < next; j++) {
        const first = firstBlockRow(cuSeqlensQ!, block[0], j)
        const place = made
          .blocks!.slice(2, first, first + Math.ceil(sq / block[0]))
          .slice(3, 0, listed.shape[3])
        const from = listed.shape[0] === 1 ? 0 : j - i
        place.copyFrom(listed.slice(0, from, from + 1).expand(place.shape))
      }
      for (const kind of ['columns', 'diagonals'] as const) {
        const given = mask[kind]
        if (!given) continue
        made[kind] ??= zeros([sequences, heads, words.lines], options)
        const place = made[kind].slice(0, i, next).slice(2, 0, given.shape[2])
        place.copyFrom(given.expand(place.shape))
      }
    }
    return makeMask({ ...parts, ...made })
  })
}
