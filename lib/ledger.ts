/**
 * The receiver's own record of what is committed, one per sender, in the sender's folder:
 *
 *   .ledger         where each stream stands, and the length of each open batch: appended and synced with every
 *                   commit, rewritten when it has grown
 *   .ledger-sealed  every batch name that was ever sealed, with lines and bytes: a name is never used twice
 *
 * Both are text, one record a line behind the CRC-32 of it. Records are absolute ("stream X is at 4711"), so a
 * later one replaces an earlier one and a damaged one in between costs nothing but itself. A last line that is
 * torn or wrong was never acknowledged. Monitor, housekeeping and status page read; only the receiver writes.
 */
import { open } from "node:fs/promises";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { LEDGER } from "./batch.ts";
import { readIfExists } from "./durable.ts";

export const LEDGER_VERSION = 1;
export const SEALED = `${LEDGER}-sealed`;

/** Minutes of the history of lines per minute that a ledger keeps: the curves of the status page. */
export const HISTORY_MINUTES = 240;

/** Where a stream stands. Times are milliseconds since the epoch, by the receiver's clock. */
export interface Stream {
  /** One past the last byte of the source file that is committed. */
  offset: number;
  /** When it was last heard of. */
  at: number;
  /** Window of its last line, where a line without timestamp goes. */
  window?: string;
  /** End of that window, milliseconds since the epoch. */
  windowEnd?: number;
  /** Bytes of a line whose `\n` has not come yet, kept in a file of their own. */
  piece?: number;
  /** Bytes that the sender still had to ship, as it told last. */
  lag?: number;
}

/** A batch that is still open. */
export interface OpenBatch {
  /** Committed length of the `.part` in bytes; what is behind it was never acknowledged. */
  bytes: number;
  lines: number;
  /** When its window is over, milliseconds since the epoch, by the offset in its timestamps. */
  endsAt: number;
  /** When its last line came. */
  at: number;
}

/** First line of a `.ledger-sealed` that was trimmed: the newest window that it no longer lists. */
export interface Forgotten {
  forgotten: string;
}

/** A line of `.ledger-sealed`. */
export interface SealedBatch {
  name: string;
  bytes: number;
  lines: number;
  /** When it was sealed. */
  at: number;
}

/** One cursor of a shipper that spoke for this sender: two that alternate are two machines under one name. */
export interface ShipperSeen {
  id: string;
  /** Bytes that vanished before they could be read, as it told: its total. */
  lost: number;
  /** When it was last heard, and from which address. */
  heardAt: number;
  peer: string;
}

/** What a sender tells of itself and what is counted of its lines; a ledger of version 1.0 has none of it. */
export interface SenderFacts {
  /** Name and version of its program, and the address it last came from. */
  agent?: string;
  peer?: string;
  /** The newest `Log-Through`, capped to the receiver's clock; with it every line up to then is stored. ms since the epoch. */
  through?: number;
  /** Bytes that it still has to ship, as it told last. */
  lag?: number;
  /** Offset from UTC of its newest line's timestamp, in minutes. */
  zone?: number;
  /** Totals since the ledger began: lines left out by rules, lines without timestamp, lines of a clock that is ahead. */
  skipped?: number;
  untimed?: number;
  ahead?: number;
  /** Bytes that were acknowledged and are gone from this disk (removed by hand, damaged): total. */
  gone?: number;
  /** The last 8 shippers, newest last. */
  shippers?: ShipperSeen[];
  /** Two shippers alternate under this name; until then (ms) no hour of this host is complete. */
  contestedUntil?: number;
  /** What was shipped again after the receiver's folder was lost: bytes, total. */
  again?: number;
}

/** What is known of one sender. */
export interface Ledger {
  facts: SenderFacts;
  /** When anything, also a heartbeat, was last heard. */
  heardAt: number;
  /** When the last line came; 0 for never. */
  lineAt: number;
  /** Bytes that vanished unread since the ledger began, as the sender told. */
  lost: number;
  streams: Map<string, Stream>;
  /** Open batches by the name that they will have when sealed. */
  open: Map<string, OpenBatch>;
  /** Lines that came in each of the last minutes, by minutes since the epoch. */
  minutes: Map<number, number>;
}

/** One commit: what it changes, as absolute values. */
export interface LedgerRecord {
  v?: typeof LEDGER_VERSION;
  heardAt?: number;
  lineAt?: number;
  lost?: number;
  streams?: Record<string, Stream>;
  open?: Record<string, OpenBatch>;
  /** Lines per minute, see {@link countMinute}. */
  minutes?: Record<string, number>;
  /** Names that are no longer open. */
  closed?: string[];
}

export function emptyLedger(): Ledger {
  return {
    facts: {},
    heardAt: 0,
    lineAt: 0,
    lost: 0,
    streams: new Map(),
    open: new Map(),
    minutes: new Map(),
  };
}

/** A record as its line: CRC-32 in hex, the JSON, `\n`. */
export function formatRecord(record: LedgerRecord | SealedBatch | Forgotten): string {
  const json = JSON.stringify(record);
  return `${crc32(json).toString(16).padStart(8, "0")} ${json}\n`;
}

/** The record of a line without its `\n`, or undefined when the line is damaged. */
export function parseRecord(line: string): unknown {
  const json = line.slice(9);
  if (line[8] !== " " || crc32(json).toString(16).padStart(8, "0") !== line.slice(0, 8)) return undefined;
  return JSON.parse(json);
}

/** What a ledger's text says: its records, how many lines are damaged, and where the last whole line ends. */
export function parseRecords(text: string): { records: unknown[]; damaged: number; end: number } {
  const end = text.lastIndexOf("\n") + 1;
  const records: unknown[] = [];
  let damaged = 0;
  for (const line of text.slice(0, end).split("\n").slice(0, -1)) {
    const record = parseRecord(line);
    if (record === undefined) damaged++;
    else records.push(record);
  }
  return { records, damaged, end: Buffer.byteLength(text.slice(0, end)) };
}

/** Applies one record to what is known. */
export function applyRecord(ledger: Ledger, record: LedgerRecord): void {
  if (record.heardAt !== undefined) ledger.heardAt = record.heardAt;
  if (record.lineAt !== undefined) ledger.lineAt = record.lineAt;
  if (record.lost !== undefined) ledger.lost = record.lost;
  for (const [name, stream] of Object.entries(record.streams ?? {})) {
    // A sender tells the lag of all its files with each chunk: what it told last, counts.
    if (stream.lag !== undefined) for (const other of ledger.streams.values()) delete other.lag;
    ledger.streams.set(name, stream);
  }
  for (const [name, batch] of Object.entries(record.open ?? {})) ledger.open.set(name, batch);
  for (const [minute, lines] of Object.entries(record.minutes ?? {})) {
    ledger.minutes.set(Number(minute), lines);
    const oldest = ledger.minutes.keys().next().value;
    // one more than told: the minute that still runs
    if (ledger.minutes.size > HISTORY_MINUTES + 1 && oldest !== undefined) ledger.minutes.delete(oldest);
  }
  for (const name of record.closed ?? []) ledger.open.delete(name);
}

/**
 * What `lines` more lines at the time `at` make of that minute's count: the `minutes` of a commit's record.
 * `counted` is what the same commit has counted so far.
 */
export function countMinute(
  ledger: Ledger,
  lines: number,
  at: number,
  counted: LedgerRecord["minutes"] = {},
): Record<string, number> {
  const minute = Math.floor(at / 60_000);
  return { ...counted, [minute]: (counted[minute] ?? ledger.minutes.get(minute) ?? 0) + lines };
}

/** The whole ledger as one record, for compaction. */
export function snapshot(ledger: Ledger): LedgerRecord {
  return {
    v: LEDGER_VERSION,
    heardAt: ledger.heardAt,
    lineAt: ledger.lineAt,
    lost: ledger.lost,
    streams: Object.fromEntries(ledger.streams),
    open: Object.fromEntries(ledger.open),
    minutes: Object.fromEntries(ledger.minutes),
  };
}

/** A sender's ledger as it stands on disk, for readers; undefined when the sender has none. */
export async function readLedger(hostFolder: string): Promise<Ledger | undefined> {
  const text = await readIfExists(join(hostFolder, LEDGER));
  if (text === undefined) return undefined;
  const ledger = emptyLedger();
  for (const record of parseRecords(text).records) applyRecord(ledger, record as LedgerRecord);
  return ledger;
}

/**
 * A `readLedger` for those who look again and again: of a ledger that has grown, only what is new is read. A record
 * that the receiver took back after a failed write may be told until the next compaction: for display alone.
 */
export function createLedgerReader(): typeof readLedger {
  const known = new Map<string, { ino: number; end: number; ledger: Ledger }>();
  return async (hostFolder) => {
    const file = await open(join(hostFolder, LEDGER), "r").catch((error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return undefined;
      throw error;
    });
    if (!file) return undefined;
    try {
      const { ino, size } = await file.stat();
      const last = known.get(hostFolder);
      const { end, ledger } =
        last?.ino === ino && last.end <= size ? last : { end: 0, ledger: emptyLedger() };
      const block = Buffer.alloc(size - end);
      const { bytesRead } = await file.read(block, 0, block.length, end);
      const news = parseRecords(block.toString("utf8", 0, bytesRead));
      for (const record of news.records) applyRecord(ledger, record as LedgerRecord);
      known.set(hostFolder, { ino, end: end + news.end, ledger });
      return ledger;
    } finally {
      await file.close();
    }
  };
}

/** Every batch of a sender that was ever sealed (within the time that the receiver remembers), oldest first. */
export async function readSealed(hostFolder: string): Promise<SealedBatch[]> {
  const text = await readIfExists(join(hostFolder, SEALED));
  const records = text === undefined ? [] : (parseRecords(text).records as (SealedBatch | Forgotten)[]);
  return records.filter((record) => "name" in record);
}
