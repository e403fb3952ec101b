/**
 * Which files there are to follow, and which names are their rotated siblings, as logrotate and its kin make
 * them, in the same folder or in another one (logrotate's olddir):
 *
 *   access.log.1   access.log-20261122   access.log-20261122-1763791200   access-20261122.log   …and .gz .zst
 *
 * Names only say what is looked at; which file it is says its content, see tail.ts.
 */
import { glob, readdir, realpath, stat } from "node:fs/promises";
import { basename, dirname, extname, join, resolve } from "node:path";
import { fileKey, kindOf } from "./file.ts";

const COMPRESSED = /\.(gz|zst)$/;
/** Compressions that can't be read here: such a file is told of, not shipped. */
const UNREADABLE = /\.(bz2|xz|lz4|lzma|lzo|Z|zip|7z)$/;
const MONTHS = /jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec/gi;

/** A file beside a live log, as it was seen in its folder. */
export interface Sibling {
  path: string;
  key: string;
  size: number;
  mtimeMs: number;
  /** False when its compression is none that can be read. */
  readable: boolean;
}

/**
 * Whether `name` is a rotation of the live `base`: a separator and digits (a number, a date, a time; months by
 * name) behind the name or before its extension, or the name itself compressed.
 */
export function isRotationOf(name: string, base: string): boolean {
  const extension = extname(base);
  const stem = base.slice(0, base.length - extension.length);
  if (!name.startsWith(stem)) return false; // most names of a folder
  const plain = name.replace(COMPRESSED, "").replace(UNREADABLE, "");
  if (plain === base) return name !== base;
  if (plain.startsWith(base)) return isRotationMark(plain.slice(base.length));
  if (extension === "" || !plain.endsWith(extension)) return false;
  return isRotationMark(plain.slice(stem.length, plain.length - extension.length));
}

function isRotationMark(text: string): boolean {
  return text.length <= 48 && /^[-._](?=.*\d)[\d._:+T-]+Z?$/.test(text.replace(MONTHS, ""));
}

/**
 * The live files that the configured paths and globs name now, sorted. A glob's matches that are rotations of
 * another match or of a file in `known` are left out, and so are compressed ones. A path without a glob is
 * always one of them, whether it exists or not.
 */
export async function expandFiles(patterns: string[], known: Iterable<string>): Promise<string[]> {
  const plain = patterns.filter((pattern) => !isGlob(pattern)).map((path) => resolve(path));
  const matches = new Set<string>();
  for (const pattern of patterns.filter(isGlob)) {
    for await (const path of glob(pattern)) {
      if (!COMPRESSED.test(path) && !UNREADABLE.test(path)) matches.add(resolve(path));
    }
  }
  const bases = [...new Set([...matches, ...known, ...plain])];
  const rotated = (path: string) =>
    bases.some((base) => dirname(base) === dirname(path) && isRotationOf(basename(path), basename(base)));
  return [...new Set([...plain, ...[...matches].filter((path) => !rotated(path))])].sort();
}

function isGlob(pattern: string): boolean {
  return /[*?[{]/.test(pattern);
}

/** The folders in which the siblings of a live file lie: its own, that of a symlink's target, the olddir. */
export async function siblingFolders(live: string, olddir?: string): Promise<string[]> {
  const target = await realpath(live).catch(() => live);
  const folders = [dirname(live), dirname(target)];
  if (olddir !== undefined) folders.push(resolve(dirname(live), olddir));
  return [...new Set(folders)];
}

/** The rotated siblings of a live file, oldest first: by the time of the last write, which compressing keeps. */
export async function listSiblings(live: string, olddir?: string): Promise<Sibling[]> {
  const target = await realpath(live).catch(() => live);
  const bases = [...new Set([basename(live), basename(target)])];
  const siblings: Sibling[] = [];
  for (const folder of await siblingFolders(live, olddir)) {
    for (const name of await namesIn(folder, folder === dirname(live))) {
      if (!bases.some((base) => isRotationOf(name, base))) continue;
      const path = join(folder, name);
      if (path === live || path === target) continue;
      const sibling = await look(path);
      if (sibling) siblings.push(sibling);
    }
  }
  return siblings.sort((a, b) => a.mtimeMs - b.mtimeMs || compareAge(a.path, b.path));
}

/** A folder's names; none of one that is not there, as logrotate makes its olddir at the first rotation. */
async function namesIn(folder: string, required: boolean): Promise<string[]> {
  try {
    return await readdir(folder);
  } catch (error) {
    if (required || (error as NodeJS.ErrnoException).code !== "ENOENT") throw error;
    return [];
  }
}

/** A file as it is now under this path, following symlinks; undefined when it is gone or no regular file. */
export async function look(path: string): Promise<Sibling | undefined> {
  try {
    const found = await stat(path, { bigint: true });
    if (!found.isFile()) return undefined;
    const mtimeMs = Number(found.mtimeNs) / 1e6;
    return { path, key: fileKey(found), size: Number(found.size), mtimeMs, readable: !UNREADABLE.test(path) };
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === "ENOENT") return undefined;
    throw error;
  }
}

/** Why what lies under this path can't be followed; undefined for a regular file, and when nothing is there. */
export async function whyNotFollowed(path: string): Promise<string | undefined> {
  const found = await stat(path).catch(() => undefined);
  return found && !found.isFile() ? `it is ${kindOf(found)}, expected a regular file` : undefined;
}

/** Of two files written at the same time: `.2` is older than `.1`, dates sort as they are. */
function compareAge(a: string, b: string): number {
  const number = (path: string) => Number(/\.(\d{1,4})(?:\.\w+)?$/.exec(path)?.[1] ?? Number.NaN);
  const difference = number(b) - number(a);
  return Number.isNaN(difference) ? (a < b ? -1 : 1) : difference;
}
