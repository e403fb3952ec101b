/**
 * Housekeeping: `sent/` → `.gz` → gone. Only what was delivered is ever compressed or deleted, whatever its age;
 * `failed/` and the senders' folders are counted and left alone.
 *
 * Age is counted from the delivery: the forwarder gives a file in `sent/` the modification time of its delivery
 * and the `.gz` keeps it. (A file that was moved there by hand counts from its own time: `touch` it.)
 *
 * Compression: temp file, sync, read back and compared with the original (length and CRC-32), old time set,
 * renamed to `.gz`, and only then the original is removed. A crash before the rename leaves a temp file, which
 * the next run removes; a crash after it leaves both, and the next run compares them again before it removes
 * the original. A `.gz` that is already there is checked in the same way: damaged, it is written anew;
 * with other content, both stay and it is said. One run at a time, by a lock that ends with its process.
 */
import { constants } from "node:fs";
import { access, lstat, readdir, statfs } from "node:fs/promises";
import { availableParallelism, constants as priorities, setPriority } from "node:os";
import { join } from "node:path";
import { compareBatchNames, folders, LEDGER, listBatches, listHosts, parseBatchName } from "./lib/batch.ts";
import { compressFile } from "./lib/compress.ts";
import type { Config } from "./lib/config.ts";
import { exists, failpoint, removeDurably, TEMP_SUFFIX } from "./lib/durable.ts";
import { readLedger, SEALED } from "./lib/ledger.ts";
import { holdLock } from "./lib/lock.ts";
import { failReportPath, trimReport } from "./lib/report.ts";
import { type Delivered, planPass, type Step } from "./lib/retention.ts";
import { tryLock } from "./lib/runtime.ts";
import { checkSchedule, followSchedule } from "./lib/schedule.ts";
import { forgetSealed } from "./lib/sealed.ts";
import {
  createProgress,
  EXIT,
  errorMessage,
  formatBytes,
  type Log,
  OperatorError,
  runScript,
  type Service,
} from "./lib/service.ts";

type Options = Config["housekeep"];
const DAY_MS = 24 * 3_600_000;
/** Files compressed at once by default, however many cores there are: each takes some 10 MiB. */
const MOST_AT_ONCE = 8;
/** The receiver holds it while it serves a sender. */
const LOCK = `${LEDGER}-lock`;

/** What a pass is given; `dryRun` changes nothing and says what would be done. */
export interface HousekeepContext {
  config: Options;
  log: Log;
  signal: AbortSignal;
  now: () => number;
  dryRun?: boolean;
}

/** What a pass did. */
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
  await stepBack();
  const context = { config, log, signal, now, dryRun: flags["dry-run"] === true };
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

/** Lets the receiver go first. Linux has a priority per thread, and those that compress are there already. */
async function stepBack(): Promise<void> {
  const threads = await readdir("/proc/self/task").catch(() => []);
  for (const id of [0, ...threads.map(Number)]) {
    try {
      setPriority(id, priorities.priority.PRIORITY_BELOW_NORMAL);
    } catch {
      // the thread has ended, or the system has no such thing: it is only a courtesy
    }
  }
}

/** One pass over `dir`. Throws an OperatorError when another one runs, or when `dir` is not there. */
export async function housekeepOnce(context: HousekeepContext): Promise<HousekeepResult> {
  const { config, log } = context;
  const needed = context.dryRun ? constants.R_OK : constants.R_OK | constants.W_OK;
  await access(config.dir, needed | constants.X_OK).catch((cause) => {
    throw new OperatorError(`Cannot work in ${config.dir}: ${errorMessage(cause)}`);
  });
  const lock = context.dryRun ? undefined : await holdLock(join(config.dir, ".housekeep.lock"), config.dir);
  try {
    const result: HousekeepResult = { compressed: 0, deleted: 0, freed: 0, faults: 0 };
    const files = await listDelivered(context);
    const space = await statfs(config.dir);
    const plan = planPass(files, config, context.now(), {
      free: space.bavail * space.bsize,
      total: space.blocks * space.bsize,
    });
    await deleteAll(plan.filter(isDelete), context, result);
    await compressAll(
      plan.filter((step) => step.action === "compress"),
      context,
      result,
    );
    await trimReports(context);
    await removeRecords(context);
    log.info(context.dryRun ? "dry run done" : "housekeeping done", {
      compressed: result.compressed,
      deleted: result.deleted,
      freed: formatBytes(result.freed),
      ...(result.faults > 0 && { faults: result.faults }),
      ...(await countUndelivered(config.dir)),
    });
    return result;
  } finally {
    lock?.release();
  }
}

/** The delivered batches, oldest delivery first. Stale temp files of ours are removed on the way. */
async function listDelivered({ config, log, dryRun }: HousekeepContext): Promise<Delivered[]> {
  const { sent } = folders(config.dir);
  const info = await lstat(sent).catch(absent);
  if (!info?.isDirectory()) {
    if (info) log.warn("sent is not a folder and is left alone", { path: sent });
    return [];
  }
  const files: Delivered[] = [];
  for (const name of await readdir(sent)) {
    const temp = name.endsWith(TEMP_SUFFIX);
    const state = parseBatchName(temp ? name.slice(0, -TEMP_SUFFIX.length) : name)?.state;
    if (state !== "compressed" && (temp || state !== "sealed")) continue; // not ours
    const file = await lstat(join(sent, name)).catch(absent);
    if (!file?.isFile()) continue; // a symlink, a folder, or gone meanwhile
    if (!temp) files.push({ name, bytes: file.size, at: file.mtimeMs });
    else {
      log.info(dryRun ? "would remove a stale temp file" : "stale temp file removed", { file: name });
      if (!dryRun) await removeDurably(join(sent, name));
    }
  }
  return files.sort((a, b) => a.at - b.at || compareBatchNames(a.name, b.name));
}

const isDelete = (step: Step) => step.action !== "compress";

async function deleteAll(steps: Step[], context: HousekeepContext, result: HousekeepResult): Promise<void> {
  const { config, log, signal, dryRun } = context;
  const early = steps.filter((step) => step.action === "early");
  if (early.length > 0) {
    const bytes = formatBytes(sum(early));
    const message = dryRun
      ? "disk nearly full: would delete delivered files before their time"
      : "disk nearly full: deleting delivered files before their time";
    log.warn(message, { files: early.length, bytes, minFreePercent: config.minFreePercent });
  }
  for (const { name, bytes, action } of steps) {
    if (signal.aborted) return;
    const fields = { file: name, bytes, ...(action === "early" && { early: true }) };
    try {
      if (!dryRun) await removeDurably(join(folders(config.dir).sent, name));
      failpoint("housekeep:deleted");
      log.info(dryRun ? "would delete" : "deleted", fields);
      result.deleted++;
      result.freed += bytes;
    } catch (error) {
      result.faults++;
      log.error("cannot delete", { ...fields, error: errorMessage(error) });
    }
  }
}

/** Compresses several files at a time; the work itself runs on threads of the runtime. */
async function compressAll(steps: Step[], context: HousekeepContext, result: HousekeepResult): Promise<void> {
  const { config, log, signal, dryRun } = context;
  const { sent } = folders(config.dir);
  const progress = createProgress("compressing", sum(steps));
  const queue = [...steps];
  let done = 0;
  const show = (bytes: number) => {
    done += bytes;
    progress.show(done);
  };
  const work = async () => {
    for (let step = queue.shift(); step && !signal.aborted; step = queue.shift()) {
      const fields = { file: step.name, bytes: step.bytes };
      try {
        if (dryRun) log.info("would compress", fields);
        else {
          const started = Date.now();
          const size = await compressFile(sent, step.name, { signal, read: show });
          log.info("compressed", { ...fields, to: size, ms: Date.now() - started });
          result.freed += step.bytes - size;
        }
        result.compressed++;
      } catch (error) {
        if (signal.aborted) return;
        if ((error as NodeJS.ErrnoException).code === "ENOENT") {
          log.info("gone meanwhile", fields);
          continue;
        }
        result.faults++;
        log.error("cannot compress", { ...fields, error: errorMessage(error) });
      }
    }
  };
  const workers = config.parallel ?? Math.min(MOST_AT_ONCE, Math.max(1, availableParallelism() - 1));
  await Promise.all(Array.from({ length: workers }, work));
  progress.end();
}

/** Drops old lines of the forwarder's reports; `reportDays` is far more than the monitor looks back. */
async function trimReports({ config, log, now, dryRun = false }: HousekeepContext): Promise<void> {
  for (const report of [config.report, failReportPath(config.report)]) {
    if (!(await exists(report))) continue;
    const lines = await trimReport(report, now() - config.reportDays * DAY_MS, { dryRun });
    if (lines > 0) log.info(dryRun ? "would trim a report" : "report trimmed", { report, lines });
  }
}

/**
 * Removes the records of senders that were not heard of for `forgetAfterDays` and have no batch left. Of the
 * names that they used up one line stays, the newest window: when such a sender comes back with old lines, a
 * name must not be used a second time.
 */
async function removeRecords({ config, log, now, dryRun }: HousekeepContext): Promise<void> {
  const before = now() - config.forgetAfterDays * DAY_MS;
  for (const host of await listHosts(config.dir)) {
    const folder = folders(config.dir).host(host);
    if (!(await isForgotten(folder, before))) continue;
    if (dryRun) {
      log.info("would remove the records of a sender long gone", { host });
      continue;
    }
    const lock = await tryLock(join(folder, LOCK));
    if (!lock) continue; // the receiver has just heard of it
    try {
      if (!(await isForgotten(folder, before))) continue;
      await forgetSealed(folder, before);
      const records = (await readdir(folder)).filter((name) => ![SEALED, LOCK].includes(name));
      for (const name of records) await removeDurably(join(folder, name));
      log.info("records of a sender long gone removed", { host });
    } finally {
      lock.release();
    }
  }
}

/** Whether a sender's folder holds nothing but records, and nothing was heard since `before`. */
async function isForgotten(folder: string, before: number): Promise<boolean> {
  if ((await readdir(folder)).some((name) => !name.startsWith(LEDGER))) return false;
  const ledger = await readLedger(folder);
  return ledger !== undefined && ledger.heardAt < before && ledger.open.size === 0;
}

/** How much is not delivered yet; none of it is ever touched. */
async function countUndelivered(dir: string) {
  const count = async (paths: string[]) => {
    const sizes = await Promise.all(
      paths.map((path) =>
        lstat(path).then(
          (info) => info.size,
          () => 0,
        ),
      ),
    );
    return { files: sizes.length, bytes: formatBytes(sizes.reduce((a, b) => a + b, 0)) };
  };
  const waitingPaths: string[] = [];
  for (const host of await listHosts(dir)) {
    const folder = folders(dir).host(host);
    for (const name of await listBatches(folder, "sealed")) waitingPaths.push(join(folder, name));
  }
  const { failed: failedFolder } = folders(dir);
  const isFolder = (await lstat(failedFolder).catch(absent))?.isDirectory();
  const failedNames = isFolder ? await listBatches(failedFolder, "sealed") : [];
  const waiting = await count(waitingPaths);
  const failed = await count(failedNames.map((name) => join(failedFolder, name)));
  return {
    waiting: waiting.files,
    waitingBytes: waiting.bytes,
    failed: failed.files,
    failedBytes: failed.bytes,
  };
}

function sum(files: Delivered[]): number {
  return files.reduce((total, file) => total + file.bytes, 0);
}

/** For a file that may be gone: undefined instead of ENOENT. */
function absent(error: NodeJS.ErrnoException): undefined {
  if (error.code !== "ENOENT") throw error;
}

async function check({ config, checks }: Service<"housekeep">): Promise<void> {
  for (const fault of checkSchedule(config.schedule)) checks.fault(`housekeep.schedule: ${fault}`);
  await checks.folder("housekeep.dir", config.dir, "write");
}

if (import.meta.main) {
  await runScript(
    {
      name: "housekeep",
      about: "Compresses and deletes what was delivered; once (for cron), or by its schedule with --watch.",
      flags: {
        watch: "stay and follow housekeep.schedule",
        "dry-run": "print exactly what would be done and change nothing",
      },
      check,
    },
    main,
  );
}
