/**
 * Outgrowing one middle server: the real HAProxy with deploy/haproxy.cfg, and the real nginx with deploy/nginx.conf,
 * in front of two receivers, each with its own folder and forwarder. One receiver is killed and comes back while
 * six senders write.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { appendFile, mkdir, readdir, readFile, stat, writeFile } from "node:fs/promises";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { connect as connectTls } from "node:tls";
import { compareBatchNames, listBatches, listHosts, parseBatchName } from "../lib/batch.ts";
import {
  accessLine,
  expectSameLines,
  findProgram,
  freePort,
  missing,
  onCleanup,
  PATIENCE_MS,
  ROOT,
  type Running,
  runScriptOnce,
  selfSigned,
  start,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(120_000);

const HOSTS = [1, 2, 3, 4, 5, 6].map((n) => `10.10.21.18${n}`);
const TOKEN = "one-token-of-thirty-two-characters";
const ROUNDS = 30;
const LINES_PER_ROUND = 20;

/** One middle server: a receiver, its folder, and a forwarder to the target that both share. */
interface Middle {
  port: number;
  dir: string;
  config: string;
  receiver: Running;
  /** The senders that reached it so far. */
  hosts: string[];
}

/** Where a proxy listens, and the certificate to trust. */
interface Proxy {
  port: number;
  ca: string;
}
type StartProxy = (folder: string, middles: Middle[]) => Promise<Proxy>;

test.skipIf(missing({ haproxy: "haproxy", openssl: "openssl" }))(
  "HAProxy by hash of the sender: one of two receivers is killed and comes back, every line arrives once",
  async () => {
    const senders = await sendThrough(startHaproxy);
    // HAProxy hashes onto the servers' numbers, so that which sender goes where does not depend on our ports.
    for (const hosts of senders) expect(hosts.length).toBeGreaterThan(0);
  },
);

test.skipIf(missing({ nginx: "nginx-light", openssl: "openssl" }))(
  "nginx by hash of the sender: one of two receivers is killed and comes back, every line arrives once",
  async () => {
    await sendThrough(startNginx);
  },
);

/** Writes, kills, delivers and compares; the senders that each middle server had. */
async function sendThrough(startProxy: StartProxy): Promise<string[][]> {
  const folder = await tempFolder();
  const target = join(folder, "target");
  await mkdir(target);
  const middles = [await startMiddle(folder, 1, target), await startMiddle(folder, 2, target)];
  const proxy = await startProxy(folder, middles);
  const logs = new Map<string, string>();
  for (const host of HOSTS) logs.set(host, await startSender(folder, host, proxy));

  const written = new Map(HOSTS.map((host) => [host, ""]));
  let victim: Middle | undefined;
  for (let round = 0; round < ROUNDS; round++) {
    if (round === 10) {
      await until(
        "every sender is heard",
        async () => (await sendersOf(middles)).flat().length === HOSTS.length,
      );
      victim = middles.sort((a, b) => b.hosts.length - a.hosts.length)[0];
      await victim?.receiver.stop("SIGKILL");
    }
    if (round === 20 && victim) {
      // The other receiver's senders were not held up by it.
      for (const middle of middles) {
        for (const host of middle === victim ? [] : middle.hosts) {
          await until(
            `${host} goes on`,
            async () => (await countLines(middle, host)) >= 15 * LINES_PER_ROUND,
          );
        }
      }
      victim.receiver = startScript("receiver", victim.config);
    }
    for (const [index, host] of HOSTS.entries()) {
      const lines = roundOfLines(index, round);
      await appendFile(logs.get(host) ?? "", lines);
      written.set(host, written.get(host) + lines);
    }
  }
  for (const host of HOSTS) {
    await until(`all lines of ${host} are received`, async () => {
      const counts = await Promise.all(middles.map((middle) => countLines(middle, host)));
      return counts.reduce((sum, count) => sum + count) >= ROUNDS * LINES_PER_ROUND;
    });
  }
  const senders = await sendersOf(middles);
  expect(senders.flat().sort()).toEqual(HOSTS); // each stuck to one receiver

  for (const middle of middles) {
    await until("every batch is sealed", async () => (await openBatches(middle)) === 0);
    expect(await runScriptOnce("forwarder", middle.config, ["--once"])).toMatchObject({ code: 0 });
  }
  for (const host of HOSTS) expectSameLines(await delivered(target, host), written.get(host) ?? "");
  return senders;
}

async function startMiddle(
  folder: string,
  number: number,
  target: string,
  more: object = {},
): Promise<Middle> {
  const [port, home] = [await freePort(), join(folder, `middle${number}`)];
  const dir = join(home, "received");
  await mkdir(dir, { recursive: true });
  const config = await writeConfig(home, {
    receiver: {
      groups: [{ port, senders: ["*"] }],
      dir,
      sealAfterSeconds: 2,
      trustedProxies: ["127.0.0.1"],
      ...more,
    },
    forwarder: { dir, target: `file://${target}`, report: join(home, "report.log") },
  });
  return { port, dir, config, receiver: startScript("receiver", config), hosts: [] };
}

/** Starts HAProxy with the example from deploy/, on other ports and with a certificate for 127.0.0.1. */
async function startHaproxy(folder: string, middles: Middle[]): Promise<Proxy> {
  const { cert, both } = await selfSigned();
  const port = await freePort();
  const text = (await readFile(join(ROOT, "deploy/haproxy.cfg"), "utf8"))
    .replace("bind :5443", `bind 127.0.0.1:${port}`)
    .replace("/etc/log-rt-sync/haproxy.pem", both)
    .replace("10.10.23.212:5001", `127.0.0.1:${middles[0]?.port}`)
    .replace("10.10.23.213:5001", `127.0.0.1:${middles[1]?.port}`);
  const file = join(folder, "haproxy.cfg");
  await writeFile(file, text);
  start(findProgram("haproxy") ?? "haproxy", ["-db", "-f", file]);
  return answering({ port, ca: cert });
}

/** Starts nginx with the example from deploy/, in the same way. */
async function startNginx(folder: string, middles: Middle[]): Promise<Proxy> {
  const { cert, key } = await selfSigned();
  const port = await freePort();
  const text = (await readFile(join(ROOT, "deploy/nginx.conf"), "utf8"))
    .replace("listen 5443", `listen 127.0.0.1:${port}`)
    .replace("/etc/log-rt-sync/cert.pem", cert)
    .replace("/etc/log-rt-sync/key.pem", key)
    .replace("127.0.0.1:5001", `127.0.0.1:${middles[0]?.port}`)
    .replace("127.0.0.1:5002", `127.0.0.1:${middles[1]?.port}`);
  const file = join(folder, "nginx.conf");
  const temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(
    (name) => `${name}_temp_path ${folder}/${name};`,
  );
  const head = `daemon off; master_process off; pid ${folder}/pid; error_log stderr;\nevents {}\n`;
  await writeFile(file, `${head}http {\n${temp.join("\n")}\n${text}\n}\n`);
  start(findProgram("nginx") ?? "nginx", ["-p", folder, "-c", file]);
  return answering({ port, ca: cert });
}

async function answering(proxy: Proxy): Promise<Proxy> {
  const trust = { tls: { ca: await readFile(proxy.ca, "utf8") } } as RequestInit;
  await until("the proxy answers", () =>
    fetch(`https://127.0.0.1:${proxy.port}/`, trust).catch(() => undefined),
  );
  return proxy;
}

/** Starts the shipper of one host; the path of its access.log. */
async function startSender(folder: string, host: string, proxy: Proxy): Promise<string> {
  const home = join(folder, host);
  const stateDir = join(home, "state");
  await mkdir(stateDir, { recursive: true });
  const log = join(home, "access.log");
  await writeFile(log, "");
  const receiver = `https://127.0.0.1:${proxy.port}`;
  const config = await writeConfig(home, {
    shipper: { files: [log], receiver, host, stateDir, ca: proxy.ca },
  });
  startScript("shipper", config);
  return log;
}

/** Lines over three windows of one hour, numbered so that no two are equal. */
function roundOfLines(sender: number, round: number): string {
  const minute = String(Math.floor((round / ROUNDS) * 60)).padStart(2, "0");
  const numbers = Array.from({ length: LINES_PER_ROUND }, (_, i) => i + round * LINES_PER_ROUND);
  return numbers.map((n) => accessLine(n + sender * 100_000, `22/Nov/2026:06:${minute}:01 +0600`)).join("");
}

async function countLines(middle: Middle, host: string): Promise<number> {
  const folder = join(middle.dir, host);
  let lines = 0;
  for (const name of await listBatches(folder, "open", "sealed")) {
    const text = await readFile(join(folder, name), "utf8").catch(() => ""); // sealed in between: counted next time
    lines += text.split("\n").length - 1;
  }
  return lines;
}

/** The senders that each middle server has lines of. */
async function sendersOf(middles: Middle[]): Promise<string[][]> {
  for (const middle of middles) {
    middle.hosts = [];
    for (const host of await listHosts(middle.dir)) {
      if ((await countLines(middle, host)) > 0) middle.hosts.push(host);
    }
  }
  return middles.map(({ hosts }) => hosts);
}

async function openBatches(middle: Middle): Promise<number> {
  let open = 0;
  for (const host of await listHosts(middle.dir)) {
    open += (await listBatches(join(middle.dir, host), "open")).length;
  }
  return open;
}

/** What the client has of one host, in the order of windows and parts. */
async function delivered(target: string, host: string): Promise<string> {
  const names = (await readdir(target)).filter(
    (name) => parseBatchName(name)?.host === host.replaceAll(".", "-"),
  );
  const texts = names.sort(compareBatchNames).map((name) => readFile(join(target, name), "utf8"));
  return (await Promise.all(texts)).join("");
}

/** Bytes that a body announces and half of which come, by senders with a wrong token. */
const BODY = 4 * 1024 * 1024;

test.skipIf(missing({ haproxy: "haproxy", openssl: "openssl" }))(
  "HAProxy: 4,005 silent connections of one address shut out no other, nor do bodies with a wrong token",
  async () => {
    const attacked = await startAttacked(startHaproxy);
    const silent = await knock(attacked.proxy.port, 4_005);
    const waits = await goodSender(attacked, 10);
    expect(Math.max(...waits)).toBeLessThan(2_000);
    expect(silent.filter((socket) => !socket.destroyed).length).toBeLessThanOrEqual(100); // the others were sent away
    for (const socket of silent) socket.destroy();
    await sendWrongBodies(attacked, 20);
    expect(Math.max(...(await goodSender(attacked, 5)))).toBeLessThan(2_000);
  },
);

test.skipIf(missing({ nginx: "nginx-light", openssl: "openssl" }))(
  "nginx keeps no byte of bodies with a wrong token, and its connections for the other addresses",
  async () => {
    const attacked = await startAttacked(startNginx);
    await sendWrongBodies(attacked, 20);
    expect(await bytesBelow(join(attacked.folder, "client_body"))).toBe(0);
    expect(await bytesBelow(join(attacked.folder, "proxy"))).toBe(0);
    // Slow requests of one address: at most 100 are let through, the rest is answered 503 at once.
    const slow = await knock(attacked.proxy.port, 150, attacked.proxy.ca);
    const waits = await goodSender(attacked, 10);
    expect(Math.max(...waits)).toBeLessThan(2_000);
    for (const socket of slow) socket.destroy();
  },
);

interface Attacked {
  folder: string;
  proxy: Proxy;
}

/** Two receivers with a token behind a proxy. */
async function startAttacked(startProxy: StartProxy): Promise<Attacked> {
  const folder = await tempFolder();
  const file = join(folder, "token");
  await writeFile(file, TOKEN, { mode: 0o600 });
  const middles = [];
  for (const number of [1, 2])
    middles.push(await startMiddle(folder, number, folder, { tokens: { "*": { file } } }));
  const attacked = { folder, proxy: await startProxy(folder, middles) };
  // A proxy answers before the receivers behind it do.
  await until("the receiver answers through the proxy", async () =>
    (await heartbeat(attacked)).includes(" 200 "),
  );
  return attacked;
}

/** A question with the right token, from another address of this machine; the first line of the answer. */
function heartbeat({ proxy }: Attacked): Promise<string> {
  return ask(proxy, "127.0.0.2", TOKEN, "/streams", "");
}

/**
 * Connections from 127.0.0.1 that say nothing; with a `ca`, ones that begin a request and never end its body. Gives them
 * when each is open or was sent away.
 */
async function knock(port: number, count: number, ca?: string): Promise<Socket[]> {
  const sockets: Socket[] = [];
  const trust = ca && (await readFile(ca, "utf8"));
  const head = `POST /upload HTTP/1.1\r\nHost: a\r\nLog-Host: 10.9.9.9\r\nContent-Length: ${BODY}\r\n\r\nx`;
  const settled: Promise<unknown>[] = [];
  for (let i = 0; i < count; i++) {
    const socket = trust
      ? connectTls({ port, host: "127.0.0.1", ca: trust }, () => socket.write(head))
      : connect({ port, host: "127.0.0.1" });
    sockets.push(socket);
    settled.push(
      new Promise((resolve) => {
        socket.on(trust ? "secureConnect" : "connect", resolve);
        socket.on("error", resolve);
        socket.on("close", resolve);
      }),
    );
    if (i % 200 === 199) await Promise.all(settled.splice(0));
  }
  await Promise.all(settled);
  onCleanup(() => {
    for (const socket of sockets) socket.destroy();
  });
  return sockets;
}

/** Milliseconds of each of some heartbeats. */
async function goodSender(attacked: Attacked, times: number): Promise<number[]> {
  const waits: number[] = [];
  for (let i = 0; i < times; i++) {
    const began = performance.now();
    expect(await heartbeat(attacked)).toContain(" 200 ");
    waits.push(performance.now() - began);
  }
  return waits;
}

/** Bodies of which half comes, each on a connection of its own, are refused. */
async function sendWrongBodies({ proxy }: Attacked, count: number): Promise<void> {
  const half = "x".repeat(BODY / 2);
  const wrong = () => ask(proxy, "127.0.0.1", "not-the-token-but-as-long-as-it", "/upload", half, BODY);
  const answers = await Promise.all(Array.from({ length: count }, wrong));
  for (const answer of answers) expect(answer).toContain(" 401 ");
}

/** The headers of a stream's first chunk. */
const CHUNK = `Content-Type: text/plain\r\nLog-Stream: aaaaaaaaaaaaaaaaaaaaaa\r\nLog-Begin: 1\r\nUpload-Offset: 0\r\nUpload-End: ${BODY}\r\nLog-Mark: 1024:aaaaaaaaaaaaaaaaaaaaaa\r\n`;

/** The first line of the answer to one request from a local address; empty when the connection ended without one. */
async function ask(
  proxy: Proxy,
  localAddress: string,
  token: string,
  path: string,
  body: string,
  announced = body.length,
): Promise<string> {
  const ca = await readFile(proxy.ca, "utf8");
  return new Promise((resolve) => {
    const socket = connectTls({ port: proxy.port, host: "127.0.0.1", localAddress, ca } as never, () => {
      const names = `Host: a\r\nLog-Host: 10.0.0.7\r\nAuthorization: Bearer ${token}\r\nConnection: close\r\n`;
      socket.write(`POST ${path} HTTP/1.1\r\n${names}${CHUNK}Content-Length: ${announced}\r\n\r\n`);
      socket.write(body);
    });
    let text = "";
    const end = () => {
      socket.destroy();
      resolve(text.split("\r\n")[0] ?? "");
    };
    socket.on("data", (data: Buffer) => {
      text += data;
      if (text.includes("\r\n")) end();
    });
    socket.on("error", end);
    socket.on("close", end);
    socket.setTimeout(PATIENCE_MS, end);
  });
}

async function bytesBelow(folder: string): Promise<number> {
  const names = await readdir(folder, { recursive: true }).catch(() => []);
  const sizes = await Promise.all(names.map(async (name) => (await stat(join(folder, name))).size));
  const files = await Promise.all(names.map(async (name) => (await stat(join(folder, name))).isFile()));
  return sizes.reduce((sum, size, i) => sum + (files[i] ? size : 0), 0);
}
