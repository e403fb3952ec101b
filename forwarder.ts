/**
 * Forwarder: every sealed batch becomes exactly one complete file on the client's SFTP server, or in a folder.
 *
 * For each batch, oldest window first: upload to `<name>.tmp`, compare the size, put the intention to rename on disk,
 * rename onto `<name>`, write the report line, note it for the digest, move the batch to sent/. A crash or a cut
 * anywhere repeats steps that then change nothing: the final name with the batch's content is a delivery; under
 * neither name, or only a temp file of an earlier connection, proves nothing, and the batch is uploaded anew. So
 * `Sent` is written only behind a rename that was answered, or a file that was seen.
 *
 * A server that is down, refuses the login or has no room is not the fault of a file: the cycle ends, the queue stays
 * as it is, the next try comes after a growing pause. A file that the server refuses while it takes others goes to
 * failed/ after `retries` tries and is tried from there, ever less often; by `--once` each time.
 */
import { lstatSync, utimesSync } from "node:fs";
import { dirname, join } from "node:path";
import { Readable } from "node:stream";
import { fileURLToPath } from "node:url";
import { createGunzip } from "node:zlib";
import { dashedHost, folders, listBatches, listHosts, parseBatchName, withState } from "./lib/batch.ts";
import { whatIsMissing } from "./lib/check.ts";
import { type Config, ConfigError, readSecret, secretFaults } from "./lib/config.ts";
import { Digests, formatVerified, verifyFolder } from "./lib/digest.ts";
import {
  exists,
  failpoint,
  holdLock,
  makeFolder,
  moveAllDurably,
  moveDurably,
  removeDurably,
  setTime,
  TEMP_SUFFIX,
  writeStream,
} from "./lib/durable.ts";
import { type Metric, type Sample, writeMetrics } from "./lib/metrics.ts";
import { appendReport, failReportPath, type ReportLine } from "./lib/report.ts";
import {
  commandOf,
  createFaultLog,
  createProgress,
  EXIT,
  errorMessage,
  HOUR,
  OperatorError,
  retryDelay,
  runScript,
  type Service,
  wait,
} from "./lib/service.ts";
import { FAULT_KINDS, type ForwarderState, forwarderStatePath, readForwarderState } from "./lib/signs.ts";
import { writeState } from "./lib/state.ts";
import { formatHours, parseHours, readHours } from "./lib/target/hours.ts";
import { Intents } from "./lib/target/intents.ts";
import { explainKey } from "./lib/target/login.ts";
import { openSftpTarget } from "./lib/target/sftp.ts";
import { formatStatus, readStatus } from "./lib/target/status.ts";
import {
  measure,
  openContent,
  openFileTarget,
  Refusal,
  type RemoteFile,
  readChunks,
  type Target,
  TargetFault,
  tempName,
  Unreadable,
} from "./lib/target/target.ts";

type Settings = Config["forwarder"];

/** A line that breaks again and again, but lets batches through, is worth a prompt return. */
const AFTER_PROGRESS_MS = 200;
const SIGN_OF_LIFE_MS = 30_000;
/** A file in failed/ is tried again after one interval, then two, four, …, at most so many ms. */
const MAX_RETRY_MS = HOUR;
/** What a running forwarder was started with; all else is taken up by SIGHUP. */
const KEPT = ["dir", "report", "digest"] as const;
/** Batches that are committed together at most. */
const GROUP = 64;

async function main(service: Service<"forwarder">): Promise<number> {
  const { config, configFile, flags, signal } = service;
  if (flags.status) return printStatus(service);
  if (flags.hour) return printHours(service, String(flags.hour));
  if (flags.resend) return resend(service, String(flags.resend));
  if (flags["test-file"]) return putTestFile(service);
  const faults = checkSecrets(config); // better at the start than at night
  if (faults.length > 0)
    throw new ConfigError(
      faults.map((fault) => `${configFile}: ${fault}`),
      EXIT.failed,
    );
  await makeFolder(config.dir);
  await holdLock(join(config.dir, ".forwarder.lock"), `The folder ${config.dir}`);
  const forwarder = await createForwarder(service);
  if (flags.once) {
    const { left } = await forwardOnce(forwarder);
    return left > 0 && !signal.aborted ? EXIT.failed : EXIT.done;
  }

  showLife(config.dir);
  const signOfLife = setInterval(() => showLife(config.dir), SIGN_OF_LIFE_MS);
  service.log.info("forwarder started", { dir: config.dir, target: config.target });
  const reloads = followConfig(service);
  for (let faulty = 0; !signal.aborted; ) {
    reloads.takeUp();
    const { fault, sent } = await forwardOnce(forwarder);
    faulty = fault && sent === 0 ? faulty + 1 : 0;
    if (faulty > 0) await reloads.wait(retryDelay(faulty, { min: 1000, max: 180_000 }));
    else await reloads.wait(fault ? AFTER_PROGRESS_MS : service.config.intervalSeconds * 1000);
  }
  clearInterval(signOfLife);
  return EXIT.done;
}

/**
 * The config of SIGHUP, taken up between two passes: a batch keeps the target and the name that it began with. It ends
 * a pause, for it may be what mends a fault.
 */
function followConfig(service: Service<"forwarder">) {
  let next: Settings | undefined;
  let arrival = new AbortController();
  service.onReload((read) => {
    const faults = checkSecrets(read);
    if (faults.length > 0) throw new ConfigError(faults, EXIT.failed);
    next = read;
    arrival.abort();
    return KEPT.filter((key) => read[key] !== service.config[key]);
  });
  return {
    takeUp(): void {
      if (!next) return;
      const { dir, report, digest } = service.config;
      service.config = { ...next, dir, report, digest };
      next = undefined;
      arrival = new AbortController();
    },
    wait: (ms: number) => wait(ms, AbortSignal.any([service.signal, arrival.signal])),
  };
}

/** The time of the state file tells that a forwarder runs, also within a long cycle. */
function showLife(dir: string): void {
  const now = new Date();
  try {
    utimesSync(forwarderStatePath(dir), now, now);
  } catch {
    // there is none yet: the first cycle writes it
  }
}

/** What lasts from one cycle to the next. */
export type Forwarder = Awaited<ReturnType<typeof createForwarder>>;

/** Reads what earlier processes left behind. The caller holds the lock of the folder. */
export async function createForwarder(service: Service<"forwarder">) {
  const { config, log, now } = service;
  const { sent, failed } = folders(config.dir);
  for (const folder of [sent, failed, dirname(config.report)]) await makeFolder(folder);
  const forgotten = (path: string, reason: string) =>
    log.warn("a damaged file is begun anew", { path, reason });
  const state: ForwarderState | undefined = await readForwarderState(config.dir).catch((error) => {
    forgotten(forwarderStatePath(config.dir), errorMessage(error));
    return undefined;
  });
  return {
    service,
    intents: await Intents.load(config.dir, forgotten),
    state: state ?? { version: 1, at: 0, ok: true, failed: {}, later: {} },
    faults: createFaultLog(log, now),
    /** Since the start, for the metrics. */
    totals: { batches: 0, lines: 0, refusals: 0, writtenAt: 0 },
    digests: config.digest ? await Digests.open(config.dir, forgotten) : undefined,
  };
}

/** One batch on its way from the queue to sent/: every step takes it and changes it. */
export interface Delivery {
  batch: string;
  folder: string;
  remote: string;
  /** Of the local file until it is uploaded, then what the target has. */
  bytes: number;
  lines: number;
  sha256: string;
  /** `gone`: the operator took it away meanwhile. */
  step: "queued" | "uploaded" | "renamed" | "sent" | "refused" | "gone";
  /** When the upload began, milliseconds since the epoch. */
  at: number;
  reported: boolean;
  error?: unknown;
}

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
    let target: Target | undefined;
    try {
      if (due.length > 0) {
        target = await openTarget(config, signal);
        await deliverQueue(forwarder, target, due, cycle);
      }
      await forwarder.digests?.write(now());
      if (forwarder.digests?.pending.length && !signal.aborted) {
        target ??= await openTarget(config, signal);
        await deliverDigests(forwarder, forwarder.digests, target);
        cycle.left += forwarder.digests.pending.length;
      }
    } finally {
      target?.close();
    }
  } catch (error) {
    cycle.fault = asFault(error, config);
  }
  cycle.left -= cycle.sent;
  if (!signal.aborted) await saveState(forwarder, cycle);
  if (!signal.aborted) await leaveMetrics(forwarder, cycle, started);
  if (cycle.sent + cycle.failures > 0) {
    const { sent, lines, failures, left } = cycle;
    log.info("cycle done", { sent, lines, failures, left, ms: now() - started });
  }
  return cycle;
}

/** Opens the configured target. Throws a TargetFault when it cannot be reached. */
export async function openTarget(config: Settings, signal: AbortSignal): Promise<Target> {
  if (!config.target.startsWith("file:")) return openSftpTarget(config, signal);
  return openFileTarget(fileURLToPath(config.target), { direct: config.upload === "direct" });
}

/** An error as the fault that holds up all batches, as one of the local disk does; what is no fault is thrown on. */
function asFault(error: unknown, { dir, report }: Settings): TargetFault {
  if (error instanceof TargetFault) return error;
  if (error instanceof ConfigError) return new TargetFault("login", error.message); // a secret that went away
  if ((error as NodeJS.ErrnoException).code === undefined) throw error;
  return new TargetFault("local", `Cannot work in ${dir} or beside ${report}`, { cause: error });
}

// ---- the queue

/** What is to be sent now, in order; the names of all that wait, and how many files they are. */
async function listQueue(forwarder: Forwarder) {
  const { service, state, intents } = forwarder;
  const { config, flags, now } = service;
  const all = folders(config.dir);
  const queue: (Delivery & { key: string })[] = [];
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
      const padded = (n: number) => String(n).padStart(9, "0");
      const intent = intents.get(batch); // it keeps the name that it began with, whatever the config says by now
      const key = `${padded(state.later[batch] ?? 0)} ${intent ? 0 : 1} ${window} ${padded(rank)} ${batch}`;
      const remote = intent?.remote ?? withState(batch, config.compress === "gzip" ? "compressed" : "sealed");
      const file = { batch, folder, remote, bytes: info.size, lines: 0, sha256: "" };
      queue.push({ ...file, step: "queued", at: 0, reported: false, key });
    }
  };
  let stuck = 0;
  for (const host of await listHosts(config.dir)) {
    const found = await listSealed(forwarder, all.host(host), host);
    add(all.host(host), found.sealed);
    stuck += found.stuck;
  }
  const { sealed: failed, ...more } = await listSealed(forwarder, all.failed);
  const waiting = new Set([...names, ...failed]);
  const left = names.size + failed.length + stuck + more.stuck;
  for (const record of [state.failed, state.later]) {
    for (const batch of Object.keys(record)) if (!waiting.has(batch)) delete record[batch];
  }
  const isDue = (batch: string) => {
    const wait = (state.failed[batch]?.nextAt ?? 0) - now();
    return flags.once || wait <= 0 || wait > MAX_RETRY_MS; // further away: by a clock that was wrong
  };
  add(all.failed, failed.filter(isDue));
  // Last what held up others, first what may be at the client already; by window, and within it a batch of each host in turn.
  queue.sort((a, b) => (a.key < b.key ? -1 : 1));
  return { due: queue as Delivery[], waiting, left };
}

/** The sealed batches of a folder; `host`: its folder, in which what carries another name is not ours. */
async function listSealed({ faults }: Forwarder, folder: string, host?: string) {
  const sealed = new Set<string>();
  /** Moved back from sent/ after they were compressed, and damaged. */
  let stuck = 0;
  for (const name of await listBatches(folder, "sealed", "compressed")) {
    const batch = parseBatchName(name);
    if (host !== undefined && batch?.host !== dashedHost(host)) continue;
    const plain = withState(name, "sealed");
    try {
      if (name !== plain) await unpack(join(folder, name), join(folder, plain));
      sealed.add(plain);
      faults.recovered(name, "unpacked after all", { batch: name });
    } catch (error) {
      stuck++;
      const reason = errorMessage(error);
      faults.failed(name, "a batch that was moved back cannot be unpacked", { batch: name, error: reason });
    }
  }
  return { sealed: [...sealed], stuck };
}

/** A batch that was moved back from sent/ after it was compressed. Removed only when the unpacked one is on disk. */
async function unpack(from: string, to: string): Promise<void> {
  if (!(await exists(to))) {
    const source = Readable.from(readChunks(from), { objectMode: false });
    const gunzip = createGunzip();
    source.on("error", (error) => gunzip.destroy(error));
    await writeStream(to + TEMP_SUFFIX, source.pipe(gunzip));
    await moveDurably(to + TEMP_SUFFIX, to);
  }
  await removeDurably(from);
}

/** Delivers the queue; what is refused is tried `retries` times and then put aside. */
async function deliverQueue(
  forwarder: Forwarder,
  target: Target,
  due: Delivery[],
  cycle: Cycle,
): Promise<void> {
  const { service, intents } = forwarder;
  const { config, signal } = service;
  const { failed } = folders(config.dir);
  await intents.matchReport(config.report);
  for (let attempt = 1, deliveries = due; deliveries.length > 0; attempt++) {
    const pass = new DeliveryPass(forwarder, target, cycle);
    await pass.run(deliveries);
    await intents.flush();
    if (signal.aborted) return;
    const refused = deliveries.filter(({ step }) => step === "refused");
    cycle.failures += refused.length;
    await reportFailures(forwarder, refused);
    const isLast = (one: Delivery) =>
      attempt >= config.retries || one.folder === failed || one.error instanceof NameTaken;
    for (const one of refused) if (isLast(one)) await putAside(forwarder, one);
    if (pass.error) throw pass.error;
    deliveries = refused.filter((one) => !isLast(one));
    for (const one of deliveries) one.step = "queued";
    if (deliveries.length > 0) await wait(config.retryDelaySeconds * 1000, signal);
    if (signal.aborted) return;
  }
}

// ---- one try of each batch

/** The name is taken at the target by something else: no try will change that. */
class NameTaken extends Refusal {
  override name = "NameTaken";
}

/**
 * `parallel` uploads at a time over one connection, while what is uploaded is committed in groups. Here it is decided
 * whose fault a failure is: a file's own, or the target's, which ends the pass.
 */
class DeliveryPass {
  /** What ended the pass early: a fault of the target, of this disk, or a bug. */
  error: unknown;
  readonly #forwarder: Forwarder;
  readonly #target: Target;
  readonly #cycle: Cycle;
  readonly #probe: () => Promise<string>;
  /** Uploaded, and waiting to be committed. */
  readonly #ready: Delivery[] = [];
  #committing: Promise<void> | undefined;
  #onBytes = (_: number) => {};

  constructor(forwarder: Forwarder, target: Target, cycle: Cycle) {
    this.#forwarder = forwarder;
    this.#target = target;
    this.#cycle = cycle;
    this.#probe = createProbe(target);
  }

  /** Tries each once, in order; those that held up others before come behind all others, each alone. */
  async run(deliveries: Delivery[]): Promise<void> {
    const { config } = this.#forwarder.service;
    const { later } = this.#forwarder.state;
    const progress = createProgress(
      "forwarder",
      deliveries.reduce((sum, { bytes }) => sum + bytes, 0),
    );
    let read = 0;
    this.#onBytes = (bytes) => {
      read += bytes;
      progress.show(read);
    };
    const alone = deliveries.filter(({ batch }) => later[batch]);
    const others = deliveries.filter(({ batch }) => !later[batch]).values(); // one queue for all workers
    try {
      await this.#settle(Array.from({ length: config.parallel }, () => this.#work(others)));
      for (const one of alone) await this.#settle([this.#work([one].values())]);
    } finally {
      progress.end();
    }
  }

  async #settle(work: Promise<void>[]): Promise<void> {
    await Promise.all(work);
    while (this.#committing) await this.#committing;
  }

  /** While the target puts one file on stable storage, the next one is written. */
  async #work(queue: Iterable<Delivery>): Promise<void> {
    let last: Promise<void> | undefined;
    for (const one of queue) {
      if (this.error || this.#forwarder.service.signal.aborted) break;
      const written = Promise.withResolvers<void>();
      const delivered = this.#deliver(one, written.resolve).finally(written.resolve);
      await written.promise;
      await last;
      last = delivered;
    }
    await last;
  }

  /** Never throws: what went wrong is in `one`, or ends the pass. */
  async #deliver(one: Delivery, onWritten: () => void): Promise<void> {
    try {
      await this.#upload(one, onWritten);
      this.#ready.push(one);
      const committed = this.#commitReady();
      if (this.#ready.length >= GROUP) await committed;
    } catch (error) {
      await this.#fail(one, error);
    }
  }

  /** Hands over what is ready in groups, one group at a time: the more is ready meanwhile, the larger. */
  #commitReady(): Promise<void> {
    const run = async () => {
      while (this.#ready.length > 0) await this.#commit(this.#ready.splice(0, GROUP));
      this.#committing = undefined; // in the same moment: what is ready from now on begins anew
    };
    this.#committing ??= run();
    return this.#committing;
  }

  /** Brings a batch so far that its temp file is complete on the target, or finds that it was delivered before. */
  async #upload(one: Delivery, onWritten: () => void): Promise<void> {
    const { service, intents } = this.#forwarder;
    const { config, log, now } = service;
    one.at = now();
    await checkUnsent(config.dir, one.batch);
    const intent = intents.get(one.batch);
    const raw = () => readChunks(join(one.folder, one.batch));
    const options = { gzip: one.remote !== one.batch, onBytes: this.#onBytes };
    if (intent?.reported) {
      const { bytes, lines, sha256 } = intent; // its rename was answered: the line stands behind it
      Object.assign(one, { bytes, lines, sha256, step: "renamed", reported: true });
      if (sha256 === "") Object.assign(one, await measure(raw(), options)); // by an older version
      return;
    }
    if (intent || this.#target.direct) {
      const found = await this.#target.stat(one.remote);
      if (found && !(this.#target.direct && intent)) {
        Object.assign(one, await measure(raw(), options));
        await checkSame(this.#target, one, found).catch((error) => {
          // an account that may not read: our intention and the size are the best proof there is
          const isBlind = error instanceof Refusal && !(error instanceof NameTaken);
          if (!isBlind || !intent || found.bytes !== one.bytes) throw error;
        });
        one.step = "renamed";
        return;
      }
      if (!found && intent)
        log.warn("the target has the batch under neither name: it is uploaded again", { batch: one.batch });
    }
    if (this.#target.direct) await intents.add([one], now()); // what is under the name from now on may be half of it
    const { chunks, measured } = openContent(raw(), options);
    await this.#target.upload(one.remote, chunks, onWritten);
    Object.assign(one, measured, { step: "uploaded" });
    failpoint("forward:uploaded");
  }

  /** From "the temp file is complete on the target" to "the batch is in sent/", with the syncs shared by the group. */
  async #commit(group: Delivery[]): Promise<void> {
    const { service, intents } = this.#forwarder;
    const { config, now } = service;
    const each = (list: Delivery[], work: (one: Delivery) => Promise<void>) =>
      Promise.all(list.map((one) => work(one).catch((error) => this.#fail(one, error))));
    const fresh = () => group.filter(({ step }) => step === "uploaded");
    try {
      if (!this.#target.direct) await each(fresh(), (one) => this.#meetExisting(one));
      // one whose line is written keeps its intention: by the time in it the line is known again
      await intents.add(
        group.filter(({ step, reported }) => (step === "uploaded" || step === "renamed") && !reported),
        now(),
      );
      failpoint("forward:intent");
      await each(fresh(), async (one) => {
        await this.#target.publish(one.remote, one.bytes);
        one.step = "renamed";
      });
      // The server says no, to whichever name: not renamed. Of a rename without an answer the intention stays.
      const denied = group.filter(({ step, error }) => step !== "renamed" && error instanceof Refusal);
      intents.forget(denied.map(({ batch }) => batch));
      if (denied.length > 0) await intents.flush();
      failpoint("forward:renamed");

      const renamed = group.filter(({ step }) => step === "renamed");
      const at = now();
      const lines = renamed.filter(({ reported }) => !reported);
      await appendReport(
        config.report,
        lines.map(({ batch, lines }) => ({ at, batch, lines, status: "Sent" })),
      );
      failpoint("forward:reported");
      const noted = renamed.map(({ remote, sha256, lines }) => ({ name: remote, sha256, lines }));
      await this.#forwarder.digests?.note(noted, at);
      failpoint("forward:listed");
      await this.#moveToSent(renamed, at);
    } catch (error) {
      this.error ??= error;
    }
  }

  /** A batch that the operator took away or put into sent/ himself meanwhile is told, and is nobody's fault. */
  async #moveToSent(renamed: Delivery[], at: number): Promise<void> {
    const { service, intents } = this.#forwarder;
    const { sent } = folders(service.config.dir);
    const moves: { from: string; to: string }[] = [];
    for (const one of renamed) {
      const [from, to] = [join(one.folder, one.batch), join(sent, one.batch)];
      const reason = !(await exists(from))
        ? "it is not in the queue any more"
        : (await exists(to)) && "sent/ has it";
      if (reason) {
        service.log.warn("batch delivered, but not moved to sent", { batch: one.batch, reason });
        one.step = "gone";
        continue;
      }
      setTime(from, at); // retention counts from the delivery
      moves.push({ from, to });
    }
    await moveAllDurably(moves);
    failpoint("forward:moved");
    intents.forget(renamed.map(({ batch }) => batch));
    for (const one of renamed) this.#logSent(one);
  }

  /**
   * A file that has the name already, with no intention of ours: the operator moved a delivered batch back to the
   * queue, or the name is someone else's. The same content is a delivery; another one is never overwritten.
   */
  async #meetExisting(one: Delivery): Promise<void> {
    const found = await this.#target.stat(one.remote);
    if (!found) return;
    try {
      await checkSame(this.#target, one, found);
      one.step = "renamed";
      this.#forwarder.service.log.info("the target has the batch already", { batch: one.batch });
    } finally {
      await this.#target.remove(tempName(one.remote)).catch(() => {}); // some servers delete nothing
    }
  }

  #logSent(one: Delivery): void {
    const { service, state } = this.#forwarder;
    const { batch, lines, bytes, at } = one;
    this.#cycle.sent++;
    this.#cycle.lines += lines;
    state.lastSentAt = service.now();
    delete state.failed[batch];
    delete state.later[batch];
    if (one.step !== "renamed") return;
    one.step = "sent";
    service.log.info("batch delivered", { batch, lines, bytes, ms: service.now() - at });
  }

  /**
   * Whose fault a failure is: the file's, nobody's, because the batch was moved away meanwhile, or that of all, which ends
   * the pass. What is a bug ends it, too, and then the process.
   */
  async #fail(one: Delivery, error: unknown): Promise<void> {
    const { later } = this.#forwarder.state;
    const whose = await this.#classifyError(error, one).catch((bug: unknown) => bug);
    if (whose === "nobody") one.step = "gone";
    else if (whose === "file") Object.assign(one, { step: "refused", error });
    else {
      this.error ??= whose;
      const kind = whose instanceof TargetFault ? whose.kind : undefined;
      if (one.step === "queued" && (kind === "server" || kind === "connection"))
        later[one.batch] = (later[one.batch] ?? 0) + 1;
      // Whatever it waited for: it is not renamed in this pass. A no of a server that then went silent proves nothing.
      Object.assign(one, { step: "queued", error: kind === "server" ? error : whose });
    }
  }

  /** After a refusal a small file of another name is tried: when that is refused, too, it was not the name. */
  async #classifyError(error: unknown, one: Delivery): Promise<unknown> {
    if (error instanceof NameTaken) return "file";
    if (error instanceof Unreadable) return (await exists(join(one.folder, one.batch))) ? "file" : "nobody";
    if (!(error instanceof Refusal)) return error;
    try {
      await this.#probe();
      return "file";
    } catch (cause) {
      return cause instanceof Refusal ? new TargetFault("server", errorMessage(error), { cause }) : cause;
    }
  }
}

/** A name is delivered once: sent/ must not hold it, also not compressed. */
async function checkUnsent(dir: string, batch: string): Promise<void> {
  for (const name of [batch, withState(batch, "compressed")]) {
    const path = join(folders(dir).sent, name);
    if (await exists(path))
      throw new NameTaken(`"${path}" says that it was delivered already; remove one of the two`);
  }
}

/** Throws when the file at the target has other content than the batch. */
async function checkSame(
  target: Target,
  {
    remote,
    bytes,
    sha256,
    batch,
    folder,
  }: Pick<Delivery, "remote" | "bytes" | "sha256" | "batch" | "folder">,
  found: RemoteFile,
): Promise<void> {
  const same = found.bytes === bytes && (await measure(target.read(remote, bytes + 1))).sha256 === sha256;
  if (same) return;
  const time = (ms: number | undefined) => (ms ? new Date(ms).toISOString() : "an unknown time");
  const sealed = lstatSync(join(folder, batch), { throwIfNoEntry: false })?.mtimeMs;
  throw new NameTaken(
    `"${remote}" is on the target already, with other content: ${found.bytes} bytes of ${time(found.modifiedAt)} there, ${bytes} bytes of ${time(sealed)} here. When the one there is not wanted, remove it there: this one is tried again ever less often, and at once when you mv it from failed/ to its sender's folder`,
  );
}

/**
 * Asks whether the target takes files at all, to the rename; those who ask at the same time share the answer. What it
 * leaves at a server that deletes nothing does no harm: the next one has another name.
 */
export function createProbe(target: Target): () => Promise<string> {
  let asking: Promise<string> | undefined;
  const ask = async () => {
    const name = `log-rt-sync-probe-${crypto.randomUUID().slice(0, 8)}`;
    const content = Buffer.from("log-rt-sync looks whether files are taken here; this one may be deleted\n");
    await target.upload(name, Readable.from([content]));
    await target.publish(name, content.length).catch((error) => {
      if (!(error instanceof Refusal)) throw error;
      const hint = 'A server that can\'t rename takes files with "upload": "direct"';
      throw new TargetFault("server", `The server refuses every rename. ${hint}`, { cause: error });
    });
    const removed = target.remove(name).then(() => "put, renamed and removed there");
    return removed.catch((error) => {
      if (!(error instanceof Refusal)) throw error;
      return `put and renamed there; the server removes nothing, ${name} stays`;
    });
  };
  return () => {
    asking ??= ask().finally(() => {
      asking = undefined;
    });
    return asking;
  };
}

/** Puts digests that wait at the target, each a batch like any other; one that is refused is tried again next time. */
async function deliverDigests(
  { service, faults }: Forwarder,
  digests: Digests,
  target: Target,
): Promise<void> {
  const { config, log, signal } = service;
  const arrived: string[] = [];
  try {
    for (const name of [...digests.pending]) {
      if (signal.aborted) return;
      try {
        await deliverDigest(target, join(config.dir, ".digest"), name);
        arrived.push(name); // known late: it is seen to be there already, then
        log.info("digest delivered", { name });
        faults.recovered("digest", "digests are taken again");
      } catch (error) {
        if (!(error instanceof Refusal || error instanceof Unreadable)) throw error;
        faults.failed("digest", "digest refused", { name, error: errorMessage(error) });
      }
      if (arrived.length >= GROUP) await digests.delivered(arrived.splice(0));
    }
  } finally {
    await digests.delivered(arrived);
  }
}

async function deliverDigest(target: Target, folder: string, name: string): Promise<void> {
  const path = join(folder, name);
  const measured = await measure(readChunks(path));
  const found = await target.stat(name);
  const isHalf = target.direct && found && found.bytes < measured.bytes;
  if (found && !isHalf) return checkSame(target, { batch: name, folder, remote: name, ...measured }, found);
  await target.upload(name, readChunks(path));
  failpoint("forward:digest");
  await target.publish(name, measured.bytes);
}

// ---- what is told

/** One line in `.fail` and in the log per refused try. */
async function reportFailures({ service }: Forwarder, refused: Delivery[]): Promise<void> {
  const { config, log, now } = service;
  const lines: ReportLine[] = [];
  for (const { batch, folder, error } of refused) {
    const reason = errorMessage(error);
    const measured = await measure(readChunks(join(folder, batch))).catch(() => undefined); // the reason says why
    lines.push({ at: now(), batch, lines: measured?.lines ?? 0, status: "Failed", reason });
    log.warn("batch refused", { batch, error: reason });
  }
  await appendReport(failReportPath(config.report), lines);
}

/** Moves a batch to failed/, where it is tried again after a growing delay. */
async function putAside({ service, state }: Forwarder, { batch, folder, error }: Delivery): Promise<void> {
  const { config, now, log } = service;
  const { failed } = folders(config.dir);
  const attempts = (state.failed[batch]?.attempts ?? 0) + 1;
  const delay = Math.min(MAX_RETRY_MS, config.intervalSeconds * 1000 * 2 ** Math.min(attempts - 1, 30));
  state.failed[batch] = { attempts, nextAt: now() + delay, reason: errorMessage(error) };
  if (folder === failed || (await exists(join(failed, batch)))) return; // there already
  if (!(await exists(join(folder, batch)))) return; // taken away meanwhile
  await moveDurably(join(folder, batch), join(failed, batch));
  log.warn("batch moved to failed", { batch });
}

/** Tells and keeps what has changed: a fault that began or ended, deliveries, files in failed/. */
async function saveState({ service, state, faults }: Forwarder, cycle: Cycle): Promise<void> {
  const { fault, left, sent, failures } = cycle;
  const { config, now } = service;
  const began = state.ok === Boolean(fault) || state.fault?.kind !== fault?.kind || state.at === 0;
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
  const stays = service.flags.once !== true;
  if (!began && !fault && sent + failures === 0 && state.stays === stays) return;
  state.at = now();
  state.stays = stays;
  try {
    await writeState(forwarderStatePath(config.dir), state);
    faults.recovered("state", "state saved again");
  } catch (error) {
    faults.failed("state", "the state cannot be saved", { error: errorMessage(error) });
  }
}

/** For the textfile collector of node_exporter, at most once a second. What can't be written is told, and stops nothing. */
async function leaveMetrics(forwarder: Forwarder, cycle: Cycle, started: number): Promise<void> {
  const { service, state, faults, totals, digests } = forwarder;
  const now = service.now();
  totals.batches += cycle.sent;
  totals.lines += cycle.lines;
  totals.refusals += cycle.failures;
  if (service.flags.once !== true && now - totals.writtenAt < 1000) return;
  totals.writtenAt = now;
  const held = FAULT_KINDS.map((kind): Sample => [{ kind }, state.fault?.kind === kind ? 1 : 0]);
  const metrics: Metric[] = [
    ["last_cycle_timestamp_seconds", "gauge", "When the last pass over the queue ended", now / 1000],
    ["last_cycle_duration_seconds", "gauge", "How long it took", (now - started) / 1000],
    [
      "last_delivery_timestamp_seconds",
      "gauge",
      "When a batch was last delivered",
      (state.lastSentAt ?? 0) / 1000,
    ],
    ["delivered_batches_total", "counter", "Batches delivered since the forwarder started", totals.batches],
    ["delivered_lines_total", "counter", "Their lines", totals.lines],
    ["refusals_total", "counter", "Tries that failed because of the file", totals.refusals],
    ["left_files", "gauge", "Batches and digests that are not delivered, in failed/ too", cycle.left],
    ["failed_files", "gauge", "Batches that were tried and are in failed/", Object.keys(state.failed).length],
    ["pending_digests", "gauge", "Digests that are not delivered", digests?.pending.length ?? 0],
    ["held_up", "gauge", "Whether delivery is held up, by the kind of fault", held],
  ];
  try {
    await writeMetrics(folders(service.config.dir).metrics, "forwarder", metrics);
    faults.recovered("metrics", "metrics written again");
  } catch (error) {
    faults.failed("metrics", "metrics not written", { error: errorMessage(error) });
  }
}

// ---- flags that look, or do one thing

async function printStatus(service: Service<"forwarder">): Promise<number> {
  const status = await readStatus(service.config, service.flags.host?.toString(), service.now());
  const text = service.flags.json ? `${JSON.stringify(status)}\n` : formatStatus(status, service.now());
  process.stdout.write(text);
  return status.ok ? EXIT.done : EXIT.failed;
}

/** `--hour`: what of a time was delivered, per host; 0 when all of it is. */
async function printHours({ config, flags, now }: Service<"forwarder">, span: string): Promise<number> {
  const rows = await readHours(config, parseHours(span), now());
  const complete = rows.every(({ missing }) => missing.length === 0);
  const text = `${formatHours(rows)}${complete ? "complete" : "not complete"}`;
  process.stdout.write(`${flags.json ? JSON.stringify({ complete, rows }) : text}\n`);
  return complete ? EXIT.done : EXIT.failed;
}

/** `--resend`: moves delivered batches back into their host's folder; the forwarder unpacks and delivers them again. */
async function resend({ config }: Service<"forwarder">, text: string): Promise<number> {
  const all = folders(config.dir);
  const hosts = new Map((await listHosts(config.dir)).map((host) => [dashedHost(host), host]));
  const found = (await listBatches(all.sent, "sealed", "compressed")).filter((name) => name.includes(text));
  let left = 0;
  for (const name of found) {
    const host = hosts.get(parseBatchName(name)?.host ?? "");
    const to = host && join(all.host(host), name);
    const plain = withState(name, "sealed");
    const waits = to && ((await exists(to)) || (await exists(join(all.host(host), plain))));
    const twice = await exists(join(all.sent, name === plain ? withState(name, "compressed") : plain));
    const reason =
      (!to && "its host has no folder any more") ||
      (waits && "it waits in the queue already") ||
      (twice && "sent/ has it plain and compressed, of which housekeeping removes one: then again");
    if (to && !reason) await moveDurably(join(all.sent, name), to);
    if (reason) left++;
    process.stdout.write(`${name}: ${reason || "back in the queue"}\n`);
  }
  if (found.length === 0) process.stdout.write(`nothing in ${all.sent} has "${text}" in its name\n`);
  else process.stdout.write(`sent in the next cycle; if none runs: ${commandOf("forwarder")} --once\n`);
  return found.length > 0 && left === 0 ? EXIT.done : EXIT.failed;
}

/** `--test-file`: puts one file there, marked, for the client to see. */
async function putTestFile({ config, signal, now }: Service<"forwarder">): Promise<number> {
  const name = `log-rt-sync-test-${new Date(now()).toISOString().slice(0, 19).replace(/\D/g, "")}.txt`;
  const content = Buffer.from(
    "A test of log-rt-sync. Its batches will appear beside this file, which may be deleted.\n",
  );
  let target: Target | undefined;
  try {
    target = await openTarget(config, signal);
    await target.upload(name, Readable.from([content]));
    await target.publish(name, content.length);
  } catch (error) {
    const isTold = error instanceof TargetFault || error instanceof Refusal;
    throw isTold ? new OperatorError(errorMessage(error)) : error;
  } finally {
    target?.close();
  }
  process.stdout.write(`${name} is in ${config.target}\n`);
  return EXIT.done;
}

async function verify(folder: string): Promise<number> {
  const verified = await verifyFolder(folder).catch((error) => {
    throw new OperatorError(`Cannot verify ${folder}: ${errorMessage(error)}`);
  });
  if (verified.heads.length === 0 && verified.findings.length === 0)
    throw new OperatorError(`no digest is in ${folder}: nothing says what has to be there`);
  process.stdout.write(formatVerified(verified));
  return verified.findings.length === 0 ? EXIT.done : EXIT.failed;
}

/** One fault for each secret that is not there, and for a private key that can't be used. */
function checkSecrets({ password, privateKey, passphrase }: Settings): string[] {
  const faults = secretFaults("forwarder", { password, privateKey, passphrase });
  if (!privateKey || faults.length > 0) return faults;
  const fault = explainKey(readSecret(privateKey), passphrase && readSecret(passphrase));
  return fault ? [`forwarder.privateKey: ${fault}`] : [];
}

/** `--check`: folders that can be written, a key that can be used; with `--connect` also a login and a file. */
async function checkHost({ config, signal, checks }: Service<"forwarder">, connect: boolean): Promise<void> {
  const { dir, report, agent, target: url } = config;
  for (const fault of checkSecrets(config)) checks.fault(fault, EXIT.failed);
  await checks.file("forwarder.agent", agent);
  const folder = url.startsWith("file:") ? fileURLToPath(url) : undefined;
  if (folder) await checks.folder("forwarder.target", folder, "make");
  const asks = checks.asks(connect);
  await checks.folder("forwarder.dir", dir, "write");
  await checks.folder("forwarder.report", dirname(report), "write");
  if (!asks || (folder && (await whatIsMissing(folder)))) return; // a look makes no folder
  await checks.step(`forwarder.target: ${url}`, async () => {
    const target = await openTarget(config, signal);
    try {
      return `a file was ${await createProbe(target)()}`;
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      throw new Error("its folder takes no file from this login", { cause: error });
    } finally {
      target.close();
    }
  });
}

if (import.meta.main) {
  await runScript(
    {
      name: "forwarder",
      about: "Delivers sealed batches to an SFTP server or a folder, each exactly once.",
      flags: {
        once: "one pass over the queue, then exit",
        status: "show the queue and the last deliveries",
        "hour=HOUR": "what of an hour was delivered: 2026-11-27T14, or 2026-11-27T14/2026-11-27T18",
        "host=HOST": "with --status: of one sender",
        json: "with --status and --hour: for programs",
        "resend=TEXT": "deliver again what was delivered and has TEXT in its name",
        "verify=FOLDER": "check a delivered folder by its digests; needs no config",
        "test-file": "put a file at the target for the client to see",
      },
      withoutConfig: { verify },
      check: checkHost,
    },
    main,
  );
}
