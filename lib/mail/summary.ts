/**
 * The account of one hour: for each sender what was received, and where it is now. Read from what the receiver
 * and the forwarder write: sealed and open batches, the report, and the folders.
 *
 * An hour is that of the batch names, the wall clock of the lines. How far a sender's wall clock is from UTC
 * is told by its ledger: the end of a window as written, and the same as an instant. Hours end for all senders at
 * the same instants; a sender in another zone has the hour of its own clock that ended then.
 */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { FAILED, folders, listHosts, parseBatchName, parseWindow } from "../batch.ts";
import type { Config } from "../config.ts";
import { exists } from "../durable.ts";
import { type Ledger, readLedger, readSealed, type SealedBatch } from "../ledger.ts";
import { readReportTail } from "../report.ts";

export const HOUR_MS = 3_600_000;
/** Hours of the curve. */
const CURVE_HOURS = 24;
/** How much of the report's end is read, in bytes: some 150,000 deliveries. */
const REPORT_BYTES = 16 * 1024 * 1024;

export interface Amount {
  files: number;
  lines: number;
  bytes: number;
}

/** What one sender wrote in the hour. `received` = delivered + waiting + failed + missing. */
export interface HourRow {
  host: string;
  /** The hour on the sender's clock, `2026-11-22 06:00`. */
  hour: string;
  received: Amount;
  delivered: Amount;
  /** Sealed or still open, not delivered yet. */
  waiting: Amount;
  failed: Amount;
  /** Was sealed, and is neither in a folder nor in the report. */
  missing: Amount;
  /** Delivered with another number of lines than received. */
  differs: number;
  /** Files that are second and later parts of their window. */
  late: number;
  /** `silent`: nothing was heard of the sender since; more may come when it is back. */
  state: "complete" | "incomplete" | "silent";
}

export interface HourSummary {
  /** End of the hour, milliseconds since the epoch. */
  end: number;
  /** The hour on most senders' clocks, `2026-11-22 06:00`. */
  hour: string;
  rows: HourRow[];
  /** Sums over all senders. */
  total: Pick<HourRow, "received" | "delivered" | "waiting" | "failed" | "missing" | "differs" | "late">;
  /** Batches of earlier hours that were sealed after the summary before this one. */
  stragglers: Amount;
  /** Lines of each of the 24 hours up to this one, oldest first. */
  curve: number[];
}

/** The offset of a sender's wall clock from UTC in milliseconds, as its latest lines tell; undefined without any. */
export function zoneOffset({ streams, open }: Ledger): number | undefined {
  const latest = [...streams.values()]
    .filter((s) => s.windowEnd !== undefined)
    .sort((a, b) => b.at - a.at)[0];
  if (latest?.window && latest.windowEnd !== undefined)
    return parseWindow(latest.window).end - latest.windowEnd;
  for (const [name, { endsAt }] of open) {
    const batch = parseBatchName(name);
    if (batch) return parseWindow(batch.window).end - endsAt;
  }
  return undefined;
}

/** The offset that most senders have; this machine's when none tells one. */
export function commonOffset(offsets: (number | undefined)[], now: number): number {
  const count = new Map<number, number>();
  for (const offset of offsets) if (offset !== undefined) count.set(offset, (count.get(offset) ?? 0) + 1);
  const [most] = [...count].sort((a, b) => b[1] - a[1]);
  return most?.[0] ?? -new Date(now).getTimezoneOffset() * 60_000;
}

/** The end of the latest hour, at wall clocks of this offset, that had ended at `now`. */
export function lastHourEnd(now: number, offset: number): number {
  return Math.floor((now + offset) / HOUR_MS) * HOUR_MS - offset;
}

/** Makes the account of the hour that ended at `end`, for all senders that are known or expected. */
export async function summariseHour(
  { dir, report, expected, summaryMinute }: Config["monitor"],
  end: number,
): Promise<HourSummary> {
  const present = await listHosts(dir);
  const ledgers = new Map<string, Ledger | undefined>();
  for (const host of present) ledgers.set(host, await readLedger(folders(dir).host(host)));
  const offsets = [...ledgers.values()].map((ledger) => ledger && zoneOffset(ledger));
  const common = commonOffset(offsets, end);
  const dueAt = end + summaryMinute * 60_000;
  const whereabouts = await findWhereabouts(dir, report);
  const summary: HourSummary = {
    end,
    hour: formatHour(end - HOUR_MS + common),
    rows: [],
    total: { ...emptyAmounts(), differs: 0, late: 0 },
    stragglers: emptyAmount(),
    curve: new Array(CURVE_HOURS).fill(0),
  };
  for (const host of [...new Set([...expected, ...present])].sort()) {
    const ledger = ledgers.get(host);
    const wallEnd = lastHourEnd(end + ((ledger && zoneOffset(ledger)) ?? common), 0);
    await addHost(summary, {
      dir,
      host,
      ledger,
      wallEnd,
      whereabouts,
      dueAt,
      expected: expected.includes(host),
    });
  }
  return summary;
}

/** Where batches are, by name: what the report says of them, and what stands in failed/. */
interface Whereabouts {
  sent: Map<string, number>;
  failed: Set<string>;
}

async function findWhereabouts(dir: string, report: string): Promise<Whereabouts> {
  const lines = (await readReportTail(report, REPORT_BYTES)).filter(({ status }) => status === "Sent");
  const failed = await readdir(join(dir, FAILED)).catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return [];
    throw error;
  });
  return { sent: new Map(lines.map((line) => [line.batch, line.lines])), failed: new Set(failed) };
}

interface HostHour {
  dir: string;
  host: string;
  ledger: Ledger | undefined;
  /** End of the hour on the sender's clock. */
  wallEnd: number;
  whereabouts: Whereabouts;
  /** When the summary of this hour is due. */
  dueAt: number;
  /** Whether the sender stands in the account also when it is long gone. */
  expected: boolean;
}

async function addHost(summary: HourSummary, hostHour: HostHour): Promise<void> {
  const { host, ledger, wallEnd, dueAt, expected } = hostHour;
  const amounts = { ...emptyAmounts(), differs: 0, late: 0 };
  const hour = formatHour(wallEnd - HOUR_MS);
  const row: HourRow = { host, hour, ...amounts, state: hourState(ledger, summary.end) };
  for (const batch of await listKnown(hostHour)) {
    const { window = "" } = parseBatchName(batch.name) ?? {};
    const age = Math.floor((wallEnd - 1 - parseWindow(window).start) / HOUR_MS); // in hours; 0 is this one
    const curveAt = CURVE_HOURS - 1 - age;
    if (age >= 0 && age < CURVE_HOURS) summary.curve[curveAt] = (summary.curve[curveAt] ?? 0) + batch.lines;
    if (age > 0 && batch.at > dueAt - HOUR_MS && batch.at <= dueAt) add(summary.stragglers, batch);
    if (age === 0) await addBatch(row, batch, hostHour);
  }
  const isGone = !expected && (ledger?.heardAt ?? 0) < summary.end - CURVE_HOURS * HOUR_MS;
  if (isGone && row.received.files === 0) return;
  summary.rows.push(row);
  for (const place of ["received", "delivered", "waiting", "failed", "missing"] as const) {
    add(summary.total[place], row[place], row[place].files);
  }
  summary.total.differs += row.differs;
  summary.total.late += row.late;
}

/** Every batch of the sender that the receiver remembers; of open ones `at` is 0. */
async function listKnown({ dir, host, ledger }: HostHour): Promise<SealedBatch[]> {
  const sealed = await readSealed(folders(dir).host(host));
  const names = new Set(sealed.map(({ name }) => name));
  const open = [...(ledger?.open ?? [])].filter(([name]) => !names.has(name));
  return [...sealed, ...open.map(([name, { lines, bytes }]) => ({ name, lines, bytes, at: 0 }))];
}

async function addBatch(
  row: HourRow,
  batch: SealedBatch,
  { dir, host, whereabouts }: HostHour,
): Promise<void> {
  const open = batch.at === 0;
  const place = open ? "waiting" : await whereIs(dir, host, batch.name, whereabouts);
  add(row.received, batch);
  add(row[place], batch);
  if ((parseBatchName(batch.name)?.part ?? 1) > 1) row.late++;
  if (open && row.state === "complete") row.state = "incomplete"; // more lines may come
  const sentLines = whereabouts.sent.get(batch.name);
  if (place === "delivered" && sentLines !== undefined && sentLines !== batch.lines) row.differs++;
}

/**
 * Complete when every stream that was heard of since the hour's end has moved past it or has nothing left to
 * ship; a sender that was not heard of since may have more.
 */
function hourState(ledger: Ledger | undefined, end: number): HourRow["state"] {
  if (!ledger || ledger.heardAt < end) return "silent";
  const alive = [...ledger.streams.values()].filter(({ at }) => at >= end);
  const past = alive.every(({ windowEnd = 0, lag = 0 }) => windowEnd > end || lag === 0);
  return past ? "complete" : "incomplete";
}

async function whereIs(
  dir: string,
  host: string,
  name: string,
  { sent, failed }: Whereabouts,
): Promise<"delivered" | "failed" | "waiting" | "missing"> {
  if (sent.has(name)) return "delivered";
  if (failed.has(name)) return "failed";
  if (await exists(join(folders(dir).host(host), name))) return "waiting";
  const delivered = join(folders(dir).sent, name);
  return (await exists(delivered)) || (await exists(`${delivered}.gz`)) ? "delivered" : "missing";
}

function emptyAmount(): Amount {
  return { files: 0, lines: 0, bytes: 0 };
}

function emptyAmounts() {
  const [received, delivered, waiting, failed, missing] = Array.from({ length: 5 }, emptyAmount);
  return { received, delivered, waiting, failed, missing } as Record<
    "received" | "delivered" | "waiting" | "failed" | "missing",
    Amount
  >;
}

function add(sum: Amount, { lines, bytes }: { lines: number; bytes: number }, files = 1): void {
  sum.files += files;
  sum.lines += lines;
  sum.bytes += bytes;
}

/** `2026-11-22 06:00` of a wall clock that is given as if it were UTC. */
function formatHour(wall: number): string {
  return new Date(wall).toISOString().slice(0, 16).replace("T", " ");
}
