import { HeddleError } from 'heddle'

function ours(error: unknown): HeddleError {
  if (error instanceof HeddleError) return error
  throw error
}

/** The HeddleError that a call throws; anything else fails the test. */
export function thrown(run: () => unknown): HeddleError {
  try {
    run()
  } catch (error) {
    return ours(error)
  }
  throw new Error('nothing was thrown')
}

/** The HeddleError that a call throws or that its promise rejects with. */
export async function failure(run: () => unknown): Promise<HeddleError> {
  try {
    await run()
  } catch (error) {
    return ours(error)
  }
  throw new Error('nothing was thrown')
}
