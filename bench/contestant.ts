/**
 * What takes part in the benchmark: a way to bring the lines of one log into files at the other end. Senders
 * and receivers are real processes with real configs; limits (cp, dd) are one command without two ends.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, mkdirSync, openSync, readdirSync, statSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { freePort } from "./pipeline.ts";

const ROOT = join(import.meta.dirname, "..");
export const HOST = "10.10.21.181";

/** Both ends of a running contestant. */
export interface Pair {
  sender: number;
  receiver: number;
  /** Files at the other end, in the order of the lines. */
  outputs(): string[];
  /** Whether all of the first `bytes` of the log are at the other end, and acknowledged if it does that. */
  delivered(bytes: number): Promise<boolean>;
  stop(): Promise<void>;
}

export interface Contestant {
  name: string;
  /** What its "done" means. */
  promise: string;
  /** Starts both ends in an empty folder; the sender follows `log`. */
  start(folder: string, log: string): Promise<Pair>;
}

/** This project; `shipper` is added to that section, `via` gives the port of a proxy in front of the receiver's. */
export function ours(
  compression: "none" | "zstd",
  {
    name = compression === "none" ? "log-rt-sync" : "log-rt-sync, zstd",
    via = async (port: number) => port,
    shipper: more = {},
  } = {},
): Contestant {
  return {
    name,
    promise: "synced and acknowledged",
    start: async (folder, log) => {
      const dir = join(folder, "batches");
      mkdirSync(dir);
      const port = await freePort();
      const config = join(folder, "config.json");
      const shipper = {
        files: [log],
        receiver: `http://127.0.0.1:${await via(port)}`,
        host: HOST,
        stateDir: join(folder, "state"),
        compression,
        ...more,
      };
      const receiver = { groups: [{ port, senders: ["*"] }], dir };
      writeFileSync(config, JSON.stringify({ shipper, receiver }));
      mkdirSync(shipper.stateDir);
      const server = runScript(folder, "receiver", config);
      await reachable(port);
      const client = runScript(folder, "shipper", config);
      const outputs = () => listBatchFiles(join(dir, HOST));
      return {
        sender: client.pid as number,
        receiver: server.pid as number,
        outputs,
        delivered: async (bytes) => {
          if (sizeOf(outputs()) < bytes) return false;
          // What the receiver answers is on stable storage; its ledger follows seconds later.
          const asked = { method: "POST", headers: { "Log-Host": HOST } };
          const answer = await fetch(`http://127.0.0.1:${port}/streams`, asked);
          const { streams } = (await answer.json()) as { streams: { offset: number }[] };
          return streams.some(({ offset }) => offset >= bytes);
        },
        stop: () => stopAll([client, server]),
      };
    },
  };
}

/** As in the units, where the reasons stand; a value in the environment wins. */
const ENVIRONMENT: Record<string, Record<string, string>> = {
  shipper: { BUN_JSC_useBaselineJIT: "0", BUN_JSC_forceRAMSize: "67108864" },
  receiver: { UV_THREADPOOL_SIZE: "16" },
};

/** Starts one of the five scripts as the units in deploy/ do. */
export function runScript(folder: string, name: string, config: string, flags: string[] = []): ChildProcess {
  const runtime = name === "receiver" ? [] : ["--smol"];
  const profile = process.env.BENCH_PROFILE === name ? ["--cpu-prof-md", `--cpu-prof-dir=${folder}`] : [];
  const args = [...runtime, ...profile, "run", join(ROOT, `${name}.ts`), "--config", config, ...flags];
  return run(folder, name, process.execPath, args, ENVIRONMENT[name] ?? {});
}

/** Starts a program; what it says goes to a file of its name in `folder`. */
export function run(
  folder: string,
  label: string,
  command: string,
  args: string[],
  env: Record<string, string> = {},
): ChildProcess {
  const out = openSync(join(folder, `${label}.log`), "a");
  const child = spawn(command, args, {
    cwd: folder,
    env: { ...env, ...process.env },
    stdio: ["ignore", out, out],
  });
  closeSync(out);
  return child;
}

/** SIGTERM, and SIGKILL for what does not follow within 5 seconds. */
export async function stopAll(children: ChildProcess[]): Promise<void> {
  const end = async (child: ChildProcess) => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const ended = new Promise((resolve) => child.on("close", resolve));
    child.kill("SIGCONT");
    child.kill("SIGTERM");
    const hard = setTimeout(() => child.kill("SIGKILL"), 5000);
    await ended;
    clearTimeout(hard);
  };
  await Promise.all(children.map(end));
}

/** Waits until something listens on the port. */
export async function reachable(port: number): Promise<void> {
  for (let tries = 0; tries < 500; tries++) {
    const open = await new Promise<boolean>((resolve) => {
      const socket = connect(port, "127.0.0.1");
      socket.on("connect", () => {
        socket.destroy();
        resolve(true);
      });
      socket.on("error", () => resolve(false));
    });
    if (open) return;
    await sleep(20);
  }
  throw new Error(`Cannot reach port ${port}: nothing listens there after 10 seconds`);
}

/** Sizes of files that may not be there yet. */
export function sizeOf(paths: string[]): number {
  let bytes = 0;
  for (const path of paths) {
    try {
      bytes += statSync(path).size;
    } catch {
      // not yet
    }
  }
  return bytes;
}

/** Batches of a host's folder, open and sealed, by name: the timestamps of the generated logs only rise. */
export function listBatchFiles(folder: string): string[] {
  try {
    const names = readdirSync(folder).filter((name) => /\.log(\.part)?$/.test(name));
    return names.sort().map((name) => join(folder, name));
  } catch {
    return [];
  }
}

export function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
