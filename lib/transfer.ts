/**
 * A stream's bytes on their way: read whole lines, check them against the bytes before, leave out what is to be
 * skipped, encode, send, and move the offset on when the receiver has answered. The only place where an offset
 * changes. The next chunk is read and encoded while the last one is in flight.
 */
import type { ChunkHeaders, SenderNews, StreamStatus } from "./chunk.ts";
import type { Config } from "./config.ts";
import { failpoint } from "./durable.ts";
import { type FaultLog, type Log, VERSION } from "./service.ts";
import {
  addHead,
  addMark,
  contentStart,
  MARK_BYTES,
  type Mark,
  markOf,
  newestFit,
  readMark,
  type Signature,
  skipLines,
  wholeLines,
} from "./tail/file.ts";
import { drawName, type Stream } from "./tail/streams.ts";
import { type Answer, type Chunk, createUploader, encodeBody, Unanswered } from "./upload.ts";

/** Chunks in hand at once over all files: two buffers each, so that memory does not grow with the files. */
const TRANSFERS = 3;
/** The smallest chunk that a 413 can lead to. */
const MIN_CHUNK_BYTES = 4096;

/** The receiver does not take chunks now: hold the offset and try again after `waitMs`. */
export class Refused extends Error {
  readonly waitMs: number;
  constructor(waitMs: number) {
    super("the receiver does not take chunks now");
    this.waitMs = waitMs;
  }
}

/** The file's bytes are not the ones that were seen before: it was truncated and written anew. */
export class Truncated extends Error {}

/** What transfers need from the shipper. */
export interface TransferOptions {
  config: Config["shipper"];
  log: Log;
  signal: AbortSignal;
  now: () => number;
  faults: FaultLog;
  /** Bytes that are still to be shipped, over all files. */
  lag: () => number;
  /**
   * Saves the cursor. Called before the first chunk of a stream leaves: its name and head are then on stable
   * storage, and a copy of the file is known even after a crash and a truncation.
   */
  named: () => Promise<void>;
}

/** A chunk that is read and encoded, without what depends on the answer to the one before it, and the stream's marks when it is committed. */
interface Prepared {
  chunk: Chunk;
  /** Of the head, until it is complete. */
  head: Mark | undefined;
  marks: Mark[];
  /** There may be more behind it. */
  full: boolean;
}

export type Transfer = ReturnType<typeof createTransfer>;

/** The transfers of one shipper: they share the connection, the buffers and the counters. */
export function createTransfer({ config, log, signal, now, faults, lag, named }: TransferOptions) {
  const uploader = createUploader(config, signal);
  const buffers = createBuffers(MARK_BYTES + config.chunkBytes);
  const skip = config.skip.map((rule) => rule.map((text) => Buffer.from(text)));
  /** Statuses that were answered since the last good answer. */
  const failing = new Set<number>();
  let chunkBytes = config.chunkBytes;

  const transfer = {
    /** Counts since the start. */
    sent: { lines: 0, bytes: 0, chunks: 0 },
    /** Names the cursor of this shipper. */
    shipper: "",
    /** Bytes lost since the cursor began. */
    lost: 0,
    /** When the receiver answered last, ms. */
    heardAt: 0,
    /** Requests that wait for their answer. */
    inFlight: 0,
    /** A stream got on: there is something to save. */
    moved: false,

    /** What the receiver knows of streams, of all of this host without names. Throws Unanswered. */
    async ask(names?: string[], through?: number): Promise<StreamStatus[]> {
      try {
        const told = await uploader.ask(config.host, names, { ...news(0), ...(through && { through }) });
        isAnswered();
        return told;
      } catch (error) {
        if (error instanceof Unanswered) isRefused(error.status, error.reason);
        throw error;
      }
    },

    /** Ships a stream up to the present end of its open file. Throws Refused, Truncated, the system's error. */
    async drain(stream: Stream): Promise<void> {
      const [a, b] = await buffers.take();
      try {
        if (stream.offset === 0) await skipHole(stream);
        takeWayBack(stream);
        let next = await prepare(stream, stream.offset, stream.signature.marks, a);
        for (let turn = 1; next !== undefined && !signal.aborted; turn++) {
          const { chunk, marks, full, head }: Prepared = next;
          const other = turn % 2 === 1 ? b : a;
          const ahead = full ? prepare(stream, chunk.end, marks, other) : Promise.resolve(undefined);
          ahead.catch(() => {}); // looked at when its turn comes
          let answer: Answer;
          try {
            answer = await send({
              ...chunk,
              ...(stream.begin && { begin: stream.begin }),
              ...((stream.begin || head) && headOf(stream.signature.head)),
            });
          } finally {
            // Before the buffers and the file go to somebody else, nobody may still read into them.
            await ahead.catch(() => {});
          }
          failpoint("shipper:answered");
          if (answer.kind === "stored") {
            stream.offset = answer.offset;
            stream.signature = { ...stream.signature, marks };
            delete stream.begin;
            transfer.moved = true;
          } else if (answer.kind === "moved") await moveTo(stream, answer.offset, answer.mark);
          else if (answer.kind === "unknown") await askAgain(stream);
          const isNext = answer.kind === "stored" && !takeWayBack(stream);
          next = isNext ? await ahead : await prepare(stream, stream.offset, stream.signature.marks, other);
        }
      } finally {
        buffers.give([a, b]);
      }
    },
  };
  return transfer;

  function news(ahead: number): SenderNews {
    const { shipper, lost } = transfer;
    return { lag: Math.max(0, lag() - ahead), lost, shipper, agent: `log-rt-sync/${VERSION}` };
  }

  /**
   * Reads the next chunk from `offset` into `buffer`: the bytes before it are read too and compared with the
   * mark that was made of them. Undefined when there is no whole line.
   */
  async function prepare(
    stream: Stream,
    offset: number,
    before: Mark[],
    buffer: Buffer<ArrayBuffer>,
  ): Promise<Prepared | undefined> {
    const { file } = stream;
    if (!file) return undefined;
    const guard = Math.min(MARK_BYTES, offset);
    const limit = guard + chunkBytes;
    const n = await file.read(buffer.subarray(0, limit), offset - guard);
    const view = buffer.subarray(0, n);
    checkGuard([stream.signature.head, before.at(-1)], view, offset, n < limit);
    const end = offset - guard + n;
    if (file.compression) stream.size = Math.max(stream.size, end);
    else stream.size = n === limit ? Math.max((await file.stat()).size, end) : end;
    stream.checkedSize = stream.size;

    const isNew = stream.id === undefined || stream.signature.head === undefined;
    stream.signature = headSeen(stream.signature, view, offset - guard, offset);
    const bytes = view.subarray(guard);
    const length = wholeLines(bytes) || (n === limit ? bytes.length : 0); // a full buffer without `\n`: a piece
    if (length === 0) {
      stream.drainedAt = end;
      return undefined;
    }
    if (stream.id === undefined) beginAs(stream, "new", offset);
    if (isNew || stream.isNamed === false) await named();
    delete stream.isNamed;
    const marks = addMark(before, view.subarray(0, guard + length), offset + length);
    const inLine = guard > 0 && view[guard - 1] !== 0x0a && view[guard - 1] !== 0;
    const lines = skip.length > 0 ? countNewlines(bytes.subarray(0, length)) : 0; // before they are cut out in place
    const body = chooseLines(bytes.subarray(0, length), inLine, skip);
    const encoded = encodeBody(body, config.compression);
    const mark = marks.at(-1);
    const from = guard > 0 ? markOf(view.subarray(0, guard), offset) : undefined;
    const skipped = body.length < length ? lines - countNewlines(body) : 0;
    const headers: ChunkHeaders = {
      ...{ host: config.host, stream: stream.id as string, offset, end: offset + length },
      ...(mark && { mark: formatSeen(mark) }),
      ...(from && { from: formatSeen(from) }),
      ...(skipped > 0 && { skipped }),
    };
    const { head } = stream.signature;
    const isShort = offset < MARK_BYTES || (head?.length ?? 0) < MARK_BYTES;
    return { chunk: { ...headers, ...encoded }, marks, full: n === limit, head: isShort ? head : undefined };
  }

  /** What a truncation left in front of the first line is no part of the log. */
  async function skipHole(stream: Stream): Promise<void> {
    const bytes = stream.file ? await contentStart(stream.file, stream.truncated) : 0;
    if (bytes === 0 || stream.signature.head) return;
    log.info("hole of NULs skipped", { path: stream.path, bytes });
    stream.offset = bytes;
  }

  /** Sends a chunk once. Throws Refused: it is to be held. */
  async function send(chunk: Chunk): Promise<Answer> {
    transfer.inFlight++;
    failpoint("shipper:sending");
    const answer = await uploader.send({ ...news(chunk.end - chunk.offset), ...chunk }).finally(() => {
      transfer.inFlight--;
    });
    if (answer.kind === "refused") {
      isRefused(answer.status, answer.reason);
      throw new Refused(answer.waitMs);
    }
    if (answer.kind === "tooLarge") {
      halve();
      return answer;
    }
    isAnswered();
    if (answer.kind !== "stored") return answer;
    transfer.sent.lines += answer.lines;
    transfer.sent.bytes += chunk.end - chunk.offset;
    if (chunk.end > chunk.offset) transfer.sent.chunks++;
    return answer;
  }

  function isRefused(status: number, reason: string): void {
    failing.add(status);
    const fields = { receiver: config.receiver, status: status || undefined, reason };
    faults.failed(`receiver ${status}`, "receiver does not take chunks: held, and tried again", fields);
  }

  function isAnswered(): void {
    transfer.heardAt = now();
    for (const status of failing)
      faults.recovered(`receiver ${status}`, "receiver takes chunks again", { receiver: config.receiver });
    failing.clear();
  }

  function halve(): void {
    if (chunkBytes <= MIN_CHUNK_BYTES) {
      faults.failed("receiver 413", "receiver takes no chunk, however small", { receiver: config.receiver });
      failing.add(413);
      throw new Refused(10_000);
    }
    chunkBytes = Math.max(MIN_CHUNK_BYTES, chunkBytes >> 1);
    log.warn("chunk is too large for the receiver: halved", { chunkBytes });
  }

  /**
   * The receiver has the stream up to another offset. That is believed only when the file has these bytes there (a stream
   * of version 1.0 has no marks); else a new stream begins where the own cursor fits.
   */
  async function moveTo(stream: Stream, offset: number, mark: string | undefined): Promise<void> {
    transfer.moved = true;
    const { file } = stream;
    if (!file) return;
    const known = file.compression ? offset : stream.size;
    const seen = offset > 0 && offset <= known ? await readMark(file, offset) : undefined;
    const isSame =
      seen && (mark === undefined ? stream.begin === undefined && stream.isOld : formatSeen(seen) === mark);
    const fields = { path: stream.path, stream: stream.id, sent: stream.offset, receiver: offset };
    if (offset === 0 || isSame) {
      log.info("receiver has this file up to another byte: going on there", fields);
      const marks = stream.signature.marks.filter(({ end }) => end < offset);
      stream.signature = { ...stream.signature, marks: seen ? [...marks, seen] : marks };
      stream.offset = offset;
      if (offset > 0) delete stream.begin;
      return;
    }
    log.warn("receiver has other bytes than this file: a new stream begins", fields);
    await beginBehindFit(stream, file);
  }

  /** The receiver says that it does not know a stream: it is asked before that is believed. */
  async function askAgain(stream: Stream): Promise<void> {
    const id = stream.id as string;
    const [found] = await transfer.ask([id]);
    if (found && found.offset !== stream.offset) await moveTo(stream, found.offset, found.mark);
    if (!found) stream.wayBack = stream.delivered ?? stream.from ?? 0;
    takeWayBack(stream);
  }

  /**
   * The receiver has lost the stream: what was not delivered is shipped again, as a new stream that says so. What was all
   * delivered needs no second time. True when the stream went back.
   */
  function takeWayBack(stream: Stream): boolean {
    const { wayBack, offset, path, id } = stream;
    if (wayBack === undefined) return false;
    delete stream.wayBack;
    const from = Math.min(offset, wayBack);
    if (from < offset) {
      const told = {
        path,
        stream: id,
        from,
        bytes: offset - from,
        deliveredAsOf: isoTime(stream.deliveredAt),
      };
      log.warn("receiver has lost lines: shipping them again", told);
    }
    beginAs(stream, from < offset ? "again" : "new", from);
    stream.signature = {
      ...stream.signature,
      marks: stream.signature.marks.filter(({ end }) => end <= from),
    };
    transfer.moved = true;
    return true;
  }

  /** A new stream in the same file, behind the newest mark that it still holds. */
  async function beginBehindFit(stream: Stream, file: NonNullable<Stream["file"]>): Promise<void> {
    const marks = await newestFit(file, stream.signature.marks);
    stream.signature = { ...stream.signature, marks };
    beginAs(stream, "new", marks.at(-1)?.end ?? 0);
  }
}

/** Draws a name: nothing of the file is in it, so no two streams ever share one. */
function beginAs(stream: Stream, begin: "new" | "again", offset: number): void {
  stream.id = drawName();
  stream.begin = begin;
  stream.isNamed = false;
  stream.offset = stream.from = offset;
  delete stream.delivered;
  delete stream.isOld;
}

/** A mark as the wire has it. */
export function formatSeen({ length, hash }: Mark): string {
  return `${length}:${hash}`;
}

function headOf(head: Mark | undefined): { head?: string } {
  return head ? { head: formatSeen(head) } : {};
}

function isoTime(ms: number | undefined): string | undefined {
  return ms === undefined ? undefined : new Date(ms).toISOString();
}

function countNewlines(bytes: Uint8Array): number {
  let count = 0;
  for (let at = bytes.indexOf(0x0a); at >= 0; at = bytes.indexOf(0x0a, at + 1)) count++;
  return count;
}

/**
 * Throws Truncated when the bytes before `offset`, or the head, are not the ones that were seen before. `view`
 * begins at most {@link MARK_BYTES} before the offset; `atEnd` says that it goes to the end of the file.
 */
function checkGuard(seen: (Mark | undefined)[], view: Buffer, offset: number, atEnd: boolean): void {
  const guard = Math.min(MARK_BYTES, offset);
  if (view.length < guard) throw new Truncated();
  const start = offset - guard;
  for (const mark of seen) {
    if (!mark || mark.end - mark.length < start) continue;
    const bytes = view.subarray(mark.end - mark.length - start, mark.end - start);
    const cut = bytes.length < mark.length;
    if (cut ? atEnd : markOf(bytes, mark.end).hash !== mark.hash) throw new Truncated();
  }
}

/**
 * The signature with the head as far as `view`, that begins at `start`, shows it: it is marked as soon as it is
 * seen, so that a copy is known before anything was shipped. `first` is where a head that is not known begins.
 */
function headSeen(signature: Signature, view: Buffer, start: number, first: number): Signature {
  const { head } = signature;
  const at = head ? head.end - head.length : first;
  return at < start ? signature : addHead(signature, view.subarray(at - start), at);
}

/** The lines that are not to be skipped. A line that goes over several chunks is never skipped, not even in part. */
function chooseLines(bytes: Buffer<ArrayBuffer>, inLine: boolean, skip: Buffer[][]): Buffer<ArrayBuffer> {
  if (skip.length === 0 || bytes.at(-1) !== 0x0a) return bytes;
  const first = inLine ? bytes.indexOf(0x0a) + 1 : 0;
  if (inLine && first === 0) return bytes;
  const kept = skipLines(bytes.subarray(first), skip);
  return bytes.subarray(0, first + kept.length);
}

type Pair = [Buffer<ArrayBuffer>, Buffer<ArrayBuffer>];

/** The buffers of the chunks in hand: made when first needed, handed from stream to stream. */
function createBuffers(size: number) {
  const free: Pair[] = [];
  const waiting: ((pair: Pair) => void)[] = [];
  let made = 0;
  return {
    take(): Promise<Pair> {
      const pair = free.pop();
      if (pair) return Promise.resolve(pair);
      if (made >= TRANSFERS) return new Promise((resolve) => waiting.push(resolve));
      made++;
      return Promise.resolve([Buffer.allocUnsafeSlow(size), Buffer.allocUnsafeSlow(size)]);
    },
    give(pair: Pair): void {
      const next = waiting.shift();
      if (next) next(pair);
      else free.push(pair);
    },
  };
}
