import { spawnSync } from 'node:child_process'
import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import ts from 'typescript'
import { afterAll, describe, expect, it } from 'vitest'

// Every example of the documentation is compiled against the public types and run.

const root = join(__dirname, '../..')
const folder = mkdtempSync(join(root, 'build', 'examples-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

function sources(directory: string): string[] {
  return readdirSync(directory, { withFileTypes: true }).flatMap((entry) => {
    const path = join(directory, entry.name)
    return entry.isDirectory() ? sources(path) : entry.name.endsWith('.ts') ? [path] : []
  })
}

function examplesOf(path: string): string[] {
  const text = readFileSync(path, 'utf8')
  if (path.endsWith('.md'))
    return [...text.matchAll(/```ts\n([\s\S]*?)```/g)].map((match) => match[1]!)
  return [...text.matchAll(/\/\*\*([\s\S]*?)\*\//g)]
    .map((match) => match[1]!.replace(/^\s*\* ?/gm, ''))
    .flatMap((comment) => comment.split('@example').slice(1))
    .map((example) => example.split(/^@\w+/m)[0]!.replace(/^\s*```\w*$/gm, ''))
}

const guides = join(root, 'docs/guides')
const pages = readdirSync(guides).map((page) => join(guides, page))
const examples = [...sources(join(root, 'lib')), join(root, 'README.md'), ...pages].flatMap(
  (path) => examplesOf(path).map((code, i) => ({ name: `${relative(root, path)} ${i + 1}`, code })),
)

it('nothing internal is exported', () => {
  const index = join(root, 'dist/index.d.ts')
  const options = { module: ts.ModuleKind.Node16, skipLibCheck: true, types: ['node'] }
  const program = ts.createProgram([index], options)
  const checker = program.getTypeChecker()
  const exported = checker.getExportsOfModule(
    checker.getSymbolAtLocation(program.getSourceFile(index)!)!,
  )
  expect(exported.length).toBeGreaterThan(50)
  const internal = exported.filter((one) => {
    const own = one.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(one) : one
    return own.getJsDocTags(checker).some(({ name }) => name === 'internal')
  })
  expect(internal.map(({ name }) => name)).toEqual([])
})

describe('examples', () => {
  it('there are some', () => {
    expect(examples.length).toBeGreaterThan(15)
  })

  it('compile against the public types', () => {
    const files = examples.map(({ code }, i) => {
      const file = join(folder, `${i}.mts`)
      const complete = code.includes("from 'heddle'") ? code : `${code}\nexport {}`
      writeFileSync(file, complete)
      return file
    })
    const program = ts.createProgram(files, {
      module: ts.ModuleKind.Node16,
      target: ts.ScriptTarget.ES2022,
      lib: ['lib.es2023.d.ts', 'lib.esnext.disposable.d.ts'],
      types: ['node'],
      strict: true,
      exactOptionalPropertyTypes: true,
      noUncheckedIndexedAccess: true,
      noEmit: true,
      skipLibCheck: true,
    })
    const problems = ts.getPreEmitDiagnostics(program).map((problem) => {
      const at = problem.file
        ? examples[Number(/(\d+)\.mts$/.exec(problem.file.fileName)?.[1])]?.name
        : ''
      return `${at}: ${ts.flattenDiagnosticMessageText(problem.messageText, ' ')}`
    })
    expect(problems).toEqual([])
  })

  it.each(examples)('$name runs', ({ code }) => {
    const script = ts.transpile(code, {
      module: ts.ModuleKind.ESNext,
      target: ts.ScriptTarget.ES2022,
    })
    const file = join(folder, `run-${Math.random().toString(36).slice(2)}.mjs`)
    // what a snippet takes from the text around it
    const context = code.includes("from 'heddle'")
      ? ''
      : "import * as heddle from 'heddle'\nObject.assign(globalThis, heddle)\nconst [q, k, v] = [1, 2, 3].map((seed) => heddle.randn([1, 16, 2, 16], { seed }))\n"
    writeFileSync(file, context + script)
    const { status, stderr } = spawnSync(process.execPath, [file], { encoding: 'utf8', cwd: root })
    expect(stderr).toBe('')
    expect(status).toBe(0)
  })
})
