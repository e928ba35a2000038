"""Pairs in, a finished version out: everything beside the store's eyes, the manifest last, then one rename."""

import dataclasses
import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from index_store.columns import ShardWriter
from index_store.durable import digests, replace_text, sync, writing
from index_store.errors import PairsRefused, StoreBusy, VersionExists
from index_store.indexing import check_recipe, index_version
from index_store.manifest import FILE_NAME, Manifest
from index_store.pairs import SIDES, KeyKind, Pairs, Side
from index_store.probes import DEPTH
from index_store.seen import Seen
from index_store.store import Store, plain, plain_version
from index_store.verified import Sight, record

LOCK = ".lock"  # held by the living builder; the kernel lets go when it dies, so a dead one's leftover is told apart


def build_version(
    store: Store,
    name: str,
    version: str | None,
    blocks: Iterable[Pairs],
    *,
    encoder: str,
    kinds: Mapping[Side, KeyKind],
    index: str = "auto",
    shard_pairs: int = 1_000_000,
    recall_floor: float = 0.99,
    parent: str | None = None,
    source: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
) -> Manifest:
    """Write the pairs of all blocks as one new version of a memory, and return its manifest; it is not activated.

    version: None takes the next free name of today.  kinds: what each side's search compares.  index: "auto" or a faiss factory string.
    source: free JSON for the manifest; a callable is asked once all blocks are read, when the counts are known.
    Whatever stops it, a kill included, leaves no version: neither listed nor openable, and a second run succeeds.
    """
    version = store.next_version(name) if version is None else plain_version(version)
    with _workplace(store.root / plain(name), version) as work:
        content = _write_shards(work, blocks, kinds, index, shard_pairs)
        draft = Manifest(
            name=name,
            version=version,
            encoder=encoder,
            **content.described(),
            index={"asked": index},
            recall={"k": DEPTH, "floor": recall_floor},
            files={file: {} for file in content.files},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            parent=parent,
            source=dict(source() if callable(source) else source or {}),
        )
        indexed, written = index_version(work, draft)
        names = [*content.files, *written]
        sight = Sight.of(work, names)
        manifest = dataclasses.replace(indexed, files=digests(work, names))
        _publish(work, manifest, sight)
    return manifest


@dataclass(slots=True)
class _Content:
    """What the blocks turned out to hold."""

    dim: int
    keys: dict[Side, dict[str, Any]]
    id_kind: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        """N, as far as the shards are closed."""
        return sum(shard["pairs"] for shard in self.shards)

    def described(self) -> dict[str, Any]:
        """What of it the manifest tells."""
        return {"dim": self.dim, "keys": self.keys, "pairs": self.pairs, "shards": self.shards}


def _write_shards(work: Path, blocks: Iterable[Pairs], kinds: Mapping[Side, KeyKind], index: str, shard_pairs: int) -> _Content:
    """Stream the blocks into shards of at most `shard_pairs` rows."""
    content, seen = None, Seen()
    writer: ShardWriter | None = None
    try:
        for block in blocks:
            if not len(block):
                continue
            seen.add(block.ids)
            content = _agreeing(block, kinds, content, index)
            for rows in _cuts(len(block), (writer.pairs if writer else 0), shard_pairs):
                if writer is None:
                    writer = ShardWriter(work, f"shard-{len(content.shards):04d}", content.dim, content.keys)
                writer.append(block, rows)
                if writer.pairs == shard_pairs:
                    _close_shard(writer, content)
                    writer = None
        if content is None:
            raise PairsRefused("the source holds no valid pair: a memory needs at least one")
        if writer is not None:
            _close_shard(writer, content)
    finally:
        if writer is not None:
            writer.abandon()
    return content


def _close_shard(writer: ShardWriter, content: _Content) -> None:
    content.files += writer.finish()
    content.shards.append({"folder": writer.folder, "pairs": writer.pairs})


def _agreeing(block: Pairs, kinds: Mapping[Side, KeyKind], content: _Content | None, index: str) -> _Content:
    """What this block holds, which must be what the blocks before it held."""
    keys: dict[Side, dict[str, Any]] = {side: {"kind": kinds[side], "dim": block.keys(side).shape[1]} for side in SIDES}
    for side in SIDES:
        if block.has_own_keys(side) != (kinds[side] != "vector"):
            given = "are" if block.has_own_keys(side) else "are not"
            raise PairsRefused(f"the search on {side} is to compare {kinds[side]} keys, but own keys {given} given: change one of the two")
    found = _Content(block.image.shape[1], keys, block.ids.dtype.kind)
    if content is None:
        check_recipe(index, [keys[side]["dim"] for side in SIDES])
        return found
    for what in ("dim", "keys", "id_kind"):
        if getattr(found, what) != getattr(content, what):
            raise PairsRefused(
                f"a block has {what} {getattr(found, what)}, those before it {getattr(content, what)}: one memory, one kind of pairs"
            )
    return content


def _cuts(pairs: int, filled: int, shard_pairs: int) -> Iterator[slice]:
    """Cut a block where shards become full."""
    start = 0
    while start < pairs:
        stop = min(pairs, start + shard_pairs - filled)
        yield slice(start, stop)
        start, filled = stop, 0


def _publish(work: Path, manifest: Manifest, sight: Sight) -> None:
    """Everything onto the disk, the manifest last, then the one rename that makes the version exist.

    sight: of the files just before their digests were taken, so that the first opening need not read them again.
    """
    with writing(manifest.ref):
        for name in manifest.files:
            sync(work / name)
        for folder in {(work / name).parent for name in manifest.files}:
            sync(folder)
        replace_text(work / FILE_NAME, manifest.to_json())
        finished = work.with_name(manifest.version)
        work.rename(finished)
        sync(finished.parent)
        with suppress(OSError):  # no part of the version: it may as well stay
            (finished / LOCK).unlink()
        record(finished, manifest, sight)


@contextmanager
def _workplace(memory: Path, version: str) -> Iterator[Path]:
    """The empty hidden folder that this builder alone owns; gone afterwards unless it was renamed into a version."""
    work = memory / f".{version}.partial"
    with writing(f"{memory.name}/{version}"):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _own(lock, work, f"{memory.name}@{version}")
        try:
            if (memory / version).exists():
                raise VersionExists(f"{memory.name}@{version} exists already, and a version is never overwritten: choose another name")
            with writing(f"{memory.name}/{version}"):
                _clear(work)
            yield work
        except BaseException:
            _discard(work)
            raise
    finally:
        os.close(lock)


def _own(lock: int, work: Path, ref: str) -> None:
    """Take the lock, or StoreBusy; a lock file that is no longer in its place belonged to a builder that has just finished."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_ino == (work / LOCK).stat().st_ino:
            return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StoreBusy(f"{ref} is being built by another process: wait for it, or choose another version") from error
    raise StoreBusy(f"{ref} was being built by another process until now: look at it, then try again")


def _discard(work: Path) -> None:
    """Remove what this builder made, its lock last: until then nobody else may begin here."""
    with suppress(OSError):
        _clear(work)
        (work / LOCK).unlink()
        work.rmdir()
        work.parent.rmdir()  # where the memory holds nothing else


def _clear(work: Path) -> None:
    """Remove what a builder that died left behind."""
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()
