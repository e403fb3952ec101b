/**
 * What a good sender notices of an attack: `bun run bench/attacks.ts [--seconds 10] [--rate 200] [--only TEXT]`.
 *
 * For each attack of hostile.ts a receiver of its own, a good sender that posts 40 times a second, first alone, then with
 * the attack beside it. Printed are its p99 and longest wait without and with it, their ratio, what was answered to the
 * attack, and memory and descriptors of the receiver. The exit code is 1 when a p99 is more than three times its own
 * without the attack, or a wait longer than 2 s. The attack is a process of its own with the lowest priority: it
 * stands for machines elsewhere.
 */
import { spawn } from "node:child_process";
import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { reachable, runScript, stopAll } from "./contestant.ts";
import { combinedLine, formatTime } from "./generate.ts";
import { ATTACK_NAMES, type Target } from "./hostile.ts";
import { freePort } from "./pipeline.ts";
import { createRandom } from "./random.ts";
import { median, percentile, sample } from "./sample.ts";

const [MOST_RATIO, MOST_WAIT_MS] = [3, 2000];
/** A p99 below this is not told apart from a shared machine's own jitter. */
const FLOOR_MS = 10;
const EVERY_MS = 25;
const ROUNDS = 3;
const TOKENS = {
  good: "a-good-token-of-24-signs",
  bad: "a-stolen-token-of-24-sign",
  any: "the-token-of-all-others-24",
};

interface Row {
  attack: string;
  aloneMs: number;
  besideMs: number;
  worstMs: number;
  answers: string;
  peakMiB: number;
  descriptors: number;
}

/** Alone and beside the attack in turn: a shared machine has bad moments of its own. */
async function measure(attack: string, seconds: number, rate: number): Promise<Row> {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-attacks-"));
  const port = await freePort();
  const receiver = await startReceiver(folder, port);
  const token = attack === "host of its own" ? TOKENS.any : TOKENS.bad;
  const target = { port, host: "10.0.0.2", token, others: ["10.0.0.1"] };
  let descriptors = 0;
  const watch = setInterval(() => {
    descriptors = Math.max(descriptors, readdirSync(`/proc/${receiver.pid}/fd`).length);
  }, 500);
  try {
    const post = goodSender(port);
    await runGood(post, 1000);
    const [alone, beside]: number[][][] = [[], []];
    const answers: Record<string, number> = {};
    for (let round = 0; round < ROUNDS; round++) {
      alone?.push(await runGood(post, (seconds / ROUNDS) * 1000));
      const hostile = startAttack(target, attack, rate, round);
      await hostile.running;
      beside?.push(await runGood(post, (seconds / ROUNDS) * 1000));
      for (const [name, count] of Object.entries(await hostile.stop())) {
        const status = name.split(" ").at(-1) as string;
        answers[status] = (answers[status] ?? 0) + count;
      }
    }
    const p99 = (rounds: number[][] = []) => median(rounds.map((times) => percentile(times, 99)));
    return {
      ...{ attack, aloneMs: p99(alone), besideMs: p99(beside), descriptors },
      worstMs: percentile(beside?.flat() ?? [], 100),
      answers: Object.entries(answers)
        .map(([status, count]) => `${status}: ${count}`)
        .join(", "),
      peakMiB: sample(receiver.pid as number).peakMiB,
    };
  } finally {
    clearInterval(watch);
    await stopAll([receiver]);
    rmSync(folder, { recursive: true, force: true });
  }
}

async function startReceiver(folder: string, port: number) {
  const tokens: Record<string, object> = {};
  for (const [host, name] of [
    ["10.0.0.1", "good"],
    ["10.0.0.2", "bad"],
    ["*", "any"],
  ] as const) {
    const file = join(folder, name);
    writeFileSync(file, TOKENS[name], { mode: 0o600 });
    tokens[host] = { file };
  }
  const config = join(folder, "config.json");
  const receiver = { dir: join(folder, "data"), groups: [{ port, senders: ["*"] }], tokens };
  writeFileSync(config, JSON.stringify({ receiver }));
  const child = runScript(folder, "receiver", config);
  await reachable(port);
  return child;
}

/** Posts the next chunk and gives how long it took in ms. */
function goodSender(port: number): () => Promise<number> {
  const random = createRandom(1);
  let offset = 0;
  return async () => {
    const body = Array.from({ length: 50 }, (_, i) => combinedLine(random, i, formatTime(Date.now()))).join(
      "",
    );
    const started = performance.now();
    const answer = await fetch(`http://127.0.0.1:${port}/upload`, {
      method: "POST",
      body,
      headers: {
        ...{ Authorization: `Bearer ${TOKENS.good}`, "Content-Type": "text/plain", "Log-Host": "10.0.0.1" },
        ...{ "Log-Stream": "the-good-stream", ...(offset === 0 && { "Log-Begin": "1" }) },
        ...{ "Upload-Offset": String(offset), "Upload-End": String(offset + body.length) },
      },
      signal: AbortSignal.timeout(30_000),
    });
    await answer.arrayBuffer();
    if (answer.status === 200) offset += body.length;
    return performance.now() - started;
  };
}

async function runGood(post: () => Promise<number>, ms: number): Promise<number[]> {
  const times: number[] = [];
  const until = performance.now() + ms;
  while (performance.now() < until) {
    const took = await post();
    times.push(took);
    await new Promise((resolve) => setTimeout(resolve, Math.max(0, EVERY_MS - took)));
  }
  return times;
}

function startAttack(target: Target, only: string, rate: number, seed: number) {
  const what = JSON.stringify({ target, only, rate, seed });
  const command = ["-n", "19", process.execPath, "run", join(import.meta.dirname, "hostile.ts"), what];
  const child = spawn("nice", command, { stdio: ["pipe", "pipe", "inherit"] });
  let output = "";
  child.stdout.on("data", (text) => {
    output += text;
  });
  const ended = new Promise((resolve) => child.once("close", resolve));
  return {
    running: new Promise((resolve) => setTimeout(resolve, 1000)),
    stop: async (): Promise<Record<string, number>> => {
      child.stdin.end();
      await ended;
      return JSON.parse(output);
    },
  };
}

const { values } = parseArgs({
  options: {
    seconds: { type: "string", default: "10" },
    rate: { type: "string", default: "200" },
    only: { type: "string", default: "" },
  },
});
let isOver = false;
console.log(
  "| attack | p99 alone, ms | beside it | ratio | longest wait, ms | answers to it | peak MiB | descriptors |",
);
console.log("|---|---:|---:|---:|---:|---|---:|---:|");
for (const attack of ATTACK_NAMES.filter((name) => name.includes(values.only))) {
  const row = await measure(attack, Number(values.seconds), Number(values.rate));
  const ratio = Math.max(FLOOR_MS, row.besideMs) / Math.max(FLOOR_MS, row.aloneMs);
  const isBad = ratio > MOST_RATIO || row.worstMs > MOST_WAIT_MS;
  isOver ||= isBad;
  const figures = [
    row.aloneMs.toFixed(1),
    row.besideMs.toFixed(1),
    ratio.toFixed(1),
    Math.round(row.worstMs),
  ];
  console.log(
    `| ${row.attack}${isBad ? " **OVER**" : ""} | ${figures.join(" | ")} | ${row.answers} | ${Math.round(row.peakMiB)} | ${row.descriptors} |`,
  );
}
process.exit(isOver ? 1 : 0);
