// Makes the tarball of npm/cuda13-linux-x64 from build/Release/heddle.node, which must have been built with CUDA 13 by
//   npm run build:native -- '--CDHEDDLE_PORTABLE_ARCHS=80;90'
import { execFileSync } from 'node:child_process'
import { readFileSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { release } from './binary.mjs'

const root = fileURLToPath(new URL('..', import.meta.url))
const folder = join(root, 'npm/cuda13-linux-x64')
const addon = join(root, 'build/Release/heddle.node')

const { built, runtime } = createRequire(import.meta.url)(addon).cuda()
if (!built) throw new Error(`${addon} was built without CUDA`)
if (Math.floor(runtime / 1000) !== 13) throw new Error(`${addon} was built with CUDA ${runtime}`)
const cache = readFileSync(join(root, 'build/CMakeCache.txt'), 'utf8')
const [, archs] = /^HEDDLE_PORTABLE_ARCHS:\w+=(.*)$/m.exec(cache) ?? []
if (archs !== '80;90') throw new Error(`${addon} was built for ${archs || "this machine's GPUs"}`)

const { version } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'))
const packageFile = join(folder, 'package.json')
const text = readFileSync(packageFile, 'utf8')
if (JSON.parse(text).version !== version)
  writeFileSync(packageFile, text.replace(/"version": ".*"/, `"version": "${version}"`))

const { bytes, glibc } = release(addon, join(folder, 'heddle.node'))
console.error(`heddle.node: ${(bytes / 2 ** 20).toFixed(1)} MiB, glibc ${glibc}`)
execFileSync('npm', ['pack', folder, '--pack-destination', join(root, 'build')], {
  stdio: 'inherit',
})
