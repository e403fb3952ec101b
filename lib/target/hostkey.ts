/**
 * Whether a server is the one that the operator means: its host key against fingerprints from the config or
 * against a known_hosts file. There is no "trust on first use": a key that is not listed is refused.
 */
import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import { readFile } from "node:fs/promises";

/** Says whether a host key (in its wire form) is a trusted one. */
export type HostKeyCheck = (key: Uint8Array) => boolean;

/** `SHA256:…` as ssh-keygen -l prints it. */
export function fingerprint(key: Uint8Array): string {
  return `SHA256:${createHash("sha256").update(key).digest("base64").replace(/=+$/, "")}`;
}

/** The type that a host key's wire form begins with, for example `ssh-ed25519`. */
export function keyType(key: Uint8Array): string {
  const bytes = Buffer.from(key.buffer, key.byteOffset, key.byteLength);
  return bytes.length < 4 ? "" : bytes.toString("latin1", 4, 4 + bytes.readUInt32BE(0));
}

/** Trusts the keys of these fingerprints. */
export function trustFingerprints(fingerprints: string[]): HostKeyCheck {
  const trusted = new Set(fingerprints.map((text) => text.replace(/=+$/, "")));
  return (key) => trusted.has(fingerprint(key));
}

/** Trusts what a known_hosts file (sshd(8), SSH_KNOWN_HOSTS FILE FORMAT) lists for this host and port. */
export async function trustKnownHosts(path: string, host: string, port: number): Promise<HostKeyCheck> {
  const text = await readFile(path, "utf8");
  return trustKnownHostsText(text, host, port);
}

/** The same from the file's text. Lines of certificate authorities are passed over; a revoked key is refused. */
export function trustKnownHostsText(text: string, host: string, port: number): HostKeyCheck {
  const name = port === 22 ? host.toLowerCase() : `[${host.toLowerCase()}]:${port}`;
  const trusted = new Set<string>();
  const revoked = new Set<string>();
  for (const line of text.split("\n")) {
    const fields = line.trim().split(/\s+/);
    const marker = fields[0]?.startsWith("@") ? fields.shift() : undefined;
    const [hosts = "", , key = ""] = fields;
    if (hosts.startsWith("#") || key === "" || !hostsMatch(hosts, name)) continue;
    if (marker === undefined) trusted.add(key);
    else if (marker === "@revoked") revoked.add(key);
  }
  return (key) => {
    const text = Buffer.from(key).toString("base64");
    return trusted.has(text) && !revoked.has(text);
  };
}

/** Whether the first field of a known_hosts line means this name: a hash, or patterns with `*`, `?` and `!`. */
function hostsMatch(hosts: string, name: string): boolean {
  if (hosts.startsWith("|1|")) {
    const [, , salt = "", hash = ""] = hosts.split("|");
    const expected = Buffer.from(hash, "base64");
    const found = createHmac("sha1", Buffer.from(salt, "base64")).update(name).digest();
    return expected.length === found.length && timingSafeEqual(expected, found);
  }
  let matches = false;
  for (const entry of hosts.toLowerCase().split(",")) {
    const negated = entry.startsWith("!");
    if (!wildcard(negated ? entry.slice(1) : entry).test(name)) continue;
    if (negated) return false;
    matches = true;
  }
  return matches;
}

function wildcard(pattern: string): RegExp {
  const escaped = pattern.replace(/[.+^${}()|[\]\\]/g, "\\$&");
  return new RegExp(`^${escaped.replaceAll("*", ".*").replaceAll("?", ".")}$`);
}
