/**
 * Files over an SFTP channel: a write loop of our own. ssh2's fastPut reads until a size that it looked up
 * before, so that it never ends when the file shrinks, and cannot tell a short write.
 *
 * All files of a cycle share the channel. Requests go out without waiting for each answer, up to a bound over
 * all files; the server keeps their order per file (draft-ietf-secsh-filexfer-02, section 4.1).
 */
import { posix } from "node:path";
import { type RemoteFile, type Session, STATUS, StatusRefusal } from "./filexfer.ts";
import { Refusal, type Target, TargetFault, tempName } from "./target.ts";

/**
 * Bytes on their way, over all files of the connection: to a server far away as much as OpenSSH's sftp sends and its
 * server's window takes; nearby half of it, which fits the caches of the processors and is faster.
 */
const MAX_IN_FLIGHT = { far: 2 * 1024 * 1024, near: 1024 * 1024 };
/** A server that answers within so many ms is nearby. */
const NEAR_MS = 10;
const READ_BYTES = 32_768;

/** The folder on the server as a Target; `close` ends the connection. */
export function remoteTarget(session: Session, folder: string, close: () => void): Target {
  const path = (name: string) => posix.join(folder, name);
  const budget = createBudget(session.answerMs < NEAR_MS ? MAX_IN_FLIGHT.near : MAX_IN_FLIGHT.far);
  // Until the server refuses: its config may forbid what it offers.
  let { offersSync, offersPosixRename } = session;

  async function upload(
    name: string,
    chunks: AsyncIterable<Uint8Array>,
    onWritten = () => {},
  ): Promise<void> {
    const temp = path(tempName(name));
    const file = await session.open(temp, "w").catch(async (error) => {
      if (error instanceof TargetFault) throw error;
      // Some servers let no file be written over (ProFTPD's AllowOverwrite): what a cut left must go first.
      await remove(tempName(name)).catch(() => {});
      return session.open(temp, "w");
    });
    let closed = false; // a handle's number is given to the next file: never close it twice
    const close = () => {
      closed = true;
      return session.close(file);
    };
    try {
      const written = await writeAll(file, chunks);
      onWritten();
      // Not one after the other: the server keeps the order, and each answer is looked at.
      const [size] = await Promise.all([session.sizeOf(file), sync(file), noRoom(close())]);
      if (size !== written)
        throw new Refusal(`Cannot upload "${temp}": remote size is ${size}, expected ${written}`);
    } catch (error) {
      if (!closed) await close().catch(() => {});
      await remove(tempName(name)).catch(() => {}); // gives back the room that it takes
      throw error;
    }
  }

  /** Writes with a bounded number of bytes on the way; gives the number written. */
  async function writeAll(file: RemoteFile, chunks: AsyncIterable<Uint8Array>): Promise<number> {
    const onTheWay = new Set<Promise<void>>();
    let written = 0;
    let failure: unknown;
    for await (const chunk of chunks) {
      for (let from = 0; from < chunk.length && !failure; from += session.writeBytes) {
        const bytes = chunk.subarray(from, from + session.writeBytes);
        await budget.take(bytes.length);
        const { taken, answered } = session.write(file, written, bytes);
        const landed = answered
          .catch((error) => {
            failure ??= error;
          })
          .finally(() => {
            budget.give(bytes.length);
            onTheWay.delete(landed);
          });
        onTheWay.add(landed);
        written += bytes.length;
        await taken; // the next chunk is read into the same memory
      }
      if (failure) break;
    }
    await Promise.all(onTheWay);
    if (failure) await noRoom(Promise.reject(failure));
    return written;
  }

  async function sync(file: RemoteFile): Promise<void> {
    if (!offersSync) return;
    await session.sync(file).catch((error) => {
      if (!isNotOffered(error)) return noRoom(Promise.reject(error));
      offersSync = false;
    });
  }

  async function publish(name: string): Promise<void> {
    const [from, to] = [path(tempName(name)), path(name)];
    if (offersPosixRename) {
      try {
        return await session.posixRename(from, to);
      } catch (error) {
        if (!isNotOffered(error)) throw error;
        offersPosixRename = false;
      }
    }
    await session.rename(from, to);
  }

  async function* read(name: string): AsyncIterable<Uint8Array> {
    const file = await session.open(path(name), "r");
    try {
      for (let position = 0; ; ) {
        const bytes = await session.read(file, position, READ_BYTES);
        if (bytes.length === 0) return;
        yield bytes;
        position += bytes.length;
      }
    } finally {
      await session.close(file).catch(() => {});
    }
  }

  async function remove(name: string): Promise<void> {
    await session.remove(path(name)).catch(ifMissing);
  }

  return {
    upload,
    publish,
    size: (name) => session.size(path(name)).catch(ifMissing),
    read,
    remove,
    close,
  };
}

/** An extension that the server offers and its config forbids (sftp-server -P). */
function isNotOffered(error: unknown): boolean {
  if (!(error instanceof StatusRefusal)) return false;
  return error.status === STATUS.unsupported || error.status === STATUS.permissionDenied;
}

function ifMissing(error: unknown): undefined {
  if (error instanceof StatusRefusal && error.status === STATUS.noSuchFile) return undefined;
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
