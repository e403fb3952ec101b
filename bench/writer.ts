/**
 * A writer that treats its log as nginx and logrotate do: numbered lines, rotation by rename with a moment of
 * writes to the old file, copytruncate, dated and numbered names, gzip at once, later or never.
 *
 * Each line tells its own truth for the checker: `/w<writer>/g<incarnation>/n<number>/<window>` and at its end
 * the CRC-32 of the bytes before. An incarnation is one life of a file: a rotation by rename or truncation
 * begins the next. Nothing that this writer rotates is destroyed: copytruncate waits for the copy.
 */
import { execFile } from "node:child_process";
import { closeSync, existsSync, openSync, renameSync, writeSync } from "node:fs";
import { copyFile, readdir, rename, stat, truncate } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { promisify } from "node:util";
import { crc32 } from "node:zlib";
import { formatZonedTime } from "./generate.ts";
import type { Random } from "./random.ts";

const WINDOW_MINUTES = 20;
/** How many rotated files are kept: far more than a shipper is ever behind. */
const KEPT = 200;

export type Rotation = "rename" | "rename late create" | "copytruncate";

/** How a writer behaves, and its number, by which the checker knows it. */
export interface WriterOptions {
  id: number;
  host: string;
  path: string;
  linesPerSecond: number;
  /** Where its clock begins, milliseconds since the epoch; it runs `clockSpeed` times as fast as ours. */
  startMs: number;
  clockSpeed: number;
  /** Minutes east of Greenwich. */
  zone: number;
  /** `access.log-20261122-…` instead of `access.log.1`. */
  dated: boolean;
  random: Random;
}

/** An open file and which life of the log it is. */
interface Incarnation {
  fd: number;
  number: number;
}

/** A running writer. */
export interface Writer {
  readonly host: string;
  /** Lines written that must arrive. */
  readonly lines: number;
  /** Bytes of those lines. */
  readonly bytes: number;
  /** Rotates; a rotation asked for while one is going on is left out. `gzip`: at once or with the next one. */
  rotate(kind: Rotation, gzip: "never" | "now" | "later", graceMs: number): Promise<void>;
  /** Moves its clock on by so many minutes, also back. */
  moveClock(minutes: number): void;
  /** Writes nothing for so long. */
  hush(ms: number): void;
  /** Ends it with a whole line. */
  stop(): Promise<void>;
}

/** Starts to write at once. */
export function createWriter(options: WriterOptions): Writer {
  const { random, path } = options;
  let live: Incarnation = { fd: openSync(path, "a"), number: 0 };
  let old: Incarnation | undefined; // renamed, but some workers still have it open
  let lines = 0;
  let bytes = 0;
  let clock = options.startMs;
  let last = Date.now();
  let owed = 0;
  let paused = false;
  let quietUntil = 0;
  let rotating: Promise<void> | undefined;
  let later: string | undefined; // rotated, to be compressed with the next rotation
  let rest: { fd: number; bytes: Buffer } | undefined; // second half of a line that is being written
  const filed = new Map<number, string>(); // incarnation → window of its last line

  const finishLine = () => {
    if (rest) writeSync(rest.fd, rest.bytes);
    rest = undefined;
  };

  const tick = () => {
    const now = Date.now();
    const passed = now - last;
    last = now;
    clock += passed * options.clockSpeed;
    if (paused || now < quietUntil) return;
    finishLine();
    owed += (passed / 1000) * options.linesPerSecond;
    const count = Math.min(Math.floor(owed), options.linesPerSecond);
    owed = Math.max(0, owed - count);
    const into = old && random.chance(0.5) ? old : live;
    const block: Buffer[] = [];
    for (let i = 0; i < count; i++) {
      const line = makeLine(options, into.number, lines, clock, filed);
      bytes += line.length;
      lines++;
      block.push(line);
      if (random.chance(0.01)) block.push(HEALTH_CHECK);
    }
    const data = Buffer.concat(block);
    const whole = count > 0 && random.chance(0.02) ? random.between(1, data.length - 1) : data.length;
    writeSync(into.fd, data.subarray(0, whole));
    if (whole < data.length) rest = { fd: into.fd, bytes: data.subarray(whole) };
  };
  const timer = setInterval(tick, 20);

  const rotateNow = async (kind: Rotation, gzip: "never" | "now" | "later", graceMs: number) => {
    await shiftNames(path, options.dated);
    const target = options.dated ? await freeDatedName(path) : `${path}.1`;
    if (kind === "copytruncate") {
      finishLine();
      paused = true; // what is written between copy and truncation would be destroyed, by design of logrotate
      await copyFile(path, target);
      await truncate(path);
      live = { fd: live.fd, number: live.number + 1 };
      paused = false;
    } else {
      renameSync(path, target);
      const next = live.number + 1;
      if (kind === "rename") {
        old = live;
        live = { fd: openSync(path, "a"), number: next };
        await sleep(graceMs);
        finishLine();
        closeSync(old.fd);
        old = undefined;
      } else {
        await sleep(graceMs); // the name is missing meanwhile, everything goes to the old file
        finishLine();
        closeSync(live.fd);
        live = { fd: openSync(path, "a"), number: next };
      }
    }
    if (later !== undefined) await compress(options.dated ? later : `${path}.2`);
    later = gzip === "later" ? target : undefined;
    if (gzip === "now") await compress(target);
  };

  return {
    host: options.host,
    get lines() {
      return lines;
    },
    get bytes() {
      return bytes;
    },
    rotate: async (kind, gzip, graceMs) => {
      if (rotating) return;
      rotating = rotateNow(kind, gzip, graceMs).finally(() => {
        rotating = undefined;
      });
      await rotating;
    },
    moveClock: (minutes) => {
      clock += minutes * 60_000;
    },
    hush: (ms) => {
      quietUntil = Date.now() + ms;
    },
    stop: async () => {
      await rotating;
      clearInterval(timer);
      finishLine();
      closeSync(live.fd);
    },
  };
}

/** What the shippers are told to skip. */
export const SKIP = ["/health.php", "health check"];
const HEALTH_CHECK = Buffer.from(
  '127.0.0.1 - - [01/Jan/2020:00:00:00 +0000] "GET /health.php HTTP/1.1" 200 2 "-" "health check"\n',
);
/** What browsers and attackers send: no UTF-8, control characters, separators of other worlds, brackets. */
const ODD = [
  "",
  "",
  "",
  "\xff\xfe\x80",
  "a\rb",
  "\0\0",
  "\xe2\x80\xa8",
  "\x0b\x0c",
  "\xef\xbb\xbf",
  "] [ \" '",
];

/** One line: mostly combined format, seldom one without a timestamp, which belongs where the last one went. */
function makeLine(
  options: WriterOptions,
  incarnation: number,
  number: number,
  clock: number,
  filed: Map<number, string>,
): Buffer {
  const { random } = options;
  const before = filed.get(incarnation);
  const label = (window: string) => `/w${options.id}/g${incarnation}/n${number}/${window}`;
  if (before !== undefined && random.chance(0.003)) return sealed(`  continued ${label(before)} `);
  const window = windowOf(clock, options.zone);
  filed.set(incarnation, window);
  const time = formatZonedTime(clock, options.zone);
  const user = random.chance(0.005) ? "[01/Jan/2020:00:00:00 +0000]" : "-";
  const agent = `Mozilla/5.0 (X11; Linux x86_64) Chrome/124.0 ${random.pick(ODD)}`;
  const padding = random.chance(0.0005) ? "x".repeat(random.between(1000, 50_000)) : "";
  return sealed(
    `10.0.0.${number % 250} - ${user} [${time}] "GET ${label(window)} HTTP/1.1" 200 ${number % 9000} "-" "${agent}${padding}" `,
  );
}

/** A line with its checksum and `\n`. */
function sealed(text: string): Buffer {
  const body = Buffer.from(text, "latin1");
  return Buffer.concat([body, Buffer.from(`${crc32(body).toString(16).padStart(8, "0")}\n`)]);
}

function windowOf(ms: number, zone: number): string {
  const iso = new Date(ms + zone * 60_000).toISOString();
  const first = Math.floor(Number(iso.slice(14, 16)) / WINDOW_MINUTES) * WINDOW_MINUTES;
  const two = (n: number) => String(n).padStart(2, "0");
  const day = iso.slice(2, 4) + iso.slice(5, 7) + iso.slice(8, 10) + iso.slice(11, 13);
  return `${day}_${two(first)}-${two(first + WINDOW_MINUTES - 1)}`;
}

/** Makes room for `access.log.1`: 2 → 3, 1 → 2, with their `.gz`. Dated names need none. */
async function shiftNames(path: string, dated: boolean): Promise<void> {
  if (dated) return;
  const folder = dirname(path);
  const prefix = `${basename(path)}.`;
  const numbered = (await readdir(folder))
    .filter((name) => name.startsWith(prefix))
    .map((name) => ({ name, number: Number.parseInt(name.slice(prefix.length), 10) }))
    .filter(({ number }) => number < KEPT)
    .sort((a, b) => b.number - a.number);
  for (const { name, number } of numbered) {
    const end = name.endsWith(".gz") ? ".gz" : "";
    await rename(join(folder, name), `${path}.${number + 1}${end}`);
  }
}

/** logrotate's `dateext` with `dateformat -%Y%m%d-%s`; waits for the next second when the name is taken. */
async function freeDatedName(path: string): Promise<string> {
  for (;;) {
    const now = new Date();
    const day = now.toISOString().slice(0, 10).replaceAll("-", "");
    const name = `${path}-${day}-${Math.floor(now.getTime() / 1000)}`;
    if (!existsSync(name) && !existsSync(`${name}.gz`)) return name;
    await sleep(50);
  }
}

const run = promisify(execFile);

/** gzip(1) as logrotate runs it: the `.gz` grows beside the file, then the file goes. */
async function compress(path: string): Promise<void> {
  const there = await stat(path).catch(() => undefined);
  if (there) await run("gzip", ["-1", path]);
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
