/**
 * Access logs for the benchmark: combined format, about 220 bytes a line, numbered, with timestamps that
 * advance as they would on a busy host, so that a file covers several windows.
 */
import { closeSync, openSync, writeSync } from "node:fs";
import { createRandom, type Random } from "./random.ts";

const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
const METHODS = ["GET", "GET", "GET", "GET", "POST", "PUT"];
const STATUS = ["200", "200", "200", "200", "200", "204", "301", "304", "404", "500"];
const AGENTS = [
  "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/124.0",
  "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:125.0) Gecko/20100101 Firefox/125.0 ",
  "okhttp/4.12.0 (Android 14; SM-S911B; build 2291) charging-client/7.3.1",
];

/** How a log is generated. */
export interface Traffic {
  lines: number;
  /** Timestamp of the first line, milliseconds since the epoch, written as +0000. */
  startMs: number;
  /** How fast the timestamps advance. */
  linesPerSecond: number;
  seed: number;
}

/** Writes a log of numbered lines to `path`; gives its size in bytes. */
export function generateLog(path: string, traffic: Traffic): number {
  const random = createRandom(traffic.seed);
  const fd = openSync(path, "w");
  let bytes = 0;
  try {
    for (let number = 0; number < traffic.lines; ) {
      const upTo = Math.min(traffic.lines, number + 5000);
      let block = "";
      for (; number < upTo; number++) {
        const at = traffic.startMs + Math.floor((number / traffic.linesPerSecond) * 1000);
        block += combinedLine(random, number, formatTime(at));
      }
      bytes += writeSync(fd, Buffer.from(block, "latin1"));
    }
  } finally {
    closeSync(fd);
  }
  return bytes;
}

/** One line of the combined format with its `\n`, about 220 bytes. */
export function combinedLine(random: Random, number: number, time: string): string {
  const chance = Math.floor(random.fraction() * 4_294_967_296);
  const method = METHODS[chance % METHODS.length];
  const status = STATUS[(chance >>> 3) % STATUS.length];
  const agent = AGENTS[(chance >>> 7) % AGENTS.length];
  const path = `/api/v2/subscribers/${(chance >>> 4).toString(36)}/usage?line=${number}`;
  const client = `10.${(chance >>> 8) & 127}.${(chance >>> 16) & 255}.${chance & 255}`;
  return `${client} - - [${time}] "${method} ${path} HTTP/1.1" ${status} ${chance % 90_000} "https://portal.example.com/" "${agent}"\n`;
}

let lastSecond = Number.NaN;
let lastText = "";

/** `22/Nov/2026:06:20:01 +0000`, nginx's `$time_local`, of milliseconds since the epoch. */
export function formatTime(ms: number): string {
  const second = Math.floor(ms / 1000);
  if (second !== lastSecond) {
    lastSecond = second;
    lastText = formatZonedTime(ms, 0);
  }
  return lastText;
}

/** The same in the zone that is `offsetMinutes` east of Greenwich. */
export function formatZonedTime(ms: number, offsetMinutes: number): string {
  const iso = new Date(ms + offsetMinutes * 60_000).toISOString();
  const month = MONTHS[Number(iso.slice(5, 7)) - 1];
  const sign = offsetMinutes < 0 ? "-" : "+";
  const minutes = Math.abs(offsetMinutes);
  const zone = `${sign}${two(Math.floor(minutes / 60))}${two(minutes % 60)}`;
  return `${iso.slice(8, 10)}/${month}/${iso.slice(0, 4)}:${iso.slice(11, 19)} ${zone}`;
}

function two(n: number): string {
  return String(n).padStart(2, "0");
}
