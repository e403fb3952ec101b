/**
 * HTML as text that cannot be forgotten to be escaped: what stands in an `html` template is markup, what is put
 * into it is escaped, and only another template goes in as it is.
 */

/** Markup that is safe to put into the page as it is. */
export class Html {
  readonly text: string;
  constructor(text: string) {
    this.text = text;
  }
}
export type HtmlValue = Html | string | number | false | undefined | HtmlValue[];

/** A template whose values are escaped, for text and for attributes in double quotes; lists are joined. */
export function html(parts: TemplateStringsArray, ...values: HtmlValue[]): Html {
  return new Html(String.raw({ raw: parts }, ...values.map(escapeHtml)));
}

function escapeHtml(value: HtmlValue): string {
  if (value instanceof Html) return value.text;
  if (Array.isArray(value)) return value.map(escapeHtml).join("");
  if (value === false || value === undefined) return "";
  return String(value).replace(/[&<>"']/g, (char) => `&#${char.charCodeAt(0)};`);
}
