/**
 * Prometheus' text format 0.0.4. Names by its guide: one prefix for each part, base units, `_total` on counters.
 *
 * The receiver has a port and answers with it; the parts without one leave `<part>.prom` in a folder for the textfile
 * collector of node_exporter, replaced whole, so that a reader never meets half of one.
 */
import { chownSync, statSync } from "node:fs";
import { dirname, join } from "node:path";
import { exists, makeFolder, writeDurably } from "./durable.ts";

export type Sample = [labels: Record<string, string>, value: number];

/** A metric; without samples it is left out. The help's last stop is added. */
export type Metric = [name: string, type: "gauge" | "counter", help: string, samples: Sample[] | number];

export function formatMetrics(part: string, metrics: Metric[]): string {
  return metrics
    .map(([name, type, help, value]) => {
      const full = `log_rt_sync_${part}_${name}`;
      const samples: Sample[] = typeof value === "number" ? [[{}, value]] : value;
      const rows = samples.map(([labels, number]) => `${full}${formatLabels(labels)} ${number}\n`);
      return rows.length === 0 ? "" : `# HELP ${full} ${help}.\n# TYPE ${full} ${type}\n${rows.join("")}`;
    })
    .join("");
}

/**
 * Replaces `<folder>/<part>.prom`. The folder is made when it is missing, for everybody to read, and belongs to whom
 * the one above belongs. Throws the system's error.
 */
export async function writeMetrics(folder: string, part: string, metrics: Metric[]): Promise<void> {
  if (!(await exists(folder))) {
    await makeFolder(folder, 0o755);
    const { uid, gid } = statSync(dirname(folder));
    if (process.getuid?.() === 0) chownSync(folder, uid, gid);
  }
  await writeDurably(join(folder, `${part}.prom`), formatMetrics(part, metrics), 0o644);
}

function formatLabels(labels: Record<string, string>): string {
  const quote = (text: string) => text.replace(/[\\"]/g, "\\$&").replace(/\n/g, "\\n");
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${quote(value)}"`);
  return pairs.length > 0 ? `{${pairs.join(",")}}` : "";
}
