/**
 * The three ways of copying the scripts onto a host, each in an empty folder, with an empty home and no registry
 * in reach: a line goes from access.log through shipper, receiver and forwarder into the target.
 */
import { beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { cp, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { join } from "node:path";
import { type Section, sections } from "../lib/config.ts";
import { accessLine, freePort, onCleanup, ROOT, start, tempFolder, until, writeConfig } from "./support.ts";

setDefaultTimeout(120_000);
const SCRIPTS = Object.keys(sections) as Section[];

/** Nothing of this machine's folders is in the way of the copy, and a package could only come from `registry`. */
async function emptyEnvironment(registry = "http://127.0.0.1:9"): Promise<Record<string, string>> {
  const home = await tempFolder();
  return {
    HOME: home,
    PATH: "/usr/bin:/bin",
    BUN_CONFIG_REGISTRY: registry,
    BUN_INSTALL_CACHE_DIR: join(home, "cache"),
  };
}

type Command = (script: Section) => { command: string; args: string[] };

/** Runs a program to its end. */
async function run(program: string, args: string[], cwd: string, env: Record<string, string>) {
  const running = start(program, args, { cwd, env });
  return { code: await running.ended, output: running.output };
}

/** Ships one line through the copied scripts in `folder` and expects it in the target. */
async function expectLineDelivered(folder: string, command: Command, env: Record<string, string>) {
  const script = (name: Section, ...flags: string[]) => {
    const { command: program, args } = command(name);
    return run(program, [...args, ...flags], folder, env);
  };
  const [port, data] = [await freePort(), await tempFolder()];
  const [dir, target, stateDir] = [join(data, "received"), join(data, "target"), join(data, "state")];
  for (const path of [dir, target, stateDir]) await mkdir(path);
  const log = join(data, "access.log");
  await writeFile(log, accessLine(1));
  const config = await writeConfig(data, {
    shipper: { files: [log], receiver: `http://127.0.0.1:${port}`, host: "10.0.0.1", stateDir },
    receiver: { groups: [{ port, senders: ["*"] }], dir, sealAfterSeconds: 0 },
    forwarder: { dir, target: `file://${target}`, report: join(data, "report.log") },
    monitor: {
      dir,
      stateFile: join(data, "monitor.json"),
      report: join(data, "report.log"),
      mail: { smtp: `file://${data}`, from: "a@example.com", to: ["b@example.com"] },
    },
    housekeep: { dir, report: join(data, "report.log") },
  });
  for (const name of SCRIPTS) {
    expect((await script(name, "--version")).output).toStartWith(`log-rt-sync ${name} `);
    const { code, output } = await script(name, "--check", "--config", config);
    expect({ code, output }).toEqual({ code: 0, output: expect.stringMatching(/(^|: )ok\n$/m) });
  }
  const { command: program, args } = command("receiver");
  const receiver = start(program, [...args, "--config", config], { cwd: folder, env });
  await until("the receiver answers", () => fetch(`http://127.0.0.1:${port}/healthz`).catch(() => undefined));
  expect(await script("shipper", "--once", "--config", config)).toMatchObject({ code: 0 });
  await until("the batch is sealed", async () =>
    (await readdir(join(dir, "10.0.0.1"))).some((name) => name.endsWith(".log")),
  );
  expect(await script("forwarder", "--once", "--config", config)).toMatchObject({ code: 0 });
  expect(await readFile(join(target, "accessLog_26112206_20-39_10-0-0-1.log"), "utf8")).toBe(accessLine(1));
  expect(await script("housekeep", "--config", config)).toMatchObject({ code: 0 });
  expect(await receiver.stop()).toBe(0);
}

/** Builds into a new folder, offline, and gives that folder. */
async function build(...flags: string[]): Promise<string> {
  const outdir = await tempFolder();
  const args = ["run", join(ROOT, "deploy/build.ts"), "--here", "--outdir", outdir, ...flags];
  expect(await run(process.execPath, args, ROOT, await emptyEnvironment())).toMatchObject({ code: 0 });
  return outdir;
}

test("npm run build makes five files that run alone, without node_modules and offline", async () => {
  const folder = await build();
  expect((await readdir(folder)).sort()).toEqual(
    ["SHA256SUMS", ...SCRIPTS.map((script) => `${script}.js`)].sort(),
  );
  expect(spawnSync("sha256sum", ["-c", "--strict", "SHA256SUMS"], { cwd: folder }).status).toBe(0);
  const command: Command = (script) => ({ command: process.execPath, args: ["run", `${script}.js`] });
  await expectLineDelivered(folder, command, await emptyEnvironment());
});

test("npm run build takes no package whose bytes are not those of bun.lock", async () => {
  const outdir = await tempFolder();
  // This registry packs anew: same names and versions, other bytes.
  const env = await emptyEnvironment(await startRegistry());
  const args = ["run", join(ROOT, "deploy/build.ts"), "--outdir", outdir];
  const { code, output } = await run(process.execPath, args, ROOT, env);
  expect(code).toBe(1);
  expect(output).toMatch(/bun\.lock cannot be installed(.|\n)*integrity/i);
  expect(await readdir(outdir)).toEqual([]);
});

test("npm run build:bin makes five executables that run without Bun", async () => {
  const folder = await build("--compile");
  expect((await readdir(folder)).sort()).toEqual(
    ["SHA256SUMS", ...SCRIPTS.map((script) => `log-rt-sync-${script}`)].sort(),
  );
  const command: Command = (script) => ({ command: join(folder, `log-rt-sync-${script}`), args: [] });
  await expectLineDelivered(folder, command, await emptyEnvironment());
});

describe("a copy of the scripts, lib/ and package.json", () => {
  const command: Command = (script) => ({ command: process.execPath, args: ["run", `${script}.ts`] });
  let registry = "";

  beforeAll(async () => {
    registry = await startRegistry();
  });

  /** An empty folder with only what the README says to copy. */
  async function copySources(...more: string[]): Promise<string> {
    const folder = await tempFolder();
    const names = [...SCRIPTS.map((script) => `${script}.ts`), "lib", "package.json", ...more];
    for (const name of names) await cp(join(ROOT, name), join(folder, name), { recursive: true });
    return folder;
  }

  test("runs as it is where a registry is in reach: Bun fetches the pinned packages", async () => {
    const folder = await copySources();
    const env = await emptyEnvironment(registry);
    await expectLineDelivered(folder, command, env);
    expect(await readdir(folder)).not.toContain("node_modules");
  });

  test("runs offline with the packages that it names beside it", async () => {
    const folder = await copySources("bunfig.toml");
    for (const name of await runtimePackages()) {
      await cp(join(ROOT, "node_modules", name), join(folder, "node_modules", name), { recursive: true });
    }
    await expectLineDelivered(folder, command, await emptyEnvironment());
  });

  test("says which package is missing when it is offline and nothing was installed", async () => {
    const folder = await copySources("bunfig.toml");
    const args = ["run", "shipper.ts", "--version"];
    const { code, output } = await run(process.execPath, args, folder, await emptyEnvironment());
    expect(code).toBe(1);
    expect(output).toContain("Cannot find package 'zod'");
  });
});

/** The packages that `bun install --production --omit=optional` would put into node_modules. */
async function runtimePackages(): Promise<Set<string>> {
  const names = new Set<string>();
  const add = async (folder: string) => {
    const { dependencies = {} } = JSON.parse(await readFile(join(folder, "package.json"), "utf8"));
    for (const name of Object.keys(dependencies)) {
      if (names.has(name)) continue;
      names.add(name);
      await add(join(ROOT, "node_modules", name));
    }
  };
  await add(ROOT);
  return names;
}

/** A package registry on the loopback that serves what is in node_modules; its URL. */
async function startRegistry(): Promise<string> {
  const server = createServer(async (request, response) => {
    const path = decodeURIComponent(request.url ?? "").slice(1);
    const name = path.replace(/\/-\/[^/]+\.tgz$/, "");
    const folder = join(ROOT, "node_modules", name);
    const manifest = await readFile(join(folder, "package.json"), "utf8").catch(() => undefined);
    if (manifest === undefined) return response.writeHead(404).end();
    if (path !== name) {
      const tar = ["-C", folder, "--exclude=./node_modules", "--transform=s,^\\.,package,", "-cz", "."];
      return response.end(spawnSync("tar", tar, { maxBuffer: 64 * 1024 * 1024 }).stdout);
    }
    const version = JSON.parse(manifest);
    version.dist = { tarball: `http://${request.headers.host}/${name}/-/package.tgz` };
    const versions = { [version.version]: version };
    response.setHeader("Content-Type", "application/json");
    return response.end(JSON.stringify({ name, versions, "dist-tags": { latest: version.version } }));
  });
  const port = await new Promise<number>((resolve) => {
    server.listen(0, "127.0.0.1", () => resolve((server.address() as { port: number }).port));
  });
  onCleanup(() => server.close());
  return `http://127.0.0.1:${port}`;
}
