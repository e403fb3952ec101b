/**
 * The body of a request, decoded, within limits: what arrives and what comes out of decompression are counted
 * as they come, so a small body that would become a huge one is refused before it is in memory.
 */
import { createGunzip, createZstdDecompress } from "node:zlib";
import { type Encoding, WireError } from "./chunk.ts";

export async function readBody(request: Request, { maxBytes }: { maxBytes: number }): Promise<Uint8Array> {
  const encoding = request.headers.get("Content-Encoding") ?? "identity";
  const parts: Uint8Array[] = [];
  let length = 0;
  for await (const part of (request.body ?? []) as AsyncIterable<Uint8Array>) {
    length += part.length;
    if (length > maxBytes) throw new WireError(413, `body is longer than ${maxBytes} bytes`);
    parts.push(part);
  }
  const raw = parts.length === 1 ? (parts[0] as Uint8Array) : Buffer.concat(parts);
  return encoding === "identity" ? raw : decode(raw, encoding as Encoding, maxBytes);
}

function decode(body: Uint8Array, encoding: Encoding, maxBytes: number): Promise<Uint8Array> {
  const stream = encoding === "gzip" ? createGunzip() : createZstdDecompress();
  return new Promise((resolve, reject) => {
    const parts: Uint8Array[] = [];
    let length = 0;
    stream.on("data", (part: Uint8Array) => {
      length += part.length;
      if (length > maxBytes) {
        stream.destroy();
        reject(new WireError(413, `body is longer than ${maxBytes} bytes when decompressed`));
      } else parts.push(part);
    });
    stream.on("end", () => resolve(Buffer.concat(parts)));
    stream.on("error", () => reject(new WireError(400, `body is no ${encoding}`)));
    stream.end(body);
  });
}
