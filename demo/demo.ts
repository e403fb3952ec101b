/**
 * `npm run demo`: the whole way on this machine, with nothing installed. Four hosts whose nginx writes, four
 * shippers, a receiver, a forwarder and a monitor as real processes in a temporary folder, on loopback.
 *
 * Within a minute it covers four windows, rotates logs, kills a shipper and the receiver with SIGKILL, and then
 * proves from the files alone that every line has arrived once. Exit code 1 when the account does not balance.
 * `--keep` leaves everything running, with traffic of now, until Ctrl-C; then the folder goes.
 */
import { readFileSync, rmSync } from "node:fs";
import { join } from "node:path";
import { readLedger } from "../lib/ledger.ts";
import { wait as pause } from "../lib/service.ts";
import { type HostRow, readPipeline } from "./pipeline.ts";
import { createScreen, dim, red, type State } from "./screen.ts";
import {
  findMails,
  HOSTS,
  membersOf,
  plot,
  RATES,
  readMails,
  type Stage,
  setStage,
  TRAFFIC_MINUTES,
  TRAFFIC_MS,
  windowsOf,
} from "./stage.ts";
import { showAccount } from "./statement.ts";
import { createWriter } from "./traffic.ts";

/** The demo tells how far it has come when the last line has not arrived by then. */
const DEADLINE_MS = 57_000;
const FRAME_MS = 200;

/** How long starting may take. */
const START_MS = 20_000;

async function main(): Promise<number> {
  const keep = process.argv.includes("--keep");
  const abort = new AbortController();
  for (const name of ["SIGINT", "SIGTERM", "SIGHUP"] as const) process.on(name, () => abort.abort());
  process.stdout.on("error", () => abort.abort()); // the terminal was closed
  const screen = createScreen();
  const stage = await setStage();
  try {
    await startAll(stage, abort.signal);
    const rows = await play(stage, screen, abort.signal);
    screen.end();
    if (abort.signal.aborted) return 130;
    const balanced = await showAccount(stage, rows);
    if (keep) await stay(stage, abort.signal);
    else process.stdout.write(dim(`  When you have seen enough: rm -r ${stage.places.root}\n\n`));
    return balanced ? 0 : 1;
  } finally {
    screen.end();
    await Promise.all(membersOf(stage).map((member) => member.stop()));
    for (const writer of stage.writers) writer.close();
    if (abort.signal.aborted) rmSync(stage.places.root, { recursive: true, force: true });
  }
}

/** The receiver first; the monitor when it has heard from everyone, so that it has nothing to alert about. */
async function startAll(stage: Stage, signal: AbortSignal): Promise<void> {
  const { receiver, shippers, forwarder, monitor, places } = stage;
  process.stdout.write(dim(`\n  Starting 4 shippers, receiver, forwarder, monitor in ${places.root}\n\n`));
  receiver.start();
  await wait("the receiver answers", stage, signal, async () => {
    const answers = places.ports.map((port) =>
      fetch(`http://127.0.0.1:${port}/healthz`).catch(() => undefined),
    );
    return (await Promise.all(answers)).every((answer) => answer?.ok);
  });
  for (const member of [...shippers, forwarder]) member.start();
  await wait("the receiver has heard from every host", stage, signal, async () => {
    const ledgers = await Promise.all(HOSTS.map((host) => readLedger(join(places.batches, host))));
    return ledgers.every((ledger) => ledger !== undefined && ledger.heardAt > 0);
  });
  monitor.start();
  stage.startedAt = Date.now();
}

/** Waits until `condition` is true. Throws when that takes too long or when a script has ended. */
async function wait(
  what: string,
  stage: Stage,
  signal: AbortSignal,
  condition: () => Promise<boolean>,
): Promise<void> {
  const deadline = Date.now() + START_MS;
  while (!signal.aborted && !(await condition())) {
    expectAlive(stage);
    if (Date.now() > deadline) throw new Error(`Waited ${START_MS / 1000} s in vain until ${what}`);
    await pause(50, signal);
  }
}

function expectAlive(stage: Stage): void {
  for (const { name, died, log } of membersOf(stage)) {
    if (died) throw new Error(`${name}.ts has ended by itself; its last words in ${log}:\n${tail(log)}`);
  }
}

/** Traffic and plot until every line has arrived and both mails are there, or until the deadline. */
async function play(
  stage: Stage,
  screen: ReturnType<typeof createScreen>,
  signal: AbortSignal,
): Promise<HostRow[]> {
  const windows = windowsOf(stage.clock);
  const acts = plot(stage);
  for (;;) {
    const elapsedMs = Date.now() - stage.startedAt;
    for (const writer of stage.writers) writer.write(elapsedMs);
    if (acts[0]?.when(elapsedMs)) await acts.shift()?.run(elapsedMs);
    await readMails(stage, elapsedMs);
    const rows = await readPipeline(stage.places, stage.writers);
    if (signal.aborted) return rows;
    const states = new Map(rows.map((row, i) => [row.host, stateOf(stage, row, i, elapsedMs)]));
    const arrived = elapsedMs > TRAFFIC_MS && rows.every((row) => row.delivered === row.written);
    const done = arrived && acts.length === 0 && findMails(stage).recovery !== undefined;
    const over = done || elapsedMs > DEADLINE_MS;
    const phase = done ? "every line has arrived" : phaseOf(elapsedMs);
    screen.show({ elapsedMs, phase, rows, states, windows, events: stage.events }, over);
    if (over) return rows;
    expectAlive(stage);
    await pause(FRAME_MS, signal);
  }
}

function stateOf({ shippers, writers }: Stage, row: HostRow, index: number, elapsedMs: number): State {
  const lag = row.written - row.received;
  if (!shippers[index]?.running) return "killed";
  if (writers[index]?.reopening) return "rotating";
  if (lag > 2 * (RATES[index] ?? 0)) return "backlog";
  return elapsedMs > TRAFFIC_MS && row.delivered === row.written ? "done" : "live";
}

function phaseOf(elapsedMs: number): string {
  const left = Math.ceil((TRAFFIC_MS - elapsedMs) / 1000);
  if (left > 0)
    return `nginx writes ${TRAFFIC_MINUTES} minutes of traffic in ${TRAFFIC_MS / 1000} s, ${left} s left`;
  return "the last lines are on their way";
}

/** Traffic of now, until Ctrl-C. */
async function stay({ places }: Stage, signal: AbortSignal): Promise<void> {
  const day = 24 * 3_600_000;
  const now = Date.now();
  const clock = { from: now, to: now + day, durationMs: day, zone: -new Date().getTimezoneOffset() };
  const writers = HOSTS.map((host, i) =>
    createWriter(host, join(places.host(host), "access.log"), clock, (RATES[i] ?? 0) / 10, i + 1),
  );
  process.stdout.write(
    `  It goes on until Ctrl-C; the receiver's page: http://127.0.0.1:${places.ports[0]}/\n\n`,
  );
  while (!signal.aborted) {
    for (const writer of writers) writer.write(Date.now() - now);
    await pause(FRAME_MS, signal);
  }
}

function tail(file: string): string {
  return readFileSync(file, "utf8").trimEnd().split("\n").slice(-5).join("\n");
}

try {
  process.exit(await main());
} catch (error) {
  process.stderr.write(`${red((error as Error).message)}\n`);
  process.exit(1);
}
