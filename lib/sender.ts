/**
 * One sender on disk: its folder, its open batches, its ledger. One process at a time has it, by lock.
 *
 * A commit is: `stage` writes the lines behind the committed length of their `.part` (nobody counts them yet),
 * the caller syncs `unsynced()`, `append` writes the ledger record, the caller syncs `ledgerFile()`, `apply`
 * makes it true in memory, and only then may a 200 go out. A crash before the record is on disk leaves lines
 * behind the committed length, which `openSender` cuts off; a crash after it leaves a committed chunk whose
 * repeat is refused by its offset. `rollBack` undoes a commit that failed, ledger first: a record that stays
 * must never speak of lines that are gone.
 *
 * Sealing: the name goes into `.ledger-sealed`, and from then on is used up; then the file gets it. A crash in
 * between is finished on the next start.
 */
import {
  closeSync,
  existsSync,
  fstatSync,
  ftruncateSync,
  openSync,
  readSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { dashedHost, formatBatchName, LEDGER, parseBatchName, withState } from "./batch.ts";
import { makeFolder, moveDurably, reached, syncData, writeDurably } from "./durable.ts";
import {
  applyRecord,
  countMinute,
  formatRecord,
  type Ledger,
  type LedgerRecord,
  type OpenBatch,
  type Stream,
  snapshot,
} from "./ledger.ts";
import { holdLock } from "./lock.ts";
import { PIECE, recoverSender } from "./recover.ts";
import { forgetSealed, nextPart, recordSealed } from "./sealed.ts";
import type { Log } from "./service.ts";
import { type FindWindow, STAMP_WITHIN, type Window, windowOfArrival } from "./timestamp.ts";

/** What all senders of a process share. */
export interface StoreOptions {
  dir: string;
  prefix: string;
  windowMinutes: number;
  sealAfterSeconds: number;
  forgetAfterDays: number;
  findWindow: FindWindow;
  now: () => number;
  log: Log;
}

/**
 * One POST: bytes `[offset, end)` of a stream, and the lines that are left of them. Without a range it goes
 * behind what is there: the original's form knows none.
 */
export interface Chunk {
  host: string;
  stream: string;
  offset?: number;
  end?: number;
  lag?: number;
  lost?: number;
  body: Uint8Array;
}

/** What became of a chunk; `conflict`: it does not start where the stream stands, which is at `offset`. */
export interface Outcome {
  conflict: boolean;
  lines: number;
  offset: number;
}

/** A `.part` or piece file; `length` is what is written, of which the ledger says how much counts. */
interface OpenFile {
  name: string;
  fd: number;
  length: number;
  unsynced: boolean;
}

const LF = 0x0a;
/** A ledger is rewritten when it is longer than this and than eight times what it says. */
const COMPACT_BYTES = 262_144;
const COMPACT_RATIO = 8;
/** Files of one sender that are kept open at once. */
const MAX_FILES = 64;
/** A window that starts so far ahead comes from a wrong clock and is not waited for. */
const FUTURE_MS = 7 * 86_400_000;
const DAY_MS = 86_400_000;
const COPY_BYTES = 262_144;
/** A sender not heard of for so long gives back its descriptors. */
const REST_MS = 60_000;

function pieceName(stream: string): string {
  return PIECE + stream;
}

/** Takes a sender's folder, which is made when it is not there. Throws an OperatorError when another process has it. */
export async function openSender(host: string, options: StoreOptions): Promise<Sender> {
  const folder = join(options.dir, host);
  await makeFolder(folder);
  const lock = await holdLock(join(folder, `${LEDGER}-lock`), `The folder of ${host}`);
  try {
    const { ledger, finishing } = await recoverSender(host, folder, options);
    return new Sender(host, folder, options, ledger, finishing, lock);
  } catch (error) {
    lock.release();
    throw error;
  }
}

export class Sender {
  readonly host: string;
  readonly folder: string;
  /** What is committed. */
  ledger: Ledger;
  /** Sealed by name, but the file has not got it yet. */
  readonly finishing: Set<string>;
  /** Set when a failure could not be undone: what is on disk must be looked at anew before the next commit. */
  broken = false;
  /** When it was last used, by the clock of `options`. */
  usedAt: number;
  readonly #options: StoreOptions;
  readonly #lock: { release: () => void };
  readonly #files = new Map<string, OpenFile>();
  /** The open batch of each window. */
  readonly #batches = new Map<string, string>();
  #ledgerFd = -1;
  #ledgerLength = 0;
  #compactAt = COMPACT_BYTES;
  #tidiedAt = Number.NEGATIVE_INFINITY;
  /** The commit in hand: what it will change. */
  #streams = new Map<string, Stream>();
  #open = new Map<string, OpenBatch>();
  #change: LedgerRecord = {};
  #lines = 0;
  #appended = 0;
  #created = false;

  constructor(
    host: string,
    folder: string,
    options: StoreOptions,
    ledger: Ledger,
    finishing: Set<string>,
    lock: { release: () => void },
  ) {
    this.host = host;
    this.folder = folder;
    this.ledger = ledger;
    this.finishing = finishing;
    this.usedAt = options.now();
    this.#options = options;
    this.#lock = lock;
    for (const name of ledger.open.keys()) this.#batches.set(parseBatchName(name)?.window ?? "", name);
  }

  /** Writes a chunk's lines, to count once `apply` is called. Throws the system's error. */
  stage(chunk: Chunk): Outcome {
    const now = this.#options.now();
    this.usedAt = now;
    const known = this.#streams.get(chunk.stream) ?? this.ledger.streams.get(chunk.stream);
    const { offset = known?.offset ?? 0, end = offset + chunk.body.length, body, lag, lost } = chunk;
    if (known && known.offset !== offset) return { conflict: true, lines: 0, offset: known.offset };
    this.#change.heardAt = now;
    if (lost) this.#change.lost = (this.#change.lost ?? this.ledger.lost) + lost;
    if (!known && end === offset) return { conflict: false, lines: 0, offset: end };
    const stream: Stream = { ...known, offset: end, at: now };
    delete stream.lag;
    if (lag !== undefined) stream.lag = lag;
    const lines = body.length > 0 ? this.#stageLines(chunk, stream, now) : 0;
    if (lines > 0) {
      this.#change.lineAt = now;
      this.#lines += lines;
    }
    this.#streams.set(chunk.stream, stream);
    return { conflict: false, lines, offset: end };
  }

  /** Files each run of lines of one window with one write from the body itself. */
  #stageLines(chunk: Chunk, stream: Stream, now: number): number {
    const { findWindow, windowMinutes } = this.#options;
    const { body } = chunk;
    let previous: Window | undefined =
      stream.window === undefined ? undefined : { name: stream.window, endsAt: stream.windowEnd ?? 0 };
    let pos = 0;
    let lines = 0;
    if (stream.piece !== undefined) {
      const end = body.indexOf(LF) + 1;
      if (end === 0) return this.#stagePiece(chunk.stream, stream, body);
      previous = this.#stageLongLine(chunk.stream, stream, body.subarray(0, end), previous, now);
      pos = end;
      lines = 1;
    }
    let runStart = pos;
    let runLines = 0;
    for (let end = body.indexOf(LF, pos); end >= 0; end = body.indexOf(LF, pos)) {
      const window = findWindow(body, pos, end) ?? previous ?? windowOfArrival(now, windowMinutes);
      if (window !== previous && runLines > 0) {
        this.#writeRun(previous as Window, body, runStart, pos, runLines, now);
        runStart = pos;
        runLines = 0;
      }
      previous = window;
      runLines++;
      lines++;
      pos = end + 1;
    }
    if (runLines > 0) this.#writeRun(previous as Window, body, runStart, pos, runLines, now);
    if (previous) {
      stream.window = previous.name;
      stream.windowEnd = previous.endsAt;
    }
    if (pos < body.length) this.#stagePiece(chunk.stream, stream, body.subarray(pos));
    return lines;
  }

  #writeRun(window: Window, body: Uint8Array, start: number, end: number, lines: number, now: number): void {
    const name = this.#batches.get(window.name) ?? this.#newBatch(window.name);
    const known = this.#open.get(name) ?? this.ledger.open.get(name);
    const file = this.#file(withState(name, "open"), known?.bytes ?? 0);
    this.#write(file, body, start, end);
    this.#open.set(name, {
      bytes: file.length,
      lines: (known?.lines ?? 0) + lines,
      endsAt: Math.max(known?.endsAt ?? 0, window.endsAt),
      at: now,
    });
  }

  /** Keeps the beginning of a line whose end has not come; it is in no batch yet. */
  #stagePiece(name: string, stream: Stream, bytes: Uint8Array): number {
    const file = this.#file(pieceName(name), stream.piece ?? 0);
    this.#write(file, bytes, 0, bytes.length);
    stream.piece = file.length;
    return 0;
  }

  /** Files a line that came in pieces, now that its end is here: the pieces, then `rest`, as one line. */
  #stageLongLine(
    name: string,
    stream: Stream,
    rest: Uint8Array,
    previous: Window | undefined,
    now: number,
  ): Window {
    const piece = this.#file(pieceName(name), stream.piece ?? 0);
    const head = Buffer.alloc(Math.min(STAMP_WITHIN, piece.length + rest.length));
    const taken = readSync(piece.fd, head, 0, Math.min(head.length, piece.length), 0);
    head.set(rest.subarray(0, head.length - taken), taken);
    const { findWindow, windowMinutes } = this.#options;
    const window = findWindow(head, 0, head.length) ?? previous ?? windowOfArrival(now, windowMinutes);
    const block = Buffer.allocUnsafe(COPY_BYTES);
    for (let at = 0; at < piece.length; ) {
      const read = readSync(piece.fd, block, 0, Math.min(block.length, piece.length - at), at);
      if (read === 0)
        throw new Error(`Cannot read "${piece.name}": it ends at ${at}, expected ${piece.length}`);
      this.#writeRun(window, block, 0, read, 0, now);
      at += read;
    }
    this.#writeRun(window, rest, 0, rest.length, 1, now);
    delete stream.piece;
    return window;
  }

  #write(file: OpenFile, bytes: Uint8Array, start: number, end: number): void {
    for (let at = start; at < end; ) {
      const written = writeSync(file.fd, bytes, at, end - at, file.length);
      file.unsynced = true;
      file.length += written;
      at += written;
    }
    reached("commit:written");
  }

  /** The file of this name in the folder, open for writing behind its first `length` bytes. */
  #file(name: string, length: number): OpenFile {
    let file = this.#files.get(name);
    if (file) this.#files.delete(name);
    else {
      if (this.#files.size >= MAX_FILES) this.#closeOldest();
      const path = join(this.folder, name);
      const isNew = !existsSync(path);
      file = { name, fd: openSync(path, isNew ? "wx+" : "r+", 0o640), length, unsynced: false };
      if (length === 0) this.#created = true;
    }
    this.#files.set(name, file); // the last used stands last
    file.length = length;
    return file;
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

  #newBatch(window: string): string {
    const { dir, prefix, now } = this.#options;
    const part = nextPart({ dir, prefix, window, host: this.host }, now());
    const name = formatBatchName({ prefix, window, host: dashedHost(this.host), part, state: "sealed" });
    this.#batches.set(window, name);
    return name;
  }

  /** Files with lines that are not on stable storage yet. */
  unsynced(): OpenFile[] {
    return [...this.#files.values()].filter((file) => file.unsynced);
  }

  /** Whether the folder has a new name that must be on stable storage before the record speaks of it. */
  get created(): boolean {
    return this.#created;
  }

  /** Writes the record of what was staged. Returns the ledger's descriptor, to be synced. */
  append(): number {
    this.#created = false;
    const record = this.#change;
    if (this.#lines > 0) record.minutes = countMinute(this.ledger, this.#lines, this.#options.now());
    if (this.#streams.size > 0) record.streams = Object.fromEntries(this.#streams);
    if (this.#open.size > 0) record.open = Object.fromEntries(this.#open);
    return this.#appendRecord(record);
  }

  #appendRecord(record: LedgerRecord): number {
    if (this.#ledgerFd < 0) this.#openLedger();
    const line = Buffer.from(formatRecord(record));
    for (let at = 0; at < line.length; ) {
      at += writeSync(this.#ledgerFd, line, at, line.length - at, this.#ledgerLength + at);
    }
    this.#appended = line.length;
    return this.#ledgerFd;
  }

  #openLedger(): void {
    const path = join(this.folder, LEDGER);
    if (!existsSync(path)) writeFileSync(path, formatRecord(snapshot(this.ledger))); // removed by hand
    this.#ledgerFd = openSync(path, "r+");
    this.#ledgerLength = fstatSync(this.#ledgerFd).size;
  }

  /** Makes the commit true: everything that was staged is on stable storage. */
  apply(): void {
    for (const [name, { piece }] of this.#streams) {
      const had = this.ledger.streams.get(name)?.piece;
      if (had !== undefined && piece === undefined) this.#dropPiece(name);
    }
    applyRecord(this.ledger, this.#change);
    for (const file of this.#files.values()) file.unsynced = false;
    this.#ledgerLength += this.#appended;
    this.#clear();
  }

  #clear(): void {
    this.#streams = new Map();
    this.#open = new Map();
    this.#change = {};
    this.#lines = 0;
    this.#appended = 0;
    this.#created = false;
  }

  /** The line is in its batch; a piece file that stays behind is removed on the next start. */
  #dropPiece(stream: string): void {
    const file = this.#files.get(pieceName(stream));
    if (file) this.#close(file);
    try {
      rmSync(join(this.folder, pieceName(stream)), { force: true });
    } catch {
      // the ledger does not speak of it any more
    }
  }

  /**
   * Undoes what was staged. The ledger is cut first: while a record might still be on disk, the lines that it
   * speaks of stay where they are. When something cannot be undone the sender is `broken`.
   */
  rollBack(): void {
    if (this.broken) return;
    const files = new Set(this.unsynced().map((file) => file.name));
    for (const name of this.#open.keys()) files.add(withState(name, "open"));
    for (const stream of this.#streams.keys()) files.add(pieceName(stream));
    try {
      if (this.#ledgerFd >= 0) ftruncateSync(this.#ledgerFd, this.#ledgerLength);
      for (const name of files) this.#cutBack(name);
    } catch {
      this.broken = true;
    }
    this.#clear();
  }

  #cutBack(name: string): void {
    const path = join(this.folder, name);
    const file = this.#files.get(name);
    const batch = parseBatchName(name);
    const committed = batch
      ? this.ledger.open.get(withState(name, "sealed"))?.bytes
      : this.ledger.streams.get(name.slice(pieceName("").length))?.piece;
    if (committed !== undefined) {
      if (file) file.unsynced = false;
      if (existsSync(path)) truncateSync(path, committed);
      return;
    }
    if (file) {
      closeSync(file.fd);
      this.#files.delete(name);
    }
    rmSync(path, { force: true });
    if (batch) this.#batches.delete(batch.window);
  }

  /** Rewrites the ledger when it has grown far beyond what it says. */
  async compact(): Promise<void> {
    if (this.#ledgerLength < this.#compactAt) return;
    const text = formatRecord(snapshot(this.ledger));
    await writeDurably(join(this.folder, LEDGER), text);
    this.#compactAt = Math.max(COMPACT_BYTES, COMPACT_RATIO * text.length);
    this.#closeLedger();
  }

  /** Forgets, once a day, what is too old to be asked for; gives back what a quiet sender needs not hold. */
  async tidy(): Promise<void> {
    const now = this.#options.now();
    if (now - this.usedAt > REST_MS) this.#rest();
    if (Math.abs(now - this.#tidiedAt) < DAY_MS) return;
    this.#tidiedAt = now;
    const oldest = now - this.#options.forgetAfterDays * DAY_MS;
    for (const [name, stream] of this.ledger.streams) {
      if (stream.at < oldest && stream.piece === undefined) this.ledger.streams.delete(name);
    }
    await forgetSealed(this.folder, oldest);
  }

  /** The open batches that may be sealed now. */
  due(): string[] {
    const now = this.#options.now();
    const { windowMinutes, sealAfterSeconds } = this.#options;
    const names: string[] = [];
    for (const [name, batch] of this.ledger.open) {
      if (batch.at > now) batch.at = now; // the clock was set back: wait once more, not until it is there again
      const over = now >= batch.endsAt || batch.endsAt - windowMinutes * 60_000 > now + FUTURE_MS;
      if (over && now - batch.at >= sealAfterSeconds * 1000) names.push(name);
    }
    return [...this.finishing, ...names];
  }

  /** Seals a batch: from now on it is never written again. Repeating it after a failure is safe. */
  async seal(name: string): Promise<void> {
    const batch = this.ledger.open.get(name);
    const part = withState(name, "open");
    if (batch) {
      const file = this.#files.get(part);
      if (file) this.#close(file);
      truncateSync(join(this.folder, part), batch.bytes);
      const at = this.#options.now();
      await recordSealed(this.folder, { name, bytes: batch.bytes, lines: batch.lines, at });
      reached("seal:recorded");
      this.finishing.add(name);
      this.ledger.open.delete(name);
      this.#batches.delete(parseBatchName(name)?.window ?? "");
    }
    await moveDurably(join(this.folder, part), join(this.folder, name));
    reached("seal:renamed");
    this.finishing.delete(name);
    // Not synced: `.ledger-sealed` says the same, and the next commit's sync covers it.
    this.#appendRecord({ closed: [name] });
    this.#ledgerLength += this.#appended;
    this.#appended = 0;
  }

  close(): void {
    this.#rest();
    this.#lock.release();
  }

  #rest(): void {
    for (const file of [...this.#files.values()]) this.#close(file);
    this.#closeLedger();
  }

  #closeLedger(): void {
    if (this.#ledgerFd >= 0) closeSync(this.#ledgerFd);
    this.#ledgerFd = -1;
    this.#ledgerLength = 0;
  }
}
