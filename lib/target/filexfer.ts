/**
 * The SFTP protocol, version 3, as a client speaks it (draft-ietf-secsh-filexfer-02; section numbers below are its):
 * requests go out without waiting for each other, answers are matched by their number.
 *
 * It is our own because a batch's bytes must go from the block that they were read into straight to the channel:
 * ssh2's client of this protocol copies each write into fresh memory first, which costs more than encrypting it.
 */
import { Refusal } from "./target.ts";

/** The channel that the packets go over: bytes in order. `taken` is called when `bytes` are no longer needed. */
export interface Channel {
  write(bytes: Uint8Array, taken?: () => void): unknown;
  on(event: "data", listener: (bytes: Buffer) => void): unknown;
}

/** How a request is answered. */
export type Answer<T> = (error: Error | undefined, value?: T) => void;

/** A connection whose requests all end: by their answer, or by the fault that ended the connection. */
export interface Wire {
  /** Sends one request; what `send` is given takes its answer. */
  ask<T>(send: (answer: Answer<T>) => unknown): Promise<T>;
  /** Ends the connection because of what happened on it. */
  lost(cause: unknown): void;
}

/** An open file on the server. */
export interface RemoteFile {
  path: string;
  handle: Buffer;
}

/** A status other than OK (section 7). */
export class StatusRefusal extends Refusal {
  readonly status: number;
  constructor(what: string, status: number, told: string) {
    super(`Cannot ${what}`, { cause: new Error(told || `status ${status}`) });
    this.status = status;
  }
}

export const STATUS = { ok: 0, eof: 1, noSuchFile: 2, permissionDenied: 3, unsupported: 8 } as const;

const INIT = 1;
const VERSION = 2;
const OPEN = 3;
const CLOSE = 4;
const READ = 5;
const WRITE = 6;
const FSTAT = 8;
const REMOVE = 13;
const STAT = 17;
const RENAME = 18;
const REPLY_STATUS = 101;
const EXTENDED = 200;

const PROTOCOL = 3;
/** Section 6.3: SSH_FXF_READ, and SSH_FXF_WRITE | SSH_FXF_CREAT | SSH_FXF_TRUNC. */
const OPEN_FLAGS = { r: 0x01, w: 0x02 | 0x08 | 0x10 };
/** Section 5: SSH_FILEXFER_ATTR_SIZE. */
const HAS_SIZE = 0x01;
/** Every server takes packets of 34000 bytes (section 3); so much data fits beside the longest handle. */
const USUAL_BYTES = 32_768;
/** No answer that we ask for is longer: more is not this protocol. */
const MAX_ANSWER = 1_048_576;
/** The number under which the answer to INIT, which has none, is waited for. */
const NO_ID = -1;

export type Session = Awaited<ReturnType<typeof startSession>>;

/** Agrees on the protocol and asks what the server offers. Throws what the connection or the server throws. */
export async function startSession(channel: Channel, { ask, lost }: Wire) {
  const waiting = new Map<number, (type: number, body: Reader) => void>();
  const unsent: Buffer[] = [];
  let lastId = 0;

  channel.on(
    "data",
    splitPackets((packet) => {
      const type = packet.byte();
      const id = type === VERSION ? NO_ID : packet.uint32();
      const onReply = waiting.get(id);
      if (!onReply) throw new Error(`the server answered request ${id}, which nobody made`);
      waiting.delete(id);
      onReply(type, packet);
    }, lost),
  );

  /** One request and what `read` finds in its answer; a status that is not OK is a StatusRefusal. */
  function request<T>(
    what: string,
    type: number,
    fields: Buffer[],
    read: (answer: Reader) => T,
    data?: { bytes: Uint8Array; taken: () => void },
  ): Promise<T> {
    const id = type === INIT ? NO_ID : ++lastId % 0x1_0000_0000;
    return ask<T>((answer) => {
      waiting.set(id, (reply, body) => {
        if (reply !== REPLY_STATUS) return answer(undefined, read(body));
        const status = body.uint32();
        if (status === STATUS.ok) return answer(undefined, read(OK));
        const told = body.left > 0 ? body.string().toString("utf8") : "";
        answer(new StatusRefusal(what, status, told));
      });
      const content = id === NO_ID ? fields : [uint32(id), ...fields];
      const length = 1 + content.reduce((sum, field) => sum + field.length, data?.bytes.length ?? 0);
      if (unsent.length === 0) queueMicrotask(flush);
      unsent.push(uint32(length), Buffer.of(type), ...content);
      if (!data) return;
      flush();
      channel.write(data.bytes, data.taken);
    });
  }

  /** Requests that are made at once go out as one, which saves a packet of the connection for each. */
  function flush(): void {
    if (unsent.length > 0) channel.write(Buffer.concat(unsent.splice(0)));
  }

  const extended = <T>(what: string, name: string, fields: Buffer[], read: (answer: Reader) => T) =>
    request(what, EXTENDED, [string(name), ...fields], read);

  const offers = await request("start SFTP", INIT, [uint32(PROTOCOL)], (answer) => {
    const version = answer.uint32();
    if (version !== PROTOCOL)
      throw new Error(`the server speaks SFTP version ${version}, expected ${PROTOCOL}`);
    const names = new Map<string, string>();
    while (answer.left > 0) names.set(answer.string().toString(), answer.string().toString());
    return names;
  });
  // OpenSSH's PROTOCOL file, sections 4.3, 4.5 and 4.8: each extension has a version of its own.
  const isOffered = (name: string) => offers.get(name) === "1";
  const { writeBytes, answerMs } = await askLimits();

  async function askLimits(): Promise<{ writeBytes: number; answerMs: number }> {
    const unknown = { writeBytes: USUAL_BYTES, answerMs: Number.POSITIVE_INFINITY };
    if (!isOffered("limits@openssh.com")) return unknown;
    const asked = performance.now();
    const read = (answer: Reader) => {
      const [, , most] = [answer.uint64(), answer.uint64(), answer.uint64()];
      return most || USUAL_BYTES; // 0: not told
    };
    return extended("ask for limits", "limits@openssh.com", [], read).then(
      (writeBytes) => ({ writeBytes, answerMs: performance.now() - asked }),
      (error) => {
        if (error instanceof StatusRefusal) return unknown;
        throw error;
      },
    );
  }

  return {
    /** The most bytes that one write may have. */
    writeBytes,
    /** How long the server took to tell its limits, in ms; infinite when it has none to tell. */
    answerMs,
    /** Whether the server offers `fsync@openssh.com` and `posix-rename@openssh.com`. */
    offersSync: isOffered("fsync@openssh.com"),
    offersPosixRename: isOffered("posix-rename@openssh.com"),

    /** Opens a file to read it, or to write it from nothing. */
    async open(path: string, mode: "r" | "w"): Promise<RemoteFile> {
      const what = mode === "w" ? `create "${path}"` : `read "${path}"`;
      const fields = [string(path), uint32(OPEN_FLAGS[mode]), uint32(0)];
      return { path, handle: await request(what, OPEN, fields, (answer) => answer.string()) };
    },

    close: ({ path, handle }: RemoteFile) => request(`close "${path}"`, CLOSE, [string(handle)], nothing),

    /**
     * Writes at most `writeBytes` bytes. `taken` is fulfilled when the memory of `bytes` may be used again,
     * `answered` when the server has them.
     */
    write({ path, handle }: RemoteFile, position: number, bytes: Uint8Array) {
      const { promise: taken, resolve } = Promise.withResolvers<void>();
      const fields = [string(handle), uint64(position), uint32(bytes.length)];
      const answered = request(`write "${path}"`, WRITE, fields, nothing, { bytes, taken: resolve });
      answered.catch(() => {}).finally(resolve); // a connection that is lost takes nothing any more
      return { taken, answered };
    },

    /** Up to `length` bytes from `position`; none at the end of the file. */
    read({ path, handle }: RemoteFile, position: number, length: number): Promise<Uint8Array> {
      const fields = [string(handle), uint64(position), uint32(length)];
      return request<Uint8Array>(`read "${path}"`, READ, fields, (answer) => answer.string()).catch(
        (error) => {
          if (error instanceof StatusRefusal && error.status === STATUS.eof) return new Uint8Array(0);
          throw error;
        },
      );
    },

    /** Size in bytes, by the open file or by its path. */
    sizeOf: ({ path, handle }: RemoteFile) => request(`look at "${path}"`, FSTAT, [string(handle)], readSize),
    size: (path: string) => request(`look at "${path}"`, STAT, [string(path)], readSize),

    remove: (path: string) => request(`remove "${path}"`, REMOVE, [string(path)], nothing),

    /** What happens when `to` exists is the server's matter. */
    rename: (from: string, to: string) =>
      request(`rename "${from}" to "${to}"`, RENAME, [string(from), string(to)], nothing),

    /** As rename(2): `to` is replaced. */
    posixRename: (from: string, to: string) =>
      extended(
        `rename "${from}" to "${to}"`,
        "posix-rename@openssh.com",
        [string(from), string(to)],
        nothing,
      ),

    /** As fsync(2). */
    sync: ({ path, handle }: RemoteFile) =>
      extended(`sync "${path}"`, "fsync@openssh.com", [string(handle)], nothing),
  };
}

function nothing(): void {}

/** Section 5: the size comes first, when it comes. */
function readSize(answer: Reader): number {
  if ((answer.uint32() & HAS_SIZE) === 0) throw new Error("the server tells no sizes");
  return answer.uint64();
}

// ---- packets: a length, a type, fields in network byte order (section 3)

function uint32(value: number): Buffer {
  const field = Buffer.allocUnsafe(4);
  field.writeUInt32BE(value);
  return field;
}

function uint64(value: number): Buffer {
  const field = Buffer.allocUnsafe(8);
  field.writeBigUInt64BE(BigInt(value));
  return field;
}

function string(value: string | Buffer): Buffer {
  const bytes = typeof value === "string" ? Buffer.from(value) : value;
  return Buffer.concat([uint32(bytes.length), bytes]);
}

/** The fields of one packet, in order. Throws when the packet ends before them. */
class Reader {
  readonly #bytes: Buffer;
  #at = 0;
  constructor(bytes: Buffer) {
    this.#bytes = bytes;
  }
  get left(): number {
    return this.#bytes.length - this.#at;
  }
  byte(): number {
    return this.#bytes.readUInt8(this.#step(1));
  }
  uint32(): number {
    return this.#bytes.readUInt32BE(this.#step(4));
  }
  uint64(): number {
    return Number(this.#bytes.readBigUInt64BE(this.#step(8)));
  }
  string(): Buffer {
    const length = this.uint32();
    const start = this.#step(length);
    return this.#bytes.subarray(start, this.#at);
  }
  #step(length: number): number {
    if (length > this.left) throw new Error("an answer of the server is cut short");
    const start = this.#at;
    this.#at += length;
    return start;
  }
}

/** A status that says OK has nothing to be read: who waits for more finds the packet cut short. */
const OK = new Reader(Buffer.alloc(0));

/** Puts packets together from the pieces that the channel brings. What cannot be read ends the connection. */
function splitPackets(onPacket: (packet: Reader) => void, lost: (cause: unknown) => void) {
  let held: Buffer = Buffer.alloc(0);
  return (piece: Buffer) => {
    let rest = held.length === 0 ? piece : Buffer.concat([held, piece]);
    try {
      while (rest.length >= 4) {
        const length = rest.readUInt32BE(0);
        if (length > MAX_ANSWER) throw new Error(`the server answered with a packet of ${length} bytes`);
        if (rest.length < 4 + length) break;
        onPacket(new Reader(rest.subarray(4, 4 + length)));
        rest = rest.subarray(4 + length);
      }
    } catch (error) {
      lost(error);
      rest = Buffer.alloc(0);
    }
    held = rest;
  };
}
