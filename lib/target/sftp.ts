/**
 * A Target of an SFTP server: one connection, whose requests all end, by an answer, by their time limit, by the signal
 * or with the connection, and one channel or several, over which files are written.
 *
 * Servers differ, and a habit of one must not be taken for the fault of a file: sizes are asked by name after CLOSE
 * (object stores know a file only then), a missing file may be "denied", extensions may be offered and refused.
 */
import type { Socket } from "node:net";
import { posix } from "node:path";
import type { Client, FileEntryWithStats, SFTPWrapper, Stats } from "ssh2";
import type { Config } from "../config.ts";
import { collectGarbage } from "../runtime.ts";
import { logIn, plainText, type ServerAddress, serverOf } from "./login.ts";
import { keepBlocks, Refusal, type RemoteFile, type Target, TargetFault, tempName } from "./target.ts";

/** Bytes of one file on their way at once: half of what a server of OpenSSH takes, for memory and caches. */
const WINDOW_BYTES = 1_048_576;
/** One read or write: every server takes it (draft-ietf-secsh-filexfer-02 section 3), and ssh2 sends it as one packet. */
const BLOCK_BYTES = 31_952;
const BLOCKS = keepBlocks(BLOCK_BYTES, 256);
/** After so many bytes the packets that ssh2 made of them are collected. */
const COLLECT_BYTES = 4_194_304;
/** A slow disk or line: what closes, syncs or renames a file, and what is on its way, gets a second more for so many bytes. */
const SLOW_DISK = 4 * 1024 * 1024;
const SLOW_LINE = 65_536;
/** A connection on which bytes come but no answer is given up after so many times the limit. */
const PATIENCE = 10;
/** So many files of a connection go over its one channel before more are asked for: most passes need none. */
const ALONE = 32;
/** Pages of a listing that are read at most, to look for one name. */
const LISTING_PAGES = 1000;

const STATUS = { eof: 1, noSuchFile: 2, permissionDenied: 3, failure: 4, unsupported: 8 } as const;

/** A status other than OK (draft section 7). */
class StatusRefusal extends Refusal {
  readonly status: number;
  constructor(what: string, status: number, cause: Error) {
    super(`Cannot ${what}`, { cause: new Error(plainText(cause.message)) });
    this.status = status;
  }
}

/** Logs in and opens the SFTP channel. Throws a TargetFault that says which of the steps failed. */
export async function openSftpTarget(config: Config["forwarder"], signal: AbortSignal): Promise<Target> {
  const server = serverOf(config);
  const { client, socket } = await logIn(server, signal);
  const connection = new Connection(client, socket, server, signal);
  try {
    const sftp = await connection.ask<SFTPWrapper>("start SFTP", (done) => client.sftp(done));
    const first = new SftpTarget(sftp, connection, config.upload === "direct");
    return overChannels(first, connection, config.parallel);
  } catch (cause) {
    const fault =
      cause instanceof TargetFault && cause.kind !== "connection"
        ? cause
        : new TargetFault("server", `${server.at} gives no SFTP to "${server.login.username}"`, { cause });
    connection.end(fault);
    throw signal.aborted ? cause : fault;
  }
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
  readonly server: ServerAddress;
  readonly #client: Client;
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
    this.server = server;
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
      const limitMs = this.server.timeoutMs + (1000 * slowBytes) / SLOW_DISK;
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
        if (isMissing) return done(Object.assign(error as Error, { code: STATUS.unsupported }));
        this.#inFlight.delete(request);
        reject(error);
      }
    });
  }

  get isOver(): boolean {
    return this.#over !== undefined;
  }

  /** Asks for one more channel, without a wait or a limit: `answered` is told whether there is one. */
  openChannel(answered: (sftp: SFTPWrapper | undefined) => void): void {
    try {
      this.#client.sftp((error, sftp) => {
        if (!this.#over) answered(error ? undefined : sftp);
      });
    } catch {
      // thrown when the connection is over: what is asked next is told
    }
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
    this.end(new TargetFault("connection", `The connection to ${this.server.at} was lost`, options));
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

// ---- channels

/** So many channels a server gives, by `host:port`: one that refused the next, or hung up at it, is not asked for it again. */
const GIVEN = new Map<string, number>();

/**
 * The files of a long queue take turns on several channels: OpenSSH serves each by a process of its own, which stands
 * still while a file is put on its disk. What is asked about a name goes over the first one; a file is renamed over
 * that which wrote it. Nobody waits for a channel: a server that gives no more is as fast as it was.
 */
function overChannels(first: SftpTarget, connection: Connection, parallel: number): Target {
  const { at } = connection.server;
  const open = [first];
  const writers = new Map<string, SftpTarget>();
  let uploads = 0;
  /** Takes back what is noted of a question that has no answer yet. */
  let unask: () => unknown = () => {};
  /** One after the other, as long as they are given. */
  const openMore = () => {
    const known = GIVEN.get(at) ?? Number.POSITIVE_INFINITY;
    if (open.length >= Math.min(parallel, known)) return;
    GIVEN.set(at, open.length); // should it hang up, or say no
    unask = () => GIVEN.set(at, known);
    connection.openChannel((sftp) => {
      if (sftp) unask();
      unask = () => {};
      if (!sftp) return;
      open.push(new SftpTarget(sftp, connection, first.direct));
      openMore();
    });
  };
  return {
    direct: first.direct,
    upload: async (name, chunks, onWritten) => {
      if (++uploads === ALONE) openMore();
      const writer = open[uploads % open.length] ?? first;
      await writer.upload(name, chunks, onWritten);
      writers.set(name, writer);
    },
    publish: async (name, bytes) => {
      const writer = writers.get(name) ?? first;
      writers.delete(name);
      await writer.publish(name, bytes);
    },
    stat: (name) => first.stat(name),
    read: (name, most) => first.read(name, most),
    remove: (name) => first.remove(name),
    close: () => {
      if (!connection.isOver) unask(); // it was us who did not wait
      connection.end(new TargetFault("connection", "The connection is closed"));
    },
  };
}

// ---- files

/** The files of one channel. */
class SftpTarget implements Omit<Target, "close"> {
  readonly direct: boolean;
  readonly #sftp: SFTPWrapper;
  readonly #connection: Connection;
  readonly #folder: string;
  /** The most bytes that one write may have: fewer where the server says so. */
  readonly #writeBytes: number;
  /** A file that was closed has told its size by its name: the next ones are not asked before they are closed. */
  #namesTell = false;
  // Until the server refuses: its config may forbid what it offers.
  #syncs = true;
  #renamesAsPosix = true;

  constructor(sftp: SFTPWrapper, connection: Connection, direct: boolean) {
    sftp.on("error", connection.lost).on("close", connection.lost).on("end", connection.lost);
    this.#sftp = sftp;
    this.#connection = connection;
    this.#folder = connection.server.folder;
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
      const early = this.#namesTell ? undefined : this.#statHandle(path, handle).catch(ifRefused);
      const synced = this.#sync(path, handle, bytes);
      closed = true;
      const close = this.#close(path, handle, bytes);
      const atOnce = this.#statPath(path).catch(ifRefused);
      const [stats, , , named] = await Promise.all([early, noRoom(synced), noRoom(close), atOnce]);
      if (named?.size === bytes) {
        this.#namesTell = true;
        return;
      }
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
      if (await this.#statPath(path).catch(ifRefused)) {
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
    let block = BLOCKS.take();
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
          BLOCKS.give(sent);
          wakeup();
        });
      block = BLOCKS.take();
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
      BLOCKS.give(block);
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
    await this.#rename(this.#path(tempName(name)), this.#path(name), bytes).catch(async (error) => {
      if (error instanceof StatusRefusal) await this.remove(tempName(name)).catch(() => {}); // some delete nothing
      throw error;
    });
  }

  async #rename(from: string, to: string, bytes: number): Promise<void> {
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
      return remoteFile(await this.#statPath(path));
    } catch (error) {
      if (!(error instanceof StatusRefusal)) throw error;
      if (error.status === STATUS.noSuchFile) return undefined;
    }
    const handle = await this.#ask<Buffer>(what, (done) => this.#sftp.open(path, "r", done)).catch(ifRefused);
    if (handle) {
      const stats = await this.#statHandle(path, handle).catch(ifRefused);
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

  #statPath(path: string): Promise<Stats> {
    return this.#ask(`look at "${path}"`, (done) => this.#sftp.stat(path, done));
  }

  #statHandle(path: string, handle: Buffer): Promise<Stats> {
    return this.#ask(`look at "${path}"`, (done) => this.#sftp.fstat(handle, done));
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
