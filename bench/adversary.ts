/**
 * Everything that goes wrong in the field, by chance that a seed decides: the same seed plans the same faults
 * with the same pauses between them. Each fault is written down with its time before it happens.
 */
import { existsSync, readdirSync, rmSync, statfsSync, statSync } from "node:fs";
import { rm, truncate, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type Pipeline, SILENT_SECONDS } from "./pipeline.ts";
import type { Random } from "./random.ts";

/** One fault: how often it comes in comparison with the others, and what it does; gives what it did. */
interface Fault {
  weight: number;
  act: (pipeline: Pipeline, random: Random) => Act;
}

/** What is about to happen, in words, and the doing of it. */
interface Act {
  text: string;
  run: (adversary: Adversary) => unknown;
}

/** A host that was made silent on purpose: its mails are checked in the end. */
export interface Outage {
  host: string;
  /** Milliseconds since the epoch: when it was silenced and when it was let go. */
  from: number;
  to: number;
}

/** A cursor that breaks, a host that is down and the loss of the receiver's folder are apart by so much: DESIGN bounds one at a time. */
const APART_MS = 15_000;

const FAULTS: Record<string, Fault> = {
  "kill a shipper": { weight: 12, act: (p, random) => kill(p.shippers, random, 5000) },
  "kill a receiver": { weight: 8, act: (p, random) => kill(p.receivers, random, 3000) },
  "kill the forwarder": { weight: 8, act: (p, random) => kill([p.forwarder], random, 3000) },
  "kill the monitor": { weight: 3, act: (p, random) => kill([p.monitor], random, 2000) },
  "kill housekeeping": { weight: 4, act: (p, random) => kill([p.housekeeping], random, 2000) },
  "break a cursor": { weight: 5, act: breakCursor },
  rotate: { weight: 25, act: rotate },
  "move a clock": { weight: 6, act: moveClock },
  "hush a writer": { weight: 4, act: hush },
  "bad uplink": { weight: 14, act: (p, random) => disturb(p.uplinks, "uplink", random) },
  "bad downlink": {
    weight: 10,
    act: (p, random) => disturb(p.downlink ? [p.downlink] : p.uplinks, "downlink", random),
  },
  "full disk": { weight: 3, act: fillDisk },
};

function kill(processes: Pipeline["processes"], random: Random, mostMs: number): Act {
  const victim = random.pick(processes);
  const downMs = random.between(100, mostMs);
  return { text: `SIGKILL ${victim.name}, down for ${downMs} ms`, run: () => victim.kill(downMs) };
}

function breakCursor(pipeline: Pipeline, random: Random): Act {
  const i = random.between(0, pipeline.shippers.length - 1);
  const how = random.pick(["emptied", "cut short", "full of NULs", "garbage"]);
  const names = random.chance(0.3) ? ["cursor.json", "cursor.json.previous"] : ["cursor.json"];
  const downMs = random.between(100, 2000);
  const run = (adversary: Adversary) => {
    if (Date.now() - (adversary.losses.at(-1) ?? 0) < APART_MS) return;
    adversary.brokenAt = Date.now();
    const path = (name: string) => join(pipeline.stateDirs[i] as string, name);
    return pipeline.shippers[i]?.kill(downMs, async () => {
      const isAll = names.length === 2 || !existsSync(path("cursor.json.previous"));
      if (isAll) adversary.forgets.push({ host: pipeline.writers[i]?.host ?? "", at: Date.now() });
      for (const name of names) await damage(path(name), how);
    });
  };
  return { text: `SIGKILL shipper ${i}, ${names.join(" and ")} ${how}`, run };
}

async function damage(path: string, how: string): Promise<void> {
  if (!existsSync(path)) return; // not saved yet
  const { size } = statSync(path);
  if (how === "emptied") await truncate(path, 0);
  else if (how === "cut short") await truncate(path, Math.floor(size / 2));
  else if (how === "full of NULs") await writeFile(path, Buffer.alloc(size));
  else await writeFile(path, "\x7fELF]{\n\xff,,,");
}

function rotate(pipeline: Pipeline, random: Random): Act {
  const w = random.between(0, pipeline.writers.length - 1);
  const kind = random.pick(["rename", "rename", "rename late create", "copytruncate"] as const);
  const gzip = random.pick(["never", "now", "later"] as const);
  const graceMs = random.between(0, 1000);
  return {
    text: `rotate log ${w}: ${kind} after ${graceMs} ms, gzip ${gzip}`,
    run: () => pipeline.writers[w]?.rotate(kind, gzip, graceMs),
  };
}

function moveClock(pipeline: Pipeline, random: Random): Act {
  const w = random.between(0, pipeline.writers.length - 1);
  const minutes = random.pick([20, 45, 90, 600, -15, -60]);
  return { text: `clock of writer ${w} ${minutes} min`, run: () => pipeline.writers[w]?.moveClock(minutes) };
}

function hush(pipeline: Pipeline, random: Random): Act {
  const w = random.between(0, pipeline.writers.length - 1);
  const ms = random.between(500, 5000);
  return { text: `writer ${w} quiet for ${ms} ms`, run: () => pipeline.writers[w]?.hush(ms) };
}

function disturb(proxies: Pipeline["uplinks"], what: string, random: Random): Act {
  const i = random.between(0, proxies.length - 1);
  const proxy = proxies[i];
  const ms = random.between(200, 6000);
  const bytes = random.between(1, 300_000);
  const [text, run] = random.pick([
    ["cut", () => proxy?.cut()],
    [`cut after ${bytes} bytes`, () => proxy?.cutAfter(bytes)],
    [`stalled for ${ms} ms`, () => proxy?.stall(ms)],
    [`refused for ${ms} ms`, () => proxy?.refuse(ms)],
  ] as const);
  return { text: `${what} ${i} ${text}`, run };
}

function fillDisk(pipeline: Pipeline, random: Random): Act {
  const ms = random.between(500, 5000);
  const left = random.pick([0, 0, 4096, 100_000]);
  const filler = join(pipeline.server, "..", "filler");
  const run = async () => {
    if (!pipeline.hasOwnDisk) return;
    const { bavail, bsize } = statfsSync(pipeline.server);
    await writeFile(filler, Buffer.alloc(Math.max(0, bavail * bsize - left))).catch(() => {}); // ENOSPC is the aim
    await sleep(ms);
    await rm(filler, { force: true });
  };
  return { text: `disk full but for ${left} bytes for ${ms} ms`, run };
}

/** A running adversary. */
export interface Adversary {
  /** What was done, oldest first. */
  history: string[];
  outages: Outage[];
  /** When the receiver's folder was lost, ms since the epoch. */
  losses: number[];
  /** When a host lost both saves of its cursor. */
  forgets: { host: string; at: number }[];
  /** When a cursor was broken last, and whether a host is silenced. */
  brokenAt: number;
  isSilencing: boolean;
  /** How many of each kind. */
  counts: Record<string, number>;
  /** Ends when all faults are over and everything is healed. */
  finished: Promise<void>;
}

/** Lets faults happen for `ms`; `note` is told of each before it happens. `losses`: how often the folder is lost. */
export function unleash(
  pipeline: Pipeline,
  random: Random,
  ms: number,
  note: (text: string) => void,
  losses?: number,
): Adversary {
  const counts: Record<string, number> = {};
  const adversary: Adversary = {
    ...{ history: [], outages: [], losses: [], forgets: [], brokenAt: 0, isSilencing: false },
    ...{ counts, finished: Promise.resolve() },
  };
  const tell = (text: string) => {
    adversary.history.push(text);
    note(text);
  };
  const ending = Date.now() + ms;
  const inHand = new Set<Promise<unknown>>();

  const faults = async () => {
    while (Date.now() < ending) {
      await sleep(random.between(100, 1200));
      const name = draw(random);
      const { text, run } = (FAULTS[name] as Fault).act(pipeline, random);
      counts[name] = (counts[name] ?? 0) + 1;
      tell(text);
      const task: Promise<unknown> = Promise.resolve(run(adversary)).finally(() => inHand.delete(task));
      inHand.add(task);
    }
  };
  const silences = async () => {
    await sleep(Math.min(ms * 0.3, 60_000));
    for (let i = 0; Date.now() < ending - SILENT_SECONDS * 3000; i++) {
      while (Date.now() - (adversary.losses.at(-1) ?? 0) < APART_MS) await sleep(100);
      adversary.isSilencing = true;
      const outage = await silence(pipeline, i % pipeline.shippers.length, tell);
      adversary.isSilencing = false;
      adversary.outages.push(outage);
      await sleep(Math.max(0, Math.min(60_000, ending - Date.now())));
    }
  };
  const count = losses ?? Math.max(1, Math.round(ms / 120_000));
  const lossAt = Array.from({ length: count }, (_, i) => {
    return ((i + 0.2 + 0.6 * random.fraction()) * ms) / count;
  });
  const loseFolders = async () => {
    for (const at of lossAt) {
      await sleep(Math.max(0, ending - ms + at - Date.now()));
      await loseFolder(pipeline, adversary, tell);
      counts["folder lost"] = (counts["folder lost"] ?? 0) + 1;
    }
  };
  adversary.finished = (async () => {
    await Promise.all([faults(), silences(), loseFolders()]);
    await Promise.all(inHand);
    for (const proxy of [...pipeline.uplinks, ...(pipeline.downlink ? [pipeline.downlink] : [])])
      proxy.heal();
  })();
  return adversary;
}

/** The disk of the middle server: all that writes there is killed, everything in the receiver's folder goes, all start again. */
async function loseFolder(
  pipeline: Pipeline,
  adversary: Adversary,
  tell: (text: string) => void,
): Promise<void> {
  const all = [...pipeline.receivers, pipeline.forwarder, pipeline.housekeeping];
  const isApart = () => !adversary.isSilencing && Date.now() - adversary.brokenAt > APART_MS;
  while (!isApart() || all.some(({ pid }) => pid === undefined)) await sleep(100);
  tell("the receiver's folder is lost");
  adversary.losses.push(Date.now());
  const dead = all.map(() => Promise.withResolvers<void>());
  const isEmpty = Promise.withResolvers<void>();
  const back = all.map((one, i) =>
    one.kill(500, () => {
      dead[i]?.resolve();
      return isEmpty.promise;
    }),
  );
  await Promise.all(dead.map(({ promise }) => promise));
  for (const name of readdirSync(pipeline.server)) rmSync(join(pipeline.server, name), { recursive: true });
  isEmpty.resolve();
  await Promise.all(back);
}

/** Takes a shipper down for longer than the monitor's patience, and SMTP while the alert is due. */
async function silence(pipeline: Pipeline, i: number, tell: (text: string) => void): Promise<Outage> {
  const host = pipeline.hosts[i] as string;
  const shipper = pipeline.shippers[i] as Pipeline["shippers"][number];
  while (shipper.pid === undefined) await sleep(100); // another fault has it just now
  tell(`shipper ${i} silenced, SMTP down`);
  const from = Date.now();
  const down = shipper.kill(SILENT_SECONDS * 2000);
  await pipeline.mailbox.down();
  await sleep((SILENT_SECONDS + 4) * 1000);
  tell("SMTP up");
  await pipeline.mailbox.up();
  await down;
  tell(`shipper ${i} back`);
  return { host, from, to: Date.now() };
}

function draw(random: Random): string {
  const all = Object.entries(FAULTS);
  let left = random.fraction() * all.reduce((sum, [, { weight }]) => sum + weight, 0);
  for (const [name, { weight }] of all) {
    left -= weight;
    if (left < 0) return name;
  }
  return "rotate";
}

function sleep(ms: number): Promise<void> {
  return new Promise((resolve) => setTimeout(resolve, ms));
}
