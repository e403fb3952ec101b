/**
 * The chaos run: `npm run chaos -- --minutes 5 --seed 1 [--json FILE] [--keep]`.
 *
 * Starts the whole pipeline on real parts, lets a seeded adversary loose on it, then lets everything settle
 * and has an independent checker compare what was written with what lies on the client. Every count of the
 * last table must be 0 (but for the lines that came again because the folder was lost), otherwise the exit code is 1 and the folder with all logs is kept. The same seed plans
 * the same faults again.
 */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { type Adversary, type Outage, unleash } from "./adversary.ts";
import { checkDelivery, KILLED_MS, type Verdict } from "./checker.ts";
import type { Mail } from "./mailbox.ts";
import { HEARTBEAT_SECONDS, type Pipeline, startPipeline, unmountDisk } from "./pipeline.ts";
import { createRandom } from "./random.ts";
import { createScreen, type Screen } from "./screen.ts";

/** How a run is made. */
export interface ChaosOptions {
  minutes: number;
  seed: number;
  linesPerSecond: number;
  /** How often the receiver's folder is lost; without it, once in two minutes. */
  losses?: number;
}

/** What came of it. */
export interface ChaosResult extends Verdict {
  seed: number;
  minutes: number;
  written: number;
  /** Silenced hosts without a mail that says so, or without one that says it is back. */
  mailsMissing: number;
  /** More mails about an outage than the kills of the monitor can explain. */
  mailsTwice: number;
  /** Processes that ended without being told to. */
  crashes: number;
  /** Processes that did not end with 0 within 5 seconds of SIGTERM. */
  badExits: number;
  /** What `forwarder --verify` finds at the client, but for what an hour may be without a promise being broken. */
  unverified: number;
  kills: number;
  faults: Record<string, number>;
  /** Answers to the hostile sender. */
  attacks: Record<string, number>;
  /** How long it took from the last line to its delivery. */
  settledSeconds: number;
  passed: boolean;
  folder: string;
  target: string;
}

/** Counts that must be 0. */
const ZEROS = [
  "missing",
  "twice",
  "misfiled",
  "outOfOrder",
  "corrupt",
  "stray",
  "misreported",
  "mailsMissing",
  "mailsTwice",
  "crashes",
  "badExits",
  "unverified",
] as const;

const DISK_MIB = 384;
/** A host whose link is bad, and whose heartbeat comes late for it. */
const LATE_MS = 15_000;
/** Lines of the writers as long as the 1 % of other lines that rules leave out of a chunk of 1 MiB, and as many again. */
const LEFT_OUT_LINES = 60;
/** When nothing more arrives for so long after the end, the rest is missing. */
const SETTLE_MS = 45_000;

/** One run from start to verdict. */
export async function runChaos(options: ChaosOptions, screen: Screen): Promise<ChaosResult> {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-chaos-"));
  const random = createRandom(options.seed);
  const pipeline = await startPipeline({
    folder,
    random,
    linesPerSecond: options.linesPerSecond,
    diskMiB: DISK_MIB,
  });
  const abandon = () => {
    for (const { pid } of [...pipeline.processes, ...pipeline.servers])
      if (pid !== undefined) process.kill(pid, "SIGKILL");
    if (pipeline.hasOwnDisk) unmountDisk(join(folder, "server"));
    process.exit(130);
  };
  for (const name of ["SIGINT", "SIGTERM"] as const) process.on(name, abandon);
  const started = Date.now();
  const seconds = () => ((Date.now() - started) / 1000).toFixed(1);
  const tell = (text: string) => screen.note(seconds(), text);
  const adversary = unleash(pipeline, random, options.minutes * 60_000, tell, options.losses);
  screen.watch(() => describeProgress(pipeline, adversary, started, options.minutes));
  try {
    await adversary.finished;
    screen.note(seconds(), "the adversary is done; writers stop, everything settles");
    for (const writer of pipeline.writers) await writer.stop();
    await pipeline.hostile.stop();
    const ended = Date.now();
    await settle(pipeline, adversary.losses.length > 0 ? 10_000 : 2_500);
    const settledSeconds = Math.round((Date.now() - ended) / 1000);
    const exits = await Promise.all(pipeline.processes.map((one) => one.stop()));
    screen.end();
    return judge(options, pipeline, adversary, { folder, exits, settledSeconds });
  } finally {
    screen.end();
    for (const name of ["SIGINT", "SIGTERM"] as const) process.off(name, abandon);
    await Promise.all(pipeline.processes.map((one) => one.stop()));
    await pipeline.close();
    writeFileSync(join(folder, "actions.log"), `${adversary.history.join("\n")}\n`);
    if (pipeline.hasOwnDisk) await keepAndUnmount(folder);
  }
}

/** Waits until as many bytes as were written lie at the client and no batch waits, or nothing moves any more. */
async function settle(pipeline: Pipeline, quietMs: number): Promise<void> {
  let bytes = -1;
  for (let since = Date.now(); Date.now() - since < SETTLE_MS; await sleep(250)) {
    const now = deliveredBytes(pipeline);
    if (now !== bytes) since = Date.now();
    bytes = now;
    if (bytes >= writtenBytes(pipeline) && countWaiting(pipeline) === 0) {
      await sleep(quietMs); // what comes twice comes now
      if (deliveredBytes(pipeline) === bytes && countWaiting(pipeline) === 0) return;
    }
  }
}

interface Ending {
  folder: string;
  exits: { code: number | string; ms: number }[];
  settledSeconds: number;
}

function judge(options: ChaosOptions, pipeline: Pipeline, adversary: Adversary, ending: Ending): ChaosResult {
  const written = pipeline.writers.map(({ host, lines }) => ({ host, lines }));
  const { report, server, hostileName: hostile } = pipeline;
  const { losses, forgets } = adversary;
  const heartbeatMs = HEARTBEAT_SECONDS * 1000 + LATE_MS;
  const forwarderLog = join(ending.folder, "output", "forwarder.log");
  const files = { report, forwarderLog, server };
  const around = { ...files, losses, heartbeatMs, leftOutLines: LEFT_OUT_LINES, forgets, hostile };
  const verdict = checkDelivery(pipeline.client, written, around);
  const findings = verifyFolder(pipeline.client, server, losses);
  const mails = checkMails(pipeline.mailbox.mails, adversary.outages, pipeline.monitor.kills);
  const counts = {
    ...verdict,
    mailsMissing: mails.missing,
    mailsTwice: mails.twice,
    crashes: pipeline.processes.reduce((sum, one) => sum + one.crashes, 0),
    badExits: ending.exits.filter(({ code, ms }) => code !== 0 || ms > 5000).length,
    unverified: findings.length,
  };
  return {
    seed: options.seed,
    minutes: options.minutes,
    written: written.reduce((sum, { lines }) => sum + lines, 0),
    ...counts,
    examples: [...verdict.examples, ...mails.examples, ...findings.slice(0, 10)],
    kills: pipeline.processes.reduce((sum, one) => sum + one.kills, 0),
    faults: adversary.counts,
    attacks: pipeline.hostile.counts,
    settledSeconds: ending.settledSeconds,
    passed: ZEROS.every((name) => counts[name] === 0),
    folder: ending.folder,
    target: pipeline.downlink ? "sftp:// (OpenSSH)" : "file://",
  };
}

/**
 * What `forwarder --verify` finds beside our own comparison. An hour that is incomplete breaks no promise. A batch that no
 * digest names came after its hour's newest one was made, and then the list for the next one has it with its hash; or
 * before the folder, with that list, was lost.
 */
function verifyFolder(client: string, server: string, losses: number[]): string[] {
  const script = join(import.meta.dirname, "..", "forwarder.ts");
  const { stdout } = spawnSync(process.execPath, ["run", script, "--verify", client], {
    encoding: "utf8",
    maxBuffer: 64 * 1024 * 1024,
  });
  const lists = join(server, ".digest");
  const files = readdirSync(lists);
  const noted = files
    .filter((name) => name.endsWith(".list"))
    .map((name) => readFileSync(join(lists, name), "utf8"))
    .join("");
  return stdout.split("\n").filter((line) => {
    const [, kind, name = ""] = /^(changed|missing|extra|chain broken): (.*)$/.exec(line) ?? [];
    if (kind !== "extra") return kind !== undefined;
    const path = join(client, name);
    const at = statSync(path).ctimeMs;
    if (losses.some((loss) => at <= loss + KILLED_MS)) return false;
    const ofHour = `${name.split("_", 2).join("_")}.`;
    const digests = files.filter((file) => file.endsWith(".sha256") && file.startsWith(ofHour));
    const made = Math.max(0, ...digests.map((file) => statSync(join(lists, file)).mtimeMs));
    const hash = createHash("sha256").update(readFileSync(path)).digest("hex");
    return at < made || !noted.includes(`${hash}  ${name}\n`);
  });
}

/**
 * Each outage must be told at least once when it began and at least once when it was over, unless its host was
 * told to be flapping: then it is not told change by change. A kill of the monitor
 * between a mail and its state repeats that mail, by design; more repeats than kills are a fault.
 */
export function checkMails(mails: Mail[], outages: Outage[], monitorKills: number) {
  const result = { missing: 0, twice: 0, examples: [] as string[] };
  for (const { host, from, to } of outages) {
    const about = mails.filter(({ subject, text }) => `${subject}\n${text}`.includes(host));
    // Late is not lost: with SMTP down or the disk full the mail comes when they are back, before the next outage.
    const next = Math.min(
      ...outages.filter((other) => other.host === host && other.from > from).map((o) => o.from),
    );
    const told = about.filter(({ at, subject, text }) => {
      return at >= from && (at <= to || (at < next && `${subject}\n${text}`.includes("silent")));
    });
    const over = about.filter(({ at }) => at > to);
    const flapping = about.some(({ at, subject, text }) => {
      return at < next && `${subject}\n${text}`.includes("flapping");
    });
    // What came before it, a full disk, may have silenced the host already: it is told once, and stands until it is back.
    const before = about.filter(({ at }) => at < from).sort((a, b) => b.at - a.at)[0];
    const isStanding =
      before !== undefined && saysOf(before, host, "silent") && !saysOf(before, host, "back");
    for (const [what, found] of [
      ["is silent", isStanding ? [before, ...told] : told],
      ["is back", over],
    ] as const) {
      if (found.length === 0 && !flapping) {
        result.missing++;
        result.examples.push(`mailsMissing: none that says ${host} ${what}`);
      }
    }
    const same = told.length - new Set(told.map(({ subject, text }) => subject + text)).size;
    if (same > monitorKills) {
      result.twice += same - monitorKills;
      result.examples.push(`mailsTwice: ${same} repeats about ${host}`);
    }
  }
  return result;
}

/** Whether one of a mail's facts says this of a host. */
function saysOf({ subject, text }: Mail, host: string, what: string): boolean {
  const told = [...subject.split("; "), ...text.split(/^\* |\n\n/m)];
  return told.some((part) => part.includes(host) && part.includes(what));
}

/** Open and sealed batches that have not been delivered, but for those of the hostile sender. */
function countWaiting({ server, hostileName }: Pipeline): number {
  let count = 0;
  for (const entry of readdirSync(server, { withFileTypes: true })) {
    if (!entry.isDirectory() || entry.name === "sent") continue;
    count += readdirSync(join(server, entry.name)).filter((name) => {
      return /\.log(\.part)?$/.test(name) && !name.includes(`_${hostileName}.`);
    }).length;
  }
  return count;
}

/** Bytes of batches at the client, but for those of the hostile sender. */
function deliveredBytes({ client: folder, hostileName }: Pipeline): number {
  let bytes = 0;
  for (const name of readdirSync(folder)) {
    if (name.endsWith(".sha256") || name.includes(`_${hostileName}.`)) continue;
    try {
      bytes += statSync(join(folder, name)).size;
    } catch {
      // renamed just now
    }
  }
  return bytes;
}

function writtenBytes(pipeline: Pipeline): number {
  return pipeline.writers.reduce((sum, { bytes }) => sum + bytes, 0);
}

function describeProgress(
  pipeline: Pipeline,
  adversary: Adversary,
  started: number,
  minutes: number,
): string[] {
  const lines = pipeline.writers.reduce((sum, writer) => sum + writer.lines, 0);
  const bytes = writtenBytes(pipeline);
  const there = deliveredBytes(pipeline);
  const kills = pipeline.processes.reduce((sum, one) => sum + one.kills, 0);
  const dead = pipeline.processes.filter(({ pid }) => pid === undefined).map(({ name }) => name);
  return [
    `${Math.round((Date.now() - started) / 1000)} of ${Math.round(minutes * 60)} s   ${adversary.history.length} faults, ${kills} kills`,
    `${lines.toLocaleString("en")} lines written, ${(bytes / 1e6).toFixed(1)} MB   ${(there / 1e6).toFixed(1)} MB at the client`,
    `down: ${dead.join(", ") || "none"}   waiting batches: ${countWaiting(pipeline)}   mails: ${pipeline.mailbox.mails.length}`,
  ];
}

/** The disk of the run goes; what a person would look at is copied beside it first. */
async function keepAndUnmount(folder: string): Promise<void> {
  const { cp } = await import("node:fs/promises");
  await cp(join(folder, "server"), join(folder, "server-kept"), { recursive: true });
  unmountDisk(join(folder, "server"));
}

/** The last table. */
export function formatResult(result: ChaosResult): string {
  const rows: [string, string | number][] = [
    ["lines written", result.written.toLocaleString("en")],
    ["lines at the client", result.lines.toLocaleString("en")],
    ["files at the client", result.files],
    ["lines that came again", result.again],
    ["delivered over", result.target],
    ["processes killed", result.kills],
    ["settled after", `${result.settledSeconds} s`],
    ...Object.entries(result.faults).map(([name, count]): [string, number] => [`fault: ${name}`, count]),
    ...Object.entries(result.attacks).map(([name, count]): [string, number] => [`attack: ${name}`, count]),
    ...ZEROS.map((name): [string, number] => [name, result[name]]),
  ];
  const width = Math.max(...rows.map(([name]) => name.length));
  const table = rows.map(([name, value]) => `  ${name.padEnd(width)}  ${String(value).padStart(12)}`);
  const examples = result.examples.map((example) => `  ${example}`);
  const verdict = result.passed ? "PASS: all zeros" : `FAIL: everything is kept in ${result.folder}`;
  return [`seed ${result.seed}, ${result.minutes} min`, ...table, ...examples, verdict, ""].join("\n");
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

const USAGE = `Usage: npm run chaos -- [--minutes N] [--seed N] [--rate LINES_PER_SECOND] [--losses N] [--json FILE] [--keep]\n`;

async function main(): Promise<number> {
  const options = {
    minutes: { type: "string", default: "5" },
    seed: { type: "string", default: "1" },
    rate: { type: "string", default: "4000" },
    losses: { type: "string" },
    json: { type: "string" },
    keep: { type: "boolean", default: false },
    help: { type: "boolean", default: false },
  } as const;
  const { values } = parseArgs({ options });
  const [minutes, seed, linesPerSecond] = [values.minutes, values.seed, values.rate].map(Number) as [
    number,
    number,
    number,
  ];
  if (values.help || !(minutes > 0) || !Number.isInteger(seed) || !(linesPerSecond > 0)) {
    process.stdout.write(USAGE);
    return values.help ? 0 : 2;
  }
  const losses = values.losses === undefined ? {} : { losses: Number(values.losses) };
  const result = await runChaos({ minutes, seed, linesPerSecond, ...losses }, createScreen());
  process.stdout.write(formatResult(result));
  if (values.json) writeFileSync(values.json, `${JSON.stringify(result, null, 2)}\n`);
  if (result.passed && !values.keep) rmSync(result.folder, { recursive: true, force: true });
  return result.passed ? 0 : 1;
}

if (import.meta.main) process.exit(await main());
