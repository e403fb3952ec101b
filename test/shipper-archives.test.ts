/** Archives of every kind beside a log: each line once, silence about what was shipped before, and bytes for what can't be read. */
import { afterEach, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  copyFileSync,
  existsSync,
  readFileSync,
  renameSync,
  statSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { withFile } from "../lib/tail/cursor.ts";
import { LogFile, readHead } from "../lib/tail/file.ts";
import { identify } from "../lib/tail/identify.ts";
import { type FoundFile, lookAt } from "../lib/tail/paths.ts";
import { createSender, expectTags, lines, type Sender, type StubReceiver, startStub } from "./pipeline.ts";
import { missing, type Running, tempFolder, until } from "./support.ts";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function startShipper(sender: Sender): Running {
  const shipper = sender.start();
  running.push(shipper);
  return shipper;
}

function expects(stub: StubReceiver, counts: Record<string, number>): void {
  const expected = Object.entries(counts).map(([tag, count]) => [tag, lines(tag, 1, count)]);
  expectTags(Buffer.from(stub.text(), "latin1"), Object.fromEntries(expected));
}

async function arrives(stub: StubReceiver, tag: string, n: number): Promise<void> {
  await until(`line ${n} of ${tag} is there`, () => stub.text().includes(`GET /${tag}/${n} `));
}

describe("what gzip -dc and zstd -dc read", () => {
  const packers: [string, string, (text: string) => Buffer][] = [
    [
      "bytes behind its end",
      ".1.gz",
      (text) => Buffer.concat([gzipSync(text), Buffer.from("trailing garbage")]),
    ],
    ["NULs behind its end", ".1.gz", (text) => Buffer.concat([gzipSync(text), Buffer.alloc(512)])],
    [
      "several members",
      ".1.gz",
      (text) => Buffer.concat([gzipSync(text.slice(0, 700)), gzipSync(text.slice(700))]),
    ],
    [
      "an empty member in between",
      ".1.gz",
      (text) => Buffer.concat([gzipSync(text.slice(0, 700)), gzipSync(""), gzipSync(text.slice(700))]),
    ],
    [
      "zstd --long",
      ".1.zst",
      (text) => execFileSync("zstd", ["--long=31", "-q", "-c", "--ultra", "-22"], { input: text }),
    ],
    [
      "several zstd frames",
      ".1.zst",
      (text) =>
        Buffer.concat([
          execFileSync("zstd", ["-q", "-c"], { input: text.slice(0, 700) }),
          execFileSync("zstd", ["-q", "-c"], { input: text.slice(700) }),
        ]),
    ],
  ];
  test.skipIf(missing({ zstd: "zstd" })).each(packers)(
    "%s: the unread tail is shipped, and nothing twice",
    async (_, ending, pack) => {
      const stub = startStub();
      const sender = await createSender(stub.url);
      sender.write(lines("a", 1, 20));
      await sender.once();
      sender.write(lines("a", 21, 50));
      writeFileSync(sender.live + ending, pack(lines("a", 1, 50)));
      unlinkSync(sender.live);
      sender.reopen();
      sender.write(lines("b", 1, 10));
      const output = await sender.once();
      expect(output).not.toMatch(/lost|damaged|cannot read/);
      sender.write(lines("b", 11, 20));
      await sender.once();
      expects(stub, { a: 50, b: 20 });
    },
  );
});

describe("a log that nginx writes compressed", () => {
  test("grows by members: each line arrives, running and after a restart, and its rotation", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "access.log.gz")] }));
    const live = `${sender.live}.gz`;
    unlinkSync(sender.live);
    const add = (tag: string, from: number, to: number) =>
      appendFileSync(live, gzipSync(lines(tag, from, to)));
    add("a", 1, 10);
    await sender.once();
    const shipper = startShipper(sender);
    for (let n = 11; n <= 60; n += 10) {
      add("a", n, n + 9);
      await arrives(stub, "a", n + 9);
    }
    await shipper.stop();
    add("a", 61, 70);
    const half = gzipSync(lines("a", 71, 80));
    appendFileSync(live, half.subarray(0, 30));
    const second = startShipper(sender);
    await arrives(stub, "a", 70);
    appendFileSync(live, half.subarray(30));
    await arrives(stub, "a", 80);
    renameSync(live, `${live}.1`);
    add("b", 1, 10);
    await arrives(stub, "b", 10);
    await second.stop();
    await sender.once();
    expects(stub, { a: 80, b: 10 });
  });
});

describe("an archive that can't be read here", () => {
  const kinds = [
    ["xz", "xz-utils"],
    ["bzip2", "bzip2"],
  ] as const;
  for (const [program, debian] of kinds) {
    const ending = program === "xz" ? ".xz" : ".bz2";
    test.skipIf(missing({ [program]: debian }))(
      `${program}, of which everything was shipped: silence, and --once ends with 0`,
      async () => {
        for (const pattern of ["access.log", "*"]) {
          const stub = startStub();
          const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, pattern)] }));
          sender.write(lines("a", 1, 50));
          await sender.once();
          sender.rotate();
          execFileSync(program, [`${sender.live}.1`]);
          sender.write(lines("b", 1, 10));
          const output = await sender.once();
          expect(output).not.toMatch(/cannot read|lost/);
          renameSync(`${sender.live}.1${ending}`, `${sender.live}.2${ending}`);
          sender.rotate();
          execFileSync(program, [`${sender.live}.1`]);
          sender.write(lines("c", 1, 10));
          expect(await sender.once()).not.toMatch(/cannot read|lost/);
          expects(stub, { a: 50, b: 10, c: 10 });
        }
      },
    );

    test.skipIf(missing({ [program]: debian })).each([".1", "-Sun"])(
      `${program}, as %s, with lines that came while it was stopped: told`,
      async (name) => {
        const stub = startStub();
        const sender = await createSender(stub.url);
        sender.write(lines("a", 1, 50));
        await sender.once();
        sender.write(lines("a", 51, 52));
        const later = statSync(sender.live).mtimeMs / 1000 + 2; // bzip2 keeps whole seconds
        utimesSync(sender.live, later, later);
        sender.rotate(`access.log${name}`);
        execFileSync(program, [sender.live + name]);
        sender.write(lines("b", 1, 10));
        const ended = sender.start(["--once"]);
        running.push(ended);
        expect(await ended.ended).toBe(1);
        expect(ended.output).toContain("use gzip or zstd in logrotate");
        expects(stub, { a: 50, b: 10 });
      },
    );

    test.skipIf(missing({ [program]: debian }))(
      `${program}, with lines that were not shipped: told, with bytes`,
      async () => {
        const stub = startStub();
        const sender = await createSender(stub.url);
        sender.write(lines("a", 1, 50));
        await sender.once();
        stub.script = () => new Response("away", { status: 503 });
        const shipper = startShipper(sender);
        sender.write(lines("a", 51, 90));
        await shipper.says("held, and tried again");
        sender.rotate();
        await until("its size was seen", () => existsSync(`${sender.live}.1`));
        await Bun.sleep(700); // a look and a save
        await shipper.stop();
        execFileSync(program, [`${sender.live}.1`]);
        stub.script = undefined;
        sender.write(lines("b", 1, 10));
        const ended = sender.start(["--once"]);
        running.push(ended);
        expect(await ended.ended).toBe(1);
        expect(ended.output).toContain("use gzip or zstd in logrotate");
        expect(ended.output).toContain(`bytes=${lines("a", 51, 90).length}`);
        expects(stub, { a: 50, b: 10 });
      },
    );
  }
});

describe("a file that was read to its end", () => {
  test("is not read again as .gz, which a copy is, too", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 5000));
    await sender.once();
    copyFileSync(sender.live, `${sender.live}.1`);
    truncateSync(sender.live, 0);
    execFileSync("gzip", ["-k", `${sender.live}.1`]);
    sender.write(lines("b", 1, 10));
    await sender.once();
    unlinkSync(`${sender.live}.1`);
    writeFileSync(`${sender.live}.3.gz`, readFileSync(`${sender.live}.1.gz`));
    await sender.once();
    expects(stub, { a: 5000, b: 10 });
  });
});

describe("a copy that has a part of a log only", () => {
  for (const pack of ["plain", "gzip"]) {
    test(`${pack}: once the log is cut, it goes on in the copy that has all of it`, async () => {
      const stub = startStub();
      const sender = await createSender(stub.url);
      const copy = (number: number) => {
        copyFileSync(sender.live, `${sender.live}.${number}`);
        if (pack === "gzip") execFileSync("gzip", [`${sender.live}.${number}`]);
      };
      const shipper = startShipper(sender);
      sender.write(lines("a", 1, 100));
      await arrives(stub, "a", 100);
      copy(2);
      await shipper.says("file is a copy of a known one");
      sender.write(lines("a", 101, 200));
      await arrives(stub, "a", 200);
      copy(1);
      truncateSync(sender.live, 0);
      sender.write(lines("b", 1, 30));
      await arrives(stub, "b", 30);
      await until("the copy is known", () => /copy of a known one path=\S+\.1\b/.test(shipper.output));
      await shipper.stop();
      const output = shipper.output + (await sender.once());
      expects(stub, { a: 200, b: 30 });
      expect(output).not.toContain("a new stream begins");
    });
  }

  test("does not stand for a log that is seen for the first time, as old rotations are not shipped", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 100));
    copyFileSync(sender.live, `${sender.live}.1`);
    await sender.once();
    sender.write(lines("a", 101, 150));
    await sender.once();
    expects(stub, { a: 150 });
  });
});

test("an archive whose original is cut or removed between the look and the comparison is judged by the next look", async () => {
  const path = join(await tempFolder(), "access.log.1");
  writeFileSync(path, lines("a", 1, 40));
  const { key = "", mtimeMs = 0, size = 0 } = lookAt(path) ?? {};
  const own = await LogFile.open(path);
  const { head } = await readHead(own, 0);
  await own.close();
  const state = { from: 0, offset: 0, log: path, path, key, copies: [], marks: [], size, mtimeMs };
  const stream = withFile({ ...state, ...(head && { head }), phase: { is: "reading" } }, 0);
  writeFileSync(`${path}.gz`, gzipSync(lines("a", 1, 40)));
  const found = lookAt(`${path}.gz`, { log: path }) as FoundFile;
  const archive = await LogFile.open(found.path);
  const judge = () => identify(archive, found, [stream]);
  expect(await judge()).toMatchObject({ is: "copy" });
  truncateSync(path, 100);
  expect(await judge()).toEqual({ is: "busy" });
  renameSync(path, `${path}.bak`);
  expect(await judge()).toEqual({ is: "busy" });
  writeFileSync(path, "another one\n");
  expect(await judge()).toEqual({ is: "busy" });
  await archive.close();
});

test("a file that was compressed before a byte of it was read is that file, when no other is", async () => {
  const path = join(await tempFolder(), "access.log");
  const text = lines("a", 1, 20);
  writeFileSync(`${path}.1.gz`, gzipSync(text));
  const found = lookAt(`${path}.1.gz`, { log: path }) as FoundFile;
  const archive = await LogFile.open(found.path);
  const gone = { log: path, offset: 0, size: text.length, marks: [], phase: { is: "gone" }, mtimeMs: 0 };
  const judge = (...streams: object[]) => identify(archive, found, streams as never);
  expect(await judge(gone)).toMatchObject({ is: "stream", stream: gone, isDone: false });
  expect(await judge({ ...gone, isBusy: true })).toEqual({ is: "busy" });
  const others = [
    { size: text.length + 1 },
    { log: `${path}2` },
    { offset: 1 },
    { phase: { is: "reading" } },
    { mtimeMs: found.mtimeMs + 5000 },
  ];
  for (const other of others) expect(await judge({ ...gone, ...other })).toEqual({ is: "new", at: 0 });
  await archive.close();
});

describe("what vanishes while the receiver is away is told to the byte", () => {
  for (const how of ["cut", "removed"]) {
    for (const when of ["running", "stopped"]) {
      test(`${how}, ${when}`, async () => {
        const stub = startStub();
        const sender = await createSender(stub.url);
        sender.write(lines("a", 1, 20));
        await sender.once();
        stub.script = () => new Response("away", { status: 503 });
        const shipper = startShipper(sender);
        await shipper.says("held, and tried again");
        for (let n = 21; n <= 40; n++) sender.write(lines("a", n, n));
        const seen = () =>
          JSON.parse(readFileSync(join(sender.stateDir, "cursor.json"), "utf8")).streams[0]?.size;
        await until("the shipper has seen it", () => seen() === lines("a", 1, 40).length);
        if (when === "stopped") await shipper.stop();
        if (how === "cut") truncateSync(sender.live, 0);
        else {
          unlinkSync(sender.live);
          sender.reopen();
        }
        sender.write(lines("b", 1, 30));
        if (when === "running" && how === "removed") await shipper.stop(); // its file is open: nothing would be lost
        stub.script = undefined;
        let output = shipper.output;
        if (when === "running" && how === "cut") {
          await arrives(stub, "b", 30);
          await until("it is told", () => stub.lost > 0);
          await shipper.stop();
          output = shipper.output;
        }
        output += await sender.once();
        expect(stub.lost).toBe(lines("a", 21, 40).length);
        expect(output).toContain("bytes lost");
        expects(stub, { a: 20, b: 30 });
      });
    }
  }
});
