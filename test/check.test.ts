/** `--check` finds what only the running host can tell; with `--connect` also what only the servers can. */
import { describe, expect, test } from "bun:test";
import { chmod, copyFile, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { type AddressInfo, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { asUnitUser } from "../lib/check.ts";
import type { Section } from "../lib/config.ts";
import { fetchWith, serve } from "../lib/runtime.ts";
import { errorMessage } from "../lib/service.ts";
import {
  freePort,
  missing,
  onCleanup,
  ROOT,
  runScriptOnce,
  selfSigned,
  start,
  startScript,
  tempFolder,
  writeConfig,
} from "./support.ts";

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
      expect(output).toContain(`FAULT ${file}: ${script}.${key}: `);
      expect(output).toContain(NOWHERE);
      expect(code).toBe(1);
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
      await writeFile(join(home, "access.log"), "");
      expect(await runScriptOnce(script, file, ["--check"])).toMatchObject({ code: 0 });
      const { code, output } = await runScriptOnce(script, file, ["--check", "--connect"]);
      expect(output).toContain(`FAULT ${file}: ${key}: `);
      expect(output.split("\n").filter((line) => line.startsWith("FAULT"))).toHaveLength(1);
      expect(output).not.toMatch(/verbose|Is the computer able|error:\d/);
      expect(code).toBe(1);
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
  expect(code).toBe(1);
});

test.each(["receiver", "forwarder"] as const)(
  "%s does not start without its secrets: each is named with its key, and 1",
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
      expect(code).toBe(1);
      const told = output.split("\n").filter((line) => line.startsWith(flags.length > 0 ? "FAULT " : file));
      const faults = told.map((line) => line.replace(/^FAULT /, ""));
      expect(faults.map((line) => line.split(": ").slice(0, 2).join(": "))).toEqual(
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
    for (const [schedule, fault] of [
      ["99 * * * *", "expected a cron expression"],
      ["0 0 30 2 *", "expected a time that comes"],
    ] as const) {
      const file = await writeConfig(home, { [script]: { ...config[script], schedule } });
      const { code, output } = await runScriptOnce(script, file, ["--watch"]);
      expect(output).toStartWith(`${file}: ${script}.schedule: ${schedule}: ${fault}`);
      expect(code).toBe(78);
    }
  },
);

test("monitor --check --connect asks receivers and webhook, whose address it does not repeat", async () => {
  const home = await tempFolder();
  const { monitor } = await configOf(home, 9);
  const mail = { ...monitor.mail, smtp: `file://${home}` };
  const sick = serve({
    ...{ hostname: "127.0.0.1", port: 0, maxBodyBytes: 1, idleTimeoutSeconds: 9 },
    fetch: () => new Response("the disk is full", { status: 503 }),
  });
  onCleanup(() => sick.close(true));
  const receivers = [`http://127.0.0.1:${sick.port}`];
  const webhook = `http://127.0.0.1:${await freePort()}/secret-of-a-chat`;
  const file = await writeConfig(home, { monitor: { ...monitor, mail, receivers, webhook } });
  const { code, output } = await runScriptOnce("monitor", file, ["--check", "--connect"]);
  expect(output).toContain(
    `FAULT ${file}: monitor.receivers: ${receivers}: /healthz answers 503: the disk is full\n`,
  );
  expect(output).toContain(`FAULT ${file}: monitor.webhook: connection refused`);
  expect(output).not.toContain("secret-of-a-chat");
  expect(code).toBe(1);
});

test("--check tells a folder whose name is mistyped, and what is there; it makes none", async () => {
  const home = await tempFolder();
  const config = await configOf(home, 9);
  const file = await writeConfig(home, { housekeep: { ...config.housekeep, dir: join(home, "recieved") } });
  const { code, output } = await runScriptOnce("housekeep", file, ["--check"]);
  expect(output).toContain(
    `FAULT ${file}: housekeep.dir: ${home}/recieved: expected a folder that can be written; "recieved" is not in ${home}, where "received" is\n`,
  );
  expect(output).toEndWith(`${file}: housekeep: 1 fault\n`);
  expect(code).toBe(1);
  expect(await readdir(home)).not.toContain("recieved");
});

test("--check --json says the same for programs, also of a config that is wrong", async () => {
  const home = await tempFolder();
  const config = await configOf(home, 9);
  const good = await writeConfig(home, config);
  const { code, output } = await runScriptOnce("monitor", good, ["--check", "--json"]);
  expect(JSON.parse(output)).toMatchObject({ script: "monitor", config: good, ok: true });
  expect(code).toBe(0);
  const bad = await writeConfig(home, { monitor: { ...config.monitor, remindMinute: "1" } });
  const wrong = await runScriptOnce("monitor", bad, ["--check", "--json"]);
  expect(JSON.parse(wrong.output)).toMatchObject({ ok: false });
  expect(JSON.parse(wrong.output).checks).toContainEqual({
    level: "fault",
    text: `${bad}: monitor.remindMinute: unknown key; did you mean "remindMinutes"?`,
  });
  expect(wrong.code).toBe(78);
});

test("--check warns of a time zone that the runtime does not know, and of what others may read", async () => {
  const home = await tempFolder();
  const file = await writeConfig(home, await configOf(home, 9));
  await chmod(file, 0o644);
  const check = (TZ: string) => runScriptOnce("housekeep", file, ["--check"], { TZ });
  const unknown = await check("IST-5:30");
  expect(unknown.output).toContain("warn  TZ=IST-5:30 is not known to ");
  expect(unknown.output).toContain(`warn  others may read ${file}; chmod 640 it`);
  expect(unknown.code).toBe(0);
  for (const [zone, shown] of [
    ["Asia/Kolkata", "Asia/Kolkata (+05:30)"],
    ["UTC", "UTC (+00:00)"],
    ["America/St_Johns", "America/St_Johns (-0"],
  ] as const) {
    const { output } = await check(zone);
    expect(output).toContain(`ok    time zone: ${shown}`);
    expect(output).not.toContain("TZ=");
  }
});

test("asUnitUser() gives root the command that looks as the unit's user, where there is one", async () => {
  const users = ["shipper", "receiver", "forwarder", "monitor", "housekeep"] as const;
  const passwd = users.map((name, i) => `log-rt-sync-${name}:x:${990 + i}:990::/:\n`).join("");
  const command = ["/usr/local/bin/bun", "run", "/opt/x.ts", "--config", "/etc/my config.json", "--check"];
  const quoted = "/usr/local/bin/bun run /opt/x.ts --config '/etc/my config.json' --check";
  expect(asUnitUser("monitor", passwd, command)).toBe(
    `runuser -u log-rt-sync-monitor -g log-rt-sync -- ${quoted}`,
  );
  expect(asUnitUser("shipper", passwd, command)).toBe(
    `runuser -u log-rt-sync-shipper -g log-rt-sync-shipper -G adm -- ${quoted}`,
  );
  expect(asUnitUser("monitor", "log-rt-sync-shipper:x:1:1::/:\n", command)).toBeUndefined();
  for (const section of users) {
    const units = await readdir(join(ROOT, "deploy", "systemd"));
    const unit = units.find((name) => name.startsWith(`log-rt-sync-${section}`) && name.endsWith(".service"));
    const text = await readFile(join(ROOT, "deploy", "systemd", String(unit)), "utf8");
    const user = /^User=(.*)$/m.exec(text)?.[1];
    expect(asUnitUser(section, passwd, command)).toContain(`-u ${user} `);
  }
});

test.each([
  ["NODE_TLS_REJECT_UNAUTHORIZED", "0"],
  ["BUN_CONFIG_VERBOSE_FETCH", "curl"],
  ["SSLKEYLOGFILE", "/dev/null"],
])("no script starts with %s=%s", async (name, value) => {
  const home = await tempFolder();
  const file = await writeConfig(home, await configOf(home, 9));
  const { code, output } = await runScriptOnce("housekeep", file, [], { [name]: value });
  expect(output).toContain(`the variable ${name} is set, with which `);
  expect(code).toBe(1);
});

test.skipIf(process.getuid?.() !== 0 || missing({ runuser: "util-linux" }))(
  "a config that the user may not read is told with its owner, mode and who reads it",
  async () => {
    const home = await tempFolder();
    await chmod(home, 0o755);
    const file = await writeConfig(home, await configOf(home, 9));
    await chmod(file, 0o600);
    const bundle = join(home, "housekeep.js"); // the checkout may be closed to others
    const build = start(process.execPath, [
      "build",
      join(ROOT, "housekeep.ts"),
      "--target=bun",
      `--outfile=${bundle}`,
    ]);
    expect(await build.ended).toBe(0);
    const runtime = join(home, "bun");
    await copyFile(process.execPath, runtime);
    await chmod(runtime, 0o755);
    const reading = start("runuser", ["-u", "nobody", "--", runtime, "run", bundle, "--config", file], {
      cwd: home,
    });
    const output = `${file}: cannot be read (EACCES): it belongs to root:root with mode 0600, and is read by nobody\n`;
    expect({ code: await reading.ended, output: reading.output }).toEqual({ code: 78, output });
  },
);

describe("errorMessage() says in plain words what answered at an address", () => {
  const kinds: [string, (socket: Socket) => void, "http" | "https", string][] = [
    [
      "SSH at an http:// address",
      (socket) => void socket.write("SSH-2.0-OpenSSH_9\r\n"),
      "http",
      "does not speak HTTP",
    ],
    [
      "SSH at an https:// address",
      (socket) => void socket.write("SSH-2.0-OpenSSH_9\r\n"),
      "https",
      "does not speak TLS",
    ],
    [
      "a server that hangs up",
      (socket) => void socket.destroy(),
      "http",
      "it closed the connection without an answer",
    ],
  ];
  test.each(kinds)("%s", async (_, answer, scheme, words) => {
    const server = createServer((socket) => {
      socket.on("error", () => {});
      answer(socket);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    onCleanup(() => server.close());
    const { port } = server.address() as AddressInfo;
    expect(await faultOf(`${scheme}://127.0.0.1:${port}/`)).toContain(words);
  });

  test("nothing that listens, no such name, a certificate of nobody", async () => {
    expect(await faultOf(`http://127.0.0.1:${await freePort()}/`)).toStartWith("connection refused");
    expect(await faultOf("http://no-such-host.invalid/")).toStartWith("the name is not known");
    const { cert, key } = await selfSigned();
    const tls = { cert: await readFile(cert, "utf8"), key: await readFile(key, "utf8") };
    const fetch = () => new Response("");
    const server = serve({
      hostname: "127.0.0.1",
      port: 0,
      maxBodyBytes: 1,
      idleTimeoutSeconds: 9,
      tls,
      fetch,
    });
    onCleanup(() => server.close(true));
    expect(await faultOf(`https://127.0.0.1:${server.port}/`)).toContain("signed by none that is trusted");
    expect(await faultOf(`http://127.0.0.1:${server.port}/`)).toContain("whether it wants https://");
  });

  async function faultOf(url: string): Promise<string> {
    try {
      await fetchWith({})(url, { signal: AbortSignal.timeout(5000) });
      return "none";
    } catch (error) {
      return errorMessage(error);
    }
  }
});

describe("shipper --check: a log that can't be shipped is a fault", () => {
  const faultsOf = async (files: string[], home: string) => {
    const { shipper } = await configOf(home, 9);
    const file = await writeConfig(home, { shipper: { ...shipper, files } });
    const { code, output } = await runScriptOnce("shipper", file, ["--check"]);
    return { code, output: output.replaceAll(file, "CONFIG") };
  };

  test("one that is not there, with the nearest name; a folder that is mistyped; a glob that matches nothing", async () => {
    const home = await tempFolder();
    await mkdir(join(home, "log"));
    await writeFile(join(home, "log", "access.log"), "");
    const wrong = [`${home}/log/acces.log`, `${home}/lgo/x.log`];
    const { code, output } = await faultsOf([`${home}/log/access.log`, ...wrong, `${home}/log/*.lg`], home);
    expect(output).toContain(
      `FAULT CONFIG: shipper.files: ${wrong[0]}: "acces.log" is not in ${home}/log, where "access.log" is\n`,
    );
    expect(output).toContain(
      `FAULT CONFIG: shipper.files: ${wrong[1]}: "lgo" is not in ${home}, where "log" is\n`,
    );
    expect(output).toContain(`warn  shipper.files: nothing matches ${home}/log/*.lg yet\n`);
    expect(output).toContain(`ok    shipper.files: ${home}/log/access.log\n`);
    expect(code).toBe(1);
    const nothing = await faultsOf([`${home}/log/*.lg`], home);
    expect(nothing.output).toContain(
      `FAULT CONFIG: shipper.files: ${home}/log/*.lg: "*.lg" is not in ${home}/log`,
    );
  });

  test("a folder in its place", async () => {
    const home = await tempFolder();
    const { code, output } = await faultsOf([home], home);
    expect(output).toContain(`FAULT CONFIG: shipper.files: Cannot follow "${home}": it is a directory`);
    expect(code).toBe(1);
  });
});

test("--check creates nothing, whatever of the folders is there", async () => {
  const home = await tempFolder();
  const config = await configOf(home, await freePort());
  const file = await writeConfig(home, {
    ...config,
    receiver: { groups: [{ port: await freePort(), senders: ["*"] }], dir: join(home, "batches") },
    forwarder: { ...config.forwarder, target: `file://${home}/client` },
    monitor: { ...config.monitor, mail: { ...config.monitor.mail, smtp: `file://${home}/mails` } },
  });
  const before = (await readdir(home, { recursive: true })).sort();
  for (const script of ["shipper", "receiver", "forwarder", "monitor", "housekeep"] as const) {
    await runScriptOnce(script, file, ["--check"]);
    await runScriptOnce(script, file, ["--check", "--connect"]);
    expect({ script, names: (await readdir(home, { recursive: true })).sort() }).toEqual({
      script,
      names: before,
    });
  }
});

test("receiver.dir that is near to a name beside it is told; it would be made", async () => {
  const home = await tempFolder();
  const { receiver } = await configOf(home, 9);
  const groups = [{ port: await freePort(), senders: ["*"] }];
  const file = await writeConfig(home, { receiver: { ...receiver, groups, dir: join(home, "recieved") } });
  const { code, output } = await runScriptOnce("receiver", file, ["--check"]);
  expect(output).toContain(
    `"recieved" is not in ${home}, where "received" is; it will be made when that is no slip`,
  );
  expect(code).toBe(0);
});

describe("shipper --check --connect says what the receiver has against it, and what to compare", () => {
  const listening = async () => {
    const home = await tempFolder();
    const [token, other] = [join(home, "token"), join(home, "other")];
    await writeFile(token, "0123456789abcdef0123\n", { mode: 0o600 });
    await writeFile(other, "other6789abcdef01234\n", { mode: 0o600 });
    await writeFile(join(home, "access.log"), "");
    const ports = [await freePort(), await freePort()];
    const { receiver, shipper } = await configOf(home, ports[0] as number);
    const file = await writeConfig(home, {
      receiver: {
        ...receiver,
        groups: [
          { port: ports[0], senders: ["10.0.0.1", "10.0.0.2"] },
          { port: ports[1], senders: ["10.9.0.0/16"] },
        ],
        tokens: { "*": { file: token }, "10.0.0.2": { file: other } },
      },
    });
    const receiving = startScript("receiver", file);
    for (const port of ports) await receiving.says(`port=${port}`);
    const senders = await tempFolder();
    const ask = async (change: object) => {
      const config = await writeConfig(senders, {
        shipper: { ...shipper, token: { file: token }, ...change },
      });
      const { code, output } = await runScriptOnce("shipper", config, ["--check", "--connect"]);
      return { code, fault: output.split("\n").find((line) => line.startsWith("FAULT")) ?? "" };
    };
    return { ask, other, ports, file };
  };

  test("token, name, group; a receiver's own check beside it finds that it listens", async () => {
    const { ask, other, ports, file } = await listening();
    expect(await ask({})).toEqual({ code: 0, fault: "" });
    const rows: [object, string][] = [
      [{ token: undefined }, "401, a bearer token is required; compare shipper.token with receiver.tokens"],
      [
        { host: "10.0.0.2" },
        "403, this token is not for host 10.0.0.2; compare shipper.host and shipper.token",
      ],
      [{ host: "10.0.0.3" }, "403, host 10.0.0.3 is in no group of this receiver; compare shipper.host"],
      [{ token: { file: other } }, "it answered 40"],
      [
        { receiver: `http://127.0.0.1:${ports[1]}` },
        `421, host 10.0.0.1 belongs to port ${ports[0]}; set that port in shipper.receiver`,
      ],
      [{ receiver: `https://127.0.0.1:${ports[0]}` }, "does not speak TLS"],
      [{ receiver: `http://127.0.0.1:${ports[0]}/upload` }, "expected no path such as /upload behind it"],
      [{ ca: "/nowhere/ca.pem" }, 'shipper.ca: /nowhere/ca.pem: "nowhere" is not in /'],
    ];
    for (const [change, words] of rows) {
      const { code, fault } = await ask(change);
      expect(fault).toContain(words);
      expect(fault).not.toContain("not the receiver's answer");
      expect(code).toBeGreaterThan(0);
    }
    const { code, output } = await runScriptOnce("receiver", file, ["--check"]);
    for (const port of ports)
      expect(output).toContain(
        `ok    receiver.groups: 127.0.0.1:${port}: a receiver of this folder listens there\n`,
      );
    expect(code).toBe(0);
  });

  test("what stands there in its place, and where a redirect leads", async () => {
    const { ask } = await listening();
    const answers = {
      page: "200 OK\r\nServer: welcome/1",
      redirect: "301 Moved\r\nLocation: https://portal.example/",
    };
    const words = {
      page: "not the receiver's answer, but one of welcome/1: <p>hello",
      redirect: "which sends to https://portal.example/",
    };
    for (const kind of ["page", "redirect"] as const) {
      const server = createServer((socket) => {
        socket.on("error", () => {});
        socket.on("data", () => socket.end(`HTTP/1.1 ${answers[kind]}\r\nContent-Length: 8\r\n\r\n<p>hello`));
      });
      await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
      onCleanup(() => server.close());
      const { fault } = await ask({ receiver: `http://127.0.0.1:${(server.address() as AddressInfo).port}` });
      expect(fault).toContain(words[kind]);
    }
  });
});

test("receiver --check says what keeps it from listening, and all else that is wrong", async () => {
  const home = await tempFolder();
  const { receiver } = await configOf(home, 9);
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  const groups = [{ port: (server.address() as AddressInfo).port, senders: ["10.0.0.1"] }];
  const check = async (change: object) =>
    (
      await runScriptOnce(
        "receiver",
        await writeConfig(home, { receiver: { ...receiver, groups, ...change } }),
        ["--check"],
      )
    ).output;
  const both = await check({ logFormat: "$remote_addr $request" });
  expect(both).toContain("something listens there already");
  expect(both).toContain("receiver.logFormat: has no time: expected $time_local");
  expect(both.split("\n").filter((line) => line.includes("has no time"))).toHaveLength(1);
  expect(await check({ listen: "192.0.2.99" })).toContain("192.0.2.99:");
  expect(await check({ listen: "192.0.2.99" })).toContain("no address of this machine");
  expect(await check({ listen: "" })).toContain(
    "receiver.listen: expected an address of this machine, or 0.0.0.0",
  );
  const { cert, key } = await selfSigned();
  const swapped = await check({ tls: { cert: key, key: cert } });
  expect(swapped).toContain("no PEM file of that kind: is each of certificate and key in its place?");
  expect(swapped).not.toContain("OPENSSL");
});

describe("forwarder --check finds a private key that can't be used without asking the server", () => {
  const rows: [string, (key: string) => object, string][] = [
    [
      "its public half",
      (key) => ({ privateKey: { file: `${key}.pub` } }),
      "it is a public key: name the private half",
    ],
    [
      "a passphrase is missing",
      (key) => ({ privateKey: { file: key } }),
      "the key has a passphrase: set forwarder.passphrase",
    ],
    [
      "a passphrase is wrong",
      (key) => ({ privateKey: { file: key }, passphrase: { file: `${key}.pub` } }),
      "forwarder.passphrase does not open the key",
    ],
  ];
  test.skipIf(missing({ "ssh-keygen": "openssh-client" })).each(rows)("%s", async (_, change, words) => {
    const home = await tempFolder();
    const config = await configOf(home, 9);
    const key = join(home, "id");
    expect(await start("ssh-keygen", ["-q", "-t", "ed25519", "-N", "hello", "-f", key]).ended).toBe(0);
    const forwarder = { ...config.forwarder, password: undefined, ...change(key) };
    const { code, output } = await runScriptOnce("forwarder", await writeConfig(home, { forwarder }), [
      "--check",
    ]);
    expect(output).toContain(`forwarder.privateKey: ${words}`);
    expect(output).not.toContain("BEGIN");
    expect(code).toBe(1);
  });
});

describe("--check --connect says what listens at the port of target or relay", () => {
  const web = (socket: Socket) =>
    void socket.once("data", () => socket.end("HTTP/1.1 400 Bad Request\r\n\r\n"));
  const rows: ["forwarder" | "monitor", string, (socket: Socket) => void, string][] = [
    [
      "forwarder",
      "nobody says a word",
      () => {},
      "connected, and not a word within 1 s: what listens there may not be SSH",
    ],
    ["forwarder", "a web server", web, "what answers there does not speak SSH: look at the port"],
    ["monitor", "nobody says a word", () => {}, "not a word: what listens there may not speak SMTP"],
    [
      "monitor",
      "SSH",
      (socket) => void socket.write("SSH-2.0-OpenSSH_9\r\n"),
      "what answers there does not speak SMTP: look at the port",
    ],
  ];
  test.each(rows)("%s: %s", async (script, _, answer, words) => {
    const home = await tempFolder();
    const server = createServer((socket) => {
      socket.on("error", () => {});
      answer(socket);
    });
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
    onCleanup(() => server.close());
    const { forwarder, monitor } = await configOf(home, (server.address() as AddressInfo).port);
    const mail = { ...monitor.mail, timeoutSeconds: 1 };
    const sections = { forwarder: { ...forwarder, timeoutSeconds: 1 }, monitor: { ...monitor, mail } };
    const file = await writeConfig(home, sections);
    const { code, output } = await runScriptOnce(script, file, ["--check", "--connect"]);
    expect(output).toContain(words);
    expect(output).not.toMatch(/greeting|response=/i);
    expect(code).toBe(1);
  });
});
