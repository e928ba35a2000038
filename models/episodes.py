"""What a fusion learns from: training pairs whose neighbours in some memory have been looked up once. Arrays only.

Alphabet: M training pairs, K neighbours, D width, B batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from index_store.pairs import SIDES, Pairs, Side
from index_store.snapshot import Snapshot
from models.clip import Encoded
from models.errors import DataError
from models.reco import Reco

BLOCK = 1024  # training pairs looked up in one search


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """One side of M pairs and what the memory returned.

    query: (M, D) float32.  values: (M, K, D) float16.  scores: (M, K) float32.  mask: (M, K) bool, True = present.
    """

    query: np.ndarray
    values: np.ndarray
    scores: np.ndarray
    mask: np.ndarray

    def batch(self, rows: np.ndarray, kept: np.ndarray, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The arguments of `Fusion.forward` for these rows; neighbours not in kept (B, K) count as absent."""
        mask = self.mask[rows] & kept
        arrays = (self.query[rows], self.values[rows].astype(np.float32) * mask[..., None], self.scores[rows] * mask, mask)
        query, values, scores, present = (torch.from_numpy(array).to(device) for array in arrays)
        return query, values, scores, present


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
            for array in (lookup.query, lookup.values, lookup.mask):
                found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:12]

    def same(self, rows: np.ndarray) -> np.ndarray:
        """(B, B) bool: True where two rows share their photo or their caption."""
        photo, caption = (group[rows, None] == group[rows] for group in (self.photo, self.caption))
        return np.asarray(photo | caption)

    def split(self, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """(learned, held out): whole photos are held out, never one caption of a photo that is learned."""
        photos = np.random.default_rng(seed).permutation(np.unique(self.photo))
        away = np.isin(self.photo, photos[: round(held_out * len(photos))])
        return np.flatnonzero(~away), np.flatnonzero(away)


def look_up(name: str, pairs: Pairs, snapshot: Snapshot, reco: Reco, k: int, max_similarity: Mapping[Side, float | None]) -> Episode:
    """Ask the memory once for each training pair, as serving would.

    A pair never finds itself: its own id, the other captions of its photo (ids that differ after "#") and, where `max_similarity`
    is given for a side, everything nearer than that are passed over.
    """
    if not len(pairs):
        raise DataError(f"{name}: no pair to learn from")
    photo = _numbered([str(key).rsplit("#", 1)[0] for key in pairs.ids.tolist()])
    siblings: dict[int, list[str | int]] = {}
    for key, number in zip(pairs.ids.tolist(), photo.tolist(), strict=True):
        siblings.setdefault(number, []).append(key)
    own = [siblings[number] for number in photo.tolist()]
    lookups = {side: _lookup(pairs, side, snapshot, reco, k, max_similarity.get(side), own) for side in SIDES}
    return Episode(name, lookups, photo, _numbered([str(record["caption"]) for record in pairs.records]))


def joined(blocks: Sequence[Pairs]) -> Pairs:
    """Several blocks as one."""
    own = {f"{side}_key": np.concatenate([block.keys(side) for block in blocks]) for side in SIDES if blocks[0].has_own_keys(side)}
    return Pairs(
        ids=np.concatenate([block.ids for block in blocks]),
        image=np.concatenate([block.image for block in blocks]),
        text=np.concatenate([block.text for block in blocks]),
        records=[record for block in blocks for record in block.records],
        **own,
    )


def _lookup(pairs: Pairs, side: Side, snapshot: Snapshot, reco: Reco, k: int, limit: float | None, own: list[list[str | int]]) -> Lookup:
    plain = pairs.values(side).astype(np.float32)
    key = pairs.keys(side).astype(np.float32)
    blocks = []
    for at in range(0, len(pairs), BLOCK):
        rows = slice(at, at + BLOCK)
        encoded = Encoded(plain[rows], key[rows] if pairs.has_own_keys(side) else None)
        found = reco.enhance(encoded, side, snapshot, k, max_similarity=limit, exclude=own[rows]).neighbors
        if found is not None:
            blocks.append((found.values.astype(np.float16), found.scores, found.mask))
    values, scores, mask = (np.concatenate(part) for part in zip(*blocks, strict=True))
    return Lookup(plain, values, scores, mask)


def _numbered(names: list[str]) -> np.ndarray:
    """(M,) int64: equal names, equal numbers."""
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)
