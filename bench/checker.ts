/**
 * The judge of the chaos run: compares what the writers wrote with what lies in the client's folder. It
 * shares no code with the product: names, windows and lines are taken apart here by rules of its own.
 *
 * Every line tells who wrote it (w), into which incarnation of its file (g), its number (n), the window where
 * it belongs, and ends with the CRC-32 of everything before. So what was written need not be kept: the
 * number of lines of each writer is enough to know what is missing.
 *
 * Where the receiver's folder was lost, lines may come twice, once for each loss: those behind the first line of their file
 * that was not delivered as of the last heartbeat before it (delivered is what has its name and its report line, later of
 * the two); all of a host that lost both saves of its cursor after that: nobody knows any more what was delivered before.
 * A batch that got its name shortly before and was not reported yet is not any more, and half an upload stays.
 */
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { crc32, gunzipSync } from "node:zlib";

/** What a writer did. */
export interface Written {
  /** The host as it stands in batch names: dots as dashes. */
  host: string;
  /** Lines that must arrive, numbered from 0. */
  lines: number;
}

/** What is known beside the client's folder. */
export interface Circumstances {
  report?: string | undefined;
  /** What the forwarder says: of what it says to have delivered no loss explains that the report is silent. */
  forwarderLog?: string | undefined;
  /** The receiver's folder. A line without a timestamp whose window is sealed goes by its arrival: it may still wait there. */
  server?: string | undefined;
  /** When the receiver's folder was lost, ms, and how long before that the last heartbeat may have been. */
  losses?: number[];
  heartbeatMs?: number;
  /** Lines as long as what rules leave out of the largest chunk: within it, the receiver can't tell where a line began. */
  leftOutLines?: number;
  /** When a host lost all that it had saved; the host as it stands in batch names. */
  forgets?: { host: string; at: number }[];
  /** A host whose lines are not judged, as it stands in batch names. */
  hostile?: string;
}

/** What was found; all but `lines`, `files` and `again` must be 0. */
export interface Verdict {
  lines: number;
  files: number;
  /** Lines that came twice because the receiver's folder was lost. */
  again: number;
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
const DIGEST = /^accessLog_\d{8}(\.\d+)?\.sha256$/;
const LINE_FEED = 0x0a;
const MOST_EXAMPLES = 25;
/** How a line without a timestamp begins. */
const UNTIMED = "  continued ";
/** What was under way at a loss is written for so long. */
export const KILLED_MS = 2_000;
/** For so long at most a batch is reported and not in sent/ yet: the disk is full, or the forwarder is down. */
const STUCK_MS = 60_000;

interface Batch {
  name: string;
  window: string;
  host: string;
  part: number;
  /** When it was delivered, ms; infinity for what was lost before its report line. */
  at: number;
}

/** What was seen of each writer's lines. */
interface Seen {
  /** When each line came first, ms; 0 for never. */
  first: Float64Array[];
  /** When lines came again, by writer, incarnation and number. */
  repeats: Map<string, number[]>;
  /** Numbers of the lines of each writer and incarnation. */
  lives: Map<string, number[]>;
  /** Per window, writer and incarnation: the last line's number. */
  last: Map<string, number>;
}

/** Checks the client's folder against `writers` (their index is w). */
export function checkDelivery(folder: string, writers: Written[], around: Circumstances = {}): Verdict {
  const { report, server, hostile } = around;
  const verdict: Verdict = {
    lines: 0,
    files: 0,
    again: 0,
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
  const first = writers.map(({ lines }) => new Float64Array(lines));
  const seen: Seen = { first, repeats: new Map(), lives: new Map(), last: new Map() };
  const lengths = new Map<string, number>();
  const told = report === undefined ? undefined : readReport(report, fault);
  const moved = readMoves(around.forwarderLog);
  for (const batch of listDelivery(folder, told, moved, around, fault)) {
    const isJudged = batch.host !== hostile;
    const lines = checkBatch(join(folder, batch.name), batch, writers, isJudged ? seen : undefined, fault);
    lengths.set(batch.name, lines);
    if (!isJudged) continue;
    verdict.files++;
    verdict.lines += lines;
  }
  if (server !== undefined) noteOpen(server, seen);
  verdict.again = judgeRepeats(seen, writers, around, fault);
  for (const [w, times] of first.entries()) findMissing(w, times, fault);
  if (told) checkReport(folder, told, moved, lengths, around, fault);
  return verdict;
}

type FaultKind = Exclude<keyof Verdict, "lines" | "files" | "again" | "examples">;
type Fault = (kind: FaultKind, text: string, count?: number) => void;

/** The batches in the order in which their lines were written: window, host, part. */
function listDelivery(
  folder: string,
  told: Told | undefined,
  moved: Map<string, number>,
  { losses = [] }: Circumstances,
  fault: Fault,
): Batch[] {
  const batches: Batch[] = [];
  // Reported, but not moved to sent/ before the loss (full disk, kill): the receiver did not know it as delivered.
  const isStuck = (name: string, at: number) =>
    moved.size > 0 && !moved.has(name) && losses.some((loss) => loss >= at && loss <= at + STUCK_MS);
  for (const name of readdirSync(folder)) {
    if (DIGEST.test(name)) continue; // forwarder --verify looks at them
    const named = statSync(join(folder, name)).ctimeMs;
    if (name.endsWith(".tmp") && losses.some((loss) => named <= loss + KILLED_MS)) continue;
    const [, window, host, part] = BATCH.exec(name) ?? [];
    if (window === undefined || host === undefined) fault("stray", name);
    else {
      const reported = told ? (told.get(name)?.[0]?.at ?? Number.POSITIVE_INFINITY) : 0;
      const known = Math.max(named, reported, moved.get(name) ?? 0);
      const at = isStuck(name, known) ? Number.POSITIVE_INFINITY : known;
      batches.push({ name, window, host, part: Number(part ?? 1), at });
    }
  }
  const order = (a: Batch, b: Batch) =>
    a.window.localeCompare(b.window) || a.host.localeCompare(b.host) || a.part - b.part;
  return batches.sort(order);
}

/** Checks every line of a file, those of a host that is not judged only for their ends; gives their number. */
function checkBatch(
  path: string,
  batch: Batch,
  writers: Written[],
  seen: Seen | undefined,
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
    if (seen) checkLine(bytes.subarray(start, end), batch, writers, seen, fault);
    lines++;
    start = end + 1;
  }
  return lines;
}

function checkLine(line: Buffer, batch: Batch, writers: Written[], seen: Seen, fault: Fault): void {
  const text = line.toString("latin1");
  const [, w, g, n, window, sum] = LINE.exec(text) ?? [];
  const numbers = seen.first[Number(w)];
  const number = Number(n);
  const right = sum !== undefined && crc32(line.subarray(0, -8)).toString(16).padStart(8, "0") === sum;
  if (!right || numbers === undefined || number >= numbers.length) {
    fault("corrupt", `${batch.name}: ${JSON.stringify(text.slice(0, 200))}`);
    return;
  }
  const label = `w${w} g${g} n${n} in ${batch.name}`;
  const before = numbers[number] as number;
  numbers[number] = before > 0 ? Math.min(before, batch.at) : batch.at;
  if (before > 0) {
    const key = `${w} ${g} ${n} ${batch.name}`;
    seen.repeats.set(key, [...(seen.repeats.get(key) ?? []), Math.max(before, batch.at)]);
    return; // its place says nothing about the order of the others
  }
  const life = seen.lives.get(`${w} ${g}`) ?? [];
  seen.lives.set(`${w} ${g}`, life);
  life.push(number);
  const isElsewhere = window !== batch.window && !text.startsWith(UNTIMED); // by its arrival
  if (isElsewhere || writers[Number(w)]?.host !== batch.host) {
    fault("misfiled", `${label}, belongs to ${window} of ${writers[Number(w)]?.host}`);
  }
  const key = `${batch.window} ${w} ${g}`;
  const last = seen.last.get(key) ?? -1;
  if (number < last && !isClockPart(batch)) fault("outOfOrder", `${label}, after n${last}`);
  seen.last.set(key, Math.max(last, number));
}

/** Numbered by the clock's seconds, after a loss: what is in it may lie before what was delivered already. */
function isClockPart({ part }: Batch): boolean {
  return part > 1_000_000_000;
}

/**
 * Judges what came twice. For each loss, the first line of each file that was not delivered as of the last heartbeat
 * is found; of what an earlier loss made come again, the second coming counts. Gives how many lines came again within that.
 */
function judgeRepeats(
  seen: Seen,
  writers: Written[],
  { losses = [], heartbeatMs = 0, leftOutLines = 0, forgets = [] }: Circumstances,
  fault: Fault,
): number {
  const repeats = new Map<string, { name: string; times: number[] }>();
  for (const [key, times] of seen.repeats) {
    const [w, g, n, name = ""] = key.split(" ");
    const line = `${w} ${g} ${n}`;
    const known = repeats.get(line);
    repeats.set(line, { name, times: [...(known?.times ?? []), ...times] });
  }
  let again = 0;
  for (const [life, numbers] of seen.lives) {
    numbers.sort((a, b) => a - b);
    const timesOf = (n: number) => [
      seen.first[Number(life.split(" ")[0])]?.[n] ?? 0,
      ...(repeats.get(`${life} ${n}`)?.times ?? []),
    ];
    const host = writers[Number(life.split(" ")[0])]?.host;
    let index = 0;
    const bounds = losses.map((at, i) => {
      const [since, next] = [losses[i - 1] ?? 0, losses[i + 1] ?? Number.POSITIVE_INFINITY];
      if (forgets.some((one) => one.host === host && one.at > at && one.at < next)) {
        index = 0;
        return 0;
      }
      const isThere = (n: number) => timesOf(n).some((time) => time > since && time <= at - heartbeatMs);
      while (index < numbers.length && isThere(numbers[index] as number)) index++;
      if (index === numbers.length) return Number.POSITIVE_INFINITY;
      return numbers[Math.max(0, index - leftOutLines)] ?? 0;
    });
    for (const n of numbers) {
      const repeat = repeats.get(`${life} ${n}`);
      if (!repeat) continue;
      const most = bounds.filter((bound) => n >= bound).length;
      again += Math.min(most, repeat.times.length);
      const [w, g] = life.split(" ");
      const beyond = repeat.times.length - most;
      if (beyond > 0) fault("twice", `w${w} g${g} n${n} in ${repeat.name}`, beyond);
    }
  }
  return again;
}

/** Lines without a timestamp in open batches: they are on their way, each at most once, and hold back what is delivered. */
function noteOpen(server: string, seen: Seen): void {
  for (const host of readdirSync(server, { withFileTypes: true })) {
    if (!host.isDirectory()) continue;
    const folder = join(server, host.name);
    for (const file of readdirSync(folder).filter((name) => name.endsWith(".log.part"))) {
      for (const line of readFileSync(join(folder, file), "latin1").split("\n")) {
        const [, w, g, n] = line.startsWith(UNTIMED) ? (LINE.exec(line) ?? []) : [];
        const numbers = seen.first[Number(w)];
        if (numbers?.[Number(n)] !== 0) continue;
        numbers[Number(n)] = Number.POSITIVE_INFINITY;
        seen.lives.set(`${w} ${g}`, [...(seen.lives.get(`${w} ${g}`) ?? []), Number(n)]);
      }
    }
  }
}

function findMissing(w: number, numbers: Float64Array, fault: Fault): void {
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

/** The report lines that say Sent, by batch; times are of this machine's zone. */
type Told = Map<string, { lines: number; at: number }[]>;

function readReport(report: string, fault: Fault): Told {
  const told: Told = new Map();
  const text = existsSync(report) ? readFileSync(report, "utf8") : "";
  for (const line of text.split("\n")) {
    if (line === "") continue;
    const [, at = "", name, lines] = /^(.{19}) \| (\S+) \| lines=(\d+) \| status=Sent$/.exec(line) ?? [];
    if (name === undefined) fault("misreported", `not a report line: ${line}`);
    else {
      const entry = { lines: Number(lines), at: new Date(at.replace(" ", "T")).getTime() };
      told.set(name, [...(told.get(name) ?? []), entry]);
    }
  }
  return told;
}

/** When the forwarder had each batch in sent/, by its log. */
function readMoves(forwarderLog = ""): Map<string, number> {
  const log = existsSync(forwarderLog) ? readFileSync(forwarderLog, "utf8") : "";
  const lines = log.matchAll(/^(\S+) info batch delivered batch=(\S+)/gm);
  return new Map([...lines].map(([, at = "", name = ""]) => [name, Date.parse(at)]));
}

/** Every delivered batch has one line `time | name | lines=n | status=Sent`, and no other has one. */
function checkReport(
  folder: string,
  told: Told,
  moved: Map<string, number>,
  lengths: Map<string, number>,
  { losses = [] }: Circumstances,
  fault: Fault,
): void {
  for (const [name, lines] of lengths) {
    const own = told.get(name) ?? [];
    if (own.length === 1 && own[0]?.lines === lines) continue;
    const named = statSync(join(folder, name)).ctimeMs;
    const isLost = !moved.has(name) && losses.some((loss) => named <= loss + KILLED_MS);
    if (own.length === 0 && isLost) continue;
    const counts = own.map((entry) => entry.lines).join(", ");
    fault("misreported", `${name} has ${lines} lines, told: ${counts || "nothing"}`);
  }
  for (const name of told.keys())
    if (!lengths.has(name)) fault("misreported", `${name} was told but is not there`);
}
