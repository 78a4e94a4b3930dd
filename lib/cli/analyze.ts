import { readFile, writeFile } from 'node:fs/promises'
import type { Analysis } from '../cascade/analyze.js'
import { type Cascade, cascade } from '../cascade/index.js'
import type { PlanExplanation } from '../cascade/lower.js'
import type { MachineName } from '../cascade/machine.js'
import { checkInteger, mustBe, show } from '../check.js'
import type { DType } from '../dtype.js'
import { HeddleError, refuse } from '../errors.js'
import { drawing } from './drawing.js'
import { chooseNumber } from './model.js'
import { style, table } from './terminal.js'

const op = 'analyze'

/** @internal */
export interface AnalyzeFileOptions {
  file: string
  /** `M=8192,P=8192` */
  sizes?: string | undefined
  /** `off=0,scale=0.1` */
  scalars?: string | undefined
  dtype?: string | undefined
  machine?: string | undefined
  /** Where to write the dependency graph. */
  svg?: string | undefined
}

function pairs(
  argument: string,
  text: string | undefined,
  check: (name: string, value: number) => number = (_, value) => value,
): Record<string, number> {
  const values: Record<string, number> = {}
  for (const pair of text?.split(',') ?? []) {
    const [, name, value] = /^\s*(\w+)\s*=\s*(\S+)\s*$/.exec(pair) ?? []
    if (name === undefined || value === undefined)
      throw mustBe(op, argument, 'a list such as M=8192,P=4096', text)
    const number = check(name, chooseNumber(op, `${argument} ${name}`, value))
    const before = values[name] ?? number
    if (before !== number) throw mustBe(op, `${argument} ${name}`, `${before} as before`, number)
    values[name] = number
  }
  return values
}

/** @internal What `compile` finds: an operator, or the error that says why there is none. */
export type Found = Pick<PlanExplanation, 'operator' | 'slots' | 'refused'> | HeddleError

function find(parsed: Cascade): Found {
  try {
    const { operator, slots, refused } = parsed.compile().explain()
    return { operator, slots, refused }
  } catch (error) {
    if (error instanceof HeddleError) return error
    throw error
  }
}

async function write(svg: string, text: string): Promise<void> {
  try {
    await writeFile(svg, text)
  } catch (cause) {
    const why = (cause as Error).message
    throw refuse('ERR_ARGUMENT', op, 'svg', `cannot write ${show(svg)} (${why})`)
  }
}

/** @internal Reads a cascade from a file and analyses it; errors of the text name the file and the place. */
export async function analyzeFile(
  options: AnalyzeFileOptions,
): Promise<{ parsed: Cascade; analysis: Analysis; plan: Found }> {
  const { file, machine, dtype, svg } = options
  const sizes = pairs('size', options.sizes, (name, value) =>
    checkInteger(op, `size ${name}`, value, 0),
  )
  const scalars = pairs('scalar', options.scalars)
  let text: string
  try {
    // a byte order mark is no column
    text = (await readFile(file, 'utf8')).replace(/^\ufeff/, '')
  } catch (cause) {
    const why = (cause as Error).message
    throw refuse('ERR_ARGUMENT', op, 'file', `cannot read ${show(file)} (${why})`)
  }
  try {
    const parsed = cascade(text)
    const analysis = parsed.analyze({
      sizes,
      scalars,
      dtype: dtype as DType | undefined,
      machine: machine as MachineName | undefined,
    })
    if (svg !== undefined) await write(svg, drawing(parsed.ir, analysis))
    return { parsed, analysis, plan: find(parsed) }
  } catch (error) {
    if (!(error instanceof HeddleError) || !error.span) throw error
    const [line, column] = error.span
    const text = error.message.replace(/^cascade: /, '')
    throw new HeddleError(error.code, `${op}: ${file}:${line}:${column}: ${text}`, {
      op,
      argument: error.argument,
      span: error.span,
    })
  }
}

const prefixes = ['', 'k', 'M', 'G', 'T', 'P', 'E']

// 17 200 000 000 as 17.2 G
function short(value: number, unit = ''): string {
  if (Number.isNaN(value)) return '?'
  let [scaled, power] = [value, 0]
  while (scaled >= 1000 && power < prefixes.length - 1) {
    scaled /= 1000
    power++
  }
  const digits = scaled >= 100 || Number.isInteger(scaled) ? 0 : scaled >= 10 ? 1 : 2
  return `${scaled.toFixed(digits)} ${prefixes[power]}${unit}`.trimEnd()
}

function planLines(plan: Found): string[] {
  if (plan instanceof HeddleError)
    return [`kernel     none: ${plan.message.replace(/^cascade: /, '')}`]
  return [
    `kernel     ${plan.operator}`,
    ...Object.entries(plan.slots).map(([slot, text]) => `  ${slot.padEnd(10)}${text}`),
    ...plan.refused.map(
      ({ operator, einsum, reason }) => `  not ${operator}, whose form ${einsum} leaves: ${reason}`,
    ),
  ]
}

/** @internal The analysis for people: tables, reasons, the kernel, rewrites. */
export function report({
  parsed,
  analysis,
  plan,
}: Awaited<ReturnType<typeof analyzeFile>>): string {
  const { passes, flops, live, bytes, times, bound, fusionGroups, warnings, suggestions } = analysis
  const heading = (text: string) => style('bold', text)
  const lines: string[] = []
  const loopOf = (einsum: string) => fusionGroups.findIndex((names) => names.includes(einsum)) + 1

  lines.push(
    table(
      ['rank', 'passes', 'levels', 'over'],
      Object.entries(passes).map(([rank, { headline, perLevel, perTensor }]) => [
        rank,
        String(headline),
        Object.entries(perLevel)
          .map(([level, count]) => `${level}:${count}`)
          .join(' '),
        Object.entries(perTensor)
          .map(([tensor, count]) => `${tensor}:${count}`)
          .join(' '),
      ]),
    ),
    '',
    table(
      ['einsum', 'loop', 'unit', 'multiply, add', 'exp', 'other'],
      flops.map(({ einsum, unit, mulAdd, exp, other }) => [
        einsum,
        String(loopOf(einsum) || '-'),
        unit,
        short(mulAdd),
        short(exp),
        short(other),
      ]),
    ),
  )
  if (live.length > 0) {
    lines.push(
      '',
      table(
        ['live', 'kept as', 'bytes', 'formula'],
        live.map(({ tensor, reason, bytes: size, formula }) => [
          tensor,
          reason,
          short(size, 'B'),
          formula,
        ]),
      ),
    )
  }
  lines.push(
    '',
    `on chip    ${short(analysis.footprint, 'B')} for one block of rows`,
    `traffic    ${short(bytes.minimal, 'B')} at least, ${short(bytes.asWritten, 'B')} as written`,
    `intensity  ${short(analysis.intensity)} operations per byte`,
    bound === undefined
      ? `time       unknown without the sizes of ${parsed.ir.families.map(({ name }) => name).join(', ')} (--size)`
      : `time       ${analysis.timeLowerBoundUs.toPrecision(3)} us at least on ${analysis.machine}, bound by ${bound} (${Object.entries(
          times,
        )
          .map(([unit, time]) => `${unit} ${time.toPrecision(3)}`)
          .join(', ')})`,
  )
  for (const [rank, { headline, why }] of Object.entries(passes)) {
    if (why.length === 0) continue
    lines.push('', heading(`why ${rank} takes ${headline} passes`))
    why.forEach(({ from, via, to }, i) => lines.push(`  ${i + 2}. ${from}; ${via}; ${to}`))
  }
  lines.push('', ...planLines(plan))
  for (const { code, message, span } of warnings) {
    lines.push('', `${style('yellow', code)} line ${span[0]}: ${message}`)
  }
  for (const { rule, effect, rewritten } of suggestions) {
    lines.push('', heading(`${rule}: ${effect}`), rewritten.replace(/^/gm, '  '))
  }
  return lines.join('\n')
}
