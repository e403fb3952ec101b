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
import { open } from "node:fs/promises";
import { appendDurably, readIfExists, writeDurably } from "./durable.ts";
import { tryLock } from "./runtime.ts";
import { wait } from "./service.ts";

/** The outcome of one attempt. */
export interface ReportLine {
  /** Milliseconds since the epoch, whole seconds; written in this machine's local time. */
  at: number;
  /** Name of the batch as it is in the queue (`….log`), or `-` for a fault that holds up all of them. */
  batch: string;
  lines: number;
  status: "Sent" | "Failed";
  /** Why it failed; only in `.fail`. */
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

/**
 * Drops the lines of a report that are older than `keepFrom` (milliseconds since the epoch) and gives their
 * number; `dryRun` only counts them. Whatever is no report line of ours stays: nobody knows how old it is.
 */
export async function trimReport(path: string, keepFrom: number, { dryRun = false } = {}): Promise<number> {
  return underLock(path, async () => {
    const lines = (await readIfExists(path))?.split("\n") ?? [];
    const kept = lines.filter((line) => (parseReportLine(line)?.at ?? keepFrom) >= keepFrom);
    const old = lines.length - kept.length;
    if (old > 0 && !dryRun) await writeDurably(path, kept.join("\n"));
    return old;
  });
}

/** The last lines of a report, oldest first, from at most the last `bytes` of it; none when there is no report. */
export async function readReportTail(path: string, bytes = 1_048_576): Promise<ReportLine[]> {
  const file = await open(path, "r").catch((error: NodeJS.ErrnoException) => {
    if (error.code === "ENOENT") return undefined;
    throw error;
  });
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
  const deadline = Date.now() + LOCK_PATIENCE_MS;
  let lock = await tryLock(`${path}.lock`);
  while (!lock) {
    if (Date.now() > deadline)
      throw new Error(`Cannot write "${path}": ${path}.lock is held by another process`);
    await wait(20);
    lock = await tryLock(`${path}.lock`);
  }
  try {
    return await work();
  } finally {
    lock.release();
  }
}

/** `2026-11-22 06:45:01` in this machine's local time. */
function formatLocalTime(ms: number): string {
  const at = new Date(ms);
  const two = (n: number) => String(n).padStart(2, "0");
  const date = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${date} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}
