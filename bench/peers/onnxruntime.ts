import { createRequire } from 'node:module'
import type { Tensor } from 'heddle'
import type { Problem } from '../problem.js'
import type { Peer } from './peer.js'

// The same attention in onnxruntime-node, when somebody installed it beside us. Its model is a single node, written here
// as the few protobuf fields that it needs.

const text = new TextEncoder()

function varint(value: number): number[] {
  const bytes: number[] = []
  let rest = value
  for (; rest >= 128; rest = Math.floor(rest / 128)) bytes.push((rest % 128) + 128)
  return [...bytes, rest]
}
const integer = (field: number, value: number) => [...varint(field * 8), ...varint(value)]
const bytes = (field: number, value: ArrayLike<number>) => [
  ...varint(field * 8 + 2),
  ...varint(value.length),
  ...Array.from(value),
]
const string = (field: number, value: string) => bytes(field, text.encode(value))

const integerAttribute = (name: string, value: number) =>
  bytes(5, [...string(1, name), ...integer(3, value), ...integer(20, 2)])

// A float tensor without fixed sizes
const float = (field: number, name: string, rank: number) => {
  const dimensions = Array.from({ length: rank }, (_, i) =>
    bytes(1, string(2, `${name}${i}`)),
  ).flat()
  return bytes(field, [
    ...string(1, name),
    ...bytes(2, bytes(1, [...integer(1, 1), ...bytes(2, dimensions)])),
  ])
}

function model(heads: number, causal: boolean): Uint8Array {
  const node = [
    ...string(1, 'q'),
    ...string(1, 'k'),
    ...string(1, 'v'),
    ...string(2, 'out'),
    ...string(4, 'MultiHeadAttention'),
    ...integerAttribute('num_heads', heads),
    ...integerAttribute('unidirectional', causal ? 1 : 0),
    ...string(7, 'com.microsoft'),
  ]
  const graph = [
    ...bytes(1, node),
    ...string(2, 'attention'),
    ...['q', 'k', 'v'].flatMap((name) => float(11, name, 3)),
    ...float(12, 'out', 3),
  ]
  const opset = (domain: string, version: number) =>
    bytes(8, [...string(1, domain), ...integer(2, version)])
  return Uint8Array.from([
    ...integer(1, 8),
    ...bytes(7, graph),
    ...opset('', 17),
    ...opset('com.microsoft', 1),
  ])
}

interface Session {
  run(feeds: Record<string, unknown>): Promise<Record<string, { data: Float32Array }>>
}
interface Runtime {
  Tensor: new (type: 'float32', data: Float32Array, dims: readonly number[]) => unknown
  InferenceSession: { create(model: Uint8Array, options: object): Promise<Session> }
}

function find(): Runtime | undefined {
  for (const from of [
    `${process.cwd()}/`,
    __filename,
    ...(process.env.HEDDLE_PEERS ? [`${process.env.HEDDLE_PEERS}/`] : []),
  ]) {
    try {
      return createRequire(from)('onnxruntime-node') as Runtime
    } catch {
      // not there
    }
  }
  return undefined
}

/** onnxruntime's way to run a problem, where it has one. */
export async function onnxruntime(
  problem: Problem,
  inputs: readonly Tensor[],
  threads: number,
): Promise<Peer[]> {
  if (problem.operator !== 'attention' || problem.dtype !== 'float32') return []
  // it knows dense softmax alone, and no grouped heads
  const foreign = [
    ...['sigmoid', 'bias', 'slopes', 'softCap', 'reweighted', 'e4m3'],
    ...['window', 'blocks', 'page', 'ragged'],
  ]
  if (foreign.some(problem.has)) return []
  if (problem.size('hq') !== problem.size('hk', problem.size('hq'))) return []
  const runtime = find()
  if (!runtime) return []
  const session = await runtime.InferenceSession.create(
    model(problem.size('hq'), problem.flags.has('causal')),
    {
      intraOpNumThreads: threads,
      interOpNumThreads: 1,
      graphOptimizationLevel: 'all',
      executionProviders: ['cpu'],
    },
  )
  const feeds: Record<string, unknown> = {}
  for (const [i, name] of ['q', 'k', 'v'].entries()) {
    const input = inputs[i]! as Tensor<'float32'>
    const [b, s, h, d] = input.shape as [number, number, number, number]
    feeds[name] = new runtime.Tensor('float32', await input.read(), [b, s, h * d])
  }
  const round = async (times: number) => {
    const started = performance.now()
    for (let i = 0; i < times; i++) await session.run(feeds)
    return (performance.now() - started) / times
  }
  return [{ name: 'onnxruntime', round }]
}
