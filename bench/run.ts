import { execFileSync } from 'node:child_process'
import { accessSync, constants, mkdirSync, writeFileSync } from 'node:fs'
import { availableParallelism, cpus } from 'node:os'
import { join } from 'node:path'
import { setTimeout } from 'node:timers/promises'
import {
  attention,
  cuda,
  type Device,
  explain,
  graph,
  HeddleError,
  randn,
  silu,
  synchronize,
  type Tensor,
} from 'heddle'
import { type Case, operators, suites } from './cases.js'
import { repeatsFor, summarise, timeCold, timeRound } from './measure.js'
import { onnxruntime } from './peers/onnxruntime.js'
import { stopTorch, torch } from './peers/torch.js'
import { errorBound, parseProblem, refuse } from './problem.js'

// Behind `heddle bench`. Ours and every peer that is present take turns, round by round, so that a clock that drifts drifts
// for all.

interface Row {
  case: string
  /** Back to back, with caches as they are. */
  ms: number
  spread: number
  /** One at a time, with nothing of it in any cache. */
  coldMs: number
  tflops: number
  gbps: number
  /** The time that the roofs measured in this run would allow, over the time taken. */
  roofShare: number
  /** Of the operations of everything, where the input decides what is done. */
  share?: number
  error: number
  peers: Record<string, number>
}

/** What to measure, and how. */
export interface BenchOptions {
  /** Problem strings, or names of operators for all that the suite has of them; none is the whole suite. */
  problems: readonly string[]
  device: Device
  rounds: number
  /** Milliseconds to wait before each turn of a few milliseconds, so that clocks are not those of a hot chip. */
  pause: number
  /** The folder for the results file. */
  out?: string | undefined
  /** Takes a line of text for people. */
  log(line: string): void
  /** Takes a line for each case that could not be measured or whose result is wrong. */
  fail(line: string): void
}

function parse(text: string) {
  const problem = parseProblem(text)
  const { operator } = problem
  const build = Object.hasOwn(operators, operator) ? operators[operator] : undefined
  if (build) return { problem, build }
  const names = Object.keys(operators).join(', ')
  throw refuse(`the operator of a problem must be one of ${names}, got "${operator}"`)
}

function prepare(text: string, device: Device): { made: Case; isGraph: boolean } {
  const { problem, build } = parse(text)
  const made = build(problem, device)
  const isGraph = problem.flags.has('graph')
  const [stray] = problem.unasked()
  if (stray !== undefined) {
    const taken = [...problem.asked].join(', ')
    throw refuse(`"${text}" has "${stray}", but ${problem.operator} takes ${taken}`)
  }
  return { made, isGraph }
}

const codes: readonly string[] = ['ERR_SHAPE', 'ERR_DTYPE', 'ERR_ARGUMENT', 'ERR_UNSUPPORTED']

// Refuses what the bench or the operator would refuse, without measuring
function validate(text: string, device: Device): void {
  try {
    const { made } = prepare(text, device)
    // a copy takes all sizes, and is nothing that can be explained
    if (parseProblem(text).operator !== 'copy') explain(made.run)
    for (const input of made.inputs) input.dispose()
  } catch (error) {
    if (!(error instanceof HeddleError && codes.includes(error.code)) || error.op === 'bench')
      throw error
    throw refuse(`"${text}" is refused (${error.message})`)
  }
}

function make(text: string, device: Device): Case {
  const { made, isGraph } = prepare(text, device)
  if (!isGraph) return made
  const step = graph(made.run)
  const run = () => {
    step.replay()
    return []
  }
  return { ...made, run }
}

const roundMilliseconds = (device: Device) => (device === 'cpu' ? 200 : 50)

async function best(text: string, device: Device): Promise<{ ms: number; made: Case }> {
  const made = make(text, device)
  const { times } = await repeatsFor(made.run, device, roundMilliseconds(device))
  let ms = Number.POSITIVE_INFINITY
  for (let i = 0; i < 5; i++) ms = Math.min(ms, await timeRound(made.run, device, times))
  for (const input of made.inputs) input.dispose()
  return { ms, made }
}

// Enqueueing alone, in microseconds of the JavaScript thread, without waiting for it
async function enqueueCost(run: () => Tensor[], device: Device): Promise<number> {
  let least = Number.POSITIVE_INFINITY
  for (let round = 0; round < 20; round++) {
    const started = performance.now()
    for (let i = 0; i < 500; i++) for (const made of run()) made.dispose()
    least = Math.min(least, ((performance.now() - started) / 500) * 1000)
    await synchronize(device)
  }
  return least
}

interface Roof {
  /** Bytes a second of a large copy. */
  copy: number
  /** Operations a second of a large matrix product. */
  product: number
}

async function measureRoof(device: Device): Promise<Roof> {
  const cpu = device === 'cpu'
  const copy = await best(cpu ? 'copy:n33554432' : 'copy:n536870912', device)
  const wide = cpu ? 'linear:m1024 n1024 k1024 f32' : 'linear:m8192 n8192 k8192 bf16'
  const product = await best(wide, device)
  // the roof of products is the best that anything here reaches
  if (!cpu)
    for (const peer of await torch(parseProblem(wide)))
      product.ms = Math.min(product.ms, await peer.round(20))
  return {
    copy: (copy.made.bytes / copy.ms) * 1000,
    product: (product.made.flops / product.ms) * 1000,
  }
}

async function measure(
  text: string,
  roof: Roof,
  { device, rounds, pause }: BenchOptions,
  threads: number,
): Promise<Row> {
  const problem = parseProblem(text)
  // steps of microseconds: a peer's process that holds the device, too, adds one to each, though it does nothing
  const alone = problem.flags.has('graph')
  if (alone) await stopTorch()
  const made = make(text, device)
  const error = await made.check()
  const share = await made.share?.()
  const flops = made.flops * (share ?? 1)
  const budget = pause > 0 ? 5 : roundMilliseconds(device)
  const { times, once } = await repeatsFor(made.run, device, budget)
  const peers = alone
    ? []
    : device === 'cpu'
      ? await onnxruntime(problem, made.inputs, threads)
      : await torch(problem)
  for (const [name, run] of Object.entries(made.others ?? {}))
    peers.push({ name, round: (times) => timeRound(run, device, times) })
  const ours: number[] = []
  const theirs = peers.map((): number[] => [])
  const few = (most: number) => Math.max(3, Math.min(most, Math.round(5000 / once))) // what takes long
  const first = { samples: ours, round: (n: number) => timeRound(made.run, device, n) }
  const others = peers.map(({ round }, i) => ({ samples: theirs[i]!, round }))
  // half as long before, unless it rests: clocks are to be its own, not those of what came before
  const before = pause > 0 || device === 'cpu' ? 0 : Math.floor(times / 2)
  for (let round = 0; round <= few(rounds); round++) {
    for (const turn of [first, ...others]) {
      if (pause > 0) await setTimeout(pause)
      if (before > 0) await turn.round(before)
      const sample = await turn.round(times)
      if (round > 0) turn.samples.push(sample) // the first one warms up
    }
    others.reverse() // each comes behind each of the others as often
  }
  const { ms, spread } = summarise(ours)
  const coldMs = summarise(await timeCold(made.run, device, few(2 * rounds))).ms
  const least = Math.max(flops / roof.product, made.bytes / roof.copy) * 1000
  for (const input of made.inputs) input.dispose()
  return {
    case: problem.text,
    ms,
    spread,
    coldMs,
    tflops: flops / ms / 1e9,
    gbps: made.bytes / ms / 1e6,
    roofShare: least / ms,
    ...(share !== undefined && { share }),
    error,
    peers: Object.fromEntries(peers.map(({ name }, i) => [name, summarise(theirs[i]!).ms])),
  }
}

// A build that was taken elsewhere says itself what it was built from
function commitHere(): string {
  if (process.env.HEDDLE_COMMIT) return process.env.HEDDLE_COMMIT
  try {
    return execFileSync('git', ['rev-parse', '--short', 'HEAD'], {
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'ignore'],
    }).trim()
  } catch {
    return 'unknown' // no checkout
  }
}

/** Measures problems and returns what a results file holds. */
export async function bench(options: BenchOptions): Promise<object> {
  const { device, log, fail, problems, pause, out } = options
  const suite = suites[device === 'cpu' ? 'cpu' : 'cuda']
  const chosen =
    problems.length === 0
      ? suite
      : problems.flatMap((name) => {
          if (name.includes(':')) return [name]
          const found = suite.filter((text) => text.startsWith(`${name}:`))
          if (found.length > 0) return found
          const names = [...new Set(suite.map((text) => text.slice(0, text.indexOf(':'))))]
          throw refuse(
            `a problem must be operator:sizes or one of ${names.join(', ')}, got "${name}"`,
          )
        })
  for (const text of chosen) parse(text)
  const gpu = cuda.devices.find((one) => one.device === device)
  if (out !== undefined)
    try {
      mkdirSync(out, { recursive: true })
      accessSync(out, constants.W_OK)
    } catch (cause) {
      throw refuse(
        `out must be a folder that can be written, got "${out}" (${(cause as Error).message})`,
      )
    }
  // what is wrong with one of several comes out before any is measured
  for (const text of problems) if (text.includes(':')) validate(text, device)
  // as the addon reads it
  const wanted = Number.parseInt(process.env.HEDDLE_THREADS ?? '', 10)
  const threads = Math.min(wanted > 0 ? wanted : availableParallelism(), 256)
  const name = gpu?.name ?? `${cpus()[0]?.model.trim()}, ${threads} threads`
  try {
    const roof = await measureRoof(device)
    const small = randn([8], { seed: 1, device })
    const enqueueMicroseconds = await enqueueCost(() => [silu(small)], device)
    const [q, k, v] = [1, 2, 3].map((seed) =>
      randn([1, 16, 8, 64], { seed, device, dtype: 'bfloat16' }),
    )
    const attentionMicroseconds = await enqueueCost(() => {
      const { out, lse } = attention(q!, k!, v!)
      return [out, lse]
    }, device)
    log(
      `${name}: copies at ${(roof.copy / 1e9).toFixed(1)} GB/s, a matrix product at ${(roof.product / 1e12).toFixed(3)} TFLOP/s, enqueueing the smallest operator takes ${enqueueMicroseconds.toFixed(2)} µs, attention ${attentionMicroseconds.toFixed(2)} µs`,
    )
    const rows: Row[] = []
    const result = {
      device: name,
      driver: cuda.driver,
      node: process.version,
      date: new Date().toISOString().slice(0, 10),
      commit: commitHere(),
      ...(pause > 0 && { pauseMilliseconds: pause }),
      copyTBps: roof.copy / 1e12,
      productTflops: roof.product / 1e12,
      enqueueMicroseconds,
      attentionMicroseconds,
      rows,
    }
    for (const text of chosen) {
      let row: Row
      try {
        row = await measure(text, roof, options, threads)
      } catch (error) {
        const why = error instanceof HeddleError ? error.message : (error as Error)?.stack
        fail(`bench: "${text}" failed (${why})`)
        continue
      }
      rows.push(row)
      // after every row, so that what was measured outlasts an interruption
      if (out !== undefined) {
        const short = gpu ? (/\b([A-Z]\d+)\b/.exec(gpu.name)?.[1] ?? 'gpu').toLowerCase() : 'cpu'
        writeFileSync(join(out, `${short}.json`), `${JSON.stringify(result, null, 2)}\n`)
      }
      const peers = Object.entries(row.peers).map(
        ([peer, ms]) => `, ${(ms / row.ms).toFixed(2)}x the speed of ${peer}`,
      )
      log(
        `${row.case}: ${row.ms.toFixed(4)} ms ±${(row.spread * 100).toFixed(1)} %, cold ${row.coldMs.toFixed(4)} ms, ${row.tflops.toFixed(3)} TFLOP/s, ${row.gbps.toFixed(1)} GB/s, ${(row.roofShare * 100).toFixed(0)} % of the roof,${row.share === undefined ? '' : ` ${(100 * row.share).toFixed(1)} % of all,`} error ${row.error.toExponential(1)}${peers.join('')}`,
      )
      const bound = errorBound(parseProblem(text))
      if (!(row.error < bound))
        fail(`bench: the error of "${row.case}" must be below ${bound}, got ${row.error}`)
    }
    return result
  } finally {
    await stopTorch()
  }
}
