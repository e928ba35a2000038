"""The starter's fusion: the training-free rule with its one number chosen, and the learned one.

Both are chosen and learned on the episodes of `lessons`; which of them is shipped is decided by `make_starter`. What pays is how sharply
a neighbour's score weighs and how strongly each side is refined: four numbers, searched for by accuracy, because the gradient of the
loss moves them past their best (on the lessons kept to choose by, with an earlier encoder: mean of ten 64.5 %, searched 76.8 %, learned
from there by gradient 75.0 to 76.3 %). What is learned on top by gradient, the transformer's correction, changes little (77.1 %) and so
takes small steps.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from index_store.pairs import SIDES, Side
from models.episodes import Episode
from models.fusion import Fusion, build_fusions, preset
from models.loop import Learning, learn
from models.starter.lessons import Classroom
from models.starter.photos import Photos
from models.train import accuracy

ALPHAS = (0.5, 1.0, 2.0, 4.0, 8.0)
SERVED_K = 10
TEMPERATURES, STRENGTHS = (0.0, 10.0, 20.0, 30.0, 40.0), (0.5, 1.0, 2.0, 3.0, 4.0)
ROUNDS = 2  # over the four numbers, one at a time; a third round changes nothing
STEPS, BATCH, LEARNING_RATE, POOL_LEARNING_RATE, WEIGHT_DECAY, DROP = 200, 256, 1e-5, 0.0, 0.05, 0.2
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
    """The `default` preset from the best weights on, which are searched for from `alpha` on both sides."""
    torch.manual_seed(seed)
    fusions = weighted(dim, searched(dim, alpha, lessons.learned))
    learning = Learning(STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY, seed, scale, drop=DROP, pool_learning_rate=POOL_LEARNING_RATE)
    learn(fusions, lessons.learned, [np.arange(len(episode)) for episode in lessons.learned], learning)
    return fusions


@dataclass(frozen=True, slots=True)
class Weights:
    """How one side is refined.  temperature: of the softmax over the scores.  alpha: the strength of what it gathers."""

    temperature: float
    alpha: float


def weighted(dim: int, weights: Mapping[Side, Weights]) -> Mapping[Side, Fusion]:
    """The `default` preset, starting at these weights."""
    config = preset("default", dim)
    return {side: Fusion(replace(config, temperature=each.temperature, alpha=each.alpha)) for side, each in weights.items()}


def searched(dim: int, alpha: float, episodes: Sequence[Episode]) -> Mapping[Side, Weights]:
    """The weights of both sides that are right most often on these episodes, one number at a time."""

    def grade(tried: Mapping[Side, Weights]) -> float:
        fusions = weighted(dim, tried)
        return float(np.mean([graded(fusions, episode) for episode in episodes]))

    best: Mapping[Side, Weights] = {side: Weights(0.0, alpha) for side in SIDES}
    for _ in range(ROUNDS):
        for side in SIDES:
            for name, values in (("temperature", TEMPERATURES), ("alpha", STRENGTHS)):
                tried = [{**best, side: replace(best[side], **{name: value})} for value in values]
                best = max([best, *tried], key=grade)
    return best


def graded(fusions: Mapping[Side, Fusion], episode: Episode) -> float:
    """Accuracy on all pairs of an episode, with the k that is served."""
    return accuracy(fusions, nearest(episode, SERVED_K), np.arange(len(episode)))


def nearest(episode: Episode, k: int) -> Episode:
    """The same episode with only the k nearest neighbours."""
    return replace(episode, lookups={side: found.nearest(k) for side, found in episode.lookups.items()})
