/** The mail of what changed, as a pure function; the subject has its fact first, for a phone's lock screen. */

import type { Change, Notice, Status } from "../notice.ts";
import { formatBytes, formatDuration } from "../service.ts";
import { COLOR, escapeHtml, footer, formatClock, formatTime, type MailText, page } from "./mailpage.ts";

/** Beyond so many names a list says how many more there are. */
const NAMES = 3;
/** A fault's part of the subject, in characters: a lock screen shows no more. */
const SUBJECT_LENGTH = 90;

/** The mail of what changed: one line per fact, faults before recoveries. */
export function renderAlert({ changes, counts, at }: Extract<Notice, { kind: "alert" }>): MailText {
  const facts = [...changes].sort((a, b) => Number(isGood(a)) - Number(isGood(b)));
  const subject = alertSubject(facts, counts);
  const standing = Object.entries(counts).map(([status, n]) => `${n} ${STATUS_TEXT[status as Status]}`);
  const senders = standing.length > 0 ? `Senders now: ${standing.join(", ")}.` : "";
  const rows = facts.map((change) => {
    const flaps = change.kind === "flapping" || stillFlaps(change);
    const color = isGood(change) ? COLOR.good : flaps ? COLOR.warn : COLOR.bad;
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
  if (change && stillFlaps(change)) return "still flapping";
  return `${change?.kind === "reminder" ? "still " : ""}${STATUS_TEXT[change?.status ?? "ok"]}`;
}

function headline(change: Change): string {
  const { kind, title, status, sender, since, lasted, bytes = 0 } = change;
  const clock = formatClock(since);
  if (stillFlaps(change)) return `${title} is still flapping`;
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

/** A reminder of what is well at the moment: it is of the flapping. */
function stillFlaps({ kind, status }: Change): boolean {
  return kind === "reminder" && status === "ok";
}

function explain(change: Change, at: number): string {
  const { kind, status, sender, since, text } = change;
  const ago = `${formatTime(since)}, ${formatDuration(at - since)} ago`;
  if (kind === "lost")
    return "They vanished from the sender's disk unread: deleted or truncated, with no copy left.";
  if (kind === "flapping" || stillFlaps(change))
    return "It goes and comes. No mail for each change until it has been steady for half an hour.";
  if (kind === "note") return text;
  if (!sender) return kind === "over" ? `It began ${ago}.` : `${text}. Noticed ${ago}.`;
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
