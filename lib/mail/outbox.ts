/**
 * The outbox: what the monitor remembers, what it has to tell, and who has got it.
 *
 * The state is one file, changed under a lock that is held for a moment. When it can't be written, it is kept in memory
 * and among the temp files: an alert that comes twice is better than none. A notification leaves the queue when every
 * recipient and the webhook have it, or have refused it for good, which is told.
 */
import { createHash } from "node:crypto";
import { lstatSync } from "node:fs";
import { rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { z } from "zod";
import { type Config, readSecret } from "../config.ts";
import { failpoint, LockedError, makeFolder, waitForLock } from "../durable.ts";
import { fetchWith, type Lock } from "../runtime.ts";
import { DAY, errorMessage, HOUR, type Log, MINUTE, type PassContext } from "../service.ts";
import { monitorNewsSchema } from "../signs.ts";
import { readState, writeState } from "../state.ts";
import { count, type Snapshot } from "../status.ts";
import { type Change, isGood, type MailText, renderAlert, renderSummary, STATUSES } from "./message.ts";
import { type RefusedRecipient, sendMail } from "./smtp.ts";
import { summariseHour, type Totals } from "./summary.ts";

type Options = Config["monitor"];
/** Waits between the tries of a mail that a recipient's server refuses for good, and of one that it defers. */
const REFUSED_WAITS = [5, 10, 15, 30].map((minutes) => minutes * MINUTE);
const DEFERRED_WAITS = { first: MINUTE, later: 10 * MINUTE, many: 10 };
/** A mail that a recipient's server defers for longer is given up, as mail servers do (RFC 5321 section 4.5.4.1). */
const DEFERRED_PATIENCE_MS = 5 * DAY;
/** Tries of a post that the chat refuses for good; one that does not answer is tried by every run for so long. */
const POST_TRIES = 3;
const WEBHOOK_PATIENCE_MS = HOUR;
const HTTP_TIMEOUT_MS = 5_000;
const ANSWER_BYTES = 4096;
const LOCK_PATIENCE_MS = 10_000;
const MOST_NAMES = 1000;
const MOST_UNDELIVERABLE = 20;
/** A post is no longer than a chat takes: characters of its text, changes one by one. */
const POST_TEXT = 12_000;
const POST_CHANGES = 100;

/** What a run is given. `uptime` is that of this machine in milliseconds. */
export interface MonitorContext extends PassContext<"monitor"> {
  uptime?: () => number;
  secondLook?: () => Promise<void>;
}

/** What only this program writes there is believed, once it is an object. */
const anObject = <T>() => z.custom<T>((value) => typeof value === "object" && value !== null);
const statusSchema = z.enum(STATUSES);
const recipientSchema = z.object({ address: z.string(), tries: z.number(), nextAt: z.number() });
const notificationBase = {
  id: z.string(),
  at: z.number(),
  references: z.array(z.string()),
  /** Who has not got it yet. */
  recipients: z.array(recipientSchema),
  /** That it is still to be posted. */
  post: z.object({ tries: z.number() }).optional(),
};
const notificationSchema = z.discriminatedUnion("kind", [
  z.object({
    ...notificationBase,
    kind: z.literal("alert"),
    changes: z.array(anObject<Change>()),
    counts: z.partialRecord(statusSchema, z.number()),
    standing: z.array(z.string()),
  }),
  z.object({
    ...notificationBase,
    kind: z.literal("summary"),
    hourEnd: z.number(),
    from: z.number(),
    to: z.number(),
    zone: z.number(),
    since: z.record(z.string(), anObject<Partial<Totals>>()),
  }),
]);
/** Something to be told, until everyone has it. An alert says what changed, a summary is made from its span. */
export type Notification = z.infer<typeof notificationSchema>;

const incidentSchema = z.object({
  title: z.string(),
  text: z.string(),
  status: statusSchema,
  /** Since when it is so, 0 when it was never otherwise; since when it is not ok. */
  since: z.number(),
  outage: z.number().optional(),
  told: statusSchema,
  toldAt: z.number(),
  /** The id of the notification that opened the incident. */
  thread: z.string().optional(),
  changes: z.array(z.number()),
  flapping: z.boolean().optional(),
  next: z.array(z.string()).optional(),
});
export type Incident = z.infer<typeof incidentSchema>;

const stateSchema = monitorNewsSchema.extend({
  version: z.literal(2),
  /** Tells this monitor's message ids from another's. */
  instance: z.string(),
  /** When it began to watch; clock and uptime of the last run; since when senders can be heard by a clock that was set. */
  begunAt: z.number(),
  uptime: z.number(),
  clockSetAt: z.number(),
  incidents: z.record(z.string(), incidentSchema),
  /** Bytes lost that were told, by host, and when. */
  lost: z.record(z.string(), z.object({ lost: z.number(), gone: z.number(), toldAt: z.number() })),
  /** Bytes shipped again, by host: those that were told, and those that were seen last. */
  again: z
    .record(z.string(), z.object({ told: z.number(), seen: z.number(), files: z.number().default(0) }))
    .default({}),
  future: z.record(z.string(), z.object({ value: z.number(), at: z.number() })),
  /** Of receivers that write no state file here: since when one does not answer, and when one was back. */
  unnamed: anObject<{ wellUntil?: number; startedAt?: number }>(),
  /** End of the last hour that was queued, up to when batches are in an account, and the totals then. */
  summarisedUntil: z.number(),
  accountedUntil: z.number(),
  totals: z.record(z.string(), anObject<Partial<Totals>>()),
  missingTold: z.array(z.string()),
  queue: z.array(notificationSchema),
});
export type MonitorState = z.infer<typeof stateSchema>;

function firstState(now: number): MonitorState {
  return {
    version: 2,
    instance: crypto.randomUUID().slice(0, 8),
    begunAt: now,
    at: 0,
    uptime: 0,
    clockSetAt: 0,
    incidents: {},
    lost: {},
    again: {},
    future: {},
    unnamed: {},
    summarisedUntil: 0,
    accountedUntil: 0,
    totals: {},
    missingTold: [],
    queue: [],
    mutes: {},
    undeliverable: [],
  };
}

/** States that could not be saved, by path: a run of the same process goes on from them. */
const unsavedStates = new Map<string, MonitorState>();

/** The state file. When it can't be written, what was told is kept in memory and among the temp files instead. */
export class StateStore {
  readonly context: MonitorContext;
  readonly #path: string;
  readonly #spare: string;
  unsaved: string | undefined;

  constructor(context: MonitorContext) {
    this.context = context;
    this.#path = context.config.stateFile;
    const name = createHash("sha256").update(this.#path).digest("hex").slice(0, 12);
    this.#spare = join(tmpdir(), `log-rt-sync-monitor-${process.getuid?.() ?? 0}-${name}.json`);
  }

  /** The state, or that of a first run; `fault` says why a file that is there could not be used. */
  async read(): Promise<{ state: MonitorState; fault?: string }> {
    const kept = unsavedStates.get(this.#path) ?? (await this.#readSpare());
    const now = this.context.now();
    try {
      const found = await readState(
        this.#path,
        z.union([stateSchema, z.looseObject({ version: z.literal(1) })]),
        2,
      );
      if (found.state === "damaged" || found.state === "newer") throw new Error(found.reason);
      const value = found.state === "ok" ? found.value : undefined;
      const state = value?.version === 1 ? upgrade(value, now) : (value as MonitorState | undefined);
      return { state: heal(kept && kept.at >= (state?.at ?? 0) ? kept : (state ?? firstState(now)), now) };
    } catch (error) {
      return kept ? { state: heal(kept, now) } : { state: firstState(now), fault: errorMessage(error) };
    }
  }

  /** Reads the state, lets `work` change it and saves it, under a lock that nobody holds for long. */
  async change(work: (state: MonitorState, damaged: string | undefined) => void): Promise<MonitorState> {
    const lock = await this.#lock();
    try {
      const { state, fault } = await this.read();
      work(state, fault);
      await this.#save(state);
      return state;
    } finally {
      lock?.release();
    }
  }

  async #save(state: MonitorState): Promise<void> {
    try {
      await writeState(this.#path, state);
      unsavedStates.delete(this.#path);
      this.unsaved = undefined;
      await rm(this.#spare, { force: true });
    } catch (error) {
      this.unsaved = errorMessage(error);
      unsavedStates.set(this.#path, state);
      this.context.log.error("state not saved: alerts go out all the same", { error: this.unsaved });
      await writeState(this.#spare, state, 0o600).catch(() => {});
    }
  }

  /** What a run before could not save; only of a file that is ours. */
  async #readSpare(): Promise<MonitorState | undefined> {
    const info = lstatSync(this.#spare, { throwIfNoEntry: false });
    if (!info?.isFile() || info.uid !== (process.getuid?.() ?? info.uid)) return undefined;
    const found = await readState(this.#spare, stateSchema, 2).catch(() => undefined);
    return found?.state === "ok" ? found.value : undefined;
  }

  /** Undefined where no lock can be made: an alert that comes twice is better than none. */
  async #lock(): Promise<Lock | undefined> {
    try {
      await makeFolder(dirname(this.#path));
      return await waitForLock(`${this.#path}.lock`, LOCK_PATIENCE_MS);
    } catch (error) {
      if (error instanceof LockedError) throw error;
      return undefined;
    }
  }
}

/** What a monitor of version 1.0 remembered. */
function upgrade(old: Record<string, unknown>, now: number): MonitorState {
  const keep = { instance: true, at: true, uptime: true, incidents: true, summarisedUntil: true } as const;
  const kept = stateSchema.pick(keep).strip().safeParse(old);
  return { ...firstState(now), ...(kept.success && kept.data) };
}

/** A time of a clock that was ahead counts as now. */
function heal(state: MonitorState, now: number): MonitorState {
  const cap = (at: number) => Math.min(at, now);
  for (const incident of Object.values(state.incidents)) {
    Object.assign(incident, {
      since: cap(incident.since),
      toldAt: cap(incident.toldAt),
      changes: incident.changes.map(cap),
    });
    if (incident.outage !== undefined) incident.outage = cap(incident.outage);
  }
  for (const lost of Object.values(state.lost)) lost.toldAt = cap(lost.toldAt);
  for (const { recipients } of state.queue)
    for (const recipient of recipients) recipient.nextAt = Math.min(recipient.nextAt, now + HOUR);
  state.clockSetAt = cap(state.clockSetAt);
  state.begunAt = cap(state.begunAt);
  if (state.summarisedUntil > now + HOUR) Object.assign(state, { summarisedUntil: 0, accountedUntil: 0 });
  for (const [host, window] of Object.entries(state.mutes)) if (window.until <= now) delete state.mutes[host];
  state.undeliverable = state.undeliverable.filter(({ at }) => now - at < 7 * DAY);
  return state;
}

// ---- sending

/** Sends the queue in order. A server that is down ends the attempt; what it refuses holds up no other mail. */
export async function deliver(store: StateStore, snapshot: Snapshot): Promise<boolean> {
  const { config, log, signal, now } = store.context;
  const down = { mail: false, hook: config.webhook === undefined };
  for (const { id } of (await store.read()).state.queue) {
    const { state } = await store.read();
    const notification = state.queue.find((one) => one.id === id);
    if (signal.aborted || !notification) continue;
    const due = down.mail ? [] : notification.recipients.filter(({ nextAt }) => nextAt <= now());
    const isPostDue = notification.post !== undefined && !down.hook;
    if (due.length === 0 && !isPostDue) continue;
    const rendered = await render(notification, state, config, snapshot).catch((error) =>
      log.error("cannot make the account of an hour", { id, error: errorMessage(error) }),
    );
    if (!rendered) continue; // it stays in the queue, and holds up no other
    if (due.length > 0) down.mail = !(await mailNotification(store, notification, { ...rendered, due }));
    if (isPostDue) down.hook = !(await postNotification(store, notification, rendered.text));
  }
  await store.change((state) => giveUpPosts(state, store.context, down.hook));
  return (await store.read()).state.queue.every(({ recipients }) => recipients.length === 0);
}

interface Rendered {
  text: MailText;
  missing: string[];
}

async function render(
  notification: Notification,
  { begunAt, missingTold, mutes }: MonitorState,
  config: Options,
  { problems, digest }: Snapshot,
): Promise<Rendered> {
  const { page } = config;
  if (notification.kind === "alert") return { text: renderAlert(notification, { page }), missing: [] };
  const summary = await summariseHour(config, { ...notification, missingFrom: begunAt, missingTold });
  const titles = problems.map(({ title }) => title);
  const next = problems.flatMap((problem) => problem.next?.[0] ?? []);
  const around = { page, zone: notification.zone, problems: titles, next: [...new Set(next)], mutes, digest };
  const missing = [...summary.missing, ...summary.vanished.map(({ name }) => name)];
  return { text: renderSummary(summary, around), missing };
}

/** Notes who has got the mail. Gives false when the server takes none now. */
async function mailNotification(
  store: StateStore,
  { id, at, references }: Notification,
  { text, missing, due }: Rendered & { due: Notification["recipients"] },
): Promise<boolean> {
  const { config, log, signal, now } = store.context;
  const to = due.map(({ address }) => address);
  try {
    const refused = await sendMail(config.mail, { id, at, references, ...text }, { to, signal });
    failpoint("monitor:accepted");
    const accepted = to.length - refused.length;
    if (accepted > 0) log.info("mail sent", { id, subject: text.subject, recipients: accepted });
    await store.change((state) => {
      noteMailed(state, id, to, refused, { subject: text.subject, log, now: now() });
      if (accepted > 0) state.missingTold = [...state.missingTold, ...missing].slice(-MOST_NAMES);
    });
    return true;
  } catch (error) {
    log.error("mail not accepted", { id, error: errorMessage(error) });
    return false;
  }
}

function noteMailed(
  state: MonitorState,
  id: string,
  to: string[],
  refused: RefusedRecipient[],
  { subject, log, now }: { subject: string; log: Log; now: number },
): void {
  const notification = state.queue.find((one) => one.id === id);
  if (!notification) return;
  for (const address of to) {
    const refusal = refused.find((one) => one.address === address);
    const recipient = notification.recipients.find((one) => one.address === address);
    if (!recipient) continue;
    const isOld = now - notification.at > DEFERRED_PATIENCE_MS;
    const wait = refusal && !isOld ? waitAfter(refusal, recipient.tries) : undefined;
    if (wait !== undefined) {
      Object.assign(recipient, { tries: recipient.tries + 1, nextAt: now + wait });
      log.warn("recipient refused", {
        id,
        recipient: address,
        reason: refusal?.reason,
        tries: recipient.tries,
      });
      continue;
    }
    notification.recipients = notification.recipients.filter((one) => one !== recipient);
    if (!refusal) continue;
    log.error("mail refused for good", { id, recipient: address, reason: refusal.reason });
    noteUndeliverable(state, { to: address, subject, reason: refusal.reason, at: now });
  }
  dropDone(state);
}

/** How long until a recipient is tried again; undefined when it was refused for good for the fifth time. */
function waitAfter({ permanent }: RefusedRecipient, tries: number): number | undefined {
  if (permanent) return REFUSED_WAITS[tries];
  return tries < DEFERRED_WAITS.many ? DEFERRED_WAITS.first : DEFERRED_WAITS.later;
}

function noteUndeliverable(state: MonitorState, entry: MonitorState["undeliverable"][number]): void {
  state.undeliverable = [...state.undeliverable, entry].slice(-MOST_UNDELIVERABLE);
}

function dropDone(state: MonitorState): void {
  state.queue = state.queue.filter(({ recipients, post }) => recipients.length > 0 || post !== undefined);
}

/** Posts a notification. Gives false when later ones have to wait. */
async function postNotification(
  store: StateStore,
  notification: Notification,
  { subject, text }: MailText,
): Promise<boolean> {
  const { config, log, signal, now } = store.context;
  const { id } = notification;
  const payload = payloadOf(notification, subject, text);
  const answer = await clientOf(config)(config.webhook ?? "", signal, payload).catch((error) => {
    log.warn("webhook not reached; the next run tries again", { id, error: withoutUrl(error) });
    return undefined;
  });
  if (!answer) return false;
  const isRefusal = answer.status >= 400 && answer.status < 500 && ![408, 429].includes(answer.status);
  if (!answer.ok) log.warn("webhook refuses", { id, status: answer.status });
  if (!answer.ok && !isRefusal) return false;
  await store.change((state) => {
    const queued = state.queue.find((one) => one.id === id);
    if (!queued?.post) return;
    const tries = queued.post.tries + 1;
    if (!answer.ok && tries < POST_TRIES) queued.post = { tries };
    else delete queued.post;
    if (!answer.ok && tries === POST_TRIES) {
      log.error("post refused for good", { id, status: answer.status });
      const reason = `it answers ${answer.status}`;
      noteUndeliverable(state, { to: "the webhook", subject, reason, at: now() });
    }
    dropDone(state);
  });
  return answer.ok || (notification.post?.tries ?? 0) + 1 >= POST_TRIES;
}

/** What chat tools read: `text`, and per change whether it fires or is resolved. */
function payloadOf(notification: Notification, subject: string, text: string): object {
  const { id, at, kind } = notification;
  const changes = notification.kind === "alert" ? notification.changes : [];
  const statusOf = (change: Change) => (isGood(change) ? "resolved" : "firing");
  return {
    text: `${subject}\n${text}`.slice(0, POST_TEXT),
    subject,
    id,
    at,
    kind,
    status: changes.some((change) => !isGood(change)) ? "firing" : "resolved",
    ...(changes.length > POST_CHANGES && { moreChanges: changes.length - POST_CHANGES }),
    changes: changes.slice(0, POST_CHANGES).map((change) => ({
      title: change.title,
      text: change.text,
      kind: change.kind,
      state: change.status,
      status: statusOf(change),
      since: change.since,
    })),
  };
}

/** Posts that nobody wants any more, or that waited too long for a chat that does not answer. */
function giveUpPosts(state: MonitorState, { config, log, now }: MonitorContext, isDown: boolean): void {
  const isOld = ({ at }: Notification) => isDown && now() - at > WEBHOOK_PATIENCE_MS;
  const old = config.webhook ? state.queue.filter((one) => one.post && isOld(one)) : [];
  for (const one of state.queue) if (!config.webhook || isOld(one)) delete one.post;
  dropDone(state);
  if (old.length === 0) return;
  log.error("posts given up: the webhook does not answer", { posts: old.length });
  const subject = count(old.length, "post");
  const reason = "it did not answer for an hour";
  noteUndeliverable(state, { to: "the webhook", subject, reason, at: now() });
}

/** A webhook's address may hold a secret. */
export function withoutUrl(error: unknown): string {
  return errorMessage(error).replace(/https?:\/\/\S+/g, "…");
}

/** Tells whoever watches the monitor that it is alive. */
export async function callHeartbeat({ config, log, signal }: MonitorContext): Promise<void> {
  if (!config.heartbeatUrl) return;
  try {
    const answer = await clientOf({})(config.heartbeatUrl, signal);
    if (!answer.ok) throw new Error(`it answers ${answer.status}`);
  } catch (error) {
    log.warn("heartbeat not delivered", { error: withoutUrl(error) });
  }
}

/** Asks with the config's certificates; reads no more of an answer than its beginning, and waits for none for ever. */
export function clientOf({ ca, cert, key }: Pick<Options, "ca" | "cert" | "key">) {
  return async (url: string, signal: AbortSignal, post?: object) => {
    const files = Object.entries({ ca, cert, key }).flatMap(([name, file]) =>
      file ? [[name, readSecret({ file })]] : [],
    );
    const send = fetchWith(Object.fromEntries(files));
    const answer = await send(url, {
      signal: AbortSignal.any([signal, AbortSignal.timeout(HTTP_TIMEOUT_MS)]),
      ...(post && {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(post),
      }),
    });
    return { ok: answer.ok, status: answer.status, body: await readStart(answer) };
  };
}

async function readStart(answer: Response): Promise<string> {
  let text = "";
  const decoder = new TextDecoder();
  for await (const bytes of answer.body ?? []) {
    text += decoder.decode(bytes, { stream: true });
    if (text.length >= ANSWER_BYTES) break;
  }
  return text;
}
