/**
 * What the shipper's tests share: a log folder with a writer, the shipper as a real process behind a config of
 * its own, the real receiver, and a stub receiver for the answers that the real one gives seldom.
 */
import { expect } from "bun:test";
import {
  closeSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { gunzipSync, zstdDecompressSync } from "node:zlib";
import { parseBatchName } from "../lib/batch.ts";
import { HEADER, parseChunkHeaders, parseNews } from "../lib/chunk.ts";
import {
  expectSameLines,
  freePort,
  onCleanup,
  PATIENCE_MS,
  type Running,
  start,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";
import { isChunk, Wire } from "./wire.ts";

/** Lines `from` to `to` of a tag, all in one window of the past, so that they end in one batch. */
export function lines(tag: string, from: number, to: number): string {
  let text = "";
  for (let n = from; n <= to; n++) {
    text += `10.0.0.1 - - [22/Nov/2026:06:20:01 +0600] "GET /${tag}/${n} HTTP/1.1" 200 5 "-" "curl"\n`;
  }
  return text;
}

// ---- the real receiver

export interface RealReceiver {
  url: string;
  dir: string;
  running: Running;
  /** Starts it again, on the same port and folder. */
  start(env?: Record<string, string>): Promise<Running>;
  /** What is stored of a host: its batches, parts in their order. */
  stored(host: string): Buffer;
}

export async function startRealReceiver(options: object = {}, scheme = "http"): Promise<RealReceiver> {
  const folder = await tempFolder();
  const dir = join(folder, "batches");
  const port = await freePort();
  const groups = [{ port, senders: ["*"] }];
  const config = await writeConfig(folder, {
    receiver: { dir, groups, sealAfterSeconds: 3600, ...options },
  });
  const receiver: RealReceiver = {
    url: `${scheme}://127.0.0.1:${port}`,
    dir,
    running: undefined as unknown as Running,
    async start(env = {}) {
      receiver.running = startScript("receiver", config, [], env);
      await receiver.running.says("receiver listens");
      return receiver.running;
    },
    stored: (host) => storedBy(dir, host),
  };
  await receiver.start();
  return receiver;
}

function storedBy(dir: string, host: string): Buffer {
  try {
    const names = readdirSync(join(dir, host)).filter((name) => parseBatchName(name));
    const part = (name: string) => parseBatchName(name)?.part ?? 0;
    names.sort((a, b) => part(a) - part(b));
    return Buffer.concat(names.map((name) => readFileSync(join(dir, host, name))));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return Buffer.alloc(0);
    throw error;
  }
}

// ---- a receiver that gives the answers that it is told

export interface Asked {
  /** POST for a chunk, `streams` for the question where streams stand: the heartbeat. */
  method: string;
  stream: string;
  offset: number;
  end: number;
  lost: number;
  lag: number;
  token: string | null;
  encoding: string | null;
  /** When it came, ms. */
  at: number;
}

/** Takes the place of the contract's answer; undefined lets the contract answer. */
export type Script = (asked: Asked, commit: () => Response) => Response | Promise<Response> | undefined;

export interface StubReceiver {
  url: string;
  asked: Asked[];
  /** Bodies in the order in which they were committed. */
  text(): string;
  readonly lost: number;
  script: Script | undefined;
}

/** Keeps the contract of the wire in memory, unless `script` answers. */
export function startStub(script?: Script, port = 0): StubReceiver {
  const wire = new Wire();
  const bodies: Buffer[] = [];
  const stub: StubReceiver = {
    url: "",
    asked: [],
    text: () => Buffer.concat(bodies).toString("latin1"),
    get lost() {
      return wire.lost;
    },
    script,
  };
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port,
    async fetch(request) {
      const { headers } = request;
      const stream = headers.get(HEADER.stream) ?? "";
      const common = { method: request.method, stream, token: headers.get("Authorization"), at: Date.now() };
      if (!isChunk(request)) {
        const news = parseNews(headers);
        const { lost = 0, lag = 0 } = news;
        const asked = { ...common, method: "streams", offset: 0, end: 0, lost, lag, encoding: null };
        stub.asked.push(asked);
        const forced = stub.script?.(asked, () => new Response());
        if (forced) return forced;
        wire.hear(news);
        return wire.tell(request);
      }
      const chunk = parseChunkHeaders(headers);
      const { offset, end, lost = 0, lag = 0 } = chunk;
      const encoding = headers.get("Content-Encoding");
      const asked = { ...common, offset, end, lost, lag, encoding };
      const body = decode(new Uint8Array(await request.arrayBuffer()), encoding);
      stub.asked.push(asked);
      const commit = () =>
        wire.take(chunk, body.toString("latin1").split("\n").length - 1, () => bodies.push(body));
      return stub.script?.(asked, commit) ?? commit();
    },
  });
  onCleanup(() => server.stop(true));
  stub.url = `http://127.0.0.1:${server.port}`;
  return stub;
}

function decode(bytes: Uint8Array<ArrayBuffer>, encoding: string | null): Buffer {
  if (encoding === "zstd") return zstdDecompressSync(bytes);
  return encoding === "gzip" ? gunzipSync(bytes) : Buffer.from(bytes);
}

// ---- a sender

export interface Sender {
  folder: string;
  logs: string;
  live: string;
  stateDir: string;
  host: string;
  config: string;
  /** What is written to the live file goes here too. */
  written: Buffer[];
  /** Appends to the file that is open, with one write. */
  write(text: string | Uint8Array): void;
  /** `mv`, then a new file, opened. Gives the descriptor of the old one, still open. */
  rotate(name?: string): number;
  /** Opens the live path anew. */
  reopen(): number;
  start(flags?: string[], env?: Record<string, string | undefined>): Running;
  /** Runs `--once` to its end, and expects 0. Gives its output. */
  once(env?: Record<string, string | undefined>): Promise<string>;
}

let senders = 0;

/** Times are short, so that tests do not wait. */
const QUICK = { rotateWaitSeconds: 0.3, pollSeconds: 0.2, heartbeatSeconds: 3600, flushMs: 10 };

/** A log folder with an empty live file, and a config that ships it to `url`; `options` may need the folder's path. */
export async function createSender(
  url: string,
  options: object | ((logs: string) => object) = {},
): Promise<Sender> {
  const folder = await tempFolder();
  const logs = join(folder, "logs");
  mkdirSync(logs);
  const live = join(logs, "access.log");
  const stateDir = join(folder, "state");
  const host = `10.1.${senders >> 8}.${++senders & 255}`;
  const shipper = { files: [live], receiver: url, host, stateDir, ...QUICK };
  Object.assign(shipper, typeof options === "function" ? options(logs) : options);
  const config = await writeConfig(folder, { shipper });
  let fd = -1;
  const sender: Sender = {
    ...{ folder, logs, live, stateDir, host, config, written: [] },
    write(text) {
      const bytes = Buffer.from(text);
      if (writeSync(fd, bytes) !== bytes.length) throw new Error("short write");
      sender.written.push(bytes);
    },
    rotate(name = "access.log.1") {
      const old = fd;
      renameSync(live, join(logs, name));
      sender.reopen();
      return old;
    },
    reopen() {
      fd = openSync(live, "a");
      opened.push(fd);
      return fd;
    },
    start: (flags = [], env = {}) => startScript("shipper", config, flags, env),
    async once(env = {}) {
      const running = sender.start(["--once"], env);
      const late = setTimeout(() => running.stop("SIGKILL"), PATIENCE_MS);
      const code = await running.ended;
      clearTimeout(late);
      const { output } = running;
      if (code !== 0) throw new Error(`shipper --once ended with ${code}:\n${output}`);
      return output;
    },
  };
  sender.reopen();
  return sender;
}

const opened: number[] = [];
process.on("exit", () => {
  for (const fd of opened) closeSync(fd);
});

/** Moves every `access.log.N[.gz]` up by one, as logrotate does before it rotates. */
export function shiftNames(sender: Sender): void {
  const numbered = readdirSync(sender.logs)
    .map((name) => /^(access\.log\.)(\d+)(.*)$/.exec(name))
    .filter((match) => match !== null)
    .sort((a, b) => Number(b[2]) - Number(a[2]));
  for (const [name, stem, number, rest] of numbered) {
    renameSync(join(sender.logs, name), join(sender.logs, `${stem}${Number(number) + 1}${rest}`));
  }
}

/** Waits until so many bytes, or these, have arrived, then expects exactly these. */
export async function expectArrives(
  what: { stored(host: string): Buffer },
  sender: Sender,
  expected: string | Uint8Array = Buffer.concat(sender.written),
  running?: Running,
): Promise<void> {
  const bytes = Buffer.from(expected);
  const length = () => what.stored(sender.host).length;
  try {
    await until("all has arrived", () => length() >= bytes.length);
  } catch (error) {
    const story = `${length()} of ${bytes.length} bytes\n${running?.output ?? ""}`;
    throw new Error(`${(error as Error).message}: ${story}`);
  }
  expectSameLines(what.stored(sender.host), bytes);
}

/** Expects of each tag its lines in their order, and nothing else. */
export function expectTags(stored: Buffer, expected: Record<string, string>): void {
  const all = stored.toString("latin1").split(/(?<=\n)/);
  for (const [tag, text] of Object.entries(expected)) {
    expectSameLines(all.filter((line) => line.includes(`GET /${tag}/`)).join(""), text);
  }
  expect(stored.length).toBe(Object.values(expected).reduce((sum, text) => sum + text.length, 0));
}

/** A process with its peak of memory in bytes and open descriptors, as /proc has them. */
export function usage(pid: number): { peak: number; descriptors: string[] } {
  const status = readFileSync(`/proc/${pid}/status`, "latin1");
  return {
    peak: Number(/VmHWM:\s+(\d+)/.exec(status)?.[1]) * 1024,
    descriptors: readdirSync(`/proc/${pid}/fd`),
  };
}

/** Starts a program in place of the shipper's own process: a wrapper such as setpriv or strace. */
export function startWrapped(command: string, args: string[], sender: Sender, flags: string[] = []): Running {
  const script = join(import.meta.dirname, "..", "shipper.ts");
  return start(command, [...args, process.execPath, "run", script, "--config", sender.config, ...flags]);
}

/** The files of the log's folder that the process has open. */
export function openPaths(shipper: Running): string[] {
  const folder = `/proc/${shipper.process.pid}/fd`;
  const targetOf = (fd: string) => {
    try {
      return readlinkSync(join(folder, fd));
    } catch {
      return ""; // closed meanwhile
    }
  };
  return readdirSync(folder)
    .map(targetOf)
    .filter((path) => path.includes("/logs/access.log"));
}

/** How many files of the log's folder the process has open. */
export function openLogs(shipper: Running): number {
  return openPaths(shipper).length;
}

/** The lines of each tag. */
export function tagsOf(text: string): Record<string, string> {
  const tags: Record<string, string> = {};
  for (const line of text.match(/.*\n/g) ?? []) {
    const tag = /GET \/([^/]+)\//.exec(line)?.[1] ?? "";
    tags[tag] = (tags[tag] ?? "") + line;
  }
  return tags;
}
