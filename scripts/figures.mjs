// Writes the performance tables of README.md from bench/results/*.json; with --check it only says whether they are current.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const start =
  '<!-- figures: written by scripts/figures.mjs from bench/results; do not edit by hand -->'
const end = '<!-- end of figures -->'

const section = ({ device, date, commit, copyTBps, productTflops, enqueueMicroseconds, rows }) => {
  const peers = [...new Set(rows.flatMap((row) => Object.keys(row.peers)))]
  const head = [
    'case',
    'ms',
    'TFLOP/s',
    'GB/s',
    'of the roof',
    ...peers.map((peer) => `speed of ${peer}`),
  ]
  const lines = rows.map((row) => [
    `\`${row.case}\``,
    row.ms.toPrecision(3),
    row.tflops < 0.001 ? '' : row.tflops.toPrecision(3),
    row.gbps.toPrecision(3),
    `${Math.round(row.roofShare * 100)} %`,
    ...peers.map((peer) => (row.peers[peer] ? `${(row.peers[peer] / row.ms).toFixed(2)} x` : '')),
  ])
  // as the formatter lays it out
  const widths = head.map((_, i) => Math.max(...[head, ...lines].map((cells) => cells[i].length)))
  const padded = [head, ...lines].map((cells) =>
    cells.map((cell, i) => (i === 0 ? cell.padEnd(widths[i]) : cell.padStart(widths[i]))),
  )
  const rule = widths.map((width, i) => (i === 0 ? '-'.repeat(width) : `${'-'.repeat(width - 1)}:`))
  const table = [padded[0], rule, ...padded.slice(1)]
  return [
    `**${device}**, ${date}, at ${commit}. In the same run a copy moved ${(copyTBps * 1000).toPrecision(3)} GB/s and a large matrix`,
    `product reached ${productTflops.toPrecision(3)} TFLOP/s; enqueueing the smallest operator took ${enqueueMicroseconds.toFixed(1)} µs. A peer's column is`,
    'our speed over its speed, above 1 where ours is faster.',
    '',
    ...table.map((cells) => `| ${cells.join(' | ')} |`),
  ].join('\n')
}

const folder = join(root, 'bench', 'results')
const files = readdirSync(folder)
  .filter((name) => name.endsWith('.json'))
  .sort()
const text = files
  .map((name) => section(JSON.parse(readFileSync(join(folder, name), 'utf8'))))
  .join('\n\n')
const path = join(root, 'README.md')
const before = readFileSync(path, 'utf8')
const [from, to] = [before.indexOf(start), before.indexOf(end)]
if (from < 0 || to < from) throw new Error('README.md has lost its marks for the figures')
const after = `${before.slice(0, from + start.length)}\n${text}\n${before.slice(to)}`
if (process.argv.includes('--check')) {
  if (before !== after) {
    process.stderr.write(
      'README.md does not show the figures of bench/results; run node scripts/figures.mjs\n',
    )
    process.exitCode = 1
  }
} else {
  writeFileSync(path, after)
}
