/**
 * The group commit: chunks that come while a commit is on its way wait together, and the next commit takes all
 * of them, of all senders, so that they share its syncs. Everything that writes (commits, sealing, opening a
 * sender) takes turns; nothing is answered before the syncs of its lines and of its ledger record have returned.
 */
import { fdatasync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { dashedHost, listHosts } from "../batch.ts";
import { exists, type FileSystem, failpoint, openFileSystem, syncData, syncFolder } from "../durable.ts";
import { createFaultLog, errorMessage } from "../service.ts";
import { type Chunk, type Outcome, openSender, type Sender, type StoreOptions } from "./sender.ts";

/** From so many senders on, one sync of the whole file system costs less than one of each of their files. */
const MANY_SENDERS = 8;

const syncDataInPool = promisify(fdatasync);
const nextTick = promisify(setImmediate);

/** A chunk that cannot be taken now; `status` as in the wire contract. */
export class StoreError extends Error {
  readonly status: 403 | 503 | 507;
  constructor(status: 403 | 503 | 507, message: string, cause?: unknown) {
    super(message, { cause });
    this.status = status;
  }
}

interface Waiting {
  chunk: Chunk;
  sender: Sender;
  outcome: Outcome | undefined;
  resolve: (outcome: Outcome) => void;
  reject: (error: unknown) => void;
}

export type Store = ReturnType<typeof createStore>;

export interface CommitOptions extends StoreOptions {
  /** How many senders may be known at once. */
  maxHosts: number;
  /** How many requests are in hand, with those that a commit is being made for. */
  inHand: () => number;
  /** Told how long each commit took, in milliseconds. */
  onCommit: (ms: number) => void;
}

/** The folder of all senders. */
export function createStore(options: CommitOptions) {
  const { dir, log, now } = options;
  const faults = createFaultLog(log, now);
  const senders = new Map<string, Sender>();
  const opening = new Map<string, Promise<Sender>>();
  const dashes = new Map<string, string>();
  /** Senders of ours that have a folder and could not be opened: tried again, for what is due in it. */
  const unopened = new Set<string>();
  const queue: Waiting[] = [];
  let turns: Promise<unknown> = Promise.resolve();
  let fileSystem: FileSystem | undefined;

  /** Runs `work` when everything before it is done. */
  function turn<T>(work: () => Promise<T>): Promise<T> {
    const result = turns.then(work);
    turns = result.catch(() => {});
    return result;
  }

  /** Takes a chunk and gives its outcome once that is on stable storage. Throws a StoreError. */
  function commit(chunk: Chunk): Promise<Outcome> {
    const known = senders.get(chunk.host);
    return known && !known.broken
      ? enqueue(chunk, known)
      : open(chunk.host).then((sender) => enqueue(chunk, sender));
  }

  function enqueue(chunk: Chunk, sender: Sender): Promise<Outcome> {
    return new Promise((resolve, reject) => {
      queue.push({ chunk, sender, outcome: undefined, resolve, reject });
      if (queue.length > 1) return; // the turn that is booked takes this one, too
      turn(async () => {
        await nextTick(); // requests that have come meanwhile are read, and share the syncs
        await commitAll(queue.splice(0));
      }).catch(reject);
    });
  }

  async function commitAll(waiting: Waiting[]): Promise<void> {
    const started = performance.now();
    const failed = new Map<Sender, unknown>();
    const touched = stageAll(waiting, failed);
    const how = {
      inPlace: options.inHand() <= 1,
      fileSystem: touched.length >= MANY_SENDERS ? fileSystem : undefined,
    };
    const going = () => touched.filter(({ sender }) => !failed.has(sender));
    await syncAll(
      going().flatMap(({ sender }) => [
        ...sender.unsynced().map(({ fd }) => ({ sender, fd })),
        ...(sender.created ? [{ sender, folder: sender.folder }] : []),
      ]),
      failed,
      how,
    );
    failpoint("commit:synced");
    const ledgers = attemptAll(going(), failed, ({ sender }) => ({ sender, fd: sender.append() }));
    failpoint("commit:appended");
    await syncAll(ledgers, failed, how);
    failpoint("commit:recorded");
    for (const { sender } of going()) sender.apply();
    for (const sender of failed.keys()) sender.rollBack();
    answer(waiting, failed, performance.now() - started);
    await compactOne(going());
  }

  /** Rewrites the ledger of one sender that has grown; of many that grow together the others wait their turn. */
  async function compactOne(touched: { sender: Sender }[]): Promise<void> {
    const grown = touched.find(({ sender }) => sender.isGrown)?.sender;
    await grown?.compact().catch((error) => {
      grown.broken = true;
      faults.failed(grown.host, "ledger not rewritten", { host: grown.host, error: errorMessage(error) });
    });
  }

  /** Writes the lines of all chunks. Returns the senders that have something to commit. */
  function stageAll(waiting: Waiting[], failed: Map<Sender, unknown>): { sender: Sender }[] {
    const touched = new Set<Sender>();
    const stageable = waiting.filter(({ sender }) => !sender.broken);
    attemptAll(stageable, failed, (entry) => {
      entry.outcome = entry.sender.stage(entry.chunk);
      if (!entry.outcome.conflict) touched.add(entry.sender);
    });
    return [...touched].map((sender) => ({ sender }));
  }

  function answer(waiting: Waiting[], failed: Map<Sender, unknown>, ms: number): void {
    for (const { sender, outcome, resolve, reject } of waiting) {
      const error = failed.get(sender);
      if (error !== undefined || !outcome) {
        faults.failed(sender.host, "chunk not stored", { host: sender.host, error: errorMessage(error) });
        reject(storeError(error ?? new Error("the folder is looked at anew; try again")));
      } else {
        faults.recovered(sender.host, "chunks are stored again", { host: sender.host });
        resolve(outcome);
      }
    }
    options.onCommit(ms);
  }

  /** Opens a sender, with its folder brought into order: once, however many wait for it. */
  function open(host: string): Promise<Sender> {
    const under = opening.get(host);
    if (under) return under;
    const started = openNow(host).finally(() => opening.delete(host));
    opening.set(host, started);
    return started;
  }

  async function openNow(host: string): Promise<Sender> {
    const known = senders.get(host);
    if (known && !known.broken) return known;
    try {
      if (known) await turn(async () => known.close()); // not while a commit has it
      senders.delete(host);
      await admit(host);
      const sender = await openSender(host, options);
      senders.set(host, sender);
      unopened.delete(host);
      faults.recovered(host, "sender is open again", { host });
      return sender;
    } catch (error) {
      if (error instanceof StoreError) throw error;
      faults.failed(host, "sender cannot be opened", { host, error: errorMessage(error) });
      throw storeError(error);
    }
  }

  async function openAll(): Promise<void> {
    for (const sender of senders.values()) if (sender.broken) unopened.add(sender.host);
    for (const host of [...unopened]) await open(host).catch(() => {}); // told already
  }

  /** Two hosts must not share a dashed form: their batches would have the same names. */
  async function admit(host: string): Promise<void> {
    const dashed = dashedHost(host);
    if (!dashes.has(dashed)) {
      for (const known of await listHosts(dir)) dashes.set(dashedHost(known), known);
    }
    const owner = dashes.get(dashed) ?? host;
    if (owner !== host) throw new StoreError(403, `host ${host} would have the file names of host ${owner}`);
    if (senders.size >= options.maxHosts)
      throw new StoreError(503, `${options.maxHosts} hosts are known already`);
    dashes.set(dashed, host);
  }

  return {
    commit,
    senders: senders as ReadonlyMap<string, Sender>,

    /** Where a stream stands, or undefined when it is not known. Makes nothing on disk for a new host. */
    async committed(host: string, stream: string): Promise<number | undefined> {
      if (!senders.has(host) && !(await exists(join(dir, host)))) return undefined;
      const sender = senders.get(host) ?? (await open(host));
      return sender.ledger.streams.get(stream)?.offset;
    },

    /** Opens every sender that `isOurs` and has something on disk, so that what is due is sealed without it. */
    async start(isOurs: (host: string) => boolean): Promise<void> {
      fileSystem = await openFileSystem(dir);
      for (const host of await listHosts(dir)) {
        dashes.set(dashedHost(host), host);
        if (!isOurs(host) || (await readdir(join(dir, host))).length === 0) continue;
        unopened.add(host);
      }
      await openAll();
    },

    /** Seals what is due and lets idle senders rest. Returns the names that were sealed. */
    async seal(): Promise<string[]> {
      const sealed: string[] = [];
      await openAll();
      for (const sender of [...senders.values()]) {
        for (const name of sender.due()) {
          if (sender.broken) break; // opened anew the next time
          try {
            const batch = sender.ledger.open.get(name);
            await turn(() => sender.seal(name));
            sealed.push(name);
            log.info("batch sealed", { batch: name, lines: batch?.lines, bytes: batch?.bytes });
            faults.recovered(name, "batch sealed after all", { batch: name });
          } catch (error) {
            faults.failed(name, "batch not sealed", { batch: name, error: errorMessage(error) });
          }
        }
        if (!sender.isUntidy()) continue;
        await turn(() => sender.tidy()).catch((error) => {
          faults.failed(sender.folder, "ledger not tidied", {
            host: sender.host,
            error: errorMessage(error),
          });
        });
      }
      return sealed;
    },

    /** Ends after the commits that are on their way. */
    close: () =>
      turn(async () => {
        for (const sender of senders.values()) sender.close();
        senders.clear();
        fileSystem?.close();
        fileSystem = undefined;
      }),
  };
}

/** Does `work` for each, but for the senders that have failed; what throws, fails its sender. */
function attemptAll<T extends { sender: Sender }, R>(
  entries: T[],
  failed: Map<Sender, unknown>,
  work: (entry: T) => R,
): R[] {
  const results: R[] = [];
  for (const entry of entries) {
    if (failed.has(entry.sender)) continue;
    try {
      results.push(work(entry));
    } catch (error) {
      failed.set(entry.sender, error);
    }
  }
  return results;
}

/** What of a sender must be on stable storage: an open file, or the names in its folder. */
type Unsynced = { sender: Sender; fd: number } | { sender: Sender; folder: string };

/** How files are synced. */
interface HowToSync {
  /** Nobody else waits. */
  inPlace: boolean;
  /** The one to sync as a whole, for many. */
  fileSystem: FileSystem | undefined;
}

/**
 * Syncs what belongs to senders; whose sync fails, that sender has failed. Those of many go with one sync of their file
 * system. A few go together through the thread pool, so that the file system's journal writes them at once and the
 * next chunks are read meanwhile. A single file when nobody else waits goes in place: the way through the pool costs
 * more than a fast disk takes.
 */
async function syncAll(
  all: Unsynced[],
  failed: Map<Sender, unknown>,
  { inPlace, fileSystem }: HowToSync,
): Promise<void> {
  const [only] = all;
  if (all.length === 1 && only && "fd" in only && inPlace) {
    attemptAll([only], failed, () => syncData(only.fd));
    return;
  }
  const isElsewhere = ({ sender }: Unsynced) => sender.device !== fileSystem?.device;
  const rest = fileSystem?.sync() ? all.filter(isElsewhere) : all;
  const sync = (one: Unsynced) => ("fd" in one ? syncDataInPool(one.fd) : syncFolder(one.folder));
  await Promise.all(rest.map((one) => sync(one).catch((error) => failed.set(one.sender, error))));
}

/** What a system's error means for the sender of a chunk. */
function storeError(error: unknown): StoreError {
  const { code } = (error ?? {}) as NodeJS.ErrnoException;
  const status = ["ENOSPC", "EDQUOT", "EROFS", "EIO"].includes(code ?? "") ? 507 : 503;
  return new StoreError(status, `not stored: ${code ?? errorMessage(error)}`, error);
}
