/**
 * What following costs: the shipper's memory over many rotations, and its CPU time and memory beside quiet logs. Real
 * shipper and receiver; a batch is taken as delivered by a move to `sent/`, as the forwarder does it.
 *
 *   bun run bench/tail.ts rotations [--count 2000] [--keep 14] [--every 200]     gzip at the next rotation (delaycompress)
 *   bun run bench/tail.ts quiet [--count 1000] [--seconds 60]                     aims: 2 % of a core, 100 MiB
 */
import {
  appendFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { gzipSync } from "node:zlib";
import { readCursor } from "../lib/tail/cursor.ts";
import { HOST, reachable, runScript, sleep, stopAll } from "./contestant.ts";
import { freePort } from "./pipeline.ts";
import { sample } from "./sample.ts";

/** So many rotations have lines of one window. */
const ROTATIONS_OF_A_WINDOW = 20;

interface Ends {
  folder: string;
  logs: string;
  dir: string;
  shipper: number;
}

/** Runs both ends over what `prepare` makes, while `work` goes on. */
async function withEnds(
  pattern: string,
  shipper: object,
  prepare: (logs: string) => void,
  work: (ends: Ends) => Promise<void>,
) {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-tail-"));
  const [logs, dir] = [join(folder, "logs"), join(folder, "batches")];
  for (const path of [logs, join(dir, "sent")]) mkdirSync(path, { recursive: true });
  const port = await freePort();
  const config = join(folder, "config.json");
  const [files, receiver, stateDir] = [
    [join(logs, pattern)],
    `http://127.0.0.1:${port}`,
    join(folder, "state"),
  ];
  writeFileSync(
    config,
    JSON.stringify({
      shipper: { files, receiver, host: HOST, stateDir, ...shipper },
      receiver: { groups: [{ port, senders: ["*"] }], dir, sealAfterSeconds: 1 },
    }),
  );
  mkdirSync(stateDir);
  prepare(logs);
  const server = runScript(folder, "receiver", config);
  await reachable(port);
  const client = runScript(folder, "shipper", config);
  try {
    await work({ folder, logs, dir, shipper: client.pid as number });
  } finally {
    await stopAll([client, server]);
    rmSync(folder, { recursive: true, force: true });
  }
}

function say(ends: Ends, what: string): void {
  const { memoryMiB, peakMiB, cpuSeconds } = sample(ends.shipper);
  const cursor = join(ends.folder, "state", "cursor.json");
  const text = existsSync(cursor) ? readFileSync(cursor, "utf8") : "{}";
  const streams = (JSON.parse(text).streams ?? []).length;
  process.stdout.write(
    `${what}: ${memoryMiB.toFixed(1)} MiB, peak ${peakMiB.toFixed(1)}, ${cpuSeconds.toFixed(1)} s of CPU, ` +
      `cursor ${text.length} bytes, ${streams} streams\n`,
  );
}

/** Rotations of one log, the one before gzipped, of which so many files are kept. */
async function measureRotations(count: number, keep: number, everyMs: number): Promise<void> {
  const prepare = (logs: string) => writeFileSync(join(logs, "access.log"), "");
  await withEnds("access.log", { rotateWaitSeconds: 1, heartbeatSeconds: 2 }, prepare, async (ends) => {
    const live = join(ends.logs, "access.log");
    await sleep(5000);
    say(ends, "at the start");
    for (let n = 1; n <= count; n++) {
      const at = new Date(Date.UTC(2026, 0, 1) + Math.floor(n / ROTATIONS_OF_A_WINDOW) * 1_200_000);
      const time = `${at.toISOString().slice(8, 10)}/Jan/2026:${at.toISOString().slice(11, 19)} +0000`;
      for (let line = 0; line < 3; line++)
        appendFileSync(live, `10.0.0.1 - - [${time}] "GET /${n}/${line} HTTP/1.1" 200 512 "-" "curl/8.5"\n`);
      await sleep(everyMs);
      rotate(ends.logs, keep);
      for (const name of existsSync(join(ends.dir, HOST)) ? readdirSync(join(ends.dir, HOST)) : [])
        if (name.endsWith(".log")) renameSync(join(ends.dir, HOST, name), join(ends.dir, "sent", name));
      if (n % Math.ceil(count / 10) === 0) say(ends, `after ${n} rotations`);
    }
    await sleep(70_000);
    say(ends, "a minute later");
    const sent = readdirSync(join(ends.dir, "sent")).map((name) => join(ends.dir, "sent", name));
    const open = readdirSync(join(ends.dir, HOST)).filter((name) => /\.log(\.part)?$/.test(name));
    const lines = [...sent, ...open.map((name) => join(ends.dir, HOST, name))].flatMap((path) =>
      readFileSync(path, "latin1").split("\n").slice(0, -1),
    );
    const found = await readCursor(join(ends.folder, "state"));
    const lost = "cursor" in found ? found.cursor.lost : "?"; // what was removed before it could be read
    const told = `${lost} bytes told as lost, ${count * 3 - new Set(lines).size} lines are`;
    process.stdout.write(
      `${lines.length} lines of ${count * 3}, ${new Set(lines).size} different; ${told}\n`,
    );
  });
}

/** As logrotate with delaycompress. */
function rotate(logs: string, keep: number): void {
  const live = join(logs, "access.log");
  rmSync(`${live}.${keep}.gz`, { force: true });
  for (let n = keep - 1; n >= 2; n--)
    if (existsSync(`${live}.${n}.gz`)) renameSync(`${live}.${n}.gz`, `${live}.${n + 1}.gz`);
  if (existsSync(`${live}.1`)) {
    const { mtime } = statSync(`${live}.1`);
    writeFileSync(`${live}.2.gz`, gzipSync(readFileSync(`${live}.1`)));
    utimesSync(`${live}.2.gz`, mtime, mtime);
    rmSync(`${live}.1`);
  }
  renameSync(live, `${live}.1`);
  writeFileSync(live, "");
}

/** Logs of a line each that nobody writes any more: the start, the first answer, all lines, and what it costs from then on. */
async function measureQuiet(count: number, seconds: number): Promise<void> {
  const line = '10.0.0.1 - - [01/Jan/2026:00:00:00 +0000] "GET / HTTP/1.1" 200 512 "-" "curl/8.5"\n';
  const prepare = (logs: string) => {
    for (let n = 0; n < count; n++) writeFileSync(join(logs, `site${n}.log`), line.replace("/ ", `/${n} `));
  };
  await withEnds("*.log", {}, prepare, async (ends) => {
    const started = performance.now();
    const tell = (what: string) => say(ends, `${count} logs, ${what}`);
    const after = () => `after ${((performance.now() - started) / 1000).toFixed(1)} s`;
    while (!isAsked(ends)) await sleep(20);
    tell(`first answer ${after()}`);
    while (countLines(ends) < count) await sleep(250);
    tell(`all lines ${after()}`);
    await sleep(20_000); // it has saved, and is quiet
    const before = sample(ends.shipper).cpuSeconds;
    await sleep(seconds * 1000);
    const spent = sample(ends.shipper).cpuSeconds - before;
    tell(`${seconds} s later`);
    process.stdout.write(`${((spent / seconds) * 100).toFixed(2)} % of a core\n`);
  });
}

/** Whether the cursor says that the receiver has answered. */
function isAsked({ folder }: Ends): boolean {
  const cursor = join(folder, "state", "cursor.json");
  return existsSync(cursor) && readFileSync(cursor, "latin1").slice(0, 200).includes('"asked":true');
}

/** Lines that the receiver has on stable storage. */
function countLines({ dir }: Ends): number {
  const own = join(dir, HOST);
  const names = existsSync(own) ? readdirSync(own).filter((name) => /\.log(\.part)?$/.test(name)) : [];
  return names.reduce((sum, name) => sum + readFileSync(join(own, name), "latin1").split("\n").length - 1, 0);
}

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    count: { type: "string" },
    keep: { type: "string", default: "14" },
    every: { type: "string", default: "200" },
    seconds: { type: "string", default: "60" },
  },
});
if (positionals[0] === "rotations")
  await measureRotations(Number(values.count ?? 2000), Number(values.keep), Number(values.every));
else await measureQuiet(Number(values.count ?? 1000), Number(values.seconds));
