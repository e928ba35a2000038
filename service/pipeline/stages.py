"""The stages that run in the model threads: encode a batch of items, then retrieve and fuse.

A batch holds items of many requests: encoded together, then enhanced snapshot by snapshot.
"""

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

# fields of a record that have the name of a field of the reply's own
RENAMED_FIELDS = {"score": "source_score", "weight": "source_weight"}


@dataclass(frozen=True, slots=True)
class Items:
    """What a request wants embedded: images or texts, one of the two is empty.

    images: encoded bytes, or why an image cannot be read.  texts: as they were sent.
    """

    images: Sequence[bytes | ItemRefused]
    texts: Sequence[str]

    @property
    def side(self) -> Side:
        """The tower that the items go through."""
        return "image" if self.images else "text"


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """What one request wants of every item.

    snapshot: pinned once per request, so that no reply mixes two versions; None = the plain vector.
    params: the search parameters of one item (B = 1).
    """

    snapshot: Snapshot | None
    k: int
    params: SearchParams
    neighbors: bool


@dataclass(frozen=True, slots=True, eq=False)
class QueuedItem:
    """One item of a batch. array: (3, H, W) uint8 pixels or (L,) int64 tokens."""

    array: np.ndarray
    query: Query


@dataclass(frozen=True, slots=True, eq=False)
class EncodedItem:
    """One item after the first stage.

    plain: (D,) float32 unit.  trunk: (Dt,) float32 unit, None where the encoder has no trunk key.
    encode_s: seconds of the batch it was encoded in.
    """

    query: Query
    plain: np.ndarray
    trunk: np.ndarray | None
    encode_s: float


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedItem:
    """One item after both stages.

    vector, plain: (D,) float32 unit.  trunk: (Dt,) float32 unit or None.
    searched: whether a memory was asked.  similarity: of the nearest neighbour, None without one.
    neighbors: as the reply shows them.
    """

    vector: np.ndarray
    plain: np.ndarray
    trunk: np.ndarray | None
    searched: bool
    similarity: float | None
    neighbors: list[dict[str, Any]]
    timings: Timings

    @property
    def enhanced(self) -> bool:
        """Whether any neighbour changed the vector."""
        return self.similarity is not None


@dataclass(frozen=True, slots=True, eq=False)
class EmbedResult:
    """Items or refusals in the order of the request, and the seconds of each stage, the slowest
    item's.

    tokens: of all texts, without padding.
    """

    rows: Sequence[EmbeddedItem | ItemRefused]
    seconds: dict[Stage, float]
    tokens: int = 0


def slowest_stages(parts: Sequence[EmbedResult]) -> dict[Stage, float]:
    """Seconds of each stage that any part of a request went through, the slowest part's."""
    stages = dict.fromkeys(stage for part in parts for stage in part.seconds)
    return {stage: max(part.seconds.get(stage, 0.0) for part in parts) for stage in stages}


def encode(reco: Reco, side: Side, batch: Sequence[QueuedItem]) -> list[EncodedItem]:
    """The first stage: encode all items of a batch together."""
    start = time.perf_counter()
    encoded = reco.encode(np.stack([item.array for item in batch]), side)
    encode_s = time.perf_counter() - start
    trunks = [None] * len(batch) if encoded.trunk is None else list(encoded.trunk)
    return [
        EncodedItem(item.query, plain, trunk, encode_s)
        for item, plain, trunk in zip(batch, encoded.vectors, trunks, strict=True)
    ]


def enhance(reco: Reco, side: Side, batch: Sequence[EncodedItem]) -> list[EmbeddedItem]:
    """The second stage: retrieve and fuse, one result per item, in order.

    The items of a batch may pin different snapshots, or none; each snapshot is searched once.
    """
    by_snapshot: dict[Snapshot | None, list[int]] = {}
    for i, item in enumerate(batch):
        by_snapshot.setdefault(item.query.snapshot, []).append(i)
    results: dict[int, EmbeddedItem] = {}
    for snapshot, places in by_snapshot.items():
        items = [batch[i] for i in places]
        queries, trunks = [item.query for item in items], [item.trunk for item in items if item.trunk is not None]
        found = reco.enhance(
            Encoded(np.stack([item.plain for item in items]), np.stack(trunks) if trunks else None),
            side,
            snapshot,
            np.array([query.k for query in queries]),
            SearchParams.stack([query.params for query in queries]),
        )
        found = replace(found, timings=replace(found.timings, encode=items[0].encode_s))
        results.update((i, _embedded_item(found, j, batch[i])) for j, i in enumerate(places))
    return [results[i] for i in range(len(batch))]


def _embedded_item(found: EmbeddedBatch, j: int, item: EncodedItem) -> EmbeddedItem:
    """Row j of a batch. item: what the row was before it was enhanced."""
    searched = found.neighbors is not None
    nearest = float(found.neighbors.scores[j, 0]) if found.neighbors is not None and found.enhanced[j] else None
    neighbors = _describe_neighbors(found, j) if item.query.neighbors else []
    return EmbeddedItem(found.vectors[j], found.plain[j], item.trunk, searched, nearest, neighbors, found.timings)


def _describe_neighbors(found: EmbeddedBatch, j: int) -> list[dict[str, Any]]:
    """The neighbours of row j as the reply shows them, nearest first."""
    if found.neighbors is None or found.weights is None:
        return []
    # records holds the present neighbours alone, which come first
    rows = zip(found.neighbors.records(j), found.neighbors.scores[j], found.weights[j], strict=False)
    return [
        {
            **{RENAMED_FIELDS.get(name, name): value for name, value in record.items()},
            "score": float(score),
            "weight": float(weight),
        }
        for record, score, weight in rows
    ]
