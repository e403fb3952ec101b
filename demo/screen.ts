/**
 * The screen: one calm picture, drawn over itself on a terminal; without one, a line per second. Colours only
 * on a terminal, and not when NO_COLOR is set (no-color.org).
 */
import type { HostRow, WindowState } from "./pipeline.ts";

/** What is shown. */
export interface Picture {
  elapsedMs: number;
  /** What the demo is doing, in a few words. */
  phase: string;
  rows: HostRow[];
  /** How each host's shipper is doing, by host. */
  states: Map<string, State>;
  /** The windows that the traffic covers, oldest first. */
  windows: string[];
  events: Event[];
}
export type State = "live" | "killed" | "rotating" | "backlog" | "done";

/** Something that happened. */
export interface Event {
  atMs: number;
  text: string;
  mood: "plain" | "bad" | "good";
}

const terminal = process.stdout.isTTY === true;
const colours = terminal && !process.env.NO_COLOR;
const paint = (code: string) => (text: string) => (colours ? `\x1b[${code}m${text}\x1b[0m` : text);
export const dim = paint("2");
export const bold = paint("1");
export const green = paint("32");
export const red = paint("31");
export const yellow = paint("33");
export const cyan = paint("36");

const HOST_WIDTH = 15;
/** Without a cursor, and without wrapping: a line that is too long must not move those below it. */
const HIDE_CURSOR = "\x1b[?25l\x1b[?7l";
const SHOW_CURSOR = "\x1b[?7h\x1b[?25h";
const MOODS = { plain: (text: string) => text, bad: red, good: green };
const STATES: Record<State, string> = {
  live: green("● live"),
  killed: red("✗ killed"),
  rotating: cyan("↻ rotating"),
  backlog: yellow("▲ backlog"),
  done: dim("● done"),
};

/** A screen that `show` draws; `end` gives the terminal back. */
export function createScreen() {
  let height = 0;
  let lastLine = Number.NEGATIVE_INFINITY;
  let told = 0;
  return {
    show(picture: Picture, last = false): void {
      if (terminal) {
        const lines = drawPicture(picture);
        const up = height > 0 ? `\x1b[${height}A\r` : HIDE_CURSOR;
        process.stdout.write(`${up}${lines.map((line) => `${line}\x1b[K\n`).join("")}\x1b[J`);
        height = lines.length;
        return;
      }
      for (const event of picture.events.slice(told)) {
        process.stdout.write(`${clock(event.atMs)}  ${event.text}\n`);
      }
      told = picture.events.length;
      if (!last && picture.elapsedMs - lastLine < 1000) return;
      lastLine = picture.elapsedMs;
      const sum = total(picture.rows);
      process.stdout.write(
        `${clock(picture.elapsedMs)}  written ${sum.written}  shipped ${sum.shipped}  received ${sum.received}  delivered ${sum.delivered}  lag ${sum.written - sum.received}\n`,
      );
    },
    end(): void {
      if (terminal && height > 0) process.stdout.write(SHOW_CURSOR);
      height = 0;
    },
  };
}

function drawPicture(picture: Picture): string[] {
  const lines = [
    `  ${bold("Log-RT-Sync")}  ${dim(clock(picture.elapsedMs))}  ${picture.phase}`,
    dim("  nginx ── line ─▶ shipper ── chunk ─▶ receiver ── batch ─▶ forwarder ─▶ client"),
    "",
    ...drawNumbers(picture),
    "",
    ...drawWindows(picture),
    "",
  ];
  // The terminal's last row is the cursor's; what does not fit goes from the oldest event on.
  const rows = process.stdout.rows || 24;
  const room = Math.max(1, Math.min(10, rows - 1 - lines.length));
  const width = (process.stdout.columns || 80) - 10;
  const events = picture.events.slice(-room);
  for (let i = 0; i < room; i++) {
    const event = events[i];
    lines.push(event ? `  ${dim(clock(event.atMs))}  ${MOODS[event.mood](event.text.slice(0, width))}` : "");
  }
  return lines.slice(0, rows - 1);
}

function drawNumbers({ rows, states }: Picture): string[] {
  const columns = ["written", "shipped", "received", "delivered", "lag"];
  const format = (host: string, numbers: number[], state: string, style = (text: string) => text) =>
    `  ${style(host.padEnd(HOST_WIDTH) + numbers.map((n) => number(n).padStart(10)).join(""))}   ${state}`;
  const head = dim(`  ${"host".padEnd(HOST_WIDTH)}${columns.map((name) => name.padStart(10)).join("")}`);
  const sum = total(rows);
  return [
    head,
    ...rows.map((row) => format(row.host, numbersOf(row), STATES[states.get(row.host) ?? "live"])),
    format("all", numbersOf(sum), "", bold),
  ];
}

function drawWindows({ rows, windows }: Picture): string[] {
  const legend = `· none yet  ${yellow("▸")} open  ${cyan("■")} sealed  ${green("✓")} at the client  ${dim("+1")} part with late lines`;
  const titles = windows.map((window) => formatTitle(window)).join("");
  return [
    `  ${dim("window".padEnd(HOST_WIDTH) + titles)}`,
    ...rows.map(
      (row) =>
        `  ${row.host.padEnd(HOST_WIDTH)}${windows.map((window) => drawCell(row.windows.get(window))).join("")}`,
    ),
    `  ${legend}`,
  ];
}

/** Lines of a host in a window, and how far they are; `+1` says that late lines went to a second part. */
function drawCell(state: WindowState | undefined): string {
  if (!state) return `${" ".repeat(11)}${dim("·")} `;
  const { open, sealed, delivered, batches } = state;
  const text = number(open + sealed + delivered).padStart(9);
  const mark = open > 0 ? yellow("▸") : sealed > 0 ? cyan("■") : green("✓");
  return `${text} ${mark}${batches > 1 ? dim(`+${batches - 1}`) : "  "}`;
}

function numbersOf(row: Omit<HostRow, "windows" | "host">): number[] {
  return [row.written, row.shipped, row.received, row.delivered, row.written - row.received];
}

function total(rows: HostRow[]): Omit<HostRow, "windows" | "host"> {
  const sum = (key: "written" | "shipped" | "received" | "delivered") =>
    rows.reduce((all, row) => all + row[key], 0);
  return {
    written: sum("written"),
    shipped: sum("shipped"),
    received: sum("received"),
    delivered: sum("delivered"),
  };
}

/** A window's title above its cells: its end stands above their marks. */
export function formatTitle(window: string): string {
  return `${windowTitle(window).padStart(11)}  `;
}

/** `06:20-39` of `26112206_20-39`. */
function windowTitle(window: string): string {
  return `${window.slice(6, 8)}:${window.slice(9)}`;
}

/** `12 345`: a thin grouping that reads in every country. */
export function number(n: number): string {
  return String(n).replace(/\B(?=(\d{3})+$)/g, " ");
}

function clock(ms: number): string {
  const seconds = Math.max(0, Math.floor(ms / 1000));
  return `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}
