/**
 * A stream's bytes on their way: read whole lines, check them against the bytes before, leave out what is to be
 * skipped, encode, send, and move the offset on when the receiver has answered. The only place where an offset
 * changes. The next chunk is read and encoded while the last one is in flight.
 */
import { type ChunkHeaders, IDLE_STREAM } from "./chunk.ts";
import type { Config } from "./config.ts";
import { failpoint } from "./durable.ts";
import type { FaultLog, Log } from "./service.ts";
import {
  addHead,
  addMark,
  contentStart,
  MARK_BYTES,
  type Mark,
  markOf,
  readMark,
  type Signature,
  skipLines,
  wholeLines,
} from "./tail/file.ts";
import { type Family, nameStream, type Stream } from "./tail/streams.ts";
import { type Chunk, createUploader, encodeBody } from "./upload.ts";

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

/** A chunk that is read and encoded, and the stream's marks when it is committed. */
interface Prepared {
  chunk: Chunk;
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
  let lostInFlight = false;

  const transfer = {
    /** Counts since the start. */
    sent: { lines: 0, bytes: 0, chunks: 0 },
    /** Bytes lost that the receiver has not been told of. */
    lost: 0,
    /** When the receiver answered last, ms. */
    heardAt: 0,
    /** Requests that wait for their answer. */
    inFlight: 0,
    /** A stream got on: there is something to save. */
    moved: false,

    /** Where the receiver stands with a stream; undefined when it does not know it. */
    ask: (id: string) => uploader.committed(config.host, id),

    /** Ships a stream up to the present end of its open file. Throws Refused, Truncated, the system's error. */
    async drain(family: Family, stream: Stream): Promise<void> {
      const [a, b] = await buffers.take();
      try {
        if (stream.offset === 0) await skipHole(stream);
        let next = await prepare(family, stream, stream.offset, stream.signature.marks, a);
        for (let turn = 1; next !== undefined && !signal.aborted; turn++) {
          const { chunk, marks, full }: Prepared = next;
          const other = turn % 2 === 1 ? b : a;
          const ahead = full ? prepare(family, stream, chunk.end, marks, other) : Promise.resolve(undefined);
          ahead.catch(() => {}); // looked at when its turn comes
          let offset: number | undefined;
          try {
            offset = await send(chunk, stream.path);
          } finally {
            // Before the buffers and the file go to somebody else, nobody may still read into them.
            await ahead.catch(() => {});
          }
          failpoint("shipper:answered");
          if (offset === chunk.end) {
            stream.offset = offset;
            stream.signature = { ...stream.signature, marks };
            transfer.moved = true;
            next = await ahead;
          } else {
            if (offset !== undefined) await moveTo(family, stream, offset);
            next = await prepare(family, stream, stream.offset, stream.signature.marks, other);
          }
        }
      } finally {
        buffers.give([a, b]);
      }
    },

    /** A sign of life: an empty range where the stream stands. Throws Refused. */
    async beat(stream: Stream | undefined): Promise<void> {
      const offset = stream?.offset ?? 0;
      const id = stream?.id ?? IDLE_STREAM;
      const empty = { body: new Uint8Array(0), encoding: "identity" } as const;
      await send({ host: config.host, stream: id, offset, end: offset, ...empty }, stream?.path);
    },
  };
  return transfer;

  /**
   * Reads the next chunk from `offset` into `buffer`: the bytes before it are read too and compared with the
   * mark that was made of them. Undefined when there is no whole line.
   */
  async function prepare(
    family: Family,
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
    if (length === 0) return undefined;
    stream.id ??= await nameStream(file, family, stream.truncated);
    if (stream.id === undefined) return undefined;
    if (isNew) await named();
    const marks = addMark(before, view.subarray(0, guard + length), offset + length);
    const inLine = guard > 0 && view[guard - 1] !== 0x0a && view[guard - 1] !== 0;
    const body = chooseLines(bytes.subarray(0, length), inLine, skip);
    const encoded = encodeBody(body, config.compression);
    const headers: ChunkHeaders = { host: config.host, stream: stream.id, offset, end: offset + length };
    return { chunk: { ...headers, ...encoded }, marks, full: n === limit };
  }

  /** What a truncation left in front of the first line is no part of the log. */
  async function skipHole(stream: Stream): Promise<void> {
    const bytes = stream.file ? await contentStart(stream.file, stream.truncated) : 0;
    if (bytes === 0 || stream.signature.head) return;
    log.info("hole of NULs skipped", { path: stream.path, bytes });
    stream.offset = bytes;
  }

  /** Sends a chunk once. Gives the offset where the stream stands now, undefined when a smaller chunk is due. */
  async function send(chunk: Chunk, path: string | undefined): Promise<number | undefined> {
    const lost = lostInFlight ? 0 : transfer.lost;
    if (lost > 0) lostInFlight = true;
    transfer.inFlight++;
    failpoint("shipper:sending");
    const answer = await uploader
      .send({ ...chunk, lag: Math.max(0, lag() - (chunk.end - chunk.offset)), lost })
      .finally(() => {
        transfer.inFlight--;
        if (lost > 0) lostInFlight = false;
      });
    const { receiver } = config;
    if (answer.kind === "refused") {
      const { status, reason, waitMs } = answer;
      failing.add(status);
      const fields = { receiver, status: status || undefined, reason };
      faults.failed(`receiver ${status}`, "receiver does not take chunks: held, and tried again", fields);
      throw new Refused(waitMs);
    }
    if (answer.kind === "tooLarge") return halve();
    transfer.heardAt = now();
    for (const status of failing)
      faults.recovered(`receiver ${status}`, "receiver takes chunks again", { receiver });
    failing.clear();
    // A chunk that is answered with its own end was stored, now or at an earlier try whose answer was lost.
    if (answer.offset === chunk.end) transfer.lost -= lost;
    if (answer.kind === "stored") {
      transfer.sent.lines += answer.lines;
      transfer.sent.bytes += chunk.end - chunk.offset;
      if (chunk.end > chunk.offset) transfer.sent.chunks++;
    } else {
      log.info("stream stands elsewhere", {
        path,
        stream: chunk.stream,
        sent: chunk.offset,
        offset: answer.offset,
      });
    }
    return answer.offset;
  }

  function halve(): undefined {
    if (chunkBytes <= MIN_CHUNK_BYTES) {
      faults.failed("receiver 413", "receiver takes no chunk, however small", { receiver: config.receiver });
      failing.add(413);
      throw new Refused(10_000);
    }
    chunkBytes = Math.max(MIN_CHUNK_BYTES, chunkBytes >> 1);
    log.warn("chunk is too large for the receiver: halved", { chunkBytes });
  }

  /** The receiver named another offset: go on there, when the file has it. */
  async function moveTo(family: Family, stream: Stream, offset: number): Promise<void> {
    transfer.moved = true;
    const { file } = stream;
    const known = file?.compression ? offset : stream.size;
    if (offset <= known && file) {
      const mark = await readMark(file, offset);
      const marks = stream.signature.marks.filter(({ end }) => end < offset);
      stream.signature = { ...stream.signature, marks: mark ? [...marks, mark] : marks };
      stream.offset = offset;
      return;
    }
    // The name is another file's: one that began with the same line, and is forgotten here.
    const fields = { path: stream.path, stream: stream.id, committed: offset, size: known };
    log.warn("stream is longer at the receiver than the file: taken as a new one", fields);
    if (stream.file) stream.id = await nameStream(stream.file, family, stream.truncated);
  }
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
