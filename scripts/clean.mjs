// Removes what the build makes: all of it, or the folders named
import { rmSync } from 'node:fs'

const all = ['build', 'coverage', 'dist', 'docs/api', 'prebuilds']
const names = process.argv.slice(2)
for (const name of names.length > 0 ? names : all) {
  if (!all.includes(name)) throw new Error(`clean: ${name} must be one of ${all.join(', ')}`)
  rmSync(new URL(`../${name}`, import.meta.url), { recursive: true, force: true })
}
