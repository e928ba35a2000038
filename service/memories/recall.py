"""Recall while serving: a few live queries are asked again of every row, away from the request path and within a share of the clock."""

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
from service.memories.query_log import Asked, QueryLog
from service.observability.metrics import Metrics

__all__ = ["RecallSampler"]

log = logging.getLogger("reco")
PAUSE_S = 5.0  # between two checks at the least; a check that took t seconds is followed by a pause of t / share
ASKED = 8  # of the latest queries of a memory's side, asked again in one check
CHECKS = 32  # the last checks, whose mean the gauge shows


class RecallSampler:
    """Compares what the index finds for recent queries with an exact scan, and writes `reco_recall_sampled`.

    State: how many queries of each memory and side had been asked at its last check, and the last checks of each version being served.
    """

    def __init__(self, recent: QueryLog, resolve: Callable[[str], Snapshot], metrics: Metrics, *, share: float) -> None:
        self._recent, self._resolve, self._metrics, self._share = recent, resolve, metrics, share
        self._counted: dict[Asked, int] = {}
        self._checks: dict[Asked, tuple[str, deque[float]]] = {}  # of a version
        self._pool = low_priority_threads(1, "recall")

    async def run(self) -> None:
        """Check for ever; a check that fails is logged, and the next one goes on."""
        pause = PAUSE_S
        while self._share:
            await asyncio.sleep(pause)
            start = time.perf_counter()
            try:
                await self.check()
            except Exception:
                log.exception("recall of live queries could not be measured")
            pause = max(PAUSE_S, (time.perf_counter() - start) / self._share)

    async def check(self) -> None:
        """Measure every memory and side that was asked something since the last check."""
        for (name, side), count in self._recent.counts().items():
            snapshot = self._served(name, side)
            if snapshot is not None and self._counted.get((name, side)) != count:
                self._counted[name, side] = count
                recall = await self._pool.run(self._measured, snapshot, side)
                self._told(name, side, snapshot.manifest.version, recall)

    def _served(self, name: str, side: Side) -> Snapshot | None:
        """What is asked now. What was told of another version is told no more."""
        try:
            snapshot = self._resolve(name)
        except (ServiceError, StoreError):  # deleted meanwhile
            snapshot = None
        known = self._checks.get((name, side))
        if known is not None and (snapshot is None or snapshot.manifest.version != known[0]):
            del self._checks[name, side]
            self._metrics.recall_sampled.remove(name, side)
        return snapshot

    def _measured(self, snapshot: Snapshot, side: Side) -> float:
        """In a thread."""
        queries = self._recent.of(snapshot.manifest.name, side, ASKED)
        assert queries is not None  # noqa: S101  it was counted
        return snapshot.measure_recall(queries.key(snapshot.key_kind(side)), side)

    def _told(self, name: str, side: Side, version: str, recall: float) -> None:
        checks = self._checks.setdefault((name, side), (version, deque(maxlen=CHECKS)))[1]
        checks.append(recall)
        self._metrics.recall_sampled.labels(name, side).set(sum(checks) / len(checks))
