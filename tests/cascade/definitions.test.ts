import * as heddle from 'heddle'
import { attention, cascade, lightning, merge } from 'heddle'
import { describe, expect, it } from 'vitest'
import { largest, maxError } from '../support/compare.js'
import { describeDevices } from '../support/devices.js'
import { random, sample } from '../support/random.js'

const definitions = Object.entries(heddle as Record<string, unknown>).filter(
  (one): one is [string, string] => one[0].endsWith('Definition') && typeof one[1] === 'string',
)

// The most passes over each rank, as the text stands and after the rewrites that lead to fewer
const rows = {
  attentionDefinition: [{ M: 3, P: 1, E: 1, F: 1 }, ['defer-division', 'iterate-max'], { M: 1 }],
  lightningDefinition: [{ T: 1, E: 1, F: 1 }, [], {}],
  mergeDefinition: [{ P: 1, F: 1 }, [], {}],
} as const satisfies Record<string, readonly [object, readonly string[], object]>

describe('definitions', () => {
  it.each(definitions)('%s parses, prints what parses back, and analyses', (_, text) => {
    const parsed = cascade(text)
    expect(cascade(parsed.toString()).toString()).toBe(parsed.toString())
    const { passes, fusionGroups } = parsed.analyze()
    expect(Object.keys(passes).length).toBeGreaterThan(0)
    expect(fusionGroups.flat()).toEqual(expect.arrayContaining([...parsed.ir.outputs]))
  })

  it.each(Object.entries(rows))(
    '%s takes the passes that it should',
    (name, [passes, rules, end]) => {
      let text = definitions.find(([other]) => other === name)![1]
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

// One head in float32: what the operators compute is what their texts say
describeDevices('definitions', (device) => {
  const rng = random(64)
  const close = (actual: ArrayLike<number>, expected: ArrayLike<number>) =>
    expect(maxError(actual, expected)).toBeLessThanOrEqual(1e-5 * Math.max(1, largest(expected)))
  const draw = (s: number, d: number) => sample(rng, [1, s, 1, d], 'float32', device)
  const dense = ({ values }: { values: Float32Array }, s: number, d: number) => ({
    data: values,
    shape: [s, d],
  })

  it('attention', async () => {
    for (const [sq, sk] of [
      [1, 1],
      [5, 9],
      [9, 5],
      [63, 65],
    ] as const) {
      const [q, k, v] = [await draw(sq, 8), await draw(sk, 8), await draw(sk, 16)]
      const { O, LSE } = cascade(heddle.attentionDefinition).evaluate(
        { Q: dense(q, sq, 8), K: dense(k, sk, 8), V: dense(v, sk, 16) },
        { scale: 0.4, off: sk - sq },
      )
      const { out, lse } = attention(q.tensor, k.tensor, v.tensor, { causal: true, scale: 0.4 })
      close((await out.read()) as Float32Array, O!.data)
      close(await lse.read(), LSE!.data)
    }
  })

  it('merge', async () => {
    const [a, b] = [await draw(7, 8), await draw(7, 8)]
    const [LA, LB] = [rng.normals(7), rng.normals(7)]
    LA[2] = LB[3] = LB[4] = LA[4] = Number.NEGATIVE_INFINITY
    const { O, L } = cascade(heddle.mergeDefinition).evaluate({
      A: dense(a, 7, 8),
      B: dense(b, 7, 8),
      LA: { data: LA, shape: [7] },
      LB: { data: LB, shape: [7] },
    })
    const { out, lse } = merge(
      [
        [a, LA],
        [b, LB],
      ].map(([x, l]) => ({
        out: (x as typeof a).tensor,
        lse: heddle.tensor(l as Float32Array, [1, 1, 7], { device }),
      })),
    )
    close((await out.read()) as Float32Array, O!.data)
    close(await lse.read(), L!.data)
  })

  it('lightning', async () => {
    const [t, e, f] = [70, 5, 6]
    const [q, k, v] = [await draw(t, e), await draw(t, e), await draw(t, f)]
    const S0 = rng.normals(e * f)
    const { O } = cascade(heddle.lightningDefinition).evaluate(
      {
        Q: dense(q, t, e),
        K: dense(k, t, e),
        V: dense(v, t, f),
        S0: { data: S0, shape: [e, f] },
      },
      { slope: Math.fround(0.3), scale: 0.5 },
    )
    const { out } = lightning(q.tensor, k.tensor, v.tensor, {
      slopes: [0.3],
      scale: 0.5,
      initialState: heddle.tensor(S0, [1, 1, e, f], { device }),
    })
    close((await out.read()) as Float32Array, O!.data)
  })
})
