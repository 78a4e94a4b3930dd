import { checkInteger, mustBe, numbers, offsetNumbers, show } from '../check.js'
import type { Device } from '../device.js'
import { refuse } from '../errors.js'
import { checkMask, type Mask, withoutCache } from '../mask.js'
import { Tensor, tensor } from '../tensor.js'

// Small arguments may be given as plain arrays. They become tensors beside the others and are put on `made`, which the
// caller disposes of after the call. What a tensor holds is checked on its device instead.

const either = 'a tensor or an array of numbers'

function place<D extends 'float32' | 'int32'>(
  values: readonly number[],
  dtype: D,
  device: Device,
  made: Tensor[],
): Tensor<D> {
  const placed = tensor(values, [values.length], { dtype, device })
  made.push(placed)
  return placed
}

// Scores are also counted in base 2; there what is far below all others may be -inf
const mostInBase2 = (2 - 2 ** -23) * 2 ** 127 * Math.LN2

/** @internal A finite number that float32 can count with. */
export function checkFloat32(op: string, argument: string, number: number): number {
  if (number > mostInBase2 || !Number.isFinite(Math.fround(number))) {
    const text = `${argument} must not overflow float32 arithmetic, got ${number}`
    throw refuse('ERR_ARGUMENT', op, argument, text)
  }
  return number
}

/** @internal A float32 vector, one number per head, none below `least`. */
export function vector(
  op: string,
  argument: string,
  value: unknown,
  device: Device,
  made: Tensor[],
  least = Number.NEGATIVE_INFINITY,
): Tensor | undefined {
  if (value === undefined || value instanceof Tensor) return value
  const rule = `a finite number${least > Number.NEGATIVE_INFINITY ? ` from ${least} on` : ''}`
  const check = (number: unknown, i: number) => {
    if (typeof number !== 'number' || !Number.isFinite(number) || number < least) {
      throw mustBe(op, `${argument}[${i}]`, rule, number)
    }
    return checkFloat32(op, `${argument}[${i}]`, number)
  }
  const values = numbers(op, argument, value, check, either)
  return place(values, 'float32', device, made)
}

/** @internal An int32 vector of counts up to `most`. */
export function lengths(
  op: string,
  argument: string,
  value: unknown,
  device: Device,
  made: Tensor[],
  most = 2 ** 31 - 1,
): Tensor<'int32'> | undefined {
  if (value === undefined || value instanceof Tensor) return value as Tensor<'int32'> | undefined
  const check = (number: unknown, i: number) =>
    checkInteger(op, `${argument}[${i}]`, number, 0, most)
  const values = numbers(op, argument, value, check, either)
  return place(values, 'int32', device, made)
}

/** @internal Ascending int32 offsets that start at 0 and end at `total`. */
export function offsets(
  op: string,
  argument: string,
  value: unknown,
  total: number | undefined,
  device: Device,
  made: Tensor[],
): Tensor | undefined {
  if (value === undefined || value instanceof Tensor) return value
  return place(offsetNumbers(op, argument, value, total, either), 'int32', device, made)
}

interface MaskedCall {
  causal?: boolean | undefined
  blockTable?: Tensor | undefined
  cacheSeqlens?: unknown
  cuSeqlensQ?: unknown
  cuSeqlensK?: unknown
}

/** @internal A mask as operators take it, whose q and k it must be about. */
export function maskArguments(
  op: string,
  mask: Mask,
  q: Tensor,
  k: Tensor,
  { causal, blockTable, cacheSeqlens, ...packed }: MaskedCall,
  made: Tensor[],
): Record<string, unknown> {
  checkMask(op, mask)
  if ((mask.cuSeqlensQ || packed.cuSeqlensQ) && blockTable !== undefined) {
    const text = 'mask must not be of packed sequences with blockTable, got one that is'
    throw refuse('ERR_ARGUMENT', op, 'mask', text)
  }
  const pages = blockTable instanceof Tensor ? (blockTable.shape[1] ?? 1) : 1
  const [sq, sk] = [q.shape[1], (k.shape[1] ?? 0) * pages]
  if (mask.sq !== sq || mask.sk !== sk) {
    const text = `mask must be of sq = ${sq} and sk = ${sk}, got one of ${mask.sq} and ${mask.sk}`
    throw refuse('ERR_SHAPE', op, 'mask', text)
  }
  const { device } = mask.blocks ?? mask.columns ?? mask.diagonals ?? mask.bounds ?? q
  if (device !== q.device) {
    const text = `mask is on ${device}, but q is on ${q.device}; make it with device: '${q.device}'`
    throw refuse('ERR_DEVICE', op, 'mask', text)
  }
  if (causal !== undefined && causal !== mask.causal) {
    throw refuse(
      'ERR_ARGUMENT',
      op,
      'causal',
      `causal must be as the mask has it, ${mask.causal}, got ${show(causal)}`,
    )
  }
  for (const name of ['cuSeqlensQ', 'cuSeqlensK'] as const) {
    const [given, own] = [packed[name], mask[name]]
    if (given === undefined) continue
    if (!own) {
      const text = `mask must be made with ${name}, which then comes with it, got one without`
      throw refuse('ERR_ARGUMENT', op, 'mask', text)
    }
    // What a tensor holds is on its device; the mask's own are taken
    if (given instanceof Tensor) continue
    const values = numbers(op, name, given, (value) => value as number, either)
    const at = own.findIndex((offset, i) => offset !== values[i])
    if (at >= 0 || values.length !== own.length) {
      const text = `${name} must be as the mask has it, ${own.length} offsets`
      const where =
        at < 0 ? `${values.length}` : `${show(values[at])} instead of ${own[at]} at index ${at}`
      throw refuse('ERR_ARGUMENT', op, name, `${text}, got ${where}; leave it out`)
    }
  }
  if (mask.bounds && !mask.cacheSeqlens && cacheSeqlens !== undefined)
    throw refuse('ERR_ARGUMENT', op, 'mask', withoutCache('mask'))
  const own = mask.cuSeqlensQ ? 1 : mask.sequences
  const [b = 0] = q.shape
  const held = [mask.blocks, mask.columns, mask.diagonals, mask.bounds]
  const apart = own !== b && held.some((one) => one !== undefined)
  if (apart && own !== 1) {
    const text = `mask must be of 1 sequence or of b = ${b}, got one of ${own}`
    throw refuse('ERR_SHAPE', op, 'mask', text)
  }
  // one sequence's holds for all
  const all = (one: Tensor | undefined): Tensor | undefined => {
    if (!apart || one === undefined || mask.cuSeqlensQ) return one
    const wide = one.expand([b, ...one.shape.slice(1)])
    const copy = wide.contiguous()
    made.push(wide, copy)
    return copy
  }
  return {
    masked: true,
    causal: mask.causal,
    ...(mask.cuSeqlensQ && { cuSeqlensQ: mask.cuSeqlensQ, cuSeqlensK: mask.cuSeqlensK }),
    cacheSeqlens: cacheSeqlens === undefined ? all(mask.cacheSeqlens) : cacheSeqlens,
    maskBlocks: all(mask.blocks),
    maskIndex: all(mask.lists?.index),
    maskCount: all(mask.lists?.count),
    recentK: mask.lists?.recent?.k,
    recentV: mask.lists?.recent?.v,
    recentFrom: mask.lists?.recent?.from,
    maskColumns: all(mask.columns),
    maskDiagonals: all(mask.diagonals),
    maskBounds: all(mask.bounds),
    maskBlockQ: mask.block[0],
    maskBlockK: mask.block[1],
    maskWindow: mask.window,
    maskSinkTokens: mask.sinkTokens,
  }
}

/** @internal */
export const mostHeads = 65536

/** @internal A count of heads. */
export function checkHeads(op: string, heads: number): void {
  checkInteger(op, 'heads', heads, 1, mostHeads)
}

/** @internal Where a layer with so many heads stands among those of its model. */
export function checkPlace(op: string, heads: number, layer: number, layers: number): void {
  checkHeads(op, heads)
  checkInteger(op, 'layers', layers, 1)
  checkInteger(op, 'layer', layer, 0, layers - 1)
}
