"""Drift: how far a new version moves the vectors of recent queries."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from index_store import Snapshot
from index_store.types import SIDES
from models.reco import Reco
from service.memories.query_log import QueryLog


def drift(reco: Reco, recent: QueryLog, old: Snapshot, new: Snapshot) -> dict[str, dict[str, float]]:
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
