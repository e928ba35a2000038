"""Training pairs and their neighbours on disk: made once, block by block, gone on with after a
kill, mapped by the loop.

    prepared/pairs/DIGEST/       ids, records and float16 vectors, as a shard without an index
    prepared/neighbours/DIGEST/  {side}_rows, _scores, _known .npy, the arrays of a `Lookup`

A digest names what a folder was made of, so another learning rate makes nothing anew and another
memory searches anew. A folder has its name once it is whole; until then it is hidden, and the next
run goes on in it. All of it may be deleted at any time.

Alphabet: M training pairs, K neighbours, U vectors that they found, D width.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from index_store.build.index import FLAT
from index_store.build.shards import VersionWriter, write_source
from index_store.build.source import BuildProgress, BuildSource, SourceStep
from index_store.build.staging import remove_build_files, staging_folder
from index_store.errors import PairsRefused
from index_store.search.hits import Hits
from index_store.search.shard import keys_file
from index_store.snapshot import Snapshot
from index_store.storage.atomic import fsync_path, lock_folder, translate_write_errors
from index_store.storage.blocks import read_block, write_block
from index_store.storage.columns import Column
from index_store.storage.layout import partial_folder as unfinished
from index_store.storage.layout import rejects_path
from index_store.types import SIDES, Id, KeyKind, Side, decode_ids, other
from models.data.streams import Encoding, Stream, build_streams, chain_streams
from models.encoder.encoder import Encoded
from models.errors import DataError
from models.progress import progress
from models.training.episodes import (
    BLOCK,
    Episode,
    Lookup,
    MemoryQuery,
    compact_hits,
    concatenate_hits,
    ids_of_same_photo,
    number_names,
    photo_numbers,
)

SHARD = "shard-0000"  # a set of training pairs is one shard of any size


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """M training pairs as they lie on the disk.

    ids: (M,) int64 or str.  captions: (M,) int64, equal where the captions are.  vectors: per side
    (M, D) float16, mapped.
    trunk: per side (M, Dk) float16, mapped, None where a search compares the vectors.
    """

    digest: str
    ids: np.ndarray
    captions: np.ndarray
    vectors: Mapping[Side, np.ndarray]
    trunk: Mapping[Side, np.ndarray | None]

    def __len__(self) -> int:
        return len(self.ids)

    def encoded(self, side: Side, rows: slice) -> Encoded:
        """Some of them as a search asks with them, float16."""
        trunk = self.trunk[side]
        return Encoded(self.vectors[side][rows], None if trunk is None else trunk[rows])


def prepare_pairs(folder: Path, sources: Sequence[Path], encoding: Encoding) -> Prepared:
    """The pairs of all sources, encoded unless they lie in the folder already; DataError where no
    source holds any.
    """
    names = ", ".join(source.name for source in sources)
    streams = build_streams(sources, encoding)
    identity = {"streams": [sorted(stream.origins) for stream in streams], "max_pixels": encoding.max_pixels}
    digest = BuildSource(identity, lambda _: ()).digest(
        encoder=encoding.encoder.fingerprint, kinds=dict(encoding.kinds)
    )
    path, before = folder / "pairs" / digest[:16], None
    if not path.exists():
        done = list[BuildProgress]()
        try:
            _encode(path, BuildSource(identity, partial(_steps, streams, done)), digest, encoding.kinds)
        except PairsRefused as error:
            raise DataError(f"{names}: {error}") from error
        before = done[0].pairs
    remove_build_files(path)  # those that a kill has left, too
    pairs = _opened(path, encoding.kinds)
    _tell(f"pairs encoded of {names}", len(pairs), before)
    _tell_rejects(rejects_path(path.parent, path.name))
    return pairs


def _steps(streams: Sequence[Stream], runs: list[BuildProgress], done: BuildProgress) -> Iterator[SourceStep]:
    """What remains to be encoded.  runs: told how far an earlier run came."""
    runs.append(done)
    items = sum(stream.items for stream in streams)
    with progress(items, "encode") as meter:
        meter.start_at(done.pairs)
        for step in chain_streams(streams, done):
            yield step
            meter.advance(step.items - step.stored)


def _encode(path: Path, job: BuildSource, digest: str, kinds: Mapping[Side, KeyKind]) -> None:
    """Fill the one shard, going on where an earlier run stopped; whole once renamed."""
    with staging_folder(path.parent, path.name) as work:
        write_source(VersionWriter(work, kinds, FLAT, shard_pairs=sys.maxsize), job, digest, path.name)
        with translate_write_errors(path.name):
            work.rename(path)
            fsync_path(path.parent)


def _opened(path: Path, kinds: Mapping[Side, KeyKind]) -> Prepared:
    shard = path / SHARD
    with (shard / "records.jsonl").open("rb") as lines:
        captions = number_names([json.loads(line)["caption"] for line in lines])
    return Prepared(
        digest=path.name,
        ids=decode_ids(_mapped(shard / "ids.npy")),
        captions=captions,
        vectors={side: _mapped(shard / f"{side}.npy") for side in SIDES},
        trunk={
            side: None if kinds[side] == "vector" else _mapped(shard / keys_file(side, kinds[side])) for side in SIDES
        },
    )


def look_up_prepared(folder: Path, pairs: Prepared, asking: MemoryQuery) -> Episode:
    """The pairs with their neighbours, searched for unless they lie in the folder already; what a
    pair finds is as in `look_up`.
    """
    snapshot = asking.snapshot
    made_of = [pairs.digest, snapshot.manifest.to_json(), snapshot.ref, asking.k, dict(asking.limits)]
    path = folder / "neighbours" / hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    photo = photo_numbers(pairs.ids)
    before = None if path.exists() else _search(path, pairs, ids_of_same_photo(pairs.ids, photo), asking)
    _tell(f"neighbours found in {snapshot.ref}", len(pairs), before)
    lookups = {side: Lookup(pairs.vectors[side], *(_mapped(path / name) for name in _names(side))) for side in SIDES}
    return Episode(snapshot.ref, lookups, photo, pairs.captions)


def _search(path: Path, pairs: Prepared, own: Sequence[Sequence[Id]], asking: MemoryQuery) -> int:
    """Each block's hits into a file of its own, then all of them into the arrays of a `Lookup`; how
    many an earlier run had found.
    """
    work = unfinished(path.parent, path.name)
    work.mkdir(parents=True, exist_ok=True)
    with lock_folder(work):
        if path.exists():  # another run made it while this one waited
            return len(pairs)
        blocks = {work / f"{at:012d}.npz": slice(at, min(at + BLOCK, len(pairs))) for at in range(0, len(pairs), BLOCK)}
        before = sum(rows.stop - rows.start for file, rows in blocks.items() if file.exists())
        with progress(len(pairs), "search", "pair") as meter:
            meter.start_at(before)
            for file, rows in blocks.items():
                if not file.exists():
                    _write_block(
                        file, {side: asking.find(pairs.encoded(side, rows), side, own[rows]) for side in SIDES}
                    )
                    meter.advance(rows.stop - rows.start)
        for side in SIDES:
            _write_lookup(work, side, concatenate_hits([_read_block(file, side) for file in blocks]), asking.snapshot)
        with translate_write_errors(path.name):
            work.rename(path)
            fsync_path(path.parent)
            for file in blocks:
                (path / file.name).unlink()
    return before


def _write_block(file: Path, found: Mapping[Side, Hits]) -> None:
    with translate_write_errors(file.name):
        hits = {f"{side}.{name}": getattr(found[side], name) for side in SIDES for name in ("rows", "scores")}
        write_block(file, hits)


def _read_block(file: Path, side: Side) -> Hits:
    names = [f"{side}.{name}" for name in ("rows", "scores")]
    return Hits(*read_block(file, names).values())


def _write_lookup(work: Path, side: Side, found: Hits, snapshot: Snapshot) -> None:
    """The three arrays of one side, the vectors copied block by block."""
    distinct, rows = compact_hits(found)
    with translate_write_errors(work.name):
        known = Column(work / f"{side}_known.npy", snapshot.dim)
        for at in range(0, len(distinct), BLOCK):
            known.append(snapshot.vectors(distinct[at : at + BLOCK], other(side)))
        known.finish()
        np.save(work / f"{side}_rows.npy", rows, allow_pickle=False)
        np.save(work / f"{side}_scores.npy", found.scores, allow_pickle=False)
        for name in _names(side):
            fsync_path(work / name)


def _names(side: Side) -> list[str]:
    """The files of one side, in the order of the fields of a `Lookup` after its query."""
    return [f"{side}_{name}.npy" for name in ("known", "rows", "scores")]


def _mapped(path: Path) -> np.ndarray:
    """An array whose pages the system reads when they are touched, and drops when it needs the
    room.
    """
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _tell(what: str, pairs: int, before: int | None) -> None:
    """How much of the work this run found done.  before: None = all of it."""
    done = pairs if before is None else before
    print(f"{what}: {pairs - done:,} now, {done:,} by an earlier run", file=sys.stderr)


def _tell_rejects(listed: Path) -> None:
    """What could not be read is told, never silently lost."""
    if listed.exists():
        lines = listed.read_text("utf-8").splitlines()
        first = json.loads(lines[0])
        print(f"{len(lines)} items left out, the first: {first['item']}: {first['reason']}", file=sys.stderr)
