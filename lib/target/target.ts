/**
 * Where batches go. One interface for `sftp://` and `file://`, one set of rules for both: a file is written
 * whole under a temp name and gets its own name by one rename. Which of a target's refusals concern one file
 * and which concern all of them is decided here and in sftp.ts, the layers that know.
 */
import { rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { makeFolder, moveDurably, TEMP_SUFFIX, writeStream } from "../durable.ts";
import type { FaultKind } from "../report.ts";
import { readChunks } from "./content.ts";

/**
 * An open target. What it throws is a TargetFault when the target itself is at fault, and a Refusal when it
 * answered no and the name may be the reason. Every wait ends after the configured timeout.
 */
export interface Target {
  /**
   * Writes `chunks` to the temp name of `name`, from nothing. When it returns, the temp file has the size of
   * what was written, compared, and is on stable storage as far as the target offers that. `onWritten` is called
   * when only that is left to wait for: the next file may be begun.
   */
  upload(name: string, chunks: AsyncIterable<Uint8Array>, onWritten?: () => void): Promise<void>;
  /** Renames the temp file to `name`. The caller has looked that there is no such file: some targets replace it. */
  publish(name: string): Promise<void>;
  /** Size of the file in bytes, or undefined when there is none. */
  size(name: string): Promise<number | undefined>;
  /** The file's content. */
  read(name: string): AsyncIterable<Uint8Array>;
  /** Removes the file; one that is gone already is no error. */
  remove(name: string): Promise<void>;
  /** Ends the connection; everything in hand is rejected. Never throws. */
  close(): void;
}

/** The name under which a file is written before it has its own. */
export function tempName(name: string): string {
  return name + TEMP_SUFFIX;
}

/** The target cannot take files at the moment, whichever: nobody's file is to blame. */
export class TargetFault extends Error {
  override name = "TargetFault";
  readonly kind: FaultKind;
  constructor(kind: FaultKind, message: string, options?: ErrorOptions) {
    super(message, options);
    this.kind = kind;
  }
}

/** The target answered no to one operation on one name; whether others would be taken must be tried. */
export class Refusal extends Error {
  override name = "Refusal";
}

/** A local or mounted folder, which is made when it is missing. Throws a TargetFault when it cannot be made. */
export async function openFileTarget(folder: string): Promise<Target> {
  await makeFolder(folder).catch((error) => {
    throw new TargetFault("server", `Cannot create the folder "${folder}"`, { cause: error });
  });
  const path = (name: string) => join(folder, name);
  return {
    upload: (name, chunks) => writeWhole(path(tempName(name)), chunks),
    publish: (name) => told(`rename to "${path(name)}"`, moveDurably(path(tempName(name)), path(name))),
    size: (name) => told(`look at "${path(name)}"`, sizeOf(path(name))),
    read: (name) => readChunks(path(name)),
    remove: (name) => told(`remove "${path(name)}"`, rm(path(name), { force: true })),
    close: () => {},
  };
}

async function writeWhole(path: string, chunks: AsyncIterable<Uint8Array>): Promise<void> {
  const { written, size } = await told(`write "${path}"`, writeStream(path, chunks));
  if (size !== written)
    throw new Refusal(`Cannot upload "${path}": its size is ${size}, expected ${written}`);
}

async function sizeOf(path: string): Promise<number | undefined> {
  return stat(path).then(
    ({ size }) => size,
    (error: NodeJS.ErrnoException) => {
      if (error.code === "ENOENT") return undefined;
      throw error;
    },
  );
}

/** Errors of the file system or the mount as a whole; any other may be one name's. */
const FAULTS = new Set([
  "ENOSPC",
  "EDQUOT",
  "EROFS",
  "EIO",
  "ESTALE",
  "ENOTCONN",
  "ENODEV",
  "ETIMEDOUT",
  "EHOSTDOWN",
]);

/** Names what was tried, and tells a fault of the target from a refusal. */
async function told<T>(what: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (!code) throw error; // not the target's: the batch could not be read
    if (FAULTS.has(code)) throw new TargetFault("server", `Cannot ${what}`, { cause: error });
    throw new Refusal(`Cannot ${what}`, { cause: error });
  }
}
