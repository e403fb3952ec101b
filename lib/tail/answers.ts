/**
 * What the receiver says of a stream, and what follows for it: it is known from there alone, it stands elsewhere (a 409), it
 * is delivered up to a byte, or the receiver has lost it. Nothing is believed that the file does not bear out.
 */
import type { StreamStatus } from "../chunk.ts";
import { OperatorError } from "../service.ts";
import { closeFile, drawName, type Stream, type StreamState } from "./cursor.ts";
import {
  addMark,
  endOfLines,
  type LogFile,
  type Mark,
  markAt,
  markBefore,
  readMark,
  wireMark,
} from "./file.ts";
import { fitOf, identify, isTaken } from "./identify.ts";
import { Changed } from "./reader.ts";
import type { Streams } from "./streams.ts";

/** So many 409s are answered by trying again while another stream that the file may be is in hand. */
const BUSY_TRIES = 8;

/** Draws a name: nothing of the file is in it, so no two streams ever share one. */
export function beginAs(stream: Stream, begin: "new" | "again", offset: number): void {
  Object.assign(stream, { id: drawName(), begin, isNamed: false, offset, from: offset, endedAs: "" });
  stream.marks = stream.marks.filter(({ end }) => end <= offset);
  delete stream.delivered;
  delete stream.isOld;
}

/**
 * The receiver has the stream up to another offset. That is believed only when the file has these bytes there (a stream of
 * version 1.0 has no marks); else a new stream begins where the own cursor fits. True when this one goes on. Throws Changed.
 */
export async function moveTo(
  streams: Streams,
  stream: Stream,
  file: LogFile,
  offset: number,
  mark: string | undefined,
): Promise<boolean> {
  const { log } = streams.context;
  streams.isMoved = true;
  const seen = offset > 0 ? await readMark(file, offset) : undefined;
  const isSame = seen && (mark === undefined ? !stream.begin && stream.isOld : wireMark(seen) === mark);
  const fields = { path: stream.path, stream: stream.id, sent: stream.offset, receiver: offset };
  if (offset === 0 || isSame) {
    log.info("receiver has this file up to another byte: going on there", fields);
    const marks = stream.marks.filter(({ end }) => end < offset);
    stream.marks = seen ? [...marks, seen] : marks;
    stream.offset = offset;
    if (offset > 0) delete stream.begin;
    return true;
  }
  if ((await fitOf(file, stream)).is !== "all") throw new Changed(); // it is the file that has other bytes than were shipped
  const told = markAt(offset, mark);
  if (told && offset > stream.offset && (await isAnothers(streams, stream, file))) {
    log.info("receiver has other bytes than this file, which is not the one of this stream", fields);
    await streams.leaveFile(stream, offset);
    // By the receiver's mark the stream is known where it goes on, and not in this file.
    Object.assign(stream, { offset, marks: addMark(stream.marks, told), begin: undefined });
    throw new Changed();
  }
  log.warn("receiver has other bytes than this file: a new stream begins", fields);
  streams.succeed(stream, stream.offset > 0 ? await endOfLines(file, stream.offset) : 0);
  return false;
}

/**
 * Whether a file in which the receiver's bytes are not is another stream's, or a copy of its file; or was taken for this
 * one's by fewer bytes than are proof, under a name that no rule knows. Throws Changed while that can't be told.
 */
async function isAnothers(streams: Streams, stream: Stream, file: LogFile): Promise<boolean> {
  const { key, offset, conflicts } = stream;
  if (isTaken(stream, stream)) return true;
  if (file.compression) return false;
  const others = streams.list.filter((each) => each.key !== key);
  const what = await identify(file, { ...stream, dev: 0n, isReadable: true }, others);
  if (what.is === "busy" && conflicts < BUSY_TRIES) throw new Changed();
  return what.is === "copy" || (what.is === "stream" && what.stream.offset >= offset);
}

/**
 * What the receiver knows of this host when no cursor says it: each stream looks for its file like those of a cursor. Throws
 * when nothing in it can be compared.
 */
export function takeFirstAnswer(streams: Streams, told: StreamStatus[]): void {
  const isOld = told.length > 0 && told.every(({ mark, offset }) => !mark && offset > 0);
  if (streams.found === "damaged" && isOld) {
    throw new OperatorError(
      "The cursor is damaged, and the receiver's streams are of version 1.0: start version 1.0 once more",
    );
  }
  streams.asked = true;
  streams.isChanged = true;
  if (told.length === 0) {
    for (const each of streams.list) delete each.first; // a kilobyte of each file: there is nothing to compare it with
    // It has shipped before, and the receiver knows nothing of it: names may have been used that nobody remembers.
    // They are named when they have something to ship: on disk with the name stands the head by which a copy is known.
    if (streams.found === "damaged") for (const each of streams.list) each.begin = "again";
    return;
  }
  const known = told.map(toStream);
  const lost: Stream[] = [];
  for (const stream of streams.list) {
    void closeFile(stream);
    if (stream.phase.is !== "gone") continue;
    // What vanished before the answer: what the receiver lacks of it is lost, and told, unless a copy has it.
    const { log, path, key, size, mtimeMs, first } = stream;
    const alike = known.filter(({ head }) => head && first && isHeadOf(head, first));
    const [same] = alike.sort((a, b) => (b.head?.length ?? 0) - (a.head?.length ?? 0));
    if (!same && size > stream.offset) lost.push(stream);
    if (same && size > same.offset) Object.assign(same, { log, path, key, size, mtimeMs });
  }
  streams.adopt(known, lost);
}

/** Whether a head, of as much as there was when it was told, is that of a file with these first bytes. */
function isHeadOf({ length, hash }: Mark, first: Uint8Array): boolean {
  return length <= first.length && markBefore(first.subarray(0, length), length).hash === hash;
}

function toStream({ stream: id, offset, head, mark, delivered }: StreamStatus): StreamState {
  const marks = [markAt(offset, mark)].filter((each) => each !== undefined);
  const length = Number(head?.split(":")[0] ?? 0);
  const first = markAt(length, head);
  return {
    id,
    from: 0,
    offset,
    size: offset,
    log: "",
    path: "",
    key: "",
    copies: [],
    mtimeMs: 0,
    marks,
    ...(first && { head: first }),
    ...(delivered !== undefined && { delivered }),
    phase: { is: "gone" },
  };
}

/**
 * A stream that the receiver has lost, or has less of than it had answered, goes back to what was delivered of it. What is
 * told of a stream without a file may be more than the cursor knew. `committed`: what had been answered when the question
 * left, nothing of a stream that had not begun.
 */
export function takeStatus(
  streams: Streams,
  stream: Stream,
  found: StreamStatus | undefined,
  committed: number | undefined,
): void {
  if (found && found.offset >= (committed ?? 0)) {
    if (found.delivered !== undefined) {
      if (found.delivered !== stream.delivered) streams.isMoved = true;
      Object.assign(stream, { delivered: found.delivered, deliveredAt: streams.context.now() });
    }
    const most = Math.min(found.offset, stream.size);
    if (stream.phase.is === "gone" && !stream.file && most > stream.offset) {
      stream.offset = most;
      delete stream.begin; // an older cursor's word: behind it a folder that is lost now would count as delivered
    }
    return;
  }
  if (committed === undefined || stream.begin) return; // its first chunk was or is on its way
  stream.wayBack = Math.min(committed, stream.delivered ?? stream.from);
  const isNothing = stream.wayBack >= Math.min(committed, stream.until ?? committed);
  if (isNothing && (stream.phase.is === "gone" || stream.phase.is === "ended")) {
    stream.wayBack = undefined; // all of it is delivered: nothing is left to be said of it
    return;
  }
  streams.reopen(stream);
  if (stream.phase.is === "gone" && !stream.file) takeWayBack(streams, stream);
}

/**
 * A receiver that was set back has more of a lost stream than was delivered, when it stands at bytes that the file has there.
 * Where rules left lines out of a chunk, its word may be some bytes too low, in the middle of a line: that one comes whole.
 */
export async function findWayBack({ told }: Streams, stream: Stream, file: LogFile): Promise<void> {
  if (stream.wayBack === undefined) return alignAgain(stream, file);
  stream.wayBack = Math.max(stream.from, await endOfLines(file, stream.wayBack));
  const head = stream.head && wireMark(stream.head);
  for (const status of told) {
    const { offset, mark } = status;
    const isAlike = status.stream === stream.id || (head !== undefined && status.head === head);
    if (!isAlike || offset <= stream.wayBack || offset > stream.offset) continue;
    const seen = await readMark(file, offset);
    const isSame = seen && wireMark(seen) === mark && (await endOfLines(file, offset)) === offset;
    if (isSame) stream.wayBack = offset;
  }
}

/** Of a file that was away when its lines were lost: there, too, the line in whose middle it would begin comes whole. */
async function alignAgain(stream: Stream, file: LogFile): Promise<void> {
  const { begin, offset, from } = stream;
  const at = begin === "again" && offset === from ? await endOfLines(file, offset) : offset;
  if (at === offset) return;
  Object.assign(stream, { offset: at, from: at, marks: stream.marks.filter(({ end }) => end <= at) });
}

/** What was not delivered is shipped again, as a new stream that says so; what was all delivered goes on under a new name. */
export function takeWayBack(streams: Streams, stream: Stream): void {
  const { wayBack, offset, path, id, deliveredAt, phase, file } = stream;
  if (wayBack === undefined) return;
  stream.wayBack = undefined;
  const from = Math.min(offset, wayBack);
  if (from < offset) {
    const deliveredAsOf = deliveredAt === undefined ? undefined : new Date(deliveredAt).toISOString();
    const message =
      phase.is === "gone" && !file
        ? "receiver has lost lines of a file that is gone"
        : "receiver has lost lines: shipping them again";
    streams.context.log.warn(message, { path, stream: id, from, bytes: offset - from, deliveredAsOf });
  }
  beginAs(stream, from < offset ? "again" : "new", from);
  streams.reopen(stream); // a finish that was under way when the answer came may have ended it meanwhile
}
