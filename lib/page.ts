/**
 * The status page as HTML: answers "is everything arriving, and is everything delivered?" at a glance. One
 * document with nothing beside it: no build step, no external resource, usable without its script.
 *
 * Every value goes through the `html` tag, which escapes it. What is put in raw is constant: the style and the script,
 * of which the Content-Security-Policy permits just these two by their hashes.
 * Colours never speak alone: every state has a word and a shape. All pairs of text and ground keep WCAG's 4.5:1.
 *
 * Of any number of senders the page stays small: the first ones, those in trouble before the others, have a row each;
 * further ones are names, for the search; beyond that they are counted.
 */
import { createHash } from "node:crypto";
import { html, raw } from "hono/html";
import { parseBatchName, parseWindow } from "./batch.ts";
import { formatBytes, formatDuration, localZone, MINUTE } from "./service.ts";
import {
  type BatchSeen,
  compareAsPeopleCount,
  HOST_STATES,
  type HostState,
  type HostStatus,
  isLate,
  isTroubled,
  sortBySeverity,
} from "./snapshot.ts";
import {
  count,
  DETAILED,
  formatClock,
  formatCount,
  headline,
  inState,
  type Problem,
  type Snapshot,
  sentence,
  sum,
} from "./status.ts";

/** Characters of the rows, alone and with names behind them, and of those names. */
const ROWS_LENGTH = { alone: 260_000, followed: 140_000 };
const NAMES_LENGTH = 100_000;
const MAX_LINKS = 5;
/** Programs of senders that are named, the newest first, and senders that are behind. */
const MAX_AGENTS = 6;
/** Late parts of one sender that are named one by one. */
const MAX_PARTS = 40;
/** Names up to this length, that of any IPv4 address, fit on one line. */
const MAX_UNBROKEN = 15;
/** Points of a sender's curve; the curve of all has one per minute. */
const ROW_POINTS = 30;
/** "Now" in lines per minute is the mean of so many minutes. */
const NOW_MINUTES = 5;
const DAY_MINUTES = 24 * 60;

const REFRESH_SECONDS = 10;

const STATES: Record<HostState, { text: string; meaning: string; mark: string }> = {
  silent: { text: "silent", meaning: "not heard for longer than its threshold", mark: "bad" },
  never: { text: "never seen", meaning: "expected, has not sent yet", mark: "ask" },
  waiting: {
    text: "waiting",
    meaning: "its receiver is down, or it was not heard since that started",
    mark: "ask",
  },
  gone: { text: "gone", meaning: "silent for a day and not expected, or only batches are left", mark: "off" },
  quiet: { text: "quiet", meaning: "alive, sends no lines", mark: "off" },
  ok: { text: "ok", meaning: "lines come", mark: "ok" },
};
type Mark = "ok" | "bad" | "off";

type Html = ReturnType<typeof html>;
type HtmlValue = Html | string | number | false | undefined | HtmlValue[];

// ---- the page

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
<style>${raw(STYLE)}</style>
</head>
<body>
${SYMBOLS}
<header><p class="name">Log-RT-Sync on ${status.server}</p><button id="pause" type="button" aria-pressed="false" hidden>Pause</button></header>
<p id="stale" role="alert" hidden></p>
<main data-at="${formatClock(status.now, status.now)}">
${renderHeadline(status, title, mark, problems)}
${renderLegs(status, problems)}
${renderHosts(status)}
${renderAbout(status)}
</main>
<p id="files" role="status" hidden></p>
<script type="module">${raw(SCRIPT)}</script>
</body>
</html>
`;
  return String(page);
}

function renderHeadline({ now }: Snapshot, title: string, mark: Mark, problems: Problem[]): Html {
  return html`<section class="verdict ${mark}" aria-label="Verdict">
<div role="status"><h1>${symbol(mark)}${title.replace(/(?<=\d) (?=\p{L})/gu, "\u00a0")}</h1></div>
${problems.length > 0 && html`<ul>${problems.map((problem) => renderProblem(problem, problems.length))}</ul>`}
<p class="at">State of <time datetime="${new Date(now).toISOString()}">${FULL_TIME.format(now)}</time></p>
</section>`;
}

/** What is behind the headline: the senders that the text names are links, a few others stand behind it. */
function renderProblem({ key, title, text, hosts, next = [] }: Problem, of: number): Html {
  const parts: HtmlValue[] = [];
  const others: HtmlValue[] = [];
  let rest = text;
  for (const host of hosts.slice(0, MAX_LINKS)) {
    const link = html`<a id="${key}-${host}" href="#${encodeURIComponent(anchor(host))}">${host}</a>`;
    const at = rest.indexOf(host);
    if (at < 0) others.push(html` ${link}`);
    else parts.push(rest.slice(0, at), link);
    if (at >= 0) rest = rest.slice(at + host.length);
  }
  const more =
    others.length > 0 && hosts.length > MAX_LINKS && ` and ${formatCount(hosts.length - MAX_LINKS)} more`;
  const words = next[0]?.split(" ").map((word, i) => html`${i > 0 && " "}<span>${word}</span>`); // none breaks at a hyphen
  return html`<li>${of > 1 && html`<b>${sentence(title)}</b>: `}${parts}${rest}${others.length > 0 && html` – ${others}${more}`}${next[0] && html`<code>${words}</code>`}</li>`;
}

function renderLegs(status: Snapshot, problems: Problem[]): Html {
  const { hosts, disk, forwarder } = status;
  const fails = (leg: Problem["leg"]) => problems.some((problem) => problem.leg === leg);
  const sends = inState(hosts, "ok").length > 0;
  return html`<div class="legs">
${leg(fails("arrival") ? "bad" : sends ? "ok" : "off", ["Lines arrive", "Not everything arrives", "No lines come"], renderArrival(status))}
${leg(fails("delivery") ? "bad" : forwarder ? "ok" : "off", ["Batches are delivered", "Not everything is delivered", "No forwarder has run here yet"], renderDelivery(status))}
${leg(fails("disk") ? "bad" : disk ? "ok" : "off", ["Disk has room", "Disk needs room", "Disk cannot be asked"], disk && renderDisk(disk))}
</div>`;
}

function leg(mark: Mark, [ok, bad, off]: [string, string, string], content: Html | undefined): Html {
  return html`<section class="leg ${mark}"><h2>${symbol(mark)}${{ ok, bad, off }[mark]}</h2>${content}</section>`;
}

function renderArrival({ hosts, linesPerMinute, now }: Snapshot): Html {
  const sending = inState(hosts, "ok").length + inState(hosts, "quiet").length;
  const senders = hosts.length - inState(hosts, "gone").length;
  const hours = `${linesPerMinute.length / 60} hours`;
  const lost = sum(hosts, "lost") + sum(hosts, "gone");
  const lags = hosts.filter(({ lag }) => lag !== undefined).length;
  const since = formatClock(now - NOW_MINUTES * MINUTE, now);
  return html`<dl>${figure("Senders", `${formatCount(sending)} of ${formatCount(senders)}`)}${figure(`Lines per minute since ${since}`, formatCount(latest(linesPerMinute)))}
${figure(lags < senders ? `Lag of ${count(lags, "sender")}` : "Lag", lags > 0 ? formatBytes(sum(hosts, "lag")) : "unknown")}${lost > 0 && figure("Bytes lost", formatBytes(lost))}</dl>
${
  linesPerMinute.length > 0 &&
  html`${curve(linesPerMinute, { kind: "curve", height: 96, label: `Lines per minute of all senders, last ${hours}` })}
<p class="axis" aria-hidden="true"><span>${hours} ago</span><span>peak ${formatCount(Math.max(...linesPerMinute))} per minute</span><span>now</span></p>`
}`;
}

function renderDelivery({ hosts, forwarder, digest, now }: Snapshot): Html {
  return html`<dl>${figure("Open", formatCount(sum(hosts, "open")))}${figure("Waiting", formatCount(sum(hosts, "waiting")))}
${figure("Failed", formatCount(sum(hosts, "failed")))}</dl>
${forwarder && html`<p>Last delivery ${clock(forwarder.lastSentAt ?? 0, now)}, forwarder seen ${clock(forwarder.aliveAt, now)}.</p>`}
${digest && html`<p class="digest">Newest digest ${digest.name}, sha256 <code>${digest.sha256}</code></p>`}`;
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

// ---- senders

const HEADS =
  "Sender,State,Last line,Last heard,Lines per minute (4 h),Batches (24 h),Delivered to,Lag,Waiting,Failed,Lost";

interface Table {
  now: number;
  deliveryMinutes: number;
  newest: string | undefined;
  /** Of a batch, as most names have it. */
  windowMinutes: number;
  prefix: string;
}

/** A row for each of the first senders, the worst first; the names of further ones. */
function renderHosts({ hosts, now, deliveryMinutes }: Snapshot): Html {
  if (hosts.length === 0) {
    return html`<section class="hosts"><h2>Senders</h2><p class="hint">Start a shipper whose config names this receiver: its host appears here.</p></section>`;
  }
  const newest = countAgents(hosts)[0]?.[0];
  const sorted = sortBySeverity(hosts, { now, deliveryMinutes });
  const table: Table = { now, deliveryMinutes, newest, ...shapeOf(sorted) };
  const rows: Html[] = [];
  let length = 0;
  const most = hosts.length > DETAILED ? ROWS_LENGTH.followed : ROWS_LENGTH.alone;
  for (const host of sorted.slice(0, DETAILED)) {
    const row = renderHost(host, table);
    length += String(row).length;
    if (length > most) break;
    rows.push(row);
  }
  return html`<section class="hosts" data-prefix="${table.prefix}" data-minutes="${table.windowMinutes}"><h2 id="senders">Senders</h2>
${hosts.length > 1 && renderFilter(hosts, newest)}
<table role="table" aria-labelledby="senders"><thead role="rowgroup"><tr role="row">${HEADS.split(",").map((head) => html`<th role="columnheader" scope="col">${head}</th>`)}</tr></thead>
<tbody role="rowgroup">${rows}</tbody></table>
${rows.length < sorted.length && renderNames(sorted.slice(rows.length), newest)}
<p class="hint" id="none" role="status" hidden>No sender matches.</p>
<p class="hint key">${KEY} A click names the files.</p>
</section>`;
}

function renderFilter(hosts: HostStatus[], newest: string | undefined): Html {
  const behind = hosts.filter((host) => isBehind(host, newest)).length;
  const chip = (show: string, text: string, n: number) =>
    n > 0 &&
    html`<button type="button" data-show="${show}" aria-pressed="${show === "" ? "true" : "false"}">${text} ${formatCount(n)}</button>`;
  return html`<div class="filter" role="search"><input id="q" type="search" placeholder="Find a sender" aria-label="Find a sender" autocomplete="off" spellcheck="false">${chip("", "all", hosts.length)}${HOST_STATES.map((state) => chip(state, STATES[state].text, inState(hosts, state).length))}${chip("behind", "older version", behind)}</div>`;
}

function renderNames(hosts: HostStatus[], newest: string | undefined): Html {
  let length = 0;
  const fits = ({ host }: HostStatus) => {
    length += host.length + 4;
    return length < NAMES_LENGTH;
  };
  const name = (host: HostStatus) => html`<li${isBehind(host, newest) && raw(' class="b"')}>${host.host}`;
  const groups = HOST_STATES.map((state) => {
    const all = inState(hosts, state);
    const named = all.filter(fits);
    const { text, mark } = STATES[state];
    const more = all.length > named.length && html`<li>and ${formatCount(all.length - named.length)} more`;
    return (
      all.length > 0 &&
      html`<div data-s="${state}"><h3 class="${mark}">${symbol(mark)}${text}<span>, ${formatCount(all.length)} more</span></h3><ul>${named.map(name)}${more}</ul></div>`
    );
  });
  return html`<div class="names">${groups}</div>`;
}

function shapeOf(hosts: HostStatus[]): Pick<Table, "windowMinutes" | "prefix"> {
  const name = hosts.find(({ batches }) => batches.length > 0)?.batches.at(-1)?.name ?? "";
  const { window, prefix = "" } = parseBatchName(name) ?? {};
  const { start, end } = parseWindow(window ?? "26010100_00-19");
  return { windowMinutes: (end - start) / MINUTE, prefix };
}

function renderHost(host: HostStatus, table: Table): Html {
  const { now } = table;
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
  const twice = host.contested && html` <small>from ${host.contested.join(" and ")}</small>`;
  const behind = isBehind(host, table.newest);
  const lost = host.lost + host.gone;
  const again =
    host.again &&
    html` <small>${formatBytes(host.again)} of ${count(host.againFiles ?? 0, "file")} shipped again</small>`;
  const isWell = host.state === "ok" && !isTroubled(host, table);
  const kinds = [isWell && "well", behind && "b"].filter(Boolean).join(" ");
  return html`<tr role="row" id="${anchor(host.host)}" data-s="${host.state}"${kinds && html` class="${kinds}"`}><th role="rowheader" scope="row">${breakable(host.host)}${behind && html` <small>${host.agent}</small>`}${twice}</th>${[
    cell(html`${symbol(mark)}${text}${muted}`, `s ${mark}`),
    cell(clock(host.lineAt, now)),
    cell(clock(host.heardAt, now)),
    cell(
      html`${curve(host.linesPerMinute, { kind: "c", height: 24, points: ROW_POINTS, label: "Lines per minute" })}${formatCount(latest(host.linesPerMinute))}`,
      host.linesPerMinute.some((lines) => lines > 0) ? "" : "z",
    ),
    cell(renderDay(host, table), host.batches.length === 0 ? "z" : ""),
    renderDelivered(host, now),
    host.lag === undefined ? cell("unknown", "z") : amount(host.lag, html`${formatBytes(host.lag)}${again}`),
    amount(host.waiting, html`${formatCount(host.waiting)}${since}`, isLate(host, table)),
    amount(host.failed, formatCount(host.failed), true),
    amount(lost, formatBytes(lost), true),
  ]}</tr>`;
}

/** Up to where everything is delivered, by the sender's clock, and the newest window when it is behind that. */
function renderDelivered({ delivered, undeliveredFrom, zone, failed }: HostStatus, now: number): Html {
  if (delivered === undefined) return html`<td role="cell" class="z">–</td>`;
  const today = new Date(now + zoneOf(zone, now)).toISOString().slice(0, 10);
  const wall = (ms: number) => {
    const iso = new Date(ms).toISOString();
    return `${iso.slice(0, 10) === today ? "" : `${iso.slice(5, 10)} `}${iso.slice(11, 16)}`;
  };
  const newest = wall(parseWindow(delivered).end);
  if (undeliveredFrom === undefined || undeliveredFrom > delivered)
    return html`<td role="cell">${newest}</td>`;
  return html`<td role="cell"${failed > 0 && html` class="n bad"`}>${wall(parseWindow(undeliveredFrom).start)} <small>newest ${newest}</small></td>`;
}

function zoneOf(zone: number | undefined, now: number): number {
  return (zone ?? localZone(now)) * MINUTE;
}

const PLACES: BatchSeen["place"][] = ["delivered", "open", "waiting", "failed"];
const PLACE_LETTERS = { delivered: "d", open: "o", waiting: "w", failed: "f" };

/** A sender's windows of the last 24 hours as a strip, with what the script needs to name its files. */
function renderDay({ batches, zone }: HostStatus, { now, windowMinutes }: Table): Html | string {
  if (batches.length === 0) return "";
  const columns = DAY_MINUTES / windowMinutes;
  const step = windowMinutes * MINUTE;
  const last = Math.floor((now + zoneOf(zone, now)) / step);
  const worst: string[] = new Array(columns).fill(".");
  const late: string[] = new Array(columns).fill(".");
  const firsts: string[] = new Array(columns).fill(".");
  const parts: string[] = [];
  const counts = { delivered: 0, open: 0, waiting: 0, failed: 0, late: 0 };
  for (const { name, place } of batches) {
    const { window = "", part = 1 } = parseBatchName(name) ?? {};
    const at = columns - 1 - (last - Math.floor(parseWindow(window).start / step));
    if (at < 0 || at >= columns) continue;
    const letter = PLACE_LETTERS[place];
    counts[place]++;
    if (rankOf(letter) >= rankOf(worst[at] ?? ".")) worst[at] = letter;
    if (part === 1) firsts[at] = letter;
    else {
      late[at] = "l";
      counts.late++;
      parts.push(`${letter}${at}.${part}`);
    }
  }
  const more = parts.length > MAX_PARTS ? ` +${parts.length - MAX_PARTS}` : "";
  const files = [...runs(firsts.join("")), ...parts.slice(0, MAX_PARTS)].join(" ") + more;
  const told = [...PLACES, "late" as const].flatMap((place) =>
    counts[place] > 0 ? `${counts[place]} ${place}` : [],
  );
  const words = `Batches of 24 hours: ${told.join(", ") || "none"}`;
  return html`<svg class="w" viewBox="0 0 ${columns} 12" preserveAspectRatio="none" role="img" aria-label="${words}" data-first="${(last + 1 - columns) * step}" data-w="${files}">${strip(worst.join(""), late.join(""))}</svg>`;
}

function rankOf(letter: string): number {
  return ".dowf".indexOf(letter);
}

/** Letters with their columns, as `d0-70 w71`. */
function runs(letters: string): string[] {
  return [...letters.matchAll(/([a-z])\1*/g)].map(({ 0: run, index }) =>
    run.length === 1 ? `${run}${index}` : `${run[0]}${index}-${index + run.length - 1}`,
  );
}

/** Top of each place's bar in the strip of height 12: a shape of its own. */
const TOPS: Record<string, number> = { d: 3, o: 9, w: 6, f: 0, l: 0 };

function strip(worst: string, late: string): HtmlValue[] {
  const bars = (letter: string, text: string) => {
    const [top, bottom] = [TOPS[letter], letter === "l" ? 2 : 12];
    const path = [...text.matchAll(new RegExp(`${letter}+`, "g"))]
      .map(({ 0: { length }, index }) => `M${index} ${top}h${length}V${bottom}h-${length}z`)
      .join("");
    return path && html`<path class="${letter}" d="${path}"/>`;
  };
  return [...[..."dowf"].map((letter) => bars(letter, worst)), bars("l", late)];
}

const KEY = Object.entries({ d: "delivered", o: "open", w: "waiting", f: "failed", l: "late part" }).map(
  ([letter, word]) =>
    html`<span><svg class="w" viewBox="0 0 1 12" preserveAspectRatio="none" aria-hidden="true">${strip(letter, letter)}</svg>${word}</span>`,
);

/** A long name breaks behind its dots and colons. */
function breakable(name: string): Html | string {
  if (name.length <= MAX_UNBROKEN) return name;
  return html`${name.split(/(?<=[.:])/).map((label, i) => html`${i > 0 && WORD_BREAK}${label}`)}`;
}

const WORD_BREAK = html`<wbr>`;

function renderAbout({ version, startedAt, now, dir, hosts, byDefaults }: Snapshot): Html {
  const { timeZone } = Intl.DateTimeFormat().resolvedOptions();
  const agents = countAgents(hosts);
  const behind = hosts.filter((host) => isBehind(host, agents[0]?.[0])).map(({ host }) => host);
  const states = HOST_STATES.filter(
    (state) => !["gone", "waiting"].includes(state) || inState(hosts, state).length > 0,
  );
  const told = agents.slice(0, MAX_AGENTS).map(([agent, senders]) => `${agent} (${formatCount(senders)})`);
  const names = behind.slice(0, MAX_LINKS).join(", ");
  const more = behind.length > MAX_LINKS && ` and ${formatCount(behind.length - MAX_LINKS)} more`;
  return html`<section class="about" aria-label="About this page">
<ul>${states.map((state) => html`<li class="${STATES[state].mark}">${symbol(STATES[state].mark)}${STATES[state].text}: ${STATES[state].meaning}${state === "waiting" && startedAt > 0 && ` (${formatDuration(now - startedAt)} ago)`}</li>`)}</ul>
${told.length > 0 && html`<p>Senders run ${told.join(", ")}.${behind.length > 0 && html` Behind: ${names}${more}.`}</p>`}
<p>Receiver ${version}${startedAt > 0 && `, up ${formatDuration(now - startedAt)}`}, folder ${dir}. Lag is what senders still have to ship; an open batch still takes lines. Times are in ${timeZone}, windows in the sender's own. Refreshed every ${REFRESH_SECONDS} seconds.${byDefaults && " The config has no section monitor: judged by its defaults."}</p>
</section>`;
}

/** The programs that senders run and on how many of them, the newest first. */
function countAgents(hosts: HostStatus[]): [agent: string, senders: number][] {
  const counts = new Map<string, number>();
  for (const { agent } of hosts) if (agent) counts.set(agent, (counts.get(agent) ?? 0) + 1);
  return [...counts].sort(([a], [b]) => compareAsPeopleCount(b, a));
}

function isBehind({ agent }: HostStatus, newest: string | undefined): boolean {
  return agent !== undefined && agent !== newest;
}

function clock(at: number, now: number): Html {
  if (at === 0) return html`never`;
  const ago = now - at < 1000 ? "just now" : `${formatDuration(now - at).replace(/m \d+s$/, "m")} ago`;
  return html`<time datetime="${new Date(at).toISOString()}" title="${FULL_TIME.format(at)}">${ago}</time>`;
}

const FULL_TIME = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "long" });

function latest(perMinute: number[]): number {
  return Math.round(mean(perMinute.slice(-NOW_MINUTES)));
}

function mean(numbers: number[]): number {
  return numbers.reduce((total, n) => total + n, 0) / Math.max(1, numbers.length);
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
  const text = `${label}: now ${formatCount(latest(perMinute))}, peak ${formatCount(Math.max(0, ...perMinute))}`;
  return html`<svg class="${kind}" viewBox="0 0 ${means.length - 1} ${height}" preserveAspectRatio="none" role="img" aria-label="${text}"><path d="M0 ${height}${path}V${height}z"/></svg>`;
}

function anchor(host: string): string {
  return `host-${host.toWellFormed()}`;
}

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
function icon(mark: Mark): string {
  const colour = { ok: "#1f9d57", bad: "#d4351c", off: "#7d8794" }[mark];
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path fill="${colour}" fill-rule="evenodd" d="${SHAPES[mark]}"/></svg>`;
  return `data:image/svg+xml,${encodeURIComponent(svg)}`;
}

const SYMBOLS = html`<svg class="defs" aria-hidden="true">${Object.entries(SHAPES).map(([mark, shape]) => html`<symbol id="i-${mark}" viewBox="0 0 16 16"><path fill-rule="evenodd" d="${shape}"/></symbol>`)}</svg>`;

// ---- style, script, and the headers that permit just these

const STYLE = `
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --text: #1c2128; --soft: #57606a; --line: #d8dde3;
  --ok: #116b3c; --bad: #b42318; --ask: #8a4b00; --off: #57606a; --curve: #2f6fb3;
  --ok-ground: #e4f4ea; --bad-ground: #fdeceb; --off-ground: #eceff2; }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1318; --card: #171c23; --text: #e4e8ee; --soft: #9aa5b1;
  --line: #2c343e; --ok: #56c98b; --bad: #ff8b80; --ask: #f2b155; --off: #9aa5b1; --curve: #6cb0f5;
  --ok-ground: #12291d; --bad-ground: #331a19; --off-ground: #1d242c; } }
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: var(--text);
  background: var(--ground); font-variant-numeric: tabular-nums; padding: 0 clamp(.75rem, 2.5vw, 2rem) 2rem; }
header, main, #stale { max-width: 84rem; margin-inline: auto; }
header { display: flex; align-items: center; justify-content: space-between; min-height: 3.25rem; }
.name { font-weight: 650; letter-spacing: .01em; }
button { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line); border-radius: .4rem;
  padding: .3rem .8rem; min-height: 2rem; cursor: pointer; }
button[aria-pressed="true"] { color: var(--card); background: var(--text); }
a { color: inherit; text-underline-offset: .15em; }
:focus-visible { outline: 2px solid var(--curve); outline-offset: 2px; }
#stale { background: var(--bad-ground); color: var(--bad); font-weight: 600; padding: .6rem 1rem; border-radius: .6rem;
  margin-bottom: .75rem; }
.defs { position: absolute; width: 0; height: 0; }
.i { width: 1em; height: 1em; flex: none; vertical-align: -.13em; margin-right: .45em; fill: currentColor; }
.ok > .i, .ok h1 .i, .ok h2 .i { color: var(--ok); } .bad > .i, .bad h1 .i, .bad h2 .i { color: var(--bad); }
.ask > .i { color: var(--ask); } .off > .i, .off h1 .i { color: var(--off); }

.verdict { border-radius: .8rem; padding: 1.1rem 1.25rem; background: var(--off-ground); }
.verdict.ok { background: var(--ok-ground); } .verdict.bad { background: var(--bad-ground); }
h1 { font-size: clamp(1.3rem, 1rem + 1.6vw, 2rem); line-height: 1.2; font-weight: 680; text-wrap: balance;
  overflow-wrap: anywhere; }
.verdict ul { list-style: none; padding: 0; margin-top: .6rem; } .verdict li { overflow-wrap: anywhere; } .verdict b { font-weight: 600; }
.verdict code { display: block; font-size: .87em; margin: .1rem 0 .35rem; } .verdict code::before { content: "Next: "; } code span { display: inline-block; max-width: 100%; }
.at, .hint { color: var(--soft); } .at { margin-top: .4rem; } .ok > .at, .bad > .at, .off > .at { color: var(--text); }

.legs { display: grid; gap: .75rem; margin-block: .75rem; grid-template-columns: 1fr; }
.leg { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: .9rem 1.1rem; min-width: 0; }
h2 { font-size: 1.05rem; font-weight: 650; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; margin-top: .5rem; } dt { color: var(--soft); font-size: .87rem; } dd { font-size: 1.2rem; font-weight: 600; }
.leg p { margin-top: .5rem; overflow-wrap: anywhere; }
.curve { display: block; width: 100%; height: 4rem; margin-top: .6rem; }
.curve path, .c path { fill: color-mix(in srgb, var(--curve) 22%, transparent); stroke: var(--curve); stroke-width: 1.25;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; }
.bar { display: block; width: 100%; height: .6rem; margin-top: .7rem; border-radius: .3rem; overflow: hidden;
  background: var(--line); }
.bar rect { fill: var(--curve); } .bad .bar rect { fill: var(--bad); }

.digest code { overflow-wrap: anywhere; font-size: .87em; }
.hosts { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; overflow: clip; }
.hosts > h2 { padding: .9rem 1.1rem .5rem; } .hosts > p { padding: 0 1.1rem .9rem; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
th, td { text-align: left; padding: .38rem .35rem; vertical-align: middle; }
thead th { color: var(--soft); font-weight: 550; font-size: .87rem; vertical-align: bottom; border-bottom: 1px solid var(--line);
  position: sticky; top: 0; background: var(--card); }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 8.8rem; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr:target > * { background: var(--off-ground); }
th:first-child, td:first-child { padding-left: 1.1rem; } td:last-child, thead th:last-child { padding-right: 1.1rem; }
.s.bad, .n.bad { color: var(--bad); font-weight: 600; } .s.ask { color: var(--ask); font-weight: 600; }
.c { width: 4rem; height: 1.6rem; vertical-align: middle; margin-right: .5rem; }
.w { width: 7.5rem; height: 1.1rem; vertical-align: middle; cursor: pointer; background: linear-gradient(var(--line), var(--line)) bottom / 100% 1px no-repeat; }
.w .d { fill: color-mix(in srgb, var(--ok) 60%, var(--card)); } .w .o { fill: var(--soft); } .w .w { fill: var(--ask); } .w .f { fill: var(--bad); } .w .l { fill: var(--text); }
.hosts > .key { padding-top: .7rem; } .key span { margin-right: 1rem; white-space: nowrap; }
.key .w { width: .9rem; margin-right: .4rem; cursor: auto; }
.filter { display: none; flex-wrap: wrap; gap: .4rem; padding: .2rem 1.1rem .6rem; }
.js .filter { display: flex; }
.filter button, input { padding: .2rem .6rem; min-height: 1.9rem; }
input { font: inherit; color: inherit; background: var(--ground); border: 1px solid var(--soft); border-radius: .4rem; width: 14rem; max-width: 100%; }
.names { padding: .2rem 1.1rem .6rem; border-top: 1px solid var(--line); font-size: .87rem; } .names h3 { font-size: 1em; font-weight: 600; margin-top: .5rem; }
.names ul { list-style: none; padding: 0; margin-top: .2rem; columns: 7.5rem auto; column-gap: 1rem; color: var(--soft); overflow-wrap: anywhere; }
#files { position: fixed; inset: auto 0 0; background: var(--text); color: var(--card); padding: .7rem 1.1rem; overflow-wrap: anywhere; max-height: 40vh; overflow-y: auto; white-space: pre-line; z-index: 1; }
.some .names h3 span { display: none; } .hosts > #none { padding-top: .9rem; }
.z { color: var(--soft); } td small { display: block; }
.about { color: var(--soft); margin-top: 1rem; font-size: .87rem; }
.about ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin-bottom: .5rem; } .about p { overflow-wrap: anywhere; }

@media (min-width: 48rem) { .legs { grid-template-columns: 1fr 1fr; } .leg:first-child { grid-column: 1 / -1; } }
@media (min-width: 62rem) { .legs { grid-template-columns: 5fr 4fr 3fr; } .leg:first-child { grid-column: auto; } }
@media (min-width: 74rem) {
  td:nth-child(n+8), thead th:nth-child(n+8) { text-align: right; }
  td { white-space: nowrap; } td.ask, td small { white-space: normal; } td small { max-width: 9rem; } td:nth-child(n+8) small { margin-left: auto; }
}
/* Narrow: a line for a sender that is well; a card for any other one, which leaves out the zeros. */
@media (max-width: 73.99rem) {
  table { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1px;
    border-top: 1px solid var(--line); }
  tbody tr { display: grid; grid-template-columns: 1fr 1fr; align-content: start; gap: .15rem .6rem;
    padding: .6rem 1.1rem; box-shadow: 0 0 0 1px var(--line); }
  tbody tr + tr > * { border: 0; }
  tbody tr > * { padding: 0 !important; min-width: 0; }
  .s { justify-self: end; }
  td:nth-child(5), td:nth-child(6) { grid-column: 1 / -1; display: flex; flex-wrap: wrap; align-items: end; padding-block: .2rem !important; }
  td:nth-child(5) .c, td:nth-child(6) .w { width: auto; flex: 1 1 50%; min-width: 0; height: 1.6rem; }
  td.z { display: none; }
  td::before { display: block; width: 100%; color: var(--soft); font-size: .8rem; font-weight: 400; }
  td:nth-child(3)::before { content: "Last line"; } td:nth-child(4)::before { content: "Last heard"; }
  td:nth-child(5)::before { content: "Lines per minute, 4 hours"; } td:nth-child(6)::before { content: "Batches, 24 hours"; }
  td:nth-child(7)::before { content: "Delivered to"; } td:nth-child(8)::before { content: "Lag"; }
  td:nth-child(9)::before { content: "Waiting"; } td:nth-child(10)::before { content: "Failed"; }
  td:nth-child(11)::before { content: "Lost"; }
  tr.well { grid-template-columns: minmax(0, 8.5rem) auto minmax(2rem, 1fr) minmax(0, auto); align-items: center; padding-block: .3rem; }
  tr.well > * { grid-column: auto; } tr.well td:nth-child(n) { display: none; }
  tr.well td:nth-child(2), tr.well td:nth-child(3) { display: block; } tr.well td:nth-child(6) { display: flex; padding: 0 !important; order: 1; }
  tr.well td:nth-child(3) { order: 2; font-size: .87rem; color: var(--soft); white-space: nowrap; }
  tr.well td::before { content: none !important; } tr.well td:nth-child(6) .w { height: 1.1rem; } tr.well small { display: none; }
}
/* In between, where two lines fit beside each other: a card takes the whole width, its numbers side by side above the pictures. */
@media (min-width: 44rem) and (max-width: 73.99rem) {
  tbody tr:not(.well) { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .15rem 1rem; }
  tr:not(.well) th { flex: 0 0 10rem; } tr:not(.well) .s { flex: 0 0 8.8rem; } tr:not(.well) td { flex: 1 0 4.6rem; }
  tr:not(.well) td:nth-child(5), tr:not(.well) td:nth-child(6) { order: 1; flex-basis: calc(50% - .5rem); }
  tr:not(.well) td:nth-child(n+8) { order: 2; flex: 0 0 7rem; white-space: nowrap; }
}
`;

/**
 * Filters, names the files of a strip, fetches the page again and changes only what differs, rows by their id: focus, scroll and
 * selection stay, a screen reader is told only of a new verdict. A new style means a new version: then all is loaded anew.
 */
const SCRIPT = `
const find = (selector, page = document) => page.querySelector(selector);
const all = (selector) => document.querySelectorAll(selector);
const main = find("main"), stale = find("#stale"), pause = find("#pause"), files = find("#files");
const root = document.documentElement;
let timer, show = "";
root.className = "js";

function filter() {
  for (const chip of all("[data-show][aria-pressed]")) {
    const pressed = String(chip.dataset.show === show);
    if (chip.ariaPressed !== pressed) chip.ariaPressed = pressed;
  }
  const query = find("#q")?.value.trim().toLowerCase() ?? "";
  root.classList.toggle("some", query !== "" || show === "behind");
  const hide = (item, hidden) => { if (item && item.hidden !== hidden) item.hidden = hidden; return !hidden; };
  let found = 0;
  for (const group of all("tbody, .names ul")) {
    const isShown = (item) => (show === "" || show === (item.dataset.s ?? group.parentNode.dataset.s) || (show === "behind" && item.matches(".b"))) && (item.id.slice(5) || item.textContent).toLowerCase().includes(query);
    const shown = [...group.children].filter((item) => hide(item, !isShown(item))).length;
    hide(group.parentNode, shown === 0);
    found += shown;
  }
  hide(find("#none"), found > 0);
}

const WORDS = { d: "delivered", o: "open: still takes lines", w: "waiting", f: "failed" };
const two = (n) => String(n).padStart(2, "0");

function nameFiles(strip, x) {
  const { prefix, minutes } = strip.closest(".hosts").dataset;
  const columns = strip.viewBox.baseVal.width, { left, width } = strip.getBoundingClientRect();
  const column = Math.min(columns - 1, Math.max(0, Math.floor((x - left) / width * columns)));
  const start = new Date(Number(strip.dataset.first) + column * minutes * 60000);
  const host = strip.closest("tr").id.slice(5), minute = start.getUTCMinutes();
  const day = two(start.getUTCFullYear() % 100) + two(start.getUTCMonth() + 1) + two(start.getUTCDate());
  const window = day + two(start.getUTCHours()) + "_" + two(minute) + "-" + two(minute + Number(minutes) - 1);
  const found = strip.dataset.w.split(" ").flatMap((entry) => {
    const [, letter, from, to = from, part] = /^([dowf])(\\d+)(?:-(\\d+))?(?:\\.(\\d+))?$/.exec(entry) ?? [];
    if (!letter || column < from || column > to) return [];
    return [prefix + "_" + window + "_" + host.replace(/[.:]/g, "-") + (part ? "." + part : "") + ".log " + WORDS[letter]];
  });
  const at = host + ", " + start.toISOString().slice(0, 16).replace("T", " ") + ": ";
  files.textContent = at + (found.length > 0 ? "\\n" + found.join("\\n") : "no batch");
  files.hidden = false;
}

document.addEventListener("click", ({ target, clientX }) => {
  const chip = target.closest("[data-show][aria-pressed]"), strip = target.closest("tr .w[data-w]");
  if (chip) { show = chip.dataset.show; filter(); }
  if (strip) nameFiles(strip, clientX);
  else if (!target.closest("#files")) files.hidden = true;
});
document.addEventListener("input", filter);
document.addEventListener("keydown", ({ key }) => { if (key === "Escape") files.hidden = true; });

function morph(old, next) {
  if (old.nodeName !== next.nodeName || old.id !== next.id) return old.replaceWith(next);
  if (old.nodeType === Node.TEXT_NODE) { if (old.data !== next.data) old.data = next.data; return; }
  for (const { name } of [...old.attributes]) if (!next.hasAttribute(name)) old.removeAttribute(name);
  for (const { name, value } of next.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const wanted = [...next.childNodes], ids = new Set(wanted.map(({ id }) => id));
  const known = new Map([...old.children].filter(({ id }) => id).map((child) => [child.id, child]));
  for (const [id, child] of known) if (!ids.has(id)) child.remove();
  for (const [i, child] of wanted.entries()) {
    const here = old.childNodes[i] ?? null, same = known.get(child.id) ?? (here?.id ? null : here);
    if (!same || same !== here) old.insertBefore(same ?? child, here);
    if (same) morph(same, child);
  }
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

async function refresh() {
  clearTimeout(timer);
  if (pause.ariaPressed === "true" || document.hidden) return;
  try {
    const answer = await fetch(location.origin + location.pathname, { signal: AbortSignal.timeout(8000) });
    if (!answer.ok) throw new Error(answer.statusText);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    if (find("style", page).textContent !== find("style").textContent) return location.reload();
    const focused = document.activeElement.id;
    morph(main, find("main", page));
    filter();
    if (focused && document.activeElement.id !== focused) {
      document.getElementById(focused)?.focus({ preventScroll: true });
    }
    morph(find("link"), find("link", page));
    if (document.title !== page.title) document.title = page.title;
    if (!stale.hidden) stale.hidden = true;
  } catch {
    stale.textContent = "The receiver does not answer: this is the state of " + main.dataset.at + ".";
    stale.hidden = false;
  }
  schedule();
}

function schedule() {
  clearTimeout(timer);
  timer = setTimeout(refresh, ${REFRESH_SECONDS * 1000});
}

pause.hidden = false;
pause.addEventListener("click", () => {
  const paused = pause.ariaPressed !== "true";
  pause.ariaPressed = String(paused);
  if (!paused) refresh();
});
document.addEventListener("visibilitychange", refresh);
schedule();
`;

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

function hash(text: string): string {
  return `sha256-${createHash("sha256").update(text).digest("base64")}`;
}
