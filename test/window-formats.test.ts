/**
 * receiver.logFormat: the place of the time in lines that a real nginx wrote by public formats, many of them for
 * requests that imitate a time or the format (log-formats.json), and in formats of our own.
 */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { compileFormat, createWindowFinder } from "../lib/store/window.ts";

const real: { name: string; logFormat: string; lines: [window: string, line: string][] }[] = JSON.parse(
  readFileSync(join(import.meta.dirname, "log-formats.json"), "utf8"),
);
const COMBINED =
  '$remote_addr - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent"';
const LOCAL = "22/Nov/2026:06:20:01 +0600";
const ISO = "2026-11-22T06:20:01+06:00";
const WINDOW = "26112206_20-39";
const FAKES = `[01/Jan/2020:00:00:00 +0000] 2020-01-01T00:00:00+00:00 1577836800.000`;

/** The window of a line among others, whose bytes must not count. */
function windowOf(line: string, ...logFormat: string[]): string | undefined {
  const find = createWindowFinder(20, { logFormat });
  const around = `${FAKES}\t"${FAKES}"`;
  const bytes = Buffer.from(`${around}\n${line}\n${around}`, "latin1");
  const start = around.length + 1;
  return find(bytes, start, start + Buffer.byteLength(line, "latin1"))?.name;
}

describe("lines of a real nginx", () => {
  for (const { name, logFormat, lines } of real) {
    test(`${name}: every line goes to its own window, or with the line before it`, () => {
      const find = createWindowFinder(20, { logFormat: [logFormat] });
      process.env.TZ = "UTC"; // for $msec, which is in the receiver's own zone
      let last: string | undefined;
      for (const [window, line] of lines) {
        const bytes = Buffer.from(line);
        last = find(bytes, 0, bytes.length)?.name ?? last;
        expect({ line, window: last }).toEqual({ line, window });
      }
    });
  }

  test("combined and a longer format in one list: each line by its own", () => {
    const main = real.find(({ name }) => name === "main");
    const find = createWindowFinder(20, { logFormat: [COMBINED, main?.logFormat ?? ""] });
    for (const [window, line] of main?.lines ?? []) {
      for (const text of [line, line.replace(/ "[^"]*"$/, "")]) {
        const bytes = Buffer.from(text);
        expect(find(bytes, 0, bytes.length)?.name).toBe(window);
      }
    }
  });
});

/** Escapes as nginx does what a client sent. */
const ESCAPES: Record<string, (sign: string) => string> = {
  default: (sign) => (/["\\]|[^ -~]/.test(sign) ? `\\x${hex(sign).toUpperCase()}` : sign),
  json: (sign) =>
    /["\\]/.test(sign) ? `\\${sign}` : sign === "\t" ? "\\t" : sign < " " ? `\\u00${hex(sign)}` : sign,
  none: (sign) => sign,
};
const hex = (sign: string) => sign.charCodeAt(0).toString(16).padStart(2, "0");

/** What nginx writes itself; every other variable has what a client sent. */
const OWN: Record<string, string> = {
  ...{ time_local: "22/Nov/2026:06:20:01 +0000", time_iso8601: "2026-11-22T06:20:01+00:00" },
  ...{ msec: `${Date.parse("2026-11-22T06:20:01Z") / 1000}.123`, remote_addr: "192.0.2.1", status: "200" },
  ...{
    body_bytes_sent: "512",
    request_time: "0.003",
    upstream_response_time: "0.001, 0.002",
    host: "a.example",
  },
  ...{
    request_method: "GET",
    scheme: "https",
    hostname: "web1",
    upstream_addr: "10.0.0.1:80",
    connection: "17",
  },
};
const OLD = ["01/Jan/2020:00:00:00 +0000", "2020-01-01T00:00:00+00:00", "1577836800.000"];
const SENT = [
  "-",
  "GET / HTTP/1.1",
  ...OLD,
  ...OLD.map((time) => `"${time}"`),
  ...OLD.map((time) => `|${time}|`),
]
  .concat(
    OLD.map((time) => `\t[${time}]\t`),
    OLD.map((time) => `","time":"${time}","`),
  )
  .concat(
    `\\"${OLD[1]}\\`,
    `] [${OLD[0]}] "`,
    `${OLD[0]}] ${OLD[0]}`,
    `' '${OLD[0]}' '`,
    '"',
    "\\",
    '\\\\"',
    "\t",
    "[",
  )
  .concat(` ${OLD.join(" ")} `, `time:${OLD[1]}`, "\xff\xfe", "x".repeat(300));

/** Formats as they are met: LTSV, pipes, CSV, JSON, logfmt, tabs, two times, times behind what a client sends. */
const MET = String.raw`time:$time_iso8601\thost:$remote_addr\treq:$request\tua:$http_user_agent
host:$remote_addr\tuser:$remote_user\ttime:[$time_local]\treq:$request\tua:$http_user_agent
host:$remote_addr\treq:$request\tua:$http_user_agent\ttime:$time_local
req:$request\tua:$http_user_agent\tmsec:$msec\treqtime:$request_time
$time_iso8601|$remote_addr|$request|$status|$http_user_agent
$remote_addr|$http_x_forwarded_for|$time_local|$status|$body_bytes_sent
$remote_addr | $remote_user | $time_local | $request | $status | $http_user_agent
$http_x_forwarded_for|$time_local|$request|$status
"$remote_addr","$time_local","$request","$status","$http_user_agent"
"$msec","$request","$http_user_agent"
$remote_addr,$time_iso8601,$status,$request,$http_user_agent
$remote_addr;"$time_local";"$request";$status;"$http_user_agent"
{"time": "$time_iso8601", "remote": "$remote_addr", "request": "$request", "ua": "$http_user_agent"}
{"ua": "$http_user_agent", "request": "$request", "time": "$time_local"}
escape=json {"ua":"$http_user_agent","body":"$request_body","time_local":"$time_local","req":"$request"}
escape=json {"ts":$msec,"req":"$request","ua":"$http_user_agent"}
escape=json {"req":"$request","ua":"$http_user_agent","ts":$msec }
escape=json { "a" : "$http_a" , "@timestamp" : "$time_iso8601" , "b" : "$http_b" }
[$time_local] $msec "$request" "$http_user_agent"
$remote_addr [$time_local] "$request" $status "$http_user_agent" $time_iso8601
[$time_local] "$http_x" [$time_local] "$request"
$hostname $time_iso8601 $http_user_agent
time="$time_iso8601" method="$request_method" uri="$request_uri" ua="$http_user_agent"
level=info uri="$request_uri" ua="$http_user_agent" time=$time_iso8601 status=$status
ip=$remote_addr uri=$request_uri time=$time_iso8601 status=$status
$remote_addr\t$time_local\t$request\t$status\t$http_user_agent
$http_x_forwarded_for - $remote_user [$time_local] "$request" $status $body_bytes_sent "$http_referer"
$http_x_forwarded_for [$time_local] $http_host "$request"
$remote_addr - $remote_user [$time_local] "$request" $status "$http_user_agent" rt=$request_time urt="$upstream_response_time"
'$request' '$http_user_agent' '$time_local'
$remote_addr^^$request^^$http_user_agent^^$msec
$msec $request_time $remote_addr $status $request_method $scheme://$host$request_uri $remote_user
escape=none $remote_addr $request $http_user_agent [$time_local]
escape=none $http_a $time_iso8601 $http_b
<134>nginx: $time_iso8601 $remote_addr $request
<entry time="$time_iso8601" ip="$remote_addr"><req>$request</req></entry>
request: $request, time: $time_local`.split("\n");

describe("formats as they are met, with what clients send to imitate a time", () => {
  test.each(MET)("%s", (format) => {
    process.env.TZ = "UTC";
    const [, escaping = "default", text = ""] = /^(?:escape=(\w+) )?(.*)$/.exec(format) ?? [];
    const find = createWindowFinder(20, { logFormat: [format] });
    const mayDoubt = compileFormat(format).pick === "only";
    for (let first = 0; first < SENT.length; first++) {
      for (const stride of [0, 5]) {
        let next = first;
        const line = text.replaceAll("\\t", "\t").replace(/\$(\w+)/g, (_, name: string) => {
          if (name in OWN) return OWN[name] ?? "";
          next += stride;
          const sent = SENT[next % SENT.length] ?? "";
          const value = name === "remote_user" ? sent.replace(/:.*/, "") : sent;
          return [...value].map((sign) => ESCAPES[escaping]?.(sign)).join("");
        });
        const bytes = Buffer.from(line, "latin1");
        const found = find(bytes, 0, bytes.length)?.name;
        if (!(mayDoubt && found === undefined)) expect({ line, found }).toEqual({ line, found: WINDOW });
      }
    }
  });
});

describe("compileFormat()", () => {
  const cases: Record<string, [logFormat: string, line: string]> = {
    "the text between the quotes": [COMBINED, `1.2.3.4 - - [${LOCAL}] "GET /${FAKES}" 200 5 "${FAKES}" "x"`],
    "a whole directive over several lines, with comments": [
      `log_format x '$remote_addr' # who\n ' [$time_local]' # when\n ' "$request"';`,
      `1.2.3.4 [${LOCAL}] "${FAKES}"`,
    ],
    "a directive in double quotes with an escaped quote": [
      `log_format x "$remote_addr \\"$http_x\\" [$time_local]";`,
      `1.2.3.4 "${FAKES}" [${LOCAL}]`,
    ],
    "LTSV whose tabs are written as \\t": [
      "user:$remote_user\\treq:$request\\ttime:$time_iso8601\\tua:$http_user_agent",
      `user:-\treq:GET /${FAKES}\ttime:${ISO}\tua:${FAKES}`,
    ],
    "pipes, the request before the time": [
      "$remote_addr|$request|$time_local|$status",
      `::1|${FAKES}|x|${LOCAL}|200`,
    ],
    "CSV with quoted times": ['"$http_x","$time_iso8601","$request"', `"${FAKES}","${ISO}","${FAKES}"`],
    "the time behind everything": ["$http_x $request $time_local", `${FAKES} ${FAKES} ${LOCAL}`],
    "the time before everything": ["$time_iso8601 $http_x $request", `${ISO} ${FAKES} ${FAKES}`],
    "escape=json with quotes in values": [
      'escape=json {"ua":"$http_user_agent","time":"$time_iso8601","req":"$request"}',
      `{"ua":"\\"time\\":\\"${FAKES}\\\\","time":"${ISO}","req":"\\\\\\"${FAKES}"}`,
    ],
    "escape=none, the time before what a client writes": [
      "escape=none $remote_addr [$time_local] $request_body",
      `1.2.3.4 [${LOCAL}] "\t${FAKES} [${FAKES}]`,
    ],
    "a name in braces": [
      "$" + "{remote_addr}_$" + "{time_iso8601}_$" + "{request}",
      `1.2.3.4_${ISO}_${FAKES}`,
    ],
    "two times, of which one is safe": [
      '$http_x $time_local $request "$time_iso8601"',
      `${FAKES} ${LOCAL} ${FAKES} "${ISO}"`,
    ],
    "a line of 90 KB before the time": [
      '"$request" $status [$time_local] "$http_referer"',
      `"GET /${"x[".repeat(45_000)}" 200 [${LOCAL}] "${FAKES}"`,
    ],
    "a line of 400 KB behind the time": [
      '$remote_addr "$http_a" [$time_local] "$http_b"',
      `1.2.3.4 "${FAKES}" [${LOCAL}] "${"y".repeat(400_000)}"`,
    ],
  };
  for (const [name, [logFormat, line]] of Object.entries(cases)) {
    test(`finds the time of ${name}`, () => {
      expect(windowOf(line, logFormat)).toBe(WINDOW);
    });
  }

  test("$msec is read in this machine's own zone, and is no request time", () => {
    process.env.TZ = "UTC";
    const at = Date.parse("2026-11-22T06:20:01Z") / 1000;
    expect(windowOf(`x.example 0.003 ${at}.250`, "$host $request_time $msec")).toBe(WINDOW);
    expect(windowOf(`1577836800.123 0.003 ${at}.250`, "$host $request_time $msec")).toBe(WINDOW);
    expect(windowOf(`x.example 0.003 ${at}`, "$host $request_time $msec")).toBeUndefined();
  });

  test("a line that fits no format of a list, or whose place holds no time, has no timestamp", () => {
    expect(windowOf(`${LOCAL} x`, COMBINED)).toBeUndefined();
    expect(windowOf(`a "b" [${LOCAL}]`, `a "$request" [$time_local]`, COMBINED)).toBe(WINDOW);
    expect(
      windowOf(`b "b" [${LOCAL}]`, `a "$request" [$time_local]`, `c "$request" [$time_local]`),
    ).toBeUndefined();
    expect(windowOf(`a "b" "c" [${LOCAL}]`, `a "$request" [$time_local]`, `a [$time_local]`)).toBeUndefined();
    expect(windowOf("", COMBINED)).toBeUndefined();
    expect(windowOf(`1.2.3.4 - - [99/Nov/2026:06:20:01 +0600] "x" 200 5 "-" "-"`, COMBINED)).toBeUndefined();
  });

  test("where a client can write a time on both sides, one time counts, two are none, and the variables are named", () => {
    const format = "$http_a [$time_local] $http_b";
    const place = compileFormat(format);
    expect(place.pick).toBe("only");
    expect(place.doubtful).toEqual(["$http_a", "$http_b"]);
    expect(windowOf(`x [${LOCAL}] y`, format)).toBe(WINDOW);
    expect(windowOf(`x [${LOCAL}] [01/Jan/2020:00:00:00 +0000] y`, format)).toBeUndefined();
    const three = "[01/Jan/2020:00:00:00 +0000] ";
    expect(windowOf(`${three}${three}[${LOCAL}] y`, format)).toBeUndefined();
    for (const safe of [
      "[$time_local] $http_b",
      "$remote_user [$time_local] $http_b",
      '"$http_a" [$time_local] $http_b',
    ])
      expect(compileFormat(safe).pick).not.toBe("only");
  });

  test("refuses a format without a time, and names the three", () => {
    for (const format of ["$remote_addr $request", "", "log_format x '$request';", "$time_locale $msecs"])
      expect(() => compileFormat(format)).toThrow(/\$time_local.*\$time_iso8601.*\$msec/);
  });

  test("its example has its own time in its place", () => {
    for (const format of [COMBINED, ...real.map(({ logFormat }) => logFormat)]) {
      const line = compileFormat(format).example(new Date("2026-11-22T06:20:01Z"));
      expect({ format, window: windowOf(line, format) }).toEqual({ format, window: WINDOW });
    }
  });

  test("hostile lines of 1 MiB are looked at in a few milliseconds", () => {
    const format = "$http_a [$time_local] $http_b";
    const line = Buffer.from(`${"[22/Nov/2026:06:20:0x +0600] ".repeat(36_000)}`);
    const find = createWindowFinder(20, { logFormat: [format] });
    const started = performance.now();
    expect(find(line, 0, line.length)).toBeUndefined();
    expect(performance.now() - started).toBeLessThan(500);
  });
});

describe("without logFormat", () => {
  const find = createWindowFinder(20);
  const rule = (line: string) => find(Buffer.from(line), 0, Buffer.byteLength(line))?.name;
  const cases: Record<string, string> = {
    "ISO 8601 at the head wins over anything behind it": `${ISO} GET /x?since=2001-01-01T00:00:00Z "-"`,
    "a blank for the T, a fraction, a blank before the zone": "2026-11-22 06:20:01.123 +0600 GET /x",
    "JSON behind blanks": ` \t {"a":"x","time":"${ISO}"}`,
    "JSON behind a syslog head": `<190>Nov 22 06:20:07 web nginx: {"user":"${FAKES}","time_local":"${LOCAL}"}`,
    "a key of a time at the first level alone": `{"a":{"time":"2020-01-01T00:00:00Z"},"b":["2020-01-01T00:00:00Z"],"time":"${ISO}"}`,
    "another key is no time": `{"user":"2020-01-01T00:00:00Z","Timestamp":"${ISO}"}`,
  };
  for (const [name, line] of Object.entries(cases)) test(name, () => expect(rule(line)).toBe(WINDOW));

  test("JSON without a key of a time has none", () => {
    expect(rule(`{"user":"2020-01-01T00:00:00Z","x":{"time":"2020-01-01T00:00:00Z"}}`)).toBeUndefined();
  });
});
