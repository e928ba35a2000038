"""Online recall: a few recent queries are searched exactly, outside the request path."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

from index_store import Side, Snapshot
from index_store.errors import StoreError
from service.batching.executors import low_priority_threads
from service.errors import ServiceError
from service.memories.query_log import MemorySide, QueryLog
from service.observability.metrics import Metrics

__all__ = ["RecallSampler"]

log = logging.getLogger("reco")
MIN_PAUSE_S = 5.0  # between two checks; after a check of t seconds the pause is t / share
SAMPLE_QUERIES = 8  # of the latest queries of a memory and side, in one check
AVERAGED_CHECKS = 32  # the gauge shows their mean


class RecallSampler:
    """Compare the index with an exact scan on recent queries, and set `reco_recall_sampled`.

    share: fraction of the time spent on checks; 0 = never.
    State: how many queries of each memory and side were known at its last check, and the last
    checks of each version being served.
    """

    def __init__(
        self, query_log: QueryLog, resolve: Callable[[str], Snapshot], metrics: Metrics, *, share: float
    ) -> None:
        self._query_log, self._resolve, self._metrics, self._share = query_log, resolve, metrics, share
        self._checked_counts: dict[MemorySide, int] = {}
        self._checks: dict[MemorySide, tuple[str, deque[float]]] = {}  # of a version
        self._pool = low_priority_threads(1, "recall")

    async def run(self) -> None:
        """Check until cancelled; a check that fails is logged."""
        pause = MIN_PAUSE_S
        while self._share:
            await asyncio.sleep(pause)
            start = time.perf_counter()
            try:
                await self.check()
            except Exception:
                log.exception("recall of live queries could not be measured")
            pause = max(MIN_PAUSE_S, (time.perf_counter() - start) / self._share)

    async def check(self) -> None:
        """Measure every memory and side with new queries since its last check."""
        for (name, side), count in self._query_log.counts().items():
            snapshot = self._current_snapshot(name, side)
            if snapshot is not None and self._checked_counts.get((name, side)) != count:
                self._checked_counts[name, side] = count
                recall = await self._pool.run(self._measure, snapshot, side)
                self._set_gauge(name, side, snapshot.manifest.version, recall)

    def _current_snapshot(self, name: str, side: Side) -> Snapshot | None:
        """The snapshot being served, None where it is gone; a gauge of another version is
        removed.
        """
        try:
            snapshot = self._resolve(name)
        except (ServiceError, StoreError):  # deleted meanwhile
            snapshot = None
        known = self._checks.get((name, side))
        if known is not None and (snapshot is None or snapshot.manifest.version != known[0]):
            del self._checks[name, side]
            self._metrics.recall_sampled.remove(name, side)
        return snapshot

    def _measure(self, snapshot: Snapshot, side: Side) -> float:
        """In a thread: recall of the index on the latest queries, 0 to 1."""
        queries = self._query_log.latest(snapshot.manifest.name, side, SAMPLE_QUERIES)
        assert queries is not None  # noqa: S101  the log counted some
        return snapshot.measure_recall(queries.key(snapshot.key_kind(side)), side)

    def _set_gauge(self, name: str, side: Side, version: str, recall: float) -> None:
        checks = self._checks.setdefault((name, side), (version, deque(maxlen=AVERAGED_CHECKS)))[1]
        checks.append(recall)
        self._metrics.recall_sampled.labels(name, side).set(sum(checks) / len(checks))
