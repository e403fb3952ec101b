/** What of the followed files is shipped and delivered, for people: read from the cursor, beside a shipper that runs or not. */
import { join } from "node:path";
import type { Config } from "../config.ts";
import { findHolder } from "../durable.ts";
import { parseHost } from "../host.ts";
import { EXIT, errorMessage, formatBytes, OperatorError, type Service } from "../service.ts";
import { formatTable, paint } from "../table.ts";
import { cursorPath, readCursor, type Stream, type StreamState } from "./cursor.ts";
import { compressionOf, LogFile } from "./file.ts";
import { fitOf } from "./identify.ts";
import { lookAt, Paths } from "./paths.ts";
import { Uploader } from "./upload.ts";

/** What of each file is shipped and delivered; 1 when a log is not there, or nobody ships what is. */
export async function showStatus({ config, flags }: Service<"shipper">): Promise<number> {
  if (flags.host !== undefined && parseHost(String(flags.host)) !== config.host)
    throw new OperatorError(`This is the sender ${config.host}, not ${flags.host}`);
  const found = await readCursor(config.stateDir);
  const { streams, lost } = "cursor" in found ? found.cursor : { streams: [], lost: 0 };
  const rows = streams
    .filter(
      ({ phase, size, offset, delivered = 0 }) =>
        phase.is === "reading" || offset < size || delivered < offset,
    )
    .map((stream) => ({
      ...stream,
      size: sizeNow(stream),
      lag: Math.max(0, (stream.until ?? sizeNow(stream)) - stream.offset),
    }))
    .sort((a, b) => b.lag - a.lag);
  const lag = rows.reduce((sum, row) => sum + row.lag, 0);
  const problems = new Paths(config.files, config.olddir, config.stateDir)
    .missing()
    .map((path) => `no file matches ${path}`);
  if (found.state === "damaged")
    problems.push(`no cursor in ${config.stateDir}: it is damaged; the next start asks the receiver`);
  if (lag > 0 && findHolder(join(config.stateDir, ".lock")) === undefined)
    problems.push(`no shipper is running: ${formatBytes(lag)} wait; systemctl status log-rt-sync-shipper`);
  const ok = problems.length === 0;
  if (flags.json) {
    const files = rows.map(({ path, id, size, offset, delivered, lag }) => ({
      path,
      stream: id,
      size,
      shipped: offset,
      delivered,
      lag,
    }));
    process.stdout.write(`${JSON.stringify({ ok, problems, files, lost }, null, 2)}\n`);
  } else process.stdout.write(formatStatus(config, found.state, rows, { problems, lost, lag }));
  return ok ? EXIT.done : EXIT.failed;
}

function formatStatus(
  { stateDir }: Config["shipper"],
  state: string,
  rows: (StreamState & { lag: number })[],
  { problems, lost, lag }: { problems: string[]; lost: number; lag: number },
): string {
  const cells = rows.map(({ path, id = "-", size, offset, delivered, lag }) => {
    return [path, id, String(size), String(offset), String(delivered ?? "-"), formatBytes(lag)];
  });
  const isFirst = state === "absent";
  const good = isFirst
    ? `No cursor in ${stateDir}: nothing was shipped yet`
    : `ok, ${formatBytes(lag)} to ship`;
  const lines = [
    ...problems.map((problem) => paint(problem, true)),
    ...(problems.length === 0 ? [paint(good, false)] : []),
    ...(isFirst
      ? []
      : [formatTable(["FILE", "STREAM", "SIZE", "SHIPPED", "DELIVERED", "LAG"], cells, [2, 3, 4]).trimEnd()]),
    ...(lost > 0 ? [`Lost since the cursor began: ${formatBytes(lost)}`] : []),
  ];
  return `${lines.join("\n")}\n`;
}

/** The size of a stream's log: of an archive what was seen of its content. */
function sizeNow({ path, key, size, offset }: StreamState): number {
  const isPacked = compressionOf(path) !== undefined;
  const found = isPacked ? undefined : lookAt(path);
  return found?.key === key ? found.size : Math.max(size, offset);
}

/** 0 when all of a file, whatever it is called now, is at the client; else 1 and how many bytes are not. */
export async function showDelivered(
  config: Config["shipper"],
  path: string,
  signal: AbortSignal,
): Promise<number> {
  const found = await readCursor(config.stateDir);
  if (!("cursor" in found))
    throw new OperatorError(`Cannot say what is delivered: no cursor in ${cursorPath(config.stateDir)}`);
  const file = await LogFile.open(path).catch((error) => {
    throw new OperatorError(`Cannot look at "${path}": ${errorMessage(error)}`);
  });
  const { streams } = found.cursor;
  const own = streams.find(
    ({ key, copies }) => key === file.key || copies.some((copy) => copy.key === file.key),
  );
  let key = own?.key;
  for (const stream of own ? [] : streams) {
    const isEnough = stream.offset > 0 && stream.marks.length > 0;
    if (isEnough && (await fitOf(file, stream as Stream)).is === "all") key = stream.key;
  }
  const chain = key === undefined ? [] : streams.filter((stream) => stream.key === key);
  const names = chain.flatMap(({ id }) => id ?? []);
  const told =
    names.length === 0 ? [] : await new Uploader(config, signal).ask(config.host, names, {}).catch(() => []);
  const length = await file.contentLength();
  await file.close();
  let waiting = chain.length === 0 ? length : 0;
  for (const { id, from, until, delivered } of chain) {
    const upTo = told.find((status) => status.stream === id)?.delivered ?? delivered ?? from;
    waiting += Math.max(0, Math.min(until ?? length, length) - Math.max(from, upTo));
  }
  const text =
    waiting === 0
      ? `all ${length} bytes are delivered`
      : `${waiting} of ${length} bytes are not delivered yet`;
  process.stdout.write(`${path}: ${text}\n`);
  return waiting === 0 ? EXIT.done : EXIT.failed;
}
