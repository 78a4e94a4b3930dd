import { cuda, type Device, type FloatDType } from 'heddle'
import { describe } from 'vitest'

/** Where tests run: the CPU, and the first GPU; without one its tests are reported as skipped with the reason. */
export function describeDevices(name: string, body: (device: Device) => void): void {
  describe(`${name} on cpu`, () => body('cpu'))
  const reason = cuda.available ? '' : ` (skipped: ${cuda.reason?.text})`
  describe.skipIf(!cuda.available)(`${name} on cuda:0${reason}`, () => body('cuda:0'))
}

export const floats: readonly FloatDType[] = ['float32', 'float16', 'bfloat16']

/** Distance from 1 to the next number. */
export const epsilon: Readonly<Record<FloatDType, number>> = {
  float32: 2 ** -23,
  float16: 2 ** -10,
  bfloat16: 2 ** -7,
}
