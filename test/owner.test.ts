import { expect, test } from "bun:test";
import { unlinkSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { gzipSync } from "node:zlib";
import { openLog, readMark } from "../lib/tail/file.ts";
import { findOwner } from "../lib/tail/owner.ts";
import { look } from "../lib/tail/rotation.ts";
import { createFamily, type Stream } from "../lib/tail/streams.ts";
import { accessLine, tempFolder } from "./support.ts";

test("findOwner() knows an archive whose original went away after the folder was listed", async () => {
  const folder = await tempFolder();
  const live = join(folder, "access.log");
  const plain = `${live}.1`;
  const text = [1, 2, 3].map((n) => accessLine(n)).join("");
  writeFileSync(plain, text);
  writeFileSync(`${plain}.gz`, gzipSync(text));
  const found = await look(plain);
  const file = await openLog(plain);
  const mark = await readMark(file, text.length);
  await file.close();
  if (!found || !mark) throw new Error("the file is not there");
  const stream: Stream = {
    keys: [found.key],
    path: plain,
    offset: text.length,
    signature: { head: mark, marks: [mark] },
    size: text.length,
    done: true,
    truncated: false,
    since: 0,
    seenAt: 0,
    grewAt: 0,
  };
  const family = createFamily(live, "known", 0);
  family.streams.push(stream);
  unlinkSync(plain);
  const archive = await openLog(`${plain}.gz`);
  expect(await findOwner(family, archive, text.length, false, new Map([[stream, found]]))).toBe(stream);
  await archive.close();
});
