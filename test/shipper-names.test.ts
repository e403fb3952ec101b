/**
 * Whose file is it: of files beside each other, which are logs of their own and which are rotations, whatever path leads
 * to them. Each time with files that are there before the first start, that come while it is stopped, and that go on.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import {
  appendFileSync,
  chmodSync,
  chownSync,
  copyFileSync,
  linkSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { gzipSync } from "node:zlib";
import { possibleBases, Watch } from "../lib/tail/paths.ts";
import {
  createSender,
  expectTags,
  lines,
  type Sender,
  type StubReceiver,
  startStub,
  startWrapped,
} from "./pipeline.ts";
import { missing, notRoot, onCleanup, type Running, start, tempFolder, until } from "./support.ts";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

interface Host {
  stub: StubReceiver;
  sender: Sender;
  /** Appends lines of a tag to a file of the log folder. */
  put(name: string, tag: string, from?: number, to?: number): void;
  at(name: string): string;
  /** Expects of each tag the lines 1 to so many, once and in order, and nothing else. */
  expects(counts: Record<string, number>): void;
}

/** A host whose log folder is followed by these patterns, and a receiver of its own. */
async function createHost(patterns: string[], options: object = {}): Promise<Host> {
  const stub = startStub();
  const sender = await createSender(stub.url, (logs) => ({
    files: patterns.map((pattern) => join(logs, pattern)),
    ...options,
  }));
  unlinkSync(sender.live);
  const at = (name: string) => join(sender.logs, name);
  return {
    ...{ stub, sender, at },
    put(name, tag, from = 1, to = 10) {
      mkdirSync(dirname(at(name)), { recursive: true });
      appendFileSync(at(name), lines(tag, from, to));
    },
    expects(counts) {
      const expected = Object.entries(counts).map(([tag, count]) => [tag, lines(tag, 1, count)]);
      expectTags(Buffer.from(stub.text(), "latin1"), Object.fromEntries(expected));
    },
  };
}

function startShipper({ sender }: Host): Running {
  const shipper = sender.start();
  running.push(shipper);
  return shipper;
}

async function arrives({ stub }: Host, tag: string, n: number): Promise<void> {
  await until(`line ${n} of ${tag} is there`, () => stub.text().includes(`GET /${tag}/${n} `));
}

describe("names that differ by a number", () => {
  test.each([
    ["access.log", "access-8080.log"],
    ["site.log", "site-2.log"],
    ["api.log", "api_1.log"],
    ["x.log", "x.log.8443"],
    ["app.log", "app-12345678.log"],
  ])("%s and %s are two logs, named in full or by a glob", async (one, two) => {
    for (const patterns of [[one, two], [two, one], ["*"]]) {
      const host = await createHost(patterns);
      host.put(one, "one", 1, 10);
      host.put(two, "two", 1, 10);
      await host.sender.once();
      host.put(two, "two", 11, 20);
      host.put(one, "one", 11, 20);
      await host.sender.once();
      const shipper = startShipper(host);
      host.put(two, "two", 21, 30);
      host.put(one, "one", 21, 30);
      await arrives(host, "one", 30);
      await arrives(host, "two", 30);
      await shipper.stop();
      host.expects({ one: 30, two: 30 });
    }
  });

  test("a path named in full is never anybody's rotation", async () => {
    const host = await createHost(["a.log", "a.log.1", "a-20261122.log"]);
    for (const [name, tag] of [
      ["a.log", "a"],
      ["a.log.1", "b"],
      ["a-20261122.log", "c"],
    ] as const)
      host.put(name, tag);
    await host.sender.once();
    host.put("a.log.1", "b", 11, 20);
    await host.sender.once();
    host.expects({ a: 10, b: 20, c: 10 });
  });

  test("a rotation's number counts up to 30, and on from a neighbour that is or was there", async () => {
    const host = await createHost(["a.log"]);
    host.put("a.log", "a");
    await host.sender.once();
    host.put("a.log", "a", 11, 20);
    renameSync(host.at("a.log"), host.at("a.log.30"));
    host.put("a.log", "b", 1, 5);
    const shipper = startShipper(host);
    await arrives(host, "b", 5);
    renameSync(host.at("a.log.30"), host.at("a.log.31"));
    host.put("a.log.31", "a", 21, 25);
    await arrives(host, "a", 25);
    await shipper.stop();
    host.put("a.log.4711", "foreign");
    host.put("a.log.32", "late", 1, 3); // behind 31, which is there
    const output = await host.sender.once();
    expect(output).toMatch(/not followed.*a\.log\.4711/);
    host.expects({ a: 25, b: 5, late: 3 });
  });
});

test("possibleBases() knows logrotate's dateformat -%s", () => {
  for (const name of ["access.log-1763791200", "access.log-1763791200.gz", "access-1763791200.log"])
    expect(possibleBases(name)).toContainEqual({ base: "access.log" });
  expect(possibleBases("access.log-3763791200")).toEqual([]);
});

test("a folder that is made anew is watched again, and one that nobody names any more is not", async () => {
  const folder = join(await tempFolder(), "nginx");
  mkdirSync(folder);
  const heard = new Set<string>();
  const watch = new Watch((path) => heard.add(path));
  onCleanup(() => watch.close());
  for (const name of ["a.log", "b.log", "c.log"]) {
    watch.update(new Set([folder]));
    writeFileSync(join(folder, name), "x\n");
    await until(`${name} is heard of`, () => heard.has(join(folder, name)));
    rmSync(folder, { recursive: true });
    mkdirSync(folder);
  }
  watch.update(new Set());
  expect([...watch.faults]).toEqual([]);
});

describe("what lies beside a log", () => {
  test.each([
    "access.log.404",
    "access.log-10.0.0.1",
    "access.log.errors",
    "access.log~",
    "access.log.1.tar",
    "access.log-20261122.tar.gz",
    "access.log.1.tgz",
  ])("an extract named %s is not shipped, and told once with its bytes", async (name) => {
    const host = await createHost(["access.log"]);
    host.put("access.log", "a", 1, 40);
    await host.sender.once();
    const extract = lines("a", 3, 9) + lines("a", 20, 24);
    writeFileSync(host.at(name), extract);
    const shipper = startShipper(host);
    await shipper.says("not followed");
    host.put("access.log", "a", 41, 50);
    await arrives(host, "a", 50);
    writeFileSync(host.at(name), `${extract}${lines("a", 30, 31)}`);
    host.put("access.log", "a", 51, 60);
    await arrives(host, "a", 60);
    await shipper.stop();
    expect(shipper.output.split("not followed").length).toBe(2);
    expect(shipper.output).toContain(`bytes=${extract.length}`);
    await host.sender.once();
    host.expects({ a: 60 });
  });

  test.each([
    ["access.log.1.tar.gz", "tar czf access.log.1.tar.gz access.log"],
    ["access.log-20261122.tar", "tar cf access.log-20261122.tar access.log"],
    ["access.log.tgz", "tar czf access.log.tgz access.log"],
  ])("a pack of files named %s is no log, by its path and by a glob", async (name, command) => {
    for (const pattern of ["access.log", "access.log*"]) {
      const host = await createHost([pattern]);
      host.put("access.log", "a", 1, 40);
      await host.sender.once();
      execFileSync("sh", ["-c", command], { cwd: host.at(".") });
      host.put("access.log", "a", 41, 45);
      const output = await host.sender.once();
      expect(output).toContain("not followed");
      expect(output).toContain(name);
      host.expects({ a: 45 });
    }
  });

  test("a copy that is put back in the place of its log, again and again: each line once", async () => {
    const host = await createHost(["access.log"]);
    host.put("access.log", "a", 1, 40);
    const shipper = startShipper(host);
    await arrives(host, "a", 40);
    for (let last = 40; last < 70; last += 10) {
      copyFileSync(host.at("access.log"), host.at("access.log.1"));
      renameSync(host.at("access.log"), host.at("access.log.2"));
      copyFileSync(host.at("access.log.1"), host.at("access.log"));
      host.put("access.log", "a", last + 1, last + 5);
      await arrives(host, "a", last + 5);
      host.put("access.log", "a", last + 6, last + 10);
      await arrives(host, "a", last + 10);
    }
    await shipper.stop();
    await host.sender.once();
    host.expects({ a: 70 });
  });

  test.each(["access.old.log", "access-before.log", "zz.log", "access.rot0.log"])(
    "a log that is renamed to %s, which the glob matches, keeps its stream",
    async (name) => {
      for (const isRunning of [true, false]) {
        const host = await createHost(["*.log"]);
        host.put("access.log", "a", 1, 40);
        await host.sender.once();
        const shipper = isRunning ? startShipper(host) : undefined;
        host.put("access.log", "a", 41, 45);
        if (shipper) await arrives(host, "a", 45);
        renameSync(host.at("access.log"), host.at(name));
        host.put(name, "a", 46, 50);
        host.put("access.log", "b", 1, 45);
        if (shipper) await arrives(host, "b", 45);
        await shipper?.stop();
        await host.sender.once();
        host.put(name, "a", 51, 55);
        await host.sender.once();
        host.expects({ a: 55, b: 45 });
      }
    },
  );

  test.each([
    "access.log-20261122-47",
    "access.log-20261122-w47",
    "access.log-2026-11-22T06",
    "access-20261122.log",
    "access.log20261122",
    "access.log.1.bak",
    "access.log.bak.1",
  ])("rotated to %s before it is looked at, by a glob and by its path: every line once", async (name) => {
    for (const pattern of ["*", "access.log*", "access.log"]) {
      for (const how of ["rename", "copytruncate", "gzip"]) {
        const host = await createHost([pattern]);
        host.put("access.log", "a", 1, 30);
        await host.sender.once();
        host.put("access.log", "a", 31, 60);
        if (how === "rename") renameSync(host.at("access.log"), host.at(name));
        else if (how === "copytruncate") {
          copyFileSync(host.at("access.log"), host.at(name));
          truncateSync(host.at("access.log"), 0);
        } else {
          writeFileSync(`${host.at(name)}.gz`, gzipSync(readFileSync(host.at("access.log"))));
          unlinkSync(host.at("access.log"));
        }
        host.put("access.log", "b", 1, 20);
        await host.sender.once();
        host.put("access.log", "b", 21, 30);
        await host.sender.once();
        host.expects({ a: 60, b: 30 });
      }
    }
  });
});

describe("a rotation under a name that no rule knows", () => {
  const pack = (path: string) => execFileSync("gzip", [path]);
  test.each([
    ["a.log-Sun", "gzip", "a.log", 5],
    ["a.log-Sun", "gzip", "*.log", 40],
    ["a.log-Sun", "rename", "a.log", 5],
    ["a.log.2026-W47", "copytruncate", "a.log", 5],
    ["a.log-Nov22", "copytruncate, gzip", "*.log", 5],
    ["a-Nov22.log", "gzip", "a.log", 5],
    ["a-Nov22.log", "gzip", "*.log", 40],
    ["zz", "gzip", "a.log", 40],
  ])(
    "%s, %s, %s, %i lines, the last two while it was stopped: every line once",
    async (name, how, pattern, n) => {
      const host = await createHost([pattern]);
      host.put("a.log", "a", 1, n - 2);
      await host.sender.once();
      host.put("a.log", "a", n - 1, n);
      if (how.startsWith("copytruncate")) {
        copyFileSync(host.at("a.log"), host.at(name));
        truncateSync(host.at("a.log"), 0);
      } else renameSync(host.at("a.log"), host.at(name));
      if (how.endsWith("gzip")) pack(host.at(name));
      host.put("a.log", "b", 1, 10);
      await host.sender.once();
      host.put("a.log", "b", 11, 20);
      await host.sender.once();
      host.expects({ a: n, b: 20 });
    },
  );

  test.each([
    ["rename", "a.log", "a.log-Fri", "a.log-Sat", "a.log-Mon"],
    ["gzip", "a.log", "a-2026-W46.log", "a-2026-W47.log", "a-2026-W48.log"],
    ["copytruncate", "a.log", "a.log-week46", "a.log-week47", "a.log-week48"],
    ["gzip", "*.log", "a.log.14h", "a.log.15h", "a.log.16h"],
  ])(
    "%s, %s: %s was there before, %s and %s come while it is stopped, and are shipped",
    async (how, pattern, before, one, two) => {
      const host = await createHost([pattern]);
      host.put(before, "old", 1, 40);
      host.put("a.log", "a", 1, 30);
      await host.sender.once();
      host.put("a.log", "a", 31, 32);
      for (const name of [one, two]) {
        if (how === "copytruncate") {
          copyFileSync(host.at("a.log"), host.at(name));
          truncateSync(host.at("a.log"), 0);
        } else renameSync(host.at("a.log"), host.at(name));
        if (how === "gzip") pack(host.at(name));
        host.put("a.log", name, 1, 5);
      }
      await host.sender.once();
      writeFileSync(host.at("a.log.errors"), lines("foreign", 1, 20));
      host.put("a.log", "end", 1, 5);
      await host.sender.once();
      host.expects({ a: 32, [one]: 5, [two]: 5, end: 5 });
    },
  );

  test("an older file that begins like a log that went is not that log", async () => {
    const host = await createHost(["a.log"]);
    host.put("a.log.errors", "a", 1, 5);
    host.put("a.log", "a", 1, 1);
    await host.sender.once();
    unlinkSync(host.at("a.log"));
    host.put("a.log", "b", 1, 10);
    await host.sender.once();
    host.expects({ a: 1, b: 10 });
  });
});

describe("what came while it was stopped", () => {
  test("a new log that was rotated already, under a glob: both files are shipped", async () => {
    for (const startAt of ["beginning", "end"]) {
      const host = await createHost(["*.log"], { startAt });
      host.put("old.log", "old", 1, 30);
      await host.sender.once();
      host.put("new.log", "n1", 1, 40);
      renameSync(host.at("new.log"), host.at("new.log.1"));
      host.put("new.log", "n2", 1, 20);
      host.put("other.log", "other", 1, 20);
      host.put("old.log", "more", 1, 5);
      await host.sender.once();
      host.expects({ ...(startAt === "beginning" && { old: 30 }), n1: 40, n2: 20, other: 20, more: 5 });
    }
  });

  test("two logs of one name in two folders that share an olddir: every rotated line once", async () => {
    const host = await createHost(["one/access.log", "two/access.log"], { olddir: "../old" });
    mkdirSync(host.at("old"));
    host.put("one/access.log", "one", 1, 30);
    host.put("two/access.log", "two", 1, 30);
    await host.sender.once();
    for (const isRunning of [false, true]) {
      const shipper = isRunning ? startShipper(host) : undefined;
      const from = isRunning ? 41 : 31;
      host.put("one/access.log", "one", from, from + 9);
      host.put("two/access.log", "two", from, from + 9);
      if (shipper) await arrives(host, "two", from + 9);
      renameSync(host.at("one/access.log"), host.at(`old/access.log.${isRunning ? 2 : 4}`));
      renameSync(host.at("two/access.log"), host.at(`old/access.log.${isRunning ? 1 : 3}`));
      host.put("one/access.log", `one${from}`, 1, 20);
      host.put("two/access.log", `two${from}`, 1, 20);
      if (shipper) await arrives(host, `two${from}`, 20);
      await shipper?.stop();
      await host.sender.once();
      renameSync(host.at("one/access.log"), host.at("one/gone"));
      renameSync(host.at("two/access.log"), host.at("two/gone"));
      renameSync(host.at(`old/access.log.${isRunning ? 2 : 4}`), host.at("one/access.log"));
      renameSync(host.at(`old/access.log.${isRunning ? 1 : 3}`), host.at("two/access.log"));
      await host.sender.once();
    }
    host.expects({ one: 50, two: 50, one31: 20, two31: 20, one41: 20, two41: 20 });
  });
});

describe("paths", () => {
  test("named in full with signs of a glob in it", async () => {
    const host = await createHost(["site[1]/access.log", "a{b,c}.log", "what?.log"]);
    for (const [name, tag] of [
      ["site[1]/access.log", "a"],
      ["a{b,c}.log", "b"],
      ["what?.log", "c"],
    ] as const) {
      host.put(name, tag);
      host.put("whatx.log", "foreign", 1, 2);
    }
    await host.sender.once();
    renameSync(host.at("site[1]/access.log"), host.at("site[1]/access.log.1"));
    host.put("site[1]/access.log.1", "a", 11, 15);
    host.put("site[1]/access.log", "d");
    await host.sender.once();
    host.expects({ a: 15, b: 10, c: 10, d: 10 });
  });

  test("a name that is no UTF-8 is shipped, and shown with its bytes", async () => {
    const host = await createHost(["*.log", "s*/*.log"]);
    const raw = (name: string) =>
      Buffer.concat([Buffer.from(`${host.sender.logs}/`), Buffer.from(name, "latin1")]);
    appendFileSync(raw("caf\xe9.log"), lines("a", 1, 20));
    mkdirSync(raw("s\xfc"));
    appendFileSync(raw("s\xfc/b.log"), lines("b", 1, 20));
    const output = await host.sender.once();
    expect(output).toMatch(/caf\\+xe9\.log/);
    appendFileSync(raw("caf\xe9.log"), lines("a", 21, 30));
    renameSync(raw("caf\xe9.log"), raw("caf\xe9.log.1"));
    appendFileSync(raw("caf\xe9.log"), lines("c", 1, 20));
    appendFileSync(raw("s\xfc/b.log"), lines("b", 21, 30));
    await host.sender.once();
    host.expects({ a: 30, b: 30, c: 20 });
  });

  test("one file under several names that a glob matches, links and hard links, is shipped once", async () => {
    const host = await createHost(["*.log", "sub/*.log"]);
    host.put("access.log", "a", 1, 30);
    symlinkSync(host.at("access.log"), host.at("0link.log"));
    linkSync(host.at("access.log"), host.at("hard.log"));
    mkdirSync(host.at("sub"));
    symlinkSync("../access.log", host.at("sub/deep.log"));
    await host.sender.once();
    host.put("access.log", "a", 31, 40);
    await host.sender.once();
    renameSync(host.at("access.log"), host.at("access.log.1"));
    host.put("hard.log", "a", 41, 50);
    host.put("access.log", "b", 1, 30);
    await host.sender.once();
    host.put("0link.log", "b", 31, 40);
    await host.sender.once();
    host.expects({ a: 50, b: 40 });
  });

  test.skipIf(notRoot())(
    "a link under a glob to a file of another user is not followed, and told",
    async () => {
      const host = await createHost(["*.log"]);
      host.put("secret.txt", "secret");
      host.put("access.log", "a");
      symlinkSync(host.at("secret.txt"), host.at("link.log"));
      chownSync(host.at("secret.txt"), 4711, 4711);
      const shipper = startShipper(host);
      await shipper.says("a link to a file of another user");
      await arrives(host, "a", 10);
      await shipper.stop();
      host.expects({ a: 10 });
    },
  );

  test("the same file by another path after a restart goes on", async () => {
    const host = await createHost(["real/access.log"]);
    host.put("real/access.log", "a", 1, 30);
    await host.sender.once();
    symlinkSync(host.at("real"), host.at("alias"));
    const config = JSON.parse(readFileSync(host.sender.config, "utf8"));
    for (const files of [["alias/access.log"], ["alias/*.log"], ["alias/access.log", "real/access.log"]]) {
      config.shipper.files = files.map(host.at);
      writeFileSync(host.sender.config, JSON.stringify(config));
      const n = host.stub.text().split("\n").length - 1;
      host.put("real/access.log", "a", n + 1, n + 10);
      await host.sender.once();
      host.put("real/access.log", "a", n + 11, n + 20);
      await host.sender.once();
    }
    host.expects({ a: 90 });
  });

  test("a link whose target changes to another folder while it is stopped: the unread tail arrives", async () => {
    for (const next of ["second/access.log", "second/today.log"]) {
      const host = await createHost(["current.log"]);
      host.put("first/access.log", "a", 1, 30);
      symlinkSync(host.at("first/access.log"), host.at("current.log"));
      await host.sender.once();
      host.put("first/access.log", "a", 31, 60);
      unlinkSync(host.at("current.log"));
      host.put(next, "b", 1, 20);
      symlinkSync(host.at(next), host.at("current.log"));
      await host.sender.once();
      host.put(next, "b", 21, 30);
      await host.sender.once();
      host.expects({ a: 60, b: 30 });
    }
  });

  test.skipIf(notRoot() || missing({ setpriv: "util-linux" }))(
    "one of several folders of a glob that may not be read is told, the others are shipped",
    async () => {
      const host = await createHost(["*/access.log"]);
      for (const name of ["a", "b", "c"]) host.put(`${name}/access.log`, name);
      chmodSync(host.at("b"), 0);
      const shipper = startWrapped("setpriv", ["--bounding-set=-dac_override,-dac_read_search"], host.sender);
      running.push(shipper);
      await arrives(host, "a", 10);
      await arrives(host, "c", 10);
      await shipper.says(host.at("b"));
      chmodSync(host.at("b"), 0o755);
      await arrives(host, "b", 10);
      await shipper.stop();
      host.expects({ a: 10, b: 10, c: 10 });
    },
  );

  test("moved to a folder that nobody named, its writer goes on after a pause: running, every line", async () => {
    const host = await createHost(["access.log"]);
    host.put("access.log", "a", 1, 10);
    const shipper = startShipper(host);
    await arrives(host, "a", 10);
    mkdirSync(host.at("away"));
    renameSync(host.at("access.log"), host.at("away/kept"));
    await Bun.sleep(1500); // the pause: longer than rotateWaitSeconds
    host.put("away/kept", "a", 11, 27);
    host.put("access.log", "b", 1, 5);
    await arrives(host, "b", 5);
    await arrives(host, "a", 27);
    await shipper.stop();
    await host.sender.once();
    rmSync(host.at("away"), { recursive: true });
    host.expects({ a: 27, b: 5 });
  });
});

describe("files that change places", () => {
  test.each(["running", "stopped"])(
    "%s: two logs are exchanged, and go on under each other's names",
    async (when) => {
      for (const patterns of [["a.log", "b.log"], ["*.log"]]) {
        const host = await createHost(patterns);
        host.put("a.log", "a", 1, 30);
        host.put("b.log", "b", 1, 40);
        await host.sender.once();
        const shipper = when === "running" ? startShipper(host) : undefined;
        host.put("a.log", "a", 31, 35);
        if (shipper) await arrives(host, "a", 35);
        renameSync(host.at("a.log"), host.at("c"));
        renameSync(host.at("b.log"), host.at("a.log"));
        renameSync(host.at("c"), host.at("b.log"));
        host.put("a.log", "b", 41, 50);
        host.put("b.log", "a", 36, 45);
        if (shipper) await arrives(host, "b", 50);
        if (shipper) await arrives(host, "a", 45);
        await shipper?.stop();
        await host.sender.once();
        host.expects({ a: 45, b: 50 });
      }
    },
  );

  test.each(["running", "stopped"])(
    "%s: a ring of files that are cut and filled in turn: every line once",
    async (when) => {
      const host = await createHost(["ring*.log"]);
      const shipper = when === "running" ? startShipper(host) : undefined;
      const counts: Record<string, number> = {};
      for (let n = 0; n < 9; n++) {
        const name = `ring-${"abc"[n % 3]}.log`;
        const count = 20 + (n % 4); // shorter than what was there, and longer
        writeFileSync(host.at(name), "");
        host.put(name, `t${n}`, 1, count);
        counts[`t${n}`] = count;
        if (shipper) await arrives(host, `t${n}`, count);
        else await host.sender.once();
      }
      await shipper?.stop();
      host.expects(counts);
    },
  );

  test.each(["running", "stopped"])(
    "%s: a log that is copied over another is that one, until it goes on by itself",
    async (when) => {
      const host = await createHost(["*.log"]);
      host.put("a.log", "a", 1, 30);
      host.put("b.log", "b", 1, 20);
      await host.sender.once();
      const shipper = when === "running" ? startShipper(host) : undefined;
      host.put("b.log", "b", 21, 22);
      if (shipper) await arrives(host, "b", 22);
      else await host.sender.once();
      shipper?.process.kill("SIGSTOP"); // what it would see in the middle of the copying is another case
      copyFileSync(host.at("a.log"), host.at("b.log"));
      host.put("b.log", "c", 1, 10);
      shipper?.process.kill("SIGCONT");
      host.put("a.log", "a", 31, 40);
      if (shipper) await arrives(host, "c", 10);
      if (shipper) await arrives(host, "a", 40);
      await shipper?.stop();
      await host.sender.once();
      host.expects({ a: 40, b: 22, c: 10 });
    },
  );

  test("the archive of a copy is that file, generations that begin alike are not", async () => {
    const host = await createHost(["a.log"]);
    const same = lines("same", 1, 30);
    await host.sender.once();
    for (let n = 1; n <= 3; n++) {
      appendFileSync(host.at("a.log"), same);
      host.put("a.log", `g${n}`, 1, 2);
      await host.sender.once();
      copyFileSync(host.at("a.log"), host.at("a.log.9"));
      writeFileSync(host.at("a.log.9.gz"), gzipSync(readFileSync(host.at("a.log.9"))));
      unlinkSync(host.at("a.log.9"));
      await host.sender.once();
      for (let k = n - 1; k >= 1; k--) renameSync(host.at(`a.log.${k}`), host.at(`a.log.${k + 1}`));
      renameSync(host.at("a.log"), host.at("a.log.1"));
      writeFileSync(host.at("a.log"), "");
    }
    await host.sender.once();
    expect(host.stub.text()).toBe([1, 2, 3].map((n) => same + lines(`g${n}`, 1, 2)).join(""));
  });
});

test("a log that is the shipper's own output does not feed itself", async () => {
  const host = await createHost(["own.log"]);
  const config = host.sender.config;
  const command = `exec "$0" run shipper.ts --config "${config}" --once >>"${host.at("own.log")}" 2>&1`;
  for (let n = 1; n <= 2; n++) {
    const once = start("sh", ["-c", command, process.execPath]);
    running.push(once);
    expect(await once.ended).toBe(0);
  }
  const text = readFileSync(host.at("own.log"), "utf8");
  expect(text.split("\n").length).toBeLessThan(20);
  expect(text.startsWith(host.stub.text())).toBe(true);
});

test("a glob that matches the shipper's own state ships nothing of it, and a pattern of nothing else is told", async () => {
  const stub = startStub();
  const state = (logs: string) => join(dirname(logs), "state", "*");
  const sender = await createSender(stub.url, (logs) => ({ files: [join(logs, "*.log"), state(logs)] }));
  sender.write(lines("a", 1, 10));
  const shipper = sender.start();
  running.push(shipper);
  await shipper.says(`no file matches yet files=${state(sender.logs)}`);
  sender.write(lines("a", 11, 20));
  await until("the last line is there", () => stub.text().includes("GET /a/20 "));
  expect(await shipper.stop()).toBe(0);
  await sender.once();
  expect(stub.text()).toBe(lines("a", 1, 20));
});

test("archives by another ending are read, or told of by what they begin with, and never shipped as lines", async () => {
  const host = await createHost(["a.log"]);
  host.put("a.log", "a", 1, 10);
  const shipper = startShipper(host);
  await arrives(host, "a", 10);
  expect(await shipper.stop()).toBe(0);
  host.put("a.log", "a", 11, 20);
  renameSync(host.at("a.log"), host.at("a.log.2"));
  execFileSync("gzip", ["-S", ".gzip", host.at("a.log.2")]);
  host.put("a.log", "b", 1, 10);
  const unread = readFileSync(host.at("a.log"));
  renameSync(host.at("a.log"), host.at("a.log.1"));
  writeFileSync(host.at("a.log.1.pack"), gzipSync(unread));
  unlinkSync(host.at("a.log.1"));
  host.put("a.log", "c", 1, 10);
  const once = host.sender.start(["--once"]);
  running.push(once);
  expect(await once.ended).toBe(1);
  const { output } = once;
  host.expects({ a: 20, c: 10 });
  expect(output).toContain("cannot read rotated file: use gzip or zstd in logrotate");
  expect(output).toContain("a.log.1.pack");
});

test("with a lost cursor, a log that was copied over another one named in full comes once", async () => {
  const host = await createHost(["a.log", "b.log"]);
  host.put("a.log", "a", 1, 40);
  host.put("b.log", "b", 1, 30);
  await host.sender.once();
  copyFileSync(host.at("a.log"), host.at("b.log"));
  host.put("a.log", "a", 41, 50);
  host.put("b.log", "c", 1, 10);
  rmSync(host.sender.stateDir, { recursive: true });
  await host.sender.once();
  host.expects({ a: 50, b: 30, c: 10 });
});

/** Logs of one inode and time of birth, on two file systems. */
async function createTwins(): Promise<[string, string]> {
  const disks: string[] = [];
  for (let n = 0; n < 2; n++) {
    const disk = await tempFolder();
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]);
    onCleanup(() => start("umount", ["-l", disk]).ended);
    disks.push(disk);
  }
  for (let n = 0; n < 1000; n++) {
    const twins = disks.map((disk) => join(disk, `${n}.log`));
    for (const twin of twins) writeFileSync(twin, "");
    const [one, other] = twins.map((twin) => statSync(twin, { bigint: true }));
    const isSame = one?.ino === other?.ino && one?.birthtimeMs === other?.birthtimeMs;
    if (isSame) return twins as [string, string];
  }
  throw new Error("no two files of one inode and millisecond");
}

test.skipIf(notRoot())(
  "two file systems have a file of the same inode and time of birth: two logs",
  async () => {
    const [one, other] = await createTwins();
    const host = await createHost(["access.log"], { files: [one, other] });
    const { sender } = host;
    appendFileSync(one, lines("a", 1, 10));
    appendFileSync(other, lines("b", 1, 10));
    await sender.once();
    appendFileSync(other, lines("b", 11, 40));
    await sender.once();
    appendFileSync(one, lines("a", 11, 40));
    renameSync(one, `${one}.1`);
    appendFileSync(one, lines("c", 1, 40));
    await sender.once();
    host.expects({ a: 40, b: 40, c: 40 });
    unlinkSync(`${one}.1`);
    appendFileSync(other, lines("b", 41, 80));
    await sender.once();
    host.expects({ a: 40, b: 80, c: 40 });
  },
);

test("a new log that begins like one that was moved out of sight does not wait for it", async () => {
  const receiver = startStub();
  const sender = await createSender(receiver.url, { pollSeconds: 0.1, rotateWaitSeconds: 0.2 });
  sender.write("# one header\n");
  const shipper = sender.start();
  await until("the header is there", () => receiver.text() === "# one header\n");
  const log = join(sender.logs, "access.log");
  const elsewhere = await tempFolder();
  renameSync(log, join(elsewhere, "access.log"));
  writeFileSync(log, "# one header\nand a line of its own\n");
  await until("it arrives", () => receiver.text().includes("and a line of its own"), 15_000);
  expect(await shipper.stop()).toBe(0);
});
