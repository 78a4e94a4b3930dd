import { fileURLToPath } from 'node:url'
import { defineConfig } from 'vitest/config'

const root = fileURLToPath(new URL('.', import.meta.url))

const timed = ['tests/native/loop.test.ts', 'tests/cascade/costs.test.ts']

export default defineConfig({
  resolve: { alias: { heddle: `${root}dist/index.mjs` } },
  test: {
    projects: [
      {
        extends: true,
        test: {
          name: 'all',
          include: ['tests/**/*.test.ts'],
          exclude: ['tests/packaging/**', ...timed],
          sequence: { groupOrder: 0 },
        },
      },
      // Alone, after the others: what is timed must not compete with them for the cores
      ...timed.map((file, i) => ({
        extends: true as const,
        test: { name: `timed ${i + 1}`, include: [file], sequence: { groupOrder: i + 1 } },
      })),
    ],
    pool: 'forks',
    testTimeout: 120_000,
    hookTimeout: 120_000,
    // The built package is loaded by Node itself: one module instance for tests, workers and children
    server: { deps: { external: [/\/dist\/[^/]+\.m?js$/] } },
    reporters: process.env.HEDDLE_TEST_REPORT
      ? ['default', ['json', { outputFile: process.env.HEDDLE_TEST_REPORT }]]
      : ['default'],
  },
})
