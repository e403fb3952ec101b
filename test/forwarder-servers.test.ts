import { describe, expect, setDefaultTimeout, spyOn, test } from "bun:test";
import { execFileSync, spawnSync } from "node:child_process";
import { mkdir, readdir, readFile, rename, stat, symlink, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { join } from "node:path";
import { Readable } from "node:stream";
import { formatRecord, LEDGER_VERSION } from "../lib/ledger.ts";
import { openSftpTarget } from "../lib/target/sftp.ts";
import { makeSite, type Site } from "./backends.ts";
import { HABIT_PASSWORD, type HabitServer, type Habits, startHabitServer } from "./servers.ts";
import { accessLine, missing, runScriptOnce, startScript, tempFolder, until } from "./support.ts";

setDefaultTimeout(60_000);

const HOST = "10.10.21.181";
const FAILURE = 4;
const DENIED = 3;
const UNSUPPORTED = 8;
const text = Array.from({ length: 2000 }, (_, i) => accessLine(i)).join("");
const once = (site: Site, ...flags: string[]) =>
  runScriptOnce("forwarder", site.configFile, flags.length > 0 ? flags : ["--once"]);

async function makeHabitSite(habits: Habits, more: Record<string, unknown> = {}) {
  const server = await startHabitServer(habits);
  const password = join(await tempFolder(), "password");
  await writeFile(password, HABIT_PASSWORD);
  const settings = { target: server.target, hostKey: server.hostKey, password: { file: password } };
  const site = await makeSite({ folder: "", settings }, { timeoutSeconds: 5, ...more });
  return { server, site };
}

/** The names in the server's folder. */
const namesOf = ({ files }: HabitServer) => [...files.keys()].map((path) => path.slice("/in/".length)).sort();

describe("delivered all the same", () => {
  const rows: [string, Habits, Record<string, unknown>?][] = [
    ["nothing special", {}],
    ["FSTAT says that there is no such file", { fstat: 2 }],
    ["FSTAT is unsupported", { fstat: UNSUPPORTED }],
    ["FSTAT says 0", { fstat: "zero" }],
    ["STAT of a missing name is a failure", { statMissing: FAILURE }],
    ["STAT of a missing name is denied, and no listing", { statMissing: DENIED, list: DENIED }],
    ["STAT of any name is denied; a listing tells sizes", { statAlways: DENIED }],
    ["no delete", { remove: () => DENIED }],
    ["answers in any order", { shuffled: true }],
    ["hidden names are refused", { create: (path) => (path.includes("/.") ? DENIED : undefined) }],
    ["no rename, direct", { rename: () => UNSUPPORTED }, { upload: "direct" }],
    ["key first, then password", { login: ["publickey", "password"] }],
    ["password first, then key", { login: ["password", "publickey"] }],
    ["key first, then a dialogue", { login: ["publickey", "keyboard-interactive"] }],
  ];
  test.each(rows)("%s", async (_name, habits, more = {}) => {
    const key = join(await tempFolder(), "key");
    const keys = habits.login?.includes("publickey") ? { privateKey: { file: key } } : {};
    if (keys.privateKey) execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", key]);
    const { server, site } = await makeHabitSite(habits, { ...keys, ...more });
    const names = [1, 2, 3].map((hour) => site.seal(HOST, hour, text));
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(namesOf(server)).toEqual(names);
    for (const name of names) expect(server.files.get(`/in/${name}`)?.toString()).toBe(text);
    expect(await site.list("failed")).toEqual([]);
  });

  test("an importer takes a file at CLOSE, direct: delivered once", async () => {
    const { server, site } = await makeHabitSite({ takes: () => true }, { upload: "direct" });
    const name = site.seal(HOST, 1, text);
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(server.asked.filter((what) => what === `open /in/${name}`)).toHaveLength(1);
  });

  test("direct, and the server cuts in the middle: the half is written anew, and only what is ours", async () => {
    const { server, site } = await makeHabitSite({}, { upload: "direct" });
    const name = site.seal(HOST, 1, text);
    let writes = 0;
    server.habits.cutsAt = () => ++writes > 2;
    expect((await once(site)).code).toBe(1);
    delete server.habits.cutsAt;
    expect((await once(site)).code).toBe(0);
    expect(server.files.get(`/in/${name}`)?.toString()).toBe(text);
    const other = site.seal(HOST, 2, text);
    server.files.set(`/in/${other}`, Buffer.from("someone else's"));
    expect((await once(site)).code).toBe(1);
    expect(server.files.get(`/in/${other}`)?.toString()).toBe("someone else's");
  });
});

describe("one clear message, nobody's file is blamed", () => {
  const held = async (habits: Habits, more: Record<string, unknown> = {}) => {
    const { server, site } = await makeHabitSite(habits, more);
    const names = [1, 2, 3].map((hour) => site.seal(HOST, hour, "x\n"));
    const { code, output } = await once(site);
    expect(code, output).toBe(1);
    expect(output.match(/held up/g), output).toHaveLength(1);
    expect(await site.list("failed")).toEqual([]);
    expect(await site.list(HOST)).toEqual(names);
    return { server, site, output };
  };

  test.each([DENIED, FAILURE, UNSUPPORTED])(
    "no rename (status %d): the message names the option",
    async (status) => {
      const { server, site, output } = await held({ rename: () => status });
      expect(namesOf(server)).toEqual([]); // also once it is "direct" nothing of ours is left there
      expect(output).toContain("The server refuses every rename");
      expect(output).toContain('\\"upload\\": \\"direct\\"');
      expect((await once(site)).output).not.toContain("uploaded again"); // nothing was renamed
    },
  );

  test("an expired password", async () => {
    const { output } = await held({ passwordExpired: true });
    expect(output).toContain("its password has expired");
  });

  test("a login that is refused: what we have, what the server takes, the line for authorized_keys", async () => {
    const key = join(await tempFolder(), "key");
    execFileSync("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", key]);
    const { output } = await held(
      { login: ["keyboard-interactive"] },
      { password: undefined, privateKey: { file: key } },
    );
    expect(output).toContain("we have publickey; the server takes keyboard-interactive");
    const [type, base64] = (await readFile(`${key}.pub`, "utf8")).split(" ");
    expect(output).toContain(`${type} ${base64}`);
  });

  test.each(["close", "rename", "stat"])("%s is never answered: the message says which", async (what) => {
    const { output } = await held(
      { silentAt: (asked) => asked.startsWith(what) },
      { timeoutSeconds: 1, parallel: 1 },
    );
    const words = what === "stat" ? "look at" : what;
    expect(output).toMatch(new RegExp(`no answer for 1000 ms to: ${words} \\\\"/in/accessLog`));
  });

  test("the server's text is one line, cut, without control characters", async () => {
    const { site, output } = await held({
      create: () => FAILURE,
      text: `\x1b[31mno\r\nno\u202e${"x".repeat(200_000)}`,
    });
    expect(output.length).toBeLessThan(2000);
    const state = await readFile(join(site.dir, ".forwarder-state.json"), "utf8");
    for (const told of [output.trimEnd(), state, (await site.failures())[0] ?? ""]) {
      expect(told.length).toBeLessThan(2000);
      expect(told).not.toMatch(/\\u001b|\\u202e|[\x00-\x08\x0b-\x1f\u202e]/);
    }
  });

  test("the folder is not there: which part, and what is beside it", async () => {
    const { site, server } = await makeHabitSite({ create: () => 2 });
    server.files.set("/inbox", Buffer.alloc(0));
    site.seal(HOST, 1, "x\n");
    const { output } = await once(site);
    expect(output).toContain('The folder \\"/in\\" is not there: no \\"in\\" in \\"/\\"');
    expect(await site.list("failed")).toEqual([]);
  });
});

describe("one file alone", () => {
  test("a batch at which the server cuts each time: the others get through, then that one alone, also by --once", async () => {
    const { server, site } = await makeHabitSite({});
    const names = Array.from({ length: 12 }, (_, hour) => site.seal(HOST, hour, text));
    const bad = names[0] ?? "";
    server.habits.cutsAt = (path) => path.includes(bad);
    let passes = 0;
    while ((await site.list("sent")).length < 11 && passes++ < 8) expect((await once(site)).code).toBe(1);
    expect(await site.list("sent")).toEqual(names.slice(1));
    expect(await site.list(HOST)).toEqual([bad]);
    expect(await site.list("failed")).toEqual([]);
    delete server.habits.cutsAt;
    expect((await once(site)).code).toBe(0);
    expect(namesOf(server)).toEqual(names);
  });

  test("a name that is there and never ends: size + 1 bytes are read, then it is refused", async () => {
    const { server, site } = await makeHabitSite({ endless: true });
    const name = site.seal(HOST, 1, text);
    server.files.set(`/in/${name}`, Buffer.alloc(text.length));
    const { output } = await once(site);
    expect(output).toContain("is on the target already, with other content");
    const reads = server.asked.filter((what) => what.startsWith("read"));
    expect(reads.length).toBeLessThanOrEqual(Math.ceil((text.length + 1) / 31_952));
  });

  test("the answer to the rename is lost and the account may not read: the intention and the size prove it", async () => {
    const { server, site } = await makeHabitSite({ readable: false }, { timeoutSeconds: 1 });
    const name = site.seal(HOST, 1, text);
    server.habits.rename = (from, to) => {
      server.files.set(to, server.files.get(from) ?? Buffer.alloc(0));
      server.files.delete(from);
      server.habits.silentAt = () => true;
      return undefined;
    };
    expect((await once(site)).code).toBe(1);
    server.habits.silentAt = () => false;
    delete server.habits.rename;
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(await site.report()).toEqual([`${name} | lines=2000 | status=Sent`]);
  });

  test("a name that can't be compared, at a server that takes nothing more: it is not written over", async () => {
    const create = (path: string) => (path.includes("probe") ? FAILURE : undefined);
    const { server, site } = await makeHabitSite({ readable: false, remove: () => DENIED, create });
    const name = site.seal(HOST, 1, text);
    server.files.set(`/in/${name}`, Buffer.from(text.replace("GET", "PUT"))); // of the same size
    const { code, output } = await once(site);
    expect(code, output).toBe(1);
    expect(output).toContain("held up");
    expect(server.asked.filter((what) => what.startsWith("rename"))).toEqual([]);
    expect(await site.report()).toEqual([]);
    expect(await site.list(HOST)).toEqual([name]);
  });

  test("storage that is away after a cut at the rename: nothing is Sent that is not there", async () => {
    const { server, site } = await makeHabitSite({}, { timeoutSeconds: 1 });
    const names = Array.from({ length: 60 }, (_, hour) => site.seal(HOST, hour, "x\n"));
    server.habits.silentAt = (what) => what.startsWith("rename");
    expect((await once(site)).code).toBe(1);
    server.habits.silentAt = () => false;
    server.files.clear(); // another storage, or none
    server.habits.create = () => FAILURE;
    expect((await once(site)).code).toBe(1);
    expect(await site.report()).toEqual([]);
    expect(await site.list("sent")).toEqual([]);
    delete server.habits.create;
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    expect(namesOf(server)).toEqual(names);
    expect(await site.report()).toHaveLength(60);
  });

  test("a batch taken away, and one put into sent/, while on its way: those alone are told, the loop lives", async () => {
    const { server, site } = await makeHabitSite({}, { intervalSeconds: 0.05, timeoutSeconds: 1 });
    const [gone = "", twice = "", good = ""] = [1, 2, 3].map((hour) => site.seal(HOST, hour, "x\n"));
    server.habits.silentAt = (what) => what.startsWith("rename");
    const running = startScript("forwarder", site.configFile);
    await until(
      "all are renamed",
      () => server.asked.filter((what) => what.startsWith("rename")).length >= 3,
    );
    await rename(join(site.dir, HOST, gone), join(site.dir, "elsewhere"));
    await writeFile(join(site.dir, "sent", twice), "x\n");
    server.habits.silentAt = () => false;
    await until("the good one is sent", async () => (await site.list("sent")).includes(good), 20_000);
    const next = site.seal(HOST, 4, "x\n");
    await until("the next one is sent", async () => (await site.list("sent")).includes(next));
    expect(await running.stop()).toBe(0);
    expect(await site.list("failed")).toEqual([twice]);
  });

  test("lost+found and a copied folder are left alone; a wrong clock's next try is not a year away", async () => {
    const { server, site } = await makeHabitSite({});
    const name = site.seal("lost+found", 1, "x\n");
    const copy = site.seal(HOST, 1, "x\n");
    await rename(join(site.dir, HOST), join(site.dir, `${HOST}.bak`));
    const failed = site.seal("failed", 2, "x\n");
    const nextAt = Date.now() + 365 * 86_400_000;
    const state = { version: 1, at: 1, ok: true, failed: { [failed]: { attempts: 9, nextAt, reason: "x" } } };
    await writeFile(join(site.dir, ".forwarder-state.json"), JSON.stringify(state));
    const running = startScript("forwarder", site.configFile);
    await until("it is sent", async () => (await site.list("sent")).includes(failed));
    await running.stop();
    expect(namesOf(server)).toEqual([failed]);
    expect(await site.list("lost+found")).toEqual([name]);
    expect(await site.list(`${HOST}.bak`)).toEqual([copy]);
  });
});

describe("flags", () => {
  test("--test-file leaves one marked file there; --status is 1 and told as JSON when something is wrong", async () => {
    const { server, site } = await makeHabitSite({});
    const { code, output } = await once(site, "--test-file");
    expect(code, output).toBe(0);
    expect(output).toMatch(/^log-rt-sync-test-\d{14}\.txt is in sftp:/);
    expect(namesOf(server)).toEqual([output.split(" ")[0] as string]);
    const name = site.seal(HOST, 1, "x\n");
    site.seal("10.0.0.1", 1, "x\n");
    server.files.set(`/in/${name}`, Buffer.from("other"));
    await once(site);
    const status = await once(site, "--status", "--json", "--host", HOST);
    expect(status.code).toBe(1);
    expect(JSON.parse(status.output)).toMatchObject({
      ok: false,
      hosts: [{ host: HOST, waiting: 0 }],
      failed: [{ batch: name, attempts: 1 }],
      lastHour: { batches: 1, lines: 1 },
    });
    server.files.delete(`/in/${name}`);
    expect((await once(site)).code).toBe(0);
    expect((await once(site, "--status")).code).toBe(0);
  });

  test("--hour tells per host what was delivered; what is wrong in it is a usage error", async () => {
    const { site } = await makeHabitSite({});
    const name = site.seal(HOST, 14, text);
    await rename(join(site.dir, HOST, name), join(site.dir, HOST, name.replace(".log", ".2.log")));
    site.seal(HOST, 14, "x\n");
    expect((await once(site)).code).toBe(0);
    const unsure = await once(site, "--hour", "2026-11-01T14"); // its sender may have more
    expect(unsure.output).toContain("cannot say");
    expect(unsure.code).toBe(1);
    const facts = { through: Date.UTC(2026, 10, 1, 15, 0, 1), zone: 0 };
    const ledger = formatRecord({ v: LEDGER_VERSION, heardAt: Date.now(), facts });
    await writeFile(join(site.dir, HOST, ".ledger"), ledger);
    const { code, output } = await once(site, "--hour", "2026-11-01T14", "--json");
    expect(JSON.parse(output)).toMatchObject({
      complete: true,
      rows: [{ hour: "26110114", batches: 2, lines: 2001, late: 1, source: "report" }],
    });
    expect(code).toBe(0);
    const shown = await once(site, "--hour", "2026-11-01T14/2026-11-01T16");
    expect(shown.output).toMatch(/2026-11-01T14 +10\.10\.21\.181 +2 +2001 +- +2001 +1 +report +complete/);
    expect(shown.output).toMatch(/2026-11-01T15 +10\.10\.21\.181 .*has told everything only up to/);
    // what was read and waits, what rules left out, and what the host has not shipped yet
    const later = site.seal(HOST, 15, "x\n");
    const sealed = { [later]: { name: later, bytes: 2, lines: 1, at: Date.now() } };
    const tail = formatRecord({
      v: LEDGER_VERSION,
      heardAt: Date.now(),
      sealed,
      facts: { ...facts, lag: 2048 },
    });
    await writeFile(join(site.dir, HOST, ".ledger"), tail);
    const unread = await once(site, "--hour", "2026-11-01T15");
    expect(unread.output).toMatch(
      /T15 +10\.10\.21\.181 +0 +1 +- +0 +0 +report +has told everything only up to/,
    );
    expect(unread.output).toMatch(/; 1 batch is not delivered; 2\.0 KiB to ship when last heard, 20\d\d-/);
    for (const span of ["2026-11-01", "2026-11-01T25", "2026-02-30T10", "2026-11-01T14/2026-11-01T14"])
      expect((await once(site, "--hour", span)).code).toBe(2);
  });

  test("--hour counts what is sent again once, also where the client gets it compressed", async () => {
    const { site } = await makeHabitSite({}, { compress: "gzip", digest: true });
    const name = site.seal(HOST, 14, text);
    expect((await once(site)).code).toBe(0);
    const sealed = { [name]: { name, bytes: text.length, lines: 2000, at: Date.now() } };
    const facts = { through: Date.now(), zone: 0 };
    const ledger = formatRecord({ v: LEDGER_VERSION, heardAt: Date.now(), facts, sealed });
    await writeFile(join(site.dir, HOST, ".ledger"), ledger);
    expect((await once(site, "--resend", name)).code).toBe(0);
    const { output } = await once(site, "--hour", "2026-11-01T14", "--json");
    expect(JSON.parse(output).rows).toMatchObject([{ host: HOST, batches: 1, lines: 2000, read: 2000 }]);
  });

  test("--hour of which nothing is known says so and is not complete", async () => {
    const { site } = await makeHabitSite({});
    await mkdir(site.dir, { recursive: true });
    const empty = await once(site, "--hour", "2026-11-01T14");
    expect(empty.output).toContain("nothing is known of this hour");
    expect(empty.output).toEndWith("not complete\n");
    expect(empty.code).toBe(1);
    const facts = { through: Date.now(), zone: 0 };
    site.seal(HOST, 14, "x\n");
    expect((await once(site)).code).toBe(0);
    const ledger = formatRecord({ v: LEDGER_VERSION, heardAt: Date.now(), facts });
    await writeFile(join(site.dir, HOST, ".ledger"), ledger);
    expect((await once(site, "--hour", "2026-11-01T14")).code).toBe(0);
    const early = site.seal(HOST, 13, "x\n"); // before the record, and waiting
    const sealed = { [early]: { name: early, bytes: 2, lines: 1, at: Date.now() } };
    const waits = formatRecord({ v: LEDGER_VERSION, heardAt: Date.now(), facts, sealed });
    await writeFile(join(site.dir, HOST, ".ledger"), waits);
    const waiting = await once(site, "--hour", "2026-11-01T13");
    expect(waiting.output).not.toContain("nothing is known");
    expect(waiting.output).toEndWith("1 batch is not delivered\nnot complete\n");
    const before = await once(site, "--hour", "2026-10-31T14", "--json"); // the record is younger
    expect(JSON.parse(before.output)).toMatchObject({
      complete: false,
      rows: [{ host: "-" }, { host: HOST }],
    });
    expect(before.code).toBe(1);
  });

  test("metrics of a pass for the textfile collector", async () => {
    const { server, site } = await makeHabitSite({});
    site.seal(HOST, 1, text);
    expect((await once(site)).code).toBe(0);
    const read = () => readFile(join(site.dir, ".metrics", "forwarder.prom"), "utf8");
    expect(await read()).toContain("\nlog_rt_sync_forwarder_delivered_lines_total 2000\n");
    expect(await read()).toContain("\nlog_rt_sync_forwarder_left_files 0\n");
    server.habits.create = () => FAILURE;
    site.seal(HOST, 2, text);
    expect((await once(site)).code).toBe(1);
    expect(await read()).toContain('\nlog_rt_sync_forwarder_held_up{kind="server"} 1\n');
    expect(await read()).toContain("\nlog_rt_sync_forwarder_left_files 1\n");
    if (!missing({ promtool: "prometheus" })) {
      const checked = spawnSync("promtool", ["check", "metrics"], { input: await read(), encoding: "utf8" });
      expect(checked.stderr + checked.stdout).toBe("");
    }
  });

  test("--resend unpacks what was compressed, and says what it can't", async () => {
    const { server, site } = await makeHabitSite({});
    const name = site.seal(HOST, 1, text);
    expect((await once(site)).code).toBe(0);
    execFileSync("gzip", [join(site.dir, "sent", name)]);
    server.files.clear();
    expect((await once(site, "--resend", "26110101")).output).toStartWith(`${name}.gz: back in the queue`);
    expect((await once(site)).code).toBe(0);
    expect(server.files.get(`/in/${name}`)?.toString()).toBe(text);
    expect(await site.list("sent")).toEqual([name]);
    expect(await site.report()).toHaveLength(2);
    expect((await once(site, "--resend", "nothing like it")).code).toBe(1);
    execFileSync("gzip", ["-k", join(site.dir, "sent", name)]); // housekeeping was killed between the two
    const both = await once(site, "--resend", "26110101");
    expect(both.code, both.output).toBe(1);
    expect(both.output.match(/: sent\/ has it plain and compressed/g)).toHaveLength(2);
    expect(await site.list(HOST)).toEqual([]);
  });

  test("a .gz that was moved back and is damaged is left: told once, --once ends 1, the others are delivered", async () => {
    const { server, site } = await makeHabitSite({}, { intervalSeconds: 0.05 });
    const name = site.seal(HOST, 1, text);
    const damaged = name.replace("26110101", "26110103");
    await writeFile(join(site.dir, HOST, `${damaged}.gz`), "no gzip");
    expect((await once(site)).code).toBe(1);
    expect(namesOf(server)).toEqual([name]);
    expect(await site.list(HOST)).toEqual([`${damaged}.gz`, `${damaged}.tmp`]);
    const running = startScript("forwarder", site.configFile);
    await running.says("cannot be unpacked");
    const next = site.seal(HOST, 2, text);
    await until("a later pass has sent", async () => (await site.list("sent")).includes(next));
    expect(await running.stop()).toBe(0);
    expect(running.output.match(/cannot be unpacked/g)).toHaveLength(1);
    execFileSync("gzip", ["-k", join(site.dir, "sent", name)]);
    await rename(join(site.dir, "sent", `${name}.gz`), join(site.dir, HOST, `${damaged}.gz`));
    expect((await once(site)).code).toBe(0);
    expect(namesOf(server)).toEqual([name, next, damaged].sort());
  });
});

describe("a long queue takes more than one channel", () => {
  const QUEUE = 120;
  const channelsOf = ({ asked }: HabitServer) => asked.filter((what) => what.startsWith("channel ")).length;
  const fill = (site: Site) => Array.from({ length: QUEUE }, (_, hour) => site.seal(HOST, hour, `${hour}\n`));
  const checkAll = async ({ server, site, names }: { server: HabitServer; site: Site; names: string[] }) => {
    expect(namesOf(server)).toEqual(names);
    for (const [hour, name] of names.entries())
      expect(server.files.get(`/in/${name}`)?.toString()).toBe(`${hour}\n`);
    expect(await site.list("sent")).toEqual(names);
    expect(new Set(await site.report()).size).toBe(QUEUE);
  };

  const rows: [string, Habits, Record<string, unknown>, number][] = [
    ["as many as parallel", {}, {}, 4],
    ["one, when parallel is 1", {}, { parallel: 1 }, 1],
    ["answers in any order", { shuffled: true }, {}, 4],
    ["a file is known only by its name", { fstat: 2, statMissing: FAILURE }, {}, 4],
    ["names are told to nobody", { statAlways: DENIED, list: DENIED, readable: true }, {}, 4],
    ["written under its own name", { rename: () => UNSUPPORTED }, { upload: "direct" }, 4],
    ["the next one is refused", { nextChannel: "refused" }, {}, 2],
    ["the next one gives no SFTP", { nextChannel: "no subsystem" }, {}, 2],
    ["the next one is never answered", { nextChannel: "silent" }, { timeoutSeconds: 1 }, 2],
  ];
  test.each(rows)("%s", async (_name, habits, more, channels) => {
    const { server, site } = await makeHabitSite(habits, more);
    const names = fill(site);
    const { code, output } = await once(site);
    expect(code, output).toBe(0);
    await checkAll({ server, site, names });
    expect(channelsOf(server)).toBe(channels);
  });

  test("a server that hangs up at the next one is not asked for it again", async () => {
    const { server, site } = await makeHabitSite({ nextChannel: "cut" }, { intervalSeconds: 1 });
    const names = fill(site);
    const forwarder = startScript("forwarder", site.configFile);
    const isThere = async () => (await site.list("sent")).length === QUEUE;
    await until(() => `all are sent, but:\n${forwarder.output}`, isThere);
    await checkAll({ server, site, names });
    expect(channelsOf(server)).toBe(3); // two of the connection that was cut, one of the next
  });

  test("more than before when parallel is raised: a server that gave all is asked for more", async () => {
    const { server, site } = await makeHabitSite({});
    for (const [parallel, channels] of [
      [2, 2],
      [4, 2 + 4],
    ] as const) {
      const target = await openSftpTarget({ ...site.config, parallel }, new AbortController().signal);
      for (let i = 0; i < 32; i++) await target.upload(`${parallel}-${i}`, Readable.from([Buffer.from("x")]));
      await until(`${channels} channels`, () => channelsOf(server) === channels);
      target.close();
    }
  });

  test("a pass that ends before the answer does not speak for the next one", async () => {
    const { server, site } = await makeHabitSite({ nextChannel: "silent" }, { intervalSeconds: 1 });
    const first = fill(site);
    const forwarder = startScript("forwarder", site.configFile);
    const areSent = (names: string[]) => async () =>
      (await site.list("sent")).length === names.length && (await site.report()).length === names.length;
    await until(() => `the first are sent, but:\n${forwarder.output}`, areSent(first));
    expect(channelsOf(server)).toBe(2);
    delete server.habits.nextChannel;
    const more = Array.from({ length: QUEUE }, (_, hour) => site.seal("10.10.21.182", hour, `${hour}\n`));
    await until(() => `all are sent, but:\n${forwarder.output}`, areSent([...first, ...more]));
    expect(channelsOf(server)).toBeGreaterThan(2 + 2);
  });

  test("a short queue takes one", async () => {
    const { server, site } = await makeHabitSite({});
    for (let hour = 0; hour < 20; hour++) site.seal(HOST, hour, "x\n");
    expect((await once(site)).code).toBe(0);
    expect(channelsOf(server)).toBe(1);
  });
});

test("what ssh2 throws before it sends is no answer", async () => {
  const { site } = await makeHabitSite({});
  const target = await openSftpTarget(site.config, new AbortController().signal);
  await target.upload("a.log", Readable.from([Buffer.from("x")]));
  const { SFTP } = createRequire(import.meta.url)("ssh2/lib/protocol/SFTP.js");
  const renaming = spyOn(SFTP.prototype, "ext_openssh_rename").mockImplementation(() => {
    throw new TypeError("handle is not a Buffer");
  });
  try {
    expect(await target.publish("a.log", 1).catch((error) => error)).toBeInstanceOf(TypeError);
  } finally {
    renaming.mockRestore();
    target.close();
  }
});

describe("file://", () => {
  test("a sender's own folder is no target: nothing would be at the client", async () => {
    const folder = await tempFolder();
    await writeFile(join(folder, ".ledger"), "");
    const site = await makeSite({ folder, settings: { target: `file://${folder}` } });
    site.seal(HOST, 1, text);
    const { code, output } = await once(site);
    expect({ code, sent: await site.list("sent") }).toEqual({ code: 1, sent: [] });
    expect(output).toContain("is a sender's folder of the receiver: name another one in target");
  });

  test("a link to nothing that has a batch's name: the batch goes to failed/, the others are delivered", async () => {
    const folder = await tempFolder();
    const site = await makeSite({ folder, settings: { target: `file://${folder}` } }, { retries: 1 });
    const [name = "", other = ""] = [1, 2].map((hour) => site.seal(HOST, hour, text));
    await symlink(join(folder, "absent"), join(folder, name));
    const { code, output } = await once(site);
    expect({ code, failed: await site.list("failed"), sent: await site.list("sent") }, output).toEqual({
      code: 1,
      failed: [name],
      sent: [other],
    });
    expect((await site.failures())[0]).toContain(`"${join(folder, name)}" exists already`);
    expect((await readdir(folder)).sort()).toEqual([name, other].sort());
  });

  test("a link that waits at the temp name is not followed, and the file follows the umask", async () => {
    const folder = await tempFolder();
    const victim = join(await tempFolder(), "victim");
    await writeFile(victim, "untouched");
    const site = await makeSite({ folder, settings: { target: `file://${folder}` } });
    const name = site.seal(HOST, 1, text);
    await symlink(victim, join(folder, `${name}.tmp`));
    expect((await once(site)).code).toBe(0);
    expect(await readFile(victim, "utf8")).toBe("untouched");
    expect(await readFile(join(folder, name), "utf8")).toBe(text);
    expect(await readdir(folder)).toEqual([name]);
    expect(((await stat(join(folder, name))).mode & 0o777).toString(8)).toBe(
      (0o666 & ~process.umask()).toString(8),
    );
  });
});
