import { type Graph, indexedBy, type Node, type Use } from './graph.js'
import type { Family } from './ir.js'

/**
 * One reason for one more pass: what was read, what is complete only after the whole rank, and what reads again.
 */
export interface PassStep {
  /** `QK read by GM` */
  from: string
  /** `GM complete only after all m` */
  via: string
  /** `SN reads QK again` */
  to: string
}

/** How often any implementation traverses one rank. */
export interface RankPasses {
  /** The most passes over any tensor, at the outermost level. */
  headline: number
  /** Passes over each tensor that has the rank, at the outermost level. */
  perTensor: Record<string, number>
  /** The most passes at each level, by its variable, outermost first. */
  perLevel: Record<string, number>
  /** Why the headline is no lower, one step for each pass after the first. */
  why: PassStep[]
}

// A sweep of a chain: which einsum touched which tensor last, and what stood between it and the sweep before
interface Sweep {
  node: Node
  member: string
  first: { node: Node; member: string }
  via: string
  before: Sweep | undefined
}
interface Chain {
  passes: number
  sweep: Sweep | undefined
  via: string
}
const none: Chain = { passes: 0, sweep: undefined, via: '' }
const longer = (a: Chain, b: Chain): Chain => (b.passes > a.passes ? b : a)

/** @internal How what a statement reads hangs on the statement that wrote it, along one variable. */
export function edgeKind(
  node: Node,
  use: Use,
  producer: Node,
  variable: string,
): 'streaming' | 'barrier' | 'plain' {
  const { iteration } = node
  if (
    iteration !== undefined &&
    producer.iteration === iteration &&
    use.places.get(iteration) === 'cur' &&
    producer.out.places.get(iteration) === 'next'
  )
    return 'streaming'
  if (use.places.get(variable) === 'last') return 'barrier'
  if (!producer.variables.has(variable) || producer.prefix.has(variable)) return 'plain'
  if (!indexedBy(producer.out, variable)) return 'barrier'
  if (use.places.get(variable) === 'first') return 'plain'
  if (use.scattered.has(variable)) return 'barrier'
  // written along the variable and read along another one: any element may be asked for
  const axis = producer.out.axes.findIndex((names) => names?.has(variable))
  const read = use.axes[axis]
  // a sum over a prefix needs no element behind the one it is made for
  const follows = read !== undefined && [...read].some((v) => node.prefix.has(v))
  if (follows && node.variables.has(variable) && indexedBy(node.out, variable)) return 'plain'
  return axis >= 0 && read !== undefined && !read.has(variable) ? 'barrier' : 'plain'
}

// Tensors that are indexed by all of these variables at once
function carriersOf(graph: Graph, variables: readonly string[]): Set<string> {
  const found = new Set<string>()
  for (const { out, ins } of graph.nodes) {
    for (const use of [out, ...ins]) {
      if (variables.every((v) => indexedBy(use, v))) found.add(use.tensor)
    }
  }
  return found
}

// An einsum with what it touches and what of it hangs on earlier ones
interface Link {
  node: Node
  tensors: readonly string[]
  edges: readonly { from: number; barrier: boolean; tensor: string }[]
}

function linksOf(graph: Graph, variable: string): Link[] {
  const numbers = new Map(graph.nodes.map((node, i) => [node, i]))
  return graph.nodes.map((node, i) => ({
    node,
    tensors: [...node.ins, node.out].map(({ tensor }) => tensor),
    edges: node.ins.flatMap((use) =>
      (graph.producers.get(use.tensor) ?? []).flatMap((producer) => {
        const from = numbers.get(producer)!
        const kind = from < i ? edgeKind(node, use, producer, variable) : 'streaming'
        const barrier = kind === 'barrier'
        return kind === 'streaming' ? [] : [{ from, barrier, tensor: use.tensor }]
      }),
    ),
  }))
}

// Walks the einsums in order with, for each, the longest chain of touches whose last lies in the current sweep and the
// longest that a barrier already ended
function sweeps(
  links: readonly Link[],
  variable: string,
  touched: ReadonlySet<string>,
): { same: Chain; after: Chain }[] {
  const chains: { same: Chain; after: Chain }[] = []
  for (const { node, tensors, edges } of links) {
    let [same, after] = [none, none]
    for (const { from, barrier, tensor } of edges) {
      const before = chains[from]!
      if (barrier) {
        after = longer(longer(after, { ...before.same, via: tensor }), before.after)
      } else {
        same = longer(same, before.same)
        after = longer(after, before.after)
      }
    }
    const member = tensors.find((tensor) => touched.has(tensor))
    if (member !== undefined && node.variables.has(variable)) {
      const here = { node, member }
      same =
        after.passes + 1 > same.passes
          ? {
              passes: after.passes + 1,
              via: '',
              sweep: { ...here, first: here, via: after.via, before: after.sweep },
            }
          : { ...same, sweep: { ...same.sweep!, ...here } }
      after = none
    }
    chains.push({ same, after })
  }
  return chains
}

function passesOf(graph: Graph, levels: readonly string[], from: number): Map<string, Chain> {
  const variable = levels[from]!
  const carriers = carriersOf(graph, levels.slice(from))
  const links = linksOf(graph, variable)
  const result = new Map<string, Chain>()
  for (const root of carriers) {
    const derived = new Set([root])
    for (const { out, ins } of graph.nodes) {
      if (carriers.has(out.tensor) && ins.some(({ tensor }) => derived.has(tensor)))
        derived.add(out.tensor)
    }
    let best = none
    for (const { same, after } of sweeps(links, variable, derived))
      best = longer(longer(best, same), after)
    result.set(root, best)
  }
  return result
}

/** @internal Passes over one rank, for every tensor and level. */
export function rankPasses(graph: Graph, { levels }: Family): RankPasses {
  const perTensor: Record<string, number> = {}
  const perLevel: Record<string, number> = {}
  let [headline, deepest] = [1, none]
  levels.forEach((level, i) => {
    const chains = passesOf(graph, levels, i)
    perLevel[level] = Math.max(1, ...[...chains.values()].map(({ passes }) => passes))
    if (i > 0) return
    headline = perLevel[level]
    for (const [tensor, chain] of chains) {
      perTensor[tensor] = chain.passes
      deepest = longer(deepest, chain)
    }
  })
  for (const [alias, source] of graph.aliases) {
    const passes = perTensor[alias]
    if (passes !== undefined) perTensor[source] = Math.max(perTensor[source] ?? 0, passes)
  }
  return { headline, perTensor, perLevel, why: explain(deepest, levels[0]!) }
}

function explain({ sweep }: Chain, variable: string): PassStep[] {
  const steps: PassStep[] = []
  for (let at = sweep; at?.before; at = at.before) {
    const { before, first, via } = at
    const how = first.node.ins.some(({ tensor }) => tensor === first.member) ? 'reads' : 'writes'
    const last = before.node.name === before.member ? 'written' : `read by ${before.node.name}`
    steps.unshift({
      from: `${before.member} ${last}`,
      via: `${via} complete only after all ${variable}`,
      to: `${first.node.name} ${how} ${first.member} again`,
    })
  }
  return steps
}

/** @internal In which sweep over some variables each einsum lies, whatever tensor it touches; 0 before the first. */
export function sweepNumbers(graph: Graph, levels: readonly string[]): Map<Node, number> {
  const links = linksOf(graph, levels[0]!)
  const chains = sweeps(links, levels[0]!, carriersOf(graph, levels))
  return new Map(
    chains.map(({ same, after }, i) => [links[i]!.node, Math.max(same.passes, after.passes)]),
  )
}
