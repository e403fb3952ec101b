/** What a shipper makes of the files that it finds at its start: their order, and what of them is its own. */
import { expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { mkdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createSender, expectTags, lines, type Sender, shiftNames, startStub } from "./pipeline.ts";
import { notRoot, onCleanup, until } from "./support.ts";

async function shippedTen(url: string, options: object = {}): Promise<Sender> {
  const sender = await createSender(url, options);
  sender.write(lines("a", 1, 10));
  await sender.once();
  return sender;
}

test.each(["plain", "gzip"])(
  "files rotated just before the start go before the live one, oldest first (%s)",
  async (kind) => {
    const stub = startStub();
    const sender = await shippedTen(stub.url, { rotateWaitSeconds: 1 });
    for (const tag of ["a", "b", "c"]) {
      sender.write(lines(tag, 11, 60));
      shiftNames(sender);
      sender.rotate();
    }
    if (kind === "gzip") for (const n of [2, 3]) execFileSync("gzip", [join(sender.logs, `access.log.${n}`)]);
    sender.write(lines("live", 1, 50));
    await sender.once();
    expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
  },
);

test("the live file does not wait for an unfinished one for longer than rotateWaitSeconds", async () => {
  const stub = startStub();
  const sender = await shippedTen(stub.url, { rotateWaitSeconds: 0.5 });
  await Bun.write(join(sender.logs, "access.log.2.gz"), new Uint8Array([0x1f, 0x8b, 8, 0]));
  sender.write(lines("a", 11, 20));
  const shipper = sender.start();
  await until("the live file is shipped", () => stub.text().includes("/a/20 "));
  expect(await shipper.stop()).toBe(0);
});

test("with the whole state folder gone, a rotated file goes on where the receiver is", async () => {
  const stub = startStub();
  const sender = await shippedTen(stub.url);
  rmSync(sender.stateDir, { recursive: true });
  sender.write(lines("a", 11, 20));
  sender.rotate();
  sender.write(lines("b", 1, 10));
  await sender.once();
  await sender.once();
  expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
});

test("startAt end goes on where the receiver is when the state folder is gone", async () => {
  const stub = startStub();
  const sender = await shippedTen(stub.url, { startAt: "beginning" });
  rmSync(sender.stateDir, { recursive: true });
  const config = await Bun.file(sender.config).text();
  await Bun.write(sender.config, config.replace('"beginning"', '"end"'));
  sender.write(lines("a", 11, 20));
  await sender.once();
  expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
});

test("a first start ships nothing of files that were rotated before it", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url);
  sender.write(lines("old", 1, 10));
  sender.rotate();
  sender.write(lines("live", 1, 10));
  await sender.once();
  expect(stub.text()).toBe(lines("live", 1, 10));
});

test.each(["waits", "is killed"])(
  "what comes when nothing was there at the first start is new, though no receiver answers yet (it %s)",
  async (what) => {
    const stub = startStub(() => (isAway ? new Response("", { status: 503 }) : undefined));
    let isAway = true;
    const sender = await createSender(stub.url, { startAt: "end" });
    rmSync(sender.live);
    const shipper = sender.start();
    await shipper.says("receiver does not take chunks");
    if (what === "is killed") await shipper.stop("SIGKILL");
    sender.reopen();
    sender.write(lines("a", 1, 10));
    if (what === "waits") await shipper.says("following");
    sender.rotate();
    sender.write(lines("b", 1, 10));
    isAway = false;
    if (what === "waits") await until("all is there", () => stub.text().includes("/b/10 "));
    await shipper.stop();
    await sender.once();
    expectTags(Buffer.from(stub.text()), { a: lines("a", 1, 10), b: lines("b", 1, 10) });
  },
);

test("no sign of life is sent beside the first chunk", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url, { heartbeatSeconds: 60 });
  for (let n = 1; n <= 100; n++) sender.write(lines("a", n * 100, n * 100 + 99));
  const shipper = sender.start();
  await until("the first lines are shipped", () => stub.text().includes("/a/10099 "));
  const [first, second] = stub.asked.filter(({ method }) => method === "POST");
  expect(first?.end).toBeGreaterThan(0);
  expect(second).toBeUndefined();
  expect(await shipper.stop()).toBe(0);
});

test("a new match of a glob is followed at once where events tell of it, not at the next poll", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url, { pollSeconds: 600 });
  const config = await Bun.file(sender.config).text();
  await Bun.write(sender.config, config.replace("access.log", "*.log"));
  sender.write(lines("a", 1, 1));
  const shipper = sender.start();
  await until("the first file is shipped", () => stub.text() === lines("a", 1, 1));
  await Bun.write(join(sender.logs, "other.log"), lines("b", 1, 1));
  await until("the new one is shipped", () => stub.text().endsWith(lines("b", 1, 1)));
  expect(await shipper.stop()).toBe(0);
});

test.skipIf(notRoot())("a state folder on a read-only disk stops nothing, and is told", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url);
  mkdirSync(sender.stateDir, { recursive: true });
  execFileSync("mount", ["-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", sender.stateDir]);
  onCleanup(() => execFileSync("umount", ["-l", sender.stateDir]));
  sender.write(lines("a", 1, 3));
  const shipper = sender.start();
  await shipper.says("cannot use state folder");
  await until("the lines", () => stub.text() === lines("a", 1, 3));
  sender.write(lines("a", 4, 4));
  await until("the next line", () => stub.text() === lines("a", 1, 4));
  expect(await shipper.stop()).toBe(0);
});
