/**
 * Which window a line belongs to, by the time in its place, on bytes alone.
 *
 * With `logFormat` the place is compiled from nginx's own directive. nginx escapes quotes and tabs inside its
 * variables, so those of the format cut a line into segments that no client can move; of the times in the time's own
 * segment it is the first, the last, or at a fixed distance from an end, by what the variables beside it can hold.
 * Without, the rules know what begins like nginx's or Apache's formats, ISO 8601 at the head of a line, and JSON.
 */
import { formatWindow, parseWindow } from "../batch.ts";
import type { Config } from "../config.ts";
import { localZone, MINUTE } from "../service.ts";

/** One object per window and zone: lines of one window have the same object. */
export interface Window {
  /** As in the batch's name, from the wall clock that the line shows. */
  name: string;
  /** When it is over, milliseconds since the epoch, by the zone that the line shows. */
  endsAt: number;
  /** That zone, in minutes east of UTC. */
  zone: number;
}

/** The window of the line `bytes[start, end)`, or undefined when the line has no timestamp. */
export type FindWindow = (bytes: Uint8Array, start: number, end: number) => Window | undefined;

/** How far into a line its timestamp is looked for, in bytes; nginx's default buffers make lines of 85 KB. */
export const STAMP_WITHIN = 262_144;

const [TAB, SPACE, QUOTE, BRACKET, BACKSLASH, LETTER_T] = [0x09, 0x20, 0x22, 0x5b, 0x5c, 0x54];
const [OPEN_BRACE, CLOSE_BRACE, CLOSE_BRACKET] = [0x7b, 0x7d, 0x5d];
const MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"].map(
  (name) => (name.charCodeAt(0) << 16) | (name.charCodeAt(1) << 8) | name.charCodeAt(2),
);
/** Keys of a time in JSON lines, in lower case. */
const TIME_KEYS = new Set([
  ...["time", "timestamp", "@timestamp", "@time", "time_iso8601", "time_local", "log_time"],
  ...["ts", "t", "date", "datetime", "when", "eventtime", "event_time", "start_time", "starttime"],
]);
/** Windows kept to be found again; lines of more windows than this at a time are slower, not wrong. */
const KEPT_WINDOWS = 4096;

/** The forms that nginx writes, each of a fixed length. */
const LENGTH = { time_local: 26, time_iso8601: 25, msec: 14 } as const;
type TimeVariable = keyof typeof LENGTH;

/** Reads times and gives the window of each, the same object for the same window. */
class Calendar {
  readonly #minutes: number;
  readonly #windows = new Map<string, Window>();
  #slot = -1;
  #zone = 0;
  #last: Window | undefined;

  constructor(windowMinutes: number) {
    this.#minutes = windowMinutes;
  }

  /** The window of a date, or undefined when there is no such date; `zone` is minutes east of UTC. */
  #windowOf(y: number, mo: number, d: number, h: number, mi: number, zone: number): Window | undefined {
    const minutes = this.#minutes;
    const slot = (((y * 12 + mo) * 32 + d) * 24 + h) * 60 + mi - (mi % minutes);
    if (slot === this.#slot && zone === this.#zone) return this.#last;
    if (d < 1 || d > new Date(Date.UTC(y, mo, 0)).getUTCDate()) return undefined;
    const key = `${slot} ${zone}`;
    let window = this.#windows.get(key);
    if (!window) {
      if (this.#windows.size >= KEPT_WINDOWS) this.#windows.clear();
      window = windowAt(Date.UTC(y, mo - 1, d, h, mi), minutes, zone);
      this.#windows.set(key, window);
    }
    this.#slot = slot;
    this.#zone = zone;
    this.#last = window;
    return window;
  }

  /** `22/Nov/2026:06:20:01 +0600` at `at`. */
  local(b: Uint8Array, at: number, end: number): Window | undefined {
    if (at + LENGTH.time_local > end || b[at + 2] !== 0x2f || b[at + 6] !== 0x2f || b[at + 11] !== 0x3a)
      return undefined;
    if (b[at + 14] !== 0x3a || b[at + 17] !== 0x3a || b[at + 20] !== SPACE) return undefined;
    const name = ((b[at + 3] as number) << 16) | ((b[at + 4] as number) << 8) | (b[at + 5] as number);
    const zone = zoneAt(b, at + 21, two(b, at + 24));
    const year = two(b, at + 7) * 100 + two(b, at + 9);
    return this.#timeOf(b, year, MONTHS.indexOf(name) + 1, two(b, at), at + 12, zone);
  }

  /** `2026-11-22T06:20:01`, also with a blank for the T, with an optional fraction and a zone; up to `end` when `whole`. */
  iso(b: Uint8Array, at: number, end: number, whole: boolean): Window | undefined {
    const mark = b[at + 10];
    if (at + 20 > end || b[at + 4] !== 0x2d || b[at + 7] !== 0x2d || (mark !== LETTER_T && mark !== SPACE))
      return undefined;
    if (b[at + 13] !== 0x3a || b[at + 16] !== 0x3a) return undefined;
    let next = at + 19;
    if (b[next] === 0x2e || b[next] === 0x2c) {
      do next++;
      while (next < end && isDigit(b[next]));
    }
    if (mark === SPACE && b[next] === SPACE) next++;
    let zone = 0;
    if (b[next] === 0x5a) next++;
    else {
      const colon = b[next + 3] === 0x3a ? 1 : 0;
      if (next + 5 + colon > end) return undefined;
      zone = zoneAt(b, next, two(b, next + 3 + colon));
      next += 5 + colon;
    }
    if (next > end || (next < end && (whole || isWord(b[next])))) return undefined;
    return this.#timeOf(b, two(b, at) * 100 + two(b, at + 2), two(b, at + 5), two(b, at + 8), at + 11, zone);
  }

  /** `1774720796.103` at `at`, in this machine's own zone. */
  msec(b: Uint8Array, at: number, end: number): Window | undefined {
    if (at + LENGTH.msec > end || b[at + 10] !== 0x2e || isDigit(b[at - 1]) || b[at] === 0x30)
      return undefined;
    if (at + LENGTH.msec < end && (isDigit(b[at + 14]) || b[at + 14] === 0x2e)) return undefined;
    let value = 0;
    for (let i = 0; i < 10; i++)
      value = value * 10 + (isDigit(b[at + i]) ? (b[at + i] as number) - 48 : Number.NaN);
    if (Number.isNaN(value) || ![11, 12, 13].every((i) => isDigit(b[at + i]))) return undefined;
    const date = new Date(value * 1000);
    const [hour, minute] = [date.getHours(), date.getMinutes()];
    const zone = -date.getTimezoneOffset();
    return this.#windowOf(date.getFullYear(), date.getMonth() + 1, date.getDate(), hour, minute, zone);
  }

  /** The window of a date whose time `06:20:01` stands at `at`. A number that is none came in as NaN. */
  #timeOf(b: Uint8Array, y: number, mo: number, d: number, at: number, zone: number): Window | undefined {
    const hour = two(b, at);
    const minute = two(b, at + 3);
    const ok = y >= 2000 && y <= 2099 && mo >= 1 && mo <= 12 && d <= 31 && hour <= 23 && minute <= 59; // false for NaN
    if (!ok || !(two(b, at + 6) <= 60) || Number.isNaN(zone)) return undefined;
    return this.#windowOf(y, mo, d, hour, minute, zone);
  }

  read(variable: TimeVariable, b: Uint8Array, at: number, end: number): Window | undefined {
    if (variable === "time_local") return this.local(b, at, end);
    return variable === "msec" ? this.msec(b, at, end) : this.iso(b, at, Math.min(at + 25, end), true);
  }

  /** A text that is a time and nothing else, also in brackets. */
  whole(b: Uint8Array, start: number, end: number): Window | undefined {
    if (b[start] === BRACKET && b[end - 1] === CLOSE_BRACKET) return this.whole(b, start + 1, end - 1);
    const isLocal = end - start === LENGTH.time_local && b[start + 2] === 0x2f;
    return isLocal ? this.local(b, start, end) : this.iso(b, start, end, true);
  }
}

// ---- logFormat

/** Where the time of a format is, compiled from the text of the format once. */
export interface TimePlace {
  variable: TimeVariable;
  prefix: Uint8Array;
  /** Quotes and tabs of the whole format, and those before the time; undefined with `escape=none`. */
  delimiters: { all: number; before: number } | undefined;
  /** Text of the format beside the time, within its segment. */
  lead: Uint8Array;
  tail: Uint8Array;
  /** Which of the times in the segment it is; `start` and `end`: at a fixed distance from that end. */
  pick: "start" | "end" | "first" | "last" | "only";
  /** For `only`: the variables on both sides that a client can write a time into. */
  doubtful: string[];
  /** A line of this format, for people and for a trial of the place. */
  example: (now: Date) => string;
}

interface Piece {
  variable?: string;
  text: string;
}

/** Variables that cannot hold a time: what nginx makes itself, and `$host`; see {@link holdsTime}. */
const OWN = new RegExp(
  `^(?:${[
    "remote_addr|remote_port|realip_remote_(?:addr|port)|proxy_protocol_(?:server_)?(?:addr|port)|binary_remote_addr",
    "server_(?:addr|port|name|protocol)|scheme|https|http2|http3|status|request_(?:time|length|id|method|completion)",
    "body_bytes_sent|bytes_(?:sent|received)|connection(?:_requests|_time|s_\\w+)?|pipe|pid|hostname|nginx_version",
    "msec|time_local|time_iso8601|gzip_ratio|is_args|limit_(?:rate|req_status|conn_status)|tcpinfo_\\w+|geoip2?_\\w+",
    "upstream_(?!http_|cookie_|trailer_)\\w+|ssl_(?:protocol|cipher|curve|session_id|session_reused|early_data|server_name)",
    "remote_user|host",
  ].join("|")})$`,
);

/** Whether a client can write a time of this form there. `$remote_user` ends at a colon, `$host` has no slash. */
function holdsTime(name: string, time: TimeVariable): boolean {
  if (time === "msec" && /^(?:remote_user|host|ssl_server_name)$/.test(name)) return true;
  return !OWN.test(name);
}

/** Compiles a format: a whole `log_format …;` or the text between its quotes. Throws an Error that says what it lacks. */
export function compileFormat(text: string): TimePlace {
  const { escaping, format } = readDirective(text);
  const pieces: Piece[] = [];
  let end = 0;
  for (const match of format.matchAll(/\$(?:\{(\w+)\}|(\w+))/g)) {
    const name = match[1] ?? match[2] ?? "";
    pieces.push({ text: format.slice(end, match.index) }, { variable: name, text: "" });
    end = match.index + match[0].length;
  }
  pieces.push({ text: format.slice(end) });
  const places = pieces.flatMap(({ variable }, index) =>
    variable !== undefined && variable in LENGTH ? [placeAt(pieces, index, escaping)] : [],
  );
  const rank = ({ pick, variable }: TimePlace) => (pick === "only" ? 2 : 0) + (variable === "msec" ? 1 : 0);
  const best = places.sort((a, b) => rank(a) - rank(b))[0];
  if (!best) throw new Error("has no time: expected $time_local, $time_iso8601 or $msec in it");
  return best;
}

/** The escaping and the text of a directive as nginx puts it together from its quoted parts, without comments. */
function readDirective(text: string): { escaping: string; format: string } {
  const unquote = (part: string) =>
    part.replace(/\\(["'\\tnr])/g, (_, sign: string) => ({ t: "\t", n: "\n", r: "\r" })[sign] ?? sign);
  if (!/^\s*log_format\s/.test(text)) {
    const [, escaping = "default", format = ""] = /^(?:escape=(\w+)\s+)?([\s\S]*)$/.exec(text) ?? [];
    return { escaping, format: unquote(format) };
  }
  const words = text.matchAll(/#[^\n]*|"((?:[^"\\]|\\[\s\S])*)"|'((?:[^'\\]|\\[\s\S])*)'|;|[^\s;]+/g);
  const [, , ...parts] = [...words].filter(([word]) => !word.startsWith("#") && word !== ";");
  const [, escaping] = /^escape=(\w+)$/.exec(parts[0]?.[0] ?? "") ?? [];
  if (escaping !== undefined) parts.shift();
  return {
    escaping: escaping ?? "default",
    format: parts.map(([word, double, single]) => unquote(double ?? single ?? word)).join(""),
  };
}

function placeAt(pieces: Piece[], index: number, escaping: string): TimePlace {
  const variable = pieces[index]?.variable as TimeVariable;
  const isFree = escaping === "none";
  const cut = (text: string) => (isFree ? [text] : splitAtDelimiters(text));
  const before = pieces.slice(0, index);
  const after = pieces.slice(index + 1);
  const segmentBefore = lastSegment(before, cut);
  const segmentAfter = lastSegment(after.toReversed(), (text) => cut(text).reverse());
  const unsafe = (names: string[]) => names.filter((name) => holdsTime(name, variable));
  const [left, right] = [unsafe(segmentBefore.variables), unsafe(segmentAfter.variables)];
  const count = (some: Piece[]) => some.reduce((sum, { text }) => sum + cut(text).length - 1, 0);
  const pick = () => {
    if (segmentBefore.variables.length === 0) return "start";
    if (segmentAfter.variables.length === 0) return "end";
    if (left.length === 0) return "first";
    return right.length === 0 ? "last" : "only";
  };
  return {
    variable,
    prefix: Buffer.from(pieces[0]?.text ?? ""),
    delimiters: isFree ? undefined : { all: count(pieces), before: count(before) },
    lead: Buffer.from(segmentBefore.text),
    tail: Buffer.from(segmentAfter.text),
    pick: pick(),
    doubtful: [...left, ...right].map((name) => `$${name}`),
    example: (now) => pieces.map(({ variable: name, text }) => (name ? exampleOf(name, now) : text)).join(""),
  };
}

/** What of the pieces is in the last segment: its variables, and the text behind the last of them. */
function lastSegment(pieces: Piece[], cut: (text: string) => string[]) {
  const variables: string[] = [];
  let text: string | undefined;
  for (const piece of pieces.toReversed()) {
    if (piece.variable !== undefined) {
      variables.push(piece.variable);
      text ??= "";
      continue;
    }
    const parts = cut(piece.text);
    text ??= parts.at(-1) ?? "";
    if (parts.length > 1) break;
  }
  return { variables, text: text ?? "" };
}

/** The parts of a text between its quotes and tabs; those behind a backslash are none. */
function splitAtDelimiters(text: string): string[] {
  return text.replace(/\\[\s\S]|["\t]/g, (sign) => (sign.length === 1 ? "\0" : sign)).split("\0");
}

function exampleOf(name: string, now: Date): string {
  const iso = now.toISOString().slice(0, 19);
  const [year, month, day, time] = [iso.slice(0, 4), now.getUTCMonth(), iso.slice(8, 10), iso.slice(11)];
  const monthName = new Date(Date.UTC(2000, month)).toUTCString().slice(8, 11);
  const examples: Record<string, string> = {
    time_local: `${day}/${monthName}/${year}:${time} +0000`,
    time_iso8601: `${iso}+00:00`,
    msec: (now.getTime() / 1000).toFixed(3),
    remote_addr: "192.0.2.1",
    request: "GET / HTTP/1.1",
    status: "200",
  };
  return examples[name] ?? "-";
}

function findByFormats(calendar: Calendar, places: TimePlace[]): FindWindow {
  const [only] = places;
  if (only && places.length === 1) {
    // combined and its like: the time stands just before the first quote
    if (only.pick === "end" && only.delimiters?.before === 0 && only.delimiters.all > 0) {
      const { variable, prefix, lead, tail } = only;
      const back = tail.length + LENGTH[variable];
      const quotes = new QuoteSearch();
      return (b, start, end) => {
        const to = quotes.first(b, start, end);
        const at = to - back;
        if (at - lead.length < start || (prefix.length > 0 && !matches(b, start, end, prefix)))
          return undefined;
        for (let i = 0; i < lead.length; i++) if (b[at - lead.length + i] !== lead[i]) return undefined;
        for (let i = 1; i <= tail.length; i++) if (b[to - i] !== tail[tail.length - i]) return undefined;
        return variable === "time_local" ? calendar.local(b, at, to) : calendar.read(variable, b, at, to);
      };
    }
    return (b, start, end) =>
      matches(b, start, end, only.prefix) ? findAt(calendar, only, b, start, end) : undefined;
  }
  return (b, start, end) => {
    let count = -1;
    for (const place of places) {
      if (!matches(b, start, end, place.prefix)) continue;
      if (place.delimiters) {
        if (count < 0) count = countDelimiters(b, start, end);
        if (count === place.delimiters.all) return findAt(calendar, place, b, start, end);
      } else {
        const found = findAt(calendar, place, b, start, end);
        if (found) return found; // nothing else tells a line of a format whose variables are not escaped
      }
    }
    return undefined;
  };
}

/** The window by one place, or undefined when no time, or more than one, stands there. */
function findAt(calendar: Calendar, place: TimePlace, b: Uint8Array, start: number, end: number) {
  const { delimiters, pick } = place;
  let from = start;
  let to = end;
  if (delimiters) {
    const { all, before } = delimiters;
    if (before <= all - before) {
      for (let i = 0; i < before && from <= end; i++) from = nextDelimiter(b, from, end) + 1;
      if (all > before && pick !== "start") to = nextDelimiter(b, from, end);
    } else {
      for (let i = all; i > before && to >= start; i--) to = previousDelimiter(b, start, to);
      if (before > 0 && pick !== "end") from = previousDelimiter(b, start, to) + 1;
    }
    if (from > end || to < start) return undefined;
  }
  if (pick === "end")
    return timeAt(calendar, place, b, to - place.tail.length - LENGTH[place.variable], from, to);
  if (pick === "start") return timeAt(calendar, place, b, from + place.lead.length, from, to);
  return searchTime(calendar, place, b, from, to);
}

/** The first time of a segment, the last, or the only one. */
function searchTime(calendar: Calendar, place: TimePlace, b: Uint8Array, from: number, to: number) {
  const last = to - LENGTH[place.variable];
  const step = place.pick === "last" ? -1 : 1;
  let found: Window | undefined;
  for (let at = step > 0 ? from : last; at >= from && at <= last; at += step) {
    if (b[at + 10] !== 0x2e && b[at + 2] !== 0x2f && b[at + 4] !== 0x2d) continue;
    const one = timeAt(calendar, place, b, at, from, to);
    if (!one) continue;
    if (place.pick !== "only") return one;
    if (found && found !== one) return undefined;
    found = one;
  }
  return found;
}

/** The window of the time at `at`, when the text of the format stands around it. */
function timeAt(calendar: Calendar, place: TimePlace, b: Uint8Array, at: number, from: number, to: number) {
  const { variable, lead, tail } = place;
  const after = at + LENGTH[variable];
  if (at < from || after > to || !matches(b, at - lead.length, to, lead) || !matches(b, after, to, tail))
    return undefined;
  return variable === "time_local" ? calendar.local(b, at, to) : calendar.read(variable, b, at, to);
}

function matches(b: Uint8Array, at: number, end: number, text: Uint8Array): boolean {
  if (at < 0 || at + text.length > end) return false;
  for (let i = 0; i < text.length; i++) if (b[at + i] !== text[i]) return false;
  return true;
}

/** Place of the first quote or tab at or behind `from` that no backslash precedes; `end` when there is none. */
function nextDelimiter(b: Uint8Array, from: number, end: number): number {
  for (let i = from; i < end; i++) {
    const byte = b[i];
    if (byte === QUOTE || byte === TAB) return i;
    if (byte === BACKSLASH) i++;
  }
  return end;
}

/** Place of the last one before `to`; `start - 1` when there is none. */
function previousDelimiter(b: Uint8Array, start: number, to: number): number {
  for (let i = to - 1; i >= start; i--) {
    if (b[i] !== QUOTE && b[i] !== TAB) continue;
    let first = i;
    while (first > start && b[first - 1] === BACKSLASH) first--;
    if ((i - first) % 2 === 0) return i;
    i = first;
  }
  return start - 1;
}

function countDelimiters(b: Uint8Array, start: number, end: number): number {
  let count = 0;
  for (let at = nextDelimiter(b, start, end); at < end; at = nextDelimiter(b, at + 1, end)) count++;
  return count;
}

/**
 * The first quote of a line. A native search is faster than a loop here; what it found is kept, so that lines without
 * quotes are not searched to the end of the buffer again and again.
 */
class QuoteSearch {
  #bytes: Uint8Array | undefined;
  #from = 0;
  #at = 0;

  first(b: Uint8Array, start: number, end: number): number {
    if (b !== this.#bytes || start < this.#from || start > this.#at) {
      const found = b.indexOf(QUOTE, start);
      this.#bytes = b;
      this.#from = start;
      this.#at = found < 0 ? b.length : found;
    }
    return Math.min(this.#at, end);
  }
}

// ---- without logFormat

function findByRules(calendar: Calendar): FindWindow {
  const quotes = new QuoteSearch();
  return (b, start, lineEnd) => {
    const end = Math.min(lineEnd, start + STAMP_WITHIN);
    const head = b[start] === 0x32 ? calendar.iso(b, start, end, false) : undefined; // 2026-…
    if (head) return head;
    const quote = quotes.first(b, start, end);
    let brace = quote - 1;
    while (brace > start && b[brace] === SPACE) brace--;
    const found = b[brace] === OPEN_BRACE && brace >= start ? findInJson(calendar, b, brace, end) : undefined;
    return (
      found ??
      (firstSign(b, start, end) === OPEN_BRACE ? undefined : findInText(calendar, b, start, end, quote))
    );
  };
}

function firstSign(b: Uint8Array, start: number, end: number): number | undefined {
  let at = start;
  while (at < end && (b[at] === SPACE || b[at] === TAB)) at++;
  return b[at];
}

/** The last time before the first quote, else the first one outside quotes. */
function findInText(calendar: Calendar, b: Uint8Array, start: number, end: number, quote: number) {
  if (quote < end && quote - 29 >= start && b[quote - 29] === BRACKET && b[quote - 2] === CLOSE_BRACKET) {
    const found = calendar.local(b, quote - 28, end); // nginx's combined format: nothing can stand nearer to the quote
    if (found) return found;
  }
  let first: Window | undefined;
  let latest: Window | undefined;
  let i = start;
  for (; i < quote; i++) {
    const byte = b[i];
    if (byte !== BRACKET && byte !== LETTER_T) continue;
    latest = timeAtMark(calendar, b, i, start, end) ?? latest;
    first ??= latest;
  }
  if (i >= end) return first; // no quotes: nothing marks the place, so the first counts
  if (latest) return latest;
  for (let quoted = false; i < end; i++) {
    const byte = b[i];
    if (byte === BACKSLASH) i++;
    else if (byte === QUOTE) quoted = !quoted;
    else if (!quoted && (byte === BRACKET || byte === LETTER_T)) {
      const found = timeAtMark(calendar, b, i, start, end);
      if (found) return found;
    }
  }
  return undefined;
}

/** The time whose mark, a bracket or the T of ISO 8601, is at `i`. */
function timeAtMark(calendar: Calendar, b: Uint8Array, i: number, start: number, end: number) {
  if (b[i] === BRACKET) {
    const close = i + LENGTH.time_local + 1;
    if (close < end && b[close] === CLOSE_BRACKET) return calendar.local(b, i + 1, end);
    return b[i + 11] === SPACE ? calendar.iso(b, i + 1, end, false) : undefined;
  }
  const from = i - 10;
  if (from < start || b[i - 3] !== 0x2d || (from > start && isWord(b[from - 1]))) return undefined;
  return calendar.iso(b, from, end, false);
}

/** The value of the first key of a time at the first level of the object that begins at `start`. */
function findInJson(calendar: Calendar, b: Uint8Array, start: number, end: number): Window | undefined {
  let depth = 0;
  let key = "";
  for (let i = start; i < end; i++) {
    const byte = b[i];
    if (byte === OPEN_BRACE || byte === BRACKET) depth++;
    else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) depth--;
    if (byte !== QUOTE) continue;
    const open = i + 1;
    for (i = open; i < end && b[i] !== QUOTE; i++) if (b[i] === BACKSLASH) i++;
    if (depth !== 1 || i >= end) continue;
    let next = i + 1;
    while (b[next] === SPACE) next++;
    if (b[next] === 0x3a) key = i - open <= 16 ? latin1(b, open, i).toLowerCase() : "";
    else if (i - open >= 20 && i - open <= 48 && TIME_KEYS.has(key)) {
      const found = calendar.whole(b, open, i);
      if (found) return found;
    }
  }
  return undefined;
}

// ---- all of them

/**
 * Makes a finder for windows of `windowMinutes`: by formats of nginx, by the expression of before (group 1, on the line
 * read as latin1), or else by rules. Throws an Error for a format without a time.
 */
export function createWindowFinder(
  windowMinutes: number,
  { logFormat, timestampPattern }: Partial<Config["receiver"]> = {},
): FindWindow {
  const calendar = new Calendar(windowMinutes);
  if (logFormat) return findByFormats(calendar, logFormat.map(compileFormat));
  if (timestampPattern === undefined) return findByRules(calendar);
  const regexp = new RegExp(timestampPattern);
  return (bytes, start, end) => {
    const text = regexp.exec(latin1(bytes, start, Math.min(end, start + STAMP_WITHIN)))?.[1];
    return text ? calendar.whole(Buffer.from(text, "latin1"), 0, text.length) : undefined;
  };
}

/** The window of a moment by this machine's own wall clock: for lines that have no timestamp and no line before. */
export function windowOfArrival(now: number, windowMinutes: number): Window {
  const zone = localZone(now);
  return windowAt(now + zone * MINUTE, windowMinutes, zone);
}

/** The window of a time, as UTC milliseconds of a wall clock that is `zone` minutes east of UTC. */
function windowAt(wall: number, windowMinutes: number, zone: number): Window {
  const name = formatWindow(wall, windowMinutes);
  return { name, endsAt: parseWindow(name).end - zone * MINUTE, zone };
}

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
