/** The middle server burns, with the real scripts over seeds: nothing missing, twice only within the bound, no name twice. */
import { expect, test } from "bun:test";
import { formatVerdict, isFine, runWipe } from "./wipe.ts";

/** More by `bun run test/wipe.ts --from 1 --seeds 50`. */
const SEEDS = [4, 6];

test.each(SEEDS)(
  "seed %d: three hosts, two receivers, rotations and gzip, a client that is away, and the folder is gone at any moment",
  async (seed) => {
    const verdict = await runWipe(seed, { steps: 8 });
    if (!isFine(verdict)) throw new Error(formatVerdict(verdict));
    expect(verdict.wipes).toBeGreaterThan(0);
    expect(verdict.written).toBeGreaterThan(1000);
  },
  120_000,
);
