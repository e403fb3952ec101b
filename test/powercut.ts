/**
 * A disk of its own whose power can be cut: ext4 in a file, on a loop device, shut down by its own ioctl without a
 * flush. What was not synced is gone then, as after a power loss; what is mounted again is what the disk has.
 */
import { execFileSync } from "node:child_process";
import { mkdirSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { missing, notRoot, onCleanup, tempFolder } from "./support.ts";

/** `_IOR('X', 125, __u32)`: EXT4_IOC_SHUTDOWN; EXT4_GOING_FLAGS_NOLOGFLUSH leaves the journal of ext4 as it stands, too. */
const SHUTDOWN = 0x8004587d;
const NO_LOG_FLUSH = 2;

export interface Disk {
  folder: string;
  /** From now on nothing reaches the disk, and every call on it fails. */
  cut(): void;
  /** Takes the disk as it is, after every process that had files there has ended. */
  restore(): void;
}

/** Whether this machine has no such disks; told, and an error in CI where it is the tools that are missing. */
export function noDisk(): boolean {
  if (notRoot() || missing({ "mkfs.ext4": "e2fsprogs", perl: "perl-base", mount: "mount" })) return true;
  try {
    execFileSync("losetup", ["--find"], { stdio: "pipe" });
    return false;
  } catch (error) {
    process.stderr.write(`skipped: no loop device: ${error}\n`);
    return true;
  }
}

export async function createDisk(bytes: number): Promise<Disk> {
  const base = await tempFolder();
  const [image, folder] = [join(base, "image"), join(base, "disk")];
  writeFileSync(image, "");
  truncateSync(image, bytes);
  mkdirSync(folder);
  execFileSync("mkfs.ext4", ["-q", "-F", image]);
  const mount = () => execFileSync("mount", ["-o", "loop", image, folder]);
  const unmount = () => execFileSync("umount", [folder]);
  mount();
  onCleanup(() => execFileSync("umount", ["-l", folder]));
  const script = `open(my $f, "<", $ARGV[0]) or die; my $v = pack("L", ${NO_LOG_FLUSH}); ioctl($f, ${SHUTDOWN}, $v) or die "$!"`;
  return {
    folder,
    cut: () => void execFileSync("perl", ["-e", script, folder]),
    restore() {
      unmount();
      mount();
    },
  };
}
