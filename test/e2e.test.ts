/**
 * The whole way on the real parts: nginx writes, logrotate rotates with USR1, our five scripts run as processes
 * and are killed in mid-flow, OpenSSH serves a chrooted sftp-only account, a mail server takes the mails.
 */
import { describe, expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { simpleParser } from "mailparser";
import { type Cell, compare, dashed, tallyDelivered, tallyLogs } from "../demo/account.ts";
import type { Section } from "../lib/config.ts";
import {
  type MailServer,
  type Nginx,
  PACKAGES,
  type Sshd,
  startNginx,
  startSmtp,
  startSshd,
} from "./servers.ts";
import {
  denoPath,
  freePort,
  missing,
  notRoot,
  ROOT,
  type Running,
  start,
  tempFolder,
  until,
} from "./support.ts";

const HOST = "10.10.21.181";
const SCRIPTS: Section[] = ["shipper", "receiver", "forwarder", "monitor", "housekeep"];
const WINDOW_MINUTES = 20;
const REQUESTS = 4000;
/** The timestamps cover so many minutes, up to the last window that is over. */
const MINUTES = 70;
const MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(" ");

/** How a runtime starts a script. */
type Runtime = (name: Section) => { command: string; args: string[] };

const onBun: Runtime = (name) => ({ command: process.execPath, args: ["run", join(ROOT, `${name}.ts`)] });

/** Deno with exactly the permissions that deno.json, and so the README, gives the script. */
const onDeno: Runtime = (name) => {
  const { tasks } = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8"));
  const [, ...args] = String(tasks[name]).split(" ");
  return { command: denoPath(), args };
};

const skip = notRoot() || missing({ ...PACKAGES.nginx, ...PACKAGES.logrotate, ...PACKAGES.sshd });

describe.skipIf(skip).each([
  ["bun", onBun],
  ["deno", onDeno],
] as [string, Runtime][])("under %s", (_name, runtime) => {
  test("every line that nginx writes reaches the client once, in the file of its window, whoever is killed", async () => {
    const world = await createWorld(runtime);
    const { nginx, sshd, mails, run, folder } = world;
    let receiver = run("receiver");
    await receiver.says("receiver listens");
    let shipper = run("shipper");
    let forwarder = run("forwarder");
    for (const name of SCRIPTS) expect(await run(name, ["--check"]).ended).toBe(0);
    const heard = join(folder, "batches", HOST, ".ledger");
    await untilOr(world, "the receiver has heard of the shipper", async () => existsSync(heard));
    const monitor = run("monitor", ["--watch"]);
    await monitor.says("first run");

    const traffic = startTraffic(nginx);
    await traffic.reached(0.15);
    nginx.rotate();
    await traffic.reached(0.25);
    await receiver.stop("SIGKILL");
    await traffic.reached(0.3);
    receiver = run("receiver");
    await receiver.says("receiver listens");
    await traffic.reached(0.4);
    await shipper.stop("SIGKILL");
    await traffic.reached(0.5);
    nginx.rotate();
    await traffic.reached(0.55);
    nginx.rotate(); // the file that the shipper was reading is compressed now
    await mailAbout("silent", world);
    shipper = run("shipper");
    await shipper.says("following");
    await traffic.reached(0.65);
    await forwarder.stop("SIGKILL");
    await traffic.reached(0.8);
    forwarder = run("forwarder", [], { LOG_RT_SYNC_STOP_AT: "forward:renamed" });
    await traffic.reached(0.9);
    nginx.rotate();
    await traffic.done;
    expect(await forwarder.ended).toBe("SIGKILL"); // between the rename and its report
    forwarder = run("forwarder");

    const cells = await allDelivered(world);
    expect(cells.filter(({ missing, extra }) => missing + extra > 0)).toEqual([]);
    expect(cells.reduce((sum, cell) => sum + cell.written, 0)).toBe(REQUESTS);
    expect(new Set(cells.map(({ window }) => window)).size).toBeGreaterThanOrEqual(4);

    const sent = () => readdirSync(join(folder, "batches", "sent"));
    await until("every delivered batch is in sent/", () => sent().length === readdirSync(sshd.folder).length);
    expect(sent().sort()).toEqual(readdirSync(sshd.folder).sort());
    expect(reportedLines(join(folder, "linecount-report.log"))).toBe(REQUESTS);

    await mailAbout("back", world);
    await expectMails(mails);

    const running = [shipper, receiver, forwarder, monitor];
    expect(await Promise.all(running.map((each) => each.stop()))).toEqual([0, 0, 0, 0]);

    const housekeep = run("housekeep");
    expect(await housekeep.ended).toBe(0);
    expect(sent().every((name) => name.endsWith(".log.gz"))).toBe(true);
  }, 120_000);
});

describe("deno", () => {
  test("check finds nothing wrong with the five scripts", async () => {
    const check = start(denoPath(), ["check", ...SCRIPTS.map((name) => `${name}.ts`)], {
      env: { NO_COLOR: "1" },
    });
    expect({ code: await check.ended, output: check.output }).toMatchObject({ code: 0 });
  }, 60_000);
});

/** Everything around the five scripts. */
interface World {
  folder: string;
  nginx: Nginx;
  sshd: Sshd;
  mails: MailServer;
  run: (name: Section, flags?: string[], env?: Record<string, string>) => Running;
  started: { name: Section; running: Running }[];
}

async function createWorld(runtime: Runtime): Promise<World> {
  const [nginx, sshd, mails, folder, port] = await Promise.all([
    startNginx(),
    startSshd(),
    startSmtp(),
    tempFolder(),
    freePort(),
  ]);
  const token = join(folder, "token");
  await writeFile(token, randomBytes(16).toString("hex"));
  const dir = join(folder, "batches");
  await mkdir(dir);
  const report = join(folder, "linecount-report.log");
  const config = {
    shipper: {
      files: [nginx.log],
      receiver: `http://127.0.0.1:${port}`,
      host: HOST,
      token: { file: token },
      stateDir: join(folder, "shipper"),
      chunkBytes: 16_384,
      rotateWaitSeconds: 1,
      heartbeatSeconds: 1,
    },
    receiver: {
      groups: [{ port, senders: [HOST] }],
      dir,
      windowMinutes: WINDOW_MINUTES,
      sealAfterSeconds: 1,
      tokens: { [HOST]: { file: token } },
    },
    forwarder: {
      dir,
      target: sshd.target,
      privateKey: { file: sshd.privateKey },
      hostKey: sshd.hostKey,
      intervalSeconds: 0.3,
      report,
    },
    monitor: {
      dir,
      expected: [HOST],
      silentMinutes: 10 / 60, // of a busy machine, too, only the one that was stopped is silent for so long
      report,
      stateFile: join(folder, "monitor.json"),
      schedule: "* * * * * *",
      mail: { smtp: `smtp://127.0.0.1:${mails.port}`, from: "logs@example.com", to: ["ops@example.com"] },
    },
    housekeep: { dir, report, compressAfterHours: 0 },
  };
  const file = join(folder, "config.json");
  await writeFile(file, JSON.stringify(config, null, 2));
  const started: World["started"] = [];
  const run: World["run"] = (name, flags = [], env = {}) => {
    const { command, args } = runtime(name);
    const running = start(command, [...args, "--config", file, ...flags], { env });
    started.push({ name, running });
    return running;
  };
  return { folder, nginx, sshd, mails, run, started };
}

/** Requests from four clients at once, in times that cover several windows of the recent past. */
function startTraffic(nginx: Nginx) {
  const window = WINDOW_MINUTES * 60_000;
  const from = Math.floor(Date.now() / window) * window - MINUTES * 60_000;
  const timeOf = (number: number) => formatTime(from + (number / REQUESTS) * MINUTES * 60_000);
  let made = 0;
  let allowed = 0;
  const client = async (first: number) => {
    for (let number = first; number < REQUESTS; number += 4) {
      await until("traffic may go on", () => made < allowed, 60_000);
      await nginx.get([number], timeOf);
      made++;
    }
  };
  const clients = Promise.all([0, 1, 2, 3].map(client));
  clients.catch(() => {});
  return {
    /** Waits until this share of the requests was made; more are made meanwhile. */
    reached: async (share: number) => {
      allowed = Math.max(allowed, share * REQUESTS + REQUESTS * 0.05);
      await Promise.race([clients, until(`${share} of the requests`, () => made >= share * REQUESTS)]);
    },
    get done() {
      allowed = REQUESTS;
      return clients;
    },
  };
}

/** $time_local, in UTC. */
function formatTime(at: number): string {
  const [date = "", time = ""] = new Date(at).toISOString().split("T");
  const [year, month, day] = date.split("-");
  return `${day}/${MONTHS[Number(month) - 1]}/${year}:${time.slice(0, 8)} +0000`;
}

/** Waits for the last line. */
async function allDelivered(world: World): Promise<Cell[]> {
  let cells: Cell[] = [];
  await untilOr(world, "all lines are at the client", async () => {
    cells = await takeAccount(world.nginx, world.sshd);
    return cells.reduce((sum, cell) => sum + cell.delivered, 0) >= REQUESTS;
  });
  return cells;
}

function mailAbout(text: string, world: World): Promise<void> {
  return untilOr(world, `a mail about ${text}`, async () =>
    (await subjectsOf(world.mails)).some((subject) => subject.includes(text)),
  );
}

/** Waits, and shows what the scripts said when it is in vain. */
async function untilOr({ started }: World, what: string, condition: () => Promise<boolean>): Promise<void> {
  await until(what, condition).catch((error) => {
    for (const { name, running } of started) process.stderr.write(`--- ${name}\n${running.output}`);
    throw error;
  });
}

async function takeAccount(nginx: Nginx, sshd: Sshd) {
  const written = new Map();
  await tallyLogs(written, HOST, nginx.files(), WINDOW_MINUTES);
  const names = readdirSync(sshd.folder);
  if (names.some((name) => name.endsWith(".tmp"))) return [];
  expect(names.every((name) => name.includes(dashed(HOST)))).toBe(true);
  const { tally, parts } = await tallyDelivered(sshd.folder, names); // one listing: what comes after it may be half a file
  return compare(written, tally, parts);
}

/** Lines that the report says were sent; a batch that is reported twice counts once. */
function reportedLines(report: string): number {
  const sent = new Map<string, number>();
  for (const line of readFileSync(report, "utf8").split("\n")) {
    const match = /^[-\d]{10} [:\d]{8} \| (\S+) \| lines=(\d+) \| status=Sent$/.exec(line);
    if (match) sent.set(String(match[1]), Number(match[2]));
  }
  return [...sent.values()].reduce((sum, lines) => sum + lines, 0);
}

async function subjectsOf(mails: MailServer): Promise<string[]> {
  const parsed = await Promise.all(mails.messages.map((message) => simpleParser(message)));
  return parsed.map(({ subject = "" }) => subject);
}

/** One mail that the host is silent and one that it is back, both with HTML and plain text. */
async function expectMails(mails: MailServer): Promise<void> {
  expect(await subjectsOf(mails)).toEqual([
    expect.stringMatching(/^\[log-rt-sync\] 10\.10\.21\.181 silent since \d\d:\d\d$/),
    expect.stringMatching(/^\[log-rt-sync\] 10\.10\.21\.181 back after \d+s$/),
  ]);
  for (const message of mails.messages) {
    const { text, html, from, to } = await simpleParser(message);
    expect(text).toContain(HOST);
    expect(html).toContain(HOST);
    expect(from?.text).toBe("logs@example.com");
    expect(to).toMatchObject({ text: "ops@example.com" });
  }
}
