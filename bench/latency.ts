/**
 * How long a single line takes from write(2) into the log until it is in a file at the other end, on stable
 * storage: the file is watched, and synced by the watcher itself before the clock is read, so the time is an
 * upper bound also for those that do not sync.
 */
import { closeSync, fdatasyncSync, mkdirSync, openSync, rmSync, watch, writeSync } from "node:fs";
import { dirname, join } from "node:path";
import { type Contestant, type Pair, sizeOf, sleep } from "./contestant.ts";
import { formatTime } from "./generate.ts";
import { percentile } from "./sample.ts";

/** Milliseconds. */
export interface Latency {
  lines: number;
  median: number;
  p99: number;
}

/** Single lines after pauses, and lines at a steady rate. */
export interface Latencies {
  idle: Latency;
  steady: Latency | undefined;
}

const IDLE_PAUSE_MS = 400;
const PATIENCE_MS = 20_000;

export interface LatencyOptions {
  idleLines: number;
  /** Lines per second and seconds of the steady part; no such part when absent. */
  steady?: { rate: number; seconds: number };
}

/** Measures a contestant at its default settings. */
export async function runLatency(
  contestant: Contestant,
  root: string,
  options: LatencyOptions,
): Promise<Latencies> {
  const folder = join(root, "latency");
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(join(folder, "log"), { recursive: true });
  const log = join(folder, "log", "access.log");
  const fd = openSync(log, "a");
  const line = (number: number) => Buffer.from(latencyLine(number));
  let written = writeSync(fd, line(0));
  const pair = await contestant.start(folder, log);
  try {
    for (const until = Date.now() + PATIENCE_MS; !(await pair.delivered(written)); await sleep(20)) {
      if (Date.now() > until) throw new Error(`${contestant.name} did not deliver the first line`);
    }
    await sleep(1000);
    const observer = observe(pair);
    const idle: number[] = [];
    for (let i = 1; i <= options.idleLines; i++) {
      await sleep(IDLE_PAUSE_MS);
      const at = performance.now();
      written += writeSync(fd, line(i));
      idle.push((await observer.reaches(written)) - at);
    }
    const steady = options.steady && (await runSteady(fd, written, line, observer, options.steady));
    observer.close();
    return { idle: summarise(idle), steady: steady && summarise(steady) };
  } finally {
    closeSync(fd);
    await pair.stop();
    rmSync(folder, { recursive: true, force: true });
  }
}

/** One line a millisecond, more or less; each has the time of its own write. */
async function runSteady(
  fd: number,
  before: number,
  line: (number: number) => Buffer,
  observer: Observer,
  { rate, seconds }: { rate: number; seconds: number },
): Promise<number[]> {
  const marks: { end: number; at: number }[] = [];
  const arrivals: number[] = [];
  let written = before;
  let arrived = 0;
  observer.onGrowth = (bytes, at) => {
    for (; arrived < marks.length; arrived++) {
      const mark = marks[arrived] as { end: number; at: number };
      if (mark.end > bytes) return;
      arrivals.push(at - mark.at);
    }
  };
  const total = rate * seconds;
  const started = performance.now();
  while (marks.length < total) {
    const due = Math.min(total, Math.floor(((performance.now() - started) / 1000) * rate));
    while (marks.length < due) {
      const at = performance.now();
      written += writeSync(fd, line(marks.length));
      marks.push({ end: written, at });
    }
    await sleep(1);
  }
  await observer.reaches(written);
  return arrivals;
}

interface Observer {
  /** The time at which so many bytes were there and synced. */
  reaches(bytes: number): Promise<number>;
  /** Told of every growth. */
  onGrowth: (bytes: number, at: number) => void;
  close(): void;
}

/** Watches the files of the other end; syncs what has grown before it looks at the clock. */
function observe(pair: Pair): Observer {
  const descriptors = new Map<string, number>();
  let seen = 0;
  let waiter: { bytes: number; resolve: (at: number) => void } | undefined;
  const observer: Observer = {
    onGrowth: () => {},
    reaches: (bytes) =>
      new Promise((resolve, reject) => {
        const late = setTimeout(
          () => reject(new Error(`a line did not arrive in ${PATIENCE_MS} ms`)),
          PATIENCE_MS,
        );
        waiter = {
          bytes,
          resolve: (at) => {
            clearTimeout(late);
            resolve(at);
          },
        };
        check();
      }),
    close: () => {
      watcher.close();
      clearInterval(poll);
      for (const fd of descriptors.values()) closeSync(fd);
    },
  };
  const check = () => {
    const files = pair.outputs();
    const bytes = sizeOf(files);
    if (bytes <= seen && !(waiter && seen >= waiter.bytes)) return;
    const newest = files.at(-1);
    if (newest !== undefined) {
      const fd = descriptors.get(newest) ?? openSync(newest, "r");
      descriptors.set(newest, fd);
      fdatasyncSync(fd);
    }
    const at = performance.now();
    seen = bytes;
    observer.onGrowth(bytes, at);
    if (waiter && bytes >= waiter.bytes) {
      const { resolve } = waiter;
      waiter = undefined;
      resolve(at);
    }
  };
  const watcher = watch(dirname(pair.outputs()[0] as string), check);
  const poll = setInterval(check, 50); // an event may be missed when the folder changes hands
  return observer;
}

const WINDOW_START = Date.UTC(2026, 0, 1, 12, 0, 0);

/** All in one window, so that the file at the other end only grows. */
function latencyLine(number: number): string {
  const time = formatTime(WINDOW_START + (number % 1000));
  return `10.0.0.1 - - [${time}] "GET /api/v2/latency?line=${number} HTTP/1.1" 200 512 "https://portal.example.com/" "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 Chrome/124.0 Safari/537.36"\n`;
}

function summarise(values: number[]): Latency {
  return { lines: values.length, median: percentile(values, 50), p99: percentile(values, 99) };
}
