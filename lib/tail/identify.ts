/**
 * Which stream a file is, by its bytes. Its own inode comes first (lib/tail/look.ts); what is asked here is what a file is
 * whose inode nobody knows, or whose bytes are not the ones that its stream had. From 1,024 bytes on head and mark are proof:
 *
 *   head and newest mark of a stream whose own file is nowhere      → that stream goes on in it
 *   only an older mark                                              → a new stream goes on behind that mark
 *   nothing that the file of a stream lacks                         → a copy of it, never shipped
 *   a copy that differs somewhere                                   → a log of its own, from where they part
 *   the next file of a log that was rotated                         → the same, but only with all that the last one has
 *   none of it                                                      → a log of its own, from its first byte
 *   none of it, and a file of its log went before it was read       → a new rotation is that one
 *
 * Below, a live file is nobody's (but when it was copied with its times, or its folder was), a rotated one is a stream's when
 * the stream's own file is nowhere and all of its bytes are there. Candidates from the cursor and from the receiver's answer are alike.
 */
import { MARK_BYTES } from "../chunk.ts";
import { hasHome, holding, type Stream, type StreamState } from "./cursor.ts";
import {
  ARCHIVE,
  commonLength,
  contentStart,
  endOfLines,
  holds,
  LogFile,
  type Mark,
  markBefore,
} from "./file.ts";
import { type FoundFile, isNameOf } from "./paths.ts";

/** What a file is. `at`: where a stream that goes on begins. */
export type Identity =
  | { is: "stream"; stream: Stream; isDone: boolean }
  | { is: "behind"; stream: Stream; at: number }
  | { is: "copy"; stream: Stream }
  | { is: "small" }
  | { is: "busy" }
  | { is: "new"; at: number };

/** How a file fits a stream: with all that is known of it, behind an older mark, or not at all. */
type Fit = { is: "all" } | { is: "behind"; at: number } | { is: "none" };

/** How a file's bytes fit what is known of a stream. `isHeadKnown`: the heads were compared already. */
export async function fitOf(file: LogFile, stream: Stream, isHeadKnown = false): Promise<Fit> {
  const { head, marks, offset } = stream;
  const hasHead = !head || isHeadKnown || (await endOfHead(file, head)) !== undefined;
  if (offset === 0) return { is: hasHead ? "all" : "none" };
  // Version 1.0 kept no marks: the file has at least what was shipped of it.
  if (marks.length === 0) return { is: hasHead && (await file.contentLength()) >= offset ? "all" : "none" };
  const newest = marks.at(-1) as Mark;
  if (hasHead && (await holds(file, newest))) return { is: "all" };
  for (const mark of marks.slice(0, -1).toReversed()) {
    const isProof = mark.end > MARK_BYTES && mark.length === MARK_BYTES;
    if (isProof && (await endsLine(file, mark.end)) && (await holds(file, mark)))
      return { is: "behind", at: mark.end };
  }
  return { is: "none" };
}

/** Where a head ends in a file: a copy may have the hole before it, or not, and an answer does not say how large that is. */
async function endOfHead(file: LogFile, head: Mark): Promise<number | undefined> {
  if (await holds(file, head)) return head.end;
  const end = (await contentStart(file, true)) + head.length;
  return (await holds(file, { ...head, end })) ? end : undefined;
}

/** Notes where the head stands in the file that turned out to be the stream's. */
export async function placeHead(file: LogFile, { head }: Stream): Promise<void> {
  if (head) head.end = (await endOfHead(file, head)) ?? head.end;
}

async function endsLine(file: LogFile, end: number): Promise<boolean> {
  const last = new Uint8Array(1);
  return (await file.read(last, end - 1)) === 1 && last[0] === 0x0a;
}

interface Circumstances {
  /** It lies in another folder than its log did. */
  isCopied?: boolean;
  /** All other files are known: one that has a part of a stream may have more of another's. */
  isLast?: boolean;
}

/** Says what an open file is. Throws UnfinishedFile. */
export async function identify(
  file: LogFile,
  found: FoundFile,
  streams: Stream[],
  circumstances: Circumstances = {},
): Promise<Identity> {
  const what = await identifyByBytes(file, found, streams, circumstances);
  if (what.is !== "new" || what.at > 0) return what;
  const unread = streams.find((stream) => !hasHome(stream) && isUnread(stream, found));
  if (!unread || (await file.contentLength()) < unread.size) return what;
  return unread.isBusy ? { is: "busy" } : { is: "stream", stream: unread, isDone: false };
}

async function identifyByBytes(
  file: LogFile,
  found: FoundFile,
  streams: Stream[],
  { isCopied = false, isLast = false }: Circumstances,
): Promise<Identity> {
  const start = await contentStart(file, true);
  const bytes = new Uint8Array(MARK_BYTES);
  const view = bytes.subarray(0, await file.read(bytes, start));
  const hashes = new Map<number, string>(); // of the first bytes, by their number: thousands of heads are of one length
  const alike = streams.filter((stream) => isAlike(stream, view, hashes));
  if (alike.length === 0) return { is: "new", at: 0 };
  if (alike.some(({ isBusy }) => isBusy)) return { is: "busy" };
  const homes = alike.filter((stream) => stream.until === undefined && hasHome(stream));
  const orphans = alike.filter((stream) => !hasHome(stream));
  const isWhole = ({ until, phase, size, offset }: Stream) =>
    until === undefined && (phase.is === "ended" || size === offset);
  const [archive] = orphans.filter(isWhole).sort((a, b) => b.offset - a.offset);
  if (archive && view.length === MARK_BYTES && (await packs(file, archive, found.mtimeMs))) {
    return { is: "stream", stream: archive, isDone: true };
  }
  const length = await file.contentLength();
  const isAsLong = ({ size }: Stream) => Number(size === length);
  orphans.sort((a, b) => b.offset - a.offset || isAsLong(b) - isAsLong(a));
  let behind: { stream: Stream; at: number } | undefined;
  for (const stream of orphans) {
    const fit = asPart(stream, await fitOf(file, stream, true));
    if (
      fit.is === "all" &&
      isEnough(stream, found, length, isCopied) &&
      !(await isBehind(stream, file, homes))
    )
      return { is: "stream", stream, isDone: file.compression !== undefined && length === stream.offset };
    if (fit.is === "behind" && fit.at > (behind?.at ?? 0)) behind = { stream, at: fit.at };
  }
  if (behind && !isLast) return { is: "behind", ...behind };
  const isNext = found.isLive && isSuccessor(found, streams);
  const what = await compareWithKnown(file, found, homes, { length, isCopied, isNext });
  const isMore = what.is !== "new" || what.at > (behind?.at ?? 0);
  return behind && !isMore ? { is: "behind", ...behind } : what;
}

/** A stream that ends where another one of its file begins does not go on itself: with all of it, a new one begins behind it. */
function asPart({ until, offset, marks }: Stream, fit: Fit): Fit {
  if (until === undefined || fit.is !== "all") return fit;
  return marks.at(-1)?.length === MARK_BYTES ? { is: "behind", at: offset } : { is: "none" };
}

/** Whether a stream that has a file goes on behind this one in the same bytes: the file is a copy of that one, then. */
async function isBehind({ offset }: Stream, file: LogFile, homes: Stream[]): Promise<boolean> {
  for (const other of homes) {
    const isProof = other.offset > offset && other.marks.at(-1)?.length === MARK_BYTES;
    if (isProof && (await fitOf(file, other, true)).is === "all") return true;
  }
  return false;
}

/** Whether a stream's head is the one of the file, as far as both go. */
function isAlike({ head, marks, offset }: Stream, view: Uint8Array, hashes: Map<number, string>): boolean {
  if (!head) return offset > 0 && marks.length > 0; // version 1.0 may have kept no head
  const { length } = head;
  if (length > view.length) return false;
  const hash = hashes.get(length) ?? markBefore(view.subarray(0, length), length).hash;
  hashes.set(length, hash);
  return head.hash === hash;
}

/** A file that went before a byte of it was read has no head; the next new rotation of its log is it, and is shipped from 0. */
function isUnread({ head, offset, size, phase, log, mtimeMs }: Stream, found: FoundFile): boolean {
  if (head || offset > 0 || size === 0 || phase.is !== "gone") return false;
  return !found.isLive && found.log === log && found.mtimeMs >= mtimeMs - 1000;
}

/** Whether head or mark of a stream are long enough to be proof. */
export function isProven({ head, marks }: StreamState): boolean {
  return Math.max(head?.length ?? 0, marks.at(-1)?.length ?? 0) >= MARK_BYTES;
}

/** Whether a file was taken for a stream's by fewer bytes than are proof, under a name that no rule knows. */
export function isTaken(stream: StreamState, found: Pick<FoundFile, "path" | "log" | "isLive">): boolean {
  return !isProven(stream) && !found.isLive && !isNameOf(found.path, found.log);
}

/** Whether what fits is enough to be sure; below 1,024 bytes a file must have all that was seen. */
function isEnough(stream: Stream, found: FoundFile, length: number, isCopied: boolean): boolean {
  if (isProven(stream)) return true;
  if (length < stream.size) return false;
  if (!found.isLive || isCopied || stream.key === "") return true;
  const isSameTime = Math.floor(found.mtimeMs / 1000) === Math.floor(stream.mtimeMs / 1000);
  return length === stream.size && isSameTime; // copied with its times, as to a new disk
}

/** The file beside those whose streams have theirs: a copy, one that has gone on by itself, or a small one that may be either. */
async function compareWithKnown(
  file: LogFile,
  found: FoundFile,
  known: Stream[],
  { length, isCopied, isNext }: { length: number; isCopied: boolean; isNext: boolean },
): Promise<Identity> {
  let best: { stream: Stream; common: number; fits: boolean; least: number } | undefined;
  for (const stream of known) {
    if (found.isLive && isPassedOver(stream)) continue;
    if (stream.isBusy) return { is: "busy" };
    const own = await openKnown(stream);
    if (own === "changed") return { is: "busy" };
    if (!own) continue;
    const compare = async () => {
      const common = await commonLength(file, own, length);
      if (own !== stream.file && (await isOtherNow(own, stream))) return "changed";
      if (common <= (best?.common ?? 0) || (isNext && !isNextCopy(stream, found, common))) return undefined;
      const isShipped = stream.offset > 0 && (await fitOf(file, stream)).is !== "none";
      const least = isCopied && common >= stream.size ? 1 : MARK_BYTES;
      return { stream, common, fits: common >= length || isShipped, least };
    };
    // One that was moved out of sight is open already: nobody closes it meanwhile.
    const result =
      own === stream.file ? await holding(stream, compare) : await compare().finally(() => own.close());
    if (result === "changed") return { is: "busy" };
    best = result ?? best;
  }
  if (!best) return { is: "new", at: 0 };
  if (best.common >= length && length >= MARK_BYTES) return { is: "copy", stream: best.stream };
  if (best.common >= length && best.least > 1) return found.isLive ? { is: "new", at: 0 } : { is: "small" };
  if (!best.fits || best.common < best.least) return { is: "new", at: 0 };
  return { is: "new", at: await endOfLines(file, best.common) };
}

/**
 * The file of a stream: as it is open when it was moved out of sight; "changed" when another one lies in its place since the
 * look saw it there (gzip, whose archive is looked at, has removed it).
 */
async function openKnown({ path, key, phase, file }: Stream): Promise<LogFile | "changed" | undefined> {
  if (phase.is === "gone") return file;
  const own = await LogFile.open(path).catch((error: NodeJS.ErrnoException) => error);
  if (!(own instanceof LogFile)) return own.code === "ENOENT" ? "changed" : undefined;
  if (own.key === key) return own;
  await own.close();
  return "changed";
}

/** Whether a stream's file was cut since the look saw it: what it shares with a copy of before that says nothing. */
async function isOtherNow(own: LogFile, stream: Stream): Promise<boolean> {
  if (own.compression) return false;
  const { size, mtimeMs } = await own.stat();
  return (
    size < stream.size ||
    (Math.abs(mtimeMs - stream.mtimeMs) >= 1 && (await fitOf(own, stream)).is === "none")
  );
}

/** The next file of a log is a copy of the last one when it has all of that, and more than a long header, as each day's has. */
function isNextCopy({ log, size }: Stream, found: FoundFile, common: number): boolean {
  return log === found.log && common >= size && common >= 2 * MARK_BYTES;
}

/** A rotated file of before the first sight of its log is not shipped; a live one that has the same bytes is. */
function isPassedOver({ id, phase }: Stream): boolean {
  return id === undefined && phase.is === "ended";
}

/** All that is known of its log was rotated: it is the next file, and no copy; logs may begin alike, with a kilobyte each day. */
function isSuccessor({ log }: FoundFile, streams: Stream[]): boolean {
  const own = streams.filter((stream) => stream.log === log);
  return own.length > 0 && own.every(({ path }) => path !== log && isNameOf(path, log));
}

/**
 * Whether an archive is what a stream has read to its end, without unpacking it: gzip and zstd keep the time of the last
 * write and note the length of the content.
 */
async function packs(file: LogFile, stream: Stream, mtimeMs: number): Promise<boolean> {
  if (!file.compression || stream.size !== stream.offset) return false;
  if (Math.floor(mtimeMs / 1000) !== Math.floor(stream.mtimeMs / 1000)) return false;
  if (!file.path.startsWith(stream.path) && !stream.path.startsWith(file.path.replace(ARCHIVE, "")))
    return false;
  return (await file.notedLength()) === stream.offset % 2 ** 32;
}
