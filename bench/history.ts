/**
 * Whether work grows with history: what forwarder, monitor and receiver cost per second of their loops, with an
 * empty `sent/` and with one of 10,000 delivered files. CPU time counts, because a cycle mostly waits.
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { reachable, run, runScript, sleep, stopAll } from "./contestant.ts";
import { freePort } from "./pipeline.ts";
import { cpuSecondsOf, median } from "./sample.ts";

export interface History {
  files: number;
  /** CPU milliseconds per second. */
  rows: { name: string; empty: number; full: number }[];
}

const FILES = 10_000;
const ROUNDS = 3;
const WARM_MS = 1500;
const MEASURED_MS = 4000;

/** Measures each with and without history, in turn. */
export async function measureHistory(root: string): Promise<History> {
  const rows: History["rows"] = [];
  const [without, with_] = [prepare(root, "without", 0), prepare(root, "with", FILES)];
  for (const name of ["forwarder", "monitor", "receiver"] as const) {
    const costs = { empty: [] as number[], full: [] as number[] };
    for (let round = 0; round < ROUNDS; round++) {
      costs.empty.push(await measureLoop(without, name));
      costs.full.push(await measureLoop(with_, name));
    }
    rows.push({ name, empty: median(costs.empty), full: median(costs.full) });
  }
  return { files: FILES, rows };
}

/** A folder with so many delivered files. */
function prepare(root: string, name: string, files: number): string {
  const folder = join(root, name);
  for (const path of ["batches/sent", "client", "mail"]) mkdirSync(join(folder, path), { recursive: true });
  for (let i = 0; i < files; i++) writeFileSync(join(folder, "batches/sent", batchName(i)), "line\n");
  return folder;
}

async function measureLoop(folder: string, name: "forwarder" | "monitor" | "receiver"): Promise<number> {
  const dir = join(folder, "batches");
  const port = await freePort();
  const report = join(folder, "report.log");
  const config = join(folder, "config.json");
  const smtp = `file://${join(folder, "mail")}`;
  writeFileSync(
    config,
    JSON.stringify({
      receiver: { groups: [{ port, senders: ["*"] }], dir },
      forwarder: { dir, target: `file://${join(folder, "client")}`, intervalSeconds: 0.1, report },
      monitor: {
        dir,
        report,
        stateFile: join(folder, "monitor.json"),
        schedule: "* * * * * *",
        mail: { smtp, from: "bench@example.com", to: ["ops@example.com"] },
      },
    }),
  );
  const child = runScript(folder, name, config, name === "monitor" ? ["--watch"] : []);
  const load: ReturnType<typeof run>[] = [];
  try {
    if (name === "receiver") {
      await reachable(port); // its cycle is a commit: ten senders keep it at work
      const args = [port, 10, 100, (WARM_MS + MEASURED_MS) / 1000 + 2].map(String);
      load.push(
        run(folder, "fleet", process.execPath, ["run", join(import.meta.dirname, "fleet.ts"), ...args]),
      );
    }
    await sleep(WARM_MS);
    const before = cpuSecondsOf(child.pid as number);
    await sleep(MEASURED_MS);
    return ((cpuSecondsOf(child.pid as number) - before) / (MEASURED_MS / 1000)) * 1000;
  } finally {
    await stopAll([...load, child]);
  }
}

/** Three windows an hour of one host, backwards from a day long gone. */
function batchName(i: number): string {
  const at = new Date(Date.UTC(2026, 0, 1) - i * 1_200_000).toISOString();
  const minute = Math.floor(Number(at.slice(14, 16)) / 20) * 20;
  const two = (n: number) => String(n).padStart(2, "0");
  const day = at.slice(2, 4) + at.slice(5, 7) + at.slice(8, 10) + at.slice(11, 13);
  return `accessLog_${day}_${two(minute)}-${two(minute + 19)}_10-10-21-181.log.gz`;
}
