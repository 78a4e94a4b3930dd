import { HeddleError, refuse } from '../errors.js'
import type { Tensor } from '../tensor.js'
import { broken } from './error.js'
import { type CascadeIR, rankOf, type Span, sizedRanks, statementsOf, tensorsOf } from './ir.js'
import { type Atom, type Condition, type Factor, type Form, rankIn, type Term } from './normal.js'
import { parse } from './parse.js'
import { untoldRanks } from './sizes.js'
import { runSteps } from './steps.js'
import { validate } from './validate.js'

/** @internal Where a tensor has another order of axes than in the text: its indices there. */
export type Layout = (tensor: string, indices: readonly string[]) => readonly string[]

/**
 * @internal Names that no text has, and those that follow them: they end in more underscores than any of its own.
 */
export function freshIn(ir: CascadeIR): (name: string) => string {
  const names = [...ir.variables, ...ir.scalars, ...sizedRanks(ir), ...tensorsOf(ir)]
  const most = Math.max(0, ...names.map((name) => /_*$/.exec(name)![0].length))
  const end = '_'.repeat(most + 1)
  return (name) => name + end
}

/**
 * @internal What an operator is given or gives, computed beside it: a form as statements again, run on tensors of the
 * operator's layout.
 */
export class Side {
  readonly #lines: string[] = []
  readonly #ir: CascadeIR
  readonly #own: (name: string) => string
  readonly #span: Span
  /** Variables of the result, those of `left` that the form depends on. */
  readonly left: readonly string[]
  #used = new Set<string>()
  #fresh = 0
  // Of variables that have new names
  readonly #ranks = new Map<string, string>()

  /** `names` says which variables have another name here; the result has those of `left` that are `always` or used. */
  constructor(
    ir: CascadeIR,
    readonly layout: Layout,
    readonly names: ReadonlyMap<string, string>,
    form: Form,
    left: readonly string[],
    where: readonly Condition[] = [],
    always = true,
  ) {
    this.variables = new Set([...ir.variables, ...names.values(), ...left])
    this.#own = freshIn(ir)
    this.#span = statementsOf(ir.steps).at(-1)!.out.span
    const right = this.#form(form)
    const limit = this.#where(where)
    this.left = left.filter((name) => always || this.#used.has(name))
    this.#lines.push(`${this.#own('Y')}[${this.left}] = ${right}${limit}`)
    this.#ir = validate(parse(this.#lines.join('\n')))
  }
  private readonly variables: ReadonlySet<string>

  /** `hole` is what an empty coordinate holds. */
  run(
    tensors: Readonly<Record<string, Tensor>>,
    known: Readonly<Record<string, number>>,
    hole = 0,
  ): Tensor<'float32'> {
    const { scalars, families } = this.#ir
    const wanted = [...scalars, ...families.map(({ name }) => name)]
    const missing = untoldRanks(this.#ir).find(
      (name) => known[name] === undefined && known[this.#ranks.get(name) ?? ''] === undefined,
    )
    if (missing !== undefined) {
      const rank = this.#ranks.get(missing) ?? missing
      throw refuse('ERR_ARGUMENT', 'cascade', rank, `${rank} is missing (no tensor has its size)`)
    }
    const given = wanted.flatMap((name) => {
      const value = known[name] ?? known[this.#ranks.get(name) ?? '']
      return value === undefined ? [] : [[name, value]]
    })
    try {
      const made = runSteps(this.#ir, tensors, Object.fromEntries(given), hole)
      return made[this.#own('Y')] as Tensor<'float32'>
    } catch (error) {
      throw error instanceof HeddleError && error.span ? this.#inTheText(error) : error
    }
  }

  // An error of these statements as one of the text that they are made from
  #inTheText({ code, message, argument }: HeddleError): HeddleError {
    const ranks = new Map([...this.names].map(([from, to]) => [rankOf(to), rankIn(rankOf(from))]))
    const its = (name: string) => this.#ranks.get(name) ?? ranks.get(name) ?? name
    const text = message.replace(/^cascade: /, '').replace(/\w+/g, its)
    return broken(code as `CAS${number}`, text, this.#span, argument && its(argument))
  }

  #form({ terms }: Form): string {
    return terms.map((term) => this.#term(term)).join(' + ') || '0'
  }

  #term({ coefficient, factors }: Term): string {
    let text = `(${coefficient})`
    // divided last: 0 / 0 is 0, and 1 / 0 times 0 is none
    const divides = ({ power }: Factor) => power < 0
    const [below, above] = [true, false].map((one) => factors.filter((x) => divides(x) === one))
    for (const { atom, power } of above!)
      text += ` * ${power === 1 ? this.#atom(atom) : `pow(${this.#atom(atom)}, ${power})`}`
    for (const { atom, power } of below!)
      text += ` / ${power === -1 ? this.#atom(atom) : `pow(${this.#atom(atom)}, ${-power})`}`
    return text
  }

  #name(name: string): string {
    const own = this.#bound.get(name) ?? this.names.get(name) ?? name
    if (this.variables.has(own) || own !== name) this.#used.add(own)
    return own
  }
  readonly #bound = new Map<string, string>()

  #atom(atom: Atom): string {
    switch (atom.kind) {
      case 'name':
        return this.#name(atom.name)
      case 'access': {
        const indices = this.layout(
          atom.name,
          atom.indices.map((index) => this.#index(index)),
        )
        for (const index of indices) if (this.variables.has(index)) this.#used.add(index)
        // a tensor without ranks is given with one of size 1
        return `${atom.name}[${indices.length > 0 ? indices : 0}]`
      }
      case 'call':
        return `${atom.fn}(${atom.args.map((arg) => this.#form(arg)).join(', ')})`
      case 'if':
        return `if(${this.#condition(atom.test)}, ${this.#form(atom.yes)}, ${this.#form(atom.no)})`
      case 'sum':
        return `(${this.#form(atom.form)})`
      case 'reduce':
        return this.#statement(atom)
    }
  }

  // An index that is a name alone stays one: it may be the last of a rank
  #index(form: Form): string {
    const [term, ...more] = form.terms
    const plain = term && more.length === 0 && term.coefficient === 1 && term.factors.length === 1
    const [factor] = plain ? term.factors : []
    return factor?.power === 1 && factor.atom.kind === 'name'
      ? this.#name(factor.atom.name)
      : this.#form(form)
  }

  #statement({ op, over, body, where }: Atom & { kind: 'reduce' }): string {
    const outer = this.#used
    this.#used = new Set()
    const own = over.map((name) => this.#own(`${rankIn(name).toLowerCase()}${++this.#fresh}`))
    over.forEach((name, i) => {
      this.#ranks.set(rankOf(own[i]!), rankIn(name))
      this.#bound.set(name, own[i]!)
    })
    const right = this.#form(body)
    let limit = this.#where(where)
    // a predicate of the left alone would leave the result empty
    const names = where.some(({ free }) => over.some((name) => free.has(name)))
    if (where.length > 0 && !names) limit += ` && ${own[0]} == ${own[0]}`
    const free = [...this.#used].filter((name) => !own.includes(name))
    for (const name of over) this.#bound.delete(name)
    this.#used = new Set([...outer, ...free])
    const name = this.#own(`R${++this.#fresh}`)
    const access = free.length > 0 ? `${name}[${free}]` : name
    this.#lines.push(`${access} = ${op}(${own}) ${right}${limit}`)
    return access
  }

  #where(where: readonly Condition[]): string {
    return where.length > 0 ? ` where ${where.map((one) => this.#condition(one)).join(' && ')}` : ''
  }

  #condition(one: Condition): string {
    if ('form' in one) return `${this.#form(one.form)} ${one.kind} 0`
    const parts = one.parts.map((part) => this.#condition(part))
    return `(${parts.join(one.kind === 'and' ? ' && ' : ' || ')})`
  }
}
