/** `--check` finds what only the running host can tell; with `--connect` also what only the servers can. */
import { describe, expect, test } from "bun:test";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";
import { freePort, runScriptOnce, tempFolder, writeConfig } from "./support.ts";

/** A folder that nobody can create or write to, root included. */
const NOWHERE = "/proc/log-rt-sync";

/** A config whose folders are below `home` and whose servers are on a port where nobody listens. */
async function configOf(home: string, port: number) {
  const [dir, report] = [join(home, "received"), join(home, "report.log")];
  const key = join(home, "key");
  await mkdir(dir, { recursive: true });
  await writeFile(key, "secret\n");
  return {
    shipper: {
      files: [join(home, "access.log")],
      receiver: `http://127.0.0.1:${port}`,
      host: "10.0.0.1",
      stateDir: join(home, "state"),
    },
    receiver: { groups: [{ port: 5001, senders: ["*"] }], dir },
    forwarder: {
      dir,
      target: `sftp://u@127.0.0.1:${port}/in`,
      password: { file: key },
      hostKey: "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
      timeoutSeconds: 2,
      report,
    },
    monitor: {
      dir,
      report,
      stateFile: join(home, "monitor.json"),
      mail: { smtp: `smtp://127.0.0.1:${port}`, from: "a@example.com", to: ["b@example.com"] },
    },
    housekeep: { dir, report },
  };
}

describe("--check names a folder that cannot be used", () => {
  const folders: Record<Section, { key: string; value: string }> = {
    shipper: { key: "stateDir", value: NOWHERE },
    receiver: { key: "dir", value: NOWHERE },
    forwarder: { key: "dir", value: NOWHERE },
    monitor: { key: "stateFile", value: join(NOWHERE, "monitor.json") },
    housekeep: { key: "dir", value: NOWHERE },
  };
  for (const [script, { key, value }] of Object.entries(folders) as [
    Section,
    { key: string; value: string },
  ][]) {
    test(script, async () => {
      const home = await tempFolder();
      const config = await configOf(home, 9);
      const file = await writeConfig(home, { ...config, [script]: { ...config[script], [key]: value } });
      const { code, output } = await runScriptOnce(script, file, ["--check"]);
      expect(output).toContain(`${script}.${key}`);
      expect(output).toContain(NOWHERE);
      expect(code).toBe(78);
    });
  }
});

describe("--check --connect names a server that cannot be reached, --check alone does not ask it", () => {
  const servers: [Section, string][] = [
    ["shipper", "shipper.receiver"],
    ["forwarder", "forwarder.target"],
    ["monitor", "monitor.mail.smtp"],
  ];
  for (const [script, key] of servers) {
    test(script, async () => {
      const home = await tempFolder();
      const file = await writeConfig(home, await configOf(home, await freePort()));
      expect(await runScriptOnce(script, file, ["--check"])).toMatchObject({ code: 0 });
      const { code, output } = await runScriptOnce(script, file, ["--check", "--connect"]);
      expect(output).toContain(`${file}: ${key}: `);
      expect(output.trimEnd().split("\n")).toHaveLength(1);
      expect(code).toBe(78);
    });
  }
});

test("forwarder --check says that the host key is missing and how to see it", async () => {
  const home = await tempFolder();
  const config = await configOf(home, 22022);
  const { hostKey: _, ...forwarder } = config.forwarder;
  const file = await writeConfig(home, { forwarder });
  const { code, output } = await runScriptOnce("forwarder", file, ["--check"]);
  expect(output).toContain(
    "forwarder.hostKey: missing; ask the server's owner for it, or see it with: ssh-keyscan -p 22022 127.0.0.1",
  );
  expect(code).toBe(78);
});

test("receiver --check names a certificate and a token that cannot be read, both at once", async () => {
  const home = await tempFolder();
  const { receiver } = await configOf(home, 9);
  const file = await writeConfig(home, {
    receiver: {
      ...receiver,
      tls: { cert: join(home, "no-cert.pem"), key: join(home, "no-key.pem") },
      tokens: { "*": { file: join(home, "no-token") } },
    },
  });
  const { code, output } = await runScriptOnce("receiver", file, ["--check"]);
  expect(output).toContain("no-cert.pem");
  expect(output).toContain("no-token");
  expect(code).toBe(78);
});

test.each(["receiver", "forwarder"] as const)(
  "%s does not start without its secrets: each is named with its key, and 78",
  async (script) => {
    const home = await tempFolder();
    const config = await configOf(home, 9);
    const file = await writeConfig(home, {
      receiver: {
        ...config.receiver,
        groups: [{ port: 0, senders: ["*"] }],
        tokens: { "*": { env: "NOT_SET" }, "10.0.0.1": { file: join(home, "no-token") } },
      },
      forwarder: {
        ...config.forwarder,
        password: { env: "NOT_SET" },
        privateKey: { file: join(home, "no-key") },
      },
    });
    const keys = { receiver: ["tokens.*", "tokens.10.0.0.1"], forwarder: ["password", "privateKey"] }[script];
    for (const flags of [[], ["--check"]]) {
      const { code, output } = await runScriptOnce(script, file, flags);
      expect(code).toBe(78);
      const told = output.trimEnd().split("\n");
      expect(told.map((line) => line.split(": ").slice(0, 2).join(": "))).toEqual(
        keys.map((key) => `${file}: ${script}.${key}`),
      );
    }
  },
);

test.each(["monitor", "housekeep"] as const)(
  "%s --watch refuses a schedule that never comes",
  async (script) => {
    const home = await tempFolder();
    const config = await configOf(home, 9);
    const file = await writeConfig(home, { [script]: { ...config[script], schedule: "99 * * * *" } });
    const { code, output } = await runScriptOnce(script, file, ["--watch"]);
    expect(output).toStartWith(`${file}: ${script}.schedule: 99 * * * *: expected a cron expression`);
    expect(code).toBe(78);
  },
);
