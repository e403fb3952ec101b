/** SIGHUP at scripts that stay: what they take up, what they keep, and that a faulty config changes nothing. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { mkdir, readdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";
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
  await running.says("forwarder started");
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
  await writeFile(path("dir/sent/") + BATCH, "a line\n");
  const housekeep = { dir: path("dir"), report, schedule: "* * * * * *" };
  const running = startScript("housekeep", await writeConfig(home, { housekeep }), ["--watch"]);
  await running.says("following the schedule");
  const hours = { compressAfterHours: 0.0001, deleteAfterHours: 1000 };
  const next = { ...housekeep, ...hours, schedule: "0 0 * * *" };
  await reload(running, home, { housekeep: next }, "needRestart=schedule");
  await until("the .gz", async () => (await readdir(path("dir/sent"))).join() === `${BATCH}.gz`);
  expect(await running.stop()).toBe(0);
});
