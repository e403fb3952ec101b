/** The receiver's answers and files, without a port: requests go to the app, the clock is the test's. */
import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { createZstdCompress, gzipSync, zstdCompressSync } from "node:zlib";
import { SENT } from "../lib/batch.ts";
import { HEADER } from "../lib/chunk.ts";
import { parseConfig } from "../lib/config.ts";
import { readLedger } from "../lib/ledger.ts";
import { createLog } from "../lib/service.ts";
import { createApp, Receiver } from "../receiver.ts";
import { type Post, post, storedWindows } from "./sending.ts";
import { accessLine, onCleanup, tempFolder } from "./support.ts";

const URL = "http://receiver";
const HOST = "10.0.0.1";
/** In the window that `accessLine` writes by default, in the zone that it names. */
const START = Date.parse("2026-11-22T06:25:00+06:00");
const NAME = "accessLog_26112206_20-39_10-0-0-1";

/** A receiver on a folder, as `main` makes it. `restart` is what a new process would be. */
async function open(options: object = {}, folder?: string) {
  const dir = join(folder ?? (await tempFolder()), "data");
  await mkdir(dir, { recursive: true });
  const section = { dir, groups: [{ port: 5001, senders: ["*"] }], ...options };
  const config = parseConfig(JSON.stringify({ receiver: section }), "receiver");
  const clock = { now: START };
  let log = "";
  const signal = new AbortController().signal;
  const start = async () => {
    const receiver = new Receiver(config, {
      log: createLog((line) => {
        log += line;
      }),
      now: () => clock.now,
      signal,
    });
    await receiver.store.start(() => true);
    return { receiver, app: createApp(receiver) };
  };
  let running = await start();
  onCleanup(() => running.receiver.store.close());
  const self = {
    dir,
    clock,
    log: () => log,
    fetch: async (request: Request, { peer = "127.0.0.1", group = 0 } = {}) =>
      running.app.fetch(request, { peer, group }),
    send: (body: string | Uint8Array<ArrayBuffer>, request: Post = {}, arrival = {}) =>
      self.fetch(post(URL, body, request), arrival),
    seal: () => running.receiver.store.seal(),
    ledger: (host = HOST) => running.receiver.store.senders.get(host)?.ledger,
    stop: () => running.receiver.store.close(),
    start: async () => {
      running = await start();
    },
    /** What the refused have left: nothing but what the process itself holds. */
    made: async () => (await readdir(dir)).filter((name) => !name.startsWith(".journal-")),
    restart: async () => {
      await running.receiver.store.close();
      running = await start();
    },
    files: async (host = HOST) =>
      (await readdir(join(dir, host))).filter((name) => !name.startsWith(".")).sort(),
    read: (name: string, host = HOST) => readFile(join(dir, host, name), "latin1"),
    head: (stream = "stream-0001", host = HOST) =>
      self.fetch(
        new Request(`${URL}/upload`, {
          method: "HEAD",
          headers: { [HEADER.host]: host, [HEADER.stream]: stream },
        }),
      ),
  };
  return self;
}

const LINE = accessLine(1);

describe("POST /upload", () => {
  test("stores a chunk and answers with its lines and end", async () => {
    const { send, read } = await open();
    const answer = await send(LINE + LINE, { offset: 100 });
    expect(answer.status).toBe(200);
    expect(answer.headers.get(HEADER.offset)).toBe(String(100 + 2 * LINE.length));
    expect(await answer.json()).toEqual({ lines: 2, offset: 100 + 2 * LINE.length });
    expect(await read(`${NAME}.log.part`)).toBe(LINE + LINE);
  });

  test("answers 409 with the committed offset to a repeat and to a gap", async () => {
    const { send, read, restart } = await open();
    await send(LINE);
    for (const offset of [0, LINE.length + 1]) {
      const answer = await send(LINE, { offset });
      expect(answer.status).toBe(409);
      expect(answer.headers.get(HEADER.offset)).toBe(String(LINE.length));
    }
    await restart();
    expect((await send(LINE)).status).toBe(409);
    expect(await read(`${NAME}.log.part`)).toBe(LINE);
  });

  test("takes one of two identical chunks that come at the same time", async () => {
    const { send, read } = await open();
    for (let i = 0; i < 20; i++) {
      const offset = i * LINE.length;
      const answers = await Promise.all([1, 2, 3].map(() => send(LINE, { offset })));
      expect(answers.map(({ status }) => status).sort()).toEqual([200, 409, 409]);
      for (const answer of answers)
        expect(answer.headers.get(HEADER.offset)).toBe(String(offset + LINE.length));
    }
    expect(await read(`${NAME}.log.part`)).toBe(LINE.repeat(20));
  });

  test("covers filtered lines: a body that is shorter than its range, or empty", async () => {
    const { send, head, read } = await open();
    expect((await send(LINE, { offset: 0, end: 1000 })).status).toBe(200);
    expect((await send("", { offset: 1000, end: 5000 })).status).toBe(200);
    expect((await head()).headers.get(HEADER.offset)).toBe("5000");
    expect(await read(`${NAME}.log.part`)).toBe(LINE);
  });

  test("keeps every byte but looks for no more than \\n", async () => {
    const { send, read } = await open();
    const odd = Buffer.from("ff00fe0dc328efbbbfe280a80b0c1b", "hex").toString("latin1");
    const body = Buffer.from(`${LINE.slice(0, -1)}${odd}\n\n\r\n${odd}\n${LINE}`, "latin1");
    expect(await (await send(body)).json()).toEqual({ lines: 5, offset: body.length });
    expect(await read(`${NAME}.log.part`)).toBe(body.toString("latin1"));
  });

  test("reads gzip and zstd, in whatever case the encoding is written", async () => {
    const { send, read } = await open();
    const compressed = { gzip: gzipSync(LINE), GZIP: gzipSync(LINE), zstd: zstdCompressSync(LINE) };
    let offset = 0;
    for (const [encoding, body] of Object.entries(compressed)) {
      const answer = await send(new Uint8Array(body), {
        offset,
        end: offset + LINE.length,
        headers: { "Content-Encoding": encoding },
      });
      expect(await answer.json()).toEqual({ lines: 1, offset: offset + LINE.length });
      offset += LINE.length;
    }
    expect(await read(`${NAME}.log.part`)).toBe(LINE.repeat(3));
  });

  test.each([0, 200, 255, 256, 300, 65_791, 65_792, 1_114_200, 3_000_000])(
    "reads zstd of %d bytes whose frames tell their length, and several of them; one that does not tell gets 400",
    async (length) => {
      const { send, read } = await open();
      const text = LINE.repeat(Math.ceil(length / LINE.length));
      const stream = createZstdCompress();
      stream.end(text);
      const silent = Buffer.concat((await Array.fromAsync(stream)) as Buffer[]);
      const telling = zstdCompressSync(text, { pledgedSrcSize: text.length });
      const headers = { "Content-Encoding": "zstd" };
      let offset = 0;
      for (const body of [telling, Buffer.concat([telling, telling])]) {
        const answer = await send(new Uint8Array(body), { offset, end: offset + 3 * text.length, headers });
        expect(answer.status).toBe(200);
        offset += 3 * text.length;
      }
      for (const body of [silent, Buffer.concat([telling, silent])]) {
        const answer = await send(new Uint8Array(body), { offset, end: offset + 3 * text.length, headers });
        expect(answer.status).toBe(400);
        expect(await answer.text()).toContain("length");
      }
      if (text) expect(await read(`${NAME}.log.part`)).toBe(text.repeat(3));
    },
  );

  test("refuses a zstd frame that says of itself what is not true", async () => {
    const { send } = await open();
    const body = new Uint8Array(zstdCompressSync(LINE.repeat(500), { pledgedSrcSize: LINE.length * 500 }));
    const sizeAt = 5 + ((body[4] as number) & 0x20 ? 0 : 1);
    for (const lie of [0x00, 0xff]) {
      body[sizeAt] = lie;
      const answer = await send(body, { end: LINE.length * 500, headers: { "Content-Encoding": "zstd" } });
      expect(answer.status).toBe(400);
    }
  });

  test("refuses a compressed body that is cut short anywhere, and one with bytes behind it", async () => {
    const { send, dir } = await open();
    const text = LINE.repeat(50);
    for (const [encoding, compress] of Object.entries({ gzip: gzipSync, zstd: zstdCompressSync })) {
      const whole = compress(text);
      const bodies = [Buffer.concat([whole, Buffer.from("x")])];
      for (let length = 1; length < whole.length; length++) bodies.push(whole.subarray(0, length));
      for (const body of bodies) {
        const headers = { "Content-Encoding": encoding };
        const answer = await send(new Uint8Array(body), { end: text.length, headers });
        expect({ encoding, length: body.length, status: answer.status }).toMatchObject({ status: 400 });
      }
    }
    expect(existsSync(join(dir, HOST))).toBe(false);
  });

  test("keeps a line that comes in pieces together, whole, and through a restart", async () => {
    const { send, read, restart, head } = await open();
    const start = LINE.slice(0, 60);
    const long = `${start}${"x".repeat(300_000)}\n`;
    const text = LINE + long + LINE;
    let offset = 0;
    for (const end of [LINE.length + 40, 90_000, 200_000, LINE.length + long.length - 3, text.length]) {
      const answer = await send(text.slice(offset, end), { offset });
      expect(answer.status).toBe(200);
      await send(LINE, { stream: "other-stream", offset: offset + 1 });
      offset = end;
      if (end === 200_000) await restart();
    }
    expect((await head()).headers.get(HEADER.offset)).toBe(String(text.length));
    const stored = await read(`${NAME}.log.part`);
    expect(stored.split(long).length).toBe(2);
    expect(stored.replace(long, "").replaceAll(LINE, "")).toBe("");
  });

  test("files a line by its own window, and one without a timestamp with the line before it", async () => {
    const { send, files, read } = await open();
    const next = accessLine(2, "22/Nov/2026:06:40:00 +0600");
    const bare = "no timestamp here\n";
    const first = LINE + bare + next + bare;
    await send(first);
    await send(bare + LINE, { offset: first.length });
    expect(await files()).toEqual([`${NAME}.log.part`, "accessLog_26112206_40-59_10-0-0-1.log.part"]);
    expect(await read(`${NAME}.log.part`)).toBe(LINE + bare + LINE);
    expect(await read("accessLog_26112206_40-59_10-0-0-1.log.part")).toBe(next + bare + bare);
  });

  test("refuses what breaks the contract, says why, and touches nothing", async () => {
    const { send, dir } = await open({ maxBodyBytes: 1000 });
    const large = LINE.repeat(20);
    const cases: [number, string | Uint8Array<ArrayBuffer>, Post][] = [
      [400, LINE, { host: "../../etc" }],
      [400, LINE, { host: "/etc" }],
      [400, LINE, { host: "sent" }],
      [400, LINE, { host: "10.0.0.999" }],
      [400, LINE, { host: "a".repeat(300) }],
      [400, LINE, { stream: "short" }],
      [400, LINE, { stream: "a/../../../../b" }],
      [400, LINE, { offset: -1 }],
      [400, LINE, { offset: 100, end: 99 }],
      [400, LINE, { offset: 2 ** 60 }],
      [400, LINE, { end: 10 }],
      [400, LINE, { headers: { [HEADER.offset]: "1e3" } }],
      [400, LINE, { headers: { "Content-Encoding": "gzip" } }],
      [400, LINE, { headers: { "Content-Encoding": "zstd" } }],
      [413, large, {}],
      [413, new Uint8Array(gzipSync(large)), { end: large.length, headers: { "Content-Encoding": "gzip" } }],
      [
        413,
        new Uint8Array(zstdCompressSync(large)),
        { end: large.length, headers: { "Content-Encoding": "zstd" } },
      ],
      [415, LINE, { headers: { "Content-Encoding": "br" } }],
      [415, LINE, { headers: { "Content-Type": "text/html" } }],
      [415, LINE, { headers: { "Content-Type": "application/json" } }],
    ];
    for (const [status, body, request] of cases) {
      const answer = await send(body, request);
      expect({ request, status: answer.status }).toEqual({ request, status });
      expect((await answer.text()).length).toBeGreaterThan(10);
    }
    expect(await readdir(dir)).toEqual([]);
  });

  test("refuses a host whose dashed form is another's, and takes host names in lower case", async () => {
    const { send, made } = await open();
    expect((await send(LINE, { host: "Web-1.Example" })).status).toBe(200);
    const answer = await send(LINE, { host: "web.1-example" });
    expect(answer.status).toBe(403);
    expect(await answer.text()).toContain("web-1.example");
    expect((await made()).filter((name) => !name.startsWith("."))).toEqual(["web-1.example"]);
  });

  test("keeps two hosts behind one address apart", async () => {
    const { send, files } = await open();
    await Promise.all([send(LINE, { host: "10.0.0.1" }), send(LINE, { host: "10.0.0.2" })]);
    expect(await files("10.0.0.1")).toEqual([`${NAME}.log.part`]);
    expect(await files("10.0.0.2")).toEqual(["accessLog_26112206_20-39_10-0-0-2.log.part"]);
  });

  test("answers 503 with Retry-After to a host beyond maxHosts and to bytes beyond maxBytesInFlight", async () => {
    const listed = [{ port: 5001, senders: ["10.0.0.1", "10.0.0.2", "10.0.0.3", "127.0.0.1"] }];
    const { send } = await open({ maxHosts: 2, maxBytesInFlight: 5000, groups: listed });
    expect((await send(LINE, { host: "10.0.0.1" })).status).toBe(200);
    expect((await send(LINE, { host: "10.0.0.2" })).status).toBe(200);
    const third = await send(LINE, { host: "10.0.0.3" });
    expect(third.status).toBe(503);
    expect(third.headers.get("Retry-After")).toBe("1");
    expect((await send(LINE.repeat(100), { offset: LINE.length })).status).toBe(503);
    expect((await send(LINE, { offset: LINE.length })).status).toBe(200);
  });
});

describe("a heartbeat", () => {
  test("is taken without a stream, and refused when it shows another offset than is committed", async () => {
    const { send, head, dir, seal } = await open();
    expect((await send("", { stream: "heartbeat", lag: 7 })).status).toBe(200);
    expect((await head("heartbeat")).status).toBe(404);
    await seal();
    expect((await readLedger(join(dir, HOST)))?.heardAt).toBe(START);
    await send(LINE);
    expect((await send("", { offset: LINE.length })).status).toBe(200);
    expect((await send("", { offset: 0 })).status).toBe(409);
  });

  test("tells lag and what was lost, which add up over a restart", async () => {
    const { send, restart, dir, seal } = await open();
    await send(LINE, { lag: 5000, lost: 10 });
    await restart();
    await send("", { offset: LINE.length, lag: 40, lost: 32 });
    await seal();
    const ledger = await readLedger(join(dir, HOST));
    expect(ledger?.lost).toBe(42);
    expect(ledger?.facts.lag).toBe(40);
  });
});

describe("HEAD /upload", () => {
  test("tells where a stream stands, 404 for one that is not known, and makes nothing", async () => {
    const { send, head, dir } = await open();
    expect((await head()).status).toBe(404);
    expect(existsSync(join(dir, HOST))).toBe(false);
    await send(LINE, { offset: 50 });
    const answer = await head();
    expect(answer.status).toBe(200);
    expect(answer.headers.get(HEADER.offset)).toBe(String(50 + LINE.length));
    expect((await head("stream-0002")).status).toBe(404);
  });
});

describe("sealing", () => {
  test("waits for the window's end and for quiet, then never writes the file again", async () => {
    const { send, seal, clock, files, read } = await open({ sealAfterSeconds: 120 });
    await send(LINE);
    clock.now = Date.parse("2026-11-22T06:39:59+06:00");
    expect(await seal()).toEqual([]);
    await send(LINE, { offset: LINE.length });
    clock.now = Date.parse("2026-11-22T06:41:58+06:00");
    expect(await seal()).toEqual([]);
    clock.now += 1000;
    expect(await seal()).toEqual([`${NAME}.log`]);
    await send(LINE, { offset: 2 * LINE.length });
    expect(await files()).toEqual([`${NAME}.2.log.part`, `${NAME}.log`]);
    expect(await read(`${NAME}.log`)).toBe(LINE + LINE);
    expect(await read(`${NAME}.2.log.part`)).toBe(LINE);
  });

  test("never uses a name twice, also when sent/ was emptied and the ledger is gone", async () => {
    const { send, seal, clock, files, dir, stop, start } = await open();
    await mkdir(join(dir, SENT));
    const names: string[] = [];
    clock.now += 3_600_000;
    for (let i = 0; i < 4; i++) {
      await send(LINE, { stream: `stream-${i}-xx` });
      clock.now += 200_000;
      names.push(...(await seal()));
      for (const name of await files()) await rm(join(dir, HOST, name));
      await stop();
      if (i === 2) {
        await rm(join(dir, HOST, ".ledger"));
        for (const name of names) await writeFile(join(dir, SENT, `${name}.gz`), "");
      }
      await start();
    }
    expect(names).toEqual([`${NAME}.log`, `${NAME}.2.log`, `${NAME}.3.log`, `${NAME}.4.log`]);
  });

  test("numbers a window that was forgotten by the time, so that its names differ from all before", async () => {
    const { send, seal, clock } = await open({ forgetAfterDays: 30 });
    clock.now += 3_600_000;
    await send(LINE);
    clock.now += 200_000;
    expect(await seal()).toEqual([`${NAME}.log`]);
    clock.now += 31 * 86_400_000;
    await seal(); // the daily tidying
    await send(LINE, { stream: "stream-0002" });
    const part = Math.floor(clock.now / 1000);
    clock.now += 200_000;
    expect(await seal()).toEqual([`${NAME}.${part}.log`]);
    await send(LINE, { stream: "stream-0003" });
    clock.now += 200_000;
    expect(await seal()).toEqual([`${NAME}.${part + 1}.log`]);
  });

  test("a window of the future has ended so long after its first line as a window is", async () => {
    const { send, seal, clock, files } = await open();
    const tomorrow = accessLine(2, "23/Nov/2026:06:25:00 +0600");
    const nextYear = accessLine(3, "22/Nov/2027:06:25:00 +0600");
    await send(LINE + tomorrow + nextYear);
    const ahead = ["accessLog_26112306_20-39_10-0-0-1.log", "accessLog_27112206_20-39_10-0-0-1.log"];
    clock.now += 19 * 60_000;
    expect(await seal()).toEqual([`${NAME}.log`]);
    expect(await files()).toEqual([`${NAME}.log`, ...ahead.map((name) => `${name}.part`)]);
    clock.now += 60_000;
    expect((await seal()).sort()).toEqual(ahead);
  });

  test("goes by the zone in the lines, by the later one when it changes", async () => {
    const { send, seal, clock } = await open({ sealAfterSeconds: 60 });
    const summer = accessLine(1, "25/Oct/2026:02:30:00 +0200");
    const winter = accessLine(2, "25/Oct/2026:02:30:00 +0100");
    clock.now = Date.parse("2026-10-25T02:30:00+02:00");
    await send(summer);
    clock.now = Date.parse("2026-10-25T02:30:00+01:00");
    await send(winter, { offset: summer.length });
    clock.now = Date.parse("2026-10-25T02:39:00+01:00");
    expect(await seal()).toEqual([]);
    clock.now = Date.parse("2026-10-25T02:40:00+01:00");
    expect(await seal()).toEqual(["accessLog_26102502_20-39_10-0-0-1.log"]);
  });

  test("does not wait for a clock that was set back", async () => {
    const { send, seal, clock } = await open();
    const old = accessLine(1, "20/Nov/2026:06:25:00 +0600");
    await send(old);
    clock.now -= 86_400_000;
    expect(await seal()).toEqual([]);
    clock.now += 121_000;
    expect(await seal()).toEqual(["accessLog_26112006_20-39_10-0-0-1.log"]);
  });

  test("happens after a restart, without the sender", async () => {
    const { send, seal, clock, restart, files, dir } = await open();
    await send(LINE);
    clock.now += 3_600_000;
    await restart();
    clock.now += 899_000;
    expect(await seal()).toEqual([]); // it may have more to say
    clock.now += 1000;
    await seal();
    expect(await files()).toEqual([`${NAME}.log`]);
    const ledger = await readLedger(join(dir, HOST));
    expect([...(ledger?.sealed.values() ?? [])]).toMatchObject([
      { name: `${NAME}.log`, bytes: LINE.length, lines: 1 },
    ]);
  });
});

describe("recovery", () => {
  test("cuts off what was never acknowledged", async () => {
    const { send, stop, start, read, dir, files } = await open();
    await send(LINE);
    await stop();
    await writeFile(join(dir, HOST, `${NAME}.log.part`), `${LINE}half a li`);
    await writeFile(
      join(dir, HOST, "accessLog_26112206_40-59_10-0-0-1.log.part"),
      "begun, never committed\n",
    );
    await writeFile(join(dir, HOST, ".piece-stream-0001.0"), "a piece that no record speaks of");
    await start();
    expect(await read(`${NAME}.log.part`)).toBe(LINE);
    expect(await files()).toEqual([`${NAME}.log.part`]);
    expect(await readdir(join(dir, HOST))).not.toContain(".piece-stream-0001.0");
  });

  test("keeps a .part whole when its ledger is gone, and says so", async () => {
    const { send, stop, start, seal, clock, read, dir, log } = await open();
    await send(LINE + LINE);
    await stop();
    await rm(join(dir, HOST, ".ledger"));
    await writeFile(join(dir, HOST, `${NAME}.log.part`), `${LINE}${LINE}torn`);
    await start();
    expect(log()).toContain("batch is in no ledger: kept as it is");
    clock.now += 2 * 86_400_000;
    await seal();
    expect(await read(`${NAME}.log`)).toBe(LINE + LINE);
  });

  test("a damaged ledger cuts off nothing that was acknowledged, and is told", async () => {
    const { send, stop, start, read, dir, log } = await open();
    await send(LINE);
    await send(LINE, { offset: LINE.length });
    await stop();
    const path = join(dir, HOST, ".ledger");
    await writeFile(path, (await readFile(path, "utf8")).replace('"v":2', '"v":3'));
    await start();
    expect(log()).toContain("ledger is damaged");
    expect(await read(`${NAME}.log.part`)).toBe(LINE + LINE);
  });

  test("counts and tells bytes that were committed and are gone", async () => {
    const { send, stop, start, ledger, dir, log } = await open();
    await send(LINE + LINE);
    await stop();
    await writeFile(join(dir, HOST, `${NAME}.log.part`), LINE);
    await start();
    expect(log()).toContain("acknowledged bytes are gone from the disk");
    expect(ledger()?.lost).toBe(LINE.length);
    expect(ledger()?.facts.gone).toBe(LINE.length);
  });

  test("keeps the ledger small over many commits and streams", async () => {
    const { send, dir, stop } = await open();
    for (let i = 0; i < 1200; i++) await send("", { offset: i, end: i + 1, stream: "stream-0001" });
    await stop();
    const { length } = await readFile(join(dir, HOST, ".ledger"));
    expect(length).toBeLessThan(2_000);
    expect((await readLedger(join(dir, HOST)))?.streams.get("stream-0001")?.offset).toBe(1200);
  });
});

describe("who may come in", () => {
  const groups = [
    { port: 5001, senders: ["10.0.0.0/24", "web-1.example", "2001:db8::/32"] },
    { port: 5002, senders: ["10.0.1.1"] },
  ];

  test("a port serves its senders and names the port of the others", async () => {
    const { send, made } = await open({ groups });
    const from = { peer: "10.0.0.77" };
    expect((await send(LINE, { host: "10.0.0.5" }, from)).status).toBe(200);
    expect((await send(LINE, { host: "web-1.example" }, from)).status).toBe(200);
    expect((await send(LINE, { host: "2001:db8::7" }, from)).status).toBe(200);
    const other = await send(LINE, { host: "10.0.1.1" }, from);
    expect(other.status).toBe(421);
    expect(await other.text()).toContain("5002");
    expect((await send(LINE, { host: "10.9.9.9" }, from)).status).toBe(403);
    expect((await send(LINE, { host: "10.0.0.6" }, { peer: "192.0.2.1" })).status).toBe(403);
    expect((await send(LINE, { host: "10.0.0.6" }, { peer: "::ffff:10.0.0.6" })).status).toBe(200);
    expect((await made()).filter((name) => !name.startsWith(".")).length).toBe(4);
  });

  test("a token is asked for, must be known, must be the host's, and is read again when its file changes", async () => {
    const folder = await tempFolder();
    const file = join(folder, "token");
    await writeFile(file, "everyone's\n");
    process.env.RECEIVER_TEST_TOKEN = "own";
    const tokens = { "10.0.0.1": { env: "RECEIVER_TEST_TOKEN" }, "*": { file } };
    const { send, dir } = await open({ tokens });
    const shown = (token: string) => ({ Authorization: `Bearer ${token}` });
    const none = await send(LINE);
    expect(none.status).toBe(401);
    expect(none.headers.get("WWW-Authenticate")).toBe("Bearer");
    expect((await send(LINE, { headers: shown("guess") })).status).toBe(401);
    expect((await send(LINE, { headers: shown("everyone's") })).status).toBe(403);
    expect((await send(LINE, { headers: shown("own"), host: "10.0.0.2" })).status).toBe(403);
    expect(await readdir(dir)).toEqual([]);
    expect((await send(LINE, { headers: shown("own") })).status).toBe(200);
    expect((await send(LINE, { headers: shown("everyone's"), host: "10.0.0.2" })).status).toBe(200);
    await writeFile(file, "another-and-longer\n");
    expect((await send(LINE, { headers: shown("everyone's"), host: "10.0.0.3" })).status).toBe(401);
    expect((await send(LINE, { headers: shown("another-and-longer"), host: "10.0.0.3" })).status).toBe(200);
  });

  test("the address behind a trusted proxy counts, and no one else's word for it", async () => {
    const { send } = await open({ groups, trustedProxies: ["192.0.2.0/24"] });
    const via = (hops: string) => ({ host: "10.0.0.5", headers: { "X-Forwarded-For": hops } });
    const proxy = { peer: "192.0.2.1" };
    expect((await send(LINE, via("10.0.0.5"), proxy)).status).toBe(200);
    expect(
      (await send("", { ...via("8.8.8.8, 10.0.0.5, 192.0.2.9"), offset: LINE.length }, proxy)).status,
    ).toBe(200);
    expect((await send(LINE, via("10.0.0.5, 8.8.8.8"), proxy)).status).toBe(403);
    expect((await send(LINE, via("10.0.0.5:40123"), proxy)).status).toBe(409); // with a port, as some proxies write it
    expect((await send(LINE, via("[2001:db8::7]:40123"), proxy)).status).toBe(409);
    expect((await send(LINE, via("10.9.9.9:40123"), proxy)).status).toBe(403);
    expect((await send(LINE, via("10.0.0.5"), { peer: "8.8.8.8" })).status).toBe(403);
  });

  describe("status page and metrics", () => {
    const watch = async (options: object) => {
      const { fetch } = await open(options);
      return (path: string, peer: string, headers: Record<string, string> = {}) =>
        fetch(new Request(URL + path, { headers: { Host: "127.0.0.1:5001", ...headers } }), { peer }).then(
          (answer) => answer.status,
        );
    };
    const basic = (token: string) => ({ Authorization: `Basic ${btoa(`me:${token}`)}` });
    const shown = (token: string) => ({ Authorization: `Bearer ${token}` });

    test('take the token of "*", never a single host\'s, also from loopback', async () => {
      process.env.RECEIVER_TEST_TOKEN = "everyone's";
      process.env.RECEIVER_TEST_OWN = "own";
      const tokens = { "*": { env: "RECEIVER_TEST_TOKEN" }, "10.0.0.1": { env: "RECEIVER_TEST_OWN" } };
      const get = await watch({ tokens });
      for (const path of ["/", "/metrics"]) {
        for (const peer of ["127.0.0.1", "10.0.0.9"]) {
          expect(await get(path, peer)).toBe(401);
          expect(await get(path, peer, shown("own"))).toBe(401);
          expect(await get(path, peer, basic("wrong"))).toBe(401);
          expect(await get(path, peer, shown("everyone's"))).toBe(200);
          expect(await get(path, peer, basic("everyone's"))).toBe(200);
        }
      }
      expect(await get("/healthz", "10.0.0.9")).toBe(200);
      expect(await get("/nothing", "10.0.0.9")).toBe(404);
    });

    test("take viewToken alone when there is one", async () => {
      process.env.RECEIVER_TEST_TOKEN = "everyone's";
      process.env.RECEIVER_TEST_VIEW = "view";
      const get = await watch({
        tokens: { "*": { env: "RECEIVER_TEST_TOKEN" } },
        viewToken: { env: "RECEIVER_TEST_VIEW" },
      });
      expect(await get("/metrics", "10.0.0.9", shown("view"))).toBe(200);
      expect(await get("/metrics", "10.0.0.9", shown("everyone's"))).toBe(401);
    });

    test("are for loopback where no token is, with a Host of this machine and no sign of a proxy", async () => {
      const get = await watch({});
      expect(await get("/", "127.0.0.1")).toBe(200);
      expect(await get("/", "::1", { Host: "localhost:5001" })).toBe(200);
      expect(await get("/", "127.0.0.1", { Host: "[::1]:5001" })).toBe(200);
      expect(await get("/", "10.0.0.9")).toBe(401);
      for (const headers of [
        { Host: "evil.example" },
        { Host: "" },
        { "X-Forwarded-For": "127.0.0.1" },
        { Forwarded: "for=127.0.0.1" },
        { Via: "1.1 proxy" },
        { "X-Real-IP": "127.0.0.1" },
      ])
        expect({ headers, status: await get("/", "127.0.0.1", headers as never) }).toMatchObject({
          status: 401,
        });
    });
  });
});

describe("the original's JSON form", () => {
  const groups = [{ port: 5001, senders: ["10.0.0.0/24", "web-1.example"] }];
  const json = (log: unknown, host: unknown) =>
    new Request(`${URL}/upload`, {
      method: "POST",
      body: JSON.stringify({ log, host }),
      headers: { "Content-Type": "application/json" },
    });

  test("is off unless legacy is true", async () => {
    const { fetch } = await open({ groups });
    expect((await fetch(json(LINE, HOST), { peer: HOST })).status).toBe(415);
  });

  test("is taken from a listed address, without its empty lines, and answered as the original does", async () => {
    const { fetch, read } = await open({ groups, legacy: true });
    const answer = await fetch(json(`${LINE}\n${LINE}\nünïcode`, HOST), { peer: HOST });
    expect(answer.status).toBe(200);
    expect(await answer.text()).toBe("OK - 3 lines");
    expect(await read(`${NAME}.log.part`)).toBe(Buffer.from(`${LINE}${LINE}ünïcode\n`).toString("latin1"));
    expect(await (await fetch(json(LINE, HOST), { peer: HOST })).text()).toBe("OK - 1 lines");
  });

  test("is refused from other addresses, for other hosts, and when it is malformed", async () => {
    process.env.RECEIVER_TEST_TOKEN = "own";
    const { fetch, dir } = await open({
      groups,
      legacy: true,
      tokens: { "*": { env: "RECEIVER_TEST_TOKEN" } },
    });
    expect((await fetch(json(LINE, HOST), { peer: "10.9.9.9" })).status).toBe(403);
    expect((await fetch(json(LINE, "10.0.0.2"), { peer: HOST })).status).toBe(403);
    expect((await fetch(json(LINE, "web-1.example"), { peer: HOST })).status).toBe(403);
    expect((await fetch(json(LINE, "../etc"), { peer: HOST })).status).toBe(400);
    expect((await fetch(json(7, HOST), { peer: HOST })).status).toBe(400);
    expect((await fetch(json(undefined, HOST), { peer: HOST })).status).toBe(400);
    expect(await readdir(dir)).toEqual([]);
  });
});

test("a timestampPattern finds what no rule finds", async () => {
  const { send, files } = await open({ timestampPattern: "at=<([^>]+)>" });
  await send("GET / at=<2026-11-22T06:25:00+06:00> [23/Nov/2026:06:25:00 +0600]\n");
  expect(await files()).toEqual([`${NAME}.log.part`]);
});

test("10,000 delivered files cost a chunk nothing", async () => {
  const { send, dir, files } = await open();
  await mkdir(join(dir, SENT));
  for (let i = 0; i < 10_000; i++) await writeFile(join(dir, SENT, `${NAME}.${i + 2}.log.gz`), "");
  await writeFile(join(dir, SENT, `${NAME}.log.gz`), "");
  await send(LINE);
  expect(await files()).toEqual([`${NAME}.10002.log.part`]);
  expect((await storedWindows(dir, HOST)).size).toBe(1);
});
