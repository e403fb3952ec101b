/**
 * The benchmark: `npm run bench [-- --lines 1000000,5000000 --repeats 3 --only transfer,far,fleet --fleet-seconds 30 --json FILE]`.
 *
 * Everything is measured in one run on one input on this machine: this project, the peers that are installed,
 * and as limits cp and dd. Repeats are interleaved, so that a slow moment hits all, and medians are told.
 * Prints Markdown for the README, then each target with what was reached.
 */
import { type ChildProcess, execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { open } from "node:fs/promises";
import { cpus, release, tmpdir, totalmem } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { type Contestant, ours, reachable, run, runScript, sleep, stopAll } from "./contestant.ts";
import type { FleetResult } from "./fleet.ts";
import { compareForward } from "./forward.ts";
import { generateLog } from "./generate.ts";
import { type Growth, measureGrowth } from "./growth.ts";
import { type History, measureHistory } from "./history.ts";
import { bench as compareHousekeeping } from "./housekeep.ts";
import { type Latencies, runLatency } from "./latency.ts";
import { installedPeers } from "./peers.ts";
import { findProgram, freePort } from "./pipeline.ts";
import { createFarProxy } from "./proxy.ts";
import { median, percentile, sample } from "./sample.ts";
import { type Input, runLimit, runTransfer, type Transfer } from "./transfer.ts";

/** Everything that was measured; parts that were left out are absent. */
interface Results {
  machine: string[];
  /** Per number of lines: the contestants' medians in the order of the table. */
  transfers: { lines: number; bytes: number; rows: Map<string, Transfer> }[];
  latencies: Map<string, Latencies>;
  /** `bareP99Ms`: of a write of one answer's size with its fdatasync by a program that does nothing else. */
  fleets: { name: string; most: number; runs: Fleet[]; bareP99Ms: number }[];
  /** MiB/s over a far link, by chunks in flight. */
  far?: { roundTripMs: number; one: number; four: number };
  idle?: { shipperMiB: number; receiverMiB: number };
  history?: History;
  growth?: Growth;
  sections: string[];
}

type Fleet = FleetResult & { peakMiB: number; cpuSeconds: number };

const PARTS = [
  "transfer",
  "far",
  "latency",
  "fleet",
  "idle",
  "history",
  "growth",
  "forward",
  "housekeep",
] as const;
const OURS = ours("none");
const OURS_ZSTD = ours("zstd");
const FLEET = { senders: 200, rate: 500 };
const FLEET_RUNS = 3;
const BARE_MS = 10_000;
const FAR = { roundTripMs: 50, lines: 200_000 };

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      lines: { type: "string", default: "1000000,5000000" },
      repeats: { type: "string", default: "3" },
      "fleet-seconds": { type: "string", default: "30" },
      only: { type: "string", default: PARTS.join(",") },
      json: { type: "string" },
      markdown: { type: "string" },
    },
  });
  const parts = values.only.split(",");
  const root = mkdtempSync(join(tmpdir(), "log-rt-sync-bench-"));
  const results: Results = {
    machine: describeMachine(),
    transfers: [],
    latencies: new Map(),
    fleets: [],
    sections: [],
  };
  const started = Date.now();
  try {
    if (parts.includes("transfer")) await benchTransfers(results, root, values.lines, Number(values.repeats));
    if (parts.includes("far")) results.far = await benchFar(root);
    if (parts.includes("idle")) results.idle = await benchIdle(root);
    if (parts.includes("latency")) await benchLatencies(results, root);
    if (parts.includes("fleet")) await benchFleets(results, root, Number(values["fleet-seconds"]));
    if (parts.includes("history")) {
      say("cost of 10,000 delivered files");
      results.history = await measureHistory(root);
    }
    if (parts.includes("growth")) {
      say("cost of ten times the senders and batches");
      results.growth = await measureGrowth(root);
    }
    if (parts.includes("forward")) results.sections.push(await benchForwarder(root));
    if (parts.includes("housekeep")) results.sections.push(await benchHousekeeping(root));
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
  const markdown = formatMarkdown(results);
  process.stdout.write(`\n${markdown}\nTook ${Math.round((Date.now() - started) / 1000)} s.\n`);
  if (values.markdown) writeFileSync(values.markdown, markdown);
  const plain = { ...results, transfers: results.transfers.map((t) => ({ ...t, rows: [...t.rows] })) };
  if (values.json) {
    writeFileSync(values.json, JSON.stringify({ ...plain, latencies: [...results.latencies] }, null, 2));
  }
  const wrong = results.transfers.flatMap(({ rows }) => [...rows].filter(([, row]) => !row.identical));
  for (const [name] of wrong) process.stderr.write(`${name}: what was delivered is not what was written\n`);
  return wrong.length === 0 ? 0 : 1;
}

// ---- the parts

async function benchTransfers(results: Results, root: string, lines: string, repeats: number): Promise<void> {
  const everyone: Contestant[] = [OURS, OURS_ZSTD, ...installedPeers()];
  for (const [round, count] of lines.split(",").map(Number).entries()) {
    const path = join(root, "input.log");
    say(`generating ${count.toLocaleString("en")} lines`);
    const traffic = { lines: count, startMs: Date.UTC(2026, 10, 22), linesPerSecond: 5000, seed: 1 };
    const input: Input = { path, lines: count, bytes: generateLog(path, traffic) };
    // Large inputs are for the growth of our cost: the peers' is known from the first round.
    const contestants = round === 0 ? everyone : [OURS, OURS_ZSTD];
    const times = round === 0 ? repeats : 1;
    if (round === 0) await runTransfer(OURS, input, root); // a virtual machine's first run is slow: not counted
    const runs = new Map<string, Transfer[]>();
    const keep = (name: string, transfer: Transfer) => {
      runs.set(name, [...(runs.get(name) ?? []), transfer]);
      say(`${name}: ${Math.round(transfer.linesPerSecond).toLocaleString("en")} lines/s`);
    };
    for (let i = 0; i < times; i++) {
      for (let c = 0; c < contestants.length; c++) {
        const contestant = contestants[(c + i) % contestants.length] as Contestant;
        keep("dd bs=1M conv=fdatasync", runLimit("dd", input, root));
        keep(contestant.name, await runTransfer(contestant, input, root));
      }
      keep("cp", runLimit("cp", input, root));
    }
    const names = [...contestants.map(({ name }) => name), "cp", "dd bs=1M conv=fdatasync"];
    const rows = new Map(names.map((name) => [name, medianTransfer(runs.get(name) ?? [])]));
    results.transfers.push({ lines: count, bytes: input.bytes, rows });
    rmSync(path);
  }
}

/** Each number is the median of its own; wrong once is wrong. */
function medianTransfer(runs: Transfer[]): Transfer {
  const of = (pick: (run: Transfer) => number) => median(runs.map(pick));
  return {
    seconds: of((run) => run.seconds),
    linesPerSecond: of((run) => run.linesPerSecond),
    mebibytesPerSecond: of((run) => run.mebibytesPerSecond),
    senderCpu: of((run) => run.senderCpu),
    receiverCpu: of((run) => run.receiverCpu),
    senderPeakMiB: of((run) => run.senderPeakMiB),
    receiverPeakMiB: of((run) => run.receiverPeakMiB),
    identical: runs.every((run) => run.identical),
  };
}

/** Memory of both ends that have nothing to do. */
async function benchIdle(root: string): Promise<NonNullable<Results["idle"]>> {
  say("memory when idle");
  const folder = freshFolder(root, "idle");
  const log = join(folder, "access.log");
  writeFileSync(log, '10.0.0.1 - - [22/Nov/2026:00:00:01 +0000] "GET / HTTP/1.1" 200 1 "-" "idle"\n');
  const pair = await OURS.start(folder, log);
  try {
    while (!(await pair.delivered(1))) await sleep(50);
    await sleep(8000);
    return { shipperMiB: sample(pair.sender).memoryMiB, receiverMiB: sample(pair.receiver).memoryMiB };
  } finally {
    await pair.stop();
  }
}

async function benchLatencies(results: Results, root: string): Promise<void> {
  const steady = { rate: 1000, seconds: 15 };
  say("latency: log-rt-sync");
  results.latencies.set(OURS_ZSTD.name, await runLatency(OURS_ZSTD, root, { idleLines: 40, steady }));
  for (const peer of installedPeers()) {
    say(`latency: ${peer.name}`);
    results.latencies.set(
      peer.name,
      await runLatency(peer, root, { idleLines: 10, steady: { rate: 1000, seconds: 3 } }),
    );
  }
}

/** Some chunks in flight against one, by a proxy that is as far away as another country. */
async function benchFar(root: string): Promise<NonNullable<Results["far"]>> {
  const { roundTripMs, lines } = FAR;
  const path = join(root, "far.log");
  const bytes = generateLog(path, { lines, startMs: Date.UTC(2026, 10, 22), linesPerSecond: 5000, seed: 3 });
  const speed = async (inFlight: number) => {
    const proxies: { close: () => void }[] = [];
    const via = async (port: number) => {
      const proxy = await createFarProxy(port, roundTripMs);
      proxies.push(proxy);
      return proxy.port;
    };
    const far = ours("none", { name: `${inFlight} in flight`, via, shipper: { inFlight } });
    const { mebibytesPerSecond } = await runTransfer(far, { path, lines, bytes }, root);
    for (const proxy of proxies) proxy.close();
    say(`${roundTripMs} ms away, ${inFlight} in flight: ${mebibytesPerSecond.toFixed(1)} MiB/s`);
    return mebibytesPerSecond;
  };
  const runs: number[][] = [];
  for (let i = 0; i < 3; i++) runs.push([await speed(1), await speed(4)]);
  const of = (index: number) => median(runs.map((run) => run[index] as number));
  return { roundTripMs, one: of(0), four: of(1) };
}

async function benchFleets(results: Results, root: string, seconds: number): Promise<void> {
  for (const { name, most, isBeside } of [
    { name: "alone", most: 25, isBeside: false },
    { name: "beside a writer of 1 GB to the same disk", most: 100, isBeside: true },
  ]) {
    const runs: Fleet[] = [];
    const bareP99Ms = await measureBareSync(freshFolder(root, "bare"), isBeside);
    say(`a bare write and fdatasync, ${name}: p99 ${ms(bareP99Ms)}`);
    results.fleets.push({ name, most, runs, bareP99Ms });
    for (let i = 0; i < FLEET_RUNS; i++) {
      const run = await benchFleet(root, seconds, isBeside);
      say(`fleet of ${FLEET.senders}, ${name}: p99 ${ms(run.p99Ms)}, worst ${ms(run.worstMs)}`);
      runs.push(run);
    }
  }
}

async function benchFleet(root: string, seconds: number, isBeside: boolean): Promise<Fleet> {
  const { senders, rate } = FLEET;
  const folder = freshFolder(root, "fleet");
  const port = await freePort();
  const config = join(folder, "config.json");
  const receiver = { groups: [{ port, senders: ["*"] }], dir: join(folder, "batches") };
  writeFileSync(config, JSON.stringify({ receiver }));
  execFileSync("sync"); // what the transfers left is not the receiver's to wait for
  const server = runScript(folder, "receiver", config);
  const writer = isBeside ? writeAgainAndAgain(folder) : undefined;
  try {
    await reachable(port);
    const before = sample(server.pid as number);
    const args = [port, senders, rate, seconds].map(String);
    const program = join(import.meta.dirname, "fleet.ts");
    const fleet = run(folder, "fleet", process.execPath, ["run", program, ...args]);
    await new Promise((resolve) => fleet.on("close", resolve));
    const after = sample(server.pid as number);
    const result = JSON.parse(readFileSync(join(folder, "fleet.log"), "utf8")) as FleetResult;
    return { ...result, peakMiB: after.peakMiB, cpuSeconds: after.cpuSeconds - before.cpuSeconds };
  } finally {
    await stopAll(writer ? [server, writer] : [server]);
    rmSync(folder, { recursive: true, force: true });
  }
}

/** What the disk alone makes of it: no answer that is synced can be faster. */
async function measureBareSync(folder: string, isBeside: boolean): Promise<number> {
  const writer = isBeside ? writeAgainAndAgain(folder) : undefined;
  const file = await open(join(folder, "bare"), "w");
  const block = Buffer.alloc(24 * 1024, "x");
  const latencies: number[] = [];
  try {
    for (const ending = performance.now() + BARE_MS; performance.now() < ending; await sleep(3)) {
      const started = performance.now();
      await file.write(block);
      await file.datasync();
      latencies.push(performance.now() - started);
    }
  } finally {
    await file.close();
    if (writer) await stopAll([writer]);
    rmSync(folder, { recursive: true, force: true });
  }
  return percentile(latencies, 99);
}

/** Writes 1 GB, synced, to a file of the folder, until it is stopped. */
function writeAgainAndAgain(folder: string): ChildProcess {
  const dd = "dd if=/dev/zero of=beside bs=1M count=1000 conv=fdatasync 2>&1";
  return run(folder, "beside", "sh", ["-c", `while ${dd}; do rm beside; done`]);
}

/** Smaller than their own benchmarks by themselves, so that the whole stays within its time. */
const FORWARD_LOADS = [
  { name: "1 file of 256 MiB", files: 1, bytes: 256 * 1_048_576 },
  { name: "300 files of 48 KiB", files: 300, bytes: 48 * 1024 },
];

async function benchForwarder(root: string): Promise<string> {
  if (!findProgram("sshd") || !findProgram("sftp") || process.getuid?.() !== 0) return "";
  say("forwarder against sftp -b");
  const results = await compareForward({ rounds: 2, loads: FORWARD_LOADS, folder: root }, say);
  const rows = results.map(
    ({ load, forwarderSeconds, sftpSeconds, sftpSyncedSeconds, peakBytes }) =>
      `| ${load} | ${forwarderSeconds.toFixed(2)} s | ${sftpSeconds.toFixed(2)} s | ${sftpSyncedSeconds.toFixed(2)} s | ${(peakBytes / 1_048_576).toFixed(0)} MiB |`,
  );
  return [
    "### Delivery to OpenSSH on this machine",
    "",
    "| | forwarder, start to end | `sftp -b` | `sftp -b`, synced | peak memory of the forwarder |",
    "|---|---:|---:|---:|---:|",
    ...rows,
    "",
  ].join("\n");
}

async function benchHousekeeping(root: string): Promise<string> {
  say("housekeeping against gzip");
  return `${await compareHousekeeping(freshFolder(root, "housekeep"), { files: 3, repeats: 1 })}\n`;
}

// ---- the tables

function formatMarkdown(results: Results): string {
  const lines = ["## Benchmark", "", ...results.machine.map((line) => `- ${line}`), ""];
  for (const { lines: count, bytes, rows } of results.transfers) {
    const size = (bytes / 1_048_576).toFixed(0);
    lines.push(
      `### ${count.toLocaleString("en")} lines, ${size} MiB, from a log to files at the other end`,
      "",
      "| | lines/s | MiB/s | CPU s per million lines, sender + receiver | peak MiB, sender / receiver | same bytes |",
      "|---|---:|---:|---:|---:|---|",
    );
    for (const [name, row] of rows) {
      const limit = row.senderPeakMiB === 0;
      const cpu = limit
        ? row.senderCpu.toFixed(2)
        : `${row.senderCpu.toFixed(2)} + ${row.receiverCpu.toFixed(2)}`;
      const memory = limit ? "" : `${row.senderPeakMiB.toFixed(0)} / ${row.receiverPeakMiB.toFixed(0)}`;
      lines.push(
        `| ${name} | ${Math.round(row.linesPerSecond).toLocaleString("en")} | ${row.mebibytesPerSecond.toFixed(0)} | ${cpu} | ${memory} | ${row.identical ? "yes" : "NO"} |`,
      );
    }
    lines.push("");
  }
  if (results.latencies.size > 0) {
    lines.push(
      "### From write to the other end's file, synced, at default settings",
      "",
      "| | after a pause: median | p99 | at 1,000 lines/s: median | p99 |",
      "|---|---:|---:|---:|---:|",
    );
    for (const [name, { idle, steady }] of results.latencies) {
      lines.push(
        `| ${name} | ${ms(idle.median)} | ${ms(idle.p99)} | ${ms(steady?.median)} | ${ms(steady?.p99)} |`,
      );
    }
    lines.push("");
  }
  for (const fleet of results.fleets) lines.push(...formatFleet(fleet));
  if (results.history) lines.push(...formatHistory(results.history));
  if (results.growth) lines.push(...formatGrowth(results.growth));
  lines.push(...results.sections);
  lines.push("### Targets", "", "| target | reached | |", "|---|---|---|");
  for (const { what, reached, ok } of judge(results))
    lines.push(`| ${what} | ${reached} | ${ok ? "PASS" : "SHORT"} |`);
  return `${lines.join("\n")}\n`;
}

function formatFleet({ name, runs, bareP99Ms }: Results["fleets"][number]): string[] {
  const rows = runs.map(
    (run) =>
      `| ${Math.round(run.acknowledged / run.seconds).toLocaleString("en")} | ${run.acknowledged.toLocaleString("en")} of ${run.due.toLocaleString("en")} | ${ms(run.medianMs)} | ${ms(run.p99Ms)} | ${ms(run.worstMs)} | ${run.peakMiB.toFixed(0)} MiB | ${run.cpuSeconds.toFixed(1)} s |`,
  );
  return [
    `### A fleet of ${FLEET.senders} senders against one receiver, ${name}`,
    "",
    "| lines/s | acknowledged | answer: median | p99 | worst | receiver: peak | CPU |",
    "|---:|---:|---:|---:|---:|---:|---:|",
    ...rows,
    "",
    `A bare write of 24 KiB and its fdatasync, ${name}: p99 ${ms(bareP99Ms)}.`,
    "",
  ];
}

function formatHistory(history: History): string[] {
  const rows = history.rows.map(
    ({ name, empty, full }) =>
      `| ${name} | ${empty.toFixed(1)} ms | ${full.toFixed(1)} ms | ${((full / empty - 1) * 100).toFixed(0)} % |`,
  );
  return [
    `### A cycle with ${history.files.toLocaleString("en")} delivered files in sent/`,
    "",
    "| | without | with | more |",
    "|---|---:|---:|---:|",
    ...rows,
    "",
  ];
}

function formatGrowth({ rows }: Growth): string[] {
  const cells = rows.map(
    ({ what, few, cpuFew, cpuMany }) =>
      `| ${few} and ${few * 10} ${what} | ${cpuFew.toFixed(2)} s | ${cpuMany.toFixed(2)} s | ${(cpuMany / cpuFew).toFixed(1)} |`,
  );
  return [
    "### CPU time for ten times as many",
    "",
    "| | few | many | times |",
    "|---|---:|---:|---:|",
    ...cells,
    "",
  ];
}

function ms(value: number | undefined): string {
  return value === undefined ? "" : `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;
}

interface Target {
  what: string;
  reached: string;
  ok: boolean;
}

/** Each target whose parts were measured. */
function judge(results: Results): Target[] {
  const targets: Target[] = [];
  const atLeast = (what: string, value: number, bound: number, unit = "") =>
    targets.push({ what, reached: `${value.toFixed(2)}${unit}`, ok: value >= bound });
  const atMost = (what: string, value: number, bound: number, unit = "") =>
    targets.push({ what, reached: `${value.toFixed(1)}${unit}`, ok: value <= bound });
  const [first, second] = results.transfers;
  const own = first?.rows.get(OURS.name);
  if (first && own) {
    const peer = (text: string) => [...first.rows].find(([name]) => name.startsWith(text))?.[1];
    const rsyslog = peer("rsyslog, TCP");
    const fluent = peer("Fluent Bit, http");
    const dd = peer("dd");
    const cpu = (row: Transfer) => row.senderCpu + row.receiverCpu;
    if (rsyslog)
      atLeast("lines/s, at least 6 times rsyslog TCP", own.linesPerSecond / rsyslog.linesPerSecond, 6);
    if (fluent)
      atLeast("lines/s, at least 6 times Fluent Bit http", own.linesPerSecond / fluent.linesPerSecond, 6);
    if (dd) atLeast("MiB/s, at least 0.4 of dd", own.mebibytesPerSecond / dd.mebibytesPerSecond, 0.4);
    const peers = installedPeers().flatMap(({ name }) => first.rows.get(name) ?? []);
    if (peers.length > 0) {
      atMost(
        "CPU of both sides, at most 0.33 of the best peer's (x 100)",
        (100 * cpu(own)) / Math.min(...peers.map(cpu)),
        33.4,
      );
    }
    const zstd = first.rows.get(OURS_ZSTD.name) ?? own;
    atMost(
      "peak memory of the shipper, at most 64 MiB",
      Math.max(own.senderPeakMiB, zstd.senderPeakMiB),
      64,
      " MiB",
    );
    atMost(
      "peak memory of the receiver, at most 90 MiB",
      Math.max(own.receiverPeakMiB, zstd.receiverPeakMiB),
      90,
      " MiB",
    );
    const large = second?.rows.get(OURS.name);
    if (second && large) {
      const more = second.lines / first.lines;
      atMost(
        `CPU for ${more} times the lines, at most ${(more * 1.1).toFixed(1)} times`,
        (cpu(large) / cpu(own)) * more,
        more * 1.1,
      );
    }
  }
  if (results.idle) {
    atMost("idle shipper, at most 45 MiB", results.idle.shipperMiB, 45, " MiB");
    atMost("idle receiver, at most 45 MiB", results.idle.receiverMiB, 45, " MiB");
  }
  const latency = results.latencies.get(OURS_ZSTD.name);
  if (latency) atMost("a line after a pause, median at most 20 ms", latency.idle.median, 20, " ms");
  if (latency?.steady) {
    atMost("1,000 lines/s, median at most 100 ms", latency.steady.median, 100, " ms");
    atMost("1,000 lines/s, p99 at most 250 ms", latency.steady.p99, 250, " ms");
  }
  for (const { name, most, runs } of results.fleets) {
    const worst = (pick: (run: Fleet) => number) => Math.max(...runs.map(pick));
    const least = Math.min(...runs.map(({ acknowledged, due }) => (100 * acknowledged) / due));
    atLeast(`fleet ${name}: lines acknowledged, all (%)`, least, 100);
    const p99 = worst((run) => run.p99Ms);
    atMost(`fleet ${name}: p99 of the answer, each run at most ${most} ms`, p99, most, " ms");
    atMost(
      `fleet ${name}: receiver, at most 128 MiB`,
      worst((run) => run.peakMiB),
      128,
      " MiB",
    );
  }
  if (results.far) {
    const { roundTripMs, one, four } = results.far;
    atLeast(`${roundTripMs} ms away, 4 chunks in flight, at least 4 times as fast as one`, four / one, 4);
  }
  for (const { name, empty, full } of results.history?.rows ?? []) {
    atMost(`${name} with 10,000 delivered files, at most 10 % slower`, (full / empty - 1) * 100, 10, " %");
  }
  for (const { what, cpuFew, cpuMany } of results.growth?.rows ?? []) {
    atMost(`CPU for 10 times the ${what}, at most 11 times`, cpuMany / cpuFew, 11);
  }
  return targets;
}

// ---- the machine

function describeMachine(): string[] {
  const version = (command: string, args: string[], pattern: RegExp) => {
    try {
      const text = execFileSync(command, args, { encoding: "utf8", stdio: ["ignore", "pipe", "ignore"] });
      return pattern.exec(text)?.[0];
    } catch {
      return undefined;
    }
  };
  const commit = version("git", ["-C", import.meta.dirname, "rev-parse", "--short", "HEAD"], /\w+/);
  const rsyslog = version("/usr/sbin/rsyslogd", ["-v"], /rsyslogd\s+\S+/);
  return [
    `${new Date().toISOString().slice(0, 16).replace("T", " ")} UTC, \`npm run bench\`${commit ? ` at ${commit}` : ""}`,
    `${cpus().length} cores of ${cpus()[0]?.model.trim()}, ${(totalmem() / 2 ** 30).toFixed(0)} GiB, Linux ${release()}, file system of ${tmpdir()}`,
    [`Bun ${process.versions.bun}`, rsyslog?.replace(/\s+/, " ")].filter(Boolean).join(", "),
    "Both ends and the measuring share the cores. A sender that follows its log is stopped, gets a backlog, and is measured from its continuation.",
  ];
}

function freshFolder(root: string, name: string): string {
  const folder = join(root, name);
  rmSync(folder, { recursive: true, force: true });
  mkdirSync(folder, { recursive: true });
  return folder;
}

function say(text: string): void {
  process.stderr.write(`${text}\n`);
}

if (import.meta.main) process.exit(await main());
