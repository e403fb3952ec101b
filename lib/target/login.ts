/**
 * The way into an SFTP server: its host key, the methods that it takes, and in what words a login failed. Every wait
 * ends: by an answer, by its time limit, or by the signal.
 */
import { createHash } from "node:crypto";
import { connect as connectTcp, type Socket } from "node:net";
import type { AuthenticationType, Client, ConnectConfig } from "ssh2";
import ssh2 from "ssh2";
import { type Config, readSecret } from "../config.ts";
import { keepBlocks, TargetFault } from "./target.ts";

/** So much is written to the socket at once, then it does not wait for more. */
const GATHER_BYTES = 262_144;
/** Of a server's own words so many characters are told. */
const TOLD_CHARACTERS = 200;

/** Weak algorithms that ssh2 still offers; its others are taken. */
const WEAK = {
  kex: ["diffie-hellman-group-exchange-sha1", "diffie-hellman-group14-sha1", "diffie-hellman-group1-sha1"],
  serverHostKey: ["ssh-dss", "ssh-rsa"],
  cipher: ["3des-cbc", "aes128-cbc", "aes192-cbc", "aes256-cbc", "blowfish-cbc", "cast128-cbc", "arcfour"],
  hmac: ["hmac-md5", "hmac-md5-96", "hmac-sha1-96", "hmac-ripemd160", "hmac-sha2-256-96", "hmac-sha2-512-96"],
};

/** A server's words as one short line without signs of control. */
export function plainText(text: string): string {
  const line = text
    .slice(0, 4 * TOLD_CHARACTERS)
    .replace(/[\p{C}\u2028\u2029]+/gu, " ")
    .trim();
  return line.length > TOLD_CHARACTERS ? `${line.slice(0, TOLD_CHARACTERS)}…` : line;
}

/** Where the server that a config names is, and what we have for it. Throws a ConfigError when a secret is not there. */
export function serverOf(config: Config["forwarder"]) {
  const url = new URL(config.target);
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const port = Number(url.port || 22);
  const { password, privateKey, passphrase, agent, hostKey = [] } = config;
  return {
    host,
    port,
    at: `${host}:${port}`, // for messages
    // as in curl: /~/in is in the login's home, /in at the root that the server shows
    folder: decodeURIComponent(url.pathname).replace(/^\/~(\/|$)/, "./") || "/",
    timeoutMs: config.timeoutSeconds * 1000,
    hostKeys: hostKey.map((text) => text.replace(/=+$/, "")),
    login: {
      username: decodeURIComponent(url.username),
      ...(password && { password: readSecret(password) }),
      ...(privateKey && { privateKey: readSecret(privateKey) }),
      ...(passphrase && { passphrase: readSecret(passphrase) }),
      ...(agent && { agent }),
    },
    // by the names that servers use
    methods: [
      ...(privateKey ? (["publickey"] as const) : []),
      ...(agent ? (["agent"] as const) : []),
      ...(password ? (["password", "keyboard-interactive"] as const) : []),
    ],
  };
}
export type ServerAddress = ReturnType<typeof serverOf>;

/** `SHA256:…` as ssh-keygen -l prints it. */
function fingerprint(key: Uint8Array): string {
  return `SHA256:${createHash("sha256").update(key).digest("base64").replace(/=+$/, "")}`;
}

/** The type that a host key's wire form begins with, for example `ssh-ed25519`. */
function keyType(key: Buffer): string {
  return key.length < 4 ? "" : key.toString("latin1", 4, 4 + key.readUInt32BE(0));
}

/** What is seen of a login on its way, for the words in which it failed. */
interface LoginTrace {
  refusedKey?: string;
  /** The methods that the server takes, as it said last. */
  takes: string[];
  partly: boolean;
  expired: boolean;
  /** What the server offers of each kind of algorithm. */
  offers: string[];
}

/** One login. Listening to what the server offers slows every packet down, so it is done only to explain a failure. */
export async function logIn(
  server: ServerAddress,
  signal: AbortSignal,
): Promise<{ client: Client; socket: Socket }> {
  const trace: LoginTrace = { takes: [], partly: false, expired: false, offers: [] };
  try {
    return await connect(server, trace, signal, false);
  } catch (error) {
    if (!disagreement(error as Error)) throw loginFault(server, trace, error as Error);
    const again = await connect(server, trace, signal, true).catch((second: Error) => second);
    if (again instanceof Error) throw loginFault(server, trace, again);
    return again;
  }
}

function connect(
  server: ServerAddress,
  trace: LoginTrace,
  signal: AbortSignal,
  listen: boolean,
): Promise<{ client: Client; socket: Socket }> {
  const { host, port, timeoutMs, login, hostKeys } = server;
  return new Promise((resolve, reject) => {
    const client = new ssh2.Client();
    const socket = connectTcp({ host, port, noDelay: true });
    const settle = () => {
      signal.removeEventListener("abort", onAbort);
      clearTimeout(timer);
      client.removeListener("close", onClose);
    };
    const failed = (error: Error) => {
      settle();
      socket.destroy();
      reject(error);
    };
    const onAbort = () => failed(new Error("stopped"));
    const onClose = () => failed(new Error("the server closed the connection"));
    const timer = setTimeout(() => failed(new Error(whyNoLogin(socket, timeoutMs))), timeoutMs);
    signal.addEventListener("abort", onAbort, { once: true });
    socket.on("error", () => {}); // ssh2 tells it, unless the connection was given up before
    gatherWrites(socket);
    client.on("error", failed).on("close", onClose); // a late error must find a listener: it stays
    client.on("change password", () => {
      trace.expired = true;
      failed(Object.assign(new Error("the password has expired"), { level: "client-authentication" }));
    });
    client.on("ready", () => {
      settle();
      resolve({ client, socket });
    });
    const options = {
      sock: socket,
      ...login,
      readyTimeout: timeoutMs,
      keepaliveInterval: 0, // answers and their time limits tell of life; some servers answer no keepalive
      algorithms: Object.fromEntries(Object.entries(WEAK).map(([kind, remove]) => [kind, { remove }])),
      authHandler: createAuthHandler(server, trace),
      hostVerifier: (key: Buffer) => {
        if (!hostKeys.includes(fingerprint(key))) trace.refusedKey = `${keyType(key)} ${fingerprint(key)}`;
        return trace.refusedKey === undefined;
      },
      ...(listen && { debug: (text: string) => trace.offers.push(text) }),
    };
    if (signal.aborted) return onAbort();
    try {
      client.connect(options as unknown as ConnectConfig);
    } catch (error) {
      // thrown for a private key that cannot be read
      failed(Object.assign(error as Error, { level: "client-authentication" }));
    }
  });
}

function whyNoLogin(socket: Socket, limitMs: number): string {
  const limit = `${limitMs / 1000} s`;
  if (socket.connecting) return `no connection within ${limit}: look at the address, at routes and firewalls`;
  if (socket.bytesRead === 0)
    return `connected, and not a word within ${limit}: what listens there may not be SSH; look at the port`;
  return `no login within ${limit}`;
}

/**
 * ssh2 writes a packet in pieces: those of one turn of the event loop go to the kernel together, from a buffer that is
 * used again when they are written: fresh memory for each would cost more than all else here.
 */
function gatherWrites(socket: Socket): void {
  const write = socket.write.bind(socket) as (data: Uint8Array, done: () => void) => boolean;
  const blocks = keepBlocks(GATHER_BYTES, Number.POSITIVE_INFINITY);
  let gathered = blocks.take();
  let bytes = 0;
  const flush = () => {
    if (bytes === 0) return;
    const full = gathered;
    write(full.subarray(0, bytes), () => blocks.give(full));
    gathered = blocks.take();
    bytes = 0;
  };
  socket.write = ((data: Uint8Array) => {
    for (let from = 0; from < data.length; ) {
      if (bytes === 0) setImmediate(flush);
      const part = data.subarray(from, from + GATHER_BYTES - bytes);
      gathered.set(part, bytes);
      bytes += part.length;
      from += part.length;
      if (bytes === GATHER_BYTES) flush();
    }
    return true;
  }) as typeof socket.write;
}

/**
 * The methods that we have, each once, those that the server asks for first; after a partial success (key *and*
 * password) its new list is followed. "none" is asked first: the answer to it says what the server takes.
 */
function createAuthHandler({ methods, login }: ServerAddress, trace: LoginTrace) {
  const left: AuthenticationType[] = [...methods];
  let asked = false;
  return (takes: AuthenticationType[] | null, partly: boolean | null) => {
    if (takes && takes.length > 0) trace.takes = takes;
    if (partly) trace.partly = true;
    if (!asked) {
      asked = true;
      return "none";
    }
    const wireName = (method: string) => (method === "agent" ? "publickey" : method);
    const at = left.findIndex((method) => !takes || takes.includes(wireName(method) as AuthenticationType));
    const [method] = at < 0 ? [] : left.splice(at, 1);
    if (method !== "keyboard-interactive") return method ?? false;
    return {
      type: method,
      username: login.username,
      prompt: (
        ...[, , , prompts, finish]: [string, string, string, unknown[], (answers: string[]) => void]
      ) => finish(prompts.map(() => String(login.password ?? ""))),
    };
  };
}

/** What could not be agreed on: `key exchange algorithm`, `C->S cipher`, … */
function disagreement(error: Error): string | undefined {
  return /no matching (.*)$/.exec(error.message)?.[1];
}

/** What went wrong before the login was done, in words that say whom to ask. */
function loginFault(
  server: ServerAddress,
  trace: LoginTrace,
  error: Error & { level?: string },
): TargetFault {
  const { at, host, port, login, methods } = server;
  if (trace.refusedKey) {
    const text = `Refused the host key of ${at}: it shows ${trace.refusedKey}, which hostKey does not list. See all of its keys with: ssh-keyscan -p ${port} ${host} | ssh-keygen -lf -   If the server's owner has changed the key, change the config; else someone may stand between`;
    return new TargetFault("host key", text);
  }
  const who = `Cannot log in at ${at} as "${login.username}"`;
  if (trace.expired)
    return new TargetFault("login", `${who}: its password has expired; the server's owner sets a new one`);
  if (error.level === "client-authentication" || error.level === "agent") {
    const keyFault = login.privateKey && explainKey(String(login.privateKey), login.passphrase as string);
    if (keyFault) return new TargetFault("login", `${who}: ${keyFault}`);
    if (trace.takes.length === 0) return new TargetFault("login", who, { cause: error });
    const offered = methods.map((method) => (method === "agent" ? "publickey (agent)" : method)).join(", ");
    const partly = trace.partly ? "a part was accepted; for the rest " : "";
    const key = login.privateKey
      ? publicHalf(String(login.privateKey), login.passphrase as string | undefined)
      : "";
    const text = `${who}: all authentication methods failed: we have ${offered}; ${partly}the server takes ${trace.takes.map(plainText).join(", ")}${key}`;
    return new TargetFault("login", text, error.level === "agent" ? { cause: error } : {});
  }
  const topic = disagreement(error);
  if (!topic) return new TargetFault("connection", `Cannot connect to ${at}`, { cause: error });
  // ssh2 names two of the topics otherwise in what it lists
  const listed = topic.replace("key exchange algorithm", "KEX method").replace("host key", "Host key");
  const offer = trace.offers
    .find((text) => text.startsWith(`Handshake: (remote) ${listed}: `))
    ?.split(": ")[2];
  const text = `Cannot agree with ${at} on a ${topic}: it offers only ${plainText(offer ?? "others")}`;
  return new TargetFault("connection", text, { cause: error });
}

/** What is wrong with a private key, without a word of it; undefined when it can be used. */
export function explainKey(privateKey: string, passphrase: string | undefined): string | undefined {
  const key = ssh2.utils.parseKey(privateKey, passphrase);
  if (!(key instanceof Error))
    return key.isPrivateKey()
      ? undefined
      : "it is a public key: name the private half, the file without .pub";
  if (/no passphrase/.test(key.message)) return "the key has a passphrase: set forwarder.passphrase";
  if (passphrase !== undefined && /passphrase|decrypt|integrity/i.test(key.message))
    return "forwarder.passphrase does not open the key";
  return "it is no private key in OpenSSH or PEM form";
}

/** The line that has to stand in the account's authorized_keys; it is no secret. */
function publicHalf(privateKey: string, passphrase: string | undefined): string {
  const key = ssh2.utils.parseKey(privateKey, passphrase);
  if (key instanceof Error) return "";
  return `. The line for its authorized_keys, the public half of privateKey: ${key.type} ${key.getPublicSSH().toString("base64")}`;
}
