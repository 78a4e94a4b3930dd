import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { describe, expect, it } from 'vitest'

const root = join(__dirname, '../..')
const model = join(root, 'examples/byte-lm')
const set = join(model, 'eval-dev.safetensors')

function heddle(...args: string[]) {
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [join(root, 'dist/cli.js'), ...args],
    {
      encoding: 'utf8',
      env: { ...process.env, NO_COLOR: '1' },
    },
  )
  return { status, stdout, stderr }
}

describe('heddle', () => {
  it('doctor finds this machine fit, with a remedy wherever it is not', () => {
    const { status, stdout, stderr } = heddle('doctor', '--json')
    expect(stderr).toBe('')
    expect(status).toBe(0)
    const { ok, findings } = JSON.parse(stdout)
    expect(ok).toBe(true)
    expect(findings.map((one: { check: string }) => one.check)).toContain('self-test cpu')
    for (const one of findings) if (one.status !== 'OK') expect(one.remedy).toBeTruthy()
    expect(heddle('doctor').stdout).toMatch(/^OK {4}node: v\d+/)
  })

  it('doctor fails with a remedy when the addon cannot be loaded', () => {
    const child = spawnSync(process.execPath, [join(root, 'dist/cli.js'), 'doctor', '--json'], {
      encoding: 'utf8',
      env: { ...process.env, HEDDLE_BINDING: '/nowhere/heddle.node' },
    })
    expect(child.status).toBe(1)
    const { ok, findings } = JSON.parse(child.stdout)
    expect(ok).toBe(false)
    expect(findings.at(-1)).toMatchObject({ check: 'addon', status: 'FAIL' })
  })

  it('info lists every operator', () => {
    const { operators } = JSON.parse(heddle('info', '--json').stdout)
    const names = operators.map((one: { name: string }) => one.name)
    expect(names).toEqual([...names].sort())
    for (const name of ['attention', 'lightning', 'lightning.decode', 'merge', 'linear'])
      expect(names).toContain(name)
    expect(heddle('info').stdout).toContain('lightning.decode')
  })

  it('eval prints the figures of a set', () => {
    const args = [
      'eval',
      '--model',
      model,
      '--set',
      `${set}:dev4k`,
      '--limit',
      '1',
      '--device',
      'cpu',
      '--dtype',
      'float32',
    ]
    const { status, stdout, stderr } = heddle(...args, '--json')
    expect(stderr).toBe('')
    expect(status).toBe(0)
    const { bitsPerByte, recall, seconds, tokensPerSecond, perSequence } = JSON.parse(stdout)
    expect(bitsPerByte).toBeCloseTo(1.3541, 2)
    expect(recall.hits).toBe(recall.total)
    expect(recall.total).toBeGreaterThan(0)
    expect(seconds * tokensPerSecond).toBeCloseTo(4096, 3)
    expect(perSequence).toHaveLength(1)
  })

  it('generate writes the prompt and what follows', () => {
    const args = [
      'generate',
      '--model',
      model,
      '--prompt',
      'The compiler',
      '--max-tokens',
      '8',
      '--device',
      'cpu',
    ]
    const first = heddle(...args)
    expect(first.status).toBe(0)
    expect(first.stdout.startsWith('The compiler')).toBe(true)
    expect(first.stdout.length).toBe('The compiler'.length + 8 + 1)
    expect(heddle(...args).stdout).toBe(first.stdout)
    const drawn = [...args, '--temperature', '1.5', '--seed', '3']
    expect(heddle(...drawn).stdout).toBe(heddle(...drawn).stdout)
  })

  it.each([
    [['evla'], /unknown command "evla"; did you mean "eval"\?/],
    [['eval', '--set', 'x:y'], /eval: --model is missing/],
    [['eval', '--model', model, '--set', 'nothing'], /eval: set must be FILE:NAME/],
    [['eval', '--model', model, '--set', '/nowhere.safetensors:x'], /safetensors: cannot open/],
    [
      ['eval', '--model', model, '--set', `${set}:dev8k`],
      /has no set "dev8k"; it has dev16k, dev4k/,
    ],
    [
      ['eval', '--model', '/nowhere', '--set', `${set}:dev4k`],
      /model must be a directory with a config.json/,
    ],
    [['eval', '--model', model, '--set', `${set}:dev4k`, '--limit', '-1'], /heddle: .*--limit/],
    [
      ['eval', '--model', model, '--set', `${set}:dev4k`, '--limit', '1.5'],
      /eval: limit must be an integer at least 1/,
    ],
    [
      ['eval', '--model', model, '--set', `${set}:dev4k`, '--dtype', 'int8'],
      /eval: dtype must be float32, float16 or bfloat16/,
    ],
    [
      ['eval', '--model', model, '--set', `${set}:dev4k`, '--device', 'tpu'],
      /eval: device must be "cpu", "cuda" or "cuda:N"/,
    ],
    [
      ['generate', '--model', model, '--prompt', ''],
      /generate: prompt must have at least one byte/,
    ],
    [['doctor', 'now'], /doctor: unexpected argument "now"/],
    [['--nonsense'], /heddle: .*nonsense/],
  ])('%j is refused', (args, message) => {
    const { status, stdout, stderr } = heddle(...args)
    expect(stderr).toMatch(message)
    expect(stderr.trim().split('\n')).toHaveLength(1)
    expect(stdout).toBe('')
    expect(status).toBe(2)
  })

  it('without a command it says what there is', () => {
    expect(heddle()).toMatchObject({ status: 2, stderr: '' })
    expect(heddle('--help')).toMatchObject({ status: 0 })
    expect(heddle('--version').stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
  })
})
