import { describe, expect, test } from "bun:test";
import { renderAlert } from "../lib/mail/alertmail.ts";
import type { MailText } from "../lib/mail/mailpage.ts";
import type { HourRow } from "../lib/mail/summary.ts";
import { renderSummary } from "../lib/mail/summarymail.ts";
import type { Change } from "../lib/notice.ts";
import { findViolations, noBrowser, useBrowser, visit } from "./browser.ts";

const NOW = Date.parse("2026-11-22T10:52:31Z");
useBrowser();

describe.skipIf(noBrowser)("the mails in a browser", () => {
  const changes: Change[] = [
    { kind: "opened", title: "10.10.21.182", text: "", status: "silent", sender: true, since: NOW },
    { kind: "flapping", title: "10.10.21.9", text: "", status: "silent", sender: true, since: NOW },
    { kind: "over", title: "10.10.21.7", text: "", status: "ok", sender: true, since: NOW, lasted: 9000 },
  ];
  const [all, none] = [
    { files: 3, lines: 48_213, bytes: 9_000_000 },
    { files: 0, lines: 0, bytes: 0 },
  ];
  const total = {
    received: all,
    delivered: all,
    waiting: none,
    failed: none,
    missing: none,
    differs: 0,
    late: 0,
  };
  const row: HourRow = { ...total, host: "10.10.21.181", hour: "2026-11-22 06:00", state: "complete" };
  const late: HourRow = { ...row, host: "10.10.21.182", delivered: none, waiting: all, state: "silent" };
  const failed: HourRow = { ...row, host: "10.10.21.183", delivered: none, failed: all };
  const curve = Array.from({ length: 24 }, (_, i) => i * 100);
  const hour = { end: NOW, hour: "2026-11-22 06:00", stragglers: none, curve };
  const mails: Record<string, MailText> = {
    alert: renderAlert({
      kind: "alert",
      id: "",
      at: NOW,
      references: [],
      changes,
      counts: { ok: 3, silent: 1 },
    }),
    good: renderSummary({ ...hour, rows: [row], total }),
    late: renderSummary({ ...hour, rows: [row, late], total: { ...total, waiting: all } }),
    failed: renderSummary({
      ...hour,
      rows: [row, late, failed],
      total: { ...total, waiting: all, failed: all },
    }),
  };

  test.each(Object.keys(mails))("%s: axe-core finds nothing, and it fits a phone", async (name) => {
    await visit("about:blank", { viewport: { width: 360, height: 800 } }, async (page) => {
      await page.setContent(mails[name]?.html ?? "");
      expect(await findViolations(page)).toEqual([]);
      expect(await page.evaluate("document.documentElement.scrollWidth")).toBe(360);
    });
  });
});
