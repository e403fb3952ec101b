import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdir, readdir, readFile, rename, rm, stat, utimes, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { gunzipSync } from "node:zlib";
import { readForwarderState } from "../lib/signs.ts";
import { Intents } from "../lib/target/intents.ts";
import { BACKENDS, type Backend, makeSite, remoteFiles, type Site, takeAway } from "./backends.ts";
import { accessLine, runScriptOnce, startScript, tempFolder, until } from "./support.ts";

setDefaultTimeout(120_000);

const HOST = "10.10.21.181";
const once = (site: Site, env = {}) => runScriptOnce("forwarder", site.configFile, ["--once"], env);
const lines = (count: number, from = 0) =>
  Array.from({ length: count }, (_, i) => accessLine(from + i)).join("");

describe.each(BACKENDS.filter(({ skip }) => !skip))("to $name", ({ start }) => {
  let backend: Backend;
  beforeAll(async () => {
    backend = await start();
  });

  test("every sealed batch of every host arrives whole, with one report line, and is in sent/", async () => {
    const site = await makeSite(backend);
    const content: Record<string, string> = {};
    for (const [i, host] of [HOST, "10.10.22.1", "web-1.example"].entries()) {
      for (let hour = 0; hour < 4; hour++) {
        const text = hour === 3 ? "" : lines(100 * (i + 1), hour);
        content[site.seal(host, hour, text)] = text;
      }
    }
    await writeFile(join(site.dir, HOST, "accessLog_26110109_00-19_10-10-21-181.log.part"), "open");
    const names = Object.keys(content).sort();
    const before = Date.now();
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(await remoteFiles(backend)).toEqual(content);
    expect(await site.list("sent")).toEqual(names);
    expect(await site.list(HOST)).toEqual(["accessLog_26110109_00-19_10-10-21-181.log.part"]);
    const expected = names.map(
      (name) => `${name} | lines=${content[name]?.split("\n").length} | status=Sent`,
    );
    const counted = expected.map((line) => line.replace(/lines=(\d+)/, (_, n) => `lines=${n - 1}`));
    expect((await site.report()).sort()).toEqual(counted);
    // retention counts from the delivery
    const { mtimeMs } = await stat(join(site.dir, "sent", names[0] ?? ""));
    expect(mtimeMs).toBeGreaterThanOrEqual(before - 1000);
    const again = await once(site);
    expect(again).toEqual({ code: 0, output: "" }); // silence when there is nothing to do
    await takeAway(backend);
  });

  const STEPS = [
    "forward:uploaded",
    "forward:intent",
    "forward:renamed",
    "forward:reported",
    "forward:moved",
  ];
  test.each(STEPS)("killed at %s: one file, one report line, nothing left over", async (step) => {
    const site = await makeSite(backend);
    const text = lines(50);
    const name = site.seal(HOST, 1, text);
    const other = site.seal("10.0.0.1", 1, text);
    expect((await once(site, { LOG_RT_SYNC_STOP_AT: step })).code).toBe("SIGKILL");
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: text, [other]: text });
    expect((await site.report()).sort()).toEqual(
      [name, other].map((batch) => `${batch} | lines=50 | status=Sent`).sort(),
    );
    expect(await site.list("sent")).toEqual([name, other].sort());
    await takeAway(backend);
  });

  test("killed behind the rename and the client has taken the file: sent again, for nothing proves it", async () => {
    const site = await makeSite(backend);
    const name = site.seal(HOST, 1, lines(50));
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
    await takeAway(backend);
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(output).toContain("it is uploaded again");
    expect(await remoteFiles(backend)).toEqual({ [name]: lines(50) });
    expect(await site.report()).toEqual([`${name} | lines=50 | status=Sent`]);
    expect(await site.list("sent")).toEqual([name]);
    await takeAway(backend);
  });

  test("killed behind the report line and the client has taken the file: that line stands behind an answer", async () => {
    const site = await makeSite(backend);
    const name = site.seal(HOST, 1, lines(50));
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:reported" });
    await takeAway(backend);
    expect((await once(site)).code).toBe(0);
    expect(await remoteFiles(backend)).toEqual({});
    expect(await site.report()).toEqual([`${name} | lines=50 | status=Sent`]);
    expect(await site.list("sent")).toEqual([name]);
  });

  test("killed twice behind the report line, in two seconds: it is one line all the same", async () => {
    const site = await makeSite(backend);
    const name = site.seal(HOST, 1, lines(50));
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:reported" });
    const second = Math.floor(Date.now() / 1000);
    await until("the next second", () => Date.now() / 1000 >= second + 1);
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:reported" });
    expect((await once(site)).code).toBe(0);
    expect(await site.report()).toEqual([`${name} | lines=50 | status=Sent`]);
    expect(await site.list("sent")).toEqual([name]);
    await takeAway(backend);
  });

  test.each(["half", "\0"])(
    "a temp file that a kill left (%j, then NULs of its size) is written anew",
    async (left) => {
      const site = await makeSite(backend);
      const text = lines(50);
      const name = site.seal(HOST, 1, text);
      await once(site, { LOG_RT_SYNC_STOP_AT: "forward:intent" });
      await rm(join(backend.folder, `${name}.tmp`));
      const content = left === "half" ? left : left.repeat(text.length); // of its size: what a power cut may leave
      await writeFile(join(backend.folder, `${name}.tmp`), content);
      if (backend.settings.target.startsWith("sftp:")) {
        Bun.spawnSync(["chown", "--reference", backend.folder, join(backend.folder, `${name}.tmp`)]);
      }
      expect((await once(site)).code).toBe(0);
      expect(await remoteFiles(backend)).toEqual({ [name]: text });
      await takeAway(backend);
    },
  );

  test("a name that is there with other content is never overwritten; the batch goes to failed/", async () => {
    const site = await makeSite(backend, { retries: 2 });
    const text = lines(10);
    const name = site.seal(HOST, 1, text);
    const good = site.seal(HOST, 2, text);
    await writeFile(join(backend.folder, name), text.replace("GET", "PUT"));
    const { code } = await once(site);
    expect(code).toBe(1);
    expect(await remoteFiles(backend)).toEqual({ [name]: text.replace("GET", "PUT"), [good]: text });
    expect(await site.list("failed")).toEqual([name]);
    const failures = await site.failures();
    expect(failures).toHaveLength(1); // no try will change that
    expect(failures[0]).toStartWith(
      `${name} | lines=10 | status=Failed | reason="${name}" is on the target already, with other content: ${text.length} bytes of 20`,
    );
    expect(failures[0]).toMatch(
      / there, \d+ bytes of 20.* here\..* mv it from failed\/ to its sender's folder$/,
    );
    expect(await site.report()).toEqual([`${good} | lines=10 | status=Sent`]);

    // Tried again from failed/: by one that stays when its time has come, by --once each time.
    const state = await readForwarderState(site.dir);
    expect(state?.failed[name]).toMatchObject({ attempts: 1 });
    const next = site.seal(HOST, 3, text);
    const staying = startScript("forwarder", site.configFile);
    await until("the next batch is sent", async () => (await site.list("sent")).includes(next));
    expect(await staying.stop()).toBe(0);
    expect(await site.failures()).toHaveLength(1); // not yet its time
    expect((await once(site)).code).toBe(1);
    expect(await site.failures()).toHaveLength(2);
    await rm(join(backend.folder, name));
    expect((await once(site)).code).toBe(0);
    expect((await remoteFiles(backend))[name]).toBe(text);
    expect(await site.list("failed")).toEqual([]);
    await takeAway(backend);
  });

  test("a batch that was moved back by hand and is there already is a delivery, not a second file", async () => {
    const site = await makeSite(backend);
    const text = lines(10);
    const name = site.seal(HOST, 1, text);
    expect((await once(site)).code).toBe(0);
    await rename(join(site.dir, "sent", name), join(site.dir, HOST, name));
    expect((await once(site)).code).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: text });
    expect(await site.list("sent")).toEqual([name]);
    await takeAway(backend);
  });

  test("a batch that was moved back by hand after the client took the file is sent again", async () => {
    const site = await makeSite(backend);
    const text = lines(10);
    const name = site.seal(HOST, 1, text);
    expect((await once(site)).code).toBe(0);
    await rm(join(backend.folder, name));
    await rename(join(site.dir, "sent", name), join(site.dir, HOST, name));
    expect((await once(site)).code).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: text });
    await takeAway(backend);
  });

  test("a name that is in the queue, in failed/ and in sent/ is sent once and holds up no other", async () => {
    const site = await makeSite(backend, { retries: 1 });
    const name = site.seal(HOST, 1, lines(10));
    await mkdir(join(site.dir, "failed"));
    await writeFile(join(site.dir, "failed", name), lines(10, 50));
    expect((await once(site)).code).toBe(1); // the one in failed/ is left
    const next = site.seal(HOST, 2, lines(5));
    for (let pass = 0; pass < 2; pass++) {
      const { code, output } = await once(site);
      expect(code).toBe(1);
      expect(output).toContain("says that it was delivered already");
      expect(await remoteFiles(backend)).toEqual({ [name]: lines(10), [next]: lines(5) });
      expect(await site.list("failed")).toEqual([name]);
    }
    await takeAway(backend);
  });

  test("what the target refuses for its name alone goes to failed/, the others are delivered", async () => {
    const site = await makeSite(backend, { retries: 3 });
    const names = [1, 2, 3].map((hour) => site.seal(HOST, hour, lines(5)));
    await mkdir(join(backend.folder, `${names[0]}.tmp`));
    expect((await once(site)).code).toBe(1);
    expect(await site.list("failed")).toEqual([names[0] as string]);
    expect(await site.list("sent")).toEqual(names.slice(1));
    expect(await site.failures()).toHaveLength(3);
    expect((await readdir(backend.folder)).sort()).toEqual([`${names[0]}.tmp`, ...names.slice(1)].sort());
    await takeAway(backend);
  });

  test('compress: "gzip" sends <name>.log.gz, the same bytes after a crash', async () => {
    const site = await makeSite(backend, { compress: "gzip" });
    const text = lines(5000);
    const name = site.seal(HOST, 1, text);
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:intent" });
    expect((await once(site)).code).toBe(0);
    const files = await remoteFiles(backend);
    expect(Object.keys(files)).toEqual([`${name}.gz`]);
    expect(gunzipSync(Buffer.from(files[`${name}.gz`] ?? "", "latin1")).toString("latin1")).toBe(text);
    expect(await site.report()).toEqual([`${name} | lines=5000 | status=Sent`]);
    expect(await site.list("sent")).toEqual([name]);
    await takeAway(backend);
  });

  test('compress: "gzip", killed behind the rename: the report has the lines of the batch, not those of its .gz', async () => {
    const site = await makeSite(backend, { compress: "gzip" });
    const name = site.seal(HOST, 1, lines(5000));
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
    expect((await once(site)).code).toBe(0);
    expect(Object.keys(await remoteFiles(backend))).toEqual([`${name}.gz`]);
    expect(await site.report()).toEqual([`${name} | lines=5000 | status=Sent`]);
    await takeAway(backend);
  });
});

describe("forwarder", () => {
  test.each([
    ["none", "gzip"],
    ["gzip", "none"],
  ])(
    "killed behind the rename, and compress is %p no more but %p: one file of the batch",
    async (before, after) => {
      const backend = await toFolder();
      const site = await makeSite(backend, { compress: before });
      const name = site.seal(HOST, 1, lines(50));
      await once(site, { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
      const there = await remoteFiles(backend);
      const config = await readFile(site.configFile, "utf8");
      await writeFile(site.configFile, config.replace(`"compress": "${before}"`, `"compress": "${after}"`));
      expect(await readFile(site.configFile, "utf8")).not.toBe(config);
      expect((await once(site)).code).toBe(0);
      expect(await remoteFiles(backend)).toEqual(there);
      expect(await site.report()).toEqual([`${name} | lines=50 | status=Sent`]);
    },
  );

  const toFolder = async () => {
    const folder = join(await tempFolder(), "client");
    return { folder, settings: { target: `file://${folder}` } };
  };

  test("oldest window first, and within a window one batch of each host in turn", async () => {
    const site = await makeSite(await toFolder(), { parallel: 1 });
    const seal = (host: string, hour: number, part = 1) => {
      const name = site.seal(host, hour, "line\n");
      if (part === 1) return name;
      const later = name.replace(/\.log$/, `.${part}.log`);
      Bun.spawnSync(["mv", join(site.dir, host, name), join(site.dir, host, later)]);
      return later;
    };
    const busy3 = seal("busy", 1, 3);
    const busy2 = seal("busy", 1, 2);
    const busy1 = seal("busy", 1);
    const quiet1 = seal("quiet", 1);
    const quiet0 = seal("quiet", 0);
    const busy5 = seal("busy", 5);
    const { output } = await once(site);
    const order = [...output.matchAll(/batch delivered batch=(\S+)/g)].map((match) => match[1]);
    expect(order[0]).toBe(quiet0);
    expect(order.slice(1, 3).sort()).toEqual([busy1, quiet1].sort());
    expect(order.slice(3)).toEqual([busy2, busy3, busy5]);
  });

  test("what may be at the client already comes first, so that its report line does not wait for the others", async () => {
    const site = await makeSite(await toFolder(), { parallel: 1 });
    const begun = site.seal(HOST, 5, "line\n");
    await once(site, { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
    const older = site.seal(HOST, 1, "line\n");
    await once(site);
    expect(await site.report()).toEqual([begun, older].map((batch) => `${batch} | lines=1 | status=Sent`));
  });

  test("a second one on the same folder says which process holds it and exits 1; --status still works", async () => {
    const site = await makeSite(await toFolder());
    const first = startScript("forwarder", site.configFile);
    await first.says("forwarder started");
    const second = await once(site);
    expect(second.code).toBe(1);
    expect(second.output).toContain(`is in use by process ${first.process.pid}`);
    expect((await runScriptOnce("forwarder", site.configFile, ["--status"])).code).toBe(0);
    await first.stop("SIGKILL");
    expect((await once(site)).code).toBe(0); // nothing to clean up by hand
  });

  test("SIGTERM while it waits: exit 0", async () => {
    const site = await makeSite(await toFolder());
    const running = startScript("forwarder", site.configFile);
    await running.says("forwarder started");
    expect(await running.stop()).toBe(0);
  });

  test("--status is 1 without the forwarder that stayed, also with nothing to send; one that cron starts may be away", async () => {
    const site = await makeSite(await toFolder());
    await once(site);
    expect((await runScriptOnce("forwarder", site.configFile, ["--status"])).code).toBe(0);
    const running = startScript("forwarder", site.configFile);
    await until("it says that it stays", async () => (await readForwarderState(site.dir))?.stays);
    expect((await runScriptOnce("forwarder", site.configFile, ["--status"])).code).toBe(0);
    await running.stop();
    const { code, output } = await runScriptOnce("forwarder", site.configFile, ["--status"]);
    expect([code, output.split("\n")[0]]).toEqual([
      1,
      "no forwarder is running: systemctl status log-rt-sync-forwarder",
    ]);
  });

  test("an intention that can't be saved ends the next pass before anything is uploaded again", async () => {
    const dir = await tempFolder();
    const intents = await Intents.load(dir, () => {});
    const one = { batch: "a.log", remote: "a.log", bytes: 1, lines: 1, sha256: "" };
    const obstacle = join(dir, ".forwarder-intents.json.tmp");
    await mkdir(obstacle);
    expect(intents.add([one], 1)).rejects.toThrow(obstacle);
    expect(intents.keepOnly(new Set(["a.log"]))).rejects.toThrow(obstacle);
    await rm(obstacle, { recursive: true });
    await intents.keepOnly(new Set(["a.log"]));
    expect((await Intents.load(dir, () => {})).get("a.log")).toMatchObject({ remote: "a.log" });
  });

  test("a file in the place of a folder of ours is named, without a stack", async () => {
    const site = await makeSite(await toFolder(), { digest: true });
    site.seal(HOST, 1, "x\n");
    await writeFile(join(site.dir, ".digest"), "");
    const { code, output } = await once(site);
    expect(code).toBe(1);
    expect(output).toContain(join(site.dir, ".digest"));
    expect(output).not.toContain(" at ");
  });

  test("--status shows the queue by host, what failed and why, the last success and the rate", async () => {
    const backend = await toFolder();
    const site = await makeSite(backend, { retries: 1 });
    const sent = site.seal(HOST, 1, lines(7));
    const bad = site.seal(HOST, 2, lines(7));
    await mkdir(join(backend.folder, `${bad}.tmp`), { recursive: true });
    await once(site);
    const waiting = site.seal("10.0.0.1", 3, "x\n");
    const { output } = await runScriptOnce("forwarder", site.configFile, ["--status"]);
    expect(output).toMatch(new RegExp(`^10\\.0\\.0\\.1 +1  ${waiting}$`, "m"));
    expect(output).toMatch(/^10\.10\.21\.181 +0 {2}-$/m);
    expect(output).toContain(`failed: ${bad}: Cannot write`);
    expect(output).toContain(`last success: ${sent}`);
    expect(output).toContain("last hour: 1 batch, 7 lines");
    expect(output.split("\n")[0]).toStartWith("failed: "); // trouble first
    expect(output).toContain("no forwarder is running: systemctl status log-rt-sync-forwarder");
    expect(output.indexOf("10.0.0.1 ")).toBeLessThan(output.indexOf("10.10.21.181 ")); // who waits before who does not
    const unknown = await runScriptOnce("forwarder", site.configFile, ["--status", "--host", "10.0.0.99"]);
    expect(unknown).toEqual({ code: 1, output: `Sender 10.0.0.99 is not known in ${site.dir}\n` });
  });

  test("--status leaves a copy of a sender's folder alone, as delivery does", async () => {
    const site = await makeSite(await toFolder());
    const name = site.seal(HOST, 1, lines(7));
    const copy = join(site.dir, `${HOST}.bak`);
    await mkdir(copy);
    await writeFile(join(copy, name), lines(7));
    await utimes(join(copy, name), new Date(0), new Date(0));
    expect((await once(site)).code).toBe(0);
    expect(await readdir(copy)).toEqual([name]);
    const { code, output } = await runScriptOnce("forwarder", site.configFile, ["--status"]);
    expect({ code, output }).toMatchObject({ code: 0, output: expect.not.stringContaining(".bak") });
  });

  test("a batch that cannot be read goes to failed/ and says so; one that vanishes is no failure", async () => {
    const site = await makeSite(await toFolder(), { retries: 1 });
    const name = site.seal(HOST, 1, "x\n");
    await rm(join(site.dir, HOST, name));
    await mkdir(join(site.dir, HOST, name)); // a folder is no batch: left alone
    const good = site.seal(HOST, 2, "x\n");
    expect((await once(site)).code).toBe(0);
    expect(await site.list("sent")).toEqual([good]);
    expect(await site.list(HOST)).toEqual([name]);
  });

  test("a full disk under the report holds up delivery and sends nothing twice", async () => {
    const backend = await toFolder();
    const site = await makeSite(backend, { report: "/dev/full" });
    const name = site.seal(HOST, 1, "x\n");
    const { code, output } = await once(site);
    expect(code).toBe(1);
    expect(output).toContain("kind=local");
    expect(await site.list(HOST)).toEqual([name]);
    expect(await remoteFiles(backend)).toEqual({ [name]: "x\n" });
    await takeAway(backend);
    const mended = await makeSite(backend);
    await rm(mended.dir, { recursive: true, force: true });
    await rename(site.dir, mended.dir);
    expect((await once(mended)).code).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: "x\n" }); // taken, and nothing proved it
    expect(await mended.report()).toEqual([`${name} | lines=1 | status=Sent`]);
  });

  test.each([".forwarder-intents.json", ".forwarder-state.json"])(
    "a damaged %s is begun anew, told: what is there is compared",
    async (file) => {
      const backend = await toFolder();
      const site = await makeSite(backend);
      const name = site.seal(HOST, 1, "x\n");
      await once(site, { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
      for (const text of ["", "{", "[1]", "null"]) {
        await writeFile(join(site.dir, file), text);
        const { code, output } = await once(site);
        expect(code, output).toBe(0);
        expect(output).toContain("a damaged file is begun anew");
      }
      expect(await remoteFiles(backend)).toEqual({ [name]: "x\n" });
      expect(await site.report()).toEqual([`${name} | lines=1 | status=Sent`]);
    },
  );

  test("sent/ with the same name, also compressed, is never replaced", async () => {
    const site = await makeSite(await toFolder(), { retries: 1 });
    const name = site.seal(HOST, 1, "x\n");
    await mkdir(join(site.dir, "sent"));
    await writeFile(join(site.dir, "sent", `${name}.gz`), "delivered long ago");
    expect((await once(site)).code).toBe(1);
    expect(await site.list("failed")).toEqual([name]);
    expect((await site.failures())[0]).toContain("says that it was delivered already");
  });

  test("--check tells folders that are not there, here and at a target that is a folder", async () => {
    const backend = await toFolder();
    const site = await makeSite(backend);
    const check = (...flags: string[]) => runScriptOnce("forwarder", site.configFile, ["--check", ...flags]);
    const absent = await check();
    expect(absent.code).toBe(1);
    expect(absent.output).toContain("forwarder.dir: ");
    await mkdir(site.dir);
    expect((await check("--connect")).output).toContain(`forwarder.target: ${backend.folder}: will be made`);
    await mkdir(`${backend.folder}s`);
    const mistyped = await check("--connect");
    expect(mistyped.output).toContain('where "clients" is; it will be made when that is no slip');
    expect(mistyped.code).toBe(0);
    expect(await readdir(dirname(backend.folder))).toEqual(["clients"]);
    await rename(`${backend.folder}s`, backend.folder);
    expect((await check("--connect")).output).toContain("a file was put, renamed and removed there");
    await rm(backend.folder, { recursive: true });
    await writeFile(backend.folder, "");
    expect((await check()).output).toContain(
      `forwarder.target: ${backend.folder}: ${backend.folder} is no folder`,
    );
  });

  test("the daemon delivers what is sealed later", async () => {
    const backend = await toFolder();
    const site = await makeSite(backend, { intervalSeconds: 0.05 });
    const running = startScript("forwarder", site.configFile);
    await running.says("forwarder started");
    const name = site.seal(HOST, 1, "x\n");
    await until("it is delivered", async () => (await site.list("sent")).includes(name));
    expect(await running.stop()).toBe(0);
  });
});

describe.each(BACKENDS.filter(({ skip }) => !skip))("digests to $name", ({ start }) => {
  /** A batch of an hour that is over, by this machine's clock. */
  async function sealRecent(site: Site, hoursAgo: number, text: string): Promise<string> {
    const at = new Date(Date.now() - hoursAgo * 3_600_000);
    const two = (n: number) => String(n).padStart(2, "0");
    const hour = `${two(at.getFullYear() % 100)}${two(at.getMonth() + 1)}${two(at.getDate())}${two(at.getHours())}`;
    const name = `accessLog_${hour}_00-19_10-10-21-181.log`;
    await mkdir(join(site.dir, HOST), { recursive: true });
    await writeFile(join(site.dir, HOST, name), text);
    return name;
  }
  const verify = async (backend: Backend) =>
    runScriptOnce("forwarder", "/absent/config.json", ["--verify", backend.folder]);

  test.each(["forward:reported", "forward:listed", "forward:moved", "forward:digest"])(
    "killed at %s: the hours' digests come once, without a report line, and verify",
    async (step) => {
      const backend = await start();
      const site = await makeSite(backend, { digest: true });
      const names = [await sealRecent(site, 3, "a\n"), await sealRecent(site, 2, "b\n")];
      expect((await once(site, { LOG_RT_SYNC_STOP_AT: step })).code).toBe("SIGKILL");
      const { code, output } = await once(site);
      expect(code, output).toBe(0);
      const found = Object.keys(await remoteFiles(backend));
      expect(found.filter((name) => name.endsWith(".log"))).toEqual(names);
      expect(found.filter((name) => name.endsWith(".sha256"))).toHaveLength(3); // of 3, 2 and 1 hours ago
      expect((await verify(backend)).output).toEndWith("\nok\n");
      expect(await site.report()).toHaveLength(2);
      // sent again on purpose: once, reported, and in no digest a second time
      const resend = await runScriptOnce("forwarder", site.configFile, ["--resend", names[0] ?? ""]);
      expect(resend.output).toStartWith(`${names[0]}: back in the queue\n`);
      await rm(join(backend.folder, names[0] ?? ""));
      expect((await once(site)).code).toBe(0);
      expect(await site.report()).toHaveLength(3);
      expect(Object.keys(await remoteFiles(backend))).toEqual(found);
      expect((await verify(backend)).output).toEndWith("\nok\n");
      await writeFile(join(backend.folder, names[1] ?? ""), "c\n");
      const changed = await verify(backend);
      expect(changed.output).toStartWith(`changed: ${names[1]}\n`);
      expect(changed.code).toBe(1);
    },
  );
});
