/** The client that shipper and monitor use: what the environment says does not send a token elsewhere. */
import { expect, test } from "bun:test";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { denoPath, missing, onCleanup, ROOT, selfSigned, start, tempFolder } from "./support.ts";

/** Runs a text as a program beside the project's own files. */
async function run(code: string, env: Record<string, string>): Promise<string> {
  const file = join(await tempFolder(), "try.ts");
  await writeFile(file, code);
  const program = start(process.execPath, ["run", file], { env });
  await program.ended;
  return program.output;
}

test("fetchWith() follows neither proxies of the environment nor redirects, and goes by a proxy that is configured", async () => {
  const server = Bun.serve({
    port: 0,
    hostname: "127.0.0.1",
    fetch: (request) =>
      new URL(request.url).pathname === "/away"
        ? Response.redirect("http://127.0.0.1:9/", 302)
        : new Response(`for ${request.url}`),
  });
  onCleanup(() => server.stop(true));
  const url = `http://127.0.0.1:${server.port}`;
  const output = await run(
    `import { fetchWith } from ${JSON.stringify(join(ROOT, "lib/runtime.ts"))};
    console.log(await (await fetchWith({})("${url}/")).text());
    console.log((await fetchWith({})("${url}/away")).status);
    console.log(await (await fetchWith({ proxy: "${url}" })("http://elsewhere.example/x")).text());`,
    { HTTP_PROXY: "http://127.0.0.1:9", http_proxy: "http://127.0.0.1:9" },
  );
  expect(output).toBe(`for ${url}/\n302\nfor http://elsewhere.example/x\n`);
});

test.each([
  ["Bun", () => [process.execPath, "run"]],
  ["Deno", () => [denoPath(), "run", "--allow-all", "--no-lock"]], // unpacked by its own test alone
])(
  "a body is copied as fetchWith()() is called, by %s: the shipper reads into its memory again",
  async (_name, runtime) => {
    const [command = "", ...args] = runtime();
    const body = (size: number) => Buffer.from(Array.from({ length: size }, (_, i) => (i * 7 + size) & 0xff));
    const sizes = [1, 5000, 65_536, 1_048_576, 4_000_000];
    const isWhole = new Map<string, boolean>();
    const server = Bun.serve({
      port: 0,
      hostname: "127.0.0.1",
      fetch: async (request) => {
        const got = await request.bytes();
        isWhole.set(new URL(request.url).pathname, Buffer.compare(got, body(got.length)) === 0);
        return new Response("taken");
      },
    });
    onCleanup(() => server.stop(true));
    const file = join(await tempFolder(), "try.ts");
    await writeFile(
      file,
      `import { fetchWith } from ${JSON.stringify(join(ROOT, "lib/runtime.ts"))};
    const memory = new Uint8Array(4_000_100);
    for (const size of ${JSON.stringify(sizes)}) {
      for (let i = 0; i < size; i++) memory[50 + i] = i * 7 + size;
      const answer = fetchWith({})("http://127.0.0.1:${server.port}/" + size, {
        method: "POST",
        body: memory.subarray(50, 50 + size),
      });
      memory.fill(0xee);
      console.log(await (await answer).text());
    }`,
    );
    const program = start(command, [...args, file], { cwd: ROOT });
    expect(await program.ended, program.output).toBe(0);
    expect(Object.fromEntries(isWhole)).toEqual(Object.fromEntries(sizes.map((size) => [`/${size}`, true])));
  },
);

test.skipIf(missing({ openssl: "openssl" }))(
  "fetchWith() checks certificates whatever the environment says",
  async () => {
    const { cert, key } = await selfSigned();
    const tls = { cert: Bun.file(cert), key: Bun.file(key) };
    const server = Bun.serve({ port: 0, hostname: "127.0.0.1", tls, fetch: () => new Response("seen") });
    onCleanup(() => server.stop(true));
    const output = await run(
      `import { fetchWith } from ${JSON.stringify(join(ROOT, "lib/runtime.ts"))};
      await fetchWith({})("https://127.0.0.1:${server.port}/").then(() => console.log("let in"), (error) => console.log(error.code));`,
      { NODE_TLS_REJECT_UNAUTHORIZED: "0" },
    );
    expect(output).toContain("SELF_SIGNED");
  },
);
