/** SIGHUP at scripts that stay: what they take up, what they keep, and that a faulty config changes nothing. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync } from "node:fs";
import { appendFile, mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";
import { forwarderStatePath } from "../lib/signs.ts";
import { lines, startRealReceiver } from "./pipeline.ts";
import { type Running, startScript, tempFolder, until, writeConfig } from "./support.ts";

setDefaultTimeout(60_000);

const BATCH = "accessLog_26112206_00-19_10-0-0-1.log";

/** A folder with a batch that waits, one that was delivered long ago, and places to deliver to. */
async function setUp() {
  const home = await tempFolder();
  const path = (name: string) => join(home, name);
  for (const name of ["dir/10.0.0.1", "dir/sent", "old", "new"]) await mkdir(path(name), { recursive: true });
  return { home, path, report: path("report.log") };
}

/** Writes a section anew, sends SIGHUP, and waits for what the script says of it. */
async function reload(
  running: Running,
  home: string,
  section: Partial<Record<Section, object>>,
  says: string,
) {
  const from = running.output.length;
  await writeConfig(home, section);
  running.process.kill("SIGHUP");
  await until(says, () => running.output.slice(from).includes(says));
}

test("forwarder: a new target ends the pause of one that is none; a faulty one and a missing secret stay out", async () => {
  const { home, path, report } = await setUp();
  await writeFile(path("dir/10.0.0.1/") + BATCH, "a line\n");
  await writeFile(path("file"), "no folder");
  const forwarder = { dir: path("dir"), report, target: `file://${path("file/in")}`, intervalSeconds: 3600 };
  const running = startScript("forwarder", await writeConfig(home, { forwarder }));
  await running.says("delivery is held up");
  await reload(running, home, { forwarder: { ...forwarder, paralel: 1 } }, "config not taken up");
  expect(running.output).toContain("did you mean");
  const secret = { password: { env: "NOT_SET" } };
  await reload(running, home, { forwarder: { ...forwarder, ...secret } }, "NOT_SET");
  expect(await readdir(path("dir/10.0.0.1"))).toEqual([BATCH]);
  const next = { ...forwarder, target: `file://${path("new")}` };
  await reload(running, home, { forwarder: next }, "config read again");
  await until("the batch at the new target", async () => (await readdir(path("new"))).includes(BATCH));
  await until("the batch in sent/", async () => (await readdir(path("dir/sent"))).includes(BATCH));
  expect(await running.stop()).toBe(0);
});

test("forwarder: folder, report and digest stay until a restart, and are named; the rest is taken up", async () => {
  const { home, path, report } = await setUp();
  const forwarder = { dir: path("dir"), report, target: `file://${path("old")}`, intervalSeconds: 3600 };
  const running = startScript("forwarder", await writeConfig(home, { forwarder }));
  await until("the first pass over", () => existsSync(forwarderStatePath(path("dir"))));
  await writeFile(path("dir/10.0.0.1/") + BATCH, "a line\n");
  const moved = { dir: path("other"), report: path("other.log"), digest: true };
  const next = { ...forwarder, ...moved, target: `file://${path("new")}` };
  await reload(running, home, { forwarder: next }, 'needRestart="dir, report, digest"');
  await until("the batch at the new target", async () => (await readdir(path("new"))).includes(BATCH));
  expect(await running.stop()).toBe(0);
  expect(await readdir(home)).not.toContain("other");
  expect(await readdir(home)).not.toContain("other.log");
});

test("housekeep --watch: the next pass goes by the new hours; the schedule stays, and is named", async () => {
  const { home, path, report } = await setUp();
  await writeFile(path("dir/sent/") + BATCH, "a line\n".repeat(100));
  const housekeep = { dir: path("dir"), report, schedule: "* * * * * *" };
  const running = startScript("housekeep", await writeConfig(home, { housekeep }), ["--watch"]);
  await running.says("following the schedule");
  const hours = { compressAfterHours: 0.0001, deleteAfterHours: 1000 };
  const next = { ...housekeep, ...hours, schedule: "0 0 * * *" };
  await reload(running, home, { housekeep: next }, "needRestart=schedule");
  await until("the .gz", async () => (await readdir(path("dir/sent"))).join() === `${BATCH}.gz`);
  expect(await running.stop()).toBe(0);
});

test("monitor --watch: recipients and thresholds are taken up; schedule and state stay, and are named; a faulty one is told", async () => {
  const { home, path, report } = await setUp();
  const mailTo = (folder: string) => ({
    smtp: `file://${path(folder)}`,
    from: "a@b.example",
    to: ["c@d.example"],
  });
  const monitor = {
    ...{ dir: path("dir"), report, stateFile: path("state.json"), minFreePercent: 0, expected: ["10.0.0.8"] },
    ...{
      mail: mailTo("old"),
      schedule: "* * * * * *",
      summaryMinute: (new Date().getUTCMinutes() + 40) % 60,
    },
  };
  const running = startScript("monitor", await writeConfig(home, { monitor }), ["--watch"]);
  await until("a mail to the old place", async () => (await readdir(path("old"))).length === 1);
  await reload(running, home, { monitor: { ...monitor, remindMinute: 1 } }, "config not taken up");
  const kept = { schedule: "0 0 * * *", stateFile: path("other.json") };
  const next = { ...monitor, ...kept, expected: ["10.0.0.8", "10.0.0.9"], mail: mailTo("new") };
  await reload(running, home, { monitor: next }, 'needRestart="schedule, stateFile"');
  await until("a mail to the new place", async () => (await readdir(path("new"))).length === 1);
  expect(await running.stop()).toBe(0);
  expect(await readdir(home)).not.toContain("other.json");
});

test("shipper: files, rules and receiver are taken up, what was unread of a log that is out is told; the host stays", async () => {
  const { home, path } = await setUp();
  const [first, second] = [await startRealReceiver(), await startRealReceiver()];
  await writeFile(path("a.log"), lines("a", 1, 2));
  await writeFile(path("b.log"), lines("b", 1, 2));
  const shipper = {
    files: [path("a.log")],
    receiver: first.url,
    host: "10.0.0.1",
    stateDir: path("state"),
    ...{ pollSeconds: 0.2, heartbeatSeconds: 0.5 },
  };
  const running = startScript("shipper", await writeConfig(home, { shipper }));
  const has = (receiver: typeof first, text: string) => () => receiver.stored("10.0.0.1").includes(text);
  await until("a.log at the receiver", has(first, "/a/2 "));
  expect(has(first, "/b/1 ")()).toBe(false);

  const both = { ...shipper, files: [path("a.log"), path("b.log")], skip: [["/a/3 "]], host: "10.0.0.2" };
  await reload(running, home, { shipper: both }, "needRestart=host");
  await until("b.log at the receiver", has(first, "/b/2 "));
  await appendFile(path("a.log"), lines("a", 3, 4));
  await until("the next line of a.log", has(first, "/a/4 "));
  expect(has(first, "/a/3 ")()).toBe(false);

  const other = { ...shipper, files: [path("b.log")], receiver: second.url };
  await reload(running, home, { shipper: other }, "config read again");
  await running.says(`log is not followed any more path=${path("a.log")} unread=0`);
  await appendFile(path("a.log"), lines("a", 5, 5));
  await appendFile(path("b.log"), lines("b", 3, 4));
  await until("b.log at the other receiver", has(second, "/b/4 "));
  expect(await running.stop()).toBe(0);
  expect(has(first, "/a/5 ")() || has(second, "/a/5 ")()).toBe(false);
});
