/**
 * The one log that a receiver appends: what was answered 200 and is not in parts and ledgers for sure yet.
 *
 *   .journal-<id>.lock   held while the process lives: a journal whose lock is free has a dead process
 *   .journal-<id>-<n>    segments, oldest first; one is dropped when the parts and ledgers of all hosts in it are synced
 *
 * A record is `LRTJ`, the lengths of entry and body, a CRC-32 over all of it, the entry (JSON) and the chunk's body as it
 * came. All that waits is appended with one write and synced once (rule: one sync serves all chunks that came meanwhile).
 * Each entry says up to where the journal was synced when it was written. So a damaged record is the end of the journal,
 * unless one behind it says that it had been synced: that is damage, and told. A record that could not be synced is cut
 * off and the cut synced before another is written: until then nothing is taken. Each entry names its journal, which no
 * sender knows: what looks like a record inside a body, where damage makes one search, is none.
 */
import { close, closeSync, fdatasync, ftruncateSync, open, readdirSync, writev } from "node:fs";
import { type FileHandle, open as openFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { crc32 } from "node:zlib";
import type { Encoding } from "../chunk.ts";
import { failpoint, removeDurably, syncPath } from "../durable.ts";
import type { StreamRecord } from "../ledger.ts";

const SEGMENT_BYTES = 64 * 1024 * 1024;
/** Of all segments together; beyond it nothing is taken. */
const JOURNAL_BYTES = 1024 * 1024 * 1024;
/** Written and synced at once. */
const GROUP_BYTES = 32 * 1024 * 1024;
const MAGIC = Buffer.from("LRTJ");
const HEAD_BYTES = 16;
const SEARCH_BYTES = 1024 * 1024;

const [openInPool, closeInPool] = [promisify(open), promisify(close)];
const syncInPool = promisify(fdatasync);
const nextTick = promisify(setImmediate);

/** Lines of one batch that stand together in a chunk's body, decoded: `[from, to)` goes to the part at `at`. */
export interface Run {
  batch: string;
  at: number;
  from: number;
  to: number;
  lines: number;
  /** End of the batch's window, milliseconds since the epoch. */
  endsAt: number;
  /** The held piece of the stream that stands before it: its length, and where in the source it begins. */
  piece?: { length: number; from: number };
}

/** What one chunk does. Lengths and offsets are absolute: to do it twice is the same as once. */
export interface Entry {
  seq: number;
  journal?: string;
  synced: Position;
  at: number;
  host: string;
  stream: string;
  /** The source offset of the first line in it. */
  from: number;
  state: StreamRecord;
  runs: Run[];
  /** `[from, to)` of the body is a line without an end, held behind `at` bytes of it. */
  piece?: { at: number; from: number; to: number };
  encoding: Encoding;
  /** Of the body, decoded. */
  length: number;
  lines: number;
  skipped?: number;
  untimed?: number;
  ahead?: number;
  /** The host's total of lost bytes, bytes and files shipped again, and the window up to which its names are unsure. */
  lost?: number;
  again?: number;
  againFiles?: number;
  unsure?: string;
  /** Offset from UTC of its newest timestamp, in minutes. */
  zone?: number;
}

/** A segment's number and an offset in it. */
export type Position = [segment: number, offset: number];

interface Pending {
  entry: Entry;
  body: Uint8Array;
  synced: () => void;
  resolve: () => void;
  reject: (error: unknown) => void;
}

interface Segment {
  n: number;
  path: string;
  length: number;
  /** The last record of each host in it. */
  hosts: Map<string, number>;
}

export class Journal {
  readonly id: string;
  readonly #dir: string;
  readonly #segments: Segment[] = [];
  #fd = -1;
  /** Of the segment that was begun last. */
  #n = 0;
  #seq = 0;
  #synced: Position = [0, 0];
  #pending: Pending[] = [];
  #writing: Promise<void> | undefined;
  #fault: unknown;
  #repairing: Promise<void> | undefined;

  /** Nothing is on disk before the first record. The caller holds the lock of `id`. */
  constructor(dir: string, id: string) {
    this.#dir = dir;
    this.id = id;
  }

  /** Why nothing is taken now; undefined when all is well. */
  get fault(): unknown {
    if (this.#fault !== undefined) return this.#fault;
    return this.bytes < JOURNAL_BYTES ? undefined : new Error("the journal is full: batches are not synced");
  }

  get bytes(): number {
    return this.#segments.reduce((sum, { length }) => sum + length, 0);
  }

  /** Its segments that are on stable storage, oldest first. */
  get paths(): string[] {
    return this.#segments.map(({ path }) => path);
  }

  /** The hosts that keep the oldest segment from being dropped; none while it is the only one. */
  get oldestHosts(): string[] {
    const [oldest, next] = this.#segments;
    return oldest && next ? [...oldest.hosts.keys()] : [];
  }

  /**
   * Takes a record, in the order of the calls; `synced` is called, in that order, once it is on stable storage, before
   * the promise resolves. Rejects with the system's error when it could not be synced: then it never was.
   */
  append(entry: Entry, body: Uint8Array, synced: () => void): Promise<void> {
    const { fault } = this;
    if (fault !== undefined) return Promise.reject(fault);
    entry.seq = ++this.#seq;
    return new Promise((resolve, reject) => {
      this.#pending.push({ entry, body, synced, resolve, reject });
      this.#writing ??= this.#drain();
    });
  }

  async #drain(): Promise<void> {
    await nextTick(); // requests that have come meanwhile share the sync
    while (this.#pending.length > 0) {
      const group = this.#takeGroup();
      try {
        await this.#write(group);
      } catch (error) {
        this.#fault = error;
        this.#writing = undefined;
        for (const { reject } of [...group, ...this.#pending.splice(0)]) reject(error);
        return;
      }
      for (const { synced, resolve } of group) {
        synced();
        resolve();
      }
    }
    this.#writing = undefined; // in the same turn: what is appended from now on begins anew
  }

  #takeGroup(): Pending[] {
    let bytes = 0;
    let size = 0;
    for (const { body } of this.#pending) {
      if (size > 0 && bytes + body.length > GROUP_BYTES) break;
      bytes += body.length;
      size++;
    }
    return this.#pending.splice(0, size);
  }

  async #write(group: Pending[]): Promise<void> {
    if (this.#fd < 0 || (this.#segments.at(-1)?.length ?? 0) >= SEGMENT_BYTES) await this.#beginSegment();
    const segment = this.#segments.at(-1) as Segment;
    const parts: Uint8Array[] = [];
    for (const { entry, body } of group)
      parts.push(...encode({ ...entry, journal: this.id, synced: this.#synced }, body));
    const size = parts.reduce((sum, part) => sum + part.length, 0);
    await writeAll(this.#fd, parts, segment.length);
    failpoint("journal:written");
    await syncInPool(this.#fd);
    failpoint("journal:synced");
    segment.length += size;
    this.#synced = [segment.n, segment.length];
    for (const { entry } of group) segment.hosts.set(entry.host, entry.seq);
  }

  async #beginSegment(): Promise<void> {
    const n = this.#n + 1;
    const path = segmentPath(this.#dir, this.id, n);
    const fd = await openInPool(path, "w", 0o660);
    try {
      await syncPath(this.#dir);
    } catch (error) {
      closeSync(fd);
      throw error;
    }
    if (this.#fd >= 0) await closeInPool(this.#fd);
    this.#fd = fd;
    this.#n = n;
    this.#segments.push({ n, path, length: 0, hosts: new Map() });
  }

  /** Whether a segment names a host. */
  names(host: string): boolean {
    return this.#segments.some(({ hosts }) => hosts.has(host));
  }

  /** Ends the segment that is written when it names one of these hosts, so that it can be dropped like the others. */
  endSegmentOf(hosts: string[]): void {
    const { hosts: named } = this.#segments.at(-1) ?? {};
    if (!this.#writing && hosts.some((host) => named?.has(host))) this.#endSegment();
  }

  #endSegment(): void {
    if (this.#fd < 0) return;
    closeSync(this.#fd);
    this.#fd = -1;
  }

  /** Cuts off what could not be synced, so that records can be taken again. Throws the system's error. */
  repair(): Promise<void> {
    this.#repairing ??= this.#cutBack().finally(() => {
      this.#repairing = undefined;
    });
    return this.#repairing;
  }

  async #cutBack(): Promise<void> {
    if (this.#fault === undefined) return;
    if (this.#fd >= 0) {
      ftruncateSync(this.#fd, this.#segments.at(-1)?.length ?? 0);
      await syncInPool(this.#fd);
    }
    this.#fault = undefined;
  }

  /** Drops segments that are ended, oldest first, while `isSafe` says of every host in it that its last record is safe elsewhere. */
  async drop(isSafe: (host: string, seq: number) => boolean): Promise<void> {
    for (let oldest = this.#segments[0]; oldest; oldest = this.#segments[0]) {
      if (this.#segments.length === 1 && this.#fd >= 0) return;
      if (![...oldest.hosts].every(([host, seq]) => isSafe(host, seq))) return;
      failpoint("journal:drop");
      await removeDurably(oldest.path);
      this.#segments.shift();
    }
  }

  /** Waits for what is on its way, and closes the file. */
  async close(): Promise<void> {
    await this.#writing;
    this.#endSegment();
  }
}

function encode(entry: Entry, body: Uint8Array): Uint8Array[] {
  const text = Buffer.from(JSON.stringify(entry));
  const head = Buffer.alloc(HEAD_BYTES);
  MAGIC.copy(head);
  head.writeUInt32LE(text.length, 4);
  head.writeUInt32LE(body.length, 8);
  head.writeUInt32LE(checksum(head, text, body), 12);
  return [head, text, body];
}

function checksum(head: Uint8Array, text: Uint8Array, body: Uint8Array): number {
  return crc32(body, crc32(text, crc32(head.subarray(4, 12))));
}

/** The callback form: what `promisify` makes of it differs between runtimes. */
function writeSome(fd: number, parts: Uint8Array[], position: number): Promise<number> {
  return new Promise((resolve, reject) => {
    writev(fd, parts, position, (error, written) => (error ? reject(error) : resolve(written)));
  });
}

async function writeAll(fd: number, parts: Uint8Array[], position: number): Promise<void> {
  let rest = parts.filter((part) => part.length > 0);
  let at = position;
  while (rest.length > 0) {
    const some = rest.slice(0, 512); // no more than IOV_MAX
    const written = await writeSome(fd, some, at);
    if (written === 0) throw new Error("Cannot write to the journal: nothing was taken");
    at += written;
    let left = written;
    while (rest[0] && left >= rest[0].length) left -= (rest.shift() as Uint8Array).length;
    if (left > 0 && rest[0]) rest = [rest[0].subarray(left), ...rest.slice(1)];
  }
}

// ---- reading

function segmentPath(dir: string, id: string, n: number): string {
  return join(dir, `.journal-${id}-${String(n).padStart(8, "0")}`);
}

export function journalLock(dir: string, id: string): string {
  return join(dir, `.journal-${id}.lock`);
}

/** The journals in a folder: their segments by number, none for one whose process wrote nothing. */
export function listJournals(dir: string): Map<string, string[]> {
  const found = new Map<string, string[]>();
  for (const name of readdirSync(dir).sort()) {
    const [, id = "", rest] = /^\.journal-([a-z0-9]+)(\.lock|-\d{8})$/.exec(name) ?? [];
    if (rest === undefined) continue;
    const paths = found.get(id) ?? [];
    if (rest !== ".lock") paths.push(join(dir, name));
    found.set(id, paths);
  }
  return found;
}

interface Place {
  path: string;
  start: Position;
  end: Position;
  synced: Position;
}

/** Where something can't be read; `isEnd`: where a segment ends. */
interface Bad {
  path: string;
  at: Position;
  isEnd: boolean;
}

/**
 * What a journal's segments say, in order. `onDamage` is told of each stretch that is unreadable although it had been
 * synced; what is behind the last synced record is left out.
 */
export async function* readJournal(
  paths: string[],
  onDamage: (where: string) => void,
): AsyncGenerator<{ entry: Entry; body: Uint8Array }> {
  const places: Place[] = [];
  const bad: Bad[] = [];
  for (const path of paths) await scanSegment(path, places, bad);
  const isBehind = (a: Position, b: Position) => a[0] > b[0] || (a[0] === b[0] && a[1] > b[1]);
  let end: Position = [Number.POSITIVE_INFINITY, 0];
  for (const { path, at, isEnd } of bad) {
    const says = ({ start, synced }: Place) =>
      isBehind(start, at) && isBehind(synced, at) && (!isEnd || synced[0] === at[0]);
    if (places.some(says)) onDamage(`${path} at byte ${at[1]}`);
    else if (!isEnd && isBehind(end, at)) end = at;
  }
  for (const path of paths) {
    const file = await openFile(path, "r");
    try {
      for (const place of places) {
        if (place.path !== path || isBehind(place.start, end)) continue;
        const record = await readRecord(file, place.start[1], place.end[1]);
        if (record) yield record;
      }
    } finally {
      await file.close();
    }
  }
}

async function scanSegment(path: string, places: Place[], bad: Bad[]): Promise<void> {
  const [, id = "", digits] = /\.journal-([a-z0-9]+)-(\d{8})$/.exec(path) ?? [];
  const n = Number(digits);
  const file = await openFile(path, "r");
  try {
    const { size } = await file.stat();
    let isBad = false;
    for (let at = 0; at < size; ) {
      const record = await readRecord(file, at, size);
      // another entry may be anything that is JSON
      if (record?.entry?.journal === id) {
        places.push({ path, start: [n, at], end: [n, at + record.size], synced: record.entry.synced });
        at += record.size;
        isBad = false;
        continue;
      }
      if (!isBad) bad.push({ path, at: [n, at], isEnd: false });
      isBad = true;
      at = await findMagic(file, at + 1, size);
    }
    if (!isBad) bad.push({ path, at: [n, size], isEnd: true }); // the next segment knows whether it was longer
  } finally {
    await file.close();
  }
}

async function readRecord(file: FileHandle, at: number, size: number) {
  const head = Buffer.alloc(HEAD_BYTES);
  if (at + HEAD_BYTES > size || (await file.read(head, 0, HEAD_BYTES, at)).bytesRead < HEAD_BYTES)
    return undefined;
  const [textLength, bodyLength] = [head.readUInt32LE(4), head.readUInt32LE(8)];
  const length = HEAD_BYTES + textLength + bodyLength;
  if (!head.subarray(0, 4).equals(MAGIC) || at + length > size) return undefined;
  const rest = Buffer.allocUnsafe(textLength + bodyLength);
  for (let done = 0; done < rest.length; ) {
    const { bytesRead } = await file.read(rest, done, rest.length - done, at + HEAD_BYTES + done);
    if (bytesRead === 0) return undefined;
    done += bytesRead;
  }
  const [text, body] = [rest.subarray(0, textLength), rest.subarray(textLength)];
  if (checksum(head, text, body) !== head.readUInt32LE(12)) return undefined;
  try {
    return { entry: JSON.parse(text.toString()) as Entry, body, size: length };
  } catch {
    return undefined; // nothing that was written here
  }
}

async function findMagic(file: FileHandle, from: number, size: number): Promise<number> {
  const block = Buffer.allocUnsafe(SEARCH_BYTES);
  for (let at = from; at < size; at += SEARCH_BYTES - MAGIC.length + 1) {
    const { bytesRead } = await file.read(block, 0, SEARCH_BYTES, at);
    const found = block.subarray(0, bytesRead).indexOf(MAGIC);
    if (found >= 0) return at + found;
  }
  return size;
}

// ---- what a disk refuses

/** A chunk that cannot be taken now; `status` as in the wire contract. */
export class StoreError extends Error {
  readonly status: 403 | 503 | 507;
  constructor(status: 403 | 503 | 507, message: string, cause?: unknown) {
    super(message, { cause });
    this.status = status;
  }
}

export function storeError(error: unknown): StoreError {
  if (error instanceof StoreError) return error;
  const { code } = error as NodeJS.ErrnoException;
  const isFull = code === "ENOSPC" || code === "EDQUOT";
  return new StoreError(
    isFull ? 507 : 503,
    isFull ? "no space left on the disk" : "the disk does not take it; see the log",
    error,
  );
}
