/**
 * What the tests share: temp folders that clean up, our scripts as real processes, waiting for a condition.
 * Everything binds to 127.0.0.1 on a free port and is ended by its process id.
 */
import { afterAll, expect } from "bun:test";
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import { accessSync, constants, existsSync } from "node:fs";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";

export const ROOT = join(import.meta.dirname, "..");

/** How long a condition may take to come true: generous, for two slow cores. */
export const PATIENCE_MS = 30_000;

const cleanups: (() => unknown)[] = [];
afterAll(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

/** Runs `cleanup` after the last test of the file. */
export function onCleanup(cleanup: () => unknown): void {
  cleanups.push(cleanup);
}

/** A new folder that is removed after the tests of the file. */
export async function tempFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), "log-rt-sync-"));
  onCleanup(() => rm(folder, { recursive: true, force: true }));
  return folder;
}

const givenPorts = new Set<number>();

/**
 * A TCP port of 127.0.0.1 that is free, another one each time. It lies below those that Linux gives to outgoing
 * connections (32768 and up): none takes it while its server is restarted, not even a client that knocks there.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 22_000);
    if (givenPorts.has(port) || !(await canListen(port))) continue;
    givenPorts.add(port);
    return port;
  }
}

function canListen(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const server = createServer();
    server.on("error", () => resolve(false));
    server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
  });
}

/** Waits until `condition` gives something other than undefined, null or false; fails with `what`, as it is then, after `ms`. */
export async function until<T>(
  what: string | (() => string),
  condition: () => T | Promise<T>,
  ms = PATIENCE_MS,
): Promise<Exclude<T, undefined | null | false>> {
  const deadline = Date.now() + ms;
  for (;;) {
    const value = await condition();
    if (value !== undefined && value !== null && value !== false) {
      return value as Exclude<T, undefined | null | false>;
    }
    if (Date.now() > deadline) {
      throw new Error(`waited ${ms} ms in vain: ${typeof what === "string" ? what : what()}`);
    }
    await new Promise((resolve) => setTimeout(resolve, 15));
  }
}

/** A process that a test started; `output` grows as it writes. */
export interface Running {
  process: ChildProcess;
  /** stdout and stderr so far. */
  output: string;
  /** Exit code, or the signal's name. */
  ended: Promise<number | string>;
  /** Sends a signal (SIGTERM when none is named) and waits for the end. */
  stop(signal?: NodeJS.Signals): Promise<number | string>;
  /** Waits until the output contains `text`. */
  says(text: string): Promise<void>;
}

/** Starts a program; it is killed after the tests of the file when it still runs. */
export function start(
  command: string,
  args: string[],
  options: { env?: Record<string, string | undefined>; cwd?: string } = {},
): Running {
  const child = spawn(command, args, {
    cwd: options.cwd ?? ROOT,
    env: { ...process.env, ...options.env },
    stdio: ["ignore", "pipe", "pipe"],
  });
  let over = false;
  const running: Running = {
    process: child,
    output: "",
    ended: new Promise((resolve, reject) => {
      child.on("error", reject);
      child.on("close", (code, signal) => {
        over = true;
        resolve(signal ?? code ?? -1);
      });
    }),
    async stop(signal = "SIGTERM") {
      if (!over) child.kill(signal);
      return running.ended;
    },
    says: async (text) => {
      const told = () => `${command} ${args[0]} says "${text}", but:\n${running.output}`;
      await until(told, () => running.output.includes(text));
    },
  };
  child.stdout.on("data", (data) => {
    running.output += data;
  });
  child.stderr.on("data", (data) => {
    running.output += data;
  });
  running.ended.catch(() => {});
  onCleanup(() => running.stop("SIGKILL"));
  return running;
}

/** Starts one of the five scripts with a config file, under the runtime that runs the tests. */
export function startScript(
  name: Section,
  configFile: string,
  flags: string[] = [],
  env: Record<string, string | undefined> = {},
): Running {
  return start(process.execPath, ["run", join(ROOT, `${name}.ts`), "--config", configFile, ...flags], {
    env,
  });
}

/** Deno itself: what lies in .bin is a wrapper, whose end by kill -9 would leave Deno running. */
export function denoPath(): string {
  const path = join(ROOT, "node_modules", "deno", "deno");
  if (!existsSync(path)) execFileSync(join(ROOT, "node_modules", ".bin", "deno"), ["--version"]); // unpacks it
  return path;
}

/** Runs one of the scripts to its end. */
export async function runScriptOnce(
  name: Section,
  configFile: string,
  flags: string[] = [],
  env: Record<string, string | undefined> = {},
): Promise<{ code: number | string; output: string }> {
  const running = startScript(name, configFile, flags, env);
  return { code: await running.ended, output: running.output };
}

/** Writes a config file into `folder` and gives its path. */
export async function writeConfig(folder: string, config: Partial<Record<Section, object>>): Promise<string> {
  const file = join(folder, "config.json");
  await writeFile(file, JSON.stringify(config, null, 2), { mode: 0o640 });
  return file;
}

/** The program's path, or undefined when it is not installed; also looks where Debian puts servers. */
export function findProgram(name: string): string | undefined {
  const folders = [
    ...(process.env.PATH ?? "").split(":"),
    "/usr/sbin",
    "/usr/local/sbin",
    "/sbin",
    "/usr/lib/openssh",
  ];
  for (const folder of folders) {
    const path = join(folder, name);
    if (!existsSync(path)) continue;
    try {
      accessSync(path, constants.X_OK);
      return path;
    } catch {
      // there, but not for us
    }
  }
  return undefined;
}

/**
 * Whether the tests that need these programs must be skipped. In CI a missing one is an error, elsewhere it is
 * told with the Debian package to install. Use as `test.skipIf(missing({ nginx: "nginx-light" }))(…)`.
 */
export function missing(programs: Record<string, string>): boolean {
  const absent = Object.keys(programs).filter((name) => !findProgram(name));
  if (absent.length === 0) return false;
  const text = `${absent.join(", ")} not found: apt-get install ${absent.map((name) => programs[name]).join(" ")}`;
  if (process.env.CI) throw new Error(text);
  process.stderr.write(`skipped: ${text}\n`);
  return true;
}

/** Whether the tests run as root; servers with chroot and mounts need it. In CI it is an error if not. */
export function notRoot(): boolean {
  if (process.getuid?.() === 0) return false;
  if (process.env.CI) throw new Error("these tests need root in CI");
  process.stderr.write("skipped: needs root\n");
  return true;
}

/** A line as nginx writes it in the combined format, at a time and with a number to tell it from others. */
export function accessLine(number: number, at = "22/Nov/2026:06:20:01 +0600"): string {
  return `10.0.0.${number % 250} - - [${at}] "GET /item/${number} HTTP/1.1" 200 ${100 + (number % 900)} "-" "curl/8.5"\n`;
}

/** Expects two texts of many lines to be the same, and names the first line that is not. */
export function expectSameLines(actual: string | Buffer, expected: string | Buffer): void {
  if (Buffer.from(actual).equals(Buffer.from(expected))) return;
  const a = actual.toString().split("\n");
  const e = expected.toString().split("\n");
  const at = e.findIndex((line, i) => line !== a[i]);
  const i = at < 0 ? e.length : at;
  expect({ lines: a.length, at: i, line: a[i] }).toEqual({ lines: e.length, at: i, line: e[i] });
  throw new Error("same lines as text, other bytes");
}

/** A key and a certificate for 127.0.0.1, signed by itself, as three files; needs openssl. */
export async function selfSigned(): Promise<{ cert: string; key: string; both: string }> {
  const folder = await tempFolder();
  const file = {
    cert: join(folder, "cert.pem"),
    key: join(folder, "key.pem"),
    both: join(folder, "both.pem"),
  };
  const key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", file.key];
  const names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"];
  execFileSync("openssl", ["req", "-x509", ...key, ...names, "-out", file.cert], { stdio: "ignore" });
  await writeFile(file.both, (await readFile(file.cert, "utf8")) + (await readFile(file.key, "utf8")));
  return file;
}
