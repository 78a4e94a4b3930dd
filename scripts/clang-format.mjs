// Checks the C++ and CUDA sources against .clang-format, or rewrites them with --write
import { spawnSync } from 'node:child_process'
import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

const cwd = fileURLToPath(new URL('..', import.meta.url))
const write = process.argv.includes('--write')
const patterns = ['*.h', '*.cpp', '*.cu', '*.cuh']

const listed = spawnSync(
  'git',
  ['ls-files', '--cached', '--others', '--exclude-standard', '--', ...patterns],
  { cwd, encoding: 'utf8' },
)
if (listed.status !== 0) throw new Error(`git ls-files failed: ${listed.stderr}`)
const files = listed.stdout.split('\n').filter((file) => file && existsSync(`${cwd}/${file}`))

const { error, status } = spawnSync(
  'clang-format',
  [...(write ? ['-i'] : ['--dry-run', '--Werror', '--ferror-limit=1']), ...files],
  { cwd, stdio: 'inherit' },
)
if (error) {
  console.error('clang-format was not found; on Debian: apt-get install clang-format')
  process.exit(1)
}
if (status === 0)
  console.log(`clang-format: ${files.length} files ${write ? 'formatted' : 'as they should be'}`)
process.exit(status ?? 1)
