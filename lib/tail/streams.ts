/**
 * A stream is one log file from its first byte to its last, whatever it is called meanwhile; a family is the
 * streams of one live file and its rotated siblings. Here a stream begins, gets its name, is opened, and is done.
 */
import { randomBytes } from "node:crypto";
import { parseMarkLength, type StreamStatus } from "../chunk.ts";
import type { FaultLog, Log } from "../service.ts";
import type { FamilyState, StreamState } from "./cursor.ts";
import { type LogFile, MARK_BYTES, openLog, readMark, wholeLines } from "./file.ts";

/** A file's time of writing may lie so far (ms) behind the clock: the kernel takes the time of its last tick. */
const CLOCK_TICK_MS = 10;

/** A stream, and its file as far as it is open. */
export interface Stream extends StreamState {
  file?: LogFile | undefined;
  /** When it last grew, ms. */
  grewAt: number;
  /** Its size when its bytes were last checked: until then they were the ones of this stream. */
  checkedSize?: number;
  /** Size at which its end was reached last. */
  endSeenAt?: number | undefined;
  /** Size and time of writing of the live file when its end was reached last. */
  endedAs?: string;
  /** False until the name that was drawn is on stable storage. */
  isNamed?: boolean;
  /** The receiver has lost it: from here it is shipped again. */
  wayBack?: number;
  /** When `delivered` was told, ms. */
  deliveredAt?: number;
  /** Size at which no further whole line was there. */
  drainedAt?: number;
  /** Since when its file is nowhere to be found, ms. */
  missingSince?: number | undefined;
}

export interface Family {
  path: string;
  since: number;
  /** Oldest first, the live file last. */
  streams: Stream[];
  /** Key of the file under the live path now. */
  liveKey: string | undefined;
  /** When the folder was looked at last, ms. */
  scannedAt?: number;
  /** The folder is to be looked at again at this time, ms; 0 for at once. */
  scanAt: number;
  /** Some file is not settled: still being copied or compressed, or missing for a moment only. */
  unsettled: boolean;
  /** Until then, ms, the live file waits for rotated ones that are not settled; 0 before the first look. */
  heldUntil: number;
  /** The live file waits now. */
  liveHeld: boolean;
  /** Unknown files that are not ours, as they were when this was found out. */
  ignored: Set<string>;
  /** The receiver was not asked yet what it knows of these files. */
  unasked: boolean;
  /** How the first look takes what it finds. */
  start: "known" | "first" | "new" | "recover";
}

/** What a scan needs from the shipper. */
export interface ScanContext {
  config: {
    startAt: "beginning" | "end";
    rotateWaitSeconds: number;
    pollSeconds: number;
    olddir?: string | undefined;
  };
  now: () => number;
  log: Log;
  faults: FaultLog;
  signal: AbortSignal;
  /** What the receiver knows of these streams, or of all of this host. Throws Unanswered. */
  ask(names?: string[]): Promise<StreamStatus[]>;
  /** All that the receiver knew of this host at the start, when there was no cursor. Throws Unanswered. */
  known(): Promise<StreamStatus[]>;
  /** Names of the streams that are followed, of all families. */
  taken(): Set<string>;
  /** Counts bytes that can't be read any more. */
  lose(bytes: number, stream: StreamState): void;
  /** The set of streams has changed. */
  changed(): void;
}

/** A family as the cursor has it, or a new one. */
export function createFamily(path: string, start: Family["start"], now: number, state?: FamilyState): Family {
  const streams = (state?.streams ?? []).map((stream) => ({ ...stream, grewAt: 0 }));
  return {
    path,
    since: state?.since ?? now - CLOCK_TICK_MS,
    streams,
    liveKey: undefined,
    scanAt: 0,
    unsettled: false,
    heldUntil: 0,
    liveHeld: false,
    ignored: new Set(),
    unasked: state?.unasked ?? false,
    start,
  };
}

/**
 * What the cursor keeps of a family. Of one that is being recovered it is only that: from a part of its streams the
 * next start would conclude that the other files are older than the first one.
 */
export function toState({ since, start, unasked, streams }: Family): FamilyState {
  const states = streams.map(
    ({
      file,
      grewAt,
      checkedSize,
      endSeenAt,
      endedAs,
      missingSince,
      isNamed,
      wayBack,
      deliveredAt,
      drainedAt,
      ...state
    }) => state,
  );
  const asked = unasked ? { unasked } : {};
  if (start === "known") return { since, ...asked, streams: states };
  return { since, ...asked, start, streams: start === "recover" ? [] : states };
}

/** The stream of the file that is live now. */
export function liveStream(family: Family): Stream | undefined {
  return family.streams.find((stream) => stream.keys.includes(family.liveKey ?? ""));
}

/** Adds a stream for a file. */
export async function beginStream(
  family: Family,
  file: LogFile,
  offset: number,
  context: ScanContext,
  truncated = false,
): Promise<Stream> {
  const { size, mtimeMs } = await file.stat();
  const head = offset > 0 ? await readMark(file, Math.min(offset, MARK_BYTES)) : undefined;
  const mark = offset > 0 ? await readMark(file, offset) : undefined;
  const stream: Stream = {
    keys: [file.key],
    path: file.path,
    offset,
    signature: { head, marks: mark ? [mark] : [] },
    size: file.compression ? 0 : size,
    done: false,
    truncated,
    from: offset,
    since: context.now(),
    seenAt: context.now(),
    grewAt: mtimeMs,
  };
  family.streams.push(stream);
  context.changed();
  context.log.info("following", { path: file.path, offset, bytes: stream.size - offset });
  return stream;
}

/**
 * The live file was cut to nothing and written anew (copytruncate): its stream goes on in the copy, when there
 * is one, and a new stream begins in the file.
 */
export async function beginAfterTruncation(
  family: Family,
  stream: Stream,
  file: LogFile,
  context: ScanContext,
): Promise<Stream> {
  context.log.info("file was truncated", { path: stream.path, stream: stream.id, offset: stream.offset });
  stream.file = undefined;
  stream.size = Math.max(stream.offset, stream.checkedSize ?? 0); // the size seen since is the new content's
  stream.keys = stream.keys.filter((key) => key !== file.key);
  const next = await beginStream(family, file, 0, context, true);
  await file.close();
  family.scanAt = 0; // at once: the copy is there before the truncation
  return next;
}

/** A new name for a stream on the wire: 128 bits, drawn, never made from the file. */
export function drawName(): string {
  return randomBytes(16).toString("base64url");
}

/** The receiver has a stream of this file: it goes on there, with its name. */
export function goOnAt(stream: Stream, { stream: id, offset, delivered, mark }: StreamStatus): void {
  const length = parseMarkLength(mark ?? "") ?? 0;
  const hash = mark?.split(":")[1] ?? "";
  const marks = length > 0 ? [{ end: offset, length, hash }] : [];
  Object.assign(stream, { id, offset, done: false, signature: { ...stream.signature, marks } });
  if (delivered !== undefined) stream.delivered = delivered;
}

/** Opens a stream's file where it was last seen; undefined when another one lies there now. */
export async function openStream(family: Family, stream: Stream): Promise<LogFile | undefined> {
  if (stream.missingSince !== undefined) return undefined;
  try {
    const file = await openLog(stream.path);
    if (stream.keys.includes(file.key)) return file;
    await file.close();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
  family.scanAt = 0;
  return undefined;
}

/** False for a rotated file whose end was failpoint, and that nobody has written to since. */
export function mayHaveGrown(stream: Stream): boolean {
  return stream.file !== undefined || stream.endSeenAt === undefined || stream.endSeenAt !== stream.size;
}

/** A rotated file at whose end we are: done when it was quiet for long enough and ends with a whole line. */
export async function finishStream(family: Family, stream: Stream, context: ScanContext): Promise<void> {
  const { file } = stream;
  if (!file) return;
  const time = context.now();
  const { size, mtimeMs } = await file.stat();
  if (!file.compression) {
    if (size !== stream.endSeenAt) stream.grewAt = stream.endSeenAt === undefined ? mtimeMs : time;
    stream.endSeenAt = size;
    const quietAt = stream.grewAt + context.config.rotateWaitSeconds * 1000;
    if (time < quietAt) {
      family.scanAt = Math.min(family.scanAt, quietAt);
      return;
    }
  }
  await file.close();
  stream.file = undefined;
  const unfinished = stream.size - stream.offset;
  if (unfinished > 0 && !file.compression) return; // half a line: its writer may still end it
  stream.done = true;
  context.changed();
  context.log.info("file is done", { path: stream.path, stream: stream.id, bytes: stream.offset });
  if (unfinished > 0) context.lose(unfinished, stream);
}

/** Where the last whole line ends. */
export async function endOf(file: LogFile): Promise<number> {
  const { size } = await file.stat();
  const block = new Uint8Array(64 * 1024);
  for (let end = size; end > 0; ) {
    const start = Math.max(0, end - block.length);
    const n = await file.read(block.subarray(0, end - start), start);
    const lines = wholeLines(block.subarray(0, n));
    if (lines > 0) return start + lines;
    end = start;
  }
  return 0;
}

export function isCompressed(path: string): boolean {
  return path.endsWith(".gz") || path.endsWith(".zst");
}
