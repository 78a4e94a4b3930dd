import { HeddleError } from 'heddle'

/** The HeddleError that a call throws or that its promise rejects with; anything else fails the test. */
export async function failure(run: () => unknown): Promise<HeddleError> {
  try {
    await run()
  } catch (error) {
    if (error instanceof HeddleError) return error
    throw error
  }
  throw new Error('nothing was thrown')
}
