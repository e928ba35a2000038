"""Pairs of a finished version as a source, so that another version is built without encoding."""

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
    """Whether the directory is a version of this format."""
    return (path / MANIFEST_FILE).is_file()


def read_compatible_manifest(path: Path, *, encoder: str, kinds: Mapping[Side, KeyKind]) -> Manifest:
    """The manifest of a version whose pairs fit this encoder and these keys. Raises
    IncompatibleSnapshot, PairsRefused.

    Online edits of the version are left out, which is logged.
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


def read_steps(
    path: Path,
    manifest: Manifest,
    *,
    kinds: Mapping[Side, KeyKind],
    seen: set[Id],
    origin: str = "",
    done: Collection[Id] = (),
) -> Iterator[SourceStep]:
    """All pairs of a verified version in row order, without online edits, which a compaction folds
    in first.

    seen: ids taken so far, extended here; a pair with one of them is rejected.  origin: of the
    pairs.  done: ids that an earlier run has stored.
    """
    verify(path, manifest)
    for shard in manifest.shards:
        yield from _read_shard(path / shard["folder"], kinds, seen, origin, done)


def _read_shard(
    folder: Path, kinds: Mapping[Side, KeyKind], seen: set[Id], origin: str, done: Collection[Id]
) -> Iterator[SourceStep]:
    names = ["ids", "records", *SIDES, *(f"{side}_key" for side in SIDES if kinds[side] != "vector")]
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names}
    lines = np.memmap(folder / "records.jsonl", np.uint8, mode="r")
    for start in range(0, len(arrays["ids"]), BLOCK_ROWS):
        yield _read_block(arrays, lines, start, seen, origin, done)


def _read_block(
    arrays: Mapping[str, np.ndarray], lines: np.ndarray, start: int, seen: set[Id], origin: str, done: Collection[Id]
) -> SourceStep:
    """The pairs of one block whose ids are new."""
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
