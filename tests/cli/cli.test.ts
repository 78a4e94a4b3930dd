import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { tensor, writeSafetensors, zeros } from 'heddle'
import { afterAll, describe, expect, it } from 'vitest'

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
    expect(findings.at(-1).text).toMatch(/^load: no native addon could be loaded/)
    expect(findings.at(-1).text).not.toContain('Node.js v')
  })

  it('doctor warns of what the environment asks for and does not get', () => {
    const asked = { HEDDLE_THREADS: 'many', HEDDLE_CPU_ISA: 'sse', HEDDLE_DEVICE: 'gpu' }
    const doctor = (given: object) => {
      const env = { ...process.env, ...given }
      const args = [join(root, 'dist/cli.js'), 'doctor', '--json']
      const child = spawnSync(process.execPath, args, { encoding: 'utf8', env })
      const { findings } = JSON.parse(child.stdout) as { findings: Record<string, string>[] }
      return findings
        .filter(({ status }) => status === 'WARN')
        .map(({ check, text }) => [check, text])
    }
    const warned = doctor(asked)
    for (const [name, value] of Object.entries(asked))
      expect(warned).toContainEqual([name, `"${value}" means nothing`])
    const known = doctor({ HEDDLE_THREADS: '2', HEDDLE_CPU_ISA: 'baseline', HEDDLE_DEVICE: 'cpu' })
    expect(known.filter(([check]) => check!.startsWith('HEDDLE'))).toEqual([])
  })

  it('info lists every operator', () => {
    const { operators } = JSON.parse(heddle('info', '--json').stdout)
    const names = operators.map((one: { name: string }) => one.name)
    expect(names).toEqual([...names].sort())
    for (const name of ['attention', 'lightning', 'lightning.decode', 'merge', 'linear'])
      expect(names).toContain(name)
    expect(heddle('info').stdout).toContain('lightning.decode')
  })

  it('bench measures a problem from its string and checks the result', () => {
    const problem = 'attention:b2 sq1 sk1100 hq4 hk2 d64 f32 page16 ragged3'
    const args = ['bench', problem, '--device', 'cpu', '--rounds', '2', '--pause', '3']
    const { status, stdout, stderr } = heddle(...args, '--json')
    expect(stderr).toBe('')
    expect(status).toBe(0)
    const { rows, copyTBps, productTflops, pauseMilliseconds } = JSON.parse(stdout)
    expect(pauseMilliseconds).toBe(3)
    expect(rows).toHaveLength(1)
    expect(rows[0].case).toBe(problem)
    for (const value of [copyTBps, productTflops, rows[0].ms, rows[0].coldMs, rows[0].gbps])
      expect(value).toBeGreaterThan(0)
    expect(rows[0].error).toBeLessThan(1e-5)
    for (const [text, message] of [
      ['attention:b1', 'bench: "attention:b1" lacks the size sq'],
      ['norm:m2 m3 d8', 'bench: "norm:m2 m3 d8" has m twice'],
      ['norm:m0 d8', 'bench: "norm:m0 d8" must have a whole m from 1 on, got 0'],
      ['norm:m2 d8 f64', 'bench: "norm:m2 d8 f64" has "f64", but norm takes m, d, graph'],
      ['nothing:b1', 'bench: the operator of a problem must be one of attention,'],
      ['nothing', 'bench: a problem must be operator:sizes or one of attention,'],
    ] as const) {
      const refused = heddle('bench', 'norm:m2 d8', text, '--device', 'cpu')
      expect(refused.status).toBe(2)
      expect(refused.stdout).toBe('')
      expect(refused.stderr).toContain(message)
    }
  }, 60_000)

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

  it('eval refuses sets that leave nothing to predict, and answers that are elsewhere', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'heddle-sets-'))
    try {
      const path = join(folder, 'sets.safetensors')
      const ids = (shape: number[]) => zeros(shape, { dtype: 'uint8' })
      await writeSafetensors(path, {
        'none.ids': ids([0, 8]),
        'short.ids': ids([2, 1]),
        'asked.ids': ids([1, 8]),
        'asked.answers': tensor([0, 2, 1, 2], [2, 2], { dtype: 'int32' }),
      })
      const shape = 'must be uint8 [sequences, length], of a sequence at least and of two bytes'
      for (const [name, text] of [
        ['none', `none.ids ${shape}, got uint8 [0, 8]`],
        ['short', `short.ids ${shape}, got uint8 [2, 1]`],
        ['asked', 'asked.answers must be of 1 sequences of 8 bytes, got [1, 2]'],
      ]) {
        const { status, stderr } = heddle('eval', '--model', model, '--set', `${path}:${name}`)
        expect(stderr).toBe(`eval: ${text}\n`)
        expect(status).toBeGreaterThan(0)
      }
    } finally {
      rmSync(folder, { recursive: true })
    }
  })

  it('a report that fails leaves no page, and the one that was there as it was', () => {
    const folder = mkdtempSync(join(tmpdir(), 'heddle-report-'))
    try {
      const [fresh, kept] = [join(folder, 'fresh.html'), join(folder, 'kept.html')]
      writeFileSync(kept, 'as it was')
      for (const out of [fresh, kept]) {
        const args = ['report', '--model', model, '--set', '/nowhere.safetensors:x', '--out', out]
        expect(heddle(...args).status).toBe(2)
      }
      expect(readdirSync(folder)).toEqual(['kept.html'])
      expect(readFileSync(kept, 'utf8')).toBe('as it was')
    } finally {
      rmSync(folder, { recursive: true })
    }
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
      ['eval', '--model', model, '--set', `${set}:dev4k`, '--device', 'cuda:99'],
      /^eval: --device must be one of this machine, got "cuda:99"; heddle doctor says/,
    ],
    [
      ['eval', '--model', model, '--set', `${set}:dev4k`, '--attention', 'flexprefill'],
      /eval: attention must be a mechanism, got "flexprefill"; did you mean "flex-prefill"\?/,
    ],
    [
      ['eval', '--attention', 'streaming', '--gamma', '1'],
      /eval: --gamma goes with another mechanism than streaming/,
    ],
    [['eval', '--attention', 'flex-prefill', '--gamma', '0'], /gamma must be above 0, got 0/],
    [['eval', '--attention', 'hip', '--block', '8'], /block cannot be combined with stages/],
    [
      ['report', '--model', model, '--set', `${set}:dev4k`, '--out', '/nowhere/page.html'],
      /report: cannot write "\/nowhere\/page.html" \(ENOENT/,
    ],
    [['eval', '--gamma', '1'], /eval: --gamma goes with --attention/],
    [
      ['generate', '--model', model, '--prompt', ''],
      /generate: prompt must have at least one byte/,
    ],
    [['report', '--gamma', '0.9'], /report: --gamma goes with another command/],
    [['eval', '--temperature', '1'], /eval: --temperature goes with another command/],
    [
      ['generate', '--model', model, '--prompt', 'x', '--max-tokens', '3x'],
      /^generate: max-tokens must be a number, got "3x"/,
    ],
    [
      ['generate', '--model', model, '--prompt', 'x', '--temperature', '-0.5'],
      /heddle: .*--temperature/,
    ],
    [
      ['generate', '--model', model, '--prompt', 'x', '--temperature', '1e999'],
      /^generate: temperature must be a finite number from 0 on, got Infinity$/m,
    ],
    [['doctor', 'now'], /doctor: unexpected argument "now"/],
    [['bench', '--round', '3'], /^heddle: Unknown option '--round'; did you mean --rounds\?$/m],
    [['generate', '--modle', 'x'], /Unknown option '--modle'; did you mean --model\?$/m],
    [
      ['generate', '--temperature', '-0.5'],
      /heddle: .*; a value that starts with a dash is given as --temperature=-1$/m,
    ],
    [
      ['bench', 'norm:m2 d8', '--device', 'cpu', '--out', '/dev/null/x'],
      /^bench: out must be a folder that can be written, got "\/dev\/null\/x" \(ENOTDIR/,
    ],
    [['bench', 'norm:m2 d8', '--device', 'cpu', '--out', ''], /^bench: out must be a folder/],
    [['--nonsense'], /^heddle: Unknown option '--nonsense'$/m],
    [['analyze'], /analyze: the file is missing/],
    [['analyze', '/nowhere/x.cascade'], /analyze: cannot read "\/nowhere\/x.cascade" \(ENOENT/],
    [['analyze', __filename, 'more'], /analyze: unexpected argument "more"/],
    [['analyze', __filename, '--size', 'M'], /analyze: size must be a list such as M=8192/],
    [
      ['analyze', __filename, '--size', 'M=3', '--size', 'M=4'],
      /analyze: size M must be 3 as before, got 4/,
    ],
    [['analyze', __filename, '--size', 'M=x'], /analyze: size M must be a number, got "x"/],
    [['analyze', __filename, '--size', 'M=-1'], /analyze: size M must be an integer at least 0/],
  ])('%j is refused', (args, message) => {
    const { status, stdout, stderr } = heddle(...args)
    expect(stderr).toMatch(message)
    expect(stderr.trim().split('\n')).toHaveLength(1)
    expect(stdout).toBe('')
    expect(status).toBe(2)
  })

  it('ends in silence where nobody reads on', () => {
    const command = `"${process.execPath}" "${join(root, 'dist/cli.js')}"`
    const text = `${command} generate --model "${model}" --prompt x --max-tokens 4 --device cpu | true`
    const { stderr } = spawnSync('sh', ['-c', text], { encoding: 'utf8' })
    expect(stderr).toBe('')
  })

  it('without a command it says what there is', () => {
    expect(heddle()).toMatchObject({ status: 2, stderr: '' })
    expect(heddle('--help')).toMatchObject({ status: 0 })
    expect(heddle('--version').stdout).toMatch(/^\d+\.\d+\.\d+\n$/)
  })
})

describe('heddle analyze', () => {
  const folder = mkdtempSync(join(tmpdir(), 'heddle-analyze-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  const file = (name: string, text: string) => {
    const path = join(folder, name)
    writeFileSync(path, text)
    return path
  }
  const softmax = file(
    'softmax.cascade',
    `QK[m,p] = sum(e) Q[e,p] * K[e,m] * scale
     GM[p]   = max(m) QK[m,p]
     SN[m,p] = exp(QK[m,p] - GM[p])
     SD[p]   = sum(m) SN[m,p]
     A[m,p]  = SN[m,p] / SD[p]
     AV[f,p] = A[m,p] * V[f,m]
     Z[p]    = if(AV[f,p] < 1 && 1 > 0, 1, 2)`,
  )
  const sizes = ['--size', 'E=128,F=128,M=8192,P=8192']

  it('prints tables, reasons and rewrites', () => {
    const { status, stdout, stderr } = heddle('analyze', softmax, ...sizes, '--machine', 'h200')
    expect(stderr).toBe('')
    expect(status).toBe(0)
    expect(stdout).toMatch(/^M +3 +m:3 +QK:3 K:3 SN:2 A:1 V:1$/m)
    expect(stdout).toMatch(/^QK +1 +tensor +17\.2 G/m)
    expect(stdout).toContain('QK read by GM; GM complete only after all m; SN reads QK again')
    expect(stdout).toContain('defer-division: M: 3 -> 2 passes')
    expect(stdout).toMatch(/us at least on h200, bound by tensor/)
    expect(stdout).toMatch(/^kernel +none: .* the nearest operator, \w+, does not take/m)
    expect(heddle('analyze', softmax).stdout).toContain('unknown without the sizes of')
  })

  it('prints the kernel and what fills its slots', () => {
    const weights = file(
      'sigmoid.cascade',
      `S[p,m] = sum(e) Q[p,e] * K[m,e]          where m <= p
       O[p,f] = sum(m) sigmoid(S[p,m]) * V[m,f]`,
    )
    const { stdout } = heddle('analyze', weights)
    expect(stdout).toMatch(/^kernel +attention$/m)
    expect(stdout).toMatch(/^ {2}weights +sigmoid$/m)
    const { plan } = JSON.parse(heddle('analyze', weights, '--json').stdout)
    expect(plan).toMatchObject({ operator: 'attention', slots: { weights: 'sigmoid' } })
  })

  it('prints the analysis as JSON', () => {
    const { stdout } = heddle('analyze', softmax, ...sizes, '--json')
    const { passes, bytes, suggestions } = JSON.parse(stdout)
    expect(passes.M.headline).toBe(3)
    expect(bytes.minimal).toBe(3 * 128 * 8192 * 2 + 8192 * 2)
    expect(suggestions[0].rule).toBe('defer-division')
  })

  it('draws the graph: every tensor a box, no two of which overlap, one colour for each pass', () => {
    const out = join(folder, 'softmax.svg')
    expect(heddle('analyze', softmax, '--svg', out).status).toBe(0)
    const svg = readFileSync(out, 'utf8')
    const boxes = [
      ...svg.matchAll(
        /<g><rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="\d+" fill="(#\w+)"[^>]*\/><text[^>]*>([^<]*)</g,
      ),
    ].map(([, x, y, width, height, fill, text]) => ({
      x: Number(x),
      y: Number(y),
      width: Number(width),
      height: Number(height),
      fill: fill!,
      text: text!,
    }))
    expect(boxes.map(({ text }) => text.split('[')[0]).sort()).toEqual(
      ['A', 'AV', 'GM', 'K', 'Q', 'QK', 'SD', 'SN', 'V', 'Z'].sort(),
    )
    const fillOf = (name: string) => boxes.find(({ text }) => text.split('[')[0] === name)!.fill
    expect(fillOf('QK')).toBe(fillOf('GM'))
    expect(new Set(['QK', 'SN', 'A'].map(fillOf)).size).toBe(3)
    const [, width, height] = /viewBox="0 0 ([\d.]+) ([\d.]+)"/.exec(svg)!.map(Number)
    for (const a of boxes) {
      expect(a.x >= 0 && a.x + a.width <= width! && a.y + a.height <= height!).toBe(true)
      for (const b of boxes) {
        const apart =
          a === b ||
          a.x + a.width <= b.x ||
          b.x + b.width <= a.x ||
          a.y + a.height <= b.y ||
          b.y + b.height <= a.y
        expect(apart, `${a.text} on ${b.text}`).toBe(true)
      }
    }
    // two barriers over m, and text that would be markup is none
    expect(svg.match(/stroke-dasharray="7 4"/g)!.length).toBeGreaterThanOrEqual(3)
    expect(svg).toContain('&#60; 1 &#38;&#38; 1 &#62; 0')
    expect(svg).not.toMatch(/NaN|undefined/)
  })

  it('takes options more than once, and a file that begins with a byte order mark', () => {
    const marked = file('marked.cascade', '\ufeffY[p] = sum(m) A[p,m] * s where m <= p + off\n')
    const bytes = (...args: string[]) =>
      JSON.parse(heddle('analyze', marked, '--json', ...args).stdout).bytes
    const apart = ['--size', 'M=3', '--size', 'P=4', '--scalar', 'off=0', '--scalar', 's=1']
    expect(bytes(...apart)).toEqual({ minimal: 32, asWritten: 32 })
    expect(bytes('--size', 'M=3,P=4', '--scalar', 'off=0,s=1')).toEqual(bytes(...apart))
    const wrong = file('wrong.cascade', '\ufeffY[p] $\n')
    expect(heddle('analyze', wrong).stderr).toContain(`${wrong}:1:6: line 1: unexpected '$'`)
  })

  it('names a picture that cannot be written', () => {
    const svg = join(folder, 'nowhere', 'x.svg')
    expect(heddle('analyze', softmax, '--svg', svg).stderr).toMatch(
      /^analyze: cannot write ".*x\.svg" \(ENOENT/,
    )
  })

  it('names file, line and column of what is wrong', () => {
    const long = file('long.cascade', `A[m] = B[m]${' + B[m]'.repeat(20_000)}\n`)
    expect(heddle('analyze', long).stderr).toBe(
      `analyze: ${long}:1:3513: line 1: a statement has more than 500 operators; give parts of it names\n`,
    )
    const bad = file('bad.cascade', 'A[m] = B[m]\nSN[m] exp(A[m])\n')
    expect(heddle('analyze', bad)).toEqual({
      status: 1,
      stdout: '',
      stderr: `analyze: ${bad}:2:7: line 2: expected '=' after 'SN[m]'\n`,
    })
  })
})
