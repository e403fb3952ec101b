/**
 * What a start makes of a sender's folder: brings the files back to what the ledger says is committed, whatever
 * instruction the last run ended at. Lines behind the committed length were never acknowledged and are cut off;
 * a batch whose name is in `.ledger-sealed` is to be finished. Where the ledger itself is gone or damaged,
 * nothing is cut that may have been acknowledged: such a `.part` is kept whole, and the operator is told.
 */
import { createReadStream } from "node:fs";
import { readdir, rm, stat, truncate } from "node:fs/promises";
import { join } from "node:path";
import { LEDGER, listBatches, parseWindow, withState } from "./batch.ts";
import { readIfExists, writeDurably } from "./durable.ts";
import {
  applyRecord,
  emptyLedger,
  formatRecord,
  LEDGER_VERSION,
  type Ledger,
  type LedgerRecord,
  parseRecords,
  readSealed,
  snapshot,
} from "./ledger.ts";
import { type Log, OperatorError } from "./service.ts";

/** A line whose end has not come is kept in a file of its own, named so and with its stream behind it. */
export const PIECE = `${LEDGER}-piece-`;

export interface RecoverOptions {
  now: () => number;
  log: Log;
}

/** A sender as it is after a start: what is committed, and the names that a crash left half sealed. */
export interface Recovered {
  ledger: Ledger;
  finishing: Set<string>;
}

/** Brings a sender's folder into order. Throws an OperatorError when a newer version wrote its ledger. */
export async function recoverSender(
  host: string,
  folder: string,
  options: RecoverOptions,
): Promise<Recovered> {
  const { ledger, isWhole, isClean } = await replay(host, folder, options.log);
  const finishing = await recoverBatches(host, folder, ledger, isWhole, options);
  await recoverPieces(host, folder, ledger, options.log);
  if (!isClean || finishing.changed) {
    await writeDurably(join(folder, LEDGER), formatRecord(snapshot(ledger)));
  }
  return { ledger, finishing: finishing.names };
}

/** Reads the ledger. `isWhole`: what it does not name was never acknowledged; `isClean`: it can be appended to. */
async function replay(host: string, folder: string, log: Log) {
  const path = join(folder, LEDGER);
  const text = await readIfExists(path);
  const ledger = emptyLedger();
  if (text === undefined) return { ledger, isWhole: false, isClean: false };
  const { records, damaged, end } = parseRecords(text);
  for (const record of records as LedgerRecord[]) {
    if ((record.v ?? 0) > LEDGER_VERSION) {
      throw new OperatorError(
        `${path} was written by a newer version (${record.v}); this one knows ${LEDGER_VERSION}`,
      );
    }
    applyRecord(ledger, record);
  }
  const isWhole = damaged === 0 && records.length > 0;
  if (!isWhole) log.error("ledger is damaged", { host, path, damaged, records: records.length });
  return { ledger, isWhole, isClean: isWhole && end === Buffer.byteLength(text) };
}

/** Cuts, finishes or takes up every `.part`, and closes what is open in the ledger alone. */
async function recoverBatches(
  host: string,
  folder: string,
  ledger: Ledger,
  isWhole: boolean,
  { now, log }: RecoverOptions,
): Promise<{ names: Set<string>; changed: boolean }> {
  const parts = await listBatches(folder, "open");
  const names = new Set<string>();
  let changed = false;
  const sealed = new Map((await readSealed(folder)).map((batch) => [batch.name, batch]));
  for (const part of parts) {
    const name = withState(part, "sealed");
    const path = join(folder, part);
    const { size } = await stat(path);
    const committed = sealed.get(name)?.bytes ?? ledger.open.get(name)?.bytes;
    if (committed === undefined && isWhole) {
      await rm(path); // it was begun by a commit that did not come to its end
      continue;
    }
    if (committed === undefined) {
      changed = true;
      await adopt(host, path, name, size, ledger, now());
      log.error("batch is in no ledger: kept as it is", { host, batch: name, bytes: size });
    } else if (size > committed) await truncate(path, committed);
    else if (size < committed) {
      changed = true;
      reportLoss(log, ledger, host, name, committed - size);
      const batch = ledger.open.get(name);
      if (batch) batch.bytes = size;
    }
    if (sealed.has(name)) {
      names.add(name);
      ledger.open.delete(name);
      changed = true;
    }
  }
  for (const [name, batch] of ledger.open) {
    if (parts.includes(withState(name, "open"))) continue;
    if (!sealed.has(name)) reportLoss(log, ledger, host, name, batch.bytes);
    ledger.open.delete(name);
    changed = true;
  }
  return { names, changed };
}

/** Takes up a `.part` that no ledger knows: all of it may have been acknowledged, up to its last `\n`. */
async function adopt(host: string, path: string, name: string, size: number, ledger: Ledger, now: number) {
  let bytes = 0;
  let lines = 0;
  let read = 0;
  for await (const block of createReadStream(path) as AsyncIterable<Buffer>) {
    for (let at = block.indexOf(0x0a); at >= 0; at = block.indexOf(0x0a, at + 1)) {
      lines++;
      bytes = read + at + 1;
    }
    read += block.length;
  }
  if (bytes < size) await truncate(path, bytes);
  if (bytes === 0) return rm(path);
  const window = /_(\d{8}_\d\d-\d\d)_/.exec(name)?.[1] ?? "";
  const zone = new Date(now).getTimezoneOffset() * 60_000; // the lines' own is not known here
  ledger.open.set(name, { bytes, lines, endsAt: parseWindow(window).end + zone, at: now });
  void host;
}

async function recoverPieces(host: string, folder: string, ledger: Ledger, log: Log): Promise<void> {
  const found = new Set<string>();
  for (const file of await readdir(folder)) {
    if (!file.startsWith(PIECE)) continue;
    const name = file.slice(PIECE.length);
    const path = join(folder, file);
    const stream = ledger.streams.get(name);
    if (stream?.piece === undefined) {
      await rm(path, { force: true });
      continue;
    }
    found.add(name);
    const { size } = await stat(path);
    if (size > stream.piece) await truncate(path, stream.piece);
    else if (size < stream.piece) {
      reportLoss(log, ledger, host, file, stream.piece - size);
      stream.piece = size;
    }
  }
  for (const [name, stream] of ledger.streams) {
    if (stream.piece === undefined || found.has(name)) continue;
    reportLoss(log, ledger, host, PIECE + name, stream.piece);
    delete stream.piece;
  }
}

function reportLoss(log: Log, ledger: Ledger, host: string, file: string, bytes: number): void {
  log.error("committed bytes are gone from the disk", { host, file, bytes });
  ledger.lost += bytes;
}
