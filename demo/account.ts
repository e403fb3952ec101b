/**
 * The account: what nginx wrote against what the client got, by host and window. It shares no code with the
 * five scripts on purpose: it finds windows and parses batch names by itself, from the files alone.
 */
import { readdirSync } from "node:fs";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { gunzipSync } from "node:zlib";

/** Lines by `<dashed host> <window>`, in their order. */
export type Tally = Map<string, Buffer[]>;

/** One host and window, both sides. */
export interface Cell {
  host: string;
  window: string;
  written: number;
  delivered: number;
  bytes: number;
  /** Files that the client has for it. */
  parts: number;
  /** The client's files, one after the other, are byte for byte what nginx wrote. */
  identical: boolean;
  /** Lines that the client lacks. */
  missing: number;
  /** Lines that the client has more often than nginx wrote them. */
  extra: number;
}

const MONTHS = "JanFebMarAprMayJunJulAugSepOctNovDec";

/** Adds the lines of a host's log files, oldest file first; `.gz` is unpacked. Throws on a line without a timestamp. */
export async function tallyLogs(
  tally: Tally,
  host: string,
  files: string[],
  windowMinutes: number,
): Promise<void> {
  for (const file of files) {
    const data = await readFile(file);
    for (const line of splitLines(file.endsWith(".gz") ? gunzipSync(data) : data)) {
      const time = /\[(\d\d)\/(\w{3})\/\d\d(\d\d):(\d\d):(\d\d):\d\d [+-]\d{4}\] "/.exec(
        line.toString("latin1"),
      );
      if (!time) throw new Error(`${file}: a line without a timestamp: ${line}`);
      const [, day, month, year, hour, minute] = time as unknown as string[];
      const first = Math.floor(Number(minute) / windowMinutes) * windowMinutes;
      const two = (n: number) => String(n).padStart(2, "0");
      const date = `${year}${two(MONTHS.indexOf(String(month)) / 3 + 1)}${day}`;
      add(tally, host, `${date}${hour}_${two(first)}-${two(first + windowMinutes - 1)}`, [line]);
    }
  }
}

/** The lines of every file that the client has (of those `listed`), and how many files there are of each host and window. */
export async function tallyDelivered(
  folder: string,
  listed = readdirSync(folder),
): Promise<{ tally: Tally; parts: Map<string, number> }> {
  const tally: Tally = new Map();
  const parts = new Map<string, number>();
  const batches = listed.filter((name) => !/_\d{8}(\.\d+)?\.sha256$/.test(name)); // digests
  const names = batches.map((name) => {
    const match = /_(\d{8}_\d\d-\d\d)_([a-z0-9-]+?)(?:\.(\d+))?\.log$/.exec(name);
    if (!match) throw new Error(`${join(folder, name)}: not a batch's name`);
    const [, window = "", host = "", part = "1"] = match;
    return { name, window, host, part: Number(part) };
  });
  for (const { name, window, host } of names.sort((a, b) => a.part - b.part)) {
    add(tally, host, window, splitLines(await readFile(join(folder, name))));
    parts.set(`${host} ${window}`, (parts.get(`${host} ${window}`) ?? 0) + 1);
  }
  return { tally, parts };
}

/** Both sides against each other, by host and window. */
export function compare(written: Tally, delivered: Tally, parts: Map<string, number>): Cell[] {
  const keys = [...new Set([...written.keys(), ...delivered.keys()])].sort();
  return keys.map((key) => {
    const [host = "", window = ""] = key.split(" ");
    const here = written.get(key) ?? [];
    const there = delivered.get(key) ?? [];
    const left = new Map<string, number>();
    for (const line of here) count(left, line, 1);
    for (const line of there) count(left, line, -1);
    const sum = (sign: number) => [...left.values()].reduce((all, n) => all + Math.max(0, n * sign), 0);
    return {
      host,
      window,
      written: here.length,
      delivered: there.length,
      bytes: there.reduce((all, line) => all + line.length, 0),
      parts: parts.get(key) ?? 0,
      identical: Buffer.concat(here).equals(Buffer.concat(there)),
      missing: sum(1),
      extra: sum(-1),
    };
  });
}

/** A host as it stands in batch names. */
export function dashed(host: string): string {
  return host.replace(/[.:]/g, "-");
}

function add(tally: Tally, host: string, window: string, lines: Buffer[]): void {
  const key = `${dashed(host)} ${window}`;
  const known = tally.get(key);
  if (known) for (const line of lines) known.push(line);
  else tally.set(key, lines);
}

function count(counts: Map<string, number>, line: Buffer, by: number): void {
  const key = line.toString("latin1");
  counts.set(key, (counts.get(key) ?? 0) + by);
}

/** Lines with their `\n`; a last one without it is a line, too. */
function splitLines(data: Buffer): Buffer[] {
  const lines: Buffer[] = [];
  for (let from = 0; from < data.length; ) {
    const at = data.indexOf(0x0a, from);
    const end = at < 0 ? data.length : at + 1;
    lines.push(data.subarray(from, end));
    from = end;
  }
  return lines;
}
