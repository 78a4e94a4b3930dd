#!/usr/bin/env node
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { parseArgs } from 'node:util'
import { checkInteger, closest, mustBe, show } from './check.js'
import { analyzeFile, report } from './cli/analyze.js'
import { examine, findingLines } from './cli/doctor.js'
import { comparisonTable, type Evaluation, evaluate, evaluationTable } from './cli/eval.js'
import { chooseMechanism, mechanismOptions } from './cli/mechanisms.js'
import { chooseDevice, chooseDType, chooseNumber, loadModel } from './cli/model.js'
import { reportPage } from './cli/report.js'
import { table } from './cli/terminal.js'
import { cuda, type Device } from './device.js'
import { HeddleError, refuse } from './errors.js'
import { operatorSchemas } from './native.js'

const usage = `heddle: attention kernels for Node.js

  heddle doctor [--json]                   checks this machine, a remedy for what fails
  heddle info [--json]                     devices and operators
  heddle generate --model DIR --prompt TEXT [--max-tokens N] [--temperature T] [--seed N]
                  [--device D] [--dtype T] continues a text
  heddle eval --model DIR --set FILE:NAME [--limit N] [--device D] [--dtype T] [--json]
                                           bits per byte and recall on a set of texts
  heddle analyze FILE [--size M=8192,P=8192] [--scalar off=0] [--dtype T] [--machine NAME]
                  [--svg OUT] [--json]     passes, cost, kernel and rewrites of a cascade of einsums
  heddle eval … --attention MECHANISM      the same over what it selects, next to dense
  heddle report --model DIR --set FILE:NAME --out PAGE [--limit N] [--device D] [--dtype T]
                                           every mechanism on one page of HTML
  heddle bench [PROBLEM…] [--device D] [--rounds N] [--pause MS] [--out DIR] [--json]
                                           time, share of the roof and peers; a problem is a string such as
                                           'attention:b1 sq8192 sk8192 hq16 hk16 d128 bf16 causal' or the
                                           name of an operator; with a pause before every turn the clocks are
                                           those of a chip that has time to cool
  heddle --version | --help

MECHANISM is flex-prefill [--mode reference|coverage] [--gamma G] [--tau T] [--min-budget N]
[--max-budget N] [--block N], hip [--mode stages|fine|halves] [--top-k N] [--window N]
[--sink-tokens N] [--head-mode head|kv_group|all], with halves [--block N] [--stride N]
[--representative R], minference [--vertical N] [--slash N], sampled [--stride N] [--top-k N]
[--block N], streaming [--window N] [--sink-tokens N] or xattention [--stride N] [--threshold T]
[--block N].
D is cpu, cuda or cuda:N (the first GPU there is, else cpu); T is float32, float16 or bfloat16.
NAME is h200, h100, a100 or cpu.
`

// bench/ is compiled beside lib/
interface Bench {
  bench(options: {
    problems: readonly string[]
    device: Device
    rounds: number
    pause: number
    out: string | undefined
    log(line: string): void
    fail(line: string): void
  }): Promise<object>
}

type Values = Record<string, string | boolean | string[] | undefined>

const options = {
  model: { type: 'string' },
  prompt: { type: 'string' },
  set: { type: 'string' },
  limit: { type: 'string' },
  device: { type: 'string' },
  dtype: { type: 'string' },
  'max-tokens': { type: 'string' },
  temperature: { type: 'string' },
  seed: { type: 'string' },
  size: { type: 'string', multiple: true },
  scalar: { type: 'string', multiple: true },
  machine: { type: 'string' },
  svg: { type: 'string' },
  attention: { type: 'string' },
  out: { type: 'string' },
  rounds: { type: 'string' },
  pause: { type: 'string' },
  ...(Object.fromEntries(mechanismOptions.map((name) => [name, { type: 'string' }])) as Record<
    (typeof mechanismOptions)[number],
    { type: 'string' }
  >),
  json: { type: 'boolean' },
  help: { type: 'boolean', short: 'h' },
  version: { type: 'boolean', short: 'v' },
} as const

function text(values: Values, op: string, name: string): string | undefined
function text(values: Values, op: string, name: string, required: true): string
function text(values: Values, op: string, name: string, required = false): string | undefined {
  const value = values[name] as string | undefined
  if (value === undefined && required)
    throw refuse('ERR_ARGUMENT', op, name, `--${name} is missing`)
  return value
}

// `--size M=3 --size P=4` as `M=3,P=4`
const list = (values: Values, name: string): string | undefined =>
  (values[name] as string[] | undefined)?.join(',')

function integer(values: Values, op: string, name: string, least: number): number | undefined {
  const value = text(values, op, name)
  return value === undefined
    ? undefined
    : checkInteger(op, name, chooseNumber(op, name, value), least)
}

function print(line: string): void {
  process.stdout.write(`${line}\n`)
}

function version(): string {
  return JSON.parse(readFileSync(join(__dirname, '..', 'package.json'), 'utf8')).version
}

// The same numbers from the same seed (mulberry32)
function randomFrom(seed: number): () => number {
  let state = seed | 0
  return () => {
    state = (state + 0x6d2b79f5) | 0
    let mixed = Math.imul(state ^ (state >>> 15), 1 | state)
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32
  }
}

// What a command takes by name
const model = ['model', 'device', 'dtype']
const taken: Readonly<Record<string, readonly string[]>> = {
  doctor: ['json'],
  info: ['json'],
  generate: [...model, 'prompt', 'max-tokens', 'temperature', 'seed'],
  eval: [...model, 'set', 'limit', 'json', 'attention', ...mechanismOptions],
  analyze: ['size', 'scalar', 'dtype', 'machine', 'svg', 'json'],
  bench: ['device', 'rounds', 'pause', 'out', 'json'],
  report: [...model, 'set', 'limit', 'out'],
}

// How many words a command takes without a name; the others take none
const most: Readonly<Record<string, number>> = { analyze: 1, bench: Number.POSITIVE_INFINITY }

const commands: Record<string, (values: Values, words: readonly string[]) => Promise<number>> = {
  async doctor(values) {
    const findings = await examine()
    const failed = findings.some(({ status }) => status === 'FAIL')
    print(
      values.json
        ? JSON.stringify({ ok: !failed, version: version(), findings }, null, 2)
        : findingLines(findings),
    )
    return failed ? 1 : 0
  },

  async info(values) {
    const operators = operatorSchemas().map(({ name, cpu, cuda: gpu }) => ({
      name,
      cpu: cpu || null,
      cuda: gpu,
    }))
    const { available, reason, devices, driver, runtime } = cuda
    if (values.json) {
      const gpu = { available, reason: reason ?? null, devices, driver, runtime }
      print(
        JSON.stringify(
          { version: version(), node: process.version, cuda: gpu, operators },
          null,
          2,
        ),
      )
      return 0
    }
    print(`heddle ${version()}, Node.js ${process.version}`)
    print(
      available
        ? devices.map(({ device, name, arch }) => `${device}: ${name}, sm_${arch}`).join('\n')
        : `no GPU: ${reason?.text}`,
    )
    print('')
    print(
      table(
        ['operator', 'cpu', 'cuda'],
        operators.map((op) => [op.name, op.cpu ?? 'no', op.cuda ? 'yes' : 'no']),
      ),
    )
    return 0
  },

  async generate(values) {
    const op = 'generate'
    const device = chooseDevice(op, text(values, op, 'device'))
    const dtype = chooseDType(op, text(values, op, 'dtype'), device)
    const prompt = new TextEncoder().encode(text(values, op, 'prompt', true))
    if (prompt.length === 0)
      throw refuse('ERR_ARGUMENT', op, 'prompt', 'prompt must have at least one byte')
    const temperature = chooseNumber(op, 'temperature', text(values, op, 'temperature') ?? '0')
    if (!(temperature >= 0 && temperature < Number.POSITIVE_INFINITY))
      throw mustBe(op, 'temperature', 'a finite number from 0 on', temperature)
    const seed = integer(values, op, 'seed', 0)
    const maxTokens = integer(values, op, 'max-tokens', 1) ?? 256
    const { decoder, model } = await loadModel(op, text(values, op, 'model', true), {
      device,
      dtype,
    })
    process.stdout.write(prompt)
    const bytes = decoder.generate(model, prompt, {
      maxTokens,
      temperature,
      random: seed === undefined ? Math.random : randomFrom(seed),
    })
    for await (const byte of bytes) process.stdout.write(Uint8Array.of(byte))
    process.stdout.write('\n')
    return 0
  },

  async eval(values) {
    const op = 'eval'
    const name = text(values, op, 'attention')
    const settings = Object.fromEntries(mechanismOptions.map((key) => [key, text(values, op, key)]))
    const stray = mechanismOptions.find((key) => settings[key] !== undefined)
    if (name === undefined && stray !== undefined)
      throw refuse('ERR_ARGUMENT', op, stray, `--${stray} goes with --attention`)
    const mechanism = name === undefined ? undefined : chooseMechanism(op, name, settings)
    const asked = evaluationOptions(values, op)
    const evaluation = await evaluate(asked)
    if (!mechanism) {
      print(values.json ? JSON.stringify(evaluation, null, 2) : evaluationTable(evaluation))
      return 0
    }
    const sparse = await evaluate({ ...asked, mechanism })
    print(
      values.json
        ? JSON.stringify({ dense: evaluation, [mechanism.label]: sparse }, null, 2)
        : comparisonTable([
            ['dense', evaluation],
            [mechanism.label, sparse],
          ]),
    )
    return 0
  },

  async analyze(values, [file]) {
    const op = 'analyze'
    if (file === undefined) throw refuse('ERR_ARGUMENT', op, 'file', 'the file is missing')
    const result = await analyzeFile({
      file,
      sizes: list(values, 'size'),
      scalars: list(values, 'scalar'),
      dtype: text(values, op, 'dtype'),
      machine: text(values, op, 'machine'),
      svg: text(values, op, 'svg'),
    })
    const { analysis, plan } = result
    const kernel = plan instanceof HeddleError ? { refused: plan.message } : plan
    print(values.json ? JSON.stringify({ ...analysis, plan: kernel }, null, 2) : report(result))
    return 0
  },

  async bench(values, problems) {
    const op = 'bench'
    const { bench }: Bench = await import(pathToFileURL(join(__dirname, 'bench/run.js')).href)
    let failed = false
    const result = await bench({
      problems,
      device: chooseDevice(op, text(values, op, 'device')),
      rounds: integer(values, op, 'rounds', 1) ?? 9,
      pause: integer(values, op, 'pause', 0) ?? 0,
      out: text(values, op, 'out'),
      log: values.json ? () => {} : print,
      fail(line) {
        failed = true
        process.stderr.write(`${line}\n`)
      },
    })
    if (values.json) print(JSON.stringify(result, null, 2))
    return failed ? 1 : 0
  },

  async report(values) {
    const op = 'report'
    const out = text(values, op, 'out', true)
    const asked = evaluationOptions(values, op)
    // It takes long: a page that cannot be written is refused at once, and one that is not made leaves nothing
    const isNew = !existsSync(out)
    try {
      writeFileSync(out, '', { flag: 'a' })
      if (isNew) rmSync(out)
    } catch (cause) {
      const why = (cause as Error).message
      throw refuse('ERR_ARGUMENT', op, 'out', `cannot write ${show(out)} (${why})`)
    }
    const done: [string, Evaluation][] = [['dense', await evaluate(asked)]]
    for (const [name, settings] of reported) {
      const mechanism = chooseMechanism(op, name, settings)
      done.push([mechanism.label, await evaluate({ ...asked, mechanism, pictures: true })])
    }
    writeFileSync(out, reportPage(asked.set, done))
    print(comparisonTable(done))
    return 0
  },
}

// What a report compares
const reported: readonly (readonly [string, Record<string, string>])[] = [
  ['sampled', {}],
  ['hip', { 'top-k': '512', window: '512', 'sink-tokens': '64' }],
  ['hip', { mode: 'fine' }],
  ['flex-prefill', { mode: 'reference', gamma: '0.95', 'min-budget': '512' }],
  ['flex-prefill', { mode: 'coverage', gamma: '0.95', 'min-budget': '512' }],
  ['xattention', {}],
  ['minference', { vertical: '1000', slash: '1000' }],
  ['streaming', {}],
]

function evaluationOptions(values: Values, op: string) {
  return {
    model: text(values, op, 'model', true),
    set: text(values, op, 'set', true),
    limit: integer(values, op, 'limit', 1),
    device: text(values, op, 'device'),
    dtype: text(values, op, 'dtype'),
  }
}

async function main(args: string[]): Promise<number> {
  let parsed: { values: Values; positionals: string[] }
  try {
    parsed = parseArgs({ args, options, allowPositionals: true })
  } catch (error) {
    const [why = ''] = (error as Error).message.split(/\. |\.?\n/)
    const [, stray] = /^Unknown option '--([^']+)'$/.exec(why) ?? []
    const [command = ''] = args
    const known = Object.hasOwn(taken, command) ? taken[command]! : Object.keys(options)
    const near = stray && closest(stray, known)
    const [, bare] = /^Option '(--[^']+)' argument is ambiguous$/.exec(why) ?? []
    const dash = bare ? `; a value that starts with a dash is given as ${bare}=-1` : ''
    const hint = near ? `; did you mean --${near}?` : dash
    throw refuse('ERR_ARGUMENT', 'heddle', stray, `${why}${hint}`)
  }
  const { values, positionals } = parsed
  if (values.version) {
    print(version())
    return 0
  }
  const [name, ...more] = positionals
  if (values.help || name === undefined) {
    process.stdout.write(usage)
    return values.help ? 0 : 2
  }
  const command = Object.hasOwn(commands, name) ? commands[name] : undefined
  if (!command) {
    const near = closest(name, Object.keys(commands))
    const hint = near ? `; did you mean "${near}"?` : '; heddle --help lists them'
    throw refuse('ERR_ARGUMENT', 'heddle', 'command', `unknown command "${name}"${hint}`)
  }
  const stray = more[most[name] ?? 0]
  if (stray !== undefined)
    throw refuse('ERR_ARGUMENT', name, undefined, `unexpected argument "${stray}"`)
  const foreign = Object.keys(values).find((key) => !taken[name]!.includes(key))
  if (foreign !== undefined)
    throw refuse('ERR_ARGUMENT', name, foreign, `--${foreign} goes with another command`)
  return command(values, more)
}

// A reader that has seen enough, such as head, is no failure
process.stdout.on('error', ({ code, message }: NodeJS.ErrnoException) => {
  if (code === 'EPIPE') process.exit(0)
  process.stderr.write(`heddle: cannot write the output (${message})\n`)
  process.exit(1)
})

main(process.argv.slice(2)).then(
  (code) => {
    process.exitCode = code
  },
  (error: unknown) => {
    process.stderr.write(
      `${error instanceof HeddleError ? error.message : ((error as Error)?.stack ?? error)}\n`,
    )
    process.exitCode = error instanceof HeddleError && error.code === 'ERR_ARGUMENT' ? 2 : 1
  },
)
