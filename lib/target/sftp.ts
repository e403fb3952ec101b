/**
 * The only ssh2: logs in to a server whose key is trusted, and opens one SFTP channel on one connection. Every
 * wait ends: by an answer, by the timeout, by the signal, or with the connection.
 */
import { getCiphers } from "node:crypto";
import { connect as connectTcp } from "node:net";
import type { Client, ClientChannel, ConnectConfig } from "ssh2";
import ssh2 from "ssh2";
import { type Config, readSecret } from "../config.ts";
import { type Answer, startSession, type Wire } from "./filexfer.ts";
import { gatherWrites } from "./gather.ts";
import { fingerprint, type HostKeyCheck, keyType, trustFingerprints, trustKnownHosts } from "./hostkey.ts";
import { remoteTarget } from "./remote.ts";
import { type Target, TargetFault } from "./target.ts";

/** Modern first. AES-GCM runs in the runtime's native crypto; Bun's has no ChaCha20, and ssh2 insists on it. */
const ALGORITHMS = {
  kex: [
    "curve25519-sha256",
    "curve25519-sha256@libssh.org",
    "ecdh-sha2-nistp256",
    "ecdh-sha2-nistp384",
    "ecdh-sha2-nistp521",
    "diffie-hellman-group-exchange-sha256",
    "diffie-hellman-group16-sha512",
    "diffie-hellman-group18-sha512",
    "diffie-hellman-group14-sha256",
  ],
  serverHostKey: [
    "ssh-ed25519",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "rsa-sha2-512",
    "rsa-sha2-256",
  ],
  cipher: [
    "aes128-gcm@openssh.com",
    "aes256-gcm@openssh.com",
    "aes128-ctr",
    "aes192-ctr",
    "aes256-ctr",
    ...(getCiphers().includes("chacha20") ? ["chacha20-poly1305@openssh.com"] : []),
  ],
  hmac: [
    "hmac-sha2-256-etm@openssh.com",
    "hmac-sha2-512-etm@openssh.com",
    "hmac-sha2-256",
    "hmac-sha2-512",
    "hmac-sha1",
  ],
  compress: ["none"],
};

/** Logs in and opens the SFTP channel. Throws a TargetFault that says which of the steps failed. */
export async function openSftpTarget(config: Config["forwarder"], signal: AbortSignal): Promise<Target> {
  const server = await serverOf(config);
  const client = await logIn(server, signal);
  const wire = watchConnection(client, server, signal);
  try {
    const channel = await wire.ask<ClientChannel>((answer) => client.subsys("sftp", answer));
    channel.on("error", wire.lost).on("close", wire.lost).on("end", wire.lost);
    channel.stderr.resume(); // what nobody reads would hold up the channel
    const session = await startSession(channel, wire);
    const close = () => wire.end(new TargetFault("connection", "The connection is closed"));
    return remoteTarget(session, server.folder, close);
  } catch (cause) {
    if (cause instanceof TargetFault) throw cause;
    const text = `${server.at} gives no SFTP to "${server.login.username}"`;
    wire.end(new TargetFault("server", text, { cause }));
    throw new TargetFault("server", text, { cause });
  }
}

interface Server {
  host: string;
  port: number;
  /** `host:port`, for messages. */
  at: string;
  folder: string;
  timeoutMs: number;
  login: ConnectConfig;
  trusts: HostKeyCheck;
}

async function serverOf(config: Config["forwarder"]): Promise<Server> {
  const url = new URL(config.target);
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const port = Number(url.port || 22);
  const { password, privateKey, passphrase, agent, hostKey, knownHosts = "" } = config;
  const trusts = hostKey
    ? trustFingerprints(hostKey)
    : await trustKnownHosts(knownHosts, host, port).catch((cause) => {
        throw new TargetFault("host key", `Cannot read "${knownHosts}"`, { cause });
      });
  return {
    host,
    port,
    at: `${host}:${port}`,
    // as in curl: /~/in is in the login's home, /in at the root that the server shows
    folder: decodeURIComponent(url.pathname).replace(/^\/~(\/|$)/, "./") || "/",
    timeoutMs: config.timeoutSeconds * 1000,
    trusts,
    login: {
      username: decodeURIComponent(url.username),
      ...(password && { password: readSecret(password), tryKeyboard: true }),
      ...(privateKey && { privateKey: readSecret(privateKey) }),
      ...(passphrase && { passphrase: readSecret(passphrase) }),
      ...(agent && { agent }),
    },
  };
}

// ---- login

type Outcome =
  | { client: Client }
  | { refusedKey: Uint8Array }
  | { error: Error & { level?: string }; offers: string[] };

/** Types of host key that a server is known to have a trusted one of: the next login asks for those at once. */
const trustedTypes = new Map<string, string[]>();

/**
 * Connects until the server shows a trusted key: it has several (Ed25519, ECDSA, RSA), the operator may have
 * listed any one of them, and the server shows the first type that we ask for.
 */
async function logIn(server: Server, signal: AbortSignal): Promise<Client> {
  const shown: string[] = [];
  let types: string[] = trustedTypes.get(server.at) ?? ALGORITHMS.serverHostKey;
  while (types.length > 0) {
    let outcome = await connect(server, types, signal);
    if ("error" in outcome && disagreement(outcome.error)) {
      if (shown.length > 0) break; // the server has no key of the types that are left
      outcome = await connect(server, types, signal, true);
    }
    if ("client" in outcome) {
      trustedTypes.set(server.at, types);
      return outcome.client;
    }
    trustedTypes.delete(server.at);
    if ("error" in outcome) throw loginFault(server, outcome.error, outcome.offers);
    const type = keyType(outcome.refusedKey);
    shown.push(`${type} ${fingerprint(outcome.refusedKey)}`);
    types = types.filter((algorithm) => !usesKey(algorithm, type));
  }
  const text = `Refused the host key of ${server.at}: it shows ${shown.join(", ")}, not what hostKey or knownHosts lists. If the server's owner has changed the key, change the config; else someone may stand between`;
  throw new TargetFault("host key", text);
}

/** `rsa-sha2-512` is a signature by a key of type `ssh-rsa`. */
function usesKey(algorithm: string, type: string): boolean {
  return algorithm === type || (type === "ssh-rsa" && algorithm.startsWith("rsa-"));
}

/** One try to log in. `listen` collects what the server offers, which slows every packet down. */
function connect(server: Server, types: string[], signal: AbortSignal, listen = false): Promise<Outcome> {
  const { host, port, timeoutMs, login, trusts } = server;
  return new Promise((resolve) => {
    const client = new ssh2.Client();
    const socket = gatherWrites(connectTcp({ host, port, noDelay: true }));
    const offers: string[] = [];
    let refusedKey: Uint8Array | undefined;
    const settle = (outcome: Outcome) => {
      signal.removeEventListener("abort", onAbort);
      clearTimeout(timer);
      client.removeListener("close", onClose);
      if (!("client" in outcome)) socket.destroy();
      resolve(outcome);
    };
    const failed = (error: Error) => settle(refusedKey ? { refusedKey } : { error, offers });
    const onAbort = () => failed(new Error("stopped"));
    const onClose = () => failed(new Error("the server closed the connection"));
    const timer = setTimeout(() => failed(new Error(`no login within ${timeoutMs} ms`)), timeoutMs);
    signal.addEventListener("abort", onAbort, { once: true });
    client.on("error", failed); // stays: a late error of a connection that was given up must find a listener
    client.on("close", onClose);
    client.on("ready", () => settle({ client }));
    client.on("keyboard-interactive", (_name, _text, _language, prompts, answer) =>
      answer(prompts.map(() => login.password ?? "")),
    );
    const options = {
      sock: socket,
      ...login,
      readyTimeout: timeoutMs,
      keepaliveInterval: Math.max(1000, timeoutMs / 3),
      keepaliveCountMax: 3,
      algorithms: { ...ALGORITHMS, serverHostKey: types },
      hostVerifier: (key: Uint8Array) => {
        if (!trusts(key)) refusedKey = Uint8Array.from(key);
        return refusedKey === undefined;
      },
      ...(listen && { debug: (text: string) => offers.push(text) }),
    };
    if (signal.aborted) return onAbort();
    try {
      client.connect(options as ConnectConfig);
    } catch (error) {
      // thrown for a private key that cannot be read
      failed(Object.assign(error as Error, { level: "client-authentication" }));
    }
  });
}

/** What could not be agreed on: `key exchange algorithm`, `C->S cipher`, … */
function disagreement(error: Error): string | undefined {
  return /no matching (.*)$/.exec(error.message)?.[1];
}

/** What went wrong before the login was done, in words that say whom to ask. */
function loginFault(server: Server, error: Error & { level?: string }, offers: string[]): TargetFault {
  if (error.level === "client-authentication" || error.level === "agent") {
    return new TargetFault("login", `Cannot log in at ${server.at} as "${server.login.username}"`, {
      cause: error,
    });
  }
  const topic = disagreement(error);
  if (!topic) return new TargetFault("connection", `Cannot connect to ${server.at}`, { cause: error });
  // ssh2 names two of the topics otherwise in what it lists
  const listed = topic.replace("key exchange algorithm", "KEX method").replace("host key", "Host key");
  const offer = offers.find((text) => text.startsWith(`Handshake: (remote) ${listed}: `))?.split(": ")[2];
  const text = `Cannot agree with ${server.at} on a ${topic}: it offers only ${offer ?? "others"}`;
  return new TargetFault("connection", text, { cause: error });
}

// ---- channel

/** The connection as the wire of requests; `end` ends it with a fault that all of them are rejected with. */
function watchConnection(
  client: Client,
  { at, timeoutMs }: Server,
  signal: AbortSignal,
): Wire & { end(fault: TargetFault): void } {
  const inHand = new Set<(fault: TargetFault) => void>();
  let lastAnswer = 0;
  let over: TargetFault | undefined;
  const end = (fault: TargetFault) => {
    if (over) return;
    over = fault;
    clearInterval(watch);
    signal.removeEventListener("abort", onAbort);
    client.destroy();
    for (const reject of inHand) reject(fault);
    inHand.clear();
  };
  const lost = (cause?: unknown) =>
    end(
      new TargetFault(
        "connection",
        `The connection to ${at} was lost`,
        cause instanceof Error ? { cause } : {},
      ),
    );
  const onAbort = () => lost(new Error("stopped"));
  const watch = setInterval(
    () => {
      // ssh2 also sends keep-alives, but a server may answer those while its disk hangs
      if (inHand.size > 0 && Date.now() - lastAnswer > timeoutMs)
        lost(new Error(`no answer for ${timeoutMs} ms`));
    },
    Math.min(1000, timeoutMs / 4),
  );
  signal.addEventListener("abort", onAbort, { once: true });
  client.on("error", lost).on("close", lost).on("end", lost);
  if (signal.aborted) onAbort();

  const ask = <T>(send: (answer: Answer<T>) => unknown): Promise<T> =>
    new Promise((resolve, reject) => {
      if (over) return reject(over);
      if (inHand.size === 0) lastAnswer = Date.now();
      inHand.add(reject);
      const answer: Answer<T> = (error, value) => {
        if (!inHand.delete(reject)) return; // ended already
        lastAnswer = Date.now();
        if (error) reject(error);
        else resolve(value as T);
      };
      try {
        send(answer);
      } catch (bug) {
        answer(bug as Error);
      }
    });
  return { ask, lost, end };
}
