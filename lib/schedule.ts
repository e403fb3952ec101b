/** `--watch`: calls a pass by a cron expression, one at a time, until the signal is aborted. */
import { Cron, CronPattern } from "croner";
import { ConfigError } from "./config.ts";
import { errorMessage, type Log, wait } from "./service.ts";

/** The longest that a timer can wait: some 24 days. */
const LONGEST_MS = 2 ** 31 - 1;
const MODE = "5-or-6-parts";

/** What is wrong with a schedule, in words; empty when nothing is. */
export function checkSchedule(schedule: string): string[] {
  try {
    new CronPattern(schedule, undefined, { mode: MODE });
    const comes = new Cron(schedule, { mode: MODE, paused: true }).nextRun() !== null;
    return comes ? [] : [`${schedule}: expected a time that comes; no calendar has this one`];
  } catch (error) {
    return [`${schedule}: expected a cron expression such as */10 * * * * (${errorMessage(error)})`];
  }
}

/**
 * Follows `schedule` (5 fields, or 6 with seconds first; local time). A pass that is still running when the next
 * is due makes that one fall out; one that throws is logged and the schedule goes on. Returns when the signal is
 * aborted and the pass in hand has ended. Throws a ConfigError, with `where` before it, when the schedule is none.
 */
export async function followSchedule(
  schedule: string,
  pass: () => Promise<unknown>,
  { where, log, signal }: { where: string; log: Log; signal: AbortSignal },
): Promise<void> {
  const faults = checkSchedule(schedule);
  if (faults.length > 0) throw new ConfigError(faults.map((fault) => `${where}: ${fault}`));
  const job = new Cron(schedule, { protect: true, mode: MODE }, async () => {
    await pass().catch((error) => signal.aborted || log.error("pass failed", { error: errorMessage(error) }));
  });
  log.info("following the schedule", { schedule, next: job.nextRun()?.toISOString() });
  while (!signal.aborted) await wait(LONGEST_MS, signal);
  job.stop();
  while (job.isBusy()) await wait(20);
}
