import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdir, readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { openTarget } from "../forwarder.ts";
import { sections } from "../lib/config.ts";
import {
  openContent,
  Refusal,
  readChunks,
  type Target,
  TargetFault,
  Unreadable,
} from "../lib/target/target.ts";
import { BACKENDS, type Backend, startDropbearBackend, takeAway } from "./backends.ts";
import { PACKAGES } from "./servers.ts";
import { missing, notRoot, tempFolder } from "./support.ts";

setDefaultTimeout(120_000);

const open = (backend: Backend, more: object = {}, signal = new AbortController().signal) =>
  openTarget(sections.forwarder.parse({ dir: "/nowhere", ...backend.settings, ...more }), signal);

async function* pieces(data: Uint8Array, size = 261_120): AsyncGenerator<Uint8Array> {
  const block = Buffer.alloc(size);
  for (let at = 0; at < data.length; at += size) {
    const length = Math.min(size, data.length - at);
    block.set(data.subarray(at, at + length)); // the same memory each time, as lib/target/content.ts does
    yield block.subarray(0, length);
  }
}

function noise(bytes: number): Uint8Array {
  const data = new Uint8Array(bytes);
  for (let i = 0, x = 1; i < bytes; i++) {
    x = (x * 1_103_515_245 + 12_345) & 0x7fffffff;
    data[i] = x >> 16;
  }
  return data;
}

describe.each(BACKENDS.filter(({ skip }) => !skip))("$name", ({ start }) => {
  let backend: Backend;
  let target: Target;
  beforeAll(async () => {
    backend = await start();
    target = await open(backend);
  });
  afterAll(() => target.close());

  test("upload() writes the temp file alone, publish() gives it its name, byte for byte", async () => {
    for (const bytes of [0, 1, 31_952, 31_953, 261_120, 3_000_001]) {
      const data = noise(bytes);
      await target.upload("a.log", pieces(data));
      expect(await readdir(backend.folder)).toEqual(["a.log.tmp"]);
      await target.publish("a.log", 1);
      expect(await readdir(backend.folder)).toEqual(["a.log"]);
      expect(Buffer.compare(await readFile(join(backend.folder, "a.log")), data)).toBe(0);
      await target.remove("a.log");
    }
  });

  test("upload() begins from nothing when a longer temp file is there", async () => {
    await target.upload("a.log", pieces(noise(100_000)));
    await target.upload("a.log", pieces(noise(10)));
    expect((await target.stat("a.log.tmp"))?.bytes).toBe(10);
    await target.remove("a.log.tmp");
  });

  test("many uploads at the same time do not mix", async () => {
    const names = Array.from({ length: 40 }, (_, i) => `batch-${i}.log`);
    const data = names.map((_, i) => noise(i * 9_999).map((byte) => byte ^ i));
    await Promise.all(names.map((name, i) => target.upload(name, pieces(data[i] as Uint8Array))));
    await Promise.all(names.map((name) => target.publish(name, 1)));
    for (const [i, name] of names.entries()) {
      expect(Buffer.compare(await readFile(join(backend.folder, name)), data[i] as Uint8Array)).toBe(0);
    }
    await takeAway(backend);
  });

  test("look() is undefined for no file, read() gives the content back, remove() of no file is no error", async () => {
    expect(await target.stat("absent")).toBeUndefined();
    await target.remove("absent");
    const data = noise(200_000);
    await target.upload("a.log", pieces(data));
    await target.publish("a.log", 1);
    const read: Uint8Array[] = [];
    for await (const chunk of target.read("a.log", data.length + 1)) read.push(Uint8Array.from(chunk));
    expect(Buffer.compare(Buffer.concat(read), data)).toBe(0);
    await takeAway(backend);
  });

  test("what one name alone is refused for is a Refusal, and the connection goes on", async () => {
    await mkdir(join(backend.folder, "folder.log.tmp"));
    expect(await target.upload("folder.log", pieces(noise(9))).catch((error) => error)).toBeInstanceOf(
      Refusal,
    );
    expect(await target.publish("absent", 1).catch((error) => error)).toBeInstanceOf(Refusal);
    await takeAway(backend);
    await target.upload("a.log", pieces(noise(9)));
    await takeAway(backend);
  });

  test("upload() of a batch that cannot be read says so and is no fault of the target", async () => {
    const error = await target.upload("a.log", readChunks("/absent")).catch((error) => error);
    expect(error).toBeInstanceOf(Unreadable);
    expect(error.message).toBe('Cannot read "/absent"');
  });
});

describe.each(BACKENDS.filter(({ skip, name }) => !skip && name !== "file://"))("$name only", ({ start }) => {
  test("close() rejects what is in hand", async () => {
    const target = await open(await start());
    const inHand = target.upload("a.log", pieces(noise(20_000_000)));
    target.close();
    expect(await inHand.catch((error) => error)).toBeInstanceOf(TargetFault);
    expect(await target.stat("a.log").catch((error) => error)).toBeInstanceOf(TargetFault);
  });

  test("the signal ends it", async () => {
    const abort = new AbortController();
    const backend = await start();
    const target = await open(backend, {}, abort.signal);
    const inHand = target.upload("a.log", pieces(noise(20_000_000)));
    abort.abort();
    expect(await inHand.catch((error) => error)).toBeInstanceOf(TargetFault);
    expect(await open(backend, {}, abort.signal).catch((error) => error)).toBeInstanceOf(TargetFault);
  });
});

describe("openContent()", () => {
  test("counts lines and bytes, hashes, and compresses to the same bytes each time", async () => {
    const path = join(await tempFolder(), "a.log");
    const text = "a line\n".repeat(100_000);
    await writeFile(path, `${text}no line break`);
    const plain = openContent(readChunks(path));
    expect(await sizeOf(plain.chunks)).toBe(text.length + 13);
    expect(plain.measured).toEqual({
      bytes: text.length + 13,
      lines: 100_000,
      sha256: new Bun.CryptoHasher("sha256").update(`${text}no line break`).digest("hex"),
    });
    const first = openContent(readChunks(path), { gzip: true });
    const second = openContent(readChunks(path), { gzip: true });
    const packed = await collect(first.chunks);
    expect(Buffer.from(Bun.gunzipSync(packed)).toString()).toBe(`${text}no line break`);
    await sizeOf(second.chunks);
    expect(second.measured).toEqual(first.measured);
    expect(first.measured).toMatchObject({ lines: 100_000, bytes: packed.length });
  });

  test("an unreadable file is an error with gzip, too", async () => {
    const content = openContent(readChunks("/absent"), { gzip: true });
    expect(await sizeOf(content.chunks).catch((error) => error)).toBeInstanceOf(Unreadable);
  });
});

async function collect(chunks: AsyncIterable<Uint8Array>): Promise<Buffer<ArrayBuffer>> {
  const parts: Uint8Array[] = [];
  for await (const chunk of chunks) parts.push(Uint8Array.from(chunk));
  return Buffer.concat(parts);
}

async function sizeOf(chunks: AsyncIterable<Uint8Array>): Promise<number> {
  return (await collect(chunks)).length;
}

test.skipIf(missing(PACKAGES.dropbear) || notRoot())("dropbear: a login by password", async () => {
  const backend = await startDropbearBackend("password");
  const target = await open(backend);
  await target.upload("a.log", pieces(noise(100_000)));
  await target.publish("a.log", 1);
  expect(await readdir(backend.folder)).toEqual(["a.log"]);
  await target.close();
});
