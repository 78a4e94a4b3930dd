import { execFile, execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { promisify } from 'node:util'
import { describe, expect, it } from 'vitest'

// Kernels run here on a CPU: their source, unchanged, over an emulator of the instructions they use. Then their source is
// broken on purpose, and the emulator has to notice each time.

const root = join(__dirname, '../..')
const folder = join(root, 'build', 'emulator')
const include = [__dirname, join(root, 'cuda'), root]
const compiler = process.env.CXX ?? 'c++'
const run = promisify(execFile)

// What programs have in common is compiled once: headers that no fault changes, the emulator itself, and the definition
// of attention, unless a fault changes what it prepares
const shared = join(folder, 'shared.h')
const headers = ['cuda_runtime.h', 'common/sm90.cuh', 'common/launch.h', 'common/tensor_map.h']
const objects = ['emulator', 'attention_check'].map((name) => join(folder, `${name}.o`))

async function compile(output: string, flags: string[], front: string[] = []): Promise<void> {
  await run(compiler, [
    // what is shared memory is zero before anything runs: nobody has to ask
    ...['-std=c++20', '-Wno-unknown-pragmas', '-fno-extern-tls-init'],
    ...[...front, ...include].flatMap((path) => ['-I', path]),
    ...flags,
    ...['-o', output],
  ])
}

async function prepare(): Promise<void> {
  mkdirSync(folder, { recursive: true })
  writeFileSync(shared, headers.map((name) => `#include "${name}"\n`).join(''))
  await compile(`${shared}.gch`, ['-O1', '-x', 'c++-header', shared])
  for (const object of objects)
    await compile(object, ['-O3', '-c', join(__dirname, `${basename(object, '.o')}.cpp`)])
}
const prepared = prepare()

async function program(
  kernel: string,
  name: string,
  flags: string[],
  front: string[] = [],
  whole = false,
): Promise<string> {
  await prepared
  const output = join(folder, name)
  mkdirSync(dirname(output), { recursive: true })
  const source = ['-O1', '-include', shared, join(__dirname, `${kernel}.cpp`)]
  const linked = whole ? objects.slice(0, 1) : ['-DHEDDLE_CHECKED', ...objects]
  await compile(output, [...flags, ...source, ...linked], front)
  return output
}

// What is made for a name, once
function once<T>(make: (name: string) => T): (name: string) => T {
  const made = new Map<string, T>()
  return (name) => {
    const one = made.get(name) ?? make(name)
    made.set(name, one)
    return one
  }
}

/** What it says on standard output, after "ok" or "caught". */
async function verdict(file: string, seed: number, cases: readonly string[] = []): Promise<string> {
  try {
    return `ok: ${(await run(file, [String(seed), ...cases])).stdout}`
  } catch (error) {
    const { stdout, signal } = error as { stdout: string; signal: string | null }
    return `caught: ${signal ? `fault: ${signal}` : stdout}`
  }
}

interface Fault {
  what: string
  file: string
  from: string
  to: string
  /** The variant that it is put into, if not that of the others. */
  variant?: string
}

interface Kernel {
  name: string
  variants: Record<string, string[]>
  /** The variant that faults are put into. */
  broken: string
  faults: Fault[]
}

const forward = 'attention/forward_sm90.cuh'
const float8 = 'attention/float8_sm90.cuh'
const list = 'attention/list_sm90.h'
const softmax = 'attention/softmax_sm90.cuh'
const slots = 'attention/slots_sm90.cuh'
const sums = 'attention/sums_sm90.cuh'
const linear = 'linear/linear_sm90.cuh'
const split = 'attention/split_sm90.cuh'
const backward = 'attention/backward_sm90.cuh'
const plain = 'attention/forward_portable.cuh'
const plainBackward = 'attention/backward_portable.cuh'
const plainScan = 'lightning/scan_portable.cuh'
const decode = 'lightning/decode.cuh'
const decode90 = 'lightning/decode_sm90.cuh'
const plainDecode = 'lightning/decode_portable.cuh'
const scan = 'lightning/forward_sm90.cuh'
const sweep = 'lightning/backward_sm90.cuh'
const tile = 'common/tile.cuh'
const team = 'common/team.cuh'
const search = 'hip/search_sm80.cuh'
const step = 'hip/step_sm80.cuh'
const gather = 'attention/gather_sm80.cuh'
const gather90 = 'attention/gather_sm90.cuh'
const gatherKeys = 'attention/gather_keys.cuh'
const lines = 'probe/lines_sm90.cuh'
const pooled = 'probe/pooled.cuh'
const decide = 'flexprefill/decide.cuh'
const pooled90 = 'probe/pooled_sm90.cuh'
const rows90 = 'probe/rows_sm90.cuh'
const kernels: Kernel[] = [
  {
    name: 'forward_sm90',
    // every size, and every dtype with two or three computing warpgroups and with one buffer of q
    variants: Object.fromEntries(
      [
        ['kBF16', 64, 64],
        ['kF16', 64, 64],
        ['kF16', 96, 96],
        ['kBF16', 128, 128],
        ['kBF16', 192, 128],
        ['kF16', 192, 192],
        ['kBF16', 256, 256],
        ['kF16', 96, 96, 'kTall'],
        ['kBF16', 128, 128, 'kTall'],
      ].map(([dtype, d, dv, layout = 'kEven']) => [
        `${dtype} d${d} dv${dv}${layout === 'kTall' ? ' tall' : ''}`,
        [
          `-DHEDDLE_DTYPE=${dtype}`,
          `-DHEDDLE_D=${d}`,
          `-DHEDDLE_DV=${dv}`,
          `-DHEDDLE_LAYOUT=${layout}`,
        ],
      ]),
    ),
    broken: 'kBF16 d64 dv64',
    faults: [
      {
        what: 'a tile is loaded before the last one was used',
        file: forward,
        from: 'smem.k_empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'keys are used before they arrived',
        file: forward,
        from: 'smem.k_full[k.stage].wait(k.parity);\n      await_turn();\n      issue_scores',
        to: 'await_turn();\n      issue_scores',
      },
      {
        what: 'a stage is never given back',
        file: forward,
        from: 'release(smem.v_empty[v.stage]);\n      const bool moved = settle',
        to: 'const bool moved = settle',
      },
      {
        what: 'q is loaded over out',
        file: forward,
        from: 'smem.q_empty[q.stage].wait(q.parity ^ 1);',
        to: '',
      },
      {
        what: 'barriers are used before their initialisation is seen',
        file: forward,
        from: 'fence_barrier_init();',
        to: '',
      },
      {
        what: 'a copy reads what was not fenced',
        file: forward,
        from: 'fence_async_smem();\n    named_barrier_sync(8 + own, 128);',
        to: 'named_barrier_sync(8 + own, 128);',
      },
      {
        what: 'a copy starts before all have written',
        file: forward,
        from: 'fence_async_smem();\n    named_barrier_sync(8 + own, 128);',
        to: 'fence_async_smem();',
      },
      {
        what: 'the buffer of a copy is given back too soon',
        file: forward,
        from: 'wait_copies_read<0>();\n    smem.q_empty',
        to: 'smem.q_empty',
      },
      {
        what: 'a turn is never passed on',
        file: forward,
        from: 'pass_turn();\n      wgmma_wait<1>(acc_s)',
        to: 'wgmma_wait<1>(acc_s)',
      },
      {
        what: 'scores are read before their product is done',
        file: forward,
        from: 'wgmma_wait<1>(acc_s);',
        to: 'wgmma_wait<2>(acc_s);',
      },
      {
        what: 'values are scaled while their product runs',
        file: forward,
        from: 'wgmma_wait<0>(acc_o);\n      release(smem.v_empty[v.stage]);\n      const bool moved = settle(softened);\n      pack_weights<kType>(frag_p, acc_s);',
        to: 'const bool moved = settle(softened);\n      pack_weights<kType>(frag_p, acc_s);\n      wgmma_wait<0>(acc_o);\n      release(smem.v_empty[v.stage]);',
      },
      {
        what: 'registers change without a fence before the product',
        file: forward,
        from: 'wgmma_fence(acc_o);',
        to: '',
      },
      {
        what: 'the mask of the tail lets one key through',
        file: forward,
        from: ': work.sk;\n  }\n  return bounds',
        to: ': work.sk + 1;\n  }\n  return bounds',
      },
      {
        what: 'the diagonal is off by one',
        file: forward,
        from: 'min(work.sk, bounds.position[r] + 1)',
        to: 'min(work.sk, bounds.position[r] + 2)',
      },
      {
        what: 'the mask stops one tile too early',
        file: forward,
        from: 'max(own_first + (kHopes ? 0 : 1), 0)',
        to: 'max(own_first + kKeys, 0)',
      },
      {
        what: 'the window is one key too wide',
        file: softmax,
        from: 'before(beyond - window)',
        to: 'before(beyond - window - 1)',
      },
      {
        what: 'values of other sequences are not silenced',
        file: forward,
        from: 'if (left < kKeys) clear_beyond(v.stage, left);',
        to: '',
      },
      {
        what: 'masked values that are no numbers leak into rows',
        file: forward,
        from: '(kListed || args.causal) && total[0] != total[0]',
        to: 'false && total != total',
      },
      {
        what: 'rows of other sequences are overwritten',
        file: forward,
        from: 'ends = args.cu_seqlens_q && first_row + 64 > work.sq;',
        to: 'ends = false;',
      },
      {
        what: 'the counters of tiles are left behind',
        file: forward,
        from: 'args.tickets[0] = args.tickets[1] = 0;',
        to: '{}',
      },
      {
        what: 'a half of the first tile is left out of which the last row sees a key',
        file: forward,
        from: 'own_end <= key_of(j) + kHalfKeys',
        to: 'own_end <= key_of(j) + kHalfKeys + 1',
        variant: 'kBF16 d128 dv128',
      },
      {
        what: 'a half of the last tile is left out of which the first row sees a key',
        file: forward,
        from: '>= key_of(key_tiles - 1) + kHalfKeys',
        to: '>= key_of(key_tiles - 1) + kHalfKeys - 1',
        variant: 'kBF16 d128 dv128',
      },
      {
        what: 'a tile is passed by of which the last row sees a key',
        file: forward,
        from: 'key_tiles > 1 && key_of(0) >= own_end',
        to: 'key_tiles > 1 && key_of(0) >= own_end - 1',
        variant: 'kBF16 d128 dv128 tall',
      },
      {
        what: 'weights are kept that are too large',
        file: softmax,
        from: 'fits &= sums[r] <= most;',
        to: '',
        variant: 'kBF16 d128 dv128 tall',
      },
      {
        what: 'warps look for maxima from different tiles on',
        file: forward,
        from: 'constexpr int kHeard = Shape::kKeyStages + 2;',
        to: 'constexpr int kHeard = 1;',
        variant: 'kBF16 d128 dv128 tall',
      },
      {
        what: 'lost products are not made again',
        file: forward,
        from: 'multiply_again(work, smem.q[q.stage], lower, upper);',
        to: '',
        variant: 'kBF16 d128 dv128 tall',
      },
      {
        what: 'halves change places',
        file: forward,
        from: 'i / kParts == upper',
        to: 'i / kParts != upper',
        variant: 'kBF16 d128 dv128',
      },
      {
        what: 'the descriptor of q and k steps too far',
        file: tile,
        from: 'k % 64 * 2',
        to: 'k % 64 * 4',
      },
      {
        what: 'the descriptor of v steps too little',
        file: tile,
        from: 'k * 128) >> 4',
        to: 'k * 64) >> 4',
      },
      {
        what: 'out is swizzled differently from how it is copied',
        file: tile,
        from: '^ row % 8)',
        to: '^ row % 4)',
      },
    ],
  },
  {
    name: 'float8_sm90',
    variants: {
      'kF16 d64': ['-DHEDDLE_DTYPE=kF16'],
      'kBF16 d128': ['-DHEDDLE_D=128'],
    },
    broken: 'kF16 d64',
    faults: [
      {
        what: 'more registers are taken than given',
        file: float8,
        from: '(512 - kLoad',
        to: '(536 - kLoad',
      },
      {
        what: 'a tile is loaded over one in use',
        file: float8,
        from: 'empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'values are used before they arrived',
        file: float8,
        from: 'smem.v_full[v.stage].wait(v.parity);\n      issue',
        to: 'issue',
      },
      {
        what: 'transposed keys have another order than weights',
        file: float8,
        from: '0x5140 : 0x7362',
        to: '0x4150 : 0x6372',
      },
      {
        what: 'the far keys are others',
        file: float8,
        from: 'pairs(2 * q + 8, selector)',
        to: 'pairs(2 * q + 6, selector)',
      },
      {
        what: 'columns are exchanged',
        file: float8,
        from: 'half ? rows[i].y : rows[i].x',
        to: 'half ? rows[i].x : rows[i].y',
      },
      {
        what: 'values behind the end are not silenced',
        file: float8,
        from: '? end - begin',
        to: '? args.sk - begin',
      },
      {
        what: 'one more value is silenced',
        file: float8,
        from: 'i < left ?',
        to: 'i < left - 1 ?',
      },
      {
        what: 'sequences share a tile of values',
        file: float8,
        from: '? k_begin / kKeys + sequence',
        to: '? k_begin / kKeys',
      },
      {
        what: 'weights of two octets are exchanged',
        file: float8,
        from: 'pack_e4m3(of[0], of[1], of[4], of[5])',
        to: 'pack_e4m3(of[4], of[5], of[0], of[1])',
      },
      {
        what: 'weights are lifted but lse is not lowered',
        file: float8,
        from: '(rows.row_max[r] - kLift',
        to: '(rows.row_max[r]',
      },
      {
        what: 'weights are beyond what e4m3 holds',
        file: float8,
        from: 'kRoom = .75f',
        to: 'kRoom = 4.f',
      },
      {
        what: "sums don't shrink",
        file: float8,
        from: 'if (moved) shrink_values();',
        to: '',
      },
      {
        what: "the sums of weights don't shrink",
        file: float8,
        from: 'rows.row_sum[r] *= rows.shrink[r];',
        to: '',
      },
      {
        what: 'settled sums are added again',
        file: float8,
        from: 'acc_o[i] = acc_o[i + 1] = 0;',
        to: '',
      },
      {
        what: 'settled sums are relative to nothing',
        file: float8,
        from: 'settled_max[r] = rows.row_max[r];',
        to: '',
      },
      {
        what: 'a negative scale is minded where scores are masked alone',
        file: float8,
        from: 'scale_log2 < 0 ? 0 : (',
        to: '(',
      },
      {
        what: 'a negative scale is taken for a positive one',
        file: float8,
        from: 'if (scale_log2 < 0) {',
        to: 'if (false) {',
      },
      {
        what: 'a scale of zero makes masked scores visible',
        file: float8,
        from: 'fabsf(scale_log2) < 1e-30f ? 1e-30f : fabsf(scale_log2)',
        to: 'fabsf(scale_log2)',
      },
      {
        what: 'the scale is that of another kv head',
        file: float8,
        from: 'args.scales.score(work.head, kv_head)',
        to: 'args.scales.score(work.head, 0)',
      },
      {
        what: 'values keep their scale to themselves',
        file: float8,
        from: 'end.factor * value_scale;',
        to: 'end.factor;',
      },
      {
        what: 'a row that is computed again has no scale',
        file: float8,
        from: 'values[c] * value_scale',
        to: 'values[c]',
      },
      {
        what: 'q is loaded over what scores are still made of',
        file: float8,
        from: 'smem.q_empty[q.stage].wait(q.parity ^ 1);\n        smem.work',
        to: 'smem.work',
      },
      {
        what: 'out is written over what a copy reads',
        file: float8,
        from: 'if (thread == 0) wait_copies_read<0>();\n    named',
        to: 'named',
      },
      {
        what: 'masked values that are no numbers leak into rows',
        file: float8,
        from: 'args.causal && total != total',
        to: 'false && total != total',
      },
      {
        what: 'rows of other sequences are overwritten',
        file: float8,
        from: 'if (args.cu_seqlens_q && first_row + 64 > work.sq) {',
        to: 'if (false) {',
      },
      {
        what: 'the window is one key too wide',
        file: softmax,
        from: 'before(beyond - window)',
        to: 'before(beyond - window - 1)',
      },
    ],
  },
  {
    name: 'slots_sm90',
    variants: {
      'kF16 dv128': ['-DHEDDLE_DTYPE=kF16'],
      'kBF16 dv128': [],
      'kF16 dv64': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_DV=64'],
    },
    broken: 'kBF16 dv128',
    faults: [
      {
        what: 'biases are those of the tile before',
        file: forward,
        from: 'fetch(key_of(j), work.sk);\n      smem.k_full[k.stage].wait(k.parity);\n      await_turn();',
        to: 'smem.k_full[k.stage].wait(k.parity);\n      await_turn();',
      },
      {
        what: 'biases that hide all keys leave them equal',
        file: forward,
        from: 'args.slots.hides(top_log2) ? 0 * sum : sum',
        to: 'false ? 0 : sum',
      },
      {
        what: 'a bias of infinity is added to what is masked',
        file: forward,
        from: 'if (kForm == Form::kSigmoid && slots.row[r].constant == INFINITY)',
        to: 'if (false)',
      },
      {
        what: 'both biases of a word are its first',
        file: slots,
        from: 'static_cast<uint16_t>(pair >> 16)',
        to: 'static_cast<uint16_t>(pair)',
      },
      {
        what: 'a slope leaves out every second key',
        file: softmax,
        from: 'static_cast<float>(i / 4 * 8 + i % 2)',
        to: 'static_cast<float>(i / 4 * 8)',
      },
      {
        what: 'every second key has the slope of the one before',
        file: softmax,
        from: 'fmaf(-top, to_log2, slope_log2)',
        to: '-top * to_log2',
      },
      {
        what: 'weights of a row are relative to what those of another are',
        file: forward,
        from: '!rows.even(8 * slope)',
        to: 'false',
      },
      {
        what: 'the reciprocal of two sigmoids overflows',
        file: slots,
        from: 'lowest < -kFarSigmoid',
        to: 'false',
      },
      {
        what: 'sums of sigmoids are not what they are relative to',
        file: forward,
        from: 'rows.row_max[r] = slots.kSigmoidBase;',
        to: '{}',
      },
      {
        what: 'sums are divided that should not be',
        file: forward,
        from: '!args.slots.normalise && end.factor != 0',
        to: 'false && end.factor != 0',
      },
      {
        what: 'a row is computed again and divided by its sum',
        file: forward,
        from: 'kRows && !args.slots.normalise ? 0 : lse_log2',
        to: 'lse_log2',
      },
      {
        what: 'a row is computed again without cosines',
        file: slots,
        from: 'if (columns) product *= columns[key];',
        to: '',
      },
      {
        what: 'weights of softplus underflow',
        file: slots,
        from: '(before < kSoftplusBase && highest >= kLeast)',
        to: 'true',
      },
      {
        what: 'the logarithm loses the digits of a small sum',
        file: slots,
        from: 'u < 0.0625f ?',
        to: 'false ?',
      },
      {
        what: 'shares of a far mean underflow',
        file: slots,
        from: 'gain[r] >= kLeastGain && gain[r] <= kMostGain',
        to: 'true',
      },
      {
        what: 'rows of few keys have an offset',
        file: slots,
        from: 'seen > Attention::kYoungRows ? slots.offset : 0',
        to: 'slots.offset',
      },
      {
        what: 'keys before the window count',
        file: forward,
        from: 'max(end - begin, 0)',
        to: 'end',
      },
      {
        what: 'factors are those of the first sequence',
        file: forward,
        from: 'args.slots.k_factors + work.k_begin +',
        to: 'args.slots.k_factors +',
      },
      {
        what: 'biases are used before they arrived',
        file: forward,
        from: 'smem.bias_full[own].wait(biased++ & 1);',
        to: '',
      },
      {
        what: 'weights are kept that are too large',
        file: softmax,
        from: 'if (!__all_sync(~0u, fits)) return false;',
        to: '',
      },
      {
        what: 'lost products are not made again',
        file: forward,
        from: 'if (hopes) multiply_again',
        to: 'if (false) multiply_again',
      },
      {
        what: 'products are made again of columns that do not exist',
        file: forward,
        from: 'd + 8 < args.d ? pairs[4] : 0',
        to: 'pairs[4]',
      },
      {
        what: 'biases are loaded over those that are read',
        file: forward,
        from: 'smem.bias_empty[w].wait((loaded + j + 1) & 1);',
        to: '',
      },
      {
        what: 'lanes of a row weigh relative to maxima of their own',
        file: softmax,
        from: 'quad_max(most[r])',
        to: 'most[r]',
      },
      {
        what: 'weights are relative to what has no exponent',
        file: softmax,
        from: 'if (next[r] * to_log2 < Attention::kHidingLog2) next[r] = -INFINITY;',
        to: '',
      },
      {
        what: 'sigmoids that are not small are a short series',
        file: slots,
        from: 'constexpr float kLow = -6,',
        to: 'constexpr float kLow = 5,',
      },
      {
        what: 'a power is always 3',
        file: slots,
        from: 'if (slots.power == 15) {',
        to: 'if (false) {',
      },
      {
        what: 'softplus of high scores lacks a term',
        file: slots,
        from: 'fmaf(u, -0.5f * first, first)',
        to: 'first',
      },
      {
        what: 'two terms make softplus of any score',
        file: slots,
        from: 'gain * u * u * u * 0x1p17f <= above',
        to: 'above > 0',
      },
      {
        what: 'softplus of scores that are not so high is the score',
        file: slots,
        from: '15 * kLog2e * 0x1p11f',
        to: '15 * kLog2e',
      },
      {
        what: 'lanes of a row have highest scores of their own',
        file: sums,
        from: 'top = max(top, __shfl_xor_sync(~0u, top, 2));',
        to: '',
      },
      {
        what: 'products of weights may be too large',
        file: slots,
        from: ' && own[r] < INFINITY',
        to: '',
      },
      {
        what: 'keys lose digits to what they have in common',
        file: 'attention/factors_sm90.cuh',
        from: 'sum / static_cast<float>(count)',
        to: '0',
      },
      {
        what: 'small weights lose digits in sums with 1',
        file: slots,
        from: '(own[r] >= kLeast || rows.row_sum[r] >= kLarge)',
        to: 'rows.row_sum[r] + own[r] >= 0.0625f',
      },
      {
        what: 'a row that is no number is one without keys',
        file: 'attention/factors_sm90.cuh',
        from: 'shift == shift ? shift : 0',
        to: 'shift',
      },
      {
        what: 'numbers behind the end of a cache count',
        file: 'attention/factors_sm90.cuh',
        from: 'at.token < p.seen.of(at.batch)',
        to: 'true',
      },
      {
        what: 'a key that is no number is common to all',
        file: 'attention/factors_sm90.cuh',
        from: 'own.square < INFINITY ?',
        to: 'true ?',
      },
      {
        what: 'rows of the next sequence stand behind those of this one',
        file: 'attention/factors_sm90.cuh',
        from: 'batch += by.batch + next_batch;',
        to: 'batch += by.batch;',
      },
      {
        what: 'keys of all heads have the same in common',
        file: 'attention/factors_sm90.cuh',
        from: 'kept != of_center',
        to: 'of_center < 0',
      },
      {
        what: 'scores of others lack what keys have in common',
        file: slots,
        from: 'softplus_log2(acc[i] + row[r].constant)',
        to: 'softplus_log2(acc[i])',
      },
      {
        what: 'high scores lack what keys have in common',
        file: slots,
        from: ' || shares.by == SoftplusBy::kScore) {',
        to: ') {',
      },
      {
        what: 'scores that are added up lack what keys have in common',
        file: slots,
        from: 'acc[i] += shift[i / 2 % 2];',
        to: '',
      },
      {
        what: 'rows see all keys that are stored',
        file: 'attention/forward_sm90.h',
        from: 'if (!cache_seqlens) return sk;',
        to: 'return sk;',
      },
      {
        what: 'rows see all keys before them',
        file: 'attention/forward_sm90.h',
        from: 'if (window && keys > window) keys = window;',
        to: '',
      },
      {
        what: 'a power is one too high',
        file: slots,
        from: 'times >> bit & 1',
        to: 'true',
      },
    ],
  },
  {
    name: 'sums_sm90',
    variants: { kF16: ['-DHEDDLE_DTYPE=kF16'], kBF16: [] },
    broken: 'kBF16',
    faults: [
      {
        what: 'biases that hide all keys leave them equal',
        file: sums,
        from: 'args.slots.hides(rows.row_max[r]) ? 0 * sum : sum',
        to: 'sum',
      },
      {
        what: 'keys are used before they arrived',
        file: sums,
        from: 'smem.k_full[k.stage].wait(k.parity);\n      await_turn();',
        to: 'await_turn();',
      },
      {
        what: 'a tile is loaded before the last one was used',
        file: sums,
        from: 'smem.k_empty[k.stage].wait(k.parity ^ 1);',
        to: '',
      },
      {
        what: 'a tile is given back while products read it',
        file: sums,
        from: 'wgmma_wait<0>(acc);\n      pass_turn();\n      release(smem.k_empty[k.stage]);',
        to: 'release(smem.k_empty[k.stage]);\n      wgmma_wait<0>(acc);\n      pass_turn();',
      },
      {
        what: 'scores are added up while they are multiplied',
        file: sums,
        from: 'wgmma_wait<0>(acc);',
        to: '',
      },
      {
        what: 'q is loaded over the one before the last',
        file: sums,
        from: 'smem.q_empty[q.stage].wait(q.parity ^ 1);',
        to: '',
      },
      {
        what: 'the last key tile is not masked',
        file: sums,
        from: 'tile >= whole_end ||',
        to: '',
      },
      {
        what: 'sums of a later sequence are written over the first',
        file: sums,
        from: 'line + work.q_begin +',
        to: 'line +',
      },
      {
        what: 'scores above zero weigh what those below do',
        file: slots,
        from: 'above += relu(acc[i + x]);\n        product =',
        to: 'product =',
      },
      {
        what: 'sums stay relative to what they were before',
        file: slots,
        from: 'before[r] * rows.shrink[r]',
        to: 'before[r]',
      },
    ],
  },
  {
    name: 'listed_sm90',
    variants: {
      'kF16 d64': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=64'],
      'kBF16 d128': ['-DHEDDLE_D=128'],
      'kBF16 d128 apart': ['-DHEDDLE_D=128', '-DHEDDLE_LAYOUT=kApart'],
    },
    broken: 'kBF16 d128',
    faults: [
      {
        what: 'a unit is skipped',
        file: forward,
        from: 'bits ^= 1u << bit;',
        to: 'bits ^= 3u << bit;',
      },
      {
        what: 'words behind the first 32 are left out',
        file: forward,
        from: 'groups = (args.lists.words + 31) / 32;',
        to: 'groups = 1;',
      },
      {
        what: 'keys that go up come in the order of those that go down',
        file: forward,
        from: 'min(unit, other)',
        to: 'unit',
        variant: 'kBF16 d128 apart',
      },
      {
        what: 'both halves of a tile are one unit',
        file: forward,
        from: 'work.k_begin + pair.unit[i]',
        to: 'work.k_begin + pair.unit[0]',
      },
      {
        what: 'a pair is used before it is there',
        file: forward,
        from: 'smem.pair_full[turn.stage].wait(turn.parity);\n    next',
        to: 'next',
      },
      {
        what: 'a pair is overwritten before all have read it',
        file: forward,
        from: 'smem.pair_empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'half of the values are left out',
        file: forward,
        from: 'for (int k = 0; k < kKeys; k += 16)',
        to: 'for (int k = 0; k < kKeys / 2; k += 16)',
      },
      {
        what: 'what is left over of classes is left out',
        file: forward,
        from: 'odd ^= 1u << kind;',
        to: '',
      },
      {
        what: 'all warpgroups take the list of the first',
        file: forward,
        from: 'smem.pairs[turn.stage].seen[own]',
        to: 'smem.pairs[turn.stage].seen[0]',
      },
      {
        what: 'causality does not cut what is listed',
        file: forward,
        from: ' || end > whole_end',
        to: '',
      },
      {
        what: 'a unit counts as listed that is not',
        file: list,
        from: '(inside & ~all) == 0',
        to: 'true',
      },
      {
        what: 'units of runs of keys count as listed that are not',
        file: list,
        from: 'static_cast<uint32_t>(some & all & inside)',
        to: 'static_cast<uint32_t>(some & inside)',
      },
      {
        what: 'the last distances of a unit are left out',
        file: list,
        from: 'look.any |= (distances & bit_range(0, count - i)) != 0;',
        to: 'look.any |= (distances & bit_range(0, 64 - i)) != 0;',
      },
      {
        what: 'a unit of diagonals counts as listed that is not',
        file: list,
        from: 'look.listed |= slashed;',
        to: 'look.listed |= look.any;',
      },
      {
        what: 'rows that differ are taken for alike',
        file: list,
        from: '!mask.bounds && first / mask.block_q == last / mask.block_q',
        to: 'true',
      },
      {
        what: 'rows of the second warpgroup take the blocks of the first',
        file: list,
        from: '++w, row += 64)',
        to: '++w)',
      },
      {
        what: 'words of blocks begin at the first',
        file: list,
        from: ' >> at % 32;',
        to: ';',
      },
      {
        what: 'low rows are there twice, and the last ones never',
        file: forward,
        from: 'first = args.short_tiles;',
        to: '',
      },
      {
        what: 'a stage is given back before all had its values',
        file: forward,
        from: 'smem.v_full[v.stage].wait(v.parity);\n      __syncwarp(',
        to: '__syncwarp(',
      },
      {
        what: 'weights of a tile before those that are passed by are lost',
        file: forward,
        from: 'issue_last(last);\n          await_last(last);\n          last = -1;',
        to: 'await_last(last);\n          last = -1;',
      },
      {
        what: 'sums of before do not shrink behind such a tile',
        file: forward,
        from: 'if (first(j, soften, look)) shrink_values();',
        to: 'first(j, soften, look);',
      },
      {
        what: 'a turn is not passed on',
        file: forward,
        from: 'if (j > 0) pass_turn();',
        to: '',
      },
      {
        what: 'a masked value that is no number leaks',
        file: forward,
        from: '(kListed || args.causal) && total[0] != total[0]',
        to: 'false && total != total',
      },
      {
        what: 'a row is computed again from keys it does not see',
        file: forward,
        from: 'return !kListed || (args.lists.mask.seen(mask_row(work, row), key) & 1);',
        to: 'return key >= 0;',
      },
    ],
  },
  {
    name: 'split_sm90',
    variants: {
      'kF16 d64': ['-DHEDDLE_DTYPE=kF16'],
      'kBF16 d128': ['-DHEDDLE_D=128'],
      'kF16 d256': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=256'],
      'kE4M3 d64': ['-DHEDDLE_DTYPE=kE4M3', '-DHEDDLE_OUT=kBF16'],
      'kE4M3 d128': ['-DHEDDLE_DTYPE=kE4M3', '-DHEDDLE_D=128'],
    },
    broken: 'kBF16 d128',
    faults: [
      {
        what: 'float8 is converted before it arrived',
        file: split,
        from: 'raw_full.wait(from.parity);',
        to: '',
        variant: 'kE4M3 d128',
      },
      {
        what: 'float8 is converted over a tile in use',
        file: split,
        from: 'empty.wait(to.parity ^ 1);',
        to: '',
        variant: 'kE4M3 d128',
      },
      {
        what: 'converted keys are not fenced',
        file: split,
        from: 'convert_tile<kD>(raw, tile);\n            fence_async_smem();',
        to: 'convert_tile<kD>(raw, tile);',
        variant: 'kE4M3 d128',
      },
      {
        what: 'eight numbers of float8 stand where the eight before them do',
        file: split,
        from: 'piece * 16 + half * 8',
        to: 'piece * 16 + (1 - half) * 8',
        variant: 'kE4M3 d64',
      },
      {
        what: 'heads of float8 have one scale',
        file: split,
        from: 'kFloat8 ? args.scale_of(head_of(row)) : args.scale',
        to: 'args.scale',
        variant: 'kE4M3 d64',
      },
      {
        what: 'values of float8 keep their scale',
        file: split,
        from: 'const float factor = end.factor * value_scale;',
        to: 'const float factor = end.factor;',
        variant: 'kE4M3 d128',
      },
      {
        what: 'the counters of arrivals are left behind',
        file: split,
        from: 'if (thread == 0) *arrivals = 0;\n      for',
        to: 'for',
      },
      {
        what: 'the counters of pairs are left behind',
        file: split,
        from: 'if (thread == 0) *arrivals = 0;\n        if (idle)',
        to: 'if (idle)',
      },
      {
        what: 'parts of few rows stand where those of many do',
        file: split,
        from: 'args.part_out + place * (kSplitRows * kD) + row * args.dv',
        to: 'args.part_out + (place * kSplitRows + row) * args.dv',
      },
      {
        what: 'what a pair adds up is not relative to the same',
        file: split,
        from: 'its[r] = sm90::exp2_approx(state.x - base);',
        to: 'its[r] = 1;',
      },
      {
        what: 'keys are used before they arrived',
        file: split,
        from: 'smem.k_full[stage.stage].wait(stage.parity);',
        to: '',
      },
      {
        what: 'a tile is loaded before the last one was used',
        file: split,
        from: 'empty.wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'a stage is never given back',
        file: split,
        from: 'release(smem.v_empty[stage.stage]);',
        to: '',
      },
      {
        what: 'q is multiplied before it was fenced',
        file: split,
        from: 'fence_async_smem();\n    sync();',
        to: 'sync();',
      },
      {
        what: 'values behind the last key are not silenced',
        file: split,
        from: 'if (args.cache_seqlens && left < kKeys) {',
        to: 'if (false) {',
      },
      {
        what: 'every page is read from its first row',
        file: split,
        from: 'row = table.row(key);',
        to: 'row = 0;',
      },
      {
        what: 'the last part of a row is left out',
        file: split,
        from: 'if (from + i > last_cta) continue;',
        to: 'if (from + i >= last_cta) continue;',
      },
      {
        what: 'infinity is multiplied by a weight of zero',
        file: split,
        from: 'if (from + i > last_cta) continue;\n            const float weight = sm90::exp2_approx(state[i].x - base);',
        to: 'const float weight = from + i > last_cta ? 0 : sm90::exp2_approx(state[i].x - base);',
      },
      {
        what: 'a page out of range is not told',
        file: split,
        from: 'bad |= key < its.sk && (pages < 0 || pages >= args.pages);',
        to: '',
      },
      {
        what: 'a length out of range is not told',
        file: split,
        from: 'bad |= keys < 0 || keys > args.sk;',
        to: '',
      },
      {
        what: 'an offset out of range is not told',
        file: split,
        from: 'bad |= begins > ends ||',
        to: 'bad |=',
      },
      {
        what: 'sequences overlap',
        file: split,
        from: 'return __all_sync(~0u, apart) ? sum : 0;',
        to: 'return sum;',
      },
      {
        what: 'packed queries are read from the first one on',
        file: split,
        from: 'work.first_row = its.q_begin * args.group +',
        to: 'work.first_row =',
      },
      {
        what: 'a sequence behind the first 32 is taken for the one before',
        file: split,
        from: 'first_sequence += 32;',
        to: 'first_sequence += 31;',
      },
      {
        what: 'a row tile is done with before its last key',
        file: split,
        from: 'last / args.group + off + 1, its.sk) + kKeys - 1) / kKeys',
        to: 'last / args.group + off + 1, its.sk)) / kKeys',
      },
      {
        what: 'tiles that a row tile does not see are awaited',
        file: split,
        from: 'work.unit_tiles = seen.y - seen.x;',
        to: 'work.unit_tiles = its.tiles;',
      },
      {
        what: 'two parts lie in one place',
        file: split,
        from: '(cta == first_cta ? late : 0)',
        to: '0',
      },
      {
        what: 'the mask is left out of one tile',
        file: split,
        from: 'key + kKeys > seen_end',
        to: 'key > seen_end',
      },
      {
        what: 'a query sees one key too many',
        file: split,
        from: 'min(work.sk, bounds.position[r] + 1)',
        to: 'min(work.sk, bounds.position[r] + 2)',
      },
    ],
  },
  {
    name: 'paged_sm90',
    variants: { 'kF16 d64': ['-DHEDDLE_DTYPE=kF16'], 'kBF16 d128': ['-DHEDDLE_D=128'] },
    broken: 'kBF16 d128',
    faults: [
      {
        what: 'every page is read from its first row',
        file: forward,
        from: 'box.row = rows.row(key);',
        to: 'box.row = 0;',
      },
      {
        what: 'a sequence is left to who leaves it',
        file: forward,
        from: '|| size <= kFewQueries',
        to: '|| size <= kFewQueries + 1',
      },
      {
        what: 'a sequence has all keys of its pages',
        file: forward,
        from: 'work.sk = offset(args.cache_seqlens, args.cache_stride, work.sequence, args.sk);',
        to: 'work.sk = args.sk;',
      },
      {
        what: 'a sequence behind the first 32 has the place of one of them',
        file: forward,
        from: 'work.sequence = sequence + place;',
        to: 'work.sequence = place;',
      },
      {
        what: 'tiles of a sequence begin with those before it',
        file: forward,
        from: '__shfl_sync(~0u, until, place) - tiles_here;',
        to: '__shfl_sync(~0u, until, place);',
      },
      {
        what: 'products are made again from the first keys of a tile',
        file: forward,
        from: '(lower + 2 * i + lane / 4)',
        to: '(lower + lane / 4)',
      },
      {
        what: 'a row is computed again from the first head',
        file: forward,
        from: 'x + kv_head * strides.head, strides};',
        to: 'x, strides};',
      },
      {
        what: 'a page is loaded before its stage was read',
        file: forward,
        from: 'smem.k_empty[turn.stage].wait(turn.parity ^ 1);\n      return turn.stage;',
        to: 'return turn.stage;',
      },
      {
        what: 'lanes begin with other tiles than who asked for one',
        file: forward,
        from: 'ticket = __reduce_add_sync(~0u, ticket);',
        to: '',
      },
    ],
  },
  {
    name: 'forward_portable',
    variants: { kBF16: [], kE4M3: ['-DHEDDLE_DTYPE=kE4M3'] },
    broken: 'kBF16',
    faults: [
      {
        what: 'q is loaded over that of a tile without keys',
        file: plain,
        from: 'attention_tile<T>(p, smem, tile);\n    __syncthreads();',
        to: 'attention_tile<T>(p, smem, tile);',
      },
      {
        what: 'a CTA leaves out every second tile',
        file: plain,
        from: 'tile += gridDim.x',
        to: 'tile += 2 * gridDim.x',
      },
      {
        what: 'a tile is used before it is there',
        file: plain,
        from: ': 0;\n      }\n      __syncthreads();',
        to: ': 0;\n      }',
      },
      {
        what: 'a tile is loaded over the one in use',
        file: plain,
        from: 'int width) {\n      __syncthreads();',
        to: 'int width) {',
      },
      {
        what: 'values that are no numbers are left out where their weight is 0',
        file: plain,
        from: 'hidden >> j & 1 ? -1',
        to: 'weight == 0 ? -1',
      },
      {
        what: 'biases that hide all keys leave them equal',
        file: plain,
        from: 'bias * 1.44269504f < Attention::kHidingLog2',
        to: 'false',
      },
      {
        what: 'masked values that are no numbers leak into rows',
        file: plain,
        from: 'if (weight < 0) continue;',
        to: '',
      },
      {
        what: 'the diagonal is off by one',
        file: plain,
        from: '|| t <= position) &&',
        to: '|| t <= position + 1) &&',
      },
      {
        what: 'the window is one key too wide',
        file: plain,
        from: 't > position - p.window) &&',
        to: 't >= position - p.window) &&',
      },
      {
        what: 'splits share a tile',
        file: plain,
        from: 'begin + share * kKeyTile);',
        to: 'begin + (share + 1) * kKeyTile);',
      },
      {
        what: "sums don't shrink",
        file: plain,
        from: 'row_sum *= correction;',
        to: '',
      },
      {
        what: 'threads of a row have maxima of their own',
        file: plain,
        from: 'tile_max = quad_max(tile_max);',
        to: '',
      },
      {
        what: 'parts of splits are added as they are',
        file: plain,
        from: 'sum += expf(row_max[i] - top) *',
        to: 'sum +=',
      },
      {
        what: 'a tile is passed by that a row sees',
        file: plain,
        from: '__syncthreads_or(seen != 0)',
        to: '__syncthreads_or(seen % 2 != 0)',
      },
      {
        what: 'cosines keep their lengths',
        file: plain,
        from: 'x[e] / unit / length * short_of',
        to: 'x[e] / unit * short_of',
      },
      {
        what: 'pages are those of the batch',
        file: plain,
        from: 'data + page * x.batch',
        to: 'data + place.batch * x.batch',
      },
    ],
  },
  {
    name: 'backward_portable',
    variants: { 'kBF16 d64': [], 'kF16 d128': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=128'] },
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'a tile is loaded over the one in use',
        file: plainBackward,
        from: '__syncthreads();\n      if (kMasked && p.masked) {',
        to: 'if (kMasked && p.masked) {',
      },
      {
        what: 'a tile is used before it is there',
        file: plainBackward,
        from: 'kOtherTile, p.dv);\n      }\n      __syncthreads();',
        to: 'kOtherTile, p.dv);\n      }',
      },
      {
        what: 'masked values that are no numbers leak into gradients',
        file: plainBackward,
        from: 'if (p_c < 0) continue;',
        to: '',
      },
      {
        what: 'keys meet one head of their group',
        file: plainBackward,
        from: 'first_head + (kOwnsKeys ? group : 1);',
        to: 'first_head + 1;',
      },
      {
        what: 'a key misses the first row that sees it',
        file: plainBackward,
        from: 'first = max(first, low - off);',
        to: 'first = max(first, low - off + 1);',
      },
      {
        what: 'rows have no delta',
        file: plainBackward,
        from: 'p.normalise ? args.row_delta[row] : 0',
        to: '0',
      },
      {
        what: 'threads of a row keep what slopes get',
        file: plainBackward,
        from: 'dslope = quad_sum(dslope);',
        to: '',
      },
    ],
  },
  {
    name: 'backward_sm90',
    variants: Object.fromEntries(
      [
        ['kBF16', 64],
        ['kF16', 64],
        ['kBF16', 128],
        ['kF16', 128],
      ].map(([dtype, d]) => [
        `${dtype} d${d}`,
        [`-DHEDDLE_DTYPE=${dtype}`, `-DHEDDLE_D=${d}`, '-Wall', '-Wextra', '-Werror'],
      ]),
    ),
    broken: 'kBF16 d128',
    faults: [
      {
        what: 'what was marked is not done again',
        file: plainBackward,
        from: 'if (!marks[i]) continue;',
        to: 'continue;',
      },
      {
        what: 'dP begins with nothing',
        file: backward,
        from: 'issue_scores(acc_dp, smem.v, smem.dout[o.stage], true);',
        to: 'issue_scores(acc_dp, smem.v, smem.dout[o.stage], false);',
      },
      {
        what: 'rows are loaded over those in use',
        file: backward,
        from: 'smem.q_empty[q.stage].wait(q.parity ^ 1);\n        smem.q_full',
        to: 'smem.q_full',
      },
      {
        what: 'dout is used before it arrived',
        file: backward,
        from: 'smem.dout_full[o.stage].wait(o.parity);',
        to: '',
      },
      {
        what: 'rows are given back while dk reads them',
        file: backward,
        from: 'if (i > 0) release(smem.q_empty[q.before(1)]);',
        to: 'release(smem.q_empty[q.stage]);',
      },
      {
        what: 'fewer bytes are announced than arrive',
        file: backward,
        from: 'smem.q[0].kBytes + kVectorBytes',
        to: 'smem.q[0].kBytes',
      },
      {
        what: 'dS of the other warpgroup is not waited for',
        file: backward,
        from: 'if (step >= 0) smem.ds_full[step & 1].wait(step >> 1 & 1);',
        to: '',
      },
      {
        what: 'dS is multiplied before it was fenced',
        file: backward,
        from: 'fence_async_smem();\n    release(smem.ds_full',
        to: 'release(smem.ds_full',
      },
      {
        what: 'dS has one buffer',
        file: backward,
        from: 'smem.ds[step & 1].address',
        to: 'smem.ds[0].address',
      },
      {
        what: 'sums of dq are overwritten while they are added up',
        file: backward,
        from: 'smem.dq_empty[own].wait((step & 1) ^ 1);',
        to: '',
      },
      {
        what: 'sums of dq are given back while they are read',
        file: backward,
        from: 'commit_copies();\n        wait_copies_read<0>();',
        to: 'commit_copies();',
      },
      {
        what: 'the last dq is left out',
        file: backward,
        from: 'write_dq(acc_dq, last);\n    hand_over();',
        to: '',
      },
      {
        what: 'a turn is not waited for in its order',
        file: backward,
        from: 'first_key / kKeys - seen.begin',
        to: 'seen.end - 1 - first_key / kKeys',
      },
      {
        what: 'the first turn adds to what nobody has cleared',
        file: backward,
        from: 'first ? copy_to_gmem(sums, smem.dq[its], sizeof(smem.dq[0]), Keep::kLong)',
        to: 'false ? void()',
      },
      {
        what: 'sums that nobody has stored are read',
        file: backward,
        from: '!args.deterministic || turns > 0',
        to: 'true',
      },
      {
        what: 'pairs are looked up over those in use',
        file: backward,
        from: 'smem.q_empty[q.stage].wait(q.parity ^ 1);\n          if (step',
        to: 'if (step',
      },
      {
        what: 'dS of before is left where a warpgroup passes by',
        file: backward,
        from: 'for (int r = 0; r < 4; ++r) frag_ds[s][r] = 0;',
        to: 'for (int r = 0; r < 4; ++r) frag_ds[s][r] |= 0;',
      },
      {
        what: 'a warpgroup passes by where it clears rows with the other',
        file: backward,
        from: '!(any >> i & 1) && !ends',
        to: '!(any >> i & 1)',
      },
      {
        what: 'all warps take the pairs of the first',
        file: backward,
        from: 'pairs[own * 4 + warp]',
        to: 'pairs[own * 4]',
      },
      {
        what: 'a step counts as listed that is not',
        file: backward,
        from: '!(listed >> i & 1) || ',
        to: '',
      },
      {
        what: 'causality does not cut what is listed',
        file: backward,
        from: 'work.first_key + (i + 1) * kUnitKeys > end',
        to: 'false',
      },
      {
        what: 'key tiles that are not listed have turns',
        file: backward,
        from: 'units(next.m, next.head).tiles_below(tile, lane)',
        to: 'tile',
      },
      {
        what: 'row tiles of a list share its first rows',
        file: backward,
        from: 'kListedWarpgroups + m % (2 / kHalves);',
        to: 'kListedWarpgroups;',
      },
      {
        what: 'heads share a list',
        file: backward,
        from: 'args.lists.index(batch, head,',
        to: 'args.lists.index(batch, 0,',
      },
      {
        what: 'a row tile has too many turns',
        file: backward,
        from: 'const int keys = args.causal ? min(max(position + kQueries, 0), sk) : sk;',
        to: 'const int keys = sk;',
      },
      {
        what: 'turns begin at the first key under a window',
        file: backward,
        from: 'begin = args.window ? max(position + 1 - args.window, 0) / kKeys : 0;',
        to: 'begin = 0;',
      },
      {
        what: 'a slope gets what belongs to another head',
        file: backward,
        from: 'smem.dslopes[own * 4 + warp][head] += sum;',
        to: 'smem.dslopes[own * 4 + warp][0] += sum;',
      },
      {
        what: 'a slope gets a masked value that is no number',
        file: backward,
        from: 'sum = p == 0 ? sum : ',
        to: 'sum = ',
      },
      {
        what: 'CTAs take turns in the order of their numbers',
        file: backward,
        from: 'waits ? fetch_add(args.ticket, 1) : blockIdx.x',
        to: 'blockIdx.x',
      },
      {
        what: 'a part does not add what was before it',
        file: backward,
        from: 'if (work.part > 0) {',
        to: 'if (work.part > 8) {',
      },
      {
        what: 'a part tells nobody that it has added',
        file: backward,
        from: 'if (threadIdx.x == 128) signal(turn);',
        to: '',
      },
      {
        what: 'all parts take all rows',
        file: backward,
        from: 'work.begin = end - rows * (work.part + 1) / work.parts;',
        to: '',
      },
      {
        what: 'products are read before they are done',
        file: backward,
        from: 'wgmma_wait<0>(acc_dp);',
        to: 'wgmma_wait<1>(acc_dp);',
      },
      {
        what: 'the diagonal is off by one',
        file: backward,
        from: 'key >= work.sk ? kQueries : args.causal ? sees : 0',
        to: 'key >= work.sk ? kQueries : args.causal ? sees - 1 : 0',
      },
      {
        what: 'the tail of the keys is not masked',
        file: backward,
        from: 'key >= work.sk ? kQueries : args.causal ? sees : 0',
        to: 'args.causal ? sees : 0',
      },
      {
        what: 'the mask stops one tile too early',
        file: backward,
        from: 'max(first_row + kKeys - 1, 0)',
        to: 'max(first_row + kKeys - 1 - kQueries, 0)',
      },
      {
        what: 'the window is one key too wide',
        file: backward,
        from: 'i / 4 * 8 >= sees + args.window',
        to: 'i / 4 * 8 > sees + args.window',
      },
      {
        what: 'the window ends one tile too early',
        file: backward,
        from: '(max(beyond, 0) + kQueries - 1) / kQueries',
        to: 'max(beyond, 0) / kQueries',
      },
      {
        what: 'rows of other sequences are not silenced',
        file: backward,
        from: 'if (clears) clear_beyond(smem.q[q.stage], work.sq - m * kQueries, kQueries);',
        to: '',
      },
      {
        what: 'keys of other sequences are not silenced',
        file: backward,
        from: 'clear_beyond(smem.k, work.sk - first_key, kKeys);',
        to: '',
      },
      {
        what: 'gradients of other sequences are overwritten',
        file: backward,
        from: 'if (args.cu_seqlens_k && own_first + 64 > work.sk) {',
        to: 'if (false) {',
      },
      {
        what: 'what is no number is not marked',
        file: backward,
        from: 'args.checks && total != total) args.row_marks',
        to: 'false) args.row_marks',
      },
      {
        what: 'the derivative of the soft cap is left out',
        file: backward,
        from: 'rate = 4 * half * (1 - half);',
        to: 'rate = 1;',
      },
      {
        what: 'sums of dq are put in other columns',
        file: backward,
        from: 'const int its = i / 1024, part = i / 128 % 8,',
        to: 'const int its = i / 1024, part = i / 128 % 8 ^ 1,',
      },
    ],
  },
  {
    // portable, with CTAs that run at the same time
    name: 'flexprefill',
    variants: { 'of heads': ['-Wall', '-Wextra', '-Werror'] },
    broken: 'of heads',
    faults: [
      {
        what: 'CTAs do not wait for each other',
        file: team,
        from: 'while (arrivals < meetings_ * static_cast<uint32_t>(members)) __nanosleep(20);',
        to: '',
      },
      {
        what: 'a sum is cleared while others read it',
        file: team,
        from: 'memory.bins[counts_ % 3], &next = memory.bins[(counts_ + 1) % 3]',
        to: 'memory.bins[counts_ % 2], &next = memory.bins[(counts_ + 1) % 2]',
      },
      {
        what: 'a sum is not cleared',
        file: team,
        from: 'if (member == 0) next.count[i] = next.mass[i] = 0;',
        to: '',
      },
      {
        what: 'bins of a CTA are not cleared',
        file: team,
        from: 'each(256, [&](int64_t i) { bins.count[i] = bins.mass[i] = 0; });',
        to: '',
      },
      {
        what: 'a carry is lost',
        file: team,
        from: 'static_cast<uint32_t>(mass >> 32) + carry',
        to: 'static_cast<uint32_t>(mass >> 32) + 0 * carry',
      },
      {
        what: 'a lane counts again what another has counted',
        file: team,
        from: 'counts &= !same;',
        to: '',
      },
      {
        what: 'lanes do not wait for each other with a digit',
        file: team,
        from: 'digit == __shfl_sync(~0u, digit, leader) && counts',
        to: 'counts && digit == __shfl_sync(~0u, digit, leader)',
      },
      {
        what: 'what lies above the list is not taken off',
        file: 'flexprefill/choice.cuh',
        from: 'wanted.amount -= group.masses[i];',
        to: '',
      },
      {
        what: 'a list begins below what may be the last',
        file: 'flexprefill/choice.cuh',
        from: 'mass_of_share(bin_share(bin + i));',
        to: 'mass_of_share(bin_share(bin + 0 * i));',
      },
      {
        what: 'a list is cut where its room ends',
        file: 'flexprefill/choice.cuh',
        from: 'if (!fits) return',
        to: 'if (false) return',
      },
      {
        what: 'what is surely listed is not written',
        file: 'flexprefill/choice.cuh',
        from: 'if (lane == done / 32 + i) pairs = all_sure;',
        to: '',
      },
      {
        what: 'nobody knows what others have listed',
        file: 'flexprefill/choice.cuh',
        from: 'all.share(bins);',
        to: 'all.meet();',
      },
      {
        what: 'a rank of the last bin is forgotten',
        file: 'flexprefill/choice.cuh',
        from: 'bins, held, wanted, [&]',
        to: 'bins, held - 1, wanted, [&]',
      },
      {
        what: 'a list is looked at from a digit that its ranks do not share',
        file: 'flexprefill/choice.cuh',
        from: 'rank_of_share(bin_share(top + 1), 0)',
        to: 'rank_of_share(bin_share(low), 0)',
      },
      {
        what: 'a rank is looked for by all of its bits but one',
        file: team,
        from: 'bit != 0; bit >>= 1',
        to: 'bit != 0; bit >>= 2',
      },
      {
        what: 'bins stay as they are',
        file: 'flexprefill/choice.cuh',
        from: 'clear(args.task.bins + head * kShareBins, kShareBins);',
        to: '{}',
      },
      {
        what: 'of few the wrong one is chosen',
        file: team,
        from: 'above < wanted.amount && above + bins.mass[i] >= wanted.amount',
        to: 'above + bins.mass[i] >= wanted.amount',
      },
      {
        what: 'a group begins with what others have left',
        file: 'flexprefill/choice.cuh',
        from: 'words[i] = 0;',
        to: 'words[i] += 0;',
      },
      {
        what: 'a distance misses the strip that begins in it',
        file: 'probe/lines_sm90.h',
        from: 'end < from + 128,',
        to: 'end < from,',
      },
      {
        what: 'a bin counts as a whole',
        file: 'flexprefill/choice.cuh',
        from: 'if ((above + fewest) / grain == (above + all) / grain)',
        to: 'if (true)',
      },
      {
        what: 'what lies in bins above does not count',
        file: 'flexprefill/choice.cuh',
        from: 'return above + static_cast<int64_t>(',
        to: 'return static_cast<int64_t>(',
      },
      {
        what: 'counts of lines stay as they are',
        file: 'flexprefill/choice.cuh',
        from: 'clear(args.line_bins + head * 2 * kShareBins, 2 * kShareBins);',
        to: 'clear(args.line_bins + head * 2 * kShareBins, kShareBins);',
      },
    ],
  },
  {
    name: 'flexprefill_decide',
    variants: { 'of heads': ['-Wall', '-Wextra', '-Werror'] },
    broken: 'of heads',
    faults: [
      {
        what: 'a head is decided on by all that arrive',
        file: decide,
        from: 'if (!memory.last) return;',
        to: '',
      },
      {
        what: 'arrivals are left',
        file: decide,
        from: 'if (memory.last) args.arrivals[head] = 0;',
        to: '',
      },
      {
        what: 'signals are left',
        file: decide,
        from: 'i < args.signal_count;',
        to: 'i + 1 < args.signal_count;',
      },
      {
        what: 'a band is that of the next tile',
        file: decide,
        from: 'far[nk - 2 - t]',
        to: 'far[nk - 1 - t]',
      },
      {
        what: 'near and far are the same',
        file: decide,
        from: 'exp2f(x.y - lse[0]) + exp2f(x.w - lse[1])',
        to: 'exp2f(x.x - lse[0]) + exp2f(x.z - lse[1])',
      },
      {
        what: 'parts of a sum that are none count',
        file: 'probe/stats_sm90.cuh',
        from: 'i + j < parts ?',
        to: 'true ?',
      },
      {
        what: 'parts of a sum are relative to other scores',
        file: 'probe/stats_sm90.cuh',
        from: 'exp2_approx(own.x - top)',
        to: 'exp2_approx(0 * own.x)',
      },
      {
        what: 'a step looks at what the first did',
        file: decide,
        from: 'if (step > 0) load(first);',
        to: '',
      },
      {
        what: 'all heads have the first keys',
        file: decide,
        from: '(kv_head * nk + t) * depth',
        to: 't * depth',
      },
      {
        what: 'one plane of a mean counts',
        file: decide,
        from: 'plane < kMeanPlanes;',
        to: 'plane < 1;',
      },
      {
        what: 'numbers that are none are not noticed',
        file: decide,
        from: 'sum - sum == 0)',
        to: 'true)',
      },
    ],
  },
  {
    name: 'linear_sm90',
    variants: {
      kBF16: ['-Wall', '-Wextra', '-Werror'],
      kF16: ['-Wall', '-Wextra', '-Werror', '-DHEDDLE_DTYPE=kF16'],
    },
    broken: 'kBF16',
    faults: [
      {
        what: 'a slice is loaded before the last one was used',
        file: linear,
        from: 'smem.empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'a slice is used before it arrived',
        file: linear,
        from: 'smem.full[turn.stage].wait(turn.parity);',
        to: '',
      },
      {
        what: 'a slice is given back while its product runs',
        file: linear,
        from: 'if (slice > 0) release(used - 1);',
        to: 'release(used);',
      },
      {
        what: 'one column too many is written',
        file: linear,
        from: 'const bool both = column + 1 < args.outputs;',
        to: 'const bool both = true;',
      },
      {
        what: 'the result of the last tile is added',
        file: linear,
        from: 'slice > 0 || k > 0);',
        to: 'used > 0 || k > 0);',
      },
      {
        what: 'fewer bytes are announced than arrive',
        file: linear,
        from: 'smem.x[0].kBytes + smem.weight[0].kBytes',
        to: 'smem.weight[0].kBytes',
      },
    ],
  },
  {
    name: 'lightning_portable',
    variants: { kBF16: [], kF16: ['-DHEDDLE_DTYPE=kF16'] },
    broken: 'kBF16',
    faults: [
      {
        what: 'a chunk is loaded over the one in use',
        file: plainScan,
        from: 'end - t0));\n    __syncthreads();',
        to: 'end - t0));',
      },
      {
        what: 'a chunk is used before it is there',
        file: plainScan,
        from: 'column) : 0;\n    __syncthreads();',
        to: 'column) : 0;',
      },
      {
        what: 'scores are used before they are there',
        file: plainScan,
        from: '= dot;\n    }\n    __syncthreads();',
        to: '= dot;\n    }',
      },
      {
        what: 'the state moves while others read it',
        file: plainScan,
        from: '__syncthreads();\n    for (int c = lane;',
        to: 'for (int c = lane;',
      },
      {
        what: 'a short chunk decays as a whole one',
        file: plainScan,
        from: 'float sum = powers[m] *',
        to: 'float sum = powers[p.chunk] *',
      },
      {
        what: 'heads that share a state have its gradient each',
        file: plainScan,
        from: '(!kReverse || head % (p.heads / p.heads_state) == 0)',
        to: 'true',
      },
    ],
  },
  {
    name: 'decode_sm90',
    variants: { kBF16: [], kF16: ['-DHEDDLE_DTYPE=kF16'] },
    broken: 'kBF16',
    faults: [
      {
        what: 'rows are used before they are there',
        file: decode90,
        from: 'skipped ? 0 : v;\n  }\n  __syncthreads();',
        to: 'skipped ? 0 : v;\n  }',
      },
      {
        what: 'sums of warps are added up before they are there',
        file: decode,
        from: 'own[3]};\n      __syncthreads();',
        to: 'own[3]};',
      },
      {
        what: 'who has no slot writes the first',
        file: decode90,
        from: 'if (!skipped) tile.store_vectors(state);',
        to: 'tile.store_vectors(state);',
      },
      {
        what: 'states are transposed',
        file: decode,
        from: 'by_row = kTransposed ? smem_v : smem_k,',
        to: 'by_row = kTransposed ? smem_k : smem_v,',
      },
      {
        what: 'heads have one slope',
        file: decode90,
        from: 'p.slopes[head * p.slopes_stride]',
        to: 'p.slopes[0]',
      },
    ],
  },
  {
    name: 'decode_portable',
    variants: { kBF16: [], kF16: ['-DHEDDLE_DTYPE=kF16'] },
    broken: 'kBF16',
    faults: [
      {
        what: 'rows are overwritten while they are used',
        file: plainDecode,
        from: '__syncthreads();\n      smem_q[thread] = q;',
        to: 'smem_q[thread] = q;',
      },
      {
        what: 'rows are used before they are there',
        file: plainDecode,
        from: 'skipped ? 0 : v;\n      __syncthreads();',
        to: 'skipped ? 0 : v;',
      },
      {
        what: 'each head of a state advances it',
        file: plainDecode,
        from: 'if (member == 0) {',
        to: '{',
      },
      {
        what: 'numbers behind the end of a row are written',
        file: plainDecode,
        from: 'if (j < count) at[j] = piece[j];',
        to: 'at[j] = piece[j];',
      },
    ],
  },
  {
    name: 'lightning_sm90',
    variants: Object.fromEntries(
      [
        ['kBF16', 64, 64],
        ['kBF16', 128, 64],
        ['kF16', 128, 128],
        ['kBF16', 192, 64],
        ['kBF16', 256, 64],
      ].map(([dtype, d, e]) => [
        `${dtype} d${d} e${e}`,
        [
          ...['-Wall', '-Wextra', '-Werror'],
          ...[`-DHEDDLE_DTYPE=${dtype}`, `-DHEDDLE_D=${d}`, `-DHEDDLE_E=${e}`],
        ],
      ]),
    ),
    broken: 'kBF16 d128 e64',
    faults: [
      {
        what: 'a chunk is loaded before the last one was used',
        file: scan,
        from: 'smem.empty[turn.stage].wait(turn.parity ^ 1);\n        Barrier& full = smem.full[turn.stage];\n        full.arrive_expect(2 *',
        to: 'Barrier& full = smem.full[turn.stage];\n        full.arrive_expect(2 *',
      },
      {
        what: 'scores are multiplied before q and k arrived',
        file: scan,
        from: 'smem.full[turn.stage].wait(turn.parity);\n      if (clears',
        to: 'if (clears',
      },
      {
        what: 'the image is overwritten while it is read',
        file: scan,
        from: 'named_barrier_sync(kImageEmpty, kConsumers);\n      store_pairs',
        to: 'named_barrier_arrive(kImageEmpty, kConsumers);\n      store_pairs',
      },
      {
        what: 'one of two warpgroups takes the image of the other',
        file: scan,
        from: 'named_barrier_sync(kImageFull + group, kConsumers);',
        to: 'named_barrier_sync(kImageFull, kConsumers);',
      },
      {
        what: 'the last chunk but one is taken for the last',
        file: scan,
        from: '!more : chunk + 1 == chunks',
        to: '!more : !more',
      },
      {
        what: 'the image is not fenced',
        file: scan,
        from: 'fence_async_smem();\n    named_barrier_arrive(kImageFull',
        to: 'named_barrier_arrive(kImageFull',
      },
      {
        what: 'out is copied before all have written it',
        file: scan,
        from: 'named_barrier_sync(kOut + chunk % 2, 160);',
        to: 'named_barrier_arrive(kOut + chunk % 2, 160);',
      },
      {
        what: 'a buffer of out is overwritten while the copying warp has it',
        file: scan,
        from: 'if (kCopier && chunk >= 2) named_barrier_sync(kCopied + chunk % 2, 160);',
        to: '',
      },
      {
        what: 'out is copied before it is seen there',
        file: scan,
        from: 'store_rows<kType>(staged, 0, acc_o, warp, lane);\n      fence_async_smem();',
        to: 'store_rows<kType>(staged, 0, acc_o, warp, lane);',
      },
      {
        what: 'a buffer of out is overwritten while it is copied',
        file: scan,
        from: 'copy_out(chunk);\n          // shared memory must outlive the copies that read it\n          wait_copies_read<0>();',
        to: 'copy_out(chunk);',
      },
      {
        what: 'scores are read before their product is done',
        file: scan,
        from: 'wgmma_wait<0>(acc_p);\n        pack_scores();',
        to: 'pack_scores();\n        wgmma_wait<0>(acc_p);',
      },
      {
        what: 'the last chunk decays as if it were whole',
        file: scan,
        from: 'if (last && tail != 0) {',
        to: 'if (false) {',
      },
      {
        what: 'a token is carried one step too far',
        file: scan,
        from: 'static_cast<float>(row + 8 * r + 1)',
        to: 'static_cast<float>(row + 8 * r)',
      },
      {
        what: 'the residue of the keys is dropped',
        file: scan,
        from: 'low - low_of(pair), high - high_of(pair)',
        to: '0, 0',
      },
      {
        what: 'summaries are combined in the wrong order',
        file: scan,
        from: 'place.slot - segments_before * place.distance',
        to: 'place.slot - (place.segment + 1 - segments_before) * place.distance',
      },
      {
        what: 'parts of a summary all decay as the last chunks do',
        file: scan,
        from: 'kChunk * distance(chunk)));',
        to: 'kChunk * chunk));',
      },
      {
        what: 'a summary counts as made before it is begun',
        file: scan,
        from: 'args.made[summary] = 0;',
        to: '',
      },
      {
        what: 'nobody learns that a summary is made',
        file: scan,
        from: 'if (threadIdx.x == 128) signal(args.made + summary);',
        to: '',
      },
      {
        what: 'parts of a summary that nobody made are added',
        file: scan,
        from: 'min(args.parts, in_sight(slope_log2, whole))',
        to: 'args.parts',
      },
      {
        what: 'a segment that can be seen in part is left out',
        file: scan,
        from: 'place.segment * whole) + whole - 1) / whole',
        to: 'place.segment * whole)) / whole',
      },
      {
        what: 'a segment looks one chunk less far back than it can see',
        file: scan,
        from: 'static_cast<int>(reach) + 1 : chunks',
        to: 'static_cast<int>(reach) : chunks',
      },
      {
        what: 'tokens of the next sequence are not silenced',
        file: scan,
        from: 'clear_rows(smem.k[turn.stage], tail, threadIdx.x - kStateThread, kConsumers - 128);',
        to: '',
      },
      {
        what: 'rows are silenced without a fence',
        file: scan,
        from: 'fence_async_smem();\n      named_barrier_arrive(kCleared',
        to: 'named_barrier_arrive(kCleared',
      },
      {
        what: 'tokens of the next sequence are read before they are silenced',
        file: scan,
        from: 'if (clears && chunk + 1 == chunks) named_barrier_sync(',
        to: 'if (clears && chunk + 1 == chunks) named_barrier_arrive(',
      },
      {
        what: 'a chunk is given back before its last product is done',
        file: scan,
        from: 'wgmma_wait<0>(acc_o);\n        release(turn.stage);',
        to: 'release(turn.stage);',
      },
      {
        what: 'rows of the next sequence are overwritten',
        file: scan,
        from: 'const bool by_threads = clears && last;',
        to: 'const bool by_threads = false;',
      },
    ],
  },
  {
    name: 'lightning_backward_sm90',
    variants: Object.fromEntries(
      [
        ['kBF16', 64],
        ['kF16', 64],
        ['kF16', 128],
        ['kBF16', 128],
      ].map(([dtype, size]) => [
        `${dtype} d${size}`,
        ['-Wall', '-Wextra', '-Werror', `-DHEDDLE_DTYPE=${dtype}`, `-DHEDDLE_SIZE=${size}`],
      ]),
    ),
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'queries are loaded before the last ones were used',
        file: sweep,
        from: 'smem.empty_q[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'keys are loaded over a gradient',
        file: sweep,
        from: 'smem.empty_k[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'the tile of a gradient is given back while it is copied',
        file: sweep,
        from: 'wait_copies_read<0>();\n      }\n      smem.empty_k',
        to: '}\n      smem.empty_k',
      },
      {
        what: 'a chunk is used before it arrived',
        file: sweep,
        from: 'smem.full[turn.stage].wait(turn.parity);\n    const Rows',
        to: 'const Rows',
      },
      {
        what: 'R takes a chunk before it arrived',
        file: sweep,
        from: 'smem.full[turn.stage].wait(turn.parity);\n    if (clears',
        to: 'if (clears',
      },
      {
        what: 'the image is read before it is complete',
        file: sweep,
        from: 'named_barrier_sync(kImageFull, kSweepers);',
        to: 'named_barrier_arrive(kImageFull, kSweepers);',
      },
      {
        what: 'the image is overwritten while it is read',
        file: sweep,
        from: 'named_barrier_sync(kImageEmpty, kSweepers);',
        to: 'named_barrier_arrive(kImageEmpty, kSweepers);',
      },
      {
        what: 'the image is not fenced',
        file: sweep,
        from: 'lowered());\n    fence_async_smem();',
        to: 'lowered());',
      },
      {
        what: 'a gradient is copied before all have written it',
        file: sweep,
        from: 'smem.written[i][stage].init(4);',
        to: 'smem.written[i][stage].init(1);',
      },
      {
        what: 'a gradient is copied before it is fenced',
        file: sweep,
        from: 'fence_async_smem();\n      if (clears',
        to: 'if (clears',
      },
      {
        what: 'scores are read before their product is done',
        file: sweep,
        from: 'wgmma_wait<0>(acc_p);\n      pack_scores();',
        to: 'pack_scores();\n      wgmma_wait<0>(acc_p);',
      },
      {
        what: 'R is read along its rows both times',
        file: sweep,
        from: 'if constexpr (kKeys)\n        wgmma',
        to: 'if constexpr (false)\n        wgmma',
      },
      {
        what: 'the shorter chunk decays as if it were whole',
        file: sweep,
        from: '(tail != 0 ? tail : kChunk)',
        to: 'kChunk',
      },
      {
        what: 'R decays before a token meets it',
        file: sweep,
        from: 'max(tokens - 1 - r, 0)',
        to: 'max(tokens - r, 0)',
      },
      {
        what: 'the diagonal is left out',
        file: sweep,
        from: 'i < kChunk - 1 ? 0',
        to: 'i < kChunk ? 0',
      },
      {
        what: 'the gradient of a shared state counts twice',
        file: sweep,
        from: 'args.initial_state && head % args.share_state == 0',
        to: 'args.initial_state',
      },
      {
        what: 'the last segment decays as if it were whole',
        file: sweep,
        from: 'min(args.segment, place.sequence_length - segment * args.segment)',
        to: 'args.segment',
      },
      {
        what: 'summaries are combined in the wrong order',
        file: sweep,
        from: '(segment - place.segment) * place.distance',
        to: '(last + 1 - segment) * place.distance',
      },
      {
        what: 'a summary leaves the scale out',
        file: scan,
        from: 'kReverse ? args.scale * lift',
        to: 'kReverse ? lift',
      },
      {
        what: 'the summary of a shorter segment reads its neighbour',
        file: scan,
        from: 'if (kReverse && distance(chunk) == ragged) {',
        to: 'if (false) {',
      },
      {
        what: 'tokens of the next sequence are not silenced',
        file: sweep,
        from: 'clear_rows(other, tail, thread, 128);',
        to: '',
      },
      {
        what: 'rows of the next sequence are overwritten',
        file: sweep,
        from: 'if (args.share_k == 1 && !(clears && visit == 0)) {',
        to: 'if (args.share_k == 1) {',
      },
      {
        what: 'a state starts without its transpose',
        file: 'lightning/backward_sm90.h',
        from: 'initial_strides[3],\n                             initial_strides[2]}',
        to: 'initial_strides[2],\n                             initial_strides[3]}',
      },
    ],
  },
  {
    name: 'fetch',
    variants: { pages: [] },
    broken: 'pages',
    faults: [
      {
        what: 'a page that is named twice comes twice',
        file: 'fetch/fetch.cuh',
        from: 'return atomicCAS(&x, from, to) == from;',
        to: 'return true;',
      },
      {
        what: 'copies go to the slot of the next',
        file: 'fetch/fetch.cuh',
        from: 'slot * units + at % units',
        to: '(slot + 1) % op.slots.shape[0] * units + at % units',
      },
    ],
  },
  {
    name: 'hip_sm80',
    // every size, the largest for keys nearby too, and keys that no fragment takes
    variants: Object.fromEntries(
      [
        ['HipMatrix<BF16, 64>', 'BF16'],
        ['HipMatrix<F16, 128>', 'F16'],
        ['HipMatrix<BF16, 256>', 'BF16'],
        ['HipPlain<F16>', 'F16'],
        ['HipPlain<float>', 'float'],
      ].map(([scorer, element]) => [
        scorer!.replace(/\W+/g, ' ').trim(),
        [`-DHEDDLE_SCORER=${scorer}`, `-DHEDDLE_ELEMENT=${element}`],
      ]),
    ),
    broken: 'HipMatrix BF16 256',
    faults: [
      {
        what: 'lanes go on before their warp has its keys',
        file: search,
        from: 'body(first + lane);\n    __syncwarp();',
        to: 'body(first + lane);',
      },
      {
        what: 'a warp goes on before its scores are there',
        file: search,
        from: 'order_of(best[i]));\n        }\n      }\n    }\n    __syncwarp();',
        to: 'order_of(best[i]));\n        }\n      }\n    }',
      },
      {
        what: 'queries are used before they are there',
        file: search,
        from: 'rows[1].w};\n    }\n    __syncthreads();',
        to: 'rows[1].w};\n    }',
      },
      {
        what: 'columns of a fragment are taken for rows',
        file: search,
        from: '{left.x, left.y, left.z, left.w}',
        to: '{left.x, left.z, left.y, left.w}',
      },
      {
        what: 'queries see keys of their windows',
        file: search,
        from: 'if (!all_see) hide(tile, first, group, acc);',
        to: '',
      },
      {
        what: 'a maximum misses half of the queries',
        file: search,
        from: '__shfl_xor_sync(~0u, given, mask)',
        to: 'given',
      },
      {
        what: 'scores of the list before stay',
        file: search,
        from: 'slot[i] = kNoOrder;',
        to: '',
      },
      {
        what: 'a list is chosen before peers are through with its keys',
        file: search,
        from: '__device__ void meet() const { __syncthreads(); }',
        to: '__device__ void meet() const {}',
      },
      {
        what: 'the next search finds lists taken',
        file: search,
        from: 'if (taken == args.tasks - 1) *args.queue = 0;',
        to: '',
      },
      {
        what: 'keys that stand nearby are read from afar',
        file: search,
        from: 'if (op_.near.data && ~slot)',
        to: 'if (false)',
      },
      {
        what: 'a choice is made among other scores',
        file: search,
        from: 'near[i] = slot[i]',
        to: 'near[i] = slot[0]',
      },
      {
        what: 'every member chooses',
        file: search,
        from: 'if (args.members > 1 && !arrives_last(args.arrivals + group, args.members)) continue;',
        to: '',
      },
      {
        what: 'heads of a descent take each other for themselves',
        file: step,
        from: 'own % 2 ? acc[3] : acc[2]',
        to: 'acc[2]',
      },
      {
        what: 'a chunk is that of half of the heads',
        file: step,
        from: 'other < 4 * step.heads',
        to: 'other < 2 * step.heads',
      },
      {
        what: 'scores of warps are joined before they are there',
        file: step,
        from: 'most[j];\n  }\n  __syncthreads();',
        to: 'most[j];\n  }',
      },
      {
        what: 'the next step finds who arrived at this one',
        file: step,
        from: 'args.arrivals[list] = 0;',
        to: ';',
      },
      {
        what: 'a choice goes on before all have counted',
        file: step,
        from: 'counts[turn][1][warp] = high;\n    __syncthreads();',
        to: 'counts[turn][1][warp] = high;',
      },
      {
        what: 'warps write their chunks over each other',
        file: step,
        from: 'before += totals[other];',
        to: ';',
      },
      {
        what: 'kv heads beyond the warps are left out',
        file: step,
        from: 'kv += step.spread',
        to: 'kv += step.kv_heads',
      },
    ],
  },
  {
    name: 'gather_sm80',
    variants: {
      'kF16 d128': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=128'],
      'kBF16 d64': [],
    },
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'keys are used before they arrived',
        file: gather,
        from: '__pipeline_wait_prior(0);\n    }',
        to: '}',
      },
      {
        what: 'the first of two tiles is used before it arrived',
        file: gather,
        from: '__pipeline_wait_prior(1);',
        to: '',
      },
      {
        what: 'keys are used before those of others arrived',
        file: gather,
        from: '// The tile is there for all, and nobody needs the one before it any more\n    __syncthreads();',
        to: '',
      },
      {
        what: 'keys of the list are seen in the window as well',
        file: gatherKeys,
        from: 'return n < listed ? t <= position - window :',
        to: 'return n < listed ? t <= position :',
      },
      {
        what: 'queries of a block see one window',
        file: gather,
        from: 'keys.sees(ahead + query[row], n0 + c, t)',
        to: 'keys.sees(keys.last, n0 + c, t)',
      },
      {
        what: 'masked values that are no numbers leak into rows',
        file: gather,
        from: 'poisoned = __reduce_or_sync(~0u, poisoned);',
        to: 'poisoned = 0;',
      },
      {
        what: 'masked values that are no numbers leak into rows of splits',
        file: gather,
        from: '__any_sync(~0u, poisoned)',
        to: 'false',
      },
      {
        what: 'rows are done again with keys that they do not see',
        file: gatherKeys,
        from: 'own >= 0 && keys.sees(position, n0 + lane, own)',
        to: 'own >= 0',
      },
      {
        what: 'columns of values are taken for rows',
        file: gather,
        from: 'load_matrices<true>(',
        to: 'load_matrices<false>(',
      },
      {
        what: 'shares of a list meet in a tile',
        file: gather,
        from: 'end = tiles * (split + 1) / splits',
        to: 'end = (tiles * (split + 1) + splits - 1) / splits',
      },
      {
        what: 'the last but one to arrive adds up',
        file: gather,
        from: ', 1) == splits - 1;',
        to: ', 1) == splits - 2;',
      },
      {
        what: 'counters stay',
        file: gather,
        from: 'args.arrivals[unit] = 0;',
        to: '',
      },
      {
        what: 'sums of different maxima are added as they are',
        file: gather,
        from: 'weight = exp2_approx(states[i].x - max);',
        to: 'weight = 1;',
      },
    ],
  },
  {
    name: 'gather_sm90',
    variants: {
      'kF16 d128': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=128'],
      'kBF16 d64': [],
    },
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'keys are loaded over those in use',
        file: gather90,
        from: 'smem.k_empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'values are loaded over those in use',
        file: gather90,
        from: 'smem.v_empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'keys are used before they arrived',
        file: gather90,
        from: 'smem.k_full[turn.stage].wait(turn.parity);',
        to: '',
      },
      {
        what: 'values are used before they arrived',
        file: gather90,
        from: 'smem.v_full[turn.stage].wait(turn.parity);',
        to: '',
      },
      {
        what: 'a lane gives back boxes that others still look at',
        file: gather90,
        from: '__syncwarp();  // all lanes',
        to: '// all lanes',
      },
      {
        what: 'barriers are used before their initialisation is seen',
        file: gather90,
        from: 'fence_barrier_init();',
        to: '',
      },
      {
        what: 'queries are used before they are seen',
        file: gather90,
        from: 'fence_async_smem();\n    sync();',
        to: 'sync();',
      },
      {
        what: 'scores are read before their product is done',
        file: gather90,
        from: 'wgmma_wait<0>(acc_s);',
        to: '',
      },
      {
        what: 'registers change without a fence before the product',
        file: gather90,
        from: 'wgmma_fence(acc_o);',
        to: '',
      },
      {
        what: 'boxes are used as if all rows saw them',
        file: gather90,
        from: 'whole = __all_sync(~0u, whole);',
        to: 'whole = true;',
      },
      {
        what: 'sink tokens end inside of a box',
        file: gatherKeys,
        from: 'sinks = (sinks + unit - 1) / unit * unit;',
        to: '',
      },
      {
        what: 'masked values that are no numbers leak into rows',
        file: gather90,
        from: 'left = __reduce_or_sync(~0u, poisoned)',
        to: 'left = 0',
      },
      {
        what: 'both warpgroups have the first head',
        file: gather90,
        from: 'const int head = unit.head + own;',
        to: 'const int head = unit.head;',
      },
    ],
  },
  {
    name: 'lines_sm90',
    variants: {
      'kF16 d128': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=128'],
      'kBF16 d64': [],
    },
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'keys are loaded over those in use',
        file: lines,
        from: 'smem.k_empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'keys are used before they arrived',
        file: lines,
        from: 'smem.k_full[turn.stage].wait(turn.parity);',
        to: '',
      },
      {
        what: 'a stage of another warpgroup is missed',
        file: lines,
        from: 'if (n > 0) pass(sets - 1);',
        to: '',
      },
      {
        what: 'queries are used before they arrived',
        file: lines,
        from: 'smem.q_full.wait(0);',
        to: '',
      },
      {
        what: 'a stage is never given back',
        file: lines,
        from: 'release();\n      body(n);',
        to: 'body(n);',
      },
      {
        what: 'barriers are used before their initialisation is seen',
        file: lines,
        from: 'fence_barrier_init();',
        to: '',
      },
      {
        what: 'registers change without a fence before the product',
        file: lines,
        from: 'wgmma_fence(acc);',
        to: '',
      },
      {
        what: 'scores are read before their product is done',
        file: lines,
        from: 'wgmma_wait<0>(acc);\n',
        to: '\n',
      },
      {
        what: 'a mass is that of another key',
        file: lines,
        from: 'square = i / 2 % 2;',
        to: 'square = i % 2;',
      },
      {
        what: 'queries see one key more',
        file: lines,
        from: '> ahead + query)',
        to: '> ahead + query + 1)',
      },
      {
        what: 'queries that are none count',
        file: lines,
        from: 'if (query >= sq || ',
        to: 'if (',
      },
      {
        what: 'both heads of a pair are its first',
        file: lines,
        from: '2 * item + own / 2 : item',
        to: '2 * item : item',
      },
      {
        what: 'a lane adds up what others have not written',
        file: lines,
        from: '__syncwarp();\n    // Half',
        to: '// Half',
      },
      {
        what: 'a diagonal loses what lies in the square before',
        file: lines,
        from: 'before[j] = diagonal[kDiagonals - kLineSquares][j];',
        to: '',
      },
      {
        what: 'the last diagonals are left out',
        file: lines,
        from: 'n < turns + kLineQueries / kLineKeys;',
        to: 'n < turns;',
      },
      {
        what: 'sums overflow',
        file: lines,
        from: 'first || __any_sync(~0u, fmaxf(highest[0], highest[1]) > kLag)',
        to: 'first',
      },
      {
        what: 'sums underflow',
        file: lines,
        from: 'first ? -3e38f : 0)',
        to: '0)',
      },
      {
        what: 'sums stay while what they are relative to moves',
        file: lines,
        from: 'first ? 0 : sum[n] * sm90::exp2_approx(-rise)',
        to: 'first ? 0 : sum[n]',
      },
      {
        what: 'a strip gets keys that are those of another',
        file: lines,
        from: '(set * kRuns + i) *',
        to: '(set * kRuns + i / 2 * 2) *',
      },
      {
        what: 'lanes keep what they know of a query',
        file: lines,
        from: 'quad_sum(sums.sum[i])',
        to: 'sums.sum[i]',
      },
      {
        what: 'a normaliser misses parts',
        file: lines,
        from: 'lse_of_parts(stats + thread, call.first.parts)',
        to: 'lse_of_parts(stats + thread, 1)',
      },
      {
        what: 'rows of the next block are added up',
        file: lines,
        from: 'i + a * step < rows ?',
        to: 'true ?',
      },
      {
        what: 'half of the rows are added up',
        file: lines,
        from: 'i < rows; i += kAhead * step',
        to: 'i < rows; i += 2 * kAhead * step',
      },
      {
        what: 'the blocks of one tensor are averaged',
        file: lines,
        from: 'for (const MeanArgs& args : means) {',
        to: 'for (const MeanArgs& args : {means[0]}) {',
      },
      {
        what: 'heads beside each other are one',
        file: lines,
        from: 'row * strides[beside ? 2 : 1]',
        to: 'row * strides[1]',
      },
      {
        what: 'blocks of one head in each group are waited for',
        file: lines,
        from: 'leads && i < own.group(); ++i)',
        to: 'leads && i < 1; ++i)',
      },
      {
        what: 'the second walk is for all heads',
        file: lines,
        from: '(left_out(0) && left_out(3))',
        to: 'false',
      },
      {
        what: 'a band begins a query late',
        file: lines,
        from: '> lane / 4;',
        to: '>= lane / 4;',
      },
      {
        what: 'bands of the lower queries are those of the upper ones',
        file: lines,
        from: 'diagonal = 2 * kFrom + n;',
        to: 'diagonal = 2 * kFrom;',
      },
      {
        what: 'bands are relative to something else',
        file: lines,
        from: 'log2_approx(mass) + (odd ? sums.top[1] : sums.top[0])',
        to: 'log2_approx(mass) + sums.top[0]',
      },
      {
        what: 'keys that are none get a mass',
        file: lines,
        from: 'lane % 4 < 2 && own_key < sk',
        to: 'lane % 4 < 2',
      },
      {
        what: 'a distance misses a strip',
        file: 'probe/lines_sm90.h',
        from: 'end < from + 128',
        to: 'end < from + 127',
      },
    ],
  },
  {
    name: 'rows_sm90',
    variants: {
      'kBF16 d64': [],
      'kF16 d128': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_D=128'],
      'kF16 d64 groups': ['-DHEDDLE_DTYPE=kF16', '-DHEDDLE_GROUPS=true'],
      'kBF16 d128 groups': ['-DHEDDLE_D=128', '-DHEDDLE_GROUPS=true'],
    },
    broken: 'kBF16 d64',
    faults: [
      {
        what: 'columns are loaded over those in use',
        file: rows90,
        from: 'smem.empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'rows are loaded over those in use',
        file: rows90,
        from: 'smem.q_empty.wait(Turn<1>(visit).parity ^ 1);',
        to: '',
      },
      {
        what: 'columns are used before they arrived',
        file: rows90,
        from: 'smem.full[turn.stage].wait(turn.parity);\n        named',
        to: 'named',
      },
      {
        what: 'a phase is used before it arrived',
        file: rows90,
        from: 'smem.full[turn.stage].wait(turn.parity);\n          issue',
        to: 'issue',
        variant: 'kF16 d64 groups',
      },
      {
        what: 'rows are used before they arrived',
        file: rows90,
        from: 'smem.q_full.wait(Turn<1>(visit).parity);',
        to: '',
      },
      {
        what: 'a phase is given back while it is multiplied',
        file: rows90,
        from: 'release(smem.empty[turn.before(1)]);\n        }',
        to: 'release(smem.empty[turn.stage]);\n        }',
        variant: 'kF16 d64 groups',
      },
      {
        what: 'scores are read before their product is done',
        file: rows90,
        from: 'issue(false);\n        wgmma_wait<0>(acc);',
        to: 'issue(false);',
      },
      {
        what: 'a group counts keys behind its block',
        file: rows90,
        from: 'cut_groups<kType>(args, tile, warp_row, column, lane, acc);',
        to: '{}',
        variant: 'kF16 d64 groups',
      },
      {
        what: 'phases replace each other',
        file: rows90,
        from: 'accumulates || d > 0',
        to: 'd > 0',
        variant: 'kF16 d64 groups',
      },
      {
        what: 'phases of queries are in the order of those of keys',
        file: rows90,
        from: 'plan.stride - 1 - phase, kRowsOfTile',
        to: 'phase, kRowsOfTile',
        variant: 'kF16 d64 groups',
      },
      {
        what: 'the last query of less than a stride is left out',
        file: rows90,
        from: 'last >= 0 && last < 64',
        to: 'false',
      },
      {
        what: 'that query is multiplied before it is seen',
        file: rows90,
        from: 'fence_async_smem();',
        to: '',
      },
      {
        what: 'rows see a column more',
        file: rows90,
        from: '>= end[i / 2 % 2]) acc',
        to: '> end[i / 2 % 2]) acc',
      },
      {
        what: 'sums overflow',
        file: rows90,
        from: 'if (!looks && !__all_sync',
        to: 'if (false && !__all_sync',
      },
      {
        what: 'sums stay while what they are relative to moves',
        file: rows90,
        from: 'sum[r] * sm90::exp2_approx(-rise)',
        to: 'sum[r]',
      },
      {
        what: 'who has seen nothing looks for nothing',
        file: rows90,
        from: 'looks = !__all_sync(~0u, sums.based())',
        to: 'looks = false',
      },
      {
        what: 'tiles are left out',
        file: rows90,
        from: 'n % 2 == 0 ? own : ctas - 1 - own',
        to: 'n % 2 == 0 ? own : ctas - own',
      },
      {
        what: 'scores stay while what they are relative to moves',
        file: rows90,
        from: 'x[i] -= rise',
        to: 'x[i] -= 0',
      },
      {
        what: 'a sum is taken for that of the other row',
        file: rows90,
        from: '(lane % 2 ? sums.base[1] : sums.base[0])',
        to: 'sums.base[0]',
      },
      {
        what: 'lanes keep what they know of a row',
        file: rows90,
        from: 'quad_sum(sums.sum[r])',
        to: 'sums.sum[r]',
      },
      {
        what: 'shares are added up before all is known',
        file: rows90,
        from: 'named_barrier_sync(kAll, 128 * kRowsWarpgroups);\n    constexpr',
        to: 'constexpr',
      },
      {
        what: 'blocks have one part each',
        file: rows90,
        from: 'each = plan.block_columns / plan.part;',
        to: 'each = 1;',
      },
      {
        what: 'rows of other blocks count',
        file: rows90,
        from: 'step < plan.block_rows / 4;',
        to: 'step < 32;',
      },
      {
        what: 'a row that is no number says something of all columns',
        file: rows90,
        from: 'column < end[y] ?',
        to: 'true ?',
      },
      {
        what: 'rows that are none count',
        file: rows90,
        from: 'own_row + i < plan.rows ?',
        to: 'own_row + i >= 0 ?',
      },
      {
        what: 'blocks behind a row of blocks are seen',
        file: rows90,
        from: 'first + i < visible ?',
        to: 'true ?',
      },
    ],
  },
  {
    name: 'pooled_sm90',
    variants: { d128: ['-DHEDDLE_D=128'], d64: [] },
    broken: 'd64',
    faults: [
      {
        what: 'means are loaded over those in use',
        file: pooled90,
        from: 'smem.empty[turn.stage].wait(turn.parity ^ 1);',
        to: '',
      },
      {
        what: 'rows are used before they arrived',
        file: pooled90,
        from: 'smem.full[turn.stage].wait(turn.parity);\n#pragma',
        to: '#pragma',
      },
      {
        what: 'columns are used before they arrived',
        file: pooled90,
        from: 'smem.full[turn.stage].wait(turn.parity);\n    take_turn();',
        to: 'take_turn();',
      },
      {
        what: 'the scores of the last tile are taken for those of all',
        file: pooled90,
        from: 'walk(tiles > 1,',
        to: 'walk(false,',
      },
      {
        what: 'the smallest of the planes count for nothing',
        file: pooled90,
        from: 'other < kMeanPlanes - plane;',
        to: 'other < kMeanPlanes - 1 - plane;',
      },
      {
        what: 'rows see a block more',
        file: pooled90,
        from: 'c < seen[i / 2 % 2] ?',
        to: 'c <= seen[i / 2 % 2] ?',
      },
      {
        what: 'sums stay while the largest score moves',
        file: pooled90,
        from: 'sum[below] *= sm90::exp2_approx(top[below] - next[below]);',
        to: '',
      },
      {
        what: 'lanes keep their sums to themselves',
        file: pooled90,
        from: 'quad_sum(sum[below]',
        to: '(sum[below]',
      },
      {
        what: 'a head that nobody asks for is there',
        file: pooled90,
        from: 'load_fresh(args.wanted + head) != 1',
        to: 'false',
      },
      {
        what: 'bins are added up before all have counted',
        file: pooled90,
        from: 'named_barrier_sync(1, 128 * groups);',
        to: '',
      },
    ],
  },
  {
    name: 'pooled',
    variants: {
      BF16: [],
      float: ['-DHEDDLE_ELEMENT=float'],
    },
    broken: 'BF16',
    faults: [
      {
        what: 'sums of a block are added up before they are there',
        file: pooled,
        from: '__syncthreads();\n  for (int e = static_cast<int>(threadIdx.x); e < args.depth',
        to: 'for (int e = static_cast<int>(threadIdx.x); e < args.depth',
      },
      {
        what: 'a shorter block is divided as if it were whole',
        file: pooled,
        from: 'sum / static_cast<float>(rows)',
        to: 'sum / static_cast<float>(args.block)',
      },
      {
        what: 'what is behind a mean is not zero',
        file: pooled,
        from: 'e < args.depth; e +=',
        to: 'e < d; e +=',
      },
      {
        what: 'means are used before they are there',
        file: pooled,
        from: 'columns, e0);\n      __syncthreads();',
        to: 'columns, e0);',
      },
      {
        what: 'rows see a block more',
        file: pooled,
        from: 'c < seen ? acc',
        to: 'c <= seen ? acc',
      },
      {
        what: 'sums stay while the largest score moves',
        file: pooled,
        from: 'sum[m][below] *= expf(top[m][below] - next);',
        to: '',
      },
      {
        what: 'bins begin with what products have left',
        file: pooled,
        from: 'bins[i] = 0;',
        to: '{}',
      },
      {
        what: 'what a number has beyond tf32 is left out',
        file: pooled,
        from: 'multiply_tf32(acc[m][n], high, y[n].low[i], y[n].low[i + 1]);',
        to: '',
      },
      {
        what: 'a row is that of one warp',
        file: pooled,
        from: 'w < kPooledWarps; ++w) total',
        to: 'w < 1; ++w) total',
      },
      {
        what: 'lanes keep their sums to themselves',
        file: pooled,
        from: 'quad_sum(sum[m][below]',
        to: '(sum[m][below]',
      },
    ],
  },
]

// Programs share two cores with each other, and a machine may be busy with more
const patience = 600_000

describe.concurrent.each(kernels)('$name', ({ name, variants, broken, faults }) => {
  const programOf = once((variant) =>
    program(name, `${name} ${variant}`.replace(/ /g, '-'), variants[variant]!),
  )
  const firstOf = once(async (variant) => verdict(await programOf(variant), 1))
  // Cases of a variant from the quickest on: most faults show in a quick one
  const casesOf = async (variant: string) => {
    const [, cases] = (await firstOf(variant)).split('quickest first: ')
    return cases?.trim().split(' ')
  }

  it.each(Object.keys(variants))(
    '%s is right under any schedule',
    async (variant) => {
      expect(await firstOf(variant)).toMatch(/^ok: error/)
      const file = await programOf(variant)
      for (const seed of [2, 3]) expect(await verdict(file, seed)).toMatch(/^ok: error/)
    },
    patience,
  )

  it.each(faults)(
    'notices when $what',
    async (fault) => {
      const source = readFileSync(join(root, 'cuda', fault.file), 'utf8')
      expect(source.split(fault.from), 'places to break').toHaveLength(2)
      const front = join(folder, `${name}-fault-${faults.indexOf(fault)}`)
      rmSync(front, { recursive: true, force: true })
      const copy = join(front, fault.file)
      mkdirSync(dirname(copy), { recursive: true })
      writeFileSync(copy, source.replace(fault.from, fault.to))
      const variant = fault.variant ?? broken
      const file = await program(
        name,
        `${name}-fault-${faults.indexOf(fault)}/program`,
        [...variants[variant]!, '-w', '-Wno-error'],
        [front],
        fault.file === list,
      )
      const cases = await casesOf(variant)
      const verdicts: string[] = []
      for (let seed = 1; seed <= 64 && !verdicts.at(-1)?.startsWith('caught'); seed++)
        verdicts.push(await verdict(file, seed, cases))
      expect(verdicts.at(-1)).toMatch(/^caught: (fault|wrong): /)
    },
    patience,
  )
})

it('the matrix instructions are those that their generator writes', () => {
  const written = execFileSync(process.execPath, ['cuda/common/generate-wgmma.mjs'], { cwd: root })
  expect(written.toString()).toBe(readFileSync(join(root, 'cuda/common/wgmma.cuh'), 'utf8'))
})
