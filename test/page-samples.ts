/** States of a fleet for the tests of the status page. Same numbers on every run. */
import { dashedHost, formatBatchName, formatWindow } from "../lib/batch.ts";
import { type BatchSeen, DEFAULT_THRESHOLDS, type HostState, type HostStatus } from "../lib/snapshot.ts";
import { findProblems, type Snapshot } from "../lib/status.ts";

export const NOW = Date.parse("2026-11-22T10:52:31Z");
const MINUTE_MS = 60_000;

/** The batches of a day that are `place`, and the open one. */
function batchesOf(name: string, seed: number, end: number): BatchSeen[] {
  const batches: BatchSeen[] = [];
  for (let i = 0; i < end; i++) {
    const window = formatWindow(NOW - (end - 1 - i + (72 - end)) * 20 * MINUTE_MS, 20);
    const parts = (i + seed) % 29 === 0 ? [1, 2] : [1];
    for (const part of parts) {
      const batch = formatBatchName({
        prefix: "accessLog",
        window,
        host: dashedHost(name),
        part,
        state: "sealed",
      });
      batches.push({ name: batch, place: i === 71 ? "open" : "delivered" });
    }
  }
  return batches;
}

/** A sender as it looks in a state, with four hours of lines. */
export function host(name: string, state: HostState = "ok", over: Partial<HostStatus> = {}): HostStatus {
  const seed = [...name].reduce((sum, char) => (sum * 31 + char.charCodeAt(0)) % 9973, 7);
  const end = { ok: 240, quiet: 150, silent: 200, waiting: 200, never: 0, gone: 0 }[state];
  const minutes = { ok: 0.015, quiet: 0.35, silent: 40, waiting: 9, never: NOW / MINUTE_MS, gone: 4000 }[
    state
  ];
  const age = minutes * MINUTE_MS;
  const windows = { ok: 72, quiet: 60, silent: 68, waiting: 68, never: 0, gone: 0 }[state];
  const batches = batchesOf(name, seed, windows);
  return {
    host: name,
    state,
    expected: true,
    heardAt: NOW - age,
    lineAt: NOW - (state === "quiet" ? 90 * MINUTE_MS : age),
    linesPerMinute: Array.from({ length: 240 }, (_, i) =>
      i < end ? Math.round((500 + (seed % 900)) * (1.5 + Math.sin((i + seed) / 40)) + ((i * 7919) % 60)) : 0,
    ),
    lag: state === "ok" ? seed * 5 : state === "quiet" ? 0 : undefined,
    open: state === "never" ? 0 : 1,
    waiting: 0,
    failed: 0,
    undelivered: 0,
    lost: 0,
    gone: 0,
    skipped: 0,
    untimed: 0,
    ahead: 0,
    zone: 0,
    batches,
    ...(windows > 0 && { delivered: windows === 72 ? "26112210_20-39" : "26112209_00-19" }),
    ...(windows === 72 && { undeliveredFrom: "26112210_40-59" }),
    ...over,
  };
}

const FORWARDER = {
  version: 1,
  ok: true,
  failed: {},
  later: {},
  stays: true,
  aliveAt: NOW - 14_000,
} as const;

/** A snapshot with these senders; all is well but for what `over` says. */
export function status(hosts: HostStatus[], over: Partial<Snapshot> = {}): Snapshot {
  const snapshot: Snapshot = {
    version: "1.0.0",
    now: NOW,
    server: "middle",
    byDefaults: false,
    startedAt: NOW - 4608 * MINUTE_MS,
    linesPerMinute: Array.from({ length: 240 }, (_, i) =>
      hosts.reduce((sum, { linesPerMinute }) => sum + (linesPerMinute[i] ?? 0), 0),
    ),
    unreadable: [],
    failed: hosts.flatMap((sender) =>
      Array.from({ length: sender.failed }, (_, i) => `accessLog_261122${10 + i}_00-19_x.log`),
    ),
    dir: "/app/log/access-log-receiver",
    hosts,
    receivers: [],
    deliveryMinutes: DEFAULT_THRESHOLDS.deliveryMinutes,
    mutes: {},
    problems: [],
    disk: { free: 412e9, total: 1e12 },
    forwarder: { ...FORWARDER, at: NOW - 14_000, lastSentAt: NOW - 184_000 },
    ...over,
  };
  return { ...snapshot, problems: findProblems(snapshot, DEFAULT_THRESHOLDS) };
}

export const refused = "Cannot connect to 10.12.3.3:22022: connection refused";

const { forwarder: _, ...withoutForwarder } = status([]);

/** A fleet; beyond the first ones without curve and batches, as a look gives them. */
export function fleet(senders: number): Snapshot {
  const hosts = Array.from({ length: senders }, (_, i) => {
    const state = i % 670 === 3 ? "silent" : i % 311 === 5 ? "quiet" : i % 1999 === 7 ? "never" : "ok";
    const agent = `log-rt-sync/${i % 400 === 9 ? "1.9.0" : "2.0.0"}`;
    const sender = host(`10.10.${20 + Math.floor(i / 250)}.${1 + (i % 250)}`, state, { agent });
    return i < 200 || state !== "ok" ? sender : { ...sender, batches: [], linesPerMinute: [] };
  });
  return status(hosts, { digest: { name: "accessLog_26112209.sha256", sha256: "4bf5122f".repeat(8) } });
}

export const samples: Record<"empty" | "good" | "trouble" | "many", Snapshot> = {
  empty: withoutForwarder,
  good: status([181, 182, 183, 190].map((n) => host(`10.10.21.${n}`, n === 190 ? "quiet" : "ok"))),
  trouble: status(
    [
      host("10.10.21.181", "ok", { lag: 1_040_000, lost: 1_040_000 }),
      host("10.10.21.182", "silent", {
        waiting: 4,
        oldest: "accessLog_26112008_20-39_10-10-21-182.log",
        waitingSince: NOW - 3000 * MINUTE_MS,
      }),
      host("10.10.21.183", "ok", { waiting: 3, waitingSince: NOW - 42 * MINUTE_MS, lost: 3_200_000 }),
      host("10.10.21.184", "never"),
      host("web-7.frankfurt.example.com", "quiet"),
      host("fd00:10:10::21:185", "ok", { failed: 2 }),
      host("10.10.9.4", "gone", { waiting: 1, waitingSince: NOW - 1000 }),
      host("10.10.22.10", "silent"),
    ],
    {
      disk: { free: 41e9, total: 1e12 },
      forwarder: {
        ...FORWARDER,
        at: NOW - 14_000,
        lastSentAt: NOW - 65 * MINUTE_MS,
        fault: { kind: "connection", text: refused, since: NOW - 63 * MINUTE_MS },
      },
    },
  ),
  many: status(
    Array.from({ length: 200 }, (_, i) =>
      host(
        `10.10.${21 + Math.floor(i / 100)}.${1 + (i % 100)}`,
        i % 67 === 3 ? "silent" : i % 31 === 5 ? "quiet" : "ok",
      ),
    ),
  ),
};
