import { checkOptions } from '../check.js'
import { Mask } from '../mask.js'
import { checkTensor, type Tensor } from '../tensor.js'
import { lengthsOf, type PackedOptions, packedMask, under } from './packed.js'

/**
 * What StreamingLLM sees: the first keys of the sequence and the last ones of every row. It looks at no numbers, and costs
 * nothing.
 *
 * @param q [b, sq, hq, d] and
 * @param k [b, sk, hk, d], for their lengths.
 * @param options `sinkTokens` first keys (64 if left out) and `window` last ones (1024 if left out).
 * @throws HeddleError `ERR_SHAPE` or `ERR_ARGUMENT` at the call.
 * @example
 * import { attention, randn, streaming } from 'heddle'
 * const [q, k, v] = [randn([1, 512, 2, 64]), randn([1, 512, 2, 64]), randn([1, 512, 2, 64])]
 * const { out } = attention(q, k, v, { mask: streaming(q, k, { sinkTokens: 4, window: 128 }) })
 */
export function streaming(
  q: Tensor,
  k: Tensor,
  options: PackedOptions & { sinkTokens?: number | undefined; window?: number | undefined } = {},
): Mask {
  checkTensor('streaming', 'q', q)
  checkTensor('streaming', 'k', k)
  checkOptions('streaming', options, known)
  const { sinkTokens = 64, window = 1024, cuSeqlensQ, cuSeqlensK } = options
  const { sq, sk } =
    cuSeqlensQ === undefined && cuSeqlensK === undefined
      ? lengthsOf('streaming', q, k)
      : packedMask('streaming', q, k, [128, 128], options)
  return under('streaming', () =>
    Mask.fromWindow({ sinkTokens, window }, { sq, sk, cuSeqlensQ, cuSeqlensK }),
  )
}

const known: ReadonlySet<string> = new Set(['sinkTokens', 'window', 'cuSeqlensQ', 'cuSeqlensK'])
