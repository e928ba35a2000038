"""What runs in the model threads: items of many requests -> one row each. Encoded together, then enhanced snapshot by snapshot."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from index_store import SearchParams, Side, Snapshot
from models.encoder.encoder import Encoded
from models.reco import EmbeddedBatch, Reco, Timings
from service.errors import ItemRefused
from service.observability.metrics import Stage

OWN = {"score": "source_score", "weight": "source_weight"}  # the user's fields of these names; the reply has its own


@dataclass(frozen=True, slots=True)
class Items:
    """What a request wants embedded. images: encoded bytes, or why one cannot be read.  texts: as sent. One of the two is empty."""

    images: Sequence[bytes | ItemRefused]
    texts: Sequence[str]

    @property
    def side(self) -> Side:
        """Which tower the items go through."""
        return "image" if self.images else "text"


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What one request wants of every item of it.

    snapshot: pinned once per request, so that no reply mixes two versions; None = the plain vector.
    params: the search parameters of one item (B = 1).
    """

    snapshot: Snapshot | None
    k: int
    params: SearchParams
    neighbors: bool


@dataclass(frozen=True, slots=True, eq=False)
class QueuedItem:
    """One item of a batch. array: (3,H,W) uint8 pixels or (L,) int64 tokens."""

    array: np.ndarray
    query: Query


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedItem:
    """One item's answer.

    vector, plain: (D,) float32 unit.  trunk: (Dt,) float32 unit, where the encoder shows it.
    similarity: of the nearest neighbour, None without one.  neighbors: as the wire shows them.
    """

    vector: np.ndarray
    plain: np.ndarray
    trunk: np.ndarray | None
    searched: bool  # a memory was asked
    similarity: float | None
    neighbors: list[dict[str, Any]]
    timings: Timings

    @property
    def enhanced(self) -> bool:
        """Whether any neighbour changed the vector."""
        return self.similarity is not None


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """Rows or refusals in the order of the items, and the seconds of each stage, the slowest item's."""

    rows: Sequence[EmbeddedItem | ItemRefused]
    seconds: dict[Stage, float]
    tokens: int = 0  # of all texts, padding left out


def slowest(parts: Sequence[Answered]) -> dict[Stage, float]:
    """Seconds of each stage that any part of a request went through, the slowest part's."""
    stages = dict.fromkeys(stage for part in parts for stage in part.seconds)
    return {stage: max(part.seconds.get(stage, 0.0) for part in parts) for stage in stages}


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One item encoded. plain: (D,) float32 unit.  trunk: (Dt,) or None.  encode_s: seconds of the batch it was encoded in."""

    query: Query
    plain: np.ndarray
    trunk: np.ndarray | None
    encode_s: float


def encode(reco: Reco, side: Side, batch: Sequence[QueuedItem]) -> list[Seen]:
    """The first stage: one item each, in order."""
    start = time.perf_counter()
    encoded = reco.encode(np.stack([work.array for work in batch]), side)
    encode_s = time.perf_counter() - start
    trunks = [None] * len(batch) if encoded.trunk is None else list(encoded.trunk)
    return [
        Seen(work.query, plain, trunk, encode_s)
        for work, plain, trunk in zip(batch, encoded.vectors, trunks, strict=True)
    ]


def enhance(reco: Reco, side: Side, batch: Sequence[Seen]) -> list[EmbeddedItem]:
    """The second stage: one row each, in order. Items may pin different snapshots, or none, and come of one batch."""
    by_snapshot: dict[Snapshot | None, list[int]] = {}
    for i, seen in enumerate(batch):
        by_snapshot.setdefault(seen.query.snapshot, []).append(i)
    rows: dict[int, EmbeddedItem] = {}
    for snapshot, members in by_snapshot.items():
        mine = [batch[i] for i in members]
        queries, trunks = [seen.query for seen in mine], [seen.trunk for seen in mine if seen.trunk is not None]
        found = reco.enhance(
            Encoded(np.stack([seen.plain for seen in mine]), np.stack(trunks) if trunks else None),
            side,
            snapshot,
            np.array([query.k for query in queries]),
            SearchParams.stack([query.params for query in queries]),
        )
        found = replace(found, timings=replace(found.timings, encode=mine[0].encode_s))
        rows.update((i, _row(found, j, seen)) for j, (i, seen) in enumerate(zip(members, mine, strict=True)))
    return [rows[i] for i in range(len(batch))]


def _row(found: EmbeddedBatch, j: int, seen: Seen) -> EmbeddedItem:
    shown: list[dict[str, Any]] = []
    if seen.query.neighbors and found.neighbors is not None and found.weights is not None:
        weights, scores = found.weights[j], found.neighbors.scores[j]
        shown = [
            {
                **{OWN.get(name, name): value for name, value in record.items()},
                "score": float(score),
                "weight": float(weight),
            }
            for record, score, weight in zip(
                found.neighbors.records(j), scores, weights, strict=False
            )  # records: the present ones, first
        ]
    nearest = float(found.neighbors.scores[j, 0]) if found.neighbors is not None and found.enhanced[j] else None
    return EmbeddedItem(
        found.vectors[j], found.plain[j], seen.trunk, found.neighbors is not None, nearest, shown, found.timings
    )
