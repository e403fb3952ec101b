/**
 * What a mail says, as pure functions: what changed, and the account of an hour. The subject has its fact first, for a
 * phone's lock screen. Tables and inline styles alone, for mail programs drop style sheets, scripts and remote pictures;
 * `html` escapes whatever is put into it. Of any number of senders a mail stays small: what is wrong in full up to a
 * bound, the good ones counted, all of them in an attached table.
 */
import { hostname } from "node:os";
import { html } from "hono/html";
import {
  commandOf,
  DAY,
  formatBytes,
  formatDuration,
  formatLocalTime,
  formatZone,
  HOUR,
  localZone,
  MINUTE,
  VERSION,
} from "../service.ts";
import type { Mute } from "../signs.ts";
import { count, formatClock, formatCount, sentence } from "../status.ts";
import type { HourRow, HourSummary } from "./summary.ts";

/** How a subject is: of a sender as the page has it, the worst first; `fault` for what is no sender's. */
export const STATUSES = ["fault", "silent", "never", "waiting", "gone", "quiet", "ok"] as const;
export type Status = (typeof STATUSES)[number];

/** One fact of an alert. `lasted` is the length of the outage in milliseconds. */
export interface Change {
  kind: "opened" | "over" | "reminder" | "flapping" | "steady" | "lost" | "note";
  title: string;
  text: string;
  status: Status;
  sender: boolean;
  /** When it began; of what is over when that began. */
  since: number;
  lasted?: number;
  bytes?: number;
  next?: string[];
}

/** What changed, how the senders are, and what is wrong beside that. */
export interface Alert {
  at: number;
  changes: Change[];
  counts: Partial<Record<Status, number>>;
  standing: string[];
}

export interface MailText {
  subject: string;
  html: string;
  text: string;
  attachment?: { filename: string; content: string };
}

interface Around {
  page?: string | undefined;
}

type Html = ReturnType<typeof html>;

/** Names in the subject, and in a line of a mail. */
const NAMES = 3;
const NAMES_IN_TEXT = 20;
/** A fault's part of the subject, in characters: a lock screen shows no more. */
const SUBJECT_LENGTH = 90;
/** So many facts or senders are told one by one. */
const FACTS = 30;
const ROWS = 40;
const CURVE_PX = 48;

/** Those of the status page: each keeps WCAG's 4.5:1, as text on white and under white text. */
const COLOR = {
  good: "#116b3c",
  bad: "#b42318",
  warn: "#8a4b00",
  ink: "#1c2128",
  faint: "#57606a",
  line: "#e3e8ed",
  curve: "#2f6fb3",
};

// ---- what changed

/** The mail of what changed: one line per fact, faults before recoveries. */
export function renderAlert(alert: Alert, around: Around = {}): MailText {
  const { at, counts, standing } = alert;
  const facts = [...alert.changes].sort((a, b) => Number(isGood(a)) - Number(isGood(b)));
  const subject = alertSubject(facts, counts);
  const groups = groupFacts(facts).slice(0, FACTS);
  const told = groups.reduce((sum, group) => sum + group.length, 0);
  const others = facts.length - told;
  const more = others > 0 ? [`and ${others} more changes: ${commandOf("monitor")} --status`] : [];
  const states = STATUSES.flatMap((status) =>
    counts[status] ? `${counts[status]} ${STATUS_TEXT[status]}` : [],
  );
  const rest = [
    states.length > 0 ? `Senders now: ${states.join(", ")}.` : "",
    standing.length > 0 ? `Also wrong: ${standing.join("; ")}.` : "",
  ].filter((text) => text !== "");
  const next = nextOf(facts);
  if (next.length === 0 && standing.length > 0) next.push(`${commandOf("monitor")} --status`);
  const allGood = facts.every(isGood);
  const color = !allGood ? COLOR.bad : standing.length > 0 ? COLOR.warn : COLOR.good;
  const rows = groups.map((group) => {
    const [first] = group as [Change];
    const flaps = first.kind === "flapping" || stillFlaps(first);
    return factRow(
      groups.length > 1 && groupTitle(group, at), // one alone is the mail's title
      groupText(group, at),
      isGood(first) ? COLOR.good : flaps ? COLOR.warn : COLOR.bad,
    );
  });
  const body = html`<table width="100%" cellpadding="0" cellspacing="0" role="presentation" style="table-layout:fixed;overflow-wrap:anywhere">${rows}</table>
${[...more, ...rest].map(paragraph)}${nextBlock(next, around)}`;
  const lines = groups.map((group) => `* ${groupTitle(group, at)}\n  ${groupText(group, at)}`);
  const [only = []] = groups;
  return {
    subject,
    html: frame(groups.length > 1 ? subject : groupTitle(only, at), formatTime(at), color, body),
    text: `${[...lines, ...more].join("\n")}\n\n${rest.join("\n")}\n${nextText(next)}\n${pageLine(around)}${formatTime(at)}\n${footer()}\n`,
  };
}

/** Commands that fit what is told: the first one of each fact before the second ones. */
function nextOf(facts: Change[]): string[] {
  const all = facts.map((fact) => (isGood(fact) && fact.kind !== "note" ? [] : (fact.next ?? [])));
  const inTurn = Array.from({ length: NAMES }, (_, i) => all.flatMap((next) => next[i] ?? [])).flat();
  return [...new Set(inTurn)].slice(0, NAMES);
}

const STATUS_TEXT: Record<Status, string> = {
  ok: "ok",
  quiet: "quiet",
  silent: "silent",
  never: "never seen",
  waiting: "waiting (their receiver is down or has just started)",
  gone: "gone",
  fault: "at fault",
};

/** Whether a change ends something rather than begins it. */
export function isGood({ kind, status }: Change): boolean {
  return kind === "over" || kind === "note" || (kind === "steady" && status === "ok") || status === "gone";
}

/** Facts that say the same of many senders are one. */
function groupFacts(facts: Change[]): Change[][] {
  const groups = Map.groupBy(facts, ({ sender, kind, status, lasted }, i) =>
    sender && kind !== "lost" ? `${kind} ${status} ${lasted === undefined}` : `${i}`,
  );
  return [...groups.values()].flatMap((group) =>
    group.length > NAMES ? [group] : group.map((fact) => [fact]),
  );
}

function groupTitle(group: Change[], at: number): string {
  const [first] = group as [Change];
  return group.length === 1 ? titleOf(first, at) : `${group.length} senders ${inAWord(first)}`;
}

function groupText(group: Change[], at: number): string {
  const [first] = group as [Change];
  if (group.length === 1) return detailsOf(first, at);
  const text = group.every((one) => one.text === first.text) ? first.text : "";
  const times = group.map(({ since }) => since);
  const [from, to] = [Math.min(...times), Math.max(...times)];
  const when =
    first.status === "never"
      ? ""
      : from === to
        ? ` Since ${formatTime(from)}.`
        : ` Since ${formatTime(from)} to ${formatTime(to)}.`;
  return `${listNames(titlesOf(group), NAMES_IN_TEXT)}.${first.kind === "over" ? "" : when} ${reason({ ...first, text }, 1)}`.trim();
}

const titlesOf = (group: Change[]) => group.map(({ title }) => title);

function alertSubject(facts: Change[], counts: Partial<Record<Status, number>>): string {
  const groups = Map.groupBy(
    facts,
    ({ sender, kind, status, title }) => `${kind} ${sender ? status : title}`,
  );
  const all = Object.values(counts).reduce((sum, n) => sum + n, 0);
  const parts = [...groups.values()].map((group) => {
    const [only] = group as [Change];
    if (group.length === 1) return groups.size === 1 ? oneLine(only) : titleOf(only, only.since);
    const everyone = group.length === all && only.status === "silent" && only.kind === "opened";
    if (everyone) return `All ${all} senders silent: ${only.text || "receiver or network down?"}`;
    return `${group.length} senders ${inAWord(only)}: ${listNames(titlesOf(group))}`;
  });
  return parts.length <= 2 ? parts.join("; ") : `${parts[0]}; ${parts[1]}; and ${parts.length - 2} more`;
}

/** A fact in the subject: a fault with the beginning of what it says. */
function oneLine(change: Change): string {
  const { sender, kind, text, since } = change;
  const title = titleOf(change, since);
  if (sender || text === "" || (kind !== "opened" && kind !== "reminder")) return title;
  const line = `${title}: ${text.replace(/\s+/g, " ")}`;
  return line.length <= SUBJECT_LENGTH ? line : `${line.slice(0, SUBJECT_LENGTH - 1)}…`;
}

function inAWord(change: Change): string {
  if (change.kind === "over") return change.lasted === undefined ? "heard for the first time" : "back";
  if (change.kind === "lost") return "lost bytes";
  if (change.kind === "flapping") return "flapping";
  if (change.kind === "steady") return "steady again";
  if (stillFlaps(change)) return "still flapping";
  return `${change.kind === "reminder" ? "still " : ""}${STATUS_TEXT[change.status]}`;
}

function titleOf(change: Change, now: number): string {
  const { kind, title, status, sender, since, lasted, bytes = 0 } = change;
  if (stillFlaps(change)) return `${sender ? title : sentence(title)} is still flapping`;
  if (kind === "note") return sentence(title);
  if (kind === "lost") return `${title} lost ${formatBytes(bytes)}`;
  if (kind === "flapping") return sender ? `${title} is flapping` : `Flapping: ${title}`;
  if (kind === "steady")
    return sender ? `${title} is steady again: ${STATUS_TEXT[status]}` : `Steady again: ${title}`;
  if (kind === "over") {
    if (!sender) return `Over: ${title}, lasted ${formatDuration(lasted ?? 0)}`;
    return lasted === undefined
      ? `${title} is heard for the first time`
      : `${title} back after ${formatDuration(lasted)}`;
  }
  const still = kind === "reminder" ? "still " : "";
  if (!sender) return still ? `Still: ${title}` : sentence(title);
  if (status === "never") return `${title} ${still}never seen`;
  if (status === "gone") return `${title} is gone: silent for a day, not expected`;
  const days = kind === "reminder" && now - since >= DAY ? `, for ${formatDuration(now - since)}` : "";
  return `${title} ${still}${STATUS_TEXT[status]} since ${formatClock(since, now)}${days}`;
}

/** A reminder of what is well at the moment: it is of the flapping. */
function stillFlaps({ kind, status }: Change): boolean {
  return kind === "reminder" && status === "ok";
}

function detailsOf(change: Change, at: number): string {
  const { kind, status, sender, since, text } = change;
  const ago =
    at - since < MINUTE ? formatTime(since) : `${formatTime(since)}, ${formatDuration(at - since)} ago`;
  if (kind === "lost") return text;
  if (kind === "flapping" || stillFlaps(change))
    return "It keeps changing. No mail for each change until it has been steady for half an hour.";
  if (kind === "note") return text;
  if (!sender) return kind === "over" ? `It began ${formatTime(since)}.` : `${text}. Noticed ${ago}.`;
  if (kind === "over") return reason(change);
  if (kind === "steady") return `No change for half an hour. Since ${ago}.`;
  if (status === "silent") return `Nothing was heard from its shipper since ${ago}. ${reason(change)}`;
  if (status === "quiet") return `Its shipper is alive, but nginx wrote no line since ${ago}.`;
  if (status === "never") return reason(change);
  return `Last heard ${ago}. ${reason(change)}`;
}

/** What it means, of one sender and of several. */
const MEANINGS = {
  over: [
    "Its shipper is heard again; what it kept meanwhile is on its way.",
    "Their shippers are heard again; what they kept meanwhile is on its way.",
  ],
  silent: [
    "Its shipper, its host or the network is down.",
    "Their shippers, their hosts or the network are down.",
  ],
  kept: ["Nothing is lost while its log files stay.", "Nothing is lost while their log files stay."],
  never: [
    "It is expected, and its shipper never reached the receiver.",
    "They are expected, and their shippers never reached the receiver.",
  ],
  gone: [
    "It is not watched any more; when it comes back, that is told.",
    "They are not watched any more; when one comes back, that is told.",
  ],
} as const;

/** What it means, and what is behind it; `of` is 1 for several senders. */
function reason({ kind, status, text }: Change, of: 0 | 1 = 0): string {
  const known = text === "" ? "" : `${sentence(text)}.`;
  if (kind === "over") return MEANINGS.over[of];
  if (status === "silent") return `${known || MEANINGS.silent[of]} ${MEANINGS.kept[of]}`;
  if (status === "never") return `${MEANINGS.never[of]} ${known}`.trim();
  if (status === "gone") return MEANINGS.gone[of];
  return known;
}

// ---- the account of an hour

/** What a summary says beside its numbers. `zone`: of its hour's name, minutes east of UTC. */
export interface SummaryAround extends Around {
  zone: number;
  /** What is wrong now, and commands that fit it. */
  problems: string[];
  next?: string[];
  mutes: Record<string, Mute>;
  digest?: { name: string; sha256: string } | undefined;
}

export function renderSummary(summary: HourSummary, around: SummaryAround): MailText {
  const { total, rows, vanished } = summary;
  const { day, hour } = hourName(summary.hourEnd, around.zone);
  const troubles = summaryTroubles(summary);
  const isEmpty = total.received.lines + total.open.lines === 0;
  const title =
    troubles.length > 0
      ? sentence(troubles.join(", "))
      : isEmpty
        ? "No lines from any sender"
        : "All delivered";
  const bad = total.failed.files + total.missing.files + vanished.length + total.since.lost > 0;
  const color = bad ? COLOR.bad : troubles.length > 0 || isEmpty ? COLOR.warn : COLOR.good;
  const sorted = [...rows].sort((a, b) => rank(a) - rank(b)); // what is wrong first
  const shown = rows.length <= ROWS ? sorted : sorted.filter((row) => rank(row) < 2).slice(0, ROWS);
  const others = othersText(sorted.slice(shown.length), rows.length);
  const isWell = troubles.length + around.problems.length === 0 && !isEmpty;
  const next = isWell ? [] : [...(around.next ?? []).slice(0, NAMES - 1), `${commandOf("monitor")} --status`];
  const facts = [reconciliation(summary), ...remarks(summary, around)];
  const body = html`${heading("Lines")}${figures(summary)}
${heading("Lines per hour, last 24 hours")}${curve(summary, around.zone)}
${heading(shown.length > 0 ? "Senders, delivered of received" : "Senders")}<table width="100%" cellpadding="0" cellspacing="0" role="presentation">${shown.map((row) => hostRow(row))}</table>
${[others, ...facts].filter((text) => text !== "").map(paragraph)}${nextBlock(next, around)}`;
  return {
    subject: `${hour} ${count(total.received.lines, "line")}, ${troubles.length > 0 ? troubles.join(", ") : isEmpty ? "none from any sender" : "all delivered"}`,
    html: frame(title, `${day}, ${hour} ${zoneName(around.zone)}`, color, body),
    text: `${day} ${hour} ${zoneName(around.zone)}: ${title}\n\n${[...textTable(shown), ...(others ? [others] : [])].join("\n")}\n\n${facts.join("\n")}\n${nextText(next)}\n${pageLine(around)}${footer()}\n`,
    ...(rows.length > shown.length && {
      attachment: { filename: `senders-${day}-${hour.slice(0, 2)}.csv`, content: csvOf(sorted) },
    }),
  };
}

function summaryTroubles({ total, rows, vanished, unreadable }: HourSummary): string[] {
  const inState = (state: HourRow["state"]) => rows.filter((row) => row.state === state).length;
  const tell = (one: string, many: string, troubles: [number, string][]) =>
    troubles
      .filter(([n]) => n > 0)
      .map(([n, what], i) => `${i === 0 ? count(n, one, many) : formatCount(n)} ${what}`);
  const files: [number, string][] = [
    [total.failed.files, "failed"],
    [total.missing.files + vanished.length, "missing"],
    [total.differs, "with other counts"],
    [total.waiting.files, "waiting"],
  ];
  return [
    ...(total.since.lost > 0 ? [`${formatBytes(total.since.lost)} lost`] : []),
    ...tell("file", "files", files),
    ...tell("sender", "senders", [
      [inState("silent"), "silent"],
      [inState("incomplete"), "incomplete"],
    ]),
    ...tell("file or folder", "files or folders", [[unreadable.length, "unreadable"]]),
  ];
}

function figures({ total }: HourSummary): Html {
  const cells = [
    ["received", total.received, COLOR.ink],
    ["delivered", total.delivered, COLOR.good],
    ["waiting", total.waiting, total.waiting.files > 0 ? COLOR.warn : COLOR.faint],
    ["failed", total.failed, total.failed.files > 0 ? COLOR.bad : COLOR.faint],
  ] as const;
  const cell = ([name, { lines, files }, color]: (typeof cells)[number]) =>
    html`<td width="50%" style="padding:2px 14px 8px"><div style="font-size:18px;font-weight:bold;color:${color}">${formatCount(lines)}</div>
<div style="font-size:12px;color:${COLOR.faint}">${name} in ${count(files, "file")}</div></td>`;
  return html`<table width="100%" cellpadding="0" cellspacing="0" role="presentation"><tr>${cells.slice(0, 2).map(cell)}</tr><tr>${cells.slice(2).map(cell)}</tr></table>`;
}

function curve({ curve: hours, hourEnd }: HourSummary, zone: number): Html {
  const tallest = Math.max(0, ...hours);
  const most = Math.max(1, tallest);
  const bars = hours.map((lines, i) => {
    const height = lines > 0 ? Math.max(2, Math.round((CURVE_PX * lines) / most)) : 1;
    const color = lines === 0 ? COLOR.line : i === hours.length - 1 ? COLOR.curve : "#8c959f";
    return html`<td valign="bottom" style="padding:0 1px;height:${CURVE_PX}px;vertical-align:bottom"><div style="height:${height}px;line-height:1px;font-size:1px;background:${color}">&nbsp;</div></td>`;
  });
  const labels = [0, 6, 12, 18].map((i) => {
    const { hour } = hourName(hourEnd - (hours.length - 1 - i) * HOUR, zone);
    return html`<td colspan="6" style="padding:2px 1px;font-size:11px;color:${COLOR.faint}">${hour.slice(0, 5)}</td>`;
  });
  return html`<div style="padding:0 14px"><table width="100%" cellpadding="0" cellspacing="0" role="presentation" style="table-layout:fixed"><tr>${bars}</tr><tr>${labels}</tr></table>
<div style="font-size:11px;color:${COLOR.faint}">tallest bar: ${count(tallest, "line")}</div></div>`;
}

function hostRow(row: HourRow): Html {
  const { received, delivered, waiting } = row;
  const percentOf = ({ lines }: { lines: number }) => Math.round((100 * lines) / Math.max(1, received.lines));
  const [done, waits] = [percentOf(delivered), percentOf(waiting)];
  const { text, color } = hostState(row);
  const part = (percent: number, background: string) =>
    percent > 0 &&
    html`<td width="${percent}%" style="height:5px;background:${background};font-size:1px">&nbsp;</td>`;
  const isEmpty = received.lines === 0;
  return html`<tr><td style="padding:9px 14px;border-bottom:1px solid ${COLOR.line}">
<table width="100%" cellpadding="0" cellspacing="0" role="presentation"><tr>
<td style="font-size:${row.host.length > 24 ? 12 : 14}px;color:${COLOR.ink};font-weight:bold;overflow-wrap:anywhere">${row.host}</td>
<td align="right" style="color:${COLOR.ink};white-space:nowrap">${count(received.lines, "line")}</td></tr>
<tr><td style="font-size:12px;color:${color}">${text}</td>
<td align="right" style="padding-left:10px;font-size:12px;color:${COLOR.faint};white-space:nowrap">${count(received.files, "file")} · ${formatBytes(received.bytes)}</td></tr></table>
<table width="100%" cellpadding="0" cellspacing="0" role="presentation" style="margin-top:6px"><tr>${part(done, COLOR.good)}${part(waits, COLOR.warn)}${part(100 - done - waits, isEmpty ? COLOR.line : COLOR.bad)}</tr></table></td></tr>`;
}

/** 0 for what is bad, 1 for what may still become well, 2 for what is well. */
function rank(row: HourRow): number {
  const { color } = hostState(row);
  return color === COLOR.bad ? 0 : color === COLOR.warn ? 1 : 2;
}

function hostState(row: HourRow): { text: string; color: string } {
  const parts: string[] = [];
  if (row.since.lost > 0) parts.push(`${formatBytes(row.since.lost)} lost`);
  const files = (n: number, what: string) => n > 0 && parts.push(`${count(n, "file")} ${what}`);
  files(row.failed.files, "failed");
  files(row.missing.files, "missing");
  files(row.differs, "with another count");
  const bad = parts.length > 0;
  files(row.waiting.files, "waiting");
  if (row.state !== "complete") parts.push(row.state);
  const warn = parts.length > 0;
  if (!warn) parts.push(row.received.files > 0 ? "complete, delivered" : "complete, no lines");
  if (row.late > 0) parts.push(count(row.late, "late part"));
  if (row.since.skipped > 0) parts.push(`${count(row.since.skipped, "line")} skipped`);
  return { text: parts.join(" · "), color: bad ? COLOR.bad : warn ? COLOR.warn : COLOR.good };
}

/** Senders that are not shown one by one. */
function othersText(rows: HourRow[], all: number): string {
  if (rows.length === 0) return "";
  const good = rows.filter((row) => rank(row) === 2);
  const rest = rows.length - good.length;
  const lines = formatCount(good.reduce((sum, { received }) => sum + received.lines, 0));
  const more = rest > 0 ? `${count(rest, "more sender has", "more senders have")} trouble, and ` : "";
  return sentence(
    `${more}${count(good.length, "sender is", "senders are")} well with ${lines} lines. All ${formatCount(all)} senders are in the attached table.`,
  );
}

/** The sum that must come out: what was read is delivered, left out by rules, waits, failed, or is missing. */
function reconciliation({ total }: HourSummary): string {
  const { received, delivered, waiting, failed, missing, open, since } = total;
  const n = formatCount;
  const parts = [
    `${n(delivered.lines)} delivered`,
    `${n(since.skipped)} skipped`,
    `${n(waiting.lines)} waiting`,
    `${n(failed.lines)} failed`,
  ];
  if (missing.files > 0) parts.push(`${n(missing.lines)} missing`);
  const more =
    open.files > 0
      ? ` ${count(open.lines, "line is", "lines are")} in batches that still take lines: in a later account.`
      : "";
  return `${count(received.lines + since.skipped, "line")} read = ${parts.join(" + ")}.${more}`;
}

function remarks(
  { total, vanished, unreadable, hourEnd }: HourSummary,
  { problems, mutes, digest, zone }: SummaryAround,
): string[] {
  const { late, since } = total;
  const here = zoneName(localZone(hourEnd));
  const times = here === zoneName(zone) ? "" : `, times in ${here}`;
  const gone = vanished.map(({ name, lines }) => `${name} (${count(lines, "line")})`);
  return [
    late > 0 ? `${count(late, "of the files is a late part", "of the files are late parts")}.` : "",
    since.untimed > 0 ? `${count(since.untimed, "line has", "lines have")} no timestamp.` : "",
    since.ahead > 0 ? `${count(since.ahead, "line is", "lines are")} of a clock that is ahead.` : "",
    gone.length > 0
      ? `Missing since an earlier account, neither here nor delivered: ${listNames(gone, NAMES_IN_TEXT)}.`
      : "",
    unreadable.length > 0 ? `Not read: ${listNames(unreadable, NAMES)}.` : "",
    problems.length > 0 ? `Wrong now${times}: ${problems.slice(0, NAMES_IN_TEXT).join("; ")}.` : "",
    ...Object.entries(mutes).map(
      ([host, { until, by, reason: why }]) =>
        `Muted until ${formatTime(until)}: ${host === "*" ? "all senders" : host}, by ${by}${why ? `: ${why}` : ""}.`,
    ),
    digest ? `Newest digest: ${digest.name}, sha256 ${digest.sha256}.` : "",
  ].filter((text) => text !== "");
}

function textTable(rows: HourRow[]): string[] {
  if (rows.length === 0) return [];
  const width = Math.max(6, ...rows.map(({ host }) => host.length));
  const line = (host: string, lines: string, files: string, bytes: string, text: string) =>
    `${host.padEnd(width)}  ${lines.padStart(12)}  ${files.padStart(5)}  ${bytes.padStart(10)}  ${text}`;
  const body = rows.map((row) => {
    const { lines, files, bytes } = row.received;
    return line(row.host, formatCount(lines), String(files), formatBytes(bytes), hostState(row).text);
  });
  return [line("sender", "lines", "files", "bytes", "state"), ...body];
}

/** All senders, for a spreadsheet; names and words hold no separators. */
function csvOf(rows: HourRow[]): string {
  const heads =
    "sender,state,read,skipped,received,delivered,waiting,failed,missing,open,files,bytes,lost_bytes,last_heard";
  const body = rows.map((row) =>
    [
      ...[row.host, row.state, row.received.lines + row.since.skipped, row.since.skipped],
      ...[row.received, row.delivered, row.waiting, row.failed, row.missing, row.open].map(
        ({ lines }) => lines,
      ),
      ...[row.received.files, row.received.bytes, row.since.lost],
      row.heardAt > 0 ? new Date(row.heardAt).toISOString() : "",
    ].join(","),
  );
  return `${[heads, ...body].join("\r\n")}\r\n`;
}

// ---- what all mails share

function frame(title: string, subtitle: string, color: string, body: Html): string {
  return String(html`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light"><title>${title}</title></head>
<body style="margin:0;padding:0;background:#f2f5f7"><div role="main">
<table width="100%" cellpadding="0" cellspacing="0" role="presentation" style="background:#f2f5f7"><tr><td align="center" style="padding:12px">
<table width="100%" cellpadding="0" cellspacing="0" role="presentation" style="max-width:600px;table-layout:fixed;overflow-wrap:anywhere;background:#ffffff;font-family:Helvetica,Arial,sans-serif;font-size:14px;line-height:1.4;text-align:left">
<tr><td style="padding:14px;background:${color};color:#ffffff"><h1 style="margin:0;font-size:18px;line-height:1.4;font-weight:bold">${title}</h1>
<div style="font-size:13px">${subtitle}</div></td></tr>
<tr><td style="padding:0 0 10px">${body}</td></tr></table>
<div style="padding:10px;font-family:Helvetica,Arial,sans-serif;font-size:11px;color:${COLOR.faint}">${footer()}</div>
</td></tr></table></div></body></html>
`);
}

function factRow(title: string | false, text: string, color: string): Html {
  return html`<tr><td style="padding:12px 14px;border-left:4px solid ${color};border-bottom:1px solid ${COLOR.line}">
${title && html`<div style="padding-bottom:3px;font-size:16px;font-weight:bold;color:${COLOR.ink}">${title}</div>`}
<div style="color:${COLOR.faint}">${text}</div></td></tr>`;
}

function heading(text: string): Html {
  return html`<h2 style="margin:0;padding:12px 14px 6px;font-size:12px;font-weight:bold;color:${COLOR.faint}">${text}</h2>`;
}

function paragraph(text: string): Html {
  return html`<p style="margin:12px 14px 0;color:${COLOR.faint};overflow-wrap:anywhere">${text}</p>`;
}

/** What to do now, and where to look. */
function nextBlock(next: string[], { page }: Around): Html {
  const command = (text: string) =>
    html`<div style="margin-top:4px;padding:6px 8px;background:#f2f5f7;color:${COLOR.ink};font-family:Menlo,Consolas,monospace;font-size:12px;overflow-wrap:anywhere">${text.split(" ").map((word) => html`<span style="display:inline-block;max-width:100%">${word}</span> `)}</div>`; // none breaks at a hyphen
  return html`${next.length > 0 && html`${heading("What to do now")}<div style="padding:0 14px">${next.map(command)}</div>`}${page && html`<p style="margin:12px 14px 0"><a href="${page}" style="color:#0b5cad">${page}</a></p>`}`;
}

function nextText(next: string[]): string {
  return next.length > 0 ? `\nWhat to do now:\n${next.map((command) => `  ${command}`).join("\n")}\n` : "";
}

function pageLine({ page }: Around): string {
  return page ? `${page}\n` : "";
}

function footer(): string {
  return `Log-RT-Sync ${VERSION} on ${hostname()}`;
}

/** `a, b, c and 7 more`. */
export function listNames(names: string[], most = NAMES): string {
  const more = names.length - most;
  return names.slice(0, most).join(", ") + (more > 0 ? ` and ${formatCount(more)} more` : "");
}

/** `2026-11-22 06:12 +01:00` of this machine's clock. */
export function formatTime(at: number): string {
  return `${formatLocalTime(at).slice(0, 16)} ${zoneName(localZone(at))}`;
}

/** `+06:00`, `UTC`. */
function zoneName(minutes: number): string {
  return minutes === 0 ? "UTC" : formatZone(minutes);
}

/** `06:00–07:00` and its day, of the hour that ended then. */
function hourName(end: number, zone: number): { day: string; hour: string } {
  const wall = (at: number) => new Date(at + zone * MINUTE).toISOString();
  const [from, to] = [wall(end - HOUR), wall(end)];
  return { day: from.slice(0, 10), hour: `${from.slice(11, 16)}–${to.slice(11, 16)}` };
}
