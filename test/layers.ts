/**
 * The rules of imports and names that the code keeps: each is a function from sources to its breaches, one line each.
 * `test/layers.test.ts` shows of each that it finds a breach, and that the repository has none.
 */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";

/** Path below the repository → source. */
export type Tree = Map<string, string>;

/** Each script, the pass that it exports, and the room of its engine. */
export const SCRIPTS: Record<string, { pass: string; room?: string }> = {
  "shipper.ts": { pass: "shipOnce", room: "lib/tail/" },
  "receiver.ts": { pass: "createApp", room: "lib/store/" },
  "forwarder.ts": { pass: "forwardOnce", room: "lib/target/" },
  "monitor.ts": { pass: "checkOnce", room: "lib/mail/" },
  "housekeep.ts": { pass: "housekeepOnce" },
};

/** What the five scripts may use of the registry, and who imports it; each further one needs a reason. */
export const PACKAGES: Record<string, RegExp> = {
  croner: /^lib\/schedule\.ts$/,
  hono: /^(receiver|lib\/page|lib\/mail\/\w+)\.ts$/,
  nodemailer: /^lib\/mail\//,
  ssh2: /^lib\/target\//,
  zod: /./,
};

/** What only one place may say, and which. */
const PLACES: [what: string, pattern: RegExp, where: RegExp][] = [
  ["renames", /\b(rename|renameSync)\b\s*[,}(]/, /^lib\/(durable|target\/\w+)\.ts$/], // of the target's own server, there
  [
    "syncs",
    /\b(fsync|fsyncSync|fdatasync|fdatasyncSync)\b|\.(sync|datasync)\(\)/,
    /^lib\/(durable|store\/journal)\.ts$/,
  ],
  // the journal writes at places that it knows; all else is replaced whole, or a record line by line
  ["appends", /\bappend(File|FileSync|Durably)\b|\bO_APPEND\b/, /^lib\/(durable|digest|report)\.ts$/],
  ["names Bun or Deno", /\b(Bun|Deno)\s*\.|\bglobalThis\b|["']bun(:|["'])/, /^lib\/runtime\.ts$/],
  ["ends the process", /\bprocess\.(exit|abort|kill)\b/, /^lib\/(service|durable)\.ts$/],
];

const MOST_LINES_OF_A_FUNCTION = 60;
const MOST_LINES_OF_A_MAIN = 40;
const MOST_LINES_OF_A_FILE = 720;
const MOST_OF_COMMENTS = 0.1;

/** Files in which too much has gathered, and what they must not grow beyond: a line goes when its file has found its nouns. */
const LONG_FILES: Record<string, number> = {
  "shipper.ts": 925,
  "forwarder.ts": 946,
  "receiver.ts": 832,
  "monitor.ts": 781,
  "lib/page.ts": 734,
  "lib/store/sender.ts": 755,
};

/** What functions are called that say it in words of our own where the field has one: log, report, note, explain. */
const OWN_WORDS =
  /^#?(tell[A-Z]\w*|told[A-Z]\w*|describe|blame\w*|firstlook|findOwner|homeless|judge[A-Z]\w*)$/;

/** The scripts and all of lib/. */
export function readTree(root: string): Tree {
  const lib = readdirSync(join(root, "lib"), { recursive: true, encoding: "utf8" });
  const files = [...Object.keys(SCRIPTS), ...lib.map((name) => `lib/${name}`)].filter((name) =>
    name.endsWith(".ts"),
  );
  return new Map(files.sort().map((file) => [file, readFileSync(join(root, file), "utf8")]));
}

/** A source without its comments, so that prose does not count as code. */
export function codeOf(source: string): string {
  return source.replace(/\/\*\*?[\s\S]*?\*\//g, "").replace(/(^|[^:"'`\\])\/\/.*$/gm, "$1");
}

/** What a file imports, also dynamically: paths below the repository, and names of packages. */
export function importsOf(file: string, source: string): string[] {
  const pattern = /(?:\bfrom\s*|\bimport\s*\(?\s*)(["'])([^"'\n]+)\1/g;
  return [...codeOf(source).matchAll(pattern)].map(([, , name = ""]) =>
    name.startsWith(".") ? normalize(join(dirname(file), name)) : name,
  );
}

/** A file and all of our own that it imports, directly or not. */
export function reachableFrom(tree: Tree, file: string, seen: string[] = []): string[] {
  if (seen.includes(file) || !tree.has(file)) return seen;
  seen.push(file);
  for (const next of importsOf(file, tree.get(file) ?? "")) reachableFrom(tree, next, seen);
  return seen;
}

const roomOf = (file: string) => /^lib\/[^/]+\//.exec(file)?.[0];

function forEachImport(tree: Tree, judge: (file: string, name: string) => boolean): string[] {
  return [...tree].flatMap(([file, source]) =>
    importsOf(file, source)
      .filter((name) => !judge(file, name))
      .map((name) => `${file} imports ${name}`),
  );
}

export const RULES: Record<string, (tree: Tree) => string[]> = {
  "a file imports lib/, node: and the named packages, never a script": (tree) =>
    forEachImport(tree, (_, name) =>
      tree.has(name)
        ? name.startsWith("lib/")
        : /^node:|^package\.json$/.test(name) || (name.split("/")[0] ?? "") in PACKAGES,
    ),

  "a package is imported where it is at home": (tree) =>
    forEachImport(tree, (file, name) => PACKAGES[name.split("/")[0] ?? ""]?.test(file) ?? true),

  "a room is imported by its own script and by itself": (tree) =>
    forEachImport(tree, (file, name) => {
      const room = roomOf(name);
      return room === undefined || room === roomOf(file) || SCRIPTS[file]?.room === room;
    }),

  "every file of lib/ is used": (tree) => {
    const used = new Set([...tree].flatMap(([file, source]) => importsOf(file, source)));
    return [...tree.keys()].filter((file) => file.startsWith("lib/") && !used.has(file));
  },

  "a flat file of lib/ is shared by two scripts": (tree) => {
    const reached = Object.keys(SCRIPTS).map((script) => reachableFrom(tree, script));
    return [...tree.keys()].filter(
      (file) =>
        /^lib\/(?!page\.ts)[^/]+$/.test(file) && reached.filter((files) => files.includes(file)).length === 1,
    );
  },

  "imports make no circle": (tree) =>
    [...tree.keys()].filter((file) =>
      importsOf(file, tree.get(file) ?? "").some((name) => reachableFrom(tree, name).includes(file)),
    ),

  "what is dangerous happens in one place": (tree) =>
    PLACES.flatMap(([what, pattern, where]) =>
      [...tree]
        .filter(([file, source]) => !where.test(file) && pattern.test(codeOf(source)))
        .map(([file]) => `${file} ${what}`),
    ),

  "there is no file for leftovers": (tree) =>
    [...tree.keys()].filter((file) => /\/(utils?|types?|helpers?|index|common|misc)\.ts$/.test(file)),

  "one exported name means one thing": (tree) => {
    const files = new Map<string, string[]>();
    const pattern = /^export (?:abstract )?(?:async )?(?:function\*?|const|let|class|interface|type) (\w+)/gm;
    for (const [file, source] of tree)
      for (const [, name = ""] of codeOf(source).matchAll(pattern))
        files.set(name, [...(files.get(name) ?? []), file]);
    return [...files]
      .filter(([, where]) => new Set(where).size > 1)
      .map(([name, where]) => `${name}: ${[...new Set(where)].join(", ")}`);
  },

  "what is exported is used": (tree) => {
    const code = [...tree.values()].map(codeOf).join("\n");
    return [...tree].flatMap(([file, source]) =>
      [...codeOf(source).matchAll(/^export (?:async )?(?:function\*?|const|class) (\w+)/gm)]
        .filter(([, name]) => (code.match(new RegExp(`\\b${name}\\b`, "g")) ?? []).length === 1)
        .map(([, name]) => `${file} ${name}`),
    );
  },

  "a header names only files and functions that exist": (tree) => {
    const code = [...tree.values()].map(codeOf).join("\n");
    return [...tree].flatMap(([file, source]) => {
      const header = /^(?:#!.*\n)?\/\*\*[\s\S]*?\*\//.exec(source)?.[0];
      if (!header) return [`${file} has no header`];
      const files = [...header.matchAll(/\blib\/[\w/]+\.ts\b/g)].map(([name]) => name);
      const functions = [...header.matchAll(/`(?:\w+\.)*(\w+)\(\)`/g)].map(([, name = ""]) => name);
      return [
        ...files.filter((name) => !tree.has(name)),
        ...functions.filter(
          (name) => !new RegExp(`(function\\*?|const|async)? ?#?\\b${name}\\b ?(=|\\()`).test(code),
        ),
      ].map((name) => `${file} names ${name}`);
    });
  },

  [`a function has at most ${MOST_LINES_OF_A_FUNCTION} lines`]: (tree) =>
    [...tree].flatMap(([file, source]) =>
      functionsOf(source)
        .filter(({ lines }) => lines > MOST_LINES_OF_A_FUNCTION)
        .map(({ name, lines }) => `${file} ${name}: ${lines}`),
    ),

  [`a main() has at most ${MOST_LINES_OF_A_MAIN} lines`]: (tree) =>
    [...tree].flatMap(([file, source]) =>
      functionsOf(source)
        .filter(({ name, lines }) => file in SCRIPTS && name === "main" && lines > MOST_LINES_OF_A_MAIN)
        .map(({ lines }) => `${file} main: ${lines}`),
    ),

  [`a file has at most ${MOST_LINES_OF_A_FILE} lines`]: (tree) =>
    [...tree].flatMap(([file, source]) => {
      const lines = source.split("\n").length - 1;
      return lines > (LONG_FILES[file] ?? MOST_LINES_OF_A_FILE) ? [`${file}: ${lines}`] : [];
    }),

  "comments are at most a tenth of all lines": (tree) => {
    const lines = [...tree.values()].flatMap((source) => source.split("\n"));
    const comments = lines.filter((line) => /^\s*(?:\/\*|\*(?= |\/|$)|\/\/)/.test(line)).length;
    return comments > lines.length * MOST_OF_COMMENTS ? ["comments are more than a tenth"] : [];
  },

  "functions have the field's names": (tree) =>
    [...tree].flatMap(([file, source]) =>
      functionsOf(source)
        .filter(({ name }) => OWN_WORDS.test(name))
        .map(({ name }) => `${file} ${name}`),
    ),

  "no file says that it is not finished": (tree) =>
    [...tree].filter(([, source]) => /\b(TODO|FIXME|XXX)\b/.test(source)).map(([file]) => file),
};

/** Functions and methods with their lines: the code is formatted, so each ends at a brace under its first letter. */
export function functionsOf(source: string): { name: string; lines: number }[] {
  const lines = source.split("\n");
  const opening =
    /^( *)(?:export )?(?:static )?(?:async )?(?:function\*? (\w+)|(?:get |set )?\*?(#?\w+)\((?!.*\) *=>)|const (\w+) = (?:async )?(?:\(|\w+ =>))/;
  return lines.flatMap((line, index) => {
    const [, indent = "", ...names] = opening.exec(line) ?? [];
    const name = names.find((one) => one !== undefined);
    if (!name || /^(if|for|while|switch|return|catch|await|expect|test)$/.test(name)) return [];
    const end = lines.findIndex((other, at) => at > index && other.startsWith(`${indent}}`));
    const next = lines.findIndex(
      (other, at) => at > index && other.startsWith(indent) && /^\S/.test(other.slice(indent.length)),
    );
    // an argument list over several lines ends with `) {` or `): Type {` under the first letter
    const body = next >= 0 && /^\).*\{$/.test(lines[next]?.slice(indent.length) ?? "") ? end : next;
    return body < 0 || body !== end ? [] : [{ name, lines: end - index + 1 }];
  });
}
