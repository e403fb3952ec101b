/**
 * Moving over from the Python scripts and back: the old offset is taken over, old and new shippers write to one
 * new receiver, the old receiver's folder and report are continued.
 */
import { describe, expect, setDefaultTimeout, test } from "bun:test";
import { appendFile, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { request } from "node:http";
import { join } from "node:path";
import { compareBatchNames, parseBatchName } from "../lib/batch.ts";
import { parseReportLine } from "../lib/report.ts";
import {
  accessLine,
  expectSameLines,
  freePort,
  type Running,
  runScriptOnce,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(120_000);

/** Lines `from` to `to` (exclusive). */
function lines(from: number, to: number, at?: string): string {
  return Array.from({ length: to - from }, (_, i) => accessLine(from + i, at)).join("");
}

/** A middle server in a folder of its own. */
async function startMiddle(senders: string[], legacy = true) {
  const home = await tempFolder();
  const [port, dir, target] = [await freePort(), join(home, "receiver"), join(home, "client")];
  for (const folder of [dir, target]) await mkdir(folder);
  const report = join(home, "linecount-report.log");
  const config = await writeConfig(home, {
    receiver: { groups: [{ port, senders }], dir, sealAfterSeconds: 1, legacy },
    forwarder: { dir, target: `file://${target}`, report },
  });
  const receiver = startScript("receiver", config);
  const url = `http://127.0.0.1:${port}`;
  await until("the receiver answers", () => fetch(`${url}/healthz`).catch(() => undefined));
  return { home, dir, target, report, config, receiver, url, port };
}

/** The config of a native shipper. */
async function shipperConfig(receiver: string, host: string, log: string, home: string): Promise<string> {
  const stateDir = join(home, "state");
  await mkdir(stateDir, { recursive: true });
  return writeConfig(home, { shipper: { files: [log], receiver, host, stateDir } });
}

/** The original's shipper: one POST of its JSON form, an empty line after every line, from an address of its own. */
function postLegacy(port: number, host: string, text: string): Promise<{ status: number; body: string }> {
  const body = JSON.stringify({ log: text.replaceAll("\n", "\n\n"), host });
  return new Promise((resolve, reject) => {
    const headers = { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(body) };
    const options = { host: "127.0.0.1", port, localAddress: host, method: "POST", path: "/upload", headers };
    const post = request(options, (response) => {
      let text = "";
      response.on("data", (data) => {
        text += data;
      });
      response.on("end", () => resolve({ status: response.statusCode ?? 0, body: text }));
    });
    post.on("error", reject);
    post.end(body);
  });
}

/** Everything of one host under `folders`, in the order of windows and parts. */
async function received(host: string, ...folders: string[]): Promise<string> {
  const files: { name: string; path: string }[] = [];
  for (const folder of folders) {
    const names = await readdir(folder).catch(() => []);
    for (const name of names) files.push({ name, path: join(folder, name) });
  }
  const ours = files.filter(({ name }) => parseBatchName(name)?.host === host.replaceAll(".", "-"));
  ours.sort((a, b) => compareBatchNames(a.name, b.name));
  return (await Promise.all(ours.map(({ path }) => readFile(path, "utf8")))).join("");
}

/** Waits for the batches to be sealed, delivers them and ends the receiver. */
async function deliver(middle: { dir: string; config: string; receiver: Running }, hosts: string[]) {
  for (const host of hosts) {
    await until(`${host} is sealed`, async () => {
      const names = await readdir(join(middle.dir, host)).catch(() => []);
      return names.length > 0 && !names.some((name) => name.endsWith(".part"));
    });
  }
  expect(await middle.receiver.stop()).toBe(0);
  expect(await runScriptOnce("forwarder", middle.config, ["--once"])).toMatchObject({ code: 0 });
}

describe("latest.offset", () => {
  test("shipper goes on where the original's offset file says, once", async () => {
    const host = "10.10.21.181";
    const middle = await startMiddle(["*"]);
    const log = join(middle.home, "access.log");
    const old = lines(0, 400);
    await writeFile(log, old + lines(400, 1000));
    const config = await shipperConfig(middle.url, host, log, join(middle.home, "sender"));
    const state = join(middle.home, "sender/state");
    await writeFile(join(state, "latest.offset"), `${old.length}\n`);

    expect(await runScriptOnce("shipper", config, ["--once"])).toMatchObject({ code: 0 });
    expect(await readdir(state)).toContain("latest.offset.imported");
    expect(await readdir(state)).not.toContain("latest.offset");

    await appendFile(log, lines(1000, 1100));
    expect(await runScriptOnce("shipper", config, ["--once"])).toMatchObject({ code: 0 });
    expectSameLines(await received(host, join(middle.dir, host)), lines(400, 1100));
  });

  test("shipper refuses one that holds no number or lies beyond the file, and ships nothing", async () => {
    const middle = await startMiddle(["*"]);
    const log = join(middle.home, "access.log");
    await writeFile(log, lines(0, 10));
    const config = await shipperConfig(middle.url, "10.10.21.181", log, join(middle.home, "sender"));
    for (const text of ["what?\n", "", "-1", String(lines(0, 10).length + 1)]) {
      await writeFile(join(middle.home, "sender/state/latest.offset"), text);
      const { code, output } = await runScriptOnce("shipper", config, ["--once"]);
      expect(code).toBe(1);
      expect(output).toContain("latest.offset");
    }
    expect(await readdir(middle.dir)).not.toContain("10.10.21.181");
  });
});

test("old and new shippers side by side on one receiver: all lines, right files", async () => {
  const legacy = ["127.0.0.2", "127.0.0.3"];
  const native = ["10.10.21.183", "10.10.21.184"];
  const middle = await startMiddle([...legacy, "127.0.0.1", ...native]);
  const shippers = native.map(async (host) => {
    const home = join(middle.home, host);
    const log = join(middle.home, `${host}.log`);
    await writeFile(log, lines(0, 300));
    const shipper = startScript("shipper", await shipperConfig(middle.url, host, log, home));
    return { log, shipper };
  });
  const started = await Promise.all(shippers);
  for (let round = 0; round < 10; round++) {
    for (const host of legacy) {
      const text = lines(round * 50, (round + 1) * 50, "22/Nov/2026:06:45:01 +0600");
      expect(await postLegacy(middle.port, host, text)).toMatchObject({ status: 200, body: "OK - 50 lines" });
    }
    for (const { log } of started) await appendFile(log, lines(300 + round * 20, 320 + round * 20));
  }
  for (const host of native) {
    await until(`${host} arrived`, async () => {
      return (await received(host, join(middle.dir, host))).length === lines(0, 500).length;
    });
  }
  for (const { shipper } of started) expect(await shipper.stop()).toBe(0);
  await deliver(middle, [...legacy, ...native]);
  for (const host of native) expectSameLines(await received(host, middle.target), lines(0, 500));
  for (const host of legacy) {
    expectSameLines(await received(host, middle.target), lines(0, 500, "22/Nov/2026:06:45:01 +0600"));
    const name = `accessLog_26112206_40-59_${host.replaceAll(".", "-")}.log`;
    expect((await readdir(middle.target)).filter((file) => file.startsWith(name.slice(0, -4)))).toContain(
      name,
    );
  }
});

describe("the original's form is refused", () => {
  test("while receiver.legacy is off", async () => {
    const middle = await startMiddle(["127.0.0.2"], false);
    expect((await postLegacy(middle.port, "127.0.0.2", lines(0, 1))).status).toBe(415);
    expect(await readdir(middle.dir)).not.toContain("127.0.0.2");
  });

  test("from an address that is not listed", async () => {
    const middle = await startMiddle(["127.0.0.2"]);
    const unlisted = await postLegacy(middle.port, "127.0.0.9", lines(0, 1));
    expect(unlisted).toMatchObject({ status: 403 });
    expect(await readdir(middle.dir)).not.toContain("127.0.0.9");
  });
});

test("the old receiver's folder and report are continued, and nothing of the old is overwritten", async () => {
  const host = "10.10.21.181";
  const middle = await startMiddle(["*"]);
  const name = "accessLog_26112206_20-39_10-10-21-181.log";
  const earlier = "accessLog_26112206_00-19_10-10-21-181.log";
  await mkdir(join(middle.dir, host));
  await mkdir(join(middle.dir, "sent"));
  await writeFile(join(middle.dir, host, name), lines(0, 50));
  await writeFile(join(middle.dir, "sent", earlier), lines(900, 950, "22/Nov/2026:06:05:01 +0600"));
  const history = `2026-11-22 06:25:01 | ${earlier} | lines=50 | status=Sent\n`;
  await writeFile(middle.report, history);

  // Lines of windows that the old receiver had already: they must come as a new part.
  const log = join(middle.home, "access.log");
  const late = "22/Nov/2026:06:05:02 +0600";
  await writeFile(log, lines(950, 960, late) + lines(50, 80));
  const config = await shipperConfig(middle.url, host, log, join(middle.home, "sender"));
  expect(await runScriptOnce("shipper", config, ["--once"])).toMatchObject({ code: 0 });
  await deliver(middle, [host]);

  const at = (file: string) => readFile(join(middle.target, file), "utf8");
  expectSameLines(await at(name), lines(0, 50));
  expectSameLines(await at(name.replace(".log", ".2.log")), lines(50, 80));
  expectSameLines(await at(earlier.replace(".log", ".2.log")), lines(950, 960, late));
  expect(await readdir(join(middle.dir, "sent"))).toContain(earlier);

  const report = await readFile(middle.report, "utf8");
  expect(report).toStartWith(history);
  const entries = report.trimEnd().split("\n").map(parseReportLine);
  expect(entries).toHaveLength(4);
  expect(entries.map((entry) => entry?.batch)).toContain(name);
  expect(entries.every((entry) => entry?.status === "Sent")).toBe(true);
});

test("going back: what the new scripts leave is what the old ones know", async () => {
  const host = "10.10.21.181";
  const middle = await startMiddle(["*"]);
  const log = join(middle.home, "access.log");
  await writeFile(log, lines(0, 200));
  const config = await shipperConfig(middle.url, host, log, join(middle.home, "sender"));
  expect(await runScriptOnce("shipper", config, ["--once"])).toMatchObject({ code: 0 });
  // The number that the old shipper's latest.offset needs.
  const { code, output } = await runScriptOnce("shipper", config, ["--status"]);
  expect(code).toBe(0);
  expect(output).toContain(String(lines(0, 200).length));

  await until("the batch is sealed", async () =>
    (await readdir(join(middle.dir, host))).some((name) => name.endsWith("_10-10-21-181.log")),
  );
  expect(await middle.receiver.stop()).toBe(0);
  const visible = (await readdir(join(middle.dir, host))).filter((name) => !name.startsWith("."));
  expect(visible).toEqual(["accessLog_26112206_20-39_10-10-21-181.log"]);
  expectSameLines(await received(host, join(middle.dir, host)), lines(0, 200));
});
