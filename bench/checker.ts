/**
 * The judge of the chaos run: compares what the writers wrote with what lies in the client's folder. It
 * shares no code with the product: names, windows and lines are taken apart here by rules of its own.
 *
 * Every line tells who wrote it (w), into which incarnation of its file (g), its number (n), the window where
 * it belongs, and ends with the CRC-32 of everything before. So what was written need not be kept: the
 * number of lines of each writer is enough to know what is missing.
 */
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { crc32, gunzipSync } from "node:zlib";

/** What a writer did. */
export interface Written {
  /** The host as it stands in batch names: dots as dashes. */
  host: string;
  /** Lines that must arrive, numbered from 0. */
  lines: number;
}

/** What was found; all but `lines` and `files` must be 0. */
export interface Verdict {
  lines: number;
  files: number;
  missing: number;
  twice: number;
  misfiled: number;
  outOfOrder: number;
  corrupt: number;
  /** Files that are no batches, such as leftovers of an upload. */
  stray: number;
  /** Batches without exactly one report line that says Sent and the right number of lines. */
  misreported: number;
  /** The first faults, for people. */
  examples: string[];
}

const BATCH = /^accessLog_(\d{8}_\d\d-\d\d)_([a-z0-9-]+?)(?:\.(\d+))?\.log(\.gz)?$/;
const LINE = /\/w(\d+)\/g(\d+)\/n(\d+)\/(\d{8}_\d\d-\d\d) (?:.* )?([0-9a-f]{8})$/s;
const LINE_FEED = 0x0a;
const MOST_EXAMPLES = 25;
/** How a line without a timestamp begins. */
const UNTIMED = "  continued ";

interface Batch {
  name: string;
  window: string;
  host: string;
  part: number;
}

/**
 * Checks the client's folder against `writers` (their index is w), and the report when there is one. A line without a
 * timestamp whose window is sealed goes by its arrival: it may still wait in an open batch of `server`, the receiver's folder.
 */
export function checkDelivery(folder: string, writers: Written[], report?: string, server?: string): Verdict {
  const verdict: Verdict = {
    lines: 0,
    files: 0,
    missing: 0,
    twice: 0,
    misfiled: 0,
    outOfOrder: 0,
    corrupt: 0,
    stray: 0,
    misreported: 0,
    examples: [],
  };
  const fault = (kind: FaultKind, text: string, count = 1) => {
    verdict[kind] += count;
    if (verdict.examples.length < MOST_EXAMPLES) verdict.examples.push(`${kind}: ${text}`);
  };
  const seen = writers.map(({ lines }) => new Uint8Array(lines));
  const lengths = new Map<string, number>();
  const lastOf = new Map<string, number>(); // per window, writer and incarnation: the last line's number
  for (const batch of listDelivery(folder, fault)) {
    verdict.files++;
    const lines = checkBatch(join(folder, batch.name), batch, writers, seen, lastOf, fault);
    verdict.lines += lines;
    lengths.set(batch.name, lines);
  }
  if (server !== undefined) noteOpen(server, seen);
  for (const [w, numbers] of seen.entries()) findMissing(w, numbers, fault);
  if (report !== undefined) checkReport(report, lengths, fault);
  return verdict;
}

type FaultKind = Exclude<keyof Verdict, "lines" | "files" | "examples">;
type Fault = (kind: FaultKind, text: string, count?: number) => void;

/** The batches in the order in which their lines were written: window, host, part. */
function listDelivery(folder: string, fault: Fault): Batch[] {
  const batches: Batch[] = [];
  for (const name of readdirSync(folder)) {
    const [, window, host, part] = BATCH.exec(name) ?? [];
    if (window === undefined || host === undefined) fault("stray", name);
    else batches.push({ name, window, host, part: Number(part ?? 1) });
  }
  const order = (a: Batch, b: Batch) =>
    a.window.localeCompare(b.window) || a.host.localeCompare(b.host) || a.part - b.part;
  return batches.sort(order);
}

/** Checks every line of a file; gives their number. */
function checkBatch(
  path: string,
  batch: Batch,
  writers: Written[],
  seen: Uint8Array[],
  lastOf: Map<string, number>,
  fault: Fault,
): number {
  const raw = readFileSync(path);
  const bytes = path.endsWith(".gz") ? gunzipSync(raw) : raw;
  let lines = 0;
  for (let start = 0; start < bytes.length; ) {
    const end = bytes.indexOf(LINE_FEED, start);
    if (end < 0) {
      fault("corrupt", `${batch.name} ends in mid-line`);
      break;
    }
    checkLine(bytes.subarray(start, end), batch, writers, seen, lastOf, fault);
    lines++;
    start = end + 1;
  }
  return lines;
}

function checkLine(
  line: Buffer,
  batch: Batch,
  writers: Written[],
  seen: Uint8Array[],
  lastOf: Map<string, number>,
  fault: Fault,
): void {
  const text = line.toString("latin1");
  const [, w, g, n, window, sum] = LINE.exec(text) ?? [];
  const numbers = seen[Number(w)];
  const number = Number(n);
  const right = sum !== undefined && crc32(line.subarray(0, -8)).toString(16).padStart(8, "0") === sum;
  if (!right || numbers === undefined || number >= numbers.length) {
    fault("corrupt", `${batch.name}: ${JSON.stringify(text.slice(0, 200))}`);
    return;
  }
  const label = `w${w} g${g} n${n} in ${batch.name}`;
  if (numbers[number] === 1) {
    fault("twice", label);
    return; // its place says nothing about the order of the others
  }
  numbers[number] = 1;
  const isElsewhere = window !== batch.window && !text.startsWith(UNTIMED); // by its arrival
  if (isElsewhere || writers[Number(w)]?.host !== batch.host) {
    fault("misfiled", `${label}, belongs to ${window} of ${writers[Number(w)]?.host}`);
  }
  const key = `${batch.window} ${w} ${g}`;
  const last = lastOf.get(key) ?? -1;
  if (number < last) fault("outOfOrder", `${label}, after n${last}`);
  lastOf.set(key, Math.max(last, number));
}

/** Lines without a timestamp in open batches: they are on their way, each at most once. */
function noteOpen(server: string, seen: Uint8Array[]): void {
  for (const host of readdirSync(server, { withFileTypes: true })) {
    if (!host.isDirectory()) continue;
    const folder = join(server, host.name);
    for (const file of readdirSync(folder).filter((name) => name.endsWith(".log.part"))) {
      for (const line of readFileSync(join(folder, file), "latin1").split("\n")) {
        const [, w, , n] = line.startsWith(UNTIMED) ? (LINE.exec(line) ?? []) : [];
        const numbers = seen[Number(w)];
        if (numbers?.[Number(n)] === 0) numbers[Number(n)] = 1;
      }
    }
  }
}

function findMissing(w: number, numbers: Uint8Array, fault: Fault): void {
  let from = -1;
  for (let n = 0; n <= numbers.length; n++) {
    if (numbers[n] === 0) {
      if (from < 0) from = n;
    } else if (from >= 0) {
      fault("missing", `w${w} n${from} to n${n - 1}`, n - from);
      from = -1;
    }
  }
}

/** Every delivered batch has one line `time | name | lines=n | status=Sent`, and no other has one. */
function checkReport(report: string, lengths: Map<string, number>, fault: Fault): void {
  const sent = new Map<string, number[]>();
  const text = existsSync(report) ? readFileSync(report, "utf8") : "";
  for (const line of text.split("\n")) {
    if (line === "") continue;
    const [, name, lines] = / \| (\S+) \| lines=(\d+) \| status=Sent$/.exec(line) ?? [];
    if (name === undefined) fault("misreported", `not a report line: ${line}`);
    else sent.set(name, [...(sent.get(name) ?? []), Number(lines)]);
  }
  for (const [name, lines] of lengths) {
    const told = sent.get(name) ?? [];
    if (told.length !== 1 || told[0] !== lines)
      fault("misreported", `${name} has ${lines} lines, told: ${told.join(", ") || "nothing"}`);
  }
  for (const name of sent.keys())
    if (!lengths.has(name)) fault("misreported", `${name} was told but is not there`);
}
