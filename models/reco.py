"""RECO in one page: encode -> retrieve -> fuse. Training, evaluation and serving all come through here."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from index_store.errors import IncompatibleSnapshot
from index_store.neighbors import Neighbors
from index_store.search.filters import DEFAULT_PARAMS, SearchParams
from index_store.search.hits import Hits
from index_store.snapshot import Snapshot
from index_store.storage.manifest import same_encoder
from index_store.types import Side, other
from models.encoder.encoder import Encoded, Encoder
from models.errors import ConfigError
from models.fusion.fusion import Fused, Fusion


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent in each stage by the whole batch."""

    encode: float = 0.0
    retrieve: float = 0.0
    fuse: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedBatch:
    """What a batch became.

    vectors, plain: (B, D) float32 unit, the refined and CLIP's own.  enhanced: (B,) bool, True where a neighbour was found.
    neighbors, weights (B, K) and memory ("name@version"): what refined them; None where no memory was asked.
    """

    vectors: np.ndarray
    plain: np.ndarray
    enhanced: np.ndarray
    neighbors: Neighbors | None
    weights: np.ndarray | None
    memory: str | None
    timings: Timings

    def row(self, i: int) -> "EmbeddedBatch":
        """The i-th item alone, as a batch of one; the timings stay those of the whole batch."""
        one = slice(i, i + 1)
        return replace(
            self,
            vectors=self.vectors[one],
            plain=self.plain[one],
            enhanced=self.enhanced[one],
            neighbors=None if self.neighbors is None else self.neighbors.row(i),
            weights=None if self.weights is None else self.weights[one],
        )


@dataclass(frozen=True, slots=True)
class RetrievalMode:
    """Where neighbours are looked for, and what they bring; as it stands here it is RECO's own.

    search: "uni" an image among images, a text among texts; "cross" its vector among those of the other side.
    fuse: "cross" the found pairs' vectors of the side that the query is not on; "uni" of its own side; "both" all of these.
    """

    search: Literal["uni", "cross"] = "uni"
    fuse: Literal["cross", "uni", "both"] = "cross"

    def searched(self, side: Side) -> Side:
        """The side of the memory that a query on `side` is compared with."""
        return side if self.search == "uni" else other(side)

    def valued(self, side: Side) -> Sequence[Side]:
        """The sides whose vectors a query on `side` gets."""
        sides: dict[str, Sequence[Side]] = {"cross": (other(side),), "uni": (side,), "both": (other(side), side)}
        return sides[self.fuse]


PAPER_MODE = RetrievalMode()


class Reco:
    """A frozen encoder and its fusions. It holds no memory: the caller pins a snapshot and hands it over with each batch."""

    def __init__(self, encoder: Encoder, fusions: Mapping[Side, Fusion], fusion_id: str, k: int) -> None:
        self.encoder = encoder
        self.fusions = {side: fusion.to(encoder.device).eval() for side, fusion in fusions.items()}
        self.fusion_id = fusion_id
        self.k = k
        self.max_k = min(fusion.config.max_k for fusion in fusions.values())
        self._refuse_k(k)
        for fusion in fusions.values():
            if fusion.config.dim != encoder.dim:
                raise ConfigError(
                    f"a fusion of width {fusion.config.dim} cannot refine vectors of width {encoder.dim}: use its encoder"
                )

    def embed(
        self,
        batch: np.ndarray,
        side: Side,
        snapshot: Snapshot | None,
        k: int | np.ndarray | None = None,
        params: SearchParams = DEFAULT_PARAMS,
    ) -> EmbeddedBatch:
        """Encode a batch and refine it: `enhance(encode(batch))`, timed. batch as in `Encoder.encode`."""
        start = time.perf_counter()
        encoded = self.encode(batch, side)
        seconds = time.perf_counter() - start
        found = self.enhance(encoded, side, snapshot, k, params)
        return replace(found, timings=replace(found.timings, encode=seconds))

    def encode(self, batch: np.ndarray, side: Side) -> Encoded:
        """The plain vectors of a batch. batch as in `Encoder.encode`."""
        return self.encoder.encode(batch, side)

    def enhance(
        self,
        encoded: Encoded,
        side: Side,
        snapshot: Snapshot | None,
        k: int | np.ndarray | None = None,
        params: SearchParams = DEFAULT_PARAMS,
        *,
        mode: RetrievalMode = PAPER_MODE,
    ) -> EmbeddedBatch:
        """Refine vectors with what one snapshot holds near them; without one, or with a fusion that refines nothing, they stay plain.

        k: neighbours, one number or one per row (B,); None = the fusion's.
        A snapshot made by another encoder raises IncompatibleSnapshot before anything is computed.
        """
        plain = encoded.vectors
        if snapshot is None or not self.fusions[side].refines:
            return EmbeddedBatch(plain, plain, np.zeros(len(plain), bool), None, None, None, Timings())
        self._refuse_stranger(snapshot)
        start = time.perf_counter()
        neighbors = self._retrieve(encoded, side, snapshot, self.k if k is None else k, params, mode)
        middle = time.perf_counter()
        fused = self._fuse(plain, neighbors, side)
        timings = Timings(retrieve=middle - start, fuse=time.perf_counter() - middle)
        weights = fused.weights.cpu().numpy()
        enhanced = np.asarray(neighbors.mask.any(axis=1))
        return EmbeddedBatch(fused.vectors.cpu().numpy(), plain, enhanced, neighbors, weights, snapshot.ref, timings)

    def search(
        self,
        encoded: Encoded,
        side: Side,
        snapshot: Snapshot,
        k: int,
        params: SearchParams = DEFAULT_PARAMS,
    ) -> Hits:
        """Which rows of the snapshot `enhance` would refine these vectors with; for training, which fuses them again and again."""
        self._refuse_stranger(snapshot)
        self._refuse_k(k)
        return snapshot.search(encoded.key(snapshot.key_kind(side)), side, k, params)

    def embed_labels(
        self, labels: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None, k: int | None = None
    ) -> np.ndarray:
        """(C, D) float32 unit: for each label the mean of its refined prompts, every "{}" of a template filled with the label."""
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        blocks = [self.encoder.tokenize(prompts[at : at + 256]) for at in range(0, len(prompts), 256)]
        vectors = np.concatenate([self.embed(block, "text", snapshot, k).vectors for block in blocks])  # (C*T, D)
        means = vectors.reshape(len(labels), len(templates), -1).mean(1)  # (C, D)
        unit: np.ndarray = F.normalize(torch.from_numpy(means), dim=-1).numpy()
        return unit

    def _refuse_k(self, k: int) -> None:
        if not 1 <= k <= self.max_k:
            raise ConfigError(f"k = {k} is outside 1 to {self.max_k}, what this fusion takes: choose a k within")

    def _refuse_stranger(self, snapshot: Snapshot) -> None:
        if not same_encoder(snapshot.manifest.encoder, self.encoder.fingerprint):
            raise IncompatibleSnapshot(
                f"{snapshot.ref} was built by {snapshot.manifest.encoder}, this service encodes with {self.encoder.fingerprint}: "
                "rebuild it, or serve its encoder"
            )

    def _retrieve(
        self,
        encoded: Encoded,
        side: Side,
        snapshot: Snapshot,
        k: int | np.ndarray,
        params: SearchParams,
        mode: RetrievalMode,
    ) -> Neighbors:
        """The neighbours of each row, those beyond its own k masked away."""
        each = np.broadcast_to(np.asarray(k), (len(encoded.vectors),))  # (B,)
        least, most = int(each.min(initial=1)), int(each.max(initial=1))
        self._refuse_k(most if most > self.max_k else least)
        searched = mode.searched(side)
        if searched != side and snapshot.key_kind(searched) != "vector":
            raise ConfigError(
                f"{snapshot.ref} compares {searched} features before projection: a cross search needs a memory with vector keys"
            )
        key = encoded.key(snapshot.key_kind(searched))
        found = [
            snapshot.retrieve(key, searched, most, params, values="same" if valued == searched else "other")
            for valued in mode.valued(side)
        ]
        within = np.arange(found[0].mask.shape[1]) < each[:, None]  # (B, K)
        kept = [one if within.all() else _only(one, within) for one in found]
        return kept[0] if len(kept) == 1 else kept[0].concatenate(kept[1])

    def _fuse(self, plain: np.ndarray, neighbors: Neighbors, side: Side) -> Fused:
        """(B, D) refined, on the encoder's device, in float32 whatever the encoder's precision."""
        device = self.encoder.device
        values = torch.from_numpy(neighbors.values).to(device, torch.float32)
        tensors = (torch.from_numpy(array).to(device) for array in (neighbors.scores, neighbors.mask))
        with torch.inference_mode():
            return self.fusions[side].fuse(torch.from_numpy(plain).to(device), values, *tensors)


def _only(neighbors: Neighbors, within: np.ndarray) -> Neighbors:
    """The same search with only some neighbours present; the others become absent. within: (B, K) bool."""
    kept = neighbors.mask & within
    ids, scores = (np.where(kept, array, np.zeros_like(array)) for array in (neighbors.ids, neighbors.scores))
    return replace(neighbors, ids=ids, scores=scores, values=neighbors.values * kept[..., None], mask=kept)
