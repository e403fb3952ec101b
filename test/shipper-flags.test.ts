/** What an operator does with the shipper: its flags, where it begins, which files it takes, and how it ends. */
import { afterEach, beforeAll, describe, expect, test } from "bun:test";
import { appendFileSync, existsSync, mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { readLedger } from "../lib/ledger.ts";
import {
  createSender,
  expectArrives,
  expectTags,
  lines,
  openLogs,
  type RealReceiver,
  type Sender,
  startRealReceiver,
  startStub,
} from "./pipeline.ts";
import { freePort, onCleanup, type Running, runScriptOnce, until } from "./support.ts";

let receiver: RealReceiver;
beforeAll(async () => {
  receiver = await startRealReceiver();
});

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function startShipper(sender: Sender, flags: string[] = []): Running {
  const shipper = sender.start(flags);
  running.push(shipper);
  return shipper;
}

/** Changes the shipper's section of a sender's config. */
function configure(sender: Sender, options: object): void {
  const config = JSON.parse(readFileSync(sender.config, "utf8"));
  writeFileSync(sender.config, JSON.stringify({ shipper: { ...config.shipper, ...options } }));
}

describe("--once", () => {
  test("ships every file to its end, says how much it was, and exits 0", async () => {
    const sender = await createSender(receiver.url);
    configure(sender, { files: [join(sender.logs, "*.log")] });
    const other = join(sender.logs, "other.log");
    sender.write(lines("a", 1, 500));
    writeFileSync(other, lines("other", 1, 500));
    expect(await sender.once()).toMatch(/shipped to the end of every file files=2 lines=1000 /);
    expectTags(receiver.stored(sender.host), { a: lines("a", 1, 500), other: lines("other", 1, 500) });
    expect(await sender.once()).toMatch(/shipped to the end of every file files=2 lines=0 /);
  });

  test("waits for a receiver that is away, and ends when it has everything", async () => {
    const own = await startRealReceiver();
    await own.running.stop();
    const sender = await createSender(own.url);
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender, ["--once"]);
    await shipper.says("held, and tried again");
    await own.start();
    expect(await shipper.ended).toBe(0);
    await expectArrives(own, sender);
    await own.running.stop();
  });

  test("ships what can be read, and exits 1 when a file could not be", async () => {
    const sender = await createSender(receiver.url);
    const folder = join(sender.logs, "folder.log");
    mkdirSync(folder);
    configure(sender, { files: [sender.live, folder] });
    sender.write(lines("a", 1, 10));
    const { code, output } = await runScriptOnce("shipper", sender.config, ["--once"]);
    expect(output).toMatch(/shipped what could be read files=2 lines=10 .*faults=1/);
    expect(code).toBe(1);
  });
});

describe("--status", () => {
  test("shows each file with its stream, size, offset and lag, beside a shipper that runs", async () => {
    const sender = await createSender(receiver.url);
    const before = await runScriptOnce("shipper", sender.config, ["--status"]);
    expect(before).toEqual({
      code: 0,
      output: `No cursor in ${sender.stateDir}: nothing was shipped yet\n`,
    });
    const text = lines("a", 1, 10);
    sender.write(`${text}half`);
    const shipper = startShipper(sender);
    await expectArrives(receiver, sender, text, shipper);
    const row = await until("the cursor is saved", async () => {
      const { code, output } = await runScriptOnce("shipper", sender.config, ["--status"]);
      expect(code).toBe(0);
      const [headline, head, ...rows] = output.trim().split("\n");
      expect(headline).toMatch(/^ok, .* to ship$/);
      expect(head?.split(/ +/)).toEqual(["FILE", "STREAM", "SIZE", "SHIPPED", "DELIVERED", "LAG"]);
      return rows.find((line) => line.includes(` ${text.length} `));
    });
    const [file, stream, size, shipped, delivered, ...lag] = row.split(/ +/);
    expect([file, size, shipped, delivered, lag.join(" ")]).toEqual([
      sender.live,
      String(text.length + 4),
      String(text.length),
      "-",
      "4 B",
    ]);
    expect(stream).toMatch(/^[A-Za-z0-9_-]{22}$/);
    expect(await shipper.stop()).toBe(0);
  });

  test("says first what is wrong, and exits 1: a log that is not there, nobody who ships what waits", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    configure(sender, { files: [sender.live, join(sender.logs, "gone.log")] });
    const status = (...flags: string[]) => runScriptOnce("shipper", sender.config, ["--status", ...flags]);
    const { code, output } = await status();
    expect(output.split("\n").slice(0, 3)).toEqual([
      `no file matches ${join(sender.logs, "gone.log")}`,
      expect.stringMatching(/^no shipper is running: .* wait; systemctl status log-rt-sync-shipper$/),
      expect.stringMatching(/^FILE /),
    ]);
    expect(code).toBe(1);
    const json = JSON.parse((await status("--json", "--host", sender.host)).output);
    expect(json).toMatchObject({ ok: false, files: [{ path: sender.live }], lost: 0 });
    expect(json.problems).toHaveLength(2);
    expect(await status("--host", "10.99.0.1")).toEqual({
      code: 1,
      output: `This is the sender ${sender.host}, not 10.99.0.1\n`,
    });
  });

  test("exits 1 when the cursor is damaged", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 1));
    await sender.once();
    for (const name of ["cursor.json", "cursor.json.previous"])
      writeFileSync(join(sender.stateDir, name), "");
    const { code, output } = await runScriptOnce("shipper", sender.config, ["--status"]);
    expect(code).toBe(1);
    expect(output).toContain("it is damaged");
  });
});

describe("where it begins", () => {
  test("startAt end leaves out what was there at the very first start, and only then", async () => {
    const sender = await createSender(receiver.url, { startAt: "end" });
    sender.write(lines("old", 1, 10));
    await sender.once();
    expect(receiver.stored(sender.host).length).toBe(0);
    sender.write(lines("a", 1, 10));
    await sender.once();
    sender.write(lines("a", 11, 20));
    sender.rotate();
    sender.write(lines("b", 1, 10));
    await sender.once();
    await expectArrives(receiver, sender, lines("a", 1, 20) + lines("b", 1, 10));
  });

  test("latest.offset of the original shipper is taken over at the first start", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("old", 1, 10));
    mkdirSync(sender.stateDir);
    const path = join(sender.stateDir, "latest.offset");
    writeFileSync(path, `${lines("old", 1, 10).length}\n`);
    sender.write(lines("a", 1, 10));
    await sender.once();
    await expectArrives(receiver, sender, lines("a", 1, 10));
    expect(existsSync(path)).toBe(false);
    await sender.once();
    await expectArrives(receiver, sender, lines("a", 1, 10));
  });

  test("latest.offset behind the end of the file is refused: nothing is sent", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 10));
    mkdirSync(sender.stateDir);
    writeFileSync(join(sender.stateDir, "latest.offset"), "99999999");
    const { code, output } = await runScriptOnce("shipper", sender.config, ["--once"]);
    expect(code).toBe(1);
    expect(output).toContain("Cannot take over");
    expect(receiver.stored(sender.host).length).toBe(0);
  });
});

describe("a slip in files", () => {
  test("what matches nothing is told at the start, with what is beside it", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 10));
    const slips = [join(sender.logs, "acess.log"), join(sender.logs, "*.lgo")];
    configure(sender, { files: [sender.live, ...slips] });
    const shipper = startShipper(sender);
    for (const path of slips) await shipper.says(`no file matches yet files=${path}`);
    await shipper.says('where \\"access.log\\" is');
    await expectArrives(receiver, sender, undefined, shipper);
    expect(await shipper.stop()).toBe(0);
  });

  test("what matches nothing is told to the receiver, until it is there", async () => {
    const sender = await createSender(receiver.url, { heartbeatSeconds: 0.1 });
    const absent = join(sender.logs, "acess.log");
    configure(sender, { files: [sender.live, absent] });
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    const agent = async () => (await readLedger(join(receiver.dir, sender.host)))?.facts.agent ?? "";
    await until("the receiver knows that a log is lacking", async () =>
      (await agent()).endsWith(" (no log)"),
    );
    writeFileSync(absent, lines("b", 1, 1));
    await until("the receiver knows that it is there", async () => !(await agent()).endsWith(" (no log)"));
    expect(await shipper.stop()).toBe(0);
  });

  test("a file taken out of files is not read any more; what was unread of it is told once", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    const other = join(sender.logs, "other.log");
    configure(sender, { files: [sender.live, other] });
    sender.write(lines("a", 1, 10));
    writeFileSync(other, lines("out", 1, 10));
    await sender.once();
    appendFileSync(other, lines("out", 11, 20));
    const unread = lines("out", 11, 20).length;
    configure(sender, { files: [sender.live] });
    sender.write(lines("a", 11, 20));
    const first = await sender.once();
    expect(first.split("\n").filter((line) => line.includes(other))).toEqual([
      expect.stringContaining(`log is not followed any more path=${other} unread=${unread}`),
    ]);
    expect(await sender.once()).not.toContain(other);
    expect(stub.text()).toContain("/a/20 ");
    expect(stub.text()).not.toContain("/out/11 ");
  });

  test.each(["running", "stopped"])(
    "named again it goes on where it was, also in its rotation (%s)",
    async (when) => {
      const stub = startStub();
      const sender = await createSender(stub.url);
      const other = join(sender.logs, "other.log");
      const take = async (files: string[]) => {
        configure(sender, { files });
        if (shipper) shipper.process.kill("SIGHUP");
        else await sender.once();
      };
      configure(sender, { files: [sender.live, other] });
      writeFileSync(other, lines("b", 1, 30));
      const shipper = when === "running" ? startShipper(sender) : undefined;
      if (!shipper) await sender.once();
      await until("it is shipped", () => stub.text() === lines("b", 1, 30));
      await take([sender.live]);
      if (shipper) await shipper.says("log is not followed any more");
      appendFileSync(other, lines("b", 31, 40));
      renameSync(other, `${other}.1`);
      appendFileSync(other, lines("b", 41, 50));
      await take([sender.live, other]);
      await until("the rest is shipped", () => stub.text().length >= lines("b", 1, 50).length);
      await shipper?.stop();
      await sender.once();
      expectTags(Buffer.from(stub.text()), { b: lines("b", 1, 50) });
    },
  );
});

test("a log that is taken out while a chunk of it is on its way, rotated, and named again goes on", async () => {
  const gate = Promise.withResolvers<void>();
  const stub = startStub();
  const sender = await createSender(stub.url);
  const [other, probe] = [join(sender.logs, "other", "other.log"), join(sender.logs, "probe-*.log")];
  mkdirSync(join(sender.logs, "other")); // its folder is not looked at meanwhile
  configure(sender, { files: [probe, other] });
  writeFileSync(`${other}.2`, lines("c", 1, 30));
  writeFileSync(other, lines("b", 1, 30));
  const shipper = startShipper(sender);
  await until("it is shipped", () => stub.text() === lines("b", 1, 30));
  const before = stub.asked.length;
  stub.script = (_, commit) => gate.promise.then(commit);
  appendFileSync(other, lines("b", 31, 40));
  await until("a chunk is on its way", () => stub.asked.length > before);
  configure(sender, { files: [probe] });
  shipper.process.kill("SIGHUP");
  await shipper.says("config read again");
  renameSync(other, `${other}.1`);
  appendFileSync(other, lines("d", 1, 10));
  writeFileSync(join(sender.logs, "probe-1.log"), "");
  await shipper.says("probe-1.log"); // a look has come since
  stub.script = undefined;
  gate.resolve();
  await shipper.says(`log is not followed any more path=${other} unread=0`);
  appendFileSync(`${other}.1`, lines("b", 41, 45));
  configure(sender, { files: [probe, other] });
  shipper.process.kill("SIGHUP");
  await until("the rest is shipped", () => ["/b/45 ", "/d/10 "].every((text) => stub.text().includes(text)));
  expect(await shipper.stop()).toBe(0);
  await sender.once();
  expectTags(Buffer.from(stub.text()), { b: lines("b", 1, 45), d: lines("d", 1, 10) });
});

describe("several files", () => {
  test("one that stands still, one that comes later, one that matches the glob while running", async () => {
    const sender = await createSender(receiver.url);
    const named = (name: string) => join(sender.logs, name);
    configure(sender, { files: [sender.live, named("later.log"), named("site-*.log")] });
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await expectArrives(receiver, sender, undefined, shipper);
    const expected = { a: lines("a", 1, 10), later: "", one: "", two: "" };
    const arrives = (tag: "later" | "one" | "two", file: string) => {
      expected[tag] += lines(tag, 1, 20);
      appendFileSync(named(file), lines(tag, 1, 20));
      const length = Object.values(expected).join("").length;
      return until(`${tag} is there`, () => receiver.stored(sender.host).length >= length);
    };
    await arrives("one", "site-one.log");
    await arrives("later", "later.log");
    await arrives("two", "site-two.log");
    await arrives("one", "site-one.log");
    expect(await shipper.stop()).toBe(0);
    await sender.once();
    expectTags(receiver.stored(sender.host), expected);
  });
});

test("a second shipper on the same state folder says so and exits 1", async () => {
  const sender = await createSender(receiver.url);
  const shipper = startShipper(sender);
  await until("the log is open", () => openLogs(shipper) > 0);
  const { code, output } = await runScriptOnce("shipper", sender.config);
  expect(code).toBe(1);
  expect(output).toContain(`in use by process ${shipper.process.pid}`);
  expect(await shipper.stop()).toBe(0);
});

describe("a heartbeat", () => {
  test("comes while there is nothing to ship, and tells what is not shipped", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { heartbeatSeconds: 0.1 });
    const shipper = startShipper(sender);
    const beats = () => stub.asked.filter(({ method }) => method === "streams");
    await until("before the first line", () => beats().length > 2);
    sender.write(`${lines("a", 1, 1)}half`);
    await until("it tells of half a line", () => (beats().at(-1)?.lag === 4 ? true : undefined));
    expect(await shipper.stop()).toBe(0);
  });
});

describe("SIGTERM ends it within 5 seconds, with 0", () => {
  /** Stops it, and expects that the next run finishes the work. */
  async function stopsSoon(shipper: Running): Promise<void> {
    const started = Date.now();
    expect(await shipper.stop()).toBe(0);
    expect(Date.now() - started).toBeLessThan(5000);
  }

  test("when it is idle", async () => {
    const sender = await createSender(receiver.url);
    const shipper = startShipper(sender);
    await until("the log is open", () => openLogs(shipper) > 0);
    await stopsSoon(shipper);
  });

  test.each([[[]], [["--once"]]])("when the receiver is away (flags: %p)", async (flags: string[]) => {
    const sender = await createSender(`http://127.0.0.1:${await freePort()}`);
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender, flags);
    await shipper.says("held, and tried again");
    await stopsSoon(shipper);
    configure(sender, { receiver: receiver.url });
    await sender.once();
    await expectArrives(receiver, sender);
  });

  test("when the receiver takes the chunk and never answers", async () => {
    let taken = 0;
    const silent = createServer((socket) => {
      socket.on("error", () => {});
      socket.on("data", (data) => {
        taken += data.length;
      });
    });
    const port = await freePort();
    silent.listen(port, "127.0.0.1");
    onCleanup(() => silent.close());
    const sender = await createSender(`http://127.0.0.1:${port}`);
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await until("a request is in hand", () => taken > 0);
    await stopsSoon(shipper);
    configure(sender, { receiver: receiver.url });
    await sender.once();
    await expectArrives(receiver, sender);
  });

  test("in the middle of a backlog, of which nothing is repeated but the chunk in hand", async () => {
    const stub = startStub((_, commit) => new Promise((resolve) => setTimeout(() => resolve(commit()), 20)));
    const sender = await createSender(stub.url, { chunkBytes: 4096 });
    sender.write(lines("a", 1, 20_000));
    const shipper = startShipper(sender);
    await until("it is on its way", () => stub.asked.length > 20);
    await stopsSoon(shipper);
    stub.script = undefined;
    const asked = stub.asked.length;
    await sender.once();
    expect(stub.text()).toBe(lines("a", 1, 20_000));
    const reached = Math.max(...stub.asked.slice(0, asked).map(({ end }) => end));
    const again = stub.asked
      .slice(asked)
      .find(({ method, end, offset }) => method === "POST" && end > offset);
    expect(again?.offset).toBeGreaterThanOrEqual(reached - 2 * 4096);
  });
});
