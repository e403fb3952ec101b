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

/** Files in hand at once: a buffer each, so that memory does not grow with the files. */
const TRANSFERS = 3;
/** On a link on which a chunk takes so long, one is on its way. */
const SLOW_MS = 2_000;
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

/** A chunk on its way. */
interface Flown extends Prepared {
  answer: Promise<Answer>;
  /** When it was sent, ms of the monotonic clock. */
  sentAt: number;
}

/** The chunks of one stream that are on their way, oldest first. */
interface Flight {
  flying: Flown[];
  buffer: Buffer<ArrayBuffer>;
  /** One at a time, until the next 200. */
  isSingle: boolean;
}

export type Transfer = ReturnType<typeof createTransfer>;

/** The transfers of one shipper: they share the connection, the buffers and the counters. */
export function createTransfer({ config, log, signal, now, faults, lag, named }: TransferOptions) {
  const uploader = createUploader(config, signal);
  const buffers = createBuffers(MARK_BYTES + config.chunkBytes);
  const skip = config.skip.map((rule) => rule.map((text) => Buffer.from(text)));
  /** Statuses that were answered since the last good answer. */
  const failing = new Set<number>();
  /** The same of the question where the streams stand. */
  const unanswered = new Set<number>();
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
        isAnswered(unanswered);
        return told;
      } catch (error) {
        if (error instanceof Unanswered) isRefused(unanswered, error.status, error.reason);
        throw error;
      }
    },

    /** Ships a stream up to the present end of its open file. Throws Refused, Truncated, the system's error. */
    async drain(stream: Stream): Promise<void> {
      const buffer = await buffers.take();
      const flight: Flight = { flying: [], buffer, isSingle: false };
      try {
        if (stream.offset === 0) await skipHole(stream);
        takeWayBack(stream);
        let next: Prepared | undefined;
        do {
          next = await fill(stream, flight, next);
          const first = flight.flying.shift();
          if (!first) return;
          const answer = await first.answer;
          failpoint("shipper:answered");
          if (answer.kind === "stored") isStored(stream, first, flight);
          if (answer.kind !== "stored" || takeWayBack(stream)) {
            await goBack(stream, flight, answer);
            next = undefined;
          } else next = first;
        } while (!signal.aborted);
      } finally {
        // Before the buffers and the file go to somebody else, nobody may still read into them.
        await settleFlight(stream, flight);
        buffers.give(buffer);
      }
    },
  };
  return transfer;

  function news(ahead: number): SenderNews {
    const { shipper, lost } = transfer;
    return { lag: Math.max(0, lag() - ahead), lost, shipper, agent: `log-rt-sync/${VERSION}` };
  }

  /**
   * Sends as many chunks as may be on their way: one for a stream that begins and after an answer that was not a 200 until
   * the next one, or when one takes long; else `inFlight`. `last` is the one that was answered last.
   */
  async function fill(
    stream: Stream,
    flight: Flight,
    last: Prepared | undefined,
  ): Promise<Prepared | undefined> {
    const { flying } = flight;
    let before = flying.at(-1) ?? last;
    // A stream may begin here: its first chunk travels alone.
    const most = () => (stream.id === undefined || stream.begin || flight.isSingle ? 1 : config.inFlight);
    while (flying.length < most() && !signal.aborted && (before?.full ?? true)) {
      const offset = before?.chunk.end ?? stream.offset;
      const marks = before?.marks ?? stream.signature.marks;
      const next = await prepare(stream, offset, marks, flight.buffer);
      if (!next) break;
      const chunk = {
        ...next.chunk,
        ...(stream.begin && { begin: stream.begin }),
        ...((stream.begin || next.head) && headOf(stream.signature.head)),
      };
      const flown = { ...next, answer: send(chunk), sentAt: performance.now() };
      flown.answer.catch(() => {}); // looked at when its turn comes
      flying.push(flown);
      before = flown;
    }
    return before;
  }

  function isStored(stream: Stream, { chunk, marks, sentAt }: Flown, flight: Flight): void {
    flight.isSingle = performance.now() - sentAt > SLOW_MS;
    stream.offset = chunk.end;
    stream.signature = { ...stream.signature, marks };
    delete stream.begin;
    transfer.moved = true;
  }

  /** After a 409 all that is on its way is waited for; it goes on from the highest offset that was told. */
  async function goBack(stream: Stream, flight: Flight, first: Answer): Promise<void> {
    const answers = [first, ...(await settleFlight(stream, flight))];
    flight.isSingle = true;
    const moved = answers.filter((answer) => answer.kind === "moved");
    const [highest] = moved.sort((a, b) => b.offset - a.offset);
    if (highest && highest.offset !== stream.offset) await moveTo(stream, highest.offset, highest.mark);
    else if (highest && first.kind === "moved") await moveTo(stream, highest.offset, highest.mark);
    else if (answers.some(({ kind }) => kind === "unknown")) await askAgain(stream);
  }

  /** Waits for all answers. What was stored behind a chunk whose answer was lost counts: the receiver stores in order. */
  async function settleFlight(stream: Stream, flight: Flight): Promise<Answer[]> {
    const answers: Answer[] = [];
    for (const flown of flight.flying.splice(0)) {
      const answer = await flown.answer.catch(() => undefined);
      if (answer?.kind === "stored") isStored(stream, flown, flight);
      else if (answer) answers.push(answer);
    }
    return answers;
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
      isRefused(failing, answer.status, answer.reason);
      throw new Refused(answer.waitMs);
    }
    if (answer.kind === "tooLarge") {
      if (chunk.end - chunk.offset <= chunkBytes) halve(); // others of the same size may be told so, too
      return answer;
    }
    isAnswered(failing);
    isAnswered(unanswered);
    if (answer.kind !== "stored") return answer;
    transfer.sent.lines += answer.lines;
    transfer.sent.bytes += chunk.end - chunk.offset;
    if (chunk.end > chunk.offset) transfer.sent.chunks++;
    return answer;
  }

  function isRefused(statuses: Set<number>, status: number, reason: string): void {
    statuses.add(status);
    const fields = { receiver: config.receiver, status: status || undefined, reason };
    faults.failed(`receiver ${status}`, "receiver does not take chunks: held, and tried again", fields);
  }

  /** An answered question says nothing of chunks that are refused. */
  function isAnswered(statuses: Set<number>): void {
    transfer.heardAt = now();
    for (const status of statuses) {
      statuses.delete(status);
      if (failing.has(status)) continue;
      faults.recovered(`receiver ${status}`, "receiver takes chunks again", { receiver: config.receiver });
    }
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

/** The buffers of the files in hand: made when first needed, handed from stream to stream. */
function createBuffers(size: number) {
  const free: Buffer<ArrayBuffer>[] = [];
  const waiting: ((buffer: Buffer<ArrayBuffer>) => void)[] = [];
  let made = 0;
  return {
    take(): Promise<Buffer<ArrayBuffer>> {
      const buffer = free.pop();
      if (buffer) return Promise.resolve(buffer);
      if (made >= TRANSFERS) return new Promise((resolve) => waiting.push(resolve));
      made++;
      return Promise.resolve(Buffer.allocUnsafeSlow(size));
    },
    give(buffer: Buffer<ArrayBuffer>): void {
      const next = waiting.shift();
      if (next) next(buffer);
      else free.push(buffer);
    },
  };
}
