/**
 * Who may come in: which port serves a sender, whose token is shown, which address a request really came from.
 * Everything here is decided from the request and the config alone, before anything touches the disk.
 */
import { createHash, timingSafeEqual } from "node:crypto";
import { isIP } from "node:net";
import { WireError } from "./chunk.ts";
import { type Config, readSecret } from "./config.ts";
import { createMatcher, isLoopback, plainAddress } from "./host.ts";

/** Where a request came in: the address of the connection's other end, and the index of the port's group. */
export interface Arrival {
  peer: string;
  group: number;
}

export type Access = ReturnType<typeof createAccess>;

/** The rules of a receiver's config. Token files are read again when they change. */
export function createAccess(config: Config["receiver"]) {
  const { groups, tokens } = config;
  const serves = groups.map((group) => createMatcher(group.senders));
  const listed = groups.map(({ senders }) =>
    createMatcher(senders.filter((entry) => isIP(entry.split("/")[0] ?? ""))),
  );
  const isProxy = createMatcher(config.trustedProxies);

  /** The client's own address: the last hop that is no trusted proxy. */
  function clientAddress(headers: Headers, { peer }: Arrival): string {
    const hops = [...(headers.get("X-Forwarded-For") ?? "").split(","), peer].map((hop) =>
      plainAddress(hop.trim()),
    );
    let hop = hops.pop() ?? "";
    while (isProxy(hop) && hops.length > 0 && hops.at(-1) !== "") hop = hops.pop() ?? "";
    return hop;
  }

  /** Which group a sender belongs to; -1 for none. */
  function groupOf(host: string): number {
    return serves.findIndex((matches) => matches(host));
  }

  function checkGroup(host: string, { group }: Arrival): void {
    const own = groupOf(host);
    if (own < 0) throw new WireError(403, `host ${host} is in no group of this receiver`);
    if (own !== group) throw new WireError(421, `host ${host} belongs to port ${groups[own]?.port}`);
  }

  /** Throws a WireError (421, 401, 403) unless this request may speak for the host. */
  function authorise(host: string, headers: Headers, arrival: Arrival): void {
    checkGroup(host, arrival);
    if (!tokens) {
      const address = clientAddress(headers, arrival);
      if (serves[arrival.group]?.(address)) return;
      throw new WireError(
        403,
        `address ${address} is not among the senders of this port; list it, or set tokens`,
      );
    }
    const shown = bearer(headers);
    if (shown === undefined) throw new WireError(401, "a bearer token is required");
    const own = tokens[host] ?? tokens["*"];
    if (own?.some((ref) => isSame(shown, readSecret(ref)))) return;
    if (
      Object.values(tokens)
        .flat()
        .some((ref) => isSame(shown, readSecret(ref)))
    ) {
      throw new WireError(403, `this token is not for host ${host}`);
    }
    throw new WireError(401, "the token is not known");
  }

  const isListed = (text: string, { group }: Arrival) => listed[group]?.(text) === true;

  /** The original's form has no token: it is taken from listed addresses only, before its body is read. */
  function checkLegacy(headers: Headers, arrival: Arrival): void {
    if (!config.legacy)
      throw new WireError(415, "the JSON form is off; set receiver.legacy, or send text/plain");
    const address = clientAddress(headers, arrival);
    if (!isListed(address, arrival))
      throw new WireError(403, `address ${address} may not send the JSON form`);
  }

  /**
   * Its host must be listed by address, too; where tokens are configured it must be the very address, so that
   * nobody speaks for a host that has a token.
   */
  function authoriseLegacy(host: string, headers: Headers, arrival: Arrival): void {
    checkGroup(host, arrival);
    const isOwn = host === clientAddress(headers, arrival);
    if (isOwn || (!tokens && isListed(host, arrival))) return;
    throw new WireError(403, `this address may not send the JSON form for host ${host}`);
  }

  /** Whether a request may see status page and metrics: from this machine itself, or with any token. */
  function mayWatch(headers: Headers, arrival: Arrival): boolean {
    const isForwarded = headers.has("X-Forwarded-For") || headers.has("Forwarded");
    const isKnownWay = !isForwarded || isProxy(plainAddress(arrival.peer));
    if (isKnownWay && isLoopback(clientAddress(headers, arrival))) return true;
    const shown = bearer(headers) ?? basicPassword(headers);
    return (
      shown !== undefined &&
      Object.values(tokens ?? {})
        .flat()
        .some((ref) => isSame(shown, readSecret(ref)))
    );
  }

  return { groupOf, authorise, checkLegacy, authoriseLegacy, mayWatch };
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

/** Compares digests, in a time that tells nothing of where or how long the texts are. */
function isSame(a: string, b: string): boolean {
  const digest = (text: string) => createHash("sha256").update(text).digest();
  return timingSafeEqual(digest(a), digest(b));
}
