/** The cursor is lost and the receiver is asked about each file, while files are renamed and compressed. */
import { describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { renameSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { formatMark, type StreamStatus } from "../lib/chunk.ts";
import { createFaultLog, createLog } from "../lib/service.ts";
import { readCursor } from "../lib/tail/cursor.ts";
import { scanFamily } from "../lib/tail/family.ts";
import { openLog } from "../lib/tail/file.ts";
import { createFamily, type Family, type ScanContext } from "../lib/tail/streams.ts";
import { openShipper, saveCursor } from "../shipper.ts";
import { createSender, lines, startStub } from "./pipeline.ts";
import { onCleanup, tempFolder } from "./support.ts";

const log = createLog(() => {});
const signal = new AbortController().signal;
const TAGS = ["live", "a", "b", "c"];

/** A log with three rotated files, each shipped up to its fifth line, and a receiver that is asked about them. */
async function createLost() {
  const folder = await tempFolder();
  const path = join(folder, "access.log");
  const name = (n: number) => (n === 0 ? path : `${path}.${n}`);
  /** By stream: its tag, and where the receiver stands with it. */
  const receiver = new Map<string, StreamStatus & { tag: string }>();
  for (const [n, tag] of TAGS.entries()) {
    const text = Buffer.from(lines(tag, 1, 10));
    writeFileSync(name(n), text);
    const offset = lines(tag, 1, 5).length;
    const [head, mark] = [text.subarray(0, 1024), text.subarray(Math.max(0, offset - 1024), offset)];
    const stream = `stream-${tag}`;
    receiver.set(stream, { tag, stream, offset, head: formatMark(head), mark: formatMark(mark) });
  }
  const family = createFamily(path, "recover", Date.now());
  let asked = 0;
  const lost = {
    family,
    name,
    receiver,
    /** Called each time the receiver is asked, with the number of the call. */
    onAsk: (_: number) => {},
  };
  const context: ScanContext = {
    config: { startAt: "beginning", rotateWaitSeconds: 0, pollSeconds: 1 },
    ...{ now: Date.now, log, faults: createFaultLog(log), signal },
    ask: async (names = []) => names.flatMap((name) => receiver.get(name) ?? []),
    async known() {
      lost.onAsk(++asked);
      return [...receiver.values()];
    },
    taken: () => new Set(),
    lose: (bytes) => {
      throw new Error(`${bytes} bytes are told as lost`);
    },
    changed() {},
  };
  onCleanup(() => Promise.all(family.streams.map((stream) => stream.file?.close())));
  return { ...lost, lost, look: () => scanFamily(family, context) };
}

/** Every stream that the receiver knows, by its tag: offset, and the first line of the file that it goes on in. */
async function summary({ streams }: Family, receiver: Map<string, { tag: string }>) {
  const rows = [];
  for (const { id, offset, path, done } of streams) {
    const file = await openLog(path);
    const head = Buffer.alloc(lines("live", 1, 1).length);
    await file.read(head, 0);
    await file.close();
    const tag = receiver.get(id ?? "")?.tag;
    rows.push({ tag, offset, done, first: head.toString("latin1").split("\n")[0] });
  }
  return rows.sort((a, b) => String(a.tag).localeCompare(String(b.tag)));
}

const goesOn = (tag: string) => ({
  tag,
  offset: lines(tag, 1, 5).length,
  done: false,
  first: lines(tag, 1, 1).trimEnd(),
});
const EVERYTHING = TAGS.map(goesOn).sort((a, b) => a.tag.localeCompare(b.tag));

describe("recover()", () => {
  test.each([1, 2, 3, 4, 5, 6, 7])("names are shifted while it asks, at call %d", async (call) => {
    const { family, name, receiver, lost, look } = await createLost();
    lost.onAsk = (n) => {
      if (n !== call) return;
      for (const from of [3, 2, 1, 0]) renameSync(name(from), name(from + 1));
    };
    for (let looks = 0; looks < 5; looks++) await look();
    expect(family.start).toBe("known");
    expect(await summary(family, receiver)).toEqual(EVERYTHING);
  });

  test.each([1, 3, 5, 7])("a file is compressed while it asks, at call %d", async (call) => {
    const { family, name, receiver, lost, look } = await createLost();
    lost.onAsk = (n) => {
      if (n === call) execFileSync("gzip", [name(2)]);
    };
    for (let looks = 0; looks < 5; looks++) await look();
    expect(family.start).toBe("known");
    expect(await summary(family, receiver)).toEqual(EVERYTHING);
  });

  test("the live file is copied before it is truncated: the copy is its, and no file of its own", async () => {
    const { family, name, receiver, lost, look } = await createLost();
    execFileSync("cp", [name(0), name(4)]);
    lost.onAsk = () => {};
    await look();
    const live = family.streams.find(({ id }) => receiver.get(id ?? "")?.tag === "live");
    expect(live?.keys).toHaveLength(2);
    writeFileSync(name(0), lines("new", 1, 3));
    await look();
    expect(live?.path).toBe(name(4));
    expect(live?.done).toBe(false);
  });

  test("what was found is neither saved nor shipped before all of it is found", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    sender.rotate();
    sender.write(lines("b", 1, 10));
    for (const name of await readdir(sender.stateDir)) {
      if (name.startsWith("cursor")) writeFileSync(join(sender.stateDir, name), "\0".repeat(99));
    }
    const config = JSON.parse(await Bun.file(sender.config).text()).shipper;
    const { sections } = await import("../lib/config.ts");
    const shipper = await openShipper(sections.shipper.parse(config), { log, signal, now: Date.now });
    await saveCursor(shipper); // as another file's loop does at any time; then the process is killed
    const found = await readCursor(sender.stateDir);
    const [family] = "cursor" in found ? Object.values(found.cursor.families) : [];
    expect(family).toMatchObject({ start: "recover", streams: [] });
    await sender.once();
    expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
  });
});
