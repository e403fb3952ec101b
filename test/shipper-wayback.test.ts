/** The receiver's folder is lost: what was not delivered is shipped again by the host, under names that were never used. */
import { expect, test } from "bun:test";
import { readdirSync, rmSync } from "node:fs";
import { join } from "node:path";
import { createSender, expectArrives, lines, startRealReceiver } from "./pipeline.ts";
import { until } from "./support.ts";

test("the folder is wiped while the log goes on and after a rotation: every line is there again, and it is told", async () => {
  const receiver = await startRealReceiver();
  const sender = await createSender(receiver.url, { heartbeatSeconds: 0.2, pollSeconds: 0.1 });
  sender.write(lines("a", 1, 50));
  const shipper = sender.start();
  await expectArrives(receiver, sender);
  sender.rotate();
  sender.write(lines("b", 1, 50));
  await expectArrives(receiver, sender);
  const before = readdirSync(join(receiver.dir, sender.host)).filter((name) => name.endsWith(".part"));
  receiver.running.process.kill("SIGKILL");
  await receiver.running.ended;
  for (const name of readdirSync(receiver.dir)) rmSync(join(receiver.dir, name), { recursive: true });
  await receiver.start();
  await expectArrives(receiver, sender);
  await shipper.says("receiver has lost lines: shipping them again");
  const after = readdirSync(join(receiver.dir, sender.host)).filter((name) => name.endsWith(".part"));
  expect(before.filter((name) => after.includes(name))).toEqual([]);
  sender.write(lines("b", 51, 60));
  await until("what comes later goes on", () => receiver.stored(sender.host).includes(lines("b", 51, 60)));
  expect(await shipper.stop()).toBe(0);
});
