/**
 * Batch names, windows and folders: formatting and parsing stand side by side here, and nobody else splits a
 * name. The file system is the queue: what `parseBatchName` does not know is not ours and left alone.
 *
 *   <dir>/<host>/<batch>.log.part   open          <dir>/sent/<batch>.log[.gz]   delivered
 *   <dir>/<host>/<batch>.log        sealed        <dir>/failed/<batch>.log      delivery failed, tried again
 */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { parseHost } from "./host.ts";

export const SENT = "sent";
export const FAILED = "failed";
/** Every file of the receiver's own record in a host's folder begins so. */
export const LEDGER = ".ledger";

export type BatchState = "open" | "sealed" | "compressed";
const SUFFIX: Record<BatchState, string> = { open: ".log.part", sealed: ".log", compressed: ".log.gz" };

export interface BatchName {
  prefix: string;
  /** Hour and window as written in the lines, `yyMMddHH_mm-mm`: sorts by time. */
  window: string;
  /** The host with dots and colons as dashes. */
  host: string;
  /** 1 for the first; later lines of a window that was sealed go to 2, 3, … */
  part: number;
  state: BatchState;
}

const NAME =
  /^(?<prefix>[A-Za-z0-9][A-Za-z0-9_-]*)_(?<window>\d{8}_\d\d-\d\d)_(?<host>[a-z0-9-]+)(?:\.(?<part>[1-9]\d{0,14}))?\.log(?<end>\.part|\.gz)?$/;

/** `accessLog_26112206_20-39_10-10-21-181.2.log` with the ending of its state. */
export function formatBatchName({ prefix, window, host, part, state }: BatchName): string {
  return `${prefix}_${window}_${host}${part > 1 ? `.${part}` : ""}${SUFFIX[state]}`;
}

/** The parts of a batch's file name, or undefined when it is none: it never throws and never guesses. */
export function parseBatchName(name: string): BatchName | undefined {
  const groups = name.length <= 255 ? NAME.exec(name)?.groups : undefined;
  if (!groups) return undefined;
  const { prefix = "", window = "", host = "", part, end } = groups;
  if (part === "1" || !windowIsValid(window)) return undefined;
  const state = end === ".part" ? "open" : end === ".gz" ? "compressed" : "sealed";
  return { prefix, window, host, part: Number(part ?? 1), state };
}

export function withState(name: string, state: BatchState): string {
  const batch = parseBatchName(name);
  if (!batch) throw new Error(`Cannot rename "${name}": not a batch name`);
  return formatBatchName({ ...batch, state });
}

export function dashedHost(host: string): string {
  return host.replace(/[.:]/g, "-");
}

/** The window of a time, as UTC milliseconds of its wall clock: add the zone's offset. `windowMinutes` divides 60. */
export function formatWindow(wall: number, windowMinutes: number): string {
  const at = new Date(wall);
  const day = `${two(at.getUTCFullYear() % 100)}${two(at.getUTCMonth() + 1)}${two(at.getUTCDate())}`;
  const first = at.getUTCMinutes() - (at.getUTCMinutes() % windowMinutes);
  return `${day}${two(at.getUTCHours())}_${two(first)}-${two(first + windowMinutes - 1)}`;
}

/** Start and end (exclusive) of a window as UTC milliseconds of its wall clock: subtract the zone's offset. */
export function parseWindow(window: string): { start: number; end: number } {
  const n = (from: number) => Number(window.slice(from, from + 2));
  const start = Date.UTC(2000 + n(0), n(2) - 1, n(4), n(6), n(9));
  return { start, end: start + (n(12) - n(9) + 1) * 60_000 };
}

function windowIsValid(window: string): boolean {
  const { start, end } = parseWindow(window);
  const minutes = (end - start) / 60_000;
  if (minutes < 1 || minutes > 60 || 60 % minutes !== 0) return false;
  return formatWindow(start, minutes) === window; // refuses day 99, hour 24 and one that does not start at a multiple
}

function two(n: number): string {
  return n < 10 ? `0${n}` : String(n);
}

/** Oldest window first, then host, then part: the order in which batches are delivered. */
export function compareBatchNames(a: string, b: string): number {
  const x = parseBatchName(a);
  const y = parseBatchName(b);
  return x && y ? compareBatches(x, y) : a < b ? -1 : a > b ? 1 : 0;
}

function compareBatches(x: BatchName, y: BatchName): number {
  if (x.window !== y.window) return x.window < y.window ? -1 : 1;
  if (x.host !== y.host) return x.host < y.host ? -1 : 1;
  return x.part - y.part;
}

/** The hosts that have a folder in `dir`, by name; symlinks, our own folders, lost+found and the like are no hosts. */
export async function listHosts(dir: string): Promise<string[]> {
  const entries = await readdir(dir, { withFileTypes: true });
  const folders = entries.filter((entry) => entry.isDirectory() && parseHost(entry.name) === entry.name);
  return folders.map((entry) => entry.name).sort();
}

/** Whether a host's folder is a copy of another's, made by hand: it has names of batches, and none that this host would have. */
export function isCopy(host: string, ...lists: Iterable<string>[]): boolean {
  const dashed = dashedHost(host);
  let some = false;
  for (const list of lists) {
    for (const name of list) {
      if (parseBatchName(name)?.host === dashed) return false;
      some = true;
    }
  }
  return some;
}

/** File names of the batches of these states in a folder, in delivery order; empty when there is no folder. */
export async function listBatches(folder: string, ...states: BatchState[]): Promise<string[]> {
  const entries = await readdir(folder, { withFileTypes: true }).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return [];
    throw error;
  });
  const found: { name: string; batch: BatchName }[] = [];
  for (const entry of entries) {
    const batch = entry.isFile() ? parseBatchName(entry.name) : undefined;
    if (batch && states.includes(batch.state)) found.push({ name: entry.name, batch });
  }
  // each name is parsed once, not once per comparison: a queue may hold many thousands
  return found.sort((a, b) => compareBatches(a.batch, b.batch)).map(({ name }) => name);
}

/** The folders of `dir`: one per host, the two of the forwarder, and one for the metrics of parts without a port. */
export function folders(dir: string) {
  return {
    host: (host: string) => join(dir, host),
    sent: join(dir, SENT),
    failed: join(dir, FAILED),
    metrics: join(dir, ".metrics"),
  };
}
