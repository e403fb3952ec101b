/**
 * `npm run build` makes dist/shipper.js … dist/housekeep.js: each one self-contained file for `bun run`, for hosts
 * without node_modules. `npm run build:bin` makes dist/log-rt-sync-shipper …: executables for hosts without Bun,
 * for this machine's system and processor. Neither fetches anything.
 *
 * Each output is made beside its final name and renamed, so that a build that fails leaves the last good one.
 */
import { spawnSync } from "node:child_process";
import { mkdirSync, renameSync, rmSync, statSync } from "node:fs";
import { join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { sections } from "../lib/config.ts";
import { formatBytes } from "../lib/service.ts";

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
function build(script: string, outdir: string, compile: boolean): string | undefined {
  const file = join(outdir, compile ? `log-rt-sync-${script}` : `${script}.js`);
  const fresh = `${file}.new`;
  const args = ["build", ...buildFlags(compile), `--outfile=${fresh}`, join(root, `${script}.ts`)];
  const { status, stderr } = spawnSync(process.execPath, args, { cwd: outdir, encoding: "utf8" });
  if (status !== 0) {
    process.stderr.write(`${script}: ${stderr}`);
    rmSync(fresh, { force: true });
    return undefined;
  }
  renameSync(fresh, file);
  return file;
}

const { values } = parseArgs({
  options: { compile: { type: "boolean", default: false }, outdir: { type: "string", default: "dist" } },
});
const outdir = resolve(root, values.outdir);
mkdirSync(outdir, { recursive: true });
let failed = 0;
for (const script of Object.keys(sections)) {
  const file = build(script, outdir, values.compile);
  if (file) process.stdout.write(`${file}  ${formatBytes(statSync(file).size)}\n`);
  else failed++;
}
process.exit(failed === 0 ? 0 : 1);
