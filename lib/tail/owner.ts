/**
 * Which stream a file belongs to, by its bytes: the same file under another name has another inode when it was
 * copied or compressed.
 */

import { type LogFile, MARK_BYTES, matchesSignature } from "./file.ts";
import type { Sibling } from "./rotation.ts";
import { type Family, liveStream, type Stream } from "./streams.ts";

const COMPARE_BYTES = 64 * 1024;

/**
 * The stream whose bytes this file has: first one whose own file is gone, then one of which it is a copy.
 * `length` is that of the file's content.
 */
export async function findOwner(
  family: Family,
  file: LogFile,
  length: number,
  isLive: boolean,
  located: Map<Stream, Sibling>,
): Promise<Stream | undefined> {
  // Of streams that begin alike the one of which most is known decides. A new live file may well begin like a
  // short one that is gone; only when much is the same, it is that file, written anew by an editor.
  const homeless = family.streams
    .filter((stream) => !located.has(stream) && (!isLive || knownOf(stream) >= MARK_BYTES))
    .sort((a, b) => knownOf(b) - knownOf(a));
  for (const whole of [true, false]) {
    for (const stream of homeless) {
      if (await matchesSignature(file, stream.signature, whole)) return stream;
    }
  }
  if (isLive) return undefined;
  const { size } = await file.stat();
  for (const stream of family.streams) {
    if (!mayBeCopied(family, stream, { file, size }, located)) continue;
    if (await isCopyOfStream(file, stream)) return stream;
  }
  // One of which nothing was read yet has no signature: then this is it, compressed or copied meanwhile, the
  // more so when it is as long as that was.
  const unread = homeless.filter(
    ({ done, signature, offset, file: own, size }) =>
      !done && !signature.head && offset === 0 && !own && size <= length,
  );
  return unread.find(({ size }) => size === length) ?? unread[0];
}

/** Up to which byte a stream's signature goes. */
function knownOf({ signature: { head, marks } }: Stream): number {
  return Math.max(head?.end ?? 0, marks.at(-1)?.end ?? 0);
}

/**
 * Whether a file may be made from a stream's: the live one is copied (copytruncate), a rotated one is compressed
 * under its own name, and of one that is gone, whose handle is still open, anything may have been made. A copy
 * by hand of a rotated one counts when much is the same: short files may well be equal by chance.
 */
function mayBeCopied(
  family: Family,
  stream: Stream,
  { file, size }: { file: LogFile; size: number },
  located: Map<Stream, Sibling>,
): boolean {
  const original = located.get(stream)?.path;
  if (original === undefined || stream === liveStream(family)) return true;
  if (file.compression) return file.path.startsWith(`${original}.`);
  return Math.min(size, knownOf(stream)) >= MARK_BYTES;
}

/**
 * The same for a stream: compared with its file, or, when that is closed, with what is known of it. It is not
 * opened again: it may be gone since the folder was listed.
 */
async function isCopyOfStream(copy: LogFile, { file, signature }: Stream): Promise<boolean> {
  if (!file) return matchesSignature(copy, signature, true);
  return !file.compression && (await isCopyOf(copy, file));
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

/** Reads a compressed file to its end, and gives the length of its content. Throws UnfinishedFile when there is none. */
export async function checkComplete(file: LogFile): Promise<number> {
  const block = new Uint8Array(COMPARE_BYTES);
  for (let position = 0; ; position += block.length) {
    const n = await file.read(block, position);
    if (n < block.length) return position + n;
  }
}
