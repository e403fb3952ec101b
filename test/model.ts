/**
 * A seeded random interpreter of what can happen to a log file, run against the real shipper (its passes, with a
 * clock of our own) and a receiver in memory, beside a model of which lines must arrive.
 *
 *   bun run test/model.ts --seeds 2000 [--from 1]     a failing seed prints its shortened list of actions
 */
import {
  appendFileSync,
  closeSync,
  copyFileSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { gunzipSync, gzipSync, zstdDecompressSync } from "node:zlib";
import { parseChunkHeaders, parseNews } from "../lib/chunk.ts";
import { parseConfig } from "../lib/config.ts";
import { createLog } from "../lib/service.ts";
import { readCursor } from "../lib/tail/cursor.ts";
import { openShipper, type Shipper, saveCursor, shipOnce } from "../shipper.ts";
import { isChunk, Wire } from "./wire.ts";

/** One thing that happens; `n` is a number that the action reads as it likes. */
export interface Action {
  name: keyof typeof ACTIONS;
  n: number;
}

/** mulberry32: small, seeded, good enough to choose actions. */
export function createRandom(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// ---- the receiver in memory

interface Receiver {
  url: string;
  /** Bodies in the order in which they were committed. */
  text: string;
  readonly lost: number;
  mode: "here" | "away" | "answer lost" | "too large" | "portal";
  requests: number;
  forget(stream: string): void;
  close(): void;
}

/** Keeps the contract of DESIGN section 4 and nothing else. */
export function startReceiver(): Receiver {
  const wire = new Wire();
  const pieces = new Map<string, string>();
  const receiver: Receiver = {
    url: "",
    text: "",
    get lost() {
      return wire.lost;
    },
    mode: "here",
    requests: 0,
    forget: (stream) => void wire.streams.delete(stream),
    close: () => server.stop(true),
  };
  const server = Bun.serve({
    hostname: "127.0.0.1",
    port: 0,
    async fetch(request) {
      receiver.requests++;
      if (receiver.mode === "away") return new Response("away", { status: 503 });
      if (receiver.mode === "portal") return new Response("<html>log in</html>");
      if (!isChunk(request)) {
        wire.hear(parseNews(request.headers));
        return wire.tell(request);
      }
      const chunk = parseChunkHeaders(request.headers);
      const { stream, offset, end } = chunk;
      const raw = new Uint8Array(await request.arrayBuffer());
      if (receiver.mode === "too large" && end - offset > 4096) return new Response("", { status: 413 });
      const encoding = request.headers.get("Content-Encoding");
      const body =
        encoding === "zstd" ? zstdDecompressSync(raw) : encoding === "gzip" ? gunzipSync(raw) : raw;
      const answer = wire.take(chunk, 0, () => {
        const text = (pieces.get(stream) ?? "") + Buffer.from(body).toString("latin1");
        const whole = text.lastIndexOf("\n") + 1;
        receiver.text += text.slice(0, whole).replaceAll("\0", ""); // those before a line: what a power loss left
        pieces.set(stream, text.slice(whole)); // a piece of a long line waits for the rest
      });
      if (answer.status !== 200 || receiver.mode !== "answer lost") return answer;
      receiver.mode = "here";
      return new Response("lost", { status: 502 });
    },
  });
  receiver.url = `http://127.0.0.1:${server.port}`;
  return receiver;
}

// ---- the world: files, writer, shipper

/** The first line of many files, as a health check's is: files that begin alike are not the same. */
const COMMON = `same ${"z".repeat(60)}\n`;

interface World {
  folder: string;
  receiver: Receiver;
  shipper: Shipper | undefined;
  /** The writer's descriptor, and whether it appends (a writer without O_APPEND leaves holes). */
  fd: number;
  /** The live file was truncated since it was made. */
  truncated: boolean;
  /** Where a writer without O_APPEND stands, by descriptor. */
  positions: Map<number, number>;
  /** Descriptor of the file before the last rotation, while its writer has not let go of it. */
  old: number | undefined;
  /** Start of a line that is not ended yet, by descriptor. */
  half: Map<number, string>;
  nextLine: number;
  /** How often the common first line was written, and how often it was in files that were destroyed. */
  common: { written: number; destroyed: number };
  /** Every whole line that was written. */
  written: Set<string>;
  /** Lines that were destroyed before they were delivered. */
  destroyed: Set<string>;
  /** Bytes of holes in files that were destroyed: they may be counted as lost, as nobody had looked into them. */
  holes: number;
  /** How often the shipper ended without saving. */
  kills: number;
  /** So many bytes may come twice: the host lost or rewrote what was shipped. */
  mayRepeat: number;
  /** What the host was at a time: log files by inode, and the state folder. */
  snapshot:
    | { files: { name: string; ino: number; bytes: Buffer; mtime: Date }[]; state: [string, Buffer][] }
    | undefined;
  clock: number;
  log: string[];
}

/** Logs beside the live one, by a glob: their names differ by a number, as rotations do. */
const SIBLINGS = ["side.log", "side-2.log", "side-8080.log"];
/** Made of lines of the live log by hand: nobody's rotation. */
const EXTRACT = "access.log-10.0.0.1";
/** Further names of the live log that the glob matches. */
const LINKS = ["side-link.log", "side-hard.log"];
const sibling = (world: World, n: number) =>
  join(world.folder, "logs", SIBLINGS[n % SIBLINGS.length] as string);
const live = (world: World) => join(world.folder, "logs", "access.log");
const stateDir = (world: World) => join(world.folder, "state");
const now = (world: World) => Date.now() + world.clock;

function write(world: World, fd: number, text: string): void {
  const position = world.positions.get(fd);
  const bytes = position === undefined ? writeSync(fd, text) : writeSync(fd, text, position);
  if (position !== undefined) world.positions.set(fd, position + bytes);
}

function newLine(world: World, length: number): string {
  const number = world.nextLine++;
  const start = `line ${number} ${"y".repeat(30)}`; // a hole is known by its NULs: no line of nginx is shorter
  // A mark of a kilobyte of one byte would not say where in such a line it stands.
  const rest = length > 1000 ? countUp(length) : "y".repeat(length);
  return `${start}${rest}\n`;
}

function countUp(length: number): string {
  return Array.from({ length: Math.ceil(length / 4) }, (_, i) => String(i).padStart(4, "0"))
    .join("")
    .slice(0, length);
}

function writeLine(world: World, fd: number, length: number): void {
  const half = world.half.get(fd);
  if (half !== undefined) {
    write(world, fd, half.slice(half.length >> 1));
    world.half.delete(fd);
    world.written.add(half);
    return;
  }
  const line = newLine(world, length);
  write(world, fd, line);
  world.written.add(line);
}

function rotatedNames(world: World): string[] {
  return readdirSync(join(world.folder, "logs"))
    .filter((name) => /^access\.log\.\d+(\.gz)?$/.test(name))
    .sort((a, b) => Number(b.split(".")[2]) - Number(a.split(".")[2]));
}

function shiftNames(world: World): void {
  for (const name of rotatedNames(world)) {
    const [, , number, gz] = name.split(".");
    const next = `access.log.${Number(number) + 1}${gz ? ".gz" : ""}`;
    renameSync(join(world.folder, "logs", name), join(world.folder, "logs", next));
  }
}

function openLive(world: World): void {
  world.fd = openSync(live(world), "a");
  world.positions.delete(world.fd);
  world.truncated = false;
}

function contentOf(path: string): string {
  const bytes = readFileSync(path);
  return (path.endsWith(".gz") ? gunzipSync(bytes) : bytes).toString("latin1");
}

/** Lines of a file that the receiver does not have. */
function undelivered(world: World, path: string): string[] {
  return contentOf(path)
    .replace(/\0+/g, "")
    .split(/(?<=\n)/)
    .filter((line) => world.written.has(line) && !hasLine(world, line));
}

function hasLine(world: World, line: string): boolean {
  return world.receiver.text.startsWith(line) || world.receiver.text.includes(`\n${line}`);
}

async function startShipper(world: World): Promise<void> {
  world.clock = 0; // a start without a cursor compares its clock with the file system's
  const config = parseConfig(
    JSON.stringify({
      shipper: {
        files: [live(world), join(world.folder, "logs", "side*.log")],
        receiver: world.receiver.url,
        host: "10.0.0.1",
        stateDir: stateDir(world),
        chunkBytes: 8192,
        rotateWaitSeconds: 5,
        pollSeconds: 5,
      },
    }),
    "shipper",
  );
  world.shipper = await openShipper(config, {
    log: createLog((line) => world.log.push(line)),
    signal: new AbortController().signal,
    now: () => now(world),
    mono: () => now(world),
  });
}

async function pass(world: World): Promise<boolean> {
  world.shipper ?? (await startShipper(world));
  return (await shipOnce(world.shipper as Shipper)).atEnd;
}

/** The end of the process: what is open is closed, and nothing is saved. */
async function kill(world: World): Promise<void> {
  world.kills++;
  for (const stream of world.shipper?.streams.list ?? []) await stream.file?.close();
  for (const { file } of world.shipper?.looker.held.values() ?? []) await file?.close();
  world.shipper = undefined;
}

// ---- the actions

const ACTIONS = {
  write: (world: World, n: number) => {
    for (let i = 0; i <= n % 5; i++) writeLine(world, world.fd, n % 70);
  },
  burst: (world: World, n: number) => {
    for (let i = 0; i < 100 + (n % 200); i++) writeLine(world, world.fd, 60 + (n % 40));
  },
  commonFirstLine: async (world: World) => {
    // Not after a truncation: a file with nothing but what its copy has can't be told from one that was copied.
    if (statSync(live(world)).size > 0 || world.half.has(world.fd) || world.truncated) return;
    write(world, world.fd, COMMON);
    world.common.written++;
    await pass(world);
  },
  longLine: (world: World, n: number) => writeLine(world, world.fd, 9000 + (n % 20_000)),
  half: (world: World, n: number) => {
    if (world.half.has(world.fd)) return;
    const line = newLine(world, n % 50);
    write(world, world.fd, line.slice(0, line.length >> 1));
    world.half.set(world.fd, line);
  },
  writeOld: (world: World, n: number) => {
    if (world.old !== undefined) for (let i = 0; i <= n % 3; i++) writeLine(world, world.old, n % 40);
  },
  releaseOld: (world: World) => releaseOld(world),
  rotate: (world: World) => {
    releaseOld(world);
    shiftNames(world);
    renameSync(live(world), join(world.folder, "logs", "access.log.1"));
    world.old = world.fd;
    openLive(world);
  },
  copytruncate: (world: World) => copytruncate(world, true),
  copytruncateWithHole: (world: World) => copytruncate(world, false),
  writeSibling: (world: World, n: number) => {
    for (let i = 0; i <= n % 30; i++) {
      const line = newLine(world, n % 70);
      appendFileSync(sibling(world, n), line);
      world.written.add(line);
    }
  },
  rotateSibling: async (world: World, n: number) => {
    const path = sibling(world, n);
    if (!existsSync(path)) return;
    for (let k = 9; k >= 1; k--)
      if (existsSync(`${path}.${k}`)) renameSync(`${path}.${k}`, `${path}.${k + 1}`);
    renameSync(path, `${path}.1`);
    writeFileSync(path, ""); // as nginx does, at once
    tick();
  },
  link: (world: World, n: number) => {
    const path = join(world.folder, "logs", LINKS[n % 2] as string);
    if (existsSync(path)) return;
    if (n % 2 === 0) symlinkSync(live(world), path);
    else linkSync(live(world), path);
  },
  unlinkLinks: (world: World) => unlinkLinks(world),
  copyOverSibling: async (world: World, n: number) => {
    // Below 1,024 bytes a live file is nobody's copy: its lines would come again.
    const [from, to] = [live(world), sibling(world, n)];
    if (!existsSync(to) || world.half.has(world.fd) || world.truncated || world.old !== undefined) return;
    if (statSync(from).size < 1024) return;
    await pass(world);
    if (statSync(to).size === 0) return; // what comes into an empty log that is followed is new (README)
    for (const line of undelivered(world, to)) world.destroyed.add(line);
    if (undelivered(world, from).length > 0) return;
    copyFileSync(from, to);
    tick();
  },
  swapSibling: (world: World, n: number) => {
    const path = sibling(world, n);
    if (!existsSync(path) || world.half.has(world.fd) || world.truncated || world.old !== undefined) return;
    unlinkLinks(world);
    closeSync(world.fd);
    renameSync(live(world), `${path}.swap`);
    renameSync(path, live(world));
    renameSync(`${path}.swap`, path);
    openLive(world);
  },
  forget: async (world: World) => {
    if (world.receiver.mode !== "here" || world.half.has(world.fd)) return;
    if (!(await pass(world))) return;
    (world.shipper as Shipper).askNow = true; // so that it knows that all of it is delivered
    await pass(world);
    await saveCursor(world.shipper as Shipper);
    const stream = world.shipper?.streams.list.find((each) => each.isLive && each.path === live(world));
    if (!stream?.id || undelivered(world, live(world)).length > 0) return;
    world.receiver.forget(stream.id);
    world.snapshot = undefined; // nobody knows any more what came after it
    writeLine(world, world.fd, 0);
    for (let tries = 0; tries < 4; tries++) await pass(world);
    await saveCursor(world.shipper as Shipper);
  },
  compress: (world: World) => compressOldest(world),
  unfinishedGzip: async (world: World) => {
    const name = rotatedNames(world).find((candidate) => !candidate.endsWith(".gz"));
    if (!name || world.old !== undefined) return;
    const path = join(world.folder, "logs", name);
    const packed = gzipSync(readFileSync(path));
    writeFileSync(`${path}.gz`, packed.subarray(0, packed.length >> 1));
    await pass(world);
    remove(`${path}.gz`);
    compressOldest(world);
  },
  lateGzip: async (world: World) => {
    const name = rotatedNames(world).find((candidate) => !candidate.endsWith(".gz"));
    if (!name || world.old !== undefined) return;
    const path = join(world.folder, "logs", name);
    const { mtime, nlink, size } = statSync(path);
    if (nlink > 1 && size < 1024) return; // as in compressOldest()
    const packed = gzipSync(readFileSync(path));
    writeFileSync(`${path}.gz`, packed.subarray(0, packed.length >> 1));
    remove(path);
    for (let n = 0; n < 3; n++) {
      await pass(world);
      world.clock += 4000;
    }
    writeFileSync(`${path}.gz`, packed);
    utimesSync(`${path}.gz`, mtime, mtime);
  },
  remove: (world: World) => {
    const [name] = rotatedNames(world);
    if (!name || (world.old !== undefined && rotatedNames(world).length === 1)) return;
    const path = join(world.folder, "logs", name);
    for (const line of undelivered(world, path)) world.destroyed.add(line);
    world.common.destroyed += contentOf(path).split(COMMON).length - 1;
    world.holes += /^\0*/.exec(contentOf(path))?.[0].length ?? 0;
    remove(path);
  },
  ship: async (world: World) => {
    await pass(world);
  },
  wait: async (world: World, n: number) => {
    await pass(world);
    world.clock += 1000 * (n % 8);
    await pass(world);
  },
  save: async (world: World) => {
    if (world.shipper) await saveCursor(world.shipper);
  },
  kill: (world: World) => kill(world),
  restart: async (world: World) => {
    if (world.shipper) await saveCursor(world.shipper);
    await kill(world);
  },
  damageCursor: async (world: World, n: number) => {
    await kill(world);
    const path = join(stateDir(world), "cursor.json");
    if (!existsSync(path)) return;
    if (n % 3 === 0) truncateSync(path, 0);
    else if (n % 3 === 1) truncateSync(path, statSync(path).size >> 1);
    else writeFileSync(path, Buffer.alloc(statSync(path).size));
  },
  loseState: async (world: World, n: number) => {
    // With the state goes what tells a rotated file that nobody has read yet from one of before the first start.
    if (world.old !== undefined || world.receiver.mode !== "here") return;
    do world.clock += 6000;
    while (!(await pass(world)));
    await kill(world);
    for (const name of readdirSync(stateDir(world))) {
      const path = join(stateDir(world), name);
      if (n % 2 === 0) truncateSync(path, 0);
      else writeFileSync(path, Buffer.alloc(statSync(path).size));
    }
    await pass(world);
    if (world.shipper) await saveCursor(world.shipper);
  },
  away: (world: World) => {
    world.receiver.mode = "away";
  },
  here: (world: World) => {
    world.receiver.mode = "here";
  },
  loseAnswer: (world: World) => {
    if (world.receiver.mode === "here") world.receiver.mode = "answer lost";
  },
  portal: (world: World) => {
    if (world.receiver.mode === "here") world.receiver.mode = "portal";
  },
  snapshot: async (world: World) => {
    if (world.half.size > 0 || world.old !== undefined || world.positions.has(world.fd)) return;
    unlinkLinks(world);
    await pass(world);
    await saveCursor(world.shipper as Shipper);
    const files = readdirSync(join(world.folder, "logs")).map((name) => {
      const path = join(world.folder, "logs", name);
      const { ino, mtime } = statSync(path);
      return { name, ino, mtime, bytes: readFileSync(path) };
    });
    const state = readdirSync(stateDir(world)).map((name): [string, Buffer] => [
      name,
      readFileSync(join(stateDir(world), name)),
    ]);
    world.snapshot = { files, state };
  },
  restore: (world: World) => restore(world),
  cutTail: (world: World, n: number) => loseTail(world, n, false),
  nulTail: (world: World, n: number) => loseTail(world, n, true),
  sedInPlace: async (world: World, n: number) => {
    if (world.half.has(world.fd) || world.truncated) return;
    const all = contentOf(live(world)).split(/(?<=\n)/);
    if (all.join("").includes("\0")) return;
    const at = n % Math.max(1, all.length);
    const line = all[at];
    if (!line || line === COMMON) return;
    if (!hasLine(world, line)) world.destroyed.add(line);
    const others = all.slice(at).join("").length; // they stand elsewhere now: other bytes
    world.mayRepeat += others + Math.max(LIMIT, others / 2);
    writeFileSync(`${live(world)}~`, all.toSpliced(at, 1).join(""), "latin1");
    closeSync(world.fd);
    tick();
    renameSync(`${live(world)}~`, live(world));
    openLive(world);
    await pass(world);
  },
  extract: (world: World, n: number) => {
    const all = contentOf(live(world)).split(/(?<=\n)/);
    const part = all.slice(n % Math.max(1, all.length)).filter((line) => line.endsWith("\n"));
    writeFileSync(join(world.folder, "logs", EXTRACT), part.join(""), "latin1");
  },
  swapRotated: (world: World) => {
    const plain = rotatedNames(world).filter((name) => !name.endsWith(".gz"));
    const [one, two] = plain.map((name) => join(world.folder, "logs", name));
    if (!one || !two || world.old !== undefined) return;
    renameSync(one, `${one}.swap`);
    renameSync(two, one);
    renameSync(`${one}.swap`, two);
  },
  tooLarge: (world: World) => {
    if (world.receiver.mode === "here") world.receiver.mode = "too large";
  },
};

function unlinkLinks(world: World): void {
  for (const name of LINKS) {
    const path = join(world.folder, "logs", name);
    if (!existsSync(path)) continue;
    if (lstatSync(path).nlink === 1 && !lstatSync(path).isSymbolicLink())
      for (const line of undelivered(world, path)) world.destroyed.add(line); // its last name
    remove(path);
  }
}

/** The whole host is what it was: files that are still there keep their inodes. */
async function restore(world: World): Promise<void> {
  const { snapshot } = world;
  if (!snapshot) return;
  world.half.clear();
  releaseOld(world);
  unlinkLinks(world);
  await kill(world);
  closeSync(world.fd);
  const folder = join(world.folder, "logs");
  const names = readdirSync(folder);
  const lost = names.reduce((sum, name) => sum + contentOf(join(folder, name)).length, 0);
  for (const name of names.filter((each) => each !== EXTRACT))
    for (const line of undelivered(world, join(folder, name))) world.destroyed.add(line);
  for (const name of names) world.common.destroyed += contentOf(join(folder, name)).split(COMMON).length - 1;
  const kept = snapshot.files.map((file) => file.bytes.toString("latin1"));
  const inodes = new Map(names.map((name) => [statSync(join(folder, name)).ino, name]));
  for (const { ino } of snapshot.files) {
    const name = inodes.get(ino);
    if (name !== undefined) renameSync(join(folder, name), join(folder, `kept-${ino}`));
  }
  for (const name of names) rmSync(join(folder, name), { force: true });
  tick();
  for (const { name, ino, bytes, mtime } of snapshot.files) {
    const path = join(folder, name);
    if (inodes.has(ino)) renameSync(join(folder, `kept-${ino}`), path);
    writeFileSync(path, bytes);
    utimesSync(path, mtime, mtime);
    for (const line of name === EXTRACT ? [] : contentOf(path).split(/(?<=\n)/)) world.destroyed.delete(line);
  }
  for (const [name, bytes] of snapshot.state) writeFileSync(join(stateDir(world), name), bytes);
  openLive(world);
  world.mayRepeat += Math.max(LIMIT, lost / 2);
  world.holes += kept.join("").length;
}

/** The newest lines of the live file are gone after a power loss, or NULs are in their place; or somebody cut them off. */
async function loseTail(world: World, n: number, isNul: boolean): Promise<void> {
  if (world.half.has(world.fd) || world.positions.has(world.fd)) return;
  const unsaved = await unsavedBytes(world);
  if (isNul || n % 2 === 0) await kill(world);
  const text = contentOf(live(world));
  const at = text.lastIndexOf("\n", Math.max(0, text.length - 1 - (n % 5000))) + 1;
  world.mayRepeat += unsaved; // a copytruncate may have come before the kill
  if (at >= text.length) return;
  for (const line of text
    .slice(at)
    .replaceAll("\0", "")
    .split(/(?<=\n)/))
    if (line !== COMMON && !hasLine(world, line)) world.destroyed.add(line);
  world.common.destroyed += text.slice(at).split(COMMON).length - 1;
  world.mayRepeat += Math.max(LIMIT, unsaved, (text.length - at) / 2);
  truncateSync(live(world), at);
  if (isNul) truncateSync(live(world), text.length);
  await pass(world);
}

/** What was shipped since the cursor was saved: on a real host, a second's chunks. */
async function unsavedBytes(world: World): Promise<number> {
  const found = await readCursor(stateDir(world)).catch(() => undefined);
  const streams = found && "cursor" in found ? found.cursor.streams : [];
  const saved = new Map(streams.map(({ id, offset }) => [id, offset]));
  const bytes = world.shipper?.streams.list.map(({ id, offset }) => offset - (saved.get(id) ?? 0)) ?? [];
  return bytes.reduce((sum, each) => sum + Math.max(0, each), 0);
}

function releaseOld(world: World): void {
  if (world.old === undefined) return;
  if (world.half.has(world.old)) writeLine(world, world.old, 0); // nginx ends its lines before it lets go
  closeSync(world.old);
  world.old = undefined;
}

/** Twice at most, of one loss: the larger of this, what was shipped since the cursor was saved, and half of what was lost. */
const LIMIT = 64 * 1024 + 8192;

/** As logrotate does it; the writer stands still meanwhile, so that nothing is destroyed by the truncation. */
function copytruncate(world: World, append: boolean): void {
  if (world.half.has(world.fd)) writeLine(world, world.fd, 0);
  releaseOld(world);
  shiftNames(world);
  copyFileSync(live(world), join(world.folder, "logs", "access.log.1"));
  const { size } = statSync(live(world));
  tick();
  truncateSync(live(world), 0);
  world.truncated = true;
  if (append) return;
  closeSync(world.fd);
  world.fd = openSync(live(world), "r+");
  world.positions.set(world.fd, size); // a writer without O_APPEND goes on where it was
}

function compressOldest(world: World): void {
  const name = rotatedNames(world).find((candidate) => !candidate.endsWith(".gz"));
  if (!name || (world.old !== undefined && name === "access.log.1")) return;
  const path = join(world.folder, "logs", name);
  const { mtime, nlink, size } = statSync(path);
  if (nlink > 1 && size < 1024) return; // below 1,024 bytes a copy of a file that is still there is a log of its own
  writeFileSync(`${path}.gz`, gzipSync(readFileSync(path)));
  utimesSync(`${path}.gz`, mtime, mtime);
  remove(path);
}

/**
 * Removes a file, and waits for the kernel's next tick: within one a new file may get the same inode and the
 * same time of birth, and no log is rotated away and replaced in 4 ms.
 */
function remove(path: string): void {
  unlinkSync(path);
  tick();
}

function tick(): void {
  for (const end = performance.now() + 5; performance.now() < end; );
}

const WEIGHTS: Partial<Record<keyof typeof ACTIONS, number>> = {
  write: 10,
  ship: 8,
  wait: 4,
  writeOld: 4,
  rotate: 3,
};

/** The actions of a seed. */
export function chooseActions(seed: number): Action[] {
  const random = createRandom(seed);
  const names = (Object.keys(ACTIONS) as Action["name"][]).flatMap((name) =>
    Array(WEIGHTS[name] ?? 1).fill(name),
  );
  return Array.from({ length: 10 + Math.floor(random() * 50) }, () => ({
    name: names[Math.floor(random() * names.length)] as Action["name"],
    n: Math.floor(random() * 1_000_000),
  }));
}

/** Runs actions in a new world. Gives what is wrong in the end, or undefined. */
export async function runActions(actions: Action[], trace = false): Promise<string | undefined> {
  const isPatient = (actions[0]?.n ?? 0) % 2 === 0; // a shipper without a cursor asks later when its process is young
  process.uptime = () => (isPatient ? 0 : 3600);
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-model-"));
  mkdirSync(join(folder, "logs"));
  const world: World = {
    ...{
      folder,
      receiver: startReceiver(),
      shipper: undefined,
      fd: -1,
      truncated: false,
      positions: new Map(),
      old: undefined,
    },
    ...{
      half: new Map(),
      nextLine: 1,
      written: new Set(),
      destroyed: new Set(),
      holes: 0,
      common: { written: 0, destroyed: 0 },
      kills: 0,
      mayRepeat: 0,
      snapshot: undefined,
      clock: 0,
      log: [],
    },
  };
  try {
    openLive(world);
    await pass(world); // the first start ever, with an empty file: all that follows is to be shipped
    await saveCursor(world.shipper as Shipper);
    for (const { name, n } of actions) {
      world.log.push(`> ${name} ${n}\n`);
      await ACTIONS[name](world, n);
    }
    await settle(world);
    const failure = judge(world);
    return failure && `${failure}\n${world.log.join("")}`;
  } catch (error) {
    return `threw: ${(error as Error).stack}`;
  } finally {
    if (trace) process.stdout.write(world.log.join(""));
    await kill(world);
    world.receiver.close();
    for (const fd of [world.fd, world.old]) if (fd !== undefined && fd >= 0) closeSync(fd);
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Everything comes back and gets its time. */
async function settle(world: World): Promise<void> {
  releaseOld(world);
  writeLine(world, world.fd, 0); // NULs at the end may be room that is not filled yet
  world.receiver.mode = "here";
  for (let quiet = 0, rounds = 0; quiet < 3; rounds++) {
    const before = world.receiver.text.length;
    const atEnd = await pass(world);
    world.clock += 6000;
    quiet = atEnd && world.receiver.text.length === before ? quiet + 1 : 0;
    if (rounds > 60) throw new Error("it does not come to rest");
  }
}

function judge(world: World): string | undefined {
  const counts = new Map<string, number>();
  for (const line of world.receiver.text.match(/[^\n]*\n|[^\n]+$/g) ?? [])
    counts.set(line, (counts.get(line) ?? 0) + 1);
  const common = counts.get(COMMON) ?? 0;
  counts.delete(COMMON);
  const { written, destroyed } = world.common;
  if ((common > written && world.mayRepeat === 0) || common < written - destroyed)
    return `the common line arrived ${common} times of ${written}`;
  let repeated = 0;
  for (const [line, count] of counts) {
    const shown = JSON.stringify(line.slice(0, 60));
    if (!world.written.has(line)) return `arrived, but was never written: ${shown} (${line.length} bytes)`;
    if (count > 1 && world.mayRepeat === 0) return `arrived ${count} times: ${shown}`;
    repeated += (count - 1) * line.length;
  }
  if (repeated > world.mayRepeat) return `${repeated} bytes came twice, ${world.mayRepeat} may`;
  const gone = [...world.written].filter((line) => !counts.has(line));
  const unexpected = gone.find((line) => !world.destroyed.has(line));
  if (unexpected)
    return `did not arrive: ${JSON.stringify(unexpected.slice(0, 60))} (${gone.length} lines in all)`;
  const numbers = [...counts.keys()].map((line) => Number(/\d+/.exec(line)?.[0]));
  const bytes = gone.reduce((sum, line) => sum + line.length, 0) + destroyed * COMMON.length;
  const told = Math.max(world.receiver.lost, world.shipper?.streams.lost ?? 0);
  // What is read again behind an older mark may be lost a second time. A shipper that is killed between telling and saving tells again.
  if (told > (bytes + world.holes + world.mayRepeat) * (1 + world.kills))
    return `${told} bytes told as lost, but only ${bytes} were`;
  return numbers.length === 0 && world.written.size > gone.length ? "nothing arrived" : undefined;
}

/** Takes away actions as long as the rest still fails. */
export async function shorten(actions: Action[]): Promise<Action[]> {
  let shortest = actions;
  for (let size = Math.max(1, shortest.length >> 1); size >= 1; size >>= 1) {
    for (let at = 0; at < shortest.length; ) {
      const candidate = [...shortest.slice(0, at), ...shortest.slice(at + size)];
      if ((await runActions(candidate)) !== undefined) shortest = candidate;
      else at += size;
    }
  }
  return shortest;
}

/** Runs seeds until one fails; gives its story. */
export async function runSeeds(
  from: number,
  count: number,
  until = Number.POSITIVE_INFINITY,
): Promise<{ ran: number; failure?: string }> {
  for (let seed = from; seed < from + count; seed++) {
    if (Date.now() > until) return { ran: seed - from };
    const actions = chooseActions(seed);
    const failure = await runActions(actions);
    if (failure === undefined) continue;
    const short = await shorten(actions);
    const list = short.map(({ name, n }) => `  ${name} ${n}`).join("\n");
    return {
      ran: seed - from,
      failure: `seed ${seed}: ${(await runActions(short)) ?? `once of two times: ${failure}`}\n${list}`,
    };
  }
  return { ran: count };
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: { seeds: { type: "string" }, from: { type: "string" }, trace: { type: "string" } },
  });
  if (values.trace) {
    const actions = await shorten(chooseActions(Number(values.trace)));
    process.stdout.write(`${await runActions(actions, true)}\n`);
    process.exit(1);
  }
  const { ran, failure } = await runSeeds(Number(values.from ?? 1), Number(values.seeds ?? 300));
  process.stdout.write(failure ? `${failure}\n` : `${ran} seeds: every line once\n`);
  process.exit(failure ? 1 : 0);
}
