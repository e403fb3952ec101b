/**
 * The targets that the forwarder's tests run against: a folder, OpenSSH, dropbear and ProFTPD. One suite for all of them.
 */
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { mkdir, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { type Config, sections } from "../lib/config.ts";
import { PACKAGES, startDropbear, startProftpd, startSshd } from "./servers.ts";
import { missing, notRoot, tempFolder, writeConfig } from "./support.ts";

/** A target that is up: what the config says of it, and its folder as this machine sees it. */
export interface Backend {
  settings: { target: string } & Record<string, unknown>;
  folder: string;
}

/** Every kind of target, and whether its tests must be skipped here. */
export const BACKENDS: { name: string; skip: boolean; start: () => Promise<Backend> }[] = [
  { name: "file://", skip: false, start: startFolder },
  { name: "OpenSSH", skip: missing(PACKAGES.sshd) || notRoot(), start: () => startOpenSsh() },
  {
    ...{ name: "dropbear", skip: missing(PACKAGES.dropbear) || notRoot() },
    start: () => startDropbearBackend("privateKey"),
  },
  { name: "ProFTPD", skip: missing(PACKAGES.proftpd) || notRoot(), start: startProftpdBackend },
];

async function startFolder(): Promise<Backend> {
  const folder = join(await tempFolder(), "client");
  await mkdir(folder);
  return { folder, settings: { target: `file://${folder}` } };
}

/** OpenSSH with a chrooted account; `settings` as for `startSshd`. `MaxSessions 1` always. */
export async function startOpenSsh(settings: string[] = []): Promise<Backend> {
  const { target, folder, privateKey, hostKey } = await startSshd({
    settings: ["MaxSessions 1", ...settings],
  });
  return { folder, settings: { target, privateKey: { file: privateKey }, hostKey } };
}

/** dropbear, with a login by key or by password. */
export async function startDropbearBackend(login: "privateKey" | "password"): Promise<Backend> {
  const { target, folder, password, privateKey, hostKey } = await startDropbear();
  const file = join(await tempFolder(), "password");
  writeFileSync(file, `${password}\n`, { mode: 0o600 });
  return {
    folder,
    settings: { target, hostKey, [login]: { file: login === "password" ? file : privateKey } },
  };
}

async function startProftpdBackend(): Promise<Backend> {
  const { target, folder, password, hostKey } = await startProftpd();
  const file = join(await tempFolder(), "password");
  writeFileSync(file, `${password}\n`, { mode: 0o600 });
  return { folder, settings: { target, password: { file }, hostKey } };
}

/** A receiver's folder with a forwarder's config for it. */
export interface Site {
  dir: string;
  configFile: string;
  config: Config["forwarder"];
  /** Seals a batch of `host` for minute 20 of an hour; gives its name. */
  seal(host: string, hour: number, content: string | Uint8Array): string;
  /** Names in the folder of a host, `sent`, or `failed`; of batches only. */
  list(folder: string): Promise<string[]>;
  /** The report's lines without their times. */
  report(): Promise<string[]>;
  /** The lines of `.fail` without their times. */
  failures(): Promise<string[]>;
}

/** Makes a receiver's folder, empty, whose batches go to a backend. */
export async function makeSite(backend: Backend, more: Record<string, unknown> = {}): Promise<Site> {
  const root = await tempFolder();
  const dir = join(root, "dir");
  const report = join(root, "linecount-report.log");
  const settings = { dir, report, retryDelaySeconds: 0, timeoutSeconds: 10, ...backend.settings, ...more };
  const lines = async (path: string) => {
    const text = await readFile(path, "utf8").catch(() => "");
    return text
      .split("\n")
      .slice(0, -1)
      .map((line) => line.slice(line.indexOf("|") + 2));
  };
  return {
    dir,
    configFile: await writeConfig(root, { forwarder: settings }),
    config: sections.forwarder.parse(settings),
    seal: (host, hour, content) => sealBatch(dir, host, hour, content),
    list: async (folder) =>
      (await readdir(join(dir, folder)).catch(() => [])).filter((name) => !name.startsWith(".")).sort(),
    report: () => lines(report),
    failures: () => lines(join(root, "linecount-report.fail")),
  };
}

function sealBatch(dir: string, host: string, hour: number, content: string | Uint8Array): string {
  const day = String(1 + Math.floor(hour / 24)).padStart(2, "0");
  const name = `accessLog_2611${day}${String(hour % 24).padStart(2, "0")}_20-39_${host.replaceAll(".", "-")}.log`;
  const path = join(dir, host, name);
  mkdirSync(join(dir, host), { recursive: true });
  writeFileSync(path, content);
  return name;
}

/** Every file of a backend by name, as text. */
export async function remoteFiles({ folder }: Backend): Promise<Record<string, string>> {
  const files: Record<string, string> = {};
  for (const name of (await readdir(folder)).sort()) files[name] = readFileSync(join(folder, name), "latin1");
  return files;
}

/** Takes every file away, as the client may. */
export async function takeAway({ folder }: Backend): Promise<void> {
  for (const name of await readdir(folder)) rmSync(join(folder, name), { recursive: true });
}
