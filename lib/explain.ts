/**
 * What is wrong in a config, in words that say what to write instead: where JSON ends to be JSON, which key was
 * meant, how a value is written. Text from text: nothing here reads a file.
 */
import type { z } from "zod";

/** The words of `known` that `word` is most likely a slip of, or undefined when none is near. */
export function nearest(word: string, known: string[]): string | undefined {
  const near = known
    .map((name) => ({ name, slips: countSlips(word.toLowerCase(), name.toLowerCase()) }))
    .filter(({ name, slips }) => slips <= Math.max(1, Math.floor(Math.max(word.length, name.length) / 3)))
    .sort((a, b) => a.slips - b.slips);
  return near[0]?.name;
}

/** Letters added, left out, exchanged or swapped (optimal string alignment); a name that begins with the other is one slip. */
function countSlips(a: string, b: string): number {
  if (Math.min(a.length, b.length) >= 4 && (a.startsWith(b) || b.startsWith(a))) return 1;
  let [older, old] = [[] as number[], Array.from({ length: b.length + 1 }, (_, i) => i)];
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1];
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      const ways = [
        (old[j] ?? 0) + 1,
        (row[j - 1] ?? 0) + 1,
        (old[j - 1] ?? 0) + (same ? 0 : 1),
        swapped ? (older[j - 2] ?? 0) + 1 : Number.POSITIVE_INFINITY,
      ];
      row.push(Math.min(...ways));
    }
    [older, old] = [old, row];
  }
  return old[b.length] ?? 0;
}

// ---- JSON

/** Where a text ends to be JSON and why: `line 3, column 5: …` and that line's text; undefined for one that is JSON. */
export function explainJson(text: string): string | undefined {
  const fault = new JsonReader(text).fault();
  return fault && explainPlace(text, fault.at, fault.why);
}

/** Where a key stands for the second time in an object, of which a parser takes the last without a word; undefined when none does. */
export function explainRepeated(text: string): string | undefined {
  const reader = new JsonReader(text);
  if (reader.fault() || !reader.repeated) return undefined;
  return explainPlace(text, reader.repeated.at, `the key "${reader.repeated.key}" stands here twice`);
}

function explainPlace(text: string, at: number, why: string): string {
  const before = text.slice(0, at).split("\n");
  const line = text.split("\n")[before.length - 1] ?? "";
  const shown = withoutSecrets(line.trim()).slice(0, 100);
  return `line ${before.length}, column ${(before.at(-1) ?? "").length + 1}: ${why}${shown && `: ${shown}`}`;
}

/** Reads JSON as far as it is some, by the grammar of RFC 8259: the runtimes' own parsers do not tell the place. */
class JsonReader {
  readonly #text: string;
  #at = 0;
  #lastComma: number | undefined;
  /** The first key that its object has already. */
  repeated: { key: string; at: number } | undefined;

  constructor(text: string) {
    this.#text = text;
  }

  fault(): { at: number; why: string } | undefined {
    try {
      this.#value();
      this.#space();
      if (this.#at < this.#text.length) this.#fail("something follows the last closing bracket");
      return undefined;
    } catch (fault) {
      if (fault instanceof Error) throw fault;
      return fault as { at: number; why: string };
    }
  }

  #fail(why: string, at = this.#at): never {
    const next = this.#text.slice(at, at + 2);
    if (next === "//" || next === "/*" || next[0] === "#") throw { at, why: "JSON knows no comments" };
    if (next[0] === "'") throw { at, why: 'expected double quotes (")' };
    throw {
      at,
      why: at >= this.#text.length ? "the file ends too early, a bracket or quote is missing" : why,
    };
  }

  #space(): string {
    while (/[ \t\r\n]/.test(this.#text[this.#at] ?? "x")) this.#at++;
    return this.#text[this.#at] ?? "";
  }

  #value(): void {
    const first = this.#space();
    const keys = new Set<string>();
    if (first === "{") this.#list("}", () => this.#member(keys));
    else if (first === "[") this.#list("]", () => this.#value());
    else if (first === '"') this.#string();
    else this.#word();
  }

  #word(): void {
    const word = /^(?:true|false|null|-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?)(?![\w.])/.exec(
      this.#text.slice(this.#at, this.#at + 400),
    );
    if (!word) this.#fail('expected a value: text in double quotes ("), a number, true or false');
    this.#at += word[0].length;
  }

  #member(keys: Set<string>): void {
    if (this.#space() !== '"') this.#fail('expected a key in double quotes (")');
    const at = this.#at;
    this.#string();
    const key: string = JSON.parse(this.#text.slice(at, this.#at));
    if (keys.has(key)) this.repeated ??= { key, at };
    keys.add(key);
    if (this.#space() !== ":") this.#fail("expected : behind the key");
    this.#at++;
    this.#value();
  }

  #list(end: string, one: () => void): void {
    this.#at++;
    if (this.#space() === end) {
      this.#at++;
      return;
    }
    for (;;) {
      one();
      const behind = this.#at;
      const next = this.#space();
      if (next === end) break;
      if (next !== ",") this.#fail(`expected a comma or ${end}`, next === '"' ? behind : this.#at);
      this.#lastComma = this.#at++;
      if (this.#space() === end) this.#fail("a comma too many", this.#lastComma);
    }
    this.#at++;
  }

  #string(): void {
    const from = this.#at;
    const found = /^"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"/.exec(this.#text.slice(from));
    if (!found) this.#fail("the text in quotes does not end in this line, or has a \\ that should be \\\\");
    this.#at += found[0].length;
  }
}

/** A line of a config as it may be shown: what stands behind a key of a secret, or in a URL, is not. */
function withoutSecrets(line: string): string {
  return withoutPassword(
    line.replace(
      new RegExp(`("?(?:${[...SECRET_KEYS, "env"].join("|")})"?\\s*:\\s*)("[^"]*"?|[^\\s{[]\\S*)`, "gi"),
      "$1…",
    ),
  );
}

const SECRET_KEYS = ["token", "tokens", "viewToken", "password", "privateKey", "passphrase"];

/** A password that someone put into a URL must not reach a log. */
function withoutPassword(text: string): string {
  return text.replace(/(:\/\/[^/@:\s]*):[^/\s]*@/g, "$1:…@");
}

// ---- keys and values

/** A part of a JSON schema, as far as it is looked at. */
export interface SchemaNode {
  type?: string;
  properties?: Record<string, SchemaNode>;
  items?: SchemaNode;
  additionalProperties?: SchemaNode | boolean;
  anyOf?: SchemaNode[];
}

/** Keys of earlier versions, and what stands in their place. */
const GONE: Record<string, string> = {
  "forwarder.manifest": 'gone; "digest": true puts a file for sha256sum -c beside the batches of each hour',
  "forwarder.knownHosts": "gone; hostKey takes the fingerprints: ssh-keygen -lf KNOWN_HOSTS shows them",
  "housekeep.forgetAfterDays": "gone; receiver.forgetAfterDays takes its place",
  "housekeep.parallel": "gone; take the line out, one file is compressed for each core",
};

/** One line per fault: `<path>: what is wrong`. `found` is the section as it stands in the file. */
export function explainIssue(
  issue: z.core.$ZodIssue,
  section: string,
  found: unknown,
  schema: SchemaNode,
): string[] {
  const path = issue.path.map(String);
  const at = [section, ...path].join(".");
  if (issue.code === "unrecognized_keys") {
    const known = Object.keys(nodeAt(schema, path)?.properties ?? {});
    return issue.keys.map((key) => `${at}.${key}: ${GONE[`${at}.${key}`] ?? unknownKey(key, known)}`);
  }
  let value = found;
  for (const key of path) value = (value as Record<string, unknown> | undefined)?.[key];
  if (value === undefined && issue.code !== "custom") return [`${at}: missing; ${expectation(issue)}`];
  if (path.some((key) => SECRET_KEYS.includes(key))) {
    const text = issue.code === "custom" ? issue.message : 'expected {"env": "NAME"} or {"file": "/path"}';
    return [`${at}: ${text}`];
  }
  const hint = howToWrite(issue, path.at(-1) ?? "", value);
  const shown =
    value === undefined || typeof value === "object"
      ? ""
      : ` (found ${withoutPassword(JSON.stringify(value))})`;
  return [`${at}: ${expectation(issue)}${shown}${hint && `; ${hint}`}`];
}

export function unknownKey(key: string, known: string[]): string {
  const meant = nearest(key, known);
  return `unknown key; ${meant ? `did you mean "${meant}"?` : `known are ${known.join(", ")}`}`;
}

function nodeAt(schema: SchemaNode, path: string[]): SchemaNode | undefined {
  let node: SchemaNode | undefined = schema;
  for (const key of path) {
    const more: SchemaNode | boolean | undefined = node?.additionalProperties;
    node = node?.properties?.[key] ?? node?.items ?? (typeof more === "object" ? more : undefined);
    node = node?.anyOf?.find(({ properties }) => properties) ?? node;
  }
  return node;
}

const TYPES: Record<string, string> = {
  string: "a text in quotes",
  number: "a number",
  int: "a whole number",
  boolean: "true or false",
  array: "a list in [ ]",
  object: "an object in { }",
  record: "an object in { }",
};

/** What is expected, without the schema library's words. */
function expectation(issue: z.core.$ZodIssue): string {
  if (issue.code === "invalid_type") return `expected ${TYPES[issue.expected] ?? issue.expected}`;
  if (issue.code === "invalid_value")
    return `expected ${issue.values.map((value) => JSON.stringify(value)).join(" or ")}`;
  if (issue.code === "too_small" && /^Too small/.test(issue.message))
    return `expected ${issue.inclusive === false ? "more than" : "at least"} ${issue.minimum}${ofWhat(issue.origin)}`;
  if (issue.code === "too_big") return `expected at most ${issue.maximum}${ofWhat(issue.origin)}`;
  if (issue.code === "invalid_key")
    return `the name before the colon: ${issue.issues.map(expectation).join(", ")}`;
  if (issue.code === "invalid_union") return "expected another form; docs/config.md has an example";
  return issue.message.replace(/^Invalid input: /, "");
}

function ofWhat(origin: string): string {
  return { string: " character(s)", array: " element(s)" }[origin] ?? "";
}

/** Seconds of the units in which people write a duration. */
const UNITS: [RegExp, number][] = [
  [/^ms$/i, 0.001],
  [/^s(ec.*)?$/i, 1],
  [/^m(in.*)?$/i, 60],
  [/^h(our.*)?$/i, 3600],
  [/^d(ay.*)?$/i, 86_400],
];
const KEY_UNITS: [RegExp, string, number][] = [
  [/Ms$/, "milliseconds", 0.001],
  [/Seconds$/, "seconds", 1],
  [/Minutes?(ByHost)?$/, "minutes", 60],
  [/Hours$/, "hours", 3600],
  [/Days$/, "days", 86_400],
];

/** `leave the quotes out: 5001`, `in seconds: 60`. */
function howToWrite(issue: z.core.$ZodIssue, key: string, value: unknown): string {
  if (issue.code !== "invalid_type" || typeof value !== "string") return "";
  const text = value.trim();
  if (issue.expected === "boolean") return /^(true|false)$/.test(text) ? `leave the quotes out: ${text}` : "";
  if (issue.expected === "array") return `write ["${withoutPassword(text)}"]`;
  if (issue.expected !== "number" && issue.expected !== "int") return "";
  if (/^-?\d+(\.\d+)?$/.test(text)) return `leave the quotes out: ${text}`;
  const bytes = /^(\d+(?:\.\d+)?)\s*([kmg])?(i?b)?$/i.exec(text);
  if (/Bytes/.test(key) && bytes)
    return `in bytes: ${Math.round(Number(bytes[1]) * 1024 ** " kmg".indexOf((bytes[2] ?? " ").toLowerCase()))}`;
  if (/Percent$/.test(key) && /^[\d.]+\s*%$/.test(text)) return `a number alone: ${Number.parseFloat(text)}`;
  const [, amount = "", unit = ""] = /^(\d+(?:\.\d+)?)\s*([a-z]+)$/i.exec(text) ?? [];
  const seconds = Number(amount) * (UNITS.find(([name]) => name.test(unit))?.[1] ?? Number.NaN);
  const [, name, size] = KEY_UNITS.find(([pattern]) => pattern.test(key)) ?? [];
  return size && !Number.isNaN(seconds) ? `in ${name}: ${+(seconds / size).toFixed(6)}` : "";
}

// ---- errors

/** Exit codes that people script against. */
export const EXIT = { done: 0, failed: 1, usage: 2, config: 78 } as const;

/** Something that the operator can mend: told in one line, without a stack. The script ends with its exit code. */
export class OperatorError extends Error {
  override name = "OperatorError";
  readonly exitCode: number;
  constructor(message: string, exitCode: number = EXIT.failed) {
    super(message);
    this.exitCode = exitCode;
  }
}

/** The text of an error with its causes, in one line and without the words of the runtime's HTTP client. */
export function errorMessage(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  const { code } = error as NodeJS.ErrnoException;
  const isMeant = ([pattern]: [RegExp, string]) => pattern.test(error.message) || pattern.test(String(code));
  const text = NETWORK.find(isMeant)?.[1] ?? (error.message || code || error.name);
  return error.cause === undefined || text === errorMessage(error.cause)
    ? text
    : `${text}: ${errorMessage(error.cause)}`;
}

/** Faults of a connection as runtimes and libraries tell them, and what each means at an address that someone has set. */
const NETWORK: [pattern: RegExp, meaning: string][] = [
  [
    /ECONNREFUSED: Unable|connect ECONNREFUSED|Connection refused \(os error/,
    "connection refused: nothing listens at that address and port",
  ],
  [/getaddrinfo (ENOTFOUND|EAI_AGAIN)|dns error/, "the name is not known: look at its spelling and at DNS"],
  [
    /Malformed_HTTP_Response|invalid HTTP version/,
    "what answers there does not speak HTTP: look at the port, and whether it wants https://",
  ],
  [
    /EPROTO: The TLS|InvalidContentType|WRONG_VERSION_NUMBER/,
    "what answers there does not speak TLS: look at the port, or use the form without TLS",
  ],
  [
    /DEPTH_ZERO_SELF|UNABLE_TO_(VERIFY|GET)|SELF_SIGNED_CERT|CaUsedAsEndEntity|UnknownIssuer/,
    "its certificate is signed by none that is trusted: name the file of its CA in ca",
  ],
  [/CERT_HAS_EXPIRED|certificate expired/, "its certificate has expired"],
  [
    /ERR_TLS_CERT_ALTNAME_INVALID|NotValidForName/,
    "its certificate is for another name than the one in the address",
  ],
  [
    /closed unexpectedly|before message completed|tls handshake eof/,
    "it closed the connection without an answer: look at the port, and whether it wants https://",
  ],
  [/operation (timed out|was aborted due to timeout)/, "no answer in time"],
  [
    /Failed to start server|EADDRINUSE/,
    "something listens there already (ss -ltnp says what), or it is no address of this machine",
  ],
  [/EADDRNOTAVAIL|Failed to listen at/, "no address of this machine (ip address lists them)"],
  [/listen EACCES/, "ports below 1024 are root's: take a higher one"],
  [
    /PEM_NO_START_LINE|PEM routines|PEM_BAD/,
    "no PEM file of that kind: is each of certificate and key in its place?",
  ],
  [
    /EHOSTUNREACH|ENETUNREACH|connect ETIMEDOUT/,
    "no way to that address: look at it, at routes and firewalls",
  ],
  [
    /Connection lost before handshake|Invalid identification string/,
    "what answers there does not speak SSH: look at the port",
  ],
  [/Invalid greeting\. response=(?!\d{3}[ -])/, "what answers there does not speak SMTP: look at the port"],
  [
    /Greeting never received/,
    "connected, and not a word: what listens there may not speak SMTP, or wants smtps://",
  ],
];
