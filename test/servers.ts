/**
 * The real servers around the five scripts: nginx, logrotate, OpenSSH with a chrooted sftp-only account, and a
 * mail server. All on 127.0.0.1, with their files in temporary folders, ended and removed after the tests.
 */
import { execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import {
  chmodSync,
  chownSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { request } from "node:http";
import { connect } from "node:net";
import { join } from "node:path";
import { SMTPServer } from "smtp-server";
import ssh2, { type AuthContext, type SFTPWrapper, type Connection as SshConnection } from "ssh2";
import { findProgram, freePort, onCleanup, type Running, start, tempFolder, until } from "./support.ts";

/** What the Debian packages are called, for `missing()`. */
export const PACKAGES = {
  nginx: { nginx: "nginx-light" },
  logrotate: { logrotate: "logrotate" },
  sshd: { sshd: "openssh-server", "ssh-keygen": "openssh-client", useradd: "passwd" },
  dropbear: {
    ...{ dropbear: "dropbear-bin", dropbearkey: "dropbear-bin", "sftp-server": "openssh-sftp-server" },
    ...{ "ssh-keygen": "openssh-client", useradd: "passwd", openssl: "openssl" },
  },
  proftpd: { proftpd: "proftpd-core proftpd-mod-crypto", "ssh-keygen": "openssh-client", openssl: "openssl" },
};

function program(name: string): string {
  const path = findProgram(name);
  if (!path) throw new Error(`${name} is not installed`);
  return path;
}

/** A port that answers. */
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

// ---- nginx and logrotate

export interface Nginx {
  port: number;
  /** Folder of the log, and its live file. */
  folder: string;
  log: string;
  /**
   * Sends requests over one connection, one after the other; each line gets the time (as $time_local shows it)
   * that `timeOf` gives for its number. Returns when nginx has answered, and so has written, all of them.
   */
  get(numbers: Iterable<number>, timeOf: (number: number) => string): Promise<void>;
  /** `logrotate -f` with Debian's way for nginx: rename, create, USR1, compress the one before. */
  rotate(): void;
  /** The log's files in order of writing: `access.log.3.gz`, …, `access.log.1`, `access.log`. */
  files(): string[];
}

/**
 * Starts an nginx that logs in the combined format, but takes the time from the request's header `Time`, so that
 * a test can write into windows of the past.
 */
export async function startNginx(): Promise<Nginx> {
  const folder = await tempFolder();
  const port = await freePort();
  const log = join(folder, "access.log");
  const config = join(folder, "nginx.conf");
  const temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"].map(
    (name) => `${name}_temp_path ${join(folder, "temp")};`,
  );
  writeFileSync(
    config,
    `daemon off; ${process.getuid?.() === 0 ? "user root;" : ""} worker_processes 2; pid ${join(folder, "nginx.pid")};
error_log ${join(folder, "error.log")};
events { worker_connections 64; }
http {
  ${temp.join(" ")}
  log_format timed '$remote_addr - $remote_user [$http_time] "$request" $status $body_bytes_sent "$http_referer" "$http_user_agent"';
  access_log ${log} timed;
  keepalive_requests 1000000;
  server { listen 127.0.0.1:${port}; location / { return 200 "hello\\n"; } }
}\n`,
  );
  const logrotate = join(folder, "logrotate.conf");
  writeFileSync(
    logrotate,
    `${log} {
  rotate 20
  create 0640
  compress
  delaycompress
  sharedscripts
  postrotate
    kill -USR1 $(cat ${join(folder, "nginx.pid")})
  endscript
}\n`,
  );
  chmodSync(logrotate, 0o644);
  const nginx = start(program("nginx"), ["-e", join(folder, "error.log"), "-p", folder, "-c", config]);
  onCleanup(() => nginx.stop("SIGTERM")); // a killed master would leave its workers behind
  await until("nginx listens", () => accepts(port));
  let rotations = 0;
  return {
    port,
    folder,
    log,
    get: async (numbers, timeOf) => {
      for (const number of numbers) await getOnce(port, number, timeOf(number));
    },
    rotate: () => {
      execFileSync(program("logrotate"), ["-f", "-s", join(folder, "logrotate.state"), logrotate]);
      rotations++;
    },
    files: () => {
      const old = Array.from({ length: rotations }, (_, i) => `${log}.${rotations - i}`);
      return [...old.map((path, i) => (i < rotations - 1 ? `${path}.gz` : path)), log];
    },
  };
}

function getOnce(port: number, number: number, time: string): Promise<void> {
  return new Promise((resolve, reject) => {
    const headers = { Time: time, "User-Agent": `test "${number % 7}"` };
    const call = request(
      { host: "127.0.0.1", port, path: `/item/${number}?q=caf%C3%A9`, headers },
      (answer) => {
        answer.resume();
        answer.on("end", resolve);
      },
    );
    call.on("error", reject);
    call.end();
  });
}

// ---- OpenSSH

export interface Sshd {
  port: number;
  user: string;
  /** File of the private key that the account takes. */
  privateKey: string;
  /** `SHA256:…`, as forwarder.hostKey wants it. */
  hostKey: string;
  /** The account's one folder, as the server's machine sees it; the client sees it as `/upload`. */
  folder: string;
  /** `sftp://USER@127.0.0.1:PORT/upload`. */
  target: string;
  /** The server as a process; it may be stopped and started again on the same port. */
  start(): Promise<Running>;
}

/**
 * Starts OpenSSH's server with one account that may do SFTP and nothing else, in a chroot whose only folder it
 * can write to is `/upload`. Needs root: the account is made for the test and removed behind it. `settings` are
 * lines of sshd_config(5) that go before the usual ones, and so win.
 */
export async function startSshd({ settings = [] as string[] } = {}): Promise<Sshd> {
  const port = await freePort();
  // "*" is no password; useradd's "!" would lock the account for keys, too
  const { user, uid, gid } = addAccount(port, ["--shell", "/usr/sbin/nologin", "--password", "*"]);
  // sshd wants every folder above the chroot to be root's alone: /tmp is not.
  mkdirSync("/run/sshd", { recursive: true, mode: 0o755 });
  const root = mkdtempSync(`/run/log-rt-sync-sshd-${process.pid}-`);
  onCleanup(() => rmSync(root, { recursive: true, force: true }));
  chmodSync(root, 0o755);
  const folder = join(root, "chroot", "upload");
  mkdirSync(folder, { recursive: true });
  chownSync(folder, uid, gid);

  const keys = await tempFolder();
  for (const name of ["host", "client"]) {
    execFileSync(program("ssh-keygen"), ["-q", "-t", "ed25519", "-N", "", "-f", join(keys, name)]);
  }
  const authorized = join(root, "authorized");
  writeFileSync(authorized, readFileSync(join(keys, "client.pub")), { mode: 0o644 });
  const [, hostKey = ""] = execFileSync(program("ssh-keygen"), ["-lf", join(keys, "host.pub")])
    .toString()
    .split(" ");
  const config = join(keys, "sshd_config");
  writeFileSync(
    config,
    `${settings.join("\n")}
Port ${port}
ListenAddress 127.0.0.1
HostKey ${join(keys, "host")}
PidFile ${join(keys, "pid")}
AuthorizedKeysFile ${authorized}
AllowUsers ${user}
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
MaxStartups 100
Subsystem sftp internal-sftp
ChrootDirectory ${join(root, "chroot")}
ForceCommand internal-sftp
AllowTcpForwarding no
`,
  );
  const sshd: Sshd = {
    port,
    user,
    privateKey: join(keys, "client"),
    hostKey,
    folder,
    target: `sftp://${user}@127.0.0.1:${port}/upload`,
    start: async () => {
      const running = start(program("sshd"), ["-D", "-e", "-f", config]);
      await until("sshd listens", () => accepts(port));
      return running;
    },
  };
  await sshd.start();
  return sshd;
}

/** An account of this machine for the tests of this process, removed behind them. */
function addAccount(port: number, options: string[]): { user: string; uid: number; gid: number } {
  removeStale();
  const user = `lrs-${process.pid}-${port}`;
  execFileSync(program("useradd"), ["--system", "--no-create-home", ...options, user]);
  onCleanup(() => execFileSync(program("userdel"), [user]));
  const [uid = 0, gid = 0] = ["-u", "-g"].map((flag) => Number(execFileSync("id", [flag, user])));
  return { user, uid, gid };
}

/** Small file systems that a test mounted to run out of room. */
function unmountUnder(path: string): void {
  for (const line of readFileSync("/proc/self/mounts", "utf8").split("\n")) {
    const mounted = line.split(" ")[1] ?? "";
    if (mounted.startsWith(`${path}/`)) execFileSync("umount", ["-l", mounted]);
  }
}

/** A run that was killed could not clean up behind itself: its account, folder and mounts name its process. */
function removeStale(): void {
  const isOver = (pid: string | undefined) => pid !== undefined && !existsSync(`/proc/${pid}`);
  for (const line of readFileSync("/etc/passwd", "utf8").split("\n")) {
    const [user = "", pid] = /^lrs-(\d+)-\d+(?=:)/.exec(line) ?? [];
    if (isOver(pid)) execFileSync(program("userdel"), [user]);
  }
  for (const name of readdirSync("/run")) {
    const pid = /^log-rt-sync-(?:sshd|dropbear|proftpd)-(\d+)-/.exec(name)?.[1];
    if (!isOver(pid)) continue;
    unmountUnder(join("/run", name));
    rmSync(join("/run", name), { recursive: true, force: true });
  }
}

// ---- dropbear

/** Starts dropbear with an account that has a key and a password; `target` is a folder in its home. Needs root. */
export async function startDropbear(): Promise<Proftpd & { privateKey: string }> {
  const port = await freePort();
  const root = mkdtempSync(`/run/log-rt-sync-dropbear-${process.pid}-`);
  onCleanup(() => rmSync(root, { recursive: true, force: true }));
  chmodSync(root, 0o755);
  const [home, folder, password] = [join(root, "home"), join(root, "home", "upload"), `pass-${port}`];
  const hash = execFileSync(program("openssl"), ["passwd", "-6", password]).toString().trim();
  const { user, uid, gid } = addAccount(port, ["--home-dir", home, "--shell", "/bin/sh", "--password", hash]);
  const privateKey = join(await tempFolder(), "client");
  execFileSync(program("ssh-keygen"), ["-q", "-t", "ed25519", "-N", "", "-f", privateKey]);
  for (const each of [folder, join(home, ".ssh")]) mkdirSync(each, { recursive: true, mode: 0o755 });
  writeFileSync(join(home, ".ssh", "authorized_keys"), readFileSync(`${privateKey}.pub`), { mode: 0o600 });
  for (const each of [home, folder, join(home, ".ssh"), join(home, ".ssh", "authorized_keys")])
    chownSync(each, uid, gid);
  const key = join(root, "host");
  const made = execFileSync(program("dropbearkey"), ["-t", "ed25519", "-f", key], {
    stdio: "pipe",
  }).toString();
  const hostKey = /SHA256:\S+/.exec(made)?.[0] ?? "";
  const flags = ["-F", "-E", "-r", key, "-p", `127.0.0.1:${port}`, "-P", join(root, "pid")];
  const server = start(program("dropbear"), flags);
  await until(
    () => `dropbear listens, but:\n${server.output}`,
    () => accepts(port),
  );
  return {
    port,
    user,
    password,
    privateKey,
    hostKey,
    folder,
    target: `sftp://${user}@127.0.0.1:${port}${folder}`,
  };
}

// ---- ProFTPD

/** ProFTPD's SFTP server with one account; it has neither posix-rename nor fsync in all versions. */
export interface Proftpd {
  port: number;
  user: string;
  password: string;
  hostKey: string;
  folder: string;
  target: string;
}

/** Starts ProFTPD with mod_sftp and one account with a password, confined to its folder. Needs root. */
export async function startProftpd(): Promise<Proftpd> {
  const port = await freePort();
  const root = mkdtempSync(`/run/log-rt-sync-proftpd-${process.pid}-`);
  onCleanup(() => rmSync(root, { recursive: true, force: true }));
  chmodSync(root, 0o755);
  const [user, password, nobody] = ["client", `pass-${port}`, 65_534];
  const folder = join(root, "home", "upload");
  mkdirSync(folder, { recursive: true });
  chownSync(folder, nobody, nobody);
  const hash = execFileSync(program("openssl"), ["passwd", "-6", password]).toString().trim();
  writeFileSync(
    join(root, "passwd"),
    `${user}:${hash}:${nobody}:${nobody}::${join(root, "home")}:/usr/sbin/nologin\n`,
    { mode: 0o600 },
  );
  execFileSync(program("ssh-keygen"), [
    "-q",
    "-t",
    "rsa",
    "-b",
    "2048",
    "-m",
    "PEM",
    "-N",
    "",
    "-f",
    join(root, "host"),
  ]);
  const hostKey =
    execFileSync(program("ssh-keygen"), ["-lf", join(root, "host.pub")])
      .toString()
      .split(" ")[1] ?? "";
  const config = join(root, "proftpd.conf");
  writeFileSync(
    config,
    `LoadModule mod_sftp.c
ServerType standalone
ServerName test
DefaultAddress 127.0.0.1
SocketBindTight on
Port ${port}
UseReverseDNS off
PidFile ${join(root, "pid")}
ScoreboardFile ${join(root, "scoreboard")}
DelayTable none
WtmpLog off
User nobody
Group nogroup
AuthOrder mod_auth_file.c
AuthUserFile ${join(root, "passwd")}
RequireValidShell off
DefaultRoot ~
SFTPEngine on
SFTPHostKey ${join(root, "host")}
SFTPAuthMethods password
SFTPLog ${join(root, "sftp.log")}
`,
  );
  const server = start(program("proftpd"), ["--nodaemon", "--config", config]);
  await until(
    () => `proftpd listens, but:\n${server.output}`,
    () => accepts(port),
  );
  return { port, user, password, hostKey, folder, target: `sftp://${user}@127.0.0.1:${port}/upload` };
}

// ---- a server with habits

/** What a server does otherwise than OpenSSH; statuses are numbers of SFTP's draft, section 7. */
export interface Habits {
  /** What FSTAT of an open file says: a status, or a size of 0. */
  fstat?: number | "zero";
  /** The status of STAT for a name that is not there, of STAT for every name, of READDIR. */
  statMissing?: number;
  statAlways?: number;
  list?: number;
  /** Statuses by path; undefined is success. */
  create?: (path: string) => number | undefined;
  rename?: (from: string, to: string) => number | undefined;
  remove?: (path: string) => number | undefined;
  readable?: boolean;
  /** A file of this name vanishes at CLOSE: an importer. */
  takes?: (path: string) => boolean;
  /** The connection is cut when this file is written. */
  cutsAt?: (path: string) => boolean;
  /** What is never answered. */
  silentAt?: (what: string) => boolean;
  /** Every READ is answered with more bytes: a file without an end. */
  endless?: boolean;
  /** Answers come in any order. */
  shuffled?: boolean;
  /** The server's text behind a status. */
  text?: string;
  /** What a login needs, in this order; by default one password. */
  login?: ("publickey" | "password" | "keyboard-interactive")[];
  passwordExpired?: boolean;
  /** What becomes of a connection's channel behind its first one. */
  nextChannel?: "refused" | "silent" | "cut" | "no subsystem";
}

export interface HabitServer {
  target: string;
  hostKey: string;
  habits: Habits;
  /** Files by path. */
  files: Map<string, Buffer>;
  /** What was asked, in order: `open /in/a.tmp`, `rename /in/a.tmp`, … */
  asked: string[];
}

export const HABIT_PASSWORD = "open sesame";

/** A key pair. Of those that ssh2 makes, it can't read one in 300 itself. */
export function makeKey(): ReturnType<typeof ssh2.utils.generateKeyPairSync> {
  for (;;) {
    const pair = ssh2.utils.generateKeyPairSync("ed25519");
    if (!(ssh2.utils.parseKey(pair.private) instanceof Error)) return pair;
  }
}

/** Starts an SFTP server in this process, with one account and files in memory; its folder is `/in`. */
export async function startHabitServer(habits: Habits = {}): Promise<HabitServer> {
  const key = makeKey();
  const port = await freePort();
  const parsed = ssh2.utils.parseKey(key.private);
  if (parsed instanceof Error) throw parsed;
  const hostKey = `SHA256:${createHash("sha256").update(parsed.getPublicSSH()).digest("base64").replace(/=+$/, "")}`;
  const host: HabitServer = {
    target: `sftp://client@127.0.0.1:${port}/in`,
    hostKey,
    habits,
    files: new Map(),
    asked: [],
  };
  const connections = new Set<SshConnection>();
  const server = new ssh2.Server({ hostKeys: [key.private] }, (client) => {
    connections.add(client);
    client.on("error", () => {}).on("close", () => connections.delete(client));
    const done: string[] = [];
    client.on("authentication", (context) => authenticate(context, done, habits));
    let channels = 0;
    client.on("session", (accept, reject) => {
      host.asked.push(`channel ${++channels}`);
      const habit = channels > 1 ? habits.nextChannel : undefined;
      if (habit === "refused") reject();
      else if (habit === "cut") client.end();
      else if (habit !== "silent")
        accept().on("sftp", (acceptSftp, rejectSftp) =>
          habit ? rejectSftp() : serveHabits(acceptSftp(), host, () => client.end()),
        );
    });
  });
  await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
  onCleanup(() => {
    for (const client of connections) client.end();
    server.close();
  });
  return host;
}

function authenticate(
  context: AuthContext,
  done: string[],
  { login = ["password"], passwordExpired }: Habits,
): unknown {
  const next = login[done.length] ?? "password";
  if (context.method !== next) return context.reject([next], false);
  const succeed = () => {
    if (context.method === "publickey" && !context.signature) return context.accept(); // only asks whether it may
    done.push(context.method);
    const [following] = login.slice(done.length);
    if (following) context.reject([following], true);
    else context.accept();
  };
  if (context.method === "password") {
    if (passwordExpired) return context.requestChange("a new one, please", () => {});
    if (context.password !== HABIT_PASSWORD) return context.reject([next], false);
  }
  if (context.method !== "keyboard-interactive") return succeed();
  return context.prompt([{ prompt: "Password: ", echo: false }], (answers) =>
    answers[0] === HABIT_PASSWORD ? succeed() : context.reject([next], false),
  );
}

function serveHabits(sftp: SFTPWrapper, { habits, files, asked }: HabitServer, cut: () => void): void {
  const open = new Map<number, { path: string; listed?: boolean }>();
  let handles = 0;
  const held: (() => void)[] = [];
  const answer = (what: string, send: () => void) => {
    asked.push(what);
    if (habits.silentAt?.(what)) return;
    if (!habits.shuffled) return send();
    held.push(send);
    setTimeout(() => held.splice(Math.floor(Math.random() * held.length), 1)[0]?.(), 1);
  };
  const status = (id: number, code = 0) =>
    sftp.status(id, code, code === 0 ? "" : (habits.text ?? `status ${code}`));
  const attrs = (size: number) => ({
    mode: 0o100644,
    uid: 0,
    gid: 0,
    size,
    atime: 1_700_000_000,
    mtime: 1_700_000_000,
  });
  const fileOf = (handle: Buffer) => open.get(handle.readUInt32BE(0)) ?? { path: "" };
  const newHandle = (path: string) => {
    const handle = Buffer.alloc(4);
    handle.writeUInt32BE(++handles);
    open.set(handles, { path });
    return handle;
  };
  const stat = (id: number, path: string) =>
    answer(`stat ${path}`, () => {
      const file = files.get(path);
      if (habits.statAlways) status(id, habits.statAlways);
      else if (file) sftp.attrs(id, attrs(file.length));
      else status(id, ["/", "/in"].includes(path) ? 4 : (habits.statMissing ?? 2));
    });
  sftp.on("error", () => {});
  sftp.on("STAT", stat).on("LSTAT", stat);
  sftp.on("OPEN", (id, path, flags) =>
    answer(`open ${path}`, () => {
      const writes = (flags & 2) !== 0;
      const refused = writes
        ? habits.create?.(path)
        : !files.has(path)
          ? (habits.statMissing ?? 2)
          : undefined;
      if (refused !== undefined || (!writes && habits.readable === false)) return status(id, refused ?? 3);
      if (writes) files.set(path, Buffer.alloc(0));
      sftp.handle(id, newHandle(path));
    }),
  );
  sftp.on("WRITE", (id, handle, offset, data) => {
    const { path } = fileOf(handle);
    if (habits.cutsAt?.(path)) return cut();
    const bytes = Buffer.from(data); // the connection uses its memory again
    answer(`write ${path}`, () => {
      const old = files.get(path) ?? Buffer.alloc(0);
      const grown = Buffer.alloc(Math.max(old.length, offset + bytes.length));
      old.copy(grown);
      bytes.copy(grown, offset);
      files.set(path, grown);
      status(id);
    });
  });
  sftp.on("READ", (id, handle, offset, length) =>
    answer(`read ${fileOf(handle).path}`, () => {
      const file = files.get(fileOf(handle).path) ?? Buffer.alloc(0);
      if (habits.endless) return sftp.data(id, Buffer.alloc(length, 0x78));
      const part = file.subarray(offset, offset + length);
      if (part.length === 0) status(id, 1);
      else sftp.data(id, part);
    }),
  );
  sftp.on("FSTAT", (id, handle) =>
    answer("fstat", () => {
      if (typeof habits.fstat === "number") return status(id, habits.fstat);
      sftp.attrs(id, attrs(habits.fstat === "zero" ? 0 : (files.get(fileOf(handle).path)?.length ?? 0)));
    }),
  );
  sftp.on("CLOSE", (id, handle) => {
    const { path } = fileOf(handle);
    answer(`close ${path}`, () => {
      if (habits.takes?.(path)) files.delete(path);
      status(id);
    });
  });
  sftp.on("REMOVE", (id, path) =>
    answer(`remove ${path}`, () => {
      const refused = habits.remove?.(path);
      if (refused !== undefined) return status(id, refused);
      status(id, files.delete(path) ? 0 : 2);
    }),
  );
  sftp.on("RENAME", (id, from, to) =>
    answer(`rename ${from}`, () => {
      const refused = habits.rename?.(from, to) ?? (files.has(to) ? 4 : undefined);
      const file = files.get(from);
      if (refused !== undefined || !file) return status(id, refused ?? 2);
      files.set(to, file);
      files.delete(from);
      status(id);
    }),
  );
  sftp.on("OPENDIR", (id, path) =>
    answer(`list ${path}`, () => (habits.list ? status(id, habits.list) : sftp.handle(id, newHandle(path)))),
  );
  sftp.on("READDIR", (id, handle) => {
    const folder = fileOf(handle);
    answer("list", () => {
      if (folder.listed) return status(id, 1);
      folder.listed = true;
      const names = [...files.keys()].filter((path) => path.startsWith(`${folder.path}/`));
      const entries = names.map((path) => {
        const filename = path.slice(folder.path.length + 1);
        return { filename, longname: filename, attrs: attrs(files.get(path)?.length ?? 0) };
      });
      if (entries.length === 0) return status(id, 1);
      sftp.name(id, entries);
    });
  });
}

// ---- mail

export interface MailServer {
  port: number;
  /** Every message that was accepted, as it came over the wire. */
  messages: Buffer[];
}

/** Starts a mail server that takes everything. */
export async function startSmtp(): Promise<MailServer> {
  const messages: Buffer[] = [];
  const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    onData(stream, _session, callback) {
      const parts: Buffer[] = [];
      stream.on("data", (part: Buffer) => parts.push(part));
      stream.on("end", () => {
        messages.push(Buffer.concat(parts));
        callback();
      });
    },
  });
  const port = await freePort();
  await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
  onCleanup(() => new Promise<void>((resolve) => server.close(resolve)));
  return { port, messages };
}
