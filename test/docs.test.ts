/** What the pages of docs/ name is there: links, commands and flags, what the scripts say, the titles of what is wrong. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { existsSync } from "node:fs";
import { readdir, readFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { ROOT, start } from "./support.ts";

setDefaultTimeout(60_000);

const SCRIPTS = ["shipper", "receiver", "forwarder", "monitor", "housekeep"];

async function pages(): Promise<[string, string][]> {
  const names = (await readdir(join(ROOT, "docs"))).map((name) => `docs/${name}`);
  const all = ["README.md", "CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", ...names];
  return Promise.all(
    all.map(async (name): Promise<[string, string]> => [name, await readFile(join(ROOT, name), "utf8")]),
  );
}

/** GitHub's name of a heading. */
const anchor = (heading: string) =>
  heading
    .toLowerCase()
    .replace(/[^\w\- ]/g, "")
    .replaceAll(" ", "-");

test("every link leads to a file, and to a heading of it", async () => {
  const texts = new Map((await pages()).map(([name, text]) => [join(ROOT, name), text]));
  for (const [path, text] of texts) {
    for (const [, to = ""] of text.matchAll(/\]\((?!https?:)([^)]+)\)/g)) {
      const [file = "", heading] = to.split("#");
      const target = file === "" ? path : join(dirname(path), file);
      expect({ path, to, there: existsSync(target) }).toEqual({ path, to, there: true });
      if (heading === undefined) continue;
      const headings = [...(texts.get(target) ?? "").matchAll(/^#+ (.+)$/gm)].map(([, name = ""]) =>
        anchor(name),
      );
      expect({ path, to, headings }).toMatchObject({ headings: expect.arrayContaining([heading]) });
    }
  }
});

test("every flag of a script that docs name is one that it has", async () => {
  const help = new Map<string, string>();
  for (const script of SCRIPTS) {
    const running = start(process.execPath, ["run", join(ROOT, `${script}.ts`), "--help"]);
    await running.ended;
    help.set(script, running.output);
  }
  for (const [name, text] of await pages()) {
    const commands = text.matchAll(
      /(?:log-rt-sync |log-rt-sync-|bun run )(shipper|receiver|forwarder|monitor|housekeep)(?:\.ts)? +(--[^`\n]*)/g,
    );
    for (const [command, script = "", flags = ""] of commands) {
      for (const flag of flags.split(/&&|[|;#]/)[0]?.match(/--[a-z-]+/g) ?? []) {
        expect({ name, command, has: help.get(script)?.includes(flag) }).toEqual({
          name,
          command,
          has: true,
        });
      }
    }
  }
});

test("troubleshooting has a row for each title of what is wrong, in order, and quotes only what the scripts say", async () => {
  const page = await readFile(join(ROOT, "docs/troubleshooting.md"), "utf8");
  const files = ["lib/status.ts", "monitor.ts"].map((file) => readFile(join(ROOT, file), "utf8"));
  const status = (await Promise.all(files)).join("\n");
  const patterns = [
    /(?:title[:=]|title =|"arrival",|"watching",|STATE,) "([^"]+)"/g, // one that is always the same
    /: "((?:the client's|the login|the forwarder)[^"]+)"/g, // of a fault of all deliveries
    /"[\w ]+",\s*"((?:senders|names|batches|mails or posts) [^"]+)"/g, // of one and of many
    /(?:title = |title: )`(no receiver is running|the receiver on|the disk has)/g,
  ];
  const titles = patterns.flatMap((pattern) =>
    [...status.matchAll(pattern)].map(([, title = ""]) => title.replace(/^names are/, "name is")),
  );
  titles.splice(
    0,
    titles.length,
    ...titles.filter((title) => !["batches wait", "test mail"].includes(title)),
  );
  expect(titles.length).toBeGreaterThan(20);
  for (const title of titles) expect(page).toContain(title);
  const table = page.slice(page.indexOf("## What the page"), page.indexOf("## It does not start"));
  const rows = [...table.matchAll(/^\| `(?:… |the |this )?([^`]+)`/gm)].map(([, title = ""]) => title);
  expect(rows).toEqual(rows.toSorted());

  const log = page.slice(page.indexOf("## A shipper's log"), page.indexOf("## Lines arrive"));
  const source = await readFile(join(ROOT, "shipper.ts"), "utf8");
  const room = await Promise.all(
    (await readdir(join(ROOT, "lib/tail"))).map((name) => readFile(join(ROOT, "lib/tail", name), "utf8")),
  );
  for (const [, quoted = ""] of log.matchAll(/^\| `([^`]+)`/gm)) {
    const said = quoted.split(/…|\s\w+=/)[0]?.trim() ?? "";
    expect({ said, by: said === "" || [source, ...room].join("").includes(said) }).toEqual({
      said,
      by: true,
    });
  }
});
