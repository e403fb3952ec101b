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
import { statSync } from "node:fs";
import { join } from "node:path";
import { dashedHost, formatBatchName, LEDGER, parseBatchName, withState } from "../batch.ts";
import { failpoint, makeFolder, moveDurably } from "../durable.ts";
import {
  applyRecord,
  countMinute,
  type Ledger,
  type LedgerRecord,
  type OpenBatch,
  type Stream,
} from "../ledger.ts";
import { holdLock } from "../lock.ts";
import { forgetSealed, nextPart, recordSealed } from "../sealed.ts";
import type { Log } from "../service.ts";
import { Journal } from "./journal.ts";
import { type OpenFile, OpenFiles } from "./openfiles.ts";
import { PIECE, type Recovered, recoverSender } from "./recover.ts";
import { type FindWindow, STAMP_WITHIN, type Window, windowOfArrival } from "./window.ts";

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

const LF = 0x0a;
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
    return new Sender(host, folder, options, await recoverSender(host, folder, options), lock);
  } catch (error) {
    lock.release();
    throw error;
  }
}

export class Sender {
  readonly host: string;
  readonly folder: string;
  /** The file system that the folder is on, as in stat(2). */
  readonly device: number;
  /** What is committed. */
  readonly ledger: Ledger;
  /** Set when a failure could not be undone: what is on disk must be looked at anew before the next commit. */
  broken = false;
  readonly #options: StoreOptions;
  readonly #lock: { release: () => void };
  readonly #files: OpenFiles;
  readonly #journal: Journal;
  /** The open batch of each window. */
  readonly #batches = new Map<string, string>();
  /** Sealed by name, but the file has not got it yet. */
  readonly #finishing: Set<string>;
  #usedAt: number;
  #tidiedAt = Number.NEGATIVE_INFINITY;
  /** The commit in hand: what it will change. */
  #streams = new Map<string, Stream>();
  #open = new Map<string, OpenBatch>();
  #change: LedgerRecord = {};
  #lines = 0;

  constructor(
    host: string,
    folder: string,
    options: StoreOptions,
    { ledger, finishing }: Recovered,
    lock: { release: () => void },
  ) {
    this.host = host;
    this.folder = folder;
    this.device = statSync(folder).dev;
    this.ledger = ledger;
    this.#finishing = finishing;
    this.#options = options;
    this.#lock = lock;
    this.#files = new OpenFiles(folder);
    this.#journal = new Journal(folder);
    this.#usedAt = options.now();
    for (const name of ledger.open.keys()) this.#batches.set(parseBatchName(name)?.window ?? "", name);
  }

  /** Writes a chunk's lines, to count once `apply` is called. Throws the system's error. */
  stage(chunk: Chunk): Outcome {
    const now = this.#options.now();
    this.#usedAt = now;
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
      stream.window === undefined
        ? undefined
        : { name: stream.window, endsAt: stream.windowEnd ?? 0, zone: 0 };
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
    const file = this.#files.at(withState(name, "open"), known?.bytes ?? 0);
    this.#files.write(file, body, start, end);
    this.#open.set(name, {
      bytes: file.length,
      lines: (known?.lines ?? 0) + lines,
      endsAt: Math.max(known?.endsAt ?? 0, window.endsAt),
      at: now,
    });
  }

  /** Keeps the beginning of a line whose end has not come; it is in no batch yet. */
  #stagePiece(name: string, stream: Stream, bytes: Uint8Array): number {
    const file = this.#files.at(pieceName(name), stream.piece ?? 0);
    this.#files.write(file, bytes, 0, bytes.length);
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
    const { findWindow, windowMinutes } = this.#options;
    const { length } = this.#files.at(pieceName(name), stream.piece ?? 0);
    const head = Buffer.concat([
      this.#readPiece(name, length, 0, STAMP_WITHIN),
      rest.subarray(0, STAMP_WITHIN),
    ]);
    const window = findWindow(head, 0, head.length) ?? previous ?? windowOfArrival(now, windowMinutes);
    for (let at = 0; at < length; at += COPY_BYTES) {
      const block = this.#readPiece(name, length, at, COPY_BYTES);
      this.#writeRun(window, block, 0, block.length, 0, now);
    }
    this.#writeRun(window, rest, 0, rest.length, 1, now);
    delete stream.piece;
    return window;
  }

  #readPiece(name: string, length: number, at: number, most: number): Buffer {
    const block = Buffer.allocUnsafe(Math.min(most, length - at));
    this.#files.read(this.#files.at(pieceName(name), length), block, at);
    return block;
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
    return this.#files.unsynced();
  }

  /** Whether the folder has a new name that must be on stable storage before the record speaks of it. */
  get created(): boolean {
    return this.#files.created;
  }

  /** Writes the record of what was staged. Returns the ledger's descriptor, to be synced. */
  append(): number {
    const record = this.#change;
    if (this.#lines > 0) record.minutes = countMinute(this.ledger, this.#lines, this.#options.now());
    if (this.#streams.size > 0) record.streams = Object.fromEntries(this.#streams);
    if (this.#open.size > 0) record.open = Object.fromEntries(this.#open);
    return this.#journal.append(record, this.ledger);
  }

  /** Makes the commit true: everything that was staged is on stable storage. */
  apply(): void {
    const ended = [...this.#streams].filter(
      ([name, { piece }]) => piece === undefined && this.ledger.streams.get(name)?.piece !== undefined,
    );
    applyRecord(this.ledger, this.#change);
    this.#journal.commit();
    this.#files.synced();
    this.#clear();
    for (const [name] of ended) this.#dropPiece(name);
  }

  /** The line is in its batch. A piece that stays behind is removed on the next start. */
  #dropPiece(stream: string): void {
    try {
      this.#files.remove(pieceName(stream));
    } catch {
      // no record speaks of it any more
    }
  }

  #clear(): void {
    this.#streams = new Map();
    this.#open = new Map();
    this.#change = {};
    this.#lines = 0;
  }

  /**
   * Undoes what was staged. The ledger is cut first: while a record might still be on disk, the lines that it
   * speaks of stay where they are. When something cannot be undone the sender is `broken`.
   */
  rollBack(): void {
    if (this.broken) return;
    const names = new Set(this.unsynced().map((file) => file.name));
    for (const name of this.#open.keys()) names.add(withState(name, "open"));
    for (const stream of this.#streams.keys()) names.add(pieceName(stream));
    try {
      this.#journal.cutBack();
      for (const name of names) this.#cutBack(name);
    } catch {
      this.broken = true;
    }
    this.#clear();
  }

  #cutBack(name: string): void {
    const batch = parseBatchName(name);
    const committed = batch
      ? this.ledger.open.get(withState(name, "sealed"))?.bytes
      : this.ledger.streams.get(name.slice(PIECE.length))?.piece;
    this.#files.cutBack(name, committed);
    if (batch && committed === undefined) this.#batches.delete(batch.window);
  }

  /** The ledger's file is far longer than what it says. */
  get isGrown(): boolean {
    return this.#journal.isGrown;
  }

  /** Rewrites the ledger when it has grown far beyond what it says. */
  async compact(): Promise<void> {
    await this.#journal.compact(this.ledger);
  }

  /** Whether there is something for `tidy` to do. */
  isUntidy(): boolean {
    const now = this.#options.now();
    const isIdle = this.#files.size > 0 && now - this.#usedAt > REST_MS;
    return isIdle || Math.abs(now - this.#tidiedAt) >= DAY_MS;
  }

  /** Closes the files of a quiet sender; once a day forgets what is too old to be asked for. */
  async tidy(): Promise<void> {
    const now = this.#options.now();
    if (now - this.#usedAt > REST_MS) this.#rest();
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
    return [...this.#finishing, ...names];
  }

  /** Seals a batch: from now on it is never written again. Repeating it after a failure is safe. */
  async seal(name: string): Promise<void> {
    const batch = this.ledger.open.get(name);
    const part = withState(name, "open");
    if (batch) await this.#recordSealed(name, part, batch);
    await moveDurably(join(this.folder, part), join(this.folder, name));
    failpoint("seal:renamed");
    this.#finishing.delete(name);
    // Not synced: `.ledger-sealed` says the same, and the next commit's sync covers it.
    this.#journal.append({ closed: [name] }, this.ledger);
    this.#journal.commit();
  }

  /** Uses up the name. When it is not sure whether that is on disk, the folder must be looked at anew. */
  async #recordSealed(name: string, part: string, { bytes, lines }: OpenBatch): Promise<void> {
    try {
      this.#files.finish(part, bytes);
      await recordSealed(this.folder, { name, bytes, lines, at: this.#options.now() });
    } catch (error) {
      this.broken = true;
      throw error;
    }
    failpoint("seal:recorded");
    this.#finishing.add(name);
    this.ledger.open.delete(name);
    this.#batches.delete(parseBatchName(name)?.window ?? "");
  }

  close(): void {
    this.#rest();
    this.#lock.release();
  }

  #rest(): void {
    this.#files.closeAll();
    this.#journal.close();
  }
}
