/**
 * The matrix behind `--hour`: what of an hour was delivered, host by host, from the lists that digests are made of, or from
 * the report where there are none; and what keeps it from being complete, in the digests' own words.
 */
import { dashedHost, parseBatchName } from "../batch.ts";
import { findMissing, formatHour, observeHosts, readList, readRecord, sealedName } from "../digest.ts";
import { readReportTail } from "../report.ts";
import { EXIT, formatBytes, HOUR, localZone, OperatorError } from "../service.ts";
import { formatTable } from "../table.ts";

/** How much of the report's end tells of an hour without digests. */
const REPORT_BYTES = 32 * 1024 * 1024;

/** `2026-11-27T14` or `2026-11-27T14/2026-11-27T18` (the second one exclusive) as `yyMMddHH` each. */
export function parseHours(span: string): string[] {
  const [from = "", to, more] = span.split("/").map((text) => {
    const [, day] = /^(20\d\d-\d\d-\d\d)T\d\d$/.exec(text) ?? [];
    const at = Date.parse(`${text}:00Z`);
    const isDay = day && new Date(Date.parse(day) || 0).toISOString().startsWith(day); // 30 February is no 2 March
    if (!isDay || Number.isNaN(at))
      throw new OperatorError(
        `--hour ${span}: expected 2026-11-27T14 or 2026-11-27T14/2026-11-27T18`,
        EXIT.usage,
      );
    return at;
  });
  const first = Number(from);
  const end = to ?? first + HOUR;
  if (more !== undefined || end <= first || end - first > 31 * 24 * HOUR)
    throw new OperatorError(
      `--hour ${span}: expected an end behind the beginning, 31 days at most`,
      EXIT.usage,
    );
  return Array.from({ length: (end - first) / HOUR }, (_, i) => formatHour(first + i * HOUR, 0));
}

export interface MatrixRow {
  hour: string;
  host: string;
  batches: number;
  /** Lines that its log had, as far as they are here: delivered, left out, and not delivered yet. */
  read: number;
  lines: number;
  /** Lines left out by rules, as the hour's digests tell. */
  skipped?: number;
  late: number;
  /** What the numbers are from: the list that digests are made of, or the report. */
  source: "digest" | "report";
  missing: string[];
}

/** What of some hours was delivered, per host; rows of an hour that lack something say what. */
export async function readHours(
  { dir, report }: { dir: string; report: string },
  hours: string[],
  now: number,
): Promise<MatrixRow[]> {
  const known = await readKnown(dir, report, now);
  const rows: MatrixRow[] = [];
  for (const hour of hours) rows.push(...(await readHour(known, hour)));
  return rows;
}

/** What is read once for all hours: report lines of delivered batches by their hour, and since when something is known. */
async function readKnown(dir: string, report: string, now: number) {
  const seen = await observeHosts(dir, now);
  const sent = (await readReportTail(report, REPORT_BYTES)).filter(({ status }) => status === "Sent");
  const reported = Map.groupBy(sent, ({ batch }) => parseBatchName(batch)?.window.slice(0, 8) ?? "");
  const record = await readRecord(dir);
  return { dir, seen, reported, record, began: record.begins ?? sent[0]?.at, now };
}

/** The rows of one hour: at least one, for an hour of which nothing is known is not complete. */
async function readHour(
  { dir, seen, reported, record, began, now }: Awaited<ReturnType<typeof readKnown>>,
  hour: string,
): Promise<MatrixRow[]> {
  const listed = await readList(dir, hour);
  const told = await record.ofHour(hour);
  const source = listed.size > 0 || told.complete !== undefined ? "digest" : "report";
  const delivered = new Map([...listed.values()].map(({ name, lines }) => [sealedName(name), lines]));
  if (source === "report") {
    for (const { batch, lines } of reported.get(hour) ?? []) delivered.set(batch, lines);
  }
  const names = new Map(seen.hosts.map(({ host }) => [dashedHost(host), host]));
  const rows = new Map<string, MatrixRow>();
  const rowOf = (host: string) => {
    const row = rows.get(host) ?? { hour, host, batches: 0, read: 0, lines: 0, late: 0, source, missing: [] };
    rows.set(host, row);
    return row;
  };
  for (const { host } of seen.hosts) rowOf(host);
  for (const [host, skipped] of told.skipped) rowOf(host).skipped = skipped;
  for (const [batch, lines] of delivered) {
    const { host = "", part = 1 } = parseBatchName(batch) ?? {};
    const row = rowOf(names.get(host) ?? host);
    row.batches++;
    row.lines += lines;
    if (part > 1) row.late++;
    if (!names.has(host) && !told.complete)
      row.missing = ["cannot say: how far its shipper is stands nowhere (no ledger, or not heard for long)"];
  }
  for (const { host, reason } of findMissing(seen, hour, now, record.lossAt))
    rowOf(host).missing.push(reason);
  for (const { host, unsent, lag, heardAt } of seen.hosts) {
    const row = rowOf(host);
    for (const [name, lines] of unsent)
      if (parseBatchName(name)?.window.startsWith(hour) && !delivered.has(name)) row.read += lines;
    if (row.missing.length > 0 && lag)
      row.missing.push(`${formatBytes(lag)} to ship when last heard, ${new Date(heardAt).toISOString()}`);
  }
  for (const row of rows.values()) row.read += row.lines + (row.skipped ?? 0);
  const isKnown =
    told.complete !== undefined || [...rows.values()].some(({ batches, read }) => batches + read > 0);
  if (!isKnown && (rows.size === 0 || began === undefined || hour < formatHour(began, localZone(began))))
    rowOf("-").missing.push("nothing is known of this hour, neither by a digest nor by the report");
  return [...rows.values()].sort((a, b) => (a.host < b.host ? -1 : 1));
}

export function formatHours(rows: MatrixRow[]): string {
  const cells = rows.map((row) => [
    `20${row.hour.slice(0, 2)}-${row.hour.slice(2, 4)}-${row.hour.slice(4, 6)}T${row.hour.slice(6)}`,
    row.host,
    String(row.batches),
    String(row.read),
    row.skipped === undefined ? "-" : String(row.skipped),
    String(row.lines),
    String(row.late),
    row.source,
    row.missing.length === 0 ? "complete" : row.missing.join("; "),
  ]);
  const heads = ["hour", "host", "batches", "read", "skipped", "delivered", "late parts", "by", "state"];
  return formatTable(heads, cells, [2, 3, 4, 5, 6]);
}
