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
 * says lib/family.ts, by content and not by name.
 */
import { type FSWatcher, readFileSync, watch } from "node:fs";
import { access, constants, readdir } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { IDLE_STREAM } from "./lib/chunk.ts";
import { type Config, readSecret } from "./lib/config.ts";
import { type Cursor, type CursorFound, cursorPath, readCursor, writeCursor } from "./lib/cursor.ts";
import { makeFolder, moveDurably, reached } from "./lib/durable.ts";
import {
  beginAfterTruncation,
  createFamily,
  type Family,
  liveStream,
  nameStream,
  type ScanContext,
  type Stream,
  scanFamily,
} from "./lib/family.ts";
import { holdLock } from "./lib/lock.ts";
import { expandFiles, look, siblingFolders } from "./lib/rotation.ts";
import {
  createFaultLog,
  createProgress,
  describe,
  EXIT,
  formatBytes,
  formatDuration,
  type Log,
  OperatorError,
  pause,
  runScript,
  type Service,
} from "./lib/service.ts";
import {
  addMark,
  leadingNuls,
  MARK_BYTES,
  type Mark,
  markOf,
  openLog,
  skipLines,
  wholeLines,
} from "./lib/tail.ts";
import { type Chunk, createUploader, encodeBody, type Uploader } from "./lib/upload.ts";

/** Chunks in hand at once over all files: two buffers each, so that memory does not grow with the files. */
const TRANSFERS = 3;
/** The smallest chunk that a 413 can lead to. */
const MIN_CHUNK_BYTES = 4096;
/** NULs at the head of a file are a hole when there are so many, also where no truncation was seen. */
const HOLE_BYTES = 4096;
const SAVE_EVERY_MS = 1000;
const TELL_EVERY_MS = 60_000;

type ShipperConfig = Config["shipper"];

/** Everything that the passes share. */
export interface Shipper {
  config: ShipperConfig;
  log: Log;
  signal: AbortSignal;
  now: () => number;
  uploader: Uploader;
  context: ScanContext;
  families: Map<string, Family>;
  /** Called when something happened to a file of this folder. */
  bells: Map<Family, Bell>;
  chunkBytes: number;
  skip: Buffer[][];
  transfers: Transfers;
  lost: { pending: number; inFlight: boolean };
  cursor: { changed: boolean; streamsChanged: boolean; savedAt: number; saving: boolean };
  heard: { at: number; failing: Set<number> };
  sent: { lines: number; bytes: number; chunks: number };
}

async function main({ config, log, signal, now, flags }: Service<"shipper">): Promise<number> {
  if (flags.status) return printStatus(config, now());
  const found = await openState(config, log);
  const shipper = createShipper(config, { log, signal, now });
  await loadFamilies(shipper, found);
  if (flags.once) await drainAll(shipper);
  else await Promise.all([followAll(shipper), beat(shipper), keepSaving(shipper), tell(shipper)]);
  await save(shipper);
  return EXIT.done;
}

/** The cursor; the folder is made and locked, but shipping goes on when it can't be. */
async function openState(config: ShipperConfig, log: Log): Promise<CursorFound> {
  try {
    await makeFolder(config.stateDir);
    await holdLock(join(config.stateDir, ".lock"), `The state folder ${config.stateDir}`);
  } catch (error) {
    if (error instanceof OperatorError) throw error;
    log.error("cannot use state folder: shipping goes on, a restart asks the receiver where it stands", {
      stateDir: config.stateDir,
      error: describe(error),
    });
  }
  const found = await readCursor(config.stateDir).catch((): CursorFound => ({ state: "damaged" }));
  if (found.state === "damaged") {
    log.warn("cursor is damaged: the receiver is asked where each file stands", {
      cursor: cursorPath(config.stateDir),
    });
  } else if (found.state === "older") {
    log.warn("cursor is damaged: the one before it is taken", { cursor: cursorPath(config.stateDir) });
  }
  return found;
}

/** A shipper without files yet. */
export function createShipper(
  config: ShipperConfig,
  { log, signal, now }: { log: Log; signal: AbortSignal; now: () => number },
): Shipper {
  const uploader = createUploader(config, signal);
  const faults = createFaultLog(log, now);
  const shipper: Shipper = {
    config,
    log,
    signal,
    now,
    uploader,
    families: new Map(),
    bells: new Map(),
    chunkBytes: config.chunkBytes,
    skip: config.skip.map((rule) => rule.map((text) => Buffer.from(text))),
    transfers: createTransfers(config.chunkBytes),
    lost: { pending: 0, inFlight: false },
    cursor: { changed: false, streamsChanged: false, savedAt: 0, saving: false },
    heard: { at: 0, failing: new Set() },
    sent: { lines: 0, bytes: 0, chunks: 0 },
    context: {
      config,
      now,
      log,
      faults,
      ask: (id) => uploader.committed(config.host, id),
      lose(bytes, stream) {
        shipper.lost.pending += bytes;
        log.error("bytes lost: the file vanished before it was read", {
          path: stream.path,
          stream: stream.id,
          bytes,
        });
      },
      changed() {
        shipper.cursor.changed = shipper.cursor.streamsChanged = true;
      },
    },
  };
  return shipper;
}

/** Takes up what the cursor knows and what the config names. */
async function loadFamilies(shipper: Shipper, found: CursorFound): Promise<void> {
  const { config, families, now } = shipper;
  const known = "cursor" in found ? found.cursor : undefined;
  shipper.lost.pending = known?.lost ?? 0;
  for (const [path, state] of Object.entries(known?.families ?? {})) {
    if (state.streams.some((stream) => !stream.done))
      families.set(path, createFamily(path, "known", now(), state));
  }
  for (const path of await expandFiles(config.files, families.keys())) {
    const start = found.state === "damaged" ? "recover" : "first";
    const state = known?.families[path];
    families.set(path, createFamily(path, state ? "known" : start, now(), state));
  }
  if (families.size === 0) shipper.log.warn("no file matches yet", { files: config.files.join(" ") });
  if (found.state === "absent") await takeOverOffset(shipper);
}

/** The original shipper's offset file: the one live file goes on from there at the very first start. */
async function takeOverOffset(shipper: Shipper): Promise<void> {
  const path = join(shipper.config.stateDir, "latest.offset");
  const [family, ...others] = shipper.families.values();
  let text: string;
  try {
    text = readFileSync(path, "utf8").trim();
  } catch {
    return; // the usual case: there was no other shipper before
  }
  const file = family && (await look(family.path));
  if (!family || others.length > 0 || !file || !/^\d{1,16}$/.test(text) || Number(text) > file.size) {
    throw new OperatorError(
      `Cannot take over "${path}": it says "${text.slice(0, 40)}", expected an offset within the one file that is followed; mend or remove it`,
    );
  }
  const log = await openLog(family.path);
  const head = new Uint8Array(MARK_BYTES);
  const n = await log.read(head, 0);
  await log.close();
  family.streams.push({
    keys: [file.key],
    path: family.path,
    offset: Number(text),
    signature: { head: markOf(head.subarray(0, n), n), marks: [] },
    size: file.size,
    done: false,
    truncated: false,
    since: shipper.now(),
    seenAt: shipper.now(),
    grewAt: file.mtimeMs,
  });
  shipper.context.changed();
  shipper.log.info("offset taken over", { path, offset: Number(text) });
  await save(shipper);
  await moveDurably(path, `${path}.imported`);
}

// ---- the loops

/** Ships to the end of every file, and ends when the receiver has everything. */
async function drainAll(shipper: Shipper): Promise<void> {
  const progress = createProgress("shipping", Math.max(1, await backlog(shipper)));
  const ticker = setInterval(() => progress.show(shipper.sent.bytes), 250);
  await Promise.all(
    [...shipper.families.values()].map(async (family) => {
      for (;;) {
        const pass = await shipOnce(shipper, family);
        if (shipper.signal.aborted || (pass.atEnd && !pass.waiting)) return;
        await pause(
          pass.waitMs ?? Math.min(200, Math.max(10, family.scanAt - shipper.now())),
          shipper.signal,
        );
      }
    }),
  );
  clearInterval(ticker);
  progress.end();
  if (!shipper.signal.aborted && shipper.lost.pending > 0) await sendHeartbeat(shipper);
  shipper.log.info("shipped to the end of every file", { ...shipper.sent, files: shipper.families.size });
}

/** Bytes on disk that are not shipped yet, before the first look into the folders. */
async function backlog(shipper: Shipper): Promise<number> {
  let bytes = 0;
  for (const family of shipper.families.values()) {
    bytes +=
      ((await look(family.path).catch(() => undefined))?.size ?? 0) - (family.streams.at(-1)?.offset ?? 0);
  }
  return bytes;
}

/** Follows every file in a loop of its own; new matches join within `pollSeconds`. */
async function followAll(shipper: Shipper): Promise<void> {
  const { config, families, signal, now } = shipper;
  const watchers = new Map<string, FSWatcher>();
  const loops = new Map<Family, Promise<void>>();
  let failed: unknown;
  while (!signal.aborted && failed === undefined) {
    for (const path of await expandFiles(config.files, families.keys())) {
      // A file that came while we are running is all ours, whatever startAt says.
      if (!families.has(path))
        families.set(path, createFamily(path, "new", now() - config.pollSeconds * 2000));
    }
    for (const family of families.values()) {
      if (loops.has(family)) continue;
      shipper.bells.set(family, createBell());
      loops.set(
        family,
        follow(shipper, family).catch((error) => {
          failed = error;
        }),
      );
    }
    await watchFolders(shipper, watchers);
    await pause(config.pollSeconds * 1000, signal);
  }
  for (const watcher of watchers.values()) watcher.close();
  await Promise.all(loops.values());
  if (failed !== undefined) throw failed;
}

async function follow(shipper: Shipper, family: Family): Promise<void> {
  const { config, signal, now } = shipper;
  const bell = shipper.bells.get(family) as Bell;
  while (!signal.aborted) {
    const started = now();
    const pass = await shipOnce(shipper, family);
    if (pass.waitMs !== undefined) await pause(pass.waitMs, signal);
    else if (pass.shipped) await pause(config.flushMs - (now() - started), signal);
    else await bell.wait(Math.max(10, family.scanAt - now()), signal);
  }
}

/** What one pass over a family came to. */
export interface Pass {
  shipped: boolean;
  /** Everything that can be read was shipped. */
  atEnd: boolean;
  /** Some file is not settled yet: being copied, compressed, or gone. */
  waiting: boolean;
  /** The receiver refused: try again after so many ms. */
  waitMs?: number;
}

/** One pass over a family: looks for rotation, then ships every stream to its end, oldest first. */
export async function shipOnce(shipper: Shipper, family: Family): Promise<Pass> {
  const { sent, now, context, config } = shipper;
  const before = sent.chunks;
  const pass: Pass = { shipped: false, atEnd: true, waiting: false };
  try {
    const live = await look(family.path);
    if (live?.key !== family.liveKey || now() >= family.scanAt) await scanFamily(family, context);
    context.faults.recovered(family.path, "folder can be read again", { path: family.path });
    for (const stream of [...family.streams]) {
      if (stream.done || shipper.signal.aborted) continue;
      pass.atEnd = (await shipStream(shipper, family, stream)) && pass.atEnd;
    }
  } catch (error) {
    if (error instanceof Refused) pass.waitMs = error.waitMs;
    else tellFault(shipper, family.path, "cannot look for log file", error);
    pass.atEnd = false;
  }
  pass.shipped = sent.chunks > before;
  pass.waiting = family.scanAt < now() + Math.min(1100, config.pollSeconds * 1000) && family.scanAt > 0;
  if (family.scanAt === 0) pass.atEnd = false;
  return pass;
}

/** Ships one stream to its end, and decides whether it is done. True when its end was reached. */
async function shipStream(shipper: Shipper, family: Family, stream: Stream): Promise<boolean> {
  const isLive = stream === liveStream(family);
  if (!stream.file && !isLive && stream.endSeenAt === stream.size && stream.size > 0) return true;
  try {
    stream.file ??= await openStream(family, stream);
    if (!stream.file) return stream.missingSince !== undefined;
    await drain(shipper, family, stream);
    if (!isLive) await finish(shipper, family, stream);
    shipper.context.faults.recovered(stream.path, "log file can be read again", { path: stream.path });
    return true;
  } catch (error) {
    if (error instanceof Refused || shipper.signal.aborted) throw error;
    if (error instanceof Truncated) {
      await beginAfterTruncation(family, stream, shipper.context);
      return false;
    }
    await stream.file?.close().catch(() => {});
    stream.file = undefined;
    tellFault(shipper, stream.path, "cannot read log file", error);
    return true; // the others go on; this one is tried again at the next pass
  }
}

/** Opens the file where it was last seen; undefined when another one lies there now. */
async function openStream(family: Family, stream: Stream): Promise<Stream["file"]> {
  if (stream.missingSince !== undefined) return undefined;
  try {
    const file = await openLog(stream.path);
    if (stream.keys.includes(file.key)) return file;
    await file.close();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
  }
  family.scanAt = 0;
  return undefined;
}

/** A rotated file at whose end we are: done when it was quiet for long enough and ends with a whole line. */
async function finish({ config, now, context }: Shipper, family: Family, stream: Stream): Promise<void> {
  const { file } = stream;
  if (!file) return;
  const { size, mtimeMs } = await file.stat();
  if (!file.compression && size !== stream.endSeenAt) {
    stream.grewAt = stream.endSeenAt === undefined ? mtimeMs : now();
    stream.endSeenAt = size;
  }
  const quietAt = stream.grewAt + config.rotateWaitSeconds * 1000;
  if (!file.compression && now() < quietAt) {
    family.scanAt = Math.min(family.scanAt, Math.max(quietAt, now() + 50));
    return;
  }
  const unfinished = stream.size - stream.offset;
  await file.close();
  stream.file = undefined;
  if (unfinished > 0 && !file.compression) return; // half a line: its writer may still end it
  stream.done = true;
  if (unfinished > 0) context.lose(unfinished, stream);
  context.log.info("file is done", { path: stream.path, stream: stream.id, bytes: stream.offset });
  context.changed();
}

// ---- one stream

/** The receiver does not take chunks now. */
class Refused extends Error {
  readonly waitMs: number;
  constructor(waitMs: number) {
    super("refused");
    this.waitMs = waitMs;
  }
}

/** The file's bytes are not the ones that were shipped. */
class Truncated extends Error {}

/** A chunk that is read and encoded, and what the stream will be when it is committed. */
interface Prepared {
  chunk: Chunk;
  signature: Stream["signature"];
  last: Mark;
  /** There may be more behind it. */
  full: boolean;
}

/** Ships chunk by chunk; the next one is read and compressed while the last is in flight. */
async function drain(shipper: Shipper, family: Family, stream: Stream): Promise<void> {
  const [a, b] = await shipper.transfers.take(shipper.signal);
  try {
    const start = () => prepare(shipper, family, stream, stream.offset, stream.signature, a);
    let next = await start();
    for (let turn = 1; next !== undefined && !shipper.signal.aborted; turn++) {
      const { chunk, signature, last, full }: Prepared = next;
      const ahead = full
        ? prepare(shipper, family, stream, chunk.end, signature, turn % 2 === 1 ? b : a)
        : Promise.resolve(undefined);
      ahead.catch(() => {}); // looked at when its turn comes
      const offset = await send(shipper, stream, chunk);
      reached("shipper:answered");
      if (offset === chunk.end) {
        stream.offset = offset;
        stream.signature = signature;
        shipper.cursor.changed = true;
        next = await ahead;
      } else {
        await ahead.catch(() => {});
        if (offset !== undefined) await moveTo(shipper, family, stream, offset, last);
        next = await start();
      }
    }
  } finally {
    shipper.transfers.give([a, b]);
  }
}

/**
 * Reads the next chunk from `offset` into `buffer`: the bytes before it are read too and compared with the
 * mark that was made of them. Undefined when there is no whole line. Throws Truncated.
 */
async function prepare(
  shipper: Shipper,
  family: Family,
  stream: Stream,
  offset: number,
  signature: Stream["signature"],
  buffer: Buffer<ArrayBuffer>,
): Promise<Prepared | undefined> {
  const { file } = stream;
  if (!file) return undefined;
  const guard = Math.min(MARK_BYTES, offset);
  const limit = guard + shipper.chunkBytes;
  const n = await file.read(buffer.subarray(0, limit), offset - guard);
  checkGuard(signature, buffer.subarray(0, n), offset, guard);
  const full = n === limit;
  if (!file.compression)
    stream.size = full ? Math.max((await file.stat()).size, offset - guard + n) : offset - guard + n;
  else stream.size = Math.max(stream.size, offset - guard + n);

  const bytes = buffer.subarray(guard, n);
  const hole = holeAt(stream, buffer, offset, guard, n);
  let length = wholeLines(bytes);
  if (length === 0 && (full || (hole === bytes.length && hole >= MARK_BYTES))) length = bytes.length; // a piece
  if (length === 0) return undefined;

  if (offset === stream.offset && guard === offset) growHead(stream, buffer.subarray(0, n));
  const marked = addMark(
    { ...signature, head: stream.signature.head },
    buffer.subarray(0, guard + length),
    offset + length,
  );
  stream.id ??= await nameStream(
    file,
    family.streams.map(({ id }) => id),
  );
  if (stream.id === undefined) return undefined;
  const body = chooseLines(
    shipper,
    bytes.subarray(hole, length),
    guard > 0 && buffer[guard - 1] !== 0x0a && hole === 0,
  );
  const chunk: Chunk = {
    host: shipper.config.host,
    stream: stream.id,
    offset,
    end: offset + length,
    ...(await encodeBody(body, shipper.config.compression)),
  };
  return { chunk, signature: marked, last: marked.marks.at(-1) as Mark, full };
}

/** Throws Truncated when the bytes before the offset, or the head, are not the ones that were seen before. */
function checkGuard({ head, marks }: Stream["signature"], view: Buffer, offset: number, guard: number): void {
  if (view.length < guard) throw new Truncated();
  const last = marks.at(-1);
  if (last?.end === offset && markOf(view.subarray(guard - last.length, guard), offset).hash !== last.hash) {
    throw new Truncated();
  }
  if (head && guard === offset && markOf(view.subarray(0, head.length), head.end).hash !== head.hash)
    throw new Truncated();
}

/** The head is marked as soon as it is seen, so that a copy of a file is known before anything was shipped. */
function growHead(stream: Stream, view: Buffer): void {
  const length = Math.min(view.length, MARK_BYTES);
  if (length > (stream.signature.head?.length ?? 0)) {
    stream.signature = { ...stream.signature, head: markOf(view.subarray(0, length), length) };
  }
}

/** Length of the hole of NULs at `offset` that a truncation left in front of the first line. */
function holeAt(stream: Stream, buffer: Buffer, offset: number, guard: number, n: number): number {
  if (offset > 0 && !(stream.truncated && buffer[guard - 1] === 0)) return 0;
  const nuls = leadingNuls(buffer.subarray(guard, n));
  if (nuls >= HOLE_BYTES) stream.truncated = true;
  return stream.truncated ? nuls : 0;
}

/** The lines that are not to be skipped. A line that began in an earlier chunk is never skipped. */
function chooseLines(shipper: Shipper, bytes: Buffer<ArrayBuffer>, inLine: boolean): Buffer<ArrayBuffer> {
  if (shipper.skip.length === 0) return bytes;
  const first = inLine ? bytes.indexOf(0x0a) + 1 : 0;
  if (inLine && first === 0) return bytes;
  const kept = skipLines(bytes.subarray(first), shipper.skip);
  return bytes.subarray(0, first + kept.length);
}

/** Sends a chunk once. Gives the offset where the stream stands now, undefined when a smaller chunk is due. */
async function send(shipper: Shipper, stream: Stream, chunk: Chunk): Promise<number | undefined> {
  const { lost, heard, sent, context, config } = shipper;
  const told = lost.inFlight ? 0 : lost.pending;
  if (told > 0) lost.inFlight = true;
  const lag = Math.max(0, lagOf(shipper) - (chunk.end - chunk.offset));
  reached("shipper:sending");
  const answer = await shipper.uploader.send({ ...chunk, lag, lost: told }).finally(() => {
    if (told > 0) lost.inFlight = false;
  });
  if (answer.kind === "refused") {
    heard.failing.add(answer.status);
    const { status, reason } = answer;
    context.faults.failed(`receiver ${status}`, "receiver does not take chunks: held, and tried again", {
      receiver: config.receiver,
      status: status || undefined,
      reason,
    });
    throw new Refused(answer.waitMs);
  }
  if (answer.kind === "tooLarge") {
    if (shipper.chunkBytes <= MIN_CHUNK_BYTES) {
      context.faults.failed("receiver 413", "receiver takes no chunk, however small", {
        receiver: config.receiver,
      });
      throw new Refused(10_000);
    }
    shipper.chunkBytes = Math.max(MIN_CHUNK_BYTES, shipper.chunkBytes >> 1);
    shipper.log.warn("chunk is too large for the receiver: halved", { chunkBytes: shipper.chunkBytes });
    return undefined;
  }
  heard.at = shipper.now();
  for (const status of heard.failing) {
    context.faults.recovered(`receiver ${status}`, "receiver takes chunks again", {
      receiver: config.receiver,
    });
  }
  heard.failing.clear();
  // A chunk that is answered with its own end was stored, now or at an earlier try whose answer was lost.
  if (answer.offset === chunk.end) lost.pending -= told;
  if (answer.kind === "stored") {
    sent.lines += answer.lines;
    sent.bytes += chunk.end - chunk.offset;
    sent.chunks++;
  } else
    shipper.log.info("stream stands elsewhere", {
      path: stream.path,
      stream: chunk.stream,
      offset: answer.offset,
    });
  return answer.offset;
}

/** The receiver named another offset: go on there, when the file has it. */
async function moveTo(
  shipper: Shipper,
  family: Family,
  stream: Stream,
  offset: number,
  last: Mark,
): Promise<void> {
  const end = stream.file?.compression ? offset : Math.max(stream.size, last.end);
  shipper.cursor.changed = true;
  if (offset <= end) {
    stream.signature = {
      ...stream.signature,
      marks: stream.signature.marks.filter((mark) => mark.end <= offset),
    };
    stream.offset = offset;
    return;
  }
  // The name is another file's: one with the same first line that was truncated since.
  shipper.log.warn("stream is longer at the receiver than the file: taken as a new file", {
    path: stream.path,
    stream: stream.id,
    committed: offset,
    size: end,
  });
  const taken = [...family.streams.map(({ id }) => id)];
  if (stream.file) stream.id = await nameStream(stream.file, taken);
}

/** Bytes that are still to be shipped, over all files. */
function lagOf(shipper: Shipper): number {
  let bytes = 0;
  for (const family of shipper.families.values()) {
    for (const stream of family.streams) if (!stream.done) bytes += Math.max(0, stream.size - stream.offset);
  }
  return bytes;
}

function tellFault(shipper: Shipper, path: string, message: string, error: unknown): void {
  if (shipper.signal.aborted) return;
  const code = (error as NodeJS.ErrnoException).code;
  if (code === undefined && !(error instanceof OperatorError) && isBug(error)) throw error;
  shipper.context.faults.failed(path, message, { path, error: describe(error) });
}

function isBug(error: unknown): boolean {
  return error instanceof TypeError || error instanceof ReferenceError || error instanceof RangeError;
}

// ---- beside the files

/** Rings the bell of every family that has something in the folder where a name changed. */
async function watchFolders(shipper: Shipper, watchers: Map<string, FSWatcher>): Promise<void> {
  for (const family of shipper.families.values()) {
    for (const folder of await siblingFolders(family.path, shipper.config.olddir)) {
      if (watchers.has(folder)) continue;
      try {
        const watcher = watch(folder, (event, name) => ring(shipper, folder, event, name));
        watcher.on("error", () => {
          watchers.delete(folder); // the poll goes on, and makes a new one
          watcher.close();
        });
        watchers.set(folder, watcher);
      } catch {
        // no events here: the poll sees it
      }
    }
  }
}

function ring(shipper: Shipper, folder: string, event: string, name: string | null): void {
  for (const [family, bell] of shipper.bells) {
    const live = basename(family.path);
    if (event === "rename" && dirname(family.path) === folder) {
      if (name === null || name.startsWith(live.slice(0, 3)))
        family.scanAt = Math.min(family.scanAt, shipper.now());
    }
    if (name === null || name === live || event === "rename" || dirname(family.path) !== folder) bell.ring();
  }
}

/** A sign of life when nothing is shipped; also tells at once what was lost. */
async function beat(shipper: Shipper): Promise<void> {
  const { config, signal, now, heard, lost } = shipper;
  const everyMs = config.heartbeatSeconds * 1000;
  while (!signal.aborted) {
    const due = heard.at + everyMs - now();
    await pause(Math.min(1000, Math.max(50, due)), signal);
    if (signal.aborted || (now() - heard.at < everyMs && lost.pending === 0)) continue;
    const waitMs = await sendHeartbeat(shipper);
    if (waitMs !== undefined) await pause(waitMs, signal);
  }
}

/** An empty range at the end of the newest stream. Gives the time to wait when it was refused. */
async function sendHeartbeat(shipper: Shipper): Promise<number | undefined> {
  const streams = [...shipper.families.values()].map(liveStream);
  const stream = streams.find((candidate) => candidate?.id !== undefined);
  const offset = stream?.offset ?? 0;
  const empty = { body: new Uint8Array(0), encoding: "identity" } as const;
  const idle = { path: "", offset: 0 } as Stream;
  try {
    const { host } = shipper.config;
    await send(shipper, stream ?? idle, {
      host,
      stream: stream?.id ?? IDLE_STREAM,
      offset,
      end: offset,
      ...empty,
    });
    return undefined;
  } catch (error) {
    if (error instanceof Refused) return error.waitMs;
    if (shipper.signal.aborted) return undefined;
    throw error;
  }
}

async function keepSaving(shipper: Shipper): Promise<void> {
  while (!shipper.signal.aborted) {
    await pause(SAVE_EVERY_MS, shipper.signal);
    if (shipper.cursor.changed) await save(shipper);
  }
}

/** Saves the cursor. What it says is on the receiver's stable storage already. */
async function save(shipper: Shipper): Promise<void> {
  const { cursor, config, context } = shipper;
  const keep = cursor.streamsChanged;
  cursor.changed = cursor.streamsChanged = false;
  const families = [...shipper.families].map(([path, { since, streams }]) => {
    const states = streams.map(({ file, grewAt, endSeenAt, missingSince, ...state }) => state);
    return [path, { since, streams: states }] as const;
  });
  try {
    const state: Cursor = { version: 1, lost: shipper.lost.pending, families: Object.fromEntries(families) };
    await writeCursor(config.stateDir, state, keep);
    reached("shipper:saved");
    context.faults.recovered("cursor", "cursor is saved again", { stateDir: config.stateDir });
  } catch (error) {
    cursor.changed = true;
    cursor.streamsChanged ||= keep;
    context.faults.failed("cursor", "cannot save cursor: shipping goes on", {
      stateDir: config.stateDir,
      error: describe(error),
    });
  }
}

/** A line a minute while there is traffic; on a terminal also the progress of a backlog. */
async function tell(shipper: Shipper): Promise<void> {
  const { sent, signal, log } = shipper;
  let before = { ...sent };
  let progress: ReturnType<typeof createProgress> | undefined;
  for (let told = shipper.now(); !signal.aborted; ) {
    await pause(1000, signal);
    const lag = lagOf(shipper);
    if (lag > 16 * shipper.config.chunkBytes) {
      progress ??= createProgress("backlog", sent.bytes + lag);
      progress.show(sent.bytes);
    } else {
      progress?.end();
      progress = undefined;
    }
    if (shipper.now() - told < TELL_EVERY_MS && !signal.aborted) continue;
    told = shipper.now();
    if (sent.chunks === before.chunks) continue;
    const lines = sent.lines - before.lines;
    log.info("shipped", {
      lines,
      bytes: sent.bytes - before.bytes,
      chunks: sent.chunks - before.chunks,
      lag,
    });
    before = { ...sent };
  }
}

// ---- small nouns

/** Something that one loop waits for and others ring; a ring while nobody waits is not lost. */
interface Bell {
  ring(): void;
  wait(ms: number, signal: AbortSignal): Promise<void>;
}

function createBell(): Bell {
  let rung = false;
  let wake: (() => void) | undefined;
  return {
    ring() {
      rung = true;
      wake?.();
    },
    async wait(ms, signal) {
      if (!rung) {
        const early = new AbortController();
        wake = () => early.abort();
        await pause(ms, AbortSignal.any([signal, early.signal]));
        wake = undefined;
      }
      rung = false;
    },
  };
}

type Buffers = [Buffer<ArrayBuffer>, Buffer<ArrayBuffer>];

/** The buffers of the chunks in hand: made when first needed, handed from stream to stream. */
interface Transfers {
  take(signal: AbortSignal): Promise<Buffers>;
  give(buffers: Buffers): void;
}

function createTransfers(chunkBytes: number): Transfers {
  const free: Buffers[] = [];
  const waiting: ((buffers: Buffers) => void)[] = [];
  const size = MARK_BYTES + chunkBytes;
  let made = 0;
  return {
    async take() {
      const buffers = free.pop();
      if (buffers) return buffers;
      if (made++ < TRANSFERS) return [Buffer.allocUnsafeSlow(size), Buffer.allocUnsafeSlow(size)];
      return new Promise((resolve) => waiting.push(resolve));
    },
    give(buffers) {
      const next = waiting.shift();
      if (next) next(buffers);
      else free.push(buffers);
    },
  };
}

// ---- for the operator

async function printStatus(config: ShipperConfig, now: number): Promise<number> {
  const found = await readCursor(config.stateDir);
  if (!("cursor" in found)) {
    process.stdout.write(
      `No cursor in ${config.stateDir}: ${found.state === "absent" ? "nothing was shipped yet" : "it is damaged"}\n`,
    );
    return found.state === "absent" ? EXIT.done : EXIT.failed;
  }
  const rows = [["FILE", "STREAM", "SIZE", "OFFSET", "LAG", "SINCE"]];
  for (const family of Object.values(found.cursor.families)) {
    for (const stream of family.streams.filter(({ done }) => !done)) {
      const size = (await look(stream.path).catch(() => undefined))?.size ?? stream.size;
      const lag = Math.max(0, size - stream.offset);
      const since = `${formatDuration(now - stream.since)} ago`;
      rows.push([
        stream.path,
        stream.id ?? "-",
        formatBytes(size),
        String(stream.offset),
        formatBytes(lag),
        since,
      ]);
    }
  }
  const widths = rows[0]?.map((_, i) => Math.max(...rows.map((row) => row[i]?.length ?? 0))) ?? [];
  for (const row of rows)
    process.stdout.write(
      `${row
        .map((cell, i) => cell.padEnd(widths[i] ?? 0))
        .join("  ")
        .trimEnd()}\n`,
    );
  if (found.cursor.lost > 0)
    process.stdout.write(`Lost, not yet told to the receiver: ${formatBytes(found.cursor.lost)}\n`);
  return EXIT.done;
}

/** What only the host can tell, for `--check`. */
async function check({ config, signal }: Service<"shipper">, connect: boolean): Promise<string[]> {
  const faults: string[] = [];
  const attempt = async (what: string, action: () => unknown) => {
    try {
      await action();
    } catch (error) {
      faults.push(`shipper.${what}: ${describe(error)}`);
    }
  };
  for (const path of await expandFiles(config.files, [])) {
    await attempt("files", async () => (await openLog(path)).close());
  }
  for (const folder of new Set(
    config.files.map((path) => dirname(path)).filter((path) => !/[*?[{]/.test(path)),
  )) {
    await attempt("files", () => readdir(folder));
  }
  await attempt("stateDir", async () => {
    await makeFolder(config.stateDir);
    await access(config.stateDir, constants.W_OK);
  });
  if (config.token) await attempt("token", () => config.token && readSecret(config.token));
  for (const key of ["ca", "cert", "key"] as const) {
    const file = config[key];
    if (file !== undefined) await attempt(key, () => readSecret({ file }));
  }
  if (connect && faults.length === 0) {
    await attempt("receiver", () => createUploader(config, signal).committed(config.host, IDLE_STREAM));
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
