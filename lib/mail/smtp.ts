/**
 * The only nodemailer: hands one mail to the SMTP server, or writes it as an `.eml` file for `file://`.
 *
 * A mail keeps its Message-ID and Date however often it is tried, so that one which was accepted, but whose
 * answer was lost, is recognised when it comes again.
 */
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { createTransport, type SendMailOptions, type Transporter } from "nodemailer";
import { type Config, readSecret } from "../config.ts";
import { makeFolder, writeDurably } from "../durable.ts";
import { isLoopback } from "../host.ts";

type Options = Config["monitor"]["mail"];

/** One mail. `id` and `references` are message ids without domain. */
export interface Mail {
  id: string;
  references: string[];
  /** Its Date, milliseconds since the epoch. */
  at: number;
  subject: string;
  html: string;
  text: string;
}

/** The server did not take a mail. `permanent`: it will not take this one, others may be. */
export class MailError extends Error {
  override name = "MailError";
  readonly permanent: boolean;
  constructor(message: string, { permanent, cause }: { permanent: boolean; cause: unknown }) {
    super(message, { cause });
    this.permanent = permanent;
  }
}

/**
 * Sends a mail and returns the recipients that were refused while others were accepted. Throws a MailError
 * when none was, a ConfigError when the password cannot be read, and gives up when `signal` is aborted.
 */
export async function sendMail(options: Options, mail: Mail, signal: AbortSignal): Promise<string[]> {
  const message = composeMessage(options, mail);
  const url = new URL(options.smtp);
  if (url.protocol === "file:") {
    await writeMessage(fileURLToPath(options.smtp), message, mail);
    return [];
  }
  const transport = connect(options, url);
  try {
    const sent = await withDeadline(transport, options, signal, transport.sendMail(message));
    return sent.rejected.map(String);
  } catch (cause) {
    const code = (cause as { responseCode?: number }).responseCode ?? 0;
    const afterLogin = ["EENVELOPE", "EMESSAGE"].includes((cause as NodeJS.ErrnoException).code ?? "");
    throw new MailError(`Cannot send "${mail.subject}" to ${url.host}`, {
      permanent: afterLogin && code >= 500,
      cause,
    });
  } finally {
    transport.close();
  }
}

/** Connects, starts TLS and logs in without sending anything. Throws what the server or the network said. */
export async function verifyMail(options: Options, signal: AbortSignal): Promise<void> {
  const url = new URL(options.smtp);
  if (url.protocol === "file:") return makeFolder(fileURLToPath(options.smtp));
  const transport = connect(options, url);
  try {
    await withDeadline(transport, options, signal, transport.verify());
  } finally {
    transport.close();
  }
}

type SmtpTransport = Transporter<{ rejected: unknown[]; accepted: unknown[] }>;

/** Without a user anyone may listen: TLS is taken where offered. A password is never sent without TLS. */
function connect(options: Options, url: URL): SmtpTransport {
  const secure = url.protocol === "smtps:";
  const host = url.hostname.replace(/^\[|\]$/g, "");
  const timeout = options.timeoutSeconds * 1000;
  const local = isLoopback(host); // its certificate is often self-signed, and nobody stands in between
  return createTransport({
    host,
    port: Number(url.port) || (secure ? 465 : url.username ? 587 : 25),
    secure,
    requireTLS: !secure && url.username !== "" && !local,
    tls: { rejectUnauthorized: !local, ...(options.ca && { ca: readSecret({ file: options.ca }) }) },
    ...(url.username && {
      auth: {
        user: decodeURIComponent(url.username),
        pass: options.password ? readSecret(options.password) : "",
      },
    }),
    connectionTimeout: timeout,
    greetingTimeout: timeout,
    socketTimeout: timeout,
    dnsTimeout: timeout,
    disableFileAccess: true,
    disableUrlAccess: true,
  }) as SmtpTransport;
}

/** A server that answers every wait with one more byte must not hold the monitor either. */
async function withDeadline<T>(
  transport: SmtpTransport,
  { timeoutSeconds }: Options,
  signal: AbortSignal,
  work: Promise<T>,
): Promise<T> {
  const deadline = AbortSignal.any([signal, AbortSignal.timeout(timeoutSeconds * 3000)]);
  const { promise: over, reject } = Promise.withResolvers<never>();
  const end = () => {
    transport.close();
    reject(signal.aborted ? signal.reason : new Error(`no end after ${timeoutSeconds * 3} s`));
  };
  deadline.addEventListener("abort", end, { once: true });
  try {
    signal.throwIfAborted();
    return await Promise.race([work, over]);
  } finally {
    deadline.removeEventListener("abort", end);
    work.catch(() => {});
  }
}

function composeMessage(options: Options, mail: Mail): SendMailOptions {
  const domain = options.from.split("@").at(-1);
  const messageId = (id: string) => `<${id}@${domain}>`;
  const last = mail.references.at(-1);
  return {
    from: options.from,
    to: options.to,
    subject: `${options.subjectPrefix} ${mail.subject}`.trim(),
    html: mail.html,
    text: mail.text,
    date: new Date(mail.at),
    messageId: messageId(mail.id),
    references: mail.references.map(messageId),
    ...(last && { inReplyTo: messageId(last) }),
    headers: { "Auto-Submitted": "auto-generated", "X-Auto-Response-Suppress": "All" }, // RFC 3834
  };
}

/** Names sort by time, and a repeat of a mail takes its own place. */
async function writeMessage(folder: string, message: SendMailOptions, mail: Mail): Promise<void> {
  const transport = createTransport({ streamTransport: true, buffer: true, newline: "windows" });
  const { message: bytes } = await transport.sendMail(message);
  await makeFolder(folder);
  const time = new Date(mail.at).toISOString().slice(0, 19).replaceAll(":", "-");
  await writeDurably(join(folder, `${time}_${mail.id}.eml`), bytes as Buffer);
}
