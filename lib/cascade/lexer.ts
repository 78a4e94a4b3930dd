import { broken } from './error.js'
import type { Span } from './ir.js'

/** @internal */
export interface Token {
  kind: 'name' | 'number' | 'symbol' | 'end' | 'break'
  text: string
  span: Span
}

const pattern =
  /(?<space>[ \t\r\ufeff]+|#[^\n]*)|(?<line>[\n;])|(?<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)|(?<name>[A-Za-z_][A-Za-z0-9_]*)|(?<symbol>->|<=|>=|==|!=|&&|\|\||[-+*/=<>!()[\]{},:?])/y

/** @internal Words of a cascade. Ends of lines and semicolons separate statements, except inside brackets. */
export function tokenize(text: string): Token[] {
  const tokens: Token[] = []
  let [line, start, depth] = [1, 0, 0]
  pattern.lastIndex = 0
  while (pattern.lastIndex < text.length) {
    const at = pattern.lastIndex
    const column = at - start + 1
    const match = pattern.exec(text)
    if (!match?.groups) {
      const character = String.fromCodePoint(text.codePointAt(at)!)
      throw broken('CAS001', `line ${line}: unexpected '${character}'`, [
        line,
        column,
        character.length,
      ])
    }
    const { space, line: separator, number, name, symbol } = match.groups
    if (space !== undefined) continue
    const word = match[0]
    const span: Span = [line, column, word === '\n' ? 0 : word.length]
    if (separator !== undefined) {
      if (depth === 0) tokens.push({ kind: 'break', text: word, span })
      if (word === '\n') {
        line++
        start = pattern.lastIndex
      }
      continue
    }
    // names are keys of what a caller passes and gets
    if (name !== undefined && name in Object.prototype)
      throw broken('CAS001', `line ${line}: '${name}' cannot be a name`, span)
    if (symbol === '(' || symbol === '[') depth++
    if (symbol === ')' || symbol === ']') depth = Math.max(0, depth - 1)
    const kind = number !== undefined ? 'number' : name !== undefined ? 'name' : 'symbol'
    tokens.push({ kind, text: word, span })
  }
  tokens.push({ kind: 'end', text: '', span: [line, text.length - start + 1, 0] })
  return tokens
}
