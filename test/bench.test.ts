/** The benchmark's instruments: its input, its readings, and one small measured transfer. */
import { expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { ours } from "../bench/contestant.ts";
import { generateLog } from "../bench/generate.ts";
import { median, percentile, sample } from "../bench/sample.ts";
import { runLimit, runTransfer } from "../bench/transfer.ts";
import { tempFolder } from "./support.ts";

const traffic = { lines: 20_000, startMs: Date.UTC(2026, 10, 22), linesPerSecond: 10, seed: 1 };

test("generateLog() writes numbered lines of about 220 bytes over several windows, the same for a seed", async () => {
  const folder = await tempFolder();
  const [one, two] = [join(folder, "one"), join(folder, "two")];
  const bytes = generateLog(one, traffic);
  generateLog(two, traffic);
  const text = readFileSync(one, "latin1");
  expect(text).toBe(readFileSync(two, "latin1"));
  expect(text.length).toBe(bytes);
  const lines = text.trimEnd().split("\n");
  expect(lines.length).toBe(traffic.lines);
  expect(bytes / lines.length).toBeWithin(200, 240);
  expect(lines[4711]).toContain("line=4711 ");
  expect(lines[0]).toContain("[22/Nov/2026:00:00:00 +0000]");
  expect(lines.at(-1)).toContain("[22/Nov/2026:00:33:19 +0000]");
});

test("sample() reads a process of this machine, and gives zeros for one that is gone", () => {
  const own = sample(process.pid);
  expect(own.cpuSeconds).toBeGreaterThan(0);
  expect(own.peakMiB).toBeGreaterThanOrEqual(own.memoryMiB);
  expect(own.memoryMiB).toBeGreaterThan(10);
  expect(sample(2 ** 22 + 1)).toEqual({ cpuSeconds: 0, memoryMiB: 0, peakMiB: 0 });
});

test("percentile() takes the nearest rank", () => {
  expect(median([3, 1, 2])).toBe(2);
  expect(percentile([1, 2, 3, 4], 50)).toBe(2);
  expect(percentile([1, 2, 3, 4], 99)).toBe(4);
  expect(percentile([], 50)).toBeNaN();
});

test("runTransfer() finds the same bytes at the other end, and counts what both ends cost", async () => {
  const folder = await tempFolder();
  const path = join(folder, "input.log");
  const input = { path, lines: traffic.lines, bytes: generateLog(path, traffic) };
  const transfer = await runTransfer(ours("zstd"), input, folder);
  expect(transfer.identical).toBe(true);
  expect(transfer.linesPerSecond).toBeGreaterThan(0);
  expect(transfer.senderPeakMiB).toBeGreaterThan(10);
  expect(transfer.receiverPeakMiB).toBeGreaterThan(10);
  expect(runLimit("dd", input, folder).identical).toBe(true);
});
