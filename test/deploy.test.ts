/** What is in deploy/ is checked by the programs that will read it: systemd, nginx, HAProxy, logrotate, sh. */
import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { cp, mkdir, readdir, readFile, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { Cron } from "croner";
import {
  findProgram,
  freePort,
  missing,
  notRoot,
  ROOT,
  selfSigned,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(60_000);
const DEPLOY = join(ROOT, "deploy");
const SCRIPTS = ["shipper", "receiver", "forwarder", "monitor", "housekeep"];

/** The output and exit code of a program that is expected to be installed. */
function run(program: string, args: string[], env: Record<string, string> = {}) {
  const { status, stdout, stderr } = spawnSync(findProgram(program) ?? program, args, {
    encoding: "utf8",
    env: { ...process.env, ...env },
    timeout: 60_000,
  });
  return { code: status, output: stdout + stderr };
}

describe.skipIf(missing({ "systemd-analyze": "systemd" }))("systemd units", () => {
  let folder = "";
  let services: string[] = [];
  let timers: string[] = [];

  beforeAll(async () => {
    // As installed, with one instance of the template and the Bun of this test in place of /usr/local/bin/bun.
    folder = await tempFolder();
    await cp(join(DEPLOY, "systemd"), folder, { recursive: true });
    for (const name of (await readdir(folder)).filter((file) => file.endsWith(".service"))) {
      const text = await readFile(join(folder, name), "utf8");
      await writeFile(join(folder, name), text.replaceAll("/usr/local/bin/bun", process.execPath));
    }
    await cp(
      join(folder, "log-rt-sync-receiver@.service"),
      join(folder, "log-rt-sync-receiver@5001.service"),
    );
    const names = await readdir(folder);
    services = names.filter((name) => name.endsWith(".service") && !name.includes("@."));
    timers = names.filter((name) => name.endsWith(".timer"));
  });

  const analyze = (...args: string[]) =>
    run("systemd-analyze", args, { SYSTEMD_UNIT_PATH: `${folder}:`, SYSTEMD_PAGER: "" });

  test("there is a unit for each script", () => {
    for (const script of SCRIPTS) expect(services.join()).toContain(`log-rt-sync-${script}`);
    expect(timers.sort()).toEqual(["log-rt-sync-housekeep.timer", "log-rt-sync-monitor.timer"]);
  });

  test("systemd-analyze verify finds nothing to say", () => {
    const paths = [...services, ...timers].map((name) => join(folder, name));
    const { code, output } = analyze("verify", "--man=no", ...paths);
    // What other packages of this machine have wrong is not ours to mend.
    expect(output.split("\n").filter((line) => line.includes("log-rt-sync"))).toEqual([]);
    expect(code).toBe(0);
  });

  test("systemd-analyze security scores each service at 1.4 or better", () => {
    for (const service of services) {
      const { code, output } = analyze("security", "--offline=true", "--threshold=14", "--no-pager", service);
      const level = /exposure level for \S+: ([\d.]+)/.exec(output)?.[1];
      expect({ service, level: Number(level), good: Number(level) <= 1.4 }).toMatchObject({ good: true });
      expect(code).toBe(0);
    }
  });

  test("a fault of flags or config is final, a reload is a signal, each service has a user that sysusers makes", async () => {
    const users = new Set<string>();
    for (const service of services) {
      const text = await readFile(join(folder, service), "utf8");
      const [user = "", group] = [/^User=(.+)$/m.exec(text)?.[1], /^Group=(.+)$/m.exec(text)?.[1]];
      const side = service.includes("shipper") ? "shipper" : "middle";
      const made = await readFile(join(folder, `log-rt-sync-${side}.sysusers.conf`), "utf8");
      expect(made).toMatch(new RegExp(`^u ${user} `, "m"));
      expect(group).toBe(side === "shipper" ? user : "log-rt-sync");
      if (side === "middle") expect(made).toMatch(new RegExp(`^m ${user} +log-rt-sync$`, "m"));
      users.add(user);
      expect(text).toMatch(/^ExecStart=.* --no-env-file --no-install run /m);
      if (!text.includes("Restart=always")) continue;
      expect(text).toContain("\nRestartPreventExitStatus=2 78\n");
      expect(text).toContain("\nExecReload=/bin/kill -HUP $MAINPID\n");
    }
    expect(users.size).toBe(SCRIPTS.length); // no two services are one user
    const shared = await readFile(join(folder, "log-rt-sync-.service.d/hardening.conf"), "utf8");
    expect(shared).toContain("\nPrivateUsers=yes\n");
    expect(shared).not.toMatch(/^User=/m);
  });

  test("the monitor's unit waits for longer than a mail server may take for its answer to a mail", async () => {
    const text = await readFile(join(folder, "log-rt-sync-monitor.service"), "utf8");
    const seconds = Number(/^TimeoutStartSec=(\d+)$/m.exec(text)?.[1]);
    expect(seconds).toBeGreaterThan(3 * 600); // RFC 5321 section 4.5.3.2.6, several mails one behind the other
  });

  test("each service starts a script that is there, with a flag that it knows", async () => {
    for (const service of services) {
      const text = await readFile(join(folder, service), "utf8");
      const command = /^ExecStart=.*$/m.exec(text)?.[0] ?? "";
      const script = /\/opt\/log-rt-sync\/(\w+)\.ts /.exec(command)?.[1] ?? "";
      expect(SCRIPTS).toContain(script);
      const { output } = run(process.execPath, ["run", join(ROOT, `${script}.ts`), "--help"]);
      const flags = command.slice(command.indexOf(".ts")).match(/--[a-z-]+/g) ?? [];
      for (const flag of flags) expect(output).toContain(flag);
    }
  });

  test("every secret that a unit loads is a place that tmpfiles makes, for root alone", async () => {
    const middle = await readFile(join(folder, "log-rt-sync-middle.tmpfiles.conf"), "utf8");
    const sender = await readFile(join(folder, "log-rt-sync-shipper.tmpfiles.conf"), "utf8");
    for (const service of services) {
      const text = await readFile(join(folder, service), "utf8");
      const places = service.includes("shipper") ? sender : middle;
      for (const [, name, source] of text.matchAll(/^LoadCredential=([^:]+):(.+)$/gm)) {
        expect(text).toContain(`BindReadOnlyPaths=/run/credentials/%n/${name}:${source}\n`);
        expect(places).toMatch(new RegExp(`^f ${source} +0600 root +root`, "m"));
      }
    }
  });

  test.skipIf(missing({ "systemd-sysusers": "systemd", "systemd-tmpfiles": "systemd" }) || notRoot())(
    "sysusers and tmpfiles make the user and the folders in an empty root",
    async () => {
      const root = await tempFolder();
      await mkdir(join(root, "etc"));
      for (const side of ["middle", "shipper"]) {
        const users = join(folder, `log-rt-sync-${side}.sysusers.conf`);
        expect(run("systemd-sysusers", [`--root=${root}`, users])).toMatchObject({ code: 0 });
        const file = join(folder, `log-rt-sync-${side}.tmpfiles.conf`);
        const { code, output } = run("systemd-tmpfiles", ["--create", `--root=${root}`, file]);
        expect({ code, output }).toEqual({ code: 0, output: "" });
      }
      expect((await readdir(join(root, "etc/log-rt-sync"))).sort()).toEqual(
        ["environment", "id_ed25519", "key.pem", "sftp-password", "smtp-password", "token"].sort(),
      );
      const passwd = await readFile(join(root, "etc/passwd"), "utf8");
      for (const script of SCRIPTS) expect(passwd).toMatch(new RegExp(`^log-rt-sync-${script}:`, "m"));
      const { mode, gid } = await stat(join(root, "app/log/access-log-receiver"));
      expect((mode & 0o7777).toString(8)).toBe("2770");
      const group = /^log-rt-sync:[^:]*:(\d+):/m.exec(await readFile(join(root, "etc/group"), "utf8"))?.[1];
      expect(String(gid)).toBe(group ?? "");
    },
  );
});

/** What a command prints that is started in a stranger's folder, whose settings of Bun run code and set variables. */
async function inHostileFolder(command: string[]): Promise<string> {
  const folder = await tempFolder();
  await writeFile(join(folder, "bunfig.toml"), 'preload = ["./evil.ts"]\n');
  await writeFile(join(folder, "evil.ts"), 'console.log("a stranger\'s code runs");\n');
  await writeFile(join(folder, ".env"), "LOG_RT_SYNC_CONFIG=/a/strangers/config.json\n");
  await writeFile(join(folder, "tsconfig.json"), '{"compilerOptions":{"paths":{"zod":["./evil.ts"]}}}\n');
  const [program = "", ...args] = command;
  const { stdout, stderr } = spawnSync(program, args, { cwd: folder, encoding: "utf8" });
  return stdout + stderr;
}

describe("Bun in a stranger's folder", () => {
  const script = ["run", join(ROOT, "shipper.ts"), "--check"];

  test("takes its bunfig.toml and .env: this is why units, cron and docs do not stand in one", async () => {
    const output = await inHostileFolder([process.execPath, ...script]);
    expect(output).toContain("a stranger's code runs");
    expect(output).toContain("/a/strangers/config.json");
  });

  test("takes nothing of it with the flags of deploy/log-rt-sync, nor when cd comes first", async () => {
    const command = (await readFile(join(DEPLOY, "log-rt-sync"), "utf8"))
      .replaceAll("/usr/local/bin/bun", process.execPath)
      .replaceAll("/opt/log-rt-sync", ROOT);
    const file = join(await tempFolder(), "log-rt-sync");
    await writeFile(file, command, { mode: 0o755 });
    for (const safe of [
      [file, "shipper", "--check"],
      ["sh", "-c", `cd ${ROOT} && exec "$@"`, "sh", process.execPath, ...script],
    ]) {
      const output = await inHostileFolder(safe);
      expect(output).not.toContain("stranger");
      expect(output).toContain("config.json");
    }
    const help = run("sh", [file]);
    expect(help).toMatchObject({ code: 2, output: expect.stringContaining("shipper") });
  });
});

/** 150 connections of one address, then one of another one; how many of each were let in. */
const KNOCK = `
import { connect, createServer } from "node:net";
const server = createServer(() => {}).listen(5001, "0.0.0.0");
await new Promise((resolve) => server.on("listening", resolve));
const knock = (localAddress) => new Promise((resolve) => {
  const socket = connect({ port: 5001, host: "127.0.0.1", localAddress });
  socket.on("connect", () => resolve(1));
  socket.on("error", () => resolve(0));
});
const first = await Promise.all(Array.from({ length: 150 }, () => knock("127.0.0.1")));
console.log(first.reduce((sum, one) => sum + one, 0), await knock("127.0.0.2"));
process.exit(0);
`;

test.skipIf(missing({ nft: "nftables", ip: "iproute2", unshare: "util-linux" }) || notRoot())(
  "the nftables rule in docs/security.md lets 100 connections of an address in, and those of the others",
  async () => {
    const text = await readFile(join(ROOT, "docs/security.md"), "utf8");
    const folder = await tempFolder();
    const rule = /<!-- nftables: a test loads it -->\n```\n(.*?)```/s.exec(text)?.[1] ?? "";
    await writeFile(join(folder, "rule.nft"), rule);
    await writeFile(join(folder, "knock.js"), KNOCK);
    const commands = `ip link set lo up && nft -f ${folder}/rule.nft && exec ${process.execPath} ${folder}/knock.js`;
    expect(run("unshare", ["-n", "sh", "-c", commands])).toEqual({ code: 0, output: "100 1\n" });
  },
);

test("the fail2ban filter finds who guesses tokens in the receiver's own lines, and nobody else", async () => {
  const home = await tempFolder();
  const [port, token] = [await freePort(), join(home, "token")];
  await writeFile(token, "one-token-of-thirty-two-characters", { mode: 0o600 });
  const receiver = startScript(
    "receiver",
    await writeConfig(home, {
      receiver: {
        groups: [{ port, senders: ["*"] }],
        dir: join(home, "dir"),
        tokens: { "*": { file: token } },
      },
    }),
  );
  await until("the receiver answers", () => fetch(`http://127.0.0.1:${port}/healthz`).catch(() => undefined));
  for (const [shown, host] of [
    ["not-the-token-but-as-long-as-that-one", "10.0.0.1"],
    ["one-token-of-thirty-two-characters", 'peer=1.2.3.4 reason="unknown token" status=401'],
  ] as const) {
    const headers = { "Log-Host": host, Authorization: `Bearer ${shown}` };
    await fetch(`http://127.0.0.1:${port}/streams`, { method: "POST", headers });
  }
  await receiver.stop();
  const filter = await readFile(join(DEPLOY, "fail2ban-log-rt-sync.conf"), "utf8");
  const regex = (/^failregex = (.*)$/m.exec(filter)?.[1] ?? "").replace("<ADDR>", "(?<peer>[0-9a-f.:]+)");
  const hits = receiver.output.split("\n").map((line) => new RegExp(regex).exec(line)?.groups?.peer);
  expect(hits.filter((peer) => peer !== undefined)).toEqual(["127.0.0.1"]);
});

test("log-rt-sync.cron has a valid schedule, user and command in every line", async () => {
  const lines = (await readFile(join(DEPLOY, "log-rt-sync.cron"), "utf8")).split("\n");
  const jobs = lines.filter((line) => /^[*\d]/.test(line));
  expect(jobs).toHaveLength(2);
  for (const job of jobs) {
    const [, schedule = "", user, command = ""] = /^((?:\S+\s+){5})(\S+)\s+(.+)$/.exec(job) ?? [];
    expect(new Cron(schedule.trim()).nextRun()).toBeInstanceOf(Date);
    expect(user).toBe(`log-rt-sync-${/run (\w+)\.ts/.exec(command)?.[1]}`);
    expect(command).toStartWith("cd /opt/log-rt-sync && ");
    expect(command).not.toContain("%"); // cron(8) would make a line break of it
    expect(run("sh", ["-n", "-c", command])).toEqual({ code: 0, output: "" });
  }
  expect(jobs.join()).toContain("run monitor.ts");
  expect(jobs.join()).toContain("run housekeep.ts");
  expect(lines.at(-1)).toBe(""); // cron ignores a last line without its line break
});

test.skipIf(missing({ logrotate: "logrotate" }))("logrotate -d accepts logrotate-nginx", async () => {
  const folder = await tempFolder();
  const file = join(folder, "nginx");
  const text = await readFile(join(DEPLOY, "logrotate-nginx"), "utf8");
  await writeFile(file, text.replace("/app/log/nginx", folder), { mode: 0o644 });
  await writeFile(join(folder, "access.log"), "a line\n");
  const { code, output } = run("logrotate", ["-d", "--state", join(folder, "state"), file]);
  expect(output).not.toMatch(/^error|unknown|bad/im);
  expect(output).toContain("access.log");
  expect(code).toBe(0);
});

test.skipIf(missing({ nginx: "nginx-light", openssl: "openssl" }))(
  "nginx -t accepts nginx.conf",
  async () => {
    const folder = await tempFolder();
    const { cert, key } = await selfSigned();
    const ours = (await readFile(join(DEPLOY, "nginx.conf"), "utf8"))
      .replace("listen 5443", `listen 127.0.0.1:${await freePort()}`)
      .replace("/etc/log-rt-sync/cert.pem", cert)
      .replace("/etc/log-rt-sync/key.pem", key);
    const file = join(folder, "nginx.conf");
    await writeFile(file, `pid ${folder}/pid; error_log stderr;\nevents {}\nhttp {\n${ours}\n}\n`);
    const { code, output } = run("nginx", ["-t", "-p", folder, "-c", file]);
    expect(output).toContain("test is successful");
    expect(output).not.toContain("[warn]");
    expect(code).toBe(0);
  },
);

test.skipIf(missing({ haproxy: "haproxy", openssl: "openssl" }))(
  "haproxy -c accepts haproxy.cfg",
  async () => {
    const { both } = await selfSigned();
    const file = join(await tempFolder(), "haproxy.cfg");
    const text = await readFile(join(DEPLOY, "haproxy.cfg"), "utf8");
    await writeFile(file, text.replace("/etc/log-rt-sync/haproxy.pem", both));
    const { code, output } = run("haproxy", ["-c", "-f", file]);
    expect(output).not.toMatch(/\[(WARNING|ALERT)\]/);
    expect(code).toBe(0);
  },
);
