/**
 * The only ssh2: logs in to a server whose key is trusted, opens one SFTP channel, and makes a Target of it. Every
 * wait ends: by an answer, by its time limit, by the signal, or with the connection.
 *
 * Servers differ, and a habit of one must not be taken for the fault of a file: sizes are asked by name after CLOSE
 * (object stores know a file only then), a missing file may be "denied", extensions may be offered and refused.
 */
import { createHash } from "node:crypto";
import { connect as connectTcp, type Socket } from "node:net";
import { posix } from "node:path";
import type { AuthenticationType, Client, ConnectConfig, FileEntryWithStats, SFTPWrapper, Stats } from "ssh2";
import ssh2 from "ssh2";
import { type Config, readSecret } from "../config.ts";
import { collectGarbage } from "../runtime.ts";
import { Refusal, type RemoteFile, type Target, TargetFault, tempName } from "./target.ts";

/** Bytes of one file on their way at once: half of what a server of OpenSSH takes, for memory and caches. */
const WINDOW_BYTES = 1_048_576;
/** One read or write: every server takes it (draft-ietf-secsh-filexfer-02 section 3), and ssh2 sends it as one packet. */
const BLOCK_BYTES = 31_952;
/** So much is written to the socket at once, then it does not wait for more. */
const GATHER_BYTES = 262_144;
/** After so many bytes the packets that ssh2 made of them are collected. */
const COLLECT_BYTES = 4_194_304;
/** A slow disk or line: what closes, syncs or renames a file, and what is on its way, gets a second more for so many bytes. */
const SLOW_DISK = 4 * 1024 * 1024;
const SLOW_LINE = 65_536;
/** A connection on which bytes come but no answer is given up after so many times the limit. */
const PATIENCE = 10;
/** Of a server's own words so many characters are told. */
const TOLD_CHARACTERS = 200;
/** Pages of a listing that are read at most, to look for one name. */
const LISTING_PAGES = 1000;

/** Weak algorithms that ssh2 still offers; its others are taken. */
const WEAK = {
  kex: ["diffie-hellman-group-exchange-sha1", "diffie-hellman-group14-sha1", "diffie-hellman-group1-sha1"],
  serverHostKey: ["ssh-dss", "ssh-rsa"],
  cipher: ["3des-cbc", "aes128-cbc", "aes192-cbc", "aes256-cbc", "blowfish-cbc", "cast128-cbc", "arcfour"],
  hmac: ["hmac-md5", "hmac-md5-96", "hmac-sha1-96", "hmac-ripemd160", "hmac-sha2-256-96", "hmac-sha2-512-96"],
};

const STATUS = { eof: 1, noSuchFile: 2, permissionDenied: 3, failure: 4, unsupported: 8 } as const;

/** A status other than OK (draft section 7). */
class StatusRefusal extends Refusal {
  readonly status: number;
  constructor(what: string, status: number, cause: Error) {
    super(`Cannot ${what}`, { cause: new Error(plainText(cause.message)) });
    this.status = status;
  }
}

/** A server's words as one short line without signs of control. */
function plainText(text: string): string {
  const line = text
    .slice(0, 4 * TOLD_CHARACTERS)
    .replace(/[\p{C}\u2028\u2029]+/gu, " ")
    .trim();
  return line.length > TOLD_CHARACTERS ? `${line.slice(0, TOLD_CHARACTERS)}…` : line;
}

/** Logs in and opens the SFTP channel. Throws a TargetFault that says which of the steps failed. */
export async function openSftpTarget(config: Config["forwarder"], signal: AbortSignal): Promise<Target> {
  const server = serverOf(config);
  const { client, socket } = await logIn(server, signal);
  const connection = new Connection(client, socket, server, signal);
  try {
    const sftp = await connection.ask<SFTPWrapper>("start SFTP", (done) => client.sftp(done));
    sftp.on("error", connection.lost).on("close", connection.lost).on("end", connection.lost);
    return new SftpTarget(sftp, connection, server.folder, config.upload === "direct");
  } catch (cause) {
    const fault =
      cause instanceof TargetFault && cause.kind !== "connection"
        ? cause
        : new TargetFault("server", `${server.at} gives no SFTP to "${server.login.username}"`, { cause });
    connection.end(fault);
    throw signal.aborted ? cause : fault;
  }
}

// ---- login

interface ServerAddress {
  host: string;
  port: number;
  /** `host:port`, for messages. */
  at: string;
  folder: string;
  timeoutMs: number;
  hostKeys: string[];
  login: ConnectConfig;
  /** What we have to log in with, by the names that servers use. */
  methods: AuthenticationType[];
}

function serverOf(config: Config["forwarder"]): ServerAddress {
  const url = new URL(config.target);
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const port = Number(url.port || 22);
  const { password, privateKey, passphrase, agent, hostKey = [] } = config;
  return {
    host,
    port,
    at: `${host}:${port}`,
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
    methods: [
      ...(privateKey ? (["publickey"] as const) : []),
      ...(agent ? (["agent"] as const) : []),
      ...(password ? (["password", "keyboard-interactive"] as const) : []),
    ],
  };
}

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
async function logIn(
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
  const spare: Buffer[] = [];
  let gathered: Buffer = Buffer.allocUnsafeSlow(GATHER_BYTES);
  let bytes = 0;
  const flush = () => {
    if (bytes === 0) return;
    const full = gathered;
    write(full.subarray(0, bytes), () => spare.push(full));
    gathered = spare.pop() ?? Buffer.allocUnsafeSlow(GATHER_BYTES);
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

// ---- connection

type Done<T> = (error?: Error | null, value?: T) => void;

interface Request {
  what: string;
  startedAt: number;
  limitMs: number;
  reject: (fault: TargetFault) => void;
}

/** The connection and its requests, which all end: by their answer, or with the fault that ended the connection. */
class Connection {
  readonly #client: Client;
  readonly #server: ServerAddress;
  readonly #signal: AbortSignal;
  readonly #inFlight = new Set<Request>();
  readonly #watch: ReturnType<typeof setInterval>;
  #lastByteAt = Date.now();
  #lastAnswerAt = Date.now();
  #over: TargetFault | undefined;
  /** Bytes of writes that are not answered. */
  #bytes = 0;
  #uncollected = 0;

  constructor(client: Client, socket: Socket, server: ServerAddress, signal: AbortSignal) {
    this.#client = client;
    this.#server = server;
    this.#signal = signal;
    this.#watch = setInterval(() => this.#checkLimits(), Math.min(1000, server.timeoutMs / 4));
    signal.addEventListener("abort", this.#onAbort, { once: true });
    socket.on("data", () => {
      this.#lastByteAt = Date.now();
    });
    client.on("error", this.lost).on("close", this.lost).on("end", this.lost);
    if (signal.aborted) this.#onAbort();
  }

  /** Sends one request; what `send` is given takes its answer. `slowBytes` allow it more time. */
  ask<T>(what: string, send: (done: Done<T>) => unknown, slowBytes = 0): Promise<T> {
    return new Promise((resolve, reject) => {
      if (this.#over) return reject(this.#over);
      const limitMs = this.#server.timeoutMs + (1000 * slowBytes) / SLOW_DISK;
      const request: Request = { what, startedAt: Date.now(), limitMs, reject };
      this.#inFlight.add(request);
      const done: Done<T> = (error, value) => {
        if (!this.#inFlight.delete(request)) return; // ended already
        this.#lastAnswerAt = Date.now();
        if (!error) return resolve(value as T);
        const status = (error as { code?: unknown }).code;
        if (typeof status === "number") return reject(new StatusRefusal(what, status, error));
        if (what === "start SFTP") return reject(error);
        this.lost(error); // an answer that is none of this protocol, or no connection any more
        reject(this.#over);
      };
      try {
        send(done);
      } catch (error) {
        const isMissing = /not support/.test((error as Error).message); // an extension that is not offered
        done(isMissing ? Object.assign(error as Error, { code: STATUS.unsupported }) : null);
        if (!isMissing) reject(error);
      }
    });
  }

  /** What is on its way gets time for its bytes, and leaves garbage of several times as many behind. */
  startWrite(bytes: number): void {
    this.#bytes += bytes;
    this.#uncollected += bytes;
    if (this.#uncollected < COLLECT_BYTES) return;
    this.#uncollected = 0;
    collectGarbage();
  }

  endWrite(bytes: number): void {
    this.#bytes -= bytes;
  }

  #checkLimits(): void {
    const now = Date.now();
    for (const { what, startedAt, limitMs } of this.#inFlight) {
      const limit = limitMs + (1000 * this.#bytes) / SLOW_LINE;
      const sinceAnswer = now - Math.max(startedAt, this.#lastAnswerAt);
      const sinceByte = now - Math.max(startedAt, this.#lastAnswerAt, this.#lastByteAt);
      if (sinceByte <= limit && sinceAnswer <= PATIENCE * limit) continue;
      this.lost(new Error(`no answer for ${Math.round(limitMs)} ms to: ${what}`));
      return;
    }
  }

  readonly #onAbort = (): void => this.lost(new Error("stopped"));

  /** Ends the connection because of what happened on it. */
  readonly lost = (cause?: unknown): void => {
    const options = cause instanceof Error ? { cause } : {};
    this.end(new TargetFault("connection", `The connection to ${this.#server.at} was lost`, options));
  };

  /** Ends the connection; all that is in flight, and all that comes, is rejected with the fault. */
  end(fault: TargetFault): void {
    if (this.#over) return;
    this.#over = fault;
    clearInterval(this.#watch);
    this.#signal.removeEventListener("abort", this.#onAbort);
    this.#client.destroy();
    for (const { reject } of this.#inFlight) reject(fault);
    this.#inFlight.clear();
  }
}

// ---- files

class SftpTarget implements Target {
  readonly direct: boolean;
  readonly #sftp: SFTPWrapper;
  readonly #connection: Connection;
  readonly #folder: string;
  /** The most bytes that one write may have: fewer where the server says so. */
  readonly #writeBytes: number;
  // Until the server refuses: its config may forbid what it offers.
  #syncs = true;
  #renamesAsPosix = true;

  constructor(sftp: SFTPWrapper, connection: Connection, folder: string, direct: boolean) {
    this.#sftp = sftp;
    this.#connection = connection;
    this.#folder = folder;
    this.direct = direct;
    const { _maxWriteLen: most = BLOCK_BYTES } = sftp as unknown as { _maxWriteLen?: number };
    this.#writeBytes = Math.max(1024, Math.min(BLOCK_BYTES, most));
  }

  #path(name: string): string {
    return posix.join(this.#folder, name);
  }

  async upload(name: string, chunks: AsyncIterable<Uint8Array>, onWritten = () => {}): Promise<void> {
    const written = this.direct ? name : tempName(name);
    const path = this.#path(written);
    const handle = await this.#create(written, path);
    let closed = false; // a handle's number is given to the next file: never close it twice
    try {
      const bytes = await this.#writeAll(path, handle, chunks);
      onWritten();
      // Not one after the other: the server keeps the order, and each answer is looked at.
      const early = this.#ask<Stats>(`look at "${path}"`, (done) => this.#sftp.fstat(handle, done)).catch(
        ifRefused,
      );
      const synced = this.#sync(path, handle, bytes);
      closed = true;
      const close = this.#close(path, handle, bytes);
      const atOnce = this.#ask<Stats>(`look at "${path}"`, (done) => this.#sftp.stat(path, done)).catch(
        ifRefused,
      );
      const [stats, , , named] = await Promise.all([early, noRoom(synced), noRoom(close), atOnce]);
      if (named?.size === bytes) return;
      // Some know a file only after CLOSE. What the open file said counts only where names are told to nobody.
      const found = await this.stat(written);
      const size = found?.bytes ?? (this.#isBlind ? stats?.size : undefined);
      if (size === bytes || (size === undefined && this.direct)) return; // direct: an importer may take it at once
      const seen =
        size === undefined ? "it is not there after CLOSE" : `its size is ${size}, expected ${bytes}`;
      throw new Refusal(`Cannot upload "${path}": ${seen}`);
    } catch (error) {
      if (!closed) await this.#close(path, handle).catch(() => {});
      await this.remove(written).catch(() => {}); // gives back the room that it takes
      throw error;
    }
  }

  async #create(name: string, path: string): Promise<Buffer> {
    const open = () => this.#ask<Buffer>(`create "${path}"`, (done) => this.#sftp.open(path, "w", done));
    try {
      return await open();
    } catch (error) {
      if (!(error instanceof StatusRefusal)) throw error;
      if (error.status === STATUS.noSuchFile) throw await this.#missingFolder(error);
      // Some servers let no file be written over (ProFTPD's AllowOverwrite): what a cut left must go first.
      if (!this.direct) await this.remove(name).catch(() => {});
      return open();
    }
  }

  /** Which part of the folder's path is not there, and what is beside it. */
  async #missingFolder(cause: StatusRefusal): Promise<Error> {
    const parts = this.#folder.split("/").filter((part) => part !== "" && part !== ".");
    let above = this.#folder.startsWith("/") ? "/" : ".";
    for (const part of parts) {
      const path = posix.join(above, part);
      const found = await this.#ask<Stats>(`look at "${path}"`, (done) => this.#sftp.stat(path, done)).catch(
        ifRefused,
      );
      if (found) {
        above = path;
        continue;
      }
      const beside = await this.#list(above, 1).catch(() => []);
      const names = beside.map(({ filename }) => filename).filter((name) => !name.startsWith("."));
      const shown = names.length > 0 ? `; there is: ${names.slice(0, 10).map(plainText).join(", ")}` : "";
      return new TargetFault(
        "server",
        `The folder "${this.#folder}" is not there: no "${part}" in "${above}"${shown}`,
      );
    }
    return cause;
  }

  /**
   * Writes with a bounded number of bytes on the way; gives the number written. A block belongs to its write until
   * that is answered: ssh2 sends what is larger than the server takes in parts, and reads the later ones only then.
   */
  async #writeAll(path: string, handle: Buffer, chunks: AsyncIterable<Uint8Array>): Promise<number> {
    const most = Math.floor(WINDOW_BYTES / this.#writeBytes);
    let inFlight = 0;
    let position = 0;
    let failure: unknown;
    let wakeup = () => {};
    const answered = () => new Promise<void>((resolve) => (wakeup = resolve));
    let block = takeBlock();
    let length = 0;
    const send = () => {
      const [sent, bytes, at] = [block, length, position];
      inFlight++;
      position += bytes;
      this.#connection.startWrite(bytes);
      this.#ask<void>(`write "${path}"`, (done) => this.#sftp.write(handle, sent, 0, bytes, at, done))
        .catch((error) => {
          failure ??= error;
        })
        .finally(() => {
          inFlight--;
          this.#connection.endWrite(bytes);
          giveBlock(sent);
          wakeup();
        });
      block = takeBlock();
      length = 0;
    };
    try {
      for await (const chunk of chunks) {
        for (let from = 0; from < chunk.length && !failure; ) {
          const part = chunk.subarray(from, from + this.#writeBytes - length);
          block.set(part, length);
          from += part.length;
          length += part.length;
          if (length === this.#writeBytes) send();
          while (inFlight >= most) await answered();
        }
        if (failure) break;
      }
      if (length > 0 && !failure) send();
    } finally {
      while (inFlight > 0) await answered();
      giveBlock(block);
    }
    if (failure) await noRoom(Promise.reject(failure));
    return position;
  }

  #close(path: string, handle: Buffer, slowBytes = 0): Promise<void> {
    return this.#ask(`close "${path}"`, (done) => this.#sftp.close(handle, done), slowBytes);
  }

  async #sync(path: string, handle: Buffer, bytes: number): Promise<void> {
    if (!this.#syncs) return;
    try {
      await this.#ask<void>(`sync "${path}"`, (done) => this.#sftp.ext_openssh_fsync(handle, done), bytes);
    } catch (error) {
      if (!isNotOffered(error)) throw error;
      this.#syncs = false;
    }
  }

  async publish(name: string, bytes: number): Promise<void> {
    if (this.direct) return;
    const [from, to] = [this.#path(tempName(name)), this.#path(name)];
    const what = `rename "${from}" to "${to}"`;
    if (this.#renamesAsPosix) {
      try {
        return await this.#ask<void>(what, (done) => this.#sftp.ext_openssh_rename(from, to, done), bytes);
      } catch (error) {
        if (!isNotOffered(error)) throw error;
        this.#renamesAsPosix = false;
      }
    }
    await this.#ask<void>(what, (done) => this.#sftp.rename(from, to, done), bytes);
  }

  /** Set once the server has said neither yes nor no about a name. */
  #isBlind = false;

  /** A missing file is "denied" or a "failure" at some servers: it is there only if it can be opened or listed. */
  async stat(name: string): Promise<RemoteFile | undefined> {
    const path = this.#path(name);
    const what = `look at "${path}"`;
    try {
      return remoteFile(await this.#ask<Stats>(what, (done) => this.#sftp.stat(path, done)));
    } catch (error) {
      if (!(error instanceof StatusRefusal)) throw error;
      if (error.status === STATUS.noSuchFile) return undefined;
    }
    const handle = await this.#ask<Buffer>(what, (done) => this.#sftp.open(path, "r", done)).catch(ifRefused);
    if (handle) {
      const stats = await this.#ask<Stats>(what, (done) => this.#sftp.fstat(handle, done)).catch(ifRefused);
      await this.#close(path, handle).catch(ifRefused);
      if (stats?.size) return remoteFile(stats);
    }
    const listed = await this.#list(this.#folder).catch(ifRefused);
    const entry = listed?.find(({ filename }) => filename === name);
    if (entry) return remoteFile(entry.attrs);
    if (handle) throw new Refusal(`Cannot ${what}: it is there, and the server does not say its size`);
    this.#isBlind = true;
    return undefined;
  }

  async #list(folder: string, pages = LISTING_PAGES): Promise<FileEntryWithStats[]> {
    const what = `list "${folder}"`;
    const handle = await this.#ask<Buffer>(what, (done) => this.#sftp.opendir(folder, done));
    const entries: FileEntryWithStats[] = [];
    try {
      for (let page = 0; page < pages; page++) {
        const more = await this.#ask<FileEntryWithStats[] | false>(what, (done) =>
          this.#sftp.readdir(handle, done as Done<FileEntryWithStats[]>),
        ).catch((error) => {
          if (error instanceof StatusRefusal && error.status === STATUS.eof) return false as const;
          throw error;
        });
        if (!more || more.length === 0) break;
        entries.push(...more);
      }
    } finally {
      await this.#ask(what, (done) => this.#sftp.close(handle, done)).catch(ifRefused);
    }
    return entries;
  }

  async *read(name: string, most: number): AsyncIterable<Uint8Array> {
    const path = this.#path(name);
    const handle = await this.#ask<Buffer>(`read "${path}"`, (done) => this.#sftp.open(path, "r", done));
    const block = Buffer.alloc(BLOCK_BYTES);
    try {
      for (let position = 0; position < most; ) {
        const bytes = await this.#ask<number>(`read "${path}"`, (done) =>
          this.#sftp.read(handle, block, 0, Math.min(BLOCK_BYTES, most - position), position, done),
        );
        if (!bytes) return;
        yield block.subarray(0, bytes);
        position += bytes;
      }
    } finally {
      await this.#close(path, handle).catch(() => {});
    }
  }

  async remove(name: string): Promise<void> {
    const path = this.#path(name);
    await this.#ask<void>(`remove "${path}"`, (done) => this.#sftp.unlink(path, done)).catch((error) => {
      if (!(error instanceof StatusRefusal) || error.status !== STATUS.noSuchFile) throw error;
    });
  }

  close(): void {
    this.#connection.end(new TargetFault("connection", "The connection is closed"));
  }

  #ask<T>(what: string, send: (done: Done<T>) => unknown, slowBytes?: number): Promise<T> {
    return this.#connection.ask(what, send, slowBytes);
  }
}

/** An extension that the server does not offer, or that its config forbids (sftp-server -P). */
function isNotOffered(error: unknown): boolean {
  if (!(error instanceof StatusRefusal)) return false;
  return error.status === STATUS.unsupported || error.status === STATUS.permissionDenied;
}

function remoteFile({ size, mtime }: { size: number; mtime: number }): RemoteFile {
  return { bytes: size, ...(mtime > 0 && { modifiedAt: mtime * 1000 }) };
}

function ifRefused(error: unknown): undefined {
  if (error instanceof StatusRefusal) return undefined;
  throw error;
}

/**
 * A refused write, sync or close is never the name's fault: the disk is full, a quota is used up, or the disk is
 * broken. SFTP 3 has no status that says which.
 */
async function noRoom<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (cause) {
    if (!(cause instanceof StatusRefusal)) throw cause;
    const text = "The server takes no more data: no room, a quota, or a broken disk";
    throw new TargetFault("server", text, { cause });
  }
}

/** Blocks to write from, used again: fresh memory for each file costs more than copying. */
const spare: Buffer[] = [];
const SPARE_BLOCKS = 256;

function takeBlock(): Buffer {
  return spare.pop() ?? Buffer.allocUnsafeSlow(BLOCK_BYTES);
}

function giveBlock(block: Buffer): void {
  if (spare.length < SPARE_BLOCKS) spare.push(block);
}
