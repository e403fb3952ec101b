/** States of a fleet for the tests of the status page. Same numbers on every run. */
import {
  DEFAULT_THRESHOLDS,
  findProblems,
  type HostState,
  type HostStatus,
  type Snapshot,
} from "../lib/status.ts";

export const NOW = Date.parse("2026-11-22T10:52:31Z");
const MINUTE_MS = 60_000;

/** A sender as it looks in a state, with four hours of lines. */
export function host(name: string, state: HostState = "ok", over: Partial<HostStatus> = {}): HostStatus {
  const seed = [...name].reduce((sum, char) => (sum * 31 + char.charCodeAt(0)) % 9973, 7);
  const end = { ok: 240, quiet: 150, silent: 200, waiting: 200, never: 0, gone: 0 }[state];
  const minutes = { ok: 0.015, quiet: 0.35, silent: 40, waiting: 9, never: NOW / MINUTE_MS, gone: 4000 }[
    state
  ];
  const age = minutes * MINUTE_MS;
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
    ...over,
  };
}

const FORWARDER = { version: 1, ok: true, failed: {}, stays: true, aliveAt: NOW - 14_000 } as const;

/** A snapshot with these senders; all is well but for what `over` says. */
export function status(hosts: HostStatus[], over: Partial<Snapshot> = {}): Snapshot {
  const snapshot: Snapshot = {
    version: "1.0.0",
    now: NOW,
    server: "middle",
    startedAt: NOW - 4608 * MINUTE_MS,
    dir: "/app/log/access-log-receiver",
    hosts,
    receivers: [],
    mutes: {},
    problems: [],
    disk: { free: 412e9, total: 1e12 },
    forwarder: { ...FORWARDER, at: NOW - 14_000, lastSentAt: NOW - 184_000 },
    ...over,
  };
  const failed = hosts.flatMap((sender) =>
    Array.from({ length: sender.failed }, (_, i) => `accessLog_261122${10 + i}_00-19_x.log`),
  );
  return { ...snapshot, problems: findProblems(snapshot, DEFAULT_THRESHOLDS, { failed }) };
}

export const refused = "Cannot connect to 10.12.3.3:22022: connection refused";

const { forwarder: _, ...withoutForwarder } = status([]);

export const samples: Record<"empty" | "good" | "trouble" | "many", Snapshot> = {
  empty: withoutForwarder,
  good: status([181, 182, 183, 190].map((n) => host(`10.10.21.${n}`, n === 190 ? "quiet" : "ok"))),
  trouble: status(
    [
      host("10.10.21.181", "ok", { lag: 1_040_000, lost: 1_040_000 }),
      host("10.10.21.182", "silent", { waiting: 4, waitingSince: NOW - 3000 * MINUTE_MS }),
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
