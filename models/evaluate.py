"""How much the memory helps: zero-shot classification of labelled images, plain against enhanced, beside what one would try instead."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from index_store.snapshot import Snapshot
from index_store.steps import Reject
from models.errors import DataError
from models.metrics import class_means, top_k_hits
from models.prepare import OnProgress, encode_images
from models.reco import Reco
from models.samples import Sample

TEMPLATES = ("a photo of a {}.",)
NEAREST = 50  # neighbours looked at for five different labels
BASELINE_PAIRS = 50_000  # a larger memory is not read whole for the class means


@dataclass(frozen=True, slots=True)
class Line:
    """One way of classifying. top1, top5: how many images were right."""

    method: str
    top1: int
    top5: int


@dataclass(frozen=True, slots=True)
class ClassifyReport:
    """Every method on the same images. images: how many were classified; rejects: those that could not be."""

    memory: str
    fusion: str
    k: int
    labels: int
    images: int
    rejects: Sequence[Reject]
    lines: Sequence[Line]

    def table(self) -> str:
        """The report as text, every share with its counts."""
        counts = f"{self.images} images · {self.labels} labels · {len(self.rejects)} rejected"
        title = f"{self.memory} · fusion {self.fusion} · k {self.k} · {counts}"
        lines = [f"{line.method:<20}{self._share(line.top1):>22}{self._share(line.top5):>22}" for line in self.lines]
        return "\n".join([title, f"{'enhanced':<20}{'top-1':>22}{'top-5':>22}", *lines])

    def _share(self, right: int) -> str:
        return f"{100 * right / self.images:.1f} % ({right} of {self.images})"


def classify(
    reco: Reco,
    samples: Iterable[Sample | Reject],
    snapshot: Snapshot,
    *,
    labels: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
    k: int | None = None,
    label_field: str = "class",
    batch: int = 32,
    on_progress: OnProgress = lambda _: None,
) -> ClassifyReport:
    """Classify every image with none, the image, the text or both sides enhanced; no image retrieves itself, by id.

    samples: the caption of each is its true label: read_samples(tar, caption="{class}") gives them so.
    label_field: what the memory's records call a label; without it the two baselines are left out.
    """
    k = reco.k if k is None else k
    rejects: list[Reject] = []
    plain, enhanced = (reco.embed_labels(labels, templates, memory, k) for memory in (None, snapshot))  # (C, D) each
    baselines = _Baselines.of(snapshot, labels, label_field)
    right, images = Counter[tuple[str, int]](), 0
    known = _labelled(samples, set(labels))
    for kept, seen in encode_images(known, reco.encoder, batch=batch, on_reject=rejects.append, on_progress=on_progress):
        own = [{sample.id} for sample in kept]
        found = reco.enhance(seen, "image", snapshot, k, exclude=own)
        scores = {"none": found.plain @ plain.T, "image": found.vectors @ plain.T}  # (B, C) each
        scores |= {"text": found.plain @ enhanced.T, "both": found.vectors @ enhanced.T}
        if baselines is not None:
            near = snapshot.retrieve(seen.key(snapshot.key_kind("image")), "image", NEAREST, exclude=own)
            scores |= {"(1-NN)": baselines.nearest(near.ids, near.scores, near.mask), "(class means)": found.plain @ baselines.means.T}
        target = np.array([labels.index(sample.caption) for sample in kept])  # (B,)
        right.update({(method, n): int(top_k_hits(each, target, n).sum()) for method, each in scores.items() for n in (1, 5)})
        images += len(kept)
    if not images:
        raise DataError(f"no image could be classified, {len(rejects)} were rejected: check the labels and the field that names them")
    lines = [Line(method, right[method, 1], right[method, 5]) for method in dict.fromkeys(method for method, _ in right)]
    return ClassifyReport(snapshot.ref, reco.fusion_id, k, len(labels), images, rejects, lines)


def _labelled(samples: Iterable[Sample | Reject], labels: set[str]) -> Iterator[Sample | Reject]:
    """The same stream, with a sample of an unknown label turned into a Reject."""
    for item in samples:
        if isinstance(item, Sample) and item.caption not in labels:
            yield Reject(item.id, f"its label {item.caption!r} is not among those asked for")
        else:
            yield item


@dataclass(frozen=True, slots=True, eq=False)
class _Baselines:
    """What one would try without text: the nearest photo, and the class means, with the memory's own labels.

    column: pair id -> label index.  means: (C, D) float32, of the CLIP vectors; an image of the memory itself is part of its mean.
    """

    column: dict[str | int, int]
    means: np.ndarray

    @classmethod
    def of(cls, snapshot: Snapshot, labels: Sequence[str], label_field: str) -> "_Baselines | None":
        """None where the memory is too large to be read whole, or its records name none of the labels."""
        if len(snapshot) > BASELINE_PAIRS:
            return None
        anywhere = np.eye(1, snapshot.manifest.key_dim("text"), dtype=np.float32)  # (1, Dk): any query finds all, if asked for all
        pairs = snapshot.retrieve(anywhere, "text", len(snapshot))
        index = {label: i for i, label in enumerate(labels)}
        target = np.array([index.get(str(record.get(label_field)), -1) for record in pairs.records(0)])  # (N,)
        if not (target >= 0).any():
            return None
        ids, images = pairs.ids[pairs.mask], pairs.values[pairs.mask]  # (N,), (N, D)
        named = target >= 0
        column = dict(zip(ids[named].tolist(), target[named].tolist(), strict=True))
        return cls(column, class_means(images[named], target[named], len(labels)))

    def nearest(self, ids: np.ndarray, scores: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, C) float32: the score of the nearest neighbour of each label, -inf where none was found. ids, scores, mask: (B, K)."""
        best = np.full((len(ids), len(self.means)), -np.inf, np.float32)
        for b, place in zip(*np.nonzero(mask), strict=True):
            column = self.column.get(ids[b, place].item())
            if column is not None:
                best[b, column] = max(best[b, column], scores[b, place])
        return best
