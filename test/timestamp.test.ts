import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { parseWindow } from "../lib/batch.ts";
import { createWindowFinder, windowOfArrival } from "../lib/store/window.ts";

const find = createWindowFinder(20);
const windowOf = (line: string, finder = find) => {
  const bytes = Buffer.from(`before\n${line}\nafter`, "latin1");
  return finder(bytes, 7, 7 + Buffer.byteLength(line, "latin1"))?.name;
};

describe("createWindowFinder()", () => {
  const real = "[22/Nov/2026:06:20:01 +0600]";
  const fake = "[01/Jan/1999:00:00:00 +0000]";
  const other = "[01/Jan/2020:00:00:00 +0000]";
  const request = `"GET / HTTP/1.1" 200 5 "-" "curl/8.5"`;
  const cases: Record<string, [line: string, window: string | undefined]> = {
    "nginx combined": [`10.0.0.1 - - ${real} ${request}`, "26112206_20-39"],
    "IPv6 and a user": [`2001:db8::1 - bob ${real} ${request}`, "26112206_20-39"],
    "a user that looks like a timestamp": [`10.0.0.1 - ${other} ${real} ${request}`, "26112206_20-39"],
    "a user with a T and a bracket": [`10.0.0.1 - T[Tom ${real} ${request}`, "26112206_20-39"],
    "a user that looks like half a timestamp": [
      `10.0.0.1 - [01/Jan/2020:00:00:00 ${real} ${request}`,
      "26112206_20-39",
    ],
    "a request that looks like a timestamp": [
      `10.0.0.1 - - ${real} "GET /${other} HTTP/1.1" 200`,
      "26112206_20-39",
    ],
    "an agent that looks like a timestamp": [`10.0.0.1 - - ${real} "GET /" 200 "${other}"`, "26112206_20-39"],
    "only the request looks like one": [`10.0.0.1 - - - "GET /${other} HTTP/1.1" 200`, undefined],
    "the timestamp behind the request": [`"GET /${other} HTTP/1.1" 200 ${real} "-"`, "26112206_20-39"],
    "a quote escaped with a backslash": [`"GET /\\" ${other} HTTP/1.1" 200 ${real}`, "26112206_20-39"],
    "the first of several without quotes": [`${real} error at ${other}`, "26112206_20-39"],
    "ISO 8601 with an offset": ["10.0.0.1 2026-11-22T06:20:01+06:00 GET", "26112206_20-39"],
    "ISO 8601 in brackets before the request": [
      `10.0.0.1 - - [2026-11-22T06:20:01+06:00] ${request}`,
      "26112206_20-39",
    ],
    "ISO 8601 without a colon in its offset": ["2026-11-22T06:20:01.123-0330 GET", "26112206_20-39"],
    "ISO 8601 with a fraction and Z": ["2026-11-22T06:59:59.999999Z GET", "26112206_40-59"],
    "ISO 8601 without a zone": ["2026-11-22T06:20:01 GET", undefined],
    "ISO 8601 inside a word": ["x2026-11-22T06:20:01Z GET", undefined],
    "ISO 8601 with more behind it": ["2026-11-22T06:20:01Zx GET", undefined],
    "JSON with time_local": [
      `{"time_local":"22/Nov/2026:06:20:01 +0600","request":"GET /"}`,
      "26112206_20-39",
    ],
    "JSON with an ISO time behind a fake one": [
      `{"remote_user":"2020-01-01T00:00:00Z","time":"2026-11-22T06:20:01+06:00"}`,
      "26112206_20-39",
    ],
    "JSON with a time inside another value": [`{"request":"GET /2020-01-01T00:00:00Z"}`, undefined],
    "JSON with a key inside a value": [
      `{"agent":"\\"time\\":\\"2020-01-01T00:00:00Z\\"","@timestamp" : "2026-11-22T06:20:01Z"}`,
      "26112206_20-39",
    ],
    "JSON with a key of its own": [`{"when":"2026-11-22T06:20:01Z","n":1}`, "26112206_20-39"],
    "JSON with brackets": [`{"t":"${real}"}`, "26112206_20-39"],
    "day 99": ["10.0.0.1 - - [99/Nov/2026:06:20:01 +0600] x", undefined],
    "February 30": ["10.0.0.1 - - [30/Feb/2026:06:20:01 +0600] x", undefined],
    "February 29 of a leap year": ["10.0.0.1 - - [29/Feb/2028:06:20:01 +0600] x", "28022906_20-39"],
    "hour 24": ["10.0.0.1 - - [22/Nov/2026:24:20:01 +0600] x", undefined],
    "minute 60": ["10.0.0.1 - - [22/Nov/2026:06:60:01 +0600] x", undefined],
    "a leap second": ["10.0.0.1 - - [22/Nov/2026:06:59:60 +0600] x", "26112206_40-59"],
    "no such month": ["10.0.0.1 - - [22/Nvo/2026:06:20:01 +0600] x", undefined],
    "a year before ours": [`10.0.0.1 - - ${fake} x`, undefined],
    "a year that two digits cannot tell": ["10.0.0.1 - - [22/Nov/2126:06:20:01 +0600] x", undefined],
    "a timestamp that is cut short": ["10.0.0.1 - - [22/Nov/2026:06:20:01 +06", undefined],
    "an empty line": ["", undefined],
    binary: ["\xff\xfe\x00[\x80T", undefined],
  };
  for (const [name, [line, window]] of Object.entries(cases)) {
    test(`finds the window of ${name}`, () => {
      expect(windowOf(line)).toBe(window);
      expect(windowOf(`10.0.0.1 - - ${real} ${request}`)).toBe("26112206_20-39"); // nothing of it is left behind
      expect(windowOf(line)).toBe(window);
    });
  }

  test("gives lines of one window and zone the same object, and its end by the zone", () => {
    const line = Buffer.from(`10.0.0.1 - - ${real} ${request}`);
    const later = Buffer.from(`10.0.0.22 - - [22/Nov/2026:06:39:59 +0600] ${request}`);
    const utc = Buffer.from(`10.0.0.22 - - [22/Nov/2026:06:39:59 +0000] ${request}`);
    const window = find(line, 0, line.length);
    expect(find(later, 0, later.length)).toBe(window as NonNullable<typeof window>);
    expect(window?.endsAt).toBe(Date.parse("2026-11-22T06:40:00+06:00"));
    expect(find(utc, 0, utc.length)?.endsAt).toBe(Date.parse("2026-11-22T06:40:00Z"));
  });

  test("finds any moment in both forms, for every length of window", () => {
    const minutes = fc.constantFrom(1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60);
    const moment = fc.date({
      min: new Date("2000-01-01T00:00:00Z"),
      max: new Date("2099-12-31T23:59:59Z"),
      noInvalidDate: true,
    });
    const zone = fc.integer({ min: -14 * 60 + 1, max: 14 * 60 });
    fc.assert(
      fc.property(minutes, moment, zone, (length, date, offset) => {
        const finder = createWindowFinder(length);
        const [day, month, , year, time] = [
          ...[date.toUTCString().split(" ")[1], date.toUTCString().split(" ")[2], ""],
          ...[date.toUTCString().split(" ")[3], date.toUTCString().split(" ")[4]],
        ];
        const two = (n: number) => String(n).padStart(2, "0");
        const sign = offset < 0 ? "-" : "+";
        const [hours, rest] = [two(Math.floor(Math.abs(offset) / 60)), two(Math.abs(offset) % 60)];
        const local = `1.2.3.4 - - [${day}/${month}/${year}:${time} ${sign}${hours}${rest}] "GET /"`;
        const iso = `1.2.3.4 ${date.toISOString().slice(0, 19)}${sign}${hours}:${rest} "GET /"`;
        const name = windowOf(local, finder);
        expect(windowOf(iso, finder)).toBe(name as string);
        const { start, end } = parseWindow(name ?? "");
        expect(end - start).toBe(length * 60_000);
        const wall = Math.floor(date.getTime() / 1000) * 1000;
        expect(start <= wall && wall < end).toBe(true);
        const bytes = Buffer.from(local);
        expect(finder(bytes, 0, bytes.length)?.endsAt).toBe(end - offset * 60_000);
      }),
    );
  });

  test("never throws and never reads a line's neighbours, whatever the bytes", () => {
    const piece = fc.oneof(
      fc.constantFrom(
        "[",
        "T",
        '"',
        "{",
        "\\",
        ":",
        real,
        "2026-11-22T06:20:01Z",
        "22/Nov/2026:06:20:01 +0600",
      ),
      fc.string({ unit: "binary", maxLength: 8 }),
    );
    fc.assert(
      fc.property(fc.array(piece, { maxLength: 12 }), (pieces) => {
        const line = Buffer.from(pieces.join(""), "latin1");
        const alone = find(line, 0, line.length);
        const among = Buffer.concat([Buffer.from(real), line, Buffer.from(real)]);
        expect(find(among, real.length, real.length + line.length)).toBe(alone as NonNullable<typeof alone>);
      }),
      { numRuns: 2000 },
    );
  });

  test("takes the first group of a pattern, in either form", () => {
    const finder = createWindowFinder(20, { timestampPattern: "^\\w+ <(.*?)>" });
    expect(windowOf(`GET <22/Nov/2026:06:20:01 +0600> ${other}`, finder)).toBe("26112206_20-39");
    expect(windowOf("GET <2026-11-22T06:20:01Z>", finder)).toBe("26112206_20-39");
    expect(windowOf("GET <yesterday>", finder)).toBeUndefined();
    expect(windowOf(real, finder)).toBeUndefined();
  });
});

test("windowOfArrival() holds the moment, by this machine's wall clock", () => {
  fc.assert(
    fc.property(fc.integer({ min: 946_684_800_000, max: 4_102_444_799_000 }), (now) => {
      const { name, endsAt } = windowOfArrival(now, 20);
      expect(endsAt > now && endsAt - now <= 20 * 60_000).toBe(true);
      const { start } = parseWindow(name);
      expect(new Date(start).getUTCHours()).toBe(new Date(now).getHours());
    }),
  );
});
