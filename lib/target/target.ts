/**
 * Where batches go. One interface for `sftp://` and `file://`, one set of rules for both: a file is written whole
 * under a temp name and gets its own name by one rename; or, with `direct`, it is written under its name. Which of
 * a target's refusals concern one file and which concern all of them is decided here and in sftp.ts, the layers
 * that know; whoever calls decides what is tried again.
 */
import { createHash } from "node:crypto";
import { closeSync, openSync, readSync } from "node:fs";
import { rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { createGzip } from "node:zlib";
import { LEDGER } from "../batch.ts";
import { exists, ifMissing, makeFolder, moveDurably, TEMP_SUFFIX, writeStream } from "../durable.ts";
import type { FaultKind } from "../signs.ts";

/** An open target. It throws a TargetFault when the target itself is at fault, a Refusal when it answered no. Every wait ends after the timeout. */
export interface Target {
  /** Files are written under their own name, without a rename. */
  readonly direct: boolean;
  /**
   * Writes `chunks` under the temp name of `name` (`direct`: under the name), from nothing. When it returns, the
   * file has the size of what was written, compared, and is on stable storage as far as the target offers that.
   * `onWritten` is called when only that is left to wait for: the next file may be begun.
   */
  upload(name: string, chunks: AsyncIterable<Uint8Array>, onWritten?: () => void): Promise<void>;
  /**
   * Renames the temp file of `bytes` bytes to `name`; where that is refused, the temp file goes. The caller has looked that
   * there is no such file: some targets replace it. With `direct` there is nothing to do.
   */
  publish(name: string, bytes: number): Promise<void>;
  stat(name: string): Promise<RemoteFile | undefined>;
  /** The file's content, of which no more than `most` bytes are read. */
  read(name: string, most: number): AsyncIterable<Uint8Array>;
  /** Removes the file; one that is gone already is no error. */
  remove(name: string): Promise<void>;
  close(): void;
}

export interface RemoteFile {
  bytes: number;
  /** Milliseconds since the epoch, by the target's clock; some targets don't say. */
  modifiedAt?: number;
}

export function tempName(name: string): string {
  return name + TEMP_SUFFIX;
}

/** The target cannot take files at the moment, whichever: nobody's file is to blame. */
export class TargetFault extends Error {
  override name = "TargetFault";
  readonly kind: FaultKind;
  constructor(kind: FaultKind, message: string, options?: ErrorOptions) {
    super(message, options);
    this.kind = kind;
  }
}

/** The target answered no to one operation on one name; whether others would be taken must be tried. */
export class Refusal extends Error {
  override name = "Refusal";
}

// ---- a local or mounted folder

/** A folder, which is made when it is missing. Throws a TargetFault when it cannot be made. */
export async function openFileTarget(folder: string, { direct = false } = {}): Promise<Target> {
  if (await exists(join(folder, LEDGER)))
    throw new TargetFault(
      "local",
      `"${folder}" is a sender's folder of the receiver: name another one in target`,
    );
  await makeFolder(folder).catch((cause) => {
    throw new TargetFault("server", `Cannot create the folder "${folder}"`, { cause });
  });
  const path = (name: string) => join(folder, name);
  const written = (name: string) => path(direct ? name : tempName(name));
  return {
    direct,
    upload: (name, chunks) => writeWhole(written(name), chunks),
    publish: async (name) => {
      if (direct) return;
      const [from, to] = [written(name), path(name)];
      try {
        if (await exists(to)) throw new Refusal(`Cannot rename "${from}": "${to}" exists already`); // a link to nothing
        await wrapError(`rename to "${to}"`, moveDurably(from, to));
      } catch (error) {
        if (error instanceof Refusal) await rm(from, { force: true }).catch(() => {});
        throw error;
      }
    },
    stat: (name) => wrapError(`look at "${path(name)}"`, statFile(path(name))),
    read: (name, most) => atMost(readChunks(path(name)), most),
    remove: (name) => wrapError(`remove "${path(name)}"`, rm(path(name), { force: true })),
    close: () => {},
  };
}

async function writeWhole(path: string, chunks: AsyncIterable<Uint8Array>): Promise<void> {
  const { written, size } = await wrapError(`write "${path}"`, writeStream(path, chunks));
  if (size !== written)
    throw new Refusal(`Cannot upload "${path}": its size is ${size}, expected ${written}`);
}

async function statFile(path: string): Promise<RemoteFile | undefined> {
  const found = await ifMissing(stat(path));
  return found && { bytes: found.size, modifiedAt: found.mtimeMs };
}

/** Errors of the file system or the mount as a whole; any other may be one name's. */
const FAULTS = /^(ENOSPC|EDQUOT|EROFS|EIO|ESTALE|ENOTCONN|ENODEV|ETIMEDOUT|EHOSTDOWN)$/;

/** Names what was tried, and tells a fault of the target from a refusal. */
async function wrapError<T>(what: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (cause) {
    const { code } = cause as NodeJS.ErrnoException;
    if (!code) throw cause; // not the target's: the batch could not be read
    if (FAULTS.test(code)) throw new TargetFault("server", `Cannot ${what}`, { cause });
    throw new Refusal(`Cannot ${what}`, { cause });
  }
}

// ---- the bytes of a batch on their way out

export class Unreadable extends Error {
  override name = "Unreadable";
}

/** Blocks of so many bytes that are used again, `most` of them: fresh memory for each file costs more than all else. */
export function keepBlocks(bytes: number, most: number) {
  const spare: Buffer[] = [];
  return {
    take: () => spare.pop() ?? Buffer.allocUnsafeSlow(bytes),
    give(block: Buffer): void {
      if (spare.length < most) spare.push(block);
    },
  };
}

const BLOCKS = keepBlocks(261_120, 8);

/** The content of a local file in pieces, each valid until the next is asked for; in place: the thread pool costs more. Throws Unreadable. */
export async function* readChunks(path: string): AsyncGenerator<Uint8Array> {
  const attempt = <T>(work: () => T): T => {
    try {
      return work();
    } catch (cause) {
      throw new Unreadable(`Cannot read "${path}"`, { cause });
    }
  };
  const fd = attempt(() => openSync(path, "r"));
  const block = BLOCKS.take();
  try {
    for (;;) {
      const bytes = attempt(() => readSync(fd, block, 0, block.length, null));
      if (bytes === 0) return;
      yield block.subarray(0, bytes);
    }
  } finally {
    BLOCKS.give(block);
    closeSync(fd);
  }
}

export async function* atMost(chunks: AsyncIterable<Uint8Array>, most: number): AsyncGenerator<Uint8Array> {
  let left = most;
  for await (const chunk of chunks) {
    yield chunk.subarray(0, left);
    left -= chunk.length;
    if (left <= 0) return;
  }
}

/** What is known of a content after it was read to its end. */
export interface Measured {
  /** Bytes that were given out, after compression. */
  bytes: number;
  /** `\n` in the batch itself. */
  lines: number;
  /** SHA-256 of the bytes that were given out, in hex. */
  sha256: string;
}

/** A batch on its way out: `chunks` can be read once, then `measured` is complete; always the same bytes. `onBytes`: of the batch, read each time. */
export function openContent(
  raw: AsyncIterable<Uint8Array>,
  { gzip = false, onBytes = (_: number) => {} } = {},
): { chunks: AsyncIterable<Uint8Array>; measured: Measured } {
  const measured: Measured = { bytes: 0, lines: 0, sha256: "" };
  const counted = async function* () {
    for await (const chunk of raw) {
      for (let at = chunk.indexOf(0x0a); at >= 0; at = chunk.indexOf(0x0a, at + 1)) measured.lines++;
      onBytes(chunk.length);
      yield chunk;
    }
  };
  const hashed = async function* () {
    const sha256 = createHash("sha256");
    for await (const chunk of gzip ? compress(counted()) : counted()) {
      sha256.update(chunk);
      measured.bytes += chunk.length;
      yield chunk;
    }
    measured.sha256 = sha256.digest("hex");
  };
  return { chunks: hashed(), measured };
}

export async function measure(...content: Parameters<typeof openContent>): Promise<Measured> {
  const { chunks, measured } = openContent(...content);
  for await (const _ of chunks);
  return measured;
}

/** gzip without a name or a time in its header. */
async function* compress(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
  const copies = async function* () {
    for await (const chunk of chunks) yield Buffer.from(chunk); // zlib reads it after the block is filled again
  };
  const source = Readable.from(copies(), { objectMode: false });
  const gzip = createGzip();
  source.on("error", (error) => gzip.destroy(error));
  yield* source.pipe(gzip) as AsyncIterable<Uint8Array>;
}
