/**
 * What a process costs, as Linux tells it: CPU time from /proc/PID/stat, memory from /proc/PID/status.
 */
import { readdirSync, readFileSync } from "node:fs";

/** A reading of one process. */
export interface Sample {
  /** User and system time since its start, in seconds. */
  cpuSeconds: number;
  /** Resident memory now, in MiB. */
  memoryMiB: number;
  /** The most resident memory that it ever had, in MiB. */
  peakMiB: number;
}

const TICKS_PER_SECOND = 100; // USER_HZ: 100 on every Linux that Bun runs on; see proc(5)

/** Reads a process; zeros when it is gone. All threads count, children do not. */
export function sample(pid: number): Sample {
  try {
    const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
    const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" "); // from field 3: the name may have spaces
    const ticks = Number(fields[11]) + Number(fields[12]);
    const status = readFileSync(`/proc/${pid}/status`, "latin1");
    return {
      cpuSeconds: ticks / TICKS_PER_SECOND,
      memoryMiB: mebibytes(status, "VmRSS"),
      peakMiB: mebibytes(status, "VmHWM"),
    };
  } catch {
    return { cpuSeconds: 0, memoryMiB: 0, peakMiB: 0 };
  }
}

/**
 * CPU seconds of the threads that a process has now, to the nanosecond: for work that is small beside the ticks of
 * `sample`. NaN where the kernel does not keep them (proc(5), schedstat).
 */
export function cpuSecondsOf(pid: number): number {
  try {
    const threads = readdirSync(`/proc/${pid}/task`);
    const spent = (thread: string) =>
      Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "latin1").split(" ")[0]);
    return threads.reduce((sum, thread) => sum + spent(thread), 0) / 1e9;
  } catch {
    return Number.NaN;
  }
}

function mebibytes(status: string, name: string): number {
  const found = new RegExp(`^${name}:\\s+(\\d+) kB$`, "m").exec(status);
  return found ? Number(found[1]) / 1024 : 0;
}

/** The middle value; of an even number of values the lower middle. */
export function median(values: number[]): number {
  return percentile(values, 50);
}

/** The value that `percent` of the values do not exceed (nearest rank); NaN when there are none. */
export function percentile(values: number[], percent: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.max(0, Math.ceil((percent / 100) * sorted.length) - 1)] ?? Number.NaN;
}
