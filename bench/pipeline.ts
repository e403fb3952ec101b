/**
 * The whole pipeline for the chaos run, on real parts of this machine: writers, a shipper for each host,
 * receivers on two ports, forwarder, an OpenSSH server (a folder when there is none), monitor, housekeeping,
 * a mailbox, and proxies wherever a network would be. Everything listens on 127.0.0.1.
 */
import { execFileSync } from "node:child_process";
import {
  accessSync,
  constants,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import { join } from "node:path";
import { type Hostile, startHostile } from "./hostile.ts";
import { createMailbox, type Mailbox } from "./mailbox.ts";
import { createProxy, type TcpProxy } from "./proxy.ts";
import { createRandom, type Random } from "./random.ts";
import { type Supervised, supervise } from "./supervised.ts";
import { createWriter, SKIP, type Writer } from "./writer.ts";

const ROOT = join(import.meta.dirname, "..");
const HOSTS = ["10.1.0.1", "10.1.0.2", "web-3.example.com", "fd00::4"];
/** A host with a token of its own that means harm (bench/hostile.ts). */
const HOSTILE = "10.1.0.66";
const HOSTILE_TOKEN = "a-token-of-its-own-for-the-hostile";
/** Of every shipper. */
export const HEARTBEAT_SECONDS = 2;
/** The mailed threshold for a silent host, as short as the test of it needs. */
export const SILENT_SECONDS = 8;

export interface PipelineOptions {
  folder: string;
  random: Random;
  /** All writers together. */
  linesPerSecond: number;
  /** Size in MiB of the file system for everything on the middle server; needs root, 0 for none. */
  diskMiB: number;
}

export interface Pipeline {
  writers: Writer[];
  shippers: Supervised[];
  receivers: Supervised[];
  forwarder: Supervised;
  monitor: Supervised;
  housekeeping: Supervised;
  /** Between each shipper and its receiver. */
  uplinks: TcpProxy[];
  /** Between forwarder and SFTP server; absent with a folder. */
  downlink: TcpProxy | undefined;
  mailbox: Mailbox;
  /** The folder of the receiver, and the client's. */
  server: string;
  client: string;
  report: string;
  hosts: string[];
  hostile: Hostile;
  /** The hostile host as it stands in batch names. */
  hostileName: string;
  /** Folder of each shipper's cursor. */
  stateDirs: string[];
  hasOwnDisk: boolean;
  /** All processes of the product. */
  processes: Supervised[];
  /** Servers that are not of the product. */
  servers: Supervised[];
  /** Ends what is not a process of the product. */
  close(): Promise<void>;
}

/** Starts everything. */
export async function startPipeline(options: PipelineOptions): Promise<Pipeline> {
  const { folder, random } = options;
  const at = (...names: string[]) => join(folder, ...names);
  for (const name of ["server", "client", "logs", "output", "config"])
    mkdirSync(at(name), { recursive: true });
  const hasOwnDisk = options.diskMiB > 0 && mountDisk(at("server"), options.diskMiB);
  const dir = at("server", "batches");
  mkdirSync(dir);

  const mailbox = await createMailbox(await freePort());
  const ports = [await freePort(), await freePort()];
  const sshd = await startSshd(at("sshd"), at("client"));
  const downlink = sshd && (await createProxy(sshd.port));
  const uplinks: TcpProxy[] = [];
  for (const i of HOSTS.keys()) uplinks.push(await createProxy(ports[i % 2] as number));

  const report = at("server", "linecount-report.log");
  const target = downlink
    ? `sftp://${userName()}@127.0.0.1:${downlink.port}${at("client")}`
    : `file://${at("client")}`;
  const sendersOf = (p: number) => [...HOSTS.filter((_, i) => i % 2 === p), ...(p === 0 ? [HOSTILE] : [])];
  const serverConfig = {
    receiver: {
      groups: ports.map((port, p) => ({ port, senders: sendersOf(p) })),
      tokens: { "*": { env: "CHAOS_TOKEN" }, [HOSTILE]: { env: "CHAOS_HOSTILE_TOKEN" } },
      dir,
      sealAfterSeconds: 2,
      idleTimeoutSeconds: 10,
    },
    forwarder: {
      dir,
      target,
      digest: true,
      ...(sshd && { privateKey: { file: sshd.clientKey }, hostKey: sshd.fingerprint }),
      intervalSeconds: 0.5,
      retryDelaySeconds: 0.2,
      timeoutSeconds: 4,
      report,
    },
    monitor: {
      dir,
      report,
      expected: HOSTS,
      silentMinutes: SILENT_SECONDS / 60,
      deliveryMinutes: 60,
      minFreePercent: 0,
      stateFile: at("server", "monitor.json"),
      schedule: "*/2 * * * * *",
      mail: {
        smtp: `smtp://127.0.0.1:${mailbox.port}`,
        from: "chaos@example.com",
        to: ["ops@example.com"],
        timeoutSeconds: 3,
      },
    },
    housekeep: {
      dir,
      report,
      compressAfterHours: 10 / 3600,
      deleteAfterHours: 30 / 3600,
      schedule: "*/5 * * * * *",
    },
  };
  const serverFile = at("config", "server.json");
  writeFileSync(serverFile, JSON.stringify(serverConfig, null, 2));

  const stateDirs = HOSTS.map((_, i) => at("logs", String(i), "state"));
  const logs = HOSTS.map((_, i) => at("logs", String(i), "nginx"));
  for (const path of [...stateDirs, ...logs]) mkdirSync(path, { recursive: true });
  const shipperFiles = HOSTS.map((host, i) => {
    const shipper = {
      files: [
        join(logs[i] as string, "access.log"),
        ...(i === 0 ? [join(logs[0] as string, "api.log")] : []),
      ],
      receiver: `http://127.0.0.1:${uplinks[i]?.port}`,
      host,
      token: { env: "CHAOS_TOKEN" },
      stateDir: stateDirs[i],
      skip: [SKIP],
      compression: ["zstd", "gzip", "none"][i % 3],
      chunkBytes: random.pick([65_536, 262_144, 1_048_576]),
      pollSeconds: 1,
      rotateWaitSeconds: 2,
      heartbeatSeconds: HEARTBEAT_SECONDS,
      timeoutSeconds: 4,
    };
    const file = at("config", `shipper-${i}.json`);
    writeFileSync(file, JSON.stringify({ shipper }, null, 2));
    return file;
  });

  const script = (name: string, label: string, config: string, flags: string[] = []) =>
    supervise(label, process.execPath, ["run", join(ROOT, `${name}.ts`), "--config", config, ...flags], {
      log: at("output", `${label}.log`),
      cwd: folder,
      env: { CHAOS_TOKEN: "not-a-secret-of-anyone", CHAOS_HOSTILE_TOKEN: HOSTILE_TOKEN },
    });
  const receivers = ports.map((port, p) =>
    script("receiver", `receiver ${p}`, serverFile, ["--port", String(port)]),
  );
  const shippers = shipperFiles.map((file, i) => script("shipper", `shipper ${i}`, file));
  const forwarder = script("forwarder", "forwarder", serverFile);
  const monitor = script("monitor", "monitor", serverFile, ["--watch"]);
  const housekeeping = script("housekeep", "housekeep", serverFile, ["--watch"]);

  const writers = [...HOSTS.keys(), 0].map((host, id) =>
    createWriter({
      id,
      host: (HOSTS[host] as string).replace(/[.:]/g, "-"),
      path: join(logs[host] as string, id < HOSTS.length ? "access.log" : "api.log"),
      linesPerSecond: Math.ceil(options.linesPerSecond / (HOSTS.length + 1)),
      startMs: Date.now() - 5 * 86_400_000,
      clockSpeed: 120, // a window of 20 minutes passes in 10 seconds
      zone: [0, 360, -210, 345][host] as number,
      dated: host % 2 === 1,
      random: createRandom(random.between(0, 0x7fffffff)),
    }),
  );

  // A file that was rotated before the very first start is history by design: the adversary waits for that.
  await firstLines(HOSTS.map((host) => join(dir, host)));
  const hostile = startHostile(
    { port: ports[0] as number, host: HOSTILE, token: HOSTILE_TOKEN, others: HOSTS },
    createRandom(random.between(0, 0x7fffffff)),
  );

  return {
    writers,
    shippers,
    receivers,
    forwarder,
    monitor,
    housekeeping,
    uplinks,
    downlink,
    mailbox,
    server: dir,
    client: at("client"),
    report,
    hosts: HOSTS,
    hostile,
    hostileName: HOSTILE.replaceAll(".", "-"),
    stateDirs,
    hasOwnDisk,
    servers: sshd ? [sshd.process] : [],
    processes: [...shippers, ...receivers, forwarder, monitor, housekeeping],
    close: async () => {
      await hostile.stop();
      for (const proxy of [...uplinks, ...(downlink ? [downlink] : [])]) await proxy.close();
      await mailbox.down();
      await sshd?.process.stop();
    },
  };
}

/** Waits until each of the receiver's folders has a batch. */
async function firstLines(folders: string[]): Promise<void> {
  const hasBatch = (folder: string) =>
    existsSync(folder) && readdirSync(folder).some((name) => name.includes(".log"));
  for (const deadline = Date.now() + 120_000; !folders.every(hasBatch); ) {
    if (Date.now() > deadline)
      throw new Error(`The pipeline did not start: no lines in ${folders.join(", ")}`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Puts a small file system of its own on `path`; false when we may not. */
function mountDisk(path: string, mebibytes: number): boolean {
  if (process.getuid?.() !== 0) return false;
  try {
    execFileSync("mount", ["-t", "tmpfs", "-o", `size=${mebibytes}m`, "log-rt-sync-chaos", path], {
      stdio: "ignore",
    });
    return true;
  } catch {
    return false; // a container without the right to mount
  }
}

/** Takes the file system of {@link mountDisk} away. */
export function unmountDisk(path: string): void {
  execFileSync("umount", ["-l", path]);
}

/** The name of the user who runs this, as the system has it; the environment may be empty. */
function userName(): string {
  return execFileSync("id", ["-un"], { encoding: "utf8" }).trim();
}

interface Sshd {
  port: number;
  process: Supervised;
  clientKey: string;
  fingerprint: string;
}

/** An OpenSSH server for this user alone, with keys made for it; undefined when it is not installed. */
async function startSshd(folder: string, client: string): Promise<Sshd | undefined> {
  const sshd = findProgram("sshd");
  if (!sshd || !findProgram("ssh-keygen")) return undefined;
  mkdirSync(folder, { recursive: true });
  if (process.getuid?.() === 0) mkdirSync("/run/sshd", { recursive: true, mode: 0o755 });
  const hostKey = join(folder, "host_key");
  const clientKey = join(folder, "client_key");
  for (const file of [hostKey, clientKey]) {
    execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "chaos", "-f", file]);
  }
  writeFileSync(join(folder, "authorized_keys"), readFileSync(`${clientKey}.pub`), { mode: 0o600 });
  const port = await freePort();
  const config = [
    `Port ${port}`,
    "ListenAddress 127.0.0.1",
    `HostKey ${hostKey}`,
    `AuthorizedKeysFile ${join(folder, "authorized_keys")}`,
    `PidFile ${join(folder, "pid")}`,
    "StrictModes no",
    "UsePAM no",
    "PasswordAuthentication no",
    "PermitRootLogin prohibit-password",
    "MaxStartups 100",
    "Subsystem sftp internal-sftp",
  ];
  writeFileSync(join(folder, "sshd_config"), `${config.join("\n")}\n`);
  const fingerprint = execFileSync("ssh-keygen", ["-lf", `${hostKey}.pub`], { encoding: "utf8" }).split(
    " ",
  )[1];
  const log = join(folder, "output.log");
  const args = ["-D", "-e", "-f", join(folder, "sshd_config")];
  const process_ = supervise("sshd", sshd, args, { log, cwd: client });
  return { port, process: process_, clientKey, fingerprint: fingerprint as string };
}

/** The program's path, or undefined; also looks where Debian puts servers. */
export function findProgram(name: string): string | undefined {
  for (const folder of [...(process.env.PATH ?? "").split(":"), "/usr/sbin", "/usr/local/sbin", "/sbin"]) {
    try {
      accessSync(join(folder, name), constants.X_OK);
      return join(folder, name);
    } catch {
      // not there
    }
  }
  return undefined;
}

let lastPort = 15_000 + (process.pid % 10_000);

/**
 * A TCP port that is free, and not of those that the system gives to whoever asks for any: between this moment
 * and its use nobody gets it by chance.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    lastPort = lastPort >= 32_000 ? 15_000 : lastPort + 1;
    const port = lastPort;
    const free = await new Promise<boolean>((resolve) => {
      const server = createServer();
      server.on("error", () => resolve(false));
      server.listen(port, "127.0.0.1", () => server.close(() => resolve(true)));
    });
    if (free) return port;
  }
}
