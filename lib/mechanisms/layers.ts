import { checkOptions, mustBe } from '../check.js'
import { refuse } from '../errors.js'
import { checkPlace } from '../ops/arguments.js'
import { checkTensor, type Tensor } from '../tensor.js'

/**
 * @internal What every layer asks of its input, `[b, s, model]`, of its weights, by name, of which the first has as many rows
 * as `parts` times all heads together are wide, and of its options.
 */
export function checkLayer(
  op: string,
  x: unknown,
  weights: unknown,
  options: unknown,
  { known, names, parts }: { known: ReadonlySet<string>; names: readonly string[]; parts: number },
): void {
  checkTensor(op, 'x', x)
  if (x.rank !== 3)
    throw refuse('ERR_SHAPE', op, 'x', `x must be [b, s, model], got [${x.shape.join(', ')}]`)
  if (weights === null || typeof weights !== 'object')
    throw mustBe(op, 'weights', 'an object of tensors', weights)
  for (const name of names)
    checkTensor(op, `weights.${name}`, (weights as Record<string, unknown>)[name])
  if (options === undefined) throw mustBe(op, 'options', 'an object', options)
  checkOptions(op, options, known)
  const { heads, layer, layers } = options as { heads: number; layer: number; layers: number }
  checkPlace(op, heads, layer, layers)
  const { shape } = (weights as Record<string, Tensor>)[names[0]!]!
  if (shape.length !== 2 || shape[0]! % (parts * heads) !== 0) {
    const argument = `weights.${names[0]}`
    const text = `${argument} must be [${parts} h d, model] of ${heads} heads, got [${shape.join(', ')}]`
    throw refuse('ERR_SHAPE', op, argument, text)
  }
}
