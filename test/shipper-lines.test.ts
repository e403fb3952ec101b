/**
 * What a line is, as the shipper sees it: half lines, long lines, lines of any bytes, lines that are left out.
 * The real process sends to the real receiver; what is stored there is compared byte for byte.
 */
import { afterEach, beforeAll, describe, expect, test } from "bun:test";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import type { Cursor } from "../lib/tail/cursor.ts";
import {
  createSender,
  expectArrives,
  lines,
  type RealReceiver,
  type Sender,
  startRealReceiver,
  startStub,
  usage,
} from "./pipeline.ts";
import { type Running, until } from "./support.ts";

let receiver: RealReceiver;
beforeAll(async () => {
  receiver = await startRealReceiver();
});

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function startShipper(sender: Sender): Running {
  const shipper = sender.start();
  running.push(shipper);
  return shipper;
}

/** With a heartbeat so often, its `Log-Lag` tells how much of the file the shipper has seen. */
const TALKATIVE = { heartbeatSeconds: 0.1 };

/** Waits until the receiver was told that so many bytes were seen and are not shipped. */
async function untilLag(sender: Sender, bytes: number): Promise<void> {
  await until(`${bytes} bytes are seen and not shipped`, async () => {
    const text = await (await fetch(`${receiver.url}/metrics`)).text();
    return text.split("\n").some((line) => {
      return line.includes("lag_bytes") && line.includes(`"${sender.host}"`) && line.endsWith(` ${bytes}`);
    });
  });
}

function cursorOf(sender: Sender): Cursor {
  return JSON.parse(readFileSync(join(sender.stateDir, "cursor.json"), "utf8"));
}

const START = '10.0.0.1 - - [22/Nov/2026:06:20:01 +0600] "GET /';
const END = ' HTTP/1.1" 200 5 "-" "curl"\n';

/** A line of exactly so many bytes. */
function lineOf(bytes: number, fill = "x"): string {
  return START + fill.repeat(bytes - START.length - END.length) + END;
}

describe("half a line", () => {
  const half = lines("half", 1, 1).slice(0, 70);
  const rest = lines("half", 1, 1).slice(70);

  test("is held until its end is there, and arrives as one line", async () => {
    const sender = await createSender(receiver.url, TALKATIVE);
    startShipper(sender);
    sender.write(lines("a", 1, 3) + half);
    await untilLag(sender, half.length);
    expect(receiver.stored(sender.host).toString()).toBe(lines("a", 1, 3));
    sender.write(rest + lines("b", 1, 3));
    await expectArrives(receiver, sender);
  });

  test.each([
    ["a page", {}],
    ["a chunk", { chunkBytes: 4096 }],
  ])("that ends exactly at the edge of %s is the same", async (_, options) => {
    const sender = await createSender(receiver.url, { ...TALKATIVE, ...options });
    startShipper(sender);
    sender.write(lineOf(4096 - half.length) + half);
    await untilLag(sender, half.length);
    sender.write(rest + lineOf(4096 - rest.length - half.length) + half); // and at the next edge
    await untilLag(sender, half.length);
    sender.write(rest + lines("b", 1, 3));
    await expectArrives(receiver, sender);
  });

  test("that fills a whole chunk goes ahead as a piece, and is no line before its end", async () => {
    const sender = await createSender(receiver.url, { ...TALKATIVE, chunkBytes: 4096 });
    startShipper(sender);
    sender.write(lineOf(4096).slice(0, -1) + "y".repeat(4097));
    await untilLag(sender, 0);
    expect(receiver.stored(sender.host).length).toBe(0);
    sender.write("end\n");
    await expectArrives(receiver, sender);
  });

  test.each(["SIGTERM", "SIGKILL"] as const)(
    "is read, then %s: it arrives once and whole",
    async (signal) => {
      const sender = await createSender(receiver.url, { ...TALKATIVE, chunkBytes: 4096 });
      const first = startShipper(sender);
      sender.write(lines("a", 1, 3) + half);
      await untilLag(sender, half.length);
      expect(await first.stop(signal)).toBe(signal === "SIGTERM" ? 0 : "SIGKILL");
      const second = startShipper(sender);
      sender.write(`${rest}${"z".repeat(5000)}`); // now a line of which a piece was shipped
      await untilLag(sender, 5000 - 4096);
      await second.stop(signal);
      sender.write(`${"z".repeat(5000)}\n${lines("b", 1, 3)}`);
      await sender.once();
      await expectArrives(receiver, sender);
    },
  );

  test("is no reason for --once to wait", async () => {
    const sender = await createSender(receiver.url);
    sender.write(lines("a", 1, 3) + half);
    await sender.once();
    expect(receiver.stored(sender.host).toString()).toBe(lines("a", 1, 3));
    sender.write(rest);
    await sender.once();
    await expectArrives(receiver, sender);
  });
});

test("a file that grows byte by byte from nothing is one stream, over restarts too", async () => {
  const stub = startStub();
  const sender = await createSender(stub.url, { ...TALKATIVE, heartbeatSeconds: 0.05 });
  let shipper = startShipper(sender);
  const text = lines("a", 1, 2);
  for (const [i, byte] of [...text].entries()) {
    sender.write(byte);
    const size = i + 1 - (text.lastIndexOf("\n", i) + 1);
    if (i > 24 && i % 40 > 0) continue; // the rest without waiting until each was seen
    await until(`byte ${i} is seen`, () => stub.asked.at(-1)?.lag === size);
    if (i % 20 > 0) continue;
    expect(await shipper.stop()).toBe(0);
    shipper = startShipper(sender);
  }
  await until("both lines are there", () => stub.text().length >= text.length);
  expect(await shipper.stop()).toBe(0);
  expect(stub.text()).toBe(text);
  const streams = new Set(stub.asked.filter(({ method }) => method === "POST").map(({ stream }) => stream));
  expect(streams.size).toBe(1);
  expect(cursorOf(sender).streams.length).toBe(1);
});

describe("skip", () => {
  const skip = [["/health.php", "nginx/", "health check"], ["/ping"]];
  const health = `${START}health.php HTTP/1.1" 200 5 "-" "nginx/1.29 (health check)"\n`;

  test("thousands of lines in a row move the cursor on, and are covered at the receiver", async () => {
    const sender = await createSender(receiver.url, { skip, chunkBytes: 65_536 });
    const skipped = health.repeat(20_000);
    sender.write(skipped);
    await sender.once();
    expect(receiver.stored(sender.host).length).toBe(0);
    const stream = cursorOf(sender).streams[0];
    expect(stream?.offset).toBe(skipped.length);
    const headers = { "Log-Host": sender.host, "Log-Stream": stream?.id ?? "" };
    const answer = await fetch(`${receiver.url}/upload`, { method: "HEAD", headers });
    expect(answer.headers.get("Upload-Offset")).toBe(String(skipped.length));
    sender.write(lines("a", 1, 1));
    await sender.once();
    await expectArrives(receiver, sender, lines("a", 1, 1));
  });

  test("leaves out a line with every text of a rule, and no other", async () => {
    const sender = await createSender(receiver.url, { skip, chunkBytes: 4096 });
    const almost = `${START}health.php HTTP/1.1" 200 5 "-" "nginx/1.29"\n`;
    const ping = `${START}ping${END}`;
    let kept = "";
    for (let n = 1; n <= 300; n++) {
      const keep = lines("a", n, n) + (n % 7 === 0 ? almost : "");
      sender.write((n % 3 === 0 ? health : "") + keep + (n % 5 === 0 ? ping + health + ping : ""));
      kept += keep;
    }
    await sender.once();
    await expectArrives(receiver, sender, kept);
  });

  test("never takes a part of a line: one that is longer than a chunk arrives whole", async () => {
    const sender = await createSender(receiver.url, { skip, chunkBytes: 4096 });
    const early = `${START}ping${"x".repeat(9000)}${END}`;
    const late = `${START}${"x".repeat(9000)}/ping${END}`;
    for (const [n, long] of [early, late, early].entries()) sender.write(lines("a", n, n) + long);
    await sender.once();
    await expectArrives(receiver, sender);
  });

  test("a text that begins with ^ is the line's first: no client hides a request by sending it", async () => {
    const sender = await createSender(receiver.url, { skip: [["^10.0.0.9 ", "/ping"]] });
    const hidden = `10.0.0.8 - - "GET /admin.php?x=10.0.0.9 /ping${END}`;
    sender.write(`10.0.0.9 - - "GET /ping${END}${hidden}`);
    await sender.once();
    await expectArrives(receiver, sender, hidden);
  });

  test("a rule's texts that stand in two lines skip neither", async () => {
    const sender = await createSender(receiver.url, { skip });
    const parts = [`${START}health.php${END}`, `${START}nginx/${END}`, `${START}health check${END}`];
    sender.write(parts.join(""));
    await sender.once();
    await expectArrives(receiver, sender);
  });
});

describe.each(["none", "gzip", "zstd"])("compression %s", (compression) => {
  test("every byte but LF is the same at the receiver", async () => {
    const sender = await createSender(receiver.url, { compression, chunkBytes: 4096 });
    const odd = [
      ...Array.from({ length: 256 }, (_, byte) => Buffer.from([byte])).filter(([byte]) => byte !== 0x0a),
      Buffer.from(Array.from({ length: 256 }, (_, byte) => byte).filter((byte) => byte !== 0x0a)),
      Buffer.from("\u2028 \u2029 \u0085 \v \f \r \uFEFF é 😀"),
      Buffer.from([0xed, 0xa0, 0x80, 0xc0, 0xaf, 0xf5, 0xff]), // a surrogate, an overlong form, no UTF-8
      Buffer.alloc(100), // NULs in the midst of a file are no hole
    ];
    sender.write(lines("first", 1, 1));
    for (const bytes of odd) {
      sender.write(Buffer.concat([Buffer.from(START), bytes, Buffer.from(END)]));
      sender.write(Buffer.concat([bytes, Buffer.from(" first and last "), bytes, Buffer.from("\n")]));
      sender.write(Buffer.concat([bytes, Buffer.from("\n")])); // goes with the line before it
    }
    sender.write("\n\n\r\n");
    await sender.once();
    await expectArrives(receiver, sender);
  });

  test("is what a chunk is sent in, small ones as they are", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url, { compression });
    sender.write(lines("a", 1, 1000));
    await sender.once();
    sender.write(lines("b", 1, 1));
    await sender.once();
    expect(stub.text()).toBe(lines("a", 1, 1000) + lines("b", 1, 1));
    expect(stub.asked.filter(({ method }) => method === "POST").map(({ encoding }) => encoding)).toEqual([
      compression === "none" ? null : compression,
      null,
    ]);
  });
});

test("a byte order mark at the head of the file stays, and its line goes with the others", async () => {
  const sender = await createSender(receiver.url);
  sender.write(`\uFEFF${lines("a", 1, 3)}`);
  await sender.once();
  await expectArrives(receiver, sender);
});

test("lines of 1 MB and of 50 MB arrive whole between their neighbours, in bounded memory", async () => {
  const sender = await createSender(receiver.url);
  const shipper = startShipper(sender);
  for (const [tag, megabytes] of [
    ["a", 1],
    ["b", 50],
    ["c", 1],
  ] as const) {
    sender.write(lines(tag, 1, 2));
    sender.write(lineOf(megabytes * 1_000_000, tag));
  }
  sender.write(lines("d", 1, 2));
  await expectArrives(receiver, sender, undefined, shipper);
  expect(usage(shipper.process.pid ?? 0).peak).toBeLessThan(256 * 1024 * 1024);
  expect(usage(receiver.running.process.pid ?? 0).peak).toBeLessThan(512 * 1024 * 1024);
  expect(await shipper.stop()).toBe(0);
});
