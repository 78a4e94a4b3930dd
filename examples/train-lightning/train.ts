import { readFile, writeFile } from 'node:fs/promises'
import { parseArgs } from 'node:util'
import { cuda } from 'heddle'
import { create, gradients, update } from './model.js'

// Fits the model to the bytes of a text file:
//   node dist/examples/train-lightning/train.js [--steps 300] [--out loss.svg] [file]

function curve(losses: readonly number[]): string {
  const [width, height, margin] = [640, 360, 40]
  const top = Math.max(...losses)
  const x = (i: number) => margin + (i / Math.max(losses.length - 1, 1)) * (width - 2 * margin)
  const y = (loss: number) => height - margin - (loss / top) * (height - 2 * margin)
  const points = losses.map((loss, i) => `${x(i).toFixed(1)},${y(loss).toFixed(1)}`).join(' ')
  const line = (x1: number, y1: number, x2: number, y2: number) =>
    `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="#888"/>`
  const text = (at: string, words: string) =>
    `<text ${at} font-family="sans-serif" font-size="12" fill="#444">${words}</text>`
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}">`,
    '<rect width="100%" height="100%" fill="white"/>',
    line(margin, height - margin, width - margin, height - margin),
    line(margin, margin, margin, height - margin),
    text(`x="${margin}" y="${margin - 12}"`, `bits per byte, from ${top.toFixed(2)}`),
    text(
      `x="${width - margin}" y="${height - margin + 20}" text-anchor="end"`,
      `${losses.length} steps`,
    ),
    `<polyline points="${points}" fill="none" stroke="#c33" stroke-width="1.5"/>`,
    '</svg>\n',
  ].join('\n')
}

async function main(): Promise<void> {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      steps: { type: 'string', default: '300' },
      out: { type: 'string', default: 'loss.svg' },
    },
  })
  const text = new Uint8Array(await readFile(positionals[0] ?? 'README.md'))
  const device = cuda.available ? 'cuda:0' : 'cpu'
  const [length, sequences, steps] = [128, 8, Number(values.steps)]
  if (!Number.isInteger(steps) || steps < 1)
    throw new Error(`--steps must be a whole number from 1 on, got ${values.steps}`)
  if (text.length <= length) throw new Error(`the text must have more than ${length} bytes`)
  const model = create({ vocabulary: 256, width: 64, heads: 4, hidden: 128, layers: 3 }, 1)
  const losses: number[] = []
  const started = performance.now()
  for (let step = 0; step < steps; step++) {
    const batch = new Uint8Array(sequences * (length + 1))
    for (let i = 0; i < sequences; i++) {
      const at = Math.floor(Math.random() * (text.length - length))
      batch.set(text.subarray(at, at + length + 1), i * (length + 1))
    }
    const found = await gradients(model, batch, length, device)
    // a warm start, then down to a tenth
    const rate = 3e-3 * Math.min(1, (step + 1) / 20) * (1 - (0.9 * step) / steps)
    update(model, found.gradients, rate)
    losses.push(found.loss / Math.LN2)
    const bar = '█'.repeat(Math.round((20 * (step + 1)) / steps)).padEnd(20, '░')
    const seconds = (performance.now() - started) / 1000
    process.stdout.write(
      `\r${bar} step ${step + 1} of ${steps} on ${device}, ${losses.at(-1)!.toFixed(3)} bits per byte, ${seconds.toFixed(1)} s `,
    )
  }
  await writeFile(values.out, curve(losses))
  process.stdout.write(`\nthe curve is in ${values.out}\n`)
}

void main()
