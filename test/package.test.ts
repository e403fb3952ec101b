/** The Debian packages: built, looked at by lintian, installed, upgraded, removed and purged in a root of their own. */
import { expect, setDefaultTimeout, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { chmod, mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { findProgram, missing, notRoot, ROOT, tempFolder } from "./support.ts";

setDefaultTimeout(180_000);

function run(program: string, ...args: string[]) {
  const found = findProgram(program) ?? program;
  const { status, stdout, stderr } = spawnSync(found, args, { encoding: "utf8", timeout: 120_000 });
  return { code: status, output: stdout + stderr };
}

test.skipIf(missing({ "dpkg-deb": "dpkg", lintian: "lintian", "systemd-sysusers": "systemd" }) || notRoot())(
  "both packages pass lintian, fit on one host, keep config and state, and leave nothing but batches behind",
  async () => {
    const outdir = await tempFolder();
    for (const script of ["build.ts --here", "package.ts"]) {
      const [file = "", ...flags] = script.split(" ");
      const args = ["run", join(ROOT, "deploy", file), "--outdir", outdir, ...flags];
      expect(run(process.execPath, ...args)).toMatchObject({ code: 0 });
    }
    const debs = (await readdir(outdir))
      .filter((name) => name.endsWith(".deb"))
      .map((name) => join(outdir, name));
    expect(debs).toHaveLength(2);
    const { output } = run("lintian", "--allow-root", "--no-tag-display-limit", ...debs);
    expect(output.split("\n").filter((line) => line.startsWith("E:"))).toEqual([]);

    const root = await tempFolder();
    await chmod(root, 0o755);
    for (const folder of ["etc", "var/lib/dpkg/info", "var/lib/dpkg/updates"])
      await mkdir(join(root, folder), { recursive: true });
    for (const file of ["status", "available"]) await writeFile(join(root, "var/lib/dpkg", file), "");
    const dpkg = (...args: string[]) =>
      run("dpkg", `--root=${root}`, "--force-script-chrootless", "--force-depends", ...args);

    const installed = dpkg("--install", ...debs);
    expect({ ...installed, good: installed.code === 0 }).toMatchObject({ good: true });
    expect(await readFile(join(root, "etc/passwd"), "utf8")).toContain("log-rt-sync-shipper:");
    const unit = await readFile(join(root, "lib/systemd/system/log-rt-sync-shipper.service"), "utf8");
    const [, bun = "", script = ""] = /^ExecStart=(\S+) .*?run (\S+)/m.exec(unit) ?? [];
    expect(run(join(root, bun), "run", join(root, script), "--version").output).toStartWith(
      "log-rt-sync shipper ",
    );

    const config = join(root, "etc/log-rt-sync/config.json");
    const [state, batch] = [
      join(root, "var/lib/log-rt-sync/state"),
      join(root, "app/log/access-log-receiver/a.log"),
    ];
    for (const file of [config, state, batch]) await writeFile(file, "kept");
    expect(dpkg("--install", ...debs)).toMatchObject({ code: 0 });
    for (const file of [config, state, batch]) expect(await readFile(file, "utf8")).toBe("kept");

    expect(dpkg("--remove", "log-rt-sync-sender", "log-rt-sync-middle")).toMatchObject({ code: 0 });
    expect(await readFile(config, "utf8")).toBe("kept");
    expect(dpkg("--purge", "log-rt-sync-sender", "log-rt-sync-middle")).toMatchObject({ code: 0 });
    for (const path of [
      "etc/log-rt-sync",
      "var/lib/log-rt-sync",
      "usr/lib/log-rt-sync-sender",
      "usr/bin/log-rt-sync-shipper",
    ]) {
      expect({ path, there: existsSync(join(root, path)) }).toEqual({ path, there: false });
    }
    expect(await readFile(batch, "utf8")).toBe("kept");
  },
);
