/**
 * The text of mails, as pure functions: subject, HTML and plain text of an alert and of an hour's summary.
 *
 * Tables and inline styles alone: mail clients drop style sheets, scripts and remote pictures. Everything that
 * comes from outside goes through `escapeHtml`, and the subject has its fact first, for a phone's lock screen.
 */
import { hostname } from "node:os";
import type { Change, Notice, Status } from "./incident.ts";
import { formatBytes, formatDuration, VERSION } from "./service.ts";
import type { HourRow, HourSummary } from "./summary.ts";

/** What a mail says. */
export interface MailText {
  subject: string;
  html: string;
  text: string;
}

const COLOR = {
  good: "#1a7f4b",
  bad: "#c0392b",
  warn: "#b26a00",
  ink: "#1c2733",
  faint: "#66727f",
  line: "#e3e8ed",
};
/** Beyond so many names a list says how many more there are. */
const NAMES = 3;
/** A fault's part of the subject, in characters: a lock screen shows no more. */
const SUBJECT_LENGTH = 90;
/** Height of the curve's tallest bar in pixels. */
const CURVE_PX = 48;

/** For text in HTML, also in attributes. */
export function escapeHtml(text: string): string {
  const entities: Record<string, string> = {
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    '"': "&quot;",
    "'": "&#39;",
  };
  return text.replace(/[&<>"']/g, (c) => entities[c] ?? c);
}

// ---- alerts

/** The mail of what changed: one line per fact, faults before recoveries. */
export function renderAlert({ changes, counts, at }: Extract<Notice, { kind: "alert" }>): MailText {
  const facts = [...changes].sort((a, b) => Number(isGood(a)) - Number(isGood(b)));
  const subject = alertSubject(facts, counts);
  const standing = Object.entries(counts).map(([status, n]) => `${n} ${STATUS_TEXT[status as Status]}`);
  const senders = standing.length > 0 ? `Senders now: ${standing.join(", ")}.` : "";
  const rows = facts.map((change) => {
    const color = isGood(change) ? COLOR.good : change.kind === "flapping" ? COLOR.warn : COLOR.bad;
    return `<tr><td style="padding:12px 14px;border-left:4px solid ${color};border-bottom:1px solid ${COLOR.line}">
<div style="font-size:16px;font-weight:bold;color:${COLOR.ink}">${escapeHtml(headline(change))}</div>
<div style="padding-top:3px;color:${COLOR.faint}">${escapeHtml(explain(change, at))}</div></td></tr>`;
  });
  const body = `<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="table-layout:fixed;overflow-wrap:anywhere">${rows.join("\n")}</table>
<p style="margin:14px 14px 4px;color:${COLOR.faint}">${escapeHtml(senders)}</p>`;
  const color = facts.every(isGood) ? COLOR.good : COLOR.bad;
  const lines = facts.map((change) => `* ${headline(change)}\n  ${explain(change, at)}`);
  return {
    subject,
    html: page(subject, formatTime(at), color, body),
    text: `${lines.join("\n")}\n\n${senders}\n${formatTime(at)}\n${footer()}\n`,
  };
}

const STATUS_TEXT: Record<Status, string> = {
  ok: "ok",
  quiet: "quiet",
  silent: "silent",
  never: "never heard of",
  gone: "gone",
  fault: "at fault",
};

function isGood({ kind, status }: Change): boolean {
  return kind === "over" || kind === "note" || (kind === "steady" && status === "ok") || status === "gone";
}

function alertSubject(facts: Change[], counts: Partial<Record<Status, number>>): string {
  const [first] = facts;
  if (!first) return "";
  const groups = new Map<string, Change[]>();
  for (const fact of facts) {
    const key = fact.sender ? `${fact.kind} ${fact.status}` : `${fact.kind} ${fact.title}`;
    groups.set(key, [...(groups.get(key) ?? []), fact]);
  }
  const all = Object.values(counts).reduce((sum, n) => sum + n, 0);
  const parts = [...groups.values()].map((group) => {
    const [only] = group;
    if (only && group.length === 1) return oneLine(only);
    const everyone = group.length === all && only?.status === "silent" && only.kind === "opened";
    if (everyone) return `All ${all} senders silent: receiver or network down?`;
    return `${group.length} senders ${short(only)}: ${listNames(group.map(({ title }) => title))}`;
  });
  return parts.length <= 2 ? parts.join("; ") : `${parts[0]}; and ${parts.length - 1} more changes`;
}

/** A fact in the subject: a fault with the beginning of what it says. */
function oneLine(change: Change): string {
  const { sender, kind, text } = change;
  if (sender || text === "" || (kind !== "opened" && kind !== "reminder")) return headline(change);
  const line = `${headline(change)}: ${text.replace(/\s+/g, " ")}`;
  return line.length <= SUBJECT_LENGTH ? line : `${line.slice(0, SUBJECT_LENGTH - 1)}…`;
}

/** What happened to several senders, in a word. */
function short(change: Change | undefined): string {
  if (change?.kind === "over") return "back";
  if (change?.kind === "lost") return "lost bytes";
  if (change?.kind === "flapping") return "flapping";
  if (change?.kind === "steady") return "steady again";
  return `${change?.kind === "reminder" ? "still " : ""}${STATUS_TEXT[change?.status ?? "ok"]}`;
}

function headline({ kind, title, status, sender, since, lasted, bytes = 0 }: Change): string {
  const clock = formatClock(since);
  if (kind === "note") return title;
  if (kind === "lost") return `${title} lost ${formatBytes(bytes)} before they were read`;
  if (kind === "flapping") return `${title} is flapping`;
  if (kind === "steady") return `${title} is steady again: ${sender ? STATUS_TEXT[status] : status}`;
  if (kind === "over") {
    if (!sender) return `Over: ${title}, lasted ${formatDuration(lasted ?? 0)}`;
    return lasted === undefined
      ? `${title} is heard for the first time`
      : `${title} back after ${formatDuration(lasted)}`;
  }
  const still = kind === "reminder" ? "still " : "";
  if (!sender) return still ? `Still: ${title}` : title;
  if (status === "never") return `${title} ${still}never heard of`;
  if (status === "gone") return `${title} is gone: silent for a day, not expected`;
  return `${title} ${still}${STATUS_TEXT[status]} since ${clock}`;
}

function explain({ kind, status, sender, since, text }: Change, at: number): string {
  const ago = `${formatTime(since)}, ${formatDuration(at - since)} ago`;
  if (kind === "lost")
    return "They vanished from the sender's disk unread: deleted or truncated, with no copy left.";
  if (kind === "flapping")
    return "It goes and comes. No mail for each change until it has been steady for half an hour.";
  if (kind === "note") return text;
  if (!sender) return kind === "over" ? `It began ${ago}.` : `${sentence(text)}. Noticed ${ago}.`;
  if (kind === "over") return "Its shipper is heard of again; what it kept meanwhile is on its way.";
  if (kind === "steady") return `No change for half an hour. Since ${ago}.`;
  if (status === "silent")
    return `Nothing was heard from its shipper since ${ago}: shipper, host or network is down. Nothing is lost while its log files stay.`;
  if (status === "quiet") return `Its shipper is alive, but nginx wrote no line since ${ago}.`;
  if (status === "never") return "It is expected, and its shipper never reached the receiver.";
  return `Last heard of ${ago}. It is not watched any more; when it comes back, that is told.`;
}

function listNames(names: string[]): string {
  const more = names.length - NAMES;
  return names.slice(0, NAMES).join(", ") + (more > 0 ? ` +${more}` : "");
}

// ---- summaries

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
  const late = total.late > 0 ? ` ${total.late} of the files are late parts.` : "";
  const old =
    stragglers.files > 0
      ? ` Beside them ${stragglers.files} late batches of earlier hours came, ${n(stragglers.lines)} lines.`
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

// ---- the frame

function page(title: string, subtitle: string, color: string, body: string): string {
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light"><title>${escapeHtml(title)}</title></head>
<body style="margin:0;padding:0;background:#f2f5f7">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="background:#f2f5f7"><tr><td align="center" style="padding:12px">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="max-width:600px;table-layout:fixed;overflow-wrap:anywhere;background:#ffffff;font-family:Helvetica,Arial,sans-serif;font-size:14px;line-height:1.4;text-align:left">
<tr><td style="padding:14px;background:${color};color:#ffffff"><div style="font-size:18px;font-weight:bold">${escapeHtml(title)}</div>
<div style="font-size:13px">${escapeHtml(subtitle)}</div></td></tr>
<tr><td style="padding:0 0 10px">${body}</td></tr></table>
<div style="padding:10px;font-family:Helvetica,Arial,sans-serif;font-size:11px;color:${COLOR.faint}">${escapeHtml(footer())}</div>
</td></tr></table></body></html>
`;
}

function heading(text: string): string {
  return `<div style="padding:12px 14px 6px;font-size:12px;font-weight:bold;color:${COLOR.faint}">${escapeHtml(text)}</div>`;
}

function footer(): string {
  return `Log-RT-Sync ${VERSION} on ${hostname()}`;
}

function nextHour(hour: string): string {
  return `${String((Number(hour.slice(0, 2)) + 1) % 24).padStart(2, "0")}${hour.slice(2)}`;
}

function sentence(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}

/** `1,234,567`. */
function formatCount(n: number): string {
  return n.toLocaleString("en-US");
}

/** `06:12` of this machine's clock. */
function formatClock(at: number): string {
  return new Date(at).toTimeString().slice(0, 5);
}

/** `2026-11-22 06:12` of this machine's clock. */
function formatTime(at: number): string {
  const date = new Date(at);
  const two = (n: number) => String(n).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${formatClock(at)}`;
}
