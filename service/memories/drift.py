"""Drift: how far a new version moves the vectors of recent queries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from index_store import Snapshot
from index_store.types import SIDES
from models.reco import Reco
from service.memories.query_log import QueryLog


def measure_drift(reco: Reco, query_log: QueryLog, old: Snapshot, new: Snapshot) -> dict[str, dict[str, float]]:
    """Cosines between the enhanced vectors of recent queries under two snapshots.

    Per side: mean, 5th percentile ("p5"), and the number of queries. A side without queries, or
    with another kind of search key, is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        queries = query_log.latest(new.manifest.name, side)
        if queries is None or old.key_kind(side) != new.key_kind(side):
            continue
        # (B, D) each
        before, after = (reco.enhance(queries, side, snapshot).vectors for snapshot in (old, new))
        cosines = np.einsum("bd,bd->b", before, after)
        found[side] = {"mean": float(cosines.mean()), "p5": float(np.percentile(cosines, 5)), "queries": len(cosines)}
    return found


def lowest_mean(found: Mapping[str, Mapping[str, float]]) -> float | None:
    """The lower of the means of the sides, None where nothing could be compared."""
    return min((side["mean"] for side in found.values()), default=None)
