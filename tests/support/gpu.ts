import { cuda } from 'heddle'
import { describe } from 'vitest'

/** A suite for machines with a GPU; on others it is reported as skipped, with the reason in its title. */
export function describeGpu(name: string, body: () => void): void {
  const reason = cuda.available ? '' : ` (skipped: ${cuda.reason?.text})`
  describe.skipIf(!cuda.available)(name + reason, body)
}
