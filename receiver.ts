/**
 * receiver: takes chunks of log lines over HTTP and files them in batches, one per sender and window.
 *
 * Promise: 200 means that the lines are on stable storage, once. The order of a commit, in lib/store/sender.ts:
 *   1. the lines are written at the committed length of their `.part`, and synced
 *   2. one ledger record (stream at offset, batch at length) is appended, and synced
 *   3. 200
 * A crash before the end of 2 leaves lines that the ledger does not count: the next start cuts them off, and the
 * shipper, that had no answer, sends the chunk again. A crash after 2 leaves a chunk whose repeat starts at an
 * offset that is committed already: 409, and the shipper goes on from there. So nothing is lost or doubled.
 * A batch is sealed (its name recorded as used up, then `.part` renamed) when its window is over and quiet.
 */
import { readFileSync } from "node:fs";
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type Context, Hono, type Next } from "hono";
import { type Access, type Arrival, createAccess } from "./lib/access.ts";
import { createIntake, type Intake } from "./lib/body.ts";
import { HEADER, parseChunkHeaders, parseStreamHeaders, UPLOAD_PATH, WireError } from "./lib/chunk.ts";
import { type Config, ConfigError, secretFaults } from "./lib/config.ts";
import { makeFolder } from "./lib/durable.ts";
import { LEGACY_STREAM, parseLegacy } from "./lib/legacy.ts";
import { holdLock } from "./lib/lock.ts";
import { createMetrics, METRICS_TYPE, type Metrics } from "./lib/metrics.ts";
import { pageHeaders, renderPage } from "./lib/page.ts";
import { type ServeOptions, type Server, serve } from "./lib/runtime.ts";
import {
  EXIT,
  errorMessage,
  type Log,
  loop,
  OperatorError,
  runScript,
  type Service,
  UsageError,
  VERSION,
  wait,
} from "./lib/service.ts";
import { createStatusReader, type Status } from "./lib/status.ts";
import { createStore, type Store, StoreError } from "./lib/store/store.ts";
import { createWindowFinder } from "./lib/store/window.ts";

type ReceiverConfig = Config["receiver"];

/** Syncs that wait for the disk at once: the file system writes its journal once for all of them. */
const SYNCS_AT_ONCE = 16;
const SEAL_EVERY_MS = 1000;
const RETRY_AFTER_SECONDS = "1";
/** Makes a browser ask for a token, which goes into the field of the password. RFC 7617 wants the realm. */
const BROWSER_LOGIN = 'Basic realm="log-rt-sync"';
/** How long open connections may take to end after SIGTERM; what is in hand is answered long before. */
const CLOSE_MS = 2000;

async function main(service: Service<"receiver">): Promise<number> {
  const { config, log, now, signal } = service;
  const groups = servedGroups(service);
  const faults = checkSecrets(config); // else every sender would be refused, without an end
  if (faults.length > 0) throw new ConfigError(faults.map((fault) => `${service.configFile}: ${fault}`));
  const tls = readTls(config);
  await prepareFolder(config);
  await lockGroups(config, groups);
  const receiver = createReceiver(config, { log, now, signal });
  await receiver.store.start((host) => groups.includes(Math.max(0, receiver.access.groupOf(host))));
  const app = createApp(receiver);
  const servers = groups.map((group) => listen(service, group, app, tls));
  await loop(() => receiver.store.seal(), { everyMs: SEAL_EVERY_MS, signal });
  await Promise.race([Promise.all(servers.map((server) => server.close())), wait(CLOSE_MS)]);
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

/** One fault for each token and each file of `tls` that is not there. */
function checkSecrets({ tokens = {}, tls }: ReceiverConfig): string[] {
  const named = Object.entries(tokens).flatMap(([host, refs]) =>
    refs.map((token, index) => [refs.length > 1 ? `tokens.${host}[${index}]` : `tokens.${host}`, token]),
  );
  const files = Object.entries(tls ?? {}).map(([key, file]) => [`tls.${key}`, { file }]);
  return secretFaults("receiver", Object.fromEntries([...named, ...files]));
}

/** Throws an OperatorError when a file of `tls` cannot be read. */
function readTls({ tls }: ReceiverConfig): ServeOptions["tls"] {
  if (!tls) return undefined;
  const read = (path: string) => {
    try {
      return readFileSync(path, "utf8");
    } catch (error) {
      throw new OperatorError(`Cannot read receiver.tls file ${path}: ${errorMessage(error)}`);
    }
  };
  const { cert, key, clientCa } = tls;
  return { cert: read(cert), key: read(key), ...(clientCa && { clientCa: read(clientCa) }) };
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

type App = ReturnType<typeof createApp>;

function listen(
  { config, log }: Service<"receiver">,
  group: number,
  app: App,
  tls: ServeOptions["tls"],
): Server {
  const port = config.groups[group]?.port ?? 0;
  try {
    const server = serve({
      hostname: config.listen,
      port,
      maxBodyBytes: config.maxBodyBytes,
      idleTimeoutSeconds: config.idleTimeoutSeconds,
      ...(tls && { tls }),
      fetch: (request, peer) => app.fetch(request, { peer, group }),
    });
    log.info("receiver listens", { address: config.listen, port: server.port, tls: tls !== undefined });
    return server;
  } catch (error) {
    throw new OperatorError(`Cannot listen on ${config.listen} port ${port}: ${errorMessage(error)}`);
  }
}

/** What the app works with: who may come in, what is stored, what is told. */
export interface Receiver {
  access: Access;
  intake: Intake;
  store: Store;
  metrics: Metrics;
  status: () => Promise<Status>;
  log: Log;
  signal: AbortSignal;
}

/** The receiver without its ports. Nothing is on disk before the store is started or a chunk comes. */
export function createReceiver(
  config: ReceiverConfig,
  { log, now, signal }: { log: Log; now: () => number; signal: AbortSignal },
): Receiver {
  const metrics = createMetrics();
  const findWindow = createWindowFinder(config.windowMinutes, config.timestampPattern);
  const intake = createIntake(config);
  const store = createStore({
    ...config,
    ...{ findWindow, log, now },
    inHand: () => intake.requests,
    onCommit: metrics.commit,
  });
  const status = createStatusReader(config, {
    now,
    ledgerOf: (host) => store.senders.get(host)?.ledger,
  });
  return { access: createAccess(config), intake, store, metrics, status, log, signal };
}

/** The HTTP side: one app for all ports; the server tells by which a request came. */
export function createApp({ access, intake, store, metrics, status, log, signal }: Receiver) {
  const app = new Hono<{ Bindings: Arrival }>();

  app.use(async (_, next) => {
    if (signal.aborted) throw new WireError(503, "shutting down");
    await next();
  });

  app.get("/healthz", (c) => c.json({ status: "ok", version: VERSION }));

  // Hono answers HEAD with what GET would, without the body.
  app.get(UPLOAD_PATH, async (c) => {
    const { headers } = c.req.raw;
    const { host, stream } = parseStreamHeaders(headers);
    access.authorise(host, headers, c.env);
    const offset = await store.committed(host, stream);
    return offset === undefined ? c.body(null, 404) : c.body(null, 200, { [HEADER.offset]: String(offset) });
  });

  app.post(UPLOAD_PATH, (c) => {
    const type = (c.req.header("Content-Type") ?? "").split(";")[0]?.trim().toLowerCase();
    if (type === "text/plain") return takeChunk(c);
    if (type === "application/json") return takeLegacy(c);
    throw new WireError(415, `Content-Type ${JSON.stringify(type)} is not known; expected text/plain`);
  });

  async function takeChunk(c: Context<{ Bindings: Arrival }>): Promise<Response> {
    const { headers } = c.req.raw;
    const chunk = parseChunkHeaders(headers);
    access.authorise(chunk.host, headers, c.env);
    return intake.take(c.req.raw, async (body) => {
      const range = chunk.end - chunk.offset;
      if (body.length > range)
        throw new WireError(400, `body has ${body.length} bytes, its range only ${range}`);
      const outcome = await store.commit({ ...chunk, body });
      metrics.chunk(chunk.host, body.length, outcome);
      const { conflict, lines, offset } = outcome;
      c.header(HEADER.offset, String(offset));
      return conflict ? c.text(`stream ${chunk.stream} is at ${offset}\n`, 409) : c.json({ lines, offset });
    });
  }

  async function takeLegacy(c: Context<{ Bindings: Arrival }>): Promise<Response> {
    const { headers } = c.req.raw;
    access.checkLegacy(headers, c.env);
    return intake.take(c.req.raw, async (json) => {
      const { host, body } = parseLegacy(json);
      access.authoriseLegacy(host, headers, c.env);
      const outcome = await store.commit({ host, stream: LEGACY_STREAM, body });
      metrics.chunk(host, body.length, outcome);
      return c.text(`OK - ${outcome.lines} lines`);
    });
  }

  app.use("/", watchersOnly);
  app.use("/metrics", watchersOnly);
  app.get("/", async (c) => c.body(renderPage(await status()), 200, pageHeaders));
  app.get("/metrics", async (c) =>
    c.body(metrics.render(await status(), intake), 200, { "Content-Type": METRICS_TYPE }),
  );

  async function watchersOnly(c: Context<{ Bindings: Arrival }>, next: Next): Promise<void> {
    if (!access.mayWatch(c.req.raw.headers, c.env))
      throw new WireError(401, "a token is required, or loopback");
    await next();
  }

  app.notFound((c) => c.text(`there is no ${c.req.method} ${c.req.path}\n`, 404));

  app.onError((error, c) => {
    if (!(error instanceof WireError || error instanceof StoreError)) {
      log.error("request failed", { path: c.req.path, error: errorMessage(error) });
      return c.text("the receiver has a fault; see its log\n", 500);
    }
    metrics.refused(error.status);
    if (error.status === 401)
      c.header("WWW-Authenticate", c.req.path === UPLOAD_PATH ? "Bearer" : BROWSER_LOGIN);
    if (error.status === 503) c.header("Retry-After", RETRY_AFTER_SECONDS);
    return c.text(`${error.message}\n`, error.status as 400);
  });
  return app;
}

/** What only this host can tell, for `--check`. */
async function checkReceiver({ config }: Service<"receiver">): Promise<string[]> {
  const faults: string[] = [];
  const attempt = async (work: () => unknown) => {
    try {
      await work();
    } catch (error) {
      faults.push(errorMessage(error));
    }
  };
  await attempt(() => prepareFolder(config));
  return [...faults, ...checkSecrets(config)];
}

if (import.meta.main) {
  await runScript(
    {
      name: "receiver",
      about: "Takes log lines from shippers over HTTP and files them in batches, one per sender and window.",
      flags: { "port=N": "serve the group of this port alone, as one process of several" },
      callsAtOnce: SYNCS_AT_ONCE,
      check: checkReceiver,
    },
    main,
  );
}
