/**
 * Strangers and floods on real sockets: what is hostile gets its 4xx or is cut off, nothing is written, memory
 * stays bounded, and the senders beside it do not notice.
 */
import { expect, test } from "bun:test";
import { existsSync, readFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { connect } from "node:net";
import { join } from "node:path";
import { constants, createGzip, createZstdCompress } from "node:zlib";
import fc from "fast-check";
import { linesOfWindows, post, sendAll, storedWindows } from "./sending.ts";
import {
  accessLine,
  freePort,
  type Running,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

const LINE = accessLine(1);

async function setUp(options: object = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "data");
  const port = await freePort();
  const receiver = { dir, groups: [{ port, senders: ["*"] }], ...options };
  const running = startScript("receiver", await writeConfig(folder, { receiver }), [], {
    RECEIVER_TOKEN: "secret",
  });
  await running.says("receiver listens");
  return { dir, port, url: `http://127.0.0.1:${port}`, receiver: running };
}

/** Peak memory of a process in MiB. */
function peakMiB({ process: { pid } }: Running): number {
  return Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;
}

/** Sends bytes as they are and gives what comes back, until the server closes or `ms` have passed. */
function talk(
  port: number,
  bytes: (string | Uint8Array)[],
  ms = 3000,
): Promise<{ text: string; closed: boolean }> {
  return new Promise((resolve) => {
    let text = "";
    const socket = connect(port, "127.0.0.1", () => {
      for (const part of bytes) socket.write(part);
    });
    const end = (closed: boolean) => {
      socket.destroy();
      resolve({ text, closed });
    };
    socket.on("data", (data) => {
      text += data.toString("latin1");
      if (text.includes("\r\n\r\n")) setTimeout(() => end(false), 20);
    });
    socket.on("close", () => end(true));
    socket.on("error", () => {}); // a server that cuts off is what is wanted
    setTimeout(() => end(false), ms);
  });
}

/** 4 GiB of zeros as 16 members or frames of 256 MiB: 4 MB of gzip, less of zstd. */
async function bomb(kind: "gzip" | "zstd"): Promise<Uint8Array<ArrayBuffer>> {
  const params = { [constants.ZSTD_c_compressionLevel]: 1 };
  const stream =
    kind === "gzip" ? createGzip({ level: 9 }) : createZstdCompress({ params, pledgedSrcSize: 256 << 20 });
  const parts: Buffer[] = [];
  stream.on("data", (part) => parts.push(part));
  const ended = new Promise((resolve) => stream.on("end", resolve));
  const zeros = Buffer.alloc(16 << 20);
  for (let i = 0; i < 16; i++) {
    if (!stream.write(zeros)) await new Promise((resolve) => stream.once("drain", resolve));
  }
  stream.end();
  await ended;
  const part = Buffer.concat(parts);
  return new Uint8Array(Buffer.concat(Array.from({ length: 16 }, () => part)));
}

test("bombs of 4 GiB get 413, with the receiver under 200 MiB", async () => {
  const { url, receiver, dir } = await setUp();
  for (const kind of ["gzip", "zstd"] as const) {
    const body = await bomb(kind);
    for (let i = 0; i < 3; i++) {
      const headers = { "Content-Encoding": kind };
      const answers = await Promise.all(
        [1, 2, 3, 4].map(() => fetch(post(url, body, { end: 2 ** 33, headers }))),
      );
      expect(answers.map(({ status }) => status)).toEqual([413, 413, 413, 413]);
    }
  }
  expect(peakMiB(receiver)).toBeLessThan(200);
  expect(await readdir(dir)).not.toContain("10.0.0.1");
});

test("raw requests that are wrong get a 4xx or are cut off, and nothing is written", async () => {
  const tokens = { "*": { env: "RECEIVER_TOKEN" } };
  const { port, dir, url, receiver } = await setUp({ tokens, maxBodyBytes: 100_000 });
  const request = (headers: string[], body: string | Uint8Array = "") => [
    `POST /upload HTTP/1.1\r\nHost: x\r\n${headers.map((header) => `${header}\r\n`).join("")}\r\n`,
    body,
  ];
  const chunk = ["Content-Type: text/plain", "Log-Stream: stream-0001", "Upload-Offset: 0", "Upload-End: 5"];
  const known = [...chunk, "Authorization: Bearer secret"];
  const length = "Content-Length: 5";
  const cases: Record<string, [(string | Uint8Array)[], RegExp]> = {
    "no token": [request([...chunk, "Log-Host: 10.0.0.1", length], "line\n"), /^HTTP\/1.1 401 /],
    "wrong token": [
      request([...chunk, "Log-Host: 10.0.0.1", "Authorization: Bearer x", length], "line\n"),
      /^HTTP\/1.1 401 /,
    ],
    "path as host": [request([...known, "Log-Host: ../../etc", length], "line\n"), /^HTTP\/1.1 400 /],
    "absolute host": [request([...known, "Log-Host: /etc", length], "line\n"), /^HTTP\/1.1 400 /],
    "our own folder": [request([...known, "Log-Host: sent", length], "line\n"), /^HTTP\/1.1 400 /],
    "NUL in host": [request([...known, "Log-Host: a\0b", length], "line\n"), /^HTTP\/1.1 400 /],
    "host of 10 MB": [
      request([...known, `Log-Host: ${"a".repeat(10_000_000)}`, length], "line\n"),
      /^(HTTP\/1.1 431 |$)/,
    ],
    "body over the limit": [
      request([...known, "Log-Host: 10.0.0.1", "Content-Length: 100001"], "x".repeat(100_001)),
      /^HTTP\/1.1 413 /,
    ],
    "body over the limit without length": [
      request(
        [...known, "Log-Host: 10.0.0.1", "Transfer-Encoding: chunked"],
        `186a1\r\n${"x".repeat(100_001)}\r\n0\r\n\r\n`,
      ),
      /^HTTP\/1.1 413 /,
    ],
    "body without end": [
      request([...known, "Log-Host: 10.0.0.1", "Content-Length: 50"], "line\n"),
      /^(HTTP\/1.1 4|$)/,
    ],
    "length and chunks": [
      request([...known, "Log-Host: 10.0.0.1", length, "Transfer-Encoding: chunked"], "0\r\n\r\n"),
      /^(HTTP\/1.1 4|$)/,
    ],
    "no HTTP": [["\x16\x03\x01\x02\x00 not http at all\r\n\r\n"], /^(HTTP\/1.1 4|$)/],
  };
  for (const [name, [bytes, expected]] of Object.entries(cases)) {
    const { text } = await talk(port, bytes, 1000);
    expect({ name, status: text.split("\r\n")[0] ?? "" }).toEqual({
      name,
      status: expect.stringMatching(expected),
    });
  }
  expect((await readdir(dir)).filter((name) => !name.startsWith("."))).toEqual([]);
  const headers = { Authorization: "Bearer secret" };
  expect((await fetch(post(url, LINE, { headers }))).status).toBe(200);
  expect(receiver.output).not.toContain("secret");
});

test("whatever /upload is sent, it answers, and keeps nothing of what it refuses", async () => {
  const { url, dir } = await setUp({ maxBodyBytes: 4096 });
  const text = fc.string({ maxLength: 80 }).map((value) => value.replace(/[^\x20-\x7e]/g, "?").trim());
  const number = fc.oneof(fc.integer().map(String), fc.double().map(String), text);
  const names = {
    "Log-Host": fc.oneof(fc.constant("10.0.0.1"), fc.ipV6(), fc.domain(), text),
    "Log-Stream": fc.oneof(fc.constant("stream-0001"), text),
    "Upload-Offset": fc.oneof(fc.constant("0"), number),
    "Upload-End": fc.oneof(fc.constant("4096"), number),
    "Log-Lag": number,
    "Content-Type": fc.oneof(fc.constant("text/plain"), text),
    "Content-Encoding": fc.oneof(fc.constant("zstd"), fc.constant("gzip"), fc.constant("identity"), text),
  };
  const input = fc.tuple(fc.record(names, { requiredKeys: [] }), fc.uint8Array({ maxLength: 5000 }));
  await fc.assert(
    fc.asyncProperty(input, async ([headers, body]) => {
      const answer = await fetch(`${url}/upload`, { method: "POST", headers, body: new Uint8Array(body) });
      expect([200, 400, 403, 409, 413, 415]).toContain(answer.status);
      expect((await answer.text()).length).toBeGreaterThan(0);
    }),
    { numRuns: 400, interruptAfterTimeLimit: 10_000, markInterruptAsFailure: false },
  );
  for (const name of await readdir(dir)) expect(name).toMatch(/^(\.receiver-\d+\.lock|[a-z0-9.:-]+)$/);
  expect(existsSync(join(dir, "..", "etc"))).toBe(false);
  expect((await fetch(`${url}/healthz`)).status).toBe(200);
}, 30_000);

test("200 senders at once, beside slow ones, each get all of their lines stored once", async () => {
  const { url, port, dir, receiver } = await setUp();
  const slow = Array.from({ length: 20 }, (_, i) => {
    const socket = connect(port, "127.0.0.1");
    socket.on("error", () => {});
    const head = `Log-Host: 10.9.9.${i}\r\nLog-Stream: stream-0001\r\nUpload-Offset: 0\r\nUpload-End: 1000000`;
    socket.write(
      `POST /upload HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\n${head}\r\nContent-Length: 1000000\r\n\r\nslow`,
    );
    return socket;
  });
  const hosts = Array.from({ length: 200 }, (_, i) => `10.1.${Math.floor(i / 100)}.${i % 100}`);
  const text = linesOfWindows(300, ["06:25"]);
  await Promise.all(hosts.map((host) => sendAll(url, host, Buffer.from(text), { chunkBytes: 5000 })));
  for (const host of hosts) {
    expect([...(await storedWindows(dir, host))]).toEqual([["26112206_20-39", text]]);
  }
  for (const socket of slow) socket.destroy();
  expect(peakMiB(receiver)).toBeLessThan(250);
  expect(await receiver.stop()).toBe(0);
}, 60_000);

test("SIGTERM answers what is in hand and exits 0, with connections open", async () => {
  const { url, port, receiver, dir } = await setUp();
  const idle = connect(port, "127.0.0.1");
  idle.on("error", () => {});
  const sending = sendAll(url, "10.0.0.1", Buffer.from(linesOfWindows(5000)), {
    signal: AbortSignal.timeout(2000),
  }).catch(() => {});
  await until("lines come", () => existsSync(join(dir, "10.0.0.1", ".ledger")));
  const started = Date.now();
  expect(await receiver.stop()).toBe(0);
  expect(Date.now() - started).toBeLessThan(5000);
  idle.destroy();
  await sending;
});
