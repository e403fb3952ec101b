/**
 * The streams: a stream is one log file from its first byte to its last, whatever it is called meanwhile. It is `reading`, or
 * `ended` (a rotated file that was read to its end and was quiet since), or `gone`. Here is what becomes of one; which file it is
 * in says a look (lib/tail/look.ts). What is on stable storage of them is the cursor.
 */
import { basename } from "node:path";
import type { StreamStatus } from "../chunk.ts";
import type { Config } from "../config.ts";
import type { FaultLog, Log } from "../service.ts";
import {
  type Cursor,
  type CursorFound,
  closeFile,
  drawName,
  isAtEnd,
  lostOf,
  type Phase,
  readCursor,
  Saves,
  type Stream,
  type StreamState,
  toState,
  withFile,
  writeCursor,
} from "./cursor.ts";
import {
  type Beginning,
  bornAt,
  compressionOf,
  contentStart,
  holds,
  type LogFile,
  readHead,
} from "./file.ts";
import { fitOf, type Identity, isTaken } from "./identify.ts";
import { OpenFiles } from "./open.ts";
import { type FoundFile, Paths, type Survey } from "./paths.ts";
import { SoughtStreams } from "./sought.ts";

/** A stream whose file is gone is kept for so long (ms), as its file may come again in another form; longer while one that was there then waits to be known. */
export const FORGET_AFTER_MS = { usual: 10_000, waiting: 60_000 };
/** The same while the receiver does not say that all of it is delivered. */
const FORGET_AFTER_ALL_MS = 7 * 24 * 3_600_000;
/** In front of the key of a stream whose file holds other bytes now: no file has it, and streams of one file still share it. */
const CUT = "cut ";
/** A file that was moved out of sight is read on for so long (ms) after its last line. */
const MOVED_MS = 600_000;

/** One followed log: the files under a live path and its rotations, shipped one after the other. */
export interface FollowedLog {
  path: string;
  /** Key of its folder: while another one lies in its place, a file is away and not gone. */
  folder: string | undefined;
  /** That folder lies in another one's place, and what its files are is not settled: they may have been copied there. */
  isElsewhere: boolean;
  /** Until then the live file waits for rotated ones that are not settled; 0 before the first look. */
  heldUntil: number;
  isHeld: boolean;
  isRunning: boolean;
}

export type Settled = Exclude<Identity, { is: "small" | "busy" }>;

export type TailConfig = Pick<
  Config["shipper"],
  "files" | "olddir" | "stateDir" | "startAt" | "rotateWaitSeconds" | "pollSeconds"
>;

export interface TailContext {
  log: Log;
  faults: FaultLog;
  /** The wall clock, and one that nobody sets. */
  now: () => number;
  mono: () => number;
}

export class Streams {
  readonly logs = new Map<string, FollowedLog>();
  paths: Paths;
  list: Stream[] = [];
  /** Those of the list without a file, for so long that it does not come back. */
  orphans: Stream[] = [];
  #left: Stream[] = [];
  #byLog: Map<string, Stream[]> | undefined;
  lost = 0;
  lostIn: string | undefined;
  shipper = drawName();
  told: StreamStatus[] = [];
  asked = false;
  found: CursorFound["state"] = "absent";
  /** The set of streams has changed since the last save, or only offsets. */
  isChanged = false;
  isMoved = false;
  /** When everything was looked at last, on the wall clock, and whether it was settled. */
  seenAt = 0;
  isSettled = false;
  config: TailConfig;
  readonly context: TailContext;
  /** Times up to which rotated files of a log are not ours, by its live path; undefined when all are. */
  since = new Map<string, number>();
  readonly sought = new SoughtStreams();
  /** Keys of files that were cut and written anew. */
  cut = new Set<string>();
  readonly files: OpenFiles;
  readonly #saves = new Saves();

  constructor(config: TailConfig, context: TailContext) {
    this.config = config;
    this.context = context;
    this.paths = new Paths(config.files, config.olddir, config.stateDir);
    this.files = new OpenFiles(context.faults);
  }

  async open(): Promise<void> {
    const { stateDir } = this.config;
    const { log, mono } = this.context;
    const found = await readCursor(stateDir).catch((error): CursorFound => {
      if (!(error as NodeJS.ErrnoException).code) throw error;
      return { state: "damaged" };
    });
    this.found = found.state;
    if (found.state === "damaged" || found.state === "older") {
      const other = "the receiver is asked where each file stands";
      const instead = found.state === "older" ? "the one before it is taken" : other;
      log.warn("cursor is damaged", { stateDir, instead });
    }
    if (!("cursor" in found)) return;
    const { lost, shipper, asked, streams, left, folders, files } = found.cursor;
    Object.assign(this, { lost, shipper, asked });
    this.since = found.since ?? new Map();
    this.list = streams.map((state) => withFile(state, mono()));
    this.#left = left.map((state) => withFile(state, mono()));
    for (const each of this.list)
      if (each.phase.is === "gone" && each.size > each.offset) this.sought.add(each);
    for (const [path, folder] of Object.entries(folders)) this.logOf(path).folder = folder;
    if (!found.since) this.#startAdded(files);
  }

  /** Another config while running: what it names for the first time is looked for, what it does not name is left. */
  reconfigure(config: TailConfig): void {
    const { files } = this.config;
    this.config = config;
    this.paths = new Paths(config.files, config.olddir, config.stateDir);
    this.#startAdded(files);
    this.isChanged = true;
  }

  /** What is named for the first time starts as at the very first start: its old rotations are not ours. What is named again goes on. */
  #startAdded(before: string[]): void {
    const { files, olddir, stateDir } = this.config;
    this.list.push(...this.#left.filter(({ log }) => this.paths.names(log)));
    this.#left = this.#left.filter(({ log }) => !this.paths.names(log));
    this.#byLog = undefined;
    const known = new Set(new Paths(before, olddir, stateDir).livePaths());
    const added = files.filter((pattern) => !before.includes(pattern));
    for (const path of new Paths(added, olddir, stateDir).livePaths()) {
      const isNew = !known.has(path) && !this.logs.has(path) && this.ofLog(path).length === 0;
      if (isNew) this.since.set(path, this.context.now());
    }
  }

  ofLog(path: string): Stream[] {
    this.#byLog ??= Map.groupBy(this.list, ({ log }) => log);
    return this.#byLog.get(path) ?? [];
  }

  /** The streams' logs have changed. */
  regroup(): void {
    this.#byLog = undefined;
  }

  logOf(path: string): FollowedLog {
    const known = this.logs.get(path);
    if (known) return known;
    const flags = { isElsewhere: false, isHeld: false, isRunning: false };
    const log = { path, folder: undefined, heldUntil: 0, ...flags };
    this.logs.set(path, log);
    return log;
  }

  // ---- where a file changes

  /** Of a file whose bytes may be others now: false when no stream goes on in it, and the next look says what it is. */
  async rebase(stream: Stream, file: LogFile, size: number): Promise<boolean> {
    const fit = await fitOf(file, stream);
    const seen = stream.size; // an event may have told of more than the look listed: the file is asked once more
    const left = size < seen ? (await file.stat()).size : size;
    const isKnown = stream.head !== undefined || stream.offset > 0 || left >= seen; // else nothing tells
    if (fit.is === "all" && size >= stream.offset && isKnown) {
      if (lostOf(stream, seen - left) > 0) this.#awaitCopy(stream, left);
      stream.size = left;
      stream.checkedSize = Math.min(left, size); // what was compared; the file may have been cut since
      return true;
    }
    const { path, id, offset, key } = stream;
    this.context.log.info("file was cut and written anew", { path, stream: id, offset });
    this.cut.add(key);
    await this.leaveFile(stream, Math.max(offset, stream.checkedSize));
    return false;
  }

  /** The stream, and the parts of its file that others were, have none now: the next look says what that is. */
  async leaveFile(stream: Stream, size: number): Promise<void> {
    const { key, path } = stream;
    if (isTaken(stream, stream)) this.paths.unlearn(path); // by its name it is no rotation
    await closeFile(stream);
    for (const other of this.list) if (other.key === key) other.key = `${CUT}${key}`;
    Object.assign(stream, { size, isLive: false });
    this.enter(stream, { is: "gone" });
  }

  /** What is cut off behind what was read may be in a copy, when the file is written anew and begins alike: a stream of its own. */
  #awaitCopy(stream: Stream, left: number): void {
    const { offset, key, size, blank, isCut } = stream;
    const waiting = this.#beginBehind(stream, offset, `${CUT}${key}`, size, true);
    Object.assign(waiting, { cutTo: left, blank, isCut, isLive: false });
    this.enter(waiting, { is: "gone" });
  }

  /** A new stream in the same file, behind the newest mark that it still holds. */
  #goOnBehind(stream: Stream, at: number, key: string, size: number): Stream {
    const { path, offset, id } = stream;
    const fields = { path, stream: id, shipped: offset, from: at, again: offset - at };
    this.context.log.warn("file has other bytes behind what it kept: a new stream begins there", fields);
    const next = this.#beginBehind(stream, at, key, size);
    stream.key = key;
    stream.until = Math.min(at, stream.until ?? at);
    stream.size = stream.offset;
    stream.isLive = false;
    this.enter(stream, { is: "ended", size });
    return next;
  }

  #beginBehind(stream: Stream, at: number, key: string, size: number, isQuiet = false): Stream {
    const { path, log, isLive, mtimeMs, head, marks } = stream;
    const next = this.begin({ path, key, size, mtimeMs, log, isLive, isReadable: true }, at, isQuiet);
    return Object.assign(next, { head, marks: marks.filter(({ end }) => end <= at) });
  }

  /** A new stream in the same file from `at` on: the receiver has other bytes under the old one's name. */
  succeed(stream: Stream, at: number): void {
    this.#goOnBehind(stream, at, stream.key, stream.size).conflicts = stream.conflicts;
  }

  reopen(stream: Stream): void {
    if (stream.phase.is === "ended") this.enter(stream, { is: "reading" });
    stream.endedAs = "";
    this.isChanged = true;
  }

  // ---- what a file is

  noteBeginning(stream: Stream, { head, first, mark }: Beginning): void {
    stream.head = head;
    if (!this.asked) stream.first = first;
    if (mark) stream.marks = [mark];
  }

  settle(found: FoundFile, what: Settled): Stream | undefined {
    const { log } = this.context;
    this.isChanged = true;
    if (what.is === "new") return this.begin(found, what.at);
    const { stream } = what;
    const fields = { path: found.path, stream: stream.id };
    if (what.is === "copy") {
      log.info("file is a copy of a known one", fields);
      stream.copies.push({ key: found.key, size: found.size, mtimeMs: found.mtimeMs });
      return undefined;
    }
    const { path, key, mtimeMs, isLive, log: own } = found;
    for (const other of this.list) {
      if (other.until !== undefined && other.key === stream.key)
        Object.assign(other, { path, key, log: own });
    }
    if (what.is === "behind") {
      this.giveUp(stream);
      Object.assign(stream, { path, isLive, log: own });
      this.#goOnBehind(stream, what.at, key, found.size);
      return undefined;
    }
    log.info("file is a copy of a known one", fields);
    void closeFile(stream);
    Object.assign(stream, { path, key, mtimeMs, isLive, log: own, endedAs: "", cutTo: undefined });
    stream.grewAt = Number.NEGATIVE_INFINITY;
    if (!compressionOf(path)) stream.size = stream.checkedSize = Math.max(stream.offset, found.size);
    this.#byLog = undefined;
    this.enter(stream, what.isDone ? { is: "ended", size: found.size } : { is: "reading" });
    return undefined;
  }

  begin(found: Omit<FoundFile, "dev">, offset: number, isQuiet = false): Stream {
    const { path, key, size, mtimeMs, log, isLive } = found;
    const state = { from: offset, offset, log, path, key, copies: [], marks: [], mtimeMs };
    const seen = compressionOf(path) ? offset : size;
    const stream = withFile({ ...state, phase: { is: "reading" }, size: seen }, this.context.mono(), isLive);
    if (this.cut.delete(key)) stream.isCut = true;
    this.list.push(stream);
    this.#byLog = undefined;
    this.isChanged = true;
    if (!isQuiet) this.context.log.info("following", { path, offset, bytes: stream.size - offset });
    return stream;
  }

  async readHead(stream: Stream): Promise<void> {
    const file = await this.files.open(stream).catch(() => undefined); // told of when it is to be read
    if (!file) return;
    const start = stream.head ? stream.head.end - stream.head.length : await contentStart(file, stream.isCut);
    const { head, first } = await readHead(file, start);
    if (!head || head.length <= (stream.head?.length ?? 0)) return;
    const isSame = stream.head
      ? await holds(file, stream.head)
      : file.compression !== undefined || (await file.stat()).size >= stream.size; // else it was cut since it was seen
    if (isSame) this.noteBeginning(stream, { head, first });
    this.isChanged = true;
    await this.files.closeSome(); // any number may have grown since the last look
  }

  // ---- what is gone

  giveUp(stream: Stream): void {
    this.lose(stream.size - Math.max(stream.offset, stream.cutTo ?? 0), stream);
    stream.size = stream.offset;
    this.isChanged = true;
  }

  /** Counts bytes that can't be read any more, the last ones of what was seen. */
  lose(gone: number, stream: Pick<Stream, "path" | "size"> & Partial<Stream>): void {
    const bytes = lostOf(stream, gone);
    if (bytes <= 0) return;
    this.lost += bytes;
    this.lostIn = basename(stream.path);
    this.isMoved = true;
    const fields = { path: stream.path, stream: stream.id, bytes };
    this.context.log.error("bytes lost: they were gone before they could be read", fields);
  }

  /** Drops what can't come again: delivered and gone; and logs that the config does not name any more. */
  async prune(survey: Survey, waiting: FoundFile[]): Promise<void> {
    const time = this.context.mono();
    const { usual, waiting: most } = FORGET_AFTER_MS;
    const ages = waiting.map(({ key }) => this.context.now() - bornAt(key));
    const keepMs = Math.min(most, usual + Math.max(0, ...ages)) + this.config.rotateWaitSeconds * 1000;
    const there = new Set(survey.files.map(({ key }) => key));
    const kept: Stream[] = [];
    for (const stream of this.list) {
      const isCopied = stream.copies.some(({ key }) => there.has(key)); // nobody else knows that it is shipped
      const { phase, phaseAt, offset, size, id, delivered = -1, until = offset, isBusy, file } = stream;
      const isGone = phase.is === "gone" && !file && size <= offset && time - phaseAt >= keepMs;
      const isOld = isGone && id !== undefined && time - phaseAt >= FORGET_AFTER_ALL_MS;
      const isAll = id === undefined || offset <= stream.from || delivered >= Math.min(until, offset);
      const isOver = !isCopied && (isOld || ((isGone || stream.until !== undefined) && isAll));
      const isOut = stream.log !== "" && !survey.logs.has(stream.log) && !this.paths.names(stream.log);
      if (isOut && !isBusy) {
        const bytes = Math.max(0, size - offset);
        this.context.log.warn("log is not followed any more", { path: stream.path, unread: bytes });
      }
      if ((!isOver && !isOut) || isBusy) kept.push(stream);
      else {
        this.isChanged = true;
        if (!isOver && phase.is !== "gone") this.#left.push(stream);
        await closeFile(stream);
      }
    }
    this.list = kept;
    this.#byLog = undefined;
    for (const path of this.logs.keys()) {
      const isOut = !survey.logs.has(path) && kept.every(({ log }) => log !== path);
      if (isOut && !this.logs.get(path)?.isRunning) this.logs.delete(path);
    }
    await this.files.closeSome();
  }

  // ---- the end of a file

  /** A rotated file at whose end we are: ended when it was quiet for long enough. */
  async finish(stream: Stream): Promise<void> {
    const { file } = stream;
    if (!file || stream.isLive || !isAtEnd(stream)) return; // what an archive still has is not lost
    const { size, mtimeMs } = await file.stat();
    const age = Math.min(this.context.mono() - stream.grewAt, Math.abs(this.context.now() - mtimeMs));
    const isMoved = stream.phase.is === "gone" && !file.isUnlinked;
    const isQuiet = file.compression
      ? !file.fault || file.isUnlinked
      : age >= (isMoved ? MOVED_MS : this.config.rotateWaitSeconds * 1000);
    if (!isQuiet || (!file.compression && size > stream.size)) return;
    await closeFile(stream);
    if (file.compression && stream.size > stream.offset) this.giveUp(stream); // nobody ends a line in an archive
    this.context.log.info("file is done", { path: stream.path, stream: stream.id, bytes: stream.offset });
    stream.marks = stream.marks.slice(-4);
    if (stream.phase.is !== "gone") this.enter(stream, { is: "ended", size });
  }

  enter(stream: Stream, phase: Phase): void {
    if (stream.phase.is === "gone" && phase.is === "gone") return;
    if (stream.phase.is === "reading" && phase.is === "gone") this.sought.add(stream);
    stream.phase = phase;
    stream.phaseAt = this.context.mono();
    if (phase.is === "reading") stream.endedAs = "";
    this.isChanged = true;
  }

  // ---- the receiver's answer

  /** Takes up what the receiver knows of this host when there is no cursor, beside those of the list that stay. */
  adopt(known: StreamState[], kept: Stream[]): void {
    this.list = [...kept, ...known.map((state) => withFile(state, this.context.mono()))];
    for (const stream of this.list) this.sought.add(stream);
    this.since.clear();
    this.#byLog = undefined;
  }

  // ---- the cursor

  /** Saves the cursor, one save after the other; those who ask meanwhile share the next one. Throws the system's error. */
  save(): Promise<void> {
    return this.#saves.run(() => this.#saveNow());
  }

  async #saveNow(): Promise<void> {
    if (this.found === "damaged" && !this.asked) return; // a restart is to know it, too
    const keep = this.isChanged;
    this.isChanged = this.isMoved = false;
    const folders: Cursor["folders"] = {};
    for (const { path, folder } of this.logs.values()) if (folder !== undefined) folders[path] = folder;
    const { shipper, lost, asked } = this;
    const streams = this.list.map(toState);
    const left = this.#left.map(toState);
    const named = this.list.filter(({ isNamed, id }) => !isNamed && id !== undefined);
    try {
      await writeCursor(
        this.config.stateDir,
        { version: 2, shipper, lost, asked, files: this.config.files, folders, streams, left },
        keep,
      );
      for (const stream of named) stream.isNamed = true;
    } catch (error) {
      this.isMoved = true;
      this.isChanged ||= keep;
      throw error;
    }
  }
}
