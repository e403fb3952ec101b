/**
 * Which window a line belongs to: finds the timestamp by its place in the line, on bytes alone.
 *
 * nginx escapes quotes inside its fields, so the first `"` of a line opens the request. `$time_local` stands
 * before it and `$remote_user` before that: the last timestamp before the first quote is the real one, and
 * what a client writes into its user name or request is not. Formats that have none there are taken by the
 * first timestamp outside quotes; JSON lines by a value that is a timestamp and nothing else.
 */
import { formatWindow } from "../batch.ts";

/** One object per window and zone: lines of one window have the same object. */
export interface Window {
  /** As in the batch's name, from the wall clock that the line shows. */
  name: string;
  /** When it is over, milliseconds since the epoch, by the zone that the line shows. */
  endsAt: number;
}

/** The window of the line `bytes[start, end)`, or undefined when the line has no timestamp. */
export type FindWindow = (bytes: Uint8Array, start: number, end: number) => Window | undefined;

/** How far into a line its timestamp is looked for, in bytes. */
export const STAMP_WITHIN = 65_536;

const QUOTE = 0x22;
const BRACKET = 0x5b;
const BACKSLASH = 0x5c;
const BRACE = 0x7b;
const LETTER_T = 0x54;
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"].map(
  (name) => (name.charCodeAt(0) << 16) | (name.charCodeAt(1) << 8) | name.charCodeAt(2),
);
/** Keys whose value is taken before that of others, in JSON lines. */
const TIME_KEYS = new Set(["time", "timestamp", "@timestamp", "time_iso8601", "time_local", "ts", "date"]);

/** Length of `22/Nov/2026:06:20:01 +0600`. */
const LOCAL_LENGTH = 26;
/** Windows kept to be found again; lines of more windows than this at a time are slower, not wrong. */
const KEPT_WINDOWS = 4096;

/**
 * Makes a finder for windows of `windowMinutes`. With `pattern`, a regular expression whose group 1 is the
 * timestamp in either form, only that is looked for, on the line read as latin1.
 */
export function createWindowFinder(windowMinutes: number, pattern?: string): FindWindow {
  const windows = new Map<string, Window>();
  let lastSlot = -1;
  let lastZone = 0;
  let last: Window | undefined;

  /** The window of a date, or undefined when there is no such date; `zone` is minutes east of UTC. */
  function windowOf(y: number, mo: number, d: number, h: number, mi: number, zone: number) {
    const slot = (((y * 12 + mo) * 32 + d) * 24 + h) * 60 + mi - (mi % windowMinutes);
    if (slot === lastSlot && zone === lastZone) return last;
    if (d < 1 || d > new Date(Date.UTC(y, mo, 0)).getUTCDate()) return undefined;
    const key = `${slot} ${zone}`;
    let window = windows.get(key);
    if (!window) {
      if (windows.size >= KEPT_WINDOWS) windows.clear();
      const end = Date.UTC(y, mo - 1, d, h, mi - (mi % windowMinutes) + windowMinutes);
      window = { name: formatWindow(y, mo, d, h, mi, windowMinutes), endsAt: end - zone * 60_000 };
      windows.set(key, window);
    }
    lastSlot = slot;
    lastZone = zone;
    last = window;
    return window;
  }

  /** `22/Nov/2026:06:20:01 +0600` at `at`, nginx's `$time_local`. */
  function local(b: Uint8Array, at: number, end: number): Window | undefined {
    if (at + LOCAL_LENGTH > end) return undefined;
    if (b[at + 2] !== 0x2f || b[at + 6] !== 0x2f || b[at + 11] !== 0x3a || b[at + 14] !== 0x3a)
      return undefined;
    if (b[at + 17] !== 0x3a || b[at + 20] !== 0x20) return undefined;
    const name = ((b[at + 3] as number) << 16) | ((b[at + 4] as number) << 8) | (b[at + 5] as number);
    const month = MONTHS.indexOf(name) + 1;
    const zone = zoneAt(b, at + 21, two(b, at + 24));
    return timeOf(b, two(b, at + 7) * 100 + two(b, at + 9), month, two(b, at), at + 12, zone);
  }

  /** `2026-11-22T06:20:01` with an optional fraction and a zone at `at`; all of it up to `end` when `whole`. */
  function iso(b: Uint8Array, at: number, end: number, whole: boolean): Window | undefined {
    if (at + 20 > end || b[at + 4] !== 0x2d || b[at + 7] !== 0x2d || b[at + 10] !== LETTER_T)
      return undefined;
    if (b[at + 13] !== 0x3a || b[at + 16] !== 0x3a) return undefined;
    let next = at + 19;
    if (b[next] === 0x2e || b[next] === 0x2c) {
      do next++;
      while (next < end && isDigit(b[next]));
    }
    let zone = 0;
    if (b[next] === 0x5a) next++;
    else {
      const colon = b[next + 3] === 0x3a ? 1 : 0;
      if (next + 5 + colon > end) return undefined;
      zone = zoneAt(b, next, two(b, next + 3 + colon));
      next += 5 + colon;
    }
    if (next > end || (next < end && (whole || isWord(b[next])))) return undefined;
    return timeOf(b, two(b, at) * 100 + two(b, at + 2), two(b, at + 5), two(b, at + 8), at + 11, zone);
  }

  /** The window of a date whose time `06:20:01` stands at `at`. A number that is none came in as NaN. */
  function timeOf(b: Uint8Array, y: number, mo: number, d: number, at: number, zone: number) {
    const hour = two(b, at);
    const minute = two(b, at + 3);
    const ok = y >= 2000 && y <= 2099 && mo >= 1 && mo <= 12 && d <= 31 && hour <= 23 && minute <= 59; // false for NaN
    if (!ok || !(two(b, at + 6) <= 60) || Number.isNaN(zone)) return undefined;
    return windowOf(y, mo, d, hour, minute, zone);
  }

  /** The timestamp whose mark, a bracket or the T of ISO 8601, is at `i`. */
  function at(b: Uint8Array, i: number, start: number, end: number): Window | undefined {
    if (b[i] === BRACKET)
      return i + LOCAL_LENGTH + 1 < end && b[i + LOCAL_LENGTH + 1] === 0x5d
        ? local(b, i + 1, end)
        : undefined;
    const from = i - 10;
    if (from < start || b[i - 3] !== 0x2d || (from > start && isWord(b[from - 1]))) return undefined;
    return iso(b, from, end, false);
  }

  // A native search is faster than a loop here; what it found is kept, so that lines without quotes are not
  // searched to the end of the buffer again and again.
  let searched: Uint8Array | undefined;
  let searchedFrom = 0;
  let quoteAt = 0;

  /** The first quote at or behind `start`; the buffer's length when there is none. */
  function nextQuote(b: Uint8Array, start: number): number {
    if (b !== searched || start < searchedFrom || start > quoteAt) {
      const found = b.indexOf(QUOTE, start);
      searched = b;
      searchedFrom = start;
      quoteAt = found < 0 ? b.length : found;
    }
    return quoteAt;
  }

  function inText(b: Uint8Array, start: number, end: number): Window | undefined {
    const quote = nextQuote(b, start);
    if (quote < end && quote - 29 >= start && b[quote - 29] === BRACKET && b[quote - 2] === 0x5d) {
      const found = local(b, quote - 28, end); // nginx's combined format: nothing can stand nearer to the quote
      if (found) return found;
    }
    let first: Window | undefined;
    let latest: Window | undefined;
    let i = start;
    for (; i < end; i++) {
      const byte = b[i];
      if (byte === QUOTE) break;
      if (byte === BRACKET || byte === LETTER_T) {
        latest = at(b, i, start, end) ?? latest;
        first ??= latest;
      }
    }
    if (i >= end) return first; // no quotes: nothing marks the place, so the first counts
    if (latest) return latest;
    for (let quoted = false; i < end; i++) {
      const byte = b[i];
      if (byte === QUOTE) quoted = !quoted;
      else if (quoted && byte === BACKSLASH) i++;
      else if (!quoted && (byte === BRACKET || byte === LETTER_T)) {
        const found = at(b, i, start, end);
        if (found) return found;
      }
    }
    return undefined;
  }

  function whole(b: Uint8Array, start: number, end: number): Window | undefined {
    if (b[start] === BRACKET && b[end - 1] === 0x5d) return whole(b, start + 1, end - 1);
    return end - start === LOCAL_LENGTH && b[start + 2] === 0x2f
      ? local(b, start, end)
      : iso(b, start, end, true);
  }

  function inJson(b: Uint8Array, start: number, end: number): Window | undefined {
    let first: Window | undefined;
    let keyStart = start;
    let keyEnd = start;
    for (let i = start; i < end; i++) {
      if (b[i] !== QUOTE) continue;
      const open = i + 1;
      for (i = open; i < end && b[i] !== QUOTE; i++) if (b[i] === BACKSLASH) i++;
      let next = i + 1;
      while (b[next] === 0x20) next++;
      if (b[next] === 0x3a) {
        keyStart = open;
        keyEnd = i;
      } else if (i < end && i - open >= 20 && i - open <= 48) {
        const found = whole(b, open, i);
        if (found && TIME_KEYS.has(latin1(b, keyStart, keyEnd))) return found;
        first ??= found;
      }
    }
    return first;
  }

  if (pattern !== undefined) {
    const regexp = new RegExp(pattern);
    return (bytes, start, end) => {
      const text = regexp.exec(latin1(bytes, start, Math.min(end, start + STAMP_WITHIN)))?.[1];
      return text ? whole(Buffer.from(text, "latin1"), 0, text.length) : undefined;
    };
  }
  return (bytes, start, end) => {
    const limit = Math.min(end, start + STAMP_WITHIN);
    return bytes[start] === BRACE ? inJson(bytes, start, limit) : inText(bytes, start, limit);
  };
}

/** The window of a moment by this machine's own wall clock: for lines that have no timestamp and no line before. */
export function windowOfArrival(now: number, windowMinutes: number): Window {
  const at = new Date(now);
  const minute = at.getMinutes();
  const name = formatWindow(
    at.getFullYear(),
    at.getMonth() + 1,
    at.getDate(),
    at.getHours(),
    minute,
    windowMinutes,
  );
  const past = (minute % windowMinutes) * 60_000 + at.getSeconds() * 1000 + at.getMilliseconds();
  return { name, endsAt: now - past + windowMinutes * 60_000 };
}

/** Two decimal digits as a number, NaN when they are none. */
function two(b: Uint8Array, at: number): number {
  const tens = (b[at] as number) - 48;
  const ones = (b[at + 1] as number) - 48;
  return tens >= 0 && tens <= 9 && ones >= 0 && ones <= 9 ? tens * 10 + ones : Number.NaN;
}

/** Minutes east of UTC of `+0600` at `at`; the minutes are given, for they may stand behind a colon. */
function zoneAt(b: Uint8Array, at: number, minutes: number): number {
  const sign = b[at] === 0x2b ? 1 : b[at] === 0x2d ? -1 : Number.NaN;
  const hours = two(b, at + 1);
  return hours <= 14 && minutes <= 59 ? sign * (hours * 60 + minutes) : Number.NaN;
}

function isDigit(byte: number | undefined): boolean {
  return byte !== undefined && byte >= 0x30 && byte <= 0x39;
}

function isWord(byte: number | undefined): boolean {
  return isDigit(byte) || (byte !== undefined && (byte | 0x20) >= 0x61 && (byte | 0x20) <= 0x7a);
}

function latin1(bytes: Uint8Array, start: number, end: number): string {
  return Buffer.from(bytes.buffer, bytes.byteOffset + start, end - start).toString("latin1");
}
