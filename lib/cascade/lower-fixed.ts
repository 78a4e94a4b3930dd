import { mustBe } from '../check.js'
import { softplusAttention } from '../mechanisms/softplus.js'
import { attentionBackward } from '../ops/attention.js'
import { add, mul, sigmoid, silu } from '../ops/elementwise.js'
import { embed } from '../ops/embed.js'
import { glu } from '../ops/glu.js'
import { lightningBackward } from '../ops/lightning.js'
import { linear } from '../ops/linear.js'
import { merge } from '../ops/merge.js'
import { norm } from '../ops/norm.js'
import { rope } from '../ops/rope.js'
import type { Tensor } from '../tensor.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, tensorsOf } from './ir.js'
import { definitions } from './library.js'
import { Normal, name, startOver } from './normal.js'
import { parse } from './parse.js'
import { print } from './print.js'
import {
  batched,
  type F32,
  type Layouts,
  type Lowered,
  Mismatch,
  numberOf,
  spanOf,
} from './slots.js'
import { validate } from './validate.js'

// Operators without slots take exactly their own text, whatever its names

interface Fixed {
  operator: string
  text: string
  /** Inputs of the text that a call gives as [b, s, h, d], of which the text may have h or b and h in front of all axes. */
  packed?: readonly number[]
  /** The scalar that is the distance of the last row from the last key. */
  distance?: number
  run(inputs: readonly F32[], numbers: readonly number[]): readonly Tensor[]
}

// Backward of one decay for all heads, or one for each
const lightningBack = (slopes: (given: readonly F32[], number: number | undefined) => unknown) => ({
  operator: 'lightning.backward',
  packed: [0, 1, 2, 3],
  run: (inputs: readonly F32[], [scale, slope]: readonly number[]) => {
    const [q, k, dout, v] = inputs as [F32, F32, F32, F32]
    const options = { scale, slopes: slopes(inputs, slope) as F32 | number[] }
    const { dq, dk, dv } = lightningBackward(q, k, v, dout, options)
    return [dq, dk, dv]
  },
})

// Without a tensor of weights, which has heads only where the slope has
const decayed = (slope: string) =>
  definitions['lightning.backward']
    .replace(/\n *W\[.*/, '')
    .replaceAll('W[t,u]', `exp(-${slope} * (t - u))`)

const fixed: readonly Fixed[] = [
  {
    operator: 'merge',
    text: definitions.merge,
    run: ([lseA, lseB, outA, outB]) => {
      const { out, lse } = merge([
        { out: outA!, lse: lseA! },
        { out: outB!, lse: lseB! },
      ])
      return [out, lse]
    },
  },
  {
    operator: 'softplusAttention',
    text: definitions.softplus,
    packed: [0, 1, 2],
    distance: 1,
    run: ([q, k, v], [logD, , power]) => {
      const { out, lse } = softplusAttention(q!, k!, v!, { logD, power })
      lse.dispose()
      return [out]
    },
  },
  {
    operator: 'attention.backward',
    text: definitions['attention.backward'],
    packed: [0, 1, 3, 4, 5],
    distance: 1,
    run: (inputs, [scale]) => {
      const [q, k, lse, dout, v, out] = inputs as [F32, F32, F32, F32, F32, F32]
      const rows = lse.rank < 3 ? lse.reshape([...[1, 1].slice(lse.rank - 1), ...lse.shape]) : lse
      const options = { scale, causal: true }
      const { dq, dk, dv } = attentionBackward(q, k, v, out, rows, dout, options)
      return [dq, dk, dv]
    },
  },
  {
    ...lightningBack(([q, , , v], slope) =>
      new Array<number>(Math.max(q!.shape[2]!, v!.shape[2]!)).fill(slope!),
    ),
    text: decayed('slope'),
  },
  {
    ...lightningBack((given) => given[4]),
    text: decayed('slope[]'),
  },
  {
    operator: 'linear',
    text: definitions.linear,
    run: ([x, weight, bias]) => [linear(x!, weight!, { bias })],
  },
  {
    operator: 'linear',
    text: 'Y[n,o] = sum(i) X[n,i] * W[o,i]',
    run: ([x, weight]) => [linear(x!, weight!)],
  },
  {
    operator: 'norm',
    text: definitions.norm,
    run: ([x, weight], [eps]) => [norm(x!, weight, { eps })],
  },
  {
    operator: 'norm',
    text: definitions.norm.replace(' * W[d]', ''),
    run: ([x], [eps]) => [norm(x!, undefined, { eps })],
  },
  {
    operator: 'rope',
    text: definitions.rope,
    run: ([x], [theta]) => {
      const [rows, pair, c] = x!.shape as [number, number, number]
      if (x!.rank !== 3 || pair !== 2)
        throw mustBe('cascade', 'rope', 'a tensor of [p, 2, c]', `[${x!.shape.join(', ')}]`)
      const turned = rope(x!.contiguous().reshape([1, rows, 1, 2 * c]), { theta })
      return [0, c].map((from) =>
        turned
          .slice(3, from, from + c)
          .contiguous()
          .reshape([rows, c]),
      )
    },
  },
  {
    operator: 'embed',
    text: definitions.embed,
    run: ([ids, table]) => [embed(ids as unknown as Tensor<'int32'>, table!)],
  },
  { operator: 'glu', text: definitions.glu, run: ([gate, up]) => [glu(gate!, up!)] },
  { operator: 'add', text: definitions.add, run: ([x, y]) => [add(x!, y!)] },
  { operator: 'mul', text: definitions.mul, run: ([x, y]) => [mul(x!, y!)] },
  { operator: 'silu', text: definitions.silu, run: ([x]) => [silu(x!)] },
  { operator: 'sigmoid', text: definitions.sigmoid, run: ([x]) => [sigmoid(x!)] },
]

// The outputs by their axes and forms, with names in the order of the text, but for those of tensors
function signature(ir: CascadeIR, inputs = ir.inputs): string {
  const names = new Map<string, string>()
  ir.variables.forEach((v, i) => {
    names.set(v, `v${i}`)
    names.set(rankOf(v), `V${i}`)
  })
  const tensors = new Map([...tensorsOf(ir)].map((tensor, i) => [tensor, `X${i}`]))
  inputs.forEach((tensor, i) => {
    tensors.set(tensor, `T${i}`)
  })
  ir.scalars.forEach((scalar, i) => {
    names.set(scalar, `s${i}`)
  })
  const text = print(ir).replace(/[A-Za-z_]\w*(\[?)/g, (whole, bracket: string) => {
    const word = bracket ? whole.slice(0, -1) : whole
    return `${(bracket ? tensors : names).get(word) ?? word}${bracket}`
  })
  const other = validate(parse(text))
  startOver()
  const { forms } = new Normal(other)
  const said = other.outputs.map((tensor) => {
    const { form, left } = forms.get(tensor)!
    return `[${left}] ${form.key}`
  })
  return said.join('\n')
}

// All orders of some names
function* orders(names: readonly string[]): Generator<readonly string[]> {
  if (names.length === 0) yield []
  for (const one of names)
    for (const rest of orders(names.filter((other) => other !== one))) yield [one, ...rest]
}

const mostInputs = 4
const longestText = 1000

interface Own extends Fixed {
  ir: CascadeIR
  /** How many axes stand in front of [s, d] in tensors that are packed. */
  rows: number
}

// Texts with n for up to four axes, or with heads and batches in front of all
function textsOf(one: Fixed): Own[] {
  const rows = one.packed ? ['', 'h', 'b,h'] : ['n', 'a,n', 'a,b,n', 'a,b,c,n']
  return rows.flatMap((axes, i) => {
    // a number for each head wants heads
    if (axes === '' && one.text.includes('[]')) return []
    const text = one.packed
      ? one.text.replaceAll(/\[(?=\w)/g, (axes && `[${axes},`) || '[').replaceAll('[]', '[h]')
      : one.text.replaceAll('[n', `[${axes}`)
    return [{ ...one, ir: validate(parse(text)), rows: i }]
  })
}

const countsOf = ({ inputs, outputs, scalars, variables }: CascadeIR) =>
  [inputs, outputs, scalars, variables].map(({ length }) => length).join()

const texts = new Map<string, Own[]>()
const signatures = new Map<string, Map<string, Own>>()

// Those that a text may be, by what they compute
function alike(ir: CascadeIR): Map<string, Own> {
  if (texts.size === 0)
    for (const one of fixed.flatMap(textsOf)) {
      const counts = countsOf(one.ir)
      texts.set(counts, [...(texts.get(counts) ?? []), one])
    }
  const counts = countsOf(ir)
  const before = signatures.get(counts)
  if (before) return before
  const own = new Map((texts.get(counts) ?? []).map((one) => [signature(one.ir), one]))
  signatures.set(counts, own)
  return own
}

/** @internal */
export function fixedOf(_: Normal, ir: CascadeIR): Lowered {
  const known = alike(ir)
  // a text may read what it multiplies in any order
  const few = ir.inputs.length <= mostInputs && print(ir).length <= longestText
  let found: Own | undefined
  let inputs = ir.inputs
  for (inputs of known.size === 0 ? [] : few ? orders(ir.inputs) : [ir.inputs]) {
    found = known.get(signature(ir, inputs))
    if (found) break
  }
  if (!found) throw new Mismatch(ir.outputs[0]!, 'it is no text of an operator without slots', -1)
  const { operator, run, packed = [], distance, rows } = found
  const four = (axes: readonly string[]) => [
    rows > 1 ? axes[0]! : '',
    axes[rows]!,
    rows > 0 ? axes[rows - 1]! : '',
    axes[rows + 1]!,
  ]
  const layouts: Layouts = new Map(packed.map((at) => [inputs[at]!, four]))
  const [result] = ir.outputs as [string]
  return {
    operator,
    slots: {},
    ...(packed.length > 0 && { layouts }),
    run(call) {
      const given = inputs.map((tensor) =>
        layouts.has(tensor) ? batched(call, tensor) : call.tensors[tensor]!,
      ) as F32[]
      const { scalars } = call
      const numbers = ir.scalars.map((scalar, i) => {
        if (i !== distance) return numberOf(name(scalar), scalars)
        const ends = given[1]!.shape[1]! - given[0]!.shape[1]!
        const value = scalars[scalar] ?? ends
        if (value === ends) return value
        const text = `${operator} ends its last row at the last key, ${ends} from its index here, but ${scalar} is ${value}`
        throw broken('CAS022', text, spanOf(ir, result), result)
      })
      const results = run(given, numbers)
      return Object.fromEntries(ir.outputs.map((tensor, i) => [tensor, results[i]!]))
    },
  }
}
