/**
 * Housekeeping against the gzip command: a GiB of delivered batches, compressed by `housekeep.ts` and by
 * `gzip -6`, on the same files in turn. Ours also reads each file back, compares it and syncs it before the
 * original goes; gzip does neither. `bun run bench/housekeep.ts` runs it alone; needs 3 GiB in the temp folder.
 */
import { execFileSync } from "node:child_process";
import {
  copyFileSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { availableParallelism, tmpdir } from "node:os";
import { join } from "node:path";
import { generateLog } from "./generate.ts";
import { median } from "./sample.ts";

const FILES = 12;
const LINES = 400_000; // of about 220 bytes: some 88 MiB a file
const REPEATS = 3;

/** Seconds of one contestant on all files, and the bytes that it left. */
interface Run {
  seconds: number;
  bytes: number;
}

/** Runs the comparison in `root` and gives a Markdown section. */
export async function bench(root: string, { files = FILES, repeats = REPEATS } = {}): Promise<string> {
  const source = join(root, "source");
  mkdirSync(source, { recursive: true });
  let total = 0;
  for (let n = 0; n < files; n++) {
    const traffic = { lines: LINES, startMs: Date.UTC(2026, 10, 22, n), linesPerSecond: 300, seed: n + 1 };
    total += generateLog(join(source, batchName(n)), traffic);
  }
  const runs: Record<"ours" | "gzip", Run[]> = { ours: [], gzip: [] };
  for (let i = 0; i < repeats; i++) {
    runs.gzip.push(runOn(source, join(root, "gzip"), gzip));
    runs.ours.push(runOn(source, join(root, "ours"), housekeep));
  }
  const workers = Math.min(8, Math.max(1, availableParallelism() - 1));
  const row = (name: string, of: Run[]) => {
    const seconds = median(of.map((run) => run.seconds));
    const size = (100 * (of[0]?.bytes ?? 0)) / total;
    const rate = total / seconds / 1024 / 1024;
    return `| ${name} | ${seconds.toFixed(1)} s | ${rate.toFixed(0)} MiB/s | ${size.toFixed(1)} % |`;
  };
  return [
    "### Housekeeping",
    "",
    `${files} delivered batches, ${(total / 1024 ** 3).toFixed(2)} GiB, compressed; median of ${repeats} runs in turn.`,
    "",
    "| | time | rate | size |",
    "|---|---|---|---|",
    row(`housekeep.ts, ${workers} at a time, read back and synced`, runs.ours),
    row("`gzip -6`", runs.gzip),
  ].join("\n");
}

function batchName(n: number): string {
  return `accessLog_261122${String(n).padStart(2, "0")}_00-19_10-10-21-181.log`;
}

/** Copies the files, runs the contestant on the copies, and removes them. */
function runOn(source: string, folder: string, contestant: (folder: string, sent: string) => void): Run {
  const sent = join(folder, "sent");
  mkdirSync(sent, { recursive: true });
  const delivered = Date.now() / 1000 - 3600;
  for (const name of readdirSync(source)) {
    copyFileSync(join(source, name), join(sent, name));
    utimesSync(join(sent, name), delivered, delivered);
  }
  execFileSync("sync");
  const started = performance.now();
  contestant(folder, sent);
  const seconds = (performance.now() - started) / 1000;
  const names = readdirSync(sent);
  const expected = readdirSync(source).length;
  if (names.length !== expected || !names.every((name) => name.endsWith(".gz"))) {
    throw new Error(`Cannot compare: expected ${expected} files .gz, found ${names.join(", ")}`);
  }
  const bytes = names.reduce((sum, name) => sum + statSync(join(sent, name)).size, 0);
  rmSync(folder, { recursive: true });
  return { seconds, bytes };
}

function gzip(_folder: string, sent: string): void {
  execFileSync("gzip", ["-6", ...readdirSync(sent).map((name) => join(sent, name))]);
}

function housekeep(folder: string): void {
  const config = join(folder, "config.json");
  const section = { dir: folder, compressAfterHours: 0.5, report: join(folder, "report.log") };
  writeFileSync(config, JSON.stringify({ housekeep: section }));
  const script = join(import.meta.dirname, "..", "housekeep.ts");
  execFileSync(process.execPath, ["run", script, "--config", config], {
    stdio: ["ignore", "ignore", "inherit"],
  });
}

if (import.meta.main) {
  const root = mkdtempSync(join(tmpdir(), "log-rt-sync-bench-"));
  try {
    process.stdout.write(`${await bench(root)}\n`);
  } finally {
    rmSync(root, { recursive: true, force: true });
  }
}
