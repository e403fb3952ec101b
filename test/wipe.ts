/**
 * The middle server burns, over seeds: three hosts with rotations and gzip, two receivers on one folder between which hosts
 * move, a client whose server is away for a while, and at random moments receivers and forwarder are killed and everything
 * they had is removed. Then everything settles and it is checked what lies at the client.
 *
 *   bun run test/wipe.ts --from 1 --seeds 50     a seed that fails is told with its story; its folder is kept
 */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  unlinkSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs, promisify } from "node:util";
import { freePort } from "../bench/pipeline.ts";
import { createRandom, type Random } from "../bench/random.ts";
import { type Supervised, supervise } from "../bench/supervised.ts";

const ROOT = join(import.meta.dirname, "..");
const HOSTS = ["10.1.0.1", "10.1.0.2", "web-3.example.com"];
/** The host of each log: the first one has two. */
const LOGS = [0, 1, 2, 0];
const HEARTBEAT_SECONDS = 0.5;
/** A heartbeat on a busy machine, and the way from the client's folder to the answer. */
const SLACK_MS = 2_000;
/** From the start of a shipper to its first look on a busy machine. */
const START_MS = 20_000;
const LINES_PER_SECOND = 150;
const SETTLE_MS = 40_000;
const run = promisify(execFile);

/** What came of one seed. All but the first group must be 0. */
export interface Verdict {
  seed: number;
  written: number;
  wipes: number;
  /** Lines that came twice within the bound, and how many the bound allows. */
  twice: number;
  allowed: number;
  /** Bytes that the shippers said they ship again. */
  toldAgain: number;
  deleted: number;
  toldLost: number;
  seconds: number;

  missing: number;
  beyond: number;
  untold: number;
  conflicts: number;
  damaged: number;
  lostWrong: number;
  crashes: number;
  stories: string[];
}

/** One life of a log file: its lines have the numbers from `from` on. */
interface Life {
  from: number;
  lines: number;
  bytes: number;
  /** It was removed by an operator who did not ask what is delivered. */
  isDeleted?: boolean;
}

interface LogWriter {
  w: number;
  path: string;
  fd: number;
  lives: Life[];
  next: number;
  lengths: number[];
  /** When each line was written. */
  times: number[];
  isRotating?: boolean;
}

interface World {
  folder: string;
  random: Random;
  logs: LogWriter[];
  shippers: Supervised[];
  receivers: Supervised[];
  /** The number of the receiver that a host ships to. */
  receiverOf: number[];
  ports: number[];
  forwarder: Supervised;
  clock: number;
  /** When each line was seen at the client, each time; by log and number. */
  seen: number[][][];
  /** What lies or lay at the client. */
  names: Map<string, string>;
  wipes: number[];
  /** When a receiver (-1) or the shipper of a host was down: there was no heartbeat. */
  outages: { host: number; from: number; to: number }[];
  isAway: boolean;
  conflicts: number;
  damaged: number;
  history: string[];
}

const client = (world: World) => join(world.folder, "client");
const note = (world: World, text: string) =>
  world.history.push(`${new Date().toISOString().slice(11, 23)} ${text}`);
const sleep = (ms: number) => new Promise((resolve) => setTimeout(resolve, ms));

async function createWorld(seed: number): Promise<World> {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-wipe-"));
  const at = (...names: string[]) => join(folder, ...names);
  for (const name of ["server", "client", "taken", "output"]) mkdirSync(at(name));
  const ports = [await freePort(), await freePort()];
  writeFileSync(at("token"), "a-token-of-this-test\n", { mode: 0o600 });
  const script = (name: string, label: string, config: string, ...flags: string[]) =>
    supervise(label, process.execPath, ["run", join(ROOT, `${name}.ts`), "--config", config, ...flags], {
      log: at("output", `${label}.log`),
      cwd: folder,
    });
  const logs = LOGS.map((host, w): LogWriter => {
    const own = at(`host${host}`);
    mkdirSync(join(own, "logs"), { recursive: true });
    const path = join(own, "logs", w < HOSTS.length ? "access.log" : "api.log");
    return {
      w,
      path,
      fd: openSync(path, "a"),
      lives: [{ from: 0, lines: 0, bytes: 0 }],
      next: 0,
      lengths: [],
      times: [],
    };
  });
  const receiverOf = [0, 1, 0];
  configureServer(folder, ports, receiverOf);
  const world: World = {
    ...{ folder, random: createRandom(seed), logs, clock: Date.UTC(2026, 10, 22, 6), wipes: [] },
    ...{ ports, receiverOf, shippers: [] },
    receivers: [],
    forwarder: script("forwarder", "forwarder", at("server.json")),
    seen: LOGS.map(() => []),
    ...{ outages: [], names: new Map(), isAway: false, conflicts: 0, damaged: 0, history: [] },
  };
  world.receivers = ports.map((port, i) =>
    script("receiver", `receiver${i}`, at("server.json"), "--port", String(port)),
  );
  for (const i of HOSTS.keys()) {
    configureShipper(world, i);
    world.shippers.push(script("shipper", `shipper${i}`, at(`shipper${i}.json`)));
  }
  return world;
}

/** One config for both receivers, as on a middle server: each has the hosts of its port, and one that never comes. */
function configureServer(folder: string, ports: number[], receiverOf: number[]): void {
  const at = (...names: string[]) => join(folder, ...names);
  const dir = at("server", "batches");
  const groups = ports.map((port, i) => ({
    port,
    senders: [`10.2.0.${i}`, ...HOSTS.filter((_, host) => receiverOf[host] === i)],
  }));
  const server = {
    receiver: {
      ...{ groups, dir, windowMinutes: 2, sealAfterSeconds: 0.3, sealLatestSeconds: 4 },
      tokens: { "*": { file: at("token") } },
    },
    forwarder: {
      ...{ dir, target: `file://${at("client")}`, intervalSeconds: 0.2, retryDelaySeconds: 0.1 },
      report: at("server", "report.log"),
    },
  };
  writeFileSync(at("server.json"), JSON.stringify(server));
}

function configureShipper({ folder, logs, ports, receiverOf }: World, i: number): void {
  const shipper = {
    files: logs.filter(({ w }) => LOGS[w] === i).map(({ path }) => path),
    ...{ receiver: `http://127.0.0.1:${ports[receiverOf[i] ?? 0]}`, host: HOSTS[i], flushMs: 20 },
    stateDir: join(folder, `host${i}`, "state"),
    token: { file: join(folder, "token") },
    ...{ chunkBytes: [4096, 16_384, 1_048_576][i], compression: ["zstd", "gzip", "none"][i] },
    ...{ heartbeatSeconds: HEARTBEAT_SECONDS, pollSeconds: 0.2, rotateWaitSeconds: 0.3, timeoutSeconds: 3 },
  };
  writeFileSync(join(folder, `shipper${i}.json`), JSON.stringify({ shipper }));
}

// ---- the hosts

/** A minute of the log passes in a second. */
function write(world: World, log: LogWriter, count: number): void {
  const { random } = world;
  const life = log.lives.at(-1) as Life;
  let text = "";
  for (let i = 0; i < count; i++) {
    const late = random.chance(0.02) ? random.between(1, 3) * 60_000 : 0;
    const time = new Date(world.clock - late)
      .toUTCString()
      .slice(5, 25)
      .replace(/^(..) (...) (....) /, "$1/$2/$3:");
    const label = `/w${log.w}/g${log.lives.length - 1}/n${log.next++}/`;
    const line = `10.0.0.1 - - [${time} +0000] "GET ${label} HTTP/1.1" 200 5 "-" "${"x".repeat(random.between(5, 60))}"\n`;
    log.lengths.push(line.length);
    log.times.push(Date.now());
    text += line;
  }
  writeSync(log.fd, text);
  life.lines += count;
  life.bytes += text.length;
}

/** Rotates as logrotate does; `.1` is compressed when `gzip` says so, else with a later rotation or never. */
async function rotate(world: World, log: LogWriter, gzip: boolean): Promise<void> {
  while (log.isRotating) await sleep(20);
  log.isRotating = true;
  try {
    await rotateNow(world, log, gzip);
  } finally {
    log.isRotating = false;
  }
}

async function rotateNow(world: World, log: LogWriter, gzip: boolean): Promise<void> {
  const numbered = rotatedOf(log).sort((a, b) => b.number - a.number);
  for (const { number, end } of numbered)
    renameSync(`${log.path}.${number}${end}`, `${log.path}.${number + 1}${end}`);
  renameSync(log.path, `${log.path}.1`);
  const old = log.fd;
  log.fd = openSync(log.path, "a");
  log.lives.push({ from: log.next, lines: 0, bytes: 0 });
  closeSync(old);
  if (gzip) await compress(`${log.path}.1`);
  else if (world.random.chance(0.5) && existsSync(`${log.path}.2`)) await compress(`${log.path}.2`);
}

function rotatedOf(log: LogWriter): { number: number; end: string }[] {
  const folder = join(log.path, "..");
  const pattern = new RegExp(`^${log.path.split("/").at(-1)}\\.(\\d+)(\\.gz)?$`);
  return readdirSync(folder)
    .map((name) => pattern.exec(name))
    .filter((match) => match !== null)
    .map(([, number, end = ""]) => ({ number: Number(number), end }));
}

async function compress(path: string): Promise<void> {
  await run("gzip", ["-1", path]);
}

/** Somebody removes the oldest rotated file without asking. */
function removeOldest(world: World, log: LogWriter): void {
  const [oldest] = rotatedOf(log).sort((a, b) => b.number - a.number);
  if (!oldest || log.isRotating) return;
  const life = log.lives[log.lives.length - 1 - oldest.number];
  if (!life || life.isDeleted) return;
  life.isDeleted = true;
  unlinkSync(`${log.path}.${oldest.number}${oldest.end}`);
  note(world, `removed ${log.path}.${oldest.number}${oldest.end} of ${life.bytes} bytes`);
}

// ---- the client

/** Notes what is new at the client; with `take` it goes on to the client's own place. */
function lookAtClient(world: World, take = false): void {
  const folder = client(world);
  if (world.isAway) return;
  for (const name of readdirSync(folder)) {
    if (name.endsWith(".tmp")) continue;
    const path = join(folder, name);
    const key = `${name} ${statSync(path).ino}`;
    if (!world.names.has(key)) {
      world.names.set(key, "");
      noteFile(world, name, readFileSync(path));
    }
    if (take) renameSync(path, join(world.folder, "taken", name));
  }
}

function noteFile(world: World, name: string, bytes: Buffer): void {
  const sha256 = createHash("sha256").update(bytes).digest("hex");
  const before = world.names.get(name);
  if (before === sha256) return; // the rename was never answered: the same content under the same name
  if (before !== undefined) {
    world.conflicts++;
    note(world, `two contents: ${name}`);
  }
  world.names.set(name, sha256);
  const at = Date.now();
  for (const line of bytes.toString("latin1").split("\n").slice(0, -1)) {
    const [, w, n] = /^10\.0\.0\.1 .*\/w(\d+)\/g\d+\/n(\d+)\/ .*"$/.exec(line) ?? [];
    const log = world.seen[Number(w)];
    if (!log || line.length + 1 !== world.logs[Number(w)]?.lengths[Number(n)]) {
      world.damaged++;
      note(world, `damaged in ${name}: ${line.slice(0, 100)}`);
      continue;
    }
    const times = log[Number(n)] ?? [];
    log[Number(n)] = times;
    times.push(at);
  }
}

function toggleClient(world: World): void {
  const [from, to] = [client(world), `${client(world)}.away`];
  if (world.isAway) {
    unlinkSync(from);
    renameSync(to, from);
  } else {
    lookAtClient(world);
    renameSync(from, to);
    writeFileSync(from, ""); // a folder that is missing would be made
  }
  world.isAway = !world.isAway;
  note(world, world.isAway ? "client away" : "client back");
}

// ---- the loss

/** Receivers and forwarder are killed, everything of theirs is removed, and they start again. */
async function wipe(world: World, removes?: LogWriter): Promise<void> {
  const { random, folder } = world;
  const victims = [...world.receivers, world.forwarder];
  if (victims.some(({ pid }) => pid === undefined)) return;
  const isWhole = random.chance(0.5);
  world.wipes.push(Date.now());
  note(world, `wiped ${isWhole ? "with its folder" : "but for its folder"}`);
  const isEmpty = Promise.withResolvers<void>();
  const back: Promise<void>[] = [];
  const dead = victims.map((victim) => {
    const isDead = Promise.withResolvers<void>();
    const meanwhile = () => {
      isDead.resolve();
      return isEmpty.promise;
    };
    back.push(victim.kill(random.between(0, 1200), meanwhile));
    return isDead.promise;
  });
  await Promise.all(dead);
  lookAtClient(world);
  for (const name of readdirSync(join(folder, "server")))
    rmSync(join(folder, "server", name), { recursive: true });
  if (!isWhole) mkdirSync(join(folder, "server", "batches"));
  if (removes) removeOldest(world, removes);
  isEmpty.resolve();
  await Promise.all(back);
}

// ---- one seed

/** Runs one seed to its verdict; its folder goes when all is well. */
export async function runWipe(seed: number, { steps = 12, canDelete = true } = {}): Promise<Verdict> {
  const started = Date.now();
  const world = await createWorld(seed);
  const all = [...world.shippers, ...world.receivers, world.forwarder];
  let last = Date.now();
  let isOver = false;
  const writing = (async () => {
    for (let owed = 0; !isOver; await sleep(20)) {
      const passed = Date.now() - last;
      last += passed;
      world.clock += passed * 60;
      owed += (passed * LINES_PER_SECOND) / 1000;
      for (const log of world.logs) if (owed >= 1) write(world, log, Math.min(200, Math.floor(owed)));
      owed %= 1;
      lookAtClient(world);
    }
  })();
  try {
    await firstLines(world);
    await trouble(world, steps, canDelete);
    isOver = true;
    await writing;
    if (world.isAway) toggleClient(world);
    await settle(world);
  } finally {
    isOver = true;
    await writing;
    await Promise.all(all.map((one) => one.stop()));
    for (const { fd } of world.logs) closeSync(fd);
  }
  const verdict = judge(world, seed, all, (Date.now() - started) / 1000);
  if (isFine(verdict)) rmSync(world.folder, { recursive: true, force: true });
  else verdict.stories.push(`kept: ${world.folder}`, ...world.history);
  return verdict;
}

/** Files that were rotated before the very first start are history by design: what follows waits for that. */
async function firstLines({ folder }: World): Promise<void> {
  const hasBatch = (host: string) => {
    const own = join(folder, "server", "batches", host);
    return existsSync(own) && readdirSync(own).some((name) => name.includes(".log"));
  };
  for (const deadline = Date.now() + 30_000; !HOSTS.every(hasBatch); await sleep(20))
    if (Date.now() > deadline) throw new Error(`it did not start: ${folder}`);
}

async function trouble(world: World, steps: number, canDelete: boolean): Promise<void> {
  const { random } = world;
  const busy: Promise<unknown>[] = [];
  const wipeAt = new Set([
    random.between(2, steps - 1),
    random.between(2, steps - 1),
    random.between(2, steps - 1),
  ]);
  for (let step = 0; step < steps; step++) {
    await sleep(random.between(50, 900));
    const log = random.pick(world.logs);
    if (wipeAt.has(step)) busy.push(wipe(world, canDelete && random.chance(0.2) ? log : undefined));
    const what = random.between(0, 12);
    if (what < 5) await rotate(world, log, random.chance(0.5));
    else if (what < (world.isAway ? 8 : 6)) toggleClient(world);
    else if (what < 8) lookAtClient(world, true);
    else if (what < 9) busy.push(kill(world, random.between(0, HOSTS.length - 1), random.between(0, 800)));
    else if (what < 10) busy.push(kill(world, -1, random.between(0, 800)));
    else if (what < 11) busy.push(world.forwarder.kill(random.between(0, 800)));
    else if (what < 12) busy.push(move(world, random.between(0, HOSTS.length - 1)));
  }
  await Promise.all(busy);
}

/** A host goes on with the other receiver. */
async function move(world: World, host: number): Promise<void> {
  world.receiverOf[host] = 1 - (world.receiverOf[host] ?? 0);
  configureServer(world.folder, world.ports, world.receiverOf);
  configureShipper(world, host);
  note(world, `${HOSTS[host]} moves to receiver ${world.receiverOf[host]}`);
  const from = Date.now();
  await Promise.all(world.receivers.map((receiver) => receiver.kill(0))); // they read the config anew
  world.outages.push({ host: -1, from, to: Date.now() });
  await kill(world, host, 0);
}

/** Kills the shipper of a host, or one of the receivers (-1), for a while. */
async function kill(world: World, host: number, ms: number): Promise<void> {
  const outage = { host, from: Date.now(), to: Number.POSITIVE_INFINITY };
  world.outages.push(outage);
  await (world.shippers[host] ?? world.random.pick(world.receivers)).kill(ms);
  outage.to = Date.now();
}

/** Waits until every line is at the client and nothing waits, or nothing moves any more. */
async function settle(world: World): Promise<void> {
  let before = "";
  for (let since = Date.now(); Date.now() - since < SETTLE_MS; await sleep(100)) {
    lookAtClient(world);
    const now = `${world.names.size}`;
    if (now !== before) since = Date.now();
    before = now;
    const isAll = findMissing(world).length === 0 && waiting(world) === 0;
    if (isAll && Date.now() - since > 2500) return;
  }
}

function waiting({ folder }: World): number {
  const dir = join(folder, "server", "batches");
  if (!existsSync(dir)) return 0;
  return [...HOSTS, "failed"].reduce((sum, name) => {
    const own = join(dir, name);
    return (
      sum + (existsSync(own) ? readdirSync(own).filter((each) => /\.log(\.part)?$/.test(each)).length : 0)
    );
  }, 0);
}

function findMissing({ logs, seen }: World): string[] {
  const missing: string[] = [];
  for (const { w, lives } of logs) {
    for (const [g, life] of lives.entries()) {
      for (let n = life.from; n < life.from + life.lines && !life.isDeleted; n++)
        if (!seen[w]?.[n]) missing.push(`w${w} g${g} n${n}`);
    }
  }
  return missing;
}

// ---- the verdict

export function isFine(verdict: Verdict): boolean {
  const { missing, beyond, untold, conflicts, damaged, lostWrong, crashes } = verdict;
  return missing + beyond + untold + conflicts + damaged + lostWrong + crashes === 0;
}

/**
 * Up to where the file of a life was delivered as of `heartbeatSeconds` before each loss: what lies behind may come twice
 * by that loss. What an earlier loss made come again counts as delivered when it came again.
 */
function boundsOf(world: World, w: number, life: Life): number[] {
  const { wipes, seen } = world;
  const bounds: number[] = [];
  let bound = life.from;
  for (const [i, at] of wipes.entries()) {
    const since = wipes[i - 1] ?? 0;
    const until = heardBefore(world, LOGS[w] as number, at);
    const isThere = (n: number) => seen[w]?.[n]?.some((time) => time > since && time <= until);
    while (bound < life.from + life.lines && isThere(bound)) bound++;
    bounds.push(bound);
  }
  return bounds;
}

/** A time before which the host's last heartbeat before `at` was not, however late it came. */
function heardBefore({ outages }: World, host: number, at: number): number {
  const late = HEARTBEAT_SECONDS * 1000 + SLACK_MS;
  let time = at - late;
  for (const outage of outages.toSorted((a, b) => b.from - a.from)) {
    const concerns = outage.host === -1 || outage.host === host;
    if (concerns && time > outage.from - late && time < outage.to + late) time = outage.from - late;
  }
  return time;
}

function judge(world: World, seed: number, all: Supervised[], seconds: number): Verdict {
  const missing = findMissing(world);
  const output = HOSTS.map((_, i) => readFileSync(join(world.folder, "output", `shipper${i}.log`), "utf8"));
  const verdict: Verdict = {
    ...{ seed, seconds, wipes: world.wipes.length, missing: missing.length, stories: missing.slice(0, 5) },
    ...{ twice: 0, allowed: 0, toldAgain: 0, deleted: 0, toldLost: 0, beyond: 0, untold: 0, lostWrong: 0 },
    ...{ conflicts: world.conflicts, damaged: world.damaged },
    written: world.logs.reduce((sum, { next }) => sum + next, 0),
    crashes: all.reduce((sum, { crashes }) => sum + crashes, 0),
  };
  for (const [host, text] of output.entries()) {
    const told = bytesIn(text, "receiver has lost lines: shipping them again");
    const twiceBytes = judgeLines(world, host, verdict);
    verdict.toldAgain += told;
    // A shipper that was killed before it saved an answer knows of nothing that it ships again.
    if (twiceBytes <= told || (world.shippers[host]?.kills ?? 0) > 0) continue;
    verdict.untold += twiceBytes - told;
    verdict.stories.push(`${HOSTS[host]}: ${twiceBytes} bytes twice, told ${told}`);
  }
  judgeLost(world, output, verdict);
  return verdict;
}

/** Counts what came twice of a host; gives its bytes. */
function judgeLines(world: World, host: number, verdict: Verdict): number {
  let bytes = 0;
  for (const { w, lives, lengths } of world.logs.filter((log) => LOGS[log.w] === host)) {
    for (const [g, life] of lives.entries()) {
      const bounds = boundsOf(world, w, life);
      for (let n = life.from; n < life.from + life.lines; n++) {
        const times = world.seen[w]?.[n] ?? [];
        const most = bounds.filter((bound) => n >= bound).length;
        const again = Math.max(0, times.length - 1);
        verdict.allowed += times.length > 0 ? most : 0;
        verdict.twice += Math.min(again, most);
        bytes += again * (lengths[n] ?? 0);
        if (again <= most) continue;
        verdict.beyond += again - most;
        if (verdict.stories.length < 12)
          verdict.stories.push(`w${w} g${g} n${n} came ${times.length} times, ${bounds}`);
      }
    }
  }
  return bytes;
}

/**
 * What a removed file took with it is told: no less than what is missing of it, as far as a shipper could see it before it
 * was killed, and no more than was not delivered as of the
 * heartbeat before the loss. Where nothing was removed, nothing is lost.
 */
function judgeLost(world: World, output: string[], verdict: Verdict): void {
  for (const host of HOSTS.keys()) {
    const { lost } = JSON.parse(
      readFileSync(join(world.folder, `host${host}`, "state", "cursor.json"), "utf8").replace(
        /^[0-9a-f]{8} /,
        "",
      ),
    );
    let least = 0;
    let most = 0;
    for (const { w, lives, lengths, times } of world.logs.filter((log) => LOGS[log.w] === host)) {
      for (const life of lives.filter(({ isDeleted }) => isDeleted)) {
        const bound = Math.min(...boundsOf(world, w, life));
        verdict.deleted += life.bytes;
        for (let n = life.from; n < life.from + life.lines; n++) {
          if (!world.seen[w]?.[n] && wasNoted(world, host, times[n] ?? 0)) least += lengths[n] ?? 0;
          if (n >= bound) most += lengths[n] ?? 0;
        }
      }
    }
    verdict.toldLost += lost;
    const logged = bytesIn(output[host] ?? "", "bytes lost: they were gone before they could be read");
    if (lost >= least && lost <= most && logged >= lost) continue;
    verdict.lostWrong++;
    verdict.stories.push(
      `${HOSTS[host]}: ${lost} bytes told as lost (${logged} in the log), expected ${least} to ${most}`,
    );
  }
}

/** Whether the shipper of a host has surely noted what was written at a time: not when it was killed just then. */
function wasNoted({ outages }: World, host: number, time: number): boolean {
  return !outages.some(
    (outage) => outage.host === host && time > outage.from - SLACK_MS && time < outage.to + START_MS,
  );
}

function bytesIn(text: string, message: string): number {
  let bytes = 0;
  for (const line of text.split("\n"))
    if (line.includes(message)) bytes += Number(/ bytes=(\d+)/.exec(line)?.[1] ?? 0);
  return bytes;
}

/** A verdict in one line, with its story when it is not fine. */
export function formatVerdict({ stories, ...counts }: Verdict): string {
  const fields = Object.entries(counts).map(([name, n]) => `${name} ${Math.round(n)}`);
  return [`${fields.join("  ")}${stories.length === 0 ? "" : "  FAILED"}`, ...stories].join("\n  ");
}

if (import.meta.main) {
  const { values } = parseArgs({
    options: { from: { type: "string" }, seeds: { type: "string" }, steps: { type: "string" } },
  });
  let failed = 0;
  const from = Number(values.from ?? 1);
  for (let seed = from; seed < from + Number(values.seeds ?? 50); seed++) {
    const verdict = await runWipe(seed, { steps: Number(values.steps ?? 14) });
    if (!isFine(verdict)) failed++;
    process.stdout.write(`${formatVerdict(verdict)}\n`);
  }
  process.stdout.write(failed === 0 ? "all fine\n" : `${failed} seeds failed\n`);
  process.exit(failed === 0 ? 0 : 1);
}
