import { expect, test } from "bun:test";
import { readdir, readFile, symlink, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { appendDurably, holdLock, moveDurably, readIfExists, writeDurably } from "../lib/durable.ts";
import { start, tempFolder } from "./support.ts";

test("writeDurably() replaces a file and leaves no temp file", async () => {
  const folder = await tempFolder();
  const path = join(folder, "state.json");
  await writeFile(`${path}.tmp`, "left by a crash");
  await writeDurably(path, "one");
  await writeDurably(path, "two");
  expect(await readFile(path, "utf8")).toBe("two");
  expect(await readdir(folder)).toEqual(["state.json"]);
});

test("appendDurably() cuts off a torn last line, also one that is longer than a block", async () => {
  const path = join(await tempFolder(), "report.log");
  await appendDurably(path, "one\n");
  await writeFile(path, `one\n${"x".repeat(10_000)}`);
  await appendDurably(path, "two\n");
  expect(await readFile(path, "utf8")).toBe("one\ntwo\n");
  await writeFile(path, "torn and nothing else");
  await appendDurably(path, "first\n");
  expect(await readFile(path, "utf8")).toBe("first\n");
});

test("moveDurably() refuses to replace a file", async () => {
  const folder = await tempFolder();
  await writeFile(join(folder, "a"), "a");
  await writeFile(join(folder, "b"), "b");
  expect(moveDurably(join(folder, "a"), join(folder, "b"))).rejects.toThrow("exists already");
  expect(await readFile(join(folder, "b"), "utf8")).toBe("b");
});

test("readIfExists() tells absent from empty", async () => {
  const folder = await tempFolder();
  expect(await readIfExists(join(folder, "absent"))).toBeUndefined();
  await writeFile(join(folder, "empty"), "");
  expect(await readIfExists(join(folder, "empty"))).toBe("");
});

test("holdLock() names the process that holds it and is free again after kill -9", async () => {
  const path = join(await tempFolder(), "lock");
  const holder = start(process.execPath, [
    "-e",
    `const { holdLock } = await import("${import.meta.dirname}/../lib/durable.ts");
     await holdLock(${JSON.stringify(path)}, "it"); console.log("held"); setInterval(() => {}, 1000);`,
  ]);
  await holder.says("held");
  expect(holdLock(path, "The folder")).rejects.toThrow(
    `The folder is in use by process ${holder.process.pid}`,
  );
  await holder.stop("SIGKILL");
  (await holdLock(path, "The folder")).release();
});

test("holdLock() holds what the kernel gave it, though a full disk takes no process id", async () => {
  const path = join(await tempFolder(), "full.lock");
  await symlink("/dev/full", path);
  const lock = await holdLock(path, "The folder");
  lock.release();
  (await holdLock(path, "The folder")).release();
});
