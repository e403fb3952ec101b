/** The chaos run: its judge sees every kind of fault, and a minute of chaos leaves none. */
import { describe, expect, test } from "bun:test";
import { readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { crc32 } from "node:zlib";
import { checkMails, runChaos } from "../bench/chaos.ts";
import { type Circumstances, checkDelivery, type Written } from "../bench/checker.ts";
import { createProxy } from "../bench/proxy.ts";
import { createRandom } from "../bench/random.ts";
import { createWriter } from "../bench/writer.ts";
import { onCleanup, tempFolder, until } from "./support.ts";

const WINDOW = "26112206_20-39";
const NAME = `accessLog_${WINDOW}_10-1-0-1.log`;
const writers: Written[] = [{ host: "10-1-0-1", lines: 4 }];

function line(n: number, { w = 0, g = 0, window = WINDOW, text = "a" } = {}): string {
  const body = Buffer.from(`10.0.0.1 "GET /w${w}/g${g}/n${n}/${window} HTTP/1.1" ${text} `, "latin1");
  return `${body.toString("latin1")}${crc32(body).toString(16).padStart(8, "0")}\n`;
}

/** Checks files, by name, and a report of them. */
async function judge(files: Record<string, string>, told?: string) {
  const folder = await tempFolder();
  const report = join(await tempFolder(), "report.log");
  const count = (text: string) => text.split("\n").length - 1;
  for (const [name, text] of Object.entries(files)) writeFileSync(join(folder, name), text, "latin1");
  const lines = Object.entries(files).map(
    ([name, text]) => `2026-11-22 06:45:01 | ${name} | lines=${count(text)} | status=Sent\n`,
  );
  writeFileSync(report, told ?? lines.join(""));
  const {
    lines: _lines,
    files: _files,
    examples: _examples,
    ...counts
  } = checkDelivery(folder, writers, { report });
  return Object.fromEntries(Object.entries(counts).filter(([, n]) => n > 0));
}

const [a, b, c, d] = [0, 1, 2, 3].map((n) => line(n)) as [string, string, string, string];

describe("checkDelivery()", () => {
  test("finds nothing in a perfect delivery, over several parts", async () => {
    expect(await judge({ [NAME]: a + b, [NAME.replace(".log", ".2.log")]: c + d })).toEqual({});
  });
  test("finds a missing line", async () => {
    expect(await judge({ [NAME]: a + b + d })).toEqual({ missing: 1 });
  });
  test("finds a line that is there twice, also in another file", async () => {
    expect(await judge({ [NAME]: a + b + b + c + d })).toEqual({ twice: 1 });
    expect(await judge({ [NAME]: a + b + c + d, [NAME.replace(".log", ".2.log")]: b })).toEqual({ twice: 1 });
  });
  test("finds a line in the file of another window, or of another host", async () => {
    expect(await judge({ [NAME]: a + b + c + line(3, { window: "26112206_40-59" }) })).toEqual({
      misfiled: 1,
    });
    expect(await judge({ [NAME]: a + b + c, [NAME.replace("0-1.log", "0-2.log")]: d })).toEqual({
      misfiled: 1,
    });
  });
  test("finds lines out of order within a source file, and allows files side by side", async () => {
    expect(await judge({ [NAME]: a + c + b + d })).toEqual({ outOfOrder: 1 });
    expect(await judge({ [NAME]: a + line(2, { g: 1 }) + b + line(3, { g: 1 }) })).toEqual({});
  });
  test("finds a changed byte, a line that nobody wrote, and a line that is cut short", async () => {
    expect(await judge({ [NAME]: a + b + c + d.replace(" a ", " b ") })).toEqual({ corrupt: 1, missing: 1 });
    expect(await judge({ [NAME]: a + b + c + d + line(4) })).toEqual({ corrupt: 1 });
    expect(await judge({ [NAME]: a + b + c + d.slice(0, -1) }, "")).toEqual({
      corrupt: 1,
      missing: 1,
      misreported: 1,
    });
  });
  test("finds files that are no batches", async () => {
    expect(await judge({ [NAME]: a + b + c + d, [`${NAME}.tmp`]: "" })).toMatchObject({ stray: 1 });
  });
  test("finds a batch that is not reported, reported twice, or with a wrong count", async () => {
    const told = (lines: number) => `2026-11-22 06:45:01 | ${NAME} | lines=${lines} | status=Sent\n`;
    const files = { [NAME]: a + b + c + d };
    expect(await judge(files, "")).toEqual({ misreported: 1 });
    expect(await judge(files, told(4) + told(4))).toEqual({ misreported: 1 });
    expect(await judge(files, told(3))).toEqual({ misreported: 1 });
    expect(await judge(files, told(4))).toEqual({});
  });
});

describe("checkDelivery() after the loss of a folder", () => {
  const CLOCK = NAME.replace(".log", ".1795300000.log");
  /** The files get their names, and their report lines but for `untold`, one after the other. */
  const count = async (
    files: [string, string][],
    losses: (times: number[]) => number[],
    around: Partial<Circumstances> & { untold?: string } = {},
  ) => {
    const folder = await tempFolder();
    const report = join(await tempFolder(), "report.log");
    const times: number[] = [];
    let told = "";
    for (const [name, text] of files) {
      const path = join(folder, name);
      writeFileSync(path, text, "latin1");
      times.push(statSync(path).ctimeMs);
      const lines = `lines=${text.split("\n").length - 1}`;
      if (name !== around.untold && !name.endsWith(".tmp"))
        told += `2026-11-22 06:45:01 | ${name} | ${lines} | status=Sent\n`;
      await new Promise((resolve) => setTimeout(resolve, 25)); // of another time
    }
    writeFileSync(report, told);
    const { again, twice, outOfOrder, missing, stray, misreported } = checkDelivery(folder, writers, {
      ...{ losses: losses(times), heartbeatMs: 0, report, ...around },
    });
    return { again, twice, outOfOrder, missing, stray, misreported };
  };
  const between = (a = 0, b = 0) => (a + b) / 2;
  const zeros = { twice: 0, outOfOrder: 0, missing: 0, stray: 0, misreported: 0 };

  test("what lies behind the first line that was not there may come again, once for a loss", async () => {
    // b was lost; c was delivered behind it and comes again
    const files: [string, string][] = [
      [NAME, a],
      [NAME.replace(".log", ".2.log"), c],
      [CLOCK, b + c + d],
    ];
    expect(await count(files, ([, at, next]) => [between(at, next)])).toEqual({ again: 1, ...zeros });
    expect(await count(files, () => [])).toEqual({ ...zeros, again: 0, twice: 1 });
  });
  test("what lies before it may not", async () => {
    const files: [string, string][] = [
      [NAME, a + b],
      [CLOCK, b + c + d],
    ];
    expect(await count(files, ([at, next]) => [between(at, next)])).toMatchObject({ again: 0, twice: 1 });
    expect(await count(files, ([at]) => [(at ?? 0) - 1])).toMatchObject({ again: 1, twice: 0 });
  });
  test("what was left out of a chunk makes the bound lower by so much", async () => {
    const files: [string, string][] = [
      [NAME, a + b],
      [CLOCK, b + c + d],
    ];
    const loss = ([at, next]: number[]) => [between(at, next)];
    expect(await count(files, loss, { leftOutLines: 1 })).toEqual({ again: 1, ...zeros });
  });
  test("all of a host that lost its cursor after it may come again, once, and of no other host", async () => {
    const files: [string, string][] = [
      [NAME, a + b + c + d],
      [CLOCK, a + b],
    ];
    const loss = ([at, next]: number[]) => [between(at, next)];
    const forget = (host: string, at: number) => ({ forgets: [{ host, at }] });
    const after = Date.now() + 60_000;
    expect(await count(files, loss, forget("10-1-0-1", after))).toEqual({ again: 2, ...zeros });
    expect(await count(files, loss, forget("10-1-0-2", after))).toMatchObject({ again: 0, twice: 2 });
    expect(await count(files, loss, forget("10-1-0-1", 1))).toMatchObject({ again: 0, twice: 2 });
  });
  test("a batch that was not reported yet was not delivered; half an upload of before stays", async () => {
    const files: [string, string][] = [
      [NAME, a + b],
      [`${NAME}.tmp`, ""],
      [CLOCK, a + b + c + d],
    ];
    const loss = ([, at, next]: number[]) => [between(at, next)];
    expect(await count(files, loss, { untold: NAME })).toEqual({ ...zeros, again: 2 });
    const forwarderLog = join(await tempFolder(), "forwarder.log");
    writeFileSync(forwarderLog, `2026-11-22T06:45:01.000Z info batch delivered batch=${NAME} lines=2\n`);
    expect(await count(files, loss, { untold: NAME, forwarderLog })).toMatchObject({ misreported: 1 });
    expect(await count(files, () => [], { untold: NAME })).toMatchObject({
      stray: 1,
      misreported: 1,
      twice: 2,
    });
  });
  test("a batch that was reported, and was not in sent/ when the folder was lost, was not delivered", async () => {
    const files: [string, string][] = [
      [NAME, a + b],
      [CLOCK, a + b + c + d],
    ];
    const forwarderLog = join(await tempFolder(), "forwarder.log");
    const log = (name: string) =>
      writeFileSync(forwarderLog, `2026-11-22T06:45:01.000Z info batch delivered batch=${name} lines=2\n`);
    const loss = ([at, next]: number[]) => [between(at, next)];
    log(CLOCK);
    expect(await count(files, loss, { forwarderLog })).toEqual({ again: 2, ...zeros });
    log(NAME);
    expect(await count(files, loss, { forwarderLog })).toMatchObject({ again: 0, twice: 2 });
  });
  test("leaves out the batches of a hostile host, and digests", async () => {
    const folder = await tempFolder();
    writeFileSync(join(folder, NAME), a + b + c + d, "latin1");
    writeFileSync(join(folder, `accessLog_${WINDOW}_10-6-6-6.log`), "anything\n");
    writeFileSync(join(folder, "accessLog_26112206.2.sha256"), "");
    expect(checkDelivery(folder, writers, { hostile: "10-6-6-6" })).toMatchObject({
      ...{ files: 1, lines: 4, missing: 0, corrupt: 0, stray: 0 },
    });
  });
});

describe("checkMails()", () => {
  const outage = { host: "10.1.0.1", from: 1000, to: 2000 };
  const mail = (at: number, text: string) => ({ at, subject: `10.1.0.1 ${text}`, text: "" });

  test("wants a mail when a host is silent and one when it is back", () => {
    expect(checkMails([mail(1500, "is silent"), mail(2500, "is back")], [outage], 0)).toMatchObject({
      missing: 0,
      twice: 0,
    });
    expect(checkMails([mail(1500, "is silent")], [outage], 0)).toMatchObject({ missing: 1 });
    expect(checkMails([], [outage], 0)).toMatchObject({ missing: 2 });
    expect(checkMails([mail(1500, "is flapping")], [outage], 0)).toMatchObject({ missing: 0 });
    expect(checkMails([{ ...mail(1500, "is flapping"), subject: "other" }], [outage], 0)).toMatchObject({
      missing: 2,
    });
  });
  test("takes a mail that comes late, but not one about the next outage", () => {
    const next = { host: "10.1.0.1", from: 5000, to: 6000 };
    const back = [mail(4000, "is back"), mail(7000, "is back")];
    const late = [mail(3000, "is silent"), mail(5500, "is silent"), ...back];
    expect(checkMails(late, [outage, next], 0)).toMatchObject({ missing: 0 });
    expect(checkMails([mail(5500, "is silent"), ...back], [outage, next], 0)).toMatchObject({ missing: 1 });
  });
  test("takes a host for told that was told to be silent before, and not to be back", () => {
    const standing =
      "* 10.1.0.2 back after 5m\n  Its shipper is heard again.\n\nAlso wrong: 10.1.0.1 silent or never seen.\n";
    const other = { at: 950, subject: "10.1.0.2 back after 5m", text: standing };
    expect(checkMails([other, mail(2500, "is back")], [outage], 0)).toMatchObject({ missing: 0 });
    const mails = [mail(900, "is silent"), mail(2500, "is back")];
    expect(checkMails(mails, [outage], 0)).toMatchObject({ missing: 0, twice: 0 });
    expect(checkMails([mail(900, "is silent"), mail(950, "is back")], [outage], 0)).toMatchObject({
      missing: 2,
    });
    expect(checkMails([mail(900, "is never seen"), mail(2500, "is back")], [outage], 0)).toMatchObject({
      missing: 1,
    });
  });
  test("allows no more repeats than the monitor was killed", () => {
    const mails = [mail(1500, "is silent"), mail(1600, "is silent"), mail(2500, "is back")];
    expect(checkMails(mails, [outage], 0)).toMatchObject({ twice: 1 });
    expect(checkMails(mails, [outage], 1)).toMatchObject({ twice: 0 });
  });
});

test("createWriter() writes what the checker reads, over every kind of rotation", async () => {
  const folder = await tempFolder();
  const path = join(folder, "access.log");
  const writer = createWriter({
    id: 0,
    host: "10-1-0-1",
    path,
    linesPerSecond: 2000,
    startMs: Date.UTC(2026, 10, 22, 0, 20),
    clockSpeed: 1,
    zone: 360,
    dated: false,
    random: createRandom(5),
  });
  for (const kind of ["rename", "rename late create", "copytruncate"] as const) {
    const before = writer.lines;
    await until("lines before the rotation", () => writer.lines > before + 100);
    await writer.rotate(kind, "never", 50);
  }
  await writer.stop();
  const texts = [`${path}.3`, `${path}.2`, `${path}.1`, path].map((file) => readFileSync(file, "latin1"));
  const lines = texts.join("").replaceAll(/.*health check"\n/g, "");
  expect(lines.length).toBe(writer.bytes);
  const client = await tempFolder();
  writeFileSync(join(client, NAME), lines, "latin1");
  expect(checkDelivery(client, [{ host: "10-1-0-1", lines: writer.lines }])).toMatchObject({
    lines: writer.lines,
    missing: 0,
    twice: 0,
    misfiled: 0,
    outOfOrder: 0,
    corrupt: 0,
  });
});

test("createProxy() passes bytes, stalls them, cuts in mid-message and refuses", async () => {
  const { createServer } = await import("node:http");
  const server = createServer((_request, response) => response.end("x".repeat(1000)));
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  const proxy = await createProxy((server.address() as { port: number }).port);
  onCleanup(() => proxy.close());
  const get = async () => {
    try {
      const signal = AbortSignal.timeout(10_000);
      const response = await fetch(`http://127.0.0.1:${proxy.port}`, { keepalive: false, signal });
      return (await response.text()).length;
    } catch {
      return 0;
    }
  };
  expect(await get()).toBe(1000);
  proxy.cutAfter(500);
  expect(await get()).toBe(0);
  expect(await get()).toBe(1000);
  proxy.refuse(60_000);
  expect(await get()).toBe(0);
  proxy.heal();
  expect(await get()).toBe(1000);
  proxy.stall(300);
  const from = performance.now();
  expect(await get()).toBe(1000);
  expect(performance.now() - from).toBeGreaterThan(250);
});

test("createRandom() repeats itself for the same seed alone", () => {
  const take = (seed: number) => {
    const random = createRandom(seed);
    return Array.from({ length: 8 }, () => random.between(1, 1000));
  };
  expect(take(3)).toEqual(take(3));
  expect(take(3)).not.toEqual(take(4));
});

test("a minute of chaos: nothing missing, twice, misfiled, out of order or corrupt, every mail sent", async () => {
  const quiet = { watch: () => {}, note: () => {}, end: () => {} };
  const minutes = Number(process.env.CHAOS_MINUTES ?? 1);
  const seed = Number(process.env.CHAOS_SEED ?? 1);
  // The loss of the receiver's folder has its own test, test/wipe.test.ts, where nothing else goes wrong beside it.
  const losses = Number(process.env.CHAOS_LOSSES ?? 0);
  const result = await runChaos({ minutes, seed, linesPerSecond: 2500, losses }, quiet);
  if (result.passed) rmSync(result.folder, { recursive: true, force: true });
  expect(result).toMatchObject({
    missing: 0,
    twice: 0,
    misfiled: 0,
    outOfOrder: 0,
    corrupt: 0,
    stray: 0,
    misreported: 0,
    mailsMissing: 0,
    mailsTwice: 0,
    crashes: 0,
    badExits: 0,
    unverified: 0,
  });
}, 240_000);
