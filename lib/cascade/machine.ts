import { availableParallelism, cpus } from 'node:os'
import { mustBe } from '../check.js'
import { refuse } from '../errors.js'
import { operatorSchemas } from '../native.js'

/** What an analysis needs to know of a machine. Rates are per core (or multiprocessor) and clock. */
export interface Machine {
  name: string
  cores: number
  /** In GHz. */
  clock: number
  /** Matrix FLOP: of bfloat16 and float16, of float8 (those of bfloat16 if there are none), of float32. */
  tensor: { bfloat16: number; float8?: number | undefined; float32: number }
  /** Exponentials, logarithms and what else has a unit of its own. */
  exp: number
  /** Lanes that each multiply and add once. */
  lanes: number
  /** Bytes per second. */
  memory: number
  /** Bytes that one tile may hold on chip. */
  onChip: number
  /** Bytes of the last cache that all cores share. */
  cache: number
  /** Rows and columns of a tile. */
  tile: number
}

/** Machines that {@link Cascade.analyze} knows by name. */
export type MachineName = 'h200' | 'h100' | 'a100' | 'cpu'

const hopper: Omit<Machine, 'name' | 'memory'> = {
  cores: 132,
  clock: 1.83,
  tensor: { bfloat16: 4096, float8: 8192, float32: 256 },
  exp: 16,
  lanes: 128,
  onChip: 227 * 1024,
  cache: 50e6,
  tile: 128,
}

// Vendors' figures
const known: Readonly<Record<Exclude<MachineName, 'cpu'>, Machine>> = {
  h200: { ...hopper, name: 'h200', memory: 4.8e12 },
  h100: { ...hopper, name: 'h100', memory: 3.35e12 },
  a100: {
    name: 'a100',
    cores: 108,
    clock: 1.41,
    tensor: { bfloat16: 2048, float32: 128 },
    exp: 16,
    lanes: 64,
    memory: 2.04e12,
    onChip: 163 * 1024,
    cache: 40e6,
    tile: 128,
  },
}

let measured: Machine | undefined

// Lanes and units follow from the instruction set, bandwidth from copying what no cache holds
function measure(): Machine {
  const isa = operatorSchemas().find(({ cpu }) => cpu)?.cpu ?? 'baseline'
  const width = isa === 'avx512' ? 16 : isa === 'avx2' ? 8 : 4
  const lanes = width * 2
  const from = new Float64Array(4 << 20).fill(1)
  const to = new Float64Array(from.length)
  let best = Number.POSITIVE_INFINITY
  for (let run = 0; run < 4; run++) {
    const started = performance.now()
    to.set(from)
    best = Math.min(best, performance.now() - started)
  }
  const cores = availableParallelism()
  return {
    name: 'cpu',
    cores,
    clock: (cpus()[0]?.speed || 2000) / 1000,
    tensor: { bfloat16: 2 * lanes, float32: 2 * lanes },
    // a polynomial of about ten multiply-adds
    exp: lanes / 10,
    lanes,
    memory: (2 * from.byteLength) / (Math.max(best, 1e-3) / 1000),
    onChip: 1 << 20,
    cache: 32e6,
    tile: 64,
  }
}

/** @internal A machine by its name, or one that the caller describes. */
export function machineOf(machine: MachineName | Machine): Machine {
  if (machine === 'cpu') {
    measured ??= measure()
    return measured
  }
  if (typeof machine === 'string') {
    if (Object.hasOwn(known, machine)) return known[machine]
    throw mustBe('cascade', 'machine', `one of ${Object.keys(known).join(', ')}, cpu`, machine)
  }
  if (machine === null || typeof machine !== 'object')
    throw mustBe('cascade', 'machine', 'a name or a description', machine)
  const rates = {
    cores: machine.cores,
    clock: machine.clock,
    'tensor.bfloat16': machine.tensor?.bfloat16,
    'tensor.float32': machine.tensor?.float32,
    exp: machine.exp,
    lanes: machine.lanes,
    memory: machine.memory,
    onChip: machine.onChip,
    cache: machine.cache,
    tile: machine.tile,
  }
  for (const [name, rate] of Object.entries(rates)) {
    if (!(typeof rate === 'number' && rate > 0 && Number.isFinite(rate)))
      throw refuse(
        'ERR_ARGUMENT',
        'cascade',
        `machine.${name}`,
        `machine.${name} must be a positive number, got ${String(rate)}`,
      )
  }
  return machine
}
