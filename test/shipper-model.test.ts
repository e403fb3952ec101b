/** The shipper's passes against a model of what must arrive, over seeded actions on files; see model.ts. */
import { expect, test } from "bun:test";
import { type Action, runActions, runSeeds } from "./model.ts";

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

test("a file that is cut below the place where its stream begins is settled once", async () => {
  const failure = await runActions([
    { name: "burst", n: 511_309 },
    { name: "sedInPlace", n: 882_355 },
    { name: "forget", n: 955_265 },
    { name: "away", n: 0 },
    { name: "write", n: 850_341 },
    { name: "link", n: 817_247 },
    { name: "write", n: 720_312 },
    { name: "write", n: 147_553 },
    { name: "sedInPlace", n: 774_987 },
    { name: "cutTail", n: 872_027 },
  ]);
  expect(failure).toBeUndefined();
});

test("a copy of a part of a log stays known when the log has gone on, was rotated and removed", async () => {
  const grown = Array.from({ length: 40 }, (): Action[] => [
    { name: "burst", n: 199 },
    { name: "ship", n: 0 },
  ]).flat();
  const gone = Array.from({ length: 8 }, (): Action => ({ name: "wait", n: 7 }));
  const failure = await runActions([
    { name: "writeSibling", n: 0 },
    { name: "burst", n: 0 },
    { name: "copyOverSibling", n: 0 },
    ...grown,
    { name: "rotate", n: 0 },
    { name: "write", n: 3 },
    { name: "releaseOld", n: 0 },
    ...gone,
    { name: "remove", n: 0 },
    ...gone,
  ]);
  expect(failure).toBeUndefined();
});

test("without a cursor, beside a receiver that knows nothing, killed and copied: an empty file has no name yet", async () => {
  const failure = await runActions([
    { name: "loseState", n: 375_731 },
    { name: "write", n: 578_333 },
    { name: "ship", n: 490_563 },
    { name: "copytruncateWithHole", n: 578_677 },
    { name: "kill", n: 349_307 },
  ]);
  expect(failure).toBeUndefined();
});

test("an archive of an empty file that vanishes while it is open loses nothing", async () => {
  const failure = await runActions([
    { name: "swapRotated", n: 874_708 },
    { name: "copytruncate", n: 808_426 },
    { name: "lateGzip", n: 830_719 },
    { name: "loseState", n: 565_234 },
    { name: "remove", n: 382_768 },
  ]);
  expect(failure).toBeUndefined();
});

test("what may be in an archive that is not complete yet is not told as lost", async () => {
  const failure = await runActions([
    { name: "write", n: 3 },
    { name: "ship", n: 0 },
    { name: "away", n: 0 },
    { name: "write", n: 3 },
    { name: "ship", n: 0 },
    { name: "restart", n: 0 },
    { name: "rotate", n: 0 },
    { name: "releaseOld", n: 0 },
    { name: "here", n: 0 },
    { name: "lateGzip", n: 0 },
    { name: "wait", n: 2 },
  ]);
  expect(failure).toBeUndefined();
});
