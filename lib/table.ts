/** Tables and colour for a terminal: `--status`, `--hour`, `--dry-run`. */

/** The rows below the heads, each column as wide as its widest cell; columns named in `right` (from 0) to the right. */
export function formatTable(heads: string[], rows: string[][], right: number[] = []): string {
  const widths = heads.map((head, column) =>
    Math.max(head.length, ...rows.map((row) => (row[column] ?? "").length)),
  );
  const line = (cells: string[]) =>
    cells
      .map((cell, column) =>
        right.includes(column) ? cell.padStart(widths[column] ?? 0) : cell.padEnd(widths[column] ?? 0),
      )
      .join("  ")
      .trimEnd();
  return `${[heads, ...rows].map(line).join("\n")}\n`;
}

/** A line in red when it tells of something wrong, else in green; plain where no terminal reads it, and with $NO_COLOR. */
export function paint(text: string, isBad: boolean): string {
  return process.stdout.isTTY && !process.env.NO_COLOR ? `\x1b[${isBad ? 31 : 32}m${text}\x1b[0m` : text;
}
