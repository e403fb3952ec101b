/**
 * The bytes of a batch on their way out, measured while they are read once: lines and bytes, and on request
 * compressed and hashed. The same batch always gives the same bytes, so that a repeat is a repeat.
 */
import { createHash } from "node:crypto";
import { closeSync, openSync, readSync } from "node:fs";
import { Readable } from "node:stream";
import { createGzip } from "node:zlib";

const NEWLINE = 0x0a;

/** A local file could not be read; the cause says why. */
export class Unreadable extends Error {
  override name = "Unreadable";
}

/** Bytes that are read at once: OpenSSH's server takes no larger write. */
const CHUNK_BYTES = 261_120;
/** Blocks that were read into, to be used again: fresh memory for each file costs more than reading it. */
const blocks: Buffer[] = [];
const KEPT_BLOCKS = 8;

/**
 * The content of a local file in pieces; each piece is only valid until the next one is asked for. Throws
 * Unreadable. Read in place: the page cache is faster than the way through the thread pool.
 */
export async function* readChunks(path: string): AsyncGenerator<Uint8Array> {
  const attempt = <T>(work: () => T): T => {
    try {
      return work();
    } catch (cause) {
      throw new Unreadable(`Cannot read "${path}"`, { cause });
    }
  };
  const fd = attempt(() => openSync(path, "r"));
  const block = blocks.pop() ?? Buffer.allocUnsafeSlow(CHUNK_BYTES);
  try {
    for (;;) {
      const bytes = attempt(() => readSync(fd, block, 0, block.length, null));
      if (bytes === 0) return;
      yield block.subarray(0, bytes);
    }
  } finally {
    if (blocks.length < KEPT_BLOCKS) blocks.push(block);
    closeSync(fd);
  }
}

/** What is known of a content after it was read to its end. */
export interface Measured {
  /** Bytes that were given out, after compression. */
  bytes: number;
  /** `\n` in the batch itself. */
  lines: number;
  /** Of the bytes that were given out, in hex; when asked for. */
  sha256?: string;
}

/** A batch's content: `chunks` can be read to its end once, then `measured` is complete. */
export interface Content {
  chunks: AsyncIterable<Uint8Array>;
  measured: Measured;
}

/** Opens a batch for sending. `onBytes` is told how many bytes of the batch were read, each time. */
export function openContent(
  path: string,
  { gzip = false, hash = false, onBytes = (_: number) => {} } = {},
): Content {
  const measured: Measured = { bytes: 0, lines: 0 };
  const raw = measureLines(readChunks(path), measured, onBytes);
  return { measured, chunks: measureBytes(gzip ? compress(raw) : raw, measured, hash) };
}

/** Lines of a file that was not sent, for its report. Throws Unreadable. */
export async function countLines(path: string): Promise<number> {
  const { chunks, measured } = openContent(path);
  for await (const _ of chunks);
  return measured.lines;
}

async function* measureLines(
  chunks: AsyncIterable<Uint8Array>,
  measured: Measured,
  onBytes: (n: number) => void,
) {
  for await (const chunk of chunks) {
    for (let at = chunk.indexOf(NEWLINE); at >= 0; at = chunk.indexOf(NEWLINE, at + 1)) measured.lines++;
    onBytes(chunk.length);
    yield chunk;
  }
}

async function* measureBytes(chunks: AsyncIterable<Uint8Array>, measured: Measured, hash: boolean) {
  const sha256 = hash ? createHash("sha256") : undefined;
  for await (const chunk of chunks) {
    sha256?.update(chunk);
    measured.bytes += chunk.length;
    yield chunk;
  }
  if (sha256) measured.sha256 = sha256.digest("hex");
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
