/**
 * The fleet: the temporary folder with its config files, and the five scripts as real processes in it. Each
 * machine of the real world is a folder here:
 *
 *   <host>/   access.log, config.json, the shipper's cursor       middle/  batches, report, config.json
 *   client/   what the SFTP server would have                     mails/   .eml files
 */
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { closeSync, mkdirSync, mkdtempSync, openSync, writeFileSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Section } from "../lib/config.ts";

const ROOT = join(import.meta.dirname, "..");
/** A process that was asked to end has this long; then it is killed. */
const STOP_MS = 6000;

/** How fast the demo's world turns. */
export const PACE = {
  windowMinutes: 20,
  sealAfterSeconds: 2,
  heartbeatSeconds: 1,
  rotateWaitSeconds: 1.5,
  silentSeconds: 6,
};

/** The demo's folders. */
export interface Places {
  root: string;
  /** The receiver's ports. */
  ports: number[];
  /** The receiver's folder. */
  batches: string;
  /** The forwarder's report. */
  report: string;
  client: string;
  mails: string;
  host: (host: string) => string;
  middle: string;
}

/** One script as a process; it may be killed and started again. */
export interface Member {
  name: string;
  running: boolean;
  /** Where its log goes. */
  log: string;
  /** It ended although nobody asked it to. */
  died: boolean;
  start(): void;
  /** `kill -9`, and nothing else. */
  kill(): Promise<void>;
  /** SIGTERM; SIGKILL when that does not help. */
  stop(): Promise<void>;
}

/** Makes the folders and writes a config per machine. */
export async function createPlaces(hosts: string[]): Promise<Places> {
  const root = mkdtempSync(join(tmpdir(), "log-rt-sync-demo-"));
  const at = (name: string) => join(root, name);
  const ports = [await freePort(), await freePort()];
  const places: Places = {
    root,
    ports,
    batches: at("middle/batches"),
    report: at("middle/linecount-report.log"),
    client: at("client"),
    mails: at("mails"),
    host: (host) => at(host),
    middle: at("middle"),
  };
  for (const folder of [places.batches, places.client, places.mails, ...hosts.map(at)]) {
    mkdirSync(folder, { recursive: true });
  }
  const token = at("token");
  writeFileSync(token, `${randomBytes(24).toString("base64url")}\n`, { mode: 0o600 });
  const groupOf = (host: string) => (hosts.indexOf(host) < hosts.length / 2 ? 0 : 1);
  for (const host of hosts) {
    write(join(places.host(host), "config.json"), {
      shipper: {
        files: [join(places.host(host), "access.log")],
        receiver: `http://127.0.0.1:${ports[groupOf(host)]}`,
        host,
        token: { file: token },
        stateDir: join(places.host(host), "state"),
        rotateWaitSeconds: PACE.rotateWaitSeconds,
        heartbeatSeconds: PACE.heartbeatSeconds,
      },
    });
  }
  const { batches: dir, report } = places;
  write(join(places.middle, "config.json"), {
    receiver: {
      listen: "127.0.0.1",
      groups: ports.map((port, i) => ({ port, senders: hosts.filter((host) => groupOf(host) === i) })),
      dir,
      windowMinutes: PACE.windowMinutes,
      sealAfterSeconds: PACE.sealAfterSeconds,
      tokens: { "*": { file: token } },
    },
    forwarder: { dir, target: `file://${places.client}`, digest: true, intervalSeconds: 1, report },
    monitor: {
      dir,
      expected: hosts,
      silentMinutes: PACE.silentSeconds / 60,
      report,
      stateFile: join(places.middle, "monitor.json"),
      schedule: "* * * * * *",
      mail: { smtp: `file://${places.mails}`, from: "logs@example.com", to: ["ops@example.com"] },
    },
    housekeep: { dir, report, compressAfterHours: 0, deleteAfterHours: 4 },
  });
  return places;
}

/** A script that runs on one of the demo's machines; its log goes to a file beside its config. */
export function createMember(script: Section, folder: string, flags: string[] = []): Member {
  let child: ChildProcess | undefined;
  let ended: Promise<void> = Promise.resolve();
  let asked = false;
  const end = async (signal: NodeJS.Signals) => {
    asked = true;
    child?.kill(signal);
    await ended;
  };
  const member: Member = {
    name: script,
    running: false,
    log: join(folder, `${script}.out`),
    died: false,
    start() {
      const log = openSync(member.log, "a");
      const started = spawn(
        process.execPath,
        ["run", join(ROOT, `${script}.ts`), "--config", join(folder, "config.json"), ...flags],
        { stdio: ["ignore", log, log], cwd: folder },
      );
      closeSync(log);
      child = started;
      asked = false;
      member.running = true;
      ended = new Promise<void>((resolve) => {
        started.once("error", () => resolve());
        started.once("exit", () => resolve());
      }).then(() => {
        member.running = false;
        member.died = !asked;
      });
    },
    kill: () => end("SIGKILL"),
    async stop() {
      const late = setTimeout(() => child?.kill("SIGKILL"), STOP_MS);
      await end("SIGTERM");
      clearTimeout(late);
    },
  };
  return member;
}

/** Runs a script to its end and gives what it printed. */
export function runOnce(script: Section, folder: string, flags: string[]): Promise<string> {
  return new Promise((resolve, reject) => {
    const file = join(ROOT, `${script}.ts`);
    const args = ["run", file, "--config", join(folder, "config.json"), ...flags];
    const child = spawn(process.execPath, args, { stdio: ["ignore", "pipe", "pipe"], cwd: folder });
    let output = "";
    child.stdout.on("data", (data) => {
      output += data;
    });
    child.stderr.on("data", (data) => {
      output += data;
    });
    child.on("error", reject);
    child.on("close", (code) => {
      if (code === 0) resolve(output);
      else reject(new Error(`${script}.ts ended with ${code}: ${output}`));
    });
  });
}

function write(file: string, config: object): void {
  writeFileSync(file, `${JSON.stringify(config, null, 2)}\n`);
}

/** A port that nobody uses at the moment. */
function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once("error", reject);
    server.listen(0, "127.0.0.1", () => {
      const address = server.address();
      const port = typeof address === "object" && address ? address.port : 0;
      server.close(() => resolve(port));
    });
  });
}
