// Links the addon without CUDA, of objects that a build has made or makes now, and puts it into prebuilds/, where an
// installed package finds it
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { release } from './binary.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
if (process.platform !== 'linux' || process.arch !== 'x64')
  throw new Error(`releases are made on linux-x64, not on ${process.platform}-${process.arch}`)

const script = join(root, 'scripts/build-native.mjs')
// What a developer may have set, and no package may have
const plain = ['DEBUG=OFF', 'SANITIZE=OFF', 'WIDER_CPUS=ON']
const settings = plain.map((setting) => `--CDHEDDLE_${setting}`)
// stdout belongs to npm pack
execFileSync(process.execPath, [script, '--target', 'heddle_prebuild', ...settings], {
  stdio: ['ignore', 2, 2],
})
const to = join(root, 'prebuilds/linux-x64/heddle.glibc.node')
const { bytes, glibc } = release(join(root, 'build/prebuild/heddle.node'), to)
console.error(
  `prebuilds/linux-x64/heddle.glibc.node: ${(bytes / 1024).toFixed(0)} KiB, glibc ${glibc}`,
)
