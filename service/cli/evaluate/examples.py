"""Example photos of a classification report: some that the memory helped, some that it hurt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from index_store import Snapshot

if TYPE_CHECKING:
    from index_store.build.source import Reject
    from models.data.samples import Sample
    from models.evaluation.evaluate import Labels
    from models.evaluation.queries import LabelledPhotos, Setting
    from models.evaluation.report import Report
    from models.evaluation.report_html import Example
    from models.reco import Reco

EXAMPLES = 8  # of either kind
NEIGHBOURS = 5  # shown of each example


@dataclass(frozen=True, slots=True)
class Subject:
    """What a classification measured: the model, the photos, their labels and the memory."""

    reco: Reco
    photos: LabelledPhotos
    labels: Labels
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Examples:
    """Photos right with the memory alone, and photos right without it alone."""

    helped: list[Example]
    hurt: list[Example]


def choose_examples(
    report: Report, settings: Sequence[Setting], subject: Subject, data: Iterable[Sample | Reject]
) -> Examples | None:
    """Up to EXAMPLES photos of either kind, drawn with a fixed seed; None where plain CLIP is best.

    data: read once more, for the pixels.
    """
    from models.evaluation.report_html import best_line

    best = best_line(report).method
    setting = next((each for each in settings if str(each) == best), None)
    if setting is None:
        return None
    before, after = (report.hits[method]["top-1"] for method in ("none", best))  # (N,) bool each
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(np.flatnonzero(chosen))[:EXAMPLES] for chosen in (~before & after, before & ~after)]
    pictures = _read_pictures({subject.photos.ids[row] for rows in drawn for row in rows}, data)
    helped, hurt = ([_example(row, report, setting, subject, pictures) for row in rows.tolist()] for rows in drawn)
    return Examples(helped, hurt)


def _example(row: int, report: Report, setting: Setting, subject: Subject, pictures: Mapping[str, bytes]) -> Example:
    """One photo with its label, the guesses before and after, and its neighbours."""
    from models.evaluation.report_html import Example

    reco, photos = subject.reco, subject.photos
    encoded, own = photos.queries.encoded.take([row]), [photos.queries.own[row]]
    params = setting.params("image", own)
    refined = reco.enhance(encoded, "image", subject.snapshot, setting.k or reco.k, params, mode=setting.mode)
    near: list[tuple[str, float]] = []
    if refined.neighbors is not None:
        captions = [str(record["caption"]) for record in refined.neighbors.records(0)]
        near = list(zip(captions, refined.neighbors.scores[0].tolist(), strict=False))
    before, after = (subject.labels.labels[report.guesses[method][row]] for method in ("none", str(setting)))
    return Example(pictures[photos.ids[row]], photos.labels[row], before, after, near[:NEIGHBOURS])


def _read_pictures(wanted: set[str], data: Iterable[Sample | Reject]) -> dict[str, bytes]:
    """Small JPEGs of the photos with these ids."""
    from models.data.samples import Sample
    from models.encoder.image_io import read_image
    from models.evaluation.report_html import thumbnail

    samples = (item for item in data if isinstance(item, Sample) and item.id in wanted)
    return {sample.id: thumbnail(read_image(sample.image)) for sample in samples}
