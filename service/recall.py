"""Recall while serving: a few live queries are asked again of every row, away from the request path and within a share of the clock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from index_store import Side, Snapshot
from index_store.errors import StoreError
from service.errors import ItemRefused, ServiceError
from service.metrics import Metrics
from service.work import Row

__all__ = ["RecallSampler"]

log = logging.getLogger("reco")
PAUSE_S = 5.0  # between two checks at the least; a check that took t seconds is followed by a pause of t / share
WAITING = 8  # queries of a memory's side kept for its next check: the latest, one of each request
CHECKS = 32  # the last checks, whose mean the gauge shows

Key = tuple[str, str, Side]  # name, version, side


class RecallSampler:
    """Compares what the index finds for live queries with an exact scan, and writes `reco_recall_sampled`.

    State, all of it changed on the event loop: the queries waiting for a check, and the last checks of each version being served.
    It keeps vectors, never a snapshot: a retired one must be free to die.
    """

    def __init__(self, resolve: Callable[[str], Snapshot], metrics: Metrics, *, share: float) -> None:
        self._resolve, self._metrics, self._share = resolve, metrics, share
        self._waiting: dict[Key, deque[np.ndarray]] = {}
        self._checks: dict[Key, deque[float]] = {}

    def note(self, snapshot: Snapshot | None, side: Side, rows: Sequence[Row | ItemRefused]) -> None:
        """Keep the first searched item of a request. On the request path: one vector is copied, no more."""
        row = next((row for row in rows if isinstance(row, Row) and row.searched), None)
        if snapshot is None or row is None or not self._share:
            return
        searched = row.trunk if row.trunk is not None and snapshot.key_kind(side) == "trunk" else row.plain
        key = (snapshot.manifest.name, snapshot.manifest.version, side)
        self._waiting.setdefault(key, deque(maxlen=WAITING)).append(searched.copy())  # a view would keep its whole batch

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
        """Measure with all queries that wait."""
        self._forget_retired()
        waiting, self._waiting = self._waiting, {}
        for (name, version, side), queries in waiting.items():
            recall = await self._measured(name, np.stack(queries), side)
            checks = self._checks.setdefault((name, version, side), deque(maxlen=CHECKS))
            checks.append(recall)
            self._metrics.recall_sampled.labels(name, side).set(sum(checks) / len(checks))

    async def _measured(self, name: str, queries: np.ndarray, side: Side) -> float:
        return await asyncio.to_thread(self._resolve(name).recall_of, queries, side)

    def _forget_retired(self) -> None:
        """Drop what was asked of, and told about, versions that are served no longer."""
        for key in {*self._waiting, *self._checks}:
            name, version, side = key
            if not self._serves(name, version):
                self._waiting.pop(key, None)
                if self._checks.pop(key, None) is not None:
                    self._metrics.recall_sampled.remove(name, side)

    def _serves(self, name: str, version: str) -> bool:
        try:
            return self._resolve(name).manifest.version == version
        except (ServiceError, StoreError):  # deleted meanwhile
            return False
