/**
 * The shipper as a process beside a writer and a rotation: whatever is renamed, copied, truncated, compressed or
 * removed, running or stopped, each line is at the receiver once, in the order of its file.
 */
import { afterEach, beforeAll, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  statSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { gzipSync, zstdCompressSync } from "node:zlib";
import { readLedger } from "../lib/ledger.ts";
import {
  createSender,
  expectArrives,
  expectTags,
  lines,
  openLogs,
  openPaths,
  type RealReceiver,
  type Sender,
  shiftNames,
  startRealReceiver,
  startStub,
  tagsOf,
} from "./pipeline.ts";
import { freePort, type Running, until } from "./support.ts";

let receiver: RealReceiver;
beforeAll(async () => {
  receiver = await startRealReceiver();
});

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});
/** A shipper that follows the live file. */
async function startShipper(sender: Sender): Promise<Running> {
  const shipper = sender.start();
  running.push(shipper);
  await until("the log is open", () => openLogs(shipper) > 0);
  return shipper;
}

/** A sender whose first ten lines were shipped by a process that has ended. */
async function shippedTen(options: object = {}): Promise<Sender> {
  const sender = await createSender(receiver.url, options);
  sender.write(lines("a", 1, 10));
  await sender.once();
  return sender;
}

/** `gzip` on a file, which keeps its time of writing. */
function gzip(path: string): void {
  execFileSync("gzip", [path]);
}

/** Ends the shipper in peace, drains what is left, and expects all that was written once, each file in its order. */
async function finish(sender: Sender, shipper?: Running, expected?: string | Uint8Array): Promise<string> {
  if (shipper) expect(await shipper.stop()).toBe(0);
  const output = await sender.once();
  const all = Buffer.from(expected ?? Buffer.concat(sender.written));
  expectTags(receiver.stored(sender.host), tagsOf(all.toString()));
  return output;
}

describe("rename and create", () => {
  test("lines that the writer still puts into the old file arrive, beside those of the new one", async () => {
    const sender = await shippedTen({ rotateWaitSeconds: 1 });
    const shipper = await startShipper(sender);
    const old = sender.rotate();
    let expected = lines("a", 1, 10).length;
    for (let n = 1; n <= 8; n++) {
      for (const [fd, tag] of [
        [old, "old"],
        [undefined, "new"],
      ] as const) {
        const text = lines(tag, n, n);
        if (fd !== undefined) writeSync(fd, text);
        else sender.write(text);
        expected += text.length;
        await until("the line is stored", () => receiver.stored(sender.host).length >= expected);
      }
    }
    await shipper.says("file is done");
    await shipper.stop();
    await sender.once();
    expectTags(receiver.stored(sender.host), {
      a: lines("a", 1, 10),
      old: lines("old", 1, 8),
      new: lines("new", 1, 8),
    });
  });

  test("what is put into the old file goes before what is put into the new one after it", async () => {
    const sender = await shippedTen({ rotateWaitSeconds: 30, pollSeconds: 60 });
    const shipper = await startShipper(sender);
    const old = sender.rotate();
    sender.write(lines("seen", 1, 1));
    await until("the new file is followed", () => receiver.stored(sender.host).includes("/seen/1 "));
    let order = lines("seen", 1, 1);
    for (let n = 1; n <= 3; n++) {
      receiver.running.process.kill("SIGSTOP");
      writeSync(old, lines("old", n * 100, n * 100));
      await Bun.sleep(200); // time for it to be on its way; the rest comes before it is answered
      writeSync(old, lines("old", n * 100 + 1, n * 100 + 29));
      sender.write(lines("new", n, n));
      order += lines("old", n * 100, n * 100 + 29) + lines("new", n, n);
      receiver.running.process.kill("SIGCONT");
      await until(
        "all of it",
        () =>
          receiver.stored(sender.host).includes(`/new/${n} `) &&
          receiver.stored(sender.host).includes(`/old/${n * 100 + 29} `),
      );
    }
    expect(receiver.stored(sender.host).toString()).toEndWith(order);
    expect(await shipper.stop()).toBe(0);
  });

  test("a name that is missing for a while resets nothing", async () => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    renameSync(sender.live, `${sender.live}.1`);
    sender.write(lines("a", 11, 20)); // into the renamed file
    await shipper.says("file is done");
    sender.reopen();
    sender.write(lines("b", 1, 10));
    await expectArrives(receiver, sender);
    await finish(sender, shipper);
  });

  test("three rotations while stopped: the oldest first, then the live file", async () => {
    const sender = await shippedTen();
    for (const tag of ["a-rest", "b", "c"]) {
      sender.write(lines(tag, 1, 50));
      shiftNames(sender);
      sender.rotate();
    }
    sender.write(lines("live", 1, 50));
    await finish(sender);
  });

  test("a rotation every moment under load loses nothing, and every file is closed again", async () => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    for (let n = 1; n <= 30; n++) {
      sender.write(lines(`r${n}`, 1, 200));
      shiftNames(sender);
      sender.rotate();
      sender.write(lines(`s${n}`, 1, 20));
      await new Promise((resolve) => setTimeout(resolve, 40)); // the pace of the load
    }
    await until(
      "all has arrived",
      () => receiver.stored(sender.host).length >= Buffer.concat(sender.written).length,
    );
    await until("rotated files are closed", () => openLogs(shipper) <= 1);
    const texts = Buffer.concat(sender.written).toString();
    expectTags(receiver.stored(sender.host), tagsOf(texts));
    await shipper.stop();
    await sender.once();
    expectTags(receiver.stored(sender.host), tagsOf(texts));
  });

  test("the receiver away over forty rotations: all arrives later, with few descriptors meanwhile", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    const shipper = await startShipper(sender);
    stub.script = () => new Response("away", { status: 503, headers: { "Retry-After": "0" } });
    let most = 0;
    for (let n = 1; n <= 40; n++) {
      sender.write(lines(`r${n}`, 1, 50));
      shiftNames(sender);
      sender.rotate();
      const before = stub.asked.length;
      await until("it was tried again", () => stub.asked.length > before);
      most = Math.max(most, openLogs(shipper));
    }
    sender.write(lines("live", 1, 50));
    expect(most).toBeLessThanOrEqual(40);
    stub.script = undefined;
    const all = Buffer.concat(sender.written).toString();
    await until("all has arrived", () => stub.text().length >= all.length);
    await until("rotated files are closed", () => openLogs(shipper) <= 1);
    await shipper.stop();
    await sender.once();
    expectTags(Buffer.from(stub.text()), tagsOf(all));
  });

  test("names that are shifted at any moment, also while they are listed, hide no file", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    const shipper = await startShipper(sender);
    stub.script = () => new Response("away", { status: 503, headers: { "Retry-After": "0" } });
    for (let n = 1; n <= 150; n++) {
      sender.write(lines(`r${n}`, 1, 5));
      shiftNames(sender);
      sender.rotate();
      await Bun.sleep(Math.random() * 60); // some while the shipper looks into the folder
    }
    stub.script = undefined;
    const all = Buffer.concat(sender.written).toString();
    await until("all has arrived", () => stub.text().length >= all.length);
    await shipper.stop();
    await sender.once();
    expectTags(Buffer.from(stub.text()), tagsOf(all));
  });

  test.each([
    ["access.log-20261122", "access.log"],
    ["access.log-20261122-1763791200", "access.log"],
    ["access-20261122.log", "access.log"],
    ["access.log.2026-11-22T06:00:00Z", "access.log"],
    ["access.log-22nov2026", "access.log"],
  ])("rotated to %s while stopped", async (name) => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 20));
    sender.rotate(name);
    sender.write(lines("b", 1, 10));
    await finish(sender);
  });

  test("rotated into logrotate's olddir, plain and compressed", async () => {
    const sender = await shippedTen({ olddir: "old" });
    // logrotate makes the folder at the first rotation (createolddir).
    mkdirSync(join(sender.logs, "old"));
    sender.write(lines("a", 11, 20));
    sender.rotate("old/access.log.2");
    gzip(join(sender.logs, "old/access.log.2"));
    sender.write(lines("b", 1, 10));
    sender.rotate("old/access.log.1");
    sender.write(lines("c", 1, 10));
    await finish(sender);
  });

  test("a glob that matches the rotated names too reads nothing again", async () => {
    const sender = await createSender(receiver.url);
    const files = [join(sender.logs, "access*")];
    writeFileSync(
      sender.config,
      readFileSync(sender.config, "utf8").replace(/"files": \[[^\]]*\]/, `"files": ${JSON.stringify(files)}`),
    );
    sender.write(lines("a", 1, 10));
    await sender.once();
    const shipper = await startShipper(sender);
    for (const tag of ["b", "c", "d"]) {
      shiftNames(sender);
      sender.rotate();
      sender.write(lines(tag, 1, 10));
      await expectArrives(receiver, sender, undefined, shipper);
    }
    gzip(`${sender.live}.3`);
    await finish(sender, shipper);
  });
});

describe("compressed files", () => {
  test.each(["gzip", "zstd"])("a half-shipped file that is %s now goes on at its byte", async (kind) => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 3000));
    sender.rotate("access.log.2");
    const path = `${sender.live}.2`;
    if (kind === "gzip") gzip(path);
    else {
      writeFileSync(`${path}.zst`, zstdCompressSync(readFileSync(path)));
      unlinkSync(path);
    }
    sender.write(lines("b", 1, 10));
    sender.rotate();
    sender.write(lines("c", 1, 10));
    await finish(sender);
  });

  test("a file that came, went and was compressed while stopped is shipped whole", async () => {
    const sender = await shippedTen();
    for (const tag of ["b", "c", "d"]) {
      shiftNames(sender);
      sender.rotate();
      sender.write(lines(tag, 1, 200));
      if (existsSync(`${sender.live}.2`)) gzip(`${sender.live}.2`);
    }
    await finish(sender);
  });

  test("a file that was shipped is not shipped again when it is compressed", async () => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    sender.rotate();
    await shipper.says("file is done");
    gzip(`${sender.live}.1`);
    sender.write(lines("b", 1, 10));
    await shipper.says("file is a copy of a known one");
    await expectArrives(receiver, sender, undefined, shipper);
    await finish(sender, shipper);
  });

  test("a finished file that is compressed and kept is not shipped again", async () => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    sender.write(lines("a", 11, 20));
    await expectArrives(receiver, sender);
    sender.rotate();
    await shipper.says("file is done");
    execFileSync("gzip", ["--keep", `${sender.live}.1`]);
    sender.write(lines("b", 1, 10));
    await finish(sender, shipper);
  });

  test("a copy by hand of a rotated file is not shipped again", async () => {
    const sender = await shippedTen({ rotateWaitSeconds: 0.3 });
    sender.write(lines("a", 11, 100));
    const shipper = await startShipper(sender);
    await expectArrives(receiver, sender);
    sender.rotate();
    await shipper.says("file is done");
    copyFileSync(`${sender.live}.1`, `${sender.live}-20261122`);
    sender.write(lines("b", 1, 10));
    await shipper.says("file is a copy of a known one");
    await finish(sender, shipper);
  });

  test("a gzip without its end is waited for, quietly", async () => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 2000));
    sender.rotate();
    const packed = gzipSync(readFileSync(`${sender.live}.1`));
    unlinkSync(`${sender.live}.1`);
    writeFileSync(`${sender.live}.1.gz`, packed.subarray(0, packed.length >> 1));
    const shipper = await startShipper(sender);
    for (const part of [0.6, 0.7, 0.8, 0.9]) {
      writeFileSync(`${sender.live}.1.gz`, packed.subarray(0, packed.length * part));
      await new Promise((resolve) => setTimeout(resolve, 100)); // the pace of the compression
    }
    expectArrivedOnly(sender, lines("a", 1, 10));
    writeFileSync(`${sender.live}.1.gz`, packed);
    sender.write(lines("b", 1, 10));
    await until(
      "all has arrived",
      () => receiver.stored(sender.host).length >= Buffer.concat(sender.written).length,
    );
    expect(shipper.output.match(/ (warn|error) /g)).toBe(null);
    await shipper.stop();
    await sender.once();
    expectTags(receiver.stored(sender.host), tagsOf(Buffer.concat(sender.written).toString()));
  });
});

function expectArrivedOnly(sender: Sender, text: string): void {
  expect(receiver.stored(sender.host).toString()).toBe(text);
}

describe("copytruncate", () => {
  const copytruncate = (sender: Sender) => {
    shiftNames(sender);
    copyFileSync(sender.live, `${sender.live}.1`);
    truncateSync(sender.live, 0);
  };

  test("of a file of which the receiver has more than the cursor says, while the answer is still out", async () => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 400));
    const killed = sender.start([], { LOG_RT_SYNC_STOP_AT: "shipper:answered" });
    expect(await killed.ended).toBe("SIGKILL"); // the lines are stored, the cursor does not know
    sender.write(lines("a", 401, 500));
    receiver.running.process.kill("SIGSTOP");
    const shipper = await startShipper(sender);
    await Bun.sleep(300); // time for the chunk to be on its way
    copytruncate(sender);
    sender.write(lines("b", 1, 50));
    receiver.running.process.kill("SIGCONT");
    const all = Buffer.concat(sender.written).length;
    await until("all has arrived", () => receiver.stored(sender.host).length >= all);
    await finish(sender, shipper);
    expect(await lostBytes(sender)).toBe(0);
  });

  test("while stopped: the unread tail comes from the copy", async () => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 500));
    copytruncate(sender);
    sender.write(lines("b", 1, 3));
    await finish(sender);
  });

  test("while stopped, refilled past the old offset: the same", async () => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 500));
    copytruncate(sender);
    sender.write(lines("b", 1, 3000));
    await finish(sender);
  });

  test("while stopped, the copy compressed at once and the file refilled: the same", async () => {
    const sender = await shippedTen();
    sender.write(lines("a", 11, 500));
    copytruncate(sender);
    gzip(`${sender.live}.1`);
    sender.write(lines("b", 1, 3000));
    await finish(sender);
  });

  test("killed with the cursor behind the receiver, copied, compressed and refilled: nothing twice", async () => {
    const sender = await createSender(receiver.url, { chunkBytes: 4096, flushMs: 0 });
    sender.write(lines("a", 1, 500));
    const shipper = sender.start([], {
      LOG_RT_SYNC_STOP_AT: "shipper:answered",
      LOG_RT_SYNC_STOP_COUNT: "6",
    });
    expect(await shipper.ended).toBe("SIGKILL");
    copytruncate(sender);
    gzip(`${sender.live}.1`);
    sender.write(lines("b", 1, 3000));
    await finish(sender);
    expect(await lostBytes(sender)).toBe(0);
  });

  test.each([3, 3000])("while it cannot look (stopped in place), then %i new lines", async (count) => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    sender.write(lines("a", 11, 20));
    await expectArrives(receiver, sender);
    shipper.process.kill("SIGSTOP");
    sender.write(lines("a", 21, 500));
    copytruncate(sender);
    sender.write(lines("b", 1, count));
    shipper.process.kill("SIGCONT");
    await until("all has arrived", () => {
      return receiver.stored(sender.host).length >= Buffer.concat(sender.written).length;
    });
    await finish(sender, shipper);
    expect(await lostBytes(sender)).toBe(0);
  });

  test.each(["cut", "cut and refilled"])(
    "%s between the look and the comparison with its copy: every line once",
    async (how) => {
      const sender = await createSender(receiver.url, { skip: [["noise"]] });
      sender.write(lines("a", 1, 100));
      await sender.once();
      const shipper = await startShipper(sender);
      sender.write(lines("a", 101, 110));
      await expectArrives(receiver, sender);
      shipper.process.kill("SIGSTOP");
      const older = `${sender.live}.2.gz`; // looked at first, and for long: nothing of it is to be shipped
      writeFileSync(older, gzipSync(Buffer.alloc(42_000_000, "noise\n")));
      utimesSync(older, 1, 1);
      execFileSync("cp", ["-p", sender.live, `${sender.live}.1`]);
      shipper.process.kill("SIGCONT");
      await until("it is being looked at", () => openPaths(shipper).includes(older));
      truncateSync(sender.live, 0);
      sender.write(lines("b", 1, how === "cut" ? 10 : 200));
      const all = Buffer.concat(sender.written).length;
      await until("all has arrived", () => receiver.stored(sender.host).length >= all);
      await finish(sender, shipper);
      expect(await lostBytes(sender)).toBe(0);
    },
  );

  test("three times while stopped", async () => {
    const sender = await shippedTen();
    for (const tag of ["a", "b", "c"]) {
      sender.write(lines(tag, 100, 300));
      copytruncate(sender);
    }
    sender.write(lines("live", 1, 10));
    await finish(sender);
  });

  test("a writer without O_APPEND leaves a hole: it is passed over, and the next line is intact", async () => {
    const sender = await createSender(receiver.url);
    const fd = openSync(sender.live, "w");
    const before = Buffer.from(lines("a", 1, 2000));
    writeSync(fd, before);
    await sender.once();
    const more = Buffer.from(lines("a", 2001, 2100));
    writeSync(fd, more);
    copyFileSync(sender.live, `${sender.live}.1`);
    truncateSync(sender.live, 0);
    const after = Buffer.from(lines("b", 1, 100)); // behind a hole of NULs
    writeSync(fd, after);
    expect(readFileSync(sender.live).subarray(0, 4).toString("hex")).toBe("00000000");
    await finish(sender, undefined, Buffer.concat([before, more, after]));
    writeSync(fd, lines("b", 101, 110));
    await finish(sender, undefined, Buffer.concat([before, more, after, Buffer.from(lines("b", 101, 110))]));
  });
});

describe("truncated and reused files", () => {
  const head = lines("same", 1, 40); // longer than any mark

  test.each(["running", "stopped"])(
    "truncated and refilled past the old offset, %s: read from 0",
    async (how) => {
      const sender = await createSender(receiver.url);
      sender.write(head + lines("a", 1, 10));
      await sender.once();
      const shipper = how === "running" ? await startShipper(sender) : undefined;
      shipper?.process.kill("SIGSTOP");
      truncateSync(sender.live, 0);
      sender.write(head + lines("b", 1, 300));
      shipper?.process.kill("SIGCONT");
      await (shipper ? expectArrives(receiver, sender, undefined, shipper) : undefined);
      await finish(sender, shipper);
    },
  );

  test("truncated in view, and refilled bit by bit", async () => {
    const sender = await shippedTen();
    const shipper = await startShipper(sender);
    for (const tag of ["b", "c", "d"]) {
      truncateSync(sender.live, 0);
      for (let n = 1; n <= 5; n++) {
        sender.write(lines(tag, n, n));
        await expectArrives(receiver, sender, undefined, shipper);
      }
    }
    await finish(sender, shipper);
  });

  test("a new file with the old one's inode number, longer than the old offset: read from 0", async () => {
    const sender = await shippedTen();
    const inode = statSync(sender.live).ino;
    let got = 0;
    for (let n = 0; n < 20 && got !== inode; n++) {
      unlinkSync(sender.live);
      writeFileSync(sender.live, lines("b", 1, 100));
      got = statSync(sender.live).ino;
    }
    await finish(sender, undefined, lines("a", 1, 10) + lines("b", 1, 100));
  });

  test("two files with the same first line, and with all the same lines, are two files", async () => {
    const sender = await createSender(receiver.url);
    const files = [sender.live, join(sender.logs, "other.log"), join(sender.logs, "third.log")];
    writeFileSync(
      sender.config,
      readFileSync(sender.config, "utf8").replace(/"files": \[[^\]]*\]/, `"files": ${JSON.stringify(files)}`),
    );
    const [, other = "", third = ""] = files;
    const first = lines("same", 1, 1);
    sender.write(first + lines("a", 1, 20));
    writeFileSync(other, first + lines("b", 1, 20));
    writeFileSync(third, first + lines("b", 1, 20));
    await sender.once();
    appendFileSync(other, lines("b", 21, 30));
    await sender.once();
    const b = lines("b", 1, 20).match(/.*\n/g) ?? [];
    const stored = receiver.stored(sender.host).toString();
    expect(stored.split(first).length - 1).toBe(3);
    expect(stored.split(b[7] ?? "").length - 1).toBe(2);
    expect(stored.length).toBe(
      3 * first.length + (lines("a", 1, 20) + lines("b", 1, 20) + lines("b", 1, 30)).length,
    );
  });

  test("a rotated file and a live one that begins the same are two files", async () => {
    const sender = await createSender(receiver.url);
    sender.write(head + lines("a", 1, 10));
    await sender.once();
    sender.rotate();
    sender.write(head + lines("b", 1, 10));
    await finish(sender);
  });

  test("an archive that is shorter than an unread file is not taken for it: nothing is told as lost", async () => {
    const sender = await createSender(receiver.url);
    const config = readFileSync(sender.config, "utf8");
    writeFileSync(sender.config, config.replace(receiver.url, `http://127.0.0.1:${await freePort()}`));
    sender.write(lines("a", 1, 10));
    const away = sender.start();
    running.push(away);
    await away.says("receiver does not take chunks");
    sender.rotate();
    sender.write(lines("b", 1, 50));
    await until("the new file is seen", () => away.output.split("info following").length > 2);
    await away.stop();
    writeFileSync(sender.config, config);
    shiftNames(sender);
    sender.rotate("access.log.1");
    sender.write(lines("c", 1, 10));
    shiftNames(sender);
    sender.rotate("access.log.1");
    gzip(`${sender.live}.2`);
    gzip(`${sender.live}.1`);
    const { mtimeMs } = statSync(`${sender.live}.2.gz`);
    utimesSync(`${sender.live}.1.gz`, new Date(), new Date(mtimeMs - 1)); // looked at first
    expect(await finish(sender)).not.toContain("bytes lost");
  });
});

describe("what is gone", () => {
  test("a rotated file that was removed unread is counted in bytes: log, metrics", async () => {
    const sender = await shippedTen();
    const gone = lines("a", 11, 60);
    writeSync(openSync(sender.live, "a"), gone);
    // It sees how much there is, but its receiver is away.
    const config = readFileSync(sender.config, "utf8");
    writeFileSync(sender.config, config.replace(receiver.url, `http://127.0.0.1:${await freePort()}`));
    const away = sender.start();
    await away.says("receiver does not take chunks");
    expect(await away.stop()).toBe(0);
    writeFileSync(sender.config, config);
    sender.rotate();
    unlinkSync(`${sender.live}.1`);
    sender.write(lines("b", 1, 10));
    const output = await sender.once();
    expect(receiver.stored(sender.host).toString()).toBe(lines("a", 1, 10) + lines("b", 1, 10));
    expect(output).toContain("bytes lost: they were gone before they could be read");
    expect(await lostBytes(sender)).toBe(gone.length);
    const facts = async () => (await readLedger(join(receiver.dir, sender.host)))?.facts;
    await until("it is said which file", async () => (await facts())?.agent?.endsWith(" (lost access.log)"));
  });

  test.each([".1", ".1.gz"])("first seen as %s, and removed before it was known: shipped", async (ending) => {
    const sender = await shippedTen({ rotateWaitSeconds: 30 });
    const shipper = await startShipper(sender);
    shipper.process.kill("SIGSTOP");
    sender.rotate("access.log.2");
    sender.write(lines("b", 1, 10));
    sender.rotate("access.log.1");
    if (ending === ".1.gz") gzip(`${sender.live}.1`);
    sender.write(lines("c", 1, 10));
    shipper.process.kill("SIGCONT");
    const gone = `${sender.live}${ending}`;
    await until("it waits to be known", () => openPaths(shipper).includes(gone));
    unlinkSync(gone);
    await expectArrives(receiver, sender, undefined, shipper);
    await finish(sender, shipper);
    expect(await lostBytes(sender)).toBe(0);
  });

  test("more of them than are held open, removed before they were known: shipped, or told to the byte", async () => {
    const sender = await shippedTen({ rotateWaitSeconds: 600 });
    const gone: string[] = [];
    for (let n = 1; n <= 40; n++) {
      const day = `${sender.live}-2026${n > 20 ? 10 : 11}${(n % 20) + 10}`;
      writeFileSync(day, lines(`d${n}`, 1, 3));
      gone.push(day);
    }
    const shipper = await startShipper(sender);
    await until(
      "as many wait as may",
      () => openPaths(shipper).filter((path) => gone.includes(path)).length >= 32,
    );
    for (const path of gone) unlinkSync(path);
    const total = () => receiver.stored(sender.host).length - sender.written.join("").length;
    const all = gone.map((_, i) => lines(`d${i + 1}`, 1, 3).length).reduce((sum, bytes) => sum + bytes);
    await until("all is shipped, or told", async () => total() + (await lostBytes(sender)) >= all);
    expect(total() + (await lostBytes(sender))).toBe(all);
    expect(await shipper.stop()).toBe(0);
  });

  test("a rotated file that was removed while it is open loses nothing", async () => {
    const sender = await shippedTen({ rotateWaitSeconds: 30 });
    const shipper = await startShipper(sender);
    sender.write(lines("a", 11, 20));
    await expectArrives(receiver, sender);
    const old = sender.rotate();
    sender.write(lines("b", 1, 1));
    await expectArrives(receiver, sender);
    unlinkSync(`${sender.live}.1`);
    writeSync(old, lines("late", 1, 10));
    await until("the late lines are stored", () => receiver.stored(sender.host).includes("GET /late/10 "));
    await shipper.stop();
    const output = await sender.once();
    expect(output).not.toContain("bytes lost");
    expectTags(receiver.stored(sender.host), {
      a: lines("a", 1, 20),
      b: lines("b", 1, 1),
      late: lines("late", 1, 10),
    });
  });
});

/** Bytes that the receiver was told of as lost. */
async function lostBytes(sender: Sender): Promise<number> {
  const text = await (await fetch(`${receiver.url}/metrics`)).text();
  const line = text.split("\n").find((each) => /lost/.test(each) && each.includes(`"${sender.host}"`));
  return Number(line?.split(" ").at(-1) ?? 0);
}
