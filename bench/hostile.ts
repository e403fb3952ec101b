/**
 * A sender with a valid token of its own that means harm: it begins streams without end, files lines into years that are
 * not, announces bodies that do not come, speaks in the names of others, and packs much into little. Nothing of that may
 * reach the others.
 */
import { connect } from "node:net";
import { gzipSync } from "node:zlib";
import { createRandom, type Random } from "./random.ts";

/** Where it attacks, and as whom. */
export interface Target {
  port: number;
  host: string;
  token: string;
  /** Hosts whose names it tries. */
  others: string[];
}

/** A running hostile sender. */
export interface Hostile {
  /** Answers by attack and status; 0 where there was none. */
  readonly counts: Record<string, number>;
  stop(): Promise<void>;
}

type Attack = (target: Target, random: Random) => Promise<number>;

const MOST_MS = 5_000;
/** Requests in a second. */
const RATE = 20;
/** Connections that are held open at once. */
const MOST_HELD = 200;
const held = new Set<ReturnType<typeof connect>>();

const ATTACKS: Record<string, Attack> = {
  "stream without end": (target, random) =>
    send(target, { stream: drawName(random), body: line(random, 2026) }),
  "empty stream": (target, random) => send(target, { stream: drawName(random), body: "" }),
  "half line": (target, random) => send(target, { stream: drawName(random), body: "x" }),
  "window of its own": (target, random) =>
    send(target, { stream: drawName(random), body: line(random, random.between(1970, 2099)) }),
  "offset of the far end": (target, random) =>
    send(target, {
      stream: drawName(random),
      body: line(random, 2026),
      offset: Number.MAX_SAFE_INTEGER - 9999,
    }),
  "begins again and again": (target, random) =>
    send(target, { stream: "the-same-stream", body: line(random, 2026), headers: { "Log-Begin": "again" } }),
  "name of another": (target, random) =>
    send(
      { ...target, host: random.pick(target.others) },
      { stream: drawName(random), body: line(random, 2026) },
    ),
  "dashed name of another": (target, random) =>
    send(
      { ...target, host: random.pick(target.others).replace(/[.:]/g, "-") },
      { stream: drawName(random), body: line(random, 2026) },
    ),
  "news of another time": (target, random) =>
    send(target, {
      stream: drawName(random),
      body: line(random, 2026),
      headers: {
        "Log-Lost": "9007199254740991",
        "Log-Lag": "9007199254740991",
        "Log-Through": "2099-01-01T00:00:00Z",
      },
    }),
  "marks that are none": (target, random) =>
    send(target, {
      stream: drawName(random),
      body: line(random, 2026),
      headers: { "Log-Mark": `1024:${"/".repeat(22)}` },
    }),
  bomb: (target, random) =>
    send(target, {
      stream: drawName(random),
      body: gzipSync(Buffer.alloc(40_000_000, 10)),
      headers: { "Content-Encoding": "gzip" },
    }),
  "names without end": (target, random) => {
    const streams = Array.from({ length: 5000 }, () => drawName(random));
    return post(target, "/streams", JSON.stringify({ streams }), {});
  },
  "all of its streams": (target) => post(target, "/streams", "", {}),
  "path out of the folder": (target, random) =>
    send(target, { stream: "../../../../etc/cron.d/x", body: line(random, 2026) }),
  "body that does not come": (target, random) => hang(target, bodyHead(target, drawName(random))),
};

/** What a stranger does, and the holder of the token of `"*"`: not a part of `startHostile`, which is one sender. */
const OF_OTHERS: Record<string, Attack> = {
  "token that is none": (target, random) =>
    send({ ...target, token: drawName(random) }, { stream: drawName(random), body: line(random, 2026) }),
  "host of its own": (target, random) =>
    send({ ...target, host: `x${drawName(random)}` }, { stream: drawName(random), body: line(random, 2026) }),
  "connection that says nothing": (target) => hang(target, ""),
  "half a header": (target) => hang(target, "POST /upload HTTP/1.1\r\nHost: x\r\n"),
};

/** All attacks by name. */
export const ATTACK_NAMES = [...Object.keys(ATTACKS), ...Object.keys(OF_OTHERS)];

/** Begins to attack, with one attack or with all of a sender in turn. */
export function startHostile(target: Target, random: Random, { only = "", rate = RATE } = {}): Hostile {
  const attacks = only ? { [only]: ATTACKS[only] ?? (OF_OTHERS[only] as Attack) } : ATTACKS;
  const counts: Record<string, number> = {};
  let isOver = false;
  const running = (async () => {
    const inHand = new Set<Promise<void>>();
    while (!isOver) {
      const name = random.pick(Object.keys(attacks));
      const task: Promise<void> = (attacks[name] as Attack)(target, random)
        .catch(() => 0)
        .then((status) => {
          counts[`${name} ${status}`] = (counts[`${name} ${status}`] ?? 0) + 1;
          inHand.delete(task);
        });
      inHand.add(task);
      await new Promise((resolve) => setTimeout(resolve, 1000 / rate));
      while (inHand.size > (only ? 5 * rate : MOST_HELD)) await Promise.race(inHand);
    }
    await Promise.all(inHand);
  })();
  return {
    counts,
    stop: async () => {
      isOver = true;
      for (const socket of held) socket.destroy();
      await running;
    },
  };
}

interface Post {
  stream: string;
  body: string | Uint8Array<ArrayBuffer>;
  offset?: number;
  headers?: Record<string, string>;
}

function send(target: Target, { stream, body, offset = 0, headers }: Post): Promise<number> {
  const length = typeof body === "string" ? Buffer.byteLength(body) : 40_000_000;
  return post(target, "/upload", body, {
    ...{ "Content-Type": "text/plain", "Log-Stream": stream, "Log-Begin": "1" },
    ...{ "Upload-Offset": String(offset), "Upload-End": String(offset + length) },
    ...{ "Log-Mark": `4:${"A".repeat(22)}`, ...headers },
  });
}

async function post(
  { port, host, token }: Target,
  path: string,
  body: string | Uint8Array<ArrayBuffer>,
  headers: Record<string, string>,
): Promise<number> {
  const answer = await fetch(`http://127.0.0.1:${port}${path}`, {
    method: "POST",
    body,
    headers: { Authorization: `Bearer ${token}`, "Log-Host": host, ...headers },
    signal: AbortSignal.timeout(MOST_MS),
  });
  await answer.arrayBuffer();
  return answer.status;
}

/** Begins a request and stays. */
function hang({ port }: Target, bytes: string): Promise<number> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1");
    held.add(socket);
    socket.on("error", () => {});
    socket.on("close", () => {
      held.delete(socket);
      resolve(0);
    });
    setTimeout(() => socket.destroy(), MOST_MS);
    socket.write(bytes);
  });
}

/** The head of a request that announces a body. */
function bodyHead({ host, token }: Target, stream: string): string {
  const head = [
    "POST /upload HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain",
    `Authorization: Bearer ${token}\r\nLog-Host: ${host}\r\nLog-Stream: ${stream}`,
    "Log-Begin: 1\r\nUpload-Offset: 0\r\nUpload-End: 1000000\r\nContent-Length: 1000000\r\n\r\nx",
  ];
  return head.join("\r\n");
}

function line(random: Random, year: number): string {
  const two = (n: number) => String(n).padStart(2, "0");
  const [day, hour, minute] = [random.between(1, 28), random.between(0, 23), random.between(0, 59)];
  return `6.6.6.6 - - [${two(day)}/Nov/${year}:${two(hour)}:${two(minute)}:00 +0000] "GET /w0/g0/n0/ HTTP/1.1" 200 1 "-" "-"\n`;
}

function drawName(random: Random): string {
  return Array.from({ length: 4 }, () => random.between(0x10000000, 0x7fffffff).toString(16)).join("");
}

/** As a process of its own, for `attacks.ts`: a target and what to do as JSON; counts as JSON when its input ends. */
if (import.meta.main) {
  const { target, only, rate, seed } = JSON.parse(process.argv[2] ?? "{}");
  const hostile = startHostile(target, createRandom(seed), { only, rate });
  for await (const _ of process.stdin); // until it is closed
  await hostile.stop();
  process.stdout.write(`${JSON.stringify(hostile.counts)}\n`);
  process.exit(0);
}
