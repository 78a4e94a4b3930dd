import { join } from 'node:path'
import { cuda, openSafetensors } from 'heddle'
import { generate, load, score } from './decoder.js'

// The main job: a real language model reads real documents through our operators, then writes on. `npm run demo`

async function main(): Promise<void> {
  const directory = process.argv[2] ?? join(process.cwd(), 'examples', 'byte-lm')
  const device = cuda.available ? 'cuda:0' : 'cpu'
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const where = device === 'cpu' ? 'the CPU' : cuda.devices[0]?.name
  process.stdout.write(`byte-lm on ${where} in ${dtype}\n`)
  if (!cuda.available) process.stdout.write(`(no GPU: ${cuda.reason?.text})\n`)

  const model = await load(directory, { device, dtype })
  const file = await openSafetensors(join(directory, 'eval-dev.safetensors'))
  const lines: string[] = []
  let prompt: Uint8Array | undefined
  // On the CPU one long document is enough for a first impression
  for (const [name, most] of [
    ['dev4k', 4],
    ['dev16k', device === 'cpu' ? 1 : 4],
  ] as const) {
    const [sequences = 0, length = 0] = file.entries.get(`${name}.ids`)?.shape ?? []
    const pairs = await (await file.load(`${name}.answers`, { dtype: 'int32' })).read()
    for (let i = 0; i < Math.min(most, sequences); i++) {
      const row = await file.load(`${name}.ids`, { dtype: 'uint8', rows: [i, i + 1] })
      const ids = await row.read()
      prompt ??= ids.slice(0, 600)
      const answers = Array.from({ length: pairs.length / 2 }, (_, j) => j)
        .filter((j) => pairs[2 * j] === i)
        .map((j) => pairs[2 * j + 1]!)
      const started = performance.now()
      const { bits, bytes, recalled } = await score(model, ids, answers)
      const seconds = (performance.now() - started) / 1000
      const hits = `${recalled.filter(Boolean).length}/${recalled.length}`
      const cells = [
        `${name} ${i}`,
        `${length}`,
        (bits / bytes).toFixed(4),
        hits,
        seconds.toFixed(2),
        `${Math.round(length / seconds)}`,
      ]
      lines.push(cells.map((cell, c) => (c === 0 ? cell.padEnd(10) : cell.padStart(10))).join(' '))
      process.stderr.write(process.stderr.isTTY ? `\r${name}: document ${i + 1} read ` : '')
    }
  }
  await file.close()

  process.stdout.write('\nIt goes on from the first 600 bytes of a document like this:\n\n')
  for await (const byte of generate(model, prompt!, { maxTokens: 200 }))
    process.stdout.write(Uint8Array.of(byte))

  const head = ['document', 'bytes', 'bits/byte', 'recall', 'seconds', 'bytes/s']
  process.stdout.write(
    `\n\n${head.map((cell, c) => (c === 0 ? cell.padEnd(10) : cell.padStart(10))).join(' ')}\n`,
  )
  process.stdout.write(`${lines.join('\n')}\n`)
}

main().catch((error: unknown) => {
  process.stderr.write(`${(error as Error).message}\n`)
  process.exitCode = 1
})
