/**
 * The state of everything, for the status page: one look at the receiver's ledgers and at the folder. It costs
 * one listing per sender and none of sent/. The folder is the same for all ports, so every port shows all
 * senders, also those that another process serves.
 */
import { stat, statfs } from "node:fs/promises";
import { join } from "node:path";
import { dashedHost, folders, listBatches, listHosts, parseBatchName } from "./batch.ts";
import { type Config, sections } from "./config.ts";
import { createMatcher } from "./host.ts";
import { createLedgerReader, emptyLedger, HISTORY_MINUTES, type Ledger } from "./ledger.ts";
import { type ForwarderState, readForwarderState } from "./report.ts";
import { errorMessage, VERSION } from "./service.ts";

/**
 * How a sender is doing. `ok`: lines come; `quiet`: it is heard of, but sends no lines; `silent`: it is not
 * heard of; `never`: it is expected and was not heard of yet; `gone`: the config knows it no longer, but
 * batches of it are left.
 */
export type HostState = "ok" | "quiet" | "silent" | "never" | "gone";

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

/** A sender not heard of for so long is silent: the monitor's default, for the receiver has no config of the monitor's. */
export const SILENT_MS = sections.monitor.shape.silentMinutes.parse(undefined) * 60_000;

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
  const readOther = createLedgerReader();
  let lastAt = Number.NEGATIVE_INFINITY;
  let last: Promise<Status> | undefined;
  return () => {
    if (!last || Math.abs(now() - lastAt) > FRESH_MS) {
      lastAt = now();
      last = collectStatus(config, { ledgerOf, readOther, now: lastAt, startedAt });
      last.catch(() => {
        last = undefined; // a fault is not kept: the next call looks again
      });
    }
    return last;
  };
}

/** Where and when to look: `readOther` reads the ledger of a sender that `ledgerOf` does not know. */
export interface Sight extends Pick<StatusSources, "ledgerOf"> {
  readOther: (hostFolder: string) => Promise<Ledger | undefined>;
  now: number;
  startedAt: number;
}

/** One look at the ledgers and at the folder. Throws the system's error when the folder cannot be read. */
export async function collectStatus(
  { dir, groups, forgetAfterDays }: Config["receiver"],
  { ledgerOf, readOther, now, startedAt }: Sight,
): Promise<Status> {
  const senders = groups.flatMap((group) => group.senders.map((sender) => sender.toLowerCase()));
  const isSender = createMatcher(senders);
  const expected = senders.filter((sender) => sender !== "*" && !sender.includes("/"));
  const failed = await countFailed(dir);
  const hosts: HostStatus[] = [];
  for (const host of new Set([...expected, ...(await listHosts(dir))])) {
    const folder = folders(dir).host(host);
    const ledger = ledgerOf(host) ?? (await readOther(folder)) ?? emptyLedger();
    const batches = { ...(await countWaiting(folder)), failed: failed.get(dashedHost(host)) ?? 0 };
    failed.delete(dashedHost(host));
    const status = { host, ...tellLedger(ledger, now), ...batches, state: hostState(ledger, now, startedAt) };
    const forgotten = now - ledger.heardAt > forgetAfterDays * 86_400_000 && !expected.includes(host);
    if (isSender(host) && !forgotten) hosts.push(status);
    else if (status.open + status.waiting + status.failed > 0) hosts.push({ ...status, state: "gone" });
  }
  for (const [host, count] of failed) {
    // its folder is gone, the dashed form of its name is all that is left
    hosts.push({ host, ...tellLedger(emptyLedger(), now), waiting: 0, failed: count, state: "gone" });
  }
  const disk = await statfs(dir).then(
    ({ bavail, blocks, bsize }) => ({ free: bavail * bsize, total: blocks * bsize }),
    () => undefined,
  );
  const forwarder = await readForwarderState(dir).catch((error): Status["forwarder"] => {
    return { at: 0, fault: { kind: "local", text: errorMessage(error), since: now } };
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

/** Adds up one number of all senders. */
export function sum(hosts: HostStatus[], key: "waiting" | "failed" | "open" | "lag" | "lost"): number {
  return hosts.reduce((total, host) => total + host[key], 0);
}

/** The senders in a state. */
export function inState(hosts: HostStatus[], state: HostState): HostStatus[] {
  return hosts.filter((host) => host.state === state);
}
