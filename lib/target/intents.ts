/**
 * The intentions of the forwarder: which renames may have been sent. On stable storage before the rename leaves, so that
 * whoever starts after a crash, or comes back after a cut, looks at the target for them before anything is uploaded.
 */
import { join } from "node:path";
import { z } from "zod";
import { readReportTail } from "../report.ts";
import { readStateOrForget, writeState } from "../state.ts";

const intentSchema = z.object({
  remote: z.string(),
  bytes: z.number(),
  lines: z.number(),
  sha256: z.string().default(""),
  /** When it was written; one of an older version has no time. */
  at: z.number().optional(),
});
type Intent = z.infer<typeof intentSchema> & { reported?: boolean };

/** Which renames may have been sent: by batch name, owned by the one forwarder that holds the lock. */
export class Intents {
  readonly #path: string;
  readonly #open: Map<string, Intent>;
  /** Whether the file still has what is forgotten here. */
  #stale = false;
  #saving = Promise.resolve();

  private constructor(path: string, open: Record<string, Intent>) {
    this.#path = path;
    this.#open = new Map(Object.entries(open));
  }

  /** Reads what an earlier process left. Without them nothing is lost: a file that is there is compared. */
  static async load(dir: string, forgotten: (path: string, reason: string) => void): Promise<Intents> {
    const path = join(dir, ".forwarder-intents.json");
    const schema = z.object({ version: z.literal(1), intents: z.record(z.string(), intentSchema) });
    const found = await readStateOrForget(path, schema, 1, forgotten);
    return new Intents(path, found?.intents ?? {});
  }

  get(batch: string): Intent | undefined {
    return this.#open.get(batch);
  }

  /** Finds which of them have their `Sent` line since: those are delivered. */
  async matchReport(report: string): Promise<void> {
    if (this.#open.size === 0) return;
    for (const { batch, at, status } of await readReportTail(report)) {
      const intent = this.#open.get(batch);
      if (intent && status === "Sent" && intent.at !== undefined && at >= intent.at - (intent.at % 1000))
        intent.reported = true;
    }
  }

  /** Adds intentions; on stable storage when it returns. */
  async add(group: (Intent & { batch: string })[], at: number): Promise<void> {
    if (group.length === 0) return;
    for (const { batch, remote, bytes, lines, sha256 } of group)
      this.#open.set(batch, { remote, bytes, lines, sha256, at });
    await this.#save();
  }

  /** Forgets those of batches that are in sent/, or not renamed. Saved with the next group, or by `flush`: groups share a save. */
  forget(batches: string[]): void {
    for (const batch of batches) this.#stale = this.#open.delete(batch) || this.#stale;
  }

  /** Forgets what is no longer in the queue; on stable storage when it returns. */
  async keepOnly(queue: Set<string>): Promise<void> {
    this.forget([...this.#open.keys()].filter((batch) => !queue.has(batch)));
    await this.flush();
  }

  async flush(): Promise<void> {
    if (this.#stale) await this.#save();
  }

  /** One at a time: uploads that run side by side save, too. */
  #save(): Promise<void> {
    const save = async () => {
      this.#stale = false; // what is forgotten while it is being written is for the next save
      try {
        await writeState(this.#path, { version: 1, intents: Object.fromEntries(this.#open) });
      } catch (error) {
        this.#stale = true; // the next pass ends here before anything is uploaded
        throw error;
      }
    };
    this.#saving = this.#saving.catch(() => {}).then(save);
    return this.#saving;
  }
}
