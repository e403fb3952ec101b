/**
 * The README's table of options, made from the schema: `npm run schema` puts it between the two markers, and a
 * test keeps it in step.
 */
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { jsonSchema } from "../lib/config.ts";

export const README = join(import.meta.dirname, "..", "README.md");
const BEGIN = "<!-- options: made by npm run schema -->\n";
const END = "<!-- /options -->";

interface Node {
  description?: string;
  default?: unknown;
  required?: string[];
  properties?: Record<string, Node>;
  additionalProperties?: unknown;
  items?: Node;
}

/** An option as the README lists it. */
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

/** What stands between the markers of a README; undefined when there are no markers. */
export function tableOf(readme: string): string | undefined {
  const from = readme.indexOf(BEGIN);
  const to = readme.indexOf(END, from);
  return from < 0 || to < 0 ? undefined : readme.slice(from + BEGIN.length, to);
}

if (import.meta.main) {
  const readme = readFileSync(README, "utf8");
  const old = tableOf(readme);
  if (old === undefined) {
    process.stderr.write(`README.md has no place for the table; put there:\n${BEGIN}${END}\n`);
    process.exit(1);
  }
  writeFileSync(
    README,
    readme.replace(BEGIN + old, () => BEGIN + formatOptions()),
  );
}
