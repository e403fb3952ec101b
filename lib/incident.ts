/**
 * What the monitor has to tell: a pure function of what was told before, what is seen and the time.
 *
 * An incident is kept per subject: each sender, and each fault of the whole (receiver, delivery, disk, …). It
 * knows its state, since when, and what the reader was told last; a change is told when the two differ.
 *
 * Silence counts from the latest of: when the sender was heard of, the start of this machine, the return of a
 * receiver that was down. When the clock is set, every time kept moves with it.
 */
import { type Change, enqueue, type Incident, type MonitorState, type Status } from "./notice.ts";
import type { HostSight, Sight } from "./sight.ts";

const MINUTE_MS = 60_000;
/** A sender that is not expected and was silent for so long is gone. */
const GONE_MS = 24 * 60 * MINUTE_MS;
/** So many changes within this time are told as flapping, and it is over after a while without any. */
const FLAP_CHANGES = 5;
const FLAP_WITHIN_MS = 60 * MINUTE_MS;
const STEADY_MS = 30 * MINUTE_MS;
/** Bytes lost are told at once, and again at most so often. */
const LOST_AGAIN_MS = 60 * MINUTE_MS;
/** A difference between clock and uptime beyond this is a clock that was set. */
const CLOCK_STEP_MS = MINUTE_MS;
/** Free space must rise by so much over the threshold before the fault is over, in percent of the disk. */
const DISK_MARGIN = 2;
/** The thresholds, as the config has them. */
export interface Rules {
  expected: string[];
  silentMinutes: number;
  silentMinutesByHost: Record<string, number>;
  alertWhenQuiet: boolean;
  remindMinutes: number;
  minFreePercent: number;
}

/** Takes in what was seen at `now`: gives the new state, with at most one new notice at the end of its queue. */
export function judge(before: MonitorState, sight: Sight, rules: Rules, now: number): MonitorState {
  const state = structuredClone(before);
  const heardAfter = followClock(state, sight.uptime, now);
  const id = `alert-${state.instance}-${now}`;
  const judged: Judged = { state, sight, rules, now, id, heardAfter, changes: [], references: new Set() };
  judgeFaults(judged);
  judgeHosts(judged);
  const { changes, references } = judged;
  if (changes.length > 0) enqueue(state, { id, at: now, changes, references: [...references] });
  return state;
}

interface Judged {
  state: MonitorState;
  sight: Sight;
  rules: Rules;
  now: number;
  /** Id of the notice that this run makes, if it makes one. */
  id: string;
  changes: Change[];
  references: Set<string>;
  /** No sender that was newly heard of was heard before this time, whatever the receiver's clock says. */
  heardAfter: number;
}

/**
 * Moves all times kept by as much as the clock was set since the last run; a restart is none. Gives the time of
 * the last run when the clock was set: what was heard since was heard after it. Else 0.
 */
function followClock(state: MonitorState, uptime: number, now: number): number {
  const step = now - state.at - (uptime - state.uptime);
  const lastRun = state.at + step;
  const wasSet = state.at > 0 && uptime >= state.uptime && Math.abs(step) > CLOCK_STEP_MS;
  Object.assign(state, { at: now, uptime });
  if (!wasSet) return 0;
  for (const heard of Object.values(state.heard)) {
    heard.at += step;
    heard.lostToldAt += step;
  }
  for (const incident of Object.values(state.incidents)) {
    incident.since += incident.since > 0 ? step : 0;
    incident.toldAt += step;
    incident.changes = incident.changes.map((at) => at + step);
    if (incident.outage !== undefined) incident.outage += step;
  }
  return lastRun;
}

function judgeFaults(judged: Judged): void {
  const { state, sight, rules, now } = judged;
  const faults = new Map([...sight.receivers, ...sight.faults].map((fault) => [fault.key, fault]));
  const limit = rules.minFreePercent + (state.incidents.disk?.status === "fault" ? DISK_MARGIN : 0);
  if (sight.freePercent !== undefined && rules.minFreePercent > 0 && sight.freePercent < limit) {
    const text = `${sight.freePercent.toFixed(1)} % of the disk is free, expected ${rules.minFreePercent} %`;
    faults.set("disk", { key: "disk", title: "Disk nearly full", text });
  }
  const known = Object.keys(state.incidents).filter((key) => !key.startsWith("host "));
  for (const key of new Set([...faults.keys(), ...known])) {
    const fault = faults.get(key);
    const incident = incidentOf(state, key, fault?.title ?? "");
    if (fault) incident.text = fault.text;
    follow(judged, incident, { status: fault ? "fault" : "ok", since: now, sender: false });
    if (!fault && incident.told === "ok" && !incident.flapping && incident.changes.length === 0) {
      delete state.incidents[key];
    }
  }
}

function judgeHosts(judged: Judged): void {
  const { state, sight, rules } = judged;
  if (!sight.hosts) return;
  const sights = new Map(sight.hosts.map((host) => [host.host, host]));
  const known = Object.keys(state.incidents)
    .filter((key) => key.startsWith("host "))
    .map((key) => key.slice(5));
  for (const host of [...new Set([...rules.expected, ...sights.keys(), ...known])].sort()) {
    const seen = sights.get(host);
    if (!seen?.heardAt && !rules.expected.includes(host)) {
      delete state.incidents[`host ${host}`]; // its records were removed, and nobody asks for it
      delete state.heard[host];
      continue;
    }
    if (seen && seen.heardAt > 0) hear(judged, seen);
    const incident = incidentOf(state, `host ${host}`, host);
    follow(judged, incident, { ...hostStatus(judged, host, seen, incident), sender: true });
  }
}

/** Notes when a sender was heard of, and tells of bytes that it lost. */
function hear(
  { state, now, changes, heardAfter }: Judged,
  { host, heardAt, lost, lag: _, lineAt: __ }: HostSight,
): void {
  const heard = state.heard[host] ?? { value: 0, at: 0, lost: 0, lostToldAt: 0 };
  state.heard[host] = heard;
  if (heard.value !== heardAt) Object.assign(heard, { value: heardAt, at: Math.max(heardAt, heardAfter) });
  heard.at = Math.min(heard.at, now); // a time in the future is a clock that was set back
  if (lost < heard.lost) heard.lost = 0; // a new ledger counts anew
  if (lost > heard.lost && now - heard.lostToldAt >= LOST_AGAIN_MS) {
    const change = { title: host, text: "", status: "fault", sender: true, since: now } as const;
    changes.push({ kind: "lost", ...change, bytes: lost - heard.lost });
    Object.assign(heard, { lost, lostToldAt: now });
  }
}

function hostStatus(
  { state, sight, rules, now }: Judged,
  host: string,
  seen: HostSight | undefined,
  incident: Incident,
): { status: Status; since: number } {
  const heard = state.heard[host];
  if (!heard) return { status: "never", since: now };
  const threshold = (rules.silentMinutesByHost[host] ?? rules.silentMinutes) * MINUTE_MS;
  if (now - heard.at >= GONE_MS && !rules.expected.includes(host)) return { status: "gone", since: heard.at };
  if (incident.status === "silent" && heard.at <= incident.since) return incident;
  if (now - Math.max(heard.at, now - sight.uptime, lastReturn(state)) >= threshold) {
    const down = sight.receivers.map(({ key }) => state.incidents[key]?.since ?? now);
    const itself = down.length === 0 || heard.at >= Math.min(...down); // others were down when it was heard
    return itself ? { status: "silent", since: heard.at } : incident;
  }
  if (rules.alertWhenQuiet && seen && heard.value - seen.lineAt >= threshold) {
    return { status: "quiet", since: seen.lineAt || heard.at };
  }
  return { status: "ok", since: heard.at };
}

/** When a receiver that had not answered was back last. */
function lastReturn(state: MonitorState): number {
  const receivers = Object.entries(state.incidents).filter(([key]) => key.startsWith("receiver "));
  return Math.max(0, ...receivers.map(([, { status, since }]) => (status === "ok" ? since : 0)));
}

function incidentOf(state: MonitorState, key: string, title: string): Incident {
  state.incidents[key] ??= { title, text: "", status: "ok", since: 0, told: "ok", toldAt: 0, changes: [] };
  return state.incidents[key];
}

/** Takes the subject's present state into its incident, and adds what there is to tell. */
function follow(
  judged: Judged,
  incident: Incident,
  { status, since, sender }: { status: Status; since: number; sender: boolean },
): void {
  const { now, id, changes, references, rules, state } = judged;
  incident.changes = incident.changes.filter((at) => now - at < FLAP_WITHIN_MS);
  const outage = incident.outage ?? since;
  if (status !== incident.status) {
    Object.assign(incident, { status, since, changes: [...incident.changes, now] });
    if (status === "ok") delete incident.outage;
    else incident.outage = outage;
  }
  const unsent = state.queue.some(
    (notice) => notice.kind === "alert" && notice.changes.some(({ title }) => title === incident.title),
  );
  const kind = whatToTell(incident, now, unsent ? Number.POSITIVE_INFINITY : rules.remindMinutes);
  if (!kind) return;
  if (kind === "opened" && incident.told === "ok") incident.thread = id;
  else if (incident.thread) references.add(incident.thread);
  changes.push({
    kind,
    title: incident.title,
    text: incident.text,
    status,
    sender,
    since: incident.outage ?? incident.since,
    ...(status === "ok" && incident.told !== "never" && { lasted: Math.max(0, since - outage) }),
  });
  incident.flapping = kind === "flapping" || (kind === "reminder" && incident.flapping === true);
  Object.assign(incident, { told: status, toldAt: now });
}

function whatToTell(incident: Incident, now: number, remindMinutes: number): Change["kind"] | undefined {
  const { status, told, changes } = incident;
  const reminderDue = now - incident.toldAt >= remindMinutes * MINUTE_MS;
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
