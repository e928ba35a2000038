"""Writing the shards of a version block by block, with checkpoints where the source can resume."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index_store.build.checkpoint import BuildCheckpoint, resume
from index_store.build.ids import SeenIds
from index_store.build.index import check_recipe
from index_store.build.source import BuildSource
from index_store.build.staging import clear
from index_store.errors import PairsRefused, StoreUnwritable
from index_store.storage.columns import ShardWriter
from index_store.storage.layout import rejects_path
from index_store.types import SIDES, KeyKind, Pairs, Side


@dataclass(slots=True)
class VersionContent:
    """Shapes and shards of a version being written."""

    dim: int
    keys: dict[Side, dict[str, Any]]
    id_kind: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    @property
    def pairs(self) -> int:
        """Number of pairs in finished shards."""
        return sum(shard["pairs"] for shard in self.shards)

    def manifest_fields(self) -> dict[str, Any]:
        """The fields of the manifest that the content determines."""
        files: dict[str, Any] = {file: {} for file in self.files}
        return {"dim": self.dim, "keys": self.keys, "pairs": self.pairs, "shards": self.shards, "files": files}


class VersionWriter:
    """Writes the shards of one version, each of at most `shard_pairs` rows."""

    def __init__(self, work: Path, kinds: Mapping[Side, KeyKind], index: str, shard_pairs: int) -> None:
        self.work = work
        self._kinds, self._index, self._shard_pairs = kinds, index, shard_pairs
        self._content: VersionContent | None = None
        self._writer: ShardWriter | None = None
        self._seen = SeenIds()

    def add(self, block: Pairs) -> None:
        """Append one block. Raises PairsRefused where its widths, keys or ids differ from earlier
        blocks.
        """
        if not len(block):
            return
        self._seen.add(block.ids)
        self._content = content = _check_block(block, self._kinds, self._content, self._index)
        for rows in _split_at_full_shards(len(block), (self._writer.pairs if self._writer else 0), self._shard_pairs):
            if self._writer is None:
                self._writer = ShardWriter(self.work, f"shard-{len(content.shards):04d}", content.dim, content.keys)
            self._writer.append(block, rows)
            if self._writer.pairs == self._shard_pairs:
                self._close_shard(self._writer, content)

    def finish(self) -> VersionContent:
        """Complete the last shard. Raises PairsRefused without any pair."""
        if self._content is None:
            raise PairsRefused("the source holds no valid pair: a memory needs at least one")
        if self._writer is not None:
            self._close_shard(self._writer, self._content)
        return self._content

    @property
    def is_empty(self) -> bool:
        """Whether no pair was added."""
        return self._content is None

    def abandon(self) -> None:
        """Close open files; no effect after finish()."""
        if self._writer is not None:
            self._writer.abandon()

    def _close_shard(self, writer: ShardWriter, content: VersionContent) -> None:
        content.files += writer.finish()
        content.shards.append({"folder": writer.folder, "pairs": writer.pairs})
        self._writer = None


def write_blocks(writer: VersionWriter, blocks: Iterable[Pairs]) -> VersionContent:
    """Write blocks without checkpoints."""
    clear(writer.work)
    try:
        for block in blocks:
            writer.add(block)
        return writer.finish()
    finally:
        writer.abandon()


def write_source(writer: VersionWriter, job: BuildSource, digest: str, version: str) -> VersionContent:
    """Write the steps of a source after what an earlier run of the same job has stored."""
    work = writer.work
    earlier = resume(work, job, digest)
    clear(work, keep_blocks=True)
    checkpoint = BuildCheckpoint(work, job, digest, len(earlier.blocks))
    try:
        for pairs in earlier.read_pairs():
            writer.add(pairs)
        for step in job.steps(earlier.progress()):
            if step.pairs is not None:
                writer.add(step.pairs)
            checkpoint.add(step)
        return _finish(writer, checkpoint, rejects_path(work.parent, version))
    except BaseException:
        with suppress(OSError, StoreUnwritable):  # no room: the block before this one stands
            checkpoint.save()
        raise
    finally:
        writer.abandon()
        checkpoint.close()


def _finish(writer: VersionWriter, checkpoint: BuildCheckpoint, rejects: Path) -> VersionContent:
    """Publish the rejects, write the last block in case indexing fails, close the last shard."""
    checkpoint.publish_rejects(rejects)
    if writer.is_empty:
        first = checkpoint.first_reject()
        why = f"; {checkpoint.rejected} rejected, the first {first.item!r}: {first.reason}" if first else ""
        raise PairsRefused(f"the source holds no valid pair, and a memory needs at least one{why}")
    checkpoint.save()
    return writer.finish()


def _check_block(
    block: Pairs, kinds: Mapping[Side, KeyKind], content: VersionContent | None, index: str
) -> VersionContent:
    """The content with the shapes of this block. Raises PairsRefused where they differ from earlier
    blocks.
    """
    keys: dict[Side, dict[str, Any]] = {side: {"kind": kinds[side], "dim": block.keys(side).shape[1]} for side in SIDES}
    for side in SIDES:
        if block.has_own_keys(side) != (kinds[side] != "vector"):
            given = "are" if block.has_own_keys(side) else "are not"
            raise PairsRefused(
                f"the search on {side} is to compare {kinds[side]} keys, but own keys {given} given: change one of the two"
            )
    found = VersionContent(block.image.shape[1], keys, block.ids.dtype.kind)
    if content is None:
        _check_index(index, keys)
        return found
    for what in ("dim", "keys", "id_kind"):
        if getattr(found, what) != getattr(content, what):
            raise PairsRefused(
                f"a block has {what} {getattr(found, what)}, those before it {getattr(content, what)}: one memory, one kind of pairs"
            )
    return content


def _check_index(index: str, keys: Mapping[Side, Mapping[str, Any]]) -> None:
    """Refuse an invalid recipe before hours of encoding."""
    check_recipe(index, [keys[side]["dim"] for side in SIDES])


def _split_at_full_shards(pairs: int, filled: int, shard_pairs: int) -> Iterator[slice]:
    """Slices of a block of `pairs` rows that each fit into one shard."""
    start = 0
    while start < pairs:
        stop = min(pairs, start + shard_pairs - filled)
        yield slice(start, stop)
        start, filled = stop, 0
