/**
 * Files that wait to be known (still written, or begun like others) are open meanwhile: a rotation that removes or packs one
 * before it is known takes no line with it.
 */
import { LogFile, UnfinishedFile } from "./file.ts";
import type { FoundFile } from "./paths.ts";

/** So many are open at most. */
const HELD_FILES = 32;

/** By key; without `file` when too many are open. */
export type HeldFiles = Map<string, { found: FoundFile; file: LogFile | undefined }>;

type Take = (found: FoundFile, file: LogFile | undefined) => Promise<boolean>;

/**
 * Opens what waits, and closes what does not any more. Of a file that has no name any more `take` says what to do: it owns
 * the file when it gives true, and is asked again at the next look when it gives false.
 */
export async function holdFiles(
  held: HeldFiles,
  waiting: FoundFile[],
  there: FoundFile[],
  take: Take,
): Promise<void> {
  const keys = new Set(waiting.map(({ key }) => key));
  const named = new Set(there.map(({ key }) => key));
  for (const [key, { found, file }] of held) {
    if (keys.has(key)) continue;
    if (named.has(key)) await file?.close();
    else if (!(await takeWhole(found, file, take))) continue;
    held.delete(key);
  }
  let open = [...held.values()].filter(({ file }) => file).length;
  for (const found of waiting) {
    const { key, path, isReadable } = found;
    if (!isReadable || held.get(key)?.file) continue;
    const file = open++ < HELD_FILES ? await LogFile.open(path).catch(() => undefined) : undefined;
    if (!file || file.key === key) held.set(key, { found, file });
    else await file.close();
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
