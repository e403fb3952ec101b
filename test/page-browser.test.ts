import { afterAll, beforeAll, describe, expect, test } from "bun:test";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { BrowserContextOptions, Page } from "playwright-core";
import { formatChunkHeaders } from "../lib/chunk.ts";
import { emptyLedger, formatRecord, readLedger } from "../lib/ledger.ts";
import { pageHeaders, renderPage } from "../lib/page.ts";
import { type Server, serve } from "../lib/runtime.ts";
import type { Snapshot } from "../lib/status.ts";
import { findViolations, noBrowser, useBrowser, visit } from "./browser.ts";
import { fleet, host, NOW, samples, status } from "./page-samples.ts";
import {
  accessLine,
  freePort,
  type Running,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

/** Phone, tablet, the narrowest window with a table, desktop. */
const WIDTHS = [360, 768, 1184, 1280];
/** Of these axe-core looks at the two forms of the page, cards and table. */
const AXE_WIDTHS = [360, 1280];
const SCHEMES = ["light", "dark"] as const;
/** Screenshots go here when it is set, to be looked at. */
const SHOTS = process.env.LOG_RT_SYNC_SHOTS;
const LOOPBACK = { hostname: "127.0.0.1", port: 0, maxBodyBytes: 1024, idleTimeoutSeconds: 30 };

const browser = useBrowser();
let server: Server;
/** What the server shows; undefined: it answers 503. */
let shown: Snapshot | undefined = samples.good;

beforeAll(() => {
  const page = () =>
    shown ? new Response(renderPage(shown), { headers: pageHeaders }) : new Response("", { status: 503 });
  server = serve({ ...LOOPBACK, fetch: page });
});
afterAll(() => server.close());

/** Opens the page that the server shows. */
function visitPage<T>(options: BrowserContextOptions, look: (page: Page) => Promise<T>): Promise<T> {
  return visit(`http://127.0.0.1:${server.port}/`, options, look);
}

/** Makes the page refresh now, as it does when its tab is shown again. */
async function refresh(page: Page): Promise<void> {
  const answer = page.waitForResponse(() => true);
  await page.evaluate("document.dispatchEvent(new Event('visibilitychange'))");
  await answer;
}

describe.skipIf(noBrowser)("the status page in a browser", () => {
  test.each(Object.keys(samples) as (keyof typeof samples)[])(
    "%s: axe-core finds nothing in light and dark, and nothing sticks out at any width",
    async (name) => {
      shown = samples[name];
      for (const colorScheme of name === "many" ? SCHEMES.slice(1) : SCHEMES) {
        await visitPage({ colorScheme, viewport: { width: 1280, height: 900 } }, async (page) => {
          for (const width of WIDTHS) {
            await page.setViewportSize({ width, height: 900 });
            if (AXE_WIDTHS.includes(width)) {
              expect(await findViolations(page), `${colorScheme} ${width}`).toEqual([]);
            }
            const sticksOut = await page.evaluate(`[...document.querySelectorAll("main :not(thead, thead *)")]
              .filter((e) => e.getBoundingClientRect().right > e.closest("section, main").getBoundingClientRect().right)
              .map((e) => e.outerHTML.slice(0, 100))`);
            expect(sticksOut, `${colorScheme} ${width}`).toEqual([]);
            if (SHOTS) await page.screenshot({ path: join(SHOTS, `${name}-${colorScheme}-${width}.png`) });
          }
        });
      }
    },
  );

  test("a hostile name is shown as text and runs nothing", async () => {
    const name = `"><img src=x onerror="document.title='owned'"><script>document.title='owned'</script>`;
    shown = status([host(name, "silent")], { dir: name });
    await visitPage({}, async (page) => {
      expect(await page.locator("tbody th").textContent()).toBe(name);
      expect(await page.title()).toBe("1 sender is silent · middle · Log-RT-Sync");
      await page.locator(".verdict a").click();
      expect(await page.locator("tr:target").count()).toBe(1);
    });
  });

  test("a refresh shows the new state and leaves focus, scroll and selection where they are", async () => {
    shown = status([host("a", "silent"), ...samples.many.hosts]);
    await visitPage({ viewport: { width: 1280, height: 700 } }, async (page) => {
      await page.locator(".verdict a").first().focus();
      await page.evaluate("scrollTo(0, 900)");
      const top = `document.getElementById("host-10.10.21.30").getBoundingClientRect().top`;
      const before = Number(await page.evaluate(top));
      await page.evaluate("getSelection().selectAllChildren(document.querySelector('h2'))");
      shown = status([host("a", "silent"), ...samples.many.hosts, host("z", "never")], { now: NOW + 5000 });
      await refresh(page);
      await until("the new verdict is shown", async () => (await page.title()).includes("never seen"));
      expect(await page.evaluate("document.activeElement.id")).toBe("silent-a");
      // What is read stays in place, though a line came above it.
      expect(Math.abs(Number(await page.evaluate(top)) - before)).toBeLessThan(3);
      expect(await page.evaluate("getSelection().toString()")).not.toBe("");
      const expected = renderPage(shown);
      const same = await page.evaluate(
        `new DOMParser().parseFromString(${JSON.stringify(expected)}, "text/html").querySelector("main").outerHTML ===
          document.querySelector("main").outerHTML`,
      );
      expect(same).toBe(true);
    });
  });

  test("a refresh touches only what has changed, so that nothing flickers", async () => {
    shown = samples.trouble;
    await visitPage({}, async (page) => {
      await page.evaluate(`window.touched = [];
        new MutationObserver((list) => {
          for (const { target, addedNodes } of list) {
            touched.push((target.closest ?? target.parentElement.closest).call(target.closest ? target : target.parentElement, "tr, section, header")?.id || addedNodes.length);
          }
        }).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });`);
      const hosts = samples.trouble.hosts.map((sender) => ({
        ...sender,
        lag: sender.host === "10.10.21.181" ? 77 : sender.lag,
      }));
      shown = { ...samples.trouble, hosts };
      await refresh(page);
      await until("the change is shown", async () => (await page.getByText("77 B").count()) === 1);
      const touched = (await page.evaluate("touched")) as (string | number)[];
      expect(touched.filter((id) => typeof id === "string")).toEqual(["host-10.10.21.181"]);
      expect(touched.filter((id) => typeof id === "number").every((added) => added === 0)).toBe(true);
    });
  });

  test("it refreshes by itself, says so when the receiver does not answer, and can be paused", async () => {
    shown = samples.good;
    const context = await browser().newContext();
    const page = await context.newPage();
    await page.clock.install();
    await page.goto(`http://127.0.0.1:${server.port}/`);
    shown = samples.trouble;
    await page.clock.runFor(11_000);
    await until("it has refreshed by itself", async () =>
      (await page.title()).startsWith("2 senders are silent"),
    );
    shown = undefined;
    await refresh(page);
    const stale = page.getByRole("alert");
    await until("the fault is shown", async () => (await stale.count()) === 1 && stale.isVisible());
    expect(await stale.textContent()).toMatch(/does not answer: this is the state of \d\d:\d\d/);
    shown = samples.good;
    await refresh(page);
    await until("the fault is over", async () => (await stale.count()) === 0);
    const pause = page.getByRole("button", { name: "Pause" });
    await page.keyboard.press("Tab");
    await page.keyboard.press("Enter");
    expect(await pause.getAttribute("aria-pressed")).toBe("true");
    shown = samples.trouble;
    await page.clock.runFor(60_000);
    expect(await page.title()).toStartWith("Everything arrives");
    await pause.click();
    await until("it goes on", async () => (await page.title()).startsWith("2 senders are silent"));
    await context.close();
  });

  test("without JavaScript it is whole and refreshes all the same", async () => {
    shown = samples.trouble;
    await visitPage({ javaScriptEnabled: false, viewport: { width: 360, height: 800 } }, async (page) => {
      expect(await page.locator('meta[http-equiv="refresh"]').getAttribute("content")).toBe("30");
      expect(await page.getByRole("heading", { level: 1 }).textContent()).toStartWith(
        "2\u00a0senders are silent",
      );
      expect(await page.getByRole("row").count()).toBe(9);
      expect(await page.getByRole("button").count()).toBe(0);
    });
  });

  test("a screen reader gets a table on a phone as well, with every curve in words", async () => {
    shown = samples.good;
    await visitPage({ viewport: { width: 360, height: 800 } }, async (page) => {
      const table = page.getByRole("table", { name: "Senders" });
      expect(await table.getByRole("columnheader").count()).toBe(11);
      expect(await table.getByRole("rowheader").allInnerTexts()).toContain("10.10.21.181");
      // One line for a sender that is well: its day alone.
      expect(await table.getByRole("img", { name: /^Batches of 24 hours: 7\d delivered/ }).count()).toBe(3);
      expect(await table.getByRole("img", { name: /^Lines per minute: now .*, peak / }).count()).toBe(1);
      const height = `document.getElementById("host-10.10.21.181").getBoundingClientRect().height`;
      for (const width of [360, 800, 1100]) {
        await page.setViewportSize({ width, height: 800 });
        expect(await page.evaluate(height)).toBeLessThan(40);
      }
    });
  });

  test("a sender is found by its name or state among 5,000, also after a refresh", async () => {
    shown = fleet(5000);
    await visitPage({ viewport: { width: 1280, height: 800 } }, async (page) => {
      const names = `[...document.querySelectorAll("tbody tr, .names li")].filter((e) => e.getClientRects().length > 0)
        .map((e) => e.id.slice(5) || e.textContent)`;
      const visible = async () => (await page.evaluate(names)) as string[];
      expect((await visible()).length).toBe(5000);
      await page.getByRole("button", { name: "silent 8" }).click();
      expect((await visible()).length).toBe(8);
      await page.getByRole("button", { name: "older version 13" }).click();
      expect(await visible()).toContain("10.10.39.60");
      expect((await visible()).length).toBe(13);
      await page.getByRole("button", { name: "all 5,000" }).click();
      await page.getByRole("searchbox", { name: "Find a sender" }).fill("10.10.39.24");
      const found = ["10.10.39.24", ...Array.from({ length: 10 }, (_, i) => `10.10.39.24${i}`)];
      expect((await visible()).sort()).toEqual(found.sort());
      shown = fleet(4998);
      await refresh(page);
      await until("the new fleet is shown", async () => (await page.getByText("all 4,998").count()) === 1);
      expect((await visible()).sort()).toEqual(found.filter((name) => !name.endsWith("249")).sort());
      expect(await page.locator("thead").isVisible()).toBe(false);
      expect(await page.locator(".names h3:visible").allInnerTexts()).toEqual(["ok"]);
      await page.getByRole("searchbox", { name: "Find a sender" }).fill("nobody");
      expect(await page.locator("#none").textContent()).toBe("No sender matches.");
    });
  });

  test("a click on a sender's day names the files of that window", async () => {
    const name = (window: string, part = "") => `accessLog_${window}_10-0-0-1${part}.log`;
    const batches = [
      { name: name("26112210_40-59"), place: "open" as const },
      { name: name("26112210_20-39"), place: "delivered" as const },
      { name: name("26112210_20-39", ".2"), place: "failed" as const },
    ];
    shown = status([host("10.0.0.1", "ok", { batches })]);
    await visitPage({ viewport: { width: 1280, height: 800 } }, async (page) => {
      const strip = page.locator("svg[data-w]");
      const { width = 0 } = (await strip.boundingBox()) ?? {};
      const files = page.locator("#files");
      await strip.click({ position: { x: width - 0.5, y: 8 } });
      expect(await files.textContent()).toBe(
        `10.0.0.1, 2026-11-22 10:40: \n${name("26112210_40-59")} open: still takes lines`,
      );
      await strip.click({ position: { x: width * (1 - 1.5 / 72), y: 8 } });
      expect(await files.textContent()).toBe(
        `10.0.0.1, 2026-11-22 10:20: \n${name("26112210_20-39")} delivered\n${name("26112210_20-39", ".2")} failed`,
      );
      await strip.click({ position: { x: 1, y: 8 } });
      expect(await files.textContent()).toBe("10.0.0.1, 2026-11-21 11:00: no batch");
      await page.keyboard.press("Escape");
      expect(await files.isVisible()).toBe(false);
    });
  });
});

const TOKEN = "a-token-for-this-test";

/** Starts a receiver and waits until it answers. */
async function startReceiver(configFile: string, url: string): Promise<Running> {
  const receiver = startScript("receiver", configFile, [], { TOKEN });
  await until(
    () => `the receiver answers, but:\n${receiver.output}`,
    () =>
      fetch(`${url}healthz`).then(
        ({ ok }) => ok,
        () => false,
      ),
  );
  return receiver;
}

/** Hands a request on as a proxy does whose client is not on this machine. */
async function forward(request: Request, port: number): Promise<Response> {
  const headers = new Headers(request.headers);
  headers.set("X-Forwarded-For", "10.9.8.7");
  return fetch(`http://127.0.0.1:${port}${new URL(request.url).pathname}`, { headers });
}

describe.skipIf(noBrowser)("the status page of a receiver", () => {
  test("shows senders and batches as they are, asks for a token, and its history survives kill -9 and a stop", async () => {
    const folder = await tempFolder();
    const dir = join(folder, "batches");
    const port = await freePort();
    const url = `http://127.0.0.1:${port}/`;
    const groups = [{ port, senders: ["127.0.0.1", "127.0.0.2", "web-1"] }];
    const configFile = await writeConfig(folder, {
      receiver: { dir, groups, tokens: { "*": { env: "TOKEN" } } },
    });
    await mkdir(join(dir, "web-1"), { recursive: true });
    const minute = Math.floor(Date.now() / 60_000);
    await writeFile(
      join(dir, "web-1", ".ledger"),
      formatRecord({ v: 1, minutes: { [minute - 60]: 98_765 } }),
    );
    let receiver = await startReceiver(configFile, url);
    const body = [1, 2, 3].map((n) => accessLine(n)).join("");
    const chunk = {
      host: "web-1",
      stream: "status-page-test",
      offset: 0,
      end: body.length,
      lag: 2048,
      lost: 7,
    };
    const headers = { "Content-Type": "text/plain", Authorization: `Bearer ${TOKEN}` };
    const upload = { method: "POST", headers: { ...headers, ...formatChunkHeaders(chunk) }, body };
    expect((await fetch(`${url}upload`, upload)).status).toBe(200);
    await mkdir(join(dir, "127.0.0.2"), { recursive: true });
    await writeFile(join(dir, "127.0.0.2", "accessLog_26112210_00-19_127-0-0-2.log"), "a line\n");

    const httpCredentials = { username: "any", password: TOKEN };
    const row = (page: Page, name: string) => page.getByRole("row").filter({ hasText: name });
    const look = (seen: (page: Page) => Promise<boolean>) =>
      visit(url, { viewport: { width: 1280, height: 800 }, httpCredentials }, (page) =>
        until("the page shows it", async () => {
          if (await seen(page)) return true;
          await page.reload();
          return false;
        }),
      );
    await look(async (page) => {
      const web = (await row(page, "web-1").textContent()) ?? "";
      return /ok/.test(web) && /2\.0 KiB/.test(web) && /7 B/.test(web);
    });
    await look(async (page) => /1 since \d\d:\d\d/.test((await row(page, "127.0.0.2").textContent()) ?? ""));
    await visit(url, { httpCredentials }, async (page) => {
      expect(await page.title()).toStartWith("Everything arrives, no forwarder has run here yet · ");
      expect(await page.getByText("no section monitor: judged by its defaults").count()).toBe(1);
    });

    const proxy = serve({ ...LOOPBACK, fetch: (request) => forward(request, port) });
    const elsewhere = `http://127.0.0.1:${proxy.port}/`;
    expect((await fetch(elsewhere)).headers.get("WWW-Authenticate")).toStartWith("Basic realm=");
    await visit(elsewhere, { httpCredentials }, async (page) => {
      await page.getByRole("heading", { level: 1 }).evaluate((heading) => heading.replaceChildren("old"));
      await refresh(page);
      await until(
        "it refreshes with the login",
        async () => (await page.getByText("no forwarder has run here yet").count()) > 0,
      );
    });
    await proxy.close();

    for (const signal of ["SIGKILL", "SIGTERM"] as const) {
      await receiver.stop(signal);
      receiver = await startReceiver(configFile, url);
      await look(
        async (page) => (await row(page, "web-1").getByRole("img", { name: "peak 98,765" }).count()) === 1,
      );
      const { minutes } = (await readLedger(join(dir, "web-1"))) ?? emptyLedger();
      expect([...minutes.values()]).toEqual([98_765, 3]);
    }
    await receiver.stop();
  });
});
