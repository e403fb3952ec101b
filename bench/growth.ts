/**
 * Whether cost grows in a line: CPU time for ten times the senders of a receiver, and for ten times the batches of
 * a forwarder. Each number is of a process of its own; what its start costs is measured, too, and taken off.
 */
import { mkdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { reachable, run, runScript, sleep, stopAll } from "./contestant.ts";
import { freePort } from "./pipeline.ts";
import { median, sample } from "./sample.ts";

export interface Growth {
  /** CPU seconds for `few` and for ten times as many. */
  rows: { what: string; few: number; cpuFew: number; cpuMany: number }[];
}

const TIMES = 10;
const ROUNDS = 2;
const SENDERS = { few: 20, rate: 100, seconds: 8 };
const BATCHES = { few: 100, bytes: 48 * 1024 };

/** Measures both in turn with few and with many. */
export async function measureGrowth(root: string): Promise<Growth> {
  const both = async (cost: (count: number) => Promise<number>, few: number) => {
    const costs = { few: [] as number[], many: [] as number[] };
    for (let round = 0; round < ROUNDS; round++) {
      const start = await cost(0);
      costs.few.push((await cost(few)) - start);
      costs.many.push((await cost(few * TIMES)) - start);
    }
    return { few, cpuFew: median(costs.few), cpuMany: median(costs.many) };
  };
  return {
    rows: [
      { what: "senders of a receiver", ...(await both((count) => ofSenders(root, count), SENDERS.few)) },
      { what: "batches of a forwarder", ...(await both((count) => ofBatches(root, count), BATCHES.few)) },
    ],
  };
}

/** CPU seconds of a receiver that so many senders post to at the same rate each. */
async function ofSenders(root: string, count: number): Promise<number> {
  const folder = freshFolder(root);
  const port = await freePort();
  const config = join(folder, "config.json");
  const receiver = { groups: [{ port, senders: ["*"] }], dir: join(folder, "batches") };
  writeFileSync(config, JSON.stringify({ receiver }));
  const server = runScript(folder, "receiver", config);
  try {
    await reachable(port);
    if (count > 0) {
      const args = [port, count, SENDERS.rate, SENDERS.seconds].map(String);
      const script = join(import.meta.dirname, "fleet.ts");
      const fleet = run(folder, "fleet", process.execPath, ["run", script, ...args]);
      await new Promise((resolve) => fleet.on("close", resolve));
    } else await sleep(500);
    return sample(server.pid as number).cpuSeconds;
  } finally {
    await stopAll([server]);
    rmSync(folder, { recursive: true, force: true });
  }
}

/** CPU seconds of a forwarder that delivers so many batches into a folder, and then waits. */
async function ofBatches(root: string, count: number): Promise<number> {
  const folder = freshFolder(root);
  const dir = join(folder, "batches");
  mkdirSync(join(dir, "10.10.21.181"), { recursive: true });
  const line = '10.0.0.1 - - [22/Nov/2026:06:20:01 +0600] "GET / HTTP/1.1" 200 512 "-" "curl/8.5"\n';
  const content = line.repeat(Math.ceil(BATCHES.bytes / line.length));
  for (let i = 0; i < count; i++) {
    const name = `accessLog_26010100_00-19_10-10-21-181${i === 0 ? "" : `.${i + 1}`}.log`;
    writeFileSync(join(dir, "10.10.21.181", name), content);
  }
  const config = join(folder, "config.json");
  const target = `file://${join(folder, "client")}`;
  writeFileSync(config, JSON.stringify({ forwarder: { dir, target, report: join(folder, "report.log") } }));
  const child = runScript(folder, "forwarder", config);
  try {
    // It is done when it has used no CPU time for a while.
    let before = -1;
    for (let now = 0; now !== before || now === 0; now = sample(child.pid as number).cpuSeconds) {
      before = now;
      await sleep(700);
    }
    return before;
  } finally {
    await stopAll([child]);
    rmSync(folder, { recursive: true, force: true });
  }
}

function freshFolder(root: string): string {
  const folder = join(root, "growth");
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  return folder;
}
