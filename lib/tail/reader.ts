/**
 * The next lines of a stream: whole ones, checked against the marks of the bytes before them, without those that a rule
 * leaves out. Only a line longer than a chunk goes in pieces. What does not have the bytes that were seen is `Changed`.
 */
import { MARK_BYTES } from "../chunk.ts";
import type { Stream } from "./cursor.ts";
import {
  type LogFile,
  type Mark,
  markBefore,
  type SkipRule,
  skipLines,
  trimNuls,
  wholeLines,
} from "./file.ts";

/** Files in hand at once: a buffer each, so that memory does not grow with the files. */
const TRANSFERS = 3;

/** The file's bytes are not the ones that were seen before. */
export class Changed extends Error {}

/** What is read at once: the bytes from the offset asked for up to `end`, of which `body` is to be sent. */
export interface Portion {
  end: number;
  /** The marks of the bytes before its end, and before its beginning. */
  mark: Mark;
  from: Mark | undefined;
  body: Buffer<ArrayBuffer>;
  /** Lines that rules left out. */
  skipped: number;
  /** There may be more behind it. */
  isFull: boolean;
}

export interface ReadOptions {
  buffer: Buffer<ArrayBuffer>;
  offset: number;
  /** The mark of the bytes before the offset, when they were read before. */
  newest: Mark | undefined;
  chunkBytes: number;
  skip: SkipRule[];
}

/** Reads a stream's lines from `offset` on. Undefined when there is no whole one. Throws Changed, the system's error. */
export async function readPortion(
  stream: Stream,
  file: LogFile,
  { buffer, offset, newest, chunkBytes, skip }: ReadOptions,
): Promise<Portion | undefined> {
  const guard = Math.min(MARK_BYTES, offset);
  const room = Math.min(chunkBytes, (stream.until ?? Number.POSITIVE_INFINITY) - offset);
  if (room <= 0) return undefined;
  const seen = stream.size;
  const view = buffer.subarray(0, await file.readOnce(buffer.subarray(0, guard + room), offset - guard));
  const isFull = view.length === guard + room;
  const end = offset - guard + view.length;
  checkGuard([stream.head, newest], view, offset, !isFull);
  if (!file.compression && !isFull && end < seen) throw new Changed();
  const isPart = isFull || file.compression !== undefined;
  stream.size = isPart ? Math.max(stream.size, end) : end; // an event may have told of more than is compared
  stream.checkedSize = isPart ? Math.max(seen, end) : end;
  noteHead(stream, view, offset - guard);

  const bytes = view.subarray(guard);
  const length =
    wholeLines(bytes) || (isFull && !(await isBlank(stream, file, bytes, end)) ? bytes.length : 0); // a piece
  const used = offset + Math.max(length, trimNuls(bytes).length);
  if (!file.compression && (length === 0 || !isFull))
    stream.blank = used < end ? { from: used, to: stream.size } : undefined;
  if (length === 0) {
    stream.drained = { from: offset, to: isFull ? stream.size : end };
    return undefined;
  }
  const mark = markBefore(view.subarray(0, guard + length), offset + length);
  const from = guard > 0 ? markBefore(view.subarray(0, guard), offset) : undefined;
  const inLine = guard > 0 && view[guard - 1] !== 0x0a && view[guard - 1] !== 0;
  const lines = skip.length > 0 ? countNewlines(bytes.subarray(0, length)) : 0; // before they are cut out in place
  const body = chooseLines(bytes.subarray(0, length), inLine, skip);
  const skipped = body.length < length ? lines - countNewlines(body) : 0;
  return { end: offset + length, mark, from, body, skipped, isFull };
}

/**
 * Throws Changed when the bytes before `offset`, or the head, are not the ones that were seen before. `view` begins at most
 * {@link MARK_BYTES} before the offset; `atEnd` says that it goes to the end of the file.
 */
function checkGuard(seen: (Mark | undefined)[], view: Buffer, offset: number, atEnd: boolean): void {
  const guard = Math.min(MARK_BYTES, offset);
  if (view.length < guard) throw new Changed();
  const start = offset - guard;
  for (const mark of seen) {
    if (!mark || mark.end - mark.length < start) continue;
    const bytes = view.subarray(mark.end - mark.length - start, mark.end - start);
    const isCut = bytes.length < mark.length;
    if (isCut ? atEnd : markBefore(bytes, mark.end).hash !== mark.hash) throw new Changed();
  }
}

/** The head grows as far as `view`, that begins at `start`, shows it. */
function noteHead(stream: Stream, view: Buffer, start: number): void {
  const { head } = stream;
  if ((head?.length ?? 0) >= MARK_BYTES) return;
  const first = head ? head.end - head.length : stream.from;
  if (first < start) return;
  const bytes = trimNuls(view.subarray(first - start, first - start + MARK_BYTES));
  if (bytes.length > (head?.length ?? 0)) stream.head = markBefore(bytes, first + bytes.length);
}

/** Whether the NULs at the end of `bytes` are room that a writer in place has not filled yet; in a rotated file, that nobody will. */
async function isBlank(stream: Stream, file: LogFile, bytes: Uint8Array, end: number): Promise<boolean> {
  if (bytes.at(-1) !== 0 || file.compression) return false;
  const { drained, size } = stream;
  if (drained?.to === size && drained.from <= end) return true; // it was seen once: it is filled from its beginning on
  const block = new Uint8Array(65_536);
  for (let at = end; ; at += block.length) {
    const n = await file.read(block, at);
    if (trimNuls(block.subarray(0, n)).length > 0) return false; // a hole, and lines behind it
    if (n < block.length) return true;
  }
}

/** The lines that are not to be skipped. A line that goes over several chunks is never skipped, not even in part. */
function chooseLines(bytes: Buffer<ArrayBuffer>, inLine: boolean, skip: SkipRule[]): Buffer<ArrayBuffer> {
  if (skip.length === 0 || bytes.at(-1) !== 0x0a) return bytes;
  const first = inLine ? bytes.indexOf(0x0a) + 1 : 0;
  if (inLine && first === 0) return bytes;
  const kept = skipLines(bytes.subarray(first), skip);
  return bytes.subarray(0, first + kept.length);
}

function countNewlines(bytes: Uint8Array): number {
  let count = 0;
  for (let at = bytes.indexOf(0x0a); at >= 0; at = bytes.indexOf(0x0a, at + 1)) count++;
  return count;
}

/** The buffers of the files in hand: made when first needed, handed from stream to stream. */
export class Buffers {
  readonly #size: number;
  readonly #free: Buffer<ArrayBuffer>[] = [];
  readonly #waiting: ((buffer: Buffer<ArrayBuffer>) => void)[] = [];
  #made = 0;

  constructor(size: number) {
    this.#size = size;
  }

  take(): Promise<Buffer<ArrayBuffer>> {
    const buffer = this.#free.pop();
    if (buffer) return Promise.resolve(buffer);
    if (this.#made >= TRANSFERS) return new Promise((resolve) => this.#waiting.push(resolve));
    this.#made++;
    return Promise.resolve(Buffer.allocUnsafeSlow(this.#size));
  }

  give(buffer: Buffer<ArrayBuffer>): void {
    const next = this.#waiting.shift();
    if (next) next(buffer);
    else this.#free.push(buffer);
  }
}
