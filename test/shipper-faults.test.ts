/**
 * The shipper as a process, and everything around it that can fail: files that are none, permissions, its own
 * state, its death at every step, and every answer that a receiver can give or fail to give. Each time: the
 * offset is held, the operator is told once and not for every try, and in the end each line is there once.
 */
import { afterEach, beforeAll, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { dirname, join } from "node:path";
import { listBatches } from "../lib/batch.ts";
import {
  type Asked,
  createSender,
  expectArrives,
  expectTags,
  lines,
  openLogs,
  type RealReceiver,
  type Script,
  type Sender,
  shiftNames,
  startRealReceiver,
  startStub,
  startWrapped,
  tagsOf,
} from "./pipeline.ts";
import {
  freePort,
  missing,
  notRoot,
  onCleanup,
  type Running,
  selfSigned,
  start,
  tempFolder,
  until,
} from "./support.ts";

let receiver: RealReceiver;
beforeAll(async () => {
  receiver = await startRealReceiver();
});

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function startShipper(sender: Sender, env?: Record<string, string>): Running {
  const shipper = sender.start([], env);
  running.push(shipper);
  return shipper;
}

/** Changes the shipper's section of a sender's config. */
function configure(sender: Sender, options: object): void {
  const config = JSON.parse(readFileSync(sender.config, "utf8"));
  writeFileSync(sender.config, JSON.stringify({ shipper: { ...config.shipper, ...options } }));
}

function linesWith(output: string, text: string): string[] {
  return output.split("\n").filter((line) => line.includes(text));
}

// ---- files

/** A sender that follows a second file too, which shows that the first one holds nothing back. */
async function withOther(): Promise<{ sender: Sender; other: string }> {
  const sender = await createSender(receiver.url);
  const other = join(sender.logs, "other.log");
  writeFileSync(other, lines("other", 1, 3));
  configure(sender, { files: [sender.live, other] });
  return { sender, other };
}

describe("a path that is no plain file", () => {
  test.each([
    ["a FIFO", (path: string) => execFileSync("mkfifo", [path]), "it is a FIFO, expected a regular file"],
    ["a directory", (path: string) => mkdirSync(path), "it is a directory, expected a regular file"],
    ["a symlink loop", (path: string) => symlinkSync(path, path), "ELOOP"],
  ])(
    "%s is refused in one line, the other file goes on, and a file in its place is followed",
    async (_, make, reason) => {
      const { sender, other } = await withOther();
      unlinkSync(sender.live);
      make(sender.live);
      const shipper = startShipper(sender);
      await shipper.says(reason);
      await expectArrives(receiver, sender, lines("other", 1, 3), shipper);
      appendFileSync(other, lines("other", 4, 6));
      await expectArrives(receiver, sender, lines("other", 1, 6), shipper);
      expect(linesWith(shipper.output, reason).length).toBe(1);
      rmSync(sender.live, { recursive: true });
      writeFileSync(sender.live, lines("a", 1, 3));
      await expectArrives(receiver, sender, lines("other", 1, 6) + lines("a", 1, 3), shipper);
      expect(await shipper.stop()).toBe(0);
    },
  );

  test("a symlink is followed to its new target, and the old one is read to its end", async () => {
    const sender = await createSender(receiver.url);
    const day = (n: number) => join(sender.logs, `access-2026-11-2${n}.log`);
    unlinkSync(sender.live);
    const point = (n: number) => {
      symlinkSync(day(n), `${sender.live}.new`);
      renameSync(`${sender.live}.new`, sender.live);
    };
    writeFileSync(day(1), lines("a", 1, 10));
    point(1);
    const shipper = startShipper(sender);
    await expectArrives(receiver, sender, lines("a", 1, 10), shipper);
    appendFileSync(day(1), lines("a", 11, 20));
    writeFileSync(day(2), lines("b", 1, 10));
    point(2);
    appendFileSync(day(1), lines("a", 21, 22));
    const both = { a: lines("a", 1, 22), b: lines("b", 1, 10) };
    await until("all is there", () => receiver.stored(sender.host).length >= (both.a + both.b).length);
    expect(await shipper.stop()).toBe(0);
    appendFileSync(day(2), lines("b", 11, 20));
    writeFileSync(day(3), lines("c", 1, 10));
    point(3);
    await sender.once();
    expectTags(receiver.stored(sender.host), { a: both.a, b: lines("b", 1, 20), c: lines("c", 1, 10) });
  });
});

/** Root without the capabilities that let it pass over permissions. */
const UNPRIVILEGED = ["--bounding-set=-dac_override,-dac_read_search"];

describe.skipIf(notRoot() || missing({ setpriv: "util-linux" }))("permissions", () => {
  test("a log that may not be read holds nothing back, and goes on at its offset when it may", async () => {
    const { sender, other } = await withOther();
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    chmodSync(sender.live, 0);
    const shipper = startWrapped("setpriv", UNPRIVILEGED, sender);
    running.push(shipper);
    await shipper.says("cannot read log file");
    appendFileSync(other, lines("other", 4, 6));
    await until("the other file goes on", () => receiver.stored(sender.host).includes("GET /other/6 "));
    expect(linesWith(shipper.output, "cannot read log file").length).toBe(1);
    chmodSync(sender.live, 0o640);
    await shipper.says("log file can be read again");
    await until("the rest is there", () => receiver.stored(sender.host).includes("GET /a/20 "));
    expectTags(receiver.stored(sender.host), { a: lines("a", 1, 20), other: lines("other", 1, 6) });
    expect(await shipper.stop()).toBe(0);
  });

  test("a log that may not be read at the very first start is shipped whole when it may", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 10));
    chmodSync(sender.live, 0);
    const shipper = startWrapped("setpriv", UNPRIVILEGED, sender);
    running.push(shipper);
    await shipper.says("cannot read log file");
    chmodSync(sender.live, 0o640);
    await expectArrives(receiver, sender, undefined, shipper);
    expect(await shipper.stop()).toBe(0);
  });

  test("a folder that may not be read: the open file is read on, and all goes on when it may", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 10));
    const shipper = startWrapped("setpriv", UNPRIVILEGED, sender);
    running.push(shipper);
    await expectArrives(receiver, sender, undefined, shipper);
    chmodSync(sender.logs, 0);
    sender.write(lines("a", 11, 20));
    await shipper.says("cannot look for log file");
    chmodSync(sender.logs, 0o750);
    await expectArrives(receiver, sender, undefined, shipper);
    expect(linesWith(shipper.output, "cannot look for log file").length).toBe(1);
    expect(await shipper.stop()).toBe(0);
  });
});

// ---- its own state

describe("a damaged cursor", () => {
  const damages: [string, (text: Buffer) => Buffer][] = [
    ["empty", () => Buffer.alloc(0)],
    ["cut short", (text) => text.subarray(0, text.length >> 1)],
    ["full of NULs", (text) => Buffer.alloc(text.length)],
    ["of another form", () => Buffer.from('{"version":1,"families":[]}')],
  ];
  test.each(damages)("that is %s: the receiver knows how far each file was shipped", async (_, damage) => {
    for (const both of [false, true]) {
      const sender = await createSender(receiver.url);
      sender.write(lines("a", 1, 300));
      await sender.once();
      sender.rotate();
      sender.write(lines("b", 1, 10));
      await sender.once();
      sender.write(lines("b", 11, 20));
      const names = both ? ["cursor.json", "cursor.json.previous"] : ["cursor.json"];
      for (const name of names.map((name) => join(sender.stateDir, name))) {
        writeFileSync(name, damage(readFileSync(name)));
      }
      const output = await sender.once();
      expect(output).toContain("cursor is damaged");
      expect(output).toContain(both ? "the receiver is asked" : "the one before it is taken");
      await expectArrives(receiver, sender);
    }
  });

  test("is asked about, and until the receiver answers nothing is sent", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    for (const name of ["cursor.json", "cursor.json.previous"])
      writeFileSync(join(sender.stateDir, name), "");
    stub.asked.length = 0;
    let refusals = 2;
    stub.script = () => (refusals-- > 0 ? new Response(null, { status: 503 }) : undefined);
    await sender.once();
    expect(stub.asked.map(({ method }) => method).slice(0, 3)).toEqual(["streams", "streams", "streams"]);
    expect(stub.asked.find(({ method }) => method === "POST")?.offset).toBe(lines("a", 1, 10).length);
    expect(stub.text()).toBe(lines("a", 1, 20));
  });

  test("and a receiver that knows nothing either: what comes takes no name that may have been used", async () => {
    const sender = await createSender(startStub().url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    for (const name of ["cursor.json", "cursor.json.previous"])
      writeFileSync(join(sender.stateDir, name), "");
    const own = await startRealReceiver();
    const config = readFileSync(sender.config, "utf8");
    writeFileSync(sender.config, config.replace(/"http:[^"]*"/, JSON.stringify(own.url)));
    await sender.once();
    expect(own.stored(sender.host).toString()).toBe(lines("a", 1, 10));
    expect(await listBatches(join(own.dir, sender.host), "open")).toEqual([
      expect.stringMatching(/\.\d{10}\.log\.part$/),
    ]);
  });

  test("is asked about: of a file that vanishes before the answer, what the receiver lacks is told as lost", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { rotateWaitSeconds: 0.3, pollSeconds: 0.2 });
    sender.write(lines("shipped", 1, 10));
    await sender.once();
    for (const tag of ["unread", "live"]) {
      shiftNames(sender);
      sender.rotate();
      sender.write(lines(tag, 1, 20));
    }
    for (const name of ["cursor.json", "cursor.json.previous"])
      writeFileSync(join(sender.stateDir, name), "");
    let isAway = true;
    stub.script = () => (isAway ? new Response(null, { status: 503 }) : undefined);
    const shipper = sender.start();
    const rotated = [1, 2].map((n) => join(sender.logs, `access.log.${n}`));
    for (const path of rotated) await shipper.says(`following path=${path} `);
    for (const path of rotated) unlinkSync(path);
    isAway = false;
    await until("the live log is shipped", () => stub.text().includes("/live/20 "));
    await shipper.says("bytes lost");
    expect(await shipper.stop()).toBe(0);
    const lost = [...shipper.output.matchAll(/bytes lost.* bytes=(\d+)/g)].map(([, bytes]) => Number(bytes));
    expect(lost).toEqual([lines("unread", 1, 20).length]);
  });
});

describe.skipIf(notRoot() || missing({ setpriv: "util-linux" }))("a state folder", () => {
  test.each(["full", "read-only"])(
    "that is %s stops nothing, and the operator is told once",
    async (fault) => {
      const disk = await tempFolder();
      execFileSync("mount", ["-t", "tmpfs", "-o", "size=64k", "tmpfs", disk]);
      onCleanup(() => start("umount", ["-l", disk]).ended);
      const stateDir = join(disk, "state");
      const sender = await createSender(receiver.url, { stateDir });
      sender.write(lines("a", 1, 10));
      await sender.once();
      const ballast = join(disk, "ballast");
      const set = (broken: boolean) => {
        if (fault === "read-only") chmodSync(stateDir, broken ? 0o550 : 0o750);
        else if (broken) expect(() => writeFileSync(ballast, Buffer.alloc(128 << 10))).toThrow("ENOSPC");
        else unlinkSync(ballast);
      };
      const shipper = startWrapped("setpriv", UNPRIVILEGED, sender);
      await until("the log is open", () => openLogs(shipper) > 0);
      set(true);
      sender.write(lines("a", 11, 500));
      await shipper.says("cannot save cursor: shipping goes on");
      sender.write(lines("a", 501, 600));
      await expectArrives(receiver, sender, undefined, shipper);
      expect(await shipper.stop("SIGKILL")).toBe("SIGKILL");
      const second = startWrapped("setpriv", UNPRIVILEGED, sender); // with a cursor that is far behind
      sender.write(lines("a", 601, 700));
      await expectArrives(receiver, sender, undefined, second);
      sender.write(lines("a", 701, 800));
      await expectArrives(receiver, sender, undefined, second);
      await second.says("cannot save cursor: shipping goes on");
      set(false);
      await second.says("cursor is saved again");
      expect(linesWith(second.output, "cannot save cursor").length).toBe(1);
      expect(await second.stop()).toBe(0);
      await sender.once();
      await expectArrives(receiver, sender);
    },
  );
});

// ---- kill -9

describe("killed", () => {
  const cases = ["shipper:sending", "shipper:answered", "shipper:saved", "durable:written"].flatMap((step) =>
    [1, 2, 3].map((count) => [step, count] as const),
  );
  test.each(cases)("at %s, time %i: every line once", async (step, count) => {
    const sender = await createSender(receiver.url, { chunkBytes: 4096, flushMs: 0 });
    sender.write(lines("a", 1, 300));
    const shipper = startShipper(sender, {
      LOG_RT_SYNC_STOP_AT: step,
      LOG_RT_SYNC_STOP_COUNT: String(count),
    });
    let n = 0;
    let ended = false;
    shipper.ended.then(() => (ended = true));
    await until("it is killed", () => {
      if (!ended && n < 400) sender.write(lines("b", ++n, n)); // there is always something to ship and save
      return ended;
    });
    expect(await shipper.ended).toBe("SIGKILL");
    // Before the first save nothing was sent, and the next start is the first one: it takes the live file alone.
    if (existsSync(join(sender.stateDir, "cursor.json"))) sender.rotate();
    sender.write(lines("c", 1, 10));
    await sender.once();
    expectTags(receiver.stored(sender.host), tagsOf(Buffer.concat(sender.written).toString()));
  });

  test.each(["journal:written", "journal:synced", "store:synced", "store:noted"])(
    "the receiver at %s: the shipper waits for the next one, every line once",
    async (step) => {
      const own = await startRealReceiver();
      await own.running.stop();
      await own.start({ LOG_RT_SYNC_STOP_AT: step, LOG_RT_SYNC_STOP_COUNT: "2" });
      const sender = await createSender(own.url, { chunkBytes: 4096 });
      sender.write(lines("a", 1, 300));
      const shipper = startShipper(sender);
      expect(await own.running.ended).toBe("SIGKILL");
      await own.start();
      await expectArrives(own, sender, undefined, shipper);
      expect(await shipper.stop()).toBe(0);
      await own.running.stop();
    },
  );
});

// ---- the wire

/** In front of the real receiver: passes on what comes, and may treat the answer of a connection in its own way. */
async function startProxy(
  to: string,
  answer: (data: Buffer, client: Socket, count: number) => void,
): Promise<string> {
  const port = await freePort();
  let count = 0;
  const server = createServer((client) => {
    const upstream = connect(Number(new URL(to).port), "127.0.0.1");
    client.pipe(upstream);
    upstream.on("data", (data) => answer(data, client, ++count));
    for (const [one, two] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      one.on("error", () => {});
      one.on("close", () => two.destroy());
    }
  });
  server.listen(port, "127.0.0.1");
  onCleanup(() => server.close());
  return `http://127.0.0.1:${port}`;
}

describe("a lost answer", () => {
  test("to a chunk that is stored: the repeat is recognised", async () => {
    const url = await startProxy(receiver.url, (data, client, count) => {
      if (count % 2 === 1 && count < 8) client.destroy();
      else client.write(data);
    });
    const sender = await createSender(url, { chunkBytes: 4096 });
    sender.write(lines("a", 1, 300));
    await sender.once();
    await expectArrives(receiver, sender);
  });

  test("over a connection that stays open and silent: given up after timeoutSeconds, and repeated", async () => {
    const url = await startProxy(receiver.url, (data, client, count) => {
      if (count > 2) client.write(data);
    });
    const sender = await createSender(url, { timeoutSeconds: 0.5 });
    sender.write(lines("a", 1, 300));
    const output = await sender.once();
    expect(linesWith(output, "receiver does not take chunks").length).toBe(1);
    await expectArrives(receiver, sender);
  });
});

const HELD = "receiver does not take chunks: held, and tried again";
const AGAIN = "receiver takes chunks again";

function isChunk({ method, end, offset }: Asked): boolean {
  return method === "POST" && end > offset;
}

/** Refuses two chunks; heartbeats have no answer meanwhile. */
function refuseTwice(refuse: () => Response): Script {
  let left = 2;
  return (asked) => {
    if (left === 0 || asked.method !== "POST") return undefined;
    if (!isChunk(asked)) return new Promise(() => {});
    left--;
    return refuse();
  };
}

describe("an answer that refuses", () => {
  const statuses = [400, 401, 403, 404, 415, 421, 429, 500, 502, 503, 507, 409, 302];
  // Side by side: each waits for its own pauses.
  test(`${statuses.join(", ")}: held, told once, pauses that grow, delivered in the end`, async () => {
    await Promise.all(
      statuses.map(async (status) => {
        const stub = startStub(refuseTwice(() => new Response("the reason", { status })));
        const sender = await createSender(stub.url);
        sender.write(lines("a", 1, 10));
        const shipper = startShipper(sender);
        await shipper.says(HELD);
        sender.write(lines("a", 11, 20));
        await shipper.says(AGAIN);
        await until(`all is there after ${status}`, () => stub.text().length >= lines("a", 1, 20).length);
        expect(stub.text()).toBe(lines("a", 1, 20));
        const tries = stub.asked.filter(isChunk).slice(0, 3);
        expect({ status, offsets: tries.map(({ offset }) => offset) }).toEqual({
          status,
          offsets: [0, 0, 0],
        });
        const [told, ...more] = linesWith(shipper.output, HELD);
        expect({ status, more }).toEqual({ status, more: [] });
        expect(told).toContain(`status=${status} reason="the reason"`);
        expect(linesWith(shipper.output, AGAIN).join("")).toContain("failures=2 ");
        const [first = 0, second = 0, third = 0] = tries.map(({ at }) => at);
        const least = [429, 500, 502, 503, 507].includes(status) ? 250 : 1000;
        expect(second - first).toBeGreaterThanOrEqual(least - 20);
        expect(third - second).toBeGreaterThanOrEqual(2 * least - 20);
        expect(await shipper.stop()).toBe(0);
      }),
    );
  });

  test.each([
    ["seconds", () => "1", 1000],
    ["a date", () => new Date(Date.now() + 2000).toUTCString(), 1000], // it has no fractions
  ])("with Retry-After in %s is tried again after that time, and not before", async (_, after, least) => {
    const refuse = () => new Response("busy", { status: 503, headers: { "Retry-After": after() } });
    const stub = startStub(refuseTwice(refuse));
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    const [first = 0, second = 0, third = 0] = stub.asked.filter(isChunk).map(({ at }) => at);
    expect(second - first).toBeGreaterThanOrEqual(least - 20);
    expect(third - second).toBeGreaterThanOrEqual(least - 20);
    expect(stub.text()).toBe(lines("a", 1, 10));
  });

  test("413 leads to smaller chunks, at once", async () => {
    const limit: Script = ({ offset, end }) =>
      end - offset > 10_000 ? new Response("too large", { status: 413 }) : undefined;
    const stub = startStub(limit);
    const sender = await createSender(stub.url, { chunkBytes: 65_536 });
    sender.write(lines("a", 1, 3000));
    const output = await sender.once();
    expect(stub.text()).toBe(lines("a", 1, 3000));
    expect(linesWith(output, "halved").length).toBe(3);
  });

  test("413 to a chunk however small is held and told", async () => {
    const stub = startStub((asked) =>
      isChunk(asked) ? new Response("too large", { status: 413 }) : undefined,
    );
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 300));
    const shipper = startShipper(sender);
    await shipper.says("receiver takes no chunk, however small");
    expect(await shipper.stop()).toBe(0);
    stub.script = undefined;
    await sender.once();
    expect(stub.text()).toBe(lines("a", 1, 300));
  });

  test("409 with an offset but not the file's bytes there is not believed: a new stream begins where the cursor stands", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    const places = [lines("a", 1, 5).length, lines("a", 1, 12).length];
    stub.asked.length = 0;
    stub.script = (asked) => {
      const place = isChunk(asked) ? places.shift() : undefined;
      if (place === undefined) return undefined;
      return new Response("", { status: 409, headers: { "Upload-Offset": String(place) } });
    };
    const shipper = startShipper(sender);
    await until("all is there", () => stub.text().length >= lines("a", 1, 20).length);
    expect(stub.text()).toBe(lines("a", 1, 20));
    const chunks = stub.asked.filter(isChunk);
    const ten = lines("a", 1, 10).length;
    expect(chunks.map(({ offset }) => offset)).toEqual([ten, ten, ten]);
    expect(new Set(chunks.map(({ stream }) => stream)).size).toBe(3);
    expect(await shipper.stop()).toBe(0);
  });
});

describe("a 409 to each chunk", () => {
  const mark = `64:${"a".repeat(22)}`;
  test.each([
    ["with offset 0", () => ({ "Upload-Offset": "0" })],
    ["with the chunk's end", ({ end }: Asked) => ({ "Upload-Offset": String(end) })],
    ["with a mark of other bytes", ({ end }: Asked) => ({ "Upload-Offset": String(end), "Log-Mark": mark })],
  ])("%s is told, asked less and less often, and nothing is lost", async (_, headersOf) => {
    let isBroken = true;
    const stub = startStub((asked) => {
      if (!isBroken || !isChunk(asked)) return undefined;
      return new Response("conflict", { status: 409, headers: headersOf(asked) });
    });
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 50));
    const shipper = startShipper(sender);
    await shipper.says("status=409");
    const before = stub.asked.filter(isChunk).length;
    await until("it is asked twice more", () => stub.asked.filter(isChunk).length >= before + 2);
    isBroken = false;
    await shipper.says(AGAIN);
    await until("all is there", () => stub.text().length >= lines("a", 1, 50).length);
    expect(stub.text()).toBe(lines("a", 1, 50));
    const times = stub.asked.filter(isChunk).map(({ at }) => at);
    const [first = 0, second = 0] = times.slice(before - 1);
    expect(second - first).toBeGreaterThan(200);
    expect(linesWith(shipper.output, HELD).length).toBe(1);
    expect(await shipper.stop()).toBe(0);
  });
});

describe("a receiver that is away", () => {
  test("refuses connections: told once, tried again, delivered when it is back", async () => {
    const own = await startRealReceiver();
    await own.running.stop();
    const sender = await createSender(own.url);
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await shipper.says(HELD);
    sender.write(lines("a", 11, 20));
    await own.start();
    await expectArrives(own, sender, undefined, shipper);
    await shipper.says(AGAIN);
    expect(linesWith(shipper.output, HELD).length).toBe(1);
    expect(await shipper.stop()).toBe(0);
    await own.running.stop();
  });

  test("a name that no server knows is the same", async () => {
    const sender = await createSender("http://receiver.invalid:5001");
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await shipper.says(HELD);
    expect(await shipper.stop()).toBe(0);
    configure(sender, { receiver: receiver.url });
    await sender.once();
    await expectArrives(receiver, sender);
  });
});

describe("secrets and certificates", () => {
  test("a token file that is put right is used without a restart, on both sides", async () => {
    const folder = await tempFolder();
    const [here, there] = [join(folder, "here"), join(folder, "there")];
    writeFileSync(here, "a-wrong-token\n");
    writeFileSync(there, "the-first-token\n");
    const own = await startRealReceiver({ tokens: { "*": { file: there } } });
    const sender = await createSender(own.url, { token: { file: here } });
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await shipper.says("status=401");
    writeFileSync(here, "the-first-token\n");
    await expectArrives(own, sender, undefined, shipper);
    writeFileSync(there, "the-second-token\n");
    sender.write(lines("a", 11, 20));
    await until("it is told again", () => linesWith(shipper.output, "status=401").length === 2);
    unlinkSync(here); // while it is replaced there may be none
    writeFileSync(here, "the-second-token\n");
    await expectArrives(own, sender, undefined, shipper);
    expect(shipper.output + own.running.output).not.toMatch(/-token/);
    expect(await shipper.stop()).toBe(0);
    await own.running.stop();
  });

  test.skipIf(missing({ openssl: "openssl" }))(
    "a certificate of a CA that is not known, or that has expired: held and told, until it is put right",
    async () => {
      const [valid, other, expired] = await Promise.all([selfSigned(), selfSigned(), selfSigned()]);
      await expire(expired);
      const served = {
        cert: join(dirname(valid.both), "served.pem"),
        key: join(dirname(valid.both), "served.key"),
      };
      const serve = (files: { cert: string; key: string }) => {
        copyFileSync(files.cert, served.cert);
        copyFileSync(files.key, served.key);
      };
      serve(valid);
      const own = await startRealReceiver({ tls: served }, "https");
      const ca = join(dirname(other.both), "ca.pem");
      copyFileSync(other.cert, ca);
      const sender = await createSender(own.url, { ca });
      sender.write(lines("a", 1, 10));
      const shipper = startShipper(sender);
      await shipper.says(HELD);
      expect(linesWith(shipper.output, HELD)[0]).toMatch(/cert|self.signed/i);
      writeFileSync(ca, readFileSync(valid.cert, "utf8") + readFileSync(expired.cert, "utf8"));
      await expectArrives(own, sender, undefined, shipper);
      await own.running.stop();
      serve(expired);
      await own.start();
      sender.write(lines("a", 11, 20));
      await until("it is told", () => linesWith(shipper.output, HELD).some((line) => /expired/i.test(line)));
      expect(own.stored(sender.host).toString()).toBe(lines("a", 1, 10));
      await own.running.stop();
      serve(valid);
      await own.start();
      await expectArrives(own, sender, undefined, shipper);
      expect(linesWith(shipper.output, HELD).length).toBeLessThanOrEqual(4);
      expect(await shipper.stop()).toBe(0);
      await own.running.stop();
    },
  );
});

/** Signs the certificate anew, for a time that is over. */
async function expire({ cert, key }: { cert: string; key: string }): Promise<void> {
  const folder = await tempFolder();
  const [config, request] = [join(folder, "ca.conf"), join(folder, "request.pem")];
  const database = ["database = index.txt", "new_certs_dir = .", "rand_serial = yes", "default_md = sha256"];
  const rules = ["policy = any", "copy_extensions = copy", "[any]", "commonName = supplied", "[req]"];
  const names = ["distinguished_name = none", "[none]"];
  writeFileSync(
    config,
    ["[ca]", "default_ca = own", "[own]", ...database, ...rules, ...names, ""].join("\n"),
  );
  writeFileSync(join(folder, "index.txt"), "");
  const openssl = (...args: string[]) => execFileSync("openssl", args, { cwd: folder, stdio: "ignore" });
  const san = ["-addext", "subjectAltName=IP:127.0.0.1"];
  openssl("req", "-new", "-config", config, "-key", key, "-subj", "/CN=127.0.0.1", ...san, "-out", request);
  const time = ["-startdate", "20200101000000Z", "-enddate", "20200102000000Z"];
  const own = ["-selfsign", "-keyfile", key, "-in", request, "-out", cert];
  openssl("ca", "-config", config, "-batch", "-notext", ...time, ...own);
}
