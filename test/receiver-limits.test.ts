/** What one sender may make: streams, half lines, names, windows, chunks that come ahead; and what is told of it. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { zstdCompressSync } from "node:zlib";
import { type ChunkHeaders, formatMark, HEADER, MARK_BYTES } from "../lib/chunk.ts";
import { linesOfWindows, post } from "./sending.ts";
import { accessLine, freePort, startScript, tempFolder, until, writeConfig } from "./support.ts";

setDefaultTimeout(60_000);

const TEXT = Buffer.from(linesOfWindows(2000));

/** The chunk `[offset, end)` of the text as a shipper sends it. */
function chunk(url: string, offset: number, end: number, options: Partial<ChunkHeaders> = {}): Request {
  const mark = (at: number) => formatMark(TEXT.subarray(Math.max(0, at - MARK_BYTES), at));
  const how = offset === 0 ? { begin: "new" as const } : { from: mark(offset) };
  return post(url, TEXT.subarray(offset, end), { offset, ...{ mark: mark(end), ...how }, ...options });
}

/** Ends of lines, each about `bytes` behind the one before. */
function cuts(bytes: number, count: number): number[] {
  return Array.from({ length: count }, (_, i) => TEXT.indexOf(10, (i + 1) * bytes) + 1);
}

async function setUp(options: object = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "data");
  const port = await freePort();
  const receiver = { dir, groups: [{ port, senders: ["*"] }], ...options };
  const running = startScript("receiver", await writeConfig(folder, { receiver }));
  await running.says("receiver listens");
  const url = `http://127.0.0.1:${port}`;
  const send = async (request: Request) => {
    const answer = await fetch(request);
    return { status: answer.status, text: await answer.text(), headers: answer.headers };
  };
  const pressed = () =>
    until("the state file says who meets a limit", async () => {
      const state = await Bun.file(join(dir, `.receiver-${port}.json`)).json();
      return state.pressed.length > 0 && state.pressed;
    });
  const ask = async (host = "10.0.0.1") => {
    const answer = await fetch(`${url}/streams`, { method: "POST", headers: { [HEADER.host]: host } });
    return ((await answer.json()) as { streams: { stream: string; offset: number }[] }).streams;
  };
  return { dir, url, send, pressed, ask, running };
}

describe("a chunk that starts ahead of what is there", () => {
  test("waits for what is before it, whatever the order, and is compared anew then", async () => {
    const { url, send, ask } = await setUp();
    const [first = 0, ...ends] = cuts(4000, 8);
    expect((await send(chunk(url, 0, first))).status).toBe(200);
    const starts = [first, ...ends];
    const waiting = ends.map((end, i) => ({ i, request: () => send(chunk(url, starts[i] ?? 0, end)) }));
    const answers = await Promise.all(waiting.reverse().map(({ request }) => request()));
    expect(answers.map(({ status }) => status)).toEqual(ends.map(() => 200));
    expect((await ask())[0]?.offset).toBe(ends.at(-1));
  });

  test("gets 409 with offset and mark after about two seconds when nothing comes", async () => {
    const { url, send } = await setUp();
    const [first = 0, second = 0, third = 0] = cuts(4000, 3);
    await send(chunk(url, 0, first));
    const started = performance.now();
    const answer = await send(chunk(url, second, third));
    expect(answer.status).toBe(409);
    expect(answer.headers.get(HEADER.offset)).toBe(String(first));
    expect(answer.headers.get(HEADER.mark)).toBe(formatMark(TEXT.subarray(first - MARK_BYTES, first)));
    expect(performance.now() - started).toBeGreaterThan(1500);
    expect((await send(chunk(url, first, second))).status).toBe(200);
  });

  test("holds 32 MiB of all senders at most: the next ones are answered at once, and nobody else waits", async () => {
    const { url, send } = await setUp({ maxBytesInFlight: 1 << 30 });
    const [first = 0, second = 0] = cuts(4000, 2);
    await send(chunk(url, 0, first));
    const large = Buffer.from(accessLine(1).repeat((10 << 20) / accessLine(1).length));
    const packed = new Uint8Array(zstdCompressSync(large));
    const mark = formatMark(large.subarray(-MARK_BYTES));
    const order: number[] = [];
    const ahead = async (n: number) => {
      const offset = second + n * large.length;
      const headers = { "Content-Encoding": "zstd", [HEADER.mark]: mark, [HEADER.from]: mark };
      const { status } = await send(post(url, packed, { offset, end: offset + large.length, headers }));
      order.push(n);
      return status;
    };
    const held = [0, 1, 2].map(ahead);
    await until("three are held", async () => {
      const metrics = await fetch(`${url}/metrics`, { headers: { Host: "127.0.0.1" } });
      return /_requests_in_flight 3$/m.test(await metrics.text());
    });
    expect(await Promise.all([ahead(3), ahead(4)])).toEqual([409, 409]);
    expect((await send(post(url, accessLine(1), { host: "10.0.0.2" }))).status).toBe(200);
    expect(order.sort()).toEqual([3, 4]);
    expect(await Promise.all(held)).toEqual([409, 409, 409]);
  });
});

test("maxStreamsPerHost: those without a line go first, then 503 with the reason; others are not asked", async () => {
  const { url, send, ask, pressed } = await setUp({ maxStreamsPerHost: 5 });
  const line = accessLine(1);
  const begin = (stream: string, body = line) =>
    send(
      post(url, body, {
        stream,
        end: line.length,
        headers: { [HEADER.begin]: "1", [HEADER.mark]: formatMark(Buffer.from(line)) },
      }),
    );
  for (let i = 0; i < 3; i++) expect((await begin(`stream-000${i}`)).status).toBe(200);
  const empty = (stream: string) => {
    const headers = { [HEADER.begin]: "1", [HEADER.mark]: formatMark(Buffer.from(line)) };
    return send(post(url, "", { stream, headers: { ...headers, [HEADER.end]: String(line.length) } }));
  };
  for (const stream of ["without-1", "without-2"]) expect((await empty(stream)).status).toBe(200);
  expect(await ask()).toHaveLength(5);
  for (const stream of ["stream-0003", "stream-0004"]) expect((await begin(stream)).status).toBe(200);
  const names = (await ask()).map(({ stream }) => stream);
  expect(names.sort()).toEqual([0, 1, 2, 3, 4].map((i) => `stream-000${i}`));
  const many = await Promise.all(
    Array.from({ length: 20 }, (_, i) => begin(`stream-01${String(i).padStart(2, "0")}`)),
  );
  expect(new Set(many.map(({ status }) => status))).toEqual(new Set([503]));
  expect(many[0]?.text).toContain("has 5 streams already");
  expect(many[0]?.headers.get("Retry-After")).toBe("1");
  expect(await ask()).toHaveLength(5);
  expect((await send(post(url, line, { host: "10.0.0.2" }))).status).toBe(200);
  expect(await pressed()).toEqual([{ host: "10.0.0.1", text: expect.stringContaining("5 streams already") }]);
});

test("streams that begin at the same time are counted while they are on their way", async () => {
  const { url, send, ask } = await setUp({ maxStreamsPerHost: 8 });
  const line = accessLine(1);
  const headers = { [HEADER.begin]: "1", [HEADER.mark]: formatMark(Buffer.from(line)) };
  const all = await Promise.all(
    Array.from({ length: 30 }, (_, i) =>
      send(post(url, line, { stream: `stream-00${String(i).padStart(2, "0")}`, headers })),
    ),
  );
  expect(all.filter(({ status }) => status === 200)).toHaveLength(8);
  expect(await ask()).toHaveLength(8);
});

test("half lines: 16 at most, also of streams that begin at the same time", async () => {
  const { url, send, dir } = await setUp();
  const half = "no end of the line";
  const headers = { [HEADER.begin]: "1", [HEADER.mark]: formatMark(Buffer.from(half)) };
  const all = await Promise.all(
    Array.from({ length: 30 }, (_, i) =>
      send(post(url, half, { stream: `stream-00${String(i).padStart(2, "0")}`, headers })),
    ),
  );
  expect(all.filter(({ status }) => status === 200)).toHaveLength(16);
  expect(all.find(({ status }) => status === 503)?.text).toContain("16 half lines");
  const pieces = (await readdir(join(dir, "10.0.0.1"))).filter((name) => name.startsWith(".piece-"));
  expect(pieces).toHaveLength(16);
});

/** A line in a window of its own: of which there are 72 a day. */
function lineOfWindow(n: number): string {
  const two = (value: number) => String(value).padStart(2, "0");
  const [day, rest] = [1 + Math.floor(n / 72), n % 72];
  return accessLine(1, `${two(day)}/Jan/2026:${two(Math.floor(rest / 3))}:${two((rest % 3) * 20)}:01 +0000`);
}

test("maxNamesPerHour: a chunk that was begun is taken whole, then 503 and told; the others go on", async () => {
  const { url, send, pressed, dir } = await setUp({ maxNamesPerHour: 20, sealAfterSeconds: 3600 });
  let offset = 0;
  const add = async (from: number, to: number) => {
    const body = Array.from({ length: to - from }, (_, i) => lineOfWindow(from + i)).join("");
    const answer = await send(post(url, body, { offset }));
    if (answer.status === 200) offset += body.length;
    return answer;
  };
  expect((await add(0, 15)).status).toBe(200);
  expect((await add(15, 45)).status).toBe(200);
  const refused = await add(45, 46);
  expect(refused.status).toBe(503);
  expect(refused.text).toContain("20 batches this hour");
  expect((await add(10, 40)).status).toBe(200); // names that are there already
  expect((await send(post(url, lineOfWindow(1), { host: "10.0.0.2" }))).status).toBe(200);
  expect(await pressed()).toHaveLength(1);
  expect((await readdir(join(dir, "10.0.0.1"))).filter((name) => name.includes(".log"))).toHaveLength(45);
});

test("maxWindowsPerHost: the ones longest without a line are sealed", async () => {
  const { url, send, dir } = await setUp({
    maxWindowsPerHost: 4,
    sealAfterSeconds: 3600,
    sealLatestSeconds: 3600,
  });
  let offset = 0;
  for (const n of [0, 1, 2, 3, 4, 5, 0]) {
    const line = lineOfWindow(n);
    expect((await send(post(url, line, { offset }))).status).toBe(200);
    offset += line.length;
  }
  const sealed = async () => (await readdir(join(dir, "10.0.0.1"))).filter((name) => name.endsWith(".log"));
  await until("two are sealed", async () => (await sealed()).length >= 2);
  const open = (await readdir(join(dir, "10.0.0.1"))).filter((name) => name.endsWith(".part"));
  expect(open.length).toBeLessThanOrEqual(4);
  expect(open).toContain("accessLog_26010101_40-59_10-0-0-1.log.part");
});

test("thousands of windows in one body keep nobody waiting", async () => {
  const { url, send } = await setUp({ sealAfterSeconds: 0.5 });
  const body = Array.from({ length: 6000 }, (_, i) => lineOfWindow(i % 2000)).join("");
  let worst = 0;
  let offset = 0;
  let isOver = false;
  const line = accessLine(1);
  const good = (async () => {
    while (!isOver) {
      const started = performance.now();
      expect((await send(post(url, line, { host: "10.0.0.2", offset }))).status).toBe(200);
      offset += line.length;
      worst = Math.max(worst, performance.now() - started);
    }
  })();
  const bad = await send(post(url, body));
  await new Promise((resolve) => setTimeout(resolve, 3000)); // it is sealed meanwhile
  isOver = true;
  await good;
  expect(bad.status).toBe(200);
  process.stderr.write(`worst wait of another sender: ${Math.round(worst)} ms\n`);
  expect(worst).toBeLessThan(2000);
});
