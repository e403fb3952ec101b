import { describe, expect, test } from "bun:test";
import { mkdir, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { parseConfig } from "../lib/config.ts";
import { emptyLedger, formatRecord, type Ledger, readLedger } from "../lib/ledger.ts";
import { pageHeaders, renderPage } from "../lib/page.ts";
import { collectStatus, createStatusReader, type Status } from "../lib/status.ts";
import { findProblems, verdict } from "../lib/verdict.ts";
import { host, NOW, refused, samples, status } from "./page-samples.ts";
import { tempFolder } from "./support.ts";

const MINUTE_MS = 60_000;
const HOSTILE = `"><img src=x onerror=alert(1)>'&\u202e</main><script>alert(1)</script>`;

/** A page is too long to be shown when a text is not in it. */
function expectText(page: string, text: string): void {
  expect(page.includes(text), text).toBe(true);
}

function say(state: Status): string {
  return verdict(state, findProblems(state));
}

describe("verdict()", () => {
  test("says in one sentence whether everything arrives and is delivered", () => {
    expect(say(samples.good)).toBe("Everything arrives and is delivered");
    expect(say(samples.empty)).toBe("No sender was heard of yet");
    expect(say(status([host("a", "quiet")]))).toBe("No lines come and everything is delivered");
    expect(say({ ...samples.empty, hosts: [host("a")] })).toBe(
      "Everything arrives, no forwarder has run here yet",
    );
  });

  test("counts what is wrong, one or several", () => {
    expect(say(status([host("a", "silent"), host("b", "silent"), host("c")]))).toBe("2 senders are silent");
    expect(say(status([host("a", "silent")]))).toBe("1 sender is silent");
    expect(say(status([host("a", "never"), host("b")]))).toBe("1 sender was never heard of");
    expect(say(status([host("a", "ok", { failed: 1 }), host("b")]))).toBe("1 batch failed");
    expect(say(status([host("a")], { disk: { free: 9.9, total: 100 } }))).toBe("The disk has 9 % left");
  });

  test("calls a batch late only after the time in which a forwarder delivers", () => {
    const waits = (minutes: number) =>
      say(status([host("a", "ok", { waiting: 14, waitingSince: NOW - minutes * MINUTE_MS })]));
    expect(waits(29)).toBe("Everything arrives and is delivered");
    expect(waits(31)).toMatch(/^14 batches wait since \d\d:\d\d$/);
    expect(waits(2000)).toMatch(/^14 batches wait since 2\d Nov, \d\d:\d\d$/);
  });

  test("names the first two of many problems", () => {
    expect(say(samples.trouble)).toBe(
      "2 senders are silent, 1 sender was never heard of, and 4 more problems",
    );
  });
});

describe("renderPage()", () => {
  test("escapes every text that comes from outside", () => {
    const page = renderPage(
      status([host(HOSTILE, "silent"), host("b", "ok", { waiting: 1, waitingSince: 1 })], {
        dir: HOSTILE,
        version: HOSTILE,
        forwarder: { at: NOW, fault: { kind: "server", text: HOSTILE, since: NOW } },
      }),
    );
    expect(page.includes("<img")).toBe(false);
    expect(page.match(/<script/g)).toHaveLength(1);
    expect(page.match(/<\/main>/g)).toHaveLength(1);
    expect(page.match(/&#60;img src=x onerror=alert\(1\)&#62;/g)?.length).toBeGreaterThanOrEqual(5);
    expectText(page, `href="#${encodeURIComponent(`host-${HOSTILE}`)}"`.replaceAll("'", "&#39;"));
  });

  test("renders a name that is no well-formed text", () => {
    expectText(renderPage(status([host("a\ud800b", "silent")])), "1 sender is silent");
  });

  test("names no resource beside itself and permits only its own style and script", () => {
    const page = renderPage(samples.trouble);
    expect(page.match(/\b(src|href)="(?!#|data:)[^"]*"/g)).toBeNull();
    expect(page).not.toMatch(/url\(|@import|\sstyle="|\son\w+="/);
    const policy = pageHeaders["Content-Security-Policy"] ?? "";
    expect(policy).toContain("default-src 'none'");
    for (const tag of ["style", "script"]) {
      const text = new RegExp(`<${tag}[^>]*>([\\s\\S]*?)</${tag}>`).exec(page)?.[1] ?? "";
      const hash = new Bun.CryptoHasher("sha256").update(text).digest("base64");
      expect(policy).toContain(`${tag}-src 'sha256-${hash}'`);
    }
    expect(policy).not.toContain("unsafe");
  });

  test("tells each state in a word, with full times behind the relative ones", () => {
    const page = renderPage(samples.trouble);
    for (const word of ["silent", "never heard of", "gone", "quiet", "ok"])
      expectText(page, `</svg>${word}<`);
    expect(page).toMatch(
      /<time datetime="2026-11-22T10:12:31\.000Z" title="22 Nov 2026[^"]+">40m ago<\/time>/,
    );
    expectText(page, refused);
    expectText(page, "3.1 MiB");
    expect(page).toMatch(/aria-label="Lines per minute: now [\d,]+, peak [\d,]+"/);
  });

  test("puts the worst first, and hosts in the order in which people count", () => {
    const page = renderPage(status([host("10.0.0.10"), host("10.0.0.9"), host("10.0.0.11", "silent")]));
    const rows = [...page.matchAll(/<tr role="row" id="host-([^"]+)"/g)].map((match) => match[1]);
    expect(rows).toEqual(["10.0.0.11", "10.0.0.9", "10.0.0.10"]);
  });

  test("is light with 200 senders, and bounded with thousands", () => {
    expect(renderPage(samples.many).length).toBeLessThan(300_000);
    const fleet = status(Array.from({ length: 3000 }, (_, i) => host(`web-${i}`, i < 3 ? "silent" : "ok")));
    const page = renderPage(fleet);
    expect(page.length).toBeLessThan(700_000);
    expectText(page, "2,500 more senders are counted above and not listed");
    expectText(page, "2,997 of 3,000");
  });
});

/** A folder as receiver and forwarder leave it, and the config that names it. */
async function folderWith(senders: string[], files: string[]) {
  const dir = await tempFolder();
  for (const file of files) {
    await mkdir(join(dir, file, ".."), { recursive: true });
    await writeFile(join(dir, file), "");
  }
  const groups = [{ port: 0, senders }];
  return { dir, config: parseConfig(JSON.stringify({ receiver: { dir, groups } }), "receiver") };
}

function ledgerOf(over: Partial<Ledger>): Ledger {
  return { ...emptyLedger(), ...over };
}

function collect(config: Parameters<typeof collectStatus>[0], ledgers: Record<string, Ledger> = {}) {
  return collectStatus(config, {
    ledgerOf: (name) => ledgers[name],
    readOther: readLedger,
    now: NOW,
    startedAt: NOW - 3_600_000,
  });
}

describe("collectStatus()", () => {
  test("tells the state of a sender by when it was heard and when its last line came", async () => {
    const { config } = await folderWith(["ok", "quiet", "silent", "never"], []);
    const { hosts } = await collect(config, {
      ok: ledgerOf({ heardAt: NOW - 1000, lineAt: NOW - 1000 }),
      quiet: ledgerOf({ heardAt: NOW - 1000, lineAt: NOW - 6 * MINUTE_MS }),
      silent: ledgerOf({ heardAt: NOW - 6 * MINUTE_MS, lineAt: NOW - 6 * MINUTE_MS }),
    });
    expect(hosts.map((sender) => sender.state)).toEqual(["ok", "quiet", "silent", "never"]);
  });

  test("calls nobody silent while the receiver itself has only just started", async () => {
    const { config } = await folderWith(["a"], []);
    const ledger = ledgerOf({ heardAt: NOW - 9 * MINUTE_MS, lineAt: NOW - 9 * MINUTE_MS });
    const sources = { ledgerOf: () => ledger, readOther: readLedger, now: NOW, startedAt: NOW - MINUTE_MS };
    expect((await collectStatus(config, sources)).hosts[0]?.state).toBe("quiet");
  });

  test("counts open, waiting and failed batches by sender, and what the ledger says", async () => {
    const { dir, config } = await folderWith(
      ["*"],
      [
        "10.0.0.1/accessLog_26112210_00-19_10-0-0-1.log",
        "10.0.0.1/accessLog_26112210_20-39_10-0-0-1.log",
        "10.0.0.1/accessLog_26112210_40-59_10-0-0-1.log.part",
        "failed/accessLog_26112209_40-59_10-0-0-1.log",
        "failed/accessLog_26112209_40-59_10-0-0-7.log",
        "sent/accessLog_26112209_20-39_10-0-0-1.log",
      ],
    );
    const open = new Map([
      ["accessLog_26112210_40-59_10-0-0-1.log", { bytes: 1, lines: 1, endsAt: 0, at: NOW }],
    ]);
    const streams = new Map([
      ["one-stream", { offset: 1, at: NOW }],
      ["other-one", { offset: 1, at: NOW, lag: 42 }],
    ]);
    const minute = NOW / MINUTE_MS;
    const minutes = new Map([
      [Math.floor(minute), 99], // the minute that still runs does not count yet
      [Math.floor(minute) - 1, 7],
      [Math.floor(minute) - 240, 3],
    ]);
    const record = { heardAt: NOW, lineAt: NOW, lost: 5, streams: Object.fromEntries(streams) };
    await writeFile(
      join(dir, "10.0.0.1", ".ledger"),
      formatRecord({ ...record, open: Object.fromEntries(open), minutes: Object.fromEntries(minutes) }),
    );
    const { hosts, disk, forwarder } = await collect(config);
    expect(hosts).toHaveLength(2);
    const [first, second] = hosts;
    expect(first).toMatchObject({
      host: "10.0.0.1",
      open: 1,
      waiting: 2,
      failed: 1,
      lag: 42,
      lost: 5,
      state: "ok",
    });
    const oldest = join(dir, "10.0.0.1", "accessLog_26112210_00-19_10-0-0-1.log");
    expect(first?.waitingSince).toBe((await stat(oldest)).ctimeMs);
    expect(first?.linesPerMinute).toHaveLength(240);
    expect(first?.linesPerMinute.at(-1)).toBe(7);
    expect(first?.linesPerMinute.at(0)).toBe(3);
    expect(second).toMatchObject({ host: "10-0-0-7", state: "gone", failed: 1 });
    expect(disk?.free).toBeGreaterThan(0);
    expect(forwarder).toBeUndefined();
  });

  test("leaves out a sender that the config knows no longer, once nothing of it is left", async () => {
    const batch = "gone/accessLog_26112210_00-19_gone.log";
    const left = await folderWith(["here"], [batch, "empty/.ledger"]);
    expect((await collect(left.config)).hosts.map((sender) => [sender.host, sender.state])).toEqual([
      ["here", "never"],
      ["gone", "gone"],
    ]);
  });

  test("tells what the forwarder said last", async () => {
    const { dir, config } = await folderWith(["*"], []);
    const state = { version: 1, at: NOW, ok: true, lastSentAt: NOW - 5, failed: {} };
    await writeFile(join(dir, ".forwarder-state.json"), JSON.stringify(state));
    expect((await collect(config)).forwarder).toMatchObject({ at: NOW, lastSentAt: NOW - 5 });
    await writeFile(join(dir, ".forwarder-state.json"), "{");
    expect((await collect(config)).forwarder?.fault?.text).toContain(".forwarder-state.json");
  });
});

describe("createStatusReader()", () => {
  test("looks at the folder once for many that ask, and again after two seconds", async () => {
    const { dir, config } = await folderWith(["*"], ["a/.ledger"]);
    let now = NOW;
    const read = createStatusReader(config, { ledgerOf: () => ledgerOf({ heardAt: NOW }), now: () => now });
    expect((await Promise.all([read(), read()])).map(({ hosts }) => hosts.length)).toEqual([1, 1]);
    await mkdir(join(dir, "b"));
    now += 1000;
    expect((await read()).hosts).toHaveLength(1);
    now += 2000;
    expect((await read()).hosts).toHaveLength(2);
  });
});
