/**
 * What a heartbeat costs the receiver: `bun run bench/heartbeat.ts [--logs 1000]`. A host with so many logs, each with a
 * chunk in a batch that waits, asks where all of them stand. DESIGN's aim: under 2 MiB and 20 ms.
 */
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { reachable, runScript, sleep, stopAll } from "./contestant.ts";
import { formatZonedTime } from "./generate.ts";
import { freePort } from "./pipeline.ts";
import { median } from "./sample.ts";

const HOST = "10.0.0.1";
const MARK = `64:${"A".repeat(22)}`;
const ROUNDS = 50;
/** Of 20 minutes each. */
const WINDOWS = 72;

export interface Heartbeat {
  logs: number;
  /** Sealed ones, that wait for a forwarder. */
  batches: number;
  /** Of the answer. */
  bytes: number;
  medianMs: number;
  worstMs: number;
}

/** Begins `logs` streams at a receiver of its own, and asks for all of them. */
export async function measureHeartbeat(logs: number): Promise<Heartbeat> {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-heartbeat-"));
  const port = await freePort();
  const config = join(folder, "config.json");
  const dir = join(folder, "batches");
  const receiver = { groups: [{ port, senders: ["*"] }], dir, sealAfterSeconds: 0.5 };
  writeFileSync(config, JSON.stringify({ receiver }));
  const server = runScript(folder, "receiver", config);
  try {
    await reachable(port);
    const streams = Array.from({ length: logs }, (_, i) => `stream-${String(i).padStart(15, "0")}`);
    for (const [i, stream] of streams.entries()) await begin(port, stream, i);
    const sealed = () => readdirSync(join(dir, HOST)).filter((name) => name.endsWith(".log")).length;
    for (let tries = 0; sealed() < WINDOWS - 2 && tries < 200; tries++) await sleep(100); // the newest ones are open
    const batches = sealed();
    const times: number[] = [];
    let bytes = 0;
    for (let round = 0; round < ROUNDS; round++) {
      const from = performance.now();
      const answer = await ask(port, streams);
      times.push(performance.now() - from);
      bytes = answer.byteLength;
    }
    return { logs, batches, bytes, medianMs: median(times), worstMs: Math.max(...times) };
  } finally {
    await stopAll([server]);
    rmSync(folder, { recursive: true, force: true });
  }
}

/** One line, in one of the windows of the last day. */
async function begin(port: number, stream: string, i: number): Promise<void> {
  const time = formatZonedTime(Date.now() - (i % WINDOWS) * 1_200_000, 0);
  const body = `10.0.0.1 - - [${time}] "GET /${i} HTTP/1.1" 200 5 "-" "-"\n`;
  const response = await fetch(`http://127.0.0.1:${port}/upload`, {
    method: "POST",
    headers: {
      ...{ "Log-Host": HOST, "Log-Stream": stream, "Log-Begin": "1", "Content-Type": "text/plain" },
      ...{ "Upload-Offset": "0", "Upload-End": String(body.length), "Log-Mark": MARK, "Log-Head": MARK },
    },
    body,
  });
  if (response.status !== 200) throw new Error(`chunk ${i}: ${response.status} ${await response.text()}`);
}

async function ask(port: number, streams: string[]): Promise<ArrayBuffer> {
  const response = await fetch(`http://127.0.0.1:${port}/streams`, {
    method: "POST",
    headers: { "Log-Host": HOST },
    body: JSON.stringify({ streams }),
  });
  if (response.status !== 200) throw new Error(`question: ${response.status} ${await response.text()}`);
  return response.arrayBuffer();
}

if (import.meta.main) {
  const { values } = parseArgs({ options: { logs: { type: "string", default: "1000" } } });
  const { logs, batches, bytes, medianMs, worstMs } = await measureHeartbeat(Number(values.logs));
  const times = `median ${medianMs.toFixed(1)} ms, worst ${worstMs.toFixed(1)} ms`;
  process.stdout.write(
    `heartbeat of ${logs} logs, ${batches} batches wait: ${(bytes / 1024).toFixed(0)} KiB, ${times}\n`,
  );
}
