/**
 * The first look at a family: at the very first start only the live file is ours; after the loss of the cursor
 * the receiver knows how far each file was shipped.
 */

import { formatMark, parseMarkLength, type StreamStatus } from "../chunk.ts";
import { contentStart, type LogFile, openLog, UnfinishedFile } from "./file.ts";
import { findOwner } from "./owner.ts";
import type { Sibling } from "./rotation.ts";
import {
  beginStream,
  endOf,
  type Family,
  goOnAt,
  isCompressed,
  type ScanContext,
  type Stream,
} from "./streams.ts";

/** At the very first look, a rotated file written within this time (ms) may still get lines. */
const STILL_WRITTEN_MS = 60_000;

/** The first start ever follows the live file alone; of a rotated one only what is still being written. */
export async function skipOldFiles(family: Family, siblings: Sibling[], context: ScanContext): Promise<void> {
  for (const sibling of siblings) {
    if (isCompressed(sibling.path) || !sibling.readable) continue;
    if (context.now() - sibling.mtimeMs > STILL_WRITTEN_MS) continue;
    if (family.streams.some(({ keys }) => keys.includes(sibling.key))) continue;
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
 *
 * True when every file was looked at. Otherwise names were shifted meanwhile: what was found stays, and the next
 * look, at a new listing, goes on with the rest. A copy of a file that was found is left to that look as well.
 */
export async function recover(family: Family, files: Sibling[], context: ScanContext): Promise<boolean> {
  let known = false;
  let complete = true;
  for (const found of files.toReversed().filter(({ readable }) => readable)) {
    const before = family.streams.find(({ keys }) => keys.includes(found.key));
    known ||= before?.id !== undefined;
    if (before) continue;
    const file = await openLog(found.path).catch((error: NodeJS.ErrnoException) => error);
    if (file instanceof Error) {
      complete &&= file.code !== "ENOENT"; // what can't be opened is told of when it is to be read
      continue;
    }
    try {
      if (file.key !== found.key) complete = false;
      else if (await recoverFile(family, found, file, { files, known }, context)) known = true;
    } catch (error) {
      if (!(error instanceof UnfinishedFile)) throw error; // still being compressed: its original is there
    } finally {
      await file.close();
    }
  }
  const packed = family.streams.filter(({ path, done }) => isCompressed(path) && !done);
  if (complete && !known) for (const stream of packed) leaveAlone(stream, context);
  return complete;
}

/** Begins the stream of a file where the receiver is with it. True when the receiver knows it. */
async function recoverFile(
  family: Family,
  found: Sibling,
  file: LogFile,
  { files, known }: { files: Sibling[]; known: boolean },
  context: ScanContext,
): Promise<boolean> {
  const place = await askPlace(family, file, context);
  if (!place && (await findOwner(family, file, found.size, false, locatedIn(family, files)))) return false;
  const past = place === undefined && known;
  const offset = past && !file.compression ? await endOf(file) : 0;
  const stream = await beginStream(family, file, place?.offset ?? offset, context);
  if (place) goOnAt(stream, place);
  if (past) leaveAlone(stream, context);
  return place !== undefined;
}

function locatedIn(family: Family, files: Sibling[]): Map<Stream, Sibling> {
  const located = new Map<Stream, Sibling>();
  for (const file of files) {
    const stream = family.streams.find(({ keys }) => keys.includes(file.key));
    if (stream) located.set(stream, file);
  }
  return located;
}

function leaveAlone(stream: Stream, { log }: ScanContext): void {
  stream.done = true;
  const { path, size: bytes } = stream;
  log.warn("rotated file is not shipped: the receiver has never heard of it", { path, bytes });
}

/** Where the receiver stands with a file: the stream whose head and mark it holds, of several the longest. */
export async function askPlace(
  family: Family,
  file: LogFile,
  context: ScanContext,
): Promise<StreamStatus | undefined> {
  const { size } = await file.stat();
  const own = family.streams.map(({ id }) => id);
  let place: StreamStatus | undefined;
  for (const status of await context.known()) {
    if (own.includes(status.stream) || context.taken().has(status.stream)) continue;
    if (status.offset <= (place?.offset ?? 0) || (!file.compression && status.offset > size)) continue;
    if (await holds(file, status)) place = status;
  }
  return place;
}

/** Whether a file has the bytes of a stream's head and those before its offset; false for a stream without marks. */
async function holds(file: LogFile, { head, mark, offset }: StreamStatus): Promise<boolean> {
  const isSame = async (seen: string, end: (length: number) => number) => {
    const length = parseMarkLength(seen) ?? 0;
    const bytes = new Uint8Array(length);
    const at = end(length) - length;
    return length > 0 && at >= 0 && (await file.read(bytes, at)) === length && formatMark(bytes) === seen;
  };
  if (mark === undefined || !(await isSame(mark, () => offset))) return false;
  if (head === undefined) return true;
  const start = await contentStart(file, true);
  return isSame(head, (length) => start + length);
}
