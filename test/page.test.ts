import { describe, expect, test } from "bun:test";
import { pageHeaders, renderPage } from "../lib/page.ts";
import type { HostState, HostStatus } from "../lib/snapshot.ts";
import { headline } from "../lib/status.ts";
import { fleet, host, NOW, refused, samples, status } from "./page-samples.ts";

const MINUTE_MS = 60_000;
const HOSTILE = `"><img src=x onerror=alert(1)>'&\u202e</main><script>alert(1)</script>`;

/** A page is too long to be shown when a text is not in it. */
function expectText(page: string, text: string): void {
  expect(page.includes(text), text).toBe(true);
}

describe("headline()", () => {
  test("says in one sentence whether everything arrives and is delivered", () => {
    expect(headline(samples.good)).toBe("Everything arrives and is delivered");
    expect(headline(samples.empty)).toBe("No sender was seen yet");
    expect(headline(status([host("a", "quiet")]))).toBe("No lines come and everything is delivered");
    expect(headline({ ...samples.empty, hosts: [host("a")] })).toBe(
      "Everything arrives, no forwarder has run here yet",
    );
  });

  test("counts what is wrong, one or several", () => {
    expect(headline(status([host("a", "silent"), host("b", "silent"), host("c")]))).toBe(
      "2 senders are silent",
    );
    expect(headline(status([host("a", "silent")]))).toBe("1 sender is silent");
    expect(headline(status([host("a", "never"), host("b")]))).toBe("1 sender was never seen");
    expect(headline(status([host("a", "ok", { failed: 1 }), host("b")]))).toBe(
      "1 batch is refused by the client",
    );
    expect(headline(status([host("a")], { disk: { free: 9.9, total: 100 } }))).toBe(
      "The disk has 9.9 % left",
    );
  });

  test("calls a batch late only after the time in which a forwarder delivers", () => {
    const waits = (minutes: number) =>
      headline(status([host("a", "ok", { waiting: 14, waitingSince: NOW - minutes * MINUTE_MS })]));
    expect(waits(29)).toBe("Everything arrives and is delivered");
    expect(waits(31)).toMatch(/^14 batches wait since \d\d:\d\d$/);
    expect(waits(2000)).toMatch(/^14 batches wait since 2\d Nov, \d\d:\d\d$/);
  });

  test("names the first two of many problems", () => {
    expect(headline(samples.trouble)).toBe(
      "2 senders are silent, 1 sender was never seen, and 4 more problems",
    );
  });
});

describe("renderPage()", () => {
  test("escapes every text that comes from outside", () => {
    const page = renderPage(
      status([host(HOSTILE, "silent"), host("b", "ok", { waiting: 1, waitingSince: 1 })], {
        dir: HOSTILE,
        version: HOSTILE,
        forwarder: {
          ...{ version: 1, ok: false, failed: {}, later: {}, at: NOW, aliveAt: NOW },
          fault: { kind: "server", text: HOSTILE, since: NOW },
        },
      }),
    );
    expect(page.includes("<img")).toBe(false);
    expect(page.match(/<script/g)).toHaveLength(1);
    expect(page.match(/<\/main>/g)).toHaveLength(1);
    expect(page.match(/&lt;img src=x onerror=alert\(1\)&gt;/g)?.length).toBeGreaterThanOrEqual(5);
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

  test("tells each state in a word, with full times behind the relative ones, and of when a number is", () => {
    const page = renderPage(samples.trouble);
    expect(page).toMatch(/<dt>Lines per minute since \d\d:47<\/dt>/); // the clock of NOW, five minutes before
    expectText(page, "<dt>Lag of 4 senders</dt>");
    for (const word of ["silent", "never seen", "gone", "quiet", "ok"]) expectText(page, `</svg>${word}<`);
    expect(page).toMatch(
      /<time datetime="2026-11-22T10:12:31\.000Z" title="22 Nov 2026[^"]+">40m ago<\/time>/,
    );
    expectText(page, refused);
    expectText(page, "3.1 MiB");
    expect(page).toMatch(/aria-label="Lines per minute: now [\d,]+, peak [\d,]+"/);
  });

  test("says how long ago the receiver started since which a sender was not heard", () => {
    const page = renderPage(status([host("a", "waiting")], { startedAt: NOW - 17_000 }));
    expectText(page, "waiting: its receiver is down, or it was not heard since that started (17s ago)");
  });

  test("puts the worst first, and hosts in the order in which people count", () => {
    const page = renderPage(status([host("10.0.0.9"), host("10.0.0.10"), host("10.0.0.11", "silent")]));
    const rows = [...page.matchAll(/<tr role="row" id="host-([^"]+)"/g)].map((match) => match[1]);
    expect(rows).toEqual(["10.0.0.11", "10.0.0.9", "10.0.0.10"]);
    const late = host("10.0.0.12", "ok", { waiting: 1, waitingSince: NOW - 3_600_000, oldest: "x" });
    const muted = host("10.0.0.11", "ok", { muted: { until: NOW + 60_000, at: NOW, by: "root" } });
    const troubled = renderPage(status([host("10.0.0.9"), host("10.0.0.10"), muted, late]));
    expect([...troubled.matchAll(/id="host-10\.0\.0\.(\d+)"/g)].map((match) => match[1]).join()).toBe(
      "11,12,9,10",
    );
  });

  test("is light with 200 senders, and bounded with thousands", () => {
    expect(renderPage(samples.many).length).toBeLessThan(300_000);
    const page = renderPage(fleet(5000));
    expect(page.length).toBeLessThan(300_000);
    expect(page.match(/<tr role="row" id/g)?.length).toBeGreaterThan(80);
    expect(page.match(/<li( class="b")?>10\./g)?.length).toBeGreaterThan(4800); // for the search
    expectText(page, "4,989 of 5,000");
    expectText(page, ">ok<span>, 4,8");
    const long = Array.from({ length: 3000 }, (_, i) => host(`${"web-farm.".repeat(20)}${i}`, "ok"));
    const bounded = renderPage(status(long));
    expect(bounded.length).toBeLessThan(300_000);
    expectText(bounded, "<li>and 2,");
  });
});

test("renderPage() counts the programs of senders, and names those that are behind", () => {
  const agents = ["log-rt-sync/2.0.0", "log-rt-sync/2.0.0", "log-rt-sync/1.10.0", undefined];
  const senders = agents.map((agent, n) => host(`10.0.0.${n}`, "ok", { ...(agent && { agent }) }));
  const page = renderPage(status(senders));
  expect(page).toContain("Senders run log-rt-sync/2.0.0 (2), log-rt-sync/1.10.0 (1).");
  expect(page.match(/<small>log-rt-sync\/[\d.]+<\/small>/g)).toEqual(["<small>log-rt-sync/1.10.0</small>"]);
});

test("renderPage() shows bytes that vanished here beside those that vanished at the sender", () => {
  expect(renderPage(status([host("10.0.0.1", "ok", { lost: 1024, gone: 1024 })]))).toContain("2.0 KiB");
});

test("renderPage() names this server, the digests' head, and that it judges by defaults", () => {
  const digest = { name: "accessLog_26112209.sha256", sha256: "ab".repeat(32) };
  const page = renderPage(status([host("a")], { digest, byDefaults: true }));
  expect(page).toContain("<title>Everything arrives and is delivered · middle · Log-RT-Sync</title>");
  expect(page).toContain("Log-RT-Sync on middle");
  expect(page).toContain(`Newest digest accessLog_26112209.sha256, sha256 <code>${"ab".repeat(32)}</code>`);
  expect(page).toContain("no section monitor: judged by its defaults");
});

test("renderPage() shows up to where each sender is delivered, by its own clock", () => {
  const cell = (over: Partial<HostStatus>, state: HostState = "silent") =>
    /<td role="cell"(?: class="(?:z|n bad)")?>([^<]*(?:<small>[^<]*<\/small>)?)<\/td><td role="cell" class="z">unknown/.exec(
      renderPage(status([host("a", state, over)])),
    )?.[1];
  expect(cell({ delivered: "26112210_20-39" })).toBe("10:40"); // all of it
  expect(cell({ delivered: "26112210_20-39", undeliveredFrom: "26112210_40-59" })).toBe("10:40");
  expect(cell({ delivered: "26112210_20-39", undeliveredFrom: "26112209_00-19" })).toBe(
    "09:00 <small>newest 10:40</small>",
  );
  expect(cell({ delivered: "26112210_20-39", undeliveredFrom: "26112123_40-59" })).toBe(
    "11-21 23:40 <small>newest 10:40</small>",
  );
  expect(cell({ delivered: "26112300_20-39", zone: 840 })).toBe("00:40");
  expect(cell({}, "never")).toBe("–"); // nothing is known to be delivered
  expect(cell({ undeliveredFrom: "26112209_00-19" }, "never")).toBe("–");
});

test("renderPage() does not say that the disk has room while chunks are refused for want of it", () => {
  const receiver = { version: 1 as const, at: NOW, startedAt: 0, ports: [5001], refused: [], pressed: [] };
  const full = { ...receiver, runs: true, health: "the disk is full" };
  const page = renderPage(status([host("a")], { receivers: [full] }));
  expect(page).toContain("Disk needs room");
  expect(page).not.toContain("Disk has room");
  expectText(page, "The receiver on port 5001 can&#39;t store lines");
});

test("renderPage() shows a mute with until when, who and why", () => {
  const mute = { until: NOW + 3_600_000, at: NOW, by: "anna" };
  const page = renderPage(
    status([
      host("10.0.0.1", "silent", { muted: { ...mute, reason: "new kernel" } }),
      host("10.0.0.2", "silent", { muted: mute }),
    ]),
  );
  const shown = [...page.matchAll(/<small>(muted until [^<]*)<\/small>/g)].map((match) => match[1]);
  expect(shown).toEqual(["muted until 11:52 by anna: new kernel", "muted until 11:52 by anna"]);
});
