"""Gain of a memory on encoded queries under several settings, each against plain CLIP with the same
prompts.

Alphabet: N queries, C labels or candidates, D width, K neighbours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from index_store.search.filters import SearchParams
from index_store.snapshot import Snapshot
from index_store.types import SIDES, Side
from models.encoder.encoder import Encoder
from models.errors import DataError
from models.evaluation.metrics import (
    class_means,
    harmonic_mean,
    hubness,
    recall_hits,
    share_per_class,
    top_k_hits,
    worst_pairs,
)
from models.evaluation.queries import LabelledPhotos, Queries, RefinedQueries, Setting, encode_prompts, refine
from models.evaluation.report import Details, Figure, Hits, Line, Report, compare_with_plain
from models.evaluation.submemories import SHARES, SubMemories
from models.reco import Reco

TEMPLATES = ("a photo of a {}.",)
PLAIN = Setting("none")
NEAREST = 50  # neighbours searched to find five different labels
BASELINE_PAIRS = 50_000  # of a larger memory no class means are computed
REFERENCES, HUB_NEAREST = (
    2_000,
    128,
)  # memory pairs taken as NNN's reference queries, and how many of the nearest are averaged
WORST = 10  # confused pairs reported


class Labels:
    """A label set whose prompts are encoded once. labels: C.  templates: T, each with one {}."""

    def __init__(self, labels: Sequence[str], templates: Sequence[str], encoder: Encoder) -> None:
        if len(set(labels)) < 2:
            raise DataError(f"{len(set(labels))} label: at least two are needed to tell apart")
        self.labels, self.templates = list(labels), list(templates)
        prompts = [template.replace("{}", label) for label in labels for template in templates]
        self._prompts = Queries(encode_prompts(prompts, encoder), [()] * len(prompts))

    def vectors(self, reco: Reco, snapshot: Snapshot, setting: Setting) -> np.ndarray:
        """(C, D) float32 unit: the mean of each label's prompts, enhanced where the setting asks
        for it.
        """
        refined = refine(reco, self._prompts, "text", snapshot, setting).vectors
        means = refined.reshape(len(self.labels), len(self.templates), -1).mean(1)  # (C, D)
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)

    def target(self, photos: LabelledPhotos) -> np.ndarray:
        """(N,) int: the right label of each photo."""
        index = {label: i for i, label in enumerate(self.labels)}
        return np.array([index[label] for label in photos.labels])


@dataclass(frozen=True, slots=True, eq=False)
class ScoredPhotos:
    """Scores of N photos.

    scores: (N, C) float32.  refined: the image vectors that were compared.
    """

    scores: np.ndarray
    refined: RefinedQueries


def score_photos(
    reco: Reco, photos: LabelledPhotos, labels: Labels, snapshot: Snapshot, setting: Setting
) -> ScoredPhotos:
    """Score every photo against every label under one setting."""
    refined = refine(reco, photos.queries, "image", snapshot, setting)
    candidates = labels.vectors(reco, snapshot, setting)
    return ScoredPhotos(_score(refined.vectors, candidates, snapshot, "image", setting), refined)


def classify(
    reco: Reco,
    photos: LabelledPhotos,
    labels: Labels,
    snapshot: Snapshot,
    settings: Sequence[Setting],
    label_field: str = "class",
) -> Report:
    """Top-1 and top-5 of every setting, and of baselines without text where the memory's records
    hold the labels.
    """
    target = labels.target(photos)
    hits, guesses, nearest = dict[str, Hits](), dict[str, np.ndarray](), None
    for setting in (PLAIN, *settings):
        answers = score_photos(reco, photos, labels, snapshot, setting)
        hits[str(setting)] = {f"top-{k}": top_k_hits(answers.scores, target, k) for k in (1, 5)}
        guesses[str(setting)] = answers.scores.argmax(1)
        nearest = answers.refined.nearest if setting.enhances("image") else nearest
    hits |= baselines(photos, labels, snapshot, label_field)
    best = max((str(setting) for setting in settings), key=lambda method: hits[method]["top-1"].mean(), default="none")
    notes = [
        f"{len(photos.queries)} images, {len(labels.labels)} labels, {len(photos.rejects)} rejected",
        *describe_exclusions(settings),
    ]
    details = _details(hits, guesses[best], best, target, labels)
    return Report(
        "classify",
        snapshot.ref,
        reco.fusion_id,
        reco.k,
        notes,
        compare_with_plain(hits),
        details,
        hits,
        nearest,
        guesses,
    )


def memory_curve(
    reco: Reco, photos: LabelledPhotos, labels: Labels, parts: SubMemories, setting: Setting
) -> list[tuple[int, float]]:
    """(pairs, top-1 share) over growing random parts of a memory, one draw per size."""
    points, target = list[tuple[int, float]](), labels.target(photos)
    for share in SHARES:
        part = parts.random_share(share, seed=0)
        asked = replace(setting, k=min(setting.k or reco.k, len(part)))
        points.append(
            (len(part), float(top_k_hits(score_photos(reco, photos, labels, part, asked).scores, target, 1).mean()))
        )
    return points


def entities(
    reco: Reco,
    photos: LabelledPhotos,
    labels: Labels,
    snapshot: Snapshot,
    settings: Sequence[Setting],
    seen: Sequence[str],
) -> Report:
    """Top-1 among all labels for entities seen in training and for unseen ones, and their harmonic
    mean.

    DataError unless `seen` splits the photos into two non-empty parts.
    """
    target = labels.target(photos)
    known = np.isin(np.array(labels.labels), seen)[target]  # (N,)
    if known.all() or not known.any():
        raise DataError("every photo shows a seen entity, or none does: give a list that parts the labels")
    hits = dict[str, Hits]()
    for setting in (PLAIN, *settings):
        right = top_k_hits(score_photos(reco, photos, labels, snapshot, setting).scores, target, 1)
        hits[str(setting)] = {"seen": right[known], "unseen": right[~known]}
    notes = [
        f"{len(seen)} entities seen, {len(labels.labels) - len(seen)} unseen, {len(photos.rejects)} rejected",
        *describe_exclusions(settings),
    ]
    lines = [
        Line(line.method, [*line.figures, _harmonic_figure(hits[line.method], hits["none"])])
        for line in compare_with_plain(hits)
    ]
    return Report("entities", snapshot.ref, reco.fusion_id, reco.k, notes, lines, hits=hits)


@dataclass(frozen=True, slots=True, eq=False)
class Captioned:
    """P photos and their captions, each encoded once.

    photo: (N,) int, the photo of each caption.
    """

    images: Queries
    texts: Queries
    photo: np.ndarray


def retrieve(reco: Reco, asked: Captioned, snapshot: Snapshot, settings: Sequence[Setting]) -> Report:
    """Recall at 1, 5 and 10 in both directions, over all captions."""
    own = asked.photo[:, None] == np.arange(len(asked.images))  # (N, P) bool
    hits = dict[str, Hits]()
    for setting in (PLAIN, *settings):
        image, text = (
            refine(reco, queries, side, snapshot, setting).vectors
            for side, queries in zip(SIDES, (asked.images, asked.texts), strict=True)
        )
        to_image, to_text = (
            _score(text, image, snapshot, "text", setting),
            _score(image, text, snapshot, "image", setting),
        )
        forward = {f"T2I R@{k}": recall_hits(to_image, own, k) for k in (1, 5, 10)}
        backward = {f"I2T R@{k}": recall_hits(to_text, own.T, k) for k in (1, 5, 10)}
        hits[str(setting)] = {**forward, **backward}
    notes = [f"{len(asked.images)} photos, {len(asked.texts)} captions", *describe_exclusions(settings)]
    return Report("retrieve", snapshot.ref, reco.fusion_id, reco.k, notes, compare_with_plain(hits), hits=hits)


def _score(queries: np.ndarray, candidates: np.ndarray, snapshot: Snapshot, side: Side, setting: Setting) -> np.ndarray:
    """(B, C) float32: cosine of every query and candidate, minus the candidates' hubness where the
    setting asks for it.
    """
    scores = queries @ candidates.T
    if setting.dehub:
        scores = scores - setting.dehub * hubness(reference_queries(snapshot, side) @ candidates.T, HUB_NEAREST)
    return np.asarray(scores)


def reference_queries(snapshot: Snapshot, side: Side) -> np.ndarray:
    """(R, D) float32: the memory's first vectors of one side, as reference queries of the hubness
    (NNN).
    """
    rows = next(snapshot.blocks(REFERENCES))
    return rows.values(side).astype(np.float32)


def describe_exclusions(settings: Sequence[Setting]) -> list[str]:
    """One note that states which neighbours are skipped."""
    limits = sorted({(setting.image_limit, setting.text_limit) for setting in settings}, key=str)
    told = [f"images {image or 'any'}, texts {text or 'any'}" for image, text in limits]
    return [f"no query finds itself, by id; neighbours with a cosine above these are passed over: {'; '.join(told)}"]


def _harmonic_figure(hits: Hits, plain: Hits) -> Figure:
    """Harmonic mean of both shares; the interval resamples the photos of each part."""

    def drawn(found: Hits, rng: np.random.Generator) -> float:
        return harmonic_mean(*(float(rng.choice(found[part], len(found[part])).mean()) for part in ("seen", "unseen")))

    now, before = (harmonic_mean(float(each["seen"].mean()), float(each["unseen"].mean())) for each in (hits, plain))
    gains = [drawn(hits, np.random.default_rng(i)) - drawn(plain, np.random.default_rng(i)) for i in range(500)]
    low, high = np.percentile(gains, [2.5, 97.5])
    return Figure("harmonic mean", sum(len(part) for part in hits.values()), now, now - before, float(low), float(high))


def _details(hits: Mapping[str, Hits], guessed: np.ndarray, best: str, target: np.ndarray, labels: Labels) -> Details:
    names, rows = labels.labels, np.bincount(target, minlength=len(labels.labels))
    before, after = (share_per_class(hits[method]["top-1"], target, len(names)) for method in ("none", best))
    classes = [(names[c], int(rows[c]), float(before[c]), float(after[c])) for c in np.flatnonzero(rows)]
    return Details(
        classes, [(names[true], names[taken], times) for true, taken, times in worst_pairs(guessed, target, WORST)]
    )


def baselines(photos: LabelledPhotos, labels: Labels, snapshot: Snapshot, label_field: str) -> dict[str, Hits]:
    """1-NN and class means with the memory's own labels; {} where the memory has more than
    BASELINE_PAIRS pairs or holds none of the labels.

    A photo that is in the memory does not find itself as a neighbour, but it is part of its class
    mean.
    """
    if len(snapshot) > BASELINE_PAIRS:
        return {}
    blocks = list(snapshot.blocks())
    index = {label: i for i, label in enumerate(labels.labels)}
    known = np.array(
        [index.get(str(record.get(label_field)), -1) for block in blocks for record in block.records]
    )  # (N,)
    if not (known >= 0).any():
        return {}
    ids = np.concatenate([block.ids for block in blocks])
    image = np.concatenate([block.image for block in blocks])
    means = class_means(image[known >= 0], known[known >= 0], len(index))
    column = {name: label for name, label in zip(ids.tolist(), known.tolist(), strict=True) if label >= 0}
    seen = photos.queries.encoded
    params = SearchParams(exclude=photos.queries.own)
    near = snapshot.retrieve(seen.key(snapshot.key_kind("image")), "image", min(NEAREST, len(snapshot)), params)
    by_photo = nearest_labels(near.ids, near.scores, near.mask, column, len(index))
    target = labels.target(photos)
    scored = {"(1-NN)": by_photo, "(class means)": seen.vectors @ means.T}
    return {name: {f"top-{k}": top_k_hits(each, target, k) for k in (1, 5)} for name, each in scored.items()}


def nearest_labels(
    ids: np.ndarray, scores: np.ndarray, mask: np.ndarray, column: Mapping[str | int, int], labels: int
) -> np.ndarray:
    """(B, C) float32: the score of the nearest neighbour of each label, -inf where none was found.

    ids, scores, mask: (B, K).
    """
    best = np.full((len(ids), labels), -np.inf, np.float32)
    for b, place in zip(*np.nonzero(mask), strict=True):
        label = column.get(ids[b, place].item())
        if label is not None:
            best[b, label] = max(best[b, label], scores[b, place])
    return best
