/** Element types, in the order that the native side numbers them. */
export const dtypes = [
  'float32',
  'float16',
  'bfloat16',
  'float8_e4m3fn',
  'float8_e5m2',
  'int32',
  'int64',
  'uint8',
  'bool',
] as const

/** The name of an element type. */
export type DType = (typeof dtypes)[number]

/** The element types that operators compute with. */
export type FloatDType = 'float32' | 'float16' | 'bfloat16'

/** Bytes per element. */
export const bytesPerElement: Readonly<Record<DType, number>> = {
  float32: 4,
  float16: 2,
  bfloat16: 2,
  float8_e4m3fn: 1,
  float8_e5m2: 1,
  int32: 4,
  int64: 8,
  uint8: 1,
  bool: 1,
}

/** Which typed array holds which dtype. */
export interface HostArrays {
  float32: Float32Array<ArrayBuffer>
  float16: Uint16Array<ArrayBuffer>
  bfloat16: Uint16Array<ArrayBuffer>
  float8_e4m3fn: Uint8Array<ArrayBuffer>
  float8_e5m2: Uint8Array<ArrayBuffer>
  int32: Int32Array<ArrayBuffer>
  int64: BigInt64Array<ArrayBuffer>
  uint8: Uint8Array<ArrayBuffer>
  bool: Uint8Array<ArrayBuffer>
}

/**
 * The typed array that holds a dtype on the host: the bit patterns where JavaScript has no such number. It is the same on
 * every version of Node, also where `Float16Array` exists.
 */
export type HostArray<D extends DType = DType> = HostArrays[D]

/** @internal */
export const hostArrays: {
  readonly [D in DType]: new (
    buffer: ArrayBuffer,
  ) => HostArray<D>
} = {
  float32: Float32Array,
  float16: Uint16Array,
  bfloat16: Uint16Array,
  float8_e4m3fn: Uint8Array,
  float8_e5m2: Uint8Array,
  int32: Int32Array,
  int64: BigInt64Array,
  uint8: Uint8Array,
  bool: Uint8Array,
}

/** @internal What a typed array holds when nobody says otherwise, by its class name. */
export const dtypeOfArray: Readonly<Record<string, DType>> = {
  Float32Array: 'float32',
  Float16Array: 'float16',
  Int32Array: 'int32',
  BigInt64Array: 'int64',
  Uint8Array: 'uint8',
}

/** Typed arrays that tensors are made from: numbers, or the bit patterns that a {@link HostArray} has. */
export type HostValues =
  | Float32Array
  // Float16Array, which not every TypeScript knows
  | (ArrayBufferView & ArrayLike<number> & { readonly [Symbol.toStringTag]: 'Float16Array' })
  | Uint16Array
  | Uint8Array
  | Int32Array
  | BigInt64Array

/** The dtype of a tensor made from such host values when none is given. */
export type DTypeOf<A> = A extends Int32Array
  ? 'int32'
  : A extends BigInt64Array
    ? 'int64'
    : A extends Uint8Array
      ? 'uint8'
      : A extends { readonly [Symbol.toStringTag]: 'Float16Array' }
        ? 'float16'
        : 'float32'

/** @internal */
export function isDType(value: unknown): value is DType {
  return (dtypes as readonly unknown[]).includes(value)
}
