/** SHA256SUMS beside what was built: scripts, executables and packages. */
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { join } from "node:path";

/** What `sha256sum -c SHA256SUMS` reads, for all that was built here, renamed into place. */
export function writeSums(outdir: string): void {
  const names = readdirSync(outdir).filter((name) => /^(\w+\.js|log-rt-sync-\w+|.+\.deb)$/.test(name));
  const sum = (name: string) =>
    createHash("sha256")
      .update(readFileSync(join(outdir, name)))
      .digest("hex");
  const fresh = join(outdir, "SHA256SUMS.new");
  writeFileSync(
    fresh,
    names
      .sort()
      .map((name) => `${sum(name)}  ${name}\n`)
      .join(""),
  );
  renameSync(fresh, join(outdir, "SHA256SUMS"));
}
