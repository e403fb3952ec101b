/**
 * The services as the units start them: each as a user of its own, the middle server's four with one group, which the
 * folder of batches belongs to. A line goes all the way, an operator's own runs as root shut none of them out, and none
 * reads what another one keeps for itself.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { chmod, chown, mkdir, readdir, stat, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";
import {
  accessLine,
  freePort,
  missing,
  notRoot,
  ROOT,
  start,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

setDefaultTimeout(120_000);

const GROUP = 61_000;
const UID: Record<Section, number> = {
  receiver: 61_001,
  forwarder: 61_002,
  monitor: 61_003,
  housekeep: 61_004,
  shipper: 61_005,
};
const BATCH = "accessLog_26112206_20-39_10-0-0-1.log";

interface Place {
  scripts: string;
  config: string;
  dir: string;
  home: string;
  target: string;
  port: number;
}

/** A command as a service's user, with the umask of the units. */
function as(user: Section, command: string[]): [string, string[]] {
  const gid = user === "shipper" ? UID.shipper : GROUP;
  const identity = ["setpriv", `--reuid=${UID[user]}`, `--regid=${gid}`, "--clear-groups"];
  return ["sh", ["-c", 'umask 007; exec "$@"', "sh", ...identity, ...command]];
}

function tryAs(user: Section, ...command: string[]) {
  const [program, args] = as(user, command);
  const { status, stdout, stderr } = spawnSync(program, args, { encoding: "utf8", cwd: "/" });
  return { code: status, output: stdout + stderr };
}

function service(place: Place, name: Section, env: Record<string, string> = {}, ...flags: string[]) {
  const script = ["run", join(place.scripts, `${name}.js`), "--config", place.config, ...flags];
  const [program, args] = as(name, [process.execPath, "--no-env-file", ...script]);
  return start(program, args, { cwd: "/", env: { HOME: "/nonexistent", ...env } });
}

async function serviceOnce(place: Place, name: Section, ...flags: string[]) {
  const running = service(place, name, {}, ...flags);
  return { code: await running.ended, output: running.output };
}

async function asRoot(place: Place, name: Section, ...flags: string[]) {
  const args = ["run", join(place.scripts, `${name}.js`), "--config", place.config, ...flags];
  const running = start("sh", ["-c", 'umask 022; exec "$@"', "sh", process.execPath, ...args], { cwd: "/" });
  return { code: await running.ended, output: running.output };
}

/** What sysusers and tmpfiles make, with numbers in place of names. */
async function makePlace(): Promise<Place> {
  const home = await tempFolder();
  await chmod(home, 0o755);
  const [dir, varDir, target] = [join(home, "received"), join(home, "var"), join(home, "target")];
  const [stateDir, scripts] = [join(home, "state"), join(home, "scripts")];
  for (const folder of [dir, varDir, target, stateDir]) await mkdir(folder);
  for (const [folder, uid, gid, mode] of [
    [dir, UID.receiver, GROUP, 0o2770],
    [varDir, 0, GROUP, 0o2771],
    [target, UID.forwarder, GROUP, 0o755],
    [stateDir, UID.shipper, UID.shipper, 0o750],
  ] as const) {
    await chown(folder, uid, gid);
    await chmod(folder, mode);
  }
  for (const user of ["receiver", "shipper"] as const) {
    await writeFile(join(home, `token-${user}`), "one-token-of-thirty-two-characters\n", { mode: 0o400 });
    await chown(join(home, `token-${user}`), UID[user], UID[user]);
  }
  await writeFile(join(home, "access.log"), accessLine(1));
  const port = await freePort();
  const report = join(varDir, "linecount-report.log");
  const config = await writeConfig(home, {
    shipper: {
      files: [join(home, "access.log")],
      receiver: `http://127.0.0.1:${port}`,
      host: "10.0.0.1",
      token: { file: join(home, "token-shipper") },
      stateDir,
    },
    receiver: {
      groups: [{ port, senders: ["*"] }],
      dir,
      sealAfterSeconds: 0,
      tokens: { "*": { file: join(home, "token-receiver") } },
    },
    forwarder: { dir, target: `file://${target}`, report, digest: true, intervalSeconds: 0.5 },
    monitor: {
      dir,
      stateFile: join(varDir, "monitor.json"),
      report,
      mail: { smtp: `file://${varDir}/mail`, from: "a@example.com", to: ["b@example.com"] },
    },
    housekeep: { dir, report, compressAfterHours: 0, deleteAfterHours: 1 },
  });
  await chmod(config, 0o644);
  const build = ["run", join(ROOT, "deploy/build.ts"), "--here", "--outdir", scripts];
  expect(spawnSync(process.execPath, build).status).toBe(0);
  return { scripts, config, dir, home, target, port };
}

const absent = missing({ setpriv: "util-linux" }) || notRoot();
test.skipIf(absent)("a line goes through services of five users; none reads what another keeps", async () => {
  const place = await makePlace();
  const { dir, home, target } = place;
  if (tryAs("receiver", process.execPath, "--version").code !== 0)
    throw new Error(`${process.execPath} is not for other users to run: move the checkout`);

  const receiver = service(place, "receiver", { TOKEN_181: "a secret of the receiver" });
  await until("the receiver answers", () =>
    fetch(`http://127.0.0.1:${place.port}/healthz`).catch(() => undefined),
  );
  expect(await serviceOnce(place, "shipper", "--once")).toMatchObject({ code: 0 });
  await until("the batch is sealed", async () => (await readdir(join(dir, "10.0.0.1"))).includes(BATCH));

  // Before the service ever ran, an operator tries it: as root, with root's umask.
  expect(await asRoot(place, "forwarder", "--once")).toMatchObject({ code: 0 });
  expect(await readdir(join(dir, "sent"))).toEqual([BATCH]);
  const forwarder = service(place, "forwarder", { SFTP_PASSWORD: "a secret of the forwarder" });
  await forwarder.says("started");
  expect((await asRoot(place, "forwarder", "--resend", BATCH)).output).toContain("1");
  await until("it is delivered once more", async () => (await readdir(join(dir, "sent"))).includes(BATCH));
  expect(await readdir(target)).toContain(BATCH);

  const secrets: [Section, string][] = [
    ["receiver", `/proc/${forwarder.process.pid}/environ`],
    ["forwarder", `/proc/${receiver.process.pid}/environ`],
    ["monitor", `/proc/${receiver.process.pid}/environ`],
    ["forwarder", join(home, "token-receiver")],
    ["housekeep", `/proc/${forwarder.process.pid}/environ`],
    ["shipper", join(dir, "sent", BATCH)],
    ["shipper", `/proc/${receiver.process.pid}/environ`],
    ["receiver", join(home, "state/cursor.json")],
  ];
  for (const [user, path] of secrets) {
    const { code, output } = tryAs(user, "cat", path);
    expect({ user, path, code, output }).toMatchObject({ code: 1, output: expect.stringMatching(/denied/) });
  }
  expect(tryAs("receiver", "cat", `/proc/${receiver.process.pid}/environ`).output).toContain("a secret of");

  expect(await serviceOnce(place, "monitor")).toMatchObject({ code: 0 });
  expect(await serviceOnce(place, "monitor", "--status")).toMatchObject({
    output: expect.stringContaining("10.0.0.1"),
  });
  await forwarder.stop();
  expect(await serviceOnce(place, "housekeep")).toMatchObject({ code: 0 });
  await expectShared(dir);
  expect(await receiver.stop()).toBe(0);
});

test.skipIf(absent || missing({ unshare: "util-linux", runuser: "util-linux" }))(
  "the command that --check gives to root looks as the unit's user, from any folder",
  async () => {
    const { home, scripts, config, dir } = await makePlace();
    await writeFile(
      join(home, "passwd"),
      `root:x:0:0::/:/bin/sh\nlog-rt-sync-housekeep:x:${UID.housekeep}:${GROUP}::/:\n`,
    );
    await writeFile(join(home, "group"), `root:x:0:\nlog-rt-sync:x:${GROUP}:\n`);
    await chmod(dir, 0o700); // the receiver's alone
    const asRoot = `${process.execPath} --no-env-file run ${scripts}/housekeep.js --check`;
    const script = `cd ${home} && mount --bind passwd /etc/passwd && mount --bind group /etc/group &&
      LOG_RT_SYNC_CONFIG=config.json ${asRoot} > seen; echo "root $?"
      cd / && sh -c "$(sed -n 's/.*as that one: //p' ${home}/seen)"; echo "its user $?"`;
    const { stdout } = spawnSync("unshare", ["-m", "sh", "-c", script], { encoding: "utf8" });
    expect(stdout).toStartWith("root 0\n");
    expect(stdout).toContain(`FAULT ${config}: housekeep.dir: ${dir}: expected a folder that can be written`);
    expect(stdout).toEndWith("its user 1\n");
  },
);

/** Every folder below is the group's to write in, every file the group's to read and write. */
async function expectShared(dir: string): Promise<void> {
  for (const name of [".", ...(await readdir(dir, { recursive: true }))]) {
    const info = await stat(join(dir, name));
    const wanted = info.isDirectory() ? 0o2070 : 0o060;
    expect({ name, gid: info.gid, mode: (info.mode & wanted).toString(8) }).toEqual({
      name,
      gid: GROUP,
      mode: wanted.toString(8),
    });
    if (!name.startsWith(".metrics"))
      expect({ name, others: info.mode & 0o007 }).toEqual({ name, others: 0 });
  }
}
