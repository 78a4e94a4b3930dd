import { describe, expect, it } from 'vitest'
import { runScript } from '../support/child.js'

// About a second of work in the queue, in many operators and in one
const work = `
const { attention, randn, linear } = heddle
const q = randn([1, 512, 8, 64])
const queue = () => Array.from({ length: 30 }, () => attention(q, q, q).out)
const results = queue()
results.push(attention(randn([1, 4096, 8, 64]), randn([1, 4096, 8, 64]), randn([1, 4096, 8, 64])).out)
`

async function ends(body: string) {
  const { status, signal, stdout, stderr } = await runScript(work + body)
  return { status, signal, stdout: stdout.trim(), stderr }
}

describe.concurrent('a process with queued work', () => {
  it('ends by itself without waiting for results that nobody reads', async () => {
    expect(await ends('')).toEqual({ status: 0, signal: null, stdout: '', stderr: '' })
  })

  it('ends by itself after a pending read is answered', async () => {
    const ended = await ends('results.at(-1).read().then((values) => console.log(values.length))')
    expect(ended).toEqual({ status: 0, signal: null, stdout: `${4096 * 512}`, stderr: '' })
  })

  it('ends by process.exit', async () => {
    expect(await ends('process.exit(3)')).toMatchObject({ status: 3, signal: null, stderr: '' })
  })

  it('ends by process.exit with a pending read, which never settles', async () => {
    const ended = await ends(`
      for (const result of results) result.read().then(() => console.log('read'), () => console.log('rejected'))
      process.exitCode = 4
      setImmediate(() => process.exit())`)
    expect(ended).toEqual({ status: 4, signal: null, stdout: '', stderr: '' })
  })

  it('ends by process.exit inside the answer of a read', async () => {
    const ended = await ends(`results[0].read().then(() => process.exit(5))`)
    expect(ended).toMatchObject({ status: 5, signal: null, stderr: '' })
  })

  it('ends by an error that nobody catches', async () => {
    const ended = await ends(`results[0].read(); throw new Error('on purpose')`)
    expect(ended).toMatchObject({ status: 1, signal: null })
    expect(ended.stderr).toContain('Error: on purpose')
  })

  it('ends by a failed read that nobody catches', async () => {
    const ended = await ends(`
      const { embed, tensor } = heddle
      embed(tensor([9], [1], { dtype: 'int32' }), randn([2, 4])).read()`)
    expect(ended).toMatchObject({ status: 1, signal: null })
    expect(ended.stderr).toContain('HeddleError: embed: ids must be at least 0 and below 2, got 9')
  })

  it.each(['SIGTERM', 'SIGINT'] as const)('ends by %s', async (name) => {
    const ended = await ends(`results[0].read(); process.kill(process.pid, '${name}')`)
    expect(ended).toMatchObject({ status: null, signal: name, stderr: '' })
  })

  it('answers a signal it listens to, then ends as it says', async () => {
    const ended = await ends(`
      process.on('SIGTERM', () => { console.log('heard'); process.exit(6) })
      setInterval(() => {}, 1000)
      setImmediate(() => process.kill(process.pid, 'SIGTERM'))`)
    expect(ended).toEqual({ status: 6, signal: null, stdout: 'heard', stderr: '' })
  })

  it('ends while inputs are disposed, temporary and collected', async () => {
    const ended = await ends(`
      q.dispose()
      for (const result of results.splice(0)) if (Math.random() < 0.5) result.dispose()
      process.on('exit', () => queue.toString())`)
    expect(ended).toEqual({ status: 0, signal: null, stdout: '', stderr: '' })
  })

  it('makes and queues more inside its exit handler', async () => {
    const ended = await ends(`
      process.on('exit', () => {
        const more = attention(q, q, q).out
        more.read()
        console.log(heddle.add(heddle.full([1], 2), heddle.full([1], 3)).disposed)
      })
      process.exit(7)`)
    expect(ended).toEqual({ status: 7, signal: null, stdout: 'false', stderr: '' })
  })

  it('ends from a worker that calls process.exit', async () => {
    const ended = await ends(`
      const { Worker } = require('node:worker_threads')
      new Worker(\`
        const { attention, randn } = require(\${JSON.stringify(require.resolve('./dist'))})
        const q = randn([1, 2048, 8, 64])
        attention(q, q, q).out.read()
        process.exit(8)\`, { eval: true }).on('exit', (code) => { process.exitCode = code })`)
    expect(ended).toEqual({ status: 8, signal: null, stdout: '', stderr: '' })
  })
})
