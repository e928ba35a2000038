"""Queries of an evaluation: encoded once, then enhanced under any setting.

Alphabet: N queries, D width, K neighbours.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from index_store.build.source import Reject
from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.types import Id, Side
from models.data.encode import OnProgress, encode_images
from models.data.samples import Sample
from models.encoder.encoder import Encoded, Encoder, concatenate_encoded
from models.errors import ConfigError, DataError
from models.reco import PAPER_MODE, Reco, RetrievalMode

Enhance = Literal["none", "image", "text", "both"]
ENHANCE: tuple[Enhance, ...] = ("none", "image", "text", "both")
BLOCK = 512  # queries refined at a time: 5 MB of neighbours each at K = 10, D = 256
NEAR_DUPLICATE = 0.98  # a memory photo nearer than this to the query is taken for the query itself


@dataclass(frozen=True, slots=True)
class Setting:
    """One way of querying the memory.

    k: neighbours, None = the fusion's.  image_limit, text_limit: neighbours with a greater cosine
    are skipped.
    dehub: weight of each candidate's hubness (NNN), which is subtracted from its scores.
    """

    enhance: Enhance = "both"
    k: int | None = None
    mode: RetrievalMode = PAPER_MODE
    image_limit: float | None = NEAR_DUPLICATE
    text_limit: float | None = None
    dehub: float = 0.0

    def enhances(self, side: Side) -> bool:
        """Whether queries on this side are refined."""
        return self.enhance in (side, "both")

    def params(self, side: Side, exclude: Sequence[Collection[Id]]) -> SearchParams:
        """The search parameters of B queries on one side.  exclude: B collections of ids."""
        limit = self.image_limit if side == "image" else self.text_limit
        return SearchParams(max_similarity=math.inf if limit is None else limit, exclude=exclude)

    def __str__(self) -> str:
        if self.enhance == "none":
            return "none" + (f", NNN {self.dehub:g}" if self.dehub else "")
        parts = [self.enhance, "" if self.k is None else f"k {self.k}"]
        parts.append("" if self.mode == PAPER_MODE else f"{self.mode.search} search, {self.mode.fuse} fusion")
        return ", ".join(part for part in (*parts, f"NNN {self.dehub:g}" if self.dehub else "") if part)


@dataclass(frozen=True, slots=True, eq=False)
class Queries:
    """N items of one side.

    own: per item the ids that it must not find: its own, and other captions of its photo.
    """

    encoded: Encoded
    own: Sequence[Collection[Id]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.own)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledPhotos:
    """N labelled photos, encoded once.  ids, labels: N strings."""

    ids: Sequence[str]
    labels: Sequence[str]
    queries: Queries
    rejects: Sequence[Reject]


def encode_photos(
    samples: Iterable[Sample | Reject],
    encoder: Encoder,
    *,
    labels: Collection[str] | None = None,
    batch: int = 32,
    on_progress: OnProgress = lambda _: None,
) -> LabelledPhotos:
    """Encode every readable photo; its caption is its label. A label that is not among `labels` is
    a reject.

    DataError where no image could be read.
    """
    rejects, kept, seen = list[Reject](), list[Sample](), list[Encoded]()
    known = (_check_label(item, labels) for item in samples)
    for some, encoded in encode_images(known, encoder, batch=batch, on_reject=rejects.append, on_progress=on_progress):
        kept += some
        seen.append(encoded)
    if not kept:
        raise DataError(
            f"no image could be read, {len(rejects)} were rejected: check the labels and the field that names them"
        )
    ids = [sample.id for sample in kept]
    return LabelledPhotos(
        ids, [sample.caption for sample in kept], Queries(concatenate_encoded(seen), [{name} for name in ids]), rejects
    )


def encode_prompts(prompts: Sequence[str], encoder: Encoder) -> Encoded:
    """(N, D) text vectors without any enhancement, encoded in blocks."""
    return concatenate_encoded(
        [encoder.encode(encoder.tokenize(prompts[at : at + BLOCK]), "text") for at in range(0, len(prompts), BLOCK)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class RefinedQueries:
    """Enhanced vectors of N queries.

    vectors: (N, D) float32 unit.  nearest: (N,) float32, the best neighbour's score, 0 without any.
    """

    vectors: np.ndarray
    nearest: np.ndarray


def refine(reco: Reco, queries: Queries, side: Side, snapshot: Snapshot, setting: Setting) -> RefinedQueries:
    """Enhance the queries under one setting, block by block. A side that the setting leaves out
    stays plain.

    ConfigError where k exceeds the number of pairs.
    """
    plain = queries.encoded.vectors
    if not setting.enhances(side):
        return RefinedQueries(plain, np.zeros(len(plain), np.float32))
    k = reco.k if setting.k is None else setting.k
    if k > len(snapshot):
        raise ConfigError(f"k = {k}, and {snapshot.ref} holds {len(snapshot)} pairs: ask for fewer neighbours")
    vectors, nearest = np.empty_like(plain), np.zeros(len(plain), np.float32)
    for at in range(0, len(plain), BLOCK):
        rows = slice(at, at + BLOCK)
        trunk = queries.encoded.trunk
        some = Encoded(plain[rows], None if trunk is None else trunk[rows])
        found = reco.enhance(some, side, snapshot, k, setting.params(side, queries.own[rows]), mode=setting.mode)
        vectors[rows] = found.vectors
        if found.neighbors is not None:
            nearest[rows] = found.neighbors.scores[:, 0]
    return RefinedQueries(vectors, nearest)


def _check_label(item: Sample | Reject, labels: Collection[str] | None) -> Sample | Reject:
    if isinstance(item, Sample) and labels is not None and item.caption not in labels:
        return Reject(item.id, f"its label {item.caption!r} is not among those asked for")
    return item
