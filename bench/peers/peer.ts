/** Another library's way to run a problem. */
export interface Peer {
  name: string
  /** Runs it so many times and says how many milliseconds one took. */
  round(times: number): Promise<number>
}
