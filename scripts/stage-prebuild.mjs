// Builds the addon without CUDA and puts it into prebuilds/, where an installed package finds it
import { execFileSync } from 'node:child_process'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { release } from './binary.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
if (process.platform !== 'linux' || process.arch !== 'x64')
  throw new Error(`releases are made on linux-x64, not on ${process.platform}-${process.arch}`)

const script = join(root, 'scripts/build-native.mjs')
const output = join(root, 'build/prebuild')
// stdout belongs to npm pack
execFileSync(process.execPath, [script, '-O', output, '--CDHEDDLE_CUDA=OFF'], {
  stdio: ['ignore', 2, 2],
})
const to = join(root, 'prebuilds/linux-x64/heddle.glibc.node')
const { bytes, glibc } = release(join(output, 'Release/heddle.node'), to)
console.error(
  `prebuilds/linux-x64/heddle.glibc.node: ${(bytes / 1024).toFixed(0)} KiB, glibc ${glibc}`,
)
