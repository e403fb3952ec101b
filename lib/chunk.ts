/**
 * The wire contract between shipper and receiver: one POST is one chunk, that is a stream and a range of
 * bytes of its source file. In the spirit of the IETF draft "Resumable Uploads for HTTP": offset in, offset
 * out, 409 on mismatch. Names of headers, their grammar, and the question where streams stand are here and
 * nowhere else.
 */
import { createHash } from "node:crypto";
import { parseHost } from "./host.ts";
import { formatLocalTime, formatZone, localZone } from "./service.ts";

const AGENT_BYTES = 64;

export const UPLOAD_PATH = "/upload";
export const STREAMS_PATH = "/streams";

export const HEADER = {
  host: "Log-Host",
  stream: "Log-Stream",
  begin: "Log-Begin",
  offset: "Upload-Offset",
  end: "Upload-End",
  mark: "Log-Mark",
  from: "Log-From",
  head: "Log-Head",
  skipped: "Log-Skipped",
  lag: "Log-Lag",
  through: "Log-Through",
  shipper: "Log-Shipper",
  lost: "Log-Lost",
  agent: "Log-Agent",
} as const;

export type Encoding = "identity" | "gzip" | "zstd";

/** What a sender tells of itself with every request; all of it is optional. */
export interface SenderNews {
  lag?: number | undefined;
  /** Every line that was in any followed file at this time of the sender's clock (ms since the epoch) is answered. */
  through?: number | undefined;
  shipper?: string | undefined;
  /** Bytes that vanished before they could be read: total of this `shipper`; of version 1.0 since its last 200. */
  lost?: number | undefined;
  agent?: string | undefined;
}

/** What the headers of one chunk say. Ranges are bytes of the source file, `end` exclusive. */
export interface ChunkHeaders extends SenderNews {
  host: string;
  stream: string;
  /** The stream's first chunk: `new`, or `again` for one that ships again what the receiver has lost. */
  begin?: "new" | "again" | undefined;
  offset: number;
  end: number;
  /** Of the bytes just before `end`; absent for a sender of version 1.0. */
  mark?: string | undefined;
  /** Of the bytes just before `offset`; absent at offset 0. */
  from?: string | undefined;
  head?: string | undefined;
  skipped?: number | undefined;
}

/** What a receiver knows of one stream, as `POST /streams` tells it. */
export interface StreamStatus {
  stream: string;
  offset: number;
  head?: string | undefined;
  mark?: string | undefined;
  /** Every line before it lies in a batch that was moved to sent/; absent when that cannot be told. */
  delivered?: number | undefined;
}

/** A request that breaks the contract, answered with `status`. The message is for the sender's log, the reason, one of few, for the receiver's. */
export class WireError extends Error {
  readonly status: number;
  readonly reason: string;
  constructor(status: number, message: string, reason = REASONS[status] ?? "refused") {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

const REASONS: Record<number, string> = {
  400: "malformed request",
  413: "too long",
  415: "unknown type or encoding",
};

/** Longest run of bytes that a mark or a head speaks of; from so many on it is proof. */
export const MARK_BYTES = 1024;

/** A mark of the given bytes (their last or first `MARK_BYTES`, chosen by the caller): `<length>:<hash>`. */
export function formatMark(bytes: Uint8Array): string {
  const hash = createHash("sha256").update(bytes).digest("base64url").slice(0, 22);
  return `${bytes.length}:${hash}`;
}

/** How many bytes a mark speaks of, or undefined when it is none. */
export function parseMarkLength(mark: string): number | undefined {
  const match = /^(0|[1-9]\d{0,3}):[A-Za-z0-9_-]{22}$/.exec(mark);
  const length = Number(match?.[1]);
  return match && length <= MARK_BYTES ? length : undefined;
}

export function formatChunkHeaders(chunk: ChunkHeaders): Record<string, string> {
  return {
    ...formatNews(chunk),
    ...formatHeaders({
      host: chunk.host,
      stream: chunk.stream,
      begin: chunk.begin && (chunk.begin === "new" ? "1" : "again"),
      offset: chunk.offset,
      end: chunk.end,
      mark: chunk.mark,
      from: chunk.from,
      head: chunk.head,
      skipped: chunk.skipped || undefined,
    }),
  };
}

export function formatNews({ lag, through, shipper, lost, agent }: SenderNews): Record<string, string> {
  // ISO 8601 with the offset of this machine's zone, whole seconds: 2026-11-28T14:03:09+01:00
  const time = (ms: number) => `${formatLocalTime(ms).replace(" ", "T")}${formatZone(localZone(ms))}`;
  const told = through === undefined ? undefined : time(through);
  return formatHeaders({ lag, through: told, shipper, lost: lost || undefined, agent });
}

function formatHeaders(values: Partial<Record<keyof typeof HEADER, string | number | undefined>>) {
  const present = Object.entries(values).filter(([, value]) => value !== undefined);
  return Object.fromEntries(
    present.map(([name, value]) => [HEADER[name as keyof typeof HEADER], String(value)]),
  );
}

/** Reads and checks the headers of a chunk. Throws a WireError (400) that says which and what was expected. */
export function parseChunkHeaders(headers: Headers): ChunkHeaders {
  const { host, stream } = parseStreamHeaders(headers);
  const offset = parseCount(headers, HEADER.offset);
  const end = parseCount(headers, HEADER.end);
  if (offset === undefined || end === undefined) {
    throw new WireError(400, `${HEADER.offset} and ${HEADER.end} are required`);
  }
  if (end < offset) throw new WireError(400, `${HEADER.end} is ${end}, before ${HEADER.offset} ${offset}`);
  const begin = headers.get(HEADER.begin);
  if (begin !== null && begin !== "1" && begin !== "again") {
    throw new WireError(400, `${HEADER.begin} is neither 1 nor again`);
  }
  return {
    ...parseNews(headers),
    host,
    stream,
    offset,
    end,
    begin: begin === null ? undefined : begin === "1" ? "new" : "again",
    mark: parseMark(headers, HEADER.mark),
    from: parseMark(headers, HEADER.from),
    head: parseMark(headers, HEADER.head),
    skipped: parseCount(headers, HEADER.skipped),
  };
}

export function parseNews(headers: Headers): SenderNews {
  const lag = parseCount(headers, HEADER.lag);
  const lost = parseCount(headers, HEADER.lost);
  const shipper = headers.get(HEADER.shipper) ?? undefined;
  if (shipper !== undefined && !/^[A-Za-z0-9_-]{16,64}$/.test(shipper)) {
    throw new WireError(400, `${HEADER.shipper} is not 16 to 64 of A-Z a-z 0-9 _ -`);
  }
  const through = parseThrough(headers.get(HEADER.through));
  const agent = headers.get(HEADER.agent)?.replace(/[^\x20-\x7e]/g, "?");
  return { lag, lost, shipper, through, agent: agent?.slice(0, AGENT_BYTES) || undefined };
}

/** What a sender's program is, and what it says of itself in comments behind its name (RFC 9110 section 5.6.5). */
export interface Agent {
  name: string;
  /** A path of `files` has matched nothing for a while. */
  lacksLog: boolean;
  /** The file of which bytes were lost last, without its folder. */
  lostIn?: string | undefined;
}

/** As it stands in `Log-Agent`, which the receiver keeps 64 bytes of. */
export function formatAgent({ name, lacksLog, lostIn }: Agent): string {
  const file = lostIn?.replace(/[^\x21-\x7e]|[()\\]/g, "?");
  const agent = `${name}${lacksLog ? " (no log)" : ""}`;
  return file === undefined ? agent : `${agent} (lost ${file.slice(0, AGENT_BYTES - agent.length - 8)})`;
}

export function parseAgent(text: string): Agent {
  const [name = "", ...comments] = text.split(/ (?=\()/);
  const lostIn = comments.flatMap((comment) => /^\(lost (.+)\)$/.exec(comment)?.[1] ?? [])[0];
  return { name, lacksLog: comments.includes("(no log)"), lostIn };
}

function parseThrough(text: string | null): number | undefined {
  if (text === null) return undefined;
  const isTime = /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)$/.test(text);
  const ms = isTime ? Date.parse(text) : Number.NaN;
  if (Number.isNaN(ms)) throw new WireError(400, `${HEADER.through} is no ISO 8601 time with an offset`);
  return ms;
}

/** The two headers that name a stream. Throws a WireError (400). */
export function parseStreamHeaders(headers: Headers): { host: string; stream: string } {
  const stream = headers.get(HEADER.stream) ?? "";
  const host = parseHostHeader(headers);
  if (!isStreamName(stream)) throw new WireError(400, `${HEADER.stream} is not 8 to 64 of A-Z a-z 0-9 _ -`);
  return { host, stream };
}

/** The sender's name in its one spelling. Throws a WireError (400). */
export function parseHostHeader(headers: Headers): string {
  const host = parseHost(headers.get(HEADER.host) ?? "");
  if (host === undefined) throw new WireError(400, `${HEADER.host} is not an IP address or a host name`);
  return host;
}

export function isStreamName(text: string): boolean {
  return /^[A-Za-z0-9_-]{8,64}$/.test(text);
}

function parseMark(headers: Headers, name: string): string | undefined {
  const mark = headers.get(name);
  if (mark === null) return undefined;
  if (parseMarkLength(mark) === undefined) {
    throw new WireError(400, `${name} is not <length>:<hash> of at most ${MARK_BYTES} bytes`);
  }
  return mark;
}

/** A header of decimal digits up to 2^53 - 1, or undefined when it is absent. Throws a WireError (400). */
function parseCount(headers: Headers, name: string): number | undefined {
  const text = headers.get(name);
  if (text === null) return undefined;
  const value = /^\d{1,16}$/.test(text) ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(value)) throw new WireError(400, `${name} is not a whole number`);
  return value;
}
