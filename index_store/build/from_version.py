"""The pairs of a finished version read back, block by block, so that another version is made of
them without encoding anything.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from index_store.build.source import Reject, SourceStep, first_of_each
from index_store.edits.journal import JOURNAL_SUFFIX, log, read_records
from index_store.errors import IncompatibleSnapshot, PairsRefused
from index_store.storage.checksums import verify
from index_store.storage.manifest import MANIFEST_FILE, Manifest, read_manifest, same_encoder
from index_store.types import SIDES, Id, KeyKind, Pairs, Side, decode_ids

BLOCK_ROWS = 4096
REPEATED = "its id came before: ids must be unique"


def is_version(path: Path) -> bool:
    """True for a directory of our own format."""
    return (path / MANIFEST_FILE).is_file()


def stored_manifest(path: Path, *, encoder: str, kinds: Mapping[Side, KeyKind]) -> Manifest:
    """The manifest of a version whose pairs may go into one of this encoder and these keys; refused
    before anything is built.

    Edits made on it online are no part of it; that they are left out is logged.
    """
    manifest = read_manifest(path)
    if not same_encoder(manifest.encoder, encoder):
        raise IncompatibleSnapshot(
            f"{manifest.ref} was built by {manifest.encoder}, not by {encoder}: build it from its images instead"
        )
    for side in SIDES:
        if kinds[side] not in ("vector", manifest.key_kind(side)):
            held = manifest.key_kind(side)
            raise PairsRefused(
                f"{manifest.ref} holds {held} {side} keys, {kinds[side]} keys are asked for: build it from its images"
            )
    edits = sum(1 for _ in read_records(path.with_name(path.name + JOURNAL_SUFFIX), manifest.sha256))
    if edits:
        log.warning(
            "%s: %d edits made on it online are left out: compact it, then take what that makes", manifest.ref, edits
        )
    return manifest


def stored_steps(
    path: Path,
    manifest: Manifest,
    *,
    kinds: Mapping[Side, KeyKind],
    seen: set[Id],
    origin: str = "",
    done: Collection[Id] = (),
) -> Iterator[SourceStep]:
    """Every pair of a verified version in the order of its rows, edits made online apart: fold
    those in by compacting first.

    seen: ids taken so far, added to; a pair whose id is among them is rejected.  origin: of the
    pairs.  done: ids that an earlier run has stored.
    """
    verify(path, manifest)
    for shard in manifest.shards:
        yield from _shard_steps(path / shard["folder"], kinds, seen, origin, done)


def _shard_steps(
    folder: Path, kinds: Mapping[Side, KeyKind], seen: set[Id], origin: str, done: Collection[Id]
) -> Iterator[SourceStep]:
    names = ["ids", "records", *SIDES, *(f"{side}_key" for side in SIDES if kinds[side] != "vector")]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    lines = np.memmap(folder / "records.jsonl", np.uint8, mode="r")
    for start in range(0, len(arrays["ids"]), BLOCK_ROWS):
        yield _step(arrays, lines, start, seen, origin, done)


def _step(
    arrays: Mapping[str, np.ndarray], lines: np.ndarray, start: int, seen: set[Id], origin: str, done: Collection[Id]
) -> SourceStep:
    """The rows of one block whose ids are new."""
    ids = decode_ids(np.asarray(arrays["ids"][start : start + BLOCK_ROWS]))
    first = np.array(first_of_each(ids.tolist(), seen))
    fresh = first & np.array([name not in done for name in ids.tolist()])
    rows, stored = start + np.flatnonzero(fresh), int((first & ~fresh).sum())
    rejects = [Reject(str(name), REPEATED, "duplicate") for name in ids[~first].tolist()]
    if not len(rows):
        return SourceStep(None, len(ids), rejects, stored=stored)
    values = {name: array[rows] for name, array in arrays.items() if name not in ("ids", "records")}
    records = [_record(lines, arrays["records"], row) for row in rows.tolist()]
    pairs = Pairs(ids=ids[fresh], records=records, **values)
    return SourceStep(pairs, len(ids), rejects, [origin] * len(rows), stored)


def _record(lines: np.ndarray, offsets: np.ndarray, row: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(bytes(lines[offsets[row] : offsets[row + 1]]))
    return record
