/**
 * The pipeline: where every line is at this moment, read from what the scripts leave on disk for everyone to
 * read: the shippers' cursors, the receiver's ledger, the folders and the forwarder's report.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { parseBatchName } from "../lib/batch.ts";
import { readLedger } from "../lib/ledger.ts";
import { readCursor } from "../lib/tail/cursor.ts";
import { dashed } from "./account.ts";
import type { Places } from "./fleet.ts";
import { linesWithin, type Writer } from "./traffic.ts";

/** Lines of one host by the place that they have reached. */
export interface HostRow {
  host: string;
  written: number;
  /** The receiver has them, or the shipper's cursor, which is saved behind the answer, is past them. */
  shipped: number;
  /** They stand in a batch. */
  received: number;
  delivered: number;
  windows: Map<string, WindowState>;
}

/** Lines of one host in one window by the state of their batch, and how many batches there are. */
export interface WindowState {
  open: number;
  sealed: number;
  delivered: number;
  batches: number;
}

/** One look at everything. */
export async function readPipeline(places: Places, writers: Writer[]): Promise<HostRow[]> {
  const delivered = readReport(places.report);
  const rows: HostRow[] = [];
  for (const writer of writers) {
    const folder = join(places.batches, writer.host);
    const ledger = await readLedger(folder);
    const batches = new Map<string, { state: "open" | "sealed" | "delivered"; lines: number }>();
    for (const [name, { lines }] of ledger?.open ?? []) batches.set(name, { state: "open", lines });
    for (const { name, lines } of ledger?.sealed.values() ?? []) {
      batches.set(name, { state: delivered.has(name) ? "delivered" : "sealed", lines });
    }
    const windows = new Map<string, WindowState>();
    let received = 0;
    for (const [name, { state, lines }] of batches) {
      const window = parseBatchName(name)?.window ?? "";
      const known = windows.get(window) ?? { open: 0, sealed: 0, delivered: 0, batches: 0 };
      windows.set(window, { ...known, [state]: known[state] + lines, batches: known.batches + 1 });
      received += lines;
    }
    rows.push({
      host: writer.host,
      written: writer.lines,
      shipped: Math.max(received, linesWithin(writer, await shippedBytes(places.host(writer.host)))),
      received,
      delivered: sumOf(delivered, dashed(writer.host)),
      windows,
    });
  }
  return rows;
}

/** Bytes of all files of a host's log that its shipper is done with, by its cursor. */
async function shippedBytes(machine: string): Promise<number> {
  const found = await readCursor(join(machine, "state"));
  if (!("cursor" in found)) return 0;
  return found.cursor.streams.reduce((sum, { offset }) => sum + offset, 0);
}

/** Lines that the forwarder reports as sent, by batch: a batch that was sent again after a crash counts once. */
function readReport(file: string): Map<string, number> {
  const sent = new Map<string, number>();
  for (const line of readOrEmpty(file).split("\n")) {
    const [, name, lines, status] = line.split(" | ");
    if (name && status === "status=Sent") sent.set(name, Number(lines?.replace("lines=", "")));
  }
  return sent;
}

function sumOf(delivered: Map<string, number>, host: string): number {
  let sum = 0;
  for (const [name, lines] of delivered) if (parseBatchName(name)?.host === host) sum += lines;
  return sum;
}

function readOrEmpty(file: string): string {
  try {
    return readFileSync(file, "utf8");
  } catch {
    return ""; // the forwarder has not reported anything yet
  }
}

/** The mails' files, oldest first. */
export function listMails(places: Places): string[] {
  return readdirSync(places.mails)
    .filter((name) => name.endsWith(".eml"))
    .sort();
}
