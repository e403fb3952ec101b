/**
 * The store under random interleavings: chunks that overtake each other, come again or never, checkpoints, seals, and
 * power cuts. The folder as it stands at a cut is copied, and another store goes on with the copy.
 */
import { describe, expect, test } from "bun:test";
import { cp, mkdir, readdir, readFile, rm } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import { parseBatchName } from "../lib/batch.ts";
import { formatMark, MARK_BYTES } from "../lib/chunk.ts";
import type { Chunk } from "../lib/store/sender.ts";
import { Store } from "../lib/store/store.ts";
import { createWindowFinder } from "../lib/store/window.ts";
import { linesOfWindows, quiet, storedWindows } from "./sending.ts";
import { tempFolder } from "./support.ts";

const START = Date.parse("2026-11-22T06:00:00+06:00");
const HOSTS = ["10.0.0.1", "web-2.example"];
const STREAM = "stream-0001";
const LINES = 240;
const TEXT = Buffer.from(linesOfWindows(LINES));
/** Offset of each line's first byte, and the text's end. */
const STARTS = [0];
for (let at = TEXT.indexOf(10); at >= 0; at = TEXT.indexOf(10, at + 1)) STARTS.push(at + 1);

function markAt(offset: number): string {
  return formatMark(TEXT.subarray(Math.max(0, offset - MARK_BYTES), offset));
}

/** The lines `[from, to)` as a chunk. */
function chunkOf(host: string, from: number, to: number): Chunk {
  const [offset = 0, end = 0] = [STARTS[from], STARTS[to]];
  return {
    ...{
      host,
      stream: STREAM,
      offset,
      end,
      body: TEXT.subarray(offset, end),
      mark: markAt(end),
      peer: "127.0.0.1",
    },
    ...(offset === 0 ? { begin: "new" } : { from: markAt(offset) }),
  } as Chunk;
}

interface World {
  store: Store;
  dir: string;
  now: number;
  /** What was answered, by host: an offset that must never be taken back. */
  acknowledged: Map<string, number>;
}

async function openStore(dir: string, world: Pick<World, "now">): Promise<Store> {
  const store = new Store({
    ...{ dir, prefix: "accessLog", windowMinutes: 20, sealAfterSeconds: 120, sealLatestSeconds: 900 },
    ...{ forgetAfterDays: 30, maxHosts: 100, maxStreamsPerHost: 100, maxWindowsPerHost: 100 },
    ...{ maxNamesPerHour: 100_000, findWindow: createWindowFinder(20), log: quiet, now: () => world.now },
  });
  await store.start(() => true);
  return store;
}

async function createWorld(): Promise<World> {
  const world = { dir: await tempFolder(), now: START, acknowledged: new Map<string, number>() };
  return Object.assign(world, { store: await openStore(world.dir, world) });
}

/** Sends some chunks at once; whatever comes back is noted. */
async function send(world: World, host: string, ranges: [number, number][]): Promise<void> {
  await Promise.all(
    ranges.map(async ([from, to]) => {
      const chunk = chunkOf(host, from, to);
      const { kind, offset, mark } = await world.store.commit(chunk);
      if (kind === "unknown") return;
      if (kind === "stored") expect(offset).toBe(chunk.end as number);
      expect(mark ?? markAt(offset)).toBe(markAt(offset));
      expect(STARTS).toContain(offset);
      world.acknowledged.set(host, Math.max(offset, world.acknowledged.get(host) ?? 0));
    }),
  );
}

/** A power cut: the folder as it stands, and a new process. */
async function cut(world: World): Promise<void> {
  const dir = join(await tempFolder(), "data");
  await cp(world.dir, dir, { recursive: true });
  await world.store.close();
  world.dir = dir;
  world.store = await openStore(dir, world);
}

/** What was answered is there; nothing that was answered is taken back. */
async function checkOffsets(world: World): Promise<void> {
  for (const [host, offset] of world.acknowledged) {
    const [status] = await world.store.streams(host, [STREAM], {}, "127.0.0.1");
    expect(status).toMatchObject({ offset, mark: markAt(offset) });
  }
}

const line = fc.integer({ min: 0, max: LINES - 1 });
const host = fc.constantFrom(...HOSTS);
/** From the committed offset on: so many lines a chunk, in an order of any kind, some twice, some never. */
const burst = fc.record({
  kind: fc.constant("burst" as const),
  host,
  sizes: fc.array(fc.integer({ min: 1, max: 40 }), { minLength: 1, maxLength: 4 }),
  order: fc.array(fc.nat({ max: 3 }), { minLength: 1, maxLength: 6 }),
});
const stray = fc.record({
  kind: fc.constant("stray" as const),
  host,
  from: line,
  size: fc.integer({ min: 1, max: 20 }),
});
const step = fc.oneof(
  { weight: 6, arbitrary: burst },
  { weight: 1, arbitrary: stray },
  {
    weight: 2,
    arbitrary: fc.record({ kind: fc.constant("seal" as const), seconds: fc.constantFrom(0, 3, 130, 3600) }),
  },
  { weight: 2, arbitrary: fc.constant({ kind: "cut" as const }) },
  { weight: 1, arbitrary: fc.constant({ kind: "restart" as const }) },
);
type Step = typeof step extends fc.Arbitrary<infer T> ? T : never;

async function take(world: World, step: Step): Promise<void> {
  if (step.kind === "seal") {
    world.now += step.seconds * 1000;
    await world.store.seal();
  } else if (step.kind === "cut") await cut(world);
  else if (step.kind === "restart") {
    await world.store.close();
    world.store = await openStore(world.dir, world);
  } else if (step.kind === "stray") {
    const known = world.acknowledged.get(step.host);
    const end = STARTS[Math.min(LINES, step.from + step.size)] ?? 0;
    // One far ahead would wait for its time; what begins before the committed offset is a repeat.
    if (known !== undefined && end <= known)
      await send(world, step.host, [[step.from, Math.min(LINES, step.from + step.size)]]);
  } else {
    const ranges: [number, number][] = [];
    let at = STARTS.indexOf(world.acknowledged.get(step.host) ?? 0);
    for (const size of step.sizes) {
      const to = Math.min(LINES, at + size);
      if (to > at) ranges.push([at, to]);
      at = to;
    }
    const isFirst = !world.acknowledged.has(step.host);
    if (isFirst) ranges.splice(1); // a stream's first chunk travels alone
    // All up to the last that is sent, so that none waits two seconds for one that never comes.
    const picked = step.order.map((n) => n % Math.max(1, ranges.length));
    const last = Math.max(...picked);
    const order = [...new Set([...picked, ...ranges.keys()])].filter((n) => n <= last);
    await send(
      world,
      step.host,
      [...order, ...picked].map((n) => ranges[n]).filter((range) => range !== undefined),
    );
  }
}

async function storedText(dir: string, host: string): Promise<string> {
  const windows = await storedWindows(dir, host);
  return [...windows]
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([, text]) => text)
    .join("");
}

describe("the store", () => {
  test("keeps every line once and in order, whatever overtakes, repeats, and is cut", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(step, { minLength: 3, maxLength: 14 }), async (steps) => {
        const world = await createWorld();
        for (const one of steps) {
          await take(world, one);
          await checkOffsets(world);
        }
        for (const [host, offset] of world.acknowledged) {
          expect(await storedText(world.dir, host)).toBe(TEXT.subarray(0, offset).toString());
        }
        world.now += 7_200_000;
        await world.store.seal();
        await world.store.close();
        for (const [host, offset] of world.acknowledged) {
          expect(await storedText(world.dir, host)).toBe(TEXT.subarray(0, offset).toString());
          const names = await readdir(join(world.dir, host));
          expect(names.filter((name) => parseBatchName(name)?.state === "open")).toEqual([]);
        }
        expect((await readdir(world.dir)).filter((name) => /^\.journal-/.test(name))).toEqual([]);
      }),
      { numRuns: Number(process.env.LOG_RT_SYNC_RUNS ?? 40) },
    );
  }, 120_000);

  test("replays a journal twice as once", async () => {
    const world = await createWorld();
    await send(world, "10.0.0.1", [[0, 50]]);
    await send(world, "10.0.0.1", [[50, LINES]]);
    const first = join(await tempFolder(), "data");
    await cp(world.dir, first, { recursive: true });
    const journals = (await readdir(first)).filter((name) => name.startsWith(".journal-"));
    const store = await openStore(first, world);
    // The ledgers and parts are written, the journal is there still: as if the replay had been cut at its end.
    const second = join(await tempFolder(), "data");
    await cp(first, second, { recursive: true });
    for (const name of journals) await cp(join(world.dir, name), join(second, name));
    await store.close();
    const again = await openStore(second, world);
    expect(await storedText(second, "10.0.0.1")).toBe(TEXT.toString());
    const ledger = again.senders.get("10.0.0.1")?.ledger;
    expect([...(ledger?.open.values() ?? [])].reduce((sum, { lines }) => sum + lines, 0)).toBe(LINES);
    await again.close();
    await world.store.close();
  });

  test("a replay that the disk refuses ends nothing: the host is held, and what was answered is there when it can", async () => {
    const world = await createWorld();
    const host = "10.0.0.1";
    await send(world, host, [[0, 50]]);
    const dir = join(await tempFolder(), "data");
    await cp(world.dir, dir, { recursive: true });
    await world.store.close();
    const part = (await readdir(join(dir, host))).find((name) => name.endsWith(".log.part")) as string;
    await rm(join(dir, host, part));
    await mkdir(join(dir, host, part)); // can't be opened as a file
    world.dir = dir;
    world.store = await openStore(dir, world);
    for (let tries = 0; tries < 2; tries++)
      await expect(send(world, host, [[50, LINES]])).rejects.toMatchObject({ status: 503 });
    await world.store.seal();
    await rm(join(dir, host, part), { recursive: true });
    await send(world, host, [[50, LINES]]);
    await checkOffsets(world);
    expect(await storedText(dir, host)).toBe(TEXT.toString());
    await world.store.close();
  });

  test("refuses a chunk that goes on behind other bytes, and gives offset and mark", async () => {
    const world = await createWorld();
    await send(world, "10.0.0.1", [[0, 10]]);
    const other = { ...chunkOf("10.0.0.1", 10, 20), from: markAt(STARTS[9] ?? 0) };
    const offset = STARTS[10] ?? 0;
    expect(await world.store.commit(other)).toEqual({
      kind: "conflict",
      lines: 0,
      offset,
      mark: markAt(offset),
    });
    const { begin: _, ...unknown } = chunkOf("10.0.0.1", 0, 10);
    expect(await world.store.commit({ ...unknown, stream: "stream-0002" })).toMatchObject({
      kind: "unknown",
    });
    await world.store.close();
  });

  test("tells up to where a stream is delivered", async () => {
    const world = await createWorld();
    const delivered = async () => (await world.store.streams("10.0.0.1", [STREAM], {}, ""))[0]?.delivered;
    const third = LINES / 3;
    for (let n = 0; n < 3; n++) await send(world, "10.0.0.1", [[n * third, (n + 1) * third]]);
    expect(await delivered()).toBe(0);
    world.now += 7_200_000;
    const names = (await world.store.seal()).sort();
    expect(names).toHaveLength(3);
    expect(await delivered()).toBe(0);
    const { moveDurably, makeFolder } = await import("../lib/durable.ts");
    for (const folder of ["sent", "failed"]) await makeFolder(join(world.dir, folder));
    const move = (name: string, from: string, to: string) =>
      moveDurably(join(world.dir, from, name), join(world.dir, to, name));
    const [one = "", two = "", three = ""] = names;
    await move(two, "10.0.0.1", "sent");
    expect(await delivered()).toBe(0);
    await move(one, "10.0.0.1", "failed");
    expect(await delivered()).toBe(0);
    await move(one, "failed", "sent");
    expect(await delivered()).toBe(STARTS[2 * third] ?? -1);
    await move(three, "10.0.0.1", "sent");
    expect(await delivered()).toBe(TEXT.length);
    await world.store.close();
  });

  test("a line that comes in pieces is one line, also when the power is cut between them", async () => {
    const world = await createWorld();
    const text = Buffer.from(`${TEXT.subarray(0, (STARTS[1] ?? 0) - 1).toString()}${"y".repeat(5000)}\n`);
    const mark = (offset: number) => formatMark(text.subarray(Math.max(0, offset - MARK_BYTES), offset));
    for (let offset = 0; offset < text.length; offset += 1000) {
      const end = Math.min(text.length, offset + 1000);
      const chunk = {
        host: "10.0.0.1",
        stream: STREAM,
        offset,
        end,
        mark: mark(end),
        body: text.subarray(offset, end),
      };
      const how = offset === 0 ? { begin: "new" as const } : { from: mark(offset) };
      expect(await world.store.commit({ ...chunk, ...how, peer: "" })).toMatchObject({
        kind: "stored",
        offset: end,
      });
      if (offset === 0)
        expect((await world.store.streams("10.0.0.1", undefined, {}, ""))[0]?.delivered).toBe(0);
      await cut(world);
    }
    expect(await storedText(world.dir, "10.0.0.1")).toBe(text.toString());
    await world.store.close();
  });

  test("a host is one store's at a time, and moves with all that was answered", async () => {
    const world = await createWorld();
    const other = await openStore(world.dir, world);
    await send(world, "10.0.0.1", [[0, 100]]);
    const refused = await other.commit(chunkOf("10.0.0.1", 100, 200)).catch((error) => error.status);
    expect(refused).toBe(503);
    await world.store.close();
    world.store = other;
    await send(world, "10.0.0.1", [[100, LINES]]);
    expect(await storedText(world.dir, "10.0.0.1")).toBe(TEXT.toString());
    await other.close();
  });

  test("names go on by the clock's seconds where names may have been used that nobody remembers", async () => {
    const world = await createWorld();
    await world.store.commit({ ...chunkOf("10.0.0.1", 0, LINES), begin: "again" });
    world.now += 7_200_000;
    for (const name of await world.store.seal()) {
      expect(parseBatchName(name)?.part).toBe(Math.floor(START / 1000));
      expect((await readFile(join(world.dir, "10.0.0.1", name))).length).toBeGreaterThan(0);
    }
    await world.store.close();
  });
});
