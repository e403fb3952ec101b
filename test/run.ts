/**
 * `npm test`: every check in one word. Format and lint (biome), types (tsc), then the tests; the last line is
 * `N passed, N failed` and the exit code is 0 only when nothing failed. Arguments are handed to `bun test`.
 */
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

const root = join(import.meta.dirname, "..");
const bin = (name: string) => join(root, "node_modules", ".bin", name);
const filters = process.argv.slice(2);

/** Nothing of it takes nearly as long; what hangs must not keep the last line from being written. */
const LIMIT_MS = 60 * 60_000;

/** What the tests expect of times is written for one zone; those about zones set their own. */
const env = { ...process.env, TZ: "UTC" };

function run(command: string, args: string[]): boolean {
  const { status, error } = spawnSync(command, args, { cwd: root, env, stdio: "inherit", timeout: LIMIT_MS });
  if (error) process.stderr.write(`${command}: ${error.message}\n`);
  return status === 0;
}

let passed = 0;
let failed = 0;
let skipped = 0;
const count = (ok: boolean) => (ok ? passed++ : failed++);

if (filters.length === 0) {
  count(run(bin("biome"), ["check", "."]));
  count(run(bin("tsc"), ["--noEmit"]));
}

const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-report-"));
const report = join(folder, "junit.xml");
const ok = run(process.execPath, [
  "test",
  // Most of the time a test waits. Each file loads test/support.ts anew, so that what it registers to clean up runs after it.
  "--parallel=2",
  "--timeout",
  "120000",
  "--reporter=junit",
  `--reporter-outfile=${report}`,
  ...filters,
]);
try {
  // The first element of the report sums up all files.
  const sum = /<testsuites\b[^>]*>/.exec(readFileSync(report, "utf8"))?.[0] ?? "";
  const number = (name: string) => Number(new RegExp(`\\b${name}="(\\d+)"`).exec(sum)?.[1] ?? 0);
  skipped += number("skipped");
  failed += number("failures");
  passed += number("tests") - number("failures") - number("skipped");
} catch {
  process.stderr.write("the test runner wrote no report\n");
}
if (!ok && failed === 0) failed++; // a file that could not be loaded is no test, but a failure
rmSync(folder, { recursive: true, force: true });

if (skipped > 0) {
  process.stdout.write(`\n${skipped} skipped${process.env.CI ? ", which is a failure in CI" : ""}\n`);
  if (process.env.CI) failed += skipped;
}
process.stdout.write(`\n${passed} passed, ${failed} failed\n`);
process.exit(failed === 0 && passed > 0 ? 0 : 1);
