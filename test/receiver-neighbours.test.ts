/**
 * One bad neighbour stops nobody: attacks on real sockets with a good sender beside them, each bounded in time, and
 * what the log and the state file say of them.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readFileSync } from "node:fs";
import { chmod, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { connect, type Socket } from "node:net";
import { join } from "node:path";
import { HEADER } from "../lib/chunk.ts";
import { createLog } from "../lib/service.ts";
import { type Post, post } from "./sending.ts";
import {
  accessLine,
  freePort,
  onCleanup,
  ROOT,
  start,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(60_000);

const LINE = accessLine(1);
const GOOD = "a-good-token-of-24-signs";
const BAD = "a-stolen-token-of-24-sign";

async function setUp(options: object = {}, { tokens = {} as Record<string, object> } = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "data");
  const port = await freePort();
  await writeFile(join(folder, "good"), `${GOOD}\n`, { mode: 0o600 });
  await writeFile(join(folder, "bad"), `${BAD}\n`, { mode: 0o600 });
  const receiver = {
    dir,
    groups: [{ port, senders: ["*"] }],
    tokens: {
      "10.0.0.1": { file: join(folder, "good") },
      "10.0.0.2": { file: join(folder, "bad") },
      ...tokens,
    },
    ...options,
  };
  const config = await writeConfig(folder, { receiver });
  const running = startScript("receiver", config);
  await running.says("receiver listens");
  const url = `http://127.0.0.1:${port}`;
  const send = (body: string, request: Post & { token?: string } = {}) =>
    fetch(
      post(url, body, {
        ...request,
        headers: { Authorization: `Bearer ${request.token ?? GOOD}`, ...request.headers },
      }),
    );
  /** Sends so many chunks one after the other as the good sender, and gives the longest time of one in ms. */
  let offset = 0;
  const good = async (chunks: number) => {
    let worst = 0;
    for (let i = 0; i < chunks; i++) {
      const started = performance.now();
      const answer = await send(LINE, { offset });
      await answer.bytes();
      expect(answer.status).toBe(200);
      offset += LINE.length;
      worst = Math.max(worst, performance.now() - started);
    }
    return worst;
  };
  const state = async () => JSON.parse(await readFile(join(dir, `.receiver-${port}.json`), "utf8"));
  return { folder, dir, port, url, send, good, state, receiver: running, config };
}

/** What a process has used of the processor so far. */
function cpuSeconds(pid: number | undefined): number {
  const fields = readFileSync(`/proc/${pid}/stat`, "utf8")
    .replace(/^.*\) /, "")
    .split(" ");
  return (Number(fields[11]) + Number(fields[12])) / 100;
}

/** A connection that sends bytes as they are and stays. */
function hang(port: number, bytes: string): Promise<Socket> {
  return new Promise((resolve, reject) => {
    const socket = connect(port, "127.0.0.1", () => socket.write(bytes, () => resolve(socket)));
    socket.on("error", reject);
    onCleanup(() => socket.destroy());
  });
}

function head(host: string, token: string, length: number, stream = "stream-0001"): string {
  return [
    "POST /upload HTTP/1.1",
    "Host: x",
    "Content-Type: text/plain",
    `Authorization: Bearer ${token}`,
    `${HEADER.host}: ${host}`,
    `${HEADER.stream}: ${stream}`,
    `${HEADER.offset}: 0`,
    `${HEADER.end}: ${length}`,
    `Content-Length: ${length}`,
    "\r\n",
  ].join("\r\n");
}

describe("a sender with a token of its own", () => {
  test("that announces bodies which do not come takes no place of others, and is told of its own limit", async () => {
    const { port, good, send, receiver, state } = await setUp();
    const before = await good(20);
    for (let i = 0; i < 600; i++) await hang(port, head("10.0.0.2", BAD, 100_000, `stream-${1000 + i}`));
    const during = await good(50);
    expect(during).toBeLessThan(Math.max(2000, 3 * before));
    const own = await send(LINE, { host: "10.0.0.2", token: BAD, stream: "one-more-stream" });
    expect(own.status).toBe(503);
    expect(own.headers.get("Retry-After")).toBe("1");
    expect(await own.text()).toContain("this sender");
    await until("the state file names who is pressed", async () =>
      (await state()).pressed.some(({ host }: { host: string }) => host === "10.0.0.2"),
    );
    expect(await receiver.stop()).toBe(0);
  });

  test("that sends a byte now and then is cut off, its connection closed, and gives its places back", async () => {
    const { port, good, send } = await setUp({ idleTimeoutSeconds: 2, maxRequests: 4 });
    const slow = await hang(port, head("10.0.0.2", BAD, 600));
    let answer = "";
    slow.on("data", (bytes) => (answer += bytes));
    const closed = new Promise((resolve) => slow.once("close", resolve));
    const drip = setInterval(() => slow.destroyed || slow.write("x"), 200);
    onCleanup(() => clearInterval(drip));
    expect((await send(LINE, { host: "10.0.0.2", token: BAD })).status).toBe(503);
    await good(5);
    await until("the slow one is cut off", async () => {
      const { status } = await send(LINE, { host: "10.0.0.2", token: BAD });
      return status === 200;
    });
    await closed;
    expect(answer).toMatch(/^HTTP\/1\.1 408 /);
    expect(answer.toLowerCase()).toContain("\r\nconnection: close\r\n");
  });

  test("that begins a stream with every request is bounded, in memory and on the disk, and stops nobody", async () => {
    const { dir, good, send, receiver, state } = await setUp({ maxStreamsPerHost: 300 });
    let worst = 0;
    let isOver = false;
    const beside = (async () => {
      while (!isOver) worst = Math.max(worst, await good(1));
    })();
    const counts = new Map<number, number>();
    let next = 0;
    const attack = async () => {
      while (next < 3000) {
        const stream = `stream-${String(next++).padStart(6, "0")}`;
        const { status } = await send(LINE, { host: "10.0.0.2", token: BAD, stream });
        counts.set(status, (counts.get(status) ?? 0) + 1);
      }
    };
    await Promise.all(Array.from({ length: 16 }, attack));
    isOver = true;
    await beside;
    expect(Object.fromEntries(counts)).toEqual({ 200: 300, 503: 2700 });
    process.stderr.write(`worst wait beside a stream per request: ${Math.round(worst)} ms\n`);
    expect(worst).toBeLessThan(2000);
    const memory = await readFile(`/proc/${receiver.process.pid}/status`, "utf8");
    expect(Number(/^VmRSS:\s+(\d+)/m.exec(memory)?.[1])).toBeLessThan(250_000);
    await until("the state file names who is pressed", async () => (await state()).pressed.length > 0);
    expect(await receiver.stop()).toBe(0);
    expect((await readFile(join(dir, "10.0.0.2", ".ledger"))).length).toBeLessThan(150_000);
  });
});

describe("a stranger", () => {
  test("who guesses tokens costs one look-up, with 5,000 tokens as with 1,000", async () => {
    const costs: number[] = [];
    for (const count of [1000, 5000]) {
      const folder = await tempFolder();
      const tokens: Record<string, object> = {};
      for (let i = 0; i < count; i++) {
        const file = join(folder, `t${i}`);
        await writeFile(file, `token-of-host-number-${i}-long-enough`, { mode: 0o600 });
        tokens[`10.1.${i >> 8}.${i & 255}`] = { file };
      }
      const { good, send, receiver } = await setUp({}, { tokens });
      await good(5);
      await send(LINE, { token: "the first guess" }); // the table is made
      const before = cpuSeconds(receiver.process.pid);
      const guesses = Array.from({ length: 600 }, (_, i) => send(LINE, { token: `guess-${i}` }));
      expect(await good(20)).toBeLessThan(2000);
      const statuses = await Promise.all(guesses.map(async (answer) => (await answer).status));
      expect(new Set(statuses)).toEqual(new Set([401]));
      costs.push(cpuSeconds(receiver.process.pid) - before);
      expect(await receiver.stop()).toBe(0);
    }
    process.stderr.write(`CPU of 600 guesses at 1,000 and 5,000 tokens: ${costs.join(" s, ")} s\n`);
    // 50 ms each when every file is looked at; the table may be made anew meanwhile
    expect(costs[1]).toBeLessThan(2 * (costs[0] ?? 0) + 1);
  });

  test("is in the log once a minute by address and reason, and in the state file with the count", async () => {
    const { send, receiver, state } = await setUp();
    for (let i = 0; i < 50; i++) await send(LINE, { token: `guess-${i}` });
    await send(LINE, { host: "10.0.0.2" });
    const row = await until("the state file has the refusals", async () =>
      (await state()).refused.find(
        ({ reason, count }: { reason: string; count: number }) => reason === "unknown token" && count === 50,
      ),
    );
    expect(row).toMatchObject({ peer: "127.0.0.1", host: "10.0.0.1", reason: "unknown token", count: 50 });
    await receiver.says("token of another host");
    const lines = receiver.output.split("\n").filter((line) => line.includes("request refused"));
    expect(lines.length).toBe(2);
    expect(lines[0]).toMatch(
      / warn request refused peer=127\.0\.0\.1 reason="unknown token" status=401 host=10\.0\.0\.1 times=1$/,
    );
    expect(receiver.output).not.toContain("guess");
    expect(receiver.output).not.toContain(GOOD);
  });

  test("who holds more connections than there are descriptors does not keep files from being opened", async () => {
    const folder = await tempFolder();
    const port = await freePort();
    const config = await writeConfig(folder, {
      receiver: { dir: join(folder, "data"), groups: [{ port, senders: ["*"] }] },
    });
    const command = `ulimit -n 256; exec "${process.execPath}" run "${join(ROOT, "receiver.ts")}" --config "${config}"`;
    const receiver = start("bash", ["-c", command]);
    await receiver.says("receiver listens");
    let offset = 0;
    const send = async (window: string) => {
      const line = accessLine(1, `22/Nov/2026:${window}:01 +0600`);
      const answer = await fetch(post(`http://127.0.0.1:${port}`, line, { offset })).catch(() => undefined);
      if (answer?.status === 200) offset += line.length;
      return answer?.status === 200;
    };
    expect(await send("00:20")).toBe(true);
    for (let i = 0; i < 400; i++) connect(port, "127.0.0.1").on("error", () => {});
    await receiver.says("descriptors are scarce");
    for (let hour = 1; hour < 10; hour++) {
      const started = performance.now();
      await until("a line of a new window is stored", () => send(`0${hour}:20`), 5000);
      expect(performance.now() - started).toBeLessThan(2000);
    }
    expect(await receiver.stop()).toBe(0);
  });

  test("whose connections say nothing, or half a header, bit by bit, is cut off after ten seconds", async () => {
    const { port, good } = await setUp();
    const half = "POST /upload HTTP/1.1\r\nHost: x\r\n";
    const started = performance.now();
    const sockets = await Promise.all(
      Array.from({ length: 90 }, (_, i) => hang(port, i % 3 === 0 ? "" : half)),
    );
    const drip = setInterval(() => {
      for (const [i, socket] of sockets.entries()) if (i % 3 === 2 && !socket.destroyed) socket.write("a");
    }, 1500);
    onCleanup(() => clearInterval(drip));
    const closed = sockets.map((socket) => new Promise((resolve) => socket.once("close", resolve).resume()));
    expect(await good(20)).toBeLessThan(2000);
    await Promise.all(closed);
    const seconds = (performance.now() - started) / 1000;
    expect(seconds).toBeGreaterThan(7);
    expect(seconds).toBeLessThan(20);
  });

  test("writes no signs of control into the log, by path, host, agent or a text of others", async () => {
    const { port, url, send, receiver } = await setUp();
    const socket = await hang(
      port,
      "POST /up\x1b[31m HTTP/1.1\r\nHost: x\r\nLog-Host: \x1b[2J\x9b1m\r\n\r\n",
    );
    await new Promise((resolve) => socket.once("data", resolve));
    await fetch(`${url}/%1b%5b31m%c2%9b`, { method: "POST" });
    const agent = { "Log-Agent": "\x9b31m", "Log-Host": "a\x9b" };
    expect((await send(LINE, { headers: agent })).status).toBe(400);
    await send(LINE, { token: "guess" });
    await receiver.says("unknown token");
    expect(receiver.output).not.toMatch(/[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]/);
    const lines: string[] = [];
    createLog((line) => lines.push(line)).warn("seen", {
      name: "a\u202eb\x9bc\x7f",
      error: "\x1b[2J\n",
      host: "web-ü",
    });
    const shown = 'name="a\\u202eb\\u009bc\\u007f" error="\\u001b[2J\\n" host=web-ü';
    expect(lines[0]).toEndWith(` warn seen ${shown}\n`);
  });

  test("learns nothing of hosts and ports: every answer without a token is 401", async () => {
    const { send, url } = await setUp();
    for (const host of ["10.0.0.1", "10.9.9.9", "constructor", "web-1.example"])
      expect((await send(LINE, { host, token: "none-of-them" })).status).toBe(401);
    expect((await fetch(`${url}/metrics`, { headers: { Host: "elsewhere.example" } })).status).toBe(401);
  });
});

describe("names", () => {
  test('the holder of "*" may not use one whose files would be those of a host that is named, or of an address', async () => {
    const folder = await tempFolder();
    await writeFile(join(folder, "all"), "everyone's-token-of-27-signs");
    const { send, dir } = await setUp(
      {},
      { tokens: { "*": { file: join(folder, "all") }, "web-1.example": { file: join(folder, "all") } } },
    );
    const token = "everyone's-token-of-27-signs";
    for (const host of [
      "10-0-0-1",
      "10.0.0-1",
      "10-7-7-7",
      "web.1.example",
      "2001-db8--1",
      "web-1-example",
    ]) {
      const answer = await send(LINE, { host, token });
      expect({ host, status: answer.status }).toEqual({ host, status: 403 });
    }
    for (const host of ["constructor", "prototype", "hasownproperty", "10.7.7.7", "web-2.example"]) {
      const answer = await send(LINE, { host, token });
      expect({ host, status: answer.status }).toEqual({ host, status: 200 });
    }
    for (const host of ["__proto__", "a".repeat(60), `${"a.".repeat(120)}aa`]) {
      const answer = await send(LINE, { host, token });
      expect({ host, status: answer.status }).toEqual({ host, status: host.length === 60 ? 200 : 400 });
    }
    for (const host of ["::ffff:10.0.0.1", "::ffff:0a00:0001"])
      expect((await send(LINE, { host, token })).status).toBe(403); // it has a token of its own
    expect((await readdir(dir)).filter((name) => !name.startsWith("."))).not.toContain("10-0-0-1");
  });
});

test('the holder of "*" makes no more names than it may, and those that are named get in all the same', async () => {
  const folder = await tempFolder();
  const token = "everyone's-token-of-27-signs";
  await writeFile(join(folder, "all"), token);
  const { send, good, state } = await setUp(
    { maxHosts: 20 },
    { tokens: { "*": { file: join(folder, "all") } } },
  );
  const statuses: number[] = [];
  for (let i = 0; i < 30; i++)
    statuses.push((await send(LINE, { host: `made-up-${i}.example`, token })).status);
  expect(statuses).toEqual([...Array(10).fill(200), ...Array(20).fill(503)]);
  await good(3);
  await until("the state file says how many there are", async () =>
    (await state()).pressed.some(
      ({ text }: { text: string }) => text === "10 of 10 hosts that no group lists are known",
    ),
  );
  const many = await setUp({}, { tokens: { "*": { file: join(folder, "all") } } });
  const answers: number[] = [];
  for (let i = 0; i < 130; i++)
    answers.push((await many.send(LINE, { host: `made-up-${i}.example`, token })).status);
  expect(answers.filter((status) => status === 200).length).toBeLessThanOrEqual(120); // a new minute may begin
  expect(answers.at(-1)).toBeOneOf([200, 503]);
  expect(answers).toContain(503);
  await many.good(3);
});

describe("tokens", () => {
  test("a file that vanishes gives 401, told once, and works again when it is back; others do not notice", async () => {
    const { folder, send, good, receiver } = await setUp();
    const file = join(folder, "bad");
    const request = { host: "10.0.0.2", token: BAD };
    expect((await send(LINE, request)).status).toBe(200);
    await rm(file);
    for (let i = 0; i < 5; i++) expect((await send(LINE, request)).status).toBe(401);
    await good(5);
    expect(receiver.output.split("token cannot be read").length).toBe(2);
    await writeFile(file, BAD, { mode: 0o600 });
    expect((await send(LINE, { ...request, offset: LINE.length })).status).toBe(200);
  });

  test("old and new one are valid together", async () => {
    const folder = await tempFolder();
    const files = await Promise.all(
      ["the-old-token-of-22-signs", "the-new-token-of-22-signs"].map(async (token, i) => {
        await writeFile(join(folder, `${i}`), token);
        return { file: join(folder, `${i}`) };
      }),
    );
    const { send } = await setUp({}, { tokens: { "10.0.0.3": files } });
    const request = { host: "10.0.0.3" };
    expect((await send(LINE, { ...request, token: "the-old-token-of-22-signs" })).status).toBe(200);
    const offset = LINE.length;
    expect((await send(LINE, { ...request, offset, token: "the-new-token-of-22-signs" })).status).toBe(200);
    expect((await send(LINE, { ...request, token: GOOD })).status).toBe(403);
  });

  test("short ones, one that others may read, and tokens without TLS to other machines are warned of at the start", async () => {
    const folder = await tempFolder();
    const file = join(folder, "short");
    await writeFile(file, "short");
    await chmod(file, 0o644);
    const { receiver } = await setUp({ listen: "0.0.0.0" }, { tokens: { "10.0.0.9": { file } } });
    for (const text of ["shorter than 16", `others may read ${file}`, "without TLS"])
      expect(receiver.output).toContain(text);
    expect(receiver.output).not.toContain("tokens.10.0.0.1:");
  });
});

test("a health check without a Host is answered, and every answer may not be kept by a cache", async () => {
  const { port, url } = await setUp();
  const socket = await hang(port, "GET /healthz HTTP/1.0\r\n\r\n");
  let text = "";
  socket.on("data", (data) => {
    text += data;
  });
  await until("an answer", () => text.includes("\r\n\r\n"));
  expect(text).toMatch(/^HTTP\/1\.[01] 200 /);
  expect(text.toLowerCase()).toContain("cache-control: no-store");
  for (const path of ["/healthz", "/", "/metrics", "/nothing", "/upload"]) {
    const answer = await fetch(url + path);
    expect({ path, cache: answer.headers.get("Cache-Control") }).toEqual({ path, cache: "no-store" });
    expect(answer.headers.get("X-Content-Type-Options")).toBe("nosniff");
  }
});
