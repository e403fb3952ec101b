import { describe, expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import fc from "fast-check";
import {
  ConfigError,
  jsonSchema,
  listSecrets,
  loadConfig,
  parseConfig,
  readSecret,
  type Section,
  secretFaults,
  sections,
} from "../lib/config.ts";
import { explainJson } from "../lib/explain.ts";
import { listOptions, PARTS, partOf } from "./reference.ts";
import { missing, notRoot, ROOT, tempFolder } from "./support.ts";

const EXAMPLE = readFileSync(join(ROOT, "config.example.json"), "utf8");
const SECTIONS = Object.keys(sections) as Section[];

const KEY = `SHA256:${"A".repeat(43)}`;

/** The least that a config needs: everything else has a default. */
const LEAST = {
  shipper: { files: ["/log/access.log"], receiver: "http://127.0.0.1:5001" },
  receiver: { groups: [{ port: 5001, senders: ["*"] }], dir: "/batches" },
  forwarder: { target: "file:///client", dir: "/batches" },
  monitor: { dir: "/batches", mail: { smtp: "file:///mails", from: "a@example.com", to: ["b@example.com"] } },
  housekeep: { dir: "/batches" },
};

/** The faults of a section that is the least one with some keys changed. */
function faultsOf(section: Section, change: object, outside: object = {}): string[] {
  try {
    parseConfig(JSON.stringify({ [section]: { ...LEAST[section], ...change }, ...outside }), section);
    return [];
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    return error.message.split("\n");
  }
}

test.skipIf(notRoot() || missing({ unshare: "util-linux" }))(
  "a host whose own name is none that a receiver takes has to be given one",
  async () => {
    const path = join(await tempFolder(), "config.json");
    await writeFile(path, JSON.stringify({ shipper: LEAST.shipper }));
    const command = 'echo sent >/proc/sys/kernel/hostname && exec "$0" run shipper.ts --check --config "$1"';
    const args = ["-u", "sh", "-c", command, process.execPath, path];
    const { status, stdout } = spawnSync("unshare", args, { cwd: ROOT, encoding: "utf8" });
    expect(stdout).toContain("shipper.host: expected an IP address or a host name");
    expect(status).toBe(78);
  },
);

describe("config.example.json", () => {
  test("is valid for every script, and names its schema first", () => {
    for (const section of SECTIONS) expect(parseConfig(EXAMPLE, section)).toBeObject();
    expect(Object.entries(JSON.parse(EXAMPLE))[0]).toEqual(["$schema", "./config.schema.json"]);
  });

  test("shows the defaults as they are", () => {
    const same: Partial<Record<Section, string[]>> = {
      shipper: [
        "stateDir",
        "startAt",
        "compression",
        "chunkBytes",
        "flushMs",
        "rotateWaitSeconds",
        "heartbeatSeconds",
      ],
      receiver: ["prefix", "windowMinutes", "sealAfterSeconds", "maxBodyBytes", "legacy"],
      forwarder: ["intervalSeconds", "retries", "retryDelaySeconds", "parallel", "report"],
      monitor: ["silentMinutes", "remindMinutes", "summaryMinute", "report", "stateFile", "schedule"],
      housekeep: ["compressAfterHours", "deleteAfterHours", "schedule"],
    };
    for (const section of SECTIONS) {
      const example = parseConfig(EXAMPLE, section) as Record<string, unknown>;
      const least = parseConfig(JSON.stringify(LEAST), section) as Record<string, unknown>;
      for (const key of same[section] ?? []) {
        expect({ [`${section}.${key}`]: example[key] }).toEqual({ [`${section}.${key}`]: least[key] });
      }
    }
  });

  test("holds no secret, only where secrets are", () => {
    const { shipper, receiver, forwarder } = JSON.parse(EXAMPLE);
    const refs = [
      shipper.token,
      ...Object.values(receiver.tokens),
      forwarder.password,
      forwarder.privateKey,
    ] as object[];
    for (const ref of refs) expect(["env", "file"]).toContain(Object.keys(ref).join());
  });
});

test("config.schema.json is what the schema gives (npm run schema)", () => {
  const file = readFileSync(join(ROOT, "config.schema.json"), "utf8");
  expect(JSON.parse(file)).toEqual(JSON.parse(JSON.stringify(jsonSchema())));
});

test.each(PARTS)(
  "%s has what is made for it: options with their defaults, Deno's permissions (npm run schema)",
  (file, begin, end, make) => {
    expect(partOf(readFileSync(join(ROOT, file), "utf8"), begin, end)).toBe(make());
  },
);

test("every option has a description for editors and for the README", () => {
  expect(listOptions().filter(({ description }) => description === "")).toEqual([]);
});

describe("parseConfig()", () => {
  test("gives a default for everything but what only the operator can know", () => {
    for (const section of SECTIONS) {
      expect(parseConfig(JSON.stringify(LEAST), section)).toBeObject();
      for (const key of Object.keys(LEAST[section])) {
        const [fault, ...more] = faultsOf(section, { [key]: undefined });
        expect(more).toEqual([]);
        expect(fault).toStartWith(`config.json: ${section}.${key}: missing; expected `);
      }
    }
  });

  const wrong: [Section, object, string, string][] = [
    ["shipper", { files: [] }, "files", "expected at least 1 element(s)"],
    [
      "shipper",
      { files: "access.log" },
      "files",
      'expected a list in [ ] (found "access.log"); write ["access.log"]',
    ],
    ["shipper", { receiver: "10.0.0.1:5001" }, "receiver", "expected http://HOST[:PORT]"],
    ["shipper", { receiver: "ftp://10.0.0.1" }, "receiver", '(found "ftp://10.0.0.1")'],
    ["shipper", { host: "a/b" }, "host", "expected an IP address or a host name"],
    ["shipper", { host: "sent" }, "host", "expected an IP address or a host name"],
    ["shipper", { token: "abc" }, "token", 'expected {"env": "NAME"} or {"file": "/path"}'],
    ["shipper", { compression: "lz4" }, "compression", '(found "lz4")'],
    ["shipper", { chunkBytes: 10 }, "chunkBytes", "(found 10)"],
    ["shipper", { flushMs: -1 }, "flushMs", "(found -1)"],
    ["shipper", { timeoutSeconds: 1e10 }, "timeoutSeconds", "expected at most 1000000 (found 10000000000)"],
    ["shipper", { startAt: "middle" }, "startAt", '(found "middle")'],
    ["shipper", { skip: [[]] }, "skip.0", "expected at least 1 element(s)"],
    ["receiver", { groups: [] }, "groups", "expected at least 1 element(s)"],
    ["receiver", { groups: [{ port: 70000, senders: ["*"] }] }, "groups.0.port", "(found 70000)"],
    ["receiver", { groups: [{ port: 1, senders: ["10.0.0.0/40"] }] }, "groups.0.senders.0", "CIDR"],
    ["receiver", { windowMinutes: 7 }, "windowMinutes", "expected a divisor of 60 (found 7)"],
    ["receiver", { prefix: "../x" }, "prefix", "expected letters, digits, _ and -"],
    ["receiver", { timestampPattern: "(" }, "timestampPattern", "expected a regular expression"],
    ["receiver", { timestampPattern: "no group" }, "timestampPattern", "expected a regular expression"],
    ["receiver", { tls: { cert: "/c" } }, "tls.key", "missing"],
    ["receiver", { trustedProxies: ["proxy"] }, "trustedProxies.0", "expected an address or a CIDR range"],
    ["receiver", { listen: "0.0.0.0" }, "tokens", "anyone could write here"],
    ["receiver", { listen: "::", groups: [{ port: 1, senders: ["::/0"] }] }, "tokens", 'senders has "::/0"'],
    ["receiver", { sealAfterSeconds: 1e7 }, "sealAfterSeconds", "expected at most 1000000"],
    ["forwarder", { target: "file:///batches/sent" }, "target", "expected another folder than one of ours"],
    ["forwarder", { target: "file:///x/../batches/.digest/y" }, "target", "what lies in .digest/ of dir"],
    ["forwarder", { target: "file:///in%2Fside" }, "target", "expected file:///FOLDER"],
    ["forwarder", { intervalSeconds: 1e7 }, "intervalSeconds", "expected at most 1000000"],
    ["forwarder", { target: "/folder" }, "target", "expected sftp://USER@HOST[:PORT]/FOLDER"],
    ["forwarder", { target: "sftp://h/f", hostKey: KEY, agent: "/a" }, "target", "sftp://USER@HOST"],
    ["forwarder", { target: "sftp://u@h/100%/f", hostKey: KEY, agent: "/a" }, "target", "a % is written %25"],
    ["forwarder", { target: "file:///100%/f" }, "target", "a % is written %25"],
    [
      "monitor",
      { mail: { smtp: "smtp://1%@h", from: "a@b", to: ["a@b"] } },
      "mail.smtp",
      "a % is written %25",
    ],
    ["forwarder", { target: "file://folder/in" }, "target", "expected file:///FOLDER"],
    ["forwarder", { hostKey: "MD5:00:11" }, "hostKey", "expected SHA256:"],
    ["forwarder", { retries: 0 }, "retries", "(found 0)"],
    ["forwarder", { parallel: 1.5 }, "parallel", "expected a whole number"],
    ["monitor", { mail: { ...LEAST.monitor.mail, to: ["ops"] } }, "mail.to.0", "email"],
    ["monitor", { mail: { ...LEAST.monitor.mail, from: "a@b\nc" } }, "mail.from", "email"],
    ["monitor", { mail: { ...LEAST.monitor.mail, smtp: "file://mails" } }, "mail.smtp", "file:///FOLDER"],
    ["monitor", { mail: { ...LEAST.monitor.mail, smtp: "mx:25" } }, "mail.smtp", "expected smtp://"],
    [
      "monitor",
      { mail: { ...LEAST.monitor.mail, subjectPrefix: "a\r\nb" } },
      "mail.subjectPrefix",
      "one line",
    ],
    [
      "monitor",
      { silentMinutesByHost: { "10.0.0.01": 3 } },
      "silentMinutesByHost.10.0.0.01",
      "expected an IP",
    ],
    ["monitor", { summaryMinute: 60 }, "summaryMinute", "(found 60)"],
    ["monitor", { schedule: "every minute" }, "schedule", "expected a cron expression"],
    ["monitor", { silentMinutes: 0 }, "silentMinutes", "(found 0)"],
    ["monitor", { expected: ["a b"] }, "expected.0", "expected an IP address or a host name"],
    ["housekeep", { compressAfterHours: 9 }, "deleteAfterHours", "no less than compressAfterHours"],
    ["housekeep", { minFreePercent: 101 }, "minFreePercent", "(found 101)"],
  ];
  test.each(wrong)("refuses %s %j at its path", (section, change, path, text) => {
    const [fault, ...more] = faultsOf(section, change);
    expect(more).toEqual([]);
    expect(fault).toStartWith(`config.json: ${section}.${path}: `);
    expect(fault).toContain(text);
  });

  const slips: [Section, object, string][] = [
    ["receiver", { windowMinute: 20 }, 'windowMinute: unknown key; did you mean "windowMinutes"?'],
    ["receiver", { tls: { cert: "/c", kye: "/k", key: "/k" } }, 'tls.kye: unknown key; did you mean "key"?'],
    ["receiver", { groups: [{ port: 1, sender: ["*"], senders: ["*"] }] }, 'did you mean "senders"?'],
    [
      "monitor",
      { mail: { ...LEAST.monitor.mail, form: "x" } },
      'mail.form: unknown key; did you mean "from"?',
    ],
    ["shipper", { zzzzzzzz: 1 }, "zzzzzzzz: unknown key; known are files, receiver, host, "],
    [
      "shipper",
      { chunkBytes: "1048576" },
      'expected a number (found "1048576"); leave the quotes out: 1048576',
    ],
    ["shipper", { heartbeatSeconds: "1m" }, 'expected a number (found "1m"); in seconds: 60'],
    ["monitor", { silentMinutes: "2 hours" }, "in minutes: 120"],
    ["shipper", { flushMs: "0.5s" }, "in milliseconds: 500"],
    ["shipper", { chunkBytes: "1M" }, 'expected a number (found "1M"); in bytes: 1048576'],
    ["receiver", { maxBodyBytes: "16 MiB" }, "in bytes: 16777216"],
    ["housekeep", { minFreePercent: "10%" }, "a number alone: 10"],
    ["housekeep", { dir: "" }, "expected a path"],
    ["receiver", { listen: "0.0.0.0:5001" }, "expected an address of this machine, or 0.0.0.0"],
    ["shipper", { receiver: "http://10.0.0.1:5001/upload" }, "expected no path such as /upload behind it"],
    ["forwarder", { digest: "true" }, 'expected true or false (found "true"); leave the quotes out: true'],
    ["forwarder", { manifest: true }, 'manifest: gone; "digest": true'],
    ["forwarder", { knownHosts: "/x" }, "knownHosts: gone; hostKey takes the fingerprints"],
  ];
  test.each(slips)("says what to write instead: %s %j", (section, change, text) => {
    const [fault, ...more] = faultsOf(section, change);
    expect(more).toEqual([]);
    expect(fault).toContain(text);
    expect(fault).not.toMatch(/invalid|received|zod/i);
  });

  const broken: [string, string][] = [
    ['{\n  "a": 1,\n}', 'line 2, column 9: a comma too many: "a": 1,'],
    ['{\n  "a": [1,\n  ],\n  "b": 2 }', 'line 2, column 10: a comma too many: "a": [1,'],
    ['{ "a": 1 // the first\n}', 'line 1, column 10: JSON knows no comments: { "a": 1 // the first'],
    ["/* x */ {}", "line 1, column 1: JSON knows no comments: /* x */ {}"],
    ['{\n  "a": 1\n  "b": 2\n}', 'line 2, column 9: expected a comma or }: "a": 1'],
    ["{ 'a': 1 }", "line 1, column 3: expected double quotes (\"): { 'a': 1 }"],
    ["{ a: 1 }", 'line 1, column 3: expected a key in double quotes ("): { a: 1 }'],
    ['{ "a": yes }', "line 1, column 8: expected a value: "],
    ['{ "a": "x\n" }', "line 1, column 8: the text in quotes does not end in this line"],
    ['{ "a": { }', "line 1, column 11: the file ends too early"],
    ["{} x", "line 1, column 4: something follows the last closing bracket: {} x"],
    [
      '{\n "password": "hunter2",,\n}',
      'line 2, column 24: expected a key in double quotes ("): "password": …,,',
    ],
    ['{ "target": "sftp://u:hunter2@h/f" "x"', 'expected a comma or }: { "target": "sftp://u:…@h/f" "x"'],
  ];
  test("refuses a key that stands twice in one object: a parser takes the last of them without a word", () => {
    const twice = '{ "shipper": {\n  "files": ["/a"],\n  "password": "hunter2", "files": ["/b"] } }';
    expect(() => parseConfig(twice, "shipper")).toThrow(
      'config.json: line 3, column 26: the key "files" stands here twice: "password": …, "files": ["/b"] } }',
    );
    const apart = '{ "housekeep": { "dir": "/d", "schedule": "* * * * *" }, "monitor": { "schedule": 1 } }';
    expect(parseConfig(apart, "housekeep").dir).toBe("/d");
  });

  test.each(broken)("shows the place where %j is no JSON", (text, where) => {
    const told = (() => {
      try {
        parseConfig(text, "shipper");
      } catch (error) {
        return (error as Error).message;
      }
    })();
    expect(told).toStartWith("config.json: is no JSON: ");
    expect(told).toContain(where);
    expect(told).not.toContain("hunter2");
  });

  test("explainJson() finds a fault in exactly what the runtime's parser refuses", () => {
    fc.assert(
      fc.property(
        fc.json(),
        fc.nat(),
        fc.constantFrom("", ",", "}", '"', "\\", "x", "[", ":", "0", "\n"),
        (json, at, sign) => {
          const place = at % (json.length + 1);
          const text = json.slice(0, place) + sign + json.slice(place + (at % 2));
          let isJson = true;
          try {
            JSON.parse(text);
          } catch {
            isJson = false;
          }
          expect(explainJson(text) === undefined).toBe(isJson);
        },
      ),
      { numRuns: 2000 },
    );
  });

  test("tells every fault at once, unknown keys beside wrong values", () => {
    const change = { host: "a b", chunkBytes: "big", chunkbytes: 1 };
    expect(faultsOf("shipper", change, { shiper: {} }).map((fault) => fault.split(": ")[1])).toEqual([
      "shiper",
      "shipper.host",
      "shipper.chunkBytes",
      "shipper.chunkbytes",
    ]);
  });

  test("asks for the host key and a way to log in on an SFTP target, with the command that shows the key", () => {
    const faults = faultsOf("forwarder", { target: "sftp://u@10.0.0.1:2222/in" });
    expect(faults.map((fault) => fault.split(": ")[1])).toEqual(["forwarder.hostKey", "forwarder.password"]);
    expect(faults[0]).toContain("ssh-keyscan -p 2222 10.0.0.1 | ssh-keygen -lf -");
  });

  test("refuses a password in a URL and does not repeat it", () => {
    const mail = { ...LEAST.monitor.mail, smtp: "smtp://user:hunter2@127.0.0.1" };
    const faults = [
      ...faultsOf("forwarder", {
        target: "sftp://u:hunter2@10.0.0.1/in",
        hostKey: KEY,
        password: { env: "X" },
      }),
      ...faultsOf("monitor", { mail }),
      ...faultsOf("forwarder", { password: "hunter2" }),
    ];
    expect(faults).toHaveLength(3);
    expect(faults.join("\n")).not.toContain("hunter2");
  });

  test("refuses groups that claim one sender or one port", () => {
    const groups = [
      { port: 5001, senders: ["10.0.0.0/24"] },
      { port: 5002, senders: ["10.0.0.7"] },
      { port: 5001, senders: ["web-1"] },
    ];
    const faults = faultsOf("receiver", { groups });
    expect(faults).toEqual([
      "config.json: receiver.groups.1: sender 10.0.0.7 belongs to the group of port 5001 already",
      "config.json: receiver.groups.2: port 5001 is another group's already",
    ]);
  });

  test("says what a missing section, a file that is no JSON and a list are", () => {
    expect(() => parseConfig("{}", "monitor")).toThrow("config.json: monitor: missing");
    expect(() => parseConfig("{", "monitor")).toThrow("config.json: is no JSON: ");
    expect(() => parseConfig("[]", "monitor")).toThrow('expected an object with the section "monitor"');
  });

  test("gives each host in its one spelling, as sender, among the expected and as a key", () => {
    const hosts: [string, string][] = [
      ["Web-1.Example", "web-1.example"],
      ["::FFFF:10.0.0.1", "10.0.0.1"],
      ["2001:DB8:0:0::1", "2001:db8::1"],
    ];
    for (const [written, host] of hosts) {
      const shipper = { ...LEAST.shipper, host: written };
      const monitor = { ...LEAST.monitor, expected: [written], silentMinutesByHost: { [written]: 7 } };
      const text = JSON.stringify({ shipper, monitor });
      expect(parseConfig(text, "shipper").host).toBe(host);
      expect(parseConfig(text, "monitor")).toMatchObject({
        expected: [host],
        silentMinutesByHost: { [host]: 7 },
      });
    }
  });

  test("takes a mail address without a domain, and a file with a byte order mark", () => {
    const mail = { ...LEAST.monitor.mail, to: ["root@localhost"] };
    const text = `\uFEFF${JSON.stringify({ monitor: { ...LEAST.monitor, mail } })}`;
    expect(parseConfig(text, "monitor").mail.to).toEqual(["root@localhost"]);
  });

  test("leaves the sections of other scripts alone", () => {
    const text = JSON.stringify({ ...LEAST, shipper: { nonsense: true } });
    expect(parseConfig(text, "housekeep").dir).toBe("/batches");
  });
});

test("loadConfig() says what to do when there is no file", async () => {
  const file = join(await tempFolder(), "none.json");
  expect(loadConfig(file, "shipper")).rejects.toThrow(
    `${file}: cannot be read (ENOENT): copy config.example.json, or name another file with --config`,
  );
});

describe("secrets", () => {
  async function secretOf(text: string) {
    const file = join(await tempFolder(), "token");
    await writeFile(file, text);
    return { file };
  }

  test("readSecret() leaves out white space and a byte order mark", async () => {
    for (const text of ["abc", "abc\n", " abc \r\n\n", "\uFEFFabc\n"])
      expect(readSecret(await secretOf(text))).toBe("abc");
  });

  test("secretFaults() names the file of what is no token, and never its content", async () => {
    const token = await secretOf("two words\n");
    expect(secretFaults("shipper", { token })).toEqual([
      `shipper.token: What stands in ${token.file} is no token: expected one word of ASCII letters, digits and signs`,
    ]);
    expect(secretFaults("forwarder", { password: token })).toEqual([]);
    const empty = await secretOf(" \n");
    expect(secretFaults("receiver", { viewToken: empty })[0]).toContain(
      `${empty.file} cannot be read: the file is empty`,
    );
  });

  test("listSecrets() finds each with its key", () => {
    const [a, b] = [{ file: "/a" }, { env: "B" }];
    const config = { token: a, mail: { password: b, to: ["x"] }, tokens: { "*": [a, b], "10.0.0.1": [b] } };
    expect(listSecrets(config).map(({ key }) => key)).toEqual([
      "token",
      "mail.password",
      "tokens.*[0]",
      "tokens.*[1]",
      "tokens.10.0.0.1",
    ]);
    expect(listSecrets({ tokens: { file: [b] } })).toEqual([{ key: "tokens.file", ref: b }]); // a host of that name
  });
});
