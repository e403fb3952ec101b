/** The journal's files after a cut at any byte and after damage: what was synced is given, or told as damaged. */
import { describe, expect, test } from "bun:test";
import { readdirSync } from "node:fs";
import { readFile, writeFile } from "node:fs/promises";
import { crc32 } from "node:zlib";
import { type Entry, Journal, listJournals, readJournal } from "../lib/store/journal.ts";
import { tempFolder } from "./support.ts";

/** An entry whose text and body tell its number. */
function entryOf(number: number): Entry {
  return {
    ...{ seq: 0, synced: [0, 0], at: number, host: "10.0.0.1", stream: "stream-0001", from: number },
    ...{ state: { offset: number + 1, at: number }, runs: [], encoding: "identity", length: 0, lines: 0 },
  };
}

const bodyOf = (number: number) => Buffer.from(`body ${number}, ${"x".repeat(number)}\n`);

/** A journal of `groups`, each a number of records that share a sync. */
async function createJournal(groups: number[]) {
  const dir = await tempFolder();
  const journal = new Journal(dir, "abc");
  let number = 0;
  for (const size of groups) {
    const waiting: Promise<void>[] = [];
    for (let i = 0; i < size; i++, number++) {
      waiting.push(journal.append(entryOf(number), bodyOf(number), () => {}));
    }
    await Promise.all(waiting);
  }
  const [path = ""] = journal.paths;
  await journal.close();
  return { dir, path, bytes: await readFile(path), count: number };
}

/** A record with this entry and no body, as anyone can make one. */
function forgedRecord(entry: string): string {
  const head = Buffer.from("LRTJ\0\0\0\0\0\0\0\0\0\0\0\0");
  head.writeUInt32LE(entry.length, 4);
  head.writeUInt32LE(crc32(entry, crc32(head.subarray(4, 12))), 12);
  return head.toString("latin1") + entry;
}

/** The numbers of the records that can be read, and how often damage is told. */
async function read(path: string): Promise<{ numbers: number[]; damaged: number }> {
  const numbers: number[] = [];
  let damaged = 0;
  for await (const { entry, body } of readJournal([path], () => damaged++)) {
    expect(Buffer.from(body)).toEqual(bodyOf(entry.at));
    numbers.push(entry.at);
  }
  return { numbers, damaged };
}

const upTo = (count: number) => Array.from({ length: count }, (_, i) => i);

/** Where each record begins, and the end of the last. */
function startsOf(bytes: Buffer): number[] {
  const starts: number[] = [];
  for (let at = bytes.indexOf("LRTJ"); at >= 0; at = bytes.indexOf("LRTJ", at + 1)) starts.push(at);
  return [...starts, bytes.length];
}

describe("a journal", () => {
  test("gives what was appended, in its order", async () => {
    const { dir, path, count } = await createJournal([1, 3, 2]);
    expect(await read(path)).toEqual({ numbers: upTo(count), damaged: 0 });
    expect([...listJournals(dir)]).toEqual([["abc", [path]]]);
  });

  test("cut at any byte gives the records that are whole, and tells no damage", async () => {
    const { path, bytes } = await createJournal([1, 2, 2]);
    const starts = startsOf(bytes);
    for (let cut = 0; cut <= bytes.length; cut++) {
      await writeFile(path, bytes.subarray(0, cut));
      const whole = starts.filter((start, index) => index > 0 && start <= cut).length;
      expect(await read(path)).toEqual({ numbers: upTo(whole), damaged: 0 });
    }
  });

  test("a bit that flipped in what was synced before is damage: it is told, the others are given", async () => {
    const { path, bytes, count } = await createJournal([1, 2, 1]);
    const starts = startsOf(bytes);
    for (let at = 0; at < bytes.length; at++) {
      const damaged = Buffer.from(bytes);
      damaged[at] = (damaged[at] ?? 0) ^ (1 << (at % 8));
      await writeFile(path, damaged);
      const hit = starts.findLastIndex((start) => start <= at);
      const found = await read(path);
      if (hit === count - 1)
        expect(found).toEqual({ numbers: upTo(count - 1), damaged: 0 }); // nothing says it was synced
      else {
        expect(found.numbers).toEqual(upTo(count).filter((number) => number !== hit));
        expect(found.damaged).toBe(1);
      }
    }
  });

  test("a record that a sender has put into a body is none, whatever is damaged before it", async () => {
    const forged = await createJournal([1]);
    for (const text of [forged.bytes.toString("latin1"), forgedRecord("null"), forgedRecord("{")]) {
      const dir = await tempFolder();
      const journal = new Journal(dir, "def");
      await journal.append(entryOf(0), Buffer.from(text, "latin1"), () => {});
      await journal.append(entryOf(1), bodyOf(1), () => {});
      await journal.close();
      const [path = ""] = journal.paths;
      const bytes = await readFile(path);
      bytes[5] = (bytes[5] ?? 0) ^ 1; // the length of the first entry
      await writeFile(path, bytes);
      expect(await read(path)).toEqual({ numbers: [1], damaged: 1 });
    }
  });

  test("a hole in a group that was never synced ends it: nothing behind the hole is given", async () => {
    const { path, bytes } = await createJournal([1, 4]);
    const starts = startsOf(bytes);
    const holed = Buffer.from(bytes).fill(0, starts[2], starts[3]); // blocks reach the disk in any order
    await writeFile(path, holed);
    expect(await read(path)).toEqual({ numbers: [0, 1], damaged: 0 });
  });

  test("what could not be written is rejected, nothing more is taken, and a repair lets it go on", async () => {
    const dir = await tempFolder();
    const journal = new Journal(dir, "abc");
    await journal.append(entryOf(0), bodyOf(0), () => {});
    const isDone = await journal
      .append(entryOf(1), { length: 1 } as Uint8Array, () => {})
      .then(
        () => true,
        () => false,
      );
    expect(isDone).toBe(false);
    expect(journal.fault).toBeDefined();
    expect(
      await journal
        .append(entryOf(2), bodyOf(2), () => {})
        .then(
          () => true,
          () => false,
        ),
    ).toBe(false);
    await journal.repair();
    await journal.append(entryOf(3), bodyOf(3), () => {});
    await journal.close();
    expect((await read(journal.paths[0] ?? "")).numbers).toEqual([0, 3]);
  });

  test("segments are dropped oldest first, and only when all hosts in them are safe", async () => {
    const dir = await tempFolder();
    const journal = new Journal(dir, "abc");
    const large = Buffer.alloc(33 << 20);
    for (let number = 0; number < 4; number++) await journal.append(entryOf(number), large, () => {});
    expect(readdirSync(dir).filter((name) => name.startsWith(".journal-abc-"))).toHaveLength(2);
    await journal.drop((_, seq) => seq <= 1);
    expect(journal.paths).toHaveLength(2);
    await journal.drop((_, seq) => seq <= 2);
    expect(journal.paths).toHaveLength(1);
    await journal.drop(() => true);
    expect(journal.paths).toHaveLength(1); // the one that is written stays
    expect([journal.names("10.0.0.1"), journal.names("10.0.0.2")]).toEqual([true, false]);
    journal.endSegmentOf(["10.0.0.2"]);
    await journal.drop(() => true);
    expect(journal.paths).toHaveLength(1); // it names none of these
    journal.endSegmentOf(["10.0.0.1"]);
    await journal.drop(() => true);
    expect(readdirSync(dir)).toEqual([]);
    expect(journal.names("10.0.0.1")).toBe(false);
    await journal.append(entryOf(4), large, () => {});
    expect(readdirSync(dir)).toEqual([".journal-abc-00000003"]); // a number is never used again
    await journal.close();
  });
});
