/**
 * The first look at a family: at the very first start only the live file is ours; after the loss of the cursor
 * the receiver knows how far each file was shipped.
 */
import type { Sibling } from "./rotation.ts";
import { beginStream, endOf, type Family, isCompressed, type ScanContext, streamNames } from "./stream.ts";
import { type LogFile, openLog, UnfinishedFile } from "./tail.ts";

/** At the very first look, a rotated file written within this time (ms) may still get lines. */
const STILL_WRITTEN_MS = 60_000;

/** The first start ever follows the live file alone; of a rotated one only what is still being written. */
export async function skipOldFiles(family: Family, siblings: Sibling[], context: ScanContext): Promise<void> {
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
 * Whether the receiver knows one of these files, although there is no cursor: then the state folder is gone, and
 * this is no first start. It is only asked where that makes a difference: a live file alone is begun at 0, and
 * answered 409. A receiver that can't be asked now does not hold up the first start.
 */
export async function wasShipped(family: Family, files: Sibling[], context: ScanContext): Promise<boolean> {
  if (files.length < 2 && context.config.startAt === "beginning") return false;
  try {
    for (const found of files.toReversed()) {
      if (!found.readable || isCompressed(found.path)) continue;
      if (await withFile(found.path, (file) => askPlace(family, file, [], context))) return true;
    }
  } catch (error) {
    if (context.signal.aborted) throw error;
  }
  return false;
}

/**
 * The cursor was damaged: the receiver is asked where it stands with each file, newest first. Files are shipped
 * oldest first, so one that is older than a known one was shipped before it. When none is known, compressed
 * files are left alone: nothing tells whether they were shipped.
 */
export async function recover(family: Family, files: Sibling[], context: ScanContext): Promise<void> {
  const places = new Map<Sibling, Place | undefined>();
  for (const found of files.toReversed().filter(({ readable }) => readable)) {
    const taken = [...places.values()].map((place) => place?.id);
    places.set(found, await withFile(found.path, (file) => askPlace(family, file, taken, context)));
  }
  const anyKnown = [...places.values()].some((place) => place !== undefined);
  let known = false;
  for (const [found, place] of places) {
    known ||= place !== undefined;
    const packed = isCompressed(found.path);
    const past = place === undefined && (known || (packed && !anyKnown));
    await withFile(found.path, async (file) => {
      const end = past && !packed ? await endOf(file) : 0;
      const stream = await beginStream(family, file, place?.offset ?? end, context);
      if (place) stream.id = place.id;
      stream.done = past;
    });
    if (past) {
      const { path, size: bytes } = found;
      context.log.warn("rotated file is not shipped: the receiver has never heard of it", { path, bytes });
    }
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
