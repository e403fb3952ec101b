/** The wire as DESIGN section 4 has it, without a port: what a chunk, a question and a sender of 1.0 are answered. */
import { describe, expect, test } from "bun:test";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { formatMark, formatNews, HEADER, STREAMS_PATH } from "../lib/chunk.ts";
import { parseConfig } from "../lib/config.ts";
import { DEFAULT_THRESHOLDS } from "../lib/snapshot.ts";
import { observe } from "../lib/status.ts";
import { createApp, Receiver } from "../receiver.ts";
import { type Post, post, quiet } from "./sending.ts";
import { accessLine, onCleanup, tempFolder } from "./support.ts";

const HOST = "10.0.0.1";
const SHIPPER = "shipper-of-this-test";
const LINES = accessLine(1) + accessLine(2) + accessLine(3);
const END = accessLine(1).length;

async function open(options: object = {}) {
  const dir = join(await tempFolder(), "data");
  await mkdir(dir);
  const section = { dir, groups: [{ port: 5001, senders: ["*"] }], ...options };
  const config = parseConfig(JSON.stringify({ receiver: section }), "receiver");
  const signal = new AbortController().signal;
  const receiver = new Receiver(config, { log: quiet, now: Date.now, signal });
  await receiver.store.start(() => true);
  onCleanup(() => receiver.store.close());
  const app = createApp(receiver);
  const fetch = async (request: Request, peer = "127.0.0.1") => app.fetch(request, { peer, group: 0 });
  /** Bytes `[from, to)` of LINES as a chunk, with its marks. */
  const chunk = (from: number, to: number, headers: Record<string, string> = {}, request: Post = {}) => {
    const mark = (end: number) => formatMark(Buffer.from(LINES.slice(Math.max(0, end - 1024), end)));
    const marks = { [HEADER.mark]: mark(to), ...(from > 0 && { [HEADER.from]: mark(from) }) };
    return fetch(
      post("http://x", LINES.slice(from, to), {
        offset: from,
        ...request,
        headers: { ...marks, ...headers },
      }),
    );
  };
  const ask = (body?: string, headers: Record<string, string> = {}, peer?: string) =>
    fetch(
      new Request(`http://x${STREAMS_PATH}`, {
        method: "POST",
        ...(body !== undefined && { body }),
        headers: {
          [HEADER.host]: HOST,
          ...formatNews({ shipper: SHIPPER, lag: 7, agent: "test/1" }),
          ...headers,
        },
      }),
      peer,
    );
  const streams = async (body?: string) =>
    (await (await ask(body)).json()).streams as Record<string, unknown>[];
  return { receiver, fetch, chunk, ask, streams };
}

const BEGIN = { [HEADER.begin]: "1" };
const told = (answer: Response) => ({
  status: answer.status,
  offset: answer.headers.get(HEADER.offset),
  mark: answer.headers.get(HEADER.mark),
});

describe("POST /upload", () => {
  test("a stream begins with Log-Begin, goes on from its mark, and a repeat is answered with both", async () => {
    const { chunk } = await open();
    expect(told(await chunk(0, END, BEGIN))).toEqual({ status: 200, offset: String(END), mark: null });
    expect(told(await chunk(END, 2 * END))).toEqual({ status: 200, offset: String(2 * END), mark: null });
    const mark = formatMark(Buffer.from(LINES.slice(0, 2 * END)));
    expect(told(await chunk(END, 2 * END))).toEqual({ status: 409, offset: String(2 * END), mark });
  });

  test("bytes that continue others than it has are refused", async () => {
    const { chunk } = await open();
    await chunk(0, END, BEGIN);
    const other = { [HEADER.from]: formatMark(Buffer.from("x".repeat(END))) };
    const mark = formatMark(Buffer.from(LINES.slice(0, END)));
    expect(told(await chunk(END, 2 * END, other))).toEqual({ status: 409, offset: String(END), mark });
  });

  test("a stream that is not known, and is not at its beginning, is answered without an offset", async () => {
    const { chunk, streams } = await open();
    expect(told(await chunk(0, END))).toEqual({ status: 409, offset: null, mark: null });
    expect(told(await chunk(END, 2 * END))).toEqual({ status: 409, offset: null, mark: null });
    expect(await streams()).toEqual([]);
  });

  test("refuses marks and news that are none", async () => {
    const { chunk } = await open();
    const wrong = {
      [HEADER.mark]: "1025:aaaaaaaaaaaaaaaaaaaaaa",
      [HEADER.from]: "x",
      [HEADER.head]: "3:short",
      [HEADER.begin]: "2",
      [HEADER.shipper]: "short",
      [HEADER.through]: "2026-11-22 06:20",
      [HEADER.skipped]: "-1",
    };
    for (const [name, value] of Object.entries(wrong)) {
      const answer = await chunk(0, END, { ...BEGIN, [name]: value });
      expect({ name, status: answer.status }).toEqual({ name, status: 400 });
      expect(await answer.text()).toContain(name);
    }
  });
});

describe("POST /streams", () => {
  test("tells all streams, those that are named, and none that is not known", async () => {
    const { chunk, streams, ask } = await open();
    await chunk(0, END, { ...BEGIN, [HEADER.head]: formatMark(Buffer.from(LINES.slice(0, END))) });
    const mark = formatMark(Buffer.from(LINES.slice(0, END)));
    const known = { stream: "stream-0001", offset: END, head: mark, mark, delivered: 0 };
    expect(await streams()).toEqual([known]);
    expect(await streams('{"streams":["stream-0001","stream-0002"]}')).toEqual([known]);
    expect(await streams('{"streams":["stream-0002"]}')).toEqual([]);
    expect(await (await ask()).json()).toMatchObject({ host: HOST });
  });

  test("is the heartbeat: what it says of the sender is kept", async () => {
    const { chunk, ask, receiver } = await open();
    await chunk(0, END, BEGIN);
    const now = Date.now();
    await ask(undefined, formatNews({ shipper: SHIPPER, lag: 42, lost: 5, through: now, agent: "test/2" }));
    const ledger = receiver.store.senders.get(HOST)?.ledger;
    expect(ledger?.facts).toMatchObject({ agent: "test/2", lag: 42 });
    expect(ledger?.heardAt).toBeGreaterThanOrEqual(now - 1000);
  });

  test("two shippers that alternate under one name are told with both addresses, one that took its place is not", async () => {
    const { ask, chunk, receiver } = await open();
    await chunk(0, END, BEGIN);
    const from = (peer: string) =>
      ask(undefined, formatNews({ shipper: `shipper-at-${peer.replaceAll(".", "-")}` }), peer);
    const { store, config } = receiver;
    const told = async () => {
      const ledgerOf = (host: string) => store.senders.get(host)?.ledger;
      const { problems } = await observe(config.dir, DEFAULT_THRESHOLDS, { now: Date.now(), ledgerOf });
      return problems.filter(({ key }) => key === "contested").map(({ text }) => text);
    };
    for (const peer of ["10.9.9.1", "10.9.9.1", "10.9.9.2", "10.9.9.2"]) await from(peer);
    expect(await told()).toEqual([]);
    await from("10.9.9.1");
    expect(await told()).toEqual([`${HOST}: from 10.9.9.2 and 10.9.9.1`]);
  });

  test("in a folder that was lost, how far a sender was counts only when it has heard what is missing", async () => {
    const { chunk, ask, receiver } = await open();
    const facts = () => receiver.store.senders.get(HOST)?.ledger.facts;
    const through = Math.floor(Date.now() / 1000) * 1000 - 1000; // the wire has whole seconds
    const told = formatNews({ shipper: SHIPPER, through });
    await ask('{"streams":["stream-lost"]}', told);
    expect(facts()?.through).toBeUndefined();
    await ask('{"streams":["stream-lost"]}', told);
    expect(facts()?.through).toBe(through);
    expect((await chunk(0, END, { [HEADER.begin]: "again" })).status).toBe(200); // a backup that had known it
    expect(facts()?.through).toBeUndefined();
  });

  test("refuses a body that is no list of names, and one that is too long", async () => {
    const { ask } = await open({ maxStreamsPerHost: 3 });
    for (const body of [
      "[]",
      "{}",
      '{"streams":"all"}',
      '{"streams":["../x"]}',
      '{"streams":[1]}',
      "null",
      "x",
    ])
      expect({ body, status: (await ask(body)).status }).toEqual({ body, status: 400 });
    const many = JSON.stringify({ streams: ["stream-1", "stream-2", "stream-3", "stream-4"] });
    expect((await ask(many)).status).toBe(413);
  });
});

describe("a sender of version 1.0", () => {
  test("begins where it says, is answered without marks, and asks with HEAD", async () => {
    const { fetch } = await open();
    const old = (offset: number) => fetch(post("http://x", accessLine(1), { offset }));
    expect(told(await old(1000))).toEqual({ status: 200, offset: String(1000 + END), mark: null });
    expect(told(await old(1000))).toEqual({ status: 409, offset: String(1000 + END), mark: null });
    const head = (stream: string) =>
      fetch(
        new Request("http://x/upload", {
          method: "HEAD",
          headers: { [HEADER.host]: HOST, [HEADER.stream]: stream },
        }),
      );
    expect(told(await head("stream-0001"))).toEqual({ status: 200, offset: String(1000 + END), mark: null });
    expect((await head("stream-0002")).status).toBe(404);
  });
});

test("/healthz is 503 while nothing could be stored, and says why", async () => {
  const { fetch, receiver } = await open();
  const health = async () => {
    const answer = await fetch(new Request("http://x/healthz"));
    return [answer.status, (await answer.json()).status];
  };
  expect(await health()).toEqual([200, "ok"]);
  Object.defineProperty(receiver.store, "health", { value: () => "ENOSPC: no space left on device" });
  expect(await health()).toEqual([503, "ENOSPC: no space left on device"]);
});
