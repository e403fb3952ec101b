/**
 * receiver: takes chunks of log lines over HTTP and files them in batches, one per sender and window.
 *
 * Promise: 200 means that the lines are on stable storage, once. What a request passes, in this order:
 *   1. admitted by its headers alone: host, token or address, the port's group
 *   2. its body read and decoded within limits, of each sender and of all together; then it has a place
 *   3. the store appends it to its journal and syncs that (lib/store/)
 *   4. the answer: 200, or where the stream stands
 * A crash before the end of 3 leaves nothing that counts: the shipper, that had no answer, sends the chunk again. A
 * crash after it leaves a chunk whose repeat starts at an offset that is committed: 409, and the shipper goes on from
 * there. So nothing is lost or doubled. Sealing and forgetting are the store's, once a second, by the same rules.
 */
import { createPrivateKey, X509Certificate } from "node:crypto";
import { closeSync, openSync, readFileSync, statSync } from "node:fs";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { join } from "node:path";
import { type Context, Hono, type Next } from "hono";
import { dashedHost, folders, listBatches, parseBatchName } from "./lib/batch.ts";
import {
  HEADER,
  isStreamName,
  parseChunkHeaders,
  parseHostHeader,
  parseNews,
  parseStreamHeaders,
  STREAMS_PATH,
  UPLOAD_PATH,
  WireError,
} from "./lib/chunk.ts";
import { type Config, ConfigError, listSecrets, parseConfig, secretFaults } from "./lib/config.ts";
import { holdLock, makeFolder, writeDurably } from "./lib/durable.ts";
import { isLoopback, parseHost } from "./lib/host.ts";
import { readLedger } from "./lib/ledger.ts";
import { formatMetrics, type Metric, type Sample } from "./lib/metrics.ts";
import { pageHeaders, renderPage } from "./lib/page.ts";
import { type Server, serve, type Tls } from "./lib/runtime.ts";
import {
  createFaultLog,
  EXIT,
  errorMessage,
  type FaultLog,
  type Log,
  loop,
  OperatorError,
  type PassContext,
  runScript,
  type Service,
  VERSION,
  wait,
} from "./lib/service.ts";
import { DEFAULT_THRESHOLDS, type Thresholds } from "./lib/snapshot.ts";
import { writeState } from "./lib/state.ts";
import { createStatusReader, type Snapshot } from "./lib/status.ts";
import { Access, type Arrival, longestHost, printable, Refusals } from "./lib/store/access.ts";
import { Intake, release } from "./lib/store/intake.ts";
import { StoreError } from "./lib/store/journal.ts";
import type { Chunk, Outcome } from "./lib/store/sender.ts";
import { Store } from "./lib/store/store.ts";
import { compileFormat, createWindowFinder } from "./lib/store/window.ts";

type ReceiverConfig = Config["receiver"];
type MonitorConfig = Config["monitor"];

const SEAL_EVERY_MS = 1000;
/** Bodies of so many bytes are given back at once; smaller ones may share the runtime's pool. */
const RELEASE_FROM = 65_536;
/** How often the state file is written at least, and `.forget` looked for. */
const STATE_EVERY_MS = 10_000;
const FORGET_EVERY_MS = 30_000;
/** A clock that moved by so much against the machine's own was set. */
const CLOCK_SET_MS = 30_000;
const RETRY_AFTER_SECONDS = "1";
/** Makes a browser ask for a token, which goes into the field of the password. RFC 7617 wants the realm. */
const BROWSER_LOGIN = 'Basic realm="log-rt-sync"';
/** How long open connections may take to end after SIGTERM; what is in hand is answered long before. */
const CLOSE_MS = 2000;

async function main(service: Service<"receiver">): Promise<number> {
  const { config, log, now, signal } = service;
  if (service.flags.forget !== undefined) return leaveForget(service, String(service.flags.forget));
  const groups = servedGroups(service);
  const { wrong, missing } = findFaults(config); // else every sender would be refused, without an end
  const faults = [...wrong, ...missing].map((fault) => `${service.configFile}: ${fault}`);
  if (faults.length > 0) throw new ConfigError(faults, wrong.length > 0 ? EXIT.config : EXIT.failed);
  await prepareFolder(config);
  await lockGroups(config, groups);
  const monitor = await readMonitorSection(service.configFile);
  for (const warning of findWarnings(config, monitor.fault)) log.warn("config", { warning });
  const receiver = new Receiver(config, { log, now, signal, monitor: monitor.section });
  await receiver.store.start((host) => groups.includes(Math.max(0, receiver.access.groupOf(host))));
  const app = createApp(receiver);
  const ports = groups.map((group) => new Port(receiver, group, app));
  for (const port of ports) port.listen();
  service.onReload((next) => {
    const { wrong, missing } = findFaults(next);
    if (wrong.length + missing.length > 0) throw new ConfigError([...wrong, ...missing]);
    return receiver.configure(next);
  });
  watchDescriptors(ports, receiver);
  const writeReceiverState = createStateWriter(receiver, ports);
  await loop(
    async () => {
      await receiver.store.seal();
      for (const port of ports) await port.renew();
      await receiver.takeForgets();
      await writeReceiverState();
    },
    { everyMs: SEAL_EVERY_MS, signal },
  );
  await Promise.race([Promise.all(ports.map((port) => port.close())), wait(CLOSE_MS)]);
  await receiver.store.close();
  log.info("receiver stopped");
  return EXIT.done;
}

function servedGroups({ config, configFile, flags }: Service<"receiver">): number[] {
  const all = config.groups.map((_, index) => index);
  if (flags.port === undefined) return all;
  const own = all.filter((index) => String(config.groups[index]?.port) === flags.port);
  if (own.length > 0) return own;
  const ports = config.groups.map((group) => group.port).join(", ");
  throw new OperatorError(
    `No group has port ${flags.port}: ${configFile} has groups of ports ${ports}`,
    EXIT.usage,
  );
}

/** Throws an OperatorError when the folder cannot be made or written to. */
async function prepareFolder({ dir }: ReceiverConfig): Promise<void> {
  const probe = join(dir, ".receiver-probe");
  try {
    await makeFolder(dir);
    await writeFile(probe, "");
    await rm(probe, { force: true });
  } catch (error) {
    throw new OperatorError(`Cannot write to receiver.dir ${dir}: ${errorMessage(error)}`);
  }
}

/** One process per group: a second one on the same folder and port says so and ends. */
async function lockGroups({ dir, groups }: ReceiverConfig, own: number[]): Promise<void> {
  for (const index of own) {
    const port = groups[index]?.port ?? 0;
    if (port === 0) continue; // any free port: no other process can be on it
    await holdLock(join(dir, `.receiver-${port}.lock`), `The group of port ${port}`);
  }
}

// ---- one port

/** The listening port of a group. A renewed certificate is taken up by new connections. */
class Port {
  readonly #receiver: Receiver;
  readonly #group: number;
  readonly #app: App;
  readonly #faults: FaultLog;
  #server: Server | undefined;
  /** Change times of the files of `tls` that are in use. */
  #stamp = "";
  port = 0;

  constructor(receiver: Receiver, group: number, app: App) {
    this.#receiver = receiver;
    this.#group = group;
    this.#app = app;
    this.#faults = createFaultLog(receiver.log, receiver.now);
    this.port = receiver.config.groups[group]?.port ?? 0;
  }

  /** Throws an OperatorError. */
  listen(): void {
    const { listen, tls } = this.#receiver.config;
    this.#stamp = stampOf(tls);
    this.#serve(readTls(tls));
    this.#receiver.log.info("receiver listens", { address: listen, port: this.port, tls: tls !== undefined });
  }

  #serve(tls: Tls | undefined): void {
    const { config } = this.#receiver;
    try {
      this.#server = serve({
        hostname: config.listen,
        port: this.port,
        maxBodyBytes: config.maxBodyBytes,
        idleTimeoutSeconds: config.idleTimeoutSeconds,
        ...(tls && { tls }),
        fetch: (request, peer, names) =>
          this.#app.fetch(request, { peer, group: this.#group, ...(names && { names }) }),
      });
      this.port = this.#server.port;
    } catch (error) {
      throw new OperatorError(`Cannot listen on ${config.listen} port ${this.port}: ${errorMessage(error)}`);
    }
  }

  /** Looks whether the certificate changed; a pair that does not fit (the key comes a moment later) is waited for. */
  async renew(): Promise<void> {
    const { tls } = this.#receiver.config;
    const { log, now } = this.#receiver;
    const stamp = stampOf(tls);
    if (!tls || stamp === this.#stamp) return;
    try {
      const next = readTls(tls);
      await this.#listenAgain(next);
      this.#stamp = stamp;
      log.info("certificate renewed", { port: this.port, until: certificateEnd(next) });
      this.#faults.recovered("tls", "certificate is valid again");
    } catch (error) {
      this.#faults.failed("tls", "renewed certificate not taken up", {
        error: errorMessage(error),
        at: now(),
      });
    }
  }

  /** New connections come to a new server; what the old one has in hand is answered, or cut off with `force`. */
  async #listenAgain(tls: Tls | undefined, force = false): Promise<void> {
    this.#server?.close(force).catch(() => {});
    for (let tries = 1; ; tries++) {
      try {
        this.#serve(tls);
        return;
      } catch (error) {
        if (tries === 20) throw error;
        await wait(50); // the old one may hold the port for a moment
      }
    }
  }

  /**
   * Strangers' open connections must not take the descriptors that files need. The runtime does not say which are
   * idle: all are cut off, and senders repeat what had no answer.
   */
  async shed(): Promise<void> {
    const { config } = this.#receiver;
    this.#faults.failed("shed", "descriptors are scarce: connections are cut off", { port: this.port });
    await this.#listenAgain(readTls(config.tls), true);
  }

  close(): Promise<void> {
    return this.#server?.close() ?? Promise.resolve();
  }
}

const RESERVED_DESCRIPTORS = 64;
const DESCRIPTORS_EVERY_MS = 250;

/** Looks now and then whether descriptors become scarce; the system gives the lowest free number, so one tells. */
function watchDescriptors(ports: Port[], { log, signal }: Receiver): void {
  let most: number;
  try {
    most = Number(/^Max open files\s+(\d+)/m.exec(readFileSync("/proc/self/limits", "utf8"))?.[1]);
  } catch {
    return; // not Linux, or not permitted, as by Deno
  }
  let lowest = 0;
  const shedIfScarce = async () => {
    try {
      lowest = openSync("/dev/null", "r");
      closeSync(lowest);
    } catch {
      lowest = most;
    }
    if (lowest < most - RESERVED_DESCRIPTORS) return;
    for (const port of ports) await port.shed();
  };
  loop(() => shedIfScarce().catch((error) => log.error("port lost", { error: errorMessage(error) })), {
    everyMs: DESCRIPTORS_EVERY_MS,
    signal,
  });
}

function stampOf(tls: ReceiverConfig["tls"]): string {
  const stamp = (file: string) => {
    const stat = statSync(file, { throwIfNoEntry: false });
    return stat ? `${stat.mtimeMs} ${stat.ino} ${stat.size}` : "gone";
  };
  return tls ? [tls.cert, tls.key, tls.clientCa].map((file) => file && stamp(file)).join(", ") : "";
}

/** Throws an OperatorError when a file of `tls` cannot be read, or is no pair with the other. */
function readTls(tls: ReceiverConfig["tls"]): Tls | undefined {
  if (!tls) return undefined;
  const read = (path: string) => {
    try {
      return readFileSync(path, "utf8");
    } catch (error) {
      throw new OperatorError(`Cannot read receiver.tls file ${path}: ${errorMessage(error)}`);
    }
  };
  const [cert, key] = [read(tls.cert), read(tls.key)];
  let isPair: boolean;
  try {
    isPair = new X509Certificate(cert).checkPrivateKey(createPrivateKey(key));
  } catch (error) {
    throw new OperatorError(`Cannot use receiver.tls ${tls.cert} and ${tls.key}: ${errorMessage(error)}`);
  }
  if (!isPair) throw new OperatorError(`receiver.tls: ${tls.key} is not the key of ${tls.cert}`);
  return { cert, key, clientNames: tls.clientName, ...(tls.clientCa && { clientCa: read(tls.clientCa) }) };
}

function certificateEnd(tls: Tls | undefined): string {
  return tls ? new Date(new X509Certificate(tls.cert).validTo).toISOString() : "";
}

// ---- the receiver

/**
 * The receiver without its ports: who may come in, what is stored, what is told. Nothing is on disk before the store is
 * started or a chunk comes.
 */
export class Receiver {
  config: ReceiverConfig;
  access: Access;
  readonly intake: Intake;
  readonly store: Store;
  readonly refusals: Refusals;
  readonly counts = new Counts();
  readonly log: Log;
  readonly now: () => number;
  readonly signal: AbortSignal;
  readonly startedAt: number;
  readonly status: () => Promise<Snapshot>;
  readonly #monitor: MonitorConfig | undefined;
  #forgetsAt = Number.NEGATIVE_INFINITY;

  constructor(config: ReceiverConfig, { log, now, signal, monitor }: ReceiverOptions) {
    this.config = config;
    this.log = log;
    this.now = now;
    this.signal = signal;
    this.#monitor = monitor;
    this.startedAt = now();
    this.access = new Access(config, { log, now, expected: monitor?.expected ?? [] });
    this.intake = new Intake(config);
    this.refusals = new Refusals(log, now);
    this.store = new Store(this.#storeOptions(config));
    this.status = createStatusReader(config.dir, () => this.#thresholds(), {
      now,
      ledgerOf: (host) => this.store.senders.get(host)?.ledger,
      ...(monitor && { monitorFile: monitor.stateFile }),
    });
  }

  /** Those of the config's section `monitor`; without one its defaults, and all senders that a group names. */
  #thresholds(): Thresholds {
    if (this.#monitor) return this.#monitor;
    const senders = this.config.groups.flatMap((group) => group.senders);
    const expected = senders.flatMap((sender) => (sender.includes("/") ? [] : (parseHost(sender) ?? [])));
    return { ...DEFAULT_THRESHOLDS, expected };
  }

  #storeOptions(config: ReceiverConfig) {
    const findWindow = createWindowFinder(config.windowMinutes, config);
    const isListed = (host: string) => !this.access.isUnnamed(host);
    return { ...config, findWindow, isListed, log: this.log, now: this.now };
  }

  /** Takes up a config while running. Gives the keys that can't change before a restart. */
  configure(next: ReceiverConfig): string[] {
    const fixed = ["listen", "dir", "prefix", "windowMinutes", "idleTimeoutSeconds"] as const;
    const kept = fixed.filter((key) => next[key] !== this.config[key]) as string[];
    const ports = ({ groups }: ReceiverConfig) => groups.map((group) => group.port).join();
    if (ports(next) !== ports(this.config)) kept.push("groups");
    if (JSON.stringify(next.tls) !== JSON.stringify(this.config.tls)) kept.push("tls");
    const { listen, dir, prefix, windowMinutes, idleTimeoutSeconds, tls, groups } = this.config;
    const same = { listen, dir, prefix, windowMinutes, idleTimeoutSeconds, tls };
    this.config = { ...next, ...same, ...(kept.includes("groups") && { groups }) };
    const { log, now } = this;
    this.access = new Access(this.config, { log, now, expected: this.#monitor?.expected ?? [] });
    this.intake.limits = this.config;
    this.store.configure(this.#storeOptions(this.config));
    return kept;
  }

  async takeForgets(): Promise<void> {
    if (this.now() - this.#forgetsAt < FORGET_EVERY_MS) return;
    this.#forgetsAt = this.now();
    await this.store.forgetMarked(FORGET);
  }
}

interface ReceiverOptions extends Omit<PassContext<"receiver">, "config"> {
  monitor?: MonitorConfig | undefined;
}

type App = ReturnType<typeof createApp>;
type HttpContext = Context<{ Bindings: Arrival }>;

/** The HTTP side: one app for all ports; the server tells by which a request came. */
export function createApp(receiver: Receiver) {
  const { store, intake } = receiver;
  const app = new Hono<{ Bindings: Arrival }>();

  app.use(async (c, next) => {
    c.header("Cache-Control", "no-store");
    c.header("X-Content-Type-Options", "nosniff");
    if (receiver.signal.aborted) throw new WireError(503, "shutting down", "shutting down");
    await next();
  });

  app.get("/healthz", (c) => {
    const fault = store.health();
    return c.json({ status: fault ?? "ok", version: VERSION }, fault === undefined ? 200 : 503);
  });

  // For shippers of version 1.0. Hono answers HEAD with what GET would, without the body.
  app.get(UPLOAD_PATH, async (c) => {
    const { host, stream } = parseStreamHeaders(c.req.raw.headers);
    receiver.access.authorise(host, c.req.raw.headers, c.env);
    const [found] = (await store.knows(host)) ? await store.streams(host, [stream], {}, c.env.peer) : [];
    return found ? c.body(null, 200, { [HEADER.offset]: String(found.offset) }) : c.body(null, 404);
  });

  app.post(UPLOAD_PATH, (c) => {
    const type = (c.req.header("Content-Type") ?? "").split(";")[0]?.trim().toLowerCase();
    if (type === "text/plain") return takeChunk(receiver, c);
    if (type === "application/json") return takeLegacy(receiver, c);
    const shown = JSON.stringify(type?.slice(0, 60));
    throw new WireError(415, `Content-Type ${shown} is not known; expected text/plain`);
  });

  app.post(STREAMS_PATH, async (c) => {
    const { headers } = c.req.raw;
    const host = parseHostHeader(headers);
    const news = parseNews(headers);
    const peer = receiver.access.authorise(host, headers, c.env);
    return intake.take(host, c.req.raw, async ({ body }) => {
      const names = parseNames(body, receiver.config.maxStreamsPerHost);
      return c.json({ host, streams: await store.streams(host, names, news, peer) });
    });
  });

  const watchersOnly = async (c: HttpContext, next: Next) => {
    if (!receiver.access.mayWatch(c.req.raw.headers, c.env))
      throw new WireError(401, "a token is required", "no token for the page");
    await next();
  };
  app.use("/", watchersOnly);
  app.use("/metrics", watchersOnly);
  app.get("/", async (c) => c.body(renderPage(await receiver.status()), 200, pageHeaders));
  app.get("/metrics", async (c) =>
    c.body(renderMetrics(receiver, await receiver.status()), 200, { "Content-Type": METRICS_TYPE }),
  );

  app.notFound((c) => c.text("there is nothing here\n", 404));
  app.onError((error, c) => answerError(receiver, error, c));
  return app;
}

async function takeChunk(receiver: Receiver, c: HttpContext): Promise<Response> {
  const { access, intake } = receiver;
  const { headers } = c.req.raw;
  const chunk = parseChunkHeaders(headers);
  const peer = access.authorise(chunk.host, headers, c.env);
  return intake.take(chunk.host, c.req.raw, async ({ body, encoded }) => {
    const range = chunk.end - chunk.offset;
    if (body.length > range)
      throw new WireError(400, `body has ${body.length} bytes, its range only ${range}`);
    const given = { ...chunk, body, peer, ...(encoded && { encoded }) };
    const { kind, lines, offset, mark } = await commit(receiver, given).finally(() => {
      if (body.length > RELEASE_FROM) release(body); // it is in its part, or stays in nothing
      if (encoded) release(encoded.bytes);
    });
    if (kind === "unknown")
      return c.text(`stream ${chunk.stream} is not known, and this is not its beginning\n`, 409);
    c.header(HEADER.offset, String(offset));
    if (kind === "stored") return c.json({ lines, offset });
    if (mark !== undefined && chunk.mark !== undefined) c.header(HEADER.mark, mark); // 1.0 has no marks
    return c.text(`receiver has stream ${chunk.stream} up to byte ${offset}\n`, 409);
  });
}

async function commit({ store, counts }: Receiver, chunk: Chunk): Promise<Outcome> {
  const started = performance.now();
  const outcome = await store.commit(chunk);
  counts.chunk(chunk, outcome, performance.now() - started);
  return outcome;
}

/** The stream names that a question is about; undefined for all. Throws a WireError (400, 413). */
function parseNames(body: Uint8Array, most: number): string[] | undefined {
  if (body.length === 0) return undefined;
  const { streams } = parseJson(body) as { streams?: unknown };
  if (!Array.isArray(streams) || !streams.every((name) => typeof name === "string" && isStreamName(name)))
    throw new WireError(400, 'expected {"streams": ["<name>", …]}');
  if (streams.length > most) throw new WireError(413, `a question is about ${most} streams at most`);
  return streams;
}

function parseJson(bytes: Uint8Array): object {
  try {
    const value = JSON.parse(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString());
    return Object(value);
  } catch (error) {
    throw new WireError(400, `body is no JSON: ${(error as Error).message.slice(0, 80)}`);
  }
}

/** Names what came in the original's form in the ledger; shorter than a stream of the wire may be. */
const LEGACY_STREAM = "legacy";

/** The original Python shipper's form: `{"log": "<lines>", "host": "<ip>"}`, an empty line after every line. */
async function takeLegacy(receiver: Receiver, c: HttpContext): Promise<Response> {
  const { access, intake } = receiver;
  const { headers } = c.req.raw;
  const peer = access.checkLegacy(headers, c.env);
  return intake.take(peer, c.req.raw, async ({ body: json }) => {
    const { log, host: name } = parseJson(json) as { log?: unknown; host?: unknown };
    const host = typeof name === "string" ? parseHost(name) : undefined;
    if (typeof log !== "string" || host === undefined)
      throw new WireError(400, 'expected {"log": "<lines>", "host": "<address>"}');
    access.authoriseLegacy(host, peer, c.env);
    const lines = log.split("\n").filter((line) => line !== "" && line !== "\r");
    const body = Buffer.from(lines.map((line) => `${line}\n`).join(""));
    const outcome = await commit(receiver, { host, stream: LEGACY_STREAM, body, peer });
    return c.text(`OK - ${outcome.lines} lines`);
  });
}

/** What a refused or failed request is answered; a fault of ours says nothing of itself to strangers. */
function answerError(receiver: Receiver, error: Error, c: HttpContext): Response {
  const { log, refusals, access } = receiver;
  if (!(error instanceof WireError || error instanceof StoreError)) {
    log.error("request failed", { path: printable(c.req.path), error: printable(errorMessage(error)) });
    return c.text("the receiver has a fault; see its log\n", 500);
  }
  const { status } = error;
  const host = parseHost(c.req.header(HEADER.host) ?? "") ?? "";
  const reason = error instanceof WireError ? error.reason : status === 403 ? "name taken" : "not stored";
  const peer = access.clientAddress(c.req.raw.headers, c.env);
  refusals.note(status, error.message, { host, peer, reason });
  if (status === 401)
    c.header("WWW-Authenticate", [UPLOAD_PATH, STREAMS_PATH].includes(c.req.path) ? "Bearer" : BROWSER_LOGIN);
  if (status === 503) c.header("Retry-After", RETRY_AFTER_SECONDS);
  if (status === 408) c.header("Connection", "close"); // the rest of its body would come as slowly
  return c.text(`${error.message}\n`, status as 400);
}

// ---- what is told

/**
 * Writes `.receiver-<port>.json` every ten seconds, and when something changed: that this receiver runs, and whom it
 * refuses, for the monitor and the page.
 */
function createStateWriter(receiver: Receiver, all: Port[]): () => Promise<void> {
  const { config, refusals, store, log, now } = receiver;
  const faults = createFaultLog(log, now);
  const ports = all.map(({ port }) => port).sort((a, b) => a - b);
  let writtenAt = Number.NEGATIVE_INFINITY;
  let told: { health?: string; healthSince?: number } = {};
  // Since when senders could be heard, and the difference of the two clocks then: one that is set begins anew.
  let { startedAt } = receiver;
  let clocks = now() - performance.now();
  return async () => {
    const health = store.health();
    const at = now();
    if (Math.abs(at - performance.now() - clocks) > CLOCK_SET_MS) {
      startedAt = at;
      clocks = at - performance.now();
    }
    if (!refusals.changed && health === told.health && Math.abs(at - writtenAt) < STATE_EVERY_MS) return;
    refusals.changed = false;
    told = health === undefined ? {} : { health, healthSince: told.healthSince ?? at };
    writtenAt = at;
    const refused = refusals.list();
    const pressed = [...store.crowd(), ...refusals.pressed()];
    const state = { version: 1, at, startedAt, pid: process.pid, ports, ...told, refused, pressed };
    try {
      await writeState(join(config.dir, `.receiver-${ports[0]}.json`), state);
      faults.recovered("state", "state file is written again");
    } catch (error) {
      faults.failed("state", "state file not written", { error: errorMessage(error) });
    }
  };
}

const COMMIT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5];
const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

type Count = { lines: number; bytes: number; chunks: number; duplicates: number };

class Counts {
  readonly hosts = new Map<string, Count>();
  readonly buckets = COMMIT_SECONDS.map(() => 0);
  seconds = 0;
  commits = 0;

  chunk({ host, body }: Chunk, { kind, lines }: Outcome, ms: number): void {
    const count = this.hosts.get(host) ?? { lines: 0, bytes: 0, chunks: 0, duplicates: 0 };
    this.hosts.set(host, count);
    if (kind === "stored") {
      count.chunks++;
      count.lines += lines;
      count.bytes += body.length;
    } else count.duplicates++;
    this.commits++;
    this.seconds += ms / 1000;
    for (const [i, bound] of COMMIT_SECONDS.entries()) {
      if (ms / 1000 <= bound) this.buckets[i] = (this.buckets[i] ?? 0) + 1;
    }
  }
}

/** What is in the ledgers survives a restart; the rest is counted since the start. */
function renderMetrics({ counts, intake, refusals, store, startedAt }: Receiver, status: Snapshot): string {
  const counted = (key: keyof Count): Sample[] =>
    [...counts.hosts].map(([host, count]) => [{ host }, count[key]]);
  const told = (value: (host: Snapshot["hosts"][number]) => number): Sample[] =>
    status.hosts.map((host) => [{ host: host.host }, value(host)]);
  const facts = (key: "skipped" | "untimed" | "ahead" | "gone"): Sample[] =>
    [...store.senders].map(([host, { ledger }]) => [{ host }, ledger.facts[key] ?? 0]);
  const refused = [...refusals.counts.values()].map(
    ({ status: code, reason, count }): Sample => [{ status: String(code), reason }, count],
  );
  const { disk } = status;
  const metrics: Metric[] = [
    ["build_info", "gauge", "Version that runs", [[{ version: VERSION }, 1]]],
    ["start_time_seconds", "gauge", "When it started", startedAt / 1000],
    ["lines_total", "counter", "Lines stored since the start", counted("lines")],
    ["bytes_total", "counter", "Bytes of lines stored since the start", counted("bytes")],
    ["chunks_total", "counter", "Chunks taken since the start", counted("chunks")],
    ["duplicates_total", "counter", "Chunks answered 409", counted("duplicates")],
    ["refused_total", "counter", "Requests refused, by status and reason", refused],
    ["last_seen_timestamp_seconds", "gauge", "When a sender was last heard", told((h) => h.heardAt / 1000)],
    ["last_line_timestamp_seconds", "gauge", "When its last line came", told((h) => h.lineAt / 1000)],
    [
      "lag_bytes",
      "gauge",
      "Bytes that a sender still has to ship",
      told((h) => store.senders.get(h.host)?.ledger.facts.lag ?? h.lag ?? 0),
    ],
    ["lost_bytes_total", "counter", "Bytes that vanished before they were read", told((h) => h.lost)],
    [
      "gone_bytes_total",
      "counter",
      "Bytes that were acknowledged and vanished from this disk",
      facts("gone"),
    ],
    ["skipped_lines_total", "counter", "Lines that rules of the sender left out", facts("skipped")],
    ["untimed_lines_total", "counter", "Lines without a timestamp", facts("untimed")],
    ["ahead_lines_total", "counter", "Lines of a clock that is ahead", facts("ahead")],
    ["undelivered_bytes", "gauge", "Bytes in batches that are not delivered yet", undelivered(store)],
    ["open_batches", "gauge", "Batches that still take lines", told((h) => h.open)],
    ["sealed_batches", "gauge", "Sealed batches that wait for the forwarder", told((h) => h.waiting)],
    ["failed_batches", "gauge", "Batches in failed/", told((h) => h.failed)],
    ["requests_in_flight", "gauge", "Requests in hand", intake.requests],
    ["bytes_in_flight", "gauge", "Bytes of bodies in hand", intake.bytes],
    [
      "problem",
      "gauge",
      "What is wrong, in the words of the page",
      status.problems.map(({ key, leg, title }) => [{ key, leg, title }, 1]),
    ],
    ["disk_free_bytes", "gauge", "Free space of dir", disk ? disk.free : []],
    ["disk_size_bytes", "gauge", "Size of dir's disk", disk ? disk.total : []],
  ];
  return formatMetrics("receiver", metrics) + formatCommits(counts);
}

function undelivered(store: Store): Sample[] {
  return [...store.senders].map(([host, { ledger }]) => {
    const waiting = [...ledger.sealed.values()].filter(({ waits }) => waits);
    const bytes = [...ledger.open.values(), ...waiting].reduce((sum, batch) => sum + batch.bytes, 0);
    return [{ host }, bytes];
  });
}

function formatCommits({ buckets, seconds, commits }: Counts): string {
  const name = "log_rt_sync_receiver_commit_duration_seconds";
  const rows = buckets.map((n, i) => `${name}_bucket{le="${COMMIT_SECONDS[i]}"} ${n}\n`).join("");
  const head = `# HELP ${name} From a whole body to stable storage.\n# TYPE ${name} histogram\n`;
  return `${head}${rows}${name}_bucket{le="+Inf"} ${commits}\n${name}_sum ${seconds}\n${name}_count ${commits}\n`;
}

// ---- --forget

const FORGET = ".forget";

/** Leaves a mark that the running receiver, or the next one, takes. Throws an OperatorError when it is too early. */
async function leaveForget({ config, log, now }: Service<"receiver">, name: string): Promise<number> {
  const host = parseHost(name);
  if (host === undefined)
    throw new OperatorError(`"${printable(name)}" is not an IP address or a host name`, EXIT.usage);
  const folder = folders(config.dir).host(host);
  const ledger = await readLedger(folder);
  if (!ledger) throw new OperatorError(`Host ${host} is not known in ${config.dir}`);
  const failed = await listBatches(folders(config.dir).failed, "sealed");
  const waiting = [
    ...(await listBatches(folder, "open", "sealed")),
    ...failed.filter((batch) => parseBatchName(batch)?.host === dashedHost(host)),
  ];
  const refusal = (why: string) => new OperatorError(`Host ${host} is not forgotten: ${why}`);
  if (waiting.length > 0) throw refusal(`${waiting.length} of its batches wait, as ${waiting[0]}`);
  const minutes = Math.round((now() - ledger.heardAt) / 60_000);
  if (minutes < 60) throw refusal(`it was heard ${minutes} minutes ago, less than an hour`);
  await writeDurably(join(folder, FORGET), "");
  log.info("host will be forgotten within a minute by a running receiver, else at its start", { host });
  return EXIT.done;
}

// ---- --check

/** The monitor's section when there is one; a fault in it is only told. */
async function readMonitorSection(file: string): Promise<{ section?: MonitorConfig; fault?: string }> {
  try {
    const text = await readFile(file, "utf8");
    if (!("monitor" in JSON.parse(text.replace(/^\uFEFF/, "")))) return {};
    return { section: parseConfig(text, "monitor", file) };
  } catch (error) {
    return { fault: errorMessage(error) };
  }
}

/** What is wrong with the config beyond its form (certificate, logFormat, names that are too long), and what of it can't be read. */
function findFaults(config: ReceiverConfig): { wrong: string[]; missing: string[] } {
  const { tokens, tls, viewToken, logFormat = [], groups } = config;
  const { clientName, ...files } = tls ?? {};
  const secrets = listSecrets({ tokens, viewToken }).map(({ key, ref }) => [key, ref]);
  const named = Object.entries(files).map(([key, file]) => [`tls.${key}`, { file }]);
  const unreadable = secretFaults("receiver", Object.fromEntries([...secrets, ...named]));
  const faultOf = (key: string, work: () => unknown): string[] => {
    try {
      work();
      return [];
    } catch (error) {
      return [`receiver.${key}: ${errorMessage(error)}`];
    }
  };
  const formats = logFormat.flatMap((format, index) =>
    faultOf(`logFormat${logFormat.length > 1 ? `[${index}]` : ""}`, () => compileFormat(format)),
  );
  const most = longestHost(config);
  const long = groups.flatMap(({ senders }) => senders.filter((sender) => sender.length > most));
  const names = long.map(
    (name) =>
      `receiver.groups: ${name} is longer than ${most} characters, the most that file names have room for`,
  );
  const isReadable = !unreadable.some((fault) => fault.includes(".tls."));
  const pair = isReadable ? faultOf("tls", () => readTls(tls)) : [];
  if (clientName && !tls?.clientCa) pair.push("receiver.tls.clientName: needs clientCa");
  return { wrong: [...formats, ...names, ...pair], missing: unreadable };
}

/** What works, and should not stay so. */
function findWarnings(config: ReceiverConfig, monitorFault?: string): string[] {
  const { tokens, tls, listen, timestampPattern, logFormat = [] } = config;
  const warnings: string[] = [];
  if (tokens && !tls && !isLoopback(listen))
    warnings.push(
      `receiver.tokens: go to ${listen} without TLS, so whoever is on the way reads them; set tls`,
    );
  if (timestampPattern !== undefined)
    warnings.push(
      "receiver.timestampPattern: goes with the next version; set logFormat, nginx's own directive",
    );
  for (const format of logFormat) {
    const { pick, doubtful, variable } = compileFormat(format);
    if (pick === "only")
      warnings.push(
        `receiver.logFormat: a client can write a time into ${doubtful.join(", ")} on both sides of $${variable}; put the time first, or quotes around them. A line with two times there goes with the line before it`,
      );
  }
  if (monitorFault) warnings.push(`monitor: its thresholds are not used: ${monitorFault}`);
  return warnings;
}

async function checkReceiver(service: Service<"receiver">): Promise<void> {
  const { config, configFile, now, checks } = service;
  const served = servedGroups(service);
  const { wrong, missing } = findFaults(config);
  for (const fault of wrong) checks.fault(fault);
  for (const fault of missing) checks.fault(fault, EXIT.failed);
  const monitor = await readMonitorSection(configFile);
  await checks.folder("receiver.dir", config.dir, "make");
  for (const { port } of config.groups.filter((_, index) => served.includes(index))) {
    await checks.step(`receiver.groups: ${config.listen}:${port}`, () => checkPort(config, port, now()));
  }
  if (wrong.length + missing.length > 0) return;
  for (const warning of findWarnings(config, monitor.fault)) checks.warn(warning);
  const { tls, logFormat = [] } = config;
  if (tls) checks.ok(`receiver.tls.cert: ${tls.cert}: valid until ${certificateEnd(readTls(tls))}`);
  for (const format of logFormat) {
    const { variable, example } = compileFormat(format);
    checks.ok(`receiver.logFormat: $${variable} of a line such as ${example(new Date(now()))}`);
  }
}

/** A port that can be listened on, or that a receiver of this folder listens on. */
async function checkPort({ listen, dir }: ReceiverConfig, port: number, now: number): Promise<string> {
  const server = createServer();
  const bound = new Promise<void>((resolve, reject) =>
    server.once("error", reject).listen(port, listen, resolve),
  );
  try {
    await bound;
    return "free";
  } catch (error) {
    if (await isOurPort(dir, port, now)) return "a receiver of this folder listens there";
    throw error;
  } finally {
    server.close();
  }
}

/** Whether a receiver of this folder said within the last half minute that it serves a port. */
async function isOurPort(dir: string, port: number, now: number): Promise<boolean> {
  for (const name of await readdir(dir).catch(() => [])) {
    if (!/^\.receiver-\d+\.json$/.test(name)) continue;
    const path = join(dir, name);
    if (now - (statSync(path, { throwIfNoEntry: false })?.mtimeMs ?? 0) > 3 * STATE_EVERY_MS) continue;
    const text = await readFile(path, "utf8").catch(() => "");
    if (new RegExp(`"ports":\\[(\\d+,)*${port}[,\\]]`).test(text)) return true;
  }
  return false;
}

if (import.meta.main) {
  await runScript(
    {
      name: "receiver",
      about: "Takes log lines from shippers over HTTP and files them in batches, one per sender and window.",
      flags: {
        "port=N": "serve the group of this port alone, as one process of several",
        "forget=HOST": "forget a host that is gone: its streams and names, once nothing of it waits",
      },
      check: checkReceiver,
    },
    main,
  );
}
