/** deploy/alerts.yml and all metrics of the scripts, by Prometheus' own promtool; every metric of a rule is really told. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import {
  accessLine,
  findProgram,
  freePort,
  missing,
  ROOT,
  runScriptOnce,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(60_000);

const RULES = join(ROOT, "deploy/alerts.yml");
const absent = missing({ promtool: "prometheus" });

function promtool(args: string[], input = "") {
  const { status, stdout, stderr } = spawnSync(findProgram("promtool") ?? "promtool", args, {
    encoding: "utf8",
    input,
  });
  return { code: status, output: stdout + stderr };
}

test.skipIf(absent)("promtool check rules accepts alerts.yml", () => {
  expect(promtool(["check", "rules", RULES])).toEqual({
    code: 0,
    output: expect.stringContaining("SUCCESS"),
  });
});

test.skipIf(absent)(
  "promtool check metrics accepts what the scripts tell, and the rules use no other",
  async () => {
    const told = await allMetrics();
    expect(promtool(["check", "metrics"], told)).toEqual({ code: 0, output: "" });
    const names = new Set((await readFile(RULES, "utf8")).match(/log_rt_sync_[a-z_]+/g));
    for (const name of names) expect(told).toContain(`# TYPE ${name.replace(/_bucket$/, "")} `);
  },
);

test.skipIf(absent)("a rule fires when it should, and not before", async () => {
  const file = join(await tempFolder(), "tests.yml");
  await writeFile(file, RULE_TESTS.replace("RULES", RULES));
  expect(promtool(["test", "rules", file])).toEqual({ code: 0, output: expect.stringContaining("SUCCESS") });
});

/** Of all parts that tell any, after one line went through and one request was refused. */
async function allMetrics(): Promise<string> {
  const home = await tempFolder();
  const [dir, stateDir, target] = [join(home, "received"), join(home, "state"), join(home, "target")];
  for (const folder of [dir, stateDir, target]) await mkdir(folder);
  await writeFile(join(home, "access.log"), accessLine(1));
  const port = await freePort();
  const config = await writeConfig(home, {
    shipper: {
      files: [join(home, "access.log")],
      receiver: `http://127.0.0.1:${port}`,
      host: "10.0.0.1",
      stateDir,
    },
    receiver: { groups: [{ port, senders: ["10.0.0.1", "127.0.0.1"] }], dir, sealAfterSeconds: 0 },
    forwarder: { dir, target: `file://${target}`, report: join(home, "report.log") },
    housekeep: { dir, report: join(home, "report.log") },
  });
  startScript("receiver", config);
  const at = (path: string) => `http://127.0.0.1:${port}${path}`;
  await until("the receiver answers", () => fetch(at("/healthz")).catch(() => undefined));
  await fetch(at("/upload"), { method: "POST", headers: { "Log-Host": "10.9.9.9" }, body: "x\n" });
  const shipper = startScript("shipper", config);
  const own = join(stateDir, "shipper.prom");
  await until("the line is stored", async () =>
    /^log_rt_sync_receiver_lines_total\{.*\} 1$/m.test(await (await fetch(at("/metrics"))).text()),
  );
  const shipped = await until("the shipper tells", () => readFile(own, "utf8").catch(() => ""));
  await shipper.stop();
  await until("the batch is sealed", async () =>
    (await readdir(join(dir, "10.0.0.1"))).some((name) => name.endsWith(".log")),
  );
  expect(await runScriptOnce("forwarder", config, ["--once"])).toMatchObject({ code: 0 });
  expect(await runScriptOnce("housekeep", config)).toMatchObject({ code: 0 });
  const forwarded = await readFile(join(dir, ".metrics/forwarder.prom"), "utf8");
  const housekept = await readFile(join(dir, ".metrics/housekeep.prom"), "utf8");
  return `${await (await fetch(at("/metrics"))).text()}${shipped}${forwarded}${housekept}`;
}

const RULE_TESTS = `
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - { series: 'log_rt_sync_receiver_last_seen_timestamp_seconds{host="a",instance="m:5001"}', values: '60x20' }
      - { series: 'log_rt_sync_receiver_last_seen_timestamp_seconds{host="never",instance="m:5001"}', values: '0x20' }
      - { series: 'log_rt_sync_receiver_failed_batches{host="a",instance="m:5001"}', values: '0x4 1x10' }
      - { series: 'log_rt_sync_receiver_lost_bytes_total{host="a",instance="m:5001"}', values: '0x5 512x10' }
      - { series: 'log_rt_sync_receiver_sealed_batches{host="a",instance="m:5001"}', values: '1x40' }
      - { series: 'log_rt_sync_receiver_sealed_batches{host="b",instance="m:5001"}', values: '1x10 0x1 1x30' }
    alert_rule_test:
      - { eval_time: 6m, alertname: LogRtSyncSenderSilent, exp_alerts: [] }
      - eval_time: 9m
        alertname: LogRtSyncSenderSilent
        exp_alerts:
          - exp_labels: { host: a, instance: 'm:5001', severity: critical }
            exp_annotations:
              summary: Nothing is heard from a for 8m 0s
              do: systemctl status log-rt-sync-shipper, on that host; its lines wait there
      - { eval_time: 6m, alertname: LogRtSyncBatchRefused, exp_alerts: [] }
      - eval_time: 11m
        alertname: LogRtSyncBatchRefused
        exp_alerts:
          - exp_labels: { host: a, instance: 'm:5001', severity: critical }
            exp_annotations:
              summary: The client's server refuses batches of a (1)
              do: forwarder.ts --status names the reason
      - { eval_time: 5m, alertname: LogRtSyncBytesLost, exp_alerts: [] }
      - eval_time: 35m
        alertname: LogRtSyncDeliveryLate
        exp_alerts:
          - exp_labels: { host: a, instance: 'm:5001', severity: critical }
            exp_annotations:
              summary: Batches of a wait for the client's server for half an hour
              do: forwarder.ts --status
`;
