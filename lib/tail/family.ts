/**
 * The look into the folder of a live log file and its rotated siblings, that says which file belongs to which
 * stream:
 *
 *   known key                         → that stream, wherever the file is now
 *   unknown, with a stream's bytes    → a copy or a compressed form of it: the stream goes on in it when its own
 *                                       file is gone, and is only remembered when that is still there
 *   unknown and new                   → a stream of its own, read from 0 (one that came and went while we were away)
 *   a stream without a file           → what was not read of it is lost, and told in bytes
 *
 * Files still being written by somebody else (copied, compressed) are left for the next look.
 */

import { errorMessage } from "../service.ts";
import { type LogFile, matchesSignature, openLog, UnfinishedFile } from "./file.ts";
import { askPlace, recover, skipOldFiles } from "./firstlook.ts";
import { checkComplete, findOwner } from "./owner.ts";
import { listSiblings, look, type Sibling } from "./rotation.ts";
import {
  beginAfterTruncation,
  beginStream,
  endOf,
  type Family,
  goOnAt,
  isCompressed,
  openStream,
  type ScanContext,
  type Stream,
} from "./streams.ts";

/** A stream that was not seen for so long (ms) is forgotten, once everything of it is shipped. */
const FORGET_AFTER_MS = 24 * 3_600_000;
/** A compressed file without an end that was not written to for so long (ms) is damaged, not unfinished. */
const UNFINISHED_MS = 60_000;
/** Open handles of rotated files that one family keeps; the others are opened when their turn comes. */
const OPEN_FILES = 32;
/** So many listings are made while names are being shifted, and the next ones after so long (ms). */
const LISTINGS = 8;
const SHIFTING_MS = 50;

/** Looks into the folder. Throws the system's error when it can't, and what `ask` throws. */
export async function scanFamily(family: Family, context: ScanContext): Promise<void> {
  const time = context.now();
  const files = await listFamily(family, context.config.olddir);
  family.unsettled = files === undefined;
  family.scanAt = time + (files ? context.config.pollSeconds * 1000 : SHIFTING_MS);
  if (!files) return;
  const live = files.find(({ path }) => path === family.path);
  const siblings = files.filter((file) => file !== live);
  family.liveKey = live?.key;
  // Only when the receiver knows nothing of this host, this is the very first start: it is asked before a chunk leaves.
  if (family.start === "first" && family.streams.length === 0) family.unasked = true;
  if (family.start === "recover" && !(await recover(family, files, context))) {
    family.unsettled = true;
    family.scanAt = time + SHIFTING_MS;
    return;
  }
  if (family.start === "first") await skipOldFiles(family, siblings, context);

  const located = locate(family, files, time);
  let waiting = false;
  const unknown = files.filter(({ key }) => !family.streams.some(({ keys }) => keys.includes(key)));
  if (unknown.length > 0) await findTruncated(family, located, context);
  for (const file of unknown) {
    const settled =
      file === live || family.start === "recover" || (await settles(family, file, time, context));
    if (!settled) waiting = true;
    else if (!(await claim(family, file, file === live, located, context))) waiting = true;
  }
  family.start = "known";
  family.scannedAt = time;
  family.streams = inOrder(family.streams, located, files);
  if (waiting) family.scanAt = Math.min(family.scanAt, time + 1000);
  // What was rotated while we were away goes before the live file, if it is settled soon.
  if (family.heldUntil === 0) family.heldUntil = time + context.config.rotateWaitSeconds * 1000;
  family.liveHeld = waiting && time < family.heldUntil;
  family.unsettled = waiting || !(await settleOrphans(family, located, time, context));
  forget(family, located, time, context);
  await closeSome(family, located);
}

/**
 * The receiver is asked what it knows of a host that has no cursor: what it has of the files that are followed goes on
 * there, and the others are looked for. Until it answers, files are followed all the same. Throws Unanswered.
 */
export async function settleUnasked(family: Family, context: ScanContext): Promise<void> {
  if (!family.unasked) return;
  const known = await context.known();
  family.unasked = false;
  context.changed();
  if (known.length === 0) return;
  for (const stream of family.streams) {
    const file =
      stream.id === undefined ? await openStream(family, stream).catch(() => undefined) : undefined;
    if (!file) continue;
    try {
      const place = await askPlace(family, file, context);
      if (place) goOnAt(stream, place);
    } finally {
      await file.close();
    }
  }
  family.start = "recover";
  family.scanAt = 0;
}

/**
 * The siblings and the live file, that last. A rotation that shifts names while they are listed can hide a file:
 * when one is new or missing, only two listings that agree are believed. Undefined when none of them do.
 */
async function listFamily(family: Family, olddir: string | undefined): Promise<Sibling[] | undefined> {
  let before: string | undefined;
  for (let n = 0; n < LISTINGS; n++) {
    const siblings = await listSiblings(family.path, olddir);
    const live = await look(family.path);
    const files = live ? [...siblings, live] : siblings;
    const names = files.map(({ path, key }) => `${path} ${key}`);
    const listing = names.sort().join("\n");
    if (listing === before || isAsKnown(family, files)) return files;
    before = listing;
  }
  return undefined;
}

/** Whether every file is known, and every stream that is not done has one. */
function isAsKnown({ start, streams }: Family, files: Sibling[]): boolean {
  const keys = new Set(files.map(({ key }) => key));
  for (const stream of streams) {
    const own = stream.keys.filter((key) => keys.has(key));
    if (own.length === 0 && !stream.done) return false;
    for (const key of own) keys.delete(key);
  }
  return start === "known" && keys.size === 0;
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
  if (family.streams.some(({ keys }) => keys.includes(found.key))) return true; // another name of one claimed now
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
  // From before our first start; but what is left of a recovery are copies.
  if (!isLive && homeless === 0 && found.mtimeMs <= family.since && family.start !== "recover") return true;
  let file: LogFile;
  try {
    file = await openLog(found.path);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return false;
    context.faults.failed(found.path, "cannot read log file", {
      path: found.path,
      error: errorMessage(error),
    });
    return true;
  }
  let keep = false;
  try {
    if (file.key !== found.key) return false; // renamed between the look and the opening
    const length = file.compression ? await checkComplete(file) : found.size;
    const owner = await findOwner(family, file, length, isLive, located);
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
      error: errorMessage(error),
    });
    family.ignored.add(asSeen);
    return true;
  } finally {
    if (!keep) await file.close();
  }
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
    const [found] = stream.id === undefined ? [] : await context.ask([stream.id]);
    const committed = found?.offset ?? 0;
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
  const places = new Map(files.map((file, place) => [file, place]));
  const place = (stream: Stream) => places.get(located.get(stream) as Sibling) ?? -1;
  return streams.toSorted((a, b) => place(a) - place(b));
}
