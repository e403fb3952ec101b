/** `--watch`: calls a pass by a cron expression, one at a time, until the signal is aborted. */
import { Cron } from "croner";
import { describe, type Log, pause } from "./service.ts";

/**
 * Follows `schedule` (5 fields, or 6 with seconds first; local time). A pass that is still running when the next
 * is due makes that one fall out; one that throws is logged and the schedule goes on. Returns when the signal is
 * aborted and the pass in hand has ended.
 */
export async function followSchedule(
  schedule: string,
  pass: () => Promise<unknown>,
  { log, signal }: { log: Log; signal: AbortSignal },
): Promise<void> {
  const job = new Cron(schedule, { protect: true, mode: "5-or-6-parts" }, async () => {
    await pass().catch((error) => log.error("pass failed", { error: describe(error) }));
  });
  log.info("following the schedule", { schedule, next: job.nextRun()?.toISOString() });
  await pause(2 ** 31 - 1, signal);
  job.stop();
  while (job.isBusy()) await pause(20);
}
