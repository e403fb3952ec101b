/**
 * A TCP proxy whose network can be bad at command: it cuts connections, also in mid-message, stalls them,
 * and refuses new ones.
 */
import { connect, createServer, type Socket } from "node:net";

/** A proxy in front of one port of this machine. */
export interface TcpProxy {
  port: number;
  /** Resets every connection at once. */
  cut(): void;
  /** Resets every connection after so many more bytes in either direction. */
  cutAfter(bytes: number): void;
  /** Passes no byte for so long; connections stay open. */
  stall(ms: number): void;
  /** Resets what is open and every new connection for so long. */
  refuse(ms: number): void;
  /** Ends every fault. */
  heal(): void;
  close(): Promise<void>;
}

/** Bytes that a far link holds back; beyond it the sender waits. */
const LINK_BYTES = 16_777_216;

/** A proxy as far away as `roundTripMs`: every byte comes half of that later. It is as wide as this machine. */
export function createFarProxy(
  target: number,
  roundTripMs: number,
): Promise<{ port: number; close: () => void }> {
  const server = createServer((client) => {
    const upstream = connect(target, "127.0.0.1");
    const pass = (from: Socket, to: Socket) => {
      let held = 0;
      const later = (work: () => void) => setTimeout(work, roundTripMs / 2);
      from.on("data", (data) => {
        held += data.length;
        if (held > LINK_BYTES) from.pause();
        later(() => {
          held -= data.length;
          if (held <= LINK_BYTES) from.resume();
          to.write(data);
        });
      });
      from.on("end", () => later(() => to.end()));
      from.on("error", () => to.destroy());
      from.on("close", () => later(() => to.destroy()));
    };
    for (const socket of [client, upstream]) socket.setNoDelay(true);
    pass(client, upstream);
    pass(upstream, client);
  });
  return new Promise((resolve, reject) => {
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      resolve({ port: (server.address() as { port: number }).port, close: () => server.close() });
    });
  });
}

/** Starts a proxy on a free port of 127.0.0.1 in front of `target`. */
export function createProxy(target: number): Promise<TcpProxy> {
  const pairs = new Set<[Socket, Socket]>();
  let stalledUntil = 0;
  let refusedUntil = 0;
  let bytesLeft = Number.POSITIVE_INFINITY;
  let timer: NodeJS.Timeout | undefined;

  const cut = () => {
    for (const pair of pairs) for (const socket of pair) socket.resetAndDestroy();
    pairs.clear();
  };
  const resume = () => {
    for (const pair of pairs) for (const socket of pair) socket.resume();
  };

  const server = createServer((client) => {
    client.on("error", () => {});
    if (Date.now() < refusedUntil) {
      client.resetAndDestroy();
      return;
    }
    const upstream = connect(target, "127.0.0.1");
    const pair: [Socket, Socket] = [client, upstream];
    pairs.add(pair);
    const end = () => {
      pairs.delete(pair);
      client.destroy();
      upstream.destroy();
    };
    const pass = (from: Socket, to: Socket) => {
      from.on("data", (data) => {
        const part = data.subarray(0, Math.min(data.length, bytesLeft));
        bytesLeft -= data.length;
        if (!to.write(part)) from.pause();
        if (bytesLeft <= 0) {
          bytesLeft = Number.POSITIVE_INFINITY;
          setTimeout(cut, 1); // lets the first part of the message reach the other side
        }
      });
      to.on("drain", () => Date.now() >= stalledUntil && from.resume());
      from.on("end", () => to.end());
      from.on("error", end);
      from.on("close", end);
      if (Date.now() < stalledUntil) from.pause();
    };
    pass(client, upstream);
    pass(upstream, client);
  });

  return new Promise((resolve, reject) => {
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      resolve({
        port: (server.address() as { port: number }).port,
        cut,
        cutAfter: (bytes) => {
          bytesLeft = bytes;
        },
        stall: (ms) => {
          stalledUntil = Date.now() + ms;
          for (const pair of pairs) for (const socket of pair) socket.pause();
          clearTimeout(timer);
          timer = setTimeout(resume, ms);
        },
        refuse: (ms) => {
          refusedUntil = Date.now() + ms;
          cut();
        },
        heal: () => {
          stalledUntil = 0;
          refusedUntil = 0;
          bytesLeft = Number.POSITIVE_INFINITY;
          resume();
        },
        close: () => {
          clearTimeout(timer);
          cut();
          return new Promise((done) => server.close(() => done()));
        },
      });
    });
  });
}
