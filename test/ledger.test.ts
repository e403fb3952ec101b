import { describe, expect, test } from "bun:test";
import { appendFile, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import { LEDGER } from "../lib/batch.ts";
import { writeDurably } from "../lib/durable.ts";
import {
  applyRecord,
  createLedgerReader,
  emptyLedger,
  formatRecord,
  type LedgerRecord,
  parseRecord,
  parseRecords,
  readLedger,
  snapshot,
} from "../lib/ledger.ts";
import { tempFolder } from "./support.ts";

const size = fc.nat();
const streams = fc.dictionary(
  fc.constantFrom("stream-a", "stream-b", "stream-c"),
  fc.record({ offset: size, at: size, lag: size, piece: size }, { requiredKeys: ["offset", "at"] }),
);
const open = fc.dictionary(
  fc.constantFrom("one.log", "two.log"),
  fc.record({ bytes: size, lines: size, endsAt: size, at: size }),
);
const record: fc.Arbitrary<LedgerRecord> = fc.record(
  {
    heardAt: size,
    lineAt: size,
    lost: size,
    streams,
    open,
    closed: fc.array(fc.constantFrom("one.log", "two.log")),
  },
  { requiredKeys: [] },
);

function replay(text: string) {
  const ledger = emptyLedger();
  for (const one of parseRecords(text).records) applyRecord(ledger, one as LedgerRecord);
  return ledger;
}

describe("a ledger", () => {
  test("cut at any byte is the ledger of the records that are whole", () => {
    fc.assert(
      fc.property(fc.array(record, { minLength: 1, maxLength: 4 }), (records) => {
        const lines = records.map(formatRecord);
        const text = lines.join("");
        for (let cut = 0; cut <= text.length; cut++) {
          let whole = 0;
          for (let end = 0; whole < lines.length && end + (lines[whole]?.length ?? 0) <= cut; whole++) {
            end += lines[whole]?.length ?? 0;
          }
          const expected = emptyLedger();
          for (const one of records.slice(0, whole)) applyRecord(expected, one);
          const { damaged, records: found } = parseRecords(text.slice(0, cut));
          expect({ damaged, found: found.length }).toEqual({ damaged: 0, found: whole });
          expect(replay(text.slice(0, cut))).toEqual(expected);
        }
      }),
      { numRuns: 30 },
    );
  });

  test("rewritten as one record says the same", () => {
    fc.assert(
      fc.property(fc.array(record), (records) => {
        const ledger = emptyLedger();
        for (const one of records) applyRecord(ledger, one);
        expect(replay(formatRecord(snapshot(ledger)))).toEqual(ledger);
      }),
    );
  });

  test("counts a damaged record and goes on behind it", () => {
    fc.assert(
      fc.property(fc.array(record, { minLength: 1, maxLength: 5 }), fc.nat(), fc.nat(), (records, at, by) => {
        const bytes = Buffer.from(records.map(formatRecord).join(""));
        const index = at % bytes.length;
        bytes[index] = (bytes[index] ?? 0) ^ (1 << (by % 7));
        const { records: found, damaged } = parseRecords(bytes.toString("latin1"));
        expect(found.length).toBeGreaterThanOrEqual(records.length - 2); // a flipped \n joins two
        expect(found.length + damaged).toBeGreaterThanOrEqual(records.length - 1);
        for (const one of found) expect(records).toContainEqual(one as LedgerRecord);
      }),
    );
  });

  test("takes the lag that a sender told last", () => {
    const ledger = emptyLedger();
    applyRecord(ledger, { streams: { a: { offset: 1, at: 1, lag: 500 } } });
    applyRecord(ledger, { streams: { b: { offset: 1, at: 2, lag: 20 } } });
    expect(ledger.streams.get("a")?.lag).toBeUndefined();
    expect(ledger.streams.get("b")?.lag).toBe(20);
  });
});

test("parseRecord() refuses what is not a record", () => {
  for (const line of ["", "x", "00000000 {}", "a3 {}", `${"0".repeat(8)}{}`])
    expect(parseRecord(line)).toBeUndefined();
});

test("readLedger() tells an absent file from an empty one, and take over the names of version 1.0", async () => {
  const folder = await tempFolder();
  expect(await readLedger(folder)).toBeUndefined();
  await writeFile(join(folder, ".ledger"), "");
  expect(await readLedger(folder)).toEqual(emptyLedger());
  const batch = { name: "accessLog_26112206_20-39_h.log", bytes: 1, lines: 1, at: 5 };
  const text =
    formatRecord({ forgotten: "26112206_00-19" }) + formatRecord(batch) + formatRecord(batch).slice(0, 20);
  await writeFile(join(folder, ".ledger-sealed"), text);
  expect(await readLedger(folder)).toMatchObject({
    sealed: new Map([[batch.name, { ...batch, waits: true }]]),
    used: new Map([["26112206_20-39", 1]]),
    unsure: "26112206_00-19",
  });
});

describe("createLedgerReader()", () => {
  test("tells what readLedger() tells, also of a ledger that grew, has a torn end, or was written anew", async () => {
    const folder = await tempFolder();
    const path = join(folder, LEDGER);
    const read = createLedgerReader();
    expect(await read(folder)).toBeUndefined();
    const stream = (offset: number) => formatRecord({ streams: { "a-stream": { offset, at: offset } } });
    for (const text of [stream(1), stream(2), "", stream(3).slice(0, 20), stream(3).slice(20), stream(4)]) {
      await appendFile(path, text);
      expect(await read(folder)).toEqual(await readLedger(folder));
    }
    expect((await read(folder))?.streams.get("a-stream")?.offset).toBe(4);
    await writeDurably(
      path,
      formatRecord({ lost: 7, streams: { "b-stream": { offset: 9, at: 9 } } }).repeat(9),
    );
    expect(await read(folder)).toEqual(await readLedger(folder));
    await truncate(path, 0);
    expect(await read(folder)).toEqual(emptyLedger());
  });
});
