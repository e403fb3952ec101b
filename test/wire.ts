/** The receiver's side of the wire in memory: what DESIGN's contract answers, for tests of the shipper. */
import { type ChunkHeaders, HEADER, type SenderNews, type StreamStatus, UPLOAD_PATH } from "../lib/chunk.ts";

export class Wire {
  readonly streams = new Map<string, StreamStatus>();
  readonly #lost = new Map<string, number>();

  /** Bytes lost, as all shippers have told. */
  get lost(): number {
    return [...this.#lost.values()].reduce((sum, bytes) => sum + bytes, 0);
  }

  hear({ shipper = "", lost = 0 }: SenderNews): void {
    this.#lost.set(shipper, Math.max(lost, this.#lost.get(shipper) ?? 0));
  }

  /** What a chunk is answered; `store` is called when it is taken. */
  take(chunk: ChunkHeaders, lines: number, store: () => void): Response {
    const { stream, offset, end, mark, from, begin, head } = chunk;
    const known = this.streams.get(stream);
    if (!known && !begin) return answer(409, "not known", {});
    const isOther = known && (known.offset !== offset || (offset > 0 && known.mark !== from));
    if (isOther) return answer(409, "elsewhere", placeOf(known));
    this.hear(chunk);
    this.streams.set(stream, { stream, offset: end, mark, head: head ?? known?.head, delivered: end });
    store();
    return answer(200, JSON.stringify({ lines, offset: end }), { [HEADER.offset]: String(end) });
  }

  /** Where the streams stand that a question names. */
  async tell(request: Request): Promise<Response> {
    const body = await request.text();
    const names =
      body === "" ? [...this.streams.keys()] : (JSON.parse(body) as { streams: string[] }).streams;
    const streams = names.map((name) => this.streams.get(name)).filter((status) => status !== undefined);
    return answer(200, JSON.stringify({ host: request.headers.get(HEADER.host), streams }), {});
  }
}

/** Whether a request is a chunk; else it is the question where streams stand. */
export function isChunk(request: Request): boolean {
  return new URL(request.url).pathname === UPLOAD_PATH;
}

function placeOf({ offset, mark }: StreamStatus): Record<string, string> {
  return { [HEADER.offset]: String(offset), ...(mark && { [HEADER.mark]: mark }) };
}

function answer(status: number, text: string, headers: Record<string, string>): Response {
  return new Response(text, { status, headers: { ...headers, "Cache-Control": "no-store" } });
}
