/**
 * shipper: every line that nginx writes into a log file goes to the receiver, once and in the order of the file.
 *
 *   1. read      whole lines from the stream's offset, checked against the bytes just before it
 *   2. send      POST with stream and byte range; held and tried again for as long as it takes
 *   3. commit    the receiver answered 200: the lines are on its stable storage; the offset moves on
 *   4. save      the cursor, durably, at most once a second and at the end
 *
 * A crash after 1 or 2 repeats the chunk: the receiver answers 409 with the offset where it stands. A crash
 * before 4 does the same. A rotated file is read to its end, and until it was quiet for a while, before it
 * counts as done; a file that vanishes unread is counted in bytes and told to the receiver. Which file is which
 * says lib/tail/family.ts, by content and not by name; 1 to 3 are in lib/transfer.ts.
 */
import { readFileSync, statSync } from "node:fs";
import { access, constants, readdir } from "node:fs/promises";
import { dirname, join } from "node:path";
import type { StreamStatus } from "./lib/chunk.ts";
import { type Config, readSecret } from "./lib/config.ts";
import { failpoint, holdLock, makeFolder, moveDurably } from "./lib/durable.ts";
import {
  createFaultLog,
  createProgress,
  EXIT,
  errorMessage,
  type FaultLog,
  formatBytes,
  formatDuration,
  type Log,
  OperatorError,
  runScript,
  type Service,
  wait,
} from "./lib/service.ts";
import {
  type Cursor,
  type CursorFound,
  cursorPath,
  type FamilyState,
  readCursor,
  type StreamState,
  writeCursor,
} from "./lib/tail/cursor.ts";
import { scanFamily, settleUnasked } from "./lib/tail/family.ts";
import { type LogFile, MARK_BYTES, newestFit, openLog } from "./lib/tail/file.ts";
import { expandFiles, look, whyNotFollowed } from "./lib/tail/rotation.ts";
import {
  beginAfterTruncation,
  beginStream,
  createFamily,
  drawName,
  type Family,
  finishStream,
  isCompressed,
  liveStream,
  mayHaveGrown,
  openStream,
  type ScanContext,
  type Stream,
  toState,
} from "./lib/tail/streams.ts";
import { type Bell, createWatch } from "./lib/tail/watch.ts";
import { createTransfer, Refused, type Transfer, Truncated } from "./lib/transfer.ts";
import { createUploader, Unanswered } from "./lib/upload.ts";

/** Pause after a folder could not be read, or the receiver not be asked where a file stands. */
const FAULT_MS = 1000;
const SAVE_EVERY_MS = 1000;
/** With a cursor that is damaged, a chunk of the process before may still be on its way for so long. */
const PATIENCE_MS = 10_000;
/** Globs are expanded no more often than that. */
const NAMES_MS = 200;
/** At the start the first chunk has so long to be the first sign of life. */
const FIRST_BEAT_MS = 500;
const TELL_EVERY_MS = 60_000;

/** Everything that the passes share. */
export interface Shipper {
  config: Config["shipper"];
  log: Log;
  signal: AbortSignal;
  now: () => number;
  families: Map<string, Family>;
  transfer: Transfer;
  faults: FaultLog;
  context: ScanContext;
  /** The set of streams has changed since the last save. */
  streamsChanged: boolean;
  /** The save in hand. */
  saving: Promise<void>;
  /** A look at all files, for `Log-Through`. */
  seen?: { at: number; sizes: { stream: Stream; size: number }[] };
}

async function main({ config, log, signal, now, flags }: Service<"shipper">): Promise<number> {
  if (flags.status) return printStatus(config, now());
  await takeStateDir(config, log);
  const shipper = await openShipper(config, { log, signal, now });
  let code: number = EXIT.done;
  if (flags.once) code = await drainAll(shipper);
  else await Promise.all([followAll(shipper), beat(shipper), keepSaving(shipper), tell(shipper)]);
  await saveCursor(shipper);
  return code;
}

/** Makes and locks the state folder. When it can't be written, shipping goes on all the same. */
async function takeStateDir({ stateDir }: Config["shipper"], log: Log): Promise<void> {
  try {
    await makeFolder(stateDir);
    await holdLock(join(stateDir, ".lock"), `The state folder ${stateDir}`);
  } catch (error) {
    if (error instanceof OperatorError) throw error;
    const consequence = "shipping goes on; a restart asks the receiver where it stands";
    log.error("cannot use state folder", { stateDir, error: errorMessage(error), consequence });
  }
}

/** A shipper that has taken up what the cursor knows and what the config names. */
export async function openShipper(
  config: Config["shipper"],
  { log, signal, now }: Pick<Shipper, "log" | "signal" | "now">,
): Promise<Shipper> {
  const found = await findCursor(config, log);
  const faults = createFaultLog(log, now);
  const transfer = createTransfer({
    config,
    log,
    signal,
    now,
    faults,
    lag: () => lagOf(shipper),
    named() {
      shipper.streamsChanged = true;
      return saveCursor(shipper);
    },
  });
  let known: Promise<StreamStatus[]> | undefined;
  const shipper: Shipper = {
    ...{
      config,
      log,
      signal,
      now,
      faults,
      transfer,
      families: new Map(),
      streamsChanged: false,
      saving: Promise.resolve(),
    },
    context: {
      ...{ config, now, log, faults, signal },
      ask: (names) => transfer.ask(names),
      known() {
        known ??= askAll(
          shipper,
          found.state === "absent" ? 0 : Math.min(PATIENCE_MS, config.timeoutSeconds * 1000),
        );
        known.catch(() => {
          known = undefined;
        });
        return known;
      },
      taken: () =>
        new Set([...shipper.families.values()].flatMap(({ streams }) => streams.map(({ id }) => id ?? ""))),
      lose: (bytes, stream) => loseBytes(shipper, bytes, stream),
      changed() {
        shipper.streamsChanged = true;
      },
    },
  };
  await loadFamilies(shipper, found);
  return shipper;
}

/** Counts bytes that were gone before they could be read; the next heartbeat tells them. */
function loseBytes({ transfer, log }: Shipper, bytes: number, { path, id }: StreamState): void {
  transfer.lost += bytes;
  log.error("bytes lost: they were gone before they could be read", { path, stream: id, bytes });
}

/** The cursor, or that there is none; a damaged one is told. */
async function findCursor({ stateDir }: Config["shipper"], log: Log): Promise<CursorFound> {
  const found = await readCursor(stateDir).catch((): CursorFound => ({ state: "damaged" }));
  if (found.state === "damaged" || found.state === "older") {
    const instead =
      found.state === "older" ? "the one before it is taken" : "the receiver is asked where each file stands";
    log.warn("cursor is damaged", { cursor: cursorPath(stateDir), instead });
  }
  return found;
}

async function loadFamilies(shipper: Shipper, found: CursorFound): Promise<void> {
  const { config, now, transfer } = shipper;
  const known = "cursor" in found ? found.cursor : undefined;
  transfer.lost = known?.lost ?? 0;
  transfer.shipper = known?.shipper ?? drawName();
  for (const [path, state] of Object.entries(known?.families ?? {})) {
    // One that the config does not name any more is followed until everything of it is shipped.
    const unfinished = state.start === "recover" || state.streams.some((stream) => !stream.done);
    if (known?.version === 1) takeOverNames(state);
    if (unfinished) shipper.families.set(path, createFamily(path, state.start ?? "known", now(), state));
  }
  for (const path of await expandFiles(config.files, shipper.families.keys())) {
    const state = known?.families[path];
    const start = state ? (state.start ?? "known") : found.state === "damaged" ? "recover" : "first";
    shipper.families.set(path, createFamily(path, start, now(), state));
  }
  if (shipper.families.size === 0) shipper.log.warn("no file matches yet", { files: config.files.join(" ") });
  if (found.state === "absent") await takeOverOffset(shipper);
}

/** Streams of version 1.0: the receiver has no marks of them, and what was shipped counts as delivered until it says otherwise. */
function takeOverNames({ streams }: FamilyState): void {
  for (const stream of streams) {
    if (stream.id === undefined) continue;
    stream.isOld = true;
    stream.delivered = stream.offset;
  }
}

/** All that the receiver knows of this host, when a chunk of the process before can't be on its way any more. */
async function askAll({ transfer, signal }: Shipper, waitMs: number): Promise<StreamStatus[]> {
  await wait(waitMs - process.uptime() * 1000, signal);
  return transfer.ask();
}

/** The offset file of the original shipper: its one live file goes on from there at the very first start. */
async function takeOverOffset(shipper: Shipper): Promise<void> {
  const path = join(shipper.config.stateDir, "latest.offset");
  const [family, ...others] = shipper.families.values();
  let text: string;
  try {
    text = readFileSync(path, "utf8").trim();
  } catch {
    return; // the usual case: there was no other shipper before
  }
  const size = family && (await look(family.path))?.size;
  if (!family || others.length > 0 || size === undefined || !/^\d{1,16}$/.test(text) || Number(text) > size) {
    const expected = "expected an offset within the one file that is followed; mend or remove it";
    throw new OperatorError(`Cannot take over "${path}": it says "${text.slice(0, 40)}", ${expected}`);
  }
  const file = await openLog(family.path);
  await beginStream(family, file, Number(text), shipper.context);
  await file.close();
  shipper.log.info("offset taken over", { path, offset: Number(text) });
  await saveCursor(shipper);
  await moveDurably(path, `${path}.imported`);
}

// ---- the loops

/** Ships to the end of every file, and ends when the receiver has everything that could be read. */
async function drainAll(shipper: Shipper): Promise<number> {
  const { signal, now, transfer } = shipper;
  const progress = createProgress("shipping", await bytesAhead(shipper));
  const ticker = setInterval(() => progress.show(transfer.sent.bytes), 250);
  const drainFamily = async (family: Family) => {
    while (!signal.aborted) {
      const pass = await shipOnce(shipper, family);
      if (pass.atEnd) return;
      await wait(pass.waitMs ?? Math.min(1000, Math.max(10, family.scanAt - now())), signal);
    }
  };
  await Promise.all([...shipper.families.values()].map(drainFamily));
  if (!signal.aborted && transfer.lost > 0) await askOnce(shipper);
  clearInterval(ticker);
  progress.end();
  const faults = shipper.faults.lasting();
  const fields = { files: shipper.families.size, ...transfer.sent };
  if (faults === 0) shipper.log.info("shipped to the end of every file", fields);
  else shipper.log.error("shipped what could be read", { ...fields, faults });
  return faults === 0 || signal.aborted ? EXIT.done : EXIT.failed;
}

/** Bytes on disk behind the offsets, before the first look into the folders. */
async function bytesAhead(shipper: Shipper): Promise<number> {
  let bytes = 0;
  for (const family of shipper.families.values()) {
    const size = (await look(family.path).catch(() => undefined))?.size ?? 0;
    bytes += Math.max(0, size - (family.streams.at(-1)?.offset ?? 0));
  }
  return bytes;
}

/** Follows every file in a loop of its own; new matches join at once where events tell of them, else within `pollSeconds`. */
async function followAll(shipper: Shipper): Promise<void> {
  const { config, signal, now } = shipper;
  const watch = createWatch(now, config.olddir);
  const followed = new Set<Family>();
  const loops: Promise<void>[] = [];
  const failed = new AbortController(); // a bug in one loop ends them all, and the script
  const either = AbortSignal.any([signal, failed.signal]);
  while (!either.aborted) {
    for (const path of await expandFiles(config.files, shipper.families.keys())) {
      // A file that came while we are running is all ours, whatever startAt says.
      const since = now() - config.pollSeconds * 2000;
      if (!shipper.families.has(path)) shipper.families.set(path, createFamily(path, "new", since));
    }
    for (const family of shipper.families.values()) {
      if (followed.has(family)) continue;
      followed.add(family);
      loops.push(follow(shipper, family, watch.bellOf(family)).catch((error) => failed.abort(error)));
    }
    await watch.update();
    await wait(NAMES_MS, either);
    await watch.names.wait(config.pollSeconds * 1000, either);
  }
  watch.close();
  failed.signal.throwIfAborted();
  await Promise.all(loops);
}

/** A line after a pause goes at once, steady traffic once per `flushMs`, a backlog without waiting. */
async function follow(shipper: Shipper, family: Family, bell: Bell): Promise<void> {
  const { config, signal, now } = shipper;
  while (!signal.aborted) {
    const started = now();
    const pass = await shipOnce(shipper, family);
    if (pass.waitMs !== undefined) await wait(pass.waitMs, signal);
    else if (pass.shipped) await wait(config.flushMs - (now() - started), signal);
    else await bell.wait(Math.max(10, family.scanAt - now()), signal);
  }
}

/** What one pass over a family came to. */
export interface Pass {
  shipped: boolean;
  /** Everything that there is was shipped, and no file is in the middle of being copied or compressed. */
  atEnd: boolean;
  /** The receiver refused: try again after so many ms. */
  waitMs?: number;
}

/** One pass over a family: looks for rotation, then ships every stream to its end, oldest first. */
export async function shipOnce(shipper: Shipper, family: Family): Promise<Pass> {
  const { transfer, now, context, signal, faults } = shipper;
  const before = transfer.sent.chunks;
  const pass: Pass = { shipped: false, atEnd: true };
  try {
    const live = await look(family.path);
    if (live?.key !== family.liveKey || now() >= family.scanAt) await scanFamily(family, context);
    faults.recovered(`folder ${family.path}`, "folder can be read again", { path: family.path });
    if (live) faults.recovered(`kind ${family.path}`, "log file can be followed", { path: family.path });
    else await tellKind(shipper, family);
    await settleUnasked(family, shipper.context);
    const streams = family.start === "recover" ? [] : [...family.streams]; // all of them are found first
    for (const stream of streams) {
      if (family.liveHeld && stream === liveStream(family)) continue;
      if (stream.done || signal.aborted) continue;
      const asSeen = live && stream === liveStream(family) ? `${live.size} ${live.mtimeMs}` : "";
      if (asSeen !== "" && asSeen === stream.endedAs) continue; // not touched since its end was reached
      if (!(await shipStream(shipper, family, stream))) pass.atEnd = false;
      else stream.endedAs = stream.file && stream.size === live?.size ? asSeen : "";
    }
  } catch (error) {
    if (error instanceof Refused) pass.waitMs = error.waitMs;
    else if (error instanceof Unanswered)
      pass.waitMs = FAULT_MS; // told already
    else {
      tellFault(shipper, `folder ${family.path}`, "cannot look for log file", family.path, error);
      pass.waitMs = FAULT_MS;
    }
    pass.atEnd = false;
  }
  pass.shipped = transfer.sent.chunks > before;
  if (family.scanAt === 0 || family.unsettled) pass.atEnd = false;
  return pass;
}

/** Tells of a directory or a FIFO under a log's name, which otherwise counts as a log that is not there yet. */
async function tellKind({ faults }: Shipper, { path }: Family): Promise<void> {
  const error = await whyNotFollowed(path);
  if (error) faults.failed(`kind ${path}`, "cannot follow log file", { path, error });
}

/** Ships one stream to its end, and decides whether it is done. True when its end was reached. */
async function shipStream(shipper: Shipper, family: Family, stream: Stream): Promise<boolean> {
  const isLive = stream === liveStream(family);
  if (!isLive && !mayHaveGrown(stream)) return true;
  try {
    stream.file ??= await openStream(family, stream);
    if (!stream.file) return true; // the next look into the folder finds it, or that it is gone
    await shipper.transfer.drain(stream);
    if (!isLive) await finishStream(family, stream, shipper.context);
    shipper.faults.recovered(stream.path, "log file can be read again", { path: stream.path });
    return true;
  } catch (error) {
    if (error instanceof Refused || shipper.signal.aborted) throw error;
    if (error instanceof Truncated && stream.file) {
      if (await goOnBehindFit(shipper, stream, stream.file)) return false;
      await beginAfterTruncation(family, stream, stream.file, shipper.context);
      return false;
    }
    await stream.file?.close().catch(() => {});
    stream.file = undefined;
    tellFault(shipper, stream.path, "cannot read log file", stream.path, error);
    return true; // the others go on; this one is tried again at the next pass
  }
}

/**
 * The newest bytes are not the ones that were shipped (power loss, snapshot, restored, edited), but much before them is:
 * a new stream begins behind that. False when at most the head is the same: then it is another log.
 */
async function goOnBehindFit(shipper: Shipper, stream: Stream, file: LogFile): Promise<boolean> {
  const marks = await newestFit(file, stream.signature.marks);
  const end = marks.at(-1)?.end ?? 0;
  if (end <= MARK_BYTES) return false;
  const fields = { path: stream.path, stream: stream.id, shipped: stream.offset, from: end };
  shipper.log.warn("file has other bytes behind what it kept: a new stream begins there", fields);
  Object.assign(stream, {
    id: undefined,
    offset: end,
    signature: { ...stream.signature, marks },
    isOld: undefined,
  });
  delete stream.delivered;
  shipper.streamsChanged = true;
  return true;
}

/** Tells what the operator or time can mend; throws a bug on. */
function tellFault(shipper: Shipper, key: string, message: string, path: string, error: unknown): void {
  if (shipper.signal.aborted) return;
  if (error instanceof TypeError || error instanceof ReferenceError || error instanceof RangeError)
    throw error;
  shipper.faults.failed(key, message, { path, error: errorMessage(error) });
}

/** Bytes that are still to be shipped, over all files. */
function lagOf(shipper: Shipper): number {
  let bytes = 0;
  for (const { streams } of shipper.families.values()) {
    for (const stream of streams) if (!stream.done) bytes += Math.max(0, stream.size - stream.offset);
  }
  return bytes;
}

// ---- beside the files

/** The heartbeat: the question where all streams stand, whatever else goes on; at once when bytes were lost. */
async function beat(shipper: Shipper): Promise<void> {
  const { config, signal, transfer } = shipper;
  const everyMs = config.heartbeatSeconds * 1000;
  let told = transfer.lost;
  await wait(Math.min(FIRST_BEAT_MS, everyMs), signal);
  for (let dueAt = 0; !signal.aborted; ) {
    if (performance.now() >= dueAt || transfer.lost !== told) {
      told = transfer.lost;
      dueAt = performance.now() + ((await askOnce(shipper)) ? everyMs : Math.min(everyMs, FAULT_MS));
    }
    await wait(Math.min(1000, Math.max(50, dueAt - performance.now())), signal);
  }
}

/** Asks where the streams stand, and takes what is told. False when it was not answered. */
async function askOnce(shipper: Shipper): Promise<boolean> {
  const { transfer, signal, now } = shipper;
  const asked = new Map<string, { stream: Stream; offset: number }>();
  for (const { streams } of shipper.families.values()) {
    for (const stream of streams) {
      if (stream.id === undefined || stream.begin !== undefined) continue;
      asked.set(stream.id, { stream, offset: stream.offset }); // what was answered before the question leaves
    }
  }
  try {
    const told = await transfer.ask([...asked.keys()], through(shipper));
    for (const [id, { stream, offset }] of asked) {
      const found = told.find((status) => status.stream === id);
      if (stream.id === id) takeStatus(shipper, stream, found, offset, now());
    }
    return true;
  } catch (error) {
    if (signal.aborted) return false;
    if (!(error instanceof Unanswered)) throw error;
    return false; // told already
  }
}

/** A stream that the receiver has lost, or has less of than it had answered, goes back to what was delivered of it. */
function takeStatus(
  shipper: Shipper,
  stream: Stream,
  found: StreamStatus | undefined,
  offset: number,
  at: number,
): void {
  if (found && found.offset >= offset) {
    if (found.delivered !== undefined) Object.assign(stream, { delivered: found.delivered, deliveredAt: at });
    return;
  }
  const wayBack = Math.min(offset, stream.delivered ?? stream.from ?? 0);
  stream.wayBack = wayBack;
  if (wayBack >= offset && stream.done) return; // all of it is delivered: nothing is left to be said of it
  stream.done = false;
  stream.endSeenAt = undefined;
  stream.endedAs = "";
  shipper.streamsChanged = true;
}

/**
 * The time up to which every line of every file is answered, as soon as all is that a look at that time saw; undefined
 * while that is not so. Each answer begins the next look.
 */
function through(shipper: Shipper): number | undefined {
  const families = [...shipper.families.values()];
  const isDone = ({ stream, size }: { stream: Stream; size: number }) =>
    stream.done || stream.offset >= size || (stream.drainedAt ?? -1) >= size;
  const { seen } = shipper;
  const isSettled = families.every(({ scannedAt = 0, unsettled, start }) => {
    return start === "known" && !unsettled && scannedAt > (seen?.at ?? 0);
  });
  const at =
    seen && isSettled && seen.sizes.every(isDone) && shipper.faults.lasting() === 0 ? seen.at : undefined;
  if (at !== undefined || !seen) shipper.seen = { at: shipper.now(), sizes: families.flatMap(sizesOf) };
  return at;
}

/** What there is to be answered: the sizes of a family's files now. */
function sizesOf(family: Family): { stream: Stream; size: number }[] {
  return family.streams.map((stream) => {
    const found =
      stream.done || isCompressed(stream.path) ? undefined : statSync(stream.path, { throwIfNoEntry: false });
    return { stream, size: Math.max(stream.size, found?.size ?? 0) };
  });
}

async function keepSaving(shipper: Shipper): Promise<void> {
  while (!shipper.signal.aborted) {
    await wait(SAVE_EVERY_MS, shipper.signal);
    if (shipper.transfer.moved || shipper.streamsChanged) await saveCursor(shipper);
  }
}

/** Saves the cursor, one save after the other. All that it says is shipped is on the receiver's stable storage. */
export function saveCursor(shipper: Shipper): Promise<void> {
  shipper.saving = shipper.saving.then(() => saveNow(shipper));
  return shipper.saving;
}

async function saveNow(shipper: Shipper): Promise<void> {
  const { config, transfer, faults } = shipper;
  const keep = shipper.streamsChanged;
  shipper.streamsChanged = transfer.moved = false;
  const state: Cursor = { version: 2, shipper: transfer.shipper, lost: transfer.lost, families: {} };
  for (const [path, family] of shipper.families) state.families[path] = toState(family);
  try {
    await writeCursor(config.stateDir, state, keep);
    failpoint("shipper:saved");
    faults.recovered("cursor", "cursor is saved again", { stateDir: config.stateDir });
  } catch (error) {
    transfer.moved = true;
    shipper.streamsChanged ||= keep;
    const fields = { stateDir: config.stateDir, error: errorMessage(error) };
    faults.failed("cursor", "cannot save cursor: shipping goes on", fields);
  }
}

/** A line a minute while there is traffic; on a terminal also the progress of a backlog. */
async function tell(shipper: Shipper): Promise<void> {
  const { signal, log, now } = shipper;
  const { sent } = shipper.transfer;
  let before = { ...sent };
  let progress: ReturnType<typeof createProgress> | undefined;
  for (let told = now(); !signal.aborted; ) {
    await wait(1000, signal);
    const lag = lagOf(shipper);
    if (lag > 16 * shipper.config.chunkBytes) {
      progress ??= createProgress("backlog", sent.bytes + lag);
      progress.show(sent.bytes);
    } else {
      progress?.end();
      progress = undefined;
    }
    if (now() - told < TELL_EVERY_MS && !signal.aborted) continue;
    told = now();
    if (sent.chunks === before.chunks) continue;
    const [lines, bytes, chunks] = [
      sent.lines - before.lines,
      sent.bytes - before.bytes,
      sent.chunks - before.chunks,
    ];
    log.info("shipped", { lines, bytes, chunks, lag });
    before = { ...sent };
  }
}

// ---- for the operator

async function printStatus(config: Config["shipper"], now: number): Promise<number> {
  const found = await readCursor(config.stateDir);
  if (!("cursor" in found)) {
    const reason =
      found.state === "absent"
        ? "nothing was shipped yet"
        : "it is damaged; the next start asks the receiver";
    process.stdout.write(`No cursor in ${config.stateDir}: ${reason}\n`);
    return found.state === "absent" ? EXIT.done : EXIT.failed;
  }
  const rows = [["FILE", "STREAM", "SIZE", "OFFSET", "LAG", "SINCE"]];
  for (const { streams } of Object.values(found.cursor.families)) {
    for (const { path, id, offset, since, size: seen } of streams.filter(({ done }) => !done)) {
      const size = (await look(path).catch(() => undefined))?.size ?? seen;
      const lag = formatBytes(Math.max(0, size - offset));
      const age = `${formatDuration(now - since)} ago`;
      rows.push([path, id ?? "-", String(size), String(offset), lag, age]);
    }
  }
  const widths = (rows[0] ?? []).map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0)));
  for (const row of rows)
    process.stdout.write(
      `${row
        .map((cell, i) => cell.padEnd(widths[i] ?? 0))
        .join("  ")
        .trimEnd()}\n`,
    );
  const { lost } = found.cursor;
  if (lost > 0) process.stdout.write(`Lost since the cursor began: ${formatBytes(lost)}\n`);
  return EXIT.done;
}

/** What only the host can tell, for `--check`. */
async function check({ config, signal }: Service<"shipper">, connect: boolean): Promise<string[]> {
  const faults: string[] = [];
  const attempt = async (key: string, action: () => unknown) => {
    try {
      await action();
    } catch (error) {
      faults.push(`shipper.${key}: ${errorMessage(error)}`);
    }
  };
  for (const path of await expandFiles(config.files, [])) {
    await attempt("files", async () => {
      await readdir(dirname(path));
      const other = await whyNotFollowed(path);
      if (other) throw new OperatorError(`Cannot follow "${path}": ${other}`);
      if (await look(path)) await (await openLog(path)).close(); // one that is not there yet is no fault
    });
  }
  await attempt("stateDir", async () => {
    await makeFolder(config.stateDir);
    await access(config.stateDir, constants.W_OK);
  });
  await attempt("token", () => config.token && readSecret(config.token));
  for (const key of ["ca", "cert", "key"] as const) {
    const file = config[key];
    if (file !== undefined) await attempt(key, () => readSecret({ file }));
  }
  if (connect && faults.length === 0) {
    await attempt("receiver", () => createUploader(config, signal).ask(config.host, [], {}));
  }
  return faults;
}

if (import.meta.main) {
  await runScript(
    {
      name: "shipper",
      about: "Follows log files and ships every line to the receiver: none lost, none twice.",
      flags: {
        once: "ship to the end of every file, then exit",
        status: "show each followed file and its lag",
      },
      check,
    },
    main,
  );
}
