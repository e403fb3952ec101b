/**
 * The only ssh2: one connection, one SFTP channel, and a write loop of our own. ssh2's fastPut reads until a
 * size that it looked up before, so that it never ends when the file shrinks, and cannot tell a short write.
 *
 * All files of a cycle share the connection. Requests go out without waiting for each answer, up to a bound
 * over all files; the server keeps their order per file (draft-ietf-secsh-filexfer-02, section 4.1).
 */
import { getCiphers } from "node:crypto";
import { connect as connectTcp, type Socket } from "node:net";
import { posix } from "node:path";
import type { Client, ConnectConfig, SFTPWrapper } from "ssh2";
import ssh2 from "ssh2";
import { type Config, readSecret } from "./config.ts";
import { fingerprint, type HostKeyCheck, keyType, trustFingerprints, trustKnownHosts } from "./hostkey.ts";
import { Refusal, type Target, TargetFault, tempName } from "./target.ts";

/** Largest write that every server takes, as ssh2 reckons it (section 3 of the draft: 34000 bytes a packet). */
const WRITE_BYTES = 31_952;
/** Write to servers that tell their limits (limits@openssh.com); ssh2 cuts it up if theirs is smaller. */
const LARGE_WRITE_BYTES = 130_560;
/** Bytes on their way, over all files of the connection: as much as OpenSSH's sftp, and its server's window. */
const MAX_IN_FLIGHT = 2 * 1024 * 1024;

/** Bytes that are written to the socket at once, from when on they don't wait for more. */
const GATHER_BYTES = 131_072;

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
  const sftp = await wire
    .ask<SFTPWrapper>("start the SFTP subsystem", (answer) => client.sftp(answer))
    .catch((error) => {
      const fault = new TargetFault("server", `${server.at} gives no SFTP to "${server.login.username}"`, {
        cause: error,
      });
      wire.end(fault);
      throw fault;
    });
  sftp.on("error", wire.lost).on("close", wire.lost).on("end", wire.lost);
  return sftpTarget(sftp, wire, server.folder);
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

/**
 * ssh2 writes each packet in three pieces. Here all pieces of one turn of the event loop go to the kernel at
 * once, or as soon as they are many: three to thirty times fewer system calls on both sides.
 */
function gatherWrites(socket: Socket): Socket {
  socket.on("error", () => {}); // ssh2 tells it, unless the connection was given up before
  const write = socket.write.bind(socket) as (data: Uint8Array) => boolean;
  let gathered = 0;
  const flush = () => {
    if (gathered === 0) return;
    gathered = 0;
    socket.uncork();
  };
  socket.write = ((data: Uint8Array) => {
    if (gathered === 0) {
      socket.cork();
      setImmediate(flush);
    }
    gathered += data.length;
    const more = write(data);
    if (gathered >= GATHER_BYTES) flush();
    return more;
  }) as typeof socket.write;
  return socket;
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

type Answer<T> = (error: (Error & { code?: number }) | undefined | null, value: T) => void;

/** A connection whose requests all end: by their answer, or by the fault that ended the connection. */
interface Wire {
  /** Sends one request. A status other than OK is a Refusal, which keeps the status. */
  ask<T>(what: string, send: (answer: Answer<T>) => unknown): Promise<T>;
  /** Ends the connection because of what happened on it. */
  lost: (cause?: unknown) => void;
  end(fault: TargetFault): void;
}

class StatusRefusal extends Refusal {
  readonly status: number;
  constructor(what: string, status: number, cause: Error) {
    super(`Cannot ${what}`, { cause });
    this.status = status;
  }
}

function watchConnection(client: Client, { at, timeoutMs }: Server, signal: AbortSignal): Wire {
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

  const ask = <T>(what: string, send: (answer: Answer<T>) => unknown): Promise<T> =>
    new Promise((resolve, reject) => {
      if (over) return reject(over);
      if (inHand.size === 0) lastAnswer = Date.now();
      inHand.add(reject);
      const onAnswer: Answer<T> = (error, value) => {
        if (!inHand.has(reject)) return; // ended already
        if (error && typeof error.code !== "number") return lost(error);
        inHand.delete(reject);
        lastAnswer = Date.now();
        if (error) reject(new StatusRefusal(what, error.code ?? 0, error));
        else resolve(value);
      };
      try {
        send(onAnswer);
      } catch (cause) {
        inHand.delete(reject); // ssh2 throws for an extension that the server does not offer
        reject(new StatusRefusal(what, OP_UNSUPPORTED, cause as Error));
      }
    });
  return { ask, lost, end };
}

// ---- files

function sftpTarget(sftp: SFTPWrapper, { ask, end }: Wire, folder: string): Target {
  const path = (name: string) => posix.join(folder, name);
  const budget = createBudget(MAX_IN_FLIGHT);
  const told = (sftp as { maxOpenHandles?: number }).maxOpenHandles !== undefined;
  const writeBytes = told ? LARGE_WRITE_BYTES : WRITE_BYTES;
  // Until the server, or ssh2 in its name, refuses.
  const offered = { sync: true, posixRename: true };

  const create = (temp: string) => ask<Buffer>(`create "${temp}"`, (answer) => sftp.open(temp, "w", answer));

  async function upload(name: string, chunks: AsyncIterable<Uint8Array>): Promise<void> {
    const temp = path(tempName(name));
    const handle = await create(temp).catch(async (error) => {
      if (error instanceof TargetFault) throw error;
      // Some servers let no file be written over (ProFTPD's AllowOverwrite): what a cut left must go first.
      await remove(tempName(name)).catch(() => {});
      return create(temp);
    });
    let closed = false; // a handle's number is given to the next file: never close it twice
    const close = () => {
      closed = true;
      return ask<void>(`close "${temp}"`, (answer) => sftp.close(handle, answer as () => void));
    };
    try {
      const written = await writeAll(temp, handle, chunks);
      // Not one after the other: the server keeps the order, and each answer is looked at.
      const [stats] = await Promise.all([
        ask<{ size: number }>(`look at "${temp}"`, (answer) => sftp.fstat(handle, answer)),
        sync(temp, handle),
        noRoom(close()),
      ]);
      if (stats.size !== written)
        throw new Refusal(`Cannot upload "${temp}": remote size is ${stats.size}, expected ${written}`);
    } catch (error) {
      if (!closed) await close().catch(() => {});
      await remove(tempName(name)).catch(() => {}); // gives back the room that it takes
      throw error;
    }
  }

  /** Writes with a bounded number of bytes on the way; gives the number written. */
  async function writeAll(temp: string, handle: Buffer, chunks: AsyncIterable<Uint8Array>): Promise<number> {
    let written = 0;
    let failure: unknown;
    let onTheWay = 0;
    let landed: (() => void) | undefined;
    for await (const chunk of chunks) {
      for (let from = 0; from < chunk.length; from += writeBytes) {
        const length = Math.min(writeBytes, chunk.length - from);
        await budget.take(length);
        if (failure) {
          budget.give(length);
          break;
        }
        onTheWay++;
        const bytes = Buffer.from(chunk.buffer, chunk.byteOffset + from, length);
        const position = written;
        ask(`write "${temp}"`, (answer) => sftp.write(handle, bytes, 0, length, position, answer as never))
          .catch((error) => {
            failure ??= error;
          })
          .finally(() => {
            budget.give(length);
            if (--onTheWay === 0) landed?.();
          });
        written += length;
      }
      if (failure) break;
    }
    if (onTheWay > 0) {
      await new Promise<void>((resolve) => {
        landed = resolve;
      });
    }
    if (failure) await noRoom(Promise.reject(failure));
    return written;
  }

  async function sync(temp: string, handle: Buffer): Promise<void> {
    if (!offered.sync) return;
    const what = `sync "${temp}"`;
    await ask<unknown>(what, (answer) => sftp.ext_openssh_fsync(handle, answer as never)).catch((error) => {
      if (!isNotOffered(error)) return noRoom(Promise.reject(error));
      offered.sync = false;
    });
  }

  async function publish(name: string): Promise<void> {
    const [from, to] = [path(tempName(name)), path(name)];
    const what = `rename "${from}" to "${to}"`;
    if (offered.posixRename) {
      try {
        return await ask<void>(what, (answer) => sftp.ext_openssh_rename(from, to, answer as () => void));
      } catch (error) {
        if (!isNotOffered(error)) throw error;
        offered.posixRename = false;
      }
    }
    await ask<void>(what, (answer) => sftp.rename(from, to, answer as () => void));
  }

  async function size(name: string): Promise<number | undefined> {
    const what = `look at "${path(name)}"`;
    const stats = await ask<{ size: number }>(what, (answer) => sftp.stat(path(name), answer)).catch(
      ifMissing,
    );
    return stats?.size;
  }

  async function* read(name: string): AsyncIterable<Uint8Array> {
    const what = `read "${path(name)}"`;
    const handle = await ask<Buffer>(what, (answer) => sftp.open(path(name), "r", answer));
    try {
      const block = Buffer.allocUnsafe(WRITE_BYTES);
      for (let position = 0; ; ) {
        const from = position;
        const got = await ask<number>(what, (answer) =>
          sftp.read(handle, block, 0, block.length, from, ((error: Error, count: number) =>
            answer(error, count)) as never),
        ).catch(ifEnd);
        if (got === 0) return;
        yield block.subarray(0, got);
        position += got;
      }
    } finally {
      await ask("close", (answer) => sftp.close(handle, answer as () => void)).catch(() => {});
    }
  }

  async function remove(name: string): Promise<void> {
    const what = `remove "${path(name)}"`;
    await ask<void>(what, (answer) => sftp.unlink(path(name), answer as () => void)).catch(ifMissing);
  }

  return {
    upload,
    publish,
    size,
    read,
    remove,
    close: () => end(new TargetFault("connection", "The connection is closed")),
  };
}

// Status codes of the draft, section 7.
const EOF = 1;
const NO_SUCH_FILE = 2;
const PERMISSION_DENIED = 3;
const OP_UNSUPPORTED = 8;

/** An extension that is unknown, or that the server's config forbids (sftp-server -P). */
function isNotOffered(error: unknown): boolean {
  return (
    error instanceof StatusRefusal && (error.status === OP_UNSUPPORTED || error.status === PERMISSION_DENIED)
  );
}

function ifMissing(error: unknown): undefined {
  if (error instanceof StatusRefusal && error.status === NO_SUCH_FILE) return undefined;
  throw error;
}

function ifEnd(error: unknown): number {
  if (error instanceof StatusRefusal && error.status === EOF) return 0;
  throw error;
}

/**
 * A refused write or sync is never the name's fault: the disk is full, a quota is used up, or the disk is
 * broken. SFTP 3 has no status that says which.
 */
async function noRoom<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof StatusRefusal)) throw error;
    throw new TargetFault("server", "The server takes no more data: no room, a quota, or a broken disk", {
      cause: error,
    });
  }
}

/** A number of bytes that many may hold a part of at once; who asks for more waits, in order. */
function createBudget(total: number) {
  let free = total;
  const waiting: { bytes: number; go: () => void }[] = [];
  return {
    take(bytes: number): Promise<void> | undefined {
      if (waiting.length === 0 && free >= bytes) {
        free -= bytes;
        return undefined;
      }
      return new Promise((go) => waiting.push({ bytes, go }));
    },
    give(bytes: number): void {
      free += bytes;
      for (let next = waiting[0]; next && free >= next.bytes; next = waiting[0]) {
        free -= next.bytes;
        waiting.shift();
        next.go();
      }
    },
  };
}
