/**
 * The original Python shipper's form: `{"log": "<lines>", "host": "<ip>"}`, with an empty line after every line.
 * It has no offsets, so what it repeats is taken again; a fleet moves over from it host by host.
 */
import { WireError } from "./chunk.ts";
import { parseHost } from "./host.ts";

/** Names what came in this form in the ledger; shorter than a stream of the wire may be. */
export const LEGACY_STREAM = "legacy";

/** Reads a request. Throws a WireError (400). */
export function parseLegacy(json: Uint8Array): { host: string; body: Uint8Array } {
  let value: unknown;
  try {
    value = JSON.parse(Buffer.from(json.buffer, json.byteOffset, json.length).toString());
  } catch (error) {
    throw new WireError(400, `body is no JSON: ${(error as Error).message}`);
  }
  const { log, host: name } = (value ?? {}) as { log?: unknown; host?: unknown };
  const host = typeof name === "string" ? parseHost(name) : undefined;
  if (typeof log !== "string" || host === undefined) {
    throw new WireError(400, 'expected {"log": "<lines>", "host": "<address>"}');
  }
  return { host, body: Buffer.from(dropEmptyLines(log)) };
}

/** Every line that is not empty, each with its `\n`. */
function dropEmptyLines(log: string): string {
  const lines = log.split("\n").filter((line) => line !== "" && line !== "\r");
  return lines.map((line) => `${line}\n`).join("");
}
