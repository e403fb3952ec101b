/**
 * The only fsync, rename and unlink of things that must survive a power loss, and the lock that makes one process their owner.
 *
 * A file is replaced whole: temp, write, sync, close, rename, sync the folder. A reader therefore sees the
 * old content or the new one, never a part. A temp file has a fixed name, so a stale one is overwritten by
 * the next save and never piles up; whoever saves a path owns it (one process, by lock).
 */
import {
  chmodSync,
  closeSync,
  constants,
  fchmodSync,
  fstatSync,
  ftruncateSync,
  lstatSync,
  openSync,
  readFileSync,
  renameSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { type FileHandle, mkdir, open, readFile, rename, rm } from "node:fs/promises";
import { dirname } from "node:path";
import { giveTo, type Lock, tryLock } from "./runtime.ts";
import { OperatorError, wait } from "./service.ts";

/** The ending of every temp file of ours; housekeeping removes stale ones by it. */
export const TEMP_SUFFIX = ".tmp";

/** Named steps at which a test may stop the process; see {@link failpoint}. */
const stopAt = process.env.LOG_RT_SYNC_STOP_AT;
let stopCount = Number(process.env.LOG_RT_SYNC_STOP_COUNT ?? 1);

/** The seam for fault tests: SIGKILL at the step that `LOG_RT_SYNC_STOP_AT` names, the `LOG_RT_SYNC_STOP_COUNT`-th time (1). */
export function failpoint(step: string): void {
  if (stopAt === step && --stopCount <= 0) process.kill(process.pid, "SIGKILL");
}

/** Replaces the file at `path` by `data`, on stable storage when it returns; owner and mode stay. Throws the system's error. */
export async function writeDurably(
  path: string,
  data: string | Uint8Array | AsyncIterable<Uint8Array>,
  mode = 0o640,
): Promise<void> {
  const temp = path + TEMP_SUFFIX;
  await rm(temp, { force: true });
  const file = await open(temp, "wx", mode); // x: never through a link that waits there
  try {
    const old = lstatSync(path, { throwIfNoEntry: false });
    const isFile = old?.isFile() === true; // the mode of a link is everybody's
    if (isFile) fchmodSync(file.fd, old.mode & 0o777);
    giveTo(file.fd, dirname(path), isFile ? path : undefined);
    if (typeof data === "string" || data instanceof Uint8Array) await file.writeFile(data);
    else await writeAll(file, data);
    await file.sync();
  } finally {
    await file.close();
  }
  failpoint("durable:written");
  await rename(temp, path);
  await syncPath(dirname(path));
}

export function moveDurably(from: string, to: string): Promise<void> {
  return moveAllDurably([{ from, to }]);
}

/**
 * Renames each `from` to its `to` on the same file system and syncs their folders, each once. All or some of the moves are
 * done when it throws; which, the folders tell. Never replaces a file: it throws when a `to` exists. The look before is enough,
 * as every folder has one process that puts files into it (ledger and forwarder lock).
 */
export async function moveAllDurably(moves: { from: string; to: string }[]): Promise<void> {
  const changed = new Set<string>();
  try {
    for (const { from, to } of moves) {
      if (await exists(to)) throw new Error(`Cannot move "${from}": "${to}" exists already`);
      renameSync(from, to); // in place, as one of many
      changed.add(dirname(to)).add(dirname(from));
    }
  } finally {
    for (const folder of changed) await syncPath(folder);
  }
}

/** Removes a file and syncs its folder; a file that is gone already is not an error. */
export async function removeDurably(path: string): Promise<void> {
  await rm(path, { force: true });
  await syncPath(dirname(path));
}

/**
 * Appends whole lines to the file at `path`, on stable storage when it returns. A last line without its `\n`, of an append that
 * was never acknowledged, is cut off first; when writing fails (disk full), the file is cut back to what it was.
 */
export async function appendDurably(path: string, lines: string): Promise<void> {
  const file = await open(path, constants.O_RDWR | constants.O_CREAT, 0o640);
  try {
    const { size } = await file.stat();
    const end = await endOfLastLine(file, size);
    if (end < size) await file.truncate(end);
    try {
      await writeFully(file, Buffer.from(lines), end);
      await file.sync();
    } catch (error) {
      await file.truncate(end).catch(() => {});
      throw error;
    }
    if (size === 0) {
      giveTo(file.fd, dirname(path));
      await syncPath(dirname(path));
    }
  } finally {
    await file.close();
  }
}

/** Writes all of `data` at `position`; write(2) may take less than it was given. */
async function writeFully(file: FileHandle, data: Uint8Array, position: number): Promise<void> {
  let done = 0;
  while (done < data.length) {
    const { bytesWritten } = await file.write(data, done, data.length - done, position + done);
    if (bytesWritten === 0) throw new Error(`Cannot write: 0 of ${data.length - done} bytes were taken`);
    done += bytesWritten;
  }
}

async function writeAll(file: FileHandle, chunks: AsyncIterable<Uint8Array>): Promise<number> {
  let written = 0;
  for await (const chunk of chunks) {
    await writeFully(file, chunk, written);
    written += chunk.length;
  }
  return written;
}

/**
 * Writes a stream to the file at `path`, from nothing, on stable storage when it returns, but for its name, which is a temp
 * name. Gives the bytes written and the size that the file then has. In a folder that others may write to, a link that waits
 * there is not followed, and a file that was put in the place of ours meanwhile is not taken for it.
 */
export async function writeStream(
  path: string,
  chunks: AsyncIterable<Uint8Array>,
): Promise<{ written: number; size: number }> {
  await rm(path, { force: true });
  const file = await open(path, "wx", 0o666);
  try {
    const written = await writeAll(file, chunks);
    await file.sync();
    const [ours, named] = [await file.stat(), lstatSync(path, { throwIfNoEntry: false })];
    if (named?.ino !== ours.ino || named.dev !== ours.dev)
      throw Object.assign(new Error(`"${path}" was replaced while it was written`), { code: "EEXIST" });
    return { written, size: ours.size };
  } finally {
    await file.close();
  }
}

/** Creates a folder and its parents, on stable storage when it returns. In one that its group shares it is shared, too. */
export async function makeFolder(path: string, mode = 0o750): Promise<void> {
  const isShared = ((statSync(dirname(path), { throwIfNoEntry: false })?.mode ?? 0) & 0o2020) === 0o2020;
  const wanted = isShared ? mode | 0o070 : mode;
  const first = await mkdir(path, { recursive: true, mode: wanted });
  if (first === undefined) return;
  // The units' umask lets the group's bits through; where an operator's does not, they are set.
  if (isShared && (statSync(path).mode & 0o070) !== 0o070) chmodSync(path, wanted | 0o2000);
  await syncPath(dirname(first));
}

/** Sets the time of a file: to `ms`, or to now where it is another user's of our group: only an owner may choose. */
export function setTime(path: string, ms: number): void {
  try {
    utimesSync(path, ms / 1000, ms / 1000);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "EPERM") throw error;
    const fd = openSync(path, constants.O_RDWR | constants.O_NOFOLLOW);
    try {
      ftruncateSync(fd, fstatSync(fd).size); // changes nothing but the time
    } finally {
      closeSync(fd);
    }
  }
}

/** Puts a file's content and times, or the names in a folder (created, renamed, removed), on stable storage. */
export async function syncPath(path: string): Promise<void> {
  const file = await open(path, "r");
  try {
    await file.sync();
  } finally {
    await file.close();
  }
}

/** Whether something, also a dangling symlink, has this name. In place: the thread pool costs more than the look. */
export async function exists(path: string): Promise<boolean> {
  return lstatSync(path, { throwIfNoEntry: false }) !== undefined;
}

/** The file's text, or undefined when there is no such file: the only case that means "a first run". */
export function readIfExists(path: string): Promise<string | undefined> {
  return ifMissing(readFile(path, "utf8"));
}

/** What `work` gives, or undefined when a file that it needs is not there. */
export async function ifMissing<T>(work: Promise<T>): Promise<T | undefined> {
  try {
    return await work;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

export class LockedError extends OperatorError {}

/**
 * Takes the kernel's lock at `path` until `release` or the end of the process, also by kill -9; the process id in the file is
 * for people. Throws a LockedError that names the holder, or an OperatorError that says why it can't be had at all.
 */
export async function holdLock(path: string, what: string): Promise<Lock> {
  const lock = await tryLock(path).catch((error) => {
    throw new OperatorError(error.message);
  });
  if (!lock) {
    const holder = readFileSync(path, "utf8").trim() || "unknown";
    throw new LockedError(`${what} is in use by process ${holder} (lock ${path}); stop that one first`);
  }
  try {
    writeFileSync(path, `${process.pid}\n`);
  } catch {
    // the lock is held all the same: a full disk must not keep it from its owner
  }
  return lock;
}

/** Takes a lock that nobody holds for long. Throws a LockedError when that takes longer than `patienceMs`. */
export async function waitForLock(path: string, patienceMs: number): Promise<Lock> {
  const deadline = Date.now() + patienceMs;
  for (;;) {
    const lock = await tryLock(path);
    if (lock) return lock;
    if (Date.now() > deadline) throw new LockedError(`${path} is held by another process`);
    await wait(20);
  }
}

/** The process that holds a lock, without taking it: for people, since a number may be another process's by now. */
export function findHolder(path: string): number | undefined {
  try {
    const pid = Number(readFileSync(path, "utf8"));
    return pid > 0 && process.kill(pid, 0) ? pid : undefined; // signal 0: only whether it is there
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === "EPERM" ? 0 : undefined; // there, and another user's
  }
}

/** Offset after the last `\n` of the first `size` bytes. */
async function endOfLastLine(file: FileHandle, size: number): Promise<number> {
  const block = Buffer.alloc(4096);
  for (let end = size; end > 0; ) {
    const start = Math.max(0, end - block.length);
    const { bytesRead } = await file.read(block, 0, end - start, start);
    const at = block.subarray(0, bytesRead).lastIndexOf(0x0a);
    if (at >= 0) return start + at + 1;
    end = start;
  }
  return 0;
}
