import { execFileSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { cuda, type Device, graph, randn, silu } from 'heddle'
import { type Case, operators, suites } from './cases.js'
import { repeatsFor, summarise, timeRound } from './measure.js'
import { onnxruntime } from './peers/onnxruntime.js'
import { stopTorch, torch } from './peers/torch.js'
import { parseProblem } from './problem.js'

// npm run bench [-- problem or operator ...] [--device D] [--rounds N] [--out DIR]
// Ours and every peer that is present take turns, round by round, so that a clock that drifts drifts for all.

interface Row {
  case: string
  ms: number
  spread: number
  tflops: number
  gbps: number
  /** The time that the roofs measured in this run would allow, over the time taken. */
  roofShare: number
  error: number
  peers: Record<string, number>
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    device: { type: 'string' },
    rounds: { type: 'string' },
    out: { type: 'string' },
    json: { type: 'boolean' },
  },
})
const device = (values.device ?? (cuda.available ? 'cuda:0' : 'cpu')) as Device
const kind = device === 'cpu' ? 'cpu' : 'cuda'
const rounds = Number(values.rounds ?? 9)
const budget = kind === 'cpu' ? 200 : 50 // milliseconds a round
const threads = Number(process.env.HEDDLE_THREADS ?? availableParallelism())

function log(line: string): void {
  if (!values.json) process.stdout.write(`${line}\n`)
}

function make(text: string): Case {
  const problem = parseProblem(text)
  const operator = operators[problem.operator]
  if (!operator) throw new Error(`bench: no such operator, "${problem.operator}"`)
  const made = operator(problem, device)
  if (!problem.flags.has('graph')) return made
  const step = graph(made.run)
  const run = () => {
    step.replay()
    return []
  }
  return { ...made, run }
}

async function best(text: string): Promise<{ ms: number; made: Case }> {
  const made = make(text)
  const times = await repeatsFor(made.run, device, budget)
  let ms = Number.POSITIVE_INFINITY
  for (let i = 0; i < 5; i++) ms = Math.min(ms, await timeRound(made.run, device, times))
  return { ms, made }
}

// Enqueueing alone, in microseconds: the smallest operator there is, without waiting for it
async function enqueueCost(): Promise<number> {
  const x = randn([8], { seed: 1, device })
  let least = Number.POSITIVE_INFINITY
  for (let round = 0; round < 20; round++) {
    const started = performance.now()
    for (let i = 0; i < 500; i++) silu(x).dispose()
    least = Math.min(least, ((performance.now() - started) / 500) * 1000)
    await x.read()
  }
  return least
}

async function measure(text: string, roof: { copy: number; product: number }): Promise<Row> {
  const problem = parseProblem(text)
  const made = make(text)
  const error = await made.check()
  const times = await repeatsFor(made.run, device, budget)
  const peers =
    kind === 'cpu' ? await onnxruntime(problem, made.inputs, threads) : await torch(problem)
  const ours: number[] = []
  const theirs = peers.map((): number[] => [])
  for (let round = 0; round <= rounds; round++) {
    const own = await timeRound(made.run, device, times)
    for (const [i, peer] of peers.entries()) {
      const other = await peer.round(times)
      if (round > 0) theirs[i]!.push(other)
    }
    if (round > 0) ours.push(own) // the first one warms up
  }
  const { ms, spread } = summarise(ours)
  const least = Math.max(made.flops / roof.product, made.bytes / roof.copy) * 1000
  for (const input of made.inputs) input.dispose()
  return {
    case: problem.text,
    ms,
    spread,
    tflops: made.flops / ms / 1e9,
    gbps: made.bytes / ms / 1e6,
    roofShare: least / ms,
    error,
    peers: Object.fromEntries(peers.map(({ name }, i) => [name, summarise(theirs[i]!).ms])),
  }
}

async function main(): Promise<void> {
  const suite = suites[kind]
  const chosen =
    positionals.length === 0
      ? suite
      : positionals.flatMap((name) =>
          name.includes(':') ? [name] : suite.filter((text) => text.startsWith(`${name}:`)),
        )
  if (chosen.length === 0) throw new Error(`bench: nothing to run for ${positionals.join(', ')}`)

  const copy = await best(kind === 'cpu' ? 'copy:n33554432' : 'copy:n536870912')
  const wide = kind === 'cpu' ? 'linear:m1024 n1024 k1024 f32' : 'linear:m8192 n8192 k8192 bf16'
  const product = await best(wide)
  // the roof of products is the best that anything here reaches
  if (kind === 'cuda')
    for (const peer of await torch(parseProblem(wide)))
      product.ms = Math.min(product.ms, await peer.round(20))
  const roof = {
    copy: (copy.made.bytes / copy.ms) * 1000,
    product: (product.made.flops / product.ms) * 1000,
  }
  for (const input of [...copy.made.inputs, ...product.made.inputs]) input.dispose()
  const enqueueMicroseconds = await enqueueCost()
  const gpu = cuda.devices.find((one) => one.device === device)
  const name = gpu?.name ?? `${cpus()[0]?.model.trim()}, ${threads} threads`
  log(
    `${name}: copies at ${(roof.copy / 1e9).toFixed(1)} GB/s, a matrix product at ${(roof.product / 1e12).toFixed(3)} TFLOP/s, enqueue ${enqueueMicroseconds.toFixed(2)} µs`,
  )

  const rows: Row[] = []
  let commit = process.env.HEDDLE_COMMIT ?? 'unknown'
  try {
    commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim()
  } catch {
    // no checkout
  }
  const result = {
    device: name,
    driver: cuda.driver,
    node: process.version,
    date: new Date().toISOString().slice(0, 10),
    commit,
    copyTBps: roof.copy / 1e12,
    productTflops: roof.product / 1e12,
    enqueueMicroseconds,
    rows,
  }
  // after every row, so that what was measured outlasts an interruption
  const save = () => {
    if (!values.out) return
    mkdirSync(values.out, { recursive: true })
    const short = gpu ? (/\b([A-Z]\d+)\b/.exec(gpu.name)?.[1] ?? 'gpu').toLowerCase() : 'cpu'
    writeFileSync(join(values.out, `${short}.json`), `${JSON.stringify(result, null, 2)}\n`)
  }
  for (const text of chosen) {
    const row = await measure(text, roof)
    rows.push(row)
    save()
    const peers = Object.entries(row.peers).map(
      ([peer, ms]) => `, ${(ms / row.ms).toFixed(2)}x the speed of ${peer}`,
    )
    log(
      `${row.case}: ${row.ms.toFixed(4)} ms ±${(row.spread * 100).toFixed(1)} %, ${row.tflops.toFixed(3)} TFLOP/s, ${row.gbps.toFixed(1)} GB/s, ${(row.roofShare * 100).toFixed(0)} % of the roof, error ${row.error.toExponential(1)}${peers.join('')}`,
    )
  }
  if (values.json) process.stdout.write(`${JSON.stringify(result, null, 2)}\n`)
}

main()
  .catch((error: unknown) => {
    process.stderr.write(`${(error as Error).stack}\n`)
    process.exitCode = 1
  })
  .finally(stopTorch)
