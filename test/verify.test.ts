/**
 * A delivered folder with random damage: `--verify` and deploy/verify.sh find it, name it, and agree. Some
 * here; `VERIFY_RUNS=10000 bun test --timeout 3600000 test/verify.test.ts` for more, `VERIFY_SEED` for others.
 */
import { expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { cpSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseBatchName } from "../lib/batch.ts";
import { type Digest, formatDigest, formatDigestName, formatVerified, verifyFolder } from "../lib/digest.ts";
import { accessLine, ROOT, startScript, tempFolder } from "./support.ts";

setDefaultTimeout(6_000_000);

const RUNS = Number(process.env.VERIFY_RUNS ?? 60);
/** verify.sh, which takes a second on a busy machine, looks at one of so many. */
const SHELL_EVERY = Number(process.env.VERIFY_SHELL_EVERY ?? 1);
const SEED = Number(process.env.VERIFY_SEED ?? 21);
const HOURS = ["26112205", "26112206", "26112207", "26112208"];
const hash = (data: string | Uint8Array) => createHash("sha256").update(data).digest("hex");

/** Numbers from a seed (mulberry32). */
function randomFrom(seed: number): (below: number) => number {
  let state = seed;
  return (below) => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) % below;
  };
}

/** Fills a folder as the forwarder does; gives its files by name. */
function deliver(folder: string): Map<string, string> {
  const files = new Map<string, string>();
  let head: Digest["previous"];
  const put = (name: string, text: string) => {
    files.set(name, text);
    writeFileSync(join(folder, name), text);
    return { name, sha256: hash(text) };
  };
  const digest = (hour: string, part: number, batches: Digest["batches"]) => {
    const hosts = [{ host: "10.0.0.1", lines: batches.length, skipped: 0, untimed: 0, lost: 0 }];
    const begins = head ? {} : { begins: "2026-11-22T00:00:00.000Z" };
    const text = formatDigest({ hour, part, ...begins, hosts, missing: [], previous: head, batches });
    head = put(formatDigestName({ prefix: "accessLog", hour, part }), text);
  };
  for (const [i, hour] of HOURS.entries()) {
    const batches = [1, 2].flatMap((host) =>
      ["00-19", "20-39"].map((window) =>
        put(`accessLog_${hour}_${window}_10-0-0-${host}.log`, accessLine(100 * i + host).repeat(host)),
      ),
    );
    if (i === 2)
      digest(HOURS[1] ?? "", 2, [put(`accessLog_${HOURS[1]}_00-19_10-0-0-1.2.log`, accessLine(7))]);
    digest(hour, 1, i === 1 ? [] : batches);
    if (i === 1) digest(hour, 3, batches);
  }
  return files;
}

/** What `--verify` would print, and what the script prints and how it ends. */
async function verifyBoth(folder: string): Promise<{ text: string; shell: string; status: number | null }> {
  const script = spawnSync("sh", [join(ROOT, "deploy/verify.sh"), folder], { encoding: "utf8" });
  return {
    text: formatVerified(await verifyFolder(folder)),
    shell: script.stdout + script.stderr,
    status: script.status,
  };
}

/** Damages a folder in one of many ways; gives the file that must be named. */
function mutate(folder: string, files: Map<string, string>, random: (below: number) => number): string {
  const names = [...files.keys()];
  const batches = names.filter((name) => name.endsWith(".log"));
  const digests = names.filter((name) => name.endsWith(".sha256"));
  const pick = <T>(list: T[]) => list[random(list.length)] as T;
  const write = (name: string, data: string | Uint8Array) => writeFileSync(join(folder, name), data);
  const any = pick(names);
  const text = files.get(any) ?? "";
  switch (random(10)) {
    case 0: {
      const bytes = Buffer.from(text);
      const at = random(bytes.length);
      bytes[at] = (bytes[at] ?? 0) ^ (1 + random(255));
      write(any, bytes);
      return any;
    }
    case 1:
      write(any, text.slice(0, random(text.length)));
      return any;
    case 2:
      write(any, text + pick(["\n", "x", "\0", "# end\n"]));
      return any;
    case 3: {
      const name = pick(names.filter((one) => one !== digests.at(-1))); // the newest one, none names yet
      rmSync(join(folder, name));
      return name;
    }
    case 4: {
      const name = `accessLog_${pick(HOURS)}_40-59_10-0-0-${random(9)}.log${pick(["", ".gz"])}`;
      write(name, "put there\n");
      return name;
    }
    case 5: {
      const [one, other] = [pick(digests), pick(digests)];
      if (one === other) return mutate(folder, files, random);
      write(one, files.get(other) ?? ""); // an old one, replayed
      return one;
    }
    case 6: {
      const [one, other] = [pick(batches), pick(batches)];
      if (files.get(one) === files.get(other)) return mutate(folder, files, random);
      write(one, files.get(other) ?? "");
      return one;
    }
    case 7: {
      const digest = pick(digests);
      const lines = (files.get(digest) ?? "").split("\n");
      lines.splice(random(lines.length - 1), 1);
      write(digest, lines.join("\n"));
      return digest;
    }
    case 8: {
      const digest = pick(digests);
      const lines = (files.get(digest) ?? "").split("\n");
      const at = random(lines.length - 2);
      if (lines[at] === lines[at + 1]) return mutate(folder, files, random);
      lines.splice(at, 2, lines[at + 1] ?? "", lines[at] ?? "");
      write(digest, lines.join("\n"));
      return digest;
    }
    default: {
      const name = pick(batches);
      rmSync(join(folder, name));
      symlinkSync("/etc/hostname", join(folder, name));
      return name;
    }
  }
}

test("a good folder: no finding, the head and the beginning are told, what is newer is not covered yet", async () => {
  const folder = await tempFolder();
  const files = deliver(folder);
  writeFileSync(join(folder, "accessLog_26112209_00-19_10-0-0-1.log"), "newer\n");
  writeFileSync(join(folder, "accessLog_26112208_00-19_10-0-0-1.log.tmp"), "on its way\n");
  for (const odd of [
    "26112205_20-38",
    "26112224_00-19",
    "26023005_00-19",
    "26112205_60-79",
    "26112205_10-29",
  ])
    writeFileSync(join(folder, `accessLog_${odd}_10-0-0-1.log`), "no name of ours\n");
  writeFileSync(join(folder, "notes.txt"), "the client's own\n");
  mkdirSync(join(folder, "imported"));
  const { text, shell, status } = await verifyBoth(folder);
  const head = hash(files.get("accessLog_26112208.sha256") ?? "");
  expect(text).toBe(
    `begins: 2026-11-22T00:00:00.000Z\nnot covered yet: 1 batches behind the newest digest\nhead: ${head}  accessLog_26112208.sha256\nok\n`,
  );
  expect(shell).toBe(text);
  expect(status).toBe(0);
  const running = startScript("forwarder", "/absent/config.json", ["--verify", folder]);
  expect(await running.ended).toBe(0);
  expect(running.output).toBe(text);
});

test("a batch of any day of any month is one, and a day that no calendar has is none", async () => {
  const folder = await tempFolder();
  const batches: Digest["batches"] = [];
  for (const month of ["00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13"])
    for (const day of ["00", "01", "08", "09", "10", "28", "29", "30", "31", "32"]) {
      const name = `accessLog_26${month}${day}00_00-59_10-0-0-1.log`;
      writeFileSync(join(folder, name), "a line\n");
      if (parseBatchName(name)) batches.push({ name, sha256: hash("a line\n") });
    }
  expect(batches).toHaveLength(12 * 8 - 5 - 2); // five months have no 31st, February 2026 no 29th and 30th either
  const text = formatDigest({
    hour: "26123123",
    part: 1,
    begins: "2026-01-01",
    hosts: [],
    missing: [],
    batches,
  });
  writeFileSync(join(folder, "accessLog_26123123.sha256"), text);
  const { text: told, shell, status } = await verifyBoth(folder);
  expect(told).toEndWith("ok\n");
  expect({ shell, status }).toEqual({ shell: told, status: 0 });
});

test("an hour that says no is incomplete, until its last digest says yes", async () => {
  const folder = await tempFolder();
  const write = (part: number, missing: Digest["missing"], previous?: Digest["previous"]) => {
    const begins = previous ? {} : { begins: "2026-11-22T00:00:00.000Z" };
    const text = formatDigest({
      hour: "26112206",
      part,
      ...begins,
      hosts: [],
      missing,
      previous,
      batches: [],
    });
    const name = formatDigestName({ prefix: "accessLog", hour: "26112206", part });
    writeFileSync(join(folder, name), text);
    return { name, sha256: hash(text) };
  };
  const first = write(1, [{ host: "10.0.0.1", reason: "not heard" }]);
  const no = await verifyBoth(folder);
  expect(no.text).toStartWith("incomplete: 26112206\n");
  expect(no).toMatchObject({ shell: no.text, status: 1 });
  write(2, [], first);
  const yes = await verifyBoth(folder);
  expect(yes.text).toEndWith("ok\n");
  expect(yes).toMatchObject({ shell: yes.text, status: 0 });
});

test("a digest under another one's name is changed, also when it would be a chain of its own", async () => {
  const folder = await tempFolder();
  const files = deliver(folder);
  writeFileSync(join(folder, "accessLog_26112208.sha256"), files.get("accessLog_26112205.sha256") ?? "");
  const { text, shell, status } = await verifyBoth(folder);
  expect(text).toStartWith("changed: accessLog_26112208.sha256\n");
  expect({ shell, status }).toEqual({ shell: text, status: 1 });
});

test("a digest that begins a chain in the middle of another is told as a broken one", async () => {
  const folder = await tempFolder();
  deliver(folder);
  const text = formatDigest({ hour: "26112209", part: 1, hosts: [], missing: [], batches: [] });
  writeFileSync(join(folder, "accessLog_26112209.sha256"), text);
  const { text: told, shell, status } = await verifyBoth(folder);
  expect(told).toContain("chain broken: accessLog_26112209.sha256\n");
  expect({ shell, status }).toEqual({ shell: told, status: 1 });
});

test(`${RUNS} random mutations (seed ${SEED}) are found and named by both, which agree`, async () => {
  const good = await tempFolder();
  const files = deliver(good);
  const root = await tempFolder();
  for (let run = 0; run < RUNS; run++) {
    const folder = join(root, String(run));
    cpSync(good, folder, { recursive: true });
    const name = mutate(folder, files, randomFrom(SEED * 100_000 + run));
    expect(formatVerified(await verifyFolder(folder)), `run ${run}: ${name}`).toContain(`: ${name}\n`);
    if (run % SHELL_EVERY !== 0) {
      rmSync(folder, { recursive: true });
      continue;
    }
    const { text, shell, status } = await verifyBoth(folder);
    expect(shell, `run ${run}: ${name}`).toBe(text);
    expect(status, `run ${run}: ${name}`).toBe(1);
    rmSync(folder, { recursive: true });
  }
  expect(readFileSync(join(good, "accessLog_26112208.sha256"), "utf8")).toContain("# complete yes");
});
