/**
 * The names of a sender's batches: which were used, and which one is next. None is ever used twice, also where the ledger
 * is lost, is older than the folder, or does not know of names that may have been used elsewhere.
 */
import { existsSync } from "node:fs";
import { join } from "node:path";
import {
  dashedHost,
  FAILED,
  formatBatchName,
  formatWindow,
  parseBatchName,
  parseWindow,
  SENT,
  withState,
} from "../batch.ts";
import type { Ledger } from "../ledger.ts";
import { DAY, HOUR } from "../service.ts";

export class BatchNames {
  readonly #host: string;
  readonly #ledger: Ledger;
  #hour = 0;
  #begun = 0;

  constructor(host: string, ledger: Ledger) {
    this.#host = host;
    this.#ledger = ledger;
  }

  begunAt(now: number): number {
    const hour = Math.floor(now / HOUR);
    if (this.#hour !== hour) this.#begun = 0;
    this.#hour = hour;
    return this.#begun;
  }

  /** Counts names that were begun; negative when what begins them was cut off. */
  count(names: number): void {
    this.#begun += names;
  }

  /** The next name of a window; `staged` are those that are not in the ledger yet. */
  next(
    window: string,
    now: number,
    staged: Iterable<string>,
    { dir, prefix }: { dir: string; prefix: string },
  ): string {
    const host = dashedHost(this.#host);
    let part = this.#ledger.used.get(window) ?? 0;
    for (const name of [...this.#ledger.open.keys(), ...staged]) {
      if (!name.includes(window)) continue; // at once: there may be thousands
      const batch = parseBatchName(name);
      if (batch?.window === window) part = Math.max(part, batch.part);
    }
    part++;
    if (part === 1 && window <= this.#ledger.unsure) part = Math.floor(now / 1000);
    for (; ; part++) {
      const name = formatBatchName({ prefix, window, host, part, state: "sealed" });
      // Files are looked at, too: the ledger may be lost, or the folder older than it.
      const places = [this.#host, FAILED, SENT].map((folder) => join(dir, folder, name));
      const packed = join(dir, SENT, withState(name, "compressed"));
      if (![...places, packed].some((path) => existsSync(path))) return name;
    }
  }

  /** Names may have been used that nobody remembers, of all windows up to a day after the newest. */
  doubt(now: number): void {
    const newest = Math.max(now, ...[...this.#ledger.used.keys()].map((window) => parseWindow(window).start));
    const hour = formatWindow(newest + DAY, 60).slice(0, 8);
    this.#doubtUpTo(`${hour}_99`); // compared as text with the windows of any zone
  }

  #doubtUpTo(window: string): void {
    if (window > this.#ledger.unsure) this.#ledger.unsure = window;
  }

  /** Forgets the windows that ended before `oldest`: they stay unsure. */
  forgetBefore(oldest: number): void {
    for (const [window] of this.#ledger.used) {
      if (parseWindow(window).end >= oldest) continue;
      this.#ledger.used.delete(window);
      this.#doubtUpTo(window);
    }
  }
}
