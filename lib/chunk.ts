/**
 * The wire contract between shipper and receiver: one POST is one chunk, that is a stream and a range of
 * bytes of its source file. In the spirit of the IETF draft "Resumable Uploads for HTTP": offset in, offset
 * out, 409 on mismatch. Names of headers and their grammar stand here and nowhere else.
 */
import { isIP } from "node:net";

export const UPLOAD_PATH = "/upload";

export const HEADER = {
  host: "Log-Host",
  stream: "Log-Stream",
  offset: "Upload-Offset",
  end: "Upload-End",
  lag: "Log-Lag",
  lost: "Log-Lost",
} as const;

/** The stream that a shipper names in a heartbeat when it has no file with a line yet. */
export const IDLE_STREAM = "heartbeat";

/** How a body may be encoded on the way. */
export type Encoding = "identity" | "gzip" | "zstd";

/** What the headers of one chunk say. Ranges are bytes of the source file, `end` exclusive. */
export interface ChunkHeaders {
  host: string;
  stream: string;
  offset: number;
  end: number;
  /** Bytes that the sender still has to ship after this chunk. */
  lag?: number;
  /** Bytes that vanished before they could be read, counted since the last 200. */
  lost?: number;
}

/** A request that breaks the contract; `status` is the answer. The message is for the sender's log. */
export class WireError extends Error {
  readonly status: number;
  constructor(status: number, message: string) {
    super(message);
    this.status = status;
  }
}

/** The request headers of a chunk. */
export function formatChunkHeaders(chunk: ChunkHeaders): Record<string, string> {
  return {
    [HEADER.host]: chunk.host,
    [HEADER.stream]: chunk.stream,
    [HEADER.offset]: String(chunk.offset),
    [HEADER.end]: String(chunk.end),
    ...(chunk.lag !== undefined && { [HEADER.lag]: String(chunk.lag) }),
    ...(chunk.lost !== undefined && chunk.lost > 0 && { [HEADER.lost]: String(chunk.lost) }),
  };
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
  const lag = parseCount(headers, HEADER.lag);
  const lost = parseCount(headers, HEADER.lost);
  return {
    host,
    stream,
    offset,
    end,
    ...(lag !== undefined && { lag }),
    ...(lost !== undefined && { lost }),
  };
}

/** The two headers that name a stream, as HEAD has them. Throws a WireError (400). */
export function parseStreamHeaders(headers: Headers): { host: string; stream: string } {
  const host = parseHost(headers.get(HEADER.host) ?? "");
  if (host === undefined) throw new WireError(400, `${HEADER.host} is not an IP address or a host name`);
  const stream = headers.get(HEADER.stream) ?? "";
  if (!/^[A-Za-z0-9_-]{8,64}$/.test(stream)) {
    throw new WireError(400, `${HEADER.stream} is not 8 to 64 of A-Z a-z 0-9 _ -`);
  }
  return { host, stream };
}

/**
 * A sender's name in its one spelling (lower case), or undefined when it is none: an IPv4 or IPv6 address
 * (without zone), or a host name by RFC 1123 section 2.1, at most 253 characters of labels of at most 63.
 * `sent` and `failed` are folders of ours and no hosts.
 */
export function parseHost(text: string): string | undefined {
  if (text.length === 0 || text.length > 253) return undefined;
  const host = text.toLowerCase();
  if (isIP(host) !== 0) return host.includes("%") ? undefined : host;
  if (host === "sent" || host === "failed") return undefined;
  const labels = host.split(".");
  if (!labels.every((label) => /^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$/.test(label))) return undefined;
  return /^\d+$/.test(labels.at(-1) ?? "") ? undefined : host; // 10.10.21.999 is a wrong address, not a name
}

/** A header of decimal digits up to 2^53 - 1, or undefined when it is absent. Throws a WireError (400). */
function parseCount(headers: Headers, name: string): number | undefined {
  const text = headers.get(name);
  if (text === null) return undefined;
  const value = /^\d{1,16}$/.test(text) ? Number(text) : Number.NaN;
  if (!Number.isSafeInteger(value)) throw new WireError(400, `${name} is not a whole number of bytes`);
  return value;
}
