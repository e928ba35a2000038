"""Photos for a report of `reco eval classify`: some that the best setting helped, and as many that it hurt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from index_store import Snapshot

if TYPE_CHECKING:
    from index_store.build.source import Reject
    from models.data.samples import Sample
    from models.evaluation.evaluate import Labels, Report
    from models.evaluation.queries import Photos, Setting
    from models.evaluation.report_html import Example
    from models.reco import Reco

__all__ = ["Pictured", "examples"]

Pictured = tuple[list["Example"], list["Example"]]  # helped, hurt
Items = Callable[[], "Iterable[Sample | Reject]"]  # reads the sources from their beginning
EXAMPLES, NEIGHBOURS = 8, 5  # of either kind in a report, and the neighbours shown of each


def examples(
    report: Report,
    settings: Sequence[Setting],
    reco: Reco,
    photos: Photos,
    labels: Labels,
    snapshot: Snapshot,
    items: Items,
) -> Pictured:
    """Some photos that the best setting helped, and as many that it hurt, drawn with a fixed seed."""
    from models.evaluation.report_html import best_line

    setting = next((each for each in settings if str(each) == best_line(report).method), None)
    if setting is None:
        return [], []
    before, after = (report.hits[method]["top-1"] for method in ("none", str(setting)))
    rng = np.random.default_rng(0)
    drawn = [rng.permutation(np.flatnonzero(chosen))[:EXAMPLES] for chosen in (~before & after, before & ~after)]
    pictures = _pictures({photos.ids[row] for rows in drawn for row in rows}, items)
    helped, hurt = (
        [_example(row, report, setting, reco, photos, labels, snapshot, pictures) for row in rows.tolist()]
        for rows in drawn
    )
    return helped, hurt


def _example(
    row: int,
    report: Report,
    setting: Setting,
    reco: Reco,
    photos: Photos,
    labels: Labels,
    snapshot: Snapshot,
    pictures: Mapping[str, bytes],
) -> Example:
    from models.evaluation.report_html import Example

    one, k = photos.queries.encoded.take([row]), setting.k or reco.k
    own = [photos.queries.own[row]]
    found = reco.enhance(one, "image", snapshot, k, setting.params("image", own), mode=setting.mode).neighbors
    near = (
        []
        if found is None
        else list(zip([str(each["caption"]) for each in found.records(0)], found.scores[0].tolist(), strict=False))
    )
    before, after = (labels.labels[report.guesses[method][row]] for method in ("none", str(setting)))
    return Example(pictures[photos.ids[row]], photos.labels[row], before, after, near[:NEIGHBOURS])


def _pictures(wanted: set[str], items: Items) -> dict[str, bytes]:
    """Small JPEGs of the photos with these ids, read once more from the sources."""
    from models.data.samples import Sample
    from models.encoder.image_io import read_image
    from models.evaluation.report_html import thumbnail

    samples = (item for item in items() if isinstance(item, Sample) and item.id in wanted)
    return {sample.id: thumbnail(read_image(sample.image)) for sample in samples}
