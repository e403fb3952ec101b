/**
 * The peers, each at its best: rsyslog over TCP and RELP, syslog-ng, Fluent Bit over HTTP and its own
 * protocol. One that is not installed is left out. `$SYSLOG_NG_ROOT` may name a folder with syslog-ng's
 * Debian packages unpacked (`dpkg -x`), because Debian does not install it beside rsyslog.
 */
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { type Contestant, type Pair, reachable, run, sizeOf, sleep, stopAll } from "./contestant.ts";
import { findProgram, freePort } from "./pipeline.ts";

/** The peers that this machine has. */
export function installedPeers(): Contestant[] {
  const rsyslogd = findProgram("rsyslogd");
  const syslogNg = findSyslogNg();
  const fluentBit = findProgram("fluent-bit");
  const module = (name: string) => existsSync(join(rsyslogModules(), `${name}.so`));
  return [
    ...(rsyslogd && module("imfile") ? [rsyslog(rsyslogd, "TCP")] : []),
    ...(rsyslogd && module("imfile") && module("omrelp") ? [rsyslog(rsyslogd, "RELP")] : []),
    ...(syslogNg ? [syslogng(syslogNg)] : []),
    ...(fluentBit ? [fluentbit(fluentBit, "http"), fluentbit(fluentBit, "forward")] : []),
  ];
}

function rsyslogModules(): string {
  const folders = [
    "/usr/lib/x86_64-linux-gnu/rsyslog",
    "/usr/lib/aarch64-linux-gnu/rsyslog",
    "/usr/lib64/rsyslog",
  ];
  return folders.find(existsSync) ?? "/usr/lib/rsyslog";
}

/** rsyslog keeps the order only with one worker, and RELP needs a large window to be usable. */
const RSYSLOG_QUEUE =
  'queue.type="FixedArray" queue.size="100000" queue.dequeueBatchSize="2048" queue.workerThreads="1"';

function rsyslog(program: string, protocol: "TCP" | "RELP"): Contestant {
  const tcp = protocol === "TCP";
  return {
    name: `rsyslog, ${protocol}`,
    promise: tcp ? "written, nothing acknowledged" : "taken into memory, acknowledged",
    start: async (folder, log) => {
      const port = await freePort();
      const output = join(folder, "output.log");
      for (const name of ["in", "out"]) mkdirSync(join(folder, name));
      writeFileSync(
        join(folder, "receiver.conf"),
        `global(workDirectory="${folder}/in" maxMessageSize="64k" parser.escapeControlCharactersOnReceive="off")
main_queue(${RSYSLOG_QUEUE})
module(load="${tcp ? "imptcp" : "imrelp"}")
template(name="line" type="string" string="%msg:2:$%\\n")
input(type="${tcp ? "imptcp" : "imrelp"}" port="${port}"${tcp ? ' address="127.0.0.1"' : ""})
action(type="omfile" file="${output}" template="line" ioBufferSize="256k")
`,
      );
      writeFileSync(
        join(folder, "sender.conf"),
        `global(workDirectory="${folder}/out" maxMessageSize="64k")
main_queue(${RSYSLOG_QUEUE})
module(load="imfile" mode="inotify")
${tcp ? "" : 'module(load="omrelp")'}
template(name="wire" type="string" string="<134>%TIMESTAMP% ${HOST_NAME} access: %msg%")
input(type="imfile" file="${log}" tag="access:" freshStartTail="off")
action(type="${tcp ? "omfwd" : "omrelp"}" target="127.0.0.1" port="${port}" template="wire"
  ${tcp ? 'protocol="tcp"' : 'windowSize="10000"'} action.resumeRetryCount="-1" action.resumeInterval="1")
`,
      );
      const args = (name: string) => [
        "-n",
        "-f",
        join(folder, `${name}.conf`),
        "-i",
        join(folder, `${name}.pid`),
      ];
      const receiver = run(folder, "receiver", program, args("receiver"));
      await reachable(port);
      const sender = run(folder, "sender", program, args("sender"));
      return pair(sender, receiver, output);
    },
  };
}

const HOST_NAME = "bench";

interface SyslogNg {
  program: string;
  env: Record<string, string>;
  flags: string[];
}

function findSyslogNg(): SyslogNg | undefined {
  const root = process.env.SYSLOG_NG_ROOT;
  if (root && existsSync(join(root, "usr/sbin/syslog-ng"))) {
    const library = join(root, "usr/lib");
    const paths = [`${library}/x86_64-linux-gnu`, `${library}/syslog-ng`, join(root, "lib/x86_64-linux-gnu")];
    return {
      program: join(root, "usr/sbin/syslog-ng"),
      env: { LD_LIBRARY_PATH: paths.join(":") },
      flags: ["--module-path", `${library}/syslog-ng/3.38`],
    };
  }
  const program = findProgram("syslog-ng");
  return program ? { program, env: {}, flags: [] } : undefined;
}

function syslogng({ program, env, flags }: SyslogNg): Contestant {
  return {
    name: "syslog-ng, TCP",
    promise: "written, nothing acknowledged",
    start: async (folder, log) => {
      const port = await freePort();
      const output = join(folder, "output.log");
      const options =
        "options { threaded(yes); use-dns(no); keep-hostname(yes); stats-freq(0); flush-lines(1000); };";
      writeFileSync(
        join(folder, "receiver.conf"),
        `@version: 3.35
${options}
source s { network(ip("127.0.0.1") port(${port}) transport("tcp") flags(no-parse) log-fetch-limit(1000) log-iw-size(100000)); };
destination d { file("${output}" template("\${MESSAGE}\\n") log-fifo-size(200000)); };
log { source(s); destination(d); flags(flow-control); };
`,
      );
      writeFileSync(
        join(folder, "sender.conf"),
        `@version: 3.35
${options}
source s { file("${log}" follow-freq(0.1) flags(no-parse) log-fetch-limit(1000) log-iw-size(100000)); };
destination d { network("127.0.0.1" port(${port}) transport("tcp") template("\${MESSAGE}\\n") log-fifo-size(200000)); };
log { source(s); destination(d); flags(flow-control); };
`,
      );
      const args = (name: string) => [
        ...["--foreground", "--no-caps", ...flags],
        ...["--cfgfile", join(folder, `${name}.conf`), "--persist-file", join(folder, `${name}.persist`)],
        ...["--pidfile", join(folder, `${name}.pid`), "--control", join(folder, `${name}.ctl`)],
      ];
      const receiver = run(folder, "receiver", program, args("receiver"), env);
      await reachable(port);
      const sender = run(folder, "sender", program, args("sender"), env);
      return pair(sender, receiver, output);
    },
  };
}

function fluentbit(program: string, protocol: "http" | "forward"): Contestant {
  return {
    name: `Fluent Bit, ${protocol}`,
    promise: "taken into memory, acknowledged",
    start: async (folder, log) => {
      const port = await freePort();
      const output = join(folder, "output.log");
      const address = ["-p", "host=127.0.0.1", "-p", `port=${port}`];
      const receiver = run(folder, "receiver", program, [
        ...[
          "-f",
          "0.2",
          "-i",
          protocol,
          "-p",
          "listen=127.0.0.1",
          "-p",
          `port=${port}`,
          "-p",
          "buffer_max_size=64M",
        ],
        ...["-o", "file", "-m", "*", "-p", `path=${folder}`, "-p", "file=output.log"],
        ...["-p", "format=template", "-p", "template={log}"],
      ]);
      await reachable(port);
      const sender = run(folder, "sender", program, [
        ...[
          "-f",
          "0.2",
          "-i",
          "tail",
          "-p",
          `path=${log}`,
          "-p",
          "read_from_head=on",
          "-p",
          "refresh_interval=1",
        ],
        ...["-p", `db=${join(folder, "tail.db")}`, "-p", "mem_buf_limit=64M"],
        ...["-o", protocol, "-m", "*", ...address, ...(protocol === "http" ? ["-p", "format=json"] : [])],
      ]);
      return pair(sender, receiver, output);
    },
  };
}

function pair(sender: ReturnType<typeof run>, receiver: ReturnType<typeof run>, output: string): Pair {
  return {
    sender: sender.pid as number,
    receiver: receiver.pid as number,
    outputs: () => [output],
    delivered: async (bytes) => sizeOf([output]) >= bytes,
    stop: async () => {
      await stopAll([sender]);
      await sleep(50);
      await stopAll([receiver]);
    },
  };
}
