/**
 * The statement: the account as it is printed at the end, with mails, housekeeping and where to look.
 */
import { formatBytes } from "../lib/service.ts";
import { type Cell, compare, dashed, type Tally, tallyDelivered, tallyLogs } from "./account.ts";
import { PACE, type Places, runOnce } from "./fleet.ts";
import type { HostRow } from "./pipeline.ts";
import { bold, dim, formatTitle, green, number, red } from "./screen.ts";
import { findMails, HOSTS, type Stage, windowsOf } from "./stage.ts";

/** Prints the account; true when it balances. */
export async function showAccount(stage: Stage, rows: HostRow[]): Promise<boolean> {
  const { places, writers, clock } = stage;
  const written: Tally = new Map();
  for (const { host, files } of writers) await tallyLogs(written, host, files, PACE.windowMinutes);
  const { tally, parts } = await tallyDelivered(places.client);
  const cells = compare(written, tally, parts);
  const { silence, recovery } = findMails(stage);
  const lines = cells.reduce((sum, cell) => sum + cell.written, 0);
  const exact =
    lines > 0 && lines === rows.reduce((sum, row) => sum + row.written, 0) && cells.every(isExact);
  const print = (text = "") => process.stdout.write(`${text && `  ${text}`}\n`);
  print();
  print(bold("The account, from the files alone: what nginx wrote = what the client has"));
  print();
  for (const row of formatCells(cells, windowsOf(clock))) print(row);
  print();
  print(exact ? green(sumUp(cells)) : red("The account does not balance:"));
  for (const cell of cells.filter((cell) => !isExact(cell))) print(explainCell(cell));
  print();
  print(
    silence && recovery ? "Mails:" : red("A mail is missing: one for the silent host, one for its recovery."),
  );
  for (const mail of stage.mails) print(`  ${mail.subject}`);
  print();
  print(`Housekeeping (--dry-run) would ${await planHousekeeping(places)}`);
  print();
  print(`Look around in ${bold(places.root)}`);
  for (const [path, text] of PLACES_TO_LOOK) print(`  ${path.padEnd(29)}${dim(text)}`);
  return exact && silence !== undefined && recovery !== undefined;
}

const PLACES_TO_LOOK: [string, string][] = [
  ["client/", "the client's: one file per host and window"],
  ["middle/linecount-report.log", "one line per delivery"],
  ["middle/batches/", "the queue: open, sealed, sent"],
  ["mails/", "to open with any mail program"],
  ["middle/*.out, 10.*/*.out", "what the scripts logged"],
  ["middle/config.json", "the config they ran with"],
];

function isExact(cell: Cell): boolean {
  return cell.identical && cell.written === cell.delivered;
}

function formatCells(cells: Cell[], windows: string[]): string[] {
  const row = (name: string, values: string[]) => name.padEnd(15) + values.join("");
  const body = HOSTS.map((host) =>
    row(
      host,
      windows.map((window) => {
        const cell = cells.find((each) => each.host === dashed(host) && each.window === window);
        if (!cell) return dim("-".padStart(13));
        const mark = isExact(cell) ? green("✓") : red("✗");
        return `${number(cell.delivered).padStart(9)} ${mark}${cell.parts > 1 ? dim(`+${cell.parts - 1}`) : "  "}`;
      }),
    ),
  );
  return [
    dim(
      row(
        "window",
        windows.map((window) => formatTitle(window)),
      ),
    ),
    ...body,
  ];
}

function sumUp(cells: Cell[]): string {
  const sum = (key: "delivered" | "bytes" | "parts") => cells.reduce((all, cell) => all + cell[key], 0);
  return `${number(sum("delivered"))} lines, ${formatBytes(sum("bytes"))}, in ${sum("parts")} files: each line once, byte for byte.`;
}

function explainCell(cell: Cell): string {
  const order = cell.missing + cell.extra === 0 ? ", the same lines in another order" : "";
  return `${cell.host} ${cell.window}: ${cell.written} written, ${cell.delivered} delivered, ${cell.missing} missing, ${cell.extra} too many${order}`;
}

/** What `housekeep --dry-run` says, in words. */
async function planHousekeeping(places: Places): Promise<string> {
  const output = await runOnce("housekeep", places.middle, ["--dry-run"]);
  const value = (name: string) =>
    new RegExp(`\\b${name}=("[^"]*"|\\S+)`).exec(sum)?.[1]?.replaceAll('"', "") ?? "?";
  const sum = output.split("\n").find((line) => line.includes("dry run done")) ?? "";
  return `compress ${value("compressed")} delivered files and delete ${value("deleted")}`;
}
