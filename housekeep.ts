/**
 * Housekeeping: `sent/` → `.gz` → gone. Only what was delivered is ever compressed or deleted, whatever its age;
 * `failed/` and the senders' folders are counted and left alone.
 *
 * Age is counted from the delivery: the forwarder gives a file in `sent/` the modification time of its delivery
 * and the `.gz` keeps it. (A file that was moved there by hand counts from its own time: `touch` it.)
 *
 * Compression: temp file, owner, mode and time of the original, sync, read back and compared with the original (length
 * and CRC-32), renamed to `.gz`, and only then the original is removed. A crash before the rename leaves a temp file,
 * which the next run removes; a crash after it leaves both, and the next run compares them again before it removes
 * the original. A `.gz` that is already there is checked in the same way: damaged, it is written anew;
 * with other content, both stay and it is said. One run at a time, by a lock that ends with its process.
 */
import { constants, createReadStream, createWriteStream, type Stats } from "node:fs";
import {
  access,
  chmod,
  chown,
  type FileHandle,
  lstat,
  open,
  readdir,
  rm,
  stat,
  statfs,
  utimes,
} from "node:fs/promises";
import { availableParallelism } from "node:os";
import { dirname, join } from "node:path";
import { pipeline } from "node:stream/promises";
import { crc32, createGunzip, createGzip, gzipSync } from "node:zlib";
import {
  compareBatchNames,
  folders,
  listBatches,
  listHosts,
  parseBatchName,
  withState,
} from "./lib/batch.ts";
import type { Config } from "./lib/config.ts";
import { removeOldDigests } from "./lib/digest.ts";
import {
  failpoint,
  holdLock,
  ifMissing,
  moveDurably,
  removeDurably,
  syncPath,
  TEMP_SUFFIX,
} from "./lib/durable.ts";
import { type Metric, writeMetrics } from "./lib/metrics.ts";
import { failReportPath, trimReport } from "./lib/report.ts";
import { checkSchedule, followSchedule } from "./lib/schedule.ts";
import {
  createProgress,
  DAY,
  EXIT,
  errorMessage,
  formatBytes,
  formatDuration,
  HOUR,
  OperatorError,
  type PassContext,
  runScript,
  type Service,
} from "./lib/service.ts";
import { formatTable } from "./lib/table.ts";

type Options = Config["housekeep"];
/** Files compressed at once, however many cores there are: each takes some 10 MiB. */
const MOST_AT_ONCE = 8;
/** Files in failed/, and their part of the disk, from which on they are told as a warning. */
const MANY_FAILED = { files: 1000, part: 0.1 };
const BLOCK = 1 << 18;
/** The level of the gzip command. */
const LEVEL = 6;
/** Of files up to this size it is tried in memory whether they would grow; larger ones that do are found out by writing. */
const SMALL_BYTES = 65_536;

/** What a pass is given; `dryRun` changes nothing and notes in it what would be done. */
export interface HousekeepContext extends PassContext<"housekeep"> {
  dryRun?: PlannedStep[];
}

export interface PlannedStep {
  action: string;
  file: string;
  bytes: number;
  reason: string;
}

export interface HousekeepResult {
  compressed: number;
  deleted: number;
  /** Bytes of the disk that were won. */
  freed: number;
  /** Files that could not be dealt with; each is in the log. */
  faults: number;
}

async function main(service: Service<"housekeep">): Promise<number> {
  const { config, configFile, flags, log, signal, now } = service;
  if (flags["dry-run"]) return dryRun({ config, log, signal, now });
  const context = { config, log, signal, now };
  if (!flags.watch) return (await housekeepOnce(context)).faults === 0 ? EXIT.done : EXIT.failed;
  let current = config;
  service.onReload((next) => {
    current = next;
    return next.schedule === config.schedule ? [] : ["schedule"];
  });
  const pass = () => housekeepOnce({ ...context, config: current });
  await followSchedule(config.schedule, pass, { where: `${configFile}: housekeep.schedule`, log, signal });
  return EXIT.done;
}

async function dryRun(context: HousekeepContext): Promise<number> {
  const steps: PlannedStep[] = [];
  const { faults } = await housekeepOnce({ ...context, dryRun: steps });
  const rows = steps.map(({ action, file, bytes, reason }) => [action, file, formatBytes(bytes), reason]);
  const table = formatTable(["would", "file", "size", "because"], rows, [2]);
  process.stdout.write(rows.length > 0 ? table : "nothing to do\n");
  return faults === 0 ? EXIT.done : EXIT.failed;
}

/** One pass over `dir`. Throws an OperatorError when another one runs, or when `dir` is not there or another user's. */
export async function housekeepOnce(context: HousekeepContext): Promise<HousekeepResult> {
  const { config, log, dryRun, now } = context;
  const started = now();
  await refuseForeign(config.dir, dryRun !== undefined);
  const lock = dryRun ? undefined : await holdLock(join(config.dir, ".housekeep.lock"), config.dir);
  try {
    const result: HousekeepResult = { compressed: 0, deleted: 0, freed: 0, faults: 0 };
    const files = await listDelivered(context);
    const { bavail, blocks, bsize } = await statfs(config.dir);
    const space = { free: bavail * bsize, total: blocks * bsize };
    const plan = planPass(files, config, started, space);
    await deleteAll(plan, context, result);
    await compressAll(plan, context, result);
    await trimReports(context);
    await removeDigests(context);
    const undelivered = await countUndelivered(context, space.total);
    log.info(dryRun ? "dry run done" : "housekeeping done", {
      compressed: result.compressed,
      deleted: result.deleted,
      freed: formatBytes(result.freed),
      ...(result.faults > 0 && { faults: result.faults }),
      ...undelivered,
    });
    if (!dryRun) await leaveMetrics(context, result, undelivered, started);
    return result;
  } finally {
    lock?.release();
  }
}

/** What this user would leave there, the receiver and the forwarder could not use. */
async function refuseForeign(dir: string, onlyLooks: boolean): Promise<void> {
  const needed = onlyLooks ? constants.R_OK : constants.R_OK | constants.W_OK;
  await access(dir, needed | constants.X_OK).catch((cause) => {
    throw new OperatorError(`Cannot work in ${dir}: ${errorMessage(cause)}`);
  });
  const [uid, groups] = [process.getuid?.() ?? 0, process.getgroups?.() ?? []];
  const owner = await stat(dir);
  if (onlyLooks || uid === 0 || uid === owner.uid || [process.getgid?.(), ...groups].includes(owner.gid))
    return;
  throw new OperatorError(
    `Cannot work in ${dir}: it belongs to user ${owner.uid}, this is user ${uid}; run as: runuser -u '#${owner.uid}' -- …`,
  );
}

// ---- what there is, and what is to be done with it

export interface Delivered {
  name: string;
  bytes: number;
  /** When it was delivered, milliseconds since the epoch. */
  at: number;
}

/** The delivered batches, oldest delivery first. Stale temp files of ours are removed on the way. */
async function listDelivered({ config, log, dryRun }: HousekeepContext): Promise<Delivered[]> {
  const { sent } = folders(config.dir);
  const info = await ifMissing(lstat(sent));
  if (!info?.isDirectory()) {
    if (info) log.warn("sent is not a folder and is left alone", { path: sent });
    return [];
  }
  const files: Delivered[] = [];
  for (const name of await readdir(sent)) {
    const temp = name.endsWith(TEMP_SUFFIX);
    const state = parseBatchName(temp ? name.slice(0, -TEMP_SUFFIX.length) : name)?.state;
    if (state !== "compressed" && (temp || state !== "sealed")) continue; // not ours
    const file = await ifMissing(lstat(join(sent, name)));
    if (!file?.isFile()) continue; // a symlink, a folder, or gone meanwhile
    if (!temp) files.push({ name, bytes: file.size, at: file.mtimeMs });
    else if (dryRun)
      dryRun.push({ action: "remove", file: name, bytes: file.size, reason: "a run was interrupted" });
    else {
      await removeDurably(join(sent, name));
      log.info("stale temp file removed", { file: name });
    }
  }
  return files.sort((a, b) => a.at - b.at || compareBatchNames(a.name, b.name));
}

/** What is to be done with one file. `early` is before its time, for want of space. */
export interface Step extends Delivered {
  action: "delete" | "early" | "compress";
  reason: string;
}

/** Decides what to do with each delivered batch. `files` come oldest first; `space` is in bytes. */
export function planPass(
  files: Delivered[],
  { compressAfterHours, deleteAfterHours, minFreePercent }: Options,
  now: number,
  space: { free: number; total: number },
): Step[] {
  const steps: Step[] = [];
  let { free } = space;
  const ago = (file: Delivered) => `delivered ${formatDuration(Math.max(0, now - file.at))} ago`;
  for (const file of files) {
    if (now - file.at < deleteAfterHours * HOUR) continue;
    steps.push({
      ...file,
      action: "delete",
      reason: `${ago(file)}, deleteAfterHours is ${deleteAfterHours}`,
    });
    free += file.bytes;
  }
  for (const file of files.slice(steps.length)) {
    if (free < (space.total * minFreePercent) / 100) {
      const reason = `less than ${minFreePercent} % of the disk is free (minFreePercent)`;
      steps.push({ ...file, action: "early", reason });
      free += file.bytes;
    } else if (now - file.at >= compressAfterHours * HOUR && parseBatchName(file.name)?.state === "sealed") {
      const reason = `${ago(file)}, compressAfterHours is ${compressAfterHours}`;
      steps.push({ ...file, action: "compress", reason });
    }
  }
  return steps;
}

// ---- delete

async function deleteAll(plan: Step[], context: HousekeepContext, result: HousekeepResult): Promise<void> {
  const { config, log, signal, dryRun } = context;
  const early = plan.filter((step) => step.action === "early");
  if (early.length > 0) {
    const { minFreePercent } = config;
    const fields = { files: early.length, bytes: formatBytes(bytesOf(early)), minFreePercent };
    const verb = dryRun ? "would delete" : "deleting";
    log.warn(`disk nearly full: ${verb} delivered files before their time`, fields);
  }
  for (const { name, bytes, action, reason } of plan) {
    if (signal.aborted) return;
    if (action === "compress") continue;
    const fields = { file: name, bytes, ...(action === "early" && { early: true }) };
    try {
      if (dryRun) dryRun.push({ action: "delete", file: name, bytes, reason });
      else {
        await removeDurably(join(folders(config.dir).sent, name));
        failpoint("housekeep:deleted");
        log.info("deleted", fields);
      }
      result.deleted++;
      result.freed += bytes;
    } catch (error) {
      result.faults++;
      log.error("cannot delete", { ...fields, error: errorMessage(error) });
    }
  }
}

function bytesOf(files: Delivered[]): number {
  return files.reduce((total, file) => total + file.bytes, 0);
}

// ---- compress

/** Compresses several files at a time; the work itself runs on threads of the runtime. */
async function compressAll(plan: Step[], context: HousekeepContext, result: HousekeepResult): Promise<void> {
  const { signal, dryRun } = context;
  const queue = plan.filter((step) => step.action === "compress");
  const progress = createProgress("compressing", bytesOf(queue));
  let done = 0;
  const read = (bytes: number) => {
    done += bytes;
    progress.show(done);
  };
  const work = async () => {
    for (let step = queue.shift(); step && !signal.aborted; step = queue.shift())
      await compressStep(step, context, result, read);
  };
  const workers = dryRun ? 1 : Math.min(MOST_AT_ONCE, Math.max(1, availableParallelism() - 1));
  await Promise.all(Array.from({ length: workers }, work));
  progress.end();
}

async function compressStep(
  { name, bytes, reason }: Step,
  { config, log, signal, dryRun }: HousekeepContext,
  result: HousekeepResult,
  read: (bytes: number) => void,
): Promise<void> {
  const { sent } = folders(config.dir);
  const fields = { file: name, bytes };
  try {
    const started = Date.now();
    const size = await compressFile(sent, name, { signal, read, onlyLooks: dryRun !== undefined });
    if (size === undefined) {
      dryRun?.push({ action: "stays", file: name, bytes, reason: "it would grow" });
      return;
    }
    if (dryRun) dryRun.push({ action: "compress", file: name, bytes, reason });
    else log.info("compressed", { ...fields, to: size, ms: Date.now() - started });
    result.freed += dryRun ? 0 : bytes - size;
    result.compressed++;
  } catch (error) {
    if (signal.aborted) return;
    if ((error as NodeJS.ErrnoException).code === "ENOENT") {
      log.info("gone meanwhile", fields);
      return;
    }
    result.faults++;
    dryRun?.push({ action: "stays", file: name, bytes, reason: errorMessage(error) });
    log.error("cannot compress", { ...fields, error: errorMessage(error) });
  }
}

/** Length and CRC-32 of a file's content; of a `.gz`, of what is inside. */
interface Content {
  bytes: number;
  crc: number;
}

interface CompressOptions {
  signal: AbortSignal;
  read?: (bytes: number) => void;
  onlyLooks?: boolean;
}

/**
 * Replaces the sealed batch `name` in `folder` by its `.gz` and gives its size; undefined when it would grow, and stays.
 *
 * Throws when a `.gz` with other content is there (both stay), when the file is a symlink (ELOOP) or gone (ENOENT), when
 * it changes meanwhile, when `signal` is aborted, and the system's error.
 */
export async function compressFile(
  folder: string,
  name: string,
  { signal, read = () => {}, onlyLooks = false }: CompressOptions,
): Promise<number | undefined> {
  const from = join(folder, name);
  const to = join(folder, withState(name, "compressed"));
  const file = await open(from, constants.O_RDONLY | constants.O_NOFOLLOW);
  try {
    const before = await file.stat();
    const found = await compareGzip(to, file, signal);
    if (found === "absent" && (await wouldGrow(file))) return undefined;
    if (onlyLooks) return 0;
    if (found === "damaged") await removeDurably(to);
    if (found !== "same" && !(await writeGzip(file, before, to, { signal, read }))) return undefined;
    await refuseChanged(file, before);
  } finally {
    await file.close();
  }
  const { size } = await lstat(to);
  await removeDurably(from); // safe: the .gz is on stable storage under its name, read back and compared
  failpoint("housekeep:removed");
  return size;
}

/** Whether the `.gz` is there and holds what `file` holds. Throws when it holds something else. */
async function compareGzip(gz: string, file: FileHandle, signal: AbortSignal) {
  const there = await ifMissing(lstat(gz));
  if (!there) return "absent";
  if (!there.isFile()) throw new Error(`Cannot compress: "${gz}" is there and not a file`);
  const inside = await readGzip(gz, signal);
  if (inside === undefined) return "damaged";
  const original = { bytes: 0, crc: 0 };
  for await (const _ of checksum(readBlocks(file), original)) signal.throwIfAborted();
  if (sameContent(inside, original)) return "same";
  const sizes = `${inside.bytes} bytes inside, expected ${original.bytes}`;
  throw new Error(`Cannot compress: "${gz}" is there with other content (${sizes}); both stay`);
}

async function wouldGrow(file: FileHandle): Promise<boolean> {
  const { size } = await file.stat();
  if (size > SMALL_BYTES) return false;
  const { buffer, bytesRead } = await file.read(Buffer.alloc(size), 0, size, 0);
  return gzipSync(buffer.subarray(0, bytesRead), { level: LEVEL }).length >= bytesRead;
}

/** Whether the `.gz` is there now; false when it would not be smaller than the original. */
async function writeGzip(
  file: FileHandle,
  before: Stats,
  to: string,
  { signal, read }: { signal: AbortSignal; read: (bytes: number) => void },
): Promise<boolean> {
  const temp = to + TEMP_SUFFIX;
  const original = { bytes: 0, crc: 0 };
  const { uid, gid, mode, mtimeMs, size } = before;
  try {
    await pipeline(
      checksum(readBlocks(file), original, read),
      createGzip({ level: LEVEL, chunkSize: BLOCK }),
      createWriteStream(temp, { flags: "wx", mode: 0o600 }), // wx: never through a symlink
      { signal },
    );
    failpoint("housekeep:written");
    await refuseChanged(file, before, original.bytes);
    if ((await lstat(temp)).size >= size) return false;
    await keepOwner(temp, uid, gid);
    await chmod(temp, mode & 0o777);
    await utimes(temp, mtimeMs / 1000, mtimeMs / 1000);
    await syncPath(temp);
    const inside = await readGzip(temp, signal);
    if (inside === undefined || !sameContent(inside, original)) {
      throw new Error(`Cannot write "${temp}": it reads back differently, expected ${original.bytes} bytes`);
    }
    failpoint("housekeep:verified");
    await moveDurably(temp, to);
    failpoint("housekeep:renamed");
    return true;
  } finally {
    await rm(temp, { force: true }); // a part of a file helps nobody, least of all when the disk is full
  }
}

/**
 * Throws when an open file is not as it was, has lost its name (which another file may have now), or not all of it was
 * read: what came to it is in no `.gz`.
 */
async function refuseChanged(file: FileHandle, before: Stats, read = before.size): Promise<void> {
  const { size, mtimeMs, nlink } = await file.stat();
  if (nlink < before.nlink) throw new Error("Cannot compress: it was removed or replaced meanwhile");
  if (size !== before.size || mtimeMs !== before.mtimeMs || read !== before.size)
    throw new Error(`Cannot compress: it changed meanwhile (${before.size} bytes at first, then ${size})`);
}

/** Who may not give a file away (all but root) keeps what can be kept: the group, when it is in it. */
async function keepOwner(path: string, uid: number, gid: number): Promise<void> {
  const own = await lstat(path);
  if (own.uid === uid && own.gid === gid) return;
  const refused = (error: NodeJS.ErrnoException) => {
    if (error.code !== "EPERM") throw error;
  };
  await chown(path, process.getuid?.() === 0 ? uid : own.uid, gid).catch(refused);
}

/** What is inside a `.gz`, or undefined when it is damaged or cut short. */
async function readGzip(path: string, signal: AbortSignal): Promise<Content | undefined> {
  const content = { bytes: 0, crc: 0 };
  const source = createReadStream(path, { highWaterMark: BLOCK });
  const drain = async (blocks: AsyncIterable<Buffer>) => {
    for await (const _ of checksum(blocks, content));
  };
  try {
    await pipeline(source, createGunzip({ chunkSize: BLOCK }), drain, { signal });
    return content;
  } catch (error) {
    // An error of the file system has a system call, one of the data (Z_DATA_ERROR, Z_BUF_ERROR) has none.
    if (signal.aborted || (error as NodeJS.ErrnoException).syscall !== undefined) throw error;
    return undefined;
  }
}

async function* readBlocks(file: FileHandle): AsyncGenerator<Buffer> {
  for (let position = 0; ; ) {
    const { bytesRead, buffer } = await file.read(Buffer.allocUnsafe(BLOCK), 0, BLOCK, position);
    if (bytesRead === 0) return;
    position += bytesRead;
    yield buffer.subarray(0, bytesRead);
  }
}

/** Hands the blocks on and notes their length and CRC-32 in `content`. */
async function* checksum(
  blocks: AsyncIterable<Buffer>,
  content: Content,
  read: (bytes: number) => void = () => {},
): AsyncGenerator<Buffer> {
  for await (const block of blocks) {
    content.bytes += block.length;
    content.crc = crc32(block, content.crc);
    read(block.length);
    yield block;
  }
}

function sameContent(a: Content, b: Content): boolean {
  return a.bytes === b.bytes && a.crc === b.crc;
}

// ---- reports, digests, and what is not delivered

/** Drops old lines of the forwarder's reports; `reportDays` is far more than the monitor looks back. */
async function trimReports({ config, log, now, dryRun }: HousekeepContext): Promise<void> {
  for (const report of [config.report, failReportPath(config.report)]) {
    const before = now() - config.reportDays * DAY;
    const { lines, bytes } = await trimReport(report, before, { dryRun: dryRun !== undefined });
    if (lines === 0) continue;
    const reason = `${lines} lines are older than reportDays (${config.reportDays})`;
    if (dryRun) dryRun.push({ action: "trim", file: report, bytes, reason });
    else log.info("report trimmed", { report, lines });
  }
}

/** Digests and the lists that they were made of are kept as long as the reports. */
async function removeDigests({ config, log, now, dryRun }: HousekeepContext): Promise<void> {
  const before = now() - config.reportDays * DAY;
  const old = await removeOldDigests(config.dir, before, { dryRun: dryRun !== undefined });
  for (const { file, bytes } of old) {
    const reason = `it is older than reportDays (${config.reportDays})`;
    if (dryRun) dryRun.push({ action: "delete", file, bytes, reason });
    else log.info("digest removed", { file });
  }
}

/** How many batches are not delivered yet; none of them is ever touched, so that the operator must know. */
async function countUndelivered({ config, log }: HousekeepContext, diskBytes: number) {
  const { dir } = config;
  let waiting = 0;
  for (const host of await listHosts(dir)) {
    // a folder of someone else, closed to us, is no host's
    waiting += (await listBatches(folders(dir).host(host), "sealed").catch(() => [])).length;
  }
  const { failed: folder } = folders(dir);
  const isFolder = (await ifMissing(lstat(folder)))?.isDirectory();
  const failed = isFolder ? await listBatches(folder, "sealed") : [];
  let bytes = 0;
  for (const name of failed) bytes += (await ifMissing(lstat(join(folder, name))))?.size ?? 0;
  if (failed.length >= MANY_FAILED.files || bytes >= diskBytes * MANY_FAILED.part)
    log.warn("failed/ grows: look why the client refuses", {
      files: failed.length,
      bytes: formatBytes(bytes),
    });
  return { waiting, failed: failed.length };
}

/** For the textfile collector of node_exporter. What can't be written is told, and stops nothing. */
async function leaveMetrics(
  { config, log, now }: HousekeepContext,
  { compressed, deleted, freed, faults }: HousekeepResult,
  { waiting, failed }: { waiting: number; failed: number },
  started: number,
): Promise<void> {
  const metrics: Metric[] = [
    ["last_run_timestamp_seconds", "gauge", "When the last run ended", now() / 1000],
    ["last_run_duration_seconds", "gauge", "How long it took", (now() - started) / 1000],
    ["last_run_compressed_files", "gauge", "Delivered batches that it compressed", compressed],
    ["last_run_deleted_files", "gauge", "Delivered batches that it deleted", deleted],
    ["last_run_freed_bytes", "gauge", "Bytes of the disk that it won", freed],
    ["last_run_faults", "gauge", "Files that it could not deal with", faults],
    ["waiting_files", "gauge", "Sealed batches that wait for the forwarder", waiting],
    ["failed_files", "gauge", "Batches in failed/", failed],
  ];
  try {
    await writeMetrics(folders(config.dir).metrics, "housekeep", metrics);
  } catch (error) {
    log.warn("metrics not written", { error: errorMessage(error) });
  }
}

async function check({ config, checks }: Service<"housekeep">): Promise<void> {
  for (const fault of checkSchedule(config.schedule)) checks.fault(`housekeep.schedule: ${fault}`);
  await checks.folder("housekeep.dir", config.dir, "write");
  await checks.folder("housekeep.report", dirname(config.report), "write");
}

if (import.meta.main) {
  await runScript(
    {
      name: "housekeep",
      about: "Compresses and deletes what was delivered; once (for cron), or by its schedule with --watch.",
      flags: {
        watch: "stay and follow housekeep.schedule",
        "dry-run": "show what a run would do, file by file, with the reason; change nothing",
      },
      check,
    },
    main,
  );
}
