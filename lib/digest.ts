/**
 * Digests: one file an hour beside the batches, `<prefix>_<yyMMddHH>.sha256`, with which the client checks by
 * `sha256sum -c` alone that it has everything, unchanged. This file alone knows their format, writes and verifies them.
 *
 *   <dir>/.digest/<yyMMddHH>.list   what was delivered: `<sha256>  <name>`, synced before a batch is moved to sent/
 *   <dir>/.digest/<name>.sha256     digests, written before they leave: a repeat has the same bytes
 *   <dir>/.digest/state.json        the head of the chain, the hours that have a digest, the totals told in them
 *
 * A digest's first line that is no comment names the one before, so that they are a chain; its last line is the hash
 * of the lines above, so that the newest one, which none names yet, is guarded, too. A digest file that the state does
 * not know was written by a process that ended then: it is taken as it is.
 */
import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { lstat, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import {
  dashedHost,
  folders,
  isCopy,
  listBatches,
  listHosts,
  parseBatchName,
  parseWindow,
  withState,
} from "./batch.ts";
import {
  appendDurably,
  ifMissing,
  makeFolder,
  readIfExists,
  removeDurably,
  writeDurably,
} from "./durable.ts";
import { ofHost } from "./host.ts";
import { readLedger } from "./ledger.ts";
import { DAY, HOUR, localZone, MINUTE } from "./service.ts";
import { readStateOrForget, writeState } from "./state.ts";

/** A host that was not heard for so long is not waited for, when its ledger, of an older receiver, does not say. */
const KNOWN_DAYS = 30;
const RIPEN_HOURS = 48;
const KEPT_HOURS = 24 * 100;
/** Digests of a backlog share a save of the state: those that it does not name are taken as they are. */
const SAVE_EVERY = 100;
const TITLE = "# log-rt-sync digest 1";

// ---- the format

/** What a digest's file name says; part 1 is the hour's first. */
export interface DigestName {
  prefix: string;
  /** `yyMMddHH`, the wall clock of the lines. */
  hour: string;
  part: number;
}

const NAME = /^(?<prefix>[A-Za-z0-9][A-Za-z0-9_-]*)_(?<hour>\d{8})(?:\.(?<part>[1-9]\d{0,14}))?\.sha256$/;

/** `accessLog_26112206.sha256`, further ones `accessLog_26112206.2.sha256`. */
export function formatDigestName({ prefix, hour, part }: DigestName): string {
  return `${prefix}_${hour}${part > 1 ? `.${part}` : ""}.sha256`;
}

/** The parts of a digest's file name, or undefined when it is none. */
export function parseDigestName(name: string): DigestName | undefined {
  const groups = NAME.exec(name)?.groups;
  if (!groups || groups.part === "1") return undefined;
  return { prefix: groups.prefix ?? "", hour: groups.hour ?? "", part: Number(groups.part ?? 1) };
}

export interface HashedFile {
  name: string;
  sha256: string;
}

export interface Digest {
  hour: string;
  part: number;
  /** Of the first of a chain: since when it is kept. */
  begins?: string;
  /** Of the hour so far, and what each host told since the digest before. */
  hosts: { host: string; lines: number; skipped: number; untimed: number; lost: number }[];
  /** Who keeps the hour from being complete, and why; empty when it is. */
  missing: { host: string; reason: string }[];
  previous?: HashedFile | undefined;
  batches: HashedFile[];
}

export function formatDigest({ hour, part, begins, hosts, missing, previous, batches }: Digest): string {
  const plain = (text: string) => text.replace(/[^\x20-\x7e]+/g, " ");
  const lines = [
    TITLE,
    formatHourLine(hour, part),
    ...(begins ? [`# begins ${begins}`] : []),
    ...hosts.map(
      ({ host, lines, skipped, untimed, lost }) =>
        `# host ${host} lines=${lines} skipped=${skipped} untimed=${untimed} lost=${lost}`,
    ),
    `# complete ${missing.length === 0 ? "yes" : "no"}`,
    ...missing.map(({ host, reason }) => `# missing ${host}: ${plain(reason)}`),
    ...[...(previous ? [previous] : []), ...batches].map(({ name, sha256 }) => `${sha256}  ${name}`),
  ];
  const text = `${lines.join("\n")}\n`;
  return `${text}# end ${sha256Of(text)}\n`;
}

function formatHourLine(hour: string, part: number): string {
  return `# hour ${hour}${part > 1 ? `, part ${part}: what came after the digest before` : ""}`;
}

/** What a digest's bytes say that both verifiers need; undefined when they are damaged, or those of another name. */
export function parseDigest(bytes: Uint8Array, { hour, part }: { hour: string; part: number }) {
  const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString("latin1");
  const end = text.lastIndexOf("\n", text.length - 2) + 1;
  if (/[^\n\x20-\x7e]/.test(text)) return undefined;
  if (text.slice(end) !== `# end ${sha256Of(Buffer.from(text.slice(0, end), "latin1"))}\n`) return undefined;
  const lines = text.slice(0, end).split("\n");
  if (lines[1] !== formatHourLine(hour, part)) return undefined; // a replay of another one
  const files = lines.filter((line) => /^[0-9a-f]{64} {2}/.test(line));
  return {
    begins: lines.find((line) => line.startsWith("# begins "))?.slice(9),
    complete: lines.includes("# complete yes"),
    hosts: lines.flatMap((line) => {
      const [, host = "", skipped] = /^# host (\S+) lines=\d+ skipped=(\d+) /.exec(line) ?? [];
      return skipped === undefined ? [] : [{ host, skipped: Number(skipped) }];
    }),
    files: files.map((line): HashedFile => ({ sha256: line.slice(0, 64), name: line.slice(66) })),
  };
}

type ParsedDigest = NonNullable<ReturnType<typeof parseDigest>>;

function sha256Of(data: string | Uint8Array): string {
  return createHash("sha256").update(data).digest("hex");
}

// ---- hours

/** Start and end of an hour on a wall clock that is `zone` minutes east of UTC, in ms since the epoch. */
function hourSpan(hour: string, zone: number): { start: number; end: number } {
  const { start } = parseWindow(`${hour}_00-59`);
  return { start: start - zone * MINUTE, end: start - zone * MINUTE + HOUR };
}

export function formatHour(ms: number, zone: number): string {
  return new Date(ms + zone * MINUTE).toISOString().replace(/\D/g, "").slice(2, 10);
}

function hourAfter(hour: string): string {
  return formatHour(hourSpan(hour, 0).end, 0);
}

/** Hours before it have a digest when something of them is delivered, and only then: a line of 2005 would make 180,000 others. */
function oldestHour({ begins }: DigestState): string {
  return formatHour(begins - KEPT_HOURS * HOUR, 0);
}

// ---- who has told everything

/**
 * All hosts that are known, as their ledgers and folders show them, the ledgers read first; and the batches in failed/ by
 * hour. `unsent` has the lines of what is open or sealed, `waiting` its batches by hour; times are ms since the epoch.
 */
export async function observeHosts(dir: string, now: number) {
  const hosts = [];
  for (const host of await listHosts(dir)) {
    const ledger = await readLedger(folders(dir).host(host));
    if (!ledger || ledger.facts.forgotten !== undefined) continue;
    const { facts, isDamaged, heardAt } = ledger;
    if (now - heardAt > (facts.forgetAfterDays ?? KNOWN_DAYS) * DAY && !isDamaged) continue;
    // Twice: a listing may miss a file that is renamed meanwhile, but not in both.
    const list = async () =>
      (await listBatches(folders(dir).host(host), "open", "sealed", "compressed")).map(sealedName);
    const names = new Set([...ledger.open.keys(), ...(await list()), ...(await list())]);
    if (isCopy(host, names, ledger.sealed.keys())) continue;
    const lost = ledger.lost + (facts.gone ?? 0);
    const unsent = new Map(
      [...names].map((name) => [name, (ledger.open.get(name) ?? ledger.sealed.get(name))?.lines ?? 0]),
    );
    const told = {
      zone: localZone(now),
      through: undefined,
      contestedUntil: 0,
      skipped: 0,
      untimed: 0,
      ...facts,
    };
    hosts.push({ ...told, host, lost, waiting: countHours(names), unsent, heardAt, isDamaged });
  }
  return { hosts, failed: countHours(await listBatches(folders(dir).failed, "sealed", "compressed")) };
}
export type HostsSeen = Awaited<ReturnType<typeof observeHosts>>;

/** The name that a batch has when it is sealed: the ledger knows it by that one, whatever the folder or the target says. */
export function sealedName(batch: string): string {
  return parseBatchName(batch) ? withState(batch, "sealed") : batch;
}

function countHours(names: Iterable<string>): Map<string, number> {
  const hours = new Map<string, number>();
  for (const name of names) {
    const hour = parseBatchName(name)?.window.slice(0, 8);
    if (hour) hours.set(hour, (hours.get(hour) ?? 0) + 1);
  }
  return hours;
}

/** Who keeps an hour from being complete, and why. `lossAt` tells when bytes of a host were last found lost. */
export function findMissing(
  { hosts, failed }: HostsSeen,
  hour: string,
  now: number,
  lossAt: (host: string) => number = () => 0,
): Digest["missing"] {
  const missing: Digest["missing"] = [];
  const add = (host: string, reason: string) => missing.push({ host, reason });
  for (const { host, zone, through, contestedUntil, waiting, isDamaged } of hosts) {
    const { start, end } = hourSpan(hour, zone);
    const told = through === undefined ? undefined : Math.min(through, now);
    if (isDamaged) add(host, "cannot say: its ledger is damaged");
    else if (told === undefined) add(host, "cannot say: its shipper does not tell how far it is");
    else if (told <= end) add(host, `has told everything only up to ${new Date(told).toISOString()}`);
    if (contestedUntil > now) add(host, "two shippers speak under this name");
    if (lossAt(host) > start) add(host, `bytes were lost, told ${new Date(lossAt(host)).toISOString()}`);
    const count = waiting.get(hour);
    if (count) add(host, count === 1 ? "1 batch is not delivered" : `${count} batches are not delivered`);
  }
  const count = failed.get(hour);
  if (count) add("-", `${count} in failed/`);
  return missing;
}

// ---- writing

const stateSchema = z.object({
  version: z.literal(1),
  /** When the record began; digests of hours that had begun then are numbered by the clock's seconds. */
  begins: z.number(),
  prefix: z.string(),
  head: z.object({ name: z.string(), sha256: z.string(), complete: z.boolean(), at: z.number() }).optional(),
  next: z.string().optional(),
  hours: z.record(z.string(), z.object({ part: z.number(), complete: z.boolean() })),
  totals: z.record(
    z.string(),
    z.object({ skipped: z.number(), untimed: z.number(), lost: z.number(), lossAt: z.number() }),
  ),
  pending: z.array(z.string()),
});
type DigestState = z.infer<typeof stateSchema>;

export interface Listed extends HashedFile {
  lines: number;
}

const stateFile = (dir: string) => join(dir, ".digest", "state.json");
const listFile = (dir: string, hour: string) => join(dir, ".digest", `${hour}.list`);

function readDigestState(dir: string, forgotten: (path: string, reason: string) => void = () => {}) {
  return readStateOrForget(stateFile(dir), stateSchema, 1, forgotten);
}

/** The newest digest: who knows its hash can tell later whether anything before it was changed. */
export async function readDigestHead(dir: string): Promise<DigestState["head"]> {
  return (await readDigestState(dir))?.head;
}

/** What the record tells beside the lists: since when there is one, and of an hour, which `ofHour` reads. */
export async function readRecord(dir: string) {
  const state = await readDigestState(dir);
  const digests = Map.groupBy(
    state ? await readdir(join(dir, ".digest")) : [],
    (name) => parseDigestName(name)?.hour,
  );
  /** Whether its newest digest says complete (undefined without one), and the lines that rules left out, by host. */
  const ofHour = async (hour: string) => {
    const skipped = new Map<string, number>();
    for (const name of digests.get(hour) ?? []) {
      const bytes = await ifMissing(readFile(join(dir, ".digest", name))); // removed meanwhile for its age
      if (!bytes) continue;
      const digest = parseDigest(bytes, parseDigestName(name) as DigestName);
      for (const { host, skipped: more } of digest?.hosts ?? [])
        skipped.set(host, (skipped.get(host) ?? 0) + more);
    }
    return { complete: state?.hours[hour]?.complete, skipped };
  };
  return { begins: state?.begins, lossAt: (host: string) => state?.totals[host]?.lossAt ?? 0, ofHour };
}

/** What was delivered of an hour, by name; empty where no list was kept. */
export async function readList(dir: string, hour: string): Promise<Map<string, Listed>> {
  const text = (await readIfExists(listFile(dir, hour))) ?? "";
  const listed = new Map<string, Listed>();
  let lines = 0;
  for (const line of text.split("\n").slice(0, -1)) {
    const match = /^([0-9a-f]{64}) {2}(.+)$/.exec(line);
    if (match) listed.set(match[2] ?? "", { name: match[2] ?? "", sha256: match[1] ?? "", lines });
    else lines = Number(/^# lines=(\d+)$/.exec(line)?.[1] ?? 0);
  }
  return listed;
}

/**
 * Removes what lies in `.digest/` of hours of which nothing was written since `before`, and gives what: the list before its
 * digests, or the next forwarder would take it for news. What is not at the client yet stays, and so does the newest digest.
 */
export async function removeOldDigests(dir: string, before: number, { dryRun = false } = {}) {
  const folder = join(dir, ".digest");
  const state = await readDigestState(dir);
  if (!state) return [];
  const { head, pending } = state;
  const hours = new Map<string, { file: string; bytes: number; at: number }[]>();
  for (const file of await readdir(folder)) {
    const hour = parseDigestName(file)?.hour ?? /^(\d{8})\.list$/.exec(file)?.[1];
    const info = hour && (await ifMissing(lstat(join(folder, file))));
    if (info) hours.set(hour, [...(hours.get(hour) ?? []), { file, bytes: info.size, at: info.mtimeMs }]);
  }
  const old = [...hours.values()].filter((files) =>
    files.every(({ file, at }) => at < before && file !== head?.name && !pending.includes(file)),
  );
  const files = old.flatMap((files) => files.sort((a, b) => (a.file < b.file ? -1 : 1))); // digits before letters
  if (!dryRun) for (const { file } of files) await removeDurably(join(folder, file));
  return files;
}

/** The record of what is delivered and the digests made of it; of the one forwarder that holds the lock. */
export class Digests {
  readonly #dir: string;
  /** Of a record that has not begun, `begins` is 0. */
  #state: DigestState;
  /** Delivered and in no digest yet, by hour. */
  readonly #news = new Map<string, Map<string, Listed>>();
  readonly #known = new Map<string, Map<string, Listed>>();
  /** Digests written since the pass began: the state is saved behind the first, which tells the totals, then seldom. */
  #unsaved = 0;
  /** The zone of the host that is furthest behind, as seen last. */
  #lastZone: number | undefined;

  private constructor(dir: string, state: DigestState | undefined) {
    this.#dir = dir;
    this.#state = state ?? { version: 1, begins: 0, prefix: "", hours: {}, totals: {}, pending: [] };
  }

  /** Reads what earlier processes left. `forgotten` is told of a state that is damaged and begun anew. */
  static async open(dir: string, forgotten: (path: string, reason: string) => void): Promise<Digests> {
    await makeFolder(join(dir, ".digest"));
    const digests = new Digests(dir, await readDigestState(dir, forgotten));
    if (digests.#state.begins > 0) await digests.#takeUp();
    return digests;
  }

  /** Finds what is in no digest yet, and takes digests that an earlier process could not record any more. */
  async #takeUp(): Promise<void> {
    const state = this.#state;
    const files = await readdir(join(this.#dir, ".digest"));
    const inDigests = new Set<string>();
    const unknown: { name: DigestName; sha256: string; digest: ParsedDigest }[] = [];
    for (const file of files) {
      const name = parseDigestName(file);
      const bytes = name && (await readFile(join(this.#dir, ".digest", file)));
      const digest = bytes && parseDigest(bytes, name);
      if (!name || !digest) continue;
      for (const { name } of digest.files) inDigests.add(name);
      if (name.part > (state.hours[name.hour]?.part ?? 0))
        unknown.push({ name, sha256: sha256Of(bytes), digest });
    }
    const follows = ({ digest: { files, begins } }: { digest: ParsedDigest }) =>
      state.head
        ? files[0]?.sha256 === state.head.sha256 && files[0].name === state.head.name
        : begins === new Date(state.begins).toISOString();
    for (let next = unknown.find(follows); next; next = unknown.find(follows))
      this.#record(next.name, next.sha256, next.digest.complete, state.head?.at ?? state.begins);
    for (const file of files) {
      const hour = /^(\d{8})\.list$/.exec(file)?.[1];
      const listed = hour ? await readList(this.#dir, hour) : [];
      for (const [name, entry] of listed) if (hour && !inDigests.has(name)) this.#addNews(hour, entry);
    }
  }

  #addNews(hour: string, entry: Listed): void {
    this.#news.set(hour, (this.#news.get(hour) ?? new Map()).set(entry.name, entry));
  }

  #record(name: DigestName, sha256: string, complete: boolean, at: number): void {
    const state = this.#state;
    state.head = { name: formatDigestName(name), sha256, complete, at };
    state.hours[name.hour] = { part: name.part, complete };
    state.pending.push(state.head.name);
    const isChained = name.hour >= oldestHour(state);
    if (isChained && (!state.next || name.hour >= state.next)) state.next = hourAfter(name.hour);
    const hours = Object.keys(state.hours);
    if (hours.length < KEPT_HOURS + 100) return;
    for (const old of hours.sort().slice(0, -KEPT_HOURS)) delete state.hours[old];
  }

  /** Notes what was delivered, on stable storage when it returns; what is noted already changes nothing. */
  async note(delivered: Listed[], now: number): Promise<void> {
    const first = delivered[0] && parseBatchName(delivered[0].name);
    if (!first) return;
    if (this.#state.begins === 0) {
      const begun = { ...this.#state, begins: now, prefix: first.prefix };
      await writeState(stateFile(this.#dir), begun);
      this.#state = begun;
      await this.#takeUp();
    }
    this.#state.prefix = first.prefix;
    const byHour = new Map<string, Listed[]>();
    for (const entry of delivered) {
      const hour = await this.#hourOf(entry.name, now);
      if ((await this.#list(hour)).get(entry.name)?.sha256 === entry.sha256) continue;
      byHour.set(hour, [...(byHour.get(hour) ?? []), entry]);
    }
    await Promise.all(
      [...byHour].map(async ([hour, entries]) => {
        const lines = entries.map(({ name, sha256, lines }) => `# lines=${lines}\n${sha256}  ${name}\n`);
        await appendDurably(listFile(this.#dir, hour), lines.join(""));
        const listed = await this.#list(hour);
        for (const entry of entries) {
          listed.set(entry.name, entry);
          this.#addNews(hour, entry);
        }
      }),
    );
  }

  async #list(hour: string): Promise<Map<string, Listed>> {
    const known = this.#known.get(hour) ?? (await readList(this.#dir, hour));
    this.#known.set(hour, known);
    const oldest = this.#known.keys().next().value;
    if (this.#known.size > RIPEN_HOURS && oldest !== undefined) this.#known.delete(oldest);
    return known;
  }

  /** The hour of a batch; one of the future (a clock that is ahead) is listed with the hour that it is now. */
  async #hourOf(batch: string, now: number): Promise<string> {
    const { window = "", host: dashed = "" } = parseBatchName(batch) ?? {};
    const hour = window.slice(0, 8);
    if (hour <= formatHour(now, localZone(now))) return hour;
    const host = (await listHosts(this.#dir)).find((host) => dashedHost(host) === dashed);
    const ledger = host === undefined ? undefined : await readLedger(folders(this.#dir).host(host));
    const current = formatHour(now, ledger?.facts.zone ?? localZone(now));
    return [hour, current].sort()[0] ?? hour;
  }

  get pending(): readonly string[] {
    return this.#state.pending;
  }

  pathOf(name: string): string {
    return join(this.#dir, ".digest", name);
  }

  async delivered(names: string[]): Promise<void> {
    if (names.length === 0) return;
    const done = new Set(names);
    this.#state.pending = this.#state.pending.filter((one) => !done.has(one));
    await writeState(stateFile(this.#dir), this.#state);
  }

  /** Writes each digest whose time has come: as soon as its hour is complete, else an hour after its end. */
  async write(now: number, observe = observeHosts): Promise<void> {
    if (this.#state.begins === 0) return;
    this.#unsaved = 0;
    await this.#writeDue(now, observe);
    if (this.#unsaved > 0) await writeState(stateFile(this.#dir), this.#state);
  }

  async #writeDue(now: number, observe: typeof observeHosts): Promise<void> {
    let seen: HostsSeen | undefined;
    for (;;) {
      const hour = this.#state.next ?? this.#firstHour();
      if (hour === undefined) return;
      const first = hourSpan(hour, this.#lastZone ?? 14 * 60);
      const wasSetBack = first.start > now; // the clock: hours that had their digest too early go on
      if (now < first.end && !(wasSetBack && this.#news.size > 0)) return;
      if (!seen) {
        seen = await observe(this.#dir, now);
        const zones = seen.hosts.map(({ zone }) => zone);
        this.#lastZone = zones.length > 0 ? Math.min(...zones) : localZone(now);
        this.#findLosses(seen, now);
      }
      if (wasSetBack) return this.#writeLate(seen, formatHour(now - HOUR, this.#lastZone ?? 0), now);
      const { end } = hourSpan(hour, this.#lastZone ?? 0);
      if (now < end) return;
      const missing = this.#missing(seen, hour, now);
      if (missing.length > 0 && now < end + HOUR) return;
      await this.#writeLate(seen, hour, now);
      await this.#writeOne(seen, { hour, missing, now });
    }
  }

  /** The first hour in which something was delivered; of what is older than any chain reaches, the one in which that was. */
  #firstHour(): string | undefined {
    if (this.#news.size === 0) return undefined;
    const chained = [...this.#news.keys()].filter((hour) => hour >= oldestHour(this.#state));
    return chained.sort()[0] ?? formatHour(this.#state.begins, this.#lastZone ?? 0);
  }

  #missing(seen: HostsSeen, hour: string, now: number): Digest["missing"] {
    return findMissing(seen, hour, now, (host) => this.#state.totals[host]?.lossAt ?? 0);
  }

  /** Hours that have a digest and of which something came since, or that have become complete. */
  async #writeLate(seen: HostsSeen, before: string, now: number): Promise<void> {
    const { hours } = this.#state;
    const oldest = formatHour(hourSpan(before, 0).start - RIPEN_HOURS * HOUR, 0);
    const open = Object.keys(hours).filter((hour) => hour >= oldest && !hours[hour]?.complete);
    const late = [...this.#news.keys(), ...open].filter((hour) => hour < before); // of a backlog: few of many
    for (const hour of [...new Set(late)].sort()) {
      const missing = this.#missing(seen, hour, now);
      if (this.#news.has(hour) || missing.length === 0) await this.#writeOne(seen, { hour, missing, now });
    }
  }

  /** Totals that have grown: what was lost since an hour began may be of that hour, which stays incomplete. */
  #findLosses({ hosts }: HostsSeen, now: number): void {
    const { totals } = this.#state;
    const isFirst = Object.keys(totals).length === 0;
    for (const { host, skipped, untimed, lost } of hosts) {
      const last = ofHost(totals, host);
      if (!last) totals[host] = { skipped, untimed, lost: isFirst ? lost : 0, lossAt: 0 };
      const known = totals[host];
      if (known && lost > known.lost && known.lossAt < now) known.lossAt = now;
    }
  }

  async #writeOne(
    seen: HostsSeen,
    { hour, missing, now }: { hour: string; missing: Digest["missing"]; now: number },
  ): Promise<void> {
    const state = this.#state;
    const part = (state.hours[hour]?.part ?? 0) + 1;
    const hadBegun = hourSpan(hour, this.#lastZone ?? 0).start <= state.begins;
    const number = hadBegun ? Math.max(part, Math.floor(now / 1000)) : part;
    const name = { prefix: state.prefix, hour, part: number };
    const since = (host: string, key: "skipped" | "untimed" | "lost", total: number) =>
      Math.max(0, total - (state.totals[host]?.[key] ?? total));
    const lines = countLines(await this.#list(hour));
    const hosts: Digest["hosts"] = seen.hosts.map(({ host, skipped, untimed, lost }) => ({
      host,
      lines: lines.get(dashedHost(host)) ?? 0,
      skipped: since(host, "skipped", skipped),
      untimed: since(host, "untimed", untimed),
      lost: since(host, "lost", lost),
    }));
    const text = formatDigest({
      hour,
      part: name.part,
      ...(!state.head && { begins: new Date(state.begins).toISOString() }),
      hosts,
      missing,
      previous: state.head,
      batches: [...(this.#news.get(hour)?.values() ?? [])].sort((a, b) => (a.name < b.name ? -1 : 1)),
    });
    await writeDurably(this.pathOf(formatDigestName(name)), text);
    this.#news.delete(hour);
    this.#record(name, sha256Of(text), missing.length === 0, now);
    for (const { host, skipped, untimed, lost } of seen.hosts) {
      const known = state.totals[host];
      if (known) Object.assign(known, { skipped, untimed, lost });
    }
    if (this.#unsaved++ % SAVE_EVERY === 0) await writeState(stateFile(this.#dir), state);
  }
}

function countLines(listed: Map<string, Listed>): Map<string, number> {
  const lines = new Map<string, number>();
  for (const entry of listed.values()) {
    const host = parseBatchName(entry.name)?.host ?? "";
    lines.set(host, (lines.get(host) ?? 0) + entry.lines);
  }
  return lines;
}

// ---- verifying

type FindingKind = "changed" | "missing" | "extra" | "incomplete" | "chain broken";

/** Checks a delivered folder: every hash, and that the digests are a chain. Throws when it can't be read. */
export async function verifyFolder(folder: string) {
  const entries = await readdir(folder, { withFileTypes: true });
  const names = entries.filter((entry) => entry.isFile()).map(({ name }) => name);
  const batches = names.filter((name) => /\.log(\.gz)?$/.test(name) && parseBatchName(name));
  const hashes = new Map<string, string>();
  const digests = new Map<string, ParsedDigest | undefined>();
  for (const name of names) {
    const parts = parseDigestName(name);
    if (!parts) continue;
    const bytes = await readFile(join(folder, name));
    hashes.set(name, sha256Of(bytes));
    digests.set(name, parseDigest(bytes, parts));
  }
  for (const name of batches) hashes.set(name, await sha256OfFile(join(folder, name)));
  return compareHashes(hashes, digests);
}

function compareHashes(hashes: Map<string, string>, digests: Map<string, ParsedDigest | undefined>) {
  /** Of a file, or of the hour that is incomplete. */
  const found = new Map<string, { kind: FindingKind; name: string }>();
  const add = (kind: FindingKind, name: string) => found.set(`${kind} ${name}`, { kind, name });
  const listed = new Set<string>();
  const followers = new Map<string, number>();
  const begins: string[] = [];
  const damagedHours = new Set<string>();
  const last = new Map<string, { hour: string; part: number; complete: boolean }>();
  let newest = "";
  for (const [name, digest] of digests) {
    const { prefix = "", hour = "", part = 1 } = parseDigestName(name) ?? {};
    if (hour > newest) newest = hour;
    if (!digest) {
      add("changed", name);
      damagedHours.add(hour);
      continue;
    }
    const first = formatDigestName({ prefix, hour, part: 1 });
    if (part > (last.get(first)?.part ?? 0)) last.set(first, { hour, part, complete: digest.complete });
    const previous = digest.files.filter((file) => parseDigestName(file.name));
    for (const file of previous) followers.set(file.name, (followers.get(file.name) ?? 0) + 1);
    if (digest.begins !== undefined) begins.push(digest.begins);
    if (previous.length !== (digest.begins === undefined ? 1 : 0)) add("chain broken", name);
    for (const file of digest.files) {
      listed.add(file.name);
      const hash = hashes.get(file.name);
      if (hash === undefined) add("missing", file.name);
      else if (hash !== file.sha256) add("changed", file.name);
    }
  }
  for (const [name, count] of followers) if (count > 1) add("chain broken", name);
  const heads = [...digests.keys()].filter((name) => digests.get(name) && !followers.has(name)).sort();
  const whole = damagedHours.size === 0;
  if (whole && heads.length > begins.length) for (const name of heads) add("chain broken", name);
  let uncovered = 0;
  for (const name of hashes.keys()) {
    if (parseDigestName(name) || listed.has(name)) continue;
    const hour = parseBatchName(name)?.window.slice(0, 8) ?? "";
    if (hour > newest) uncovered++;
    else if (!damagedHours.has(hour)) add("extra", name);
  }
  for (const { hour, complete } of last.values()) if (!complete) add("incomplete", hour);
  return {
    findings: [...found].sort(([a], [b]) => (a < b ? -1 : 1)).map(([, finding]) => finding),
    begins: begins.sort(),
    uncovered,
    /** The digests that none names: the newest of each chain. */
    heads: heads.map((name) => ({ name, sha256: hashes.get(name) ?? "" })),
  };
}

async function sha256OfFile(path: string): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of createReadStream(path)) hash.update(chunk);
  return hash.digest("hex");
}

/** What `--verify` prints; deploy/verify.sh prints the same. */
export function formatVerified(verified: Awaited<ReturnType<typeof verifyFolder>>): string {
  const { findings, begins, uncovered, heads } = verified;
  const lines = [
    ...findings.map(({ kind, name }) => `${kind}: ${name}`),
    ...begins.map((time) => `begins: ${time}`),
    ...(uncovered > 0 ? [`not covered yet: ${uncovered} batches behind the newest digest`] : []),
    ...heads.map(({ name, sha256 }) => `head: ${sha256}  ${name}`),
    findings.length === 0 ? "ok" : `${findings.length} finding${findings.length === 1 ? "" : "s"}`,
  ];
  return `${lines.join("\n")}\n`;
}
