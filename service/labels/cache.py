"""The cache of label vectors: one entry per label list and memory version, computed once.

Large lists are embedded in the background. A list of more than INDEXED_LABELS labels is kept as an
index (`labels/index`), a smaller one as its rows.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from index_store import Snapshot
from service.batching.executors import IdleThreads, low_priority_threads
from service.errors import NotFound, NotServing
from service.labels.index import LabelIndex
from service.labels.label_set import LabelSet
from service.labels.scoring import Ranked, ScoreFunction, rank
from service.observability.metrics import Metrics

CACHED_LISTS = 64
# two versions of a set of 1 000 000 labels at D = 512, as a swap needs, and room for others
CACHED_BYTES = 5 * 2**30
INDEXED_LABELS = 10_000  # up to here, scoring all labels takes a millisecond or two
SHORT_LIST_THREADS = 2
STEP_LABELS = 512  # labels embedded between two checks whether the list is still wanted

Candidates = np.ndarray | LabelIndex  # (labels, D) float32 unit, or what searches them
Embed = Callable[[Sequence[str], Sequence[str], Snapshot | None], np.ndarray]


@dataclass(slots=True)
class _EmbeddingState:
    """done: labels embedded so far, set by the thread.  unwanted: why to stop, set on the event
    loop.
    """

    done: int = 0
    unwanted: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One label list under one memory version. result: its vectors, once they are made."""

    memory: str | None
    count: int
    progress: _EmbeddingState
    result: asyncio.Future[Candidates]

    @property
    def bytes(self) -> int:
        """Bytes of the vectors; 0 while they are computed, or where that failed."""
        finished = self.result.done() and not self.result.cancelled() and self.result.exception() is None
        return self.result.result().nbytes if finished else 0


class LabelVectors:
    """The cache; all callers of one list wait for one computation. Used on the event loop only.

    embed: `Reco.embed_labels`, blocking.  function: of the model's scores.
    large: lists of more labels are embedded one after the other in a low-priority thread, so that
    neither a list sent with a request nor the requests themselves wait behind an hour's work.
    """

    def __init__(self, embed: Embed, *, function: ScoreFunction, large: int, metrics: Metrics) -> None:
        self._embed, self._function, self._large, self._metrics = embed, function, large, metrics
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._quick, self._slow = IdleThreads(SHORT_LIST_THREADS, "short-labels"), low_priority_threads(1, "labels")

    async def get(self, labels: LabelSet, snapshot: Snapshot | None) -> Candidates:
        """The unit vectors of the labels, each the mean over the templates.

        snapshot: what enhances the texts, None = nothing.
        """
        key = (labels.digest, _version(snapshot))
        self._metrics.label_cache_total.labels("hit" if key in self._entries else "miss").inc()
        entry = self._entries.get(key) or self._start(key, labels, snapshot)
        self._entries.move_to_end(key)
        # a caller who leaves must not cancel it for the others
        return await asyncio.shield(entry.result)

    def prepare(self, labels: LabelSet, snapshot: Snapshot | None) -> None:
        """Start to embed a large list; a small one is embedded at its first use."""
        key = (labels.digest, _version(snapshot))
        if len(labels.labels) > self._large and key not in self._entries:
            self._start(key, labels, snapshot)

    def progress(self, labels: LabelSet) -> list[dict[str, Any]]:
        """How many labels are embedded, under each memory version that was asked for."""
        found = [entry for (digest, _), entry in self._entries.items() if digest == labels.digest]
        return [{"memory": entry.memory, "done": entry.progress.done, "of": entry.count} for entry in found]

    def drop(self, labels: LabelSet) -> None:
        """Remove a list from the cache, and stop embedding it."""
        reason = NotFound("the label set was replaced or deleted while it was embedded: ask again", "label_set")
        for key in [key for key in self._entries if key[0] == labels.digest]:
            self._entries.pop(key).progress.unwanted = reason

    def close(self) -> None:
        """Stop what is being embedded."""
        for entry in self._entries.values():
            entry.progress.unwanted = NotServing("shutting down: send the request to another instance, or retry later")
        for pool in (self._quick, self._slow):
            pool.close()

    def _start(self, key: tuple[str, str], labels: LabelSet, snapshot: Snapshot | None) -> _Entry:
        pool, progress = self._slow if len(labels.labels) > self._large else self._quick, _EmbeddingState()
        result = pool.run(self._embed_list, labels, snapshot, progress)
        entry = self._entries[key] = _Entry(
            snapshot.ref if snapshot is not None else None, len(labels.labels), progress, result
        )
        result.add_done_callback(lambda _: self._finish(key, entry))
        return entry

    def _embed_list(self, labels: LabelSet, snapshot: Snapshot | None, progress: _EmbeddingState) -> Candidates:
        """In a thread: embed the list, and index it where it is long."""
        rows = self._embed_in_steps(labels, snapshot, progress)
        index = LabelIndex.build(rows, self._function.scale) if len(rows) > INDEXED_LABELS else None
        return rows if index is None else index

    def _embed_in_steps(self, labels: LabelSet, snapshot: Snapshot | None, progress: _EmbeddingState) -> np.ndarray:
        """In a thread: all rows, (labels, D). Raises what `unwanted` says."""
        rows = np.empty((0, 0), np.float32)
        for at in range(0, len(labels.labels), STEP_LABELS):
            if progress.unwanted is not None:
                raise progress.unwanted
            # (STEP_LABELS, D)
            some = self._embed(labels.labels[at : at + STEP_LABELS], labels.templates, snapshot)
            if at == 0:
                rows = np.empty((len(labels.labels), some.shape[1]), np.float32)  # (labels, D)
            rows[at : at + len(some)] = some
            progress.done = at + len(some)
        return rows

    def _finish(self, key: tuple[str, str], entry: _Entry) -> None:
        """Keep the vectors within the bounds; a computation that failed is tried again at the next
        request.
        """
        if self._entries.get(key) is entry and entry.bytes == 0:
            del self._entries[key]
        while len(self._entries) > CACHED_LISTS or (
            len(self._entries) > 1 and sum(e.bytes for e in self._entries.values()) > CACHED_BYTES
        ):
            self._entries.popitem(last=False)


def rank_candidates(vectors: np.ndarray, candidates: Candidates, function: ScoreFunction, top_k: int) -> Ranked:
    """Return the best top_k labels of each row, as `scoring.rank`, from rows or from an index."""
    return (
        candidates.rank(vectors, function, top_k)
        if isinstance(candidates, LabelIndex)
        else rank(vectors, candidates, function, top_k)
    )


def _version(snapshot: Snapshot | None) -> str:
    """A key that a rebuilt version does not share with the version it replaced."""
    return f"{snapshot.ref}/{snapshot.manifest.created}" if snapshot is not None else ""
