/**
 * The files that are open: descriptors are few, so those that were not read for longest are closed, and opened again by name
 * when their turn comes. A file that was moved out of sight stays open: nobody knows its name.
 */
import { errorMessage, type FaultLog } from "../service.ts";
import { closeFile, type Stream } from "./cursor.ts";
import { LogFile } from "./file.ts";

/** Files that are open at once; the others are opened when their turn comes. Fewer where descriptors are fewer, so many at least. */
const OPEN_FILES = { most: 64, least: 4 };

export class OpenFiles {
  readonly #faults: FaultLog;
  /** The one that was read last comes last. */
  readonly #open = new Set<Stream>();
  #most = OPEN_FILES.most;

  constructor(faults: FaultLog) {
    this.#faults = faults;
  }

  /** Opens a stream's file where it was last seen; undefined when another one lies there now. Throws the system's error. */
  async open(stream: Stream): Promise<LogFile | undefined> {
    this.#open.delete(stream);
    if (!stream.file && stream.phase.is !== "gone") {
      const file = await this.#openPath(stream.path);
      if (file?.key === stream.key) stream.file = file;
      else await file?.close();
    }
    if (stream.file) this.#open.add(stream);
    return stream.file;
  }

  /** A file of a name, for as long as it is looked into; undefined of one that is gone, or can't be read, which is told. */
  async look(path: string): Promise<LogFile | undefined> {
    try {
      const file = await this.#openPath(path);
      if (file) this.#faults.recovered(path, "log file can be read again", { path });
      return file;
    } catch (error) {
      this.#faults.failed(path, "cannot read log file", { path, error: errorMessage(error) });
      return undefined;
    }
  }

  /** Takes over a file that was opened for a stream elsewhere. */
  keep(stream: Stream, file: LogFile): void {
    stream.file = file;
    this.#open.add(stream);
  }

  async closeSome(): Promise<void> {
    for (const stream of this.#open) {
      const { file, isBusy, phase } = stream;
      if (file && (isBusy || phase.is === "gone" || this.#open.size <= this.#most)) continue;
      this.#open.delete(stream);
      await closeFile(stream);
    }
  }

  /** Descriptors ran out (EMFILE), which folders, the cursor and connections need, too: fewer files from now on. */
  async closeMore(): Promise<void> {
    this.#most = Math.max(OPEN_FILES.least, this.#most >> 1);
    await this.closeSome();
  }

  async #openPath(path: string): Promise<LogFile | undefined> {
    try {
      return await LogFile.open(path);
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException;
      if (code === "ENOENT") return undefined;
      if (code === "EMFILE") await this.closeMore();
      throw error;
    }
  }
}
