/**
 * The answer behind the forwarder's `--status`: what waits, what failed, and whether a forwarder is there to deliver it.
 */
import { lstatSync } from "node:fs";
import { join } from "node:path";
import { dashedHost, folders, isCopy, listBatches, listHosts, parseBatchName } from "../batch.ts";
import type { Config } from "../config.ts";
import { findHolder } from "../durable.ts";
import { parseHost } from "../host.ts";
import { readReportTail } from "../report.ts";
import { formatDuration, HOUR, OperatorError } from "../service.ts";
import { readForwarderState } from "../signs.ts";
import { count } from "../status.ts";
import { formatTable, paint } from "../table.ts";

/** A queue without a forwarder is wrong when a batch waits for so long: one of `--once` comes and goes. */
const STANDSTILL_MS = 600_000;

/** The queue by host, or of one, what failed and why, the last success and the rate. Throws an OperatorError for a host that is not known. */
export async function readStatus(config: Config["forwarder"], host: string | undefined, now: number) {
  const all = folders(config.dir);
  const state = await readForwarderState(config.dir);
  const only = host === undefined ? undefined : parseHost(host);
  const known = await listHosts(config.dir);
  if (host !== undefined && !known.includes(only ?? ""))
    throw new OperatorError(`Sender ${host} is not known in ${config.dir}`);
  const hosts: { host: string; waiting: number; oldest?: string; since?: number | undefined }[] = [];
  for (const host of known.filter((one) => only === undefined || one === only)) {
    const batches = await listBatches(all.host(host), "sealed");
    if (isCopy(host, batches)) continue; // nobody delivers what lies there
    const [oldest] = batches;
    const path = join(all.host(host), oldest ?? "");
    const since = oldest === undefined ? undefined : lstatSync(path, { throwIfNoEntry: false })?.mtimeMs;
    hosts.push({ host, waiting: batches.length, ...(oldest && { oldest, since }) });
  }
  hosts.sort((a, b) => (a.since ?? now) - (b.since ?? now));
  const failed = (await listBatches(all.failed, "sealed"))
    .filter((batch) => only === undefined || parseBatchName(batch)?.host === dashedHost(only))
    .map((batch) => ({
      batch,
      ...(state?.failed[batch] ?? { reason: "moved there by hand", nextAt: undefined }),
    }));
  const sent = (await readReportTail(config.report)).filter(({ status }) => status === "Sent");
  const recent = sent.filter(({ at }) => at > now - HOUR);
  const lastHour = { batches: recent.length, lines: recent.reduce((sum, { lines }) => sum + lines, 0) };
  const lastSent = sent.at(-1);
  const fault = state?.fault;
  const waits = now - (hosts[0]?.since ?? now) > Math.max(STANDSTILL_MS, 2000 * config.intervalSeconds);
  const running = findHolder(join(config.dir, ".forwarder.lock")) !== undefined;
  const ok = failed.length === 0 && !fault && (running || !(waits || state?.stays));
  return { ok, running, hosts, failed, lastSent, lastHour, fault };
}

/** The same for a terminal. */
export function formatStatus(status: Awaited<ReturnType<typeof readStatus>>, now: number): string {
  const { ok, running, hosts, failed, lastSent, lastHour, fault } = status;
  const rows = hosts.map(({ host, waiting, oldest = "-" }) => [host, String(waiting), oldest]);
  const waiting = hosts.reduce((sum, host) => sum + host.waiting, 0);
  const ago = (at: number) => formatDuration(Math.max(0, now - at));
  const lines = [
    ...(fault ? [paint(`held up for ${ago(fault.since)} (${fault.kind}): ${fault.text}`, true)] : []),
    ...failed.map(({ batch, reason, nextAt }) => {
      const again = nextAt === undefined ? "" : `, next try in ${formatDuration(Math.max(0, nextAt - now))}`;
      return paint(`failed: ${batch}: ${reason}${again}`, true);
    }),
    ...(running ? [] : [paint("no forwarder is running: systemctl status log-rt-sync-forwarder", !ok)]),
    ...(ok ? [paint(`ok, ${count(waiting, "batch waits", "batches wait")}`, false)] : []),
    formatTable(["host", "waiting", "oldest"], rows, [1]).trimEnd(),
    lastSent ? `last success: ${lastSent.batch}, ${ago(lastSent.at)} ago` : "last success: never",
    `last hour: ${count(lastHour.batches, "batch", "batches")}, ${count(lastHour.lines, "line", "lines")}`,
  ];
  return `${lines.join("\n")}\n`;
}
