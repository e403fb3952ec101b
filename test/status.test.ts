/** The one judge: what a look at a folder says, and in which words. */
import { describe, expect, test } from "bun:test";
import { chmod, link, mkdir, stat, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { formatAgent, parseAgent } from "../lib/chunk.ts";
import { emptyLedger, formatRecord, type Ledger, type LedgerRecord } from "../lib/ledger.ts";
import type { ReceiverState } from "../lib/signs.ts";
import { DEFAULT_THRESHOLDS, type Thresholds } from "../lib/snapshot.ts";
import { createStatusReader, headline, observe, type Snapshot } from "../lib/status.ts";
import { tempFolder, until } from "./support.ts";

const NOW = Date.parse("2026-11-22T10:52:31Z");
const MINUTE = 60_000;

/** A folder with these files, empty where they are not given as text. */
async function folderWith(files: (string | [path: string, text: string])[]): Promise<string> {
  const dir = await tempFolder();
  for (const file of files) {
    const [path, text] = typeof file === "string" ? [file, ""] : file;
    await mkdir(join(dir, path, ".."), { recursive: true });
    await writeFile(join(dir, path), text);
  }
  return dir;
}

const ledger = (host: string, over: LedgerRecord): [string, string] => [
  `${host}/.ledger`,
  formatRecord({ v: 2, ...over }),
];
const heard = (host: string, minutes: number, over: LedgerRecord = {}) =>
  ledger(host, { heardAt: NOW - minutes * MINUTE, lineAt: NOW - minutes * MINUTE, ...over });

function receiver(port: number, over: Partial<ReceiverState> = {}): [string, string] {
  const state = {
    version: 1,
    at: NOW,
    startedAt: NOW - 600 * MINUTE,
    ports: [port],
    refused: [],
    pressed: [],
    ...over,
  };
  return [`.receiver-${port}.json`, JSON.stringify(state)];
}

const look = (dir: string, over: Partial<Thresholds> = {}, options = {}): Promise<Snapshot> =>
  observe(dir, { ...DEFAULT_THRESHOLDS, ...over }, { now: NOW, ...options });
const states = ({ hosts }: Snapshot) => Object.fromEntries(hosts.map(({ host, state }) => [host, state]));
const problem = ({ problems }: Snapshot, key: string) => problems.find((one) => one.key === key);

describe("observe(): senders", () => {
  test("tells a sender's state by its own threshold", async () => {
    const dir = await folderWith([
      heard("ok", 1),
      ledger("quiet", { heardAt: NOW - 1000, lineAt: NOW - 6 * MINUTE }),
      heard("silent", 6),
      heard("patient", 6),
      heard("gone", 24 * 60),
    ]);
    const seen = await look(dir, { expected: ["never", "ok"], silentMinutesByHost: { patient: 30 } });
    expect(states(seen)).toEqual({
      gone: "gone",
      never: "never",
      ok: "ok",
      patient: "ok",
      quiet: "quiet",
      silent: "silent",
    });
    expect(headline(seen)).toBe("1 sender is silent, 1 sender was never seen");
    expect(problem(seen, "silent")?.text).toMatch(/^silent since \d\d:\d\d \(6m 0s\)$/);
    expect(seen.hosts.find(({ host }) => host === "silent")?.lag).toBeUndefined();
  });

  test("a sender that is gone leaves after a second day, unless batches of it are left", async () => {
    const dir = await folderWith([
      heard("10.0.0.1", 49 * 60),
      heard("10.0.0.2", 49 * 60),
      "10.0.0.2/accessLog_26112010_00-19_10-0-0-2.log",
      "failed/accessLog_26112209_40-59_10-0-0-7.log",
    ]);
    expect(states(await look(dir))).toEqual({ "10-0-0-7": "gone", "10.0.0.2": "gone" });
  });

  test("a sender that was forgotten is not seen, unless it is expected or batches of it are left", async () => {
    const facts = { forgotten: NOW - MINUTE };
    const dir = await folderWith([
      ...["10.0.0.1", "10.0.0.2", "10.0.0.3"].map((host) => heard(host, 120, { facts })),
      "10.0.0.2/accessLog_26112010_00-19_10-0-0-2.log",
    ]);
    expect(states(await look(dir, { expected: ["10.0.0.3"] }))).toEqual({
      "10.0.0.2": "silent",
      "10.0.0.3": "silent",
    });
  });

  test("who was not heard since its receiver started is waited for, neither well nor silent", async () => {
    const dir = await folderWith([
      heard("10.0.0.1", 3 * 24 * 60),
      receiver(5001, { startedAt: NOW - 17_000 }),
    ]);
    const seen = await look(dir, { expected: ["10.0.0.1", "10.0.0.2"] });
    expect(states(seen)).toEqual({ "10.0.0.1": "waiting", "10.0.0.2": "waiting" });
    expect(seen.problems).toEqual([]);
    expect(headline(seen)).toBe("Waiting for senders: the receiver has just started");
  });

  test("only a sender's own receiver explains its silence", async () => {
    const dir = await folderWith([
      heard("10.0.0.1", 20),
      ["10.0.0.1/.ledger-lock", "11\n"],
      heard("10.0.0.2", 20),
      ["10.0.0.2/.ledger-lock", "22\n"],
      heard("10.0.0.3", 300),
      ["10.0.0.3/.ledger-lock", "11\n"],
      receiver(5001, { pid: 11, at: NOW - 19 * MINUTE }),
      receiver(5002, { pid: 22 }),
    ]);
    const seen = await look(dir);
    expect(states(seen)).toEqual({ "10.0.0.1": "waiting", "10.0.0.2": "silent", "10.0.0.3": "silent" });
    expect(problem(seen, "no receiver 5001")).toMatchObject({
      title: "no receiver is running on port 5001",
      next: [expect.stringContaining("systemctl status log-rt-sync-receiver@5001"), expect.anything()],
    });
  });

  test("says whom the receiver refuses, and which of them looks like one that never came", async () => {
    const row = { peer: "10.0.3.7", reason: "unknown token", since: NOW - 9 * MINUTE, at: NOW };
    const refused = [
      { ...row, host: "10.10.21.190", count: 9 },
      { ...row, host: "web-1", count: 3 },
      { ...row, host: "stranger", count: 1 },
    ];
    const dir = await folderWith([
      receiver(5001, { refused, pressed: [{ host: "10.0.0.9", text: "20000 streams" }] }),
    ]);
    const seen = await look(dir, { expected: ["web-1.example.com", "10.10.21.19"] });
    expect(problem(seen, "refused")).toMatchObject({
      title: "2 senders are refused",
      hosts: ["10.10.21.190", "web-1"],
    });
    expect(problem(seen, "refused")?.text).toMatch(
      /10\.10\.21\.190 from 10\.0\.3\.7: unknown token, 9 times since \d\d:\d\d/,
    );
    const never = problem(seen, "never")?.text;
    expect(never).toContain("10.10.21.19; refused: 10.10.21.190 from 10.0.3.7");
    expect(never).toContain("web-1.example.com; refused: web-1 from 10.0.3.7");
    expect(problem(seen, "pressed 5001")?.text).toBe("10.0.0.9: 20000 streams");
  });

  test("tells two shippers under one name, with both addresses", async () => {
    const shippers = ["10.0.3.7", "10.0.3.8"].map((peer, i) => ({ id: `${i}`, lost: 0, heardAt: NOW, peer }));
    const dir = await folderWith([
      heard("10.0.0.1", 0, { facts: { contestedUntil: NOW + MINUTE, shippers } }),
    ]);
    expect(problem(await look(dir), "contested")).toMatchObject({
      title: "1 name is claimed by two shippers",
      text: "10.0.0.1: from 10.0.3.7 and 10.0.3.8",
    });
  });

  test("a mute keeps silence out of the problems, and nothing else", async () => {
    const lost = { facts: { gone: 7 }, lost: 5 };
    const dir = await folderWith([
      heard("10.0.0.1", 20, lost),
      "failed/accessLog_26112209_40-59_10-0-0-1.log",
    ]);
    const mute = { until: NOW + MINUTE, at: NOW, by: "root", reason: "kernel" };
    const seen = await look(
      dir,
      {},
      { mutes: { "10.0.0.1": mute, "10.0.0.2": { ...mute, until: NOW - 1 } } },
    );
    expect(seen.problems.map(({ key }) => key)).toEqual(["failed"]);
    expect(seen.hosts[0]).toMatchObject({ state: "silent", muted: mute, lost: 5, gone: 7 });
    expect(Object.keys(seen.mutes)).toEqual(["10.0.0.1"]);
  });

  test("a time of a clock that was ahead counts from when it was first seen", async () => {
    const dir = await folderWith([heard("10.0.0.1", -24 * 60)]);
    const future = {};
    expect(states(await look(dir, {}, { future }))).toEqual({ "10.0.0.1": "ok" });
    expect(states(await look(dir, {}, { future, now: NOW + 6 * MINUTE }))).toEqual({ "10.0.0.1": "silent" });
  });

  test("leaves alone what is no sender's folder", async () => {
    const dir = await folderWith([
      heard("10.0.0.1", 0, {
        sealed: { "accessLog_26112210_00-19_10-0-0-1.log": { name: "", bytes: 1, lines: 1, at: 1 } },
      }),
      heard("10.0.0.1.bak", 600, {
        sealed: { "accessLog_26112210_00-19_10-0-0-1.log": { name: "", bytes: 1, lines: 1, at: 1 } },
      }),
      "lost+found/x",
      "notes/x",
      "10.0.0.5/.ledger",
    ]);
    const seen = await look(dir);
    expect(states(seen)).toEqual({ "10.0.0.1": "ok" });
    expect(seen.problems).toEqual([]);
  });

  test("counts batches and bytes of a sender, its curve, and what its ledger says", async () => {
    const name = (window: string, end = "") => `accessLog_261122${window}_10-0-0-1.log${end}`;
    const open = { [name("10_40-59")]: { bytes: 11, lines: 1, endsAt: 0, at: NOW } };
    const sealed = Object.fromEntries(
      ["10_00-19", "10_20-39", "09_00-19"].map((w) => [
        name(w),
        { name: name(w), bytes: 100, lines: 5, at: NOW - 20 * MINUTE },
      ]),
    );
    const minute = Math.floor(NOW / MINUTE);
    const minutes = { [minute]: 99, [minute - 1]: 7, [minute - 240]: 3 };
    const facts = {
      lag: 42,
      skipped: 3,
      untimed: 2,
      ahead: 1,
      agent: "log-rt-sync/2.0.0",
      peer: "10.9.9.9",
      through: NOW,
    };
    const dir = await folderWith([
      heard("10.0.0.1", 0, { open, sealed, minutes, facts, lost: 5 }),
      `10.0.0.1/${name("10_00-19")}`,
      `10.0.0.1/${name("10_20-39")}`,
      `10.0.0.1/${name("10_40-59", ".part")}`,
      "failed/accessLog_26112209_40-59_10-0-0-1.log",
    ]);
    const [host] = (await look(dir, {}, { details: 9 })).hosts;
    expect(host).toMatchObject({
      ...{
        host: "10.0.0.1",
        state: "ok",
        open: 1,
        waiting: 2,
        failed: 1,
        lag: 42,
        lost: 5,
        undelivered: 211,
      },
      ...{ skipped: 3, untimed: 2, ahead: 1, agent: "log-rt-sync/2.0.0", peer: "10.9.9.9", through: NOW },
      delivered: "26112209_00-19",
    });
    expect(host?.linesPerMinute).toHaveLength(240);
    expect([host?.linesPerMinute.at(0), host?.linesPerMinute.at(-1)]).toEqual([3, 7]);
    expect((await look(dir)).hosts[0]?.linesPerMinute).toEqual([]);
  });
});

test("what a sender's program says of itself goes there and back, whatever the file's name", () => {
  const name = "log-rt-sync/2.0.0";
  for (const agent of [
    { name, lacksLog: false, lostIn: undefined },
    { name, lacksLog: true, lostIn: undefined },
    { name, lacksLog: false, lostIn: "access.log.2.gz" },
    { name, lacksLog: true, lostIn: "a" },
  ])
    expect(parseAgent(formatAgent(agent))).toEqual(agent);
  const odd = formatAgent({ name, lacksLog: true, lostIn: `caf\u00e9 (no log)\n${"x".repeat(300)}` });
  expect(odd).toMatch(/^[\x20-\x7e]{64}$/);
  expect(parseAgent(odd)).toMatchObject({
    name,
    lacksLog: true,
    lostIn: expect.stringContaining("caf???no?log??xxx"),
  });
  expect(parseAgent("vector/0.1 (linux) (lost")).toEqual({
    name: "vector/0.1",
    lacksLog: false,
    lostIn: undefined,
  });
});

test("observe() tells a sender that lacks a log, and leaves that out of the name of its program", async () => {
  const facts = { agent: "log-rt-sync/2.0.0 (no log)" };
  const dir = await folderWith([heard("10.0.0.1", 0, { facts }), heard("10.0.0.2", 60, { facts })]);
  const snapshot = await look(dir);
  expect(problem(snapshot, "no log")).toMatchObject({ title: "1 sender lacks a log", hosts: ["10.0.0.1"] });
  expect(snapshot.hosts[0]?.agent).toBe("log-rt-sync/2.0.0");
  const mutes = { "10.0.0.1": { until: NOW + MINUTE, at: NOW, by: "anna" } };
  expect(problem(await look(dir, {}, { mutes }), "no log")).toBeUndefined();
});

describe("observe(): delivery", () => {
  const batch = "accessLog_26112210_00-19_10-0-0-1.log";
  const sealedAt = (minutes: number) => ({
    [batch]: { name: batch, bytes: 1, lines: 1, at: NOW - minutes * MINUTE },
  });

  test("a batch's age is not changed by chmod, a link or a clock", async () => {
    const dir = await folderWith([heard("10.0.0.1", 0, { sealed: sealedAt(31) }), `10.0.0.1/${batch}`]);
    const file = join(dir, "10.0.0.1", batch);
    await utimes(file, new Date(NOW - 40 * MINUTE), new Date(NOW - 40 * MINUTE));
    await chmod(file, 0o600);
    await link(file, join(dir, "copy"));
    expect((await stat(file)).ctimeMs).toBeGreaterThan(NOW - MINUTE);
    expect(problem(await look(dir), "late")?.title).toMatch(/^1 batch waits since \d\d:\d\d$/);
    await utimes(file, new Date(NOW + 9e9), new Date(NOW + 9e9));
    expect(problem(await look(dir), "late")).toBeDefined();
    expect(problem(await look(dir, { deliveryMinutes: 32 }), "late")).toBeUndefined();
  });

  test("the oldest is the one that waits longest, also beside one that was sent back and one of the future", async () => {
    const name = (minute: string) => `accessLog_26112209_${minute}_10-0-0-1.log`;
    const at = { "00-19": NOW - 90 * MINUTE, "20-39": NOW - 50 * MINUTE, "40-59": NOW + 9e9 };
    const sealed = Object.fromEntries(
      Object.entries(at).map(([minute, time]) => [
        name(minute),
        { name: name(minute), bytes: 1, lines: 1, at: time },
      ]),
    );
    const files = Object.keys(sealed).map((file) => `10.0.0.1/${file}`);
    const dir = await folderWith([heard("10.0.0.1", 0, { sealed }), ...files]);
    const touch = (minute: string, time: number) =>
      utimes(join(dir, "10.0.0.1", name(minute)), new Date(time), new Date(time));
    await touch("00-19", NOW - 10 * MINUTE); // sent back by --resend
    await touch("20-39", NOW - 55 * MINUTE);
    await touch("40-59", NOW + 9e9);
    const [host] = (await look(dir)).hosts;
    expect([host?.oldest, host?.waitingSince]).toEqual([name("20-39"), NOW - 50 * MINUTE]);
  });

  test("tells that no forwarder is running, by the time of its state file", async () => {
    const dir = await folderWith([
      [".forwarder-state.json", JSON.stringify({ version: 1, at: 1, ok: true, failed: {}, stays: true })],
    ]);
    const alive = (minutes: number) =>
      utimes(join(dir, ".forwarder-state.json"), new Date(), new Date(NOW - minutes * MINUTE));
    await alive(1);
    expect((await look(dir)).problems).toEqual([]);
    await alive(4);
    expect(problem(await look(dir), "no forwarder")).toMatchObject({
      title: "no forwarder is running",
      text: expect.stringMatching(/^Last sign of life \d\d:\d\d, 4m 0s ago; 0 batches wait$/),
      next: ["systemctl status log-rt-sync-forwarder", expect.anything()],
    });
  });

  test("tells what holds the forwarder up, and mails what mends itself only when it lasts", async () => {
    const state = (kind: string) => ({
      version: 1,
      at: NOW,
      ok: false,
      failed: {},
      fault: { kind, text: "refused", since: NOW },
    });
    const dir = await folderWith([[".forwarder-state.json", JSON.stringify(state("connection"))]]);
    expect(problem(await look(dir), "forwarder connection")).toMatchObject({
      title: "the client's server can't be reached",
      mailFrom: NOW + 30 * MINUTE,
    });
    await writeFile(join(dir, ".forwarder-state.json"), JSON.stringify(state("host key")));
    expect(problem(await look(dir), "forwarder host key")?.mailFrom).toBeUndefined();
  });
});

describe("observe(): what can't be seen", () => {
  test("what can be seen is judged, what can't is a problem of its own", async () => {
    const dir = await folderWith([
      heard("10.0.0.1", 6),
      "10.0.0.2/.ledger/x",
      [".forwarder-state.json", "{"],
      "failed",
      [".receiver-5001.json", "{}"],
    ]);
    const seen = await look(dir);
    expect(states(seen)).toEqual({ "10.0.0.1": "silent" });
    const blind = problem(seen, "unreadable");
    expect(blind).toMatchObject({ title: "4 files or folders can't be read", hosts: ["10.0.0.2"] });
    for (const name of [".forwarder-state.json", "failed", ".receiver-5001.json", "10.0.0.2"])
      expect(blind?.text).toContain(join(dir, name));
    expect(seen.disk?.total).toBeGreaterThan(0);
  });

  test("a folder that is not there is told, and nothing is thrown", async () => {
    const seen = await look(join(await tempFolder(), "none"), { expected: ["10.0.0.1"] });
    expect(problem(seen, "folder")?.text).toContain("ENOENT");
    expect(states(seen)).toEqual({ "10.0.0.1": "never" });
  });

  test("a receiver that can't store lines for want of room is a problem of the disk", async () => {
    const dir = await folderWith([receiver(5001, { health: "the disk is full", healthSince: NOW - MINUTE })]);
    expect((await look(dir)).problems).toMatchObject([
      { key: "receiver 5001", leg: "disk", text: "the disk is full" },
    ]);
  });

  test("the page tells that no monitor runs, and what it could not send", async () => {
    const dir = await folderWith([]);
    const monitorFile = join(await tempFolder(), "monitor.json");
    const undeliverable = [{ to: "ops@example.com", subject: "S", reason: "554 spam", at: NOW - MINUTE }];
    const mutes = { "*": { until: NOW + MINUTE, at: NOW, by: "root" } };
    await writeFile(monitorFile, JSON.stringify({ version: 2, at: NOW - 16 * MINUTE, undeliverable, mutes }));
    const seen = await look(dir, {}, { monitorFile });
    expect(seen.problems.map(({ key }) => key)).toEqual(["undeliverable", "no monitor"]);
    expect(Object.keys(seen.mutes)).toEqual(["*"]);
  });
});

test("createStatusReader() looks at the folder once for many that ask, and again after two seconds", async () => {
  const dir = await folderWith(["a/.ledger"]);
  let now = NOW;
  const ledgerOf = (): Ledger => ({ ...emptyLedger(), heardAt: NOW });
  const read = createStatusReader(dir, () => DEFAULT_THRESHOLDS, { ledgerOf, now: () => now });
  expect((await Promise.all([read(), read()])).map(({ hosts }) => hosts.length)).toEqual([1, 1]);
  await mkdir(join(dir, "b"));
  now += 1000;
  expect((await read()).hosts).toHaveLength(1);
  now += 2000;
  expect((await read()).hosts).toHaveLength(2);
});

test("createStatusReader() lets nobody wait for a look at many senders: they see the one before", async () => {
  const dir = await folderWith(Array.from({ length: 201 }, (_, i) => `a${i}/.ledger`));
  let now = NOW;
  const ledgerOf = (): Ledger => ({ ...emptyLedger(), heardAt: NOW });
  const read = createStatusReader(dir, () => DEFAULT_THRESHOLDS, { ledgerOf, now: () => now });
  expect((await read()).hosts).toHaveLength(201);
  await mkdir(join(dir, "b"));
  now += 29_000;
  expect((await read()).hosts).toHaveLength(201);
  await until("the next ones see the new look", async () => (await read()).hosts.length === 202);
  await mkdir(join(dir, "c"));
  now += 31_000; // too old to be shown
  expect((await read()).hosts).toHaveLength(203);
});

test("observe() says nothing of a disk that has no size", async () => {
  const seen = await observe("/proc/sys", DEFAULT_THRESHOLDS, { now: NOW });
  expect(seen.disk).toBeUndefined();
  expect(problem(seen, "disk")).toBeUndefined();
});
