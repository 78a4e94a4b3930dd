import { checkInteger, checkOptions, mustBe } from '../check.js'
import { bytesPerElement, type DType, dtypes } from '../dtype.js'
import { unshiftedExp } from './bounded.js'
import { isContraction, visibleShare, type Work, workOf } from './cost.js'
import { broken } from './error.js'
import { type Graph, graphOf, indexedBy, type Node } from './graph.js'
import { type CascadeIR, rankOf, type Span, sizedRanks, tensorsOf, visitPredicate } from './ir.js'
import { type Machine, type MachineName, machineOf } from './machine.js'
import { edgeKind, type RankPasses, rankPasses, sweepNumbers } from './passes.js'
import { tie } from './sizes.js'
import { type Suggestion, suggest } from './suggest.js'
import { indivisible } from './validate.js'

/** Options of an analysis. */
export interface AnalyzeOptions {
  /** Sizes of ranks. Quantities that need one that is not known are NaN. */
  sizes?: Readonly<Record<string, number>> | undefined
  /** Values of run-time scalars, for predicates such as `m <= p + off`. */
  scalars?: Readonly<Record<string, number>> | undefined
  /** Dtype of every tensor that `dtypes` does not name: that of the first one it names, else bfloat16. */
  dtype?: DType | undefined
  dtypes?: Readonly<Record<string, DType>> | undefined
  /** h100 if left out. */
  machine?: MachineName | Machine | undefined
}

/** A tensor that has to be kept somewhere while the cascade runs on one block of rows. */
export interface LiveTensor {
  tensor: string
  bytes: number
  /** Sizes by their ranks; `P0` and `M0` are a tile of P and M, the last number is the bytes of an element. */
  formula: string
  /** One tile of it, all of the rank that is traversed again, or a result that accumulates. */
  reason: 'tile' | 'whole fiber' | 'state'
}

/** Operations of one einsum. */
export interface EinsumWork {
  einsum: string
  /** Multiplications and additions, two for each multiply-add. */
  mulAdd: number
  /** Exponentials, logarithms and other operations of that unit. */
  exp: number
  /** Divisions, comparisons, maxima. */
  other: number
  /** Where the multiplications run. */
  unit: 'tensor' | 'vector'
}

/** Something in a cascade that is legal and likely a mistake. */
export interface AnalysisWarning {
  code: `CAS${number}`
  message: string
  span: Span
}

/** What {@link Cascade.analyze} finds. */
export interface Analysis {
  /** For each rank, how often any implementation traverses it, and why. */
  passes: Record<string, RankPasses>
  live: LiveTensor[]
  /** Bytes on chip for one block of rows: accumulators, one tile, and the whole fibers of the worst moment. */
  footprint: number
  flops: EinsumWork[]
  /** `minimal`: every input and output once. `asWritten`: with what is traversed again reloaded, spilled first if need be. */
  bytes: { minimal: number; asWritten: number }
  /** Operations per byte of minimal traffic. */
  intensity: number
  /** Microseconds that each unit of the machine needs at its full rate. */
  times: { tensor: number; exp: number; vector: number; memory: number }
  /** The unit that needs longest; undefined while a size is not known. */
  bound: 'tensor' | 'exp' | 'vector' | 'memory' | undefined
  timeLowerBoundUs: number
  /** Einsums that can share one loop; those of different groups cannot. */
  fusionGroups: string[][]
  suggestions: Suggestion[]
  warnings: AnalysisWarning[]
  machine: string
}

const known: ReadonlySet<string> = new Set<keyof AnalyzeOptions>([
  'sizes',
  'scalars',
  'dtype',
  'dtypes',
  'machine',
])

// Ranks beyond this do not fit in a tile, so a sum that is complete before such a rank begins ends its loop
const widest = 512

/** @internal Everything that the text, some sizes and a machine tell. */
export function analyze(ir: CascadeIR, options: AnalyzeOptions, advise = true): Analysis {
  checkOptions('cascade', options, known)
  // a rewrite may leave out what the text has
  if (advise) {
    checkOptions('cascade', options.sizes, sizedRanks(ir), 'size')
    checkOptions('cascade', options.dtypes, tensorsOf(ir), 'tensor')
    checkOptions('cascade', options.scalars, new Set(ir.scalars), 'scalar')
  }
  return new Analyzer(ir, options).run(advise)
}

class Analyzer {
  readonly #graph: Graph
  readonly #machine: Machine
  readonly #sizes: Map<string, number>
  readonly #masks = new Set<string>()
  readonly #shares = new Map<string, number>()
  readonly #groups: ReadonlyMap<Node, number>
  readonly #independent: readonly string[]

  constructor(
    readonly ir: CascadeIR,
    readonly options: AnalyzeOptions,
  ) {
    this.#graph = graphOf(ir)
    this.#machine = machineOf(options.machine ?? 'h100')
    this.#sizes = sizesOf(ir, options.sizes ?? {})
    for (const name of [options.dtype, ...Object.values(options.dtypes ?? {})]) {
      if (name !== undefined && !dtypes.includes(name))
        throw mustBe('cascade', 'dtype', `one of ${dtypes.join(', ')}`, name)
    }
    this.#checkMasks()
    this.#groups = this.#fusion()
    this.#independent = this.#independentRanks()
  }

  run(advise: boolean): Analysis {
    const passes: Record<string, RankPasses> = {}
    for (const family of this.#graph.families) passes[family.name] = rankPasses(this.#graph, family)
    // Windows, as of K[u*4 + r], have a rank of their own, over which more may be done than over what they are cut from
    for (const { name, levels } of this.ir.families) {
      if (passes[name]) continue
      const own = rankPasses(this.#graph, { name, levels })
      if (own.headline > 1) passes[name] = own
    }
    const work = this.#graph.nodes.map((node) => ({ node, work: this.#work(node) }))
    const flops = work
      .filter(
        ({ node, work: one }) => !node.statement.init || one.vector + one.tensor + one.exp > 0,
      )
      .map(({ node, work: one }) => ({
        einsum: node.name,
        mulAdd: one.tensor + one.vector,
        exp: one.exp,
        other: one.other,
        unit: isContraction(node, this.ir.variables) ? ('tensor' as const) : ('vector' as const),
      }))
    const bytes = this.#bytes()
    const times = this.#times(
      work.map(({ work: one }) => one),
      bytes.minimal,
    )
    const units = Object.entries(times) as ['tensor' | 'exp' | 'vector' | 'memory', number][]
    const slowest = units.reduce((a, b) => (b[1] > a[1] ? b : a))
    const decided = units.every(([, time]) => !Number.isNaN(time))
    const operations = flops.reduce((sum, one) => sum + one.mulAdd + one.exp + one.other, 0)
    const live = this.#live()
    const analysis: Analysis = {
      passes,
      live: live.tensors,
      footprint: live.footprint,
      flops,
      bytes,
      intensity: operations / bytes.minimal,
      times,
      bound: decided ? slowest[0] : undefined,
      timeLowerBoundUs: decided ? slowest[1] : Number.NaN,
      fusionGroups: this.#groupNames(),
      suggestions: [],
      warnings: this.#warnings(),
      machine: this.#machine.name,
    }
    if (advise) {
      analysis.suggestions = suggest(this.ir, analysis, this.#machine.tile, this.#sizes, (ir) =>
        analyze(ir, this.options, false),
      )
    }
    return analysis
  }

  #size(rank: string): number {
    return this.#sizes.get(rank) ?? Number.NaN
  }

  // Points of an iteration space; parts of a split rank are as many as the rank has, without the tail
  #points(variables: Iterable<string>): number {
    const rest = new Set(variables)
    let points = 1
    for (const { name, levels } of this.#graph.families) {
      if (!levels.every((v) => rest.has(v)) || Number.isNaN(this.#size(name))) continue
      points *= this.#size(name)
      for (const v of levels) rest.delete(v)
    }
    for (const v of rest) points *= this.#size(rankOf(v))
    return points
  }

  #width(tensor: string): number {
    const { dtype, dtypes: named = {} } = this.options
    const source = this.#graph.aliases.get(tensor) ?? tensor
    const own = named[tensor] ?? named[source]
    if (own) return bytesPerElement[own]
    if (this.#masks.has(tensor)) return 4
    return bytesPerElement[dtype ?? Object.values(named)[0] ?? 'bfloat16']
  }

  #checkMasks(): void {
    for (const { statement } of this.#graph.nodes) {
      if (!statement.where) continue
      visitPredicate(statement.where, (one) => {
        if (one.kind !== 'access') return
        this.#masks.add(one.name)
        const dtype = this.options.dtypes?.[one.name]
        if (dtype?.includes('float'))
          throw broken(
            'CAS010',
            'masks must be decidable from indices and integer tensors',
            one.span,
            one.name,
          )
      })
    }
  }

  // What of a statement's points is visible: its own predicate, or what it reads being empty there
  #share(node: Node): number {
    const { where } = node.statement
    let share = where
      ? visibleShare(where, this.ir, (rank) => this.#size(rank), this.options.scalars ?? {})
      : 1
    for (const { tensor, places } of node.ins) {
      const present = this.#shares.get(tensor)
      if (present !== undefined && places.size > 0) share = Math.min(share, present)
    }
    const reduced = node.statement.reduce?.over ?? []
    if (reduced.length === 0 || !where) {
      const partial = reduced.length > 0 && share < 1
      if (!partial) this.#shares.set(node.name, share)
    } else {
      const names = new Set<string>()
      visitPredicate(where, (one) => one.kind === 'name' && names.add(one.name))
      if (![...names].some((v) => reduced.includes(v))) this.#shares.set(node.name, share)
    }
    return share
  }

  #work(node: Node): Work {
    const share = this.#share(node)
    const work = workOf(node, this.ir, (variables) => this.#points(variables))
    return {
      tensor: work.tensor * share,
      vector: work.vector * share,
      exp: work.exp * share,
      other: work.other * share,
    }
  }

  #times(all: readonly Work[], bytes: number): Analysis['times'] {
    const { cores, clock, tensor, exp, lanes, memory } = this.#machine
    const sum = (unit: keyof Work) => all.reduce((total, work) => total + work[unit], 0)
    const width = this.#width(this.ir.inputs[0] ?? '')
    const rate =
      width >= 4
        ? tensor.float32
        : width === 1
          ? (tensor.float8 ?? tensor.bfloat16)
          : tensor.bfloat16
    // GHz are a thousand clocks per microsecond
    const clocks = cores * clock * 1e3
    return {
      tensor: sum('tensor') / (clocks * rate),
      exp: sum('exp') / (clocks * exp),
      vector: (sum('vector') / 2 + sum('other')) / (clocks * lanes),
      memory: bytes / (memory / 1e6),
    }
  }

  // Which loop each einsum lies in: a later one where a rank is swept again, and where a finished sum meets a long rank
  #fusion(): Map<Node, number> {
    const graph = this.#graph
    const positions = graph.families.map(({ levels }) => ({
      variable: levels[0]!,
      sweeps: sweepNumbers(graph, levels),
    }))
    const groups = new Map<Node, number>()
    for (const node of graph.nodes) {
      let group = 1
      for (const use of node.ins) {
        for (const producer of graph.producers.get(use.tensor) ?? []) {
          const before = groups.get(producer)
          if (producer === node || before === undefined || producer.statement.init) continue
          if (
            positions.some(
              ({ variable }) => edgeKind(node, use, producer, variable) === 'streaming',
            )
          )
            continue
          const again = positions.some(({ variable, sweeps }) => {
            const from = sweeps.get(producer)!
            return from > 0 && node.variables.has(variable) && sweeps.get(node)! > from
          })
          const sums = [...producer.variables].some((v) => !indexedBy(producer.out, v))
          const long = [...node.variables].some(
            (v) =>
              !producer.variables.has(v) && v !== node.iteration && this.#size(rankOf(v)) > widest,
          )
          group = Math.max(group, before + (again || (sums && long) ? 1 : 0))
        }
      }
      groups.set(node, group)
    }
    // The statements of one iteration run together
    for (const node of graph.nodes) {
      if (node.iteration === undefined) continue
      const body = graph.nodes.filter(({ iteration }) => iteration === node.iteration)
      groups.set(node, Math.max(...body.map((one) => groups.get(one)!)))
    }
    return groups
  }

  #groupNames(): string[][] {
    const names: string[][] = []
    for (const [node, group] of this.#groups) {
      if (node.statement.init) continue
      names[group - 1] ??= []
      if (!names[group - 1]!.includes(node.name)) names[group - 1]!.push(node.name)
    }
    return names.filter(Boolean)
  }

  // Ranks of every tensor that is computed: their coordinates are problems of their own
  #independentRanks(): string[] {
    const body = this.#graph.nodes.filter(({ statement }) => !statement.init)
    const shared = [...(body[0]?.variables ?? [])].filter((v) =>
      body.every((node) => indexedBy(node.out, v) && v !== node.iteration),
    )
    return shared.sort((a, b) => (this.#size(rankOf(b)) || 0) - (this.#size(rankOf(a)) || 0))
  }

  #bytes(): Analysis['bytes'] {
    const { nodes, aliases } = this.#graph
    const { inputs, outputs } = this.ir
    const sized = new Map<string, number>()
    const readers = new Map<string, Set<number>>()
    const writer = new Map<string, number>()
    const spanOf = (node: Node, variables: Iterable<string>) => {
      const group = this.#groups.get(node)!
      return { group, points: this.#points(variables) }
    }
    for (const node of nodes) {
      for (const use of node.ins) {
        const name = aliases.get(use.tensor) ?? use.tensor
        const { group, points } = spanOf(node, axesOf(use))
        sized.set(name, Math.max(sized.get(name) ?? 0, points))
        readers.set(name, (readers.get(name) ?? new Set()).add(group))
      }
      if (node.statement.init && !this.ir.outputs.includes(node.name)) continue
      const kept = [...axesOf(node.out)].filter((v) => node.out.places.get(v) !== 'next')
      sized.set(node.name, Math.max(sized.get(node.name) ?? 0, this.#points(kept)))
      writer.set(node.name, this.#groups.get(node)!)
    }
    const bytes = (name: string) => (sized.get(name) ?? Number.NaN) * this.#width(name)
    let [minimal, asWritten] = [0, 0]
    for (const name of inputs) {
      const times = readers.get(name)?.size ?? 0
      if (times === 0) continue
      minimal += bytes(name)
      asWritten += times * bytes(name)
    }
    for (const name of outputs) {
      minimal += bytes(name)
      asWritten += bytes(name)
    }
    for (const [name, group] of writer) {
      const later = [...(readers.get(name) ?? [])].filter((one) => one !== group)
      const own = this.#stateful(name)
      if (later.length > 0 && !own) asWritten += (1 + later.length) * bytes(name)
    }
    return { minimal, asWritten }
  }

  #stateful(name: string): boolean {
    return (this.#graph.producers.get(name) ?? []).some(({ out }) =>
      [...out.places.values()].includes('next'),
    )
  }

  #live(): { tensors: LiveTensor[]; footprint: number } {
    const graph = this.#graph
    const tensors: (LiveTensor & {
      from: number
      to: number
      replaces: ReadonlySet<string> | undefined
    })[] = []
    const [rows, ...others] = this.#independent
    const { tile } = this.#machine
    for (const node of graph.nodes) {
      const { name, out, statement } = node
      if (statement.init || this.ir.outputs.includes(name)) continue
      const state = this.#stateful(name)
      const factors: [string, number][] = []
      const rowFactors: [string, number][] = []
      let whole = false
      let streamed = false
      for (const { name: rank, levels } of graph.families) {
        const own = levels.filter((v) => indexedBy(out, v))
        if (own.length === 0 || others.includes(own[0]!)) continue
        if (own[0] === rows) {
          rowFactors.push([`${rank}0`, Math.min(this.#size(rank), tile)])
          continue
        }
        const swept = graph.nodes.some(({ variables, out: other, iteration }) =>
          levels.some((v) => variables.has(v) && (iteration === v || !indexedBy(other, v))),
        )
        if (this.#crosses(node, own)) {
          whole = true
          const full = own.length === levels.length
          factors.push([full ? rank : own.map(rankOf).join('*'), this.#points(own)])
          continue
        }
        // an iterative rank holds one step at a time, an outer level one of its parts
        const inner = own.filter(
          (v) => v !== node.iteration && !(levels.length > 1 && v !== levels.at(-1)),
        )
        if (inner.length === 0) continue
        const accumulates = [...node.variables].some(
          (v) =>
            !levels.includes(v) &&
            !indexedBy(out, v) &&
            graph.families.some(
              (other) =>
                other.levels.includes(v) && !this.#independent.includes(v) && this.#long(v),
            ),
        )
        if (swept && !accumulates && !state) {
          streamed = true
          const size = this.#size(rankOf(inner[0]!))
          factors.push([
            levels.length > 1 ? rankOf(inner[0]!) : `${rank}0`,
            levels.length > 1 ? size : Math.min(size, tile),
          ])
        } else factors.push([rank, this.#size(rank)])
      }
      factors.push(...rowFactors)
      const passing = node.iteration !== undefined && !state
      const reason = whole ? 'whole fiber' : streamed || passing ? 'tile' : 'state'
      const width = reason === 'state' ? 4 : this.#width(name)
      const readers = graph.nodes.filter(({ ins }) => ins.some(({ tensor }) => tensor === name))
      tensors.push({
        tensor: name,
        bytes: factors.reduce((product, [, size]) => product * size, width),
        formula: [...factors.map(([text]) => text), String(width)].join('*'),
        reason,
        replaces: statement.reduce ? undefined : lastRead(graph, node),
        from: this.#groups.get(node)!,
        to: Math.max(...readers.map((reader) => this.#groups.get(reader)!), 0),
      })
    }
    // Tiles take turns; so do fibers of different sweeps, and one that is written over another needs no more room
    const of = (reason: LiveTensor['reason']) => tensors.filter((one) => one.reason === reason)
    const sum = (some: readonly LiveTensor[]) => some.reduce((total, { bytes }) => total + bytes, 0)
    const fibers = of('whole fiber')
    const own = fibers.filter(
      ({ formula, replaces }) =>
        !fibers.some((other) => replaces?.has(other.tensor) && other.formula === formula),
    )
    const moments = own.map(({ from: at }) =>
      sum(own.filter(({ from, to }) => from === at || (from < at && to > at))),
    )
    const footprint =
      sum(of('state')) +
      Math.max(0, ...of('tile').map(({ bytes }) => bytes)) +
      Math.max(0, ...moments)
    return {
      tensors: tensors.map(({ tensor, bytes, formula, reason }) => ({
        tensor,
        bytes,
        formula,
        reason,
      })),
      footprint,
    }
  }

  #long(variable: string): boolean {
    const size = this.#size(rankOf(variable))
    return Number.isNaN(size) || size > this.#machine.tile
  }

  // Whether a tensor is read in a later sweep over its own levels than the one that wrote it
  #crosses(node: Node, levels: readonly string[]): boolean {
    const numbers = sweepNumbers(this.#graph, levels)
    const written = numbers.get(node)!
    return this.#graph.nodes.some(
      (reader) =>
        reader !== node &&
        reader.variables.has(levels[0]!) &&
        reader.ins.some(
          (use) =>
            use.tensor === node.name &&
            indexedBy(use, levels[0]!) &&
            edgeKind(reader, use, node, levels[0]!) === 'plain',
        ) &&
        numbers.get(reader)! > written,
    )
  }

  #warnings(): AnalysisWarning[] {
    const warnings: AnalysisWarning[] = []
    const producers = (tensor: string) =>
      (this.#graph.producers.get(tensor) ?? [])
        .map(({ statement }) => statement)
        .filter(({ init }) => !init)
    for (const { name, statement, prefix } of this.#graph.nodes) {
      const { expr, out } = statement
      const exp = unshiftedExp(expr, producers)
      if (exp) {
        warnings.push({
          code: 'CAS030',
          message: `${name} takes exp of a score that nothing shifts; subtract its maximum first`,
          span: exp.span,
        })
      }
      for (const v of prefix) {
        warnings.push({
          code: 'CAS031',
          message: `${name} reads a prefix again for each of its elements, O(${rankOf(v)}) traversals; rewrite ${v} as an iterative rank`,
          span: out.span,
        })
      }
    }
    for (const { node, variable } of this.#sweptByStep()) {
      warnings.push({
        code: 'CAS032',
        message: `${node.name} sweeps ${variable} again in every step of ${node.iteration}; passes count one step`,
        span: node.statement.out.span,
      })
    }
    return warnings
  }

  // Reductions inside an iteration over what does not change with it, if the next step waits for their result
  *#sweptByStep(): Generator<{ node: Node; variable: string }> {
    const { nodes } = this.#graph
    for (const node of nodes) {
      const { iteration } = node
      if (iteration === undefined) continue
      const body = nodes.filter((one) => one.iteration === iteration)
      const waiting = new Set([node.name])
      for (let size = 0; size < waiting.size; ) {
        size = waiting.size
        for (const { name, ins } of body)
          if (ins.some(({ tensor }) => waiting.has(tensor))) waiting.add(name)
      }
      // reached by its own result, so through the state
      if (!node.ins.some(({ tensor }) => waiting.has(tensor))) continue
      const variable = [...node.variables].find(
        (v) =>
          v !== iteration &&
          !indexedBy(node.out, v) &&
          node.ins.some((use) => indexedBy(use, v) && !indexedBy(use, iteration)),
      )
      if (variable !== undefined) yield { node, variable }
    }
  }
}

// Tensors that no einsum after this one reads
function lastRead({ nodes }: Graph, node: Node): Set<string> {
  const later = nodes.slice(nodes.indexOf(node) + 1)
  return new Set(
    node.ins
      .map(({ tensor }) => tensor)
      .filter((name) => !later.some(({ ins }) => ins.some(({ tensor }) => tensor === name))),
  )
}

function* axesOf({
  axes,
  places,
}: {
  axes: readonly (ReadonlySet<string> | undefined)[]
  places: ReadonlyMap<string, string>
}) {
  for (const axis of axes) {
    for (const v of axis ?? []) if (places.get(v) === 'cur' || places.get(v) === 'next') yield v
  }
}

function sizesOf(ir: CascadeIR, given: Readonly<Record<string, number>>): Map<string, number> {
  const sizes = new Map<string, number>()
  for (const [rank, size] of ir.ranks) if (size !== undefined) sizes.set(rank, size)
  for (const [rank, value] of Object.entries(given)) {
    const size = checkInteger('cascade', `sizes.${rank}`, value, 0)
    const before = sizes.get(rank)
    if (before !== undefined && before !== size)
      throw broken(
        'CAS003',
        `rank ${rank} is ${before} from its declaration but ${size} from sizes`,
        [1, 1, 0],
        rank,
      )
    sizes.set(rank, size)
  }
  const tied = () =>
    tie(
      ir,
      (rank) => sizes.get(rank),
      (rank, size) => sizes.set(rank, size),
    )
  tied()
  for (const { variable, outer, inner, size, tailMask, span } of ir.splits) {
    sizes.set(rankOf(inner), size)
    const whole = sizes.get(rankOf(variable))
    if (whole === undefined) continue
    if (whole % size !== 0 && !tailMask) throw indivisible(variable, size, whole, span)
    sizes.set(rankOf(outer), Math.ceil(whole / size))
  }
  // with the parts of split ranks
  tied()
  return sizes
}
