/**
 * Files that wait to be known (still written, or begun like others) are open meanwhile: a rotation that removes or packs one
 * before it is known takes no line with it.
 */
import { LogFile, UnfinishedFile } from "./file.ts";
import type { FoundFile } from "./paths.ts";

/** So many at most; of more the others are opened when their turn comes. */
const HELD_FILES = 16;

export class HeldFiles {
  readonly #files = new Map<string, { found: FoundFile; file: LogFile }>();

  /**
   * Opens what waits, and closes what does not any more. Of a file that has no name any more `take` says what to do: it owns
   * the file when it gives true, and is asked again at the next look when it gives false.
   */
  async hold(
    waiting: FoundFile[],
    there: FoundFile[],
    take: (found: FoundFile, file: LogFile) => Promise<boolean>,
  ): Promise<void> {
    const keys = new Set(waiting.map(({ key }) => key));
    const named = new Set(there.map(({ key }) => key));
    for (const [key, { found, file }] of this.#files) {
      if (keys.has(key)) continue;
      if (named.has(key)) await file.close();
      else if (!(await takeWhole(found, file, take))) continue;
      this.#files.delete(key);
    }
    for (const found of waiting) {
      if (!found.isReadable || this.#files.has(found.key) || this.#files.size >= HELD_FILES) continue;
      const file = await LogFile.open(found.path).catch(() => undefined); // told of when it is to be known
      if (file?.key === found.key) this.#files.set(found.key, { found, file });
      else await file?.close();
    }
  }

  async close(): Promise<void> {
    for (const { file } of this.#files.values()) await file.close();
    this.#files.clear();
  }
}

/** An archive without an end was given up by whoever made it: its log is there. */
async function takeWhole(
  found: FoundFile,
  file: LogFile,
  take: (found: FoundFile, file: LogFile) => Promise<boolean>,
): Promise<boolean> {
  try {
    return await take(found, file);
  } catch (error) {
    if (!(error instanceof UnfinishedFile)) throw error;
    await file.close();
    return true;
  }
}
