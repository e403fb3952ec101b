/**
 * One process per folder: a lock file that names its holder. The kernel holds the lock itself, so that it
 * ends with its process even after kill -9; the process id in the file is only for people to read.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { tryLock } from "./runtime.ts";
import { OperatorError } from "./service.ts";

/** Takes the lock at `path` for the life of the process, or throws an OperatorError that names the holder. */
export async function holdLock(path: string, what: string): Promise<{ release: () => void }> {
  const lock = await tryLock(path);
  if (!lock) {
    const holder = readFileSync(path, "utf8").trim() || "unknown";
    throw new OperatorError(`${what} is in use by process ${holder} (lock ${path}); stop that one first`);
  }
  writeFileSync(path, `${process.pid}\n`);
  return lock;
}
