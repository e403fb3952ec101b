/**
 * State files: JSON that is replaced whole and carries a version. Absent, damaged and newer are three cases, and
 * only absent means a first run.
 */
import type { z } from "zod";
import { readIfExists, writeDurably } from "./durable.ts";

/** What a state file says: `damaged` when it is no JSON or has another form, `newer` when a later version wrote it. */
export type StateFound<T> =
  | { state: "absent" }
  | { state: "ok"; value: T }
  | { state: "damaged"; reason: string }
  | { state: "newer"; reason: string; version: number };

/** Reads the state file at `path`. Throws the system's error when it is there and can't be read. */
export async function readState<T>(
  path: string,
  schema: z.ZodType<T>,
  version: number,
): Promise<StateFound<T>> {
  const text = await readIfExists(path);
  if (text === undefined) return { state: "absent" };
  let json: { version?: unknown };
  try {
    json = JSON.parse(text);
  } catch {
    return { state: "damaged", reason: text.trim() === "" ? "it is empty" : "it is no JSON" };
  }
  const found = typeof json === "object" && json !== null ? json.version : undefined;
  if (typeof found === "number" && found > version)
    return { state: "newer", reason: `version ${found} wrote it`, version: found };
  const result = schema.safeParse(json);
  if (result.success) return { state: "ok", value: result.data };
  const issue = result.error.issues[0];
  return { state: "damaged", reason: `${issue?.path.join(".")}: ${issue?.message}` };
}

/** What a state file says; undefined when there is none, and when it can't be used: then `forgotten` is given the reason. */
export async function readStateOrForget<T>(
  path: string,
  schema: z.ZodType<T>,
  version: number,
  forgotten: (path: string, reason: string) => void,
): Promise<T | undefined> {
  const found = await readState(path, schema, version);
  if (found.state === "ok") return found.value;
  if (found.state !== "absent") forgotten(path, found.reason);
  return undefined;
}

/** Replaces the state file at `path`, on stable storage when it returns. Throws the system's error. */
export async function writeState(path: string, value: object, mode?: number): Promise<void> {
  await writeDurably(path, `${JSON.stringify(value)}\n`, mode);
}
