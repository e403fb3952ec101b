import { expect, test } from "bun:test";
import { chmodSync, chownSync, lstatSync, statSync } from "node:fs";
import { readFile, rm, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  appendReport,
  failReportPath,
  formatReportLine,
  parseReportLine,
  type ReportLine,
  readDelivered,
  readReportTail,
  trimReport,
} from "../lib/report.ts";
import { readForwarderState } from "../lib/signs.ts";
import { tempFolder } from "./support.ts";

const batch = "accessLog_26112206_20-39_10-10-21-181.log";
const at = new Date(2026, 10, 22, 6, 45, 1).getTime();
const line = (more: Partial<ReportLine> = {}): ReportLine => ({
  at,
  batch,
  lines: 48213,
  status: "Sent",
  ...more,
});

test("formatReportLine() writes the format that people parse", () => {
  expect(formatReportLine(line())).toBe(
    "2026-11-22 06:45:01 | accessLog_26112206_20-39_10-10-21-181.log | lines=48213 | status=Sent\n",
  );
});

test("parseReportLine() gives back what was formatted, also a reason with bars and line breaks", () => {
  for (const one of [line(), line({ status: "Failed", reason: "a | b = c" })]) {
    expect(parseReportLine(formatReportLine(one).trimEnd())).toEqual(one);
  }
  const torn = formatReportLine(line({ status: "Failed", reason: "one\r\ntwo\0three" }));
  expect(torn.split("\n").length).toBe(2);
  expect(parseReportLine(torn.trimEnd())?.reason).toBe("one two three");
});

test("parseReportLine() gives undefined for what is no report line", () => {
  for (const text of ["", "x", formatReportLine(line()).slice(0, 60), `# ${formatReportLine(line())}`]) {
    expect(parseReportLine(text)).toBeUndefined();
  }
});

test("failReportPath() replaces the extension", () => {
  expect(failReportPath("/a.b/linecount-report.log")).toBe("/a.b/linecount-report.fail");
  expect(failReportPath("/a.b/report")).toBe("/a.b/report.fail");
});

test("trimReport() drops old lines while another appends, and loses none of those", async () => {
  const path = join(await tempFolder(), "report.log");
  await appendReport(path, [line({ at: at - 10_000 }), line({ at: at - 5_000 })]);
  const appended = Array.from({ length: 20 }, (_, i) => line({ at: at + i * 1000, lines: i }));
  const [dropped] = await Promise.all([
    trimReport(path, at),
    (async () => {
      for (const one of appended) await appendReport(path, [one]);
    })(),
  ]);
  expect(dropped.lines).toBe(2);
  expect(await readReportTail(path)).toEqual(appended);
  expect((await trimReport(path, at)).lines).toBe(0);
  expect((await trimReport(path, at + 1e9)).lines).toBe(20);
  expect(await readFile(path, "utf8")).toBe("");
  expect((await trimReport(join(path, "..", "absent.log"), at)).lines).toBe(0);
});

test("readReportTail() reads no more than asked for and skips a cut first line", async () => {
  const path = join(await tempFolder(), "report.log");
  expect(await readReportTail(path)).toEqual([]);
  await appendReport(path, [line({ lines: 1 }), line({ lines: 2 }), line({ lines: 3 })]);
  expect((await readReportTail(path, 200)).map(({ lines }) => lines)).toEqual([2, 3]);
});

test("readDelivered() takes the deliveries that parseReportLine() takes, across blocks, beside anything else", async () => {
  const path = join(await tempFolder(), "report.log");
  const whole = Array.from({ length: 3000 }, (_, i) => formatReportLine(line({ lines: i * 7919 })));
  const odd = [
    formatReportLine(line({ status: "Failed", reason: "status=Sent" })),
    "status=Sent\n | lines=1 | status=Sent\n2026-11-22 06:45:01 | a | lines= | status=Sent\n\n",
    `${"x".repeat(200_000)}\n`,
    formatReportLine(line({ lines: 42 })).replace("\n", "\r\n"),
  ];
  const text = [...whole, ...odd, formatReportLine(line({ lines: 7 })).trimEnd()].join("");
  await writeFile(path, text);
  const found: [string, number][] = [];
  const place = { start: 0, since: "2026-11-22 06" };
  const first = await readDelivered(path, place, (block, from, to, lines) => {
    found.push([block.toString("latin1", from, to), lines]);
  });
  expect(first).toBe(at);
  const lines = text.split(/\r?\n/).map(parseReportLine);
  expect(found).toEqual(lines.flatMap((one) => (one?.status === "Sent" ? [[one.batch, one.lines]] : [])));
  expect(found.length).toBe(3002);
});

test("readDelivered() begins at the first line of a time, and takes older times behind that", async () => {
  const path = join(await tempFolder(), "report.log");
  const hours = [-3, -1, 0, -50, 2, -60].map((hour) =>
    line({ at: at + hour * 3_600_000, lines: hour + 100 }),
  );
  await writeFile(path, hours.map(formatReportLine).join(""));
  const found: number[] = [];
  const place = { start: 0, since: "2026-11-22 06" };
  expect(await readDelivered(path, place, (...[, , , lines]) => found.push(lines))).toBe(at);
  expect(found).toEqual([100, 50, 102, 40]);
  expect(await readDelivered(path, { ...place, since: "2026-11-23" }, () => {})).toBeUndefined();
});

test("readForwarderState() tells absent from damaged", async () => {
  const dir = await tempFolder();
  expect(await readForwarderState(dir)).toBeUndefined();
  await writeFile(join(dir, ".forwarder-state.json"), "{");
  expect(readForwarderState(dir)).rejects.toThrow("it is no JSON");
});

test("trimReport() drops what is known to be old, and nothing else", async () => {
  const path = join(await tempFolder(), "report.log");
  const old = formatReportLine(line({ at: at - 10_000 }));
  const foreign = [
    old.replace("\n", "\r\n"),
    old.replace("status=Sent", "status=Delivered"),
    old.replace("\n", " | more=1\n"),
    "a file of somebody else\n",
    "\xff\n",
  ].join("");
  await writeFile(path, old + foreign + old);
  expect((await trimReport(path, at)).lines).toBe(2);
  expect(await readFile(path, "utf8")).toBe(foreign);
});

test("trimReport() trims what a link leads to, and leaves the link", async () => {
  const path = join(await tempFolder(), "report.log");
  const real = join(await tempFolder(), "elsewhere.log");
  await symlink(real, path);
  await appendReport(path, [line({ at: at - 10_000 }), line()]);
  expect((await trimReport(path, at)).lines).toBe(1);
  expect([lstatSync(path).isSymbolicLink(), lstatSync(real).mode & 0o777]).toEqual([true, 0o640]);
  expect(await readReportTail(path)).toHaveLength(1);
  await rm(real);
  expect((await trimReport(path, at)).lines).toBe(0);
});

test.skipIf(process.getuid?.() !== 0)(
  "a report keeps its owner and mode when it is trimmed by root",
  async () => {
    const folder = await tempFolder();
    chownSync(folder, 1234, 1235);
    const path = join(folder, "report.log");
    await appendReport(path, [line({ at: at - 10_000 }), line()]);
    expect([statSync(path).uid, statSync(`${path}.lock`).uid]).toEqual([1234, 1234]);
    chmodSync(path, 0o664);
    chownSync(path, 1236, 1237);
    expect((await trimReport(path, at)).lines).toBe(1);
    const { uid, gid, mode } = statSync(path);
    expect([uid, gid, mode & 0o777]).toEqual([1236, 1237, 0o664]);
  },
);
