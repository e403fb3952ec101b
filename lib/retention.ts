/** Retention, as a pure function: what is to be done with each delivered batch. */
import { parseBatchName } from "./batch.ts";
import type { Config } from "./config.ts";

const HOUR_MS = 3_600_000;

/** A delivered batch in `sent/`. */
export interface Delivered {
  name: string;
  bytes: number;
  /** When it was delivered, milliseconds since the epoch. */
  at: number;
}

/** What is to be done with one file. `early` is before its time, for want of space. */
export interface Step extends Delivered {
  action: "delete" | "early" | "compress";
}

/** Decides what to do with each delivered batch. `files` come oldest first; `space` is in bytes. */
export function planPass(
  files: Delivered[],
  { compressAfterHours, deleteAfterHours, minFreePercent }: Config["housekeep"],
  now: number,
  space: { free: number; total: number },
): Step[] {
  const steps: Step[] = [];
  let { free } = space;
  for (const file of files) {
    const hours = (now - file.at) / HOUR_MS;
    if (hours < deleteAfterHours) continue;
    steps.push({ ...file, action: "delete" });
    free += file.bytes;
  }
  for (const file of files.slice(steps.length)) {
    const hours = (now - file.at) / HOUR_MS;
    if (free < (space.total * minFreePercent) / 100) {
      steps.push({ ...file, action: "early" });
      free += file.bytes;
    } else if (hours >= compressAfterHours && parseBatchName(file.name)?.state === "sealed") {
      steps.push({ ...file, action: "compress" });
    }
  }
  return steps;
}
