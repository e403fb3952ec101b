/** TLS, client certificates, and what `--check` finds on this host. */
import { expect, test } from "bun:test";
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { fetchWith } from "../lib/runtime.ts";
import { post } from "./sending.ts";
import {
  accessLine,
  freePort,
  missing,
  runScriptOnce,
  selfSigned,
  startScript,
  tempFolder,
  writeConfig,
} from "./support.ts";

test.skipIf(missing({ openssl: "openssl" }))(
  "with tls.clientCa only a client that shows a certificate comes in",
  async () => {
    const { cert, key } = await selfSigned();
    const folder = await tempFolder();
    const port = await freePort();
    const section = {
      dir: join(folder, "data"),
      groups: [{ port, senders: ["*"] }],
      tls: { cert, key, clientCa: cert },
    };
    const receiver = startScript("receiver", await writeConfig(folder, { receiver: section }));
    await receiver.says("receiver listens");
    const ca = await readFile(cert, "utf8");
    const url = `https://127.0.0.1:${port}`;
    await expect(fetchWith({ ca })(post(url, accessLine(1)))).rejects.toThrow();
    await expect(fetch(post(url, accessLine(1)))).rejects.toThrow();
    const known = fetchWith({ ca, cert: ca, key: await readFile(key, "utf8") });
    expect((await known(post(url, accessLine(1)))).status).toBe(200);
    expect(await receiver.stop()).toBe(0);
  },
);

test("--check names every file that is missing, and exits 78", async () => {
  const folder = await tempFolder();
  const receiver = {
    dir: "/dev/null/data",
    groups: [{ port: 5001, senders: ["*"] }],
    tls: { cert: join(folder, "none.pem"), key: join(folder, "none.key") },
    tokens: { "*": { file: join(folder, "no-token") } },
  };
  const { code, output } = await runScriptOnce("receiver", await writeConfig(folder, { receiver }), [
    "--check",
  ]);
  expect(code).toBe(78);
  expect(output).toContain("/dev/null/data");
  expect(output).toContain("none.pem");
  expect(output).toContain("no-token");
});

test("without its certificate it does not start: each file is named with its key, and 78", async () => {
  const folder = await tempFolder();
  const tls = { cert: join(folder, "none.pem"), key: join(folder, "none.key") };
  const receiver = { dir: join(folder, "data"), groups: [{ port: 0, senders: ["*"] }], tls };
  const file = await writeConfig(folder, { receiver });
  const { code, output } = await runScriptOnce("receiver", file, []);
  expect(code).toBe(78);
  expect(output).toContain(`${file}: receiver.tls.cert: `);
  expect(output).toContain(`${file}: receiver.tls.key: `);
});
