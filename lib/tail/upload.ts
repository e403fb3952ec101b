/**
 * The shipper's side of the wire: one POST, and what its answer means for the chunk. It never waits between
 * tries and never gives up; when to try again is in the answer.
 */
import { constants, gzipSync, zstdCompressSync } from "node:zlib";
import {
  type ChunkHeaders,
  type Encoding,
  formatChunkHeaders,
  formatNews,
  HEADER,
  isStreamName,
  type SenderNews,
  STREAMS_PATH,
  type StreamStatus,
  UPLOAD_PATH,
} from "../chunk.ts";
import { type Config, readSecret } from "../config.ts";
import { parseHost } from "../host.ts";
import { fetchWith } from "../runtime.ts";
import { errorMessage, retryDelay } from "../service.ts";

/** Bodies below this many bytes are not worth compressing. */
const COMPRESS_FROM = 1024;
/** Pauses between tries in ms: of what an operator must mend, and of a receiver that is away or busy. */
const REFUSED = { min: 2_000, max: 30_000 };
const AWAY = { min: 500, max: 30_000 };
/** Longest `Retry-After` that is believed, in seconds. */
const MAX_RETRY_AFTER = 300;
/** Of an answer to a chunk, and of one to a question, no more is read. */
const ANSWER_BYTES = 4096;
const STREAMS_BYTES = 64 * 1024 * 1024;
/** A connection that was not used for so long is not used again; a runtime closes those it keeps after so long. */
const IDLE_MS = 5_000;
const FORGOTTEN_MS = 310_000;
/** After a time limit was met the next one is longer, up to so much: the smallest chunk then gets through at 70 bytes a second. */
const LONGEST_LIMIT_MS = 60_000;

export interface EncodedChunk extends ChunkHeaders {
  body: Uint8Array<ArrayBuffer>;
  encoding: Encoding;
}

/**
 * stored: on stable storage up to the chunk's end, `lines` of it · moved: the stream stands elsewhere, with these bytes
 * before it · unknown: the receiver does not know the stream · tooLarge: send less at once · refused: hold the offset and
 * try again after `waitMs`. Only the contract's own 200 is `stored`: whatever else stands at that address holds the chunk.
 */
export type Answer =
  | { kind: "stored"; offset: number; lines: number }
  | { kind: "moved"; offset: number; mark: string | undefined }
  | { kind: "unknown" }
  | { kind: "tooLarge" }
  | { kind: "refused"; waitMs: number; status: number; reason: string; isSlow?: boolean };

/** The one who talks to the receiver. `signal` ends a request in hand. */
export class Uploader {
  readonly #config: Config["shipper"];
  readonly #signal: AbortSignal;
  readonly #base: string;
  readonly #via: string;
  #tls = { ca: "", cert: "", key: "" };
  #fetch: typeof fetch;
  #refusals = 0;
  /** Time limit of a request in ms. */
  #limit: number;
  /** When a connection that is kept was used last: the runtime forgets it after `FORGOTTEN_MS`. */
  #keptAt = Number.NEGATIVE_INFINITY;

  constructor(config: Config["shipper"], signal: AbortSignal) {
    this.#config = config;
    this.#signal = signal;
    this.#base = config.receiver.replace(/\/+$/, "");
    this.#limit = config.timeoutSeconds * 1000;
    this.#via = config.proxy === undefined ? "" : ` through ${config.proxy}`;
    this.#fetch = fetchWith({ proxy: config.proxy });
  }

  /** Sends one chunk, once. Throws only when the signal is aborted. */
  async send(chunk: EncodedChunk): Promise<Answer> {
    const limit = this.#limit;
    const sentAt = performance.now();
    try {
      const headers = {
        ...formatChunkHeaders(chunk),
        "Content-Type": "text/plain",
        ...(chunk.encoding !== "identity" && { "Content-Encoding": chunk.encoding }),
      };
      const response = await this.#request(UPLOAD_PATH, headers, chunk.body);
      const text = await readText(response, ANSWER_BYTES);
      this.#limit = this.#limitOf(2 * (performance.now() - sentAt));
      return this.#answerOf(chunk, response, text);
    } catch (error) {
      if (this.#signal.aborted) throw error;
      const isSlow = (error as Error).name === "TimeoutError";
      // once for all that were on their way together
      if (isSlow) this.#limit = Math.max(this.#limit, this.#limitOf(2 * limit));
      const pace = isCertificateFault(error) ? REFUSED : AWAY;
      return { ...this.#refused(0, `${errorMessage(error)}${this.#via}`, pace), isSlow };
    }
  }

  #answerOf(chunk: EncodedChunk, response: Response, text: string): Answer {
    const { status, headers } = response;
    const offset = parseOffset(response);
    if (status === 200 && offset === chunk.end) {
      this.#refusals = 0;
      release(chunk);
      return { kind: "stored", offset, lines: parseLines(text) };
    }
    if (status === 409 && (offset !== undefined || isOurs(response))) {
      const mark = headers.get(HEADER.mark) ?? undefined;
      return offset === undefined ? { kind: "unknown" } : { kind: "moved", offset, mark };
    }
    if (status === 413) return { kind: "tooLarge" };
    const after = parseRetryAfter(response);
    const reason = response.ok ? `${whoAnswers(response, text)}${this.#via}` : firstWords(text);
    const answer = this.#refused(status, reason, isPassing(status) ? AWAY : REFUSED);
    return after === undefined ? answer : { ...answer, waitMs: after };
  }

  /** What the receiver knows of streams of this host, of all when no names are given. A sign of life, too. */
  async ask(host: string, names: string[] | undefined, news: SenderNews): Promise<StreamStatus[]> {
    const what = `Cannot ask ${this.#base} where the streams stand${this.#via}`;
    const headers = { ...formatNews(news), [HEADER.host]: host, "Content-Type": "application/json" };
    const body = names && JSON.stringify({ streams: names });
    // fetch tells network faults, also in the middle of an answer, as TypeErrors, which elsewhere are bugs
    const unanswered = (error: unknown): never => {
      if (this.#signal.aborted) throw error;
      throw new Unanswered(what, 0, errorMessage(error));
    };
    const response = await this.#request(STREAMS_PATH, headers, body).catch(unanswered);
    const { status } = response;
    const text = await readText(response, status === 200 ? STREAMS_BYTES : ANSWER_BYTES).catch(unanswered);
    const streams = status === 200 ? parseStreams(text, host, names) : undefined;
    if (streams) return streams;
    const hint = status === 404 ? "update the receiver first: it is of version 1.0, or no receiver" : "";
    const own = firstWords(text) + (ADVICE[status] ?? "");
    throw new Unanswered(what, status, hint || (isOurs(response) ? own : whoAnswers(response, text)));
  }

  #request(path: string, headers: Record<string, string>, body?: BodyInit): Promise<Response> {
    const { ca, cert, key, proxy, token: ref } = this.#config;
    const pem = (file: string | undefined) => (file === undefined ? "" : readSecret({ file }));
    const now = { ca: pem(ca), cert: pem(cert), key: pem(key) };
    if (now.ca !== this.#tls.ca || now.cert !== this.#tls.cert || now.key !== this.#tls.key) {
      this.#tls = now; // read again when a file has changed: a new certificate needs no restart
      this.#fetch = fetchWith({ ...now, proxy });
    }
    const token = ref && readSecret(ref);
    const limit = AbortSignal.timeout(this.#limit);
    const send = this.#fetch;
    return send(this.#base + path, {
      method: "POST",
      headers: { ...headers, ...(token && { Authorization: `Bearer ${token}` }) },
      ...(body !== undefined && { body }),
      redirect: "manual",
      keepalive: this.#mayKeep(),
      signal: AbortSignal.any([this.#signal, limit]),
    });
  }

  #limitOf(ms: number): number {
    return Math.max(this.#config.timeoutSeconds * 1000, Math.min(ms, LONGEST_LIMIT_MS));
  }

  /** A connection that was idle is not used again: whatever stands between may have forgotten it. */
  #mayKeep(): boolean {
    const idleMs = performance.now() - this.#keptAt;
    const isFresh = idleMs < IDLE_MS || idleMs > FORGOTTEN_MS;
    if (isFresh) this.#keptAt = performance.now();
    return isFresh;
  }

  /** A fault's pause grows with the number of faults in a row, over all streams. */
  #refused(status: number, reason: string, pace: { min: number; max: number }) {
    this.#refusals++;
    return { kind: "refused" as const, waitMs: retryDelay(this.#refusals, pace), status, reason };
  }
}

export class Unanswered extends Error {
  readonly status: number;
  readonly reason: string;
  constructor(what: string, status: number, reason: string) {
    super(`${what}: ${status > 0 ? `it answered ${status}, ${reason}` : reason}`);
    this.status = status;
    this.reason = reason;
  }
}

/** Every answer of the receiver says so; a 409 of something else at that address does not. */
function isOurs(response: Response): boolean {
  return response.headers.get("Cache-Control") === "no-store";
}

/** What to compare when the receiver refuses this sender. */
const ADVICE: Record<number, string> = {
  401: "; compare shipper.token with receiver.tokens",
  403: "; compare shipper.host and shipper.token with receiver.groups and receiver.tokens",
  421: "; set that port in shipper.receiver",
};

function whoAnswers({ headers }: Response, text: string): string {
  const to = headers.get("Location");
  const words = to ? `, which sends to ${firstWords(to)}` : text && `: ${firstWords(text)}`;
  return `not the receiver's answer, but one of ${headers.get("Server") ?? "a server without a name"}${words}`;
}

function firstWords(text: string): string {
  return text
    .slice(0, 200)
    .replace(/[\x00-\x1f\x7f-\x9f]+/g, " ")
    .trim();
}

async function readText(response: Response, most: number): Promise<string> {
  const reader = response.body?.getReader();
  const blocks: Uint8Array[] = [];
  for (let size = 0; reader && size < most; ) {
    const { value, done } = await reader.read();
    if (done) return Buffer.concat(blocks).toString();
    blocks.push(value);
    size += value.length;
  }
  await reader?.cancel().catch(() => {});
  return Buffer.concat(blocks).subarray(0, most).toString();
}

/** Undefined of what is no answer to the question: of another host, about streams that were not asked for, or twice about one. */
function parseStreams(text: string, host: string, names?: string[]): StreamStatus[] | undefined {
  try {
    const answer = JSON.parse(text) as { host?: unknown; streams?: unknown };
    if (parseHost(String(answer.host)) !== parseHost(host) || !Array.isArray(answer.streams))
      return undefined;
    const asked = names && new Set(names);
    const isStatus = ({ stream, offset }: StreamStatus) =>
      (asked?.has(stream) ?? isStreamName(stream)) && Number.isSafeInteger(offset) && offset >= 0;
    const isOnce = new Set(answer.streams.map(({ stream }) => stream)).size === answer.streams.length;
    return isOnce && answer.streams.every(isStatus) ? answer.streams : undefined;
  } catch {
    return undefined;
  }
}

/**
 * The body as it goes over the wire: a view of what was read, of which fetch() takes a copy as it is called (Fetch
 * standard, "extract a body"), or compressed; small ones are not worth the work. In place, some milliseconds per MiB while the
 * last chunk is in flight: a thread would need memory of its own, and costs more than it saves.
 */
export function encodeBody(
  body: Uint8Array<ArrayBuffer>,
  compression: Config["shipper"]["compression"],
): Pick<EncodedChunk, "body" | "encoding"> {
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
 * Gives the memory of a compressed body that was answered back at once: the collector would let many of them pile up.
 * Small ones may share the runtime's pool with others, and stay.
 */
function release({ body, encoding }: EncodedChunk): void {
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
