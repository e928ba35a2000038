"""The starter's fusion: the training-free rule with its one number chosen, and the learned one.

Both come of the episodes of `lessons`, which hold nothing of Grocery; which of them is shipped is
decided by `make_starter`. What is learned is how vectors are compared, how sharply a neighbour's
score weighs, and how far the memory is believed: a thousand numbers that hold for names never seen.

The numbers below were chosen with an encoder of half the width, every third class, or a data set in
turn, kept from learning; with this encoder twice and half the steps, and a third of the rate, came
within a point.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from index_store.types import Side
from models.fusion.fusion import Fusion, build_fusions
from models.starter.lessons import Classroom
from models.starter.photos import Photos
from models.training.episodes import Episode
from models.training.train import accuracy
from models.training.trainer import Learning, learn

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
SERVED_K = 10
STEPS, BATCH, LEARNING_RATE, POOL_LEARNING_RATE, WEIGHT_DECAY, DROP = 400, 256, 1e-5, 0.03, 0.05, 0.2
NAMINGS = (None, "one", "two", "three")
EVERY = 3  # lessons with class names between two with sentences


def lessons(classroom: Classroom, objects: Mapping[str, Photos], memory: Photos, sentences: Photos) -> list[Episode]:
    """objects: photos with one class each, by name.  memory, sentences: photos with sentences, the
    first as the memory.
    """
    named, said = list[Episode](), list[Episode]()
    for key in ("trunk", "vector"):
        named += [
            classroom.classes(name, photos, key, naming, half)
            for naming in NAMINGS
            for half in (0, 1)
            for name, photos in objects.items()
        ]
        said.append(classroom.sentences("Flickr8k", sentences, classroom.sentence_memory(memory, key), key))
    return list(_mixed(named, said))


def _mixed(named: Sequence[Episode], said: Sequence[Episode]) -> Iterator[Episode]:
    """The sentences in turn after every few lessons with names."""
    for number, episode in enumerate(named, start=1):
        yield episode
        if number % EVERY == 0:
            yield said[number // EVERY % len(said)]


def best_alpha(dim: int, episodes: Sequence[Episode]) -> float:
    """The alpha of the training-free rule that classifies best where captions are classes, as in
    the starter's memory.
    """
    with_names = [episode for episode in episodes if "names" in episode.name]

    def grade(alpha: float) -> float:
        rule = build_fusions("mean", dim, alpha=alpha)
        return float(
            np.mean([accuracy(rule, nearest(episode, SERVED_K), np.arange(len(episode))) for episode in with_names])
        )

    return max(ALPHAS, key=grade)


def learned_fusion(dim: int, episodes: Sequence[Episode], scale: float, seed: int) -> Mapping[Side, Fusion]:
    """The `default` preset, all of it learned."""
    torch.manual_seed(seed)
    fusions = build_fusions("default", dim)
    learning = Learning(
        STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, seed, scale, drop=DROP, pool_learning_rate=POOL_LEARNING_RATE
    )
    learn(fusions, episodes, [np.arange(len(episode)) for episode in episodes], learning)
    return fusions


def nearest(episode: Episode, k: int) -> Episode:
    """The same episode with only the k nearest neighbours."""
    return replace(episode, lookups={side: found.nearest(k) for side, found in episode.lookups.items()})
