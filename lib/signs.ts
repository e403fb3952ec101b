/**
 * What the scripts leave on disk for each other beside the batches: that they run, and what holds them up. Each file has
 * one writer, which replaces it whole; everybody else reads. Times are milliseconds since the epoch.
 */
import { join } from "node:path";
import { z } from "zod";
import { readState, readStateOrForget } from "./state.ts";

/** What holds up all deliveries, in the order in which one meets them. */
export const FAULT_KINDS = ["connection", "host key", "login", "server", "local"] as const;
export type FaultKind = (typeof FAULT_KINDS)[number];

const forwarderStateSchema = z.object({
  version: z.literal(1),
  at: z.number(),
  /** Whether it is a forwarder that stays: the file's time is then its last sign of life. */
  stays: z.boolean().optional(),
  /** Whether the last cycle could deliver, or had nothing to deliver. */
  ok: z.boolean(),
  /** Why not, in words, and since when without a break. */
  fault: z.object({ kind: z.enum(FAULT_KINDS), text: z.string(), since: z.number() }).optional(),
  lastSentAt: z.number().optional(),
  /** The files in failed/: how often tried there, when again, and why it failed last. */
  failed: z.record(z.string(), z.object({ attempts: z.number(), nextAt: z.number(), reason: z.string() })),
  /** Batches at which the connection was cut or room was lacking, and how often: they come last, each alone. */
  later: z.record(z.string(), z.number()).default({}),
});
/** `<dir>/.forwarder-state.json`. */
export type ForwarderState = z.infer<typeof forwarderStateSchema>;

export function forwarderStatePath(dir: string): string {
  return join(dir, ".forwarder-state.json");
}

/** The forwarder's state; undefined when it never ran here. Throws when the file is damaged. */
export async function readForwarderState(dir: string): Promise<ForwarderState | undefined> {
  return readStateOrForget(forwarderStatePath(dir), forwarderStateSchema, 1, (path, reason) => {
    throw new Error(`Cannot read "${path}": ${reason}`);
  });
}

const refusedSchema = z.object({
  host: z.string(),
  peer: z.string(),
  reason: z.string(),
  count: z.number(),
  since: z.number(),
  at: z.number(),
});
/** Requests of one address that were refused for one reason. */
export type RefusedSender = z.infer<typeof refusedSchema>;

export const receiverStateSchema = z.object({
  version: z.literal(1),
  at: z.number(),
  startedAt: z.number(),
  pid: z.number().optional(),
  ports: z.array(z.number()),
  /** Why a chunk could not be stored now, and since when. */
  health: z.string().optional(),
  healthSince: z.number().optional(),
  refused: z.array(refusedSchema),
  pressed: z.array(z.object({ host: z.string(), text: z.string() })),
});
/** `<dir>/.receiver-<lowest port>.json`: that a receiver runs, and whom it refuses. */
export type ReceiverState = z.infer<typeof receiverStateSchema>;

const muteSchema = z.object({
  until: z.number(),
  at: z.number(),
  by: z.string(),
  reason: z.string().optional(),
});
/** A maintenance window of a host, or of `*`: its silence is not told. */
export type Mute = z.infer<typeof muteSchema>;

export const monitorNewsSchema = z.looseObject({
  version: z.number(),
  at: z.number(),
  mutes: z.record(z.string(), muteSchema).default({}),
  /** Mails and posts that were refused for good. */
  undeliverable: z
    .array(z.object({ to: z.string(), subject: z.string(), reason: z.string(), at: z.number() }))
    .default([]),
});
export type MonitorNews = z.infer<typeof monitorNewsSchema>;

/** What the monitor's state file says; "never" when there is none, undefined when it is not for us to read. */
export async function readMonitorNews(path: string): Promise<MonitorNews | "never" | undefined> {
  const found = await readState(path, monitorNewsSchema, 2).catch(() => undefined);
  return found?.state === "ok" ? found.value : found?.state === "absent" ? "never" : undefined;
}
