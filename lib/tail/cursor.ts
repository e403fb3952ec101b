/**
 * The shipper's memory: which files there were, and up to which byte each was shipped.
 *
 * It is saved after the receiver has answered, so it may lag behind what is shipped: the receiver then answers 409 with
 * the offset where it stands. What is in it is enough to know a file again under any name (lib/tail/look.ts). The save
 * before the last change of files is kept beside it, for the case that the newest is damaged.
 */
import { randomBytes } from "node:crypto";
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { writeDurably } from "../durable.ts";
import { OperatorError } from "../service.ts";
import { readState, writeState } from "../state.ts";
import { keepKey, type LogFile } from "./file.ts";

const mark = z.object({ end: z.number(), length: z.number(), hash: z.string() });

const phase = z.discriminatedUnion("is", [
  z.object({ is: z.literal("reading") }),
  /** Read to its end, with this size on disk, and quiet since. */
  z.object({ is: z.literal("ended"), size: z.number() }),
  z.object({ is: z.literal("gone") }),
]);

const stream = z.object({
  /** Name on the wire; absent until the first line is there. */
  id: z.string().optional(),
  /** Its first chunk was not answered yet. */
  begin: z.enum(["new", "again"]).optional(),
  /** Where in the file it began, and where another stream of the same file goes on. */
  from: z.number(),
  until: z.number().optional(),
  offset: z.number().int().nonnegative(),
  /** Every line before it lies at the client, as the receiver told last, and when. */
  delivered: z.number().optional(),
  deliveredAt: z.number().optional(),
  /** Version 1.0 named it: the receiver may have no marks of it. */
  isOld: z.boolean().optional(),
  log: z.string(),
  path: z.string(),
  /** Inode and time of birth of its file; empty while it is known from the receiver's answer alone. */
  key: z.string(),
  /** Files with nothing but what its own has, as they were then. */
  copies: z
    .array(z.object({ key: z.string(), size: z.number(), mtimeMs: z.number().optional() }))
    .default([]),
  head: mark.optional(),
  /** Ends ascending; the last one ends at the offset. */
  marks: z.array(mark),
  /** What was seen of it: what is lost when it vanishes. Bytes of the log, not on disk. */
  size: z.number(),
  mtimeMs: z.number().default(0),
  /** Up to a size of `to`, there was nothing but NULs from here on: room that nobody has written to. */
  blank: z.object({ from: z.number(), to: z.number() }).optional(),
  /** What was cut off a file, down to this size, and may be in a copy of it: what is found nowhere is lost behind it only. */
  cutTo: z.number().optional(),
  /** It began after the same file was cut: a hole of NULs may stand at its head. */
  isCut: z.boolean().optional(),
  phase,
});

const cursor = z.object({
  version: z.literal(2),
  /** Drawn with the cursor: names this shipper. */
  shipper: z.string(),
  lost: z.number().nonnegative(),
  /** False until the receiver has said that it knows no stream of this host. */
  asked: z.boolean(),
  /** Paths and globs that were followed, and the keys of the folders of the logs. */
  files: z.array(z.string()),
  folders: z.record(z.string(), z.string()).default({}),
  streams: z.array(stream),
  /** Streams of logs that `files` does not name any more: they go on when it does again. */
  left: z.array(stream).default([]),
});

const oldStream = z.object({
  id: z.string().optional(),
  keys: z.array(z.string()),
  path: z.string(),
  offset: z.number(),
  signature: z.object({ head: mark.optional(), marks: z.array(mark) }),
  size: z.number(),
  done: z.boolean().default(false),
});

const oldCursor = z.object({
  version: z.literal(1),
  lost: z.number().nonnegative().default(0),
  families: z.record(
    z.string(),
    z.object({ since: z.number(), start: z.string().optional(), streams: z.array(oldStream) }),
  ),
});

export type StreamState = z.infer<typeof stream>;
export type Phase = z.infer<typeof phase>;
export type Cursor = z.infer<typeof cursor>;

/** A stream, and its file as far as it is open. Times are of the monotonic clock. */
export interface Stream extends StreamState {
  file?: LogFile | undefined;
  /** Its file is the one under the live path. */
  isLive: boolean;
  isBusy: boolean;
  phaseAt: number;
  /** Size and time of writing at which its end was reached last; "" when there may be more. */
  endedAs: string;
  /** It could not be read: not tried again before. */
  retryAt?: number;
  /** Up to this size its bytes were checked to be the ones of this stream. */
  checkedSize: number;
  /** From this offset on there is no further whole line up to that size. */
  drained?: { from: number; to: number };
  grewAt: number;
  /** False until the name that was drawn is on stable storage. */
  isNamed: boolean;
  /** The receiver has lost it: from here it is shipped again. */
  wayBack?: number | undefined;
  /** Its first bytes, until the receiver's first answer. */
  first?: Uint8Array;
  /** 409s that told an offset, since the last 200. */
  conflicts: number;
}

/** A stream as it is at a start: its file is not open, and nothing was looked at. `time` is of the monotonic clock. */
export function withFile(state: StreamState, time: number, isLive = false): Stream {
  return {
    ...state,
    checkedSize: state.size,
    isLive,
    isBusy: false,
    phaseAt: time,
    endedAs: "",
    grewAt: Number.NEGATIVE_INFINITY,
    isNamed: true,
    conflicts: 0,
  };
}

export function placeOf({ size, mtimeMs }: Pick<Stream, "size" | "mtimeMs">): string {
  return `${size} ${mtimeMs}`;
}

export function isAtEnd(stream: Stream): boolean {
  return stream.endedAs === placeOf(stream) || stream.offset >= (stream.until ?? Number.POSITIVE_INFINITY);
}

/** How many of the last bytes that were seen were written by somebody: NULs that nobody has filled are none. */
export function lostOf({ size, blank }: Pick<Stream, "size" | "blank">, gone: number): number {
  return gone - (blank?.to === size ? size - blank.from : 0);
}

/** Whether a stream's own file is there, if only under a name that nobody knows. */
export function hasHome({ phase, file }: Stream): boolean {
  return phase.is !== "gone" || (file !== undefined && !file.isUnlinked);
}

/** Nobody else reads, sends or closes a stream meanwhile. */
export async function holding<T>(stream: Stream, work: () => Promise<T>): Promise<T> {
  stream.isBusy = true;
  try {
    return await work();
  } finally {
    stream.isBusy = false;
  }
}

export async function closeFile(stream: Stream): Promise<void> {
  const { file } = stream;
  stream.file = undefined;
  await file?.close().catch(() => {}); // nothing was written to it
}

/** Saves, one after the other; those who ask meanwhile share the next one. */
export class Saves {
  #last: Promise<void> = Promise.resolve();
  #next: Promise<void> | undefined;

  run(save: () => Promise<void>): Promise<void> {
    if (this.#next) return this.#next;
    const next = this.#last.then(() => {
      this.#next = undefined;
      return save();
    });
    this.#next = next;
    this.#last = next.catch(() => {});
    return next;
  }
}

/**
 * `absent` is a first run; `damaged` is not: the receiver is to be asked where each stream stands; `older`: the newest save is
 * damaged and the one before it was taken. `since`: of version 1.0, whose logs were followed since these times.
 */
export type CursorFound =
  | { state: "found" | "older"; cursor: Cursor; since?: Map<string, number> }
  | { state: "absent" | "damaged" };

const PREVIOUS = ".previous";

/** A new name for a stream or a shipper: 128 bits, drawn, never made from a file. */
export function drawName(): string {
  return randomBytes(16).toString("base64url");
}

export function cursorPath(stateDir: string): string {
  return join(stateDir, "cursor.json");
}

/** Reads the cursor. Throws the system's error when the folder can't be read, and an error for one of a later version. */
export async function readCursor(stateDir: string): Promise<CursorFound> {
  const newest = await readOne(cursorPath(stateDir));
  if ("cursor" in newest) return newest;
  const previous = await readOne(cursorPath(stateDir) + PREVIOUS);
  if ("cursor" in previous) return { ...previous, state: "older" };
  return newest.state === "damaged" ? newest : previous;
}

async function readOne(path: string): Promise<CursorFound> {
  const found = await readState(path, z.union([cursor, oldCursor]), 2);
  if (found.state === "newer")
    throw new OperatorError(`"${path}" is of a later version (${found.version}) than this program`);
  if (found.state !== "ok") return { state: found.state };
  if (found.value.version === 1) return takeOver(found.value, drawName());
  for (const { key, copies } of found.value.streams)
    for (const each of [{ key }, ...copies]) keepKey(each.key);
  return { state: "found", cursor: found.value };
}

/** A cursor of version 1.0: what was shipped counts as delivered until the receiver says otherwise. */
function takeOver({ lost, families }: z.infer<typeof oldCursor>, shipper: string): CursorFound {
  const since = new Map<string, number>();
  const streams: StreamState[] = [];
  for (const [log, family] of Object.entries(families)) {
    since.set(log, family.since);
    for (const { id, keys, path, offset, signature, size, done } of family.streams) {
      const [key = "", ...others] = keys.toReversed();
      streams.push({
        ...(id !== undefined && { id, isOld: true, delivered: offset }),
        from: 0,
        offset,
        log,
        path,
        key,
        size,
        mtimeMs: 0,
        marks: signature.marks,
        copies: others.map((other) => ({ key: other, size: -1 })),
        ...(signature.head && { head: signature.head }),
        phase: done ? { is: "ended", size: -1 } : { is: "reading" },
      });
    }
  }
  const files = Object.keys(families);
  const cursor: Cursor = { version: 2, shipper, lost, asked: true, files, folders: {}, streams, left: [] };
  return { state: "found", cursor, since };
}

export function toState(full: Stream): StreamState {
  const { file, isLive, isBusy, phaseAt, endedAs, retryAt, ...rest } = full;
  const { checkedSize, drained, grewAt, isNamed, wayBack, first, conflicts, ...state } = rest;
  return state;
}

export async function writeCursor(stateDir: string, state: Cursor, keep: boolean): Promise<void> {
  await mkdir(stateDir, { recursive: true, mode: 0o750 });
  await writeState(cursorPath(stateDir), state);
  if (keep) await writeDurably(cursorPath(stateDir) + PREVIOUS, `${JSON.stringify(state)}\n`);
}
