/**
 * A snapshot of the folder: how each sender does, who runs, what waits. What can't be read is noted, and it is made
 * without it; what of it is wrong, lib/status.ts says.
 *
 * It costs one listing per sender, one of failed/ and none of sent/. A sender is silent when its receiver could have
 * heard it for the whole of its threshold: not while that is down, and not before it was there for so long.
 */
import { readdir, stat, statfs } from "node:fs/promises";
import { hostname } from "node:os";
import { join } from "node:path";
import type { z } from "zod";
import {
  dashedHost,
  folders,
  isCopy,
  LEDGER,
  listBatches,
  listHosts,
  parseBatchName,
  parseWindow,
} from "./batch.ts";
import { parseAgent } from "./chunk.ts";
import { sections } from "./config.ts";
import { readDigestHead } from "./digest.ts";
import { readIfExists } from "./durable.ts";
import { ofHost } from "./host.ts";
import { emptyLedger, HISTORY_MINUTES, type Ledger, readLedger, type SenderFacts } from "./ledger.ts";
import { DAY, errorMessage, MINUTE, VERSION } from "./service.ts";
import {
  type ForwarderState,
  forwarderStatePath,
  type Mute,
  type ReceiverState,
  readForwarderState,
  receiverStateSchema,
} from "./signs.ts";
import { readState } from "./state.ts";

const RECEIVER_GONE_MS = MINUTE;
/** The state file of a port that the config no longer has is not spoken of any more. */
const OLD_STATE_MS = DAY;
/** Wall clocks differ from UTC by so much at most. */
const ZONES_MS = DAY / 2 + 2 * 60 * MINUTE;

/**
 * How a sender is doing. `ok`: lines come; `quiet`: it is heard, but sends no lines; `silent`: it is not heard; `waiting`:
 * not heard yet since its receiver started, or while that is down; `never`: expected, and never seen; `gone`: silent for a
 * day and not expected, or only batches of it are left.
 */
export type HostState = "ok" | "quiet" | "silent" | "waiting" | "never" | "gone";

/** The states, the one to look at first before the others. */
export const HOST_STATES: HostState[] = ["silent", "never", "waiting", "gone", "quiet", "ok"];

/** Where a batch of the last day is; one that neither waits nor failed is delivered. */
export interface BatchSeen {
  name: string;
  place: "open" | "waiting" | "failed" | "delivered";
}

/** One sender. Times are milliseconds since the epoch by the receiver's clock, 0 for never. */
export interface HostStatus extends Pick<SenderFacts, "again" | "againFiles" | "zone" | "peer"> {
  host: string;
  state: HostState;
  expected: boolean;
  /** When anything, also a heartbeat, was last heard; never later than now. */
  heardAt: number;
  lineAt: number;
  /** Lines of each whole minute of the last hours, oldest first, and batches of the last day; where details are wanted. */
  linesPerMinute: number[];
  batches: BatchSeen[];
  /** Bytes that the sender still has to ship; unknown when it is not heard. */
  lag: number | undefined;
  open: number;
  /** Sealed batches that are not delivered yet, since when the oldest waits, and its name. */
  waiting: number;
  waitingSince?: number;
  oldest?: string;
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
  through?: number;
  /** The newest window of which a batch was delivered, and the oldest of which one was not yet; as in batch names. */
  delivered?: string;
  undeliveredFrom?: string;
  agent?: string;
  lacksLog?: boolean;
  /** The file of which bytes were lost last, without its folder. */
  lostIn?: string;
  muted?: Mute;
  /** The two addresses, when two shippers claim its name. */
  contested?: string[];
}

export interface ReceiverSeen extends ReceiverState {
  runs: boolean;
}

export interface FolderState {
  version: string;
  now: number;
  server: string;
  dir: string;
  /** Sorted as people count. */
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
  linesPerMinute: number[];
  unreadable: { path: string; reason: string; host?: string }[];
  failed: string[];
  /** How long a forwarder may take for a sealed batch. */
  deliveryMinutes: number;
}

const thresholdsSchema = sections.monitor.pick({
  ...{ expected: true, silentMinutes: true, silentMinutesByHost: true },
  ...{ alertWhenQuiet: true, deliveryMinutes: true, minFreePercent: true },
});
/** What counts as wrong: of the config's section `monitor`, or its defaults. */
export type Thresholds = z.infer<typeof thresholdsSchema>;
export const DEFAULT_THRESHOLDS: Thresholds = thresholdsSchema.parse({});

export interface SnapshotOptions {
  now: number;
  /** A sender's ledger in memory; without one it is read from the folder. */
  ledgerOf?: (host: string) => Ledger | undefined;
  readLedger?: (hostFolder: string) => Promise<Ledger | undefined>;
  /** Of how many senders, those in trouble first, curves and batches are wanted. */
  details?: number;
  /** Nobody could have been heard before. */
  since?: number;
  /** Since when a receiver runs that writes no state file, and until when it was well. */
  unnamed?: { startedAt?: number; wellUntil?: number };
  mutes?: Record<string, Mute>;
  /** When a time that lies in the future was first seen: it stays there. */
  future?: Record<string, { value: number; at: number }>;
}

interface Scan extends SnapshotOptions {
  dir: string;
  thresholds: Thresholds;
  seen: FolderState;
  /** Of the senders seen, where details are wanted. */
  ledgers: Map<string, Ledger>;
  expected: Set<string>;
}

/** Never throws. */
export async function readSnapshot(
  dir: string,
  thresholds: Thresholds,
  options: SnapshotOptions,
): Promise<FolderState> {
  const { now, mutes = {} } = options;
  const seen: FolderState = {
    version: VERSION,
    now,
    server: hostname(),
    dir,
    startedAt: 0,
    hosts: [],
    receivers: [],
    linesPerMinute: [],
    unreadable: [],
    failed: [],
    deliveryMinutes: thresholds.deliveryMinutes,
    mutes: Object.fromEntries(Object.entries(mutes).filter(([, { until }]) => until > now)),
  };
  const expected = new Set(thresholds.expected);
  const scan: Scan = { ...options, dir, thresholds, seen, ledgers: new Map(), expected };
  await scanReceivers(scan);
  const forwarder = await attempt(scan, forwarderStatePath(dir), () => scanForwarder(dir));
  const { failed } = folders(dir);
  seen.failed = (await attempt(scan, failed, () => listBatches(failed, "sealed", "compressed"))) ?? [];
  await scanHosts(scan);
  const disk = await attempt(scan, dir, () => askDisk(dir));
  const digest = await readDigestHead(dir).catch(() => undefined);
  return Object.assign(seen, forwarder && { forwarder }, disk && { disk }, digest && { digest });
}

/** What `work` gives; when it fails, that is noted, and the rest is read. */
async function attempt<T>(
  { seen }: Scan,
  path: string,
  work: () => Promise<T>,
  host?: string,
): Promise<T | undefined> {
  try {
    return await work();
  } catch (error) {
    seen.unreadable.push({ path, reason: errorMessage(error), ...(host !== undefined && { host }) });
    return undefined;
  }
}

async function scanForwarder(dir: string): Promise<(ForwarderState & { aliveAt: number }) | undefined> {
  const state = await readForwarderState(dir);
  const info = state && (await stat(forwarderStatePath(dir)));
  return state && { ...state, aliveAt: Math.max(state.at, info?.mtimeMs ?? 0) };
}

async function scanReceivers(scan: Scan): Promise<void> {
  const { dir, now, seen } = scan;
  const names = (await readdir(dir).catch(() => [])).filter((name) => /^\.receiver-\d+\.json$/.test(name));
  const all: ReceiverSeen[] = [];
  for (const name of names) {
    const path = join(dir, name);
    const found = await attempt(scan, path, () => readState(path, receiverStateSchema, 1));
    if (found?.state === "damaged") seen.unreadable.push({ path, reason: found.reason });
    if (found?.state === "ok")
      all.push({ ...found.value, runs: Math.abs(now - found.value.at) < RECEIVER_GONE_MS });
  }
  const running = all.filter(({ runs }) => runs);
  const served = new Set(running.flatMap(({ ports }) => ports));
  seen.startedAt = Math.max(0, ...running.map(({ startedAt }) => startedAt));
  seen.receivers = all.filter(
    ({ runs, ports, at }) =>
      runs || (!ports.every((port) => served.has(port)) && (served.size === 0 || now - at < OLD_STATE_MS)),
  );
}

async function askDisk(dir: string): Promise<{ free: number; total: number } | undefined> {
  const { bavail, blocks, bsize } = await statfs(dir);
  return blocks > 0 ? { free: bavail * bsize, total: blocks * bsize } : undefined; // some have no size
}

// ---- senders

async function scanHosts(scan: Scan): Promise<void> {
  const { seen, dir, expected, details = 0 } = scan;
  const failed = Map.groupBy(seen.failed, (name) => parseBatchName(name)?.host ?? "");
  const present = (await attempt(scan, dir, () => listHosts(dir))) ?? [];
  const names = [...new Set([...expected, ...present])].sort(compareAsPeopleCount);
  for (const host of names) {
    const dashed = dashedHost(host);
    const count = failed.get(dashed)?.length ?? 0;
    const status = await attempt(scan, join(dir, host), () => scanHost(scan, host, count), host);
    if (!status) continue;
    failed.delete(dashed);
    seen.hosts.push(status);
  }
  for (const [host, { length }] of failed) {
    // its folder is gone, the dashed form of its name is all that is left
    seen.hosts.push({ ...statusOfLedger(scan, host, emptyLedger()), state: "gone", failed: length });
  }
  if (details > 0) await addDetails(scan, details);
}

export const compareAsPeopleCount = new Intl.Collator("en", { numeric: true }).compare;

type Patience = Pick<FolderState, "now" | "deliveryMinutes">;

/** Whether a sender's oldest sealed batch waits for longer than a forwarder takes. */
export function isLate({ waitingSince }: HostStatus, { now, deliveryMinutes }: Patience): boolean {
  return waitingSince !== undefined && now - waitingSince > deliveryMinutes * MINUTE;
}

/** Whether there is more to say of a sender than its state. */
export function isTroubled(host: HostStatus, seen: Patience): boolean {
  return host.failed + host.lost + host.gone > 0 || !!host.contested || !!host.muted || isLate(host, seen);
}

/** Those in trouble first, in the order of their states; else as they stand. */
export function sortBySeverity(hosts: HostStatus[], seen: Patience): HostStatus[] {
  const rank = (host: HostStatus) => 2 * HOST_STATES.indexOf(host.state) + Number(!isTroubled(host, seen));
  return hosts.toSorted((a, b) => rank(a) - rank(b));
}

/** A sender; undefined for what is no sender's folder, or of one that is long gone. */
async function scanHost(scan: Scan, host: string, failed: number): Promise<HostStatus | undefined> {
  const folder = folders(scan.dir).host(host);
  const known = scan.ledgerOf?.(host) ?? (await (scan.readLedger ?? readLedger)(folder));
  if (known?.isDamaged) throw new Error(`${LEDGER} is damaged: a running receiver writes it anew`);
  const ledger = known ?? emptyLedger();
  const names = await listBatches(folder, "sealed", "open");
  if (!scan.expected.has(host) && !isHostOf(host, names, ledger)) return undefined;
  const isForgotten = ledger.facts.forgotten !== undefined && !scan.expected.has(host);
  if (isForgotten && names.length + failed === 0) return undefined;
  const sealed = names.filter((name) => name.endsWith(".log"));
  const status: HostStatus = { ...statusOfLedger(scan, host, ledger), failed, waiting: sealed.length };
  for (const name of sealed) {
    const oldest = status.waitingSince ?? Number.POSITIVE_INFINITY;
    const sealedAt = ledger.sealed.get(name)?.at ?? 0;
    if (sealedAt >= oldest && sealedAt <= scan.now) continue; // it waits since then at the earliest: its file is not asked
    const since = await waitsSince(folder, name, ledger, scan.now);
    if (since >= oldest) continue;
    Object.assign(status, { waitingSince: since, oldest: name });
  }
  status.undelivered += sealed.reduce((sum, name) => sum + (ledger.sealed.get(name)?.bytes ?? 0), 0);
  status.state = await stateOf(scan, status);
  if (status.state !== "ok" && status.state !== "quiet") status.lag = undefined;
  const isLeft = status.open + status.waiting + failed > 0;
  if (status.state === "gone" && !isLeft && scan.now - status.heardAt >= 2 * DAY) return undefined;
  if (scan.details) {
    scan.ledgers.set(host, ledger);
    status.batches = sealed.map((name) => ({ name, place: "waiting" }));
  }
  return status;
}

function isHostOf(host: string, names: string[], { heardAt, streams, sealed, open }: Ledger): boolean {
  if (names.length + heardAt + streams.size + sealed.size + open.size === 0) return false;
  return !isCopy(host, names, sealed.keys(), open.keys());
}

function statusOfLedger(scan: Scan, host: string, ledger: Ledger): HostStatus {
  const { now, expected, seen } = scan;
  const { facts, streams, open } = ledger;
  const oldLag = [...streams.values()].reduce((sum, { lag = 0 }) => sum + lag, 0);
  const agent = facts.agent === undefined ? undefined : parseAgent(facts.agent);
  const mute = ofHost(seen.mutes, host) ?? seen.mutes["*"];
  const claims = (facts.contestedUntil ?? 0) > now ? (facts.shippers ?? []).slice(-2) : [];
  return {
    host,
    state: "never",
    expected: expected.has(host),
    linesPerMinute: [],
    batches: [],
    heardAt: notInFuture(scan, host, ledger.heardAt),
    lineAt: Math.min(ledger.lineAt, now),
    lag: facts.lag ?? oldLag,
    open: open.size,
    waiting: 0,
    failed: 0,
    undelivered: [...open.values()].reduce((sum, { bytes }) => sum + bytes, 0),
    lost: ledger.lost,
    gone: facts.gone ?? 0,
    ...(facts.again !== undefined && { again: facts.again, againFiles: facts.againFiles ?? 0 }),
    skipped: facts.skipped ?? 0,
    untimed: facts.untimed ?? 0,
    ahead: facts.ahead ?? 0,
    ...(facts.through !== undefined && { through: Math.min(facts.through, now) }),
    ...(facts.zone !== undefined && { zone: facts.zone }),
    ...(agent && { agent: agent.name }),
    ...(agent?.lacksLog && { lacksLog: true }),
    ...(agent?.lostIn !== undefined && { lostIn: agent.lostIn }),
    ...(facts.peer !== undefined && { peer: facts.peer }),
    ...(mute && { muted: mute }),
    ...(claims.length > 0 && { contested: claims.map(({ peer }) => peer) }),
  };
}

/** A time of a clock that was ahead counts as that at which it was first seen. */
function notInFuture({ now, future }: Scan, host: string, at: number): number {
  if (!future) return Math.min(at, now);
  const seen = ofHost(future, host);
  if (seen && seen.value === at) return Math.min(seen.at, now);
  delete future[host];
  if (at > now) future[host] = { value: at, at: now };
  return Math.min(at, now);
}

/** Since when a sealed batch waits: what does not change while it lies there (chmod, links), and no time of the future. */
async function waitsSince(folder: string, name: string, ledger: Ledger, now: number): Promise<number> {
  const sealedAt = ledger.sealed.get(name)?.at;
  const info = await stat(join(folder, name)).catch(() => undefined); // taken just now
  const times = [Math.max(sealedAt ?? 0, info?.mtimeMs ?? 0), sealedAt, info?.ctimeMs];
  const known = times.find((at) => at !== undefined && at > 0 && at <= now);
  return known ?? Math.min(now, parseWindow(parseBatchName(name)?.window ?? "").end + DAY / 2);
}

async function stateOf(scan: Scan, { host, heardAt, lineAt, expected }: HostStatus): Promise<HostState> {
  const { now, thresholds } = scan;
  const threshold = (ofHost(thresholds.silentMinutesByHost, host) ?? thresholds.silentMinutes) * MINUTE;
  if (heardAt > 0 && now - heardAt < threshold) return now - lineAt >= threshold ? "quiet" : "ok";
  if (heardAt === 0 && !expected) return "gone";
  const { from, until } = await listening(scan, host, heardAt);
  if (until - Math.max(heardAt, from) < threshold) return "waiting";
  if (heardAt === 0) return "never";
  return !expected && now - heardAt >= DAY ? "gone" : "silent";
}

/** From when and until when a sender's receiver could hear it. Whom it heard meanwhile, it can hear. */
async function listening(scan: Scan, host: string, heardAt: number) {
  const { now, since = 0, unnamed } = scan;
  const all = scan.seen.receivers.map(({ startedAt, at, runs, health, healthSince, pid }) => ({
    pid,
    from: startedAt,
    until: !runs ? at : health !== undefined ? (healthSince ?? at) : now,
  }));
  if (all.length === 0) all.push({ pid: 0, from: unnamed?.startedAt ?? 0, until: unnamed?.wellUntil ?? now });
  const holder =
    all.length > 1 ? await readIfExists(join(scan.dir, host, `${LEDGER}-lock`)).catch(() => "") : "";
  const own =
    all.length === 1 ? all[0] : all.find(({ pid }) => pid !== undefined && String(pid) === holder?.trim());
  const from = own?.from ?? Math.min(...all.map((receiver) => receiver.from));
  const until = own?.until ?? Math.max(...all.map((receiver) => receiver.until));
  return { from: Math.max(from, since), until: heardAt > until ? now : Math.min(until, now) };
}

// ---- details

/** Curves and batches of the first senders, and the curve of all. */
async function addDetails({ seen, ledgers, now }: Scan, most: number): Promise<void> {
  const first = Math.floor(now / MINUTE) - HISTORY_MINUTES;
  const total: number[] = new Array(HISTORY_MINUTES).fill(0);
  // not for … of, which makes an object of each of a million entries
  for (const { minutes } of ledgers.values())
    minutes.forEach((lines, minute) => {
      const i = minute - first;
      if (i >= 0 && i < HISTORY_MINUTES) total[i] = (total[i] ?? 0) + lines;
    });
  seen.linesPerMinute = total;
  for (const status of sortBySeverity(seen.hosts, seen).slice(0, most)) {
    const ledger = ledgers.get(status.host) ?? emptyLedger();
    const { minutes } = ledger;
    status.linesPerMinute = total.map((_, i) => minutes.get(first + i) ?? 0);
    addBatches(status, ledger, seen);
  }
}

/** The batches of the last day, and up to where all is delivered. */
function addBatches(status: HostStatus, { sealed, open }: Ledger, { failed, now }: FolderState): void {
  const dashed = dashedHost(status.host);
  const all = new Map<string, BatchSeen["place"]>();
  for (const name of sealed.keys()) all.set(name, "delivered");
  for (const { name, place } of status.batches) all.set(name, place);
  for (const name of open.keys()) all.set(name, "open");
  for (const name of failed) if (parseBatchName(name)?.host === dashed) all.set(name, "failed");
  status.batches = [];
  for (const [name, place] of all) {
    const window = parseBatchName(name)?.window ?? "";
    if (place === "delivered" && window > (status.delivered ?? "")) status.delivered = window;
    if (place !== "delivered" && window < (status.undeliveredFrom ?? "~")) status.undeliveredFrom = window;
    if (parseWindow(window).end > now - DAY - ZONES_MS) status.batches.push({ name, place });
  }
}
