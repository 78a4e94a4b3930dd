import {
  attention,
  embed,
  empty,
  type FloatDType,
  lightning,
  lightningDecode,
  scatter,
  scope,
  type Tensor,
  tensor,
  zeros,
} from 'heddle'
import { type Mixer, type Model, pick, run } from './decoder.js'

// Continuous batching: what all sequences have to do next, pieces of prompts and single tokens, is one call of each operator.
// Queries are packed, keys and values of every sequence stand in pages of one cache, and states in one pool.

/** How much a batch holds. */
export interface BatchOptions {
  /** How many sequences run at a time; others wait. */
  sequences?: number
  /** Pages of keys and values, for all sequences together. */
  pages?: number
  /** Tokens of a page, a power of two. */
  pageSize?: number
  /** How many tokens a step takes at most: prompts that are longer go through in pieces, beside the tokens of others. */
  stepTokens?: number
}

/** What is asked of one sequence. */
export interface Request {
  maxTokens?: number
  temperature?: number
  random?: () => number
}

interface Sequence extends Required<Request> {
  prompt: Uint8Array
  /** What the model has yet to read: the rest of the prompt, or the last byte. */
  pending: Uint8Array
  length: number // tokens that are read
  made: number // bytes that are drawn
  pages: number[]
  slot: number
  emit(byte: number): void
  end(error?: unknown): void
  ended: boolean
}

/** Sequences that one model continues at the same time. */
export class Batch {
  readonly #model: Model
  readonly #pageSize: number
  readonly #stepTokens: number
  readonly #pages: number
  readonly #layers: { k?: Tensor<FloatDType>; v?: Tensor<FloatDType>; state?: Tensor<'float32'> }[]
  readonly #freePages: number[]
  readonly #freeSlots: number[]
  readonly #waiting: Sequence[] = []
  #running: Sequence[] = []
  #busy = false

  constructor(model: Model, options: BatchOptions = {}) {
    const { sequences = 32, pages = 1024, pageSize = 64, stepTokens = 2048 } = options
    const { config, device, dtype } = model
    const { num_attention_heads: heads, num_key_value_heads: pairs, head_dim: d } = config
    this.#model = model
    this.#pageSize = pageSize
    this.#stepTokens = stepTokens
    this.#pages = pages
    const cache = () => empty([pages, pageSize, pairs, d], { device, dtype })
    this.#layers = config.attention.map((kind) =>
      kind === 'softmax'
        ? { k: cache(), v: cache() }
        : { state: zeros([sequences, heads, d, d], { device }) },
    )
    this.#freePages = Array.from({ length: pages }, (_, i) => pages - 1 - i)
    this.#freeSlots = Array.from({ length: sequences }, (_, i) => sequences - 1 - i)
  }

  /** What is going on. */
  get state(): { running: number; waiting: number; freePages: number } {
    const [running, waiting] = [this.#running.length, this.#waiting.length]
    return { running, waiting, freePages: this.#freePages.length }
  }

  /** Continues a prompt byte by byte. Who stops to listen stops the sequence. */
  async *generate(prompt: Uint8Array, request: Request = {}): AsyncGenerator<number, void, void> {
    const { maxTokens = 256, temperature = 0, random = Math.random } = request
    if (prompt.length === 0) throw new RangeError('the prompt is empty')
    if (this.#pagesOf(prompt.length + maxTokens) > this.#pages)
      throw new RangeError(`a sequence has at most ${this.#pages * this.#pageSize} tokens here`)
    const bytes: number[] = []
    let failure: unknown
    let wake = () => {}
    const sequence: Sequence = {
      ...{ prompt, pending: prompt, length: 0, made: 0, pages: [], slot: -1, ended: false },
      ...{ maxTokens, temperature, random },
      emit(byte) {
        bytes.push(byte)
        wake()
      },
      end(error) {
        this.ended = true
        failure = error
        wake()
      },
    }
    if (maxTokens <= 0) return
    this.#waiting.push(sequence)
    void this.#work()
    try {
      for (;;) {
        yield* bytes.splice(0)
        if (failure !== undefined) throw failure
        if (sequence.ended && bytes.length === 0) return
        if (bytes.length > 0) continue
        await new Promise<void>((resolve) => {
          wake = resolve
        })
      }
    } finally {
      sequence.ended = true
    }
  }

  /** Frees what the batch holds, once nothing runs any more. */
  dispose(): void {
    for (const { k, v, state } of this.#layers) for (const part of [k, v, state]) part?.dispose()
  }

  #pagesOf(tokens: number): number {
    return Math.ceil(tokens / this.#pageSize)
  }

  async #work(): Promise<void> {
    if (this.#busy) return
    this.#busy = true
    try {
      while (this.#admit() > 0) await this.#step()
    } catch (error) {
      for (const sequence of [...this.#running, ...this.#waiting.splice(0)]) sequence.end(error)
    } finally {
      this.#busy = false
      this.#release()
    }
  }

  #release(): void {
    for (const sequence of this.#running) {
      if (!sequence.ended) continue
      this.#freePages.push(...sequence.pages)
      this.#freeSlots.push(sequence.slot)
    }
    this.#running = this.#running.filter(({ ended }) => !ended)
  }

  // Takes sequences that wait, as long as there is room for all that they may become
  #admit(): number {
    this.#release()
    while (this.#waiting.length > 0) {
      const next = this.#waiting[0]!
      const need = this.#pagesOf(next.prompt.length + next.maxTokens)
      const room = this.#freeSlots.length > 0 && need <= this.#freePages.length
      if (!next.ended && !room) break
      this.#waiting.shift()
      if (next.ended) continue
      next.pages = this.#freePages.splice(-need)
      next.slot = this.#freeSlots.pop()!
      for (const { state } of this.#layers) {
        if (!state) continue
        scope(() => {
          const its = state.slice(0, next.slot, next.slot + 1)
          its.copyFrom(zeros(its.shape, { device: its.device }))
        })
      }
      this.#running.push(next)
    }
    return this.#running.length
  }

  // Every sequence reads some of what is pending; those that have read all draw a byte
  async #step(): Promise<void> {
    let left = this.#stepTokens
    // single tokens first, so that nobody who is written to waits for another's prompt
    const parts = this.#running
      .toSorted((a, b) => a.pending.length - b.pending.length)
      .flatMap((sequence) => {
        const tokens = sequence.pending.subarray(0, left)
        left -= tokens.length
        return tokens.length > 0 ? [{ sequence, tokens }] : []
      })
    const logits = scope(() => this.#logits(parts))
    const values = await logits.read().finally(() => logits.dispose())
    const width = this.#model.config.vocab_size
    for (const [at, { sequence, tokens }] of parts.entries()) {
      sequence.pending = sequence.pending.subarray(tokens.length)
      sequence.length += tokens.length
      if (sequence.ended || sequence.pending.length > 0) continue
      const row = values.subarray(at * width, (at + 1) * width)
      const byte = pick(row, sequence.temperature, sequence.random)
      sequence.pending = Uint8Array.of(byte)
      sequence.emit(byte)
      sequence.ended = ++sequence.made === sequence.maxTokens
    }
    // who hears of an end finds its room free
    const ended = this.#running.filter((sequence) => sequence.ended)
    this.#release()
    for (const sequence of ended) sequence.end()
  }

  // Of the last token of each part
  #logits(parts: readonly { sequence: Sequence; tokens: Uint8Array }[]): Tensor<'float32'> {
    const { config, device, slopes } = this.#model
    const { num_attention_heads: heads, head_dim: d } = config
    const n = parts.length
    const int32 = (values: number[], shape = [values.length]) =>
      tensor(values, shape, { device, dtype: 'int32' })
    const starts = [0]
    for (const { tokens } of parts) starts.push(starts.at(-1)! + tokens.length)
    const total = starts[n]!
    const ids = new Uint8Array(total)
    for (const [i, { tokens }] of parts.entries()) ids.set(tokens, starts[i]!)
    const each = (value: (sequence: Sequence, position: number) => number) =>
      parts.flatMap(({ sequence, tokens }) =>
        Array.from(tokens, (_, i) => value(sequence, sequence.length + i)),
      )
    const positions = int32(
      each((_, position) => position),
      [1, total],
    )
    const rows = int32(
      each(
        ({ pages }, position) =>
          pages[Math.floor(position / this.#pageSize)]! * this.#pageSize +
          (position % this.#pageSize),
      ),
    )
    const most = Math.max(...parts.map(({ sequence }) => sequence.pages.length))
    const blockTable = int32(
      parts.flatMap(({ sequence: { pages } }) =>
        Array.from({ length: most }, (_, i) => pages[i] ?? 0),
      ),
      [n, most],
    )
    const cuSeqlens = int32(starts)
    const cacheSeqlens = int32(parts.map((part) => part.sequence.length + part.tokens.length))
    const slots = int32(parts.map(({ sequence }) => sequence.slot))
    const last = int32(starts.slice(1).map((end) => end - 1))

    const mixer: Mixer = {
      turn: { positions },
      softmax: (q, k, v, layer) => {
        const cache = this.#layers[layer]!
        scatter(cache.k!, rows, k.select(0, 0))
        scatter(cache.v!, rows, v.select(0, 0))
        const place = { cuSeqlensQ: cuSeqlens, blockTable, cacheSeqlens }
        return attention(q, cache.k!, cache.v!, { causal: true, ...place }).out
      },
      recurrent: (q, k, v, layer) => {
        const options = { slopes: slopes[layer]!, scale: config.lightning_scale }
        const pool = this.#layers[layer]!.state!
        if (total === n) {
          const apart = (x: Tensor<FloatDType>) => x.reshape([n, 1, heads, d])
          return lightningDecode(apart(q), apart(k), apart(v), pool, slots, options).out
        }
        const flat = pool.reshape([pool.shape[0]!, heads * d * d])
        const initialState = embed(slots, flat).reshape([n, heads, d, d])
        const packed = { ...options, cuSeqlens, initialState, outputFinalState: true as const }
        const { out, state } = lightning(q, k, v, packed)
        scatter(flat, slots, state.reshape([n, heads * d * d]))
        return out
      },
    }
    return run(this.#model, tensor(ids, [1, total], { device, dtype: 'uint8' }), mixer, last)
  }
}
