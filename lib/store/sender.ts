/**
 * One sender: what is staged, what is committed, what is sealed.
 *
 * A chunk is compared with what is staged, filed into runs of lines of one batch each, and becomes one entry of the
 * journal. When that is synced, its bytes are written to the parts and noted in the ledger, in the order of the journal.
 * The ledger is saved now and then, after the parts that it speaks of were synced: a checkpoint. What could not be written
 * or synced in a part or ledger is written again from the journal. Until then nothing more is taken of this sender.
 *
 * Sealing: from the decision on, lines of the window go to the next number; when all that the journal has of the batch is
 * in its part, the part is synced, then a checkpoint uses up the name, then the part is renamed. A crash between the last
 * two is finished at the next start.
 */
import { existsSync, lstatSync, readSync } from "node:fs";
import { truncate } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { FAILED, LEDGER, parseBatchName, withState } from "../batch.ts";
import type { ChunkHeaders, Encoding, SenderNews, StreamStatus } from "../chunk.ts";
import type { Config } from "../config.ts";
import { failpoint, ifMissing, moveAllDurably, removeDurably, syncPath, writeDurably } from "../durable.ts";
import { formatRecord, type Ledger, noteSealed, type StreamRecord, snapshot, useUpName } from "../ledger.ts";
import type { Lock } from "../runtime.ts";
import { DAY, HOUR, type Log } from "../service.ts";
import { type Entry, type Journal, type Run, StoreError, storeError } from "./journal.ts";
import { BatchNames } from "./names.ts";
import {
  GIVE_WAY_MS,
  loseBytes,
  noteEntry,
  type Parts,
  type Place,
  pieceName,
  writeEntry,
} from "./recover.ts";
import { type FindWindow, STAMP_WITHIN, type Window, windowOfArrival } from "./window.ts";

type ReceiverConfig = Config["receiver"];

export interface StoreOptions
  extends Pick<ReceiverConfig, "dir" | "prefix" | "windowMinutes" | "sealAfterSeconds" | "sealLatestSeconds">,
    Pick<ReceiverConfig, "forgetAfterDays" | "maxHosts" | "maxStreamsPerHost" | "maxWindowsPerHost">,
    Pick<ReceiverConfig, "maxNamesPerHour"> {
  findWindow: FindWindow;
  /** Whether the config names this host itself. */
  isListed?: (host: string) => boolean;
  now: () => number;
  log: Log;
}

/** One POST. Without a range it goes behind what is there: the original's form knows none. */
export interface Chunk extends Partial<ChunkHeaders> {
  host: string;
  stream: string;
  /** Decoded. */
  body: Uint8Array;
  /** The same as it came: what the journal keeps. */
  encoded?: { encoding: Encoding; bytes: Uint8Array };
  peer: string;
}

/** What became of a chunk; conflict: it does not go on where the stream stands, which is at `offset` with `mark`. */
export interface Outcome {
  kind: "stored" | "conflict" | "unknown";
  lines: number;
  offset: number;
  mark?: string;
}

const LF = 0x0a;
/** Half lines that a sender may have at once. */
const MAX_PIECES = 16;
const MAX_SHIPPERS = 8;
/** Two shippers that alternate within so long claim one name. */
const ALTERNATE_MS = 180_000;
/** Sealed batches stay in the ledger for so long, for the summary and the page; their names stay longer. */
const SEALED_MS = 2 * DAY;

const nextTick = promisify(setImmediate);

/** A chunk while its entry is made; nothing of it counts before it is staged. */
interface Draft {
  chunk: Chunk;
  entry: Entry & { untimed: number; ahead: number };
  /** Lengths of batches that it adds to, and the batches that it begins, by window. */
  lengths: Map<string, number>;
  begun: Map<string, string>;
  /** Windows that its lines are of. */
  windows: Set<string>;
  givenWayAt: number;
  epoch: number;
}

export class Sender implements Place {
  readonly host: string;
  readonly folder: string;
  /** What is synced in the journal and written. */
  readonly ledger: Ledger;
  readonly parts: Parts;
  readonly dirty = new Set<string>();
  options: StoreOptions;
  /** A part or the ledger could not be written: it is to be written again from the journal. */
  broken: unknown;
  staged = 0;
  /** Whether a checkpoint would say something new. */
  isDirty = false;
  checkpointAt = 0;
  /** The record of the journal up to which the last checkpoint speaks. */
  safeSeq = 0;
  readonly #journal: Journal;
  readonly #lock: Lock;
  readonly #openedAt: number;
  #isHeard = false;
  /** It was never heard in this folder, and has not asked yet. */
  #isNew: boolean;
  /** What is staged and not in the ledger yet. */
  readonly #streams = new Map<string, StreamRecord>();
  readonly #lengths = new Map<string, { bytes: number; entries: number }>();
  readonly #batches = new Map<string, string>();
  /** Sealed in the ledger, not renamed yet. */
  readonly #finishing = new Set<string>();
  #turns: Promise<unknown> = Promise.resolve();
  #writes: Promise<unknown> = Promise.resolve();
  #appended: Promise<unknown> = Promise.resolve();
  /** Counts how often the journal was cut back; `#isCut`: what is staged here was cut off. */
  #epoch = 0;
  #isCut = false;
  readonly #names: BatchNames;
  #progress: (() => void)[] = [];
  #prunedAt = Number.NEGATIVE_INFINITY;
  /** Pieces whose line is filed: removed when no record needs them any more. */
  #oldPieces: string[] = [];

  constructor(
    host: string,
    ledger: Ledger,
    { options, journal, parts, lock }: { options: StoreOptions; journal: Journal; parts: Parts; lock: Lock },
  ) {
    this.host = host;
    this.folder = join(options.dir, host);
    this.ledger = ledger;
    this.#names = new BatchNames(host, ledger);
    this.options = options;
    this.parts = parts;
    this.#journal = journal;
    this.#lock = lock;
    this.#openedAt = options.now();
    this.#isNew = isUnheard(ledger);
    const length = options.windowMinutes * 60_000;
    for (const [name, batch] of ledger.open) {
      this.#batches.set(parseBatchName(name)?.window ?? "", name);
      // One of the future, or this clock was set back: it is not waited for.
      if (batch.endsAt - length > this.#openedAt) batch.endsAt = this.#openedAt + length;
    }
  }

  get log(): Log {
    return this.options.log;
  }

  /** Runs `work` when everything before it in this sender is done. */
  turn<T>(work: () => Promise<T>): Promise<T> {
    const result = this.#turns.then(work);
    this.#turns = result.catch(() => {});
    return result;
  }

  stream(name: string): StreamRecord | undefined {
    return this.#streams.get(name) ?? this.ledger.streams.get(name);
  }

  // ---- taking a chunk in

  /**
   * Gives `ahead` for a chunk that starts behind where its stream stands, else a promise of its outcome. Rule: a request is
   * compared with what is staged; whatever tells an offset waits for the sync of what it tells.
   */
  take(chunk: Chunk, mayWait: boolean): Promise<"ahead" | { outcome: Promise<Outcome> }> {
    return this.turn(async () => {
      if (this.broken !== undefined) throw storeError(this.broken);
      if (this.#isCut) await this.#forgetStaged();
      const known = this.stream(chunk.stream);
      const verdict = compare(chunk, known);
      if (verdict === "ahead" && mayWait) return verdict;
      this.hear(chunk, chunk.peer, [chunk.stream]);
      if (verdict === "alive")
        return { outcome: Promise.resolve({ kind: "stored", lines: 0, offset: chunk.end ?? 0 }) };
      if (verdict === "unknown")
        return { outcome: Promise.resolve({ kind: "unknown", lines: 0, offset: 0 }) };
      if (verdict === "take") return { outcome: this.#stage(await this.#file(chunk, known)) };
      const { offset, mark } = known as StreamRecord;
      const told: Outcome = { kind: "conflict", lines: 0, offset, ...(mark !== undefined && { mark }) };
      return { outcome: this.#appended.then(() => told) };
    });
  }

  /** Resolves when a chunk of this sender was staged after `staged` of them, or after `ms`. */
  progress(staged: number, ms: number): Promise<void> {
    if (staged !== this.staged) return Promise.resolve();
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.#progress.push(() => {
        clearTimeout(timer);
        resolve();
      });
    });
  }

  async #file(chunk: Chunk, known: StreamRecord | undefined): Promise<Draft> {
    const now = this.options.now();
    const { offset = known?.offset ?? 0, end = offset + chunk.body.length, body, mark, head } = chunk;
    if (!known) this.#makeRoomForStream();
    const state: StreamRecord = { ...known, offset: end, at: now };
    delete state.lag;
    if (mark !== undefined) state.mark = mark;
    if (head !== undefined) state.head = head;
    const isAgain = chunk.begin === "again";
    const again = state.again || isAgain ? end - offset : 0;
    const entry: Draft["entry"] = {
      seq: 0,
      synced: [0, 0],
      at: now,
      host: this.host,
      stream: chunk.stream,
      from: state.pieceFrom ?? offset,
      state,
      runs: [],
      encoding: chunk.encoded?.encoding ?? "identity",
      length: body.length,
      lines: 0,
      skipped: chunk.skipped ?? 0,
      untimed: 0,
      ahead: 0,
      again,
      againFiles: isAgain ? 1 : 0,
    };
    const draft: Draft = {
      chunk,
      entry,
      lengths: new Map(),
      begun: new Map(),
      windows: new Set(),
      givenWayAt: performance.now(),
      epoch: this.#epoch,
    };
    if (isAgain) delete this.ledger.facts.through; // said before it was known to be lost
    if (isAgain || this.#isUnsure(chunk, offset)) this.#names.doubt(now);
    if (body.length > 0) await this.#fileLines(draft, offset);
    if (entry.lines > 0) state.lined = true;
    if (again > 0 && (chunk.lag ?? 0) > 0) state.again = true;
    else delete state.again; // nothing is left to ship: what comes now is new
    return draft;
  }

  /** A host that is new here, with a log that was read elsewhere before: it may have used names. */
  #isUnsure({ begin }: Chunk, offset: number): boolean {
    return begin !== undefined && offset > 0 && this.ledger.streams.size === 0 && this.ledger.used.size === 0;
  }

  #makeRoomForStream(): void {
    const { streams } = this.ledger;
    const begun = [...this.#streams.keys()].filter((name) => !streams.has(name)).length;
    if (streams.size + begun < this.options.maxStreamsPerHost) return;
    for (const [name, { lined, piece }] of streams) {
      if (lined || piece !== undefined || this.#streams.has(name)) continue;
      streams.delete(name); // those without a line go first
      return;
    }
    throw new StoreError(503, `host ${this.host} has ${this.options.maxStreamsPerHost} streams already`);
  }

  async #fileLines(draft: Draft, offset: number): Promise<void> {
    const { body } = draft.chunk;
    const { state } = draft.entry;
    const { findWindow } = this.options;
    let pos = state.piece === undefined ? 0 : await this.#fileLongLine(draft);
    let previous = windowOf(state);
    let run = { window: previous, from: pos, lines: 0 };
    for (let end = pos < 0 ? -1 : body.indexOf(LF, pos); end >= 0; end = body.indexOf(LF, pos)) {
      const window = this.#windowOf(draft, findWindow(body, pos, end), previous);
      if (window.name !== run.window?.name || window.endsAt !== run.window.endsAt) {
        if (run.lines > 0) this.#addRun(draft, run.window as Window, run.from, pos, run.lines);
        run = { window, from: pos, lines: 0 };
        draft.windows.add(window.name);
      }
      run.lines++;
      previous = window;
      pos = end + 1;
      if ((run.lines & 63) === 1 && performance.now() - draft.givenWayAt > GIVE_WAY_MS)
        await this.#giveWay(draft);
    }
    if (run.lines > 0) this.#addRun(draft, run.window as Window, run.from, pos, run.lines);
    if (previous) Object.assign(state, { window: previous.name, windowEnd: previous.endsAt });
    if (pos >= 0 && pos < body.length) this.#holdPiece(draft, pos, offset);
  }

  async #giveWay(draft: Draft): Promise<void> {
    await nextTick();
    draft.givenWayAt = performance.now();
    this.#checkEpoch(draft);
  }

  /** What a draft was compared with must still be staged. */
  #checkEpoch({ epoch }: Draft): void {
    if (epoch !== this.#epoch) throw new StoreError(503, "the journal was cut back; try again");
  }

  /** A line without a timestamp goes with the line before it while that window is open, else by its arrival. */
  #windowOf({ entry, windows }: Draft, found: Window | undefined, previous: Window | undefined): Window {
    const { windowMinutes } = this.options;
    if (found) {
      if (found.endsAt - windowMinutes * 60_000 > entry.at) entry.ahead++;
      entry.zone = found.zone;
      return found;
    }
    entry.untimed++;
    const isOpen = previous && (this.#batches.has(previous.name) || windows.has(previous.name));
    return isOpen ? previous : windowOfArrival(entry.at, windowMinutes);
  }

  #addRun(draft: Draft, window: Window, from: number, to: number, lines: number, piece?: Run["piece"]): void {
    const batch =
      this.#batches.get(window.name) ?? draft.begun.get(window.name) ?? this.#beginBatch(draft, window.name);
    const at =
      draft.lengths.get(batch) ?? this.#lengths.get(batch)?.bytes ?? this.ledger.open.get(batch)?.bytes ?? 0;
    const length = this.options.windowMinutes * 60_000;
    // A window of the future, by a clock that is ahead, has ended so long after its first line came.
    const isFirst = draft.begun.has(window.name);
    const { entry } = draft;
    const endsAt = window.endsAt - length <= entry.at ? window.endsAt : isFirst ? entry.at + length : 0;
    entry.runs.push({ batch, at, from, to, lines, endsAt, ...(piece && { piece }) });
    entry.lines += lines;
    draft.lengths.set(batch, at + (piece?.length ?? 0) + to - from);
  }

  /** A chunk that was begun is taken whole: it is refused at the first new name that is too many, or not at all. */
  #beginBatch(draft: Draft, window: string): string {
    const { maxNamesPerHour } = this.options;
    const { at } = draft.entry;
    if (this.#names.begunAt(at) >= maxNamesPerHour && draft.begun.size === 0)
      throw new StoreError(503, `host ${this.host} has begun ${maxNamesPerHour} batches this hour already`);
    const name = this.#names.next(window, at, this.#lengths.keys(), this.options);
    draft.begun.set(window, name);
    return name;
  }

  /** Keeps the beginning of a line whose end has not come; it is in no batch yet. */
  #holdPiece({ entry }: Draft, from: number, offset: number): void {
    const { state, length } = entry;
    if (state.piece === undefined) {
      const names = new Set([...this.ledger.streams.keys(), ...this.#streams.keys()]);
      const held = [...names].filter((name) => this.stream(name)?.piece !== undefined).length;
      if (held >= MAX_PIECES)
        throw new StoreError(503, `host ${this.host} has ${MAX_PIECES} half lines already`);
      // What rules left out of the body makes this too low at most, never too high.
      state.pieceFrom = offset + from;
    }
    const at = state.piece ?? 0;
    entry.piece = { at, from, to: length };
    state.piece = at + length - from;
  }

  /** Files a line that came in pieces, if its end is here. Gives where the next line begins, -1 when none does. */
  async #fileLongLine(draft: Draft): Promise<number> {
    const { state, stream } = draft.entry;
    const { body } = draft.chunk;
    const end = body.indexOf(LF) + 1;
    if (end === 0) {
      this.#holdPiece(draft, 0, 0);
      return -1;
    }
    await this.#settle(); // the pieces are in their file
    const length = state.piece ?? 0;
    const path = join(this.folder, pieceName(stream, state.pieceFrom));
    const head = Buffer.concat([this.#readHead(path, length), body.subarray(0, Math.min(end, STAMP_WITHIN))]);
    const window = this.#windowOf(draft, this.options.findWindow(head, 0, head.length), windowOf(state));
    this.#addRun(draft, window, 0, end, 1, { length, from: state.pieceFrom ?? 0 });
    Object.assign(state, { window: window.name, windowEnd: window.endsAt });
    delete state.piece;
    delete state.pieceFrom;
    return end;
  }

  #readHead(path: string, length: number): Buffer {
    const { fd } = this.parts.at(path);
    const block = Buffer.alloc(Math.min(length, STAMP_WITHIN));
    return block.subarray(0, readSync(fd, block, 0, block.length, 0));
  }

  /** Makes a draft count for what comes after it, and appends it to the journal. */
  #stage(draft: Draft): Promise<Outcome> {
    this.#checkEpoch(draft);
    if (this.#journal.fault !== undefined) throw storeError(this.#journal.fault);
    const { chunk, entry } = draft;
    const { state, lines } = entry;
    entry.lost = this.ledger.lost;
    entry.unsure = this.ledger.unsure;
    this.#streams.set(entry.stream, state);
    this.#names.count(draft.begun.size);
    for (const [window, name] of draft.begun) this.#batches.set(window, name);
    for (const [name, length] of draft.lengths) {
      this.#lengths.set(name, { bytes: length, entries: (this.#lengths.get(name)?.entries ?? 0) + 1 });
    }
    const written = { done: Promise.resolve() as Promise<unknown> };
    const appended = this.#journal.append(entry, chunk.encoded?.bytes ?? chunk.body, () => {
      written.done = this.#writes = this.#writes.then(() => this.#write(entry, chunk.body));
    });
    const settled = appended.then(
      () => written.done,
      (error) => {
        this.#epoch++;
        this.#isCut = true;
        this.#names.count(-draft.begun.size);
        throw storeError(error);
      },
    );
    this.#appended = settled;
    settled.catch(() => {});
    this.staged++;
    for (const wake of this.#progress.splice(0)) wake();
    return settled.then(() => ({ kind: "stored", lines, offset: state.offset }));
  }

  /** Rule: what was not synced never was: the next chunk is compared with what was synced, once that is written. */
  async #forgetStaged(): Promise<void> {
    await this.#writes;
    this.#isCut = false;
    this.#streams.clear();
    this.#lengths.clear();
    this.#batches.clear();
    this.#appended = Promise.resolve();
    for (const name of this.ledger.open.keys()) this.#batches.set(parseBatchName(name)?.window ?? "", name);
  }

  /** Writes what the journal has, and notes it. A fault is kept: it is written again from the journal. */
  async #write(entry: Entry, body: Uint8Array): Promise<void> {
    failpoint("store:synced");
    try {
      await writeEntry(this, entry, body);
    } catch (error) {
      this.broken ??= error;
    }
    for (const { piece } of entry.runs) {
      if (piece) this.#oldPieces.push(join(this.folder, pieceName(entry.stream, piece.from)));
    }
    noteEntry(this.ledger, entry, this.#journal.id);
    this.isDirty = true;
    if (this.#streams.get(entry.stream) === entry.state) this.#streams.delete(entry.stream);
    for (const name of new Set(entry.runs.map(({ batch }) => batch))) {
      const length = this.#lengths.get(name);
      if (length && --length.entries <= 0) this.#lengths.delete(name);
    }
    failpoint("store:noted");
  }

  /** Waits for everything that was staged: it is in the ledger then. */
  async #settle(): Promise<void> {
    await this.#appended.catch(() => {});
    await this.#writes;
  }

  // ---- what a sender tells, and what it is told

  /**
   * Takes what a sender tells of itself, and the streams that it names. One that was never heard here asks before it ships
   * anything: this one has used names in another folder, or in this one before it was lost.
   */
  hear(news: SenderNews, peer: string, names: string[]): void {
    const now = this.options.now();
    const { facts } = this.ledger;
    if (names.length > 0 && isUnheard(this.ledger) && news.shipper !== undefined) this.#names.doubt(now);
    this.#isHeard = true;
    this.ledger.heardAt = now;
    this.isDirty = true;
    facts.peer = peer;
    facts.forgetAfterDays = this.options.forgetAfterDays;
    delete facts.forgotten;
    if (news.agent !== undefined) facts.agent = news.agent;
    if (news.lag !== undefined) facts.lag = news.lag;
    // In a folder that was lost, it was noted before the sender hears what is missing here.
    const isStale = this.#isNew && names.some((name) => !this.stream(name));
    if (news.through !== undefined && !isStale) {
      facts.through = Math.min(now, Math.max(news.through, facts.through ?? 0));
      for (const streams of [this.ledger.streams, this.#streams])
        for (const stream of streams.values()) delete stream.again; // all that there was is shipped
    }
    if (news.shipper !== undefined) this.#hearShipper(news.shipper, news.lost ?? 0, peer, now);
    else this.ledger.lost += news.lost ?? 0;
  }

  /** Keeps the highest loss of each shipper, and notes two that alternate under one name. */
  #hearShipper(id: string, lost: number, peer: string, now: number): void {
    const { facts } = this.ledger;
    const shippers = facts.shippers ?? [];
    const known = shippers.find((shipper) => shipper.id === id);
    if (known && shippers.at(-1) !== known && now - known.heardAt < ALTERNATE_MS) {
      if ((facts.contestedUntil ?? 0) < now) {
        this.options.log.error("two shippers claim one name", {
          host: this.host,
          peer,
          shipper: id,
          otherPeer: shippers.at(-1)?.peer,
          otherShipper: shippers.at(-1)?.id,
        });
      }
      facts.contestedUntil = now + HOUR;
    }
    this.ledger.lost += Math.max(0, lost - (known?.lost ?? 0));
    const entry = { id, lost: Math.max(lost, known?.lost ?? 0), heardAt: now, peer };
    facts.shippers = [...shippers.filter((shipper) => shipper.id !== id), entry].slice(-MAX_SHIPPERS);
  }

  /** Where streams stand, after everything that is in hand: all of them, or those of the names. */
  async streams(names: string[] | undefined): Promise<StreamStatus[]> {
    await this.settle();
    if (this.broken !== undefined) throw storeError(this.broken);
    this.#isNew = false; // the sender hears now what is here
    const waiting = this.#waiting();
    const told: StreamStatus[] = [];
    for (const name of names ?? this.ledger.streams.keys()) {
      const stream = this.ledger.streams.get(name);
      if (!stream) continue;
      stream.at = this.options.now(); // a question names it, too
      const { offset, head, mark } = stream;
      const delivered = waiting && Math.min(offset, stream.pieceFrom ?? offset, waiting.get(name) ?? offset);
      told.push({ stream: name, offset, head, mark, delivered });
    }
    return told;
  }

  /** The lowest offset of each stream in what is not delivered; undefined while that cannot be told. */
  #waiting(): Map<string, number> | undefined {
    const { dir } = this.options;
    const waiting = new Map<string, number>();
    let isKnown = true;
    const add = (lowest: Record<string, number> | undefined) => {
      if (!lowest) isKnown = false;
      for (const [name, offset] of Object.entries(lowest ?? {}))
        waiting.set(name, Math.min(offset, waiting.get(name) ?? offset));
    };
    for (const batch of this.ledger.open.values()) add(batch.lowest);
    for (const batch of this.ledger.sealed.values()) {
      if (!batch.waits) continue;
      // The forwarder moves it from here to failed/ and back: looked at here once more.
      const places = [this.folder, join(dir, FAILED), this.folder];
      const isThere = (folder: string) =>
        lstatSync(join(folder, batch.name), { throwIfNoEntry: false }) !== undefined;
      if (this.#finishing.has(batch.name) || places.some(isThere)) add(batch.lowest);
      else {
        delete batch.waits;
        delete batch.lowest;
        this.isDirty = true;
      }
    }
    return isKnown ? waiting : undefined;
  }

  // ---- checkpoints and sealing

  /** Saves the ledger, after the parts that it speaks of were synced. Throws the system's error. */
  async checkpoint(): Promise<void> {
    if (this.broken !== undefined) throw this.broken;
    const { ledger, folder } = this;
    const paths = [...this.dirty];
    const old = this.#oldPieces.splice(0);
    const text = formatRecord(snapshot(ledger)); // of this moment: what comes meanwhile is not in the synced parts
    const seq = ledger.journal?.id === this.#journal.id ? ledger.journal.seq : 0;
    this.dirty.clear();
    this.isDirty = false;
    try {
      for (const path of paths) await ifMissing(syncPath(path)); // removed by hand: told at the next line
      if (paths.length > 0) await syncPath(folder);
      failpoint("checkpoint:synced");
      await writeDurably(join(folder, LEDGER), text, 0o660);
    } catch (error) {
      for (const path of paths) this.dirty.add(path);
      this.#oldPieces.push(...old);
      this.isDirty = true;
      this.broken ??= error; // a sync that failed is not to be tried again: the bytes are
      throw error;
    }
    failpoint("checkpoint:written");
    for (const path of old) {
      this.parts.close(path);
      this.dirty.delete(path);
      await removeDurably(path);
    }
    this.safeSeq = Math.max(this.safeSeq, seq);
    this.checkpointAt = this.options.now();
  }

  due(): string[] {
    const { sealAfterSeconds, sealLatestSeconds, maxWindowsPerHost, now: clock } = this.options;
    const now = clock();
    const isNew = !this.#isHeard && Math.abs(now - this.#openedAt) < sealLatestSeconds * 1000;
    if (isNew || this.broken !== undefined) return [...this.#finishing];
    const names: string[] = [];
    for (const [name, batch] of this.ledger.open) {
      if (batch.at > now) batch.at = now; // the clock was set back: wait once more, not until it is there again
      const firstAt = Math.min(batch.firstAt ?? batch.at, now);
      const isQuiet = now >= batch.endsAt && now - batch.at >= sealAfterSeconds * 1000;
      const isLate = now >= Math.max(batch.endsAt, firstAt) + sealLatestSeconds * 1000;
      if (isQuiet || isLate) names.push(name);
    }
    const open = [...this.ledger.open].filter(([name]) => !names.includes(name));
    open.sort(([, a], [, b]) => a.at - b.at);
    const tooMany = open.slice(0, Math.max(0, open.length - maxWindowsPerHost)).map(([name]) => name);
    return [...this.#finishing, ...names, ...tooMany];
  }

  /** Seals batches: from now on they are never written again. One checkpoint uses up all names. Safe to repeat. */
  async seal(names: string[]): Promise<{ name: string; lines: number; bytes: number }[]> {
    const closing = names.filter((name) => this.ledger.open.has(name));
    for (const name of closing) {
      const window = parseBatchName(name)?.window ?? "";
      if (this.#batches.get(window) === name) this.#batches.delete(window); // the next line goes to the next number
      useUpName(this.ledger, name);
    }
    await this.settle();
    if (this.broken !== undefined) throw this.broken;
    for (const name of closing) {
      const batch = this.ledger.open.get(name);
      if (!batch) continue;
      const path = join(this.folder, withState(name, "open"));
      this.parts.close(path);
      await ifMissing(truncate(path, batch.bytes));
      this.dirty.add(path);
      const { bytes, lines, lowest } = batch;
      const at = this.options.now();
      noteSealed(this.ledger, { name, bytes, lines, at, waits: true, ...(lowest && { lowest }) });
      this.ledger.open.delete(name);
      this.#finishing.add(name);
    }
    if (closing.length > 0) await this.checkpoint();
    failpoint("seal:recorded");
    return this.#finish();
  }

  async #finish(): Promise<{ name: string; lines: number; bytes: number }[]> {
    const there = (name: string) => existsSync(join(this.folder, name));
    // What somebody put there under a batch's name keeps that one alone from being sealed.
    const isFree = (name: string) => !there(name) || !there(withState(name, "open"));
    const names = [...this.#finishing].filter(isFree);
    const [taken] = this.#finishing;
    if (names.length === 0 && taken) throw new Error(`Cannot seal "${taken}": a file of that name is there`);
    const moves: { from: string; to: string }[] = [];
    for (const name of names) {
      const part = withState(name, "open");
      if (there(part)) moves.push({ from: join(this.folder, part), to: join(this.folder, name) });
      else if (!there(name)) loseBytes(this, name, this.ledger.sealed.get(name)?.bytes ?? 0);
    }
    await moveAllDurably(moves);
    failpoint("seal:renamed");
    return names.map((name) => {
      this.#finishing.delete(name);
      const { lines = 0, bytes = 0 } = this.ledger.sealed.get(name) ?? {};
      return { name, lines, bytes };
    });
  }

  /** Once a day: what is too old to be asked for is forgotten; names stay unsure. */
  async prune(): Promise<void> {
    const now = this.options.now();
    if (Math.abs(now - this.#prunedAt) < DAY) return;
    this.#prunedAt = now;
    const { ledger, options } = this;
    ledger.facts.forgetAfterDays = options.forgetAfterDays;
    const oldest = now - options.forgetAfterDays * DAY;
    for (const [name, stream] of ledger.streams) {
      if (stream.at >= oldest || this.#streams.has(name)) continue;
      ledger.streams.delete(name);
      if (stream.piece === undefined) continue;
      const file = pieceName(name, stream.pieceFrom);
      loseBytes(this, file, stream.piece);
      this.#oldPieces.push(join(this.folder, file));
    }
    this.#names.forgetBefore(oldest);
    for (const [name, { at, waits }] of ledger.sealed)
      if (!waits && at < now - SEALED_MS) ledger.sealed.delete(name);
    this.#waiting();
    this.isDirty = true;
  }

  /** Forgets all streams and names of a host that is gone. Gives the reason when it is not. */
  async forget(): Promise<string | undefined> {
    await this.settle();
    this.#waiting();
    const waits = [...this.ledger.sealed.values()].some((batch) => batch.waits);
    if (waits || this.ledger.open.size > 0) return "batches of it wait";
    if (this.options.now() - this.ledger.heardAt < HOUR) return "it was heard in the last hour";
    this.#names.doubt(Math.min(this.options.now(), this.ledger.heardAt));
    this.ledger.streams.clear();
    this.ledger.used.clear();
    this.ledger.sealed.clear();
    this.ledger.facts = { forgotten: this.options.now() };
    await this.checkpoint();
    return undefined;
  }

  settle(): Promise<void> {
    return this.turn(() => this.#settle());
  }

  /** Lets the folder go when all of it is on disk and the journal does not name the host: true then. */
  leave(): Promise<boolean> {
    return this.turn(async () => {
      await this.#settle();
      if (this.broken !== undefined || this.isDirty || this.#journal.names(this.host)) return false;
      this.#end();
      return true;
    });
  }

  /** Saves the ledger and lets the folder go. Throws when that failed; the folder is let go all the same. */
  close(): Promise<void> {
    return this.turn(async () => {
      try {
        await this.#settle();
        if (this.isDirty) await this.checkpoint();
      } finally {
        this.#end();
      }
    });
  }

  /** What comes after it is refused: the folder may be another process's by then. */
  #end(): void {
    for (const name of this.ledger.open.keys()) this.parts.close(join(this.folder, withState(name, "open")));
    this.broken ??= new StoreError(503, "the receiver does not serve this host any more");
    this.#lock.release();
  }
}

function compare(
  { offset, end, mark, from, begin }: Chunk,
  known: StreamRecord | undefined,
): "take" | "ahead" | "conflict" | "unknown" | "alive" {
  if (offset === undefined) return "take";
  // Version 1.0 has no marks: its unknown streams are begun at whatever offset it says, an empty chunk is a sign of life.
  if (!known && begin === undefined && mark === undefined) return end === offset ? "alive" : "take";
  if (!known) return begin !== undefined ? "take" : "unknown";
  // 1.0 has one chunk on its way: one of it that is ahead has nothing before it.
  if (offset > known.offset)
    return mark !== undefined && begin === undefined && end !== offset ? "ahead" : "conflict";
  if (offset < known.offset) return "conflict";
  const isOther = mark !== undefined && known.mark !== undefined && offset > 0 && from !== known.mark;
  return isOther ? "conflict" : "take";
}

function windowOf({ window, windowEnd = 0 }: StreamRecord): Window | undefined {
  return window === undefined ? undefined : { name: window, endsAt: windowEnd, zone: 0 };
}

function isUnheard({ facts, streams, used }: Ledger): boolean {
  return facts.shippers === undefined && streams.size === 0 && used.size === 0;
}
