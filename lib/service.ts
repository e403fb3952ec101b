/**
 * The life of a script: flags, config, signals, logging, loops, exit codes. The same for all five, so that
 * each reads alike: `if (import.meta.main) await runScript(spec, main)`.
 */
import { parseArgs } from "node:util";
import packageJson from "../package.json" with { type: "json" };
import { type Config, ConfigError, configPath, loadConfig, type Section } from "./config.ts";
import { runtime, waitAtOnce } from "./runtime.ts";

/** Exit codes that people script against. */
export const EXIT = { done: 0, failed: 1, usage: 2, config: 78 } as const;

/** The version of the project, from package.json. */
export const VERSION: string = packageJson.version;

/** SIGTERM and SIGINT end a script within 5 seconds, even when something in hand does not return. */
const SHUTDOWN_MS = 4_500;

/** Something that the operator can mend: told in one line, without a stack. Exit code 1. */
export class OperatorError extends Error {
  override name = "OperatorError";
}

/** A flag whose value fits nothing: told in one line. Exit code 2. */
export class UsageError extends Error {
  override name = "UsageError";
}

export type Fields = Record<string, string | number | boolean | undefined>;

/** One line per event on stdout: time, level, constant message, fields. */
export interface Log {
  info(message: string, fields?: Fields): void;
  warn(message: string, fields?: Fields): void;
  error(message: string, fields?: Fields): void;
}

/** What a script's `main` and passes are given. */
export interface Service<S extends Section> {
  config: Config[S];
  /** Path of the config file, for messages. */
  configFile: string;
  /** Flags that were given; a flag with a value has it as text, others are true. */
  flags: Record<string, string | boolean | undefined>;
  log: Log;
  /** Aborted by SIGTERM or SIGINT. */
  signal: AbortSignal;
  now: () => number;
}

/** A script's own flags: name → help text; a name such as `port=N` takes a value. */
export interface ScriptSpec<S extends Section> {
  name: S;
  about: string;
  flags?: Record<string, string>;
  /** Flags that need no config: each is given its value, and gives the exit code. */
  withoutConfig?: Record<string, (value: string) => Promise<number>>;
  /** How many system calls may wait at once, where the runtime's own number is too small. */
  callsAtOnce?: number;
  /** For `--check`: what only the running host can tell, one line per fault; `connect` with `--connect`. */
  check?: (service: Service<S>, connect: boolean) => Promise<string[]>;
}

const COMMON_FLAGS: Record<string, string> = {
  "config=FILE": "config file (default $LOG_RT_SYNC_CONFIG, then ./config.json)",
  check: "validate the config and what it needs on this host, say so, exit",
  connect: "with --check: also reach the servers that the config names",
  help: "show this text",
  version: "show the version",
};

/**
 * Runs a script: parses the flags, loads its section of the config, calls `main` and exits with the number
 * that it returns. Never returns.
 */
export async function runScript<S extends Section>(
  spec: ScriptSpec<S>,
  main: (service: Service<S>) => Promise<number>,
): Promise<never> {
  if (spec.callsAtOnce !== undefined) await waitAtOnce(spec.callsAtOnce);
  const log = createLog();
  const abort = new AbortController();
  for (const name of ["SIGTERM", "SIGINT"] as const) {
    process.on(name, () => {
      abort.abort(new Error(name));
      setTimeout(() => process.exit(EXIT.done), SHUTDOWN_MS).unref();
    });
  }
  process.stdout.on("error", () => {}); // a closed pipe must not stop a shipper
  try {
    const flags = parseFlags(spec, process.argv.slice(2));
    for (const [flag, work] of Object.entries(spec.withoutConfig ?? {})) {
      if (flags[flag]) process.exit(await work(String(flags[flag])));
    }
    const configFile = configPath(flags.config as string | undefined);
    const config = await loadConfig(configFile, spec.name);
    const service = { config, configFile, flags, log, signal: abort.signal, now: Date.now };
    process.exit(flags.check ? await checkHost(spec, service) : await main(service));
  } catch (error) {
    process.exit(explain(error, log));
  }
}

/** Says what ended the script and gives the exit code for it. */
function explain(error: unknown, log: Log): number {
  if (error instanceof ExitNow) {
    (error.code === EXIT.done ? process.stdout : process.stderr).write(error.message);
    return error.code;
  }
  if (error instanceof ConfigError) {
    process.stderr.write(`${error.message}\n`);
    return EXIT.config;
  }
  if (error instanceof UsageError) {
    process.stderr.write(`${error.message}\n`);
    return EXIT.usage;
  }
  if (error instanceof OperatorError) {
    process.stderr.write(`${error.message}\n`);
    return EXIT.failed;
  }
  log.error("stopped by an error", { error: errorMessage(error) });
  if (error instanceof Error && error.stack) process.stderr.write(`${error.stack}\n`);
  return EXIT.failed;
}

class ExitNow extends Error {
  readonly code: number;
  constructor(code: number, text: string) {
    super(text);
    this.code = code;
  }
}

/** The flags of `argv`. Ends with usage and exit code 2 on one that is not known. */
function parseFlags<S extends Section>(spec: ScriptSpec<S>, argv: string[]): Service<S>["flags"] {
  const known = { ...spec.flags, ...COMMON_FLAGS };
  const options: Record<string, { type: "string" | "boolean" }> = {};
  for (const name of Object.keys(known)) {
    const [flag = name, value] = name.split("=");
    options[flag] = { type: value ? "string" : "boolean" };
  }
  let values: Service<S>["flags"];
  try {
    values = parseArgs({ args: argv, options, strict: true }).values;
    const empty = Object.keys(values).find((flag) => values[flag] === "");
    if (empty) throw new Error(`Option '--${empty}' needs a value`);
  } catch (error) {
    const reason = (error as Error).message.split(". ")[0];
    throw new ExitNow(EXIT.usage, `${reason}\n\n${usage(spec.name, spec.about, known)}`);
  }
  if (values.help) throw new ExitNow(EXIT.done, usage(spec.name, spec.about, known));
  if (values.version) throw new ExitNow(EXIT.done, `log-rt-sync ${spec.name} ${VERSION} (${runtime})\n`);
  return values;
}

function usage(name: string, about: string, flags: Record<string, string>): string {
  const width = Math.max(...Object.keys(flags).map((flag) => flag.length));
  const rows = Object.entries(flags).map(
    ([flag, text]) => `  --${flag.replace("=", " ").padEnd(width)}  ${text}\n`,
  );
  return `Usage: bun run ${name}.ts [flags]\n\n${about}\n\nFlags:\n${rows.join("")}`;
}

async function checkHost<S extends Section>(spec: ScriptSpec<S>, service: Service<S>): Promise<number> {
  const faults = (await spec.check?.(service, service.flags.connect === true)) ?? [];
  if (faults.length > 0) throw new ConfigError(faults.map((fault) => `${service.configFile}: ${fault}`));
  process.stdout.write(`${service.configFile}: ${spec.name}: ok\n`);
  return EXIT.done;
}

/** A log that writes lines to `write`, by default stdout. */
export function createLog(write: (line: string) => void = (line) => process.stdout.write(line)): Log {
  const at = (level: string) => (message: string, fields?: Fields) =>
    write(`${new Date().toISOString()} ${level} ${message}${formatFields(fields)}\n`);
  return { info: at("info"), warn: at("warn"), error: at("error") };
}

/** ` name=value …`; a value with spaces, quotes or control characters is quoted, so that a line stays one line. */
function formatFields(fields: Fields = {}): string {
  let text = "";
  for (const [name, value] of Object.entries(fields)) {
    if (value === undefined) continue;
    const plain = String(value);
    text += ` ${name}=${/^[^\s"=\x00-\x1f\x7f]+$/.test(plain) ? plain : JSON.stringify(plain)}`;
  }
  return text;
}

/** The text of an error with its causes, in one line. */
export function errorMessage(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const text = error.message || (error as NodeJS.ErrnoException).code || error.name;
  return error.cause === undefined ? text : `${text}: ${errorMessage(error.cause)}`;
}

/** How often a fault that lasts is told again. */
const FAULT_AGAIN_MS = 600_000;

/**
 * Tells faults that last: the first time, then every ten minutes, and once when it is over, with the count.
 * `key` names the fault (for example a path or a host).
 */
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
    /** How many faults last. */
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

/**
 * A line on the terminal that is written over: `label 42 % 12.0 MiB/s 3s left`. Writes nothing when stdout is
 * no terminal. `total` and the values given to `show` are bytes.
 */
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
