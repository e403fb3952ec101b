/**
 * Addresses of senders and peers: what is one, what matches an entry of the config, which one is this machine.
 */
import { BlockList, isIP } from "node:net";

/**
 * A sender's name in its one spelling (lower case), or undefined when it is none: an IPv4 or IPv6 address without zone, or a
 * host name by RFC 1123 section 2.1. `sent` and `failed` are folders of ours and no hosts.
 */
export function parseHost(text: string): string | undefined {
  if (text.length === 0 || text.length > 253) return undefined;
  const host = plainAddress(text);
  if (isIP(host) === 6) return host.includes("%") ? undefined : canonicalIpv6(host);
  if (isIP(host) === 4) return host;
  if (host === "sent" || host === "failed") return undefined;
  const labels = host.split(".");
  if (!labels.every((label) => /^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$/.test(label))) return undefined;
  return /^\d+$/.test(labels.at(-1) ?? "") ? undefined : host; // 10.10.21.999 is a wrong address, not a name
}

/** What a record has of a host, which may be called `constructor`, as every object has something of that name. */
export function ofHost<T>(record: Record<string, T>, host: string): T | undefined {
  return Object.hasOwn(record, host) ? record[host] : undefined;
}

/** RFC 5952, by the URL parser, which does not take all that is one; an IPv4 address in hexadecimal is one of IPv4. */
function canonicalIpv6(address: string): string | undefined {
  const hex = address.replace(/(\d+)\.(\d+)\.(\d+)\.(\d+)$/, (_, a, b, c, d) =>
    [a * 256 + Number(b), c * 256 + Number(d)].map((n) => n.toString(16)).join(":"),
  );
  const host = URL.parse(`http://[${hex}]`)?.hostname.slice(1, -1);
  const mapped = /^::ffff:([0-9a-f]{1,4}):([0-9a-f]{1,4})$/.exec(host ?? "");
  if (!mapped) return host;
  const [high = 0, low = 0] = mapped.slice(1).map((n) => Number.parseInt(n, 16));
  return [high >> 8, high & 255, low >> 8, low & 255].join(".");
}

export function isLoopback(address: string): boolean {
  const plain = plainAddress(address);
  return plain === "localhost" || plain === "::1" || (isIP(plain) === 4 && plain.startsWith("127."));
}

/** An IPv4 address that came over an IPv6 socket, in its IPv4 form. */
export function plainAddress(address: string): string {
  return address.toLowerCase().replace(/^::ffff:(?=\d+\.)/, "");
}

/** The address of a hop of `X-Forwarded-For`, or of a Host header: some proxies write a port behind it. */
export function clientOfHop(hop: string): string {
  const [, bracketed, withPort] = /^\[([^\]]*)\](?::\d+)?$|^([\d.]+):\d+$/.exec(hop.trim()) ?? [];
  return plainAddress(bracketed ?? withPort ?? hop.trim());
}

/** Whether a name matches one of the entries (`*`, an address, a CIDR range, a host name). Host names match by name alone. */
export function createMatcher(entries: string[]): (hostOrAddress: string) => boolean {
  const list = new BlockList();
  const names = new Set<string>();
  for (const entry of entries) {
    const [address = "", bits] = entry.split("/");
    const family = isIP(address) === 6 ? "ipv6" : "ipv4";
    if (isIP(address) === 0) names.add(entry.toLowerCase());
    else if (bits === undefined) list.addAddress(address, family);
    else list.addSubnet(address, Number(bits), family);
  }
  return (text) => {
    const plain = plainAddress(text);
    const family = isIP(plain);
    if (names.has("*") || names.has(plain)) return true;
    return family !== 0 && list.check(plain, family === 6 ? "ipv6" : "ipv4");
  };
}

export function addressIsValid(text: string): boolean {
  const [address = "", bits, ...more] = text.split("/");
  const family = isIP(address);
  if (family === 0 || more.length > 0) return false;
  return bits === undefined || (/^\d{1,3}$/.test(bits) && Number(bits) <= (family === 6 ? 128 : 32));
}

export function senderIsValid(text: string): boolean {
  return text === "*" || addressIsValid(text) || (!text.includes("/") && parseHost(text) !== undefined);
}

export function overlaps(a: string, b: string): boolean {
  if (a === "*" || b === "*") return true;
  const base = (entry: string) => entry.split("/")[0] ?? "";
  return createMatcher([a])(base(b)) || createMatcher([b])(base(a));
}
