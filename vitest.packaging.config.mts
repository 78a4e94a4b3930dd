import { defineConfig, mergeConfig } from 'vitest/config'
import base from './vitest.config.mjs'

const config = mergeConfig(
  base,
  defineConfig({ test: { testTimeout: 600_000, hookTimeout: 1_200_000 } }),
)
config.test = { ...config.test, include: ['tests/packaging/**/*.test.ts'], exclude: [] }

export default config
