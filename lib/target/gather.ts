/**
 * The socket as ssh2 writes to it: each packet in three pieces, each in memory of its own. Here the pieces of one turn
 * of the event loop are put together in blocks that are used again, which go to the kernel at once or as soon as they
 * are full: three to thirty times fewer system calls on both sides, and no fresh memory, which costs more than the
 * encryption.
 */
import type { Socket } from "node:net";

/** Bytes that are written to the socket at once, from when on they don't wait for more. */
const GATHER_BYTES = 131_072;
/** A packet comes in so many pieces at most: its length, its content, its MAC. */
const PIECES = 3;
/** Memory of at least so many bytes is given back at once; what is less may be shared with others. */
const RELEASE_BYTES = 16_384;

/** Makes a socket gather what is written to it. How full it is does not matter: the caller bounds what is on its way. */
export function gatherWrites(socket: Socket): Socket {
  socket.on("error", () => {}); // ssh2 tells it, unless the connection was given up before
  const write = socket.write.bind(socket) as (data: Uint8Array, done: () => void) => boolean;
  const free: Buffer[] = [];
  const takeBlock = () => free.pop() ?? Buffer.allocUnsafeSlow(GATHER_BYTES);
  const release = createRelease();
  let block = takeBlock();
  let length = 0;
  const flush = () => {
    if (length === 0) return;
    const full = block;
    write(full.subarray(0, length), () => free.push(full));
    block = takeBlock();
    length = 0;
  };
  socket.write = ((data: Uint8Array) => {
    for (let at = 0; at < data.length; ) {
      if (length === 0) setImmediate(flush);
      const part = data.subarray(at, at + GATHER_BYTES - length);
      block.set(part, length);
      length += part.length;
      at += part.length;
      if (length === GATHER_BYTES) flush();
    }
    release(data);
    return true;
  }) as typeof socket.write;
  return socket;
}

/**
 * Gives back the memory of pieces that were copied: the collector would let megabytes of it pile up. ssh2 makes one
 * packet after the other and is done with it when its last piece is written, so with the third one after it at the
 * latest. A first piece is a part of the packet as it was before it was encrypted.
 */
function createRelease(): (piece: Uint8Array) => void {
  const spent: ArrayBufferLike[] = [];
  return ({ buffer }) => {
    spent.push(buffer);
    const oldest = spent.length > PIECES ? spent.shift() : undefined;
    if (!(oldest instanceof ArrayBuffer) || oldest.byteLength < RELEASE_BYTES) return;
    if (oldest.byteLength !== Buffer.poolSize && !spent.includes(oldest)) oldest.transfer(0);
  };
}
