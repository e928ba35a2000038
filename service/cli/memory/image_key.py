"""`--image-key auto`: whether an image search by trunk features or by vectors finds neighbours
whose captions agree, measured on a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from index_store.types import KeyKind
    from models.data.samples import Part, Sample
    from models.data.streams import Encoding
    from service.cli.memory.plan import Plan

SAMPLE = 256  # images that are encoded for the measurement
LEAST = 24  # of them: with fewer the vectors are searched
NEAREST = 5  # neighbours whose captions are compared

Planned = Callable[["KeyKind"], "tuple[Plan, Encoding]"]


def choose_image_key(plan: Plan, opened: Sequence[Any], planned: Planned) -> tuple[KeyKind, dict[str, Any]]:
    """The image key, and why.

    An unfinished build of the same sources keeps its key. Else the mean cosine between the caption
    of an image and the captions of its nearest images decides, vectors where the difference is
    within its standard error.
    """
    if any(isinstance(found, Path) for found in opened):
        return "vector", {"chosen": "vector", "why": "image key vector: a finished version is among the sources"}
    if not plan.encoder.trunk_dim:
        return "vector", {"chosen": "vector", "why": "image key vector: the encoder has no trunk features"}
    for kind in _unfinished_kinds(planned):
        return kind, {"chosen": kind, "why": f"image key {kind}: the unfinished build has it"}
    parts = [part for found in opened for part in found[0]]
    samples = islice(sample_photos(parts, sum(found[1] for found in opened)), SAMPLE)
    return _measured(samples, planned("trunk")[1])


def _unfinished_kinds(planned: Planned) -> Iterator[KeyKind]:
    """The kinds with which an interrupted build could be gone on from."""
    from index_store.build.checkpoint import unfinished_version
    from service.cli.memory.plan import Tally, build_source

    for kind in ("trunk", "vector"):
        plan, _ = planned(kind)
        source = build_source(plan, Tally(), None)
        digest = source.digest(
            encoder=plan.encoder.fingerprint, kinds=dict(plan.kinds), shard_pairs=plan.options.shard_pairs
        )
        if not plan.options.fresh and unfinished_version(plan.store.root / plan.name, source, digest):
            yield kind


def sample_photos(parts: Sequence[Part], items: int) -> Iterator[Sample]:
    """About SAMPLE of the samples, chosen by their ids, with their images."""
    from models.data.samples import Sample

    stride = max(1, -(-items // SAMPLE))  # rounded up, so that the first SAMPLE are of all sources

    def passed_over(origin: str, name: str) -> bool:
        return zlib.crc32(name.encode("utf-8", "replace")) % stride != 0

    for part in parts:
        for item in part.read(passed_over):
            if isinstance(item, Sample) and item.image and not passed_over(item.origin, item.id):
                yield item


def _measured(samples: Iterable[Sample], encoding: Encoding) -> tuple[KeyKind, dict[str, Any]]:
    from models.data.encode import encode_images, encode_texts
    from models.encoder.encoder import concatenate_encoded

    kept, blocks = list[tuple[str, str]](), []  # ids and captions: the images are let go
    encoder, batch = encoding.encoder, encoding.batch
    for some, encoded in encode_images(samples, encoder, batch=batch, workers=encoding.workers):
        kept += [(sample.id, sample.caption) for sample in some]
        blocks.append(encoded)
    captions = [caption for _, caption in kept]
    if len(kept) < LEAST or len(set(captions)) < 2:
        why = f"image key vector: {len(kept)} photos with {len(set(captions))} captions are too few to measure"
        return "vector", {"chosen": "vector", "why": why}
    images = concatenate_encoded(blocks)
    texts = np.concatenate(
        [encode_texts(captions[at : at + batch], encoder).vectors for at in range(0, len(captions), batch)]
    )
    agreement = texts @ texts.T  # (S, S)
    names = np.unique([name.rpartition("#")[0] or name for name, _ in kept], return_inverse=True)[1]
    vector, trunk = (_agreement(keys, agreement, names) for keys in (images.key("vector"), images.key("trunk")))
    gain = trunk - vector  # (S,)
    kind: KeyKind = "trunk" if gain.mean() > gain.std() / np.sqrt(len(gain)) else "vector"
    figures = {"sample": len(kept), "trunk": round(float(trunk.mean()), 4), "vector": round(float(vector.mean()), 4)}
    why = (
        f"image key {kind}: over {len(kept)} photos the captions of the {NEAREST} nearest agree by "
        f"{figures['trunk']:.3f} with trunk keys, by {figures['vector']:.3f} with vectors (mean cosine)"
    )
    return kind, {"chosen": kind, **figures, "why": why}


def _agreement(keys: np.ndarray, agreement: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """(S,) mean agreement of the captions of each image's nearest others.  keys: (S, Dk) unit."""
    scores = keys @ keys.T
    scores[photo[:, None] == photo[None, :]] = -np.inf
    nearest = np.argsort(-scores, axis=1)[:, : min(NEAREST, len(keys) - 1)]
    return np.asarray(np.take_along_axis(agreement, nearest, axis=1).mean(axis=1))
