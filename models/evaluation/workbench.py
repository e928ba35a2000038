"""What an ablation needs at hand: the data, the memories made of it, and what was learned, each
made once.

What is learned here is learned from the pairs of another memory, which ask that memory itself and
never find themselves, so the memory that answers was never seen in training.
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
from models.evaluation.evaluate import PLAIN, Labels, answer
from models.evaluation.finetune import Tuning, finetuned
from models.evaluation.metrics import top_k_hits
from models.evaluation.queries import Photos, Setting
from models.evaluation.submemories import Parts
from models.fusion.checkpoint import FusionFile, training_free_fusions
from models.fusion.fusion import build_fusions
from models.reco import Reco
from models.training.config import TERMS
from models.training.episodes import Episode, joined, look_up
from models.training.trainer import Learning, learn


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the learned rows learn.  alpha: of every rule.  seeds: at least three for an interval
    that means something.

    learning_rate: of what starts at plain CLIP.  refining_rate: of the layer on top of the rule:
    larger steps fit the pairs better, held-out ones too, and unlearn what holds for any other
    memory.  pool_learning_rate: of the rule's own numbers.
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
class Rival:
    """What full fine-tuning takes.  pairs: its photos with captions.  photos: the queries, encoded
    by another encoder.
    """

    pairs: Sequence[Sample]
    photos: Callable[[Encoder], Photos]
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class Outcome:
    """(N,) bool, which photos one seed of a row gets right, and the seconds of its learning where
    they count.
    """

    right: np.ndarray
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """What one row asks for one seed: the fusion, the memory and the setting."""

    file: FusionFile
    snapshot: Snapshot
    setting: Setting


class Bench:
    """The data of all rows.

    folder: where memories are built and rows are kept.  served: the fusion that answers requests,
    for a row of its own.
    rival: None leaves full fine-tuning out.
    """

    def __init__(
        self,
        encoder: Encoder,
        photos: Photos,
        labels: Labels,
        memory: Snapshot,
        taught_by: Snapshot,
        recipe: Recipe,
        folder: Path,
        *,
        served: FusionFile | None = None,
        rival: Rival | None = None,
    ) -> None:
        self.encoder, self.photos, self.labels, self.recipe, self.rival = encoder, photos, labels, recipe, rival
        self.memory, self.taught_by, self.served = memory, taught_by, served
        self.parts, self._lessons = Parts(memory, folder / "memories"), Parts(taught_by, folder / "lessons")
        self._taught = dict[tuple[object, ...], FusionFile]()
        self._target = labels.target(photos)

    @property
    def identity(self) -> str:
        """What the rows were measured on and how: rows of anything else are no part of this table.

        The fusion that serves is left out, since its rows name it.
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

    def right(self, trial: Trial) -> np.ndarray:
        """(N,) bool: which photos one trial gets right."""
        reco = Reco(self.encoder, trial.file.fusions, trial.file.fusion_id, min(trial.file.k, len(trial.snapshot)))
        scores = answer(reco, self.photos, self.labels, trial.snapshot, trial.setting).scores
        return top_k_hits(scores, self._target, 1)

    def tuned(self, rival: Rival) -> Outcome:
        """The whole encoder learned from the rival's pairs; it answers alone, without a memory."""
        begun = time.perf_counter()
        encoder = finetuned(self.encoder, rival.pairs, rival.tuning)
        seconds = time.perf_counter() - begun
        rule, photos = self.rule("none"), rival.photos(encoder)
        labels = Labels(self.labels.labels, self.labels.templates, encoder)
        plain = answer(Reco(encoder, rule.fusions, rule.fusion_id, rule.k), photos, labels, self.memory, PLAIN).scores
        return Outcome(top_k_hits(plain, labels.target(photos), 1), seconds)

    def fused(self, rival: Rival, seed: int) -> Outcome:
        """The default fusion alone learned from the same pairs, encoding them and finding their
        neighbours included; served as ever.
        """
        begun = time.perf_counter()
        kinds = {side: self.memory.key_kind(side) for side in SIDES}
        pairs = joined(list(encode_samples(rival.pairs, self.encoder, kinds=kinds)))
        file = self._learned("default", seed, TERMS, self._asked(pairs, self._lessons.built(pairs)))
        seconds = time.perf_counter() - begun
        return Outcome(self.right(Trial(file, self.memory, Setting("both"))), seconds)

    def rule(self, name: str) -> FusionFile:
        """A training-free fusion."""
        return training_free_fusions(name, self.encoder.dim, alpha=self.recipe.alpha, k=self.recipe.k)

    def taught(self, preset: str, seed: int, terms: Sequence[str] = TERMS, share: float = 1.0) -> FusionFile:
        """A fusion learned from `share` of the other memory's pairs, once for each combination."""
        key = (preset, seed, tuple(terms), share)
        if key not in self._taught:
            self._taught[key] = self._learned(preset, seed, terms, self._episode(share, seed))
        return self._taught[key]

    def _learned(self, preset: str, seed: int, terms: Sequence[str], episode: Episode) -> FusionFile:
        recipe = self.recipe
        torch.manual_seed(seed)
        fusions = build_fusions(preset, self.encoder.dim, alpha=recipe.alpha)
        rate = recipe.refining_rate if fusions["image"].config.start == "mean" else recipe.learning_rate
        scale, pool = self.encoder.logit_scale, recipe.pool_learning_rate
        learning = Learning(
            recipe.steps, recipe.batch, rate, 0.01, seed, scale, terms, drop=0.2, pool_learning_rate=pool
        )
        learn(fusions, [episode], [np.arange(len(episode))], learning)
        return FusionFile(fusions, recipe.k, f"{preset}-{seed}", {})

    def _episode(self, share: float, seed: int) -> Episode:
        """Every pair of the other memory asks it, or a part of it."""
        return self._asked(joined(list(self.taught_by.blocks())), self._lessons.share(share, seed))

    def _asked(self, pairs: Pairs, snapshot: Snapshot) -> Episode:
        """What each pair finds in a memory, itself and its near-copies passed over."""
        rule = self.rule("mean")
        reco = Reco(self.encoder, rule.fusions, rule.fusion_id, rule.k)
        limits: Mapping[Side, float | None] = {"image": 0.98, "text": None}
        return look_up("ablation", pairs, snapshot, reco, min(self.recipe.k, len(snapshot)), limits)
