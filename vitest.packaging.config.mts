import { defineConfig, mergeConfig } from 'vitest/config'
import base from './vitest.config.mjs'

const config = mergeConfig(
  base,
  defineConfig({ test: { testTimeout: 600_000, hookTimeout: 1_200_000 } }),
)
const { projects: _, ...test } = config.test
config.test = { ...test, include: ['tests/packaging/**/*.test.ts'], exclude: [] }

export default config
