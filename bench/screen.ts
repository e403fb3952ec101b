/**
 * What a long run shows: on a terminal a few lines that are written over, elsewhere a line now and then.
 */

export interface Screen {
  /** Shows what `describe` gives, again and again, until `end`. */
  watch(describe: () => string[]): void;
  /** An event, with the seconds since the start. */
  note(seconds: string, text: string): void;
  end(): void;
}

const EVENTS_SHOWN = 8;
const REDRAW_MS = 500;
const PLAIN_MS = 10_000;

/** A screen on stdout. */
export function createScreen(): Screen {
  const { stdout } = process;
  const events: string[] = [];
  let timer: NodeJS.Timeout | undefined;
  let drawn = 0;
  let latest: (() => string[]) | undefined;

  const draw = () => {
    if (!latest) return;
    const lines = [...latest(), ...events.slice(-EVENTS_SHOWN)];
    const width = (stdout.columns ?? 100) - 1;
    const text = lines.map((line) => `\x1b[2K${line.slice(0, width)}\n`).join("");
    stdout.write((drawn > 0 ? `\x1b[${drawn}A` : "") + text);
    drawn = lines.length;
  };
  return {
    watch: (describe) => {
      latest = describe;
      timer = stdout.isTTY
        ? setInterval(draw, REDRAW_MS)
        : setInterval(() => stdout.write(`${describe().join("; ")}\n`), PLAIN_MS);
    },
    note: (seconds, text) => {
      events.push(`${seconds.padStart(7)}  ${text}`);
      if (!stdout.isTTY) stdout.write(`${events.at(-1)}\n`);
    },
    end: () => {
      clearInterval(timer);
      if (stdout.isTTY) draw();
      latest = undefined;
    },
  };
}
