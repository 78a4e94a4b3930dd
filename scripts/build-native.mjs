// `cmake-js build` with two of its habits mended: it forgets new --CD options once a cache exists, and it leaves the
// number of jobs to make, which means one.
//   --cuda-if-gpu   leaves CUDA out of a first build on a machine without a GPU, which takes a third of the time
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const cli = join(
  dirname(createRequire(import.meta.url).resolve('cmake-js/package.json')),
  'bin/cmake-js',
)
const given = process.argv.slice(2)
const args = given.filter((arg) => arg !== '--cuda-if-gpu')
if (args.length < given.length && !existsSync(join(root, 'build', 'CMakeCache.txt'))) {
  const driver = ['/proc/driver/nvidia/version', '/dev/nvidiactl', '/dev/dxg']
  if (!driver.some(existsSync)) args.push('--CDHEDDLE_CUDA=OFF')
}

function cmake(command) {
  const jobs = process.env.CMAKE_BUILD_PARALLEL_LEVEL ?? String(availableParallelism())
  const { status, signal, error } = spawnSync(
    process.execPath,
    [cli, command, '--log-level', 'error', '--parallel', jobs, ...args],
    { cwd: root, stdio: 'inherit' },
  )
  if (error) throw error
  if (status !== 0) process.exit(signal ? 1 : status)
}

if (args.some((arg) => arg.startsWith('--CD'))) cmake('configure')
cmake('build')
