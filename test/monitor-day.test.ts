/**
 * A day of twelve senders, minute by minute: real ledgers, a real mail server, a clock that is passed in. What
 * happens is in `world`; the mails, in order, are exactly those of `EXPECTED`.
 */
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join } from "node:path";
import { simpleParser } from "mailparser";
import { SMTPServer } from "smtp-server";
import { parseConfig } from "../lib/config.ts";
import { formatRecord } from "../lib/ledger.ts";
import { createLog } from "../lib/service.ts";
import { checkOnce } from "../monitor.ts";
import { freePort, onCleanup, tempFolder } from "./support.ts";

const DAY = Date.UTC(2026, 10, 22);
const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const time = (clock: string) => Number(clock.slice(0, 2)) * 60 + Number(clock.slice(3));
const between = (minute: number, from: string, to: string) => minute >= time(from) && minute < time(to);

/** Whether a sender's heartbeat reaches the receiver in this minute of the day. */
function isHeard(host: number, minute: number): boolean {
  if (between(minute, "10:00", "10:04")) return false; // the receiver is down
  if (host === 3) return !between(minute, "02:00", "08:00"); // its shipper is dead
  if (host === 5) return !between(minute, "03:00", "03:20"); // within its own threshold
  if (host === 6 && between(minute, "11:00", "12:00")) return minute % 8 >= 4; // comes and goes every 4 minutes
  if (host === 7) return !between(minute, "16:10", "17:30"); // while the mail server is down
  if (host === 8) return !between(minute, "20:30", "24:00"); // while the monitor does not run
  if (host === 11) return false; // decommissioned
  if (host === 12) return minute >= time("09:00"); // expected, and late to come
  return true;
}

const EXPECTED = [
  "00:00 10.0.0.11 silent since 01:00; 10.0.0.12 never seen",
  "00:15 23:00–00:00",
  "01:00 10.0.0.11 is gone: silent for a day, not expected",
  "01:15 00:00–01:00",
  "02:04 10.0.0.3 silent since 01:59",
  "02:15 01:00–02:00",
  "03:15 02:00–03:00",
  "04:00 10.0.0.12 still never seen",
  "04:15 03:00–04:00",
  "05:15 04:00–05:00",
  "06:04 10.0.0.3 still silent since 01:59",
  "06:15 05:00–06:00",
  "07:15 06:00–07:00",
  "08:00 10.0.0.12 still never seen; 10.0.0.3 back after 6h 1m",
  "08:15 07:00–08:00",
  "09:00 10.0.0.12 is heard for the first time",
  "09:15 08:00–09:00",
  "10:00 Receiver R is unhealthy: /healthz answers 503: not well", // and no word of its twelve senders
  "10:04 Over: receiver R is unhealthy, lasted 4m 0s",
  "10:15 09:00–10:00",
  "11:05 10.0.0.6 silent since 11:03",
  "11:08 10.0.0.6 back after 5m 0s",
  "11:13 10.0.0.6 silent since 11:11",
  "11:15 10:00–11:00",
  "11:16 10.0.0.6 back after 5m 0s",
  "11:21 10.0.0.6 is flapping",
  "12:15 11:00–12:00",
  "12:26 10.0.0.6 is steady again: ok",
  "13:00 12:00–13:00", // the clock says 14:00
  "13:15 13:00–14:00", // the clock says 14:15
  "15:15 14:00–15:00",
  "19:00 10.0.0.7 silent since 16:09", // the mail server is back
  "19:00 15:00–16:00",
  "19:00 16:00–17:00",
  "19:00 10.0.0.7 back after 1h 21m",
  "19:00 17:00–18:00",
  "19:15 18:00–19:00",
  "23:00 10.0.0.8 silent since 20:29", // the monitor is back
  "23:00 19:00–20:00",
  "23:00 20:00–21:00",
  "23:00 21:00–22:00",
  "23:15 22:00–23:00",
];

test("checkOnce() sends exactly the mails of a simulated day, in order", async () => {
  const dir = await tempFolder();
  const mails: { at: number; raw: string }[] = [];
  let real = 0; // minutes since midnight that really passed
  const step = () => (between(real, "13:00", "13:30") ? HOUR : 0); // the clock is wrong for half an hour
  const now = () => DAY + real * MINUTE + step();
  const take = (raw: string) => mails.push({ at: real, raw });
  const port = await freePort();
  let stopSmtp = await startSmtp(port, take);
  const receiver = await startReceiver(() => !between(real, "10:00", "10:04"));
  const config = parseConfig(
    JSON.stringify({
      monitor: {
        dir,
        expected: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12].map((n) => `10.0.0.${n}`),
        silentMinutesByHost: { "10.0.0.5": 30, "10.0.0.6": 2 },
        minFreePercent: 0,
        receivers: [receiver],
        stateFile: join(await memoryFolder(), "monitor.json"),
        report: join(dir, "report.log"),
        mail: {
          smtp: `smtp://127.0.0.1:${port}`,
          from: "logs@example.com",
          to: ["ops@example.com"],
          subjectPrefix: "",
        },
      },
    }),
    "monitor",
  );
  const heardAt = new Map<number, number>([[11, DAY - 23 * HOUR]]);
  const failed: number[] = [];
  for (let host = 1; host <= 12; host++) await mkdir(join(dir, `10.0.0.${host}`));
  for (real = 0; real < 24 * 60; real++) {
    for (let host = 1; host <= 12; host++) {
      if (isHeard(host, real)) heardAt.set(host, now());
      const at = heardAt.get(host);
      const quiet = host === 4 && real >= time("05:00"); // its nginx writes nothing
      const lineAt = quiet ? DAY + 5 * HOUR : (at ?? 0);
      const window = { window: "26112200_00-19", windowEnd: DAY + 20 * MINUTE }; // at UTC
      const streams = { abcdefgh: { offset: 1, at: at ?? 0, ...window } };
      if (at)
        await writeFile(
          join(dir, `10.0.0.${host}`, ".ledger"),
          formatRecord({ v: 1, heardAt: at, lineAt, streams }),
        );
    }
    if (real === time("16:00")) await stopSmtp();
    if (real === time("19:00")) stopSmtp = await startSmtp(port, take);
    if (between(real, "20:00", "23:00")) continue; // the monitor does not run
    const signal = new AbortController().signal;
    const uptime = () => (real + 100_000) * MINUTE;
    const secondLook = async () => {};
    const healthy = await checkOnce({ config, log: createLog(() => {}), signal, now, uptime, secondLook });
    if (!healthy) failed.push(real);
  }
  const subjects = await Promise.all(
    mails.map(async ({ at, raw }) => {
      const { subject = "" } = await simpleParser(raw);
      const clock = `${String(Math.floor(at / 60)).padStart(2, "0")}:${String(at % 60).padStart(2, "0")}`;
      return `${clock} ${subject.replace(/^(\d\d:00–\d\d:00) .*/, "$1").replace(/127\.0\.0\.1:\d+/g, "R")}`;
    }),
  );
  expect(subjects).toEqual(EXPECTED);
  expect(failed).toEqual(Array.from({ length: 166 }, (_, i) => time("16:14") + i));
}, 120_000);

/** The state is synced 1,440 times in this day: in memory where there is a file system for it. */
async function memoryFolder(): Promise<string> {
  if (!existsSync("/dev/shm")) return tempFolder();
  const folder = await mkdtemp("/dev/shm/log-rt-sync-");
  onCleanup(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

/** A mail server at a port; gives the function that ends it. */
async function startSmtp(port: number, take: (raw: string) => void): Promise<() => Promise<void>> {
  const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    onData(stream, _session, done) {
      let raw = "";
      stream.on("data", (data) => {
        raw += data;
      });
      stream.on("end", () => {
        take(raw);
        done();
      });
    },
  });
  server.on("error", () => {});
  await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
  const stop = () => new Promise<void>((resolve) => server.close(() => resolve()));
  onCleanup(stop);
  return stop;
}

async function startReceiver(isUp: () => boolean): Promise<string> {
  const server = createServer((_request, response) => {
    response.statusCode = isUp() ? 200 : 503;
    response.end(isUp() ? "ok" : "not well");
  });
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  return `http://127.0.0.1:${(server.address() as { port: number }).port}`;
}
