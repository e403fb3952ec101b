/**
 * The streams: a stream is one log file from its first byte to its last, whatever it is called meanwhile. A look says which
 * file is which:
 *
 *   a file of a known inode, as long as its bytes still fit   → that stream, whatever its name
 *   any other                                                 → what its bytes say (lib/tail/identify.ts)
 *   a stream without a file                                   → what was not read of it is lost, and told in bytes
 *
 * A stream is `reading`, or `ended` (a rotated file that was read to its end and was quiet since), or `gone`. Files that
 * somebody else still writes (copied, compressed) are left for the next look.
 */
import { basename } from "node:path";
import { MARK_BYTES, type StreamStatus } from "../chunk.ts";
import type { Config } from "../config.ts";
import { errorMessage, type FaultLog, type Log } from "../service.ts";
import {
  type Cursor,
  type CursorFound,
  closeFile,
  drawName,
  hasHome,
  holding,
  isAtEnd,
  lostOf,
  type Phase,
  placeOf,
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
  endOfLines,
  holds,
  type LogFile,
  readBeginning,
  readHead,
  UnfinishedFile,
} from "./file.ts";
import { type HeldFiles, holdFiles } from "./held.ts";
import { fitOf, type Identity, identify, isTaken, placeHead } from "./identify.ts";
import { OpenFiles } from "./open.ts";
import { asSeen, type FoundFile, isArchiveOf, Paths, type Survey } from "./paths.ts";
import { lookInto, SoughtStreams } from "./sought.ts";

/** An archive without an end that was not written to for so long (ms) is damaged, not unfinished. */
const UNFINISHED_MS = 60_000;
/** A small file that begins like another one is shipped as a log of its own after so long (ms). */
const SMALL_MS = 60_000;
/** A stream whose file is gone is kept for so long (ms), as its file may come again in another form; longer while one that was there then waits to be known. */
const FORGET_AFTER_MS = { usual: 10_000, waiting: 60_000 };
/** The same while the receiver does not say that all of it is delivered. */
const FORGET_AFTER_ALL_MS = 7 * 24 * 3_600_000;
/** So many listings are made while names are being shifted, and the next ones after so long (ms). */
const LISTINGS = 8;
const SHIFTING_MS = 50;
/** In front of the key of a stream whose file holds other bytes now: no file has it, and streams of one file still share it. */
const CUT = "cut ";
/** A file that was moved out of sight is read on for so long (ms) after its last line. */
const MOVED_MS = 600_000;
/** At the first sight of a log, a rotated file that was written within this time (ms) may still get lines. */
const STILL_WRITTEN_MS = 60_000;

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

export interface Look {
  /** No file is in the middle of being copied, compressed or renamed, and none is missing for a moment only. */
  isSettled: boolean;
  nextAt: number;
}

type Settled = Exclude<Identity, { is: "small" | "busy" }>;

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
  #config: TailConfig;
  readonly context: TailContext;
  #lastFaults = new Map<string, string>();
  /** Times up to which rotated files of a log are not ours, by its live path; undefined when all are. */
  #since = new Map<string, number>();
  /** Unknown files as they are, with when they were first seen so; those that are not ours for ever. */
  #unknown = new Map<string, number>();
  #ignored = new Set<string>();
  #leftOut = new Set<string>();
  readonly #sought = new SoughtStreams();
  readonly held: HeldFiles = new Map();
  /** Keys of files that were cut and written anew. */
  #cut = new Set<string>();
  readonly files: OpenFiles;
  readonly #saves = new Saves();

  constructor(config: TailConfig, context: TailContext) {
    this.#config = config;
    this.context = context;
    this.paths = new Paths(config.files, config.olddir);
    this.files = new OpenFiles(context.faults);
  }

  async open(): Promise<void> {
    const { stateDir } = this.#config;
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
    this.#since = found.since ?? new Map();
    this.list = streams.map((state) => withFile(state, mono()));
    this.#left = left.map((state) => withFile(state, mono()));
    for (const each of this.list)
      if (each.phase.is === "gone" && each.size > each.offset) this.#sought.add(each);
    for (const [path, folder] of Object.entries(folders)) this.#logOf(path).folder = folder;
    if (!found.since) this.#startAdded(files);
  }

  /** Another config while running: what it names for the first time is looked for, what it does not name is left. */
  reconfigure(config: TailConfig): void {
    const { files } = this.#config;
    this.#config = config;
    this.paths = new Paths(config.files, config.olddir);
    this.#startAdded(files);
    this.isChanged = true;
  }

  /** What is named for the first time starts as at the very first start: its old rotations are not ours. What is named again goes on. */
  #startAdded(before: string[]): void {
    const { files, olddir } = this.#config;
    this.list.push(...this.#left.filter(({ log }) => this.paths.names(log)));
    this.#left = this.#left.filter(({ log }) => !this.paths.names(log));
    this.#byLog = undefined;
    const known = new Set(new Paths(before, olddir).livePaths());
    const added = files.filter((pattern) => !before.includes(pattern));
    for (const path of new Paths(added, olddir).livePaths()) {
      const isNew = !known.has(path) && !this.logs.has(path) && this.ofLog(path).length === 0;
      if (isNew) this.#since.set(path, this.context.now());
    }
  }

  ofLog(path: string): Stream[] {
    this.#byLog ??= Map.groupBy(this.list, ({ log }) => log);
    return this.#byLog.get(path) ?? [];
  }

  #logOf(path: string): FollowedLog {
    const known = this.logs.get(path);
    if (known) return known;
    const flags = { isElsewhere: false, isHeld: false, isRunning: false };
    const log = { path, folder: undefined, heldUntil: 0, ...flags };
    this.logs.set(path, log);
    return log;
  }

  // ---- the look

  async look(): Promise<Look> {
    const { mono, now } = this.context;
    const started = now();
    const survey = await this.#survey();
    this.orphans = [];
    if (!survey) return { isSettled: false, nextAt: mono() + SHIFTING_MS };
    const there = new Set(survey.files.flatMap(({ isLive, log }) => (isLive ? log : [])));
    for (const [path, folder] of survey.logs) {
      const log = this.#logOf(path);
      if (!there.has(path)) continue;
      log.isElsewhere ||= log.folder !== undefined && log.folder !== folder;
      log.folder = folder;
    }
    if (this.found === "absent" && !this.asked && this.seenAt === 0) {
      this.#since = new Map([...survey.logs.keys()].map((path) => [path, now()]));
      this.isChanged = true; // what comes from now on is new, also after a restart
    }

    const unknown = await this.#locate(survey);
    this.#byLog = undefined;
    const waiting = await this.#identifyAll(unknown, survey);
    await holdFiles(this.held, waiting, survey.files, (found, file) =>
      this.#takeVanished(survey, found, file),
    );
    if (waiting.length === 0 && (await this.#findUnderOtherNames(survey))) return this.look();
    this.#reportFaults(survey);
    this.orphans = this.#findOrphans(survey, waiting);
    const isMissing = this.list.some(({ phase, offset, size }) => phase.is === "gone" && size > offset);
    this.#holdLive(new Set(waiting.map(({ log }) => log)));
    await this.#prune(survey, waiting);
    const finishAt = await this.#finishQuiet();
    for (const path of survey.logs.keys()) this.#since.delete(path);
    this.isSettled = waiting.length === 0 && !isMissing && survey.faults.size === 0;
    this.seenAt = started;
    const isSoon = waiting.length > 0 || isMissing;
    const wait = Math.min(this.#config.pollSeconds * 1000, isSoon ? 1000 : Number.POSITIVE_INFINITY);
    return { isSettled: !isSoon, nextAt: Math.min(mono() + wait, finishAt) };
  }

  /**
   * A rotation that shifts names while they are listed can hide a file: when one is new or missing, only two listings that
   * agree are believed. Undefined when none of them do.
   */
  async #survey(): Promise<Survey | undefined> {
    const live = [...new Set(this.list.map(({ log }) => log))].filter((path) => this.paths.names(path));
    let before = "";
    for (let n = 0; n < LISTINGS; n++) {
      const survey = this.paths.survey(live);
      const shapes = this.paths.shapes.size;
      const keys = new Set(survey.files.map(({ key }) => key));
      const missing = this.list.filter(({ key, phase, size, offset }) => {
        return key !== "" && !keys.has(key) && (phase.is !== "gone" || size > offset);
      });
      for (const file of this.paths.seek(missing)) {
        if (!keys.has(file.key)) survey.files.unshift(file);
        keys.add(file.key);
      }
      if (this.paths.shapes.size > shapes) continue; // it may have more to look at now
      const isComplete = missing.every(({ key }) => keys.has(key));
      for (const { key, copies } of this.list) {
        keys.delete(key);
        for (const copy of copies) keys.delete(copy.key);
      }
      if (isComplete && keys.size === 0) return survey;
      const listing = JSON.stringify(survey.files.map(({ path, key }) => `${path} ${key}`).sort());
      if (listing === before) return survey;
      before = listing;
    }
    return undefined;
  }

  #reportFaults({ faults, logs, leftOut }: Survey): void {
    const { log } = this.context;
    for (const [path, error] of faults) {
      const message = logs.has(path) ? "cannot follow log file" : "cannot look for log file";
      this.context.faults.failed(`look ${path}`, message, { path, error });
    }
    for (const path of this.#lastFaults.keys())
      if (!faults.has(path))
        this.context.faults.recovered(`look ${path}`, "log file can be looked at again", { path });
    this.#lastFaults = faults;
    for (const { path, key, size: bytes } of leftOut) {
      if (this.#leftOut.has(path) || this.list.some((stream) => stream.key === key)) continue;
      this.#leftOut.add(path);
      log.info("file is no rotation of a log by its name: not followed", { path, bytes });
    }
  }

  /** Finds the streams' files by their keys; notes their sizes. Gives the files that are nobody's. */
  async #locate(survey: Survey): Promise<FoundFile[]> {
    const owners = new Map<string, Stream>();
    const copies = new Map<string, Stream>();
    for (const stream of this.list) {
      if (stream.key !== "" && (stream.until === undefined || !owners.has(stream.key)))
        owners.set(stream.key, stream);
      for (const { key } of stream.copies) copies.set(key, stream);
    }
    const located = new Set<string>();
    const unknown: FoundFile[] = [];
    const live = new Set(survey.files.flatMap(({ key, isLive }) => (isLive ? key : [])));
    for (const stream of this.list) stream.isLive &&= live.has(stream.key); // others ship meanwhile
    for (const file of survey.files) {
      const owner = owners.get(file.key);
      if (owner) {
        located.add(file.key);
        if (!(await this.#isStill(owner, file)) && !isTaken(owner, file)) unknown.push(file);
      } else if (!copies.has(file.key)) unknown.push(file);
    }
    for (const file of survey.files) {
      const stream = copies.get(file.key);
      if (!stream || owners.has(file.key)) continue;
      const copy = stream.copies.find(({ key }) => key === file.key);
      if (copy?.size === -1) copy.size = file.size;
      const isPart = !compressionOf(file.path) && file.size < stream.offset; // all of it is shipped
      if (copy?.size === file.size && (isPart || located.has(stream.key))) continue;
      stream.copies = stream.copies.filter(({ key }) => key !== file.key);
      unknown.push(file); // it has grown, or it may be where its log goes on: what is it now?
    }
    for (const stream of this.list) {
      const owner = stream.until === undefined ? undefined : owners.get(stream.key);
      if (owner) Object.assign(stream, { path: owner.path, log: owner.log });
      if (located.has(stream.key) || (stream.phase.is === "gone" && !stream.file)) continue;
      const { file, isBusy } = stream;
      if (file && !isBusy) await holding(stream, () => this.#lookAtOpen(stream, file));
      if (!this.#isAway(stream, survey)) this.#enter(stream, { is: "gone" });
    }
    return unknown;
  }

  async #lookAtOpen(stream: Stream, file: LogFile): Promise<void> {
    const { size, mtimeMs } = await file.stat();
    const own = file.compression ? 0 : Math.min(size, stream.until ?? size); // an archive's is another
    Object.assign(stream, { size: Math.max(own, stream.size), mtimeMs });
    if ((stream.head?.length ?? 0) < MARK_BYTES) await this.#readHead(stream);
  }

  /** Takes note of a stream's file; false when it holds other bytes now. */
  async #isStill(stream: Stream, file: FoundFile): Promise<boolean> {
    const isNew =
      stream.phase.is === "gone" || (stream.phase.is === "ended" && stream.phase.size !== file.size);
    if (stream.path !== file.path) stream.endedAs = ""; // no more room is to be filled in a rotated file
    stream.isLive = file.isLive;
    stream.path = file.path;
    stream.log = file.log;
    const isPacked = compressionOf(file.path) !== undefined;
    if (stream.phase.is === "ended" && stream.phase.size === -1)
      stream.phase = { is: "ended", size: file.size };
    else if (isNew && stream.until === undefined) this.#enter(stream, { is: "reading" });
    if (stream.isBusy) return true;
    const isOther = !isPacked && (file.size < stream.size || file.size > stream.checkedSize);
    if (isOther && !(await holding(stream, () => this.#checkFile(stream, file)))) return false;
    if (!isPacked) {
      if (file.size !== stream.size) {
        stream.grewAt = this.context.mono();
        this.isMoved = true; // what was seen is kept: when it vanishes, that is told to the byte
      }
      stream.size = file.size;
    }
    stream.mtimeMs = file.mtimeMs;
    const isHeadShort = (stream.head?.length ?? 0) < MARK_BYTES && file.size > (stream.head?.end ?? 0);
    if (!isPacked && isHeadShort) await holding(stream, () => this.#readHead(stream));
    return true;
  }

  async #checkFile(stream: Stream, found: FoundFile): Promise<boolean> {
    const file = await this.files.look(found.path);
    if (!file) return true;
    try {
      if (file.key !== stream.key) return true;
      return await this.rebase(stream, file, found.size);
    } finally {
      await file.close();
    }
  }

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
    this.#cut.add(key);
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
    this.#enter(stream, { is: "gone" });
  }

  /** What is cut off behind what was read may be in a copy, when the file is written anew and begins alike: a stream of its own. */
  #awaitCopy(stream: Stream, left: number): void {
    const { offset, key, size, blank, isCut } = stream;
    const waiting = this.#beginBehind(stream, offset, `${CUT}${key}`, size, true);
    Object.assign(waiting, { cutTo: left, blank, isCut, isLive: false });
    this.#enter(waiting, { is: "gone" });
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
    this.#enter(stream, { is: "ended", size });
    return next;
  }

  #beginBehind(stream: Stream, at: number, key: string, size: number, isQuiet = false): Stream {
    const { path, log, isLive, mtimeMs, head, marks } = stream;
    const next = this.#begin({ path, key, size, mtimeMs, log, isLive, isReadable: true }, at, isQuiet);
    return Object.assign(next, { head, marks: marks.filter(({ end }) => end <= at) });
  }

  /** A new stream in the same file from `at` on: the receiver has other bytes under the old one's name. */
  succeed(stream: Stream, at: number): void {
    this.#goOnBehind(stream, at, stream.key, stream.size).conflicts = stream.conflicts;
  }

  reopen(stream: Stream): void {
    if (stream.phase.is === "ended") this.#enter(stream, { is: "reading" });
    stream.endedAs = "";
    this.isChanged = true;
  }

  // ---- which file is which

  /** Says what unknown files are. Gives those of which that can't be told yet. */
  async #identifyAll(unknown: FoundFile[], survey: Survey): Promise<FoundFile[]> {
    const waiting: FoundFile[] = [];
    if (unknown.length === 0) return waiting;
    const files = new Map(survey.files.map((file) => [file.key, file]));
    for (const stream of this.list) {
      const found = stream.phase.is === "reading" && !stream.isBusy ? files.get(stream.key) : undefined;
      if (!found || placeOf(found) === stream.endedAs) continue;
      if (compressionOf(found.path) || unknown.includes(found)) continue;
      if (await holding(stream, () => this.#checkFile(stream, found))) continue;
      if (!isTaken(stream, found)) unknown.push(found);
    }
    const seen = new Set(unknown.map(asSeen));
    for (const each of this.#unknown.keys()) if (!seen.has(each)) this.#unknown.delete(each);
    const inOrder = unknown.toSorted((a, b) => Number(a.isLive) - Number(b.isLive));
    const parts: { file: FoundFile; at: number }[] = [];
    const isHeld = (own: string) => waiting.some(({ log }) => log === own);
    for (const file of inOrder) {
      if (this.#ignored.has(asSeen(file))) continue;
      const told = await this.#identifyOne(file, isHeld);
      if (typeof told === "number") parts.push({ file, at: told });
      else if (!told) waiting.push(file);
    }
    // What has only a part of a stream is where it goes on when no other file turns out to have all of it.
    for (const { file } of parts.sort((a, b) => b.at - a.at)) {
      if (!(await this.#identifyOne(file, isHeld, true))) waiting.push(file);
    }
    return waiting;
  }

  /** Takes up a file that has no name any more; false when it can't be told yet what it is. Closes it when it is of no use. */
  async #takeVanished({ files }: Survey, found: FoundFile, file: LogFile | undefined): Promise<boolean> {
    if (!file) {
      const isPacked = compressionOf(found.path) || files.some((file) => isArchiveOf(file, found));
      if (!isPacked) this.lose(found.size, found); // what is in an archive, that tells
      return true;
    }
    const { size } = await file.stat();
    const { isElsewhere } = this.#logOf(found.log);
    const what = await identify(file, { ...found, size, isLive: false }, this.list, {
      isCopied: isElsewhere,
    });
    if (what.is === "busy" || ("stream" in what && what.stream.isBusy)) return false;
    if (what.is === "new") await file.contentLength(); // throws when it has no end
    const isOfUse = what.is !== "small" && what.is !== "copy";
    if (isOfUse && !(await this.#settleOpen({ ...found, size, isLive: false }, file, what))) return false;
    const stream = this.list.find(({ key, phase }) => key === found.key && phase.is === "reading");
    if (!stream || stream.file) await file.close();
    else this.files.keep(stream, file);
    return true;
  }

  /** A stream whose file went before it was done is looked for in files that no rule knows as rotations, too. */
  async #findUnderOtherNames({ files, leftOut }: Survey): Promise<boolean> {
    const isFound = (stream: Stream) => hasHome(stream) || !this.list.includes(stream);
    let isAny = false;
    const known = new Set([...files, ...this.list.flatMap(({ copies }) => copies)].map(({ key }) => key));
    for (const found of this.#sought.isEmpty ? [] : [...leftOut, ...this.paths.all()]) {
      const streams = known.has(found.key) ? [] : this.#sought.of(found).filter((each) => !isFound(each));
      if (streams.length === 0) continue;
      if (!found.isReadable) this.#noteUnreadable(found);
      const what = found.isReadable ? await lookInto(found, streams) : undefined;
      if (what) this.#settle({ ...found, log: what.stream.log || found.log }, what);
      isAny ||= what !== undefined;
    }
    this.#sought.forget(isFound, this.context.mono());
    return isAny;
  }

  /**
   * False when it can't be told yet what a file is; a number when it has a stream up to there only, and is not the last one.
   * `isHeld`: a rotated file of a log is not settled, in which a stream may go on rather than in this one.
   */
  async #identifyOne(
    found: FoundFile,
    isHeld: (log: string) => boolean,
    isLast = false,
  ): Promise<boolean | number> {
    const { mono, now } = this.context;
    const name = asSeen(found);
    const since = this.#since.get(found.log);
    const firstAt = this.#unknown.get(name) ?? mono();
    this.#unknown.set(name, firstAt);
    const isSkipped = !found.isLive || (this.#config.startAt === "end" && this.found === "absent");
    if (since !== undefined && isSkipped && found.mtimeMs <= since) return this.#passOver(found);
    if (!found.isReadable) return this.#noteUnreadable(found);
    const age = Math.max(now() - found.mtimeMs, mono() - firstAt);
    const isQuiet = age >= this.#config.rotateWaitSeconds * 1000 || age < -1000;
    if (!found.isLive && !isQuiet) return false;
    const file = await this.files.look(found.path);
    if (!file) return true;
    try {
      if (file.key !== found.key) return false; // renamed between the look and the opening
      found.size = (await file.stat()).size; // it may have been cut since
      let what = await identify(file, found, this.list, {
        isCopied: this.#logOf(found.log).isElsewhere,
        isLast,
      });
      const isOwn =
        found.isLive && this.paths.isNamed(found.log) && !this.list.some(({ log }) => log === found.log);
      // a path named in full is a log of its own
      if (isOwn && (what.is === "copy" || what.is === "new")) what = { is: "new", at: 0 };
      if (what.is === "busy" || ("stream" in what && what.stream.isBusy)) return false;
      if (what.is === "behind" || (what.is === "stream" && found.isLive)) {
        if (isHeld(found.log) || isHeld(what.stream.log)) return false;
      }
      if (what.is === "behind" && !isLast) return what.at;
      if (what.is === "small" && mono() - firstAt < SMALL_MS) return false;
      if (what.is === "new" && !found.isLive) await file.contentLength(); // one that is still being compressed waits
      return await this.#settleOpen(found, file, what.is === "small" ? { is: "new", at: 0 } : what);
    } catch (error) {
      if (!(error instanceof UnfinishedFile)) throw error;
      if (found.isLive) {
        this.#begin(found, 0); // an archive that grows: as far as it goes
        return true;
      }
      if (now() - found.mtimeMs < UNFINISHED_MS) return false;
      const fields = { path: found.path, bytes: found.size, error: errorMessage(error) };
      this.context.log.warn("rotated file is damaged: not shipped unless it changes", fields);
      this.#ignored.add(name);
      return true;
    } finally {
      await file.close();
    }
  }

  /** An archive of another kind is told of, but when nothing came into its log since all of that was shipped. */
  #noteUnreadable({ path, size: bytes, mtimeMs }: FoundFile): true {
    const isShipped = (stream: Stream) =>
      path.startsWith(stream.path) && stream.size === stream.offset && mtimeMs < stream.mtimeMs + 1;
    const message = "cannot read rotated file: use gzip or zstd in logrotate";
    if (!this.list.some(isShipped)) this.context.faults.failed(path, message, { path, bytes });
    return true;
  }

  /** Settles what an open file is; false when it was cut since its size was asked: what was compared may be other bytes. */
  async #settleOpen(found: FoundFile, file: LogFile, what: Settled): Promise<boolean> {
    const isCut = this.#cut.has(found.key);
    const beginning = what.is === "new" ? await readBeginning(file, what.at, isCut) : undefined;
    if ((await file.stat()).size < found.size) return false;
    if (what.is === "stream") await placeHead(file, what.stream);
    const stream = this.#settle(found, what);
    if (stream && beginning) this.#noteBeginning(stream, beginning);
    return true;
  }

  #noteBeginning(stream: Stream, { head, first, mark }: Beginning): void {
    stream.head = head;
    if (!this.asked) stream.first = first;
    if (mark) stream.marks = [mark];
  }

  #settle(found: FoundFile, what: Settled): Stream | undefined {
    const { log } = this.context;
    this.isChanged = true;
    if (what.is === "new") return this.#begin(found, what.at);
    const { stream } = what;
    const fields = { path: found.path, stream: stream.id };
    if (what.is === "copy") {
      log.info("file is a copy of a known one", fields);
      stream.copies.push({ key: found.key, size: found.size });
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
    this.#enter(stream, what.isDone ? { is: "ended", size: found.size } : { is: "reading" });
    return undefined;
  }

  /** A rotated file of before the first sight of its log: only what comes after now is ours. */
  async #passOver(found: FoundFile): Promise<boolean> {
    const stream = this.#begin(found, 0, true);
    const file = found.isReadable ? await this.files.look(found.path) : undefined;
    try {
      const isFresh = this.context.now() - found.mtimeMs <= STILL_WRITTEN_MS;
      stream.offset = file && !file.compression ? (isFresh ? await endOfLines(file) : found.size) : 0;
      stream.from = stream.offset;
      if (file) this.#noteBeginning(stream, await readBeginning(file, stream.offset, stream.isCut));
    } finally {
      await file?.close();
    }
    stream.size = stream.offset;
    if (!found.isLive) this.#enter(stream, { is: "ended", size: found.size });
    return true;
  }

  #begin(found: Omit<FoundFile, "dev">, offset: number, isQuiet = false): Stream {
    const { path, key, size, mtimeMs, log, isLive } = found;
    const state = { from: offset, offset, log, path, key, copies: [], marks: [], mtimeMs };
    const seen = compressionOf(path) ? offset : size;
    const stream = withFile({ ...state, phase: { is: "reading" }, size: seen }, this.context.mono(), isLive);
    if (this.#cut.delete(key)) stream.isCut = true;
    this.list.push(stream);
    this.#byLog = undefined;
    this.isChanged = true;
    if (!isQuiet) this.context.log.info("following", { path, offset, bytes: stream.size - offset });
    return stream;
  }

  async #readHead(stream: Stream): Promise<void> {
    const file = await this.files.open(stream).catch(() => undefined); // told of when it is to be read
    if (!file) return;
    const start = stream.head ? stream.head.end - stream.head.length : await contentStart(file, stream.isCut);
    const { head, first } = await readHead(file, start);
    if (!head || head.length <= (stream.head?.length ?? 0)) return;
    const isSame = stream.head
      ? await holds(file, stream.head)
      : file.compression !== undefined || (await file.stat()).size >= stream.size; // else it was cut since it was seen
    if (isSame) this.#noteBeginning(stream, { head, first });
    this.isChanged = true;
    await this.files.closeSome(); // any number may have grown since the last look
  }

  // ---- what is gone

  /** A file is away and not gone when its folder can't be read, or another folder lies in its place and no log is there. */
  #isAway(stream: Stream, survey: Survey): boolean {
    for (const path of survey.faults.keys())
      if (stream.path === path || stream.path.startsWith(`${path}/`)) return true;
    const before = this.logs.get(stream.log)?.folder;
    const isLog = survey.logs.has(stream.log);
    if (!isLog || before === undefined || survey.logs.get(stream.log) === before) return false;
    const isThere = survey.files.some(({ log }) => log === stream.log);
    if (!isThere)
      this.context.faults.failed(`away ${stream.log}`, "log folder is another one: waiting for it", {
        path: stream.log,
      });
    return !isThere;
  }

  /** Streams whose files are gone for so long that they do not come back; longer while a file of their log, or an archive of any, may be theirs. */
  #findOrphans(survey: Survey, waiting: FoundFile[]): Stream[] {
    const { mono } = this.context;
    const isAwaited = (own: string) => waiting.some(({ log, path }) => log === own || compressionOf(path));
    const patience = Math.max(1, this.#config.rotateWaitSeconds) * 1000;
    const isDue = ({ phase, phaseAt, size, offset, file, isBusy, log }: Stream) =>
      phase.is === "gone" &&
      !file &&
      !isBusy &&
      size > offset &&
      mono() - phaseAt >= (isAwaited(log) ? Math.max(patience, FORGET_AFTER_MS.waiting) : patience);
    return this.list.filter((stream) => isDue(stream) && !this.#isAway(stream, survey));
  }

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

  /** What was rotated while we were away goes before the live file, if it is settled soon. */
  #holdLive(waiting: Set<string>): void {
    const time = this.context.mono();
    for (const log of this.logs.values()) {
      if (log.heldUntil === 0) log.heldUntil = time + this.#config.rotateWaitSeconds * 1000;
      log.isHeld = waiting.has(log.path) && time < log.heldUntil;
      log.isElsewhere &&= waiting.has(log.path);
    }
  }

  /** Drops what can't come again: delivered and gone; and logs that the config does not name any more. */
  async #prune(survey: Survey, waiting: FoundFile[]): Promise<void> {
    const time = this.context.mono();
    const { usual, waiting: most } = FORGET_AFTER_MS;
    const ages = waiting.map(({ key }) => this.context.now() - bornAt(key));
    const keepMs = Math.min(most, usual + Math.max(0, ...ages)) + this.#config.rotateWaitSeconds * 1000;
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
      : age >= (isMoved ? MOVED_MS : this.#config.rotateWaitSeconds * 1000);
    if (!isQuiet || (!file.compression && size > stream.size)) return;
    await closeFile(stream);
    if (file.compression && stream.size > stream.offset) this.giveUp(stream); // nobody ends a line in an archive
    this.context.log.info("file is done", { path: stream.path, stream: stream.id, bytes: stream.offset });
    stream.marks = stream.marks.slice(-4);
    if (stream.phase.is !== "gone") this.#enter(stream, { is: "ended", size });
  }

  /** Ends rotated files at whose end we are; gives when the next one may be quiet. */
  async #finishQuiet(): Promise<number> {
    const { mono } = this.context;
    const waitMs = this.#config.rotateWaitSeconds * 1000;
    let next = Number.POSITIVE_INFINITY;
    for (const stream of this.list) {
      if (stream.isLive || stream.isBusy || !isAtEnd(stream)) continue;
      if (stream.phase.is !== "reading" && !stream.file) continue;
      await holding(stream, async () => {
        await this.files.open(stream).catch(() => undefined); // told of when it is to be read
        await this.finish(stream);
      });
      const isOpen = stream.file !== undefined && stream.phase.is === "reading";
      if (isOpen) next = Math.min(next, Math.max(stream.grewAt, mono()) + waitMs);
    }
    return next;
  }

  #enter(stream: Stream, phase: Phase): void {
    if (stream.phase.is === "gone" && phase.is === "gone") return;
    if (stream.phase.is === "reading" && phase.is === "gone") this.#sought.add(stream);
    stream.phase = phase;
    stream.phaseAt = this.context.mono();
    if (phase.is === "reading") stream.endedAs = "";
    this.isChanged = true;
  }

  // ---- the receiver's answer

  /** Takes up what the receiver knows of this host when there is no cursor, beside those of the list that stay. */
  adopt(known: StreamState[], kept: Stream[]): void {
    this.list = [...kept, ...known.map((state) => withFile(state, this.context.mono()))];
    for (const stream of this.list) this.#sought.add(stream);
    this.#since.clear();
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
        this.#config.stateDir,
        { version: 2, shipper, lost, asked, files: this.#config.files, folders, streams, left },
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
