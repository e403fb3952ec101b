/**
 * Files that wait to be known (still written, or begun like others) are open meanwhile: a rotation that removes or packs one
 * before it is known takes no line with it.
 */
import { LogFile, UnfinishedFile } from "./file.ts";
import type { FoundFile } from "./paths.ts";

/** So many are open at most. */
const HELD_FILES = 32;

type Take = (found: FoundFile, file: LogFile | undefined) => Promise<boolean>;

export class HeldFiles {
  /** Without `file` when too many are open. */
  readonly #files = new Map<string, { found: FoundFile; file: LogFile | undefined }>();

  /**
   * Opens what waits, and closes what does not any more. Of a file that has no name any more `take` says what to do: it owns
   * the file when it gives true, and is asked again at the next look when it gives false.
   */
  async hold(waiting: FoundFile[], there: FoundFile[], take: Take): Promise<void> {
    const keys = new Set(waiting.map(({ key }) => key));
    const named = new Set(there.map(({ key }) => key));
    for (const [key, { found, file }] of this.#files) {
      if (keys.has(key)) continue;
      if (named.has(key)) await file?.close();
      else if (!(await takeWhole(found, file, take))) continue;
      this.#files.delete(key);
    }
    let open = [...this.#files.values()].filter(({ file }) => file).length;
    for (const found of waiting) {
      const { key, path, isReadable } = found;
      if (!isReadable || this.#files.get(key)?.file) continue;
      const file = open++ < HELD_FILES ? await LogFile.open(path).catch(() => undefined) : undefined;
      if (!file || file.key === key) this.#files.set(key, { found, file });
      else await file.close();
    }
  }

  async close(): Promise<void> {
    for (const { file } of this.#files.values()) await file?.close();
    this.#files.clear();
  }
}

/** An archive without an end was given up by whoever made it: its log is there. */
async function takeWhole(found: FoundFile, file: LogFile | undefined, take: Take): Promise<boolean> {
  try {
    return await take(found, file);
  } catch (error) {
    if (!(error instanceof UnfinishedFile)) throw error;
    await file?.close();
    return true;
  }
}
