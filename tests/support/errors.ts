import { HeddleError } from 'heddle'

const codes: ReadonlySet<string> = new Set([
  'ERR_SHAPE',
  'ERR_DTYPE',
  'ERR_DEVICE',
  'ERR_ARGUMENT',
  'ERR_UNSUPPORTED',
  'ERR_DISPOSED',
  'ERR_MEMORY',
  'ERR_CUDA',
])

// The sentences that follow the operator's name; a reason in brackets and a remedy behind a semicolon may end each
const sentences: readonly RegExp[] = [
  /^(the )?[\w.[\]]+( and \w+| size)? must (not )?\S.*, got \S/s,
  /^[\w.[\]]+ must (have|be|not be|start) \S.*; \S/s,
  /^\w+ must be given (for|with|together)/,
  /^\w+ and \w+ must be given together$/,
  /^\w+ must be \d+ with \w+, got /,
  /^\w+ cannot be combined with \w+$/,
  /^\w+ goes with /,
  /^[\w.[\]]+ is missing$/,
  /^\w+ is on (cpu|cuda:\d+), but \w+ is on (cpu|cuda:\d+); move it with \w+\.to\('[a-z:\d]+'\)$/,
  /^mask is on (cpu|cuda:\d+), but \w+ is on (cpu|cuda:\d+); make it with device: '[a-z:\d]+'$/,
  /^unknown (option|size|scalar) ".*"(; did you mean "\w+"\?)?$/s,
  /^shape \[.*\] has more bytes than can be addressed$/,
  /^shape \[.*\] would need a copy \(.*\); call contiguous\(\) first$/,
  /^no kernel takes this call on sm_\d+ \(.*\)$/,
  /^cannot allocate \d+ (pinned )?bytes (on (cpu|cuda:\d+), where \d+ (pinned )?bytes are in use; dispose tensors|of host memory)/,
  /^ran out of host memory$/,
  /^device cuda:\d+ cannot be used: \S.*; \S/,
  /^this (tensor|graph) was disposed$/,
]

/** What is wrong with an error of the library: its class, its code, or the grammar of its message. */
export function faultOf(error: unknown): string | undefined {
  if (!(error instanceof HeddleError)) {
    const text = error instanceof Error ? `${error.stack}` : typeof error
    return `no HeddleError was thrown but ${text}`
  }
  const { message, op, code, argument } = error
  const shown = JSON.stringify(message)
  if (!codes.has(code)) return `${code} is no code: ${shown}`
  if (!/^[a-z][A-Za-z.]*$/.test(op)) return `${JSON.stringify(op)} is no operator: ${shown}`
  if (!message.startsWith(`${op}: `)) return `the message does not start with ${op}: ${shown}`
  const text = message.slice(op.length + 2)
  if (!sentences.some((sentence) => sentence.test(text))) return `the sentence is unknown: ${shown}`
  if (/[.\s]$/.test(text)) return `the message ends in a stop: ${shown}`
  if (message.length > 600) return `the message has ${message.length} characters: ${shown}`
  if (/\[object|-nan|\bnan\b/.test(text)) return `a value is spelled badly: ${shown}`
  if (argument && code === 'ERR_ARGUMENT' && !/^unknown/.test(text) && !text.includes(argument))
    return `the message does not name ${argument}: ${shown}`
  return undefined
}
