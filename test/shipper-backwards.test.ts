/**
 * A host that lost or rewrote bytes which were shipped already: set back to a snapshot, cut by a power loss, edited, moved,
 * restored. No new line is ever taken for an old one; what comes twice stays below the limit of the README, and is told.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  closeSync,
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  truncateSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import {
  type Asked,
  createSender,
  expectTags,
  lines,
  type Sender,
  type StubReceiver,
  shiftNames,
  startStub,
} from "./pipeline.ts";
import { type Running, until } from "./support.ts";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

const LINE = lines("a", 1000, 1000).length;
/** Twice at most, of one stream: the larger of this and half of what was lost. */
const LIMIT = 64 * 1024;

async function createHost(
  options: Parameters<typeof createSender>[1] = {},
): Promise<{ stub: StubReceiver; sender: Sender }> {
  const stub = startStub();
  return { stub, sender: await createSender(stub.url, options) };
}

function startShipper(sender: Sender): Running {
  const shipper = sender.start();
  running.push(shipper);
  return shipper;
}

async function arrives(stub: StubReceiver, tag: string, n: number): Promise<void> {
  await until(`line ${n} of ${tag} is there`, () => stub.text().includes(`GET /${tag}/${n} `));
}

/** How often each line arrived: those of `once` exactly once, of `all` at least once. Gives the bytes that came twice. */
function twice(stub: StubReceiver, once: string[], all: string[] = []): number {
  const counts = new Map<string, number>();
  const whole = /10\.0\.0\.1 -(?:(?!10\.0\.0\.1 -).)*\n/g; // without the half line, or the NULs, that a cut leaves before it
  for (const line of stub.text().match(whole) ?? []) counts.set(line, (counts.get(line) ?? 0) + 1);
  const missing = [...once, ...all]
    .flatMap((text) => text.match(/.*\n/g) ?? [])
    .filter((line) => !counts.has(line));
  expect(missing.slice(0, 3)).toEqual([]);
  for (const line of once.flatMap((text) => text.match(/.*\n/g) ?? []))
    expect(`${counts.get(line)} ${line}`).toBe(`1 ${line}`);
  let bytes = 0;
  for (const [line, count] of counts) bytes += (count - 1) * line.length;
  return bytes;
}

describe("the host is set back", () => {
  test.each([
    ["few new lines than were lost", 100],
    ["as many", 300],
    ["more", 900],
  ])("to a snapshot of log and cursor, then %s: all of them arrive", async (_, count) => {
    const { stub, sender } = await createHost();
    sender.write(lines("a", 1001, 1500));
    await sender.once();
    const kept = join(sender.folder, "kept");
    mkdirSync(kept);
    copyFileSync(sender.live, join(kept, "log"));
    cpSync(sender.stateDir, join(kept, "state"), { recursive: true });
    sender.write(lines("a", 1501, 1800));
    await sender.once();
    rmSync(sender.stateDir, { recursive: true });
    cpSync(join(kept, "state"), sender.stateDir, { recursive: true });
    writeFileSync(sender.live, readFileSync(join(kept, "log")));
    sender.reopen();
    sender.write(lines("b", 1001, 1000 + count));
    const output = await sender.once();

    const again = twice(stub, [lines("b", 1001, 1000 + count)], [lines("a", 1001, 1800)]);
    expect(again).toBeLessThanOrEqual(LIMIT);
    if (again > 0) expect(output).toContain("a new stream begins");
  });

  test("the state folder alone is older: nothing is lost or twice", async () => {
    const { stub, sender } = await createHost();
    sender.write(lines("a", 1, 500));
    await sender.once();
    const kept = join(sender.folder, "kept");
    cpSync(sender.stateDir, kept, { recursive: true });
    sender.write(lines("a", 501, 800));
    await sender.once();
    rmSync(sender.stateDir, { recursive: true });
    cpSync(kept, sender.stateDir, { recursive: true });
    sender.write(lines("a", 801, 900));
    await sender.once();
    expect(twice(stub, [lines("a", 1, 900)])).toBe(0);
  });
});

describe("a power loss", () => {
  const cases: [string, string, number][] = [
    ["gone", "stopped", 60],
    ["NULs", "stopped", 60],
    ["gone", "stopped", 4000],
    ["NULs", "stopped", 4000],
    ["gone", "running", 60],
    ["NULs to the end of a block", "stopped", 60],
  ];
  test.each(cases)(
    "the newest lines are %s (%s, %i lines): what follows arrives, little comes twice",
    async (how, when, lost) => {
      const { stub, sender } = await createHost({ chunkBytes: 65536 });
      for (let n = 1; n <= 10; n++) {
        sender.write(lines("a", n * 1000 + 1, n * 1000 + 1000));
        if (n % 3 === 0) await sender.once();
      }
      await sender.once();
      const size = statSync(sender.live).size;
      const shipper = when === "running" ? startShipper(sender) : undefined;
      if (shipper) {
        sender.write(lines("z", 1, 1));
        await arrives(stub, "z", 1);
      }
      truncateSync(sender.live, size - lost * LINE);
      if (how === "NULs") truncateSync(sender.live, size);
      if (how === "NULs to the end of a block") truncateSync(sender.live, Math.ceil(size / 4096) * 4096);
      for (let n = 1; n <= 3; n++) {
        sender.write(lines("b", n * 100, n * 100 + 50));
        if (shipper) await arrives(stub, "b", n * 100 + 50);
        else await sender.once();
      }
      await shipper?.stop();
      const output = await sender.once();
      const all = (shipper?.output ?? "") + output;
      expect(all).not.toContain("bytes lost");
      const again = twice(
        stub,
        [1, 2, 3].map((n) => lines("b", n * 100, n * 100 + 50)),
        [lines("a", 1001, 10_999)],
      );
      expect(again).toBeLessThanOrEqual(Math.max(LIMIT, (lost * LINE) / 2) + LINE);
    },
  );

  test("a half line at the cut is never glued to what follows", async () => {
    const { stub, sender } = await createHost();
    sender.write(lines("a", 1001, 1900));
    await sender.once();
    truncateSync(sender.live, 700 * LINE + 20);
    sender.write(`\n${lines("b", 1, 300)}`);
    await sender.once();
    const again = twice(stub, [lines("b", 1, 300)], [lines("a", 1001, 1900)]);
    expect(again).toBeLessThanOrEqual(LIMIT);
  });
});

describe("the live log is written anew", () => {
  const edits: [string, (path: string) => void][] = [
    ["sed -i deletes lines", (path) => void execFileSync("sed", ["-i", "/GET .a.10[0-9]3 /d", path])],
    ["sed -i changes each line", (path) => void execFileSync("sed", ["-i", "s/curl/CURL/", path])],
    [
      "an editor writes it in place",
      (path) => writeFileSync(path, readFileSync(path, "utf8").replace(/.*a.1500 .*\n/, "")),
    ],
    [
      "an editor writes it in place, longer",
      (path) =>
        writeFileSync(path, readFileSync(path, "utf8").replace(/.*(a.1500) .*\n/, `$&${"x".repeat(300)}\n`)),
    ],
    [
      "an editor renames a new file over it",
      (path) => {
        writeFileSync(`${path}.swp`, readFileSync(path, "utf8").replace(/.*a.1900 .*\n/, ""));
        renameSync(`${path}.swp`, path);
      },
    ],
  ];
  for (const when of ["running", "stopped"]) {
    test.each(edits)(`${when}: %s`, async (_, edit) => {
      const { stub, sender } = await createHost({ chunkBytes: 16384 });
      sender.write(lines("a", 1001, 1200));
      await sender.once();
      sender.write(lines("a", 1201, 1990));
      const shipper = when === "running" ? startShipper(sender) : undefined;
      if (shipper) await arrives(stub, "a", 1990);
      else await sender.once();
      edit(sender.live);
      sender.reopen();
      sender.write(lines("b", 1, 50));
      if (shipper) await arrives(stub, "b", 50);
      await shipper?.stop();
      await sender.once();
      sender.write(lines("b", 51, 60));
      await sender.once();
      const bytes = twice(stub, [lines("b", 1, 60)]);
      expect(bytes).toBeLessThanOrEqual(Math.max(LIMIT, 990 * LINE));
    });
  }
});

describe("files that begin alike", () => {
  const HEAD = `#Fields: date time s-ip cs-method ${"x".repeat(1200)}\n`;
  const SHORT = "#Version: 1.0\n";
  for (const head of [SHORT, HEAD]) {
    for (const when of ["running", "stopped"]) {
      for (const how of ["rename", "copytruncate"]) {
        test(`${when}, ${how}, a header of ${head.length} bytes each day: every line once`, async () => {
          const { stub, sender } = await createHost();
          const expected: string[] = [];
          await sender.once();
          const shipper = when === "running" ? startShipper(sender) : undefined;
          for (let day = 1; day <= 6; day++) {
            sender.write(head);
            sender.write(lines(`d${day}`, 1, 3 * day));
            if (shipper) await arrives(stub, `d${day}`, 3 * day);
            else if (day % 3 !== 0) await sender.once();
            sender.write(lines(`d${day}`, 3 * day + 1, 3 * day + 5));
            if (shipper) await arrives(stub, `d${day}`, 3 * day + 5);
            expected.push(lines(`d${day}`, 1, 3 * day + 5));
            for (let n = day; n >= 1; n--) {
              const path = `${sender.live}.${n}`;
              if (n < day) renameSync(path, `${sender.live}.${n + 1}`);
            }
            if (how === "rename") sender.rotate();
            else {
              copyFileSync(sender.live, `${sender.live}.1`);
              truncateSync(sender.live, 0);
            }
          }
          await shipper?.stop();
          await sender.once();
          expect(twice(stub, expected)).toBe(0);
          expect(stub.text().split(head).length - 1).toBe(6);
        });
      }
    }
  }

  test.each(["rename", "gzip", "copytruncate"])(
    "stopped, %s: a header of a kilobyte that was shipped before its lines, the last time without a save",
    async (how) => {
      const { stub, sender } = await createHost();
      const expected: string[] = [];
      await sender.once();
      for (let day = 1; day <= 3; day++) {
        sender.write(HEAD);
        await sender.once();
        sender.write(lines(`d${day}`, 1, 5));
        expected.push(lines(`d${day}`, 1, 5));
        if (how === "copytruncate") {
          await sender.once();
          copyFileSync(sender.live, `${sender.live}-2026112${day}`);
          truncateSync(sender.live, 0);
          continue;
        }
        const killed = sender.start(["--once"], { LOG_RT_SYNC_STOP_AT: "shipper:answered" });
        expect(await killed.ended).toBe("SIGKILL");
        sender.rotate(`access.log-2026112${day}`);
        if (how === "gzip") execFileSync("gzip", [`${sender.live}-2026112${day}`]);
      }
      sender.write(HEAD + lines("d4", 1, 5));
      await sender.once();
      expect(twice(stub, [...expected, lines("d4", 1, 5)])).toBe(0);
      expect(stub.text().split(HEAD).length - 1).toBe(4);
    },
  );

  for (const how of ["copytruncate", "copytruncate and gzip"]) {
    for (const before of ["nothing", "a part"]) {
      test(`while the receiver is away, ${how}, ${before} shipped before: every line once, and nothing is told as lost`, async () => {
        const { stub, sender } = await createHost();
        await sender.once();
        const shipper = startShipper(sender);
        const expected: string[] = [];
        const away = () => new Response("away", { status: 503 });
        if (before === "nothing") stub.script = away;
        for (let day = 1; day <= 3; day++) {
          sender.write(HEAD + lines(`d${day}`, 1, 10));
          if (day === 1 && before === "a part") await arrives(stub, "d1", 10);
          stub.script = away;
          sender.write(lines(`d${day}`, 11, 80 - 10 * day)); // the next one is never as long
          expected.push(lines(`d${day}`, 1, 80 - 10 * day));
          const { size } = statSync(sender.live);
          const cursor = join(sender.stateDir, "cursor.json");
          await until("it is seen", () => readFileSync(cursor, "utf8").includes(`"size":${size}`));
          shiftNames(sender);
          copyFileSync(sender.live, `${sender.live}.1`);
          truncateSync(sender.live, 0);
          if (how.includes("gzip")) execFileSync("gzip", [`${sender.live}.1`]);
        }
        stub.script = undefined;
        for (let day = 1; day <= 3; day++) await arrives(stub, `d${day}`, 80 - 10 * day);
        expect(await shipper.stop()).toBe(0);
        await sender.once();
        expect(twice(stub, expected)).toBe(0);
        expect(stub.text().split(HEAD).length - 1).toBe(3);
        expect(stub.lost).toBe(0);
        expect(shipper.output).not.toContain("bytes lost");
      });
    }
  }

  test("two logs whose first kilobyte is the same, at the first start and after a rotation: both are whole", async () => {
    for (const names of [["a.log", "b.log"], ["*.log"]]) {
      const { stub, sender } = await createHost((logs) => ({
        files: names.map((name) => join(logs, name)),
      }));
      for (const name of ["a", "b"])
        writeFileSync(join(sender.logs, `${name}.log`), HEAD + lines(name, 1, 5));
      await sender.once();
      for (const name of ["a", "b"]) {
        renameSync(join(sender.logs, `${name}.log`), join(sender.logs, `${name}.log.1`));
        writeFileSync(join(sender.logs, `${name}.log`), HEAD);
      }
      await sender.once();
      expect(twice(stub, [lines("a", 1, 5), lines("b", 1, 5)])).toBe(0);
      expect(stub.text().split(HEAD).length - 1).toBe(4);
    }
  });

  test("without a cursor: the receiver knows each of them", async () => {
    const { stub, sender } = await createHost();
    await sender.once();
    for (let day = 1; day <= 4; day++) {
      sender.write(HEAD + lines(`d${day}`, 1, 40));
      await sender.once();
      for (let n = day - 1; n >= 1; n--) renameSync(`${sender.live}.${n}`, `${sender.live}.${n + 1}`);
      sender.rotate();
    }
    sender.write(HEAD + lines("d5", 1, 40));
    rmSync(sender.stateDir, { recursive: true });
    await sender.once();
    sender.write(lines("d5", 41, 50));
    await sender.once();
    expect(twice(stub, [1, 2, 3, 4].map((d) => lines(`d${d}`, 1, 40)).concat(lines("d5", 1, 50)))).toBe(0);
    expect(stub.text().split(HEAD).length - 1).toBe(5);
  });
});

describe("moved and restored", () => {
  test.each([
    [3, "no line"],
    [300, "no line"],
    [3, "a tail"],
    [300, "a tail"],
    [3, "lines of the new disk"],
  ])(
    "the log folder moves to a new disk while it is stopped (%i lines, %s unread)",
    async (count, unread) => {
      const { stub, sender } = await createHost();
      sender.write(lines("a", 1, count));
      await sender.once();
      if (unread === "a tail") sender.write(lines("a", ++count, count));
      const next = `${sender.logs}.new`;
      execFileSync("cp", ["-a", sender.logs, next]);
      renameSync(sender.logs, `${sender.logs}.old`);
      renameSync(next, sender.logs);
      sender.reopen();
      if (unread === "lines of the new disk") sender.write(lines("a", ++count, count));
      await sender.once();
      sender.write(lines("a", count + 1, count + 20));
      await sender.once();
      expectTags(Buffer.from(stub.text()), { a: lines("a", 1, count + 20) });
    },
  );

  test("the log folder moves while it is followed: small files go on in their copies", async () => {
    const { stub, sender } = await createHost((logs) => ({ files: [join(logs, "*.log")] }));
    const other = join(sender.logs, "other.log");
    sender.write(lines("a", 1, 3));
    writeFileSync(other, lines("b", 1, 4));
    startShipper(sender);
    await arrives(stub, "a", 3);
    await arrives(stub, "b", 4);
    execFileSync("cp", ["-a", sender.logs, `${sender.logs}.new`]);
    renameSync(sender.logs, `${sender.logs}.old`);
    renameSync(`${sender.logs}.new`, sender.logs);
    sender.reopen();
    sender.write(lines("a", 4, 5));
    appendFileSync(other, lines("b", 5, 5));
    await arrives(stub, "a", 5);
    await arrives(stub, "b", 5);
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 5), b: lines("b", 1, 5) });
  });

  test.each(["running", "stopped"])(
    "a log that is begun with a copy of its last one goes on behind it (%s)",
    async (when) => {
      const { stub, sender } = await createHost();
      sender.write(lines("a", 1, 30));
      const shipper = when === "running" ? startShipper(sender) : undefined;
      if (shipper) await arrives(stub, "a", 30);
      else await sender.once();
      renameSync(sender.live, `${sender.live}.1`);
      copyFileSync(`${sender.live}.1`, sender.live);
      sender.reopen();
      sender.write(lines("a", 31, 33));
      if (shipper) await arrives(stub, "a", 33);
      await shipper?.stop();
      await sender.once();
      expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 33) });
    },
  );

  test("the log folder is a mount that comes late: nothing is told as lost", async () => {
    const { stub, sender } = await createHost();
    sender.write(lines("a", 1, 100));
    await sender.once();
    sender.write(lines("a", 101, 120));
    renameSync(sender.logs, `${sender.logs}.disk`);
    mkdirSync(sender.logs); // the empty mount point
    const shipper = startShipper(sender);
    await shipper.says("another one: waiting");
    rmSync(sender.logs, { recursive: true });
    renameSync(`${sender.logs}.disk`, sender.logs);
    await arrives(stub, "a", 120);
    await shipper.stop();
    expect(shipper.output).not.toContain("bytes lost");
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 120) });
  });

  test("files whose times are wrong: from the future, and of 1970", async () => {
    for (const seconds of [0, 4_000_000_000]) {
      const { stub, sender } = await createHost();
      sender.write(lines("a", 1, 100));
      await sender.once();
      sender.write(lines("a", 101, 120));
      utimesSync(sender.live, seconds, seconds);
      sender.rotate();
      utimesSync(`${sender.live}.1`, seconds, seconds);
      sender.write(lines("b", 1, 20));
      await sender.once();
      writeFileSync(`${sender.live}.1.gz`, gzipSync(readFileSync(`${sender.live}.1`)));
      rmSync(`${sender.live}.1`);
      utimesSync(`${sender.live}.1.gz`, seconds, seconds);
      await sender.once();
      expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 120), b: lines("b", 1, 20) });
    }
  });
});

function isChunk({ end, offset }: Asked): boolean {
  return end > offset;
}

describe("a file that is another one between two looks", () => {
  test.each(["gzip", "zstd"])(
    "a log is packed by %s and cut while a rotated file of it is on its way: what was unread comes",
    async (tool) => {
      const { stub, sender } = await createHost();
      sender.write(lines("a", 1, 20));
      const shipper = startShipper(sender);
      await arrives(stub, "a", 20);
      const old = sender.rotate("access.log.3");
      sender.write(lines("b", 1, 20));
      await arrives(stub, "b", 20);
      const gate = Promise.withResolvers<void>();
      const chunks = () => stub.asked.filter(isChunk).length;
      const before = chunks();
      stub.script = (asked, commit) => (isChunk(asked) ? gate.promise.then(commit) : undefined);
      writeSync(old, lines("a", 21, 23));
      await until("its chunk is on its way", () => chunks() > before);
      sender.write(lines("b", 21, 23));
      const archive = `${sender.live}.2.${tool === "gzip" ? "gz" : "zst"}`;
      execFileSync("sh", ["-c", `${tool} -c "$0" > "$1"; : > "$0"`, sender.live, archive]);
      sender.write(lines("c", 1, 2));
      await shipper.says("file is a copy of a known one");
      gate.resolve();
      await arrives(stub, "c", 2);
      await arrives(stub, "b", 23);
      expect(await shipper.stop()).toBe(0);
      await sender.once();
      const expected = { a: lines("a", 1, 23), b: lines("b", 1, 23), c: lines("c", 1, 2) };
      expectTags(Buffer.from(stub.text()), expected);
      expect(stub.lost).toBe(0);
    },
  );

  test.each(["copy", "rotated file"])("a %s is written anew in place, with as many bytes", async (what) => {
    const { stub, sender } = await createHost();
    sender.write(lines("a", 1, 40));
    const shipper = startShipper(sender);
    await arrives(stub, "a", 40);
    const path = `${sender.live}.1`;
    if (what === "copy") copyFileSync(sender.live, path);
    else sender.rotate();
    await shipper.says(what === "copy" ? "file is a copy of a known one" : "file is done");
    const { size } = statSync(path);
    writeFileSync(path, lines("b", 1, 40), { flag: "r+" });
    expect(statSync(path).size).toBe(size);
    await arrives(stub, "b", 40);
    expect(await shipper.stop()).toBe(0);
    await sender.once();
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 40), b: lines("b", 1, 40) });
  });

  test("a log that was empty is known by its first bytes as soon as they are seen", async () => {
    const { stub, sender } = await createHost({ pollSeconds: 60 });
    stub.script = () => new Response("away", { status: 503 });
    const shipper = startShipper(sender);
    const cursor = join(sender.stateDir, "cursor.json");
    await until("the empty log is followed", () => existsSync(cursor));
    sender.write(lines("a", 1, 5));
    await until("its head is on disk", () => readFileSync(cursor, "utf8").includes('"head"'));
    sender.rotate("access.log.2");
    rmSync(`${sender.live}.2`);
    sender.write(lines("b", 1, 9)); // longer
    sender.rotate();
    sender.write(lines("c", 1, 1));
    stub.script = undefined;
    await arrives(stub, "c", 1);
    await arrives(stub, "b", 9);
    await arrives(stub, "a", 5); // it is open since its head was read
    expect(await shipper.stop()).toBe(0);
    expect(stub.lost).toBe(0);
    const expected = { a: lines("a", 1, 5), b: lines("b", 1, 9), c: lines("c", 1, 1) };
    expectTags(Buffer.from(stub.text()), expected);
  });
});

describe("a preallocated file that is filled in place", () => {
  test.each(["running", "stopped"])("%s: each line once, no NUL, and its rotation", async (when) => {
    const { stub, sender } = await createHost();
    writeFileSync(sender.live, Buffer.alloc(100_000));
    const shipper = when === "running" ? startShipper(sender) : undefined;
    const fd = openSync(sender.live, "r+");
    let at = 0;
    for (let n = 1; n <= 200; n += 20) {
      at += writeSync(fd, lines("a", n, n + 19), at);
      if (shipper) await arrives(stub, "a", n + 19);
      else await sender.once();
    }
    closeSync(fd);
    renameSync(sender.live, `${sender.live}.1`);
    sender.reopen();
    sender.write(lines("b", 1, 10));
    await shipper?.stop();
    await sender.once();
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 200), b: lines("b", 1, 10) });
  });

  test.each(["running", "stopped"])(
    "%s: the room behind its last line is cut off, and not lost",
    async (when) => {
      const { stub, sender } = await createHost();
      const text = lines("a", 1, 100);
      writeFileSync(sender.live, Buffer.concat([Buffer.from(text), Buffer.alloc(100_000)]));
      let output = await sender.once();
      const shipper = when === "running" ? startShipper(sender) : undefined;
      truncateSync(sender.live, text.length);
      sender.write(lines("a", 101, 120));
      if (shipper) await arrives(stub, "a", 120);
      await shipper?.stop();
      output += (shipper?.output ?? "") + (await sender.once());
      expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 120) });
      expect(output).not.toContain("bytes lost");
    },
  );
});
