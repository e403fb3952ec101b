/**
 * The parts of documents that are made: the table of options from the schema, Deno's permissions from deno.json.
 * `npm run schema` puts them between their markers, and a test keeps them in step.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { jsonSchema } from "../lib/config.ts";

const ROOT = join(import.meta.dirname, "..");

interface Node {
  description?: string;
  default?: unknown;
  required?: string[];
  properties?: Record<string, Node>;
  additionalProperties?: unknown;
  items?: Node;
}

/** An option as docs/config.md lists it. */
export interface Option {
  /** `receiver.tls.cert`; `[]` stands for the elements of a list. */
  path: string;
  /** As it would stand in the file; undefined when the option has none. */
  default: string | undefined;
  required: boolean;
  description: string;
}

/** Every option of the config file in the schema's order. */
export function listOptions(): Option[] {
  const options: Option[] = [];
  const visit = (node: Node, path: string) => {
    for (const [key, child] of Object.entries(node.properties ?? {})) {
      const at = path ? `${path}.${key}` : key;
      const inner = child.properties ?? child.items?.properties;
      if (path && (!inner || child.description)) {
        options.push({
          path: at,
          default: child.default === undefined ? undefined : JSON.stringify(child.default),
          required: node.required?.includes(key) === true && child.default === undefined,
          description: child.description ?? "",
        });
      }
      if (child.properties) visit(child, at);
      else if (child.items?.properties) visit(child.items, `${at}[]`);
    }
  };
  visit(jsonSchema() as Node, "");
  return options;
}

/** The table in Markdown. */
export function formatOptions(): string {
  const rows = listOptions().map(({ path, default: value, required, description }) => {
    const shown = required ? "required" : value === undefined ? "" : `\`${value.replaceAll("|", "\\|")}\``;
    return `| \`${path}\` | ${shown} | ${description.replaceAll("|", "\\|")} |\n`;
  });
  return `| Option | Default | Meaning |\n|---|---|---|\n${rows.join("")}`;
}

/** How Deno runs each script, with what it may do: the tasks of deno.json. */
export function formatDeno(): string {
  const { tasks } = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8"));
  return `\n\`\`\`sh\n${Object.values(tasks).join("\n")}\n\`\`\`\n\n`;
}

/** The made parts: document, marker of the beginning, marker of the end, what stands between them. */
export const PARTS: [file: string, begin: string, end: string, make: () => string][] = [
  ["docs/config.md", "<!-- options: made by npm run schema -->\n", "<!-- /options -->", formatOptions],
  ["docs/install.md", "<!-- deno: made by npm run schema -->\n", "<!-- /deno -->", formatDeno],
];

/** What stands between the markers of a document; undefined when there are no markers. */
export function partOf(text: string, begin: string, end: string): string | undefined {
  const from = text.indexOf(begin);
  const to = text.indexOf(end, from);
  return from < 0 || to < 0 ? undefined : text.slice(from + begin.length, to);
}

if (import.meta.main) {
  for (const [file, begin, end, make] of PARTS) {
    const text = readFileSync(join(ROOT, file), "utf8");
    const old = partOf(text, begin, end);
    if (old === undefined) {
      process.stderr.write(`${file} has no place for a part that is made; put there:\n${begin}${end}\n`);
      process.exit(1);
    }
    writeFileSync(
      join(ROOT, file),
      text.replace(begin + old, () => begin + make()),
    );
  }
}
