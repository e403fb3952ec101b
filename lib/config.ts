/**
 * The config: one JSON file for all five scripts, each reads its own section. Schema and defaults stand here
 * and nowhere else; `bun run lib/config.ts` prints config.schema.json from it for editors.
 */
import { readFileSync, statSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { hostname, userInfo } from "node:os";
import { relative, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { FAILED, SENT } from "./batch.ts";
import {
  EXIT,
  explainIssue,
  explainJson,
  explainRepeated,
  OperatorError,
  type SchemaNode,
  unknownKey,
} from "./explain.ts";
import { addressIsValid, isLoopback, overlaps, parseHost, senderIsValid } from "./host.ts";

const secret = z
  .union([
    z.strictObject({ env: z.string().regex(/^[A-Za-z_][A-Za-z0-9_]*$/, "expected the name of a variable") }),
    z.strictObject({ file: z.string().min(1) }),
  ])
  .describe('A secret: {"env": "NAME"} or {"file": "/path"}, never the value itself');

const oneOrMore = <T extends z.ZodType>(one: T) =>
  z
    .union([one, z.array(one).min(1)])
    .transform((found) => (Array.isArray(found) ? found : [found]) as z.output<T>[]);

/** One secret or several that are valid together: the old and the new one, while a fleet changes over. */
const secrets = oneOrMore(secret).describe("A secret, or a list of secrets that are valid together");

const path = z.string().min(1, "expected a path");
const minutes = z.number().positive();
/** A timer can't wait for more than 24 days: it would fire at once, again and again. */
const LONGEST_SECONDS = 1_000_000;
const seconds = z.number().positive().max(LONGEST_SECONDS);
const zeroOrMore = z.number().nonnegative().max(LONGEST_SECONDS);
const percent = z.number().min(0).max(100);
const report = path.default("/var/lib/log-rt-sync/linecount-report.log");
const positiveInt = z.number().int().positive();
const host = z
  .string()
  .refine((text) => parseHost(text) !== undefined, "expected an IP address or a host name")
  .transform((text) => parseHost(text) ?? text);
const httpUrl = z.url({ protocol: /^https?$/, error: "expected http://HOST[:PORT] or https://…" });
/** Also of a host without a domain, as root@localhost. */
const address = z.string().regex(/^[^\s@<>(),:;"\\[\]]+@[^\s@<>(),:;"\\[\]]+$/, "expected an email address");
const schedule = z.string().regex(/^(\S+\s+){4,5}\S+$/, "expected a cron expression such as */10 * * * *");

const shipper = z.strictObject({
  files: z.array(path).min(1).describe("Log files to follow: paths and globs"),
  receiver: httpUrl
    .refine((text) => !/\/(upload|streams)\/?$/.test(text), "expected no path such as /upload behind it")
    .describe("The receiver: http://HOST:PORT or https://HOST:PORT"),
  host: host
    .prefault(() => hostname().toLowerCase())
    .describe("The name of this sender; default: the host name"),
  token: secret.optional().describe("Bearer token shown to the receiver"),
  ca: path
    .optional()
    .describe("PEM file of the CA that signed the receiver's certificate; default: the system's CAs"),
  cert: path.optional().describe("PEM file of a client certificate"),
  key: path.optional().describe("PEM file of the client certificate's key"),
  stateDir: path.default("/var/lib/log-rt-sync/shipper").describe("Folder for the cursor"),
  olddir: path.optional().describe("logrotate's olddir, when rotated files go to another folder"),
  skip: z
    .array(z.array(z.string().min(1)).min(1))
    .default([])
    .describe("Lines to leave out: a line that contains every text of one of the lists"),
  startAt: z
    .enum(["beginning", "end"])
    .default("beginning")
    .describe("Where the very first start begins in a live file"),
  compression: z.enum(["zstd", "gzip", "none"]).default("zstd").describe("Encoding of chunks on the way"),
  chunkBytes: z
    .number()
    .int()
    .min(4096)
    .max(64 * 1024 * 1024)
    .default(1_048_576)
    .describe("Largest chunk, in bytes of the log"),
  flushMs: zeroOrMore.default(100).describe("Under steady traffic one request per this many ms"),
  inFlight: positiveInt.max(64).default(4).describe("Chunks of one file on their way at once"),
  pollSeconds: seconds.default(5).describe("How often files are looked at when no event tells of a change"),
  rotateWaitSeconds: zeroOrMore
    .default(5)
    .describe("A rotated file is finished when it was quiet for so long"),
  heartbeatSeconds: seconds.default(60).describe("A sign of life when there is nothing to ship"),
  timeoutSeconds: seconds
    .default(30)
    .describe("How long the receiver may take to answer one chunk; up to a minute where the link is slower"),
  proxy: httpUrl
    .optional()
    .describe("HTTP proxy on the way to the receiver; those of the environment are not used"),
});

const group = z.strictObject({
  port: z.number().int().min(0).max(65_535).describe("TCP port of this group"),
  senders: z
    .array(z.string().refine(senderIsValid, 'expected "*", an address, a CIDR range or a host name'))
    .min(1)
    .describe('Who belongs to it: addresses, CIDR ranges, host names, or "*"'),
});

const receiver = z
  .strictObject({
    listen: z
      .string()
      .refine((text) => parseHost(text) !== undefined, {
        error: "expected an address of this machine, or 0.0.0.0",
        abort: true,
      })
      .default("127.0.0.1")
      .describe("Address to listen on"),
    groups: z.array(group).min(1).describe("Ports, and the senders that each serves"),
    dir: path.describe("Folder of the batches, one per sender"),
    prefix: z
      .string()
      .regex(/^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$/, "expected letters, digits, _ and -")
      .default("accessLog")
      .describe("First part of every batch's name"),
    windowMinutes: positiveInt
      .max(60)
      .refine((n) => 60 % n === 0, "expected a divisor of 60")
      .default(20)
      .describe("Length of a batch's window"),
    sealAfterSeconds: zeroOrMore
      .default(120)
      .describe("A batch is sealed when its window is over and no line came for so long"),
    sealLatestSeconds: seconds
      .default(900)
      .describe("A batch is sealed at the latest so long after its window and its first line"),
    logFormat: oneOrMore(z.string().min(1))
      .optional()
      .describe("nginx's log_format, as it stands in nginx.conf, or a list of them: where a line's time is"),
    timestampPattern: z
      .string()
      .refine(patternIsValid, "expected a regular expression with the timestamp as its first group")
      .optional()
      .describe("Deprecated, use logFormat: a regular expression, the timestamp in group 1"),
    maxBodyBytes: positiveInt.default(16_777_216).describe("Largest body, before and after decompression"),
    maxBytesInFlight: positiveInt.default(67_108_864).describe("Bodies in memory at once; beyond it 503"),
    maxRequests: positiveInt.default(512).describe("Requests in hand at once; beyond it 503"),
    maxHosts: positiveInt.default(10_000).describe("Senders known at once; a further one gets 503"),
    maxStreamsPerHost: positiveInt
      .default(20_000)
      .describe("Files of one sender known at once; a further one gets 503"),
    maxWindowsPerHost: positiveInt
      .default(1000)
      .describe("Open batches of one sender; beyond it the one longest without a line is sealed"),
    maxNamesPerHour: positiveInt
      .default(2000)
      .describe("New batches of one sender in an hour; beyond it 503"),
    idleTimeoutSeconds: seconds
      .max(255)
      .default(30)
      .describe("A connection without a byte for so long is closed"),
    forgetAfterDays: minutes.default(30).describe("Streams and windows are forgotten after so long"),
    tls: z
      .strictObject({
        cert: path.describe("PEM file of the certificate chain"),
        key: path.describe("PEM file of its key"),
        clientCa: path.optional().describe("PEM file; clients must show a certificate signed by it"),
        clientName: z.boolean().default(false).describe("A client certificate's name must be its Log-Host"),
      })
      .optional(),
    tokens: z
      .record(z.union([z.literal("*"), host]), secrets)
      .optional()
      .describe(
        'Bearer token per sender, or a list of them; "*" is for the senders that have none of their own',
      ),
    viewToken: secret.optional().describe('Token for the status page and the metrics; default: tokens."*"'),
    trustedProxies: z
      .array(z.string().refine(addressIsValid, "expected an address or a CIDR range"))
      .default([])
      .describe("Proxies whose X-Forwarded-For is believed"),
    legacy: z
      .boolean()
      .default(false)
      .describe("Accept the original shipper's JSON form from listed addresses"),
  })
  .superRefine((config, context) => {
    checkGroups(config.groups, context);
    const anyone = config.groups
      .flatMap(({ senders }) => senders)
      .find((sender) => /^\*$|\/0+$/.test(sender));
    if (!isLoopback(config.listen) && !config.tokens && anyone) {
      const what = `${config.listen} is not loopback and senders has "${anyone}"`;
      addFault(context, ["tokens"], `anyone could write here: ${what}; set tokens, or list the senders`);
    }
  });

const target = z
  .url({
    protocol: /^(sftp|file)$/,
    error: "expected sftp://USER@HOST[:PORT]/FOLDER or file:///FOLDER",
    abort: true,
  })
  .refine(isDecodable, { error: "a % is written %25", abort: true })
  .refine((text) => !new URL(text).password, "a password does not belong here; set password")
  .refine((text) => !text.startsWith("sftp:") || new URL(text).username !== "", "expected sftp://USER@HOST…")
  .refine(isLocalIfFile, "expected file:///FOLDER, with three slashes");

const forwarder = z
  .strictObject({
    dir: path.describe("The receiver's folder"),
    target: target.describe("Where batches go: sftp://USER@HOST[:PORT]/FOLDER or file:///FOLDER"),
    password: secret.optional().describe("Password of the user in target"),
    privateKey: secret.optional().describe("Private key in OpenSSH or PEM form"),
    passphrase: secret.optional().describe("Passphrase of the private key"),
    agent: path.optional().describe("Socket of an SSH agent"),
    hostKey: oneOrMore(z.string())
      .refine(
        (keys) => keys.every((key) => /^SHA256:[A-Za-z0-9+/]{43}=?$/.test(key)),
        "expected SHA256:… as ssh-keygen -l prints",
      )
      .optional()
      .describe("Fingerprint of the server's host key, one or several"),
    intervalSeconds: seconds.default(60).describe("How often the queue is looked at"),
    retries: positiveInt.default(3).describe("Tries of a file before it goes to failed/"),
    retryDelaySeconds: zeroOrMore.default(5).describe("Wait between the tries of one pass"),
    parallel: positiveInt
      .max(64)
      .default(4)
      .describe("Files at a time over the one connection; in a long queue each on a channel of its own"),
    timeoutSeconds: seconds.default(30).describe("How long the server may take for one answer"),
    compress: z.enum(["none", "gzip"]).default("none").describe("gzip sends <batch>.log.gz"),
    upload: z
      .enum(["rename", "direct"])
      .default("rename")
      .describe("direct writes the final name at once, for servers that cannot rename"),
    digest: z
      .boolean()
      .default(false)
      .describe("Put a digest (sha256sum -c) beside the batches of each hour"),
    report: report.describe("One line per delivery"),
  })
  .superRefine((config, context) => {
    const [inner = ""] = relative(resolve(config.dir), resolve(localFolder(config.target) ?? "/")).split("/");
    if (inner === SENT || inner === FAILED || /^\.[^.]/.test(inner)) {
      const why = `what lies in ${inner}/ of dir is moved and deleted`;
      addFault(context, ["target"], `expected another folder than one of ours: ${why}`);
    }
    if (config.target.startsWith("sftp:") && !config.hostKey) {
      const { hostname: name, port } = new URL(config.target);
      const see = `ssh-keyscan -p ${port || 22} ${name} | ssh-keygen -lf -`;
      addFault(context, ["hostKey"], `missing; ask the server's owner for it, or see it with: ${see}`);
    }
    if (config.target.startsWith("sftp:") && !config.password && !config.privateKey && !config.agent)
      addFault(context, ["password"], "missing; set password, privateKey or agent");
  });

const mail = z.strictObject({
  smtp: z
    .url({
      protocol: /^(smtps?|file)$/,
      error: "expected smtp://HOST[:PORT], smtps://… or file:///FOLDER",
      abort: true,
    })
    .refine(isDecodable, { error: "a % is written %25", abort: true })
    .refine((text) => !new URL(text).password, "a password does not belong here; set mail.password")
    .refine(isLocalIfFile, "expected file:///FOLDER, with three slashes")
    .describe("Mail server: smtp://[USER@]HOST[:PORT], smtps://… or file:///FOLDER for .eml files"),
  password: secret.optional().describe("Password of the user in smtp"),
  ca: path.optional().describe("PEM file of the CA that signed the mail server's certificate"),
  tls: z
    .enum(["auto", "required"])
    .default("auto")
    .describe("required: no mail without TLS and a certificate that is trusted"),
  from: address.describe("Sender of every mail"),
  to: z.array(address).min(1).describe("Receivers of every mail"),
  subjectPrefix: z
    .string()
    .regex(/^\P{Cc}*$/u, "expected one line")
    .default("[log-rt-sync]")
    .describe("First word of every subject"),
  timeoutSeconds: seconds.default(20).describe("How long the mail server may take for one answer"),
});

const monitor = z.strictObject({
  dir: path.describe("The receiver's folder"),
  mail,
  expected: z.array(host).prefault([]).describe("Senders that must be heard from"),
  silentMinutes: minutes.default(5).describe("A sender not heard from for so long is silent"),
  silentMinutesByHost: z
    .record(host, minutes)
    .prefault({})
    .describe("A threshold of its own for some senders"),
  alertWhenQuiet: z
    .boolean()
    .default(false)
    .describe("Also alert when a shipper lives but its nginx writes nothing"),
  remindMinutes: minutes.default(240).describe("How often a lasting fault is told again"),
  summaryMinute: z.number().int().min(0).max(59).default(15).describe("Minute of the hour of the summary"),
  deliveryMinutes: minutes
    .default(30)
    .describe("A sealed batch that waits for so long is a fault of delivery"),
  minFreePercent: percent.default(10).describe("Free space of dir under which to alert"),
  receivers: z.array(httpUrl).default([]).describe("Receivers whose /healthz is asked, one URL per port"),
  report: report.describe("The forwarder's report"),
  stateFile: path
    .default("/var/lib/log-rt-sync/monitor.json")
    .describe("What was told already, so that no mail comes twice or never"),
  schedule: schedule.default("* * * * *").describe("For --watch: when to check"),
  ca: path.optional().describe("PEM file of the CA of receivers and webhook; default: the system's CAs"),
  cert: path.optional().describe("PEM file of a client certificate for receivers and webhook"),
  key: path.optional().describe("PEM file of the client certificate's key"),
  page: httpUrl.optional().describe("Address of the status page, for the mails"),
  webhook: httpUrl.optional().describe("Each mail also goes there as a JSON POST"),
  heartbeatUrl: httpUrl.optional().describe("Called after each healthy run"),
});

const housekeep = z
  .strictObject({
    dir: path.describe("The receiver's folder"),
    compressAfterHours: z.number().nonnegative().default(3).describe("Counted from the delivery"),
    deleteAfterHours: z.number().nonnegative().default(4).describe("Counted from the delivery"),
    minFreePercent: percent.default(0).describe("Under it the oldest delivered files go early; 0: never"),
    report: report.describe("The forwarder's report, trimmed"),
    reportDays: z
      .number()
      .min(8, "expected at least 8: the monitor looks back a week")
      .default(90)
      .describe("Report lines and digests are kept for so long"),
    schedule: schedule.default("*/10 * * * *").describe("For --watch: when to run"),
  })
  .refine((config) => config.compressAfterHours <= config.deleteAfterHours, {
    path: ["deleteAfterHours"],
    error: "expected no less than compressAfterHours",
  });

export const sections = { shipper, receiver, forwarder, monitor, housekeep };
export type Section = keyof typeof sections;
export type Config = { [S in Section]: z.infer<(typeof sections)[S]> };
export type SecretRef = z.infer<typeof secret>;

/**
 * Faults of the config or of what it names, one per line. Exit code 78 (EX_CONFIG of sysexits.h) for what stands in the
 * file; 1 when all of it is what the file names and can't be had now.
 */
export class ConfigError extends OperatorError {
  override name = "ConfigError";
  readonly faults: string[];
  constructor(faults: string[], exitCode: 78 | 1 = EXIT.config) {
    super(faults.join("\n"), exitCode);
    this.faults = faults;
  }
}

/** The config file: `--config`, then `$LOG_RT_SYNC_CONFIG`, then `./config.json`. */
export function configPath(flag: string | undefined): string {
  return flag ?? (process.env.LOG_RT_SYNC_CONFIG || "config.json");
}

/** Reads one section of the config file. Throws a ConfigError with every fault of it at once. */
export async function loadConfig<S extends Section>(file: string, section: S): Promise<Config[S]> {
  let text: string;
  try {
    text = await readFile(file, "utf8");
  } catch (error) {
    throw new ConfigError([`${file}: cannot be read ${whyUnreadable(file, error as NodeJS.ErrnoException)}`]);
  }
  return parseConfig(text, section, file);
}

/** Why a config file can't be read, and what to do: whose it is and who reads it when that is the reason. */
function whyUnreadable(file: string, { code }: NodeJS.ErrnoException): string {
  if (code === "ENOENT" || code === "ENOTDIR")
    return `(${code}): copy config.example.json, or name another file with --config`;
  if (code !== "EACCES" && code !== "EPERM") return `(${code})`;
  try {
    const { uid, gid, mode } = statSync(file);
    const rights = (mode & 0o777).toString(8).padStart(4, "0");
    return `(${code}): it belongs to ${nameOf("passwd", uid)}:${nameOf("group", gid)} with mode ${rights}, and is read by ${reader()}`;
  } catch {
    return `(${code}): a folder above it is closed to ${reader()}`;
  }
}

function reader(): string {
  try {
    return userInfo().username;
  } catch {
    return String(process.getuid?.()); // of no name, as in a container
  }
}

function nameOf(table: "passwd" | "group", id: number): string {
  const lines = readFileSync(`/etc/${table}`, "utf8").split("\n");
  return lines.find((line) => line.split(":")[2] === String(id))?.split(":")[0] ?? String(id);
}

/** The section of a config's text; `file` is for messages. Throws a ConfigError. */
export function parseConfig<S extends Section>(text: string, section: S, file = "config.json"): Config[S] {
  const plain = text.replace(/^\uFEFF/, ""); // some editors put a byte order mark there
  let json: unknown;
  try {
    json = JSON.parse(plain);
  } catch {
    throw new ConfigError([`${file}: is no JSON: ${explainJson(plain) ?? "it can't be read"}`]);
  }
  const repeated = explainRepeated(plain);
  if (repeated) throw new ConfigError([`${file}: ${repeated}`]);
  if (typeof json !== "object" || json === null || Array.isArray(json)) {
    throw new ConfigError([`${file}: expected an object with the section "${section}"`]);
  }
  const known = ["$schema", ...Object.keys(sections)];
  const faults = Object.keys(json)
    .filter((key) => !known.includes(key))
    .map((key) => `${key}: ${unknownKey(key, known)}`);
  const own = (json as Record<string, unknown>)[section];
  if (own === undefined) faults.push(`${section}: missing; this script needs that section`);
  else {
    const result = sections[section].safeParse(own);
    if (result.success && faults.length === 0) return result.data as Config[S];
    const schema = schemaOf(section);
    for (const issue of result.error?.issues ?? []) faults.push(...explainIssue(issue, section, own, schema));
  }
  throw new ConfigError(faults.map((fault) => `${file}: ${fault}`));
}

// ---- secrets

const secretFiles = new Map<string, { mtimeMs: number; ino: number; value: string }>();

/**
 * The value of a secret without white space around it. A file is read again when it has changed, so that a new token
 * needs no restart. Throws a ConfigError that names the variable or file, never the value.
 */
export function readSecret(ref: SecretRef): string {
  if ("env" in ref) {
    const value = process.env[ref.env]?.trim();
    if (!value)
      throw new ConfigError([`The variable ${ref.env}, named in the config as a secret, is not set`], 1);
    return value;
  }
  try {
    const { mtimeMs, ino } = statSync(ref.file);
    const known = secretFiles.get(ref.file);
    if (known?.mtimeMs === mtimeMs && known.ino === ino) return known.value;
    const value = readFileSync(ref.file, "utf8").trim(); // a byte order mark is white space, too
    if (value === "") throw new Error("the file is empty");
    secretFiles.set(ref.file, { mtimeMs, ino, value });
    return value;
  } catch (error) {
    throw new ConfigError([`The secret in ${ref.file} cannot be read: ${(error as Error).message}`], 1);
  }
}

/** Every secret of a section, with its key: `mail.password`, `tokens.10.0.0.1`, `tokens.*[1]`. */
export function listSecrets(node: unknown, key = ""): { key: string; ref: SecretRef }[] {
  if (typeof node !== "object" || node === null) return [];
  const [[name, value] = [], ...more] = Object.entries(node);
  if (more.length === 0 && typeof value === "string" && (name === "file" || name === "env"))
    return [{ key, ref: node as SecretRef }];
  if (Array.isArray(node))
    return node.flatMap((one, index) => listSecrets(one, node.length > 1 ? `${key}[${index}]` : key));
  return Object.entries(node).flatMap(([name, one]) => listSecrets(one, key ? `${key}.${name}` : name));
}

/** One fault for each secret that cannot be read now: `<section>.<key>: …`. */
export function secretFaults(section: Section, secrets: Record<string, SecretRef | undefined>): string[] {
  return Object.entries(secrets).flatMap(([key, ref]) => {
    try {
      const isToken = /^(token|tokens|viewToken)\b/.test(key);
      if (!ref || /^[\x21-\x7e]+$/.test(readSecret(ref)) || !isToken) return [];
      const where = "file" in ref ? `What stands in ${ref.file}` : `The variable ${ref.env}`;
      return [
        `${section}.${key}: ${where} is no token: expected one word of ASCII letters, digits and signs`,
      ];
    } catch (error) {
      return [`${section}.${key}: ${(error as Error).message}`];
    }
  });
}

function patternIsValid(text: string): boolean {
  try {
    return (new RegExp(`${text}|`).exec("")?.length ?? 0) > 1;
  } catch {
    return false;
  }
}

/** Whether user and path of an URL can be decoded: each % has its two digits. */
function isDecodable(text: string): boolean {
  try {
    return decodeURIComponent(text) !== "";
  } catch {
    return false;
  }
}

function localFolder(url: string): string | undefined {
  try {
    return url.startsWith("file:") ? fileURLToPath(url) : undefined;
  } catch {
    return undefined;
  }
}

/** `file://folder/x` names a host "folder", which no file URL can reach. */
function isLocalIfFile(text: string): boolean {
  return !text.startsWith("file:") || localFolder(text) !== undefined;
}

/** Two groups must not claim one sender: compares every pair of entries of different groups. */
function checkGroups(groups: z.infer<typeof group>[], context: z.core.$RefinementCtx): void {
  for (const [i, a] of groups.entries()) {
    const fault = (message: string) => addFault(context, ["groups", i], message);
    for (const b of groups.slice(0, i)) {
      if (a.port === b.port && a.port !== 0) fault(`port ${a.port} is another group's already`);
      const shared = a.senders.find((x) => b.senders.some((y) => overlaps(x, y)));
      if (shared) fault(`sender ${shared} belongs to the group of port ${b.port} already`);
    }
  }
}

function addFault(context: z.core.$RefinementCtx, path: PropertyKey[], message: string): void {
  context.addIssue({ code: "custom", path, message });
}

export function jsonSchema(): object {
  const properties: Record<string, unknown> = { $schema: { type: "string" } };
  for (const name of Object.keys(sections) as Section[])
    properties[name] = { ...schemaOf(name), $schema: undefined };
  return {
    $schema: "https://json-schema.org/draft/2020-12/schema",
    title: "Log-RT-Sync",
    type: "object",
    properties,
    additionalProperties: false,
  };
}

function schemaOf(section: Section): SchemaNode {
  const options = { io: "input", unrepresentable: "any", override: dropMachineDefault } as const;
  return z.toJSONSchema(sections[section], options) as SchemaNode;
}

/** The default host is this machine's name: it must not stand in a file for everyone. */
function dropMachineDefault({ jsonSchema: schema }: { jsonSchema: Record<string, unknown> }): void {
  if (schema.default === hostname().toLowerCase()) delete schema.default;
}

if (import.meta.main) process.stdout.write(`${JSON.stringify(jsonSchema(), null, 2)}\n`);
