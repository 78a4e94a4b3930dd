// `cmake-js build` with two of its habits mended: it forgets new --CD options once a cache exists, and it leaves the
// number of jobs to make, which means one.
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(dirname(fileURLToPath(import.meta.url)))
const cli = join(
  dirname(createRequire(import.meta.url).resolve('cmake-js/package.json')),
  'bin/cmake-js',
)
const args = process.argv.slice(2)

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
