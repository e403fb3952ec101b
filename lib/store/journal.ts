/**
 * The ledger file of one sender while it is written: records go behind the committed length, and count once
 * they are synced and `commit` was called. A record that failed is cut off before the next one is written.
 */
import { closeSync, existsSync, fstatSync, ftruncateSync, openSync, writeFileSync, writeSync } from "node:fs";
import { join } from "node:path";
import { LEDGER } from "../batch.ts";
import { writeDurably } from "../durable.ts";
import { formatRecord, type Ledger, type LedgerRecord, snapshot } from "../ledger.ts";

/** A ledger is rewritten when it is longer than this, and than eight times what it says. */
const COMPACT_BYTES = 262_144;
const COMPACT_RATIO = 8;

export class Journal {
  readonly #path: string;
  #fd = -1;
  #length = 0;
  #appended = 0;
  #compactAt = COMPACT_BYTES;

  constructor(folder: string) {
    this.#path = join(folder, LEDGER);
  }

  /** Writes a record behind the committed length. Returns the descriptor, to be synced. */
  append(record: LedgerRecord, ledger: Ledger): number {
    if (this.#fd < 0) this.#open(ledger);
    const line = Buffer.from(formatRecord(record));
    for (let at = 0; at < line.length; ) {
      at += writeSync(this.#fd, line, at, line.length - at, this.#length + at);
    }
    this.#appended = line.length;
    return this.#fd;
  }

  #open(ledger: Ledger): void {
    if (!existsSync(this.#path)) writeFileSync(this.#path, formatRecord(snapshot(ledger))); // removed by hand
    this.#fd = openSync(this.#path, "r+");
    this.#length = fstatSync(this.#fd).size;
  }

  /** The record that was appended counts. */
  commit(): void {
    this.#length += this.#appended;
    this.#appended = 0;
  }

  /** Cuts off what was appended and does not count. Throws the system's error. */
  cutBack(): void {
    if (this.#fd >= 0) ftruncateSync(this.#fd, this.#length);
    this.#appended = 0;
  }

  get isGrown(): boolean {
    return this.#length >= this.#compactAt;
  }

  /** Rewrites the file when it has grown far beyond what it says. */
  async compact(ledger: Ledger): Promise<void> {
    const text = formatRecord(snapshot(ledger));
    await writeDurably(this.#path, text);
    this.#compactAt = Math.max(COMPACT_BYTES, COMPACT_RATIO * text.length);
    this.close();
  }

  close(): void {
    if (this.#fd >= 0) closeSync(this.#fd);
    this.#fd = -1;
  }
}
