/** The client that shipper and monitor use: what the environment says does not send a token elsewhere. */
import { expect, test } from "bun:test";
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { missing, onCleanup, ROOT, selfSigned, start, tempFolder } from "./support.ts";

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
