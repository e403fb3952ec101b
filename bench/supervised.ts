/**
 * A process that is started again when the adversary has killed it, as systemd would do. Its output goes to a
 * file, for whoever looks into a failed run.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { closeSync, openSync } from "node:fs";

export interface Supervised {
  readonly name: string;
  readonly pid: number | undefined;
  /** How often it was killed by us. */
  readonly kills: number;
  /** How often it ended without being told to. */
  readonly crashes: number;
  /** SIGKILL, and a new start after `downMs`; `meanwhile` runs when it is dead. */
  kill(downMs: number, meanwhile?: () => unknown): Promise<void>;
  /** SIGTERM for good; gives the exit code or the signal that ended it, and how long that took. */
  stop(): Promise<{ code: number | string; ms: number }>;
}

/** Starts `command` and keeps it running. */
export function supervise(
  name: string,
  command: string,
  args: string[],
  options: { log: string; cwd: string; env?: Record<string, string> },
): Supervised {
  let child: ChildProcess;
  let ended: Promise<number | string>;
  let kills = 0;
  let crashes = 0;
  let wanted = true;
  let down = false;

  const launch = () => {
    down = false;
    const out = openSync(options.log, "a");
    const started = spawn(command, args, {
      cwd: options.cwd,
      env: { ...process.env, ...options.env },
      stdio: ["ignore", out, out],
    });
    closeSync(out);
    child = started;
    ended = new Promise((resolve) => {
      started.on("error", (error) => resolve(error.message));
      started.on("close", (code, signal) => resolve(signal ?? code ?? -1));
    });
    ended.then(() => {
      if (!wanted || down || child !== started) return;
      crashes++;
      setTimeout(() => wanted && child === started && launch(), 300);
    });
  };
  launch();

  return {
    name,
    get pid() {
      return down ? undefined : child.pid;
    },
    get kills() {
      return kills;
    },
    get crashes() {
      return crashes;
    },
    kill: async (downMs, meanwhile) => {
      if (down || !wanted) return;
      down = true;
      kills++;
      child.kill("SIGKILL");
      await ended;
      await meanwhile?.();
      await new Promise((resolve) => setTimeout(resolve, downMs));
      if (wanted) launch();
    },
    stop: async () => {
      wanted = false;
      const from = Date.now();
      const hard = setTimeout(() => child.kill("SIGKILL"), 8000);
      child.kill("SIGTERM");
      const code = await ended;
      clearTimeout(hard);
      return { code, ms: Date.now() - from };
    },
  };
}
