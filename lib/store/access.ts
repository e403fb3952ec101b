/**
 * Who may come in: which port serves a sender, whose token is shown, which address a request really came from; and who
 * was refused. All is decided from the request and the config alone, before anything touches the disk.
 */
import { createHash, timingSafeEqual } from "node:crypto";
import { hostname, networkInterfaces } from "node:os";
import { dashedHost } from "../batch.ts";
import { HEADER, WireError } from "../chunk.ts";
import { type Config, readSecret, type SecretRef } from "../config.ts";
import { addressIsValid, clientOfHop, createMatcher, isLoopback, parseHost, plainAddress } from "../host.ts";
import { createFaultLog, errorMessage, type FaultLog, type Log } from "../service.ts";
import type { RefusedSender } from "../signs.ts";

type ReceiverConfig = Config["receiver"];

/** Where a request came in: the other end's address, the port's group, and the names of its certificate. */
export interface Arrival {
  peer: string;
  group: number;
  /** With `tls.clientName`: what the client's certificate is for. */
  names?: string[];
}

export class Access {
  readonly #config: ReceiverConfig;
  readonly #faults: FaultLog;
  readonly #serves: ((text: string) => boolean)[];
  readonly #listed: ((text: string) => boolean)[];
  readonly #isListed: (text: string) => boolean;
  readonly #isProxy: (text: string) => boolean;
  readonly #tokens: Map<string, SecretRef[]> | undefined;
  /** Hosts that someone named, by the dashed form of their batches. */
  readonly #named = new Map<string, string>();
  readonly #longest: number;
  readonly #now: () => number;
  /** SHA-256 of every token, for "known, but not yours"; made anew now and then. */
  #known = new Set<string>();
  #knownAt = Number.NEGATIVE_INFINITY;
  readonly #read = new Map<string, string>();

  constructor(
    config: ReceiverConfig,
    { log, now, expected }: { log: Log; now: () => number; expected: string[] },
  ) {
    this.#config = config;
    this.#now = now;
    this.#faults = createFaultLog(log, now);
    this.#serves = config.groups.map((group) => createMatcher(group.senders));
    this.#listed = config.groups.map(({ senders }) => createMatcher(senders.filter(addressIsValid)));
    const listed = config.groups.flatMap(({ senders }) => senders.filter((sender) => sender !== "*"));
    this.#isListed = createMatcher(listed);
    this.#isProxy = createMatcher(config.trustedProxies);
    const tokens = config.tokens && Object.entries(config.tokens);
    this.#tokens = tokens && new Map(tokens.map(([host, refs]) => [parseHost(host) ?? host, refs]));
    const names = [
      ...config.groups.flatMap(({ senders }) => senders),
      ...expected,
      ...(this.#tokens?.keys() ?? []),
    ];
    for (const name of names) {
      const host = parseHost(name);
      if (host !== undefined) this.#named.set(dashedHost(host), host);
    }
    this.#longest = longestHost(config);
  }

  /** The client's own address: the last hop that is no trusted proxy. */
  clientAddress(headers: Headers, { peer }: Arrival): string {
    const hops = [...(headers.get("X-Forwarded-For") ?? "").split(",").map(clientOfHop), plainAddress(peer)];
    let hop = hops.pop() ?? "";
    while (this.#isProxy(hop) && hops.length > 0 && hops.at(-1) !== "") hop = hops.pop() ?? "";
    return hop;
  }

  /** Which group a sender belongs to; -1 for none. */
  groupOf(host: string): number {
    return this.#serves.findIndex((matches) => matches(host));
  }

  #checkGroup(host: string, { group }: Arrival): void {
    const own = this.groupOf(host);
    if (own < 0) throw new WireError(403, `host ${host} is in no group of this receiver`, "host in no group");
    if (own !== group)
      throw new WireError(
        421,
        `host ${host} belongs to port ${this.#config.groups[own]?.port}`,
        "host of another port",
      );
  }

  /** The client's address. Throws a WireError (400, 401, 403, 421) unless this request may speak for the host. */
  authorise(host: string, headers: Headers, arrival: Arrival): string {
    if (host.length > this.#longest)
      throw new WireError(
        400,
        `${HEADER.host} is longer than ${this.#longest} characters, the most that file names have room for`,
      );
    const address = this.clientAddress(headers, arrival);
    if (this.#tokens) this.#checkToken(host, headers); // first: a stranger learns nothing of groups
    this.#checkGroup(host, arrival);
    if (!this.#tokens && !this.#serves[arrival.group]?.(address))
      throw new WireError(
        403,
        `address ${address} is not among the senders of this port; list it, or set tokens`,
        "address not listed",
      );
    if (arrival.names && !arrival.names.includes(host))
      throw new WireError(
        403,
        `the client certificate is not for host ${host}`,
        "certificate of another host",
      );
    this.#checkName(host);
    return address;
  }

  /** The token must be one of the host's own, or of `*` when it has none. */
  #checkToken(host: string, headers: Headers): void {
    const shown = bearer(headers);
    if (shown === undefined) throw new WireError(401, "a bearer token is required", "no token");
    if (this.#isOneOf(shown, this.#tokens?.get(host) ?? this.#tokens?.get("*") ?? [])) return;
    if (this.#knows(shown))
      throw new WireError(403, `this token is not for host ${host}`, "token of another host");
    throw new WireError(401, "the token is not known", "unknown token");
  }

  #isOneOf(shown: string, refs: SecretRef[]): boolean {
    const hash = digest(shown);
    return refs.some((ref) => {
      const token = this.#tokenOf(ref);
      return token !== undefined && timingSafeEqual(hash, digest(token));
    });
  }

  /** Whether any host has this token. One look-up, however many there are: files are read again every ten seconds. */
  #knows(shown: string): boolean {
    if (this.#now() - this.#knownAt > 10_000) {
      const all = [...(this.#tokens?.values() ?? [])].flat().map((ref) => this.#tokenOf(ref));
      this.#known = new Set(
        all.flatMap((token) => (token === undefined ? [] : [digest(token).toString("hex")])),
      );
      this.#knownAt = this.#now();
    }
    return this.#known.has(digest(shown).toString("hex"));
  }

  /** A token; one that cannot be read now (its file vanished) fits nobody, and is told once. */
  #tokenOf(ref: SecretRef): string | undefined {
    const name = "env" in ref ? ref.env : ref.file;
    try {
      const token = readSecret(ref);
      this.#faults.recovered(name, "token can be read again", { token: name });
      if (this.#read.get(name) !== token) this.#knownAt = Number.NEGATIVE_INFINITY;
      this.#read.set(name, token);
      return token;
    } catch (error) {
      this.#faults.failed(name, "token cannot be read: whoever shows it is refused", {
        error: errorMessage(error),
      });
      return undefined;
    }
  }

  /** A name that nobody listed must not have the file names of one that somebody did, or of an address. */
  #checkName(host: string): void {
    const dashed = dashedHost(host);
    const owner = this.#named.get(dashed);
    if (owner === host) return;
    const looks = !host.includes(":") && !/^[\d.]+$/.test(host) && readsAsAddress(dashed);
    if (owner === undefined && !looks) return;
    const whose = owner === undefined ? "an address" : `host ${owner}`;
    throw new WireError(403, `host ${host} would have the file names of ${whose}`, "name of another host");
  }

  /** Whether a host comes in by the token of `*` alone: nobody listed it, expects it, or gave it a token. */
  isUnnamed(host: string): boolean {
    if (!this.#tokens || this.#named.get(dashedHost(host)) === host) return false;
    return !this.#isListed(host);
  }

  /** The original's form has no token: from listed addresses only. Gives that address, before the body is read. */
  checkLegacy(headers: Headers, arrival: Arrival): string {
    if (!this.#config.legacy)
      throw new WireError(
        415,
        "the JSON form is off; set receiver.legacy, or send text/plain",
        "JSON form is off",
      );
    const address = this.clientAddress(headers, arrival);
    if (!this.#listed[arrival.group]?.(address))
      throw new WireError(403, `address ${address} may not send the JSON form`, "address not listed");
    return address;
  }

  /** Its host must be listed by address, too; with tokens, it must be the very address: nobody speaks for another. */
  authoriseLegacy(host: string, address: string, arrival: Arrival): void {
    this.#checkGroup(host, arrival);
    if (host === address || (!this.#tokens && this.#listed[arrival.group]?.(host))) return;
    throw new WireError(
      403,
      `this address may not send the JSON form for host ${host}`,
      "host of another address",
    );
  }

  /** Whether a request may see status page and metrics: with the token for it, or without any from this machine itself. */
  mayWatch(headers: Headers, arrival: Arrival): boolean {
    const { viewToken } = this.#config;
    const refs = viewToken ? [viewToken] : this.#tokens?.get("*");
    if (!refs) return isLoopback(arrival.peer) && isDirect(headers);
    const shown = bearer(headers) ?? basicPassword(headers);
    return shown !== undefined && this.#isOneOf(shown, refs);
  }
}

/** What the longest file name leaves for a host: `<prefix>_<window>_<host>.<part>.log.gz.tmp` of at most 255 bytes. */
export function longestHost({ prefix }: ReceiverConfig): number {
  return 255 - `${prefix}_26112206_20-39_.`.length - 16 - ".log.gz.tmp".length;
}

/** `10-10-21-181`, `2001-db8--1`: the dashed form of an address. */
function readsAsAddress(dashed: string): boolean {
  return addressIsValid(dashed.replaceAll("-", ".")) || addressIsValid(dashed.replaceAll("-", ":"));
}

/** A Host of this machine (no name that a stranger's page could be given), and no sign of a proxy. */
function isDirect(headers: Headers): boolean {
  const signs = ["Forwarded", "Via", "X-Real-IP", "X-Client-IP", "True-Client-IP"];
  if (
    [...headers.keys()].some((name) => /^(?:x-forwarded|cf)-/i.test(name)) ||
    signs.some((name) => headers.has(name))
  )
    return false;
  const name = URL.parse(`http://${headers.get("Host")}`)?.hostname.replace(/^\[|\]$/g, "") ?? "";
  const own = Object.values(networkInterfaces()).flatMap((some) => some?.map(({ address }) => address) ?? []);
  return isLoopback(name) || name === hostname().toLowerCase() || own.includes(name);
}

function bearer(headers: Headers): string | undefined {
  return /^Bearer +(\S+) *$/i.exec(headers.get("Authorization") ?? "")?.[1];
}

/** So that a browser can show a token: as the password, whatever the user name. */
function basicPassword(headers: Headers): string | undefined {
  const base64 = /^Basic +(\S+) *$/i.exec(headers.get("Authorization") ?? "")?.[1];
  return (
    base64 &&
    Buffer.from(base64, "base64")
      .toString()
      .replace(/^[^:]*:/, "")
  );
}

function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}

// ---- what was refused

/** Rows of the table of refusals, and lines of the log in a minute: strangers decide how many there would be. */
const MOST_REFUSALS = 100;
const LINES_A_MINUTE = 60;

/** Refused requests by address and reason, for the log, the page and the metrics. */
export class Refusals {
  readonly #log: Log;
  readonly #now: () => number;
  readonly #rows = new Map<string, { seen: RefusedSender; toldAt: number; told: number }>();
  /** Limits that a sender met, by host. */
  readonly #pressed = new Map<string, { text: string; at: number }>();
  /** Since the start, by status and reason. */
  readonly counts = new Map<string, { status: number; reason: string; count: number }>();
  #minute = 0;
  #lines = 0;
  changed = false;

  constructor(log: Log, now: () => number) {
    this.#log = log;
    this.#now = now;
  }

  note(status: number, text: string, who: Pick<RefusedSender, "host" | "peer" | "reason">): void {
    const now = this.#now();
    const { host, peer, reason } = who;
    const total = this.counts.get(`${status} ${reason}`) ?? { status, reason, count: 0 };
    total.count++;
    this.counts.set(`${status} ${reason}`, total);
    if (status === 503 || status === 507) {
      if (host !== "" && reason !== "shutting down") this.#press(host, text, now);
      return;
    }
    const key = `${peer} ${reason}`;
    const first: RefusedSender = { ...who, count: 0, since: now, at: now };
    const row = this.#rows.get(key) ?? { seen: first, toldAt: -Infinity, told: 0 };
    const count = row.seen.count + 1;
    Object.assign(row.seen, { count, at: now, host });
    this.#rows.delete(key); // the newest stand last
    this.#rows.set(key, row);
    const [oldest] = this.#rows.keys();
    if (this.#rows.size > MOST_REFUSALS && oldest !== undefined) this.#rows.delete(oldest);
    this.changed = true;
    if (now - row.toldAt < 60_000 || !this.#mayTell(now)) return;
    const times = count - row.told;
    this.#log.warn("request refused", { peer: printable(peer), reason, status, host, times });
    Object.assign(row, { toldAt: now, told: count });
  }

  #press(host: string, text: string, at: number): void {
    if (!this.#pressed.has(host)) this.changed = true;
    this.#pressed.set(host, { text, at });
    const [oldest] = this.#pressed.keys();
    if (this.#pressed.size > MOST_REFUSALS && oldest !== undefined) this.#pressed.delete(oldest);
  }

  #mayTell(now: number): boolean {
    const minute = Math.floor(now / 60_000);
    if (minute !== this.#minute) this.#lines = 0;
    this.#minute = minute;
    return this.#lines++ < LINES_A_MINUTE;
  }

  list(): RefusedSender[] {
    const after = this.#now() - 3_600_000;
    return [...this.#rows.values()].map(({ seen }) => seen).filter(({ at }) => at > after);
  }

  pressed(): { host: string; text: string }[] {
    const after = this.#now() - 600_000;
    return [...this.#pressed].filter(([, { at }]) => at > after).map(([host, { text }]) => ({ host, text }));
  }
}

/** A text of others, fit for a log: one line of plain signs, not long. */
export function printable(text: string): string {
  return text.replace(/[^\x20-\x7e]/g, "?").slice(0, 200);
}
