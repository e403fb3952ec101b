/**
 * `npm run build` makes dist/shipper.js … dist/housekeep.js: each one self-contained file for `bun run`, for hosts
 * without node_modules. `npm run build:bin` makes dist/log-rt-sync-shipper …: executables for hosts without Bun,
 * for this machine's system and processor. What goes onto hosts is built from packages of a locked install of its own
 * (a copy of package.json and bun.lock in a temporary folder), whose hashes bun.lock holds; `--here` takes the
 * node_modules of this checkout as they are, and fetches nothing. SHA256SUMS stands beside the outputs.
 *
 * Each output is made beside its final name and renamed, so that a build that fails leaves the last good one.
 */
import { spawnSync } from "node:child_process";
import { cpSync, mkdirSync, mkdtempSync, renameSync, rmSync, statSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { sections } from "../lib/config.ts";
import { formatBytes } from "../lib/service.ts";
import { writeSums } from "./sums.ts";

const root = join(import.meta.dirname, "..");

/** ssh2 tries these two and goes on without them: native code that would tie a bundle to one machine. */
const OPTIONAL_NATIVE = ["cpu-features", "*.node"];

/** What `bun build` is told for one script. */
function buildFlags(compile: boolean): string[] {
  const external = OPTIONAL_NATIVE.map((name) => `--external=${name}`);
  if (!compile) return ["--target=bun", ...external];
  // An executable takes no settings from the folder that it is started in.
  return ["--compile", "--no-compile-autoload-dotenv", "--no-compile-autoload-bunfig", ...external];
}

/** Builds one script; the name of the file that it made, or undefined when it failed. */
function build(source: string, script: string, outdir: string, compile: boolean): string | undefined {
  const file = join(outdir, compile ? `log-rt-sync-${script}` : `${script}.js`);
  const fresh = `${file}.new`;
  const args = ["build", ...buildFlags(compile), `--outfile=${fresh}`, join(source, `${script}.ts`)];
  const { status, stderr } = spawnSync(process.execPath, args, { cwd: outdir, encoding: "utf8" });
  if (status !== 0) {
    process.stderr.write(`${script}: ${stderr}`);
    rmSync(fresh, { force: true });
    return undefined;
  }
  renameSync(fresh, file);
  return file;
}

/** A copy of the sources with packages as bun.lock has them, in a temporary folder. */
function lockedSources(): string {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-build-"));
  const scripts = Object.keys(sections).map((script) => `${script}.ts`);
  for (const name of [...scripts, "lib", "package.json", "bun.lock"]) {
    cpSync(join(root, name), join(folder, name), { recursive: true });
  }
  const args = ["install", "--frozen-lockfile", "--production", "--omit=optional", "--ignore-scripts"];
  const { status, stderr } = spawnSync(process.execPath, args, { cwd: folder, encoding: "utf8" });
  if (status === 0) return folder;
  rmSync(folder, { recursive: true, force: true });
  process.stderr.write(`the packages of bun.lock cannot be installed: ${stderr}`);
  process.exit(1);
}

const { values } = parseArgs({
  options: {
    compile: { type: "boolean", default: false },
    here: { type: "boolean", default: false },
    outdir: { type: "string", default: "dist" },
  },
});
const outdir = resolve(root, values.outdir);
mkdirSync(outdir, { recursive: true });
const source = values.here ? root : lockedSources();
let failed = 0;
for (const script of Object.keys(sections)) {
  const file = build(source, script, outdir, values.compile);
  if (file) process.stdout.write(`${file}  ${formatBytes(statSync(file).size)}\n`);
  else failed++;
}
if (!values.here) rmSync(source, { recursive: true, force: true });
if (failed === 0) writeSums(outdir);
process.exit(failed === 0 ? 0 : 1);
