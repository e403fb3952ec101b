/**
 * `npm run build:deb` makes dist/log-rt-sync-sender_….deb and dist/log-rt-sync-middle_….deb from what `npm run build`
 * left in dist/: the scripts as one file each, Bun itself, units, users, places for secrets, an example config.
 * An upgrade keeps config and state. A purge takes the config folder and the state with the last of the two packages;
 * the folder of batches stays: what the client does not have yet is not a package's to delete.
 */
import { spawnSync } from "node:child_process";
import {
  copyFileSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join, resolve } from "node:path";
import { parseArgs } from "node:util";
import { gzipSync } from "node:zlib";
import { writeSums } from "./sums.ts";

const root = join(import.meta.dirname, "..");
const { version } = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as { version: string };
const ARCHITECTURES: Record<string, string> = { x64: "amd64", arm64: "arm64" };

interface Package {
  name: string;
  scripts: string[];
  /** Its users and folders: `log-rt-sync-<side>.sysusers.conf` and `.tmpfiles.conf`. */
  side: string;
  /** Files of deploy/ that go into the examples. */
  examples: string[];
  summary: string;
}
const PACKAGES: Package[] = [
  {
    name: "log-rt-sync-sender",
    scripts: ["shipper"],
    side: "shipper",
    examples: ["logrotate-nginx"],
    summary: "sends every line of nginx's logs to a Log-RT-Sync server",
  },
  {
    name: "log-rt-sync-middle",
    scripts: ["receiver", "forwarder", "monitor", "housekeep"],
    side: "middle",
    examples: ["alerts.yml", "fail2ban-log-rt-sync.conf", "haproxy.cfg", "nginx.conf", "verify.sh"],
    summary: "collects nginx's lines in batches and delivers them by SFTP",
  },
];

function write(folder: string, path: string, content: string | Uint8Array, mode = 0o644): void {
  const file = join(folder, path);
  mkdirSync(dirname(file), { recursive: true, mode: 0o755 });
  writeFileSync(file, content, { mode });
}

/** A unit as the package has it: Bun, script and documents at the package's own places. */
function packagedUnit(text: string, { name }: Package): string {
  return text
    .replaceAll("/usr/local/bin/bun", `/usr/lib/${name}/bun`)
    .replace(/\/opt\/log-rt-sync\/(\w+)\.ts/g, `/usr/lib/${name}/$1.js`)
    .replace("file:///opt/log-rt-sync/README.md", `file:///usr/share/doc/${name}/README.md.gz`)
    .replace("WorkingDirectory=/opt/log-rt-sync", `WorkingDirectory=/usr/lib/${name}`);
}

/** Units, each with the hardening as a drop-in of its own, so that both packages fit on one host. */
function addUnits(folder: string, pack: Package): void {
  const units = join(root, "deploy/systemd");
  const hardening = readFileSync(join(units, "log-rt-sync-.service.d/hardening.conf"), "utf8");
  const wanted = new RegExp(`^log-rt-sync-(${pack.scripts.join("|")})@?\\.(service|timer)$`);
  for (const unit of readdirSync(units).filter((file) => wanted.test(file))) {
    write(folder, `lib/systemd/system/${unit}`, packagedUnit(readFileSync(join(units, unit), "utf8"), pack));
    if (unit.endsWith(".timer")) continue;
    write(folder, `lib/systemd/system/${unit}.d/hardening.conf`, packagedUnit(hardening, pack));
  }
  for (const kind of ["sysusers", "tmpfiles"])
    copyInto(
      folder,
      join(units, `log-rt-sync-${pack.side}.${kind}.conf`),
      `usr/lib/${kind}.d/${pack.name}.conf`,
    );
}

function copyInto(folder: string, from: string, path: string, mode = 0o644): void {
  write(folder, path, readFileSync(from), mode);
}

/** The commands that an operator types: in whatever folder, no stranger's .env or bunfig.toml is read. */
function command(name: string, script: string): string {
  return `#!/bin/sh
: "\${LOG_RT_SYNC_CONFIG:=/etc/log-rt-sync/config.json}"
export LOG_RT_SYNC_CONFIG
exec /usr/lib/${name}/bun --smol --no-env-file --config=/dev/null --no-install run /usr/lib/${name}/${script}.js "$@"
`;
}

function addDocuments(folder: string, { name, scripts, examples }: Package): void {
  const documents = `usr/share/doc/${name}`;
  for (const file of ["README.md", "CHANGELOG.md"]) {
    const to = file === "CHANGELOG.md" ? "changelog.gz" : `${file}.gz`;
    write(folder, `${documents}/${to}`, gzipSync(readFileSync(join(root, file)), { level: 9 }));
  }
  copyInto(folder, join(root, "LICENSE"), `${documents}/copyright`);
  copyInto(folder, join(root, "config.example.json"), `${documents}/examples/config.example.json`);
  for (const file of readdirSync(join(root, "docs")))
    write(
      folder,
      `${documents}/docs/${file}.gz`,
      gzipSync(readFileSync(join(root, "docs", file)), { level: 9 }),
    );
  for (const file of examples) copyInto(folder, join(root, "deploy", file), `${documents}/examples/${file}`);
  // Bun is delivered as its makers built it; the commands have --help in place of a manual page.
  const overrides = [
    `${name}: unstripped-binary-or-object [usr/lib/${name}/bun]`,
    `${name}: embedded-library *`,
    `${name}: hardening-no-pie *`,
    // Whoever builds it is the one to write to; no address of theirs is known here.
    `${name}: bogus-mail-host Maintainer *`,
    ...scripts.map((script) => `${name}: no-manual-page [usr/bin/log-rt-sync-${script}]`),
  ];
  write(folder, `usr/share/lintian/overrides/${name}`, `${overrides.join("\n")}\n`);
}

const POSTINST = (name: string, scripts: string[]) => `#!/bin/sh
set -e
if [ "$1" = configure ]; then
    systemd-sysusers --root="$DPKG_ROOT/" "$DPKG_ROOT/usr/lib/sysusers.d/${name}.conf"
    systemd-tmpfiles --root="$DPKG_ROOT/" --create "$DPKG_ROOT/usr/lib/tmpfiles.d/${name}.conf"
    if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl try-restart ${scripts.map((script) => `'log-rt-sync-${script}*.service'`).join(" ")}
    fi
fi
`;
const PRERM = (scripts: string[]) => `#!/bin/sh
set -e
if [ "$1" = remove ] && [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    systemctl stop ${scripts.flatMap((script) => [`'log-rt-sync-${script}*.timer'`, `'log-rt-sync-${script}*.service'`]).join(" ")}
fi
`;
const POSTRM = (other: string) => `#!/bin/sh
set -e
if [ "$1" = purge ] && [ ! -e "$DPKG_ROOT/usr/lib/${other}" ]; then
    rm -rf "$DPKG_ROOT/etc/log-rt-sync" "$DPKG_ROOT/var/lib/log-rt-sync"
fi
if [ -z "$DPKG_ROOT" ] && [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
`;

function addControl(folder: string, pack: Package, architecture: string): void {
  const { name, scripts, summary } = pack;
  const other = PACKAGES.find((candidate) => candidate !== pack)?.name ?? "";
  const control = `Package: ${name}
Version: ${version}
Architecture: ${architecture}
Maintainer: The maintainers of your copy <log-rt-sync@localhost.localdomain>
Depends: libc6, systemd
Section: admin
Priority: optional
Description: ${summary}
 Part of Log-RT-Sync: every line of nginx's access logs reaches an SFTP server
 exactly once, in files of 20 minutes per host. Bun is included.
`;
  write(folder, "DEBIAN/control", control);
  write(folder, "DEBIAN/postinst", POSTINST(name, scripts), 0o755);
  write(folder, "DEBIAN/prerm", PRERM(scripts), 0o755);
  write(folder, "DEBIAN/postrm", POSTRM(other), 0o755);
}

/** Makes one package beside its name and renames it. */
function pack(one: Package, outdir: string, architecture: string): string {
  const folder = mkdtempSync(join(tmpdir(), "log-rt-sync-deb-"));
  const tree = join(folder, "tree");
  try {
    mkdirSync(join(tree, "usr/lib", one.name), { recursive: true, mode: 0o755 });
    copyFileSync(process.execPath, join(tree, "usr/lib", one.name, "bun"));
    for (const script of one.scripts) {
      copyInto(tree, join(outdir, `${script}.js`), `usr/lib/${one.name}/${script}.js`);
      write(tree, `usr/bin/log-rt-sync-${script}`, command(one.name, script), 0o755);
    }
    addUnits(tree, one);
    addDocuments(tree, one);
    addControl(tree, one, architecture);
    spawnSync("chmod", ["-R", "u=rwX,go=rX", tree]);
    const file = join(outdir, `${one.name}_${version}_${architecture}.deb`);
    const args = ["--root-owner-group", "-Zgzip", "-z6", "--build", tree, `${file}.new`];
    const { status, stderr } = spawnSync("dpkg-deb", args, { encoding: "utf8" });
    if (status !== 0) throw new Error(`dpkg-deb: ${stderr}`);
    renameSync(`${file}.new`, file);
    return file;
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

const { values } = parseArgs({ options: { outdir: { type: "string", default: "dist" } } });
const outdir = resolve(root, values.outdir);
const architecture = ARCHITECTURES[process.arch];
if (!architecture || !existsSync(join(outdir, "shipper.js"))) {
  process.stderr.write("run npm run build first, on amd64 or arm64\n");
  process.exit(1);
}
for (const one of PACKAGES) process.stdout.write(`${pack(one, outdir, architecture)}\n`);
writeSums(outdir);
