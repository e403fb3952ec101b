/**
 * The traffic: one writer per host that appends lines to an access log as nginx does, rotates it as logrotate
 * does, and knows how many lines it has written. Its clock runs fast, so that half a minute covers several
 * windows.
 */
import { closeSync, mkdirSync, openSync, renameSync, writeSync } from "node:fs";
import { dirname } from "node:path";

/** The stretch of time that the timestamps cover, and how long writing it takes. Milliseconds. */
export interface Clock {
  from: number;
  to: number;
  durationMs: number;
  /** Minutes east of UTC, as the timestamps show it. */
  zone: number;
}

/** One host's nginx. */
export interface Writer {
  host: string;
  file: string;
  /** The log's files, oldest first. */
  files: string[];
  lines: number;
  /** The log was renamed, and nginx still writes to the old file. */
  reopening: boolean;
  /** End of each line written, in bytes since the first: tells how many lines some bytes are. */
  ends: number[];
  /** Writes the lines that are due at `elapsedMs` since the start. */
  write(elapsedMs: number): void;
  /** Renames the log and creates a new one; the old one is written to for one more second, until the signal. */
  rotate(elapsedMs: number): void;
  close(): void;
}

const TICK_MS = 50;
/** From the rename to the moment at which nginx has reopened its log. */
const REOPEN_MS = 1000;

/** Clock whose last window has just ended, so that every batch of it can be sealed. */
export function recentPast(now: number, minutes: number, windowMinutes: number, durationMs: number): Clock {
  const zone = -new Date(now).getTimezoneOffset();
  const window = windowMinutes * 60_000;
  const to = Math.floor((now + zone * 60_000) / window) * window - zone * 60_000;
  return { from: to - minutes * 60_000, to, durationMs, zone };
}

/** A host's writer; `perSecond` is its mean rate in lines, `seed` makes its traffic repeatable. */
export function createWriter(
  host: string,
  file: string,
  clock: Clock,
  perSecond: number,
  seed: number,
): Writer {
  mkdirSync(dirname(file), { recursive: true });
  const random = createRandom(seed);
  let fd = openSync(file, "a");
  let next: { fd: number; at: number } | undefined;
  let written = 0;
  let bytes = 0;

  const writer: Writer = {
    host,
    file,
    files: [file],
    lines: 0,
    reopening: false,
    ends: [],
    write(elapsedMs) {
      const until = Math.min(elapsedMs, clock.durationMs);
      for (; written + TICK_MS <= until; written += TICK_MS) {
        if (next && written >= next.at) {
          closeSync(fd);
          fd = next.fd;
          next = undefined;
          writer.reopening = false;
        }
        const wave = 1 + 0.6 * Math.sin(written / 2500 + seed) + (random() < 0.02 ? 6 : 0);
        const count = Math.floor((perSecond * wave * TICK_MS) / 1000 + random());
        const lines: string[] = [];
        for (let i = 0; i < count; i++) {
          const share = (written + (TICK_MS * i) / count) / clock.durationMs;
          const line = formatLine(random, clock.from + share * (clock.to - clock.from), clock.zone);
          lines.push(line);
          bytes += Buffer.byteLength(line);
          writer.ends.push(bytes);
        }
        if (count > 0) writeSync(fd, lines.join(""));
        writer.lines += count;
      }
    },
    rotate(elapsedMs) {
      const old = `${file}.${writer.files.length}`;
      renameSync(file, old);
      writer.files.splice(-1, 1, old, file);
      next = { fd: openSync(file, "a"), at: elapsedMs + REOPEN_MS };
      writer.reopening = true;
    },
    close() {
      closeSync(fd);
      if (next) closeSync(next.fd);
    },
  };
  return writer;
}

/** How many of a writer's lines lie within its first `bytes` bytes. */
export function linesWithin(writer: Writer, bytes: number): number {
  let low = 0;
  let high = writer.ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((writer.ends[middle] ?? 0) <= bytes) low = middle + 1;
    else high = middle;
  }
  return low;
}

const PATHS = [
  "/",
  "/",
  "/index.html",
  "/assets/app.4f1c.js",
  "/assets/site.css",
  "/img/logo.svg",
  "/api/cart",
  "/api/orders?page=2",
  "/search?q=caf%C3%A9+au+lait",
  "/login",
  "/health.php",
  "/produkte/größe-42",
  `/track?payload=${"Zm9vYmFy".repeat(60)}`,
];
const AGENTS = [
  "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0",
  "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7) AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.1 Safari/605.1.15",
  "Mozilla/5.0 (iPhone; CPU iPhone OS 18_1 like Mac OS X) AppleWebKit/605.1.15 Mobile/15E148",
  "curl/8.14.1",
  "\\x22quoted\\x22 agent",
  "-",
];
const STATUSES = [200, 200, 200, 200, 200, 200, 204, 301, 304, 304, 404, 499, 502];

/** One line in nginx's combined format. */
function formatLine(random: () => number, at: number, zone: number): string {
  const pick = <T>(list: T[]) => list[Math.floor(random() * list.length)] as T;
  const address = `203.0.113.${1 + Math.floor(random() * 254)}`;
  const method = random() < 0.9 ? "GET" : "POST";
  const size = Math.floor(random() ** 4 * 90_000);
  return `${address} - ${random() < 0.05 ? "anna" : "-"} [${formatTime(at, zone)}] "${method} ${pick(PATHS)} HTTP/1.1" ${pick(STATUSES)} ${size} "-" "${pick(AGENTS)}"\n`;
}

const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");

/** nginx's $time_local: `22/Nov/2026:06:20:01 +0600`. */
function formatTime(at: number, zone: number): string {
  const local = new Date(at + zone * 60_000);
  const two = (n: number) => String(n).padStart(2, "0");
  const day = `${two(local.getUTCDate())}/${MONTHS[local.getUTCMonth()]}/${local.getUTCFullYear()}`;
  const time = `${two(local.getUTCHours())}:${two(local.getUTCMinutes())}:${two(local.getUTCSeconds())}`;
  const minutes = Math.abs(zone);
  return `${day}:${time} ${zone < 0 ? "-" : "+"}${two(Math.floor(minutes / 60))}${two(minutes % 60)}`;
}

/** A small repeatable generator (mulberry32): numbers from 0 to 1. */
function createRandom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
}
