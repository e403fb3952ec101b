/**
 * Files over an SFTP channel: a write loop of our own. ssh2's fastPut reads until a size that it looked up
 * before, so that it never ends when the file shrinks, and cannot tell a short write.
 *
 * All files of a cycle share the channel. Requests go out without waiting for each answer, up to a bound over
 * all files; the server keeps their order per file (draft-ietf-secsh-filexfer-02, section 4.1).
 */
import { posix } from "node:path";
import type { Channel } from "./sftp.ts";
import { Refusal, type Target, TargetFault, tempName } from "./target.ts";

/** Largest write that every server takes, as ssh2 reckons it (section 3 of the draft: 34000 bytes a packet). */
const WRITE_BYTES = 31_952;
/** Write to servers that tell their limits (limits@openssh.com); ssh2 cuts it up if theirs is smaller. */
const LARGE_WRITE_BYTES = 130_560;
/** Bytes on their way, over all files of the connection: as much as OpenSSH's sftp, and its server's window. */
const MAX_IN_FLIGHT = 2 * 1024 * 1024;

/** How ssh2 answers. */
export type Answer<T> = (error: (Error & { code?: number }) | undefined | null, value: T) => void;

/** A connection whose requests all end: by their answer, or by the fault that ended the connection. */
export interface Wire {
  /** Sends one request. A status other than OK is a Refusal, which keeps the status. */
  ask<T>(what: string, send: (answer: Answer<T>) => unknown): Promise<T>;
  /** Ends the connection because of what happened on it. */
  lost: (cause?: unknown) => void;
  end(fault: TargetFault): void;
}

/** A status other than OK. */
export class StatusRefusal extends Refusal {
  readonly status: number;
  constructor(what: string, status: number, cause: Error) {
    super(`Cannot ${what}`, { cause });
    this.status = status;
  }
}

/** The folder on the server as a Target. */
export function remoteTarget(sftp: Channel, { ask, end }: Wire, folder: string): Target {
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
export const OP_UNSUPPORTED = 8;

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
