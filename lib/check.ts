/**
 * What `--check` says, and what every script looks at of its surroundings: variables that switch a protection off,
 * secrets that others may read or that can be guessed. Nothing is created.
 */
import { statSync } from "node:fs";
import { access, constants, readdir, stat, statfs } from "node:fs/promises";
import { dirname, relative, resolve } from "node:path";
import { type Config, listSecrets, readSecret, type Section } from "./config.ts";
import { EXIT, errorMessage, nearest } from "./explain.ts";

/** What `--check` says: each step as a line `ok`, `warn` or `FAULT`, or all as JSON. Nothing is said twice. */
export class Checks {
  #script = "";
  #file = "";
  #json = false;
  #code = 0;
  readonly #said = new Map<string, string>();

  begin(script: string, configFile: string, json: boolean): void {
    this.#script = script;
    this.#file = configFile;
    this.#json = json;
  }

  ok(text: string): void {
    this.#say("ok", text);
  }

  warn(text: string): void {
    this.#say("warn", text);
  }

  /** `code` is 78 for what stands in the config, 1 for what it names and can't be had. */
  fault(text: string, code: number = EXIT.config): void {
    this.#code = Math.max(this.#code, code);
    this.#say("fault", text.startsWith(`${this.#file}: `) ? text : `${this.#file}: ${text}`);
  }

  get faulty(): boolean {
    return this.#code !== 0;
  }

  /** Whether servers are to be asked: by `--connect`, and not when what a login needs is at fault so far. */
  asks(connect: boolean): boolean {
    if (connect && this.faulty) this.warn("no server is asked before the faults above are mended");
    return connect && !this.faulty;
  }

  /** Does `work` and says `name` with what it gives; what it throws is a fault of what the config names. */
  async step(name: string, work: () => unknown): Promise<void> {
    try {
      const found = await work();
      this.ok(typeof found === "string" ? `${name}: ${found}` : name);
    } catch (error) {
      this.fault(`${name}: ${errorMessage(error)}`, EXIT.failed);
    }
  }

  /**
   * A folder: `read` and `write` want it to be there; `make` is content with one that it can be made in, and warns when
   * a name beside it is so near that it may be a slip.
   */
  async folder(key: string, dir: string, need: "read" | "write" | "make"): Promise<void> {
    const can = need === "read" ? "read" : "written";
    await this.step(`${key}: ${dir}`, async () => {
      const wanted = resolve(dir);
      const missing = await whatIsMissing(wanted);
      const there = missing?.in ?? wanted;
      if (missing && need !== "make")
        throw new Error(`expected a folder that can be ${can}; ${missing.text}`);
      if (!(await stat(there)).isDirectory()) throw new Error(`${there} is no folder`);
      const { W_OK, R_OK, X_OK } = constants;
      await access(there, X_OK | (need === "read" ? R_OK : W_OK)).catch(
        refuse(`a folder that can be ${can}`),
      );
      const { bavail, blocks, bsize } = await statfs(there);
      if (need !== "read" && blocks === 0) throw new Error(`${there} is no place for files`); // /proc takes no folder, also of root
      const free = need === "read" ? "" : `, ${((bavail * bsize) / 2 ** 30).toFixed(1)} GiB free`;
      if (missing?.nearest)
        this.warn(`${key}: ${dir}: ${missing.text}; it will be made when that is no slip`);
      return `${missing ? "will be made" : `can be ${can}`}${free}`;
    });
  }

  /** A file that must be readable. Of one that is not there it says what is in its place. */
  async file(key: string, path: string | undefined): Promise<void> {
    if (path === undefined) return;
    await this.step(`${key}: ${path}`, async () => {
      const missing = await whatIsMissing(path);
      if (missing) throw new Error(missing.text);
      await access(path, constants.R_OK).catch(refuse("a file that can be read"));
      return "can be read";
    });
  }

  #say(level: "ok" | "warn" | "fault", text: string): void {
    const line = text.replaceAll("\n", " ");
    if (this.#said.has(line)) return;
    this.#said.set(line, level);
    if (!this.#json) process.stdout.write(`${(level === "fault" ? "FAULT" : level).padEnd(5)} ${line}\n`);
  }

  /** The last word; gives the exit code. */
  end(): number {
    const faults = [...this.#said.values()].filter((level) => level === "fault").length;
    const ending = faults === 0 ? "ok" : `${faults} ${faults === 1 ? "fault" : "faults"}`;
    const checks = [...this.#said].map(([text, level]) => ({ level, text }));
    const all = { script: this.#script, config: this.#file, ok: faults === 0, checks };
    process.stdout.write(
      this.#json ? `${JSON.stringify(all, null, 2)}\n` : `${this.#file}: ${this.#script}: ${ending}\n`,
    );
    return this.#code;
  }
}

function refuse(expected: string) {
  return (error: NodeJS.ErrnoException) => {
    throw new Error(`expected ${expected} (${error.code}); this is user ${process.getuid?.()}`);
  };
}

function ifAbsent(error: NodeJS.ErrnoException): undefined {
  if (error.code !== "ENOENT" && error.code !== "ENOTDIR") throw error;
}

/** Names of a folder that are shown when none is near the one that is missing. */
const SHOWN_NAMES = 5;

/**
 * Of a path that is not there, which part is missing and in which folder: `"acces.log" is not in /var/log/nginx, where
 * "access.log" is`, else what there is beside it. Undefined when it is there; throws when a folder may not be looked into.
 */
export async function whatIsMissing(
  path: string,
): Promise<{ in: string; text: string; nearest: string | undefined } | undefined> {
  const wanted = resolve(path);
  let there = wanted;
  while (!(await stat(there).catch(ifAbsent)) && there !== dirname(there)) there = dirname(there);
  if (there === wanted) return undefined;
  const missing = relative(there, wanted).split("/")[0] ?? "";
  const names = (await readdir(there).catch(() => [])).filter((name) => !name.startsWith("."));
  const meant = nearest(missing, names);
  const more = names.length > SHOWN_NAMES ? ", …" : "";
  const beside = names.length > 0 ? `; there is ${names.sort().slice(0, SHOWN_NAMES).join(", ")}${more}` : "";
  const text = `"${missing}" is not in ${there}${meant ? `, where "${meant}" is` : beside}`;
  return { in: there, text, nearest: meant };
}

// ---- surroundings

/** A token that can be guessed: fewer signs than 96 bits in base64. */
const SHORT_TOKEN = 16;

/** Variables with which the runtime or a library drops a protection, and the values with which they do. */
const DANGEROUS: [name: string, value: RegExp, what: string][] = [
  ["NODE_TLS_REJECT_UNAUTHORIZED", /^0$/, "certificates would not be checked"],
  ["BUN_CONFIG_VERBOSE_FETCH", /^(?!0$|false$|$)/, "tokens would be printed"],
  ["SSLKEYLOGFILE", /./, "keys of connections would be written to a file"],
];

/** One fault for each variable that switches a protection off: no script starts with one. */
export function findDangers(env: NodeJS.ProcessEnv): string[] {
  return DANGEROUS.filter(([name, value]) => value.test(env[name] ?? "")).map(
    ([name, , what]) => `the variable ${name} is set, with which ${what}: take it out of the environment`,
  );
}

/** What works, and should not stay so: a config or secret that others may read, a token that is too short. */
export function findLeaks<S extends Section>(section: S, config: Config[S], configFile: string): string[] {
  const leaks = isReadByOthers(configFile) ? [`others may read ${configFile}; chmod 640 it`] : [];
  for (const { key, ref } of listSecrets(config)) {
    if ("file" in ref && isReadByOthers(ref.file))
      leaks.push(`${section}.${key}: others may read ${ref.file}; chmod 640 it`);
    if (/token/i.test(key) && lengthOf(ref) < SHORT_TOKEN)
      leaks.push(
        `${section}.${key}: shorter than ${SHORT_TOKEN} characters; make one with: openssl rand -base64 32`,
      );
  }
  return leaks;
}

/**
 * For `--check` by root, who may read and write everything: the command that looks as the unit's user, by `passwd`
 * (the content of /etc/passwd). Undefined on a host without that user.
 */
export function asUnitUser(section: Section, passwd: string, command: string[]): string | undefined {
  const user = `log-rt-sync-${section}`; // as in deploy/systemd
  const groups = section === "shipper" ? ["-g", user, "-G", "adm"] : ["-g", "log-rt-sync"];
  if (!passwd.split("\n").some((line) => line.startsWith(`${user}:`))) return undefined;
  const quoted = command.map((word) =>
    /^[\w./:=@-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`,
  );
  return ["runuser", "-u", user, ...groups, "--", ...quoted].join(" ");
}

function lengthOf(ref: Parameters<typeof readSecret>[0]): number {
  try {
    return readSecret(ref).length;
  } catch {
    return Number.POSITIVE_INFINITY; // told as a fault
  }
}

function isReadByOthers(file: string): boolean {
  return ((statSync(file, { throwIfNoEntry: false })?.mode ?? 0) & 0o004) !== 0;
}
