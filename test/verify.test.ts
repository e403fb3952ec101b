/** `--verify` and deploy/verify.sh: what they say of a delivered folder, and that they say the same. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { mkdirSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { parseBatchName } from "../lib/batch.ts";
import { type Digest, formatDigest, formatDigestName } from "../lib/digest.ts";
import { findShells, runSeed, type Shell, VERIFY_SH, verifyBoth as verifyBy } from "./mutate.ts";
import { accessLine, missing, startScript, tempFolder } from "./support.ts";

setDefaultTimeout(300_000);

missing({ busybox: "busybox" });
const SHELLS = findShells();
const HOURS = ["26112205", "26112206", "26112207", "26112208"];
const hash = (data: string | Uint8Array) => createHash("sha256").update(data).digest("hex");

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

/** What `--verify` and verify.sh say of a folder; by every shell the same. */
async function verifyBoth(folder: string) {
  const said = await Promise.all(SHELLS.map((shell) => verifyBy(folder, shell)));
  for (const one of said) expect(one).toEqual(said[0] as (typeof said)[0]);
  return said[0] as (typeof said)[0];
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

test("without a digest nothing is proved, and what can't be read is no finding; no notes are left behind", async () => {
  const folder = await tempFolder();
  const notes = await tempFolder();
  writeFileSync(join(folder, "accessLog_26112208_00-19_10-0-0-1.log"), "x\n");
  for (const { command, env } of SHELLS) {
    const run = (of: string) =>
      spawnSync(command, [VERIFY_SH, of], { env: { ...env, TMPDIR: notes }, encoding: "utf8" });
    expect(run(folder)).toMatchObject({
      ...{ status: 1, stdout: "" },
      stderr: `no digest is in ${folder}: nothing says what has to be there\n`,
    });
    expect(run(join(folder, "absent"))).toMatchObject({ status: 2, stdout: "" });
  }
  expect(readdirSync(notes)).toEqual([]);
});

test.each([1, 21, 41, 61, 81])(
  "damage by chance, seeds from %d: both find it, name it, and say the same",
  async (from) => {
    for (let seed = from; seed < from + 20; seed++) {
      const { fault } = await runSeed(seed, SHELLS[seed % SHELLS.length] as Shell);
      if (fault) throw new Error(`seed ${seed}: ${fault}`);
    }
  },
);
