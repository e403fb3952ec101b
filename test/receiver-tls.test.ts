/** TLS, client certificates, and what `--check` finds on this host. */
import { describe, expect, test } from "bun:test";
import { execFileSync } from "node:child_process";
import { copyFile, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { connect } from "node:tls";
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

test("--check names every file that is missing, and exits 1", async () => {
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
  expect(code).toBe(1);
  expect(output).toContain("/dev/null/data");
  expect(output).toContain("none.pem");
  expect(output).toContain("no-token");
});

test("without its certificate it does not start: each file is named with its key, and 1", async () => {
  const folder = await tempFolder();
  const tls = { cert: join(folder, "none.pem"), key: join(folder, "none.key") };
  const receiver = { dir: join(folder, "data"), groups: [{ port: 0, senders: ["*"] }], tls };
  const file = await writeConfig(folder, { receiver });
  const { code, output } = await runScriptOnce("receiver", file, []);
  expect(code).toBe(1);
  expect(output).toContain(`${file}: receiver.tls.cert: `);
  expect(output).toContain(`${file}: receiver.tls.key: `);
});

describe.skipIf(missing({ openssl: "openssl" }))("certificates", () => {
  /** A CA, and certificates that it signs. */
  async function authority() {
    const folder = await tempFolder();
    const openssl = (...args: string[]) => execFileSync("openssl", args, { cwd: folder, stdio: "ignore" });
    const newKey = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    openssl(
      "req",
      "-x509",
      ...newKey,
      "-keyout",
      "ca.key",
      "-out",
      "ca.pem",
      "-subj",
      "/CN=ca",
      "-days",
      "2",
    );
    const sign = async (file: string, name: string, alternative: string) => {
      openssl("req", ...newKey, "-keyout", `${file}.key`, "-out", `${file}.csr`, "-subj", `/CN=${name}`);
      await writeFile(join(folder, "ext"), `subjectAltName=${alternative}\n`);
      const by = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "ext"];
      openssl("x509", "-req", "-in", `${file}.csr`, "-out", `${file}.pem`, ...by);
      return { cert: join(folder, `${file}.pem`), key: join(folder, `${file}.key`) };
    };
    return { ca: join(folder, "ca.pem"), sign };
  }

  async function setUp(tls: object) {
    const folder = await tempFolder();
    const port = await freePort();
    const section = { dir: join(folder, "data"), groups: [{ port, senders: ["*"] }], tls };
    const receiver = startScript("receiver", await writeConfig(folder, { receiver: section }));
    await receiver.says("receiver listens");
    return { url: `https://127.0.0.1:${port}`, port, receiver };
  }

  test("with tls.clientName a certificate speaks for its own names alone", async () => {
    const { ca, sign } = await authority();
    const server = await sign("server", "server", "IP:127.0.0.1");
    const { url, receiver } = await setUp({ ...server, clientCa: ca, clientName: true });
    const text = await readFile(ca, "utf8");
    const client = async (file: { cert: string; key: string }) =>
      fetchWith({ ca: text, cert: await readFile(file.cert, "utf8"), key: await readFile(file.key, "utf8") });
    const one = await client(await sign("one", "10.0.0.1", "DNS:web-1.example,IP:10.0.0.7"));
    const other = await client(await sign("two", "10.0.0.2", "DNS:web-2.example"));
    for (const host of ["10.0.0.1", "web-1.example", "10.0.0.7"])
      expect((await one(post(url, accessLine(1), { host }))).status).toBe(200);
    const refused = await other(post(url, accessLine(1), { host: "10.0.0.1", offset: 1 }));
    expect(refused.status).toBe(403);
    expect(await refused.text()).toContain("certificate");
    await expect(fetchWith({ ca: text })(post(url, accessLine(1)))).rejects.toThrow();
    await Promise.all(
      Array.from({ length: 20 }, async (_, i) => {
        const big = accessLine(i).repeat(8000);
        const answer = await one(post(url, big, { stream: `stream-of-${i}-more` }));
        expect(answer.status).toBe(200);
      }),
    );
    expect(await receiver.stop()).toBe(0);
  });

  test("a renewed one is taken up without a signal, also when its key comes later; a wrong one is told", async () => {
    const { ca, sign } = await authority();
    const old = await sign("server", "old", "IP:127.0.0.1");
    const { url, port, receiver } = await setUp(old);
    const trust = fetchWith({ ca: await readFile(ca, "utf8") });
    let offset = 0;
    const send = async () => {
      const answer = await trust(post(url, accessLine(1), { offset, headers: { Connection: "close" } }));
      expect(answer.status).toBe(200);
      offset += accessLine(1).length;
    };
    await send();
    const served = () =>
      new Promise<string>((resolve, reject) => {
        const socket = connect({ port, host: "127.0.0.1", rejectUnauthorized: false }, () => {
          resolve(String(socket.getPeerCertificate().subject?.CN));
          socket.destroy();
        });
        socket.on("error", reject);
      });
    expect(await served()).toBe("old");
    const next = await sign("next", "next", "IP:127.0.0.1");
    await copyFile(next.cert, old.cert);
    await receiver.says("renewed certificate not taken up");
    expect(await served()).toBe("old");
    await send();
    await copyFile(next.key, old.key);
    await receiver.says("certificate renewed");
    expect(await served()).toBe("next");
    await send();
    expect(await receiver.stop()).toBe(0);
  });
});
