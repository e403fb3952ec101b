/**
 * Streams whose files went before they were done: each is looked for under names that no rule knows as a rotation's, too. There
 * the bytes are the proof: a kilobyte of them anywhere; fewer only under a name that begins like the log's, in a file that was
 * made since the last line that was seen was written, as a copy and an archive are.
 */
import { basename } from "node:path";
import type { Stream } from "./cursor.ts";
import { bornAt, LogFile, UnfinishedFile } from "./file.ts";
import { type Identity, identify, isProven, placeHead } from "./identify.ts";
import { asSeen, type FoundFile, stemOf } from "./paths.ts";

/** A stream is looked for at each look for so long (ms): what packs a file removes it when it is done. */
const SEEK_MS = 60_000;

export class SoughtStreams {
  readonly #tried = new Map<Stream, Set<string>>();

  get isEmpty(): boolean {
    return this.#tried.size === 0;
  }

  add(stream: Stream): void {
    this.#tried.set(stream, new Set());
  }

  /** Forgets those that were found, and those that are gone for long: behind a look, so that each is looked for once. */
  forget(isFound: (stream: Stream) => boolean, time: number): void {
    for (const stream of this.#tried.keys())
      if (isFound(stream) || time - stream.phaseAt >= SEEK_MS) this.#tried.delete(stream);
  }

  /** Those that may be in a file, as far as it was not tried yet; from now on it is. */
  of(found: FoundFile): Stream[] {
    const streams: Stream[] = [];
    for (const [stream, tried] of this.#tried) {
      if (stream.isBusy || tried.has(asSeen(found))) continue;
      tried.add(asSeen(found));
      if (mayBeIn(stream, found)) streams.push(stream);
    }
    return streams;
  }
}

function mayBeIn(stream: Stream, found: FoundFile): boolean {
  const { head, marks, log, path, mtimeMs } = stream;
  if (!found.isReadable) return found.path.startsWith(path);
  if (isProven(stream)) return log !== "" || found.log !== "";
  const stem = stemOf(basename(log));
  return (
    (head !== undefined || marks.length > 0) &&
    stem !== "" &&
    basename(found.path).startsWith(stem) &&
    bornAt(found.key) >= Math.floor(mtimeMs)
  );
}

/** Which of the streams a file is; undefined when it is none of them, or not to be read. */
export async function lookInto(
  found: FoundFile,
  streams: Stream[],
): Promise<Extract<Identity, { is: "stream" }> | undefined> {
  const file = await LogFile.open(found.path).catch(() => undefined);
  try {
    const what = file?.key === found.key ? await identify(file, found, streams) : undefined;
    if (!file || what?.is !== "stream") return undefined;
    await placeHead(file, what.stream);
    return what;
  } catch (error) {
    if (error instanceof UnfinishedFile) return undefined; // it is another one when it has its end
    throw error;
  } finally {
    await file?.close();
  }
}
