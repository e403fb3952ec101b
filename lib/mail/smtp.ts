/**
 * The only nodemailer: hands one mail to the SMTP server, or writes it as an `.eml` file for `file://`.
 *
 * A mail keeps its Message-ID and Date however often it is tried, so that one which was accepted, but whose answer was
 * lost, is recognised when it comes again. Before DATA a server has `timeoutSeconds` for each of a few answers; the one
 * after DATA may take ten minutes (RFC 5321 section 4.5.3.2), for a mail that is given up there comes twice.
 */
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { fileURLToPath } from "node:url";
import { createTransport, type SendMailOptions } from "nodemailer";
import SMTPConnection from "nodemailer/lib/smtp-connection";
import { type Config, readSecret } from "../config.ts";
import { makeFolder, writeDurably } from "../durable.ts";
import { isLoopback } from "../host.ts";
import { errorMessage } from "../service.ts";
import type { MailText } from "./message.ts";

type Options = Config["monitor"]["mail"];

const DATA_MS = 600_000;

/** One mail. `id` and `references` are message ids without domain. */
export interface Mail extends MailText {
  id: string;
  references: string[];
  /** Its Date, milliseconds since the epoch. */
  at: number;
}

/** Who did not take a mail that the server was ready to take. `permanent`: it says that it never will. */
export interface RefusedRecipient {
  address: string;
  permanent: boolean;
  reason: string;
}

/** The server takes no mail now: all may be tried again. */
export class MailError extends Error {
  override name = "MailError";
}

/**
 * Hands a mail to the server for these recipients, and gives those that it refused. Throws a MailError when the server
 * takes none now, a ConfigError when the password can't be read, and gives up when `signal` is aborted.
 */
export async function sendMail(
  options: Options,
  mail: Mail,
  { to = options.to, signal }: { to?: string[]; signal: AbortSignal },
): Promise<RefusedRecipient[]> {
  const bytes = await composeMessage(options, mail);
  const url = new URL(options.smtp);
  if (url.protocol === "file:") {
    await writeMessage(fileURLToPath(options.smtp), bytes, mail);
    return [];
  }
  const wrap = (cause: unknown) => new MailError(`Cannot send "${mail.subject}" to ${url.host}`, { cause });
  const session = await openSession(options, url, signal).catch((cause) => {
    throw wrap(cause);
  });
  try {
    const message = new PassThrough();
    message.end(bytes);
    return (await session.send({ from: options.from, to }, message)).map(toRefused);
  } catch (cause) {
    const refused = whoIsRefused(cause as SmtpError, to);
    if (refused.length === 0) throw wrap(cause);
    return refused;
  } finally {
    session.close();
  }
}

/**
 * Goes as far as to the server's consent to take a mail for all recipients, and leaves without one. Throws what the
 * server or the network said.
 */
export async function verifyMail(options: Options, signal: AbortSignal): Promise<void> {
  const url = new URL(options.smtp);
  if (url.protocol === "file:") return makeFolder(fileURLToPath(options.smtp));
  for (const address of options.to) {
    const session = await openSession(options, url, signal);
    try {
      await session.send({ from: options.from, to: [address] }, undefined);
    } finally {
      session.close();
    }
  }
}

interface SmtpError extends Error {
  code?: string;
  responseCode?: number;
  recipient?: string;
  rejectedErrors?: SmtpError[];
}

function toRefused({ recipient = "", responseCode = 0, message }: SmtpError): RefusedRecipient {
  return { address: recipient, permanent: responseCode >= 500, reason: message };
}

/** Whom an error concerns: recipients, all of them when the mail is refused for good, or nobody in particular. */
function whoIsRefused(error: SmtpError, to: string[]): RefusedRecipient[] {
  if (error.rejectedErrors?.length) return error.rejectedErrors.map(toRefused);
  const ofThisMail = ["EENVELOPE", "EMESSAGE"].includes(error.code ?? "") && (error.responseCode ?? 0) >= 500;
  return ofThisMail ? to.map((address) => ({ address, permanent: true, reason: error.message })) : [];
}

function explainTrust(error: SmtpError): Error {
  const text = errorMessage(error);
  if (!/certificate|self.signed|altname|issuer/i.test(`${text} ${error.code}`)) return error;
  return new Error(
    "its certificate is not trusted: set monitor.mail.ca to the PEM file of its CA, or of the certificate itself",
    { cause: error },
  );
}

/** Connects, starts TLS and logs in, with an end in sight at every moment. */
async function openSession(options: Options, url: URL, signal: AbortSignal) {
  signal.throwIfAborted();
  const connection = new SMTPConnection(connectionOptions(options, url));
  const { promise: broken, reject } = Promise.withResolvers<never>();
  broken.catch(() => {});
  let timer: NodeJS.Timeout | undefined;
  const within = (ms: number) => {
    clearTimeout(timer);
    timer = setTimeout(() => reject(new Error(`no answer after ${ms / 1000} s`)), ms);
  };
  const abort = () => reject(signal.reason);
  signal.addEventListener("abort", abort, { once: true });
  const close = () => {
    clearTimeout(timer);
    signal.removeEventListener("abort", abort);
    connection.close();
  };
  connection.on("error", reject);
  connection.once("end", () => reject(new Error("the server closed the connection")));
  const beforeData = options.timeoutSeconds * 3000;
  try {
    within(beforeData); // one that answers every wait with one more byte must not hold the monitor either
    await Promise.race([broken, new Promise<void>((resolve) => connection.connect(() => resolve()))]);
    if (url.username) await Promise.race([broken, logIn(connection, options, url)]);
  } catch (error) {
    close();
    throw explainTrust(error as SmtpError);
  }
  return {
    /** Without a message it leaves after the server's consent. Gives the faults of recipients that were refused. */
    send(envelope: { from: string; to: string[] }, message: PassThrough | undefined): Promise<SmtpError[]> {
      within(beforeData);
      const sent = new Promise<SmtpError[]>((resolve, refuse) => {
        const body = message ?? new PassThrough();
        const pipe = body.pipe.bind(body);
        body.pipe = ((target: NodeJS.WritableStream) => {
          within(DATA_MS); // the server is ready for the mail
          if (message) return pipe(target);
          resolve([]);
          return target;
        }) as typeof body.pipe;
        connection.send(envelope, body, (error, info) => {
          if (error) refuse(error);
          else resolve((info.rejectedErrors ?? []) as SmtpError[]);
        });
      });
      sent.catch(() => {});
      return Promise.race([broken, sent]);
    },
    close,
  };
}

function logIn(connection: SMTPConnection, { password }: Options, url: URL): Promise<void> {
  const credentials = { user: decodeURIComponent(url.username), pass: password ? readSecret(password) : "" };
  return new Promise((resolve, reject) => {
    connection.login({ credentials } as never, (error) => (error ? reject(error) : resolve()));
  });
}

/**
 * As mail servers do it: without a login TLS is taken where it is offered, from whomever; a password never goes to
 * somebody who is not known. On loopback nobody stands in between. `required` and `ca` insist.
 */
function connectionOptions(options: Options, url: URL): SMTPConnection.Options {
  const secure = url.protocol === "smtps:";
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const timeout = options.timeoutSeconds * 1000;
  const insists = options.tls === "required";
  const matters = !isLoopback(host) && (secure || url.username !== "");
  return {
    host,
    port: Number(url.port) || (secure ? 465 : url.username ? 587 : 25),
    secure,
    requireTLS: !secure && (insists || matters),
    tls: {
      rejectUnauthorized: insists || matters || options.ca !== undefined,
      ...(options.ca && { ca: readSecret({ file: options.ca }) }),
    },
    connectionTimeout: timeout,
    greetingTimeout: timeout,
    socketTimeout: DATA_MS,
    dnsTimeout: timeout,
  };
}

async function composeMessage(options: Options, mail: Mail): Promise<Buffer> {
  const domain = options.from.split("@").at(-1);
  const messageId = (id: string) => `<${id}@${domain}>`;
  const last = mail.references.at(-1);
  const message: SendMailOptions = {
    from: options.from,
    to: options.to,
    subject: `${options.subjectPrefix} ${mail.subject}`.trim(),
    html: mail.html,
    text: mail.text,
    date: new Date(mail.at),
    messageId: messageId(mail.id),
    references: mail.references.map(messageId),
    ...(last && { inReplyTo: messageId(last) }),
    ...(mail.attachment && { attachments: [{ ...mail.attachment, contentType: "text/csv; charset=utf-8" }] }),
    headers: { "Auto-Submitted": "auto-generated", "X-Auto-Response-Suppress": "All" }, // RFC 3834
    disableFileAccess: true,
    disableUrlAccess: true,
  };
  const transport = createTransport({ streamTransport: true, buffer: true, newline: "windows" });
  return (await transport.sendMail(message)).message as Buffer;
}

/** Names sort by time, and a repeat of a mail takes its own place. */
async function writeMessage(folder: string, bytes: Buffer, mail: Mail): Promise<void> {
  await makeFolder(folder);
  const time = new Date(mail.at).toISOString().slice(0, 19).replaceAll(":", "-");
  await writeDurably(join(folder, `${time}_${mail.id}.eml`), bytes);
}
