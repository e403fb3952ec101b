/**
 * Events of the folders in which followed files lie: what wakes a family before its next poll. Only `fs.watch`
 * (inotify) is used here; where it gives nothing (network file systems), the poll sees the change later.
 */
import { type FSWatcher, watch } from "node:fs";
import { basename, dirname } from "node:path";
import { siblingFolders } from "./rotation.ts";
import type { Family } from "./streams.ts";

/** Something that one loop waits for and events ring; a ring while nobody waits is not lost. */
export interface Bell {
  /** Waits for a ring, `ms` at most, or the signal. */
  wait(ms: number, signal: AbortSignal): Promise<void>;
}

export interface Watch {
  /** The bell of a family; it is the same one at every call. */
  bellOf(family: Family): Bell;
  /** Rings when a name has come, gone or changed in one of the folders. */
  names: Bell;
  /** Watches the folders of all families that have a bell, as far as that is not done yet. */
  update(): Promise<void>;
  close(): void;
}

/** Watches the folders of families. A name that changed also makes a family look into its folder. */
export function createWatch(now: () => number, olddir?: string): Watch {
  const watchers = new Map<string, FSWatcher>();
  const bells = new Map<Family, Bell & { ring(): void }>();
  const names = createBell();

  function heard(folder: string, event: string, name: string | null): void {
    if (event === "rename") names.ring();
    for (const [family, bell] of bells) {
      const isOwn = dirname(family.path) === folder;
      const isLive = name === null || name === basename(family.path);
      if (isOwn && event !== "rename" && !isLive) continue; // somebody else's file is written to
      if (isOwn && event === "rename") family.scanAt = Math.min(family.scanAt, now());
      bell.ring();
    }
  }

  function watchFolder(folder: string): void {
    try {
      const watcher = watch(folder, (event, name) => heard(folder, event, name));
      watcher.on("error", () => {
        watchers.delete(folder); // the next update makes a new one
        watcher.close();
      });
      watchers.set(folder, watcher);
    } catch {
      // no events here, or no folder yet
    }
  }

  return {
    names,
    bellOf(family) {
      const bell = bells.get(family) ?? createBell();
      bells.set(family, bell);
      return bell;
    },
    async update() {
      for (const family of bells.keys()) {
        for (const folder of await siblingFolders(family.path, olddir)) {
          if (!watchers.has(folder)) watchFolder(folder);
        }
      }
    },
    close() {
      for (const watcher of watchers.values()) watcher.close();
    },
  };
}

function createBell(): Bell & { ring(): void } {
  let rung = false;
  let wake: (() => void) | undefined;
  return {
    ring() {
      rung = true;
      wake?.();
    },
    async wait(ms, signal) {
      if (!rung && !signal.aborted) {
        await new Promise<void>((resolve) => {
          const done = () => {
            clearTimeout(timer);
            signal.removeEventListener("abort", done);
            wake = undefined;
            resolve();
          };
          const timer = setTimeout(done, ms);
          signal.addEventListener("abort", done, { once: true });
          wake = done;
        });
      }
      rung = false;
    },
  };
}
