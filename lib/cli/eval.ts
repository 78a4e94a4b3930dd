import { mustBe, show } from '../check.js'
import { refuse } from '../errors.js'
import { type HostMask, readMask } from '../mask-rows.js'
import { attention } from '../ops/attention.js'
import { openSafetensors, type SafetensorsFile } from '../safetensors.js'
import type { Mechanism } from './mechanisms.js'
import { type Attend, chooseDevice, chooseDType, loadModel } from './model.js'
import { progress, table } from './terminal.js'

/** @internal */
export interface EvalOptions {
  model: string
  set: string
  limit?: number | undefined
  device?: string | undefined
  dtype?: string | undefined
  /** What attends in the softmax layers; dense if left out. */
  mechanism?: Mechanism | undefined
  /** Whether to draw the masks of the first sequence. */
  pictures?: boolean | undefined
}

interface Recall {
  hits: number
  total: number
}

/** @internal What `heddle eval --json` prints. */
export interface Evaluation {
  bitsPerByte: number
  recall: Recall
  seconds: number
  tokensPerSecond: number
  /** Visible pairs over causal pairs, the mean over layers and sequences; 1 if dense. */
  density: number
  /** A picture per softmax layer and head, where they were asked for. */
  pictures?: string[][]
  perSequence: { bitsPerByte: number; recall: Recall; seconds: number }[]
}

async function readAnswers(
  file: SafetensorsFile,
  name: string,
  [sequences, length]: readonly [number, number],
): Promise<Map<number, number[]>> {
  const answers = new Map<number, number[]>()
  if (!file.entries.has(name)) return answers
  const pairs = await file.load(name)
  if (pairs.dtype !== 'int32' || pairs.rank !== 2 || pairs.shape[1] !== 2) {
    throw refuse('ERR_SHAPE', 'eval', 'set', `${name} must be int32 [n, 2], got ${pairs}`)
  }
  const values = (await pairs.read()) as Int32Array
  pairs.dispose()
  for (let i = 0; i < values.length; i += 2) {
    const [sequence, position] = [values[i]!, values[i + 1]!]
    if (!(sequence >= 0 && sequence < sequences && position >= 0 && position < length)) {
      const text = `${name} must be of ${sequences} sequences of ${length} bytes, got [${sequence}, ${position}]`
      throw refuse('ERR_ARGUMENT', 'eval', 'set', text)
    }
    answers.set(sequence, [...(answers.get(sequence) ?? []), position])
  }
  return answers
}

// Attention over what a mechanism selects. Masks are read as they are made, and looked at when no time is taken.
function attendTo({ select }: Mechanism, masks: Promise<HostMask>[]): Attend {
  return (q, k, v) => {
    const mask = select(q, k)
    masks.push(readMask(mask))
    return attention(q, k, v, { mask }).out
  }
}

/** @internal Evaluates a model on a set, one sequence in memory at a time. */
export async function evaluate(options: EvalOptions): Promise<Evaluation> {
  const colon = options.set.lastIndexOf(':')
  if (colon <= 0) throw mustBe('eval', 'set', 'FILE:NAME', options.set)
  const [path, name] = [options.set.slice(0, colon), options.set.slice(colon + 1)]
  const device = chooseDevice('eval', options.device)
  const dtype = chooseDType('eval', options.dtype, device)
  const file = await openSafetensors(path)
  try {
    const ids = file.entries.get(`${name}.ids`)
    if (!ids) {
      const sets = [...file.entries.keys()]
        .filter((key) => key.endsWith('.ids'))
        .map((key) => key.slice(0, -4))
      throw refuse(
        'ERR_ARGUMENT',
        'eval',
        'set',
        `${path} has no set ${show(name)}; it has ${sets.join(', ') || 'none'}`,
      )
    }
    const [sequences = 0, length = 0] = ids.shape
    if (ids.dtype !== 'uint8' || ids.shape.length !== 2 || sequences < 1 || length < 2) {
      const rule = 'uint8 [sequences, length], of a sequence at least and of two bytes'
      const text = `${name}.ids must be ${rule}, got ${ids.dtype} [${ids.shape.join(', ')}]`
      throw refuse('ERR_SHAPE', 'eval', 'set', text)
    }
    const answers = await readAnswers(file, `${name}.answers`, [sequences, length])
    const { decoder, model } = await loadModel('eval', options.model, { device, dtype })
    const count = Math.min(options.limit ?? sequences, sequences)
    const bar = progress(count * length, 'tokens')
    const perSequence: Evaluation['perSequence'] = []
    const total = { bits: 0, bytes: 0, hits: 0, answers: 0, seconds: 0 }
    const densities: number[] = []
    let pictures: string[][] | undefined
    for (let i = 0; i < count; i++) {
      bar.advance(i * length)
      const row = await file.load(`${name}.ids`, { dtype: 'uint8', rows: [i, i + 1] })
      const bytes = await row.read()
      row.dispose()
      const masks: Promise<HostMask>[] = []
      const attend = options.mechanism && attendTo(options.mechanism, masks)
      const started = performance.now()
      const {
        bits,
        bytes: predicted,
        recalled,
      } = await decoder.score(model, bytes, answers.get(i) ?? [], attend)
      const seconds = (performance.now() - started) / 1000
      const made = await Promise.all(masks)
      for (const mask of made) densities.push(await mask.density())
      if (options.pictures && i === 0)
        pictures = made.map((mask) => mask.heads.map((head) => mask.svg({ head, size: 150 })))
      const hits = recalled.filter(Boolean).length
      perSequence.push({
        bitsPerByte: bits / predicted,
        recall: { hits, total: recalled.length },
        seconds,
      })
      total.bits += bits
      total.bytes += predicted
      total.hits += hits
      total.answers += recalled.length
      total.seconds += seconds
    }
    bar.end()
    return {
      bitsPerByte: total.bits / total.bytes,
      recall: { hits: total.hits, total: total.answers },
      seconds: total.seconds,
      tokensPerSecond: (count * length) / total.seconds,
      density: options.mechanism
        ? densities.reduce((sum, one) => sum + one, 0) / densities.length
        : 1,
      ...(pictures && { pictures }),
      perSequence,
    }
  } finally {
    await file.close()
  }
}

/** @internal The evaluation as a table. */
export function evaluationTable(evaluation: Evaluation): string {
  const { bitsPerByte, recall, seconds, tokensPerSecond, perSequence } = evaluation
  const row = (label: string, bits: number, { hits, total }: Recall, time: number) => [
    label,
    bits.toFixed(4),
    `${hits}/${total}`,
    time.toFixed(2),
  ]
  const rows = perSequence.map((one, i) => row(`${i}`, one.bitsPerByte, one.recall, one.seconds))
  rows.push(row('all', bitsPerByte, recall, seconds))
  return `${table(['sequence', 'bits/byte', 'recall', 'seconds'], rows)}\n\n${Math.round(tokensPerSecond)} tokens per second`
}

/** @internal Mechanisms as a table, the first of them dense, which the others stand next to. */
export function comparisonTable(named: readonly (readonly [string, Evaluation])[]): string {
  const dense = named[0]![1]
  const rows = named.map(([label, { bitsPerByte, recall, density, seconds }]) => [
    label,
    bitsPerByte.toFixed(4),
    `${recall.hits}/${recall.total}`,
    density.toFixed(3),
    seconds.toFixed(2),
    (dense.seconds / seconds).toFixed(2),
  ])
  return table(['attention', 'bits/byte', 'recall', 'density', 'seconds', 'speedup'], rows)
}
