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
import { createHash, createPrivateKey, timingSafeEqual, X509Certificate } from "node:crypto";
import { readFileSync, statSync } from "node:fs";
import { readFile, rm, writeFile } from "node:fs/promises";
import { hostname, networkInterfaces } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import {
  constants,
  createGunzip,
  gunzipSync,
  type ZstdOptions,
  zstdDecompress,
  zstdDecompressSync,
} from "node:zlib";
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
import {
  type Config,
  ConfigError,
  parseConfig,
  readSecret,
  type SecretRef,
  secretFaults,
} from "./lib/config.ts";
import { exists, makeFolder, writeDurably } from "./lib/durable.ts";
import {
  addressIsValid,
  clientOfHop,
  createMatcher,
  isLoopback,
  parseHost,
  plainAddress,
} from "./lib/host.ts";
import { readLedger } from "./lib/ledger.ts";
import { holdLock } from "./lib/lock.ts";
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
  runScript,
  type Service,
  UsageError,
  VERSION,
  wait,
} from "./lib/service.ts";
import { writeState } from "./lib/state.ts";
import { createStatusReader, type Status } from "./lib/status.ts";
import { createStore as createOldStore, StoreError } from "./lib/store/store.ts";
import { compileFormat, createWindowFinder } from "./lib/store/window.ts";

type ReceiverConfig = Config["receiver"];
type MonitorConfig = Config["monitor"];

/** Syncs that wait for the disk at once: the file system writes its journal once for all of them. */
const SYNCS_AT_ONCE = 16;
const SEAL_EVERY_MS = 1000;
/** How often the state file is written at least, and `.forget` looked for. */
const STATE_EVERY_MS = 10_000;
const FORGET_EVERY_MS = 30_000;
const HOUR_MS = 3_600_000;
const RETRY_AFTER_SECONDS = "1";
/** Makes a browser ask for a token, which goes into the field of the password. RFC 7617 wants the realm. */
const BROWSER_LOGIN = 'Basic realm="log-rt-sync"';
/** How long open connections may take to end after SIGTERM; what is in hand is answered long before. */
const CLOSE_MS = 2000;
/** A token that can be guessed: fewer signs than 96 bits in base64. */
const SHORT_TOKEN = 16;

async function main(service: Service<"receiver">): Promise<number> {
  const { config, log, now, signal } = service;
  if (service.flags.forget !== undefined) return leaveForget(service, String(service.flags.forget));
  const groups = servedGroups(service);
  const faults = findFaults(config); // else every sender would be refused, without an end
  if (faults.length > 0) throw new ConfigError(faults.map((fault) => `${service.configFile}: ${fault}`));
  await prepareFolder(config);
  await lockGroups(config, groups);
  const monitor = await readMonitorSection(service.configFile);
  for (const warning of findWarnings(config, service.configFile, monitor.fault))
    log.warn("config", { warning });
  const receiver = createReceiver(config, { log, now, signal, monitor: monitor.section });
  await receiver.store.start((host) => groups.includes(Math.max(0, receiver.access.groupOf(host))));
  const app = createApp(receiver);
  const ports = groups.map((group) => new Port(receiver, group, app));
  for (const port of ports) port.listen();
  const state = new StateFile(receiver, ports);
  await loop(
    async () => {
      await receiver.store.seal();
      for (const port of ports) await port.renew();
      await receiver.takeForgets();
      await state.write();
    },
    { everyMs: SEAL_EVERY_MS, signal },
  );
  await Promise.race([Promise.all(ports.map((port) => port.close())), wait(CLOSE_MS)]);
  await receiver.store.close();
  log.info("receiver stopped");
  return EXIT.done;
}

/** Indexes of the groups that this process serves: all, or the one of `--port`. */
function servedGroups({ config, configFile, flags }: Service<"receiver">): number[] {
  const all = config.groups.map((_, index) => index);
  if (flags.port === undefined) return all;
  const own = all.filter((index) => String(config.groups[index]?.port) === flags.port);
  if (own.length > 0) return own;
  const ports = config.groups.map((group) => group.port).join(", ");
  throw new UsageError(`No group has port ${flags.port}: ${configFile} has groups of ports ${ports}`);
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
      const old = this.#server;
      const closed = old?.close(); // connections that are open keep what they have
      closed?.catch(() => {});
      for (let tries = 1; ; tries++) {
        try {
          this.#serve(next);
          break;
        } catch (error) {
          if (tries === 20) throw error;
          await wait(50);
        }
      }
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

  close(): Promise<void> {
    return this.#server?.close() ?? Promise.resolve();
  }
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

/** What the app works with: who may come in, what is stored, what is told. */
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
  readonly status: () => Promise<Status>;
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
    this.store = createStore(this.#storeOptions(config));
    this.status = createStatusReader(config, {
      now,
      ledgerOf: (host) => this.store.senders.get(host)?.ledger,
    });
  }

  #storeOptions(config: ReceiverConfig) {
    const findWindow = createWindowFinder(config.windowMinutes, config);
    return { ...config, findWindow, log: this.log, now: this.now };
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

  /** Forgets the hosts that `--forget` named. */
  async takeForgets(): Promise<void> {
    if (this.now() - this.#forgetsAt < FORGET_EVERY_MS) return;
    this.#forgetsAt = this.now();
    for (const host of this.store.senders.keys()) {
      if (!(await exists(join(folders(this.config.dir).host(host), FORGET)))) continue;
      await this.store.forget(host);
      this.log.info("host forgotten", { host });
    }
  }
}

interface ReceiverOptions {
  log: Log;
  now: () => number;
  signal: AbortSignal;
  monitor?: MonitorConfig | undefined;
}

/** The receiver without its ports. Nothing is on disk before the store is started or a chunk comes. */
export function createReceiver(config: ReceiverConfig, options: ReceiverOptions): Receiver {
  return new Receiver(config, options);
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
    const [found] = await store.streams(host, [stream], {}, c.env.peer);
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

/** One chunk: admitted, read, stored, answered. */
async function takeChunk({ access, intake, store, counts }: Receiver, c: HttpContext): Promise<Response> {
  const { headers } = c.req.raw;
  const chunk = parseChunkHeaders(headers);
  const peer = access.authorise(chunk.host, headers, c.env);
  return intake.take(chunk.host, c.req.raw, async ({ body, encoded }) => {
    const range = chunk.end - chunk.offset;
    if (body.length > range)
      throw new WireError(400, `body has ${body.length} bytes, its range only ${range}`);
    const started = performance.now();
    const outcome = await store.commit({ ...chunk, body, peer, ...(encoded && { encoded }) });
    counts.chunk(chunk.host, body.length, outcome, performance.now() - started);
    const { kind, lines, offset, mark } = outcome;
    if (kind === "unknown")
      return c.text(`stream ${chunk.stream} is not known, and this is not its beginning\n`, 409);
    c.header(HEADER.offset, String(offset));
    if (kind === "stored") return c.json({ lines, offset });
    if (mark !== undefined && chunk.mark !== undefined) c.header(HEADER.mark, mark); // 1.0 has no marks
    return c.text(`receiver has stream ${chunk.stream} up to byte ${offset}\n`, 409);
  });
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
async function takeLegacy({ access, intake, store, counts }: Receiver, c: HttpContext): Promise<Response> {
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
    const started = performance.now();
    const outcome = await store.commit({ host, stream: LEGACY_STREAM, body, peer });
    counts.chunk(host, body.length, outcome, performance.now() - started);
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
  refusals.note({
    status,
    reason,
    host,
    peer: access.clientAddress(c.req.raw.headers, c.env),
    text: error.message,
  });
  if (status === 401)
    c.header("WWW-Authenticate", [UPLOAD_PATH, STREAMS_PATH].includes(c.req.path) ? "Bearer" : BROWSER_LOGIN);
  if (status === 503) c.header("Retry-After", RETRY_AFTER_SECONDS);
  return c.text(`${error.message}\n`, status as 400);
}

/** A text of others, fit for a log: one line of plain signs, not long. */
function printable(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, "?").slice(0, 200);
}

// ---- who may come in

/** Where a request came in: the other end's address, the port's group, and the names of its certificate. */
export interface Arrival {
  peer: string;
  group: number;
  /** With `tls.clientName`: what the client's certificate is for. */
  names?: string[];
}

/** The rules of a config. All is decided from the request and the config alone, before anything touches the disk. */
export class Access {
  readonly #config: ReceiverConfig;
  readonly #faults: FaultLog;
  readonly #serves: ((text: string) => boolean)[];
  readonly #listed: ((text: string) => boolean)[];
  readonly #isProxy: (text: string) => boolean;
  readonly #tokens: Map<string, SecretRef[]> | undefined;
  /** Hosts that someone named, by the dashed form of their batches. */
  readonly #named = new Map<string, string>();
  readonly #longest: number;
  readonly #now: () => number;
  /** SHA-256 of every token, for "known, but not yours"; made anew now and then. */
  #known = new Set<string>();
  #knownAt = Number.NEGATIVE_INFINITY;
  readonly #read = new Map<string, string>();

  constructor(
    config: ReceiverConfig,
    { log, now, expected }: { log: Log; now: () => number; expected: string[] },
  ) {
    this.#config = config;
    this.#now = now;
    this.#faults = createFaultLog(log, now);
    this.#serves = config.groups.map((group) => createMatcher(group.senders));
    this.#listed = config.groups.map(({ senders }) => createMatcher(senders.filter(addressIsValid)));
    this.#isProxy = createMatcher(config.trustedProxies);
    const tokens = config.tokens && Object.entries(config.tokens);
    this.#tokens = tokens && new Map(tokens.map(([host, refs]) => [parseHost(host) ?? host, refs]));
    const names = [
      ...config.groups.flatMap(({ senders }) => senders),
      ...expected,
      ...(this.#tokens?.keys() ?? []),
    ];
    for (const name of names) {
      const host = parseHost(name);
      if (host !== undefined) this.#named.set(dashedHost(host), host);
    }
    this.#longest = longestHost(config);
  }

  /** The client's own address: the last hop that is no trusted proxy. */
  clientAddress(headers: Headers, { peer }: Arrival): string {
    const hops = [...(headers.get("X-Forwarded-For") ?? "").split(",").map(clientOfHop), plainAddress(peer)];
    let hop = hops.pop() ?? "";
    while (this.#isProxy(hop) && hops.length > 0 && hops.at(-1) !== "") hop = hops.pop() ?? "";
    return hop;
  }

  /** Which group a sender belongs to; -1 for none. */
  groupOf(host: string): number {
    return this.#serves.findIndex((matches) => matches(host));
  }

  #checkGroup(host: string, { group }: Arrival): void {
    const own = this.groupOf(host);
    if (own < 0) throw new WireError(403, `host ${host} is in no group of this receiver`, "host in no group");
    if (own !== group)
      throw new WireError(
        421,
        `host ${host} belongs to port ${this.#config.groups[own]?.port}`,
        "host of another port",
      );
  }

  /** The client's address. Throws a WireError (400, 401, 403, 421) unless this request may speak for the host. */
  authorise(host: string, headers: Headers, arrival: Arrival): string {
    if (host.length > this.#longest)
      throw new WireError(
        400,
        `${HEADER.host} is longer than ${this.#longest} characters, the most that file names have room for`,
      );
    const address = this.clientAddress(headers, arrival);
    if (this.#tokens) this.#checkToken(host, headers); // first: a stranger learns nothing of groups
    this.#checkGroup(host, arrival);
    if (!this.#tokens && !this.#serves[arrival.group]?.(address))
      throw new WireError(
        403,
        `address ${address} is not among the senders of this port; list it, or set tokens`,
        "address not listed",
      );
    if (arrival.names && !arrival.names.includes(host))
      throw new WireError(
        403,
        `the client certificate is not for host ${host}`,
        "certificate of another host",
      );
    this.#checkName(host);
    return address;
  }

  /** The token must be one of the host's own, or of `*` when it has none. */
  #checkToken(host: string, headers: Headers): void {
    const shown = bearer(headers);
    if (shown === undefined) throw new WireError(401, "a bearer token is required", "no token");
    if (this.#isOneOf(shown, this.#tokens?.get(host) ?? this.#tokens?.get("*") ?? [])) return;
    if (this.#knows(shown))
      throw new WireError(403, `this token is not for host ${host}`, "token of another host");
    throw new WireError(401, "the token is not known", "unknown token");
  }

  #isOneOf(shown: string, refs: SecretRef[]): boolean {
    const hash = digest(shown);
    return refs.some((ref) => {
      const token = this.#tokenOf(ref);
      return token !== undefined && timingSafeEqual(hash, digest(token));
    });
  }

  /** Whether any host has this token. One look-up, however many there are: files are read again every ten seconds. */
  #knows(shown: string): boolean {
    if (this.#now() - this.#knownAt > 10_000) {
      const all = [...(this.#tokens?.values() ?? [])].flat().map((ref) => this.#tokenOf(ref));
      this.#known = new Set(
        all.flatMap((token) => (token === undefined ? [] : [digest(token).toString("hex")])),
      );
      this.#knownAt = this.#now();
    }
    return this.#known.has(digest(shown).toString("hex"));
  }

  /** A token; one that cannot be read now (its file vanished) fits nobody, and is told once. */
  #tokenOf(ref: SecretRef): string | undefined {
    const name = "env" in ref ? ref.env : ref.file;
    try {
      const token = readSecret(ref);
      this.#faults.recovered(name, "token can be read again", { token: name });
      if (this.#read.get(name) !== token) this.#knownAt = Number.NEGATIVE_INFINITY;
      this.#read.set(name, token);
      return token;
    } catch (error) {
      this.#faults.failed(name, "token cannot be read: whoever shows it is refused", {
        error: errorMessage(error),
      });
      return undefined;
    }
  }

  /** A name that nobody listed must not have the file names of one that somebody did, or of an address. */
  #checkName(host: string): void {
    const dashed = dashedHost(host);
    const owner = this.#named.get(dashed);
    if (owner === host) return;
    const looks = !host.includes(":") && !/^[\d.]+$/.test(host) && readsAsAddress(dashed);
    if (owner === undefined && !looks) return;
    const whose = owner === undefined ? "an address" : `host ${owner}`;
    throw new WireError(403, `host ${host} would have the file names of ${whose}`, "name of another host");
  }

  /** The original's form has no token: from listed addresses only. Gives that address, before the body is read. */
  checkLegacy(headers: Headers, arrival: Arrival): string {
    if (!this.#config.legacy)
      throw new WireError(
        415,
        "the JSON form is off; set receiver.legacy, or send text/plain",
        "JSON form is off",
      );
    const address = this.clientAddress(headers, arrival);
    if (!this.#listed[arrival.group]?.(address))
      throw new WireError(403, `address ${address} may not send the JSON form`, "address not listed");
    return address;
  }

  /** Its host must be listed by address, too; with tokens, it must be the very address: nobody speaks for another. */
  authoriseLegacy(host: string, address: string, arrival: Arrival): void {
    this.#checkGroup(host, arrival);
    if (host === address || (!this.#tokens && this.#listed[arrival.group]?.(host))) return;
    throw new WireError(
      403,
      `this address may not send the JSON form for host ${host}`,
      "host of another address",
    );
  }

  /** Whether a request may see status page and metrics: with the token for it, or without any from this machine itself. */
  mayWatch(headers: Headers, arrival: Arrival): boolean {
    const { viewToken } = this.#config;
    const refs = viewToken ? [viewToken] : this.#tokens?.get("*");
    if (!refs) return isLoopback(arrival.peer) && isDirect(headers);
    const shown = bearer(headers) ?? basicPassword(headers);
    return shown !== undefined && this.#isOneOf(shown, refs);
  }
}

/** What the longest file name leaves for a host: `<prefix>_<window>_<host>.<part>.log.gz.tmp` of at most 255 bytes. */
function longestHost({ prefix }: ReceiverConfig): number {
  return 255 - `${prefix}_26112206_20-39_.`.length - 16 - ".log.gz.tmp".length;
}

/** `10-10-21-181`, `2001-db8--1`: the dashed form of an address. */
function readsAsAddress(dashed: string): boolean {
  return addressIsValid(dashed.replaceAll("-", ".")) || addressIsValid(dashed.replaceAll("-", ":"));
}

/** A Host of this machine (no name that a stranger's page could be given), and no sign of a proxy. */
function isDirect(headers: Headers): boolean {
  const signs = ["Forwarded", "Via", "X-Real-IP", "X-Client-IP", "True-Client-IP"];
  if (
    [...headers.keys()].some((name) => /^(?:x-forwarded|cf)-/i.test(name)) ||
    signs.some((name) => headers.has(name))
  )
    return false;
  const name = URL.parse(`http://${headers.get("Host")}`)?.hostname.replace(/^\[|\]$/g, "") ?? "";
  const own = Object.values(networkInterfaces()).flatMap((some) => some?.map(({ address }) => address) ?? []);
  return isLoopback(name) || name === hostname().toLowerCase() || own.includes(name);
}

function bearer(headers: Headers): string | undefined {
  return /^Bearer +(\S+) *$/i.exec(headers.get("Authorization") ?? "")?.[1];
}

/** So that a browser can show a token: as the password, whatever the user name. */
function basicPassword(headers: Headers): string | undefined {
  const base64 = /^Basic +(\S+) *$/i.exec(headers.get("Authorization") ?? "")?.[1];
  return (
    base64 &&
    Buffer.from(base64, "base64")
      .toString()
      .replace(/^[^:]*:/, "")
  );
}

function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}

// ---- bodies

/** A body by this rate on average gets in; one that is slower is cut off after `idleTimeoutSeconds`. */
const MIN_RATE = 512;
/** A body of the usual chunk size, 1 MiB: decoded in place, larger ones in the pool. */
const USUAL_BYTES = 1_114_112;
const SMALL_BYTES = 65_536;
/** zstd windows up to 16 MiB, more than its highest common level uses: a frame may ask for far more memory. */
const ZSTD_PARAMS = { [constants.ZSTD_d_windowLogMax]: 24 };
/** Room behind the content, so that its end is seen without a second block. */
const SLACK_BYTES = 64;

export type IntakeLimits = Pick<
  ReceiverConfig,
  "maxBodyBytes" | "maxBytesInFlight" | "maxRequests" | "idleTimeoutSeconds"
>;

/** A body as lines, and as it came when that was another form. */
interface Body {
  body: Uint8Array;
  encoded?: { encoding: "gzip" | "zstd"; bytes: Uint8Array };
}

/** What one sender has in hand. */
interface Share {
  reading: number;
  requests: number;
  bytes: number;
}

/** Reads bodies within limits: one sender has a quarter at most, and a place only when its body is there. */
export class Intake {
  limits: IntakeLimits;
  /** Of all senders: requests whose body is there, and bytes. */
  requests = 0;
  bytes = 0;
  readonly #shares = new Map<string, Share>();
  #largeOnes: Promise<unknown> = Promise.resolve();

  constructor(limits: IntakeLimits) {
    this.limits = limits;
  }

  /** Reads and decodes a body and hands it to `work`; it counts as in hand until that is done. */
  async take<T>(sender: string, request: Request, work: (body: Body) => Promise<T>): Promise<T> {
    const { maxBodyBytes, maxRequests } = this.limits;
    const share = this.#shares.get(sender) ?? { reading: 0, requests: 0, bytes: 0 };
    if (Number(request.headers.get("Content-Length") ?? 0) > maxBodyBytes) throw tooLong(maxBodyBytes);
    if (share.reading >= Math.max(1, maxRequests / 4))
      throw busy("requests of this sender wait for their bodies");
    this.#shares.set(sender, share);
    let held = 0;
    const hold = (bytes: number) => {
      held += bytes;
      share.bytes += bytes;
      this.bytes += bytes;
      if (this.bytes > this.limits.maxBytesInFlight) throw busy("bytes at once");
      if (share.bytes > this.limits.maxBytesInFlight / 4 && share.bytes > held)
        throw busy("bytes of this sender at once");
    };
    let isPlaced = false;
    share.reading++;
    try {
      const raw = await this.#read(request, hold).finally(() => share.reading--);
      if (this.requests >= maxRequests) throw busy("requests at once");
      if (share.requests >= Math.max(1, maxRequests / 4)) throw busy("requests of this sender at once");
      isPlaced = true;
      this.requests++;
      share.requests++;
      return await work(await this.#decode(raw, request.headers.get("Content-Encoding"), hold));
    } finally {
      if (isPlaced) {
        this.requests--;
        share.requests--;
      }
      this.bytes -= held;
      share.bytes -= held;
      if (share.reading + share.requests === 0) this.#shares.delete(sender);
    }
  }

  /** Counted as it comes. One of a usual, known length is read by the runtime at half the cost, and counts from its beginning. */
  async #read(request: Request, hold: (bytes: number) => void): Promise<Uint8Array> {
    const { maxBytesInFlight } = this.limits;
    const announced = Number(request.headers.get("Content-Length") ?? Number.NaN);
    const late = Promise.withResolvers<never>();
    const mostMs = (this.limits.idleTimeoutSeconds + (announced || 0) / MIN_RATE) * 1000;
    const timer = setTimeout(() => late.reject(tooSlow()), mostMs);
    const inTime = <T>(work: Promise<T>) =>
      Promise.race([
        work.catch((error) => {
          throw new WireError(400, `body ended early: ${printable(errorMessage(error))}`);
        }),
        late.promise,
      ]);
    late.promise.catch(() => {});
    try {
      if (announced <= USUAL_BYTES && this.bytes + announced <= maxBytesInFlight / 2) {
        hold(announced);
        return new Uint8Array(await inTime(request.arrayBuffer()));
      }
      return await this.#readPieces(request, inTime, hold);
    } finally {
      clearTimeout(timer);
    }
  }

  /** A body that is large or of unknown length. */
  async #readPieces(
    request: Request,
    inTime: <T>(work: Promise<T>) => Promise<T>,
    hold: (bytes: number) => void,
  ): Promise<Uint8Array> {
    const { maxBodyBytes, idleTimeoutSeconds } = this.limits;
    const started = performance.now();
    const reader = request.body?.getReader();
    let body = new Uint8Array(SMALL_BYTES);
    let length = 0;
    while (reader) {
      const { value, done } = await inTime(reader.read());
      if (done) break;
      if (length + value.length > maxBodyBytes) throw tooLong(maxBodyBytes);
      hold(value.length);
      if (length + value.length > body.length) {
        const larger = new Uint8Array(Math.max(2 * body.length, length + value.length));
        larger.set(body.subarray(0, length));
        release(body);
        body = larger;
      }
      body.set(value, length);
      length += value.length;
      const seconds = (performance.now() - started) / 1000;
      if (seconds > idleTimeoutSeconds && length < (seconds - idleTimeoutSeconds) * MIN_RATE) throw tooSlow();
    }
    return body.subarray(0, length);
  }

  /** What is in a body. Throws a WireError: 415 for an unknown encoding, 413 when too much would come out, else 400. */
  async #decode(raw: Uint8Array, encoding: string | null, hold: (bytes: number) => void): Promise<Body> {
    const { maxBodyBytes } = this.limits;
    if (encoding === null || encoding === "identity" || (raw.length === 0 && encoding !== null)) {
      if (encoding === null || ["identity", "gzip", "zstd"].includes(encoding)) return { body: raw };
    }
    if (encoding !== "gzip" && encoding !== "zstd") {
      const shown = JSON.stringify(printable(encoding ?? "").slice(0, 60));
      throw new WireError(415, `Content-Encoding ${shown} is not known; expected gzip or zstd`);
    }
    const told = encoding === "zstd" ? contentOfZstd(raw) : undefined;
    if (told !== undefined && told > maxBodyBytes) throw tooLong(maxBodyBytes);
    const body = await this.#unpack(raw, encoding, told).catch((error) => {
      if (error instanceof WireError) throw error;
      if ((error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE") throw tooLong(maxBodyBytes);
      throw new WireError(400, `body is no ${encoding}, or cut short: ${printable(errorMessage(error))}`);
    });
    if (told !== undefined && body.length !== told)
      throw new WireError(400, `body says of itself ${told} bytes, and has ${body.length}`);
    hold(body.length);
    return { body, encoded: { encoding, bytes: raw } };
  }

  /** In place when it is of the usual size; what is larger goes to the pool, one at a time: a few bombs are one bomb. */
  async #unpack(raw: Uint8Array, encoding: "gzip" | "zstd", told = 8 * raw.length): Promise<Uint8Array> {
    const { maxBodyBytes } = this.limits;
    const most = Math.min(maxBodyBytes, USUAL_BYTES);
    const isZstd = encoding === "zstd";
    if (told <= most || !isZstd) {
      const chunkSize = Math.min(USUAL_BYTES, Math.max(1024, told + SLACK_BYTES));
      const options = { maxOutputLength: most, chunkSize };
      try {
        return isZstd
          ? zstdDecompressSync(raw, { ...options, params: ZSTD_PARAMS })
          : gunzipSync(raw, options);
      } catch (error) {
        const isLarge = (error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE";
        if (!isLarge || isZstd || most === maxBodyBytes) throw error;
      }
    }
    const options = { maxOutputLength: maxBodyBytes, chunkSize: told + SLACK_BYTES, params: ZSTD_PARAMS };
    const turn = this.#largeOnes.then(() =>
      isZstd ? unpackZstd(raw, options) : unpackGzip(raw, maxBodyBytes),
    );
    this.#largeOnes = turn.catch(() => {});
    return turn;
  }
}

/** Block by block: a bomb is given up at the limit, and its blocks are given back at once. */
async function unpackGzip(raw: Uint8Array, most: number): Promise<Uint8Array> {
  const stream = createGunzip({ chunkSize: 4 * SMALL_BYTES });
  const blocks: Uint8Array[] = [];
  let length = 0;
  stream.end(raw);
  try {
    for await (const block of stream as AsyncIterable<Uint8Array>) {
      blocks.push(block);
      length += block.length;
      if (length > most) throw tooLong(most);
    }
    return Buffer.concat(blocks, length);
  } finally {
    stream.destroy();
    for (const block of blocks) if (block.length === block.buffer.byteLength) release(block);
  }
}

const unpackZstd = promisify(zstdDecompress) as (
  raw: Uint8Array,
  options: ZstdOptions,
) => Promise<Uint8Array>;

function busy(what: string): WireError {
  return new WireError(503, `too many ${what}`, `too many ${what}`);
}

function tooSlow(): WireError {
  return new WireError(408, "body is too slow", "slow body");
}

function tooLong(maxBytes: number): WireError {
  return new WireError(413, `body is longer than ${maxBytes} bytes, before or after decompression`);
}

/** Gives memory back at once: the collector would let tens of megabytes of it pile up. */
function release({ buffer }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer) buffer.transfer(0);
}

/**
 * The length of what is in whole zstd frames, by RFC 8878 section 3.1. The decompressors of the runtimes give what they
 * have of a frame that was cut short, without an error. Throws a WireError (400) for that, for bytes that are something
 * else, and for a frame that does not tell.
 */
function contentOfZstd(bytes: Uint8Array): number {
  const wrong = new WireError(400, "body is no zstd, or cut short");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let content = 0;
  let at = 0;
  while (at + 8 <= bytes.length) {
    const magic = view.getUint32(at, true);
    if (magic >= 0x184d2a50 && magic <= 0x184d2a5f) {
      at += 8 + view.getUint32(at + 4, true); // a skippable frame
      continue;
    }
    if (magic !== 0xfd2fb528) throw wrong;
    const descriptor = bytes[at + 4] as number;
    const isSingle = (descriptor & 0x20) !== 0;
    const sizeFlag = descriptor >> 6;
    at += 5 + (isSingle ? 0 : 1) + ([0, 1, 2, 4][descriptor & 3] as number);
    const sizeBytes = sizeFlag === 0 ? (isSingle ? 1 : 0) : 1 << sizeFlag;
    if (sizeBytes === 0) throw new WireError(400, "a zstd frame must tell the length of its content");
    if (at + sizeBytes > bytes.length) throw wrong;
    content += readSize(view, at, sizeBytes);
    at += sizeBytes;
    for (let isLast = false; !isLast; ) {
      if (at + 3 > bytes.length) throw wrong;
      const block =
        (bytes[at] as number) | ((bytes[at + 1] as number) << 8) | ((bytes[at + 2] as number) << 16);
      isLast = (block & 1) === 1;
      const isRun = ((block >> 1) & 3) === 1;
      at += 3 + (isRun ? 1 : block >> 3);
    }
    if ((descriptor & 4) !== 0) at += 4;
  }
  if (at !== bytes.length) throw wrong;
  return content;
}

/** The size of a frame's content (section 3.1.1.1.4) in 1, 2, 4 or 8 bytes. */
function readSize(view: DataView, at: number, sizeBytes: number): number {
  if (sizeBytes === 1) return view.getUint8(at);
  if (sizeBytes === 2) return view.getUint16(at, true) + 256;
  return sizeBytes === 4 ? view.getUint32(at, true) : Number(view.getBigUint64(at, true));
}

// ---- what was refused

/** Rows of the table of refusals, and lines of the log in a minute: strangers decide how many there would be. */
const MOST_REFUSALS = 100;
const LINES_A_MINUTE = 60;

interface Refusal {
  host: string;
  peer: string;
  reason: string;
  count: number;
  since: number;
  at: number;
}

/** Refused requests by address and reason, for the log, the page and the metrics. */
export class Refusals {
  readonly #log: Log;
  readonly #now: () => number;
  readonly #rows = new Map<string, Refusal & { toldAt: number; told: number }>();
  /** Limits that a sender met, by host. */
  readonly #pressed = new Map<string, { text: string; at: number }>();
  /** Since the start, by status and reason. */
  readonly counts = new Map<string, { status: number; reason: string; count: number }>();
  #minute = 0;
  #lines = 0;
  changed = false;

  constructor(log: Log, now: () => number) {
    this.#log = log;
    this.#now = now;
  }

  note({
    status,
    reason,
    host,
    peer,
    text,
  }: Omit<Refusal, "count" | "since" | "at"> & { status: number; text: string }): void {
    const now = this.#now();
    const total = this.counts.get(`${status} ${reason}`) ?? { status, reason, count: 0 };
    total.count++;
    this.counts.set(`${status} ${reason}`, total);
    if (status === 503 || status === 507) {
      if (host !== "" && reason !== "shutting down") this.#press(host, text, now);
      return;
    }
    const key = `${peer} ${reason}`;
    const row = this.#rows.get(key) ?? {
      host,
      peer,
      reason,
      count: 0,
      since: now,
      at: now,
      toldAt: -Infinity,
      told: 0,
    };
    row.count++;
    row.at = now;
    row.host = host;
    this.#rows.delete(key); // the newest stand last
    this.#rows.set(key, row);
    const [oldest] = this.#rows.keys();
    if (this.#rows.size > MOST_REFUSALS && oldest !== undefined) this.#rows.delete(oldest);
    this.changed = true;
    if (now - row.toldAt < 60_000 || !this.#mayTell(now)) return;
    this.#log.warn("request refused", {
      peer: printable(peer),
      reason,
      status,
      host,
      times: row.count - row.told,
    });
    row.toldAt = now;
    row.told = row.count;
  }

  #press(host: string, text: string, at: number): void {
    if (!this.#pressed.has(host)) this.changed = true;
    this.#pressed.set(host, { text, at });
    const [oldest] = this.#pressed.keys();
    if (this.#pressed.size > MOST_REFUSALS && oldest !== undefined) this.#pressed.delete(oldest);
  }

  #mayTell(now: number): boolean {
    const minute = Math.floor(now / 60_000);
    if (minute !== this.#minute) this.#lines = 0;
    this.#minute = minute;
    return this.#lines++ < LINES_A_MINUTE;
  }

  /** Those of the last hour. */
  list(): Refusal[] {
    const after = this.#now() - HOUR_MS;
    return [...this.#rows.values()]
      .filter(({ at }) => at > after)
      .map(({ host, peer, reason, count, since, at }) => ({ host, peer, reason, count, since, at }));
  }

  /** Limits that a host met in the last ten minutes. */
  pressed(): { host: string; text: string }[] {
    const after = this.#now() - 600_000;
    return [...this.#pressed].filter(([, { at }]) => at > after).map(([host, { text }]) => ({ host, text }));
  }
}

/** `.receiver-<port>.json`: that this receiver runs, and whom it refuses, for the monitor and the page. */
class StateFile {
  readonly #receiver: Receiver;
  readonly #ports: Port[];
  readonly #faults: FaultLog;
  #at = Number.NEGATIVE_INFINITY;
  #health: string | undefined;

  constructor(receiver: Receiver, ports: Port[]) {
    this.#receiver = receiver;
    this.#ports = ports;
    this.#faults = createFaultLog(receiver.log, receiver.now);
  }

  /** Every ten seconds, and when something changed. */
  async write(): Promise<void> {
    const { config, refusals, store, startedAt, now } = this.#receiver;
    const health = store.health();
    if (!refusals.changed && health === this.#health && now() - this.#at < STATE_EVERY_MS) return;
    refusals.changed = false;
    this.#health = health;
    this.#at = now();
    const ports = this.#ports.map(({ port }) => port).sort((a, b) => a - b);
    const state = {
      version: 1,
      at: this.#at,
      startedAt,
      ports,
      ...(health !== undefined && { health }),
      refused: refusals.list(),
      pressed: refusals.pressed(),
    };
    try {
      await writeState(join(config.dir, `.receiver-${ports[0]}.json`), state);
      this.#faults.recovered("state", "state file is written again");
    } catch (error) {
      this.#faults.failed("state", "state file not written", { error: errorMessage(error) });
    }
  }
}

// ---- metrics

/** Upper bounds of the histogram of commits, in seconds. */
const COMMIT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5];
const PREFIX = "log_rt_sync_receiver_";
const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

type Count = { lines: number; bytes: number; chunks: number; duplicates: number };

/** What is counted since the start. */
class Counts {
  readonly hosts = new Map<string, Count>();
  readonly buckets = COMMIT_SECONDS.map(() => 0);
  seconds = 0;
  commits = 0;

  chunk(host: string, bytes: number, { kind, lines }: Outcome, ms: number): void {
    const count = this.hosts.get(host) ?? { lines: 0, bytes: 0, chunks: 0, duplicates: 0 };
    this.hosts.set(host, count);
    if (kind === "stored") {
      count.chunks++;
      count.lines += lines;
      count.bytes += bytes;
    } else count.duplicates++;
    this.commits++;
    this.seconds += ms / 1000;
    for (const [i, bound] of COMMIT_SECONDS.entries()) {
      if (ms / 1000 <= bound) this.buckets[i] = (this.buckets[i] ?? 0) + 1;
    }
  }
}

type Sample = [labels: Record<string, string>, value: number];
type Row = [name: string, type: "gauge" | "counter" | "histogram", help: string, samples: Sample[]];

/**
 * Prometheus' text format 0.0.4; names by its guide: one prefix, base units, `_total` on counters. What is in the
 * ledgers survives a restart; the rest is counted since the start.
 */
function renderMetrics({ counts, intake, refusals, store }: Receiver, status: Status): string {
  const counted = (key: keyof Count): Sample[] =>
    [...counts.hosts].map(([host, count]) => [{ host }, count[key]]);
  const told = (value: (host: Status["hosts"][number]) => number): Sample[] =>
    status.hosts.map((host) => [{ host: host.host }, value(host)]);
  const facts = (key: "skipped" | "untimed" | "ahead" | "gone"): Sample[] =>
    [...store.senders].map(([host, { ledger }]) => [{ host }, ledger.facts[key] ?? 0]);
  const one = (value: number): Sample[] => [[{}, value]];
  const refused = [...refusals.counts.values()].map(
    ({ status: code, reason, count }): Sample => [{ status: String(code), reason }, count],
  );
  const { disk } = status;
  const rows: Row[] = [
    ["build_info", "gauge", "Version that runs", [[{ version: VERSION }, 1]]],
    ["start_time_seconds", "gauge", "When it started", one(status.startedAt / 1000)],
    ["lines_total", "counter", "Lines stored since the start", counted("lines")],
    ["bytes_total", "counter", "Bytes of lines stored since the start", counted("bytes")],
    ["chunks_total", "counter", "Chunks taken since the start", counted("chunks")],
    ["duplicates_total", "counter", "Chunks answered 409", counted("duplicates")],
    ["refused_total", "counter", "Requests refused, by status and reason", refused],
    ["last_seen_timestamp_seconds", "gauge", "When a sender was heard of", told((h) => h.heardAt / 1000)],
    ["last_line_timestamp_seconds", "gauge", "When its last line came", told((h) => h.lineAt / 1000)],
    ["lag_bytes", "gauge", "Bytes that a sender still has to ship", told((h) => h.lag)],
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
    ["undelivered_bytes", "gauge", "Bytes in batches that still take lines", openBytes(store)],
    ["open_batches", "gauge", "Batches that still take lines", told((h) => h.open)],
    ["sealed_batches", "gauge", "Sealed batches that wait for the forwarder", told((h) => h.waiting)],
    ["failed_batches", "gauge", "Batches in failed/", told((h) => h.failed)],
    ["requests_in_flight", "gauge", "Requests in hand", one(intake.requests)],
    ["bytes_in_flight", "gauge", "Bytes of bodies in hand", one(intake.bytes)],
    ["disk_free_bytes", "gauge", "Free space of dir", disk ? one(disk.free) : []],
    ["disk_size_bytes", "gauge", "Size of dir's disk", disk ? one(disk.total) : []],
  ];
  return rows.map(formatRow).join("") + formatCommits(counts);
}

function openBytes(store: Store): Sample[] {
  return [...store.senders].map(([host, { ledger }]) => {
    const bytes = [...ledger.open.values()].reduce((sum, batch) => sum + batch.bytes, 0);
    return [{ host }, bytes];
  });
}

function formatRow([name, type, help, samples]: Row): string {
  const rows = samples.map(([labels, value]) => `${PREFIX}${name}${formatLabels(labels)} ${value}\n`);
  return rows.length === 0
    ? ""
    : `# HELP ${PREFIX}${name} ${help}.\n# TYPE ${PREFIX}${name} ${type}\n${rows.join("")}`;
}

function formatLabels(labels: Record<string, string>): string {
  const quote = (text: string) => text.replace(/[\\"]/g, "\\$&").replace(/\n/g, "\\n");
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${quote(value)}"`);
  return pairs.length > 0 ? `{${pairs.join(",")}}` : "";
}

function formatCommits({ buckets, seconds, commits }: Counts): string {
  const name = `${PREFIX}commit_duration_seconds`;
  const rows = buckets.map((n, i) => `${name}_bucket{le="${COMMIT_SECONDS[i]}"} ${n}\n`).join("");
  const head = `# HELP ${name} From a whole body to stable storage.\n# TYPE ${name} histogram\n`;
  return `${head}${rows}${name}_bucket{le="+Inf"} ${commits}\n${name}_sum ${seconds}\n${name}_count ${commits}\n`;
}

// ---- --forget

const FORGET = ".forget";

/** Leaves a mark that the running receiver, or the next one, takes. Throws an OperatorError when it is too early. */
async function leaveForget({ config, log, now }: Service<"receiver">, name: string): Promise<number> {
  const host = parseHost(name);
  if (host === undefined) throw new UsageError(`"${printable(name)}" is not an IP address or a host name`);
  const folder = folders(config.dir).host(host);
  const ledger = await readLedger(folder);
  if (!ledger) throw new OperatorError(`Host ${host} is not known in ${config.dir}`);
  const failed = await listBatches(folders(config.dir).failed, "sealed");
  const waiting = [
    ...(await listBatches(folder, "open", "sealed")),
    ...failed.filter((batch) => parseBatchName(batch)?.host === dashedHost(host)),
  ];
  if (waiting.length > 0)
    throw new OperatorError(
      `Host ${host} is not forgotten: ${waiting.length} of its batches wait, as ${waiting[0]}`,
    );
  const minutes = Math.round((now() - ledger.heardAt) / 60_000);
  if (minutes < 60)
    throw new OperatorError(
      `Host ${host} is not forgotten: it was heard ${minutes} minutes ago, less than an hour`,
    );
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

/** What is wrong with the config beyond its form: tokens, certificate, logFormat, names that are too long. */
function findFaults(config: ReceiverConfig): string[] {
  const { tokens = {}, tls, viewToken, logFormat = [], groups } = config;
  const secrets = Object.entries(tokens).flatMap(([host, refs]) =>
    refs.map((token, index) => [refs.length > 1 ? `tokens.${host}[${index}]` : `tokens.${host}`, token]),
  );
  const { clientName, ...files } = tls ?? {};
  const named = Object.entries(files).map(([key, file]) => [`tls.${key}`, { file }]);
  const unreadable = secretFaults(
    "receiver",
    Object.fromEntries([...secrets, ...named, ...(viewToken ? [["viewToken", viewToken]] : [])]),
  );
  const formats = logFormat.flatMap((format, index) => {
    try {
      compileFormat(format);
      return [];
    } catch (error) {
      return [`receiver.logFormat${logFormat.length > 1 ? `[${index}]` : ""}: ${errorMessage(error)}`];
    }
  });
  const most = longestHost(config);
  const long = groups.flatMap(({ senders }) => senders.filter((sender) => sender.length > most));
  const names = long.map(
    (name) =>
      `receiver.groups: ${name} is longer than ${most} characters, the most that file names have room for`,
  );
  const pair: string[] = [];
  if (tls && !unreadable.some((fault) => fault.includes(".tls."))) {
    try {
      readTls(tls);
    } catch (error) {
      pair.push(`receiver.tls: ${errorMessage(error)}`);
    }
  }
  if (clientName && !tls?.clientCa) pair.push("receiver.tls.clientName: needs clientCa");
  return [...unreadable, ...formats, ...names, ...pair];
}

/** What works, and should not stay so. */
function findWarnings(config: ReceiverConfig, configFile: string, monitorFault?: string): string[] {
  const { tokens, tls, listen, viewToken, timestampPattern, logFormat = [] } = config;
  const warnings: string[] = [];
  const secrets = Object.entries(tokens ?? {}).flatMap(([host, refs]) =>
    refs.map((ref) => ({ name: `tokens.${host}`, ref })),
  );
  if (viewToken) secrets.push({ name: "viewToken", ref: viewToken });
  for (const { name, ref } of secrets) {
    if (readSecretOrNone(ref).length < SHORT_TOKEN)
      warnings.push(
        `receiver.${name}: shorter than ${SHORT_TOKEN} characters; make one with: openssl rand -base64 32`,
      );
    if ("file" in ref && isReadByOthers(ref.file))
      warnings.push(`receiver.${name}: others may read ${ref.file}; chmod 640 it`);
  }
  if (isReadByOthers(configFile)) warnings.push(`others may read ${configFile}; chmod 640 it`);
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

function readSecretOrNone(ref: SecretRef): string {
  try {
    return readSecret(ref);
  } catch {
    return "x".repeat(SHORT_TOKEN); // told as a fault
  }
}

function isReadByOthers(file: string): boolean {
  return ((statSync(file, { throwIfNoEntry: false })?.mode ?? 0) & 0o004) !== 0;
}

/** What only this host can tell, for `--check`. */
async function checkReceiver({ config }: Service<"receiver">): Promise<string[]> {
  const faults = findFaults(config);
  await prepareFolder(config).catch((error) => faults.unshift(errorMessage(error)));
  return faults;
}

// ---- until the store has its own
interface Outcome {
  kind: "stored" | "conflict" | "unknown";
  lines: number;
  offset: number;
  mark?: string;
}
type OldChunk = Parameters<ReturnType<typeof createOldStore>["commit"]>[0];
type Store = ReturnType<typeof createStore>;
function createStore(options: Omit<Parameters<typeof createOldStore>[0], "inHand" | "onCommit">) {
  const old = createOldStore({ ...options, inHand: () => 1, onCommit: () => {} });
  return {
    ...old,
    async commit(chunk: OldChunk & { peer: string; encoded?: unknown; mark?: string }): Promise<Outcome> {
      const { conflict, lines, offset } = await old.commit(chunk);
      return { kind: conflict ? "conflict" : "stored", lines, offset };
    },
    async streams(host: string, names: string[] | undefined, _news: object, _peer: string) {
      const all = names ?? [...(old.senders.get(host)?.ledger.streams.keys() ?? [])];
      const found = await Promise.all(
        all.map(async (stream) => ({ stream, offset: await old.committed(host, stream) })),
      );
      return found.flatMap(({ stream, offset }) => (offset === undefined ? [] : [{ stream, offset }]));
    },
    configure(_: object) {},
    async forget(_: string) {},
    health: (): string | undefined => undefined,
  };
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
      callsAtOnce: SYNCS_AT_ONCE,
      check: checkReceiver,
    },
    main,
  );
}
