/**
 * Style and script of the status page, constants that the page's Content-Security-Policy permits by their hashes.
 * Colours never speak alone: every state has a word and a shape. All pairs of text and ground keep WCAG's 4.5:1.
 */

/** Seconds between two refreshes of the page. */
export const REFRESH_SECONDS = 10;

export const STYLE = `
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
.verdict ul { list-style: none; padding: 0; margin-top: .6rem; }
.verdict li { overflow-wrap: anywhere; } .verdict li a { margin-right: .35em; }
.at, .hint { color: var(--soft); } .at { margin-top: .4rem; }
.ok > .at, .bad > .at, .off > .at { color: var(--text); }

.legs { display: grid; gap: .75rem; margin-block: .75rem; grid-template-columns: 1fr; }
.leg { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; padding: .9rem 1.1rem; min-width: 0; }
h2 { font-size: 1.05rem; font-weight: 650; }
dl { display: flex; flex-wrap: wrap; gap: .5rem 1.4rem; margin-top: .5rem; }
dt { color: var(--soft); font-size: .87rem; } dd { font-size: 1.2rem; font-weight: 600; }
.leg p { margin-top: .5rem; overflow-wrap: anywhere; }
.curve { display: block; width: 100%; height: 4rem; margin-top: .6rem; }
.curve path, .c path { fill: color-mix(in srgb, var(--curve) 22%, transparent); stroke: var(--curve); stroke-width: 1.25;
  vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.axis { display: flex; justify-content: space-between; color: var(--soft); font-size: .8rem; }
.bar { display: block; width: 100%; height: .6rem; margin-top: .7rem; border-radius: .3rem; overflow: hidden;
  background: var(--line); }
.bar rect { fill: var(--curve); } .bad .bar rect { fill: var(--bad); }

.hosts { background: var(--card); border: 1px solid var(--line); border-radius: .8rem; overflow: clip; }
.hosts > h2 { padding: .9rem 1.1rem .5rem; } .hosts > p { padding: 0 1.1rem .9rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .42rem .5rem; vertical-align: middle; }
thead th { color: var(--soft); font-weight: 550; font-size: .87rem; white-space: nowrap; border-bottom: 1px solid var(--line);
  position: sticky; top: 0; background: var(--card); }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 14rem; }
tbody tr + tr > * { border-top: 1px solid var(--line); }
tr:target > * { background: var(--off-ground); }
th:first-child, td:first-child { padding-left: 1.1rem; } td:last-child, thead th:last-child { padding-right: 1.1rem; }
.s.bad, .n.bad { color: var(--bad); font-weight: 600; } .s.ask { color: var(--ask); font-weight: 600; }
.c { width: 6.5rem; height: 1.6rem; vertical-align: middle; margin-right: .5rem; }
.z { color: var(--soft); } td small { display: block; }
.about { color: var(--soft); margin-top: 1rem; font-size: .87rem; }
.about ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem; margin-bottom: .5rem; }
.about p { overflow-wrap: anywhere; }

@media (min-width: 48rem) { .legs { grid-template-columns: 1fr 1fr; } .leg:first-child { grid-column: 1 / -1; } }
@media (min-width: 62rem) { .legs { grid-template-columns: 5fr 4fr 3fr; } .leg:first-child { grid-column: auto; } }
@media (min-width: 78rem) {
  td:nth-child(n+6), thead th:nth-child(n+6) { text-align: right; }
  td { white-space: nowrap; } td.ask, td small { white-space: normal; }
}
/* Narrow: a card per sender, which leaves out the zeros. */
@media (max-width: 77.99rem) {
  table { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1px;
    border-top: 1px solid var(--line); }
  tbody tr { display: grid; grid-template-columns: repeat(4, 1fr); align-content: start; gap: .15rem .6rem;
    padding: .75rem 1.1rem .85rem; box-shadow: 0 0 0 1px var(--line); }
  tbody tr + tr > * { border: 0; }
  tbody tr > * { padding: 0 !important; min-width: 0; }
  tbody th { grid-column: span 2; } .s { grid-column: span 2; justify-self: end; }
  td:nth-child(3), td:nth-child(4), td:nth-child(8) { grid-column: span 2; }
  td:nth-child(5) { grid-column: 1 / -1; display: flex; align-items: end; padding-block: .3rem !important; }
  td:nth-child(5) .c { width: auto; flex: 1; min-width: 0; height: 2rem; }
  td.z { display: none; }
  td::before { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
  td:nth-child(3)::before { content: "Last line"; } td:nth-child(4)::before { content: "Last heard"; }
  td:nth-child(6)::before { content: "Lag"; } td:nth-child(7)::before { content: "Open"; }
  td:nth-child(8)::before { content: "Waiting"; } td:nth-child(9)::before { content: "Failed"; }
  td:nth-child(10)::before { content: "Lost"; }
}
`;

/**
 * Fetches the page again and changes only what differs, with rows known by their id, so that focus, scroll and
 * selection stay where they are and a screen reader is told only of a new verdict. A new style means a new version: then all is loaded anew.
 */
export const SCRIPT = `
const find = (selector, page = document) => page.querySelector(selector);
const main = find("main"), stale = find("#stale"), pause = find("#pause");
let timer;

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
