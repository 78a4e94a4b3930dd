import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'
import { attention, memory, randn } from 'heddle'
import { describe, expect, it } from 'vitest'
import { root, runScript } from '../support/child.js'
import { random } from '../support/random.js'

const heddle = JSON.stringify(join(root, 'dist'))

function start(body: string, workerData?: unknown): Worker {
  return new Worker(
    `const heddle = require(${heddle})
    const { parentPort, workerData } = require('node:worker_threads')
    ${body}`,
    { eval: true, workerData },
  )
}

function message<T>(worker: Worker): Promise<T> {
  return new Promise((resolve, reject) => {
    worker.once('message', resolve)
    worker.once('error', reject)
  })
}

// The same numbers wherever it runs
const compute = (seed: number, rows: number) => {
  const [q, k, v] = [0, 1, 2].map((i) => randn([1, rows, 4, 64], { seed: seed * 3 + i }))
  return attention(q!, k!, v!, { causal: true }).out.read()
}
const computeInWorker = `
  const { attention, randn } = heddle
  const compute = (seed, rows) => {
    const [q, k, v] = [0, 1, 2].map((i) => randn([1, rows, 4, 64], { seed: seed * 3 + i }))
    return attention(q, k, v, { causal: true }).out.read()
  }`

describe('workers', () => {
  it('are terminated with calls in flight, one hundred times', async () => {
    const rng = random(21)
    const before = memory()
    for (let round = 0; round < 50; round++) {
      const pair = [0, 1].map(() =>
        start(`${computeInWorker}
          const endless = () => {
            for (let i = 0; i < 4; i++) compute(i, 512).catch(() => {})
            heddle.synchronize().then(endless, () => {})
          }
          endless()
          parentPort.postMessage('running')`),
      )
      await Promise.all(pair.map(message))
      await pause(rng.next() * 10)
      expect(await Promise.all(pair.map((worker) => worker.terminate()))).toEqual([1, 1])
    }
    // this thread has a queue of its own, which goes on as if nothing had been
    expect(memory().tensors).toBeLessThanOrEqual(before.tensors)
    expect(await compute(1, 64)).toEqual(await compute(1, 64))
  })

  it('are terminated while they start, while they wait and after an error', async () => {
    for (let round = 0; round < 10; round++) {
      const starting = start(computeInWorker)
      await pause(round)
      await starting.terminate()
      const waiting = start(`${computeInWorker}
        const q = heddle.randn([1, 4096, 4, 64])
        parentPort.postMessage('waits')
        heddle.attention(q, q, q).out.readSync()`)
      await message(waiting)
      await waiting.terminate()
      const failing = start(`${computeInWorker}
        compute(1, 1024)
        throw new Error('on purpose')`)
      await expect(message(failing)).rejects.toThrow('on purpose')
    }
  })

  it('compute at once and each get the right result', async () => {
    const seeds = [1, 2, 3, 4]
    const workers = seeds.map((seed) =>
      start(
        `${computeInWorker}
        Promise.all([64, 130, 257].map((rows) => compute(workerData, rows)))
          .then((results) => parentPort.postMessage(results))`,
        seed,
      ),
    )
    const [answers, own] = await Promise.all([
      Promise.all(workers.map((worker) => message<Float32Array[]>(worker))),
      compute(9, 257),
    ])
    for (const [i, seed] of seeds.entries())
      for (const [j, rows] of [64, 130, 257].entries())
        expect(answers[i]![j]).toEqual(await compute(seed, rows))
    expect(own).toEqual(await compute(9, 257))
    expect(answers[0]![0]).not.toEqual(answers[1]![0])
  })

  it('have tensors and counts of their own', async () => {
    const before = memory()
    const worker = start(`
      const kept = heddle.zeros([1000])
      parentPort.postMessage({ memory: heddle.memory(), read: kept.readSync()[0] })`)
    expect(await message(worker)).toEqual({
      memory: { tensors: 1, bytes: 4000, peakBytes: 4000, pinnedBytes: 0 },
      read: 0,
    })
    // fewer when some were collected meanwhile
    expect(memory().tensors).toBeLessThanOrEqual(before.tensors)
  })

  it('refuse to be sent a tensor', () => {
    const { port1 } = new MessageChannel()
    // what arrives is no tensor, so it cannot stand for memory of another thread
    expect(structuredClone({ ...randn([2]) })).not.toHaveProperty('handle')
    expect(() => port1.postMessage(randn([2]).read)).toThrow('could not be cloned')
    port1.close()
  })

  it('outlive nothing: the process ends when its main thread exits', async () => {
    const ended = await runScript(`
      const { Worker } = require('node:worker_threads')
      const source = \`
        const { attention, randn } = require(${heddle})
        const { parentPort } = require('node:worker_threads')
        const q = randn([1, 4096, 8, 64])
        const endless = () => { attention(q, q, q).out.read().then(endless, () => {}) }
        endless()
        parentPort.postMessage('running')\`
      let running = 0
      for (let i = 0; i < 4; i++)
        new Worker(source, { eval: true }).on('message', () => { if (++running === 4) process.exit(3) })`)
    expect(ended).toEqual({ status: 3, signal: null, stdout: '', stderr: '' })
  })
})
