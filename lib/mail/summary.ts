/**
 * The account of an hour: for each sender what was read, and where it is now. It is of the batches that were sealed from
 * one account to the next, so each is in exactly one of them, whatever its lines' clocks and zones say: a late part or a
 * line of the future, too, and an hour that the clock repeats or leaves out. read = delivered + skipped + waiting + failed
 * + missing.
 *
 * It reads one ledger at a time and keeps only what has to be looked up: the memory does not grow with the senders' days.
 */
import { readdir, stat } from "node:fs/promises";
import { folders, listBatches, listHosts, parseBatchName } from "../batch.ts";
import type { Config } from "../config.ts";
import { exists, ifMissing } from "../durable.ts";
import { type Ledger, readLedger, type SealedBatch } from "../ledger.ts";
import { readDelivered } from "../report.ts";
import { collectGarbage } from "../runtime.ts";
import { errorMessage, formatLocalTime, HOUR } from "../service.ts";
import { compareAsPeopleCount } from "../snapshot.ts";

const CURVE_HOURS = 24;
/** How far back it is looked for batches that vanished. */
const MISSING_MS = 48 * HOUR;
/** How much of the report's end is read, in bytes: some 150,000 deliveries. */
const REPORT_BYTES = 16 * 1024 * 1024;
/** After so many ledgers what was read of them is collected. */
const COLLECT_HOSTS = 25;
/** Names of vanished batches in one account. */
const MOST_MISSING = 1000;

export interface Amount {
  files: number;
  lines: number;
  bytes: number;
}

/** Totals of a sender, of which an account tells what came since the one before. */
export interface Totals {
  skipped: number;
  untimed: number;
  ahead: number;
  lost: number;
}

/** What an account is of. Times are milliseconds since the epoch. */
export interface AccountSpan {
  /** End of the hour that it is called by. */
  hourEnd: number;
  /** Batches that were sealed after `from` and up to `to`. */
  from: number;
  to: number;
  /** Vanished batches are looked for from then on, and these were told. */
  missingFrom: number;
  missingTold: string[];
  /** What came since the account before, by host; of hosts with nothing it is absent. */
  since: Record<string, Partial<Totals>>;
}

/** One sender's hour. `received` = delivered + waiting + failed + missing. */
export interface HourRow {
  host: string;
  received: Amount;
  delivered: Amount;
  /** Sealed and not delivered yet. */
  waiting: Amount;
  failed: Amount;
  /** Was sealed, and is neither in a folder nor in the report. */
  missing: Amount;
  /** Still taking lines: told in the account of the hour in which it is sealed. */
  open: Amount;
  /** Delivered with another number of lines than received. */
  differs: number;
  /** Files that are second and later parts of their window. */
  late: number;
  since: Totals;
  heardAt: number;
  /** `silent`: nothing was heard from the sender since; more may come when it is back. */
  state: "complete" | "incomplete" | "silent";
}

const PLACES = ["received", "delivered", "waiting", "failed", "missing", "open"] as const;

export interface HourSummary extends Pick<AccountSpan, "hourEnd"> {
  rows: HourRow[];
  total: Record<(typeof PLACES)[number], Amount> & Pick<HourRow, "differs" | "late" | "since">;
  /** Names of this account's batches that are nowhere. */
  missing: string[];
  /** Batches of earlier accounts that vanished since. */
  vanished: { host: string; name: string; lines: number }[];
  /** Lines of each of the 24 hours up to this one, oldest first. */
  curve: number[];
  unreadable: string[];
}

export async function summariseHour(
  { dir, report, expected }: Config["monitor"],
  span: AccountSpan,
): Promise<HourSummary> {
  const summary: HourSummary = {
    hourEnd: span.hourEnd,
    rows: [],
    total: { ...emptyAmounts(), differs: 0, late: 0, since: emptyTotals() },
    missing: [],
    vanished: [],
    curve: new Array(CURVE_HOURS).fill(0),
    unreadable: [],
  };
  const attempt = async <T>(path: string, work: () => Promise<T>, instead: T): Promise<T> => {
    try {
      return await work();
    } catch (error) {
      summary.unreadable.push(`${path}: ${errorMessage(error)}`);
      return instead;
    }
  };
  const { failed, sent } = folders(dir);
  const account: Account = {
    dir,
    expected,
    span,
    failed: new Set(await attempt(failed, () => listBatches(failed, "sealed", "compressed"), [])),
    sent: new Set(await attempt(sent, async () => (await ifMissing(readdir(sent))) ?? [], [])),
    report: await attempt(report, () => readDeliveries(report, span.to - MISSING_MS, sent), UNKNOWN),
  };
  const present = await attempt(dir, () => listHosts(dir), []);
  const hosts = [...new Set([...expected, ...present])].sort(compareAsPeopleCount);
  for (const [i, host] of hosts.entries()) {
    if (i % COLLECT_HOSTS === 0) collectGarbage();
    await attempt(folders(dir).host(host), () => addHost(summary, host, account), undefined);
  }
  return summary;
}

/** What the account of each host is made from: of the batches, where they are, by name. */
interface Account extends Pick<Config["monitor"], "dir" | "expected"> {
  span: AccountSpan;
  failed: Set<string>;
  /** What stands in sent/, and what the report says was delivered: lines by hash of the name, and from when on. */
  sent: Set<string>;
  report: { lines: Map<number, number>; from: number };
}

async function addHost(summary: HourSummary, host: string, account: Account): Promise<void> {
  const { dir, expected, span, report } = account;
  const folder = folders(dir).host(host);
  const ledger = await readLedger(folder);
  const queue = new Set(await listBatches(folder, "sealed"));
  const told = new Set(span.missingTold);
  const since = { ...emptyTotals(), ...span.since[host] };
  const row: HourRow = {
    host,
    ...emptyAmounts(),
    differs: 0,
    late: 0,
    since,
    heardAt: ledger?.heardAt ?? 0,
    state: hourState(ledger, span.hourEnd),
  };
  for (const [name, batch] of ledger?.sealed ?? []) {
    const hours = Math.floor((span.to - batch.at) / HOUR); // 0 is this one
    const curveAt = CURVE_HOURS - 1 - hours;
    if (hours >= 0 && hours < CURVE_HOURS)
      summary.curve[curveAt] = (summary.curve[curveAt] ?? 0) + batch.lines;
    if (batch.at > span.from && batch.at <= span.to && addBatch(row, batch, queue, account) === "missing")
      summary.missing.push(name);
    const isEarlier = batch.at <= span.from && batch.at > Math.max(span.missingFrom, report.from);
    if (
      isEarlier &&
      !told.has(name) &&
      summary.vanished.length < MOST_MISSING &&
      whereIs(name, queue, account) === "missing"
    )
      summary.vanished.push({ host, name, lines: batch.lines });
  }
  for (const batch of ledger?.open.values() ?? []) {
    add(row.open, batch);
    if (row.state === "complete" && batch.endsAt <= span.hourEnd) row.state = "incomplete"; // it still takes lines
  }
  const isGone = !expected.includes(host) && row.heardAt < span.hourEnd - CURVE_HOURS * HOUR;
  if (isGone && row.received.files + row.open.files === 0) return;
  summary.rows.push(row);
  for (const place of PLACES) add(summary.total[place], row[place], row[place].files);
  summary.total.differs += row.differs;
  summary.total.late += row.late;
  for (const key of Object.keys(since) as (keyof Totals)[]) summary.total.since[key] += since[key];
}

function addBatch(row: HourRow, batch: SealedBatch, queue: Set<string>, account: Account): string {
  const place = whereIs(batch.name, queue, account);
  add(row.received, batch);
  add(row[place], batch);
  if ((parseBatchName(batch.name)?.part ?? 1) > 1) row.late++;
  const sentLines = place === "delivered" ? account.report.lines.get(hashOf(batch.name)) : undefined;
  if (sentLines !== undefined && sentLines !== batch.lines) row.differs++;
  return place;
}

function whereIs(name: string, queue: Set<string>, { failed, sent, report }: Account) {
  if (queue.has(name)) return "waiting";
  if (failed.has(name)) return "failed";
  return report.lines.has(hashOf(name)) || sent.has(name) || sent.has(`${name}.gz`) ? "delivered" : "missing";
}

/** Complete when all that was in its files at the hour's end is here; a sender that was not heard since may have more. */
function hourState(ledger: Ledger | undefined, end: number): HourRow["state"] {
  if (!ledger || ledger.heardAt < end) return "silent";
  const { through } = ledger.facts;
  if (through !== undefined) return through >= end ? "complete" : "incomplete";
  const alive = [...ledger.streams.values()].filter(({ at }) => at >= end); // of version 1.0
  return alive.every(({ windowEnd = 0, lag = 0 }) => windowEnd > end || lag === 0)
    ? "complete"
    : "incomplete";
}

// ---- the report

const ofName = Buffer.alloc(1024);

/** A name, in bytes, as a number of 52 bits: many thousands of names fit into little memory. */
function hashName(block: Buffer, from: number, to: number): number {
  let [a, b] = [0x811c9dc5, 0x01000193];
  for (let i = from; i < to; i++) {
    const byte = block[i] as number;
    a = Math.imul(a ^ byte, 0x01000193);
    b = Math.imul(b, 31) + byte;
  }
  return (a >>> 0) * 0x100000 + ((b >>> 0) & 0xfffff);
}

function hashOf(name: string): number {
  return hashName(ofName, 0, ofName.write(name, "latin1"));
}

/** Of a report that is not there to tell. */
const UNKNOWN: Account["report"] = { lines: new Map(), from: Number.POSITIVE_INFINITY };

/** What the report's end says was delivered, and from when on it tells that. */
async function readDeliveries(path: string, oldest: number, sent: string): Promise<Account["report"]> {
  const lines = new Map<number, number>();
  const size = (await ifMissing(stat(path)))?.size;
  // What was delivered and cleared away stands in the report alone: without one nothing can be said of it.
  if (size === undefined) return (await exists(sent)) ? UNKNOWN : { lines, from: oldest };
  const start = Math.max(0, size - REPORT_BYTES);
  const since = formatLocalTime(oldest - 2 * HOUR).slice(0, 13);
  const first = await readDelivered(path, { start, since }, (block, from, to, count) =>
    lines.set(hashName(block, from, to), count),
  );
  if (start === 0) return { lines, from: oldest };
  return { lines, from: Math.max(oldest, (first ?? Infinity) + HOUR) }; // its clock may have been set back by an hour
}

function emptyAmounts() {
  const amounts = PLACES.map((place) => [place, { files: 0, lines: 0, bytes: 0 }]);
  return Object.fromEntries(amounts) as Record<(typeof PLACES)[number], Amount>;
}

export function emptyTotals(): Totals {
  return { skipped: 0, untimed: 0, ahead: 0, lost: 0 };
}

function add(sum: Amount, { lines, bytes }: { lines: number; bytes: number }, files = 1): void {
  sum.files += files;
  sum.lines += lines;
  sum.bytes += bytes;
}
