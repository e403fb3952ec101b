/**
 * The memory of used names: `.ledger-sealed` in a sender's folder. A name goes in before its file is sealed and
 * stays when the file is delivered and gone, so that no name is ever used twice. What is older than
 * `forgetAfterDays` is dropped; a first record then remembers the newest window that was forgotten, and a
 * window up to it gets the current time as its part number, which no earlier part can have.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { dashedHost, FAILED, formatBatchName, parseBatchName, SENT, withState } from "./batch.ts";
import { appendDurably, writeDurably } from "./durable.ts";
import {
  type Forgotten,
  formatRecord,
  parseRecords,
  readSealed,
  SEALED,
  type SealedBatch,
} from "./ledger.ts";

/** A window of a sender. */
export interface SenderWindow {
  dir: string;
  host: string;
  prefix: string;
  window: string;
}

/** The number of the next part of a window: one that no batch of this name ever had. */
export function nextPart({ dir, host, prefix, window }: SenderWindow, now: number): number {
  const dashed = dashedHost(host);
  const memory = readMemory(join(dir, host));
  let part = newestPart(memory, `"${prefix}_${window}_${dashed}.`) + 1;
  if (part === 1 && window <= forgottenUpTo(memory)) part = Math.floor(now / 1000);
  // Files are looked at, too: the memory may be lost, or the folder older than it.
  const isTaken = () => {
    const name = formatBatchName({ prefix, window, host: dashed, part, state: "sealed" });
    const packed = withState(name, "compressed");
    const places = [host, FAILED, SENT].map((folder) => join(dir, folder, name));
    return [...places, join(dir, host, withState(name, "open")), join(dir, SENT, packed)].some(existsSync);
  };
  while (isTaken()) part++;
  return part;
}

/** Remembers a name, on stable storage when it returns. */
export async function recordSealed(folder: string, batch: SealedBatch): Promise<void> {
  await appendDurably(join(folder, SEALED), formatRecord(batch));
}

/** Drops what was sealed before `oldest`, except for the newest window of it. */
export async function forgetSealed(folder: string, oldest: number): Promise<void> {
  const records = await readSealed(folder);
  const old = records.filter((record) => record.at < oldest);
  if (old.length === 0) return;
  const kept = records.filter((record) => record.at >= oldest);
  const windows = old.map((record) => parseBatchName(record.name)?.window ?? "");
  const forgotten = [forgottenUpTo(readMemory(folder)), ...windows].sort().at(-1) ?? "";
  const lines = [formatRecord({ forgotten }), ...kept.map(formatRecord)];
  await writeDurably(join(folder, SEALED), lines.join(""));
}

function readMemory(folder: string): Buffer {
  try {
    return readFileSync(join(folder, SEALED));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return Buffer.alloc(0);
    throw error;
  }
}

/** Searched as bytes: a name counts as used also when its record is damaged. */
function newestPart(memory: Buffer, start: string): number {
  let newest = 0;
  for (let at = memory.indexOf(start); at >= 0; at = memory.indexOf(start, at + start.length)) {
    const rest = memory.toString("latin1", at + start.length, at + start.length + 24);
    const part = /^(?:(\d+)\.)?log"/.exec(rest);
    if (part) newest = Math.max(newest, Number(part[1] ?? 1));
  }
  return newest;
}

function forgottenUpTo(memory: Buffer): string {
  const end = memory.indexOf("\n");
  const [first] = parseRecords(memory.toString("latin1", 0, end + 1)).records as Partial<Forgotten>[];
  return first?.forgotten ?? "";
}
