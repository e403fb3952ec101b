/**
 * What the monitor sees in one look: the ledgers and folders of `dir`, the receivers' /healthz, what the forwarder
 * tells, the disk. It is what an operator would look at, and it costs one listing per sender and none of sent/.
 */
import { lstat, statfs } from "node:fs/promises";
import { uptime } from "node:os";
import { join } from "node:path";
import { folders, listBatches, listHosts } from "./batch.ts";
import type { Config } from "./config.ts";
import { readLedger } from "./ledger.ts";
import { commonOffset, zoneOffset } from "./mail/summary.ts";
import { errorMessage, formatDuration, wait } from "./service.ts";
import { readForwarderState } from "./status.ts";

type Options = Config["monitor"];
const MINUTE_MS = 60_000;
const HTTP_TIMEOUT_MS = 5_000;
/** A receiver that is just restarted answers the next of so many questions. */
const HEALTH_TRIES = 3;
const HEALTH_PAUSE_MS = 500;

/** What was seen of a sender. Times are by the receiver's clock, 0 for never; lost and lag are bytes. */
export interface HostSight {
  host: string;
  heardAt: number;
  lineAt: number;
  lost: number;
  lag: number;
}

/** A fault of the whole. The key names it across runs, the title is for people. */
export interface Fault {
  key: string;
  title: string;
  text: string;
}

/** What one look has shown. `hosts` is absent when the folder could not be read: then nothing is said of them. */
export interface Sight {
  hosts?: HostSight[];
  /** Receivers that do not answer; their senders are not blamed. */
  receivers: Fault[];
  /** All other faults. */
  faults: Fault[];
  /** Free space of the folder's disk in percent. */
  freePercent?: number;
  /** Since the start of this machine, in milliseconds; it also counts while the clock is set. */
  uptime: number;
}

/** What a look is given; `uptime` is that of this machine in milliseconds. */
export interface LookContext {
  config: Options;
  signal: AbortSignal;
  now: () => number;
  uptime?: () => number;
}

/** What an operator would see, and how far the senders' wall clocks are from UTC. sent/ is never listed. */
export async function look(context: LookContext): Promise<{ sight: Sight; offset: number }> {
  const { config, now, uptime: clock = () => uptime() * 1000 } = context;
  const sight: Sight = { receivers: await askReceivers(context), faults: [], uptime: clock() };
  const offsets: (number | undefined)[] = [];
  try {
    sight.hosts = [];
    for (const host of await listHosts(config.dir)) {
      const { offset, ...seen } = await lookAtHost(config.dir, host);
      sight.hosts.push(seen);
      offsets.push(offset);
    }
    sight.faults.push(...(await lookAtDelivery(config, now())));
    const { bavail, blocks } = await statfs(config.dir);
    sight.freePercent = (100 * bavail) / Math.max(1, blocks);
  } catch (error) {
    delete sight.hosts; // nothing can be said of them
    sight.faults.push({
      key: "folder",
      title: "Folder cannot be read",
      text: `${config.dir}: ${errorMessage(error)}`,
    });
  }
  return { sight, offset: commonOffset(offsets, now()) };
}

async function lookAtHost(dir: string, host: string): Promise<HostSight & { offset: number | undefined }> {
  const ledger = await readLedger(folders(dir).host(host));
  const lag = [...(ledger?.streams.values() ?? [])].reduce((sum, stream) => sum + (stream.lag ?? 0), 0);
  const { heardAt = 0, lineAt = 0, lost = 0 } = ledger ?? {};
  return { host, heardAt, lineAt, lost, lag, offset: ledger && zoneOffset(ledger) };
}

/** What keeps batches from the client: how long the oldest waits, what the forwarder says, what is in failed/. */
async function lookAtDelivery(config: Options, now: number): Promise<Fault[]> {
  const faults: Fault[] = [];
  const limit = config.deliveryMinutes * MINUTE_MS;
  const waiting = await countWaiting(config.dir);
  if (waiting.oldest && now - waiting.since > limit) {
    const batches = waiting.files === 1 ? "1 batch waits" : `${waiting.files} batches wait`;
    const text = `${batches}, the oldest ${waiting.oldest} for ${formatDuration(now - waiting.since)}`;
    faults.push({ key: "delivery", title: "Delivery is late", text });
  }
  const forwarder = await readForwarderState(config.dir);
  const { kind, text, since } = forwarder?.fault ?? { kind: "", text: "", since: now };
  const atOnce = kind !== "connection" && kind !== "server"; // those two often mend themselves
  if (kind && (atOnce || now - since > limit))
    faults.push({ key: `forwarder ${kind}`, title: FAULT_TITLE[kind], text });
  const failed = await listBatches(folders(config.dir).failed, "sealed");
  if (failed[0]) {
    const reason = forwarder?.failed[failed[0]]?.reason;
    const count = failed.length === 1 ? failed[0] : `${failed.length} batches, the oldest ${failed[0]}`;
    faults.push({ key: "failed", title: "Delivery failed", text: reason ? `${count}: ${reason}` : count });
  }
  return faults;
}

const FAULT_TITLE = {
  connection: "Client's server not reached",
  server: "Client's server refuses",
  "host key": "Host key refused",
  login: "Login at the client's server refused",
  local: "Forwarder cannot work",
} as const;

/** The queue of all senders. A rename sets the change time: it tells since when a batch waits. */
async function countWaiting(dir: string): Promise<{ files: number; since: number; oldest?: string }> {
  const waiting: { files: number; since: number; oldest?: string } = {
    files: 0,
    since: Number.POSITIVE_INFINITY,
  };
  for (const host of await listHosts(dir)) {
    const names = await listBatches(folders(dir).host(host), "sealed");
    waiting.files += names.length;
    const oldest = names[0];
    const info = oldest && (await lstat(join(folders(dir).host(host), oldest)).catch(() => undefined)); // just taken
    if (info && info.ctimeMs < waiting.since) Object.assign(waiting, { since: info.ctimeMs, oldest });
  }
  return waiting;
}

async function askReceivers({ config, signal }: LookContext): Promise<Fault[]> {
  const faults = await Promise.all(
    config.receivers.map(async (url): Promise<Fault | undefined> => {
      const { origin, host } = new URL(url);
      let text = "";
      for (let tries = 0; tries < HEALTH_TRIES; tries++) {
        if (tries > 0) await wait(HEALTH_PAUSE_MS, signal);
        try {
          const answer = await fetch(`${origin}/healthz`, {
            signal: AbortSignal.any([signal, AbortSignal.timeout(HTTP_TIMEOUT_MS)]),
          });
          if (answer.ok) return undefined;
          text = `/healthz answers ${answer.status}: ${(await answer.text()).slice(0, 200).trim()}`;
        } catch (error) {
          text = `it does not answer: ${errorMessage(error)}`;
        }
      }
      return { key: `receiver ${origin}`, title: `Receiver ${host} not well`, text };
    }),
  );
  signal.throwIfAborted();
  return faults.filter((fault) => fault !== undefined);
}
