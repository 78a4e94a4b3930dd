// What a released binary may need: the same rules for every package, asked of binutils
import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { copyFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'

export const highestGlibc = '2.34'
const libraries = /^(libc|libm|libgcc_s|libdl|libpthread|librt|ld-linux-x86-64)\.so\.\d+$/
const exported = ['napi_register_module_v1', 'node_api_module_get_api_version_v1']

const run = (tool, ...args) => execFileSync(tool, args, { encoding: 'utf8', maxBuffer: 1 << 28 })

export function inspect(path) {
  const bytes = readFileSync(path)
  const versions = [...run('objdump', '-T', path).matchAll(/GLIBC_(\d+)\.(\d+)/g)]
    .map(([, major, minor]) => [Number(major), Number(minor)])
    .sort((a, b) => a[0] - b[0] || a[1] - b[1])
  return {
    bytes: bytes.length,
    sha256: createHash('sha256').update(bytes).digest('hex'),
    glibc: versions.at(-1)?.join('.') ?? '0.0',
    needed: [...run('readelf', '-d', path).matchAll(/\(NEEDED\).*\[(.*)\]/g)].map(
      ([, name]) => name,
    ),
    exports: [...run('nm', '-D', '--defined-only', path).matchAll(/ [A-Za-z] (\S+)$/gm)]
      .map(([, name]) => name)
      .sort(),
  }
}

export function problems({ glibc, needed, exports }) {
  const found = []
  const [major, minor] = glibc.split('.').map(Number)
  const [topMajor, topMinor] = highestGlibc.split('.').map(Number)
  if (major > topMajor || (major === topMajor && minor > topMinor))
    found.push(`needs glibc ${glibc}, more than ${highestGlibc}`)
  for (const name of needed) if (!libraries.test(name)) found.push(`needs ${name}`)
  if (exports.join() !== exported.join()) found.push(`exports ${exports.join(', ')}`)
  return found
}

// Copies a built addon into a package, without symbols, and writes the manifest that the loader compares it with
export function release(from, to) {
  mkdirSync(dirname(to), { recursive: true })
  copyFileSync(from, to)
  run('strip', '--strip-unneeded', to)
  const facts = inspect(to)
  const wrong = problems(facts)
  if (wrong.length > 0) throw new Error(`${to} ${wrong.join('; ')}`)
  const { bytes, sha256, glibc } = facts
  const files = { [basename(to)]: { bytes, sha256, glibc } }
  writeFileSync(join(dirname(to), 'manifest.json'), `${JSON.stringify({ files }, null, 2)}\n`)
  return facts
}
