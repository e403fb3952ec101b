/**
 * The state of everything, for the status page: one look at the receiver's ledgers and at the folder. It costs
 * one listing per sender and none of sent/. The folder is the same for all ports, so every port shows all
 * senders, also those that another process serves.
 */
import { stat, statfs } from "node:fs/promises";
import { join } from "node:path";
import { dashedHost, folders, listBatches, listHosts, parseBatchName } from "./batch.ts";
import { type Config, createMatcher, sections } from "./config.ts";
import { emptyLedger, HISTORY_MINUTES, type Ledger, readLedger } from "./ledger.ts";
import { type ForwarderState, readForwarderState } from "./report.ts";
import { describe, VERSION } from "./service.ts";

/**
 * How a sender is doing. `ok`: lines come; `quiet`: it is heard of, but sends no lines; `silent`: it is not
 * heard of; `never`: it is expected and was not heard of yet; `former`: the config knows it no longer, but
 * batches of it are left.
 */
export type HostState = "ok" | "quiet" | "silent" | "never" | "former";

/** One sender. Times are milliseconds since the epoch by the receiver's clock, 0 for never. */
export interface HostStatus {
  host: string;
  state: HostState;
  /** When anything, also a heartbeat, was last heard. */
  heardAt: number;
  /** When the last line came. */
  lineAt: number;
  /** Lines that came in each whole minute of the last hours, oldest first. */
  linesPerMinute: number[];
  /** Bytes that the sender still has to ship, as it told last. */
  lag: number;
  /** Batches that still take lines. */
  open: number;
  /** Sealed batches that are not delivered yet, and since when the oldest waits. */
  waiting: number;
  waitingSince?: number;
  /** Batches in `failed/`. */
  failed: number;
  /** Bytes that vanished unread, as the sender told, since its ledger began. */
  lost: number;
}

/** Everything that the page shows. */
export interface Status {
  version: string;
  now: number;
  /** When this receiver started. */
  startedAt: number;
  /** The folder of the batches. */
  dir: string;
  hosts: HostStatus[];
  /** Bytes of the file system of `dir`; absent when it cannot be asked. */
  disk?: { free: number; total: number };
  /** What the forwarder told last; absent when none ever ran here. */
  forwarder?: Pick<ForwarderState, "at" | "fault" | "lastSentAt">;
}

/** Something that keeps lines from arriving or batches from being delivered, in words. */
export interface Problem {
  kind: "silent" | "never" | "fault" | "late" | "failed" | "disk";
  leg: "arrival" | "delivery" | "disk";
  text: string;
  /** What is known beyond the text. */
  detail?: string;
  /** The senders that it concerns; empty when it concerns none in particular. */
  hosts: string[];
}

/** The monitor's defaults are the thresholds here: the receiver has no config of the monitor's. */
const { silentMinutes, deliveryMinutes, minFreePercent } = sections.monitor.shape;
const SILENT_MS = silentMinutes.parse(undefined) * 60_000;
const DELIVERY_MS = deliveryMinutes.parse(undefined) * 60_000;
const MIN_FREE_PERCENT = minFreePercent.parse(undefined);

/** However many look at the page, the folder is looked at once in so long. */
const FRESH_MS = 2_000;

/** What the receiver knows by heart. */
export interface StatusSources {
  /** A sender's ledger in memory; for undefined it is read from the folder. */
  ledgerOf: (host: string) => Ledger | undefined;
  now?: () => number;
}

/** A function that tells the state of everything; calls within two seconds share one look at the folder. */
export function createStatusReader(
  config: Config["receiver"],
  { ledgerOf, now = Date.now }: StatusSources,
): () => Promise<Status> {
  const startedAt = now();
  let lastAt = Number.NEGATIVE_INFINITY;
  let last: Promise<Status> | undefined;
  return () => {
    if (!last || Math.abs(now() - lastAt) > FRESH_MS) {
      lastAt = now();
      last = collectStatus(config, { ledgerOf, now: lastAt, startedAt });
      last.catch(() => {
        last = undefined; // a fault is not kept: the next call looks again
      });
    }
    return last;
  };
}

/** One look at the ledgers and at the folder. Throws the system's error when the folder cannot be read. */
export async function collectStatus(
  { dir, groups, forgetAfterDays }: Config["receiver"],
  { ledgerOf, now, startedAt }: { ledgerOf: StatusSources["ledgerOf"]; now: number; startedAt: number },
): Promise<Status> {
  const senders = groups.flatMap((group) => group.senders.map((sender) => sender.toLowerCase()));
  const isSender = createMatcher(senders);
  const expected = senders.filter((sender) => sender !== "*" && !sender.includes("/"));
  const failed = await countFailed(dir);
  const hosts: HostStatus[] = [];
  for (const host of new Set([...expected, ...(await listHosts(dir))])) {
    const folder = folders(dir).host(host);
    const ledger = ledgerOf(host) ?? (await readLedger(folder)) ?? emptyLedger();
    const batches = { ...(await countWaiting(folder)), failed: failed.get(dashedHost(host)) ?? 0 };
    failed.delete(dashedHost(host));
    const status = { host, ...tellLedger(ledger, now), ...batches, state: hostState(ledger, now, startedAt) };
    const forgotten = now - ledger.heardAt > forgetAfterDays * 86_400_000 && !expected.includes(host);
    if (isSender(host) && !forgotten) hosts.push(status);
    else if (status.open + status.waiting + status.failed > 0) hosts.push({ ...status, state: "former" });
  }
  for (const [host, count] of failed) {
    // its folder is gone, the dashed form of its name is all that is left
    hosts.push({ host, ...tellLedger(emptyLedger(), now), waiting: 0, failed: count, state: "former" });
  }
  const disk = await statfs(dir).then(
    ({ bavail, blocks, bsize }) => ({ free: bavail * bsize, total: blocks * bsize }),
    () => undefined,
  );
  const forwarder = await readForwarderState(dir).catch((error): Status["forwarder"] => {
    return { at: 0, fault: { kind: "local", text: describe(error), since: now } };
  });
  return {
    version: VERSION,
    now,
    startedAt,
    dir,
    hosts,
    ...(disk && { disk }),
    ...(forwarder && { forwarder }),
  };
}

/** A receiver that was down hears of its senders again within the threshold: only then they are silent. */
function hostState({ heardAt, lineAt }: Ledger, now: number, startedAt: number): HostState {
  if (heardAt === 0) return "never";
  if (now - Math.max(heardAt, startedAt) > SILENT_MS) return "silent";
  return now - lineAt > SILENT_MS ? "quiet" : "ok";
}

function tellLedger(ledger: Ledger, now: number) {
  const { heardAt, lineAt, lost, streams, open, minutes } = ledger;
  const first = Math.floor(now / 60_000) - HISTORY_MINUTES;
  return {
    heardAt,
    lineAt,
    lost,
    open: open.size,
    lag: [...streams.values()].reduce((sum, { lag = 0 }) => sum + lag, 0),
    linesPerMinute: Array.from({ length: HISTORY_MINUTES }, (_, i) => minutes.get(first + i) ?? 0),
  };
}

/** Sealed batches in a sender's folder. A rename sets the change time: it tells since when the oldest waits. */
async function countWaiting(folder: string): Promise<{ waiting: number; waitingSince?: number }> {
  const names = await listBatches(folder, "sealed");
  const oldest = names[0] && (await stat(join(folder, names[0])).catch(() => undefined)); // taken just now
  return { waiting: names.length, ...(oldest && { waitingSince: oldest.ctimeMs }) };
}

/** Batches in failed/ by the dashed form of their host. */
async function countFailed(dir: string): Promise<Map<string, number>> {
  const count = new Map<string, number>();
  for (const name of await listBatches(folders(dir).failed, "sealed", "compressed")) {
    const host = parseBatchName(name)?.host ?? "";
    count.set(host, (count.get(host) ?? 0) + 1);
  }
  return count;
}

/** What is wrong, worst first; nothing when every line arrives and every batch is delivered. */
export function findProblems({ hosts, forwarder, disk, now }: Status): Problem[] {
  const silent = inState(hosts, "silent");
  const never = inState(hosts, "never");
  const late = hosts.filter((host) => isLate(host, now));
  const failed = hosts.filter((host) => host.failed > 0);
  const lateSince = Math.min(now, ...late.map(({ waitingSince = now }) => waitingSince));
  const problems: (Omit<Problem, "hosts"> & { hosts: HostStatus[] })[] = [];
  if (silent.length > 0) {
    const text = `${count(silent.length, "sender is", "senders are")} silent`;
    problems.push({ kind: "silent", leg: "arrival", text, hosts: silent });
  }
  if (never.length > 0) {
    const text = `${count(never.length, "sender was", "senders were")} never heard of`;
    problems.push({ kind: "never", leg: "arrival", text, hosts: never });
  }
  if (forwarder?.fault) {
    const { text: detail, since } = forwarder.fault;
    const text = `delivery fails since ${formatClock(since, now)}`;
    problems.push({ kind: "fault", leg: "delivery", text, detail, hosts: [] });
  }
  if (late.length > 0) {
    const batches = count(sum(late, "waiting"), "batch waits", "batches wait");
    const text = `${batches} since ${formatClock(lateSince, now)}`;
    problems.push({ kind: "late", leg: "delivery", text, hosts: late });
  }
  if (failed.length > 0) {
    const text = `${count(sum(failed, "failed"), "batch", "batches")} failed`;
    problems.push({ kind: "failed", leg: "delivery", text, hosts: failed });
  }
  if (disk && disk.free / disk.total < MIN_FREE_PERCENT / 100) {
    const text = `the disk has ${Math.floor((100 * disk.free) / disk.total)} % left`;
    problems.push({ kind: "disk", leg: "disk", text, hosts: [] });
  }
  return problems.map((problem) => ({ ...problem, hosts: problem.hosts.map(({ host }) => host) }));
}

/** Whether a sender's oldest sealed batch waits for longer than a forwarder takes. */
export function isLate({ waitingSince }: HostStatus, now: number): boolean {
  return waitingSince !== undefined && now - waitingSince > DELIVERY_MS;
}

/** The one sentence at the top: `2 senders are silent, 14 batches wait since 10:20`. */
export function verdict({ hosts, forwarder }: Status, problems: Problem[]): string {
  if (problems.length > 0) {
    const told = problems.length > 3 ? problems.slice(0, 2) : problems;
    const more = problems.length > told.length ? [`and ${problems.length - told.length} more problems`] : [];
    return sentence([...told.map(({ text }) => text), ...more].join(", "));
  }
  if (hosts.length === 0) return "No sender was heard of yet";
  const arrival = inState(hosts, "ok").length > 0 ? "Everything arrives" : "No lines come";
  if (!forwarder) return `${arrival}, no forwarder has run here yet`;
  return `${arrival} and ${inState(hosts, "ok").length > 0 ? "is" : "everything is"} delivered`;
}

/** Adds up one number of all senders. */
export function sum(hosts: HostStatus[], key: "waiting" | "failed" | "open" | "lag" | "lost"): number {
  return hosts.reduce((total, host) => total + host[key], 0);
}

/** The senders in a state. */
export function inState(hosts: HostStatus[], state: HostState): HostStatus[] {
  return hosts.filter((host) => host.state === state);
}

/** `1 batch`, `1,400 batches`. */
export function count(n: number, one: string, many: string): string {
  return `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
}

/** `10:20`, with the day when it is not today's: the receiver's wall clock. */
export function formatClock(at: number, now: number): string {
  const time = new Date(at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (new Date(at).toDateString() === new Date(now).toDateString()) return time;
  return `${new Date(at).toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${time}`;
}

/** The text with a capital at its head. */
export function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
