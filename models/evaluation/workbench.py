"""Shared state of an ablation: the encoded data, the memories derived from it and the trained
fusions, each made once.

Fusions are trained on the pairs of a second memory. Those pairs query that second memory and never
find themselves, so the memory under test is never seen in training.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from index_store.snapshot import Snapshot
from index_store.types import SIDES, Pairs, Side
from models.data.encode import encode_samples
from models.data.samples import Sample
from models.encoder.encoder import Encoder
from models.evaluation.evaluate import PLAIN, Labels, score_photos
from models.evaluation.finetune import Tuning, fine_tune
from models.evaluation.metrics import top_k_hits
from models.evaluation.queries import LabelledPhotos, Setting
from models.evaluation.submemories import SubMemories
from models.fusion.checkpoint import FusionFile, training_free_fusions
from models.fusion.fusion import build_fusions
from models.reco import Reco
from models.training.config import TERMS
from models.training.episodes import Episode, concatenate_pairs, look_up
from models.training.trainer import TrainerConfig, learn


@dataclass(frozen=True, slots=True)
class LearningRecipe:
    """Hyperparameters of the trained rows.

    alpha: strength of every training-free rule.  seeds: at least three for a meaningful interval.
    learning_rate: of parameters that start at plain CLIP.  refining_rate: of the layer on top of
    the rule; larger rates fit the training memory better and generalise worse to other memories.
    pool_learning_rate: of the rule's own parameters.
    """

    steps: int = 200
    batch: int = 256
    learning_rate: float = 1e-4
    refining_rate: float = 1e-5
    pool_learning_rate: float = 0.03
    k: int = 10
    alpha: float = 2.0
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class FineTuneBaseline:
    """Input of the full fine-tuning baseline.

    pairs: photos with captions.  photos: encodes the queries with another encoder.
    """

    pairs: Sequence[Sample]
    photos: Callable[[Encoder], LabelledPhotos]
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of one seed of a row.

    right: (N,) bool, which photos are classified correctly.  seconds: training time, where the row
    compares it.
    """

    right: np.ndarray
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """Input of one measurement: the fusion, the memory and the setting."""

    file: FusionFile
    snapshot: Snapshot
    setting: Setting


class Workbench:
    """The data of all rows.

    memory: the memory under test.  taught_by: the memory whose pairs fusions are trained on.
    folder: where derived memories are built and finished rows are kept.  served: the fusion that
    serves, measured as a row of its own.
    rival: None leaves full fine-tuning out.
    """

    def __init__(
        self,
        encoder: Encoder,
        photos: LabelledPhotos,
        labels: Labels,
        memory: Snapshot,
        taught_by: Snapshot,
        recipe: LearningRecipe,
        folder: Path,
        *,
        served: FusionFile | None = None,
        rival: FineTuneBaseline | None = None,
    ) -> None:
        self.encoder, self.photos, self.labels, self.recipe, self.rival = encoder, photos, labels, recipe, rival
        self.memory, self.taught_by, self.served = memory, taught_by, served
        self.parts, self._lessons = SubMemories(memory, folder / "memories"), SubMemories(taught_by, folder / "lessons")
        self._taught = dict[tuple[object, ...], FusionFile]()
        self._target = labels.target(photos)

    @property
    def identity(self) -> str:
        """SHA-256 of data, memories and recipe. Rows with another identity belong to another table.

        The served fusion is left out, since its rows name it.
        """
        asked = [
            sorted(zip(self.photos.ids, self.photos.labels, strict=True)),
            self.labels.labels,
            self.labels.templates,
        ]
        memories = [[snapshot.ref, snapshot.manifest.created] for snapshot in (self.memory, self.taught_by)]
        rival = self.rival and [[sample.id for sample in self.rival.pairs], asdict(self.rival.tuning)]
        content = json.dumps([asked, memories, self.encoder.fingerprint, asdict(self.recipe), rival])
        return hashlib.sha256(content.encode()).hexdigest()

    def correct(self, trial: Trial) -> np.ndarray:
        """(N,) bool: the photos that one trial classifies correctly."""
        reco = Reco(self.encoder, trial.file.fusions, trial.file.fusion_id, min(trial.file.k, len(trial.snapshot)))
        scores = score_photos(reco, self.photos, self.labels, trial.snapshot, trial.setting).scores
        return top_k_hits(scores, self._target, 1)

    def measure_fine_tuning(self, rival: FineTuneBaseline) -> Outcome:
        """Fine-tune the whole encoder on the baseline's pairs and classify without a memory."""
        begun = time.perf_counter()
        encoder = fine_tune(self.encoder, rival.pairs, rival.tuning)
        seconds = time.perf_counter() - begun
        rule, photos = self.training_free("none"), rival.photos(encoder)
        labels = Labels(self.labels.labels, self.labels.templates, encoder)
        plain = score_photos(
            Reco(encoder, rule.fusions, rule.fusion_id, rule.k), photos, labels, self.memory, PLAIN
        ).scores
        return Outcome(top_k_hits(plain, labels.target(photos), 1), seconds)

    def measure_fusion_alone(self, rival: FineTuneBaseline, seed: int) -> Outcome:
        """Train the default fusion alone on the same pairs. The time includes encoding and
        neighbour search.
        """
        begun = time.perf_counter()
        kinds = {side: self.memory.key_kind(side) for side in SIDES}
        pairs = concatenate_pairs(list(encode_samples(rival.pairs, self.encoder, kinds=kinds)))
        file = self._train("default", seed, TERMS, self._look_up(pairs, self._lessons.build(pairs)))
        seconds = time.perf_counter() - begun
        return Outcome(self.correct(Trial(file, self.memory, Setting("both"))), seconds)

    def training_free(self, name: str) -> FusionFile:
        """A training-free fusion."""
        return training_free_fusions(name, self.encoder.dim, alpha=self.recipe.alpha, k=self.recipe.k)

    def trained_fusion(self, preset: str, seed: int, terms: Sequence[str] = TERMS, share: float = 1.0) -> FusionFile:
        """A fusion trained on `share` of the second memory's pairs, cached by its arguments."""
        key = (preset, seed, tuple(terms), share)
        if key not in self._taught:
            self._taught[key] = self._train(preset, seed, terms, self._training_episode(share, seed))
        return self._taught[key]

    def _train(self, preset: str, seed: int, terms: Sequence[str], episode: Episode) -> FusionFile:
        recipe = self.recipe
        torch.manual_seed(seed)
        fusions = build_fusions(preset, self.encoder.dim, alpha=recipe.alpha)
        rate = recipe.refining_rate if fusions["image"].config.start == "mean" else recipe.learning_rate
        scale, pool = self.encoder.logit_scale, recipe.pool_learning_rate
        learning = TrainerConfig(
            recipe.steps, recipe.batch, rate, 0.01, seed, scale, terms, drop=0.2, pool_learning_rate=pool
        )
        learn(fusions, [episode], [np.arange(len(episode))], learning)
        return FusionFile(fusions, recipe.k, f"{preset}-{seed}", {})

    def _training_episode(self, share: float, seed: int) -> Episode:
        """A random share of the second memory's pairs as queries of that memory."""
        return self._look_up(concatenate_pairs(list(self.taught_by.blocks())), self._lessons.random_share(share, seed))

    def _look_up(self, pairs: Pairs, snapshot: Snapshot) -> Episode:
        """The neighbours of each pair, without the pair itself and its near-duplicates."""
        rule = self.training_free("mean")
        reco = Reco(self.encoder, rule.fusions, rule.fusion_id, rule.k)
        limits: Mapping[Side, float | None] = {"image": 0.98, "text": None}
        return look_up("ablation", pairs, snapshot, reco, min(self.recipe.k, len(snapshot)), limits)
