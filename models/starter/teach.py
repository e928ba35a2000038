"""The starter's fusion: the training-free rule with its one number chosen, then the learned one that starts from it.

Both are chosen and learned on the episodes of `lessons`; which of them is shipped is decided by `make_starter`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from index_store.pairs import Side
from models.episodes import Episode, Lookup
from models.fusion import Fusion, build_fusions
from models.starter.lessons import Classroom
from models.starter.photos import Photos
from models.train import Learning, accuracy, learn

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
SERVED_K = 10
STEPS, BATCH, LEARNING_RATE, POOL_LEARNING_RATE, WEIGHT_DECAY, DROP = 400, 256, 2e-5, 0.2, 0.05, 0.2
NAMINGS = (None, "one", "two", "three")


@dataclass(frozen=True, slots=True)
class Lessons:
    """Episodes to learn from, and others, of other classes and photos, to choose by."""

    learned: Sequence[Episode]
    chosen_by: Sequence[Episode]


def prepare(classroom: Classroom, objects: Mapping[str, Photos], memory: Photos, sentences: Photos) -> Lessons:
    """objects: photos with one class each, by name.  memory, sentences: photos with sentences, the first as the memory."""
    learned, chosen_by = [], []
    for key in ("trunk", "vector"):
        for name, photos in objects.items():
            third = np.unique(photos.column("class"), return_inverse=True)[1] % 3 == 2  # every third class is kept to choose by
            learned += [classroom.classes(name, photos.take(np.flatnonzero(~third)), key, naming) for naming in NAMINGS]
            chosen_by += [classroom.classes(name, photos.take(np.flatnonzero(third)), key, naming) for naming in NAMINGS[:2]]
        half = np.arange(len(sentences)) % 2 == 0
        known = classroom.sentence_memory(memory, key)
        learned.append(classroom.sentences("Flickr8k", sentences.take(np.flatnonzero(half)), known, key))
        chosen_by.append(classroom.sentences("Flickr8k", sentences.take(np.flatnonzero(~half)), known, key))
    return Lessons(learned, chosen_by)


def best_alpha(dim: int, lessons: Lessons) -> float:
    """The alpha of the training-free rule that classifies best where captions are classes, as in the starter's memory."""
    episodes = [episode for episode in lessons.chosen_by if "names" in episode.name]

    def grade(alpha: float) -> float:
        rule = build_fusions("default", dim, alpha=alpha)
        return float(np.mean([graded(rule, episode) for episode in episodes]))

    return max(ALPHAS, key=grade)


def grades(fusions: Mapping[Side, Fusion], lessons: Lessons) -> dict[str, float]:
    """Per cent right in each episode that nothing was learned from, with the k that is served."""
    return {episode.name: round(100 * graded(fusions, episode), 1) for episode in lessons.chosen_by}


def learned_fusion(dim: int, alpha: float, lessons: Lessons, scale: float, seed: int) -> Mapping[Side, Fusion]:
    """The `default` preset, learned from the rule on."""
    torch.manual_seed(seed)
    fusions = build_fusions("default", dim, alpha=alpha)
    learning = Learning(STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, seed, scale, drop=DROP, pool_learning_rate=POOL_LEARNING_RATE)
    learn(fusions, lessons.learned, [np.arange(len(episode)) for episode in lessons.learned], learning)
    return fusions


def graded(fusions: Mapping[Side, Fusion], episode: Episode) -> float:
    """Accuracy on all pairs of an episode, with the k that is served."""
    return accuracy(fusions, nearest(episode, SERVED_K), np.arange(len(episode)))


def nearest(episode: Episode, k: int) -> Episode:
    """The same episode with only the k nearest neighbours."""
    lookups = {
        side: Lookup(found.query, found.values[:, :k], found.scores[:, :k], found.mask[:, :k]) for side, found in episode.lookups.items()
    }
    return replace(episode, lookups=lookups)
