/**
 * monitor: tells by mail when something is wrong, when it is over, and once an hour what came and went.
 *
 * A run looks (lib/status.ts judges), compares with what was told, puts what is to be told into a queue, saves, and then
 * sends the queue in order. A recipient leaves a notification only when the server has accepted the mail for it, and that
 * is saved at once. A crash before the first save: the next run sees the same and makes the same notification. A crash
 * after it: the notification is in the queue and is sent by the next run. A crash between the server's acceptance and the
 * save: the mail comes twice, with the same Message-ID; never zero times. A summary stands in the queue as its span alone,
 * and is written when it is sent.
 *
 * The state is changed under a lock that is held for a moment; one run at a time sends, and another one that comes
 * meanwhile looks and queues. The exit code is 1 while a mail is not accepted.
 */
import { uptime } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Config } from "./lib/config.ts";
import { failpoint } from "./lib/durable.ts";
import { ofHost, parseHost } from "./lib/host.ts";
import { type Change, isGood, listNames, renderAlert, type Status } from "./lib/mail/message.ts";
import {
  callHeartbeat,
  clientOf,
  deliver,
  type Incident,
  type MonitorContext,
  type MonitorState,
  StateStore,
  withoutUrl,
} from "./lib/mail/outbox.ts";
import { sendMail, verifyMail } from "./lib/mail/smtp.ts";
import { emptyTotals, type Totals } from "./lib/mail/summary.ts";
import { tryLock } from "./lib/runtime.ts";
import { checkSchedule, followSchedule } from "./lib/schedule.ts";
import {
  DAY,
  EXIT,
  errorMessage,
  formatBytes,
  formatDuration,
  HOUR,
  localZone,
  MINUTE,
  OperatorError,
  runScript,
  type Service,
  wait,
} from "./lib/service.ts";
import { type HostStatus, sortBySeverity } from "./lib/snapshot.ts";
import {
  count,
  formatClock,
  headline,
  observe,
  type Problem,
  type Snapshot,
  sentence,
  undeliverableProblems,
} from "./lib/status.ts";
import { formatTable, paint } from "./lib/table.ts";

type Options = Config["monitor"];
/** A problem without a duration of its own is looked at again after so long before it is told. */
const SECOND_LOOK_MS = 20_000;
/** So many changes within this time are told as flapping, and it is over after a while without any. */
const FLAP_CHANGES = 5;
const FLAP_WITHIN_MS = HOUR;
const STEADY_MS = 30 * MINUTE;
/** Bytes lost are told at once, and again at most so often. */
const LOST_AGAIN_MS = HOUR;
/** Free space must rise by so much over the threshold before the fault is over, in percent of the disk. */
const DISK_MARGIN = 2;
/** A difference between clock and uptime beyond this is a clock that was set; a longer gap by a restart is told. */
const CLOCK_STEP_MS = MINUTE;
const AWAY_MS = 10 * MINUTE;
/** Hours before this are not summarised after a long absence: the records do not reach further by far. */
const OLDEST_SUMMARY_MS = 7 * DAY;
/** Beyond so many notifications in the queue, changes join the last one: the queue stays small in a long outage. */
const QUEUE_LIMIT = 100;

async function main(service: Service<"monitor">): Promise<number> {
  const { configFile, flags, log, signal, now } = service;
  for (const flag of ["for", "reason", "off"])
    if (flags[flag] && !flags.mute) throw new OperatorError(`--${flag} goes with --mute`, EXIT.usage);
  if (flags["test-mail"]) return sendTest(service);
  if (flags.status) return printStatus(service);
  if (flags.mute) return mute(service, String(flags.mute));
  let { config } = service;
  service.onReload((next) => {
    const kept = (["schedule", "stateFile"] as const).filter((key) => next[key] !== config[key]);
    config = { ...next, schedule: config.schedule, stateFile: config.stateFile };
    return kept;
  });
  if (!flags.watch)
    return (await checkOnce({ config, log, signal, now })) || signal.aborted ? EXIT.done : EXIT.failed;
  // A mail server may take ten minutes for an answer: meanwhile the schedule goes on.
  const sending = new Set<Promise<unknown>>();
  const pass = async () => {
    const sent: Promise<unknown> = send(await lookAndQueue({ config, log, signal, now }))
      .catch((error) => signal.aborted || log.error("sending failed", { error: errorMessage(error) }))
      .finally(() => sending.delete(sent));
    sending.add(sent);
  };
  await followSchedule(config.schedule, pass, { where: `${configFile}: monitor.schedule`, log, signal });
  await Promise.all(sending);
  return EXIT.done;
}

/** One run. Gives true when every mail that was due is accepted. */
export async function checkOnce(context: MonitorContext): Promise<boolean> {
  return send(await lookAndQueue(context));
}

async function lookAndQueue(context: MonitorContext): Promise<{ store: StateStore; snapshot: Snapshot }> {
  const { config, log } = context;
  const store = new StateStore(context);
  const { state: before, fault } = await store.read();
  if (fault) log.error("state file unreadable: starting from what is seen", { error: fault });
  else if (before.at === 0)
    log.info("first run: starting from what is seen", { stateFile: config.stateFile });
  const snapshot = await observeTwice(before, context);
  const run: Run = { context, snapshot, id: "", changes: [], references: new Set() };
  await store.change((state, damaged) => {
    state.future = before.future;
    if (damaged) run.changes.push(startsAnew(config, damaged, context.now()));
    evaluate(state, run);
    queueSummaries(state, run);
  });
  const wasUnsaved = before.incidents[STATE]?.status === "fault";
  if (store.unsaved || wasUnsaved) await store.change((state) => noteUnsaved(state, run, store.unsaved));
  failpoint("monitor:queued");
  return { store, snapshot };
}

async function send({ store, snapshot }: Awaited<ReturnType<typeof lookAndQueue>>): Promise<boolean> {
  const { config, log } = store.context;
  const sending = await tryLock(`${config.stateFile}.sending`).catch(() => ({ release: () => {} }));
  if (!sending) {
    log.info("another run sends: what is due is queued");
    return true;
  }
  try {
    const healthy = await deliver(store, snapshot);
    if (healthy) await callHeartbeat(store.context);
    return healthy;
  } finally {
    sending.release();
  }
}

// ---- observe

/** What an operator would see; a new problem without a duration of its own counts when it is there 20 s later, too. */
async function observeTwice(before: MonitorState, context: MonitorContext): Promise<Snapshot> {
  const first = await observeOnce(before, context);
  const isNew = ({ key, sudden }: Problem) => sudden === true && before.incidents[key]?.status !== "fault";
  if (!first.problems.some(isNew)) return first;
  await (context.secondLook ?? (() => wait(secondLookMs(context.config), context.signal)))();
  const again = await observeOnce(before, context);
  const seen = new Set(first.problems.map(({ key }) => key));
  again.problems = again.problems.filter((problem) => !isNew(problem) || seen.has(problem.key));
  return again;
}

/** No silence that is to be told may come and go between the two looks. */
function secondLookMs({ silentMinutes, silentMinutesByHost }: Options): number {
  const shortest = Math.min(silentMinutes, ...Object.values(silentMinutesByHost));
  return Math.min(SECOND_LOOK_MS, (shortest * MINUTE) / 2);
}

async function observeOnce(state: MonitorState, context: MonitorContext): Promise<Snapshot> {
  const { config, now, signal } = context;
  const unhealthy = await askReceivers(context);
  signal.throwIfAborted();
  const at = now();
  const up = upSince(context);
  noteUnnamed(state, unhealthy.length > 0, at);
  const snapshot = await observe(config.dir, config, {
    now: at,
    since: Math.max(wasSet(state, at, at - up) ? at : state.clockSetAt, up),
    unnamed: state.unnamed,
    mutes: state.mutes,
    future: state.future,
    more: undeliverableProblems(state.undeliverable, at),
  });
  const explained = snapshot.receivers.filter(({ runs, health }) => !runs || health !== undefined);
  const isTold = (port: number) => explained.some(({ ports }) => ports.includes(port));
  const more = unhealthy.filter(({ port }) => !isTold(port)).map(({ problem }) => problem);
  snapshot.problems = [...more, ...snapshot.problems];
  return snapshot;
}

function upSince({ now, uptime: clock = () => uptime() * 1000 }: MonitorContext): number {
  return now() - clock();
}

/** Whether the clock was set since the last run; a restart is none. */
function wasSet(state: MonitorState, now: number, up: number): boolean {
  return state.at > 0 && up >= state.uptime && Math.abs(now - state.at - (up - state.uptime)) > CLOCK_STEP_MS;
}

async function askReceivers({ config, signal }: MonitorContext) {
  const ask = clientOf(config);
  const found = await Promise.all(
    config.receivers.map(async (url) => {
      const { origin, host, port, protocol } = new URL(url);
      const text = await askHealth(ask, origin, signal).catch(
        (error) => `it does not answer: ${withAdvice(error)}`,
      );
      if (text === undefined) return [];
      const problem: Problem = {
        key: `receiver ${origin}`,
        leg: "arrival",
        title: `receiver ${host} is unhealthy`,
        text,
        hosts: [],
        sudden: true,
        next: [`curl -sS ${origin}/healthz`, "journalctl -u 'log-rt-sync-receiver@*' -n 50"],
      };
      return [{ port: Number(port || (protocol === "https:" ? 443 : 80)), problem }];
    }),
  );
  return found.flat();
}

/** What a receiver says is wrong with it; undefined when it is well. Throws what the network said. */
async function askHealth(ask: ReturnType<typeof clientOf>, origin: string, signal: AbortSignal) {
  const { ok, status, body } = await ask(`${origin}/healthz`, signal);
  return ok ? undefined : `/healthz answers ${status}: ${body.slice(0, 200).trim()}`;
}

function withAdvice(error: unknown): string {
  const text = errorMessage(error);
  if (/certificate required|alert/i.test(text))
    return `${text}; it wants a client certificate: set monitor.cert and monitor.key`;
  return /certificate|self.signed/i.test(text) ? `${text}; set monitor.ca to the PEM file of its CA` : text;
}

// ---- evaluate

interface Run {
  context: MonitorContext;
  snapshot: Snapshot;
  id: string;
  changes: Change[];
  references: Set<string>;
}

/** Compares what is seen with what was told, and puts at most one new alert at the end of the queue. */
function evaluate(state: MonitorState, run: Run): void {
  const { context, snapshot } = run;
  const { now } = snapshot;
  const up = now - upSince({ ...context, now: () => now });
  run.id = `alert-${state.instance}-${now}`;
  noteAway(state, run, up);
  if (wasSet(state, now, up)) {
    const leftOut = Math.floor((now - state.at - (up - state.uptime)) / HOUR) - 1;
    if (leftOut > 0) state.summarisedUntil += leftOut * HOUR; // hours that never were
    state.clockSetAt = now;
  }
  Object.assign(state, { at: now, uptime: up });
  const isDown = snapshot.problems.some(({ key }) => key.startsWith("receiver http"));
  if (context.config.receivers.length > 0) noteUnnamed(state, isDown, now);
  evaluateProblems(state, run);
  for (const host of snapshot.hosts) evaluateHost(state, run, host);
  forgetHosts(state, snapshot);
  enqueueAlert(state, run);
}

/** Noted at the look, and again with the lock held: what another run noted meanwhile stays. */
function noteUnnamed({ unnamed }: MonitorState, isDown: boolean, now: number): void {
  if (isDown) unnamed.wellUntil ??= now;
  else if (unnamed.wellUntil !== undefined) {
    unnamed.startedAt = now;
    delete unnamed.wellUntil;
  }
}

function noteAway(state: MonitorState, { snapshot, changes }: Run, up: number): void {
  const { now, server } = snapshot;
  const gap = now - state.at;
  if (state.at === 0 || gap < AWAY_MS || up >= gap) return;
  const text = `It was started again ${formatClock(now - up, now)}, ${formatDuration(gap - up)} after the last look. Senders that it did not hear meanwhile keep their lines.`;
  const title = `this server (${server}) was away from ${formatClock(state.at, now)} to ${formatClock(now - up, now)}`;
  changes.push(note(title, text, state.at));
}

/** A fact that is told once: nothing that lasts. */
function note(title: string, text: string, since: number, next: string[] = []): Change {
  return { kind: "note", title, text, status: "ok", sender: false, since, next };
}

/** The incident that the state file can't be written. */
const STATE = "state";
/** States of senders are told one by one, with their own times. */
const OF_SENDERS = ["silent", "never", "quiet"];

function evaluateProblems(state: MonitorState, run: Run): void {
  const { snapshot, context } = run;
  const { now, disk } = snapshot;
  const seen = new Map(
    snapshot.problems.filter(({ key }) => !OF_SENDERS.includes(key)).map((one) => [one.key, one]),
  );
  const isBlind = seen.has("folder") || seen.has("unreadable");
  const margin = disk && (100 * disk.free) / disk.total < context.config.minFreePercent + DISK_MARGIN;
  const known = Object.keys(state.incidents).filter((key) => !key.startsWith("host ") && key !== STATE);
  for (const key of new Set([...seen.keys(), ...known])) {
    const problem = seen.get(key);
    const incident = incidentOf(state, key, problem?.title ?? "");
    if (problem && (problem.mailFrom ?? 0) > now && incident.status === "ok") continue;
    if (
      !problem &&
      incident.status === "fault" &&
      ((key === "disk" && margin) || (isBlind && key !== "folder"))
    )
      continue;
    if (problem) Object.assign(incident, { title: problem.title, text: problem.text, next: problem.next });
    follow(state, run, incident, { status: problem ? "fault" : "ok", since: now, sender: false });
    if (!problem && incident.told === "ok" && !incident.flapping && incident.changes.length === 0)
      delete state.incidents[key];
  }
}

function evaluateHost(state: MonitorState, run: Run, host: HostStatus): void {
  const { context, snapshot } = run;
  noteLost(state, run, host);
  noteAgain(state, run, host);
  if (host.heardAt === 0 && !host.expected) return;
  if (host.state === "waiting") return; // nothing can be said of it yet
  const isBad = host.state === "silent" || host.state === "never" || host.state === "quiet";
  if (host.muted && isBad) return;
  const incident = incidentOf(state, `host ${host.host}`, host.host);
  const isQuiet = host.state === "quiet" && context.config.alertWhenQuiet;
  const status: Status = host.state === "quiet" ? (isQuiet ? "quiet" : "ok") : host.state;
  incident.text = isBad ? causeOf(snapshot, host) : "";
  const heard = (status === "quiet" && host.lineAt) || host.heardAt;
  const since = status === "never" ? snapshot.now : heard;
  if (isBad) incident.next = snapshot.problems.find(({ key }) => key === host.state)?.next;
  follow(state, run, incident, { status, since, sender: true });
}

function causeOf({ problems, hosts }: Snapshot, { host, state }: HostStatus): string {
  const text = problems.find(({ key }) => key === state)?.text ?? "";
  const refused = text
    .split("; ")
    .find((part) => part.startsWith("refused: ") && part.slice(9).startsWith(host));
  if (refused) return refused;
  if (state !== "silent") return "";
  const watched = hosts.filter((other) => other.expected || other.heardAt > 0);
  const all = watched.length > 1 && watched.every((other) => other.state === "silent");
  const arrival = problems.find(({ key, leg }) => leg === "arrival" && !OF_SENDERS.includes(key));
  if (!all) return "";
  return arrival ? `${arrival.title}: ${arrival.text}` : "receiver or network down?";
}

/** Bytes that vanished: on the sender before they were read, or here after they were stored. */
function noteLost(state: MonitorState, { snapshot, changes }: Run, host: HostStatus): void {
  const { now } = snapshot;
  const kept = ofHost(state.lost, host.host);
  const told = kept ?? { lost: 0, gone: 0, toldAt: 0 };
  state.lost[host.host] = told;
  if (!kept && state.begunAt >= now - MINUTE) Object.assign(told, { lost: host.lost, gone: host.gone });
  for (const key of ["lost", "gone"] as const) if (host[key] < told[key]) told[key] = 0; // a new ledger counts anew
  const [lost, gone] = [host.lost - told.lost, host.gone - told.gone];
  if (lost + gone === 0 || now - told.toldAt < LOST_AGAIN_MS) return;
  const file = host.lostIn === undefined ? "" : `, the last of ${host.lostIn}`;
  const since = told.toldAt > 0 ? ` since ${formatClock(told.toldAt, now)}` : "";
  const texts = [
    lost > 0
      ? `${formatBytes(lost)} vanished from its disk unread${since}${file}: deleted or truncated, with no copy left. Its own log names each file.`
      : "",
    gone > 0
      ? `${formatBytes(gone)} that were stored vanished from ${join(snapshot.dir, host.host)}${since}. The receiver's log names the files.`
      : "",
  ];
  changes.push({
    kind: "lost",
    title: host.host,
    text: texts.join(" ").trim(),
    status: "fault",
    sender: true,
    since: now,
    bytes: lost + gone,
    next: [
      `ssh ${host.host} "journalctl -u log-rt-sync-shipper --since -1h | grep -i lost"`,
      "journalctl -u 'log-rt-sync-receiver@*' --since -1h | grep -i lost",
    ],
  });
  Object.assign(told, { lost: host.lost, gone: host.gone, toldAt: now });
}

/** What a sender ships again after the receiver's folder was lost, told when it has shipped all of it. */
function noteAgain(
  state: MonitorState,
  { snapshot, changes }: Run,
  { host, again = 0, againFiles = 0 }: HostStatus,
): void {
  const kept = ofHost(state.again, host);
  const isPast = !kept && state.begunAt >= snapshot.now - MINUTE;
  const none = { told: 0, seen: 0, files: 0 };
  const known = isPast ? { told: again, seen: again, files: againFiles } : (kept ?? none);
  state.again[host] = known;
  if (again < known.told) known.told = known.files = 0; // lost once more: a new ledger counts anew
  const isSteady = again === known.seen;
  known.seen = again;
  if (!isSteady || again === known.told) return;
  const bytes = formatBytes(again - known.told);
  const files = count(againFiles - known.files, "file");
  const text = `The receiver had lost lines of ${host}, whose shipper has shipped ${bytes} of ${files} again, of what was not delivered. Some of it may have been: those lines come twice, in batches with other names. The shipper's log names each file, since when what comes twice had been delivered, and what is gone with its file.`;
  const next = [`ssh ${host} "journalctl -u log-rt-sync-shipper | grep 'receiver has lost lines'"`];
  changes.push(note(`${host} shipped ${bytes} again`, text, snapshot.now, next));
  Object.assign(known, { told: again, files: againFiles });
}

/** Of a sender whose records were removed, and for whom nobody asks, nothing is kept. */
function forgetHosts(state: MonitorState, { hosts, problems }: Snapshot): void {
  if (problems.some(({ key }) => key === "folder")) return;
  const present = new Set(hosts.map(({ host }) => host));
  const unreadable = new Set(problems.find(({ key }) => key === "unreadable")?.hosts);
  const isGone = (host: string) => !present.has(host) && !unreadable.has(host);
  for (const key of Object.keys(state.incidents))
    if (key.startsWith("host ") && isGone(key.slice(5))) delete state.incidents[key];
  for (const told of [state.lost, state.again, state.totals])
    for (const host of Object.keys(told)) if (isGone(host)) delete told[host];
}

function incidentOf(state: MonitorState, key: string, title: string): Incident {
  state.incidents[key] ??= { title, text: "", status: "ok", since: 0, told: "ok", toldAt: 0, changes: [] };
  return state.incidents[key];
}

/** Takes the subject's present state into its incident, and adds what there is to tell. */
function follow(
  state: MonitorState,
  { context, snapshot, id, changes, references }: Run,
  incident: Incident,
  { status, since, sender }: { status: Status; since: number; sender: boolean },
): void {
  const { now } = snapshot;
  incident.changes = incident.changes.filter((at) => now - at < FLAP_WITHIN_MS);
  const outage = incident.outage ?? since;
  if (status !== incident.status) {
    Object.assign(incident, { status, since, changes: [...incident.changes, now] });
    if (status === "ok") delete incident.outage;
    else incident.outage = outage;
  }
  const isUnsent = state.queue.some(
    (notification) =>
      notification.kind === "alert" &&
      notification.recipients.length > 0 &&
      notification.changes.some(({ title }) => title === incident.title),
  );
  const kind = whatToTell(incident, now, isUnsent ? Number.POSITIVE_INFINITY : context.config.remindMinutes);
  if (!kind) return;
  if (kind === "opened" && incident.told === "ok") incident.thread = id;
  else if (incident.thread) references.add(incident.thread);
  changes.push({
    kind,
    title: incident.title,
    text: incident.text,
    status,
    sender,
    since: status === "ok" ? outage : (incident.outage ?? incident.since),
    ...(status === "ok" && incident.told !== "never" && { lasted: Math.max(0, since - outage) }),
    ...(incident.next && { next: incident.next }),
  });
  incident.flapping = kind === "flapping" || (kind === "reminder" && incident.flapping === true);
  Object.assign(incident, { told: status, toldAt: now });
}

function whatToTell(incident: Incident, now: number, remindMinutes: number): Change["kind"] | undefined {
  const { status, told, changes } = incident;
  const reminderDue = now - incident.toldAt >= remindMinutes * MINUTE;
  if (incident.flapping) {
    if (now - (changes.at(-1) ?? 0) >= STEADY_MS) return "steady";
    return reminderDue ? "reminder" : undefined;
  }
  if (status !== told) {
    if (changes.length >= FLAP_CHANGES) return "flapping";
    return status === "ok" ? "over" : "opened";
  }
  return status !== "ok" && status !== "gone" && reminderDue ? "reminder" : undefined;
}

// ---- queue

/** Puts an alert of the run's changes at the end of the queue, or into its last notification when that is long. */
function enqueueAlert(state: MonitorState, { context, snapshot, id, changes, references }: Run): void {
  if (changes.length === 0) return;
  const counts: Partial<Record<Status, number>> = {};
  const [standing, silent]: [string[], string[]] = [[], []];
  const isTold = new Set(changes.map(({ title }) => title));
  const waiting = new Set(snapshot.hosts.filter((host) => host.state === "waiting").map(({ host }) => host));
  for (const [key, { status, title }] of Object.entries(state.incidents)) {
    const seen = status === "ok" && waiting.has(title) ? "waiting" : status;
    if (key.startsWith("host ")) counts[seen] = (counts[seen] ?? 0) + 1;
    else if (status === "fault" && !isTold.has(title)) standing.push(title);
    if (status === "silent" || status === "never") silent.push(title);
  }
  if (changes.every(isGood) && silent.length > 0) standing.push(`${listNames(silent)} silent or never seen`);
  const last = state.queue.at(-1);
  if (last?.kind === "alert" && last.recipients.length > 0 && state.queue.length >= QUEUE_LIMIT) {
    last.changes.push(...changes);
    return;
  }
  const notification = newNotification(context.config, id, snapshot.now);
  const told = { changes: [...changes], counts, standing };
  state.queue.push({ ...notification, ...told, kind: "alert", references: [...references] });
}

function newNotification({ mail, webhook }: Options, id: string, at: number) {
  const recipients = mail.to.map((address) => ({ address, tries: 0, nextAt: 0 }));
  return { id, at, references: [] as string[], recipients, ...(webhook && { post: { tries: 0 } }) };
}

/** Queues the summaries of all hours that have become due since the last one, each once. */
function queueSummaries(state: MonitorState, { context, snapshot }: Run): void {
  const { config, log } = context;
  const { now, hosts } = snapshot;
  const zone = commonZone(hosts, now);
  const cut = config.summaryMinute * MINUTE;
  const due = Math.floor((now - cut + zone * MINUTE) / HOUR) * HOUR - zone * MINUTE;
  if (state.summarisedUntil === 0) {
    Object.assign(state, { summarisedUntil: due, accountedUntil: due + cut }); // the first is that of the next hour
    state.totals = Object.fromEntries(hosts.map((host) => [host.host, totalsOf(host)]));
  }
  const oldest = due - OLDEST_SUMMARY_MS;
  if (state.summarisedUntil < oldest) {
    log.warn("hours long past are not summarised", {
      hours: Math.round((oldest - state.summarisedUntil) / HOUR),
    });
    Object.assign(state, { summarisedUntil: oldest, accountedUntil: oldest + cut });
  }
  while (state.summarisedUntil + HOUR <= due) {
    const behind = Math.round((due - state.summarisedUntil) / HOUR) - 1;
    const hourEnd = due - Math.max(0, behind) * HOUR; // aligned anew when the zone changed
    const to = hourEnd + cut;
    const notification = newNotification(config, `summary-${state.instance}-${hourEnd}`, now);
    const from = Math.min(state.accountedUntil || to - HOUR, to);
    state.queue.push({
      ...notification,
      kind: "summary",
      hourEnd,
      from,
      to,
      zone: commonZone(hosts, now, hourEnd - HOUR),
      since: takeTotals(state, hosts),
    });
    Object.assign(state, { summarisedUntil: hourEnd, accountedUntil: to });
  }
}

/**
 * The zone that most senders' lines have; this machine's when none tells one. Minutes east of UTC. Where it is this
 * machine's, that of `at`: an hour from before the clock changed is named as it was then.
 */
function commonZone(hosts: HostStatus[], now: number, at = now): number {
  const count = new Map<number, number>();
  for (const { zone } of hosts) if (zone !== undefined) count.set(zone, (count.get(zone) ?? 0) + 1);
  const [[most] = []] = [...count].sort((a, b) => b[1] - a[1]);
  return most === undefined || most === localZone(now) ? localZone(at) : most;
}

function totalsOf({ skipped, untimed, ahead, lost, gone }: HostStatus): Totals {
  return { skipped, untimed, ahead, lost: lost + gone };
}

/** What came since the totals were taken last, of hosts where something did. */
function takeTotals(state: MonitorState, hosts: HostStatus[]): Record<string, Partial<Totals>> {
  const since: Record<string, Partial<Totals>> = {};
  for (const host of hosts) {
    const [before, totals] = [state.totals[host.host] ?? emptyTotals(), totalsOf(host)];
    const keys = (Object.keys(totals) as (keyof Totals)[]).filter((key) => totals[key] > (before[key] ?? 0));
    if (keys.length > 0)
      since[host.host] = Object.fromEntries(keys.map((key) => [key, totals[key] - (before[key] ?? 0)]));
    state.totals[host.host] = totals;
  }
  return since;
}

function startsAnew({ stateFile }: Options, reason: string, now: number): Change {
  const text = `What was told before ${stateFile} became unreadable (${reason}) is not known; it may be told again.`;
  return note("monitor starts anew", text, now);
}

function noteUnsaved(state: MonitorState, run: Run, reason: string | undefined): void {
  const { stateFile } = run.context.config;
  const incident = incidentOf(state, STATE, "the monitor's state can't be saved");
  if (reason) incident.text = `${stateFile}: ${reason}. Alerts go out all the same, some perhaps twice`;
  incident.next = [`df -h ${dirname(stateFile)}`, `ls -ld ${dirname(stateFile)}`];
  const own: Run = { ...run, id: `${run.id}-state`, changes: [], references: new Set() };
  const status = reason ? "fault" : "ok";
  follow(state, own, incident, { status, since: run.snapshot.now, sender: false });
  enqueueAlert(state, own);
}

// ---- flags

/** `--test-mail`: also to the webhook, so that both are seen to arrive. */
async function sendTest({ config, log, signal, now }: Service<"monitor">): Promise<number> {
  const at = now();
  const text = "If you can read this, alerts will arrive too.";
  const alert = { at, changes: [note("test mail", text, at)], counts: {}, standing: [] };
  const mail = renderAlert(alert, { page: config.page });
  try {
    const refused = await sendMail(
      config.mail,
      { id: `test-${at}`, at, references: [], ...mail },
      { signal },
    );
    for (const { address, reason } of refused) log.error("recipient refused", { recipient: address, reason });
    if (config.webhook) {
      const answer = await clientOf(config)(config.webhook, signal, {
        text,
        subject: mail.subject,
        status: "resolved",
        changes: [],
      });
      if (!answer.ok) throw new OperatorError(`The webhook answers ${answer.status}`);
    }
    if (refused.length === 0) log.info("test mail sent", { recipients: config.mail.to.join(",") });
    return refused.length === 0 ? EXIT.done : EXIT.failed;
  } catch (error) {
    log.error("test mail not accepted", { error: withoutUrl(error) });
    return EXIT.failed;
  }
}

/** What is seen now; ends 1 when something is wrong. Tells nobody and changes nothing. */
async function printStatus(service: Service<"monitor">): Promise<number> {
  const { config, flags, now } = service;
  const { state, fault } = await new StateStore(service).read();
  const snapshot = await observeOnce(state, service);
  const isWanted = ({ host }: HostStatus) =>
    flags.host === undefined || host === parseHost(String(flags.host));
  const hosts = sortBySeverity(snapshot.hosts.filter(isWanted), snapshot);
  const problems = snapshot.problems.filter(
    ({ hosts: of }) => flags.host === undefined || hosts.some(({ host }) => of.includes(host)),
  );
  if (flags.host !== undefined && hosts.length === 0)
    throw new OperatorError(`Sender ${flags.host} is not known in ${config.dir}`);
  const mails = state.queue.filter(({ recipients }) => recipients.length > 0).length;
  const ok = problems.length === 0 && fault === undefined && mails === 0;
  if (flags.json)
    process.stdout.write(
      `${JSON.stringify({ ...snapshot, ok, hosts, problems, mailsWaiting: mails }, null, 2)}\n`,
    );
  else
    process.stdout.write(formatStatus({ ...snapshot, hosts, problems }, state, { mails, fault, now: now() }));
  return ok ? EXIT.done : EXIT.failed;
}

function formatStatus(
  snapshot: Snapshot,
  state: MonitorState,
  { mails, fault, now }: { mails: number; fault: string | undefined; now: number },
): string {
  const ago = (at: number) => (at > 0 ? `${formatDuration(now - at)} ago` : "never");
  const rows = snapshot.hosts.map((host) => [
    host.host,
    `${host.state}${state.incidents[`host ${host.host}`]?.flapping ? ", flapping" : ""}${host.muted ? ", muted" : ""}`,
    ago(host.heardAt),
    ago(host.lineAt),
    host.lag === undefined ? "unknown" : formatBytes(host.lag),
    ...[host.waiting, host.failed].map(String),
    formatBytes(host.lost + host.gone),
    host.agent ?? "-",
  ]);
  const heads = ["SENDER", "STATE", "HEARD", "LAST LINE", "LAG", "WAITING", "FAILED", "LOST", "AGENT"];
  const mutes = Object.entries(state.mutes).map(
    ([host, { until, by, reason }]) =>
      `muted: ${host} until ${formatClock(until, now)} by ${by}${reason ? `: ${reason}` : ""}`,
  );
  const problems = snapshot.problems.flatMap(({ title, text, next = [] }) => [
    `${sentence(title)}: ${text}`,
    ...next.map((command) => `    ${command}`),
  ]);
  const lines = [
    paint(headline(snapshot), snapshot.problems.length > 0),
    ...problems,
    ...(fault ? [`The state file can't be read: ${fault}`] : []),
    ...mutes,
    `Mails waiting: ${mails}`,
    "",
    formatTable(heads, rows, [5, 6]).trimEnd(),
  ];
  return `${lines.join("\n")}\n`;
}

const UNITS: Record<string, number> = { m: MINUTE, h: HOUR, d: DAY };

/** `--mute HOST --for 2h --reason TEXT`, `--mute HOST --off`: a maintenance window. */
async function mute(service: Service<"monitor">, name: string): Promise<number> {
  const { flags, log, now } = service;
  const host = name === "*" ? "*" : parseHost(name);
  if (host === undefined)
    throw new OperatorError(`--mute ${name}: expected an IP address, a host name or *`, EXIT.usage);
  const [, number, unit = ""] = /^(\d+(?:\.\d+)?)([mhd])$/.exec(String(flags.for ?? "")) ?? [];
  const length = Number(number) * (UNITS[unit] ?? 0);
  if (flags.off ? flags.for || flags.reason : !(length > 0 && length <= 366 * DAY))
    throw new OperatorError("--mute HOST needs --for 90m, 2h, 3d (366d at most), or --off", EXIT.usage);
  const uid = process.getuid?.();
  const { SUDO_USER, LOGNAME, USER } = process.env;
  const by = SUDO_USER || LOGNAME || USER || (uid === 0 ? "root" : `user ${uid}`); // without them Bun says "unknown"
  const store = new StateStore(service);
  let done = "muted";
  await store.change((state) => {
    if (flags.off) {
      done = Object.hasOwn(state.mutes, host) ? "mute ended" : "was not muted";
      delete state.mutes[host];
    } else {
      const reason = flags.reason && String(flags.reason).replace(/\p{Cc}+/gu, " "); // it is shown on terminals
      state.mutes[host] = { until: now() + length, at: now(), by, ...(reason && { reason }) };
    }
  });
  if (store.unsaved) throw new OperatorError(`Cannot save ${service.config.stateFile}: ${store.unsaved}`);
  log.info(done, { host, for: flags.for && String(flags.for), by });
  return EXIT.done;
}

/** What only this host can tell of the config; with `connect` also every server that it names. */
async function check({ config, signal, checks }: Service<"monitor">, connect: boolean): Promise<void> {
  const { smtp } = config.mail;
  const files = { "mail.ca": config.mail.ca, ca: config.ca, cert: config.cert, key: config.key };
  for (const [key, file] of Object.entries(files)) await checks.file(`monitor.${key}`, file);
  const asks = checks.asks(connect);
  for (const fault of checkSchedule(config.schedule)) checks.fault(`monitor.schedule: ${fault}`);
  await checks.folder("monitor.dir", config.dir, "read");
  await checks.folder("monitor.report", dirname(config.report), "read");
  await checks.folder("monitor.stateFile", dirname(config.stateFile), "write");
  if (smtp.startsWith("file:")) await checks.folder("monitor.mail.smtp", fileURLToPath(smtp), "make");
  if (!asks) return;
  if (!smtp.startsWith("file:"))
    await checks.step(`monitor.mail.smtp: ${smtp}`, async () => {
      await verifyMail(config.mail, signal);
      return `takes mail for ${config.mail.to.join(", ")}; none was sent, --test-mail does`;
    });
  const ask = clientOf(config);
  for (const url of config.receivers)
    await checks.step(`monitor.receivers: ${new URL(url).origin}`, async () => {
      const fault = await askHealth(ask, new URL(url).origin, signal).catch(withAdvice);
      if (fault !== undefined) throw new Error(fault);
      return "healthy";
    });
  const secretUrl = (key: "webhook" | "heartbeatUrl", work: (url: string) => Promise<string>) => {
    const url = config[key];
    const hide = (error: unknown) => {
      throw new Error(withAdvice(withoutUrl(error)));
    };
    return url && checks.step(`monitor.${key}`, () => work(url).catch(hide));
  };
  await secretUrl("webhook", async (url) => {
    const { status } = await ask(url, signal);
    return `answers (${status} to a GET; --test-mail posts there)`;
  });
  await secretUrl("heartbeatUrl", async (url) => {
    const { status } = await clientOf({})(new URL(url).origin, signal); // itself would count as a run
    return `its server answers (${status} to a GET of /)`;
  });
}

if (import.meta.main) {
  await runScript(
    {
      name: "monitor",
      about: "Tells by mail what is wrong and what was delivered; one check (for cron), or --watch.",
      flags: {
        watch: "stay and follow monitor.schedule",
        status: "print what is seen now, as a table; tells nobody",
        "test-mail": "send a mail, and a post to the webhook, to show that they arrive",
        "mute=HOST":
          "tell no silence of a host, or of *, for a while; bytes lost and failed deliveries are told",
        "for=DURATION": "with --mute: 90m, 2h or 3d",
        "reason=TEXT": "with --mute: why, for the page and the summary",
        off: "with --mute: end it",
      },
      check,
    },
    main,
  );
}
