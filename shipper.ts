/**
 * shipper: every line that nginx writes into a log file goes to the receiver, once and in the order of the file.
 *
 *   1. look      which files there are, and which stream each of them is (lib/tail/streams.ts); the name of a new stream is
 *                drawn and saved before its first chunk leaves
 *   2. read      whole lines from the stream's offset, checked against the bytes just before it
 *   3. send      POST with stream, byte range and marks; held and tried again for as long as it takes (lib/tail/upload.ts)
 *   4. commit    only 200 with the chunk's end: the lines are on the receiver's stable storage; the offset moves on
 *   5. save      the cursor, durably, at most once a second and at the end
 *
 * A crash after 2 or 3 repeats the chunk, and one before 5 does the same: the receiver answers 409 with the offset where it
 * stands, which is believed when the file has those bytes. Each heartbeat asks where all streams stand: what the receiver
 * has lost is shipped again from what was delivered of it, and what a file took with it is told in bytes.
 */
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { whatIsMissing } from "./lib/check.ts";
import { formatAgent, MARK_BYTES } from "./lib/chunk.ts";
import type { Config } from "./lib/config.ts";
import { failpoint, holdLock, LockedError, makeFolder, moveDurably } from "./lib/durable.ts";
import { type Metric, writeMetrics } from "./lib/metrics.ts";
import {
  createFaultLog,
  createProgress,
  EXIT,
  errorMessage,
  type FaultLog,
  type Log,
  OperatorError,
  retryDelay,
  runScript,
  type Service,
  VERSION,
  Wakeup,
  wait,
} from "./lib/service.ts";
import {
  beginAs,
  findWayBack,
  moveTo,
  takeFirstAnswer,
  takeStatus,
  takeWayBack,
} from "./lib/tail/answers.ts";
import { closeFile, holding, isAtEnd, placeOf, type Stream } from "./lib/tail/cursor.ts";
import {
  addMark,
  compressionOf,
  contentStart,
  LogFile,
  type Mark,
  parseSkipRule,
  readMark,
  type SkipRule,
  wireMark,
} from "./lib/tail/file.ts";
import { type Look, Looker } from "./lib/tail/look.ts";
import { isGlob, lookAt, Paths, Watch, whyNotFollowed } from "./lib/tail/paths.ts";
import { Buffers, Changed, readPortion } from "./lib/tail/reader.ts";
import { showDelivered, showStatus } from "./lib/tail/status.ts";
import { type FollowedLog, Streams } from "./lib/tail/streams.ts";
import { type Answer, type EncodedChunk, encodeBody, Unanswered, Uploader } from "./lib/tail/upload.ts";

const FAULT_MS = 1000;
const SAVE_EVERY_MS = 1000;
/** Without a cursor, a chunk of the process before may still be on its way for so long. */
const PATIENCE_MS = 10_000;
/** So often a rotated file that grows goes before the live one. */
const ROUNDS = 5;
/** Names that change in a burst are looked at together. */
const NAMES_MS = 20;
const TELL_EVERY_MS = 60_000;
const METRICS_EVERY_MS = 15_000;
const MISSING_EVERY_MS = 3_600_000;
/** On a link on which a chunk takes so long, one is on its way. */
const SLOW_MS = 2_000;
/** So many 409s in a row that told an offset are of answers that overtook each other; more are a fault. */
const MOST_CONFLICTS = 3;
/** The smallest chunk that a 413 or a slow link can lead to. */
const MIN_CHUNK_BYTES = 4096;

/** What a shipper is opened with. `isFresh`: nothing of ours was in the state folder. */
export interface ShipperOptions {
  log: Log;
  signal: AbortSignal;
  /** The wall clock, and one that nobody sets, ms. */
  now: () => number;
  mono?: () => number;
  isFresh?: boolean;
}

export class Shipper {
  config: Config["shipper"];
  readonly log: Log;
  readonly signal: AbortSignal;
  readonly now: () => number;
  readonly mono: () => number;
  readonly faults: FaultLog;
  readonly streams: Streams;
  readonly looker: Looker;
  uploader: Uploader;
  readonly buffers: Buffers;
  readonly wakeup = new Wakeup();
  /** Rung when the receiver may be to be asked. */
  readonly asking = new Wakeup();
  skip: SkipRule[];
  /** Largest chunk now, and the largest that the receiver takes. */
  chunkBytes: number;
  mostBytes: number;
  /** Statuses that were answered since the last good answer, to chunks and to questions: an answered question says nothing of chunks. */
  readonly failing = new Set<number>();
  readonly unanswered = new Set<number>();
  readonly sent = { lines: 0, bytes: 0, chunks: 0 };
  /** When the receiver answered last as the contract says, on the wall clock. */
  answeredAt = 0;
  /** The receiver is to be asked at once; streams that it said it does not know. */
  askNow = false;
  readonly unknown = new Set<Stream>();
  /** Heartbeats in a row at which a path of `files` matched nothing: one may fall into a rotation. */
  lacking = 0;
  missingAt = 0;
  /** When it may be asked what it knows of a host without a cursor. */
  askAt = 0;
  /** A look at all files, for `Log-Through`. */
  noted?: { at: number; sizes: Map<Stream, number> };
  nextLookAt = 0;

  constructor(
    config: Config["shipper"],
    { log, signal, now, mono = () => performance.now() }: ShipperOptions,
  ) {
    this.config = config;
    this.log = log;
    this.signal = signal;
    this.now = now;
    this.mono = mono;
    this.faults = createFaultLog(log, mono);
    this.streams = new Streams(config, { log, faults: this.faults, now, mono });
    this.looker = new Looker(this.streams);
    this.uploader = new Uploader(config, signal);
    this.buffers = new Buffers(MARK_BYTES + config.chunkBytes);
    this.skip = config.skip.map(parseSkipRule);
    this.chunkBytes = this.mostBytes = config.chunkBytes;
  }
}

/** The receiver does not take chunks now: hold the offset and try again after `waitMs`. */
class Refused extends Error {
  readonly waitMs: number;
  constructor(waitMs: number) {
    super("the receiver does not take chunks now");
    this.waitMs = waitMs;
  }
}

async function main(service: Service<"shipper">): Promise<number> {
  const { config, log, signal, now, flags } = service;
  if (flags.status) return showStatus(service);
  if (flags.delivered) return showDelivered(config, String(flags.delivered), signal);
  const isFresh = !existsSync(join(config.stateDir, ".lock"));
  await takeStateDir(config, log);
  const shipper = await openShipper(config, { log, signal, now, isFresh });
  service.onReload((next) => reload(shipper, next));
  let code: number = EXIT.done;
  if (flags.once) code = await drainAll(shipper);
  else {
    const loops = [followAll, heartbeat, keepSaving, report, keepMetrics];
    await Promise.all(loops.map((loop) => loop(shipper)));
  }
  await saveCursor(shipper);
  return code;
}

/** Makes and locks the state folder. When it can't be written, shipping goes on all the same. */
async function takeStateDir({ stateDir }: Config["shipper"], log: Log): Promise<void> {
  try {
    await makeFolder(stateDir);
    await holdLock(join(stateDir, ".lock"), `The state folder ${stateDir}`);
  } catch (error) {
    if (error instanceof LockedError) throw error;
    const consequence = "shipping goes on; a restart asks the receiver where it stands";
    log.error("cannot use state folder", { stateDir, error: errorMessage(error), consequence });
  }
}

/** Takes up another config; gives the keys that stay until a restart. */
function reload(shipper: Shipper, next: Config["shipper"]): string[] {
  const { config, streams, signal } = shipper;
  const fixed = ["host", "stateDir", "chunkBytes", "startAt"] as const;
  const kept = Object.fromEntries(fixed.map((key) => [key, config[key]]));
  shipper.config = { ...next, ...kept };
  shipper.skip = next.skip.map(parseSkipRule);
  shipper.uploader = new Uploader(shipper.config, signal);
  streams.reconfigure(shipper.config);
  shipper.nextLookAt = 0;
  shipper.wakeup.ring();
  return fixed.filter((key) => next[key] !== config[key]);
}

/** A shipper that has taken up what the cursor knows and what the config names. */
export async function openShipper(config: Config["shipper"], options: ShipperOptions): Promise<Shipper> {
  const { isFresh = true } = options;
  const shipper = new Shipper(config, options);
  const { streams } = shipper;
  await streams.open();
  if (streams.found === "damaged" || (streams.found === "absent" && !isFresh)) {
    const patience = Math.min(PATIENCE_MS, config.timeoutSeconds * 1000) - process.uptime() * 1000;
    shipper.askAt = shipper.mono() + Math.max(0, patience);
  }
  if (streams.found === "absent") await takeOverOffset(shipper);
  return shipper;
}

/** The offset file of the original shipper: its one live file goes on from there at the very first start. */
async function takeOverOffset(shipper: Shipper): Promise<void> {
  const path = join(shipper.config.stateDir, "latest.offset");
  let text: string;
  try {
    text = readFileSync(path, "utf8").trim();
  } catch {
    return; // the usual case: there was no other shipper before
  }
  await shipper.looker.look();
  const live = shipper.streams.list.filter(({ isLive }) => isLive);
  const [stream] = live;
  if (!stream || live.length > 1 || !/^\d{1,16}$/.test(text) || Number(text) > stream.size) {
    const expected = "expected an offset within the one file that is followed; mend or remove it";
    throw new OperatorError(`Cannot take over "${path}": it says "${text.slice(0, 40)}", ${expected}`);
  }
  const offset = Number(text);
  const file = await shipper.streams.files.open(stream);
  const mark = file && offset > 0 ? await readMark(file, offset) : undefined;
  Object.assign(stream, { offset, from: offset, marks: mark ? [mark] : [] });
  shipper.log.info("offset taken over", { path, offset });
  await saveCursor(shipper);
  await moveDurably(path, `${path}.imported`);
}

// ---- the loops

/** Ships to the end of every file, and ends when the receiver has everything that could be read. */
async function drainAll(shipper: Shipper): Promise<number> {
  const { signal, mono, sent, streams } = shipper;
  const before = streams.lost;
  await lookOnce(shipper);
  const progress = createProgress("shipping", lagOf(shipper));
  const ticker = setInterval(() => progress.show(sent.bytes), 250);
  while (!signal.aborted) {
    const pass = await shipOnce(shipper);
    if (pass.atEnd) break;
    const due = Math.min(1000, Math.max(10, shipper.nextLookAt - mono()));
    await wait(pass.waitMs ?? (pass.shipped ? 10 : due), signal);
  }
  if (!signal.aborted && streams.lost > before) await ask(shipper);
  clearInterval(ticker);
  progress.end();
  const faults = shipper.faults.lasting();
  const fields = { files: streams.logs.size, ...sent };
  if (faults === 0) shipper.log.info("shipped to the end of every file", fields);
  else shipper.log.error("shipped what could be read", { ...fields, faults });
  return faults === 0 || signal.aborted ? EXIT.done : EXIT.failed;
}

export interface Pass {
  shipped: boolean;
  /** Everything that there is was shipped, and no file is in the middle of being copied or compressed. */
  atEnd: boolean;
  /** The receiver refused: try again after so many ms. */
  waitMs?: number | undefined;
}

/** One pass: looks which file is which, asks the receiver when that is needed, then ships every stream to its end. */
export async function shipOnce(shipper: Shipper): Promise<Pass> {
  const { streams, sent, mono } = shipper;
  const before = sent.chunks;
  let look = await lookOnce(shipper);
  if (shipper.askNow) {
    const early = shipper.askAt - mono();
    if (early > 0) return { shipped: false, atEnd: false, waitMs: early };
    if (!(await ask(shipper))) return { shipped: false, atEnd: false, waitMs: FAULT_MS };
    look = await lookOnce(shipper);
  }
  const passes = await Promise.all([...streams.logs.values()].map((log) => shipLog(shipper, log)));
  const waits = passes.flatMap(({ waitMs }) => waitMs ?? []);
  const atEnd = look.isSettled && !shipper.askNow && passes.every((pass) => pass.atEnd);
  return { shipped: sent.chunks > before, atEnd, waitMs: waits.length > 0 ? Math.min(...waits) : undefined };
}

async function lookOnce(shipper: Shipper): Promise<Look> {
  shipper.nextLookAt = Number.POSITIVE_INFINITY; // what asks for a look from here on, this one may not see any more
  const look = await shipper.looker.look();
  shipper.nextLookAt = Math.min(shipper.nextLookAt, look.nextAt);
  if (shipper.streams.orphans.length > 0 || !shipper.streams.asked) shipper.askNow = true;
  shipper.asking.ring();
  if (shipper.mono() >= shipper.missingAt) await noteMissing(shipper);
  return look;
}

/** Looks at the files at each event, else every `pollSeconds`, whatever the receiver does; ships logs that have grown. */
async function followAll(shipper: Shipper): Promise<void> {
  const { signal, mono, streams, wakeup, faults } = shipper;
  const touched = new Set<string>();
  const watch = new Watch((path, event) => {
    if (event === "rename") shipper.nextLookAt = 0;
    else touched.add(path);
    wakeup.ring();
  });
  const loops = new Map<FollowedLog, Promise<void>>();
  const failed = new AbortController(); // a bug in one loop ends them all, and the script
  const either = AbortSignal.any([signal, failed.signal]);
  while (!either.aborted) {
    for (const stream of streams.list) if (touched.has(stream.path)) refresh(shipper, stream);
    touched.clear();
    if (mono() >= shipper.nextLookAt) {
      await lookOnce(shipper);
      await saveFirst(shipper);
      if (watch.update(streams.paths.folders)) shipper.nextLookAt = 0; // of what came before, no event tells
      const message = "no events of this folder: it is looked at every pollSeconds";
      for (const [folder, error] of watch.faults)
        faults.failed(`watch ${folder}`, message, { folder, error });
    }
    for (const log of streams.asked ? streams.logs.values() : []) {
      if (log.isRunning || !streams.ofLog(log.path).some((stream) => isDue(shipper, log, stream))) continue;
      loops.set(
        log,
        follow(shipper, log).catch((error) => failed.abort(error)),
      );
    }
    await wait(NAMES_MS, either);
    await wakeup.wait(Math.max(0, shipper.nextLookAt - mono()), either);
  }
  watch.close();
  failed.signal.throwIfAborted();
  await Promise.all(loops.values());
}

/** At the start and each hour: of a slip in `files` nothing else would ever be heard. */
async function noteMissing(shipper: Shipper): Promise<void> {
  const { log, mono, streams } = shipper;
  shipper.missingAt = mono() + MISSING_EVERY_MS;
  for (const path of streams.paths.missing()) {
    const { text } = (await whatIsMissing(path).catch(() => undefined)) ?? {};
    log.warn("no file matches yet", { files: path, hint: isGlob(path) ? undefined : text });
  }
}

/** Before the receiver is asked for the first time, what is seen is on stable storage: what comes after it is new. */
async function saveFirst(shipper: Shipper): Promise<void> {
  if (!shipper.streams.asked && shipper.streams.isChanged) await saveCursor(shipper);
}

/** A file that was written to: its size. Any other change is for the next look. */
function refresh(shipper: Shipper, stream: Stream): void {
  const { streams, mono } = shipper;
  const { path, log, isLive } = stream;
  if (!isLive && (stream.phase.is !== "reading" || compressionOf(path))) return;
  const found = lookAt(path, { log, isLive });
  if (found?.key === stream.key && found.size >= stream.size) {
    if (found.size > stream.size) {
      if (!stream.head) shipper.nextLookAt = 0; // by its first bytes it is known when it has gone
      stream.grewAt = mono();
      streams.isMoved = true; // what was seen is kept: when it vanishes, that is told to the byte
    }
    Object.assign(stream, { size: found.size, mtimeMs: found.mtimeMs });
  } else shipper.nextLookAt = 0;
}

/** A line after a pause goes at once, steady traffic once per `flushMs`, a backlog without waiting. */
async function follow(shipper: Shipper, log: FollowedLog): Promise<void> {
  const { signal, mono } = shipper;
  log.isRunning = true;
  try {
    do {
      const started = mono();
      const pass = await shipLog(shipper, log);
      await wait(pass.waitMs ?? shipper.config.flushMs - (mono() - started), signal);
      for (const stream of streamsOf(shipper, log)) if (stream.isLive) refresh(shipper, stream);
    } while (!signal.aborted && streamsOf(shipper, log).some((stream) => isDue(shipper, log, stream)));
  } finally {
    log.isRunning = false;
    shipper.wakeup.ring();
  }
}

// ---- shipping

function streamsOf({ streams }: Shipper, log: FollowedLog): Stream[] {
  return streams
    .ofLog(log.path)
    .toSorted((a, b) => Number(a.isLive) - Number(b.isLive) || a.mtimeMs - b.mtimeMs || a.from - b.from);
}

function isDue(shipper: Shipper, log: FollowedLog, stream: Stream): boolean {
  const isHeld = (log.isHeld && stream.isLive) || shipper.mono() < (stream.retryAt ?? 0);
  if (isHeld || stream.isBusy || shipper.unknown.has(stream)) return false;
  if (stream.wayBack !== undefined) return true;
  if (stream.phase.is === "ended" || (stream.phase.is === "gone" && !stream.file)) return false;
  return !isAtEnd(stream);
}

/** Ships the streams of a log to their ends, oldest first, the live one last. */
async function shipLog(shipper: Shipper, log: FollowedLog): Promise<Omit<Pass, "shipped">> {
  const { signal } = shipper;
  try {
    const own = streamsOf(shipper, log);
    const live = own.filter(({ isLive }) => isLive);
    const rotated = own.filter(({ isLive }) => !isLive);
    const isRotating = rotated.some(({ phase }) => phase.is === "reading");
    // Sizes before the look at the rotated ones: what comes later comes after theirs.
    for (const stream of isRotating ? live : []) refresh(shipper, stream);
    const sizes = live.map(({ size }) => size);
    let atEnd = await shipRotated(shipper, log, rotated);
    for (const [i, stream] of live.entries()) {
      if (signal.aborted || log.isHeld) return { atEnd: false };
      // One that is in another file now (copied, packed) has none of the live one's place and size.
      if (isRotating && stream.isLive && sizes[i] === stream.offset && !stream.wayBack) {
        if (stream.size > stream.offset)
          atEnd = false; // it came after the look at the rotated ones: next time
        else stream.endedAs = placeOf(stream);
      } else if (isDue(shipper, log, stream)) atEnd = (await shipStream(shipper, stream)) && atEnd;
    }
    return { atEnd };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { atEnd: false, waitMs: error.waitMs };
  }
}

/**
 * Ships the rotated files of a log to their ends, again when their writer put something there meanwhile: it goes before
 * what the writer puts into the live file after it. A few times at most, or a writer that stays would hold up the others.
 */
async function shipRotated(shipper: Shipper, log: FollowedLog, rotated: Stream[]): Promise<boolean> {
  const { streams, signal } = shipper;
  let atEnd = true;
  for (let round = 0, isGrown = true; isGrown && round < ROUNDS; round++) {
    isGrown = false;
    for (const stream of rotated) {
      if (signal.aborted) return false;
      refresh(shipper, stream);
      if (isDue(shipper, log, stream)) {
        isGrown = true;
        atEnd = (await shipStream(shipper, stream)) && atEnd;
      } else if (!stream.isBusy && stream.phase.is === "reading")
        await holding(stream, () => streams.finish(stream));
    }
  }
  return atEnd;
}

/** Ships one stream to its end, when its turn comes. True when that was reached. Throws Refused. */
async function shipStream(shipper: Shipper, stream: Stream): Promise<boolean> {
  const buffer = await shipper.buffers.take();
  try {
    return !stream.isBusy && (await holding(stream, () => shipWith(shipper, stream, buffer)));
  } finally {
    shipper.buffers.give(buffer);
    await shipper.streams.files.closeSome();
  }
}

async function shipWith(shipper: Shipper, stream: Stream, buffer: Buffer<ArrayBuffer>): Promise<boolean> {
  const { streams, faults, mono } = shipper;
  const place = placeOf(stream);
  try {
    const file = await streams.files.open(stream);
    if (!file) {
      shipper.nextLookAt = 0; // it finds the file, or that it is gone
      stream.retryAt = mono() + NAMES_MS;
      return true;
    }
    await findWayBack(streams, stream, file);
    takeWayBack(streams, stream);
    const isDone = await drain(shipper, { stream, file, buffer, chunks: [], isSingle: false, hasMore: true });
    stream.endedAs = isDone ? place : "";
    faults.recovered(stream.path, "log file can be read again", { path: stream.path });
    await streams.finish(stream);
    return isDone;
  } catch (error) {
    if (error instanceof Refused || shipper.signal.aborted)
      throw error instanceof Refused ? error : new Refused(0);
    if (error instanceof Changed) {
      shipper.nextLookAt = 0;
      if (stream.file) await streams.rebase(stream, stream.file, (await stream.file.stat()).size);
      return false;
    }
    await closeFile(stream);
    stream.retryAt = mono() + shipper.config.pollSeconds * 1000; // the others go on
    logFault(shipper, stream.path, error);
    return true;
  }
}

/** Logs what the operator or time can mend; throws a bug on. */
function logFault(shipper: Shipper, path: string, error: unknown): void {
  if (error instanceof TypeError || error instanceof ReferenceError || error instanceof RangeError)
    throw error;
  shipper.faults.failed(path, "cannot read log file", { path, error: errorMessage(error) });
}

/** A chunk on its way, and what the stream's marks are when it is committed. */
interface Flown {
  chunk: EncodedChunk;
  marks: Mark[];
  answer: Promise<Answer>;
  sentAt: number;
}

/** A stream that is being shipped, and its chunks that are on their way, oldest first. */
interface Transfer {
  stream: Stream;
  file: LogFile;
  buffer: Buffer<ArrayBuffer>;
  chunks: Flown[];
  /** One at a time, until the next 200. */
  isSingle: boolean;
  /** There may be more behind what was read last. */
  hasMore: boolean;
}

/** Ships a stream up to the present end of its file. False when it can't go on before others do. Throws Refused, Changed, the system's error. */
async function drain(shipper: Shipper, transfer: Transfer): Promise<boolean> {
  const { stream, file, chunks } = transfer;
  try {
    if (stream.offset === 0) await skipHole(shipper, stream, file);
    while (!shipper.signal.aborted) {
      await fill(shipper, transfer);
      const first = chunks.shift();
      if (!first) return !shipper.signal.aborted;
      const answer = await first.answer;
      failpoint("shipper:answered");
      if (answer.kind === "stored") commit(shipper, transfer, first);
      else if (!(await goBack(shipper, transfer, answer))) return false;
      if (stream.wayBack !== undefined) return false;
    }
    return false;
  } finally {
    // Before the buffer and the file go to somebody else, nobody may still send of them.
    await settle(shipper, transfer);
  }
}

/** What a truncation left in front of the first line is no part of the log. */
async function skipHole(shipper: Shipper, stream: Stream, file: LogFile): Promise<void> {
  const bytes = await contentStart(file, stream.isCut);
  if (bytes === 0) return;
  shipper.log.info("hole of NULs skipped", { path: stream.path, bytes });
  stream.offset = stream.from = bytes;
}

/** Sends as many chunks as may be on their way: one while a stream begins or after a 409, else `inFlight`. */
async function fill(shipper: Shipper, transfer: Transfer): Promise<void> {
  const { stream, chunks } = transfer;
  const isRoom = () => chunks.length < (stream.begin || transfer.isSingle ? 1 : shipper.config.inFlight);
  while (transfer.hasMore && isRoom() && !shipper.signal.aborted) {
    const next = await prepare(shipper, transfer);
    if (!next) break;
    const answer = send(shipper, next.chunk);
    answer.catch(() => {}); // looked at when its turn comes
    chunks.push({ ...next, answer, sentAt: shipper.mono() });
  }
}

function commit(shipper: Shipper, transfer: Transfer, { chunk, marks, sentAt }: Flown): void {
  const { stream } = transfer;
  const took = shipper.mono() - sentAt;
  transfer.isSingle = took > SLOW_MS;
  if (took < SLOW_MS / 4) shipper.chunkBytes = Math.min(shipper.mostBytes, shipper.chunkBytes * 2);
  stream.offset = chunk.end;
  stream.marks = marks;
  stream.conflicts = 0;
  delete stream.begin;
  shipper.streams.isMoved = true;
}

/** After a 409 all that is on its way is waited for; it goes on from the highest offset told. False when the receiver is to be asked. */
async function goBack(shipper: Shipper, transfer: Transfer, first: Answer): Promise<boolean> {
  const { stream, file } = transfer;
  const answers = [first, ...(await settle(shipper, transfer))];
  transfer.isSingle = transfer.hasMore = true;
  const [highest] = answers.filter((answer) => answer.kind === "moved").sort((a, b) => b.offset - a.offset);
  if (highest) {
    stream.conflicts++;
    const goesOn = await moveTo(shipper.streams, stream, file, highest.offset, highest.mark);
    if (stream.conflicts > MOST_CONFLICTS) refuseConflicts(shipper, stream);
    return goesOn;
  }
  if (!answers.some(({ kind }) => kind === "unknown")) return true;
  shipper.unknown.add(stream);
  shipper.askNow = true;
  shipper.asking.ring();
  shipper.wakeup.ring();
  return false;
}

/** Something that answers each chunk like that takes none: it is told, and asked less and less often. */
function refuseConflicts(shipper: Shipper, { conflicts }: Stream): never {
  noteRefused(shipper, shipper.failing, 409, `${conflicts} times in a row it stands at another byte`);
  throw new Refused(retryDelay(conflicts - MOST_CONFLICTS));
}

/** Waits for all answers. What was stored behind a chunk whose answer was lost counts: the receiver stores in order. */
async function settle(shipper: Shipper, transfer: Transfer): Promise<Answer[]> {
  const answers: Answer[] = [];
  for (const flown of transfer.chunks.splice(0)) {
    const answer = await flown.answer.catch(() => undefined);
    if (answer?.kind === "stored") commit(shipper, transfer, flown);
    else if (answer) answers.push(answer);
  }
  return answers;
}

/** The next chunk behind those on their way, encoded; undefined when there is no whole line. */
async function prepare(
  shipper: Shipper,
  transfer: Transfer,
): Promise<Pick<Flown, "chunk" | "marks"> | undefined> {
  const { stream, file, buffer, chunks } = transfer;
  const { config, chunkBytes, skip, streams } = shipper;
  const { size } = stream;
  const offset = chunks.at(-1)?.chunk.end ?? stream.offset;
  const marks = chunks.at(-1)?.marks ?? stream.marks;
  const portion = await readPortion(stream, file, { buffer, offset, newest: marks.at(-1), chunkBytes, skip });
  streams.isMoved ||= stream.size > size; // more than the look saw: on disk, when it vanishes that is told to the byte
  if (!portion) return undefined;
  transfer.hasMore = portion.isFull;
  await nameStreams(shipper, stream);
  const { end, mark, from, skipped, body } = portion;
  const isHeadDue = stream.begin || offset < MARK_BYTES || (stream.head?.length ?? 0) < MARK_BYTES;
  const chunk: EncodedChunk = {
    host: config.host,
    stream: stream.id as string,
    begin: stream.begin,
    offset,
    end,
    mark: wireMark(mark),
    from: from && wireMark(from),
    head: isHeadDue && stream.head ? wireMark(stream.head) : undefined,
    skipped,
    ...encodeBody(body, config.compression),
  };
  return { chunk, marks: addMark(marks, mark) };
}

/** A stream that begins gets its name, with all others that begin now: on stable storage before the first chunk leaves. */
async function nameStreams(shipper: Shipper, stream: Stream): Promise<void> {
  const { streams } = shipper;
  for (const each of stream.id === undefined ? streams.list : [])
    if (each.id === undefined && each.size > each.offset) beginAs(each, each.begin ?? "new", each.offset);
  if (stream.isNamed) return;
  streams.isChanged = true; // the name is to be in both saves
  await saveCursor(shipper);
  stream.isNamed = true; // a state folder that can't be written stops nothing
}

async function send(shipper: Shipper, chunk: EncodedChunk): Promise<Answer> {
  failpoint("shipper:sending");
  const bytes = chunk.end - chunk.offset;
  const answer = await shipper.uploader.send({ ...news(shipper, bytes), ...chunk });
  if (answer.kind === "refused") {
    if (answer.isSlow) shipper.chunkBytes = Math.max(MIN_CHUNK_BYTES, shipper.chunkBytes >> 1);
    noteRefused(shipper, shipper.failing, answer.status, answer.reason);
    throw new Refused(answer.waitMs);
  }
  if (answer.kind === "tooLarge") {
    if (bytes <= shipper.chunkBytes) halve(shipper); // others of the same size may be told so, too
    return answer;
  }
  noteAnswered(shipper, shipper.unanswered);
  if (answer.kind !== "stored") return answer;
  noteAnswered(shipper, shipper.failing);
  shipper.sent.lines += answer.lines;
  shipper.sent.bytes += bytes;
  shipper.sent.chunks++;
  return answer;
}

function news(shipper: Shipper, ahead = 0) {
  const { streams } = shipper;
  const name = `log-rt-sync/${VERSION}`;
  const agent = formatAgent({ name, lacksLog: shipper.lacking > 1, lostIn: streams.lostIn });
  return { lag: Math.max(0, lagOf(shipper) - ahead), lost: streams.lost, shipper: streams.shipper, agent };
}

function noteRefused(shipper: Shipper, statuses: Set<number>, status: number, reason: string): void {
  statuses.add(status);
  const fields = { receiver: shipper.config.receiver, status: status || undefined, reason };
  shipper.faults.failed(`receiver ${status}`, "receiver does not take chunks: held, and tried again", fields);
}

function noteAnswered(shipper: Shipper, statuses: Set<number>): void {
  const { failing, faults, now, config } = shipper;
  const { receiver } = config;
  shipper.answeredAt = now();
  for (const status of statuses) {
    statuses.delete(status);
    if (!failing.has(status))
      faults.recovered(`receiver ${status}`, "receiver takes chunks again", { receiver });
  }
}

function halve(shipper: Shipper): void {
  const { faults, failing, config } = shipper;
  if (shipper.chunkBytes <= MIN_CHUNK_BYTES) {
    faults.failed("receiver 413", "receiver takes no chunk, however small", { receiver: config.receiver });
    failing.add(413);
    throw new Refused(10_000);
  }
  shipper.mostBytes = shipper.chunkBytes = Math.max(MIN_CHUNK_BYTES, shipper.chunkBytes >> 1);
  shipper.log.warn("chunk is too large for the receiver: halved", { chunkBytes: shipper.chunkBytes });
}

function lagOf({ streams }: Shipper): number {
  const left = ({ size, offset, until }: Stream) => Math.max(0, (until ?? size) - offset);
  return streams.list.reduce((bytes, each) => bytes + left(each), 0);
}

// ---- what the receiver says of a stream

/** The heartbeat: the question where all streams stand, whatever else goes on; at once when something hangs on the answer. */
async function heartbeat(shipper: Shipper): Promise<void> {
  const { signal, mono, streams } = shipper;
  let told = streams.lost;
  for (let dueAt = mono() + Math.min(500, shipper.config.heartbeatSeconds * 1000); !signal.aborted; ) {
    const everyMs = shipper.config.heartbeatSeconds * 1000;
    const isDue = mono() >= dueAt || shipper.askNow || streams.lost !== told;
    if (isDue && mono() >= shipper.askAt && (streams.asked || streams.seenAt > 0)) {
      told = streams.lost;
      const isAnswered = await ask(shipper);
      dueAt = mono() + (isAnswered ? everyMs : Math.min(everyMs, FAULT_MS));
      if (!isAnswered) await wait(Math.min(everyMs, FAULT_MS), signal);
    }
    await shipper.asking.wait(Math.max(10, Math.max(dueAt, shipper.askAt) - mono()), signal);
  }
}

/** Asks where the streams stand, and takes what is told. False when it was not answered. */
async function ask(shipper: Shipper): Promise<boolean> {
  const { streams, config, signal } = shipper;
  const { orphans } = streams;
  await saveFirst(shipper);
  const asked = new Map<string, { stream: Stream; committed: number | undefined }>();
  for (const stream of streams.list) {
    const { id, begin, offset } = stream; // answered before the question leaves
    if (id !== undefined) asked.set(id, { stream, committed: begin ? undefined : offset });
  }
  const isFirst = !streams.asked;
  shipper.askNow = false;
  shipper.lacking = streams.paths.missing().length > 0 ? shipper.lacking + 1 : 0;
  try {
    const through = isFirst ? undefined : throughOf(shipper);
    const names = isFirst ? undefined : [...asked.keys()];
    const told = await shipper.uploader.ask(config.host, names, { ...news(shipper), through });
    noteAnswered(shipper, shipper.unanswered);
    streams.told = told;
    if (isFirst) takeFirstAnswer(streams, told);
    if (isFirst && told.length > 0) shipper.nextLookAt = 0;
    const byName = new Map(told.map((status) => [status.stream, status]));
    for (const [id, { stream, committed }] of asked)
      if (stream.id === id) {
        shipper.unknown.delete(stream);
        takeStatus(streams, stream, byName.get(id), committed);
      }
    for (const stream of orphans) {
      const isGone = stream.phase.is === "gone" && !stream.file && !stream.isBusy;
      if (isGone && streams.list.includes(stream)) streams.giveUp(stream);
    }
    streams.orphans = [];
    shipper.wakeup.ring();
    return true;
  } catch (error) {
    shipper.askNow = true;
    if (signal.aborted) return false;
    if (!(error instanceof Unanswered)) throw error;
    noteRefused(shipper, shipper.unanswered, error.status, error.reason);
    return false;
  }
}

/**
 * The time up to which every line of every file is answered, as soon as all is that a look at that time saw; undefined
 * while that is not so. Each answer begins the next look.
 */
function throughOf(shipper: Shipper): number | undefined {
  const { noted, streams, faults } = shipper;
  const isDone = ([stream, size]: [Stream, number]) => {
    const { until = size, offset, drained, wayBack } = stream;
    const end = drained?.from === offset ? Math.max(offset, drained.to) : offset;
    return wayBack === undefined && Math.min(until, size) <= end;
  };
  const isSettled = streams.isSettled && streams.seenAt > (noted?.at ?? 0);
  const isAll = noted && isSettled && [...noted.sizes].every(isDone) && faults.lasting() === 0;
  const at = isAll ? noted.at : undefined;
  if (isAll || !noted)
    shipper.noted = { at: streams.seenAt, sizes: new Map(streams.list.map((each) => [each, each.size])) };
  return at;
}

// ---- beside the files

async function keepSaving(shipper: Shipper): Promise<void> {
  while (!shipper.signal.aborted) {
    await wait(SAVE_EVERY_MS, shipper.signal);
    if (shipper.streams.isMoved || shipper.streams.isChanged) await saveCursor(shipper);
  }
}

/** Saves the cursor. All that it says is shipped is on the receiver's stable storage. */
export async function saveCursor({ config, faults, streams }: Shipper): Promise<void> {
  const { stateDir } = config;
  try {
    await streams.save();
    failpoint("shipper:saved");
    faults.recovered("cursor", "cursor is saved again", { stateDir });
  } catch (error) {
    faults.failed("cursor", "cannot save cursor: shipping goes on", { stateDir, error: errorMessage(error) });
  }
}

/** A line a minute while there is traffic; on a terminal also the progress of a backlog. */
async function report(shipper: Shipper): Promise<void> {
  const { signal, log, mono, sent } = shipper;
  let before = { ...sent };
  let progress: ReturnType<typeof createProgress> | undefined;
  for (let logged = mono(); !signal.aborted; ) {
    await wait(1000, signal);
    const lag = lagOf(shipper);
    if (lag > 16 * shipper.config.chunkBytes) {
      progress ??= createProgress("backlog", sent.bytes + lag);
      progress.show(sent.bytes);
    } else {
      progress?.end();
      progress = undefined;
    }
    if (mono() - logged < TELL_EVERY_MS && !signal.aborted) continue;
    logged = mono();
    if (sent.chunks === before.chunks) continue;
    const { lines, bytes, chunks } = before;
    log.info("shipped", {
      lines: sent.lines - lines,
      bytes: sent.bytes - bytes,
      chunks: sent.chunks - chunks,
      lag,
    });
    before = { ...sent };
  }
}

/** `<stateDir>/shipper.prom`, for the textfile collector of node_exporter. */
async function keepMetrics(shipper: Shipper): Promise<void> {
  const { signal, config, log, faults, now, sent, streams } = shipper;
  const startedAt = now();
  const own = createFaultLog(log); // no fault of shipping
  while (!signal.aborted) {
    const metrics: Metric[] = [
      ["build_info", "gauge", "Version that runs", [[{ version: VERSION }, 1]]],
      ["start_time_seconds", "gauge", "When it started", startedAt / 1000],
      ["last_run_timestamp_seconds", "gauge", "When this file was written", now() / 1000],
      [
        "last_answer_timestamp_seconds",
        "gauge",
        "When the receiver answered last",
        shipper.answeredAt / 1000,
      ],
      ["lines_total", "counter", "Lines shipped since the start", sent.lines],
      ["bytes_total", "counter", "Bytes of logs shipped since the start", sent.bytes],
      ["chunks_total", "counter", "Chunks shipped since the start", sent.chunks],
      ["lag_bytes", "gauge", "Bytes that are still to be shipped", lagOf(shipper)],
      ["lost_bytes_total", "counter", "Bytes that vanished before they were read", streams.lost],
      ["files", "gauge", "Followed logs", streams.logs.size],
      ["faults", "gauge", "Files, folders and servers that can't be used now", faults.lasting()],
    ];
    try {
      await writeMetrics(config.stateDir, "shipper", metrics);
      own.recovered("metrics", "metrics are written again", { stateDir: config.stateDir });
    } catch (error) {
      const fields = { stateDir: config.stateDir, error: errorMessage(error) };
      own.failed("metrics", "cannot write metrics: shipping goes on", fields);
    }
    await wait(METRICS_EVERY_MS, signal);
  }
}

// ---- for the operator

/** What only the host can tell, for `--check`. */
async function check({ config, signal, checks }: Service<"shipper">, connect: boolean): Promise<void> {
  for (const key of ["ca", "cert", "key"] as const) await checks.file(`shipper.${key}`, config[key]);
  const asks = checks.asks(connect);
  const paths = new Paths(config.files, config.olddir, config.stateDir);
  const live = paths.livePaths();
  const missing = paths.missing();
  for (const path of live.filter((each) => !missing.includes(each))) {
    const other = whyNotFollowed(path);
    if (other) checks.fault(`shipper.files: Cannot follow "${path}": ${other}`, 1);
    else await checks.step(`shipper.files: ${path}`, async () => (await LogFile.open(path)).close());
  }
  for (const pattern of missing) {
    const { text = "no file has such a name" } = (await whatIsMissing(pattern).catch(() => undefined)) ?? {};
    // the logs of a glob may come later, as long as there is something to ship
    if (isGlob(pattern) && live.length > 0) checks.warn(`shipper.files: nothing matches ${pattern} yet`);
    else checks.fault(`shipper.files: ${pattern}: ${text}`, EXIT.failed);
  }
  await checks.folder("shipper.stateDir", config.stateDir, "make");
  if (!asks) return;
  await checks.step(`shipper.receiver: ${config.receiver}`, async () => {
    await new Uploader(config, signal).ask(config.host, [], {});
  });
}

if (import.meta.main) {
  await runScript(
    {
      name: "shipper",
      about: "Follows log files and ships every line to the receiver: none lost, none twice.",
      flags: {
        once: "ship to the end of every file, then exit",
        status: "show each followed file, what of it is shipped and delivered",
        "delivered=FILE": "0 when all of this file is at the client, whatever it is called now",
      },
      check,
    },
    main,
  );
}
