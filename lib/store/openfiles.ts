/**
 * The files of one sender that are written: open batches and pieces of long lines. Each is written behind the
 * length that counts, which the ledger knows and the caller gives; what is behind it counts for nobody.
 */
import {
  closeSync,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  rmSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { failpoint, syncData } from "../durable.ts";

/** An open file; `length` is what counts and what was written behind it. */
export interface OpenFile {
  name: string;
  fd: number;
  length: number;
  unsynced: boolean;
}

/** Files that are kept open at once. */
const MAX_FILES = 64;

export class OpenFiles {
  /** Whether the folder got a new name since `synced` was called. */
  created = false;
  readonly #folder: string;
  /** The one that was used last stands last. */
  readonly #files = new Map<string, OpenFile>();

  constructor(folder: string) {
    this.#folder = folder;
  }

  /** The file of this name, of which `length` bytes count. It is made when it is not there. */
  at(name: string, length: number): OpenFile {
    let file = this.#files.get(name);
    if (file) this.#files.delete(name);
    else {
      if (this.#files.size >= MAX_FILES) this.#closeOldest();
      const path = join(this.#folder, name);
      file = { name, fd: openSync(path, existsSync(path) ? "r+" : "wx+", 0o640), length, unsynced: false };
      if (length === 0) this.created = true;
    }
    this.#files.set(name, file);
    file.length = length;
    return file;
  }

  /** Writes `bytes[start, end)` behind what is there. Throws the system's error. */
  write(file: OpenFile, bytes: Uint8Array, start: number, end: number): void {
    for (let at = start; at < end; ) {
      const written = writeSync(file.fd, bytes, at, end - at, file.length);
      file.unsynced = true;
      file.length += written;
      at += written;
    }
    failpoint("commit:written");
  }

  /** Reads `bytes.length` bytes from `position`. Throws when the file ends before. */
  read(file: OpenFile, bytes: Uint8Array, position: number): void {
    for (let at = 0; at < bytes.length; ) {
      const read = readSync(file.fd, bytes, at, bytes.length - at, position + at);
      if (read === 0) throw new Error(`Cannot read "${file.name}": it ends at ${position + at}`);
      at += read;
    }
  }

  /** Files with bytes that are not on stable storage yet. */
  unsynced(): OpenFile[] {
    return [...this.#files.values()].filter((file) => file.unsynced);
  }

  /** Everything that was written is on stable storage. */
  synced(): void {
    for (const file of this.#files.values()) file.unsynced = false;
    this.created = false;
  }

  /** Cuts a file back to `length`; when nothing of it counts, it is removed. */
  cutBack(name: string, length: number | undefined): void {
    const open = this.#files.get(name);
    if (length === undefined) {
      if (open) closeSync(open.fd);
      this.#files.delete(name);
      rmSync(join(this.#folder, name), { force: true });
      return;
    }
    const file = this.at(name, length);
    file.unsynced = false;
    ftruncateSync(file.fd, length);
  }

  /** Brings a file to just the `length` bytes that count and closes it. Throws when it is shorter. */
  finish(name: string, length: number): void {
    const file = this.at(name, length);
    const { size } = fstatSync(file.fd);
    if (size < length) throw new Error(`Cannot seal "${name}": it has ${size} bytes, expected ${length}`);
    if (size > length) {
      ftruncateSync(file.fd, length);
      file.unsynced = true;
    }
    this.#close(file);
  }

  /** Closes a file that is not needed any more and removes it. */
  remove(name: string): void {
    this.cutBack(name, undefined);
  }

  closeAll(): void {
    for (const file of [...this.#files.values()]) this.#close(file);
  }

  get size(): number {
    return this.#files.size;
  }

  #closeOldest(): void {
    const [oldest] = this.#files.values();
    if (oldest) this.#close(oldest);
  }

  #close(file: OpenFile): void {
    if (file.unsynced) syncData(file.fd);
    closeSync(file.fd);
    this.#files.delete(file.name);
  }
}
