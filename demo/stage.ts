/**
 * The stage and the plot: the hosts with their writers and processes, and what happens to them when.
 */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { simpleParser } from "mailparser";
import { formatWindow } from "../lib/batch.ts";
import { createMember, createPlaces, type Member, PACE, type Places } from "./fleet.ts";
import { listMails } from "./pipeline.ts";
import type { Event } from "./screen.ts";
import { type Clock, createWriter, recentPast, type Writer } from "./traffic.ts";

export const HOSTS = ["10.10.21.181", "10.10.21.182", "10.10.22.31", "web-4.example"];
/** Mean lines per second of each. */
export const RATES = [700, 400, 250, 500];
/** The host whose shipper is killed. */
const VICTIM = 3;
export const TRAFFIC_MS = 30_000;
/** The timestamps cover this much, and so four windows. */
export const TRAFFIC_MINUTES = 70;
/** Everything that runs. */
export interface Stage {
  places: Places;
  clock: Clock;
  writers: Writer[];
  shippers: Member[];
  receiver: Member;
  forwarder: Member;
  monitor: Member;
  events: Event[];
  mails: Mail[];
  startedAt: number;
}

export interface Mail {
  file: string;
  subject: string;
}

export async function setStage(): Promise<Stage> {
  const places = await createPlaces(HOSTS);
  const clock = recentPast(Date.now(), TRAFFIC_MINUTES, PACE.windowMinutes, TRAFFIC_MS);
  const writers = HOSTS.map((host, i) =>
    createWriter(host, join(places.host(host), "access.log"), clock, RATES[i] ?? 0, i + 1),
  );
  return {
    places,
    clock,
    writers,
    shippers: HOSTS.map((host) => createMember("shipper", places.host(host))),
    receiver: createMember("receiver", places.middle),
    forwarder: createMember("forwarder", places.middle),
    monitor: createMember("monitor", places.middle, ["--watch"]),
    events: [],
    mails: [],
    startedAt: Date.now(),
  };
}

export function membersOf({ shippers, receiver, forwarder, monitor }: Stage): Member[] {
  return [...shippers, forwarder, monitor, receiver];
}

/** Something that happens in the demo; each waits for the one before it. */
export interface Act {
  when: (elapsedMs: number) => boolean;
  run: (elapsedMs: number) => unknown;
}

export function plot(stage: Stage): Act[] {
  const { writers, shippers, receiver, events } = stage;
  const victim = HOSTS[VICTIM] ?? "";
  const tell = (atMs: number, text: string, mood: Event["mood"] = "plain") =>
    events.push({ atMs, text, mood });
  const rotate = (index: number, note: string) => (at: number) => {
    writers[index]?.rotate(at);
    tell(at, `${HOSTS[index]}: logrotate renames access.log, ${note}`);
  };
  let killedAt = 0;
  return [
    { when: (at) => at > 4000, run: rotate(0, "nginx still writes to it") },
    {
      when: (at) => at > 7000,
      run: async (at) => {
        await shippers[VICTIM]?.kill();
        tell(at, `${victim}: kill -9 of the shipper; nginx goes on writing`, "bad");
      },
    },
    { when: (at) => at > 9500, run: rotate(VICTIM, "nobody looks") },
    {
      when: (at) => at > 19_000 || (at > 12_000 && findMails(stage).silence !== undefined),
      run: (at) => {
        shippers[VICTIM]?.start();
        tell(at, `${victim}: shipper started again, finds both files and its place`, "good");
      },
    },
    {
      when: (at) => at > 21_000,
      run: async (at) => {
        await receiver.kill();
        killedAt = at;
        tell(at, "kill -9 of the receiver in mid-flow; the shippers hold their lines", "bad");
      },
    },
    {
      when: (at) => at > killedAt + 2000,
      run: (at) => {
        receiver.start();
        tell(at, "receiver started again: all that it ever answered is in its journal", "good");
      },
    },
    {
      when: (at) => at > TRAFFIC_MS,
      run: (at) => tell(at, "nginx stops writing; the last batches are sealed"),
    },
  ];
}

/** Reads mails that have come, and tells of them. */
export async function readMails(stage: Stage, atMs: number): Promise<void> {
  const known = new Set(stage.mails.map((mail) => mail.file));
  for (const file of listMails(stage.places)) {
    if (known.has(file)) continue;
    const { subject = "" } = await simpleParser(readFileSync(join(stage.places.mails, file)));
    stage.mails.push({ file, subject });
    stage.events.push({ atMs, text: `mail: ${subject}`, mood: "plain" });
  }
}

/** The mail that the victim is silent, and the one that it is back. */
export function findMails({ mails }: Stage): { silence: Mail | undefined; recovery: Mail | undefined } {
  const about = mails.filter(({ subject }) => subject.includes(HOSTS[VICTIM] ?? ""));
  const recovery = about.find(({ subject }) => /recover|back|again/i.test(subject));
  return { silence: about.find((mail) => mail !== recovery), recovery };
}

/** The windows that the clock covers, in the form of batch names. */
export function windowsOf({ from, to, zone }: Clock): string[] {
  const length = PACE.windowMinutes * 60_000;
  const windows: string[] = [];
  for (let at = from - ((from + zone * 60_000) % length); at < to; at += length) {
    windows.push(formatWindow(at + zone * 60_000, PACE.windowMinutes));
  }
  return windows;
}
