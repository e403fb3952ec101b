/**
 * The one judge: what is wrong in a folder, in words. The page, the mails, `--status` and the metrics say what stands here.
 * What can be seen is judged, and what can't be seen is a problem of its own.
 */
import { folders } from "./batch.ts";
import { createLedgerReader } from "./ledger.ts";
import { commandOf, DAY, formatBytes, formatDuration, formatLocalTime, MINUTE } from "./service.ts";
import { type FaultKind, type MonitorNews, type RefusedSender, readMonitorNews } from "./signs.ts";
import {
  type FolderState,
  type HostState,
  type HostStatus,
  isLate,
  readSnapshot,
  type SnapshotOptions,
  type Thresholds,
} from "./snapshot.ts";

/** A forwarder shows life every thirty seconds, a monitor in every run. */
const FORWARDER_GONE_MS = 3 * MINUTE;
const MONITOR_GONE_MS = 15 * MINUTE;
/** Names in a text; further ones are counted. */
const NAMES = 5;

/** Something that is wrong, in the words that the page, the mails, `--status` and the metrics use. */
export interface Problem {
  /** Names it across looks. */
  key: string;
  leg: "arrival" | "delivery" | "disk" | "watching";
  /** `2 senders are silent`: begins small, for it may stand in a sentence. */
  title: string;
  text: string;
  /** The senders that it concerns; empty when it concerns none in particular. */
  hosts: string[];
  /** Commands that fit the case. */
  next?: string[];
  /** It has no duration of its own: it is looked at twice before it is mailed. */
  sudden?: boolean;
  /** It often mends itself: it is mailed from then on. */
  mailFrom?: number;
}

export interface Snapshot extends FolderState {
  /** Whether it is judged by the defaults, since the config has no section `monitor`. */
  byDefaults: boolean;
  problems: Problem[];
}

export interface ObserveOptions extends SnapshotOptions {
  /** The monitor's state file, for others than the monitor. */
  monitorFile?: string;
  byDefaults?: boolean;
  /** Problems that only the caller knows. */
  more?: Problem[];
}

/** One look at `dir`, judged by `thresholds`. Never throws: what can't be read is among the problems. */
export async function observe(
  dir: string,
  thresholds: Thresholds,
  options: ObserveOptions,
): Promise<Snapshot> {
  const monitor = options.monitorFile ? await readMonitorNews(options.monitorFile) : undefined;
  const mutes = { ...options.mutes, ...(typeof monitor === "object" && monitor.mutes) };
  const seen = await readSnapshot(dir, thresholds, { ...options, mutes });
  const problems = findProblems(seen, thresholds, { monitor, more: options.more ?? [] });
  return { ...seen, byDefaults: options.byDefaults ?? false, problems };
}

// ---- what is wrong

export function findProblems(
  seen: FolderState,
  thresholds: Thresholds,
  { monitor, more = [] }: { monitor?: MonitorNews | "never" | undefined; more?: Problem[] } = {},
): Problem[] {
  return [
    ...unreadableProblems(seen),
    ...more,
    ...receiverProblems(seen),
    ...senderProblems(seen, thresholds),
    ...forwarderProblems(seen, thresholds),
    ...queueProblems(seen),
    ...diskProblems(seen, thresholds),
    ...monitorProblems(seen.now, monitor),
  ];
}

type About = Partial<Omit<Problem, "key" | "leg" | "title" | "text">>;

function problem(key: string, leg: Problem["leg"], title: string, text: string, about: About): Problem {
  return { key, leg, title, text, hosts: [], ...about };
}

function unreadableProblems({ unreadable, dir }: FolderState): Problem[] {
  const next = [`ls -la ${dir}`];
  const folder = unreadable.find(({ path }) => path === dir);
  const rest = unreadable.filter(({ path }) => path !== dir);
  const problems: Problem[] = [];
  if (folder) {
    const text = `${dir}: ${folder.reason}`;
    problems.push(problem("folder", "arrival", "the folder can't be read", text, { next, sudden: true }));
  }
  if (rest.length > 0) {
    const title = `${count(rest.length, "file or folder", "files or folders")} can't be read`;
    const text = list(rest.map(({ path, reason }) => `${path}: ${reason}`));
    const hosts = rest.flatMap(({ host }) => host ?? []);
    problems.push(problem("unreadable", "arrival", title, text, { hosts, next, sudden: true }));
  }
  return problems;
}

function receiverProblems({ receivers, now }: FolderState): Problem[] {
  return receivers.flatMap(({ runs, ports, at, health, pressed }) => {
    const port = `port${ports.length > 1 ? "s" : ""} ${ports.join(", ")}`;
    const unit = `log-rt-sync-receiver@${ports[0]}`;
    const about = { next: [`systemctl status ${unit}`, `journalctl -u ${unit} -n 50`], sudden: true };
    if (!runs) {
      const text = `${sentence(lastSign(at, now))}; its senders keep their lines meanwhile`;
      const title = `no receiver is running on ${port}`;
      return [problem(`no receiver ${ports[0]}`, "arrival", title, text, about)];
    }
    const problems: Problem[] = [];
    if (health !== undefined) {
      const leg = /disk|space|inode/i.test(health) ? "disk" : "arrival";
      const title = `the receiver on ${port} can't store lines`;
      problems.push(problem(`receiver ${ports[0]}`, leg, title, health, about));
    }
    if (pressed.length > 0) {
      const title = `${count(pressed.length, "sender meets", "senders meet")} a limit`;
      const text = list(pressed.map((row) => `${row.host}: ${row.text}`));
      const hosts = pressed.map((row) => row.host);
      problems.push(problem(`pressed ${ports[0]}`, "arrival", title, text, { ...about, hosts }));
    }
    return problems;
  });
}

function lastSign(at: number, now: number): string {
  return `last sign of life ${formatClock(at, now)}, ${formatDuration(now - at)} ago`;
}

function senderProblems(seen: FolderState, { alertWhenQuiet }: Thresholds): Problem[] {
  const { hosts, now } = seen;
  const refused = refusedSenders(seen);
  const problems: Problem[] = [];
  const add = (
    key: string,
    found: HostStatus[],
    one: string,
    many: string,
    say: (h: HostStatus) => string,
  ) => {
    if (found.length === 0) return;
    const names = found.map(({ host }) => host);
    const about = { hosts: names, next: nextForSenders(key, names[0] ?? "") };
    problems.push(problem(key, "arrival", count(found.length, one, many), list(found, say), about));
  };
  const unmuted = (state: HostState) => inState(hosts, state).filter((host) => !host.muted);
  const since = (at: number) => `since ${formatClock(at, now)} (${formatDuration(now - at)})`;
  const why = ({ host }: HostStatus) => {
    const row =
      refused.find((other) => other.host === host) ?? refused.find((other) => isNearName(other.host, host));
    return row ? `; refused: ${formatRefusal(row, now)}` : "";
  };
  add("silent", unmuted("silent"), "sender is silent", "senders are silent", (host) => {
    return `${host.host} ${since(host.heardAt)}${why(host)}`;
  });
  add("never", unmuted("never"), "sender was never seen", "senders were never seen", (host) => {
    return `${host.host}${why(host)}`;
  });
  const quiet = alertWhenQuiet ? unmuted("quiet") : [];
  add("quiet", quiet, "sender is quiet", "senders are quiet", (host) => {
    return `${host.host} ${since(host.lineAt || host.heardAt)}`;
  });
  const lacking = hosts.filter(
    ({ lacksLog, state, muted }) => lacksLog && !muted && ["ok", "quiet"].includes(state),
  );
  add("no log", lacking, "sender lacks a log", "senders lack a log", (host) => host.host);
  const contested = hosts.filter((host) => host.contested);
  add(
    "contested",
    contested,
    "name is claimed by two shippers",
    "names are claimed by two shippers",
    (host) => {
      return `${host.host}: from ${host.contested?.join(" and ")}`;
    },
  );
  return [...problems, ...refusedProblem(refused, now)];
}

/** Senders that keep knocking, not a stranger's single request. */
function refusedSenders({ receivers }: FolderState): RefusedSender[] {
  const rows = receivers.flatMap(({ runs, refused }) => (runs ? refused : []));
  return rows.filter(({ host, count: times }) => host !== "" && times > 1);
}

function refusedProblem(refused: RefusedSender[], now: number): Problem[] {
  if (refused.length === 0) return [];
  const hosts = [...new Set(refused.map(({ host }) => host))];
  const text = list(refused, (row) => formatRefusal(row, now));
  const title = count(hosts.length, "sender is refused", "senders are refused");
  return [problem("refused", "arrival", title, text, { hosts, next: nextForSenders("refused", "") })];
}

/** `10.10.21.190 from 10.0.3.7: token not known, 9 times since 04:25`. */
export function formatRefusal(
  { host, peer, reason, count: times, since }: RefusedSender,
  now: number,
): string {
  return `${host} from ${peer}: ${reason}, ${times} times since ${formatClock(since, now)}`;
}

/** Whether a refused name looks like an expected one: one with or without its domain, or one sign off. */
function isNearName(refused: string, host: string): boolean {
  if (refused.split(".")[0] === host.split(".")[0] && !/^\d/.test(host)) return true;
  if (Math.abs(refused.length - host.length) > 1) return false;
  let same = 0;
  while (same < host.length && refused[same] === host[same]) same++;
  let tail = 0;
  while (tail < host.length - same && refused.at(-1 - tail) === host.at(-1 - tail)) tail++;
  return Math.max(refused.length, host.length) - same - tail <= 1;
}

function nextForSenders(key: string, host: string): string[] {
  const shipper = `ssh ${host} systemctl status log-rt-sync-shipper`;
  const check = `ssh ${host} ${commandOf("shipper").replace(/^bun run .*/, "log-rt-sync shipper")} --check --connect`;
  if (key === "contested")
    return [`ssh ${host} hostname`, "grep -r '\"host\"' /etc/log-rt-sync  # on both machines"];
  if (key === "no log") return [`ssh ${host} journalctl -u log-rt-sync-shipper -g 'no file matches'`, check];
  if (key === "quiet") return [`ssh ${host} tail -n 1 /var/log/nginx/access.log`, check];
  if (key === "refused")
    return ["journalctl -u 'log-rt-sync-receiver@*' | grep refused", `${commandOf("receiver")} --check`];
  return [shipper, check, `${commandOf("monitor")} --status --host ${host}`];
}

const FAULT_TITLE: Record<FaultKind, string> = {
  connection: "the client's server can't be reached",
  server: "the client's server refuses",
  "host key": "the client's server shows another host key",
  login: "the login at the client's server is refused",
  local: "the forwarder can't work here",
};

function forwarderProblems(
  { forwarder, now, hosts }: FolderState,
  { deliveryMinutes }: Thresholds,
): Problem[] {
  if (!forwarder) return [];
  const problems: Problem[] = [];
  const { fault, stays, aliveAt } = forwarder;
  const next = ["systemctl status log-rt-sync-forwarder", `${commandOf("forwarder")} --status`];
  // One that cron starts, or of version 1.0, is judged by what waits.
  if (stays && Math.abs(now - aliveAt) > FORWARDER_GONE_MS) {
    const text = `${sentence(lastSign(aliveAt, now))}; ${count(sum(hosts, "waiting"), "batch waits", "batches wait")}`;
    const title = "no forwarder is running";
    problems.push(problem("no forwarder", "delivery", title, text, { next, sudden: true }));
  }
  if (fault) {
    const { kind, text, since } = fault;
    const mends = kind === "connection" || kind === "server";
    const told = `${text}; since ${formatClock(since, now)}`;
    problems.push(
      problem(`forwarder ${kind}`, "delivery", FAULT_TITLE[kind], told, {
        next: [`${commandOf("forwarder")} --check --connect`, ...next],
        ...(mends && { mailFrom: since + deliveryMinutes * MINUTE }),
      }),
    );
  }
  return problems;
}

function queueProblems(seen: FolderState): Problem[] {
  const { hosts, now, forwarder, dir, failed } = seen;
  const problems: Problem[] = [];
  const late = hosts.filter((host) => isLate(host, seen));
  if (late.length > 0) {
    const first = late.reduce((a, b) => ((a.waitingSince ?? now) <= (b.waitingSince ?? now) ? a : b));
    const since = first.waitingSince ?? now;
    const title = `${count(sum(late, "waiting"), "batch waits", "batches wait")} since ${formatClock(since, now)}`;
    const text = `The oldest is ${first.oldest}, for ${formatDuration(now - since)}`;
    const next = [`${commandOf("forwarder")} --status`, "journalctl -u log-rt-sync-forwarder -n 50"];
    problems.push(problem("late", "delivery", title, text, { hosts: late.map(({ host }) => host), next }));
  }
  if (failed.length > 0) {
    const title = count(failed.length, "batch is refused by the client", "batches are refused by the client");
    const text = list(failed, (name) => {
      const reason = forwarder?.failed[name]?.reason ?? "moved there by hand";
      return `${name}: ${reason.replace(`"${name}"`, "it")}`;
    });
    problems.push(
      problem("failed", "delivery", title, text, {
        hosts: hosts.filter((host) => host.failed > 0).map(({ host }) => host),
        next: [`${commandOf("forwarder")} --status`, `ls -l ${folders(dir).failed}`],
      }),
    );
  }
  return problems;
}

function diskProblems({ disk, dir }: FolderState, { minFreePercent }: Thresholds): Problem[] {
  const percent = disk ? (100 * disk.free) / disk.total : 100;
  if (!disk || percent >= minFreePercent) return [];
  const title = `the disk has ${percent.toFixed(percent < 10 ? 1 : 0)} % left`;
  const text = `${formatBytes(disk.free)} of ${formatBytes(disk.total)} are free, expected at least ${minFreePercent} %`;
  return [problem("disk", "disk", title, text, { next: [`df -h ${dir}`, `du -sh ${dir}/*`], sudden: true })];
}

function monitorProblems(now: number, monitor: MonitorNews | "never" | undefined): Problem[] {
  if (!monitor) return [];
  const next = ["systemctl status log-rt-sync-monitor.timer"];
  if (monitor === "never") {
    const text = "The config has a section for it, and nobody is told of what is wrong";
    return [problem("no monitor", "watching", "no monitor has run here yet", text, { next })];
  }
  const problems = undeliverableProblems(monitor.undeliverable, now);
  if (Math.abs(now - monitor.at) > MONITOR_GONE_MS) {
    const text = `${sentence(lastSign(monitor.at, now))}: nobody is told of what is wrong`;
    problems.push(problem("no monitor", "watching", "no monitor is running", text, { next }));
  }
  return problems;
}

/** Mails and posts that were refused for good in the last day. */
export function undeliverableProblems(undeliverable: MonitorNews["undeliverable"], now: number): Problem[] {
  const recent = undeliverable.filter(({ at }) => now - at < DAY);
  if (recent.length === 0) return [];
  const title = `${count(recent.length, "mail or post was", "mails or posts were")} refused for good`;
  const text = list(
    recent,
    ({ to, subject, reason, at }) => `"${subject}" to ${to}, ${formatClock(at, now)}: ${reason}`,
  );
  const next = [`${commandOf("monitor")} --test-mail`];
  return [problem("undeliverable", "watching", title, text, { next })];
}

// ---- words

/** The one sentence at the top: `2 senders are silent, 14 batches wait since 10:20`. */
export function headline({ hosts, forwarder, problems }: Snapshot): string {
  if (problems.length > 0) {
    const told = problems.length > 3 ? problems.slice(0, 2) : problems;
    const more = problems.length > told.length ? [`and ${problems.length - told.length} more problems`] : [];
    return sentence([...told.map(({ title }) => title), ...more].join(", "));
  }
  if (hosts.length === 0) return "No sender was seen yet";
  const sends = inState(hosts, "ok").length > 0;
  if (!sends && inState(hosts, "waiting").length > 0)
    return "Waiting for senders: the receiver has just started";
  const arrival = sends ? "Everything arrives" : "No lines come";
  if (!forwarder) return `${arrival}, no forwarder has run here yet`;
  return `${arrival} and ${sends ? "is" : "everything is"} delivered`;
}

export function sum(
  hosts: HostStatus[],
  key: "waiting" | "failed" | "open" | "lag" | "lost" | "gone",
): number {
  return hosts.reduce((total, host) => total + (host[key] ?? 0), 0);
}

export function inState(hosts: HostStatus[], state: HostState): HostStatus[] {
  return hosts.filter((host) => host.state === state);
}

/** `1,234,567`. */
export function formatCount(n: number): string {
  return String(n).replace(/\B(?=(\d{3})+$)/g, ","); // a formatter of Intl takes 20 ms to make
}

/** `1 line`, `1,400 lines`. */
export function count(n: number, one: string, many = `${one}s`): string {
  return `${formatCount(n)} ${n === 1 ? one : many}`;
}

/** `10:20`, with the day when it is not today's: this machine's wall clock. */
export function formatClock(at: number, now: number): string {
  const [day, time = ""] = formatLocalTime(at).split(" ");
  const clock = time.slice(0, 5);
  return formatLocalTime(now).startsWith(`${day} `) ? clock : `${dayName(at)}, ${clock}`;
}

/** `27 Nov`. Its formatter takes 20 ms to make: not at the start of each script. */
function dayName(at: number): string {
  return new Date(at).toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

export function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

function list<T>(items: T[], say: (item: T) => string = String): string {
  const more = items.length - NAMES;
  return items.slice(0, NAMES).map(say).join("; ") + (more > 0 ? `; and ${more} more` : "");
}

// ---- for the receiver

/** However many look at the page, the folder is looked at once in so long. */
const FRESH_MS = 2_000;
/** Senders whose curves and batches the page shows. */
export const DETAILED = 200;
/** With more senders a look has a tenth of the time at most, and nobody waits for it while the one before is not older. */
const REST = 10;
const OLD_MS = 30_000;

/** A function that tells the state of everything; those who call together share one look at the folder. */
export function createStatusReader(
  dir: string,
  thresholds: () => Thresholds,
  { now = Date.now, ...sources }: Partial<Omit<ObserveOptions, "now">> & { now?: () => number },
): () => Promise<Snapshot> {
  const kept = {
    readLedger: createLedgerReader(),
    future: {},
    unnamed: { startedAt: now() },
    details: DETAILED,
    byDefaults: sources.monitorFile === undefined,
    ...sources,
  };
  let took = 0;
  let last: Snapshot | undefined;
  let looking: Promise<Snapshot> | undefined;
  const snapshot = async (): Promise<Snapshot> => {
    const begun = performance.now();
    try {
      last = await observe(dir, thresholds(), { ...kept, now: now() });
      return last;
    } finally {
      took = performance.now() - begun;
      looking = undefined; // also of one that failed: the next one looks again
    }
  };
  return async () => {
    const age = last ? Math.abs(now() - last.now) : Number.POSITIVE_INFINITY;
    const many = last !== undefined && last.hosts.length > DETAILED;
    if (last && age <= (many ? Math.max(FRESH_MS, REST * took) : FRESH_MS)) return last;
    looking ??= snapshot();
    return last && many && age < OLD_MS ? last : looking;
  };
}
