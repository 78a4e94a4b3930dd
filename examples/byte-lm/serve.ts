import { createServer } from 'node:http'
import { join } from 'node:path'
import { cuda } from 'heddle'
import { Batch } from './batch.js'
import { load } from './decoder.js'

// A server that continues whatever is posted to it, all requests in one batch:
//
//   node dist/examples/byte-lm/serve.js [port]
//   curl -N --data 'The compiler' 'localhost:8080/?max=200&temperature=0.7'

const longest = 65_536

async function main(): Promise<void> {
  const port = Number(process.argv[2] ?? 8080)
  const device = cuda.available ? 'cuda:0' : 'cpu'
  const dtype = device === 'cpu' ? 'float32' : 'bfloat16'
  const model = await load(join(process.cwd(), 'examples', 'byte-lm'), { device, dtype })
  const batch = new Batch(model, { pages: longest / 16 })

  const server = createServer(async (request, response) => {
    try {
      const chunks: Buffer[] = []
      for await (const chunk of request) chunks.push(chunk as Buffer)
      const query = new URL(request.url ?? '/', 'http://localhost').searchParams
      const number = (name: string, fallback: number) => {
        const value = Number(query.get(name) ?? fallback)
        if (!Number.isFinite(value) || value < 0) throw new RangeError(`${name} must be a number`)
        return value
      }
      const options = { maxTokens: number('max', 200), temperature: number('temperature', 0) }
      const bytes = batch.generate(Buffer.concat(chunks).subarray(0, longest), options)
      response.on('close', () => void bytes.return())
      for await (const byte of bytes) response.write(Uint8Array.of(byte))
      response.end()
    } catch (error) {
      if (!response.headersSent) response.statusCode = error instanceof RangeError ? 400 : 500
      response.end(`${(error as Error).message}\n`)
    }
  })
  server.listen(port, () => {
    process.stdout.write(`byte-lm on ${device} listens on port ${port}\n`)
  })
}

main().catch((error: unknown) => {
  process.stderr.write(`${(error as Error).message}\n`)
  process.exitCode = 1
})
