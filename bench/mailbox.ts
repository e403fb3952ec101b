/**
 * An SMTP server that keeps what it accepts, and that can be taken down and brought back on the same port.
 */
import { simpleParser } from "mailparser";
import { SMTPServer } from "smtp-server";

export interface Mail {
  /** When it was accepted, milliseconds since the epoch. */
  at: number;
  subject: string;
  text: string;
}

export interface Mailbox {
  port: number;
  mails: Mail[];
  /** Closes the port; what is in hand is dropped without an answer. */
  down(): Promise<void>;
  up(): Promise<void>;
}

/** Starts the server on `port` of 127.0.0.1. */
export async function createMailbox(port: number): Promise<Mailbox> {
  const mails: Mail[] = [];
  let server: SMTPServer | undefined;

  const up = async () => {
    if (server) return;
    const next = new SMTPServer({
      authOptional: true,
      disabledCommands: ["STARTTLS", "AUTH"],
      closeTimeout: 100,
      onData: (stream, _session, callback) => {
        simpleParser(stream).then((mail) => {
          mails.push({ at: Date.now(), subject: mail.subject ?? "", text: mail.text ?? "" });
          callback();
        }, callback);
      },
    });
    next.on("error", () => {});
    await new Promise<void>((resolve) => next.listen(port, "127.0.0.1", resolve));
    server = next;
  };
  const down = async () => {
    const current = server;
    server = undefined;
    if (current) await new Promise<void>((resolve) => current.close(() => resolve()));
  };
  await up();
  return { port, mails, up, down };
}
