/**
 * The only place that knows Bun from Deno: the HTTP server, the HTTP client's certificates, and the calls
 * of the system that `node:` does not have (file locks, syncfs). Everything else is `node:` imports and web standards.
 */
import { createHash } from "node:crypto";
import { closeSync, fchmodSync, fchownSync, fstatSync, openSync, statSync } from "node:fs";
import { connect } from "node:net";
import { constants, platform } from "node:os";
import { dirname } from "node:path";
import { createServer, type TLSSocket } from "node:tls";

/** PEM texts of a server; with `clientCa` a client must show a certificate, with `clientNames` its names are told. */
export interface Tls {
  cert: string;
  key: string;
  clientCa?: string;
  clientNames?: boolean;
}

export interface ServeOptions {
  hostname: string;
  port: number;
  maxBodyBytes: number;
  idleTimeoutSeconds: number;
  tls?: Tls;
  /** `names`: what the client's certificate is for, with `clientNames`. */
  fetch: (request: Request, peer: string, names?: string[]) => Response | Promise<Response>;
}

/** A listening server. `close` stops accepting and ends when the requests in hand are answered, or cuts them off with `force`. */
export interface Server {
  port: number;
  close: (force?: boolean) => Promise<void>;
}

// The few members of each runtime that are used, so that neither runtime's checker needs the other's types.
interface BunRuntime {
  serve(options: object): { port: number; stop(force?: boolean): Promise<void> };
  gc(inPlace: boolean): void;
}
interface BunServer {
  requestIP(request: Request): { address: string; port: number } | null;
  timeout(request: Request, seconds: number): void;
}
interface DenoRuntime {
  serve(
    options: object,
    handler: (request: Request, info: DenoInfo) => Response | Promise<Response>,
  ): {
    addr: { port: number };
    shutdown(): Promise<void>;
  };
  createHttpClient(options: object): unknown;
  openSync(path: string, options: object): { tryLockSync(exclusive: boolean): boolean; close(): void };
}
interface DenoInfo {
  remoteAddr: { hostname: string };
}
const { Bun: bun, Deno: deno } = globalThis as unknown as { Bun?: BunRuntime; Deno?: DenoRuntime };

export const runtime: string = bun
  ? `bun ${(bun as unknown as { version: string }).version}`
  : `deno ${(deno as unknown as { version: { deno: string } }).version.deno}`;

/** Starts an HTTP(S) server. Throws the system's error when the port is taken or not permitted. */
export function serve(options: ServeOptions): Server {
  return deno ? serveOnDeno(deno, options) : serveOnBun(bun as BunRuntime, options);
}

/** A connection that has not sent a byte of a request for so long is closed; one in mid-request has its own time. */
const SILENT_SECONDS = 10;

function serveOnBun(runtime: BunRuntime, options: ServeOptions): Server {
  const { tls } = options;
  if (tls?.clientCa && tls.clientNames) return serveNamed(runtime, options);
  const seconds = Math.min(255, Math.max(1, Math.round(options.idleTimeoutSeconds)));
  const server = runtime.serve({
    hostname: options.hostname,
    port: options.port,
    maxRequestBodySize: options.maxBodyBytes,
    idleTimeout: Math.min(SILENT_SECONDS, seconds),
    ...(tls && {
      tls: {
        cert: tls.cert,
        key: tls.key,
        ...(tls.clientCa && { ca: tls.clientCa, requestCert: true, rejectUnauthorized: true }),
      },
    }),
    fetch: (request: Request, self: BunServer) => {
      self.timeout(request, seconds);
      return options.fetch(withUrl(request), self.requestIP(request)?.address ?? "");
    },
  });
  return { port: server.port, close: (force) => server.stop(force) };
}

/** A request without a Host, as health checks send it by HTTP/1.0, has only a path for an URL. */
function withUrl(request: Request): Request {
  return request.url.startsWith("/") ? new Request(`http://localhost${request.url}`, request) : request;
}

/**
 * Bun's server does not tell a request's client certificate; its TLS sockets do. So they stand in front, and pass the
 * bytes on to a server on loopback, which knows a connection, and whose it is, by its port: no other is answered.
 */
function serveNamed(runtime: BunRuntime, options: ServeOptions): Server {
  const clients = new Map<number, { peer: string; names: string[] }>();
  const sockets = new Set<TLSSocket>();
  const seconds = Math.max(1, options.idleTimeoutSeconds);
  const inner = runtime.serve({
    hostname: "127.0.0.1",
    port: 0,
    maxRequestBodySize: options.maxBodyBytes,
    idleTimeout: Math.min(255, Math.round(seconds) + SILENT_SECONDS),
    fetch: (request: Request, self: BunServer) => {
      const client = clients.get(self.requestIP(request)?.port ?? 0);
      if (!client) return new Response(null, { status: 403 });
      return options.fetch(withUrl(request), client.peer, client.names);
    },
  });
  const { cert, key, clientCa } = options.tls as Tls;
  const context = { cert, key, ca: clientCa, requestCert: true, rejectUnauthorized: true };
  const front = createServer({ ...context, handshakeTimeout: SILENT_SECONDS * 1000 }, (socket) => {
    const client = { peer: socket.remoteAddress ?? "", names: namesOf(socket) };
    const back = connect(inner.port, "127.0.0.1", () => {
      clients.set(back.localPort as number, client);
      socket.pipe(back).pipe(socket);
    });
    const end = () => {
      clients.delete(back.localPort as number);
      sockets.delete(socket);
      socket.destroy();
      back.destroy();
    };
    sockets.add(socket);
    socket.setTimeout((seconds + SILENT_SECONDS) * 1000, end);
    for (const one of [socket, back]) one.on("error", end).on("close", end);
  });
  front.on("tlsClientError", () => {}); // without a certificate that fits: cut off
  front.listen(options.port, options.hostname);
  const address = front.address();
  const port = typeof address === "object" && address ? address.port : options.port;
  const close = async (force?: boolean) => {
    front.close();
    if (force) for (const socket of sockets) socket.destroy();
    await inner.stop(force);
    for (const socket of sockets) socket.destroy();
  };
  return { port, close };
}

/** The common name and the alternative names of a client's certificate, in lower case. */
function namesOf(socket: TLSSocket): string[] {
  const { subject, subjectaltname = "" } = socket.getPeerCertificate();
  const others = subjectaltname.split(", ").map((name) => name.replace(/^(?:DNS|IP Address):/, ""));
  return [subject?.CN, ...others].flatMap((name) => (name ? [String(name).toLowerCase()] : []));
}

function serveOnDeno(runtime: DenoRuntime, options: ServeOptions): Server {
  const { tls } = options;
  if (tls?.clientCa)
    throw new Error("receiver.tls.clientCa needs Bun: Deno.serve asks for no client certificate");
  const server = runtime.serve(
    {
      hostname: options.hostname,
      port: options.port,
      onListen: () => {},
      ...(tls && { cert: tls.cert, key: tls.key }),
    },
    (request, info) => options.fetch(request, info.remoteAddr.hostname),
  );
  return { port: server.addr.port, close: () => server.shutdown() };
}

/** What a client shows and trusts, PEM texts, and the proxy on its way; all optional. */
export interface ClientTls {
  ca?: string;
  cert?: string;
  key?: string;
  proxy?: string | undefined;
}

/**
 * A `fetch` that trusts `ca` (beside nothing else, when given) and shows a client certificate. It follows neither a redirect,
 * which would carry a token elsewhere, nor the environment's proxies and certificates.
 */
export function fetchWith({ ca, cert, key, proxy }: ClientTls): typeof fetch {
  const client = cert ? { cert, key } : {}; // Bun takes "" for a certificate that is wrong
  if (deno) for (const name of PROXY_VARIABLES) delete process.env[name];
  const extra = deno
    ? {
        client: deno.createHttpClient({
          ...(ca && { caCerts: [ca] }),
          ...client,
          ...(proxy && { proxy: { url: proxy } }),
        }),
      }
    : { tls: { rejectUnauthorized: true, ...(ca && { ca }), ...client }, proxy: proxy ?? false };
  return ((input: string | URL | Request, init?: RequestInit) =>
    fetch(input, { redirect: "manual", ...init, ...extra } as RequestInit)) as typeof fetch;
}

const PROXY_VARIABLES = ["HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"].flatMap((name) => [
  name,
  name.toLowerCase(),
]);

/**
 * Gives a file of ours to those whom `folder` is for: what root makes gets the owner of `like`, and in a folder that its group
 * shares (setgid, and writable for it) the group may write what it may read, whatever the umask.
 */
export function giveTo(fd: number, folder: string, like = folder): void {
  const [own, me] = [fstatSync(fd), process.getuid?.()];
  if (me === undefined || own.uid !== me) return;
  const { uid, gid } = me === 0 ? statSync(like) : own;
  if (uid !== own.uid || gid !== own.gid) fchownSync(fd, uid, gid);
  const isShared = (statSync(folder).mode & 0o2020) === 0o2020;
  if (isShared && (own.mode & 0o060) === 0o040) fchmodSync(fd, (own.mode & 0o777) | 0o020);
}

/** What its holder lets go. */
export interface Lock {
  release: () => void;
}

const LOCK_EXCLUSIVE_NONBLOCKING = 2 | 4; // flock(2): LOCK_EX | LOCK_NB

/** Takes the kernel's exclusive lock (flock(2)) on a file, which it creates, until `release` or the end of the process; undefined when another one has it. */
export async function tryLock(path: string): Promise<Lock | undefined> {
  if (deno) {
    const file = deno.openSync(path, { create: true, read: true, write: true });
    if (file.tryLockSync(true)) return { release: () => file.close() };
    file.close();
    return undefined;
  }
  locks ??= await loadLocks();
  const fd = openSync(path, "a+", 0o640);
  giveTo(fd, dirname(path));
  try {
    if (isLocked(locks.flock(fd, LOCK_EXCLUSIVE_NONBLOCKING), path)) return { release: () => closeSync(fd) };
  } catch (error) {
    closeSync(fd);
    throw error;
  }
  closeSync(fd);
  return undefined;
}

/** What a call for a lock says: taken, or held by another. Throws what the system says else, as some file systems do. */
function isLocked(result: number, path: string): boolean {
  if (result === 0) return true;
  const errno = locks?.errno() ?? 0;
  const [name] = Object.entries(constants.errno).find(([, number]) => number === errno) ?? [`errno ${errno}`];
  if (name === "EAGAIN" || name === "EACCES") return false;
  const why = `its file system has no locks (${name}): put it on a local one, or mount it with locks`;
  throw Object.assign(new Error(`Cannot lock ${path}: ${why}`), { code: name });
}

interface LockCalls {
  flock: (fd: number, operation: number) => number;
  fcntl: (fd: number, command: number, lock: Uint8Array) => number;
  errno: () => number;
}
let locks: LockCalls | undefined;

/** flock(2) and fcntl(2) are in neither `node:fs` nor Bun's own API, so they are called in the C library. */
async function loadLocks(): Promise<LockCalls> {
  const library = await openLibrary({
    flock: { args: ["i32", "i32"], returns: "i32" },
    fcntl: { args: ["i32", "i32", "ptr"], returns: "i32" },
    [ERRNO]: { args: [], returns: "ptr" },
  });
  const { read } = await import(FFI);
  return {
    flock: library.flock as LockCalls["flock"],
    fcntl: library.fcntl as LockCalls["fcntl"],
    errno: () => read.i32((library[ERRNO] as () => number)()),
  };
}

const ERRNO = platform() === "linux" ? "__errno_location" : "__error";

/**
 * Locks of any number of names in a folder, by one descriptor: a byte each of one file, at a place that the name's hash
 * gives (fcntl(2), F_OFD_SETLK). As those of `tryLock` they end with the process. Elsewhere than on Linux each is a file.
 */
export class NameLocks {
  readonly #path: string;
  #fd = -1;

  constructor(path: string) {
    this.#path = path;
  }

  /** Undefined when another process has it, or another object of this one. */
  async take(name: string): Promise<Lock | undefined> {
    if (deno || platform() !== "linux") return tryLock(`${this.#path}-${name}`);
    locks ??= await loadLocks();
    if (this.#fd < 0) {
      this.#fd = openSync(this.#path, "a+", 0o640);
      giveTo(this.#fd, dirname(this.#path));
    }
    const [fd, path] = [this.#fd, this.#path];
    if (!isLocked(locks.fcntl(fd, F_OFD_SETLK, rangeOf(name, F_WRLCK)), path)) return undefined;
    return { release: () => void locks?.fcntl(fd, F_OFD_SETLK, rangeOf(name, F_UNLCK)) };
  }

  close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}

const [F_OFD_SETLK, F_WRLCK, F_UNLCK] = [37, 1, 2];

/** `struct flock` of 64-bit Linux: type, whence (the file's start), start, length 1, process 0. */
function rangeOf(name: string, type: number): Uint8Array {
  const lock = Buffer.alloc(32);
  lock.writeUInt16LE(type, 0);
  createHash("sha256").update(name).digest().copy(lock, 8, 0, 6);
  lock.writeUInt8(1, 16);
  return lock;
}

/** Lets the collector run now, beside what goes on: fresh memory for much garbage in buffers costs more. Deno can't be asked. */
export function collectGarbage(): void {
  bun?.gc(false);
}

/** Not a literal where it is imported: Deno's checker would refuse the scheme. */
const FFI = "bun:ffi" as string;

async function openLibrary(symbols: Record<string, object>): Promise<Record<string, unknown>> {
  const { dlopen } = await import(FFI);
  for (const library of ["libc.so.6", "libc.so", "libc.musl-x86_64.so.1", "libSystem.dylib"]) {
    try {
      return dlopen(library, symbols).symbols;
    } catch {
      // not this system's name for it
    }
  }
  throw new Error(`Cannot call ${Object.keys(symbols)}: found no C library`);
}
