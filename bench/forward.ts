/**
 * Delivery over SFTP against OpenSSH's own `sftp -b`: the same files, the same server on loopback, one after
 * the other in one run. `bun run bench/forward.ts [ROUNDS]` prints a table; needs sshd, sftp and root.
 *
 * Beside the plain `put` stands `put -f`, which syncs each remote file, as the forwarder does where offered.
 */
import { type ChildProcess, execFileSync, spawn } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { connect, createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** One load: so many files of so many bytes. */
export interface Load {
  name: string;
  files: number;
  bytes: number;
}

/** What a load took; seconds are the median over the rounds. */
export interface Comparison {
  load: string;
  forwarderSeconds: number;
  sftpSeconds: number;
  /** `sftp -b` with `put -f`. */
  sftpSyncedSeconds: number;
  /** Seconds of `sftp -b` for one second of the forwarder: 1 and more is no slower. */
  ratio: number;
  ratioSynced: number;
  /** Largest resident size of the forwarder. */
  peakBytes: number;
}

export const LOADS: Load[] = [
  { name: "1 file of 1 GiB", files: 1, bytes: 1024 ** 3 },
  { name: "1,000 files of 48 KiB", files: 1000, bytes: 48 * 1024 },
];

/** Runs every load `rounds` times with each program, in turn. Temporary files go to `folder`. */
export async function compareForward(
  { rounds = 3, loads = LOADS, folder = tmpdir() } = {},
  tell: (text: string) => void = () => {},
): Promise<Comparison[]> {
  const root = mkdtempSync(join(folder, "log-rt-sync-forward-"));
  const server = await startServer(root);
  try {
    const results: Comparison[] = [];
    for (const load of loads) results.push(await compare(load, rounds, root, server, tell));
    return results;
  } finally {
    server.process.kill();
    rmSync(root, { recursive: true, force: true });
  }
}

interface Server {
  process: ChildProcess;
  port: number;
  hostKey: string;
}

async function compare(
  load: Load,
  rounds: number,
  root: string,
  server: Server,
  tell: (text: string) => void,
) {
  const source = join(root, "source");
  const remote = join(root, "remote");
  mkdirSync(source, { recursive: true });
  writeLoad(source, load);
  const seconds = { forwarder: [] as number[], sftp: [] as number[], synced: [] as number[] };
  let peakBytes = 0;
  for (let round = 1; round <= rounds; round++) {
    const clean = () => {
      rmSync(remote, { recursive: true, force: true });
      mkdirSync(remote);
      execFileSync("sync");
    };
    clean();
    seconds.sftp.push(await runSftp(root, source, remote, server, "put"));
    check(source, remote);
    clean();
    seconds.synced.push(await runSftp(root, source, remote, server, "put -f"));
    check(source, remote);
    clean();
    const run = await runForwarder(root, source, remote, server);
    seconds.forwarder.push(run.seconds);
    peakBytes = Math.max(peakBytes, run.peakBytes);
    check(source, remote);
    const last = Object.entries(seconds).map(([name, list]) => `${name} ${list.at(-1)?.toFixed(2)} s`);
    tell(
      `${load.name}, round ${round}: ${last.join(", ")}, peak ${(run.peakBytes / 1024 ** 2).toFixed(0)} MiB`,
    );
  }
  rmSync(source, { recursive: true });
  rmSync(remote, { recursive: true });
  const [forwarderSeconds, sftpSeconds, sftpSyncedSeconds] = [
    seconds.forwarder,
    seconds.sftp,
    seconds.synced,
  ].map(median) as [number, number, number];
  const ratio = sftpSeconds / forwarderSeconds;
  const ratioSynced = sftpSyncedSeconds / forwarderSeconds;
  return { load: load.name, forwarderSeconds, sftpSeconds, sftpSyncedSeconds, ratio, ratioSynced, peakBytes };
}

function median(values: number[]): number {
  return [...values].sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? Number.NaN;
}

/** Batches of access-log lines, a window each. */
function writeLoad(folder: string, { files, bytes }: Load): void {
  let line = "";
  for (let i = 0; line.length < 1024 ** 2; i++) {
    line += `10.0.${i % 256}.7 - - [22/Nov/2026:06:20:01 +0600] "GET /item/${i}?q=a HTTP/1.1" 200 ${i % 9999} "-" "curl/8.5"\n`;
  }
  const block = Buffer.from(line);
  for (let i = 0; i < files; i++) {
    const hour = 26010100 + Math.floor(i / 72) * 100 + (Math.floor(i / 3) % 24);
    const window = ["00-19", "20-39", "40-59"][i % 3];
    const path = join(folder, `accessLog_${hour}_${window}_10-0-0-1.log`);
    for (let left = bytes; left > 0; left -= block.length) {
      writeFileSync(path, block.subarray(0, Math.min(left, block.length)), { flag: "a" });
    }
  }
}

/** The same names with the same sizes; that content is kept is the tests' matter. */
function check(source: string, remote: string): void {
  const list = (folder: string) =>
    execFileSync("find", [folder, "-type", "f", "-printf", "%f %s\n"], { maxBuffer: 1e8 })
      .toString()
      .split("\n")
      .sort()
      .join("\n");
  if (list(source) !== list(remote)) throw new Error(`${remote} is not the same as ${source}`);
}

function runSftp(
  root: string,
  source: string,
  remote: string,
  { port }: Server,
  put: string,
): Promise<number> {
  const batch = join(root, "batch");
  writeFileSync(
    batch,
    readdirSync(source)
      .sort()
      .map((name) => `${put} ${join(source, name)} ${remote}/\n`)
      .join(""),
  );
  const options = [
    "StrictHostKeyChecking=no",
    "UserKnownHostsFile=/dev/null",
    "LogLevel=ERROR",
    `IdentityFile=${join(root, "client")}`,
  ];
  const args = [
    "-b",
    batch,
    "-P",
    String(port),
    ...options.flatMap((option) => ["-o", option]),
    `${user()}@127.0.0.1`,
  ];
  return timed("sftp", args).then(({ seconds }) => seconds);
}

/** The forwarder's queue is made of hard links, so that each round has the same files in the page cache. */
function runForwarder(root: string, source: string, remote: string, { port, hostKey }: Server) {
  const dir = join(root, "dir");
  rmSync(dir, { recursive: true, force: true });
  mkdirSync(dir);
  execFileSync("cp", ["-rl", source, join(dir, "10.0.0.1")]);
  const forwarder = {
    dir,
    target: `sftp://${user()}@127.0.0.1:${port}${remote}`,
    privateKey: { file: join(root, "client") },
    hostKey,
    report: join(dir, "report.log"),
  };
  const config = join(root, "config.json");
  writeFileSync(config, JSON.stringify({ forwarder }));
  const script = join(import.meta.dirname, "..", "forwarder.ts");
  return timed(process.execPath, ["run", script, "--config", config, "--once"]);
}

function user(): string {
  return execFileSync("id", ["-un"]).toString().trim();
}

function timed(command: string, args: string[]): Promise<{ seconds: number; peakBytes: number }> {
  const started = performance.now();
  const child = spawn(command, args, { stdio: ["ignore", "ignore", "inherit"] });
  let peakBytes = 0;
  const timer = setInterval(() => {
    peakBytes = Math.max(peakBytes, peakOf(child.pid ?? 0));
  }, 20);
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("exit", (code) => {
      clearInterval(timer);
      if (code !== 0) reject(new Error(`${command} ended with ${code}`));
      else resolve({ seconds: (performance.now() - started) / 1000, peakBytes });
    });
  });
}

/** VmHWM of proc(5), in bytes. */
function peakOf(pid: number): number {
  try {
    return Number(/VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1] ?? 0) * 1024;
  } catch {
    return 0; // ended
  }
}

async function startServer(root: string): Promise<Server> {
  for (const name of ["host", "client"]) {
    execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", join(root, name)]);
  }
  const port = await freePort();
  mkdirSync("/run/sshd", { recursive: true });
  writeFileSync(
    join(root, "sshd_config"),
    `Port ${port}\nListenAddress 127.0.0.1\nHostKey ${join(root, "host")}\nPidFile none\nStrictModes no\nUsePAM no
AuthorizedKeysFile ${join(root, "client.pub")}\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n`,
  );
  const sshd = ["/usr/sbin/sshd", "/usr/local/sbin/sshd", "/sbin/sshd"].find(existsSync) ?? "/usr/sbin/sshd";
  const child = spawn(sshd, ["-D", "-e", "-f", join(root, "sshd_config")], { stdio: "ignore" });
  const deadline = Date.now() + 10_000;
  while (!(await accepts(port))) {
    if (Date.now() > deadline) throw new Error("sshd does not listen");
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  const hostKey =
    execFileSync("ssh-keygen", ["-lf", join(root, "host.pub")])
      .toString()
      .split(" ")[1] ?? "";
  return { process: child, port, hostKey };
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.on("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolve(port));
    });
  });
}

function accepts(port: number): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = connect(port, "127.0.0.1");
    socket.once("connect", () => {
      socket.destroy();
      resolve(true);
    });
    socket.once("error", () => resolve(false));
  });
}

if (import.meta.main) {
  const rounds = Number(process.argv[2] ?? 3);
  const results = await compareForward({ rounds }, (text) => process.stderr.write(`${text}\n`));
  for (const one of results) {
    const peak = (one.peakBytes / 1024 ** 2).toFixed(0);
    process.stdout.write(
      `${one.load}: forwarder ${one.forwarderSeconds.toFixed(2)} s, sftp -b ${one.sftpSeconds.toFixed(2)} s (ratio ${one.ratio.toFixed(2)}), ` +
        `with put -f ${one.sftpSyncedSeconds.toFixed(2)} s (ratio ${one.ratioSynced.toFixed(2)}), peak ${peak} MiB\n`,
    );
  }
}
