/**
 * The way from the journal to the parts, in use and at the start: what an entry says is written at the lengths that it
 * names, and noted in the ledger. A start brings a sender's folder back to what its ledger says, after every journal of a
 * dead process was replayed. Lines behind the committed length were never acknowledged and are cut off; where the ledger
 * itself is gone or damaged, nothing is cut that may have been acknowledged: such a part is kept whole, and it is told.
 */
import { closeSync, createReadStream, fstatSync, openSync, readSync, writeSync } from "node:fs";
import { readdir, rm, stat, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { gunzipSync, zstdDecompressSync } from "node:zlib";
import { LEDGER, listBatches, parseBatchName, parseWindow, withState } from "../batch.ts";
import {
  exists,
  failpoint,
  ifMissing,
  makeFolder,
  moveDurably,
  readIfExists,
  removeDurably,
  syncPath,
  waitForLock,
  writeDurably,
} from "../durable.ts";
import {
  countMinute,
  emptyLedger,
  formatRecord,
  LEDGER_VERSION,
  type Ledger,
  type LedgerRecord,
  type OpenBatch,
  parseRecords,
  readLedger,
  snapshot,
} from "../ledger.ts";
import { type Lock, type NameLocks, tryLock } from "../runtime.ts";
import { type Log, localZone, MINUTE, OperatorError } from "../service.ts";
import { type Entry, journalLock, listJournals, type Run, readJournal } from "./journal.ts";

const PIECE = ".piece-";
/** The file of a half line: of which stream, and where in the source it begins. A new one never overwrites the last. */
export function pieceName(stream: string, from = 0): string {
  return `${PIECE}${stream}.${from}`;
}

/** As a receiver of version 1.0 names it. */
const OLD_PIECE = `${LEDGER}-piece-`;
/** Parts and pieces that are open at once, of all senders. */
const OPEN_FILES = 64;
const COPY_BYTES = 262_144;
/** Work on one chunk gives way to others after so long. */
export const GIVE_WAY_MS = 10;

const nextTick = promisify(setImmediate);

// ---- parts

/** The files that are written, of all senders, the one used last standing last. */
export class Parts {
  readonly #open = new Map<string, number>();

  /** Descriptor and size of the file at `path`, which is made when it is not there or was removed while open. */
  at(path: string): { fd: number; size: number } {
    let fd = this.#open.get(path);
    this.#open.delete(path);
    if (fd !== undefined) {
      const { nlink, size } = fstatSync(fd);
      if (nlink > 0) {
        this.#open.set(path, fd);
        return { fd, size };
      }
      closeSync(fd);
    }
    for (const [oldest] of this.#open) if (this.#open.size >= OPEN_FILES) this.close(oldest);
    fd = openPart(path);
    this.#open.set(path, fd);
    return { fd, size: fstatSync(fd).size };
  }

  close(path: string): void {
    const fd = this.#open.get(path);
    this.#open.delete(path);
    if (fd !== undefined) closeSync(fd);
  }

  closeAll(): void {
    for (const path of [...this.#open.keys()]) this.close(path);
  }
}

function openPart(path: string): number {
  try {
    return openSync(path, "r+");
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return openSync(path, "wx+", 0o660);
  }
}

function writeFull(fd: number, bytes: Uint8Array, position: number): void {
  for (let done = 0; done < bytes.length; ) {
    done += writeSync(fd, bytes, done, bytes.length - done, position + done);
  }
}

interface SenderFolder {
  host: string;
  folder: string;
  ledger: Ledger;
  log: Log;
}

export interface Place extends SenderFolder {
  parts: Parts;
  /** Paths that were written since they were synced. */
  dirty: Set<string>;
}

/**
 * Writes an entry's bytes at the lengths that it names. A name that is used up is left alone: its batch is complete.
 * A file that is shorter than what was committed has lost lines: they are told, and it goes on where it ends, without a
 * hole. Throws the system's error.
 */
export async function writeEntry(place: Place, entry: Entry, body: Uint8Array): Promise<void> {
  let givenWayAt = performance.now();
  for (const run of entry.runs) {
    if (isUsedUp(place.ledger, run.batch)) continue;
    if (performance.now() - givenWayAt > GIVE_WAY_MS) {
      await nextTick();
      givenWayAt = performance.now();
    }
    await writeRun(place, run, entry, body);
  }
  if (!entry.piece) return;
  const path = join(place.folder, pieceName(entry.stream, entry.state.pieceFrom));
  place.dirty.add(path);
  const { fd, size } = place.parts.at(path);
  writeFull(fd, body.subarray(entry.piece.from, entry.piece.to), Math.min(entry.piece.at, size));
}

/** A batch whose part ended before the run is as long as that from now on. */
async function writeRun(place: Place, run: Run, entry: Entry, body: Uint8Array): Promise<void> {
  const path = join(place.folder, withState(run.batch, "open"));
  const { fd, size } = place.parts.at(path);
  const open = place.ledger.open.get(run.batch);
  const committed = Math.min(open?.bytes ?? 0, run.at);
  if (size < committed) loseBytes(place, run.batch, committed - size);
  let at = Math.min(run.at, size);
  place.dirty.add(path);
  if (run.piece) {
    const name = pieceName(entry.stream, run.piece.from);
    const piece = join(place.folder, name);
    const held = place.parts.at(piece).size;
    if (held < run.piece.length) {
      loseBytes(place, name, run.piece.length - held);
      run.piece.length = held; // as it is noted, too: the line is what is left of it, without a hole
    }
    const block = Buffer.allocUnsafe(Math.min(COPY_BYTES, run.piece.length));
    for (let done = 0; done < run.piece.length; done += block.length) {
      const { fd: from } = place.parts.at(piece);
      const n = readSync(from, block, 0, Math.min(block.length, run.piece.length - done), done);
      writeFull(place.parts.at(path).fd, block.subarray(0, n), at);
      at += n;
      if (done % (32 * COPY_BYTES) === 0) await nextTick(); // others are served meanwhile
    }
  }
  writeFull(run.piece ? place.parts.at(path).fd : fd, body.subarray(run.from, run.to), at);
  if (open && size < run.at) open.bytes = Math.min(open.bytes, size);
}

/** Notes an entry that was written. `journal` is the one that it stands in. */
export function noteEntry(ledger: Ledger, entry: Entry, journal: string): void {
  for (const run of entry.runs) {
    if (isUsedUp(ledger, run.batch)) continue;
    const none: OpenBatch = { bytes: 0, lines: 0, endsAt: 0, at: 0, firstAt: entry.at, lowest: {} };
    const batch = ledger.open.get(run.batch) ?? none;
    if (run.at === 0) Object.assign(batch, { bytes: 0, lines: 0 }); // its first lines, perhaps once more
    batch.bytes = endOfRun(run, batch);
    batch.lines += run.lines;
    batch.endsAt = Math.max(batch.endsAt, run.endsAt);
    batch.at = entry.at;
    // What rules left out of the body makes this too low at most, never too high.
    if (batch.lowest) batch.lowest[entry.stream] ??= entry.from + run.from;
    ledger.open.set(run.batch, batch);
  }
  ledger.streams.set(entry.stream, entry.state);
  ledger.heardAt = entry.at;
  if (entry.lines > 0) {
    ledger.lineAt = entry.at;
    countMinute(ledger, entry.lines, entry.at);
  }
  const { facts } = ledger;
  for (const key of ["skipped", "untimed", "ahead", "again", "againFiles"] as const) {
    if (entry[key]) facts[key] = (facts[key] ?? 0) + entry[key];
  }
  if (entry.zone !== undefined) facts.zone = entry.zone;
  delete facts.forgotten;
  ledger.lost = Math.max(ledger.lost, entry.lost ?? 0);
  if (entry.unsure && entry.unsure > ledger.unsure) ledger.unsure = entry.unsure;
  ledger.journal = { id: journal, seq: entry.seq };
}

/** How long a part is behind a run that was written where it ended; it may have lost what was before. */
function endOfRun(run: Run, { bytes }: OpenBatch): number {
  return Math.min(run.at, bytes) + (run.piece?.length ?? 0) + run.to - run.from;
}

/** Writes an entry again that was noted already. */
export async function writeAgain(place: Place, entry: Entry, body: Uint8Array): Promise<void> {
  await writeEntry(place, entry, body);
  for (const run of entry.runs) {
    const open = place.ledger.open.get(run.batch);
    if (open) open.bytes = endOfRun(run, open);
  }
}

function isUsedUp(ledger: Ledger, name: string): boolean {
  return ledger.sealed.has(name) && !ledger.open.has(name);
}

export function decodeBody({ encoding }: Entry, body: Uint8Array): Uint8Array {
  if (encoding === "gzip") return gunzipSync(body);
  return encoding === "zstd" ? zstdDecompressSync(body) : body;
}

// ---- replay

/**
 * Replays every journal whose process is dead, and removes it: what its records say is in synced parts and ledgers then.
 * Rule: whoever has taken a host's lock does this, under the folder's one lock, before it touches the host.
 */
export async function replayJournals(dir: string, own: string, log: Log): Promise<void> {
  const others = () => [...listJournals(dir)].filter(([id]) => id !== own);
  if (others().length === 0) return;
  const lock = await waitForLock(join(dir, ".journal.lock"), Number.POSITIVE_INFINITY);
  try {
    for (const [id, paths] of others()) {
      const dead = await tryLock(journalLock(dir, id));
      if (!dead) continue; // its process lives
      try {
        await replayJournal(dir, id, paths, log);
      } finally {
        dead.release(); // else this process would take it for a living one at the next try, and pass it over
      }
      await removeDurably(journalLock(dir, id));
    }
  } finally {
    lock.release();
  }
}

async function replayJournal(dir: string, id: string, paths: string[], log: Log): Promise<void> {
  const places = new Map<string, Place>();
  const parts = new Parts();
  let isDamaged = false;
  const onDamage = (where: string) => {
    isDamaged = true;
    log.error("journal is damaged: what was acknowledged can't be read", { where });
  };
  try {
    for await (const { entry, body } of readJournal(paths, onDamage)) {
      const place = places.get(entry.host) ?? (await placeOf(dir, entry.host, parts, log));
      places.set(entry.host, place);
      const { journal } = place.ledger;
      if (journal?.id === id && journal.seq >= entry.seq) continue; // the checkpoint has it
      const before = place.ledger.streams.get(entry.stream);
      if (before && entry.from > before.offset)
        // what is between them, and the half line before it, is damaged
        loseBytes(place, `stream ${entry.stream}`, entry.from - (before.pieceFrom ?? before.offset));
      await writeEntry(place, entry, decodeBody(entry, body));
      noteEntry(place.ledger, entry, id);
    }
    for (const place of places.values()) {
      for (const path of place.dirty) await ifMissing(syncPath(path));
      await writeDurably(join(place.folder, LEDGER), formatRecord(snapshot(place.ledger)));
    }
  } finally {
    parts.closeAll();
  }
  failpoint("replay:written");
  for (const path of paths) {
    if (isDamaged) await moveDurably(path, join(dir, `.damaged${path.slice(dir.length + 1)}`));
    else await removeDurably(path);
  }
  if (paths.length > 0) log.info("journal replayed", { journal: id, hosts: places.size });
}

async function placeOf(dir: string, host: string, parts: Parts, log: Log): Promise<Place> {
  const folder = join(dir, host);
  await makeFolder(folder, 0o770); // one that was removed keeps no other host from being replayed
  const ledger = await recoverSender(host, folder, log);
  return { host, folder, ledger, log, parts, dirty: new Set() };
}

/** Tells of acknowledged bytes that are gone from this disk. */
export function loseBytes({ log, ledger, host }: SenderFolder, file: string, bytes: number): void {
  log.error("acknowledged bytes are gone from the disk", { host, file, bytes });
  ledger.facts.gone = (ledger.facts.gone ?? 0) + bytes;
  ledger.lost += bytes;
}

// ---- a sender's folder

/**
 * Takes the lock of a sender's folder, which is made by the caller, and leaves a note of who has it. One descriptor
 * serves all senders, however many. Throws an OperatorError when another process has it.
 */
export async function lockSender(locks: NameLocks, host: string, folder: string): Promise<Lock> {
  const note = join(folder, `${LEDGER}-lock`);
  const lock = await locks.take(host);
  if (!lock) {
    const holder = (await readIfExists(note))?.trim() || "unknown";
    throw new OperatorError(`The folder of ${host} is in use by process ${holder}; stop that one first`);
  }
  await writeFile(note, `${process.pid}\n`);
  return lock;
}

/** Brings a sender's folder to what its ledger says. Throws an OperatorError when a newer version wrote the ledger. */
export async function recoverSender(host: string, folder: string, log: Log): Promise<Ledger> {
  const path = join(folder, LEDGER);
  const text = await readIfExists(path);
  const { records, damaged } = parseRecords(text ?? "");
  const version = Math.max(0, ...(records as LedgerRecord[]).map(({ v = 0 }) => v));
  if (version > LEDGER_VERSION) {
    throw new OperatorError(
      `${path} is of version ${version}, written by a newer release; this one knows ${LEDGER_VERSION}`,
    );
  }
  const isComplete = damaged === 0 && records.length > 0;
  const ledger = (await readLedger(folder)) ?? emptyLedger();
  if (text !== undefined && !isComplete) log.error("ledger is damaged", { host, path, damaged });
  const found = { host, folder, ledger, log };
  await recoverBatches(found, isComplete);
  await recoverPieces(found, isComplete);
  return ledger;
}

/** Cuts, finishes or takes up every part, and closes what is open in the ledger alone. */
async function recoverBatches(found: SenderFolder, isComplete: boolean): Promise<void> {
  const { folder, ledger } = found;
  const names = (await listBatches(folder, "open")).map((part) => withState(part, "sealed"));
  for (const name of names) {
    const path = join(folder, withState(name, "open"));
    const sealed = ledger.sealed.get(name);
    const batch = ledger.open.get(name);
    if (sealed) {
      await cutBack(path, Math.max(sealed.bytes, batch?.bytes ?? 0));
      if (!(await exists(join(folder, name)))) await moveDurably(path, join(folder, name)); // its name is used up
    } else if (batch) {
      const size = await cutBack(path, batch.bytes);
      if (size < batch.bytes) loseBytes(found, name, batch.bytes - size);
      batch.bytes = size;
    } else if (isComplete)
      await rm(path); // not acknowledged, or the journal writes it again
    else await adopt(found, path, name);
  }
  for (const [name, { bytes }] of ledger.open) {
    if (names.includes(name)) continue;
    if (!ledger.sealed.has(name)) loseBytes(found, name, bytes);
    ledger.open.delete(name);
  }
}

/** Cuts a file to its committed length. Gives the size that it then has. */
async function cutBack(path: string, committed: number): Promise<number> {
  const { size } = await stat(path);
  if (size > committed) await truncate(path, committed);
  return Math.min(size, committed);
}

/** Takes up a part that no ledger knows: all of it may have been acknowledged, up to its last `\n`. */
async function adopt({ host, ledger, log }: SenderFolder, path: string, name: string): Promise<void> {
  const batch: OpenBatch = { bytes: 0, lines: 0, endsAt: 0, at: 0, firstAt: 0 };
  let read = 0;
  for await (const block of createReadStream(path) as AsyncIterable<Buffer>) {
    for (let end = block.indexOf(0x0a); end >= 0; end = block.indexOf(0x0a, end + 1)) {
      batch.lines++;
      batch.bytes = read + end + 1;
    }
    read += block.length;
  }
  if (batch.lines === 0) return rm(path);
  await truncate(path, batch.bytes);
  // The zone of its lines is not known any more; this machine's own is the best guess for when it ends.
  const { end } = parseWindow(parseBatchName(name)?.window ?? "");
  batch.endsAt = end - localZone(end) * MINUTE;
  ledger.open.set(name, batch);
  log.error("batch is in no ledger: kept as it is", { host, batch: name, lines: batch.lines });
}

/** Brings every piece of a long line to its committed length; what no stream knows, the journal writes again. */
async function recoverPieces(found: SenderFolder, isComplete: boolean): Promise<void> {
  const { folder, ledger } = found;
  const known = new Set<string>();
  for (const [name, stream] of ledger.streams) {
    if (stream.piece === undefined) continue;
    const file = pieceName(name, stream.pieceFrom);
    const old = join(folder, OLD_PIECE + name);
    if (await exists(old)) await moveDurably(old, join(folder, file));
    known.add(file);
    const size = await ifMissing(cutBack(join(folder, file), stream.piece));
    if (size === stream.piece) continue;
    loseBytes(found, file, stream.piece - (size ?? 0));
    if (size === undefined) delete stream.piece;
    else stream.piece = size;
  }
  for (const file of (await ifMissing(readdir(folder))) ?? []) {
    if (!file.startsWith(PIECE) || known.has(file)) continue;
    const path = join(folder, file);
    if (isComplete) await removeDurably(path);
    else await moveDurably(path, join(folder, `${LEDGER}-lost-${Date.now()}-${file.slice(PIECE.length)}`));
  }
}
