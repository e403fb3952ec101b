/**
 * The receiver's metrics in Prometheus' text format 0.0.4; names by its guide: one prefix, base units, `_total`
 * on counters. What is in the ledgers comes from the status, so that it survives a restart; the rest is
 * counted since the start.
 */

import type { Status } from "./status.ts";
import type { Outcome } from "./store/sender.ts";

/** Upper bounds of the histogram of commits, in seconds. */
const COMMIT_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5];
const PREFIX = "log_rt_sync_receiver_";
export const METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8";

/** Counted per sender since the start. */
interface Count {
  lines: number;
  bytes: number;
  chunks: number;
  duplicates: number;
}

type Sample = [labels: Record<string, string>, value: number];
export type Metrics = ReturnType<typeof createMetrics>;

/** Counts what happens, and tells it. */
export function createMetrics() {
  const hosts = new Map<string, Count>();
  const refused = new Map<number, number>();
  const commits = { buckets: COMMIT_SECONDS.map(() => 0), sum: 0, count: 0 };

  return {
    chunk(host: string, bytes: number, { conflict, lines }: Outcome): void {
      const count = hosts.get(host) ?? { lines: 0, bytes: 0, chunks: 0, duplicates: 0 };
      if (conflict) count.duplicates++;
      else {
        count.chunks++;
        count.lines += lines;
        count.bytes += bytes;
      }
      hosts.set(host, count);
    },

    refused(status: number): void {
      refused.set(status, (refused.get(status) ?? 0) + 1);
    },

    commit(ms: number): void {
      commits.count++;
      commits.sum += ms / 1000;
      for (const [i, bound] of COMMIT_SECONDS.entries()) {
        if (ms / 1000 <= bound) commits.buckets[i] = (commits.buckets[i] ?? 0) + 1;
      }
    },

    /** The text of a scrape. */
    render(status: Status, inFlight: { requests: number; bytes: number }): string {
      const counted = (key: keyof Count): Sample[] =>
        [...hosts].map(([host, count]) => [{ host }, count[key]]);
      const told = (value: (host: Status["hosts"][number]) => number): Sample[] =>
        status.hosts.map((host) => [{ host: host.host }, value(host)]);
      const one = (value: number): Sample[] => [[{}, value]];
      return [
        metric("build_info", "gauge", "Version that runs", [[{ version: status.version }, 1]]),
        metric("start_time_seconds", "gauge", "When it started", one(status.startedAt / 1000)),
        metric("lines_total", "counter", "Lines stored since the start", counted("lines")),
        metric("bytes_total", "counter", "Bytes of lines stored since the start", counted("bytes")),
        metric("chunks_total", "counter", "Chunks and heartbeats taken since the start", counted("chunks")),
        metric("duplicates_total", "counter", "Chunks refused: stream is elsewhere", counted("duplicates")),
        metric("refused_total", "counter", "Requests refused, by status", [
          ...[...refused].map(([code, count]): Sample => [{ status: String(code) }, count]),
        ]),
        metric(
          "last_seen_timestamp_seconds",
          "gauge",
          "When a sender was heard of",
          told((h) => h.heardAt / 1000),
        ),
        metric(
          "last_line_timestamp_seconds",
          "gauge",
          "When its last line came",
          told((h) => h.lineAt / 1000),
        ),
        metric(
          "lag_bytes",
          "gauge",
          "Bytes that a sender still has to ship",
          told((h) => h.lag),
        ),
        metric(
          "lost_bytes_total",
          "counter",
          "Bytes that vanished before they were read",
          told((h) => h.lost),
        ),
        metric(
          "open_batches",
          "gauge",
          "Batches that still take lines",
          told((h) => h.open),
        ),
        metric(
          "sealed_batches",
          "gauge",
          "Sealed batches that wait for the forwarder",
          told((h) => h.waiting),
        ),
        metric(
          "failed_batches",
          "gauge",
          "Batches in failed/",
          told((h) => h.failed),
        ),
        metric("requests_in_flight", "gauge", "Requests in hand", one(inFlight.requests)),
        metric("bytes_in_flight", "gauge", "Bytes of bodies in hand", one(inFlight.bytes)),
        status.disk ? metric("disk_free_bytes", "gauge", "Free space of dir", one(status.disk.free)) : "",
        status.disk ? metric("disk_size_bytes", "gauge", "Size of dir's disk", one(status.disk.total)) : "",
        renderCommits(commits),
      ].join("");
    },
  };
}

function metric(name: string, type: "gauge" | "counter", help: string, samples: Sample[]): string {
  const rows = samples.map(([labels, value]) => `${PREFIX}${name}${formatLabels(labels)} ${value}\n`);
  return `# HELP ${PREFIX}${name} ${help}.\n# TYPE ${PREFIX}${name} ${type}\n${rows.join("")}`;
}

function formatLabels(labels: Record<string, string>): string {
  const quote = (text: string) => text.replace(/[\\"]/g, "\\$&").replace(/\n/g, "\\n");
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${quote(value)}"`);
  return pairs.length > 0 ? `{${pairs.join(",")}}` : "";
}

function renderCommits({ buckets, sum, count }: { buckets: number[]; sum: number; count: number }): string {
  const name = `${PREFIX}commit_duration_seconds`;
  const rows = buckets.map((n, i) => `${name}_bucket{le="${COMMIT_SECONDS[i]}"} ${n}\n`).join("");
  const head = `# HELP ${name} From the first write to the last sync of a group commit.\n# TYPE ${name} histogram\n`;
  return `${head}${rows}${name}_bucket{le="+Inf"} ${count}\n${name}_sum ${sum}\n${name}_count ${count}\n`;
}
