import type { Analysis } from '../cascade/analyze.js'
import { graphOf, type Node } from '../cascade/graph.js'
import type { CascadeIR } from '../cascade/ir.js'
import { edgeKind, sweepNumbers } from '../cascade/passes.js'

// One colour for each pass, told apart by people who see few colours as well
const colours = ['#9ecae9', '#ffbf79', '#88d27a', '#d6a5c9', '#f2cf5b', '#d8b5a5', '#83bcb6']
const [charWidth, rowHeight, gapX, gapY, margin] = [7.3, 34, 24, 46, 24]
const longest = 64

interface Box {
  key: string
  text: string
  fill: string
  input: boolean
  layer: number
  x: number
  y: number
  width: number
}

const xml = (text: string) =>
  text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`).replace(/\s+/g, ' ')

/**
 * @internal The dependency graph as SVG. A box is one einsum in the colour of its pass over the rank that takes most;
 * dashed edges wait for that whole rank, dotted ones come from the step before.
 */
export function drawing(ir: CascadeIR, { passes }: Analysis): string {
  const graph = graphOf(ir)
  const worst = graph.families.reduce(
    (a, b) => ((passes[b.name]?.headline ?? 0) > (passes[a.name]?.headline ?? 0) ? b : a),
    graph.families[0] ?? { name: '', levels: [] },
  )
  const [variable] = worst.levels
  const sweeps =
    variable === undefined ? new Map<Node, number>() : sweepNumbers(graph, worst.levels)

  const nodes = graph.nodes.filter(({ statement }) => !statement.init)
  const boxes = new Map<string, Box>()
  const edges: { from: string; to: string; kind: string }[] = []
  const add = (key: string, text: string, fill: string, input: boolean, layer: number) => {
    const shown = text.length > longest ? `${text.slice(0, longest - 1)}…` : text
    const width = Math.round(Math.max(40, shown.length * charWidth + 16))
    boxes.set(key, { key, text: shown, fill, input, layer, x: 0, y: 0, width })
  }
  for (const node of nodes) {
    let layer = 1
    for (const use of node.ins) {
      const source = graph.aliases.get(use.tensor) ?? use.tensor
      const producer = nodes.find(({ name }) => name === source)
      if (!producer) {
        if (!graph.producers.has(source)) edges.push({ from: source, to: node.name, kind: 'plain' })
        continue
      }
      const kind = variable === undefined ? 'plain' : edgeKind(node, use, producer, variable)
      if (kind !== 'streaming') layer = Math.max(layer, (boxes.get(source)?.layer ?? 0) + 1)
      edges.push({ from: source, to: node.name, kind })
    }
    const pass = Math.max(1, sweeps.get(node) ?? 1)
    add(node.name, node.statement.src.text, colours[(pass - 1) % colours.length]!, false, layer)
  }
  // inputs stand right above what reads them first
  for (const { from, to } of edges) {
    if (boxes.has(from)) continue
    add(from, from, '#ffffff', true, boxes.get(to)!.layer - 1)
  }

  const layers: Box[][] = []
  for (const box of boxes.values()) {
    layers[box.layer] ??= []
    layers[box.layer]!.push(box)
  }
  const rows = layers.filter(Boolean)
  const widthOf = (row: Box[]) => row.reduce((sum, { width }) => sum + width + gapX, -gapX)
  const width = Math.max(360, ...rows.map(widthOf)) + 2 * margin
  rows.forEach((row, at) => {
    const parents = (box: Box) => {
      const above = edges
        .filter(({ to, kind }) => to === box.key && kind !== 'streaming')
        .map(({ from }) => boxes.get(from)!)
        .filter(({ layer }) => layer < box.layer)
      return above.length === 0
        ? width / 2
        : above.reduce((sum, { x, width: w }) => sum + x + w / 2, 0) / above.length
    }
    if (at > 0) row.sort((a, b) => parents(a) - parents(b))
    let x = (width - widthOf(row)) / 2
    for (const box of row) {
      box.x = x
      box.y = margin + at * (rowHeight + gapY)
      x += box.width + gapX
    }
  })

  const used = new Set(edges.map(({ from, to, kind }) => `${from} ${to} ${kind}`))
  const lines = [...used].map((edge) => {
    const [from, to, kind] = edge.split(' ') as [string, string, string]
    const [a, b] = [boxes.get(from)!, boxes.get(to)!]
    const dash =
      kind === 'barrier'
        ? ' stroke-dasharray="7 4"'
        : kind === 'streaming'
          ? ' stroke-dasharray="2 3"'
          : ''
    const [x1, x2] = [a.x + a.width / 2, b.x + b.width / 2]
    const [y1, y2] = [a.y + rowHeight, b.y]
    const path =
      kind === 'streaming'
        ? `M${a.x + a.width} ${a.y + rowHeight / 2} C${a.x + a.width + 30} ${a.y - 20} ${b.x + b.width + 30} ${b.y + 20} ${b.x + b.width} ${b.y + rowHeight / 2}`
        : `M${x1} ${y1} C${x1} ${y1 + gapY / 2} ${x2} ${y2 - gapY / 2} ${x2} ${y2}`
    return `<path d="${path}" fill="none" stroke="#555" stroke-width="1.3"${dash} marker-end="url(#tip)"/>`
  })
  const shapes = [...boxes.values()].map(
    ({ text, fill, input, x, y, width: w }) =>
      `<g><rect x="${x}" y="${y}" width="${w}" height="${rowHeight}" rx="${input ? rowHeight / 2 : 4}" fill="${fill}" stroke="#333"/><text x="${x + w / 2}" y="${y + rowHeight / 2 + 4}" text-anchor="middle">${xml(text)}</text></g>`,
  )
  const bottom = margin + rows.length * (rowHeight + gapY)
  const headline = passes[worst.name]?.headline ?? 1
  const legend = Array.from({ length: headline }, (_, i) => {
    const x = margin + i * 90
    return `<rect x="${x}" y="${bottom}" width="16" height="16" fill="${colours[i % colours.length]}" stroke="#333"/><text x="${x + 22}" y="${bottom + 13}">pass ${i + 1}</text>`
  })
  const note = `rank ${worst.name}: dashed edges wait for all of it, dotted ones come from the step before`
  const height = bottom + 60
  const wide = Math.max(width, note.length * charWidth + 2 * margin)
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${wide}" height="${height}" viewBox="0 0 ${wide} ${height}" font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">`,
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#555"/></marker></defs>',
    `<rect width="${wide}" height="${height}" fill="#ffffff"/>`,
    ...lines,
    ...shapes,
    ...legend,
    `<text x="${margin}" y="${bottom + 40}">${xml(note)}</text>`,
    '</svg>',
    '',
  ].join('\n')
}
