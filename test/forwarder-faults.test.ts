import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, renameSync, rmdirSync, writeFileSync } from "node:fs";
import { readdir } from "node:fs/promises";
import { connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { readForwarderState } from "../lib/signs.ts";
import { type Backend, makeSite, remoteFiles, type Site, startOpenSsh, takeAway } from "./backends.ts";
import { PACKAGES } from "./servers.ts";
import {
  accessLine,
  expectSameLines,
  freePort,
  missing,
  notRoot,
  onCleanup,
  runScriptOnce,
  start,
  startScript,
  tempFolder,
  until,
} from "./support.ts";

setDefaultTimeout(process.env.FORWARD_RATE ? 600_000 : 120_000);

/**
 * How rough it gets: so many batches, and a cut each so many ms, of which every fourth is a SIGKILL, too. With
 * `FORWARD_AWAY=1` the client's storage is away after every fourth cut, as a mount that is late. In full:
 * `FORWARD_BATCHES=300 FORWARD_CUT_MS=1000 FORWARD_RATE=4000000 FORWARD_AWAY=1 bun test --timeout 600000 test/forwarder-faults.test.ts -t "again and again"`
 */
const BATCHES = Number(process.env.FORWARD_BATCHES ?? 50);
const CUT_MS = Number(process.env.FORWARD_CUT_MS ?? 300);
/** Bytes a second that a connection takes: slow enough that cuts fall into uploads, renames and answers until the last batch. */
const RATE = Number(process.env.FORWARD_RATE ?? Number.POSITIVE_INFINITY);
const AWAY = process.env.FORWARD_AWAY === "1";

const HOST = "10.10.21.181";
const once = (site: Site, env = {}) => runScriptOnce("forwarder", site.configFile, ["--once"], env);
const lines = (count: number) => Array.from({ length: count }, (_, i) => accessLine(i)).join("");
const skip = missing(PACKAGES.sshd) || notRoot();

/** A line between the forwarder and the server, with faults at command. */
async function startLine(backend: Backend) {
  const url = new URL(backend.settings.target);
  const port = Number(url.port);
  const pairs = new Set<[Socket, Socket]>();
  const line = {
    stalled: false,
    refusing: false,
    /** Milliseconds that an answer takes. */
    answerMs: 0,
    bytesPerSecond: Number.POSITIVE_INFINITY,
    /** Bytes towards the server until the line is cut. */
    bytesLeft: Number.POSITIVE_INFINITY,
    cut: () => {
      for (const pair of pairs) for (const socket of pair) socket.destroy();
    },
    backend: backend,
  };
  const server = createServer((client) => {
    if (line.refusing) return client.destroy();
    const upstream = connect(port, "127.0.0.1");
    const pair: [Socket, Socket] = [client, upstream];
    pairs.add(pair);
    for (const socket of pair) {
      socket.on("error", () => {});
      socket.on("close", () => {
        pairs.delete(pair);
        for (const one of pair) one.destroy();
      });
    }
    client.on("data", (data) => {
      if (line.stalled) return;
      upstream.write(data.subarray(0, Math.max(0, Math.min(data.length, line.bytesLeft))));
      line.bytesLeft -= data.length;
      if (line.bytesLeft <= 0) line.cut();
      if (line.bytesPerSecond === Number.POSITIVE_INFINITY) return;
      client.pause();
      setTimeout(() => client.resume(), (1000 * data.length) / line.bytesPerSecond);
    });
    upstream.on("data", (data) => {
      if (line.stalled) return;
      if (line.answerMs === 0) client.write(data);
      else setTimeout(() => client.destroyed || client.write(data), line.answerMs);
    });
  });
  const listening = await freePort();
  await new Promise<void>((resolve) => server.listen(listening, "127.0.0.1", resolve));
  onCleanup(() => {
    line.cut();
    server.close();
  });
  url.port = String(listening);
  line.backend = { folder: backend.folder, settings: { ...backend.settings, target: url.href } };
  return line;
}

describe.skipIf(skip)("a line that fails", () => {
  let backend: Backend;
  let line: Awaited<ReturnType<typeof startLine>>;
  beforeAll(async () => {
    backend = await startOpenSsh(["RekeyLimit 1M"]);
    line = await startLine(backend);
  });
  const reset = async () => {
    Object.assign(line, {
      stalled: false,
      refusing: false,
      answerMs: 0,
      bytesPerSecond: Number.POSITIVE_INFINITY,
      bytesLeft: Number.POSITIVE_INFINITY,
    });
    await takeAway(backend);
  };

  test.each([1, 1000, 3000, 100_000, 1_500_000])(
    "cut after %d bytes: nothing half, and whole the next time",
    async (bytes) => {
      const site = await makeSite(line.backend);
      const text = lines(20_000);
      const name = site.seal(HOST, 1, text);
      line.bytesLeft = bytes;
      const { code, output } = await once(site);
      expect(code, output).toBe(1);
      expect(output).toContain("kind=connection");
      expect(Object.keys(await remoteFiles(backend))).not.toContain(name);
      expect(await site.list(HOST)).toEqual([name]);
      expect(await site.list("failed")).toEqual([]);
      line.bytesLeft = Number.POSITIVE_INFINITY;
      expect((await once(site)).code).toBe(0);
      expect(await remoteFiles(backend)).toEqual({ [name]: text });
      await reset();
    },
  );

  test.each([false, true])(
    "the answer to the rename is lost, the client has taken the file: %p; it is sent again only if nothing proves it",
    async (taken) => {
      const site = await makeSite(line.backend);
      const name = site.seal(HOST, 1, lines(10));
      line.answerMs = 150;
      const running = startScript("forwarder", site.configFile, ["--once"]);
      await until("it is renamed", () => existsSync(join(backend.folder, name)));
      line.cut();
      expect(await running.ended, running.output).toBe(1);
      expect(await site.report()).toEqual([]);
      if (taken) await takeAway(backend);
      line.answerMs = 0;
      const { code, output } = await once(site);
      expect(code, output).toBe(0);
      expect(output).toInclude(taken ? "uploaded again" : "batch delivered");
      expect(Object.keys(await remoteFiles(backend))).toEqual([name]);
      expect(await site.report()).toEqual([`${name} | lines=10 | status=Sent`]);
      await reset();
    },
  );

  test("half open: no answer within timeoutSeconds ends the cycle, and SIGTERM ends it at once", async () => {
    const site = await makeSite(line.backend, { timeoutSeconds: 1 });
    site.seal(HOST, 1, lines(200_000));
    const stallSoon = async () => {
      line.stalled = false;
      const running = startScript("forwarder", site.configFile, ["--once"]);
      await until("an upload runs", async () => (await readdir(backend.folder)).length > 0);
      line.stalled = true;
      return running;
    };
    const stalled = await stallSoon();
    expect(await stalled.ended).toBe(1);
    expect(stalled.output).toMatch(/no answer for 1000 ms|Keepalive timeout/);
    line.cut();
    await reset();
    const site2 = await makeSite(line.backend, { timeoutSeconds: 60 });
    site2.seal(HOST, 1, lines(200_000));
    const second = startScript("forwarder", site2.configFile);
    await until("an upload runs", async () => (await readdir(backend.folder)).length > 0);
    line.stalled = true;
    const before = Date.now();
    expect(await second.stop()).toBe(0);
    expect(Date.now() - before).toBeLessThan(5000);
    line.cut();
    await reset();
  });

  test("cut again and again while the forwarder runs and is killed: each file once, no temp file left", async () => {
    const site = await makeSite(line.backend, { intervalSeconds: 0.2 });
    const content: Record<string, string> = {};
    for (let hour = 0; hour < BATCHES / 2; hour++) {
      for (const host of [HOST, "10.0.0.1"])
        content[site.seal(host, hour, lines(800 + hour))] = lines(800 + hour);
    }
    Object.assign(line, { answerMs: 15, bytesPerSecond: RATE });
    let [cuts, kills, uploads] = [0, 0, 0];
    const away = `${backend.folder}.away`;
    let running = startScript("forwarder", site.configFile);
    const done = async () => (await site.list("sent")).length === Object.keys(content).length;
    const isEnough = () => RATE === Number.POSITIVE_INFINITY && cuts >= 30;
    for (; !isEnough() && !(await done()); cuts++) {
      await new Promise((resolve) => setTimeout(resolve, CUT_MS)); // the cuts are the fault under test
      if ((await readdir(backend.folder)).some((name) => name.endsWith(".tmp"))) uploads++;
      line.cut();
      if (AWAY && cuts % 4 === 1) {
        renameSync(backend.folder, away);
        mkdirSync(backend.folder, { mode: 0o755 }); // the mount's own folder: root's, and empty
      } else if (existsSync(away)) {
        rmdirSync(backend.folder); // nothing was written to it
        renameSync(away, backend.folder);
      }
      if (cuts % 4 !== 3 || (RATE < Number.POSITIVE_INFINITY && kills >= 10)) continue;
      kills++;
      await running.stop("SIGKILL");
      running = startScript("forwarder", site.configFile);
    }
    const sent = (await site.list("sent")).length;
    if (BATCHES > 50)
      process.stdout.write(
        `${sent} sent by ${cuts} cuts, ${uploads} of them in an upload, and ${kills} kills\n`,
      );
    Object.assign(line, { answerMs: 0, bytesPerSecond: Number.POSITIVE_INFINITY });
    if (existsSync(away)) {
      rmdirSync(backend.folder);
      renameSync(away, backend.folder);
    }
    await until("everything is delivered", done, 60_000);
    expect(await running.stop()).toBe(0);
    expect(await remoteFiles(backend)).toEqual(content);
    expect((await site.report()).sort()).toEqual(
      Object.entries(content)
        .map(([name, text]) => `${name} | lines=${text.split("\n").length - 1} | status=Sent`)
        .sort(),
    );
    expect(await site.list("failed")).toEqual([]);
    await reset();
  });

  test("a server that is down: one line in the log, nobody is blamed, no hot loop, and it goes on by itself", async () => {
    const site = await makeSite(line.backend, { intervalSeconds: 0.05 });
    const name = site.seal(HOST, 1, "x\n");
    line.refusing = true;
    const running = startScript("forwarder", site.configFile);
    await running.says("delivery is held up");
    const state = await until("the state says so", async () => {
      const state = await readForwarderState(site.dir);
      return state?.fault && state;
    });
    expect(state).toMatchObject({ ok: false, fault: { kind: "connection" } });
    line.refusing = false;
    await running.says("delivery goes on");
    expect(running.output.match(/delivery is held up/g)).toHaveLength(1);
    expect(await site.list("sent")).toEqual([name]);
    await until("the state says so", async () => (await readForwarderState(site.dir))?.ok);
    expect(await site.failures()).toHaveLength(1);
    expect((await site.failures())[0]).toStartWith("- | lines=0 | status=Failed | reason=Cannot connect");
    await running.stop();
    await reset();
  });
});

describe.skipIf(skip)("a server with its ways", () => {
  /** One cycle against a server with these settings of sshd_config. */
  const cycle = async (settings: string[], more: object = {}) => {
    const backend = await startOpenSsh(settings);
    const site = await makeSite(backend, more as Record<string, unknown>);
    const text = lines(3000);
    const name = site.seal(HOST, 1, text);
    return { backend, site, name, text, ...(await once(site)) };
  };

  test("no posix-rename, no fsync, no SETSTAT, no limits: delivered", async () => {
    const refused = "fsync,posix-rename,setstat,fsetstat,limits";
    const { code, output, backend, name, text } = await cycle([`ForceCommand internal-sftp -P ${refused}`]);
    expect(code, output).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: text });
  });

  test("read-only: the server's fault, one clear error, the batch stays", async () => {
    const { code, output, site, name } = await cycle(["ForceCommand internal-sftp -R"]);
    expect(code).toBe(1);
    expect(output.trim().split("\n")).toHaveLength(1);
    expect(output).toMatch(/kind=server error="Cannot create .*Permission denied/);
    expect(await site.list(HOST)).toEqual([name]);
    expect(await site.list("failed")).toEqual([]);
  });

  test("no such folder on the server: the server's fault", async () => {
    const { site, output, name } = await cycle(["ForceCommand internal-sftp -d /"], {});
    expect(output).toContain("batch delivered");
    const config = JSON.parse(readFileSync(site.configFile, "utf8"));
    config.forwarder.target += "/absent";
    writeFileSync(site.configFile, JSON.stringify(config));
    const next = site.seal(HOST, 2, "x\n");
    const { output: told } = await once(site);
    expect(told).toMatch(
      /kind=server error="The folder .*\/absent\\" is not there: no \\"absent\\" in .*; there is: /,
    );
    expect(await site.list(HOST)).toEqual([next]);
    expect(next).not.toBe(name);
  });

  test("an account with no SFTP says so", async () => {
    const { output, code } = await cycle(["ForceCommand /bin/false"]);
    expect(code).toBe(1);
    expect(output).toMatch(/kind=(server|connection)/);
  });

  test("nothing in common: told in words, with what the server offers", async () => {
    const { output } = await cycle(["KexAlgorithms diffie-hellman-group14-sha1"]);
    expect(output).toContain("on a key exchange algorithm: it offers only diffie-hellman-group14-sha1");
    const cipher = await cycle(["Ciphers aes256-cbc"]);
    expect(cipher.output).toContain("on a C->S cipher: it offers only aes256-cbc");
  });

  test("a login that is refused is the server's matter, with the account's name and no secret", async () => {
    const password = join(await tempFolder(), "password");
    writeFileSync(password, "hunter2\n");
    const { site, output, name } = await cycle(["PasswordAuthentication yes"], {
      privateKey: undefined,
      password: { file: password },
    });
    expect(output).toMatch(
      /kind=login error="Cannot log in at 127\.0\.0\.1:\d+ as .*authentication methods failed/,
    );
    expect(output).not.toContain("hunter2");
    expect(await site.list(HOST)).toEqual([name]);
    expect(await site.list("failed")).toEqual([]);
  });

  test("a private key with a passphrase; a wrong one is told as such", async () => {
    const backend = await startOpenSsh();
    const secrets = await tempFolder();
    const { file } = backend.settings.privateKey as { file: string };
    const key = join(secrets, "key");
    writeFileSync(key, readFileSync(file), { mode: 0o600 });
    execFileSync("ssh-keygen", ["-q", "-p", "-N", "open sesame", "-f", key]);
    writeFileSync(join(secrets, "right"), "open sesame");
    writeFileSync(join(secrets, "wrong"), "open barley");
    const deliver = async (passphrase: string) => {
      const secret = { privateKey: { file: key }, passphrase: { file: join(secrets, passphrase) } };
      const site = await makeSite(backend, secret);
      site.seal(HOST, 1, "x\n");
      return once(site);
    };
    expect((await deliver("right")).code).toBe(0);
    const wrong = await deliver("wrong");
    expect(wrong.code).toBe(1);
    expect(wrong.output).toContain("forwarder.privateKey: forwarder.passphrase does not open the key\n");
    expect(wrong.output).not.toContain("barley");
  });

  async function withBatch(backend: Backend, more: Record<string, unknown>): Promise<Site> {
    const site = await makeSite(backend, more);
    site.seal(HOST, 1, "x\n");
    return site;
  }

  /** Delivers one batch to a server with a login of its own kind. */
  async function deliverAs(backend: Backend, login: Record<string, unknown>) {
    const site = await makeSite(backend, { privateKey: undefined, ...login });
    const name = site.seal(HOST, 1, "x\n");
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(await remoteFiles(backend)).toEqual({ [name]: "x\n" });
  }

  test.each([
    ["new keys after each MiB", ["RekeyLimit 1M"]],
    ["aes128-ctr, MAC of the ciphertext", ["Ciphers aes128-ctr", "MACs hmac-sha2-256-etm@openssh.com"]],
    ["aes256-ctr, MAC of the plaintext", ["Ciphers aes256-ctr", "MACs hmac-sha2-512"]],
    ["aes256-gcm, new keys after each MiB", ["Ciphers aes256-gcm@openssh.com", "RekeyLimit 1M"]],
  ])("large and small batches at once: %s", async (_name, settings) => {
    const backend = await startOpenSsh(settings);
    const site = await makeSite(backend);
    const expected: Record<string, string> = {};
    for (let i = 0; i < 12; i++) {
      const text = lines(i % 4 === 0 ? 60_000 + i : 10 + i);
      expected[site.seal(`10.0.0.${i}`, i, text)] = text;
    }
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(output).not.toContain("held up");
    const found = await remoteFiles(backend);
    for (const [name, text] of Object.entries(expected)) expectSameLines(found[name] ?? "", text);
    expect(Object.keys(found).sort()).toEqual(Object.keys(expected).sort());
  });

  test("a key that only an SSH agent has", async () => {
    const backend = await startOpenSsh();
    const socket = join(await tempFolder(), "agent");
    start("ssh-agent", ["-D", "-a", socket]);
    await until("the agent listens", () => existsSync(socket));
    const { file } = backend.settings.privateKey as { file: string };
    execFileSync("ssh-add", ["-q", file], { env: { ...process.env, SSH_AUTH_SOCK: socket } });
    await deliverAs(backend, { agent: socket });
  });

  test("a server that asks for the password in a dialogue (keyboard-interactive)", async () => {
    const backend = await startOpenSsh(["UsePAM yes", "KbdInteractiveAuthentication yes"]);
    const { username } = new URL(backend.settings.target);
    execFileSync("chpasswd", { input: `${username}:open sesame\n` });
    const password = join(await tempFolder(), "password");
    writeFileSync(password, "open sesame\n");
    await deliverAs(backend, { password: { file: password } });
  });

  test("a server at an IPv6 address", async () => {
    const backend = await startOpenSsh(["ListenAddress ::1"]);
    const { privateKey, target, hostKey } = backend.settings;
    const url = new URL(target);
    url.hostname = "[::1]";
    await deliverAs(backend, { target: url.href, privateKey, hostKey });
  });

  test("no room: the server's fault, the batches stay, and they go out when there is room", async () => {
    const backend = await startOpenSsh();
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=300k,mode=777", "none", backend.folder]);
    onCleanup(() => execFileSync("umount", ["-l", backend.folder]));
    const site = await makeSite(backend);
    const small = site.seal(HOST, 2, "x\n");
    const large = site.seal(HOST, 1, lines(10_000));
    const { code, output } = await once(site);
    expect(code).toBe(1);
    expect(output).toContain("The server takes no more data");
    expect(await site.list("failed")).toEqual([]);
    expect(Object.keys(await remoteFiles(backend))).not.toContain(large);
    expect(await readdir(backend.folder)).not.toContain(`${large}.tmp`); // the part gives its room back
    execFileSync("mount", ["-o", "remount,size=10m", backend.folder]);
    expect((await once(site)).code).toBe(0);
    expect(await site.list("sent")).toEqual([large, small].sort());
  });

  test("a server without room for one large batch still gets the small ones", async () => {
    const backend = await startOpenSsh();
    execFileSync("mount", ["-t", "tmpfs", "-o", "size=300k,mode=777", "none", backend.folder]);
    onCleanup(() => execFileSync("umount", ["-l", backend.folder]));
    const site = await makeSite(backend, { parallel: 1, intervalSeconds: 0.05 });
    const large = site.seal(HOST, 1, lines(10_000));
    const small = site.seal(HOST, 2, "x\n");
    const running = startScript("forwarder", site.configFile);
    await until("the small one is there", async () => (await site.list("sent")).includes(small));
    expect(await site.list(HOST)).toEqual([large]);
    expect(await running.stop()).toBe(0);
  });

  test("a host key that is not the listed one: nothing is sent, told in log, report and state", async () => {
    const backend = await startOpenSsh();
    const other = `SHA256:${"A".repeat(43)}`;
    const site = await makeSite(backend, { hostKey: other });
    const name = site.seal(HOST, 1, "x\n");
    const { code, output } = await once(site);
    expect(code).toBe(1);
    expect(output).toContain('kind="host key" error="Refused the host key of 127.0.0.1');
    expect(output).toContain(`ssh-ed25519 ${backend.settings.hostKey}`);
    expect(await remoteFiles(backend)).toEqual({});
    expect(await site.list(HOST)).toEqual([name]);
    expect((await site.failures())[0]).toStartWith(
      "- | lines=0 | status=Failed | reason=Refused the host key",
    );
    expect(await readForwarderState(site.dir)).toMatchObject({ ok: false, fault: { kind: "host key" } });
  });

  test("one of several fingerprints will do, and an RSA key as well as any", async () => {
    const folder = await tempFolder();
    execFileSync("ssh-keygen", ["-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", join(folder, "rsa")]);
    const backend = await startOpenSsh([`HostKey ${join(folder, "rsa")}`]);
    const [, rsa] = execFileSync("ssh-keygen", ["-lf", join(folder, "rsa.pub")])
      .toString()
      .split(" ");
    const several = [`SHA256:${"A".repeat(43)}`, `${backend.settings.hostKey}=`];
    const site = await makeSite(backend, { hostKey: several });
    site.seal(HOST, 1, "x\n");
    expect((await once(site)).code).toBe(0);
    const url = new URL(backend.settings.target);
    const shown = await once(await withBatch(backend, { hostKey: rsa }));
    expect(shown.output).toContain(`it shows ssh-ed25519 ${backend.settings.hostKey}`);
    expect(shown.output).toContain(`ssh-keyscan -p ${url.port} 127.0.0.1 | ssh-keygen -lf -`);
  });
});
