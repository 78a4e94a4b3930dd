import { lightning } from '../ops/lightning.js'
import { scope } from '../scope.js'
import { full } from '../tensor.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf } from './ir.js'
import {
  access,
  argument,
  atomForm,
  exponential,
  type Factor,
  type Form,
  formOf,
  isDifference,
  meets,
  type Normal,
  name,
  number,
  plus,
  power,
  rankIn,
  rebuilt,
  reduction,
  single,
  type Term,
  termOf,
  times,
} from './normal.js'
import { freshIn } from './side.js'
import { untoldRanks } from './sizes.js'
import {
  type Access,
  batched,
  cast,
  type F32,
  has,
  hasAxes,
  isNumber,
  isSum,
  isWhole,
  type Lowered,
  layoutsOf,
  Mismatch,
  numberOf,
  type Operand,
  onlyOne,
  operandOf,
  operandSide,
  type Reduce,
  repeated,
  sharedOf,
  shown,
  sideOf,
  sizesOf,
  spanOf,
  sweeps,
  tensorIn,
} from './slots.js'

/** @internal */
export function lightningOf(normal: Normal, ir: CascadeIR): Lowered {
  const [tensor, ...more] = ir.outputs as [string]
  let fit = 0
  const fail = (reason: string, code: 'CAS020' | 'CAS022' = 'CAS020') =>
    new Mismatch(tensor, reason, fit, code)
  if (more.length > 0) throw fail('lightning gives one result')
  const { form, left } = normal.forms.get(tensor)!
  const sumOf = (term: Term) => term.factors.find(isSum)?.atom as Reduce | undefined
  const main = form.terms.find((term) => sumOf(term)?.over.length === 2)
  if (!main || form.terms.length > 2) throw fail('it is no sum over keys and channels')
  const { over, body, where } = sumOf(main)!
  const [product, ...others] = body.terms
  if (others.length > 0) throw fail('it does not multiply q, k and v')
  const [limit] = where
  const [m, row] = (limit && 'form' in limit ? limit.form.terms : []).map(({ key }) => key)
  if (where.length !== 1 || m === undefined || row === undefined || !over.includes(m))
    throw fail('its rows do not end at their own index')
  if (limit!.key !== `${m} + -1 ${row} <= 0`) throw fail(`where ${limit!.key} is not causal`)
  const e = over.find((x) => x !== m)!
  fit++

  // Factors by the operand that has their variables; what keys alone have is their decay
  const parts = { q: number(1), k: number(1), v: number(1), decay: number(1) }
  const sort = (one: Form) => {
    const tensors = [...one.free].some((x) => x.endsWith('[]') && one.free.has(m))
    const part = has(one, [e]) ? (has(one, [m]) ? 'k' : 'q') : tensors ? 'v' : 'decay'
    parts[part] = times(parts[part], one)
  }
  // a decay of tokens is no feature: its two parts are far from 1 where their product is not
  const { differs } = normal
  const exponents = [...main.factors, ...(differs ? product!.factors : [])].flatMap(
    ({ atom }) => argument(atom)?.terms ?? [],
  )
  const opposed = (one: Term) =>
    has(formOf([one]), [m]) &&
    exponents.some((other) => {
      const ofRow = has(formOf([other]), [row]) && !has(formOf([other]), [m])
      return ofRow && (differs ? isDifference(one, other, m) : meets(one, m, other))
    })
  for (const { atom, power: exponent } of product!.factors) {
    const inner = argument(atom)
    // slope m, of a slope for each head, is no value
    const isDecay = (term: Term) => term.factors.some(({ atom }) => atom.key === m)
    if (!inner) sort(power(atomForm(atom), exponent))
    else
      for (const term of inner.terms) {
        const own = exponential(formOf([term]))
        if (isDecay(term)) parts.decay = times(parts.decay, own)
        else if (opposed(term)) throw fail(`it decays by token, as ${own.key}`)
        else sort(own)
      }
  }
  const columns = left.filter((x) => has(parts.v, [x]) && !has(parts.q, [x]) && !has(parts.k, [x]))
  const heads = left.filter((x) => x !== row && !columns.includes(x))
  const [column = ''] = columns
  const q = operandOf(parts.q, [row, e], normal)
  const k = operandOf(parts.k, [m, e], normal)
  const v = operandOf(parts.v, [m, column], normal)
  if (!q || !k || !v || columns.length !== 1) throw fail('it does not multiply q, k and v')
  const axes =
    hasAxes(q.main, [...heads, row, e]) &&
    hasAxes(k.main, [m, e], heads) &&
    hasAxes(v.main, [m, column], heads)
  if (heads.length > 2 || !axes || has(k.form, [row]) || has(v.form, [row]))
    throw fail('q, k and v are not read along their axes')
  fit += 2

  // The sum of the weights, which a column of ones in v gives, or that and a number
  const total = reduction('sum', over, times(body, power(v.form, -1)), where)
  const isTotal = ({ atom, power }: Factor) => power === 1 && atom.key === total.key
  const divisors = main.factors.filter(
    ({ atom, power }) => power === -1 && sweeps(atomForm(atom), rankIn(m)),
  )
  if (divisors.length > 1) throw fail('its divisor is not the sum of its weights')
  const [divisor] = divisors

  // exp(-slope t) in front, unless it is divided by, exp(slope m) inside
  const [factor] = parts.decay.terms[0]!.factors
  const inside = parts.decay.key === '1' ? number(0) : factor && argument(factor.atom)
  const slope = inside && times(inside, power(name(m), -1))
  const decay = slope && exponential(times(times(number(-1), slope), name(row)))
  const outside = formOf([
    termOf(
      main.coefficient * product!.coefficient,
      main.factors.filter((one) => !isSum(one) && one !== divisor),
    ),
  ])
  const plain = divisor !== undefined && isTotal({ ...divisor, power: 1 })
  const factors = decay && (plain ? outside : times(outside, power(decay, -1)))
  const [only, ...rests] = factors?.terms ?? []
  if (!slope || !only || rests.length > 0 || has(slope, [m, ...over]))
    throw fail('its weights are no decay by distance')
  const scales = only.factors.filter(({ atom }) => isNumber(atom, ir.variables))
  const common = formOf([termOf(only.coefficient, scales)])
  // what weights are divided by would have it too
  const scale = divisor ? number(1) : common
  const beside = single(only.factors.filter((one) => !scales.includes(one)))
  const post = divisor ? times(common, beside) : beside
  if (sweeps(post, rankIn(m))) throw fail(`it is multiplied by ${post.key}, which takes all keys`)
  fit++
  if (left.some((x) => has(slope, [x]) && !heads.includes(x)))
    throw fail(`its decay is ${slope.key}, no number for each head`, 'CAS022')
  if (slope.free.size === 0 && !(numberOf(slope, {}) >= 0))
    throw fail(`its weights grow with the distance, by exp(${-numberOf(slope, {})})`, 'CAS022')

  // What the state before the first token adds
  let initial: Access | undefined
  const rest = form.terms.find((term) => term !== main)
  if (rest) {
    const start = sumOf(rest)?.body.terms[0]?.factors.map(({ atom }) => atom)
    initial = start?.find((one): one is Access => one.kind === 'access' && one.name !== q.main.name)
    const first = formOf([
      termOf(
        rest.coefficient,
        rest.factors.filter((one) => !isSum(one)),
      ),
    ])
    const wanted = times(times(outside, decay!), exponential(times(number(-1), slope)))
    const before = times(wanted, power(decay!, -1))
    // with the axes of the operator, heads before channels of keys before those of values
    const names = initial?.indices.map(({ key }) => (rankIn(key) === rankIn(e) ? e : key))
    if (
      !initial ||
      names!.join() !== [...heads, e, column].join() ||
      divisor ||
      !isWhole(q) ||
      start!.length !== 2 ||
      first.key !== before.key ||
      !start!.some(({ key }) => key.startsWith(`${q.main.name}[`))
    )
      throw fail(`it adds ${formOf([rest]).key}`)
  }

  const operands = [
    [q, [...heads, row, e]],
    [k, [m, e]],
    [v, [m, column]],
  ] as const
  const layouts = layoutsOf(ir, operands, heads, [row, m])
  const shared = sharedOf(operands, heads)
  const fresh = freshIn(ir)
  const token = fresh('m')
  const names = new Map([
    [m, token],
    [e, fresh('e')],
  ])
  const [batch = fresh('b'), head = fresh('h')] = heads.length > 1 ? heads : [undefined, heads[0]]
  const [ofQ, ofK, ofV] = operands.map(([operand, own]) =>
    isWhole(operand)
      ? undefined
      : operandSide(
          ir,
          layouts,
          operand,
          [batch, own.includes(row) ? row : token, head, names.get(own.at(-1)!) ?? own.at(-1)!],
          heads,
          names,
        ),
  )
  const ofSlope =
    isNumber(slope, ir.variables) || tensorIn(slope) !== undefined
      ? undefined
      : sideOf(ir, layouts, slope, [head], names)
  const all = [batch, row, head, column].map(name)
  const raw = access(fresh('N'), all)
  const whole = times(raw, post)
  const ones = access(fresh('D'), [...all.slice(0, 3), number(0)])
  // in max(abs(B), 1) too
  const swapped = ({ terms }: Form): Form =>
    plus(
      ...terms.map(({ coefficient, factors }) => {
        const others = factors.filter((one) => !isTotal(one))
        if (others.length < factors.length) {
          const rest = formOf([termOf(coefficient, others)])
          return times(times(rest, ones), power(decay!, -1))
        }
        return others.reduce(
          (value, { atom, power: exponent }) =>
            times(value, power(rebuilt(atom, swapped), exponent)),
          number(coefficient),
        )
      }),
    )
  const normaliser = plain ? ones : divisor ? swapped(atomForm(divisor.atom)) : number(1)
  if (sweeps(normaliser, rankIn(m))) throw fail('its divisor is not the sum of its weights')
  const result = divisor ? times(whole, power(normaliser, -1)) : whole
  const finish =
    result.key === raw.key ? undefined : sideOf(ir, layouts, result, [batch, row, head, column])
  const slots: Record<string, string> = {
    q: shown(q),
    k: shown(k),
    v: shown(v),
    scale: scale.key,
    slopes: slope.key,
  }
  if (initial) slots.initialState = initial.name
  if (divisor) slots.normalise = plain ? 'true' : normaliser.key
  if (post.key !== '1') slots.result = post.key
  const told = sizesOf(ir, layouts)
  const decaying = (value: number) => {
    if (value >= 0 && value < Number.POSITIVE_INFINITY) return value
    const text = `lightning takes finite slopes from 0 on, but ${slope.key} is ${value}`
    throw broken('CAS022', text, spanOf(ir, tensor), tensor)
  }
  return {
    operator: 'lightning',
    slots,
    ranks: untoldRanks(ir),
    axes: [batch, row, head, column],
    layouts,
    run: (call) =>
      scope(() => {
        for (const one of shared) onlyOne(call, one)
        const [first] = [batched(call, q.main.name)] as [F32]
        const known = call.scalars
        const [rows, keys] = [first.shape[1]!, batched(call, k.main.name).shape[1]!]
        if (rows !== keys) {
          const text = `lightning has as many queries as keys, but ${rankOf(row)} is ${rows} and ${rankIn(m)} is ${keys}`
          throw broken('CAS022', text, spanOf(ir, tensor), tensor)
        }
        const sizes = {
          [rankOf(token)]: first.shape[1]!,
          [rankIn(m)]: first.shape[1]!,
          [rankOf(row)]: first.shape[1]!,
          [rankIn(e)]: first.shape[3]!,
          [rankOf(column)]: batched(call, v.main.name).shape[3]!,
        }
        const all = { ...told(call), ...sizes, ...known }
        const [tq, tk, tv] = [ofQ, ofK, ofV].map((side, i) => {
          const given = batched(call, operands[i]![0].main.name) as F32
          return side ? cast(side(call.tensors, all), first.dtype) : given
        }) as [F32, F32, F32]
        const most = Math.max(tk.shape[2]!, tv.shape[2]!)
        const alike = (x: F32, { main }: Operand) => {
          const wide = repeated(x, main.name, shared, first.shape[0]!, most)
          return wide === x ? x : wide.contiguous()
        }
        const [wide, values] = [alike(tk, k), alike(tv, v)]
        const own = tensorIn(slope)
        const { out } = lightning(tq, wide, divisor ? withOnes(values) : values, {
          slopes: ofSlope
            ? ofSlope.run(call.tensors, all)
            : own !== undefined
              ? (call.tensors[own] as F32)
              : new Array<number>(tq.shape[2]!).fill(decaying(numberOf(slope, all))),
          scale: numberOf(scale, all),
          initialState: initial && startOf(call.tensors[initial.name] as F32),
        })
        if (!finish) return { [tensor]: out }
        const dv = tv.shape[3]!
        const given = { [fresh('N')]: out.slice(-1, 0, dv), [fresh('D')]: out.slice(-1, dv) }
        return { [tensor]: cast(finish.run({ ...call.tensors, ...given }, all), out.dtype) }
      }),
  }
}

// A state with the axes of the text, as one of a batch and heads of one
const startOf = (state: F32) => {
  const ones = new Array<number>(Math.max(4 - state.rank, 0)).fill(1)
  return ones.length > 0 ? state.reshape([...ones, ...state.shape]) : state
}

// v with one more column, of ones
function withOnes(v: F32): F32 {
  const [b, s, h, d] = v.shape as [number, number, number, number]
  const whole = full([b, s, h, d + 1], 1, { dtype: v.dtype, device: v.device })
  whole.slice(-1, 0, d).copyFrom(v)
  return whole
}
