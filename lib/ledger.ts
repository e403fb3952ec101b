/**
 * The receiver's own record of what is committed, one per sender: `.ledger` in the sender's folder. It is a checkpoint:
 * one line of JSON behind its CRC-32, replaced whole in the background; what was answered since is in the journal
 * (lib/store/journal.ts). Monitor, forwarder, housekeep and status page read; only the receiver writes.
 *
 * A ledger of version 1.0 was appended: many records, a later one replaces an earlier one, and `.ledger-sealed` beside
 * it had the names that were used. It is read as well.
 */
import { stat } from "node:fs/promises";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { LEDGER, parseBatchName } from "./batch.ts";
import { ifMissing, readIfExists } from "./durable.ts";

export const LEDGER_VERSION = 2;
/** The used names of a ledger of version 1.0. */
export const SEALED = `${LEDGER}-sealed`;

/** Minutes of the history of lines per minute that a ledger keeps: the curves of the status page. */
export const HISTORY_MINUTES = 240;

/** Where a stream stands. Times are milliseconds since the epoch, by the receiver's clock. */
export interface StreamRecord {
  offset: number;
  at: number;
  /** Window of its last line, where a line without timestamp goes. */
  window?: string;
  /** End of that window, milliseconds since the epoch. */
  windowEnd?: number;
  /** Bytes of a line whose `\n` has not come yet, kept in a file of their own, and where in the source they begin. */
  piece?: number;
  pieceFrom?: number;
  /** Of the bytes just before `offset`, and of the first bytes of the file: `Log-Mark` and `Log-Head`. */
  mark?: string;
  head?: string;
  /** Whether a line of it ever came. */
  lined?: boolean;
  /** It ships again what was lost here, and has not come to its end yet. */
  again?: true;
  /** Bytes that the sender still had to ship, as a ledger of 1.0 has it. */
  lag?: number;
}

export interface OpenBatch {
  /** Committed length of the `.part` in bytes; what is behind it was never acknowledged. */
  bytes: number;
  lines: number;
  /** When its window is over, milliseconds since the epoch, by the offset in its timestamps. */
  endsAt: number;
  at: number;
  /** When its first line came; absent in a ledger of 1.0. */
  firstAt?: number;
  /** The lowest source offset of each stream in it; absent for a batch that 1.0 began. */
  lowest?: Record<string, number>;
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
  at: number;
  /** As of an open batch; dropped when the batch is seen to be delivered. */
  lowest?: Record<string, number>;
  /** Whether it may still wait in the sender's folder or in failed/. */
  waits?: boolean;
}

/** One cursor of a shipper that spoke for this sender: two that alternate are two machines under one name. */
export interface ShipperSeen {
  id: string;
  /** Bytes that vanished before they could be read, as it told: its total. */
  lost: number;
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
  lag?: number;
  /** Offset from UTC of its newest line's timestamp, in minutes. */
  zone?: number;
  /** Totals since the ledger began: lines left out by rules, lines without timestamp, lines of a clock that is ahead. */
  skipped?: number;
  untimed?: number;
  ahead?: number;
  /** Bytes that were acknowledged and are gone from this disk (removed by hand, damaged): total. */
  gone?: number;
  shippers?: ShipperSeen[];
  /** Two shippers alternate under this name; until then (ms) no hour of this host is complete. */
  contestedUntil?: number;
  /** The receiver's `forgetAfterDays`: a sender that is silent for longer is not waited for. */
  forgetAfterDays?: number;
  /** When an operator had it forgotten; until it is heard again. ms since the epoch. */
  forgotten?: number;
  /** What was shipped again after the receiver's folder was lost: bytes at most, and files; totals. */
  again?: number;
  againFiles?: number;
}

export interface Ledger {
  facts: SenderFacts;
  /** When anything, also a heartbeat, was last heard. */
  heardAt: number;
  lineAt: number;
  /** Bytes that vanished unread since the ledger began, as the sender told. */
  lost: number;
  streams: Map<string, StreamRecord>;
  /** Open batches by the name that they will have when sealed. */
  open: Map<string, OpenBatch>;
  /** Sealed batches of the last days, and all that may still wait. */
  sealed: Map<string, SealedBatch>;
  /** The newest part number that was used in each window. */
  used: Map<string, number>;
  /** Up to this window names may have been used that nobody remembers. */
  unsure: string;
  /** Up to which record of which journal this is a checkpoint. */
  journal?: { id: string; seq: number };
  minutes: Map<number, number>;
  /** It stands on disk, and nothing of it can be read: that its sender has nothing must not be concluded. */
  isDamaged?: boolean;
}

type Recorded<T> = T extends Map<unknown, infer V> ? Record<string, V> : T;
export type LedgerRecord = { [K in keyof Omit<Ledger, "isDamaged">]?: Recorded<Ledger[K]> } & {
  v?: number;
  closed?: string[];
};

export function emptyLedger(): Ledger {
  return {
    facts: {},
    heardAt: 0,
    lineAt: 0,
    lost: 0,
    streams: new Map(),
    open: new Map(),
    sealed: new Map(),
    used: new Map(),
    unsure: "",
    minutes: new Map(),
  };
}

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

/** What a ledger's text says: its records, and how many of its whole lines are damaged. */
export function parseRecords(text: string): { records: unknown[]; damaged: number } {
  const found = text.split("\n").slice(0, -1).map(parseRecord);
  const records = found.filter((record) => record !== undefined);
  return { records, damaged: found.length - records.length };
}

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
  for (const [minute, lines] of Object.entries(record.minutes ?? {}))
    setMinute(ledger, Number(minute), lines);
  for (const name of record.closed ?? []) ledger.open.delete(name);
  for (const [name, batch] of Object.entries(record.sealed ?? {})) ledger.sealed.set(name, batch);
  for (const [window, part] of Object.entries(record.used ?? {})) ledger.used.set(window, part);
  if (record.facts) ledger.facts = record.facts;
  if (record.unsure !== undefined) ledger.unsure = record.unsure;
  if (record.journal) ledger.journal = record.journal;
}

/** Counts lines that came at the time `at`, in milliseconds since the epoch. */
export function countMinute(ledger: Ledger, lines: number, at: number): void {
  const minute = Math.floor(at / 60_000);
  setMinute(ledger, minute, (ledger.minutes.get(minute) ?? 0) + lines);
}

/** Keeps one more than is told: the minute that still runs. */
function setMinute({ minutes }: Ledger, minute: number, lines: number): void {
  minutes.set(minute, lines);
  const [oldest] = minutes.keys();
  if (minutes.size > HISTORY_MINUTES + 1 && oldest !== undefined) minutes.delete(oldest);
}

export function snapshot({ isDamaged: _, ...ledger }: Ledger): LedgerRecord {
  const recorded = Object.entries(ledger).map(([key, value]) => [
    key,
    value instanceof Map ? Object.fromEntries(value) : value,
  ]);
  return { v: LEDGER_VERSION, ...Object.fromEntries(recorded) };
}

/** A sender's ledger as it stands on disk, for readers; undefined when the sender has none. */
export async function readLedger(hostFolder: string): Promise<Ledger | undefined> {
  const text = await readIfExists(join(hostFolder, LEDGER));
  if (text === undefined) return undefined;
  const ledger = emptyLedger();
  const { records } = parseRecords(text);
  for (const record of records) applyRecord(ledger, record as LedgerRecord);
  if (text !== "" && records.length === 0) ledger.isDamaged = true;
  if ((records[0] as LedgerRecord | undefined)?.v !== LEDGER_VERSION) await readOldNames(hostFolder, ledger);
  return ledger;
}

async function readOldNames(hostFolder: string, ledger: Ledger): Promise<void> {
  const text = await readIfExists(join(hostFolder, SEALED));
  if (text === undefined) return;
  for (const record of parseRecords(text).records as (SealedBatch | Forgotten)[]) {
    if ("forgotten" in record) ledger.unsure = record.forgotten;
    else noteSealed(ledger, { ...record, waits: true });
  }
}

/** Takes a batch among the sealed ones; its name is used up. */
export function noteSealed(ledger: Ledger, batch: SealedBatch): void {
  ledger.sealed.set(batch.name, batch);
  useUpName(ledger, batch.name);
}

/** No other batch of this window has the name's number, or a lower one, from now on. */
export function useUpName(ledger: Ledger, name: string): void {
  const { window = "", part = 1 } = parseBatchName(name) ?? {};
  ledger.used.set(window, Math.max(part, ledger.used.get(window) ?? 0));
}

/** A `readLedger` for those who look again and again: a file that has not changed is not read again. */
export function createLedgerReader(): typeof readLedger {
  const known = new Map<string, { key: string; ledger: Ledger }>();
  return async (hostFolder) => {
    const info = await ifMissing(stat(join(hostFolder, LEDGER), { bigint: true }));
    const key = info ? `${info.ino} ${info.size} ${info.mtimeNs}` : "";
    const last = known.get(hostFolder);
    if (last && last.key === key) return last.ledger;
    known.delete(hostFolder);
    const ledger = await readLedger(hostFolder);
    if (ledger) known.set(hostFolder, { key, ledger });
    return ledger;
  };
}
