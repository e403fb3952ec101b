/** Many logs, few descriptors, many rotations, no events, a clock that is set back, and what is delivered of a file. */
import { afterEach, describe, expect, spyOn, test } from "bun:test";
import { execFileSync } from "node:child_process";
import * as fs from "node:fs";
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  readFileSync,
  renameSync,
  statSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { parseConfig } from "../lib/config.ts";
import { createLog } from "../lib/service.ts";
import { LogFile } from "../lib/tail/file.ts";
import { openShipper, type Shipper, saveCursor, shipOnce } from "../shipper.ts";
import {
  createSender,
  expectTags,
  lines,
  type Sender,
  type StubReceiver,
  startStub,
  startWrapped,
  usage,
} from "./pipeline.ts";
import { missing, ROOT, type Running, start, until } from "./support.ts";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function keep(shipper: Running): Running {
  running.push(shipper);
  return shipper;
}

const { open } = LogFile;
const opened: Shipper[] = [];
afterEach(async () => {
  for (const { streams, looker } of opened.splice(0)) {
    for (const { file } of streams.list) await file?.close();
    for (const { file } of looker.held.values()) await file?.close();
  }
});

/** A shipper within this process, on clocks of the test. */
async function openOn(
  sender: Sender,
  clock: { now: number; mono: number },
  output: string[] = [],
): Promise<Shipper> {
  const shipper = await openShipper(parseConfig(readFileSync(sender.config, "utf8"), "shipper"), {
    log: createLog((line) => output.push(line)),
    signal: new AbortController().signal,
    now: () => clock.now,
    mono: () => clock.mono,
  });
  opened.push(shipper);
  return shipper;
}

function countLines(stub: StubReceiver): number {
  return stub.text().split("\n").length - 1;
}

describe("many logs", () => {
  test.skipIf(missing({ prlimit: "util-linux" }))(
    "400 that are written, with 256 descriptors: every line once",
    async () => {
      const stub = startStub();
      const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "*.log")] }));
      unlinkSync(sender.live);
      const at = (n: number) => join(sender.logs, `site${n}.example.log`);
      const put = (from: number, to: number) => {
        for (let n = 0; n < 400; n++) appendFileSync(at(n), lines(`s${n}`, from, to));
      };
      put(1, 3);
      const shipper = keep(startWrapped("prlimit", ["--nofile=256:256"], sender));
      await until("all is there", () => countLines(stub) >= 1200);
      put(4, 5);
      await until("all is there", () => countLines(stub) >= 2000);
      for (let n = 0; n < 400; n += 2) renameSync(at(n), `${at(n)}.1`);
      for (let n = 0; n < 400; n += 2) appendFileSync(`${at(n)}.1`, lines(`s${n}`, 6, 7));
      for (let n = 0; n < 400; n += 2) appendFileSync(at(n), lines(`t${n}`, 1, 3));
      await until("all is there", () => countLines(stub) >= 3000);
      expect(usage(shipper.process.pid as number).descriptors.length).toBeLessThan(256);
      expect(await shipper.stop()).toBe(0);
      expect(shipper.output).not.toMatch(/EMFILE|lost/);
      const expected: Record<string, string> = {};
      for (let n = 0; n < 400; n++) {
        expected[`s${n}`] = lines(`s${n}`, 1, n % 2 === 0 ? 7 : 5);
        if (n % 2 === 0) expected[`t${n}`] = lines(`t${n}`, 1, 3);
      }
      expectTags(Buffer.from(stub.text()), expected);
    },
    120_000,
  );

  test.skipIf(missing({ prlimit: "util-linux" }))("60 with 64 descriptors: every line once", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "*.log")] }));
    unlinkSync(sender.live);
    const put = (from: number, to: number) => {
      for (let n = 0; n < 60; n++)
        appendFileSync(join(sender.logs, `site${n}.log`), lines(`s${n}`, from, to));
    };
    put(1, 3);
    const shipper = keep(startWrapped("prlimit", ["--nofile=64:64"], sender));
    for (const last of [3, 5, 7]) {
      await until("all is there", () => countLines(stub) >= 60 * last);
      put(last + 1, last + 2);
    }
    await until("all is there", () => countLines(stub) >= 60 * 9);
    expect(await shipper.stop()).toBe(0);
    expect(shipper.output).not.toContain("bytes lost");
    const counts = Array.from({ length: 60 }, (_, n) => [`s${n}`, lines(`s${n}`, 1, 9)]);
    expectTags(Buffer.from(stub.text()), Object.fromEntries(counts));
  });

  test("200 that grew between two looks: no more of them are open at once than else", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "*.log")] }));
    const clock = { now: Date.now(), mono: 1e6 };
    const shipper = await openOn(sender, clock);
    const put = () => {
      for (let n = 0; n < 200; n++) appendFileSync(join(sender.logs, `site${n}.log`), lines(`s${n}`, 1, 2));
    };
    put();
    await shipOnce(shipper);
    let most = 0;
    const opening = spyOn(LogFile, "open").mockImplementation(async (path) => {
      most = Math.max(most, shipper.streams.list.filter(({ file }) => file).length);
      return await open.call(LogFile, path);
    });
    put();
    await shipper.looker.look();
    opening.mockRestore();
    expect(most).toBeGreaterThan(60);
    expect(most).toBeLessThan(70);
    await shipOnce(shipper);
    expect(countLines(stub)).toBe(800);
  });

  test("a path that matches nothing is told at the start and each hour, until it is there", async () => {
    const stub = startStub();
    const absent = (logs: string) => join(logs, "acess.log");
    const sender = await createSender(stub.url, (logs) => ({
      files: [join(logs, "access.log"), absent(logs)],
    }));
    const clock = { now: Date.now(), mono: 1e6 };
    const output: string[] = [];
    const shipper = await openOn(sender, clock, output);
    const told = async (minutes: number) => {
      clock.mono += minutes * 60_000;
      await shipOnce(shipper);
      return output.filter((line) => line.includes("no file matches yet")).length;
    };
    expect(await told(0)).toBe(1);
    expect(await told(59)).toBe(1);
    expect(await told(1)).toBe(2);
    expect(await told(60)).toBe(3);
    writeFileSync(absent(sender.logs), lines("a", 1, 1));
    expect(await told(60)).toBe(3);
  });

  test("1,000 that are quiet: a look lists their folder once, asks for each once, and opens none", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "*.log")] }));
    for (let n = 0; n < 1000; n++) writeFileSync(join(sender.logs, `site${n}.log`), lines(`s${n}`, 1, 2));
    const shipper = await openOn(sender, { now: Date.now(), mono: 1e6 });
    await shipOnce(shipper);
    expect(countLines(stub)).toBe(2000);
    await saveCursor(shipper);
    const [listing, asking, linking] = [
      spyOn(fs, "readdirSync"),
      spyOn(fs, "statSync"),
      spyOn(fs, "lstatSync"),
    ];
    const opening = spyOn(LogFile, "open");
    await shipper.looker.look();
    const spies = [listing, asking, linking, opening];
    const [listings = 0, stats = 0, links = 0, opens = 0] = spies.map(({ mock }) => mock.calls.length);
    for (const spy of spies) spy.mockRestore();
    expect(listings).toBe(1);
    expect(stats).toBeGreaterThanOrEqual(1000); // or the spies are deaf
    expect(stats + links).toBeLessThan(1010);
    expect(opens).toBe(0);
    const { isChanged, isMoved } = shipper.streams;
    expect({ isChanged, isMoved }).toEqual({ isChanged: false, isMoved: false }); // nothing is to be saved
  });
});

describe("many rotations", () => {
  test("leave no trace in the cursor once they are delivered", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { rotateWaitSeconds: 1 });
    const clock = { now: Date.now(), mono: 1e6 };
    const shipper = await openOn(sender, clock);
    await shipOnce(shipper);
    let most = 0;
    for (let n = 1; n <= 300; n++) {
      sender.write(lines(`r${n}`, 1, 4));
      await shipOnce(shipper);
      const old = `${sender.live}.1`;
      sender.rotate();
      clock.mono += 30_000;
      clock.now += 30_000;
      await shipOnce(shipper);
      unlinkSync(old);
      shipper.askNow = true; // the heartbeat
      await shipOnce(shipper);
      await saveCursor(shipper);
      most = Math.max(most, statSync(join(sender.stateDir, "cursor.json")).size);
    }
    expect(countLines(stub)).toBe(1200);
    expect(shipper.streams.list.length).toBeLessThan(10);
    expect(most).toBeLessThan(8192);
    expect(shipper.streams.lost).toBe(0);
  });
  test("an archive whose log goes while both are compared is not shipped again", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { rotateWaitSeconds: 1 });
    const clock = { now: Date.now(), mono: 1e6 };
    const shipper = await openOn(sender, clock);
    const old = `${sender.live}.1`;
    sender.write(lines("a", 1, 3));
    await shipOnce(shipper);
    sender.rotate();
    await shipOnce(shipper);
    clock.mono += 30_000;
    clock.now += 30_000;
    await shipOnce(shipper);
    execFileSync("gzip", ["--keep", old]);
    const opening = spyOn(LogFile, "open").mockImplementation(async (path) => {
      if (path === old) unlinkSync(old); // as gzip does it
      return await open.call(LogFile, path);
    });
    await shipOnce(shipper);
    opening.mockRestore();
    expect(existsSync(old)).toBe(false);
    for (let n = 0; n < 3; n++) await shipOnce(shipper);
    expect(stub.text()).toBe(lines("a", 1, 3));
  });
  test("a look beside the end of a removed file reads nothing that is being closed", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { rotateWaitSeconds: 1 });
    const clock = { now: Date.now(), mono: 1e6 };
    const shipper = await openOn(sender, clock);
    sender.write(lines("a", 1, 3));
    await shipOnce(shipper);
    sender.rotate();
    await shipOnce(shipper);
    unlinkSync(`${sender.live}.1`);
    clock.mono += 30_000;
    clock.now += 30_000;
    const { looker } = shipper;
    const [look, { stat, read, close }] = [looker.look.bind(looker), LogFile.prototype];
    const [isRead, isClosed] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    let looked: ReturnType<typeof look> | undefined;
    const stale = { isSettled: true, nextAt: clock.mono, orphans: [] };
    const spies = [
      spyOn(looker, "look").mockImplementation(async () => stale), // it still believes that the file is there
      spyOn(LogFile.prototype, "stat").mockImplementation(async function (this: LogFile) {
        if (!looked) {
          looked = look(); // it comes while the file's end is looked at
          await Promise.race([looked, isRead.promise]);
        }
        return await stat.call(this);
      }),
      spyOn(LogFile.prototype, "read").mockImplementation(async function (this: LogFile, into, position) {
        isRead.resolve();
        await isClosed.promise;
        return await read.call(this, into, position);
      }),
      spyOn(LogFile.prototype, "close").mockImplementation(async function (this: LogFile) {
        await close.call(this);
        isClosed.resolve();
      }),
    ];
    await shipOnce(shipper);
    await looked;
    for (const spy of spies) spy.mockRestore();
    expect(looked).toBeDefined();
    expect(stub.text()).toBe(lines("a", 1, 3));
  });
  test("a delivered log that is cut is known in its copy, however long that is waited for", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { rotateWaitSeconds: 90 });
    const clock = { now: Date.now(), mono: 1e6 };
    const shipper = await openOn(sender, clock);
    sender.write(lines("a", 1, 40));
    await shipOnce(shipper);
    shipper.askNow = true; // all of it is delivered
    await shipOnce(shipper);
    copyFileSync(sender.live, `${sender.live}.1`);
    truncateSync(sender.live, 0);
    sender.write(lines("b", 1, 40));
    for (let n = 0; n < 30; n++) {
      await shipOnce(shipper);
      clock.mono += 5_000;
      clock.now += 5_000;
    }
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 40), b: lines("b", 1, 40) });
  });
});

test("a clock that is set back by a day, and ahead by a week, changes nothing", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url, { rotateWaitSeconds: 5 });
  const clock = { now: Date.now(), mono: 1e6 };
  const output: string[] = [];
  const shipper = await openOn(sender, clock, output);
  let n = 0;
  const step = async () => {
    sender.write(lines("a", n + 1, n + 10));
    n += 10;
    await shipOnce(shipper);
    clock.mono += 6000;
    await shipOnce(shipper);
  };
  await shipOnce(shipper);
  await step();
  for (const jump of [-86_400_000, 7 * 86_400_000, -1000]) {
    clock.now += jump;
    await step();
    copyFileSync(sender.live, `${sender.live}.copy`);
    sender.rotate();
    await step();
    execFileSync("gzip", ["-f", `${sender.live}.1`]);
    clock.mono += 6000;
    await step();
  }
  expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
  expect(shipper.streams.lost).toBe(0);
  expect(output.join("")).toContain("file is done");
});

test("without inotify it works by polling, and tells it once", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url);
  const broken = join(sender.folder, "broken.ts");
  writeFileSync(
    broken,
    `import { mock } from "bun:test"; import * as fs from "node:fs"; const all = { ...fs }; mock.module("node:fs", () => ({ ...all, default: all, watch() { throw Object.assign(new Error("ENOSPC: no space left on device, watch"), { code: "ENOSPC" }); } }));`,
  );
  const args = ["run", "--preload", broken, join(ROOT, "shipper.ts"), "--config", sender.config];
  const shipper = keep(start(process.execPath, args));
  await shipper.says("no events of this folder");
  for (let n = 1; n <= 5; n++) {
    sender.write(lines("a", n, n));
    await until("it is there", () => countLines(stub) >= n);
  }
  expect(await shipper.stop()).toBe(0);
  expect(shipper.output.split("no events of this folder").length).toBe(2);
});

describe("--delivered", () => {
  const ask = async (sender: Sender, path: string) => {
    const asked = keep(sender.start(["--delivered", path]));
    return { code: await asked.ended, output: asked.output };
  };

  test("is 0 when all of a file is at the client, under each of its names; else 1 with the bytes that are not", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 30));
    await sender.once();
    expect(await ask(sender, sender.live)).toMatchObject({ code: 0 });
    const more = lines("a", 31, 33);
    sender.write(more);
    const some = await ask(sender, sender.live);
    expect(some.code).toBe(1);
    expect(some.output).toContain(`${more.length} of ${lines("a", 1, 33).length} bytes`);
    await sender.once();
    copyFileSync(sender.live, join(sender.folder, "by-hand"));
    sender.rotate();
    await sender.once();
    execFileSync("gzip", [`${sender.live}.1`]);
    sender.write(lines("b", 1, 1));
    expect(await ask(sender, `${sender.live}.1.gz`)).toMatchObject({ code: 0 });
    expect(await ask(sender, join(sender.folder, "by-hand"))).toMatchObject({ code: 0 });
    expect(await ask(sender, sender.live)).toMatchObject({ code: 1 });
    expect(await ask(sender, join(sender.folder, "none"))).toMatchObject({ code: 1 });
    const foreign = join(sender.folder, "foreign");
    writeFileSync(foreign, lines("x", 1, 40));
    expect(await ask(sender, foreign)).toMatchObject({ code: 1 });
  });

  test("beside a shipper that runs, and while the receiver is away: what was told last", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { heartbeatSeconds: 0.2, timeoutSeconds: 2 });
    sender.write(lines("a", 1, 30));
    const shipper = keep(sender.start());
    await until("it is in the cursor", () => {
      if (!existsSync(join(sender.stateDir, "cursor.json"))) return false;
      const text = readFileSync(join(sender.stateDir, "cursor.json"), "utf8");
      return JSON.parse(text).streams[0]?.delivered === lines("a", 1, 30).length;
    });
    stub.script = () => new Response("away", { status: 503 });
    expect(await ask(sender, sender.live)).toMatchObject({ code: 0 });
    sender.write(lines("a", 31, 40));
    expect(await ask(sender, sender.live)).toMatchObject({ code: 1 });
    expect(await shipper.stop()).toBe(0);
  });
});

test("a change that is heard of in the middle of a look is looked at at once, not at the next poll", async () => {
  const sender = await createSender(startStub().url);
  const shipper = await openOn(sender, { now: Date.now(), mono: 1e6 });
  await shipOnce(shipper);
  const { looker } = shipper;
  const look = looker.look.bind(looker);
  looker.look = () => {
    const result = look();
    shipper.nextLookAt = 0; // as the event of a name does, behind the listing
    return result;
  };
  expect(shipper.nextLookAt).toBeGreaterThan(0);
  await shipOnce(shipper);
  expect(shipper.nextLookAt).toBe(0);
});
