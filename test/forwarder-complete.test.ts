/** The proof for the client, end to end: real shippers, the real receiver and forwarder, `sha256sum -c`, verify.sh. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { execFileSync, spawnSync } from "node:child_process";
import { appendFileSync, writeFileSync } from "node:fs";
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { formatHour } from "../lib/digest.ts";
import { createSender, startRealReceiver } from "./pipeline.ts";
import { accessLine, ROOT, runScriptOnce, startScript, tempFolder, until, writeConfig } from "./support.ts";

setDefaultTimeout(120_000);

const HOUR = 3_600_000;

/** A time as nginx writes it, in UTC. */
function logTime(at: number): string {
  const [, day, month, year, time] =
    /^\w+, (\d\d) (\w+) (\d+) ([\d:]+)/.exec(new Date(at).toUTCString()) ?? [];
  return `${day}/${month}/${year}:${time} +0000`;
}

test("complete yes: only when every sender has told that all was shipped, and all of it is delivered", async () => {
  const receiver = await startRealReceiver({ sealAfterSeconds: 0.2 });
  const senders = await Promise.all([1, 2].map(() => createSender(receiver.url, { heartbeatSeconds: 0.3 })));
  const at = Date.now() - 2 * HOUR;
  const hour = formatHour(at, 0);
  const flag = `20${hour.slice(0, 2)}-${hour.slice(2, 4)}-${hour.slice(4, 6)}T${hour.slice(6)}`;
  const root = await tempFolder();
  const client = join(root, "client");
  await mkdir(client);
  const config = await writeConfig(root, {
    forwarder: {
      dir: receiver.dir,
      target: `file://${client}`,
      digest: true,
      intervalSeconds: 0.2,
      report: join(root, "report.log"),
    },
  });
  const names = async (ending: string) =>
    (await readdir(client)).filter((name) => name.endsWith(ending)).sort();
  const running = senders.map((sender) => {
    sender.write(accessLine(1, logTime(at)).repeat(50));
    return sender.start();
  });
  // one that is sealed between a delivery and the hour's digest comes in .2, with the next hour's
  await until("both batches are sealed", async () => {
    const files = await readdir(receiver.dir, { recursive: true });
    return files.filter((name) => name.endsWith(".log")).length === 2;
  });
  const forwarder = startScript("forwarder", config);
  // its hour had begun before the record: numbered by the clock
  const parts = async () => (await names(".sha256")).filter((name) => name.includes(`_${hour}.`));
  await until("the hour's digest is there", async () => (await parts()).length > 0, 60_000);
  const isComplete = async () => {
    const last = (await parts()).at(-1) ?? "";
    return (await readFile(join(client, last), "utf8")).includes("\n# complete yes\n");
  };
  await until(() => `it says complete yes:\n${forwarder.output}`, isComplete, 60_000);
  expect(await names(".log")).toHaveLength(2);

  // what its digest says, any tool of the client's can check
  for (const digest of await names(".sha256"))
    execFileSync("sha256sum", ["-c", "--quiet", digest], { cwd: client });
  const verified = await runScriptOnce("forwarder", config, ["--verify", client]);
  const script = spawnSync("sh", [join(ROOT, "deploy/verify.sh"), client], { encoding: "utf8" });
  expect(verified.output).toEndWith("\nok\n");
  expect({ output: script.stdout, code: script.status }).toEqual({ output: verified.output, code: 0 });
  const told = await runScriptOnce("forwarder", config, ["--hour", flag, "--json"]);
  expect(JSON.parse(told.output)).toMatchObject({
    complete: true,
    rows: [
      { batches: 1, read: 50, lines: 50, source: "digest", missing: [] },
      { batches: 1, read: 50, lines: 50, source: "digest", missing: [] },
    ],
  });
  expect(told.code).toBe(0);

  // a line that nginx writes late: the shipper has it, the client not yet
  await running[0]?.stop();
  senders[0]?.write(accessLine(2, logTime(at)));
  running[0] = senders[0]?.start() as (typeof running)[0];
  await until("it comes", async () => (await names(".log")).length === 3, 60_000);
  await running[0].stop();
  await running[1]?.stop();
  expect(await forwarder.stop()).toBe(0);
  const late = await runScriptOnce("forwarder", config, ["--hour", flag, "--json"]);
  const rows = JSON.parse(late.output).rows as { late: number; lines: number }[];
  expect(rows.map((row) => row.late).sort()).toEqual([0, 1]);
  expect(rows.reduce((sum, row) => sum + row.lines, 0)).toBe(101);

  // lost at the client: found by name; the late part is in no digest before the next hour's
  const lost = (await names(".log")).find((name) => !name.includes(".2.")) ?? "";
  writeFileSync(join(client, lost), "");
  appendFileSync(join(client, "notes.txt"), "the client's own\n");
  const found = await runScriptOnce("forwarder", config, ["--verify", client]);
  expect(found.output).toMatch(new RegExp(`^changed: ${lost}\nextra: accessLog_${hour}_\\S+[.]2[.]log\n`));
});
