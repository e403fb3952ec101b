/** The mail of an hour, as a pure function: figures, a curve of 24 hours, a row per sender, and the sum. */

import { formatBytes } from "../service.ts";
import { COLOR, escapeHtml, footer, heading, type MailText, page, sentence } from "./mailpage.ts";
import type { HourRow, HourSummary } from "./summary.ts";

/** Height of the curve's tallest bar in pixels. */
const CURVE_PX = 48;

/** The mail of an hour. */
export function renderSummary(summary: HourSummary): MailText {
  const { total } = summary;
  const rows = [...summary.rows].sort((a, b) => Number(isWell(a)) - Number(isWell(b))); // what is wrong first
  const [day = "", from = ""] = summary.hour.split(" ");
  const hour = `${from}–${nextHour(from)}`;
  const troubles = summaryTroubles(summary);
  const lines = `${formatCount(total.received.lines)} lines`;
  const subject = `${hour} ${lines}, ${troubles.length > 0 ? troubles.join(", ") : "all delivered"}`;
  const color =
    troubles.length === 0
      ? COLOR.good
      : total.failed.files + total.missing.files > 0
        ? COLOR.bad
        : COLOR.warn;
  const most = Math.max(1, ...rows.map((row) => row.received.lines));
  const body = [
    heading("Lines"),
    figures(summary),
    heading("Lines per hour, last 24 hours"),
    curve(summary),
    heading("Senders"),
    `<table role="presentation" width="100%" cellpadding="0" cellspacing="0">`,
    ...rows.map((row) => hostRow(row, most, summary.hour)),
    "</table>",
    `<p style="margin:14px 14px 4px;color:${COLOR.faint}">${escapeHtml(reconciliation(summary))}</p>`,
  ].join("\n");
  const title = troubles.length > 0 ? sentence(troubles.join(", ")) : "All delivered";
  return {
    subject,
    html: page(title, `${day}, ${hour}`, color, body),
    text: `${day} ${hour}: ${title}\n\n${textTable(rows)}\n\n${reconciliation(summary)}\n${footer()}\n`,
  };
}

function summaryTroubles({ total, rows }: HourSummary): string[] {
  const troubles: string[] = [];
  const incomplete = rows.filter(({ state }) => state === "incomplete").length;
  const silent = rows.filter(({ state }) => state === "silent").length;
  if (total.failed.files > 0) troubles.push(`${total.failed.files} failed`);
  if (total.missing.files > 0) troubles.push(`${total.missing.files} missing`);
  if (total.differs > 0) troubles.push(`${total.differs} with other counts`);
  if (total.waiting.files > 0) troubles.push(`${total.waiting.files} waiting`);
  if (silent > 0) troubles.push(`${silent} silent`);
  if (incomplete > 0) troubles.push(`${incomplete} incomplete`);
  return troubles;
}

function figures({ total }: HourSummary): string {
  const cells = [
    ["received", total.received, COLOR.ink],
    ["delivered", total.delivered, COLOR.good],
    ["waiting", total.waiting, total.waiting.files > 0 ? COLOR.warn : COLOR.faint],
    ["failed", total.failed, total.failed.files > 0 ? COLOR.bad : COLOR.faint],
  ] as const;
  const html = cells.map(
    ([name, { lines, files }, color]) =>
      `<td width="50%" style="padding:2px 14px 8px"><div style="font-size:18px;font-weight:bold;color:${color}">${formatCount(lines)}</div>
<div style="font-size:12px;color:${COLOR.faint}">${name} in ${files} ${files === 1 ? "file" : "files"}</div></td>`,
  );
  const grid = `<tr>${html.slice(0, 2).join("")}</tr><tr>${html.slice(2).join("")}</tr>`;
  return `<table role="presentation" width="100%" cellpadding="0" cellspacing="0">${grid}</table>`;
}

function curve({ curve: hours, hour }: HourSummary): string {
  const most = Math.max(1, ...hours);
  const last = Number(hour.slice(11, 13));
  const bars = hours.map((lines, i) => {
    const height = lines > 0 ? Math.max(2, Math.round((CURVE_PX * lines) / most)) : 1;
    const color = lines === 0 ? COLOR.line : i === hours.length - 1 ? COLOR.good : "#8fb8a5";
    return `<td valign="bottom" style="padding:0 1px;height:${CURVE_PX}px;vertical-align:bottom"><div style="height:${height}px;line-height:1px;font-size:1px;background:${color}">&nbsp;</div></td>`;
  });
  const labels = Array.from({ length: 4 }, (_, i) => {
    const of = String((last - hours.length + 1 + i * 6 + 48) % 24).padStart(2, "0");
    return `<td colspan="6" style="padding:2px 1px;font-size:11px;color:${COLOR.faint}">${of}:00</td>`;
  });
  return `<div style="padding:0 14px"><table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="table-layout:fixed"><tr>${bars.join("")}</tr><tr>${labels.join("")}</tr></table>
<div style="font-size:11px;color:${COLOR.faint}">tallest bar: ${formatCount(most)} lines</div></div>`;
}

function hostRow(row: HourRow, most: number, hour: string): string {
  const { received } = row;
  const width = received.lines > 0 ? Math.max(1, Math.round((100 * received.lines) / most)) : 0;
  const { text, color } = hostVerdict(row);
  const rest = width < 100 ? `<td style="height:5px;background:${COLOR.line};font-size:1px">&nbsp;</td>` : "";
  const fill =
    width > 0 ? `<td width="${width}%" style="height:5px;background:${color};font-size:1px">&nbsp;</td>` : "";
  const bar = `<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="margin-top:6px"><tr>${fill}${rest}</tr></table>`;
  const other =
    row.hour === hour
      ? ""
      : ` <span style="font-weight:normal;color:${COLOR.faint}">its hour ${row.hour.slice(11)}</span>`;
  return `<tr><td style="padding:9px 14px;border-bottom:1px solid ${COLOR.line}">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr>
<td style="font-size:${row.host.length > 24 ? 12 : 14}px;color:${COLOR.ink};font-weight:bold">${escapeHtml(row.host)}${other}</td>
<td align="right" style="color:${COLOR.ink};white-space:nowrap">${formatCount(received.lines)} lines</td></tr>
<tr><td style="font-size:12px;color:${color}">${escapeHtml(text)}</td>
<td align="right" style="font-size:12px;color:${COLOR.faint};white-space:nowrap">${received.files} ${received.files === 1 ? "file" : "files"} · ${formatBytes(received.bytes)}</td></tr></table>
${bar}</td></tr>`;
}

function isWell(row: HourRow): boolean {
  return hostVerdict(row).color === COLOR.good;
}

function hostVerdict(row: HourRow): { text: string; color: string } {
  const parts: string[] = [];
  if (row.failed.files > 0) parts.push(`${row.failed.files} failed`);
  if (row.missing.files > 0) parts.push(`${row.missing.files} missing`);
  if (row.differs > 0) parts.push(`${row.differs} with another count`);
  const bad = parts.length > 0;
  if (row.waiting.files > 0) parts.push(`${row.waiting.files} waiting`);
  if (row.state !== "complete") parts.push(row.state);
  const warn = parts.length > 0;
  if (!warn) parts.push(row.received.files > 0 ? "complete, delivered" : "complete, no lines");
  if (row.late > 0) parts.push(`${row.late} late`);
  return { text: parts.join(" · "), color: bad ? COLOR.bad : warn ? COLOR.warn : COLOR.good };
}

/** The sum that must come out: what was received is delivered, waits, failed, or is missing. */
function reconciliation({ total, stragglers }: HourSummary): string {
  const { received, delivered, waiting, failed, missing } = total;
  const n = formatCount;
  const parts = [
    `${n(delivered.lines)} delivered`,
    `${n(waiting.lines)} waiting`,
    `${n(failed.lines)} failed`,
  ];
  if (missing.files > 0) parts.push(`${n(missing.lines)} missing`);
  const late =
    total.late > 0
      ? ` ${total.late} of the files ${total.late === 1 ? "is a late part" : "are late parts"}.`
      : "";
  const old =
    stragglers.files > 0
      ? ` Beside them ${stragglers.files} late ${stragglers.files === 1 ? "batch" : "batches"} of earlier hours came, ${n(stragglers.lines)} lines.`
      : "";
  return `${n(received.lines)} lines received = ${parts.join(" + ")}.${late}${old}`;
}

function textTable(rows: HourRow[]): string {
  const width = Math.max(6, ...rows.map(({ host }) => host.length));
  const line = (host: string, lines: string, files: string, bytes: string, text: string) =>
    `${host.padEnd(width)}  ${lines.padStart(12)}  ${files.padStart(5)}  ${bytes.padStart(10)}  ${text}`;
  const body = rows.map((row) => {
    const { lines, files, bytes } = row.received;
    return line(row.host, formatCount(lines), String(files), formatBytes(bytes), hostVerdict(row).text);
  });
  return [line("sender", "lines", "files", "bytes", "state"), ...body].join("\n");
}

function nextHour(hour: string): string {
  return `${String((Number(hour.slice(0, 2)) + 1) % 24).padStart(2, "0")}${hour.slice(2)}`;
}

/** `1,234,567`. */
function formatCount(n: number): string {
  return n.toLocaleString("en-US");
}
