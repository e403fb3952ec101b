/**
 * The commit of deliveries: from "the temp file is complete on the target" to "the batch is in sent/".
 *
 *   1. the intention to rename   `<dir>/.forwarder-intents.json`, on stable storage
 *   2. the rename on the target
 *   3. the report line           on stable storage
 *   4. the batch moved to sent/, its mtime set to now: retention counts from the delivery
 *
 * Whatever ends the process or the connection in between, the batch is still in the queue and its intention
 * on disk. Next time both remote names are looked at first: the temp file there means "not renamed"; the temp
 * file gone means "renamed", also when the client has taken the file away already. A report line that is
 * there is not written again. Batches that are ready at the same time share the syncs of 1, 3 and 4.
 */
import { createHash } from "node:crypto";
import { utimesSync } from "node:fs";
import { join } from "node:path";
import { SENT } from "./batch.ts";
import { failpoint, moveAllDurably, readIfExists, writeDurably } from "./durable.ts";
import { appendReport, readReportTail } from "./report.ts";
import { OperatorError } from "./service.ts";
import { Refusal, type Target, TargetFault, tempName } from "./target/target.ts";

/** What an upload learned about a batch while reading it once. */
export interface Intent {
  /** Name on the target. */
  remote: string;
  /** Size on the target. */
  bytes: number;
  lines: number;
  /** SHA-256 of what was sent, in hex, when a manifest is wanted. */
  sha256?: string;
}

/** A batch whose temp file is complete on the target. */
export interface Ready extends Intent {
  /** Name of the batch, and the folder that it waits in. */
  batch: string;
  folder: string;
  /** Gives the bytes that were sent once more, for comparing. */
  content: () => AsyncIterable<Uint8Array>;
  /** When the upload began, milliseconds since the epoch. */
  at: number;
  /** Set when an earlier try came so far. */
  renamed?: boolean;
  reported?: boolean;
}

/** How a group ended: every batch is in one of the two, or its intention stays for the next time. */
export interface Committed {
  sent: Ready[];
  refused: { ready: Ready; error: unknown }[];
  /** The fault that left some in between. */
  fault?: TargetFault;
}

const VERSION = 1;

/** Where intentions are kept, by batch name; owned by the one forwarder that holds the lock. */
export class Intents {
  readonly #path: string;
  #open: Map<string, Intent>;
  /** Whether the file still has what is forgotten here. */
  #stale = false;

  private constructor(path: string, open: Map<string, Intent>) {
    this.#path = path;
    this.#open = open;
  }

  /** Reads what an earlier process left. Throws an OperatorError when the file is damaged. */
  static async load(dir: string): Promise<Intents> {
    const path = join(dir, ".forwarder-intents.json");
    const text = await readIfExists(path);
    if (text === undefined) return new Intents(path, new Map());
    try {
      const { version, intents } = JSON.parse(text);
      if (version !== VERSION) throw new Error(`its version is ${version}, expected ${VERSION}`);
      return new Intents(path, new Map(Object.entries(intents)));
    } catch (cause) {
      const hint = "Remove it to go on: a batch that was being renamed may then be sent a second time";
      throw new OperatorError(`${path} is damaged (${(cause as Error).message}). ${hint}`);
    }
  }

  get size(): number {
    return this.#open.size;
  }

  get(batch: string): Intent | undefined {
    return this.#open.get(batch);
  }

  /** Adds intentions; on stable storage when it returns. */
  async add(group: Ready[]): Promise<void> {
    for (const { batch, remote, bytes, lines, sha256 } of group) {
      this.#open.set(batch, { remote, bytes, lines, ...(sha256 && { sha256 }) });
    }
    await this.#save();
  }

  /** Takes back intentions of renames that the target refused; on stable storage when it returns. */
  async cancel(...batches: string[]): Promise<void> {
    for (const batch of batches) this.#open.delete(batch);
    await this.#save();
  }

  /**
   * Forgets the intentions of batches that are in sent/. Not saved at once, so that groups share a save: the
   * next one does it, or `flush`.
   */
  forget(batches: string[]): void {
    for (const batch of batches) this.#stale = this.#open.delete(batch) || this.#stale;
  }

  /** Forgets what is no longer in the queue; on stable storage when it returns. */
  async keepOnly(queue: Set<string>): Promise<void> {
    this.forget([...this.#open.keys()].filter((batch) => !queue.has(batch)));
    await this.flush();
  }

  /**
   * Saves what was forgotten. Else a batch that is moved back to the queue by hand, because the client has lost
   * it, would pass for one whose rename was done.
   */
  async flush(): Promise<void> {
    if (this.#stale) await this.#save();
  }

  async #save(): Promise<void> {
    await writeDurably(
      this.#path,
      JSON.stringify({ version: VERSION, intents: Object.fromEntries(this.#open) }),
    );
    this.#stale = false;
  }
}

/** Whether a rename whose answer was never heard has happened: both names are looked at. */
export async function settleRename(target: Target, intent: Intent): Promise<"renamed" | "ready" | "unfit"> {
  const [temp, own] = await Promise.all([target.size(tempName(intent.remote)), target.size(intent.remote)]);
  if (temp === undefined) {
    if (own === undefined || own === intent.bytes) return "renamed"; // absent: the client has taken it
    throw new Refusal(
      `"${intent.remote}" is ${own} bytes on the target, expected the ${intent.bytes} that were sent`,
    );
  }
  return temp === intent.bytes ? "ready" : "unfit";
}

/** Which of these batches have their `Sent` line; for those that an earlier try left behind. */
export async function findReported(report: string): Promise<Set<string>> {
  const tail = await readReportTail(report);
  return new Set(tail.filter(({ status }) => status === "Sent").map(({ batch }) => batch));
}

/** What `commitGroup` needs beside the group. */
export interface CommitContext {
  target: Target;
  intents: Intents;
  dir: string;
  report: string;
  now: () => number;
  /** Called with what has its report line, before it is moved. */
  record?: (sent: Ready[]) => Promise<void>;
}

/** Commits batches whose temp files are complete. Never throws for what the target says; see {@link Committed}. */
export async function commitGroup(group: Ready[], context: CommitContext): Promise<Committed> {
  const { target, intents, dir, report, now } = context;
  const outcome: Committed = { sent: [], refused: [] };
  const note = (ready: Ready, error: unknown) => {
    if (error instanceof TargetFault) outcome.fault ??= error;
    else outcome.refused.push({ ready, error });
  };
  const each = async (list: Ready[], step: (ready: Ready) => Promise<unknown>) => {
    const done: Ready[] = [];
    await Promise.all(
      list.map((ready) =>
        step(ready)
          .then(() => done.push(ready))
          .catch((error) => note(ready, error)),
      ),
    );
    return done;
  };

  const settled = group.filter(({ renamed }) => renamed);
  const fresh = group.filter(({ renamed }) => !renamed);
  const fit = await each(fresh, (ready) => meetExisting(target, ready));
  await intents.add([...settled, ...fit]);
  failpoint("forward:intent");
  const published = await each(fit, async (ready) => ready.renamed || target.publish(ready.remote));
  if (outcome.refused.length > 0) await intents.cancel(...outcome.refused.map(({ ready }) => ready.batch));
  failpoint("forward:renamed");

  const done = new Set([...settled, ...published]);
  const delivered = group.filter((ready) => done.has(ready));
  const at = now();
  await appendReport(
    report,
    delivered
      .filter(({ reported }) => !reported)
      .map(({ batch, lines }) => ({ at, batch, lines, status: "Sent" })),
  );
  failpoint("forward:reported");
  await context.record?.(delivered);
  for (const { folder, batch } of delivered) utimesSync(join(folder, batch), at / 1000, at / 1000);
  await moveAllDurably(
    delivered.map(({ folder, batch }) => ({ from: join(folder, batch), to: join(dir, SENT, batch) })),
  );
  failpoint("forward:moved");
  intents.forget(delivered.map(({ batch }) => batch));
  outcome.sent = delivered;
  return outcome;
}

/**
 * A file that has the name already, with no intention of ours: the operator moved a delivered batch back to
 * the queue, or the name is someone else's. The same content is a delivery; another one is never overwritten.
 */
async function meetExisting(target: Target, ready: Ready): Promise<void> {
  const size = await target.size(ready.remote);
  if (size === undefined) return;
  if (size !== ready.bytes || (await digest(target.read(ready.remote))) !== (await digest(ready.content()))) {
    await target.remove(tempName(ready.remote));
    throw new Refusal(`"${ready.remote}" is on the target already, with other content`);
  }
  await target.remove(tempName(ready.remote));
  ready.renamed = true;
}

/** SHA-256 of a content, in hex. */
export async function digest(chunks: AsyncIterable<Uint8Array>): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of chunks) hash.update(chunk);
  return hash.digest("hex");
}
