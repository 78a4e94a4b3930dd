import { readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { pathToFileURL } from 'node:url'
import { mustBe, show } from '../check.js'
import { cuda, type Device, type DeviceLike, parseDevice } from '../device.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import type { Tensor } from '../tensor.js'

/** @internal What one evaluated sequence gives. */
export interface Score {
  bits: number
  bytes: number
  recalled: boolean[]
}

/** @internal What softmax layers compute from q, k and v instead of dense attention. */
export type Attend = (
  q: Tensor<FloatDType>,
  k: Tensor<FloatDType>,
  v: Tensor<FloatDType>,
) => Tensor<FloatDType>

/** @internal What the command line needs of a model's code. */
export interface Decoder {
  load(directory: string, options: { device: DeviceLike; dtype: FloatDType }): Promise<unknown>
  score(
    model: unknown,
    ids: Uint8Array,
    answers: readonly number[],
    attend?: Attend,
  ): Promise<Score>
  generate(
    model: unknown,
    prompt: Uint8Array,
    options: { maxTokens?: number; temperature?: number; random?: () => number },
  ): AsyncGenerator<number, void, void>
}

// The code of a model comes from the package, never from the directory that holds its weights
const decoders: Readonly<Record<string, string>> = { 'byte-lm': 'examples/byte-lm/decoder.js' }

/** @internal The device to use when none was asked for: the first GPU, else the CPU. */
export function chooseDevice(op: string, wanted: string | undefined): Device {
  if (wanted === undefined) return cuda.available ? 'cuda:0' : 'cpu'
  const { device } = parseDevice(op, wanted)
  if (device === 'cpu' || cuda.devices.some((one) => one.device === device)) return device
  const text = `--device must be one of this machine, got ${show(wanted)}; heddle doctor says what is missing`
  throw refuse('ERR_ARGUMENT', op, 'device', text)
}

/** @internal */
export function chooseDType(op: string, wanted: string | undefined, device: Device): FloatDType {
  if (wanted === undefined) return device === 'cpu' ? 'float32' : 'bfloat16'
  if (wanted === 'float32' || wanted === 'float16' || wanted === 'bfloat16') return wanted
  throw mustBe(op, 'dtype', 'float32, float16 or bfloat16', wanted)
}

/** @internal */
export function chooseNumber(op: string, name: string, text: string): number {
  const number = text.trim() === '' ? Number.NaN : Number(text)
  if (Number.isNaN(number)) throw mustBe(op, name, 'a number', text)
  return number
}

/** @internal Loads a model with the code that its config.json names. */
export async function loadModel(
  op: string,
  directory: string,
  options: { device: DeviceLike; dtype: FloatDType },
): Promise<{ decoder: Decoder; model: unknown }> {
  let config: { model_type?: unknown }
  try {
    config = JSON.parse(await readFile(join(directory, 'config.json'), 'utf8'))
  } catch (cause) {
    throw refuse(
      'ERR_ARGUMENT',
      op,
      'model',
      `model must be a directory with a config.json, got ${show(directory)} (${(cause as Error).message})`,
    )
  }
  const type = String(config?.model_type)
  const file = Object.hasOwn(decoders, type) ? decoders[type] : undefined
  if (!file) throw mustBe(op, 'model_type', `one of ${Object.keys(decoders).join(', ')}`, type)
  const decoder: Decoder = await import(pathToFileURL(join(__dirname, '..', file)).href)
  return { decoder, model: await decoder.load(directory, options) }
}
