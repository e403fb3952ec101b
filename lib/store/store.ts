/**
 * The folder of all senders: who may have a place in it, chunks that come ahead of others, and the background work:
 * checkpoints, segments that are dropped behind them, sealing, what is written again from the journal after a fault.
 */
import { randomBytes } from "node:crypto";
import { lstatSync, statfsSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { dashedHost, isCopy, LEDGER, listHosts } from "../batch.ts";
import type { SenderNews, StreamStatus } from "../chunk.ts";
import { exists, holdLock, makeFolder, removeDurably, writeDurably } from "../durable.ts";
import { emptyLedger, formatRecord, readLedger, snapshot } from "../ledger.ts";
import { type Lock, NameLocks } from "../runtime.ts";
import { createFaultLog, errorMessage, type FaultLog, OperatorError } from "../service.ts";
import { Journal, journalLock, readJournal, StoreError, storeError } from "./journal.ts";
import { decodeBody, lockSender, Parts, recoverSender, replayJournals, writeAgain } from "./recover.ts";
import { type Chunk, type Outcome, Sender, type StoreOptions } from "./sender.ts";

/** A chunk that starts ahead waits so long for what is before it; all that wait hold so many bytes at most. */
const AHEAD_MS = 2_000;
const AHEAD_BYTES = 33_554_432;
/** Senders whose names nobody listed: new ones in a minute, and their share of all. */
const NEW_NAMES_A_MINUTE = 60;
const UNLISTED_SHARE = 0.5;
/** A limit of hosts is told when so much of it is used. */
const TOLD_FROM = 0.8;
/** A changed ledger is saved after so many ms, later with many senders. */
const CHECKPOINT_MS = { min: 2_000, max: 120_000, perSender: 20 };
/** Senders that background work is done for at once. */
const SENDERS_AT_ONCE = 4;
/**
 * Room that no chunk may take, of a small disk a part of it: ledgers, the sealing and the forwarder's notes need some, or a
 * full disk could never be emptied by delivering what lies on it.
 */
const RESERVE = { bytes: 64 * 1_048_576, share: 1 / 32 };

export class Store {
  readonly senders = new Map<string, Sender>();
  #options: StoreOptions;
  readonly #faults: FaultLog;
  readonly #parts = new Parts();
  readonly #locks: NameLocks;
  readonly #journal: Journal;
  #lock: Lock | undefined;
  readonly #opening = new Map<string, Promise<Sender>>();
  readonly #dashes = new Map<string, string>();
  /** Senders of ours that have a folder and could not be opened: tried again, for what is due in it. */
  readonly #unopened = new Set<string>();
  /** Whether a host is one of this process; the others' folders are another one's. */
  #isOurs: (host: string) => boolean = () => true;
  /** Since the config changed last, the senders with something on disk are known. */
  #isListed = false;
  #aheadBytes = 0;
  /** Of chunks that are not in their parts yet. */
  #bytesInHand = 0;
  /** Of a chunk that had no room, until one has. */
  #refusedBytes = 0;
  #newNames = { minute: 0, count: 0 };

  constructor(options: StoreOptions) {
    this.#options = options;
    this.#faults = createFaultLog(options.log, options.now);
    this.#locks = new NameLocks(join(options.dir, ".hosts.lock"));
    this.#journal = new Journal(options.dir, randomBytes(8).toString("hex"));
  }

  configure(options: StoreOptions): void {
    this.#options = { ...this.#options, ...options };
    for (const sender of this.senders.values()) sender.options = this.#options;
    this.#isListed = false;
  }

  /** Opens every sender that `isOurs`, now and after each change of the config, and has something on disk. */
  async start(isOurs: (host: string) => boolean): Promise<void> {
    this.#isOurs = isOurs;
    await makeFolder(this.#options.dir);
    // A full disk, say: no sender is opened before its journal is replayed, and each opening tries it again.
    await replayJournals(this.#options.dir, this.#journal.id, this.#options.log).catch((error) => {
      this.#options.log.error("journal not replayed yet: tried again", { error: errorMessage(error) });
    });
    await this.#openAll();
  }

  /** Lists the senders that have something on disk, so that what is due of ours is sealed without them. */
  async #list(): Promise<void> {
    for (const host of await listHosts(this.#options.dir)) {
      if (this.senders.has(host)) continue;
      const folder = join(this.#options.dir, host);
      const names = await readdir(folder).catch(() => [] as string[]); // closed to us: no host's
      if (!names.some((name) => name.startsWith(LEDGER))) continue;
      const ledger = (await readLedger(folder)) ?? emptyLedger();
      if (isCopy(host, ledger.open.keys(), ledger.sealed.keys())) {
        this.#options.log.warn("folder left alone: its ledger is of another host", { folder });
        continue;
      }
      this.#dashes.set(dashedHost(host), host);
      this.#unopened.add(host);
    }
  }

  async #lockJournal(): Promise<void> {
    const { dir } = this.#options;
    await makeFolder(dir);
    this.#lock ??= await holdLock(journalLock(dir, this.#journal.id), "The journal");
  }

  /** Whether this host was ever heard; makes nothing on disk. */
  async knows(host: string): Promise<boolean> {
    return this.senders.has(host) || (await exists(join(this.#options.dir, host, LEDGER)));
  }

  /** Takes a chunk and gives its outcome once that is on stable storage. Throws a StoreError. */
  async commit(chunk: Chunk): Promise<Outcome> {
    const { host, body, encoded = { bytes: body } } = chunk;
    const size = body.length + encoded.bytes.length; // in the journal and in its part
    this.#bytesInHand += size;
    try {
      this.#refusedBytes = body.length > 0 && this.#isFull() ? size : 0;
      if (this.#refusedBytes > 0) throw new StoreError(507, "the disk is full");
      const sender = this.senders.get(host) ?? (await this.#open(host));
      if (this.#journal.fault !== undefined) await this.#repair();
      const outcome = await this.#take(sender, chunk);
      this.#faults.recovered(host, "chunks are stored again", { host });
      return outcome;
    } catch (error) {
      const cause = (error as Error).cause ?? error;
      this.#faults.failed(host, "chunk not stored", { host, error: errorMessage(cause) });
      throw storeError(error);
    } finally {
      this.#bytesInHand -= size;
    }
  }

  /** A chunk that starts ahead of what is there is held for a moment, and then compared anew. */
  async #take(sender: Sender, chunk: Chunk): Promise<Outcome> {
    const deadline = performance.now() + AHEAD_MS;
    const size = chunk.body.length + (chunk.encoded?.bytes.length ?? 0);
    for (;;) {
      const left = deadline - performance.now();
      const { staged } = sender;
      const mayWait = left > 0 && this.#aheadBytes + size <= AHEAD_BYTES;
      if (mayWait) this.#aheadBytes += size; // before the others look
      try {
        const taken = await sender.take(chunk, mayWait);
        if (taken !== "ahead") return taken.outcome;
        await sender.progress(staged, left);
      } finally {
        if (mayWait) this.#aheadBytes -= size;
      }
    }
  }

  /** A sign of life, and the question where streams stand. Answered after all that is in hand of this host. */
  async streams(
    host: string,
    names: string[] | undefined,
    news: SenderNews,
    peer: string,
  ): Promise<StreamStatus[]> {
    try {
      const sender = this.senders.get(host) ?? (await this.#open(host));
      sender.hear(news, peer, names ?? []);
      return await sender.streams(names);
    } catch (error) {
      throw storeError(error);
    }
  }

  /** Why a chunk could not be stored now; undefined when it could. */
  health(): string | undefined {
    const { fault } = this.#journal;
    if (fault !== undefined) return errorMessage(fault);
    const broken = [...this.senders.values()].find((sender) => sender.broken !== undefined);
    if (broken) return `${broken.folder}: ${errorMessage(broken.broken)}`;
    try {
      const disk = statfsSync(this.#options.dir);
      if (disk.files > 0 && disk.ffree === 0) return "the disk has no inodes left";
      const free = disk.bavail * disk.bsize - this.#refusedBytes;
      return disk.blocks > 0 && free < reserveOf(disk) ? "the disk is full" : undefined;
    } catch (error) {
      return errorMessage(error);
    }
  }

  /** Whether all that is in hand would leave less than the reserve. One that tells of no room at all is tried. */
  #isFull(): boolean {
    try {
      const disk = statfsSync(this.#options.dir);
      const free = disk.bavail * disk.bsize;
      return free > 0 && free - this.#bytesInHand < reserveOf(disk);
    } catch {
      return false; // the write says what is wrong
    }
  }

  /** Who takes most of the room that there is for hosts, told from 80 % on. */
  crowd(): { host: string; text: string }[] {
    const { maxHosts, isListed } = this.#options;
    const known = [...this.senders.keys()];
    const unlisted = isListed ? known.filter((host) => !isListed(host)).length : 0;
    const most = maxHosts * UNLISTED_SHARE;
    return [
      ...(known.length >= TOLD_FROM * maxHosts ? [`${known.length} of ${maxHosts} hosts are known`] : []),
      ...(unlisted >= TOLD_FROM * most ? [`${unlisted} of ${most} hosts that no group lists are known`] : []),
    ].map((text) => ({ host: "*", text }));
  }

  // ---- opening

  #open(host: string): Promise<Sender> {
    const under = this.#opening.get(host);
    if (under) return under;
    const started = this.#openNow(host).finally(() => this.#opening.delete(host));
    this.#opening.set(host, started);
    return started;
  }

  async #openNow(host: string): Promise<Sender> {
    const options = this.#options;
    try {
      await this.#lockJournal();
      await this.#admit(host);
      const folder = join(options.dir, host);
      await makeFolder(folder, 0o770);
      if (!lstatSync(folder).isDirectory())
        throw new OperatorError(`${folder} is a link: no host's folder is one`);
      const lock = await lockSender(this.#locks, host, folder);
      try {
        await replayJournals(options.dir, this.#journal.id, options.log);
        const ledger = await recoverSender(host, folder, options.log);
        if (!(await exists(join(folder, LEDGER)))) {
          await writeDurably(join(folder, LEDGER), formatRecord(snapshot(ledger)), 0o660);
        }
        const sender = new Sender(host, ledger, {
          options,
          journal: this.#journal,
          parts: this.#parts,
          lock,
        });
        this.senders.set(host, sender);
        this.#unopened.delete(host);
        this.#faults.recovered(`open ${host}`, "sender is open again", { host });
        return sender;
      } catch (error) {
        lock.release();
        throw error;
      }
    } catch (error) {
      if (!(error instanceof StoreError))
        this.#faults.failed(`open ${host}`, "sender cannot be opened", { host, error: errorMessage(error) });
      throw error;
    }
  }

  async #openAll(): Promise<void> {
    if (!this.#isListed) await this.#list();
    this.#isListed = true;
    for (const host of [...this.#unopened]) if (this.#isOurs(host)) await this.#open(host).catch(() => {}); // told already
  }

  /** Two hosts must not share a dashed form; names that nobody listed are bounded apart from those listed. */
  async #admit(host: string): Promise<void> {
    const { dir, maxHosts, isListed, now } = this.#options;
    const dashed = dashedHost(host);
    if (!this.#dashes.has(dashed)) {
      for (const known of await listHosts(dir)) {
        const isKnown = this.#dashes.has(dashedHost(known));
        if (!isKnown && (await exists(join(dir, known, LEDGER)))) this.#dashes.set(dashedHost(known), known);
      }
    }
    const owner = this.#dashes.get(dashed) ?? host;
    if (owner !== host) throw new StoreError(403, `host ${host} would have the file names of host ${owner}`);
    if (this.senders.size >= maxHosts) throw new StoreError(503, `${maxHosts} hosts are known already`);
    const isNew = !this.#dashes.has(dashed);
    if (isNew && isListed && !isListed(host)) {
      const unlisted = [...this.senders.keys()].filter((known) => !isListed(known)).length;
      if (unlisted >= maxHosts * UNLISTED_SHARE)
        throw new StoreError(503, `${unlisted} hosts that no group lists are known already`);
      const minute = Math.floor(now() / 60_000);
      if (this.#newNames.minute !== minute) this.#newNames = { minute, count: 0 };
      if (++this.#newNames.count > NEW_NAMES_A_MINUTE)
        throw new StoreError(503, `${NEW_NAMES_A_MINUTE} new hosts that no group lists came in this minute`);
    }
    this.#dashes.set(dashed, host);
  }

  // ---- the background

  /** One pass: what is broken is mended, ledgers are saved, segments dropped, batches sealed. Gives the sealed names. */
  async seal(): Promise<string[]> {
    await this.#openAll();
    await this.#repair().catch(() => {}); // health() tells it
    for (const sender of this.senders.values()) await this.#mend(sender);
    const sealed: string[] = [];
    await this.#forEach([...this.senders.values()], async (sender) => {
      sealed.push(...(await this.#sealDue(sender)));
    });
    await this.#checkpoint();
    const others = [...this.senders.values()].filter(({ host }) => !this.#isOurs(host));
    this.#journal.endSegmentOf(others.map(({ host }) => host));
    await this.#dropSegments().catch((error) =>
      this.#faults.failed("journal", "segment not dropped", { error: errorMessage(error) }),
    );
    await this.#letGo(others);
    return sealed;
  }

  #dropSegments(): Promise<void> {
    return this.#journal.drop((host, seq) => (this.senders.get(host)?.safeSeq ?? 0) >= seq);
  }

  /** Rule: of a host that the config no longer has it drops the segments first, then lets go. */
  async #letGo(others: Sender[]): Promise<void> {
    for (const sender of others) {
      const { host } = sender;
      if (!(await sender.leave())) continue; // at a later pass
      this.senders.delete(host);
      this.#options.log.info("host let go: another process may take it", { host });
    }
  }

  /** Rule: what could not be synced is cut off, and the cut synced, before another is written. */
  async #repair(): Promise<void> {
    if (this.#journal.fault === undefined) return;
    await this.#journal.repair();
    this.#options.log.info("journal takes chunks again");
  }

  /** Rule: what could not be synced in a part or ledger is written again from the journal, not only synced again. */
  async #mend(sender: Sender): Promise<void> {
    if (sender.broken === undefined) return;
    const { host } = sender;
    this.#faults.failed(`write ${host}`, "batches not written", { host, error: errorMessage(sender.broken) });
    try {
      await sender.settle();
      await makeFolder(sender.folder, 0o770);
      for await (const { entry, body } of readJournal(this.#journal.paths, () => {})) {
        if (entry.host !== host || entry.seq <= sender.safeSeq) continue;
        await writeAgain(sender, entry, decodeBody(entry, body));
      }
      sender.broken = undefined;
      await sender.checkpoint();
      this.#faults.recovered(`write ${host}`, "batches are written again", { host });
    } catch (error) {
      sender.broken ??= error;
    }
  }

  async #sealDue(sender: Sender): Promise<string[]> {
    const { host } = sender;
    const due = sender.due();
    try {
      const sealed = due.length > 0 ? await sender.seal(due) : [];
      for (const { name, lines, bytes } of sealed)
        this.#options.log.info("batch sealed", { batch: name, lines, bytes });
      await sender.prune();
      this.#faults.recovered(`seal ${host}`, "batches are sealed again", { host });
      return sealed.map(({ name }) => name);
    } catch (error) {
      this.#faults.failed(`seal ${host}`, "batches not sealed", { host, error: errorMessage(error) });
      return [];
    }
  }

  async #checkpoint(): Promise<void> {
    const now = this.#options.now();
    const { min, max, perSender } = CHECKPOINT_MS;
    const every = Math.min(max, Math.max(min, this.senders.size * perSender));
    const oldest = new Set(this.#journal.oldestHosts);
    const isDue = (sender: Sender) =>
      sender.isDirty &&
      (Math.abs(now - sender.checkpointAt) >= every || oldest.has(sender.host) || !this.#isOurs(sender.host));
    await this.#forEach([...this.senders.values()].filter(isDue), async (sender) => {
      const { host } = sender;
      await sender.checkpoint().catch((error) => {
        this.#faults.failed(`write ${host}`, "ledger not saved", { host, error: errorMessage(error) });
      });
    });
  }

  /** A few at a time: one with thousands of batches keeps no other waiting. */
  async #forEach(senders: Sender[], work: (sender: Sender) => Promise<void>): Promise<void> {
    const worker = async () => {
      for (let sender = senders.pop(); sender; sender = senders.pop()) await work(sender);
    };
    await Promise.all(Array.from({ length: SENDERS_AT_ONCE }, worker));
  }

  /** Forgets the hosts with this mark in their folder, once: a mark that stayed would forget one that came back. */
  async forgetMarked(mark: string): Promise<void> {
    const { dir, log } = this.#options;
    for (const [host, sender] of this.senders) {
      const path = join(dir, host, mark);
      try {
        if (!(await exists(path))) continue;
        const reason = await sender.forget();
        await removeDurably(path);
        log.info(reason === undefined ? "host forgotten" : "host not forgotten", { host, reason });
        this.#faults.recovered(`forget ${host}`, "the mark of --forget is taken", { host });
      } catch (error) {
        this.#faults.failed(`forget ${host}`, "host not forgotten", { host, error: errorMessage(error) });
      }
    }
  }

  /** Ends after what is on its way: a journal of which everything is safe is removed. */
  async close(): Promise<void> {
    let isSafe = true;
    for (const sender of this.senders.values()) {
      await sender.close().catch((error) => {
        isSafe = false; // the next start replays the journal
        this.#options.log.error("ledger not saved", { host: sender.host, error: errorMessage(error) });
      });
    }
    await this.#journal.close();
    if (isSafe) await this.#dropSegments().catch(() => {});
    const isEmpty = this.#journal.paths.length === 0;
    this.senders.clear();
    this.#parts.closeAll();
    this.#locks.close();
    const lock = this.#lock;
    this.#lock = undefined;
    lock?.release();
    if (isEmpty && lock)
      await removeDurably(journalLock(this.#options.dir, this.#journal.id)).catch(() => {});
  }
}

function reserveOf({ blocks, bsize }: { blocks: number; bsize: number }): number {
  return Math.min(RESERVE.bytes, blocks * bsize * RESERVE.share);
}
