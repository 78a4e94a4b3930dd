import { cascade, definitions } from 'heddle'
import { describe, expect, it } from 'vitest'

// The most passes over each rank, as the text stands and after the rewrites that lead to fewer
const rows = {
  attention: [{ M: 3, P: 1, E: 1, F: 1 }, ['defer-division', 'iterate-max'], { M: 1 }],
  lightning: [{ T: 1, E: 1, F: 1 }, [], {}],
  merge: [{ P: 1, F: 1 }, [], {}],
} as const satisfies Record<string, readonly [object, readonly string[], object]>

describe('definitions', () => {
  it.each(Object.entries(definitions))(
    '%s parses, prints what parses back, and analyses',
    (_, text) => {
      const parsed = cascade(text)
      expect(cascade(parsed.toString()).toString()).toBe(parsed.toString())
      const { passes, fusionGroups } = parsed.analyze()
      expect(Object.keys(passes).length).toBeGreaterThan(0)
      expect(fusionGroups.flat()).toEqual(expect.arrayContaining([...parsed.ir.outputs]))
    },
  )

  it.each(Object.entries(rows))(
    '%s takes the passes that it should',
    (name, [passes, rules, end]) => {
      let text: string = definitions[name as keyof typeof definitions]
      const headlines = () =>
        Object.fromEntries(
          Object.entries(cascade(text).analyze().passes).map(([rank, { headline }]) => [
            rank,
            headline,
          ]),
        )
      expect(headlines()).toEqual(passes)
      for (const rule of rules)
        text = cascade(text)
          .analyze()
          .suggestions.find((one) => one.rule === rule)!.rewritten
      expect(headlines()).toMatchObject(end)
    },
  )
})
