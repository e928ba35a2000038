"""Embedded label lists, one per content and memory version: computed once however many ask at once, large ones in the background.

A list of more than SEARCHED labels is kept as an index (`label_index`), a smaller one as its rows.
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
from service.labels.scoring import Ranked, rank
from service.observability.metrics import Metrics

CACHED_LISTS = 64
CACHED_BYTES = (
    5 * 2**30
)  # two versions of one set of 1 000 000 labels at D = 512 and all, as a swap needs, and room for others
SEARCHED = 10_000  # labels; scoring them all takes a millisecond or two
SHORT_LISTS = 2  # embedded at once
STEP = 512  # labels embedded between two looks at whether they are still wanted

Candidates = np.ndarray | LabelIndex  # (labels, D) float32 unit, or what searches them
Embed = Callable[[Sequence[str], Sequence[str], Snapshot | None], np.ndarray]


@dataclass(slots=True)
class _Progress:
    """done: labels embedded so far, written by the thread.  unwanted: why to stop, written on the loop."""

    done: int = 0
    unwanted: Exception | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """One list under one memory version."""

    memory: str | None
    count: int
    progress: _Progress
    made: asyncio.Future[Candidates]

    @property
    def bytes(self) -> int:
        """Held by what was made; 0 while it is, or where that failed."""
        whole = self.made.done() and not self.made.cancelled() and self.made.exception() is None
        return self.made.result().nbytes if whole else 0


class LabelVectors:
    """The cache: an entry per content and memory version, so that all callers wait for one computation. Touched on the event loop only.

    embed: `Reco.embed_labels`, blocking.  scale: the model's logit scale.
    large: lists of more labels are embedded one after the other in a thread of their own and of low priority, so that neither a list sent
    with a request nor the requests themselves wait behind an hour's work.
    """

    def __init__(self, embed: Embed, *, scale: float, large: int, metrics: Metrics) -> None:
        self._embed, self._scale, self._large, self._metrics = embed, scale, large, metrics
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()
        self._quick, self._slow = IdleThreads(SHORT_LISTS, "short-labels"), low_priority_threads(1, "labels")

    async def get(self, labels: LabelSet, snapshot: Snapshot | None) -> Candidates:
        """The labels' unit vectors, each the mean over the templates, of enhanced texts where a snapshot is given."""
        key = (labels.digest, _version(snapshot))
        self._metrics.label_cache_total.labels("hit" if key in self._entries else "miss").inc()
        entry = self._entries.get(key) or self._begin(key, labels, snapshot)
        self._entries.move_to_end(key)
        return await asyncio.shield(entry.made)  # a caller who leaves must not take the computation from those who wait

    def prepare(self, labels: LabelSet, snapshot: Snapshot | None) -> None:
        """Begin to embed a large list; a small one is made when it is first asked for."""
        key = (labels.digest, _version(snapshot))
        if len(labels.labels) > self._large and key not in self._entries:
            self._begin(key, labels, snapshot)

    def progress(self, labels: LabelSet) -> list[dict[str, Any]]:
        """How far the embedding is, under each memory version it was asked for."""
        found = [entry for (digest, _), entry in self._entries.items() if digest == labels.digest]
        return [{"memory": entry.memory, "done": entry.progress.done, "of": entry.count} for entry in found]

    def drop(self, labels: LabelSet) -> None:
        """Forget a list, and stop embedding it."""
        reason = NotFound("the label set was replaced or deleted while it was embedded: ask again", "label_set")
        for key in [key for key in self._entries if key[0] == labels.digest]:
            self._entries.pop(key).progress.unwanted = reason

    def close(self) -> None:
        """Stop what is being embedded."""
        for entry in self._entries.values():
            entry.progress.unwanted = NotServing("shutting down: send the request to another instance, or retry later")
        for pool in (self._quick, self._slow):
            pool.close()

    def _begin(self, key: tuple[str, str], labels: LabelSet, snapshot: Snapshot | None) -> _Entry:
        pool, progress = self._slow if len(labels.labels) > self._large else self._quick, _Progress()
        made = pool.run(self._made, labels, snapshot, progress)
        entry = self._entries[key] = _Entry(
            snapshot.ref if snapshot is not None else None, len(labels.labels), progress, made
        )
        made.add_done_callback(lambda _: self._settled(key, entry))
        return entry

    def _made(self, labels: LabelSet, snapshot: Snapshot | None, progress: _Progress) -> Candidates:
        """In a thread: embedded, and indexed where there are many."""
        rows = self._in_steps(labels, snapshot, progress)
        index = LabelIndex.build(rows, self._scale) if len(rows) > SEARCHED else None
        return rows if index is None else index

    def _in_steps(self, labels: LabelSet, snapshot: Snapshot | None, progress: _Progress) -> np.ndarray:
        """In a thread: all rows, as long as they are wanted."""
        rows = np.empty((0, 0), np.float32)
        for at in range(0, len(labels.labels), STEP):
            if progress.unwanted is not None:
                raise progress.unwanted
            some = self._embed(labels.labels[at : at + STEP], labels.templates, snapshot)  # (STEP, D)
            if at == 0:
                rows = np.empty((len(labels.labels), some.shape[1]), np.float32)  # (labels, D)
            rows[at : at + len(some)] = some
            progress.done = at + len(some)
        return rows

    def _settled(self, key: tuple[str, str], entry: _Entry) -> None:
        """Keep what was made, within the bounds; what failed is tried again by the next who asks."""
        if self._entries.get(key) is entry and entry.bytes == 0:
            del self._entries[key]
        while len(self._entries) > CACHED_LISTS or (
            len(self._entries) > 1 and sum(e.bytes for e in self._entries.values()) > CACHED_BYTES
        ):
            self._entries.popitem(last=False)


def ranked(vectors: np.ndarray, candidates: Candidates, scale: float, top_k: int) -> Ranked:
    """The best top_k labels of each row, as `ranking.rank`, by whichever form the list is kept in."""
    return (
        candidates.rank(vectors, scale, top_k)
        if isinstance(candidates, LabelIndex)
        else rank(vectors, candidates, scale, top_k)
    )


def _version(snapshot: Snapshot | None) -> str:
    """A name that a rebuilt version does not share with the one it replaced."""
    return f"{snapshot.ref}/{snapshot.manifest.created}" if snapshot is not None else ""
