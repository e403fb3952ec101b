/**
 * Which file is this, and which of its bytes are whole lines.
 *
 * A log file is known by its key (inode and time of birth) and by marks: hashes of its first bytes and of the
 * bytes just before offsets that were shipped. The key survives a rename; the marks survive copying and
 * compressing, and tell when an inode was reused or a file was truncated and has grown past the old offset
 * again. Both are read from the open handle, never from the path.
 */
import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { Readable } from "node:stream";
import { createGunzip, createZstdDecompress } from "node:zlib";
import { OperatorError } from "../service.ts";

const NEWLINE = 0x0a;

/** Longest stretch of bytes that one mark covers. */
export const MARK_BYTES = 1024;

/** How many marks a stream keeps: the head, the newest, and ever fewer of the older ones. */
const MARKS = 32;

/** A hash of the `length` bytes before `end`. */
export interface Mark {
  end: number;
  length: number;
  hash: string;
}

export type Compression = "gzip" | "zstd";

/** An open log file. Positions are bytes of the log itself, also when the file is compressed. */
export interface LogFile {
  path: string;
  /** Inode and time of birth: the same under every name of the file. */
  key: string;
  compression: Compression | undefined;
  /** Fills `into` from `position`; fewer bytes than asked for mean the present end of the file. */
  read(into: Uint8Array, position: number): Promise<number>;
  /** Size in bytes on disk now, and the time of the last write in ms. */
  stat(): Promise<{ size: number; mtimeMs: number }>;
  close(): Promise<void>;
}

/** A compressed file that ends in the middle: it is still being written, or damaged. */
export class UnfinishedFile extends Error {}

/** Inode and time of birth of a file, from its (bigint) stat; Deno knows the birth to the millisecond only. */
export function fileKey(stat: { ino: bigint; birthtimeMs: bigint }): string {
  return `${stat.ino}:${stat.birthtimeMs}`;
}

/**
 * Opens a log file, a compressed one by its ending. Throws the system's error, an OperatorError for what is no
 * regular file (a FIFO or a directory), an UnfinishedFile for a `.gz` without a header.
 */
export async function openLog(path: string): Promise<LogFile> {
  const handle = await open(path, constants.O_RDONLY | constants.O_NONBLOCK); // a FIFO must not block
  try {
    const stat = await handle.stat({ bigint: true });
    if (!stat.isFile()) {
      throw new OperatorError(`Cannot follow "${path}": it is ${kindOf(stat)}, expected a regular file`);
    }
    const compression = path.endsWith(".gz") ? "gzip" : path.endsWith(".zst") ? "zstd" : undefined;
    const inflated = compression && createInflatedReader(handle, compression, path);
    return {
      path,
      key: fileKey(stat),
      compression,
      read: inflated ?? ((into, position) => readOnce(handle, into, position)),
      async stat() {
        const { size, mtimeMs } = await handle.stat();
        return { size, mtimeMs };
      },
      close: () => handle.close(),
    };
  } catch (error) {
    await handle.close();
    throw error;
  }
}

/** What a path that is no regular file is, for people. */
export function kindOf(stat: { isDirectory(): boolean; isFIFO(): boolean }): string {
  return stat.isDirectory() ? "a directory" : stat.isFIFO() ? "a FIFO" : "a device or a socket";
}

/**
 * One read: a short one is the end of the file as it is now. A second read behind it could see another generation, when
 * the file was truncated and refilled in between, and glue the two together.
 */
async function readOnce(handle: FileHandle, into: Uint8Array, position: number): Promise<number> {
  return (await handle.read(into, 0, into.length, position)).bytesRead;
}

/**
 * Reads a compressed file by positions of its content: forward from where it stands, from the start when the
 * position lies before that. The last bytes that were given are kept, because every chunk looks at its guard.
 */
function createInflatedReader(handle: FileHandle, compression: Compression, path: string): LogFile["read"] {
  let blocks: AsyncIterator<Buffer> | undefined;
  let block: Uint8Array = new Uint8Array(0);
  let at = 0; // position of block[0]
  let history: Uint8Array = new Uint8Array(0); // the bytes before `at`

  async function* compressed(): AsyncGenerator<Buffer> {
    for (let position = 0; ; ) {
      const buffer = Buffer.alloc(64 * 1024);
      const bytes = await readOnce(handle, buffer, position);
      if (bytes === 0) return;
      position += bytes;
      yield buffer.subarray(0, bytes);
    }
  }
  const restart = () => {
    const inflate = compression === "gzip" ? createGunzip() : createZstdDecompress();
    const source = Readable.from(compressed());
    source.on("error", (error) => inflate.destroy(error));
    blocks = source.pipe(inflate)[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    block = history = new Uint8Array(0);
    at = 0;
  };
  /** Steps to the next block; false at the end. */
  const step = async (): Promise<boolean> => {
    let result: IteratorResult<Buffer> | undefined;
    try {
      result = await blocks?.next();
    } catch (error) {
      blocks = undefined;
      throw new UnfinishedFile(`"${path}" is still being written, or damaged`, { cause: error });
    }
    if (!result || result.done) return false;
    const seen = Buffer.concat([history, block]);
    history = seen.subarray(Math.max(0, seen.length - MARK_BYTES));
    at += block.length;
    block = result.value;
    return true;
  };
  return async (into, position) => {
    if (!blocks || position < at - history.length) restart();
    let done = 0;
    if (position < at) done = copyFrom(history, position - (at - history.length), into, 0);
    while (done < into.length) {
      const from = position + done - at;
      if (from < block.length) done += copyFrom(block, from, into, done);
      else if (!(await step())) break;
    }
    return done;
  };
}

function copyFrom(source: Uint8Array, from: number, into: Uint8Array, to: number): number {
  const part = source.subarray(from, Math.min(source.length, from + into.length - to));
  into.set(part, to);
  return part.length;
}

// ---- marks

/** The mark of the bytes that end at `end`; of longer ones the last {@link MARK_BYTES}. */
export function markOf(bytes: Uint8Array, end: number): Mark {
  const covered = bytes.subarray(Math.max(0, bytes.length - MARK_BYTES));
  const hash = createHash("sha256").update(covered).digest("base64url").slice(0, 22);
  return { end, length: covered.length, hash };
}

/** The mark of what lies before `end` in a file; undefined when the file does not reach so far. */
export async function readMark(file: LogFile, end: number): Promise<Mark | undefined> {
  const bytes = new Uint8Array(Math.min(MARK_BYTES, end));
  const n = await file.read(bytes, end - bytes.length);
  return n === bytes.length && n > 0 ? markOf(bytes, end) : undefined;
}

/** What a file's bytes look like: its head, from the first line on, and places on the way. */
export interface Signature {
  /** Grows until it covers {@link MARK_BYTES}; a hole of NULs in front is not part of it. */
  head?: Mark | undefined;
  /** Ends ascending; the last one ends at the offset up to which the file was shipped. */
  marks: Mark[];
}

/** The signature with the head that `view` shows; `start` is the position of its first byte, behind any hole. */
export function addHead(signature: Signature, view: Uint8Array, start: number): Signature {
  const bytes = view.subarray(0, MARK_BYTES);
  if (bytes.length <= (signature.head?.length ?? 0)) return signature;
  return { ...signature, head: markOf(bytes, start + bytes.length) };
}

/**
 * The marks after the bytes up to `end` were shipped. `view` are bytes of the file that end at `end` and begin
 * at its start or at least {@link MARK_BYTES} before.
 */
export function addMark(marks: Mark[], view: Uint8Array, end: number): Mark[] {
  const all = [...marks.filter((mark) => mark.end < end), markOf(view, end)];
  // Too many: drop every second of the older ones, so that what remains thins out towards the head.
  return all.length <= MARKS ? all : all.filter((_, i) => i % 2 === 0 || i >= all.length - 4);
}

/**
 * Whether `file` holds the bytes that the signature was made of, as far as it goes: a copy may be shorter than
 * what was shipped. `whole` asks for all of it. False for a signature of nothing.
 */
export async function matchesSignature(
  file: LogFile,
  signature: Signature,
  whole: boolean,
): Promise<boolean> {
  const buffer = new Uint8Array(MARK_BYTES);
  const marks = signature.head ? [signature.head, ...signature.marks] : signature.marks;
  for (const [i, mark] of marks.entries()) {
    const bytes = buffer.subarray(0, mark.length);
    const short = (await file.read(bytes, mark.end - mark.length)) < mark.length;
    if (short) return i > 0 && !whole;
    if (markOf(bytes, mark.end).hash !== mark.hash) return false;
  }
  return marks.length > 0;
}

/** The marks up to the newest one that the file still holds and at which a line ends. */
export async function newestFit(file: LogFile, marks: Mark[]): Promise<Mark[]> {
  const bytes = new Uint8Array(MARK_BYTES);
  for (let i = marks.length - 1; i >= 0; i--) {
    const { end, length, hash } = marks[i] as Mark;
    const seen = bytes.subarray(0, length);
    const isWhole = (await file.read(seen, end - length)) === length && seen.at(-1) === NEWLINE;
    if (isWhole && markOf(seen, end).hash === hash) return marks.slice(0, i + 1);
  }
  return [];
}

// ---- lines

/** Length of the part of `bytes` that is whole lines; 0 when no `\n` is in it. */
export function wholeLines(bytes: Uint8Array): number {
  return bytes.lastIndexOf(NEWLINE) + 1;
}

/** So many NULs at the head of a file are a hole: no line begins like that. */
const HOLE_BYTES = 32;

/**
 * Where the content of a file begins: behind the hole of NULs that a writer without O_APPEND leaves at its head
 * after copytruncate. `after` says that a truncation was seen; then also a short hole is one.
 */
export async function contentStart(file: LogFile, after = false): Promise<number> {
  const block = new Uint8Array(64 * 1024);
  for (let position = 0; ; position += block.length) {
    const n = await file.read(block, position);
    let nuls = 0;
    while (nuls < n && block[nuls] === 0) nuls++;
    if (nuls === block.length) continue;
    const start = position + nuls;
    return start >= HOLE_BYTES || after ? start : 0;
  }
}

/**
 * Takes the lines out of `bytes` that contain every text of one of the rules, in place; returns what is left.
 * Costs one native search per rule when nothing matches. `bytes` begins at the start of a line.
 */
export function skipLines(bytes: Buffer, rules: Buffer[][]): Buffer {
  const candidates = rules.filter((rule) => rule.every((text) => bytes.includes(text)));
  if (candidates.length === 0) return bytes;
  const cuts = candidates.flatMap((rule) => findLines(bytes, rule)).sort((a, b) => a[0] - b[0]);
  let kept = 0;
  let from = 0;
  for (const [start, end] of cuts) {
    if (start < from) continue; // two rules found the same line
    bytes.copyWithin(kept, from, start);
    kept += start - from;
    from = end;
  }
  bytes.copyWithin(kept, from);
  return bytes.subarray(0, kept + bytes.length - from);
}

/** Start and end of every line that contains all texts of a rule. */
function findLines(bytes: Buffer, [first, ...others]: Buffer[]): [number, number][] {
  const found: [number, number][] = [];
  if (first === undefined) return found;
  for (let at = bytes.indexOf(first); at >= 0; ) {
    const start = bytes.lastIndexOf(NEWLINE, at) + 1;
    const newline = bytes.indexOf(NEWLINE, at);
    const end = newline < 0 ? bytes.length : newline + 1;
    const line = bytes.subarray(start, end);
    if (others.every((text) => line.includes(text))) found.push([start, end]);
    at = end < bytes.length ? bytes.indexOf(first, end) : -1;
  }
  return found;
}
