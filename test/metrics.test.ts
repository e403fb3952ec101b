import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, rmSync } from "node:fs";
import { appendFile, mkdir, readFile, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { parseConfig } from "../lib/config.ts";
import { createApp, Receiver } from "../receiver.ts";
import { lines, startRealReceiver } from "./pipeline.ts";
import { post, quiet } from "./sending.ts";
import { accessLine, onCleanup, startScript, tempFolder, until, writeConfig } from "./support.ts";

interface Family {
  name: string;
  help: string;
  type: string;
  metrics: {
    value?: string;
    labels?: Record<string, string>;
    buckets?: Record<string, string>;
    count?: string;
  }[];
}
const parse: (text: string) => Family[] = createRequire(import.meta.url)("parse-prometheus-text-format");

const PREFIX = "log_rt_sync_receiver_";
const LINE = accessLine(1);

/** What a scrape gives after some chunks, a repeat and a refused request. */
async function scrape(): Promise<{ text: string; families: Map<string, Family> }> {
  const dir = join(await tempFolder(), "data");
  await mkdir(dir);
  const section = { dir, groups: [{ port: 5001, senders: ["*"] }] };
  const config = parseConfig(JSON.stringify({ receiver: section }), "receiver");
  const signal = new AbortController().signal;
  const receiver = new Receiver(config, { log: quiet, now: () => 1_800_000_000_000, signal });
  onCleanup(() => receiver.store.close());
  const app = createApp(receiver);
  const arrival = { peer: "127.0.0.1", group: 0 };
  const send = (...request: Parameters<typeof post>) => app.fetch(post(...request), arrival);
  await send("http://x", LINE + LINE, { lag: 5000, lost: 42 });
  await send("http://x", LINE + LINE);
  await send("http://x", LINE, { host: "2001:db8::1" });
  await send("http://x", LINE.repeat(1000), { host: "10.0.0.2" });
  await send("http://x", LINE, { host: "no/host" });
  const answer = await app.fetch(
    new Request("http://x/metrics", { headers: { Host: "127.0.0.1" } }),
    arrival,
  );
  expect(answer.headers.get("Content-Type")).toBe("text/plain; version=0.0.4; charset=utf-8");
  const text = await answer.text();
  return { text, families: new Map(parse(text).map((family) => [family.name, family])) };
}

describe("/metrics", () => {
  test("is read by a parser of Prometheus' text format, with the values that are true", async () => {
    const { families } = await scrape();
    const value = (name: string, labels: Record<string, string> = {}) => {
      const metrics = families.get(PREFIX + name)?.metrics ?? [];
      const found = metrics.find((metric) => Bun.deepEquals(metric.labels ?? {}, labels));
      return found?.value === undefined ? undefined : Number(found.value);
    };
    const host = { host: "10.0.0.1" };
    expect(value("lines_total", host)).toBe(2);
    expect(value("lines_total", { host: "2001:db8::1" })).toBe(1);
    expect(value("bytes_total", host)).toBe(2 * LINE.length);
    expect(value("bytes_total", { host: "10.0.0.2" })).toBe(1000 * LINE.length); // its memory is given back by then
    expect(value("chunks_total", host)).toBe(1);
    expect(value("duplicates_total", host)).toBe(1);
    expect(value("refused_total", { status: "400", reason: "malformed request" })).toBe(1);
    expect(value("last_seen_timestamp_seconds", host)).toBe(1_800_000_000);
    expect(value("last_line_timestamp_seconds", host)).toBe(1_800_000_000);
    expect(value("lag_bytes", host)).toBe(5000);
    expect(value("lost_bytes_total", host)).toBe(42);
    expect(value("open_batches", host)).toBe(1);
    expect(value("undelivered_bytes", host)).toBe(2 * LINE.length);
    expect(value("sealed_batches", host)).toBe(0);
    expect(value("disk_free_bytes")).toBeGreaterThan(0);
    const commits = families.get(`${PREFIX}commit_duration_seconds`);
    expect(commits?.type).toBe("HISTOGRAM");
    expect(Number(commits?.metrics[0]?.count)).toBe(4);
    expect(Number(commits?.metrics[0]?.buckets?.["+Inf"])).toBe(4);
  });

  test("follows the guide of names: one prefix, base units, _total on counters and nowhere else", async () => {
    const { text, families } = await scrape();
    expect(families.size).toBeGreaterThan(15);
    for (const { name, type, help } of families.values()) {
      expect(name).toMatch(/^log_rt_sync_receiver_[a-z]+(_[a-z]+)*$/);
      expect(name).not.toMatch(/(ms|millis|milliseconds|minutes|kb|mb|percent)(_|$)/);
      expect({ name, isCounter: type === "COUNTER" }).toEqual({ name, isCounter: name.endsWith("_total") });
      expect(help).toMatch(/^[A-Z].+\.$/);
    }
    expect(text.endsWith("\n")).toBe(true);
    const heads = text.split("\n").filter((line) => line.startsWith("# TYPE"));
    expect(new Set(heads).size).toBe(heads.length);
    const buckets = [...text.matchAll(/_bucket\{le="[^"]+"\} (\d+)/g)].map((match) => Number(match[1]));
    expect(buckets).toEqual([...buckets].sort((a, b) => a - b));
  });
});

test("a shipper leaves its figures in its state folder, and ships on where it can't", async () => {
  const home = await tempFolder();
  const receiver = await startRealReceiver();
  const [log, stateDir] = [join(home, "access.log"), join(home, "state")];
  await writeFile(log, lines("m", 1, 3));
  const section = { files: [log], receiver: receiver.url, host: "10.0.0.1", stateDir };
  const config = await writeConfig(home, { shipper: section });
  const metrics = join(stateDir, "shipper.prom");
  const first = startScript("shipper", config);
  await until("the first figures", () => existsSync(metrics));
  const families = new Map(parse(await readFile(metrics, "utf8")).map((each) => [each.name, each]));
  expect(families.get("log_rt_sync_shipper_lag_bytes")?.type).toBe("GAUGE");
  expect(families.get("log_rt_sync_shipper_lines_total")?.type).toBe("COUNTER");
  expect(families.get("log_rt_sync_shipper_build_info")?.metrics[0]?.labels?.version).toMatch(/^\d/);
  expect(await first.stop()).toBe(0);
  rmSync(metrics);
  mkdirSync(join(metrics, "in-the-way"), { recursive: true });
  const second = startScript("shipper", config);
  await second.says("cannot write metrics: shipping goes on");
  await appendFile(log, lines("m", 4, 4));
  await until("the line", () => receiver.stored("10.0.0.1").includes("/m/4 "));
  expect(await second.stop()).toBe(0);
});
