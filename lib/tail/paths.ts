/**
 * Which files there are: the live logs that paths and globs name, and beside each of them the files that are its rotations
 * by their names, in the same folder, in that of a symlink's target, or in logrotate's olddir:
 *
 *   access.log.1   access.log.1.bak   access.log-20261122   access.log-20261122-1763791200   access-20261122.log   …and .gz .zst
 *
 * Names only say what is looked at; which file it is says its content (lib/tail/look.ts). One listing per folder and
 * look, however many logs lie in it; the events of the folders wake the shipper before its next look.
 */
import { type FSWatcher, lstatSync, readdirSync, realpathSync, statSync, watch } from "node:fs";
import { basename, dirname, join, resolve } from "node:path";
import { errorMessage } from "../service.ts";
import type { Stream } from "./cursor.ts";
import { ARCHIVE, fileKey, keepKey, kindOf, nameOf, rawPath } from "./file.ts";

/** Compressions that can't be read here: such a file is told of, not shipped. */
const UNREADABLE = /\.(bz2|xz|lz4|lzma|lzo|Z|zip|7z)$/;
/** Several files in one: neither a log nor its rotation. */
const PACK = /\.(?:(?:tar|cpio)(?:\.\w+)?|t[bgx]z2?|tzst|rar|jar)$/i;
/** What the shipper writes into its stateDir. */
const OWN_STATE = /^(?:\.|cursor\.json|shipper\.prom)/;
/** Numbers of rotations up to this one need no neighbour. */
const PLAIN_NUMBERS = 30;

/** A file as it was seen. */
export interface FoundFile {
  path: string;
  key: string;
  /** Number of its file system. */
  dev: bigint;
  size: number;
  mtimeMs: number;
  /** The live path of the log that it belongs to by its name. */
  log: string;
  isLive: boolean;
  /** False when its compression is none that can be read. */
  isReadable: boolean;
}

/** Another one of its kind is another file, or the same after a change. */
export function asSeen({ key, size, mtimeMs }: FoundFile): string {
  return `${key} ${size} ${mtimeMs}`;
}

/** Whether a file is what a compressor made of another one, by its name and time: gzip and its like keep that. */
export function isArchiveOf({ path, mtimeMs }: FoundFile, of: FoundFile): boolean {
  return path.startsWith(`${of.path}.`) && mtimeMs > of.mtimeMs - 1000;
}

export interface Survey {
  /** One for each inode, rotated ones by the time of their last write. */
  files: FoundFile[];
  /** The live paths, whether there is a file or not, with the keys of their folders; undefined when there is none. */
  logs: Map<string, string | undefined>;
  /** What could not be looked at, by path: folders and logs. */
  faults: Map<string, string>;
  /** Files whose names begin with a log's and that are none of its rotations by their names. */
  leftOut: FoundFile[];
}

export class Paths {
  /** Each pattern as a full path, and what it matches when it is a glob. */
  readonly #patterns: { path: string; glob: RegExp | undefined }[];
  readonly #olddir: string | undefined;
  readonly #stateDir: string | undefined;
  /** Names with numbers that were seen: their successors are rotations, too. */
  readonly #numbered = new Set<string>();
  /** Shapes of names under which a log's stream lies though no rule knows them: what was written since under such a name is its, too. */
  readonly shapes = new Map<string, { log: string; since: number }>();
  /** Folders that the last look used: those to be watched. */
  readonly folders = new Set<string>();
  /** Keys and devices of the files of the last look. */
  #devices = new Map<string, bigint>();

  /** What the shipper itself writes into `stateDir` is no log. */
  constructor(patterns: string[], olddir: string | undefined, stateDir?: string) {
    this.#patterns = patterns.map((pattern) => {
      const path = resolve(pattern);
      return { path, glob: isGlob(pattern) ? globPath(path) : undefined };
    });
    this.#olddir = olddir;
    this.#stateDir = stateDir === undefined ? undefined : resolve(stateDir);
  }

  /** Looks at all folders. `before` are live paths that stay ones although no glob names them now. */
  survey(before: Iterable<string> = []): Survey {
    const survey: Survey = { files: [], logs: new Map(), faults: new Map(), leftOut: [] };
    const folders = new Folders(survey.faults);
    this.folders.clear();
    for (const path of this.livePaths(folders, before)) survey.logs.set(path, folders.key(dirname(path)));
    const keys = new Map<string, FoundFile>();
    const add = (file: FoundFile | undefined) => {
      const twin = file && keys.get(file.key);
      if (twin && twin.dev !== file.dev) {
        keys.delete(twin.key);
        this.#keepApart(twin, file);
        keys.set(twin.key, twin);
      }
      if (!file || keys.has(file.key)) return; // one inode is followed once, whatever its names
      keys.set(file.key, file);
      survey.files.push(file);
    };
    const bases = new Map<string, Map<string, string>>();
    const { faults } = survey;
    for (const path of survey.logs.keys()) {
      const isPlain = folders.isPlain(path);
      add(lookAt(path, { isLive: true, isTrusted: this.isNamed(path), isPlain, faults }));
      for (const [folder, base] of this.#places(path, isPlain)) {
        const logs = bases.get(folder) ?? new Map<string, string>();
        if (!logs.has(base)) logs.set(base, path);
        bases.set(folder, logs);
      }
    }
    const rotated: FoundFile[] = [];
    for (const [folder, logs] of bases) {
      this.folders.add(folder);
      for (const name of folders.names(folder, dirname([...logs.values()][0] ?? "") === folder)) {
        const path = inFolder(folder, name);
        if (survey.logs.has(path)) continue;
        const base = this.#baseOf(name, folder, (candidate) => logs.has(candidate), folders);
        const shape = base === undefined && this.shapes.size > 0 ? this.shapes.get(shapeOf(path)) : undefined;
        const log = logs.get(base ?? "") ?? shape?.log;
        const isPlain = folders.isPlain(path);
        const file = log && lookAt(path, { log, isTrusted: false, isPlain, faults });
        if (file && (base !== undefined || file.mtimeMs >= (shape?.since ?? 0))) rotated.push(file);
        else if (base === undefined) {
          const alike = beginsLike(name, logs);
          const other = alike && lookAt(path, { log: alike });
          if (other && !keys.has(other.key)) survey.leftOut.push(other);
        }
      }
    }
    rotated.sort((a, b) => a.mtimeMs - b.mtimeMs || compareAge(a.path, b.path));
    for (const file of rotated) add(file);
    for (const folder of folders.listed()) this.folders.add(folder);
    this.#devices = new Map(survey.files.map(({ key, dev }) => [key, dev]));
    return survey;
  }

  /** Two file systems have a file of one key: the one that was there at the last look keeps it. */
  #keepApart(one: FoundFile, other: FoundFile): void {
    const { key } = one;
    const first = this.#devices.get(key) ?? one.dev;
    for (const file of [one, other]) {
      if (file.dev !== first) file.key = `${key}:${file.dev}`;
      keepKey(file.key);
    }
  }

  /** Streams' files that no name led to: where they were last seen, else (but for those that are gone) under any name in the folders. */
  seek(missing: Stream[]): FoundFile[] {
    const found: FoundFile[] = [];
    const wanted = new Map<string, Stream>();
    const take = (file: FoundFile, { log, mtimeMs }: Stream) => {
      found.push({ ...file, log });
      this.#learn(file.path, log, mtimeMs);
    };
    for (const each of missing) {
      const file = lookAt(each.path, { log: each.log });
      if (file?.key === each.key) take(file, each);
      else if (each.phase.is !== "gone") wanted.set(each.key, each);
    }
    for (const file of wanted.size > 0 ? this.all() : []) {
      const stream = wanted.get(file.key);
      if (stream) take(file, stream);
    }
    return found;
  }

  #learn(path: string, log: string, since: number): void {
    const shape = shapeOf(path);
    if (!isNameOf(path, log) && basename(path).startsWith(stemOf(basename(log))) && !this.shapes.has(shape))
      this.shapes.set(shape, { log, since });
  }

  /** The file that taught a shape turned out to be no stream's. */
  unlearn(path: string): void {
    this.shapes.delete(shapeOf(path));
  }

  *all(): Generator<FoundFile> {
    const folders = new Folders(new Map());
    for (const folder of this.folders) {
      for (const name of folders.names(folder, false)) {
        const file = lookAt(join(folder, name), { log: "" });
        if (file) yield file;
      }
    }
  }

  /** Whether a path of the config, or one of its globs, names this path. */
  names(path: string): boolean {
    return this.#patterns.some((pattern) => pattern.path === path || pattern.glob?.test(path));
  }

  isNamed(path: string): boolean {
    return this.#patterns.some((pattern) => pattern.path === path);
  }

  /** The paths and globs of the config under which there is no file now. */
  missing(): string[] {
    const folders = new Folders(new Map());
    const isThere = (path: string) => {
      try {
        return statSync(path, { throwIfNoEntry: false }) !== undefined;
      } catch {
        return !isGlob(path); // not to be looked at: that is another fault
      }
    };
    return this.#patterns
      .filter(({ path, glob }) => {
        const isFound = isThere(path) && !this.#isOwn(path);
        return !isFound && !(glob && expand(path, folders).some((match) => !this.#isOwn(match)));
      })
      .map(({ path }) => path);
  }

  /** The live paths that the config names now, sorted; those named in full first. */
  livePaths(folders = new Folders(new Map()), before: Iterable<string> = []): string[] {
    const named = new Set<string>();
    const matches = new Set<string>();
    for (const { path, glob } of this.#patterns) {
      if (!glob || lstatSync(path, { throwIfNoEntry: false })) named.add(path);
      else for (const match of expand(path, folders)) matches.add(match);
    }
    for (const set of [named, matches]) for (const path of set) if (this.#isOwn(path)) set.delete(path);
    for (const path of before) if (!named.has(path)) matches.add(path);
    const known = new Set([...named, ...matches]);
    const globbed = [...matches].filter((path) => {
      if (ARCHIVE.test(path) || UNREADABLE.test(path)) return false;
      const folder = dirname(path);
      return !this.#baseOf(basename(path), folder, (base) => known.has(join(folder, base)), folders);
    });
    return [...[...named].sort(), ...globbed.filter((path) => !named.has(path)).sort()];
  }

  #isOwn(path: string): boolean {
    return dirname(path) === this.#stateDir && OWN_STATE.test(basename(path));
  }

  /** Folders in which the rotations of a live file lie, each with the name that they begin with. */
  #places(path: string, isPlain: boolean): [string, string][] {
    const places: [string, string][] = [[dirname(path), basename(path)]];
    const target = isPlain ? path : realPath(path);
    if (target !== path) places.push([dirname(target), basename(target)]);
    if (this.#olddir !== undefined) places.push([resolve(dirname(path), this.#olddir), basename(path)]);
    return places;
  }

  /** The log, of those that `isLog` knows, of which a name is a rotation. */
  #baseOf(
    name: string,
    folder: string,
    isLog: (base: string) => boolean,
    folders: Folders,
  ): string | undefined {
    for (const { base, number } of possibleBases(name)) {
      if (base === name || !isLog(base)) continue;
      if (number !== undefined) {
        const place = `${folder}/${base} `;
        const before = folders.numbers(folder, base);
        const isNext =
          number <= PLAIN_NUMBERS || before.has(number - 1) || this.#numbered.has(place + (number - 1));
        if (!isNext) continue;
        this.#numbered.add(place + number);
      }
      return base;
    }
    return undefined;
  }
}

/** The listings of one look: each folder is read once. */
class Folders {
  readonly #names = new Map<string, string[]>();
  readonly #numbers = new Map<string, Set<number>>();
  readonly #plain = new Set<string>();
  readonly #keys = new Map<string, string | undefined>();
  readonly #faults: Map<string, string>;

  constructor(faults: Map<string, string>) {
    this.#faults = faults;
  }

  /** A folder's names; none of one that is not there, as logrotate makes its olddir at the first rotation. */
  names(folder: string, isRequired = true): string[] {
    let names = this.#names.get(folder);
    if (names) return names;
    try {
      const entries = readdirSync(rawPath(folder), { withFileTypes: true });
      names = entries.map(({ name }) => name);
      if (names.some((name) => name.includes("\uFFFD"))) {
        const raw = readdirSync(rawPath(folder), { encoding: "buffer" });
        names = raw.map((each) => nameOf(folder, Buffer.from(each)));
      }
      for (const entry of entries) if (entry.isFile()) this.#plain.add(inFolder(folder, entry.name));
    } catch (error) {
      names = [];
      const isMissing = ["ENOENT", "ENOTDIR"].includes((error as NodeJS.ErrnoException).code ?? "");
      if (isRequired || !isMissing) this.#faults.set(folder, errorMessage(error));
    }
    this.#names.set(folder, names);
    return names;
  }

  numbers(folder: string, base: string): Set<number> {
    const place = join(folder, base);
    const known = this.#numbers.get(place);
    if (known) return known;
    const numbers = new Set<number>();
    for (const name of this.names(folder, false)) {
      if (!name.startsWith(`${base}.`)) continue;
      const number = /^\.(\d{1,9})(?=\.|$)/.exec(name.slice(base.length))?.[1];
      if (number !== undefined) numbers.add(Number(number));
    }
    this.#numbers.set(place, numbers);
    return numbers;
  }

  /** Whether a listing says that it is a regular file: no link, and nothing to ask the system for. */
  isPlain(path: string): boolean {
    return this.#plain.has(path);
  }

  /** Whether there is something else than a folder; what may not be looked at is a fault of its folder. */
  hasFile(path: string): boolean {
    if (this.isPlain(path)) return true;
    try {
      return statSync(rawPath(path), { throwIfNoEntry: false })?.isDirectory() === false;
    } catch (error) {
      const isDenied = ["EACCES", "EPERM", "EIO"].includes((error as NodeJS.ErrnoException).code ?? "");
      if (isDenied) this.#faults.set(dirname(path), errorMessage(error));
      return false;
    }
  }

  listed(): Iterable<string> {
    return this.#names.keys();
  }

  key(folder: string): string | undefined {
    if (!this.#keys.has(folder)) this.#keys.set(folder, folderKey(folder));
    return this.#keys.get(folder);
  }
}

function folderKey(folder: string): string | undefined {
  try {
    return fileKey(statSync(rawPath(folder), { bigint: true }));
  } catch {
    return undefined;
  }
}

/** As `join`, of what is a folder and a name already: each look does it for every file. */
function inFolder(folder: string, name: string): string {
  return folder === "/" ? `/${name}` : `${folder}/${name}`;
}

/**
 * A date: eight digits or more that are one, dashes between them allowed, and maybe a time; or seconds since 1970. What
 * logrotate's dateformat makes may begin with the year, right behind the name.
 */
const DATE =
  /[-._](1\d{9})(?=\.|$)|(?:[-._]|(?<=[A-Za-z]))(?:(\d{4})-?(\d\d)-?(\d\d)|(\d\d)-?(\d\d)-?(\d{4}))(?:[-._T]?[\d:.+-]*\d)?Z?(?=\.|$)/g;

/** Whether a file is a log or its rotation by its name. */
export function isNameOf(path: string, log: string): boolean {
  return path === log || possibleBases(basename(path)).some(({ base }) => base === basename(log));
}

/** The names of logs of which a name may be a rotation; `number` is that of a numbered one. */
export function possibleBases(name: string): { base: string; number?: number }[] {
  if (PACK.test(name)) return [];
  const plain = name.replace(ARCHIVE, "").replace(UNREADABLE, "");
  const bases: { base: string; number?: number }[] = plain === name ? [] : [{ base: plain }];
  if (!/[-._]\d|\d{4}/.test(plain)) return bases;
  const add = (start: number, end: number, number?: number) => {
    const [base, rest] = [plain.slice(0, start), plain.slice(end)];
    if (base === "" || !/^(\.[A-Za-z][A-Za-z0-9_]{0,9})?$/.test(rest)) return;
    const extra = number === undefined ? {} : { number };
    bases.push({ base, ...extra });
    if (rest !== "") bases.push({ base: base + rest, ...extra });
  };
  for (const match of plain.matchAll(/\.(\d{1,9})(?=\.|$)/g)) {
    add(match.index, match.index + match[0].length, Number(match[1]));
  }
  for (const match of plain.matchAll(DATE)) {
    const [, seconds, y1, m1, d1, d2, m2, y2] = match.map((text) =>
      text === undefined ? Number.NaN : Number(text),
    );
    const isDate = seconds || isDay(y1, m1, d1) || isDay(y2, m2, d2) || isDay(y2, d2, m2);
    if (isDate) add(match.index, match.index + match[0].length);
  }
  return bases;
}

const DAY = "mon|tue|wed|thu|fri|sat|sun|(?:mon|tues|wednes|thurs|fri|satur|sun)day";
const MONTH =
  "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sep(?:t|tember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?";
const DAY_OR_MONTH = new RegExp(`(?<![a-z])(?:${DAY}|${MONTH})(?![a-z])`, "gi");

/** A name whatever its numbers, and the names of days and months in it, are. */
function shapeOf(path: string): string {
  const name = basename(path).replace(ARCHIVE, "").replace(UNREADABLE, "");
  return join(dirname(path), name.replace(DAY_OR_MONTH, "0").replace(/\d+/g, "0"));
}

export function stemOf(name: string): string {
  return name.replace(/(?<=.)\.[^.]*$/, "");
}

function isDay(year = 0, month = 0, day = 0): boolean {
  return year >= 1970 && year < 2200 && month >= 1 && month <= 12 && day >= 1 && day <= 31;
}

function beginsLike(name: string, logs: Map<string, string>): string | undefined {
  for (const match of name.matchAll(/[-._~]/g)) {
    const log = logs.get(name.slice(0, match.index));
    if (log !== undefined) return log;
  }
  return undefined;
}

/** How a path is looked at, and what the file belongs to. */
export interface LookingAt {
  /** The live path of its log; its own one when that is not said. */
  log?: string;
  isLive?: boolean;
  /** A link to another user's file is followed. */
  isTrusted?: boolean;
  /** It is known to be no link. */
  isPlain?: boolean;
  faults?: Map<string, string>;
}

/** A file as it is now under this path; undefined when there is none, and with a fault when it is none to be followed. */
export function lookAt(
  path: string,
  { log = path, isLive = false, isTrusted = true, isPlain = false, faults = new Map() }: LookingAt = {},
): FoundFile | undefined {
  try {
    const found = statSync(rawPath(path), { bigint: true, throwIfNoEntry: false });
    if (!found) return undefined;
    if (!found.isFile()) {
      if (isLive) faults.set(path, `it is ${kindOf(found)}, expected a regular file`);
      return undefined;
    }
    const link =
      isTrusted || isPlain ? undefined : lstatSync(rawPath(path), { bigint: true, throwIfNoEntry: false });
    if (link?.isSymbolicLink() && link.uid !== found.uid) {
      faults.set(path, "it is a link to a file of another user: name it in full if it is to be followed");
      return undefined;
    }
    const place = !isPlain && (isLive || link?.isSymbolicLink()) ? realPath(path) : path;
    const mtimeMs = Number(found.mtimeNs) / 1e6;
    const isReadable = !UNREADABLE.test(path);
    const { dev, size } = found;
    return { path: place, key: fileKey(found), dev, size: Number(size), mtimeMs, log, isLive, isReadable };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== "ENOTDIR") faults.set(path, errorMessage(error));
    return undefined;
  }
}

function realPath(path: string): string {
  try {
    const link = lstatSync(rawPath(path), { throwIfNoEntry: false });
    return link?.isSymbolicLink() ? realpathSync(path) : path;
  } catch {
    return path;
  }
}

export function isGlob(pattern: string): boolean {
  return /[*?[{]/.test(pattern);
}

/** The paths that a glob matches, folder by folder; a folder that can't be read is a fault, one that is not there none. */
function expand(pattern: string, folders: Folders): string[] {
  const [first = "", ...segments] = pattern.split("/");
  let paths = [first === "" ? "/" : first];
  for (const [i, segment] of segments.entries()) {
    const isLast = i === segments.length - 1;
    const next: string[] = [];
    for (const folder of paths) {
      if (segment === "**") next.push(folder, ...foldersBelow(folder, folders));
      else if (!isGlob(segment)) next.push(join(folder, segment));
      else next.push(...matching(folder, segment, folders).filter((path) => !isLast || !PACK.test(path)));
    }
    paths = isLast || !isGlob(segment) ? next : next.filter((path) => segment === "**" || isFolder(path));
  }
  return paths.filter((path) => folders.hasFile(path));
}

function matching(folder: string, segment: string, folders: Folders): string[] {
  const pattern = globPattern(segment);
  const names = folders.names(folder, false).filter((name) => pattern.test(name));
  return names
    .filter((name) => !name.startsWith(".") || segment.startsWith("."))
    .map((name) => inFolder(folder, name));
}

function foldersBelow(folder: string, folders: Folders): string[] {
  const below: string[] = [];
  for (const name of folders.names(folder, false)) {
    const path = join(folder, name);
    const found = lstatSync(rawPath(path), { throwIfNoEntry: false });
    if (found?.isDirectory() && !name.startsWith(".")) below.push(path, ...foldersBelow(path, folders));
  }
  return below;
}

function isFolder(path: string): boolean {
  try {
    return statSync(rawPath(path), { throwIfNoEntry: false })?.isDirectory() === true;
  } catch {
    return false;
  }
}

const patterns = new Map<string, RegExp>();

/** A whole glob; a `**` stands for any number of folders. */
function globPath(pattern: string): RegExp {
  const segments = pattern.split("/").map((segment) => (segment === "**" ? "(?:.*)" : globSource(segment)));
  return new RegExp(`^${segments.join("/").replaceAll("(?:.*)/", "(?:.*/)?")}$`, "s");
}

function globPattern(segment: string): RegExp {
  const pattern = patterns.get(segment) ?? new RegExp(`^${globSource(segment)}$`, "s");
  patterns.set(segment, pattern);
  return pattern;
}

/** `*`, `?`, `[…]` and `{a,b}` of one segment. */
function globSource(segment: string): string {
  let depth = 0;
  return segment.replace(/\[!?[^\]]+\]|[*?{},.+^$()|\\[\]]/g, (text) => {
    if (text === "*") return "[^/]*";
    if (text === "?") return "[^/]";
    if (text === "{") return depth++ >= 0 ? "(?:" : "";
    if (text === "}" && depth > 0) return depth-- > 0 ? ")" : "";
    if (text === "," && depth > 0) return "|";
    if (text.length > 1) return text.replace(/^\[!/, "[^").replaceAll("\\", "\\\\");
    return text === "," ? text : `\\${text}`;
  });
}

/** Of two files written at the same time: `.2` is older than `.1`, dates sort as they are. */
function compareAge(a: string, b: string): number {
  const number = (path: string) => Number(/\.(\d{1,4})(?:\.\w+)?$/.exec(path)?.[1] ?? Number.NaN);
  const difference = number(b) - number(a);
  return Number.isNaN(difference) ? (a < b ? -1 : 1) : difference;
}

/** Of an error or a kind under a log's name, what `--check` says; undefined when it can be followed, or is not there yet. */
export function whyNotFollowed(path: string): string | undefined {
  const faults = new Map<string, string>();
  lookAt(path, { isLive: true, faults });
  return faults.get(path);
}

/** Events of folders (inotify), heard by one listener. Where there are none (network file systems), the poll sees the change later. */
export class Watch {
  readonly #watchers = new Map<string, { watcher: FSWatcher; key: string | undefined }>();
  readonly #heard: (path: string, event: string) => void;
  /** Why a folder can't be watched, by folder. */
  readonly faults = new Map<string, string>();

  constructor(heard: (path: string, event: string) => void) {
    this.#heard = heard;
  }

  /** Watches these folders and no others; one that was made anew is another one. True when there is one that was not watched before. */
  update(folders: Set<string>): boolean {
    for (const [folder, { watcher, key }] of this.#watchers) {
      if (folders.has(folder) && folderKey(folder) === key) continue;
      this.#watchers.delete(folder);
      watcher.close();
    }
    const added = [...folders].filter((folder) => !this.#watchers.has(folder));
    return added.filter((folder) => this.#watch(folder)).length > 0;
  }

  #watch(folder: string): boolean {
    const key = folderKey(folder); // before it is watched: one that takes its place meanwhile is another one
    try {
      const watcher = watch(rawPath(folder), (event, name) => this.#heard(join(folder, name ?? ""), event));
      watcher.on("error", () => {
        this.#watchers.delete(folder); // the next update makes a new one
        watcher.close();
      });
      this.#watchers.set(folder, { watcher, key });
      this.faults.delete(folder);
      return true;
    } catch (error) {
      if (isFolder(folder)) this.faults.set(folder, errorMessage(error));
      return false;
    }
  }

  close(): void {
    for (const { watcher } of this.#watchers.values()) watcher.close();
  }
}
