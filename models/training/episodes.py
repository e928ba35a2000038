"""Training data of a fusion: pairs with their precomputed neighbours in a memory, as arrays.

Alphabet: M training pairs, K neighbours, U vectors that they found, D width, B batch.
"""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from index_store.float16 import to_float32
from index_store.search.filters import SearchParams
from index_store.search.hits import Hits
from index_store.snapshot import Snapshot
from index_store.types import SIDES, Id, Pairs, Side, other
from models.encoder.encoder import Encoded
from models.errors import DataError
from models.reco import Reco

BLOCK = 4096  # training pairs per search: a second of work, which is what a kill may cost
COVARIANCE_SAMPLE = 20_000  # vectors per episode that the covariance is computed from


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """One side of M pairs and their neighbours. Arrays may be memory-mapped.

    query: (M, D) float.  known: (U, D) float16, every distinct vector found.  rows: (M, K) int64
    into known, -1 = absent.
    scores: (M, K) float32, 0 where absent.
    """

    query: np.ndarray
    known: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, found: Hits, snapshot: Snapshot, side: Side) -> "Lookup":
        """With the other side's vectors read from the memory.

        query: (M, D) float.  found: (M, K).
        """
        distinct, rows = compact_hits(found)
        return cls(query, snapshot.vectors(distinct, other(side)), rows, found.scores)

    @property
    def k(self) -> int:
        """K, neighbours looked up."""
        return int(self.rows.shape[1])

    def nearest(self, k: int) -> "Lookup":
        """The same with only the k nearest neighbours."""
        return replace(self, rows=self.rows[:, :k], scores=self.scores[:, :k])

    def batch(self, rows: np.ndarray, kept: np.ndarray, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `Fusion.forward` for these rows; neighbours not in kept (B, K) count as
        absent.
        """
        found = self.rows[rows]  # (B, K)
        mask = (found >= 0) & kept
        arrays = (self.query[rows], self.known[np.maximum(found, 0)], self.scores[rows] * mask, mask)
        query, values, scores, present = (torch.from_numpy(array).to(device) for array in arrays)
        return query.float(), values.float() * present[..., None], scores, present


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """M pairs and one memory.

    photo, caption: (M,) int; pairs with an equal photo or caption are no negatives of each other.
    """

    name: str
    lookups: Mapping[Side, Lookup]
    photo: np.ndarray
    caption: np.ndarray

    def __len__(self) -> int:
        return len(self.photo)

    def digest(self) -> str:
        """12 hex digits of the queries and of what the memory returned."""
        found = hashlib.sha256(self.name.encode())
        for side, lookup in sorted(self.lookups.items()):
            found.update(side.encode())
            for array in (lookup.query, lookup.known, lookup.rows, lookup.scores):
                for start in range(0, len(array), BLOCK):
                    found.update(np.ascontiguousarray(array[start : start + BLOCK]).data)
        return found.hexdigest()[:12]

    def same(self, rows: np.ndarray) -> np.ndarray:
        """(B, B) bool: True where two rows share their photo or their caption."""
        photo, caption = (group[rows, None] == group[rows] for group in (self.photo, self.caption))
        return np.asarray(photo | caption)

    def split(self, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(training rows, held-out rows), split by photo.

        DataError where either part has fewer than two different captions.
        """
        photos = np.random.default_rng(seed).permutation(np.unique(self.photo))
        away = np.isin(self.photo, photos[: round(held_out * len(photos))])
        for part, rows in (("to learn from", np.flatnonzero(~away)), ("held out", np.flatnonzero(away))):
            captions = len(np.unique(self.caption[rows]))
            if captions < 2:
                raise DataError(
                    f"{self.name}: of {len(photos)} photos, {len(rows)} pairs {part} have {captions} different captions, 2 are needed: "
                    "give more pairs, a caption of their own, or another held_out"
                )
        return np.flatnonzero(~away), np.flatnonzero(away)


@dataclass(frozen=True, slots=True, eq=False)
class MemoryQuery:
    """Parameters with which training pairs query a memory, as in serving.

    k: neighbours.  limits: per side, neighbours with a greater cosine are skipped.
    """

    snapshot: Snapshot
    reco: Reco
    k: int
    limits: Mapping[Side, float | None]

    def find(self, encoded: Encoded, side: Side, own: Sequence[Collection[Id]]) -> Hits:
        """Neighbours, (B, K).

        encoded: float16 or float32.  own: per query the ids that it must not find.
        """
        wide = Encoded(to_float32(encoded.vectors), None if encoded.trunk is None else to_float32(encoded.trunk))
        ceiling = self.limits.get(side)
        limit = math.inf if ceiling is None else ceiling
        return self.reco.search(wide, side, self.snapshot, self.k, SearchParams(max_similarity=limit, exclude=own))


def covariance(episodes: Sequence[Episode], side: Side) -> Tensor:
    """(D, D) float32: covariance of one modality's vectors, queries and retrieved ones, averaged
    over episodes.
    """
    found = []
    for episode in episodes:
        both = (
            episode.lookups[side].query,
            episode.lookups[other(side)].known,
        )  # (M, D), (U, D): what is found is on the other side
        seen = np.concatenate([vectors[:: 1 + len(vectors) // COVARIANCE_SAMPLE] for vectors in both]).astype(
            np.float32
        )
        found.append(torch.from_numpy(seen).T.cov(correction=0))
    return torch.stack(found).mean(0)


def look_up(
    name: str, pairs: Pairs, snapshot: Snapshot, reco: Reco, k: int, max_similarity: Mapping[Side, float | None]
) -> Episode:
    """Query the memory for every training pair, in memory; `cache.look_up_prepared` does it on
    disk.

    A pair does not find its own id, other captions of its photo (ids that differ after "#"), or,
    where `max_similarity` has a value for a side, neighbours with a greater cosine. DataError
    without pairs.
    """
    if not len(pairs):
        raise DataError(f"{name}: no pair to learn from")
    asking, photo = MemoryQuery(snapshot, reco, k, max_similarity), photo_numbers(pairs.ids)
    own, lookups = ids_of_same_photo(pairs.ids, photo), dict[Side, Lookup]()
    for side in SIDES:
        vectors, trunk = pairs.values(side), pairs.keys(side) if pairs.has_own_keys(side) else None
        blocks = [slice(start, start + BLOCK) for start in range(0, len(pairs), BLOCK)]
        found = [
            asking.find(Encoded(vectors[rows], None if trunk is None else trunk[rows]), side, own[rows])
            for rows in blocks
        ]
        lookups[side] = Lookup.of(vectors, concatenate_hits(found), snapshot, side)
    return Episode(name, lookups, photo, number_names([str(record["caption"]) for record in pairs.records]))


def photo_numbers(ids: np.ndarray) -> np.ndarray:
    """(M,) int64, equal for the captions of one photo, whose ids differ after "#".

    ids: (M,).
    """
    return number_names([str(key).rsplit("#", 1)[0] for key in ids.tolist()])


def ids_of_same_photo(ids: np.ndarray, photo: np.ndarray) -> list[list[Id]]:
    """Per pair the ids of its photo, including its own."""
    sharing: dict[int, list[Id]] = {}
    for key, number in zip(ids.tolist(), photo.tolist(), strict=True):
        sharing.setdefault(number, []).append(key)
    return [sharing[number] for number in photo.tolist()]


def concatenate_hits(found: Sequence[Hits]) -> Hits:
    """Concatenate blocks of hits."""
    return Hits(np.concatenate([block.rows for block in found]), np.concatenate([block.scores for block in found]))


def compact_hits(found: Hits) -> tuple[np.ndarray, np.ndarray]:
    """(U,) int64, the distinct rows found, and (M, K) int64, each hit's index into them, -1 =
    absent.
    """
    # row 0 stands in for the absent
    distinct, place = np.unique(np.maximum(found.rows, 0), return_inverse=True)
    return distinct, np.where(found.mask, place.reshape(found.rows.shape), -1)


def concatenate_pairs(blocks: Sequence[Pairs]) -> Pairs:
    """Concatenate blocks of pairs."""
    own = {
        f"{side}_key": np.concatenate([block.keys(side) for block in blocks])
        for side in SIDES
        if blocks[0].has_own_keys(side)
    }
    return Pairs(
        ids=np.concatenate([block.ids for block in blocks]),
        image=np.concatenate([block.image for block in blocks]),
        text=np.concatenate([block.text for block in blocks]),
        records=[record for block in blocks for record in block.records],
        **own,
    )


def number_names(names: Sequence[str]) -> np.ndarray:
    """(M,) int64: equal names get equal numbers, in sorted order."""
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], np.int64)
