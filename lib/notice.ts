/**
 * What the monitor remembers, and what it has to tell. A notice stands in the queue until it is accepted, so that
 * an outage of the mail server loses none and keeps their order. All times are of the monitor's clock.
 */
import { randomBytes } from "node:crypto";
import { readIfExists, writeDurably } from "./durable.ts";
import { errorMessage } from "./service.ts";

/** Beyond so many notices in the queue, changes join the last one: the queue stays small in a long outage. */
const QUEUE_LIMIT = 100;

/** `quiet`: its shipper is alive, no lines come. `never`: expected, not yet seen. `gone`: no longer expected. */
export type Status = "ok" | "quiet" | "silent" | "never" | "gone" | "fault";

/** What is known of a subject and was told of it. */
export interface Incident {
  title: string;
  text: string;
  status: Status;
  /** Since when it is so; 0 when it was never otherwise. */
  since: number;
  /** Since when it is not ok. */
  outage?: number;
  told: Status;
  toldAt: number;
  /** The id of the notice that opened the incident. */
  thread?: string;
  /** Times of the latest changes. */
  changes: number[];
  flapping?: boolean;
}

/** What is known of a sender beside its incident. */
interface Heard {
  /** The ledger's value, by the receiver's clock. */
  value: number;
  /** When that was, by the monitor's clock. */
  at: number;
  /** Bytes lost that were told of, and when. */
  lost: number;
  lostToldAt: number;
}

/** One fact of an alert. `lasted` is the length of the outage in milliseconds. */
export interface Change {
  kind: "opened" | "over" | "reminder" | "flapping" | "steady" | "lost" | "note";
  title: string;
  text: string;
  status: Status;
  /** Whether the subject is a sender. */
  sender: boolean;
  since: number;
  lasted?: number;
  bytes?: number;
}

/** Something to be told, until it is accepted. An alert says what changed, a summary is made from its hour. */
export type Notice = {
  id: string;
  at: number;
  references: string[];
  mailed?: boolean;
  posted?: boolean;
} & (
  | { kind: "alert"; changes: Change[]; counts: Partial<Record<Status, number>> }
  | { kind: "summary"; hourEnd: number }
);

/** All that the monitor remembers. */
export interface MonitorState {
  version: 1;
  /** Tells this monitor's message ids from another's. */
  instance: string;
  /** Clock and uptime of the last run. */
  at: number;
  uptime: number;
  incidents: Record<string, Incident>;
  heard: Record<string, Heard>;
  /** End of the last hour that was summarised or queued, milliseconds since the epoch. */
  summarisedUntil: number;
  queue: Notice[];
}

/** The state of a first run. */
export function emptyState(instance: string): MonitorState {
  return { version: 1, instance, at: 0, uptime: 0, incidents: {}, heard: {}, summarisedUntil: 0, queue: [] };
}

/** Puts an alert at the end of the queue. */
export function enqueue(
  state: MonitorState,
  alert: { id: string; at: number; changes: Change[]; references: string[] },
): void {
  const counts: Partial<Record<Status, number>> = {};
  for (const [key, { status }] of Object.entries(state.incidents)) {
    if (key.startsWith("host ")) counts[status] = (counts[status] ?? 0) + 1;
  }
  const last = state.queue.at(-1);
  const joins = last?.kind === "alert" && !last.mailed && state.queue.length >= QUEUE_LIMIT;
  if (joins) last.changes.push(...alert.changes);
  else state.queue.push({ kind: "alert", ...alert, counts });
}

/**
 * The state in the file at `path`; that of a first run when there is none. When it is unreadable, `fault` says why,
 * and the state is that of a first run with a notice about it.
 */
export async function readState(path: string, now: number): Promise<{ state: MonitorState; fault?: string }> {
  const fresh = emptyState(randomBytes(4).toString("hex"));
  const text = await readIfExists(path);
  if (text === undefined) return { state: fresh };
  try {
    const state = JSON.parse(text) as MonitorState;
    if (state?.version === 1 && state.incidents && state.heard && Array.isArray(state.queue))
      return { state };
    throw new Error("expected a state of version 1");
  } catch (error) {
    const change: Change = {
      kind: "note",
      title: "Monitor starts anew",
      text: `What was told before ${path} became unreadable is not known; it may be told again.`,
      status: "ok",
      sender: false,
      since: now,
    };
    enqueue(fresh, { id: `note-${fresh.instance}-${now}`, at: now, changes: [change], references: [] });
    return { state: fresh, fault: errorMessage(error) };
  }
}

/** Saves the state, on stable storage when it returns. */
export function saveState(path: string, state: MonitorState): Promise<void> {
  return writeDurably(path, `${JSON.stringify(state)}\n`);
}
