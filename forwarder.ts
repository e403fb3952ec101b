/**
 * Forwarder: every sealed batch becomes exactly one complete file on the client's SFTP server, or in a folder.
 *
 * For each batch, oldest window first: upload to `<name>.tmp`, compare the size, put the intention to rename
 * on disk, rename onto `<name>`, write the report line, move the batch to sent/. A crash before the intention
 * means that the upload starts again from nothing. After it, both remote names tell whether the rename has
 * happened (lib/delivery.ts); the steps that follow are repeated until they change nothing.
 *
 * A server that is down, refuses the login or has no room is not the fault of a file: the cycle ends, the
 * queue stays as it is, the next try comes after a growing pause. A file that the server refuses while it
 * takes others goes to failed/ after `retries` tries and is tried from there, ever less often; by `--once`
 * each time.
 */
import { constants, lstatSync } from "node:fs";
import { access } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { folders, listBatches, listHosts, parseBatchName } from "./lib/batch.ts";
import { type Config, ConfigError, secretFaults } from "./lib/config.ts";
import { findReported, Intents, type Ready } from "./lib/delivery.ts";
import { exists, makeFolder, moveDurably, writeDurably } from "./lib/durable.ts";
import { holdLock } from "./lib/lock.ts";
import { Manifests } from "./lib/manifest.ts";
import {
  appendReport,
  FAULT_KINDS,
  type ForwarderState,
  failReportPath,
  forwarderStatePath,
  type ReportLine,
  readForwarderState,
  readReportTail,
} from "./lib/report.ts";
import { createProbe, deliverRound, type Item, type Refused, type RoundContext } from "./lib/round.ts";
import {
  createFaultLog,
  EXIT,
  errorMessage,
  type FaultLog,
  formatDuration,
  retryDelay,
  runScript,
  type Service,
  wait,
} from "./lib/service.ts";
import { countLines } from "./lib/target/content.ts";
import { openSftpTarget } from "./lib/target/sftp.ts";
import { openFileTarget, Refusal, type Target, TargetFault } from "./lib/target/target.ts";

type Settings = Config["forwarder"];

/** A line that breaks again and again, but lets batches through, is worth a prompt return. */
const AFTER_PROGRESS_MS = 200;
/** A file in failed/ is tried again after one interval, then two, four, …, at most so many ms. */
const MAX_DISTANCE_MS = 3_600_000;

async function main(service: Service<"forwarder">): Promise<number> {
  const { config, configFile, flags, signal } = service;
  if (flags.status) return printStatus(service);
  const faults = checkSecrets(config); // better at the start than at night
  if (faults.length > 0) throw new ConfigError(faults.map((fault) => `${configFile}: ${fault}`));
  await makeFolder(config.dir);
  await holdLock(join(config.dir, ".forwarder.lock"), `The folder ${config.dir}`);
  const forwarder = await createForwarder(service);
  if (flags.once) {
    const { left } = await forwardOnce(forwarder);
    return left > 0 && !signal.aborted ? EXIT.failed : EXIT.done;
  }

  service.log.info("forwarder started", { dir: config.dir, target: config.target });
  for (let faulty = 0; !signal.aborted; ) {
    const { fault, sent } = await forwardOnce(forwarder);
    faulty = fault && sent === 0 ? faulty + 1 : 0;
    if (faulty > 0) await wait(retryDelay(faulty, { min: 1000, max: 180_000 }), signal);
    else await wait(fault ? AFTER_PROGRESS_MS : config.intervalSeconds * 1000, signal);
  }
  return EXIT.done;
}

/** What lasts from one cycle to the next. */
export interface Forwarder {
  service: Service<"forwarder">;
  intents: Intents;
  state: ForwarderState;
  faults: FaultLog;
  /** Batches that the server had no room for: they come last, so that one large file does not hold up all. */
  deferred: Set<string>;
  /** Only when manifests are wanted. */
  manifests?: Manifests;
}

/** Reads what earlier processes left behind. The caller holds the lock of the folder. */
export async function createForwarder(service: Service<"forwarder">): Promise<Forwarder> {
  const { config, log, now } = service;
  const { sent, failed } = folders(config.dir);
  for (const folder of [sent, failed, dirname(config.report)]) await makeFolder(folder);
  return {
    service,
    intents: await Intents.load(config.dir),
    state: (await readForwarderState(config.dir)) ?? { version: 1, at: 0, ok: true, failed: {} },
    faults: createFaultLog(log, now),
    deferred: new Set(),
    ...(config.manifest && { manifests: await Manifests.load(config.dir) }),
  };
}

/** What one pass over the queue came to. */
export interface Cycle {
  sent: number;
  lines: number;
  /** Attempts that failed because of the file. */
  failures: number;
  /** Batches that are still waiting, in failed/ too. */
  left: number;
  /** What held up all of them. */
  fault?: TargetFault;
}

/** One pass: delivers everything that is sealed, over one connection. */
export async function forwardOnce(forwarder: Forwarder): Promise<Cycle> {
  const { config, signal, log, now } = forwarder.service;
  const started = now();
  const cycle: Cycle = { sent: 0, lines: 0, failures: 0, left: 0 };
  try {
    const { due, waiting, left } = await listQueue(forwarder);
    cycle.left = left;
    await forwarder.intents.keepOnly(waiting);
    if (due.length > 0 || (await forwarder.manifests?.due(config.dir, now()))?.length) {
      const target = await openTarget(config, signal);
      try {
        await deliverQueue(forwarder, target, due, cycle);
        if (!cycle.fault) await deliverManifests(forwarder, target);
      } finally {
        target.close();
      }
    }
  } catch (error) {
    cycle.fault = asFault(error, config);
  }
  cycle.left -= cycle.sent;
  if (!signal.aborted) await keepState(forwarder, cycle);
  if (cycle.sent + cycle.failures > 0) {
    const { sent, lines, failures, left } = cycle;
    log.info("cycle done", { sent, lines, failures, left, ms: now() - started });
  }
  return cycle;
}

/** Opens the configured target. Throws a TargetFault when it cannot be reached. */
export async function openTarget(config: Settings, signal: AbortSignal): Promise<Target> {
  if (config.target.startsWith("file:")) return openFileTarget(fileURLToPath(config.target));
  return openSftpTarget(config, signal);
}

/** An error as the fault that holds up all batches; one that is no fault of the world is thrown on. */
function asFault(error: unknown, config: Settings): TargetFault {
  if (error instanceof TargetFault) return error;
  if (error instanceof ConfigError) return new TargetFault("login", error.message); // a secret that went away
  if ((error as NodeJS.ErrnoException).code === undefined) throw error;
  return new TargetFault("local", `Cannot work in ${config.dir} or beside ${config.report}`, {
    cause: error,
  });
}

/** What is to be sent now, in order; the names of all that wait, and how many files they are. */
async function listQueue({ service, state, deferred }: Forwarder) {
  const { config, flags, now } = service;
  const all = folders(config.dir);
  const queue: (Item & { key: string })[] = [];
  const names = new Set<string>(); // of a name that is there twice, the one in failed/ has to wait
  const add = (folder: string, batches: string[]) => {
    let rank = 0;
    let last = "";
    for (const batch of batches) {
      const window = parseBatchName(batch)?.window ?? "";
      rank = window === last ? rank + 1 : 0;
      last = window;
      const info = lstatSync(join(folder, batch), { throwIfNoEntry: false });
      if (!info || names.has(batch)) continue; // moved away meanwhile
      names.add(batch);
      const key = `${deferred.has(batch) ? 1 : 0} ${window} ${String(rank).padStart(9, "0")} ${batch}`;
      queue.push({ batch, folder, bytes: info.size, key });
    }
  };
  for (const host of await listHosts(config.dir)) {
    add(all.host(host), await listBatches(all.host(host), "sealed"));
  }
  const failed = await listBatches(all.failed, "sealed");
  const waiting = new Set([...names, ...failed]);
  const left = names.size + failed.length;
  for (const batch of Object.keys(state.failed)) if (!waiting.has(batch)) delete state.failed[batch];
  const isDue = (batch: string) => flags.once || (state.failed[batch]?.nextAt ?? 0) <= now();
  add(all.failed, failed.filter(isDue));
  // Oldest window first; within a window one batch of each host, then the second of each.
  queue.sort((a, b) => (a.key < b.key ? -1 : 1));
  return { due: queue as Item[], waiting, left };
}

/** Delivers the items; what is refused is tried `retries` times and then put aside. */
async function deliverQueue(forwarder: Forwarder, target: Target, due: Item[], cycle: Cycle): Promise<void> {
  const { service, intents, manifests, deferred } = forwarder;
  const { config, signal, now } = service;
  if (due.length === 0) return;
  const context: RoundContext = {
    config,
    target,
    intents,
    reported: intents.size > 0 ? await findReported(config.report) : new Set(),
    now,
    signal,
    ...(manifests && { record: (sent: Ready[]) => manifests.record(sent, now()) }),
    onSent: (sent) => tellSent(forwarder, sent, cycle),
  };
  const { failed } = folders(config.dir);
  for (let attempt = 1, items = due; items.length > 0; attempt++) {
    const { refused, fault, noRoom } = await deliverRound(items, context);
    await intents.flush();
    for (const batch of noRoom) deferred.add(batch);
    if (signal.aborted) return;
    cycle.failures += refused.length;
    await tellFailures(forwarder, refused);
    const last = attempt >= config.retries;
    for (const one of refused) if (last || one.item.folder === failed) await putAside(forwarder, one);
    if (fault) throw fault;
    const again = new Set(last ? [] : refused.map(({ item }) => item.batch));
    items = items.filter(({ batch, folder }) => again.has(batch) && folder !== failed);
    if (items.length > 0) await wait(config.retryDelaySeconds * 1000, signal);
    if (signal.aborted) return;
  }
}

/** Puts the manifests of hours that are over and delivered; one that is refused is tried again next time. */
async function deliverManifests({ service, manifests, faults }: Forwarder, target: Target): Promise<void> {
  const { config, log, now, signal } = service;
  for (const hour of (await manifests?.due(config.dir, now())) ?? []) {
    if (signal.aborted) return;
    try {
      log.info("manifest delivered", { name: await manifests?.deliver(hour, target, now()) });
      faults.recovered("manifest", "manifests are taken again");
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      faults.failed("manifest", "manifest refused", { hour, error: errorMessage(error) });
    }
  }
}

/** Counts and tells a delivery. */
function tellSent({ service, state, deferred }: Forwarder, sent: Ready, cycle: Cycle): void {
  const { batch, lines, bytes, at } = sent;
  cycle.sent++;
  cycle.lines += lines;
  state.lastSentAt = service.now();
  delete state.failed[batch];
  deferred.delete(batch);
  service.log.info("batch delivered", { batch, lines, bytes, ms: service.now() - at });
}

/** One line in `.fail` and in the log per refused try. */
async function tellFailures({ service }: Forwarder, refused: Refused[]): Promise<void> {
  const { config, log, now } = service;
  const lines: ReportLine[] = [];
  for (const { item, error } of refused) {
    const { batch } = item;
    const count = await countLines(join(item.folder, batch)).catch(() => 0); // the reason says why
    lines.push({ at: now(), batch, lines: count, status: "Failed", reason: errorMessage(error) });
    log.warn("batch refused", { batch, error: errorMessage(error) });
  }
  await appendReport(failReportPath(config.report), lines);
}

/** Moves a batch to failed/, where it is tried again after a growing distance. */
async function putAside({ service, state }: Forwarder, { item, error }: Refused): Promise<void> {
  const { config, now, log } = service;
  const { failed } = folders(config.dir);
  const attempts = (state.failed[item.batch]?.attempts ?? 0) + 1;
  const distance = Math.min(MAX_DISTANCE_MS, config.intervalSeconds * 1000 * 2 ** Math.min(attempts - 1, 30));
  state.failed[item.batch] = { attempts, nextAt: now() + distance, reason: errorMessage(error) };
  if (item.folder === failed || (await exists(join(failed, item.batch)))) return; // there already
  await moveDurably(join(item.folder, item.batch), join(failed, item.batch));
  log.warn("batch moved to failed", { batch: item.batch });
}

/** Tells and keeps what has changed: a fault that began or ended, deliveries, files in failed/. */
async function keepState(
  { service, state, faults }: Forwarder,
  { fault, left, sent, failures }: Cycle,
): Promise<void> {
  const { config, now } = service;
  const changed =
    sent + failures > 0 || state.ok === Boolean(fault) || state.fault?.kind !== fault?.kind || state.at === 0;
  if (fault) {
    const text = errorMessage(fault);
    faults.failed(fault.kind, "delivery is held up", { kind: fault.kind, error: text, left });
    if (state.fault?.kind !== fault.kind) {
      const line: ReportLine = { at: now(), batch: "-", lines: 0, status: "Failed", reason: text };
      await appendReport(failReportPath(config.report), [line]).catch(() => {}); // the fault may be this disk's
    }
    const since = state.fault?.kind === fault.kind ? state.fault.since : now();
    state.fault = { kind: fault.kind, text, since };
  } else {
    for (const kind of FAULT_KINDS) faults.recovered(kind, "delivery goes on", { kind });
    delete state.fault;
  }
  state.ok = !fault;
  if (!changed) return;
  state.at = now();
  try {
    await writeDurably(forwarderStatePath(config.dir), JSON.stringify(state));
    faults.recovered("state", "state saved again");
  } catch (error) {
    faults.failed("state", "the state cannot be saved", { error: errorMessage(error) });
  }
}

/** `--status`: the queue by host, what failed and why, the last success and the rate. */
async function printStatus({ config, now }: Service<"forwarder">): Promise<number> {
  const all = folders(config.dir);
  const print = (text: string) => process.stdout.write(`${text}\n`);
  const state = await readForwarderState(config.dir);
  const rows: [string, string, string][] = [["host", "waiting", "oldest"]];
  for (const host of await listHosts(config.dir)) {
    const batches = await listBatches(all.host(host), "sealed");
    rows.push([host, String(batches.length), batches[0] ?? "-"]);
  }
  const width = Math.max(...rows.map(([host]) => host.length));
  for (const [host, waiting, oldest] of rows)
    print(`${host.padEnd(width)}  ${waiting.padStart(7)}  ${oldest}`);
  for (const batch of await listBatches(all.failed, "sealed")) {
    const failure = state?.failed[batch];
    const again = failure ? `, next try in ${formatDuration(Math.max(0, failure.nextAt - now()))}` : "";
    print(`failed: ${batch}: ${failure?.reason ?? "moved there by hand"}${again}`);
  }
  const sent = (await readReportTail(config.report)).filter(({ status }) => status === "Sent");
  const last = sent.at(-1);
  const lastHour = sent.filter(({ at }) => at > now() - 3_600_000);
  const lines = lastHour.reduce((sum, one) => sum + one.lines, 0);
  print(last ? `last success: ${last.batch}, ${formatDuration(now() - last.at)} ago` : "last success: never");
  print(`last hour: ${lastHour.length} batches, ${lines} lines`);
  if (state?.fault) {
    const { kind, text, since } = state.fault;
    print(`held up for ${formatDuration(now() - since)} (${kind}): ${text}`);
  }
  return EXIT.done;
}

/** One fault for each secret that is not there. */
function checkSecrets({ password, privateKey, passphrase }: Settings): string[] {
  return secretFaults("forwarder", { password, privateKey, passphrase });
}

/** `--check`: folders that can be written, secrets that can be read; with `--connect` also a login. */
async function checkHost({ config, signal }: Service<"forwarder">, connect: boolean): Promise<string[]> {
  const faults: string[] = [];
  const attempt = async (key: string, work: () => unknown) => {
    try {
      await work();
    } catch (error) {
      faults.push(`forwarder.${key}: ${errorMessage(error)}`);
    }
  };
  await attempt("dir", () => access(config.dir, constants.R_OK | constants.W_OK | constants.X_OK));
  await attempt("report", () => access(dirname(config.report), constants.W_OK | constants.X_OK));
  faults.push(...checkSecrets(config));
  if (config.knownHosts) await attempt("knownHosts", () => access(config.knownHosts ?? "", constants.R_OK));
  if (connect && faults.length === 0) {
    await attempt("target", async () => {
      const target = await openTarget(config, signal);
      try {
        await createProbe(target)();
      } finally {
        target.close();
      }
    });
  }
  return faults;
}

if (import.meta.main) {
  await runScript(
    {
      name: "forwarder",
      about: "Delivers sealed batches to an SFTP server or a folder, each exactly once.",
      flags: { once: "one pass over the queue, then exit", status: "show the queue and the last deliveries" },
      check: checkHost,
    },
    main,
  );
}
