/**
 * A whole start of the store over a journal that was cut at any byte, or in which any bit flipped: what can be read is
 * in parts and ledgers once, what was acknowledged and can't be is told, and the sender goes on from where it is told.
 * `LOG_RT_SYNC_STEP=1` takes every byte; the suite takes every 61st, and those around each record's ends.
 */
import { expect, test } from "bun:test";
import { cp, mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { zstdCompressSync } from "node:zlib";
import { formatMark, MARK_BYTES } from "../lib/chunk.ts";
import { createLog } from "../lib/service.ts";
import type { Chunk } from "../lib/store/sender.ts";
import { Store } from "../lib/store/store.ts";
import { createWindowFinder } from "../lib/store/window.ts";
import { storedWindows } from "./sending.ts";
import { tempFolder } from "./support.ts";

const STEP = Number(process.env.LOG_RT_SYNC_STEP ?? 61);
const NOW = Date.parse("2026-11-22T07:00:00+06:00");
const HOST = "10.0.0.1";
const line = (time: string, text: string) => `1.2.3.4 - - [22/Nov/2026:${time} +0600] "GET /${text}" 200 1\n`;
/** What each chunk of the one stream brings: a line begins in the third and ends in the fifth, which begins the next long one. */
const TEXTS = [
  line("06:01:00", "one") + line("06:02:00", "two"),
  line("06:19:00", "three") + line("06:21:00", "four"),
  line("06:22:00", "five") + line("06:23:00", "long").slice(0, 50),
  line("06:23:00", "long").slice(50, 55),
  line("06:23:00", "long").slice(55) + line("06:41:00", "six") + line("06:43:00", "next").slice(0, 50),
  line("06:43:00", "next").slice(50) + line("06:44:00", "seven"),
];
const ENDS = TEXTS.map((_, i) => TEXTS.slice(0, i + 1).join("").length);

function chunk(i: number): Chunk {
  const text = Buffer.from(TEXTS.join(""));
  const mark = (offset: number) => formatMark(text.subarray(Math.max(0, offset - MARK_BYTES), offset));
  const [offset, end] = [ENDS[i - 1] ?? 0, ENDS[i] ?? 0];
  const body = text.subarray(offset, end);
  return {
    ...{ host: HOST, stream: "stream-0001", offset, end, body, mark: mark(end), peer: "127.0.0.1" },
    ...(i === 1 && { encoded: { encoding: "zstd" as const, bytes: zstdCompressSync(body) } }),
    ...(i === 0 ? { begin: "new" as const } : { from: mark(offset) }),
  };
}

async function open(dir: string, now = () => NOW): Promise<{ store: Store; output: string[] }> {
  const output: string[] = [];
  const store = new Store({
    ...{ dir, prefix: "accessLog", windowMinutes: 20, sealAfterSeconds: 120, sealLatestSeconds: 900 },
    ...{ forgetAfterDays: 30, maxHosts: 100, maxStreamsPerHost: 100, maxWindowsPerHost: 100 },
    ...{ maxNamesPerHour: 100_000, findWindow: createWindowFinder(20), now },
    log: createLog((text) => output.push(text)),
  });
  await store.start(() => true);
  return { store, output };
}

async function storedText(dir: string): Promise<string> {
  const windows = await storedWindows(dir, HOST);
  return [...windows]
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([, text]) => text)
    .join("");
}

/** A folder as a crash leaves it, with every chunk in its journal; `bare`: nothing but the journal is on the disk. */
async function createCrashed() {
  const [written, bare] = [join(await tempFolder(), "data"), join(await tempFolder(), "data")];
  const dir = await tempFolder();
  const { store } = await open(dir);
  for (const i of TEXTS.keys()) expect(await store.commit(chunk(i))).toMatchObject({ offset: ENDS[i] ?? 0 });
  await cp(dir, written, { recursive: true });
  await store.close();
  const name = (await readdir(written)).find((file) => /^\.journal-.*-\d+$/.test(file)) ?? "";
  await mkdir(bare);
  await cp(join(written, name), join(bare, name));
  return { templates: [written, bare], name, journal: await readFile(join(written, name)) };
}

/** Some places of a file: each `STEP`-th, and those beside where a record begins. */
function* placesOf(journal: Buffer, starts: number[]): Generator<number> {
  for (let at = 0; at < journal.length; at++) {
    const isEdge = starts.some((start) => Math.abs(at - start) <= 1);
    if (isEdge || at % STEP === 0) yield at;
  }
}

function startsOf(journal: Buffer): number[] {
  const starts: number[] = [];
  for (let at = journal.indexOf("LRTJ"); at >= 0; at = journal.indexOf("LRTJ", at + 1)) starts.push(at);
  return starts;
}

/** Starts over a crashed folder whose journal has these bytes, and sends what is not there, from where it is told. */
async function restart(template: string, name: string, journal: Uint8Array) {
  const dir = join(await tempFolder(), "data");
  await cp(template, dir, { recursive: true });
  await writeFile(join(dir, name), journal);
  const { store, output } = await open(dir);
  const [stream] = await store.streams(HOST, ["stream-0001"], {}, "");
  const replayed = await storedText(dir);
  const ledger = store.senders.get(HOST)?.ledger;
  const open_ = [...(ledger?.open.values() ?? [])];
  expect(open_.reduce((sum, { bytes }) => sum + bytes, 0)).toBe(replayed.length);
  expect(open_.reduce((sum, { lines }) => sum + lines, 0)).toBe(replayed.split("\n").length - 1);
  const offset = stream?.offset ?? 0;
  for (const i of TEXTS.keys()) if ((ENDS[i] ?? 0) > offset) await store.commit(chunk(i));
  const final = await storedText(dir);
  const lost = ledger?.lost ?? 0;
  await store.close();
  expect(await storedText(dir)).toBe(final);
  await rm(dir, { recursive: true });
  return { replayed, offset, final, lost, output: output.join("\n") };
}

/** What is in batches when all chunks but `hit` came: whole lines, and what is left of the long one. */
function expectedText(count: number, hit = -1): string {
  const parts = TEXTS.slice(0, count).map((part, i) => (i === hit ? "" : part));
  if (hit === 4) parts[2] = line("06:22:00", "five"); // without its end the long line is none
  if (hit === 4) parts[3] = "";
  const text = parts.join("");
  return text.slice(0, text.lastIndexOf("\n") + 1);
}

test("a journal cut at any byte: what is whole is there once, no damage is told, and the sender goes on", async () => {
  const { templates, name, journal } = await createCrashed();
  const starts = startsOf(journal);
  expect(starts).toHaveLength(TEXTS.length);
  for (const at of placesOf(journal, starts)) {
    const whole = starts.filter((start, i) => start < at && (starts[i + 1] ?? journal.length) <= at).length;
    const found = await restart(templates[at % 2] ?? "", name, journal.subarray(0, at));
    expect({ at, ...found }).toEqual({
      ...{ at, offset: ENDS[whole - 1] ?? 0, replayed: expectedText(whole) },
      ...{ final: TEXTS.join(""), lost: 0, output: expect.not.stringContaining(" error ") },
    });
  }
}, 900_000);

test("a bit that flipped anywhere: one record is gone, told in bytes, and the others are there once", async () => {
  const { templates, name, journal } = await createCrashed();
  const starts = startsOf(journal);
  for (const at of placesOf(journal, starts)) {
    const hit = starts.findLastIndex((start) => start <= at);
    const damaged = Buffer.from(journal);
    damaged[at] = (damaged[at] ?? 0) ^ (1 << (at % 8));
    const found = await restart(templates[at % 2] ?? "", name, damaged);
    const isLast = hit === TEXTS.length - 1; // nothing says that it was synced: sent again
    expect({ at, ...found }).toEqual({
      ...{
        at,
        offset: ENDS[TEXTS.length - (isLast ? 2 : 1)] ?? 0,
        replayed: expectedText(TEXTS.length, hit),
      },
      final: isLast ? TEXTS.join("") : expectedText(TEXTS.length, hit),
      // Of a stream whose beginning is gone nothing says where it began.
      lost: isLast || hit === 0 ? 0 : TEXTS.join("").length - expectedText(TEXTS.length, hit).length,
      output: isLast ? expect.not.stringContaining("damaged") : expect.stringContaining("journal is damaged"),
    });
  }
}, 900_000);

test("a file that somebody put under a batch's name keeps that one alone from being sealed, and is told", async () => {
  const dir = await tempFolder();
  let now = NOW;
  const { store, output } = await open(dir, () => now);
  for (const i of TEXTS.keys()) await store.commit(chunk(i));
  const names = async () =>
    (await readdir(join(dir, HOST))).filter((name) => name.startsWith("accessLog")).sort();
  const [part = "", ...others] = await names();
  const inTheWay = join(dir, HOST, part.replace(".part", ""));
  expect(others).not.toEqual([]);
  await writeFile(inTheWay, "by hand\n");
  now += 7_200_000;
  await store.seal();
  await store.seal();
  expect(await names()).toEqual([part, ...[part, ...others].map((name) => name.replace(".part", ""))].sort());
  expect(output.join("")).toContain("a file of that name is there");
  expect(await readFile(inTheWay, "utf8")).toBe("by hand\n");
  await rm(inTheWay);
  await store.seal();
  expect(await names()).toEqual([part, ...others].map((name) => name.replace(".part", "")));
  expect(await storedText(dir)).toBe(TEXTS.join(""));
  await store.close();
});
