import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const root = fileURLToPath(new URL('.', import.meta.url))

export default defineConfig({
  resolve: { alias: { heddle: `${root}dist/index.mjs` } },
  test: {
    include: ['tests/**/*.test.ts'],
    exclude: ['tests/packaging/**'],
    pool: 'forks',
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // The built package is loaded by Node itself: one module instance for tests, workers and children
    server: { deps: { external: [/\/dist\/[^/]+\.m?js$/] } },
    reporters: process.env.HEDDLE_TEST_REPORT
      ? ['default', ['json', { outputFile: process.env.HEDDLE_TEST_REPORT }]]
      : ['default'],
  },
})
