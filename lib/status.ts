/**
 * The one judge: a look at the folder, and what is wrong there in words. The page, the mails, `--status` and the metrics
 * say what stands here. What can be seen is judged, and what can't be seen is a problem of its own.
 *
 * A look costs one listing per sender, one of failed/ and none of sent/. A sender is silent when its receiver could have
 * heard it for the whole of its threshold: not while that is down, and not before it was there for so long.
 */
import { readdir, stat, statfs } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import { z } from "zod";
import { dashedHost, folders, LEDGER, listBatches, listHosts, parseBatchName, parseWindow } from "./batch.ts";
import { type Config, sections } from "./config.ts";
import { readDigestHead } from "./digest.ts";
import { readIfExists } from "./durable.ts";
import { parseHost } from "./host.ts";
import { createLedgerReader, emptyLedger, HISTORY_MINUTES, type Ledger, readLedger } from "./ledger.ts";
import { errorMessage, formatBytes, formatDuration, VERSION } from "./service.ts";
import { readState } from "./state.ts";

const MINUTE = 60_000;
const DAY = 24 * 60 * MINUTE;
/** A receiver writes its state every ten seconds, a forwarder shows life every thirty, a monitor in every run. */
const RECEIVER_GONE_MS = MINUTE;
const FORWARDER_GONE_MS = 3 * MINUTE;
const MONITOR_GONE_MS = 15 * MINUTE;
/** The state file of a port that the config no longer has is not spoken of any more. */
const OLD_STATE_MS = DAY;
/** Names in a text; further ones are counted. */
const NAMES = 5;

// ---- what the scripts tell each other on disk

/** What holds up all deliveries, in the order in which one meets them. */
export const FAULT_KINDS = ["connection", "host key", "login", "server", "local"] as const;
export type FaultKind = (typeof FAULT_KINDS)[number];

/** `<dir>/.forwarder-state.json`. Times are milliseconds since the epoch, as everywhere. */
export interface ForwarderState {
  version: 1;
  /** When this was written. */
  at: number;
  /** Whether it is a forwarder that stays: the file's time is then its last sign of life. */
  stays?: boolean;
  /** Whether the last cycle could deliver, or had nothing to deliver. */
  ok: boolean;
  /** Why not, in words, and since when without a break. */
  fault?: { kind: FaultKind; text: string; since: number };
  /** When the last batch was delivered. */
  lastSentAt?: number;
  /** The files in failed/: how often tried there, when again, and why it failed last. */
  failed: Record<string, { attempts: number; nextAt: number; reason: string }>;
  /** Batches at which the connection was cut or room was lacking, and how often: they come last, each alone. */
  later?: Record<string, number>;
}

/** Where the forwarder's state is. */
export function forwarderStatePath(dir: string): string {
  return join(dir, ".forwarder-state.json");
}

/** The forwarder's state with its last sign of life. */
async function readForwarder(dir: string): Promise<(ForwarderState & { aliveAt: number }) | undefined> {
  const state = await readForwarderState(dir);
  const info = state && (await stat(forwarderStatePath(dir)));
  return state && { ...state, aliveAt: Math.max(state.at, info?.mtimeMs ?? 0) };
}

/** The forwarder's state; undefined when it never ran here. Throws when the file is damaged. */
export async function readForwarderState(dir: string): Promise<ForwarderState | undefined> {
  const path = forwarderStatePath(dir);
  const text = await readIfExists(path);
  if (text === undefined) return undefined;
  try {
    const state = JSON.parse(text) as ForwarderState | null;
    if (typeof state?.failed === "object") return state;
  } catch (cause) {
    throw new Error(`Cannot read "${path}": it is no JSON`, { cause });
  }
  throw new Error(`Cannot read "${path}": it has no list of what failed`);
}

const receiverStateSchema = z.object({
  version: z.literal(1),
  at: z.number(),
  startedAt: z.number(),
  pid: z.number().optional(),
  ports: z.array(z.number()),
  /** Why a chunk could not be stored now, and since when. */
  health: z.string().optional(),
  healthSince: z.number().optional(),
  refused: z.array(
    z.object({
      host: z.string(),
      peer: z.string(),
      reason: z.string(),
      count: z.number(),
      since: z.number(),
      at: z.number(),
    }),
  ),
  pressed: z.array(z.object({ host: z.string(), text: z.string() })),
});
/** `<dir>/.receiver-<lowest port>.json`: that a receiver runs, and whom it refuses. */
export type ReceiverState = z.infer<typeof receiverStateSchema>;

/** A maintenance window of a host, or of `*`: its silence is not told. */
export interface Mute {
  until: number;
  at: number;
  by: string;
  reason?: string | undefined;
}

/** What the monitor's state file says to others. */
export const monitorNewsSchema = z.looseObject({
  version: z.number(),
  at: z.number(),
  mutes: z
    .record(
      z.string(),
      z.object({ until: z.number(), at: z.number(), by: z.string(), reason: z.string().optional() }),
    )
    .default({}),
  /** Mails and posts that were refused for good. */
  undeliverable: z
    .array(z.object({ to: z.string(), subject: z.string(), reason: z.string(), at: z.number() }))
    .default([]),
});
export type MonitorNews = z.infer<typeof monitorNewsSchema>;

// ---- the look

/**
 * How a sender is doing. `ok`: lines come; `quiet`: it is heard, but sends no lines; `silent`: it is not heard; `waiting`:
 * not heard yet since its receiver started, or while that is down; `never`: expected, and never seen; `gone`: silent for a
 * day and not expected, or only batches of it are left.
 */
export type HostState = "ok" | "quiet" | "silent" | "waiting" | "never" | "gone";

/** One sender. Times are milliseconds since the epoch by the receiver's clock, 0 for never. */
export interface HostStatus {
  host: string;
  state: HostState;
  expected: boolean;
  /** When anything, also a heartbeat, was last heard; never later than now. */
  heardAt: number;
  /** When the last line came. */
  lineAt: number;
  /** Lines that came in each whole minute of the last hours, oldest first; empty unless asked for. */
  linesPerMinute: number[];
  /** Bytes that the sender still has to ship; unknown when it is not heard. */
  lag: number | undefined;
  /** Batches that still take lines. */
  open: number;
  /** Sealed batches that are not delivered yet, since when the oldest waits, and its name. */
  waiting: number;
  waitingSince?: number;
  oldest?: string;
  /** Batches in `failed/`. */
  failed: number;
  /** Bytes in batches that are not delivered, failed ones apart. */
  undelivered: number;
  /** Totals: bytes that vanished unread on the sender, bytes that were stored and vanished here. */
  lost: number;
  gone: number;
  /** Totals of lines: left out by rules, without a timestamp, of a clock that is ahead. */
  skipped: number;
  untimed: number;
  ahead: number;
  /** Of its newest line's timestamp, minutes east of UTC. */
  zone?: number;
  /** Every line that was in its files then is stored. */
  through?: number;
  /** The newest window of which a batch was delivered, as in batch names. */
  delivered?: string;
  agent?: string;
  peer?: string;
  muted?: Mute;
  /** The two addresses, when two shippers claim its name. */
  contested?: string[];
}

/** Something that is wrong, in the words that the page, the mails, `--status` and the metrics use. */
export interface Problem {
  /** Names it across looks. */
  key: string;
  leg: "arrival" | "delivery" | "disk" | "watching";
  /** `2 senders are silent`: begins small, for it may stand in a sentence. */
  title: string;
  text: string;
  /** The senders that it concerns; empty when it concerns none in particular. */
  hosts: string[];
  /** Commands that fit the case. */
  next?: string[];
  /** It has no duration of its own: it is looked at twice before it is mailed. */
  sudden?: boolean;
  /** It often mends itself: it is mailed from then on. */
  mailFrom?: number;
}

/** A receiver as its state file tells. */
export interface ReceiverSeen extends ReceiverState {
  runs: boolean;
}

/** Everything that one look shows. */
export interface Snapshot {
  version: string;
  now: number;
  /** This server's name. */
  server: string;
  dir: string;
  hosts: HostStatus[];
  receivers: ReceiverSeen[];
  /** Since when a receiver of this folder runs; 0 when none tells. */
  startedAt: number;
  /** What the forwarder told last, and when it showed life; absent when none ever ran here. */
  forwarder?: ForwarderState & { aliveAt: number };
  /** Bytes of the file system of `dir`; absent when it can't be asked, or has no size. */
  disk?: { free: number; total: number };
  mutes: Record<string, Mute>;
  /** The newest digest, where digests are made. */
  digest?: { name: string; sha256: string };
  /** What is wrong, worst first. */
  problems: Problem[];
}

/** What counts as wrong: of the config's section `monitor`, or its defaults. */
export type Thresholds = Pick<
  Config["monitor"],
  | "expected"
  | "silentMinutes"
  | "silentMinutesByHost"
  | "alertWhenQuiet"
  | "deliveryMinutes"
  | "minFreePercent"
>;

const { shape } = sections.monitor;
/** The defaults, where the config has no section `monitor`. */
export const DEFAULT_THRESHOLDS: Thresholds = {
  expected: [],
  silentMinutes: shape.silentMinutes.parse(undefined),
  silentMinutesByHost: {},
  alertWhenQuiet: shape.alertWhenQuiet.parse(undefined),
  deliveryMinutes: shape.deliveryMinutes.parse(undefined),
  minFreePercent: shape.minFreePercent.parse(undefined),
};

export interface ObserveOptions {
  now: number;
  /** A sender's ledger in memory; without one it is read from the folder. */
  ledgerOf?: (host: string) => Ledger | undefined;
  readLedger?: (hostFolder: string) => Promise<Ledger | undefined>;
  /** Whether the curves of lines per minute are wanted. */
  curves?: boolean;
  /** Nobody could have been heard before. */
  since?: number;
  /** Since when a receiver runs that writes no state file, and until when it was well. */
  unnamed?: { startedAt?: number; wellUntil?: number };
  mutes?: Record<string, Mute>;
  /** The monitor's state file, for others than the monitor. */
  monitorFile?: string;
  /** When a time that lies in the future was first seen: the look keeps it there. */
  future?: Record<string, { value: number; at: number }>;
  /** Problems that only the caller knows. */
  more?: Problem[];
}

interface Look extends ObserveOptions {
  dir: string;
  thresholds: Thresholds;
  unreadable: NonNullable<Findings["unreadable"]>;
  receivers: ReceiverSeen[];
  mutes: Record<string, Mute>;
  readLedger: (hostFolder: string) => Promise<Ledger | undefined>;
}

/** One look at `dir`, judged by `thresholds`. Never throws: what can't be read is among the problems. */
export async function observe(
  dir: string,
  thresholds: Thresholds,
  options: ObserveOptions,
): Promise<Snapshot> {
  const { now } = options;
  const look: Look = { mutes: {}, readLedger, ...options, dir, thresholds, unreadable: [], receivers: [] };
  const monitor = options.monitorFile ? await readMonitorNews(options.monitorFile) : undefined;
  Object.assign(look.mutes, monitor?.mutes);
  look.receivers = await readReceivers(look);
  const forwarder = await attempt(look, forwarderStatePath(dir), () => readForwarder(dir));
  const failed = (await attempt(look, folders(dir).failed, () => listFailed(dir))) ?? [];
  const hosts = await lookAtHosts(look, failed);
  const disk = await attempt(look, dir, () => askDisk(dir));
  const digest = await readDigestHead(dir).catch(() => undefined);
  const snapshot: Snapshot = {
    version: VERSION,
    now,
    server: hostname(),
    dir,
    hosts,
    receivers: look.receivers,
    startedAt: Math.max(0, ...look.receivers.filter(({ runs }) => runs).map(({ startedAt }) => startedAt)),
    mutes: Object.fromEntries(Object.entries(look.mutes).filter(([, { until }]) => until > now)),
    problems: [],
    ...(forwarder && { forwarder }),
    ...(disk && { disk }),
    ...(digest && { digest }),
  };
  const { unreadable, more = [] } = look;
  snapshot.problems = findProblems(snapshot, thresholds, { unreadable, failed, monitor, more });
  return snapshot;
}

/** What `work` gives; when it fails, that is noted, and the look goes on without it. */
async function attempt<T>(
  look: Look,
  path: string,
  work: () => Promise<T>,
  host?: string,
): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    look.unreadable.push({ path, reason: errorMessage(error), ...(host !== undefined && { host }) });
    return undefined;
  }
}

/** What the monitor's state file says; undefined when there is none, or it is not for us to read. */
export async function readMonitorNews(path: string): Promise<MonitorNews | undefined> {
  const found = await readState(path, monitorNewsSchema, 2).catch(() => undefined);
  return found?.state === "ok" ? found.value : undefined;
}

async function readReceivers(look: Look): Promise<ReceiverSeen[]> {
  const { dir, now } = look;
  const names = (await readdir(dir).catch(() => [])).filter((name) => /^\.receiver-\d+\.json$/.test(name));
  const seen: ReceiverSeen[] = [];
  for (const name of names) {
    const found = await attempt(look, join(dir, name), () =>
      readState(join(dir, name), receiverStateSchema, 1),
    );
    if (found?.state === "damaged") look.unreadable.push({ path: join(dir, name), reason: found.reason });
    if (found?.state !== "ok") continue;
    seen.push({ ...found.value, runs: Math.abs(now - found.value.at) < RECEIVER_GONE_MS });
  }
  const served = new Set(seen.filter(({ runs }) => runs).flatMap(({ ports }) => ports));
  return seen.filter(
    ({ runs, ports, at }) =>
      runs || (!ports.every((port) => served.has(port)) && (served.size === 0 || now - at < OLD_STATE_MS)),
  );
}

async function listFailed(dir: string): Promise<string[]> {
  return listBatches(folders(dir).failed, "sealed", "compressed");
}

async function askDisk(dir: string): Promise<{ free: number; total: number } | undefined> {
  const { bavail, blocks, bsize } = await statfs(dir);
  return blocks > 0 ? { free: bavail * bsize, total: blocks * bsize } : undefined; // some have no size
}

// ---- senders

async function lookAtHosts(look: Look, failedNames: string[]): Promise<HostStatus[]> {
  const failed = new Map<string, number>();
  for (const name of failedNames) {
    const dashed = parseBatchName(name)?.host ?? "";
    failed.set(dashed, (failed.get(dashed) ?? 0) + 1);
  }
  const { expected } = look.thresholds;
  const present = (await attempt(look, look.dir, () => listHosts(look.dir))) ?? [];
  const hosts: HostStatus[] = [];
  for (const host of new Set([...expected, ...present])) {
    if (parseHost(host) !== host) continue; // lost+found and the like
    const count = failed.get(dashedHost(host)) ?? 0;
    const status = await attempt(look, join(look.dir, host), () => lookAtHost(look, host, count), host);
    if (!status) continue;
    failed.delete(dashedHost(host));
    hosts.push(status);
  }
  for (const [host, count] of failed) {
    // its folder is gone, the dashed form of its name is all that is left
    hosts.push({ ...tellLedger(look, host, emptyLedger()), state: "gone", failed: count });
  }
  const natural = new Intl.Collator("en", { numeric: true });
  return hosts.sort((a, b) => natural.compare(a.host, b.host));
}

/** A sender; undefined for what is no sender's folder, or of one that is long gone. */
async function lookAtHost(look: Look, host: string, failed: number): Promise<HostStatus | undefined> {
  const folder = folders(look.dir).host(host);
  const known = look.ledgerOf?.(host) ?? (await look.readLedger(folder));
  const ledger = known ?? emptyLedger();
  const names = await listBatches(folder, "sealed", "open");
  const isExpected = look.thresholds.expected.includes(host);
  if (!isExpected && !isHostOf(host, names, known)) return undefined;
  const sealed = names.filter((name) => name.endsWith(".log"));
  const status: HostStatus = { ...tellLedger(look, host, ledger), failed, waiting: sealed.length };
  for (const name of sealed) {
    const since = await waitsSince(folder, name, ledger, look.now);
    if (since >= (status.waitingSince ?? Number.POSITIVE_INFINITY)) continue;
    Object.assign(status, { waitingSince: since, oldest: name });
  }
  status.undelivered += sealed.reduce((sum, name) => sum + (ledger.sealed.get(name)?.bytes ?? 0), 0);
  const delivered = look.curves ? newestDelivered(ledger, new Set(sealed)) : undefined;
  if (delivered) status.delivered = delivered;
  status.state = await stateOf(look, status);
  if (status.state !== "ok" && status.state !== "quiet") status.lag = undefined;
  const isLeft = status.open + status.waiting + failed > 0;
  return status.state === "gone" && !isLeft && look.now - status.heardAt >= 2 * DAY ? undefined : status;
}

/** Whether a folder is a sender's: it has a ledger, and the batches that are known of it carry its name. */
function isHostOf(host: string, names: string[], ledger: Ledger | undefined): boolean {
  const dashed = dashedHost(host);
  let some = false;
  for (const list of [names, ledger?.sealed.keys() ?? [], ledger?.open.keys() ?? []]) {
    for (const name of list) {
      if (parseBatchName(name)?.host === dashed) return true;
      some = true;
    }
  }
  return ledger !== undefined && !some && (ledger.heardAt > 0 || ledger.streams.size > 0);
}

function tellLedger(look: Look, host: string, ledger: Ledger): HostStatus {
  const { now, thresholds, mutes } = look;
  const { facts, streams, open, minutes } = ledger;
  const first = Math.floor(now / MINUTE) - HISTORY_MINUTES;
  const oldLag = [...streams.values()].reduce((sum, { lag = 0 }) => sum + lag, 0);
  const mute = [mutes[host], mutes["*"]].find((window) => window && window.until > now);
  const claims = (facts.contestedUntil ?? 0) > now ? (facts.shippers ?? []).slice(-2) : [];
  return {
    host,
    state: "never",
    expected: thresholds.expected.includes(host),
    heardAt: notInFuture(look, host, ledger.heardAt),
    lineAt: Math.min(ledger.lineAt, now),
    linesPerMinute: look.curves
      ? Array.from({ length: HISTORY_MINUTES }, (_, i) => minutes.get(first + i) ?? 0)
      : [],
    lag: facts.lag ?? oldLag,
    open: open.size,
    waiting: 0,
    failed: 0,
    undelivered: [...open.values()].reduce((sum, { bytes }) => sum + bytes, 0),
    lost: ledger.lost,
    gone: facts.gone ?? 0,
    skipped: facts.skipped ?? 0,
    untimed: facts.untimed ?? 0,
    ahead: facts.ahead ?? 0,
    ...(facts.through !== undefined && { through: Math.min(facts.through, now) }),
    ...(facts.zone !== undefined && { zone: facts.zone }),
    ...(facts.agent !== undefined && { agent: facts.agent }),
    ...(facts.peer !== undefined && { peer: facts.peer }),
    ...(mute && { muted: mute }),
    ...(claims.length > 0 && { contested: claims.map(({ peer }) => peer) }),
  };
}

/** A time of a clock that was ahead counts as that at which it was first seen. */
function notInFuture({ now, future }: Look, host: string, at: number): number {
  if (!future) return Math.min(at, now);
  const seen = future[host];
  if (seen && seen.value === at) return Math.min(seen.at, now);
  delete future[host];
  if (at > now) future[host] = { value: at, at: now };
  return Math.min(at, now);
}

/**
 * Since when a sealed batch waits: what does not change while it lies there, so neither its change time (chmod, links) nor a
 * time of the future.
 */
async function waitsSince(folder: string, name: string, ledger: Ledger, now: number): Promise<number> {
  const sealedAt = ledger.sealed.get(name)?.at;
  const info = await stat(join(folder, name)).catch(() => undefined); // taken just now
  const times = [Math.max(sealedAt ?? 0, info?.mtimeMs ?? 0), sealedAt, info?.ctimeMs];
  const known = times.find((at) => at !== undefined && at > 0 && at <= now);
  return known ?? Math.min(now, parseWindow(parseBatchName(name)?.window ?? "").end + DAY / 2);
}

/** The newest window of which a batch does not wait any more. */
function newestDelivered({ sealed }: Ledger, waiting: Set<string>): string | undefined {
  let newest: string | undefined;
  for (const name of sealed.keys()) {
    const window = waiting.has(name) ? undefined : parseBatchName(name)?.window;
    if (window !== undefined && window > (newest ?? "")) newest = window;
  }
  return newest;
}

async function stateOf(look: Look, { host, heardAt, lineAt, expected }: HostStatus): Promise<HostState> {
  const { now, thresholds } = look;
  const threshold = (thresholds.silentMinutesByHost[host] ?? thresholds.silentMinutes) * MINUTE;
  if (heardAt > 0 && now - heardAt < threshold) return now - lineAt >= threshold ? "quiet" : "ok";
  if (heardAt === 0 && !expected) return "gone";
  const { from, until } = await listening(look, host, heardAt);
  if (until - Math.max(heardAt, from) < threshold) return "waiting";
  if (heardAt === 0) return "never";
  return !expected && now - heardAt >= DAY ? "gone" : "silent";
}

/** From when and until when a sender's receiver could hear it. Whom it heard meanwhile, it can hear. */
async function listening(
  look: Look,
  host: string,
  heardAt: number,
): Promise<{ from: number; until: number }> {
  const { receivers, now, since = 0, unnamed } = look;
  const all = receivers.map(({ startedAt, at, runs, health, healthSince, pid }) => ({
    pid,
    from: startedAt,
    until: !runs ? at : health !== undefined ? (healthSince ?? at) : now,
  }));
  if (all.length === 0) all.push({ pid: 0, from: unnamed?.startedAt ?? 0, until: unnamed?.wellUntil ?? now });
  const holder =
    all.length > 1 ? await readIfExists(join(look.dir, host, `${LEDGER}-lock`)).catch(() => "") : "";
  const own =
    all.length === 1 ? all[0] : all.find(({ pid }) => pid !== undefined && String(pid) === holder?.trim());
  const from = own?.from ?? Math.min(...all.map((receiver) => receiver.from));
  const until = own?.until ?? Math.max(...all.map((receiver) => receiver.until));
  return { from: Math.max(from, since), until: heardAt > until ? now : Math.min(until, now) };
}

// ---- what is wrong

/** What a look found beside the snapshot. */
export interface Findings {
  /** What could not be read, and why. */
  unreadable?: { path: string; reason: string; host?: string }[];
  /** Names of the batches in failed/. */
  failed?: string[];
  monitor?: MonitorNews | undefined;
  /** Problems that only the caller knows. */
  more?: Problem[];
}

/** What is wrong, worst first; nothing when every line arrives and every batch is delivered. */
export function findProblems(snapshot: Snapshot, thresholds: Thresholds, findings: Findings = {}): Problem[] {
  const { unreadable = [], failed = [], monitor, more = [] } = findings;
  return [
    ...unreadableProblems(unreadable, snapshot.dir),
    ...more,
    ...receiverProblems(snapshot),
    ...senderProblems(snapshot, thresholds),
    ...forwarderProblems(snapshot, thresholds),
    ...queueProblems(snapshot, thresholds, failed),
    ...diskProblems(snapshot, thresholds),
    ...monitorProblems(snapshot.now, monitor),
  ];
}

function unreadableProblems(unreadable: NonNullable<Findings["unreadable"]>, dir: string): Problem[] {
  const rest = unreadable.filter(({ path }) => path !== dir);
  const problems: Problem[] = [];
  const folder = unreadable.find(({ path }) => path === dir);
  const next = [`ls -la ${dir}`];
  if (folder) {
    const text = `${dir}: ${folder.reason}`;
    problems.push({
      key: "folder",
      leg: "arrival",
      title: "the folder can't be read",
      text,
      hosts: [],
      next,
      sudden: true,
    });
  }
  if (rest.length > 0) {
    const title = `${count(rest.length, "file or folder", "files or folders")} can't be read`;
    const text = list(rest.map(({ path, reason }) => `${path}: ${reason}`));
    const hosts = rest.flatMap(({ host }) => host ?? []);
    problems.push({ key: "unreadable", leg: "arrival", title, text, hosts, next, sudden: true });
  }
  return problems;
}

function receiverProblems({ receivers, now }: Snapshot): Problem[] {
  const problems: Problem[] = [];
  for (const { runs, ports, at, health, pressed } of receivers) {
    const port = `port${ports.length > 1 ? "s" : ""} ${ports.join(", ")}`;
    const next = [
      `systemctl status log-rt-sync-receiver@${ports[0]}`,
      `journalctl -u log-rt-sync-receiver@${ports[0]} -n 50`,
    ];
    const about = { leg: "arrival" as const, hosts: [], next, sudden: true };
    if (!runs) {
      const text = `Nothing listens on ${port}: last sign of life ${formatClock(at, now)}, ${formatDuration(now - at)} ago`;
      problems.push({
        ...about,
        key: `no receiver ${ports[0]}`,
        title: `no receiver is running on ${port}`,
        text,
      });
    } else if (health !== undefined) {
      const title = `the receiver on ${port} can't store lines`;
      problems.push({
        ...about,
        key: `receiver ${ports[0]}`,
        title,
        text: health,
        leg: /disk|space|inode/i.test(health) ? "disk" : "arrival",
      });
    }
    if (runs && pressed.length > 0) {
      const title = `${count(pressed.length, "sender meets", "senders meet")} a limit`;
      const text = list(pressed.map((row) => `${row.host}: ${row.text}`));
      const hosts = pressed.map((row) => row.host);
      problems.push({ ...about, key: `pressed ${ports[0]}`, title, text, hosts });
    }
  }
  return problems;
}

function senderProblems(snapshot: Snapshot, { alertWhenQuiet }: Thresholds): Problem[] {
  const { hosts, now } = snapshot;
  const refused = refusedSenders(snapshot);
  const problems: Problem[] = [];
  const add = (
    key: string,
    found: HostStatus[],
    what: [string, string],
    say: (host: HostStatus) => string,
  ) => {
    const names = found.map(({ host }) => host);
    const next = nextForSenders(key, names[0] ?? "");
    if (found.length > 0)
      problems.push({
        ...{ key, leg: "arrival", title: count(found.length, ...what) },
        ...{ text: list(found.map(say)), hosts: names, next },
      });
  };
  const inState = (state: HostState) => hosts.filter((host) => !host.muted && host.state === state);
  const since = (at: number) => `since ${formatClock(at, now)} (${formatDuration(now - at)})`;
  const why = ({ host }: HostStatus) => {
    const row =
      refused.find((other) => other.host === host) ?? refused.find((other) => isAlike(other.host, host));
    return row ? `; refused: ${formatRefusal(row, now)}` : "";
  };
  add("silent", inState("silent"), ["sender is silent", "senders are silent"], (host) => {
    return `${host.host} ${since(host.heardAt)}${why(host)}`;
  });
  add("never", inState("never"), ["sender was never seen", "senders were never seen"], (host) => {
    return `${host.host}${why(host)}`;
  });
  if (alertWhenQuiet)
    add("quiet", inState("quiet"), ["sender is quiet", "senders are quiet"], (host) => {
      return `${host.host} ${since(host.lineAt || host.heardAt)}`;
    });
  const contested = hosts.filter((host) => host.contested);
  const claimed = ["name is claimed by two shippers", "names are claimed by two shippers"] as [
    string,
    string,
  ];
  add("contested", contested, claimed, (host) => `${host.host}: from ${host.contested?.join(" and ")}`);
  return [...problems, ...refusedProblem(refused, now)];
}

type RefusedSender = ReceiverState["refused"][number];

/** Senders that keep knocking, not a stranger's single request. */
function refusedSenders({ receivers }: Snapshot): RefusedSender[] {
  const rows = receivers.flatMap(({ runs, refused }) => (runs ? refused : []));
  return rows.filter(({ host, count: times }) => host !== "" && times > 1);
}

function refusedProblem(refused: RefusedSender[], now: number): Problem[] {
  if (refused.length === 0) return [];
  const hosts = [...new Set(refused.map(({ host }) => host))];
  const text = list(refused.map((row) => formatRefusal(row, now)));
  const title = count(hosts.length, "sender is refused", "senders are refused");
  return [{ key: "refused", leg: "arrival", title, text, hosts, next: nextForSenders("refused", "") }];
}

/** `10.10.21.190 from 10.0.3.7: token not known, 9 times since 04:25`. */
export function formatRefusal(
  { host, peer, reason, count: times, since }: RefusedSender,
  now: number,
): string {
  return `${host} from ${peer}: ${reason}, ${times} times since ${formatClock(since, now)}`;
}

/** Whether a refused name looks like an expected one: one with or without its domain, or one sign off. */
function isAlike(refused: string, host: string): boolean {
  if (refused.split(".")[0] === host.split(".")[0] && !/^\d/.test(host)) return true;
  if (Math.abs(refused.length - host.length) > 1) return false;
  let same = 0;
  while (same < host.length && refused[same] === host[same]) same++;
  let tail = 0;
  while (tail < host.length - same && refused.at(-1 - tail) === host.at(-1 - tail)) tail++;
  return Math.max(refused.length, host.length) - same - tail <= 1;
}

function nextForSenders(key: string, host: string): string[] {
  const shipper = `ssh ${host} systemctl status log-rt-sync-shipper`;
  const check = `ssh ${host} 'cd /opt/log-rt-sync && bun run shipper.ts --check --connect'`;
  if (key === "contested")
    return [`ssh ${host} hostname`, "grep -r '\"host\"' /etc/log-rt-sync  # on both machines"];
  if (key === "quiet") return [`ssh ${host} tail -n 1 /var/log/nginx/access.log`, check];
  if (key === "refused")
    return ["journalctl -u 'log-rt-sync-receiver@*' | grep refused", "bun run receiver.ts --check"];
  return [shipper, check, `bun run monitor.ts --status --host ${host}`];
}

const FAULT_TITLE: Record<FaultKind, string> = {
  connection: "the client's server can't be reached",
  server: "the client's server refuses",
  "host key": "the client's server shows another host key",
  login: "the login at the client's server is refused",
  local: "the forwarder can't work here",
};

function forwarderProblems({ forwarder, now, hosts }: Snapshot, { deliveryMinutes }: Thresholds): Problem[] {
  if (!forwarder) return [];
  const problems: Problem[] = [];
  const { fault, stays, aliveAt } = forwarder;
  const next = ["systemctl status log-rt-sync-forwarder", "bun run forwarder.ts --status"];
  // One that cron starts, or of version 1.0, is judged by what waits.
  if (stays && Math.abs(now - aliveAt) > FORWARDER_GONE_MS) {
    const text = `Last sign of life ${formatClock(aliveAt, now)}, ${formatDuration(now - aliveAt)} ago; ${count(sum(hosts, "waiting"), "batch waits", "batches wait")}`;
    problems.push({
      key: "no forwarder",
      leg: "delivery",
      title: "no forwarder is running",
      text,
      hosts: [],
      next,
      sudden: true,
    });
  }
  if (fault) {
    const { kind, text, since } = fault;
    const mends = kind === "connection" || kind === "server";
    problems.push({
      key: `forwarder ${kind}`,
      leg: "delivery",
      title: FAULT_TITLE[kind],
      text: `${text}; since ${formatClock(since, now)}`,
      hosts: [],
      next: ["bun run forwarder.ts --check --connect", ...next],
      ...(mends && { mailFrom: since + deliveryMinutes * MINUTE }),
    });
  }
  return problems;
}

function queueProblems(
  { hosts, now, forwarder, dir }: Snapshot,
  thresholds: Thresholds,
  failed: string[],
): Problem[] {
  const problems: Problem[] = [];
  const late = hosts.filter((host) => isLate(host, now, thresholds));
  if (late.length > 0) {
    const first = late.reduce((a, b) => ((a.waitingSince ?? now) <= (b.waitingSince ?? now) ? a : b));
    const since = first.waitingSince ?? now;
    problems.push({
      key: "late",
      leg: "delivery",
      title: `${count(sum(late, "waiting"), "batch waits", "batches wait")} since ${formatClock(since, now)}`,
      text: `The oldest is ${first.oldest}, for ${formatDuration(now - since)}`,
      hosts: late.map(({ host }) => host),
      next: ["bun run forwarder.ts --status", "journalctl -u log-rt-sync-forwarder -n 50"],
    });
  }
  if (failed.length > 0) {
    const told = failed.map((name) => `${name}: ${forwarder?.failed[name]?.reason ?? "moved there by hand"}`);
    problems.push({
      key: "failed",
      leg: "delivery",
      title: count(failed.length, "batch is refused by the client", "batches are refused by the client"),
      text: list(told),
      hosts: hosts.filter((host) => host.failed > 0).map(({ host }) => host),
      next: ["bun run forwarder.ts --status", `ls -l ${folders(dir).failed}`],
    });
  }
  return problems;
}

/** Whether a sender's oldest sealed batch waits for longer than a forwarder takes. */
export function isLate({ waitingSince }: HostStatus, now: number, { deliveryMinutes }: Thresholds): boolean {
  return waitingSince !== undefined && now - waitingSince > deliveryMinutes * MINUTE;
}

function diskProblems({ disk, dir }: Snapshot, { minFreePercent }: Thresholds): Problem[] {
  const percent = disk ? (100 * disk.free) / disk.total : 100;
  if (!disk || percent >= minFreePercent) return [];
  const title = `the disk has ${percent.toFixed(percent < 10 ? 1 : 0)} % left`;
  const text = `${formatBytes(disk.free)} of ${formatBytes(disk.total)} are free, expected ${minFreePercent} %`;
  return [
    {
      key: "disk",
      leg: "disk",
      title,
      text,
      hosts: [],
      next: [`df -h ${dir}`, `du -sh ${dir}/*`],
      sudden: true,
    },
  ];
}

function monitorProblems(now: number, monitor: MonitorNews | undefined): Problem[] {
  if (!monitor) return [];
  const problems = undeliverableProblems(monitor.undeliverable, now);
  if (Math.abs(now - monitor.at) > MONITOR_GONE_MS) {
    const text = `Last run ${formatClock(monitor.at, now)}, ${formatDuration(now - monitor.at)} ago: nobody is told of what is wrong`;
    const next = ["systemctl status log-rt-sync-monitor.timer"];
    problems.push({
      key: "no monitor",
      leg: "watching",
      title: "no monitor is running",
      text,
      hosts: [],
      next,
    });
  }
  return problems;
}

/** Mails and posts that were refused for good in the last day. */
export function undeliverableProblems(undeliverable: MonitorNews["undeliverable"], now: number): Problem[] {
  const recent = undeliverable.filter(({ at }) => now - at < DAY);
  if (recent.length === 0) return [];
  const title = `${count(recent.length, "mail or post was", "mails or posts were")} refused for good`;
  const text = list(
    recent.map(({ to, subject, reason, at }) => `"${subject}" to ${to}, ${formatClock(at, now)}: ${reason}`),
  );
  return [
    {
      key: "undeliverable",
      leg: "watching",
      title,
      text,
      hosts: [],
      next: ["bun run monitor.ts --test-mail"],
    },
  ];
}

// ---- words

/** The one sentence at the top: `2 senders are silent, 14 batches wait since 10:20`. */
export function headline({ hosts, forwarder, problems }: Snapshot): string {
  if (problems.length > 0) {
    const told = problems.length > 3 ? problems.slice(0, 2) : problems;
    const more = problems.length > told.length ? [`and ${problems.length - told.length} more problems`] : [];
    return sentence([...told.map(({ title }) => title), ...more].join(", "));
  }
  if (hosts.length === 0) return "No sender was seen yet";
  const sends = inState(hosts, "ok").length > 0;
  if (!sends && inState(hosts, "waiting").length > 0)
    return "Waiting for senders: the receiver has just started";
  const arrival = sends ? "Everything arrives" : "No lines come";
  if (!forwarder) return `${arrival}, no forwarder has run here yet`;
  return `${arrival} and ${sends ? "is" : "everything is"} delivered`;
}

/** Adds up one number of all senders. */
export function sum(
  hosts: HostStatus[],
  key: "waiting" | "failed" | "open" | "lag" | "lost" | "gone" | "undelivered",
): number {
  return hosts.reduce((total, host) => total + (host[key] ?? 0), 0);
}

/** The senders in a state. */
export function inState(hosts: HostStatus[], state: HostState): HostStatus[] {
  return hosts.filter((host) => host.state === state);
}

/** `1 batch`, `1,400 batches`. */
export function count(n: number, one: string, many: string): string {
  return `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
}

/** `10:20`, with the day when it is not today's: this machine's wall clock. */
export function formatClock(at: number, now: number): string {
  const time = new Date(at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (new Date(at).toDateString() === new Date(now).toDateString()) return time;
  return `${new Date(at).toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${time}`;
}

/** The text with a capital at its head. */
export function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function list(texts: string[]): string {
  const more = texts.length - NAMES;
  return texts.slice(0, NAMES).join("; ") + (more > 0 ? `; and ${more} more` : "");
}

// ---- for the receiver

/** However many look at the page, the folder is looked at once in so long. */
const FRESH_MS = 2_000;

/** A function that tells the state of everything; calls within two seconds share one look at the folder. */
export function createStatusReader(
  dir: string,
  thresholds: () => Thresholds,
  { now = Date.now, ...sources }: Partial<Omit<ObserveOptions, "now">> & { now?: () => number },
): () => Promise<Snapshot> {
  const startedAt = now();
  const kept = {
    readLedger: createLedgerReader(),
    future: {},
    unnamed: { startedAt },
    curves: true,
    ...sources,
  };
  let lastAt = Number.NEGATIVE_INFINITY;
  let last: Promise<Snapshot> | undefined;
  return () => {
    if (!last || Math.abs(now() - lastAt) > FRESH_MS) {
      lastAt = now();
      last = observe(dir, thresholds(), { ...kept, now: lastAt });
    }
    return last;
  };
}
