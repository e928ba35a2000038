"""Accuracy of the starter in per cent, measured through the `Reco.enhance` that serves.

Alphabet: N photos, C captions or classes, D width, K neighbours.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from index_store.snapshot import Snapshot
from models.encoder.encoder import Encoded
from models.evaluation.evaluate import TEMPLATES
from models.evaluation.metrics import class_means, recall_at_k, top_k_accuracy
from models.reco import Reco
from models.starter.learn import project
from models.starter.photos import DataSet


def encode_data_set(reco: Reco, photos: DataSet) -> Encoded:
    """Vectors and trunk keys of the photos, from their cached features."""
    return Encoded(project(reco.encoder.module, photos.features[:, 0]), photos.keys)


def retrieval(image: np.ndarray, text: np.ndarray, photo: np.ndarray) -> dict[str, float]:
    """Recall in both directions.

    image: (N, D).  text: (C, D).  photo: (C,) int, the photo each caption belongs to.
    """
    scores, own = text @ image.T, photo[:, None] == np.arange(len(image))  # (C, N) each
    found = {f"T2I R@{k}": recall_at_k(scores, own, k) for k in (1, 5, 10)}
    found |= {f"I2T R@{k}": recall_at_k(scores.T, own.T, k) for k in (1, 5, 10)}
    return {name: 100 * share for name, share in found.items()}


def classification(reco: Reco, photos: DataSet, labels: Sequence[str], snapshot: Snapshot) -> dict[str, float]:
    """Top-1 with neither, one or both sides refined, as `reco eval classify` counts it."""
    target = np.array([labels.index(label) for label in photos.column("class")])
    # (C, D) each
    plain, refined = (reco.embed_labels(labels, TEMPLATES, memory) for memory in (None, snapshot))
    found = reco.enhance(encode_data_set(reco, photos), "image", snapshot)
    pairs = {
        "none": (found.plain, plain),
        "image": (found.vectors, plain),
        "text": (found.plain, refined),
        "both": (found.vectors, refined),
    }
    return {name: 100 * top_k_accuracy(image @ text.T, target, 1) for name, (image, text) in pairs.items()}


def baselines_without_text(
    known: DataSet, photos: DataSet, keys: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """1-NN and class means over the same labelled photos.

    keys: by name, the (known, queried) rows that are compared.
    """
    labels, target = np.unique(known.column("class"), return_inverse=True)
    wanted = np.searchsorted(labels, photos.column("class"))
    found = {}
    for name, (there, here) in keys.items():
        found[f"1-NN, {name}"] = 100 * float((target[(here @ there.T).argmax(1)] == wanted).mean())
        found[f"class means, {name}"] = 100 * top_k_accuracy(
            here @ class_means(there, target, len(labels)).T, wanted, 1
        )
    return found


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of per cents, one row per name, all with the same columns."""
    columns = list(next(iter(rows.values())))
    lines = [f"|{name}|" + "|".join(f"{found[column]:.1f}" for column in columns) + "|" for name, found in rows.items()]
    return "\n".join([f"| |{'|'.join(columns)}|", "|---|" + "--:|" * len(columns), *lines])


def format_figures(figures: Mapping[str, float]) -> str:
    """The figures in one line."""
    return " · ".join(f"{name} {value:.1f}" for name, value in figures.items())
