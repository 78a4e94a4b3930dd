import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'

const folder = join(import.meta.dirname, '../../build/isa')
const objects = existsSync(folder) ? readdirSync(folder).filter((file) => file.endsWith('.o')) : []

function binutil(tool: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(tool, args, { encoding: 'utf8', maxBuffer: 1 << 30 })
  if (status !== 0) throw new Error(`${tool} failed: ${stderr}`)
  return stdout
}

const missing =
  spawnSync('nm', ['--version']).status !== 0
    ? 'nm is not installed'
    : objects.length === 0
      ? 'this build has one instruction set'
      : undefined

// What runs on every machine must not meet an instruction that only some have
describe.skipIf(missing)(`instruction sets${missing ? ` (skipped: ${missing})` : ''}`, () => {
  it.each(objects)(
    '%s offers the linker no symbol, so no inline function of it runs elsewhere',
    (file) => {
      const symbols = binutil(
        'nm',
        '--defined-only',
        '--extern-only',
        '--demangle',
        join(folder, file),
      )
      expect(symbols.trim()).toBe('')
    },
  )

  it.each(objects)('%s asks for the instruction set before it uses it', (file) => {
    const starts = startOf(
      binutil('objdump', '-dr', '--no-show-raw-insn', '-M', 'intel', join(folder, file)),
    )
    expect(starts.length).toBeGreaterThan(0)
    for (const { name, instructions } of starts)
      for (const instruction of instructions)
        expect(instruction, name).not.toMatch(
          /^v[a-z0-9]+\s|[yz]mm\d|^(rorx|mulx|shlx|shrx|sarx|pdep|pext|bzhi|andn)\s/,
        )
  })
})

interface Start {
  name: string
  instructions: string[]
}

const relocated = /^R_\S+\s+(\S+?)(?:[-+]0x[0-9a-f]+)?$/

// The instructions of each static initialiser; of the functions that it calls, those up to the first call of best_isa
function startOf(listing: string): Start[] {
  const functions = new Map<string, string[]>()
  let body: string[] = []
  for (const line of listing.split('\n')) {
    const header = /^[0-9a-f]+ <(.+)>:$/.exec(line)
    if (header) {
      body = []
      functions.set(header[1]!, body)
    } else if (/^\s+[0-9a-f]+:/.test(line)) body.push(line.replace(/^\s+[0-9a-f]+:\s+/, ''))
  }
  const walk = (name: string, into: string[], seen: Set<string>): void => {
    if (seen.has(name)) return
    seen.add(name)
    const lines = functions.get(name) ?? []
    for (const [i, line] of lines.entries()) {
      const relocation = relocated.exec(line)?.[1]
      if (seen.size > 1 && relocation?.includes('best_isa')) return
      // The target of a call or jump stands in the relocation under it, else in the instruction itself
      const target = /^(?:call|jmp)\s+[0-9a-f]+ <([^+>]+)/.exec(line)?.[1]
      const callee = target && (relocated.exec(lines[i + 1] ?? '')?.[1] ?? target)
      if (callee && functions.has(callee)) walk(callee, into, seen)
      if (!relocation) into.push(line)
    }
  }
  return [...functions.keys()]
    .filter((name) => name.startsWith('_GLOBAL__sub_I'))
    .map((name) => {
      const instructions: string[] = []
      walk(name, instructions, new Set())
      return { name, instructions }
    })
}
