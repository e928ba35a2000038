"""Blocks in, shards on disk: rows are streamed into files as they come, and with a Job so that a
killed builder goes on.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from index_store.build.checkpoint import BuildCheckpoint, done_of, earlier_progress, keep_only
from index_store.build.ids import SeenIds, id_array, read_ids
from index_store.build.index import check_recipe
from index_store.build.source import BuildSource, SourceStep
from index_store.build.staging import Progress, clear
from index_store.errors import PairsRefused, StoreUnwritable
from index_store.storage.columns import ShardWriter
from index_store.storage.layout import rejects_path
from index_store.types import SIDES, KeyKind, Pairs, Side


@dataclass(slots=True)
class Content:
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


class VersionWriter:
    """The shards of one version while they grow, each of at most `shard_pairs` rows."""

    def __init__(self, work: Path, kinds: Mapping[Side, KeyKind], index: str, shard_pairs: int) -> None:
        self.work = work
        self._kinds, self._index, self._shard_pairs = kinds, index, shard_pairs
        self._content: Content | None = None
        self._writer: ShardWriter | None = None
        self._seen = SeenIds()

    def go_on(self, earlier: Progress) -> None:
        """Take over the rows of an earlier run."""
        _check_index(self._index, earlier.keys)
        self._content = Content(earlier.dim, earlier.keys, earlier.id_kind, list(earlier.shards), list(earlier.files))
        ids = read_ids(self.work, earlier.pairs)
        self._seen.add(id_array(ids, earlier.id_kind))
        if earlier.filled:
            last = id_array(ids[-earlier.filled :], earlier.id_kind)
            self._writer = ShardWriter(self.work, earlier.open_folder, earlier.dim, earlier.keys, last)

    def add(self, block: Pairs) -> None:
        """Store one block, which must be of the same kind as those before it."""
        if not len(block):
            return
        self._seen.add(block.ids)
        self._content = content = _agreeing(block, self._kinds, self._content, self._index)
        for rows in _cuts(len(block), (self._writer.pairs if self._writer else 0), self._shard_pairs):
            if self._writer is None:
                self._writer = ShardWriter(self.work, f"shard-{len(content.shards):04d}", content.dim, content.keys)
            self._writer.append(block, rows)
            if self._writer.pairs == self._shard_pairs:
                self._close_shard(self._writer, content)

    def finish(self) -> Content:
        """Complete the last shard."""
        if self._content is None:
            raise PairsRefused("the source holds no valid pair: a memory needs at least one")
        if self._writer is not None:
            self._close_shard(self._writer, self._content)
        return self._content

    def stored(self) -> dict[str, Any] | None:
        """What of Progress is known here, copied; None before the first pair."""
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
        """Hand every row to the system."""
        if self._writer is not None:
            self._writer.flush()

    def abandon(self) -> None:
        """Close whatever is still open; harmless after finish()."""
        if self._writer is not None:
            self._writer.abandon()

    def _close_shard(self, writer: ShardWriter, content: Content) -> None:
        content.files += writer.finish()
        content.shards.append({"folder": writer.folder, "pairs": writer.pairs})
        self._writer = None


def fill(filling: VersionWriter, blocks: Iterable[Pairs]) -> Content:
    """Stream blocks that nothing remembers: a stopped build begins anew."""
    clear(filling.work)
    try:
        for block in blocks:
            filling.add(block)
        return filling.finish()
    finally:
        filling.abandon()


def fill_from(filling: VersionWriter, job: BuildSource, digest: str, version: str) -> Content:
    """Stream the steps of a job, beginning where an earlier run of it stopped."""
    work = filling.work
    earlier = earlier_progress(work, job, digest)
    if earlier is None:
        clear(work)
    else:
        keep_only(work, earlier)
        filling.go_on(earlier)
    ledger = BuildCheckpoint(work, job, digest, earlier)
    try:
        for step in job.steps(done_of(work, earlier)):
            _take(step, filling, ledger)
        return _finished(filling, ledger, rejects_path(work.parent, version))
    except BaseException:
        with suppress(OSError, StoreUnwritable):  # no room: the checkpoint before this one stands
            filling.flush()
            ledger.save()
        raise
    finally:
        filling.abandon()
        ledger.close()


def _take(step: SourceStep, filling: VersionWriter, ledger: BuildCheckpoint) -> None:
    """Store one step, then let it count; a step that is interrupted on the way does not."""
    if step.pairs is not None:
        filling.add(step.pairs)
    ledger.note(step)
    stored = filling.stored()
    if stored is not None:
        ledger.settle(**stored)
    if ledger.due():
        filling.flush()
        ledger.save()


def _finished(filling: VersionWriter, ledger: BuildCheckpoint, rejects: Path) -> Content:
    """The last shard closed, all of it kept for a next run should making the indexes fail, and the
    rejects published.
    """
    ledger.publish_rejects(rejects)
    if filling.stored() is None:
        first = ledger.first_reject()
        why = f"; {ledger.rejected} rejected, the first {first.item!r}: {first.reason}" if first else ""
        raise PairsRefused(f"the source holds no valid pair, and a memory needs at least one{why}")
    content = filling.finish()
    ledger.settle(**(filling.stored() or {}))
    ledger.save()
    return content


def _agreeing(block: Pairs, kinds: Mapping[Side, KeyKind], content: Content | None, index: str) -> Content:
    """What this block holds, which must be what the blocks before it held."""
    keys: dict[Side, dict[str, Any]] = {side: {"kind": kinds[side], "dim": block.keys(side).shape[1]} for side in SIDES}
    for side in SIDES:
        if block.has_own_keys(side) != (kinds[side] != "vector"):
            given = "are" if block.has_own_keys(side) else "are not"
            raise PairsRefused(
                f"the search on {side} is to compare {kinds[side]} keys, but own keys {given} given: change one of the two"
            )
    found = Content(block.image.shape[1], keys, block.ids.dtype.kind)
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
    """Refuse a recipe before hours of encoding rather than after."""
    check_recipe(index, [keys[side]["dim"] for side in SIDES])


def _cuts(pairs: int, filled: int, shard_pairs: int) -> Iterator[slice]:
    """Cut a block where shards become full."""
    start = 0
    while start < pairs:
        stop = min(pairs, start + shard_pairs - filled)
        yield slice(start, stop)
        start, filled = stop, 0
