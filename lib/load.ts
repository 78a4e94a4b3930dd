import { existsSync, readFileSync, statSync } from 'node:fs'
import { basename, dirname, join, resolve, sep } from 'node:path'
import { HeddleError } from './errors.js'

const root = join(__dirname, '..')

let loadedPath: string | undefined

/** @internal The file that the addon was loaded from. */
export function addonPath(): string | undefined {
  return loadedPath
}

// A truncated shared object ends the process with SIGBUS when it is mapped, so its size is compared first
function checkSize(path: string): void {
  const manifest = join(dirname(path), 'manifest.json')
  if (!existsSync(manifest)) return
  const known: { files?: Record<string, { bytes: number }> } = JSON.parse(
    readFileSync(manifest, 'utf8'),
  )
  const expected = known.files?.[basename(path)]?.bytes
  const bytes = statSync(path).size
  if (expected !== undefined && expected !== bytes)
    throw new Error(
      `${path} has ${bytes} bytes instead of ${expected}, the installation is incomplete`,
    )
}

interface Attempt {
  from: string
  /** The file to load, or why there is none to try. */
  find(): string | { skipped: string }
  load?(path: string): unknown
}

const cudaPackage = '@heddle/heddle-cuda13-linux-x64'

const attempts: readonly Attempt[] = [
  {
    from: 'HEDDLE_BINDING',
    find() {
      const path = process.env.HEDDLE_BINDING
      return path ? resolve(path) : { skipped: 'not set' }
    },
  },
  {
    from: 'build/Release of this checkout',
    find() {
      if (root.split(sep).includes('node_modules')) return { skipped: 'not a checkout' }
      const path = join(root, 'build', 'Release', 'heddle.node')
      return existsSync(path) ? path : { skipped: 'not built' }
    },
  },
  {
    from: cudaPackage,
    find() {
      if (process.env.HEDDLE_DEVICE === 'cpu') return { skipped: 'HEDDLE_DEVICE is cpu' }
      if (process.platform !== 'linux' || process.arch !== 'x64')
        return { skipped: 'for linux-x64 only' }
      let manifest: string
      try {
        manifest = require.resolve('@heddle/heddle-cuda13-linux-x64/package.json')
      } catch {
        return { skipped: 'not installed' }
      }
      const { version: own } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
      const { version } = JSON.parse(readFileSync(manifest, 'utf8'))
      if (version !== own) throw new Error(`its version is ${version}, but heddle is ${own}`)
      return join(dirname(manifest), 'heddle.node')
    },
    // Spelled out so that bundlers see the file
    load: () => require('@heddle/heddle-cuda13-linux-x64/heddle.node'),
  },
  {
    from: 'prebuilds',
    find() {
      const prebuilt: { resolve(dir: string): string } = require('node-gyp-build')
      const directory = join(root, 'prebuilds')
      return existsSync(directory) ? prebuilt.resolve(root) : { skipped: 'this package has none' }
    },
  },
]

function remedies(): string[] {
  const list = ['in a checkout: npm ci && npm run build (needs a C++20 compiler and CMake 3.24)']
  if (process.platform === 'linux' && process.arch === 'x64')
    list.push(
      'in an application: install again with "npm install heddle"; the binary needs glibc 2.34 or newer',
      `for a GPU: npm install ${cudaPackage}`,
    )
  else
    list.push(`${process.platform}-${process.arch} has no ready-made binary: build it from source`)
  list.push('HEDDLE_BINDING=/path/to/heddle.node names a binary of your own')
  return list
}

/**
 * @internal Finds and loads the native addon.
 *
 * In this order: `HEDDLE_BINDING`, the build of a checkout, the CUDA package, the CPU binary of this package. A place that
 * was named or found but fails to load ends the search only for `HEDDLE_BINDING`; the others fall through.
 */
export function loadAddon(): unknown {
  const failures: string[] = []
  for (const { from, find, load } of attempts) {
    let cause: unknown
    try {
      const found = find()
      if (typeof found === 'string') {
        checkSize(found)
        const addon = load ? load(found) : require(found)
        loadedPath = found
        return addon
      }
      failures.push(`${from}: ${found.skipped}`)
      continue
    } catch (error) {
      cause = error
    }
    failures.push(
      `${from}: ${cause instanceof Error ? cause.message.trim().split('\n')[0] : cause}`,
    )
    if (from === 'HEDDLE_BINDING') break
  }
  const lines = (items: readonly string[]): string => items.map((item) => `\n  - ${item}`).join('')
  throw new HeddleError(
    'ERR_UNSUPPORTED',
    `load: no native addon could be loaded for ${process.platform}-${process.arch}${lines(failures)}\npossible solutions:${lines(remedies())}`,
    { op: 'load' },
  )
}
