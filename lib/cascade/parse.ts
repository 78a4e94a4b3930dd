import type { HeddleError } from '../errors.js'
import { broken } from './error.js'
import {
  type Access,
  type Expr,
  type FunctionName,
  type Index,
  type Iteration,
  type Predicate,
  type Reducer,
  reducers,
  type Span,
  type Split,
  type Statement,
} from './ir.js'
import { type Token, tokenize } from './lexer.js'

/** @internal The text as it is written, before names have meanings. */
export interface Syntax {
  ranks: { name: string; size: number | undefined; span: Span }[]
  splits: Split[]
  steps: (Statement | Iteration)[]
}

const comparisons = ['<', '<=', '>', '>=', '==', '!='] as const
const depthLimit = 200
// a + b + c … is a tree as deep as it is long, and whoever reads it goes down
const operatorLimit = 500

const arity: Readonly<Record<FunctionName, number>> = {
  exp: 1,
  exp2: 1,
  log: 1,
  log1p: 1,
  tanh: 1,
  sigmoid: 1,
  relu: 1,
  softplus: 1,
  pow: 2,
  max: 2,
  min: 2,
  abs: 1,
  sqrt: 1,
  rsqrt: 1,
  erf: 1,
  sin: 1,
  cos: 1,
}
const isFunction = (name: string): name is FunctionName => Object.hasOwn(arity, name)

/** @internal Recursive descent over the grammar; the first thing that does not fit is an error at its place. */
export function parse(text: string): Syntax {
  return new Parser(text).cascade()
}

class Parser {
  readonly #lines: string[]
  readonly #tokens: Token[]
  #at = 0
  #depth = 0
  #operators = 0

  constructor(text: string) {
    this.#lines = text.split('\n')
    this.#tokens = tokenize(text)
  }

  cascade(): Syntax {
    const syntax: Syntax = { ranks: [], splits: [], steps: [] }
    for (;;) {
      while (this.#peek().kind === 'break') this.#at++
      const token = this.#peek()
      if (token.kind === 'end') return syntax
      const next = this.#peek(1)
      if (token.text === 'rank' && next.kind === 'name') syntax.ranks.push(this.#rank())
      else if (token.text === 'split' && next.kind === 'name') syntax.splits.push(this.#split())
      else if (token.text === 'iterate' && next.kind === 'name') syntax.steps.push(this.#iterate())
      else syntax.steps.push(this.#statement())
      this.#endOfStatement()
    }
  }

  #peek(ahead = 0): Token {
    return this.#tokens[Math.min(this.#at + ahead, this.#tokens.length - 1)]!
  }

  #is(text: string): boolean {
    return this.#peek().text === text && this.#peek().kind !== 'break'
  }

  #take(text: string): boolean {
    if (!this.#is(text)) return false
    this.#at++
    return true
  }

  #unexpected(expected: string): HeddleError {
    const token = this.#peek()
    const before = this.#tokens[this.#at - 1]
    const line =
      before && token.kind !== 'name' && token.kind !== 'number' ? before.span[0] : token.span[0]
    const place = before && before.kind !== 'break' ? ` after '${this.#textBefore()}'` : ''
    return broken('CAS001', `line ${line}: expected ${expected}${place}`, token.span)
  }

  // What stands on the line before the current word, back to the start of the access or word that it belongs to
  #textBefore(): string {
    const last = this.#tokens[this.#at - 1]!
    let first = this.#at - 1
    if (last.text === ']' || last.text === ')') {
      const opening = last.text === ']' ? '[' : '('
      for (let depth = 0; first >= 0; first--) {
        if (this.#tokens[first]!.text === last.text) depth++
        if (this.#tokens[first]!.text === opening && --depth === 0) break
      }
      if (first > 0 && this.#tokens[first - 1]!.kind === 'name') first--
    }
    const start = this.#tokens[Math.max(first, 0)]!.span
    const end = last.span
    if (start[0] !== end[0]) return last.text
    return (this.#lines[end[0] - 1] ?? '').slice(start[1] - 1, end[1] - 1 + end[2])
  }

  #expect(text: string): Token {
    const token = this.#peek()
    if (!this.#take(text)) throw this.#unexpected(`'${text}'`)
    return token
  }

  #name(what: string): Token {
    const token = this.#peek()
    if (token.kind !== 'name') throw this.#unexpected(what)
    this.#checkName(token)
    this.#at++
    return token
  }

  #checkName({ text, span }: Token): void {
    if (text === 'where')
      throw broken('CAS001', `line ${span[0]}: 'where' begins a predicate and is no name`, span)
  }

  #variable(): string {
    const token = this.#name('an index variable')
    if (!isVariable(token.text)) {
      throw broken(
        'CAS001',
        `line ${token.span[0]}: '${token.text}' must start with a lower-case letter to be an index variable`,
        token.span,
      )
    }
    return token.text
  }

  #integer(): number {
    const token = this.#peek()
    if (token.kind !== 'number' || !/^\d{1,15}$/.test(token.text))
      throw this.#unexpected('an integer')
    this.#at++
    return Number(token.text)
  }

  #endOfStatement(): void {
    const { kind, text } = this.#peek()
    if (kind !== 'break' && kind !== 'end' && text !== '}')
      throw this.#unexpected('the end of the statement')
  }

  #rank(): Syntax['ranks'][number] {
    this.#at++
    const { text: name, span } = this.#name('a rank')
    this.#expect('=')
    const size = this.#take('?') ? undefined : this.#integer()
    return { name, size, span }
  }

  #split(): Split {
    const { span } = this.#expect('split')
    const variable = this.#variable()
    this.#expect('->')
    this.#expect('(')
    const outer = this.#variable()
    this.#expect(',')
    const inner = this.#variable()
    this.#expect(':')
    const size = this.#integer()
    if (size < 1)
      throw broken('CAS001', `line ${span[0]}: split sizes must be at least 1, got ${size}`, span)
    this.#expect(')')
    const tailMask = this.#take('tail')
    if (tailMask) this.#expect('mask')
    return { variable, outer, inner, size, tailMask, span }
  }

  #iterate(): Iteration {
    const { span } = this.#expect('iterate')
    const variable = this.#variable()
    this.#expect('{')
    const body: Statement[] = []
    for (;;) {
      while (this.#peek().kind === 'break') this.#at++
      if (this.#take('}')) return { variable, body, span }
      if (this.#peek().kind === 'end') throw this.#unexpected("'}'")
      body.push(this.#statement())
      this.#endOfStatement()
    }
  }

  #statement(): Statement {
    const first = this.#peek()
    this.#operators = 0
    const init = first.text === 'init' && this.#peek(1).kind === 'name'
    if (init) this.#at++
    const target = this.#name('a tensor')
    const out = this.#access(target)
    this.#expect('=')
    const reduce = this.#reducer()
    const expr = this.#expr()
    const where = this.#take('where') ? this.#predicate() : undefined
    const last = this.#tokens[this.#at - 1]!
    const text =
      first.span[0] === last.span[0]
        ? this.#lines[first.span[0] - 1]!.slice(first.span[1] - 1, last.span[1] - 1 + last.span[2])
        : this.#lines
            .slice(first.span[0] - 1, last.span[0])
            .join('\n')
            .trim()
    return {
      out,
      reduce,
      expr,
      where,
      init,
      src: { line: first.span[0], col: first.span[1], text },
    }
  }

  // `max(k)` in front of an expression binds variables; in `max(a, b)` the parenthesis is followed by no operand
  #reducer(): Statement['reduce'] {
    const token = this.#peek()
    if (token.kind !== 'name' || this.#peek(1).text !== '(') return undefined
    const known = reducers.includes(token.text)
    if (!known && isFunction(token.text)) return undefined
    let end = this.#at + 2
    const over: string[] = []
    for (; ; end++) {
      const name = this.#tokens[end]
      if (name?.kind !== 'name' || !isVariable(name.text)) return undefined
      over.push(name.text)
      const separator = this.#tokens[++end]
      if (separator?.text === ')') break
      if (separator?.text !== ',') return undefined
    }
    const following = this.#tokens[end + 1]!
    const operand =
      following.kind === 'name'
        ? following.text !== 'where'
        : following.kind === 'number' || following.text === '(' || following.text === '-'
    if (!operand) return undefined
    if (following.text === '-' && !known) return undefined
    if (!known) {
      throw broken(
        'CAS001',
        `line ${token.span[0]}: '${token.text}' is no reducer (${reducers.join(', ')})`,
        token.span,
      )
    }
    // max(a, b) - c is a function call: a reduction binds index variables, which stand in some bracket
    if (following.text === '-' && over.length > 1) return undefined
    this.#at = end + 1
    return { op: token.text as Reducer, over }
  }

  #deeper<T>(body: () => T): T {
    if (++this.#depth > depthLimit) {
      throw broken(
        'CAS001',
        `line ${this.#peek().span[0]}: expressions nest more than ${depthLimit} deep`,
        this.#peek().span,
      )
    }
    const result = body()
    this.#depth--
    return result
  }

  // The operator that stands here, if it is one of these
  #operator<const T extends string>(...known: readonly T[]): { op: T; span: Span } | undefined {
    const { text, span } = this.#peek()
    const op = known.find((one) => one === text)
    if (op === undefined) return undefined
    if (++this.#operators > operatorLimit) {
      const rule = `a statement has more than ${operatorLimit} operators; give parts of it names`
      throw broken('CAS001', `line ${span[0]}: ${rule}`, span)
    }
    this.#at++
    return { op, span }
  }

  #expr(): Expr {
    return this.#deeper(() => {
      let a = this.#term()
      for (;;) {
        const operator = this.#operator('+', '-')
        if (!operator) return a
        a = { kind: 'binary', a, b: this.#term(), ...operator }
      }
    })
  }

  #term(): Expr {
    let a = this.#factor()
    for (;;) {
      const operator = this.#operator('*', '/')
      if (!operator) return a
      a = { kind: 'binary', a, b: this.#factor(), ...operator }
    }
  }

  #factor(): Expr {
    const token = this.#peek()
    if (this.#take('-'))
      return this.#deeper(() => ({ kind: 'negate', x: this.#factor(), span: token.span }))
    if (this.#take('(')) {
      const inner = this.#expr()
      this.#expect(')')
      return inner
    }
    if (token.kind === 'number') {
      this.#at++
      return { kind: 'number', value: Number(token.text), span: token.span }
    }
    if (token.kind !== 'name') throw this.#unexpected('an operand')
    this.#checkName(token)
    this.#at++
    if (token.text === 'inf')
      return { kind: 'number', value: Number.POSITIVE_INFINITY, span: token.span }
    if (token.text === 'if' && this.#take('(')) {
      const test = this.#predicate()
      this.#expect(',')
      const yes = this.#expr()
      this.#expect(',')
      const no = this.#expr()
      this.#expect(')')
      return { kind: 'if', test, yes, no, span: token.span }
    }
    if (this.#is('(')) return this.#call(token)
    if (this.#is('[')) return this.#access(token)
    return { kind: 'name', name: token.text, span: token.span }
  }

  #call(token: Token): Expr {
    const fn = token.text
    if (reducers.includes(fn) && !isFunction(fn)) {
      const text = `'${fn}' begins a right-hand side, as in ${fn}(m) S[p,m], and takes all of it; give it a statement of its own`
      throw broken('CAS001', `line ${token.span[0]}: ${text}`, token.span)
    }
    if (!isFunction(fn)) {
      throw broken(
        'CAS001',
        `line ${token.span[0]}: '${fn}' is no function (${Object.keys(arity).join(', ')})`,
        token.span,
      )
    }
    this.#expect('(')
    const args = [this.#expr()]
    while (this.#take(',')) args.push(this.#expr())
    this.#expect(')')
    const wanted = arity[fn]
    if (args.length !== wanted) {
      throw broken(
        'CAS001',
        `line ${token.span[0]}: ${fn} takes ${wanted} argument${wanted > 1 ? 's' : ''}, got ${args.length}`,
        token.span,
      )
    }
    return { kind: 'call', fn, args, span: token.span }
  }

  #access(token: Token): Access {
    const indices: Index[] = []
    let length = token.span[2]
    if (this.#take('[')) {
      do indices.push(this.#index())
      while (this.#take(','))
      const close = this.#expect(']')
      if (close.span[0] === token.span[0]) length = close.span[1] + 1 - token.span[1]
    }
    return {
      kind: 'access',
      name: token.text,
      indices,
      span: [token.span[0], token.span[1], length],
    }
  }

  #index(): Index {
    if (this.#is('clamp') && this.#peek(1).text === '(') {
      this.#at += 2
      const expr = this.#expr()
      this.#expect(',')
      const least = this.#signedInteger()
      this.#expect(',')
      const most = this.#signedInteger()
      this.#expect(')')
      return { kind: 'clamp', expr, least, most }
    }
    if (this.#peek().kind === 'name' && this.#peek(1).text === '=') {
      const name = this.#variable()
      this.#at++
      return { kind: 'pin', name, value: this.#integer() }
    }
    return { kind: 'expr', expr: this.#expr() }
  }

  #signedInteger(): number {
    return this.#take('-') ? -this.#integer() : this.#integer()
  }

  #predicate(): Predicate {
    return this.#deeper(() => {
      let a = this.#conjunction()
      while (this.#operator('||')) a = { kind: 'or', a, b: this.#conjunction() }
      return a
    })
  }

  // Whether the parenthesis here groups comparisons rather than terms; those inside an if( belong to a term
  #holdsPredicate(): boolean {
    const plain: boolean[] = []
    for (let i = this.#at; i < this.#tokens.length; i++) {
      const { text } = this.#tokens[i]!
      if (text === '(') plain.push((plain.at(-1) ?? true) && this.#tokens[i - 1]?.text !== 'if')
      else if (text === ')') plain.pop()
      else if (plain.at(-1) && [...comparisons, '&&', '||', '!'].includes(text as '<')) return true
      if (plain.length === 0) return false
    }
    return false
  }

  #conjunction(): Predicate {
    let a = this.#test()
    while (this.#operator('&&')) a = { kind: 'and', a, b: this.#test() }
    return a
  }

  #test(): Predicate {
    if (this.#take('!')) return this.#deeper(() => ({ kind: 'not', x: this.#test() }))
    if (this.#is('(') && this.#holdsPredicate()) {
      this.#at++
      const inner = this.#deeper(() => this.#predicate())
      this.#expect(')')
      return inner
    }
    const a = this.#expr()
    const { text, span } = this.#peek()
    const op = comparisons.find((one) => one === text)
    if (!op) throw this.#unexpected('a comparison')
    this.#at++
    return { kind: 'compare', op, a, b: this.#expr(), span }
  }
}

function isVariable(name: string): boolean {
  return /^[a-z]/.test(name)
}
