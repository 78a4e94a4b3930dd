import { execFileSync, spawnSync } from 'node:child_process'
import {
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { publint } from 'publint'
import { formatMessage } from 'publint/utils'
import { afterAll, beforeAll, describe, expect, it } from 'vitest'
// @ts-expect-error a script without types
import { inspect, problems } from '../../scripts/binary.mjs'

const root = join(import.meta.dirname, '..', '..')
const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))

interface Packed {
  filename: string
  size: number
  files: { path: string; size: number; mode: number }[]
}

let work = ''
let app = ''
let packed: Packed

// As a user's shell: nothing that npm or a developer set for this checkout
const env = Object.fromEntries(
  Object.entries(process.env).filter(
    ([name]) => !/^(npm_|HEDDLE_|NODE_OPTIONS$|NODE_PATH$|VITEST)/i.test(name),
  ),
)

function run(
  command: string,
  args: string[],
  more: { cwd?: string; env?: NodeJS.ProcessEnv } = {},
): string {
  return execFileSync(command, args, {
    cwd: more.cwd ?? app,
    env: { ...env, ...more.env },
    encoding: 'utf8',
    maxBuffer: 1 << 28,
    stdio: ['ignore', 'pipe', 'inherit'],
  })
}

function node(file: string, code: string): string {
  writeFileSync(join(app, file), code)
  return run(process.execPath, [file]).trim()
}

// What runs when a package is published and installed, in an empty folder far from the checkout
beforeAll(() => {
  work = mkdtempSync(join(tmpdir(), 'heddle-packaging-'))
  app = join(work, 'app')
  mkdirSync(app)
  run('npm', ['run', '--silent', 'prepack'], { cwd: root })
  const report = run('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', work], {
    cwd: root,
  })
  packed = JSON.parse(report)[0]
  writeFileSync(
    join(app, 'package.json'),
    '{ "name": "app", "version": "1.0.0", "private": true }\n',
  )
  run('npm', [
    'install',
    '--ignore-scripts',
    '--no-audit',
    '--no-fund',
    '--prefer-offline',
    join(work, packed.filename),
  ])
})

afterAll(() => {
  rmSync(work, { recursive: true, force: true })
})

describe('the tarball', () => {
  it('holds what users and source builds need, and nothing else', () => {
    const paths = packed.files.map(({ path }) => path)
    const tops = new Set(paths.map((path) => path.split('/')[0]))
    const allowed =
      `CHANGELOG.md CMakeLists.txt LICENSE README.md bench binding core cpu cuda dist examples exports.map lib ops
      package.json prebuilds scripts tsconfig.bench.json tsconfig.examples.json tsconfig.json`.split(
        /\s+/,
      )
    expect([...tops].filter((top) => !allowed.includes(top!))).toEqual([])
    for (const path of [
      'dist/index.js',
      'dist/index.mjs',
      'dist/index.d.ts',
      'dist/index.d.mts',
      'dist/cli.js',
    ])
      expect(paths).toContain(path)
    for (const path of [
      'LICENSE',
      'CMakeLists.txt',
      'exports.map',
      'prebuilds/linux-x64/heddle.glibc.node',
    ])
      expect(paths).toContain(path)
    for (const path of [
      'dist/examples/byte-lm/decoder.js',
      'dist/bench/run.js',
      'bench/peers/torch_kernels.py',
      'prebuilds/linux-x64/manifest.json',
    ])
      expect(paths).toContain(path)
    expect(
      paths.filter((path) => /\.(safetensors|tgz|log)$|(^|\/)(tests|node_modules)\//.test(path)),
    ).toEqual([])
  })

  it('is small', () => {
    expect(packed.size).toBeLessThan(4 * 2 ** 20)
  })

  it('runs nothing when it is installed', () => {
    const { scripts, dependencies } = JSON.parse(
      readFileSync(join(app, 'node_modules/heddle/package.json'), 'utf8'),
    )
    for (const name of ['preinstall', 'install', 'postinstall', 'prepare'])
      expect(scripts).not.toHaveProperty(name)
    expect(Object.keys(dependencies)).toEqual(['node-gyp-build'])
    expect(existsSync(join(app, 'node_modules/heddle/binding.gyp'))).toBe(false)
  })

  it('names no folder of the machine that made it', () => {
    for (const { path } of packed.files)
      if (/\.(js|mjs|ts|mts|map|json|md|txt|h|cpp|cu|cuh)$/.test(path))
        expect(readFileSync(join(app, 'node_modules/heddle', path), 'utf8'), path).not.toContain(
          root,
        )
  })

  it('has a binary that old systems load', () => {
    const facts = inspect(join(app, 'node_modules/heddle/prebuilds/linux-x64/heddle.glibc.node'))
    expect(problems(facts)).toEqual([])
  })

  it('satisfies publint', async () => {
    const pkgDir = join(app, 'node_modules/heddle')
    const { messages } = await publint({ pkgDir, strict: true, pack: false })
    const pkg = JSON.parse(readFileSync(join(pkgDir, 'package.json'), 'utf8'))
    expect(messages.map((message) => formatMessage(message, pkg))).toEqual([])
  })
})

describe('the installed package', () => {
  it('is one module for import and require', () => {
    const code = `import { createRequire } from 'node:module'
      import * as esm from 'heddle'
      const cjs = createRequire(import.meta.url)('heddle')
      const names = Object.keys(esm).filter((name) => name !== 'default')
      console.log(names.length > 10 && names.length === Object.keys(cjs).length && names.every((name) => esm[name] === cjs[name]))`
    expect(node('same.mjs', code)).toBe('true')
  })

  const sum = (head: string): string => `${head}
    const x = tensor(Float32Array.of(1, 2, 3), [3])
    add(x, x).read().then((values) => console.log(Array.from(values).join()))`

  it('computes when imported', () => {
    expect(node('sum.mjs', sum("import { add, tensor } from 'heddle'"))).toBe('2,4,6')
  })

  it('computes when required', () => {
    expect(node('sum.cjs', sum("const { add, tensor } = require('heddle')"))).toBe('2,4,6')
  })

  it('has types for both, without internals', () => {
    const code = `import { add, attention, HeddleError, randn, type Tensor, tensor } from 'heddle'
      const x: Tensor<'float32'> = tensor(Float32Array.of(1, 2, 3), [3])
      export const y: Promise<Float32Array> = add(x, x).read()
      const q = randn([1, 8, 2, 16], { dtype: 'bfloat16' })
      export const out: Tensor<'bfloat16'> = attention(q, q, q, { causal: true }).out
      // @ts-expect-error a misspelled option
      attention(q, q, q, { casual: true })
      // @ts-expect-error internals are not part of the types
      x.handle
      export const code: string | undefined = y instanceof HeddleError ? y.code : undefined
`
    writeFileSync(join(app, 'a.mts'), code)
    writeFileSync(join(app, 'a.cts'), code)
    const tsc = join(root, 'node_modules/typescript/bin/tsc')
    for (const module of ['node16', 'nodenext'])
      run(process.execPath, [
        tsc,
        ...[
          '--noEmit',
          '--strict',
          '--exactOptionalPropertyTypes',
          '--target',
          'es2022',
          '--module',
          module,
        ],
        ...['--lib', 'es2023,esnext.disposable', '--types', 'node'],
        ...['--typeRoots', join(root, 'node_modules/@types'), 'a.mts', 'a.cts'],
      ])
  })

  it('has the command heddle', () => {
    expect(run('npx', ['heddle', '--version'])).toContain(version)
    const report = JSON.parse(run('npx', ['heddle', 'doctor', '--json']))
    expect(report).toMatchObject({ ok: true, version })
  })
})

describe('a damaged installation', () => {
  const broken = (damage: (folder: string) => void): { status: number | null; stderr: string } => {
    const folder = join(work, 'broken')
    rmSync(folder, { recursive: true, force: true })
    cpSync(app, folder, { recursive: true })
    damage(join(folder, 'node_modules/heddle'))
    return spawnSync(process.execPath, ['-e', "require('heddle').zeros([1])"], {
      cwd: folder,
      env,
      encoding: 'utf8',
    })
  }

  it('says which binary is incomplete, and lives', () => {
    const { status, stderr } = broken((folder) => {
      const binary = join(folder, 'prebuilds/linux-x64/heddle.glibc.node')
      truncateSync(binary, statSync(binary).size >> 1)
    })
    expect(status).toBe(1)
    expect(stderr).toMatch(
      /HeddleError: load: .*\n.*HEDDLE_BINDING: not set[\s\S]*the installation is incomplete[\s\S]*possible solutions/,
    )
  })

  it('lists where it looked when there is no binary', () => {
    const { status, stderr } = broken((folder) =>
      rmSync(join(folder, 'prebuilds'), { recursive: true }),
    )
    expect(status).toBe(1)
    expect(stderr).toContain('prebuilds: this package has none')
    expect(stderr).toContain("code: 'ERR_UNSUPPORTED'")
  })
})

describe('a source build of the installed package', () => {
  it('needs CMake, a compiler and the headers, and no checkout', () => {
    const output = join(work, 'native')
    const include = ['node-api-headers/include', 'node-addon-api'].map((name) =>
      join(root, 'node_modules', name),
    )
    const source = join(app, 'node_modules/heddle')
    const configure = [
      '-S',
      source,
      '-B',
      output,
      '-DHEDDLE_CUDA=OFF',
      // the same sources once more, which the tarball's binary is made of
      '-DHEDDLE_WIDER_CPUS=OFF',
      `-DCMAKE_JS_INC=${include.join(';')}`,
    ]
    run('cmake', configure)
    run('cmake', ['--build', output, '--parallel'])
    const code = `console.log(require('heddle').zeros([2]).shape.join())`
    const HEDDLE_BINDING = join(output, 'heddle.node')
    expect(run(process.execPath, ['-e', code], { env: { HEDDLE_BINDING } }).trim()).toBe('2')
  })
})
