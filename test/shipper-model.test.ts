/** The shipper's passes against a model of what must arrive, over seeded actions on files; see model.ts. */
import { expect, test } from "bun:test";
import { type Action, runActions, runSeeds } from "./model.ts";

const SEEDS = 300;
const LIMIT_MS = 60_000;
/** So many at least, however slow the machine is. */
const ENOUGH = 50;

test(`every line arrives once over ${SEEDS} seeds of writing, rotating, copying, compressing and killing`, async () => {
  const started = Date.now();
  let { ran, failure } = await runSeeds(1, SEEDS, started + LIMIT_MS);
  if (failure === undefined && ran < ENOUGH) {
    const rest = await runSeeds(1 + ran, ENOUGH - ran);
    ran += rest.ran;
    failure = rest.failure;
  }
  expect(failure).toBeUndefined();
  expect(ran).toBeGreaterThanOrEqual(ENOUGH);
}, 240_000);

test("a copy of a part of a log stays known when the log has gone on, was rotated and removed", async () => {
  const grown = Array.from({ length: 40 }, (): Action[] => [
    { name: "burst", n: 199 },
    { name: "ship", n: 0 },
  ]).flat();
  const gone = Array.from({ length: 8 }, (): Action => ({ name: "wait", n: 7 }));
  const failure = await runActions([
    { name: "writeSibling", n: 0 },
    { name: "burst", n: 0 },
    { name: "copyOverSibling", n: 0 },
    ...grown,
    { name: "rotate", n: 0 },
    { name: "write", n: 3 },
    { name: "releaseOld", n: 0 },
    ...gone,
    { name: "remove", n: 0 },
    ...gone,
  ]);
  expect(failure).toBeUndefined();
});

/** What made a shipper fail once: actions as model.ts prints them. */
const FOUND: [title: string, actions: string][] = [
  [
    "a file that is cut below the place where its stream begins is settled once",
    "burst 511309, sedInPlace 882355, forget 955265, away 0, write 850341, link 817247, write 720312, write 147553, sedInPlace 774987, cutTail 872027",
  ],
  [
    "without a cursor, beside a receiver that knows nothing, killed and copied: an empty file has no name yet",
    "loseState 375731, write 578333, ship 490563, copytruncateWithHole 578677, kill 349307",
  ],
  [
    "an archive of an empty file that vanishes while it is open loses nothing",
    "swapRotated 874708, copytruncate 808426, lateGzip 830719, loseState 565234, remove 382768",
  ],
  [
    "what may be in an archive that is not complete yet is not told as lost",
    "write 3, ship 0, away 0, write 3, ship 0, restart 0, rotate 0, releaseOld 0, here 0, lateGzip 0, wait 2",
  ],
  [
    "a log that grew over a kilobyte and vanished before the first answer to a damaged cursor loses what the receiver lacks",
    "write 408710, write 294457, write 146433, loseState 780497, write 741133, wait 765895, copytruncate 436082, remove 740133",
  ],
  [
    "a log that was set back and is cut: nothing is waited for in a file where another stream goes on",
    "write 746107, snapshot 745514, write 768142, loseState 80309, restore 671995, burst 548034, ship 138305, copytruncateWithHole 87730",
  ],
  [
    "an archive that is found for a stream of an answer is read from where its head stands, behind a hole",
    "write 368816, nulTail 734934, write 44820, loseState 885910, half 621662, copytruncateWithHole 979800, wait 264215, lateGzip 985452, loseState 57725",
  ],
  [
    "killed while a log was copied and cut: its copy over another log waits until the rotated one is known",
    "writeSibling 91088, burst 54735, copyOverSibling 141344, write 658817, ship 35957, copytruncateWithHole 477066, kill 941821",
  ],
  [
    "a log that is copied over another one again and again is its copy, not where that one goes on",
    "writeSibling 296213, longLine 850244, copyOverSibling 534302, tooLarge 220566, burst 478439, writeSibling 413972, copyOverSibling 678374",
  ],
  [
    "what may be in an archive of another log that is not complete yet is not told as lost",
    "rotate 969699, write 750031, link 489081, away 291186, rotate 894337, remove 384640, ship 86568, unlinkLinks 903478, releaseOld 884820, here 250187, kill 446620, lateGzip 288372",
  ],
  [
    "of an extract that has less than the receiver says nothing is shipped",
    "write 758151, extract 988710, wait 954077, write 997424, copytruncate 125629, wait 120585, remove 119483, kill 169818",
  ],
  [
    "a log that was cut below the place where a new stream goes on does not stop with the first one",
    "write 598260, tooLarge 337277, ship 41799, writeSibling 115397, burst 461635, ship 968010, nulTail 307772, ship 129169, damageCursor 777280, write 403043, wait 213863, cutTail 756437",
  ],
  [
    "a log in two streams that keeps a hard link while sed writes it anew is told from the new file",
    "burst 776662, forget 543865, cutTail 267529, link 21587, sedInPlace 145737",
  ],
  [
    "an extract that was taken for a log and is written anew is no rotation by its name",
    "write 814156, forget 572831, compress 340499, extract 155937, copytruncate 159643, write 665906, remove 44641, ship 940795, extract 951029",
  ],
  [
    "lines between two holes of NULs come while the file is live",
    "copytruncate 174322, longLine 241897, longLine 293395, nulTail 792986, burst 102149, nulTail 798684, link 201669, rotate 44921",
  ],
];

test.each(FOUND)("%s", async (_, text) => {
  const actions = text.split(", ").map((action) => {
    const [name, n] = action.split(" ");
    return { name: name as Action["name"], n: Number(n) };
  });
  expect(await runActions(actions)).toBeUndefined();
});
