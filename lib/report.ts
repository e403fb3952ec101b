/**
 * What the forwarder tells others, on disk:
 *
 *   <report>.log    one line per delivery, the format that people already parse
 *   <report>.fail   one line per failed attempt, the same with the reason behind it
 *
 * A file in sent/ has the time of its delivery as its mtime; housekeeping counts retention from that.
 * The forwarder appends to the reports and housekeeping trims them: both through this file, under one lock,
 * so that no line falls between reading the old file and renaming the new one over it.
 */
import { createReadStream } from "node:fs";
import { open, realpath } from "node:fs/promises";
import { appendDurably, ifMissing, waitForLock, writeDurably } from "./durable.ts";
import { formatLocalTime } from "./service.ts";

export interface ReportLine {
  /** Milliseconds since the epoch, whole seconds; written in this machine's local time. */
  at: number;
  /** Name of the batch as it is in the queue (`….log`), or `-` for a fault that holds up all of them. */
  batch: string;
  lines: number;
  status: "Sent" | "Failed";
  reason?: string;
}

const LINE =
  /^(?<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) \| (?<batch>[^|]+?) \| lines=(?<lines>\d+) \| status=(?<status>Sent|Failed)(?: \| reason=(?<reason>.*))?$/;

/** `2026-11-22 06:45:01 | <batch> | lines=48213 | status=Sent`, with its line break. */
export function formatReportLine({ at, batch, lines, status, reason }: ReportLine): string {
  const why = reason === undefined ? "" : ` | reason=${reason.replace(/[\x00-\x1f\x7f]+/g, " ")}`;
  return `${formatLocalTime(at)} | ${batch} | lines=${lines} | status=${status}${why}\n`;
}

/** The parts of a report line without its line break, or undefined when it is none. */
export function parseReportLine(line: string): ReportLine | undefined {
  const groups = LINE.exec(line)?.groups;
  if (!groups) return undefined;
  const at = new Date((groups.at ?? "").replace(" ", "T")).getTime(); // without a zone: local time
  if (Number.isNaN(at)) return undefined;
  return {
    at,
    batch: groups.batch ?? "",
    lines: Number(groups.lines),
    status: groups.status as ReportLine["status"],
    ...(groups.reason !== undefined && { reason: groups.reason }),
  };
}

/** Where failed attempts are told: `linecount-report.log` → `linecount-report.fail`. */
export function failReportPath(report: string): string {
  return `${report.replace(/\.[^./]+$/, "")}.fail`;
}

/** Appends lines to a report, on stable storage when it returns. */
export async function appendReport(path: string, lines: ReportLine[]): Promise<void> {
  if (lines.length === 0) return;
  await underLock(path, () => appendDurably(path, lines.map(formatReportLine).join("")));
}

/** Drops the lines of a report that are older than `keepFrom` (ms since the epoch), and gives their number and bytes. No line of others goes. */
export async function trimReport(path: string, keepFrom: number, { dryRun = false } = {}) {
  return underLock(path, async () => {
    const old = { lines: 0, bytes: 0 };
    const file = await ifMissing(realpath(path)); // a link stays one: who appends follows it, too
    if (file === undefined) return old;
    for await (const line of readLines(file)) {
      if (!isOlder(line, keepFrom)) continue;
      old.lines++;
      old.bytes += line.length;
    }
    if (old.lines > 0 && !dryRun) await writeDurably(file, newerLines(file, keepFrom));
    return old;
  });
}

function isOlder(line: Buffer, keepFrom: number): boolean {
  const at =
    line.length < LONGEST_LINE ? parseReportLine(line.toString("utf8", 0, line.length - 1))?.at : undefined;
  return at !== undefined && at < keepFrom;
}

async function* newerLines(path: string, keepFrom: number): AsyncGenerator<Buffer> {
  let kept: Buffer[] = [];
  let bytes = 0;
  for await (const line of readLines(path)) {
    if (isOlder(line, keepFrom)) continue;
    kept.push(line);
    bytes += line.length;
    if (bytes < BLOCK) continue;
    yield Buffer.concat(kept);
    [kept, bytes] = [[], 0];
  }
  yield Buffer.concat(kept);
}

const BLOCK = 65_536;
/** What is longer is no report line, and is handed on in pieces. */
const LONGEST_LINE = 65_536;

const BEFORE_NAME = Buffer.from(" | ");
const BEFORE_LINES = Buffer.from(" | lines=");
const BEHIND_LINES = Buffer.from(" | status=Sent");
const TIME_BYTES = 19;

/**
 * Hands over each delivery behind a place in a report, from the first line of `since` (`2026-11-22 06`) or later on, also older
 * ones behind it (a clock was set back): its line, where the name stands in it, its lines. Gives the time of that line. No
 * text is made of the others, which would be the most of the memory.
 */
export async function readDelivered(
  path: string,
  { start, since }: { start: number; since: string },
  take: (line: Buffer, from: number, to: number, lines: number) => void,
): Promise<number | undefined> {
  const oldest = Buffer.from(since);
  let first: number | undefined;
  for await (const line of readLines(path, start)) {
    if (first === undefined && line.subarray(0, oldest.length).compare(oldest) >= 0)
      first = parseReportLine(line.toString("latin1").trimEnd())?.at;
    if (first !== undefined) takeDelivered(line, take);
  }
  return first;
}

function takeDelivered(line: Buffer, take: Parameters<typeof readDelivered>[2]): void {
  const isAt = (text: Buffer, at: number) => line.compare(text, 0, text.length, at, at + text.length) === 0;
  const name = TIME_BYTES + BEFORE_NAME.length;
  const lineBreak = line.at(-1) !== 0x0a ? 0 : line.at(-2) === 0x0d ? 2 : 1;
  const behind = line.length - lineBreak - BEHIND_LINES.length;
  if (behind <= name || !isAt(BEHIND_LINES, behind) || !isAt(BEFORE_NAME, TIME_BYTES)) return;
  let lines = 0;
  let digit = behind - 1;
  for (let unit = 1; isDigit(line[digit]); unit *= 10) lines += unit * ((line[digit--] as number) - 0x30);
  const to = digit + 1 - BEFORE_LINES.length;
  if (digit + 1 < behind && to > name && isAt(BEFORE_LINES, to)) take(line, name, to, lines);
}

function isDigit(byte = 0): boolean {
  return byte >= 0x30 && byte <= 0x39;
}

/** The lines of a file with their line breaks, from `start`; the last one may have none. */
async function* readLines(path: string, start = 0): AsyncGenerator<Buffer> {
  let rest = Buffer.alloc(0);
  for await (const block of createReadStream(path, { start, highWaterMark: BLOCK })) {
    const bytes: Buffer = rest.length > 0 ? Buffer.concat([rest, block]) : block;
    let from = 0;
    for (let end = bytes.indexOf(0x0a); end >= 0; end = bytes.indexOf(0x0a, from)) {
      yield bytes.subarray(from, end + 1);
      from = end + 1;
    }
    rest = Buffer.from(bytes.subarray(from));
    if (rest.length < LONGEST_LINE) continue;
    yield rest;
    rest = Buffer.alloc(0);
  }
  if (rest.length > 0) yield rest;
}

/** The last lines of a report, oldest first, from at most the last `bytes` of it; none when there is no report. */
export async function readReportTail(path: string, bytes = 1_048_576): Promise<ReportLine[]> {
  const file = await ifMissing(open(path, "r"));
  if (!file) return [];
  try {
    const { size } = await file.stat();
    const block = Buffer.alloc(Math.min(size, bytes));
    const { bytesRead } = await file.read(block, 0, block.length, size - block.length);
    const lines = block.toString("utf8", 0, bytesRead).split("\n").slice(0, -1);
    return lines.map(parseReportLine).filter((line) => line !== undefined);
  } finally {
    await file.close();
  }
}

const LOCK_PATIENCE_MS = 30_000;

async function underLock<T>(path: string, work: () => Promise<T>): Promise<T> {
  const lock = await waitForLock(`${path}.lock`, LOCK_PATIENCE_MS);
  try {
    return await work();
  } finally {
    lock.release();
  }
}
