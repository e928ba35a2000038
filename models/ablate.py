"""`reco eval ablate`: every claim of the method as a row, measured on one set of labelled photos over one memory.

What is learned here is learned from the pairs of another memory, which ask that memory itself and never find themselves, so the memory
that answers was never seen in training. Every finished row is kept on disk: a second run goes on where the first one stopped.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from index_store.pairs import SIDES, Pairs, Side
from index_store.snapshot import Snapshot
from models.checkpoint import FusionFile, training_free
from models.clip import Encoder
from models.episodes import Episode, joined, look_up
from models.errors import DataError
from models.evaluate import PLAIN, Labels, answer
from models.finetune import Tuning, finetuned
from models.fusion import PRESETS, RULES, build_fusions
from models.loop import Learning, learn
from models.metrics import paired_interval, top_k_hits
from models.parts import SHARES, Parts
from models.prepare import encode_samples
from models.queries import ENHANCE, Photos, Setting
from models.reco import Reco, Route
from models.report_tables import table
from models.samples import Sample
from models.training_config import TERMS

KS = (1, 2, 5, 10, 20, 50)
NOTHING = -1.0  # a limit that every neighbour exceeds


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the learned rows learn.  alpha: of every rule.  seeds: at least three for an interval that means something.

    learning_rate: of what starts at plain CLIP.  refining_rate: of what starts at the rule, whose own numbers stay: larger steps fit the
    pairs better, held-out ones too, and unlearn what holds for any other memory.
    """

    steps: int = 200
    batch: int = 256
    learning_rate: float = 1e-4
    refining_rate: float = 1e-5
    k: int = 10
    alpha: float = 2.0
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.  shares: top-1 by seed.  gain over plain with its 95 % interval, of the seeds' mean per photo.

    seconds: how long the learning took from photos to weights, where that is what the row compares.
    """

    claim: str
    setting: str
    shares: Sequence[float]
    gain: float
    low: float
    high: float
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Rival:
    """What full fine-tuning takes.  pairs: its photos with captions.  photos: the queries, encoded by another encoder."""

    pairs: Sequence[Sample]
    photos: Callable[[Encoder], Photos]
    tuning: Tuning


@dataclass(frozen=True, slots=True)
class Outcome:
    """(N,) bool, which photos one seed of a row gets right, and the seconds of its learning where they count."""

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

    folder: where memories are built and rows are kept.  served: the fusion that answers requests, for a row of its own.
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
        asked = [sorted(zip(self.photos.ids, self.photos.labels, strict=True)), self.labels.labels, self.labels.templates]
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
        """The default fusion alone learned from the same pairs, encoding them and finding their neighbours included; served as ever."""
        begun = time.perf_counter()
        kinds = {side: self.memory.key_kind(side) for side in SIDES}
        pairs = joined(list(encode_samples(rival.pairs, self.encoder, kinds=kinds)))
        file = self._learned("default", seed, TERMS, self._asked(pairs, self._lessons.built(pairs)))
        seconds = time.perf_counter() - begun
        return Outcome(self.right(Trial(file, self.memory, Setting("both"))), seconds)

    def rule(self, name: str) -> FusionFile:
        """A training-free fusion."""
        return training_free(name, self.encoder.dim, alpha=self.recipe.alpha, k=self.recipe.k)

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
        learning = Learning(recipe.steps, recipe.batch, rate, 0.01, seed, self.encoder.logit_scale, terms, pool_learning_rate=0.0)
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


@dataclass(frozen=True, slots=True)
class Planned:
    """A row to be measured.  measure: what comes of a seed.  seeded: whether the seed matters."""

    claim: str
    setting: str
    measure: Callable[[int], Outcome]
    seeded: bool = False


def ablate(bench: Bench, kept: Path) -> list[Row]:
    """Every row, in the order of the plan; those that `kept` already holds are not measured again.

    kept: a line that names the data, then a line per row. DataError where it was measured on something else.
    """
    done = {(row.claim, row.setting): row for row in _read(kept, bench.identity)}
    plain = bench.right(Trial(bench.rule("none"), bench.memory, PLAIN))
    rows = list[Row]()
    for planned in [*plan(bench), *contest(bench)]:
        row = done.get((planned.claim, planned.setting))
        if row is None:
            seeds = bench.recipe.seeds if planned.seeded else bench.recipe.seeds[:1]
            row = _row(planned, plain, [planned.measure(seed) for seed in seeds])
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        rows.append(row)
    return rows


def plan(bench: Bench) -> Iterator[Planned]:
    """What is measured, claim by claim, on the frozen encoder."""
    core, both, memory = bench.rule("core"), Setting("both"), bench.memory

    def fixed(claim: str, setting: str, trial: Trial) -> Planned:
        return seeded(claim, setting, lambda _: trial, matters=False)

    def seeded(claim: str, setting: str, trial: Callable[[int], Trial], *, matters: bool = True) -> Planned:
        return Planned(claim, setting, lambda seed: Outcome(bench.right(trial(seed))), matters)

    yield fixed("plain CLIP", "none", Trial(core, memory, PLAIN))
    vectors = bench.parts.by_vectors()
    for route in (Route("uni", "cross"), Route("uni", "uni"), Route("cross", "cross"), Route("cross", "uni")):
        cell = f"{route.search} search, {route.fuse} fusion"
        yield fixed("search x fusion, vector keys", cell, Trial(core, vectors, replace(both, route=route)))
    yield fixed("search keys", "the memory's own", Trial(core, memory, both))
    for name in RULES:
        yield fixed("fusion", f"{name}, not learned", Trial(bench.rule(name), memory, both))
    if (served := bench.served) is not None:
        for name in RULES[1:] if served.k != bench.recipe.k else ():
            yield fixed("fusion", f"{name}, not learned, k {served.k}", Trial(bench.rule(name), memory, replace(both, k=served.k)))
        yield fixed("fusion", f"{served.fusion_id}, which serves, k {served.k}", Trial(served, memory, both))
    for name in PRESETS:
        yield seeded("fusion", f"{name}, learned", partial(_learned, bench, name, TERMS))
    yield fixed("control", "empty memory", Trial(core, memory, replace(both, image_limit=NOTHING, text_limit=NOTHING)))
    yield seeded("control", "shuffled memory", lambda seed: Trial(core, bench.parts.shuffled(seed), both))
    for enhance in ENHANCE[1:]:
        yield fixed("side enhanced", enhance, Trial(core, memory, Setting(enhance)))
    for k in KS:
        if k <= len(memory):
            yield fixed("neighbours", f"k {k}", Trial(core, memory, replace(both, k=k)))
    for share in SHARES:
        yield seeded("size of the memory", f"{share:.0%}, core", partial(_smaller, bench, share), matters=share < 1)
        yield seeded("size of the memory", f"{share:.0%}, default learned with 1 %", partial(_grown, bench, share))
    for term in TERMS:
        yield seeded("loss", f"{term} alone", partial(_learned, bench, "default", (term,)))


def contest(bench: Bench) -> Iterator[Planned]:
    """The fusion alone against the whole encoder, on the same pairs; fine-tuning with one seed, as it takes minutes."""
    if (rival := bench.rival) is None:
        return
    claim, tuning, recipe = f"learned from the same {len(rival.pairs)} pairs", rival.tuning, bench.recipe
    asked = f"default fusion alone, {recipe.steps} x {recipe.batch}"
    yield Planned(claim, asked, lambda seed: bench.fused(rival, seed), True)
    yield Planned(claim, f"full fine-tuning, {tuning.steps} x {tuning.batch}, no memory, one seed", lambda _: bench.tuned(rival))


def _learned(bench: Bench, preset: str, terms: Sequence[str], seed: int) -> Trial:
    """Learned from the other memory, served with this one, which came after training."""
    return Trial(bench.taught(preset, seed, terms), bench.memory, Setting("both"))


def _smaller(bench: Bench, share: float, seed: int) -> Trial:
    snapshot = bench.parts.share(share, seed)
    return Trial(bench.rule("core"), snapshot, _within(Setting("both"), snapshot))


def _grown(bench: Bench, share: float, seed: int) -> Trial:
    """Learned with a hundredth of one memory, served with a share of the other."""
    snapshot = bench.parts.share(share, seed)
    return Trial(bench.taught("default", seed, share=0.01), snapshot, _within(Setting("both"), snapshot))


def _within(setting: Setting, snapshot: Snapshot) -> Setting:
    """k no larger than the memory."""
    return replace(setting, k=min(10, len(snapshot)))


def _row(planned: Planned, plain: np.ndarray, outcomes: Sequence[Outcome]) -> Row:
    right = [outcome.right for outcome in outcomes]
    mean = np.mean(right, axis=0)  # (N,)
    low, high = paired_interval(plain, mean)
    times = [outcome.seconds for outcome in outcomes if outcome.seconds is not None]
    seconds = float(np.median(times)) if times else None
    shares = [float(each.mean()) for each in right]
    return Row(planned.claim, planned.setting, shares, float(mean.mean() - plain.mean()), low, high, seconds)


def _read(kept: Path, identity: str) -> list[Row]:
    if not kept.exists():
        kept.write_text(json.dumps({"identity": identity}) + "\n", "utf-8")
    first, *rows = [json.loads(line) for line in kept.read_text("utf-8").splitlines()]
    if first != {"identity": identity}:
        raise DataError(f"{kept.name} holds rows measured on other data, memories or options: name another folder with --out")
    return [Row(**row) for row in rows]


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/RESULTS.md."""
    cells = [
        (
            row.claim,
            row.setting,
            f"{100 * np.mean(row.shares):.1f}",
            f"{100 * np.std(row.shares):.1f}" if len(row.shares) > 1 else "",
            f"{100 * row.gain:+.1f}",
            f"{100 * row.low:+.1f} to {100 * row.high:+.1f}",
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
        for row in rows
    ]
    return table(("claim", "setting", "top-1 %", "spread over seeds", "gain over plain", "95 % interval", "learned in, s"), cells)
