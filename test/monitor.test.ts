import { expect, test } from "bun:test";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage } from "node:http";
import { join } from "node:path";
import { type ParsedMail, simpleParser } from "mailparser";
import { SMTPServer } from "smtp-server";
import { parseConfig } from "../lib/config.ts";
import { holdLock } from "../lib/durable.ts";
import { judge } from "../lib/incident.ts";
import { formatRecord, type LedgerRecord } from "../lib/ledger.ts";
import { renderAlert } from "../lib/mail/alertmail.ts";
import { escapeHtml } from "../lib/mail/mailpage.ts";
import { summariseHour } from "../lib/mail/summary.ts";
import { renderSummary } from "../lib/mail/summarymail.ts";
import { emptyState, type MonitorState, type Notice } from "../lib/notice.ts";
import { appendReport } from "../lib/report.ts";
import { createLog } from "../lib/service.ts";
import type { Sight } from "../lib/sight.ts";
import { forwarderStatePath } from "../lib/status.ts";
import { checkOnce } from "../monitor.ts";
import { onCleanup, runScriptOnce, startScript, tempFolder, until, writeConfig } from "./support.ts";

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const NOON = Date.UTC(2026, 10, 22, 12);

// ---- judging, as a pure function

const RULES = {
  expected: ["a", "b"],
  silentMinutes: 5,
  silentMinutesByHost: {},
  alertWhenQuiet: false,
  remindMinutes: 240,
  minFreePercent: 10,
};

/** What is seen at a time: the senders with when they were heard, in minutes before that time. */
function see(hosts: Record<string, number>, now: number, more: Partial<Sight> = {}): Sight {
  const seen = Object.entries(hosts).map(([host, minutes]) => {
    const at = now - minutes * MINUTE;
    return { host, heardAt: at, lineAt: at, lost: 0, lag: 0 };
  });
  return { hosts: seen, receivers: [], faults: [], uptime: now - NOON + HOUR, ...more };
}

const subjects = (state: MonitorState) =>
  state.queue.map((notice) => renderAlert(notice as Extract<Notice, { kind: "alert" }>).subject);

test("judge() tells several changes of one run in one notice, and all senders at once in a word", () => {
  const state = judge(emptyState("i"), see({ a: 0, b: 0 }, NOON), RULES, NOON);
  expect(state.queue).toEqual([]);
  const after = judge(state, see({ a: 6, b: 7 }, NOON + 6 * MINUTE), RULES, NOON + 6 * MINUTE);
  expect(subjects(after)).toEqual(["All 2 senders silent: receiver or network down?"]);
});

test("judge() takes a clock that is set, forwards or back, for what it is", () => {
  for (const step of [HOUR, -HOUR]) {
    let state = judge(emptyState("i"), see({ a: 0, b: 0 }, NOON), RULES, NOON);
    const at = { a: NOON, b: NOON + 30_000 }; // b was heard between the last run and the step
    const hosts = Object.entries(at).map(([host, heardAt]) => ({
      host,
      heardAt,
      lineAt: heardAt,
      lost: 0,
      lag: 0,
    }));
    for (let minute = 1; minute <= 8; minute++) {
      const now = NOON + step + minute * MINUTE;
      state = judge(state, { hosts, receivers: [], faults: [], uptime: HOUR + minute * MINUTE }, RULES, now);
      const told = state.queue.flatMap((notice) => (notice.kind === "alert" ? notice.changes : []));
      if (minute < 5) expect(told).toEqual([]);
      if (minute > 5) expect(told.map(({ title }) => title)).toEqual(["a", "b"]); // silent for five real minutes
    }
  }
});

test("judge() waits for senders after the start of the machine", () => {
  const state = judge(emptyState("i"), see({ a: 30, b: 30 }, NOON, { uptime: 2 * MINUTE }), RULES, NOON);
  expect(state.queue).toEqual([]);
});

test("judge() does not blame senders for a receiver that is down, except those of another one", () => {
  const down = { key: "receiver x", title: "Receiver x not well", text: "" };
  let state = judge(emptyState("i"), see({ a: 0, b: 0 }, NOON), RULES, NOON);
  for (let minute = 1; minute <= 20; minute++) {
    const now = NOON + minute * MINUTE;
    const b = Math.max(0, minute - 4); // is served by another receiver, and falls silent by itself
    state = judge(state, see({ a: minute, b }, now, { receivers: [down] }), RULES, now);
  }
  expect(subjects(state)).toEqual(["Receiver x not well", "b silent since 12:04"]);
  const now = NOON + 21 * MINUTE;
  state = judge(state, see({ a: 21, b: 17 }, now), RULES, now);
  expect(subjects(state).slice(2)).toEqual(["Over: Receiver x not well, lasted 20m 0s"]);
});

test("judge() alerts on a quiet sender only if told so", () => {
  const quiet = (now: number): Sight => ({
    ...see({ b: 0 }, now),
    hosts: [{ host: "a", heardAt: now, lineAt: now - HOUR, lost: 0, lag: 0 }],
  });
  const rules = { ...RULES, expected: ["a"] };
  expect(judge(emptyState("i"), quiet(NOON), rules, NOON).queue).toEqual([]);
  const state = judge(emptyState("i"), quiet(NOON), { ...rules, alertWhenQuiet: true }, NOON);
  expect(subjects(state)).toEqual(["a quiet since 11:00"]);
});

test("judge() tells bytes lost once, and what was lost further an hour later", () => {
  const rules = { ...RULES, expected: ["a"] };
  const lost = (bytes: number, now: number): Sight => ({
    ...see({}, now),
    hosts: [{ host: "a", heardAt: now, lineAt: now, lost: bytes, lag: 0 }],
  });
  let state = emptyState("i");
  for (let minute = 0; minute <= 60; minute++) {
    const now = NOON + minute * MINUTE;
    state = judge(state, lost(2048 + minute * 1024, now), rules, now);
  }
  expect(subjects(state)).toEqual([
    "a lost 2.0 KiB before they were read",
    "a lost 60.0 KiB before they were read",
  ]);
});

test("judge() has a margin around a disk that is nearly full", () => {
  let state = judge(emptyState("i"), see({ a: 0, b: 0 }, NOON, { freePercent: 9.9 }), RULES, NOON);
  for (const [minute, freePercent] of [11, 9, 11.9, 12.1, 11].entries()) {
    const now = NOON + (minute + 1) * MINUTE;
    state = judge(state, see({ a: 0, b: 0 }, now, { freePercent }), RULES, now);
  }
  expect(subjects(state)).toEqual([
    "Disk nearly full: 9.9 % of the disk is free, expected 10 %",
    "Over: Disk nearly full, lasted 4m 0s",
  ]);
});

test("judge() keeps an incident in one thread", () => {
  const rules = { ...RULES, expected: ["a"] };
  const minutes = [0, 6, 246, 247];
  let state = emptyState("i");
  for (const [i, minute] of minutes.entries()) {
    const now = NOON + minute * MINUTE;
    state = judge({ ...state, queue: [] }, see({ a: i === 0 || i === 3 ? 0 : minute }, now), rules, now);
    const [notice] = state.queue;
    if (i > 1) expect(notice?.references).toEqual([`alert-i-${NOON + 6 * MINUTE}`]);
    else expect(notice?.references ?? []).toEqual([]);
  }
  expect(subjects(state)).toEqual(["a back after 4h 7m"]);
});

test("renderAlert() reminds of what flaps and is well for the moment as flapping, not as gone", () => {
  const mail = { kind: "alert", id: "x", at: NOON, references: [], counts: {} } as const;
  const change = { kind: "reminder", text: "", status: "ok", since: NOON } as const;
  const sender = renderAlert({ ...mail, references: [], changes: [{ ...change, title: "a", sender: true }] });
  expect(sender.subject).toBe("a is still flapping");
  expect(sender.text).toContain("It goes and comes.");
  const fault = renderAlert({ ...mail, references: [], changes: [{ ...change, title: "F", sender: false }] });
  expect(fault.subject).toBe("F is still flapping");
});

// ---- whole runs

async function setUp(more: object = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "batches");
  await mkdir(dir);
  const mails = join(folder, "mails");
  const section = {
    dir,
    minFreePercent: 0,
    stateFile: join(folder, "monitor.json"),
    report: join(folder, "report.log"),
    mail: { smtp: `file://${mails}`, from: "logs@example.com", to: ["ops@example.com"], subjectPrefix: "" },
    ...more,
  };
  const config = parseConfig(JSON.stringify({ monitor: section }), "monitor");
  const file = await writeConfig(folder, { monitor: section });
  const received = async (): Promise<ParsedMail[]> => {
    const names = (await readdir(mails).catch(() => [])).filter((name) => name.endsWith(".eml"));
    return Promise.all(names.sort().map(async (name) => simpleParser(await readFile(join(mails, name)))));
  };
  return { folder, dir, config, file, received };
}

async function writeLedger(dir: string, host: string, record: LedgerRecord, sealed: object[] = []) {
  await mkdir(join(dir, host), { recursive: true });
  await writeFile(join(dir, host, ".ledger"), formatRecord({ v: 1, ...record }));
  const lines = sealed.map((batch) => formatRecord(batch as Parameters<typeof formatRecord>[0]));
  await writeFile(join(dir, host, ".ledger-sealed"), lines.join(""));
}

function runAt(config: Parameters<typeof checkOnce>[0]["config"], at: number) {
  const signal = new AbortController().signal;
  const logged: string[] = [];
  const log = createLog((line) => logged.push(line));
  const run = checkOnce({ config, log, signal, now: () => at, uptime: () => at - NOON + 240 * HOUR });
  return run.then((healthy) => ({ healthy, log: logged.join("") }));
}

test("checkOnce() tells what the forwarder met, what failed and what waits too long", async () => {
  const { dir, config, received } = await setUp();
  const name = "accessLog_26112206_20-39_10-0-0-1.log";
  await mkdir(join(dir, "failed"));
  await writeFile(join(dir, "failed", name), "x\n");
  await mkdir(join(dir, "10.0.0.1"));
  await writeFile(join(dir, "10.0.0.1", "accessLog_26112206_40-59_10-0-0-1.log"), "x\n");
  const fault = { kind: "host key", text: "the server shows SHA256:x", since: Date.now() };
  const failed = { [name]: { attempts: 3, nextAt: 0, reason: "quota exceeded" } };
  await writeFile(forwarderStatePath(dir), JSON.stringify({ version: 1, at: 0, ok: false, fault, failed }));
  await runAt(config, Date.now() + 31 * MINUTE);
  const [mail] = await received();
  expect(mail?.text).toContain("Delivery is late\n  1 batch waits, the oldest accessLog_26112206_40-59");
  expect(mail?.text).toContain("Host key refused\n  the server shows SHA256:x");
  expect(mail?.text).toContain(`Delivery failed\n  accessLog_26112206_20-39_10-0-0-1.log: quota exceeded`);
});

test("checkOnce() starts from what it sees when the state file is unreadable, and says so", async () => {
  const { config, received } = await setUp({ expected: ["10.0.0.1"] });
  for (const text of ["", '{"version":9}', "\0\0\0\0"]) {
    await writeFile(config.stateFile, text);
    const { healthy, log } = await runAt(config, NOON);
    expect(healthy).toBe(true);
    expect(log).toContain("state file unreadable");
  }
  const seen = (await received()).map(({ subject }) => subject);
  expect(seen.filter((subject) => subject === "Monitor starts anew").length).toBe(3);
  expect(seen).toContain("10.0.0.1 never heard of");
});

test("checkOnce() posts each mail to the webhook, calls the heartbeat, and is not held up by either", async () => {
  let status = 500;
  const posted: { subject: string; text: string }[] = [];
  const called: string[] = [];
  const server = createServer(async (request: IncomingMessage, response) => {
    called.push(`${request.method} ${request.url}`);
    let body = "";
    for await (const part of request) body += part;
    if (request.method === "POST" && status === 200) posted.push(JSON.parse(body));
    response.writeHead(status).end();
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  const url = `http://127.0.0.1:${(server.address() as { port: number }).port}`;
  const { config, received } = await setUp({
    expected: ["10.0.0.1"],
    webhook: `${url}/hook-secret`,
    heartbeatUrl: `${url}/alive`,
  });
  const first = await runAt(config, NOON);
  expect(first.healthy).toBe(true);
  expect(first.log).toContain("webhook not reached");
  expect(first.log).not.toContain("hook-secret");
  expect(await received()).toHaveLength(1);
  status = 200;
  await runAt(config, NOON + MINUTE);
  await runAt(config, NOON + 2 * MINUTE);
  expect(posted.map(({ subject }) => subject)).toEqual(["10.0.0.1 never heard of"]);
  expect(called.filter((call) => call === "GET /alive")).toHaveLength(3);
  expect(await received()).toHaveLength(1);
});

test.each(["monitor:queued", "monitor:accepted"])(
  "monitor killed at %s: the mail comes, with one Message-ID",
  async (step) => {
    const { folder, file, received } = await setUp({ expected: ["10.0.0.1"] });
    expect((await runScriptOnce("monitor", file, [], { LOG_RT_SYNC_STOP_AT: step })).code).toBe("SIGKILL");
    expect(await received()).toHaveLength(step === "monitor:queued" ? 0 : 1);
    expect((await runScriptOnce("monitor", file)).code).toBe(0);
    expect(await received()).toHaveLength(1); // a repeat has the same id and time, so it is the same file
    expect((await runScriptOnce("monitor", file)).code).toBe(0);
    expect(await received()).toHaveLength(1);
    expect(JSON.parse(await readFile(join(folder, "monitor.json"), "utf8")).queue).toEqual([]);
  },
);

test("checkOnce() does not look into sent/, however much is in it", async () => {
  const { dir, config, received } = await setUp({ expected: [] });
  await writeFile(join(dir, "sent"), "not even a folder");
  expect((await runAt(config, NOON)).healthy).toBe(true);
  expect(await received()).toEqual([]);
});

test("monitor exits with 1 while a mail is not accepted", async () => {
  const { file } = await setUp({
    expected: ["10.0.0.1"],
    mail: { smtp: "smtp://127.0.0.1:9", from: "a@example.com", to: ["b@example.com"] },
  });
  const { code, output } = await runScriptOnce("monitor", file);
  expect(code).toBe(1);
  expect(output).toContain("mail not accepted");
});

test("monitor --watch follows its schedule, keeps other runs out of a pass, and ends on SIGTERM", async () => {
  const { dir, file, received } = await setUp({
    expected: ["10.0.0.1"],
    schedule: "* * * * * *",
    silentMinutes: 0.02,
  });
  const watching = startScript("monitor", file, ["--watch"]);
  await until("the first mail", async () => (await received()).length === 1);
  await writeLedger(dir, "10.0.0.1", { heardAt: Date.now(), lineAt: Date.now() });
  await until("silence and its mail", async () => (await received()).length === 3);
  await writeLedger(dir, "10.0.0.1", { heardAt: Date.now(), lineAt: Date.now() });
  await until("recovery", async () => (await received()).length === 4);
  expect(await watching.stop()).toBe(0);
  const seen = (await received()).map(({ subject = "" }) => subject.replace(/ (since|after) .*/, ""));
  expect(seen).toEqual([
    "10.0.0.1 never heard of",
    "10.0.0.1 is heard for the first time",
    "10.0.0.1 silent",
    "10.0.0.1 back",
  ]);
}, 60_000);

test("monitor ends with 0 on SIGTERM while the mail server stalls, and the mail stays in the queue", async () => {
  const stalling = new SMTPServer({ authOptional: true, disabledCommands: ["STARTTLS"], onRcptTo: () => {} });
  let connected = false;
  stalling.onConnect = (_session, done) => {
    connected = true;
    done();
  };
  stalling.on("error", () => {});
  await new Promise<void>((resolve) => stalling.listen(0, "127.0.0.1", resolve));
  onCleanup(() => new Promise<void>((resolve) => stalling.close(() => resolve())));
  const smtp = `smtp://127.0.0.1:${(stalling.server.address() as { port: number }).port}`;
  const mail = { smtp, from: "a@example.com", to: ["b@example.com"] };
  const { config, file } = await setUp({ expected: ["10.0.0.1"], mail });
  const running = startScript("monitor", file);
  await until("a connection", () => connected);
  const asked = Date.now();
  expect(await running.stop()).toBe(0);
  expect(Date.now() - asked).toBeLessThan(5_000);
  expect(JSON.parse(await readFile(config.stateFile, "utf8")).queue).toHaveLength(1);
}, 60_000);

test("monitor --status and --test-mail", async () => {
  const { dir, file, received } = await setUp({ expected: ["10.0.0.1", "10.0.0.2"] });
  const now = Date.now();
  await writeLedger(dir, "10.0.0.2", { heardAt: now, lineAt: now - HOUR, lost: 7 });
  const { code, output } = await runScriptOnce("monitor", file, ["--status"]);
  expect(code).toBe(0);
  expect(output).toMatch(/10\.0\.0\.1 +never +never/);
  expect(output).toMatch(/10\.0\.0\.2 +quiet +\d+s ago +1h 0m ago +0 +7/);
  expect(await received()).toEqual([]);
  expect((await runScriptOnce("monitor", file, ["--test-mail"])).code).toBe(0);
  expect((await received()).map(({ subject }) => subject)).toEqual(["Test mail"]);
});

test("monitor --check names what is missing on this host", async () => {
  const { file } = await setUp({ dir: "/nonexistent", stateFile: "/nonexistent/monitor.json" });
  const { code, output } = await runScriptOnce("monitor", file, ["--check"]);
  expect(code).toBe(1);
  expect(output).toContain("monitor.dir: /nonexistent: expected a folder that can be read");
  expect(output).toContain("monitor.stateFile: /nonexistent: expected a folder that can be written");
});

test("checkOnce() says who is in its way when another run is in progress", async () => {
  const { config } = await setUp();
  const lock = await holdLock(`${config.stateFile}.lock`, "it");
  expect(runAt(config, NOON)).rejects.toThrow(`in use by process ${process.pid}`);
  lock.release();
});

test("checkOnce() is not held up by one mail that the server refuses for good", async () => {
  const subjects: string[] = [];
  const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    onData: async (stream, _session, done) => {
      const { subject = "" } = await simpleParser(stream);
      if (subject.includes("never")) done(Object.assign(new Error("spam"), { responseCode: 554 }));
      else {
        subjects.push(subject);
        done();
      }
    },
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => new Promise<void>((resolve) => server.close(() => resolve())));
  const smtp = `smtp://127.0.0.1:${(server.server.address() as { port: number }).port}`;
  const mail = { smtp, from: "a@example.com", to: ["b@example.com"], subjectPrefix: "" };
  const { dir, config } = await setUp({ expected: ["10.0.0.1"], mail });
  expect((await runAt(config, NOON)).healthy).toBe(false);
  await writeLedger(dir, "10.0.0.1", { heardAt: NOON, lineAt: NOON });
  expect((await runAt(config, NOON + MINUTE)).healthy).toBe(false);
  expect(subjects).toEqual(["10.0.0.1 is heard for the first time"]);
});

// ---- the account of an hour

test("summariseHour() accounts for every batch of the hour, by the senders' own clocks", async () => {
  const { dir, config } = await setUp({ expected: ["10.0.0.1", "10.0.0.9"] });
  const end = Date.UTC(2026, 10, 22, 1); // 07:00 at +0600
  const batch = (window: string, host: string, lines: number, more = "") => ({
    name: `accessLog_261122${window}_${host.replaceAll(".", "-")}${more}.log`,
    lines,
    bytes: lines * 100,
    at: end + 2 * MINUTE,
  });
  const sealed = [
    batch("05_40-59", "10.0.0.1", 5, ".2"), // late, of the hour before
    batch("06_00-19", "10.0.0.1", 10),
    batch("06_20-39", "10.0.0.1", 20),
    batch("06_20-39", "10.0.0.1", 1, ".2"),
    batch("06_40-59", "10.0.0.1", 30),
    batch("07_00-19", "10.0.0.1", 99), // of the next hour
  ];
  const stream = { offset: 1, at: end + 5 * MINUTE, window: "26112207_00-19", windowEnd: end + 20 * MINUTE };
  await writeLedger(dir, "10.0.0.1", { heardAt: end + 5 * MINUTE, streams: { abcdefgh: stream } }, sealed);
  const utc = { offset: 1, at: end + MINUTE, window: "26112200_40-59", windowEnd: end, lag: 4711 };
  const open = { "accessLog_26112200_40-59_10-0-0-2.log": { bytes: 700, lines: 7, endsAt: end, at: end } };
  await writeLedger(dir, "10.0.0.2", { heardAt: end + MINUTE, streams: { abcdefgh: utc }, open });
  const line = (name: string, lines: number) => ({ at: end, batch: name, lines, status: "Sent" as const });
  await appendReport(config.report, [line(sealed[1]?.name ?? "", 10), line(sealed[2]?.name ?? "", 19)]);
  await mkdir(join(dir, "failed"));
  await writeFile(join(dir, "failed", sealed[3]?.name ?? ""), "");
  const summary = await summariseHour(config, end);
  expect(summary.hour).toBe("2026-11-22 06:00");
  expect(summary.rows.map(({ host, hour, state }) => [host, hour, state])).toEqual([
    ["10.0.0.1", "2026-11-22 06:00", "complete"],
    ["10.0.0.2", "2026-11-22 00:00", "incomplete"],
    ["10.0.0.9", "2026-11-22 06:00", "silent"],
  ]);
  const { total } = summary;
  expect(total.received).toEqual({ files: 5, lines: 68, bytes: 6800 });
  expect(total.delivered.lines).toBe(30);
  expect(total.differs).toBe(1); // the report says 19 instead of 20
  expect(total.failed.lines).toBe(1);
  expect(total.missing.lines).toBe(30); // sealed, and nowhere
  expect(total.waiting.lines).toBe(7);
  expect(total.late).toBe(1);
  expect(summary.stragglers).toEqual({ files: 1, lines: 5, bytes: 500 });
  expect(summary.curve.slice(-2)).toEqual([5, 68]);
  const { subject, text } = renderSummary(summary);
  expect(subject).toBe(
    "06:00–07:00 68 lines, 1 failed, 1 missing, 1 with other counts, 1 waiting, 1 silent, 1 incomplete",
  );
  expect(text).toContain("68 lines received = 30 delivered + 7 waiting + 1 failed + 30 missing.");
});

test("renderAlert() and renderSummary() escape what comes from outside, and refer to nothing remote", async () => {
  expect(escapeHtml(`<a href="x">'&'</a>`)).toBe("&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;");
  const evil = '<img src=x onerror="alert(1)">';
  const change = {
    kind: "opened",
    title: evil,
    text: evil,
    status: "silent",
    sender: true,
    since: NOON,
  } as const;
  const alert = renderAlert({
    kind: "alert",
    id: "x",
    at: NOON,
    references: [],
    counts: {},
    changes: [change, { ...change, sender: false, status: "fault" }],
  });
  const { dir, config } = await setUp();
  await writeLedger(dir, evil.replaceAll("/", ""), { heardAt: NOON });
  const summary = renderSummary(await summariseHour(config, NOON));
  for (const { html } of [alert, summary]) {
    expect(html).not.toContain("<img");
    expect(html).not.toMatch(/<script|https?:|url\(|<link|<style/i);
    expect(html).toContain("&lt;img");
  }
});
