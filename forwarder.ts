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
 * takes others goes to failed/ after `retries` tries and is tried from there, ever less often.
 */
import { constants } from "node:fs";
import { access, lstat } from "node:fs/promises";
import { dirname, join } from "node:path";
import { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import { folders, listBatches, listHosts, parseBatchName, withState } from "./lib/batch.ts";
import { type Config, readSecret } from "./lib/config.ts";
import { openContent, Unreadable } from "./lib/content.ts";
import {
  type Committed,
  commitGroup,
  findReported,
  Intents,
  type Ready,
  settleRename,
} from "./lib/delivery.ts";
import { exists, makeFolder, moveDurably, reached, writeDurably } from "./lib/durable.ts";
import { holdLock } from "./lib/lock.ts";
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
import {
  backoff,
  createFaultLog,
  createProgress,
  describe,
  EXIT,
  type FaultLog,
  formatDuration,
  pause,
  runScript,
  type Service,
} from "./lib/service.ts";
import { openSftpTarget } from "./lib/sftp.ts";
import { openFileTarget, Refusal, type Target, TargetFault, tempName } from "./lib/target.ts";

type Settings = Config["forwarder"];

/** Batches that are committed together at most. */
const GROUP = 64;
/** A file in failed/ is tried again after one interval, then two, four, …, at most so many ms. */
const MAX_DISTANCE_MS = 3_600_000;

async function main(service: Service<"forwarder">): Promise<number> {
  const { config, flags, signal } = service;
  if (flags.status) return printStatus(service);
  checkSecrets(config);
  await makeFolder(config.dir);
  await holdLock(join(config.dir, ".forwarder.lock"), `The folder ${config.dir}`);
  const forwarder = await createForwarder(service);
  if (flags.once) return (await forwardOnce(forwarder)).left > 0 ? EXIT.failed : EXIT.done;

  service.log.info("forwarder started", { dir: config.dir, target: config.target });
  for (let faulty = 0; !signal.aborted; ) {
    const { fault, sent } = await forwardOnce(forwarder);
    faulty = fault ? (sent > 0 ? 1 : faulty + 1) : 0;
    const ms = faulty > 0 ? backoff(faulty, { min: 1000, max: 180_000 }) : config.intervalSeconds * 1000;
    await pause(ms, signal);
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

/** A batch in the queue. */
interface Item {
  batch: string;
  folder: string;
  bytes: number;
}

/** One pass: delivers everything that is sealed, over one connection. */
export async function forwardOnce(forwarder: Forwarder): Promise<Cycle> {
  const { config, signal, log, now } = forwarder.service;
  const started = now();
  const { due, waiting } = await listQueue(forwarder);
  const cycle: Cycle = { sent: 0, lines: 0, failures: 0, left: waiting };
  if (due.length > 0) {
    try {
      const target = await openTarget(config, signal);
      try {
        await deliverQueue(forwarder, target, due, cycle);
      } finally {
        target.close();
      }
    } catch (error) {
      if (!(error instanceof TargetFault)) throw error;
      cycle.fault = error;
    }
  }
  cycle.left = waiting - cycle.sent;
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

/** What is to be sent now, in order, and the number of all that wait. */
async function listQueue({ service, state, deferred }: Forwarder): Promise<{ due: Item[]; waiting: number }> {
  const { config, now } = service;
  const all = folders(config.dir);
  const queue: (Item & { key: string })[] = [];
  const add = async (folder: string, batches: string[]) => {
    let rank = 0;
    let last = "";
    for (const batch of batches) {
      const window = parseBatchName(batch)?.window ?? "";
      rank = window === last ? rank + 1 : 0;
      last = window;
      const { size } = await lstat(join(folder, batch));
      const key = `${deferred.has(batch) ? 1 : 0} ${window} ${String(rank).padStart(9, "0")} ${batch}`;
      queue.push({ batch, folder, bytes: size, key });
    }
  };
  for (const host of await listHosts(config.dir))
    await add(all.host(host), await listBatches(all.host(host), "sealed"));
  const failed = await listBatches(all.failed, "sealed");
  for (const name of Object.keys(state.failed)) if (!failed.includes(name)) delete state.failed[name];
  const again = failed.filter((name) => (state.failed[name]?.nextAt ?? 0) <= now());
  const waiting = queue.length + failed.length;
  await add(all.failed, again);
  // Oldest window first; within a window one batch of each host, then the second of each.
  queue.sort((a, b) => (a.key < b.key ? -1 : 1));
  return { due: queue, waiting };
}

/** A batch that was refused, by the target or by the local disk, while others go through. */
interface Refused {
  item: Item;
  error: unknown;
}

/** Delivers the items; what is refused is tried `retries` times and then put aside. */
async function deliverQueue(forwarder: Forwarder, target: Target, due: Item[], cycle: Cycle): Promise<void> {
  const { service, intents } = forwarder;
  const { config, signal } = service;
  const failedFolder = folders(config.dir).failed;
  let reported = new Set<string>();
  if (intents.size > 0) {
    await intents.keepOnly(new Set(due.map(({ batch }) => batch)));
    reported = await findReported(config.report);
  }
  let items = due;
  for (let attempt = 1; items.length > 0 && !cycle.fault && !signal.aborted; attempt++) {
    if (attempt > 1) await pause(config.retryDelaySeconds * 1000, signal);
    const refused = await deliverRound(forwarder, target, items, reported, cycle);
    if (signal.aborted) return;
    cycle.failures += refused.length;
    await tellFailures(forwarder, refused);
    for (const one of refused) {
      if (one.item.folder === failedFolder || attempt >= config.retries) await putAside(forwarder, one);
    }
    items =
      attempt >= config.retries
        ? []
        : refused.map(({ item }) => item).filter(({ folder }) => folder !== failedFolder);
  }
}

/** One try of each item, `parallel` at a time; whatever is uploaded meanwhile is committed as a group. */
async function deliverRound(
  forwarder: Forwarder,
  target: Target,
  items: Item[],
  reported: Set<string>,
  cycle: Cycle,
): Promise<Refused[]> {
  const { config, signal } = forwarder.service;
  const refused: Refused[] = [];
  const ready: Ready[] = [];
  const queue = items.values();
  const progress = createProgress(
    "forwarder",
    items.reduce((sum, { bytes }) => sum + bytes, 0),
  );
  const probe = createProbe(target);
  let read = 0;
  let committing: Promise<void> | undefined;
  let bug: unknown;

  const failed = async (item: Item, error: unknown) => {
    const own = await isOwnFault(error, item, probe).catch((fault) => {
      if (!(fault instanceof TargetFault)) throw fault;
      cycle.fault ??= fault;
      if (fault.kind === "server") forwarder.deferred.add(item.batch);
      return false;
    });
    if (own) refused.push({ item, error });
  };
  const commitReady = async () => {
    while (ready.length > 0) {
      const group = ready.splice(0, GROUP);
      const outcome = await commit(forwarder, target, group, cycle);
      for (const { ready: one, error } of outcome.refused) await failed(one, error);
      if (outcome.fault) cycle.fault ??= outcome.fault;
    }
  };
  const commitMore = () => {
    committing ??= commitReady()
      .catch((error) => {
        bug ??= error;
      })
      .finally(() => {
        committing = undefined;
      });
    return committing;
  };
  const work = async () => {
    for (const item of queue) {
      if (cycle.fault || bug || signal.aborted) return;
      try {
        const onBytes = (bytes: number) => {
          read += bytes;
          progress.show(read);
        };
        ready.push(await upload(forwarder, target, item, reported, onBytes));
      } catch (error) {
        await failed(item, error);
        continue;
      }
      const done = commitMore();
      if (ready.length >= GROUP) await done;
    }
  };
  try {
    await Promise.all(Array.from({ length: config.parallel }, work));
    await committing;
    await commitMore();
  } finally {
    progress.end();
  }
  if (bug) throw bug;
  return refused;
}

/** Brings a batch so far that its temp file is complete on the target, or finds that it is there already. */
async function upload(
  { service, intents }: Forwarder,
  target: Target,
  item: Item,
  reported: Set<string>,
  onBytes: (bytes: number) => void,
): Promise<Ready> {
  const { config, now } = service;
  const { batch, folder } = item;
  const gzip = config.compress === "gzip";
  const open = () => openContent(join(folder, batch), { gzip, hash: config.manifest, onBytes });
  const content = () => openContent(join(folder, batch), { gzip }).chunks;
  const intent = intents.get(batch);
  if (intent) {
    const found = await settleRename(target, intent);
    const renamed = found === "renamed";
    if (found !== "unfit")
      return { ...intent, batch, folder, content, renamed, reported: reported.has(batch), at: now() };
    await intents.cancel(batch);
  }
  await checkFree(config.dir, batch);
  const remote = gzip ? `${batch}.gz` : batch;
  const { chunks, measured } = open();
  const at = now();
  await target.upload(remote, chunks);
  reached("forward:uploaded");
  return { ...measured, remote, batch, folder, content, at };
}

/** A name can be delivered once: sent/ must not hold it, also not compressed. */
async function checkFree(dir: string, batch: string): Promise<void> {
  for (const name of [batch, withState(batch, "compressed")]) {
    const path = join(folders(dir).sent, name);
    if (await exists(path))
      throw new Refusal(`"${path}" says that it was delivered already; remove one of the two`);
  }
}

/** Commits a group and tells of it. A fault of the local disk is a fault that holds up all. */
async function commit(
  forwarder: Forwarder,
  target: Target,
  group: Ready[],
  cycle: Cycle,
): Promise<Committed> {
  const { service, intents, state } = forwarder;
  const { config, log, now } = service;
  try {
    const outcome = await commitGroup(group, {
      target,
      intents,
      dir: config.dir,
      report: config.report,
      now,
    });
    for (const { batch, lines, bytes, at } of outcome.sent) {
      cycle.sent++;
      cycle.lines += lines;
      state.lastSentAt = now();
      delete state.failed[batch];
      forwarder.deferred.delete(batch);
      log.info("batch delivered", { batch, lines, bytes, ms: now() - at });
    }
    return outcome;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    const fault = new TargetFault("local", `Cannot record deliveries in ${config.dir} or ${config.report}`, {
      cause: error,
    });
    return { sent: [], refused: [], fault };
  }
}

/**
 * Whether an error is the file's own. Throws the TargetFault when the target is at fault; after a refusal that
 * is found out by trying a small file of another name.
 */
async function isOwnFault(error: unknown, item: Item, probe: () => Promise<void>): Promise<boolean> {
  if (error instanceof Unreadable) return exists(join(item.folder, item.batch)); // gone: someone moved it away
  if (!(error instanceof Refusal)) throw error;
  await probe().catch((cause) => {
    if (cause instanceof TargetFault) throw cause;
    throw new TargetFault("server", describe(error), { cause });
  });
  return true;
}

/** Asks whether the target takes files at all; callers at the same time share one question. */
function createProbe(target: Target): () => Promise<void> {
  const name = ".log-rt-sync-probe";
  let asking: Promise<void> | undefined;
  const ask = async () => {
    await target.upload(name, Readable.from([Buffer.from("log-rt-sync\n")]));
    await target.remove(tempName(name));
  };
  return () => {
    asking ??= ask().finally(() => {
      asking = undefined;
    });
    return asking;
  };
}

/** One line in `.fail` and in the log per refused try. */
async function tellFailures({ service }: Forwarder, refused: Refused[]): Promise<void> {
  const { config, log, now } = service;
  const lines: ReportLine[] = [];
  for (const { item, error } of refused) {
    const { batch } = item;
    const content = openContent(join(item.folder, batch));
    const count = await drain(content.chunks).then(
      () => content.measured.lines,
      () => 0, // the reason says that it cannot be read
    );
    lines.push({ at: now(), batch, lines: count, status: "Failed", reason: describe(error) });
    log.warn("batch refused", { batch, error: describe(error) });
  }
  await appendReport(failReportPath(config.report), lines);
}

async function drain(chunks: AsyncIterable<Uint8Array>): Promise<void> {
  for await (const _ of chunks);
}

/** Moves a batch to failed/, where it is tried again after a growing distance. */
async function putAside({ service, state }: Forwarder, { item, error }: Refused): Promise<void> {
  const { config, now, log } = service;
  const { failed } = folders(config.dir);
  const attempts = (state.failed[item.batch]?.attempts ?? 0) + 1;
  const distance = Math.min(MAX_DISTANCE_MS, config.intervalSeconds * 1000 * 2 ** Math.min(attempts - 1, 30));
  state.failed[item.batch] = { attempts, nextAt: now() + distance, reason: describe(error) };
  if (item.folder === failed) return;
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
    const text = describe(fault);
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
    faults.failed("state", "the state cannot be saved", { error: describe(error) });
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

/** Throws a ConfigError when a secret is not there: better at the start than at night. */
function checkSecrets({ password, privateKey, passphrase }: Settings): void {
  for (const secret of [password, privateKey, passphrase]) if (secret) readSecret(secret);
}

/** `--check`: folders that can be written, secrets that can be read; with `--connect` also a login. */
async function checkHost({ config, signal }: Service<"forwarder">, connect: boolean): Promise<string[]> {
  const faults: string[] = [];
  const attempt = async (key: string, work: () => unknown) => {
    try {
      await work();
    } catch (error) {
      faults.push(`forwarder.${key}: ${describe(error)}`);
    }
  };
  await attempt("dir", () => access(config.dir, constants.R_OK | constants.W_OK | constants.X_OK));
  await attempt("report", () => access(dirname(config.report), constants.W_OK | constants.X_OK));
  await attempt("password", () => checkSecrets(config));
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
