import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { show } from '../check.js'
import { cuda, type Device } from '../device.js'
import { HeddleError } from '../errors.js'
import { operatorSchemas } from '../native.js'
import { attention } from '../ops/attention.js'
import { lightning } from '../ops/lightning.js'
import { scope } from '../scope.js'
import { randn, tensor } from '../tensor.js'
import { style } from './terminal.js'

/** @internal One thing that was looked at. */
export interface Finding {
  check: string
  status: 'OK' | 'WARN' | 'FAIL'
  text: string
  remedy?: string
}

// A damaged binary can end the process that loads it, so another one tries first
function probeAddon(): Finding {
  const script = `const { loadAddon, addonPath } = require(${JSON.stringify(join(__dirname, '..', 'load.js'))}); try { loadAddon(); process.stdout.write(String(addonPath())) } catch (error) { process.stderr.write(error.message); process.exitCode = 1 }`
  const child = spawnSync(process.execPath, ['-e', script], { encoding: 'utf8', timeout: 60_000 })
  if (child.status === 0)
    return { check: 'addon', status: 'OK', text: `loads from ${child.stdout}` }
  const text = child.signal
    ? `loading it ended the process with ${child.signal}`
    : child.stderr.trim()
  return {
    check: 'addon',
    status: 'FAIL',
    text,
    remedy: 'reinstall the package, or build it with npm run build in a checkout',
  }
}

// Small calls with known answers: they show that the kernels of this machine run at all
async function selfTest(device: Device): Promise<Finding> {
  const check = `self-test ${device}`
  const remedy = 'report this with the output of heddle doctor --json'
  const failed = (text: string): Finding => ({ check, status: 'FAIL', text, remedy })
  try {
    const worst = await scope(async () => {
      const one = tensor([1], [1], { device })
      const v = randn([1, 40, 2, 16], { seed: 7, device })
      const zero = randn([1, 40, 2, 16], { seed: 8, device }).slice(1, 0, 1).expand([1, 40, 2, 16])
      const mean = await attention(zero, zero.contiguous(), v).out.select(1, 3).read()
      const values = await v.read()
      let error = 0
      for (let i = 0; i < 32; i++) {
        let sum = 0
        for (let t = 0; t < 40; t++) sum += values[t * 32 + i]!
        error = Math.max(error, Math.abs(mean[i]! - sum / 40))
      }
      const ones = one.reshape([1, 1, 1, 1]).expand([1, 40, 1, 1]).contiguous()
      const sums = await lightning(ones, ones, ones, { slopes: [0] }).out.read()
      sums.forEach((sum, t) => {
        error = Math.max(error, Math.abs(sum - (t + 1)))
      })
      return error
    })
    if (!(worst < 1e-4)) return failed(`results are off by ${worst}`)
    const text = `attention and lightning agree with known results within ${worst.toExponential(1)}`
    return { check, status: 'OK', text }
  } catch (error) {
    return failed(error instanceof HeddleError ? error.message : String(error))
  }
}

// What the library reads from the environment, where other values count as none
const variables = [
  ['HEDDLE_THREADS', /^[1-9]\d*$/, 'a whole number from 1 on'],
  ['HEDDLE_CPU_ISA', /^(baseline|avx2|avx512)$/, 'baseline, avx2 or avx512'],
  ['HEDDLE_DEVICE', /^cpu$/, 'cpu'],
] as const

/** @internal Looks at everything that the library depends on. */
export async function examine(): Promise<Finding[]> {
  const findings: Finding[] = []
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
  findings.push(
    major > 20 || (major === 20 && minor >= 17)
      ? {
          check: 'node',
          status: 'OK',
          text: `${process.version} on ${process.platform}-${process.arch}`,
        }
      : {
          check: 'node',
          status: 'FAIL',
          text: `${process.version} is too old`,
          remedy: 'use Node.js 20.17 or newer',
        },
  )
  for (const [check, rule, words] of variables) {
    const value = process.env[check]
    if (!value || rule.test(value)) continue
    const remedy = `set it to ${words}, or not at all`
    findings.push({ check, status: 'WARN', text: `${show(value)} means nothing`, remedy })
  }
  const addon = probeAddon()
  findings.push(addon)
  if (addon.status === 'FAIL') return findings

  const schemas = operatorSchemas()
  const isa = schemas.find(({ cpu }) => cpu)?.cpu ?? 'none'
  findings.push(
    isa === 'baseline' && process.arch === 'x64'
      ? {
          check: 'cpu',
          status: 'WARN',
          text: 'without AVX2 CPU operators are slow',
          remedy:
            process.env.HEDDLE_CPU_ISA === 'baseline'
              ? 'leave out HEDDLE_CPU_ISA'
              : 'use a machine with AVX2',
        }
      : { check: 'cpu', status: 'OK', text: `${schemas.length} operators, instruction set ${isa}` },
  )
  findings.push(await selfTest('cpu'))
  if (cuda.available) {
    for (const { device, name, arch, memory } of cuda.devices) {
      const text = `${name}, sm_${arch}, ${(memory / 2 ** 30).toFixed(0)} GiB`
      findings.push(
        arch >= 80
          ? { check: device, status: 'OK', text }
          : {
              check: device,
              status: 'WARN',
              text: `${text} is too old`,
              remedy: 'use a GPU of compute capability 8.0 or newer',
            },
      )
      if (arch >= 80) findings.push(await selfTest(device))
    }
  } else {
    const { text, remedy } = cuda.reason!
    findings.push({ check: 'cuda', status: 'WARN', text, remedy })
  }
  return findings
}

/** @internal The findings for people, a line each and its remedy under it. */
export function findingLines(findings: readonly Finding[]): string {
  const colours = { OK: 'green', WARN: 'yellow', FAIL: 'red' } as const
  return findings
    .map(({ check, status, text, remedy }) => {
      const line = `${style(colours[status], status.padEnd(4))}  ${check}: ${text}`
      return remedy ? `${line}\n      ${style('dim', `remedy: ${remedy}`)}` : line
    })
    .join('\n')
}
