/** What the mails say, as pure functions, and the account of an hour. */
import { describe, expect, test } from "bun:test";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { parseConfig } from "../lib/config.ts";
import { formatRecord, type LedgerRecord, type SealedBatch } from "../lib/ledger.ts";
import {
  type Alert,
  type Change,
  renderAlert,
  renderSummary,
  type SummaryAround,
} from "../lib/mail/message.ts";
import { type AccountSpan, summariseHour } from "../lib/mail/summary.ts";
import { appendReport } from "../lib/report.ts";
import { tempFolder } from "./support.ts";

const MINUTE = 60_000;
const HOUR = 60 * MINUTE;
const NOON = Date.UTC(2026, 10, 22, 12);

const silent = (title: string, over: Partial<Change> = {}): Change => ({
  ...{ kind: "opened", title, text: "", status: "silent", sender: true, since: NOON - 6 * MINUTE },
  ...over,
});
const fault = (title: string, text: string, over: Partial<Change> = {}): Change =>
  silent(title, { text, status: "fault", sender: false, since: NOON, ...over });
const alert = (changes: Change[], over: Partial<Alert> = {}) =>
  renderAlert(
    { at: NOON, changes, counts: {}, standing: [], ...over },
    { page: "http://10.10.23.212:5001/" },
  );

describe("renderAlert()", () => {
  test("counts by kind in the subject", () => {
    const names = ["a", "b", "c", "d"];
    const { subject } = alert([
      fault("1 batch is refused by the client", ""),
      ...names.map((name) => silent(name)),
    ]);
    expect(subject).toBe("1 batch is refused by the client; 4 senders silent: a, b, c and 1 more");
    const all = names.map((name) => silent(name, { text: "no receiver is running on port 5001" }));
    expect(alert(all, { counts: { silent: 4 } }).subject).toBe(
      "All 4 senders silent: no receiver is running on port 5001",
    );
  });

  test("tells true times: when it began, how long it lasted, the day after a day", () => {
    const over = alert([
      fault("x", "", { kind: "over", status: "ok", since: NOON - 214_000, lasted: 214_000 }),
    ]);
    expect(over.subject).toBe("Over: x, lasted 3m 34s");
    expect(over.text).toMatch(/It began 2026-11-22 \d\d:56 \S+\.$/m);
    const days = alert([silent("a", { kind: "reminder", since: NOON - 74 * HOUR })]);
    expect(days.text).toMatch(/a still silent since 19 Nov, \d\d:00, for 3d 2h/);
  });

  test("ends with what to do, the page and the zone of its times", () => {
    const { text, html } = alert([silent("a", { next: ["ssh a systemctl status log-rt-sync-shipper"] })]);
    expect(text).toContain("What to do now:\n  ssh a systemctl status log-rt-sync-shipper");
    expect(text).toContain("http://10.10.23.212:5001/");
    expect(text).toMatch(/2026-11-22 \d\d:00 (UTC|[+-]\d\d:\d\d)/);
    expect(html.replace(/<[^>]*>/g, "")).toContain("ssh a systemctl status log-rt-sync-shipper");
  });

  test("a recovery is green only as far as it goes", () => {
    const over = [silent("a", { kind: "over", status: "ok", lasted: 5 * MINUTE })];
    expect(alert(over).html).toContain("background:#116b3c;color:#ffffff");
    const partly = alert(over, { standing: ["2 senders silent or never seen"] });
    expect(partly.html).toContain("background:#8a4b00;color:#ffffff");
    expect(partly.text).toContain("Also wrong: 2 senders silent or never seen.");
  });

  test("names host, bytes and time of what was lost", () => {
    const text = "2.0 KiB vanished from its disk unread since 11:00";
    const lost = alert([silent("a", { kind: "lost", bytes: 2048, text, status: "fault" })]);
    expect(lost.subject).toBe("a lost 2.0 KiB");
    expect(lost.text).toContain(text);
  });

  test("reminds of what flaps and is well for the moment as flapping, not as gone", () => {
    const sender = alert([silent("a", { kind: "reminder", status: "ok" })]);
    expect(sender.subject).toBe("a is still flapping");
    expect(sender.text).toContain("It keeps changing.");
    expect(alert([fault("x", "", { kind: "reminder", status: "ok" })]).subject).toBe("X is still flapping");
  });

  test("says a single fact once, of many senders in the plural, and what to do of each kind", () => {
    const one = alert([fault("1 batch is refused by the client", "x.log: quota exceeded")]);
    expect(one.html.match(/1 batch is refused by the client/g)).toHaveLength(2); // as its title, for the tab and in it
    const next = ["ssh a systemctl status log-rt-sync-shipper", "ssh a log-rt-sync shipper --check"];
    const many = alert([
      ...["a", "b", "c", "d"].map((title) => silent(title, { next })),
      fault("x", "", { next: ["df -h /app"] }),
    ]);
    expect(many.text).toContain("Their shippers, their hosts or the network are down.");
    expect(many.text).toContain(`What to do now:\n  ${next[0]}\n  df -h /app\n  ${next[1]}\n`);
  });

  test("is small for any number of senders", () => {
    const many = Array.from({ length: 5000 }, (_, i) => silent(`host-${i}.example.com`));
    const changes = [
      ...many,
      ...many.map((change) => ({ ...change, kind: "lost", bytes: 1, text: "gone" }) as Change),
    ];
    const { html, text, subject } = alert(changes);
    expect(html.length).toBeLessThan(61_440);
    expect(text.length).toBeLessThan(20_000);
    expect(subject.length).toBeLessThan(200);
    expect(text).toContain("5000 senders silent");
  });
});

// ---- the account of an hour

const END = Date.UTC(2026, 10, 22, 1); // 07:00 at +06:00
const CUT = END + 15 * MINUTE;

async function account(expected: string[] = []) {
  const dir = await tempFolder();
  const report = join(dir, "report.log");
  const mail = { smtp: "file:///tmp/x", from: "a@example.com", to: ["b@example.com"] };
  const config = parseConfig(JSON.stringify({ monitor: { dir, expected, report, mail } }), "monitor");
  const write = async (host: string, record: LedgerRecord, batches: SealedBatch[] = []) => {
    const sealed = Object.fromEntries(batches.map((batch) => [batch.name, batch]));
    await mkdir(join(dir, host), { recursive: true });
    await writeFile(join(dir, host, ".ledger"), formatRecord({ v: 2, sealed, ...record }));
  };
  const span = (over: Partial<AccountSpan> = {}): AccountSpan => ({
    ...{ hourEnd: END, from: CUT - HOUR, to: CUT, missingFrom: 0, missingTold: [], since: {} },
    ...over,
  });
  return { dir, config, write, span, report };
}

const batch = (window: string, host: string, lines: number, at: number, more = ""): SealedBatch => ({
  ...{
    name: `accessLog_261122${window}_${host.replaceAll(".", "-")}${more}.log`,
    lines,
    bytes: lines * 100,
    at,
  },
});
const AROUND: SummaryAround = { zone: 360, problems: [], mutes: {} };

describe("summariseHour()", () => {
  test("accounts for each batch that was sealed since the account before", async () => {
    const { dir, config, write, span, report } = await account(["10.0.0.1", "10.0.0.9"]);
    const sealedAt = END + 2 * MINUTE;
    const sealed = [
      batch("05_40-59", "10.0.0.1", 99, CUT - HOUR), // in the account before
      batch("06_00-19", "10.0.0.1", 10, sealedAt),
      batch("06_20-39", "10.0.0.1", 20, sealedAt),
      batch("06_20-39", "10.0.0.1", 1, sealedAt, ".2"),
      batch("06_40-59", "10.0.0.1", 30, sealedAt),
      batch("12_00-19", "10.0.0.1", 5, sealedAt), // of a clock that is ahead, or of another zone
      batch("07_00-19", "10.0.0.1", 99, CUT + 1), // in the next account
    ];
    await write("10.0.0.1", { heardAt: CUT, facts: { through: CUT } }, sealed);
    const open = { "accessLog_26112206_40-59_10-0-0-2.log": { bytes: 700, lines: 7, endsAt: END, at: END } };
    await write("10.0.0.2", { heardAt: CUT, facts: { through: END - 1 }, open });
    const sent = (name: string | undefined, lines: number) => ({
      at: END,
      batch: name ?? "",
      lines,
      status: "Sent" as const,
    });
    await appendReport(report, [
      sent(sealed[0]?.name, 99),
      sent(sealed[1]?.name, 10),
      sent(sealed[2]?.name, 19),
      sent(sealed[5]?.name, 5),
    ]);
    await mkdir(join(dir, "failed"));
    await writeFile(join(dir, "failed", sealed[3]?.name ?? ""), "");
    const since = { "10.0.0.1": { skipped: 4, untimed: 2, lost: 2048 } };
    const summary = await summariseHour(config, span({ since, missingFrom: CUT }));
    expect(summary.rows.map(({ host, state }) => [host, state])).toEqual([
      ["10.0.0.1", "complete"],
      ["10.0.0.2", "incomplete"],
      ["10.0.0.9", "silent"],
    ]);
    const { total } = summary;
    expect(total).toMatchObject({
      received: { files: 5, lines: 66, bytes: 6600 },
      delivered: { lines: 35 },
      failed: { lines: 1 },
      missing: { lines: 30 },
      open: { lines: 7 },
      ...{ differs: 1, late: 1, since: { skipped: 4, untimed: 2, ahead: 0, lost: 2048 } },
    });
    expect(summary.curve.slice(-2)).toEqual([99, 66]);
    const { subject, text, html } = renderSummary(summary, AROUND);
    expect(html).toContain('<td width="53%"'); // of its bar: 35 of 66 lines delivered
    expect(subject).toBe(
      "06:00–07:00 66 lines, 2.0 KiB lost, 1 file failed, 1 missing, 1 with other counts, 1 sender silent, 1 incomplete",
    );
    expect(text).toContain("70 lines read = 35 delivered + 4 skipped + 0 waiting + 1 failed + 30 missing.");
    expect(text).toContain("7 lines are in batches that still take lines");
    expect(text).toContain("2 lines have no timestamp.");
  });

  test("tells a batch that vanished after its account, once", async () => {
    const { config, write, span } = await account();
    const gone = batch("04_00-19", "10.0.0.1", 8, CUT - 3 * HOUR);
    await write("10.0.0.1", { heardAt: CUT }, [gone]);
    const summary = await summariseHour(config, span());
    expect(summary.vanished).toEqual([{ host: "10.0.0.1", name: gone.name, lines: 8 }]);
    const { subject, text } = renderSummary(summary, AROUND);
    expect(subject).toContain("1 file missing");
    expect(text).toContain(
      `Missing since an earlier account, neither here nor delivered: ${gone.name} (8 lines).`,
    );
    expect((await summariseHour(config, span({ missingTold: [gone.name] }))).vanished).toEqual([]);
    expect((await summariseHour(config, span({ missingFrom: CUT - HOUR }))).vanished).toEqual([]);
  });

  test("a batch that is missing in its own account is not told again in the next", async () => {
    const { config, write, span } = await account();
    const gone = batch("06_00-19", "10.0.0.1", 8, CUT - MINUTE);
    await write("10.0.0.1", { heardAt: CUT }, [gone]);
    const { total, missing } = await summariseHour(config, span());
    expect([total.missing.lines, missing]).toEqual([8, [gone.name]]);
    const next = span({ from: CUT, to: CUT + HOUR, missingTold: missing });
    expect((await summariseHour(config, next)).vanished).toEqual([]);
  });

  test("without a report nothing that was cleared away after its delivery is called missing", async () => {
    const { dir, config, write, span } = await account();
    await write("10.0.0.1", { heardAt: CUT }, [batch("01_00-19", "10.0.0.1", 8, CUT - 6 * HOUR)]);
    await mkdir(join(dir, "sent"), { recursive: true });
    expect((await summariseHour(config, span())).vanished).toEqual([]);
  });

  test.each([
    ["beside older times of a clock that was set back", 7, [120]],
    ["and was sealed longer ago than it is looked for", 60, [58, 30]],
  ])("a batch that a long report tells as delivered, %s, is not missing", async (_, age, others) => {
    const { config, write, span, report } = await account();
    const old = batch("01_00-19", "10.0.0.1", 8, CUT - age * HOUR);
    await write("10.0.0.1", { heardAt: CUT }, [old]);
    const line = (name: string, at: number) => ({ at, batch: name, lines: 8, status: "Sent" as const });
    await appendReport(report, [
      line(old.name, old.at + MINUTE),
      ...others.flatMap((hours) =>
        Array.from({ length: 4000 }, () => line("accessLog_x", CUT - hours * HOUR)),
      ),
      line("accessLog_last", CUT),
    ]);
    expect((await summariseHour(config, span())).vanished).toEqual([]);
  });

  test("counts each batch once in 25 hours of a day whose clock is set back", async () => {
    const { config, write, span } = await account();
    const start = Date.UTC(2026, 9, 25, 22) - DAY_MS;
    const batches = Array.from({ length: 75 }, (_, i) => {
      const name = `accessLog_2610${String(24 + Math.floor(i / 72)).padStart(2, "0")}00_00-19_10-0-0-1.${i + 2}.log`;
      return { name, lines: 200, bytes: 1, at: start + i * 20 * MINUTE + 2 * MINUTE };
    });
    await write("10.0.0.1", { heardAt: start + 26 * HOUR }, batches);
    let lines = 0;
    for (let hour = 1; hour <= 26; hour++) {
      const [hourEnd, to] = [start + hour * HOUR, start + hour * HOUR + 15 * MINUTE];
      const { total } = await summariseHour(
        config,
        span({ hourEnd, from: to - HOUR, to, missingFrom: Infinity }),
      );
      expect(total.received.lines).toBeLessThanOrEqual(600);
      lines += total.received.lines;
    }
    expect(lines).toBe(75 * 200 - 200); // the first one was sealed before the first account
  });

  test("an hour without a line from the whole fleet is not green", async () => {
    const { config, write, span } = await account();
    await write("10.0.0.1", { heardAt: CUT, facts: { through: CUT } });
    const { subject, html } = renderSummary(await summariseHour(config, span()), AROUND);
    expect(subject).toBe("06:00–07:00 0 lines, none from any sender");
    expect(html).toContain("background:#8a4b00;color:#ffffff");
    expect(html).toContain("No lines from any sender");
    expect(html).toContain("tallest bar: 0 lines");
  });

  test("what can't be read is told, and the others are in the account", async () => {
    const { dir, config, write, span } = await account();
    await write("10.0.0.1", { heardAt: CUT, facts: { through: CUT } }, [
      batch("06_00-19", "10.0.0.1", 3, END),
    ]);
    await mkdir(join(dir, "10.0.0.2", ".ledger"), { recursive: true });
    await writeFile(join(dir, "failed"), "no folder");
    await mkdir(join(dir, "report.log"));
    const summary = await summariseHour(config, span());
    expect(summary.total.received.lines).toBe(3);
    expect(summary.unreadable).toHaveLength(3);
    expect(renderSummary(summary, AROUND).subject).toContain("3 files or folders unreadable");
  });

  test("tells mutes, problems and the newest digest", async () => {
    const { config, write, span } = await account();
    await write("10.0.0.1", { heardAt: CUT });
    const mute = { until: END + HOUR, at: END, by: "root", reason: "new kernel" };
    const { text } = renderSummary(await summariseHour(config, span()), {
      ...AROUND,
      page: "https://logs.example.com/",
      problems: ["2 senders are silent"],
      next: ["ssh 10.0.0.1 systemctl status log-rt-sync-shipper"],
      mutes: { "10.0.0.1": mute, "*": { ...mute, reason: undefined } },
      digest: { name: "accessLog_26112206.sha256", sha256: "ab12" },
    });
    expect(text).toContain("2026-11-22 06:00–07:00 +06:00: ");
    expect(text).toContain("Wrong now, times in UTC: 2 senders are silent."); // this server's, not the senders'
    expect(text).toContain("Muted until 2026-11-22 02:00 UTC: 10.0.0.1, by root: new kernel.");
    expect(text).toContain("Muted until 2026-11-22 02:00 UTC: all senders, by root.");
    expect(text).toContain("Newest digest: accessLog_26112206.sha256, sha256 ab12.");
    expect(text).toContain("https://logs.example.com/");
    expect(text).toMatch(/What to do now:\n {2}ssh 10\.0\.0\.1 .*\n {2}.*monitor.* --status\n/);
  });

  test("is under 60 KiB at any number of senders, the rest in an attached table", async () => {
    const { config, write, span } = await account();
    for (let i = 0; i < 200; i++) {
      const host = `10.0.${i >> 7}.${i & 127}`;
      await write(host, { heardAt: CUT, facts: { through: CUT } }, [batch("06_00-19", host, 100, END)]);
    }
    const summary = await summariseHour(config, span());
    summary.rows = Array.from({ length: 25 }, () => summary.rows).flat();
    const { html, text, attachment } = renderSummary(summary, AROUND);
    expect(html.length).toBeLessThan(61_440);
    expect(text.length).toBeLessThan(61_440);
    expect(attachment?.filename).toBe("senders-2026-11-22-06.csv");
    expect(attachment?.content.split("\r\n")).toHaveLength(5002);
    expect(attachment?.content.split("\r\n")[1]).toMatch(
      /^10\.0\.0\.0,complete,100,0,100,0,0,0,100,0,1,10000,0,2026-/,
    );
  });
});

const DAY_MS = 24 * HOUR;

test("renderAlert() and renderSummary() escape what comes from outside, and refer to nothing remote", async () => {
  const evil = '<img src=x onerror="alert(1)">';
  const change = silent(evil, { text: evil, next: [evil] });
  const mail = renderAlert({
    at: NOON,
    counts: {},
    standing: [evil],
    changes: [change, { ...change, sender: false, status: "fault" }],
  });
  const { config, span } = await account();
  const summary = await summariseHour(config, span());
  const row = { ...summary.total, host: evil, heardAt: 0, state: "silent" as const };
  const hour = renderSummary(
    { ...summary, rows: [row], unreadable: [evil] },
    { ...AROUND, problems: [evil] },
  );
  for (const { html } of [mail, hour]) {
    expect(html).not.toContain("<img");
    expect(html).not.toMatch(/<script|https?:|url\(|<link|<style/i);
    expect(html).toContain("&lt;img");
  }
});
