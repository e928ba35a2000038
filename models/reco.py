"""RECO: a CLIP embedding is refined by what it retrieves from a memory. Encode -> retrieve -> fuse.

    images or texts ─ encode ─> v (B, D) ─┬─────────────────────────────────┬─ fuse ─> unit (B, D)
                                          └─ retrieve ─> values (B, K, D) ──┘

Search is uni-modal: v is compared with the memory's vectors of its own side, an image with images.
Fusion is cross-modal: the values are the other side of the K nearest pairs, for an image their
captions, because that side adds what v lacks. The encoder is frozen, the fusion is small and
trained, and the memory may change at any time. Method: Iscen et al., ICLR 2024, arXiv 2306.07196.

Training, evaluation and serving all call this module.
Alphabet: B batch, K neighbours, D width, C labels, T templates.
"""

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

LABEL_BATCH = 256  # prompts per batch when labels are embedded


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds that each stage took for the whole batch."""

    encode: float = 0.0
    retrieve: float = 0.0
    fuse: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddedBatch:
    """The result of embedding a batch.

    vectors, plain: (B, D) float32 unit, the refined vectors and CLIP's own.
    enhanced: (B,) bool, True where at least one neighbour was found.
    neighbors, weights, memory: the pairs used, the attention paid to them (B, K) float32, and the
    memory's "name@version"; all None where no memory was searched.
    """

    vectors: np.ndarray
    plain: np.ndarray
    enhanced: np.ndarray
    neighbors: Neighbors | None
    weights: np.ndarray | None
    memory: str | None
    timings: Timings

    def row(self, i: int) -> "EmbeddedBatch":
        """Item i as a batch of one; the timings stay those of the whole batch."""
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
    """Which side of the memory is searched, and which side's vectors are fused.

    The defaults are the paper's.
    search: "uni" compares an image with images and a text with texts, "cross" with the other side.
    fuse: "cross" fuses the vectors of the side that the query is not on, "uni" those of its own
    side, "both" all of them.
    """

    search: Literal["uni", "cross"] = "uni"
    fuse: Literal["cross", "uni", "both"] = "cross"

    def searched_side(self, query: Side) -> Side:
        """The side of the memory with which a query is compared."""
        return query if self.search == "uni" else other(query)

    def value_sides(self, query: Side) -> Sequence[Side]:
        """The sides of the pairs found whose vectors are fused into a query."""
        sides: dict[str, Sequence[Side]] = {"cross": (other(query),), "uni": (query,), "both": (other(query), query)}
        return sides[self.fuse]


PAPER_MODE = RetrievalMode()


class Reco:
    """A frozen encoder and one fusion per side.

    It holds no memory: the caller passes a snapshot with each batch.
    fusion_id: 12 hex digits of the fusions' weights.  k: neighbours by default.  max_k: at most.
    Raises ConfigError where k is out of range or a fusion has another width than the encoder.
    """

    def __init__(self, encoder: Encoder, fusions: Mapping[Side, Fusion], fusion_id: str, k: int) -> None:
        self.encoder = encoder
        self.fusions = {side: fusion.to(encoder.device).eval() for side, fusion in fusions.items()}
        self.fusion_id = fusion_id
        self.k = k
        self.max_k = min(fusion.config.max_k for fusion in fusions.values())
        self._check_k(k)
        for fusion in fusions.values():
            if fusion.config.dim != encoder.dim:
                raise ConfigError(
                    f"a fusion of width {fusion.config.dim} cannot refine vectors of width {encoder.dim}: "
                    "use its encoder"
                )

    def embed(
        self,
        batch: np.ndarray,
        side: Side,
        snapshot: Snapshot | None,
        k: int | np.ndarray | None = None,
        params: SearchParams = DEFAULT_PARAMS,
    ) -> EmbeddedBatch:
        """Encode a batch and refine its vectors.

        batch: as in `Encoder.encode`.  Other arguments and errors: as in `enhance`.
        """
        start = time.perf_counter()
        encoded = self.encode(batch, side)
        encode_s = time.perf_counter() - start
        embedded = self.enhance(encoded, side, snapshot, k, params)
        return replace(embedded, timings=replace(embedded.timings, encode=encode_s))

    def encode(self, batch: np.ndarray, side: Side) -> Encoded:
        """Compute the plain CLIP vectors of a batch, as `Encoder.encode`."""
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
        """Refine plain vectors with the pairs that a snapshot holds near them.

        The vectors stay plain where the snapshot is None or the fusion ignores its neighbours.
        k: neighbours, one number or one per row (B,); None = `self.k`.
        Raises, before anything is computed, IncompatibleSnapshot for a snapshot built by another
        encoder and ConfigError for k out of range.
        """
        plain = encoded.vectors  # (B, D)
        if snapshot is None or not self.fusions[side].refines:
            return EmbeddedBatch(plain, plain, np.zeros(len(plain), bool), None, None, None, Timings())
        self._check_encoder_of(snapshot)
        start = time.perf_counter()
        neighbors = self._retrieve(encoded, side, snapshot, self.k if k is None else k, params, mode)
        retrieved = time.perf_counter()
        fused = self._fuse(plain, neighbors, side)
        timings = Timings(retrieve=retrieved - start, fuse=time.perf_counter() - retrieved)
        vectors, weights = fused.vectors.cpu().numpy(), fused.weights.cpu().numpy()  # (B, D), (B, K)
        enhanced = np.asarray(neighbors.mask.any(axis=1))
        return EmbeddedBatch(vectors, plain, enhanced, neighbors, weights, snapshot.ref, timings)

    def _retrieve(
        self,
        encoded: Encoded,
        side: Side,
        snapshot: Snapshot,
        k: int | np.ndarray,
        params: SearchParams,
        mode: RetrievalMode,
    ) -> Neighbors:
        """Find the k nearest pairs of each row; K is the largest k, the others are masked."""
        row_k = np.broadcast_to(np.asarray(k), (len(encoded.vectors),))  # (B,)
        smallest, largest = int(row_k.min(initial=1)), int(row_k.max(initial=1))
        self._check_k(largest if largest > self.max_k else smallest)
        searched = mode.searched_side(side)
        if searched != side and snapshot.key_kind(searched) != "vector":
            raise ConfigError(
                f"{snapshot.ref} compares {searched} features before projection: "
                "a cross search needs a memory with vector keys"
            )
        keys = encoded.key(snapshot.key_kind(searched))  # (B, Dk)
        found = [
            snapshot.retrieve(keys, searched, largest, params, values="same" if value_side == searched else "other")
            for value_side in mode.value_sides(side)
        ]
        within_k = np.arange(found[0].mask.shape[1]) < row_k[:, None]  # (B, K)
        if not within_k.all():
            found = [_mask_neighbors(neighbors, within_k) for neighbors in found]
        return found[0] if len(found) == 1 else found[0].concatenate(found[1])

    def _fuse(self, plain: np.ndarray, neighbors: Neighbors, side: Side) -> Fused:
        """Refine vectors (B, D) on the encoder's device, in float32."""
        device = self.encoder.device
        query = torch.from_numpy(plain).to(device)  # (B, D)
        values = torch.from_numpy(neighbors.values).to(device, torch.float32)  # (B, K, D)
        scores, mask = (torch.from_numpy(array).to(device) for array in (neighbors.scores, neighbors.mask))  # (B, K)
        with torch.inference_mode():
            fused: Fused = self.fusions[side](query, values, scores, mask)
            return fused

    def search(
        self, encoded: Encoded, side: Side, snapshot: Snapshot, k: int, params: SearchParams = DEFAULT_PARAMS
    ) -> Hits:
        """Find the rows of the snapshot that `enhance` would fuse, without reading their values.

        For training, which searches once and fuses many times. Raises as `enhance`.
        """
        self._check_encoder_of(snapshot)
        self._check_k(k)
        return snapshot.search(encoded.key(snapshot.key_kind(side)), side, k, params)

    def embed_labels(
        self, labels: Sequence[str], templates: Sequence[str], snapshot: Snapshot | None, k: int | None = None
    ) -> np.ndarray:
        """Embed class labels for zero-shot classification: (C, D) float32 unit.

        Each vector is the mean of the label's refined prompts: one per template, with the label in
        place of every "{}".
        """
        prompts = [template.replace("{}", label) for label in labels for template in templates]  # C*T
        batches = [self.encoder.tokenize(prompts[at : at + LABEL_BATCH]) for at in range(0, len(prompts), LABEL_BATCH)]
        vectors = np.concatenate([self.embed(tokens, "text", snapshot, k).vectors for tokens in batches])  # (C*T, D)
        means = vectors.reshape(len(labels), len(templates), -1).mean(1)  # (C, D)
        unit: np.ndarray = F.normalize(torch.from_numpy(means), dim=-1).numpy()
        return unit

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.max_k:
            raise ConfigError(f"k = {k} is outside 1 to {self.max_k}, what this fusion takes: choose a k within")

    def _check_encoder_of(self, snapshot: Snapshot) -> None:
        if not same_encoder(snapshot.manifest.encoder, self.encoder.fingerprint):
            raise IncompatibleSnapshot(
                f"{snapshot.ref} was built by {snapshot.manifest.encoder}, this service encodes with "
                f"{self.encoder.fingerprint}: rebuild it, or serve its encoder"
            )


def _mask_neighbors(neighbors: Neighbors, keep: np.ndarray) -> Neighbors:
    """The same neighbours, absent where `keep` (B, K) bool is False."""
    mask = neighbors.mask & keep
    ids, scores = (np.where(mask, array, np.zeros_like(array)) for array in (neighbors.ids, neighbors.scores))
    return replace(neighbors, ids=ids, scores=scores, values=neighbors.values * mask[..., None], mask=mask)
