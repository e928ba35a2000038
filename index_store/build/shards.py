"""Writing the shards of a version block by block, with checkpoints where the source can resume."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index_store.build.checkpoint import BuildCheckpoint, describe_progress, find_earlier_state, remove_uncounted
from index_store.build.ids import SeenIds, read_ids, to_id_array
from index_store.build.index import check_recipe
from index_store.build.source import BuildSource, SourceStep
from index_store.build.staging import BuildState, clear
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

    def resume(self, earlier: BuildState) -> None:
        """Continue after the rows of an earlier run."""
        _check_index(self._index, earlier.keys)
        self._content = VersionContent(
            earlier.dim, earlier.keys, earlier.id_kind, list(earlier.shards), list(earlier.files)
        )
        ids = read_ids(self.work, earlier.pairs)
        self._seen.add(to_id_array(ids, earlier.id_kind))
        if earlier.filled:
            last = to_id_array(ids[-earlier.filled :], earlier.id_kind)
            self._writer = ShardWriter(self.work, earlier.open_folder, earlier.dim, earlier.keys, last)

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

    def state_fields(self) -> dict[str, Any] | None:
        """A copy of the fields of BuildState known here; None before the first pair."""
        if self._content is None:
            return None
        found = self._content
        shards, files = list(found.shards), list(found.files)
        filled = self._writer.pairs if self._writer else 0
        return {
            "dim": found.dim,
            "keys": found.keys,
            "id_kind": found.id_kind,
            "shards": shards,
            "files": files,
            "filled": filled,
        }

    def flush(self) -> None:
        """Write buffered rows to the operating system."""
        if self._writer is not None:
            self._writer.flush()

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
    """Write the steps of a source, resuming an earlier run of the same job, with checkpoints."""
    work = writer.work
    earlier = find_earlier_state(work, job, digest)
    if earlier is None:
        clear(work)
    else:
        remove_uncounted(work, earlier)
        writer.resume(earlier)
    checkpoint = BuildCheckpoint(work, job, digest, earlier)
    try:
        for step in job.steps(describe_progress(work, earlier)):
            _write_step(step, writer, checkpoint)
        return _finish(writer, checkpoint, rejects_path(work.parent, version))
    except BaseException:
        with suppress(OSError, StoreUnwritable):  # no room: the checkpoint before this one stands
            writer.flush()
            checkpoint.save()
        raise
    finally:
        writer.abandon()
        checkpoint.close()


def _write_step(step: SourceStep, writer: VersionWriter, checkpoint: BuildCheckpoint) -> None:
    """Store one step and include it in the next checkpoint; an interrupted step is not included."""
    if step.pairs is not None:
        writer.add(step.pairs)
    checkpoint.note(step)
    stored = writer.state_fields()
    if stored is not None:
        checkpoint.mark_stored(**stored)
    if checkpoint.is_due():
        writer.flush()
        checkpoint.save()


def _finish(writer: VersionWriter, checkpoint: BuildCheckpoint, rejects: Path) -> VersionContent:
    """Close the last shard, save a final checkpoint in case indexing fails, and publish the
    rejects.
    """
    checkpoint.publish_rejects(rejects)
    if writer.state_fields() is None:
        first = checkpoint.first_reject()
        why = f"; {checkpoint.rejected_count} rejected, the first {first.item!r}: {first.reason}" if first else ""
        raise PairsRefused(f"the source holds no valid pair, and a memory needs at least one{why}")
    content = writer.finish()
    checkpoint.mark_stored(**(writer.state_fields() or {}))
    checkpoint.save()
    return content


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
