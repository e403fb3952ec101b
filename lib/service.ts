/**
 * The life of a script: flags, config, signals, logging, loops, exit codes. The same for all five, so that
 * each reads alike: `if (import.meta.main) await runScript(spec, main)`.
 */
import { readFileSync } from "node:fs";
import { extname, resolve } from "node:path";
import packageJson from "../package.json" with { type: "json" };
import { asUnitUser, Checks, findDangers, findLeaks } from "./check.ts";
import {
  type Config,
  ConfigError,
  configPath,
  listSecrets,
  loadConfig,
  type Section,
  secretFaults,
} from "./config.ts";
import { EXIT, errorMessage, nearest, OperatorError } from "./explain.ts";
import { runtime } from "./runtime.ts";

export { EXIT, errorMessage, OperatorError } from "./explain.ts";

/** Milliseconds. */
export const MINUTE = 60_000;
export const HOUR = 60 * MINUTE;
export const DAY = 24 * HOUR;

export const VERSION: string = packageJson.version;

/** SIGTERM and SIGINT end a script within 5 seconds, even when something in hand does not return. */
const SHUTDOWN_MS = 4_500;

export type Fields = Record<string, string | number | boolean | undefined>;

/** One line per event on stdout: time, level, constant message, fields. */
export interface Log {
  info(message: string, fields?: Fields): void;
  warn(message: string, fields?: Fields): void;
  error(message: string, fields?: Fields): void;
}

export interface Service<S extends Section> {
  config: Config[S];
  configFile: string;
  /** Flags that were given; a flag with a value has it as text, others are true. */
  flags: Record<string, string | boolean | undefined>;
  log: Log;
  /** Aborted by SIGTERM or SIGINT. */
  signal: AbortSignal;
  now: () => number;
  checks: Checks;
  /**
   * At each SIGHUP `handler` is given the config as it then is, and gives the keys that it can't take up while running.
   * A faulty config is told, also one for which `handler` throws, and the old one stays.
   */
  onReload(handler: (next: Config[S]) => string[] | Promise<string[]>): void;
}

/** What a pass is given: of a service what it works with, so that a test can make it. */
export type PassContext<S extends Section> = Pick<Service<S>, "config" | "log" | "signal" | "now">;

/** A script's own flags: name → help text; a name such as `port=N` takes a value. */
export interface ScriptSpec<S extends Section> {
  name: S;
  about: string;
  flags?: Record<string, string>;
  /** Flags that need no config: each is given its value, and gives the exit code. */
  withoutConfig?: Record<string, (value: string) => Promise<number>>;
  /** For `--check`: says to `service.checks` what only the running host can tell; `connect` with `--connect`. */
  check: (service: Service<S>, connect: boolean) => Promise<void>;
}

const COMMON_FLAGS: Record<string, string> = {
  "config=FILE": "config file (default $LOG_RT_SYNC_CONFIG, then ./config.json)",
  check: "look at the config and what it needs on this host, say so, exit; creates nothing",
  connect: "with --check: also reach the servers that the config names",
  json: "with --check: for programs",
  help: "show this text",
  version: "show the version",
};

/** Flags that say something only together with one of others. */
const COMPANIONS: Record<string, string[]> = {
  connect: ["check"],
  json: ["check", "status", "hour"],
  host: ["status"],
};

/** Of these a script does one at a time. */
const MODES = [
  ...["status", "once", "watch", "delivered", "forget", "hour", "resend"],
  ...["test-file", "verify", "test-mail", "mute", "dry-run"],
];

/** Runs a script: flags, its section of the config, `main`; exits with the number that it returns. Never returns. */
export async function runScript<S extends Section>(
  spec: ScriptSpec<S>,
  main: (service: Service<S>) => Promise<number>,
): Promise<never> {
  const log = createLog();
  const abort = new AbortController();
  for (const name of ["SIGTERM", "SIGINT"] as const) {
    process.on(name, () => {
      abort.abort(new Error(name));
      setTimeout(() => process.exit(EXIT.done), SHUTDOWN_MS).unref();
    });
  }
  for (const stream of [process.stdout, process.stderr]) stream.on("error", () => {}); // a closed pipe must not stop a shipper
  const checks = new Checks();
  let checking = false;
  try {
    const flags = parseFlags(spec, process.argv.slice(2));
    if (flags.help || flags.version) {
      process.stdout.write(flags.help ? usage(spec) : `log-rt-sync ${spec.name} ${VERSION} (${runtime})\n`);
      await end(EXIT.done);
    }
    checking = flags.check === true;
    for (const [flag, work] of Object.entries(spec.withoutConfig ?? {})) {
      if (flags[flag]) await end(await work(String(flags[flag])));
    }
    const configFile = configPath(flags.config as string | undefined);
    checks.begin(spec.name, configFile, flags.json === true);
    const dangers = findDangers(process.env);
    if (dangers.length > 0) throw new OperatorError(dangers.join("\n"));
    const config = await loadConfig(configFile, spec.name);
    const base = { config, configFile, flags, log, signal: abort.signal, now: Date.now, checks };
    const service: Service<S> = {
      ...base,
      onReload: (handler) => followReloads(service, spec.name, handler),
    };
    if (checking) await lookAround(spec, service);
    else warnOfSurroundings(spec, service);
    await end(checking ? checks.end() : await main(service));
  } catch (error) {
    if (abort.signal.aborted && error === abort.signal.reason) await end(EXIT.done); // it ended where it stood
    const isUsage = error instanceof OperatorError && error.exitCode === EXIT.usage;
    if (!checking || isUsage) await end(exitCodeOf(error, log), true);
    const { faults, exitCode } =
      error instanceof ConfigError ? error : { faults: [errorMessage(error)], exitCode: EXIT.failed };
    for (const fault of faults) checks.fault(fault, exitCode);
    await end(checks.end());
  }
  return await end(EXIT.failed);
}

/** Ends the process when all that was written is with whoever reads it, also by a slow pipe; one that failed is not kept by it. */
async function end(code: number, running = false): Promise<never> {
  if (running) setTimeout(() => process.exit(code), SHUTDOWN_MS);
  const ended = (stream: NodeJS.WriteStream) =>
    new Promise<void>((resolve) => {
      stream.once("error", () => resolve()); // whoever read it is gone
      stream.end(resolve);
    });
  await Promise.all([process.stdout, process.stderr].map(ended));
  process.exit(code);
}

/** Calls `handler` with the config that is read anew at each SIGHUP, one after the other. */
function followReloads<S extends Section>(
  { configFile, log, signal }: Service<S>,
  name: S,
  handler: (next: Config[S]) => string[] | Promise<string[]>,
): void {
  let last = Promise.resolve();
  const reload = async () => {
    if (signal.aborted) return;
    try {
      const kept = await handler(await loadConfig(configFile, name));
      log.info("config read again", { needRestart: kept.length > 0 ? kept.join(", ") : undefined });
    } catch (error) {
      log.error("config not taken up, the old one stays", { error: errorMessage(error) });
    }
  };
  process.on("SIGHUP", () => {
    last = last.then(reload);
  });
}

function exitCodeOf(error: unknown, log: Log): number {
  if (error instanceof OperatorError) {
    process.stderr.write(`${error.message}\n`);
    return error.exitCode;
  }
  log.error("stopped by an error", { error: errorMessage(error) });
  const isSystems = error instanceof Error && "path" in error; // it says itself which file is in the way
  if (error instanceof Error && error.stack && !isSystems) process.stderr.write(`${error.stack}\n`);
  return EXIT.failed;
}

function flagsOf<S extends Section>({ flags = {} }: ScriptSpec<S>): Record<string, string> {
  const status = {
    "host=HOST": "with --status: of one sender",
    json: `with --check${"hour=HOUR" in flags ? ", --hour" : ""} and --status: for programs`,
  };
  return { ...flags, ...COMMON_FLAGS, ...("status" in flags && status), ...flags };
}

/** The flags of `argv`. Throws an OperatorError on one that is not known, with the nearest that is. */
function parseFlags<S extends Section>(spec: ScriptSpec<S>, argv: string[]): Service<S>["flags"] {
  const takesValue = new Map(
    Object.keys(flagsOf(spec)).map((name) => [name.split("=")[0] ?? "", name.includes("=")]),
  );
  const refuse = (reason: string) =>
    new OperatorError(`${reason}\nAll flags: ${commandOf(spec.name)} --help`, EXIT.usage);
  const values: Record<string, string | true> = {};
  const rest = [...argv];
  for (let arg = rest.shift(); arg !== undefined; arg = rest.shift()) {
    const [, flag = "", inline] = /^--([^=]+)(?:=(.*))?$/s.exec(arg === "-h" ? "--help" : arg) ?? [];
    if (!takesValue.has(flag)) {
      const meant = nearest(flag || arg.replace(/^-+/, ""), [...takesValue.keys()]);
      throw refuse(`${arg}: no such flag${meant ? `; did you mean --${meant}?` : ""}`);
    }
    if (!takesValue.get(flag)) {
      if (inline !== undefined) throw refuse(`--${flag} takes no value`);
      values[flag] = true;
      continue;
    }
    const value = inline ?? (rest[0]?.startsWith("-") ? undefined : rest.shift());
    if (!value) throw refuse(`--${flag} needs a value`);
    values[flag] = value;
  }
  if (values.help || values.version) return values;
  const modes = MODES.filter((mode) => values[mode]).map((mode) => `--${mode}`);
  if (modes.length > 1) throw refuse(`${modes.join(" and ")} don't go together`);
  for (const [flag, others] of Object.entries(COMPANIONS)) {
    const fitting = others.filter((other) => takesValue.has(other));
    if (values[flag] && !fitting.some((other) => values[other]))
      throw refuse(`--${flag} goes with ${fitting.map((other) => `--${other}`).join(" or ")}`);
  }
  return values;
}

/** What is typed to start a script, as the one that runs is installed: a command, or a script of a checkout. */
export function commandOf(name: Section): string {
  const [, script = ""] = process.argv;
  if (isExecutable(script) || script.startsWith("/usr/lib/log-rt-sync-")) return `log-rt-sync-${name}`;
  if (script.startsWith("/opt/log-rt-sync/")) return `log-rt-sync ${name}`;
  return `bun run ${name}${extname(script) || ".ts"}`;
}

/** Where Bun keeps the script within an executable that was made of it. */
function isExecutable(script: string): boolean {
  return script.startsWith("/$bunfs/");
}

function usage<S extends Section>(spec: ScriptSpec<S>): string {
  const flags = flagsOf(spec);
  const width = Math.max(...Object.keys(flags).map((flag) => flag.length));
  const rows = Object.entries(flags).map(
    ([flag, text]) => `  --${flag.replace("=", " ").padEnd(width)}  ${text}\n`,
  );
  return `Usage: ${commandOf(spec.name)} [flags]\n\n${spec.about}\n\nFlags:\n${rows.join("")}`;
}

// ---- --check

async function lookAround<S extends Section>(spec: ScriptSpec<S>, service: Service<S>): Promise<void> {
  const { checks, config, configFile, now, flags } = service;
  checks.ok(`config: the section "${spec.name}" of ${configFile}`);
  if (process.getuid?.() === 0) {
    const [program = "", script = ""] = process.argv;
    const start = isExecutable(script) ? [process.execPath] : [program, ...process.execArgv, "run", script];
    const given = Object.entries<unknown>({ ...flags, config: resolve(configFile) });
    const args = given.flatMap(([flag, value]) => [`--${flag}`, ...(value === true ? [] : [String(value)])]);
    const command = asUnitUser(spec.name, readFileSync("/etc/passwd", "utf8"), [...start, ...args]);
    const copies = " (a secret that root alone may read is no fault there: the unit is given a copy)";
    const note = listSecrets(config).some(({ ref }) => "file" in ref) ? copies : "";
    if (command)
      checks.warn(`this is root, who may do more than the unit's user; as that one${note}: ${command}`);
  }
  const { zone, warning } = findZone(now());
  checks.ok(`time zone: ${zone}`);
  for (const text of [warning ?? [], findLeaks(spec.name, config, configFile)].flat()) checks.warn(text);
  for (const { key, ref } of listSecrets(config)) {
    const faults = secretFaults(spec.name, { [key]: ref });
    for (const fault of faults) checks.fault(fault, EXIT.failed);
    if (faults.length === 0) checks.ok(`${spec.name}.${key}: a secret that can be read`);
  }
  await spec.check(service, flags.connect === true);
}

/** Whoever only asks (`--status` and the like) is spared of what the running script has told. */
function warnOfSurroundings<S extends Section>(spec: ScriptSpec<S>, service: Service<S>): void {
  const { config, configFile, flags, log, now } = service;
  if (Object.keys(flags).some((flag) => !["config", "once", "watch", "port"].includes(flag))) return;
  const { warning } = findZone(now());
  for (const text of [warning ?? [], findLeaks(spec.name, config, configFile)].flat())
    log.warn("config", { warning: text });
}

/** The zone that times are told in, and a warning when $TZ is one that the runtime does not know. */
function findZone(now: number): { zone: string; warning: string | undefined } {
  const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
  const east = localZone(now);
  const wanted = (process.env.TZ ?? "").replace(/^:/, "").replace(/^\/usr\/share\/zoneinfo\//, "");
  const isUtc = /^(Etc\/)?(UTC|UCT|GMT|Zulu|Universal|Greenwich)([+-]?0)?$/i.test(wanted);
  const unknown = wanted !== "" && timeZone === "UTC" && east === 0 && !isUtc;
  const warning = `TZ=${wanted} is not known to ${runtime}: times are told in UTC; set a name such as Asia/Kolkata`;
  return { zone: `${timeZone} (${formatZone(east)})`, warning: unknown ? warning : undefined };
}

// ---- log

export function createLog(write: (line: string) => void = (line) => process.stdout.write(line)): Log {
  const at = (level: string) => (message: string, fields?: Fields) =>
    write(`${new Date().toISOString()} ${level} ${message}${formatFields(fields)}\n`);
  return { info: at("info"), warn: at("warn"), error: at("error") };
}

/** Signs that a terminal acts upon though JSON has them as they are: DEL, C1 controls, and those that turn the writing direction. */
const CONTROLS = /[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g;

/** ` name=value …`; a value with spaces, quotes or control characters is quoted, so that a line stays one line. */
function formatFields(fields: Fields = {}): string {
  let text = "";
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined) continue;
    const plain = String(value);
    const isPlain = /^[^\s"=\x00-\x1f]+$/.test(plain) && plain.search(CONTROLS) < 0;
    const code = (sign: string) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`;
    text += ` ${name}=${isPlain ? plain : JSON.stringify(plain).replace(CONTROLS, code)}`;
  }
  return text;
}

/** How often a fault that lasts is told again. */
const FAULT_AGAIN_MS = 600_000;

/** Tells faults that last, by `key` (a path, a host): the first time, then every ten minutes, and once when it is over, with the count. */
export function createFaultLog(log: Log, now: () => number = Date.now) {
  const open = new Map<string, { count: number; since: number; told: number }>();
  return {
    failed(key: string, message: string, fields?: Fields): void {
      const fault = open.get(key) ?? { count: 0, since: now(), told: Number.NEGATIVE_INFINITY };
      fault.count++;
      if (now() - fault.told >= FAULT_AGAIN_MS) {
        log.warn(message, { ...fields, ...(fault.count > 1 && { times: fault.count }) });
        fault.told = now();
      }
      open.set(key, fault);
    },
    lasting: () => open.size,
    recovered(key: string, message: string, fields?: Fields): void {
      const fault = open.get(key);
      if (!fault) return;
      open.delete(key);
      log.info(message, {
        ...fields,
        failures: fault.count,
        seconds: Math.round((now() - fault.since) / 1000),
      });
    },
  };
}
export type FaultLog = ReturnType<typeof createFaultLog>;

/** Waits `ms`, or less when the signal is aborted; never throws. */
export function wait(ms: number, signal?: AbortSignal): Promise<void> {
  if (signal?.aborted || ms <= 0) return Promise.resolve();
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal?.addEventListener("abort", done, { once: true });
  });
}

/** Something that one loop waits for and events ring; a ring while nobody waits is not lost. */
export class Wakeup {
  #rung = new AbortController();

  ring(): void {
    this.#rung.abort();
  }

  async wait(ms: number, signal: AbortSignal): Promise<void> {
    await wait(ms, AbortSignal.any([this.#rung.signal, signal]));
    this.#rung = new AbortController();
  }
}

/** Waiting time before try number `attempt` (from 1): doubles from `min` to `max`, with jitter of one half. */
export function retryDelay(attempt: number, { min = 500, max = 30_000 } = {}): number {
  const full = Math.min(max, min * 2 ** Math.min(attempt - 1, 30));
  return full / 2 + Math.random() * (full / 2);
}

/** Calls `pass` every `everyMs` until the signal is aborted. What `pass` throws ends the loop. */
export async function loop(
  pass: () => Promise<unknown>,
  { everyMs, signal }: { everyMs: number; signal: AbortSignal },
): Promise<void> {
  while (!signal.aborted) {
    await pass();
    await wait(everyMs, signal);
  }
}

/** `1.5 MiB`, for people. */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit++;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${units[unit]}`;
}

/** `2h 5m`, for people; seconds below a minute. */
export function formatDuration(ms: number): string {
  const seconds = Math.round(ms / 1000);
  if (seconds < 60) return `${seconds}s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes}m ${seconds % 60}s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours}h ${minutes % 60}m` : `${Math.floor(hours / 24)}d ${hours % 24}h`;
}

/** `2026-11-22 06:45:01`, this machine's wall clock. */
export function formatLocalTime(ms: number): string {
  const wall = new Date(ms + localZone(ms) * MINUTE);
  return wall.toISOString().slice(0, 19).replace("T", " ");
}

export function localZone(ms: number): number {
  return -new Date(ms).getTimezoneOffset();
}

export function formatZone(minutes: number): string {
  const two = (n: number) => String(Math.trunc(n)).padStart(2, "0");
  const east = Math.abs(minutes);
  return `${minutes < 0 ? "-" : "+"}${two(east / 60)}:${two(east % 60)}`;
}

/** A line on the terminal that is written over: `label 42 % 12.0 MiB/s 3s left`; nothing on no terminal. In bytes. */
export function createProgress(label: string, total: number) {
  const started = Date.now();
  let last = 0;
  return {
    show(done: number): void {
      if (!process.stdout.isTTY || Date.now() - last < 200) return;
      last = Date.now();
      const rate = (done / Math.max(1, last - started)) * 1000;
      const left = rate > 0 ? formatDuration(((total - done) / rate) * 1000) : "?";
      const percent = Math.floor((100 * done) / Math.max(1, total));
      process.stdout.write(`\r\x1b[K${label} ${percent} % ${formatBytes(rate)}/s ${left} left`);
    },
    end(): void {
      if (process.stdout.isTTY && last > 0) process.stdout.write("\r\x1b[K");
    },
  };
}
