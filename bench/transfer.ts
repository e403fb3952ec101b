/**
 * One measured transfer: both ends run and have brought over one line; then the sender is stopped (SIGSTOP),
 * a backlog is written to its log and synced, and the clock runs from the moment it may go on (SIGCONT) to
 * the last byte at the other end. So no contestant pays for its start, and all find the same cached file.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, mkdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { join } from "node:path";
import { type Contestant, sleep } from "./contestant.ts";
import { sample } from "./sample.ts";

/** A generated log and its first line, which warms the contestants up. */
export interface Input {
  path: string;
  lines: number;
  bytes: number;
}

/** What one transfer took. */
export interface Transfer {
  seconds: number;
  linesPerSecond: number;
  mebibytesPerSecond: number;
  /** CPU seconds per million lines. */
  senderCpu: number;
  receiverCpu: number;
  senderPeakMiB: number;
  receiverPeakMiB: number;
  /** Whether the other end has the same bytes in the same order. */
  identical: boolean;
}

const WARM_LINE = '127.0.0.1 - - [01/Jan/2026:00:00:01 +0000] "GET / HTTP/1.1" 200 1 "-" "warm"\n';
const GIVE_UP_MS = 180_000;

/** Measures a contestant in a fresh folder under `root`, which is removed afterwards. */
export async function runTransfer(contestant: Contestant, input: Input, root: string): Promise<Transfer> {
  const folder = join(root, "transfer");
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(join(folder, "log"), { recursive: true });
  const log = join(folder, "log", "access.log");
  appendTo(log, ["printf", "%s", WARM_LINE]);
  const pair = await contestant.start(folder, log);
  try {
    await arrival(pair.delivered, WARM_LINE.length, contestant.name);
    await sleep(300);
    process.kill(pair.sender, "SIGSTOP");
    appendTo(log, ["cat", input.path]);
    execFileSync("sync", ["-f", log]);
    const before = [sample(pair.sender), sample(pair.receiver)] as const;
    const bytes = statSync(log).size;
    const started = performance.now();
    process.kill(pair.sender, "SIGCONT");
    await arrival(pair.delivered, bytes, contestant.name);
    const seconds = (performance.now() - started) / 1000;
    const after = [sample(pair.sender), sample(pair.receiver)] as const;
    const millions = input.lines / 1e6;
    await pair.stop();
    return {
      seconds,
      linesPerSecond: input.lines / seconds,
      mebibytesPerSecond: input.bytes / 1_048_576 / seconds,
      senderCpu: (after[0].cpuSeconds - before[0].cpuSeconds) / millions,
      receiverCpu: (after[1].cpuSeconds - before[1].cpuSeconds) / millions,
      senderPeakMiB: after[0].peakMiB,
      receiverPeakMiB: after[1].peakMiB,
      identical: (await digest([log])) === (await digest(pair.outputs())),
    };
  } finally {
    await pair.stop();
    if (!process.env.BENCH_KEEP) rmSync(folder, { recursive: true, force: true });
  }
}

/** Measures a command that copies `input` to a new file, and counts its own CPU time. */
export function runLimit(name: "cp" | "dd", input: Input, root: string): Transfer {
  const output = join(root, "limit.log");
  rmSync(output, { force: true });
  const args =
    name === "cp" ? [input.path, output] : [`if=${input.path}`, `of=${output}`, "bs=1M", "conv=fdatasync"];
  execFileSync("sync", ["-f", root]);
  const cpuBefore = childCpu();
  const started = performance.now();
  const { status, stderr } = spawnSync(name, args, { encoding: "utf8" });
  const seconds = (performance.now() - started) / 1000;
  if (status !== 0) throw new Error(`Cannot run ${name}: ${stderr}`);
  const cpu = (childCpu() - cpuBefore) / (input.lines / 1e6);
  const identical = statSync(output).size === input.bytes;
  rmSync(output);
  return {
    seconds,
    linesPerSecond: input.lines / seconds,
    mebibytesPerSecond: input.bytes / 1_048_576 / seconds,
    senderCpu: cpu,
    receiverCpu: 0,
    senderPeakMiB: 0,
    receiverPeakMiB: 0,
    identical,
  };
}

/** CPU seconds of all children of this process that have ended. */
function childCpu(): number {
  const stat = readFileSync(`/proc/${process.pid}/stat`, "latin1");
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return (Number(fields[13]) + Number(fields[14])) / 100;
}

/** Appends what a command prints to a file, as a writer with O_APPEND. */
function appendTo(path: string, command: string[]): void {
  execFileSync("sh", ["-c", '"$@" >> "$0"', path, ...command]);
}

async function arrival(
  delivered: (bytes: number) => Promise<boolean>,
  bytes: number,
  name: string,
): Promise<void> {
  const deadline = Date.now() + GIVE_UP_MS;
  while (!(await delivered(bytes))) {
    if (Date.now() > deadline)
      throw new Error(`${name} did not deliver ${bytes} bytes in ${GIVE_UP_MS / 1000} s`);
    await sleep(5);
  }
}

/** SHA-256 of the contents of files, one after the other. */
async function digest(paths: string[]): Promise<string> {
  const hash = createHash("sha256");
  for (const path of paths) for await (const part of createReadStream(path)) hash.update(part as Buffer);
  return hash.digest("hex");
}
