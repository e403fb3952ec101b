/**
 * The shipper's side of the wire: one POST, and what its answer means for the chunk. It never waits between
 * tries and never gives up; when to try again is in the answer.
 */
import { constants, gzipSync, zstdCompressSync } from "node:zlib";
import { type ChunkHeaders, formatChunkHeaders, HEADER, UPLOAD_PATH } from "./chunk.ts";
import { type Config, readSecret } from "./config.ts";
import { fetchWith } from "./runtime.ts";
import { errorMessage, retryDelay } from "./service.ts";

/** Bodies below this many bytes are not worth compressing. */
const COMPRESS_FROM = 1024;
/** Pauses between tries in ms: of what an operator must mend, and of a receiver that is away or busy. */
const REFUSED = { min: 2_000, max: 30_000 };
const AWAY = { min: 500, max: 30_000 };
/** Longest `Retry-After` that is believed, in seconds. */
const MAX_RETRY_AFTER = 300;

/** A chunk that is ready to be sent: its body is encoded. */
export interface Chunk extends ChunkHeaders {
  body: Uint8Array<ArrayBuffer>;
  encoding: "identity" | "gzip" | "zstd";
}

/**
 * stored: on stable storage, `lines` of it · moved: the stream stands elsewhere, go on from there ·
 * tooLarge: send less at once · refused: hold the offset and try again after `waitMs`.
 */
export type Answer =
  | { kind: "stored"; offset: number; lines: number }
  | { kind: "moved"; offset: number }
  | { kind: "tooLarge" }
  | { kind: "refused"; waitMs: number; status: number; reason: string };

export type Uploader = ReturnType<typeof createUploader>;

/** The one who talks to the receiver. `signal` ends a request in hand. */
export function createUploader(config: Config["shipper"], signal: AbortSignal) {
  const url = config.receiver.replace(/\/+$/, "") + UPLOAD_PATH;
  let tls = { ca: "", cert: "", key: "" };
  let fetchChunk = fetch;
  let refusals = 0;

  async function request(
    method: string,
    headers: Record<string, string>,
    body?: BodyInit,
  ): Promise<Response> {
    const pem = (file: string | undefined) => (file === undefined ? "" : readSecret({ file }));
    const now = { ca: pem(config.ca), cert: pem(config.cert), key: pem(config.key) };
    if (now.ca !== tls.ca || now.cert !== tls.cert || now.key !== tls.key) {
      tls = now; // read again when a file has changed: a new certificate needs no restart
      fetchChunk = fetchWith(now);
    }
    const token = config.token && readSecret(config.token);
    return fetchChunk(url, {
      method,
      headers: { ...headers, ...(token && { Authorization: `Bearer ${token}` }) },
      ...(body !== undefined && { body }),
      redirect: "manual",
      signal: AbortSignal.any([signal, AbortSignal.timeout(config.timeoutSeconds * 1000)]),
    });
  }

  /** A fault's pause grows with the number of faults in a row, over all streams. */
  function refused(status: number, reason: string, pace: { min: number; max: number } = REFUSED): Answer {
    refusals++;
    return { kind: "refused", waitMs: retryDelay(refusals, pace), status, reason };
  }

  return {
    /** Sends one chunk, once. Throws only when the signal is aborted. */
    async send(chunk: Chunk): Promise<Answer> {
      try {
        const response = await request(
          "POST",
          {
            ...formatChunkHeaders(chunk),
            "Content-Type": "text/plain",
            ...(chunk.encoding !== "identity" && { "Content-Encoding": chunk.encoding }),
          },
          chunk.body,
        );
        const text = (await response.text()).slice(0, 300);
        const offset = parseOffset(response);
        if (response.status === 200) {
          refusals = 0;
          release(chunk);
          return { kind: "stored", offset: offset ?? chunk.end, lines: parseLines(text) };
        }
        if (response.status === 409 && offset !== undefined) return { kind: "moved", offset };
        if (response.status === 413) return { kind: "tooLarge" };
        const after = parseRetryAfter(response);
        const answer = refused(response.status, text.trim(), isPassing(response.status) ? AWAY : REFUSED);
        return answer.kind === "refused" && after !== undefined ? { ...answer, waitMs: after } : answer;
      } catch (error) {
        if (signal.aborted) throw error;
        return refused(0, errorMessage(error), isCertificateFault(error) ? REFUSED : AWAY);
      }
    },

    /** Where the receiver stands with a stream; undefined when it does not know it. Throws when it can't tell. */
    async committed(host: string, stream: string): Promise<number | undefined> {
      const ask = request("HEAD", { [HEADER.host]: host, [HEADER.stream]: stream });
      const response = await ask.catch((error) => {
        if (signal.aborted) throw error;
        // fetch tells network faults as TypeErrors, which elsewhere are bugs
        throw new Error(`Cannot ask ${url} where stream ${stream} stands`, { cause: error });
      });
      if (response.status === 404) return undefined;
      const offset = parseOffset(response);
      if (response.status !== 200 || offset === undefined) {
        throw new Error(`Cannot ask ${url} where stream ${stream} stands: it answered ${response.status}`);
      }
      return offset;
    },
  };
}

/**
 * The body as it goes over the wire; small ones are not worth the work. In place, some milliseconds per MiB while the
 * last chunk is in flight: a thread would need memory of its own, and costs more than it saves.
 */
export function encodeBody(
  body: Uint8Array<ArrayBuffer>,
  compression: Config["shipper"]["compression"],
): Pick<Chunk, "body" | "encoding"> {
  if (compression === "none" || body.length < COMPRESS_FROM) return { body, encoding: "identity" };
  const encoded =
    compression === "gzip"
      ? gzipSync(body, { level: 1 })
      : zstdCompressSync(body, {
          params: { [constants.ZSTD_c_compressionLevel]: 1 },
          pledgedSrcSize: body.length,
          chunkSize: Math.max(COMPRESS_FROM, body.length >> 2), // logs shrink to less: one block, no copies
        });
  return { body: encoded as Uint8Array<ArrayBuffer>, encoding: compression };
}

/**
 * Gives the memory of an encoded body back at once: the collector would let many of them pile up. Small ones may
 * share the runtime's pool with others, and stay.
 */
function release({ encoding, body }: Chunk): void {
  if (encoding !== "identity" && body.buffer.byteLength >= 65_536) body.buffer.transfer(0);
}

function parseOffset(response: Response): number | undefined {
  const text = response.headers.get(HEADER.offset);
  return text !== null && /^\d{1,16}$/.test(text) ? Number(text) : undefined;
}

function parseLines(text: string): number {
  return Number(/"lines"\s*:\s*(\d+)/.exec(text)?.[1] ?? 0);
}

/** `Retry-After` in ms: seconds or a date (RFC 9110 section 10.2.3), with jitter so that senders spread. */
function parseRetryAfter(response: Response): number | undefined {
  const text = response.headers.get("Retry-After");
  if (text === null) return undefined;
  const seconds = /^\d+$/.test(text) ? Number(text) : (Date.parse(text) - Date.now()) / 1000;
  if (Number.isNaN(seconds)) return undefined;
  return Math.min(MAX_RETRY_AFTER, Math.max(0, seconds)) * 1000 + Math.random() * 500;
}

/** Faults that pass by themselves; the others wait for somebody who mends the config of one side. */
function isPassing(status: number): boolean {
  return status === 408 || status === 429 || status >= 500;
}

function isCertificateFault(error: unknown): boolean {
  return /cert|self.signed|ssl|tls/i.test(`${(error as NodeJS.ErrnoException).code} ${errorMessage(error)}`);
}
