/** One folder at one minute: the page, the mail, `--status` and the metrics say the same, with real scripts. */
import { expect, test } from "bun:test";
import { mkdir, readdir, readFile, utimes, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { simpleParser } from "mailparser";
import { formatRecord } from "../lib/ledger.ts";
import type { Snapshot } from "../lib/status.ts";
import { freePort, runScriptOnce, startScript, tempFolder, until, writeConfig } from "./support.ts";

const HOUR = 3_600_000;
const LINE = "GET /what-a-line-says HTTP/1.1\n";
const TOKEN = "a-token-for-this-test";
const SILENT_BATCH = "accessLog_26112206_20-39_10-0-0-2.log";
const FAILED_BATCH = "accessLog_26112206_40-59_10-0-0-2.log";

/** A folder in which much is wrong, and the config of all who look at it. */
async function troubledFolder(port: number) {
  const folder = await tempFolder();
  const dir = join(folder, "batches");
  const now = Date.now();
  const ledger = (heardAt: number) => formatRecord({ v: 2, heardAt, lineAt: heardAt, lost: 0 });
  for (const name of ["10.0.0.1", "10.0.0.2", "failed"]) await mkdir(join(dir, name), { recursive: true });
  await writeFile(join(dir, "10.0.0.1", ".ledger"), ledger(now));
  await writeFile(join(dir, "10.0.0.2", ".ledger"), ledger(now - 3 * HOUR));
  await writeFile(join(dir, "10.0.0.2", SILENT_BATCH), LINE);
  await utimes(join(dir, "10.0.0.2", SILENT_BATCH), new Date(now - 2 * HOUR), new Date(now - 2 * HOUR));
  await writeFile(join(dir, "failed", FAILED_BATCH), LINE);
  const fault = { kind: "login", text: "client refuses the key", since: now - HOUR };
  const failed = { [FAILED_BATCH]: { attempts: 3, nextAt: now, reason: "quota exceeded" } };
  const state = { version: 1, at: now, ok: false, fault, failed };
  await writeFile(join(dir, ".forwarder-state.json"), JSON.stringify(state));
  const mails = join(folder, "mails");
  const file = await writeConfig(folder, {
    receiver: { dir, groups: [{ port, senders: ["*"] }], tokens: { "*": { env: "TOKEN" } } },
    monitor: {
      dir,
      expected: ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
      silentMinutes: 0.02,
      silentMinutesByHost: { "10.0.0.1": 999 },
      minFreePercent: 0,
      stateFile: join(folder, "monitor.json"),
      report: join(folder, "report.log"),
      mail: { smtp: `file://${mails}`, from: "logs@example.com", to: ["ops@example.com"] },
    },
  });
  return { file, mails };
}

/** Durations go on between two looks. */
const timeless = (text: string) =>
  text.replace(/\b\d+[smhd]( \d+[smh])?\b/g, "…").replace(/\d+ times/g, "… times");
const decode = (text: string) => text.replace(/&#(\d+);/g, (_, code) => String.fromCharCode(Number(code)));
const withoutTags = (text: string) => decode(text.replace(/<[^>]*>/g, "")).replace(/\s+/g, " ");

test("the page, the mail, --status and the metrics say the same of one folder, and nothing of the lines in it", async () => {
  const port = await freePort();
  const url = `http://127.0.0.1:${port}/`;
  const { file, mails } = await troubledFolder(port);
  const receiver = startScript("receiver", file, [], { TOKEN });
  const see = async (path = "") =>
    (await fetch(`${url}${path}`, { headers: { Authorization: `Bearer ${TOKEN}` } })).text();
  await until(
    () => `the receiver answers:\n${receiver.output}`,
    () => see("healthz").catch(() => false),
  );
  const strange = { Authorization: "Bearer wrong", "Log-Host": "10.0.0.4", "Content-Type": "text/plain" };
  const range = {
    "Log-Stream": "stream-of-a-stranger",
    "Log-Begin": "1",
    "Upload-Offset": "0",
    "Upload-End": "2",
  };
  for (let i = 0; i < 3; i++) {
    const { status } = await fetch(`${url}upload`, {
      method: "POST",
      headers: { ...strange, ...range },
      body: "a\n",
    });
    expect(status).toBe(401);
  }
  const knows = ["1 sender is silent", "1 sender was never seen", "1 sender is refused"];
  await until("the page knows it all", async () => {
    const text = withoutTags(await see());
    return knows.every((part) => text.includes(part)) || undefined;
  });
  const run = await runScriptOnce("monitor", file, []);
  expect(run.code).toBe(0);
  const status = await runScriptOnce("monitor", file, ["--status", "--json"]);
  const { problems, hosts } = JSON.parse(status.output) as Snapshot;
  const words = (await runScriptOnce("monitor", file, ["--status"])).output;
  await until(
    "the page has seen the monitor",
    async () => !/no monitor has run/i.test(await see()) || undefined,
  );
  const page = await see();

  expect(problems.map(({ key }) => key)).toEqual([
    "silent",
    "never",
    "refused",
    "forwarder login",
    "late",
    "failed",
  ]);
  const titles = [...page.matchAll(/<li><b>([^<]*)<\/b>/g)].map(([, text = ""]) =>
    decode(text).toLowerCase(),
  );
  expect(titles).toEqual(problems.map((problem) => problem.title.toLowerCase()));
  const title = /<title>([^<]*)/.exec(page)?.[1] ?? "";
  expect(decode(title)).toStartWith(`${words.split("\n")[0]} · `);
  const verdict = timeless(withoutTags(/<section class="verdict[\s\S]*?<\/section>/.exec(page)?.[0] ?? ""));
  for (const problem of problems) {
    const told = `${problem.title}: ${problem.text}`;
    expect(verdict.toLowerCase()).toContain(timeless(told).toLowerCase());
    expect(timeless(words).toLowerCase()).toContain(timeless(told).toLowerCase());
  }
  const [name = ""] = await readdir(mails);
  const mail = (await simpleParser(await readFile(join(mails, name)))).text ?? "";
  for (const problem of problems) {
    if (problem.key === "silent" || problem.key === "never") {
      for (const host of problem.hosts) expect(mail).toMatch(new RegExp(`${host} (silent since|never seen)`));
    } else
      expect(timeless(mail).toLowerCase()).toContain(
        timeless(`${problem.title}\n  ${problem.text}`).toLowerCase(),
      );
  }
  expect(mail).toContain("Senders now: 1 silent, 1 never seen, 1 ok.");

  const metrics = await see("metrics");
  const metric = (what: string, host: string) =>
    Number(new RegExp(`^log_rt_sync_receiver_${what}\\{host="${host}"\\} (.*)$`, "m").exec(metrics)?.[1]);
  for (const { host, waiting, failed, open, heardAt, state } of hosts) {
    expect(metric("sealed_batches", host)).toBe(waiting);
    expect(metric("failed_batches", host)).toBe(failed);
    expect(metric("open_batches", host)).toBe(open);
    expect(metric("last_seen_timestamp_seconds", host)).toBe(heardAt / 1000);
    expect(page).toContain(`id="host-${host}" data-s="${state}"`);
  }
  const quoted = (text: string) => `"${text.replace(/["\\]/g, "\\$&")}"`;
  for (const { key, leg, title } of problems)
    expect(metrics).toContain(
      `log_rt_sync_receiver_problem{key=${quoted(key)},leg=${quoted(leg)},title=${quoted(title)}} 1\n`,
    );
  expect(page).not.toContain("no section monitor");
  for (const text of [page, mail, metrics, words, status.output, receiver.output, run.output])
    expect(text).not.toContain("what-a-line-says");
  await receiver.stop();
});
