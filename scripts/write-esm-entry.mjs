// Writes dist/index.mjs over dist/index.js, so that `import` and `require` share one module instance
import { chmodSync, existsSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'

const dist = new URL('../dist/', import.meta.url)
const names = Object.keys(createRequire(import.meta.url)('../dist/index.js')).sort()

writeFileSync(
  new URL('index.mjs', dist),
  `import cjs from './index.js'\nexport const {\n${names.map((name) => `  ${name},\n`).join('')}} = cjs\n`,
)
writeFileSync(new URL('index.d.mts', dist), "export * from './index.js'\n")

const cli = new URL('cli.js', dist)
if (existsSync(cli)) chmodSync(cli, 0o755)
