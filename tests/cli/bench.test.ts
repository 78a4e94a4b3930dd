import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'
import { operators } from '../../bench/cases.js'
import { errorBound, parseProblem } from '../../bench/problem.js'

const root = join(__dirname, '../..')
const int = (from: number, to: number) => from + Math.floor(Math.random() * (to - from + 1))

function make(text: string) {
  const problem = parseProblem(text)
  const made = operators[problem.operator]!(problem, 'cpu')
  expect(problem.unasked(), text).toEqual([])
  return made
}

describe('problems of attention', () => {
  const sizes = () =>
    `b${int(1, 2)} sq${int(1, 99)} sk${2 * int(25, 65)} hq4 hk2 d${8 * int(1, 8)} f32`

  it.each([
    'causal blocks16 density0.5 slopes',
    'causal blocks16 density0.5 bias',
    'causal blocks16 density1 sigmoid',
    'blocks16 density0.3 softCap2',
    'causal blocks16 top1',
    'blocks16 top4 seed7',
    'causal softCap1 slopes bias',
    'window9 softCap3',
    'ragged1',
    'causal ragged2 slopes sigmoid',
    'ragged3 bias',
  ])('%s is what runs and what is checked, forward and backward', async (options) => {
    for (const operator of ['attention', 'attention.backward']) {
      const text = `${operator}:${sizes()} ${options}`
      const made = make(text)
      expect(await made.check(), text).toBeLessThan(1e-4)
      for (const other of Object.values(made.others ?? {})) expect(other().length).toBe(2)
    }
  })

  it.each(['bias', 'sigmoid', 'causal sigmoid bias', 'window1', 'causal window1 ragged1'])(
    '%s is checked backward',
    async (options) => {
      const text = `attention.backward:${sizes()} ${options}`
      expect(await make(text).check(), text).toBeLessThan(1e-3)
    },
  )

  it('pages have peers of ours only without what those do not take', async () => {
    const text = 'attention:b2 sq65 sk65 hq4 hk2 d16 f32 page16 causal window7 slopes'
    const made = make(text)
    expect(made.others).toBeUndefined()
    expect(await made.check()).toBeLessThan(1e-4)
  })

  it('a scatter writes each row once, whatever their number', async () => {
    for (const m of [49, 7 * int(2, 40), int(50, 300)]) {
      const indices = make(`scatter:m${m} d8`).inputs[2]!
      expect(new Set(await indices.read({ as: 'float32' })).size).toBe(m)
    }
  })

  it.each<readonly [options: string, message: string]>([
    ['blocks16 top5', 'must have a top up to its 4 columns of blocks, got 5'],
    ['blocks16 top1.5', 'must have a whole top from 1 on, got 1.5'],
    ['blocks16', 'must have blocks with either top or density'],
    ['blocks16 top2 density0.5', 'must have blocks with either top or density'],
    ['blocks16 density2', 'must have a density above 0 up to 1, got 2'],
    ['blocks16 density0', 'must have a density above 0 up to 1, got 0'],
    ['blocks16 density0.5 window32', 'has blocks and window, which do not go together'],
    ['blocks16 density0.5 ragged1', 'has blocks and ragged, which do not go together'],
    ['page16 bias', 'has page and bias, which do not go together'],
    ...['e4m3', 'sigmoid', 'bias', 'slopes', 'softCap16', 'window16', 'page16', 'ragged16'].map(
      (other) =>
        [
          `reweighted ${other}`,
          `has reweighted and ${other.replace('16', '')}, which do not go together`,
        ] as const,
    ),
    ['window0', 'must have a whole window from 1 on, got 0'],
    ['dv0', 'must have a whole dv from 1 on, got 0'],
  ])('%s is refused', (options, message) => {
    const text = `attention:b1 sq64 sk64 hq1 d64 ${options}`
    expect(() => make(text)).toThrow(`bench: "${text}" ${message}`)
  })
})

describe('heddle bench', () => {
  const bench = (args: string[], env = {}) =>
    spawnSync(process.execPath, [join(root, 'dist/cli.js'), 'bench', '--device', 'cpu', ...args], {
      encoding: 'utf8',
      env: { ...process.env, ...env },
    })

  it.each(['cpu', 'h200'])('errors of the stored results of %s stay below their bounds', (name) => {
    const { rows } = JSON.parse(readFileSync(join(root, `bench/results/${name}.json`), 'utf8'))
    for (const row of rows)
      expect(row.error, row.case).toBeLessThan(errorBound(parseProblem(row.case)))
  })

  it('refuses what the operator does not take before anything is measured', () => {
    for (const [text, message] of [
      ['attention:b1 sq8 sk8 hq3 hk2 d8', '(attention: hq must be a multiple of hk, got 3 and 2)'],
      ['attention.backward:b1 sq8 sk8 hq1 hk1 d7', '(attention: d must be'],
      ['attention.backward:b1 sq8 sk8 hq1 d8 page8', 'has "page8", but attention.backward takes'],
    ]) {
      const { status, stdout, stderr } = bench(['norm:m2 d8', text!])
      expect(stderr).toContain(`bench: "${text}" `)
      expect(stderr).toContain(message)
      expect(stdout).toBe('')
      expect(status).toBe(2)
    }
  })

  it('reports wrong results and cases that fail, and keeps the others', () => {
    const folder = mkdtempSync(join(tmpdir(), 'heddle-bench-'))
    try {
      const more = join(folder, 'more.cjs')
      const built = (name: string) => JSON.stringify(join(root, 'dist', name))
      writeFileSync(
        more,
        `const { operators } = require(${built('bench/cases.js')})
         const { randn, silu } = require(${built('index.js')})
         const made = (check) => ({ size }) => {
           const x = randn([size('n')])
           return { inputs: [x], flops: 8, bytes: 8, run: () => [silu(x)], check }
         }
         operators.wrong = made(async () => 0.25)
         operators.unknown = made(async () => Number.NaN)
         operators.failing = made(async () => { await randn([2]).read({ as: 'text' }) })`,
      )
      const args = ['norm:m2 d8', 'failing:n1', 'wrong:n1 bf16', 'unknown:n1', 'norm:m3 d8']
      const env = { NODE_OPTIONS: `--require ${more}`, HEDDLE_THREADS: 'many' }
      const { status, stdout, stderr } = bench(['--rounds', '1', '--json', ...args], env)
      const lines = stderr.trim().split('\n')
      expect(lines).toHaveLength(3)
      expect(lines[0]).toMatch(/^bench: "failing:n1" failed \(.*must be/)
      expect(lines[1]).toBe('bench: the error of "wrong:n1 bf16" must be below 0.03, got 0.25')
      expect(lines[2]).toBe('bench: the error of "unknown:n1" must be below 0.001, got NaN')
      const { device, rows } = JSON.parse(stdout)
      const measured = rows.map((row: { case: string }) => row.case)
      expect(measured).toEqual(args.filter((text) => text !== 'failing:n1'))
      expect(device).toMatch(/, \d+ threads$/)
      expect(status).toBe(1)
    } finally {
      rmSync(folder, { recursive: true })
    }
  })
})
