/** What operators and disks do to a receiver's folder: each is left alone, refused or told, and it goes on by itself. */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { cp, mkdir, readdir, readFile, rm, stat, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { zstdCompressSync } from "node:zlib";
import { linesOfWindows, post, sendAll, storedWindows } from "./sending.ts";
import {
  accessLine,
  expectSameLines,
  findProgram,
  freePort,
  missing,
  notRoot,
  onCleanup,
  ROOT,
  runScriptOnce,
  start,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(60_000);

async function setUp(options: object = {}, { dir = "" } = {}) {
  const folder = await tempFolder();
  dir ||= join(folder, "data");
  const port = await freePort();
  const receiver = { dir, groups: [{ port, senders: ["*"] }], sealAfterSeconds: 3600, ...options };
  const config = await writeConfig(folder, { receiver });
  const url = `http://127.0.0.1:${port}`;
  const run = async () => {
    const running = startScript("receiver", config);
    await running.says("receiver listens");
    return running;
  };
  const health = async () => {
    const answer = await fetch(`${url}/healthz`);
    return { status: answer.status, text: await answer.text() };
  };
  return { folder, dir, port, url, config, run, health };
}

async function storedText(dir: string, host = "10.0.0.1"): Promise<string> {
  const windows = [...(await storedWindows(dir, host))].sort(([a], [b]) => (a < b ? -1 : 1));
  return windows.map(([, lines]) => lines).join("");
}

const TEXT = Buffer.from(linesOfWindows(600));

describe("folders that are no host's", () => {
  test("lost+found, and a copy made by hand, are left alone and told once", async () => {
    const { dir, url, run } = await setUp();
    const first = await run();
    await sendAll(url, "10.0.0.1", TEXT);
    expect(await first.stop()).toBe(0);
    await mkdir(join(dir, "lost+found"), { mode: 0o700 });
    await cp(join(dir, "10.0.0.1"), join(dir, "10.0.0.1.bak"), { recursive: true });
    const before = (await readdir(join(dir, "10.0.0.1.bak"))).sort();
    const second = await run();
    expect(second.output.split("folder left alone").length).toBe(2);
    await sendAll(url, "10.0.0.1", TEXT);
    expect(await second.stop()).toBe(0);
    expect((await readdir(join(dir, "10.0.0.1.bak"))).sort()).toEqual(before);
    expect(await readdir(join(dir, "lost+found"))).toEqual([]);
    expectSameLines(await storedText(dir), TEXT);
  });

  test("a host's folder that is a link is refused, also before anything was stored", async () => {
    const { folder, dir, url, run } = await setUp();
    const elsewhere = join(folder, "elsewhere");
    await mkdir(dir, { recursive: true });
    await mkdir(elsewhere);
    await symlink(elsewhere, join(dir, "10.0.0.1"));
    const receiver = await run();
    expect((await fetch(post(url, accessLine(1)))).status).toBe(503);
    await receiver.says("is a link");
    expect(await readdir(elsewhere)).toEqual([]);
    expect((await fetch(post(url, accessLine(1), { host: "10.0.0.2" }))).status).toBe(200);
    expect(await receiver.stop()).toBe(0);
  });
});

describe("removed by hand while it runs", () => {
  test.each(["folder", "part"])(
    "the %s: told in bytes, nothing is answered for lines that go nowhere, and it goes on",
    async (what) => {
      const { dir, url, run } = await setUp();
      const receiver = await run();
      const half = TEXT.lastIndexOf(10, TEXT.length / 4) + 1; // of the first window
      await sendAll(url, "10.0.0.1", TEXT.subarray(0, half) as Buffer<ArrayBuffer>);
      await new Promise((resolve) => setTimeout(resolve, 3500)); // a checkpoint: the journal no longer matters
      const folder = join(dir, "10.0.0.1");
      const part = (await readdir(folder)).find((name) => name.endsWith(".part")) ?? "";
      await rm(what === "folder" ? folder : join(folder, part), { recursive: true });
      const rest = TEXT.indexOf(10, half + 4000) + 1;
      let offset = half;
      await until("it goes on", async () => {
        const answer = await fetch(
          post(url, TEXT.subarray(offset, rest) as Buffer<ArrayBuffer>, {
            stream: "stream-10-0-0-1",
            offset,
          }),
        );
        if (answer.status === 200) offset = rest;
        return answer.status === 200;
      });
      await receiver.says("acknowledged bytes are gone from the disk");
      expect(receiver.output).toContain(`bytes=${half}`);
      await until("what was answered is there", async () =>
        (await storedText(dir).catch(() => "")).includes(TEXT.subarray(half, rest).toString()),
      );
      const kept = await storedText(dir);
      expect(kept).not.toContain("\0");
      expect(await receiver.stop()).toBe(0);
      expect(await (await run()).stop()).toBe(0);
      expect(await storedText(dir)).toBe(kept);
    },
  );
});

describe("a damaged or older ledger", () => {
  test("cuts off nothing that was acknowledged, and is told", async () => {
    const { dir, url, run } = await setUp();
    const first = await run();
    await sendAll(url, "10.0.0.1", TEXT);
    expect(await first.stop()).toBe(0);
    const path = join(dir, "10.0.0.1", ".ledger");
    const bytes = await readFile(path);
    bytes[bytes.length >> 1] = (bytes[bytes.length >> 1] ?? 0) ^ 1;
    await writeFile(path, bytes);
    const second = await run();
    expect(second.output).toContain("ledger is damaged");
    expectSameLines(await storedText(dir), TEXT);
    expect(await second.stop()).toBe(0);
  });
});

test.skipIf(missing({ bash: "bash" }))(
  "256 descriptors are enough for 600 senders with windows of their own, and a restart",
  async () => {
    const { dir, config, url } = await setUp();
    const command = `ulimit -n 256; exec "${process.execPath}" run "${join(ROOT, "receiver.ts")}" --config "${config}"`;
    const run = async () => {
      const receiver = start("bash", ["-c", command]);
      await receiver.says("receiver listens");
      return receiver;
    };
    const receiver = await run();
    const hosts = Array.from({ length: 600 }, (_, i) => `10.1.${i >> 8}.${i & 255}`);
    const body = Buffer.from(linesOfWindows(9));
    const todo = [...hosts];
    const work = async () => {
      for (let host = todo.pop(); host; host = todo.pop())
        await sendAll(url, host, body, { chunkBytes: 100_000 });
    };
    await Promise.all(Array.from({ length: 12 }, work));
    const held = (await readdir(`/proc/${receiver.process.pid}/fd`)).length;
    process.stderr.write(`descriptors with 600 senders: ${held}\n`);
    expect(held).toBeLessThan(160);
    expect(receiver.output).not.toContain("descriptors are scarce");
    await receiver.stop("SIGKILL");
    const again = await run();
    expect(again.output).not.toContain("EMFILE");
    for (const host of hosts.slice(0, 40)) expectSameLines(await storedText(dir, host), body);
    expect((await fetch(post(url, accessLine(7), { host: "10.9.9.9" }))).status).toBe(200);
    expect(await again.stop()).toBe(0);
  },
);

test("a host that moves to another process is refused there until the first one lets it go", async () => {
  const [one, two] = [await freePort(), await freePort()];
  const { dir } = await setUp();
  const run = async (port: number) => {
    const groups = [{ port, senders: ["*"] }]; // each for itself: the config was changed between the two
    const config = await writeConfig(await tempFolder(), {
      receiver: { dir, groups, sealAfterSeconds: 3600 },
    });
    const receiver = startScript("receiver", config);
    await receiver.says("receiver listens");
    return receiver;
  };
  const [first, second] = [await run(one), await run(two)];
  await sendAll(`http://127.0.0.1:${one}`, "10.0.0.1", TEXT);
  expect((await fetch(post(`http://127.0.0.1:${two}`, accessLine(1)))).status).toBe(503);
  await second.says(`10.0.0.1 is in use by process ${first.process.pid}`);
  await first.stop("SIGKILL");
  await until(
    "the second one has it",
    async () => (await fetch(post(`http://127.0.0.1:${two}`, accessLine(1)))).status === 200,
  );
  expect((await storedText(dir)).length).toBe(TEXT.length + accessLine(1).length);
  expect(await second.stop()).toBe(0);
});

test.skipIf(missing({ strace: "strace" }))(
  "a file system without locks is named, with what to do",
  async () => {
    const { config } = await setUp();
    const strace = findProgram("strace") ?? "";
    const script = [process.execPath, "run", join(ROOT, "receiver.ts"), "--config", config];
    const running = start(strace, ["-f", "-o", "/dev/null", "-e", "inject=flock:error=ENOLCK", ...script]);
    expect(await running.ended).toBe(1);
    expect(running.output).toContain("has no locks (ENOLCK): put it on a local one");
  },
);

describe.skipIf(notRoot() || missing({ mount: "mount" }))("a disk", () => {
  async function mountDisk(options: string, type = "tmpfs"): Promise<string> {
    const disk = await tempFolder();
    const mounted = start("mount", ["-t", type, "-o", options, type, disk]);
    if ((await mounted.ended) !== 0) throw new Error(`cannot mount a ${type}: ${mounted.output}`);
    onCleanup(() => start("umount", ["-l", disk]).ended);
    return disk;
  }

  test("without inodes: 507 or 503, /healthz names it, and it goes on when there are some", async () => {
    const disk = await mountDisk("size=20m,nr_inodes=60");
    const { url, dir, run, health } = await setUp({}, { dir: join(disk, "data") });
    const receiver = await run();
    await sendAll(url, "10.0.0.1", TEXT);
    await mkdir(join(disk, "ballast"));
    for (let i = 0; i < 60; i++) await writeFile(join(disk, "ballast", `${i}`), "").catch(() => {});
    expect((await fetch(post(url, accessLine(1), { host: "10.0.0.2" }))).status).toBeOneOf([503, 507]);
    expect(await health()).toMatchObject({ status: 503, text: expect.stringContaining("inodes") });
    await rm(join(disk, "ballast"), { recursive: true });
    await until(
      "it goes on",
      async () => (await fetch(post(url, accessLine(1), { host: "10.0.0.2" }))).status === 200,
    );
    await until("it is well", async () => (await health()).status === 200);
    expectSameLines(await storedText(dir), TEXT);
    expect(await receiver.stop()).toBe(0);
  });

  test("that tells neither its blocks nor its inodes, as ramfs, is not taken for a full one", async () => {
    const disk = await mountDisk("mode=0750", "ramfs");
    const { url, dir, run, health } = await setUp({}, { dir: join(disk, "data") });
    const receiver = await run();
    await sendAll(url, "10.0.0.1", TEXT);
    expect(await health()).toMatchObject({ status: 200 });
    for (const path of ["/", "/metrics"]) {
      const text = await (await fetch(url + path)).text();
      expect(text).not.toMatch(/NaN|Infinity|disk is full/);
    }
    expectSameLines(await storedText(dir), TEXT);
    expect(await receiver.stop()).toBe(0);
  });

  test("that becomes read-only: nothing is answered with 200, /healthz is 503, and it goes on", async () => {
    const disk = await mountDisk("size=20m");
    const { url, dir, run, health } = await setUp({}, { dir: join(disk, "data") });
    const receiver = await run();
    const half = TEXT.lastIndexOf(10, TEXT.length / 2) + 1;
    await sendAll(url, "10.0.0.1", TEXT.subarray(0, half) as Buffer<ArrayBuffer>);
    await receiver.stop("SIGKILL"); // open files keep a mount writable
    const again = await run();
    expect(await start("mount", ["-o", "remount,ro", disk]).ended).toBeOneOf([0, 32]);
    const isReadOnly = await writeFile(join(disk, "probe"), "").then(
      () => false,
      () => true,
    );
    if (isReadOnly) {
      expect((await fetch(post(url, accessLine(1), { host: "10.0.0.3" }))).status).toBe(503);
      expect((await health()).status).toBe(503);
      await start("mount", ["-o", "remount,rw", disk]).ended;
    }
    await sendAll(url, "10.0.0.1", TEXT);
    await until("it is well", async () => (await health()).status === 200);
    expectSameLines(await storedText(dir), TEXT);
    expect(await again.stop()).toBe(0);
  });

  test("that is full of what waits for the client is emptied by delivering it", async () => {
    const disk = await mountDisk("size=8m");
    const { folder, dir, url, run, health } = await setUp(
      { sealAfterSeconds: 0.2 },
      { dir: join(disk, "data") },
    );
    const receiver = await run();
    const lines = Buffer.from(accessLine(7).repeat(4000));
    const body = zstdCompressSync(lines, { pledgedSrcSize: lines.length });
    let taken = 0;
    const upload = async () => {
      const options = { offset: taken, end: taken + lines.length, headers: { "Content-Encoding": "zstd" } };
      const { status } = await fetch(post(url, new Uint8Array(body), options));
      if (status === 200) taken += lines.length;
      return status;
    };
    let status = 200;
    while (status === 200 && taken < 16_000_000) status = await upload();
    expect(status).toBe(507);
    expect((await health()).status).toBe(503);
    const names = async () => await readdir(join(dir, "10.0.0.1"));
    await until("all is sealed", async () => (await names()).every((name) => !name.endsWith(".part")));
    const client = join(folder, "client");
    await mkdir(client);
    const forwarder = { dir, target: `file://${client}`, report: join(disk, "report.log"), digest: true };
    const own = await mkdir(join(folder, "own")).then(() => writeConfig(join(folder, "own"), { forwarder }));
    expect(await runScriptOnce("forwarder", own, ["--once"])).toMatchObject({ code: 0 });
    const batches = (await readdir(client)).filter((name) => name.endsWith(".log"));
    const delivered = await Promise.all(batches.map(async (name) => (await stat(join(client, name))).size));
    expect(delivered.reduce((sum, size) => sum + size, 0)).toBe(taken);
    await rm(join(dir, "sent"), { recursive: true });
    await until("it goes on", async () => (await upload()) === 200);
    expect((await health()).status).toBe(200);
    expect(await receiver.stop()).toBe(0);
  });
});
