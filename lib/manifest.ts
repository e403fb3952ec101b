/**
 * Manifests: for each hour whose batches are delivered one small file beside them, so that the client can
 * prove that it has everything:
 *
 *   <prefix>_<yyMMddHH>_manifest.json      {"version":1,"hour":"26112206","part":1,"batches":[
 *   <prefix>_<yyMMddHH>_manifest.2.json      {"name":"….log","lines":n,"bytes":n,"sha256":"…"}, …]}
 *
 * Name, bytes and hash are those of the file as it was sent. Batches that come after an hour's manifest go
 * into its next part: an hour is all its parts together. What is not yet in a manifest is kept in
 * `<dir>/.forwarder-manifests.json`, saved before a batch leaves the queue, so that none is left out.
 * A part whose rename was not answered may be written a second time, under its name and with its content.
 */
import { join } from "node:path";
import { folders, listBatches, listHosts, parseBatchName, parseWindow } from "./batch.ts";
import { digest, type Ready } from "./delivery.ts";
import { readIfExists, writeDurably } from "./durable.ts";
import { OperatorError } from "./service.ts";
import type { Target } from "./target/target.ts";

interface Hour {
  /** Number of the part that is written next. */
  part: number;
  /** When a batch of it was delivered last, milliseconds since the epoch. */
  at: number;
  batches: Record<string, { lines: number; bytes: number; sha256: string }>;
}

const VERSION = 1;
/** Clocks of other zones: an hour is over at the latest when none of its batches was delivered for so long. */
const SURELY_OVER_MS = 2 * 3_600_000;
/** How long it is remembered that an hour has its manifest; a batch that is later begins with part 1 again. */
const REMEMBERED_MS = 40 * 86_400_000;

export class Manifests {
  readonly #path: string;
  readonly #hours: Map<string, Hour>;

  private constructor(path: string, hours: Map<string, Hour>) {
    this.#path = path;
    this.#hours = hours;
  }

  /** Reads what earlier cycles left. Throws an OperatorError when the file is damaged. */
  static async load(dir: string): Promise<Manifests> {
    const path = join(dir, ".forwarder-manifests.json");
    const text = await readIfExists(path);
    if (text === undefined) return new Manifests(path, new Map());
    try {
      const { version, hours } = JSON.parse(text);
      if (version !== VERSION) throw new Error(`its version is ${version}, expected ${VERSION}`);
      return new Manifests(path, new Map(Object.entries(hours)));
    } catch (cause) {
      const hint = "Remove it to go on: what it lists will then be in no manifest";
      throw new OperatorError(`${path} is damaged (${(cause as Error).message}). ${hint}`);
    }
  }

  /** Notes delivered batches; on stable storage when it returns. The same batch twice changes nothing. */
  async record(sent: Ready[], now: number): Promise<void> {
    for (const { batch, remote, bytes, lines, sha256, content } of sent) {
      const key = hourOf(batch);
      const hour = this.#hours.get(key) ?? { part: 1, at: now, batches: {} };
      hour.batches[remote] = { lines, bytes, sha256: sha256 ?? (await digest(content())) };
      hour.at = now;
      this.#hours.set(key, hour);
    }
    await this.#save(now);
  }

  /** The hours that can have their manifest: over by the clock, and no batch of theirs is open or waiting. */
  async due(dir: string, now: number): Promise<string[]> {
    const over = [...this.#hours].filter(([key, hour]) => hasBatches(hour) && isOver(key, hour, now));
    if (over.length === 0) return [];
    const all = folders(dir);
    const waiting = new Set<string>();
    for (const folder of [...(await listHosts(dir)).map(all.host), all.failed]) {
      for (const batch of await listBatches(folder, "open", "sealed")) waiting.add(hourOf(batch));
    }
    return over.map(([key]) => key).filter((key) => !waiting.has(key));
  }

  /** Puts the manifest of an hour on the target; gives its name. */
  async deliver(key: string, target: Target, now: number): Promise<string> {
    const hour = this.#hours.get(key);
    if (!hour) throw new Error(`Cannot write the manifest of "${key}": nothing is known of it`);
    for (; ; hour.part++) {
      const name = `${key}_manifest${hour.part > 1 ? `.${hour.part}` : ""}.json`;
      const content = formatManifest(key, hour);
      const chunks = async function* () {
        yield content;
      };
      const size = await target.size(name);
      if (size === undefined) {
        await target.upload(name, chunks());
        await target.publish(name);
      } else if (size !== content.length || (await digest(target.read(name))) !== (await digest(chunks()))) {
        continue; // a name never holds two contents
      }
      hour.part++;
      hour.batches = {};
      await this.#save(now);
      return name;
    }
  }

  #save(now: number): Promise<void> {
    for (const [key, hour] of this.#hours) {
      if (!hasBatches(hour) && now - hour.at > REMEMBERED_MS) this.#hours.delete(key);
    }
    return writeDurably(
      this.#path,
      JSON.stringify({ version: VERSION, hours: Object.fromEntries(this.#hours) }),
    );
  }
}

function formatManifest(key: string, { part, batches }: Hour): Uint8Array {
  const rows = Object.entries(batches).sort(([a], [b]) => (a < b ? -1 : 1));
  const list = rows.map(([name, values]) => `  ${JSON.stringify({ name, ...values })}`).join(",\n");
  const hour = key.slice(-8);
  return Buffer.from(`{"version":${VERSION},"hour":"${hour}","part":${part},"batches":[\n${list}\n]}\n`);
}

/** `accessLog_26112206` of a batch's name. */
function hourOf(batch: string): string {
  const name = parseBatchName(batch);
  return name ? `${name.prefix}_${name.window.slice(0, 8)}` : "";
}

function hasBatches({ batches }: Hour): boolean {
  return Object.keys(batches).length > 0;
}

/** The name has the senders' wall clock; this machine's is taken for the same, or else time tells. */
function isOver(key: string, { at }: Hour, now: number): boolean {
  const { end } = parseWindow(`${key.slice(-8)}_00-59`);
  const wallClock = now - new Date(now).getTimezoneOffset() * 60_000;
  return wallClock >= end || now - at >= SURELY_OVER_MS;
}
