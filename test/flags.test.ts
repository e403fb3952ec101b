import { describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";
import { commandOf } from "../lib/service.ts";
import { makeKey } from "./servers.ts";
import { freePort, missing, ROOT, start, tempFolder } from "./support.ts";

const VERSION: string = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")).version;

/** Each script's own flags, as people script against them. */
const FLAGS: Record<Section, string[]> = {
  shipper: ["once", "status"],
  receiver: ["port"],
  forwarder: ["once", "status"],
  monitor: ["watch", "test-mail"],
  housekeep: ["watch", "dry-run"],
};
const COMMON = ["config", "check", "connect", "json", "help", "version"];
const NAMES = Object.keys(FLAGS) as Section[];

/** Runs a script to its end with stdout and stderr together. */
async function run(name: Section, args: string[], options: { cwd?: string; env?: object } = {}) {
  const running = start(process.execPath, ["run", join(ROOT, `${name}.ts`), ...args], {
    cwd: options.cwd ?? (await tempFolder()),
    env: { LOG_RT_SYNC_CONFIG: undefined, ...options.env },
  });
  return { code: await running.ended, output: running.output };
}

/** A config in a new folder that all five scripts accept on this machine. */
async function goodConfig(): Promise<string> {
  const folder = await tempFolder();
  for (const name of ["batches", "client", "mails", "state", "log"]) await mkdir(join(folder, name));
  const dir = join(folder, "batches");
  const report = join(folder, "state", "linecount-report.log");
  const file = join(folder, "config.json");
  await writeFile(join(folder, "log", "access.log"), "");
  const config = {
    shipper: {
      files: [join(folder, "log", "access.log")],
      receiver: "http://127.0.0.1:1",
      stateDir: join(folder, "state"),
    },
    receiver: { groups: [{ port: 0, senders: ["*"] }], dir },
    forwarder: { dir, target: `file://${join(folder, "client")}`, report },
    monitor: {
      dir,
      report,
      stateFile: join(folder, "state", "monitor.json"),
      mail: { smtp: `file://${join(folder, "mails")}`, from: "a@example.com", to: ["b@example.com"] },
    },
    housekeep: { dir, report },
  };
  await writeFile(file, JSON.stringify(config));
  return file;
}

describe.each(NAMES)("%s.ts", (name) => {
  test.each(["--help", "-h"])("%s shows the usage with every flag and ends with 0", async (flag) => {
    const { code, output } = await run(name, [flag]);
    expect(code).toBe(0);
    expect(output).toStartWith(`Usage: bun run ${name}.ts [flags]\n`);
    for (const flag of [...COMMON, ...FLAGS[name]]) expect(output).toContain(`--${flag}`);
  });

  test("--version shows the version of package.json and ends with 0", async () => {
    const { code, output } = await run(name, ["--version"]);
    expect(code).toBe(0);
    expect(output).toStartWith(`log-rt-sync ${name} ${VERSION} (`);
  });

  test.each([
    ["--nonsense"],
    ["--config"],
    ["--config="],
    ["left-over"],
    ["--help=yes"],
    ["-x"],
    ["--connect"],
    ["--json"],
  ])("%s is refused in one line, with where all flags are told, and exit code 2", async (flag) => {
    const { code, output } = await run(name, [flag]);
    expect(code).toBe(2);
    expect(output.split("\n")[0]).toContain(flag.replace(/=.*/, ""));
    expect(output.split("\n").slice(1)).toEqual([`All flags: bun run ${name}.ts --help`, ""]);
  });

  test("without a config file ends with 78 and one line that says what to do", async () => {
    const { code, output } = await run(name, []);
    expect(code).toBe(78);
    expect(output).toMatch(/^config\.json: cannot be read \(ENOENT\): copy config\.example\.json.*\n$/);
  });

  test("tells every fault of its section with its path and ends with 78", async () => {
    const folder = await tempFolder();
    const file = join(folder, "config.json");
    await writeFile(file, JSON.stringify({ [name]: { one: 1, two: 2 }, nonsense: {} }));
    const { code, output } = await run(name, ["--config", file]);
    expect(code).toBe(78);
    for (const path of [`${name}.one`, `${name}.two`, "nonsense"]) {
      expect(output).toContain(`${file}: ${path}: unknown key`);
    }
    expect(output.trimEnd().split("\n").length).toBeGreaterThan(3); // what is missing is told, too
    expect(output).not.toContain("    at "); // no stack
  });

  test("finds its config by --config, then $LOG_RT_SYNC_CONFIG, then ./config.json", async () => {
    const cwd = await tempFolder();
    const files = Object.fromEntries(["flag", "env", "config"].map((by) => [by, join(cwd, `${by}.json`)]));
    for (const [by, file] of Object.entries(files))
      await writeFile(file, JSON.stringify({ [`by-${by}`]: 1 }));
    const env = { LOG_RT_SYNC_CONFIG: files.env };
    const outputs = await Promise.all([
      run(name, ["--config", String(files.flag)], { cwd, env }),
      run(name, [], { cwd, env }),
      run(name, [], { cwd }),
    ]);
    expect(outputs.map(({ output }) => /by-\w+/.exec(output)?.[0])).toEqual([
      "by-flag",
      "by-env",
      "by-config",
    ]);
  });

  test("--check says that a good config is good, and changes nothing", async () => {
    const file = await goodConfig();
    const { code, output } = await run(name, ["--config", file, "--check"]);
    expect(code).toBe(0);
    expect(output).toEndWith(`${file}: ${name}: ok\n`);
    for (const line of output.split("\n").slice(0, -2)) expect(line).toMatch(/^(ok {3}|warn) {1,2}\S/);
  });

  test("an unknown flag is answered with the nearest one", async () => {
    const { output } = await run(name, ["--chek"]);
    expect(output).toStartWith("--chek: no such flag; did you mean --check?\n");
  });
});

test.skipIf(missing({ script: "bsdutils" }))(
  "every --status has colour on a terminal, and none with NO_COLOR or into a pipe",
  async () => {
    const file = await goodConfig();
    for (const name of ["shipper", "forwarder", "monitor"] as const) {
      const args = ["run", join(ROOT, `${name}.ts`), "--status", "--config", file];
      const command = [process.execPath, ...args].map((word) => `'${word}'`).join(" ");
      const output = async (env: Record<string, string>) => {
        const running = start("script", ["-qec", command, "/dev/null"], { env });
        await running.ended;
        return running.output;
      };
      const plain = await run(name, args.slice(2));
      expect(plain.output).not.toContain("\x1b");
      const coloured = await output({ NO_COLOR: "" });
      expect(coloured).toMatch(/\x1b\[3[12]m/);
      expect((await output({ NO_COLOR: "1" })).replaceAll("\r", "")).not.toContain("\x1b");
    }
  },
);

test.each([
  ["shipper", ["--status", "--once"]],
  ["forwarder", ["--hour", "2026-11-27T14", "--resend", "x"]],
  ["monitor", ["--watch", "--test-mail"]],
  ["housekeep", ["--watch", "--dry-run"]],
] as [Section, string[]][])("%s %p is two things at a time: refused", async (name, flags) => {
  const { code, output } = await run(name, ["--config", await goodConfig(), ...flags]);
  expect(output).toMatch(/^--[\w-]+ and --[\w-]+ don't go together\n/);
  expect(code).toBe(2);
});

test("receiver --check looks at the group of --port alone, and refuses a port of no group", async () => {
  const file = await goodConfig();
  const { code, output } = await run("receiver", ["--config", file, "--check", "--port", "77"]);
  expect(output).toEndWith(`No group has port 77: ${file} has groups of ports 0\n`);
  expect(code).toBe(2);
});

test.each([
  ["/opt/log-rt-sync/receiver.ts", "log-rt-sync monitor"],
  ["/usr/lib/log-rt-sync-middle/receiver.js", "log-rt-sync-monitor"],
  ["/$bunfs/root/log-rt-sync-receiver", "log-rt-sync-monitor"],
  ["/home/me/checkout/receiver.ts", "bun run monitor.ts"],
  ["/home/me/dist/receiver.js", "bun run monitor.js"],
])("of %s the next command is %s", (script, command) => {
  const [, own = ""] = process.argv;
  process.argv[1] = script;
  expect(commandOf("monitor")).toBe(command);
  process.argv[1] = own;
});

test("housekeep --dry-run says when there is nothing to do", async () => {
  const { code, output } = await run("housekeep", ["--config", await goodConfig(), "--dry-run"]);
  expect(output).toEndWith("\nnothing to do\n");
  expect(code).toBe(0);
});

test("forwarder --verify of a folder without a digest proves nothing, and says so", async () => {
  const folder = await tempFolder();
  const { code, output } = await run("forwarder", ["--verify", folder]);
  expect(output).toBe(`no digest is in ${folder}: nothing says what has to be there\n`);
  expect(code).toBe(1);
});

test("SIGTERM in the middle of a monitor's run ends it with 0, without an error", async () => {
  const file = await goodConfig();
  const config = JSON.parse(readFileSync(file, "utf8"));
  config.monitor.receivers = [`http://127.0.0.1:${await freePort()}`]; // a fault, which is looked at a second time
  await writeFile(file, JSON.stringify(config));
  const running = start(process.execPath, ["run", join(ROOT, "monitor.ts"), "--config", file]);
  await running.says("first run");
  expect(await running.stop()).toBe(0);
  expect(running.output).not.toContain("error");
});

test("what is written into a slow pipe arrives to its end, and a closed pipe is no error", async () => {
  const file = join(await tempFolder(), "config.json");
  const keys = Object.fromEntries(Array.from({ length: 30_000 }, (_, i) => [`key${i}`, i]));
  await writeFile(file, JSON.stringify({ housekeep: keys }));
  const command = `"${process.execPath}" run "${join(ROOT, "housekeep.ts")}" --check --config "${file}"`;
  const slow = start("bash", ["-c", `set -o pipefail; ${command} | { sleep 1; wc -l; }`]);
  expect(await slow.ended).toBe(78);
  expect(Number(slow.output)).toBe(30_002); // each key, the missing dir, the last line
  const closed = start("bash", ["-c", `${command} | head -1; echo "\${PIPESTATUS[0]}"`]);
  await closed.ended;
  expect(closed.output).toMatch(/^FAULT .*\n78\n$/);
});

test.skipIf(missing({ openssl: "openssl" }))(
  "config.example.json passes --check of all five scripts after changing paths alone",
  async () => {
    const folder = await tempFolder();
    for (const name of ["receiver", "nginx", "state", "etc"]) await mkdir(join(folder, name));
    await writeFile(join(folder, "nginx", "access.log"), "");
    const example = readFileSync(join(ROOT, "config.example.json"), "utf8")
      .replaceAll("/app/log/access-log-receiver", join(folder, "receiver"))
      .replaceAll("/app/log/nginx", join(folder, "nginx"))
      .replaceAll("/var/lib/log-rt-sync", join(folder, "state"))
      .replaceAll("/etc/log-rt-sync", join(folder, "etc"));
    await writeFile(join(folder, "config.json"), example);
    const key = join(folder, "etc", "id_ed25519");
    const keygen = start("openssl", [
      ..."req -x509 -newkey ed25519 -nodes -days 2 -subj /CN=127.0.0.1 -keyout".split(" "),
      join(folder, "etc", "key.pem"),
      "-out",
      join(folder, "etc", "cert.pem"),
    ]);
    expect(await keygen.ended).toBe(0);
    await writeFile(key, sshKey());
    await writeFile(join(folder, "etc", "token"), "token-of-the-example-config\n");
    const env = { TOKEN_181: "token-of-181", SFTP_PASSWORD: "secret" };
    for (const name of NAMES) {
      const { code, output } = await run(name, ["--check"], { cwd: folder, env });
      expect(output).toEndWith(`config.json: ${name}: ok\n`);
      expect(code).toBe(0);
    }
  },
);

/** A private key in OpenSSH form, made for this test. */
function sshKey(): string {
  const { private: key } = makeKey();
  return key;
}
