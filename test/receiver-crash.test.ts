/**
 * The receiver as a process that is killed, stopped at each step, out of disk, or watched by strace: what it
 * answered 200 for is there once, and nothing else.
 */
import { expect, test } from "bun:test";
import { existsSync } from "node:fs";
import { readdir, readFile, rm, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { linesOfWindows, post, sendAll, storedWindows } from "./sending.ts";
import {
  expectSameLines,
  freePort,
  missing,
  notRoot,
  onCleanup,
  type Running,
  runScriptOnce,
  start,
  startScript,
  tempFolder,
  until,
  writeConfig,
} from "./support.ts";

async function setUp(options: object = {}) {
  const folder = await tempFolder();
  const dir = join(folder, "data");
  const port = await freePort();
  const receiver = { dir, groups: [{ port, senders: ["*"] }], sealAfterSeconds: 3600, ...options };
  const config = await writeConfig(folder, { receiver });
  return { folder, dir, port, config, url: `http://127.0.0.1:${port}` };
}

async function isUp(url: string): Promise<boolean> {
  return fetch(`${url}/healthz`).then(
    (response) => response.ok,
    () => false,
  );
}

async function run(config: string, url: string, env: Record<string, string> = {}): Promise<Running> {
  const receiver = startScript("receiver", config, [], env);
  await until(
    () => `the receiver listens:\n${receiver.output}`,
    () => isUp(url),
  );
  return receiver;
}

async function expectWindows(dir: string, host: string, text: string): Promise<void> {
  const stored = await storedWindows(dir, host);
  expect([...stored.keys()].sort()).toEqual(["26112206_00-19", "26112206_20-39", "26112206_40-59"]);
  expectSameLines(
    [...stored]
      .sort()
      .map(([, lines]) => lines)
      .join(""),
    text,
  );
}

const KILLS = Number(process.env.LOG_RT_SYNC_KILLS ?? 20);

test(`the receiver killed ${KILLS} times under load keeps every line once, in order`, async () => {
  const { dir, config, url } = await setUp({ sealAfterSeconds: 0.5 });
  const hosts = ["10.0.0.1", "10.0.0.2", "web-3.example"];
  const text = linesOfWindows(Math.max(30_000, 1500 * KILLS));
  const bytes = Buffer.from(text);
  let done = false;
  const sending = Promise.all(
    hosts.map((host) => sendAll(url, host, bytes, { signal: AbortSignal.timeout(600_000) })),
  ).finally(() => {
    done = true;
  });
  let kills = 0;
  for (; kills < KILLS && !done; kills++) {
    const receiver = startScript("receiver", config);
    await until(
      `the receiver listens or the senders are done`,
      async () => done || (await isUp(url)),
      60_000,
    );
    await new Promise((resolve) => setTimeout(resolve, Math.random() * 120)); // any instruction
    await receiver.stop("SIGKILL");
  }
  const receiver = startScript("receiver", config);
  await sending;
  expect(await receiver.stop()).toBe(0);
  expect(receiver.output).not.toContain(" error ");
  for (const host of hosts) await expectWindows(dir, host, text);
  process.stderr.write(`killed ${kills} times\n`);
}, 900_000);

/** Steps at which a process may be stopped; each must leave what the next start can mend. */
const STEPS = [
  "journal:written",
  "journal:synced",
  "store:synced",
  "store:noted",
  "checkpoint:synced",
  "checkpoint:written",
  "durable:written",
  "seal:recorded",
  "seal:renamed",
];

test.each(STEPS)("the receiver stopped at %s keeps every line once", async (step) => {
  const { dir, config, url } = await setUp({ sealAfterSeconds: 0.2 });
  const text = linesOfWindows(3000);
  const count = step === "journal:written" ? "5" : "1";
  const first = startScript("receiver", config, [], {
    LOG_RT_SYNC_STOP_AT: step,
    LOG_RT_SYNC_STOP_COUNT: count,
  });
  const stop = new AbortController();
  first.ended.finally(() => stop.abort());
  await sendAll(url, "10.0.0.1", Buffer.from(text), { signal: stop.signal }).catch(() => {});
  expect(await first.ended).toBe("SIGKILL");
  const receiver = await run(config, url);
  await sendAll(url, "10.0.0.1", Buffer.from(text));
  await until("all is sealed", async () => (await storedFiles(dir)).every((name) => !name.endsWith(".part")));
  expect(await receiver.stop()).toBe(0);
  await expectWindows(dir, "10.0.0.1", text);
});

async function storedFiles(dir: string, host = "10.0.0.1"): Promise<string[]> {
  return (await readdir(join(dir, host))).filter((name) => !name.startsWith("."));
}

test.skipIf(missing({ strace: "strace" })).each([3, 20])(
  "no 200 leaves before its record in the journal is synced (%d senders)",
  async (senders) => {
    const { folder, config, url } = await setUp();
    const receiver = await run(config, url);
    const trace = join(folder, "trace");
    const strace = start("strace", [
      ...["-f", "-y", "-v", "-s", "300", "-o", trace, "-p", String(receiver.process.pid)],
      ...["-e", "trace=pwritev,pwritev2,write,writev,sendto,sendmsg,fdatasync"],
    ]);
    await strace.says("attached");
    // Each sender has a range of offsets of its own: an offset tells whose it is.
    const hosts = Array.from({ length: senders }, (_, i) => `10.0.0.${i + 1}`);
    const RANGE = 1e9;
    const body = linesOfWindows(200);
    const chunks = 10;
    const send = async (host: string, start: number) => {
      for (let i = 0; i < chunks; i++) {
        const answer = await fetch(post(url, body, { host, offset: start + i * body.length }));
        expect(answer.status).toBe(200);
      }
    };
    await Promise.all(hosts.map((host, i) => send(host, i * RANGE)));
    await strace.stop("SIGINT");
    await receiver.stop();
    let written: number[] = [];
    const synced = new Set<number>();
    let answers = 0;
    let syncs = 0;
    const endSync = () => {
      for (const end of written) synced.add(end);
      written = [];
      syncs++;
    };
    for (const call of (await readFile(trace, "latin1")).split("\n")) {
      if (/ pwritev2?\(\d+<[^>]*\/\.journal-/.test(call)) {
        for (const [, from] of call.matchAll(/\\"from\\":(\d+)/g)) written.push(Number(from) + body.length);
      } else if (/ fdatasync\(\d+<[^>]*\/\.journal-.* = 0$/.test(call)) endSync();
      else if (/fdatasync resumed>.* = 0$/.test(call))
        endSync(); // parts and ledgers are synced by fsync
      else if (call.includes("HTTP/1.1 200 OK")) {
        answers++;
        expect(synced).toContain(Number(/Upload-Offset: (\d+)/.exec(call)?.[1]));
      }
    }
    expect(answers).toBe(chunks * hosts.length);
    expect(syncs).toBeLessThan(answers); // one serves all that came meanwhile
  },
);

/** Calls of a trace by strace -f -y in the order in which they ended: name, arguments, result. */
function* callsOf(trace: string): Generator<{ name: string; args: string; ok: boolean }> {
  const begun = new Map<string, string>();
  for (const line of trace.split("\n")) {
    const [, pid = "", text = ""] = /^(\d+) +(.*)$/.exec(line) ?? [];
    if (text.endsWith("<unfinished ...>")) {
      begun.set(pid, text);
      continue;
    }
    const resumed = /^<\.\.\. \w+ resumed>(.*)$/.exec(text)?.[1];
    const whole = resumed === undefined ? text : `${begun.get(pid) ?? ""}${resumed}`;
    const [, name = "", args = ""] = /^(\w+)\((.*)$/.exec(whole) ?? [];
    if (name) yield { name, args, ok: / = \d+/.test(whole) };
  }
}

test.skipIf(missing({ strace: "strace" }))(
  "a segment is dropped only after the syncs of all parts and ledgers that it speaks of",
  async () => {
    const { folder, config, url } = await setUp();
    const receiver = await run(config, url);
    const trace = join(folder, "trace");
    const strace = start("strace", [
      ...["-f", "-y", "-s", "0", "-o", trace, "-p", String(receiver.process.pid)],
      ...["-e", "trace=pwrite64,pwritev,pwritev2,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"],
    ]);
    await strace.says("attached");
    const body = Buffer.from(linesOfWindows(10_000).repeat(4));
    const hosts = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    const rounds = Math.ceil((150 << 20) / body.length / hosts.length);
    await Promise.all(
      hosts.map(async (host) => {
        for (let i = 0; i < rounds; i++)
          expect((await fetch(post(url, body, { host, offset: i * body.length }))).status).toBe(200);
      }),
    );
    const segments = async () =>
      (await readdir(join(folder, "data"))).filter((name) => /^\.journal-.*-\d+$/.test(name)).sort();
    await until("segments are dropped", async () => !(await segments())[0]?.endsWith("-00000001"));
    expect(await receiver.stop()).toBe(0);
    await strace.stop("SIGINT");
    /** Parts that were written and not synced since, hosts whose ledger is older than that: by the segment of that time. */
    const unsynced = new Map<string, number>();
    const unsaved = new Map<string, number>();
    let segment = 0;
    let drops = 0;
    for (const { name, args, ok } of callsOf(await readFile(trace, "latin1"))) {
      expect({ name, args, ok: ok || !/sync/.test(name) }).toEqual({ name, args, ok: true });
      const path = /<([^>]*)>/.exec(args)?.[1] ?? "";
      if (name.startsWith("pwritev")) segment = Math.max(segment, Number(/-(\d{8})$/.exec(path)?.[1] ?? 0));
      else if (name === "pwrite64" && path.endsWith(".part")) {
        unsynced.set(path, unsynced.get(path) ?? segment);
        unsaved.set(dirname(path), unsaved.get(dirname(path)) ?? segment);
      } else if (name === "fsync" && path.endsWith(".part")) unsynced.delete(path);
      else if (name.startsWith("rename") && args.includes('.ledger"')) {
        const owner = /"([^"]*)\/\.ledger"/.exec(args)?.[1] ?? "";
        const open = [...unsynced].flatMap(([part, at]) => (dirname(part) === owner ? [at] : []));
        if (open.length > 0) unsaved.set(owner, Math.min(...open));
        else unsaved.delete(owner);
      } else if (name.startsWith("unlink") && /\.journal-[^"]*-\d{8}"/.test(args)) {
        const dropped = Number(/-(\d{8})"/.exec(args)?.[1]);
        for (const at of [...unsynced.values(), ...unsaved.values()]) expect(at).toBeGreaterThan(dropped);
        drops++;
      }
    }
    expect(segment).toBeGreaterThanOrEqual(3);
    expect(drops).toBeGreaterThanOrEqual(2);
    expect([...unsynced, ...unsaved]).toEqual([]); // the last one is dropped when all is safe
  },
);

test.skipIf(missing({ strace: "strace" }))(
  "a sync that fails answers nothing with 200, is cut off, and the next one goes on",
  async () => {
    const { dir, config, url } = await setUp();
    const receiver = await run(config, url);
    const strace = start("strace", [
      ...["-f", "-o", "/dev/null", "-p", String(receiver.process.pid)],
      ...["-e", "trace=fdatasync", "-e", "inject=fdatasync:error=EIO:when=2+3"],
    ]);
    await strace.says("attached");
    const text = linesOfWindows(3000);
    await sendAll(url, "10.0.0.1", Buffer.from(text));
    await strace.stop("SIGINT");
    expect(receiver.output).toContain("chunk not stored");
    expect(receiver.output).toContain("journal takes chunks again");
    await receiver.stop("SIGKILL");
    expect(await (await run(config, url)).stop()).toBe(0);
    await expectWindows(dir, "10.0.0.1", text);
  },
);

test.skipIf(missing({ strace: "strace" }))(
  "a part or a ledger that could not be synced is written again from the journal, not only synced again",
  async () => {
    const { dir, config, url } = await setUp();
    const receiver = await run(config, url);
    const text = linesOfWindows(3000);
    const half = text.lastIndexOf("\n", text.length / 2) + 1;
    await sendAll(url, "10.0.0.1", Buffer.from(text.slice(0, half)));
    const strace = start("strace", [
      ...["-f", "-o", "/dev/null", "-p", String(receiver.process.pid)],
      ...["-e", "trace=fsync", "-e", "inject=fsync:error=EIO:when=1..5"],
    ]);
    await strace.says("attached");
    await sendAll(url, "10.0.0.1", Buffer.from(text));
    await receiver.says("batches are written again");
    await strace.stop("SIGINT");
    expect(receiver.output).toMatch(/ledger not saved|batches not written/);
    await receiver.stop("SIGKILL");
    expect(await (await run(config, url)).stop()).toBe(0);
    await expectWindows(dir, "10.0.0.1", text);
  },
);

test("a replay that is cut at its end, and made again, writes nothing twice", async () => {
  const { dir, config, url } = await setUp();
  const text = linesOfWindows(600);
  const first = await run(config, url);
  await sendAll(url, "10.0.0.1", Buffer.from(text));
  await first.stop("SIGKILL");
  const second = startScript("receiver", config, [], { LOG_RT_SYNC_STOP_AT: "replay:written" });
  expect(await second.ended).toBe("SIGKILL");
  expect(await (await run(config, url)).stop()).toBe(0);
  await expectWindows(dir, "10.0.0.1", text);
});

test.skipIf(notRoot())(
  "a disk that is full gets 507, keeps what was there, and goes on when there is room",
  async () => {
    const disk = await tempFolder();
    const mounted = start("mount", ["-t", "tmpfs", "-o", "size=6m", "tmpfs", disk]);
    if ((await mounted.ended) !== 0) throw new Error(`cannot mount a tmpfs: ${mounted.output}`);
    onCleanup(() => start("umount", ["-l", disk]).ended);
    const dir = join(disk, "data");
    const { config, url } = await setUp({ dir });
    const receiver = await run(config, url);
    const text = linesOfWindows(8000); // 0.8 MB
    await sendAll(url, "10.0.0.1", Buffer.from(text));
    const ballast = join(disk, "ballast");
    await writeFile(ballast, Buffer.alloc(8 << 20)).catch(() => {}); // all that is left
    const large = linesOfWindows(2000).repeat(5);
    const refused = await fetch(post(url, large, { offset: text.length, stream: "stream-10-0-0-1" }));
    expect({ status: refused.status, text: await refused.text() }).toMatchObject({ status: 507 });
    expect((await fetch(post(url, large, { host: "10.0.0.9" }))).status).toBe(507);
    await expectWindows(dir, "10.0.0.1", text);
    await rm(ballast);
    // What could not be written is cut off first: until then the next one may be refused, too.
    const again = () => fetch(post(url, large, { offset: text.length, stream: "stream-10-0-0-1" }));
    await until("it is taken", async () => (await again()).status === 200);
    await until("it says so", () => receiver.output.includes("chunks are stored again"));
    expect(receiver.output.match(/chunk not stored host=10\.0\.0\.1 /g)).toHaveLength(1); // not for every try
    expect(await receiver.stop()).toBe(0);
    const stored = [...(await storedWindows(dir, "10.0.0.1")).values()].join("");
    expect(stored.length).toBe(text.length + large.length);
  },
);

test("a second receiver on the same group, or on a port that is taken, says so and exits", async () => {
  const first = await setUp();
  const receiver = await run(first.config, first.url);
  const second = await runScriptOnce("receiver", first.config);
  expect(second.code).toBe(1);
  expect(second.output).toContain(
    `The group of port ${first.port} is in use by process ${receiver.process.pid}`,
  );
  const other = await setUp({ groups: [{ port: first.port, senders: ["*"] }] });
  const third = await runScriptOnce("receiver", other.config);
  expect(third.code).toBe(1);
  expect(third.output).toContain(`Cannot listen on 127.0.0.1 port ${first.port}`);
  expect(third.output.trim().split("\n").at(-1)).toContain("Cannot listen");
});

test("groups spread over processes: --port serves one, and 421 names the port of the other", async () => {
  const [one, two] = [await freePort(), await freePort()];
  const tokens = { "*": { env: "RECEIVER_TOKEN" } };
  const groups = [
    { port: one, senders: ["10.0.1.0/24"] },
    { port: two, senders: ["10.0.2.0/24", "web-2.example"] },
  ];
  const { config, dir } = await setUp({ groups, tokens });
  const env = { RECEIVER_TOKEN: "secret-token" };
  const headers = { Authorization: "Bearer secret-token" };
  const [first, second] = await Promise.all(
    [one, two].map(async (port) => {
      const receiver = startScript("receiver", config, ["--port", String(port)], env);
      await until("it listens", () => isUp(`http://127.0.0.1:${port}`));
      return receiver;
    }),
  );
  const send = (port: number, host: string) =>
    fetch(post(`http://127.0.0.1:${port}`, linesOfWindows(3), { host, headers }));
  expect((await send(one, "10.0.1.7")).status).toBe(200);
  expect((await send(two, "web-2.example")).status).toBe(200);
  const wrong = await send(one, "10.0.2.7");
  expect(wrong.status).toBe(421);
  expect(await wrong.text()).toContain(String(two));
  expect((await send(one, "10.0.3.7")).status).toBe(403);
  expect(existsSync(join(dir, "10.0.2.7"))).toBe(false);
  expect(await first?.stop()).toBe(0);
  expect(await second?.stop()).toBe(0);
  const none = await runScriptOnce("receiver", config, ["--port", "1"], env);
  expect(none.code).toBe(2);
  expect(none.output).toContain("No group has port 1");
});

test("a host that the config gives to another process: the first one lets go of it, and the second goes on", async () => {
  const [one, two] = [await freePort(), await freePort()];
  const { config, dir, folder } = await setUp();
  const writeGroups = (senders: string[][]) =>
    writeConfig(folder, {
      receiver: {
        dir,
        groups: [one, two].map((port, i) => ({ port, senders: senders[i] })),
        sealAfterSeconds: 3600,
      },
    });
  const both = ["127.0.0.1", "10.0.1.1"];
  await writeGroups([both, ["10.0.2.2"]]);
  const receivers = [one, two].map((port) => startScript("receiver", config, ["--port", String(port)]));
  const urls = [one, two].map((port) => `http://127.0.0.1:${port}`);
  for (const url of urls) await until("it listens", () => isUp(url));
  const [text, more] = [linesOfWindows(3), linesOfWindows(2)];
  const [mark, last] = ["a", "b"].map((sign) => `1024:${sign.repeat(22)}`);
  const chunk = { host: "10.0.1.1", stream: "stream-that-moves" };
  const begin = post(urls[0] ?? "", text, { ...chunk, begin: "new", mark });
  expect((await fetch(begin)).status).toBe(200);

  await writeGroups([["10.0.2.2"], both]);
  for (const receiver of receivers) receiver.process.kill("SIGHUP");
  const statuses: number[] = [];
  await until(
    () => `the second one takes it: ${statuses}`,
    async () => {
      const next = post(urls[1] ?? "", more, { ...chunk, offset: text.length, from: mark, mark: last });
      statuses.push((await fetch(next)).status);
      return statuses.at(-1) === 200;
    },
  );
  expect(statuses.slice(0, -1).filter((status) => status !== 421 && status !== 503)).toEqual([]);
  const stored = [...(await storedWindows(dir, "10.0.1.1")).values()].join("");
  expect(stored.length).toBe(text.length + more.length);
  expect(receivers[0]?.output).toContain("host let go");
  for (const receiver of receivers) expect(await receiver.stop()).toBe(0);
});
