import { type AttentionOptions, attention } from '../ops/attention.js'
import { scope } from '../scope.js'
import { empty, type Tensor, tensor } from '../tensor.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, type Split } from './ir.js'
import {
  type Atom,
  access,
  argument,
  atomForm,
  type Condition,
  exponential,
  type Factor,
  type Form,
  formOf,
  isAtLeast0,
  isDifference,
  logarithm,
  minus,
  type Normal,
  name,
  number,
  plus,
  power,
  rankIn,
  readsTensors,
  single,
  type Term,
  termOf,
  times,
} from './normal.js'
import { freshIn, type Layout, Side } from './side.js'
import { untoldRanks } from './sizes.js'
import {
  bareName,
  batched,
  type Call,
  cast,
  checkSums,
  type F32,
  has,
  hasAxes,
  isNumber,
  isSum,
  isWhole,
  type Known,
  type Layouts,
  type Lowered,
  layoutsOf,
  Mismatch,
  numberOf,
  type Operand,
  onlyOne,
  operandOf,
  operandSide,
  type Reduce,
  rejoined,
  repeated,
  sharedOf,
  shown,
  sideOf,
  sizesOf,
  spanOf,
  sweeps,
  tensorIn,
} from './slots.js'

// The atom that a form is
const alone = (form: Form): Atom | undefined => {
  const atom = form.terms[0]?.factors[0]?.atom
  return atom?.key === form.key ? atom : undefined
}

// Which function of which score a weight is, and where it is more than 0: exp(s) if(t, 1, 0), and exp(s) c as exp(s + log c)
function weightsOf(weight: Form, variables: readonly string[]) {
  const [term] = weight.terms
  const where: Condition[] = []
  const rest = (term?.factors ?? []).filter(({ atom, power }) => {
    const cuts = power === 1 && atom.kind === 'if' && atom.yes.key === '1' && atom.no.key === '0'
    if (cuts) where.push(atom.test)
    return !cuts
  })
  const factor = rest.find(({ atom }) => argument(atom)) ?? rest[0]
  const more = rest.filter((one) => one !== factor)
  if (factor?.atom.kind !== 'call') return undefined
  const { fn, args } = factor.atom
  const [score] = args as [Form]
  const { power } = factor
  // a number of the call
  const bare = power === 1 && more.length === 0 && where.length === 0
  const cut = fn === 'pow' && bare && isNumber(args[1]!, variables) ? alone(score) : undefined
  if (cut?.kind === 'call' && cut.fn === 'relu')
    return { weights: 'relu', power: args[1]!, score: cut.args[0]!, where } as const
  if (fn === 'exp' && power === 1 && more.every(isAtLeast0)) {
    const all = more.length > 0 ? plus(score, logarithm(single(more))) : score
    return { weights: 'softmax', power, score: all, where } as const
  }
  if (more.length > 0 || where.length > 0) return undefined
  if (fn === 'relu' && Number.isInteger(power) && power >= 1 && power <= 8)
    return { weights: 'relu', power, score, where } as const
  return power === 1 && (fn === 'sigmoid' || fn === 'softplus')
    ? ({ weights: fn, power, score, where } as const)
    : undefined
}

// sum(e) Q K with a factor: the two operands of a score and its scale
interface Dot {
  q: Operand
  k: Operand
  e: string
  scale: Form
}

function dotOf(
  term: Term,
  key: string,
  variables: readonly string[],
  normal: Normal,
  rowless: boolean,
): Dot | undefined {
  const sums = term.factors.filter((one) => isSum(one) && has(one.atom, [key]))
  const { over, body, where } = (sums[0]?.atom ?? {}) as Reduce
  if (sums.length !== 1 || over.length !== 1 || where.length > 0 || body.terms.length !== 1)
    return undefined
  const [e] = over as [string]
  const rest = term.factors.filter((one) => !sums.includes(one))
  const [product] = body.terms as [Term]
  const partsOf = (exponent: Form) =>
    [false, true].map((wanted) =>
      formOf(exponent.terms.filter((one) => has(formOf([one]), [key]) === wanted)),
    ) as [Form, Form]
  // exp(c[p] - c[m]) is no product of two numbers that float32 has, unless the text multiplies them
  const isOfDistance = ({ atom }: Factor) => {
    const [ofRow, ofKey] = partsOf(argument(atom) ?? number(0))
    return ofKey.terms.some((one) => ofRow.terms.some((other) => isDifference(one, other, key)))
  }
  if (normal.differs && [...rest, ...product.factors].some(isOfDistance)) return undefined
  // exp(a[p] + b[m]) is a factor of either
  const pieces = (factor: Factor): readonly Factor[] => {
    const exponent = argument(factor.atom)
    if (!exponent) return [factor]
    const parts = partsOf(exponent)
    if (parts.some(({ terms }) => terms.length === 0)) return [factor]
    return parts.flatMap((part) => power(exponential(part), factor.power).terms[0]!.factors)
  }
  const split = (factors: readonly Factor[]) => {
    const all = factors.flatMap(pieces)
    return [false, true].map((wanted) => all.filter(({ atom }) => has(atom, [key]) === wanted))
  }
  const [ofQ, ofK] = split(product.factors) as [Factor[], Factor[]]
  const [before, withKey] = split(rest) as [Factor[], Factor[]]
  const scales = before.filter(({ atom }) => isNumber(atom, variables))
  const q = single([...ofQ, ...before.filter((one) => !scales.includes(one))])
  const k = single([...ofK, ...withKey])
  const rows = variables.filter((v) => q.free.has(v) && !single(ofK).free.has(v))
  const axes = rowless && rows.length === 0 ? [[e]] : rows.map((row) => [row, e])
  const operands = {
    q: axes.map((own) => operandOf(q, own, normal)).find((one) => one !== undefined),
    k: operandOf(k, [key, e], normal),
  }
  if (!operands.q || !operands.k || rows.some((row) => k.free.has(row))) return undefined
  const scale = formOf([termOf(term.coefficient * product.coefficient, scales)])
  return { q: operands.q, k: operands.k, e, scale }
}

// Those of the same operands are one, whose scale is a sum
function united(dots: readonly Dot[]): Dot[] {
  const found = new Map<string, Dot>()
  for (const dot of dots) {
    const key = [dot.q.form.key, dot.k.form.key, dot.e].join(' | ')
    const before = found.get(key)
    found.set(key, before ? { ...dot, scale: plus(before.scale, dot.scale) } : dot)
  }
  return [...found.values()]
}

// Whether a form counts with a variable, or else has it as the index before that of keys
function standsBeside({ terms }: Form, row: string, key: string, counted: boolean): boolean {
  const within = (form: Form) => standsBeside(form, row, key, counted)
  const inside = (atom: Atom): boolean => {
    if (atom.kind === 'name') return counted && atom.name === row
    if (atom.kind === 'call') return atom.args.some(within)
    if (atom.kind === 'if') return within(atom.yes) || within(atom.no)
    if (atom.kind === 'sum') return within(atom.form)
    if (atom.kind === 'reduce') return within(atom.body)
    return atom.indices.some((index, i) =>
      bareName(index) === undefined
        ? within(index)
        : !counted && index.key === row && atom.indices[i + 1]?.key === key,
    )
  }
  return terms.some(({ factors }) => factors.some(({ atom }) => inside(atom)))
}

// A number per head: a tensor over heads or a scalar
type PerHead = Form

// Where a row ends and how far back it begins, as offsets from its own index; the rest of the mask
interface Interval {
  off: Form | undefined
  back: Form | undefined
  rest: Condition[]
}

function intervalOf(
  where: readonly Condition[],
  key: string,
  row: string,
  variables: readonly string[],
): Interval {
  const interval: Interval = { off: undefined, back: undefined, rest: [] }
  for (const one of where) {
    const form = one.kind === '<=' ? one.form : undefined
    const sign = (text: string) => form?.terms.find((term) => term.key === text)?.coefficient
    const rest = form && formOf(form.terms.filter((term) => term.key !== key && term.key !== row))
    const up = sign(key) === 1 && sign(row) === -1
    const down = sign(key) === -1 && sign(row) === 1
    const slot = up ? 'off' : 'back'
    if (!rest || (!up && !down) || !isNumber(rest, [key, ...variables]) || interval[slot])
      interval.rest.push(one)
    else interval[slot] = up ? times(number(-1), rest) : rest
  }
  // A window looks back from a causal row alone
  if (interval.back && !interval.off) return { off: undefined, back: undefined, rest: [...where] }
  return interval
}

// post * sum(m) weight * value, or that divided by the sum of the weights
interface Weighted {
  slots: Record<string, string>
  post: Form
  /** Axes [b, s, h, d] of the result. */
  axes: readonly string[]
  layouts: Layouts
  /** Nothing is computed beside the operator. */
  alone: boolean
  /** Sizes that a call may give. */
  ranks: readonly string[]
  run(call: Call): { out: F32; lse: F32; known: () => Known }
}

// A sum over keys and what it is divided by, and what is multiplied with both
interface Summed {
  factors: readonly Factor[]
  sum: Factor
  outside: Form
}

// The sums that a result is made of, each once; the one that has most of its axes is over the keys
function sumsOf({ form, left }: { form: Form; left: readonly string[] }): Summed[] | undefined {
  const found = new Map<string, Summed>()
  for (const { factors, coefficient } of form.terms) {
    const axes = ({ atom }: Factor) => left.filter((x) => has(atom, [x])).length
    const [first, ...more] = factors.filter(isSum)
    if (!first) return undefined
    const sum = more.reduce((a, b) => (axes(b) > axes(a) ? b : a), first)
    const rank = rankIn((sum.atom as Reduce).over[0]!)
    const isOwn = (one: Factor) =>
      one === sum || (one.power === -1 && sweeps(atomForm(one.atom), rank))
    const own = factors.filter(isOwn)
    const { key } = termOf(1, own)
    const rest = formOf([
      termOf(
        coefficient,
        factors.filter((one) => !isOwn(one)),
      ),
    ])
    const before = found.get(key)
    found.set(key, { factors: own, sum, outside: before ? plus(before.outside, rest) : rest })
  }
  return [...found.values()]
}

/** @internal */
export function attentionOf(normal: Normal, ir: CascadeIR): Lowered {
  const outputs = ir.outputs.map((tensor) => ({ tensor, ...normal.forms.get(tensor)! }))
  const [first] = ir.outputs as [string]
  const found = outputs.flatMap((out) => {
    const sums = sumsOf(out)
    return sums && sums.length > 0 && sums.length < 4 ? [{ out, sums }] : []
  })
  if (!found[0]) throw new Mismatch(first, 'it is no weighted sum', 0)
  const { out, sums } = found[0]
  const others = outputs.filter((one) => one !== out)
  const parts = sums.map((one) => weightedSum(normal, ir, out, one, others))
  const [part] = parts as [Weighted]
  const spread = parts.some(({ axes }) => axes.join() !== part.axes.join())
  if (spread) throw new Mismatch(out.tensor, 'its parts have no common axes', 2)
  const layouts: Layouts = new Map(parts.flatMap((one) => [...one.layouts]))
  const fresh = freshIn(ir)
  const rawNames = parts.map((_, i) => fresh(`O${i}`))
  const raw = rawNames.map((one) => access(one, part.axes.map(name)))
  const sum = plus(...parts.map(({ post }, i) => times(raw[i]!, post)))
  const post = sum.key === raw[0]!.key ? undefined : sideOf(ir, layouts, sum, part.axes)
  const slots = Object.assign(
    {},
    ...parts.map((one, i) =>
      Object.fromEntries(
        Object.entries(one.slots).map(([slot, text]) => [i ? slot + i : slot, text]),
      ),
    ),
  ) as Record<string, string>
  if (post) slots.result = sum.key
  const lse = others[0]?.tensor
  if (parts.length === 1 && part.alone)
    return {
      operator: 'attention',
      slots,
      ranks: part.ranks,
      axes: part.axes,
      layouts,
      run(call) {
        const result = part.run(call)
        const made: Record<string, Tensor> = {}
        made[out.tensor] = result.out
        if (lse === undefined) result.lse.dispose()
        else made[lse] = result.lse
        return made
      },
    }
  const sizes = sizesOf(ir, layouts)
  return {
    operator: 'attention',
    slots,
    ranks: untoldRanks(ir),
    axes: part.axes,
    layouts,
    run: (given) =>
      scope(() => {
        const call = { ...given, scalars: { ...sizes(given), ...given.scalars } }
        const results = parts.map((one) => one.run(call))
        const [{ out: whole, known, lse: logarithms }] = results as [(typeof results)[number]]
        const raws = () => Object.fromEntries(results.map((one, i) => [rawNames[i]!, one.out]))
        const result = post
          ? cast(post.run({ ...call.tensors, ...raws() }, known()), whole.dtype)
          : whole
        return { [out.tensor]: result, ...(lse === undefined ? {} : { [lse]: logarithms }) }
      }),
  }
}

function weightedSum(
  normal: Normal,
  ir: CascadeIR,
  out: { tensor: string; left: readonly string[] },
  { factors, sum, outside }: Summed,
  others: readonly { tensor: string; form: Form }[],
): Weighted {
  const { pages } = normal
  let fit = 0
  let einsum = out.tensor
  const fail = (reason: string, code: 'CAS020' | 'CAS022' = 'CAS020') =>
    new Mismatch(einsum, reason, fit, code)
  const numerator = sum.atom as Reduce
  if (numerator.over.length !== 1 || numerator.body.terms.length !== 1)
    throw fail('it is no sum of weights times values over one variable')
  const [m] = numerator.over as [string]
  const inner = numerator.body.terms[0]!.factors

  const divisors = factors.filter(({ power }) => power === -1)
  const summed = (atom: Atom) =>
    atom.kind === 'reduce' &&
    atom.op === 'sum' &&
    atom.where.map(({ key }) => key).join() === numerator.where.map(({ key }) => key).join()
      ? [atom.body]
      : []
  // The weight is what the divisor sums up, or a function of a score; the rest is the value, which has a variable of its own
  const candidates = [
    ...divisors.flatMap(({ atom }) =>
      atom.kind === 'sum'
        ? atom.form.terms.flatMap(({ factors }) => factors.flatMap((one) => summed(one.atom)))
        : summed(atom),
    ),
    ...inner.map((one) => single([one])),
  ]
  const columnsOf = (value: Form, weight: Form) =>
    out.left.filter((x) => value.free.has(x) && !weight.free.has(x))
  const found = candidates.flatMap((weight) => {
    const value = times(single(inner), power(weight, -1))
    const [column, ...more] = columnsOf(value, weight)
    const v =
      column === undefined || more.length > 0 ? undefined : operandOf(value, [m, column], normal)
    const own = weightsOf(weight, ir.variables)
    const apart = out.left.every((x) => x === column || !value.free.has(x) || v?.main.free.has(x))
    // what numerator and divisor have apart may be beyond all numbers, as a mask of one of them is
    const bends = value.terms.some(({ factors }) => factors.some(({ atom }) => argument(atom)))
    return v && own && apart && !bends && has(own.score, [m])
      ? [{ ...own, weight, v, column: column! }]
      : []
  })
  if (found.length === 0) {
    const isValue = ({ atom }: Factor) =>
      atom.kind === 'access' &&
      columnsOf(atomForm(atom), single(inner.filter((x) => x.atom !== atom))).length > 0
    const rest = single(inner.filter((one) => !isValue(one)))
    if (!inner.some(isValue)) throw fail('it has no value that is summed')
    fit++
    throw fail(`its weights are ${rest.key}, no function of a score that attention has`)
  }
  const [{ weights, power: exponent, score, where: cuts, weight, v, column }] = found as [
    (typeof found)[number],
  ]
  const where = [...numerator.where, ...cuts]
  fit += 2

  // exp(shift) sum(…) in both, and a sink beside the sum below
  const isNormaliser = (atom: Atom) => summed(atom)[0]?.key === weight.key
  const apart = divisors.filter(
    ({ atom }) => !isNormaliser(atom) && !sweeps(atomForm(atom), rankIn(m)),
  )
  const [divisor, ...second] = divisors.filter((one) => !apart.includes(one))
  if (second.length > 0) throw fail('it is divided twice')
  if (!divisor && weights === 'softmax') throw fail('its weights are not divided by their sum')
  let post = times(outside, single(apart))
  let total = divisor && atomForm(divisor.atom)
  let shift = number(0)
  let sink: PerHead | undefined
  if (divisor?.atom.kind === 'sum' && weights === 'softmax') {
    total = divisor.atom.form
    const [own, other, ...more] = [...total.terms].sort(
      (a, b) => Number(b.factors.some(isSum)) - Number(a.factors.some(isSum)),
    )
    const sum = own!.factors.find(isSum)
    const before = formOf([
      termOf(
        own!.coefficient,
        own!.factors.filter((one) => one !== sum),
      ),
    ])
    if (
      !sum ||
      !isNormaliser(sum.atom) ||
      more.length > 0 ||
      !(own!.coefficient > 0 && other!.coefficient > 0)
    )
      throw fail('its divisor is no sum of its weights and one more')
    for (const one of [before, formOf([other!])])
      if (one.terms[0]!.factors.some(({ atom }) => !argument(atom) && readsTensors(atom)))
        throw fail(`its divisor has ${one.key}, which may be below 0`)
    post = times(post, power(before, -1))
    shift = logarithm(before)
    sink = logarithm(formOf([other!]))
  } else if (divisor && !isNormaliser(divisor.atom))
    throw fail('its divisor is not the sum of its weights')
  if (sweeps(post, rankIn(m))) throw fail(`it is multiplied by ${post.key}, which takes all keys`)
  fit++

  // scale q.k, the sum of several, or cap tanh(scale q.k / cap); then what is added to it
  let dots: Dot[] = []
  let cap: Form | undefined
  const terms: Term[] = []
  const cappedIn = ({ factors }: Term) =>
    factors.find(({ atom }) => atom.kind === 'call' && atom.fn === 'tanh')
  // one query of each head has no variable for rows
  const all = score.terms.flatMap((term) => {
    const atom = cappedIn(term)?.atom
    return atom?.kind === 'call' ? [term, ...atom.args[0]!.terms] : [term]
  })
  const rowless = !all.some((term) => dotOf(term, m, ir.variables, normal, false))
  for (const term of score.terms) {
    const bent = cappedIn(term)
    const own = dotOf(term, m, ir.variables, normal, rowless)
    if (own && !cap) dots.push(own)
    else if (bent?.power === 1 && bent.atom.kind === 'call' && dots.length === 0) {
      const inside = bent.atom.args[0]!.terms
      cap = formOf([
        termOf(
          term.coefficient,
          term.factors.filter((one) => one !== bent),
        ),
      ])
      dots = inside.flatMap((one) => dotOf(one, m, ir.variables, normal, rowless) ?? [])
      if (!isNumber(cap, [m, ...ir.variables]) || dots.length < inside.length)
        throw fail(`its score has ${bent.atom.key}, which is no soft cap`)
    } else terms.push(term)
  }
  dots = united(dots)
  const [dot] = dots
  if (!dot) throw fail(`its score ${score.key} has no product of a query and a key`)
  fit++
  const { q, k } = dot
  let rows = out.left.filter((x) => has(q.form, [x]) && !has(k.form, [x]) && !has(v.form, [x]))
  // Heads that share keys and values look like rows, but for the mask
  const masked = rows.filter((x) => where.some((one) => has(one, [x]) && has(one, [m])))
  if (masked.length > 0) rows = masked
  if (rows.length > 1) {
    const order = q.main.indices.map(({ key }) => key)
    const last = rows.reduce((x, y) => (order.indexOf(y) > order.indexOf(x) ? y : x))
    const rest = [...terms.map((term) => formOf([term])), post, shift, ...(sink ? [sink] : [])]
    const near = (counted: boolean) =>
      rows.filter((x) => rest.some((form) => standsBeside(form, x, m, counted)))
    const named = [...rest, ...where].some((one) => has(one, [last]))
    const [counted, before] = [near(true), near(false)]
    // one is counted with, as in slope[h] * abs(p - m), or the last is as good as any
    if (counted.length === 1) rows = counted
    else if (before.length > 0 ? before.join() === last : !named) rows = [last]
  }
  if (rows.length > 1)
    throw fail('its queries have no variable for rows that a mask, keys or values tell from heads')
  const fresh = freshIn(ir)
  const [row = fresh('p')] = rows
  const rowIndex = rows.length > 0 ? name(row) : number(0)
  const heads = out.left.filter((x) => x !== row && x !== column)
  // Groups of queries with a head of keys each: an axis of the text, and part of the heads for attention
  const [group = '', own = ''] = [heads.at(-1), heads.at(-2)]
  const grouped =
    heads.length > 1 &&
    [...dots.map(({ k }) => k), v].every(({ form }) => has(form, [own]) && !has(form, [group]))
  if (heads.length > (grouped ? 3 : 2)) throw fail('its result has more axes than [b, s, h, d]')
  const ofQueries = dots.map(({ q, e }) => [q, [...rows, e]] as const)
  const operands = [
    ...ofQueries,
    ...dots.map(({ k, e }) => [k, [m, e]] as const),
    [v, [m, column]] as const,
  ]
  for (const [{ main, form }, axes] of operands) {
    const ofQ = ofQueries.some(([one]) => one.main === main)
    if (!hasAxes(main, axes, heads) || (has(form, rows) && !ofQ))
      throw fail(`${form.key} is not read along its axes`, 'CAS022')
  }
  // queries may be the same for all that keys and values have
  const absent = heads.filter((x) => !has(q.main, [x]))
  const given = absent.every((x) => has(k.main, [x]) && has(v.main, [x]))
  if (!given || (heads.length > 2 && absent.length > 0))
    throw fail(`${q.form.key} is not read along its axes`, 'CAS022')

  const [batch, head] = heads.length > 1 ? heads : [undefined, heads[0]]
  const layouts = layoutsOf(ir, operands, heads, [row, m])
  const axes = [batch ?? fresh('b'), row, head ?? fresh('h'), column]
  const [token, channel] = [fresh('m'), fresh('e')]
  const names = new Map([[m, token], ...dots.map(({ e }) => [e, channel] as const)])
  const side = (form: Form, left: readonly string[], where?: readonly Condition[]) =>
    sideOf(ir, layouts, form, left, names, where)
  // What an operand is computed from, undefined where it is a tensor as it stands
  const sideFor = (operand: Operand, at: string, last: string) =>
    isWhole(operand)
      ? undefined
      : operandSide(ir, layouts, operand, [axes[0]!, at, axes[2]!, last], heads, names)

  const isPerHead = (form: Form) =>
    (isNumber(form, ir.variables) || has(form, heads)) &&
    [m, ...ir.variables].every((x) => heads.includes(x) || !has(form, [x]))
  let bias = number(0)
  let added = number(0)
  let slope: Form | undefined
  // the middle of a square, which is small only as a whole
  const squares = terms.some(({ factors }) =>
    factors.some(({ atom, power }) => atom.key === m && power !== 1),
  )
  for (const term of terms) {
    const own = formOf([term])
    const position = term.factors.some(({ atom, power }) => atom.key === m && power === 1)
    const rest = formOf([
      termOf(
        term.coefficient,
        term.factors.filter(({ atom }) => atom.key !== m),
      ),
    ])
    if (position && !slope && !squares && isPerHead(rest) && heads.length < 2) slope = rest
    else if (has(own, [m])) bias = plus(bias, own)
    else added = plus(added, own)
  }
  if (sink && (!isPerHead(sink) || (heads.length > 1 && !isNumber(sink, ir.variables))))
    throw fail(`its sink is ${sink.key}, no number for each head`, 'CAS022')
  if (!isNumber(dot.scale, ir.variables))
    throw fail(`its scale is ${dot.scale.key}, no number`, 'CAS022')
  const scale = cap ? times(dot.scale, cap) : dot.scale
  // Further products have the scale of the first
  const parts = dots.map((one, i) => {
    const ratio = i === 0 ? number(1) : times(one.scale, power(dot.scale, -1))
    const ofQ = { main: one.q.main, form: times(ratio, one.q.form) }
    return { ...one, ofQ: sideFor(ofQ, row, channel), ofK: sideFor(one.k, token, channel) }
  })
  const ofV = sideFor(v, token, column)
  for (const one of where)
    if (has(one, [column])) throw fail(`its mask ${one.key} hangs on ${column}`)
  const { off, back, rest: hidden } = intervalOf(where, m, row, ir.variables)

  // What must be the distance of the last row from the last key
  const distances = off ? [off] : []
  // A part of the score that is the same for all keys: slopes have theirs, the rest is a bias
  const rowPart = (form: Form) => {
    if (form.terms.length === 0 && !slope) return
    const rest = slope && times(plus(form, times(slope, rowIndex)), power(slope, -1))
    // sums and differences of sizes and scalars: what a number or a factor shifts is no distance
    const even = rest?.terms.every(
      ({ coefficient, factors }) =>
        Math.abs(coefficient) === 1 &&
        factors.length === 1 &&
        factors[0]!.atom.kind === 'name' &&
        factors[0]!.power === 1,
    )
    const distance = rest && times(number(-1), rest)
    if (
      distance &&
      isNumber(distance, [m, ...ir.variables]) &&
      (even || distance.key === off?.key)
    ) {
      distances.push(distance)
      return
    }
    bias = plus(bias, form, slope ? times(slope, name(m)) : number(0))
    slope = undefined
  }
  if (sink) rowPart(shift)
  if (weights !== 'softmax') {
    const own = added.terms.filter((term) => !slope || !has(formOf([term]), slope.free))
    bias = plus(bias, formOf(own))
    rowPart(formOf(added.terms.filter((term) => !own.includes(term))))
  } else bias = plus(bias, added)
  for (const other of others) {
    einsum = other.tensor
    if (!total || others.length > 1 || other.form.terms.length === 0)
      throw fail('attention gives a result and the logarithm of its divisor')
    const difference = minus(other.form, logarithm(total))
    const cancels = !sink && weights === 'softmax'
    if (cancels ? sweeps(difference, rankIn(m)) : difference.key !== '0')
      throw fail('it is not the logarithm of the divisor')
    if (cancels) rowPart(difference)
  }
  einsum = out.tensor

  const slots: Record<string, string> = { q: shown(q), k: shown(k), v: shown(v) }
  for (const { q, k } of dots.slice(1)) Object.assign(slots, { q2: shown(q), k2: shown(k) })
  slots.scale = scale.key
  const note = (slot: string, form: Form | undefined) => {
    if (form) slots[slot] = form.key
  }
  if (weights !== 'softmax')
    Object.assign(slots, { weights, normalise: String(divisor !== undefined) })
  if (exponent !== 1) slots.power = typeof exponent === 'number' ? String(exponent) : exponent.key
  note('bias', bias.terms.length > 0 ? bias : undefined)
  note('softCap', cap)
  note('slopes', slope)
  note('sink', sink)
  note('causal', off && plus(name(row), off))
  note('window', back && plus(name(row), back))
  if (hidden.length > 0) slots.mask = hidden.map(({ key }) => key).join(', ')

  const biasAxes = [axes[0]!, axes[2]!, row, token]
  const biasPlaces = biasPlacesOf(bias, [batch, head, row, m])
  const besides = (where: readonly Condition[]) =>
    new Side(ir, layoutOf(layouts), names, computedBias, biasAxes, where, false)
  const computedBias = rejoined(bias)
  checkSums(computedBias, ir)
  const beside =
    hidden.length > 0 || (biasPlaces === undefined && !isNumber(bias, [m, ...ir.variables]))
      ? besides(hidden)
      : undefined
  let ending: Side | undefined
  const perHead = (form: Form | undefined) =>
    form && !isNumber(form, ir.variables) && tensorIn(form) === undefined
      ? side(form, [head!])
      : undefined
  const [ofSlope, ofSink] = [perHead(slope), perHead(sink)]
  const sides = [beside, ofSlope, ofSink, ofV, ...parts.flatMap(({ ofQ, ofK }) => [ofQ, ofK])]
  const raised = (known: Known) => {
    if (typeof exponent === 'number') return exponent
    const value = numberOf(exponent, known)
    if (Number.isInteger(value) && value >= 1 && value <= 8) return value
    const text = `attention has powers from 1 to 8 of its weights, whole numbers, but ${exponent.key} is ${value}`
    throw broken('CAS022', text, spanOf(ir, out.tensor), out.tensor)
  }
  const sized = [rankOf(column), rankOf(row), rankIn(m), rankIn(dot.e), rankOf(token)]
  const ranks = [...sized, ...heads.map(rankOf)]
  // The scalar that a form is, if the call alone tells it
  const scalarIn = (form: Form) => {
    const one = bareName(form)
    return one !== undefined && ranks.includes(one) ? undefined : one
  }
  const lengths = distances.map((form) => ({ form, only: scalarIn(form) }))
  const named = scalarIn(scale)
  const plainScale = lengths.some(({ only }) => only === named) ? undefined : named
  const shared = sharedOf(operands, heads)
  const alone = post.key === '1' && sides.every((one) => one === undefined)
  // Keys and values that lie in pages
  const table = pages.get(k.main.name)
  const page = ir.splits.find(({ variable }) => rankOf(variable) === rankIn(m))
  if (pages.size > 0) {
    const both = [...pages.keys()].every((one) => one === k.main.name || one === v.main.name)
    const same = table && pages.get(v.main.name) === table
    if (!both || !same || pages.has(q.main.name) || !alone || biasPlaces || dots.length > 1)
      throw fail(
        'its pages are not those of k and v alone, by one table, which nothing is computed from',
        'CAS022',
      )
    slots.blockTable = table
  }
  if (heads.length > 2 && !alone)
    throw fail('what is computed beside it has more axes than [b, s, h, d]', 'CAS022')
  return {
    slots,
    post,
    axes,
    layouts,
    alone: alone && dots.length === 1 && !biasPlaces,
    ranks: table === undefined ? [] : [rankIn(m)],
    run(call) {
      const { tensors, scalars } = call
      if (!grouped || !alone) for (const one of shared) onlyOne(call, one)
      const tq = batched(call, q.main.name) as F32
      const tk = batched(call, k.main.name)
      const tv = batched(call, v.main.name)
      const [, sq, , d] = tq.shape as [number, number, number, number]
      const sizeOf = (axis: 0 | 2) =>
        shared.some((one) => one.tensor === q.main.name && (one.axis === axis || one.either))
          ? Math.max(tk.shape[axis]!, tv.shape[axis]!)
          : tq.shape[axis]!
      const [b, hq] = [sizeOf(0), sizeOf(2)]
      const options: AttentionOptions = { causal: off !== undefined }
      let computed = beside
      const sk = table === undefined ? tk.shape[1]! : pagesOf(call, table, page!, options)
      const dv = tv.shape[3]!
      const ends = sk - sq
      // Names of the text make slow objects, which most calls do without
      let all: Known | undefined
      const known = () => {
        if (all) return all
        const hk = heads.length > 2 ? tk.shape[2]! : hq
        const sizes = [dv, sq, sk, d, sk, ...(heads.length > 1 ? [b] : []), hk, hq / hk]
        all = { ...Object.fromEntries(ranks.map((rank, i) => [rank, sizes[i]!])), ...scalars }
        for (const { only } of lengths) if (only !== undefined) all[only] ??= ends
        return all
      }
      // A name that the call leaves out stands for what the operator takes
      for (const { form, only } of lengths) {
        const got = only === undefined ? numberOf(form, known()) : (scalars[only] ?? ends)
        // Rows that end elsewhere have a mask, unless the call says where they end
        if (form === off && got !== ends && only === undefined && table === undefined) {
          ending ??= besides(where)
          computed = ending
          options.causal = false
        } else if (got !== ends)
          throw broken(
            'CAS022',
            `attention ends its last row at the last key, ${ends} from its index here, but ${form.key} is ${got}`,
            spanOf(ir, out.tensor),
            out.tensor,
          )
      }
      const window = back && options.causal ? ends + 1 - numberOf(back, known()) : undefined
      if (window === undefined || (Number.isInteger(window) && window >= 1)) options.window = window
      else {
        // rows that see nothing have a mask
        if (table !== undefined || !Number.isInteger(window))
          throw broken(
            'CAS022',
            `attention looks back over 1 key or more, as a whole number, but ${back!.key} makes it ${window}`,
            spanOf(ir, out.tensor),
            out.tensor,
          )
        ending ??= besides(where)
        computed = ending
        options.causal = false
      }
      const vector = (form: Form, own: Side | undefined): F32 | number[] => {
        if (own) return own.run(tensors, known())
        const tensor = tensorIn(form)
        if (tensor !== undefined) return call.tensors[tensor] as F32
        return new Array<number>(hq).fill(numberOf(form, known()))
      }
      options.scale = plainScale === undefined ? numberOf(scale, known()) : scalars[plainScale]
      if (weights !== 'softmax')
        Object.assign(options, {
          weights,
          power: raised(known()),
          normalise: divisor !== undefined,
        })
      const ofBias = computed
      if (biasPlaces && !ofBias)
        options.bias = placed(call.tensors[tensorIn(bias)!]!, biasPlaces) as F32
      else if (bias.terms.length > 0 && !ofBias) options.bias = numberOf(bias, known())
      if (cap) options.softCap = Math.abs(numberOf(cap, known()))
      if (slope) options.slopes = vector(slope, ofSlope)
      if (sink) options.sink = vector(sink, ofSink)
      const whole = (own: ReturnType<typeof sideFor>, { main }: Operand) => {
        const given = batched(call, main.name)
        return own ? cast(own(tensors, known()), tq.dtype) : (given as F32)
      }
      const queries = parts.map(({ ofQ, q }) => whole(ofQ, q))
      const keys = parts.map(({ ofK, k }) => whole(ofK, k))
      const value = whole(ofV, v)
      parts.forEach(({ e }, i) => {
        const [own, other] = [queries[i]!.shape[3]!, keys[i]!.shape[3]!]
        if (own === other) return
        const text = `rank ${rankIn(e)} is ${own} from queries but ${other} from keys`
        throw broken('CAS003', text, spanOf(ir, out.tensor), rankIn(e))
      })
      const most = Math.max(...[...keys, value].map(({ shape }) => shape[2]!))
      const alike = (x: F32, { main }: Operand, heads = most) =>
        table === undefined ? repeated(x, main.name, shared, b, heads) : x
      // views and copies that the call makes
      const made = () => {
        if (ofBias)
          options.bias = ofBias
            .run(tensors, known(), Number.NEGATIVE_INFINITY)
            .reshape(
              biasAxes.map((axis, i) => (ofBias.left.includes(axis) ? [b, hq, sq, sk][i]! : 1)),
            )
        const ks = keys.map((x, i) => alike(x, parts[i]!.k))
        const qs = queries.map((x, i) => alike(x, parts[i]!.q, hq))
        const taken = [joined(qs), joined(ks), alike(value, v)].map(inEights)
        const result = attention(...(taken as [F32, F32, F32]), options)
        if (dv % 8 !== 0) result.out = result.out.slice(3, 0, dv).contiguous()
        return result
      }
      const plain =
        !ofBias &&
        parts.length === 1 &&
        d % 8 === 0 &&
        dv % 8 === 0 &&
        (shared.length === 0 || table !== undefined)
      const result = plain ? attention(queries[0]!, keys[0]!, value, options) : scope(made)
      if (table !== undefined && options.blockTable !== tensors[table])
        options.blockTable!.dispose()
      return { out: result.out, lse: result.lse, known }
    },
  }
}

// Sets where pages lie and how many keys they hold: as the call says, or all
function pagesOf(
  { tensors, scalars }: Call,
  table: string,
  { variable, size }: Split,
  options: AttentionOptions,
): number {
  const [rank, given] = [rankOf(variable), tensors[table] as Tensor<'int32'>]
  const [b = 1, most] = given.rank === 1 ? [1, given.size] : given.shape
  const keys = scalars[rank] ?? most! * size
  options.blockTable = given.rank === 1 ? given.reshape([1, most!]) : given
  options.cacheSeqlens = new Array<number>(b).fill(keys)
  return keys
}

const layoutOf =
  (layouts: Layouts): Layout =>
  (tensor, indices) =>
    layouts.get(tensor)?.(indices) ?? indices

// Side by side along the last axis
function joined(parts: readonly F32[]): F32 {
  const [first, ...more] = parts as [F32, ...F32[]]
  if (more.length === 0) return first
  const sizes = parts.map(({ shape }) => shape[3]!)
  const d = sizes.reduce((sum, size) => sum + size, 0)
  const whole = empty([...first.shape.slice(0, 3), d], { dtype: first.dtype, device: first.device })
  let at = 0
  parts.forEach((part, i) => {
    whole.slice(-1, at, at + sizes[i]!).copyFrom(part)
    at += sizes[i]!
  })
  return whole
}

// Where the axes of a bias stand among [b, h, s, keys], if it is a tensor with some of them in this order
function biasPlacesOf(bias: Form, axes: readonly (string | undefined)[]): number[] | undefined {
  const atom = tensorIn(bias) === undefined ? undefined : bias.terms[0]!.factors[0]!.atom
  if (atom?.kind !== 'access') return undefined
  const places = atom.indices.map(({ key }) => axes.indexOf(key))
  return places.every((at, i) => at >= 0 && at > (places[i - 1] ?? -1)) ? places : undefined
}

// A tensor with the axes of the text under all four; one that has four is taken as it is
function placed(tensor: Tensor, places: readonly number[]): Tensor {
  if (tensor.rank !== places.length || places.length === 4) return tensor
  const shape = [1, 1, 1, 1]
  places.forEach((at, i) => {
    shape[at] = tensor.shape[i]!
  })
  return tensor.reshape(shape)
}

// With columns of zeros behind, to as many as attention takes; what is repeated is laid out
function inEights(x: F32): F32 {
  const [b, s, h, d] = x.shape as [number, number, number, number]
  if (d % 8 === 0) return x.strides.includes(0) ? x.contiguous() : x
  const wide = empty([b, s, h, Math.ceil(d / 8) * 8], { dtype: x.dtype, device: x.device })
  wide.slice(3, 0, d).copyFrom(x)
  const rest = wide.slice(3, d)
  rest.copyFrom(tensor([0], [1], { device: x.device }).expand(rest.shape))
  return wide
}
