import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import type { Problem } from '../problem.js'
import type { Peer } from './peer.js'

// PyTorch's attention backends and matrix product, when a python3 with torch and a GPU is there. One process serves problem
// after problem, until it is stopped; rounds alternate with ours.

interface Service {
  process: ChildProcess
  ask(request: object): Promise<unknown>
}

let service: Promise<Service | undefined> | undefined

function start(): Promise<Service | undefined> {
  const script = join(__dirname, '../../../bench', 'peers', 'torch_kernels.py')
  const child = spawn('python3', [script], { stdio: ['pipe', 'pipe', 'ignore'] })
  const waiting: ((answer: unknown) => void)[] = []
  let ended = false
  const end = () => {
    ended = true
    for (const resolve of waiting.splice(0)) resolve(undefined)
  }
  child.on('error', end)
  child.on('exit', end)
  child.stdin.on('error', end)
  createInterface({ input: child.stdout }).on('line', (line) => waiting.shift()?.(JSON.parse(line)))
  const ask = (request: object) =>
    new Promise<unknown>((resolve) => {
      if (ended) return resolve(undefined)
      waiting.push(resolve)
      child.stdin.write(`${JSON.stringify(request)}\n`)
    })
  return ask({ operator: 'none' }).then((answer) => (answer ? { process: child, ask } : undefined))
}

/** PyTorch's ways to run a problem. */
export async function torch(problem: Problem): Promise<Peer[]> {
  // it has no keys of different numbers, and none of its kernels that we ask has a soft cap
  if (problem.has('ragged') || problem.has('softCap')) return []
  service ??= start()
  const running = await service
  if (!running) return []
  const { operator, dtype, size } = problem
  const optional = (name: string, fallback = 0) => size(name, fallback)
  const answer = (await running.ask({
    operator,
    dtype,
    ...Object.fromEntries(
      ['causal', 'sigmoid', 'bias', 'slopes', 'reweighted'].map((flag) => [
        flag,
        problem.flags.has(flag),
      ]),
    ),
    ...Object.fromEntries(
      ['b', 'sq', 'sk', 'hq', 'd', 'm', 'n', 'k', 'window', 'blocks', 'top'].map((name) => [
        name,
        optional(name),
      ]),
    ),
    density: problem.share('density'),
    hk: optional('hk', optional('hq')),
    dv: optional('dv', optional('d')),
  })) as Record<string, string | null> | undefined
  return Object.entries(answer ?? {})
    .filter(([, refusal]) => refusal === null)
    .map(([name]) => ({
      name,
      round: async (times) =>
        ((await running.ask({ round: name, times })) as number | undefined) ?? Number.NaN,
    }))
}

/** Ends the process that serves the rounds; the next problem starts another one. */
export async function stopTorch(): Promise<void> {
  const running = await service
  service = undefined
  if (running?.process.kill()) await once(running.process, 'exit')
}
