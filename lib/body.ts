/**
 * The body of a request within limits. What arrives is counted as it comes, alone and together with all other
 * bodies in hand, so that neither one huge body nor many senders can take more memory than the config allows;
 * what comes out of decompression is counted before it is kept.
 */
import { constants, createGunzip, createZstdDecompress, gunzipSync, zstdDecompressSync } from "node:zlib";
import { WireError } from "./chunk.ts";

export interface IntakeLimits {
  /** Of one body, before and after decompression. */
  maxBodyBytes: number;
  /** Of all bodies in hand. */
  maxBytesInFlight: number;
  maxRequests: number;
  /** After so long a body must have come at a rate of `MIN_RATE` bytes per second on average. */
  idleTimeoutSeconds: number;
}

const MIN_RATE = 1024;
/** Where the memory for a body without a length begins, and from when on that of a decoded one is its own. */
const SMALL_BYTES = 65_536;
/** A body of the usual chunk size: 1 MiB, and room to see the end of a decoded one. */
const USUAL_BYTES = 1_114_112;
/** zstd windows up to 16 MiB, more than its highest common level uses: a frame may ask for far more memory. */
const ZSTD_WINDOW_LOG = 24;

export type Intake = ReturnType<typeof createIntake>;

/** Takes bodies in; `requests` and `bytes` tell how much is in hand. */
export function createIntake(limits: IntakeLimits) {
  let largeOnes: Promise<unknown> = Promise.resolve();
  /** Bodies that are large when decoded take turns, so that a few bombs at once are not many times the limit. */
  const inTurn: InTurn = (work) => {
    const result = largeOnes.then(work);
    largeOnes = result.catch(() => {});
    return result;
  };
  const intake = {
    requests: 0,
    bytes: 0,

    /** Reads and decodes a body and hands it to `work`; it counts as in hand until `work` is done. */
    async take<T>(request: Request, work: (body: Uint8Array) => Promise<T>): Promise<T> {
      if (intake.requests >= limits.maxRequests) throw new WireError(503, "too many requests at once");
      const held = { bytes: 0 };
      const hold = (bytes: number) => {
        held.bytes += bytes;
        intake.bytes += bytes;
        if (intake.bytes > limits.maxBytesInFlight) throw new WireError(503, "too many bytes at once");
      };
      const announced = Number(request.headers.get("Content-Length") ?? Number.NaN);
      if (announced > limits.maxBodyBytes) throw tooLong(limits.maxBodyBytes);
      // What is announced and comes slowly may hold the half of what fits; of all others only what has come counts.
      const isUsual = announced <= USUAL_BYTES && intake.bytes + announced <= limits.maxBytesInFlight / 2;
      intake.requests++;
      try {
        if (isUsual) hold(announced);
        const raw = isUsual
          ? await readWhole(request, announced, limits)
          : await readPieces(request, limits, hold);
        const encoding = request.headers.get("Content-Encoding");
        const body = await decode(raw, encoding, limits.maxBodyBytes, { hold, inTurn });
        try {
          return await work(body);
        } finally {
          releaseAll(raw);
          if (body !== raw && body.length > SMALL_BYTES) releaseAll(body); // a block of its own
        }
      } finally {
        intake.requests--;
        intake.bytes -= held.bytes;
      }
    },
  };
  return intake;
}

type InTurn = (work: () => Promise<Uint8Array>) => Promise<Uint8Array>;

/** A body of a known length, read by the runtime: costs half of what reading its pieces does. */
async function readWhole(
  request: Request,
  length: number,
  { idleTimeoutSeconds }: IntakeLimits,
): Promise<Uint8Array> {
  const late = Promise.withResolvers<never>();
  const mostMs = Math.max(idleTimeoutSeconds, length / MIN_RATE) * 1000;
  const timer = setTimeout(() => late.reject(tooSlow()), mostMs);
  try {
    const whole = request.arrayBuffer().catch((error) => {
      throw endedEarly(error);
    });
    return new Uint8Array(await Promise.race([whole, late.promise]));
  } finally {
    clearTimeout(timer);
  }
}

/** A body that is large or of unknown length: counted as it comes. */
async function readPieces(
  request: Request,
  { maxBodyBytes, idleTimeoutSeconds }: IntakeLimits,
  hold: (bytes: number) => void,
): Promise<Uint8Array> {
  let body = new Uint8Array(SMALL_BYTES);
  let length = 0;
  const started = performance.now();
  const reader = request.body?.getReader();
  while (reader) {
    const { value, done } = await reader.read().catch((error) => {
      throw endedEarly(error);
    });
    if (done) break;
    if (length + value.length > maxBodyBytes) throw tooLong(maxBodyBytes);
    hold(value.length);
    if (length + value.length > body.length) {
      const larger = new Uint8Array(Math.max(2 * body.length, length + value.length));
      larger.set(body.subarray(0, length));
      releaseAll(body);
      body = larger;
    }
    body.set(value, length);
    length += value.length;
    release(value);
    const seconds = (performance.now() - started) / 1000;
    if (seconds > idleTimeoutSeconds && length < seconds * MIN_RATE) throw tooSlow();
  }
  return body.subarray(0, length);
}

function endedEarly(error: Error): WireError {
  return new WireError(400, `body ended early: ${error.message}`);
}

function tooSlow(): WireError {
  return new WireError(408, "body is too slow");
}

/** Gives memory back at once: the collector would let tens of megabytes of it pile up. */
function release(part: Uint8Array): void {
  if (part.length === part.buffer.byteLength) releaseAll(part); // else others may look into the same memory
}

function releaseAll({ buffer }: Uint8Array): void {
  if (buffer instanceof ArrayBuffer) buffer.transfer(0);
}

/**
 * What is in a body; `hold` counts it. Throws a WireError: 415 for an unknown encoding, 413 when too much comes
 * out, 400 for a body that is none.
 */
async function decode(
  raw: Uint8Array,
  encoding: string | null,
  maxBytes: number,
  { hold, inTurn }: { hold: (bytes: number) => void; inTurn: InTurn },
): Promise<Uint8Array> {
  if (encoding === null || encoding === "identity") return raw;
  if (encoding !== "gzip" && encoding !== "zstd") {
    throw new WireError(415, `Content-Encoding ${encoding} is not known; expected gzip or zstd`);
  }
  if (raw.length === 0) return raw;
  const told = encoding === "zstd" ? contentOfZstd(raw) : undefined;
  if (told === -1) throw new WireError(400, "body is no zstd, or cut short");
  const fault = (error: unknown) =>
    error instanceof WireError
      ? error
      : new WireError(400, `body is no ${encoding}, or cut short: ${(error as Error).message}`);
  try {
    const body = decodeUsual(raw, encoding, maxBytes, told);
    hold(body.length);
    return body;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ERR_BUFFER_TOO_LARGE") throw fault(error);
  }
  if (maxBytes <= USUAL_BYTES) throw tooLong(maxBytes);
  return inTurn(() => decodeLarge(raw, encoding, maxBytes, hold)).catch((error) => {
    throw fault(error);
  });
}

const ZSTD_PARAMS = { [constants.ZSTD_d_windowLogMax]: ZSTD_WINDOW_LOG };

/** Room behind the content, so that its end is seen without a second block. */
const SLACK_BYTES = 64;

/** At once, into one block that the whole body fits in, so that it is not copied again; `told` is its length. */
function decodeUsual(
  raw: Uint8Array,
  encoding: "gzip" | "zstd",
  maxBytes: number,
  told = 8 * raw.length, // logs shrink to about an eighth
): Uint8Array {
  const chunkSize = Math.min(USUAL_BYTES, Math.max(SMALL_BYTES, told + SLACK_BYTES));
  const options = { maxOutputLength: Math.min(maxBytes, USUAL_BYTES), chunkSize };
  if (encoding === "gzip") return gunzipSync(raw, options);
  return zstdDecompressSync(raw, { ...options, params: ZSTD_PARAMS });
}

/** Block by block: a bomb is given up at the limit, and its blocks are given back at once. */
async function decodeLarge(
  raw: Uint8Array,
  encoding: "gzip" | "zstd",
  maxBytes: number,
  hold: (bytes: number) => void,
): Promise<Uint8Array> {
  const chunkSize = 4 * SMALL_BYTES;
  const stream =
    encoding === "gzip"
      ? createGunzip({ chunkSize })
      : createZstdDecompress({ chunkSize, params: ZSTD_PARAMS });
  const blocks: Uint8Array[] = [];
  let length = 0;
  stream.end(raw);
  try {
    for await (const block of stream as AsyncIterable<Uint8Array>) {
      blocks.push(block);
      length += block.length;
      if (length > maxBytes) throw tooLong(maxBytes);
      hold(block.length);
    }
    return Buffer.concat(blocks, length);
  } finally {
    stream.destroy();
    for (const block of blocks) release(block);
  }
}

function tooLong(maxBytes: number): WireError {
  return new WireError(413, `body is longer than ${maxBytes} bytes, before or after decompression`);
}

/**
 * The length of what is in whole zstd frames, by RFC 8878 section 3.1; -1 for bytes that are something else, undefined
 * when a frame does not tell. The decompressors of the runtimes give what they have of a frame that was cut short,
 * without an error.
 */
function contentOfZstd(bytes: Uint8Array): number | undefined {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let content: number | undefined = 0;
  let at = 0;
  while (at + 8 <= bytes.length) {
    const magic = view.getUint32(at, true);
    if (magic >= 0x184d2a50 && magic <= 0x184d2a5f) {
      at += 8 + view.getUint32(at + 4, true); // a skippable frame
      continue;
    }
    if (magic !== 0xfd2fb528) return -1;
    const descriptor = bytes[at + 4] as number;
    const isSingle = (descriptor & 0x20) !== 0;
    const sizeFlag = descriptor >> 6;
    at += 5 + (isSingle ? 0 : 1) + ([0, 1, 2, 4][descriptor & 3] as number);
    const sizeBytes = sizeFlag === 0 ? (isSingle ? 1 : 0) : 1 << sizeFlag;
    if (at + sizeBytes > bytes.length) return -1;
    const size = readSize(view, at, sizeBytes);
    content = size === undefined || content === undefined ? undefined : content + size;
    at += sizeBytes;
    for (let isLast = false; !isLast; ) {
      if (at + 3 > bytes.length) return -1;
      const block =
        (bytes[at] as number) | ((bytes[at + 1] as number) << 8) | ((bytes[at + 2] as number) << 16);
      isLast = (block & 1) === 1;
      const isRun = ((block >> 1) & 3) === 1;
      at += 3 + (isRun ? 1 : block >> 3);
    }
    if ((descriptor & 4) !== 0) at += 4;
  }
  return at === bytes.length ? content : -1;
}

/** The size of a frame's content (section 3.1.1.1.4) in 1, 2, 4 or 8 bytes; undefined when the frame has none. */
function readSize(view: DataView, at: number, sizeBytes: number): number | undefined {
  if (sizeBytes === 0) return undefined;
  if (sizeBytes === 1) return view.getUint8(at);
  if (sizeBytes === 2) return view.getUint16(at, true) + 256;
  return sizeBytes === 4 ? view.getUint32(at, true) : Number(view.getBigUint64(at, true));
}
