import { describe, expect, test } from "bun:test";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { type Section, sections } from "../lib/config.ts";
import { ROOT } from "./support.ts";

const SCRIPTS: Record<Section, string> = {
  shipper: "shipOnce",
  receiver: "createApp",
  forwarder: "forwardOnce",
  monitor: "checkOnce",
  housekeep: "housekeepOnce",
};
const NAMES = Object.keys(SCRIPTS) as Section[];
const LIB = readdirSync(join(ROOT, "lib")).filter((name) => name.endsWith(".ts"));
const FILES = [...NAMES.map((name) => `${name}.ts`), ...LIB.map((name) => `lib/${name}`)];
const SOURCE = new Map(FILES.map((file) => [file, readFileSync(join(ROOT, file), "utf8")]));

/** What the five scripts may use of the registry; each further one needs a reason. */
const PACKAGES = ["croner", "hono", "nodemailer", "ssh2", "zod"];

function sourceOf(file: string): string {
  return SOURCE.get(file) ?? "";
}

/** A file without its comments, so that prose does not count as code. */
function codeOf(file: string): string {
  return sourceOf(file)
    .replace(/\/\*\*?[\s\S]*?\*\//g, "")
    .replace(/(^|[^:"'`])\/\/.*$/gm, "$1");
}

/** The specifiers that a file imports, also dynamically. */
function importsOf(file: string): string[] {
  const pattern = /(?:\bfrom\s*|\bimport\s*\(?\s*)(["'])([^"'\n]+)\1/g;
  return [...codeOf(file).matchAll(pattern)].map((match) => match[2] ?? "");
}

/** The files whose code matches, of all but the named ones. */
function filesWith(pattern: RegExp, ...except: string[]): string[] {
  return FILES.filter((file) => !except.includes(file) && pattern.test(codeOf(file)));
}

describe("imports", () => {
  test("a script imports lib/, node: and the named packages, never another script", () => {
    for (const file of FILES) {
      const folder = file.startsWith("lib/") ? "./" : "./lib/";
      for (const specifier of importsOf(file)) {
        if (specifier.startsWith("node:") || specifier === "../package.json") continue;
        const inLib = specifier.startsWith(folder) && LIB.includes(specifier.slice(folder.length));
        const name = specifier.split("/")[0] ?? "";
        expect(inLib || PACKAGES.includes(name), `${file} imports ${specifier}`).toBe(true);
      }
    }
  });

  test("every file of lib/ is used by a script or another file of lib/", () => {
    const used = new Set(FILES.flatMap(importsOf).map((specifier) => specifier.split("/").at(-1)));
    expect(LIB.filter((name) => !used.has(name))).toEqual([]);
  });

  test("every package of package.json is used, at its exact version", () => {
    const { dependencies, devDependencies } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));
    expect(Object.keys(dependencies).sort()).toEqual(PACKAGES);
    for (const version of Object.values({ ...dependencies, ...devDependencies })) {
      expect(version).toMatch(/^\d+\.\d+\.\d+$/);
    }
  });

  test("there is no file for leftovers", () => {
    expect(LIB.filter((name) => /^(utils?|types?|helpers?|index|common|misc)\.ts$/.test(name))).toEqual([]);
  });
});

describe("the one place where something dangerous happens", () => {
  test("only lib/durable.ts renames", () => {
    expect(filesWith(/\b(rename|renameSync)\b\s*[,}(]/, "lib/durable.ts", "lib/target/remote.ts")).toEqual(
      [],
    );
  });

  test("only lib/durable.ts syncs, and lib/store/store.ts for the answer that waits for it", () => {
    const sync = /\b(fsync|fsyncSync|fdatasync|fdatasyncSync)\b|\.(sync|datasync)\(\)/;
    // lib/target/filexfer.ts names the extension with which a server is asked to sync a file of its own.
    expect(filesWith(sync, "lib/durable.ts", "lib/store/store.ts", "lib/target/filexfer.ts")).toEqual([]);
  });

  test("only lib/target/sftp.ts imports ssh2, only lib/mail/smtp.ts nodemailer", () => {
    const importers = (name: string) =>
      FILES.filter((file) =>
        importsOf(file).some((specifier) => specifier === name || specifier.startsWith(`${name}/`)),
      );
    expect(importers("ssh2")).toEqual(["lib/target/sftp.ts"]);
    expect(importers("nodemailer")).toEqual(["lib/mail/smtp.ts"]);
  });

  test("only lib/runtime.ts names Bun or Deno", () => {
    expect(filesWith(/\b(Bun|Deno)\s*\.|\bglobalThis\b|["']bun(:|["'])/, "lib/runtime.ts")).toEqual([]);
  });

  test("only lib/service.ts ends the process, and lib/durable.ts where a test asks for it", () => {
    expect(filesWith(/\bprocess\.(exit|abort|kill)\b/, "lib/service.ts", "lib/durable.ts")).toEqual([]);
  });
});

describe("every script reads alike", () => {
  test.each(NAMES)("%s.ts opens with its promise in 8 to 15 lines", (name) => {
    const header = /^(?:#!.*\n)?\/\*\*\n([\s\S]*?)\*\//.exec(sourceOf(`${name}.ts`))?.[1] ?? "";
    const lines = header.split("\n").length - 1;
    expect(lines).toBeGreaterThanOrEqual(8);
    expect(lines).toBeLessThanOrEqual(15);
  });

  test.each(NAMES)("%s.ts exports its pass, has a main() and ends with runScript", (name) => {
    const code = codeOf(`${name}.ts`);
    expect(code).toMatch(new RegExp(`^export (async )?function ${SCRIPTS[name]}\\b`, "m"));
    expect(code).toMatch(/^(export )?async function main\b/m);
    const last = code.slice(code.lastIndexOf("if (import.meta.main)"));
    expect(last).toMatch(/^if \(import\.meta\.main\)\s*\{?\s*await runScript\(/);
    expect(last.split("\n").length).toBeLessThan(20);
  });
});

describe("config", () => {
  for (const section of NAMES) {
    test(`every option of ${section} is read by ${section}.ts or by what it imports`, () => {
      const files = reachableFrom(`${section}.ts`).filter((file) => file !== "lib/config.ts");
      const code = files.map(codeOf).join("\n");
      const unread = Object.keys(sections[section].shape).filter(
        (key) => !new RegExp(`\\.${key}\\b|[{,]\\s*${key}\\s*[,}:=]`).test(code),
      );
      expect(unread).toEqual([]);
    });
  }
});

test("no file says that it is not finished", () => {
  for (const [file, text] of SOURCE) expect(text, file).not.toMatch(/\b(TODO|FIXME|XXX)\b/);
});

/** A file and all of our own that it imports, directly or not. */
function reachableFrom(file: string, seen: string[] = []): string[] {
  if (seen.includes(file) || !SOURCE.has(file)) return seen;
  seen.push(file);
  for (const specifier of importsOf(file)) {
    if (specifier.startsWith(".")) reachableFrom(`lib/${specifier.split("/").at(-1)}`, seen);
  }
  return seen;
}
