import { expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { appendFileSync, readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import {
  appendFile,
  chmod,
  chown,
  mkdir,
  readdir,
  readFile,
  stat,
  statfs,
  symlink,
  truncate,
  utimes,
  writeFile,
} from "node:fs/promises";
import { join } from "node:path";
import { gunzipSync, gzipSync } from "node:zlib";
import { compressFile, type Delivered, housekeepOnce, planPass } from "../housekeep.ts";
import { parseConfig } from "../lib/config.ts";
import { holdLock } from "../lib/durable.ts";
import { appendReport, formatReportLine, readReportTail } from "../lib/report.ts";
import { createLog } from "../lib/service.ts";
import { missing, runScriptOnce, start, startScript, tempFolder, until, writeConfig } from "./support.ts";

const HOUR = 3_600_000;
const DAY = 24 * HOUR;
const NOW = Date.UTC(2026, 10, 22, 12);

async function setUp(more: object = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "batches");
  const sent = join(dir, "sent");
  await mkdir(sent, { recursive: true });
  const section = { dir, report: join(folder, "report.log"), ...more };
  const config = parseConfig(JSON.stringify({ housekeep: section }), "housekeep");
  const file = await writeConfig(folder, { housekeep: section });
  return { folder, dir, sent, config, file };
}

/** The name of the n-th batch. */
const batch = (n: number) => `accessLog_26112206_00-19_10-0-0-${n}.log`;
const content = (n: number) => `line ${n} `.repeat(1000 + n);

/** A file delivered so many hours before NOW. */
async function deliver(folder: string, name: string, hours: number, text: string | Buffer, now = NOW) {
  await writeFile(join(folder, name), text);
  const at = (now - hours * HOUR) / 1000;
  await utimes(join(folder, name), at, at);
}

async function run(config: Parameters<typeof housekeepOnce>[0]["config"], more: object = {}) {
  const logged: string[] = [];
  const log = createLog((line) => logged.push(line));
  const signal = new AbortController().signal;
  const result = await housekeepOnce({ config, log, signal, now: () => NOW, ...more });
  return { ...result, log: logged.join("") };
}

test("a file that changes while it is compressed stays as it is, and is compressed the next time", async () => {
  const { sent } = await setUp();
  const path = join(sent, batch(1));
  const { signal } = new AbortController();
  const replace = () => {
    writeFileSync(`${path}.new`, content(2));
    renameSync(`${path}.new`, path);
  };
  for (const change of [
    () => appendFileSync(path, "more\n"),
    () => writeFileSync(path, content(2)),
    replace,
  ]) {
    await deliver(sent, batch(1), 5, content(1).repeat(20));
    let isChanged = false;
    const read = () => {
      if (!isChanged) change();
      isChanged = true;
    };
    await expect(compressFile(sent, batch(1), { signal, read })).rejects.toThrow("meanwhile");
    const now = readFileSync(path, "utf8");
    expect(await readdir(sent)).toEqual([batch(1)]);
    expect(await compressFile(sent, batch(1), { signal })).toBeGreaterThan(0);
    expect(gunzipSync(readFileSync(`${path}.gz`)).toString()).toBe(now);
    rmSync(`${path}.gz`);
  }
});

test("housekeepOnce() compresses and deletes by the time of delivery", async () => {
  const { sent, config } = await setUp();
  await deliver(sent, batch(1), 1, content(1));
  await deliver(sent, batch(2), 3.1, content(2));
  await deliver(sent, batch(3), 4.1, content(3));
  await deliver(sent, `${batch(4)}.gz`, 4.1, gzipSync(content(4)));
  const result = await run(config);
  expect((await readdir(sent)).sort()).toEqual([batch(1), `${batch(2)}.gz`]);
  expect(gunzipSync(await readFile(join(sent, `${batch(2)}.gz`))).toString()).toBe(content(2));
  expect((await stat(join(sent, `${batch(2)}.gz`))).mtimeMs).toBe(NOW - 3.1 * HOUR);
  expect(result).toMatchObject({ compressed: 1, deleted: 2, faults: 0 });
});

test("housekeepOnce() leaves metrics for node_exporter, and goes on where it can't", async () => {
  const { dir, sent, config } = await setUp();
  await deliver(sent, batch(1), 3.1, content(1));
  await run(config);
  const text = await readFile(join(dir, ".metrics", "housekeep.prom"), "utf8");
  expect(text).toContain("# TYPE log_rt_sync_housekeep_last_run_compressed_files gauge\n");
  expect(text).toContain("\nlog_rt_sync_housekeep_last_run_compressed_files 1\n");
  expect(text).toContain(`\nlog_rt_sync_housekeep_last_run_timestamp_seconds ${NOW / 1000}\n`);
  rmSync(join(dir, ".metrics"), { recursive: true });
  await writeFile(join(dir, ".metrics"), "a file");
  const { faults, log } = await run(config);
  expect(faults).toBe(0);
  expect(log).toContain("metrics not written");
});

test("housekeepOnce() never touches what is not delivered, however old, and says how much there is", async () => {
  const { dir, config } = await setUp({ compressAfterHours: 0, deleteAfterHours: 0, minFreePercent: 100 });
  for (const folder of ["failed", "10.0.0.1"]) {
    await mkdir(join(dir, folder));
    for (let n = 1; n <= 3; n++) await deliver(join(dir, folder), batch(n), 1000, content(n));
  }
  await deliver(join(dir, "10.0.0.1"), `${batch(4)}.part`, 1000, content(4));
  const { log } = await run(config);
  expect((await readdir(join(dir, "failed"))).length).toBe(3);
  expect((await readdir(join(dir, "10.0.0.1"))).length).toBe(4);
  expect(log).toContain("waiting=3 failed=3");
});

test("housekeepOnce() leaves links, folders and foreign names alone and never leaves the folder", async () => {
  const { folder, sent, config } = await setUp({ compressAfterHours: 0, deleteAfterHours: 0 });
  const outside = join(folder, batch(9));
  await deliver(folder, batch(9), 100, "precious");
  await symlink(outside, join(sent, batch(1)));
  await symlink(folder, join(sent, "accessLog_26112206_00-19_x.log.gz.tmp"));
  await mkdir(join(sent, batch(2)));
  await deliver(sent, "notes.txt", 100, "foreign");
  await deliver(sent, "x.tmp", 100, "foreign");
  await deliver(sent, "accessLog_26119906_00-19_10-0-0-1.log", 100, "no batch name");
  const before = (await readdir(sent)).sort();
  await run(config);
  expect((await readdir(sent)).sort()).toEqual(before);
  expect(await readFile(outside, "utf8")).toBe("precious");
});

test("housekeepOnce() does not follow a sent/ that is a link", async () => {
  const { folder, dir, config } = await setUp({ compressAfterHours: 0, deleteAfterHours: 0 });
  const elsewhere = join(folder, "elsewhere");
  await mkdir(elsewhere);
  await deliver(elsewhere, batch(1), 100, "precious");
  const linked = join(folder, "linked");
  await mkdir(linked);
  await symlink(elsewhere, join(linked, "sent"));
  const { log } = await run({ ...config, dir: linked });
  expect(log).toContain("sent is not a folder");
  expect(await readdir(elsewhere)).toEqual([batch(1)]);
  expect(dir).not.toBe(linked);
});

test("housekeepOnce() checks a .gz that is there instead of trusting it", async () => {
  const { sent, config } = await setUp();
  const whole = gzipSync(content(1));
  const there: Record<number, Buffer> = {
    1: whole, // the run before was stopped after its rename
    2: gzipSync(content(2)).subarray(0, 40), // cut short
    3: Buffer.alloc(0),
    4: Buffer.from("no gzip at all"),
    5: gzipSync("something else"), // intact, and not of this batch
  };
  for (const [n, gz] of Object.entries(there)) {
    await deliver(sent, batch(Number(n)), 3.5, content(Number(n)));
    await deliver(sent, `${batch(Number(n))}.gz`, 3.5, gz);
  }
  const result = await run(config);
  for (let n = 1; n <= 4; n++) {
    expect(gunzipSync(await readFile(join(sent, `${batch(n)}.gz`))).toString()).toBe(content(n));
  }
  expect((await readdir(sent)).filter((name) => name.endsWith(".log"))).toEqual([batch(5)]);
  expect(gunzipSync(await readFile(join(sent, `${batch(5)}.gz`))).toString()).toBe("something else");
  expect(result.faults).toBe(1);
  expect(result.log).toContain("is there with other content");
});

const STEPS = [
  "housekeep:written",
  "housekeep:verified",
  "housekeep:renamed",
  "housekeep:removed",
  "housekeep:deleted",
];
test.each(STEPS)("housekeep killed at %s loses nothing, and the next run ends the work", async (step) => {
  const { sent, file } = await setUp();
  const now = Date.now();
  for (let n = 1; n <= 4; n++) await deliver(sent, batch(n), 3.5, content(n), now);
  await deliver(sent, batch(9), 5, content(9), now);
  const env = { LOG_RT_SYNC_STOP_AT: step, LOG_RT_SYNC_STOP_COUNT: step.endsWith("deleted") ? "1" : "2" };
  expect((await runScriptOnce("housekeep", file, [], env)).code).toBe("SIGKILL");
  for (let n = 1; n <= 4; n++) {
    const original = await readFile(join(sent, batch(n)), "utf8").catch(() => undefined);
    const gz = await readFile(join(sent, `${batch(n)}.gz`)).catch(() => undefined);
    expect(original ?? (gz && gunzipSync(gz).toString())).toBe(content(n));
    if (gz) expect(gunzipSync(gz).toString()).toBe(content(n)); // never a part of one
  }
  expect((await runScriptOnce("housekeep", file)).code).toBe(0);
  expect((await readdir(sent)).sort()).toEqual([1, 2, 3, 4].map((n) => `${batch(n)}.gz`));
  for (let n = 1; n <= 4; n++) {
    expect(gunzipSync(await readFile(join(sent, `${batch(n)}.gz`))).toString()).toBe(content(n));
  }
});

test("housekeepOnce() survives a file that vanishes meanwhile", async () => {
  const { sent, config } = await setUp();
  const last = 40; // far behind those that are worked on side by side
  for (let n = 1; n <= last; n++) await deliver(sent, batch(n), 3.5 - n / 1000, content(n));
  const log = createLog(() => {});
  const vanish = (message: string) => {
    if (message === "compressed") rmSync(join(sent, batch(last)), { force: true });
  };
  const result = await run(config, { log: { ...log, info: vanish } });
  expect(result).toMatchObject({ compressed: last - 1, faults: 0 });
});

test("housekeepOnce() refuses to run twice at once, and names the other", async () => {
  const { dir, sent, config } = await setUp();
  await deliver(sent, batch(1), 5, content(1));
  const lock = await holdLock(join(dir, ".housekeep.lock"), "it");
  expect(run(config)).rejects.toThrow(`in use by process ${process.pid}`);
  lock.release();
  expect((await run(config)).deleted).toBe(1);
});

test("housekeep --dry-run shows what a run then does, with the reason, and changes nothing", async () => {
  const { folder, dir, sent, config, file } = await setUp();
  const now = Date.now();
  for (let n = 1; n <= 9; n++) await deliver(sent, batch(n), n * 0.7, content(n), now);
  await deliver(sent, batch(10), 3.5, "short", now);
  await deliver(sent, batch(11), 3.5, content(11), now);
  await deliver(sent, `${batch(11)}.gz`, 3.5, gzipSync("something else"), now);
  await writeFile(join(sent, `${batch(1)}.gz.tmp`), "stale");
  await appendReport(config.report, [{ at: now - 91 * DAY, batch: batch(1), lines: 1, status: "Sent" }]);
  const before = await snapshot(folder);
  const dry = await runScriptOnce("housekeep", file, ["--dry-run"]);
  expect(dry.code).toBe(1); // as the run, that has a fault
  expect(await snapshot(folder)).toEqual(before);
  const wet = await runScriptOnce("housekeep", file);
  expect(wet.code).toBe(1);
  const planned = [...dry.output.matchAll(/^(compress|delete|trim) +(\S+) .* (because|than|is) /gm)];
  const done = [...wet.output.matchAll(/info (compress|delete)\w* file=(\S+)/g)];
  const steps = (rows: RegExpMatchArray[]) => rows.map(([, what, name]) => `${what} ${name}`).sort();
  expect(steps(planned)).toEqual(steps([...done, ["", "trim", config.report]]));
  expect(planned.length).toBe(6);
  const row = (name: string) => dry.output.split("\n").find((line) => line.includes(` ${name} `));
  expect(row(batch(9))).toMatch(/^delete .* delivered 6h 18m.* ago, deleteAfterHours is 4$/);
  expect(row(batch(10))).toMatch(/^stays .* it would grow$/);
  expect(row(batch(11))).toMatch(/^stays .* is there with other content/);
  expect(row(`${batch(1)}.gz.tmp`)).toMatch(/^remove .* a run was interrupted$/);
  expect(row(config.report)).toMatch(/^trim .* 1 lines are older than reportDays \(90\)$/);
  expect((await readdir(dir)).sort()).toEqual([".housekeep.lock", ".metrics", "sent"]);
});

async function snapshot(folder: string): Promise<string[]> {
  const names = (await readdir(folder, { recursive: true })).filter((name) => !name.endsWith(".lock"));
  return Promise.all(names.sort().map(async (name) => `${name} ${(await stat(join(folder, name))).mtimeMs}`));
}

test("planPass() deletes the oldest delivered early when the disk is nearly full, and no more than needed", () => {
  const files: Delivered[] = [3.5, 2, 1, 0.5].map((hours, i) => ({
    name: batch(i),
    bytes: 10,
    at: NOW - hours * HOUR,
  }));
  const options = { compressAfterHours: 3, deleteAfterHours: 4, minFreePercent: 20 };
  const actions = (free: number, more: object = {}) =>
    planPass(files, { ...options, ...more } as Parameters<typeof planPass>[1], NOW, { free, total: 200 }).map(
      ({ name, action }) => `${action} ${files.findIndex((file) => file.name === name)}`,
    );
  expect(actions(40)).toEqual(["compress 0"]);
  expect(actions(25)).toEqual(["early 0", "early 1"]);
  expect(actions(25, { minFreePercent: 0 })).toEqual(["compress 0"]);
  expect(actions(0, { deleteAfterHours: 3 })).toEqual(["delete 0", "early 1", "early 2", "early 3"]);
});

test("housekeepOnce() keeps a file delivered late for the whole retention, with the forwarder away for six hours", async () => {
  const { dir, sent, config } = await setUp();
  const host = join(dir, "10.0.0.1");
  await mkdir(host);
  for (let n = 1; n <= 3; n++) await deliver(host, batch(n), 0, content(n));
  const signal = new AbortController().signal;
  const pass = (minutes: number) =>
    housekeepOnce({ config, log: createLog(() => {}), signal, now: () => NOW + minutes * 60_000 });
  for (let minutes = 0; minutes <= 360; minutes += 10) await pass(minutes);
  expect((await readdir(host)).length).toBe(3);
  const { rename } = await import("node:fs/promises");
  for (let n = 1; n <= 3; n++) {
    await rename(join(host, batch(n)), join(sent, batch(n)));
    await utimes(join(sent, batch(n)), (NOW + 6 * HOUR) / 1000, (NOW + 6 * HOUR) / 1000); // as the forwarder does
  }
  await pass(360 + 170);
  expect((await readdir(sent)).sort()).toEqual([1, 2, 3].map(batch));
  await pass(360 + 230);
  expect((await readdir(sent)).sort()).toEqual([1, 2, 3].map((n) => `${batch(n)}.gz`));
  await pass(360 + 240);
  expect(await readdir(sent)).toEqual([]);
});

test("housekeepOnce() trims reports by age while others append", async () => {
  const { config } = await setUp();
  const line = (n: number, at: number) => ({ at, batch: batch(n), lines: n, status: "Sent" as const });
  await appendReport(config.report, [line(1, NOW - 100 * DAY), line(2, NOW - 91 * DAY), line(3, NOW - DAY)]);
  const appending = Array.from({ length: 20 }, (_, i) => appendReport(config.report, [line(100 + i, NOW)]));
  await Promise.all([run(config), ...appending]);
  const lines = (await readReportTail(config.report)).map(({ lines: n }) => n);
  expect(lines.sort((a, b) => a - b)).toEqual([3, ...Array.from({ length: 20 }, (_, i) => 100 + i)]);
});

test("housekeepOnce() leaves a file that would grow as it is", async () => {
  const { sent, config } = await setUp();
  await deliver(sent, batch(1), 3.5, "one short line\n");
  await deliver(sent, batch(2), 3.5, randomBytes(200_000));
  const before = await snapshot(sent);
  expect(await run(config)).toMatchObject({ compressed: 0, faults: 0, freed: 0 });
  expect(await snapshot(sent)).toEqual(before);
});

test.skipIf(process.getuid?.() !== 0)("a .gz has owner, group, mode and time of its original", async () => {
  const { sent, config } = await setUp();
  await deliver(sent, batch(1), 3.5, content(1));
  await chown(join(sent, batch(1)), 1234, 2345);
  await chmod(join(sent, batch(1)), 0o604);
  await run(config);
  const { uid, gid, mode, mtimeMs } = await stat(join(sent, `${batch(1)}.gz`));
  expect({ uid, gid, mode: mode & 0o777, mtimeMs }).toEqual({
    ...{ uid: 1234, gid: 2345, mode: 0o604, mtimeMs: NOW - 3.5 * HOUR },
  });
});

test.skipIf(process.getuid?.() !== 0)(
  "housekeep run by another user says so and changes nothing",
  async () => {
    const { folder, dir, sent, file } = await setUp();
    await deliver(sent, batch(1), 3.5, content(1), Date.now());
    await chown(dir, 1234, 2345);
    for (const path of [folder, dir, sent]) await chmod(path, 0o777);
    await chmod(file, 0o644);
    const before = await snapshot(dir);
    const script = join(import.meta.dirname, "..", "housekeep.ts");
    const command = [
      "--reuid=3456",
      "--regid=3456",
      "--clear-groups",
      process.execPath,
      script,
      "--config",
      file,
    ];
    const ran = start("setpriv", command);
    expect(await ran.ended).toBe(1);
    expect(ran.output).toContain("it belongs to user 1234, this is user 3456");
    expect(await snapshot(dir)).toEqual(before);
  },
);

test("housekeepOnce() warns of a failed/ of 1,000 files", async () => {
  const { dir, config } = await setUp();
  await mkdir(join(dir, "failed"));
  for (let n = 1; n <= 1000; n++) await writeFile(join(dir, "failed", batch(n)), "");
  expect((await run(config)).log).toContain("failed/ grows: look why the client refuses");
  rmSync(join(dir, "failed", batch(1)));
  expect((await run(config)).log).not.toContain("failed/ grows");
});

test("housekeepOnce() warns of a failed/ with a tenth of the disk", async () => {
  const { dir, config } = await setUp();
  await mkdir(join(dir, "failed"));
  const { blocks, bsize } = await statfs(dir);
  const file = join(dir, "failed", batch(1));
  await writeFile(file, "");
  await truncate(file, Math.ceil((blocks * bsize) / 10)); // a hole: it takes no room
  expect((await run(config)).log).toContain("failed/ grows: look why the client refuses");
  await truncate(file, Math.floor((blocks * bsize) / 11));
  expect((await run(config)).log).not.toContain("failed/ grows");
});

test("housekeepOnce() leaves what has a time of the future, in sent/ and in the report", async () => {
  const { sent, config } = await setUp();
  await deliver(sent, batch(1), -240, content(1));
  await deliver(sent, batch(2), 5, content(2));
  const line = (hours: number, n: number) => ({
    at: NOW - hours * HOUR,
    batch: batch(n),
    lines: 1,
    status: "Sent" as const,
  });
  const lines = [line(-240, 1), line(91 * 24, 2), line(1, 3)];
  await appendReport(config.report, lines);
  await run(config);
  expect(await readdir(sent)).toEqual([batch(1)]);
  expect((await readReportTail(config.report)).map(({ batch: name }) => name)).toEqual([batch(1), batch(3)]);
});

test("housekeepOnce() keeps digests for reportDays, the newest and what waits for longer", async () => {
  const { dir, config } = await setUp();
  const digests = join(dir, ".digest");
  await mkdir(digests);
  const head = { name: "accessLog_26082203.sha256", sha256: "0".repeat(64), complete: true, at: NOW };
  const pending = ["accessLog_26082202.sha256"];
  const state = { version: 1, begins: 0, prefix: "accessLog", head, hours: {}, totals: {}, pending };
  await writeFile(join(digests, "state.json"), JSON.stringify(state));
  for (const hour of ["26082200", "26082201", "26082202", "26082203"])
    for (const name of [`${hour}.list`, `accessLog_${hour}.sha256`])
      await deliver(digests, name, 91 * 24, "x");
  await deliver(digests, "accessLog_26082201.2.sha256", 24, "x");
  await run(config);
  const left = await readdir(digests);
  expect(left.filter((name) => name.includes("26082200"))).toEqual([]);
  expect(left.length).toBe(8);
});

test("housekeep trims a long report in bounded memory", async () => {
  const { config, file } = await setUp();
  const at = (days: number) => ({
    at: Date.now() - days * DAY,
    batch: batch(1),
    lines: 1,
    status: "Sent" as const,
  });
  const block = formatReportLine(at(91)).repeat(10_000);
  for (let n = 0; n < 100; n++) await appendFile(config.report, block);
  await appendReport(config.report, [at(1)]);
  const script = join(import.meta.dirname, "..", "housekeep.ts");
  const trimming = start(process.execPath, ["--smol", "run", script, "--config", file]);
  let peak = 0; // KiB
  const watch = setInterval(() => {
    const status = readFileSync(`/proc/${trimming.process.pid}/status`, "utf8");
    peak = Math.max(peak, Number(/VmHWM:\s*(\d+)/.exec(status)?.[1] ?? 0));
  }, 5);
  expect(await trimming.ended.finally(() => clearInterval(watch))).toBe(0);
  expect(peak / 1024).toBeLessThan(128);
  expect(trimming.output).toContain("lines=1000000");
  expect((await readReportTail(config.report)).length).toBe(1);
}, 60_000);

test("housekeep --watch follows its schedule and ends on SIGTERM, also in the middle of a file", async () => {
  const { sent, file } = await setUp({ schedule: "* * * * * *" });
  const now = Date.now();
  await deliver(sent, batch(1), 3.5, content(1), now);
  const watching = startScript("housekeep", file, ["--watch"]);
  await until("the .gz", async () => (await readdir(sent)).includes(`${batch(1)}.gz`));
  await deliver(sent, batch(2), 3.5, Buffer.alloc(300 * 1024 * 1024, "some line of a log\n"), now);
  await until("a part of the second", async () => (await readdir(sent)).includes(`${batch(2)}.gz.tmp`));
  expect(await watching.stop()).toBe(0);
  expect((await readdir(sent)).filter((name) => name.includes("-2."))).toContain(batch(2));
  expect((await runScriptOnce("housekeep", file)).code).toBe(0);
  expect((await readdir(sent)).sort()).toEqual([1, 2].map((n) => `${batch(n)}.gz`));
}, 60_000);

test.skipIf(missing({ gzip: "gzip" }))("the gzip command reads what was compressed", async () => {
  const { sent, config } = await setUp();
  await deliver(sent, batch(1), 3.5, Buffer.alloc(5 * 1024 * 1024, "some line of a log\n"));
  await run(config);
  expect(await start("gzip", ["--test", join(sent, `${batch(1)}.gz`)]).ended).toBe(0);
});

test("housekeep --check and a missing folder say what to do", async () => {
  const gone = join(await tempFolder(), "gone");
  const { file } = await setUp({ dir: gone, schedule: "61 * * * *" });
  const checked = await runScriptOnce("housekeep", file, ["--check"]);
  expect(checked.code).toBe(78);
  expect(checked.output).toContain(`housekeep.dir: ${gone}: expected a folder`);
  expect(checked.output).toContain("housekeep.schedule: 61 * * * *: expected a cron expression");
  expect((await runScriptOnce("housekeep", file, ["--watch"])).code).toBe(78);
  const ran = await runScriptOnce("housekeep", file);
  expect(ran.code).toBe(1);
  expect(ran.output).toContain(`Cannot work in ${gone}`);
});
