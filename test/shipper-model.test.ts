/** The shipper's passes against a model of what must arrive, over seeded actions on files; see model.ts. */
import { expect, test } from "bun:test";
import { runSeeds } from "./model.ts";

const SEEDS = 300;
const LIMIT_MS = 60_000;
/** So many at least, however slow the machine is. */
const ENOUGH = 50;

test(`every line arrives once over ${SEEDS} seeds of writing, rotating, copying, compressing and killing`, async () => {
  const started = Date.now();
  let { ran, failure } = await runSeeds(1, SEEDS, started + LIMIT_MS);
  if (failure === undefined && ran < ENOUGH) {
    const rest = await runSeeds(1 + ran, ENOUGH - ran);
    ran += rest.ran;
    failure = rest.failure;
  }
  expect(failure).toBeUndefined();
  expect(ran).toBeGreaterThanOrEqual(ENOUGH);
}, 240_000);
