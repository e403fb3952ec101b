/**
 * A family is one live log file with its rotated siblings; a stream is one file of it, from its first byte to
 * its last, whatever it is called meanwhile. `scanFamily` looks into the folder and says which file belongs to
 * which stream:
 *
 *   known key                         → that stream, wherever the file is now
 *   unknown, with a stream's bytes    → a copy or a compressed form of it: the stream goes on in it when its own
 *                                       file is gone, and is only remembered when that is still there
 *   unknown and new                   → a stream of its own, read from 0 (one that came and went while we were away)
 *   a stream without a file           → what was not read of it is lost, and told in bytes
 *
 * Files still being written by somebody else (copied, compressed) are left for the next look.
 */
import { createHash } from "node:crypto";
import type { FamilyState, StreamState } from "./cursor.ts";
import { listSiblings, look, type Sibling } from "./rotation.ts";
import { describe, type FaultLog, type Log } from "./service.ts";
import {
  contentStart,
  type LogFile,
  MARK_BYTES,
  matchesSignature,
  openLog,
  readMark,
  UnfinishedFile,
  wholeLines,
} from "./tail.ts";

/** A stream that was not seen for so long (ms) is forgotten, once everything of it is shipped. */
const FORGET_AFTER_MS = 24 * 3_600_000;
/** At the very first look, a rotated file written within this time (ms) may still get lines. */
const STILL_WRITTEN_MS = 60_000;
/** A compressed file without an end that was not written to for so long (ms) is damaged, not unfinished. */
const UNFINISHED_MS = 60_000;
const COMPARE_BYTES = 64 * 1024;
/** A file's time of writing may lie so far (ms) behind the clock: the kernel takes the time of its last tick. */
const CLOCK_TICK_MS = 10;
/** Open handles of rotated files that one family keeps; the others are opened when their turn comes. */
const OPEN_FILES = 32;

/** A stream, and its file as far as it is open. */
export interface Stream extends StreamState {
  file?: LogFile | undefined;
  /** When it last grew, ms. */
  grewAt: number;
  /** Its size when its bytes were last checked: until then they were the ones of this stream. */
  checkedSize?: number;
  /** Size at which its end was reached last. */
  endSeenAt?: number | undefined;
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
  /** The folder is to be looked at again at this time, ms; 0 for at once. */
  scanAt: number;
  /** Some file is not settled: still being copied or compressed, or missing for a moment only. */
  unsettled: boolean;
  /** Unknown files that are not ours, as they were when this was found out. */
  ignored: Set<string>;
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
  /** Offset at which the receiver stands with a stream; undefined when it does not know it. */
  ask(id: string): Promise<number | undefined>;
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
    ignored: new Set(),
    start,
  };
}

/** The stream of the file that is live now. */
export function liveStream(family: Family): Stream | undefined {
  return family.streams.find((stream) => stream.keys.includes(family.liveKey ?? ""));
}

/** Looks into the folder. Throws the system's error when it can't, and what `ask` throws. */
export async function scanFamily(family: Family, context: ScanContext): Promise<void> {
  const time = context.now();
  const siblings = await listSiblings(family.path, context.config.olddir);
  const live = await look(family.path);
  const files = live ? [...siblings, live] : siblings;
  family.liveKey = live?.key;
  family.scanAt = time + context.config.pollSeconds * 1000;
  if (family.start === "recover") await recover(family, files, context);
  else if (family.start === "first") await skipOldFiles(family, siblings, context);

  const located = locate(family, files, time);
  let waiting = false;
  const unknown = files.filter(({ key }) => !family.streams.some(({ keys }) => keys.includes(key)));
  if (unknown.length > 0) await findTruncated(family, located, context);
  for (const file of unknown) {
    const settled = file === live || (await settles(family, file, time, context));
    if (!settled) waiting = true;
    else if (!(await claim(family, file, file === live, located, context))) waiting = true;
  }
  family.start = "known";
  family.streams = inOrder(family.streams, located, files);
  if (waiting) family.scanAt = Math.min(family.scanAt, time + 1000);
  family.unsettled = waiting || !(await settleOrphans(family, located, time, context));
  forget(family, located, time, context);
  await closeSome(family, located);
}

/** Finds the streams' files by their keys; notes their sizes. */
function locate(family: Family, files: Sibling[], time: number): Map<Stream, Sibling> {
  const located = new Map<Stream, Sibling>();
  for (const file of files) {
    const stream = family.streams.find(({ keys }) => keys.includes(file.key));
    if (!stream) continue;
    stream.seenAt = time;
    stream.missingSince = undefined;
    const before = located.get(stream);
    // Of a file and its copies the plain one is read, and of those the one that the stream began in.
    if (before && !isCompressed(before.path)) continue;
    located.set(stream, file);
    stream.path = file.path;
    if (isCompressed(file.path)) continue;
    stream.size = file.size;
    if (stream.done && file.size > stream.offset) stream.done = false; // written to after it was finished
  }
  return located;
}

/**
 * Unknown files may be copies of known ones: those that are still being read must then be what they were, or
 * the copy of a truncated file would be taken for a new one.
 */
async function findTruncated(
  family: Family,
  located: Map<Stream, Sibling>,
  context: ScanContext,
): Promise<void> {
  for (const [stream, found] of [...located]) {
    const { head, marks } = stream.signature;
    if (stream.done || isCompressed(found.path) || (!head && marks.length === 0)) continue;
    stream.file ??= await openStream(family, stream).catch(() => undefined); // told of when it is to be read
    if (!stream.file || (await matchesSignature(stream.file, stream.signature, true))) continue;
    located.delete(stream);
    located.set(await beginAfterTruncation(family, stream, stream.file, context), found);
  }
}

/** Whether an unknown rotated file is complete; one that can't be read or is older than our start never counts. */
async function settles(
  family: Family,
  file: Sibling,
  time: number,
  { config }: ScanContext,
): Promise<boolean> {
  if (!file.readable || file.mtimeMs <= family.since) return true;
  const age = time - file.mtimeMs;
  return age >= config.rotateWaitSeconds * 1000 || age < -1000;
}

/** Says what an unknown file is. False when that can't be told yet. */
async function claim(
  family: Family,
  found: Sibling,
  isLive: boolean,
  located: Map<Stream, Sibling>,
  context: ScanContext,
): Promise<boolean> {
  if (!found.readable) {
    if (found.mtimeMs > family.since) {
      context.faults.failed(found.path, "cannot read rotated file: use gzip or zstd in logrotate", {
        path: found.path,
      });
    }
    return true;
  }
  const homeless = family.streams.filter((stream) => !located.has(stream)).length;
  const asSeen = `${found.key} ${found.size} ${found.mtimeMs} ${homeless}`;
  if (family.ignored.has(asSeen)) return true;
  if (!isLive && homeless === 0 && found.mtimeMs <= family.since) return true; // from before our first start
  let file: LogFile;
  try {
    file = await openLog(found.path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return false;
    context.faults.failed(found.path, "cannot read log file", { path: found.path, error: describe(error) });
    return true;
  }
  let keep = false;
  try {
    if (file.key !== found.key) return false; // renamed between the look and the opening
    if (file.compression) await checkComplete(file);
    const owner = await findOwner(family, file, isLive, located);
    if (owner) {
      context.log.info("file is a copy of a known one", { path: file.path, stream: owner.id });
      owner.keys.push(file.key);
      owner.seenAt = context.now();
      if (!located.has(owner)) {
        located.set(owner, found);
        owner.path = file.path;
        owner.missingSince = undefined;
        owner.done = false; // a line may have come between its end and the compressing
        owner.endSeenAt = undefined;
        keep = owner.file === undefined;
        if (keep) owner.file = file;
      }
    } else if (isLive || found.mtimeMs > family.since) {
      const offset =
        isLive && family.start === "first" && context.config.startAt === "end" ? await endOf(file) : 0;
      located.set(await beginStream(family, file, offset, context), found);
    } else {
      family.ignored.add(asSeen);
      return true;
    }
    context.changed();
    return true;
  } catch (error) {
    if (!(error instanceof UnfinishedFile)) throw error;
    if (context.now() - found.mtimeMs < UNFINISHED_MS) return false;
    context.log.warn("rotated file is damaged: not shipped unless it changes", {
      path: file.path,
      error: describe(error),
    });
    family.ignored.add(asSeen);
    return true;
  } finally {
    if (!keep) await file.close();
  }
}

/** The stream whose bytes this file has: first one whose own file is gone, then one of which it is a copy. */
async function findOwner(
  family: Family,
  file: LogFile,
  isLive: boolean,
  located: Map<Stream, Sibling>,
): Promise<Stream | undefined> {
  // Of streams that begin alike the one of which most is known decides.
  const homeless = family.streams
    .filter((stream) => !located.has(stream))
    .sort((a, b) => knownOf(b) - knownOf(a));
  for (const whole of [true, false]) {
    for (const stream of homeless) {
      if (await matchesSignature(file, stream.signature, whole)) return stream;
    }
  }
  if (isLive) return undefined; // the live file may begin like a rotated one, and is another all the same
  for (const stream of family.streams) {
    if (!stream.file || stream.file.compression || !mayBeCopied(family, stream, file, located)) continue;
    if (await isCopyOf(file, stream.file)) return stream;
  }
  // One of which nothing was read yet has no signature: then this is it, compressed or copied meanwhile.
  return homeless.find(
    ({ done, signature, offset, file: own }) => !done && !signature.head && offset === 0 && !own,
  );
}

/** Up to which byte a stream's signature goes. */
function knownOf({ signature: { head, marks } }: Stream): number {
  return Math.max(head?.end ?? 0, marks.at(-1)?.end ?? 0);
}

/**
 * Whether a file may be made from a stream's: the live one is copied (copytruncate), a rotated one is compressed
 * under its own name, and of one that is gone, whose handle is still open, anything may have been made.
 */
function mayBeCopied(family: Family, stream: Stream, file: LogFile, located: Map<Stream, Sibling>): boolean {
  const original = located.get(stream)?.path;
  if (original === undefined || stream === liveStream(family)) return true;
  return file.compression !== undefined && file.path.startsWith(`${original}.`);
}

/** Whether `copy` has the bytes of `original` as far as it goes; of a plain copy its head, middle and end. */
async function isCopyOf(copy: LogFile, original: LogFile): Promise<boolean> {
  const { size, mtimeMs } = await copy.stat();
  const { size: originalSize, mtimeMs: originalTime } = await original.stat();
  // Written to after the copy was made, and no longer than it: truncated, and by chance filled with the same.
  if (!copy.compression && size === originalSize && originalTime > mtimeMs) return false;
  const step = copy.compression ? COMPARE_BYTES : Math.max(1, Math.floor((size - COMPARE_BYTES) / 2));
  const a = new Uint8Array(COMPARE_BYTES);
  const b = new Uint8Array(COMPARE_BYTES);
  for (let position = 0; ; position += step) {
    const n = await copy.read(a, position);
    if (n === 0) return position > 0;
    if ((await original.read(b.subarray(0, n), position)) < n) return false;
    if (Buffer.compare(a.subarray(0, n), b.subarray(0, n)) !== 0) return false;
    if (n < COMPARE_BYTES || (!copy.compression && position + n >= size)) return true;
  }
}

/** Reads a compressed file to its end. Throws UnfinishedFile when there is none. */
async function checkComplete(file: LogFile): Promise<void> {
  const block = new Uint8Array(COMPARE_BYTES);
  for (let position = 0; ; position += block.length) {
    if ((await file.read(block, position)) < block.length) return;
  }
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

/** The first start ever follows the live file alone; of a rotated one only what is still being written. */
async function skipOldFiles(family: Family, siblings: Sibling[], context: ScanContext): Promise<void> {
  for (const sibling of siblings) {
    if (isCompressed(sibling.path) || !sibling.readable) continue;
    if (context.now() - sibling.mtimeMs > STILL_WRITTEN_MS) continue;
    const file = await openLog(sibling.path).catch(() => undefined);
    if (!file) continue;
    const stream = await beginStream(family, file, await endOf(file), context);
    stream.done = true;
    await file.close();
  }
}

/**
 * The cursor was damaged: the receiver is asked where it stands with each file, newest first. Files are shipped
 * oldest first, so one that is older than a known one was shipped before it. When none is known, compressed
 * files are left alone: nothing tells whether they were shipped.
 */
async function recover(family: Family, files: Sibling[], context: ScanContext): Promise<void> {
  const places = new Map<Sibling, Place | undefined>();
  for (const found of files.toReversed().filter(({ readable }) => readable)) {
    const taken = [...places.values()].map((place) => place?.id);
    places.set(found, await withFile(found.path, (file) => askPlace(family, file, taken, context)));
  }
  const anyKnown = [...places.values()].some((place) => place !== undefined);
  let known = false;
  let left = 0;
  for (const [found, place] of places) {
    known ||= place !== undefined;
    const packed = isCompressed(found.path);
    const past = place === undefined && (known || (packed && !anyKnown));
    if (past && packed && !anyKnown) left++;
    await withFile(found.path, async (file) => {
      const end = past && !packed ? await endOf(file) : 0;
      const stream = await beginStream(family, file, place?.offset ?? end, context);
      if (place) stream.id = place.id;
      stream.done = past;
    });
  }
  if (left > 0) {
    context.log.warn("compressed files are not shipped: nothing tells whether they were", { files: left });
  }
}

/** Opens a file for some work; one that can't be opened now, or is still being compressed, is looked at later. */
async function withFile<T>(path: string, work: (file: LogFile) => Promise<T>): Promise<T | undefined> {
  const file = await openLog(path).catch(() => undefined);
  try {
    return file && (await work(file));
  } catch (error) {
    if (!(error instanceof UnfinishedFile)) throw error;
    return undefined;
  } finally {
    await file?.close();
  }
}

interface Place {
  id: string;
  offset: number;
}

/** Where the receiver stands with a file; of several that begin with the same line it is the newest one's. */
async function askPlace(
  family: Family,
  file: LogFile,
  taken: (string | undefined)[],
  context: ScanContext,
): Promise<Place | undefined> {
  const { size } = await file.stat();
  let place: Place | undefined;
  for await (const id of streamNames(file, family.path)) {
    if (taken.includes(id)) break; // a newer file's
    const offset = await context.ask(id);
    if (offset === undefined) break;
    if (file.compression || offset <= size) place = { id, offset };
  }
  return place;
}

/**
 * The name of a stream on the wire. Undefined until its first line is whole. No other stream of the family has
 * the same.
 */
export async function nameStream(
  file: LogFile,
  family: Family,
  truncated = false,
): Promise<string | undefined> {
  for await (const name of streamNames(file, family.path, truncated)) {
    if (!family.streams.some(({ id }) => id === name)) return name;
  }
  return undefined;
}

/**
 * The names that a file may have, made from the path of its family and its first line, so that they can be told
 * again from a copy or a compressed form when the cursor is lost; a serial number for files that begin alike.
 */
async function* streamNames(file: LogFile, path: string, truncated = false): AsyncGenerator<string> {
  const head = new Uint8Array(MARK_BYTES);
  const bytes = head.subarray(0, await file.read(head, await contentStart(file, truncated)));
  const newline = bytes.indexOf(0x0a) + 1;
  if (newline === 0 && bytes.length < MARK_BYTES) return;
  const first = newline > 0 ? bytes.subarray(0, newline) : bytes;
  for (let serial = 0; ; serial++) {
    const hash = createHash("sha256").update(`${path}\0${serial}\0`).update(first);
    yield hash.digest("base64url").slice(0, 22);
  }
}

/** Where the last whole line ends. */
async function endOf(file: LogFile): Promise<number> {
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

/** What the cursor keeps of a family. */
export function toState({ since, streams }: Family): FamilyState {
  return {
    since,
    streams: streams.map(({ file, grewAt, checkedSize, endSeenAt, missingSince, ...state }) => state),
  };
}

/** False for a rotated file whose end was reached, and that nobody has written to since. */
export function mayHaveGrown(stream: Stream): boolean {
  return stream.file !== undefined || stream.endSeenAt === undefined || stream.endSeenAt !== stream.size;
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

/**
 * Streams whose file is nowhere: what was not read of them is lost, unless a handle is still open. The receiver
 * is asked first, because the cursor may lag behind it. False when some file may only be missing for a moment.
 */
async function settleOrphans(
  family: Family,
  located: Map<Stream, Sibling>,
  time: number,
  context: ScanContext,
): Promise<boolean> {
  let settled = true;
  for (const stream of family.streams) {
    if (stream.done || located.has(stream) || stream.file) continue;
    stream.missingSince ??= time;
    const patience = Math.max(1, context.config.rotateWaitSeconds) * 1000;
    family.scanAt = Math.min(family.scanAt, stream.missingSince + patience);
    if (time < stream.missingSince + patience) {
      settled = false;
      continue;
    }
    const committed = stream.id === undefined ? 0 : ((await context.ask(stream.id)) ?? 0);
    stream.offset = Math.max(stream.offset, committed);
    stream.done = true;
    context.changed();
    if (stream.size > stream.offset) context.lose(stream.size - stream.offset, stream);
  }
  return settled;
}

/** Drops what is shipped and has not been seen for a day. */
function forget(family: Family, located: Map<Stream, Sibling>, time: number, context: ScanContext): void {
  const kept = family.streams.filter(
    (stream) => !stream.done || located.has(stream) || time - stream.seenAt < FORGET_AFTER_MS,
  );
  if (kept.length === family.streams.length) return;
  family.streams = kept;
  context.changed();
}

/** Rotated files whose turn is far off are closed: their names are known, and descriptors are few. */
async function closeSome(family: Family, located: Map<Stream, Sibling>): Promise<void> {
  const open = family.streams.filter((stream) => stream.file && located.has(stream));
  for (const stream of open.slice(OPEN_FILES)) {
    if (stream.keys.includes(family.liveKey ?? "")) continue;
    await stream.file?.close();
    stream.file = undefined;
  }
}

/** Oldest first: streams without a file, then in the order of their files, the live one last. */
function inOrder(streams: Stream[], located: Map<Stream, Sibling>, files: Sibling[]): Stream[] {
  const place = (stream: Stream) => {
    const file = located.get(stream);
    return file ? files.indexOf(file) : -1;
  };
  return streams.toSorted((a, b) => place(a) - place(b));
}

function isCompressed(path: string): boolean {
  return path.endsWith(".gz") || path.endsWith(".zst");
}
