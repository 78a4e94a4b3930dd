import { spawn } from 'node:child_process'
import { join } from 'node:path'

export const root = join(import.meta.dirname, '../..')

export interface Ended {
  status: number | null
  signal: NodeJS.Signals | null
  stdout: string
  stderr: string
}

/** Runs a script in a process of its own, with `heddle` as its first line; one that hangs is killed, which shows as SIGKILL. */
export function runScript(
  body: string,
  options: { flags?: string[]; env?: Record<string, string> } = {},
): Promise<Ended> {
  const script = `const heddle = require(${JSON.stringify(join(root, 'dist'))})\n${body}`
  return new Promise((resolve, reject) => {
    const child = spawn(process.execPath, [...(options.flags ?? []), '-e', script], {
      cwd: root,
      env: { ...process.env, NODE_OPTIONS: '', ...options.env },
      timeout: 30_000,
      killSignal: 'SIGKILL',
    })
    let stdout = ''
    let stderr = ''
    child.stdout.on('data', (text) => (stdout += text))
    child.stderr.on('data', (text) => (stderr += text))
    child.on('error', reject)
    child.on('close', (status, signal) => resolve({ status, signal, stdout, stderr }))
  })
}
