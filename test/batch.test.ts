import { describe, expect, test } from "bun:test";
import { mkdir, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import {
  type BatchName,
  compareBatchNames,
  dashedHost,
  formatBatchName,
  formatWindow,
  listBatches,
  listHosts,
  parseBatchName,
  parseWindow,
  withState,
} from "../lib/batch.ts";
import { tempFolder } from "./support.ts";

const wall = fc.integer({ min: 946_684_800_000, max: 4_102_444_799_000 }); // 2000 to 2099
const minutes = fc.constantFrom(1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60);
const window = fc.tuple(wall, minutes).map((parts) => formatWindow(...parts));
const host = fc.oneof(fc.ipV4(), fc.ipV6(), fc.domain()).map((name) => dashedHost(name.toLowerCase()));
const name: fc.Arbitrary<BatchName> = fc.record({
  prefix: fc.stringMatching(/^[A-Za-z0-9][A-Za-z0-9_-]{0,20}$/),
  window,
  host: host.filter((text) => /^[a-z0-9-]+$/.test(text) && text.length < 150),
  part: fc.oneof(fc.constant(1), fc.integer({ min: 2, max: 2_000_000_000 })),
  state: fc.constantFrom("open", "sealed", "compressed"),
});

describe("formatBatchName() and parseBatchName()", () => {
  test("are each other's inverse", () => {
    fc.assert(fc.property(name, (batch) => expect(parseBatchName(formatBatchName(batch))).toEqual(batch)));
  });

  test("parseBatchName() takes any text, and gives a name back only when it is that very text", () => {
    fc.assert(
      fc.property(
        fc.oneof(fc.string(), name.map(formatBatchName)),
        fc.nat(),
        fc.string(),
        (text, at, insert) => {
          const index = at % (text.length + 1);
          const changed = text.slice(0, index) + insert + text.slice(index);
          const batch = parseBatchName(changed);
          if (batch) expect(formatBatchName(batch)).toBe(changed);
        },
      ),
    );
  });

  test.each([
    "accessLog_26112206_20-39_10-10-21-181",
    "../accessLog_26112206_20-39_10-10-21-181.log",
    "a/accessLog_26112206_20-39_10-10-21-181.log",
    "accessLog_26112206_20-39_10.10.21.181.log",
    "accessLog_26119906_20-39_host.log",
    "accessLog_26113106_20-39_host.log",
    "accessLog_26112224_20-39_host.log",
    "accessLog_26112206_21-40_host.log",
    "accessLog_26112206_20-39_host.1.log",
    "accessLog_26112206_20-39_host.02.log",
    "accessLog_26112206_20-39_host.log.tmp",
    "accessLog_26112206_20-39_HOST.log",
    "accessLog_26112206_20-39_host.log\n",
    "",
  ])("parseBatchName() refuses %j", (text) => {
    expect(parseBatchName(text)).toBeUndefined();
  });

  test("name a batch as people know it", () => {
    const batch = { prefix: "accessLog", window: "26112206_20-39", host: dashedHost("10.10.21.181") };
    expect(formatBatchName({ ...batch, part: 1, state: "sealed" })).toBe(
      "accessLog_26112206_20-39_10-10-21-181.log",
    );
    expect(formatBatchName({ ...batch, part: 2, state: "open" })).toBe(
      "accessLog_26112206_20-39_10-10-21-181.2.log.part",
    );
    expect(dashedHost("2001:db8::1")).toBe("2001-db8--1");
  });
});

test("withState() changes the ending alone", () => {
  fc.assert(
    fc.property(
      name,
      fc.constantFrom("open" as const, "sealed" as const, "compressed" as const),
      (batch, state) =>
        expect(parseBatchName(withState(formatBatchName(batch), state))).toEqual({ ...batch, state }),
    ),
  );
  expect(() => withState("notes.txt", "open")).toThrow('Cannot rename "notes.txt"');
});

test("parseWindow() spans the minutes of formatWindow(), and windows follow each other without a gap", () => {
  fc.assert(
    fc.property(wall, minutes, (at, length) => {
      const { start, end } = parseWindow(formatWindow(at, length));
      expect(start <= at && at < end).toBe(true);
      expect(end - start).toBe(length * 60_000);
      if (end < 4_102_444_800_000) expect(parseWindow(formatWindow(end, length)).start).toBe(end);
    }),
  );
});

test("compareBatchNames() sorts by window, host and part as a number", () => {
  const names = [
    "p_26112206_20-39_b.log",
    "p_26112206_20-39_a.10.log",
    "p_26112206_20-39_a.2.log",
    "p_26112206_00-19_z.log",
  ];
  expect(names.sort(compareBatchNames)).toEqual([
    "p_26112206_00-19_z.log",
    "p_26112206_20-39_a.2.log",
    "p_26112206_20-39_a.10.log",
    "p_26112206_20-39_b.log",
  ]);
});

test("listHosts() and listBatches() see hosts and batches, and nothing else", async () => {
  const dir = await tempFolder();
  for (const folder of ["10.0.0.1", "web", "sent", "failed", ".hidden", "lost+found", "WEB2", "web copy"])
    await mkdir(join(dir, folder));
  await symlink("/etc", join(dir, "link"));
  await writeFile(join(dir, "file"), "");
  expect(await listHosts(dir)).toEqual(["10.0.0.1", "web"]);
  const folder = join(dir, "web");
  for (const file of [
    "p_26112206_20-39_web.log",
    "p_26112206_20-39_web.2.log.part",
    ".ledger",
    "notes.log",
  ]) {
    await writeFile(join(folder, file), "");
  }
  await mkdir(join(folder, "p_26112206_40-59_web.log"));
  await symlink("/etc/passwd", join(folder, "p_26112206_00-19_web.log"));
  expect(await listBatches(folder, "sealed")).toEqual(["p_26112206_20-39_web.log"]);
  expect(await listBatches(folder, "open", "sealed")).toEqual([
    "p_26112206_20-39_web.log",
    "p_26112206_20-39_web.2.log.part",
  ]);
  expect(await listBatches(join(dir, "absent"), "sealed")).toEqual([]);
});
