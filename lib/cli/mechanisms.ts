import { closest, mustBe } from '../check.js'
import type { FloatDType } from '../dtype.js'
import { refuse } from '../errors.js'
import type { Mask } from '../mask.js'
import { flexPrefill } from '../mechanisms/flex-prefill.js'
import { infiniteHipPresets } from '../mechanisms/infinite-hip.js'
import { minference } from '../mechanisms/minference.js'
import { sampled } from '../mechanisms/sampled.js'
import { streaming } from '../mechanisms/streaming.js'
import { xattention } from '../mechanisms/xattention.js'
import { hip, hipStages } from '../ops/hip.js'
import { scope } from '../scope.js'
import { zeros } from '../tensor.js'
import { chooseNumber } from './model.js'

/** @internal A mechanism of the command line with its settings. */
export interface Mechanism {
  /** As `heddle eval --attention` takes it, with its settings. */
  label: string
  select(q: Q, k: Q): Mask
}

type Q = Parameters<typeof flexPrefill<FloatDType>>[0]
type Settings = Readonly<Record<string, string | undefined>>

/** @internal Options of `heddle eval` that are settings of a mechanism, beside its name. */
export const mechanismOptions = [
  ...['mode', 'gamma', 'tau', 'min-budget', 'max-budget', 'block', 'stride', 'threshold', 'top-k'],
  ...['window', 'sink-tokens', 'vertical', 'slash', 'head-mode', 'representative'],
] as const

const camel = (name: string) => name.replace(/-(.)/g, (_, letter: string) => letter.toUpperCase())

const texts: ReadonlySet<string> = new Set(['mode', 'head-mode', 'representative'])

// The mode tells which search is meant, InfiniteHiP's stages if left out; a block is one of keys, a stride one of queries
const search = (q: Q, k: Q, settings: object) => {
  const {
    mode = 'stages',
    block,
    stride,
    ...rest
  } = settings as {
    mode?: string
    block?: number
    stride?: number
  }
  if (mode !== 'halves' && mode !== 'stages' && mode !== 'fine')
    throw mustBe('hip', 'mode', '"stages", "fine" or "halves"', mode)
  return hip(q, k, {
    ...(mode === 'fine' && infiniteHipPresets.fineScans),
    ...rest,
    ...(mode === 'stages' && { stages: hipStages }),
    ...(block !== undefined && { block: [64, block] }),
    ...(stride !== undefined && { stride: [stride, 1] }),
  })
}

const makers: Readonly<
  Record<string, readonly [options: string, select: (q: Q, k: Q, settings: object) => Mask]>
> = {
  'flex-prefill': ['mode gamma tau min-budget max-budget block', flexPrefill],
  hip: ['mode top-k block stride window sink-tokens head-mode representative', search],
  minference: [
    'vertical slash',
    (q, k, settings) => {
      const { vertical = 1000, slash = 6096 } = settings as { vertical?: number; slash?: number }
      return minference(q, k, { patterns: [{ kind: 'vertical-slash', vertical, slash }] })
    },
  ],
  sampled: ['stride top-k block', sampled],
  streaming: ['window sink-tokens', streaming],
  xattention: ['stride threshold block', xattention],
}

/** @internal The mechanism of a name with the settings that were given. */
export function chooseMechanism(op: string, name: string, given: Settings): Mechanism {
  const maker = Object.hasOwn(makers, name) ? makers[name] : undefined
  if (!maker) {
    const near = closest(name, Object.keys(makers))
    if (near === undefined)
      throw mustBe(op, 'attention', `one of ${Object.keys(makers).join(', ')}`, name)
    throw refuse(
      'ERR_ARGUMENT',
      op,
      'attention',
      `attention must be a mechanism, got "${name}"; did you mean "${near}"?`,
    )
  }
  const [takes, select] = maker
  const settings: Record<string, string | number> = {}
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined) continue
    if (!takes.split(' ').includes(key))
      throw refuse('ERR_ARGUMENT', op, key, `--${key} goes with another mechanism than ${name}`)
    settings[camel(key)] = texts.has(key) ? value : chooseNumber(op, key, value)
  }
  // What is wrong with them comes out before anything is evaluated
  scope(() => select(zeros([1, 1, 1, 16]), zeros([1, 1, 1, 16]), settings))
  const shown = Object.entries(given).filter(([, value]) => value !== undefined)
  return {
    label: [name, ...shown.map(([key, value]) => `${key} ${value}`)].join(' '),
    select: (q, k) => select(q, k, settings),
  }
}
