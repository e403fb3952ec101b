/** Headless Chromium for tests of what people see, with axe-core for what a screen reader makes of it. */
import { afterAll, beforeAll, expect, setDefaultTimeout } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { type Browser, type BrowserContextOptions, chromium, type Page } from "playwright-core";
import { findProgram, missing, ROOT } from "./support.ts";

const QUIET = ["background-networking", "component-update", "sync", "quic", "gpu"];
const AXE = readFileSync(join(ROOT, "node_modules/axe-core/axe.min.js"), "utf8");
const VIOLATIONS =
  "axe.run().then(({ violations }) => violations.map(({ id, nodes }) => id + ': ' + nodes[0].html))";

/** Whether the tests must be skipped because there is no Chromium. */
export const noBrowser = missing({ chromium: "chromium" });

let browser: Browser;

/** Starts one browser for the tests of the file that calls it. */
export function useBrowser(): () => Browser {
  setDefaultTimeout(120_000);
  beforeAll(async () => {
    if (noBrowser) return;
    const executablePath = findProgram("chromium") ?? "";
    const args = ["--no-sandbox", "--no-first-run", ...QUIET.map((part) => `--disable-${part}`)];
    browser = await chromium.launch({ executablePath, args });
  });
  afterAll(async () => {
    await browser?.close();
  });
  return () => browser;
}

/** Opens a page, hands it to `look`, and expects that it asked nobody else and that nothing was complained about. */
export async function visit<T>(
  url: string,
  options: BrowserContextOptions,
  look: (page: Page) => Promise<T>,
): Promise<T> {
  const context = await browser.newContext(options);
  const complaints: string[] = [];
  const page = await context.newPage();
  page.on("pageerror", (error) => complaints.push(error.message));
  page.on("console", (message) => {
    if (!/status of (401|503)/.test(message.text())) complaints.push(message.text());
  });
  page.on("request", (request) => {
    const to = request.url();
    if (!to.startsWith(url) && !to.startsWith("data:")) complaints.push(`asked for ${to}`);
  });
  try {
    await page.goto(url);
    const result = await look(page);
    expect(complaints).toEqual([]);
    return result;
  } finally {
    await context.close();
  }
}

/** What axe-core has to say about a page, one text per fault. */
export async function findViolations(page: Page): Promise<string[]> {
  if (!(await page.evaluate("'axe' in window"))) await page.evaluate(AXE);
  return (await page.evaluate(VIOLATIONS)) as string[];
}
