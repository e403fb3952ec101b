/**
 * What a start makes of a sender's folder: brings the files back to what the ledger says is committed, whatever
 * instruction the last run ended at. Lines behind the committed length were never acknowledged and are cut off;
 * a batch whose name is in `.ledger-sealed` is to be finished. Where the ledger itself is gone or damaged,
 * nothing is cut that may have been acknowledged: such a `.part` is kept whole, and the operator is told.
 */
import { createReadStream } from "node:fs";
import { readdir, rm, stat, truncate } from "node:fs/promises";
import { join } from "node:path";
import { LEDGER, listBatches, parseBatchName, parseWindow, withState } from "../batch.ts";
import { moveDurably, readIfExists, writeDurably } from "../durable.ts";
import {
  applyRecord,
  emptyLedger,
  formatRecord,
  LEDGER_VERSION,
  type Ledger,
  type LedgerRecord,
  type OpenBatch,
  parseRecords,
  readSealed,
  snapshot,
} from "../ledger.ts";
import { type Log, OperatorError } from "../service.ts";

/** A line whose end has not come is kept in a file of its own, named so and with its stream behind it. */
export const PIECE = `${LEDGER}-piece-`;

/** A sender's folder while it is brought into order. */
interface Recovery {
  host: string;
  folder: string;
  ledger: Ledger;
  /** Whether the ledger speaks of everything that was ever acknowledged: it is there, and undamaged. */
  isComplete: boolean;
  /** Whether the ledger on disk no longer says what is true. */
  isStale: boolean;
  /** Names that a crash left half sealed. */
  finishing: Set<string>;
  now: () => number;
  log: Log;
}

/** A committed length; corrected when the file turns out to be shorter. */
interface Committed {
  bytes: number;
}

export type Recovered = Pick<Recovery, "ledger" | "finishing">;

/** Brings a sender's folder into order. Throws an OperatorError when a newer version wrote its ledger. */
export async function recoverSender(
  host: string,
  folder: string,
  { now, log }: Pick<Recovery, "now" | "log">,
): Promise<Recovered> {
  const recovery = {
    host,
    folder,
    now,
    log,
    finishing: new Set<string>(),
    ...(await replay(host, folder, log)),
  };
  await recoverBatches(recovery);
  await recoverPieces(recovery);
  const { ledger, finishing } = recovery;
  if (recovery.isStale) await writeDurably(join(folder, LEDGER), formatRecord(snapshot(ledger)));
  return { ledger, finishing };
}

async function replay(host: string, folder: string, log: Log) {
  const path = join(folder, LEDGER);
  const text = await readIfExists(path);
  const ledger = emptyLedger();
  if (text === undefined) return { ledger, isComplete: false, isStale: true };
  const { records, damaged, end } = parseRecords(text);
  for (const record of records as LedgerRecord[]) {
    const { v = 0 } = record;
    if (v > LEDGER_VERSION) {
      throw new OperatorError(
        `${path} is of version ${v}, written by a newer release; this one knows ${LEDGER_VERSION}`,
      );
    }
    applyRecord(ledger, record);
  }
  const isComplete = damaged === 0 && records.length > 0;
  if (!isComplete) log.error("ledger is damaged", { host, path, damaged, records: records.length });
  return { ledger, isComplete, isStale: !isComplete || end < Buffer.byteLength(text) };
}

/** Cuts, finishes or takes up every `.part`, and closes what is open in the ledger alone. */
async function recoverBatches(recovery: Recovery): Promise<void> {
  const { folder, ledger, isComplete, finishing } = recovery;
  const sealed = new Map((await readSealed(folder)).map((batch) => [batch.name, batch]));
  const names = (await listBatches(folder, "open")).map((part) => withState(part, "sealed"));
  for (const name of names) {
    const batch = newer(sealed.get(name), ledger.open.get(name));
    if (batch) await cutBack(recovery, withState(name, "open"), batch);
    else if (isComplete)
      await rm(join(folder, withState(name, "open"))); // begun by a commit that never ended
    else await adopt(recovery, name);
    if (sealed.has(name)) finishing.add(name);
  }
  for (const [name, { bytes }] of ledger.open) {
    if (names.includes(name) && !sealed.has(name)) continue;
    if (!sealed.has(name)) reportLoss(recovery, name, bytes);
    ledger.open.delete(name);
    recovery.isStale = true;
  }
}

/** A record of sealing that failed half way may be on disk, with lines committed behind it: the longer one counts. */
function newer(sealed: Committed | undefined, open: Committed | undefined): Committed | undefined {
  return sealed && open ? (open.bytes > sealed.bytes ? open : sealed) : (sealed ?? open);
}

/** Takes up a `.part` that no ledger knows: all of it may have been acknowledged, up to its last `\n`. */
async function adopt(recovery: Recovery, name: string): Promise<void> {
  const { host, folder, ledger, now, log } = recovery;
  const path = join(folder, withState(name, "open"));
  const batch: OpenBatch = { bytes: 0, lines: 0, endsAt: 0, at: now() };
  let read = 0;
  for await (const block of createReadStream(path) as AsyncIterable<Buffer>) {
    for (let at = block.indexOf(0x0a); at >= 0; at = block.indexOf(0x0a, at + 1)) {
      batch.lines++;
      batch.bytes = read + at + 1;
    }
    read += block.length;
  }
  if (batch.lines === 0) return rm(path);
  await truncate(path, batch.bytes);
  // The zone of its lines is not known any more; this machine's own is the best guess for when it ends.
  const { end } = parseWindow(parseBatchName(name)?.window ?? "");
  batch.endsAt = end + new Date(end).getTimezoneOffset() * 60_000;
  ledger.open.set(name, batch);
  log.error("batch is in no ledger: kept as it is", { host, batch: name, lines: batch.lines });
}

/** Brings every piece of a long line to its committed length. */
async function recoverPieces(recovery: Recovery): Promise<void> {
  const { folder, ledger, isComplete, now } = recovery;
  const names = (await readdir(folder)).filter((file) => file.startsWith(PIECE));
  for (const name of names) {
    const stream = ledger.streams.get(name.slice(PIECE.length));
    if (stream?.piece !== undefined) {
      const piece = { bytes: stream.piece };
      await cutBack(recovery, name, piece);
      stream.piece = piece.bytes;
    } else if (isComplete) await rm(join(folder, name));
    else
      await moveDurably(
        join(folder, name),
        join(folder, `${LEDGER}-lost-${now()}-${name.slice(PIECE.length)}`),
      );
  }
  for (const [name, stream] of ledger.streams) {
    if (stream.piece === undefined || names.includes(PIECE + name)) continue;
    reportLoss(recovery, PIECE + name, stream.piece);
    delete stream.piece;
  }
}

/** Cuts a file to its committed length; a file that is shorter has lost lines that were acknowledged. */
async function cutBack(recovery: Recovery, file: string, committed: Committed): Promise<void> {
  const path = join(recovery.folder, file);
  const { size } = await stat(path);
  if (size > committed.bytes) await truncate(path, committed.bytes);
  if (size >= committed.bytes) return;
  reportLoss(recovery, file, committed.bytes - size);
  committed.bytes = size;
}

function reportLoss(recovery: Recovery, file: string, bytes: number): void {
  const { host, log, ledger } = recovery;
  log.error("committed bytes are gone from the disk", { host, file, bytes });
  ledger.lost += bytes;
  recovery.isStale = true;
}
