/**
 * receiver: takes chunks of log lines over HTTP and files them in batches, one per sender and window.
 *
 * Promise: 200 means that the lines are on stable storage, once. The order of a commit, in lib/sender.ts:
 *   1. the lines are written at the committed length of their `.part`, and synced
 *   2. one ledger record (stream at offset, batch at length) is appended, and synced
 *   3. 200
 * A crash before the end of 2 leaves lines that the ledger does not count: the next start cuts them off, and the
 * shipper, that had no answer, sends the chunk again. A crash after 2 leaves a chunk whose repeat starts at an
 * offset that is committed already: 409, and the shipper goes on from there. So nothing is lost or doubled.
 * A batch is sealed (its name recorded as used up, then `.part` renamed) when its window is over and quiet.
 */
import { rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Hono } from "hono";
import { type Access, type Arrival, createAccess } from "./lib/access.ts";
import { readBody } from "./lib/body.ts";
import { HEADER, parseChunkHeaders, parseStreamHeaders, UPLOAD_PATH, WireError } from "./lib/chunk.ts";
import { createStore, type Store, StoreError } from "./lib/commit.ts";
import type { Config } from "./lib/config.ts";
import { makeFolder } from "./lib/durable.ts";
import { holdLock } from "./lib/lock.ts";
import { pageHeaders, renderPage } from "./lib/page.ts";
import { type Server, serve } from "./lib/serve.ts";
import { describe, EXIT, loop, OperatorError, runScript, type Service, VERSION } from "./lib/service.ts";
import { createStatusReader } from "./lib/status.ts";
import { createWindowFinder } from "./lib/timestamp.ts";

type ReceiverConfig = Config["receiver"];

const SEAL_EVERY_MS = 1000;
const RETRY_AFTER_SECONDS = "1";

async function main(service: Service<"receiver">): Promise<number> {
  const { config, log, signal } = service;
  const groups = servedGroups(service);
  await lockGroups(service, groups);
  const access = createAccess(config);
  const store = openStore(service);
  await store.start((host) => groups.includes(Math.max(0, access.groupOf(host))));
  const app = createApp(config, { access, store });
  const servers = groups.map((group) => listen(service, group, app));
  await loop(() => store.seal(), { everyMs: SEAL_EVERY_MS, signal });
  await Promise.all(servers.map((server) => server.close()));
  await store.close();
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
  throw new OperatorError(`No group has port ${flags.port}: ${configFile} has groups of ports ${ports}`);
}

/** One process per group: a second one on the same folder and port says so and ends. */
async function lockGroups({ config }: Service<"receiver">, groups: number[]): Promise<void> {
  const probe = join(config.dir, ".receiver-probe");
  try {
    await makeFolder(config.dir);
    await writeFile(probe, "");
    await rm(probe, { force: true });
  } catch (error) {
    throw new OperatorError(`Cannot write to receiver.dir ${config.dir}: ${describe(error)}`);
  }
  for (const index of groups) {
    const port = config.groups[index]?.port;
    await holdLock(join(config.dir, `.receiver-${port}.lock`), `The group of port ${port}`);
  }
}

function openStore({ config, log, now }: Service<"receiver">): Store {
  const findWindow = createWindowFinder(config.windowMinutes, config.timestampPattern);
  return createStore({ ...config, findWindow, log, now });
}

function listen(
  { config, log }: Service<"receiver">,
  group: number,
  app: ReturnType<typeof createApp>,
): Server {
  const port = config.groups[group]?.port ?? 0;
  try {
    const server = serve({
      hostname: config.listen,
      port,
      maxBodyBytes: config.maxBodyBytes,
      idleTimeoutSeconds: config.idleTimeoutSeconds,
      fetch: (request, peer) => app.fetch(request, { peer, group }),
    });
    log.info("receiver listens", { address: config.listen, port: server.port });
    return server;
  } catch (error) {
    throw new OperatorError(`Cannot listen on ${config.listen} port ${port}: ${describe(error)}`);
  }
}

/** What the app works with. */
export interface Parts {
  access: Access;
  store: Store;
}

/** The HTTP side: one app for all ports; the server tells by which a request came. */
export function createApp(config: ReceiverConfig, { access, store }: Parts) {
  const app = new Hono<{ Bindings: Arrival }>();

  app.get("/healthz", (c) => c.json({ status: "ok", version: VERSION }));

  const readStatus = createStatusReader(config, { ledgerOf: (host) => store.senders.get(host)?.ledger });
  app.get("/", async (c) => c.body(renderPage(await readStatus()), 200, pageHeaders));

  // Hono answers HEAD with what GET would, without the body.
  app.get(UPLOAD_PATH, async (c) => {
    const { headers } = c.req.raw;
    const { host, stream } = parseStreamHeaders(headers);
    access.authorise(host, headers, c.env);
    const offset = await store.committed(host, stream);
    return offset === undefined ? c.body(null, 404) : c.body(null, 200, { [HEADER.offset]: String(offset) });
  });

  app.post(UPLOAD_PATH, async (c) => {
    const { headers } = c.req.raw;
    const chunk = parseChunkHeaders(headers);
    access.authorise(chunk.host, headers, c.env);
    const body = await readBody(c.req.raw, { maxBytes: config.maxBodyBytes });
    const { conflict, lines, offset } = await store.commit({ ...chunk, body });
    c.header(HEADER.offset, String(offset));
    if (conflict) return c.text(`stream ${chunk.stream} is at ${offset}\n`, 409);
    return c.json({ lines, offset });
  });

  app.notFound((c) => c.text(`there is no ${c.req.method} ${c.req.path}\n`, 404));

  app.onError((error, c) => {
    if (!(error instanceof WireError || error instanceof StoreError)) throw error;
    if (error.status === 401) c.header("WWW-Authenticate", "Bearer");
    if (error.status === 503) c.header("Retry-After", RETRY_AFTER_SECONDS);
    return c.text(`${error.message}\n`, error.status as 400);
  });
  return app;
}

if (import.meta.main) {
  await runScript(
    {
      name: "receiver",
      about: "Takes log lines from shippers over HTTP and files them in batches, one per sender and window.",
      flags: { "port=N": "serve the group of this port alone, as one process of several" },
    },
    main,
  );
}
