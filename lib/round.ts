/**
 * One try of each batch: `parallel` uploads at a time over one connection, while what is uploaded is committed
 * in groups. Here it is decided whose fault a failure is: a file's own, or the target's, which ends the round.
 */
import { join } from "node:path";
import { Readable } from "node:stream";
import { folders, withState } from "./batch.ts";
import type { Config } from "./config.ts";
import { commitGroup, type Intents, type Ready, settleRename } from "./delivery.ts";
import { exists, failpoint } from "./durable.ts";
import { createProgress, errorMessage } from "./service.ts";
import { openContent, Unreadable } from "./target/content.ts";
import { Refusal, type Target, TargetFault, tempName } from "./target/target.ts";

/** Batches that are committed together at most. */
const GROUP = 64;

/** A batch in the queue. */
export interface Item {
  batch: string;
  folder: string;
  bytes: number;
}

/** A batch that was refused, by the target or by the local disk, while others go through. */
export interface Refused {
  item: { batch: string; folder: string };
  error: unknown;
}

/** How a round ended. What is neither sent nor refused is as it was. */
export interface Outcome {
  refused: Refused[];
  /** The fault that ended the round early. */
  fault?: TargetFault;
  /** Batches that the target had no room for. */
  noRoom: string[];
}

export interface RoundContext {
  config: Config["forwarder"];
  target: Target;
  intents: Intents;
  /** Batches that have their report line already. */
  reported: Set<string>;
  now: () => number;
  signal: AbortSignal;
  /** Called with batches that have their report line, before they leave the queue. */
  record?: (sent: Ready[]) => Promise<void>;
  /** Called with each batch that is delivered. */
  onSent: (sent: Ready) => void;
}

/** Tries each item once, in order. */
export async function deliverRound(items: Item[], context: RoundContext): Promise<Outcome> {
  const { config, target, signal } = context;
  const outcome: Outcome = { refused: [], noRoom: [] };
  const probe = createProbe(target);
  const total = items.reduce((sum, { bytes }) => sum + bytes, 0);
  const progress = createProgress("forwarder", total);
  let read = 0;
  const onBytes = (bytes: number) => {
    read += bytes;
    progress.show(read);
  };
  const fail = async (item: Refused["item"], error: unknown) => {
    const fault = await blame(error, item, probe);
    if (fault === "nobody") return;
    if (fault === "file") outcome.refused.push({ item, error });
    else {
      outcome.fault ??= fault;
      if (fault.kind === "server") outcome.noRoom.push(item.batch);
    }
  };
  const committer = createCommitter(async (group) => {
    const { sent, refused, fault } = await commit(group, context);
    for (const ready of sent) context.onSent(ready);
    for (const { ready, error } of refused) await fail(ready, error);
    if (fault) outcome.fault ??= fault;
  });
  let broken = false;
  const deliver = async (item: Item, onWritten: () => void) => {
    try {
      await committer.add(await upload(item, context, onBytes, onWritten));
    } catch (error) {
      await fail(item, error).catch((bug) => {
        broken = true;
        throw bug;
      });
    }
  };
  const queue = items.values(); // one for all workers
  /** While the target puts one file on stable storage, the next one is written. */
  const work = async () => {
    let last: Promise<void> | undefined;
    for (const item of queue) {
      if (outcome.fault || broken || signal.aborted) break;
      const written = Promise.withResolvers<void>();
      const delivered = deliver(item, written.resolve);
      delivered.catch(() => {}).finally(written.resolve); // looked at when its turn comes
      await written.promise;
      await last;
      last = delivered;
    }
    await last;
  };
  const ends = await Promise.allSettled(Array.from({ length: config.parallel }, work));
  await committer.end().finally(() => progress.end());
  for (const end of ends) if (end.status === "rejected") throw end.reason;
  return outcome;
}

/** Hands over what is ready in groups, one group at a time: the more is ready meanwhile, the larger. */
function createCommitter(handOver: (group: Ready[]) => Promise<void>) {
  const waiting: Ready[] = [];
  let running: Promise<void> | undefined;
  let bug: { error: unknown } | undefined;
  const run = async () => {
    while (waiting.length > 0 && !bug) await handOver(waiting.splice(0, GROUP));
  };
  const start = () => {
    running ??= run()
      .catch((error) => {
        bug = { error };
      })
      .finally(() => {
        running = undefined;
      });
    return running;
  };
  return {
    /** Waits only when a whole group is waiting already. */
    async add(ready: Ready): Promise<void> {
      waiting.push(ready);
      const done = start();
      if (waiting.length >= GROUP) await done;
    },
    /** Returns when everything is handed over. Throws what `handOver` has thrown. */
    async end(): Promise<void> {
      while (running || (waiting.length > 0 && !bug)) await start();
      if (bug) throw bug.error;
    },
  };
}

/** Brings a batch so far that its temp file is complete on the target, or finds that it was there before. */
async function upload(
  item: Item,
  context: RoundContext,
  onBytes: (bytes: number) => void,
  onWritten: () => void,
): Promise<Ready> {
  const { config, target, intents, reported, now } = context;
  const { batch, folder } = item;
  const at = now();
  const gzip = config.compress === "gzip";
  const content = () => openContent(join(folder, batch), { gzip }).chunks;
  const intent = intents.get(batch);
  await checkUnsent(config.dir, batch);
  if (intent) {
    const found = await settleRename(target, intent);
    if (found !== "unfit") {
      const renamed = found === "renamed";
      return { ...intent, batch, folder, content, at, renamed, reported: reported.has(batch) };
    }
    await intents.cancel(batch);
  }
  const remote = gzip ? withState(batch, "compressed") : batch;
  const { chunks, measured } = openContent(join(folder, batch), { gzip, hash: config.manifest, onBytes });
  await target.upload(remote, chunks, onWritten);
  failpoint("forward:uploaded");
  return { ...measured, remote, batch, folder, content, at };
}

/** A name is delivered once: sent/ must not hold it, also not compressed. */
async function checkUnsent(dir: string, batch: string): Promise<void> {
  for (const name of [batch, withState(batch, "compressed")]) {
    const path = join(folders(dir).sent, name);
    if (await exists(path)) {
      throw new Refusal(`"${path}" says that it was delivered already; remove one of the two`);
    }
  }
}

/** Commits a group. A fault of the local disk holds up all batches, like a fault of the target. */
async function commit(group: Ready[], { target, intents, config, record, now }: RoundContext) {
  const { dir, report } = config;
  try {
    return await commitGroup(group, { target, intents, dir, report, now, ...(record && { record }) });
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === undefined) throw error;
    const text = `Cannot record deliveries in ${dir} or ${report}`;
    return { sent: [], refused: [], fault: new TargetFault("local", text, { cause: error }) };
  }
}

/**
 * Whose fault a failure is: the file's, the target's, or nobody's, because the batch was moved away meanwhile.
 * After a refusal a small file of another name is tried: when that is refused, too, it was not the name.
 * Throws what is neither, which is a bug.
 */
async function blame(
  error: unknown,
  { batch, folder }: Refused["item"],
  probe: () => Promise<void>,
): Promise<"file" | "nobody" | TargetFault> {
  if (error instanceof TargetFault) return error;
  if (error instanceof Unreadable) return (await exists(join(folder, batch))) ? "file" : "nobody";
  if (!(error instanceof Refusal)) throw error;
  try {
    await probe();
    return "file";
  } catch (cause) {
    return cause instanceof TargetFault ? cause : new TargetFault("server", errorMessage(error), { cause });
  }
}

/** Asks whether the target takes files at all; those who ask at the same time share the answer. */
export function createProbe(target: Target): () => Promise<void> {
  const name = ".log-rt-sync-probe";
  let asking: Promise<void> | undefined;
  const ask = async () => {
    await target.upload(name, Readable.from([Buffer.from("log-rt-sync\n")]));
    await target.remove(tempName(name));
  };
  return () => {
    asking ??= ask().finally(() => {
      asking = undefined;
    });
    return asking;
  };
}
