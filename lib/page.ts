/**
 * The status page as HTML: answers "is everything arriving, and is everything delivered?" at a glance. One
 * document with nothing beside it: no build step, no external resource, usable without its script.
 *
 * Every value goes through the `html` tag, which escapes it: there is no other way into the page. The style
 * and the script are constants, and the Content-Security-Policy permits just these two by their hashes.
 */
import { createHash } from "node:crypto";
import { Html, html } from "./html.ts";
import { REFRESH_SECONDS, SCRIPT, STYLE } from "./page-assets.ts";
import { formatBytes, formatDuration } from "./service.ts";
import {
  count,
  formatClock,
  type HostState,
  type HostStatus,
  headline,
  inState,
  type Problem,
  type Snapshot,
  sentence,
  sum,
} from "./status.ts";

/** Rows of one page; senders beyond it are counted, not listed. */
const MAX_ROWS = 500;
/** Links to the senders of one problem. */
const MAX_LINKS = 6;
/** Names up to this length, that of any IPv4 address, fit on one line. */
const MAX_UNBROKEN = 15;
/** Points of a sender's curve; the curve of all has one per minute. */
const ROW_POINTS = 48;
/** "Now" in lines per minute is the mean of so many minutes. */
const NOW_MINUTES = 5;

/** The response headers that the page needs. */
export const pageHeaders: Record<string, string> = {
  "Content-Type": "text/html; charset=utf-8",
  "Content-Security-Policy": [
    "default-src 'none'",
    `style-src '${hash(STYLE)}'`,
    `script-src '${hash(SCRIPT)}'`,
    "img-src data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
  ].join("; "),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-store",
};

/** How each state is called; the worst come first in the table. */
const STATES: Record<HostState, { text: string; meaning: string; mark: string }> = {
  silent: { text: "silent", meaning: "not heard for longer than its threshold", mark: "bad" },
  never: { text: "never seen", meaning: "expected, has not sent yet", mark: "ask" },
  waiting: {
    text: "waiting",
    meaning: "not heard since its receiver started, or while that is down",
    mark: "ask",
  },
  gone: { text: "gone", meaning: "silent for a day and not expected, or only batches are left", mark: "off" },
  quiet: { text: "quiet", meaning: "alive, sends no lines", mark: "off" },
  ok: { text: "ok", meaning: "lines come", mark: "ok" },
};
type Verdict = "ok" | "bad" | "off";
const ORDER = Object.keys(STATES) as HostState[];

/** The whole page. */
export function renderPage(status: Snapshot): string {
  const { problems } = status;
  const title = headline(status);
  const mark = problems.length > 0 ? "bad" : inState(status.hosts, "ok").length > 0 ? "ok" : "off";
  const page = html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>${title} · ${status.server} · Log-RT-Sync</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="robots" content="noindex">
<noscript><meta http-equiv="refresh" content="30"></noscript>
<link rel="icon" href="${icon(mark)}">
<style>${new Html(STYLE)}</style>
</head>
<body>
${SYMBOLS}
<header><p class="name">Log-RT-Sync on ${status.server}</p><button id="pause" type="button" aria-pressed="false" hidden>Pause</button></header>
<p id="stale" role="alert" hidden></p>
<main data-at="${formatClock(status.now, status.now)}">
${renderVerdict(status, title, mark, problems)}
${renderLegs(status, problems)}
${renderHosts(status)}
${renderAbout(status)}
</main>
<script type="module">${new Html(SCRIPT)}</script>
</body>
</html>
`;
  return page.text;
}

function renderVerdict({ now }: Snapshot, title: string, mark: Verdict, problems: Problem[]): Html {
  return html`<section class="verdict ${mark}" aria-label="Verdict">
<div role="status"><h1>${symbol(mark)}${title}</h1></div>
${problems.length > 0 && html`<ul>${problems.map((problem) => renderProblem(problem, problems.length))}</ul>`}
<p class="at">State of <time datetime="${new Date(now).toISOString()}">${FULL_TIME.format(now)}</time></p>
</section>`;
}

/** What is behind the headline; the first few senders alone, the table shows the others. */
function renderProblem({ key, title, text, hosts, next = [] }: Problem, of: number): Html {
  const links = hosts.slice(0, MAX_LINKS).map((host) => {
    const href = `#${encodeURIComponent(anchor(host))}`;
    return html`<a id="${key}-${host}" href="${href}">${host}</a> `;
  });
  const more = hosts.length > MAX_LINKS && `and ${hosts.length - MAX_LINKS} more`;
  const command = next[0] && html` <code>${next[0]}</code>`;
  return html`<li>${of > 1 && `${sentence(title)}: `}${links}${more}${links.length > 0 && " – "}${text}${command}</li>`;
}

/** The two questions and the disk, each with its numbers. */
function renderLegs(status: Snapshot, problems: Problem[]): Html {
  const { hosts, disk, forwarder } = status;
  const fails = (leg: Problem["leg"]) => problems.some((problem) => problem.leg === leg);
  const sends = inState(hosts, "ok").length > 0;
  return html`<div class="legs">
${leg(fails("arrival") ? "bad" : sends ? "ok" : "off", ["Lines arrive", "Not everything arrives", "No lines come"], renderArrival(hosts))}
${leg(fails("delivery") ? "bad" : forwarder ? "ok" : "off", ["Batches are delivered", "Not everything is delivered", "No forwarder has run here yet"], renderDelivery(status))}
${leg(fails("disk") ? "bad" : disk ? "ok" : "off", ["Disk has room", "Disk is nearly full", "Disk cannot be asked"], disk && renderDisk(disk))}
</div>`;
}

function leg(mark: Verdict, [ok, bad, off]: [string, string, string], content: Html | undefined): Html {
  return html`<section class="leg ${mark}"><h2>${symbol(mark)}${{ ok, bad, off }[mark]}</h2>${content}</section>`;
}

function renderArrival(hosts: HostStatus[]): Html {
  const sending = inState(hosts, "ok").length + inState(hosts, "quiet").length;
  const senders = hosts.length - inState(hosts, "gone").length;
  const perMinute = addCurves(hosts);
  const hours = `${perMinute.length / 60} hours`;
  const lost = sum(hosts, "lost");
  return html`<dl>${figure("Senders", `${number(sending)} of ${number(senders)}`)}${figure("Lines per minute", number(latest(perMinute)))}
${figure("Lag", formatBytes(sum(hosts, "lag")))}${lost > 0 && figure("Bytes lost", formatBytes(lost))}</dl>
${
  perMinute.length > 0 &&
  html`${curve(perMinute, { kind: "curve", height: 96, label: `Lines per minute of all senders, last ${hours}` })}
<p class="axis" aria-hidden="true"><span>${hours} ago</span><span>peak ${number(Math.max(...perMinute))}</span><span>now</span></p>`
}`;
}

function renderDelivery({ hosts, forwarder, now }: Snapshot): Html {
  return html`<dl>${figure("Open", number(sum(hosts, "open")))}${figure("Waiting", number(sum(hosts, "waiting")))}
${figure("Failed", number(sum(hosts, "failed")))}</dl>
${forwarder && html`<p>Last delivery ${clock(forwarder.lastSentAt ?? 0, now)}, forwarder seen ${clock(forwarder.aliveAt, now)}.</p>`}`;
}

function renderDisk({ free, total }: { free: number; total: number }): Html {
  const percent = Math.round(100 - (100 * free) / total);
  return html`<dl>${figure("Free", formatBytes(free))}${figure("Of", formatBytes(total))}</dl>
<svg class="bar" viewBox="0 0 100 1" preserveAspectRatio="none" aria-hidden="true"><rect width="${percent}" height="1"/></svg>
<p>${percent} % used</p>`;
}

function figure(name: string, value: string): Html {
  return html`<div><dt>${name}</dt><dd>${value}</dd></div>`;
}

/** One row per sender, the worst first. */
function renderHosts({ hosts, now, problems }: Snapshot): Html {
  if (hosts.length === 0) {
    return html`<section class="hosts"><h2>Senders</h2><p class="hint">Start a shipper whose config names this receiver: its host appears here.</p></section>`;
  }
  const natural = new Intl.Collator("en", { numeric: true });
  const late = new Set(problems.find(({ key }) => key === "late")?.hosts);
  const trouble = (host: HostStatus) => Number(host.failed === 0 && host.lost === 0);
  const sorted = hosts.toSorted(
    (a, b) =>
      ORDER.indexOf(a.state) - ORDER.indexOf(b.state) ||
      trouble(a) - trouble(b) ||
      natural.compare(a.host, b.host),
  );
  const heads = [
    "Sender",
    "State",
    "Last line",
    "Last heard",
    "Lines per minute, 4 h",
    "Lag",
    "Open",
    "Waiting",
    "Failed",
    "Lost",
  ];
  return html`<section class="hosts"><h2 id="senders">Senders</h2>
<table role="table" aria-labelledby="senders"><thead role="rowgroup"><tr role="row">${heads.map((head) => html`<th role="columnheader" scope="col">${head}</th>`)}</tr></thead>
<tbody role="rowgroup">${sorted.slice(0, MAX_ROWS).map((host) => renderHost(host, now, late.has(host.host)))}</tbody></table>
${sorted.length > MAX_ROWS && html`<p class="hint">${count(sorted.length - MAX_ROWS, "more sender is", "more senders are")} counted above and not listed.</p>`}
</section>`;
}

function renderHost(host: HostStatus, now: number, isLate: boolean): Html {
  const { text, mark } = STATES[host.state];
  const cell = (content: Html | string, kind = "") =>
    html`<td role="cell"${kind && html` class="${kind}"`}>${content}</td>`;
  const amount = (n: number, shown: Html | string, bad = false) =>
    cell(shown, n === 0 ? "z" : bad ? "n bad" : "");
  const since =
    host.waitingSince === undefined ? "" : html` <small>since ${formatClock(host.waitingSince, now)}</small>`;
  const muted =
    host.muted &&
    html` <small>muted until ${formatClock(host.muted.until, now)} by ${host.muted.by}${host.muted.reason && `: ${host.muted.reason}`}</small>`;
  return html`<tr role="row" id="${anchor(host.host)}"><th role="rowheader" scope="row">${breakable(host.host)}</th>${[
    cell(html`${symbol(mark)}${text}${muted}`, `s ${mark}`),
    cell(clock(host.lineAt, now)),
    cell(clock(host.heardAt, now)),
    cell(
      html`${curve(host.linesPerMinute, { kind: "c", height: 24, points: ROW_POINTS, label: "Lines per minute" })}${number(latest(host.linesPerMinute))}`,
    ),
    host.lag === undefined ? cell("unknown", "z") : amount(host.lag, formatBytes(host.lag)),
    amount(host.open, number(host.open)),
    amount(host.waiting, html`${number(host.waiting)}${since}`, isLate),
    amount(host.failed, number(host.failed), true),
    amount(host.lost, formatBytes(host.lost), true),
  ]}</tr>`;
}

/** A long name breaks behind its dots and colons. */
function breakable(name: string): Html | string {
  if (name.length <= MAX_UNBROKEN) return name;
  return html`${name.split(/(?<=[.:])/).map((label, i) => html`${i > 0 && WORD_BREAK}${label}`)}`;
}

const WORD_BREAK = html`<wbr>`;

function renderAbout({ version, startedAt, now, dir, hosts }: Snapshot): Html {
  const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
  const states = ORDER.filter(
    (state) => !["gone", "waiting"].includes(state) || inState(hosts, state).length > 0,
  );
  return html`<section class="about" aria-label="About this page">
<ul>${states.map((state) => html`<li class="${STATES[state].mark}">${symbol(STATES[state].mark)}${STATES[state].text}: ${STATES[state].meaning}</li>`)}</ul>
<p>Receiver ${version}${startedAt > 0 && `, up ${formatDuration(now - startedAt)}`}, folder ${dir}. Times are in ${timeZone}. Refreshed every ${REFRESH_SECONDS} seconds.</p>
</section>`;
}

/** How long ago, with the full time behind it. */
function clock(at: number, now: number): Html {
  if (at === 0) return html`never`;
  const ago = now - at < 1000 ? "just now" : `${formatDuration(now - at).replace(/m \d+s$/, "m")} ago`;
  return html`<time datetime="${new Date(at).toISOString()}" title="${FULL_TIME.format(at)}">${ago}</time>`;
}

const FULL_TIME = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });

/** Lines per minute now. */
function latest(perMinute: number[]): number {
  return Math.round(mean(perMinute.slice(-NOW_MINUTES)));
}

function mean(numbers: number[]): number {
  return numbers.reduce((total, n) => total + n, 0) / Math.max(1, numbers.length);
}

function addCurves(hosts: HostStatus[]): number[] {
  const length = Math.max(0, ...hosts.map(({ linesPerMinute }) => linesPerMinute.length));
  return Array.from({ length }, (_, i) =>
    hosts.reduce((total, { linesPerMinute }) => total + (linesPerMinute.at(i - length) ?? 0), 0),
  );
}

/** Lines per minute as a filled line, scaled to its own peak, with its numbers as the text alternative. */
function curve(
  perMinute: number[],
  {
    kind,
    label,
    height,
    points = perMinute.length,
  }: { kind: string; label: string; height: number; points?: number },
): Html {
  const width = Math.max(1, Math.ceil(perMinute.length / points));
  const means: number[] = [];
  for (let i = 0; i < perMinute.length; i += width) means.push(mean(perMinute.slice(i, i + width)));
  const peak = Math.max(1, ...means);
  const path = means
    .map((value, x) => `L${x} ${Math.round(height - (value / peak) * (height - 1))}`)
    .join("");
  const text = `${label}: now ${number(latest(perMinute))}, peak ${number(Math.max(0, ...perMinute))}`;
  return html`<svg class="${kind}" viewBox="0 0 ${means.length - 1} ${height}" preserveAspectRatio="none" role="img" aria-label="${text}"><path d="M0 ${height}${path}V${height}z"/></svg>`;
}

function number(n: number): string {
  return n.toLocaleString("en-US");
}

/** The id of a sender's row. */
function anchor(host: string): string {
  return `host-${host.toWellFormed()}`;
}

/** The mark beside a word, of the four in SYMBOLS. */
function symbol(mark: string): Html {
  return html`<svg class="i" aria-hidden="true"><use href="#i-${mark}"/></svg>`;
}

const SHAPES = {
  ok: "M8 0a8 8 0 1 0 0 16A8 8 0 0 0 8 0zM6.9 11.9 3.2 8.2l1.4-1.4 2.3 2.3 4.7-4.7L13 5.8z",
  bad: "M8 .6 16 15.4H0zM7.1 5.8v5h1.8v-5zm0 6.2v1.8h1.8V12z",
  ask: "M8 0l8 8-8 8-8-8zm0 3L3 8l5 5 5-5zM7 5h2v4H7zm0 4.7h2v1.6H7z",
  off: "M8 0a8 8 0 1 0 0 16A8 8 0 0 0 8 0zm0 2.2a5.8 5.8 0 1 1 0 11.6A5.8 5.8 0 0 1 8 2.2z",
};

/** The icon in the browser's tab tells the verdict as well. */
function icon(mark: Verdict): string {
  const colour = { ok: "#1f9d57", bad: "#d4351c", off: "#7d8794" }[mark];
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="${colour}" fill-rule="evenodd" d="${SHAPES[mark]}"/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

const SYMBOLS = html`<svg class="defs" aria-hidden="true">${Object.entries(SHAPES).map(([mark, shape]) => html`<symbol id="i-${mark}" viewBox="0 0 16 16"><path fill-rule="evenodd" d="${shape}"/></symbol>`)}</svg>`;

function hash(text: string): string {
  return `sha256-${createHash("sha256").update(text).digest("base64")}`;
}
