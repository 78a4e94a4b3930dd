// Links the addon without CUDA, of objects that a build has made or makes now, and puts it into prebuilds/, where an
// installed package finds it
import { execFileSync } from 'node:child_process'
import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { release } from './binary.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
if (process.platform !== 'linux' || process.arch !== 'x64')
  throw new Error(`releases are made on linux-x64, not on ${process.platform}-${process.arch}`)

const script = join(root, 'scripts/build-native.mjs')
// What a developer may have set, and no package may have; cmake-js passes nothing that is empty, and ; is an empty list
const plain = {
  ...{ HEDDLE_DEBUG: 'OFF', HEDDLE_SANITIZE: 'OFF', HEDDLE_WIDER_CPUS: 'ON' },
  HEDDLE_EXTRA_OPERATORS: ';',
}
const cache = join(root, 'build/CMakeCache.txt')
const lines = existsSync(cache) ? readFileSync(cache, 'utf8').split('\n') : []
const given = lines.flatMap((line) => {
  const [, name, value] = /^(\w+):\w+=(.*)$/.exec(line) ?? []
  return name in plain ? [`-D${name}=${value}`] : []
})
// stdout belongs to npm pack
const stdio = ['ignore', 2, 2]
try {
  const settings = Object.entries(plain).map(([name, value]) => `--CD${name}=${value}`)
  execFileSync(process.execPath, [script, '--target', 'heddle_prebuild', ...settings], { stdio })
} finally {
  if (given.length > 0) execFileSync('cmake', [...given, join(root, 'build')], { stdio })
}
const to = join(root, 'prebuilds/linux-x64/heddle.glibc.node')
const { bytes, glibc } = release(join(root, 'build/prebuild/heddle.node'), to)
console.error(
  `prebuilds/linux-x64/heddle.glibc.node: ${(bytes / 1024).toFixed(0)} KiB, glibc ${glibc}`,
)
