/**
 * The shipper's memory: which files there were, and up to which byte each was shipped.
 *
 * It is saved after the receiver has answered, so it may lag behind what is shipped: the receiver then answers
 * 409 with the offset where it stands. What is in it is enough to know a file again under any name, see
 * tail.ts. The save before the last change of files is kept beside it, for the case that the newest is damaged.
 */
import { mkdir } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { readIfExists, writeDurably } from "../durable.ts";

const mark = z.object({ end: z.number(), length: z.number(), hash: z.string() });

const stream = z.object({
  /** Name on the wire; absent until the first line is there. */
  id: z.string().optional(),
  /** Its first chunk was not answered yet. */
  begin: z.enum(["new", "again"]).optional(),
  /** Where in the file it began. */
  from: z.number().optional(),
  /** Every line before it lies at the client, as the receiver told last. */
  delivered: z.number().optional(),
  /** Version 1.0 named it: the receiver may have no marks of it. */
  isOld: z.boolean().optional(),
  /** Keys of the file and of copies of it that were seen (compressed, copied). */
  keys: z.array(z.string()),
  /** Where it was last seen. */
  path: z.string(),
  /** The next byte to ship. */
  offset: z.number().int().nonnegative(),
  signature: z.object({ head: mark.optional(), marks: z.array(mark) }),
  /** Its size when it was last looked at: what is lost when it vanishes. Bytes of the log, not on disk. */
  size: z.number(),
  /** Everything of it is shipped and no more will come. */
  done: z.boolean().default(false),
  /** It began after the same file was truncated: a hole of NULs may stand at its head. */
  truncated: z.boolean().default(false),
  /** When it was first followed, ms. */
  since: z.number(),
  /** When it was last seen in the folder, ms. */
  seenAt: z.number(),
});

const family = z.object({
  /** Time of the first start, ms: rotated files that were last written before it are not ours. */
  since: z.number(),
  /** How the first look takes what it finds; absent once that look is over. */
  start: z.enum(["first", "new", "recover"]).optional(),
  /** The receiver was not asked yet what it knows of these files. */
  unasked: z.boolean().optional(),
  streams: z.array(stream),
});

const cursor = z.object({
  version: z.union([z.literal(1), z.literal(2)]),
  /** Drawn with the cursor: names this shipper. */
  shipper: z.string().optional(),
  /** Bytes lost since the cursor began. */
  lost: z.number().nonnegative().default(0),
  /** By the path of the live file; streams oldest first. */
  families: z.record(z.string(), family),
});

export type StreamState = z.infer<typeof stream>;
export type FamilyState = z.infer<typeof family>;
export type Cursor = z.infer<typeof cursor>;

/**
 * What was found in the state folder. `absent` is a first run; `damaged` is not: the receiver is to be asked
 * where each stream stands. `older` says that the newest save is damaged and the one before it was taken.
 */
export type CursorFound = { state: "found" | "older"; cursor: Cursor } | { state: "absent" | "damaged" };

const PREVIOUS = ".previous";

export function cursorPath(stateDir: string): string {
  return join(stateDir, "cursor.json");
}

/** Reads the cursor. Throws the system's error when the folder can't be read. */
export async function readCursor(stateDir: string): Promise<CursorFound> {
  const text = await readIfExists(cursorPath(stateDir));
  if (text !== undefined) {
    const newest = parseCursor(text);
    if (newest) return { state: "found", cursor: newest };
  }
  const previous = await readIfExists(cursorPath(stateDir) + PREVIOUS);
  if (previous === undefined) return { state: text === undefined ? "absent" : "damaged" };
  const older = parseCursor(previous);
  return older ? { state: "older", cursor: older } : { state: "damaged" };
}

/** Saves the cursor; with `keep` also as the one to fall back to. */
export async function writeCursor(stateDir: string, state: Cursor, keep: boolean): Promise<void> {
  await mkdir(stateDir, { recursive: true, mode: 0o750 });
  const text = `${JSON.stringify(state)}\n`;
  await writeDurably(cursorPath(stateDir), text);
  if (keep) await writeDurably(cursorPath(stateDir) + PREVIOUS, text);
}

function parseCursor(text: string): Cursor | undefined {
  try {
    return cursor.parse(JSON.parse(text));
  } catch {
    return undefined;
  }
}
