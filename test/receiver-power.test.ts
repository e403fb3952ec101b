/** Real power cuts under load: what was answered with 200 is on the disk, once, and nothing of it twice. */
import { expect, test } from "bun:test";
import { join } from "node:path";
import { formatMark, HEADER, MARK_BYTES } from "../lib/chunk.ts";
import { createDisk, noDisk } from "./powercut.ts";
import { linesOfWindows, post, sendAll, storedWindows } from "./sending.ts";
import { expectSameLines, freePort, startScript, tempFolder, until, writeConfig } from "./support.ts";

const CUTS = Number(process.env.LOG_RT_SYNC_CUTS ?? 3);

/** Sends chunks one after the other until the receiver is gone; notes what was answered. Gives what may have been taken. */
async function sendUntilGone(
  url: string,
  host: string,
  text: Buffer<ArrayBuffer>,
  answers: Map<string, number>,
): Promise<number> {
  for (;;) {
    const answered = answers.get(host) ?? 0;
    const size = Math.ceil(20_000 * Math.random());
    const cut = text.lastIndexOf(0x0a, Math.min(text.length, answered + 400 + size) - 1) + 1;
    const end = cut > answered ? cut : text.length;
    if (end === answered) return end;
    const mark = (at: number) => formatMark(text.subarray(Math.max(0, at - MARK_BYTES), at));
    const headers: Record<string, string> = {
      [HEADER.mark]: mark(end),
      ...(answered === 0 ? { [HEADER.begin]: "1" } : { [HEADER.from]: mark(answered) }),
    };
    const request = post(url, text.subarray(answered, end), { host, offset: answered, headers });
    const answer = await fetch(request).catch(() => undefined);
    if (answer?.status !== 200) return end;
    answers.set(host, end);
  }
}

test.skipIf(noDisk()).each([3, 12])(
  "what was answered is there once after a power cut, %d senders",
  async (senders) => {
    const disk = await createDisk(512 << 20);
    const dir = join(disk.folder, "data");
    const port = await freePort();
    const receiver = { dir, groups: [{ port, senders: ["*"] }], sealAfterSeconds: 0.5 };
    const config = await writeConfig(await tempFolder(), { receiver });
    const url = `http://127.0.0.1:${port}`;
    const text = Buffer.from(linesOfWindows(60_000));
    const hosts = Array.from({ length: senders }, (_, i) => `10.0.0.${i + 1}`);
    const stands = new Map(hosts.map((host) => [host, 0]));
    for (let cuts = 0; cuts < CUTS; cuts++) {
      const running = startScript("receiver", config);
      await running.says("receiver listens");
      const answers = new Map(stands);
      const sending = Promise.all(
        hosts.map(async (host) => [host, await sendUntilGone(url, host, text, answers)] as const),
      );
      await new Promise((resolve) => setTimeout(resolve, 200 + 900 * Math.random())); // any instruction
      // What is answered from now on proves nothing: a machine without power answers nobody, and ext4 may end the very
      // fdatasync that the cut falls into with success.
      const before = new Map(answers);
      disk.cut();
      await running.stop("SIGKILL");
      const results = await sending;
      disk.restore();
      const again = startScript("receiver", config);
      await again.says("receiver listens");
      expect(again.output).not.toContain("acknowledged bytes are gone");
      expect(again.output).not.toContain("damaged");
      for (const [host, sent] of results) {
        const asked = await fetch(`${url}/streams`, { method: "POST", headers: { [HEADER.host]: host } });
        const [stream] = ((await asked.json()) as { streams: { offset: number }[] }).streams;
        const offset = stream?.offset ?? 0;
        expect(offset).toBeGreaterThanOrEqual(before.get(host) ?? 0);
        expect(offset).toBeLessThanOrEqual(sent); // an answer that was lost with the power counts, too
        expectSameLines(await storedText(dir, host), text.subarray(0, offset));
        stands.set(host, offset);
      }
      expect(await again.stop()).toBe(0);
    }
    const last = startScript("receiver", config);
    await last.says("receiver listens");
    for (const [host, offset] of stands) {
      expect(offset).toBeGreaterThan(0);
      await sendAll(url, host, text, { chunkBytes: 262_144, stream: "stream-0001" });
      await until("all of it is there", async () => (await storedText(dir, host)).length === text.length);
      expectSameLines(await storedText(dir, host), text);
    }
    expect(await last.stop()).toBe(0);
  },
  180_000,
);

/** All lines of a host; read again when a batch is sealed meanwhile. */
async function storedText(dir: string, host: string): Promise<string> {
  const windows = await until("no batch is renamed meanwhile", () =>
    storedWindows(dir, host).catch((error) => {
      if (error.code !== "ENOENT") throw error;
      return undefined;
    }),
  );
  return [...windows]
    .sort(([a], [b]) => (a < b ? -1 : 1))
    .map(([, lines]) => lines)
    .join("");
}
