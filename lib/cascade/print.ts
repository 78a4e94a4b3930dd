import type { Access, CascadeIR, Expr, Index, Predicate, Statement } from './ir.js'

const precedence = { '+': 1, '-': 1, '*': 2, '/': 2 } as const

/** @internal */
export function printExpr(expr: Expr, outer = 0): string {
  switch (expr.kind) {
    case 'number':
      return expr.value === Number.POSITIVE_INFINITY ? 'inf' : String(expr.value)
    case 'name':
      return expr.name
    case 'access':
      return printAccess(expr)
    case 'negate':
      return `-${printExpr(expr.x, 3)}`
    case 'call':
      return `${expr.fn}(${expr.args.map((arg) => printExpr(arg)).join(', ')})`
    case 'if':
      return `if(${printPredicate(expr.test)}, ${printExpr(expr.yes)}, ${printExpr(expr.no)})`
    case 'binary': {
      const level = precedence[expr.op]
      const text = `${printExpr(expr.a, level)} ${expr.op} ${printExpr(expr.b, level + 1)}`
      return level < outer ? `(${text})` : text
    }
  }
}

function printIndex(index: Index): string {
  if (index.kind === 'pin') return `${index.name}=${index.value}`
  if (index.kind === 'clamp')
    return `clamp(${printExpr(index.expr)}, ${index.least}, ${index.most})`
  return printExpr(index.expr).replace(/^([a-z]\w*) \+ 1$/, '$1+1')
}

function printAccess({ name, indices }: Access): string {
  return indices.length === 0 ? name : `${name}[${indices.map(printIndex).join(',')}]`
}

/** @internal */
export function printPredicate(predicate: Predicate, outer = 0): string {
  switch (predicate.kind) {
    case 'compare':
      return `${printExpr(predicate.a)} ${predicate.op} ${printExpr(predicate.b)}`
    case 'not':
      return `!(${printPredicate(predicate.x)})`
    default: {
      const level = predicate.kind === 'and' ? 2 : 1
      const operator = predicate.kind === 'and' ? '&&' : '||'
      const text = `${printPredicate(predicate.a, level)} ${operator} ${printPredicate(predicate.b, level + 1)}`
      return level < outer ? `(${text})` : text
    }
  }
}

function printStatement({ out, reduce, expr, where, init }: Statement): string {
  const over = reduce && reduce.over.length > 0 ? `${reduce.op}(${reduce.over.join(',')}) ` : ''
  // After several variables a minus would be taken for a subtraction from max(a, b)
  const body = printExpr(expr)
  const value = over !== '' && body.startsWith('-') ? `(${body})` : body
  const limit = where ? `   where ${printPredicate(where)}` : ''
  return `${init ? 'init ' : ''}${printAccess(out)} = ${over}${value}${limit}`
}

/** @internal The cascade as text that parses back to itself. */
export function print({
  ranks,
  splits,
  steps,
}: Pick<CascadeIR, 'ranks' | 'splits' | 'steps'>): string {
  const lines: string[] = []
  for (const [name, size] of ranks) lines.push(`rank ${name} = ${size ?? '?'}`)
  for (const { variable, outer, inner, size, tailMask } of splits) {
    lines.push(`split ${variable} -> (${outer}, ${inner} : ${size})${tailMask ? ' tail mask' : ''}`)
  }
  for (const step of steps) {
    if ('body' in step)
      lines.push(
        `iterate ${step.variable} {`,
        ...step.body.map((one) => `  ${printStatement(one)}`),
        '}',
      )
    else lines.push(printStatement(step))
  }
  return lines.join('\n')
}
