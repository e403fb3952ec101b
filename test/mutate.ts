/**
 * Delivered folders with random damage: what `forwarder --verify` and deploy/verify.sh must find, in which words, and that
 * they say the same. Each seed is a folder and a damage of its own; the folder as it was delivered is looked at, too.
 *
 *   bun run test/mutate.ts --from 1 --seeds 10000     a seed that fails is told; its folder is kept
 *     --every 5     verify.sh, which takes longer, looks at one of five
 */
import { spawn, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { createRandom, type Random } from "../bench/random.ts";
import { type Digest, formatDigest, formatDigestName, formatVerified, verifyFolder } from "../lib/digest.ts";

export const VERIFY_SH = join(import.meta.dirname, "../deploy/verify.sh");
const HOUR_MS = 3_600_000;
/** What may lie beside the batches and must never matter: names with odd signs, and such as are nearly ours. */
const NEIGHBOURS = [
  ...[
    "notes.txt",
    "a b.log",
    "-rf",
    "*",
    "$(touch x).log",
    "`x`.sha256",
    'quote".log',
    "it's.log",
    "tab\t.log",
  ],
  ...[
    "back\\slash.log",
    "\u00e4_26112206_00-19_a.log",
    ".accessLog_26112206_00-19_a.log",
    "accessLog_26112206.1.sha256",
  ],
  ...[
    "a\naccessLog_26112206_00-19_a.log",
    "accessLog_26112206_00-19_a.log.tmp",
    "accessLog_26023005_00-19_a.log",
  ],
  ...["accessLog_26112224_00-19_a.log", "accessLog_26112206_60-79_a.log", "accessLog_26112206_10-29_a.log"],
  ...["accessLog_26112206_00-19_a.1.log", "accessLog_26112206_00-19_A.log", "accessLog_26112206_20-38_a.log"],
  ...["-_26112206_00-19_a.log", "accessLog_26112206.sha256.tmp", "x_26112206_00-19_a.1234567890123456.log"],
];

interface Delivered {
  folder: string;
  random: Random;
  files: Map<string, string>;
  batches: string[];
  digests: string[];
  hours: string[];
}

const hash = (text: string) => createHash("sha256").update(text, "latin1").digest("hex");

/** Fills a folder as the forwarder does: some hours of any day, late parts, empty hours and files. */
function deliver(folder: string, random: Random): Delivered {
  const world: Delivered = { folder, random, files: new Map(), batches: [], digests: [], hours: [] };
  const first = Date.UTC(2024, 0, 1) + random.between(0, 3 * 365 * 24) * HOUR_MS;
  let previous: Digest["previous"];
  const digest = (hour: string, part: number, batches: Digest["batches"], isComplete: boolean) => {
    const begins = previous ? {} : { begins: new Date(first).toISOString() };
    const hosts = [{ host: "10.0.0.1", lines: batches.length, skipped: 0, untimed: 0, lost: 0 }];
    const missing = isComplete ? [] : [{ host: "10.0.0.1", reason: "not heard since its start" }];
    const text = formatDigest({ hour, part, ...begins, hosts, missing, previous, batches });
    previous = put(world, formatDigestName({ prefix: "accessLog", hour, part }), text);
    world.digests.push(previous.name);
  };
  for (let i = random.between(2, 4); i > 0; i--) {
    const hour = new Date(first - i * HOUR_MS).toISOString().replace(/[-T]/g, "").slice(2, 10);
    world.hours.push(hour);
    const batches = Array.from({ length: random.between(0, 4) }, (_, host) => {
      const name = `accessLog_${hour}_${random.pick(["00-19", "20-39", "00-59", "08-09"])}_h-${host}`;
      const part = random.pick(["", "", ".2", ".12", ".1795305601"]);
      const batch = put(world, `${name}${part}.log${random.pick(["", "", ".gz"])}`, contentOf(random, host));
      world.batches.push(batch.name);
      return batch;
    });
    const isComplete = random.chance(0.7);
    digest(hour, 1, batches, isComplete);
    if (!isComplete) digest(hour, random.pick([2, 10, 1_795_305_601]), [], true);
  }
  return world;
}

function contentOf(random: Random, host: number): string {
  const line = `10.0.0.${host} - - "GET /${random.between(0, 1e9)} HTTP/1.1" 200`;
  return random.pick([
    `${line}\n`,
    `${line}\n${line}\r\n`,
    line,
    `${line}\r\n`,
    `\0${line}\n\n`,
    `${line}\xe4\n`,
    "",
  ]);
}

function put({ folder, files }: Delivered, name: string, text: string) {
  files.set(name, text);
  writeFileSync(join(folder, name), text, "latin1");
  return { name, sha256: hash(text) };
}

/** A digest whose last line fits whatever stands above: it was made by somebody who knows how. */
function reseal(lines: string[]): string {
  const text = lines.join("\n");
  return `${text}\n# end ${hash(`${text}\n`)}\n`;
}

type Damage = (world: Delivered) => string | undefined;

/** Each does its damage and gives the finding that must be told; undefined when it has changed nothing. */
const damages: Record<string, Damage> = {
  none: () => "ok",
  byte: (world) =>
    rewrite(world, anyFile(world), (text, random) => {
      const at = random.between(0, text.length - 1);
      return (
        text.slice(0, at) +
        String.fromCharCode(text.charCodeAt(at) ^ random.between(1, 255)) +
        text.slice(at + 1)
      );
    }),
  truncated: (world) =>
    rewrite(world, anyFile(world), (text, random) => text.slice(0, random.between(0, text.length - 1))),
  emptied: (world) => rewrite(world, anyFile(world), () => ""),
  longer: (world) =>
    rewrite(
      world,
      anyFile(world),
      (text, random) => text + random.pick(["\n", "x", "\0", "\r\n", "# end\n"]),
    ),
  "no last newline": (world) => rewrite(world, anyFile(world), (text) => text.replace(/\n$/, "")),
  CRLF: (world) => rewrite(world, anyFile(world), (text) => text.replaceAll("\n", "\r\n")),
  "line removed": (world) => rewriteLines(world, (lines, at) => lines.toSpliced(at, 1)),
  "line twice": (world) => rewriteLines(world, (lines, at) => lines.toSpliced(at, 0, lines[at] ?? "")),
  "lines swapped": (world) =>
    rewriteLines(world, (lines, at) => {
      const other = (at + 1) % lines.length;
      return lines.with(at, lines[other] ?? "").with(other, lines[at] ?? "");
    }),
  "line removed by one who knows how": (world) => forge(world, (lines, at) => lines.toSpliced(at, 1)),
  "line twice by one who knows how": (world) =>
    forge(world, (lines, at) => lines.toSpliced(at, 0, lines[at] ?? "")),
  "odd name by one who knows how": (world) =>
    forge(world, (lines) => [...lines, `${"0".repeat(64)}  ${world.random.pick(NEIGHBOURS)}`]),
  "upper case": (world) =>
    rewriteLines(world, (lines, at) => lines.with(at, (lines[at] ?? "").toUpperCase())),
  replay: (world) =>
    rewrite(
      world,
      world.random.pick(world.digests),
      (_, random) => world.files.get(random.pick(world.digests)) ?? "",
    ),
  exchange: (world) =>
    rewrite(world, pickBatch(world), (_, random) => world.files.get(random.pick(world.batches)) ?? ""),
  gone: (world) => remove(world, () => {}),
  link: (world) => remove(world, (path) => symlinkSync("/etc/hostname", path)),
  folder: (world) => remove(world, (path) => mkdirSync(path)),
  "other name": (world) => {
    const name = remove(world, () => {});
    if (name)
      writeFileSync(
        join(world.folder, world.random.pick([`${name} `, `-${name}`, `${name}\n`, `${name}.bak`])),
        world.files.get(name) ?? "",
        "latin1",
      );
    return name;
  },
  "batch put there": (world) => {
    const name = `accessLog_${world.random.pick(world.hours)}_40-59_h-9.log${world.random.pick(["", ".gz"])}`;
    put(world, name, "put there\n");
    return `extra: ${name}`;
  },
  "digest put there": (world) => {
    const [hour = ""] = world.hours;
    const name = formatDigestName({
      prefix: world.random.pick(["accessLog", "other"]),
      hour,
      part: 3_000_000_000,
    });
    put(
      world,
      name,
      reseal([
        "# log-rt-sync digest 1",
        `# hour ${hour}, part 3000000000: what came after the digest before`,
        "# complete yes",
      ]),
    );
    return `chain broken: ${name}`;
  },
};

const pickBatch = (world: Delivered) => (world.batches.length > 0 ? world.random.pick(world.batches) : "");
const anyFile = (world: Delivered) => world.random.pick([...world.files.keys()]);

/** Another content; undefined when it is the same. */
function rewrite(
  world: Delivered,
  name: string,
  change: (text: string, random: Random) => string,
): string | undefined {
  const before = world.files.get(name);
  const after = before === undefined ? undefined : change(before, world.random);
  if (after === undefined || before === after) return undefined;
  put(world, name, after);
  return `changed: ${name}`;
}

function rewriteLines(
  world: Delivered,
  change: (lines: string[], at: number) => string[],
): string | undefined {
  return rewrite(world, world.random.pick(world.digests), (text, random) => {
    const lines = text.split("\n").slice(0, -1);
    return `${change(lines, random.between(0, lines.length - 1)).join("\n")}\n`;
  });
}

/** Of a digest that another one names: the newest one's hash is in the sender's mail alone. */
function forge(world: Delivered, change: (lines: string[], at: number) => string[]): string | undefined {
  const named = world.digests.slice(0, -1);
  if (named.length === 0) return undefined;
  return rewrite(world, world.random.pick(named), (text, random) => {
    const lines = text.split("\n").slice(0, -2);
    return reseal(change(lines, random.between(2, lines.length - 1)));
  });
}

/** A file goes; not the newest digest, which none names yet. */
function remove(world: Delivered, instead: (path: string) => void): string | undefined {
  const names = [...world.files.keys()].filter((name) => name !== world.digests.at(-1));
  if (names.length === 0) return undefined;
  const name = world.random.pick(names);
  rmSync(join(world.folder, name));
  instead(join(world.folder, name));
  return `missing: ${name}`;
}

// ---- both verifiers

/** What runs verify.sh: this system's tools, and a system that has busybox alone. */
export interface Shell {
  name: string;
  command: string;
  env: NodeJS.ProcessEnv;
}

export function findShells(): Shell[] {
  const shells: Shell[] = [{ name: "sh", command: "sh", env: process.env }];
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-busybox-"));
  process.on("exit", () => rmSync(folder, { recursive: true }));
  if (spawnSync("busybox", ["--install", "-s", folder]).status !== 0) return shells;
  return [...shells, { name: "busybox", command: join(folder, "sh"), env: { PATH: folder } }];
}

/** What `--verify` would print; what the script prints, and how it ends. */
export async function verifyBoth(folder: string, { command, env }: Shell) {
  const script = spawn(command, [VERIFY_SH, folder], { env });
  const out: Buffer[] = [];
  for (const stream of [script.stdout, script.stderr]) stream.on("data", (data) => out.push(data));
  const ended = new Promise<number | null>((resolve) => script.on("close", resolve));
  const text = formatVerified(await verifyFolder(folder));
  const status = await ended;
  return { text, shell: Buffer.concat(out).toString("latin1"), status };
}

/** Runs one seed, by `--verify` alone when there is no shell; gives the kind of damage, and what is wrong with what was found. */
export async function runSeed(
  seed: number,
  shell: Shell | undefined,
): Promise<{ kind: string; fault?: string }> {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-mutate-"));
  const world = deliver(folder, createRandom(seed));
  for (const name of NEIGHBOURS) writeFileSync(join(folder, name), "the client's own\n");
  const good = formatVerified(await verifyFolder(folder));
  if (!good.endsWith("\nok\n")) return { kind: "none", fault: `${folder}, as delivered:\n${good}` };
  let kind = "";
  let finding: string | undefined;
  while (!finding) {
    kind = world.random.pick(Object.keys(damages));
    finding = damages[kind]?.(world);
  }
  const text = formatVerified(await verifyFolder(folder));
  const { shell: said, status } = shell
    ? await verifyBoth(folder, shell)
    : { shell: text, status: undefined };
  const isFound = `\n${text}`.includes(`\n${finding}\n`);
  const isEnd = status === undefined || status === (kind === "none" ? 0 : 1);
  if (!isFound || said !== text || !isEnd) {
    const story = `--verify:\n${text}verify.sh by ${shell?.name}, ends ${status}:\n${said}`;
    return { kind, fault: `${folder}, damage: ${kind}, expected: ${finding}\n${story}` };
  }
  rmSync(folder, { recursive: true });
  return { kind };
}

if (import.meta.main) {
  const option = { type: "string" } as const;
  const { values } = parseArgs({ options: { from: option, seeds: option, every: option } });
  const from = Number(values.from ?? 1);
  const end = from + Number(values.seeds ?? 10_000);
  const every = Number(values.every ?? 1);
  const shells = findShells();
  const kinds: Record<string, number> = {};
  let failed = 0;
  let next = from;
  const work = async () => {
    while (next < end) {
      const seed = next++;
      const shell = shells[Math.floor(seed / every) % shells.length];
      const { kind, fault } = await runSeed(seed, seed % every === 0 ? shell : undefined);
      kinds[kind] = (kinds[kind] ?? 0) + 1;
      if (fault) failed++;
      if (fault) process.stdout.write(`seed ${seed}: ${fault}\n`);
      if ((seed + 1 - from) % 100 === 0) process.stdout.write(`${seed + 1 - from} seeds, ${failed} failed\n`);
    }
  };
  await Promise.all([work(), work(), work(), work()]);
  for (const [kind, count] of Object.entries(kinds).sort()) process.stdout.write(`${count} ${kind}\n`);
  const by = shells.map(({ name }) => name).join(" and ");
  process.stdout.write(
    `seeds ${from} to ${end - 1} by --verify and verify.sh (${by}${every > 1 ? `, one of ${every}` : ""}): ${failed} failed\n`,
  );
  process.exit(failed === 0 ? 0 : 1);
}
