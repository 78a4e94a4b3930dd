import { spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { basename, join } from 'node:path'
import { beforeAll, describe, expect, it } from 'vitest'
import { root, runScript } from '../../support/child.js'

// An operator of somebody else: a header and a source, given to CMake, are all that it takes. Only what it needs is
// compiled here, with the commands that CMake would use.

const folder = join(root, 'build/odd')
const binding = join(folder, 'heddle.node')
const source = join(import.meta.dirname, 'odd.cpp')

interface Command {
  directory: string
  command: string
  file: string
  output: string
}

function commands(): Command[] {
  return JSON.parse(readFileSync(join(folder, 'compile_commands.json'), 'utf8'))
}

function shell(command: string, cwd = folder): Promise<void> {
  return new Promise((resolve, reject) => {
    const child = spawn('sh', ['-c', command], { cwd })
    let output = ''
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => (output += text))
    child.on('error', reject)
    child.on('close', (status) => (status === 0 ? resolve() : reject(new Error(output))))
  })
}

const newest = (directory: string): number =>
  Math.max(
    ...readdirSync(directory, { withFileTypes: true }).map((entry) => {
      const path = join(directory, entry.name)
      return entry.isDirectory() ? newest(path) : statSync(path).mtimeMs
    }),
  )

async function build(): Promise<void> {
  mkdirSync(folder, { recursive: true })
  await shell(
    `cmake -S '${root}' -B '${folder}' -DHEDDLE_CUDA=OFF '-DHEDDLE_EXTRA_OPERATORS=${source}'`,
  )
  const parts = ['binding', 'core', 'cpu', 'ops', 'tests/native/odd-operator']
  const changed = Math.max(...parts.map((part) => newest(join(root, part))))
  if (existsSync(binding) && statSync(binding).mtimeMs > changed) return
  const objects: string[] = []
  const queue = commands()
    .filter(({ file, command }) => {
      if (/\/(binding|core)\//.test(file)) return true
      return (
        command.includes('HEDDLE_ISA_NAME=baseline') &&
        ['odd.cpp', 'copy.cpp', 'fill.cpp'].includes(basename(file))
      )
    })
    .map(({ command, directory, file }) => {
      const object = join(folder, `${basename(file)}.o`)
      objects.push(object)
      const [compile] = command.split(' -o ')
      return () => shell(`${compile} -O0 -o '${object}' -c '${file}'`, directory)
    })
  const work = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) await next()
  }
  await Promise.all(Array.from({ length: availableParallelism() }, work))
  await shell(`c++ -shared -pthread -o '${binding}' ${objects.map((o) => `'${o}'`).join(' ')}`)
}

const missing = ['cmake', 'c++'].find((tool) => spawnSync(tool, ['--version']).status !== 0)

describe.skipIf(missing)(
  `an operator from outside${missing ? ` (skipped: ${missing} is not installed)` : ''}`,
  () => {
    beforeAll(build, 240_000)

    // `run` is what every file of lib/ops calls
    async function answer(body: string): Promise<unknown> {
      const { status, stdout, stderr } = await runScript(
        `const { run, operatorSchemas } = require('./dist/native.js')
        const { tensor, full, zeros } = heddle
        const ints = (rows) => tensor(rows.flat(), [rows.length, rows[0].length], { dtype: 'int32' })
        const items = ints([[0, 1, 1, 3], [2, 2, 9, 0]])
        const refusal = (call) => { try { call(); return 'nothing' } catch (error) { return [error.code, error.argument, error.message] } }
        const main = async () => { ${body} }
        main().then((value) => console.log(JSON.stringify(value)))`,
        { env: { HEDDLE_BINDING: binding } },
      )
      expect({ status, stderr }).toEqual({ status: 0, stderr: '' })
      return JSON.parse(stdout)
    }

    it('is compiled once per instruction set', () => {
      const mine = commands().filter(({ file }) => basename(file) === 'odd.cpp')
      const others = commands().filter(({ file }) => basename(file) === 'norm.cpp')
      expect(mine.length).toBe(others.length)
    })

    it('shows its schema', async () => {
      const schema = await answer(
        `return operatorSchemas().find(({ name }) => name === 'odd.count')`,
      )
      expect(schema).toEqual({
        name: 'odd.count',
        cpu: 'baseline',
        cuda: false,
        arguments: [
          { name: 'factor', kind: 'number' },
          { name: 'items', kind: 'input', shape: ['n', 'length'], dtype: 'int32' },
          { name: 'binCount', kind: 'integer' },
          { name: 'weights', kind: 'optional', shape: ['length'], dtype: 'float32' },
          { name: 'totals', kind: 'inout', shape: ['bins+1'], dtype: 'float32' },
          { name: 'leftOut', kind: 'integer' },
          { name: 'mode', kind: 'choice', choices: ['plain', 'mirrored'] },
          { name: 'dtype', kind: 'dtype' },
          { name: 'outputLast', kind: 'flag' },
          { name: 'last', kind: 'output', shape: ['n'], dtype: 'int32' },
          { name: 'counts', kind: 'output', shape: ['n', 'bins'], dtype: 'like totals' },
        ],
      })
    })

    it('runs with defaults, and updates in place', async () => {
      const result = await answer(`
        const totals = full([5], 1)
        const [last, counts] = run('odd.count', { items, totals })
        return [last === undefined, counts.dtype, counts.shape, [...await counts.read()], [...await totals.read()]]`)
      expect(result).toEqual([true, 'float32', [2, 4], [1, 2, 0, 1, 1, 0, 2, 0], [3, 3, 3, 2, 2]])
    })

    it('takes every option, strides and both outputs', async () => {
      const result = await answer(`
        const wide = zeros([7, 2])
        const totals = wide.select(1, 1)
        const [last, counts] = run('odd.count', {
          items: items.transpose(0, 1).contiguous().transpose(0, 1),
          totals, weights: tensor([1, 2, 3, 4]), binCount: 6, factor: 2, leftOut: 1,
          mode: 'plain', dtype: 'float16', outputLast: true, unknown: 'ignored',
        })
        return [
          last.dtype, [...await last.read()], counts.dtype, [...await counts.read({ as: 'float32' })],
          [...await wide.read()],
        ]`)
      expect(result).toEqual([
        'int32',
        [3, 0],
        'float16',
        [2, 10, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 5, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0],
      ])
    })

    it('mirrors by choice', async () => {
      const result = await answer(`
        const [, counts] = run('odd.count', { items, totals: zeros([5]), mode: 'mirrored' })
        return [...await counts.read()]`)
      expect(result).toEqual([1, 0, 2, 1, 0, 2, 0, 1])
    })

    it('is checked by its schema and its own rules', async () => {
      const result = await answer(`
        const totals = zeros([5])
        const weights = full([4], 1)
        return [
          {}, { items: zeros([2, 4]) }, { items: zeros([4], { dtype: 'int32' }) }, { binCount: 0 }, { binCount: 5 },
          { factor: 0 }, { factor: 9 }, { mode: 'odd' }, { dtype: 'int32' }, { outputLast: 1 }, { weights: full([3], 1) },
          { weights, mode: 'mirrored' }, { totals: 5 },
        ].map((wrong, i) => refusal(() => run('odd.count', i ? { items, totals, ...wrong } : { items })))`)
      expect(result).toEqual([
        ['ERR_ARGUMENT', 'totals', 'odd.count: totals is missing'],
        ['ERR_DTYPE', 'items', 'odd.count: items must be int32, got float32'],
        [
          'ERR_SHAPE',
          'items',
          'odd.count: items must be [n, length], got [4] (it has 1 dimensions instead of 2)',
        ],
        ['ERR_ARGUMENT', 'binCount', 'odd.count: binCount must be at least 1, got 0'],
        [
          'ERR_SHAPE',
          'totals',
          'odd.count: totals must have one entry per bin and one more, 6, got 5',
        ],
        ['ERR_ARGUMENT', 'factor', 'odd.count: factor must be above 0, got 0'],
        ['ERR_ARGUMENT', 'factor', 'odd.count: factor must be at most 8, got 9'],
        ['ERR_ARGUMENT', 'mode', 'odd.count: mode must be plain or mirrored, got "odd"'],
        [
          'ERR_ARGUMENT',
          'dtype',
          'odd.count: dtype must be float32, float16 or bfloat16, got "int32"',
        ],
        ['ERR_ARGUMENT', 'outputLast', 'odd.count: outputLast must be a boolean, got 1'],
        [
          'ERR_SHAPE',
          'weights',
          'odd.count: weights must be [length], got [3] (length is 3, but items has length = 4)',
        ],
        ['ERR_ARGUMENT', 'weights', 'odd.count: weights cannot be combined with mirrored'],
        ['ERR_ARGUMENT', 'totals', 'odd.count: totals must be a tensor, got 5'],
      ])
    })

    it('fails the tensors that depend on bad data', async () => {
      const result = await answer(`
        const totals = zeros([5])
        const [, counts] = run('odd.count', { items: ints([[1, -7]]), totals })
        return Promise.all([counts, totals, totals.cast('float16')].map((x) => x.read().catch((error) => error.message)))`)
      expect(result).toEqual(Array(3).fill('odd.count: items must be at least 0, got -7'))
    })

    it('stands beside the library: nothing else knows its name', () => {
      const { status, stdout } = spawnSync(
        'grep',
        ['-rlE', 'odd\\.count', 'lib', 'binding', 'core', 'cpu', 'ops', 'CMakeLists.txt'],
        { cwd: root, encoding: 'utf8' },
      )
      expect({ status, stdout }).toEqual({ status: 1, stdout: '' })
    })
  },
)
