import { describe, expect, test } from "bun:test";
import {
  type Answer,
  type Channel,
  STATUS,
  StatusRefusal,
  startSession,
  type Wire,
} from "../lib/target/filexfer.ts";

const uint32 = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
const text = (value: string) => Buffer.concat([uint32(value.length), Buffer.from(value)]);
const packet = (type: number, ...fields: Buffer[]) => {
  const body = Buffer.concat([Buffer.of(type), ...fields]);
  return Buffer.concat([uint32(body.length), body]);
};
const VERSION_3 = packet(2, uint32(3));
const nextTurn = () => new Promise((resolve) => setImmediate(resolve));

/** A server that answers each request by its type and number with what the test says. */
function fakeServer(reply: (type: number, id: Buffer, body: Buffer) => Buffer | undefined, pieces = 1e9) {
  let hear = (_: Buffer) => {};
  let asked = Buffer.alloc(0);
  const server = {
    /** Why the connection was ended. */
    lost: undefined as unknown,
    tell(bytes: Buffer) {
      for (let at = 0; at < bytes.length; at += pieces) hear(bytes.subarray(at, at + pieces));
    },
  };
  const channel: Channel = {
    on: (_event, listener) => {
      hear = listener;
    },
    write(bytes, taken) {
      asked = Buffer.concat([asked, bytes]);
      while (asked.length >= 4 && asked.length >= 4 + asked.readUInt32BE(0)) {
        const end = 4 + asked.readUInt32BE(0);
        const answer = reply(asked[4] as number, asked.subarray(5, 9), asked.subarray(9, end));
        asked = asked.subarray(end);
        if (answer) queueMicrotask(() => server.tell(answer));
      }
      if (taken) queueMicrotask(taken);
    },
  };
  const inHand = new Set<(error: unknown) => void>();
  const wire: Wire = {
    ask: <T>(send: (answer: Answer<T>) => unknown) =>
      new Promise<T>((resolve, reject) => {
        inHand.add(reject);
        send((error, value) => (error ? reject(error) : resolve(value as T)));
      }),
    lost(cause) {
      server.lost = cause;
      for (const reject of inHand) reject(cause);
    },
  };
  return { server, channel, wire };
}

/** A session with a server that agrees on version 3 and answers the rest with `reply`. */
async function agreed(
  reply: (type: number, id: Buffer, body: Buffer) => Buffer | undefined,
  pieces?: number,
) {
  const { server, channel, wire } = fakeServer((type, id, body) => {
    return type === 1 ? VERSION_3 : reply(type, id, body);
  }, pieces);
  return { server, session: await startSession(channel, wire) };
}

describe("startSession()", () => {
  test("knows what is offered, in the version that it speaks, and asks for the limits", async () => {
    const limits = Buffer.alloc(32);
    limits.writeBigUInt64BE(261_120n, 16);
    const { channel, wire } = fakeServer((type, id) => {
      if (type !== 1) return packet(201, id, limits);
      const offers = [
        ["limits@openssh.com", "1"],
        ["fsync@openssh.com", "2"],
        ["posix-rename@openssh.com", "1"],
      ];
      return packet(2, uint32(3), ...offers.flat().map(text));
    });
    const session = await startSession(channel, wire);
    expect(session).toMatchObject({ writeBytes: 261_120, offersSync: false, offersPosixRename: true });
  });

  test("writes what every server takes when no limits are told", async () => {
    const { session } = await agreed(() => undefined);
    expect(session).toMatchObject({
      writeBytes: 32_768,
      answerMs: Number.POSITIVE_INFINITY,
      offersSync: false,
      offersPosixRename: false,
    });
  });

  test("goes on without limits when the server offers and refuses them", async () => {
    const { channel, wire } = fakeServer((type, id) =>
      type === 1
        ? packet(2, uint32(3), text("limits@openssh.com"), text("1"))
        : packet(101, id, uint32(STATUS.permissionDenied)),
    );
    expect(await startSession(channel, wire)).toMatchObject({ writeBytes: 32_768 });
  });

  test("refuses another version of the protocol", async () => {
    const { channel, wire } = fakeServer(() => packet(2, uint32(6)));
    expect(startSession(channel, wire)).rejects.toThrow("the server speaks SFTP version 6, expected 3");
  });
});

describe("answers", () => {
  test.each([1, 3, 1000])("are put together from pieces of %d bytes", async (pieces) => {
    const { session } = await agreed((type, id) => {
      if (type === 3) return packet(102, id, text("handle"));
      return type === 5 ? packet(103, id, text("content")) : packet(105, id, uint32(1), Buffer.alloc(8, 1));
    }, pieces);
    const file = await session.open("/a", "r");
    expect(file).toEqual({ path: "/a", handle: Buffer.from("handle") });
    const [bytes, size] = await Promise.all([session.read(file, 0, 100), session.sizeOf(file)]);
    expect(Buffer.from(bytes).toString()).toBe("content");
    expect(size).toBe(Number(0x0101_0101_0101_0101n));
  });

  test("are matched by number, whatever their order", async () => {
    const ids: Buffer[] = [];
    const { server, session } = await agreed((_type, id) => {
      ids.push(Buffer.from(id));
      return undefined;
    });
    const sizes = Promise.all(["/a", "/b"].map((path) => session.size(path)));
    await nextTurn();
    const answer = (id: Buffer, size: number) => packet(105, id, uint32(1), uint32(0), uint32(size));
    server.tell(Buffer.concat([answer(ids[1] as Buffer, 22), answer(ids[0] as Buffer, 11)]));
    expect(await sizes).toEqual([11, 22]);
  });

  test("with a status other than OK are refusals that say what was tried and what the server told", async () => {
    const { session } = await agreed((_type, id) => packet(101, id, uint32(3), text("Go away"), text("en")));
    const error = await session.rename("/a", "/b").catch((error) => error);
    expect(error).toBeInstanceOf(StatusRefusal);
    expect(error.status).toBe(STATUS.permissionDenied);
    expect(`${error.message}: ${error.cause.message}`).toBe('Cannot rename "/a" to "/b": Go away');
  });

  test("with a bare status, as early servers send it, are read, too", async () => {
    const { session } = await agreed((_type, id) => packet(101, id, uint32(4)));
    const error = await session.remove("/a").catch((error) => error);
    expect(error.cause.message).toBe("status 4");
  });

  test("read() gives no bytes at the end of the file", async () => {
    const { session } = await agreed((_type, id) => packet(101, id, uint32(STATUS.eof)));
    expect(await session.read({ path: "/a", handle: Buffer.of(1) }, 9, 9)).toHaveLength(0);
  });
});

describe("what is not the protocol ends the connection", () => {
  const cases: [string, (id: Buffer) => Buffer, string][] = [
    [
      "an answer to nothing",
      () => packet(101, uint32(77), uint32(0)),
      "answered request 77, which nobody made",
    ],
    ["a packet without end", () => uint32(0x7fff_ffff), "a packet of 2147483647 bytes"],
    ["a text that is cut short", (id) => packet(102, id, uint32(50), Buffer.of(1)), "cut short"],
    ["OK where a handle is due", (id) => packet(101, id, uint32(0)), "cut short"],
    ["attributes without a size", (id) => packet(105, id, uint32(4)), "the server tells no sizes"],
  ];
  test.each(cases)("%s", async (name, answer, told) => {
    const { server, session } = await agreed((_type, id) => answer(id));
    const asked = name.includes("size") ? session.size("/a") : session.open("/a", "w");
    const error = await asked.catch((error) => error);
    expect(server.lost).toBe(error);
    expect(String(error)).toContain(told);
  });
});

test("requests that are made at once go out as one", async () => {
  let writes = 0;
  const { channel, wire } = fakeServer((type, id) => (type === 1 ? VERSION_3 : packet(101, id, uint32(0))));
  const counted = {
    ...channel,
    write(bytes: Uint8Array, taken?: () => void) {
      writes++;
      channel.write(bytes, taken);
    },
  };
  const session = await startSession(counted, wire);
  writes = 0;
  await Promise.all([session.remove("/a"), session.rename("/b", "/c"), session.remove("/d")]);
  expect(writes).toBe(1);
});

test("write() sends header and bytes as one packet, and tells when the memory may be used again", async () => {
  const seen: Buffer[] = [];
  const { session } = await agreed((type, id, body) => {
    if (type === 6) seen.push(Buffer.from(body));
    return packet(101, id, uint32(0));
  });
  const bytes = Buffer.from("12345");
  const { taken, answered } = session.write({ path: "/a", handle: Buffer.from("h") }, 2 ** 33 + 7, bytes);
  await taken;
  bytes.fill(0);
  await answered;
  expect(seen).toEqual([Buffer.concat([text("h"), uint32(2), uint32(7), text("12345")])]);
});
