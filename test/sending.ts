/**
 * A shipper reduced to the wire contract, for tests of the receiver: it has its lines in memory, sends them in
 * chunks of any size, and goes on from the offset that it is told, through refused connections and lost answers.
 */
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseBatchName } from "../lib/batch.ts";
import { type ChunkHeaders, formatChunkHeaders, HEADER } from "../lib/chunk.ts";
import { createLog } from "../lib/service.ts";
import { accessLine } from "./support.ts";

export const quiet = createLog(() => {});

export interface Post extends Partial<ChunkHeaders> {
  headers?: Record<string, string>;
}

/** The request of one chunk. */
export function post(url: string, body: string | Uint8Array<ArrayBuffer>, options: Post = {}): Request {
  const { host = "10.0.0.1", stream = "stream-0001", offset = 0, headers, ...rest } = options;
  const end = offset + Buffer.byteLength(body);
  return new Request(`${url}/upload`, {
    method: "POST",
    body,
    headers: {
      "Content-Type": "text/plain",
      ...formatChunkHeaders({ host, stream, offset, end, ...rest }),
      ...headers,
    },
  });
}

/** `count` lines of which each window has its share, in order. */
export function linesOfWindows(count: number, windows = ["06:05", "06:25", "06:45"]): string {
  let text = "";
  for (let i = 0; i < count; i++) {
    const time = windows[Math.floor((i * windows.length) / count)];
    text += accessLine(i, `22/Nov/2026:${time}:${String(i % 60).padStart(2, "0")} +0600`);
  }
  return text;
}

/** Sends all of `text` in chunks of about `chunkBytes`, whatever happens to the receiver. Resolves when it is stored. */
export async function sendAll(
  url: string,
  host: string,
  text: Uint8Array<ArrayBuffer>,
  {
    chunkBytes = 4096,
    stream = `stream-${host.replaceAll(".", "-")}`,
    signal = AbortSignal.timeout(120_000),
  } = {},
): Promise<void> {
  let offset = 0;
  while (offset < text.length) {
    signal.throwIfAborted();
    const size = Math.ceil(chunkBytes * (0.2 + Math.random()));
    const end = offset + size >= text.length ? text.length : text.lastIndexOf(0x0a, offset + size) + 1;
    try {
      const response = await fetch(post(url, text.slice(offset, end), { host, stream, offset }), {
        signal: AbortSignal.timeout(10_000),
      });
      await response.bytes();
      const told = response.headers.get(HEADER.offset);
      if ((response.status === 200 || response.status === 409) && told) offset = Number(told);
      else if (response.status !== 503 && response.status !== 507)
        throw new Error(`answer is ${response.status}`);
      else await new Promise((resolve) => setTimeout(resolve, 20));
    } catch (error) {
      if (error instanceof Error && error.message.startsWith("answer is")) throw error;
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
  }
}

/** What a host's batches hold, per window, parts in their order, open ones last. */
export async function storedWindows(dir: string, host: string): Promise<Map<string, string>> {
  const folder = join(dir, host);
  await mkdir(folder, { recursive: true });
  const batches = (await readdir(folder)).map((name) => ({ name, batch: parseBatchName(name) }));
  const known = batches
    .filter(({ batch }) => batch)
    .sort((a, b) => (a.batch?.part ?? 0) - (b.batch?.part ?? 0));
  const windows = new Map<string, string>();
  for (const { name, batch } of known) {
    const window = batch?.window ?? "";
    windows.set(window, (windows.get(window) ?? "") + (await readFile(join(folder, name), "latin1")));
  }
  return windows;
}
