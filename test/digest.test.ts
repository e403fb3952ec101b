import { describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdir, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  Digests,
  findMissing,
  formatDigest,
  formatDigestName,
  formatHour,
  type HostsSeen,
  observeHosts,
  parseDigest,
  parseDigestName,
  readDigestHead,
  readList,
  verifyFolder,
} from "../lib/digest.ts";
import { formatRecord, LEDGER_VERSION } from "../lib/ledger.ts";
import { tempFolder } from "./support.ts";

const HOUR = 3_600_000;
const HOST = "10.0.0.1";
/** 06:00 of 22 November 2026 on this machine's wall clock, which the host has, too. */
const SIX = new Date(2026, 10, 22, 6).getTime();
const ZONE = -new Date(SIX).getTimezoneOffset();
const iso = (ms: number) => new Date(ms).toISOString();
const hash = (text: string | Uint8Array) => createHash("sha256").update(text).digest("hex");
const batchName = (hour: string, part = 1) =>
  `accessLog_${hour}_00-19_10-0-0-1${part > 1 ? `.${part}` : ""}.log`;
const never = (path: string) => {
  throw new Error(`${path} is damaged`);
};

/** What the folder shows of one host. */
function seen(more: Partial<HostsSeen["hosts"][number]> = {}): HostsSeen {
  const counts = {
    contestedUntil: 0,
    skipped: 0,
    untimed: 0,
    lost: 0,
    waiting: new Map(),
    unsent: new Map(),
  };
  const host = { host: HOST, zone: ZONE, through: undefined, heardAt: 0, isDamaged: undefined };
  return { hosts: [{ ...host, ...counts, ...more }], failed: new Map() };
}

/** A client's folder, the forwarder's record, and the steps between them. */
async function makeRecord() {
  const dir = await tempFolder();
  const client = await tempFolder();
  let digests = await Digests.open(dir, never);
  const record = {
    dir,
    client,
    deliver: async (name: string, now: number, text = `${name}\n`) => {
      await writeFile(join(client, name), text);
      await digests.note([{ name, sha256: hash(text), lines: 1 }], now);
    },
    /** Writes what is due, gives the names of what came to the client. */
    write: async (now: number, shown: HostsSeen) => {
      await digests.write(now, async () => shown);
      const names = [...digests.pending];
      for (const name of names) {
        await writeFile(join(client, name), await readFile(digests.pathOf(name)));
        await digests.delivered([name]);
      }
      return names;
    },
    restart: async () => {
      digests = await Digests.open(dir, never);
    },
    text: (name: string) => readFile(join(client, name), "utf8"),
    kinds: async () => (await verifyFolder(client)).findings.map(({ kind, name }) => `${kind} ${name}`),
  };
  return record;
}

test("parseDigestName() gives back what formatDigestName() made, and knows no other", () => {
  for (const name of [
    { prefix: "accessLog", hour: "26112206", part: 1 },
    { prefix: "a_b", hour: "26112206", part: 1_795_000_000 },
  ]) {
    expect(parseDigestName(formatDigestName(name))).toEqual(name);
  }
  for (const name of ["a.sha256", "a_26112206.1.sha256", "a_26112206.sha256.tmp", "_26112206.sha256"])
    expect(parseDigestName(name)).toBeUndefined();
});

test("parseDigest() takes what formatDigest() made, and nothing that differs in a byte", () => {
  const text = formatDigest({
    hour: "26112206",
    part: 1,
    begins: "2026-11-22T00:00:00.000Z",
    hosts: [{ host: HOST, lines: 1, skipped: 0, untimed: 0, lost: 0 }],
    missing: [{ host: HOST, reason: "line\nbreak" }],
    batches: [{ name: batchName("26112206"), sha256: hash("") }],
  });
  const name = { hour: "26112206", part: 1 };
  expect(parseDigest(Buffer.from(text), name)).toEqual({
    begins: "2026-11-22T00:00:00.000Z",
    complete: false,
    hosts: [{ host: HOST, skipped: 0 }],
    files: [{ name: batchName("26112206"), sha256: hash("") }],
  });
  for (let at = 0; at < text.length; at++) {
    const damaged = Buffer.from(text);
    damaged[at] = (damaged[at] ?? 0) ^ 1;
    expect(parseDigest(damaged, name), `byte ${at}`).toBeUndefined();
    expect(parseDigest(Buffer.from(text.slice(0, at)), name), `cut at ${at}`).toBeUndefined();
  }
  for (const other of [
    { ...name, part: 2 },
    { ...name, hour: "26112207" },
  ])
    expect(parseDigest(Buffer.from(text), other)).toBeUndefined();
});

describe("findMissing()", () => {
  const hour = "26112206";
  const end = SIX + HOUR;
  const reasons = (shown: HostsSeen, now = end + 60_000, lossAt = 0) =>
    findMissing(shown, hour, now, () => lossAt).map(({ reason }) => reason);

  test("is empty when the host has told everything behind the hour's end, by its own offset", () => {
    expect(reasons(seen({ through: end + 1 }))).toEqual([]);
    expect(reasons(seen({ through: end + 1, zone: ZONE - 60 }))).toHaveLength(1); // an hour later there
  });
  test("names who is not past the end, also when its clock is ahead of ours", () => {
    expect(reasons(seen({ through: end }))).toEqual([`has told everything only up to ${iso(end)}`]);
    expect(reasons(seen({ through: end + HOUR }), end - 1)).toHaveLength(1);
  });
  test("a sender that does not tell cannot say; two under one name, lost bytes, what waits and what failed", () => {
    const through = end + 1;
    expect(reasons(seen())[0]).toStartWith("cannot say");
    expect(reasons(seen({ through, contestedUntil: end + HOUR }))[0]).toStartWith("two shippers");
    expect(reasons(seen({ through }), end + 60_000, SIX + 1)[0]).toStartWith("bytes were lost");
    expect(reasons(seen({ through }), end + 60_000, SIX)).toEqual([]); // told before the hour began
    expect(reasons(seen({ through, waiting: new Map([[hour, 2]]) }))).toEqual([
      "2 batches are not delivered",
    ]);
    expect(reasons(seen({ through, waiting: new Map([["26112207", 2]]) }))).toEqual([]);
    expect(reasons({ ...seen({ through }), failed: new Map([[hour, 1]]) })).toEqual(["1 in failed/"]);
  });
});

describe("Digests", () => {
  test("one an hour, also of an empty one, chained; sha256sum -c checks all of it", async () => {
    const record = await makeRecord();
    await record.deliver(batchName("26112205"), SIX - HOUR / 2); // that hour had begun
    const first = await record.write(SIX + 1000, seen({ through: SIX + 500 }));
    expect(first).toEqual([`accessLog_26112205.${Math.floor((SIX + 1000) / 1000)}.sha256`]);
    expect(await record.text(first[0] ?? "")).toContain(`# begins ${iso(SIX - HOUR / 2)}\n`);
    await record.deliver(batchName("26112206"), SIX + 20 * 60_000);
    expect(await record.write(SIX + HOUR - 1, seen({ through: SIX }))).toEqual([]); // not over
    const names = await record.write(SIX + 3 * HOUR, seen({ through: SIX + 3 * HOUR }));
    expect(names).toEqual(["26112206", "26112207"].map((hour) => `accessLog_${hour}.sha256`));
    expect(await record.text(names[0] ?? "")).toContain(
      `# host ${HOST} lines=1 skipped=0 untimed=0 lost=0\n# complete yes\n`,
    );
    expect(await record.kinds()).toEqual([]);
    for (const name of [...first, ...names])
      execFileSync("sha256sum", ["-c", "--strict", "--quiet", name], { cwd: record.client, stdio: "pipe" });
    const head = await readDigestHead(record.dir);
    expect(head).toMatchObject({
      name: names[1],
      complete: true,
      sha256: hash(await record.text(names[1] ?? "")),
    });
  });

  test("no sooner than it is complete, but an hour after the end at the latest; then .2 with the next one", async () => {
    const record = await makeRecord();
    await record.deliver(batchName("26112205"), SIX - HOUR / 2);
    await record.write(SIX + 1000, seen({ through: SIX + 500 }));
    await record.deliver(batchName("26112206"), SIX + 20 * 60_000);
    const behind = seen({ through: SIX + 30 * 60_000 });
    expect(await record.write(SIX + 2 * HOUR - 1, behind)).toEqual([]);
    expect(await record.write(SIX + 2 * HOUR, behind)).toEqual(["accessLog_26112206.sha256"]);
    expect(await record.text("accessLog_26112206.sha256")).toContain(
      `# complete no\n# missing ${HOST}: has told everything only up to ${iso(SIX + HOUR / 2)}\n`,
    );
    expect(await record.kinds()).toEqual(["incomplete 26112206"]);
    await record.deliver(batchName("26112206", 2), SIX + 2 * HOUR + 1000);
    const names = await record.write(SIX + 2 * HOUR + 2000, seen({ through: SIX + 2 * HOUR + 1000 }));
    expect(names).toEqual(["accessLog_26112206.2.sha256", "accessLog_26112207.sha256"]);
    expect(await record.text("accessLog_26112206.2.sha256")).toContain(`# host ${HOST} lines=2 `);
    expect(await record.kinds()).toEqual([]);
  });

  test.each([HOST, "constructor"])(
    "bytes that %s lost keep every hour that had begun incomplete",
    async (host) => {
      const record = await makeRecord();
      await record.deliver(batchName("26112205"), SIX - HOUR / 2);
      await record.write(SIX + 1000, seen({ host, through: SIX + 500 }));
      const lossy = { host, lost: 100, skipped: 7 };
      await record.write(SIX + HOUR + 1000, seen({ through: SIX + HOUR + 500, ...lossy })); // told, 06 waits
      await record.write(SIX + 2 * HOUR, seen({ through: SIX + 2 * HOUR, ...lossy }));
      expect(await record.text("accessLog_26112206.sha256")).toContain(
        "skipped=7 untimed=0 lost=100\n# complete no\n",
      );
      await record.write(SIX + 4 * HOUR, seen({ through: SIX + 4 * HOUR, ...lossy }));
      expect(await record.kinds()).toEqual(["incomplete 26112206", "incomplete 26112207"]);
      expect(await record.text("accessLog_26112208.sha256")).toContain("lost=0\n# complete yes\n");
    },
  );

  test("what is delivered again is listed once; what is of the future with the hour that it is now", async () => {
    const record = await makeRecord();
    await record.deliver(batchName("26112205"), SIX - HOUR / 2);
    await record.deliver(batchName("26112205"), SIX - HOUR / 3);
    const future = batchName("36112205");
    await record.deliver(future, SIX);
    const current = formatHour(SIX, ZONE);
    expect([...(await readList(record.dir, current)).keys()]).toContain(future);
    await record.restart();
    await record.deliver(batchName("26112205"), SIX + 1);
    const text = await readFile(join(record.dir, ".digest", "26112205.list"), "utf8");
    expect(text.split("\n").filter((line) => line.endsWith(batchName("26112205")))).toHaveLength(1);
  });

  test("a line of years ago is listed with the hour in which it came, and makes no digest of each hour since", async () => {
    const record = await makeRecord();
    const through = SIX + 4 * HOUR;
    await record.deliver(batchName("05112206"), SIX);
    expect(await record.write(SIX + HOUR / 2, seen({ through }))).toEqual([]);
    await record.deliver(batchName("26112206"), SIX + HOUR / 2);
    await record.restart();
    const names = await record.write(SIX + HOUR + 1, seen({ through }));
    expect(names.map((name) => parseDigestName(name)?.hour)).toEqual(["05112206", "26112206"]);
    await record.deliver(batchName("15112206"), SIX + HOUR + 2);
    await record.restart();
    const more = await record.write(SIX + 3 * HOUR + 1, seen({ through }));
    expect(more.map((name) => parseDigestName(name)?.hour)).toEqual(["15112206", "26112207", "26112208"]);
    expect(await record.kinds()).toEqual([]);
  });

  test("a clock that was a day ahead and is set back: what is delivered comes an hour after its hour's end", async () => {
    const record = await makeRecord();
    await record.deliver(batchName("26112205"), SIX - HOUR / 2);
    await record.write(SIX + 24 * HOUR, seen({ through: SIX + 500 })); // digests of empty hours
    await record.deliver(batchName("26112206"), SIX + HOUR / 2);
    await record.restart();
    const shown = seen({ through: SIX + 3 * HOUR });
    expect(await record.write(SIX + 2 * HOUR - 1, shown)).toEqual([]);
    const names = await record.write(SIX + 2 * HOUR, shown);
    expect(names).toContain("accessLog_26112206.2.sha256");
    expect(await record.text("accessLog_26112206.2.sha256")).toContain("\n# complete yes\n");
    expect(await record.write(SIX + 2 * HOUR + 1, shown)).toEqual([]);
    await record.deliver(batchName("26112207"), SIX + 2 * HOUR);
    expect(await record.write(SIX + 3 * HOUR, shown)).toEqual(["accessLog_26112207.2.sha256"]);
    expect((await record.kinds()).filter((kind) => !kind.startsWith("incomplete"))).toEqual([]);
  });

  test("a process that ends between the digest's file and the state: the next one takes it as it is", async () => {
    const record = await makeRecord();
    const state = join(record.dir, ".digest", "state.json");
    await record.deliver(batchName("26112205"), SIX - HOUR / 2);
    for (const now of [SIX + 1000, SIX + HOUR + 1000]) {
      const before = await readFile(state);
      const names = await record.write(now, seen({ through: now - 500 }));
      const written = await record.text(names[0] ?? "");
      await rm(join(record.client, names[0] ?? ""));
      await writeFile(state, before);
      await record.restart();
      await record.deliver(batchName(formatHour(now - HOUR, ZONE), 3), now + 2000); // would be in it if it were made anew
      expect(await record.write(now + 3000, seen({ through: now + 2500 }))).toEqual(names);
      expect(await record.text(names[0] ?? "")).toBe(written);
      await record.deliver(batchName(formatHour(now, ZONE)), now + 4000);
    }
    await record.write(SIX + 3 * HOUR, seen({ through: SIX + 3 * HOUR }));
    expect(await record.kinds()).toEqual([]);
  });

  test("a lost record begins anew, numbered by the clock, and says since when", async () => {
    const record = await makeRecord();
    await record.deliver(batchName("26112205"), SIX - HOUR / 2);
    await record.write(SIX + 1000, seen({ through: SIX + 500 }));
    await rm(join(record.dir, ".digest"), { recursive: true });
    await record.restart();
    const late = SIX + 30 * 60_000;
    await record.deliver(batchName("26112206"), late);
    await record.deliver(batchName("26112205", 2), late + 1000);
    await record.write(SIX + HOUR + 1000, seen({ through: SIX + HOUR + 500 }));
    const { findings, begins, heads } = await verifyFolder(record.client);
    expect(findings).toEqual([]);
    expect(begins).toHaveLength(2);
    expect(heads).toHaveLength(2);
    const names = (await readdir(record.client)).filter((name) => name.endsWith(".sha256"));
    expect(names.every((name) => (parseDigestName(name)?.part ?? 0) > 1)).toBe(true);
  });

  test("a damaged record is told and begun anew", async () => {
    const dir = await tempFolder();
    await mkdir(join(dir, ".digest"));
    await writeFile(join(dir, ".digest", "state.json"), "{");
    const told: string[] = [];
    const digests = await Digests.open(dir, (path) => told.push(path));
    await digests.note([{ name: batchName("26112205"), sha256: hash(""), lines: 0 }], SIX);
    expect(told).toEqual([join(dir, ".digest", "state.json")]);
  });
});

test.each([
  [29, undefined, true],
  [31, undefined, false],
  [31, 90, true],
  [8, 7, false],
])(
  "a sender that is silent for %p days, with forgetAfterDays %p: it is waited for: %p",
  async (days, forgetAfterDays, waited) => {
    const dir = await tempFolder();
    await mkdir(join(dir, HOST));
    const facts = { through: SIX, zone: ZONE, ...(forgetAfterDays && { forgetAfterDays }) };
    await writeFile(join(dir, HOST, ".ledger"), formatRecord({ v: LEDGER_VERSION, heardAt: SIX, facts }));
    const { hosts } = await observeHosts(dir, SIX + days * 24 * HOUR);
    expect(hosts.map(({ host }) => host)).toEqual(waited ? [HOST] : []);
  },
);

test("a sender whose ledger is damaged keeps the hour from being complete", async () => {
  const dir = await tempFolder();
  await mkdir(join(dir, HOST));
  for (const text of ["no record\n", "\0".repeat(100)]) {
    await writeFile(join(dir, HOST, ".ledger"), text);
    const missing = findMissing(await observeHosts(dir, SIX), "26112205", SIX);
    expect(missing).toEqual([{ host: HOST, reason: "cannot say: its ledger is damaged" }]);
  }
});

test("a batch of another sender that was put into a folder by hand waits there; a copied folder is nobody's", async () => {
  const dir = await tempFolder();
  const other = "accessLog_26112206_00-19_10-0-0-2.log";
  const own = { name: batchName("26112205"), bytes: 1, lines: 1, at: SIX };
  for (const [host, name] of [
    [HOST, other],
    ["10.0.0.3", own.name],
  ] as const) {
    await mkdir(join(dir, host));
    const record = { v: LEDGER_VERSION, heardAt: SIX, facts: { through: SIX }, sealed: { [own.name]: own } };
    await writeFile(join(dir, host, ".ledger"), formatRecord(record));
    await writeFile(join(dir, host, name), "a line\n");
  }
  const { hosts } = await observeHosts(dir, SIX);
  expect(hosts.map(({ host, waiting }) => [host, [...waiting]])).toEqual([[HOST, [["26112206", 1]]]]);
});

test("a batch that is open, which the ledger and the folder name each in its way, is one", async () => {
  const dir = await tempFolder();
  const name = batchName("26112206");
  await mkdir(join(dir, HOST));
  const open = { [name]: { bytes: 7, lines: 1, endsAt: SIX, at: SIX } };
  const record = { v: LEDGER_VERSION, heardAt: SIX, facts: { through: SIX + 2 * HOUR }, open };
  await writeFile(join(dir, HOST, ".ledger"), formatRecord(record));
  await writeFile(join(dir, HOST, `${name}.part`), "a line\n");
  const missing = findMissing(await observeHosts(dir, SIX + 2 * HOUR), "26112206", SIX + 2 * HOUR);
  expect(missing.map(({ reason }) => reason)).toContain("1 batch is not delivered");
});
