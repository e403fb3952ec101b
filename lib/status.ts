/**
 * What the status page and its verdict are made of: one look at the receiver's ledgers and at the folder. The
 * folder is the same for all ports, so every port shows all senders, also those of another process.
 */

/**
 * How a sender is doing. `ok`: lines come; `quiet`: it is heard of, but sends no lines; `silent`: it is not
 * heard of; `never`: it is expected and was not heard of yet.
 */
export type HostState = "ok" | "quiet" | "silent" | "never";

/** One sender. Times are milliseconds since the epoch by the receiver's clock, 0 for never. */
export interface HostStatus {
  host: string;
  state: HostState;
  /** When anything, also a heartbeat, was last heard. */
  heardAt: number;
  /** When the last line came. */
  lineAt: number;
  /** Lines that came in each whole minute of the last hours, oldest first. */
  linesPerMinute: number[];
  /** Bytes that the sender still has to ship, as it told last. */
  lag: number;
  /** Batches that still take lines. */
  open: number;
  /** Sealed batches that are not delivered yet, and since when the oldest waits. */
  waiting: number;
  waitingSince?: number;
  /** Batches in `failed/`. */
  failed: number;
  /** Bytes that vanished unread, as the sender told, since its ledger began. */
  lost: number;
}

/** Everything that the page shows. */
export interface Status {
  version: string;
  now: number;
  /** When this receiver started. */
  startedAt: number;
  /** The folder of the batches. */
  dir: string;
  hosts: HostStatus[];
  /** Bytes of the file system of `dir`; absent when it cannot be asked. */
  disk?: { free: number; total: number };
  /** What the forwarder told last; absent when none ever ran here. */
  forwarder?: ForwarderStatus;
}

/** The forwarder, as the page shows it. */
export interface ForwarderStatus {
  /** When it last finished a pass. */
  at: number;
  /** What hinders delivery, and since when. */
  fault?: { text: string; since: number };
}
