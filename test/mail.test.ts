import { expect, test } from "bun:test";
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { simpleParser } from "mailparser";
import { SMTPServer, type SMTPServerOptions } from "smtp-server";
import { type Mail, MailError, sendMail, verifyMail } from "../lib/mail/smtp.ts";
import { errorMessage } from "../lib/service.ts";
import { onCleanup, selfSigned, tempFolder } from "./support.ts";

const SIGNAL = new AbortController().signal;

const MAIL: Mail = {
  id: "alert-1",
  references: ["alert-0"],
  at: Date.UTC(2026, 10, 22, 6, 12),
  subject: "10.10.21.181 silent since 06:07 – Ж",
  html: "<p>silent</p>",
  text: "silent",
};

/** A real SMTP server on loopback; `mails` grows with what it took. */
async function startSmtp(options: SMTPServerOptions = {}) {
  const mails: string[] = [];
  const server = new SMTPServer({
    authOptional: true,
    disabledCommands: ["STARTTLS"],
    onData(stream, _session, callback) {
      let raw = "";
      stream.on("data", (data) => {
        raw += data;
      });
      stream.on("end", () => {
        mails.push(raw);
        callback();
      });
    },
    ...options,
  });
  server.on("error", () => {});
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  onCleanup(() => new Promise<void>((resolve) => server.close(() => resolve())));
  const { port } = server.server.address() as { port: number };
  return { server, mails, port };
}

function options(smtp: string, more: object = {}) {
  return {
    smtp,
    from: "logs@example.com",
    to: ["ops@example.com"],
    subjectPrefix: "[log-rt-sync]",
    timeoutSeconds: 5,
    tls: "auto" as const,
    ...more,
  };
}

const refusal = (code: number, text: string) => Object.assign(new Error(text), { responseCode: code });

test("sendMail() sends text and HTML with the headers of an automatic mail in its thread", async () => {
  const { mails, port } = await startSmtp();
  expect(await sendMail(options(`smtp://127.0.0.1:${port}`), MAIL, { signal: SIGNAL })).toEqual([]);
  const mail = await simpleParser(mails[0] ?? "");
  expect(mail.subject).toBe("[log-rt-sync] 10.10.21.181 silent since 06:07 – Ж");
  expect(mail.messageId).toBe("<alert-1@example.com>");
  expect(mail.inReplyTo).toBe("<alert-0@example.com>");
  expect(mail.references).toBe("<alert-0@example.com>");
  expect(mail.headers.get("auto-submitted")).toBe("auto-generated");
  expect(mail.date?.getTime()).toBe(MAIL.at);
  expect(mail.text?.trim()).toBe("silent");
  expect(mail.html).toContain("<p>silent</p>");
});

test("sendMail() starts TLS and logs in, and a wrong password is an error without the password", async () => {
  const folder = await tempFolder();
  const { cert, key } = await selfSigned();
  const seen: { secure: boolean; user: string }[] = [];
  const { port } = await startSmtp({
    authOptional: false,
    disabledCommands: [],
    cert: await readFile(cert),
    key: await readFile(key),
    onAuth({ username = "", password }, session, callback) {
      seen.push({ secure: session.secure, user: username });
      callback(password === "hunter2" ? null : new Error("no"), { user: username });
    },
  });
  const smtp = `smtp://logs%40example.com@127.0.0.1:${port}`;
  const file = join(folder, "password");
  await writeFile(file, "hunter2\n");
  const right = options(smtp, { password: { file } });
  await sendMail(right, MAIL, { signal: SIGNAL });
  await verifyMail(right, SIGNAL);
  expect(seen).toEqual(new Array(2).fill({ secure: true, user: "logs@example.com" }));
  const wrong = join(folder, "wrong");
  await writeFile(wrong, "letmein");
  const error = await sendMail(options(smtp, { password: { file: wrong } }), MAIL, { signal: SIGNAL }).catch(
    (e) => e,
  );
  expect(error).toBeInstanceOf(MailError);
  expect(Bun.inspect(error)).not.toContain("letmein");
});

test("sendMail() talks TLS from the first byte on smtps://", async () => {
  const { cert, key } = await selfSigned();
  const { mails, port } = await startSmtp({
    secure: true,
    cert: await readFile(cert),
    key: await readFile(key),
  });
  await sendMail(options(`smtps://127.0.0.1:${port}`), MAIL, { signal: SIGNAL });
  expect(mails).toHaveLength(1);
});

test("sendMail() tells a mail that is refused for good from a server that takes none now", async () => {
  const later = await startSmtp({ onMailFrom: (_a, _s, done) => done(refusal(451, "greylisted")) });
  const spam = await startSmtp({
    onData: (stream, _s, done) => stream.resume().on("end", () => done(refusal(554, "spam"))),
  });
  const busy = await startSmtp({ onConnect: (_s, done) => done(refusal(421, "busy")) });
  const outcome = ({ port }: { port: number }) =>
    sendMail(options(`smtp://127.0.0.1:${port}`), MAIL, { signal: SIGNAL }).catch((error) => error.name);
  expect(await outcome(later)).toBe("MailError");
  expect(await outcome(busy)).toBe("MailError");
  expect(await outcome(spam)).toEqual([
    { address: "ops@example.com", permanent: true, reason: expect.stringContaining("spam") },
  ]);
});

test("sendMail() names each recipient that is refused or deferred, while others are accepted", async () => {
  const codes: Record<string, number> = { "gone@example.com": 550, "busy@example.com": 450 };
  const { mails, port } = await startSmtp({
    onRcptTo: ({ address }, _s, done) => done(codes[address] ? refusal(codes[address], "no") : null),
  });
  const smtp = `smtp://127.0.0.1:${port}`;
  const to = ["ops@example.com", ...Object.keys(codes)];
  const refused = await sendMail(options(smtp, { to }), MAIL, { signal: SIGNAL });
  expect(refused.map(({ address, permanent }) => [address, permanent])).toEqual([
    ["gone@example.com", true],
    ["busy@example.com", false],
  ]);
  expect(mails).toHaveLength(1);
  const rest = await sendMail(options(smtp, { to }), MAIL, { to: ["busy@example.com"], signal: SIGNAL });
  expect(rest).toMatchObject([{ address: "busy@example.com", permanent: false }]);
  expect(mails).toHaveLength(1);
});

test("sendMail() waits for the answer after DATA for longer than for others", async () => {
  const taken: number[] = [];
  const { port } = await startSmtp({
    onData: (stream, _s, done) =>
      stream.resume().on("end", () => taken.push(setTimeout(done, 1500) as never)),
  });
  await sendMail(options(`smtp://127.0.0.1:${port}`, { timeoutSeconds: 0.3 }), MAIL, { signal: SIGNAL });
  expect(taken).toHaveLength(1);
});

test("sendMail() takes TLS from a relay without a login as mail servers do, and insists where it is told to", async () => {
  const { cert, key } = await selfSigned();
  const seen: boolean[] = [];
  const server = { disabledCommands: [], cert: await readFile(cert), key: await readFile(key) };
  const { port } = await startSmtp({
    ...server,
    onMailFrom: (_a, session, done) => done(seen.push(session.secure) > 0 ? null : undefined),
  });
  const relay = `smtp://127.0.0.1:${port}`;
  await sendMail(options(relay), MAIL, { signal: SIGNAL });
  expect(seen).toEqual([true]);
  const insisting = options(relay, { tls: "required" });
  const error = await sendMail(insisting, MAIL, { signal: SIGNAL }).catch((cause) => cause);
  expect(errorMessage(error)).toContain("set monitor.mail.ca to the PEM file of its CA");
  await sendMail(options(relay, { tls: "required", ca: cert }), MAIL, { signal: SIGNAL });
  const plain = await startSmtp();
  const without = sendMail(options(`smtp://127.0.0.1:${plain.port}`, { tls: "required" }), MAIL, {
    signal: SIGNAL,
  });
  expect(await without.catch((cause) => cause)).toBeInstanceOf(MailError);
  expect(plain.mails).toEqual([]);
});

test("verifyMail() goes as far as to the server's consent for each recipient, and leaves no mail", async () => {
  const { mails, port } = await startSmtp({
    onRcptTo: ({ address }, _s, done) =>
      done(address.startsWith("gone") ? refusal(550, "no such user") : null),
  });
  const smtp = `smtp://127.0.0.1:${port}`;
  await verifyMail(options(smtp), SIGNAL);
  const refused = verifyMail(options(smtp, { to: ["ops@example.com", "gone@example.com"] }), SIGNAL);
  expect(await refused.catch((error) => error.message)).toContain("no such user");
  expect(mails).toEqual([]);
});

test("sendMail() gives up on a server that stalls in the middle", async () => {
  const { port } = await startSmtp({ onRcptTo: () => {} });
  const started = Date.now();
  const stalled = sendMail(options(`smtp://127.0.0.1:${port}`, { timeoutSeconds: 0.3 }), MAIL, {
    signal: SIGNAL,
  });
  expect(await stalled.catch((error) => error)).toBeInstanceOf(MailError);
  expect(Date.now() - started).toBeLessThan(5_000);
});

test("sendMail() fails when the server dies between DATA and its answer, and repeats with the same Message-ID", async () => {
  const taken: string[] = [];
  const { server, port } = await startSmtp({
    onData(stream, _session, done) {
      let raw = "";
      stream.on("data", (data) => {
        raw += data;
      });
      stream.on("end", () => {
        taken.push(raw);
        if (taken.length > 1) done();
        else for (const connection of server.connections) connection.close(); // the answer never comes
      });
    },
  });
  expect(
    await sendMail(options(`smtp://127.0.0.1:${port}`), MAIL, { signal: SIGNAL }).catch((e) => e),
  ).toBeInstanceOf(MailError);
  await sendMail(options(`smtp://127.0.0.1:${port}`), MAIL, { signal: SIGNAL });
  const ids = await Promise.all(taken.map(async (raw) => (await simpleParser(raw)).messageId));
  expect(ids).toEqual(["<alert-1@example.com>", "<alert-1@example.com>"]);
});

test("sendMail() ends at once when the signal is aborted", async () => {
  const { port } = await startSmtp({ onRcptTo: () => {} });
  const abort = new AbortController();
  const sending = sendMail(options(`smtp://127.0.0.1:${port}`), MAIL, { signal: abort.signal }).catch(
    (error) => error,
  );
  setTimeout(() => abort.abort(new Error("SIGTERM")), 50);
  expect((await sending).cause.message).toBe("SIGTERM");
});

test("sendMail() writes an .eml for file://, once however often it is repeated", async () => {
  const folder = join(await tempFolder(), "mails");
  await sendMail(options(`file://${folder}`), MAIL, { signal: SIGNAL });
  await sendMail(options(`file://${folder}`), MAIL, { signal: SIGNAL });
  expect(await readdir(folder)).toEqual(["2026-11-22T06-12-00_alert-1.eml"]);
  const mail = await simpleParser(await readFile(join(folder, "2026-11-22T06-12-00_alert-1.eml")));
  expect(mail.subject).toContain("10.10.21.181 silent");
});
