import { describe, expect, test } from "bun:test";
import fc from "fast-check";
import { type ChunkHeaders, formatChunkHeaders, HEADER, parseChunkHeaders, WireError } from "../lib/chunk.ts";
import { parseHost } from "../lib/host.ts";

const good = { host: "10.0.0.1", stream: "stream-0001", offset: 0, end: 10 };

function refusal(change: Record<string, string | undefined>): string {
  const headers = new Headers(formatChunkHeaders(good));
  for (const [name, value] of Object.entries(change)) {
    if (value === undefined) headers.delete(name);
    else headers.set(name, value);
  }
  try {
    parseChunkHeaders(headers);
  } catch (error) {
    if (error instanceof WireError && error.status === 400) return error.message;
    throw error;
  }
  return "accepted";
}

describe("formatChunkHeaders() and parseChunkHeaders()", () => {
  test("are each other's inverse", () => {
    const count = fc.maxSafeNat();
    const chunk = fc.record(
      {
        host: fc.oneof(
          fc.ipV4(),
          fc.ipV6().map((host) => parseHost(host) ?? "::"),
          fc.constant("web-1.example"),
        ),
        stream: fc.stringMatching(/^[A-Za-z0-9_-]{8,64}$/),
        offset: count,
        end: count,
        lag: count,
        lost: fc.integer({ min: 1 }),
      },
      { requiredKeys: ["host", "stream", "offset", "end"] },
    );
    fc.assert(
      fc.property(chunk, (made) => {
        const [offset, end] = [Math.min(made.offset, made.end), Math.max(made.offset, made.end)];
        const headers: ChunkHeaders = { ...made, offset, end };
        expect(parseChunkHeaders(new Headers(formatChunkHeaders(headers)))).toEqual(headers);
      }),
    );
  });

  test("parseChunkHeaders() says which header is wrong", () => {
    const numbers = ["-1", "1e3", "0x10", "1.0", "9007199254740992", "99999999999999999", "", "one", "+1"];
    for (const name of [HEADER.offset, HEADER.end, HEADER.lag, HEADER.lost]) {
      for (const value of numbers) expect(refusal({ [name]: value })).toContain(name);
    }
    expect(refusal({ [HEADER.offset]: undefined })).toContain("required");
    expect(refusal({ [HEADER.offset]: "11" })).toContain("before");
    for (const stream of ["short", "x".repeat(65), "with space", "../../etc", "semi;colon", ""]) {
      expect(refusal({ [HEADER.stream]: stream })).toContain(HEADER.stream);
    }
    expect(refusal({ [HEADER.host]: undefined })).toContain(HEADER.host);
  });
});

describe("parseHost()", () => {
  test("takes addresses and RFC 1123 names, in lower case", () => {
    const hosts = {
      "10.0.0.1": "10.0.0.1",
      "2001:DB8::1": "2001:db8::1",
      "Web-1.Example": "web-1.example",
      "3com": "3com",
    };
    for (const [text, host] of Object.entries(hosts)) expect(parseHost(text)).toBe(host);
  });

  test("knows one address in each of its notations", () => {
    const hosts = {
      "2001:0db8:0:0:0:0:0:1": "2001:db8::1",
      "2001:DB8::0.0.0.1": "2001:db8::1",
      "::ffff:10.10.21.181": "10.10.21.181",
      "::FFFF:0a0a:15b5": "10.10.21.181",
      "0:0:0:0:0:ffff:10.10.21.181": "10.10.21.181",
      "::0:0:0:0:0.0.0.0": "::",
    };
    for (const [text, host] of Object.entries(hosts)) expect(parseHost(text)).toBe(host);
    fc.assert(
      fc.property(fc.ipV6(), (text) => {
        const host = parseHost(text) ?? "";
        expect(parseHost(host)).toBe(host);
      }),
    );
  });

  test("refuses everything that could be another place on the disk", () => {
    const hosts = [
      "",
      ".",
      "..",
      "../../etc",
      "/etc",
      "a/b",
      "a\\b",
      "a\0b",
      "a b",
      "sent",
      "FAILED",
      ".hidden",
      "-a",
      "a-",
    ];
    const more = [
      "a..b",
      "a.",
      "1.2.3",
      "10.0.0.999",
      "fe80::1%eth0",
      "ünï",
      "x".repeat(64),
      `${"a.".repeat(127)}aa`,
    ];
    for (const text of [...hosts, ...more])
      expect({ text, host: parseHost(text) }).toEqual({ text, host: undefined });
  });

  test("gives for any text a single safe folder name, or nothing", () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.string({ unit: "binary" }), fc.domain(), fc.ipV6()), (text) => {
        const host = parseHost(text);
        if (host !== undefined) expect(host).toMatch(/^[a-z0-9][a-z0-9.:-]*$|^::[a-z0-9.:]*$/);
      }),
      { numRuns: 300 },
    );
  });
});
