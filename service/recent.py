"""A reservoir of recent queries per memory: what a new version is compared with the old one on, before it is served."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping

import numpy as np

from index_store import Side, Snapshot
from index_store.pairs import SIDES
from models.clip import Encoded
from models.reco import Reco

KEPT = 256  # queries per side and memory; one search of all of them takes as long as eight batches


class Recent:
    """The last KEPT encoded queries, or a batch more, that asked each memory, by side. Model threads add, swaps read."""

    def __init__(self) -> None:
        self._batches: dict[tuple[str, Side], deque[Encoded]] = {}
        self._lock = threading.Lock()

    def add(self, memory: str, side: Side, encoded: Encoded) -> None:
        """Keep one batch; the oldest ones go once those behind them are enough."""
        with self._lock:
            kept = self._batches.setdefault((memory, side), deque())
            kept.append(encoded)
            while sum(len(batch.vectors) for batch in kept) - len(kept[0].vectors) >= KEPT:
                kept.popleft()

    def of(self, memory: str, side: Side) -> Encoded | None:
        """All that is kept, as one batch; None where nothing was asked yet."""
        with self._lock:
            kept = list(self._batches.get((memory, side), ()))
        if not kept:
            return None
        trunks = [batch.trunk for batch in kept if batch.trunk is not None]
        return Encoded(np.concatenate([batch.vectors for batch in kept]), np.concatenate(trunks) if trunks else None)


def drift(reco: Reco, recent: Recent, old: Snapshot, new: Snapshot) -> dict[str, dict[str, float]]:
    """Per side: mean and 5th percentile of the cosines between recent queries' enhanced vectors under both snapshots, and how many."""
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        queries = recent.of(new.manifest.name, side)
        if queries is None or old.key_kind(side) != new.key_kind(side):
            continue
        before, after = (reco.enhance(queries, side, snapshot).vectors for snapshot in (old, new))  # (B, D) each
        cosines = np.einsum("bd,bd->b", before, after)
        found[side] = {"mean": float(cosines.mean()), "p5": float(np.percentile(cosines, 5)), "queries": len(cosines)}
    return found


def worst(found: Mapping[str, Mapping[str, float]]) -> float | None:
    """The lower of the sides' means, for the gauge; None where nothing could be compared."""
    return min((side["mean"] for side in found.values()), default=None)
