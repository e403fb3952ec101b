/**
 * Chance that can be repeated: the same seed gives the same numbers on every machine.
 */

/** A source of chance; every method takes the next number of the sequence. */
export interface Random {
  /** A number from 0 up to, but not, 1. */
  fraction(): number;
  /** A whole number from `min` to `max`, both included. */
  between(min: number, max: number): number;
  /** One of the items. Throws when there is none. */
  pick<T>(items: readonly T[]): T;
  /** True with this probability. */
  chance(probability: number): boolean;
}

/** Numbers by mulberry32, a generator of 32 bits of state that is in the public domain. */
export function createRandom(seed: number): Random {
  let state = seed >>> 0;
  const fraction = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
  const between = (min: number, max: number) => min + Math.floor(fraction() * (max - min + 1));
  return {
    fraction,
    between,
    pick: (items) => {
      if (items.length === 0) throw new Error("Cannot pick: there is nothing to pick from");
      return items[between(0, items.length - 1)] as (typeof items)[number];
    },
    chance: (probability) => fraction() < probability,
  };
}
