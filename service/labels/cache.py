"""The cache of label vectors: one entry per label list and memory version, computed once.

Large lists are embedded in the background. A list of more than INDEXED_LABELS labels is kept as an
index (`labels/index`), a smaller one as its rows.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any

import numpy as np

from index_store import Snapshot
from service.batching.batcher import QueueFull
from service.batching.executors import low_priority_threads
from service.batching.shared_threads import SharedThreads
from service.errors import NotFound, NotServing
from service.labels.index import LabelIndex
from service.labels.label_set import LabelSet
from service.labels.list_embedding import Candidates, Embed, ListEmbedding
from service.labels.scoring import Ranked, ScoreFunction, rank
from service.observability.metrics import Metrics

CACHED_LISTS = 64
# two versions of a set of 1 000 000 labels at D = 512, as a swap needs, and room for others
CACHED_BYTES = 5 * 2**30
INDEXED_LABELS = 10_000  # up to here, scoring all labels takes a millisecond or two
SHORT_LIST_THREADS = 2
WAITING_LISTS = 4  # of max_characters, that may wait to be embedded


class LabelVectors:
    """The cache; all callers of one list wait for one computation. Used on the event loop only.

    embed: `Reco.embed_labels`, blocking.  function: of the model's scores.
    large: lists of more labels are embedded one after the other in a low-priority thread, so that
    neither a list sent with a request nor the requests themselves wait behind an hour's work. Other
    lists take turns.
    max_characters: of the texts of one such list; WAITING_LISTS times as many are admitted. A list
    that nobody waits for is embedded no further, and what is done of it is kept.
    """

    def __init__(
        self, embed: Embed, *, function: ScoreFunction, large: int, max_characters: int, metrics: Metrics
    ) -> None:
        self._embed, self._function, self._large, self._metrics = embed, function, large, metrics
        self._max_waiting = WAITING_LISTS * max_characters
        self._entries: OrderedDict[tuple[str, str], ListEmbedding] = OrderedDict()
        self._quick = SharedThreads(SHORT_LIST_THREADS, "short-labels")
        self._slow, self._slow_turn = SharedThreads(1, "labels", low_priority_threads), asyncio.Lock()

    async def get(self, labels: LabelSet, snapshot: Snapshot | None) -> Candidates:
        """The unit vectors of the labels, each the mean over the templates.

        snapshot: what enhances the texts, None = nothing.  Raises QueueFull.
        """
        key = (labels.digest, _version(snapshot))
        self._metrics.label_cache_total.labels("hit" if key in self._entries else "miss").inc()
        entry = self._entries.get(key) or ListEmbedding(labels, snapshot, kept=False)
        self._run(key, entry, snapshot)
        entry.waiting += 1
        try:
            # a caller who leaves must not cancel it for the others
            return await asyncio.shield(entry.result)
        finally:
            entry.waiting -= 1
            if not entry.waiting and not entry.kept:
                entry.pause()

    def prepare(self, labels: LabelSet, snapshot: Snapshot | None) -> None:
        """Start to embed a large list; a small one is embedded at its first use."""
        if len(labels.labels) > self._large:
            key = (labels.digest, _version(snapshot))
            entry = self._entries.get(key) or ListEmbedding(labels, snapshot, kept=True)
            entry.kept = True
            self._run(key, entry, snapshot)

    def progress(self, labels: LabelSet) -> list[dict[str, Any]]:
        """How many labels are embedded, under each memory version that was asked for."""
        found = [entry for (digest, _), entry in self._entries.items() if digest == labels.digest]
        return [{"memory": entry.memory, "done": entry.done, "of": entry.count} for entry in found]

    def drop(self, labels: LabelSet) -> None:
        """Remove a list from the cache, and stop embedding it."""
        reason = NotFound("the label set was replaced or deleted while it was embedded: ask again", "label_set")
        for key in [key for key in self._entries if key[0] == labels.digest]:
            self._entries.pop(key).fail(reason)

    def close(self) -> None:
        """Stop what is being embedded."""
        for entry in self._entries.values():
            entry.fail(NotServing("shutting down: send the request to another instance, or retry later"))
        for threads in (self._quick, self._slow):
            threads.close()

    def _run(self, key: tuple[str, str], entry: ListEmbedding, snapshot: Snapshot | None) -> None:
        """Let an entry be embedded, unless it is done or being done. Raises QueueFull."""
        if not entry.result.done() and not entry.running:
            if entry.count <= self._large:
                self._admit(entry)
            entry.task = asyncio.create_task(self._embed_list(key, entry, snapshot))
        self._entries[key] = entry
        self._entries.move_to_end(key)
        self._trim()

    def _admit(self, entry: ListEmbedding) -> None:
        """Refuse a list while too many characters wait before it. Raises QueueFull."""
        small = (each for each in self._entries.values() if each.running and each.count <= self._large)
        waiting = sum(each.left_characters for each in small)
        if waiting and waiting + entry.left_characters > self._max_waiting:
            self._metrics.rejected_total.labels("queue_full").inc()
            raise QueueFull(
                f"label lists of {waiting} characters are being embedded, {entry.left_characters} more would pass "
                f"{self._max_waiting}: retry later, or store the labels as a set"
            )

    async def _embed_list(self, key: tuple[str, str], entry: ListEmbedding, snapshot: Snapshot | None) -> None:
        """Embed what is left of a list, and index it where it is long."""
        large = entry.count > self._large
        threads, turn = (self._slow, self._slow_turn) if large else (self._quick, nullcontext())
        try:
            async with turn:
                while entry.done < entry.count:
                    step = entry.next_step()
                    entry.add(step, await threads.run(entry, entry.embed_step, self._embed, snapshot, step))
                made = await threads.run(entry, entry.build, self._function.scale, INDEXED_LABELS)
        except Exception as error:  # noqa: BLE001  it belongs to those who wait; the next request tries again
            entry.task = None
            entry.fail(error)
            if self._entries.get(key) is entry:
                del self._entries[key]
        else:
            entry.finish(made)
            self._trim()

    def _trim(self) -> None:
        """Remove the lists that were not asked for the longest, until the rest is within bounds.

        The newest stays, and so does every list that is being embedded: its work would be lost.
        """
        size = sum(entry.bytes for entry in self._entries.values())
        for key, entry in list(self._entries.items())[:-1]:
            if len(self._entries) <= CACHED_LISTS and size <= CACHED_BYTES:
                return
            if not entry.running:
                size -= entry.bytes
                del self._entries[key]


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
