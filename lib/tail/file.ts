/**
 * The bytes of one log file, plain or compressed: which of them are whole lines, and the marks by which they are known again.
 *
 * A mark is the hash of at most 1,024 bytes before a position; the head is the mark of the first ones. Marks survive
 * renaming, copying and compressing, and tell when an inode was used again or a file was cut and has grown past the old
 * offset. Everything is read from the open handle, never from the path.
 */
import { type BigIntStats, constants } from "node:fs";
import { type FileHandle, open } from "node:fs/promises";
import { join } from "node:path";
import { Readable } from "node:stream";
import { createGunzip, createZstdDecompress, constants as zlib } from "node:zlib";
import { formatMark, MARK_BYTES, parseMarkLength } from "../chunk.ts";
import { OperatorError } from "../service.ts";

const NEWLINE = 0x0a;
const BLOCK_BYTES = 64 * 1024;
/** So many NULs at the head of a file are a hole: no line begins like that. */
const HOLE_BYTES = 32;
/** How many marks a stream keeps: the newest, and ever fewer of the older ones. */
const MARKS = 32;

/** A hash of the `length` bytes before `end`. */
export interface Mark {
  end: number;
  length: number;
  hash: string;
}

export type Compression = "gzip" | "zstd";

/** A compressed file that ends in the middle: it is still being written, or damaged. */
export class UnfinishedFile extends Error {}

const apart = new Set<string>();

/**
 * Inode and time of birth of a file, from its (bigint) stat; Deno knows the birth to the millisecond only, some file systems
 * know none. Devices are numbered anew at each start of a host: a file's is in its key only where two would have the same.
 */
export function fileKey({ ino, birthtimeMs, dev }: BigIntStats): string {
  const key = `${ino}:${birthtimeMs}`;
  return apart.has(`${key}:${dev}`) ? `${key}:${dev}` : key;
}

/** From now on the file has this key, when that is one with a device. */
export function keepKey(key: string): void {
  if (key.split(":").length > 2) apart.add(key);
}

/** When the file of a key was made, in ms of the wall clock; 0 where the file system does not know. */
export function bornAt(key: string): number {
  return Number(key.split(":")[1]);
}

const rawPaths = new Map<string, Buffer>();

/** A path for the system: names that are no UTF-8 are kept as the bytes that they are. */
export function rawPath(path: string): string | Buffer {
  for (let end = rawPaths.size > 0 ? path.length : 0; end > 0; end = path.lastIndexOf("/", end - 1)) {
    const raw = rawPaths.get(path.slice(0, end));
    if (raw) return Buffer.concat([raw, Buffer.from(path.slice(end))]);
  }
  return path;
}

/** The text for a name in a folder; one that is no UTF-8 shows its bytes as `\xNN`. */
export function nameOf(folder: string, raw: Buffer): string {
  const text = raw.toString();
  if (!text.includes("\uFFFD")) return text;
  const shown = raw.toString("latin1").replace(/[\x80-\xff]/g, (c) => `\\x${c.charCodeAt(0).toString(16)}`);
  const path = join(folder, shown);
  if (!rawPaths.has(path))
    rawPaths.set(path, Buffer.concat([Buffer.from(rawPath(folder)), Buffer.from("/"), raw]));
  return shown;
}

export function kindOf(stat: { isDirectory(): boolean; isFIFO(): boolean }): string {
  return stat.isDirectory() ? "a directory" : stat.isFIFO() ? "a FIFO" : "a device or a socket";
}

const ENDING = String.raw`\.(gz|gzip|zstd?)`;
/** The endings of archives that can be read. */
export const ARCHIVE = new RegExp(`${ENDING}$`);
/** The same, and those of a log that is written compressed: it keeps its own before that of its rotation. */
const COMPRESSED = new RegExp(String.raw`${ENDING}(?:[-._][\d.T-]+)?$`);
/** How archives begin, in hex, whatever their names: gzip, zstd, xz, bzip2, lz4, lzop, zip. */
const MAGIC = /^(?:1f8b08|28b52ffd|fd377a585a00|425a683\d314159265359|04224d18|894c5a4f|504b0304)/;

export function compressionOf(path: string): Compression | undefined {
  const ending = COMPRESSED.exec(path)?.[1];
  return ending === undefined ? undefined : ending.startsWith("zst") ? "zstd" : "gzip";
}

/** Whether a file that is none by its name begins as an archive does. */
export async function hasMagic(file: LogFile): Promise<boolean> {
  const bytes = Buffer.alloc(10);
  return !file.compression && MAGIC.test(bytes.toString("hex", 0, await file.read(bytes, 0)));
}

/** An open log file. Positions are bytes of the log itself, also when the file is compressed. */
export class LogFile {
  readonly path: string;
  /** Inode and time of birth: the same under every name of the file. */
  readonly key: string;
  readonly compression: Compression | undefined;
  /** It had no name any more when it was looked at last. */
  isUnlinked = false;
  readonly #handle: FileHandle;
  #inflated: Inflated | undefined;

  private constructor(path: string, key: string, handle: FileHandle) {
    this.path = path;
    this.key = key;
    this.#handle = handle;
    this.compression = compressionOf(path);
  }

  /** Opens a log file, a compressed one by its ending. Throws the system's error, an OperatorError for what is no regular file. */
  static async open(path: string): Promise<LogFile> {
    const handle = await open(rawPath(path), constants.O_RDONLY | constants.O_NONBLOCK); // a FIFO must not block
    try {
      const stat = await handle.stat({ bigint: true });
      if (stat.isFile()) return new LogFile(path, fileKey(stat), handle);
      throw new OperatorError(`Cannot follow "${path}": it is ${kindOf(stat)}, expected a regular file`);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** Reads once, so that no two generations of a file that is cut and filled meanwhile are glued. */
  async readOnce(into: Uint8Array, position: number): Promise<number> {
    if (this.compression) return this.read(into, position);
    return (await this.#handle.read(into, 0, into.length, position)).bytesRead;
  }

  /** Fills `into` from `position`; fewer bytes than asked for mean the present end, of an archive also the end of what can be unpacked. */
  async read(into: Uint8Array, position: number): Promise<number> {
    if (!this.compression) return readFully(this.#handle, into, position);
    this.#inflated ??= new Inflated(this.#handle, this.compression);
    return this.#inflated.read(into, position);
  }

  /** Length of the content; of an archive all of it is unpacked. Throws UnfinishedFile when it has no end. */
  async contentLength(): Promise<number> {
    if (!this.compression) return (await this.stat()).size;
    const block = new Uint8Array(BLOCK_BYTES);
    for (let position = 0; ; position += block.length) {
      const n = await this.read(block, position);
      const { fault } = this.#inflated as Inflated;
      if (fault)
        throw new UnfinishedFile(`"${this.path}" is still being written, or damaged`, { cause: fault });
      if (n < block.length) return position + n;
    }
  }

  /** The length of its content (modulo 2^32) that an archive notes (RFC 1952: ISIZE; RFC 8878: Frame_Content_Size). */
  async notedLength(): Promise<number | undefined> {
    const bytes = Buffer.alloc(18);
    if (this.compression === "gzip") {
      const { size } = await this.stat();
      const n = await readFully(this.#handle, bytes.subarray(0, 4), Math.max(0, size - 4));
      return n === 4 ? bytes.readUInt32LE(0) : undefined;
    }
    await readFully(this.#handle, bytes, 0);
    const descriptor = bytes[4] ?? 0;
    const isSingle = (descriptor & 0x20) !== 0;
    const at = 5 + (isSingle ? 0 : 1) + ([0, 1, 2, 4][descriptor & 3] ?? 0);
    const kind = descriptor >> 6;
    if (kind === 0) return isSingle ? bytes[at] : undefined;
    return kind === 1 ? bytes.readUInt16LE(at) + 256 : bytes.readUInt32LE(at);
  }

  async stat(): Promise<{ size: number; mtimeMs: number }> {
    const { size, mtimeMs, nlink } = await this.#handle.stat();
    this.isUnlinked = nlink === 0;
    return { size, mtimeMs };
  }

  /** Why an archive could not be unpacked to its end when it was read last. */
  get fault(): Error | undefined {
    return this.#inflated?.fault;
  }

  close(): Promise<void> {
    this.#inflated?.close();
    return this.#handle.close();
  }
}

async function readFully(handle: FileHandle, into: Uint8Array, position: number): Promise<number> {
  let done = 0;
  while (done < into.length) {
    const { bytesRead } = await handle.read(into, done, into.length - done, position + done);
    if (bytesRead === 0) break;
    done += bytesRead;
  }
  return done;
}

/**
 * Reads an archive by positions of its content: forward from where it stands, from the start when the position lies
 * before that, or the file has grown. The last bytes that were given are kept, because every chunk looks at its guard.
 */
class Inflated {
  fault: Error | undefined;
  readonly #handle: FileHandle;
  readonly #compression: Compression;
  #source: Readable | undefined;
  #blocks: AsyncIterator<Buffer> | undefined;
  #block: Uint8Array = new Uint8Array(0);
  #at = 0;
  /** The bytes before `#at`. */
  #history: Uint8Array = new Uint8Array(0);
  #size = -1;
  /** Where the archive ends, when other bytes lie behind it. */
  #end = Number.POSITIVE_INFINITY;

  constructor(handle: FileHandle, compression: Compression) {
    this.#handle = handle;
    this.#compression = compression;
  }

  async read(into: Uint8Array, position: number): Promise<number> {
    const { size } = await this.#handle.stat();
    if (size !== this.#size) this.#end = Number.POSITIVE_INFINITY;
    if (size !== this.#size || position < this.#at - this.#history.length) this.#restart(size);
    let done = 0;
    if (position < this.#at) {
      done = copyFrom(this.#history, position - (this.#at - this.#history.length), into, 0);
    }
    while (done < into.length) {
      const from = position + done - this.#at;
      if (from < this.#block.length) done += copyFrom(this.#block, from, into, done);
      else if (!(await this.#step())) break;
    }
    return done;
  }

  /** Gives the memory of the unpacking back, of which the collector sees little. */
  close(): void {
    this.#source?.destroy();
  }

  #restart(size: number): void {
    this.close();
    this.#source = this.#inflate(this.#end);
    this.#blocks = this.#source[Symbol.asyncIterator]() as AsyncIterator<Buffer>;
    this.#block = this.#history = new Uint8Array(0);
    this.#at = 0;
    this.#size = size;
    this.fault = undefined;
  }

  #inflate(end: number): Readable {
    const inflate =
      this.#compression === "gzip"
        ? createGunzip()
        : createZstdDecompress({ params: { [zlib.ZSTD_d_windowLogMax]: 31 } }); // zstd --long
    const source = Readable.from(this.#compressed(end));
    source.on("error", (error) => inflate.destroy(error));
    inflate.on("close", () => source.destroy());
    return source.pipe(inflate);
  }

  async *#compressed(end: number): AsyncGenerator<Buffer> {
    for (let position = 0; position < end; ) {
      const buffer = Buffer.alloc(Math.min(BLOCK_BYTES, end - position));
      const bytes = await readFully(this.#handle, buffer, position);
      if (bytes === 0) return;
      position += bytes;
      yield buffer.subarray(0, bytes);
    }
  }

  /** Where gzip's last member ends, when what lies behind it is none: `gzip -dc` ignores that, zlib gives nothing at all. */
  async #endOfMembers(): Promise<number | undefined> {
    let [low, high] = [0, this.#size]; // the shortest part that has such a fault ends a few bytes behind
    while (low < high) {
      const middle = (low + high) >> 1;
      if (isForeign(await this.#faultOf(middle))) high = middle;
      else low = middle + 1;
    }
    for (let end = high - 1; end > Math.max(0, high - 16); end--) if (!(await this.#faultOf(end))) return end;
    return undefined;
  }

  async #faultOf(end: number): Promise<Error | undefined> {
    try {
      for await (const _ of this.#inflate(end));
      return undefined;
    } catch (error) {
      return error as Error;
    }
  }

  /** Steps to the next block; false at the end, or where it can't be unpacked. */
  async #step(): Promise<boolean> {
    if (this.fault) return false;
    try {
      const result = await this.#blocks?.next();
      if (!result || result.done) return false;
      const seen = Buffer.concat([this.#history, this.#block]);
      this.#history = seen.subarray(Math.max(0, seen.length - MARK_BYTES));
      this.#at += this.#block.length;
      this.#block = result.value;
      return true;
    } catch (error) {
      const end = isForeign(error as Error) ? await this.#endOfMembers() : undefined;
      if (end !== undefined && end !== this.#end) {
        this.#end = end;
        this.#restart(this.#size);
        return true;
      }
      this.fault = error as Error;
      return false;
    }
  }
}

/** Whether an archive's fault is that a member begins with other bytes than a member does. */
function isForeign(error: Error | undefined): boolean {
  return /incorrect header check|unknown compression method|unknown header flags/.test(error?.message ?? "");
}

function copyFrom(source: Uint8Array, from: number, into: Uint8Array, to: number): number {
  const part = source.subarray(from, Math.min(source.length, from + into.length - to));
  into.set(part, to);
  return part.length;
}

// ---- marks

/** The mark of the bytes that end at `end`; of longer ones the last {@link MARK_BYTES}. */
export function markBefore(bytes: Uint8Array, end: number): Mark {
  const covered = bytes.subarray(Math.max(0, bytes.length - MARK_BYTES));
  return { end, length: covered.length, hash: formatMark(covered).split(":")[1] as string };
}

export function wireMark({ length, hash }: Mark): string {
  return `${length}:${hash}`;
}

/** A mark of the wire as one that ends at `end`; undefined for none and for one that can't end there. */
export function markAt(end: number, text: string | undefined): Mark | undefined {
  const length = text === undefined ? undefined : parseMarkLength(text);
  if (!length || length > end) return undefined;
  return { end, length, hash: (text as string).split(":")[1] as string };
}

/** The mark of what lies before `end` in a file; undefined when the file does not reach so far. */
export async function readMark(file: LogFile, end: number, length = MARK_BYTES): Promise<Mark | undefined> {
  const bytes = new Uint8Array(Math.min(length, end));
  const n = await file.read(bytes, end - bytes.length);
  return n === bytes.length && n > 0 ? markBefore(bytes, end) : undefined;
}

export async function holds(file: LogFile, mark: Mark): Promise<boolean> {
  return (await readMark(file, mark.end, mark.length))?.hash === mark.hash;
}

/** The marks with one more at the end; when they are too many every second of the older ones goes, so that they thin out towards the head. */
export function addMark(marks: Mark[], mark: Mark): Mark[] {
  const all = [...marks.filter(({ end }) => end < mark.end), mark];
  return all.length <= MARKS ? all : all.filter((_, i) => i % 2 === 0 || i >= all.length - 4);
}

/**
 * By what a stream is known that begins in a file: the first bytes behind a hole, the head that they are (none of an empty
 * file), and what stands before its own first byte.
 */
export interface Beginning {
  head?: Mark;
  first: Uint8Array;
  mark?: Mark | undefined;
}

export async function readHead(file: LogFile, start: number): Promise<Beginning> {
  const bytes = new Uint8Array(MARK_BYTES);
  const first = trimNuls(bytes.subarray(0, await file.read(bytes, start)));
  return first.length > 0 ? { head: markBefore(first, start + first.length), first } : { first };
}

/** `isCut` says that a truncation was seen in the file. */
export async function readBeginning(file: LogFile, from: number, isCut = false): Promise<Beginning> {
  const head = await readHead(file, await contentStart(file, isCut));
  return { ...head, mark: from > 0 ? await readMark(file, from) : undefined };
}

// ---- lines

/** Length of the part of `bytes` that is whole lines; 0 when no `\n` is in it. */
export function wholeLines(bytes: Uint8Array): number {
  return bytes.lastIndexOf(NEWLINE) + 1;
}

/** The bytes without the NULs at their end: a preallocated file is not written there yet. */
export function trimNuls(bytes: Uint8Array): Uint8Array {
  let end = bytes.length;
  while (end > 0 && bytes[end - 1] === 0) end--;
  return bytes.subarray(0, end);
}

export async function endOfLines(file: LogFile, upTo?: number): Promise<number> {
  const size = upTo ?? (await file.contentLength());
  const block = new Uint8Array(BLOCK_BYTES);
  for (let end = size; end > 0; ) {
    const start = Math.max(0, end - block.length);
    const n = await file.read(block.subarray(0, end - start), start);
    const lines = wholeLines(block.subarray(0, n));
    if (lines > 0) return start + lines;
    end = start;
  }
  return 0;
}

/**
 * Where the content of a file begins: behind the hole of NULs that a writer without O_APPEND leaves at its head after
 * copytruncate. `after` says that a truncation was seen; then also a short hole is one. 0 while there is nothing else.
 */
export async function contentStart(file: LogFile, after = false): Promise<number> {
  let block = new Uint8Array(1); // most files begin with a line
  for (let position = 0; ; ) {
    const n = await file.read(block, position);
    let nuls = 0;
    while (nuls < n && block[nuls] === 0) nuls++;
    position += nuls;
    if (nuls < block.length) return nuls < n && (position >= HOLE_BYTES || after) ? position : 0;
    if (position === 1) block = new Uint8Array(BLOCK_BYTES);
  }
}

/** Up to which byte two files are the same; `upTo` at most. */
export async function commonLength(a: LogFile, b: LogFile, upTo: number): Promise<number> {
  const one = Buffer.alloc(BLOCK_BYTES);
  const two = Buffer.alloc(BLOCK_BYTES);
  for (let position = 0; position < upTo; position += BLOCK_BYTES) {
    const length = Math.min(BLOCK_BYTES, upTo - position);
    const n = await a.read(one.subarray(0, length), position);
    const m = await b.read(two.subarray(0, length), position);
    const both = Math.min(n, m);
    if (one.compare(two, 0, both, 0, both) !== 0) {
      for (let i = 0; i < both; i++) if (one[i] !== two[i]) return position + i;
    }
    if (both < length) return position + both;
  }
  return upTo;
}

/** A rule of `skip`: texts that a line has to contain, `first` those that it has to begin with. */
export interface SkipRule {
  texts: Buffer[];
  first: Buffer | undefined;
}

/** A rule from its texts; one with `^` in front stands for the line's first bytes. */
export function parseSkipRule(texts: string[]): SkipRule {
  const begin = texts.find((text) => text.startsWith("^") && text.length > 1);
  const all = texts.map((text) => Buffer.from(text === begin ? text.slice(1) : text));
  return { texts: all, first: begin === undefined ? undefined : Buffer.from(begin.slice(1)) };
}

/**
 * Takes the lines out of `bytes` that a rule fits, in place; returns what is left. Costs one native search per rule when
 * nothing matches. `bytes` begins at the start of a line.
 */
export function skipLines(bytes: Buffer<ArrayBuffer>, rules: SkipRule[]): Buffer<ArrayBuffer> {
  const candidates = rules.filter(({ texts }) => texts.every((text) => bytes.includes(text)));
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

/** Start and end of every line that a rule fits. */
function findLines(bytes: Buffer, { texts: [first, ...others], first: begin }: SkipRule): [number, number][] {
  const found: [number, number][] = [];
  if (first === undefined) return found;
  for (let at = bytes.indexOf(first); at >= 0; ) {
    const start = bytes.lastIndexOf(NEWLINE, at) + 1;
    const newline = bytes.indexOf(NEWLINE, at);
    const end = newline < 0 ? bytes.length : newline + 1;
    const line = bytes.subarray(start, end);
    const isFirst = !begin || line.subarray(0, begin.length).equals(begin);
    if (isFirst && others.every((text) => line.includes(text))) found.push([start, end]);
    at = end < bytes.length ? bytes.indexOf(first, end) : -1;
  }
  return found;
}
