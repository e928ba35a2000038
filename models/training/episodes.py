"""What a fusion learns from: training pairs whose neighbours in some memory have been looked up
once. Arrays only.

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

BLOCK = 4096  # training pairs looked up in one search: a second of work, and what a kill may cost
SPREAD = 20_000  # vectors of an episode that tell how those of a modality vary


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """One side of M pairs and what the memory returned.

    Any of the arrays may be mapped from a file.

    query: (M, D) float.  known: (U, D) float16, every vector that any pair found, once.  rows: (M,
    K) int64 into known, -1 = absent.
    scores: (M, K) float32, 0 where absent.
    """

    query: np.ndarray
    known: np.ndarray
    rows: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, query: np.ndarray, found: Hits, snapshot: Snapshot, side: Side) -> "Lookup":
        """With the vectors of the other side gathered from the memory.  query: (M, D) float.
        found: (M, K).
        """
        distinct, rows = compacted(found)
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

    photo, caption: (M,) int; pairs that share either must not repel each other.
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
        """(learned, held out): whole photos are held out, never one caption of a photo that is
        learned.

        DataError where either holds a single caption or none: nothing could be told apart.
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
class Asking:
    """How training pairs ask a memory, as serving would.

    k: neighbours.  limits: per side, nearer ones are passed over.
    """

    snapshot: Snapshot
    reco: Reco
    k: int
    limits: Mapping[Side, float | None]

    def find(self, encoded: Encoded, side: Side, own: Sequence[Collection[Id]]) -> Hits:
        """What the memory returns, (B, K).  encoded: float16 or float32.  own: for each query the
        ids that it must not find.
        """
        wide = Encoded(to_float32(encoded.vectors), None if encoded.trunk is None else to_float32(encoded.trunk))
        ceiling = self.limits.get(side)
        limit = math.inf if ceiling is None else ceiling
        return self.reco.search(wide, side, self.snapshot, self.k, SearchParams(max_similarity=limit, exclude=own))


def covariance(episodes: Sequence[Episode], side: Side) -> Tensor:
    """(D, D) float32: how the vectors of one modality vary, those that ask and those that are
    found, every episode counting alike.
    """
    found = []
    for episode in episodes:
        both = (
            episode.lookups[side].query,
            episode.lookups[other(side)].known,
        )  # (M, D), (U, D): what is found is on the other side
        seen = np.concatenate([vectors[:: 1 + len(vectors) // SPREAD] for vectors in both]).astype(np.float32)
        found.append(torch.from_numpy(seen).T.cov(correction=0))
    return torch.stack(found).mean(0)


def look_up(
    name: str, pairs: Pairs, snapshot: Snapshot, reco: Reco, k: int, max_similarity: Mapping[Side, float | None]
) -> Episode:
    """Ask the memory once for each training pair, all of them in memory; `prepared` does it on
    disk.

    A pair never finds itself: its own id, the other captions of its photo (ids that differ after
    "#") and, where `max_similarity` is given for a side, everything nearer than that are passed
    over.
    """
    if not len(pairs):
        raise DataError(f"{name}: no pair to learn from")
    asking, photo = Asking(snapshot, reco, k, max_similarity), photos(pairs.ids)
    own, lookups = siblings(pairs.ids, photo), dict[Side, Lookup]()
    for side in SIDES:
        vectors, trunk = pairs.values(side), pairs.keys(side) if pairs.has_own_keys(side) else None
        blocks = [slice(start, start + BLOCK) for start in range(0, len(pairs), BLOCK)]
        found = [
            asking.find(Encoded(vectors[rows], None if trunk is None else trunk[rows]), side, own[rows])
            for rows in blocks
        ]
        lookups[side] = Lookup.of(vectors, stacked(found), snapshot, side)
    return Episode(name, lookups, photo, numbered([str(record["caption"]) for record in pairs.records]))


def photos(ids: np.ndarray) -> np.ndarray:
    """(M,) int64, equal for the captions of one photo, whose ids differ after "#".  ids: (M,) as
    given.
    """
    return numbered([str(key).rsplit("#", 1)[0] for key in ids.tolist()])


def siblings(ids: np.ndarray, photo: np.ndarray) -> list[list[Id]]:
    """For each pair the ids of its photo, its own among them."""
    sharing: dict[int, list[Id]] = {}
    for key, number in zip(ids.tolist(), photo.tolist(), strict=True):
        sharing.setdefault(number, []).append(key)
    return [sharing[number] for number in photo.tolist()]


def stacked(found: Sequence[Hits]) -> Hits:
    """Several blocks as one."""
    return Hits(np.concatenate([block.rows for block in found]), np.concatenate([block.scores for block in found]))


def compacted(found: Hits) -> tuple[np.ndarray, np.ndarray]:
    """(U,) int64, the rows of the memory that were found, and (M, K) int64, for each hit its place
    among them, -1 = absent.
    """
    # row 0 stands in for the absent
    distinct, place = np.unique(np.maximum(found.rows, 0), return_inverse=True)
    return distinct, np.where(found.mask, place.reshape(found.rows.shape), -1)


def joined(blocks: Sequence[Pairs]) -> Pairs:
    """Several blocks as one."""
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


def numbered(names: Sequence[str]) -> np.ndarray:
    """(M,) int64: equal names, equal numbers, in the order of the names."""
    number = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([number[name] for name in names], np.int64)
