/**
 * What can stand between the shipper and its receiver: web servers, portals, proxies, slow lines, networks that forget. A
 * chunk is held until the contract's own answer comes, whatever else answers, and the operator is told what did.
 */
import { afterEach, describe, expect, test } from "bun:test";
import { cpSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { parseConfig } from "../lib/config.ts";
import { Uploader } from "../lib/tail/upload.ts";
import {
  createSender,
  expectArrives,
  lines,
  type Sender,
  type StubReceiver,
  startRealReceiver,
  startStub,
} from "./pipeline.ts";
import { freePort, onCleanup, type Running, until } from "./support.ts";

const running: Running[] = [];
afterEach(async () => {
  for (const each of running.splice(0)) await each.stop("SIGKILL");
});

function startShipper(sender: Sender, env?: Record<string, string>): Running {
  const shipper = sender.start([], env);
  running.push(shipper);
  return shipper;
}

async function arrives(stub: StubReceiver, tag: string, n: number): Promise<void> {
  await until(`line ${n} of ${tag} is there`, () => stub.text().includes(`GET /${tag}/${n} `));
}

/** Passes TCP on to `to`, in its own way. */
async function startRelay(
  to: string,
  pass: (from: Socket, into: Socket, isUp: boolean) => void,
): Promise<string> {
  const port = await freePort();
  const server = createServer((client) => {
    const upstream = connect(Number(new URL(to).port), "127.0.0.1");
    for (const [from, into] of [
      [client, upstream],
      [upstream, client],
    ] as const) {
      from.on("error", () => {});
      from.on("close", () => into.destroy());
      pass(from, into, from === client);
    }
  });
  await new Promise<void>((resolve) => server.listen(port, "127.0.0.1", resolve));
  onCleanup(() => server.close());
  return `http://127.0.0.1:${port}`;
}

describe("something else answers 200", () => {
  const html = (headers: Record<string, string> = {}) =>
    new Response("<html>Please log in to the guest network</html>", {
      headers: { Server: "portal/1.0", "Content-Type": "text/html", ...headers },
    });
  const answers: [string, (end: number) => Response][] = [
    ["a page", () => html()],
    ["an empty one", () => new Response(null, { status: 200, headers: { Server: "portal/1.0" } })],
    ["204", () => new Response(null, { status: 204, headers: { Server: "portal/1.0" } })],
    ["a cached answer to an earlier chunk", (end) => html({ "Upload-Offset": String(end - 1) })],
    [
      "the receiver's words without its offset",
      (end) => new Response(JSON.stringify({ lines: 1, offset: end }), { headers: { Server: "portal/1.0" } }),
    ],
    [
      "an answer without end",
      () =>
        new Response(
          new ReadableStream({ pull: (c) => c.enqueue(new TextEncoder().encode("x".repeat(9000))) }),
          { headers: { Server: "portal/1.0" } },
        ),
    ],
  ];
  test.each(answers)("%s: the chunk is held, and it is told who answers", async (_, answer) => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    await sender.once();
    stub.script = ({ end }) => answer(end);
    sender.write(lines("a", 11, 30));
    const shipper = startShipper(sender);
    await shipper.says("held, and tried again");
    await until(
      "it was tried again",
      () => stub.asked.filter(({ method, offset }) => method === "POST" && offset > 0).length > 1,
    );
    expect(shipper.output).toMatch(/status=20[04].*portal\/1\.0/);
    stub.script = undefined;
    await arrives(stub, "a", 30);
    await shipper.stop();
    expect(stub.text()).toBe(lines("a", 1, 30));
  });

  test.each([
    ["streams that were not asked for", () => [{ stream: "A".repeat(22), offset: 5 }]],
    ["one stream twice", (stream: string) => [40_000, 0].map((offset) => ({ stream, offset, delivered: 0 }))],
  ])("an answer about %s says nothing of those that were", async (_, streamsOf) => {
    const stub = startStub();
    const sender = await createSender(stub.url, { heartbeatSeconds: 0.3 });
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await arrives(stub, "a", 10);
    const { stream } = stub.asked.find(({ method }) => method === "POST") ?? { stream: "" };
    const foreign = [{ host: sender.host, streams: streamsOf(stream) }];
    stub.script = ({ method }) => {
      const body = method === "streams" ? foreign.pop() : undefined;
      return body && Response.json(body, { headers: { "Cache-Control": "no-store" } });
    };
    await shipper.says("receiver does not take chunks");
    sender.write(lines("a", 11, 30));
    await arrives(stub, "a", 30);
    await shipper.stop();
    expect(shipper.output).not.toContain("has lost lines");
    expect(stub.text()).toBe(lines("a", 1, 30));
  });

  test("also before the first answer: nothing is taken for an empty receiver", async () => {
    const stub = startStub();
    const sender = await createSender(stub.url);
    stub.script = () => html();
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await shipper.says("held, and tried again");
    stub.script = undefined;
    await arrives(stub, "a", 10);
    await shipper.stop();
    expect(stub.text()).toBe(lines("a", 1, 10));
  });

  test("a redirect is not followed, and told", async () => {
    const stub = startStub();
    const other = startStub();
    stub.script = () => Response.redirect(`${other.url}/upload`, 307);
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    const shipper = startShipper(sender);
    await shipper.says("status=307");
    expect(await shipper.stop()).toBe(0);
    expect(other.asked).toEqual([]);
  });
});

describe("a proxy", () => {
  /** Notes what it is asked for, and passes requests of the absolute form on. */
  function startHttpProxy(): { url: string; seen: string[]; close: () => void } {
    const seen: string[] = [];
    const server = createServer((client) => {
      client.on("error", () => {});
      client.once("data", (first) => {
        const [line = "", ...rest] = first.toString("latin1").split("\r\n");
        seen.push(line);
        const url = new URL(line.split(" ")[1] ?? "http://none");
        const upstream = connect(Number(url.port), url.hostname, () => {
          upstream.write(Buffer.from([line.replace(url.origin, ""), ...rest].join("\r\n"), "latin1"));
          client.pipe(upstream);
          upstream.pipe(client);
        });
        upstream.on("error", () => client.destroy());
        client.on("close", () => upstream.destroy());
      });
    });
    server.listen(0, "127.0.0.1");
    onCleanup(() => server.close());
    const address = server.address() as { port: number };
    return { url: `http://127.0.0.1:${address.port}`, seen, close: () => server.close() };
  }

  test("of the environment is not followed", async () => {
    const stub = startStub();
    const proxy = startHttpProxy();
    const sender = await createSender(stub.url);
    sender.write(lines("a", 1, 10));
    const names = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"];
    await sender.once(
      Object.fromEntries([...names.map((name) => [name, proxy.url]), ["no_proxy", ""], ["NO_PROXY", ""]]),
    );
    expect(stub.text()).toBe(lines("a", 1, 10));
    expect(proxy.seen).toEqual([]);
  });

  test("that shipper.proxy names is used, and named in a fault", async () => {
    const stub = startStub();
    const proxy = startHttpProxy();
    const sender = await createSender(stub.url, { proxy: proxy.url });
    sender.write(lines("a", 1, 10));
    await sender.once();
    expect(stub.text()).toBe(lines("a", 1, 10));
    expect(proxy.seen.length).toBeGreaterThan(0);
    const config = JSON.parse(readFileSync(sender.config, "utf8"));
    config.shipper.proxy = `http://127.0.0.1:${await freePort()}`;
    writeFileSync(sender.config, JSON.stringify(config));
    sender.write(lines("a", 11, 20));
    const shipper = startShipper(sender);
    await shipper.says(`through ${config.shipper.proxy}`);
    expect(await shipper.stop()).toBe(0);
  });
});

describe("a link", () => {
  // Seconds of the limit, size of a chunk, bytes per 20 ms, lines: each backlog is one chunk that needs several limits.
  const slow = [
    { timeoutSeconds: 0.5, chunkBytes: 65_536, rate: 160, count: 500 },
    { timeoutSeconds: 1, chunkBytes: 1_048_576, rate: 6000, count: 12_000 },
    { timeoutSeconds: 0.3, chunkBytes: 1_048_576, rate: 60, count: 120 }, // so does the smallest chunk
  ];
  test.each(slow)(
    "on which a chunk takes longer than timeoutSeconds is slow, and empties a backlog (%p)",
    async ({ rate, count, ...config }) => {
      const stub = startStub();
      const url = await startRelay(stub.url, (from, into, isUp) => {
        if (!isUp) return void from.on("data", (data) => into.write(data));
        from.on("data", (data) => {
          from.pause();
          let at = 0;
          const timer = setInterval(() => {
            if (into.destroyed || at >= data.length) {
              clearInterval(timer);
              from.resume();
              return;
            }
            into.write(data.subarray(at, at + rate));
            at += rate;
          }, 20);
        });
      });
      const sender = await createSender(url, { ...config, compression: "none" });
      sender.write(lines("a", 1, count));
      const shipper = startShipper(sender);
      await until("all is there", () => stub.text().length >= lines("a", 1, count).length, 80_000);
      expect(stub.text()).toBe(lines("a", 1, count));
      await shipper.stop();
    },
    90_000,
  );

  test("on which several chunks meet one time limit: the next limit is twice that one", async () => {
    const server = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: () => new Promise<Response>(() => {}),
    });
    onCleanup(() => void server.stop(true));
    const config = parseConfig(
      JSON.stringify({
        shipper: {
          files: ["/log"],
          receiver: `http://127.0.0.1:${server.port}`,
          host: "10.0.0.1",
          timeoutSeconds: 1,
        },
      }),
      "shipper",
      "config.json",
    );
    const uploader = new Uploader(config, new AbortController().signal);
    const chunk = {
      host: "10.0.0.1",
      stream: "stream-0001",
      offset: 0,
      end: 2,
      encoding: "identity",
    } as const;
    const send = () => uploader.send({ ...chunk, body: Buffer.from("x\n") });
    const together = await Promise.all([send(), send(), send(), send()]);
    expect(together.map(({ kind }) => kind)).toEqual(Array(4).fill("refused"));
    const started = performance.now();
    await send();
    const took = performance.now() - started;
    expect(took).toBeGreaterThan(1900);
    expect(took).toBeLessThan(8000);
  }, 40_000);

  test("that forgets idle connections: the next line does not wait for a time limit", async () => {
    const stub = startStub();
    const url = await startRelay(stub.url, (from, into) => {
      let heard = performance.now();
      from.on("data", (data) => {
        const idle = performance.now() - heard;
        heard = performance.now();
        if (idle < 5_500) into.write(data); // else the packets go nowhere
      });
    });
    const sender = await createSender(url, { heartbeatSeconds: 3600 });
    const shipper = startShipper(sender);
    sender.write(lines("a", 1, 1));
    await arrives(stub, "a", 1);
    await Bun.sleep(6_500); // longer than the network remembers
    const started = performance.now();
    sender.write(lines("a", 2, 2));
    await arrives(stub, "a", 2);
    expect(performance.now() - started).toBeLessThan(5_000);
    await shipper.stop();
  });

  test("that repeats, delays and loses answers: each line once", async () => {
    const stub = startStub();
    let n = 0;
    const meddle = async (turn: number, commit: () => Response) => {
      const answer = turn % 5 === 4 ? undefined : commit();
      await Bun.sleep(turn % 3 === 0 ? 120 : 0);
      return turn % 7 === 0 ? new Response("lost", { status: 502 }) : (answer ?? commit());
    };
    stub.script = ({ method }, commit) => (method === "POST" ? meddle(++n, commit) : undefined);
    const sender = await createSender(stub.url, { chunkBytes: 4096, inFlight: 4 });
    for (let k = 1; k <= 10; k++) sender.write(lines("a", k * 100 + 1, k * 100 + 100));
    const shipper = startShipper(sender);
    await arrives(stub, "a", 1100);
    await shipper.stop();
    expect(stub.text()).toBe(Buffer.concat(sender.written).toString());
  });
});

describe("the receiver is set back to a backup", () => {
  test("and nginx is idle: what it lacks is sent after the heartbeat's answer, and nothing twice", async () => {
    const own = await startRealReceiver();
    const sender = await createSender(own.url, { heartbeatSeconds: 0.5 });
    sender.write(lines("a", 1, 100));
    const shipper = startShipper(sender);
    await expectArrives(own, sender, undefined, shipper);
    await own.running.stop();
    const backup = join(sender.folder, "backup");
    cpSync(own.dir, backup, { recursive: true });
    await own.start();
    sender.write(lines("a", 101, 200));
    await expectArrives(own, sender, undefined, shipper);
    await own.running.stop();
    rmSync(own.dir, { recursive: true });
    cpSync(backup, own.dir, { recursive: true });
    await own.start();
    await expectArrives(own, sender, undefined, shipper);
    await shipper.says("receiver has lost lines");
    expect(await shipper.stop()).toBe(0);
    await own.running.stop();
  });
});
