import type { Evaluation } from './eval.js'

// One page without anything from elsewhere: a table, quality against density, and what every mechanism sees.

type Named = readonly (readonly [label: string, evaluation: Evaluation])[]

const escaped = (text: string) => text.replace(/[&<>"]/g, (one) => `&#${one.charCodeAt(0)};`)

// Bits per byte against density; what lies left and low is better
function plot(named: Named): string {
  const [width, height, margin] = [640, 300, 48]
  const bits = named.map(([, { bitsPerByte }]) => bitsPerByte)
  const [low, high] = [Math.min(...bits), Math.max(...bits)]
  const room = Math.max(high - low, 1e-3) * 0.15
  const x = (density: number) => margin + density * (width - 2 * margin)
  const y = (value: number) =>
    height - margin - ((value - low + room) / (high - low + 2 * room)) * (height - 2 * margin)
  const line = (x1: number, y1: number, x2: number, y2: number) =>
    `<line x1="${x1}" y1="${y1}" x2="${x2}" y2="${y2}" stroke="#999"/>`
  const label = (text: string, at: number, to: number, anchor = 'middle') =>
    `<text x="${at.toFixed(1)}" y="${to.toFixed(1)}" text-anchor="${anchor}">${escaped(text)}</text>`
  const marks = named.map(([, { density, bitsPerByte }], i) => {
    const [px, py] = [x(density), y(bitsPerByte)]
    return `<circle cx="${px.toFixed(1)}" cy="${py.toFixed(1)}" r="4" fill="#1f4e79"/>${label(`${i + 1}`, px + 8, py - 6, 'start')}`
  })
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-size="12" font-family="sans-serif">
${line(margin, height - margin, width - margin, height - margin)}${line(margin, margin, margin, height - margin)}
${[0, 0.25, 0.5, 0.75, 1].map((tick) => label(`${tick}`, x(tick), height - margin + 18)).join('')}
${[low, high].map((tick) => label(tick.toFixed(4), margin - 6, y(tick) + 4, 'end')).join('')}
${label('density', width / 2, height - 8)}${label('bits/byte', margin, margin - 14)}
${marks.join('\n')}
</svg>`
}

/** @internal The page of `heddle report`; the first of what is named is dense. */
export function reportPage(set: string, named: Named): string {
  const dense = named[0]![1]
  const rows = named.map(([label, { bitsPerByte, recall, density, seconds }], i) => {
    const cells = [
      `${i + 1}`,
      escaped(label),
      bitsPerByte.toFixed(4),
      `${recall.hits}/${recall.total}`,
      density.toFixed(3),
      seconds.toFixed(2),
      (dense.seconds / seconds).toFixed(2),
    ]
    return `<tr>${cells.map((cell) => `<td>${cell}</td>`).join('')}</tr>`
  })
  const masks = named.flatMap(([label, { pictures }], i) =>
    pictures
      ? [
          `<h2>${i + 1}. ${escaped(label)}</h2>`,
          ...pictures.map(
            (heads, layer) =>
              `<figure>${heads.join(' ')}<figcaption>softmax layer ${layer + 1}, a picture per head of the mask</figcaption></figure>`,
          ),
        ]
      : [],
  )
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>heddle report</title>
<style>
body { font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse }
td, th { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right }
td:nth-child(2), th:nth-child(2) { text-align: left }
figure { margin: 1rem 0 }
figcaption { color: #666; font-size: 13px }
</style>
<h1>Attention on ${escaped(set)}</h1>
<table>
<tr>${['', 'attention', 'bits/byte', 'recall', 'density', 'seconds', 'speedup'].map((head) => `<th>${head}</th>`).join('')}</tr>
${rows.join('\n')}
</table>
<p>Bits per byte against density, by the numbers of the table: left and low is better.</p>
${plot(named)}
<p>What the heads see in the first sequence: queries downwards, keys to the right, dark where much is seen.</p>
${masks.join('\n')}
</html>
`
}
