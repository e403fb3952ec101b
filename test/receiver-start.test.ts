/** What the receiver says of its config when it starts, and what `--forget` refuses. */
import { describe, expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { formatNews, HEADER, STREAMS_PATH } from "../lib/chunk.ts";
import { moveDurably } from "../lib/durable.ts";
import { formatRecord, readLedger } from "../lib/ledger.ts";
import { post } from "./sending.ts";
import {
  accessLine,
  freePort,
  missing,
  runScriptOnce,
  selfSigned,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

async function section(options: object = {}) {
  const folder = await tempFolder();
  const port = await freePort();
  const receiver = { dir: join(folder, "data"), groups: [{ port, senders: ["*"] }], ...options };
  return { folder, port, receiver };
}

describe("a config that can't work ends with 78, and says all that is wrong at once", () => {
  test("a logFormat without a time, a sender whose name no file name has room for, clientName without clientCa", async () => {
    const long = `${"a.".repeat(115)}example`;
    const { folder, receiver } = await section({ logFormat: ["$time_local", "$request"] });
    receiver.groups[0]?.senders.splice(0, 1, long);
    const { code, output } = await runScriptOnce("receiver", await writeConfig(folder, { receiver }));
    expect(code).toBe(78);
    expect(output).toMatch(/receiver\.logFormat\[1\]: .*\$time_local, \$time_iso8601 or \$msec/);
    expect(output).toMatch(/longer than 20\d characters/);
    expect(existsSync(receiver.dir)).toBe(false);
  });

  test.skipIf(missing({ openssl: "openssl" }))("a key of another certificate", async () => {
    const [one, other] = [await selfSigned(), await selfSigned()];
    const { folder, receiver } = await section({ tls: { cert: one.cert, key: other.key } });
    const { code, output } = await runScriptOnce("receiver", await writeConfig(folder, { receiver }));
    expect(code).toBe(78);
    expect(output).toContain("is not the key of");
  });
});

test("warns of an ambiguous logFormat with its remedy, of timestampPattern, and of a faulty monitor section", async () => {
  const { folder, receiver } = await section({
    logFormat: "$http_a [$time_local] $http_b",
    timestampPattern: "(x)",
  });
  const monitor = { dir: receiver.dir, silentMinutes: -1 };
  const running = startScript("receiver", await writeConfig(folder, { receiver, monitor }));
  await running.says("receiver listens");
  for (const text of ["$http_a, $http_b", "quotes around them", "set logFormat", "monitor.silentMinutes"])
    expect(running.output).toContain(text);
  expect(await running.stop()).toBe(0);
});

test("--forget refuses a host that is not known, has batches, or was heard in the last hour", async () => {
  const { folder, port, receiver } = await section({ sealAfterSeconds: 0 });
  const config = await writeConfig(folder, { receiver });
  const running = startScript("receiver", config);
  await running.says("receiver listens");
  const forget = (host: string) => runScriptOnce("receiver", config, ["--forget", host]);
  expect((await forget("../x")).code).toBe(2);
  expect(await forget("10.0.0.1")).toMatchObject({ code: 1, output: expect.stringContaining("not known") });
  expect((await fetch(post(`http://127.0.0.1:${port}`, accessLine(1)))).status).toBe(200);
  expect(await forget("10.0.0.1")).toMatchObject({ code: 1, output: expect.stringContaining("wait") });
  await running.says("batch sealed");
  await running.stop();
  const name = "accessLog_26112206_20-39_10-0-0-1.log";
  await moveDurably(join(receiver.dir, "10.0.0.1", name), join(folder, name));
  expect(await forget("10.0.0.1")).toMatchObject({
    code: 1,
    output: expect.stringContaining("less than an hour"),
  });
  expect(existsSync(join(receiver.dir, "10.0.0.1", ".forget"))).toBe(false);
});

test("--forget leaves a mark, which is taken once: the host may come back, and one that did is not forgotten", async () => {
  const { folder, port, receiver } = await section();
  const config = await writeConfig(folder, { receiver });
  const heardAt = Date.now() - 7_200_000;
  for (const host of ["10.0.0.1", "10.0.0.2"]) {
    await mkdir(join(receiver.dir, host), { recursive: true });
    const streams = { "stream-0001": { offset: 5, at: heardAt } };
    await writeFile(join(receiver.dir, host, ".ledger"), formatRecord({ v: 2, heardAt, streams }));
    expect((await runScriptOnce("receiver", config, ["--forget", host])).code).toBe(0);
  }
  const ledger = async (host: string) => readLedger(join(receiver.dir, host));
  const marks = () => ["10.0.0.1", "10.0.0.2"].map((host) => existsSync(join(receiver.dir, host, ".forget")));
  await writeFile(join(receiver.dir, "10.0.0.2", ".ledger"), formatRecord({ v: 2, heardAt: Date.now() }));
  const running = startScript("receiver", config);
  await running.says("host forgotten host=10.0.0.1");
  await running.says('host not forgotten host=10.0.0.2 reason="it was heard in the last hour"');
  await until("both marks are taken", () => !marks().includes(true));
  expect((await ledger("10.0.0.1"))?.streams.size).toBe(0);
  const news = { [HEADER.host]: "10.0.0.1", ...formatNews({ shipper: "shipper-of-this-test", lag: 7 }) };
  const asked = await fetch(`http://127.0.0.1:${port}${STREAMS_PATH}`, { method: "POST", headers: news });
  expect(await asked.json()).toEqual({ host: "10.0.0.1", streams: [] });
  expect(await running.stop()).toBe(0);
  expect((await ledger("10.0.0.1"))?.facts).toMatchObject({ lag: 7 });
  expect((await ledger("10.0.0.1"))?.facts).not.toHaveProperty("forgotten");
});

test("SIGHUP takes up senders and tokens; a faulty config is told and the old one stays, as what needs a restart", async () => {
  const { folder, port, receiver } = await section();
  const token = join(folder, "token");
  await writeFile(token, "a-token-of-22-letters-", { mode: 0o600 });
  const config = await writeConfig(folder, { receiver });
  const running = startScript("receiver", config);
  await running.says("receiver listens");
  let offset = 0;
  const send = async (headers: Record<string, string> = {}) => {
    const answer = await fetch(post(`http://127.0.0.1:${port}`, accessLine(1), { offset, headers }));
    if (answer.status === 200) offset += accessLine(1).length;
    return answer.status;
  };
  const reload = async (next: object, says: string) => {
    await writeConfig(folder, { receiver: next });
    running.process.kill("SIGHUP");
    await running.says(says);
  };
  const shown = { Authorization: "Bearer a-token-of-22-letters-" };
  expect(await send()).toBe(200);
  await reload({ ...receiver, groups: [] }, "config not taken up");
  expect(await send()).toBe(200);
  await reload({ ...receiver, tokens: { "*": { file: token } } }, "config read again");
  expect(await send()).toBe(401);
  expect(await send(shown)).toBe(200);
  const moved = { dir: join(folder, "other"), groups: [{ port: port + 1, senders: ["*"] }] };
  await reload({ ...receiver, ...moved }, "needRestart");
  expect(running.output).toContain('needRestart="dir, groups"');
  expect(await send()).toBe(200);
  expect(existsSync(moved.dir)).toBe(false);
  expect(await running.stop()).toBe(0);
});
