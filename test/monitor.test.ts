import { expect, test } from "bun:test";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import { createServer as createHttpsServer } from "node:https";
import { join } from "node:path";
import { type ParsedMail, simpleParser } from "mailparser";
import { SMTPServer, type SMTPServerOptions } from "smtp-server";
import { parseConfig } from "../lib/config.ts";
import { holdLock } from "../lib/durable.ts";
import { formatRecord, type LedgerRecord } from "../lib/ledger.ts";
import { createLog } from "../lib/service.ts";
import { forwarderStatePath } from "../lib/signs.ts";
import { checkOnce } from "../monitor.ts";
import {
  onCleanup,
  runScriptOnce,
  selfSigned,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const NOON = Date.UTC(2026, 10, 22, 12);

// ---- whole runs

/** The minute of the summary that is not near, for what runs by the real clock. */
const FAR_SUMMARY = { summaryMinute: (new Date().getUTCMinutes() + 40) % 60 };

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
  const file = await writeConfig(folder, { monitor: { ...FAR_SUMMARY, ...section } });
  const received = async (): Promise<ParsedMail[]> => {
    const names = (await readdir(mails).catch(() => [])).filter((name) => name.endsWith(".eml"));
    return Promise.all(names.sort().map(async (name) => simpleParser(await readFile(join(mails, name)))));
  };
  return { folder, dir, config, file, received };
}

async function writeLedger(dir: string, host: string, record: LedgerRecord) {
  await mkdir(join(dir, host), { recursive: true });
  await writeFile(join(dir, host, ".ledger"), formatRecord({ v: 2, ...record }));
}

type Config = Parameters<typeof checkOnce>[0]["config"];

/** One run at a time of the day; the second look comes at once. */
async function runAt(config: Config, at: number, secondLook = async () => {}, passed = at - NOON) {
  const signal = new AbortController().signal;
  const logged: string[] = [];
  const log = createLog((line) => logged.push(line));
  const uptime = () => passed + 240 * HOUR;
  const healthy = await checkOnce({ config, log, signal, now: () => at, uptime, secondLook });
  return { healthy, log: logged.join("") };
}

/** What is in the ledger of a sender that was heard so many minutes before a time. */
const heard = (at: number, minutes = 0, over: LedgerRecord = {}): LedgerRecord => ({
  ...{ heardAt: at - minutes * MINUTE, lineAt: at - minutes * MINUTE },
  ...over,
});

/** A real mail server on loopback; `mails` grows with what it took. */
async function startSmtp(options: SMTPServerOptions = {}) {
  const mails: { subject: string; to: string[] }[] = [];
  const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    async onData(stream, session, done) {
      const { subject = "" } = await simpleParser(stream);
      mails.push({ subject, to: session.envelope.rcptTo.map(({ address }) => address) });
      done();
    },
    ...options,
  });
  server.on("error", () => {});
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => new Promise<void>((resolve) => server.close(() => resolve())));
  const { port } = server.server.address() as { port: number };
  const mail = {
    smtp: `smtp://127.0.0.1:${port}`,
    from: "a@example.com",
    to: ["b@example.com"],
    subjectPrefix: "",
  };
  return { mails, mail };
}

const refusal = (code: number, text: string) => Object.assign(new Error(text), { responseCode: code });

/** A real HTTP server on loopback that answers as `answer` says; gives its address. */
async function startHttp(
  answer: (request: IncomingMessage, body: string, response: ServerResponse) => void,
): Promise<string> {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    answer(request, body, response);
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.closeAllConnections());
  onCleanup(() => server.close());
  return `http://127.0.0.1:${(server.address() as { port: number }).port}`;
}

test("checkOnce() tells what the forwarder met, what failed and what waits too long", async () => {
  const { dir, config, received } = await setUp(FAR_SUMMARY);
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
  expect(mail?.text).toMatch(/1 batch waits since .*\n {2}The oldest is accessLog_26112206_40-59/);
  expect(mail?.text).toContain("The client's server shows another host key\n  the server shows SHA256:x");
  expect(mail?.text).toContain(`1 batch is refused by the client\n  ${name}: quota exceeded`);
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
  expect(seen.filter((subject) => subject?.includes("Monitor starts anew")).length).toBe(3);
  expect(seen.every((subject) => subject?.includes("10.0.0.1 never seen"))).toBe(true);
});

test("checkOnce() posts each mail to the webhook, calls the heartbeat, and is not held up by either", async () => {
  let status = 500;
  const posted: { subject: string; text: string; status: string; changes: object[] }[] = [];
  const called: string[] = [];
  const url = await startHttp((request, body, response) => {
    called.push(`${request.method} ${request.url}`);
    if (request.method === "POST" && status === 200) posted.push(JSON.parse(body));
    response.writeHead(status).end();
  });
  const { config, received, dir } = await setUp({
    expected: ["10.0.0.1"],
    webhook: `${url}/hook-secret`,
    heartbeatUrl: `${url}/alive`,
  });
  const first = await runAt(config, NOON);
  expect(first.healthy).toBe(true);
  expect(first.log).toContain("webhook refuses");
  expect(first.log).not.toContain("hook-secret");
  expect(await received()).toHaveLength(1);
  status = 200;
  await runAt(config, NOON + MINUTE);
  await writeLedger(dir, "10.0.0.1", heard(NOON + 2 * MINUTE));
  await runAt(config, NOON + 2 * MINUTE);
  expect(posted).toMatchObject([
    {
      ...{
        subject: "10.0.0.1 never seen",
        text: expect.stringContaining("10.0.0.1 never seen\n* 10.0.0.1"),
        status: "firing",
      },
      changes: [{ title: "10.0.0.1", state: "never", status: "firing" }],
    },
    {
      subject: "10.0.0.1 is heard for the first time",
      status: "resolved",
      changes: [{ state: "ok", status: "resolved" }],
    },
  ]);
  expect(called.filter((call) => call === "GET /alive")).toHaveLength(3);
  expect(await received()).toHaveLength(2);
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
    "10.0.0.1 never seen",
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
  expect(code).toBe(1);
  expect(output).toStartWith("1 sender was never seen\n");
  expect(output).toMatch(/10\.0\.0\.1 +never +never/);
  expect(output).toMatch(/10\.0\.0\.2 +quiet +\d+s ago +1h 0m ago +0 B +0 +0 +7 B/);
  const one = await runScriptOnce("monitor", file, ["--status", "--json", "--host", "10.0.0.2"]);
  expect(one.code).toBe(0);
  expect(JSON.parse(one.output)).toMatchObject({
    ok: true,
    problems: [],
    hosts: [{ host: "10.0.0.2", state: "quiet" }],
  });
  expect(await received()).toEqual([]);
  expect((await runScriptOnce("monitor", file, ["--test-mail"])).code).toBe(0);
  expect((await received()).map(({ subject }) => subject)).toEqual(["Test mail"]);
});

test("monitor --mute tells no silence of a host for a while, and all the rest", async () => {
  const { dir, file, config, received } = await setUp({ silentMinutes: 5, ...FAR_SUMMARY });
  const now = Date.now();
  await writeLedger(dir, "10.0.0.1", heard(now));
  await runAt(config, now);
  const why = ["--reason", "new\u001b\nkernel"]; // shown as one plain line
  expect((await runScriptOnce("monitor", file, ["--mute", "10.0.0.1", "--for", "2h", ...why])).code).toBe(0);
  await writeLedger(dir, "10.0.0.1", heard(now, 0, { lost: 4096 }));
  await runAt(config, now + 10 * MINUTE);
  expect((await received()).map(({ subject }) => subject)).toEqual(["10.0.0.1 lost 4.0 KiB"]);
  expect((await runScriptOnce("monitor", file, ["--status"])).output).toMatch(
    /muted: 10\.0\.0\.1 until .* by \w+: new kernel/,
  );
  await runAt(config, now + 121 * MINUTE);
  expect((await received()).map(({ subject }) => subject)).toContainEqual(
    expect.stringMatching(/^10\.0\.0\.1 silent since /),
  );
  expect((await runScriptOnce("monitor", file, ["--mute", "*", "--for", "1d"])).code).toBe(0);
  expect((await runScriptOnce("monitor", file, ["--mute", "*", "--off"])).code).toBe(0);
  expect((await runScriptOnce("monitor", file, ["--mute", "*", "--off"])).output).toContain("was not muted");
  expect(JSON.parse(await readFile(config.stateFile, "utf8")).mutes).toEqual({});
  for (const flags of [
    ["--mute", "a b", "--for", "1h"],
    ["--mute", "a"],
    ["--mute", "a", "--for", "0h"],
    ["--mute", "a", "--for", "1y"],
    ["--mute", "a", "--for", "99999999999d"],
    ["--mute", "a", "--for", "1h", "--off"],
    ["--for", "1h"],
  ])
    expect((await runScriptOnce("monitor", file, flags)).code).toBe(2);
});

test.each([
  ["spring", Date.UTC(2027, 2, 27, 23, 16), ["00:00–01:00", "01:00–02:00", "03:00–04:00"]],
  [
    "autumn",
    Date.UTC(2027, 9, 30, 22, 16),
    ["00:00–01:00", "01:00–02:00", "02:00–03:00", "02:00–03:00", "03:00–04:00"],
  ],
])("in %s the hours around the change of the clock are told as they were on it", async (_, start, hours) => {
  const zone = process.env.TZ;
  process.env.TZ = "Europe/Berlin";
  try {
    const { dir, config, received } = await setUp();
    for (let n = 0; n <= hours.length; n++) {
      const at = start + n * HOUR;
      const east = -new Date(at).getTimezoneOffset();
      await writeLedger(dir, "10.0.0.1", heard(at, 0, { facts: { zone: east } }));
      await runAt(config, at);
    }
    expect((await received()).map(({ subject = "" }) => subject.slice(0, 11))).toEqual(hours);
  } finally {
    process.env.TZ = zone ?? "UTC";
  }
});

test.each<[string, (run: number) => number, number[]]>([
  ["two zones at once", (run) => [0, 330][run % 2] ?? 0, [2, 6, 6, 6, 6, 6]],
  ["another zone from the third hour on", (run) => (run < 25 ? 0 : 330), [2, 6, 6, 6, 3, 6, 6]],
])(
  "a host whose logs have %s, half an hour apart, has a summary an hour, and each line in one",
  async (_, zoneOf, lines) => {
    const { dir, config, received } = await setUp();
    const sealed: LedgerRecord["sealed"] = {};
    for (let run = 0; run <= 35; run++) {
      const at = NOON + run * 10 * MINUTE;
      const name = `accessLog_26112212_00-19_10-0-0-1.${run + 2}.log`;
      sealed[name] = { name, bytes: 1, lines: 1, at: at - MINUTE };
      await writeLedger(dir, "10.0.0.1", heard(at, 0, { sealed, facts: { zone: zoneOf(run) } }));
      await runAt(config, at);
    }
    const told = (await received()).map(({ subject = "" }) =>
      Number(/ (\d+) lines?,/.exec(subject)?.[1] ?? -1),
    );
    expect(told.filter((n) => n >= 0)).toEqual(lines);
  },
);

test("a host that is called constructor is neither silent nor lossy by that, and its loss is told once", async () => {
  const { dir, config, received } = await setUp({ silentMinutes: 5, ...FAR_SUMMARY });
  const now = Date.now();
  const told = async () => (await received()).map(({ subject }) => subject);
  await writeLedger(dir, "constructor", heard(now));
  for (const minute of [0, 1, 2]) await runAt(config, now + minute * MINUTE);
  expect(await told()).toEqual([]);
  const facts = { agent: "log-rt-sync/2.0.0 (lost access.log.2)" };
  await writeLedger(dir, "constructor", heard(now + 3 * MINUTE, 0, { lost: 4096, facts }));
  for (const minute of [3, 4, 5]) await runAt(config, now + minute * MINUTE);
  expect(await told()).toEqual(["constructor lost 4.0 KiB"]);
  expect((await received())[0]?.text).toContain("vanished from its disk unread, the last of access.log.2:");
});

test("monitor --check names what is missing on this host", async () => {
  const none = join(await tempFolder(), "none");
  const { file } = await setUp({ dir: none, stateFile: join(none, "monitor.json") });
  const { code, output } = await runScriptOnce("monitor", file, ["--check"]);
  expect(code).toBe(1);
  expect(output).toContain(`monitor.dir: ${none}: expected a folder that can be read`);
  expect(output).toContain(`monitor.stateFile: ${none}: expected a folder that can be written`);
});

// ---- nothing blinds it, and nothing is lost on the way

const OLD = NOON - 20 * 24 * HOUR;

test("one file that can't be read is told, and a dead sender all the same", async () => {
  const { dir, config, received } = await setUp();
  await writeLedger(dir, "10.0.0.1", heard(NOON));
  await writeLedger(dir, "10.0.0.2", heard(NOON));
  await writeLedger(dir, "10.0.0.3", heard(NOON));
  await runAt(config, NOON);
  await writeFile(forwarderStatePath(dir), "{");
  await writeFile(join(dir, "10.0.0.3", ".ledger"), "\0\0\0");
  await writeFile(join(dir, "failed"), "no folder");
  await rm(join(dir, "10.0.0.2", ".ledger"));
  await mkdir(join(dir, "10.0.0.2", ".ledger"));
  await runAt(config, NOON + 6 * MINUTE);
  const [mail] = await received();
  expect(mail?.subject).toBe(`4 files or folders can't be read; 10.0.0.1 silent since ${clock(NOON)}`);
  expect(mail?.text).toContain(forwarderStatePath(dir));
});

test("an alert goes out when the state can't be saved, says so, and does not come in every run", async () => {
  const before = process.env.TMPDIR;
  process.env.TMPDIR = await tempFolder(); // what can't be saved is kept there
  onCleanup(() => {
    if (before === undefined) delete process.env.TMPDIR;
    else process.env.TMPDIR = before;
  });
  const { config, received } = await setUp({ expected: ["10.0.0.1"], stateFile: "/proc/none/monitor.json" });
  const first = await runAt(config, NOON);
  expect(first.log).toContain("state not saved");
  for (let minute = 1; minute < 4; minute++) await runAt(config, NOON + minute * MINUTE);
  const subjects = (await received()).map(({ subject }) => subject);
  expect(subjects.filter((subject) => subject === "10.0.0.1 never seen").length).toBe(1);
  expect(subjects.filter((subject) => subject?.startsWith("The monitor's state can't be saved")).length).toBe(
    1,
  );
});

test("a run of cron that can't save goes on from what the run before kept", async () => {
  const { file, received } = await setUp({ expected: ["10.0.0.1"], stateFile: "/proc/none/monitor.json" });
  const env = { TMPDIR: await tempFolder() };
  for (let run = 0; run < 3; run++) expect((await runScriptOnce("monitor", file, [], env)).code).toBe(0);
  expect(await received()).toHaveLength(2);
});

test("a recipient that is deferred gets its mail later, and no other gets it twice", async () => {
  let isBusy = true;
  const { mails, mail } = await startSmtp({
    onRcptTo: ({ address }, _session, done) =>
      done(address === "busy@example.com" && isBusy ? refusal(450, "later") : null),
  });
  const to = ["ops@example.com", "busy@example.com"];
  const { config } = await setUp({ expected: ["10.0.0.1"], mail: { ...mail, to } });
  expect((await runAt(config, NOON)).healthy).toBe(false);
  isBusy = false;
  expect((await runAt(config, NOON + MINUTE)).healthy).toBe(true);
  await runAt(config, NOON + 2 * MINUTE);
  expect(mails.map((one) => one.to)).toEqual([["ops@example.com"], ["busy@example.com"]]);
});

test("a recipient that is deferred for five days is given up, and that is told", async () => {
  const { mail } = await startSmtp({ onRcptTo: (_address, _session, done) => done(refusal(450, "later")) });
  const { config } = await setUp({ expected: ["10.0.0.1"], mail });
  await runAt(config, NOON);
  const { log } = await runAt(config, NOON + 5 * 24 * HOUR + MINUTE);
  expect(log).toContain("mail refused for good");
  const { queue, undeliverable } = JSON.parse(await readFile(config.stateFile, "utf8"));
  expect(undeliverable).toMatchObject([{ to: "b@example.com", subject: "10.0.0.1 never seen" }]);
  expect(queue.map(({ at }: { at: number }) => at)).not.toContain(NOON);
});

test("a post is bounded, whatever changed", async () => {
  let post = { text: "", changes: [], moreChanges: 0 };
  const webhook = await startHttp((_request, body, response) => {
    post = JSON.parse(body);
    response.end();
  });
  const expected = Array.from({ length: 400 }, (_, i) => `sender-${i}.${"x".repeat(60)}.example.com`);
  const { config } = await setUp({ expected, webhook });
  await runAt(config, NOON);
  expect(post.text.length).toBeLessThanOrEqual(12_000);
  expect([post.changes.length, post.moreChanges]).toEqual([100, 300]);
});

test("monitor --watch goes on looking while a mail server takes its time", async () => {
  const { promise: end, resolve: finish } = Promise.withResolvers<void>();
  let copies = 0;
  const { mail } = await startSmtp({
    onData: (stream, _session, done) =>
      stream.resume().on("end", () => {
        copies++;
        end.then(() => done());
      }),
  });
  const { dir, config, file } = await setUp({
    expected: ["10.0.0.1"],
    mail,
    schedule: "* * * * * *",
    ...FAR_SUMMARY,
  });
  const watching = startScript("monitor", file, ["--watch"]);
  await until("the mail is with the server", () => copies === 1);
  await writeLedger(dir, "10.0.0.1", heard(Date.now()));
  await until("the return is queued", async () => {
    const { queue } = JSON.parse(await readFile(config.stateFile, "utf8"));
    return queue.length === 2;
  });
  expect(copies).toBe(1);
  finish();
  await until("the second mail is sent", () => copies === 2);
  expect(await watching.stop()).toBe(0);
}, 60_000);

test("a mail that is refused for good is tried five times in an hour, then the refusal is told", async () => {
  let tries = 0;
  const posts: string[] = [];
  const { mail } = await startSmtp({
    async onData(stream, _session, done) {
      if ((await simpleParser(stream)).subject === "10.0.0.1 never seen") tries++;
      done(refusal(554, "spam"));
    },
  });
  const webhook = await startHttp((_request, body, response) => {
    posts.push(JSON.parse(body).subject);
    response.end();
  });
  const { config, file } = await setUp({ expected: ["10.0.0.1"], mail, webhook });
  for (let minute = 0; minute <= 59; minute++) await runAt(config, NOON + minute * MINUTE);
  expect(tries).toBe(4);
  const fifth = await runAt(config, NOON + HOUR);
  expect(tries).toBe(5);
  expect(fifth.log).toContain("mail refused for good");
  await runAt(config, NOON + 61 * MINUTE);
  expect(posts.at(-1)).toStartWith(
    '1 mail or post was refused for good: "10.0.0.1 never seen" to b@example.com',
  );
  const { output } = await runScriptOnce("monitor", file, ["--status"]);
  expect(output).not.toContain("undefined");
}, 60_000);

test("a chat that refuses one post for good gets the later ones in order, and that is told by mail", async () => {
  const posted: string[] = [];
  let refused = 0;
  const webhook = await startHttp((_request, body, response) => {
    const { subject } = JSON.parse(body);
    const isRefused = subject === "10.0.0.1 never seen";
    if (isRefused) refused++;
    else posted.push(subject);
    response.writeHead(isRefused ? 400 : 200).end();
  });
  const { dir, config, received } = await setUp({ expected: ["10.0.0.1"], webhook });
  await runAt(config, NOON);
  await writeLedger(dir, "10.0.0.1", heard(NOON + MINUTE));
  await runAt(config, NOON + MINUTE);
  expect(posted).toEqual([]);
  await runAt(config, NOON + 2 * MINUTE);
  expect(posted).toEqual(["10.0.0.1 is heard for the first time"]);
  await runAt(config, NOON + 3 * MINUTE);
  expect((await received()).at(-1)?.subject).toStartWith(
    '1 mail or post was refused for good: "10.0.0.1 never seen" to the',
  );
  expect(refused).toBe(3);
});

test("a chat that does not answer for an hour is given up, and that is told by mail", async () => {
  const { config, received } = await setUp({ expected: ["10.0.0.1"], webhook: "http://127.0.0.1:9/secret" });
  await runAt(config, NOON);
  expect(JSON.parse(await readFile(config.stateFile, "utf8")).queue).toMatchObject([{ post: { tries: 0 } }]);
  const { log } = await runAt(config, NOON + HOUR + MINUTE);
  expect(log).toContain("posts given up");
  await runAt(config, NOON + HOUR + 2 * MINUTE);
  const [, ...later] = await received();
  const told = later.map(({ text = "" }) => text).find((text) => text.includes("refused for good"));
  expect(told).toContain("did not answer for an hour");
  expect(told).not.toContain("secret");
});

test("a batch that vanished from the queue after its hour's mail is told once, in the next one", async () => {
  const { dir, config, received } = await setUp();
  const name = "accessLog_26112212_00-19_10-0-0-1.log";
  const sealed = { [name]: { name, bytes: 10, lines: 1, at: NOON + 20 * MINUTE } };
  const at = async (time: number) => {
    const record = heard(time, 0, { sealed, facts: { zone: 0, through: time } });
    await writeLedger(dir, "10.0.0.1", record);
    await runAt(config, time);
  };
  await at(NOON + 16 * MINUTE);
  await writeFile(join(dir, "10.0.0.1", name), "0123456789");
  await at(NOON + 76 * MINUTE);
  await rm(join(dir, "10.0.0.1", name));
  await at(NOON + 136 * MINUTE);
  await at(NOON + 196 * MINUTE);
  const summaries = (await received()).filter(({ subject = "" }) => /^\d\d:00/.test(subject));
  expect(summaries.map(({ subject }) => subject)).toEqual([
    "12:00–13:00 1 line, 1 file waiting",
    expect.stringMatching(/^13:00–14:00 0 lines, 1 file missing/),
    "14:00–15:00 0 lines, none from any sender",
  ]);
  expect(summaries[1]?.text).toContain(`neither here nor delivered: ${name} (1 line)`);
});

test("a run that finds another one waiting for a mail server looks and queues, and sends nothing", async () => {
  const { mails, mail } = await startSmtp();
  const { config } = await setUp({ expected: ["10.0.0.1"], mail });
  const other = await holdLock(`${config.stateFile}.sending`, "it");
  const { log, healthy } = await runAt(config, NOON);
  expect(healthy).toBe(true);
  expect(log).toContain("another run sends");
  expect(mails).toEqual([]);
  other.release();
  await runAt(config, NOON + MINUTE);
  expect(mails.map(({ subject }) => subject)).toEqual(["10.0.0.1 never seen"]);
});

test("a server that takes the mail and answers late gets one copy, from runs that overlap", async () => {
  let copies = 0;
  const { mail } = await startSmtp({
    onData: (stream, _session, done) =>
      stream.resume().on("end", () => {
        copies++;
        setTimeout(done, 2500);
      }),
  });
  const { file } = await setUp({ expected: ["10.0.0.1"], mail: { ...mail, timeoutSeconds: 0.4 } });
  const runs = [startScript("monitor", file)];
  await until("the mail is with the server", () => copies === 1);
  runs.push(startScript("monitor", file), startScript("monitor", file));
  expect(await Promise.all(runs.map(({ ended }) => ended))).toEqual([0, 0, 0]);
  expect(copies).toBe(1);
});

test("a dead sender is told while another receiver does not run", async () => {
  const { dir, config, received } = await setUp();
  const state = (port: number, pid: number, at: number) =>
    writeFile(
      join(dir, `.receiver-${port}.json`),
      JSON.stringify({ version: 1, at, startedAt: OLD, pid, ports: [port], refused: [], pressed: [] }),
    );
  for (const [host, pid] of [
    ["10.0.0.1", 11],
    ["10.0.0.2", 22],
  ] as const) {
    await writeLedger(dir, host, heard(NOON));
    await writeFile(join(dir, host, ".ledger-lock"), `${pid}\n`);
  }
  await state(5001, 11, NOON);
  for (const minute of [0, 10]) {
    await state(5002, 22, NOON + minute * MINUTE);
    await runAt(config, NOON + minute * MINUTE);
  }
  const [mail, ...more] = await received();
  expect(more).toEqual([]);
  expect(mail?.subject).toStartWith("No receiver is running on port 5001");
  expect(mail?.subject).toContain("10.0.0.2 silent since");
  expect(mail?.text).not.toContain("10.0.0.1");
});

test.each([1, 10])(
  "a clock that was %d days ahead for a while stops no summary, and makes none of hours that never were",
  async (days) => {
    const { dir, config, received } = await setUp();
    const begin = NOON + 16 * MINUTE;
    for (const [hours, ahead] of [
      [0, 0],
      [0.5, days * 24 * HOUR],
      [1, 0],
      [2, 0],
      [3, 0],
    ] as const) {
      const passed = begin - NOON + hours * HOUR;
      const time = NOON + passed + ahead;
      await writeLedger(dir, "10.0.0.1", heard(time, 0, { facts: { zone: 0 } }));
      await runAt(config, time, undefined, passed);
    }
    const hours = (await received()).map(({ subject = "" }) => subject.slice(0, 11));
    expect(hours.sort()).toEqual(["11:00–12:00", "13:00–14:00", "14:00–15:00"]);
  },
);

test("a fresh monitor on an old folder tells no losses of the past as new", async () => {
  const { dir, config, received } = await setUp();
  await writeLedger(dir, "10.0.0.1", heard(NOON, 0, { lost: 4096, facts: { gone: 7 } }));
  await runAt(config, NOON);
  expect(await received()).toEqual([]);
  await writeLedger(dir, "10.0.0.1", heard(NOON + MINUTE, 0, { lost: 6144, facts: { gone: 7 } }));
  await runAt(config, NOON + MINUTE);
  const [mail] = await received();
  expect(mail?.subject).toBe("10.0.0.1 lost 2.0 KiB");
  expect(mail?.text).toContain("grep -i lost");
});

test("a problem without a duration of its own is looked at twice before it is told", async () => {
  let isUp = false;
  const url = await startHttp((_request, _body, response) =>
    response.writeHead(isUp ? 200 : 503).end("busy"),
  );
  const { config, received } = await setUp({ receivers: [url] });
  let looks = 0;
  await runAt(config, NOON, async () => {
    looks++;
    isUp = true;
  });
  expect(looks).toBe(1);
  expect(await received()).toEqual([]);
  isUp = false;
  await runAt(config, NOON + MINUTE);
  await runAt(config, NOON + 2 * MINUTE, async () => expect.unreachable());
  expect((await received()).map(({ subject }) => subject)).toEqual([
    expect.stringMatching(/^Receiver 127\.0\.0\.1:\d+ is unhealthy: \/healthz answers 503: busy$/),
  ]);
});

test("an answer without an end holds up no run", async () => {
  const url = await startHttp((_request, _body, response) => {
    response.write("x".repeat(100_000)); // and it never ends
  });
  const { config, received } = await setUp({
    receivers: [url],
    webhook: url,
    heartbeatUrl: url,
    expected: ["10.0.0.1"],
  });
  expect((await runAt(config, NOON)).healthy).toBe(true);
  expect((await received()).map(({ subject }) => subject)).toEqual(["10.0.0.1 never seen"]);
});

test("180 senders that fall silent together are one mail, with the cause when it is known", async () => {
  const { dir, config, received } = await setUp();
  const hosts = Array.from({ length: 180 }, (_, i) => `10.0.1.${i + 1}`);
  for (const host of hosts) await writeLedger(dir, host, heard(NOON));
  await runAt(config, NOON);
  await runAt(config, NOON + 6 * MINUTE);
  const [mail, ...more] = await received();
  expect(more).toEqual([]);
  expect(mail?.subject).toBe("All 180 senders silent: receiver or network down?");
  expect(`${mail?.html}`.length).toBeLessThan(20_000);
});

test("while a receiver is away its senders are counted as waiting, and a recovery names who is still silent", async () => {
  const { dir, config, received } = await setUp({ silentMinutes: 5, summaryMinute: 40 });
  const look = async (minute: number, receiver: number, ...hosts: number[]) => {
    const state = { version: 1, at: NOON + receiver * MINUTE, startedAt: NOON - HOUR, ports: [5001] };
    await writeFile(join(dir, ".receiver-5001.json"), JSON.stringify({ ...state, refused: [], pressed: [] }));
    for (const [i, heardMinute] of hosts.entries())
      await writeLedger(dir, `10.0.0.${i + 1}`, heard(NOON + heardMinute * MINUTE));
    await runAt(config, NOON + minute * MINUTE);
  };
  await look(0, 0, 0, 0);
  await look(6, 0, 0, 0);
  await look(10, 10, 10, 10);
  await look(16, 16, 10, 10);
  await look(17, 17, 17, 10);
  const mails = await received();
  expect(mails.map(({ subject = "" }) => subject.slice(0, 30))).toEqual([
    "No receiver is running on port",
    "Over: no receiver is running o",
    "All 2 senders silent: receiver",
    "10.0.0.1 back after 7m 0s",
  ]);
  expect(mails[0]?.text).toContain("Senders now: 2 waiting (their receiver is down or has just started).");
  expect(mails[3]?.text).toContain(
    "Senders now: 1 silent, 1 ok.\nAlso wrong: 10.0.0.2 silent or never seen.",
  );
  expect(mails[3]?.text).toMatch(/What to do now:\n {2}.*monitor.* --status\n/);
});

test("a receiver's restart ends no alarm of silence and repeats none: its senders are waited for", async () => {
  const { dir, config, received } = await setUp({
    expected: ["10.0.0.1"],
    silentMinutes: 5,
    summaryMinute: 40,
  });
  const receiver = (startedAt: number, at: number) =>
    writeFile(
      join(dir, ".receiver-5001.json"),
      JSON.stringify({ version: 1, at, startedAt, ports: [5001], refused: [], pressed: [] }),
    );
  const subjects = async () => (await received()).map(({ subject }) => subject);
  await writeLedger(dir, "10.0.0.1", heard(NOON));
  await receiver(NOON - HOUR, NOON + 6 * MINUTE);
  await runAt(config, NOON + 6 * MINUTE);
  const alarm = [expect.stringMatching(/^10\.0\.0\.1 silent since /)];
  expect(await subjects()).toEqual(alarm);
  for (const minute of [7, 11, 13]) {
    await receiver(NOON + 7 * MINUTE, NOON + minute * MINUTE); // 13: it might have been heard by now
    await runAt(config, NOON + minute * MINUTE);
    expect(await subjects()).toEqual(alarm);
  }
  await writeLedger(dir, "10.0.0.1", heard(NOON + 14 * MINUTE));
  await receiver(NOON + 7 * MINUTE, NOON + 14 * MINUTE);
  await runAt(config, NOON + 14 * MINUTE);
  expect((await subjects())[1]).toMatch(/^10\.0\.0\.1 back after /);
});

test("the middle server's own absence is told as the cause, and its senders are waited for", async () => {
  const { dir, config, received } = await setUp();
  await writeLedger(dir, "10.0.0.1", heard(NOON + 15 * MINUTE));
  const run = (at: number, up: number) =>
    checkOnce({
      config,
      log: createLog(() => {}),
      signal: new AbortController().signal,
      now: () => at,
      uptime: () => up,
    });
  await run(NOON + 16 * MINUTE, 240 * HOUR);
  await run(NOON + 70 * MINUTE, 2 * MINUTE);
  const [mail, ...more] = await received();
  expect(more).toEqual([]);
  expect(mail?.subject).toMatch(/^This server \(.+\) was away from \d\d:\d\d to \d\d:\d\d$/);
});

test("a receiver and a webhook behind a certificate of one's own CA are asked with monitor.ca", async () => {
  const { cert, key, both } = await selfSigned();
  const asked: string[] = [];
  const server = createHttpsServer(
    { cert: await readFile(cert), key: await readFile(key), ca: await readFile(cert), requestCert: true },
    ({ method, url }, response) => {
      asked.push(`${method} ${url}`);
      response.end("ok");
    },
  );
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  const receivers = [`https://127.0.0.1:${(server.address() as { port: number }).port}`];
  const without = await setUp({ receivers });
  await runAt(without.config, NOON);
  expect((await without.received())[0]?.text).toContain("set monitor.ca to the PEM file of its CA");
  const hook = { webhook: `${receivers[0]}/hook`, expected: ["10.0.0.1"] };
  const { config, received } = await setUp({ receivers, ca: cert, cert: both, key, ...hook });
  const { log } = await runAt(config, NOON);
  expect((await received()).map(({ subject }) => subject)).toEqual(["10.0.0.1 never seen"]);
  expect(log).not.toContain("webhook");
  expect(asked.at(-1)).toBe("POST /hook");
});

test("a monitor goes on from the state of version 1.0", async () => {
  const { config, received } = await setUp({ expected: ["10.0.0.1"] });
  const incident = {
    title: "10.0.0.1",
    text: "",
    status: "never",
    since: NOON - HOUR,
    outage: NOON - HOUR,
    told: "never",
    toldAt: NOON - HOUR,
    changes: [],
  };
  const old = {
    version: 1,
    instance: "abcd",
    at: NOON - MINUTE,
    uptime: 240 * HOUR - MINUTE,
    incidents: { "host 10.0.0.1": incident },
    heard: {},
    summarisedUntil: NOON - HOUR,
    queue: [],
  };
  await writeFile(config.stateFile, JSON.stringify(old));
  const { log } = await runAt(config, NOON);
  expect(log).not.toContain("unreadable");
  expect(await received()).toEqual([]); // it was told
});

const clock = (at: number) => new Date(at).toTimeString().slice(0, 5);
