/** The mails as a mail program shows them; MAIL_SHOTS=FOLDER keeps pictures. */
import { describe, expect, test } from "bun:test";
import { join } from "node:path";
import { type Change, type MailText, renderAlert, renderSummary } from "../lib/mail/message.ts";
import { type Amount, emptyTotals, type HourRow, type HourSummary } from "../lib/mail/summary.ts";
import { findViolations, noBrowser, useBrowser, visit } from "./browser.ts";

const NOW = Date.parse("2026-11-22T10:52:31Z");
const SHOTS = process.env.MAIL_SHOTS;
const AROUND = { page: "https://logs.example.com:5001/" };
useBrowser();

const NONE: Amount = { files: 0, lines: 0, bytes: 0 };
const ALL: Amount = { files: 3, lines: 48_213, bytes: 9_000_000 };

function row(host: string, over: Partial<HourRow> = {}): HourRow {
  const amounts = { received: ALL, delivered: ALL, waiting: NONE, failed: NONE, missing: NONE, open: NONE };
  return {
    host,
    ...amounts,
    differs: 0,
    late: 0,
    since: emptyTotals(),
    heardAt: NOW,
    state: "complete",
    ...over,
  };
}

/** The account of these rows, with their sums. */
function hour(rows: HourRow[], over: Partial<HourSummary> = {}): MailText {
  const sum = (key: "received" | "delivered" | "waiting" | "failed" | "missing" | "open"): Amount => ({
    files: rows.reduce((total, one) => total + one[key].files, 0),
    lines: rows.reduce((total, one) => total + one[key].lines, 0),
    bytes: rows.reduce((total, one) => total + one[key].bytes, 0),
  });
  const since = emptyTotals();
  for (const one of rows) {
    since.skipped += one.since.skipped;
    since.lost += one.since.lost;
  }
  const total = {
    ...{
      received: sum("received"),
      delivered: sum("delivered"),
      waiting: sum("waiting"),
      failed: sum("failed"),
    },
    ...{ missing: sum("missing"), open: sum("open"), differs: 0, late: 0, since },
  };
  const curve = Array.from({ length: 24 }, (_, i) => (i === 3 ? 0 : 1000 + i * 100));
  const hourEnd = Date.UTC(2026, 10, 22, 10);
  return renderSummary(
    { hourEnd, rows, total, missing: [], vanished: [], unreadable: [], curve, ...over },
    {
      ...AROUND,
      zone: 60,
      problems: rows.length > 1 ? ["1 sender is silent"] : [],
      mutes: { "10.10.21.9": { until: NOW + 9e6, at: NOW, by: "anna", reason: "new kernel" } },
      digest: { name: "accessLog_26112210.sha256", sha256: "5f2b".repeat(16) },
    },
  );
}

const late = row("10.10.21.182", { delivered: NONE, waiting: ALL, state: "silent" });
const failed = row("web-7.frankfurt.example.com", {
  ...{ delivered: { ...ALL, files: 2, lines: 32_000 }, failed: { ...ALL, files: 1, lines: 16_213 } },
  since: { ...emptyTotals(), skipped: 1200, lost: 4096 },
});
const change = (over: Partial<Change>): Change => ({
  ...{
    kind: "opened",
    title: "10.10.21.182",
    text: "",
    status: "silent",
    sender: true,
    since: NOW - 360_000,
  },
  ...over,
});
const next = [
  "ssh 10.10.21.182 systemctl status log-rt-sync-shipper",
  "bun run monitor.ts --status --host 10.10.21.182",
];
const alert = (changes: Change[], standing: string[] = []) =>
  renderAlert({ at: NOW, changes, counts: { ok: 3, silent: 1 }, standing }, AROUND);

const MAILS: Record<string, MailText> = {
  alert: alert([
    change({ next }),
    change({
      title: "1 batch is refused by the client",
      text: "accessLog_26112210_00-19_10-10-21-181.log: quota exceeded",
      status: "fault",
      sender: false,
    }),
    change({ title: "10.10.21.9", kind: "flapping" }),
    change({ title: "10.10.21.7", kind: "over", status: "ok", lasted: 9000 }),
  ]),
  many: alert(
    Array.from({ length: 180 }, (_, i) =>
      change({
        title: `10.10.22.${i}`,
        text: "no receiver is running on port 5001: last sign of life 10:40, 12m ago",
        next,
      }),
    ),
  ),
  over: alert([change({ kind: "over", status: "ok", lasted: 540_000 })]),
  partly: alert([change({ kind: "over", status: "ok", lasted: 540_000 })], ["2 batches wait since 10:20"]),
  good: hour([row("10.10.21.181")]),
  late: hour([row("10.10.21.181"), late]),
  failed: hour([row("10.10.21.181"), late, failed], {
    vanished: [{ host: "a", name: "accessLog_26112208_00-19_10-10-21-181.log", lines: 12 }],
  }),
  empty: hour([row("10.10.21.181", { received: NONE, delivered: NONE })]),
  fleet: hour([...Array.from({ length: 200 }, (_, i) => row(`10.10.23.${i}`)), late, failed]),
};

describe.skipIf(noBrowser)("the mails in a browser", () => {
  test.each(Object.keys(MAILS))(
    "%s: axe-core finds nothing, and it fits a phone and a desk",
    async (name) => {
      const mail = MAILS[name]?.html ?? "";
      expect(mail.length).toBeLessThan(61_440);
      for (const width of [360, 800, 1400]) {
        await visit("about:blank", { viewport: { width, height: 800 } }, async (page) => {
          await page.setContent(mail);
          if (width === 360) expect(await findViolations(page)).toEqual([]);
          expect(await page.evaluate("document.documentElement.scrollWidth")).toBe(width);
          if (SHOTS) await page.screenshot({ path: join(SHOTS, `${name}-${width}.png`), fullPage: true });
        });
      }
    },
  );
});
