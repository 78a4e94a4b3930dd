import { mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import { makeMask } from '../mask.js'
import { run } from '../native.js'
import { type AttentionResult, attention } from '../ops/attention.js'
import { embed } from '../ops/embed.js'
import type { HipLists, HipRope, HipSettings } from '../ops/hip.js'
import { rope } from '../ops/rope.js'
import { scope } from '../scope.js'
import { empty, type Tensor } from '../tensor.js'

/** @internal q or k as the tables turn them, from a position on. */
export function turn<D extends FloatDType>(x: Tensor<D>, { cos, sin }: HipRope, offset: number) {
  return rope(x, { cos, sin, offset })
}

const attendedAt = ['own', 'streaming', 'infllm', 'self_extend', 'dynamic_extend'] as const

/** @internal Where attention takes listed keys to stand, unless that is where they do. */
export function substitutes(op: string, rope: HipRope | undefined, settings: HipSettings) {
  const { attended = 'streaming' } = rope ?? {}
  if (!attendedAt.includes(attended))
    throw mustBe(op, 'rope.attended', `one of ${attendedAt.join(', ')}`, attended)
  if (!rope || attended === 'own') return undefined
  if (settings.headMode !== 'all' || settings.window < settings.block[1])
    throw refuse(
      'ERR_UNSUPPORTED',
      op,
      'rope',
      'rope with keys attended elsewhere than they stand takes one list for all heads and a window of at least a block',
    )
  return { ...rope, attended }
}

/** @internal Listed keys of one sequence, for {@link attendListed}. */
export interface ListedKeys<D extends FloatDType> {
  /** [pages, block, hk, d], not turned. */
  k: Tensor<D>
  v: Tensor<D>
  lists: HipLists
  /** Which pages the list names, if they do not stand in the order of the keys. */
  table?: Tensor<'int32'> | undefined
  /** Keys of the sequence, and back from a query those that are not among the listed. */
  sk: number
  window: number
}

// Bytes of gathered keys and values at a time
const mostBytes = 2 ** 28

/**
 * @internal Attention of turned queries, [1, sq, hq, d], over the sink tokens and lists alone, whose keys are gathered and
 * turned for every block of queries.
 */
export function attendListed<D extends FloatDType>(
  q: Tensor<D>,
  { k, v, lists, table, sk, window }: ListedKeys<D>,
  { attended, context, cos, sin }: HipRope,
  { block, sinkTokens }: HipSettings,
  factors: { scale?: number | undefined; softCap?: number | undefined },
): AttentionResult<D> {
  const [, sq = 0, hq = 0] = q.shape
  const [, , rows = 0, width = 0] = lists.index.shape
  const [, , hk = 0, d = 0] = k.shape
  const dv = v.shape[3]!
  const [bq, bk] = block
  const { device, dtype } = q
  return scope(() => {
    const int32 = (...shape: number[]) => empty(shape, { dtype: 'int32', device })
    const pages = sinkTokens / bk + width
    const slots = pages * bk
    const found = {
      ...{ table: int32(1, 1, rows, pages), places: int32(1, 1, rows, slots) },
      bounds: int32(1, 1, rows, bq, 2),
    }
    run('hip.places', {
      ...{ ...lists, ...found, positions: attended, context },
      ...{ blockQ: bq, blockK: bk, window, sinkTokens, sq, sk },
    })
    const ids = (table ?? found.table).reshape([rows, pages])
    const out = empty([1, sq, hq, dv], { dtype, device })
    const lse = empty([1, hq, sq], { device })
    const perBlock = (slots * hk * (d + dv) * k.nbytes) / k.size
    const most = Math.max(1, Math.floor(mostBytes / perBlock))
    const whole = Math.floor(sq / bq)
    for (let first = 0, n = 0; first < rows; first += n) {
      // The last block may have fewer queries
      n = first < whole ? Math.min(most, whole - first) : 1
      const queries = first < whole ? bq : sq - whole * bq
      const [from, to] = [first * bq, first * bq + n * queries]
      scope(() => {
        const of = <T extends Tensor>(x: T) =>
          x
            .select(0, 0)
            .select(0, 0)
            .slice(0, first, first + n)
        const gather = (x: Tensor<D>) => {
          const table = x.contiguous().reshape([x.shape[0]!, x.size / x.shape[0]!])
          return embed(ids.slice(0, first, first + n), table).reshape([n, slots, hk, x.shape[3]!])
        }
        const keys = rope(gather(k), { cos, sin, positions: of(found.places) as Tensor<'int32'> })
        const bounds = of(found.bounds).slice(1, 0, queries).contiguous() as Tensor<'int32'>
        const mask = makeMask({
          ...{ sequences: n, heads: 1, sq: queries, sk: slots, block: [bq, bk], causal: false },
          ...{ window: 0, sinkTokens: slots, bounds, blocks: undefined, columns: undefined },
          ...{ diagonals: undefined, cuSeqlensQ: undefined, cuSeqlensK: undefined },
        })
        const own = q.slice(1, from, to).reshape([n, queries, hq, d])
        const part = attention(own, keys, gather(v), { ...factors, mask })
        out.slice(1, from, to).copyFrom(part.out.reshape([1, n * queries, hq, dv]))
        const sums = part.lse
          .transpose(0, 1)
          .contiguous()
          .reshape([1, hq, n * queries])
        lse.slice(2, from, to).copyFrom(sums)
      })
    }
    return { out, lse }
  })
}
