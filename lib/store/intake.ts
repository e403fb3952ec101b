/**
 * The body of a request within limits. What arrives is counted as it comes, alone, with all of its sender and with all
 * others; what would come out of decompression is bounded before it is made.
 */
import { promisify } from "node:util";
import {
  constants,
  createGunzip,
  gunzipSync,
  type ZstdOptions,
  zstdDecompress,
  zstdDecompressSync,
} from "node:zlib";
import { WireError } from "../chunk.ts";
import type { Config } from "../config.ts";
import { errorMessage } from "../service.ts";
import { printable } from "./access.ts";

/** A body by this rate on average gets in; one that is slower is cut off after `idleTimeoutSeconds`. */
const MIN_RATE = 512;
/** A body of the usual chunk size, 1 MiB: decoded in place, larger ones in the pool. */
const USUAL_BYTES = 1_114_112;
const SMALL_BYTES = 65_536;
/** zstd windows up to 16 MiB, more than its highest common level uses: a frame may ask for far more memory. */
const ZSTD_PARAMS = { [constants.ZSTD_d_windowLogMax]: 24 };
/** Room behind the content, so that its end is seen without a second block. */
const SLACK_BYTES = 64;

export type IntakeLimits = Pick<
  Config["receiver"],
  "maxBodyBytes" | "maxBytesInFlight" | "maxRequests" | "idleTimeoutSeconds"
>;

/** A body as lines, and as it came when that was another form. */
interface Body {
  body: Uint8Array;
  encoded?: { encoding: "gzip" | "zstd"; bytes: Uint8Array };
}

interface Share {
  reading: number;
  requests: number;
  bytes: number;
}

/** Reads bodies within limits: one sender has a quarter at most, and a place only when its body is there. */
export class Intake {
  limits: IntakeLimits;
  /** Of all senders: requests whose body is there, and bytes. */
  requests = 0;
  bytes = 0;
  readonly #shares = new Map<string, Share>();
  #largeOnes: Promise<unknown> = Promise.resolve();

  constructor(limits: IntakeLimits) {
    this.limits = limits;
  }

  /** Reads and decodes a body and hands it to `work`; it counts as in hand until that is done. */
  async take<T>(sender: string, request: Request, work: (body: Body) => Promise<T>): Promise<T> {
    const { maxBodyBytes, maxRequests } = this.limits;
    const share = this.#shares.get(sender) ?? { reading: 0, requests: 0, bytes: 0 };
    if (Number(request.headers.get("Content-Length") ?? 0) > maxBodyBytes) throw tooLong(maxBodyBytes);
    if (share.reading >= Math.max(1, maxRequests / 4))
      throw busy("requests of this sender wait for their bodies");
    this.#shares.set(sender, share);
    let held = 0;
    const hold = (bytes: number) => {
      held += bytes;
      share.bytes += bytes;
      this.bytes += bytes;
      if (this.bytes > this.limits.maxBytesInFlight) throw busy("bytes at once");
      if (share.bytes > this.limits.maxBytesInFlight / 4 && share.bytes > held)
        throw busy("bytes of this sender at once");
    };
    let isPlaced = false;
    share.reading++;
    try {
      const raw = await this.#read(request, hold).finally(() => share.reading--);
      if (this.requests >= maxRequests) throw busy("requests at once");
      if (share.requests >= Math.max(1, maxRequests / 4)) throw busy("requests of this sender at once");
      isPlaced = true;
      this.requests++;
      share.requests++;
      return await work(await this.#decode(raw, request.headers.get("Content-Encoding"), hold));
    } finally {
      if (isPlaced) {
        this.requests--;
        share.requests--;
      }
      this.bytes -= held;
      share.bytes -= held;
      if (share.reading + share.requests === 0) this.#shares.delete(sender);
    }
  }

  /** Counted as it comes. One of a usual, known length is read by the runtime at half the cost, and counts from its beginning. */
  async #read(request: Request, hold: (bytes: number) => void): Promise<Uint8Array> {
    const { maxBytesInFlight } = this.limits;
    const announced = Number(request.headers.get("Content-Length") ?? Number.NaN);
    const late = Promise.withResolvers<never>();
    const mostMs = (this.limits.idleTimeoutSeconds + (announced || 0) / MIN_RATE) * 1000;
    const timer = setTimeout(() => late.reject(tooSlow()), mostMs);
    const inTime = <T>(work: Promise<T>) =>
      Promise.race([
        work.catch((error) => {
          throw new WireError(400, `body ended early: ${printable(errorMessage(error))}`);
        }),
        late.promise,
      ]);
    late.promise.catch(() => {});
    try {
      if (announced <= USUAL_BYTES && this.bytes + announced <= maxBytesInFlight / 2) {
        hold(announced);
        return new Uint8Array(await inTime(request.arrayBuffer()));
      }
      return await this.#readPieces(request, inTime, hold);
    } finally {
      clearTimeout(timer);
    }
  }

  async #readPieces(
    request: Request,
    inTime: <T>(work: Promise<T>) => Promise<T>,
    hold: (bytes: number) => void,
  ): Promise<Uint8Array> {
    const { maxBodyBytes, idleTimeoutSeconds } = this.limits;
    const started = performance.now();
    const reader = request.body?.getReader();
    let body = new Uint8Array(SMALL_BYTES);
    let length = 0;
    while (reader) {
      const { value, done } = await inTime(reader.read());
      if (done) break;
      if (length + value.length > maxBodyBytes) throw tooLong(maxBodyBytes);
      hold(value.length);
      if (length + value.length > body.length) {
        const larger = new Uint8Array(Math.max(2 * body.length, length + value.length));
        larger.set(body.subarray(0, length));
        release(body);
        body = larger;
      }
      body.set(value, length);
      length += value.length;
      const seconds = (performance.now() - started) / 1000;
      if (seconds > idleTimeoutSeconds && length < (seconds - idleTimeoutSeconds) * MIN_RATE) throw tooSlow();
    }
    return body.subarray(0, length);
  }

  /** What is in a body. Throws a WireError: 415 for an unknown encoding, 413 when too much would come out, else 400. */
  async #decode(raw: Uint8Array, header: string | null, hold: (bytes: number) => void): Promise<Body> {
    const { maxBodyBytes } = this.limits;
    const encoding = header?.toLowerCase() ?? "identity"; // in any case: RFC 9110 section 8.4.1
    if (encoding === "identity") return { body: raw };
    if (encoding !== "gzip" && encoding !== "zstd") {
      const shown = JSON.stringify(printable(encoding).slice(0, 60));
      throw new WireError(415, `Content-Encoding ${shown} is not known; expected gzip or zstd`);
    }
    if (raw.length === 0) return { body: raw };
    const told = encoding === "zstd" ? contentOfZstd(raw) : undefined;
    if (told !== undefined && told > maxBodyBytes) throw tooLong(maxBodyBytes);
    const body = await this.#unpack(raw, encoding, told).catch((error) => {
      if (error instanceof WireError) throw error;
      if ((error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE") throw tooLong(maxBodyBytes);
      throw new WireError(400, `body is no ${encoding}, or cut short: ${printable(errorMessage(error))}`);
    });
    if (told !== undefined && body.length !== told)
      throw new WireError(400, `body says of itself ${told} bytes, and has ${body.length}`);
    hold(body.length);
    return { body, encoded: { encoding, bytes: raw } };
  }

  /** In place when it is of the usual size; what is larger goes to the pool, one at a time: a few bombs are one bomb. */
  async #unpack(raw: Uint8Array, encoding: "gzip" | "zstd", told = 8 * raw.length): Promise<Uint8Array> {
    const { maxBodyBytes } = this.limits;
    const most = Math.min(maxBodyBytes, USUAL_BYTES);
    const isZstd = encoding === "zstd";
    if (told <= most || !isZstd) {
      const chunkSize = Math.min(USUAL_BYTES, Math.max(1024, told + SLACK_BYTES));
      const options = { maxOutputLength: most, chunkSize };
      try {
        return isZstd
          ? zstdDecompressSync(raw, { ...options, params: ZSTD_PARAMS })
          : gunzipSync(raw, options);
      } catch (error) {
        const isLarge = (error as NodeJS.ErrnoException).code === "ERR_BUFFER_TOO_LARGE";
        if (!isLarge || isZstd || most === maxBodyBytes) throw error;
      }
    }
    const options = { maxOutputLength: maxBodyBytes, chunkSize: told + SLACK_BYTES, params: ZSTD_PARAMS };
    const turn = this.#largeOnes.then(() =>
      isZstd ? unpackZstd(raw, options) : unpackGzip(raw, maxBodyBytes),
    );
    this.#largeOnes = turn.catch(() => {});
    return turn;
  }
}

/** Block by block: a bomb is given up at the limit, and its blocks are given back at once. */
async function unpackGzip(raw: Uint8Array, most: number): Promise<Uint8Array> {
  const stream = createGunzip({ chunkSize: 4 * SMALL_BYTES });
  const blocks: Uint8Array[] = [];
  let length = 0;
  stream.end(raw);
  try {
    for await (const block of stream as AsyncIterable<Uint8Array>) {
      blocks.push(block);
      length += block.length;
      if (length > most) throw tooLong(most);
    }
    return Buffer.concat(blocks, length);
  } finally {
    stream.destroy();
    for (const block of blocks) if (block.length === block.buffer.byteLength) release(block);
  }
}

const unpackZstd = promisify(zstdDecompress) as (
  raw: Uint8Array,
  options: ZstdOptions,
) => Promise<Uint8Array>;

function busy(what: string): WireError {
  return new WireError(503, `too many ${what}`, `too many ${what}`);
}

function tooSlow(): WireError {
  return new WireError(408, "body is too slow", "slow body");
}

function tooLong(maxBytes: number): WireError {
  return new WireError(413, `body is longer than ${maxBytes} bytes, before or after decompression`);
}

/** Gives the memory of a body back at once, when nobody needs it any more: the collector would let tens of megabytes of it pile up. */
export function release({ buffer }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer) buffer.transfer(0);
}

/**
 * The length of what is in whole zstd frames, by RFC 8878 section 3.1. The decompressors of the runtimes give what they
 * have of a frame that was cut short, without an error. Throws a WireError (400) for that, for bytes that are something
 * else, and for a frame that does not tell.
 */
function contentOfZstd(bytes: Uint8Array): number {
  const wrong = new WireError(400, "body is no zstd, or cut short");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let content = 0;
  let at = 0;
  while (at + 8 <= bytes.length) {
    const magic = view.getUint32(at, true);
    if (magic >= 0x184d2a50 && magic <= 0x184d2a5f) {
      at += 8 + view.getUint32(at + 4, true); // a skippable frame
      continue;
    }
    if (magic !== 0xfd2fb528) throw wrong;
    const descriptor = bytes[at + 4] as number;
    const isSingle = (descriptor & 0x20) !== 0;
    const sizeFlag = descriptor >> 6;
    at += 5 + (isSingle ? 0 : 1) + ([0, 1, 2, 4][descriptor & 3] as number);
    const sizeBytes = sizeFlag === 0 ? (isSingle ? 1 : 0) : 1 << sizeFlag;
    if (sizeBytes === 0) throw new WireError(400, "a zstd frame must tell the length of its content");
    if (at + sizeBytes > bytes.length) throw wrong;
    content += readSize(view, at, sizeBytes);
    at += sizeBytes;
    for (let isLast = false; !isLast; ) {
      if (at + 3 > bytes.length) throw wrong;
      const block =
        (bytes[at] as number) | ((bytes[at + 1] as number) << 8) | ((bytes[at + 2] as number) << 16);
      isLast = (block & 1) === 1;
      const isRun = ((block >> 1) & 3) === 1;
      at += 3 + (isRun ? 1 : block >> 3);
    }
    if ((descriptor & 4) !== 0) at += 4;
  }
  if (at !== bytes.length) throw wrong;
  return content;
}

/** The size of a frame's content (section 3.1.1.1.4) in 1, 2, 4 or 8 bytes. */
function readSize(view: DataView, at: number, sizeBytes: number): number {
  if (sizeBytes === 1) return view.getUint8(at);
  if (sizeBytes === 2) return view.getUint16(at, true) + 256;
  return sizeBytes === 4 ? view.getUint32(at, true) : Number(view.getBigUint64(at, true));
}
