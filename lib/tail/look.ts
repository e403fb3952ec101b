/**
 * A look: which files there are now, and which stream each of them is.
 *
 *   a file of a known inode, as long as its bytes still fit   → that stream, whatever its name
 *   any other                                                 → what its bytes say (lib/tail/identify.ts)
 *   a stream without a file                                   → what was not read of it is lost, and told in bytes
 *
 * Files that somebody else still writes (copied, compressed) are left for the next look.
 */
import { MARK_BYTES } from "../chunk.ts";
import { errorMessage } from "../service.ts";
import { hasHome, holding, isAtEnd, placeOf, type Stream } from "./cursor.ts";
import { compressionOf, endOfLines, hasMagic, type LogFile, readBeginning, UnfinishedFile } from "./file.ts";
import { type HeldFiles, holdFiles } from "./held.ts";
import { identify, isTaken, placeHead } from "./identify.ts";
import { asSeen, type FoundFile, isArchiveOf, type Survey } from "./paths.ts";
import { lookInto } from "./sought.ts";
import { FORGET_AFTER_MS, type Settled, type Streams } from "./streams.ts";

/** An archive without an end that was not written to for so long (ms) is damaged, not unfinished. */
const UNFINISHED_MS = 60_000;
/** A small file that begins like another one is shipped as a log of its own after so long (ms). */
const SMALL_MS = 60_000;
/** So many listings are made while names are being shifted, and the next ones after so long (ms). */
const LISTINGS = 8;
const SHIFTING_MS = 50;
/** At the first sight of a log, a rotated file that was written within this time (ms) may still get lines. */
const STILL_WRITTEN_MS = 60_000;

export interface Look {
  /** No file is in the middle of being copied, compressed or renamed, and none is missing for a moment only. */
  isSettled: boolean;
  nextAt: number;
}

export class Looker {
  readonly #streams: Streams;
  /** Unknown files as they are, with when they were first seen so; those that are not ours as long as they are that. */
  #unknown = new Map<string, number>();
  #ignored = new Set<string>();
  #leftOut = new Set<string>();
  #lastFaults = new Map<string, string>();
  readonly held: HeldFiles = new Map();

  constructor(streams: Streams) {
    this.#streams = streams;
  }

  async look(): Promise<Look> {
    const streams = this.#streams;
    const { mono, now } = streams.context;
    const started = now();
    const survey = await this.#survey();
    streams.orphans = [];
    if (!survey) return { isSettled: false, nextAt: mono() + SHIFTING_MS };
    const isShort = [...survey.faults.values()].some((error) => error.includes("EMFILE"));
    if (isShort) await streams.files.closeMore();
    const there = new Set(survey.files.flatMap(({ isLive, log }) => (isLive ? log : [])));
    for (const [path, folder] of survey.logs) {
      const log = streams.logOf(path);
      if (!there.has(path)) continue;
      log.isElsewhere ||= log.folder !== undefined && log.folder !== folder;
      log.folder = folder;
    }
    if (streams.found === "absent" && !streams.asked && streams.seenAt === 0) {
      streams.since = new Map([...survey.logs.keys()].map((path) => [path, now()]));
      streams.isChanged = true; // what comes from now on is new, also after a restart
    }

    const unknown = await this.#locate(survey);
    streams.regroup();
    const waiting = await this.#identifyAll(unknown, survey);
    await holdFiles(this.held, waiting, survey.files, (found, file) =>
      this.#takeVanished(survey, found, file),
    );
    if (waiting.length === 0 && (await this.#findUnderOtherNames(survey))) return this.look();
    this.#reportFaults(survey);
    streams.orphans = this.#findOrphans(survey, waiting);
    const isMissing = streams.list.some(({ phase, offset, size }) => phase.is === "gone" && size > offset);
    this.#holdLive(new Set(waiting.map(({ log }) => log)));
    await streams.prune(survey, waiting);
    const finishAt = await this.#finishQuiet();
    for (const path of survey.logs.keys()) streams.since.delete(path);
    streams.isSettled = waiting.length === 0 && !isMissing && survey.faults.size === 0;
    streams.seenAt = started;
    const isSoon = waiting.length > 0 || isMissing;
    const wait = Math.min(streams.config.pollSeconds * 1000, isSoon ? 1000 : Number.POSITIVE_INFINITY);
    return { isSettled: !isSoon, nextAt: Math.min(mono() + wait, finishAt) };
  }

  /**
   * A rotation that shifts names while they are listed can hide a file: when one is new or missing, only two listings that
   * agree are believed. Undefined when none of them do.
   */
  async #survey(): Promise<Survey | undefined> {
    const streams = this.#streams;
    const live = [...new Set(streams.list.map(({ log }) => log))].filter((path) => streams.paths.names(path));
    let before = "";
    for (let n = 0; n < LISTINGS; n++) {
      const survey = streams.paths.survey(live);
      const shapes = streams.paths.shapes.size;
      const keys = new Set(survey.files.map(({ key }) => key));
      const missing = streams.list.filter(({ key, phase, size, offset }) => {
        return key !== "" && !keys.has(key) && (phase.is !== "gone" || size > offset);
      });
      for (const file of streams.paths.seek(missing)) {
        if (!keys.has(file.key)) survey.files.unshift(file);
        keys.add(file.key);
      }
      if (streams.paths.shapes.size > shapes) continue; // it may have more to look at now
      const isComplete = missing.every(({ key }) => keys.has(key));
      for (const { key, copies } of streams.list) {
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
    const { log } = this.#streams.context;
    for (const [path, error] of faults) {
      const message = logs.has(path) ? "cannot follow log file" : "cannot look for log file";
      this.#streams.context.faults.failed(`look ${path}`, message, { path, error });
    }
    for (const path of this.#lastFaults.keys())
      if (!faults.has(path))
        this.#streams.context.faults.recovered(`look ${path}`, "log file can be looked at again", { path });
    this.#lastFaults = faults;
    for (const { path, key, size: bytes } of leftOut) {
      if (this.#leftOut.has(path) || this.#streams.list.some((stream) => stream.key === key)) continue;
      this.#leftOut.add(path);
      log.info("file is no rotation of a log by its name: not followed", { path, bytes });
    }
  }

  // ---- the files of the streams

  /** Finds the streams' files by their keys; notes their sizes. Gives the files that are nobody's. */
  async #locate(survey: Survey): Promise<FoundFile[]> {
    const streams = this.#streams;
    const owners = new Map<string, Stream>();
    const copies = new Map<string, Stream>();
    for (const stream of streams.list) {
      if (stream.key !== "" && (stream.until === undefined || !owners.has(stream.key)))
        owners.set(stream.key, stream);
      for (const { key } of stream.copies) copies.set(key, stream);
    }
    const located = new Set<string>();
    const unknown: FoundFile[] = [];
    const live = new Set(survey.files.flatMap(({ key, isLive }) => (isLive ? key : [])));
    for (const stream of streams.list) stream.isLive &&= live.has(stream.key); // others ship meanwhile
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
      if (copy) copy.mtimeMs ??= file.mtimeMs;
      const isPart = !compressionOf(file.path) && file.size < stream.offset; // all of it is shipped
      const isSame = copy?.size === file.size && copy.mtimeMs === file.mtimeMs;
      if (isSame && (isPart || located.has(stream.key))) continue;
      stream.copies = stream.copies.filter(({ key }) => key !== file.key);
      unknown.push(file); // it was written, or it may be where its log goes on: what is it now?
    }
    for (const stream of streams.list) {
      const owner = stream.until === undefined ? undefined : owners.get(stream.key);
      if (owner) Object.assign(stream, { path: owner.path, log: owner.log });
      if (located.has(stream.key) || (stream.phase.is === "gone" && !stream.file)) continue;
      const { file, isBusy } = stream;
      if (file && !isBusy) await holding(stream, () => this.#lookAtOpen(stream, file));
      if (!this.#isAway(stream, survey)) streams.enter(stream, { is: "gone" });
    }
    return unknown;
  }

  async #lookAtOpen(stream: Stream, file: LogFile): Promise<void> {
    const { size, mtimeMs } = await file.stat();
    const own = file.compression ? 0 : Math.min(size, stream.until ?? size); // an archive's is another
    Object.assign(stream, { size: Math.max(own, stream.size), mtimeMs });
    if ((stream.head?.length ?? 0) < MARK_BYTES) await this.#streams.readHead(stream);
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
    else if (isNew && stream.until === undefined) this.#streams.enter(stream, { is: "reading" });
    if (stream.isBusy) return true;
    const isWritten = file.size > stream.checkedSize || file.mtimeMs !== stream.mtimeMs;
    const isOther = !isPacked && (file.size < stream.size || isWritten);
    if (isOther && !(await holding(stream, () => this.#checkFile(stream, file)))) return false;
    if (!isPacked) {
      if (file.size !== stream.size) {
        stream.grewAt = this.#streams.context.mono();
        this.#streams.isMoved = true; // what was seen is kept: when it vanishes, that is told to the byte
      }
      stream.size = file.size;
    }
    stream.mtimeMs = file.mtimeMs;
    const isHeadShort = (stream.head?.length ?? 0) < MARK_BYTES && file.size > (stream.head?.end ?? 0);
    if (!isPacked && isHeadShort) await holding(stream, () => this.#streams.readHead(stream));
    return true;
  }

  async #checkFile(stream: Stream, found: FoundFile): Promise<boolean> {
    const file = await this.#streams.files.look(found.path);
    if (!file) return true;
    try {
      if (file.key !== stream.key) return true;
      return await this.#streams.rebase(stream, file, found.size);
    } finally {
      await file.close();
    }
  }

  // ---- which file is which

  /** Says what unknown files are. Gives those of which that can't be told yet. */
  async #identifyAll(unknown: FoundFile[], survey: Survey): Promise<FoundFile[]> {
    const waiting: FoundFile[] = [];
    if (unknown.length === 0) return waiting;
    const files = new Map(survey.files.map((file) => [file.key, file]));
    for (const stream of this.#streams.list) {
      const found = stream.phase.is === "reading" && !stream.isBusy ? files.get(stream.key) : undefined;
      if (!found || placeOf(found) === stream.endedAs) continue;
      if (compressionOf(found.path) || unknown.includes(found)) continue;
      if (await holding(stream, () => this.#checkFile(stream, found))) continue;
      if (!isTaken(stream, found)) unknown.push(found);
    }
    const seen = new Set(unknown.map(asSeen));
    for (const known of [this.#unknown, this.#ignored])
      for (const each of known.keys()) if (!seen.has(each)) known.delete(each);
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
      if (!isPacked) this.#streams.lose(found.size, found); // what is in an archive, that tells
      return true;
    }
    const { size } = await file.stat();
    const { isElsewhere } = this.#streams.logOf(found.log);
    const what = await identify(file, { ...found, size, isLive: false }, this.#streams.list, {
      isCopied: isElsewhere,
    });
    if (what.is === "busy" || ("stream" in what && what.stream.isBusy)) return false;
    if (what.is === "new") await file.contentLength(); // throws when it has no end
    const isOfUse = what.is !== "small" && what.is !== "copy";
    if (isOfUse && !(await this.#settleOpen({ ...found, size, isLive: false }, file, what))) return false;
    const stream = this.#streams.list.find(({ key, phase }) => key === found.key && phase.is === "reading");
    if (!stream || stream.file) await file.close();
    else this.#streams.files.keep(stream, file);
    return true;
  }

  /** A stream whose file went before it was done is looked for in files that no rule knows as rotations, too. */
  async #findUnderOtherNames({ files, leftOut }: Survey): Promise<boolean> {
    const isFound = (stream: Stream) => hasHome(stream) || !this.#streams.list.includes(stream);
    let isAny = false;
    const known = new Set(
      [...files, ...this.#streams.list.flatMap(({ copies }) => copies)].map(({ key }) => key),
    );
    for (const found of this.#streams.sought.isEmpty ? [] : [...leftOut, ...this.#streams.paths.all()]) {
      const streams = known.has(found.key)
        ? []
        : this.#streams.sought.of(found).filter((each) => !isFound(each));
      if (streams.length === 0) continue;
      if (!found.isReadable) this.#noteUnreadable(found);
      const what = found.isReadable ? await lookInto(found, streams) : undefined;
      if (what) this.#streams.settle({ ...found, log: what.stream.log || found.log }, what);
      isAny ||= what !== undefined;
    }
    this.#streams.sought.forget(isFound, this.#streams.context.mono());
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
    const streams = this.#streams;
    const { mono, now } = streams.context;
    const name = asSeen(found);
    const since = streams.since.get(found.log);
    const firstAt = this.#unknown.get(name) ?? mono();
    this.#unknown.set(name, firstAt);
    const isSkipped = !found.isLive || (streams.config.startAt === "end" && streams.found === "absent");
    if (since !== undefined && isSkipped && found.mtimeMs <= since) return this.#passOver(found);
    if (!found.isReadable) return this.#noteUnreadable(found);
    const age = Math.max(now() - found.mtimeMs, mono() - firstAt);
    const isQuiet = age >= streams.config.rotateWaitSeconds * 1000 || age < -1000;
    if (!found.isLive && !isQuiet) return false;
    const file = await streams.files.look(found.path);
    if (!file) return true;
    try {
      if (file.key !== found.key) return false; // renamed between the look and the opening
      found.size = (await file.stat()).size; // it may have been cut since
      let what = await identify(file, found, streams.list, {
        isCopied: streams.logOf(found.log).isElsewhere,
        isLast,
      });
      const isOwn =
        found.isLive &&
        streams.paths.isNamed(found.log) &&
        !streams.list.some(({ log }) => log === found.log || log === ""); // "": it may be that one's, says the receiver
      // a path named in full is a log of its own
      if (isOwn && (what.is === "copy" || what.is === "new")) what = { is: "new", at: 0 };
      if (what.is === "busy" || ("stream" in what && what.stream.isBusy)) return false;
      if (what.is === "behind" || (what.is === "stream" && found.isLive)) {
        if (isHeld(found.log) || isHeld(what.stream.log)) return false;
      }
      if (what.is === "behind" && !isLast) return what.at;
      if (what.is === "small" && mono() - firstAt < SMALL_MS) return false;
      if (!found.isLive && (await hasMagic(file))) {
        this.#ignored.add(name);
        return this.#noteUnreadable(found);
      }
      if (what.is === "new" && !found.isLive) await file.contentLength(); // one that is still being compressed waits
      return await this.#settleOpen(found, file, what.is === "small" ? { is: "new", at: 0 } : what);
    } catch (error) {
      if (!(error instanceof UnfinishedFile)) throw error;
      if (found.isLive) {
        streams.begin(found, 0); // an archive that grows: as far as it goes
        return true;
      }
      if (now() - found.mtimeMs < UNFINISHED_MS) return false;
      const fields = { path: found.path, bytes: found.size, error: errorMessage(error) };
      streams.context.log.warn("rotated file is damaged: not shipped unless it changes", fields);
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
    if (!this.#streams.list.some(isShipped))
      this.#streams.context.faults.failed(path, message, { path, bytes });
    return true;
  }

  /** Settles what an open file is; false when it was cut since its size was asked: what was compared may be other bytes. */
  async #settleOpen(found: FoundFile, file: LogFile, what: Settled): Promise<boolean> {
    const isCut = this.#streams.cut.has(found.key);
    const beginning = what.is === "new" ? await readBeginning(file, what.at, isCut) : undefined;
    if ((await file.stat()).size < found.size) return false;
    if (what.is === "stream") await placeHead(file, what.stream);
    const stream = this.#streams.settle(found, what);
    if (stream && beginning) this.#streams.noteBeginning(stream, beginning);
    return true;
  }

  /** A rotated file of before the first sight of its log: only what comes after now is ours. */
  async #passOver(found: FoundFile): Promise<boolean> {
    const stream = this.#streams.begin(found, 0, true);
    const file = found.isReadable ? await this.#streams.files.look(found.path) : undefined;
    try {
      const isFresh = this.#streams.context.now() - found.mtimeMs <= STILL_WRITTEN_MS;
      stream.offset = file && !file.compression ? (isFresh ? await endOfLines(file) : found.size) : 0;
      stream.from = stream.offset;
      if (file) this.#streams.noteBeginning(stream, await readBeginning(file, stream.offset, stream.isCut));
    } finally {
      await file?.close();
    }
    stream.size = stream.offset;
    if (!found.isLive) this.#streams.enter(stream, { is: "ended", size: found.size });
    return true;
  }

  // ---- what is gone, or at its end

  /** A file is away and not gone when its folder can't be read or is not looked at, or another one lies in its place with no log. */
  #isAway(stream: Stream, survey: Survey): boolean {
    for (const path of survey.faults.keys())
      if (stream.path === path || stream.path.startsWith(`${path}/`)) return true;
    const before = this.#streams.logs.get(stream.log)?.folder;
    if (!survey.logs.has(stream.log)) return stream.log !== "" && !this.#streams.paths.names(stream.log);
    if (before === undefined || survey.logs.get(stream.log) === before) return false;
    const isThere = survey.files.some(({ log }) => log === stream.log);
    if (!isThere)
      this.#streams.context.faults.failed(`away ${stream.log}`, "log folder is another one: waiting for it", {
        path: stream.log,
      });
    return !isThere;
  }

  /** Streams whose files are gone for so long that they do not come back; longer while a file of their log, or an archive of any, may be theirs. */
  #findOrphans(survey: Survey, waiting: FoundFile[]): Stream[] {
    const { mono } = this.#streams.context;
    const isAwaited = (own: string) => waiting.some(({ log, path }) => log === own || compressionOf(path));
    const patience = Math.max(1, this.#streams.config.rotateWaitSeconds) * 1000;
    const isDue = ({ phase, phaseAt, size, offset, file, isBusy, log }: Stream) =>
      phase.is === "gone" &&
      !file &&
      !isBusy &&
      size > offset &&
      mono() - phaseAt >= (isAwaited(log) ? Math.max(patience, FORGET_AFTER_MS.waiting) : patience);
    return this.#streams.list.filter((stream) => isDue(stream) && !this.#isAway(stream, survey));
  }

  /** What was rotated while we were away goes before the live file, if it is settled soon. */
  #holdLive(waiting: Set<string>): void {
    const time = this.#streams.context.mono();
    for (const log of this.#streams.logs.values()) {
      if (log.heldUntil === 0) log.heldUntil = time + this.#streams.config.rotateWaitSeconds * 1000;
      log.isHeld = waiting.has(log.path) && time < log.heldUntil;
      log.isElsewhere &&= waiting.has(log.path);
    }
  }

  /** Ends rotated files at whose end we are; gives when the next one may be quiet. */
  async #finishQuiet(): Promise<number> {
    const { mono } = this.#streams.context;
    const waitMs = this.#streams.config.rotateWaitSeconds * 1000;
    let next = Number.POSITIVE_INFINITY;
    for (const stream of this.#streams.list) {
      if (stream.isLive || stream.isBusy || !isAtEnd(stream)) continue;
      if (stream.phase.is !== "reading" && !stream.file) continue;
      await holding(stream, async () => {
        await this.#streams.files.open(stream).catch(() => undefined); // told of when it is to be read
        await this.#streams.finish(stream);
      });
      const isOpen = stream.file !== undefined && stream.phase.is === "reading";
      if (isOpen) next = Math.min(next, Math.max(stream.grewAt, mono()) + waitMs);
    }
    return next;
  }
}
