/** The receiver's folder is lost: what was not delivered is shipped again by the host, under names that were never used. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  copyFileSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { zstdDecompressSync } from "node:zlib";
import { parseBatchName } from "../lib/batch.ts";
import {
  type ChunkHeaders,
  HEADER,
  MARK_BYTES,
  parseChunkHeaders,
  parseNews,
  type StreamStatus,
} from "../lib/chunk.ts";
import { readLedger } from "../lib/ledger.ts";
import { createFaultLog } from "../lib/service.ts";
import { Store } from "../lib/store/store.ts";
import { createWindowFinder } from "../lib/store/window.ts";
import { takeStatus, takeWayBack } from "../lib/tail/answers.ts";
import { withFile } from "../lib/tail/cursor.ts";
import { LogFile } from "../lib/tail/file.ts";
import { Looker } from "../lib/tail/look.ts";
import { readPortion } from "../lib/tail/reader.ts";
import { Streams } from "../lib/tail/streams.ts";
import { createSender, expectArrives, lines, type RealReceiver, startRealReceiver } from "./pipeline.ts";
import { post, quiet } from "./sending.ts";
import { expectSameLines, onCleanup, runScriptOnce, tempFolder, until, writeConfig } from "./support.ts";
import { isChunk, Wire } from "./wire.ts";

setDefaultTimeout(60_000);

const QUICK = { heartbeatSeconds: 0.1, pollSeconds: 0.1 };

async function wipe(receiver: RealReceiver): Promise<void> {
  receiver.running.process.kill("SIGKILL");
  await receiver.running.ended;
  for (const name of readdirSync(receiver.dir)) rmSync(join(receiver.dir, name), { recursive: true });
  await receiver.start();
}

test("the folder is wiped while the log goes on and after a rotation: every line is there again, and it is told", async () => {
  const receiver = await startRealReceiver();
  const mails = await tempFolder();
  const folder = await tempFolder();
  const mail = { smtp: `file://${mails}`, from: "logs@example.com", to: ["ops@example.com"] };
  const { dir } = receiver;
  const monitor = await writeConfig(folder, {
    monitor: {
      dir,
      mail,
      stateFile: join(folder, "monitor.json"),
      report: join(folder, "report.log"),
      minFreePercent: 0,
    },
  });
  const sender = await createSender(receiver.url, {
    ...{ heartbeatSeconds: 0.2, pollSeconds: 0.1, chunkBytes: 4096 },
  });
  sender.write(lines("a", 1, 500)); // many chunks
  const shipper = sender.start();
  await expectArrives(receiver, sender);
  sender.rotate();
  sender.write(lines("b", 1, 50));
  await expectArrives(receiver, sender);
  await runScriptOnce("monitor", monitor);
  const state = JSON.parse(readFileSync(join(folder, "monitor.json"), "utf8"));
  state.begunAt -= 3_600_000; // what a fresh monitor finds is past for it; this one has been there for a while
  writeFileSync(join(folder, "monitor.json"), JSON.stringify(state));
  const before = readdirSync(join(receiver.dir, sender.host)).filter((name) => name.endsWith(".part"));
  await wipe(receiver);
  await expectArrives(receiver, sender);
  await shipper.says("receiver has lost lines: shipping them again");
  const bytes = Buffer.concat(sender.written).length;
  const facts = async () => (await readLedger(join(receiver.dir, sender.host)))?.facts ?? {};
  await until("what came again is counted", async () => ((await facts()).again ?? 0) >= bytes);
  expect(await facts()).toMatchObject({ again: bytes, againFiles: 2 });
  const after = readdirSync(join(receiver.dir, sender.host)).filter((name) => name.endsWith(".part"));
  expect(before.filter((name) => after.includes(name))).toEqual([]);
  sender.write(lines("b", 51, 60));
  await until("what comes later goes on", () => receiver.stored(sender.host).includes(lines("b", 51, 60)));
  const told = async () => {
    await runScriptOnce("monitor", monitor);
    const texts = readdirSync(mails).map((name) => readFileSync(join(mails, name), "utf8"));
    return texts.find((text) => text.includes(`${sender.host} shipped`));
  };
  expect(await until("a mail says so", told)).toContain("of 2 files again");
  expect(await shipper.stop()).toBe(0);
});

test("a stream that begins before the loss is noticed takes no name that may have been used", async () => {
  const receiver = await startRealReceiver();
  const shipper = "s".repeat(22);
  const chunk = (host: string, stream: string) => {
    const headers = { [HEADER.begin]: "1", [HEADER.mark]: `4:${"A".repeat(22)}`, [HEADER.shipper]: shipper };
    return fetch(post(receiver.url, lines("x", 1, 3), { host, stream, headers }));
  };
  const ask = (host: string, streams?: string[]) =>
    fetch(`${receiver.url}/streams`, {
      method: "POST",
      headers: { [HEADER.host]: host, [HEADER.shipper]: shipper },
      ...(streams && { body: JSON.stringify({ streams }) }),
    });
  const partOf = (host: string) =>
    readdirSync(join(receiver.dir, host)).flatMap((name) => parseBatchName(name)?.part ?? []);
  expect((await chunk("10.9.0.1", "a-stream-of-now")).status).toBe(200); // it had asked another folder
  expect((await ask("10.9.0.2", ["a-stream-of-before"])).status).toBe(200);
  expect((await chunk("10.9.0.2", "a-stream-of-now")).status).toBe(200);
  expect((await ask("10.9.0.3")).status).toBe(200); // the very first start
  expect((await chunk("10.9.0.3", "a-stream-of-now")).status).toBe(200);
  await until("parts are there", () => partOf("10.9.0.3").length > 0);
  for (const host of ["10.9.0.1", "10.9.0.2"]) expect(partOf(host)[0]).toBeGreaterThan(1_000_000_000);
  expect(partOf("10.9.0.3")).toEqual([1]);
});

async function openStore(dir: string, now: () => number) {
  const store = new Store({
    ...{ dir, prefix: "accessLog", windowMinutes: 20, sealAfterSeconds: 120, sealLatestSeconds: 900 },
    ...{ forgetAfterDays: 30, maxHosts: 100, maxStreamsPerHost: 100, maxWindowsPerHost: 100 },
    ...{ maxNamesPerHour: 1000, findWindow: createWindowFinder(20), log: quiet, now },
  });
  await store.start(() => true);
  return store;
}

test("delivered is the beginning of the first line that is not, within a chunk, too", async () => {
  const dir = await tempFolder();
  let now = Date.parse("2026-11-22T06:21:00+06:00");
  const store = await openStore(dir, () => now);
  const early = lines("a", 1, 3).replaceAll("06:20:01", "06:10:01");
  const body = Buffer.from(early + lines("b", 1, 3));
  const range = { offset: 0, end: body.length, mark: `4:${"A".repeat(22)}`, begin: "new" as const };
  await store.commit({ host: "10.0.0.1", stream: "stream-0001", ...range, body, peer: "" });
  const delivered = async () => (await store.streams("10.0.0.1", undefined, {}, ""))[0]?.delivered;
  expect(await delivered()).toBe(0);
  now += 3 * 60_000;
  const [first = ""] = await store.seal();
  expect(await delivered()).toBe(0);
  rmSync(join(dir, "10.0.0.1", first)); // the forwarder has moved it to sent/
  expect(await delivered()).toBe(early.length);
  await store.close();
});

test("after its start the receiver seals nothing of a host before it was heard", async () => {
  const dir = await tempFolder();
  let now = Date.parse("2026-11-22T06:00:00+06:00");
  const open = () => openStore(dir, () => now);
  const body = Buffer.from(lines("a", 1, 3));
  const first = await open();
  for (const host of ["10.0.0.1", "10.0.0.2"]) {
    const range = { offset: 0, end: body.length, mark: `4:${"A".repeat(22)}`, begin: "new" as const };
    await first.commit({ host, stream: "stream-0001", ...range, body, peer: "" });
  }
  await first.close();
  now += 7_200_000;
  const store = await open();
  expect(await store.seal()).toEqual([]);
  await store.streams("10.0.0.1", ["stream-0001"], {}, "");
  expect(await store.seal()).toEqual([expect.stringContaining("10-0-0-1")]);
  now += 901_000;
  expect(await store.seal()).toEqual([expect.stringContaining("10-0-0-2")]);
  await store.close();
});

// ---- a receiver whose words are chosen

/** The contract of the wire in memory; what is delivered, what is lost and when it answers is the test's. */
class Middle {
  readonly wire = new Wire();
  readonly bodies: string[] = [];
  /** Chunks that begin a stream, and all, in their order. */
  readonly chunks: ChunkHeaders[] = [];
  /** What the shipper said of how far it is. */
  readonly throughs: number[] = [];
  delivered: number | undefined = 0;
  asked = 0;
  /** Before a question, whose answer is made already, is answered; before a chunk is. */
  holdAnswer: () => Promise<unknown> = async () => {};
  holdChunk: () => Promise<unknown> = async () => {};
  answer: ((chunk: ChunkHeaders) => Response | undefined) | undefined;
  readonly #server = Bun.serve({ hostname: "127.0.0.1", port: 0, fetch: (request) => this.#take(request) });
  readonly url = `http://127.0.0.1:${this.#server.port}`;

  constructor() {
    onCleanup(() => this.#server.stop(true));
  }

  get text(): string {
    return this.bodies.join("");
  }

  get begun(): ChunkHeaders[] {
    return this.chunks.filter(({ begin }) => begin !== undefined);
  }

  stored(): Buffer {
    return Buffer.from(this.text);
  }

  /** Everything is lost, what was stored of it and not delivered, too. */
  wipe(): void {
    this.wire.streams.clear();
    this.bodies.length = 0;
    this.chunks.length = 0;
  }

  async #take(request: Request): Promise<Response> {
    if (!isChunk(request)) {
      const news = parseNews(request.headers);
      this.wire.hear(news);
      if (news.through !== undefined) this.throughs.push(news.through);
      const told = (await (await this.wire.tell(request)).json()) as { streams: StreamStatus[] };
      for (const status of told.streams) Object.assign(status, { delivered: this.#deliveredOf(status) });
      await this.holdAnswer();
      this.asked++;
      return Response.json(told);
    }
    const chunk = parseChunkHeaders(request.headers);
    const raw = new Uint8Array(await request.arrayBuffer());
    const isPacked = request.headers.get("Content-Encoding") === "zstd";
    const body = Buffer.from(isPacked ? zstdDecompressSync(raw) : raw).toString("latin1");
    const forced = this.answer?.(chunk);
    if (forced) return forced;
    const answer = this.wire.take(chunk, body.split("\n").length - 1, () => {
      this.bodies.push(body);
      this.chunks.push(chunk);
    });
    await this.holdChunk();
    return answer;
  }

  #deliveredOf({ stream, offset }: StreamStatus): number {
    const from = this.chunks.find((chunk) => chunk.stream === stream)?.offset ?? 0;
    return Math.min(offset, Math.max(from, this.delivered ?? offset));
  }

  /** Holds the answers to questions back from now on; ends when one waits, and gives what lets them go. */
  async holdQuestion(): Promise<() => void> {
    const go = Promise.withResolvers<void>();
    let isHeld = false;
    this.holdAnswer = () => {
      isHeld = true;
      return go.promise;
    };
    await until("a question is on its way", () => isHeld);
    return () => {
      this.holdAnswer = async () => {};
      go.resolve();
    };
  }

  /** Waits for so many more answers. */
  async heartbeats(count: number): Promise<void> {
    const from = this.asked;
    await until("heartbeats", () => this.asked >= from + count);
  }
}

test("while what was lost is not shipped again, nothing is said to be all answered", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, QUICK);
  sender.write(lines("a", 1, 20));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  sender.write("the end of this line is still to come");
  await middle.heartbeats(3);
  await until("it says how far it is", () => middle.throughs.length > 0);
  const go = Promise.withResolvers<void>();
  middle.holdChunk = () => go.promise;
  middle.wipe();
  await until("it ships again", () => middle.begun.length > 0);
  middle.throughs.length = 0;
  await middle.heartbeats(4);
  expect(middle.throughs).toEqual([]);
  go.resolve();
  sender.write("\n");
  await expectArrives(middle, sender);
  await until("it says so again", () => middle.throughs.length > 0);
  expect(await shipper.stop()).toBe(0);
});

test("of a file that is away when its lines are lost, the line in whose middle they begin comes whole", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, rotateWaitSeconds: 1 });
  sender.write(lines("a", 1, 20));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  middle.delivered = lines("a", 1, 10).length + 30; // as where rules left lines out of the chunk
  await middle.heartbeats(3);
  execFileSync("sh", ["-c", 'gzip -c "$0" > "$0.1.gz"; : > "$0"', sender.live]);
  await shipper.says("file was cut and written anew");
  middle.wipe();
  await shipper.says("receiver has lost lines of a file that is gone");
  await shipper.says("file is a copy of a known one");
  await until("the last line is there", () => middle.text.includes("GET /a/20 "));
  expect(middle.text).toBe(lines("a", 11, 20));
  expect(await shipper.stop()).toBe(0);
});

test("offsets that were answered while the question was on its way are no loss", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, QUICK);
  sender.write(lines("a", 1, 20));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  const answer = await middle.holdQuestion();
  sender.write(lines("a", 21, 40));
  await expectArrives(middle, sender);
  answer();
  await middle.heartbeats(3);
  expect(middle.begun).toHaveLength(1);
  expectSameLines(middle.text, Buffer.concat(sender.written));
  expect(await shipper.stop()).toBe(0);
});

test("a stream that begins while the question is on its way is no loss", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, flushMs: 10 });
  sender.write(lines("a", 1, 20));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  let refused = 0;
  middle.answer = () => {
    refused++;
    return new Response("busy", { status: 503, headers: { "Retry-After": "0" } });
  };
  sender.rotate();
  sender.write(lines("b", 1, 20));
  await until("the second stream has its name", () => refused > 0);
  const answer = await middle.holdQuestion();
  middle.answer = undefined;
  await expectArrives(middle, sender);
  answer();
  await middle.heartbeats(3);
  expect(middle.begun.map(({ begin }) => begin)).toEqual(["new", "new"]);
  expectSameLines(middle.text, Buffer.concat(sender.written));
  expect(await shipper.stop()).toBe(0);
});

test("a file that is just being ended when the loss is noticed is read again", () => {
  const context = { ...{ log: quiet, faults: createFaultLog(quiet) }, now: Date.now, mono: performance.now };
  const config = {
    files: [],
    stateDir: "",
    startAt: "beginning",
    rotateWaitSeconds: 1,
    pollSeconds: 1,
  } as const;
  const streams = new Streams({ ...config, files: [] }, context);
  const ended = { is: "ended", size: 100 } as const;
  const stream = { id: "a", path: "/log", from: 0, offset: 100, size: 100, marks: [], phase: ended } as never;
  takeStatus(streams, stream, undefined, 100);
  Object.assign(stream, { phase: ended }); // the finish was waiting for the disk when the answer came
  takeWayBack(streams, stream);
  expect(stream).toMatchObject({ begin: "again", offset: 0, phase: { is: "reading" } });
});

test("a file without a name, of which the receiver has more than an older cursor: all of it comes again when that is lost", () => {
  const context = { ...{ log: quiet, faults: createFaultLog(quiet) }, now: Date.now, mono: performance.now };
  const config = { stateDir: "", startAt: "beginning", rotateWaitSeconds: 1, pollSeconds: 1 } as const;
  const streams = new Streams({ ...config, files: [] }, context);
  const [begin, phase] = ["new", { is: "gone" }];
  const stream = { id: "a", path: "/log", from: 0, offset: 0, size: 100, marks: [], begin, phase } as never;
  const committed = ({ begin, offset }: { begin?: string; offset: number }) => (begin ? undefined : offset);
  takeStatus(streams, stream, { stream: "a", offset: 60, mark: "", head: "" } as never, committed(stream));
  expect(stream).toMatchObject({ offset: 60 });
  takeStatus(streams, stream, undefined, committed(stream)); // by then the folder is another one
  expect(stream).toMatchObject({ begin: "again", offset: 0 });
});

test("a copy that is packed between the look and its opening is not told as lost: its archive is there", async () => {
  const [folder, stateDir] = [await tempFolder(), await tempFolder()];
  const path = join(folder, "access.log");
  const context = { ...{ log: quiet, faults: createFaultLog(quiet) }, now: Date.now, mono: performance.now };
  const config = { stateDir, startAt: "beginning", rotateWaitSeconds: 1, pollSeconds: 1 } as const;
  writeFileSync(path, lines("a", 1, 40));
  const streams = new Streams({ ...config, files: [path] }, context as never);
  const looker = new Looker(streams);
  await streams.open();
  await looker.look();
  copyFileSync(path, `${path}.1`);
  const survey = streams.paths.survey.bind(streams.paths);
  let listings = 0;
  streams.paths.survey = (before) => {
    const seen = survey(before);
    if (++listings === 2) execFileSync("gzip", [`${path}.1`]); // two that agree are believed
    return seen;
  };
  await looker.look();
  expect([listings, looker.held.size]).toEqual([2, 1]);
  await looker.look();
  expect([streams.lost, looker.held.size]).toEqual([0, 1]);
  expect([...looker.held.values()][0]?.found.path).toBe(`${path}.1.gz`);
  for (const { file } of looker.held.values()) await file?.close();
  for (const stream of streams.list) await stream.file?.close();
});

for (const kind of ["new", "empty"]) {
  test(`a log that was ${kind}, and is cut while its first bytes are read, is not taken for what came after`, async () => {
    const [folder, stateDir] = [await tempFolder(), await tempFolder()];
    const path = join(folder, "access.log");
    const [before, after] = [lines("a", 1, 40), lines("b", 1, 5)];
    const cut = () => {
      copyFileSync(path, `${path}.1`);
      truncateSync(path);
      writeFileSync(path, after);
    };
    const info = (message: string) => {
      if (message === "following" && kind === "new" && streams.list.length === 1) cut();
    };
    const context = { log: { ...quiet, info }, now: Date.now, mono: performance.now };
    const config = { stateDir, startAt: "beginning", rotateWaitSeconds: 0.05, pollSeconds: 1 } as const;
    const streams = new Streams({ ...config, files: [path] }, {
      ...context,
      faults: createFaultLog(quiet),
    } as never);
    const looker = new Looker(streams);
    writeFileSync(path, kind === "new" ? before : "");
    await streams.open();
    await looker.look();
    if (kind === "empty") {
      writeFileSync(path, before);
      const survey = streams.paths.survey.bind(streams.paths);
      streams.paths.survey = (live) => {
        streams.paths.survey = survey;
        const listed = survey(live);
        cut();
        return listed;
      };
    }
    const sizes = () => streams.list.map(({ size }) => size).sort();
    await until(
      () => `streams of ${sizes()} bytes`,
      async () => {
        await looker.look();
        return sizes().join() === [before.length, after.length].join();
      },
    );
    expect(streams.lost).toBe(0);
    for (const { file } of looker.held.values()) await file?.close();
    for (const stream of streams.list) await stream.file?.close();
  });
}

test("what an event tells of a file while it is read or compared is not taken for its stream's", async () => {
  const context = { ...{ log: quiet, faults: createFaultLog(quiet) }, now: Date.now, mono: performance.now };
  const config = { stateDir: "", startAt: "beginning", rotateWaitSeconds: 1, pollSeconds: 1 } as const;
  const streams = new Streams({ ...config, files: [] }, context as never);
  const path = join(await tempFolder(), "access.log");
  const text = lines("a", 1, 40);
  writeFileSync(path, text + lines("b", 1, 40));
  const file = await LogFile.open(path);
  onCleanup(() => file.close());
  const seen = text.length;
  const state = { from: 0, offset: 0, log: path, path, key: file.key, copies: [], marks: [], mtimeMs: 0 };
  const stream = withFile({ ...state, size: seen, phase: { is: "reading" } }, 0);
  stream.size = text.length * 2; // the file was cut and filled anew since the look
  expect(await streams.rebase(stream, file, seen)).toBe(true);
  expect(stream).toMatchObject({ size: text.length * 2, checkedSize: seen });

  stream.size = stream.checkedSize = seen;
  const readOnce = file.readOnce.bind(file);
  file.readOnce = async (bytes: Uint8Array, at: number) => {
    const n = await readOnce(bytes, at);
    stream.size = 1_000_000;
    return n;
  };
  const options = { buffer: Buffer.alloc(MARK_BYTES + 1024), offset: 0, newest: undefined };
  await readPortion(stream, file, { ...options, chunkBytes: 1024, skip: [] });
  expect(stream).toMatchObject({ size: 1_000_000, checkedSize: seen });
});

test("a 409 below what was answered is sent again under the same name, and nothing falls back", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, chunkBytes: 4096, inFlight: 1 });
  sender.write(lines("a", 1, 20));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  const { end = 0, mark = "" } = middle.chunks[0] ?? {};
  sender.write(lines("a", 21, 40));
  await expectArrives(middle, sender);
  let times = 0;
  middle.answer = () => {
    if (times++ > 0) return undefined;
    return new Response("overtaken", {
      status: 409,
      headers: { [HEADER.offset]: `${end}`, [HEADER.mark]: mark },
    });
  };
  sender.write(lines("a", 41, 60));
  await expectArrives(middle, sender);
  await middle.heartbeats(2);
  expect(times).toBeGreaterThan(1);
  expect(middle.begun).toHaveLength(1);
  expectSameLines(middle.text, Buffer.concat(sender.written));
  expect(await shipper.stop()).toBe(0);
});

test("of a file in which a second stream began, what the first one had not delivered is shipped again, too", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, chunkBytes: 4096, inFlight: 1 });
  const kept = lines("a", 1, 150);
  sender.write(kept);
  let shipper = sender.start();
  await expectArrives(middle, sender);
  sender.write(lines("lost", 1, 60));
  await expectArrives(middle, sender);
  expect(await shipper.stop()).toBe(0);
  truncateSync(sender.live, kept.length); // the host lost its newest bytes, and wrote others
  const others = lines("new", 1, 70);
  sender.write(others);
  shipper = sender.start();
  await until("a second stream begins", () => middle.begun.length === 2);
  await until("all is there", () => middle.text.endsWith(others.slice(-200)));
  await middle.heartbeats(2);
  middle.wipe();
  await until(
    "both come again",
    () => middle.text.includes(lines("a", 1, 1)) && middle.text.includes(lines("new", 70, 70)),
  );
  await middle.heartbeats(3);
  const all = middle.text.split(/(?<=\n)/);
  for (const line of (kept + others).split(/(?<=\n)/))
    expect(all.filter((each) => each === line)).toEqual([line]);
  expect(middle.begun.every(({ begin }) => begin === "again")).toBe(true);
  expect(await shipper.stop()).toBe(0);
});

test("a file that was shipped again and is compressed then is known by its newest stream: nothing comes a third time", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, QUICK);
  sender.write(lines("a", 1, 40));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  sender.rotate();
  sender.write(lines("b", 1, 2));
  await expectArrives(middle, sender);
  middle.wipe();
  const expected = Buffer.concat(sender.written).toString();
  await until("all comes again", () => middle.text.length >= expected.length);
  await middle.heartbeats(2);
  execFileSync("gzip", [join(sender.logs, "access.log.1")]);
  await shipper.says("copy of a known one");
  await middle.heartbeats(3);
  expect(middle.text.length).toBe(expected.length);
  middle.delivered = undefined; // all of it
  await middle.heartbeats(2);
  middle.wipe();
  await middle.heartbeats(3);
  expect(middle.text).toBe("");
  sender.write(lines("b", 3, 4));
  await until("what is new goes on", () => middle.text === lines("b", 3, 4));
  expect(await shipper.stop()).toBe(0);
});

test("what is delivered of a log that always has chunks on their way is known, and not shipped again", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, flushMs: 1 });
  middle.holdChunk = () => Bun.sleep(60);
  const shipper = sender.start();
  let n = 0;
  const writing = setInterval(() => sender.write(lines("a", ++n, n)), 5);
  onCleanup(() => clearInterval(writing));
  await until("much is there", () => middle.text.length > 20_000);
  middle.delivered = 10_000; // within a line: so it is where rules left lines out
  await middle.heartbeats(4);
  middle.wipe();
  const again = await until("it is shipped again", () => middle.begun.find(({ begin }) => begin === "again"));
  expect(again.offset).toBe(Buffer.concat(sender.written).lastIndexOf("\n", 9_999) + 1);
  clearInterval(writing);
  expect(await shipper.stop()).toBe(0);
});

test("a stream that is known from an answer alone goes on without Log-Begin", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, timeoutSeconds: 1 });
  sender.write(lines("a", 1, 40));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  expect(await shipper.stop()).toBe(0);
  rmSync(sender.stateDir, { recursive: true });
  mkdirSync(sender.stateDir);
  middle.chunks.length = 0;
  sender.write(lines("a", 41, 50));
  const second = sender.start();
  await expectArrives(middle, sender);
  expect(middle.chunks.length).toBeGreaterThan(0);
  expect(middle.begun).toEqual([]);
  expect(await second.stop()).toBe(0);
});

test("a receiver that was set back gets what it lacks, from the highest offset that fits, not what was delivered before", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, { ...QUICK, chunkBytes: 4096, inFlight: 1 });
  middle.delivered = 1000;
  sender.write(lines("a", 1, 60));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  const [stream, before] = [...middle.wire.streams][0] ?? [];
  sender.write(lines("a", 61, 120));
  await expectArrives(middle, sender);
  await middle.heartbeats(2);
  middle.wipe();
  middle.wire.streams.set(stream as string, before as NonNullable<typeof before>); // a backup of the folder
  const again = await until("it is shipped again", () => middle.begun[0]);
  expect(again).toMatchObject({ begin: "again", offset: before?.offset as number });
  await until("all that it lacks", () => middle.text === lines("a", 61, 120));
  expect(await shipper.stop()).toBe(0);
});

/** A log that was rotated, and its rotated file shipped and done. */
async function rotateToItsEnd(middle: Middle) {
  const sender = await createSender(middle.url, { ...QUICK, rotateWaitSeconds: 0.2 });
  sender.write(lines("a", 1, 40));
  const shipper = sender.start();
  await expectArrives(middle, sender);
  sender.rotate();
  sender.write(lines("b", 1, 2));
  await expectArrives(middle, sender);
  await shipper.says("file is done");
  const rotated = join(sender.logs, "access.log.1");
  return { sender, shipper, rotated, size: statSync(rotated).size };
}

test("cut before the first answer to a damaged cursor: its copy goes on as the stream that the receiver knows", async () => {
  const receiver = await startRealReceiver();
  const sender = await createSender(receiver.url, QUICK);
  sender.write(lines("a", 1, 300));
  const before = sender.start();
  await expectArrives(receiver, sender);
  await before.stop("SIGKILL");
  for (const name of ["cursor.json", "cursor.json.previous"])
    writeFileSync(join(sender.stateDir, name), Buffer.alloc(100));
  sender.write(lines("a", 301, 350));
  receiver.running.process.kill("SIGSTOP"); // the answer comes before the copy is known
  const shipper = sender.start();
  await shipper.says("following");
  const copy = join(sender.folder, "copy");
  copyFileSync(sender.live, copy);
  truncateSync(sender.live);
  sender.write(lines("b", 1, 5));
  await shipper.says("file was cut and written anew");
  receiver.running.process.kill("SIGCONT");
  await until("what is new is there", () => receiver.stored(sender.host).includes(lines("b", 1, 5)));
  renameSync(copy, `${sender.live}.1`);
  const sorted = (bytes: Buffer) => bytes.toString().split("\n").sort();
  const isAllThere = () =>
    sorted(receiver.stored(sender.host)).join() === sorted(Buffer.concat(sender.written)).join();
  await until("all of it is there once", isAllThere);
  await wipe(receiver);
  await until("all of it is there again, as this host still has it", isAllThere);
  expect(shipper.output).not.toContain("lost lines of a file that is gone");
  expect(shipper.output).not.toContain("bytes lost");
  expect(await shipper.stop()).toBe(0);
});

test("a rotated file that was removed meanwhile: what was not delivered of it is told to the byte", async () => {
  const middle = new Middle();
  const { shipper, rotated, size } = await rotateToItsEnd(middle);
  middle.delivered = 1234;
  await middle.heartbeats(2);
  rmSync(rotated);
  middle.wipe();
  await until("it is told to the receiver", () => middle.wire.lost > 0);
  expect(middle.wire.lost).toBe(size - 1234);
  await shipper.says(`bytes=${size - 1234}`);
  await middle.heartbeats(3);
  expect(middle.wire.lost).toBe(size - 1234);
  expect(await shipper.stop()).toBe(0);
});

test("a shipper that was killed tells to the byte what a rotated file took along that was removed meanwhile", async () => {
  const middle = new Middle();
  const { sender, shipper, rotated, size } = await rotateToItsEnd(middle);
  middle.delivered = 1234;
  const cursor = () => readFileSync(join(sender.stateDir, "cursor.json"), "utf8");
  await until("the cursor has what is delivered", () => cursor().includes('"delivered":1234'));
  await shipper.stop("SIGKILL");
  rmSync(rotated);
  middle.wipe();
  const again = sender.start();
  await until("it is told to the receiver", () => middle.wire.lost > 0);
  await again.says(`bytes=${size - 1234}`);
  sender.write(lines("b", 3, 4));
  await until("what is new goes on", () => middle.text === lines("b", 3, 4)); // the first two are at the client
  await middle.heartbeats(3);
  expect(middle.wire.lost).toBe(size - 1234);
  expect(await again.stop()).toBe(0);
});

test("--delivered ends 0 when all of a file is at the client, also rotated and compressed, else 1 with the bytes", async () => {
  const middle = new Middle();
  const sender = await createSender(middle.url, QUICK);
  sender.write(lines("a", 1, 40));
  const size = lines("a", 1, 40).length;
  const shipper = sender.start();
  await expectArrives(middle, sender);
  await middle.heartbeats(2);
  const ask = (path: string) => runScriptOnce("shipper", sender.config, ["--delivered", path]);
  middle.delivered = 1000;
  expect(await ask(sender.live)).toMatchObject({
    code: 1,
    output: expect.stringContaining(`${size - 1000} of ${size} bytes`),
  });
  middle.delivered = undefined;
  expect(await ask(sender.live)).toMatchObject({
    code: 0,
    output: expect.stringContaining(`all ${size} bytes`),
  });
  sender.rotate();
  const rotated = join(sender.logs, "access.log.1");
  sender.write(lines("b", 1, 2));
  await expectArrives(middle, sender);
  expect(await ask(rotated)).toMatchObject({ code: 0 });
  await shipper.says("file is done");
  expect(await shipper.stop()).toBe(0);
  execFileSync("gzip", [rotated]);
  expect(await ask(`${rotated}.gz`)).toMatchObject({ code: 0 });
  middle.delivered = 1000;
  expect(await ask(`${rotated}.gz`)).toMatchObject({
    code: 1,
    output: expect.stringContaining(`${size - 1000} of ${size}`),
  });
});
