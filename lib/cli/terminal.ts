import { styleText } from 'node:util'

// Data goes to stdout, everything for people's eyes while they wait goes to stderr and only to a terminal.

type Style = Parameters<typeof styleText>[0]

/** @internal Text in a style where stdout shows it. */
export function style(format: Style, text: string): string {
  const forced = process.env.FORCE_COLOR !== undefined && process.env.FORCE_COLOR !== '0'
  const wanted = forced || (process.stdout.isTTY && !process.env.NO_COLOR)
  return wanted ? styleText(format, text) : text
}

/** @internal Columns aligned, numbers to the right, a rule under the head. */
export function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const widths = head.map((title, i) =>
    Math.max(title.length, ...rows.map((row) => row[i]?.length ?? 0)),
  )
  const right = head.map((_, i) => rows.every((row) => /^[-\d.,/% x]*$/.test(row[i] ?? '')))
  const line = (cells: readonly string[]) =>
    widths
      .map((width, i) =>
        right[i] ? (cells[i] ?? '').padStart(width) : (cells[i] ?? '').padEnd(width),
      )
      .join('  ')
      .trimEnd()
  return [
    style('bold', line(head)),
    widths.map((width) => '─'.repeat(width)).join('  '),
    ...rows.map(line),
  ].join('\n')
}

/** @internal One line on stderr that replaces itself; nothing where stderr is no terminal. */
export function progress(
  total: number,
  unit: string,
): { advance(done: number): void; end(): void } {
  const started = performance.now()
  const show = process.stderr.isTTY
  return {
    advance(done) {
      if (!show) return
      const share = total === 0 ? 1 : done / total
      const left =
        done === 0
          ? ''
          : `, ${Math.ceil(((performance.now() - started) / 1000) * (1 / share - 1))} s left`
      const bar = '█'.repeat(Math.round(share * 24)).padEnd(24, '░')
      process.stderr.write(`\r\x1b[2K${bar} ${done} of ${total} ${unit}${left}`)
    },
    end() {
      if (show) process.stderr.write('\r\x1b[2K')
    },
  }
}
