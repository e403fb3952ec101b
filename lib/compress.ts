/**
 * One delivered batch becomes its `.gz`: the one place that removes a file because another holds its content.
 *
 * Temp file, old time set, sync, read back and compared with the original (length and CRC-32), renamed, and only
 * then the original is removed. Before the rename a crash leaves a temp file, after it both files; the
 * next call compares them again before it removes the original. A `.gz` that is there is checked, not trusted.
 */
import { constants, createReadStream, createWriteStream } from "node:fs";
import { type FileHandle, lstat, open, rm, utimes } from "node:fs/promises";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { crc32, createGunzip, createGzip } from "node:zlib";
import { withState } from "./batch.ts";
import { failpoint, moveDurably, removeDurably, syncFile, TEMP_SUFFIX } from "./durable.ts";

/** Block size of the streams, in bytes. */
const BLOCK = 1 << 18;
/** The level of the gzip command. */
const LEVEL = 6;

/** Length and CRC-32 of a file's content; of a `.gz`, of what is inside. */
interface Content {
  bytes: number;
  crc: number;
}

/**
 * Replaces the sealed batch `name` in `folder` by its `.gz`, with the same modification time, and gives its size.
 *
 * `read` is told of each block's bytes. Throws when a `.gz` with other content is there (both stay), when the
 * file is a symlink (ELOOP) or gone (ENOENT), when `signal` is aborted, and the system's error.
 */
export async function compressFile(
  folder: string,
  name: string,
  { signal, read = () => {} }: { signal: AbortSignal; read?: (bytes: number) => void },
): Promise<number> {
  const from = join(folder, name);
  const to = join(folder, withState(name, "compressed"));
  const file = await open(from, constants.O_RDONLY | constants.O_NOFOLLOW);
  try {
    if (!(await holds(to, file, signal))) {
      await writeGzip(file, to, { signal, read });
      failpoint("housekeep:renamed");
    }
  } finally {
    await file.close();
  }
  const { size } = await lstat(to);
  await removeDurably(from); // safe: the .gz is on stable storage under its name, read back and compared
  failpoint("housekeep:removed");
  return size;
}

/** Whether the `.gz` is there and holds what `file` holds; a damaged one is removed. Throws when it holds else. */
async function holds(gz: string, file: FileHandle, signal: AbortSignal): Promise<boolean> {
  const there = await lstat(gz).catch((error: NodeJS.ErrnoException) => {
    if (error.code !== "ENOENT") throw error;
  });
  if (!there) return false;
  if (!there.isFile()) throw new Error(`Cannot compress: "${gz}" is there and not a file`);
  const inside = await readGzip(gz, signal);
  if (inside === undefined) {
    await removeDurably(gz);
    return false;
  }
  const original = { bytes: 0, crc: 0 };
  for await (const _ of measure(readBlocks(file), original)) signal.throwIfAborted();
  if (sameContent(inside, original)) return true;
  const sizes = `${inside.bytes} bytes inside, expected ${original.bytes}`;
  throw new Error(`Cannot compress: "${gz}" is there with other content (${sizes}); both stay`);
}

async function writeGzip(
  file: FileHandle,
  to: string,
  { signal, read }: { signal: AbortSignal; read: (bytes: number) => void },
): Promise<void> {
  const temp = to + TEMP_SUFFIX;
  const original = { bytes: 0, crc: 0 };
  const { mtimeMs } = await file.stat();
  try {
    await pipeline(
      measure(readBlocks(file), original, read),
      createGzip({ level: LEVEL, chunkSize: BLOCK }),
      createWriteStream(temp, { flags: "wx", mode: 0o640 }), // wx: never through a symlink
      { signal },
    );
    failpoint("housekeep:written");
    await utimes(temp, mtimeMs / 1000, mtimeMs / 1000);
    await syncFile(temp);
    const inside = await readGzip(temp, signal);
    if (inside === undefined || !sameContent(inside, original)) {
      throw new Error(`Cannot write "${temp}": it reads back differently, expected ${original.bytes} bytes`);
    }
    failpoint("housekeep:verified");
    await moveDurably(temp, to);
  } catch (error) {
    await rm(temp, { force: true }); // also when the disk is full: a part of a file helps nobody
    throw error;
  }
}

/** What is inside a `.gz`, or undefined when it is damaged or cut short. */
async function readGzip(path: string, signal: AbortSignal): Promise<Content | undefined> {
  const content = { bytes: 0, crc: 0 };
  const source = createReadStream(path, { highWaterMark: BLOCK });
  const drain = async (blocks: AsyncIterable<Buffer>) => {
    for await (const _ of measure(blocks, content));
  };
  try {
    await pipeline(source, createGunzip({ chunkSize: BLOCK }), drain, { signal });
    return content;
  } catch (error) {
    // An error of the file system has a system call, one of the data (Z_DATA_ERROR, Z_BUF_ERROR) has none.
    if (signal.aborted || (error as NodeJS.ErrnoException).syscall !== undefined) throw error;
    return undefined;
  }
}

/** The file from its beginning, in blocks. */
async function* readBlocks(file: FileHandle): AsyncGenerator<Buffer> {
  for (let position = 0; ; ) {
    const { bytesRead, buffer } = await file.read(Buffer.allocUnsafe(BLOCK), 0, BLOCK, position);
    if (bytesRead === 0) return;
    position += bytesRead;
    yield buffer.subarray(0, bytesRead);
  }
}

/** Hands the blocks on and notes their length and CRC-32 in `content`. */
async function* measure(
  blocks: AsyncIterable<Buffer>,
  content: Content,
  read: (bytes: number) => void = () => {},
): AsyncGenerator<Buffer> {
  for await (const block of blocks) {
    content.bytes += block.length;
    content.crc = crc32(block, content.crc);
    read(block.length);
    yield block;
  }
}

function sameContent(a: Content, b: Content): boolean {
  return a.bytes === b.bytes && a.crc === b.crc;
}
