/**
 * The monitor: tells by mail when something is wrong, when it is over, and once an hour what came and went.
 *
 * A run looks (ledgers, folders, /healthz, disk), judges (a pure function, see lib/incident.ts), puts what is to
 * be told into a queue, saves, and then sends the queue in order. A notice leaves the queue only after the SMTP
 * server has accepted it, and that is saved at once. A crash before the first save: the next run sees the
 * same and makes the same notice. A crash after it: the notice is in the queue and is sent by the next
 * run. A crash between the server's acceptance and the save: the mail comes twice, with the same Message-ID; never zero
 * times. A summary stands in the queue as its hour alone, and is written when it is sent.
 *
 * One run at a time, by a lock that ends with its process. The exit code is 1 while a mail is not accepted.
 */
import { access, constants } from "node:fs/promises";
import { dirname } from "node:path";
import type { Config } from "./lib/config.ts";
import { failpoint, holdLock, makeFolder } from "./lib/durable.ts";
import { judge } from "./lib/incident.ts";
import { renderAlert } from "./lib/mail/alertmail.ts";
import type { MailText } from "./lib/mail/mailpage.ts";
import { MailError, sendMail, verifyMail } from "./lib/mail/smtp.ts";
import { HOUR_MS, lastHourEnd, summariseHour } from "./lib/mail/summary.ts";
import { renderSummary } from "./lib/mail/summarymail.ts";
import { type MonitorState, type Notice, readState, saveState } from "./lib/notice.ts";
import { checkSchedule, followSchedule } from "./lib/schedule.ts";
import {
  EXIT,
  errorMessage,
  formatDuration,
  type Log,
  OperatorError,
  runScript,
  type Service,
} from "./lib/service.ts";
import { type LookContext, look } from "./lib/sight.ts";

type Options = Config["monitor"];
const MINUTE_MS = 60_000;
/** Hours before this are not summarised after a long absence: the records do not reach further by far. */
const OLDEST_SUMMARY_MS = 7 * 24 * HOUR_MS;
const HTTP_TIMEOUT_MS = 5_000;
/** A webhook that refuses is tried by every run for so long. */
const WEBHOOK_PATIENCE_MS = HOUR_MS;

/** What a run is given. */
export interface MonitorContext extends LookContext {
  log: Log;
}

async function main(service: Service<"monitor">): Promise<number> {
  const { config, configFile, flags, log, signal, now } = service;
  const where = `${configFile}: monitor.schedule`;
  if (flags["test-mail"]) return sendTestMail(service);
  if (flags.status) return printStatus(service);
  const pass = () => checkOnce({ config, log, signal, now });
  if (flags.watch) await followSchedule(config.schedule, pass, { where, log, signal });
  else if (!(await pass()) && !signal.aborted) return EXIT.failed;
  return EXIT.done;
}

/**
 * One run. Gives true when every mail that was due is accepted. Throws an OperatorError when another run is in
 * progress, and the system's error when the state cannot be saved.
 */
export async function checkOnce(context: MonitorContext): Promise<boolean> {
  const { config, now } = context;
  await makeFolder(dirname(config.stateFile)).catch((cause) => {
    throw new OperatorError(`Cannot create the folder of ${config.stateFile}: ${errorMessage(cause)}`);
  });
  const lock = await holdLock(`${config.stateFile}.lock`, "The monitor's state");
  try {
    const before = await recall(context);
    const { sight, offset } = await look(context);
    const state = judge(before, sight, config, now());
    queueSummaries(state, { ...context, offset });
    await saveState(config.stateFile, state);
    failpoint("monitor:queued");
    await tell(state, context);
    const healthy = state.queue.every(({ mailed }) => mailed);
    if (healthy) await beat(context);
    return healthy;
  } finally {
    lock.release();
  }
}

/** The state of the run before; an unreadable one is told, and this run starts from what it sees. */
async function recall({ config, log, now }: MonitorContext): Promise<MonitorState> {
  const { state, fault } = await readState(config.stateFile, now());
  if (fault) log.error("state file unreadable: starting from what is seen", { error: fault });
  else if (state.at === 0) log.info("first run: starting from what is seen", { stateFile: config.stateFile });
  return state;
}

// ---- tell

/** Queues the summaries of all hours that have become due since the last one, each once. */
function queueSummaries(
  state: MonitorState,
  { config, log, now, offset }: MonitorContext & { offset: number },
): void {
  const due = lastHourEnd(now() - config.summaryMinute * MINUTE_MS, offset);
  if (state.summarisedUntil === 0) state.summarisedUntil = due; // the first is that of the next hour
  const oldest = due - OLDEST_SUMMARY_MS;
  if (state.summarisedUntil < oldest) {
    log.warn("hours long past are not summarised", { hours: (oldest - state.summarisedUntil) / HOUR_MS });
    state.summarisedUntil = oldest;
  }
  while (state.summarisedUntil < due) {
    const hourEnd = lastHourEnd(state.summarisedUntil + HOUR_MS, offset); // aligned anew when the zone changed
    const id = `summary-${state.instance}-${hourEnd}`;
    state.queue.push({ kind: "summary", id, at: now(), references: [], hourEnd });
    state.summarisedUntil = hourEnd;
  }
}

/** Sends the queue in order. A server that is down ends the attempt; a mail that it refuses holds up no other. */
async function tell(state: MonitorState, context: MonitorContext): Promise<void> {
  const { config, log, signal, now } = context;
  let mailDown = false;
  let hookDown = config.webhook === undefined;
  for (const notice of [...state.queue]) {
    const mailDue = !notice.mailed && !mailDown;
    const postDue = !notice.posted && !hookDown;
    if (signal.aborted) return;
    if (!mailDue && !postDue) continue;
    const text = await render(notice, config).catch((error) =>
      log.error("cannot make the account of an hour", { id: notice.id, error: errorMessage(error) }),
    );
    if (!text) continue; // it stays in the queue, and holds up no other
    if (mailDue) mailDown = !(await mailNotice(notice, text, context));
    if (postDue) hookDown = !(await postNotice(notice, text, context));
    if (!config.webhook || (hookDown && now() - notice.at > WEBHOOK_PATIENCE_MS)) notice.posted = true; // given up
    if (notice.mailed && notice.posted) state.queue.splice(state.queue.indexOf(notice), 1);
    await saveState(config.stateFile, state);
  }
}

async function render(notice: Notice, config: Options): Promise<MailText> {
  return notice.kind === "alert"
    ? renderAlert(notice)
    : renderSummary(await summariseHour(config, notice.hourEnd));
}

/** Marks the notice as mailed when the server took it. Gives false when the server takes none. */
async function mailNotice(
  notice: Notice,
  text: MailText,
  { config, log, signal }: MonitorContext,
): Promise<boolean> {
  const { id, at, references } = notice;
  try {
    const refused = await sendMail(config.mail, { id, at, references, ...text }, signal);
    failpoint("monitor:accepted");
    notice.mailed = true;
    log.info("mail sent", { id, subject: text.subject });
    if (refused.length > 0) log.warn("recipients refused", { id, recipients: refused.join(",") });
    return true;
  } catch (error) {
    log.error("mail not accepted", { id, error: errorMessage(error) });
    return error instanceof MailError && error.permanent;
  }
}

/** The mail's content as JSON. Its address may hold a secret and is never told. */
async function postNotice(
  notice: Notice,
  { subject, text }: MailText,
  { config, log, signal }: MonitorContext,
): Promise<boolean> {
  const { mailed: _, posted: __, references: ___, ...content } = notice;
  try {
    const answer = await fetch(config.webhook ?? "", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ subject, text, ...content }),
      signal: withTimeout(signal),
    });
    if (!answer.ok) throw new Error(`it answers ${answer.status}`);
    notice.posted = true;
    return true;
  } catch (error) {
    log.warn("webhook not reached; the next run tries again", { id: notice.id, error: withoutUrl(error) });
    return false;
  }
}

/** Tells whoever watches the monitor that it is alive. */
async function beat({ config, log, signal }: MonitorContext): Promise<void> {
  if (!config.heartbeatUrl) return;
  try {
    const answer = await fetch(config.heartbeatUrl, { signal: withTimeout(signal) });
    if (!answer.ok) throw new Error(`it answers ${answer.status}`);
  } catch (error) {
    log.warn("heartbeat not delivered", { error: withoutUrl(error) });
  }
}

function withTimeout(signal: AbortSignal): AbortSignal {
  return AbortSignal.any([signal, AbortSignal.timeout(HTTP_TIMEOUT_MS)]);
}

function withoutUrl(error: unknown): string {
  return errorMessage(error).replace(/https?:\/\/\S+/g, "…");
}

// ---- flags

async function sendTestMail({ config, log, signal, now }: Service<"monitor">): Promise<number> {
  const at = now();
  const text = "If you can read this, alerts will arrive too.";
  const fact = { kind: "note", title: "Test mail", text, status: "ok", sender: false, since: at } as const;
  const notice: Notice = { kind: "alert", id: `test-${at}`, at, references: [], changes: [fact], counts: {} };
  return (await mailNotice(notice, renderAlert(notice), { config, log, signal, now })) && notice.mailed
    ? EXIT.done
    : EXIT.failed;
}

async function printStatus(service: Service<"monitor">): Promise<number> {
  const { config, now } = service;
  const before = await recall(service);
  const { sight } = await look(service);
  const state = judge(before, sight, config, now());
  const ago = (at: number) => (at > 0 ? `${formatDuration(now() - at)} ago` : "never");
  const seen = new Map((sight.hosts ?? []).map((host) => [host.host, host]));
  const rows = [["SENDER", "STATE", "HEARD", "LAST LINE", "LAG", "LOST"]];
  const faults: string[] = [];
  for (const [key, incident] of Object.entries(state.incidents)) {
    const { status, title, text, flapping } = incident;
    if (!key.startsWith("host ")) {
      if (status === "fault") faults.push(`${title}: ${text}`);
      continue;
    }
    const { heardAt = 0, lineAt = 0, lag = 0, lost = 0 } = seen.get(title) ?? {};
    const threshold = (config.silentMinutesByHost[title] ?? config.silentMinutes) * MINUTE_MS;
    const shown = status === "ok" && heardAt - lineAt >= threshold ? "quiet" : status;
    rows.push([
      title,
      flapping ? `${shown}, flapping` : shown,
      ago(heardAt),
      ago(lineAt),
      `${lag}`,
      `${lost}`,
    ]);
  }
  const widths = rows[0]?.map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0))) ?? [];
  const lines = rows.map((row) =>
    row
      .map((cell, i) => cell.padEnd(widths[i] ?? 0))
      .join("  ")
      .trimEnd(),
  );
  const queue = state.queue.filter(({ mailed }) => !mailed).length;
  lines.push(
    "",
    faults.length > 0 ? faults.join("\n") : "Receiver, delivery and disk: ok",
    `Mails waiting: ${queue}`,
  );
  process.stdout.write(`${lines.join("\n")}\n`);
  return EXIT.done;
}

/** What only this host can tell of the config; with `connect` also whether the mail server lets us in. */
async function check({ config, signal, checks }: Service<"monitor">, connect: boolean): Promise<void> {
  for (const fault of checkSchedule(config.schedule)) checks.fault(`monitor.schedule: ${fault}`);
  await checks.folder("monitor.dir", config.dir, "read");
  await checks.folder("monitor.stateFile", dirname(config.stateFile), "write");
  const { ca } = config.mail;
  if (ca) await checks.step(`monitor.mail.ca: ${ca}`, () => access(ca, constants.R_OK));
  if (connect && !checks.faulty) {
    await checks.step(`monitor.mail.smtp: ${config.mail.smtp}`, () => verifyMail(config.mail, signal));
  }
}

if (import.meta.main) {
  await runScript(
    {
      name: "monitor",
      about: "Tells by mail what is wrong and what was delivered; one check (for cron), or --watch.",
      flags: {
        watch: "stay and follow monitor.schedule",
        status: "print what is seen now, as a table; tells nobody",
        "test-mail": "send a mail to show that mails arrive, exit",
      },
      check,
    },
    main,
  );
}
