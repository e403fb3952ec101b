/** The rules of imports and names (test/layers.ts): each finds the breach that is made for it, and none in the repository. */
import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type Section, sections } from "../lib/config.ts";
import { codeOf, PACKAGES, RULES, reachableFrom, readTree, SCRIPTS, type Tree } from "./layers.ts";
import { ROOT } from "./support.ts";

const TREE = readTree(ROOT);

/** For each rule a file that breaks it, and what is said of it. */
const BREACHES: Record<string, [file: string, source: string, breach: string][]> = {
  "a file imports lib/, node: and the named packages, never a script": [
    ["shipper.ts", 'import { main } from "./receiver.ts";', "shipper.ts imports receiver.ts"],
    ["lib/batch.ts", 'import pad from "left-pad";', "lib/batch.ts imports left-pad"],
    ["lib/batch.ts", 'const x = await import("../gone.ts");', "lib/batch.ts imports gone.ts"],
  ],
  "a package is imported where it is at home": [
    ["forwarder.ts", 'import ssh2 from "ssh2";', "forwarder.ts imports ssh2"],
    ["monitor.ts", 'import nodemailer from "nodemailer";', "monitor.ts imports nodemailer"],
    ["housekeep.ts", 'import { Cron } from "croner";', "housekeep.ts imports croner"],
  ],
  "a room is imported by its own script and by itself": [
    ["receiver.ts", 'import { openLog } from "./lib/tail/file.ts";', "receiver.ts imports lib/tail/file.ts"],
    [
      "lib/store/store.ts",
      'import { openLog } from "../tail/file.ts";',
      "lib/store/store.ts imports lib/tail/file.ts",
    ],
    ["lib/batch.ts", 'import { openLog } from "./tail/file.ts";', "lib/batch.ts imports lib/tail/file.ts"],
  ],
  "every file of lib/ is used": [["lib/lonely.ts", "", "lib/lonely.ts"]],
  "a flat file of lib/ is shared by two scripts": [["lib/x.ts", "", "lib/x.ts"]],
  "imports make no circle": [["lib/x.ts", 'import { main } from "../shipper.ts";', "lib/x.ts"]],
  "what is dangerous happens in one place": [
    ["receiver.ts", "await rename(a, b);", "receiver.ts renames"],
    ["forwarder.ts", "await file.sync();", "forwarder.ts syncs"],
    ["monitor.ts", "Bun.sleep(1);", "monitor.ts names Bun or Deno"],
    ["housekeep.ts", "process.exit(1);", "housekeep.ts ends the process"],
    ["shipper.ts", "await appendFile(a, b);", "shipper.ts appends"],
  ],
  "there is no file for leftovers": [["lib/store/utils.ts", "", "lib/store/utils.ts"]],
  "one exported name means one thing": [
    ["lib/lonely.ts", "export function parseBatchName() {}", "parseBatchName: lib/batch.ts, lib/lonely.ts"],
  ],
  "what is exported is used": [
    ["lib/lonely.ts", "export function nobodyCalls() {}", "lib/lonely.ts nobodyCalls"],
  ],
  "a header names only files and functions that exist": [
    ["lib/lonely.ts", "/** See lib/nowhere.ts. */", "lib/lonely.ts names lib/nowhere.ts"],
    ["lib/lonely.ts", "/** See `neverWritten()`. */", "lib/lonely.ts names neverWritten"],
    ["lib/lonely.ts", "export const x = 1;", "lib/lonely.ts has no header"],
  ],
  "a function has at most 60 lines": [
    ["lib/lonely.ts", `function long() {\n${"  x();\n".repeat(59)}}`, "lib/lonely.ts long: 61"],
    [
      "lib/lonely.ts",
      `class A {\n  async #run(\n    a: number,\n  ): Promise<void> {\n${"    x();\n".repeat(57)}  }\n}`,
      "lib/lonely.ts #run: 61",
    ],
  ],
  "a main() has at most 40 lines": [
    ["housekeep.ts", `async function main() {\n${"  x();\n".repeat(39)}}`, "housekeep.ts main: 41"],
  ],
  "a file has at most 720 lines": [["lib/lonely.ts", "x();\n".repeat(721), "lib/lonely.ts: 721"]],
  "comments are at most a tenth of all lines": [
    ["lib/lonely.ts", "// Says nothing.\n".repeat(1000), "comments are more than a tenth"],
  ],
  "functions have the field's names": [
    ["lib/lonely.ts", "function tellFault() {\n}", "lib/lonely.ts tellFault"],
  ],
  "no file says that it is not finished": [["lib/lonely.ts", "// TODO: more", "lib/lonely.ts"]],
};

test("each rule has a breach that is made for it", () => {
  expect(Object.keys(BREACHES)).toEqual(Object.keys(RULES));
});

describe.each(Object.keys(RULES))("%s", (name) => {
  const judge = RULES[name] as (tree: Tree) => string[];

  test("in the repository", () => {
    expect(judge(TREE)).toEqual([]);
  });

  test.each(BREACHES[name] ?? [])("finds a breach in %s", (file, source, breach) => {
    const before = TREE.get(file) ?? "";
    const broken = new Map(TREE).set(file, before ? `${before}\n${source}` : source);
    if (file === "lib/x.ts") broken.set("shipper.ts", `${TREE.get("shipper.ts")}\nimport "./lib/x.ts";`);
    expect(judge(broken)).toContain(breach);
  });
});

test("CONTRIBUTING.md says of every script, room and flat file what it answers for, and of none that is not there", () => {
  const rows = readFileSync(join(ROOT, "CONTRIBUTING.md"), "utf8").split("\n");
  const listed = rows.flatMap((row) => [...(/^\| (`.*?) \|/.exec(row)?.[1] ?? "").matchAll(/`([^`]+)`/g)]);
  const places = [...TREE.keys()].map((file) => /^lib\/[^/]+\//.exec(file)?.[0] ?? file);
  expect(listed.map(([, name]) => String(name)).sort()).toEqual([...new Set(places)].sort());
});

test("every package of package.json is used, at its exact version", () => {
  const { dependencies, devDependencies } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));
  expect(Object.keys(dependencies).sort()).toEqual(Object.keys(PACKAGES));
  for (const version of Object.values({ ...dependencies, ...devDependencies }))
    expect(version).toMatch(/^\d+\.\d+\.\d+$/);
});

describe.each(Object.keys(SCRIPTS))("%s reads like the others", (file) => {
  const source = TREE.get(file) ?? "";

  test("it opens with its promise in 8 to 15 lines", () => {
    const header = /^(?:#!.*\n)?\/\*\*\n([\s\S]*?)\*\//.exec(source)?.[1] ?? "";
    const lines = header.split("\n").length - 1;
    expect(lines).toBeGreaterThanOrEqual(8);
    expect(lines).toBeLessThanOrEqual(15);
  });

  test("it exports its pass, has a main() and ends with runScript", () => {
    const code = codeOf(source);
    expect(code).toMatch(new RegExp(`^export (async )?function ${SCRIPTS[file]?.pass}\\b`, "m"));
    expect(code).toMatch(/^(export )?async function main\b/m);
    const last = code.slice(code.lastIndexOf("if (import.meta.main)"));
    expect(last).toMatch(/^if \(import\.meta\.main\)\s*\{?\s*await runScript\(/);
    expect(last.split("\n").length).toBeLessThan(30);
  });

  test("every option of its section is read by it or by what it imports", () => {
    const section = file.replace(/\.ts$/, "") as Section;
    const files = reachableFrom(TREE, file).filter((name) => name !== "lib/config.ts");
    const code = files.map((name) => codeOf(TREE.get(name) ?? "")).join("\n");
    const unread = Object.keys(sections[section].shape).filter(
      (key) => !new RegExp(`\\.${key}\\b|[{,]\\s*${key}\\s*[,}:=]`).test(code),
    );
    expect(unread).toEqual([]);
  });
});
