/**
 * The state of everything in words: what is wrong, and the one sentence that answers "is everything arriving, and
 * is everything delivered?". The thresholds are the monitor's defaults: the receiver has no config of the monitor's.
 */
import { sections } from "./config.ts";
import { type HostStatus, inState, type Status, sum } from "./status.ts";

/** Something that keeps lines from arriving or batches from being delivered, in words. */
export interface Problem {
  kind: "silent" | "never" | "fault" | "late" | "failed" | "disk";
  leg: "arrival" | "delivery" | "disk";
  text: string;
  /** What is known beyond the text. */
  detail?: string;
  /** The senders that it concerns; empty when it concerns none in particular. */
  hosts: string[];
}

const { deliveryMinutes, minFreePercent } = sections.monitor.shape;
const DELIVERY_MS = deliveryMinutes.parse(undefined) * 60_000;
const MIN_FREE_PERCENT = minFreePercent.parse(undefined);

/** What is wrong, worst first; nothing when every line arrives and every batch is delivered. */
export function findProblems({ hosts, forwarder, disk, now }: Status): Problem[] {
  const silent = inState(hosts, "silent");
  const never = inState(hosts, "never");
  const late = hosts.filter((host) => isLate(host, now));
  const failed = hosts.filter((host) => host.failed > 0);
  const lateSince = Math.min(now, ...late.map(({ waitingSince = now }) => waitingSince));
  const problems: (Omit<Problem, "hosts"> & { hosts: HostStatus[] })[] = [];
  if (silent.length > 0) {
    const text = `${count(silent.length, "sender is", "senders are")} silent`;
    problems.push({ kind: "silent", leg: "arrival", text, hosts: silent });
  }
  if (never.length > 0) {
    const text = `${count(never.length, "sender was", "senders were")} never heard of`;
    problems.push({ kind: "never", leg: "arrival", text, hosts: never });
  }
  if (forwarder?.fault) {
    const { text: detail, since } = forwarder.fault;
    const text = `delivery fails since ${formatClock(since, now)}`;
    problems.push({ kind: "fault", leg: "delivery", text, detail, hosts: [] });
  }
  if (late.length > 0) {
    const batches = count(sum(late, "waiting"), "batch waits", "batches wait");
    const text = `${batches} since ${formatClock(lateSince, now)}`;
    problems.push({ kind: "late", leg: "delivery", text, hosts: late });
  }
  if (failed.length > 0) {
    const text = `${count(sum(failed, "failed"), "batch", "batches")} failed`;
    problems.push({ kind: "failed", leg: "delivery", text, hosts: failed });
  }
  if (disk && disk.free / disk.total < MIN_FREE_PERCENT / 100) {
    const text = `the disk has ${Math.floor((100 * disk.free) / disk.total)} % left`;
    problems.push({ kind: "disk", leg: "disk", text, hosts: [] });
  }
  return problems.map((problem) => ({ ...problem, hosts: problem.hosts.map(({ host }) => host) }));
}

/** Whether a sender's oldest sealed batch waits for longer than a forwarder takes. */
export function isLate({ waitingSince }: HostStatus, now: number): boolean {
  return waitingSince !== undefined && now - waitingSince > DELIVERY_MS;
}

/** The one sentence at the top: `2 senders are silent, 14 batches wait since 10:20`. */
export function verdict({ hosts, forwarder }: Status, problems: Problem[]): string {
  if (problems.length > 0) {
    const told = problems.length > 3 ? problems.slice(0, 2) : problems;
    const more = problems.length > told.length ? [`and ${problems.length - told.length} more problems`] : [];
    return sentence([...told.map(({ text }) => text), ...more].join(", "));
  }
  if (hosts.length === 0) return "No sender was heard of yet";
  const arrival = inState(hosts, "ok").length > 0 ? "Everything arrives" : "No lines come";
  if (!forwarder) return `${arrival}, no forwarder has run here yet`;
  return `${arrival} and ${inState(hosts, "ok").length > 0 ? "is" : "everything is"} delivered`;
}

/** `1 batch`, `1,400 batches`. */
export function count(n: number, one: string, many: string): string {
  return `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
}

/** `10:20`, with the day when it is not today's: the receiver's wall clock. */
export function formatClock(at: number, now: number): string {
  const time = new Date(at).toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  if (new Date(at).toDateString() === new Date(now).toDateString()) return time;
  return `${new Date(at).toLocaleDateString("en-GB", { day: "numeric", month: "short" })}, ${time}`;
}

/** The text with a capital at its head. */
export function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
