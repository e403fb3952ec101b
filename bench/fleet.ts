/**
 * A fleet against one receiver: many senders, each with its own host and stream over a connection of its own,
 * post what has become due since their last answer, as a shipper does, at most once per flush interval.
 * Requests are written by hand onto sockets, so that the fleet costs little of the two cores. It runs as a
 * process of its own (`fleet.ts PORT SENDERS RATE SECONDS`) and prints its counts as JSON.
 */
import { connect, type Socket } from "node:net";
import { combinedLine, formatTime } from "./generate.ts";
import { createRandom } from "./random.ts";
import { percentile } from "./sample.ts";

/** What the fleet came to. */
export interface FleetResult {
  senders: number;
  seconds: number;
  /** Lines that were answered with 200, and how many should have been. */
  acknowledged: number;
  due: number;
  requests: number;
  /** Answers that were no 200. */
  refused: number;
  /** Milliseconds from the first byte of a request to its answer. */
  medianMs: number;
  p99Ms: number;
  worstMs: number;
}

const FLUSH_MS = 100;
/** Most lines in one request: a sender that fell behind catches up in full chunks. */
const MOST_LINES = 4000;

interface FleetOptions {
  port: number;
  senders: number;
  /** Lines per second of each sender. */
  rate: number;
  seconds: number;
}

/** Runs the fleet to its end. */
export async function runFleet(options: FleetOptions): Promise<FleetResult> {
  const lines = makeLines(options.rate * 8);
  const latencies: number[] = [];
  const counts = { acknowledged: 0, refused: 0 };
  const started = performance.now();
  const ending = started + options.seconds * 1000;
  const senders = Array.from({ length: options.senders }, (_, i) =>
    runSender(i, options, lines, { ending, latencies, counts }),
  );
  await Promise.all(senders);
  const seconds = (performance.now() - started) / 1000;
  return {
    senders: options.senders,
    seconds,
    acknowledged: counts.acknowledged,
    due: options.senders * options.rate * options.seconds,
    requests: latencies.length,
    refused: counts.refused,
    medianMs: percentile(latencies, 50),
    p99Ms: percentile(latencies, 99),
    worstMs: percentile(latencies, 100),
  };
}

interface Lines {
  bytes: Buffer;
  /** Where line i begins; one more than there are lines. */
  starts: number[];
}

/** Lines to choose a run from; the numbers in them do not matter here. */
function makeLines(count: number): Lines {
  const random = createRandom(7);
  const now = Date.now();
  const texts = Array.from({ length: Math.max(count, MOST_LINES * 2) }, (_, i) =>
    combinedLine(random, i, formatTime(now)),
  );
  const starts = [0];
  for (const text of texts) starts.push((starts.at(-1) as number) + text.length);
  return { bytes: Buffer.from(texts.join(""), "latin1"), starts };
}

interface Shared {
  ending: number;
  latencies: number[];
  counts: { acknowledged: number; refused: number };
}

/** One sender: a request, its answer, a pause to the next flush, until the end and all that was due is sent. */
async function runSender(i: number, options: FleetOptions, lines: Lines, shared: Shared): Promise<void> {
  const host = `10.${20 + (i >> 8)}.${i & 255}.1`;
  const socket = connect(options.port, "127.0.0.1");
  socket.setNoDelay(true);
  const answers = readAnswers(socket);
  await sleep((i / options.senders) * FLUSH_MS); // a fleet does not breathe in step
  const started = performance.now();
  const total = options.rate * options.seconds;
  let sent = 0;
  let offset = 0;
  while (sent < total) {
    const now = performance.now();
    const due = Math.min(total, Math.floor(((now - started) / 1000) * options.rate)) - sent;
    const count = Math.min(due, MOST_LINES);
    if (count > 0) {
      const from = sent % (lines.starts.length - 1 - MOST_LINES);
      const body = lines.bytes.subarray(lines.starts[from], lines.starts[from + count]);
      socket.write(requestHead(host, offset, offset + body.length, options.port));
      socket.write(body);
      const status = await answers.next();
      shared.latencies.push(performance.now() - now);
      if (status === 200) {
        sent += count;
        offset += body.length;
        shared.counts.acknowledged += count;
      } else shared.counts.refused++;
    }
    if (now > shared.ending + 30_000) break; // never caught up: what is missing is in the counts
    if (due <= MOST_LINES) await sleep(FLUSH_MS - (performance.now() - now));
  }
  socket.destroy();
}

function requestHead(host: string, offset: number, end: number, port: number): string {
  return [
    "POST /upload HTTP/1.1",
    `Host: 127.0.0.1:${port}`,
    "Content-Type: text/plain",
    `Content-Length: ${end - offset}`,
    `Log-Host: ${host}`,
    `Log-Stream: fleet-${host.replaceAll(".", "-")}`,
    `Upload-Offset: ${offset}`,
    `Upload-End: ${end}`,
    "\r\n",
  ].join("\r\n");
}

/** The status of each answer on a connection, in order. */
function readAnswers(socket: Socket): { next(): Promise<number> } {
  let text = "";
  let waiter: { resolve: (status: number) => void; reject: (error: Error) => void } | undefined;
  socket.on("data", (data) => {
    text += data.toString("latin1");
    const head = text.indexOf("\r\n\r\n");
    if (head < 0) return;
    const length = Number(/^content-length: (\d+)/im.exec(text.slice(0, head))?.[1] ?? 0);
    if (text.length < head + 4 + length) return;
    const status = Number(text.slice(9, 12));
    text = text.slice(head + 4 + length);
    waiter?.resolve(status);
  });
  socket.on("error", (error) => waiter?.reject(error));
  socket.on("close", () => waiter?.reject(new Error("the receiver closed the connection")));
  return {
    next: () =>
      new Promise((resolve, reject) => {
        waiter = { resolve, reject };
      }),
  };
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, ms)));
}

if (import.meta.main) {
  const [port, senders, rate, seconds] = process.argv.slice(2).map(Number) as [
    number,
    number,
    number,
    number,
  ];
  process.stdout.write(JSON.stringify(await runFleet({ port, senders, rate, seconds })));
  process.exit(0);
}
